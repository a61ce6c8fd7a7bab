"""The helpers for other people's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lab_state import Config, FileStorage, Manager, MemoryStorage, Storage, StorageError, UnavailableError
from lab_state.testing import FaultyStorage, ManualClock
from lab_state.testing._conformance_tools import cancelled_at


def test_a_manual_clock_calls_what_falls_due_in_order() -> None:
    """Both clocks move together; a cancelled timer is not called; what is due later waits."""
    clock, seen = ManualClock(time=100.0), list[tuple[str, float, float]]()
    for name, delay in (("second", 2.0), ("first", 1.0), ("cancelled", 1.5), ("late", 9.0)):
        timer = clock.call_later(delay, lambda name=name: seen.append((name, clock.monotonic(), clock.time())))  # type: ignore[misc]
        if name == "cancelled":
            timer.cancel()
    clock.advance(3.0)
    assert seen == [("first", 1.0, 101.0), ("second", 2.0, 102.0)]
    assert (clock.monotonic(), clock.time()) == (3.0, 103.0)


def test_a_manual_clock_jumps_but_does_not_go_back() -> None:
    """The wall clock may be set; the monotonic one only advances."""
    clock = ManualClock(time=100.0)
    clock.jump(-50)
    assert (clock.monotonic(), clock.time()) == (0.0, 50.0)
    with pytest.raises(ValueError, match=r"use jump\(\)"):
        clock.advance(-1)
    seen = []
    clock.call_later(1, lambda: clock.advance(10))
    clock.call_later(2, lambda: clock.call_later(-5, lambda: seen.append(clock.monotonic())))
    clock.advance(3)
    assert (clock.monotonic(), seen) == (11.0, [2.0])


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), float("-inf")])
def test_a_manual_clock_needs_finite_times(seconds: float) -> None:
    """NaN and infinity are refused, and the clock stays as it was. With NaN, nothing would ever be due."""
    clock = ManualClock(time=100.0)
    for call in (clock.advance, clock.jump, ManualClock):
        with pytest.raises(ValueError, match="must be a finite number of seconds, not"):
            call(seconds)
    assert (clock.monotonic(), clock.time()) == (0.0, 100.0)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda storage: storage.fail("comit"), "no operation 'comit'"),
        (lambda storage: storage.fail("commit", "befor"), "cannot fail 'befor'"),
        (lambda storage: storage.fail("checkpoint", "torn"), "a commit can be 'torn'"),
        (lambda storage: storage.fail("commit", times=0), "times must be 1 or more"),
        (lambda storage: storage.fail("commit", skip=-1), "0 or more"),
        (lambda storage: storage.hang("comit"), "no operation 'comit'"),
        (lambda storage: storage.cut_power("comit"), "no operation 'comit'"),
        (lambda storage: storage.cut_power("open", "torn"), "a commit can be 'torn'"),
        (lambda storage: storage.cut_power(skip=1), "need an operation"),
        (lambda storage: storage.random(storage, seed=1, rate=0), "above 0 and below 1"),
        (lambda storage: storage.random(storage, seed=1, rate=1), "above 0 and below 1"),
    ],
    ids=range(11),
)
def test_a_fault_that_would_never_come_is_refused(ask: Callable[[Any], object], message: str) -> None:
    """A test with a misspelt fault would prove nothing; the message says what is right."""
    with pytest.raises(ValueError, match=message):
        ask(FaultyStorage(MemoryStorage()))


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_an_open_that_fails_leaves_nothing_open(moment: str) -> None:
    """Also when the inner storage did open."""
    storage = FaultyStorage(MemoryStorage())
    storage.fail("open", moment)  # type: ignore[arg-type]
    manager = Manager("test", storage)
    with pytest.raises(UnavailableError, match="open failed on demand"):
        await manager.start()
    async with manager:
        pass


async def test_a_close_that_fails_has_let_go() -> None:
    """Whatever moment was asked for, as every storage must."""
    storage = FaultyStorage(MemoryStorage())
    storage.fail("aclose", "before")
    for _ in range(2):
        async with Manager("test", storage):
            pass


def test_what_is_no_argument_is_refused_at_once() -> None:
    """A storage, a config or a directory of the wrong kind is a clear error where it is given."""
    with pytest.raises(TypeError, match="config must be a Config or a str"):
        Manager(5, MemoryStorage())  # type: ignore[arg-type]
    for storage, kind in (
        ("s3://me:hunter2@host", "str"),
        (MemoryStorage, "the class MemoryStorage"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=rf"storage must be an object .*, not {kind}$") as caught:
            Manager(Config(name="x"), storage)  # type: ignore[arg-type]
        assert "hunter2" not in str(caught.value)
    with pytest.raises(TypeError, match="storage must be an object"):
        Manager(Config(name="x"), Path("state"))  # type: ignore[arg-type]
    for directory, problem in (("a\0b", "NUL"), ("", "is empty; for the current directory"), ("~/a", "expanduser")):
        with pytest.raises(ValueError, match=problem):
            FileStorage(directory)
    assert repr(FileStorage("state")) == "FileStorage('state')"


def test_a_storage_hangs_on_each_event_loop() -> None:
    """After a `resume`, a call can hang on another event loop, as in the next test."""
    storage = FaultyStorage(MemoryStorage())

    async def play() -> None:
        storage.hang("open")
        opening = asyncio.create_task(storage.open("test"))
        await asyncio.sleep(0)
        assert not opening.done()
        storage.resume()
        await (await opening).aclose()

    asyncio.run(play())
    asyncio.run(play())


async def test_a_call_that_handles_an_error_is_cancelled_at_each_await() -> None:
    """If a future of the call fails, the error is raised in the call. So the conformance suite can run each storage."""

    def create() -> None:
        raise FileExistsError

    async def call() -> str:
        with suppress(FileExistsError):
            await asyncio.get_running_loop().run_in_executor(None, create)
        await asyncio.sleep(0)
        return "done"

    async def run(number: int) -> str | None:
        return await cancelled_at(number, call())

    assert [await run(number) for number in range(5)] == [None, None, None, None, "done"]


def manager(storage: Storage) -> Manager:
    return Manager(Config(name="test", flush_interval=None), storage)


async def test_faults_come_in_the_order_in_which_they_were_asked_for() -> None:
    """Two calls succeed, one fails, the answer of one is lost, and then there are no more faults."""
    storage = FaultyStorage(MemoryStorage())
    storage.fail("commit", skip=2)
    storage.fail("commit", "after", error=UnavailableError("lost"))
    outcomes = []
    async with manager(storage) as state:
        for number in range(5):
            await state.set("n", number)
            try:
                await state.flush()
            except UnavailableError as error:
                outcomes.append(str(error).split(" (")[0])
            else:
                outcomes.append("durable")
    assert outcomes == ["durable", "durable", "commit failed on demand", "lost", "durable"]
    assert storage.faults == 2
    assert storage.calls == ["open", *["commit"] * 5, "checkpoint", "aclose"]


@pytest.mark.parametrize(("moment", "found"), [("before", 1), ("torn", 1), ("after", 2)])
async def test_the_power_is_cut_during_a_commit(moment: Any, found: int, caplog: pytest.LogCaptureFixture) -> None:
    """What was acknowledged is there; what was not is there only if all of it was written; a torn record is told."""
    storage = FaultyStorage(MemoryStorage())
    storage.cut_power("commit", moment, skip=1)
    state = manager(storage)
    await state.start()
    await state.set("n", 1)
    await state.flush()
    await state.set("n", 2)
    with pytest.raises(StorageError, match="the power was cut on demand"):
        await state.flush()
    with pytest.raises(StorageError, match="the power was cut"):
        await state.flush()
    with pytest.raises(StorageError, match="the power was cut"):
        await state.stop()
    async with manager(storage) as state:
        assert await state.get("n") == found
        assert state.durable_revision == (0 if moment == "torn" else found)
        await state.flush()
        assert state.durable_revision == found
    assert ("are not a whole record" in caplog.text) == (moment == "torn")


async def test_the_power_is_cut_at_once() -> None:
    """Whatever is open is dead, also what hangs; the next manager need not wait until the old one was stopped."""
    storage = FaultyStorage(MemoryStorage())
    old = manager(storage)
    await old.start()
    await old.set("n", 1)
    await old.flush()
    await old.set("n", 2)
    storage.hang("commit")
    flushing = asyncio.create_task(old.flush())
    await asyncio.sleep(0)
    storage.cut_power()
    async with manager(storage) as new:
        assert await new.get("n") == 1
        storage.resume()
        with pytest.raises(StorageError, match="the power was cut"):
            await flushing
        with pytest.raises(StorageError, match="the power was cut"):
            await old.stop()
        await new.set("n", 3)
        await new.flush()
    async with manager(storage) as state:
        assert await state.get("n") == 3


async def test_a_torn_record_that_is_written_again_is_not_torn() -> None:
    """As on a disk: the next commit holds its changes, and takes its place."""
    storage = FaultyStorage(MemoryStorage())
    storage.fail("commit", "torn")
    async with manager(storage) as state:
        await state.set("n", 1)
        with pytest.raises(UnavailableError):
            await state.flush()
        await state.flush()
    async with manager(storage) as state:
        assert await state.get("n") == 1
        assert state.durable_revision == 1


async def test_faults_at_random_are_the_same_for_the_same_seed() -> None:
    """Commits and checkpoints fail, before, torn and after; nothing that was acknowledged is lost."""

    async def play(seed: int) -> list[str]:
        storage, outcomes = FaultyStorage.random(MemoryStorage(), seed=seed, rate=0.4), []
        acknowledged = 0
        for _ in range(10):
            state = manager(storage)
            await state.start()
            assert await state.get("n", 0) >= acknowledged
            for _ in range(5):
                number = await state.incr("n", type=int)
                try:
                    await state.flush()
                    acknowledged = number
                    outcomes.append("durable")
                except UnavailableError as error:
                    outcomes.append(str(error))
            storage.cut_power()
            with suppress(StorageError):
                await state.stop()
        assert 0 < storage.faults == len(outcomes) - outcomes.count("durable")
        return outcomes

    assert await play(1) == await play(1) != await play(2)
