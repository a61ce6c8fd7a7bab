"""A thread of one's own."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from lab_state.storage._worker import Worker


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("tested")
    yield worker
    worker.shutdown(wait=True)


async def test_a_result_and_an_error_come_back(worker: Worker) -> None:
    """What the function returns or raises is what the caller gets; it was called in the thread."""
    assert await worker.run(threading.current_thread) in threads("tested")
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 / 0)
    assert await worker.run(int, "7") == 7


async def test_calls_follow_each_other_in_order(worker: Worker) -> None:
    """However they were handed in."""
    seen: list[int] = []
    first, second = worker.run(seen.append, 1), worker.submit(seen.append, 2)
    await worker.run(seen.append, 3)
    await first
    assert second.done()
    assert seen == [1, 2, 3]


async def test_an_answer_that_came_before_it_is_awaited_is_there(worker: Worker) -> None:
    """Nobody waits for what has come."""
    answer = worker.run(int, "7")
    await worker.run(int, "8")
    assert answer.done()
    assert await answer == 7


async def test_a_submitted_call_that_fails_says_so(worker: Worker) -> None:
    """Its future has the exception, and the thread goes on."""
    failed = worker.submit(lambda: 1 / 0)
    assert isinstance(failed.exception(1), ZeroDivisionError)
    assert worker.submit(int, "7").result(1) == 7


@pytest.mark.parametrize("how", ["run", "submit"])
async def test_cancelled_before_its_turn_it_is_not_called(worker: Worker, how: str) -> None:
    """Nobody wants it any more."""
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
    """The caller goes on at once; the result is dropped."""
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
    """The thread goes on."""
    gate = threading.Event()

    async def leave() -> None:
        worker.run(gate.wait)

    asyncio.run(leave())
    gate.set()
    assert worker.submit(int, "7").result(1) == 7


def test_the_thread_ends_when_told_behind_what_it_was_given() -> None:
    """What was handed in before is done; afterwards nothing is taken."""
    worker = Worker("told")
    (thread,) = threads("told")
    gate = threading.Event()
    worker.submit(gate.wait)
    last = worker.submit(int, "7")
    worker.shutdown(wait=False)
    worker.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="told to end"):
        worker.submit(int)
    gate.set()
    assert last.result(1) == 7
    thread.join(10)
    assert not thread.is_alive()


def test_the_thread_ends_when_nobody_has_the_worker() -> None:
    """A session that was dropped leaves no thread behind."""
    worker = Worker("dropped")
    (thread,) = threads("dropped")
    gone = weakref.ref(worker)
    del worker
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_the_interpreter_ends_although_a_call_hangs() -> None:
    """A disk that does not answer does not keep a process from ending."""
    code = (
        "import threading\n"
        "from lab_state.storage._worker import Worker\n"
        "begun = threading.Event()\n"
        "worker = Worker('hangs')\n"
        "worker.submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
