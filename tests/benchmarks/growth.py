"""What every public call costs, and how that grows with the state."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from measure import VALUE, VALUES, Numbers, Results, flusher_of, key_of, timed

from lab_state import Config, FileStorage, Manager, Transaction
from lab_state.testing import ManualClock

LIFECYCLE = {"start", "stop", "disown", "name", "config", "role", "revision", "durable_revision", "blocking", "backup"}
"""`start` is measured elsewhere, and `backup` writes the whole state. `blocking` is a hop to the loop and the call. The others are attributes."""

TWINS = {"get_many_nowait", "get_all_nowait", "keys_nowait", "expires_in_nowait", "delete_nowait", "update_nowait"}
"""They cost what the call without `_nowait` costs, in one step."""

CLOCK = ManualClock()
"""The clock of the states here."""

TEN = [f"few/{number}" for number in range(10)]
CONSTANT, KEYS, CHANGED, MATCHES = "O(1)", "O(keys)", "O(changed keys)", "O(log keys) + O(matches)"


class Row(NamedTuple):
    """One call, with the names of the API that it stands for."""

    call: str
    names: str
    cost: str
    work: Callable[[Manager], Awaitable[object]]
    after: Callable[[Manager], Awaitable[object]] | None = None


async def _get_nowait(state: Manager) -> None:
    state.get_nowait(key_of(7))


async def _set_nowait(state: Manager) -> None:
    state.set_nowait(key_of(7), next(VALUES))


async def _items(state: Manager) -> None:
    async with state.items("few/") as items:
        async for _ in items:
            pass


async def _length(state: Manager) -> None:
    len(state)
    key_of(7) in state  # noqa: B015 -- it is what is measured


async def _update(state: Manager) -> None:
    await state.update("count", lambda number: number + 1, 0)


async def _transaction(state: Manager) -> None:
    async with state.transaction() as transaction:
        _ten_sets(transaction)


def _ten_sets(transaction: Transaction) -> None:
    for key in TEN:
        transaction.set(key, next(VALUES))


async def _watch(state: Manager) -> None:
    async with state.watch("few/") as changes:
        await state.set(TEN[0], next(VALUES))
        await anext(changes)


async def _durable_watch(state: Manager) -> None:
    async with state.watch("few/", durable=True) as changes:
        await state.set(TEN[0], next(VALUES))
        await state.flush()
        await anext(changes)


async def _handles(state: Manager) -> None:
    await state.entry("count", int, default=0).get()
    await state.namespace("few").get("3")


async def _flush(state: Manager) -> None:
    await state.set(TEN[0], next(VALUES))
    await state.flush()
    await state.wait_durable()


async def _catch_up(state: Manager) -> None:
    await state.catch_up()
    await state.wait_revision(state.revision)


async def _status(state: Manager) -> None:
    state.status()
    state.metrics()


async def _ttl(state: Manager) -> None:
    await state.set("expiring", 1, ttl=1000)
    await state.touch("expiring", 2000)
    await state.expires_in("expiring")
    await state.delete("expiring")


async def few(state: Manager) -> None:
    """Set the ten keys of `few/`."""
    await state.set_many(dict.fromkeys(TEN, VALUE))


async def _expired(state: Manager) -> None:
    """Let a hundred keys expire, and sweep them."""
    await state.set_many({f"due/{number}": 1 for number in range(100)}, ttl=1)
    CLOCK.advance(3)
    assert not await state.exists("due/0")


ROWS = (
    Row("get", "get", CONSTANT, lambda state: state.get(key_of(7))),
    Row("get_nowait", "get_nowait", CONSTANT, _get_nowait),
    Row("get_many of 10", "get_many", "O(keys asked for)", lambda state: state.get_many(TEN)),
    Row("exists", "exists", CONSTANT, lambda state: state.exists(key_of(7))),
    Row("len(state), key in state", "", CONSTANT, _length),
    Row("entry().get, namespace().get", "entry namespace", CONSTANT, _handles),
    Row("keys(prefix), 10 match", "keys", MATCHES, lambda state: state.keys("few/")),
    Row("keys()", "", KEYS, lambda state: state.keys()),
    Row("get_all(prefix), 10 match", "get_all", MATCHES, lambda state: state.get_all("few/")),
    Row("items(prefix), 10 match", "items", MATCHES, _items),
    Row("get_all()", "", KEYS, lambda state: state.get_all()),
    Row("check(prefix), 10 match", "check", MATCHES, lambda state: state.check("few/", type=dict)),
    Row("set", "set", CONSTANT, lambda state: state.set(key_of(7), next(VALUES))),
    Row("set_nowait", "set_nowait", CONSTANT, _set_nowait),
    Row("set_many of 10", "set_many", CHANGED, few),
    Row("set_if_absent", "set_if_absent", CONSTANT, lambda state: state.set_if_absent(key_of(7), 1)),
    Row("get_or_set", "get_or_set", CONSTANT, lambda state: state.get_or_set(key_of(7), int)),
    Row("update", "update", CONSTANT, _update),
    Row("incr", "incr", CONSTANT, lambda state: state.incr("count")),
    Row("delete", "delete", CONSTANT, lambda state: state.delete(TEN[3]), few),
    Row("pop", "pop", CONSTANT, lambda state: state.pop(TEN[3]), few),
    Row("delete_many of 10", "delete_many", CHANGED, lambda state: state.delete_many(TEN), few),
    Row("delete_all(prefix), 10 match", "delete_all", MATCHES, lambda state: state.delete_all("few/"), few),
    Row("set(ttl), touch, expires_in, delete", "touch expires_in", CONSTANT, _ttl),
    Row("transaction of 10 sets", "transaction", CHANGED, _transaction),
    Row("transact of 10 sets", "transact", CHANGED, lambda state: state.transact(_ten_sets)),
    Row("watch: open, one change, close", "watch", CONSTANT, _watch),
    Row("watch(durable=True): the same, flushed", "", CONSTANT, _durable_watch),
    Row("set, flush, wait_durable", "flush wait_durable", CHANGED, _flush),
    Row("catch_up, wait_revision", "catch_up wait_revision", CONSTANT, _catch_up),
    Row("status(), metrics()", "status metrics", CONSTANT, _status),
    Row("set_many(ttl) of 100, sweep", "", CHANGED, _expired),
)


def check_complete() -> None:
    """Raise an error if a call is missing here: its growth would not be measured."""
    public = {name for name in dir(Manager) if not name.startswith("_")} - LIFECYCLE - TWINS
    missing = public.symmetric_difference(" ".join(row.names for row in ROWS).split())
    if missing:
        raise RuntimeError(f"the growth of these calls is not measured, or they are gone: {sorted(missing)}")


async def growth(results: Results, directory: str, counts: list[int]) -> None:
    check_complete()
    found: dict[str, list[float]] = {}
    for count in counts:
        name = f"growth-{count}"
        async with Manager(Config(name=name, flush_interval=None), FileStorage(directory), clock=CLOCK) as state:
            await state.set_many({key_of(number): VALUE for number in range(count)})
            await few(state)
            await state.flush()
            await flusher_of(state).checkpoints.ended()
            gc.collect()
            gc.freeze()
            for row in ROWS:
                found.setdefault(row.call, []).append(await cost(state, row))
            found.setdefault("delete_all()", []).append(await timed(lambda: _nothing(state.delete_all())))
    rows: list[Numbers] = [{"call": row.call, "cost": row.cost, "seconds": found[row.call]} for row in ROWS]
    rows.append({"call": "delete_all()", "cost": CONSTANT, "seconds": found["delete_all()"]})
    for one in rows:
        seconds = one["seconds"]
        one["grows"] = _grows(one["cost"], seconds, counts)
        print(f"{one['call']:<42} {one['cost']:<24} {seconds} {one['grows']}")
    results.put(counts=counts, rows=rows)


async def _nothing(call: Awaitable[object]) -> None:
    await call


async def cost(state: Manager, row: Row) -> float:
    """Return the median of up to 200 calls, in a third of a second."""
    taken: list[float] = []
    end = time.perf_counter() + 0.3
    while len(taken) < 3 or (len(taken) < 200 and time.perf_counter() < end):
        if row.after is not None:
            await row.after(state)
        await asyncio.sleep(0)
        begin = time.perf_counter()
        await row.work(state)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _grows(cost: str, seconds: list[float], counts: list[int]) -> bool:
    """Return whether it grows faster than its cost says, with some room for noise."""
    if cost.startswith(KEYS):  # from where the processor's caches hold no more of it
        return seconds[-1] / seconds[-2] > 2 * counts[-1] / counts[-2]
    return seconds[-1] / seconds[0] > 4
