"""`Entry`: one key and its type."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Generic, TypeVar, cast, final

from lab_state._arguments import Seconds
from lab_state._calls import Calls
from lab_state._entries import MISSING
from lab_state._handle import Handle
from lab_state._reads import MISSING_VALUE

T = TypeVar("T")


@final
class Entry(Handle, Generic[T]):
    """One key and its type.

    The calls are those of the same name of the manager, with the same guarantees and
    errors. Where the key is missing, `get` and `update` use the default, if there is one:
    a copy, so that changing it changes nothing else.
    """

    __slots__ = ("_calls", "_default", "_key", "_type")

    def __init__(self, calls: Calls, key: str, type_: Any, default: Any) -> None:
        self._calls = calls
        self._key = key
        self._type = type_
        self._default = default

    def __repr__(self) -> str:
        """The key and the type."""
        return f"<Entry {self._key!r} of {self._type!r}>"

    async def get(self) -> T:
        """The value, or the default."""
        value = await self._calls.get(
            self._key, MISSING if self._default is MISSING else MISSING_VALUE, type=self._type
        )
        return cast("T", deepcopy(self._default) if value is MISSING_VALUE else value)

    async def set(self, value: T, *, ttl: Seconds | None = None) -> int:
        """Store a value; returns the revision."""
        return await self._calls.set(self._key, value, ttl=ttl)

    async def update(self, fn: Callable[[T], T]) -> T:
        """Replace the value by what `fn` makes of it, atomically; returns the new value."""
        default = cast("T", deepcopy(self._default))  # the one that is not there stays itself
        return await self._calls.update(self._key, fn, default, type=cast("type[T]", self._type))

    async def delete(self) -> bool:
        """Delete the key; returns whether it was there."""
        return await self._calls.delete(self._key)

    async def exists(self) -> bool:
        """Whether the key is there."""
        return await self._calls.exists(self._key)
