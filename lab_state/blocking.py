"""`Blocking`: the calls of a manager, for other threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar, final

from lab_state._calls import Calls
from lab_state._handle import Handle
from lab_state.exceptions import ClosedError

R = TypeVar("R")
P = ParamSpec("P")

_LOOK_AGAIN = 1.0
_ENDED = "the event loop of the manager does not run; let the threads that use `blocking` end before it"


def plain(fn: Callable[Concatenate[Calls, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Plain, P], R]:
    """The same call without `await`; carries every overload over."""

    def call(self: Plain, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(fn(self._calls, *args, **kwargs))

    call.__name__, call.__qualname__, call.__doc__ = fn.__name__, fn.__name__, fn.__doc__
    return call


class Plain(Handle):
    """The calls, each run to its end by `_run`."""

    __slots__ = ("_calls",)

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        raise NotImplementedError

    def __bool__(self) -> Literal[True]:
        """An empty state is still a state."""
        return True

    get: Final = plain(Calls.get)
    get_many: Final = plain(Calls.get_many)
    get_all: Final = plain(Calls.get_all)
    exists: Final = plain(Calls.exists)
    keys: Final = plain(Calls.keys)
    expires_in: Final = plain(Calls.expires_in)
    set_many: Final = plain(Calls.set_many)
    touch: Final = plain(Calls.touch)
    delete: Final = plain(Calls.delete)
    delete_many: Final = plain(Calls.delete_many)
    delete_all: Final = plain(Calls.delete_all)
    pop: Final = plain(Calls.pop)
    update: Final = plain(Calls.update)
    get_or_set: Final = plain(Calls.get_or_set)
    set_if_absent: Final = plain(Calls.set_if_absent)
    incr: Final = plain(Calls.incr)


@final
class Blocking(Plain):
    """The calls without `await`, for threads other than the event loop's.

    For FastAPI's `def` endpoints, `asyncio.to_thread`, and threads of your own, any
    number at once. Each call runs on the manager's event loop and returns or raises
    what the call itself would; so a function given to `update` runs there, too. A
    thread that is interrupted while it waits leaves its call to go on.

    On top of what the call itself raises, each raises `RuntimeError` on the event
    loop that it would wait for, where the call of the manager is to be awaited
    instead; and `ClosedError` when that loop ends, within a second.
    """

    __slots__ = ()

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        try:
            loop = self._loop()
            future = _submit(coroutine, loop)
        except BaseException:
            coroutine.close()
            raise
        while not future.done():
            concurrent.futures.wait([future], _LOOK_AGAIN)
            if loop.is_closed():  # nobody is left to tell of a cancellation
                break
            if not loop.is_running():
                future.cancel()
        if future.done() and not future.cancelled():
            try:
                return future.result()
            finally:
                del future  # it holds the error, and that this frame
        if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
            coroutine.close()
        raise ClosedError(_ENDED)

    def _loop(self) -> asyncio.AbstractEventLoop:
        core = self._calls._core  # noqa: SLF001 -- the calls' other face
        loop = core.durability.loop
        if _running_loop() is loop:
            raise RuntimeError(
                f"a call through `blocking` of {core.name!r} would wait for the event loop that it was made on: "
                "await the call of the manager itself"
            )
        if not loop.is_running():
            raise ClosedError(_ENDED)
        return loop

    set: Final = plain(Calls.set)
    flush: Final = plain(Calls.flush)
    wait_durable: Final = plain(Calls.wait_durable)


def _submit(coroutine: Coroutine[Any, Any, R], loop: asyncio.AbstractEventLoop) -> concurrent.futures.Future[R]:
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # closed since it was looked at
        raise ClosedError(_ENDED) from None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
