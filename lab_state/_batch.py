"""A change of many keys, which is prepared in steps and then made in one short step. This module does no I/O.

Theory of operation. `Batch.prepare` puts the changes into two new dicts. Later, one dict becomes the top layer
of the entries, and the other dict has the unflushed changes. `prepare` also counts the new keys. It changes
no value of the state. So if a caller stops between two steps, nothing has changed.
`Batch.switch` then gives both dicts to the state, in one short step: readers see all of the
changes, or none. Later the state merges the layer into its map in steps (`State.fold_staged`).
Two cases are simpler. If there are fewer than `MANY` changes, `switch` calls `State.apply`. If the state has
more unflushed changes than the batch has changes, `switch` may add the batch to the unflushed changes.

During the steps other code may read the state, take changes for a commit, put them back, and
take or fold a view. Other code may change single keys, if it calls `before` for each of them first.
These changes are then ordered before the whole batch. All other changes must wait.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import islice
from typing import TypeVar, cast

from lab_state._entries import DELETED, Absent, Expiring, StoredOrGone, Value
from lab_state._expiry import Expiries
from lab_state._state import WATCHED_CLEAR, State

T = TypeVar("T")

MANY = 1_000
"""A call with this many keys or more works in steps. A batch of fewer changes is prepared in one step."""

STEP = 500
"""The largest number of keys that one step prepares. Such a step takes about 0.2 ms, and four times as long if the keys expire."""

_ADDED_AT_ONCE = 16_000
"""The largest number of changes that `Batch.switch` adds to the unflushed changes of the state. Adding this many takes about 5 ms."""


class Batch:
    """A change of many keys that is being prepared.

    Attributes:
        source: The changes by key. A deletion of a missing key has no effect. The caller may fill this dict
            until `prepare` begins. `switch` may empty it.
        deleted: The number of keys that the batch deletes. It is complete after `switch`, and has no
            meaning with `cleared`.
    """

    def __init__(
        self,
        state: State,
        source: dict[str, StoredOrGone],
        *,
        prefix: str | None = None,
        lifetime: int | None = None,
        cleared: bool = False,
        expired: bool = False,
    ) -> None:
        """Begin a batch. `prepare` prepares the changes.

        Args:
            state: The state.
            source: The changes; see the attribute.
            prefix: The prefix, if `source` deletes all keys with one prefix. A key with this prefix that
                other code stores during the steps is deleted, too.
            lifetime: The time to live of the values, in milliseconds from `prepare` on. Without it, each value
                keeps the expiry that it has in `source`.
            cleared: Whether to delete all keys first. Then deletions in `source` have no effect.
            expired: Whether a key that has expired can be deleted. Otherwise it counts as missing.
        """
        self.source: dict[str, StoredOrGone] = source
        self.deleted: int = 0
        self._state = state
        self._prefix = prefix
        self._lifetime = lifetime
        self._at: int | None = None
        self._is_few = False
        self._cleared = cleared
        self._expired = expired
        self._top: dict[str, StoredOrGone] = {}
        self._changes: dict[str, StoredOrGone] = {}
        self._placed: list[str] = []  # the keys that are in `_top`, and not in `_changes` yet
        self._added = 0
        self._index = state.index
        self._moved: set[str] = set()  # keys that the batch adds or removes; empty without an index
        self._stale = Expiries(0)  # the keys that lose their expiry, with the old times
        self._fresh = Expiries(0)  # the keys that get an expiry, with the new times
        self._late: set[str] = set()  # keys that other code has changed during the steps; `switch` adds them to `_top`
        # The older changes that were copied into `_changes`, and `State.taken` at that moment.
        self._older: tuple[dict[str, StoredOrGone], int] | None = None

    def before(self, key: str) -> None:
        """Note that other code changes a key right after this call.

        `switch` then decides the effect of the batch on this key.
        """
        self._late.add(key)
        self._changes.pop(key, None)
        self._moved.discard(key)
        self._stale.discard(key)
        self._fresh.discard(key)
        if key in self._top:
            if isinstance(self._top.pop(key), Absent):
                self.deleted -= 1
            elif self._cleared or key not in self._state.entries:
                self._added -= 1

    def prepare(self) -> Iterator[None]:
        """Prepare the change in steps, and yield between two steps. After the last step, call `switch` before other code runs.

        With fewer than `MANY` changes it does not yield.
        """
        state = self._state
        self._at = None if self._lifetime is None else state.now() + self._lifetime
        if self._cleared and state.on_change is not None and len(state.entries) <= WATCHED_CLEAR:
            # As in `State.apply`, these keys are deleted one by one, so that each deletion is reported to the watches.
            self.source = {**dict.fromkeys(state.entries, DELETED), **self.source}
            self._cleared, self._prefix = False, ""
        if len(self.source) < MANY:
            self._is_few = True
            self._place(self.source.items())
            self._place_changes()
            return
        while state.fold_staged(STEP):  # merge an earlier staged layer first: a state has at most one
            yield
        for number, part in enumerate(in_parts(self.source.items())):
            if number:
                yield
            # A dict that outgrows its table is copied, which takes long. So the two dicts get the same keys in different steps.
            self._place_changes()
            self._place(part)
        self._place_changes()
        while True:
            while not self._is_merged():
                yield from self._merge_older()
            if state.views and not self._cleared:
                yield from state.prepare_overwrite(list(self._top))
            if self._is_merged():
                return

    def _place(self, part: Iterable[tuple[str, StoredOrGone]]) -> None:
        """Add some of the changes to the top layer. Leave out deletions of missing keys, and keys that `before` has noted."""
        state, top, placed, late = self._state, self._top, self._placed, self._late
        entries: Container[str] = () if self._cleared else state.entries
        expiries, at = state.expiries, self._at
        with_times = not self._is_few  # few changes are made by `State.apply`, which changes the expiries, too
        has_times = with_times and bool(expiries) and not self._cleared
        moved: list[str] = []
        for key, to in part:
            if key in late:
                continue
            if isinstance(to, Absent):
                if self._cleared or not (key in entries if self._expired else state.has(key)):
                    continue
                self.deleted += 1
                moved.append(key)
            else:
                if at is not None:
                    to = Expiring(cast("Value", to), at)
                if key not in entries:
                    self._added += 1
                    moved.append(key)
            if has_times and key in expiries:
                self._stale.add(key, expiries.time_of(key))
            if with_times and isinstance(to, Expiring):
                self._fresh.add(key, to.at)
            top[key] = to
            placed.append(key)
        if self._index is not None:
            self._moved.update(moved)

    def _place_changes(self) -> None:
        """Add the keys of the last `_place` to `_changes`, unless `before` has removed them."""
        top, placed = self._top, self._placed
        self._placed = []
        self._changes.update([(key, top[key]) for key in placed if key in top])

    # The older changes, which were unflushed before the batch

    def _is_merged(self) -> bool:
        """Return whether `switch` will be short: the older changes are in `_changes`, are not needed, or are quick to merge."""
        state = self._state
        if self._older is not None:
            return self._older[0] is state.changes and self._older[1] == state.taken
        return self._cleared or len(state.changes) <= STEP or self._is_smaller()

    def _is_smaller(self) -> bool:
        """Return whether the batch is so small that `switch` adds its changes to the older changes, and not the other way round.

        Otherwise each of many small batches between two commits would copy the changes of all batches before it.
        """
        return len(self._top) <= min(_ADDED_AT_ONCE, len(self._state.changes))

    def _merge_older(self) -> Iterator[None]:
        """Copy the older changes of other keys into `_changes`, in steps.

        A commit may take the older changes meanwhile, or put them back. Then the next call of this method removes the
        copies, and the call after that copies the changes that are unflushed at that time.
        """
        if self._older is not None:
            self._older, self._changes = None, {}
            for keys in in_parts(list(self._top)):
                self._changes.update((key, self._top[key]) for key in keys if key in self._top)
                yield
            return
        older = self._state.changes
        self._older = older, self._state.taken
        for keys in in_parts(list(older)):
            for key in keys:
                if key in older and key not in self._late:
                    self._changes.setdefault(key, older[key])
            yield

    # The end

    def switch(self) -> int | None:
        """Make the changes as one. Return the new revision, or `None` if nothing changed."""
        state, late = self._state, list(self._late)
        self._late = set()
        self._place((key, to) for key in late if (to := self._wanted(key)) is not None)
        self._place_changes()
        top, changes = self._top, self._changes
        if state.views and late:
            state.before_overwrite(late)
        if self._is_few or len(top) < MANY:  # `apply` changes the expiries, too
            if top or (self._cleared and len(state.entries)):
                return state.apply(top, cleared=self._cleared)
            return None
        if self._older is None and not self._cleared and self._is_smaller():
            state.changes.update(changes)
            state.free(changes)
            changes = state.changes
        elif not self._cleared:
            for key in late if self._older is not None else state.changes:
                if key in state.changes:
                    changes.setdefault(key, state.changes[key])
        state.free(self.source)
        return state.switch(
            top,
            changes,
            size=len(state.entries) + self._added - self.deleted,
            absent=self.deleted,
            moved=self._moved if state.index is self._index else set(top),
            stale=self._stale,
            fresh=self._fresh,
            cleared=self._cleared,
        )

    def _wanted(self, key: str) -> StoredOrGone | None:
        """Return the batch's change of a key that other code has changed meanwhile; `None` if there is none."""
        if key not in self.source and self._prefix is not None and key.startswith(self._prefix):
            return DELETED
        return self.source.get(key)


def in_parts(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield the items in lists of at most `STEP` items."""
    rest = iter(items)
    while part := list(islice(rest, STEP)):
        yield part
