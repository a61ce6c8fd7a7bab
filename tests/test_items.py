"""`items()`: iterators over the keys and values of one moment, while writes go on."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar
from weakref import ref

import msgspec
import pytest
from roles import InRole
from running import idle, running

from lab_state import ClosedError, Config, InvalidKeyError, Items, Manager, MemoryStorage, TypeMismatchError, read_state
from lab_state._items._pages import _KEYS_IN_STEP
from lab_state._order import _index
from lab_state.testing import FaultyStorage, ManualClock

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


@pytest.fixture
def sorted_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first call that needs an order sort the keys in many steps."""
    monkeypatch.setattr(_index, "SMALL", 3)
    monkeypatch.setattr(_index, "_KEYS_IN_STEP", 20)


async def listed(items: Items[Any]) -> list[tuple[str, Any]]:
    return [row async for row in items]


def views(state: Manager) -> int:
    """Return the number of views that the state knows, closed ones too."""
    return len(state._core.state.views)


# Order and pages


async def test_keys_come_in_order_with_their_values(state: Manager) -> None:
    """Each key under the prefix comes once, in order of code points, with its value."""
    await state.set_many({"b": 1, "a/2": [2], "a/10": {"x": None}, "ü": "text", "a/é": None})
    assert await listed(state.items()) == [
        ("a/10", {"x": None}),
        ("a/2", [2]),
        ("a/é", None),
        ("b", 1),
        ("ü", "text"),
    ]
    assert await listed(state.items("a/")) == [("a/10", {"x": None}), ("a/2", [2]), ("a/é", None)]
    assert await listed(state.items("none")) == []


async def test_a_page_begins_after_a_key(state: Manager) -> None:
    """`after`, `limit` and `reverse` choose a part, and `after` need not exist."""
    await state.set_many(dict.fromkeys("abcde", 1))

    async def keys(**arguments: Any) -> str:
        return "".join([key async for key, _ in state.items(**arguments)])

    assert await keys(after="b") == "cde"
    assert await keys(after="bb", limit=2) == "cd"
    assert await keys(reverse=True) == "edcba"
    assert await keys(reverse=True, after="d", limit=2) == "cb"
    assert await keys(limit=1) == "a"
    assert await keys(prefix="c", after="a") == "c"
    assert await keys(prefix="c", after="d") == ""
    assert await keys(prefix="\U0010ffff") == ""
    await state.set("\U0010ffff\U0010ffff", 1)
    assert await keys(prefix="\U0010ffff") == "\U0010ffff\U0010ffff"
    assert await keys(prefix="\U0010ffff", reverse=True, after="e") == ""


async def test_many_keys_take_several_steps(state: Manager) -> None:
    """More keys than one step takes come in order too, from both ends, and with a limit."""
    await state.set_many(MANY)
    rows = list(MANY.items())
    assert len(rows) > 3 * _KEYS_IN_STEP
    assert await listed(state.items()) == rows
    assert await listed(state.items(reverse=True)) == rows[::-1]
    assert await listed(state.items(after=rows[10][0], limit=555)) == rows[11:566]
    assert await listed(state.items(after=rows[900][0], limit=555, reverse=True)) == rows[899:344:-1]


async def test_a_namespace_has_its_keys_without_the_prefix(state: Manager) -> None:
    """In a namespace, the keys and `after` are relative to it."""
    await state.set_many({"users/ann": {"age": 1}, "users/bob": {"age": 2}, "users/cy": {"age": 3}, "v": 0})
    users = state.namespace("users")
    assert await listed(users.items(type=User)) == [("ann", User(1)), ("bob", User(2)), ("cy", User(3))]
    assert await listed(users.items(after="ann", type=User)) == [("bob", User(2)), ("cy", User(3))]
    assert await listed(users.items("b")) == [("bob", {"age": 2})]


async def test_values_of_all_kinds_are_decoded(state: Manager, clock: ManualClock) -> None:
    """Scalars, JSON, values that expire, large values and loaded values are all decoded as `get` decodes them."""
    await state.set_many({"a": 1, "b": [1], "c": "x" * 100_000, "d": ["y" * 100_000], "f": 2.5})
    await state.set("e", {"z": 1}, ttl=60)
    expected = [(key, await state.get(key)) for key in "abcdef"]
    assert await listed(state.items()) == expected
    only = state.namespace("only")
    await only.set_many({"x": 1, "y": 2})
    assert await listed(only.items(type=float)) == [("x", 1.0), ("y", 2.0)]
    assert await listed(only.items()) == [("x", 1), ("y", 2)]


async def test_values_that_are_decoded_in_parts(state: Manager) -> None:
    """A page with more bytes than one call decodes comes in order, up to the limit. Scalars may be among its values."""
    values: dict[str, Any] = {f"key/{number:03}": ["x" * 1000, number] for number in range(150)}
    values["key/050"] = 5
    await state.set_many(values)
    assert await listed(state.items()) == list(values.items())
    assert await listed(state.items(limit=90)) == list(values.items())[:90]


async def test_values_that_were_loaded(clock: ManualClock, in_role: InRole) -> None:
    """Values that a start loaded are decoded, too."""
    storage = MemoryStorage()
    async with running(storage, clock, make=in_role) as state:
        await state.set_many(MANY)
    async with running(storage, clock, make=in_role) as state:
        assert await listed(state.items()) == list(MANY.items())


# Errors of a value


async def test_a_value_of_another_type_is_an_error_of_its_step(state: Manager) -> None:
    """The values before and after it come, and its error names the key."""
    await state.set_many({"a": {"age": 1}, "b": {"age": "x"}, "c": {"age": 3}})
    items = state.items(type=User)
    assert await anext(items) == ("a", User(1))
    with pytest.raises(TypeMismatchError, match="key 'b'"):
        await anext(items)
    assert await anext(items) == ("c", User(3))
    with pytest.raises(StopAsyncIteration):
        await anext(items)


@pytest.mark.parametrize("bad", [b"[", b"1,2", b""])
async def test_a_value_that_is_not_json_is_an_error_of_its_step(state: Manager, bad: bytes) -> None:
    """A value that cannot be decoded without a type either is an error, and the others come."""
    await state.set_many({"a": [1], "b": [2], "c": [3], "d": [4], "e": [5]})
    state._core.state.entries["b"] = msgspec.Raw(bad)
    items = state.items()
    assert await anext(items) == ("a", [1])
    with pytest.raises(TypeMismatchError, match="key 'b'"):
        await anext(items)
    assert await listed(items) == [("c", [3]), ("d", [4]), ("e", [5])]


async def test_bad_arguments_are_refused_at_the_call(state: Manager) -> None:
    """A type that cannot be decoded, or a prefix that is no `str`, is an error of the call itself."""
    with pytest.raises(TypeError, match="prefix"):
        state.items(5)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="is not a type"):
        state.items(type=object())
    for limit in (0, -1):
        with pytest.raises(ValueError, match="limit must be 1 or more"):
            state.items(limit=limit)
    for bad in (True, 1.5, "1"):
        with pytest.raises(TypeError, match="limit must be an int of 1 or more"):
            state.items(limit=bad)  # type: ignore[arg-type]
    for key in ("", "x" * 1025, "a\0b", "\ud800", "$lab_state", 5):
        with pytest.raises(InvalidKeyError):
            state.items(after=key)  # type: ignore[arg-type]


# The moment


CHANGES: dict[str, Callable[[Manager], Any]] = {
    "set": lambda state: state.set("key/0500", "new"),
    "set_nowait": lambda state: asyncio.sleep(0, state.set_nowait("key/0500", "new")),
    "a new key": lambda state: state.set("key/0500a", "new"),
    "ttl": lambda state: state.set("key/0500", "new", ttl=5),
    "touch": lambda state: state.touch("key/0500", 5),
    "update": lambda state: state.update("key/0500", lambda old: {**old, "x": 1}),
    "incr": lambda state: state.incr("key/0500x"),
    "pop": lambda state: state.pop("key/0500"),
    "delete": lambda state: state.delete("key/0500"),
    "delete_many": lambda state: state.delete_many(list(MANY)[400:]),
    "delete_all": lambda state: state.delete_all(),
    "delete_all of a prefix": lambda state: state.delete_all("key/0"),
    "set_many": lambda state: state.set_many(dict.fromkeys(list(MANY)[400:], "new")),
    "set_many of more than a step": lambda state: state.set_many({f"key/{n:05}": "new" for n in range(3000)}),
    "flush": lambda state: state.flush(),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_later_change_is_not_shown(state: Manager, change: str) -> None:
    """Whatever is written after the first step, in whatever way, an iterator shows what was there before."""
    await state.set_many(MANY)
    items, reverse = state.items(), state.items(reverse=True)
    got, down = [await anext(items)], [await anext(reverse)]
    await CHANGES[change](state)
    got += await listed(items)
    down += await listed(reverse)
    assert got == list(MANY.items())
    assert down == got[::-1]


async def test_the_moment_is_that_of_the_first_step(state: Manager) -> None:
    """What is written between the call and the first step is shown."""
    await state.set("a", 1)
    items = state.items()
    await state.set("b", 2)
    assert await anext(items) == ("a", 1)
    await state.set("c", 3)
    assert await listed(items) == [("b", 2)]


async def test_a_writer_that_deletes_everything_again_and_again(state: Manager) -> None:
    """Between every two steps all keys are deleted and stored anew: the iterator shows its moment."""
    await state.set_many(MANY)
    got = []
    async for row in state.items():
        got.append(row)
        if len(got) % 100 == 1:
            await state.delete_all()
            await state.set_many({key: len(got) for key in MANY})
    assert got == list(MANY.items())
    assert await state.get("key/0000") == 901


async def test_two_iterators_show_two_moments(state: Manager) -> None:
    """Each iterator has a moment of its own."""
    await state.set_many({"a": 1, "b": 1})
    first = state.items()
    assert await anext(first) == ("a", 1)
    await state.set_many({"a": 2, "b": 2})
    second = state.items()
    assert await anext(second) == ("a", 2)
    await state.delete_all()
    assert await listed(first) == [("b", 1)]
    assert await listed(second) == [("b", 2)]
    assert await listed(state.items()) == []


async def test_expiry_is_that_of_the_moment(state: Manager, clock: ManualClock) -> None:
    """A key that had expired is not shown, swept or not. One that expires and is swept later is shown."""
    await state.set("a", 1, ttl=0.5)
    await state.set("b", 2, ttl=5)
    await state.set("c", 3)
    clock.advance(0.6)
    assert len(state._core.state.entries) == 3
    items = state.items()
    assert await anext(items) == ("b", 2)
    later = state.items(reverse=True)
    assert await anext(later) == ("c", 3)
    clock.advance(60)
    await idle()
    assert list(state._core.state.entries) == ["c"]
    assert await listed(items) == [("c", 3)]
    assert await listed(later) == [("b", 2)]


async def test_many_keys_that_had_expired(state: Manager, clock: ManualClock) -> None:
    """Pages whose keys had all expired are skipped, and a limit does not count them."""
    await state.set_many(MANY, ttl=0.5)
    await state.set_many({"z": 1, "zz": 2})
    clock.advance(0.6)
    assert await listed(state.items(limit=1)) == [("z", 1)]
    assert await listed(state.items()) == [("z", 1), ("zz", 2)]


async def test_a_sweep_does_not_wait_for_an_iterator(state: Manager, clock: ManualClock) -> None:
    """Expired keys are removed while an iterator is open."""
    await state.set("a", 1, ttl=1)
    await state.set("b", 1)
    items = state.items()
    await anext(items)
    clock.advance(5)
    await idle()
    assert list(state._core.state.entries) == ["b"]
    await items.aclose()


async def test_a_transaction_amid_an_iterator(state: Manager) -> None:
    """A commit is not shown, an open transaction holds no iterator up, and a transaction does not wait for one."""
    await state.set_many(MANY)
    items = state.items()
    got = [await anext(items)]
    async with state.transaction() as tx:
        tx.delete_all()
        tx.set("key/0500", "new")
        got += [await anext(items) for _ in range(300)]
    got += await listed(items)
    assert got == list(MANY.items())
    assert await listed(state.items()) == [("key/0500", "new")]


async def test_a_checkpoint_amid_an_iterator(clock: ManualClock) -> None:
    """An iterator goes on over the layers that a checkpoint puts over the map, and over a map that is cleared then."""
    storage = FaultyStorage(MemoryStorage())
    async with Manager(Config(name="test", flush_interval=None), storage, clock=clock) as state:
        await state.set_many(MANY)
        inner = state._core.state
        first = state.items()
        got = [await anext(first)]
        view = inner.freeze()
        await state.set_many(dict.fromkeys(list(MANY)[300:600], "new"))
        second = state.items()
        later = [await anext(second)]
        got += [await anext(first) for _ in range(300)]
        await state.delete_all()
        await state.set("key/0001", "newer")
        assert not inner.fold(view, 10)
        inner.release(view)
        await idle()
        got += await listed(first)
        later += await listed(second)
        assert got == list(MANY.items())
        assert later == [(key, "new" if "key/0300" <= key < "key/0600" else value) for key, value in MANY.items()]
        assert await listed(state.items()) == [("key/0001", "newer")]


# Giving the view back


async def test_the_view_is_given_back_at_the_end(state: Manager) -> None:
    """At its end an iterator needs no memory, and writers take their quick way again."""
    await state.set_many(MANY)
    items = state.items()
    await anext(items)
    assert state._core.blocked
    await listed(items)
    assert not state._core.blocked
    assert views(state) == 0


async def test_a_block_that_is_left_gives_the_view_back(state: Manager) -> None:
    """At the end of `async with` the view is given back at once, and the iterator yields nothing."""
    await state.set_many(MANY)
    async with state.items() as items:
        assert await anext(items) == ("key/0000", {"n": 0})
        assert state._core.blocked
    assert not state._core.blocked
    assert await listed(items) == []
    await items.aclose()
    async with state.items() as unused:
        pass
    assert await listed(unused) == []


async def test_a_loop_that_is_left_gives_the_view_back(state: Manager) -> None:
    """After a `break` the iterator is collected, and the next write forgets it."""
    await state.set_many(MANY)
    async for _ in state.items():
        break
    gc.collect()
    await state.set("key/0000", 5)
    assert not state._core.blocked
    assert views(state) == 0


async def test_a_collected_iterator_keeps_no_value(state: Manager) -> None:
    """The old values go with an iterator that was left, although writes went on meanwhile."""
    await state.set_many(MANY)
    items = state.items()
    await anext(items)
    await state.delete_all()
    kept = ref(items._steps._pages.view)  # type: ignore[union-attr]
    del items
    gc.collect()
    assert kept() is None


async def test_a_cleared_map_is_freed_in_steps(state: Manager) -> None:
    """A map that was cleared while an iterator was open is freed when the iterator is closed, not at once."""
    await state.set_many(MANY)
    items = state.items()
    await anext(items)
    entries = state._core.state.entries
    await state.delete_all()
    await idle()
    assert len(entries) == len(MANY)
    await items.aclose()
    await idle()
    assert len(entries) == 0


# The event loop


class Slow(msgspec.Struct):
    """A value whose decoding takes long."""

    n: int
    decoded: ClassVar[int] = 0

    def __post_init__(self) -> None:
        Slow.decoded += 1
        moments[0] += 0.0003


moments = [0.0]


async def test_the_loop_runs_between_two_steps(state: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step decodes for a millisecond: what takes longer is left for the next step."""
    monkeypatch.setattr("lab_state._items._pages.perf_counter", lambda: moments[0])
    await state.set_many(MANY)
    turns, longest = 0, 0

    async def count() -> None:
        nonlocal turns, longest
        while True:
            before = Slow.decoded
            await asyncio.sleep(0)
            turns += 1
            longest = max(longest, Slow.decoded - before)

    Slow.decoded = 0
    counting = asyncio.create_task(count())
    assert len([row async for row in state.items(type=Slow)]) == len(MANY)
    assert turns >= len(MANY) / 4
    assert longest == 4
    counting.cancel()


async def test_writers_do_not_wait(state: Manager) -> None:
    """While an iterator is open, each write is done at once, those without `await` too."""
    await state.set_many(MANY)
    async with state.items() as items:
        await anext(items)
        state.set_nowait("key/0001", 1)
        state.delete_nowait("key/0002")
        state.update_nowait("key/0003", lambda old: old["n"])
        writing = state.set("key/0004", 1)
        with pytest.raises(StopIteration):
            writing.send(None)
        assert await state.get("key/0004") == 1


async def test_one_task_at_a_time(state: Manager) -> None:
    """A second task that asks for a step while the first waits gets an error, and the first goes on."""
    await state.set_many(MANY)
    items = state.items()
    got = [await anext(items) for _ in range(_KEYS_IN_STEP)]
    first = asyncio.create_task(anext(items))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="only one may do so"):
        await anext(items)
    got.append(await first)
    got += await listed(items)
    assert got == list(MANY.items())


# Cancellation


async def test_a_step_that_is_cancelled_loses_nothing(state: Manager) -> None:
    """Each step is cancelled where it waits, and the next one continues from there."""
    await state.set_many(MANY)
    items, got, cancelled = state.items(), [], 0
    while True:
        step = asyncio.create_task(anext(items, None))
        await asyncio.sleep(0)
        if not step.done():
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            cancelled += 1
            step = asyncio.create_task(anext(items, None))
        row = await step
        if row is None:
            break
        got.append(row)
    assert got == list(MANY.items())
    assert cancelled >= len(MANY) // _KEYS_IN_STEP


async def test_an_iterator_that_is_closed_amid_a_step(state: Manager) -> None:
    """The step that waits finds the iterator closed, and ends it."""
    await state.set_many(MANY)
    items = state.items()
    for _ in range(_KEYS_IN_STEP):
        await anext(items)
    step = asyncio.create_task(anext(items, "end"))
    await asyncio.sleep(0)
    await items.aclose()
    assert await step == "end"
    assert not state._core.blocked


@pytest.mark.usefixtures("sorted_in_steps")
async def test_a_first_step_that_is_cancelled(state: Manager) -> None:
    """A first step that is cancelled while it sorts the keys opens no view, and the next one has all keys."""
    await state.set_many(MANY)
    items = state.items()
    for turns in range(1, 4):
        step = asyncio.create_task(anext(items))
        for _ in range(turns):
            await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert repr(items) == "<Items, new>"
        assert views(state) == 0
    assert await listed(items) == list(MANY.items())


@pytest.mark.usefixtures("sorted_in_steps")
async def test_an_iterator_that_is_closed_amid_its_first_step(state: Manager) -> None:
    """The first step ends without a value, and no view stays open."""
    await state.set_many(MANY)
    items = state.items()
    step = asyncio.create_task(anext(items, "end"))
    await asyncio.sleep(0)
    await items.aclose()
    assert await step == "end"
    assert not state._core.blocked


@pytest.mark.usefixtures("sorted_in_steps")
async def test_a_stop_amid_the_first_step(clock: ManualClock) -> None:
    """A first step that sorts the keys when the manager stops raises ClosedError."""
    state = Manager("test", MemoryStorage(), clock=clock)
    async with state:
        await state.set_many(MANY)
        step = asyncio.create_task(anext(state.items()))
        await asyncio.sleep(0)
    with pytest.raises(ClosedError, match="is not running"):
        await step


# Start and stop


async def test_before_the_start_and_after_the_stop(clock: ManualClock) -> None:
    """An iterator can be made before the start. A step without a running manager raises ClosedError."""
    state = Manager("test", MemoryStorage(), clock=clock)
    early, later = state.items(), state.items()
    with pytest.raises(ClosedError, match="is not running"):
        await anext(early)
    async with state:
        await state.set_many(MANY)
        await anext(early)
        await anext(later)
    with pytest.raises(ClosedError, match="is not running"):
        await anext(early)
    with pytest.raises(ClosedError, match="is not running"):
        await anext(state.items())
    async with state:
        with pytest.raises(ClosedError, match="was stopped since the first step"):
            await anext(later)
        await later.aclose()
        assert await listed(later) == []
        assert await listed(state.items()) == list(MANY.items())


async def test_a_stop_amid_a_step(clock: ManualClock) -> None:
    """A step that waits when the manager stops raises ClosedError."""
    state = Manager("test", MemoryStorage(), clock=clock)
    async with state:
        await state.set_many(MANY)
        items = state.items()
        for _ in range(_KEYS_IN_STEP):
            await anext(items)
        step = asyncio.create_task(anext(items))
        await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await step


def test_an_iterator_says_where_it_is() -> None:
    """The text of an iterator says whether it is new, open or closed."""

    async def main() -> list[str]:
        async with Manager("test", MemoryStorage()) as state:
            await state.set_many({"a": 1, "b": 2})
            items = state.items()
            texts = [repr(items)]
            await anext(items)
            texts.append(repr(items))
            await items.aclose()
            return [*texts, repr(items)]

    assert asyncio.run(main()) == ["<Items, new>", "<Items, open>", "<Items, closed>"]


# A view of a stored state


async def test_a_view_of_a_stored_state(clock: ManualClock) -> None:
    """`read_state` returns a view with the same call."""
    storage = MemoryStorage()
    async with running(storage, clock) as state:
        await state.set_many(MANY)
        await state.set("x", {"age": 5}, ttl=60)
    view = await read_state("test", storage, clock=clock)
    assert await listed(view.items("key/")) == list(MANY.items())
    assert await listed(view.items(after="key/0999", type=User)) == [("x", User(5))]
    async with view.items(reverse=True) as items:
        assert await anext(items) == ("x", {"age": 5})


async def test_a_key_that_is_no_text_beside_an_iterator(state: Manager) -> None:
    """`set` refuses such a key while an iterator is open, as it does at other times."""
    await state.set("a", 1)
    async with state.items() as items:
        assert await anext(items) == ("a", 1)
        key: Any = 5
        with pytest.raises(InvalidKeyError, match="a key must be a str, not int"):
            await state.set(key, 1)
    assert len(state) == 1
