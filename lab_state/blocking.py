"""`Blocking`: the calls of a manager, for other threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Coroutine
from typing import Any, Final, TypeVar, final

from lab_state._calls import Calls
from lab_state._plain import Plain, plain
from lab_state.exceptions import ClosedError

R = TypeVar("R")

_LOOK_AGAIN = 1.0
_ENDED = "the event loop of the manager does not run; let the threads that use `blocking` end before it"


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
