"""Keys that expire, through a manager: in every call, over restarts and crashes, and with clocks that are set."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from roles import InRole
from running import flusher_of, running, until

from lab_state import (
    Config,
    FileStorage,
    InvalidKeyError,
    InvalidValueError,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    Storage,
    TypeMismatchError,
)
from lab_state._entries import Expiring
from lab_state._sweeper import _KEYS_PER_STEP
from lab_state.storage.file import FileSession
from lab_state.testing import FaultyStorage, ManualClock

MINUTE = 60.0
DAY = 86_400.0


class Model(BaseModel):
    name: str


@pytest.fixture(params=["memory", "file"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return MemoryStorage() if request.param == "memory" else FileStorage(tmp_path)


def manager(storage: Storage, clock: ManualClock, flush_interval: float | None = None) -> Manager:
    return Manager(Config(name="test", flush_interval=flush_interval), storage, clock=clock)


@pytest.fixture
async def state(storage: Storage, clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    async with running(storage, clock, make=in_role) as state:
        yield state


@asynccontextmanager
async def crashing(storage: Storage, clock: ManualClock) -> AsyncIterator[Manager]:
    """Yield a manager that ends as SIGKILL would end it: nothing more is written."""
    state = manager(storage, clock)
    await state.start()
    yield state
    session: Any = flusher_of(state).abort()
    await asyncio.sleep(0)
    if isinstance(session, FileSession):
        await asyncio.get_running_loop().run_in_executor(None, session._writer.lock.release)
        session._closing = Future()
        session._closing.set_result(None)
    else:
        await session.aclose()


def held(state: Manager) -> set[str]:
    """Return the keys in memory, with those that have expired and were not swept."""
    return set(state._core.state.entries)


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what lab_state logged; asyncio may log what other tests left behind."""
    return [record for record in caplog.records if record.name == "lab_state"]


class TestSetting:
    async def test_every_call_that_takes_a_ttl(self, state: Manager, clock: ManualClock) -> None:
        """set, set_many, set_if_absent, get_or_set, incr and an entry's set keep a key as long as they were told."""
        await state.set("set", 1, ttl=0.5)
        assert await state.set_many({"many": [1], "more": "x"}, ttl=timedelta(seconds=0.5)) == state.revision
        assert await state.set_if_absent("absent", 1, ttl=0.5)
        assert await state.get_or_set("made", lambda: {"a": 1}, ttl=0.5) == {"a": 1}
        assert await state.incr("counter", 5, ttl=0.5) == 5
        await state.entry("entry", int).set(1, ttl=0.5)
        await state.set("stays", 1)
        assert state.revision == 7
        assert {key: await state.expires_in(key) for key in await state.keys()} == {
            **dict.fromkeys(["set", "many", "more", "absent", "made", "counter", "entry"], 0.5),
            "stays": None,
        }
        clock.advance(0.499)
        assert len(state) == 8
        clock.advance(0.001)
        assert await state.get_all() == {"stays": 1}

    async def test_values_of_every_kind_expire(self, state: Manager, clock: ManualClock) -> None:
        """A key that expires gives back what was set, scalar or not, typed or not, until it is gone."""
        values: list[Any] = [None, True, 0, 1.5, "é", "", [], {}, [1, [2]], {"a": None}]
        await state.set_many({f"{number}": value for number, value in enumerate(values)}, ttl=0.5)
        await state.set("model", Model(name="Ann"), ttl=0.5)
        for number, value in enumerate(values):
            assert await state.get(f"{number}") == value
            assert state.get_nowait(f"{number}") == value
        assert await state.get("model", type=Model) == Model(name="Ann")
        with pytest.raises(TypeMismatchError, match="key 'model'"):
            await state.get("model", type=int)
        clock.advance(0.5)
        assert await state.get("0", "gone") == "gone"
        assert await state.get("model", None, type=Model) is None

    async def test_a_read_value_is_the_callers_own(self, state: Manager) -> None:
        """Changing what a read returned changes nothing in the state, also where it expires."""
        await state.set("list", [1], ttl=5)
        (await state.get("list")).append(2)
        assert await state.get("list") == [1]

    async def test_setting_again_without_a_ttl_clears_it(self, state: Manager, clock: ManualClock) -> None:
        """A key that is set without a ttl stays for good, whatever it had before."""
        await state.set_many({"a": 1, "b": 1, "c": [1]}, ttl=0.5)
        await state.set("a", 2)
        await state.set_many({"b": 2})
        async with state.transaction() as tx:
            tx.set("c", 2)
        assert [await state.expires_in(key) for key in "abc"] == [None] * 3
        clock.advance(MINUTE)
        assert await state.get_all() == {"a": 2, "b": 2, "c": 2}

    async def test_setting_again_with_another_ttl(self, state: Manager, clock: ManualClock) -> None:
        """The last ttl counts, shorter or longer, from the moment of the call."""
        await state.set_many({"longer": 1, "shorter": 1}, ttl=10)
        clock.advance(5)
        await state.set("longer", 2, ttl=100)
        await state.set("shorter", 2, ttl=1)
        assert (await state.expires_in("longer"), await state.expires_in("shorter")) == (100.0, 1.0)
        clock.advance(1)
        assert await state.get_all() == {"longer": 2}
        clock.advance(98)
        assert await state.get_all() == {"longer": 2}
        clock.advance(1)
        assert await state.get_all() == {}

    async def test_update_and_incr_keep_the_time(self, state: Manager, clock: ManualClock) -> None:
        """A changed value expires when the one before would have; a ttl given to incr is for a new number only."""
        await state.set_many({"a": 1, "b": 1}, ttl=10)
        await state.set("stays", 1)
        clock.advance(4)
        assert await state.update("a", lambda value: [value]) == [1]
        assert await state.incr("b", ttl=100) == 2
        assert await state.incr("stays", ttl=100) == 2
        assert await state.update("stays", lambda value: value + 1) == 3
        assert [await state.expires_in(key) for key in ("a", "b", "stays")] == [6.0, 6.0, None]
        await state.entry("a", list[int]).update(lambda value: [*value, 2])
        async with state.transaction() as tx:
            assert tx.incr("b", ttl=100) == 3
        assert [await state.expires_in(key) for key in ("a", "b")] == [6.0, 6.0]
        clock.advance(6)
        assert await state.get_all() == {"stays": 3}

    async def test_what_is_there_keeps_its_time(self, state: Manager) -> None:
        """set_if_absent and get_or_set change nothing of a key that is there, its time included."""
        await state.set("a", 1, ttl=10)
        await state.set("stays", 1)
        for key in ("a", "stays"):
            assert not await state.set_if_absent(key, 2, ttl=100)
            assert await state.get_or_set(key, lambda: 2, ttl=100) == 1
        assert (await state.expires_in("a"), await state.expires_in("stays"), state.revision) == (10.0, None, 2)

    async def test_in_a_transaction(self, state: Manager, clock: ManualClock) -> None:
        """A transaction sets with a ttl, sees what expires meanwhile, and commits the times as one change."""
        await state.set("soon", 1, ttl=0.5)
        async with state.transaction() as tx:
            tx.set("a", 1, ttl=10)
            tx.set_many({"b": [1]}, ttl=0.5)
            assert (tx.expires_in("a"), tx.expires_in("soon"), len(tx)) == (10.0, 0.5, 3)
            clock.advance(0.5)
            assert tx.keys() == ["a"]
            assert ("soon" in tx, "b" in tx, len(tx), tx.delete("soon")) == (False, False, 1, False)
        assert await state.get_all() == {"a": 1}
        assert await state.expires_in("a") == 9.5

    async def test_beside_a_transaction(self, state: Manager, clock: ManualClock) -> None:
        """A write with a ttl that waits for a transaction lives as long as it was told from when it was stored."""
        async with state.transaction() as tx:
            outside = contextvars.Context()
            writing = [
                outside.run(asyncio.ensure_future, state.set("a", 1, ttl=10)),
                outside.run(asyncio.ensure_future, state.set_many({"b": 1}, ttl=10)),
                outside.run(asyncio.ensure_future, state.set_if_absent("c", 1, ttl=10)),
            ]
            await asyncio.sleep(0)
            clock.advance(8)
            assert tx.keys() == []
        await asyncio.gather(*writing)
        assert [await state.expires_in(key) for key in "abc"] == [10.0, 10.0, 10.0]

    async def test_namespaces(self, state: Manager, clock: ManualClock) -> None:
        """A namespace has the same calls, for its own keys, and leaves the others alone."""
        users = state.namespace("users")
        await users.set("ann", 1, ttl=0.5)
        await users.set("bob", 1)
        await state.set("ann", 1)
        assert (await users.expires_in("ann"), await state.expires_in("users/ann")) == (0.5, 0.5)
        assert await state.expires_in("ann") is None
        clock.advance(0.5)
        assert (await users.keys(), len(users), len(state)) == (["bob"], 1, 2)
        assert "ann" not in users
        with pytest.raises(KeyNotFoundError, match="no key 'ann'"):
            await users.expires_in("ann")


class TestGone:
    """The moment that a key expires, long before it is swept."""

    @pytest.fixture(autouse=True)
    async def _expired(self, state: Manager, clock: ManualClock) -> None:
        await state.set_many({"a/1": 1, "a/2": [2]}, ttl=0.5)
        await state.set("a/stays", 3)
        clock.advance(0.5)

    async def test_it_was_not_swept(self, state: Manager) -> None:
        """Nothing was changed by the time alone."""
        assert held(state) == {"a/1", "a/2", "a/stays"}
        assert state.revision == 2

    async def test_single_reads(self, state: Manager) -> None:
        """get, get_nowait, exists and `in` find nothing; a default is returned as it is."""
        default: list[int] = []
        for key in ("a/1", "a/2"):
            assert await state.get(key, default) is default
            assert state.get_nowait(key, default) is default
            assert await state.get(key, None, type=list) is None
            with pytest.raises(KeyNotFoundError, match=f"no key '{key}'"):
                await state.get(key)
            with pytest.raises(KeyNotFoundError):
                state.get_nowait(key)
            with pytest.raises(KeyNotFoundError):
                await state.expires_in(key)
            assert not await state.exists(key)
            assert key not in state

    async def test_reads_of_many(self, state: Manager) -> None:
        """get_many, get_all, keys, len and the number of keys in the status leave it out."""
        assert await state.get_many(["a/1", "a/stays", "a/2"]) == {"a/stays": 3}
        assert await state.get_all() == {"a/stays": 3}
        assert await state.get_all("a/") == {"a/stays": 3}
        assert await state.keys() == ["a/stays"]
        assert await state.keys("a/") == ["a/stays"]
        assert len(state) == 1
        assert len(state.namespace("a")) == 1
        assert state.status().keys == 1

    async def test_deleting(self, state: Manager) -> None:
        """Deleting it is deleting what is not there: not counted, and no change."""
        assert not await state.delete("a/1")
        assert await state.delete_many(["a/1", "a/2"]) == 0
        assert await state.pop("a/1", "default") == "default"
        with pytest.raises(KeyNotFoundError):
            await state.pop("a/2")
        assert await state.delete_all("a/1") == 0
        assert state.revision == 2
        assert await state.delete_many(["a/1", "a/stays"]) == 1
        assert state.revision == 3

    @pytest.mark.parametrize("prefix", ["", "a/"])
    async def test_deleting_all(self, state: Manager, prefix: str) -> None:
        """delete_all counts what was there."""
        assert await state.delete_all(prefix) == 1
        assert await state.get_all() == {}

    async def test_writing(self, state: Manager) -> None:
        """An update takes the default, incr starts again, and what is made then has only the ttl it was given."""
        with pytest.raises(KeyNotFoundError):
            await state.update("a/1", lambda value: value)
        assert await state.update("a/1", lambda value: value + 1, 10) == 11
        assert await state.incr("a/2", default=5) == 6
        assert (await state.expires_in("a/1"), await state.expires_in("a/2")) == (None, None)

    async def test_counting_by_window(self, state: Manager, clock: ManualClock) -> None:
        """An incr with a ttl counts within a window of time, and begins anew after it, with a new window."""
        assert [await state.incr("a/1", ttl=0.25) for _ in range(3)] == [1, 2, 3]
        assert await state.expires_in("a/1") == 0.25
        clock.advance(0.25)
        assert await state.incr("a/1", ttl=10) == 1
        assert await state.expires_in("a/1") == 10

    async def test_setting_where_it_was(self, state: Manager, clock: ManualClock) -> None:
        """set_if_absent and get_or_set find the place free; what they set is not swept with the old value."""
        assert await state.set_if_absent("a/1", "new")
        assert await state.get_or_set("a/2", lambda: "made") == "made"
        clock.advance(MINUTE)
        assert await state.get_all() == {"a/1": "new", "a/2": "made", "a/stays": 3}
        assert state.revision == 4


class TestExpiresIn:
    async def test_what_remains(self, state: Manager, clock: ManualClock) -> None:
        """The seconds that remain, to the millisecond; `None` for a key that stays."""
        await state.set("a", 1, ttl=timedelta(minutes=2))
        assert await state.expires_in("a") == 2 * MINUTE
        clock.advance(MINUTE + 0.25)
        assert await state.expires_in("a") == MINUTE - 0.25
        clock.advance(MINUTE - 0.251)
        assert await state.expires_in("a") == pytest.approx(0.001)
        await state.set("a", [1])
        assert await state.expires_in("a") is None

    async def test_a_missing_key(self, state: Manager) -> None:
        """A key that is not there is KeyNotFoundError, and one that is no key InvalidKeyError."""
        with pytest.raises(KeyNotFoundError, match="no key 'nope'"):
            await state.expires_in("nope")
        for bad in ("", 5):
            with pytest.raises(InvalidKeyError):
                await state.expires_in(bad)  # type: ignore[arg-type]

    async def test_a_default(self, clock: ManualClock) -> None:
        """It takes the place of a missing key, and of one that has expired, as it is; never of one that is there."""
        default = object()
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", 1, ttl=1)
            await state.set("b", 1)
            assert (await state.expires_in("a", default), await state.expires_in("b", default)) == (1.0, None)
            clock.advance(1)
            assert await state.expires_in("a", default) is default
            assert await state.expires_in("nope", None) is None
            with pytest.raises(InvalidKeyError):
                await state.expires_in("", default)
            with pytest.raises(KeyNotFoundError):
                await state.expires_in("a")


WRITES: dict[str, Callable[[Manager, Any], Any]] = {
    "set": lambda state, ttl: state.set("a", 2, ttl=ttl),
    "set new": lambda state, ttl: state.set("new", 2, ttl=ttl),
    "set_many": lambda state, ttl: state.set_many({"a": 2, "new": 3}, ttl=ttl),
    "set_many of nothing": lambda state, ttl: state.set_many({}, ttl=ttl),
    "set_if_absent": lambda state, ttl: state.set_if_absent("new", 2, ttl=ttl),
    "set_if_absent there": lambda state, ttl: state.set_if_absent("a", 2, ttl=ttl),
    "get_or_set": lambda state, ttl: state.get_or_set("new", lambda: 2, ttl=ttl),
    "incr": lambda state, ttl: state.incr("a", ttl=ttl),
    "incr new": lambda state, ttl: state.incr("new", ttl=ttl),
    "update": lambda state, ttl: state.update("a", abs, ttl=ttl),
    "update new": lambda state, ttl: state.update("new", abs, 5, ttl=ttl),
    "namespace": lambda state, ttl: state.namespace("n").set("a", 2, ttl=ttl),
    "entry": lambda state, ttl: state.entry("a", int).set(2, ttl=ttl),
    "touch of an entry": lambda state, ttl: state.entry("a", int).touch(ttl),
    "incr of an entry": lambda state, ttl: state.entry("a", int).incr(ttl=ttl),
}


class TestBounds:
    @pytest.mark.parametrize(
        ("ttl", "error"),
        [
            *((ttl, InvalidValueError) for ttl in (0, -1, -0.0, math.nan, math.inf, -math.inf, 1e11, 10**400)),
            *((ttl, TypeError) for ttl in (True, "x", [5])),
        ],
    )
    @pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
    async def test_a_ttl_out_of_bounds_changes_nothing(
        self, clock: ManualClock, write: Callable[[Manager, Any], Any], ttl: Any, error: type[Exception]
    ) -> None:
        """An error from every call that takes one; memory, times and revision are unchanged."""
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", 1, ttl=5)
            with pytest.raises(error, match="ttl must be"):
                await write(state, ttl)
            assert (await state.get_all(), state.revision) == ({"a": 1}, 1)
            assert await state.expires_in("a") == 5.0
            async with state.transaction() as tx:
                with pytest.raises(error, match="ttl must be"):
                    tx.set("a", 2, ttl=ttl)
            assert state.revision == 1

    async def test_a_value_out_of_bounds_changes_nothing(self, state: Manager) -> None:
        """A value that cannot be kept is refused with a ttl as without, and so is a key."""
        for call in (
            lambda: state.set("a", math.nan, ttl=5),
            lambda: state.set_many({"b": 1, "a": math.nan}, ttl=5),
            lambda: state.set_if_absent("a", math.nan, ttl=5),
            lambda: state.get_or_set("a", lambda: math.nan, ttl=5),
            lambda: state.get_or_set("a", lambda: "x", type=int, ttl=5),
            lambda: state.set("", 1, ttl=5),
            lambda: state.set(5, 1, ttl=5),  # type: ignore[arg-type]
        ):
            with pytest.raises((InvalidValueError, TypeMismatchError, InvalidKeyError)):
                await call()
        assert (len(state), state.revision) == (0, 0)

    async def test_the_longest_ttl(self, storage: Storage, clock: ManualClock, in_role: InRole) -> None:
        """317 years are kept, also over a restart."""
        async with running(storage, clock, make=in_role) as state:
            await state.set("a", 1, ttl=10_000_000_000)
        async with running(storage, clock, make=in_role) as state:
            assert await state.expires_in("a") == 10_000_000_000


class TestRestarts:
    async def test_over_a_restart(self, storage: Storage, clock: ManualClock, in_role: InRole) -> None:
        """A time is absolute: what passes while no manager runs counts, and what stays stays."""
        async with running(storage, clock, make=in_role) as state:
            await state.set_many({"short": 1, "b": [1]}, ttl=10)
            await state.set("long", "x", ttl=DAY)
            await state.set("stays", None)
            clock.advance(4)
        clock.advance(5)
        async with running(storage, clock, make=in_role) as state:
            assert await state.get_all() == {"short": 1, "b": [1], "long": "x", "stays": None}
            assert [await state.expires_in(key) for key in ("short", "b", "stays")] == [1.0, 1.0, None]
            assert await state.expires_in("long") == DAY - 9
            clock.advance(1)
            assert await state.get_all() == {"long": "x", "stays": None}
        clock.advance(DAY)
        async with running(storage, clock, make=in_role) as state:
            assert await state.get_all() == {"stays": None}
            assert held(state) == {"stays"}
        async with running(storage, clock, make=in_role) as state:
            assert held(state) == {"stays"}

    async def test_over_a_crash(self, storage: Storage, clock: ManualClock) -> None:
        """The records alone hold the times, and that they were cleared, kept or deleted."""
        keys = ("stays", "cleared", "kept", "deleted", "again", "all")
        async with crashing(storage, clock) as state:
            await state.set_many(dict.fromkeys(keys, 1), ttl=10)
            await state.flush()
            clock.advance(2)
            await state.set("cleared", 2)
            await state.update("kept", lambda value: value + 1)
            await state.delete_many(["deleted", "again"])
            await state.flush()
            await state.set("again", 2)
            await state.flush()
        async with crashing(storage, clock) as state:
            assert await state.get_all() == {"stays": 1, "cleared": 2, "kept": 2, "again": 2, "all": 1}
            times = {key: await state.expires_in(key) for key in await state.keys()}
            assert times == {"stays": 8.0, "cleared": None, "kept": 8.0, "again": None, "all": 8.0}
            await state.delete_all()
            await state.set("all", 3)
            await state.flush()
        clock.advance(DAY)
        async with manager(storage, clock) as state:
            assert await state.get_all() == {"all": 3}

    async def test_over_a_checkpoint_and_records(self, storage: Storage, clock: ManualClock) -> None:
        """Times in the snapshot are changed by the records behind it."""
        async with manager(storage, clock) as state:
            await state.set_many({"a": 1, "b": 1, "c": 1}, ttl=10)
        async with crashing(storage, clock) as state:
            await state.set("a", 2)
            await state.set("b", 2, ttl=20)
            await state.flush()
        async with manager(storage, clock) as state:
            assert [await state.expires_in(key) for key in "abc"] == [None, 20.0, 10.0]
        async with manager(storage, clock) as state:
            assert [await state.expires_in(key) for key in "abc"] == [None, 20.0, 10.0]

    async def test_a_loaded_scalar_keeps_its_time(self, storage: Storage, clock: ManualClock, in_role: InRole) -> None:
        """Reading and listing what was loaded does not unwrap it."""
        async with running(storage, clock, make=in_role) as state:
            await state.set("a", 5, ttl=10)
        async with running(storage, clock, make=in_role) as state:
            assert (await state.get("a"), state.get_nowait("a"), await state.get_all()) == (5, 5, {"a": 5})
            assert await state.expires_in("a") == 10.0
            assert await state.incr("a") == 6
            assert await state.expires_in("a") == 10.0

    async def test_values_expire_while_a_checkpoint_runs(self, clock: ManualClock) -> None:
        """What expires, is swept and is set beside a checkpoint is right, in memory and after a restart."""
        storage = MemoryStorage()
        async with manager(storage, clock) as state:
            await state.set_many({f"{number}": number for number in range(5_000)}, ttl=5)
            await state.set("pad", "x" * 100_000)
            await state.flush()
            checkpointing = flusher_of(state)
            await until(
                lambda: checkpointing.checkpoints.task is not None and not isinstance(state._core.state.entries, dict)
            )
            clock.advance(10)
            await state.set("4999", "new", ttl=5)
            assert len(state) == 2
            await until(lambda: isinstance(state._core.state.entries, dict))
            assert held(state) == {"4999", "pad"}
        async with manager(storage, clock) as state:
            assert sorted(await state.keys()) == ["4999", "pad"]
            assert await state.expires_in("4999") == 5.0

    async def test_the_member_has_expiry_times_only_where_a_key_expires(
        self, tmp_path: Path, clock: ManualClock
    ) -> None:
        """`wall` is always in the file. `expires` and `time` are in it as long as a key expires. All are in milliseconds since 1970."""
        path = tmp_path / "test.json"
        async with manager(FileStorage(tmp_path), clock) as state:
            await state.set("stays", 1)
        assert list(json.loads(path.read_bytes())["$lab_state"]) == ["format", "revision", "id", "wall", "crc32"]
        async with manager(FileStorage(tmp_path), clock) as state:
            await state.set("a", [1], ttl=10)
            clock.advance(1.5)
        read = json.loads(path.read_bytes())
        assert (read["stays"], read["a"]) == (1, [1])
        assert list(read["$lab_state"]) == ["format", "revision", "id", "expires", "time", "wall", "crc32"]
        assert read["$lab_state"]["expires"] == {"a": 1_700_000_010_000}
        assert read["$lab_state"]["time"] == read["$lab_state"]["wall"] == 1_700_000_001_500
        async with manager(FileStorage(tmp_path), clock) as state:
            clock.advance(20)
            await state.set("b", 1)
        assert list(json.loads(path.read_bytes())["$lab_state"]) == ["format", "revision", "id", "wall", "crc32"]


class TestClocks:
    @pytest.mark.parametrize("jump", [10 * 365 * DAY, -10 * 365 * DAY, 3600.0, -3600.0])
    async def test_a_wall_clock_that_is_set_expires_nothing(
        self, state: Manager, clock: ManualClock, jump: float
    ) -> None:
        """While a manager runs, the seconds that pass count, and not what the wall clock is set to."""
        await state.set("before", 1, ttl=10)
        clock.jump(jump)
        await state.set("after", 1, ttl=10)
        clock.advance(5)
        clock.jump(-jump / 2)
        assert (await state.expires_in("before"), await state.expires_in("after")) == (5.0, 5.0)
        clock.advance(4.5)
        assert await state.get_all() == {"before": 1, "after": 1}
        clock.advance(0.5)
        assert await state.get_all() == {}

    @pytest.mark.parametrize("clean", [True, False])
    async def test_a_start_with_the_clock_behind(
        self, storage: Storage, clock: ManualClock, caplog: pytest.LogCaptureFixture, *, clean: bool
    ) -> None:
        """A machine that starts in the past goes on from the time of what was written; a warning says so."""
        async with (manager if clean else crashing)(storage, clock) as state:
            await state.set("a", 1, ttl=10)
            clock.advance(4)
            await state.set("b", 1, ttl=10)
            await state.flush()
        assert not told(caplog)
        behind = ManualClock(1_700_000_000.0 - 365 * DAY)
        async with manager(storage, behind) as state:
            assert [(record.levelno, record.name) for record in told(caplog)] == [(logging.WARNING, "lab_state")]
            expected = "the wall clock is 31536004 s behind the time of the last write; keys expire that much later"
            assert told(caplog)[0].getMessage().endswith(expected)
            assert (await state.expires_in("a"), await state.expires_in("b")) == (6.0, 10.0)
            await state.set("new", 1, ttl=60)
            behind.jump(365 * DAY + 30)  # NTP
            assert await state.get_all() == {"a": 1, "b": 1, "new": 1}
            behind.advance(9.5)
            assert await state.keys() == ["b", "new"]
            behind.advance(50)
            assert await state.keys() == ["new"]
            assert await state.expires_in("new") == 0.5
            behind.advance(0.5)
            assert len(state) == 0

    async def test_a_key_set_with_the_clock_behind_outlives_a_restart(
        self, storage: Storage, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What was set then lives its ttl also over a restart with the clock corrected."""
        async with manager(storage, clock) as state:
            await state.set("long", 1, ttl=DAY)
        behind = ManualClock(0.0)
        async with manager(storage, behind) as state:
            await state.set("new", 1, ttl=60)
            behind.advance(10)
        corrected = ManualClock(1_700_000_000.0 + 20)
        caplog.clear()
        async with manager(storage, corrected) as state:
            assert not told(caplog)
            assert (await state.expires_in("new"), await state.expires_in("long")) == (40.0, DAY - 20)

    async def test_the_time_never_goes_back(self, storage: Storage, clock: ManualClock) -> None:
        """Any number of starts in the past goes on where the last one ended."""
        async with manager(storage, clock) as state:
            await state.set("a", 1, ttl=10)
        for number in range(3):
            past = ManualClock(0.0)
            async with manager(storage, past) as state:
                assert await state.expires_in("a") == 10 - 2 * number
                past.advance(2)
                await state.set("b", number)

    async def test_no_warning_where_nothing_expires(
        self, storage: Storage, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where no key expires, the wall clock does not matter, and neither does it when it is right."""
        async with manager(storage, clock) as state:
            await state.set("a", 1)
        async with manager(storage, ManualClock(0.0)) as state:
            await state.set("a", 1, ttl=10)
        async with manager(storage, ManualClock(5.0)):
            assert not told(caplog)

    @pytest.mark.parametrize("clean", [True, False])
    async def test_what_was_swept_does_not_come_back(
        self, storage: Storage, clock: ManualClock, *, clean: bool
    ) -> None:
        """An expired key is recorded as deleted, so a clock that is set back does not bring it back."""
        async with crashing(storage, clock) as state:
            await state.set("a", 1, ttl=10)
            await state.set("b", 1, ttl=100)
            await state.flush()
        async with (manager if clean else crashing)(storage, clock) as state:
            clock.advance(11)
            assert held(state) == {"b"}
            await state.flush()
        async with manager(storage, ManualClock(1_700_000_000.0)) as state:
            assert await state.keys() == ["b"]
            assert held(state) == {"b"}


class TestSweeping:
    async def test_what_expired_leaves_memory(self, state: Manager, clock: ManualClock) -> None:
        """A second or two after its time a key is out of memory, as a change like any other."""
        await state.set("a", 1, ttl=1)
        await state.set("b", 1, ttl=3)
        await state.flush()
        clock.advance(2)
        assert held(state) == {"b"}
        assert (state.revision, state.durable_revision, state.status().unflushed_keys) == (3, 2, 1)
        await state.flush()
        assert state.durable_revision == 3

    async def test_a_hundred_thousand_keys(self, clock: ManualClock) -> None:
        """They are gone at once, and are swept in steps of a few hundred, one change each."""
        async with manager(MemoryStorage(), clock) as state:
            await state.set_many({f"{number}": number for number in range(100_000)}, ttl=0.5)
            while state._core.state.fold_staged(1000):  # sweeps find the keys after that
                pass
            await state.set("stays", 1)
            clock.advance(0.5)
            assert (len(state), len(held(state))) == (1, 100_001)
            sizes: list[int] = []

            def look() -> None:
                sizes.append(len(held(state)))
                if sizes[-1] > 1:
                    clock.call_later(0.0, look)

            clock.call_later(0.5, look)
            clock.advance(0.5)
            assert sizes == list(range(100_001 - _KEYS_PER_STEP, 0, -_KEYS_PER_STEP))
            assert state.revision == 2 + 100_000 / _KEYS_PER_STEP
            assert await state.get_all() == {"stays": 1}

    @pytest.mark.parametrize("interval", [0, 1.0])
    async def test_what_was_swept_becomes_durable_by_itself(self, clock: ManualClock, interval: float) -> None:
        """With a flush_interval, also of 0, it happens without a call; and a failure is tried again."""
        faulty = FaultyStorage(MemoryStorage())
        async with manager(faulty, clock, interval) as state:
            await state.set("a", 1, ttl=5)
            await state.flush()
            faulty.fail("commit")
            clock.advance(6)
            assert (state.revision, state.durable_revision) == (2, 1)
            await until(lambda: state.status().flush_failures == 1)
            clock.advance(1)
            await until(lambda: state.durable_revision == 2)
            assert state.status().last_error is None

    async def test_without_a_flush_interval_nothing_is_written(self, clock: ManualClock) -> None:
        """With None, what was swept waits for a flush, as every change does."""
        faulty = FaultyStorage(MemoryStorage())
        async with manager(faulty, clock) as state:
            await state.set("a", 1, ttl=5)
            await state.flush()
            clock.advance(100)
            for _ in range(20):
                await asyncio.sleep(0)
            assert (state.revision, faulty.calls.count("commit")) == (2, 1)

    async def test_not_during_a_transaction(self, state: Manager, clock: ManualClock) -> None:
        """A sweep waits for an open transaction, which finds the key gone all the same."""
        await state.set("a", 1, ttl=5)
        async with state.transaction() as tx:
            clock.advance(10)
            assert held(state) == {"a"}
            assert "a" not in tx
            assert tx.incr("a", ttl=1) == 1
        assert (held(state), await state.get("a")) == ({"a"}, 1)
        clock.advance(5)
        assert held(state) == set()

    async def test_nothing_is_swept_after_a_stop(self, storage: Storage, clock: ManualClock) -> None:
        """A stop ends the sweeper; a later start sweeps what expired meanwhile."""
        state = manager(storage, clock)
        await state.start()
        await state.set("a", 1, ttl=5)
        await state.stop()
        assert not any(timer.callback for _, _, timer in clock._timers)
        clock.advance(100)
        assert state.revision == 1
        await state.start()
        assert held(state) == set()
        await state.stop()
        assert state.revision == 2
        assert not any(timer.callback for _, _, timer in clock._timers)

    async def test_no_timer_for_each_key(self, state: Manager, clock: ManualClock) -> None:
        """A hundred keys that expire need one timer."""
        before = len(clock._timers)
        for number in range(100):
            await state.set(f"{number}", 1, ttl=1 + number)
        assert len(clock._timers) == before + 1

    async def test_stored_values(self, state: Manager) -> None:
        """Only what expires is wrapped: what stays costs nothing more."""
        await state.set("a", 1, ttl=5)
        await state.set("b", 1)
        entries = state._core.state.entries
        assert isinstance(entries["a"], Expiring)
        assert entries["b"] == 1


class TickingClock(ManualClock):
    """A clock that goes on by `step` whenever it is asked, as a real one does."""

    step = 0.0

    def monotonic(self) -> float:
        self.advance(self.step)
        return super().monotonic()


class TestWhileTheTimeComes:
    async def test_update(self, clock: ManualClock) -> None:
        """A key whose time comes while its update runs is gone afterwards, and not there for good."""
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", 1, ttl=0.5)

            def slow(value: int) -> int:
                clock.advance(0.5)
                return value + 1

            assert await state.update("a", slow) == 2
            assert await state.get("a", "gone") == "gone"

    @pytest.mark.parametrize("steps", range(1, 8))
    async def test_incr(self, steps: int) -> None:
        """A counter whose time comes while incr looks at it never becomes one that stays."""
        clock = TickingClock()
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", 1, ttl=steps / 1000)
            clock.step = 0.001
            await state.incr("a", ttl=1)
            clock.step = 0.0
            clock.advance(10)
            assert "a" not in state

    @pytest.mark.parametrize("steps", range(1, 8))
    async def test_get_or_set(self, steps: int) -> None:
        """get_or_set gives the old value or the new one, and never KeyNotFoundError."""
        clock = TickingClock()
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", "old", ttl=steps / 1000)
            clock.step = 0.001
            assert await state.get_or_set("a", lambda: "new") in ("old", "new")


async def test_many_keys_are_read_at_one_time() -> None:
    """Keys with the same expiry are all in a result, or none of them is, even if time passes while they are read."""
    clock, keys, sizes = TickingClock(), list("abcdef"), set[int]()
    async with manager(MemoryStorage(), clock) as state:
        for steps in range(20, 40):
            clock.step = 0
            await state.set_many(dict.fromkeys(keys, 1), ttl=steps / 100)
            clock.step = 0.01
            while "a" in state:
                sizes |= {len(await state.get_many(keys)), len(await state.get_all())}
    assert sizes == {0, 6}


async def test_delete_all_of_what_expired_is_durable(clock: ManualClock) -> None:
    """With a flush_interval of 0, what delete_all changed is durable when it returns, also when it counts nothing."""
    async with Manager(Config(name="test", flush_interval=0), MemoryStorage(), clock=clock) as state:
        await state.set("a", 1, ttl=0.5)
        clock.advance(0.5)
        assert await state.delete_all() == 0
        assert state.durable_revision == state.revision == 2


async def test_a_restart_after_a_forward_correction() -> None:
    """A clock that started in 1970 and was set right while the manager ran expires nothing at the next start."""
    clock, storage = ManualClock(0.0), MemoryStorage()
    async with manager(storage, clock) as state:
        await state.set("a", 1, ttl=60)
        clock.jump(1_700_000_000)
        clock.advance(5)
    async with manager(storage, clock) as state:
        assert await state.expires_in("a") == 55


async def test_a_sweep_between_transactions(clock: ManualClock) -> None:
    """Transactions that follow each other do not keep expired keys in memory."""
    async with manager(MemoryStorage(), clock) as state:
        await state.set("a", 1, ttl=1)
        async with state.transaction():
            clock.advance(10)
            assert len(state._core.state.entries) == 1
        assert len(state._core.state.entries) == 0


async def test_what_expired_while_nothing_ran_is_swept_at_the_start(clock: ManualClock) -> None:
    """However many keys expired, the start deletes them, durably, before the first read."""
    storage = MemoryStorage()
    async with manager(storage, clock) as state:
        await state.set_many({f"{number}": 1 for number in range(5_000)}, ttl=5)
        await state.set("stays", 1)
    clock.advance(60)
    async with Manager(Config(name="test", flush_interval=0), storage, clock=clock) as state:
        assert len(state._core.state.entries) == 1
        await state.flush()
        assert state.durable_revision == state.revision == 3


async def test_a_time_goes_with_every_commit(clock: ManualClock) -> None:
    """The next start goes on from the last commit, whatever was in it, as long as something expires."""
    storage = MemoryStorage()
    async with crashing(storage, clock) as state:
        await state.set("a", 1, ttl=20)
        await state.flush()
        clock.advance(10)
        await state.set("b", 1)
        await state.flush()
    clock.jump(-1_000_000)
    async with manager(storage, clock) as state:
        assert await state.expires_in("a") == 10


async def test_a_ttl_that_is_refused_counts(clock: ManualClock) -> None:
    """A ttl that is wrong is a set that failed."""
    async with manager(MemoryStorage(), clock) as state:
        with pytest.raises(InvalidValueError):
            await state.set("a", 1, ttl=0)
        with pytest.raises(TypeError):
            await state.set("a", 1, ttl="1")  # type: ignore[arg-type]
        assert state.metrics().operations["set", "error"] == 2


class TestUpdate:
    async def test_it_keeps_the_time_unless_another_is_given(self, clock: ManualClock) -> None:
        """Not given, or None: as before. Given: from now on. For good: `touch(key, None)`."""
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", 1, ttl=10)
            clock.advance(4)
            assert await state.update("a", lambda a: a + 1) == 2
            assert await state.expires_in("a") == 6
            assert await state.update("a", lambda a: a + 1, ttl=None) == 3
            assert await state.expires_in("a") == 6
            assert await state.update("a", lambda a: a + 1, ttl=60) == 4
            assert await state.expires_in("a") == 60
            assert await state.touch("a", None)
            assert await state.update("a", lambda a: a + 1) == 5
            assert await state.expires_in("a") is None

    async def test_a_key_that_was_missing_or_for_good(self, clock: ManualClock) -> None:
        """It expires where a ttl is given, and only there."""
        async with manager(MemoryStorage(), clock) as state:
            assert await state.update("a", lambda a: a + 1, 0, ttl=5) == 1
            assert await state.update("b", lambda b: b + 1, 0) == 1
            assert (await state.expires_in("a"), await state.expires_in("b")) == (5, None)
            assert await state.update("b", lambda b: b + 1, ttl=timedelta(seconds=5)) == 2
            clock.advance(5)
            assert len(state) == 0

    async def test_a_ttl_that_is_refused(self, clock: ManualClock) -> None:
        """The function is not called, and nothing changes."""
        called: list[int] = []
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", 1, ttl=10)
            for ttl, error in ((0, InvalidValueError), ("5", TypeError)):
                with pytest.raises(error):
                    await state.update("a", called.append, ttl=ttl)  # type: ignore[arg-type]
            assert (called, await state.expires_in("a"), state.revision) == ([], 10, 1)


class TestTouch:
    async def test_it_changes_the_time_alone(self, clock: ManualClock) -> None:
        """A key that is touched lives that long from then on, with the value that it has; durably."""
        storage = MemoryStorage()
        async with crashing(storage, clock) as state:
            await state.set("a", {"x": 1}, ttl=10)
            await state.set("b", [2])
            clock.advance(9)
            assert await state.touch("a", 10) is True
            assert await state.touch("b", timedelta(seconds=5)) is True
            assert state.revision == 4
            await state.flush()
        async with manager(storage, clock) as state:
            clock.advance(4)
            assert await state.get_all() == {"a": {"x": 1}, "b": [2]}
            clock.advance(1)
            assert await state.get_all() == {"a": {"x": 1}}
            assert await state.touch("a", None) is True
            assert await state.expires_in("a") is None

    async def test_what_is_not_there(self, clock: ManualClock) -> None:
        """A key that is missing or has expired is not brought back, and nothing changes."""
        async with manager(MemoryStorage(), clock) as state:
            await state.set("a", 1, ttl=1)
            clock.advance(1)
            assert await state.touch("a", 10) is False
            assert await state.touch("nobody", None) is False
            assert state.revision == 1
            for ttl in (0, -1, float("nan")):
                with pytest.raises(InvalidValueError):
                    await state.touch("a", ttl)
            with pytest.raises(InvalidKeyError):
                await state.touch("", 1)

    async def test_in_a_transaction(self, clock: ManualClock) -> None:
        """It is a part of a transaction as every other change."""
        async with manager(MemoryStorage(), clock) as state:
            await state.set("users/a", 1)
            async with state.namespace("users").transaction() as tx:
                assert tx.touch("a", 5) is True
                assert await state.expires_in("users/a") is None
            assert await state.expires_in("users/a") == 5


@pytest.mark.parametrize("name", ["update", "get_or_set"])
async def test_what_is_no_function(name: str, clock: ManualClock) -> None:
    """A value where a function is needed is refused, with the calls that take a value."""
    async with manager(MemoryStorage(), clock) as state:
        await state.set("a", 1)
        with pytest.raises(TypeError, match="needs a function, not int; set"):
            await getattr(state, name)("a", 5)
