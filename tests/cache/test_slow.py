"""A cache that is slower than the writer delays no checkpoint, and has the state in the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from faulty_cache import FaultyCache, lines, manager
from mirrored import mirror_of

from lab_state import Config, FileStorage, Manager, MemoryStorage
from lab_state.testing import FaultyStorage, ManualClock

LARGE = "x" * 100_000
"""More than a journal in memory may hold before a checkpoint is due."""


def holding(faulty: FaultyCache, call: str = "fill") -> None:
    """Make calls of one kind hang."""
    faulty.held = call
    faulty.going.clear()


async def test_a_fill_is_cut_off_for_a_checkpoint(
    faulty: FaultyCache, clock: ManualClock, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that is due cuts a fill off, and the fill begins again after it."""
    storage = FaultyStorage(MemoryStorage())
    holding(faulty)
    async with manager(faulty, clock, storage) as state:
        await until(lambda: faulty.calls[-1:] == ["fill"])
        await state.set("a", 1)
        await asyncio.sleep(0)
        assert mirror_of(state).error is None  # nothing is due yet
        await state.set("large", LARGE)
        await until(lambda: "checkpoint" in storage.calls)
        await until(lambda: state.status().journal_bytes < len(LARGE))
        assert "cut off for a checkpoint" in str(mirror_of(state).error)
        clock.advance(1)
        await until(lambda: faulty.calls[-1:] == ["fill"])
        faulty.going.set()
        await until(lambda: faulty.entries == {"a": 1, "large": LARGE})
        await until(lambda: mirror_of(state).up)
    assert sum("the mirror is not up to date" in line for line in lines(caplog)) == 1


async def test_a_fill_that_waits_for_a_commit_is_not_cut_off(
    faulty: FaultyCache, clock: ManualClock, until: Any
) -> None:
    """A fill that only waits for durability delays no checkpoint, and is not cut off."""
    storage = FaultyStorage(MemoryStorage())
    async with manager(faulty, clock, storage, interval=None) as state:
        await until(lambda: faulty.revision == 0)
        await state.set("large", LARGE)
        del faulty.inner.mirrors["name"].values["$lab_state"]
        clock.advance(2)
        await until(lambda: faulty.calls.count("fill") == 2)
        await asyncio.sleep(0.01)
        await state.flush()
        await until(lambda: "checkpoint" in storage.calls)
        await until(lambda: faulty.entries == {"large": LARGE})
        assert mirror_of(state).error is None
        assert faulty.calls.count("fill") == 2


async def test_a_fill_goes_on_while_checkpoints_fail(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A fill is not cut off for a checkpoint that cannot be written. The checkpoint is written after the fill."""
    storage = FaultyStorage(MemoryStorage())
    async with manager(faulty, clock, storage) as state:
        await until(lambda: mirror_of(state).up)
        storage.fail("checkpoint", times=2)
        await state.set("large", LARGE)
        await until(lambda: storage.calls.count("checkpoint") == 1)
        await until(lambda: state.status().flush_failures == 1)
        await until(lambda: faulty.revision == 1)
        holding(faulty)
        del faulty.inner.mirrors["name"].values["$lab_state"]
        clock.advance(2)
        await until(lambda: faulty.calls[-1:] == ["fill"])
        await until(lambda: state.status().flush_failures == 2)
        await state.set("a", 1)
        clock.advance(5)
        await state.set("b", 1)
        assert mirror_of(state).error is None
        assert storage.calls.count("checkpoint") == 2
        faulty.going.set()
        await until(lambda: faulty.revision == 3)
        await until(lambda: storage.calls.count("checkpoint") == 3)
        await until(lambda: state.status().journal_bytes < len(LARGE))


async def test_a_timeout_of_the_cache_is_its_own(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A `TimeoutError` of the cache is not taken for a fill that was cut off."""
    faulty.fail("fill", TimeoutError())
    async with manager(faulty, clock) as state:
        await until(lambda: mirror_of(state).error is not None)
        assert mirror_of(state).error == "the cache failed with TimeoutError, which a cache must not raise"
        clock.advance(1)
        await until(lambda: mirror_of(state).up)


async def test_the_journal_of_a_state_with_a_slow_cache(faulty: FaultyCache, tmp_path: Path, until: Any) -> None:
    """With files and a cache that accepts nothing, each checkpoint that is due is written."""
    holding(faulty)
    checkpoints = 0
    async with Manager(Config(name="name", flush_interval=None), FileStorage(tmp_path), faulty) as state:
        for number in range(50):
            await state.set_many({f"key {key}": f"{number}" * 1000 for key in range(200)})
            await state.flush()
            if (grown := state.status().journal_bytes) > 4 * 1024 * 1024:
                await until(lambda grown=grown: state.status().journal_bytes < grown)
                checkpoints += 1
        assert checkpoints >= 2
        faulty.going.set()
        await until(lambda: faulty.revision == state.revision)
