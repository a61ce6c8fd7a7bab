"""A thread of one's own, and a short way there and back.

`loop.run_in_executor` takes 30 to 50 microseconds more: a future with a condition, one more
for the event loop, and locks. That is a fifth of what an SSD takes for a sync, and a single
writer waits for all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from lab_state.exceptions import UnavailableError

P = ParamSpec("P")
R = TypeVar("R")

_Work = Callable[[], None]


class Worker:
    """One thread that calls one function at a time, in order.

    It ends when it is told to, when nobody has the worker any more, and with the
    interpreter, which does not wait for a call that hangs: to what is written, that is
    a crash.
    """

    def __init__(self, name: str) -> None:
        """Start the thread, with this name.

        Raises:
            UnavailableError: No thread could be started.
        """
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._queue,), name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise UnavailableError(
                f"no thread could be started for {name}: raise the limit of processes (`ulimit -u`, the pids of a container)"
            ) from error
        self._end = weakref.finalize(self, self._queue.put, None)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Call a function in the thread; its result is for the running event loop.

        Cancelled before its turn, it is not called; later, it goes on, and nobody is told.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def work() -> None:
            if not future.cancelled():
                outcome = _outcome(function, *args, **kwargs)
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
                    loop.call_soon_threadsafe(_settle, future, *outcome)

        self._put(work)
        return future

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call a function in the thread; its result is for any thread. Cancelled before its turn, it is not called."""
        future: Future[R] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                _settle(future, *_outcome(function, *args, **kwargs))

        self._put(work)
        return future

    def shutdown(self, *, wait: bool) -> None:
        """End the thread, behind what it was told to call, and wait for that or not. Idempotent."""
        self._end()
        if wait:
            self._thread.join()

    def _put(self, work: _Work) -> None:
        if not self._end.alive:
            raise RuntimeError("this thread was told to end")
        self._queue.put(work)


def _work(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        del work  # or it would be kept until the next one comes


def _outcome(function: Callable[..., R], *args: Any, **kwargs: Any) -> tuple[Any, BaseException | None]:
    try:
        return function(*args, **kwargs), None
    except BaseException as error:  # noqa: BLE001 -- whoever waits gets it
        return None, error


def _settle(future: asyncio.Future[Any] | Future[Any], result: object, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
