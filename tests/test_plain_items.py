"""`items()` without `await`: in transactions, and through `blocking` in other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
import pytest
from roles import InRole
from running import running

from lab_state import ClosedError, InvalidKeyError, Manager, MemoryStorage, PlainItems, TypeMismatchError
from lab_state._items._pages import _KEYS_IN_STEP
from lab_state.testing import ManualClock

R = TypeVar("R")

MANY = {f"key/{number:04}": {"n": number} for number in range(1000)}


class User(msgspec.Struct):
    age: int


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def state(clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    async with running(MemoryStorage(), clock, make=in_role) as manager:
        yield manager


# Transactions


async def test_a_transaction_shows_its_draft(state: Manager) -> None:
    """The iterator shows what the transaction would commit: with its changes, in order, from both ends, and in pages."""
    await state.set_many({"a": 1, "b": 2, "c": 3, "users/ann": {"age": 1}})
    async with state.transaction() as tx:
        tx.delete("b")
        tx.set("aa", [4])
        tx.set("c", 5)
        tx.set("users/bob", {"age": 2})
        shown = [("a", 1), ("aa", [4]), ("c", 5), ("users/ann", {"age": 1}), ("users/bob", {"age": 2})]
        assert list(tx.items()) == shown
        assert list(tx.items(reverse=True, limit=2)) == shown[:-3:-1]
        assert list(tx.items(after="a", limit=2)) == shown[1:3]
        users = tx.namespace("users")
        assert list(users.items(after="ann", type=User)) == [("bob", User(2))]
        tx.delete_all()
        assert list(tx.items()) == []
        tx.set("z", 1)
        assert list(tx.items()) == [("z", 1)]


async def test_a_transaction_without_changes_shows_the_state(state: Manager) -> None:
    """Without changes, the iterator has many keys in several steps."""
    await state.set_many(MANY)
    async with state.transaction() as tx:
        assert list(tx.items()) == list(MANY.items())
        assert list(tx.items("key/09", reverse=True)) == list(MANY.items())[:899:-1]


async def test_a_later_change_of_the_transaction_is_not_shown(state: Manager) -> None:
    """The moment is that of the first step, in a transaction too. The transaction may change the keys that it walks over."""
    await state.set_many(MANY)
    async with state.transaction() as tx:
        for key, value in tx.items():
            tx.set(key, value["n"])
            if value["n"] == 500:
                tx.delete_all()
                tx.set("new", 1)
    rest = {key: value["n"] for key, value in MANY.items() if value["n"] > 500}
    assert await state.get_all() == {**rest, "new": 1}


async def test_expiry_in_a_transaction(state: Manager, clock: ManualClock) -> None:
    """A key that had expired is not shown, whether the state or the transaction stored it."""
    await state.set("a", 1, ttl=0.5)
    await state.set("b", 2, ttl=5)
    async with state.transaction() as tx:
        tx.set("c", 3, ttl=0.5)
        tx.set("d", 4, ttl=5)
        clock.advance(0.6)
        items = tx.items()
        assert next(items) == ("b", 2)
        clock.advance(60)
        assert list(items) == [("d", 4)]
        assert list(tx.items()) == []


async def test_an_iterator_ends_with_its_transaction(state: Manager) -> None:
    """After the transaction a step raises RuntimeError, and closing the iterator is allowed."""
    await state.set_many(MANY)
    async with state.transaction() as tx:
        items, unused = tx.items(), tx.items()
        assert next(items) == ("key/0000", {"n": 0})
        assert repr(items) == "<PlainItems, open>"
    for each in (items, unused):
        with pytest.raises(RuntimeError, match="is over"):
            next(each)
        each.close()
        each.close()
        assert list(each) == []


async def test_a_stop_ends_an_iterator_of_a_transaction(clock: ManualClock) -> None:
    """After `stop()` a step raises ClosedError."""
    async with running(MemoryStorage(), clock) as state:
        await state.set_many(MANY)
        with pytest.raises(ClosedError):
            async with state.transaction() as tx:
                items = tx.items()
                next(items)
                await state.stop()
                with pytest.raises(ClosedError):
                    next(items)


async def test_bad_arguments_in_a_transaction(state: Manager) -> None:
    """The arguments are checked at the call."""
    async with state.transaction() as tx:
        with pytest.raises(InvalidKeyError):
            tx.items(after="")
        with pytest.raises(ValueError, match="limit"):
            tx.items(limit=0)
        tx.set("a", "x")
        with pytest.raises(TypeMismatchError, match="key 'a'"):
            next(tx.items(type=int))


async def test_a_commit_is_not_shown_by_other_iterators(state: Manager) -> None:
    """An iterator of the manager keeps its moment when a transaction commits."""
    await state.set_many(MANY)
    items = state.items()
    got = [await anext(items)]
    async with state.transaction() as tx:
        for key in await state.keys():
            tx.set(key, "new")
    got += [row async for row in items]
    assert got == list(MANY.items())


# Other threads


async def in_thread(function: Callable[[], R]) -> R:
    return await asyncio.to_thread(function)


async def test_a_thread_iterates(state: Manager) -> None:
    """`blocking.items()` has the same keys and values, in the same order, and the arguments of the manager's call."""
    await state.set_many(MANY)
    rows = list(MANY.items())
    blocking = state.blocking
    assert await in_thread(lambda: list(blocking.items())) == rows
    assert await in_thread(lambda: list(blocking.items("key/05", reverse=True, limit=3))) == rows[599:596:-1]
    names = state.namespace("key").blocking
    assert await in_thread(lambda: list(names.items(after="0997"))) == [("0998", {"n": 998}), ("0999", {"n": 999})]
    assert not state._core.blocked


async def test_writes_go_on_beside_a_thread(state: Manager) -> None:
    """The event loop and other threads write while a thread iterates: it shows its moment."""
    await state.set_many(MANY)
    blocking = state.blocking

    def walk() -> list[tuple[str, Any]]:
        got = []
        with blocking.items("key/") as items:
            for row in items:
                got.append(row)
                if len(got) % 250 == 1:
                    blocking.set_many(dict.fromkeys(MANY, len(got)))
                    blocking.delete_all("key/0")
        return got

    walking = asyncio.create_task(in_thread(walk))
    number = 0
    while not walking.done():
        number += 1
        await state.set("other", number)
        await asyncio.sleep(0)
    assert await walking == list(MANY.items())
    assert not state._core.blocked


async def test_a_thread_that_leaves_the_loop_early(state: Manager) -> None:
    """At the end of `with` the view is given back at once; an iterator that was only left, at the next write."""
    await state.set_many(MANY)

    def leave() -> None:
        with state.blocking.items() as items:
            assert next(items) == ("key/0000", {"n": 0})
        assert list(items) == []

    await in_thread(leave)
    assert not state._core.blocked
    await in_thread(lambda: next(state.blocking.items()))
    assert state._core.blocked
    await state.set("a", 1)
    assert not state._core.blocked


async def test_a_stop_amid_a_thread(clock: ManualClock) -> None:
    """After `stop()` the next step in a thread raises ClosedError. Closing the iterator does nothing."""
    stopped = threading.Event()

    def walk(items: PlainItems[Any]) -> None:
        next(items)
        loop.call_soon_threadsafe(waiting.set)
        stopped.wait(10)
        with pytest.raises(ClosedError, match="the manager of 'test' is not running"):
            next(items)
        items.close()
        assert list(items) == []

    loop, waiting = asyncio.get_running_loop(), asyncio.Event()
    async with running(MemoryStorage(), clock) as state:
        await state.set_many(MANY)
        walking = asyncio.create_task(in_thread(lambda: walk(state.blocking.items())))
        await waiting.wait()
    stopped.set()
    await walking


async def test_a_view_that_is_closed_amid_a_step_of_a_thread(state: Manager) -> None:
    """If the rows of a thread are taken away between two looks, the thread asks the loop again."""
    await state.set_many(MANY)
    items = state.blocking.items()

    run, steps = items._run, items._steps

    def emptied(step: Any) -> Any:
        is_first, result = steps._pages is None, run(step)
        if is_first:
            assert steps._pages is not None
            steps._pages.view.unread.clear()
        return result

    items._run = emptied
    assert (await in_thread(lambda: next(items)))[0] == f"key/{_KEYS_IN_STEP:04}"
    await in_thread(items.close)


async def test_on_the_event_loop_a_step_would_wait_for_itself(state: Manager) -> None:
    """A step on the event loop of the manager raises RuntimeError."""
    with pytest.raises(RuntimeError, match="would wait for the event loop"):
        next(state.blocking.items())
