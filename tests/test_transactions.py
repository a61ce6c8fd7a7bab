"""Transactions: all or nothing, one at a time, and who waits for whom."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import msgspec
import pytest
from roles import InRole
from running import idle, running, until

from lab_state import (
    Change,
    ClosedError,
    Config,
    InvalidKeyError,
    InvalidValueError,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    Namespace,
    Transaction,
    TypeMismatchError,
    UnavailableError,
)
from lab_state._calls import Calls
from lab_state._core import _INSIDE
from lab_state._entries import Overlay
from lab_state._plain import Plain
from lab_state._reads import Reads
from lab_state._writing import Writing
from lab_state.testing import FaultyStorage, ManualClock

R = TypeVar("R")

BEFORE = {"a": 1, "b": [2], "n": 5, "users/ann": {"age": 30}, "users/bob": {"age": 40}}


class User(msgspec.Struct):
    age: int


class StopItError(Exception):
    """What the body of a transaction raises."""


@pytest.fixture
async def state(storage: FaultyStorage, clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    """Yield a manager with something in it, at revision 1."""
    async with running(storage, clock, make=in_role) as manager:
        await manager.set_many(BEFORE)
        yield manager


def outside(call: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
    """Run a call in a task that is in no transaction, wherever this is called."""
    return asyncio.create_task(call, context=Context())


def waiters(state: Manager) -> int:
    return len(state._core._lock._waiters or ())


# What a transaction is


SAME: dict[str, list[Callable[[Any], Any]]] = {
    "get": [
        lambda calls: calls.get("b"),
        lambda calls: calls.get("n", type=float),
        lambda calls: calls.get("nope", 7),
        lambda calls: calls.get("nope"),
        lambda calls: calls.get("a", type=str),
        lambda calls: calls.get(""),
    ],
    "get_many": [lambda calls: calls.get_many(["n", "nope", "a"]), lambda calls: calls.get_many("abc")],
    "get_all": [
        lambda calls: calls.get_all(),
        lambda calls: calls.get_all("users/", type=User),
        lambda calls: calls.get_all(type=int),
    ],
    "check": [lambda calls: calls.check(type=int), lambda calls: calls.check(type=str, limit=1)],
    "exists": [lambda calls: calls.exists("a"), lambda calls: calls.exists("nope")],
    "keys": [lambda calls: calls.keys(), lambda calls: calls.keys("users/"), lambda calls: calls.keys(5)],
    "expires_in": [
        lambda calls: calls.expires_in("a"),
        lambda calls: calls.expires_in("nope"),
        lambda calls: calls.expires_in("nope", 0.0),
    ],
    "set": [
        lambda calls: calls.set("a", {"x": [1, None]}),
        lambda calls: calls.set("new", 1.5),
        lambda calls: calls.set("new", 1.5, ttl=60),
        lambda calls: calls.set("new", 1.5, ttl=0),
        lambda calls: calls.set("new", float("nan")),
        lambda calls: calls.set("x" * 1025, 1),
        lambda calls: calls.set(5, 1),
    ],
    "set_many": [
        lambda calls: calls.set_many({"a": 9, "new": {"y": 1}}),
        lambda calls: calls.set_many({"a": 9, "new": 1}, ttl=timedelta(minutes=1)),
        lambda calls: calls.set_many({"a": 9, "bad": object()}),
        lambda calls: calls.set_many([("a", 1)]),
    ],
    "touch": [
        lambda calls: calls.touch("a", 5),
        lambda calls: calls.touch("nope", 5),
        lambda calls: calls.touch("a", 0),
    ],
    "delete": [lambda calls: calls.delete("a"), lambda calls: calls.delete("nope")],
    "delete_many": [lambda calls: calls.delete_many(["a", "nope", "n"]), lambda calls: calls.delete_many("abc")],
    "delete_all": [lambda calls: calls.delete_all(), lambda calls: calls.delete_all("users/")],
    "pop": [lambda calls: calls.pop("b"), lambda calls: calls.pop("nope"), lambda calls: calls.pop("b", type=int)],
    "update": [
        lambda calls: calls.update("n", lambda n: n * 2, type=int),
        lambda calls: calls.update("new", lambda n: [*n, 1], []),
        lambda calls: calls.update("nope", lambda n: n),
        lambda calls: calls.update("b", lambda n: n.append(1)),
        lambda calls: calls.update("n", lambda n: n + 1, ttl=60),
        lambda calls: calls.update("new", lambda n: n + 1, 0, ttl=60),
        lambda calls: calls.update("n", lambda n: n + 1, ttl=0),
    ],
    "get_or_set": [
        lambda calls: calls.get_or_set("a", dict),
        lambda calls: calls.get_or_set("new", lambda: User(1), type=User, ttl=60),
        lambda calls: calls.get_or_set("new", dict, type=int),
    ],
    "set_if_absent": [
        lambda calls: calls.set_if_absent("a", 2),
        lambda calls: calls.set_if_absent("new", 2, ttl=60),
    ],
    "incr": [
        lambda calls: calls.incr("n"),
        lambda calls: calls.incr("new", 0.5, default=1, ttl=60),
        lambda calls: calls.incr("b"),
        lambda calls: calls.incr("n", type=int),
        lambda calls: calls.incr("n", 0.5, type=int),
    ],
}
"""Each call, as it is made of a manager and of a transaction."""

DURABILITY = {"catch_up", "flush", "wait_durable", "wait_revision"}


def coroutine_functions(cls: type) -> set[str]:
    return {name for name, fn in vars(cls).items() if name[0] != "_" and inspect.iscoroutinefunction(fn)}


def test_a_transaction_has_every_call() -> None:
    """Every call of a manager that reads or writes is one of a transaction too, and is tried below."""
    calls = coroutine_functions(Calls) | coroutine_functions(Writing) | coroutine_functions(Reads)
    lifted = {name for cls in (Plain, Transaction) for name in vars(cls) if name[0] != "_"}
    assert lifted - {"items", "namespace", "revision"} == calls - DURABILITY  # for `items`, see test_plain_items.py
    assert SAME.keys() == calls - DURABILITY
    assert not any(hasattr(Transaction, name) for name in DURABILITY)


STORES = {"set", "set_many"}
"""The calls that return a revision."""


async def outcome(call: Callable[[Any], Any], calls: Any) -> tuple[object, ...]:
    """Return what a call gave, or how it failed."""
    try:
        result = call(calls)
        return (await result if inspect.isawaitable(result) else result,)
    except Exception as error:  # noqa: BLE001 -- it is compared
        return type(error), str(error), getattr(error, "path", None)


@pytest.mark.parametrize("name", SAME)
async def test_each_call_is_that_of_the_manager(name: str, clock: ManualClock, in_role: InRole) -> None:
    """It gives the same result or error, and leaves the same behind, for every key and its time."""
    for call in SAME[name]:
        async with (
            running(MemoryStorage(), clock, make=in_role) as one,
            running(MemoryStorage(), clock, make=in_role) as other,
        ):
            await one.set_many(BEFORE)
            await other.set_many(BEFORE)
            expected = await outcome(call, one)
            left = await one.get_all(), len(one), {key: await one.expires_in(key) for key in await one.keys()}
            async with other.transaction() as tx:
                # The revision of a write is not known before the commit.
                assert await outcome(call, tx) == ((None,) if (name in STORES and len(expected) == 1) else expected)
                assert (tx.get_all(), len(tx), {key: tx.expires_in(key) for key in left[0]}) == left
            assert (await other.get_all(), other.revision) == (left[0], one.revision)
            assert {key: await other.expires_in(key) for key in left[0]} == left[2]


async def test_reads_see_the_changes_made_so_far(state: Manager) -> None:
    """Those of the transaction see them at once, and give fresh values; those of the manager see what was before."""
    given = [1]
    async with state.transaction() as tx:
        tx.set("a", given)
        given.append(2)
        tx.get("a").append(3)
        tx.delete("b")
        tx.incr("n")
        assert (tx.get("a"), tx.get("n"), tx.exists("b"), "b" in tx, "a" in tx) == ([1], 6, False, False, True)
        assert len(tx) == len(BEFORE) - 1
        assert await state.get_all() == BEFORE
        assert (state.get_nowait("a"), state.revision, len(state), await state.exists("b")) == (1, 1, 5, True)
    assert await state.get_all() == {**{key: BEFORE[key] for key in BEFORE if key != "b"}, "a": [1], "n": 6}


async def test_all_its_changes_have_one_revision(state: Manager) -> None:
    """The writes of a transaction make one revision, which is durable when all of them are."""
    async with state.transaction() as tx:
        tx.set("a", 1)
        tx.set("b", 2, ttl=5)
        tx.set_many({"c": 3})
        tx.namespace("x").set("y", 1)
        assert state.revision == 1
    assert tx.revision == tx.namespace("x").revision == state.revision == 2
    await state.flush()
    await state.wait_durable(tx.revision)


async def test_nothing_changed_makes_no_revision(state: Manager) -> None:
    """Reading, deleting what is not there, and what was only ever in the transaction make none."""
    async with state.transaction() as tx:
        tx.get("a")
    async with state.transaction() as tx:
        tx.delete("nope")
        tx.set("new", 1)
        tx.delete("new")
    assert state.revision == 1


async def test_delete_all_then_set(state: Manager) -> None:
    """Everything of before goes, and what is set afterwards stays; under a prefix, only that."""
    async with state.transaction() as tx:
        tx.set("c", 1)
        assert tx.delete_all("users/") == 2
        tx.set("users/eve", 1)
        assert tx.keys("users/") == ["users/eve"]
        assert tx.delete_all() == 5
        assert (len(tx), tx.get("a", None)) == (0, None)
        tx.set("a", 2)
    assert (await state.get_all(), state.revision) == ({"a": 2}, 2)
    await state.stop()
    await state.start()
    assert await state.get_all() == {"a": 2}


async def test_an_empty_transaction_is_true(state: Manager) -> None:
    """Without a key in it, as a manager is."""
    async with state.transaction() as tx:
        tx.delete_all()
        assert len(tx) == 0
        assert tx


async def test_str_subclasses_are_plain_keys(state: Manager) -> None:
    """A key of a subclass of str is stored as the str that it is."""

    class Name(str):
        __slots__ = ()

    async with state.transaction() as tx:
        tx.set(Name("key"), 1)
        tx.namespace("x").set(Name("key"), 1)
    assert {type(key) for key in await state.keys()} == {str}


async def test_a_refused_value_changes_nothing_else(state: Manager) -> None:
    """The transaction goes on after an error that its body catches."""
    async with state.transaction() as tx:
        tx.set("a", 2)
        with pytest.raises(InvalidValueError):
            tx.set("a", float("inf"))
        with pytest.raises(TypeMismatchError):
            tx.incr("b")
        with pytest.raises(KeyNotFoundError):
            tx.get("nope")
        for key in ("", "x" * 1025, "$lab_state", "a\0", 5):
            with pytest.raises(InvalidKeyError):
                tx.set(key, 1)  # type: ignore[arg-type]
    assert (await state.get("a"), state.revision) == (2, 2)


# Under a prefix


async def test_a_transaction_of_a_namespace_is_narrowed(state: Manager) -> None:
    """It is the manager's transaction, with keys under the prefix only."""
    async with state.namespace("users").transaction() as tx:
        assert (len(tx), sorted(tx.keys()), "ann" in tx, "a" in tx) == (2, ["ann", "bob"], True, False)
        tx.set("eve", 1)
        assert tx.delete_all() == 3
        tx.set("ann", 2)
        with pytest.raises(InvalidKeyError):
            tx.set("x" * 1019, 1)
    assert await state.get_all() == {"a": 1, "b": [2], "n": 5, "users/ann": 2}


async def test_a_namespace_of_a_transaction_is_the_same_transaction(state: Manager) -> None:
    """What is changed through either is seen by both, and is one revision; names nest."""
    async with state.transaction() as tx:
        users = tx.namespace("users")
        assert users.get("ann") == {"age": 30}
        users.set("ann", 1)
        users.namespace("deep").set("x", 2)
        tx.set("users/bob", 3)
        assert tx.get_all("users/") == {"users/ann": 1, "users/deep/x": 2, "users/bob": 3}
        assert users.get_all() == {"ann": 1, "deep/x": 2, "bob": 3}
        for name in ("", "a\0", "x" * 1024):
            with pytest.raises(InvalidKeyError):
                tx.namespace(name)
        with pytest.raises(TypeError):
            tx.namespace(5)  # type: ignore[arg-type]
    assert state.revision == 2
    assert await state.get("users/deep/x") == 2


# All or nothing


@pytest.mark.parametrize("error", [StopItError, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
async def test_an_exception_drops_everything(state: Manager, error: type[BaseException]) -> None:
    """It goes on, nothing was changed, and the next transaction begins."""
    with pytest.raises(error):
        async with state.transaction() as tx:
            tx.set("a", 2)
            tx.delete_all()
            raise error
    assert (await state.get_all(), state.revision) == (BEFORE, 1)
    async with state.transaction() as tx:
        tx.set("a", 3)
    assert await state.get("a") == 3


class Steps:
    """An awaitable that takes a turn of the loop for each of its steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __await__(self) -> Any:
        for _ in range(self.steps):
            yield


@pytest.mark.parametrize("flush_interval", [None, 0])
async def test_cancelled_anywhere_it_is_all_or_nothing(clock: ManualClock, flush_interval: float | None) -> None:
    """At every turn of the loop, waiting its turn, open, or being written: no half is left, and no lock."""
    seen = set[tuple[str, int]]()
    for turns in range(1000):
        async with running(MemoryStorage(), clock, flush_interval) as state:
            async with state.transaction():
                task = outside(_transfer(state))
                for _ in range(min(turns, 5)):
                    await asyncio.sleep(0)
                if turns < 5:
                    task.cancel()
            for _ in range(turns - 5):
                await asyncio.sleep(0)
            finished = task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            found = await state.get_all()
            assert found in ({}, {"a": 1, "b": 2})
            assert state.revision == (1 if found else 0)
            seen.add(("finished" if finished else "cancelled", len(found)))
            async with state.transaction() as tx:
                assert tx.get_all() == found
            await state.set("free", True)
        if finished:
            break
    written_when_cancelled = {("cancelled", 2)} if flush_interval == 0 else set()
    assert seen == {("cancelled", 0), ("finished", 2)} | written_when_cancelled


async def _transfer(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.set("a", 1)
        await Steps(3)
        tx.set("b", 2)


async def test_after_a_crash_it_is_all_or_nothing(clock: ManualClock) -> None:
    """One record holds it all: wherever a crash cuts the journal, all of it is there or none."""
    memory = MemoryStorage()
    async with running(memory, clock) as state:
        await state.set_many(BEFORE)
        await state.flush()
        place = memory.places["test"]
        assert place.journal is not None
        before, flushes = len(place.journal), state.status().flushes
        async with state.transaction() as tx:
            tx.set("a", [1] * 10)
            tx.delete("b")
            tx.set("c", 3, ttl=60)
            tx.namespace("users").delete_all()
        after = await state.get_all()
        await state.flush()
        assert state.status().flushes == flushes + 1
        data = bytes(place.journal)
    assert data[before:].count(b"\n") == 1
    for end in range(before, len(data) + 1):
        crashed = MemoryStorage()
        crashed.places["test"] = type(place)()
        crashed.places["test"].journal = bytearray(data[:end])
        async with running(crashed, clock) as state:
            assert await state.get_all() == (after if end == len(data) else BEFORE)
            assert state.revision == (2 if end == len(data) else 1)


async def test_a_flush_meanwhile_writes_nothing_of_it(state: Manager, storage: FaultyStorage) -> None:
    """What is durable is what is in the state; the transaction is not yet."""
    async with state.transaction() as tx:
        tx.set("a", 2)
        await state.flush()
        assert (state.durable_revision, state.status().unflushed_keys) == (1, 0)
        calls = len(storage.calls)
        await state.flush()
        assert len(storage.calls) == calls
    assert state.status().unflushed_keys == 1


# One at a time


async def test_transactions_come_one_at_a_time_in_order(state: Manager) -> None:
    """Each sees what the one before left, and they begin in the order in which they came."""
    log: list[str] = []

    async def one(number: int) -> None:
        async with state.transaction() as tx:
            log.append(f"in {number}")
            value = tx.get("n")
            await Steps(number % 3)
            tx.set("n", value + 1)
            log.append(f"out {number}")

    await asyncio.gather(*(one(number) for number in range(20)))
    assert log == [f"{way} {number}" for number in range(20) for way in ("in", "out")]
    assert (await state.get("n"), state.revision) == (25, 21)


async def test_waiters_take_turns_in_the_order_in_which_they_came(state: Manager) -> None:
    """Writers and transactions alike."""
    log: list[str] = []

    async def write(name: str) -> None:
        def logged(_: object) -> str:
            log.append(name)
            return name

        await state.update("b", logged)

    async def transact(name: str) -> None:
        async with state.transaction() as tx:
            log.append(name)
            await Steps(3)
            tx.set("b", name)

    async with state.transaction():
        for name, call in (("1", write), ("2", transact), ("3", write), ("4", write), ("5", transact)):
            outside(call(name))
            await asyncio.sleep(0)
        await idle()
        assert log == []
    await until(lambda: len(log) == 5)
    assert log == ["1", "2", "3", "4", "5"]


WRITES: dict[str, Callable[[Any], Any]] = {
    "set": lambda calls: calls.set("k", 1),
    "set a list": lambda calls: calls.set("k", [1]),
    "set with ttl": lambda calls: calls.set("k", 1, ttl=5),
    "set_many": lambda calls: calls.set_many({"k": 1}),
    "set_many with ttl": lambda calls: calls.set_many({"k": 1}, ttl=5),
    "delete": lambda calls: calls.delete("a"),
    "delete_many": lambda calls: calls.delete_many(["a", "k"]),
    "touch": lambda calls: calls.touch("a", 5),
    "delete_all": lambda calls: calls.delete_all(),
    "delete_all under a prefix": lambda calls: calls.delete_all("a"),
    "pop": lambda calls: calls.pop("a"),
    "update": lambda calls: calls.update("a", lambda a: a + 1),
    "get_or_set": lambda calls: calls.get_or_set("k", dict),
    "set_if_absent": lambda calls: calls.set_if_absent("k", 1),
    "incr": lambda calls: calls.incr("n"),
}
"""Each call that writes, as it is made of the manager, a namespace, and `blocking`."""


def test_every_writing_call_is_among_those_below() -> None:
    """So that none is forgotten that might write beside a transaction."""
    assert {name.split()[0] for name in WRITES} == (
        coroutine_functions(Calls) | coroutine_functions(Writing)
    ) - DURABILITY


async def in_a_thread(call: Callable[[Any], R], state: Manager) -> R:
    """Call through `blocking`, in a thread that knows of no transaction."""
    return await asyncio.get_running_loop().run_in_executor(None, call, state.blocking)


def of_a_namespace(call: Callable[[Any], Coroutine[Any, Any, R]], state: Manager) -> Coroutine[Any, Any, R]:
    return call(state.namespace("x"))


WAYS: dict[str, Callable[[Manager], Coroutine[Any, Any, object]]] = {
    **WRITES,
    **{f"{name} of a namespace": partial(of_a_namespace, call) for name, call in WRITES.items()},
    **{f"{name} in a thread": partial(in_a_thread, call) for name, call in WRITES.items()},
    "set of an entry": lambda state: state.entry("n", int).set(1),
    "set of an entry with ttl": lambda state: state.entry("n", int).set(1, ttl=5),
    "update of an entry": lambda state: state.entry("n", int).update(lambda n: n + 1),
    "incr of an entry": lambda state: state.entry("n", int).incr(),
    "pop of an entry": lambda state: state.entry("n", int).pop(),
    "set_if_absent of an entry": lambda state: state.entry("k", int).set_if_absent(1),
    "touch of an entry": lambda state: state.entry("n", int).touch(5),
    "delete of an entry": lambda state: state.entry("n", int).delete(),
    "set of a nested entry": lambda state: state.namespace("x").entry("n", int).set(1),
    "update of a nested entry": lambda state: state.namespace("x").entry("n", int).update(lambda n: n + 1),
    "delete of a nested entry": lambda state: state.namespace("x").entry("n", int).delete(),
    "a transaction": lambda state: transact(state),
    "a transaction of a namespace": lambda state: transact(state.namespace("x")),
}
"""Every way to write."""


async def transact(scope: Manager | Namespace) -> None:
    async with scope.transaction() as tx:
        tx.set("n", 1)


@pytest.fixture
async def full(state: Manager) -> Manager:
    """Return a manager in which each of them changes something; at revision 2."""
    await state.set_many({"x/a": 1, "x/n": 5})
    return state


@pytest.mark.parametrize("way", WAYS)
async def test_a_writer_waits_for_an_open_transaction(full: Manager, way: str) -> None:
    """Whichever way it comes; it changes what the transaction left."""
    async with full.transaction() as tx:
        before = await full.get_all()
        task = outside(WAYS[way](full))
        await until(lambda: waiters(full) or task.done())
        await idle()
        assert not task.done()
        assert (await full.get_all(), full.revision) == (before, 2)
        tx.set("left", 1)
    await task
    assert full.revision == 4
    assert await full.exists("left") is (way not in {"delete_all", "delete_all in a thread"})
    assert waiters(full) == 0


@pytest.mark.parametrize("way", WAYS)
async def test_a_writer_that_finds_no_transaction_open_takes_no_lock(full: Manager, way: str) -> None:
    """A write costs no lock where none is needed; a transaction takes it."""
    lock = full._core._lock
    await lock.acquire()
    task = asyncio.create_task(WAYS[way](full))
    await until(lambda: waiters(full) or task.done())
    assert task.done() is not way.startswith("a transaction")
    lock.release()
    await task
    assert full.revision == 3


READS: dict[str, Callable[[Any], Any]] = {
    "get": lambda calls: calls.get("a"),
    "get_many": lambda calls: calls.get_many(["a", "n"]),
    "get_all": lambda calls: calls.get_all(),
    "check": lambda calls: calls.check(type=str),
    "exists": lambda calls: calls.exists("a"),
    "keys": lambda calls: calls.keys(),
    "expires_in": lambda calls: calls.expires_in("a"),
    "flush": lambda calls: calls.flush(),
    "wait_durable": lambda calls: calls.wait_durable(1),
    "catch_up": lambda calls: calls.catch_up(),
    "wait_revision": lambda calls: calls.wait_revision(1),
}


def test_every_reading_call_is_among_those_above() -> None:
    """And what waits for durability."""
    assert READS.keys() == coroutine_functions(Reads) | DURABILITY


@pytest.mark.parametrize("name", READS)
async def test_readers_never_wait(full: Manager, name: str) -> None:
    """From outside and from inside they read what was before; flushing waits for no transaction either."""
    await full.flush()
    expected = await READS[name](full)
    async with full.transaction() as tx:
        tx.delete_all()
        tx.set("a", 0, ttl=5)
        assert await READS[name](full) == expected
        assert await outside(READS[name](full)) == expected
        assert await outside(in_a_thread(READS[name], full)) == expected
        assert await asyncio.to_thread(READS[name], full.blocking) == expected
        assert await full.entry("a", int).get() == 1
        assert await full.namespace("x").get("a") == 1
        assert (len(full), "b" in full) == (7, True)


# From inside


@pytest.mark.parametrize("way", WAYS)
async def test_a_write_from_inside_is_an_error(full: Manager, way: str) -> None:
    """It would wait for itself: so it says, in the task of the transaction and in its child tasks."""
    async with full.transaction() as tx:
        tx.set("left", 1)
        if not way.endswith("in a thread"):
            with pytest.raises(RuntimeError, match="a transaction of 'test' is open here"):
                await WAYS[way](full)
            with pytest.raises(RuntimeError, match="call the transaction itself, or leave it first"):
                await asyncio.create_task(WAYS[way](full))
        else:
            with pytest.raises(RuntimeError, match="a transaction of 'test' is open here"):
                await asyncio.to_thread(WRITES[way.removesuffix(" in a thread")], full.blocking)
        assert waiters(full) == 0
    assert await full.get_all() == {**BEFORE, "x/a": 1, "x/n": 5, "left": 1}
    assert full.revision == 3


async def test_a_child_task_that_outlives_its_transaction_merely_waits(state: Manager) -> None:
    """It is inside no more: neither is its write refused, nor that during the next transaction."""
    go = [asyncio.Event(), asyncio.Event()]

    async def child() -> None:
        for event in go:
            await event.wait()
            await state.incr("n")

    async with state.transaction():
        task = asyncio.create_task(child())
        await idle()
    go[0].set()
    await until(lambda: state.get_nowait("n") == 6)
    async with AsyncExitStack() as stack:
        tx = await outside(stack.enter_async_context(state.transaction()))
        go[1].set()
        await until(lambda: waiters(state))
        assert not task.done()
        tx.set("n", 10)
    await task
    assert await state.get("n") == 11


async def test_transactions_of_two_managers_nest(state: Manager, clock: ManualClock) -> None:
    """Each is inside of its own, and each has its own changes; neither may be entered again."""
    async with running(MemoryStorage(), clock) as other:
        async with state.transaction() as tx:
            await other.set("a", 1)
            async with other.transaction() as inner:
                tx.set("a", 2)
                inner.set("a", 3)
                for manager in (state, other):
                    with pytest.raises(RuntimeError, match="is open here"):
                        await manager.set("a", 4)
                    with pytest.raises(RuntimeError, match="is open here"):
                        await transact(manager)
            await other.set("b", 5)
            with pytest.raises(RuntimeError, match="is open here"):
                await state.set("b", 5)
            assert await other.get_all() == {"a": 3, "b": 5}
        await state.set("b", 6)
        assert (await state.get("a"), await state.get("b")) == (2, 6)


# The end


@pytest.mark.parametrize("how", ["left", "dropped"])
@pytest.mark.parametrize("name", [*SAME, "len", "in"])
async def test_every_call_after_the_end_is_an_error(state: Manager, name: str, how: str) -> None:
    """RuntimeError, of keys that it had, of those of the state and of new ones, through its namespaces too."""
    with suppress(StopItError):
        async with state.transaction() as tx:
            tx.set("k", 1)
            tx.set("a", 1)
            nested = tx.namespace("users")
            nested.set("ann", 1)
            if how == "dropped":
                raise StopItError
    before = await state.get_all()
    special: dict[str, list[Callable[[Any], Any]]] = {
        "len": [len],
        "in": [lambda tx: "a" in tx],
        "set": [lambda tx: tx.set("k", 1), lambda tx: tx.set("a", 1), lambda tx: tx.set("ann", 1, ttl=1)],
        "get": [lambda tx: tx.get("a"), lambda tx: tx.get("k", None), lambda tx: tx.get("nope", 1)],
        "get_many": [lambda tx: tx.get_many(["a"]), lambda tx: tx.get_many(["nope"])],
    }
    calls = special.get(name) or SAME[name][:2]
    for call in calls:
        for over in (tx, nested):
            with pytest.raises(RuntimeError, match="this transaction of 'test' is over: begin another one"):
                call(over)
    async with state.transaction():
        for call in calls:
            with pytest.raises(RuntimeError, match="this transaction of 'test' is over"):
                call(tx)
    assert await state.get_all() == before


async def test_entering_and_leaving_in_different_tasks(state: Manager) -> None:
    """It is held by no task: another one may leave it, and neither of them is inside afterwards."""
    stack = AsyncExitStack()
    tx = await stack.enter_async_context(state.transaction())
    tx.set("a", 2)
    with pytest.raises(RuntimeError, match="is open here"):
        await state.set("a", 3)
    await outside(stack.aclose())
    assert await state.get("a") == 2
    await state.set("a", 3)
    await transact(state)
    other = AsyncExitStack()
    await outside(other.enter_async_context(state.transaction()))
    waiting = asyncio.create_task(state.set("a", 4))  # this task was inside of the first one only
    await until(lambda: waiters(state) or waiting.done())
    assert not waiting.done()
    await other.aclose()
    await waiting
    assert await state.get("a") == 4


# The life of the manager


async def test_entering_needs_a_running_manager(memory: MemoryStorage, clock: ManualClock) -> None:
    """Before start and after stop: ClosedError, of a namespace too."""
    state = Manager("test", memory, clock=clock)
    for _ in range(2):
        for scope in (state, state.namespace("x")):
            with pytest.raises(ClosedError):
                await transact(scope)
        async with state:
            await transact(state)


@pytest.mark.parametrize("inside", [True, False])
async def test_a_stop_ends_an_open_transaction(
    state: Manager,
    memory: MemoryStorage,
    clock: ManualClock,
    inside: bool,  # noqa: FBT001 -- a parameter
) -> None:
    """Leaving it raises ClosedError and changes nothing; so do those who wait, at once, and none of them hangs."""

    async def body() -> None:
        async with state.transaction() as tx:
            tx.set("a", 2)
            tasks = [outside(WAYS[way](state)) for way in ("set", "a transaction", "incr in a thread", "a transaction")]
            await until(lambda: waiters(state) == 4)
            await (state.stop() if inside else outside(state.stop()))
            for call in (
                lambda: tx.get("a"),
                lambda: tx.get("nope"),
                lambda: tx.get_all(),
                lambda: tx.set("new", 1),
                lambda: tx.delete("a"),
                lambda: len(tx),
            ):
                with pytest.raises(ClosedError):
                    call()
            results.extend(await asyncio.gather(*tasks, return_exceptions=True))
        raise AssertionError

    results: list[object] = []
    with pytest.raises(ClosedError):
        await body()
    assert [type(result) for result in results] == [ClosedError] * 4
    assert "was stopped while" in str(results[1])
    async with running(memory, clock) as again:
        assert (await again.get_all(), again.revision) == (BEFORE, 1)


async def test_a_transaction_of_an_earlier_start_does_not_touch_the_next_one(state: Manager) -> None:
    """A manager that was stopped and started meanwhile is another one: nothing is changed, no lock is let go."""
    stack = AsyncExitStack()
    old = await outside(stack.enter_async_context(state.transaction()))
    old.set("a", 2)
    await state.stop()
    await state.start()
    async with state.transaction() as tx:
        tx.set("b", 3)
        for call in (lambda: old.set("new", 1), lambda: old.get("nope"), lambda: old.delete("a"), lambda: len(old)):
            with pytest.raises(RuntimeError, match="is over"):
                call()
        with pytest.raises(ClosedError):
            await stack.aclose()
        task = outside(state.set("c", 4))
        await until(lambda: waiters(state) or task.done())
        assert not task.done()
    await task
    assert (await state.get("a"), await state.get("b")) == (1, 3)


def test_a_transaction_belongs_to_the_loop_of_the_start(memory: MemoryStorage, clock: ManualClock) -> None:
    """Entering on another event loop is RuntimeError, and so is writing in another thread."""
    state, entered = Manager("test", memory, clock=clock), list[Transaction]()

    async def enter() -> None:
        async with state.transaction() as tx:
            entered.append(tx)
            with pytest.raises(RuntimeError):
                await asyncio.to_thread(tx.set, "new", 1)

    with asyncio.Runner() as runner, asyncio.Runner() as other:
        runner.run(state.start())
        with pytest.raises(RuntimeError, match=r"belongs to the event loop that start\(\) ran on"):
            other.run(enter())
        assert not entered
        runner.run(enter())
        assert len(entered) == 1
        assert state.revision == 0
        runner.run(state.stop())


def test_each_start_has_a_lock_of_its_own(memory: MemoryStorage, clock: ManualClock) -> None:
    """Transactions wait for one another on whichever event loop the manager was started last."""
    state = Manager("test", memory, clock=clock)

    async def life() -> None:
        async with state:
            await asyncio.gather(*(_count(state) for _ in range(3)))

    for _ in range(2):
        asyncio.run(life())
    assert state.revision == 6


async def test_nothing_is_kept_of_a_transaction_that_is_over(state: Manager) -> None:
    """A task that has made many is inside of none."""
    async with state.transaction():
        assert len(_INSIDE.get()) == 1
    assert _INSIDE.get() == ()


# Durability


async def test_leaving_returns_when_it_is_durable(storage: FaultyStorage, clock: ManualClock) -> None:
    """With a flush_interval of 0; the next one is let in before that, and reads see it at once."""
    async with running(storage, clock, 0) as state:
        await state.set("n", 0)
        storage.hang("commit")
        first = asyncio.create_task(_count(state))
        await until(lambda: state.get_nowait("n") == 1)
        second = asyncio.create_task(_count(state))
        third = asyncio.create_task(state.incr("n"))
        await until(lambda: state.get_nowait("n") == 3)
        await idle()
        assert not any(task.done() for task in (first, second, third))
        assert state.durable_revision == 1
        storage.resume()
        await asyncio.gather(first, second, third)
        assert state.durable_revision == 4


async def _count(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.incr("n")
        await asyncio.sleep(0)


async def test_reading_alone_waits_for_no_write(storage: FaultyStorage, clock: ManualClock, in_role: InRole) -> None:
    """With a flush_interval of 0, leaving without a change writes nothing."""
    async with running(storage, clock, 0, make=in_role) as state:
        async with state.transaction() as tx:
            tx.get("a", None)
            tx.delete("a")
        assert "commit" not in storage.calls


async def test_a_flush_that_fails_is_told_at_leaving(storage: FaultyStorage, clock: ManualClock) -> None:
    """The changes stay, are retried, and no caller has to wait for the lock."""
    async with running(storage, clock, 0) as state:
        storage.fail("commit")
        with pytest.raises(UnavailableError, match="not durable yet"):
            await _count(state)
        assert (await state.get("n"), state.durable_revision) == (1, 0)
        assert waiters(state) == 0
        await _count(state)
        assert (await state.get("n"), state.durable_revision) == (2, 2)


async def test_a_stop_while_it_is_being_written_makes_it_durable(
    storage: FaultyStorage, memory: MemoryStorage, clock: ManualClock
) -> None:
    """Leaving has made the change already: it returns, and a restart finds it."""
    async with running(storage, clock, 0) as state:
        storage.hang("commit")
        task = asyncio.create_task(_count(state))
        await until(lambda: "commit" in storage.calls)
        stop = asyncio.create_task(state.stop())
        await idle()
        storage.resume()
        await asyncio.gather(task, stop)
    async with running(memory, clock) as state:
        assert await state.get("n") == 1


# Views beneath


@pytest.mark.parametrize("freeze", [0, 1, 2])
@pytest.mark.parametrize("fold", [1, 2, 3])
async def test_a_view_may_come_and_go_meanwhile(state: Manager, freeze: int, fold: int) -> None:
    """A view is taken before, at the beginning or later, and folded in then or afterwards: the results are the same."""
    beneath, view = state._core.state, dict[str, Any]()

    def moment(number: int) -> None:
        nonlocal view
        if freeze == number:
            view = beneath.freeze()
        if freeze < fold == number:
            while beneath.fold(view, 1):
                pass

    moment(0)
    await state.set("before", 1)
    async with state.transaction() as tx:
        moment(1)
        tx.set("a", 2)
        tx.set("new", 3)
        expected = {**BEFORE, "before": 1, "a": 2, "new": 3}
        assert tx.get_all() == expected
        moment(2)
        tx.delete("b")
        tx.set("before", 4)
        del expected["b"]
        expected["before"] = 4
        assert (tx.get_all(), len(tx)) == (expected, len(expected))
    assert await state.get_all() == expected
    moment(3)
    assert isinstance(beneath.entries, Overlay) is (freeze >= fold)
    assert (await state.get_all(), len(state)) == (expected, len(expected))


async def test_a_checkpoint_runs_beside_it(state: Manager, storage: FaultyStorage, memory: MemoryStorage) -> None:
    """It begins, takes its view, and ends while the transaction is open; both are whole."""
    await state.set_many({f"key {n}": "x" * 1000 for n in range(100)})
    async with state.transaction() as tx:
        tx.set("key 1", "mine")
        await state.flush()
        await until(lambda: isinstance(state._core.state.entries, Overlay))
        tx.delete("key 2")
        assert (tx.get("key 1"), tx.exists("key 2"), len(tx)) == ("mine", False, 104)
        await until(lambda: not isinstance(state._core.state.entries, Overlay))
        assert (tx.get("key 1"), tx.exists("key 2"), len(tx)) == ("mine", False, 104)
        tx.set("key 3", "mine too")
    assert storage.calls.count("checkpoint") == 1
    expected = {**BEFORE, **{f"key {n}": "x" * 1000 for n in range(100)}, "key 1": "mine", "key 3": "mine too"}
    del expected["key 2"]
    assert await state.get_all() == expected
    await state.stop()
    await state.start()
    assert await state.get_all() == expected


# What expires


async def test_a_time_to_live_begins_in_the_transaction(state: Manager, clock: ManualClock) -> None:
    """It counts from the call, through the commit and a restart; what was set again without one stays."""
    async with state.transaction() as tx:
        tx.set("a", 2, ttl=10)
        tx.set_many({"b": 3, "k": 4}, ttl=timedelta(seconds=10))
        tx.set("k", 5)
        clock.advance(3)
        assert tx.expires_in("a") == 7
        assert tx.expires_in("k") is None
        assert tx.incr("a") == 3
        assert tx.expires_in("a") == 7
    assert await state.expires_in("a") == 7
    await state.stop()
    await state.start()
    clock.advance(6.5)
    assert await state.get_many(["a", "b", "k"]) == {"a": 3, "b": 3, "k": 5}
    clock.advance(0.5)
    assert await state.get_many(["a", "b", "k"]) == {"k": 5}


async def test_what_expires_meanwhile_is_gone_and_swept_afterwards(state: Manager, clock: ManualClock) -> None:
    """At once from every read, inside and outside; the sweep waits for the end, and leaves what was set again."""
    await state.set_many({"short": 1, "again": 2}, ttl=5)
    async with state.transaction() as tx:
        tx.set("mine", 3, ttl=5)
        tx.set("again", 4)
        assert len(tx) == len(BEFORE) + 3
        clock.advance(60)
        assert (tx.get("short", None), tx.exists("mine"), "short" in tx, len(tx)) == (
            None,
            False,
            False,
            len(BEFORE) + 1,
        )
        assert sorted(tx.keys()) == sorted([*BEFORE, "again"])
        assert tx.delete_many(["short", "mine"]) == 0
        assert tx.set_if_absent("mine", 5)
        assert (len(state), "short" in state, state.revision) == (len(BEFORE), False, 2)
        assert "short" in state._core.state.entries
    assert await state.get_all() == {**BEFORE, "again": 4, "mine": 5}
    clock.advance(2)
    assert "short" not in state._core.state.entries
    assert (await state.get_all(), state.revision) == ({**BEFORE, "again": 4, "mine": 5}, 4)


# Those who watch


async def test_those_who_watch_are_told_at_the_end(state: Manager) -> None:
    """Nothing while it is open or when it is dropped; then each key once, with the one revision."""
    async with state.watch() as changes, state.namespace("users").watch() as users:
        with suppress(StopItError):
            async with state.transaction() as tx:
                tx.set("a", 0)
                raise StopItError
        async with state.transaction() as tx:
            tx.set("a", 2)
            tx.set("a", 3, ttl=5)
            tx.delete("b")
            tx.set("new", 1)
            tx.delete("new")
            tx.namespace("users").set("eve", 1)
            first = asyncio.ensure_future(anext(changes))
            await idle()
            assert not first.done()
        told = {await first, *[await anext(changes) for _ in range(2)]}
        assert told == {Change("a", "set", 2), Change("b", "delete", 2), Change("users/eve", "set", 2)}
        assert await anext(users) == Change("eve", "set", 2)
        async with state.transaction() as tx:
            tx.delete_all()
            tx.set("a", 4)
        told = {await anext(changes) for _ in range(5)}
        gone = {Change(key, "delete", 3) for key in ("n", "users/ann", "users/bob", "users/eve")}
        assert told == {Change("a", "set", 3), *gone}
        await state.stop()
        assert [change async for change in changes] == []


async def test_a_thread_of_its_own_merely_waits(state: Manager) -> None:
    """A raw thread does not know that it was started inside: its write waits, and comes after."""
    thread = threading.Thread(target=state.blocking.set, args=("n", 7), daemon=True)
    async with state.transaction() as tx:
        thread.start()
        await until(lambda: waiters(state))
        tx.set("n", 6)
    await until(lambda: not thread.is_alive())
    assert await state.get("n") == 7


async def test_who_waited_at_a_stop_does_not_write_into_the_next_start(state: Manager) -> None:
    """However many waited for the transaction: each is told that it is over, and the next one is alone."""
    stack = AsyncExitStack()
    await outside(stack.enter_async_context(state.transaction()))
    tasks = [outside(state.incr("n")) for _ in range(200)]
    await until(lambda: waiters(state) == 200)
    await state.stop()
    await state.start()
    before = state.revision
    async with state.transaction():
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert state.revision == before
    assert {type(result) for result in results} == {ClosedError}
    with pytest.raises(ClosedError):
        await stack.aclose()


def abandoned(*calls: Callable[[Manager], Coroutine[Any, Any, object]]) -> tuple[Manager, MemoryStorage, list[object]]:
    """Return a manager whose event loop was closed during these calls, without a cancellation."""
    loop, memory = asyncio.new_event_loop(), MemoryStorage()
    state = Manager(Config(name="test", flush_interval=None), memory)
    loop.run_until_complete(state.start())
    loop.run_until_complete(state.set("n", 1))
    tasks: list[object] = []
    for call in calls:
        tasks.append(loop.create_task(call(state)))
        loop.run_until_complete(idle())
    loop.close()
    return state, memory, tasks


async def hold(state: Manager) -> None:
    async with state.transaction():
        await asyncio.Event().wait()


async def count(state: Manager) -> None:
    await state.incr("n")


async def wait_durable(state: Manager) -> None:
    await state.wait_durable()


@pytest.mark.filterwarnings("ignore")  # tasks that were pending when their loop was closed
@pytest.mark.parametrize("calls", [(), (wait_durable,), (hold, count), (hold, hold)])
def test_a_stop_after_a_loop_that_was_closed(
    calls: tuple[Callable[[Manager], Coroutine[Any, Any, object]], ...],
) -> None:
    """stop() on another loop flushes what the closed one left, whichever calls waited on it; a start goes on from there."""
    state, memory, tasks = abandoned(*calls)
    asyncio.run(state.stop())
    assert (state.status().phase, state.durable_revision) == ("stopped", 1)
    assert memory.places["test"].session is None

    async def again() -> object:
        async with state:
            return await state.get("n")

    assert asyncio.run(again()) == 1
    tasks.clear()
    gc.collect()  # they complain of their end here, and in no other test
