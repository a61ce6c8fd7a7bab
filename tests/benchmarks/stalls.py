"""What one step of the event loop costs where its input is large: values, refusals, transactions, mirrors, checkpoints.

A step is measured in processor time of the loop's own thread, so what else runs on the
machine counts little.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Generator
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
from measure import Results, flusher_of
from msgspec import Raw

from lab_state import Config, FileStorage, InvalidValueError, Manager, MemoryCache, MemoryStorage
from lab_state.cache._format import Head, Message
from lab_state.cache._local_copy import LocalCopy

_MILLION = 1_000_000
_CHAIN = "[" * 120 + "]" * 120


class Steps:
    """The longest step of the event loop since it was asked last, in seconds."""

    def __init__(self) -> None:
        self.longest = 0.0

    def take(self) -> float:
        longest, self.longest = self.longest, 0.0
        return longest


@contextlib.contextmanager
def watched() -> Generator[Steps]:
    """Measure each step."""
    steps, real = Steps(), asyncio.Handle._run

    def run(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        real(handle)
        steps.longest = max(steps.longest, time.thread_time() - begin)

    asyncio.Handle._run = run  # type: ignore[method-assign, assignment]
    try:
        yield steps
    finally:
        asyncio.Handle._run = real  # type: ignore[method-assign]


class _Unknown:
    """What nothing encodes."""


def _records(size: int, **more: Any) -> list[Any]:
    return [{"id": n, "name": f"user {n}", "email": f"user{n}@example.org", **more} for n in range(max(1, size // 65))]


_ODD = timezone(timedelta(seconds=3601))
_ZONE = timezone(timedelta(hours=2))
_RAW = Raw(b"{")


def _deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


def _uneven(size: int) -> list[Any]:
    return [record | {"tags": ["a"] * (record["id"] % 4)} for record in _records(size)]


VALUES: dict[str, tuple[Callable[[int], Any], float]] = {
    "a flat list of records": (_records, 2.5),
    "records with a None": (lambda size: _records(size, none=None), 2.5),
    "records with a float": (lambda size: _records(size, x=12.5), 2.5),
    "records with brackets in strings": (lambda size: _records(size, text="[1]"), 2.5),
    "records with an unpaired bracket in strings": (lambda size: _records(size, text="]"), 2.5),
    "records with other letters": (lambda size: _records(size, text="\u00e9\u20ac"), 2.5),
    "records with times as text": (lambda size: _records(size, at="2026-01-02T03:04:05+01:00"), 2.5),
    "records with datetimes": (lambda size: _records(size, at=datetime(2026, 1, 2, tzinfo=_ZONE)), 20),
    "records with lists inside": (_uneven, 20),
    "records with int keys": (lambda size: [dict(enumerate(record.values())) for record in _records(size)], 20),
    "one dict": (lambda size: {f"k{n}": n for n in range(max(1, size // 14))}, 20),
    "one dict inside of a dict": (lambda size: {"x": {f"k{n}": n for n in range(max(1, size // 14))}}, 20),
    "one dict with int keys": (lambda size: {n: n for n in range(max(1, size // 14))}, 20),
    "one text of brackets": (lambda size: ["[" * size], 20),
    "ints": (lambda size: [*range(max(1, size // 7))], 20),
    "Nones": (lambda size: [None] * (size // 5), 20),
    "chains of 120 levels": (lambda size: [_deep(120) for _ in range(max(1, size // 241))], 20),
    "empty lists": (lambda size: [[] for _ in range(size // 3)], 20),
    "refused: the last of many ints": (lambda size: [*range(max(1, size // 7)), _Unknown()], 20),
    "refused: a field of the last record": (lambda size: [*_records(size), {"id": _Unknown()}], 20),
    "refused: 130 levels behind records": (lambda size: [*_records(size), _deep(130)], 20),
    "refused: a NaN behind records": (lambda size: [*_records(size), float("nan")], 20),
    "refused: two keys that are one, behind records": (lambda size: [*_records(size), {1: 1, "1": 2}], 20),
    "refused: a lone surrogate behind records": (lambda size: [*_records(size), "\ud800"], 20),
    "refused: a Raw behind records": (lambda size: [*_records(size), _RAW], 20),
    "refused: an odd offset behind records": (lambda size: [*_records(size), datetime(2026, 1, 2, tzinfo=_ODD)], 20),
}


async def values(results: Results, *, quick: bool) -> None:
    """Measure `set` of values beside their encoding. Both take turns, and the quickest turn of each counts."""
    sizes = (1_000, 100_000, 5_000_000) if quick else (1_000, 100_000, 5_000_000, 50_000_000)
    async with Manager(Config(name="values", flush_interval=None), MemoryStorage()) as state:
        for name, (make, bound) in VALUES.items():
            for size in sizes:
                value = make(size)
                encoded = value[:-1] if name.startswith("refused") else value
                calls = max(1, 20_000 // size)
                bare, ours = [], []
                for _ in range(max(5, min(100, 10_000_000 // size))):
                    begin = time.perf_counter()
                    for _ in range(calls):
                        msgspec.json.encode(encoded)
                    between = time.perf_counter()
                    for _ in range(calls):
                        with contextlib.suppress(InvalidValueError):
                            await state.set("k", value)
                    ours.append(time.perf_counter() - between)
                    bare.append(between - begin)
                ratio = min(ours) / min(bare)
                shown = f"{size // 1_000} kB" if size < _MILLION else f"{size // _MILLION} MB"
                results.add(
                    f"set of {name}, {shown} / msgspec.json.encode", f"{ratio:.1f}", f"<= {bound}", met=ratio <= bound
                )


async def stalls(results: Results, directory: str, *, quick: bool) -> None:
    """Measure the longest step of the loop for each of the known stalls, at the sizes at which they were found."""
    count, large = (_MILLION // 10, 5_000_000) if quick else (_MILLION, 50_000_000)
    with watched() as steps:

        def tell(what: str) -> None:
            longest = steps.take() * 1e3
            results.add(f"longest step: {what}", f"{longest:.1f} ms", "<= 10 ms", met=longest <= 10)

        await _large_value(directory, large, steps, tell)
        await _unclean_start(directory, count, steps, tell)
        await _transactions(count, steps, tell)
    began, longest, local = time.thread_time(), 0.0, _told(count // 1_000)
    more = True
    while more:
        began = time.thread_time()
        more = local.replay(1_000)
        longest = max(longest, time.thread_time() - began)
    results.add(
        f"longest step: a local copy catches up with {count} changes",
        f"{longest * 1e3:.1f} ms",
        "<= 10 ms",
        met=longest <= 0.01,
    )


async def _large_value(directory: str, large: int, steps: Steps, tell: Callable[[str], None]) -> None:
    config = Config(name="large", flush_interval=None)
    async with Manager(config, FileStorage(directory)) as state:
        await state.set("large", ["x" * large])
        await asyncio.sleep(0)
        steps.take()
        await state.flush()
        tell("the flush of a large value")
        running = flusher_of(state)
        await running.checkpoints.ended()
        await state.set("small", 1)
        steps.take()
        running.checkpoints.start()
        await running.checkpoints.ended()
        tell("a checkpoint beside a large value")


async def _unclean_start(directory: str, count: int, steps: Steps, tell: Callable[[str], None]) -> None:
    config = Config(name="unclean", flush_interval=None)
    state = Manager(config, FileStorage(directory))
    await state.start()
    await state.set_many({f"k{number}": number for number in range(count)})
    await state.flush()
    await flusher_of(state).checkpoints.ended()
    await state.set("k1", 2)
    await state.flush()
    for cache in (None, MemoryCache()):
        session = flusher_of(state).abort()
        await asyncio.sleep(0.1)
        await session.aclose()
        state = Manager(config, FileStorage(directory), cache)
        await state.start()
        await asyncio.sleep(0)
        steps.take()
        await flusher_of(state).wait_flushed(state.revision)
        while (mirror := state.status().mirror) is not None and not mirror.up:  # noqa: ASYNC110 -- it sets no event
            await asyncio.sleep(0.01)
        tell(f"behind an unclean start, {'with' if cache else 'without'} a cache")
    await state.stop()


async def _transactions(count: int, steps: Steps, tell: Callable[[str], None]) -> None:
    async with Manager(Config(name="tx", flush_interval=None), MemoryStorage()) as state:
        await state.set_many({f"k{number}": number for number in range(count)})
        await state.set("one", 1, ttl=1_000)
        for what, call in (("len()", len), ("delete_all()", lambda tx: tx.delete_all())):
            await asyncio.sleep(0)
            steps.take()
            with contextlib.suppress(ZeroDivisionError):
                async with state.transaction() as tx:
                    call(tx)
                    raise ZeroDivisionError
            await asyncio.sleep(0)
            tell(f"{what} in a transaction where a key expires")


def _told(steps: int) -> LocalCopy:
    local = LocalCopy()
    local.start_loading()
    local.set_head(Head(1, 0, "w"))
    values = {f"k{number}": Raw(b"[1]") for number in range(1_000)}
    for number in range(steps):
        local.receive([Message(start=number, end=number + 1, writer="w", set=values)])
    return local
