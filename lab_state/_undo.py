"""Views of a map at one moment, while the map changes. Pure and synchronous.

Theory of operation. A view has a dict `old`. Before a key is changed for the first time after
the moment of the view, its value at that moment is put into `old`, or `MISSING` if there was none.
So a key that is not in `old` still has that value. A view that is open costs one lookup for each
key that changes. Reads of the map cost nothing more.

If the whole map is replaced, each open view keeps the map from before. It needs no more values then.

The map refers to its views weakly. A view that is no longer used is collected, and the next
change finds that out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Generic, Protocol, TypeAlias, TypeVar, cast
from weakref import ref

V_co = TypeVar("V_co", covariant=True)
V = TypeVar("V")

_NOTED_AT_ONCE = 5_000
"""The number of keys whose values one step puts into a view. It takes about a millisecond."""

_NONE = object()
"""Is noted for a key that was not there."""


class Lookup(Protocol[V_co]):
    """A map that is read by key."""

    def __getitem__(self, key: str, /) -> V_co: ...
    def __contains__(self, key: object, /) -> bool: ...


class Changing(Protocol[V_co]):
    """The owner of a map that changes."""

    @property
    def entries(self) -> Lookup[V_co]:
        """The map. The owner may replace it."""
        ...


class UndoView(Generic[V]):
    """The entries of a map at one moment.

    Attributes:
        is_closed: Whether `close` was called.
    """

    __slots__ = ("__weakref__", "_kept", "_old", "_owner", "is_closed")

    def __init__(self, owner: Changing[V]) -> None:
        """Begin a view of the entries as they are now. The owner must call `note` before it changes one of them."""
        self.is_closed: bool = False
        self._owner: Changing[V] | None = owner
        self._kept: Lookup[V] | None = None
        self._old: dict[str, V | object] = {}

    def close(self) -> None:
        """Give up all values. A second call does nothing."""
        self.is_closed = True
        self._owner, self._kept, self._old = None, None, {}

    def note(self, keys: Iterable[str]) -> None:
        """Keep the values of keys that are about to change."""
        if self._kept is None and self._owner is not None:
            old, entries = self._old, self._owner.entries
            for key in keys:
                if key not in old:
                    try:
                        old[key] = entries[key]
                    except KeyError:
                        old[key] = _NONE

    def keep(self) -> None:
        """Keep the whole map, because the owner is about to replace it. The owner must not change that map later."""
        if self._kept is None and self._owner is not None:
            self._kept = self._owner.entries

    def find(self, keys: Iterable[str]) -> list[tuple[str, V]]:
        """Return those of the keys that were there, in the given order, each with its value at that moment."""
        assert self._owner is not None  # it is open
        entries = self._owner.entries if self._kept is None else self._kept
        old = self._old
        if not old:
            return [(key, entries[key]) for key in keys if key in entries]
        found: list[tuple[str, V]] = []
        for key in keys:
            try:
                value = old[key] if key in old else entries[key]
            except KeyError:  # noqa: S112 -- the key was not there
                continue
            if value is not _NONE:
                found.append((key, cast("V", value)))
        return found


Views: TypeAlias = list["ref[UndoView[V]]"]
"""The views of one map. They may be closed, or collected."""


def open_ones(views: Views[V]) -> list[UndoView[V]]:
    """Return the views that are open, and remove all others from the list."""
    found = [view for reference in views if (view := reference()) is not None and not view.is_closed]
    if len(found) < len(views):
        views[:] = [ref(view) for view in found]
    return found


def noted(views: Views[V], keys: Collection[str]) -> Iterator[None]:
    """Call `note` of each open view with many keys, in steps, and yield between two steps.

    At the end, each view has the values, even if it was opened between two steps. Until the caller
    changes these keys, it must not let other code run, and no other code may change them during the steps.
    """
    done: Views[V] = []  # a list, because a reference whose view was collected still has to differ
    while waiting := [reference for reference in views if reference not in done]:
        rest = iter(keys)
        while part := list(islice(rest, _NOTED_AT_ONCE)):
            for reference in waiting:
                if (view := reference()) is not None:
                    view.note(part)
            del view
            yield
        done += waiting
