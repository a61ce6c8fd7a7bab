"""What a manager and its handles are: one object each, which cannot be copied or sent elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self


class Handle:
    """An object that is bound to what runs in this process: a lock of the application, no data.

    A copy is the object itself. It can be referred to weakly, and an attribute can be put
    over a method of it, as `mock.patch.object` does.
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
