"""A change in a large state, its start and its memory, as ratios."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import orjson
from measure import KEYS, VALUE, Results, compare, flusher_of, process, stall, stopped, timed
from plots import stall_text

from lab_state import Config, FileStorage, Manager


async def large(results: Results, directory: str, count: int) -> None:
    """Measure one durable change in a small and in a large state, a checkpoint, and a start."""
    small, big = Config(name="small", flush_interval=None), Config(name="big", flush_interval=None)
    storage = FileStorage(directory)
    values = {f"key-{number:07}": VALUE for number in range(count)}
    whole = dict.fromkeys(values, VALUE)
    async with Manager(small, storage) as one, Manager(big, storage) as other:
        await one.set_many(dict.fromkeys(KEYS, VALUE))
        await other.set_many(values)
        await one.flush()
        await other.flush()
    async with Manager(small, storage) as one, Manager(big, storage) as other:

        async def change(state: Manager, key: str) -> None:
            for _ in range(20):
                await state.set(key, VALUE)
                await state.flush()

        ratio, ours, theirs = await compare(lambda: change(other, "key-0000007"), lambda: change(one, KEYS[7]))
        results.add(
            f"one durable change in {count:,} keys / in 1 k keys",
            f"{ratio:.2f} ({ours * 5e4:.0f} / {theirs * 5e4:.0f} us)",
            "<= 2",
            met=ratio <= 2,
        )
        for name, dump, bound in (("orjson", orjson.dumps, 300), ("json", lambda m: json.dumps(m).encode(), 3000)):
            seconds = statistics.median([dumped(whole, dump, directory) for _ in range(3)])
            faster = seconds / (ours / 20)
            results.add(
                f"... faster than dumping the whole map with {name}",
                f"{faster:,.0f} x ({seconds * 1e3:.0f} ms)",
                f">= {bound * count // 1_000_000}",
                met=faster >= bound * count / 1_000_000,
            )
        gc.freeze()  # the maps of the other side are not to be blamed on this one
        gap = statistics.median([await stall(change(other, "key-0000007")) for _ in range(5)])
        results.add("loop stall meanwhile", stall_text(gap), "<= 2 ms", met=gap <= 0.002)
        gaps = []
        for _ in range(5):
            await other.set("key-0000007", VALUE)
            await other.flush()
            gaps.append(await stall(flusher_of(other).checkpoints.write(wait=True)))
        gap = statistics.median(gaps)
        results.add(f"loop stall during a checkpoint of {count:,} keys", stall_text(gap), "<= 10 ms", met=gap <= 0.010)
    data = (Path(directory) / "big.json").read_bytes()
    del values, whole
    await starts(results, big, storage, data, count)


def dumped(whole: dict[str, Any], dump: Callable[[Any], bytes], directory: str) -> float:
    begin = time.perf_counter()
    path = Path(directory) / "dump.tmp"
    with path.open("wb") as file:
        file.write(dump(whole))
        file.flush()
        os.fsync(file.fileno())
    path.replace(path.with_suffix(".json"))
    return time.perf_counter() - begin


async def starts(results: Results, config: Config, storage: FileStorage, data: bytes, count: int) -> None:
    async def ours() -> None:
        manager = Manager(config, storage)
        await manager.start()
        started.append(manager)

    async def raw() -> None:
        started.append(msgspec.json.decode(data, type=dict[str, msgspec.Raw]))

    async def plain() -> None:
        started.append(json.loads(data))

    started: list[Any] = []
    times: dict[str, list[float]] = {}
    for _ in range(7):
        for work in (ours, raw, plain):
            times.setdefault(work.__name__, []).append(await timed(work, collecting=True))  # as a program has it
            last = started.pop()
            if isinstance(last, Manager):
                await stopped(last)
            del last
    mine, bare, loads = (statistics.median(times[name]) for name in ("ours", "raw", "plain"))
    results.add(
        f"start() on {count:,} keys / msgspec decode to dict[str, Raw]",
        f"{mine / bare:.2f} ({mine:.2f} / {bare:.2f} s)",
        "<= 1.3",
        met=mine / bare <= 1.3,
    )
    results.add("... faster than json.loads", f"{loads / mine:.1f} x ({loads:.2f} s)", ">= 4", met=loads / mine >= 4)


def imports(results: Results) -> None:
    pairs = [(process("import lab_state"), process("import asyncio, msgspec, aiofiles")) for _ in range(15)]
    ratio = statistics.median(a / b for a, b in pairs)
    results.add(
        "import lab_state / import asyncio, msgspec, aiofiles (processes)", f"{ratio:.2f}", "<= 1.3", met=ratio <= 1.3
    )


def memory(results: Results, directory: str, count: int) -> None:
    code = (
        "import asyncio\n"
        "from pathlib import Path\n"
        "from lab_state import Config, FileStorage, Manager\n"
        "async def main():\n"
        "    before = int(Path('/proc/self/statm').read_text().split()[1])\n"
        f"    state = Manager(Config(name='memory', flush_interval=None), FileStorage({directory!r}))\n"
        "    await state.start()\n"
        f"    value = {'x' * 98!r}\n"
        f"    for number in range({count}):\n"
        "        await state.set(f'key-{number:07}', [value])\n"
        "    after = int(Path('/proc/self/statm').read_text().split()[1])\n"
        f"    print((after - before) * 4096 / ({count} * 115))\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    ratio = float(done.stdout)
    results.add(
        f"memory of {count:,} unflushed keys / the size of their JSON", f"{ratio:.1f}", "<= 3.5", met=ratio <= 3.5
    )
