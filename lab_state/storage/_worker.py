"""The threads of a storage object, and a fast way to call a function in one of them.

`loop.run_in_executor` takes 30 to 50 microseconds longer than a worker, because it uses a future with a
condition, a second future for the event loop, and locks. This additional time is a fifth of the time
of a sync on an SSD, and each commit of a single writer would take longer by it.

A worker calls one function at a time, in order. A worker does not have a fixed thread: all workers
of a storage object share its threads, so an idle state needs no thread. A free thread is given to
the worker that has waited longest.
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
"""The largest number of threads of one storage object. An open state has two workers, and a shared state has a third one in its owner. So an open state whose disk hangs blocks at most three threads."""

_IDLE_SECONDS = 10.0
"""The seconds for which an idle thread waits for work. Starting a thread takes as long as a sync of a fast disk."""


class Threads:
    """A pool of threads that grows with the work and ends idle threads.

    The last thread stays as long as there is a worker. So every state can be written and closed, even if
    the process limit of the system is reached later. The threads are daemons: the interpreter ends
    without waiting for a call that hangs. For the stored data this is the same as a crash.
    """

    def __init__(self, name: str) -> None:
        """Set the name of the threads. The first thread starts with the first call of a worker."""
        self._name = name
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._ready: SimpleQueue[Worker | None] = SimpleQueue()
        self._count = 0
        self._free = 0  # the number of idle threads, minus the number of workers that wait for a thread
        self._workers = 0  # the number of workers that were not shut down
        self.turns: int = 0  # the number of calls that have ended
        # One item for each worker that was collected without `shutdown`, and is still counted.
        self._dropped: deque[None] = deque()

    def __reduce__(self) -> tuple[type[Threads], tuple[str]]:
        """Let `copy` and `pickle` make an object without threads. The copy starts other threads when it needs them."""
        return Threads, (self._name,)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Forget the threads and their work, which belong to the parent. This runs in a forked child, which starts its own threads."""
        self._reset()

    def enter(self) -> None:
        """Count a new worker."""
        forks.disown_in_children(self)
        with self._lock:
            self._workers += 1

    def leave(self) -> None:
        """Remove a worker that was shut down from the count. After the last one, each thread ends when it has no work."""
        with self._lock:
            self._workers -= 1
            for _ in range(0 if self._workers else self._free):
                self._ready.put(None)

    def drop(self) -> None:
        """Note that a worker was garbage collected. This may be called at any time, even while this thread holds the lock."""
        self._dropped.append(None)
        self._ready.put(None)

    def hand(self, worker: Worker, work: _Work) -> None:
        """Add a call to the queue of a worker. The call is made after the worker's earlier calls.

        Raises:
            UnavailableError: There is no thread, and no thread could be started.
        """
        with self._lock:
            if worker.is_queued:
                worker.todo.append(work)
                return
            if self._free <= 0 and self._count < _MOST:
                self._start()
            # Add the call before `put`, because the thread that gets the worker reads `todo` at once.
            worker.todo.append(work)
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
            if self._count:  # a running thread will make the call later
                return
            raise UnavailableError(
                f"no thread could be started for {self._name}: raise the limit of processes (`ulimit -u`, or the limit "
                "of pids of the container)"
            ) from error
        self._count += 1
        self._free += 1

    def next(self) -> Worker | None:
        """Wait for a worker that has work, and return it. Return `None` if the calling thread has to end."""
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
                # If `_free` is not above 0, a worker is in the queue for each idle thread, including this one.
                if self._free > 0 and (self._count > 1 or not self._workers):
                    self._free -= 1
                    self._count -= 1
                    return None

    def done(self, worker: Worker) -> None:
        """Note the end of a call. If the worker has more work, put it back into the queue."""
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
        del worker  # otherwise this variable would keep the worker in memory until the next call


class Worker(Executor):
    """An executor that calls one function at a time, in order, in the threads of a storage object.

    Attributes:
        todo: The calls that have not started.
        is_queued: Whether the worker waits for a thread, or has one.
        waits_since: The value of `Threads.turns` at the moment when the worker began to wait for
            a free thread; `None` if it does not wait.
    """

    __slots__ = ("_is_told_to_end", "_threads", "_waited", "is_queued", "todo", "waits_since")

    def __init__(self, threads: Threads) -> None:
        self.todo: deque[_Work] = deque()
        self.is_queued: bool = False
        self.waits_since: int | None = None
        self._waited = 0
        self._threads = threads
        self._is_told_to_end = True  # so that `__del__` does nothing if `enter` fails
        threads.enter()
        self._is_told_to_end = False

    def __del__(self) -> None:
        if not self._is_told_to_end:
            self._threads.drop()

    def has_thread(self) -> None:
        """Note that the worker has got a thread. This runs in that thread."""
        # `waits_since` is cleared first, because `waited` must not count these turns twice.
        since, self.waits_since = self.waits_since, None
        if since is not None:
            self._waited += self._threads.turns - since

    @property
    def waited(self) -> int:
        """The number of calls of other workers that ended while this one waited for a thread. Any thread may read it."""
        since = self.waits_since
        return self._waited if since is None else self._waited + self._threads.turns - since

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Call a function in a thread. Return a future of the running event loop.

        If the future is cancelled before the function starts, the function is not called. If
        it is cancelled later, the function continues, and its result is dropped.

        Raises:
            UnavailableError: There is no thread, and no thread could be started.
            RuntimeError: The worker was shut down.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def work() -> None:
            if not future.cancelled():
                outcome = _outcome(function, *args, **kwargs)
                with contextlib.suppress(RuntimeError):  # the loop is closed, so no task waits for the result
                    loop.call_soon_threadsafe(_settle, future, *outcome)

        self._put(work)
        return future

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call a function in a thread. Return a future that any thread may wait for.

        If the future is cancelled before the function starts, the function is not called.

        Raises:
            UnavailableError: There is no thread, and no thread could be started.
            RuntimeError: The worker was shut down.
        """
        future: Future[R] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                _settle(future, *_outcome(function, *args, **kwargs))

        self._put(work)
        return future

    def shutdown(self, *_: object, **__: object) -> None:
        """Accept no more calls. Calls in the queue are still made. A second `shutdown` does nothing.

        This method never waits. The arguments of `Executor.shutdown` have no effect.
        """
        if not self._is_told_to_end:
            self._is_told_to_end = True
            self._threads.leave()

    def _put(self, work: _Work) -> None:
        if self._is_told_to_end:
            raise RuntimeError("this worker was shut down")
        self._threads.hand(self, work)


async def waited(future: Future[R]) -> R:
    """Wait for a call in a thread. If the caller is cancelled, the call goes on, and its error is dropped."""
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(_retrieve)
    return await asyncio.shield(waiting)


def _retrieve(ended: asyncio.Future[Any]) -> None:
    """Mark the error of a future as retrieved. Otherwise asyncio logs it if nothing waits for the future."""
    _ = ended.cancelled() or ended.exception()


def _outcome(function: Callable[..., R], *args: Any, **kwargs: Any) -> tuple[Any, BaseException | None]:
    try:
        return function(*args, **kwargs), None
    except BaseException as error:  # noqa: BLE001 -- the future raises the error in the task or thread that waits for it
        return None, error


def _settle(future: asyncio.Future[Any] | Future[Any], result: object, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
