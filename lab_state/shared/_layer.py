"""The layer of an owner: its changes that are not durable, over its copy. This module does no I/O.

Theory of operation. There are three maps. The lowest one is the copy, with the durable state. The middle one has
the changes of the commit under way. The top one has the newer changes. `take` moves the changes from the top map to
the middle map. When the commit is durable, two things happen in one step: the record is applied to the copy, and `landed`
empties the middle map. If the commit failed, `put_back` merges the middle map and the top map.

Only the calls that the owner executes read the layer. They may come from other processes. All other reads use the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping

from lab_state._batch import in_parts
from lab_state._entries import EXPIRED, ChangeSet, Expiring, Stored, StoredOrGone
from lab_state._expiry import Expiries
from lab_state._layered import Layered
from lab_state._order import bounds
from lab_state._state import State
from lab_state._state._contents import is_due

Applied = Callable[[Collection[str] | None, int], object]
"""A callback that gets the keys of a change, or of a part of it, and its revision. The keys are `None` if all keys were deleted first."""


class OwnerLayer(Layered):
    """The changes of an owner that are not durable, over its copy.

    `changes` has the changes that no commit has taken. `revision` is the revision of the last change. A `Flusher`
    and `Calls` use this object like a `State`, with four exceptions. It has no views, no staged changes and no index,
    and it does not count values. The copy counts the values.

    Attributes:
        copy: The durable state. Only records change it.
        on_applied: A callback for each change; `None` if there is none. A sweep is a change, too. If a change is made in steps,
            the callback is called for each part.
    """

    __slots__ = ("_has_times", "_middle", "_middle_has_times", "_swept_at", "copy", "on_applied")

    def __init__(self, copy: State) -> None:
        """Begin at the revision of the copy, without changes."""
        self.copy: State = copy
        self.on_applied: Applied | None = None
        self._middle = Layered(copy)
        # Whether any changed key expires: in the top map, and in the middle map. The layer has no index of expiries.
        self._has_times = self._middle_has_times = False
        self._swept_at = 0  # the revision of the layer after the last sweep; 0 if that sweep examined no key
        super().__init__(self._middle)
        self.skip_to(copy.revision)
        self.versions, self.versions_at = copy.versions, copy.versions_at

    def now(self) -> int:
        """Return the time of the copy."""
        return self.copy.now()

    @property
    def expires(self) -> bool:
        """Whether any key expires; see `Layered.expires`."""
        return self._has_times or self._middle_has_times or self.copy.expires

    # Changes

    def set(self, key: str, stored: Stored) -> int:
        """Store one value, and return the new revision."""
        # This repeats `apply` and `_add` for one key, because most calls of other processes are `set`.
        self.before_change()
        self.changes[key] = stored
        if stored.__class__ is Expiring:
            self._has_times = True
        self.revision = revision = self.revision + 1
        if self.on_applied is not None:
            self.on_applied((key,), revision)
        return revision

    def apply(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> int:
        """Make several changes as one, and return the new revision; see `State.apply`."""
        self.before_change()
        self._add(changes, cleared=cleared)
        self.revision += 1
        return self.revision

    def apply_in_steps(
        self, parts: Iterable[Mapping[str, StoredOrGone]], *, cleared: bool = False
    ) -> Generator[None, None, int]:
        """Make many changes as one, part by part, and yield after each part. Return the number of keys in all parts.

        Run all steps. Until then, other code must neither read nor change the layer, nor call `take`. Calls of `landed` and `put_back` are allowed.

        Args:
            parts: The changes by key, in parts. A generator may compute a part from the layer, which has all earlier parts by then.
            cleared: Whether to delete all keys first.
        """
        count = 0
        if cleared:
            self.before_change()
            self._add({}, cleared=True)
        for part in parts:
            if part:
                if not count and not cleared:
                    self.before_change()
                self._add(part, cleared=False)
                count += len(part)
            yield
        self.revision += bool(count or cleared)
        return count

    def _add(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> None:
        """Add changes of the next revision."""
        if cleared:
            self.free(self.changes)
            self.show({}, Expiries(0), cleared=True)
            self._has_times = False
        self.changes.update(changes)
        self._has_times = self._has_times or Expiring in map(type, changes.values())
        if self.on_applied is not None:
            self.on_applied(None if cleared else changes.keys(), self.revision + 1)

    def candidates(self, prefix: str) -> Iterator[list[str]]:
        """Yield keys with a prefix, in parts. Each key that exists now is among them. Some are yielded twice, and some do not exist."""
        mine = [*self.changes, *self._middle.changes]
        pieces = self.copy.pieces(*bounds(prefix))
        for part in in_parts(mine):
            yield [key for key in part if key.startswith(prefix)]
        for piece in pieces:
            yield list(piece)

    # Sweeps

    @property
    def is_sweeping(self) -> bool:
        """Whether the last sweep is not durable. Meanwhile another sweep would find the same keys."""
        return self.copy.revision < self._swept_at

    def sweep(self, most: int) -> int:
        """Delete expired keys of the copy, as one change. Return the number of keys that were examined, up to `most`.

        The copy still has these keys until the record is applied, and they stay in its index of expiries. So the
        call does nothing while `is_sweeping` is True. A key with a newer value that is not durable is left as it is,
        unless the newer value has expired as well.
        """
        if self.is_sweeping:
            return 0
        now, entries = self.now(), self.entries
        keys = self.copy.expiries.overdue(now, most)
        found = [key for key in keys if is_due(entries, key, now)]
        self._drop(found, EXPIRED)
        self._swept_at = self.revision if keys else 0
        return len(keys)

    # Commits

    def take(self, taken: ChangeSet | None = None) -> ChangeSet:
        """Take the changes away for a commit, and return them; see `State.take`.

        Reads of the layer still find these changes. The caller must call `landed` or `put_back` before the next `take`.
        """
        if taken is None:
            taken = self.untaken()
        self._middle.show(taken.changes, Expiries(0), cleared=taken.cleared)
        self.show({}, Expiries(0), cleared=False)
        self._has_times, self._middle_has_times = False, self._has_times
        self.taken = self.revision
        return taken

    def landed(self, taken: ChangeSet) -> None:
        """Drop the changes of the commit under way. The caller has applied them to the copy in the same step."""
        assert self.copy.revision >= taken.end
        self._empty_middle()

    def _empty_middle(self) -> None:
        self._middle.show({}, Expiries(0), cleared=False)
        self._middle_has_times = False

    def put_back(self, taken: ChangeSet) -> None:
        """Put back the changes of a failed commit. Newer changes stay. A second call changes nothing."""
        super().put_back(taken)
        self._has_times = self._has_times or self._middle_has_times
        self._empty_middle()
        self.show(self.changes, Expiries(0), cleared=self.cleared)
