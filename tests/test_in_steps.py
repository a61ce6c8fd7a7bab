"""Calls with many keys: they give the loop back between two steps, and change the state in one moment.

Most tests set the number of keys from which a call goes in steps to 4, and let something happen after one turn of the
loop, after two turns, and so on, until the call is over before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any, cast

import pytest
from forked import error_of, in_child
from running import flusher_of, idle, running, until

from lab_state import (
    ClosedError,
    Config,
    FencedError,
    InvalidKeyError,
    InvalidValueError,
    Manager,
    MemoryCache,
    MemoryStorage,
    StorageError,
    UnavailableError,
    _batch,
    _checkpoints,
    _writing,
)
from lab_state._entries import Overlay, Staged
from lab_state._state import State
from lab_state.cache import memory
from lab_state.cache._protocol import Slice, Step
from lab_state.testing import FaultyStorage, ManualClock

BEFORE: dict[str, Any] = {**{f"a/{number}": number for number in range(8)}, "b": [1], "timed": 1}
MOST_TURNS = 200

Call = Callable[[Manager], Awaitable[Any]]
Meanwhile = Callable[[Manager, FaultyStorage], Awaitable[None]]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls with four keys go in steps of two."""
    for module, constant, value in (
        (_batch, "MANY", 4),
        (_batch, "STEP", 2),
        (_checkpoints, "STEP", 2),
        (_writing, "_STEP_BYTES", 600),
    ):
        monkeypatch.setattr(module, constant, value)


async def transaction(state: Manager) -> int:
    async with state.transaction() as tx:
        tx.set_many({f"a/{number}": "tx" for number in range(6)})
        tx.delete("b")
        tx.delete("timed")
        tx.set("new", 1, ttl=100)
    return state.revision


async def cleared(state: Manager) -> int:
    async with state.transaction() as tx:
        tx.delete_all()
        tx.set_many({f"c/{number}": "tx" for number in range(12)})
    return state.revision


CALLS: dict[str, Call] = {
    "set_many": lambda state: state.set_many({**{f"a/{number}": "new" for number in range(5)}, "c": 1, "timed": 2}),
    "set_many with ttl": lambda state: state.set_many(dict.fromkeys(["a/1", "b", "c", "d", "timed"], 5), ttl=100),
    "delete_many": lambda state: state.delete_many([*(f"a/{number}" for number in range(12)), "timed"]),
    "delete_all": lambda state: state.delete_all("a/"),
    "namespace delete_all": lambda state: state.namespace("a").delete_all(),
    "transaction": transaction,
    "transaction that clears": cleared,
}
EACH_CALL = pytest.mark.parametrize("name", CALLS)


async def begun(storage: FaultyStorage, clock: ManualClock, cache: MemoryCache | None = None) -> Manager:
    """Return a manager that runs and has `BEFORE`, durable."""
    state = Manager(Config(name="test", flush_interval=None), storage, cache, clock=clock)
    await state.start()
    await state.set_many({key: value for key, value in BEFORE.items() if key != "timed"})
    await state.set("timed", 1, ttl=1000)
    await state.flush()
    return state


async def found_in(storage: FaultyStorage, clock: ManualClock) -> dict[str, Any]:
    async with running(storage, clock) as state:
        return await state.get_all()


async def after_turns(state: Manager, call: Call, turns: int) -> asyncio.Task[Any]:
    task = asyncio.ensure_future(call(state))
    for _ in range(turns):
        await asyncio.sleep(0)
    return task


async def at_every_turn(
    clock: ManualClock, make: Callable[[], FaultyStorage], name: str, run: Callable[[Manager, FaultyStorage, int], Any]
) -> int:
    """Run something after each number of turns of a call, with a new state each time, until the call is over before."""
    for turns in range(1, MOST_TURNS):
        storage = make()
        state = await begun(storage, clock)
        if await run(state, storage, turns):
            return turns
    raise AssertionError(f"{name} takes more than {MOST_TURNS} turns")


@pytest.fixture
def make(storage: FaultyStorage) -> Callable[[], FaultyStorage]:
    """Return a function that makes empty storages of the kind of the fixture `storage`."""
    return lambda: FaultyStorage(type(storage._inner)())


async def result_of(name: str, storage: FaultyStorage, clock: ManualClock) -> dict[str, Any]:
    """Return what a call makes of `BEFORE`."""
    state = await begun(storage, clock)
    await CALLS[name](state)
    after = await state.get_all()
    await state.stop()
    assert after != BEFORE
    return after


# Small calls


@pytest.mark.parametrize("count", [999, 1000])
async def test_a_small_call_never_gives_the_loop_back(storage: FaultyStorage, clock: ManualClock, count: int) -> None:
    """Below 1,000 keys no call waits, however large the state is; from 1,000 on each gives the loop back."""
    values = {f"a/{number:04}": number for number in range(count)}

    async def in_transaction() -> None:
        async with state.transaction() as tx:
            tx.set_many(values)

    async with running(storage, clock) as state:
        calls: list[Callable[[], Any]] = [
            lambda: state.set_many(values),
            lambda: state.set_many(values, ttl=5),
            lambda: state.delete_many(values),
            in_transaction,
            lambda: state.delete_all("a/"),
        ]
        await state.set_many({f"b/{number}": number for number in range(1500)})
        await idle()
        for call in calls:
            turned = list[int]()
            asyncio.get_running_loop().call_soon(turned.append, 1)
            await call()
            assert bool(turned) is (count == 1000)
            await idle()
        assert await state.delete_all("b/149") == 11


async def test_a_transaction_and_plain_calls_have_no_steps(storage: FaultyStorage, clock: ManualClock) -> None:
    """The calls of an open transaction cannot wait, so 2,000 keys are one step."""
    values = {f"a/{number}": number for number in range(2000)}
    async with running(storage, clock) as state, state.transaction() as tx:
        tx.set_many(values)
        assert tx.get_all() == values
        assert tx.delete_many(list(values)[:1500]) == 1500
        assert tx.delete_all("a/") == 500


# What readers and writers see


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_readers_see_all_or_nothing(name: str, storage: FaultyStorage, clock: ManualClock, make: Any) -> None:
    """At each turn of the loop, a reader finds the state from before or from after, and the number of its keys."""
    after = await result_of(name, make(), clock)
    state = await begun(storage, clock)
    revision = state.revision
    task = await after_turns(state, CALLS[name], 0)
    seen = []
    while not task.done():
        now = state.get_all_nowait()
        assert now in (BEFORE, after)
        assert len(state) == len(now) == state.status().keys
        assert len(state.namespace("a")) == sum(key.startswith("a/") for key in now)
        assert state.revision == revision + (now == after)
        assert all((key in state) == (key in now) for key in [*BEFORE, *after])
        seen.append(now == after)
        await asyncio.sleep(0)
    assert len(seen) > 3
    assert seen == sorted(seen)
    for _ in range(20):
        assert await state.get_all() == after
        await asyncio.sleep(0)
    assert isinstance(state._core.state.entries, dict)
    await state.stop()
    assert await found_in(storage, clock) == after


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_writers_come_before_or_after(name: str, clock: ManualClock, make: Any) -> None:
    """A write that is called amid the steps waits for a part of the call, and comes before or after all of it."""

    async def run(state: Manager, storage: FaultyStorage, turns: int) -> bool:
        call = await after_turns(state, CALLS[name], turns)
        over = call.done()
        result = await state.update("a/0", lambda old: [old], "none")
        await call
        is_overwritten = result == [0] and after.get("a/0") != 0
        assert result == [0] or result == [after.get("a/0", "none")]
        expected = after if is_overwritten else {**after, "a/0": result}
        assert await state.get_all() == expected
        await state.stop()
        assert await found_in(storage, clock) == expected
        return over

    after = await result_of(name, make(), clock)
    assert await at_every_turn(clock, make, name, run) > 3


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_a_write_that_cannot_wait_comes_before(name: str, clock: ManualClock, make: Any) -> None:
    """set_nowait, delete_nowait and update_nowait work amid the steps; the call overwrites what they changed."""

    async def run(state: Manager, storage: FaultyStorage, turns: int) -> bool:
        call = await after_turns(state, CALLS[name], turns)
        over, took_place = call.done(), state.get_all_nowait() == after
        held = state._core.transaction is not None
        if held and name.startswith("transaction"):
            with pytest.raises(RuntimeError, match="open transaction"):
                state.set_nowait("a/7", "late")
            await call
            await state.stop()
            return over
        state.set_nowait("a/7", "late")
        state.delete_nowait("a/1")
        state.update_nowait("a/2", lambda old: ["late", old], "none")
        state.set_nowait("a/none", 1)
        state.set_nowait("z", 1, ttl=50)
        with pytest.raises(InvalidKeyError):
            state.set_nowait("", 1)
        with pytest.raises(InvalidKeyError):
            state.delete_nowait(5)  # type: ignore[arg-type]
        meanwhile = state.get_all_nowait()
        assert meanwhile["a/7"] == "late"
        assert "a/1" not in meanwhile
        await call
        first = {**BEFORE, "a/7": "late", "a/2": ["late", 2], "a/none": 1, "z": 1}
        first.pop("a/1")
        if took_place:
            expected = {**after, "a/7": "late", "a/2": ["late", after.get("a/2", "none")], "a/none": 1, "z": 1}
            expected.pop("a/1", None)
        else:
            expected = {**first, **{key: value for key, value in after.items() if value != BEFORE.get(key)}}
            for gone in (BEFORE.keys() - after.keys()) & first.keys():
                del expected[gone]
            if name.endswith("delete_all"):
                del expected["a/none"]
            if name == "transaction that clears":
                expected = after
        assert await state.get_all() == expected
        assert len(state) == len(expected)
        await idle()
        await state.stop()
        assert await found_in(storage, clock) == expected
        return over

    after = await result_of(name, make(), clock)
    assert await at_every_turn(clock, make, name, run) > 3


# What happens meanwhile


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_a_stop_meanwhile(name: str, clock: ManualClock, make: Any) -> None:
    """The call raises ClosedError and has changed nothing, or it was made and is durable."""

    async def run(state: Manager, storage: FaultyStorage, turns: int) -> bool:
        call = await after_turns(state, CALLS[name], turns)
        over = call.done()
        await state.stop()
        try:
            await call
        except ClosedError as error:
            assert "nothing" in str(error) or "not running" in str(error)  # noqa: PT017 -- whether it raises depends on the turn
            expected = BEFORE
        else:
            expected = after
        assert not state._core._lock.locked()
        assert await found_in(storage, clock) == expected
        await state.start()
        await state.set("works", 1)
        await state.stop()
        return over

    after = await result_of(name, make(), clock)
    assert await at_every_turn(clock, make, name, run) > 3


@pytest.mark.usefixtures("short")
async def test_a_restart_meanwhile(clock: ManualClock, make: Any) -> None:
    """A call that began before stop() changes nothing in the state that the next start() loads."""

    async def run(state: Manager, storage: FaultyStorage, turns: int) -> bool:
        call = await after_turns(state, CALLS["set_many"], turns)
        over = call.done()
        await state.stop()
        await state.start()
        with suppress(ClosedError):
            await call
        assert await state.get_all() == (BEFORE if call.exception() else after)
        await state.stop()
        return over

    after = await result_of("set_many", make(), clock)
    assert await at_every_turn(clock, make, "set_many", run) > 3


@pytest.mark.usefixtures("short")
async def test_the_items_of_a_mapping_are_stored(storage: FaultyStorage, clock: ManualClock) -> None:
    """A call in steps stores what `items()` yields, as a small call does, even if it yields less than the length says."""

    class Upper(dict[str, int]):
        def items(self) -> Any:
            return [(key.upper(), value) for key, value in super().items()]

    class Longer(dict[str, int]):
        def __len__(self) -> int:
            return 9

    async with Manager("items", storage, clock=clock) as state:
        await state.set_many(Upper(dict.fromkeys("ab", 1)))
        await state.set_many(Upper(dict.fromkeys("cdefgh", 1)))
        assert await state.keys() == list("ABCDEFGH")
        assert await state.set_many(Longer()) == state.revision == 2


@pytest.mark.parametrize("name", ["set_many", "set_many with ttl", "delete_many"])
@pytest.mark.usefixtures("short")
async def test_a_restart_during_the_encoding(name: str, storage: FaultyStorage, clock: ManualClock) -> None:
    """A call that waits for no turn yet does not go on with the state of the next start."""
    state = await begun(storage, clock)
    call: Any = CALLS[name](state)
    assert call.send(None) is None
    await state.stop()
    await state.start()
    with pytest.raises(ClosedError, match="stopped during this call: nothing was changed"):
        while True:
            call.send(None)
    assert await state.get_all() == BEFORE
    await state.stop()


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_a_fence_meanwhile(name: str, clock: ManualClock, make: Any) -> None:
    """The call raises FencedError and has changed nothing, or it was made before the manager knew."""

    async def run(state: Manager, storage: FaultyStorage, turns: int) -> bool:
        call = await after_turns(state, CALLS[name], turns)
        over, done = call.done(), state.get_all_nowait() == after
        flusher_of(state)._refuse_from_now_on(FencedError("a newer writer owns it"))
        if done:
            await call
        else:
            with pytest.raises(FencedError, match="nothing was changed"):
                await call
        assert await state.get_all() == (after if done else BEFORE)
        with pytest.raises(FencedError):
            await state.set_many(dict.fromkeys("abcdefg", 1))
        await idle()
        with suppress(StorageError):
            await state.stop()
        return over

    after = await result_of(name, make(), clock)
    assert await at_every_turn(clock, make, name, run) > 3


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_a_flush_that_fails_meanwhile(name: str, clock: ManualClock, make: Any) -> None:
    """No change is lost, of the call or of others, if a commit amid the steps fails or succeeds."""

    async def run(state: Manager, storage: FaultyStorage, turns: int, *, fails: bool) -> bool:
        early = {f"early/{number}": number for number in range(5)}
        for key, value in early.items():
            await state.set(key, value)
        if fails:
            storage.fail("commit")
        call = await after_turns(state, CALLS[name], turns)
        over = call.done()
        with suppress(UnavailableError):
            await state.flush()
        await call
        expected = {**after, **({} if name == "transaction that clears" else early)}
        assert await state.get_all() == expected
        await state.flush()
        flusher_of(state).abort()
        storage.cut_power()
        assert await found_in(storage, clock) == expected
        return over

    after = await result_of(name, make(), clock)
    for fails in (False, True):
        assert await at_every_turn(clock, make, name, lambda *of, fails=fails: run(*of, fails=fails)) > 3


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_a_checkpoint_that_begins_meanwhile(
    name: str, clock: ManualClock, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint waits until the changes are merged, so its view costs one step; and its snapshot is whole."""
    freeze = State.freeze

    def freeze_at_once(state: State) -> Any:
        assert not isinstance(state.entries, Staged)
        return freeze(state)

    async def run(state: Manager, storage: FaultyStorage, turns: int) -> bool:
        call = await after_turns(state, CALLS[name], turns)
        over = call.done()
        flusher = flusher_of(state)
        flusher.checkpoints.start()
        await call
        await idle()
        flusher.checkpoints.due = True
        flusher.checkpoint_if_due()
        await state.flush()
        await flusher.checkpoints.ended()
        assert isinstance(state._core.state.entries, dict)
        assert await state.get_all() == after
        flusher.abort()
        storage.cut_power()
        assert await found_in(storage, clock) == after
        return over

    monkeypatch.setattr(State, "freeze", freeze_at_once)
    after = await result_of(name, make(), clock)
    assert await at_every_turn(clock, make, name, run) > 3


@pytest.mark.usefixtures("short")
async def test_a_checkpoint_that_is_due_starts_after_the_merge(storage: FaultyStorage, clock: ManualClock) -> None:
    """While changes are merged no checkpoint starts; the end of the merge starts it."""
    async with running(storage, clock) as state:
        await state.set_many(BEFORE)
        await CALLS["set_many"](state)
        checkpoints = flusher_of(state).checkpoints
        checkpoints.due = True
        flusher_of(state).checkpoint_if_due()
        assert checkpoints.task is None
        assert checkpoints.is_waiting
        await until(lambda: checkpoints.task is not None)
        await state.flush()
        await checkpoints.ended()
        assert storage.calls.count("checkpoint") == 1


@EACH_CALL
@pytest.mark.parametrize("turns", [0, 3, 6, 9, 14])
@pytest.mark.usefixtures("short")
async def test_a_checkpoint_under_way(name: str, turns: int, clock: ManualClock, make: Any) -> None:
    """A call beside a checkpoint changes nothing of its view, whichever of both is over first."""
    after = await result_of(name, make(), clock)
    state = await begun(storage := make(), clock)
    flusher = flusher_of(state)
    await state.set("a/7", "unflushed")
    storage.hang("commit")
    checkpoint = asyncio.create_task(flusher.checkpoints.write(wait=True))
    await until(lambda: isinstance(state._core.state.entries, Overlay))
    call = await after_turns(state, CALLS[name], turns)
    storage.resume()
    await checkpoint
    await call
    await idle()
    expected = {key: "unflushed" if key == "a/7" else value for key, value in after.items()}
    assert await state.get_all() == expected
    assert isinstance(state._core.state.entries, dict)
    await state.stop()
    assert await found_in(storage, clock) == expected


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_a_cancelled_caller_leaves_the_merge_to_the_loop(
    name: str, storage: FaultyStorage, clock: ManualClock
) -> None:
    """A call that is cancelled while it waits for durability has made its change, and memory ends up the same."""
    state = Manager(Config(name="test", flush_interval=0), storage, clock=clock)
    await state.start()
    await state.set_many(BEFORE)
    storage.hang("commit")
    call = await after_turns(state, CALLS[name], 0)
    await until(lambda: state.status().unflushed_keys)
    call.cancel()
    await asyncio.wait({call})
    assert call.cancelled()
    after = await state.get_all()
    assert after != BEFORE
    await idle()
    assert isinstance(state._core.state.entries, dict)
    assert await state.get_all() == after
    storage.resume()
    await state.flush()
    await state.stop()
    assert await found_in(storage, clock) == after


@EACH_CALL
@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.usefixtures("short")
async def test_watches_get_each_key_once(name: str, clock: ManualClock, make: Any, *, durable: bool) -> None:
    """Each watch gets the keys with its prefix, and a later change after them, although the keys come in steps."""
    after = await result_of(name, make(), clock)
    state = await begun(make(), clock)
    seen: dict[str, dict[str, str]] = {"": {}, "b": {}}
    revisions: list[int] = []

    async def read(prefix: str, ready: asyncio.Event) -> None:
        async with state.watch(prefix, durable=durable) as changes:
            ready.set()
            async for change in changes:
                if change.key == "last":
                    return
                assert change.key not in seen[prefix]
                seen[prefix][change.key] = change.kind
                if change.key != "b last":
                    revisions.append(change.revision)

    readers = []
    for prefix in seen:
        readers.append(asyncio.create_task(read(prefix, ready := asyncio.Event())))
        await ready.wait()
    await CALLS[name](state)
    revision = state.revision
    await state.set("last", 1)
    await state.set("b last", 1)
    await state.flush()
    await readers[0]
    expected = {key: "set" for key in after if after[key] != BEFORE.get(key)}
    expected |= dict.fromkeys(BEFORE.keys() - after.keys(), "delete")
    assert seen[""] == expected
    assert set(revisions) == {revision} if not durable else max(revisions) == revision + 2
    await state.stop()
    await readers[1]
    assert seen["b"] == {key: kind for key, kind in expected.items() if key.startswith("b")} | {"b last": "set"}


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_keys_that_expire_meanwhile(name: str, clock: ManualClock, make: Any) -> None:
    """A sweep waits for the end of the call, and then finds what is due. The number of keys is right all the time."""

    async def run(state: Manager, storage: FaultyStorage, turns: int) -> bool:
        call = await after_turns(state, CALLS[name], turns)
        over, held = call.done(), state._core.transaction is not None
        entries = dict(state._core.state.entries.items())
        clock.advance(2000)
        if held:
            assert dict(state._core.state.entries.items()) == entries
        while not call.done():
            assert len(state) == len(state.get_all_nowait())
            await asyncio.sleep(0)
        await idle()
        clock.advance(2)
        found = await state.get_all()
        assert state._core.state.entries.keys() - {"timed"} - found.keys() <= CALLED_WITH_TTL  # type: ignore[union-attr]
        clock.advance(200)
        assert state._core.state.entries.keys() == (await state.get_all()).keys()  # type: ignore[union-attr]
        assert not state._core.state.expires
        assert {key: value for key, value in found.items() if key in after} == {
            key: after[key] for key in after if key in found
        }
        await state.stop()
        return over

    after = await result_of(name, make(), clock)
    assert await at_every_turn(clock, make, name, run) > 3


CALLED_WITH_TTL = {"a/1", "b", "c", "d", "timed", "new"}


@EACH_CALL
@pytest.mark.usefixtures("short")
async def test_a_mirror_shows_all_or_nothing(
    name: str, storage: FaultyStorage, clock: ManualClock, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader without a local copy finds the state from before or from after, while the step is merged in steps."""
    monkeypatch.setattr(memory, "MANY", 2)
    monkeypatch.setattr(memory, "STEP", 1)
    merge, merged = memory.MemoryMirror.merge, list[int]()

    def noted(mirror: memory.MemoryMirror, most: int) -> bool:
        merged.append(most)
        return merge(mirror, most)

    monkeypatch.setattr(memory.MemoryMirror, "merge", noted)
    after = await result_of(name, make(), clock)
    cache = MemoryCache()
    state = await begun(storage, clock, cache)
    mirror = cache.mirrors["test"]
    async with cache.reader("test", clock=clock) as reader:
        await until(lambda: mirror.seen().revision == state.revision)
        assert await reader.get_all() == BEFORE
        await CALLS[name](state)
        flushing = asyncio.create_task(state.flush())
        while await reader.get_all() == BEFORE:  # noqa: ASYNC110 -- what is waited for sets no event
            await asyncio.sleep(0)
        for _ in range(20):
            assert await reader.get_all() == after
            assert await reader.get_many([*BEFORE, *after]) == after
            await asyncio.sleep(0)
        assert not mirror.pending
        assert merged.count(1) > 3
        assert "timed" in mirror.expires or name != "set_many with ttl"
        await flushing
    await state.stop()


@pytest.mark.usefixtures("short")
async def test_a_mirror_that_is_replaced_while_a_step_is_merged() -> None:
    """A fill drops the rest of a step, and the next step ends a merge that is not over."""
    cache = MemoryCache()
    session = await cache.open("test", "w")
    mirror = cache.mirrors["test"]

    async def slices(*parts: Slice) -> AsyncIterator[Slice]:
        for part in parts:
            yield part

    assert await session.fill(1, slices(Slice({"a": b"1"}, {}, [])), await session.look())
    many = {f"key {number}": b"1" for number in range(3000)}
    assert await session.apply(Step(1, 2, False), slices(Slice(many, {"key 1": 5}, ["a"])))
    assert mirror.pending
    assert await session.apply(Step(2, 3, False), slices(Slice({"key 0": b"2"}, {}, [])))
    assert not mirror.pending
    assert (len(mirror.values), mirror.values["key 0"], mirror.expires["key 1"]) == (3001, b"2", b"5")
    assert await session.apply(Step(3, 4, False), slices(Slice(many, {}, [])))
    assert await session.fill(5, slices(Slice({"b": b"1"}, {}, [])), mirror.seen())
    await idle()
    assert mirror.values.keys() - {"$lab_state"} == {"b"}


# Arguments


@pytest.mark.usefixtures("short")
async def test_a_mapping_that_changes_meanwhile(storage: FaultyStorage, clock: ManualClock) -> None:
    """The keys and values are those of the moment of the call, whatever becomes of the mapping and the list."""
    async with running(storage, clock) as state:
        values = {f"a/{number}": number for number in range(9)}
        expected, keys = dict(values), list(values)
        call = asyncio.ensure_future(state.set_many(values))
        await asyncio.sleep(0)
        values.clear()
        await call
        assert await state.get_all() == expected
        call = asyncio.ensure_future(state.delete_many(keys))
        await asyncio.sleep(0)
        keys.clear()
        assert await call == 9


@pytest.mark.usefixtures("short")
async def test_a_bad_value_or_key_among_many(storage: FaultyStorage, clock: ManualClock) -> None:
    """The error is that of a small call and names the key; memory stays as it was."""
    async with running(storage, clock) as state:
        await state.set_many(BEFORE)
        before, revision = await state.get_all(), state.revision
        many: Mapping[str, Any] = {f"a/{number}": "new" for number in range(9)}
        with pytest.raises(InvalidValueError, match="the value of 'bad'"):
            await state.set_many({**many, "bad": object()})
        with pytest.raises(InvalidValueError, match="ttl"):
            await state.set_many(many, ttl=-1)
        with pytest.raises(InvalidKeyError):
            await state.set_many({**many, "": 1})
        with pytest.raises(InvalidKeyError):
            await state.delete_many([*many, ""])
        assert await state.delete_many([f"none/{number}" for number in range(9)]) == 0
        assert await state.namespace("none").delete_all() == 0
        assert (await state.get_all(), state.revision) == (before, revision)
        assert not state._core.blocked


@pytest.mark.usefixtures("short")
async def test_a_call_inside_of_a_transaction(storage: FaultyStorage, clock: ManualClock) -> None:
    """It would wait for itself, so it is an error; from another task it waits for the end of the transaction."""
    async with running(storage, clock) as state:
        async with state.transaction() as tx:
            for name in ("set_many", "delete_many"):
                with pytest.raises(RuntimeError, match="is open here"):
                    await CALLS[name](state)
            tx.set("a/0", "tx")
        await CALLS["set_many"](state)
        blocks = state.transaction()
        tx = await blocks.__aenter__()
        waiting = Context().run(asyncio.ensure_future, CALLS["delete_all"](state))
        await idle()
        assert not waiting.done()
        tx.delete("a/0")
        await blocks.__aexit__(None, None, None)
        assert await waiting == 4


@pytest.mark.usefixtures("short")
async def test_a_transaction_is_over_when_its_commit_begins(storage: FaultyStorage, clock: ManualClock) -> None:
    """Another task that still has the transaction cannot add to a commit in steps."""
    async with running(storage, clock) as state:
        block = state.transaction()
        tx = await block.__aenter__()
        tx.set_many({f"a/{number}": 1 for number in range(9)})
        leaving = asyncio.ensure_future(block.__aexit__(None, None, None))
        await asyncio.sleep(0)
        assert not leaving.done()
        for call in (lambda: tx.set("late", 1), lambda: tx.get("a/1"), lambda: tx.delete_all()):
            with pytest.raises(RuntimeError, match="is over"):
                call()
        await leaving
        assert len(state) == 9


@pytest.mark.usefixtures("short")
async def test_a_fork_meanwhile(storage: FaultyStorage, clock: ManualClock) -> None:
    """The forked child cannot go on with the call; the parent can."""
    async with running(storage, clock) as state:
        call = state.set_many({f"a/{number}": number for number in range(20)})
        for _ in range(8):
            call.send(None)
        assert state._core.transaction is not None
        assert (await in_child(lambda: error_of(lambda: call.send(None))))[0] == "UnsupportedError"
        with pytest.raises(StopIteration):
            while True:
                call.send(None)
        assert len(state) == 20


@pytest.mark.usefixtures("short")
async def test_an_error_amid_the_merge_stops_no_checkpoint(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory is short while a large change is merged, the merge goes on a second later."""
    async with running(MemoryStorage(), clock) as state:
        await state.set_many({f"old/{number}": number for number in range(3)})
        fold, errors = State.fold_staged, iter([MemoryError()])

        def fold_without_memory(of: State, most: int) -> bool:
            if (error := next(errors, None)) is not None:
                raise error
            return fold(of, most)

        monkeypatch.setattr(State, "fold_staged", fold_without_memory)
        core, flusher = state._core.state, flusher_of(state)
        core.entries = Staged(cast("Any", core.entries), {f"new/{number}": number for number in range(9)}, 12)
        with pytest.raises(MemoryError):
            flusher._fold_staged()
        assert core.frozen
        clock.advance(1)
        await idle()
        assert not core.frozen
        assert len(state) == 12
