"""`Calls`: writes that depend on the old value, and writes without `await`.

`Calls` inherits all other calls from `_reads.py`, `_writing.py` and `_waits.py`. The manager and each
namespace inherit `Calls`. Each call is for the keys under one prefix. The prefix of the manager is empty.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar, overload

from lab_state._arguments import check_callable, check_default, check_key, name_of, plain_result
from lab_state._bulk import Bulk
from lab_state._entries import MISSING
from lab_state._periods import Seconds
from lab_state._reads import MISSING_VALUE
from lab_state._types import check_type
from lab_state._waits import Waits
from lab_state._writing import Writing
from lab_state.exceptions import InvalidValueError, TypeMismatchError

T = TypeVar("T")
R = TypeVar("R")

_NO_FUNCTION = "; set() and set_if_absent() store a value without one"
"""The advice for a caller that has passed a value in place of a function."""


class Calls(Writing, Waits):
    """The calls that read, and the calls that write.

    A read does not wait for writes. It sees every change made so far, and returns a new value each time, so changing that
    value does not change the state. A write is atomic: it changes the memory in one moment. If a transaction is open, the
    write first waits for the end of the transaction. The change becomes durable later; see `Config.flush_interval`. With
    an interval of 0, a write returns when its change is durable. If the write raises `StorageError` during this wait, or
    if its caller is cancelled, the change stays in memory. The change is not durable yet, and the next flush includes it.
    A write that changes nothing does not wait for a flush.

    In a shared state (`Config.shared`), a read returns durable values only. Each write goes to the process that owns the
    state, even if it changes nothing. There is one exception: `get_or_set` of an existing key only reads. A write returns
    when its revision is durable, and this process has that revision in memory. If no owner gives a sign of life for
    `Config.owner_timeout` seconds, a write raises `UnavailableError`. The `outcome` of this error says whether the write
    was made.

    Once the manager has learned that a newer writer owns the state, each write raises `FencedError` and changes nothing,
    with every `Config.flush_interval`. Even a write without an effect raises this error. Reads still succeed. If other
    code has cancelled the flush task of the manager, each write raises `UnavailableError` until `stop()`, and changes
    nothing; see `Status.task_failure`.

    Each call raises `ClosedError` before `start()` and after `stop()`. Each call with a key raises `InvalidKeyError`
    unless the key is a `str` of 1 to 1,024 characters, without NUL and lone surrogates, and not `$lab_state`. Only `in`
    returns False for any other key. A value that JSON cannot hold, or that is not of its type in the `Schema` of the
    manager, raises `InvalidValueError`. Each other argument of a
    wrong Python type raises `TypeError`. A write raises `RuntimeError` if it is not on the event loop of `start()`. There
    is one exception: `set` does not check the loop if the key has an unflushed change already.

    A call whose name ends in `_nowait` does the same as the call without this ending, but without `await`. It is meant
    for callbacks and other synchronous code on the event loop. Each read except `items` and `check` has such a call. In
    place of `exists`, use `in`. Three writes have such a call: `set_nowait`, `delete_nowait` and `update_nowait`. These
    three change the memory and return, and the change becomes durable with the next flush.
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
        """Delete a key and return the value. If the key is missing, return `default`.

        Args:
            key: The key.
            default: The result if the key is missing; see `get`.
            type: The type of the result; see `get`.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            TypeMismatchError: The stored value cannot be decoded as `type`. The key was not deleted.
            TypeError: `type` cannot be decoded, or the default is a class; see `get`.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        await self._turn()
        if (port := self._core.port) is not None:
            check_default(default)
            return await port.run(
                self._whole(key, type), self._prefix, lambda calls: calls.pop(key, default, type=type)
            )
        value = self.get_nowait(key, default, type=type)
        await self.delete_many((key,))
        return value

    @overload
    async def update(self, key: str, fn: Callable[[T], T], *, type: type[T], ttl: Seconds | None = ...) -> T: ...
    @overload
    async def update(
        self, key: str, fn: Callable[[T], T], default: T, *, type: type[T], ttl: Seconds | None = ...
    ) -> T: ...
    @overload
    async def update(
        self, key: str, fn: Callable[[Any], R], default: object = ..., *, ttl: Seconds | None = ...
    ) -> R: ...
    async def update(
        self,
        key: str,
        fn: Callable[[Any], Any],
        default: object = MISSING,
        *,
        type: Any = Any,
        ttl: Seconds | None = None,
    ) -> Any:
        """Replace a value by the result of `fn`, atomically, and return that result.

        Args:
            key: The key.
            fn: A plain function that takes the value and returns the new value. If it
                raises an error, the call changes nothing. If it sets this key with `set_nowait`,
                the result of `fn` overwrites that value. In a shared state, `fn` is called again if
                another process has changed the key meanwhile.
            default: The argument of `fn` if the key is missing.
            type: The type to decode the value as. The new value must have this type, too.
            ttl: The time until the key expires, from now on; see `set`. Without it, or with
                `None`, an existing key keeps its expiry, or stays without one. To remove the
                expiry of a key, use `touch(key, None)`.

        Raises:
            KeyNotFoundError: The key is missing, and there is no default.
            TypeMismatchError: The stored value or the new value cannot be decoded as `type`.
            InvalidValueError: The new value is an awaitable, or JSON cannot hold it. Or the new value
                is `None`, and the old value was not `None`: probably `fn` lacks a `return`. Or
                `ttl` is out of bounds.
            TypeError: `fn` is not callable, `type` cannot be decoded, or `ttl` is neither a number
                nor a `timedelta`.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        check_callable("update", fn, _NO_FUNCTION)
        lifetime = self._lifetime(ttl)
        await self._turn()
        if (port := self._core.port) is not None:
            return await port.run(
                self._whole(key, type), self._prefix, lambda calls: calls.update(key, fn, default, type=type, ttl=ttl)
            )
        old, at = self._replaceable(key, default, type)
        if lifetime is not None:
            at = self._at(lifetime)
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
        """Return the value of a key. If the key is missing, store the result of `factory` first.

        Args:
            key: The key.
            factory: A plain function, called only when the key is missing. If it sets this
                key with `set_nowait`, the result of `factory` overwrites that value. In a shared
                state, `factory` may be called again, like the `fn` of `update`.
            type: The type to decode the value as. The result of `factory` must have this type, too.
            ttl: The time until the key expires, if the result of `factory` is stored; see `set`.

        Raises:
            TypeMismatchError: The stored value or the new value cannot be decoded as `type`.
            InvalidValueError: The new value is an awaitable, or JSON cannot hold it. Or `ttl`
                is out of bounds.
            TypeError: `factory` is not callable, `type` cannot be decoded, or `ttl` is neither a
                number nor a `timedelta`.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        check_callable("get_or_set", factory, _NO_FUNCTION)
        lifetime = self._lifetime(ttl)
        await self._turn()
        if (port := self._core.port) is not None:
            return await port.run(
                self._whole(key, type),
                self._prefix,
                lambda calls: calls.get_or_set(key, factory, type=type, ttl=ttl),
                may_read=True,
            )
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
            ttl: The time until the key expires, if the value is stored; see `set`.

        Raises:
            InvalidValueError: JSON cannot hold the value, or `ttl` is out of bounds.
            TypeError: `ttl` is neither a number nor a `timedelta`.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        stored = self._encode(key, value)
        lifetime = self._lifetime(ttl)
        await self._turn()
        if (port := self._core.port) is not None:
            return await port.set_if_absent(check_key(self._full(key)), stored, lifetime)
        if key in self:
            return False
        await self._store(key, stored, self._at(lifetime))
        return True

    @overload
    async def incr(
        self, key: str, delta: int = ..., *, type: type[int], default: int = ..., ttl: Seconds | None = ...
    ) -> int: ...
    @overload
    async def incr(
        self, key: str, delta: float = ..., *, type: type[float], default: float = ..., ttl: Seconds | None = ...
    ) -> float: ...
    @overload
    async def incr(
        self, key: str, delta: float = ..., *, type: Any = ..., default: float = ..., ttl: Seconds | None = ...
    ) -> int | float: ...
    async def incr(
        self, key: str, delta: float = 1, *, type: Any = Any, default: float = 0, ttl: Seconds | None = None
    ) -> int | float:
        """Add to a number, atomically, and return the new number.

        Without `type`, the sum is an `int` if the stored number and `delta` are both `int`. Otherwise it is a
        `float`: 1.5 plus 1 is 2.5. With `type=float`, the sum is a `float`. With `type=int`, the call raises
        `TypeMismatchError` if the stored number or the sum is a `float`.

        Args:
            key: The key.
            delta: The number to add. It may be negative.
            type: `int` or `float`, or another type of a number. The stored number is decoded
                as this type, and the new number must have this type, too.
            default: The number to start from if the key is missing.
            ttl: The time until the key expires, if the key is missing; see `set`. An existing
                key keeps its expiry. So the number counts the calls of one period, and starts again after it.

        Raises:
            TypeMismatchError: The stored value is not a number. Or the stored number or the new
                number cannot be decoded as `type`.
            InvalidValueError: `delta`, `default` or the sum is not finite, or `ttl` is out of
                bounds.
            TypeError: `delta` or `default` is not a number, `type` cannot be decoded, or `ttl` is
                neither a number nor a `timedelta`.
            StorageError: With a `flush_interval` of 0: the change is not durable yet.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        _check_number("delta", delta)
        _check_number("default", default)
        lifetime = self._lifetime(ttl)
        await self._turn()
        if (port := self._core.port) is not None:
            full, kind = self._whole(key, type), _kind_of(type)
            if kind is not None and _is_plain(delta) and _is_plain(default):
                return await port.incr(full, delta, default, kind, lifetime, prefix=self._prefix)
            return await port.run(
                full, self._prefix, lambda calls: calls.incr(key, delta, type=type, default=default, ttl=ttl)
            )
        old, at = self._replaceable(key, MISSING_VALUE, type)
        if old is MISSING_VALUE:
            old, at = default, self._at(lifetime)
        if not _is_number(old):
            raise TypeMismatchError(f"key {key!r}: the value is not a number, but a {old.__class__.__name__}")
        try:
            new: int | float = old + delta
        except OverflowError:
            raise InvalidValueError("the sum is too large for a float") from None
        if type is not Any:
            new = await self._replaced(key, new, type, at)
        else:
            await self._store(key, self._encode(key, new), at)
        return new

    def _whole(self, key: object, type_: Any) -> str:
        """Return a key with the prefix before it. Check the key and the type here, because these checks need no owner."""
        if type_ is not Any:
            check_type(type_)
        return check_key(self._full(key))

    # Without waiting

    # These calls are for callbacks and other synchronous code on the event loop. Each runs the call
    # without `_nowait` to its end. `_check_nowait` has checked that this call does not have to wait.

    def set_nowait(self, key: str, value: object, *, ttl: Seconds | None = None) -> int:
        """Store a value without waiting, and return the revision of this change.

        Args:
            key: The key.
            value: The value; see `set`.
            ttl: The time until the key expires; see `set`.

        Raises:
            RuntimeError: This is not the event loop of `start()`, `flush_interval` is 0, or a
                transaction is open. Nothing was changed; the message says what to call.
            InvalidValueError: JSON cannot hold the value, or `ttl` is out of bounds.
            TypeError: `ttl` is neither a number nor a `timedelta`.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        self._check_nowait("set")
        return self._now(key, self.set(key, value, ttl=ttl))

    def delete_nowait(self, key: str) -> bool:
        """Delete a key, without waiting, and return whether it existed.

        Raises:
            RuntimeError: This is not the event loop of `start()`, `flush_interval` is 0, or a
                transaction is open. Nothing was changed; the message says what to call.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        self._check_nowait("delete")
        return self._now(key, self.delete(key))

    @overload
    def update_nowait(self, key: str, fn: Callable[[T], T], *, type: type[T], ttl: Seconds | None = ...) -> T: ...
    @overload
    def update_nowait(
        self, key: str, fn: Callable[[T], T], default: T, *, type: type[T], ttl: Seconds | None = ...
    ) -> T: ...
    @overload
    def update_nowait(
        self, key: str, fn: Callable[[Any], R], default: object = ..., *, ttl: Seconds | None = ...
    ) -> R: ...
    def update_nowait(
        self,
        key: str,
        fn: Callable[[Any], Any],
        default: object = MISSING,
        *,
        type: Any = Any,
        ttl: Seconds | None = None,
    ) -> Any:
        """Replace a value by the result of `fn`, without waiting, and return that result.

        Args:
            key: The key.
            fn: A plain function that takes the value and returns the new value. If it raises
                an error, the call changes nothing.
            default: The argument of `fn` if the key is missing.
            type: The type to decode the value as. The new value must have this type, too.
            ttl: The time until the key expires, from now on; see `update`.

        Raises:
            RuntimeError: This is not the event loop of `start()`, `flush_interval` is 0, or a
                transaction is open. Nothing was changed; the message says what to call.
            KeyNotFoundError: The key is missing, and there is no default.
            TypeMismatchError: The stored value or the new value cannot be decoded as `type`.
            InvalidValueError: The new value or `ttl` is refused; see `update`.
            TypeError: `fn`, `type` or `ttl` is refused; see `update`.
            FencedError: The manager has learned that a newer writer owns the state; nothing was changed.
        """
        self._check_nowait("update")
        return self._now(key, self.update(key, fn, default, type=type, ttl=ttl))

    def _check_nowait(self, call: str) -> None:
        """Check that a write does not have to wait.

        Raises:
            RuntimeError: The write would have to wait, or this is not the event loop of the manager.
            ClosedError: The manager is not running.
            StorageError: No change can become durable; see `Durability.check_writable`.
        """
        core = self._core
        durability = core.durability
        if running_loop() is not durability.loop:
            raise RuntimeError(
                f"{call}_nowait() belongs to the event loop that the manager of {core.name!r} was started on: "
                f"from another thread, call blocking.{call}()"
            )
        durability.check_writable()
        if core.transaction is not None and not isinstance(core.transaction, Bulk):
            raise RuntimeError(
                f"{call}_nowait() cannot wait until the open transaction of {core.name!r} is over: "
                f"await {call}(), or inside the transaction call the transaction itself"
            )
        if core.write_through:
            raise RuntimeError(
                f"{call}_nowait() cannot wait until its change is durable, as every write of {core.name!r} does "
                f"(its flush_interval is 0): await {call}(){'' if core.port else ', or choose another flush_interval'}"
            )

    def _now(self, key: object, call: Coroutine[Any, Any, R]) -> R:
        """Run a writing call to its end. If a call with many keys has the turn, order this change before that call."""
        core = self._core
        if not isinstance(core.transaction, Bulk):
            return at_once(call)
        if isinstance(key, str):
            core.transaction.batch.before(self._full(key))
        core.passing = True
        try:
            return at_once(call)
        finally:
            core.passing = False


def at_once(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine to its end, and return its result. The coroutine must never have to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: R = stop.value
        return result
    raise AssertionError("the call had to wait")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread; `None` if none runs here."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _check_number(name: str, number: object) -> None:
    """Check that an argument of `incr` is a finite number."""
    if not _is_number(number):
        raise TypeError(f"incr() needs an int or a float as {name}, not {number.__class__.__name__}")
    if isinstance(number, float) and not math.isfinite(number):
        raise InvalidValueError(f"incr() needs a finite number as {name}")


def _kind_of(type_: Any) -> Literal["any", "int", "float"] | None:
    """Return the name of a type argument of `incr`, as a message to the owner has it; `None` if the type has no such name."""
    if type_ is Any:
        return "any"
    return "int" if type_ is int else "float" if type_ is float else None


def _is_plain(number: float) -> bool:
    """Return whether JSON keeps a number exactly: a `float`, or an `int` of 64 bits."""
    return number.__class__ is float or (number.__class__ is int and -(2**63) <= number < 2**63)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
