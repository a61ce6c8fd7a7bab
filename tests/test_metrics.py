"""`Manager.metrics()`: plain counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lab_state import Config, InvalidValueError, KeyNotFoundError, Manager, MemoryStorage, TypeMismatchError
from lab_state._metrics import FlushTimes
from lab_state.testing import FaultyStorage, ManualClock


def counted(state: Manager) -> dict[str, tuple[int, int]]:
    operations = state.metrics().operations
    names = {name for name, _ in operations}
    return {name: (operations.get((name, "success"), 0), operations.get((name, "error"), 0)) for name in names}


async def test_values_are_counted_by_operation() -> None:
    """Values stored and keys deleted are counted, one by one and with others."""
    async with Manager("name", MemoryStorage()) as state:
        await state.set("a", 1)
        await state.set_many({"b": 2, "c": 3})
        await state.incr("a")
        await state.set("d", 4, ttl=5)
        await state.delete_many(["a", "nobody"])
        await state.delete_all()
        assert counted(state) == {
            "get": (0, 0),
            "set": (5, 0),
            "delete": (4, 0),
            "expire": (0, 0),
            "flush": (0, 0),
        }


async def test_errors_are_counted() -> None:
    """What was missing, of another type or refused counts as an error, and nothing else."""
    async with Manager("name", MemoryStorage()) as state:
        await state.set("a", 1)
        with pytest.raises(KeyNotFoundError):
            await state.get("nobody")
        with pytest.raises(TypeMismatchError):
            await state.get("a", type=str)
        assert await state.get("nobody", None) is None
        bad: list[Any] = [{"a": math.nan}, object(), math.inf]
        for value in bad:
            with pytest.raises(InvalidValueError):
                await state.set("a", value)
            with pytest.raises(InvalidValueError):
                await state.set_many({"a": value})
            with pytest.raises(InvalidValueError):
                await state.set("a", value, ttl=1)
        assert counted(state)["get"] == (0, 2)
        assert counted(state)["set"] == (1, 9)


async def test_a_transaction_counts_when_it_is_made() -> None:
    """What a transaction comes to counts when it is left, and not at all when it is dropped."""
    async with Manager("name", MemoryStorage()) as state:
        await state.set("b", 1)
        async with state.transaction() as tx:
            tx.set("a", 1)
            tx.incr("a")
            tx.delete("b")
            assert counted(state)["set"] == (1, 0)
        assert counted(state)["set"] == (2, 0)
        assert counted(state)["delete"] == (1, 0)
        with pytest.raises(ZeroDivisionError):
            async with state.transaction() as tx:
                tx.set("a", 1 // 0)
        assert counted(state)["set"] == (2, 0)


async def test_what_expired_was_not_deleted() -> None:
    """Keys that are swept count apart, and counts go on after a restart."""
    clock = ManualClock()
    state = Manager(Config(name="name"), MemoryStorage(), clock=clock)
    for _ in range(2):
        async with state:
            await state.set_many({"a": 1, "b": 2}, ttl=1)
            await state.delete("a")
            clock.advance(3)
    assert counted(state)["set"] == (4, 0)
    assert counted(state)["delete"] == (2, 0)
    assert counted(state)["expire"] == (2, 0)


async def test_flushes_are_counted_over_restarts() -> None:
    """Commits and failed ones are counted as long as the manager is there, and how long they took."""
    storage, clock = FaultyStorage(MemoryStorage()), ManualClock()
    state = Manager(Config(name="name", flush_interval=None), storage, clock=clock)
    assert counted(state)["flush"] == (0, 0)
    for number in range(2):
        async with state:
            storage.fail("commit")
            await state.set("a", number)
            with pytest.raises(Exception, match="on demand"):
                await state.flush()
            await state.flush()
    metrics = state.metrics()
    assert counted(state)["flush"] == (2, 2)
    assert metrics.flush_seconds == 0.0
    assert metrics.flush_buckets[0] == (0.0005, 2)
    assert metrics.flush_buckets[-1] == (math.inf, 2)


def test_flush_times_are_cumulative() -> None:
    """Each bucket holds what took up to its bound, the bound included."""
    times = FlushTimes()
    for seconds in (0.0001, 0.001, 0.002, 100.0):
        times.add(seconds)
    buckets = dict(times.buckets)
    assert (buckets[0.0005], buckets[0.001], buckets[0.0025], buckets[10.0], buckets[math.inf]) == (1, 2, 3, 3, 4)
    assert times.seconds == pytest.approx(100.0031)
