"""How things are measured: in turns, medians, and what came out of it."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lab_state import Manager
from lab_state._flusher import Flusher

VALUE = {"id": 12345, "name": "some user's name", "tags": ["a", "b", "c"], "active": True, "score": 12.5, "note": "ok."}
# SQLite does not write what is there already, so no key gets the value again that it has: 4093 is prime.
VALUES = cycle([VALUE | {"id": 10000 + number} for number in range(4093)])
KEYS = [f"key-{number}" for number in range(512)]
ROUNDS = 15


class Scale(NamedTuple):
    """How much is measured: keys, rounds, seconds that one measurement takes, and the sizes of states."""

    keys: int
    rounds: int
    seconds: float
    sizes: tuple[int, ...]


FULL = Scale(1_000_000, 5, 0.2, (1000, 10_000, 100_000, 1_000_000))
QUICK = Scale(100_000, 3, 0.05, (1000, 10_000, 100_000))

Bench = Callable[[], Awaitable[None]]
Numbers = dict[str, Any]
Call = Callable[[str], Awaitable[object]]

encode = msgspec.json.Encoder().encode


def flusher_of(manager: Manager) -> Flusher:
    """Return the flusher of a manager that runs."""
    flusher = manager._flusher
    assert flusher is not None
    return flusher


def key_of(number: int) -> str:
    return f"key-{number:07}"


async def timed(work: Callable[[], Awaitable[object]], *, collecting: bool = False) -> float:
    """Return the seconds of one call; with the cyclic garbage collector, if its part of the work belongs to the figure."""
    gc.collect()
    if not collecting:
        gc.disable()
    begin = time.perf_counter()
    await work()
    seconds = time.perf_counter() - begin
    gc.enable()
    return seconds


async def compare(ours: Bench, theirs: Bench, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Return the median ratio, and the medians of both sides, in seconds."""
    pairs = [(await timed(ours), await timed(theirs)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


async def each(call: Call, keys: list[str], seconds: float) -> float:
    """Return the cost of one call in seconds, found in about so many seconds."""
    count, chunk, number = 0, 1, len(keys)
    begin = time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        for offset in range(count, count + chunk):
            await call(keys[offset % number])
        count += chunk
        if passed < seconds / 10:
            chunk *= 2  # looking at the clock costs as much as a call
    return passed / count


async def one_by_one(call: Call, keys: list[str], seconds: float) -> list[float]:
    """Return the times of calls for about so many seconds, or of up to 100; the loop runs between two calls."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 100 and (begin := time.perf_counter()) < end:
        await call(keys[len(taken)])
        taken.append(time.perf_counter() - begin)
        await asyncio.sleep(0)  # what never waits would hold it up for all of them, not for one
    return taken


async def together(call: Call, tasks: int, seconds: float) -> tuple[float, list[float]]:
    """Run so many tasks, each calling again and again; return calls a second, and how long each took.

    A call that does not wait gives other tasks no turn. Then the caller does, so that all tasks are callers.
    """
    taken: list[float] = []
    turns = 0
    begin = time.perf_counter()
    end = begin + seconds

    async def caller(key: str) -> None:
        nonlocal turns
        now = time.perf_counter()
        while now < end:
            turns = mine = turns + 1
            await call(key)
            if turns == mine:
                await asyncio.sleep(0)
            taken.append(-now + (now := time.perf_counter()))

    await asyncio.gather(*(caller(f"task-{number}") for number in range(tasks)))
    return len(taken) / (time.perf_counter() - begin), taken


@asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """Yield the gaps of a 0.5 ms heartbeat while the block runs, in seconds."""
    gaps, stop = [0.0], False

    async def beating() -> None:
        last = time.perf_counter()
        while not stop:
            await asyncio.sleep(0.0005)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    beat = asyncio.create_task(beating())
    await asyncio.sleep(0.01)
    yield gaps
    await asyncio.sleep(0.002)
    stop = True
    await beat


async def longest_gap(work: Awaitable[Any]) -> float:
    """Return the longest gap of the heartbeat while `work` runs."""
    async with heartbeat() as gaps:
        await work
    return max(gaps)


async def stall(work: Awaitable[Any]) -> float:
    """Return how long the loop stands still for `work`: the longest gap, less that of an idle loop, the best of three."""
    begin = time.perf_counter()
    longest = await longest_gap(work)
    idle = min(1.0, time.perf_counter() - begin)  # the longest gap grows with the time
    return longest - min([await longest_gap(asyncio.sleep(idle)) for _ in range(3)])


async def stopped(manager: Manager) -> None:
    """Stop it, and wait until its entries are freed, which happens in steps and is no part of what comes next."""
    entries = manager._core.state.entries
    await manager.stop()
    while isinstance(entries, dict) and entries:  # noqa: ASYNC110 -- what is waited for sets no event
        await asyncio.sleep(0)


def percentile(values: list[float], percent: float) -> float:
    """Return the smallest value that is not below so many percent of them."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def resident(pid: int | str = "self") -> int:
    """Return the memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def written(pid: int | str = "self") -> int:
    """Return the bytes that a process has made the kernel write to disks: whole pages of files."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def process(code: str, *arguments: str) -> float:
    """Return how long a Python process takes to run this code."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    return time.perf_counter() - begin


class Results:
    """Rows against their bounds, and numbers by part."""

    def __init__(self) -> None:
        self.checks: dict[str, list[Numbers]] = {}
        self.numbers: dict[str, Any] = {}
        self.machines: dict[str, Numbers] = {}
        self.part = ""

    def add(self, work: str, reached: str, bound: str, *, met: bool) -> None:
        row = {"work": work, "reached": reached, "bound": bound, "met": met}
        self.checks.setdefault(self.part, []).append(row)
        print(f"{work:<64} {reached:<34} {bound:<12} {'yes' if met else 'NO'}", flush=True)

    def put(self, **numbers: Any) -> None:
        self.numbers[self.part] = {**self.numbers.get(self.part, {}), **numbers}

    def as_json(self) -> Numbers:
        return {"machines": self.machines, "checks": self.checks, "numbers": self.numbers}

    def take(self, older: Mapping[str, Any]) -> None:
        """Take over the parts that were measured before, and not again now."""
        self.machines = {**older["machines"], **self.machines}
        self.checks = {**older["checks"], **self.checks}
        self.numbers = {**older["numbers"], **self.numbers}
