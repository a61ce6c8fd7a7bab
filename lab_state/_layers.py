"""Maps on top of a map: a layer takes the writes, and the map below it does not change. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from lab_state._entries import DELETED, MISSING, Absent, Stored, StoredOrGone


class Readable(Protocol):
    """A map that can lie below a layer."""

    def __getitem__(self, key: str, /) -> Stored: ...
    def __contains__(self, key: object, /) -> bool: ...
    def __len__(self) -> int: ...
    def items(self) -> Iterable[tuple[str, Stored]]: ...


class Layer:
    """A map on top of another one. `top` takes the writes, and the map below, `base`, does not change."""

    __slots__ = ("base", "top")

    def __init__(self, base: Readable, top: dict[str, StoredOrGone]) -> None:
        self.base: Readable = base
        self.top: dict[str, StoredOrGone] = top

    def __getitem__(self, key: str) -> Stored:
        value = self.top.get(key, MISSING)
        if value is MISSING:
            return self.base[key]
        if isinstance(value, Absent):
            raise KeyError(key)
        return value

    def __len__(self) -> int:
        raise NotImplementedError

    def __contains__(self, key: object) -> bool:
        value = self.top.get(key, MISSING)  # type: ignore[call-overload]  # any object may be looked up
        return key in self.base if value is MISSING else value is not DELETED

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.items())

    def items(self) -> Iterator[tuple[str, Stored]]:
        for key, stored in self.base.items():
            if key not in self.top:
                yield key, stored
        for key, value in self.top.items():
            if not isinstance(value, Absent):
                yield key, value

    def __setitem__(self, key: str, stored: Stored) -> None:
        self.top[key] = stored

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.top[key] = DELETED


class Overlay(Layer):
    """A layer over a view. In the end its writes are merged into the view."""

    __slots__ = ("_left", "_size", "view")

    def __init__(self, view: dict[str, Stored]) -> None:
        super().__init__(view, {})
        self.view: dict[str, Stored] = view
        self._size = len(view)
        self._left: int | None = None

    def __len__(self) -> int:
        return self._size

    def __setitem__(self, key: str, stored: Stored) -> None:
        if key not in self:
            self._size += 1
        self.top[key] = stored

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._size -= 1

    def fold(self, most: int) -> bool:
        """Move `most` writes into the view, or more if new writes come faster. Return whether any is left."""
        came = 0 if self._left is None else len(self.top) - self._left
        for _ in range(min(max(most, 2 * came), len(self.top))):
            key, value = self.top.popitem()
            if isinstance(value, Absent):
                self.view.pop(key, None)
            else:
                self.view[key] = value
        self._left = len(self.top)
        return bool(self.top)
