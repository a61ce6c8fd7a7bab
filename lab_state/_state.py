"""The map in memory: entries, unflushed changes, revisions. Pure and synchronous.

Theory of operation. `entries` maps keys to stored values. A scalar is stored as it is.
Any other value is stored as its JSON, so no object of a caller is shared. `changes` holds
the keys that changed since the last commit took the changes away: each with its stored
value, or with `DELETED` or `EXPIRED`. If `cleared` is set, all older keys were deleted
before these changes. A commit takes the changes by putting an empty dict in their place
(`take`). If the commit fails, they are put back (`put_back`). A newer change of a key
replaces an older one.

A snapshot needs a view that does not change while writers go on. `freeze` returns the dict
itself as the view, and puts an `Overlay` over it that takes the writes. Afterwards `fold`
merges them into the dict in small steps. So the cost of both is independent of the size of
the state. Reading and writing `entries` works the same with and without an overlay.

A value that expires stays in `entries` until a sweep removes it. So each read calls `alive`,
and `count`, `names` and `count_in` leave out keys that are due.

The keys in order of code points are in an index (`_order`), which exists from the first call on that
needs an order. Each method that adds or removes a key notes the key for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
from typing import Any, ClassVar, Literal, TypeAlias, cast
from weakref import ref

from lab_state._entries import (
    DELETED,
    EXPIRED,
    MISSING,
    Absent,
    ChangeSet,
    Expiring,
    Layer,
    Overlay,
    Staged,
    Stored,
    StoredOrGone,
    Value,
)
from lab_state._expiry import Expiries
from lab_state._order import CHUNKS_AT_ONCE, Chunk, Index, in_range
from lab_state._undo import UndoView, Views, noted, open_ones
from lab_state.shared._results import ResultTable

Keys: TypeAlias = set[str]

OnChanges: TypeAlias = Callable[[Sequence[str], Sequence[StoredOrGone], int], None]
"""A callback that gets keys, their new values in the same order, and the revision. The callee keeps both sequences."""

OnChange: TypeAlias = Callable[[str | None, StoredOrGone, int], None]
"""A callback that gets a key, its new value or `DELETED` or `EXPIRED`, and the revision.

The key is `None` if all keys were deleted at once.
"""

WATCHED_CLEAR = 10_000
"""While there is a watch, a clear of at most this many keys deletes them one by one, so that each is reported."""


def no_clock() -> float:
    """Return 0.0. It is used in place of a clock where time must not pass."""
    return 0.0


def ignore(*_: object) -> None:
    """Do nothing, in place of a callback."""


class State:
    """The map of one manager.

    Attributes:
        entries: Stored values by key. `clear`, `freeze` and `fold` replace this object:
            read the attribute each time.
        changes: The keys that changed since the last `take`.
        cleared: Whether all keys were deleted before `changes`.
        revision: The number of the last change.
        taken: The revision up to which changes were taken.
        since: The time of the oldest change that was not taken, in seconds of
            `monotonic`.
        deleted: The number of keys that were deleted since the state was loaded.
        swept: The number of keys that were deleted by sweeps.
        expiries: The index of keys that expire.
        monotonic: The clock that never goes back.
        on_change: A callback after each change, if there is a watch. The hot path of `set`
            calls it, too.
        on_changes: A callback after a change of many keys, if there is a watch.
        on_staged: A callback after a change of many keys, which `fold_staged` has to merge.
        on_first_change: A callback before the first change after a `take`, or `None`.
        index: The keys in order of code points; `None` until a call needs it. See `_order`.
        free: A callback that gets a map that is no longer needed, and may be large, and perhaps the number of
            items to free in one step.
        results: The results of calls of other processes that were loaded, if there are any. Each
            snapshot has them.
        borrowed: Whether values may be views of the buffer from which they were loaded, and
            keep it alive.
        views: The views that `items()` reads. If the list is not empty, `before_overwrite`
            has to be called before each change.
        on_views: A callback after the first of these views was opened, and after the last one was closed.
    """

    has_steps: ClassVar[bool] = True
    """Whether calls for many keys may go in steps. Those of a draft may not, because no call of a transaction awaits."""

    __slots__ = (
        "_epoch",
        "_held",
        "_loaded_revision",
        "_stored_more",
        "_wall_clock",
        "borrowed",
        "changes",
        "cleared",
        "deleted",
        "entries",
        "expiries",
        "free",
        "index",
        "monotonic",
        "on_change",
        "on_changes",
        "on_first_change",
        "on_staged",
        "on_views",
        "results",
        "revision",
        "since",
        "swept",
        "taken",
        "views",
    )

    def __init__(
        self,
        monotonic: Callable[[], float] = no_clock,
        start: float = 0.0,
        wall_clock: Callable[[], float] = no_clock,
    ) -> None:
        """Make an empty state.

        Args:
            monotonic: The clock that never goes back. Without it, the time of the state does not advance.
            start: The time of the state now, in seconds since 1970.
            wall_clock: The wall clock, in seconds since 1970.
        """
        self.monotonic: Callable[[], float] = monotonic
        self._wall_clock = wall_clock
        self._epoch = start - monotonic()
        self.on_change: OnChange | None = None
        self.on_changes: OnChanges | None = None
        self.on_staged: Callable[[], object] = no_clock
        self.on_first_change: Callable[[], object] | None = None
        self.free: Callable[..., object] = ignore
        self.results: ResultTable | None = None
        self.views: Views[Stored] = []
        self.on_views: Callable[[], object] = no_clock
        self._held: list[dict[Any, Any]] = []
        self.load({}, 0)

    def load(self, entries: dict[str, Stored], revision: int, expires: Mapping[str, int] | None = None) -> None:
        """Replace the contents by loaded ones, which count as taken. `expires` has times in milliseconds since 1970."""
        self.entries: dict[str, Stored] | Layer = entries
        self.index: Index | None = None
        self.borrowed: bool = bool(entries)
        self.changes: dict[str, StoredOrGone] = {}
        self.cleared: bool = False
        self.revision: int = revision
        self.taken: int = revision
        self.since: float = self.monotonic()
        self.deleted: int = 0
        self.swept: int = 0
        self._loaded_revision = revision
        self._stored_more = 0  # see `stored`
        self.expiries: Expiries = Expiries(0 if expires else self.now())  # keys that are overdue keep their second
        for key, at in (expires or {}).items():
            entries[key] = Expiring(cast("Value", entries[key]), at)
            self.expiries.add(key, at)

    @property
    def stored(self) -> int:
        """The number of values stored since the state was loaded.

        A `set` adds one to the revision, and stores one value. Every other change adds the number
        of its values, less one, to `_stored_more`. So the sum below is exact, and `set` does not
        have to count. A counter would make `set` 3 % slower: an increment took 52 ns, and a `set`
        1,560 ns, in the same process.
        """
        return self.revision - self._loaded_revision + self._stored_more

    # Time

    def now(self) -> int:
        """Return the time for expiry, in milliseconds since 1970: the time at the start plus the time since then."""
        return int((self._epoch + self.monotonic()) * 1000)

    def wall(self) -> int:
        """Return the time of the wall clock, in milliseconds since 1970. The next start continues from it."""
        return int(self._wall_clock() * 1000)

    def alive(self, expiring: Expiring) -> Value | Literal[Absent.MISSING]:
        """Return the value if it has not expired, and `MISSING` otherwise."""
        return expiring.value if expiring.at > self.now() else MISSING

    def has(self, key: str) -> bool:
        """Return whether a key exists."""
        if key not in self.entries:
            return False
        return not self.expiries or self._lives(key)

    def _lives(self, key: str) -> bool:
        stored = self.entries[key]
        return not isinstance(stored, Expiring) or self.alive(stored) is not MISSING

    def count(self) -> int:
        """Return the number of keys. The cost depends only on the number of keys that expire in the current second."""
        return len(self.entries) - (self.expiries.due(self.now()) if self.expiries else 0)

    @property
    def expires(self) -> bool:
        """Whether any key expires."""
        return bool(self.expiries)

    def sweep(self, most: int) -> int:
        """Delete expired keys, as one change. Return the number of keys that were examined, up to `most`."""
        now, entries = self.now(), self.entries
        keys = self.expiries.take(now, most)
        found = [key for key in keys if is_due(entries, key, now)]  # the entry decides, not the index
        self._drop(found, EXPIRED)
        self.deleted -= len(found)
        self.swept += len(found)
        return len(keys)

    # Order

    def note(self, key: str) -> None:
        """Note that a key was added or removed; see `_order`."""
        if self.index is not None:
            self.index.note(key)

    def note_many(self, keys: Iterable[str]) -> None:
        """Note that keys may have been added or removed; see `_order`."""
        if self.index is not None:
            self.index.note_many(keys)

    def _index(self) -> Index:
        """Return the index, made if there is none."""
        if self.index is None:
            base, touched = self.entries, set[str]()
            while isinstance(base, Layer):
                touched.update(base.top)
                base = cast("dict[str, Stored] | Layer", base.base)  # a draft has no index of its own
            self.index = Index(base, touched, deleted(self.changes))
        return self.index

    @property
    def is_index_behind(self) -> bool:
        """Whether `index_steps` has something to do."""
        return self._index().is_building or self._index().batches > 0

    def index_steps(self) -> Generator[None]:
        """Build the index, or bring it up to date, in steps of a few milliseconds."""
        while self._index().is_building:
            self._index().build_some()
            yield
        for _ in range(self._index().batches):  # not until none is left: writers may add more all the time
            self._index().settle(self.entries)
            yield

    def page(self, low: str, high: str | None, limit: int | None = None, *, reverse: bool = False) -> list[str]:
        """Return keys as `names` does, with those that have expired."""
        return self._index().page(self.entries, low, high, limit, reverse=reverse)

    def pieces(self, low: str, high: str | None) -> list[Chunk]:
        """Return the keys in a range, with those that have expired, as sorted tuples.

        Each has 1 key or more, and is above the one before. The cost is O(log n), and some
        nanoseconds for each 256 keys, if the index is not behind.
        """
        return self._index().pieces(self.entries, low, high)

    def held_in(self, low: str, high: str | None) -> int:
        """Return the number of keys in a range, with those that have expired."""
        return self._index().count(self.entries, low, high)

    def due_in(self, low: str, high: str | None) -> int:
        """Return the number of keys in a range that have expired, and are not removed yet."""
        return len(in_range(self.expiries.due_keys(self.now()), low, high)) if self.expiries else 0

    def count_in(self, low: str, high: str | None) -> int:
        """Return the number of keys in a range that have not expired.

        The cost is O(log n), and one step for each key of the state that has expired and is not removed yet.
        """
        return self.held_in(low, high) - self.due_in(low, high)

    def names(self, low: str, high: str | None = None, limit: int | None = None, *, reverse: bool = False) -> list[str]:
        """Return the keys in a range that have not expired, in order of code points.

        Args:
            low: No key is below this. `_order.bounds` makes both bounds.
            high: Each key is below this, unless it is `None`.
            limit: Return only this many keys.
            reverse: Whether to begin with the highest key.
        """
        found = self.page(low, high, limit, reverse=reverse)
        if not self.expires:
            return found
        names = self.living(found)
        while limit is not None and len(names) < limit == len(found):  # expired keys took places in the page
            low, high = (low, found[-1]) if reverse else (found[-1] + "\0", high)
            found = self.page(low, high, limit, reverse=reverse)
            names += self.living(found)
        return names[:limit]

    def living(self, keys: list[str]) -> list[str]:
        """Return those of some keys with an entry that have not expired."""
        entries, now = self.entries, self.now()
        return [key for key in keys if not (isinstance(stored := entries[key], Expiring) and stored.at <= now)]

    # Changes

    def before_change(self) -> None:
        """Prepare a change. If it is the first after a `take`, note its time and call `on_first_change`."""
        if self.revision == self.taken:
            self.since = self.monotonic()
            if self.on_first_change is not None:
                self.on_first_change()

    def set(self, key: str, stored: Stored) -> int:
        """Store one value, and return the new revision."""
        return self.apply({key: stored}, cleared=False)

    def keep_decoded(self, key: str, stored: Stored, same: Value) -> None:
        """Replace a stored value by the same value in decoded form. This is not a change, and has no revision."""
        # An overlay would treat it as a write. A value that expires is inside an `Expiring`, and stays as it is.
        if self.entries.__class__ is dict and self.entries[key] is stored:
            self.entries[key] = same

    def set_many(self, values: Mapping[str, Value]) -> int:
        """Store values that do not expire, as one change, and return the new revision."""
        entries = self.entries
        if not isinstance(entries, dict) or self.on_change is not None:
            return self.apply(values, cleared=False)
        if self.views:
            self.before_overwrite(values)
        self.before_change()
        self.revision += 1
        if self.expiries:
            for key in values:
                self.expiries.discard(key)
        if self.index is not None:
            self.index.note_many(filterfalse(entries.__contains__, values))
        entries.update(values)
        self.changes.update(values)
        self._stored_more += len(values) - 1
        return self.revision

    def delete_many(self, keys: Iterable[str]) -> int:
        """Delete those of the keys that exist, as one change, and return their number."""
        found = {key for key in keys if self.has(key)}
        self._drop(found, DELETED)
        return len(found)

    def _drop(self, keys: Iterable[str], how: Literal[Absent.DELETED, Absent.EXPIRED]) -> None:
        if keys:
            self.apply(dict.fromkeys(keys, how), cleared=False)

    def clear(self) -> int:
        """Delete all keys, and return their number. The cost does not depend on that number."""
        count = self.count()
        if len(self.entries):
            self.apply({}, cleared=True)
        return count

    def apply(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> int:
        """Make several changes as one, and return the new revision.

        Args:
            changes: The changes by key. A key that is deleted must exist.
            cleared: Whether to delete all keys first.
        """
        if cleared and self.on_change is not None and len(self.entries) <= WATCHED_CLEAR:
            changes, cleared = {**dict.fromkeys(self.entries, DELETED), **changes}, False
        if self.views and not cleared:
            self.before_overwrite(changes)
        self.before_change()
        self.revision += 1
        if cleared:
            self.deleted += len(self.entries)
            self._empty()
        absent = 0
        entries, mine, expiries = self.entries, self.changes, self.expiries
        self.note_many([key for key, to in changes.items() if isinstance(to, Absent) or key not in entries])
        for key, stored in changes.items():
            if isinstance(stored, Absent):
                del entries[key]
                expiries.discard(key)
                absent += 1
            else:
                if isinstance(stored, Expiring):
                    expiries.add(key, stored.at)
                elif key in expiries:
                    expiries.discard(key)
                entries[key] = stored
            mine[key] = stored
        self.deleted += absent
        self._stored_more += len(changes) - absent - 1
        if self.on_change is not None:
            self._report(self.on_change, changes, cleared=cleared)
        return self.revision

    def _report(self, on_change: OnChange, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> None:
        """Report a change to the watches."""
        if cleared:
            on_change(None, DELETED, self.revision)
        for key, stored in changes.items():
            on_change(key, stored, self.revision)

    def switch(
        self,
        top: dict[str, StoredOrGone],
        changes: dict[str, StoredOrGone],
        *,
        size: int,
        absent: int,
        stale: Expiries,
        fresh: Expiries,
        moved: Keys,
        cleared: bool,
    ) -> int:
        """Make many prepared changes as one, at once, and return the new revision. The state keeps both dicts.

        Args:
            top: The changes by key. A key that is deleted must exist. With `cleared` there is none.
            changes: The same changes in another dict. Without `cleared` it has the unflushed changes of other
                keys, too.
            size: The number of keys after the change.
            absent: The number of keys that are deleted, apart from those of `cleared`.
            stale: The keys that had an expiry; see `Expiries.replace`.
            fresh: The keys that get an expiry.
            moved: The keys that are added or removed, for the index. Other keys may be among them.
            cleared: Whether to delete all keys first.
        """
        self.before_change()
        self.revision += 1
        self.deleted += absent
        self._stored_more += len(top) - absent - 1
        keys, values = (list(top), list(top.values())) if self.on_changes is not None else ((), ())
        if cleared:
            self.deleted += len(self.entries)
            self._empty()
            self.entries = cast("dict[str, Stored]", top)
        elif isinstance(self.entries, dict) and not self.entries:
            self.entries = cast("dict[str, Stored]", top)  # there was no key that could be deleted
        else:
            entries = self.entries
            assert not isinstance(entries, Staged)  # the caller has merged it
            self.entries = Staged(cast("dict[str, Stored] | Overlay", entries), top, size)
        self.free(self.changes)
        self.changes = changes
        if self.index is not None:
            self.index.take_over(moved)
        if stale or fresh:
            self.expiries.replace(stale, fresh)
        if self.on_change is not None and self.on_changes is not None:
            if cleared:
                self.on_change(None, DELETED, self.revision)
            self.on_changes(keys, values, self.revision)
        self.on_staged()
        return self.revision

    def _empty(self) -> None:
        if self.views:
            self.before_overwrite(None)
        entries, changes, index = self.entries, self.changes, self.index
        self.entries, self.changes, self.index = {}, {}, None
        if index is not None:
            self.free(index.release(), CHUNKS_AT_ONCE)
        for unneeded in (changes, *self.expiries.clear()):
            self.free(unneeded)
        self._release_entries(entries)
        self.cleared = True

    def _release_entries(self, entries: dict[str, Stored] | Layer) -> None:
        if isinstance(entries, dict):
            self.release(entries)
            return
        self.release(entries.top)
        if isinstance(entries, Staged):  # below an `Overlay`, a view is still being read
            self._release_entries(entries.view)

    # Views of `items()`

    def view(self) -> UndoView[Stored]:
        """Open a view of the entries as they are now. It is closed by `close_view`, or when it is collected."""
        view = UndoView(self)
        self.views.append(ref(view))
        self.on_views()
        return view

    def close_view(self, view: UndoView[Stored]) -> None:
        """Close a view. A second call does nothing."""
        view.close()
        self._open_views()

    def close_views(self) -> None:
        """Close each view, because the state is no longer used."""
        for view in self._open_views():
            self.close_view(view)

    def before_overwrite(self, keys: Iterable[str] | None) -> None:
        """Keep the values of keys for the open views. Call it before these keys change, if `views` is not empty.

        Args:
            keys: The keys that are stored or deleted; `None` if all keys are deleted at once.
        """
        for view in self._open_views():
            if keys is None:
                view.keep()
            else:
                view.note(keys)

    def prepare_overwrite(self, keys: Collection[str]) -> Iterator[None]:
        """Do the work of `before_overwrite` for many keys, in steps, and yield between two steps.

        No other code may change these keys during the steps. At the end change them before other code runs.
        """
        return noted(self.views, keys)

    def release(self, large: dict[Any, Any]) -> None:
        """Free a map in steps, once no view is open that may read it."""
        if self._open_views():
            self._held.append(large)
        else:
            self.free(large)

    def _open_views(self) -> list[UndoView[Stored]]:
        """Return the open views. If there is none, free the maps that only views needed."""
        found = open_ones(self.views)
        if not found:
            held, self._held = self._held, []
            for large in held:
                self.free(large)
            self.on_views()
        return found

    def untaken(self) -> ChangeSet:
        """Return the changes that `take` would take away."""
        time, wall = (self.now(), self.wall()) if self.expiries else (0, 0)
        return ChangeSet(self.taken, self.revision, self.cleared, self.changes, self.since, time, wall)

    def take(self, taken: ChangeSet | None = None) -> ChangeSet:
        """Take the changes away for a commit, and return them.

        Args:
            taken: The result of `untaken`, called just before. A caller that keeps it can call
                `put_back` with it if this method is interrupted, and no change is lost.
        """
        if taken is None:
            taken = self.untaken()
        if self.index is not None:
            self._end_window(self.index)
        self.cleared = False  # first, because `put_back` drops everything older than a clear
        self.changes, self.taken = {}, self.revision
        return taken

    def _end_window(self, index: Index) -> None:
        """Tell the index that `changes` is emptied. Drop it if it was not used for so long that it is of no use."""
        index.forget_gone(self.entries)
        if index.is_too_old(self.entries):
            self.free(index.release(), CHUNKS_AT_ONCE)
            self.index = None

    def put_back(self, taken: ChangeSet) -> None:
        """Put the changes of a failed commit back. Newer changes stay. A second call changes nothing."""
        if not self.cleared:
            if self.index is not None:
                self.index.note_gone(deleted(taken.changes))
            older, newer = taken.changes, self.changes
            if len(newer) <= len(older):  # the smaller dict is copied into the larger one
                older.update(newer)
                self.changes = older
            else:
                for key, changed in older.items():
                    newer.setdefault(key, changed)
            self.cleared = taken.cleared
        self.taken, self.since = taken.start, taken.since

    def freeze(self) -> dict[str, Stored]:
        """Return a view of the entries, which does not change until `fold` is called with it.

        The first view costs nothing. A second view at the same time is a copy of the state.
        That happens when a sync fails while a checkpoint runs. If a change of many keys is
        still to be merged, that is done here, in one step; see `fold_staged`.
        """
        if isinstance(self.entries, Staged):
            self.entries.fold(sys.maxsize)
            self.entries = self.entries.view
        if isinstance(self.entries, Overlay):
            return dict(self.entries.items())
        view = self.entries
        assert isinstance(view, dict)  # a draft is never frozen
        self.entries = Overlay(view)
        return view

    @property
    def frozen(self) -> bool:
        """Whether a view would cost more than nothing: there is one, or many changes are still to be merged."""
        return isinstance(self.entries, Overlay)

    def note_copied(self, view: dict[str, Stored]) -> None:
        """Note that no value of a view keeps a loaded buffer alive. Do nothing if the view is not the present one."""
        if self._over(view) is not None:
            self.borrowed = False

    def fold(self, view: dict[str, Stored], most: int) -> bool:
        """Merge about `most` of the writes since `freeze` into the view. Return whether there are more."""
        overlay = self._over(view)
        if overlay is not None:
            if overlay.fold(most):
                return True
            if isinstance(self.entries, Staged):
                self.entries.rest_on(view)
            else:
                self.entries = view
        return False

    def _over(self, view: dict[str, Stored]) -> Overlay | None:
        """Return the layer over a view; `None` if there is none."""
        entries: object = self.entries
        if isinstance(entries, Staged):
            entries = entries.view
        return entries if isinstance(entries, Overlay) and entries.view is view else None

    def has_as_base(self, view: dict[str, Stored]) -> bool:
        """Return whether a map is the one that the entries are in, alone or below the changes that are to be merged."""
        entries = self.entries
        return entries is view or (isinstance(entries, Staged) and entries.view is view)

    def fold_staged(self, most: int) -> bool:
        """Merge about `most` of the changes of `switch` into the map below, and into the index of expiries.

        Return whether there are more.
        """
        settling, entries = self.expiries.settle(most), self.entries
        if isinstance(entries, Staged):
            if entries.fold(most):
                return True
            self.entries = entries.view
        return settling


def deleted(changes: Mapping[str, StoredOrGone]) -> list[str]:
    """Return the keys that changes delete."""
    return [key for key, to in changes.items() if isinstance(to, Absent)]


def is_due(entries: dict[str, Stored] | Layer, key: str, now: int) -> bool:
    """Return whether the entry of a key exists and has expired."""
    if key not in entries:
        return False
    stored = entries[key]
    return isinstance(stored, Expiring) and stored.at <= now
