"""`read_state`: a view with a manager's reading calls."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest

import lab_state
from lab_state import (
    CorruptionError,
    InvalidKeyError,
    InvalidNameError,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    StateView,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
    read_state,
)
from lab_state._reads import Reads
from lab_state.testing import FaultyStorage, ManualClock

NAME = "lab"


@dataclass
class User:
    name: str


@pytest.fixture
async def storage(memory: MemoryStorage, clock: ManualClock) -> MemoryStorage:
    """Return ten keys, some of which expire after 10 and 1,000 seconds."""
    async with Manager(NAME, memory, clock=clock) as state:
        await state.set_many({"user/ann": {"name": "Ann"}, "user/bob": {"name": 1}, "n": 1, "list": [1]})
        await state.set("short", 1, ttl=10)
        await state.set("long", [2], ttl=1000)
    return memory


async def test_a_view_has_the_reading_calls_of_a_manager(storage: MemoryStorage, clock: ManualClock) -> None:
    """Each gives what the manager gives, with the same arguments."""
    view = await read_state(NAME, storage, clock=clock)
    async with Manager(NAME, storage, clock=clock) as state:
        for each in (state, view):
            assert await each.get("user/ann", type=User) == User("Ann")
            assert await each.get("missing", None) is None
            assert each.get_nowait("n") == 1
            assert await each.get_many(["n", "missing", "list"]) == {"n": 1, "list": [1]}
            assert await each.get_all("user/") == {"user/ann": {"name": "Ann"}, "user/bob": {"name": 1}}
            assert sorted(await each.keys()) == ["list", "long", "n", "short", "user/ann", "user/bob"]
            assert await each.exists("n")
            assert not await each.exists("missing")
            assert "n" in each
            assert len(each) == 6
            assert await each.expires_in("n") is None
            assert await each.expires_in("short") == 10
            with pytest.raises(KeyNotFoundError):
                await each.get("missing")
            with pytest.raises(TypeMismatchError, match="key 'user/bob'"):
                await each.get("user/bob", type=User)
            with pytest.raises(InvalidKeyError):
                await each.get("")
            assert bool(each)


def test_a_view_has_no_other_calls() -> None:
    """It cannot be written to, and what it has is documented where the manager's calls are."""
    public = {name for name in dir(StateView) if not name.startswith("_")}
    calls = {name for name in dir(Reads) if not name.startswith("_")}
    assert public - calls == {"durable_revision", "live", "readable_by", "revision", "schema", "wall"}
    named = {"expires_in", "get", "get_all", "get_many", "keys"}
    assert calls == {"check", "exists", "items", *named, *(f"{name}_nowait" for name in named)}
    assert calls <= {name for name, _ in inspect.getmembers(Manager)}


async def test_a_view_never_changes(storage: MemoryStorage, clock: ManualClock) -> None:
    """Neither a writer nor time nor what a caller does with a value reaches it."""
    view = await read_state(NAME, storage, clock=clock)
    async with Manager(NAME, storage, clock=clock) as state:
        await state.delete_all()
    clock.advance(2000)
    (await view.get("list")).append(2)
    assert await view.get("list") == [1]
    assert (len(view), await view.expires_in("short")) == (6, 10)


async def test_what_expired_is_not_shown(storage: MemoryStorage, clock: ManualClock) -> None:
    """Keys whose time was over at the reading are not there, swept or not; those of the others count from then."""
    clock.advance(10)
    view = await read_state(NAME, storage, clock=clock)
    assert sorted(await view.keys("")) == ["list", "long", "n", "user/ann", "user/bob"]
    assert (len(view), "short" in view, await view.get("short", None)) == (5, False, None)
    assert await view.expires_in("long") == 990
    with pytest.raises(KeyNotFoundError):
        await view.expires_in("short")


async def test_time_goes_on_as_for_a_start(storage: MemoryStorage, clock: ManualClock) -> None:
    """By what the wall clock has gone on since the state was written; a clock that was set back expires nothing."""
    clock.jump(-500_000)
    view = await read_state(NAME, storage, clock=clock)
    assert (await view.expires_in("short"), await view.expires_in("long")) == (10, 1000)


async def test_a_view_tells_when_it_was_written(memory: MemoryStorage, clock: ManualClock) -> None:
    """`wall` is the wall clock at the last write, also where that clock went back. It is `None` before the first write."""
    async with Manager(NAME, memory, clock=clock) as state:
        assert (await read_state(NAME, memory, clock=clock)).wall is None
        await state.set("a", 1)
        await state.flush()
        written = clock.time()
        assert (await read_state(NAME, memory, clock=clock)).wall == written
        clock.advance(5)
        await state.set("b", 1, ttl=1000)
        await state.flush()
        assert (await read_state(NAME, memory, clock=clock)).wall == written + 5
        clock.jump(-60)
        await state.delete("b")
        await state.flush()
        assert (await read_state(NAME, memory, clock=clock)).wall == written - 55
    assert (await read_state(NAME, memory, clock=clock)).wall == written - 55


async def test_a_view_tells_its_revisions_and_whether_it_is_live(memory: MemoryStorage) -> None:
    """The storage in memory makes every record durable at once, and knows its manager."""
    state = Manager(NAME, memory)
    await state.start()
    await state.set("a", 1)
    view = await read_state(NAME, memory)
    assert (view.revision, view.durable_revision, view.live, len(view)) == (0, 0, True, 0)
    await state.stop()
    view = await read_state(NAME, memory)
    assert (view.revision, view.durable_revision, view.live, len(view)) == (1, 1, False, 1)
    assert repr(view) == "<StateView of memory:lab at revision 1>"


async def test_a_missing_state_is_an_error() -> None:
    """It is not an empty one, and nothing is made by asking; a bad name is refused."""
    memory = MemoryStorage()
    with pytest.raises(UnsupportedError, match="there is no state at memory:lab: check the name"):
        await read_state(NAME, memory)
    assert memory.places == {}
    with pytest.raises(InvalidNameError):
        await read_state("../x", memory)


async def test_damage_in_memory_is_refused(storage: MemoryStorage) -> None:
    """And left as it is."""
    storage.places[NAME].snapshot = b"{"
    storage.places[NAME].journal = None
    with pytest.raises(CorruptionError):
        await read_state(NAME, storage)
    assert storage.places[NAME].snapshot == b"{"


async def test_a_reading_can_be_made_to_fail(storage: MemoryStorage) -> None:
    """`FaultyStorage` counts readings, fails them on demand, and after a power cut reads what was durable."""
    faulty = FaultyStorage(storage)
    faulty.fail("read")
    with pytest.raises(UnavailableError, match="read failed on demand"):
        await read_state(NAME, faulty)
    assert (await read_state(NAME, faulty)).revision == 3
    assert (faulty.calls, faulty.faults) == (["read", "read"], 1)
    state = Manager(NAME, faulty)
    await state.start()
    await state.set("lost", 1)
    faulty.cut_power()
    view: Any = await read_state(NAME, faulty)
    assert (view.revision, view.live) == (3, False)
    with pytest.raises(lab_state.StorageError):
        await state.stop()
