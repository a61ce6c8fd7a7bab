"""Calls with many keys: their messages, and their execution in steps, as one change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from members import cut, members, owner_of
from msgspec import Raw
from owner_parts import A, PureOwner, change, delete_all, delete_many, incr, raw, set_, set_if_absent, set_many
from owner_running import Owner, open_owner, owning
from running import idle, until

from lab_state import _batch, _slices
from lab_state.exceptions import FencedError, UnavailableError
from lab_state.shared._checks import RecentChanges
from lab_state.shared._frames import BadMessageError, ReceivedFrame
from lab_state.shared._large_calls import is_large
from lab_state.shared._messages import Call, DeleteMany, MakeChanges, Moved, Ok, Refused, SetMany
from lab_state.shared._wire import (
    decode_call_in_steps,
    decode_from_client,
    encode_body,
    encode_for_owner,
    encode_large_call,
)
from lab_state.testing import FaultyStorage, ManualClock

R = TypeVar("R")

KEYS = [f"k{number:04}" for number in range(1_500)]

names = st.text("abcé", min_size=1, max_size=3)
json_values = st.sampled_from(["1", '"x"', "null", '[1,{"a":2}]', '{\t"a":\t[\t1\t]}', '"' + "x" * 300 + '"']).map(
    lambda text: Raw(text.encode())
)
given_values = st.dictionaries(names, json_values, max_size=9)
given_keys = st.lists(names, max_size=9)


@st.composite
def changes(draw: st.DrawFn) -> MakeChanges:
    values = draw(given_values)
    expires = draw(st.dictionaries(st.sampled_from(sorted(values)), st.integers(0, 9_000_000))) if values else {}
    deleted = [key for key in draw(given_keys) if key not in values]
    made = change(
        7, draw(st.integers(-1, 20)), draw(given_keys), prefixes=tuple(draw(st.lists(names, max_size=2))),
        deleted=tuple(deleted), expires=expires, clear=draw(st.booleans()),
    )  # fmt: skip
    return msgspec.structs.replace(made, ack=5, changes=msgspec.structs.replace(made.changes, set=values))


lifetimes = st.none() | st.integers(1, 5_000)
large_calls = (
    st.builds(SetMany, st.just(7), st.just(5), given_values, lifetimes)
    | st.builds(DeleteMany, st.just(7), st.just(5), given_keys)
    | changes()
)


def run(steps: Generator[None, None, R]) -> R:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            found: R = stop.value
            return found


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Iterator[None]:
    """Let a step and a slice have at most two keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_batch, "STEP", 2)
        patch.setattr(_slices, "MOST_AT_ONCE", 2)
        patch.setattr(_slices, "SLICE_BYTES", 256)
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each call that may have many keys work in steps."""
    monkeypatch.setattr(_batch, "MANY", 1)


# Messages


def decoded(payload: bytes, *, in_steps: bool) -> Call | str:
    """Return a call in a form that can be compared, or the text of the error."""
    try:
        call = run(decode_call_in_steps(payload)) if in_steps else decode_from_client(ReceivedFrame(b"C", payload))
    except BadMessageError as error:
        return str(error)
    return msgspec.json.decode(msgspec.json.encode(call))  # type: ignore[no-any-return] # two `Raw` are never equal


@given(call=large_calls)
def test_a_large_call_is_the_same_message(call: SetMany | DeleteMany | MakeChanges) -> None:
    """It has white space between its slices. Decoded in steps or at once, it is the call."""
    payload = b"".join(encode_large_call(call, list(encode_body(call))))[5:]
    expected = msgspec.json.decode(msgspec.json.encode(call))
    assert decoded(payload, in_steps=True) == decoded(payload, in_steps=False) == expected
    whole = b"".join(encode_for_owner(call))[5:]
    assert decoded(whole, in_steps=True) == expected


@given(call=large_calls, data=st.data())
def test_a_damaged_large_call_is_refused(call: SetMany | DeleteMany | MakeChanges, data: st.DataObject) -> None:
    """Whatever the bytes are, both ways find the same call, or refuse it."""
    payload = b"".join(encode_large_call(call, list(encode_body(call))))[5:]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(payload))] * 2)))
    part = payload[start:end]
    new = data.draw(st.sampled_from([b"", b"\t", b",", b"}", b"]\t", b"{\t", b"-", b"\xff", b"null", part * 2]))
    damaged = payload[:start] + new + payload[end:]
    found, expected = decoded(damaged, in_steps=True), decoded(damaged, in_steps=False)
    assert found == expected or (isinstance(found, str) and isinstance(expected, str))


@pytest.mark.parametrize(
    "payload",
    [
        b'["set_many",1,0,{"k":{\t"a":1\t}},null]',
        b'["set",1,0,"k",{\t"a":1\t},null]',
        b'["change",1,0,5,[\t],[],{"clear":false,"set":{"k":{"set":{\t},"delete":[\t],"expires":{\t}}}}]',
        b'["change",1,0,5,[],[\t"p"\t],{"clear":false,"set":{\t"a":1\t},"delete":[\t],"expires":{\t}}]',
        b'["change",1,0,5,[\t],[],{"clear":false,"delete":[\t"d"\t],"set":{\t"a":1\t},"expires":{\t}}]',
    ],
)
def test_tabs_at_other_places(payload: bytes) -> None:
    """A foreign client may write white space where it likes. The call is that of the whole text."""
    expected = decoded(payload, in_steps=False)
    assert not isinstance(expected, str)
    assert decoded(payload, in_steps=True) == expected


@pytest.mark.parametrize(
    "payload",
    [
        b'["set_many",1,0,{\t"":1\t},null]',
        b'["delete_many",1,0,[\t"$lab_state"\t]]',
        b'["change",1,0,5,[\t],[],{"clear":false,"set":{\t},"delete":[\t],"expires":{\t"a":1\t}}]',
        b'["change",1,0,5,[\t],[],{"clear":false,"set":{\t"a":1\t},"delete":[\t"a"\t],"expires":{\t}}]',
        b'["change",1,0,5,[\t],[],{"clear":false,"set":{\t"a":1\t},"delete":[\t],"expires":{\t"a":-1\t}}]',
    ],
)
def test_a_large_call_that_is_not_allowed(payload: bytes) -> None:
    """Its keys and its changes are checked, as those of a small call are."""
    assert isinstance(decoded(payload, in_steps=False), str)
    assert isinstance(decoded(payload, in_steps=True), str)


# The engine


@example(noted=[], since=9, keys=[], prefixes=["a"])
@example(noted=[(["a"], False)], since=10, keys=[], prefixes=["a"])
@example(noted=[(["a"], False)], since=10, keys=["a"], prefixes=[])
@given(
    noted=st.lists(st.tuples(st.lists(names, max_size=3), st.booleans()), max_size=6),
    since=st.integers(9, 18),
    keys=given_keys,
    prefixes=st.lists(names, max_size=2),
)
def test_a_check_in_steps(
    noted: list[tuple[list[str], bool]], since: int, keys: list[str], prefixes: list[str]
) -> None:
    """It holds in steps if it holds at once."""
    recent = RecentChanges(10, most=4)
    for revision, (some, cleared) in enumerate(noted, 11):
        if cleared:
            recent.note_clear(revision)
        else:
            recent.note(some, revision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lab_state.shared._checks._LOOKED_AT_ONCE", 1)
        assert run(recent.hold_in_steps(since, keys, prefixes)) == recent.hold(since, keys, prefixes)


any_call = large_calls | st.builds(delete_all, st.just(7), st.sampled_from(["a", "b", "ab", "é"]))
small_calls = st.lists(
    st.builds(set_, st.just(1), names, st.integers(0, 9), lifetimes) | st.builds(delete_all, st.just(1)), max_size=4
)


def history(before: list[list[Call]], call: Call, *, in_steps: bool) -> tuple[Any, ...]:
    """Return what a call does after some commits: its result, the state, and the checks that hold then."""
    owner = PureOwner({"a": 1, "ab": 2, "b": [3]}, revision=10)
    for calls in before:
        for one in calls:
            owner.engine.execute(one)
        owner.seconds += 1
        if owner.calls is None:
            owner.begin()
        else:
            owner.land()
            owner.calls = None
    executed = run(owner.engine.execute_in_steps(call)) if in_steps else owner.engine.execute(call)
    shown: Any = msgspec.json.encode(executed) if isinstance(executed, Refused) else (
        executed.at, executed.changed, executed.revision, executed.result,
    )  # fmt: skip
    layer, recent = owner.layer, owner.engine._recent
    holds = [recent.hold(since, [key], []) for since in range(9, 20) for key in ("a", "ab", "b", "é", "c")]
    values = {key: repr(to) for key, to in layer.entries.items()}
    return shown, values, layer.revision, layer.expires, layer.cleared, holds


@given(before=st.lists(small_calls, max_size=3), call=any_call)
def test_in_steps_or_at_once(before: list[list[Call]], call: Call) -> None:
    """A call has the same result, and makes the same change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_batch, "MANY", 1)
        assert history(before, call, in_steps=True) == history(before, call, in_steps=False)


def test_which_calls_are_large() -> None:
    """A call is executed in steps from 1,000 keys on, those of its check included."""
    owner = PureOwner(dict.fromkeys(KEYS, 1))
    few, many = KEYS[:999], KEYS[:1_000]
    for call, expected in (
        (set_(1, "a", 1), False),
        (incr(1, "a"), False),
        (set_if_absent(1, "a", 1), False),
        (set_many(1, dict.fromkeys(few, 1)), False),
        (set_many(1, dict.fromkeys(many, 1)), True),
        (delete_many(1, *few), False),
        (delete_many(1, *many), True),
        (change(1, 10, few[:500], dict.fromkeys(few[:499], 1)), False),
        (change(1, 10, few[:500], dict.fromkeys(few[:400], 1), deleted=tuple(KEYS[-100:])), True),
        (delete_all(1, ""), False),
        (delete_all(1, "k"), True),
    ):
        assert is_large(call, owner.layer) == expected
    assert not is_large(delete_all(1, "k"), PureOwner({"k": 1}).layer)


def test_a_large_call_has_many_steps() -> None:
    """No step has more keys than a part has."""
    owner = PureOwner(dict.fromkeys(KEYS, 1))
    calls = (set_many(1, dict.fromkeys(KEYS, 2)), delete_many(1, *KEYS), delete_all(1, "k"))
    assert [len([*owner.engine.execute_in_steps(call)]) >= 3 for call in calls] == [True] * 3


# The flusher


@pytest.fixture
async def owner(storage: FaultyStorage, clock: ManualClock, few: None) -> AsyncIterator[Owner]:
    async with owning(storage, clock) as found:
        yield found


def large(owner: Owner, call: Call) -> asyncio.Task[Any]:
    """Begin a call of client A in steps, as a connection does."""
    return asyncio.ensure_future(owner.flusher.in_turn(lambda: owner.engine.call_in_steps("left", A, call)))


def keys_of_records(owner: Owner) -> list[set[str]]:
    return [set(msgspec.json.decode(data)["set"]) for data in owner.connections.records]


async def test_a_commit_has_all_of_a_call(owner: Owner) -> None:
    """A commit that is asked for during the steps waits for their end, so no record has a part of the call."""
    assert owner.right(set_(1, "before", 1)) is None
    call = large(owner, set_many(1, dict.fromkeys(KEYS[:100], 1)))
    await until(lambda: owner.flusher.is_busy and len(owner.layer.changes) > 10)
    await call
    assert not owner.flusher.is_busy
    await until(lambda: owner.copy.revision == 2)
    assert keys_of_records(owner) in ([{"before", *KEYS[:100]}], [{"before"}, {*KEYS[:100]}])
    assert ("left", Ok(1, 2, raw(None))) in owner.told()


async def test_other_calls_come_before_or_after(owner: Owner) -> None:
    """Calls of tasks of the owner wait while a call works in steps, and see all of it."""
    call = large(owner, set_many(1, dict.fromkeys(KEYS[:100], 1)))
    await until(lambda: owner.flusher.is_busy)
    own = [
        asyncio.create_task(owner.flusher.make(delete_many(1, *KEYS[:200]))),
        asyncio.create_task(owner.flusher.make(incr(1, "n"))),
        asyncio.create_task(owner.flusher.run(lambda calls: calls.incr("n"))),
        asyncio.create_task(owner.flusher.make(change(1, 0, [KEYS[0]], {"n": 5}))),
    ]
    await call
    found: list[Any] = await asyncio.gather(*own)
    deleted, first, second, refused = found
    assert (deleted[0], first[0], second[0], isinstance(refused, Refused)) == (b"100", b"1", 2, True)
    assert deleted[1] <= first[1] <= second[1] == owner.copy.revision == 4
    assert dict(owner.copy.entries.items()) == {"n": 2}


async def test_a_caller_of_the_owner_is_cancelled(owner: Owner) -> None:
    """A call with many keys goes on without its caller, and becomes durable."""
    call = asyncio.create_task(owner.flusher.make(set_many(1, dict.fromkeys(KEYS[:100], 1))))
    await until(lambda: owner.flusher.is_busy)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: owner.copy.revision == 1)
    assert keys_of_records(owner) == [set(KEYS[:100])]


async def test_a_call_that_is_repeated_was_executed_once(owner: Owner) -> None:
    """A client that sends a large call again gets the result of its first execution. A refusal is answered at once."""
    call = delete_many(1, *KEYS[:10])
    await owner.flusher.make(set_many(1, dict.fromkeys(KEYS[:10], 1)))
    assert await large(owner, call) is None
    assert await large(owner, call) is None
    await until(lambda: owner.copy.revision == 2)
    assert await large(owner, call) == Ok(1, 2, raw(10))
    assert isinstance(await large(owner, change(2, 0, KEYS[:10], {"a": 1})), Refused)
    assert owner.told().count(("left", Ok(1, 2, raw(10)))) == 2


async def test_a_large_call_at_a_planned_end(owner: Owner) -> None:
    """A call that has not begun is answered with "moved"."""
    owner.engine.is_ending = True
    assert await large(owner, set_many(1, dict.fromkeys(KEYS[:10], 1))) == Moved(1)


async def test_a_stop_during_a_large_call(storage: FaultyStorage, clock: ManualClock, few: None) -> None:
    """The last flush waits for the end of a call that has changed nothing so far, and includes its changes."""
    owner = await open_owner(storage, clock)
    call = large(owner, change(1, 0, KEYS[:1_000], dict.fromkeys(KEYS[:10], 1)))
    await until(lambda: owner.flusher.is_busy)
    assert not owner.layer.changes
    owner.engine.is_ending = True
    await owner.flusher.stop(8.0)
    await call
    assert keys_of_records(owner) == [set(KEYS[:10])]


async def test_a_large_call_when_no_change_can_become_durable(
    storage: FaultyStorage, clock: ManualClock, few: None
) -> None:
    """A call that waited for its turn raises the error, and changes nothing."""
    owner = await open_owner(storage, clock)
    call = large(owner, set_many(1, dict.fromkeys(KEYS[:100], 1)))
    await until(lambda: owner.flusher.is_busy)
    own = asyncio.create_task(owner.flusher.make(set_many(1, {"a": 1})))
    ran = asyncio.create_task(owner.flusher.run(lambda calls: calls.incr("n")))
    await idle()
    owner.flusher._fence(FencedError("a newer writer"))
    await call
    for task in (own, ran):
        with pytest.raises(FencedError, match="nothing was changed"):
            await task
    assert (owner.layer.revision, storage.calls.count("commit")) == (1, 0)
    with pytest.raises(FencedError):
        await owner.flusher.stop(8.0)


async def test_a_commit_that_fails_during_the_steps(
    owner: Owner, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changes of the failed commit are put back. The steps go on, and the next commit has both."""
    began, fails = asyncio.Event(), asyncio.Event()

    async def commit(*_: object) -> bool:
        began.set()
        await fails.wait()
        raise UnavailableError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(owner.flusher._session, "commit", commit)
        assert owner.right(set_(1, "before", 1)) is None
        await began.wait()
        call = large(owner, set_many(1, dict.fromkeys(KEYS[:300], 1)))
        await until(lambda: len(owner.layer.changes) > 10)
        fails.set()
        await until(lambda: owner.flusher.failures == 1)
    assert owner.flusher.is_busy
    await call
    clock.advance(1)
    await until(lambda: owner.copy.revision == 2)
    assert set(owner.copy.entries) == {"before", *KEYS[:300]}


def test_the_end_of_the_loop_ends_a_call_as_a_whole(storage: FaultyStorage, clock: ManualClock, few: None) -> None:
    """If the event loop ends during the steps, the others are done at once: `stop` on another loop commits all keys."""

    async def begin() -> Owner:
        manager = owning(storage, clock)
        owner = await manager.__aenter__()
        kept.append(manager)
        large(owner, set_many(1, dict.fromkeys(KEYS[:300], 1)))
        await until(lambda: len(owner.layer.changes) > 10)
        assert owner.flusher.is_busy
        return owner

    async def end() -> None:
        owner.flusher.move()
        assert not owner.flusher.is_busy
        await owner.flusher.stop(8.0)

    kept: list[Any] = []
    owner = asyncio.run(begin())
    assert owner.layer.revision == 1
    asyncio.run(end())
    assert keys_of_records(owner) == [set(KEYS[:300])]


async def test_a_sweep_waits_for_the_steps(owner: Owner, few: None) -> None:
    """`turn_ended` is called after each call that was executed in steps."""
    busy: list[bool] = []
    owner.flusher.turn_ended = lambda: busy.append(owner.flusher.is_busy)
    await owner.flusher.make(set_many(1, dict.fromkeys(KEYS[:10], 1)))
    assert busy == [False]


# Processes


@pytest.fixture
def usual_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step and a slice have many keys."""
    monkeypatch.setattr(_batch, "STEP", 200)
    monkeypatch.setattr(_slices, "MOST_AT_ONCE", 200)
    monkeypatch.setattr(_slices, "SLICE_BYTES", 16_384)
    monkeypatch.setattr("lab_state.shared._connection._LARGE", 4_096)


@pytest.mark.usefixtures("usual_steps")
@pytest.mark.parametrize("role", ["owner", "follower"])
async def test_many_keys_of_one_process(tmp_path: Path, role: str) -> None:
    """Each process sees all keys of a call, or none of them, and calls of the same task keep their order."""
    async with members(tmp_path, 3) as (owner, follower, other):
        one = owner if role == "owner" else follower
        values = {key: {"n": number} for number, key in enumerate(KEYS)}
        seen: set[int] = set()

        async def look() -> None:
            while True:
                seen.update([len(await state.keys("k")) for state in (owner, follower, other)])
                await asyncio.sleep(0)

        looking = asyncio.create_task(look())
        revision = await one.set_many(values)
        assert await one.delete_many([*KEYS[:1_200], "missing"]) == 1_200
        assert await one.set_many(dict.fromkeys(KEYS[:1_100], 1), ttl=1_000) == revision + 2
        assert await one.delete_all("k") == 1_400
        await one.transact(lambda tx: tx.set_many(values))
        await asyncio.gather(owner.catch_up(), other.catch_up(), follower.catch_up())
        looking.cancel()
        assert {0, 1_500} <= seen <= {0, 1_500, 300, 1_400}
        assert [await state.get_all("k") for state in (owner, follower, other)] == [values] * 3


@pytest.mark.usefixtures("usual_steps")
async def test_calls_of_one_connection_keep_their_order(tmp_path: Path) -> None:
    """A call that was sent after one with many keys is executed after it."""
    async with members(tmp_path, 2) as (_, follower):
        await follower.set_many(dict.fromkeys(KEYS, 1))
        calls = [follower.delete_all("k"), follower.set("k", 2), follower.set_if_absent("other", 1)]
        found = await asyncio.gather(*map(asyncio.create_task, calls))
        assert found[0] == 1_500
        assert await follower.get_all() == {"k": 2, "other": 1}


@pytest.mark.usefixtures("usual_steps")
@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_connection_ends_during_a_large_call(tmp_path: Path, *, has_begun: bool) -> None:
    """The call is executed once, whether its execution had begun or not, and its caller gets the result."""
    async with members(tmp_path, 2) as (owner, follower):
        flusher = owner_of(owner).flusher
        assert flusher is not None
        await follower.set_many(dict.fromkeys(KEYS, 1))
        if not has_begun:
            await flusher._turn.acquire()
        call = asyncio.create_task(follower.delete_many(KEYS))
        await until(lambda: flusher._in_steps)
        cut(owner)
        if not has_begun:
            await until(lambda: len(flusher._in_steps) == 2)  # the client has sent it again
            flusher._turn.release()
        assert await call == 1_500
        assert await follower.get_all() == {}
