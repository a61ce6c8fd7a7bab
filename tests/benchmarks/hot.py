"""Reading and writing in memory, transactions, watching, threads, sweeping: what each costs, as a ratio."""

from __future__ import annotations

import asyncio
import functools
import gc
import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from measure import KEYS, ROUNDS, VALUE, Results, compare, encode, stall, timed
from plots import stall_text

from lab_state import Config, FileStorage, Manager

decode = msgspec.json.Decoder().decode


class Bare:
    """What a hand-written map would cost: an awaited call, a dict, msgspec."""

    def __init__(self) -> None:
        self.map: dict[str, Any] = {}

    async def get(self, key: str) -> Any:
        return self.map[key]

    async def get_decoded(self, key: str) -> Any:
        return decode(self.map[key])

    async def set_encoded(self, key: str, value: object) -> None:
        self.map[key] = encode(value)


async def hot_path(results: Results, directory: str) -> None:
    """Measure `get` and `set`, on values set in this process and again after a reload."""
    bare = Bare()
    for key in KEYS:
        bare.map[key] = 12345
        bare.map["object " + key] = encode(VALUE)
    objects = ["object " + key for key in KEYS]
    config = Config(name="hot", flush_interval=None)
    for when in ("set here", "reloaded"):
        async with Manager(config, FileStorage(directory)) as state:
            if when == "set here":
                await state.set_many(dict.fromkeys(KEYS, 12345) | dict.fromkeys(objects, VALUE))

            async def our_get(keys: list[str]) -> None:
                for _ in range(20):
                    for key in keys:
                        await state.get(key)

            async def bare_get() -> None:
                for _ in range(20):
                    for key in KEYS:
                        await bare.get(key)

            async def bare_get_decoded() -> None:
                for _ in range(20):
                    for key in objects:
                        await bare.get_decoded(key)

            async def our_set() -> None:
                for _ in range(20):
                    for key in objects:
                        await state.set(key, VALUE)

            async def bare_set() -> None:
                for _ in range(20):
                    for key in objects:
                        await bare.set_encoded(key, VALUE)

            ns = 1e9 / 20 / len(KEYS)
            ratio, ours, theirs = await compare(lambda: our_get(KEYS), bare_get)
            results.add(
                f"get of a scalar, {when} / awaited dict lookup",
                f"{ratio:.2f} ({ours * ns:.0f} / {theirs * ns:.0f} ns)",
                "<= 2",
                met=ratio <= 2,
            )
            ratio, ours, theirs = await compare(lambda: our_get(objects), bare_get_decoded)
            results.add(
                f"get of 100 bytes, {when} / awaited msgspec decode",
                f"{ratio:.2f} ({ours * ns:.0f} / {theirs * ns:.0f} ns)",
                "<= 1.5",
                met=ratio <= 1.5,
            )
            ratio, ours, theirs = await compare(our_set, bare_set)
            results.add(
                f"set of 100 bytes, {when} / awaited encode + store",
                f"{ratio:.2f} ({ours * ns:.0f} / {theirs * ns:.0f} ns)",
                "<= 2",
                met=ratio <= 2,
            )


async def handles(results: Results, directory: str) -> None:
    """Measure transactions, watching, other threads, expiry."""
    keys = KEYS[:100]
    async with Manager(Config(name="handles", flush_interval=None), FileStorage(directory)) as state:
        await state.set_many(dict.fromkeys(KEYS, VALUE))

        async def transaction() -> None:
            for _ in range(20):
                async with state.transaction() as tx:
                    for key in keys:
                        tx.set(key, VALUE)

        async def sets() -> None:
            for _ in range(20):
                for key in keys:
                    await state.set(key, VALUE)

        async def sets_and_turns() -> None:
            for _ in range(20):
                for key in keys:
                    await state.set(key, VALUE)
                await asyncio.sleep(0)

        us = 1e6 / 20 / len(keys)
        ratio, ours, theirs = await compare(transaction, sets)
        results.add(
            "transaction of 100 sets / 100 sets",
            f"{ratio:.2f} ({ours * us:.2f} / {theirs * us:.2f} us)",
            "<= 1.3",
            met=ratio <= 1.3,
        )
        ratios = []
        for _ in range(ROUNDS):
            alone = await timed(sets_and_turns)
            async with AsyncExitStack() as stack:
                for number in range(1000):
                    watch = await stack.enter_async_context(state.watch(f"another prefix {number}"))
                    stack.callback(asyncio.ensure_future(anext(watch)).cancel)
                await asyncio.sleep(0)
                ratios.append(await timed(sets_and_turns) / alone)
            await asyncio.sleep(0)
        ratio = statistics.median(ratios)
        results.add("set with 1,000 idle watchers / without", f"{ratio:.2f}", "<= 2", met=ratio <= 2)
        ratio, ours, theirs = await compare(
            lambda: asyncio.to_thread(many, lambda: state.blocking.get(KEYS[0])),
            lambda: asyncio.to_thread(many, functools.partial(bare_round_trip, asyncio.get_running_loop())),
        )
        results.add(
            "blocking.get / bare run_coroutine_threadsafe",
            f"{ratio:.2f} ({ours * 5e3:.0f} / {theirs * 5e3:.0f} us)",
            "<= 3",
            met=ratio <= 3,
        )
        gc.freeze()
        gaps = []
        for _ in range(3):
            await state.set_many({f"expiring {number}": number for number in range(100_000)}, ttl=0.01)
            gaps.append(await stall(swept(state)))
        gap = statistics.median(gaps)
        results.add("loop stall while 100,000 keys are swept", stall_text(gap), "<= 5 ms", met=gap <= 0.005)


def many(call: Callable[[], object]) -> None:
    for _ in range(200):
        call()


async def nothing() -> None: ...


def bare_round_trip(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(nothing(), loop).result()


async def swept(state: Manager) -> None:
    while len(state._core.state.entries) > len(KEYS):  # noqa: ASYNC110 -- `state` itself hides them at once
        await asyncio.sleep(0.01)
