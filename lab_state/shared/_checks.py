"""Decide whether a key that a call has read has changed since then. This module does no I/O.

The owner keeps the keys that changed lately, each with the revision of its last change. Changes that are
not durable are included. All changes after the revision `floor` are known. If a call has read an older
revision, some changes since that revision are not known. So the check of the call does not hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Generator
from itertools import islice, takewhile

MOST_KEYS = 100_000
"""The largest number of keys that are kept. A check with a prefix may examine each of them, which takes about 20 ms."""

_LOOKED_AT_ONCE = 1000
"""The number of keys that one step of `hold_in_steps` examines."""


class RecentChanges:
    """The keys that changed lately, in the order of their last changes.

    Attributes:
        floor: All changes after this revision are known.
    """

    def __init__(self, revision: int, most: int = MOST_KEYS) -> None:
        """Begin at a revision. No change up to it is known. Keep at most `most` keys."""
        self.floor: int = revision
        self._most = most
        # With a plain `dict`, the deletion of the first key takes longer with each first key that was deleted before.
        self._changed: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of keys that are kept."""
        return len(self._changed)

    def note(self, keys: Collection[str], revision: int) -> None:
        """Note the keys that a change has set, deleted or swept. If there are more than `most` keys, note a clear instead."""
        if len(keys) > self._most:
            self.note_clear(revision)
            return
        changed = self._changed
        for key in keys:
            changed[key] = revision
            changed.move_to_end(key)
        while len(changed) > self._most:
            _, self.floor = changed.popitem(last=False)

    def note_clear(self, revision: int) -> None:
        """Note that a change deleted all keys. This counts as a change of every key, even of a missing one."""
        self._changed = OrderedDict()
        self.floor = revision

    def hold(self, since: int, keys: Collection[str], prefixes: Collection[str]) -> bool:
        """Return whether a check holds: none of its keys, and no key under its prefixes, changed after `since`.

        Also return False if `since` is below `floor`. A check without keys and prefixes always holds.
        """
        if not keys and not prefixes:
            return True
        if since < self.floor:
            return False
        changed = self._changed
        if any(changed.get(key, 0) > since for key in keys):
            return False
        if prefixes:
            starts = tuple(prefixes)
            for key, revision in reversed(changed.items()):
                if revision <= since:
                    break
                if key.startswith(starts):
                    return False
        return True

    def hold_in_steps(
        self, since: int, keys: Collection[str], prefixes: Collection[str]
    ) -> Generator[None, None, bool]:
        """Return whether a check holds, as `hold` does, and yield between two steps. No change may be noted meanwhile."""
        if (keys or prefixes) and since < self.floor:
            return False
        rest = iter(keys)
        while some := list(islice(rest, _LOOKED_AT_ONCE)):
            if not self.hold(since, some, ()):
                return False
            yield
        starts = tuple(prefixes)
        newer = takewhile(lambda changed: changed[1] > since, reversed(self._changed.items()))
        while starts and (part := list(islice(newer, _LOOKED_AT_ONCE))):
            if any(key.startswith(starts) for key, _ in part):
                return False
            yield
        return True
