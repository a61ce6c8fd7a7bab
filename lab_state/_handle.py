"""The base class of managers, handles and iterators: objects that are neither copied nor pickled."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self


class Handle:
    """An object that belongs to a manager, or is one.

    `copy.copy` and `copy.deepcopy` return the same object, and `pickle` refuses it. There can be weak
    references to it. It has a `__dict__`, so that `mock.patch.object` can replace the methods.
    """

    __slots__ = ("__dict__", "__weakref__")

    # The two parts of the message of `__reduce_ex__`.
    _kind: ClassVar[str] = "a handle of a manager"
    _remedy: ClassVar[str] = "make a Manager of another name in the other process, or use a reader of its cache"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any], /) -> Self:
        return self

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError(f"{self._kind} cannot be pickled: {self._remedy}")
