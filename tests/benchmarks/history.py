"""A state with a history beside the same state without one: `set`, durable writes, and checkpoints. A backup beside a checkpoint."""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections.abc import Awaitable
from datetime import timedelta
from pathlib import Path
from typing import Any

from measure import (
    KEYS,
    VALUE,
    VALUES,
    Results,
    Scale,
    compare,
    flusher_of,
    key_of,
    percentile,
    stall,
    timed,
    together,
)
from stalls import watched

from lab_state import Config, FileStorage, Manager

_GENERATIONS = 3
"""The history keeps about as many snapshots, so that each checkpoint deletes a generation."""


async def history(results: Results, directory: str, scale: Scale) -> None:
    """Measure the same calls with a history and without."""
    size = scale.keys * len(f'"{key_of(0)}":,') + scale.keys * 110
    plain = FileStorage(f"{directory}/plain")
    keeping = FileStorage(f"{directory}/keeping", history=timedelta(days=7), history_bytes=_GENERATIONS * size)
    plain_config, keeping_config = Config("plain", flush_interval=0), Config("keeping", flush_interval=0)
    async with Manager(plain_config, plain) as without, Manager(keeping_config, keeping) as kept:
        for state in (without, kept):
            await state.set_many({key_of(number): VALUE for number in range(scale.keys)})
            await flusher_of(state).checkpoints.ended()
        gc.collect()
        gc.freeze()
        await _writes(results, kept, without, scale.rounds * 3)
        await _tails(results, kept, without, scale.rounds)
        await _checkpoints(results, kept, without, scale.rounds)
        await _backups(results, without, directory, scale.rounds)
        status = kept.status()
        assert status.history_failures == 0
        print(f"{status.history_generations} generations of {(status.history_bytes or 0) / 1e6:.0f} MB")
    await _sets(results, directory, scale.rounds * 3)


async def _sets(results: Results, directory: str, rounds: int) -> None:
    """Measure `set` into memory, without a flush."""
    plain, keeping = FileStorage(f"{directory}/plain"), FileStorage(f"{directory}/keeping", history=3600)
    config = Config("small", flush_interval=None)

    async def sets(state: Manager) -> None:
        for _ in range(100):
            for key in KEYS:
                await state.set(key, VALUE)

    async with Manager(config, plain) as without, Manager(config, keeping) as kept:
        ratio, mine, theirs = await compare(lambda: sets(kept), lambda: sets(without), rounds)
    calls = 100 * len(KEYS)
    shown = f"{ratio:.3f} ({mine / calls * 1e6:.2f} / {theirs / calls * 1e6:.2f} us)"
    results.add("set with a history / without", shown, "<= 1.05", met=ratio <= 1.05)


async def _writes(results: Results, kept: Manager, without: Manager, rounds: int) -> None:
    async def writes(state: Manager) -> None:
        for key in KEYS[:100]:
            await state.set(key, next(VALUES))

    ratio, mine, theirs = await compare(lambda: writes(kept), lambda: writes(without), rounds)
    shown = f"{ratio:.2f} ({mine * 1e4:.0f} / {theirs * 1e4:.0f} us)"
    results.add("a durable write with a history / without", shown, "<= 1.1", met=ratio <= 1.1)


async def _tails(results: Results, kept: Manager, without: Manager, rounds: int) -> None:
    """Measure a hundred tasks beside a checkpoint."""

    async def tail(state: Manager) -> float:
        checkpoint = asyncio.create_task(flusher_of(state).checkpoints.write(wait=True))
        taken: list[float] = []
        while not checkpoint.done():
            _, more = await together(lambda key: state.set(key, next(VALUES)), 100, 0.2)
            taken += more
        await checkpoint
        return percentile(taken, 99)

    pairs = [(await tail(kept), await tail(without)) for _ in range(rounds * 3)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    shown = f"{ratio:.2f} ({mine * 1e3:.1f} / {theirs * 1e3:.1f} ms)"
    results.add("p99 beside a checkpoint with a history / without", shown, "<= 1.25", met=ratio <= 1.25)


async def _checkpoints(results: Results, kept: Manager, without: Manager, rounds: int) -> None:
    """Measure checkpoints alone. Each replaces a snapshot, and a journal with records."""

    async def checkpoint(state: Manager) -> float:
        for key in KEYS[:10]:
            await state.set(key, next(VALUES))
        return await timed(lambda: flusher_of(state).checkpoints.write(wait=True))

    pairs = [(await checkpoint(kept), await checkpoint(without)) for _ in range(rounds * 3)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    shown = f"{ratio:.3f} ({mine * 1e3:.0f} / {theirs * 1e3:.0f} ms)"
    results.add("a checkpoint with a history / without", shown, "<= 1.05", met=ratio <= 1.05)


async def _backups(results: Results, state: Manager, directory: str, rounds: int) -> None:
    """Measure a backup of the running state beside a checkpoint of it, and the longest gap of the event loop during a backup."""
    target = Path(directory, "backup.json")

    async def backup() -> float:
        return await timed(lambda: state.backup(target))  # replaces the last one, as a checkpoint does

    async def checkpoint() -> float:
        await state.set(KEYS[0], next(VALUES))
        return await timed(lambda: flusher_of(state).checkpoints.write(wait=True))

    pairs = [(await backup(), await checkpoint()) for _ in range(rounds * 3)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    shown = f"{ratio:.2f} ({mine * 1e3:.0f} / {theirs * 1e3:.0f} ms)"
    results.add("a backup / a checkpoint", shown, "<= 1.5", met=ratio <= 1.5)
    # Without `timed`, which collects garbage on the loop.
    steps = [await _longest_step(state.backup(target)) for _ in range(5)]
    step = statistics.median(steps)
    results.add("the longest step of the event loop in a backup", f"{step * 1e3:.1f} ms", "<= 5 ms", met=step <= 0.005)
    gap = statistics.median([await stall(state.backup(target)) for _ in range(5)])
    results.add(
        "the longest stall of the event loop during a backup", f"{gap * 1e3:.1f} ms", "<= 5 ms", met=gap <= 0.005
    )


async def _longest_step(work: Awaitable[Any]) -> float:
    """Return the processor time of the longest step of the event loop until `work` has ended."""
    with watched() as steps:
        await work
    return steps.take()
