"""The calls of one process of a shared state: in the owner, in a follower, and across the end of an owner."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
from msgspec import Raw
from port_world import TIMEOUT, Process, World, begun, noted, started, world_of
from running import idle, running, until

from lab_state import (
    ClosedError,
    ConflictError,
    InvalidKeyError,
    InvalidValueError,
    MemoryStorage,
    StorageError,
    Transaction,
    UnavailableError,
    UnsupportedError,
    WaitTimeoutError,
)
from lab_state.exceptions import CorruptionError, FencedError
from lab_state.handles import Scope
from lab_state.shared import _frames, _port
from lab_state.shared._answers import Refusal, Settled
from lab_state.shared._bodies import ReadAt
from lab_state.shared._messages import Changes, Delete, MakeChanges, Set
from lab_state.testing import FaultyStorage, ManualClock

Shared = tuple[World, Process, Process]


@pytest.fixture
async def shared(storage: FaultyStorage, clock: ManualClock) -> AsyncIterator[Shared]:
    async with world_of(storage, clock) as found:
        yield found


@pytest.fixture(params=["owner", "follower"])
async def process(shared: Shared, request: pytest.FixtureRequest) -> Process:
    """Return the owner, and in a second run of the test the follower."""
    _, owner, follower = shared
    return owner if request.param == "owner" else follower


async def outcome_of(work: Awaitable[Any]) -> tuple[type[BaseException] | None, str]:
    """Return the class and the text of the error of a call, or its result."""
    try:
        return None, repr(await work)
    except Exception as error:  # noqa: BLE001 -- the tests compare the errors
        return type(error), str(error)


async def pay(scope: Scope) -> Any:
    def move(tx: Transaction) -> int:
        tx.incr("n", -1)
        return tx.incr("paid", 1, type=int)

    return await scope.transact(move)


def double(n: int) -> int:
    return n * 2


def failing(_: object) -> Any:
    raise ZeroDivisionError("no")


# The same results and errors as in a state that is not shared

CALLS: dict[str, Callable[[Scope], Awaitable[Any]]] = {
    "set": lambda s: s.set("new", {"a": 1}),
    "set with a ttl": lambda s: s.set("new", 1, ttl=5),
    "set_many": lambda s: s.set_many({"a": 1, "b": [2]}),
    "set_many of nothing": lambda s: s.set_many({}),
    "set_many with a ttl": lambda s: s.set_many({"a": 1}, ttl=5),
    "set_many of many": lambda s: s.set_many(dict.fromkeys(map(str, range(1000)), 1)),
    "touch": lambda s: s.touch("text", 5),
    "touch of a missing key": lambda s: s.touch("missing", 5),
    "delete": lambda s: s.delete("text"),
    "delete of a missing key": lambda s: s.delete("missing"),
    "delete_many": lambda s: s.delete_many(["text", "n", "missing", "n"]),
    "delete_many of one": lambda s: s.delete_many(["text"]),
    "delete_many of nothing": lambda s: s.delete_many([]),
    "delete_many of many": lambda s: s.delete_many([*map(str, range(1000)), "text"]),
    "delete_all": lambda s: s.delete_all(),
    "delete_all of a prefix": lambda s: s.delete_all("t"),
    "delete_all of an impossible prefix": lambda s: s.delete_all("\ud800"),
    "set_if_absent": lambda s: s.set_if_absent("new", "x", ttl=5),
    "set_if_absent of a key that exists": lambda s: s.set_if_absent("text", "x"),
    "incr": lambda s: s.incr("n", 2),
    "incr of a missing key": lambda s: s.incr("new", 0.5, type=float, default=1, ttl=5),
    "incr of a large number": lambda s: s.incr("n", 2**70),
    "incr with a type that is code": lambda s: s.incr("n", 1, type=cast("Any", int | None)),
    "incr of a text": lambda s: s.incr("text"),
    "incr of a text with a type": lambda s: s.incr("text", type=int),
    "incr that makes another type": lambda s: s.incr("n", 0.5, type=int),
    "incr beyond all numbers": lambda s: s.incr("large", 1.7e308),
    "incr of a large int": lambda s: s.incr("huge", 0.5),
    "update": lambda s: s.update("n", double, type=int),
    "update of a missing key": lambda s: s.update("missing", lambda n: n),
    "update with a default": lambda s: s.update("new", lambda n: n + 1, 5, ttl=5),
    "update that raises": lambda s: s.update("n", failing),
    "update without a return": lambda s: s.update("n", lambda _: None),
    "update of another type": lambda s: s.update("text", double, type=int),
    "pop": lambda s: s.pop("text"),
    "pop of a missing key": lambda s: s.pop("missing"),
    "pop with a default": lambda s: s.pop("missing", 7),
    "pop of another type": lambda s: s.pop("text", type=int),
    "get_or_set": lambda s: s.get_or_set("new", lambda: [1], ttl=5),
    "get_or_set of a key that exists": lambda s: s.get_or_set("text", lambda: 1),
    "get_or_set of another type": lambda s: s.get_or_set("text", lambda: 1, type=int),
    "transact": pay,
    "set of a bad key": lambda s: s.set("", 1),
    "set of a bad value": lambda s: s.set("a", object()),
    "touch of a bad key": lambda s: s.touch("\0", 5),
    "delete of a bad key": lambda s: s.delete("a\0"),
    "incr of a bad key": lambda s: s.incr("x" * 2000),
    "incr by a text": lambda s: s.incr("n", cast("Any", "1")),
    "pop of a bad key": lambda s: s.pop("\ud800"),
    "pop with a class": lambda s: s.pop("missing", int),
    "update of a bad key": lambda s: s.update("", lambda n: n),
    "update of a bad type": lambda s: s.update("n", double, type=cast("Any", 5)),
    "get_or_set of a bad key": lambda s: s.get_or_set("", lambda: 1),
}


@pytest.mark.parametrize("prefix", ["", "ns"])
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_has_the_outcome_that_it_has_in_a_state_that_is_not_shared(
    process: Process, shared: Shared, clock: ManualClock, name: str, prefix: str
) -> None:
    """The result, the class and the text of an error, and the state after the call are the same."""
    values = {"text": "x", "n": 5, "large": 1.7e308, "huge": 10**400}
    plain = FaultyStorage(type(shared[0].storage._inner)())
    async with running(plain, clock, flush_interval=0) as manager:
        alone: Scope = manager.namespace(prefix) if prefix else manager
        with_others: Scope = process.namespace(prefix) if prefix else process.calls
        seen: list[Any] = []
        for scope in (alone, with_others):
            await scope.set_many(values)
            found = await outcome_of(CALLS[name](scope))
            after = {key: value async for key, value in scope.items()}
            times = {key: await scope.expires_in(key) for key in after}
            seen.append((found, after, times))
        assert seen[0] == seen[1]


async def test_arguments_are_checked_without_an_owner(shared: Shared) -> None:
    """A wrong key, type, default or value is an error at once, while there is no owner."""
    world, _, follower = shared
    await world.kill()
    scope = follower.calls
    for bad in (
        scope.pop("", 1),
        scope.pop("a", int),
        scope.update("a", double, type=cast("Any", 5)),
        scope.update("\0", lambda n: n),
        scope.get_or_set("", int),
        scope.incr("a", 1, type=cast("Any", 5)),
        scope.incr("", 1),
        scope.set("", 1),
        scope.set_if_absent("", 1),
        scope.set("a", {1, object()}),
        scope.touch("", 1),
        scope.delete(""),
        scope.set_many({"a": object()}),
    ):
        task = started(bad)
        await idle()
        with pytest.raises((TypeError, InvalidKeyError, InvalidValueError)):
            task.result()
    assert follower.port.is_idle


async def test_nothing_is_written_without_waiting(process: Process) -> None:
    """Each write has to wait until its change is durable."""
    with pytest.raises(RuntimeError, match="cannot wait until its change is durable"):
        process.calls.set_nowait("a", 1)


# Durable, and in the copy


async def test_a_write_returns_when_it_is_durable_and_in_the_copy(process: Process, shared: Shared) -> None:
    """While the commit hangs, no process shows the change."""
    world, owner, follower = shared
    world.storage.hang("commit")
    task = await begun(process.calls.set("a", 1))
    assert "a" not in owner.calls
    world.storage.resume()
    assert await task == 1
    assert process.calls.get_nowait("a") == 1
    await idle()
    assert (owner.copy.revision, follower.copy.revision) == (1, 1)


async def test_a_call_that_changes_nothing_waits_for_what_it_saw(process: Process, shared: Shared) -> None:
    """What the call saw must not be lost with its owner."""
    world, owner, follower = shared
    other = follower if process is owner else owner
    world.storage.hang("commit")
    first = await begun(other.calls.set("a", 1))
    tasks = [
        await begun(process.calls.set_if_absent("a", 2)),
        await begun(process.calls.delete("missing")),
        await begun(process.calls.pop("missing", None)),
    ]
    world.storage.resume()
    assert await asyncio.gather(*tasks) == [False, False, None]
    assert process.copy.revision == 1
    await first


async def test_the_owner_builds_the_index_in_steps(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first `delete_all` of a prefix sorts all keys, and the event loop runs meanwhile."""
    _, owner, _ = shared
    assert await owner.calls.keys() == []
    await owner.calls.set_many(dict.fromkeys(map(str, range(3000)), 1))
    states = []
    original = type(owner.copy).index_steps

    def steps(state: Any) -> Any:
        for _ in original(state):
            states.append(state)
            yield

    monkeypatch.setattr(type(owner.copy), "index_steps", steps)
    assert await owner.calls.delete_all("1") == 1111
    assert states
    assert set(states) == {owner.copy}


async def test_a_call_that_is_too_large_is_refused_in_each_role(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is that of the message, and is exact. Nothing was changed."""
    for module in (_port, _frames):
        monkeypatch.setattr(module, "MOST_BYTES", 2000)
    text = "é" * 300
    assert await process.calls.set("k" * 300, text) == 1  # the first estimate is above the bound
    with pytest.raises(InvalidValueError, match="larger than the 2000"):
        await process.calls.set("a", "é" * 1000)
    with pytest.raises(InvalidValueError, match="larger than the 2000"):
        await process.calls.delete_many(["x" * 900, "y" * 900, "z" * 900])
    assert (process.copy.revision, process.port.is_idle) == (1, True)


# The window


async def test_numbers_rise_in_the_order_of_the_calls(shared: Shared) -> None:
    """Calls that are made together leave together, in order."""
    _, _, follower = shared
    assert follower.pipe is not None
    pipe = follower.pipe
    await asyncio.gather(*(follower.calls.set(f"k{n}", n) for n in range(5)))
    assert [(call.n, call.ack, call.key) for call in pipe.sent if isinstance(call, Set)] == [
        (n + 1, 0, f"k{n}") for n in range(5)
    ]
    await follower.calls.delete("k0")
    last = pipe.sent[-1]
    assert isinstance(last, Delete)
    assert (last.n, last.ack) == (6, 5)


async def test_a_call_beyond_the_window_waits_for_room(shared: Shared) -> None:
    """At most 1,024 numbers are open. An answer makes room."""
    world, owner, follower = shared
    world.storage.hang("commit")
    tasks = [started(follower.calls.set(str(n), n)) for n in range(1030)]
    await idle()
    assert follower.pipe is not None
    assert len(follower.pipe.sent) == 1024
    world.storage.resume()
    await asyncio.gather(*tasks)
    assert len(owner.calls) == 1030
    assert follower.port.is_idle


async def test_a_call_that_was_given_up_makes_room(shared: Shared, clock: ManualClock) -> None:
    """The calls that wait for room are sent, although no answer came."""
    _, _, follower = shared
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    first = [started(follower.calls.set(str(n), n)) for n in range(1024)]
    await idle()
    clock.advance(TIMEOUT)
    late = await begun(follower.calls.set("late", 1))
    follower.port.give_up(0.0, "of a test")
    await idle()
    assert len(follower.pipe.sent) == 1025
    follower.pipe.release()
    await late
    assert all(isinstance(error, UnavailableError) for error in await asyncio.gather(*first, return_exceptions=True))


# Errors of a commit


@pytest.mark.parametrize("kind", [UnavailableError, UnsupportedError, StorageError])
async def test_a_failed_commit_has_the_error_of_the_owner(
    shared: Shared, kind: type[StorageError], process: Process
) -> None:
    """Each caller gets an error of its own, of the same class."""
    world, owner, _ = shared
    world.storage.hang("commit")
    world.storage.fail("commit", error=kind("the disk is full"))
    first = await begun(owner.calls.set("first", 1))
    calls = process.calls
    tasks = [started(work) for work in (calls.set("a", 1), calls.incr("n"), calls.pop("x", 1), calls.pop("x", 2))]
    await idle()
    world.storage.resume()
    await first
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in found] == [kind] * 4
    assert all(str(error).startswith("the disk is full") for error in found)
    assert len({id(error) for error in found}) == 4


# The end of an owner


async def other_owner(world: World) -> Process:
    """Let another process become the owner."""
    process = Process(world, "other")
    await world.own(process)
    return process


async def test_a_call_without_an_owner_waits_for_one(shared: Shared) -> None:
    """Calls of each kind are made when there is an owner again. Reads go on."""
    world, _, follower = shared
    await follower.calls.set_many({"a": 1, "b": 2, "c": 3})
    await world.kill()
    calls = follower.calls
    tasks = [
        await begun(work)
        for work in (
            *(calls.set("x", 1), calls.incr("a"), calls.update("b", lambda n: n * 10), calls.pop("c")),
            *(calls.delete("missing"), pay(calls)),
        )
    ]
    assert await calls.get_or_set("a", lambda: 7) == 1
    assert await calls.get("a") == 1
    await other_owner(world)
    world.connect(follower)
    assert (await asyncio.gather(*tasks))[1:] == [2, 20, 3, False, 1]
    assert await calls.get_all() == {"a": 2, "b": 20, "x": 1, "n": -1, "paid": 1}


@pytest.mark.parametrize("moment", ["before it comes", "before it is durable", "before it is answered"])
async def test_a_call_is_applied_once_across_the_end_of_an_owner(shared: Shared, moment: str) -> None:
    """It has the result of its one application."""
    world, owner, follower = shared
    pipe = follower.pipe
    assert pipe is not None
    pipe.to_owner.held = moment == "before it comes"
    pipe.to_client.held = moment == "before it is answered"
    if moment == "before it is durable":
        world.storage.hang("commit")
    tasks = [await begun(follower.calls.incr("n", 5)), await begun(follower.calls.update("m", lambda n: n + 5, 0))]
    assert owner.copy.revision == (2 if moment == "before it is answered" else 0)
    await world.kill()
    world.storage.resume()
    new = await other_owner(world)
    world.connect(follower)
    assert await asyncio.gather(*tasks) == [5, 5]
    assert await new.calls.get_all() == {"n": 5, "m": 5}


@pytest.mark.parametrize("moment", ["before it comes", "before it is durable", "before it is answered"])
async def test_the_next_owner_is_its_own_first_client(shared: Shared, moment: str) -> None:
    """It looks its open calls up in the table of results, and executes the others."""
    world, _, follower = shared
    pipe = follower.pipe
    assert pipe is not None
    pipe.to_owner.held = moment == "before it comes"
    pipe.to_client.held = moment == "before it is answered"
    if moment == "before it is durable":
        world.storage.hang("commit")
    tasks = [
        await begun(follower.calls.incr("n", 5)),
        await begun(follower.calls.update("m", lambda n: n + 5, 0)),
        await begun(follower.calls.transact(lambda tx: tx.incr("t"))),
    ]
    await world.kill()
    tasks.append(await begun(follower.calls.catch_up()))
    world.storage.resume()
    await world.own(follower)
    assert await asyncio.gather(*tasks) == [5, 5, 1, None]
    assert await follower.calls.get_all() == {"n": 5, "m": 5, "t": 1}
    assert follower.port.is_idle


async def test_a_planned_end_moves_the_calls_to_the_next_owner(shared: Shared) -> None:
    """A call that came too late was certainly not applied. Its check stays valid."""
    world, owner, follower = shared
    assert owner.flusher is not None
    owner.flusher.engine.is_ending = True
    ran: list[Any] = []
    tasks = [
        await begun(follower.calls.incr("n")),
        await begun(follower.calls.update("m", lambda n: noted(ran, n) + 1, 0)),
    ]
    await world.end()
    await other_owner(world)
    world.connect(follower)
    assert await asyncio.gather(*tasks) == [1, 1]
    assert ran == [0]


async def test_a_check_that_is_sent_again_runs_again(shared: Shared) -> None:
    """What it has read may have been lost with its owner. A transaction has a conflict."""
    world, _, follower = shared
    world.storage.hang("commit")
    ran: list[Any] = []
    update = await begun(follower.calls.update("m", lambda n: noted(ran, n) + 1, 0))

    async def once() -> None:
        async with follower.calls.transaction() as tx:
            tx.incr("t")

    conflict = await begun(once())
    await world.kill()
    world.storage.resume()
    await other_owner(world)
    world.connect(follower)
    assert await update == 1
    assert ran == [0, 0]
    with pytest.raises(ConflictError):
        await conflict


async def test_a_refusal_of_an_earlier_connection_proves_nothing(shared: Shared) -> None:
    """What it has shown may be lost. So the new owner refuses the check, although nothing has changed since."""
    world, _, follower = shared
    await follower.calls.set("a", 1)
    await world.kill()
    await world.own(follower)
    changes = Changes(set={"a": Raw(b"2")})
    earlier = follower.port.calls.connection - 1
    refused = await follower.port.send_change("a", ReadAt(1, earlier), changes, 0, 0.0)
    assert refused == Refusal(1, {"a": 1}, earlier + 1)
    assert await follower.port.send_change("a", ReadAt(1, earlier + 1), changes, 0, 0.0) == Settled(2, b"null")


async def test_a_call_that_is_given_up_before_it_is_sent_again(shared: Shared, clock: ManualClock) -> None:
    """It stays unknown, and is not sent."""
    world, _, follower = shared
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    task = await begun(follower.calls.incr("n"))
    follower.pipe.cut()
    clock.advance(TIMEOUT)
    pipe = world.connect(follower)
    pipe.flow()  # the welcome has come
    follower.port.give_up(0.0, "of a test")
    with pytest.raises(UnavailableError) as caught:
        await task
    await idle()
    assert (caught.value.outcome, pipe.sent) == ("unknown", [])


async def test_a_client_that_was_forgotten_does_not_know_the_outcome(shared: Shared, clock: ManualClock) -> None:
    """Calls that were sent end as "unknown". Others are made by the next connection, under a new id."""
    world, _, follower = shared
    await follower.calls.set("a", 1)
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    sent = await begun(follower.calls.incr("n"))
    follower.pipe.cut()
    new = await begun(follower.calls.incr("n"))
    clock.advance(60)
    assert world.owner is not None
    assert world.owner.flusher is not None
    world.owner.flusher.engine.forget_gone()
    before = follower.port.client
    world.connect(follower)
    with pytest.raises(UnavailableError, match="has forgotten this process") as caught:
        await sent
    assert caught.value.outcome == "unknown"
    assert follower.port.client != before
    world.connect(follower)
    assert await new == 2


async def test_a_new_owner_that_slept_does_not_apply_its_calls_twice(shared: Shared, clock: ManualClock) -> None:
    """After a minute the calls that it had sent are "unknown" for itself, too."""
    world, _, follower = shared
    await follower.calls.set("a", 1)
    world.storage.hang("commit")
    sent = await begun(follower.calls.incr("n"))
    await world.kill()
    world.storage.resume()
    new = await begun(follower.calls.incr("n"))
    clock.advance(60)
    await world.own(follower)
    with pytest.raises(UnavailableError, match="has forgotten this process"):
        await sent
    assert await new == 1


async def test_an_answer_to_a_call_that_was_given_up_is_ignored(shared: Shared, clock: ManualClock) -> None:
    """Its outcome stays unknown."""
    _, owner, follower = shared
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    task = await begun(follower.calls.set("a", 1))
    clock.advance(TIMEOUT)
    follower.port.give_up(0.0, "its owner hangs")
    with pytest.raises(
        UnavailableError, match="because its owner hangs: the call was made once, or not at all"
    ) as caught:
        await task
    assert caught.value.outcome == "unknown"
    follower.pipe.release()
    await idle()
    assert owner.calls.get_nowait("a") == follower.calls.get_nowait("a") == 1


# Giving up


async def test_calls_are_given_up_after_the_time_limit(shared: Shared, clock: ManualClock) -> None:
    """The limit counts from the silence, or from the call if that was made later."""
    world, _, follower = shared
    calls, port = follower.calls, follower.port
    await world.kill()
    clock.advance(3)
    tasks = [
        await begun(work) for work in (calls.set("a", 1), calls.update("b", failing, 1), pay(calls), calls.catch_up())
    ]
    port.give_up(0.0, "no process owns the state")
    clock.advance(TIMEOUT - 0.5)
    port.give_up(0.0, "no process owns the state")
    await idle()
    assert not any(task.done() for task in tasks)
    late = await begun(calls.incr("n"))
    clock.advance(0.5)
    port.give_up(0.0, "no process owns the state")
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [UnavailableError] * 4
    assert [error.outcome for error in errors] == ["not made"] * 3 + [None]  # type: ignore[union-attr]
    assert all("no process owns the state" in str(error) for error in errors)
    assert not late.done()
    await world.own(follower)
    assert await late == 1
    assert await calls.get_all() == {"n": 1}


async def test_updates_that_waited_behind_one_that_is_given_up_end_too(shared: Shared, clock: ManualClock) -> None:
    """They do not wait for the time limit twice."""
    world, _, follower = shared
    await world.kill()
    first = await begun(follower.calls.update("a", lambda n: n, 1))
    clock.advance(1)
    second = await begun(follower.calls.update("a", lambda n: n, 1))
    clock.advance(TIMEOUT - 1)
    follower.port.give_up(0.0, "no process owns the state")
    await idle()
    assert (first.done(), second.done()) == (True, False)
    clock.advance(1)
    follower.port.give_up(0.0, "no process owns the state")
    await idle()
    for task in (first, second):
        with pytest.raises(UnavailableError) as caught:
            await task
        assert caught.value.outcome == "not made"
    assert follower.port.is_idle


async def test_a_call_that_changes_nothing_is_never_unknown(shared: Shared, clock: ManualClock) -> None:
    """It was sent, but it has no change that could have been made."""
    _, _, follower = shared
    await follower.calls.set("a", 1)
    assert follower.pipe is not None
    follower.pipe.to_client.held = True

    async def read() -> None:
        async with follower.calls.transaction() as tx:
            tx.get("a")

    tasks = [await begun(follower.calls.pop("missing", None)), await begun(read())]
    clock.advance(TIMEOUT)
    follower.port.give_up(0.0, "its owner hangs")
    for task in tasks:
        with pytest.raises(UnavailableError, match="the call was not made") as caught:
            await task
        assert caught.value.outcome == "not made"


# Cancelling


async def test_a_call_goes_on_without_its_caller(process: Process, shared: Shared) -> None:
    """A caller that is cancelled changes nothing, and `finish` waits for its call."""
    world, owner, _ = shared
    world.storage.hang("commit")
    tasks = [
        await begun(process.calls.set("a", 1)),
        await begun(process.calls.update("b", lambda n: n + 1, 0)),
        await begun(process.calls.incr("c")),
    ]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    world.storage.resume()
    await until(lambda: owner.copy.revision == 3)
    await process.calls.catch_up()
    assert await process.calls.get_all() == {"a": 1, "b": 1, "c": 1}


async def test_a_cancelled_call_that_fails_is_not_reported(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    """No caller looks at its error."""
    world, _, follower = shared
    world.storage.hang("commit")
    world.storage.fail("commit", error=StorageError("the disk is full"))
    tasks = [await begun(follower.calls.set("a", 1)), await begun(follower.calls.update("b", lambda n: n + 1, 0))]
    follower.port.give_up(-100.0, "of a test")
    for task in tasks:
        task.cancel()
    world.storage.resume()
    await asyncio.wait(tasks)
    await idle()
    assert "never retrieved" not in caplog.text


async def test_a_cancelled_transaction_may_be_committed(shared: Shared) -> None:
    """After its block was left, it goes on without its task."""
    world, owner, follower = shared
    world.storage.hang("commit")
    task = await begun(pay(follower.calls))
    task.cancel()
    await asyncio.wait([task])
    world.storage.resume()
    await until(lambda: owner.copy.revision == 1)
    assert await owner.calls.get("paid") == 1


# Transactions


async def test_a_transaction_holds_no_lock(process: Process) -> None:
    """A task that waits in it delays no other one, and may call the manager itself."""
    async with process.calls.transaction() as tx:
        tx.set("a", 1)
        await process.calls.set("b", 2)
        assert not process.core.must_wait
        with pytest.raises(RuntimeError, match="has no revision"):
            _ = tx.revision
        assert "open" in repr(tx)
    assert (tx.revision, process.calls.get_nowait("a"), "over" in repr(tx)) == (2, 1, True)


async def test_a_transaction_that_did_nothing_needs_no_owner(shared: Shared) -> None:
    """Its revision is that of its beginning."""
    world, _, follower = shared
    await follower.calls.set("a", 1)
    await world.kill()
    async with follower.calls.transaction() as tx:
        pass
    assert tx.revision == 1


async def test_a_transaction_that_only_reads_asks_the_owner(process: Process, shared: Shared) -> None:
    """What it has read is compared with changes that are not durable."""
    world, owner, _ = shared
    await owner.calls.set("a", 1)
    await process.calls.catch_up()
    world.storage.hang("commit")

    async def read() -> int:
        async with process.calls.transaction() as tx:
            tx.get("a")
        return tx.revision

    assert await read() == 1
    change = await begun(owner.calls.set("a", 2))
    conflict = await begun(read())
    world.storage.resume()
    with pytest.raises(ConflictError, match="was changed meanwhile"):
        await conflict
    await change
    assert await read() == 2


async def changing(process: Process, shared: Shared) -> tuple[World, asyncio.Task[Any]]:
    """Let the owner change `n` from 1 to 2. The process has the old value until the storage resumes, which commits the change."""
    world, owner, _ = shared
    await owner.calls.set("n", 1)
    await process.calls.catch_up()
    world.storage.hang("commit")
    return world, await begun(owner.calls.incr("n"))


async def test_transact_runs_again_after_a_change_of_another_process(process: Process, shared: Shared) -> None:
    """It does so even after a change that is not durable."""
    world, change = await changing(process, shared)
    seen: list[Any] = []

    def doubled(tx: Transaction) -> int:
        new: int = 2 * noted(seen, tx.get("n"))
        tx.set("n", new)
        return new

    task = await begun(process.calls.transact(doubled))
    world.storage.resume()
    assert await task == 4
    assert seen == [1, 2]
    await change


def tenfold(seen: list[Any], key: str = "n") -> Callable[[Transaction], int]:
    """Return a function for `transact` that notes what it reads."""

    def run(tx: Transaction) -> int:
        new: int = 10 * noted(seen, tx.get(key, 0))
        tx.set(key, new)
        return new

    return run


async def test_a_transaction_behind_a_change_that_cannot_be_stored(process: Process, shared: Shared) -> None:
    """The transaction was not made, and its error says so. It is no conflict: on a full disk, another attempt would be refused too."""
    world, owner, _ = shared
    await owner.calls.set("n", 1)
    await process.calls.catch_up()
    world.storage.fail("commit", times=2, error=StorageError("the disk is full"))
    with pytest.raises(StorageError, match="the disk is full"):
        await owner.calls.incr("n")
    with pytest.raises(UnavailableError, match="was not made: a change before it failed: the disk is full") as raised:
        async with process.calls.transaction() as tx:
            tenfold([])(tx)
    assert raised.value.outcome == "not made"
    assert await process.calls.transact(tenfold([])) == 20


async def test_transact_on_a_full_disk(process: Process, shared: Shared) -> None:
    """It raises the error of the disk, and does not try again and again."""
    world, owner, _ = shared
    await owner.calls.set("n", 1)
    await process.calls.catch_up()
    world.storage.fail("commit", times=2, error=StorageError("the disk is full"))
    with pytest.raises(StorageError, match="the disk is full"):
        await owner.calls.incr("n")
    seen: list[Any] = []
    with pytest.raises(StorageError, match="the disk is full"):
        await process.calls.transact(tenfold(seen))
    assert seen == [1, 2]


async def test_transact_runs_again_on_the_values_of_a_refusal(process: Process, shared: Shared) -> None:
    """The next attempt does not wait until the other change is durable. So a busy owner cannot refuse a follower again and again."""
    world, owner, _ = shared
    await owner.calls.set_many({"n": 1, "other": 1})
    await process.calls.catch_up()
    world.storage.hang("commit")
    change = await begun(owner.calls.incr("n"))
    seen: list[Any] = []
    task = await begun(process.calls.transact(tenfold(seen)))
    assert seen == [1, 2]
    world.storage.resume()
    assert (await change, await task) == (2, 20)


async def test_a_refusal_lacks_a_key(process: Process, shared: Shared) -> None:
    """If the next attempt reads another key, or lists keys, it begins with the copy, when the other change is durable."""
    world, owner, _ = shared
    for read, result in ((lambda tx: tx.get("other"), 5), (lambda tx: tx.keys("o"), ["other"])):
        await owner.calls.set_many({"n": 1, "other": 5})
        await process.calls.catch_up()
        world.storage.hang("commit")
        change = await begun(owner.calls.incr("n"))
        seen: list[Any] = []

        def run(tx: Transaction, seen: list[Any] = seen, read: Any = read) -> Any:
            if noted(seen, tx.get("n")) == 1:
                tx.set("n", 100)
                return None
            tx.set("n", 200)
            return read(tx)

        task = await begun(process.calls.transact(run))
        assert seen[:2] == [1, 2]
        world.storage.resume()
        await change
        assert await task == result
        assert seen[-1] == 2
        assert await process.calls.get("n") == 200


async def test_a_transaction_that_lists_keys_is_refused(process: Process, shared: Shared) -> None:
    """A refusal has no keys of a listing, so the next attempt begins with the copy."""
    world, owner, _ = shared
    await owner.calls.set("a/1", 1)
    await process.calls.catch_up()
    world.storage.hang("commit")
    change = await begun(owner.calls.set("a/2", 2))
    seen: list[Any] = []
    task = await begun(process.calls.transact(lambda tx: tx.set("n", len(noted(seen, tx.keys("a/"))))))
    world.storage.resume()
    await change
    await task
    assert seen == [["a/1"], ["a/1", "a/2"]]
    assert await process.calls.get("n") == 2


async def test_a_function_that_raises_on_values_that_are_not_durable(process: Process, shared: Shared) -> None:
    """The function is called again on durable values, and only the error of that call is raised."""
    world, change = await changing(process, shared)
    seen: list[Any] = []

    def refusing(tx: Transaction) -> None:
        value = noted(seen, tx.get("n"))
        tx.set("n", 100)
        if value == 2:
            raise ZeroDivisionError

    task = await begun(process.calls.transact(refusing))
    assert seen[:2] == [1, 2]
    world.storage.resume()
    await change
    with pytest.raises(ZeroDivisionError):
        await task
    assert await process.calls.get("n") == 2


async def test_the_next_attempt_may_change_nothing(process: Process, shared: Shared) -> None:
    """Then it begins with the copy once more, so what it returns is durable."""
    world, change = await changing(process, shared)
    seen: list[Any] = []

    def unless_two(tx: Transaction) -> Any:
        if noted(seen, tx.get("n")) != 2:
            tx.set("n", 100)
        return seen[-1]

    task = await begun(process.calls.transact(unless_two))
    assert seen[:2] == [1, 2]
    world.storage.resume()
    await change
    assert await task == 2
    assert seen[-1] == 2
    assert await process.calls.get("n") == 2


async def test_transact_raises_the_conflict_of_another_transaction(process: Process) -> None:
    """Only its own conflict lets it run again."""

    def raises(_: Transaction) -> None:
        raise ConflictError("of another state")

    with pytest.raises(ConflictError, match="of another state"):
        await process.calls.transact(raises)


async def test_an_exception_drops_the_changes(process: Process) -> None:
    """Nothing is sent."""
    with pytest.raises(ZeroDivisionError):
        async with process.calls.transaction() as tx:
            tx.set("a", 1)
            failing(tx)
    assert "a" not in process.calls
    with pytest.raises(RuntimeError, match="is over"):
        tx.get("a")


async def test_a_transaction_with_a_key_that_cannot_exist(process: Process) -> None:
    """A look at it is not sent: no process can change it."""
    async with process.calls.transaction() as tx:
        assert "" not in tx
        assert "\ud800" not in tx
        with pytest.raises(InvalidKeyError):
            tx.get("a\0", None)
        assert tx.keys("\ud800") == []
        tx.set("a", 1)
    assert await process.calls.get("a") == 1


async def test_a_check_leaves_out_keys_under_a_listed_prefix(shared: Shared) -> None:
    """The prefix covers them."""
    _, _, follower = shared
    await follower.calls.set_many({"u/1": 1, "u/2": 2, "v": 3})
    async with follower.calls.transaction() as tx:
        assert tx.get_all("u/") == {"u/1": 1, "u/2": 2}
        assert tx.get("v") == 3
    assert follower.pipe is not None
    sent = follower.pipe.sent[-1]
    assert isinstance(sent, MakeChanges)
    assert (sent.since, sent.keys, sent.prefixes) == (1, ["v"], ["u/"])


async def test_a_fenced_state_opens_no_transaction(shared: Shared) -> None:
    """The error of the beginning is that of each write."""
    _, owner, _ = shared
    owner.durability._refuse_from_now_on(FencedError("a newer writer owns the state"))
    with pytest.raises(FencedError):
        async with owner.calls.transaction():
            raise AssertionError


# Waiting for a revision


async def test_catch_up_waits_for_what_is_durable_in_the_owner(shared: Shared) -> None:
    """When it returns, the copy has everything that was durable at the call. `flush` does the same."""
    _, owner, follower = shared
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    assert await owner.calls.set("a", 1) == 1
    tasks = [await begun(follower.calls.catch_up()), await begun(follower.calls.flush())]
    assert "a" not in follower.calls
    follower.pipe.release()
    await asyncio.gather(*tasks)
    assert follower.calls.get_nowait("a") == 1
    await owner.calls.catch_up()


async def test_a_revision_of_another_process(process: Process, shared: Shared, clock: ManualClock) -> None:
    """It is waited for, or the wait ends with an error. `wait_durable` does the same."""
    world, owner, follower = shared
    other = follower if process is owner else owner
    world.storage.hang("commit")
    tasks = [
        await begun(process.calls.wait_revision(1)),
        await begun(process.calls.wait_durable(1)),
        await begun(process.calls.wait_revision(1, timeout=5)),
        await begun(process.calls.wait_revision(9, timeout=5)),
    ]
    change = await begun(other.calls.set("a", 1))
    world.storage.resume()
    await asyncio.gather(*tasks[:3], change)
    assert process.copy.revision == 1
    await process.calls.wait_durable()
    await process.calls.wait_revision(1)
    clock.advance(5)
    with pytest.raises(
        WaitTimeoutError, match="revision 9 of 'test' was not reached after 5 s: this process has revision 1"
    ):
        await tasks[3]


# The end of this process


async def test_finish_waits_for_all_calls(shared: Shared) -> None:
    """It waits for those of cancelled callers, too, without a busy loop. The result is idle."""
    world, _, follower = shared
    await follower.port.finish(math.inf)  # there is none
    world.storage.hang("commit")
    tasks = [
        await begun(follower.calls.set("a", 1)),
        await begun(follower.calls.update("b", lambda n: n, 1)),
        await begun(follower.calls.update("b", lambda n: n + 1, 1)),
    ]
    tasks[0].cancel()
    first, second = await begun(follower.port.finish(math.inf)), await begun(follower.port.finish(math.inf))
    steps = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    assert not steps  # nothing runs until the answers come
    world.storage.resume()
    await asyncio.gather(first, second)
    assert follower.port.is_idle
    assert await asyncio.gather(*tasks[1:]) == [1, 2]


async def test_finish_gives_up_at_its_deadline(shared: Shared, clock: ManualClock) -> None:
    """The calls stay open."""
    world, _, follower = shared
    await world.kill()
    task = await begun(follower.calls.set("a", 1))
    waiting = await begun(follower.port.finish(clock.monotonic() + 5))
    clock.advance(5)
    await waiting
    assert not follower.port.is_idle
    await follower.port.finish(clock.monotonic())
    await world.own(follower)
    await task


async def test_a_stop_ends_each_call(shared: Shared) -> None:
    """Each caller gets an error with the outcome. A transaction that is open cannot be committed."""
    _, _, follower = shared
    calls = follower.calls
    await calls.set("a", 1)
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    sent = [await begun(calls.set("a", 2)), await begun(calls.update("b", lambda n: n, 1))]
    queued = await begun(calls.update("b", lambda n: n, 1))
    follower.pipe.cut()
    new = [await begun(calls.set("c", 1)), await begun(pay(calls))]
    waiting = [await begun(calls.catch_up()), await begun(calls.wait_revision(100))]

    async def open_one() -> None:
        async with calls.transaction() as tx:
            tx.set("a", 5)
            await until(lambda: follower.port._closed)
            with pytest.raises(RuntimeError, match="is over"):
                tx.get("a")

    transaction = await begun(open_one())
    follower.port.close(ClosedError("the manager of 'test' was stopped"))
    for tasks, outcome in ((sent, "unknown"), (new, "not made")):
        for task in tasks:
            with pytest.raises(UnavailableError, match="because the manager was stopped") as caught:
                await task
            assert caught.value.outcome == outcome
    for task in (queued, *waiting, transaction):
        with pytest.raises(ClosedError, match="was stopped"):
            await task
    for work in (calls.set("a", 1), calls.update("a", failing), calls.catch_up(), calls.wait_revision(100), pay(calls)):
        with pytest.raises(ClosedError):
            await work
    assert follower.port.is_idle


async def test_a_process_that_has_lost_its_state_tells_why(shared: Shared) -> None:
    """Each call raises the error, with the outcome. Transactions can still read."""
    _, _, follower = shared
    calls = follower.calls
    await calls.set("a", 1)
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    sent = [await begun(calls.set("a", 2)), await begun(calls.pop("missing", None))]
    follower.pipe.cut()
    new = await begun(calls.set("c", 1))

    async def open_one() -> None:
        async with calls.transaction() as tx:
            tx.set("b", 5)
            await until(lambda: follower.port._closed)
            assert tx.get("a") == 1

    transaction = await begun(open_one())
    follower.port.refuse(CorruptionError("a.journal", 7, "it is damaged"))
    texts = []
    for task in (*sent, new, transaction):
        with pytest.raises(CorruptionError, match="it is damaged") as caught:
            await task
        texts.append(getattr(caught.value, "__notes__", []))
    made, not_made = "(the call was made once, or not at all)", "(the call was not made)"
    assert texts == [[made], [not_made], [not_made], []]
    with pytest.raises(CorruptionError):
        await calls.set("a", 1)
    assert await calls.get("a") == 1


async def test_a_task_of_the_port_that_other_code_cancels(shared: Shared) -> None:
    """Its callers get an error, and the next call works."""
    world, _, follower = shared
    world.storage.hang("commit")
    first = await begun(follower.calls.update("a", lambda n: n + 1, 0))
    second = await begun(follower.calls.update("a", lambda n: n + 1, 0))
    for task in list(follower.port._tasks):
        task.cancel()
    for waiting, outcome in ((first, "unknown"), (second, "not made")):
        with pytest.raises(UnavailableError, match="other code has cancelled a task") as caught:
            await waiting
        assert caught.value.outcome == outcome
    world.storage.resume()
    assert await follower.calls.update("a", lambda n: n + 1, 0) == 2
    not_begun = started(follower.calls.update("a", lambda n: n + 1, 0))
    await asyncio.sleep(0)
    for task in list(follower.port._tasks):
        task.cancel()
    with pytest.raises(UnavailableError):
        await not_begun
    assert await follower.calls.update("a", lambda n: n + 1, 0) == 3


async def test_a_task_of_a_new_owner_that_other_code_cancels(shared: Shared) -> None:
    """The caller gets an error whose outcome is that of the open call."""
    world, _, follower = shared
    await world.kill()
    waiting = await begun(follower.calls.set("a", 1))
    await world.own(follower)
    for task in list(follower.port._tasks):
        task.cancel()
    with pytest.raises(UnavailableError, match="other code has cancelled the task") as caught:
        await waiting
    assert caught.value.outcome == "not made"


async def test_a_call_of_a_new_owner_that_fails(shared: Shared) -> None:
    """Its caller gets the error."""
    world, _, follower = shared
    await world.kill()
    await idle()
    waiting = [await begun(follower.calls.set("a", 1)), await begun(follower.calls.set("b", 1))]
    waiting[1].cancel()
    world.storage.fail("commit", error=StorageError("the disk is full"))
    await world.own(follower)
    with pytest.raises(StorageError, match="the disk is full"):
        await waiting[0]
    await follower.calls.set("c", 1)
    assert await follower.calls.get_all() == {"a": 1, "b": 1, "c": 1}


def test_a_stop_on_another_event_loop(memory: MemoryStorage, clock: ManualClock) -> None:
    """The callers have ended with their loop. Their calls stay open, and are made."""
    world = World(FaultyStorage(memory), clock)
    made: list[Process] = []
    tasks: list[asyncio.Task[Any]] = []

    async def call() -> None:
        follower = Process(world, "follower")
        made.append(follower)
        calls = follower.calls
        works = (calls.set("a", 1), calls.update("b", lambda n: n, 1), calls.catch_up())
        tasks.extend([await begun(work) for work in works])

    async def stop() -> None:
        (follower,) = made
        follower.port.move()
        assert len(follower.port.calls) == 2
        follower.durability.move()
        await world.own(follower)
        await follower.port.finish(math.inf)
        assert (follower.copy.entries["a"], follower.copy.entries["b"]) == (1, 1)
        await world.end()
        follower.port.close(ClosedError("the manager of 'test' was stopped"))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(call())
    loop.close()
    asyncio.run(stop())
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()
