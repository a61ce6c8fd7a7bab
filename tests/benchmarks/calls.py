"""The longest step of the event loop in each public call, in a large state. A step above its bound fails the run.

A step is measured in processor time of the loop's own thread, with the default collector.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from functools import partial

from growth import CLOCK, KEYS, ROWS, Row, check_complete, few
from measure import Results, flusher_of, key_of
from scan import BULK, FLAT, grow
from stalls import Steps, watched

from lab_state import Config, FileStorage, Manager

BOUND = 0.010
FLUSH, CHECKPOINT = 0.020, 0.035
"""The flush of a million changes, and the first checkpoint after a start: docs/durability.md says why they take longer."""
TURNS = 3

MANY = {f"bulk/{number:06}": FLAT for number in range(BULK)}
SOME = [key_of(number) for number in range(1000)]

Work = Callable[[Manager], Awaitable[object]]


async def _transaction(state: Manager) -> None:
    async with state.transaction() as tx:
        for number, (key, value) in enumerate(MANY.items()):
            tx.set(key, value)
            if not number % 500:
                await asyncio.sleep(0)


async def _checkpoint(state: Manager) -> None:
    await state.set("one", 1)
    await state.flush()
    await flusher_of(state).checkpoints.write(wait=True)


LARGE: dict[str, Work] = {
    f"get_many of {1000:,}": lambda state: state.get_many(SOME),
    f"set_many of {BULK:,}": lambda state: state.set_many(MANY),
    f"get_all(prefix), {BULK:,} match": lambda state: state.get_all("bulk/"),
    f"keys(prefix), {BULK:,} match": lambda state: state.keys("bulk/"),
    f"delete_all(prefix), {BULK:,} match": lambda state: state.delete_all("bulk/"),
    f"a transaction of {BULK:,} sets": _transaction,
    f"delete_many of {BULK:,}": lambda state: state.delete_many(MANY),
    "set, flush, checkpoint": _checkpoint,
}
"""Calls with many keys, in this order."""


async def calls(results: Results, directory: str, count: int) -> None:
    """Measure each call, and raise `SystemExit` if one has a step above its bound."""
    check_complete()
    keys = tuple(key_of(number) for number in range(count))
    grown = grow(keys)
    missed: list[str] = []
    with watched() as steps:

        async def tell(name: str, work: Callable[[], Awaitable[object]], most: float = BOUND) -> None:
            longest = await step_of(steps, work)
            met = longest <= most
            results.add(f"longest step: {name}", f"{longest * 1e3:.1f} ms", f"<= {most * 1e3:.0f} ms", met=met)
            if not met:
                missed.append(name)

        config = Config(name="calls", flush_interval=None)
        async with Manager(config, FileStorage(directory), clock=CLOCK) as state:
            values = dict.fromkeys(keys, FLAT)
            gc.collect()  # otherwise the next collection of young objects looks into the dict
            # A step in which the dict of the state grows is longer by that; see `grow`.
            await tell(f"set_many of {count:,}", partial(state.set_many, values), BOUND + grown)
            await tell("flush, and the checkpoint after it", lambda: flushed(state), FLUSH)
        async with Manager(config, FileStorage(directory), clock=CLOCK) as state:
            await few(state)
            await tell("the first keys(prefix)", lambda: state.keys("few/"))
            for row in ROWS:
                # The dict of the result grows as that of the state does.
                await tell(row.call, partial(turns, state, row), BOUND + grown * (row.cost == KEYS))
            for name, work in LARGE.items():
                most = CHECKPOINT if work is _checkpoint else BOUND + grown * name.startswith("set_many")
                await tell(name, partial(work, state), most)
            await tell("delete_all()", state.delete_all)
    if missed:
        raise SystemExit(f"a step of the event loop is above its bound: {', '.join(missed)}")


async def turns(state: Manager, row: Row) -> list[object]:
    """Make the call of a row several times, and return the results. The loop runs between two calls."""
    held: list[object] = []
    for _ in range(1 if row.cost == KEYS else TURNS):
        if row.after is not None:
            await row.after(state)
        await asyncio.sleep(0)
        held.append(await row.work(state))
        await asyncio.sleep(0)
    return held


async def flushed(state: Manager) -> None:
    await state.flush()
    await flusher_of(state).checkpoints.ended()


async def step_of(steps: Steps, work: Callable[[], Awaitable[object]]) -> float:
    """Return the longest step during a call, in seconds. To free the result is not a part of it."""
    await asyncio.sleep(0)
    steps.take()
    held = [await work()]
    await asyncio.sleep(0)
    longest = steps.take()
    held.clear()
    return longest
