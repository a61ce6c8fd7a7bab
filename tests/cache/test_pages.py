"""Pages and iterators of a reader: in order, of one moment, with and without a local copy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec import Raw

from lab_state import (
    ClosedError,
    Config,
    InvalidKeyError,
    Manager,
    MemoryCache,
    MemoryStorage,
    Reader,
    TypeMismatchError,
    UnavailableError,
)
from lab_state._entries import Stored
from lab_state._order import bounds
from lab_state._undo import UndoView
from lab_state.cache._format import Head, Message
from lab_state.cache._local_copy import LocalCopy
from lab_state.testing import ManualClock

MANY = {f"key/{number:04}": {"n": number} for number in range(1000)}


def writer(cache: Any, clock: ManualClock | None = None) -> Manager:
    return Manager(Config(name="name", flush_interval=0), MemoryStorage(), cache, clock=clock)


@pytest.fixture(params=[False, True], ids=["remote", "local"])
def local(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def has_all(reader: Reader, state: Manager, until: Any) -> None:
    """Wait until a reader shows the last change, from its local copy if it keeps one."""
    await reader.wait_revision(state.revision)
    if reader._is_local:
        await until(lambda: reader._local.fresh)


async def test_pages_are_those_of_the_manager(cache: Any, local: Any, until: Any) -> None:
    """Each call returns the same page as the manager does, in the same order, with and without a local copy."""
    async with writer(cache) as state, cache.reader("name", local=local) as reader:
        await state.set_many({"b": 1, "a/2": [2], "a/10": {"x": None}, "ü": "text", "a/é": None, "z": 2.5})
        await has_all(reader, state, until)
        for arguments in (
            {},
            {"prefix": "a/"},
            {"prefix": "a/", "after": "a/10", "limit": 1},
            {"after": "a/11"},
            {"reverse": True},
            {"reverse": True, "after": "b", "limit": 2},
            {"prefix": "none"},
            {"prefix": "\U0010ffff"},
            {"limit": 100},
        ):
            chosen: dict[str, Any] = arguments
            expected = await state.get_all(**chosen)
            assert list((await reader.get_all(**chosen)).items()) == list(expected.items())
            assert await reader.keys(**chosen) == list(expected)
            assert [row async for row in reader.items(**chosen)] == list(expected.items())
        assert await reader.get_all("z", type=float) == {"z": 2.5}
        assert [row async for row in reader.items("b", type=int)] == [("b", 1)]
        with pytest.raises(TypeMismatchError, match="key 'a/2'"):
            await reader.get_all("a/", after="a/10", type=int)


async def test_keys_that_expired_take_no_place(cache: Any, local: Any, until: Any) -> None:
    """A limit counts only keys that have not expired."""
    clock = ManualClock()
    async with writer(cache, clock) as state, cache.reader("name", local=local, clock=clock) as reader:
        await state.set_many({"a": 1, "b": 2}, ttl=0.1)
        await state.set_many({"c": 3, "d": 4})
        await state.set("e", 5, ttl=1000)
        await has_all(reader, state, until)
        clock.advance(0.2)
        assert await reader.keys(limit=1) == ["c"]
        assert await reader.get_all(limit=2) == {"c": 3, "d": 4}
        assert [row async for row in reader.items(reverse=True)] == [("e", 5), ("d", 4), ("c", 3)]


async def test_bad_arguments(local: Any) -> None:
    """The arguments are checked before the mirror is read."""
    async with MemoryCache().reader("name", local=local) as reader:
        calls: list[Any] = [reader.keys, reader.get_all, reader.items]
        for call in calls:
            for bad, error in (
                ({"prefix": 5}, TypeError),
                ({"limit": 0}, ValueError),
                ({"limit": True}, TypeError),
                ({"after": "\ud800"}, InvalidKeyError),
                ({"after": 5}, InvalidKeyError),
            ):
                with pytest.raises(error):
                    await call(**bad)
        with pytest.raises(TypeError):
            reader.items(type=object())


async def test_a_mirror_that_cannot_be_read(local: Any) -> None:
    """Without a mirror, the first step raises UnavailableError, and so do the other calls."""
    async with MemoryCache().reader("name", local=local) as reader:
        with pytest.raises(UnavailableError):
            await anext(reader.items())
        with pytest.raises(UnavailableError):
            await reader.keys()
        with pytest.raises(UnavailableError):
            await reader.get_all()


async def test_later_changes_are_not_shown(local: Any, until: Any) -> None:
    """Changes, deletions of all keys and a new load of the copy do not reach an iterator that has begun."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=local) as reader:
        await state.set_many(MANY)
        await has_all(reader, state, until)
        items = reader.items()
        got = [await anext(items)]
        await state.set_many(dict.fromkeys(list(MANY)[:500], "new"))
        await state.delete_many(list(MANY)[600:])
        await has_all(reader, state, until)
        later = reader.items(reverse=True)
        down = [await anext(later)]
        await state.delete_all()
        await state.set("key/0001", "newer")
        await has_all(reader, state, until)
        assert await reader.get_all() == {"key/0001": "newer"}
        reader._local.invalidate()
        got += [row async for row in items]
        down += [row async for row in later]
        assert got == list(MANY.items())
        shown = {**dict.fromkeys(list(MANY)[:500], "new"), **{key: MANY[key] for key in list(MANY)[500:600]}}
        assert down == list(shown.items())[::-1]


async def test_a_reader_that_is_closed_ends_its_iterators(local: Any, until: Any) -> None:
    """After `aclose` a step raises ClosedError, also when the reader is open again."""
    cache = MemoryCache()
    async with writer(cache) as state:
        reader = cache.reader("name", local=local)
        unused = reader.items()
        with pytest.raises(ClosedError, match="is not open"):
            await anext(unused)
        async with reader:
            await state.set_many(MANY)
            await has_all(reader, state, until)
            items = reader.items()
            await anext(items)
        with pytest.raises(ClosedError, match="is not open"):
            await anext(items)
        async with reader:
            with pytest.raises(ClosedError, match="since the first step"):
                await anext(items)
            await items.aclose()


async def test_a_copy_that_is_lost_while_its_keys_are_sorted(monkeypatch: pytest.MonkeyPatch, until: Any) -> None:
    """If the subscription is lost between two steps of sorting, the mirror is read instead."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True) as reader:
        await state.set_many({f"{number:05}": number for number in range(5000)})
        await has_all(reader, state, until)
        reading = asyncio.create_task(reader.keys(limit=2))
        await asyncio.sleep(0)
        assert reader._local._state.index is not None
        assert reader._local._state.index.is_building
        reader._local.invalidate()
        assert await reading == ["00000", "00001"]


async def test_a_cancelled_call_leaves_nothing_open(local: Any, until: Any) -> None:
    """A call that is cancelled between two steps gives its view back, and the next call has the same result."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=local) as reader:
        await state.set_many(MANY)
        await has_all(reader, state, until)
        for turns in range(6):
            calling = asyncio.create_task(reader.get_all())
            for _ in range(turns):
                await asyncio.sleep(0)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
        assert await reader.get_all() == MANY
        await reader.keys(limit=1)
        assert all((view := known()) is None or view.is_closed for known in reader._local._state.views)


class Copies(RuleBasedStateMachine):
    """A local copy with views, beside a dict, while messages come, it is lost and loaded again."""

    keys = st.sampled_from([f"k{number}" for number in range(8)])

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Stored] = {}
        self.copy = LocalCopy()
        self.views: list[tuple[UndoView[Stored], list[str], dict[str, Stored]]] = []
        self.revision = self.fills = 0
        self.load()

    @rule()
    def load(self) -> None:
        self.copy.start_loading()
        self.fills += 1
        head = Head(1, self.revision, "me", str(self.fills))
        assert self.copy.set_head(head)
        self.copy.entries.update(self.model)
        assert self.copy.finish_loading(head)
        assert self.copy.fresh

    @rule(new=st.dictionaries(keys, st.integers(0, 9), max_size=4), gone=st.sets(keys, max_size=4), clear=st.booleans())
    def message(self, *, new: dict[str, int], gone: set[str], clear: bool) -> None:
        gone -= new.keys()
        if clear:
            self.model.clear()
        self.model.update(new)
        for key in gone:
            self.model.pop(key, None)
        self.revision += 1
        told = Message(
            start=self.revision - 1,
            end=self.revision,
            writer="me",
            clear=clear,
            set={key: Raw(str(value).encode()) for key, value in new.items()},
            delete=list(gone),
        )
        assert self.copy.receive([told])

    @rule()
    def open(self) -> None:
        keys = [key for piece in self.copy.pieces(*bounds("k")) for key in piece]
        self.views.append((self.copy.view(), keys, dict(self.model)))

    @rule()
    def build(self) -> None:
        for _ in self.copy.index_steps():
            pass

    @rule()
    def leave(self) -> None:
        del self.views[:1]

    @invariant()
    def each_view_shows_its_moment(self) -> None:
        for view, keys, model in self.views:
            assert keys == sorted(model)
            assert list(view.values(keys)) == [model[key] for key in keys]

    @invariant()
    def the_order_is_right(self) -> None:
        if self.revision % 2:
            assert [key for piece in self.copy.pieces("", None) for key in piece] == sorted(self.model)


Copies.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestCopies = Copies.TestCase


async def test_an_index_that_is_not_used_is_dropped(until: Any) -> None:
    """A local copy keeps no index if many keys came since its last use."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True) as reader:
        await state.set_many({"a": 1})
        await has_all(reader, state, until)
        assert await reader.keys() == ["a"]
        await state.set_many({f"b{number}": 1 for number in range(5000)})
        await state.set("c", 1)
        await has_all(reader, state, until)
        assert reader._local._state.index is None
        assert await reader.keys(limit=2) == ["a", "b0"]
