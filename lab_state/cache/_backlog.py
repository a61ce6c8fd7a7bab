"""What has become durable and is not in the mirror yet. Pure and synchronous.

Commits are queued as they come, which costs the flusher nothing, and merged key by key
by the mirror's own task, in small steps. Above a bound nothing is kept: then the whole
state is brought anew, and that is all there is to know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lab_state._entries import MISSING, Absent, ChangeSet, Expiring, StoredOrGone
from lab_state._values import size_of

MOST_KEYS = 100_000
MOST_BYTES = 32 * 1024 * 1024


class Backlog:
    """Commits, coalesced.

    Attributes:
        overflowed: There were too many to keep.
        end: The last revision in it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is pending, whatever there was."""
        self.overflowed: bool = False
        self.end: int = 0
        self._queue: deque[tuple[ChangeSet, Iterator[tuple[str, StoredOrGone]]]] = deque()
        self._queued = 0
        self._changes: dict[str, StoredOrGone] = {}
        self._cleared = False
        self._bytes = 0

    def __bool__(self) -> bool:
        return self.end > 0

    @property
    def keys(self) -> int:
        """How many keys there are; those that are not merged count once for each commit."""
        return len(self._changes) + self._queued

    def overflow(self) -> None:
        """Keep nothing until `clear`: something is missing, or too much was to be kept."""
        self.clear()
        self.overflowed = True

    def add(self, taken: ChangeSet) -> None:
        """A commit was made."""
        if self.overflowed:
            return
        if self.keys + len(taken.changes) > MOST_KEYS:
            self.overflow()
            return
        self._queue.append((taken, iter(taken.changes.items())))
        self._queued += len(taken.changes)
        self.end = max(self.end, taken.end)

    def merge(self, most: int) -> bool:
        """Merge up to `most` keys; False once all are."""
        while self._queue and most:
            taken, rest = self._queue[0]
            if taken.cleared:
                self._changes, self._bytes, self._cleared = {}, 0, True
                self._queue[0] = taken._replace(cleared=False), rest
            for key, changed in rest:
                self._put(key, changed)
                self._queued -= 1
                most -= 1
                if not most:
                    break
            else:
                self._queue.popleft()
        if self._bytes > MOST_BYTES:
            self.overflow()
        return bool(self._queue)

    def take(self, start: int) -> ChangeSet:
        """All of it, merged, as one step from revision `start`; then nothing is pending."""
        taken = ChangeSet(start, self.end, self._cleared, self._changes, 0.0)
        self.clear()
        return taken

    def put_back(self, taken: ChangeSet) -> None:
        """What could not be brought, under what came since."""
        if self.overflowed:
            return
        self._queue.appendleft((taken, iter(taken.changes.items())))
        self._queued += len(taken.changes)
        self.end = max(self.end, taken.end)
        if self.keys > MOST_KEYS:
            self.overflow()

    def _put(self, key: str, changed: StoredOrGone) -> None:
        if (before := self._changes.get(key, MISSING)) is not MISSING:
            self._bytes -= _size(before)
        self._changes[key] = changed
        self._bytes += _size(changed)


def _size(changed: StoredOrGone) -> int:
    if isinstance(changed, Expiring):
        changed = changed.value
    return 8 if isinstance(changed, Absent) else size_of(changed)
