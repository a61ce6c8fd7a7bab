"""A hundred writers on a large state for a long time: does memory, latency or a file grow?

Run with `nox -s soak`; `-- --minutes N --keys N`. One line a minute, and in the end the
slope of each column. The writers set values, delete keys, set them anew, and let some
expire; every write waits until it is durable. Checkpoints follow from that by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path

from measure import VALUES, heartbeat, key_of, resident

from lab_state import Config, FileStorage, Manager

WRITERS = 100
COLUMNS = ("minute", "writes/s", "p50 ms", "p99 ms", "max ms", "stall ms", "RSS MB", "files MB", "journal MB", "keys")


class Latencies:
    """How many took how long, in steps of 50 microseconds; millions of times in a list would be a load of their own."""

    STEP = 50e-6
    STEPS = 10_000

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.counts = [0] * self.STEPS
        self.number = 0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        self.counts[min(int(seconds / self.STEP), self.STEPS - 1)] += 1
        self.number += 1
        self.longest = max(self.longest, seconds)

    def percentile(self, percent: float) -> float:
        """Return the percentile in seconds: the end of the step that it is in."""
        wanted = self.number * percent / 100
        sums = itertools.accumulate(self.counts)
        return next(step for step, reached in enumerate(sums, 1) if reached >= wanted) * self.STEP


class Soak:
    """The writers of one state, and how long each of their writes took since the last sample."""

    def __init__(self, state: Manager, keys: int) -> None:
        self.state = state
        self.keys = keys
        self.taken = Latencies()
        self.writes = 0
        self.stopping = False

    async def writer(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stopping:
            key = key_of(chance.randrange(self.keys))
            kind = chance.random()
            begin = time.perf_counter()
            if kind < 0.05:
                await self.state.delete(key)
            elif kind < 0.1:
                await self.state.set(f"expiring/{key}", next(VALUES), ttl=5)
            else:
                await self.state.set(key, next(VALUES))
            self.taken.add(time.perf_counter() - begin)

    def sample(self, seconds: float, files: list[Path], gaps: list[float]) -> list[float]:
        taken = self.taken
        self.writes += taken.number
        sizes = [file.stat().st_size / 1e6 for file in files if file.exists()]
        latencies = [taken.percentile(50), taken.percentile(99), taken.longest, max(gaps)]
        row = [taken.number / seconds, *(latency * 1e3 for latency in latencies)]
        taken.clear()
        gaps[:] = [0.0]
        status = self.state.status()
        return [*row, resident() / 1e6, sum(sizes), status.journal_bytes / 1e6, float(status.keys)]


def slope(values: list[float]) -> float:
    """Return the gain from one value to the next of a straight line through them."""
    number = len(values)
    middle, mean = (number - 1) / 2, sum(values) / number
    return sum((x - middle) * (y - mean) for x, y in enumerate(values)) / sum((x - middle) ** 2 for x in range(number))


def line(row: list[float]) -> str:
    return " ".join(f"{value:>10,.1f}" for value in row)


async def soak(directory: str, minutes: float, keys: int, period: float) -> list[list[float]]:
    rows: list[list[float]] = []
    async with Manager(Config(name="soak", flush_interval=0, stop_timeout=120), FileStorage(directory)) as state:
        for start in range(0, keys, 10_000):
            await state.set_many({key_of(number): next(VALUES) for number in range(start, min(start + 10_000, keys))})
        work = Soak(state, keys)
        print(" ".join(f"{name:>10}" for name in COLUMNS), flush=True)
        files = [Path(directory) / f"soak.{suffix}" for suffix in ("json", "journal")]
        async with heartbeat() as gaps:
            writers = [asyncio.create_task(work.writer(seed)) for seed in range(WRITERS)]
            begin = last = time.perf_counter()
            while last < begin + minutes * 60:
                await asyncio.wait(writers, timeout=period, return_when=asyncio.FIRST_EXCEPTION)
                for ended in writers:
                    if ended.done():
                        ended.result()
                now = time.perf_counter()
                rows.append([(now - begin) / 60, *work.sample(now - last, files, gaps)])
                last = now
                print(line(rows[-1]), flush=True)
            work.stopping = True
            await asyncio.gather(*writers)
        kept = await state.get_all()
    await check(directory, kept)
    print(f"{work.writes:,} writes; after a restart, all {len(kept):,} keys are what they were")
    return rows


async def check(directory: str, kept: dict[str, object]) -> None:
    """Check that the next start finds what was there."""
    async with Manager(Config(name="soak", flush_interval=None), FileStorage(directory)) as state:
        found = await state.get_all()
    wrong = [key for key in kept.keys() | found.keys() if kept.get(key) != found.get(key)]
    wrong = [key for key in wrong if not key.startswith("expiring/")]  # they may have expired since
    if wrong:
        sys.exit(f"{len(wrong)} keys are not what they were, for one {wrong[0]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--period", type=float, default=60, help="seconds from one line to the next")
    parser.add_argument("--directory", help="on the disk to use; where temporary files go, if left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        rows = asyncio.run(soak(directory, arguments.minutes, arguments.keys, arguments.period))
    # The first samples are of a state that is still getting to where it stays.
    steady = rows[len(rows) // 3 :]
    if len(steady) < 2:
        sys.exit("too short for a slope: at least three lines are needed")
    minutes = (steady[-1][0] - steady[0][0]) / (len(steady) - 1)
    print(f"slope, a minute, of the last {len(steady)} lines:")
    for number, name in list(enumerate(COLUMNS))[1:]:
        values = [row[number] for row in steady]
        gain = slope(values) / minutes
        print(f"  {name:<12} {gain:+12,.2f} ({gain / (sum(values) / len(values) or 1):+.1%} of the mean)")


if __name__ == "__main__":
    main()
