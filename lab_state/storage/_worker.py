"""Threads that belong to a storage object, and a short way there and back.

`loop.run_in_executor` takes 30 to 50 microseconds more: a future with a condition, one more
for the event loop, and locks. That is a fifth of what an SSD takes for a sync, and a single
writer waits for all of it.

A worker calls one function at a time, in order. It has no thread of its own: all workers of
a storage object share its threads, so a state that is idle costs none. A thread that is
free takes the worker that was handed something first.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from lab_state import _forks as forks
from lab_state.exceptions import UnavailableError

P = ParamSpec("P")
R = TypeVar("R")

_Work = Callable[[], None]

_MOST = 32
"""Threads of one storage object. A state whose disk hangs takes two of them at most."""

_IDLE_SECONDS = 10.0
"""Seconds for which a thread waits for work. Starting a thread takes as long as a sync of a fast disk."""


class Threads:
    """Threads that are started when there is more to do than they can take, and end when they are idle.

    One stays as long as there is a worker, so that a limit of processes that is reached
    later keeps no state from being written and closed. The interpreter does not wait for a
    call that hangs: to what is written, that is a crash.
    """

    def __init__(self, name: str) -> None:
        """Take the name of the threads. None is started before a worker is handed something."""
        self._name = name
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._ready: SimpleQueue[Worker | None] = SimpleQueue()
        self._count = 0
        self._free = 0  # threads that wait, less the workers that wait for one
        self._workers = 0  # not told to end
        self.turns: int = 0  # how many calls have ended
        self._dropped: deque[None] = deque()  # those that were not, and are gone

    def __reduce__(self) -> tuple[type[Threads], tuple[str]]:
        """Give a copy threads of its own: other processes may be given a storage object."""
        return Threads, (self._name,)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Begin anew. Runs in a forked child. The threads and their work are the parent's."""
        self._reset()

    def enter(self) -> None:
        """Count one worker more."""
        forks.disown_in_children(self)
        with self._lock:
            self._workers += 1

    def leave(self) -> None:
        """Count one worker less; with the last one, the threads end."""
        with self._lock:
            self._workers -= 1
            for _ in range(0 if self._workers else self._free):
                self._ready.put(None)

    def drop(self) -> None:
        """Leave, as `leave` does, when a worker is collected. That may come at any time, with the lock held or not."""
        self._dropped.append(None)
        self._ready.put(None)

    def hand(self, worker: Worker, work: _Work) -> None:
        """Let a thread call this, behind what the worker was handed before.

        Raises:
            UnavailableError: There is no thread, and none could be started.
        """
        with self._lock:
            if worker.is_queued:
                worker.todo.append(work)
                return
            if self._free <= 0 and self._count < _MOST:
                self._start()
            worker.todo.append(work)  # first: the thread that gets the worker looks for it at once
            worker.is_queued = True
            self._free -= 1
            if self._free < 0:
                worker.waits_since = self.turns
            self._ready.put(worker)

    def _start(self) -> None:
        thread = threading.Thread(target=_serve, args=(self,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if self._count:  # those that there are come to it later
                return
            raise UnavailableError(
                f"no thread could be started for {self._name}: raise the limit of processes (`ulimit -u`, or the pids "
                "of the container)"
            ) from error
        self._count += 1
        self._free += 1

    def next(self) -> Worker | None:
        """Wait for a worker that has something to do; `None` if the thread that asks is to end."""
        while True:
            try:
                worker = self._ready.get(timeout=_IDLE_SECONDS)
            except Empty:
                worker = None
            if worker is not None:
                return worker
            with self._lock:
                while self._dropped:
                    self._dropped.pop()
                    self._workers -= 1
                # Without a thread that is free, there is a worker for this one already.
                if self._free > 0 and (self._count > 1 or not self._workers):
                    self._free -= 1
                    self._count -= 1
                    return None

    def done(self, worker: Worker) -> None:
        """Let the worker wait again, behind the others, or until it is handed something."""
        with self._lock:
            self.turns += 1
            if worker.todo:
                if self._free < 0:
                    worker.waits_since = self.turns
                self._ready.put(worker)
                return
            worker.is_queued = False
            self._free += 1
            if not self._workers:
                self._ready.put(None)


def _serve(threads: Threads) -> None:
    while (worker := threads.next()) is not None:
        worker.has_thread()
        worker.todo.popleft()()
        threads.done(worker)
        del worker  # or it would be kept until the next one comes


class Worker(Executor):
    """Calls one function at a time, in order, in threads of a storage object.

    Attributes:
        todo: What it was handed and has not begun.
        is_queued: Whether it waits for a thread, or has one.
        waits_since: The turns of the threads when it began to wait for one that is free; `None` if it
            does not.
    """

    __slots__ = ("_is_told_to_end", "_threads", "_waited", "is_queued", "todo", "waits_since")

    def __init__(self, threads: Threads) -> None:
        self.todo: deque[_Work] = deque()
        self.is_queued: bool = False
        self.waits_since: int | None = None
        self._waited = 0
        self._threads = threads
        self._is_told_to_end = True  # until it is counted
        threads.enter()
        self._is_told_to_end = False

    def __del__(self) -> None:
        if not self._is_told_to_end:
            self._threads.drop()

    def has_thread(self) -> None:
        """Note that the wait for a thread is over; in the thread."""
        since, self.waits_since = self.waits_since, None  # first: `waited` must not count these turns twice
        if since is not None:
            self._waited += self._threads.turns - since

    @property
    def waited(self) -> int:
        """Return how many calls of others have ended while this one waited for a thread. May be read from any thread."""
        since = self.waits_since
        return self._waited if since is None else self._waited + self._threads.turns - since

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Call a function in a thread; its result is for the running event loop.

        Cancelled before its turn, it is not called; later, it goes on, and nobody is told.

        Raises:
            UnavailableError: There is no thread, and none could be started.
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

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call a function in a thread; its result is for any thread. Cancelled before its turn, it is not called.

        Raises:
            UnavailableError: There is no thread, and none could be started.
        """
        future: Future[R] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                _settle(future, *_outcome(function, *args, **kwargs))

        self._put(work)
        return future

    def shutdown(self, *_: object, **__: object) -> None:
        """Accept no more calls. Those handed in before are made. A second call does nothing.

        This never waits: the arguments of `Executor.shutdown` have no effect.
        """
        if not self._is_told_to_end:
            self._is_told_to_end = True
            self._threads.leave()

    def _put(self, work: _Work) -> None:
        if self._is_told_to_end:
            raise RuntimeError("this worker was told to end")
        self._threads.hand(self, work)


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
