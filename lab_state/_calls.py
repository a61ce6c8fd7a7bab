"""The calls whose change depends on what is there, and those that wait until it is durable.

With those of `_reads.py` and `_writing.py` they are the base of the manager: every call once, under a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from lab_state._arguments import Seconds, check_callable, check_timeout, name_of, plain_result
from lab_state._entries import MISSING
from lab_state._reads import MISSING_VALUE
from lab_state._writing import Writing
from lab_state.exceptions import InvalidValueError, TypeMismatchError

T = TypeVar("T")
R = TypeVar("R")


class Calls(Writing):
    """Reading and writing.

    A read never waits; it sees every change made so far and gives a fresh value each
    time, which the caller may change without touching the state. A write is atomic,
    in memory at once, and durable later: see `Config.flush_interval`. Where that is
    0, a write returns when it is durable; if it raises `StorageError`, or its caller
    is cancelled, the change stays and is retried: it is not durable yet, not undone.

    Once the manager knows that a newer writer owns the state, every write raises
    `FencedError` and changes nothing, whatever `Config.flush_interval` is, also where
    it would have changed nothing anyway. Reads go on. If the manager's flush task has
    ended before `stop()`, because other code cancelled it, every write raises
    `UnavailableError` in the same way; see `Status.task_failure`.

    Every call raises `ClosedError` before `start()` and after `stop()`, and
    `InvalidKeyError` for a key that is not a `str` of 1 to 1,024 characters without
    NUL and lone surrogates, and not `$lab_state`; only `in` says no to such a key. A
    write on another event loop than that of `start()` raises `RuntimeError`, as far as
    it is noticed: `set` of a key that is about to be flushed anyway does not look.
    """

    __slots__ = ()

    @overload
    async def pop(self, key: str, *, type: type[T]) -> T: ...
    @overload
    async def pop(self, key: str, default: None, *, type: type[T]) -> T | None: ...
    @overload
    async def pop(self, key: str, default: T, *, type: type[T]) -> T: ...
    @overload
    async def pop(self, key: str, default: object = ..., *, type: Any = ...) -> Any: ...
    async def pop(self, key: str, default: object = MISSING, *, type: Any = Any) -> Any:
        """Delete a key and return its value, or `default` if it is missing.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            TypeMismatchError: The stored value is not a `type`; it was not deleted.
            StorageError: With a `flush_interval` of 0: not durable yet.
            FencedError: A newer writer owns the state; nothing was changed.
        """
        await self._turn()
        value = self.get_nowait(key, default, type=type)
        await self.delete_many((key,))
        return value

    @overload
    async def update(self, key: str, fn: Callable[[T], T], *, type: type[T]) -> T: ...
    @overload
    async def update(self, key: str, fn: Callable[[T], T], default: T, *, type: type[T]) -> T: ...
    @overload
    async def update(self, key: str, fn: Callable[[Any], R], default: object = ...) -> R: ...
    async def update(self, key: str, fn: Callable[[Any], Any], default: object = MISSING, *, type: Any = Any) -> Any:
        """Replace a value by the result of `fn`, atomically, and return that result.

        Args:
            key: The key.
            fn: A plain function: value in, value out. If it raises, nothing changes.
            default: What `fn` is given when the key is missing.
            type: What to decode the value as; the new value must be one too.

        A key that expires still expires when it would have.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            TypeMismatchError: The stored or the new value is not a `type`.
            InvalidValueError: The new value cannot be kept, is an awaitable, or is
                `None` where the old one was not: a forgotten `return`.
            StorageError: With a `flush_interval` of 0: not durable yet.
            FencedError: A newer writer owns the state; nothing was changed.
        """
        check_callable("update", fn)
        await self._turn()
        old, at = self._replaceable(key, default, type)
        was_none = old is None
        new = plain_result("update", fn, fn(old))
        if new is None and not was_none:
            raise InvalidValueError(
                f"{name_of(fn)} given to update() returned None; return the new value, or use delete() or set(key, None)"
            )
        await self._replaced(key, new, type, at)
        return new

    @overload
    async def get_or_set(
        self, key: str, factory: Callable[[], T], *, type: type[T], ttl: Seconds | None = ...
    ) -> T: ...
    @overload
    async def get_or_set(
        self, key: str, factory: Callable[[], object], *, type: Any = ..., ttl: Seconds | None = ...
    ) -> Any: ...
    async def get_or_set(
        self, key: str, factory: Callable[[], object], *, type: Any = Any, ttl: Seconds | None = None
    ) -> Any:
        """Return the value of a key. If it is missing, store the result of `factory` first.

        Args:
            key: The key.
            factory: A plain function, called only when the key is missing.
            type: What to decode the value as; what `factory` makes must be one too.
            ttl: How long what `factory` made lives; see `set`.

        Raises:
            TypeMismatchError: The stored or the new value is not a `type`.
            InvalidValueError: The new value cannot be kept, or is an awaitable; or `ttl`
                is out of bounds.
            StorageError: With a `flush_interval` of 0: not durable yet.
            FencedError: A newer writer owns the state; nothing was changed.
        """
        check_callable("get_or_set", factory)
        lifetime = self._lifetime(ttl)
        await self._turn()
        found = self._get(key, MISSING_VALUE, type)
        if found is not MISSING_VALUE:
            return found
        made = plain_result("get_or_set", factory, factory())
        return await self._replaced(key, made, type, self._at(lifetime))

    async def set_if_absent(self, key: str, value: object, *, ttl: Seconds | None = None) -> bool:
        """Store a value if the key is missing, and return whether it was stored.

        Args:
            key: The key.
            value: The value; see `set`.
            ttl: How long it lives; see `set`.

        Raises:
            InvalidValueError: JSON cannot hold the value, or `ttl` is out of bounds.
            StorageError: With a `flush_interval` of 0: not durable yet.
            FencedError: A newer writer owns the state; nothing was changed.
        """
        stored = self._encode(value)
        lifetime = self._lifetime(ttl)
        await self._turn()
        if key in self:
            return False
        await self._store(key, stored, self._at(lifetime))
        return True

    @overload
    async def incr(self, key: str, delta: int = ..., *, default: int = ..., ttl: Seconds | None = ...) -> int: ...
    @overload
    async def incr(self, key: str, delta: float = ..., *, default: float = ..., ttl: Seconds | None = ...) -> float: ...
    async def incr(self, key: str, delta: float = 1, *, default: float = 0, ttl: Seconds | None = None) -> float:
        """Add to a number, atomically, and return the new number.

        Args:
            key: The key.
            delta: What to add; may be negative.
            default: The number to start from when the key is missing.
            ttl: How long a number lives that starts here; see `set`. One that is there
                keeps the time that it has: a counter for each window of time.

        Raises:
            TypeMismatchError: The stored value is not a number.
            InvalidValueError: `delta`, `default` or the sum is not a finite number; or
                `ttl` is out of bounds.
            StorageError: With a `flush_interval` of 0: not durable yet.
            FencedError: A newer writer owns the state; nothing was changed.
        """
        for name, number in (("delta", delta), ("default", default)):
            if not _is_number(number):
                raise InvalidValueError(f"incr() needs an int or a float as {name}, not {number.__class__.__name__}")
        lifetime = self._lifetime(ttl)
        await self._turn()
        old, at = self._replaceable(key, MISSING_VALUE, Any)
        if old is MISSING_VALUE:
            old, at = default, self._at(lifetime)
        if not _is_number(old):
            raise TypeMismatchError(f"key {key!r}: the value is not a number, but a {old.__class__.__name__}")
        try:
            new: float = old + delta
        except OverflowError:
            raise InvalidValueError("the sum is too large for a float") from None
        await self._store(key, self._encode(new), at)
        return new

    # Durability

    async def flush(self) -> None:
        """Return when every change made so far is durable.

        Writes nothing if nothing changed. Callers at the same time share one write.
        Cancelling the caller does not cancel the write.

        Raises:
            StorageError: The write failed; the changes stay in memory, and are retried
                by the next flush, in the background too unless `flush_interval` is
                `None`.
            ClosedError: The manager is not running.
            RuntimeError: This is not the event loop of `start()`.
        """
        await self._core.durability.make_durable(self._core.state.revision)

    async def wait_durable(self, revision: int | None = None, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- raised as a StorageError
        """Wait until a revision is durable. Unlike `flush()`, start no flush.

        Cancelling the caller ends the wait and changes nothing.

        Args:
            revision: The revision that a write returned; by default the last change.
            timeout: How long to wait, in seconds, 0 or more and finite. `None` waits without
                a limit.

        Raises:
            WaitTimeoutError: The revision is not durable after `timeout` seconds; wait again.
                It is an `UnavailableError` and a `TimeoutError`.
            ValueError: There is no such revision yet, or the timeout is out of bounds.
            TypeError: The revision is not an `int`, or the timeout is not a number.
            RuntimeError: This is not the event loop of `start()`.
            FencedError: It will never be durable: a newer writer owns the state.
            StorageError: The manager was stopped, and its last flush failed.
            ClosedError: The manager is not running.
        """
        self._check_open()
        last = self._core.state.revision
        if revision is not None and (isinstance(revision, bool) or not isinstance(revision, int)):
            raise TypeError(f"a revision is an int, such as a write returns; not {type(revision).__name__}")
        if revision is not None and revision > last:
            raise ValueError(f"there is no revision {revision} yet: the last one is {last}")
        seconds = check_timeout(timeout)
        await self._core.durability.wait_durable(last if revision is None else revision, seconds)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
