"""Views of a map at one moment, while the map changes. This module does no I/O.

Theory of operation. A view has a dict `_old`. Before a key changes for the first time since the view was
opened, its old value is put into `_old`, if the key existed. So a key that existed at
that moment, and is not in `_old`, still has the same value. The code that reads the view has a list of the
keys that existed. While a view is open, each change of a key needs one lookup more. Reads of the map cost the
same as without a view.

If the whole map is replaced, each open view keeps the old map. From then on, the view notes no values.

The holder of the map is a `State`. The holder has only weak references to the views. A view that is no longer used is
garbage-collected, and the next change of the map removes the reference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, Generic, Protocol, TypeAlias, TypeVar
from weakref import ref

V_co = TypeVar("V_co", covariant=True)
V = TypeVar("V")

_NOTED_AT_ONCE = 5_000
"""The number of keys whose values one step puts into a view. Such a step takes about a millisecond."""


class Lookup(Protocol[V_co]):
    """A map that is read by key."""

    def __getitem__(self, key: str, /) -> V_co: ...
    def __contains__(self, key: object, /) -> bool: ...


class Changing(Protocol[V_co]):
    """The holder of a map that changes."""

    @property
    def entries(self) -> Lookup[V_co]:
        """The map. The holder may replace the whole map."""
        ...


class UndoView(Generic[V]):
    """The entries of a map at one moment.

    Attributes:
        is_closed: Whether `close` was called.
        unread: The present page of the iterator that reads the view. `close` empties this list, so the page ends.
    """

    __slots__ = ("__weakref__", "_kept", "_old", "_owner", "is_closed", "unread")

    def __init__(self, owner: Changing[V] | None, kept: Lookup[V] | None = None) -> None:
        """Begin a view of a map as it is now.

        Args:
            owner: The holder of the map. The holder must call `note` before it changes a key.
            kept: The map, if it does not change from now on. Then the view needs no holder.
        """
        self.is_closed: bool = False
        self.unread: list[Any] = []
        self._owner: Changing[V] | None = owner
        self._kept: Lookup[V] | None = kept
        self._old: dict[str, V] = {}

    def close(self) -> None:
        """Drop all values. A second call does nothing."""
        self.is_closed = True
        self.unread.clear()
        self._owner, self._kept, self._old = None, None, {}

    def note(self, keys: Iterable[str]) -> None:
        """Keep the values of keys that are about to change."""
        if self._kept is None and self._owner is not None:
            old, entries = self._old, self._owner.entries
            for key in keys:
                if key not in old and key in entries:
                    old[key] = entries[key]

    def keep(self) -> None:
        """Keep the whole map, because the holder is about to replace it. The holder must not change the old map later."""
        if self._kept is None and self._owner is not None:
            self._kept = self._owner.entries

    def _entries(self) -> Lookup[V]:
        """Return the map that has the values of the keys that were not noted."""
        if self._kept is not None:
            return self._kept
        assert self._owner is not None  # the view is open
        return self._owner.entries

    def values(self, keys: Sequence[str]) -> Sequence[V]:
        """Return the values of keys that existed at the moment of the view. The view must be open."""
        entries, old = self._entries(), self._old
        if len(keys) <= 1 or not old.keys().isdisjoint(keys):
            return [old[key] if key in old else entries[key] for key in keys]
        found: tuple[V, ...] = itemgetter(*keys)(entries)  # this is faster than `map`; see decision 142
        return found


Views: TypeAlias = list["ref[UndoView[V]]"]
"""The views of one map. Some of them may be closed or garbage-collected."""


def open_ones(views: Views[V]) -> list[UndoView[V]]:
    """Return the views that are open, and remove all others from the list."""
    found = [view for reference in views if (view := reference()) is not None and not view.is_closed]
    if len(found) < len(views):
        views[:] = [ref(view) for view in found]
    return found


def noted(views: Views[V], keys: Collection[str]) -> Iterator[None]:
    """Call `note` of each open view with many keys, in steps, and yield after each step.

    At the end, each open view has the values of these keys, also a view that was opened between two steps. No other
    code may change these keys during the steps. After the last step, the caller must change the keys before other
    code runs.
    """
    done: Views[V] = []  # a list, because a reference to a collected view may not be hashable
    while waiting := [reference for reference in views if reference not in done]:
        rest = iter(keys)
        while part := list(islice(rest, _NOTED_AT_ONCE)):
            _note(waiting, part)
            yield
        done += waiting


def _note(views: Views[V], keys: list[str]) -> None:
    """Call `note` of some views. When this returns, no variable refers to a view, so an unused view can be collected."""
    for reference in views:
        view = reference()
        if view is not None:
            view.note(keys)
