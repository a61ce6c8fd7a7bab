"""The base class of managers and handles, which cannot be copied and cannot be pickled."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self


class Handle:
    """An object that is bound to a manager, and cannot be copied as data can.

    `copy.copy` and `copy.deepcopy` return the object itself. It supports weak references.
    `mock.patch.object` can replace its methods.
    """

    __slots__ = ("__dict__", "__weakref__")

    _kind: ClassVar[str] = "a handle of a manager"
    _remedy: ClassVar[str] = "make a Manager of another name in the other process, or use a reader of its cache"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any], /) -> Self:
        return self

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError(f"{self._kind} cannot be pickled: {self._remedy}")
