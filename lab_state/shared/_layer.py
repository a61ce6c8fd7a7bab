"""The layer of an owner: its changes that are not durable, over its copy. Pure and synchronous.

Theory of operation. There are three maps. The copy has the durable state. Above it are the changes of the
commit under way, and above these the newer changes. `take` moves the newer changes into the middle. When
the commit is durable, its record is applied to the copy, and `landed` empties the middle, in the same step.
If the commit failed, `put_back` brings the middle and the newer changes together.

Only calls of the owner read the layer. All other reads use the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from lab_state._entries import EXPIRED, ChangeSet, Expiring, StoredOrGone
from lab_state._expiry import Expiries
from lab_state._layered import Layered
from lab_state._state import State
from lab_state._state._contents import is_due

Applied = Callable[[Collection[str] | None, int], object]
"""A callback that gets the keys of a change and its revision. The keys are `None` if all keys were deleted first."""


class OwnerLayer(Layered):
    """The changes of an owner that are not durable, over its copy.

    `changes` has the changes that no commit has taken. `revision` is that of the last change. Everything
    that a `Flusher` and `Calls` do with a `State` can be done with this object, with four exceptions: it has no
    views, no calls in steps, and no index, and it does not count values. The copy counts them.

    Attributes:
        copy: The durable state. Only records change it.
        on_applied: A callback after each change; `None` if there is none. A sweep is a change, too.
    """

    __slots__ = ("_middle", "_swept_at", "copy", "on_applied")

    def __init__(self, copy: State) -> None:
        """Begin at the revision of the copy, without changes."""
        self.copy: State = copy
        self.on_applied: Applied | None = None
        self._middle = Layered(copy)
        self._swept_at = 0  # the revision of the layer at the last sweep
        super().__init__(self._middle)
        self.skip_to(copy.revision)

    def now(self) -> int:
        """Return the time of the copy."""
        return self.copy.now()

    # Changes

    def apply(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> int:
        """Make several changes as one, and return the new revision; see `State.apply`."""
        self.before_change()
        self.revision += 1
        if cleared:
            self._empty()
        self.changes.update(changes)
        expiries = self.expiries
        for key, to in changes.items():
            if isinstance(to, Expiring):
                expiries.add(key, to.at)
            elif expiries:
                expiries.discard(key)
        if self.on_applied is not None:
            self.on_applied(None if cleared else changes.keys(), self.revision)
        return self.revision

    def _empty(self) -> None:
        self.free(self.changes)
        self.show({}, Expiries(0), cleared=True)

    # Sweeps

    @property
    def is_sweeping(self) -> bool:
        """Whether the last sweep is not durable. Until then, another one would find the same keys."""
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

        The layer still shows them. The caller must call `landed` or `put_back` before the next `take`.
        """
        if taken is None:
            taken = self.untaken()
        self._middle.show(taken.changes, self.expiries, cleared=taken.cleared)
        self.show({}, Expiries(0), cleared=False)
        self.taken = self.revision
        return taken

    def landed(self, taken: ChangeSet) -> None:
        """Drop the changes of the commit under way. The caller has applied them to the copy in the same step."""
        assert self.copy.revision >= taken.end
        self._middle.show({}, Expiries(0), cleared=False)

    def put_back(self, taken: ChangeSet) -> None:
        """Put back the changes of a failed commit. Newer changes stay. A second call changes nothing."""
        had_times = bool(self.expiries) or bool(self._middle.expiries)
        super().put_back(taken)
        expiries = Expiries(0)
        if had_times:
            for key, to in self.changes.items():
                if isinstance(to, Expiring):
                    expiries.add(key, to.at)
        self._middle.show({}, Expiries(0), cleared=False)
        self.show(self.changes, expiries, cleared=self.cleared)
