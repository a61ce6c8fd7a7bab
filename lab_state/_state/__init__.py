"""The map in memory: entries, unflushed changes, revisions. This module does no I/O.

Theory of operation. `entries` maps keys to stored values. A scalar is stored unchanged. Any
other value is stored as JSON, so a caller cannot change it later. `changes` has the keys that
changed since the last `take`, each with its stored value, `DELETED` or `EXPIRED`. If `cleared`
is set, all older keys were deleted before these changes. A commit takes the changes, and leaves
an empty dict in their place (`take`). If the commit fails, the changes are put back (`put_back`).
A newer change of a key then replaces the older one.

A snapshot needs a view that does not change while writers continue. `freeze` returns the dict
itself as the view, and puts an `Overlay` over it, which takes the writes. Afterwards `fold`
merges the writes into the dict in small steps. So the cost of the first view and of a step of `fold`
does not depend on the size of the state. A second view at the same time is a copy of the state.
`entries` is used in the same way with and without an overlay.

An expired value stays in `entries` until a sweep or another change removes it. So each read of a value
with an expiry compares the expiry with the time, and `count`, `names` and `count_in` leave out keys that are due.

The index (`_order`) has the keys in order of code points. If there is no index, a call that needs sorted keys
makes it. While there is an index, each method that adds or removes a key notes the key for the index.
`_order/_index.py` describes one exception.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import filterfalse
from typing import Literal, cast

from lab_state._entries import (
    DELETED,
    EXPIRED,
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
from lab_state._order import CHUNKS_AT_ONCE, Index
from lab_state._state._contents import Keys, OnChange, is_due
from lab_state._state._ordered import Ordered, deleted

WATCHED_CLEAR = 10_000
"""While there is a watch, a clear of at most this many keys deletes them one by one, so that each is reported."""


class State(Ordered):
    """The map of one manager, with the calls that change it and take views for snapshots. `Contents` lists the attributes."""

    __slots__ = ()

    # Attributes of the base classes that are assigned here as well. `pyright --verifytypes` needs a declaration in each class.
    entries: dict[str, Stored] | Layer
    index: Index | None
    changes: dict[str, StoredOrGone]
    cleared: bool
    revision: int
    taken: int
    since: float
    deleted: int
    swept: int

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
        # An overlay would treat this as a write. A value that expires stays encoded, because it is inside an `Expiring`.
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
        """Delete the keys that exist, as one change, and return their number."""
        found = {key for key in keys if self.has(key)}
        self._drop(found, DELETED)
        return len(found)

    def _drop(self, keys: Iterable[str], how: Literal[Absent.DELETED, Absent.EXPIRED]) -> None:
        if keys:
            self.apply(dict.fromkeys(keys, how), cleared=False)

    def clear(self) -> int:
        """Delete all keys. Return the number of keys that had not expired.

        Without a watch, the cost does not depend on the number of keys.
        """
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
        """Make many prepared changes as one, in one short step, and return the new revision. The state keeps both dicts.

        Args:
            top: The changes by key. A key that is deleted must exist. With `cleared`, no key is deleted.
            changes: The same changes in another dict. Without `cleared` it has the unflushed changes of other
                keys, too. `State.changes` itself may be passed.
            size: The number of keys after the change.
            absent: The number of keys that are deleted, apart from the keys that `cleared` deletes.
            stale: The changed keys that had an expiry; see `Expiries.replace`.
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
            self.entries = cast("dict[str, Stored]", top)  # the map was empty, so `top` deletes no key
        else:
            entries = self.entries
            assert not isinstance(entries, Staged)  # the caller has merged the last staged layer
            self.entries = Staged(cast("dict[str, Stored] | Overlay", entries), top, size)
        if changes is not self.changes:
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
        """Delete all keys. Free the old entries, changes and indexes in steps."""
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
        """Release the maps of old entries, except the map of a view that is still being read."""
        if isinstance(entries, dict):
            self.release(entries)
            return
        self.release(entries.top)
        if isinstance(entries, Staged):  # the map below another `Overlay` is such a view
            self._release_entries(entries.view)

    def sweep(self, most: int) -> int:
        """Delete expired keys, as one change. Return the number of keys that were examined, up to `most`."""
        now, entries = self.now(), self.entries
        keys = self.expiries.take(now, most)
        found = [key for key in keys if is_due(entries, key, now)]  # the index may be out of date
        self._drop(found, EXPIRED)
        self.deleted -= len(found)
        self.swept += len(found)
        return len(keys)

    def adopt(self, other: State) -> None:
        """Replace everything by the contents of another state, which is not used after this. All changes count as taken.

        Open views keep the old contents. The old entries are freed in steps. `stored`, `deleted` and `swept` keep their counts.
        """
        stored, deleted, swept = self.stored, self.deleted, self.swept
        self._empty()
        self.load_from(other)
        self._stored_more, self.deleted, self.swept = stored, deleted, swept

    def skip_to(self, revision: int) -> None:
        """Set the revision, so that the next change is `revision + 1`. `stored` stays the same.

        All changes must be taken.
        """
        self._stored_more -= revision - self.revision
        self.revision = self.taken = revision

    def untaken(self) -> ChangeSet:
        """Return the changes that `take` would take away."""
        time = self.now() if self.expires else 0
        versions = self.versions if self.versions_at > self.taken else None
        return ChangeSet(self.taken, self.revision, self.cleared, self.changes, self.since, time, self.wall(), versions)

    def take(self, taken: ChangeSet | None = None) -> ChangeSet:
        """Take the changes away for a commit, and return them.

        Args:
            taken: The result of `untaken`, called just before. If this method is interrupted, the caller
                can pass this result to `put_back`. So no change is lost.
        """
        if taken is None:
            taken = self.untaken()
        self.end_window()
        return taken

    def end_window(self) -> dict[str, StoredOrGone]:
        """Return the changes since the last `take`, and begin to collect the next ones in an empty dict."""
        index, changes = self.index, self.changes
        if index is not None:
            index.forget_gone(self.entries)
            if index.is_too_old(self.entries):
                self.free(index.release(), CHUNKS_AT_ONCE)
                self.index = None
        self.cleared = False  # reset first: after an interrupt in `take`, `put_back` must not drop the taken changes
        self.changes, self.taken = {}, self.revision
        return changes

    def put_back(self, taken: ChangeSet) -> None:
        """Put back the changes of a failed commit. Newer changes stay. A second call changes nothing."""
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
        """Return a view of the entries. The view does not change until it is passed to `fold`.

        The first view is the dict itself, so nothing is copied. A second view at the same time is a copy of the
        state. For example, a commit takes a second view if a sync fails while a checkpoint runs. If a change of
        many keys is not merged yet, `freeze` first merges it, in one step; see `fold_staged`.
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
        """Whether `freeze` may take long: a view is not folded yet, or a change of many keys is not merged yet."""
        return isinstance(self.entries, Overlay)

    def note_copied(self, view: dict[str, Stored]) -> None:
        """Note that no value of a view keeps a loaded buffer in memory. Do nothing if the view is not the present one."""
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
        """Return whether a dict is the map of this state, alone or below a change of many keys that is not merged yet."""
        entries = self.entries
        return entries is view or (isinstance(entries, Staged) and entries.view is view)

    def fold_staged(self, most: int) -> bool:
        """Merge about `most` of the changes of `switch` into the map below, the index of keys, and the index of expiries.

        Return whether there are more.
        """
        is_merging, entries = self.expiries.merge_replaced(most), self.entries
        if self.index is not None and self.index.merge_some(most):
            is_merging = True
        if isinstance(entries, Staged):
            if entries.fold(most):
                return True
            self.entries = entries.view
        return is_merging
