"""Calls of a follower whose change depends on one key: on which value they run, and who gets what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from port_world import Process, World, begun, noted, world_of
from running import idle

from lab_state import KeyNotFoundError, StorageError, UnavailableError
from lab_state.shared import _engine
from lab_state.shared._messages import MakeChanges
from lab_state.testing import FaultyStorage, ManualClock

Shared = tuple[World, Process, Process]


@pytest.fixture
async def shared(storage: FaultyStorage, clock: ManualClock) -> AsyncIterator[Shared]:
    async with world_of(storage, clock) as found:
        yield found


def changes_of(process: Process) -> list[MakeChanges]:
    """Return the changes that a follower has sent over its pipe."""
    assert process.pipe is not None
    return [call for call in process.pipe.sent if isinstance(call, MakeChanges)]


async def under_way(shared: Shared, value: object) -> asyncio.Task[Any]:
    """Let the owner set the key "a", with a commit that hangs."""
    world, owner, _ = shared
    world.storage.hang("commit")
    return await begun(owner.calls.set("a", value))


# Sharing a call


async def test_updates_of_one_key_share_a_call(shared: Shared) -> None:
    """Those that come while one is under way run one after the other, on one draft."""
    world, _, follower = shared
    world.storage.hang("commit")
    calls = follower.calls
    first = await begun(calls.update("n", lambda n: n + 1, 0))
    others = [await begun(calls.update("n", lambda n: n + 1, 0)) for _ in range(3)]
    others.append(await begun(calls.pop("n")))
    others.append(await begun(calls.pop("n", "gone")))
    others.append(await begun(follower.namespace("x").get_or_set("y", list)))
    world.storage.resume()
    assert await first == 1
    assert await asyncio.gather(*others) == [2, 3, 4, 4, "gone", []]
    sent = changes_of(follower)
    assert [(call.keys, list(call.changes.set), call.changes.delete) for call in sent] == [
        (["n"], ["n"], []),
        (["x/y"], ["x/y"], []),
        (["n"], [], ["n"]),
    ]


async def test_a_call_that_raises_changes_nothing_for_the_others(shared: Shared) -> None:
    """Each caller gets its own result or error."""
    world, _, follower = shared
    world.storage.hang("commit")
    calls = follower.calls
    first = await begun(calls.update("n", lambda n: n + 1, 0))
    others = [
        await begun(calls.update("n", lambda n: n + 1)),
        await begun(calls.update("n", lambda n: n / 0)),
        await begun(calls.update("n", lambda n: n + 1)),
        await begun(calls.pop("n")),
        await begun(calls.pop("n")),
        await begun(calls.pop("n")),
    ]
    world.storage.resume()
    await first
    found = await asyncio.gather(*others, return_exceptions=True)
    assert [type(one) for one in found] == [int, ZeroDivisionError, int, int, KeyNotFoundError, KeyNotFoundError]
    assert found[0:1] + found[2:4] == [2, 3, 3]
    assert found[4] is not found[5]


async def test_an_interrupt_reaches_its_caller_alone(shared: Shared) -> None:
    """A function that raises one, such as `SystemExit`, ends its own call. The other calls of the key go on."""
    world, _, follower = shared
    world.storage.hang("commit")
    calls = follower.calls
    first = await begun(calls.update("n", lambda n: n + 1, 0))

    class Interrupt(BaseException):
        pass

    def interrupted(_: object) -> None:
        raise Interrupt

    caught: list[BaseException] = []

    async def caller() -> None:
        try:
            await calls.update("n", interrupted)
        except Interrupt as error:
            caught.append(error)

    task = asyncio.create_task(caller())
    other = await begun(calls.update("n", lambda n: n + 1))
    world.storage.resume()
    assert [await first, await other] == [1, 2]
    await task
    assert len(caught) == 1
    task = asyncio.create_task(caller())  # alone: nothing is sent
    before = len(changes_of(follower))
    await task
    await idle()
    assert (len(caught), len(changes_of(follower))) == (2, before)
    assert follower.port.is_idle


# Refusals


async def test_a_refused_call_runs_again_on_the_value_of_the_refusal(shared: Shared) -> None:
    """The value need not be durable yet. The caller gets its result when it is."""
    world, _, follower = shared
    change = await under_way(shared, 5)
    seen: list[Any] = []
    update = await begun(follower.calls.update("a", lambda n: noted(seen, n) * 2, 1))
    assert seen == [1, 5]
    world.storage.resume()
    assert await update == 10
    await change
    assert [(call.since, call.n) for call in changes_of(follower)] == [(0, 1), (1, 2)]


async def test_a_refusal_with_an_expiry(shared: Shared, clock: ManualClock) -> None:
    """The value keeps its expiry."""
    world, owner, follower = shared
    world.storage.hang("commit")
    change = await begun(owner.calls.set("a", 5, ttl=60))
    update = await begun(follower.calls.update("a", lambda n: n * 2, 1))
    world.storage.resume()
    assert await update == 10
    await change
    assert await follower.calls.expires_in("a") == 60
    clock.advance(60)
    assert "a" not in follower.calls


async def test_a_refusal_that_shows_a_deletion(shared: Shared) -> None:
    """The call runs again on a missing key, also if it is missing in the copy."""
    world, owner, follower = shared
    await owner.calls.set("a", 5)
    await follower.calls.catch_up()
    world.storage.hang("commit")
    changes = [
        await begun(owner.calls.delete("a")),
        await begun(owner.calls.set("b", 1)),
        await begun(owner.calls.delete("b")),
    ]
    seen: list[Any] = []
    tasks = [
        await begun(follower.calls.update("a", lambda n: noted(seen, n) + 1, 100)),
        await begun(follower.calls.update("b", lambda n: noted(seen, n) + 1, 200)),
    ]
    assert seen == [5, 100, 200, 200]
    world.storage.resume()
    assert await asyncio.gather(*tasks) == [101, 201]
    await asyncio.gather(*changes)


async def test_an_error_after_a_refusal_waits_for_what_it_saw(shared: Shared) -> None:
    """If that is lost with its owner, the call runs again."""
    world, _, follower = shared
    await under_way(shared, "text")
    update = await begun(follower.calls.update("a", lambda n: n + 1, 1))
    await world.kill()
    world.storage.resume()
    await world.own(Process(world, "other"))
    world.connect(follower)
    assert await update == 2


async def test_a_refusal_without_values_waits_for_the_copy(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is too large for a refusal. The call runs again when the copy has it."""
    monkeypatch.setattr(_engine, "MOST_BYTES", 10)
    world, _, follower = shared
    change = await under_way(shared, "x" * 100)
    update = await begun(follower.calls.update("a", lambda text: text + "y", ""))
    world.storage.resume()
    assert await update == "x" * 100 + "y"
    await change


async def test_a_refusal_without_values_may_be_lost(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the revision of the refusal is lost with its owner, the call does not wait for it."""
    monkeypatch.setattr(_engine, "MOST_BYTES", 10)
    world, _, follower = shared
    await under_way(shared, "x" * 100)
    update = await begun(follower.calls.update("a", lambda text: text + "y", ""))
    await world.kill()
    world.storage.resume()
    await world.own(follower)
    assert await update == "y"


async def test_a_refusal_without_values_whose_change_cannot_be_stored(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call was certainly not made, and its error says so."""
    monkeypatch.setattr(_engine, "MOST_BYTES", 10)
    world, _, follower = shared
    world.storage.hang("commit")
    world.storage.fail("commit", error=StorageError("the disk is full"))
    first = await begun(shared[1].calls.set("b", 1))
    change = await begun(shared[1].calls.set("a", "x" * 100))
    update = await begun(follower.calls.update("a", lambda text: text + "y", ""))
    world.storage.resume()
    with pytest.raises(UnavailableError, match="was not made: a change before it failed: the disk is full") as caught:
        await update
    assert caught.value.outcome == "not made"
    await first
    with pytest.raises(StorageError):
        await change


async def test_a_refusal_without_values_and_a_silent_owner(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """The call is given up, with the outcome of itself."""
    monkeypatch.setattr(_engine, "MOST_BYTES", 10)
    world, _, follower = shared
    change = await under_way(shared, "x" * 100)
    update = await begun(follower.calls.update("a", lambda text: text + "y", ""))
    clock.advance(100)
    follower.port.give_up(0.0, "its owner hangs")
    with pytest.raises(UnavailableError, match="its owner hangs") as caught:
        await update
    assert caught.value.outcome == "not made"
    world.storage.resume()
    await change


async def test_an_update_that_reached_the_owner_before_a_refusal(shared: Shared) -> None:
    """Several calls that share a change are refused together, and all run again, also that of a cancelled caller."""
    world, _, follower = shared
    change = await under_way(shared, 5)
    seen: list[Any] = []
    assert follower.pipe is not None
    follower.pipe.to_client.held = True
    first = await begun(follower.calls.update("a", lambda n: noted(seen, n) + 1, 0))
    second = await begun(follower.calls.update("a", lambda n: noted(seen, n) + 1, 0))
    first.cancel()
    world.storage.resume()
    await change
    follower.pipe.release()
    assert await second == 7
    assert seen == [0, 5, 6]


# Reads


async def test_a_get_or_set_that_finds_its_key_is_a_read(shared: Shared) -> None:
    """It needs no owner, also while another call for the key waits for one."""
    world, _, follower = shared
    await follower.calls.set("a", 1)
    await world.kill()
    waiting = await begun(follower.calls.update("a", lambda n: n + 1))
    assert await follower.calls.get_or_set("a", list) == 1
    missing = await begun(follower.calls.get_or_set("b", list))
    await world.own(follower)
    assert [await waiting, await missing] == [2, []]


async def test_a_key_that_expires_while_get_or_set_reads_it(shared: Shared, clock: ManualClock) -> None:
    """The value of the factory is stored by the owner."""
    _, owner, follower = shared
    await follower.calls.set("a", 1, ttl=1)
    has = follower.copy.has
    done: list[str] = []

    def expires(key: str) -> bool:
        if not done:
            done.append(key)
            assert has(key)
            clock.advance(1)
            return True
        return has(key)

    class Copy(type(follower.copy)):  # type: ignore[misc]
        __slots__ = ()

        def has(self, key: str) -> bool:
            return expires(key)

    follower.copy.__class__ = Copy
    assert await follower.calls.get_or_set("a", lambda: 2) == 2
    assert done == ["a"]
    assert owner.calls.get_nowait("a") == 2
