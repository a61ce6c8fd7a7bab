"""Durable writes: one writer against one bare hop to a thread, a hundred writers, and with a checkpoint under way."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from measure import KEYS, VALUE, VALUES, Results, compare, encode, flusher_of, key_of, percentile, together

from lab_state import Config, FileStorage, Manager


class Hop:
    """The least that a durable write can do: append and fdatasync, in a thread."""

    def __init__(self, directory: str) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.file = os.open(Path(directory) / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.data = encode(VALUE)

    def append(self) -> None:
        os.write(self.file, self.data)
        os.fdatasync(self.file)

    async def __call__(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self.thread, self.append)

    async def taken(self, times: int) -> tuple[float, float]:
        """Return its median and its 99th percentile: the part of the disk alone."""
        taken = []
        for _ in range(times):
            begin = time.perf_counter()
            await self()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken), percentile(taken, 99)

    def close(self) -> None:
        os.close(self.file)
        self.thread.shutdown()


class Tail(NamedTuple):
    """How long durable writes took, and a bare hop before them, in seconds; and p99 to hop."""

    ratio: float
    p99: float
    p50: float
    hop: float
    worst: float


async def durable(results: Results, directory: str, count: int, rounds: int) -> None:
    hop = Hop(directory)
    async with Manager(Config(name="durable", flush_interval=0), FileStorage(directory)) as state:
        await one_writer(results, state, hop, rounds * 3)
        await hundred(results, state, hop, rounds)
    async with Manager(Config(name="checkpointed", flush_interval=0), FileStorage(directory)) as state:
        await state.set_many({key_of(number): VALUE for number in range(count)})
        gc.collect()
        gc.freeze()
        await during_checkpoints(results, state, hop, rounds, count)
    hop.close()


async def one_writer(results: Results, state: Manager, hop: Hop, rounds: int) -> None:
    async def ours() -> None:
        for key in KEYS[:100]:
            await state.set(key, VALUE)

    async def bare() -> None:
        for _ in range(100):
            await hop()

    ratio, theirs, mine = await compare(bare, ours, rounds)
    results.add(
        "durable writes a second, one writer / bare hop",
        f"{ratio:.2f} ({mine * 1e4:.0f} / {theirs * 1e4:.0f} us)",
        ">= 0.8",
        met=ratio >= 0.8,
    )


async def hundred(results: Results, state: Manager, hop: Hop, rounds: int) -> None:
    """Measure a hundred tasks, each waiting for its own writes; hops come before, since a disk drifts."""
    found, rates = [], []
    for _ in range(rounds):
        bare, worst = await hop.taken(200)
        rate, taken = await together(lambda key: state.set(key, next(VALUES)), 100, 0.5)
        found.append(Tail(percentile(taken, 99) / bare, percentile(taken, 99), percentile(taken, 50), bare, worst))
        rates.append(rate)
    results.add("durable writes a second, 100 tasks", f"{statistics.median(rates):,.0f}", "", met=True)
    add_tail(results, "p99 of a durable write among 100 tasks / median of a bare hop", found)


async def during_checkpoints(results: Results, state: Manager, hop: Hop, rounds: int, count: int) -> None:
    """Measure the same while checkpoints follow each other."""
    found = []
    for _ in range(rounds):
        bare, worst = await hop.taken(200)
        checkpoint = asyncio.create_task(flusher_of(state).checkpoints.write(wait=True))
        taken: list[float] = []
        while not checkpoint.done():
            _, more = await together(lambda key: state.set(key, next(VALUES)), 100, 0.2)
            taken += more
        await checkpoint
        found.append(Tail(percentile(taken, 99) / bare, percentile(taken, 99), percentile(taken, 50), bare, worst))
    add_tail(results, f"... during a checkpoint of {count:,} keys", found)


def add_tail(results: Results, work: str, found: list[Tail]) -> None:
    """Add the median of each number."""
    one = Tail(*(statistics.median(numbers) for numbers in zip(*found, strict=True)))
    results.add(
        work,
        f"{one.ratio:.1f} ({one.p99 * 1e3:.1f} ms; median {one.p50 * 1e3:.1f}; hop {one.hop * 1e3:.2f}, its p99 "
        f"{one.worst * 1e3:.1f})",
        "<= 6",
        met=one.ratio <= 6,
    )
