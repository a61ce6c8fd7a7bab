"""Many states in one process: what a manager costs, and a start beside others' files."""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import statistics
import threading
import time
from collections.abc import Awaitable
from pathlib import Path

from measure import Results

from lab_state import Config, FileStorage, Manager
from lab_state.storage._worker import Threads, Worker

_SAMPLES = 200
_FOREIGN = 50_000
_STARTS = 60
_MOST_START = 4.0
_MOST_BESIDE = 1.2
_MOST_BYTES = 20_000


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _bare(directory: str, number: int) -> None:
    """Do the least that a start can do: open, lock and write one file, and read two."""
    fd = os.open(f"{directory}/bare{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.pwrite(fd, b"x" * 100, 0)
    for ending in ("json", "journal"):
        try:
            with open(f"{directory}/bare{number}.{ending}", "rb") as file:  # noqa: PTH123 -- as quick as it can be
                file.read()
        except FileNotFoundError:
            pass
    os.close(fd)


async def _seconds(work: Awaitable[None]) -> float:
    begin = time.perf_counter()
    await work
    return time.perf_counter() - begin


async def many(results: Results, directory: str, count: int) -> None:
    await _managers(results, directory, count)
    await _beside(results, directory)


async def _managers(results: Results, directory: str, count: int) -> None:
    """Measure idle managers, all on one storage object."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(count, hard - 1000)
    place = f"{directory}/many"
    storage, worker = FileStorage(place), Worker(Threads("bare"))
    async with Manager("first", storage):
        pass
    gc.collect()
    memory, opened = _resident(), _descriptors()
    states, starts, bares = [], [], []
    for number in range(count):
        state = Manager(Config(name=f"user{number}", flush_interval=None), storage)
        states.append(state)
        if number % max(1, count // _SAMPLES):
            await state.start()
            continue
        starts.append(await _seconds(state.start()))
        bares.append(await _seconds(worker.run(_bare, place, number)))
    gc.collect()
    each = (_resident() - memory) / count
    ratio = statistics.median(starts) / statistics.median(bares)
    for state in states:
        await state.set("a", 1)
        await state.flush()
    descriptors = (_descriptors() - opened) / count
    threads = sum(thread.name.startswith("lab_state") for thread in threading.enumerate())
    for state in states:
        await state.stop()
    worker.shutdown()
    results.put(managers=count, start=statistics.median(starts), memory=each, threads=threads, descriptors=descriptors)
    results.add(f"start of one of {count:,} managers / a bare hop", f"{ratio:.1f} x", "≤ 4 x", met=ratio <= _MOST_START)
    results.add("memory of an idle manager", f"{each / 1000:.1f} kB", "≤ 20 kB", met=each <= _MOST_BYTES)
    results.add(
        "descriptors of an idle manager that has written", f"{descriptors:.2f}", "≤ 1.1", met=descriptors <= 1.1
    )
    results.add("threads of all of them", f"{threads}", "≤ 32", met=threads <= 32)


async def _beside(results: Results, directory: str) -> None:
    """Measure a start in a directory with many other files, of new states and old ones, with a storage object for each."""
    alone, crowded = f"{directory}/alone", f"{directory}/crowded"
    for place in (alone, crowded):
        async with Manager("first", FileStorage(place)):
            pass
    for number in range(_FOREIGN):
        Path(crowded, f"other{number}.json").touch()
    found: dict[str, list[float]] = {alone: [], crowded: []}
    for number in range(_STARTS):
        for place, seconds in found.items():
            state = Manager(f"mine{number // 2}", FileStorage(place))
            seconds.append(await _seconds(state.start()))
            await state.stop()
    ratio = statistics.median(found[crowded]) / statistics.median(found[alone])
    results.put(beside=ratio)
    results.add(
        f"start beside {_FOREIGN:,} files of others / alone", f"{ratio:.2f} x", "≤ 1.2 x", met=ratio <= _MOST_BESIDE
    )
