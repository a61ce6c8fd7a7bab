"""`Config.lock_timeout`: `start()` waits for a state that another writer holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from running import idle, until

from lab_state import Config, CorruptionError, FileStorage, LockedError, Manager, MemoryStorage, Storage
from lab_state.testing import FaultyStorage, ManualClock

Held = tuple[FaultyStorage, Manager]


def make(storage: Storage, clock: ManualClock, lock_timeout: float | None) -> Manager:
    return Manager(Config(name="test", lock_timeout=lock_timeout), storage, clock=clock)


@pytest.fixture
async def holder() -> AsyncIterator[Held]:
    """Yield a storage that counts its calls, and the manager that holds the state."""
    storage = FaultyStorage(MemoryStorage())
    async with Manager("test", storage) as manager:
        yield storage, manager


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


async def test_without_a_lock_timeout_a_start_is_refused_at_once(
    holder: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """With the default of 0, `start()` asks once, raises, and logs nothing."""
    storage, _ = holder
    with pytest.raises(LockedError):
        await make(storage, ManualClock(), 0).start()
    assert storage.calls.count("open") == 2
    assert warnings(caplog) == []


async def test_a_start_waits_until_the_state_is_let_go(holder: Held, caplog: pytest.LogCaptureFixture) -> None:
    """A start within its `lock_timeout` begins soon after the other writer has ended; one WARNING names the holder."""
    storage, manager = holder
    clock = ManualClock()
    second = make(storage, clock, 10)
    starting = asyncio.create_task(second.start())
    await idle()
    assert second.status().phase == "starting"
    await manager.stop()
    clock.advance(0.5)
    await starting
    assert second.status().phase == "running"
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("test: start() waits for at most 10 s more: 'test' is open in this ")
    await second.stop()


async def test_a_start_gives_up_after_its_lock_timeout(holder: Held) -> None:
    """After `lock_timeout` seconds the error of the last attempt is raised; another start may follow."""
    storage, manager = holder
    clock = ManualClock()
    second = make(storage, clock, 3)
    starting = asyncio.create_task(second.start())
    for _ in range(11):
        await idle()
        clock.advance(0.25)
    await idle()
    assert not starting.done()
    clock.advance(0.25)
    with pytest.raises(LockedError):
        await starting
    assert second.status().phase == "new"
    await manager.stop()
    await second.start()
    await second.stop()


async def test_a_start_without_a_bound_is_told_of_every_ten_seconds(
    holder: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """With `None`, a start goes on for ever, asks at least twice a second, and warns at once and each 10 s."""
    storage, _ = holder
    clock = ManualClock()
    starting = asyncio.create_task(make(storage, clock, None).start())
    for _ in range(140):
        await idle()
        clock.advance(0.25)
    await idle()
    assert not starting.done()
    assert storage.calls.count("open") > 70
    assert len(warnings(caplog)) == 4
    assert all("start() waits until the lock is free: 'test' is open" in line for line in warnings(caplog))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_a_start_that_waits_can_be_cancelled(holder: Held) -> None:
    """A cancelled start asks no more, and the manager may be started again."""
    storage, manager = holder
    clock = ManualClock()
    second = make(storage, clock, None)
    starting = asyncio.create_task(second.start())
    await idle()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    asked = storage.calls.count("open")
    clock.advance(100)
    await idle()
    assert storage.calls.count("open") == asked
    assert second.status().phase == "new"
    await manager.stop()
    await second.start()
    await second.stop()


async def test_another_error_ends_the_wait(holder: Held) -> None:
    """Only `LockedError` is waited for: what is damaged is told at once."""
    storage, _ = holder
    clock = ManualClock()
    storage.fail("open", skip=1, error=CorruptionError("test", 0, "damaged"))
    starting = asyncio.create_task(make(storage, clock, None).start())
    await idle()
    clock.advance(1)
    with pytest.raises(CorruptionError):
        await starting


async def test_a_file_is_waited_for(tmp_path: Path) -> None:
    """A start waits for the lock of a file, and then finds what its holder wrote last."""
    clock = ManualClock()
    async with Manager("test", FileStorage(tmp_path)) as first:
        second = make(FileStorage(tmp_path), clock, None)
        starting = asyncio.create_task(second.start())
        await until(lambda: clock._timers)
        await first.set("a", 1)
    while not starting.done():
        clock.advance(0.5)
        await idle()
    assert await second.get("a") == 1
    await second.stop()
