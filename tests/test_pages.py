"""`keys` and `get_all`: their order, their pages, and their steps beside writers, a stop and expiry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from roles import InRole

from lab_state import ClosedError, Config, Manager, MemoryStorage, TypeMismatchError, _in_steps, read_state
from lab_state._items import _collected
from lab_state._order import _index
from lab_state.testing import ManualClock

HIGHEST = "\U0010ffff"
FIRST = {f"k{number:05}": number for number in range(1500)}


@pytest.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
async def state(storage: MemoryStorage, clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    async with in_role(Config(name="pages", flush_interval=None), storage, clock=clock) as state:
        yield state


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step end after as little as possible."""
    for name, value in {"FEW": 100, "SMALL": 100, "_KEYS_IN_STEP": 100}.items():
        monkeypatch.setattr(_index, name, value)
    monkeypatch.setattr(_in_steps, "_PIECES_IN_STEP", 1)
    monkeypatch.setattr(_collected, "_SECONDS_IN_STEP", -1)


# Order


async def test_keys_come_in_order_of_code_points(state: Manager) -> None:
    """Keys and values come in order of code points: neither in the order of their making, nor in that of UTF-16."""
    await state.set_many(dict.fromkeys([HIGHEST, "\ue000", "b", "a/2", "a", "Z", "a/10", "é"], 1))
    expected = ["Z", "a", "a/10", "a/2", "b", "é", "\ue000", HIGHEST]
    assert await state.keys() == expected
    assert list(await state.get_all()) == expected
    assert await state.keys(reverse=True) == expected[::-1]
    assert await state.keys("a") == ["a", "a/10", "a/2"]
    assert await state.keys(HIGHEST) == [HIGHEST]
    assert await state.keys(HIGHEST * 2) == []


async def test_a_view_of_a_file_has_the_same_order(state: Manager, storage: MemoryStorage) -> None:
    """`read_state` shows the keys in order, too, whatever their order in the storage is."""
    await state.set_many({"b": 1, "c": 2})
    await state.set("a", 3)
    await state.flush()
    view = await read_state("pages", storage)
    assert await view.keys(limit=2) == ["a", "b"]
    assert list(await view.get_all("", after="a")) == ["b", "c"]


# Pages


async def test_pages_hold_each_key_once(state: Manager) -> None:
    """The pages of a walk hold each key that stays once, while others come and go between two pages."""
    await state.set_many(dict.fromkeys("bdfhjl", 1))
    seen: list[str] = []
    after = None
    while page := await state.keys(after=after, limit=2):
        seen += page
        after = page[-1]
        await state.delete(after)
        await state.set_many({"a": 1, after + "x": 1} if len(seen) < 6 else {"a": 1})
    assert [key for key in seen if len(key) == 1] == list("bdfhjl")
    assert seen == sorted(set(seen))


async def test_a_page_of_a_namespace_is_relative_to_it(state: Manager) -> None:
    """`after` is a key of the namespace, and need not exist. Keys beside the namespace are in no page."""
    await state.set_many({"users": 1, "users/a": 2, "users/c": 3, "users0": 4})
    users = state.namespace("users")
    assert await users.keys(after="b") == ["c"]
    assert await users.get_all(after="b", reverse=True) == {"a": 2}
    assert await users.keys(after=HIGHEST, reverse=True, limit=5) == ["c", "a"]
    assert len(users) == 2


async def test_after_may_lie_outside_the_prefix(state: Manager) -> None:
    """A page `after` a key below or above the prefix begins at its first key, or is empty."""
    await state.set_many(dict.fromkeys(["a", "b1", "b2", "c"], 1))
    assert await state.keys("b", after="a") == ["b1", "b2"]
    assert await state.keys("b", after="c") == []
    assert await state.keys("b", after="c", reverse=True) == ["b2", "b1"]
    assert await state.keys("b", after="a", reverse=True) == []


async def test_expired_keys_take_no_place_in_a_page(state: Manager, clock: ManualClock) -> None:
    """A page has as many keys as its limit although expired keys are not removed yet, and `len` does not count them."""
    await state.set_many(dict.fromkeys(["p/a", "p/b", "p/c", "p/e"], 1), ttl=0.1)
    await state.set_many(dict.fromkeys(["p/d", "p/f", "p/g", "q"], 1))
    clock.advance(0.2)
    assert len(state._core.state.entries) == 8, "they are removed when their second is over"
    assert state.keys_nowait(limit=2) == ["p/d", "p/f"]
    assert state.keys_nowait("p/", limit=2, reverse=True) == ["p/g", "p/f"]
    assert len(state.namespace("p")) == 3
    assert state.get_all_nowait("p/", limit=1) == {"p/d": 1}


# Steps


async def test_a_small_call_takes_one_step(state: Manager) -> None:
    """Below 1,000 keys no call gives the loop back, so it cannot be told from a plain call."""
    await state.set_many(dict(list(FIRST.items())[:999]))
    turned: list[int] = []
    asyncio.get_running_loop().call_soon(turned.append, 1)
    await state.keys()
    await state.get_all()
    await state.keys(limit=999)
    assert not turned
    await state.set("one more", 1)
    asyncio.get_running_loop().call_soon(turned.append, 2)
    await state.keys()
    assert turned[-1:] == [2]


async def turns_during(call: Coroutine[Any, Any, Any], action: Callable[[int], Coroutine[Any, Any, Any]]) -> Any:
    """Make a call, and do something in each turn of the loop meanwhile; return the result, and the number of turns."""
    task, turns = asyncio.create_task(call), 0
    while not task.done():
        await asyncio.sleep(0)
        await action(turns)
        turns += 1
    return task.result(), turns


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("limit", [None, 1200])
async def test_much_is_of_one_moment(state: Manager, *, reverse: bool, limit: int | None) -> None:
    """A call in steps returns what was there at its moment, while a writer changes, adds and deletes keys."""
    await state.set_many(FIRST)
    await state.keys(limit=1)
    expected = dict(sorted(FIRST.items(), reverse=reverse)[:limit])

    async def write(turn: int) -> None:
        if turn:  # the first turn is that of the call itself
            await state.set(f"k{turn * 7 % 1500:05}", "changed")
            await state.delete(f"k{1499 - turn:05}")
            await state.set(f"k{turn:05}+", "new")

    found, turns = await turns_during(state.get_all(limit=limit, reverse=reverse), write)
    assert list(found.items()) == list(expected.items())
    assert turns > 3
    await state.delete_all()
    await state.set_many(FIRST)
    await state.keys(limit=1)
    found, turns = await turns_during(state.keys(limit=limit, reverse=reverse), write)
    assert found == list(expected)
    assert turns > 3


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", ["keys", "get_all"])
async def test_a_clear_changes_nothing_in_a_call_that_has_begun(state: Manager, name: str) -> None:
    """A call in steps returns all keys although all are deleted meanwhile."""
    await state.set_many(FIRST)
    await state.keys(limit=1)

    async def clear(turn: int) -> None:
        if turn == 1:
            await state.delete_all()

    found, _ = await turns_during(getattr(state, name)(), clear)
    assert list(found) == list(FIRST)
    assert await state.keys() == []


@pytest.mark.usefixtures("small_steps")
async def test_much_without_expired_keys(state: Manager, clock: ManualClock) -> None:
    """Keys that had expired at the moment of the call are left out, and those that expire during it are shown."""
    await state.set_many(FIRST)
    await state.set_many({"k00003": 1, "k00004": 1}, ttl=5)
    await state.set("k01400", 1, ttl=7)
    await state.namespace("k").keys()
    clock.advance(6)
    expected = [key for key in FIRST if key not in {"k00003", "k00004"}]

    async def advance(turn: int) -> None:
        if turn == 1:
            clock.advance(6)

    keys, get_all = state.keys(), state.get_all()
    found, _ = await turns_during(keys, advance)
    assert found == expected
    found, _ = await turns_during(get_all, advance)
    assert list(found) == [key for key in expected if key != "k01400"]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", ["keys", "get_all"])
@pytest.mark.parametrize("built", [False, True], ids=["first call", "later call"])
async def test_a_stop_ends_a_call_in_steps(
    storage: MemoryStorage, clock: ManualClock, name: str, *, built: bool
) -> None:
    """A call that is under way at a stop raises `ClosedError`, even if the manager is started again at once."""
    state = Manager(Config(name="pages", flush_interval=None), storage, clock=clock)
    await state.start()
    await state.set_many(FIRST)
    if built:
        await state.keys(limit=1)
    call = asyncio.create_task(getattr(state, name)())
    await asyncio.sleep(0)
    assert not call.done()
    await state.stop()
    await state.start()
    with pytest.raises(ClosedError, match="is not running"):
        await call
    await state.stop()


async def test_a_value_of_another_type_in_a_call_in_steps(state: Manager) -> None:
    """The error names the key, and no view stays open."""
    await state.set_many({**FIRST, "k00700": "text"})
    with pytest.raises(TypeMismatchError, match="k00700"):
        await state.get_all(type=int)
    assert not state._core.state.views
    await state.set("k00700", 700)
    assert await state.get_all(type=int) == FIRST


async def test_a_transaction_takes_no_steps(state: Manager) -> None:
    """The calls of a transaction return much at once, with its own changes."""
    await state.set_many(FIRST)
    async with state.transaction() as tx:
        assert tx.keys() == list(FIRST)
        tx.set("a", 1)
        tx.delete("k00000")
        assert tx.get_all(limit=1100) == dict([("a", 1), *list(FIRST.items())[1:1100]])
        assert len(tx.namespace("k")) == 0


@pytest.mark.usefixtures("small_steps")
async def test_two_first_calls_build_one_index(state: Manager) -> None:
    """Two calls that need the index at once share the work, and one that is cancelled leaves it to the other."""
    await state.set_many(FIRST)
    calls = [asyncio.create_task(state.keys()) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert await calls[1] == await calls[2] == list(FIRST)
    assert calls[0].cancelled()


@pytest.mark.usefixtures("small_steps")
async def test_a_plain_call_is_right_amid_the_steps_of_another(state: Manager) -> None:
    """A plain call that comes while a burst of new keys is put in order sees all of them."""
    await state.set_many(FIRST)
    await state.keys(limit=1)
    await state.set_many({f"x/{number:04}": 1 for number in range(1000)})
    call = asyncio.create_task(state.keys("k", limit=5))
    await asyncio.sleep(0)
    assert not call.done()
    assert len(state.namespace("x")) == 1000
    assert state.keys_nowait("x/099", limit=3, reverse=True) == ["x/0999", "x/0998", "x/0997"]
    assert await call == list(FIRST)[:5]
