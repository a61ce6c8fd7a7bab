"""Ordered keys, pages and bulk work in a large state: what they cost, and the longest step of the event loop.

Everything is measured in processor time of the loop's own thread, so what else runs on the machine counts
little. Steps are measured with the default collector. `grow` is the longest single insertion into a plain
dict that is filled with the same keys, in the same run. `grow again` is the same for a copy of the state's dict.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

import msgspec
from measure import Results
from sortedcontainers import SortedList
from stalls import Steps, watched

from lab_state import Config, Manager, MemoryStorage

FLAT = {"id": 12345, "name": "some user's name", "email": "user@mail.example.org", "active": True, "score": 12.5}
"""A value of 100 bytes. It holds no list and no dict, so the garbage collector does not track what is decoded."""

GROUP = 1000
BULK = 100_000
TEN, THOUSAND = "group-0042/99", "group-0042/"
PAGE = 100
ROUNDS = 7


def keys_of(count: int) -> tuple[str, ...]:
    """Return that many keys, in groups of 1,000. They are shuffled, as keys come in no order.

    The garbage collector does not look into a tuple of strings. A list would be a part of each step that it makes longer.
    """
    keys = [f"group-{number // GROUP:04}/{number % GROUP:03}" for number in range(count)]
    random.Random(1).shuffle(keys)
    return tuple(keys)


def grow(keys: Iterable[str]) -> float:
    """Return the processor time of the longest single insertion into a dict: the median of three fills."""
    found = []
    for _ in range(3):
        filled: dict[str, None] = {}
        longest, last = 0.0, time.thread_time()
        for key in keys:
            filled[key] = None
            now = time.thread_time()
            longest, last = max(longest, now - last), now
        found.append(longest)
    return statistics.median(found)


async def timed(work: Callable[[], Awaitable[object]], *, collecting: bool = False) -> float:
    """Return the processor time of one call; with the garbage collector, if its part of the work belongs to the figure."""
    gc.collect()
    if not collecting:
        gc.disable()
    begin = time.thread_time()
    await work()
    seconds = time.thread_time() - begin
    gc.enable()
    return seconds


async def compare(
    ours: Callable[[], Awaitable[object]],
    theirs: Callable[[], Awaitable[object]],
    rounds: int = ROUNDS,
    *,
    collecting: bool = False,
) -> tuple[float, float, float]:
    """Return the median ratio, and the medians of both sides, in seconds. Both take turns."""
    pairs = [
        (await timed(ours, collecting=collecting), await timed(theirs, collecting=collecting)) for _ in range(rounds)
    ]
    mine, its = zip(*pairs, strict=True)
    return statistics.median(a / b for a, b in pairs), statistics.median(mine), statistics.median(its)


def grow_again(entries: dict[str, Any]) -> float:
    """Return the processor time of the insertion with which a copy of a dict grows: the median of three copies.

    The time depends on the memory of the process. So it is measured beside the work that it is compared with.
    """
    found = []
    for _ in range(3):
        copy = dict(entries)
        size, number, seconds = sys.getsizeof(copy), 0, 0.0
        while sys.getsizeof(copy) == size:
            key, begin = f"grown/{number}", time.thread_time()
            copy[key] = None
            seconds, number = time.thread_time() - begin, number + 1
        found.append(seconds)
    return statistics.median(found)


def collections(results: Results, count: int) -> None:
    """Measure a full pass of the garbage collector over values as a program holds them. lab_state cannot change it."""
    for name, more in (("flat values", {}), ("values with a list inside", {"tags": ["a", "b", "c"]})):
        data = msgspec.json.encode(FLAT | more)
        held = [msgspec.json.decode(data) for _ in range(count)]
        begin = time.thread_time()
        gc.collect()
        seconds = time.thread_time() - begin
        del held
        results.add(f"a full collection over {count:,} {name}", f"{seconds * 1e3:.0f} ms", "", met=True)


class Bench:
    """One state of many keys, the steps of its loop, and the results."""

    def __init__(self, results: Results, state: Manager, steps: Steps, grown: float) -> None:
        self.results = results
        self.state = state
        self.steps = steps
        self.grown = grown

    def add(self, work: str, reached: float, bound: float, note: str = "") -> None:
        """Add a ratio that has an upper bound."""
        self.results.add(work, f"{reached:.2f}{note}", f"<= {bound:g}", met=reached <= bound)

    def at_least(self, work: str, reached: float, bound: float, note: str = "") -> None:
        self.results.add(work, f"{reached:.2f}{note}", f">= {bound:g}", met=reached >= bound)

    async def longest(self, work: Callable[[], Awaitable[object]]) -> float:
        """Return the longest step of the loop during a call, in seconds. To free the result is not a part of it."""
        await asyncio.sleep(0)
        self.steps.take()
        held = [await work()]
        await asyncio.sleep(0)
        longest = self.steps.take()
        held.clear()
        return longest

    def step(self, work: str, seconds: float, bound: float, note: str = "") -> None:
        """Add the longest step of a call, in seconds, with its bound in seconds."""
        self.results.add(
            f"longest step: {work}", f"{seconds * 1e3:.1f} ms{note}", f"<= {bound * 1e3:.0f} ms", met=seconds <= bound
        )

    def table_bytes(self) -> int:
        """Return the size of the dict of the state. A layer may be over it for a moment."""
        entries: Any = self.state._core.state.entries
        while not isinstance(entries, dict):
            entries = entries.base
        return sys.getsizeof(entries)

    async def bulk(self, work: str, call: Callable[[], Awaitable[object]]) -> None:
        """Measure the longest step of a call and of what it leaves to be done. It may be longer if the map grew."""
        before = self.table_bytes()
        seconds = await self.longest(lambda: settled(self.state, call))
        grew = self.table_bytes() > before
        self.step(work, seconds, 0.010 + self.grown * grew, ", the map grew" if grew else "")


async def settled(state: Manager, call: Callable[[], Awaitable[object]]) -> None:
    """Make a call, and wait until no layer is left over the dict of the state."""
    await call()
    while not isinstance(state._core.state.entries, dict):  # noqa: ASYNC110 -- what is waited for sets no event
        await asyncio.sleep(0)


async def scan(results: Results, directory: str, count: int) -> None:
    keys = keys_of(count)
    grown = grow(keys)
    results.add(f"grow: the longest insertion into a dict of {count:,} keys", f"{grown * 1e3:.1f} ms", "", met=True)
    collections(results, count)
    with watched() as steps:
        async with Manager(Config(name="scan", flush_interval=None), MemoryStorage()) as state:
            bench = Bench(results, state, steps, grown)
            await state.set_many(dict.fromkeys(keys, FLAT))
            await state.set_many({f"few/{number}": FLAT for number in range(10)})
            await state.flush()
            await writes(bench, keys)
            await first(bench)
            gc.freeze()  # the list that they are compared with would make each collection long
            await few(bench, keys)
            gc.unfreeze()
            await everything(bench)
            await bulk(bench)
    memory(results, directory, count)


async def writes(bench: Bench, keys: tuple[str, ...]) -> None:
    """Measure `set` in a state with an index beside one without."""
    state = bench.state
    old = keys[:5000]
    new = tuple(f"new/{number}" for number in range(5000))
    async with Manager(Config(name="indexed", flush_interval=None), MemoryStorage()) as indexed:
        await indexed.set_many(dict.fromkeys(keys, FLAT))
        await indexed.flush()  # as the other one: a large dict of changes would be slower
        await settled(indexed, lambda: asyncio.sleep(0))  # the checkpoint after the flush has a view for some time
        await settled(state, lambda: asyncio.sleep(0))
        await indexed.keys("few/")
        gc.freeze()

        async def put(into: Manager, which: Iterable[str]) -> None:
            for key in which:
                await into.set(key, FLAT)

        for name, which, bound in (("an old key", old, 1.05), ("a new key", new, 1.5)):
            ratios = []
            for _ in range(ROUNDS * 3):
                pair = []
                for into in (indexed, state):
                    pair.append(await timed(lambda into=into, which=which: put(into, which)))  # type: ignore[misc]
                    if which is new:
                        await into.delete_many(new)
                ratios.append(pair[0] / pair[1])
                await indexed.keys("few/")
            bench.add(f"set of {name}, with an index / without", statistics.median(ratios), bound)
        gc.unfreeze()


async def first(bench: Bench) -> None:
    """Measure the first call that needs the order, and one after a burst of new keys."""
    state = bench.state
    begin = time.perf_counter()
    bench.step("the first keys(prefix)", await bench.longest(lambda: state.keys("few/")), 0.010)
    bench.results.add("... seconds", f"{time.perf_counter() - begin:.2f}", "", met=True)
    await state.set_many({f"burst/{number}": number for number in range(BULK)})
    await settled(state, lambda: asyncio.sleep(0))
    bench.step(f"keys(prefix) after {BULK:,} new keys", await bench.longest(lambda: state.keys("few/")), 0.010)
    await state.delete_many([f"burst/{number}" for number in range(BULK)])
    await settled(state, lambda: asyncio.sleep(0))
    await state.keys("few/")


async def few(bench: Bench, keys: tuple[str, ...]) -> None:
    """Measure calls that touch few keys."""
    state = bench.state
    ordered = SortedList([*keys, *(f"few/{number}" for number in range(10))])
    few_keys, group = state.namespace("few"), state.namespace("group-0042")

    async def ours(call: Callable[[], Awaitable[object]]) -> None:
        for _ in range(200):
            await call()

    async def theirs(low: str, high: str) -> None:
        for _ in range(200):
            list(ordered.irange(low, high, (True, False)))

    async def plain(call: Callable[[], object]) -> None:
        for _ in range(200):
            call()

    async def against(work: str, call: Callable[[], Awaitable[None]], prefix: str) -> None:
        ratio, mine, its = await compare(call, lambda: theirs(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)))
        note = f" ({mine * 5e3:.1f} / {its * 5e3:.1f} us)"
        bench.results.add(
            f"{work} / list(SortedList.irange)",
            f"{ratio:.2f}{note}",
            "<= 5, 20 us",
            met=ratio <= 5 and mine <= 200 * 20e-6,
        )

    assert len(await state.keys(TEN)) == len(few_keys) == 10
    assert len(group) == GROUP
    await against("keys(prefix), 10 match", lambda: ours(lambda: state.keys(TEN)), TEN)
    await against("len(namespace) of 10 keys", lambda: plain(few_keys.__len__), "few/")
    await against("len(namespace) of 1,000 keys", lambda: plain(group.__len__), THOUSAND)
    page = sorted(await state.keys(THOUSAND))[500 : 500 + PAGE]
    before = sorted(await state.keys(THOUSAND))[499]
    assert list(await state.get_all(after=before, limit=PAGE)) == page
    ratio, mine, its = await compare(
        lambda: ours(lambda: state.get_all(after=before, limit=PAGE)), lambda: ours(lambda: state.get_many(page))
    )
    bench.add(
        f"a page of {PAGE} with values / get_many of these", ratio, 2, f" ({mine * 5e3:.0f} / {its * 5e3:.0f} us)"
    )


async def everything(bench: Bench) -> None:
    """Measure calls that touch all keys."""
    state = bench.state
    every = tuple(await state.keys())
    entries: Any = state._core.state.entries
    values = tuple(entries[key] for key in every)  # those of the state, in the order of `items()`
    one_value = (msgspec.json.encode(FLAT),) * len(every)

    async def at_once() -> None:
        await state.get_many(every)

    async def in_steps() -> dict[str, Any]:
        return await state.get_all()

    async def walked() -> None:
        async with state.items() as items:
            async for _ in items:
                pass

    async def decoded(stored: tuple[bytes, ...]) -> None:
        for one in stored:
            msgspec.json.decode(one)

    async def names() -> list[str]:
        return await state.keys()

    gc.collect()
    bench.step("get_all()", await bench.longest(in_steps), bench.grown + 0.010)
    bench.step("keys()", await bench.longest(names), 0.010)
    bench.step("items()", await bench.longest(walked), 0.005)
    ratio, mine, its = await compare(in_steps, at_once, 3, collecting=True)
    bench.add("get_all() / get_many of all keys", ratio, 1.3, f" ({mine:.2f} / {its:.2f} s)")
    ratio, mine, its = await compare(walked, lambda: decoded(values), 3, collecting=True)
    bench.at_least("items() / a loop of msgspec.json.decode: speed", 1 / ratio, 0.3, f" ({mine:.2f} / {its:.2f} s)")
    ratio, mine, its = await compare(walked, lambda: decoded(one_value), 3, collecting=True)
    note = f"{1 / ratio:.2f} ({mine:.2f} / {its:.2f} s)"
    bench.results.add("... of one value again and again, which stays in the processor's cache", note, "", met=True)


async def bulk(bench: Bench) -> None:
    """Measure changes of many keys."""
    state = bench.state
    await settled(state, lambda: asyncio.sleep(0))
    bench.grown = grow_again(cast("dict[str, Any]", state._core.state.entries))
    work = "grow again: the insertion with which a copy of the state's dict grows"
    bench.results.add(work, f"{bench.grown * 1e3:.1f} ms", "", met=True)
    many = {f"bulk/{number:06}": FLAT for number in range(BULK)}
    for again in ("", ", again"):
        await bench.bulk(f"set_many of {BULK:,} new keys{again}", lambda: state.set_many(many))
        await bench.bulk(f"set_many of {BULK:,} old keys{again}", lambda: state.set_many(many))
        await bench.bulk(f"delete_all(prefix) of {BULK:,}{again}", lambda: state.delete_all("bulk/"))
    await bench.bulk(f"set_many of {BULK:,} new keys, a third time", lambda: state.set_many(many))
    await bench.bulk(f"delete_many of {BULK:,}", lambda: state.delete_many(list(many)))

    async def transaction() -> None:
        async with state.transaction() as tx:
            for number, (key, value) in enumerate(many.items()):
                tx.set(key, value)
                if not number % 1000:
                    await asyncio.sleep(0)

    await bench.bulk(f"a transaction of {BULK:,} sets, and its commit", transaction)
    await bench.bulk("delete_all()", state.delete_all)


_MEMORY = """
import asyncio, sys
sys.path[:0] = {path!r}
from measure import resident
from scan import FLAT, keys_of
from lab_state import Config, Manager, MemoryStorage
async def main():
    keys = keys_of({count})
    before = resident()
    async with Manager(Config(name="memory", flush_interval=None), MemoryStorage()) as state:
        for key in keys:
            await state.set(key, FLAT)
        without = resident() - before
        await state.keys("few/")
        print((resident() - before) / without)
asyncio.run(main())
"""


def memory(results: Results, directory: str, count: int) -> None:
    code = _MEMORY.format(path=sys.path, count=count)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=directory)
    ratio = float(done.stdout)
    results.add(f"memory of {count:,} keys with an index / without", f"{ratio:.3f}", "<= 1.05", met=ratio <= 1.05)
