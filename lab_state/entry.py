"""`Entry`: the handle for one key and its type."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Generic, TypeVar, cast, final, overload

from lab_state._arguments import check_key
from lab_state._calls import Calls
from lab_state._entries import MISSING
from lab_state._handle import Handle
from lab_state._periods import Seconds
from lab_state._reads import MISSING_VALUE
from lab_state._types import check_type, optional

T = TypeVar("T")
D = TypeVar("D")


def entry_of(calls: Calls, key: str, type_: Any, default: Any) -> Entry[Any]:
    """Check the arguments, and return an entry; see `Scope.entry`."""
    check_key(calls._full(key))  # noqa: SLF001 -- an entry and its `Calls` belong together
    check_type(type_)
    return Entry(calls, key, optional(type_) if default is None else type_, default)


@final
class Entry(Handle, Generic[T]):
    """A handle for one key, whose values have the type `T`.

    Each call does the same as the manager's call of the same name, with the same guarantees and
    errors. A value that is read must be a `T`. A new value that `update` or `incr` computes must be
    a `T`, too. For `set` and `set_if_absent`, only type checkers check that the value is a `T`. If the
    key is missing, and the entry has a default, `get`, `pop`, `update` and `incr` use a copy of the
    default. So changes of the result do not change the default. Without a default, `incr` starts from
    0, and the other three calls raise `KeyNotFoundError`.
    """

    __slots__ = ("_calls", "_default", "_key", "_type")

    def __init__(self, calls: Calls, key: str, type_: Any, default: Any) -> None:
        self._calls = calls
        self._key = key
        self._type = type_
        self._default = default

    def __repr__(self) -> str:
        """Return the key and the type."""
        return f"<Entry {self._key!r} of {self._type!r}>"

    @property
    def key(self) -> str:
        """The key as it was given, without the prefix of the namespace."""
        return self._key

    # Reading

    async def get(self) -> T:
        """Return the value, or a copy of the default if the key is missing; see `Manager.get`."""
        return self._or_default(await self._calls.get(self._key, self._asked, type=self._type))

    def get_nowait(self) -> T:
        """Return the same as `get`, without `await`; see `Manager.get_nowait`."""
        return self._or_default(self._calls.get_nowait(self._key, self._asked, type=self._type))

    async def exists(self) -> bool:
        """Return whether the key exists; see `Manager.exists`."""
        return await self._calls.exists(self._key)

    @overload
    async def expires_in(self) -> float | None: ...
    @overload
    async def expires_in(self, default: D) -> float | D | None: ...
    async def expires_in(self, default: object = MISSING) -> object:
        """Return the seconds until the key expires; `None` if it never expires; see `Manager.expires_in`.

        Args:
            default: The result if the key is missing. The default of the entry is not used here,
                because it is a value, and not a number of seconds.
        """
        return await self._calls.expires_in(self._key, default)

    @overload
    def expires_in_nowait(self) -> float | None: ...
    @overload
    def expires_in_nowait(self, default: D) -> float | D | None: ...
    def expires_in_nowait(self, default: object = MISSING) -> object:
        """Return the same as `expires_in`, without `await`."""
        return self._calls.expires_in_nowait(self._key, default)

    # Writing

    async def set(self, value: T, *, ttl: Seconds | None = None) -> int:
        """Store a value, and return the revision of this change; see `Manager.set`."""
        return await self._calls.set(self._key, value, ttl=ttl)

    def set_nowait(self, value: T, *, ttl: Seconds | None = None) -> int:
        """Store a value, and return the revision of this change, without `await`; see `Manager.set_nowait`."""
        return self._calls.set_nowait(self._key, value, ttl=ttl)

    async def set_if_absent(self, value: T, *, ttl: Seconds | None = None) -> bool:
        """Store a value if the key is missing, and return whether it was stored; see `Manager.set_if_absent`."""
        return await self._calls.set_if_absent(self._key, value, ttl=ttl)

    async def update(self, fn: Callable[[T], T], *, ttl: Seconds | None = None) -> T:
        """Replace the value by the result of `fn`, atomically, and return that result.

        Args:
            fn: A plain function that takes the old value and returns the new one; see
                `Manager.update`.
            ttl: The time to live from now on. By default, and with `None`, the expiry of the key
                does not change. To remove the expiry, use `touch(None)`.
        """
        return await self._calls.update(self._key, fn, self._start, type=self._python_type, ttl=ttl)

    def update_nowait(self, fn: Callable[[T], T], *, ttl: Seconds | None = None) -> T:
        """Replace the value by the result of `fn`, without `await`; see `update` and `Manager.update_nowait`."""
        return self._calls.update_nowait(self._key, fn, self._start, type=self._python_type, ttl=ttl)

    @overload
    async def incr(self: Entry[int], delta: int = ..., *, ttl: Seconds | None = ...) -> int: ...
    @overload
    async def incr(self: Entry[float], delta: float = ..., *, ttl: Seconds | None = ...) -> float: ...
    async def incr(self: Entry[Any], delta: float = 1, *, ttl: Seconds | None = None) -> float:
        """Add to a number, atomically, and return the new number.

        If the key is missing, the count starts from the default of the entry, or from 0.

        Args:
            delta: The number to add. It may be negative.
            ttl: The time to live of the key if this call creates it; see `Manager.incr`.
        """
        start: Any = 0 if self._default is MISSING else self._default
        new: float = await self._calls.incr(self._key, delta, default=start, ttl=ttl, type=self._type)
        return new

    async def touch(self, ttl: Seconds | None) -> bool:
        """Give the key another time to live, and return whether the key existed. With `None` the key never expires."""
        return await self._calls.touch(self._key, ttl)

    async def delete(self) -> bool:
        """Delete the key, and return whether it existed."""
        return await self._calls.delete(self._key)

    def delete_nowait(self) -> bool:
        """Delete the key, and return whether it existed, without `await`; see `Manager.delete_nowait`."""
        return self._calls.delete_nowait(self._key)

    async def pop(self) -> T:
        """Delete the key, and return its value, or a copy of the default if the key is missing."""
        return self._or_default(await self._calls.pop(self._key, self._asked, type=self._type))

    # The default

    @property
    def _asked(self) -> object:
        """The default that is passed to a read. It is never a stored value.

        If the entry has no default, this is `MISSING`, and the read raises an error for a missing key. Otherwise this is
        `MISSING_VALUE`. If the read returns that object, the key is missing.
        """
        return MISSING if self._default is MISSING else MISSING_VALUE

    @property
    def _start(self) -> T:
        """A copy of the default. Without a default this is `MISSING`, because `deepcopy` of an enum member returns the member."""
        return cast("T", deepcopy(self._default))

    @property
    def _python_type(self) -> type[T]:
        """The type of the entry, in the form that the overloads of `Calls` need."""
        return cast("type[T]", self._type)

    def _or_default(self, found: object) -> T:
        """Return the result of a read that was called with `_asked`, or a copy of the default if the key was missing."""
        return self._start if found is MISSING_VALUE else cast("T", found)
