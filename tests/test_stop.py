"""`stop()`: it goes on while there is progress, ends when there is none, and says once why it failed."""

from __future__ import annotations

import asyncio
import logging

import pytest
from running import flusher_of, idle, until

from lab_state import Config, Manager, MemoryStorage, UnavailableError
from lab_state._standstill import Standstill
from lab_state.storage import Reading, SnapshotSource, StorageSession
from lab_state.testing import FaultyStorage, ManualClock


class Slow:
    """A storage whose calls wait, and whose progress the test makes; `session` is the last one opened."""

    def __init__(self, inner: MemoryStorage) -> None:
        self.inner = inner
        self.waits = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.error: Exception | None = None

    async def open(self, name: str) -> StorageSession:
        self.session = SlowSession(self, await self.inner.open(name))
        return self.session

    async def read(self, name: str) -> Reading:
        return await self.inner.read(name)


class SlowSession:
    def __init__(self, storage: Slow, inner: StorageSession) -> None:
        self._storage, self._inner = storage, inner
        self.recovery = inner.recovery
        self.path = inner.path
        self.snapshot_bytes = self.journal_bytes = self.progress = 0
        self.warning = None

    async def _wait(self) -> None:
        self._storage.waits.set()
        await self._storage.goes_on.wait()
        if self._storage.error is not None:
            raise self._storage.error

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        await self._wait()
        return await self._inner.commit(record, snapshot)

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        await self._inner.checkpoint(snapshot)

    async def aclose(self) -> None:
        await self._inner.aclose()


@pytest.fixture
def slow(memory: MemoryStorage) -> Slow:
    return Slow(memory)


async def stopping(storage: Slow, clock: ManualClock, stop_timeout: float = 3.0) -> asyncio.Task[None]:
    """Start the stop of a manager, while the storage is at work on its last flush."""
    manager = Manager(Config(name="test", flush_interval=None, stop_timeout=stop_timeout), storage, clock=clock)
    await manager.start()
    await manager.set("a", 1)
    task = asyncio.create_task(manager.stop())
    await storage.waits.wait()
    return task


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# Progress


@pytest.mark.parametrize("seconds", [3.0, 0.1, 1 / 3, 7.7])
@pytest.mark.parametrize("begin", [0.0, 0.1, 1e6 / 3])
async def test_a_standstill_is_told_in_time(clock: ManualClock, seconds: float, begin: float) -> None:
    """It is reached after its seconds, not before; growth in between begins them anew, to an eighth of them."""
    clock.advance(begin)
    number = 0
    standstill = Standstill(clock, seconds, lambda: number)
    clock.advance(seconds * 0.9)
    assert not standstill.reached.done()
    number = 1
    clock.advance(seconds * 0.999)
    assert not standstill.reached.done()
    clock.advance(seconds * 0.126)
    assert standstill.reached.done()


async def test_a_standstill_that_is_cancelled_looks_no_more(clock: ManualClock) -> None:
    """After `cancel`, the number is never asked for."""
    numbers = iter([0])
    standstill = Standstill(clock, 1.0, numbers.__next__)
    standstill.cancel()
    clock.advance(10)


async def test_a_stop_goes_on_while_bytes_are_written(slow: Slow, clock: ManualClock, memory: MemoryStorage) -> None:
    """A flush that takes many times `stop_timeout` gets to its end, as long as the storage makes progress."""
    stop = await stopping(slow, clock)
    for _ in range(50):
        slow.session.progress += 1
        clock.advance(2.0)
        await idle()
    assert not stop.done()
    slow.goes_on.set()
    await stop
    async with Manager("test", memory) as state:
        assert await state.get("a") == 1


async def test_a_stop_ends_when_the_progress_does(slow: Slow, clock: ManualClock, memory: MemoryStorage) -> None:
    """A storage that wrote for a while and then hangs ends the stop `stop_timeout` later; the state stays locked."""
    stop = await stopping(slow, clock)
    clock.advance(2.9)
    slow.session.progress += 1
    clock.advance(2.9)
    await idle()
    assert not stop.done()
    clock.advance(0.6)
    with pytest.raises(
        UnavailableError, match=r"no progress for 3\.0 s: changes of 'test' may not be durable \(keys: 1\)"
    ):
        await stop
    assert memory.places["test"].session is not None
    slow.goes_on.set()
    await until(lambda: memory.places["test"].session is None)


async def test_an_attempt_beyond_the_timeout_is_the_last_one(slow: Slow, clock: ManualClock) -> None:
    """Progress keeps one attempt going, not the retries: what fails after `stop_timeout` ends the stop with its reason."""
    stop = await stopping(slow, clock)
    for _ in range(5):
        slow.session.progress += 1
        clock.advance(1.0)
        await idle()
    slow.error = UnavailableError("no space left on device")
    slow.goes_on.set()
    with pytest.raises(UnavailableError, match=r"^no space left on device \(stop\(\) gave up: changes are not durable"):
        await stop


async def test_a_session_whose_progress_cannot_be_read_is_one_that_makes_none(slow: Slow, clock: ManualClock) -> None:
    """A storage that breaks its promise does not make stop() endless."""
    stop = await stopping(slow, clock)
    del slow.session.progress
    clock.advance(3.0 * 9 / 8)
    with pytest.raises(UnavailableError, match="no progress"):
        await stop
    slow.goes_on.set()


async def test_a_storage_without_progress_is_refused_at_the_start(memory: MemoryStorage) -> None:
    """A storage written before `progress` was required is noticed at `start()`, which lets go of the state."""

    class Old(Slow):
        async def open(self, name: str) -> StorageSession:
            session = await super().open(name)
            del self.session.progress
            return session

    with pytest.raises(AttributeError, match="progress"):
        await Manager("test", Old(memory)).start()
    assert memory.places["test"].session is None


async def test_encoding_is_progress(
    memory: MemoryStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A large state that is encoded slowly, before the storage has a byte of it, does not end the stop."""

    class Reading(SlowSession):
        async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
            async for _ in snapshot():  # as a storage that must write everything anew
                clock.advance(2.0)
            return await self._inner.commit(record, snapshot)

        async def checkpoint(self, snapshot: SnapshotSource) -> None:
            async def slices() -> object:
                async for part in snapshot():
                    clock.advance(2.0)
                    yield part

            await self._inner.checkpoint(slices)  # type: ignore[arg-type]

    class Storage(Slow):
        async def open(self, name: str) -> StorageSession:
            return Reading(self, await self.inner.open(name))

    config = Config(name="test", flush_interval=None, stop_timeout=3.0)
    async with Manager(config, Storage(memory), clock=clock) as state:
        await state.set_many({f"key {number}": "x" * 1000 for number in range(2000)})
    assert clock.monotonic() > 40
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_encoding_a_record_is_progress(slow: Slow, clock: ManualClock) -> None:
    """The slices of a record count as well as those of a snapshot."""
    slow.goes_on.set()
    async with Manager(Config(name="test", flush_interval=None), slow, clock=clock) as state:
        flusher = flusher_of(state)
        before = flusher._progress.number()
        await state.set_many({f"key {number}": "x" * 1000 for number in range(2000)})
        await state.flush()
        assert flusher._progress.number() > before + 1
        assert slow.session.progress == 0


# What it says


async def test_a_hang_after_a_failure_names_the_failure(storage: FaultyStorage, clock: ManualClock) -> None:
    """When the last attempt hangs, the error still says what the flush before it failed with."""
    manager = Manager(Config(name="test", flush_interval=None, stop_timeout=3.0), storage, clock=clock)
    await manager.start()
    await manager.set("a", 1)
    full = UnavailableError("no space left on device")
    storage.fail("commit", times=2, error=full)
    storage.hang("commit")
    stop = asyncio.create_task(manager.stop())
    for pause in (0.1, 0.2):
        await idle()
        clock.advance(pause)
    await idle()
    clock.advance(3.0 * 9 / 8)
    with pytest.raises(UnavailableError, match=r"no progress for 3\.0 s.*: no space left on device$") as caught:
        await stop
    assert caught.value.__cause__ is full
    storage.resume()
    await idle()


async def test_a_failure_that_was_made_good_is_not_named(storage: FaultyStorage, clock: ManualClock) -> None:
    """What an earlier flush failed with has nothing to do with this end, once another one has succeeded."""
    manager = Manager(Config(name="test", flush_interval=None, stop_timeout=3.0), storage, clock=clock)
    await manager.start()
    storage.fail("commit", error=UnavailableError("no space left on device"))
    await manager.set("a", 1)
    with pytest.raises(UnavailableError):
        await manager.flush()
    await manager.flush()
    await manager.set("b", 1)
    storage.hang("commit")
    stop = asyncio.create_task(manager.stop())
    await until(lambda: storage.calls.count("commit") == 3)
    clock.advance(3.0 * 9 / 8)
    with pytest.raises(UnavailableError) as caught:
        await stop
    assert "space" not in str(caught.value)
    assert caught.value.__cause__ is None
    storage.resume()
    await idle()


async def test_a_stop_that_gave_up_is_told_once(
    slow: Slow, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of the event loop behind a stop() that has raised adds no second message, with other numbers."""
    stop = await stopping(slow, clock)
    clock.advance(3.0 * 9 / 8)
    with pytest.raises(UnavailableError, match="no progress"):
        await stop
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await idle()
    assert errors(caplog) == []
    slow.goes_on.set()


async def test_the_end_of_the_loop_is_told_once(
    slow: Slow, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """When the event loop ends within a stop(), the log and the exception have the same words, without inside talk."""
    stop = await stopping(slow, clock)
    (flusher,) = (task for task in asyncio.all_tasks() if task.get_name() == "lab_state test flusher")
    flusher.cancel()
    with pytest.raises(UnavailableError) as caught:
        await stop
    told = "was cancelled at the end of the event loop: changes may not be durable (keys: 1)"
    assert str(caught.value) == f"the last flush of 'test' {told}"
    assert errors(caplog) == [f"test: stop() failed: {caught.value}"]
    slow.goes_on.set()
