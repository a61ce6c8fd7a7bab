"""The plain twins of reading calls, and of the writes that only touch memory."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from pathlib import Path
from typing import Any

import msgspec
import pytest
from roles import InRole
from running import idle, running

from lab_state import (
    ClosedError,
    Config,
    Entry,
    FencedError,
    FileStorage,
    Manager,
    MemoryStorage,
    Namespace,
    UnavailableError,
)
from lab_state.testing import FaultyStorage, ManualClock

BEFORE = {"a": 1, "b": [2], "n": 5, "users/ann": {"age": 30}}
KEYS = [*BEFORE, "new"]


class User(msgspec.Struct):
    age: int


Call = Callable[[Any, str], Any]

READS: dict[str, list[Call]] = {
    "get": [
        lambda calls, nowait: getattr(calls, f"get{nowait}")("b"),
        lambda calls, nowait: getattr(calls, f"get{nowait}")("users/ann", type=User),
        lambda calls, nowait: getattr(calls, f"get{nowait}")("nope", 7),
        lambda calls, nowait: getattr(calls, f"get{nowait}")("nope"),
        lambda calls, nowait: getattr(calls, f"get{nowait}")("a", type=str),
        lambda calls, nowait: getattr(calls, f"get{nowait}")("a", int),
    ],
    "get_many": [
        lambda calls, nowait: getattr(calls, f"get_many{nowait}")(["n", "nope", "a"], type=int),
        lambda calls, nowait: getattr(calls, f"get_many{nowait}")("abc"),
    ],
    "get_all": [
        lambda calls, nowait: getattr(calls, f"get_all{nowait}")(),
        lambda calls, nowait: getattr(calls, f"get_all{nowait}")("users/", type=User),
        lambda calls, nowait: getattr(calls, f"get_all{nowait}")(type=int),
    ],
    "keys": [
        lambda calls, nowait: getattr(calls, f"keys{nowait}")("users/"),
        lambda calls, nowait: getattr(calls, f"keys{nowait}")(5),
    ],
    "expires_in": [
        lambda calls, nowait: getattr(calls, f"expires_in{nowait}")("a"),
        lambda calls, nowait: getattr(calls, f"expires_in{nowait}")("nope"),
        lambda calls, nowait: getattr(calls, f"expires_in{nowait}")("nope", 0.0),
    ],
}

WRITES: dict[str, list[Call]] = {
    "set": [
        lambda calls, nowait: getattr(calls, f"set{nowait}")("a", {"x": [1, None]}),
        lambda calls, nowait: getattr(calls, f"set{nowait}")("new", 1.5, ttl=60),
        lambda calls, nowait: getattr(calls, f"set{nowait}")("new", {"x": [float("nan")]}),
        lambda calls, nowait: getattr(calls, f"set{nowait}")("new", 1, ttl=0),
        lambda calls, nowait: getattr(calls, f"set{nowait}")("new", 1, ttl="1"),
        lambda calls, nowait: getattr(calls, f"set{nowait}")("x" * 1025, 1),
        lambda calls, nowait: getattr(calls, f"set{nowait}")(5, 1),
    ],
    "delete": [
        lambda calls, nowait: getattr(calls, f"delete{nowait}")("a"),
        lambda calls, nowait: getattr(calls, f"delete{nowait}")("nope"),
        lambda calls, nowait: getattr(calls, f"delete{nowait}")(""),
    ],
    "update": [
        lambda calls, nowait: getattr(calls, f"update{nowait}")("n", lambda n: n * 2, type=int),
        lambda calls, nowait: getattr(calls, f"update{nowait}")("new", lambda n: [*n, 1], [], ttl=5),
        lambda calls, nowait: getattr(calls, f"update{nowait}")("nope", lambda n: n),
        lambda calls, nowait: getattr(calls, f"update{nowait}")("n", lambda n: n // 0),
        lambda calls, nowait: getattr(calls, f"update{nowait}")("b", lambda n: n.append(1)),
        lambda calls, nowait: getattr(calls, f"update{nowait}")("n", 5),
    ],
}

CALLS = {**READS, **WRITES}
"""Each call, as it is made of a manager: with `""` to be awaited, with `"_nowait"` at once."""


@pytest.fixture
async def state(storage: FaultyStorage, clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    async with running(storage, clock, make=in_role) as manager:
        await manager.set_many(BEFORE)
        yield manager


async def outcome(call: Callable[[], Any]) -> tuple[object, ...]:
    """Return what a call gave, or how it failed."""
    try:
        result = call()
        return (await result if inspect.isawaitable(result) else result,)
    except Exception as error:  # noqa: BLE001 -- it is compared
        return type(error), str(error), getattr(error, "path", None)


def test_the_twins() -> None:
    """Each call with `_nowait` has a twin to be awaited, with the same arguments, and is tried here."""
    for cls in (Manager, Namespace):
        twins = {name.removesuffix("_nowait") for name in dir(cls) if name.endswith("_nowait") and name[0] != "_"}
        assert twins == CALLS.keys()
        for name in twins:
            plain, awaited = getattr(cls, f"{name}_nowait"), getattr(cls, name)
            assert inspect.signature(plain) == inspect.signature(awaited)
            assert not inspect.iscoroutinefunction(plain)
            assert inspect.iscoroutinefunction(awaited)
    twins = {name.removesuffix("_nowait") for name in dir(Entry) if name.endswith("_nowait") and name[0] != "_"}
    assert twins == {"get", "set", "update", "delete", "expires_in"}
    for name in twins:
        assert inspect.signature(getattr(Entry, f"{name}_nowait")) == inspect.signature(getattr(Entry, name))


@pytest.mark.parametrize("name", CALLS)
async def test_it_does_what_its_twin_does(name: str, clock: ManualClock) -> None:
    """The same result or error, and the same keys, times, revision and counts afterwards."""
    for call in CALLS[name]:
        async with running(MemoryStorage(), clock) as one, running(MemoryStorage(), clock) as other:
            await one.set_many(BEFORE)
            await other.set_many(BEFORE)
            expected = await outcome(lambda call=call: call(one, ""))  # type: ignore[misc]
            assert await outcome(lambda call=call: call(other, "_nowait")) == expected  # type: ignore[misc]
            assert await other.get_all() == await one.get_all()
            assert [other.expires_in_nowait(key, 0) for key in KEYS] == [one.expires_in_nowait(key, 0) for key in KEYS]
            assert other.revision == one.revision
            assert other.metrics() == one.metrics()


async def test_in_a_namespace(state: Manager) -> None:
    """Keys leave the prefix out."""
    users = state.namespace("users")
    assert users.get_many_nowait(["ann", "a"]) == users.get_all_nowait() == {"ann": {"age": 30}}
    assert users.keys_nowait() == ["ann"]
    assert users.set_nowait("bob", 1, ttl=5) == 2
    assert users.expires_in_nowait("bob") == 5
    assert users.update_nowait("bob", lambda n: n + 1) == 2
    assert users.delete_nowait("ann") is True
    assert (state.get_nowait("users/bob"), "users/ann" in state, "a" in state) == (2, False, True)


async def test_of_an_entry(state: Manager) -> None:
    """With its type and its default."""
    entry = state.entry("user", User, default=User(1))
    assert entry.get_nowait() == User(1)
    assert entry.expires_in_nowait(-1.0) == -1.0
    assert entry.update_nowait(lambda user: User(user.age + 1)) == User(2)
    assert entry.set_nowait(User(3), ttl=5) == 3
    assert (entry.get_nowait(), entry.expires_in_nowait()) == (User(3), 5)
    assert entry.update_nowait(lambda user: user, ttl=9) == User(3)
    assert entry.expires_in_nowait() == 9
    assert entry.delete_nowait() is True


async def test_from_a_callback(state: Manager) -> None:
    """Synchronous code on the event loop, in no task."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[int] = loop.create_future()
    loop.call_soon(lambda: done.set_result(state.set_nowait("a", 2)))
    assert await done == 2
    assert state.get_nowait("a") == 2


async def test_it_becomes_durable_as_after_set(storage: FaultyStorage, clock: ManualClock) -> None:
    """With the next flush in the background, and those who watch are told."""
    async with running(storage, clock, 1.0) as state, state.watch() as changes:
        assert state.set_nowait("a", 1) == 1
        assert state.update_nowait("a", lambda a: a + 1) == 2
        assert state.delete_nowait("a") is True
        assert (await anext(changes)).revision == 3
        assert (state.durable_revision, state.status().unflushed_keys) == (0, 1)
        await idle()
        clock.advance(1.0)
        await state.wait_durable()
        assert state.durable_revision == 3


async def test_a_function_of_update_that_changes_its_own_key(state: Manager) -> None:
    """Its result is stored last; what it changes elsewhere stays."""

    def twice(n: int) -> int:
        state.set_nowait("n", 100)
        state.set_nowait("other", 1)
        return n * 2

    assert await state.update("n", twice) == state.get_nowait("n") == 10
    assert state.update_nowait("n", twice) == state.get_nowait("n") == 20
    assert state.get_nowait("other") == 1
    assert await state.get_or_set("new", lambda: state.set_nowait("new", 100)) == state.get_nowait("new")


# Where it would have to wait


async def unchanged(state: Manager) -> None:
    assert (await state.get_all(), state.revision) == (BEFORE, 1)


@pytest.mark.parametrize("name", WRITES)
async def test_where_each_write_waits_until_it_is_durable(
    name: str, storage: FaultyStorage, clock: ManualClock
) -> None:
    """With a flush_interval of 0: RuntimeError that says what to do, and nothing changes."""
    async with running(storage, clock, 0) as state:
        await state.set_many(BEFORE)
        with pytest.raises(
            RuntimeError, match=rf"{name}_nowait\(\) cannot wait until its change is durable.*await {name}\(\)"
        ):
            WRITES[name][0](state, "_nowait")
        await unchanged(state)


@pytest.mark.parametrize("name", WRITES)
async def test_while_a_transaction_is_open(state: Manager, name: str) -> None:
    """RuntimeError, from inside it and from elsewhere; the transaction goes on, and afterwards the write works."""
    expected = rf"{name}_nowait\(\) cannot wait until the open transaction of 'test' is over: await {name}\(\)"

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match=expected):
            WRITES[name][0](state, "_nowait")

    async with state.transaction() as tx:
        tx.set("tx", 1)
        with pytest.raises(RuntimeError, match=expected):
            WRITES[name][0](state, "_nowait")
        await asyncio.create_task(elsewhere(), context=Context())
        await unchanged(state)
    assert state.revision == 2
    WRITES[name][0](state, "_nowait")
    assert state.revision == 3


@pytest.mark.parametrize("name", WRITES)
async def test_on_another_thread(state: Manager, name: str) -> None:
    """RuntimeError that names `blocking`, with and without an event loop of its own there."""
    expected = rf"{name}_nowait\(\) belongs to the event loop that .* 'test' was started on: .* blocking\.{name}\(\)"

    async def on_a_loop() -> None:
        WRITES[name][0](state, "_nowait")

    with pytest.raises(RuntimeError, match=expected):
        await asyncio.to_thread(WRITES[name][0], state, "_nowait")
    with pytest.raises(RuntimeError, match=expected):
        await asyncio.to_thread(asyncio.run, on_a_loop())
    await unchanged(state)


@pytest.mark.parametrize("name", CALLS)
async def test_before_the_start_and_after_the_stop(name: str, memory: MemoryStorage, clock: ManualClock) -> None:
    """ClosedError, as from the twin."""
    state = Manager("test", memory, clock=clock)
    for _ in range(2):
        with pytest.raises(ClosedError):
            CALLS[name][0](state, "_nowait")
        async with state:
            pass


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("interval", [None, 0])
async def test_when_a_newer_writer_owns_the_state(
    name: str, storage: FaultyStorage, clock: ManualClock, interval: float | None
) -> None:
    """FencedError whatever the flush_interval is, and nothing changes."""
    state = Manager(Config("test", flush_interval=interval), storage, clock=clock)
    await state.start()
    await state.set_many(BEFORE)
    storage.fail("commit", error=FencedError("a newer writer owns it"), times=99)
    with pytest.raises(FencedError):
        await state._core.durability.confirm_ownership()
    with pytest.raises(FencedError, match="nothing was changed"):
        WRITES[name][0](state, "_nowait")
    await unchanged(state)
    with pytest.raises(FencedError):
        await state.stop()


@pytest.mark.parametrize("name", WRITES)
async def test_without_the_flush_task(state: Manager, name: str) -> None:
    """UnavailableError, as from the twin, when other code has cancelled the flush task."""
    for task in asyncio.all_tasks():
        if "flush" in task.get_name():
            task.cancel()
    await idle()
    with pytest.raises(UnavailableError, match="nothing was changed"):
        WRITES[name][0](state, "_nowait")
    await unchanged(state)


async def test_a_shared_state_has_no_write_without_waiting(tmp_path: Path) -> None:
    """In a shared state, each write has to wait. The error names the call that waits, and no setting, since there is no other one."""
    async with Manager(Config("a", shared=True), FileStorage(tmp_path)) as state:
        with pytest.raises(RuntimeError, match=r"\(its flush_interval is 0\): await set\(\)$"):
            state.set_nowait("key", 1)
        assert state.revision == 0
