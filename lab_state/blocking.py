"""`Blocking` and `BlockingEntry`: the calls of a manager and of an entry, for threads that do not run the event loop of the manager."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Callable, Coroutine
from operator import contains
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast, final, overload

from lab_state._calls import Calls, running_loop
from lab_state._entries import MISSING
from lab_state._handle import Handle
from lab_state._periods import Seconds
from lab_state._plain import Plain, plain
from lab_state.entry import Entry, entry_of
from lab_state.exceptions import ClosedError

T = TypeVar("T")
D = TypeVar("D")
R = TypeVar("R")
P = ParamSpec("P")

_LOOK_AGAIN = 1.0
"""The seconds after which a waiting call checks again that the event loop of the manager runs."""

_ENDED = "the event loop of the manager does not run; wait for all threads that use `blocking` before you stop the event loop"


@final
class Blocking(Plain):
    """The calls without `await`, for threads that do not run the event loop of the manager.

    They are meant for FastAPI's `def` endpoints, `asyncio.to_thread`, and your own threads. Any
    number of threads can use them at the same time. Each call runs the manager's call of the same name on
    the event loop of the manager, and has the same result or error. So a function that is passed to
    `update` runs on the event loop, too. `len` and `in` also run there. If a `KeyboardInterrupt`
    ends the wait of a thread, the call continues on the event loop.

    Each call can raise two more errors. On the event loop of the manager it raises
    `RuntimeError`, because it would block the loop that has to run it: await the call of the
    manager instead. If that loop does not run, the call raises `ClosedError` at once. If the loop stops
    during the call, the call raises `ClosedError` within about a second. Only `entry` and `namespace`
    do not use the loop, and never raise these two errors. No call raises the `RuntimeError` of the manager for a wrong event loop.
    """

    __slots__ = ()

    _may_wait = True

    def __repr__(self) -> str:
        """Return the prefix and the name of the state."""
        core, prefix = self._calls._core, self._calls._prefix  # noqa: SLF001 -- `Blocking` and its `Calls` belong together
        return f"<Blocking {prefix!r} of {core.name!r}>" if prefix else f"<Blocking of {core.name!r}>"

    def __len__(self) -> int:
        """Return the number of keys."""
        return self._run(_called(len, self._calls))

    def __contains__(self, key: object) -> bool:
        """Return whether the key exists; False for an object that cannot be a key."""
        return self._run(_called(contains, self._calls, key))

    @overload
    def entry(self, key: str, type: type[T]) -> BlockingEntry[T]: ...
    @overload
    def entry(self, key: str, type: type[T], *, default: None) -> BlockingEntry[T | None]: ...
    @overload
    def entry(self, key: str, type: type[T], *, default: T) -> BlockingEntry[T]: ...
    @overload
    def entry(self, key: str, type: Any, *, default: Any = ...) -> BlockingEntry[Any]: ...
    def entry(self, key: str, type: Any, *, default: Any = MISSING) -> BlockingEntry[Any]:
        """Return a handle for one key, without `await`; see `Manager.entry`.

        The handle can be made on any thread, before `start()` too.
        """
        return BlockingEntry(self, entry_of(self._calls, key, type, default))

    def namespace(self, name: str) -> Blocking:
        """Return a handle with the same calls for the keys that begin with `name` and a slash; see `Manager.namespace`.

        The handle can be made on any thread, before `start()` too.
        """
        calls = self._calls
        return Blocking(Calls(calls._core, calls._nested(name)))  # noqa: SLF001 -- `Blocking` and its `Calls` belong together

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine on the event loop of the manager, and return its result. For the two additional errors, see `Blocking`."""
        try:
            loop = self._loop()
            future = _submit(coroutine, loop)
        except BaseException:
            coroutine.close()
            raise
        while not future.done():
            concurrent.futures.wait([future], _LOOK_AGAIN)
            if loop.is_closed():  # `cancel` needs the loop, and a closed loop accepts no callbacks
                break
            if not loop.is_running():
                future.cancel()
        if future.done() and not future.cancelled():
            try:
                return future.result()
            finally:
                del future  # breaks a reference cycle: the future refers to the error, and its traceback to this frame
        if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
            coroutine.close()
        raise ClosedError(_ENDED)

    def _loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop of the manager.

        Raises:
            RuntimeError: The caller runs on that event loop.
            ClosedError: The manager or its event loop does not run.
        """
        core = self._calls._core  # noqa: SLF001 -- `Blocking` and its `Calls` belong together
        loop = core.durability.loop
        if running_loop() is loop:
            raise RuntimeError(
                f"a call through `blocking` of {core.name!r} would wait for the event loop that it was made on: "
                "await the call of the manager itself"
            )
        if not loop.is_running():
            raise ClosedError(_ENDED)
        return loop

    set: Final = plain(Calls.set)
    set_many: Final = plain(Calls.set_many)
    flush: Final = plain(Calls.flush)
    catch_up: Final = plain(Calls.catch_up)
    wait_durable: Final = plain(Calls.wait_durable)
    wait_revision: Final = plain(Calls.wait_revision)


@final
class BlockingEntry(Handle, Generic[T]):
    """The handle for one key and its type, without `await`, for threads that do not run the event loop of the manager.

    Each call runs the call of `Entry` with the same name on the event loop of the manager. It can raise the same two
    additional errors as a call of `Blocking`.
    """

    __slots__ = ("_entry", "_run")

    def __init__(self, blocking: Blocking, entry: Entry[T]) -> None:
        self._entry = entry
        self._run = blocking._run  # noqa: SLF001 -- `Blocking` is in this module

    def __repr__(self) -> str:
        """Return the key and the type."""
        return repr(self._entry).replace("<Entry", "<BlockingEntry", 1)

    @property
    def key(self) -> str:
        """The key as it was given, without the prefix of the namespace."""
        return self._entry.key

    def get(self) -> T:
        """Return the value, or a copy of the default if the key is missing; see `Entry.get`."""
        return self._run(self._entry.get())

    def exists(self) -> bool:
        """Return whether the key exists; see `Entry.exists`."""
        return self._run(self._entry.exists())

    @overload
    def expires_in(self) -> float | None: ...
    @overload
    def expires_in(self, default: D) -> float | D | None: ...
    def expires_in(self, default: object = MISSING) -> object:
        """Return the seconds until the key expires; `None` if it never expires; see `Entry.expires_in`."""
        return self._run(self._entry.expires_in(default))

    def set(self, value: T, *, ttl: Seconds | None = None) -> int:
        """Store a value, and return the revision of this change; see `Entry.set`."""
        return self._run(self._entry.set(value, ttl=ttl))

    def set_if_absent(self, value: T, *, ttl: Seconds | None = None) -> bool:
        """Store a value if the key is missing, and return whether it was stored; see `Entry.set_if_absent`."""
        return self._run(self._entry.set_if_absent(value, ttl=ttl))

    def update(self, fn: Callable[[T], T], *, ttl: Seconds | None = None) -> T:
        """Replace the value by the result of `fn`, atomically, and return that result; see `Entry.update`. `fn` runs on the event loop."""
        return self._run(self._entry.update(fn, ttl=ttl))

    @overload
    def incr(self: BlockingEntry[int], delta: int = ..., *, ttl: Seconds | None = ...) -> int: ...
    @overload
    def incr(self: BlockingEntry[float], delta: float = ..., *, ttl: Seconds | None = ...) -> float: ...
    def incr(self: BlockingEntry[Any], delta: float = 1, *, ttl: Seconds | None = None) -> float:
        """Add to a number, atomically, and return the new number; see `Entry.incr`."""
        return self._run(cast("Entry[float]", self._entry).incr(delta, ttl=ttl))

    def touch(self, ttl: Seconds | None) -> bool:
        """Give the key another time to live, and return whether the key existed; see `Entry.touch`."""
        return self._run(self._entry.touch(ttl))

    def delete(self) -> bool:
        """Delete the key, and return whether it existed; see `Entry.delete`."""
        return self._run(self._entry.delete())

    def pop(self) -> T:
        """Delete the key, and return its value, or a copy of the default if the key is missing; see `Entry.pop`."""
        return self._run(self._entry.pop())


async def _called(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a plain function in a coroutine, so that `Blocking` can run it on the event loop."""
    return fn(*args, **kwargs)


def _submit(coroutine: Coroutine[Any, Any, R], loop: asyncio.AbstractEventLoop) -> concurrent.futures.Future[R]:
    """Start a coroutine on the event loop. Raise a `ClosedError` if the loop is closed."""
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # the loop was closed after the check in `_loop`
        raise ClosedError(_ENDED) from None
