"""lab_state beside what a user would pick instead: the same work, in turns, each with what its durability is worth."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from measure import (
    KEYS,
    VALUE,
    VALUES,
    Numbers,
    Results,
    Scale,
    each,
    encode,
    key_of,
    one_by_one,
    percentile,
    process,
    stall,
    together,
)
from peer import NOTHING, Peer
from peers import PEERS, LabState


@asynccontextmanager
async def opened(directory: str, kinds: Iterable[type[Peer]]) -> AsyncIterator[list[Peer]]:
    """Open each in a directory of its own, all at once, so that they can take turns."""
    with tempfile.TemporaryDirectory(dir=directory) as own:
        async with AsyncExitStack() as stack:
            peers = [kind(Path(own)) for kind in kinds]
            for peer in peers:
                await peer.open()
                stack.push_async_callback(peer.close)
            yield peers


async def in_turns(peers: list[Peer], rounds: int, work: Callable[[Peer], Awaitable[Numbers]]) -> dict[str, Numbers]:
    """Return the median of each number of each peer."""
    found: dict[str, list[Numbers]] = {}
    for turn in range(rounds):
        for peer in (*peers[turn % len(peers) :], *peers[: turn % len(peers)]):  # no peer is always the first
            gc.collect()
            gc.freeze()  # what one has in memory is not to be blamed on another,
            await asyncio.to_thread(os.sync)  # nor what it has left to the disk
            found.setdefault(peer.name, []).append(await work(peer))
    return {
        peer.name: {
            number: statistics.median(one[number] for one in found[peer.name]) for number in found[peer.name][0]
        }
        for peer in peers
    }


def described() -> list[Numbers]:
    return [{"name": peer.name, "survives": peer.survives, "setup": peer.setup} for peer in PEERS]


async def operations(results: Results, directory: str, loop: str, scale: Scale) -> None:
    """Measure `get` and `set` of one value, as the peer offers them, with 512 keys in it."""

    async def work(peer: Peer) -> Numbers:
        def put(key: str) -> Awaitable[None]:
            return peer.set(key, next(VALUES))

        await each(peer.get, KEYS, scale.seconds / 4)
        return {
            "get": await each(peer.get, KEYS, scale.seconds / 2),
            "set": await each(put, KEYS, scale.seconds / 2),
            "get stall": await stall(one_by_one(peer.get, KEYS, scale.seconds)),
            "set stall": await stall(one_by_one(put, KEYS, scale.seconds)),
        }

    async with opened(directory, PEERS) as peers:
        for peer in peers:
            await peer.fill(dict.fromkeys(KEYS, VALUE))
        results.put(**{loop: await in_turns(peers, scale.rounds, work)})


async def writes(results: Results, directory: str, loop: str, scale: Scale) -> None:
    """Measure one durable change, by one task and by 100 tasks, and the stall of the event loop."""
    kinds = [peer for peer in PEERS if peer.survives != NOTHING]

    async def work(peer: Peer) -> Numbers:
        def durable(key: str) -> Awaitable[None]:
            return peer.durable(key, next(VALUES))

        await each(durable, KEYS, scale.seconds / 4)
        one = await each(durable, KEYS, scale.seconds)
        rate, taken = await together(durable, 100, scale.seconds)
        return {
            "one": one,
            "hundred": rate,
            "one stall": await stall(one_by_one(durable, KEYS, scale.seconds)),
            "hundred stall": await stall(together(durable, 100, scale.seconds)),
            "p50": percentile(taken, 50),
            "p99": percentile(taken, 99),
        }

    async with opened(directory, kinds) as peers:
        for peer in peers:
            await peer.fill(dict.fromkeys(KEYS, VALUE))
        numbers = await in_turns(peers, scale.rounds, work)
        results.put(**{loop: numbers})
    ours = numbers[LabState.name]["hundred"]
    for name, bound in (("sqlite3", 12), ("LMDB", 10), ("Redis", 5)):
        times = ours / numbers[name]["hundred"]
        results.add(
            f"durable writes a second, 100 tasks / {name} ({loop})",
            f"{times:.1f} x ({ours:,.0f} / {numbers[name]['hundred']:,.0f})",
            f">= {bound}",
            met=times >= bound,
        )


async def sizes(results: Results, directory: str, scale: Scale) -> None:
    """Measure one durable change in states of different sizes (time, stall of the loop, bytes written), and a start."""
    values = {key_of(number): VALUE for number in range(scale.sizes[-1])}
    for count in scale.sizes:
        kinds = [peer for peer in PEERS if peer.survives != NOTHING and peer.most >= count]
        part = values if count == scale.sizes[-1] else {key_of(number): VALUE for number in range(count)}
        keys = [key_of(number * count // 512) for number in range(512)]
        async with opened(directory, kinds) as peers:
            for peer in peers:
                await peer.fill(part)

            async def work(peer: Peer, keys: list[str] = keys) -> Numbers:
                def durable(key: str) -> Awaitable[None]:
                    return peer.durable(key, next(VALUES))

                await durable(keys[0])
                before = peer.written()
                taken = await one_by_one(durable, keys, scale.seconds)
                changed = len(keys[0]) + len(encode(VALUE))
                return {
                    "change": statistics.median(taken),
                    "written": (peer.written() - before) / len(taken) / changed,
                    "stall": await stall(one_by_one(durable, keys, scale.seconds)),
                }

            numbers = await in_turns(peers, min(scale.rounds, 3), work)
            starts = await in_turns(peers, 2, partial(start, key=keys[7]))
        results.put(**{str(count): {name: numbers[name] | starts[name] for name in numbers}})
        print(f"{count:,} keys: done", flush=True)


async def start(peer: Peer, key: str) -> Numbers:
    """Measure from nothing to the first value, after a clean end."""
    await peer.close()
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    await peer.open()
    await peer.get(key)
    seconds = time.perf_counter() - begin
    gc.enable()
    return {"start": seconds}


def footprint(results: Results, directory: str, scale: Scale) -> None:
    """Measure the memory of a state in a process of its own, and the cost of the import, above a bare interpreter."""
    for number, peer in enumerate(PEERS):
        keys = min(scale.keys // 10, peer.most)
        command = [sys.executable, __file__, str(number), str(keys), directory]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        grown = int(done.stdout)
        size = len(encode({key_of(number): VALUE for number in range(1000)})) * keys / 1000
        results.put(**{peer.name: {"keys": keys, "bytes": grown, "ratio": grown / size}})
    times: dict[str, list[float]] = {}
    for _ in range(3):
        bare = process("pass")
        for peer in PEERS:
            times.setdefault(peer.name, []).append(process(f"import {peer.module}") - bare)
    for name, taken in times.items():
        results.put(**{name: results.numbers[results.part][name] | {"import": statistics.median(taken)}})


async def grown(peer: Peer, count: int) -> int:
    """Return how much memory so many keys take, set one by one."""
    await peer.open()
    before = peer.resident()
    value: Any = VALUE
    for number in range(count):
        # A value that is kept as an object is one of its own, as it would be with real ones.
        await peer.set(key_of(number), value | {"tags": list(value["tags"])})
    return peer.resident() - before


async def _grown() -> None:
    number, count, directory = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=directory) as own:
        peer = PEERS[int(number)](Path(own))
        print(await grown(peer, int(count)))
        await peer.close()


if __name__ == "__main__":
    asyncio.run(_grown())
