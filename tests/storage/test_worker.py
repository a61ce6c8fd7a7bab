"""Threads of a storage object, and workers that share them."""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from lab_state import FileStorage, UnavailableError
from lab_state.storage import _worker
from lab_state.storage._worker import Threads, Worker

NAME = "tested threads"


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def joined() -> None:
    """Wait until no thread is left."""
    for thread in running():
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def threads() -> Iterator[Threads]:
    yield Threads(NAME)
    gc.collect()
    joined()


@pytest.fixture
def worker(threads: Threads) -> Iterator[Worker]:
    worker = Worker(threads)
    yield worker
    worker.shutdown()


def held(workers: list[Worker]) -> tuple[threading.Event, list[Future[bool]]]:
    """Keep all these workers busy until the event is set."""
    gate, begun = threading.Event(), threading.Barrier(len(workers) + 1)

    def hold() -> bool:
        begun.wait(10)
        return gate.wait(10)

    futures = [worker.submit(hold) for worker in workers]
    begun.wait(10)
    return gate, futures


async def test_a_result_and_an_error_come_back(worker: Worker) -> None:
    """What the function returns or raises is what the caller gets; it was called in a thread."""
    assert await worker.run(threading.current_thread) in running()
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 / 0)
    assert await worker.run(int, "7") == 7


async def test_calls_follow_each_other_in_order(worker: Worker) -> None:
    """The calls of a worker are made in the order in which they were handed in."""
    seen: list[int] = []
    first, second = worker.run(seen.append, 1), worker.submit(seen.append, 2)
    await worker.run(seen.append, 3)
    await first
    assert second.done()
    assert seen == [1, 2, 3]


async def test_an_answer_that_came_before_it_is_awaited_is_there(worker: Worker) -> None:
    """A result that came before it is awaited is returned at once."""
    answer = worker.run(int, "7")
    await worker.run(int, "8")
    assert answer.done()
    assert await answer == 7


async def test_a_submitted_call_that_fails_says_so(worker: Worker) -> None:
    """The future of a submitted call that fails has the exception, and the thread goes on."""
    failed = worker.submit(lambda: 1 / 0)
    assert isinstance(failed.exception(1), ZeroDivisionError)
    assert worker.submit(int, "7").result(1) == 7


@pytest.mark.parametrize("how", ["run", "submit"])
async def test_cancelled_before_its_turn_it_is_not_called(worker: Worker, how: str) -> None:
    """A call that is cancelled before it starts is not made."""
    gate, called = threading.Event(), threading.Event()
    busy = worker.submit(gate.wait)

    async def wait() -> None:
        if how == "run":
            await worker.run(called.set)
        else:
            await asyncio.wrap_future(worker.submit(called.set))

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    busy.result(1)
    await worker.run(int)
    assert not called.is_set()


async def test_cancelled_later_it_goes_on_and_nobody_is_told(worker: Worker) -> None:
    """A call that is cancelled after it started goes on. Its caller continues at once, and the result is dropped."""
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        gate.wait()
        ended.set()

    async def wait() -> None:
        await worker.run(work)

    waiting = asyncio.create_task(wait())
    await asyncio.to_thread(begun.wait)
    waiting.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not ended.is_set()
    gate.set()
    await worker.run(int)
    assert ended.is_set()


def test_an_answer_for_a_loop_that_is_closed_is_dropped(worker: Worker) -> None:
    """The result for a closed event loop is dropped, and the thread goes on."""
    gate = threading.Event()

    async def leave() -> None:
        worker.run(gate.wait)

    asyncio.run(leave())
    gate.set()
    assert worker.submit(int, "7").result(1) == 7


def test_a_worker_that_was_told_to_end(threads: Threads) -> None:
    """After `shutdown` earlier calls are made and new ones are refused. The thread ends with the last worker."""
    worker, other = Worker(threads), Worker(threads)
    gate, _ = held([worker])
    last = worker.submit(int, "7")
    worker.shutdown()
    worker.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        worker.submit(int)
    gate.set()
    assert last.result(10) == 7
    assert other.submit(int, "8").result(10) == 8
    other.shutdown()
    joined()


def test_threads_end_when_nobody_has_a_worker(threads: Threads) -> None:
    """Workers that were collected without `shutdown` leave no thread behind."""
    worker = Worker(threads)
    worker.submit(int).result(10)
    (thread,) = running()
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_threads_end_when_they_are_idle(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle threads end, except one that stays as long as there is a worker.

    So a limit of processes prevents no close.
    """
    monkeypatch.setattr(_worker, "_IDLE_SECONDS", 0.01)
    workers = [Worker(threads) for _ in range(5)]
    gate, futures = held(workers)
    assert len(running()) == 5
    gate.set()
    for future in futures:
        future.result(10)
    while len(running()) > 1:
        threading.Event().wait(0.001)
    assert workers[0].submit(int, "7").result(10) == 7
    assert len(running()) == 1
    for worker in workers:
        worker.shutdown()
    joined()


def test_many_workers_share_few_threads(threads: Threads) -> None:
    """If all threads are busy, a worker waits for its turn. Each one gets it."""
    workers = [Worker(threads) for _ in range(100)]
    gate, futures = held(workers[: _worker._MOST])
    waiting = [worker.submit(int, "7") for worker in workers for _ in range(2)]
    assert len(running()) == _worker._MOST
    assert not any(future.done() for future in waiting)
    gate.set()
    assert [future.result(10) for future in waiting] == [7] * 200
    assert all(future.result(10) for future in futures)
    for worker in workers:
        worker.shutdown()
    joined()


def test_a_call_that_hangs_holds_up_its_own_worker_alone(threads: Threads) -> None:
    """A call that hangs blocks only its own worker. The others go on, in as many threads as they need."""
    stuck, other = Worker(threads), Worker(threads)
    gate, _ = held([stuck])
    behind = stuck.submit(int, "8")
    assert [other.submit(int, "7").result(10) for _ in range(10)] == [7] * 10
    assert not behind.done()
    gate.set()
    assert behind.result(10) == 8
    stuck.shutdown()
    other.shutdown()


def test_a_worker_with_much_to_do_lets_others_in(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that share one thread take turns."""
    monkeypatch.setattr(_worker, "_MOST", 1)
    first, second = Worker(threads), Worker(threads)
    seen: list[str] = []
    gate, _ = held([first])
    futures = [worker.submit(seen.append, name) for name, worker in (("1", first), ("2", second)) for _ in range(3)]
    gate.set()
    for future in futures:
        future.result(10)
    assert "".join(seen) in {"212121", "121212"}
    first.shutdown()
    second.shutdown()


def test_a_thread_that_cannot_be_started(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, a call is an UnavailableError. If there is one already, it makes the call later."""
    first, second = Worker(threads), Worker(threads)

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(UnavailableError, match=r"no thread could be started .*raise the limit of processes"):
            first.submit(int)
    gate, _ = held([first])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        waiting = second.submit(int, "7")
        gate.set()
        assert waiting.result(10) == 7
    first.shutdown()
    second.shutdown()


def test_a_copy_has_threads_of_its_own(threads: Threads, worker: Worker) -> None:
    """A storage object can be given to another process, and copied, whatever its threads do."""
    worker.submit(int).result(10)
    copied = pickle.loads(pickle.dumps(threads))
    other = Worker(copied)
    assert other.submit(threading.current_thread).result(10) is not worker.submit(threading.current_thread).result(10)
    other.shutdown()


def test_the_interpreter_ends_although_a_call_hangs() -> None:
    """A disk that does not answer does not keep a process from ending."""
    code = (
        "import threading\n"
        "from lab_state.storage._worker import Threads, Worker\n"
        "begun = threading.Event()\n"
        "worker = Worker(Threads('hangs'))\n"
        "worker.submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_waiting_for_a_thread_counts_the_calls_of_others(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """While all threads are busy, each call that ends counts as progress of the waiting workers.

    A call that hangs does not.
    """
    monkeypatch.setattr(_worker, "_MOST", 1)
    workers = [Worker(threads) for _ in range(3)]
    first, _ = held(workers[:1])
    gates, begun = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def hold(number: int) -> None:
        begun[number].set()
        gates[number].wait(10)

    futures = [workers[1 + number].submit(hold, number) for number in range(2)]
    assert [worker.waited for worker in workers] == [0, 0, 0]
    first.set()
    assert begun[0].wait(10)
    assert [worker.waited for worker in workers] == [0, 1, 1]
    gates[0].set()
    assert begun[1].wait(10)
    gates[1].set()
    for future in futures:
        future.result(10)
    workers[0].submit(int).result(10)
    assert [worker.waited for worker in workers] == [0, 1, 2]
    for worker in workers:
        worker.shutdown()


async def test_a_state_that_waits_for_a_thread_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a session waits for a thread, calls of other states are its progress, so `stop()` goes on.

    If they hang, it ends.
    """
    monkeypatch.setattr(_worker, "_MOST", 1)
    storage = FileStorage(tmp_path)
    session = await storage.open("lab")
    other = Worker(storage._threads)
    gate, _ = held([other])
    closing = asyncio.ensure_future(session.aclose())
    await asyncio.sleep(0)
    before = session.progress
    assert session.progress == before
    gate.set()
    await closing
    assert session.progress > before
    other.shutdown()
