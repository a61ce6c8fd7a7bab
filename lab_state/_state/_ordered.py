"""The keys of a state in order, and the views that `items()` and `get_all()` read. This module does no I/O."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from typing import Any, cast
from weakref import ref

from lab_state._entries import (
    Absent,
    Expiring,
    Layer,
    Stored,
    StoredOrGone,
)
from lab_state._order import Chunk, Index, in_range
from lab_state._state._contents import Contents
from lab_state._undo import UndoView, noted, open_ones


class Ordered(Contents):
    """The contents of a state, with the calls that return keys in order, and with views of one moment."""

    __slots__ = ()

    index: Index | None  # an attribute of the base class that is assigned here as well; see `State`

    # Order

    def note_many(self, keys: Iterable[str]) -> None:
        """Note that keys may have been added or removed; see `_order`."""
        if self.index is not None:
            self.index.note_many(keys)

    def _index(self) -> Index:
        """Return the index. Make it if there is none, or if an error has stopped its last step."""
        if self.index is None or not self.index.is_whole:
            base, touched = self.entries, set[str]()
            while isinstance(base, Layer):
                touched.update(base.top)
                base = cast("dict[str, Stored] | Layer", base.base)  # not a `Live`: a draft makes no index
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
        for _ in range(self._index().batches):  # a fixed number, because writers may touch more keys meanwhile
            self._index().catch_up(self.entries)
            yield

    def page(self, low: str, high: str | None, limit: int | None = None, *, reverse: bool = False) -> list[str]:
        """Return keys as `names` does, but include expired keys."""
        return self._index().page(self.entries, low, high, limit, reverse=reverse)

    def pieces(self, low: str, high: str | None) -> list[Chunk]:
        """Return the keys in a range as sorted tuples, including expired keys.

        Each tuple has 1 key or more, and its keys are above all keys of the tuple before. If the index
        is up to date, the cost is O(log n), and some nanoseconds for each 256 keys.
        """
        return self._index().pieces(self.entries, low, high)

    def held_in(self, low: str, high: str | None) -> int:
        """Return the number of keys in a range, including expired keys."""
        return self._index().count(self.entries, low, high)

    def due_in(self, low: str, high: str | None) -> int:
        """Return the number of keys in a range that have expired, and are not removed yet."""
        return len(in_range(self.due_keys(self.now()), low, high)) if self.expires else 0

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
            limit: The largest number of keys; `None` means all.
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
        """Return the keys that have not expired. Each key must have an entry."""
        entries, now = self.entries, self.now()
        return [key for key in keys if not (isinstance(stored := entries[key], Expiring) and stored.at <= now)]

    # Views of `items()` and `get_all()`

    def view(self) -> UndoView[Stored]:
        """Open a view of the present entries. `close_view` closes it, and so does the garbage collector."""
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
        """Keep the values of keys for the open views. If `views` is not empty, call this before these keys change.

        Args:
            keys: The keys that are stored or deleted; `None` if all keys are deleted.
        """
        for view in self._open_views():
            if keys is None:
                view.keep()
            else:
                view.note(keys)

    def prepare_overwrite(self, keys: Collection[str]) -> Iterator[None]:
        """Do the work of `before_overwrite` for many keys, in steps, and yield between two steps.

        No other code may change these keys during the steps. After the last step, change them before other
        code runs.
        """
        return noted(self.views, keys)

    def release(self, large: dict[Any, Any]) -> None:
        """Free a map in steps. If a view is open, it may still read the map. Then free the map when all views are closed."""
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


def deleted(changes: Mapping[str, StoredOrGone]) -> list[str]:
    """Return the keys that changes delete."""
    return [key for key, to in changes.items() if isinstance(to, Absent)]
