"""Watching: who is told what, when, and until when."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from roles import InRole
from running import Maker, idle, running

from lab_state import (
    Change,
    ClosedError,
    Config,
    Manager,
    MemoryStorage,
    UnavailableError,
    UnsupportedError,
)
from lab_state._state import State
from lab_state._watch import MOST_PENDING, Watcher, Watchers
from lab_state.testing import FaultyStorage, ManualClock

Changes = AsyncIterator[Change]
Call = Callable[[Manager], Coroutine[Any, Any, object]]

EACH_WAY = pytest.mark.parametrize("durable", [False, True], ids=["live", "durable"])


@pytest.fixture
async def state(storage: FaultyStorage, clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    async with running(storage, clock, make=in_role) as state:
        yield state


async def told(changes: Changes) -> list[Change]:
    """Return all changes that are reported if nothing more happens."""
    await idle()
    found: list[Change] = []
    while True:
        reading = asyncio.ensure_future(anext(changes))
        await idle()
        if not reading.done():
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
            return found
        found.append(reading.result())


def kinds(changes: list[Change]) -> list[tuple[str, str]]:
    return [(change.key, change.kind) for change in changes]


def many(count: int) -> dict[str, int]:
    return {f"{number}": number for number in range(count)}


def is_off(state: Manager) -> bool:
    """Return whether a write has no watch to tell."""
    return not state._core.has_followup and state._core.state.on_change is None


# What each call is told as; before it, there are "a" and "b", and "old", which has expired and was not swept


async def several_changes(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.set("new", 1)
        tx.delete("a")
        tx.set("b", 1, ttl=5)
        tx.set("gone", 1)
        tx.delete("gone")


async def everything_anew(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.delete_all()
        tx.set("b", 5)


async def only_sets(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.namespace("n").set("x", 1)
        tx.set("a", [2])


TOLD: dict[str, tuple[Call, dict[str, str]]] = {
    "set": (lambda state: state.set("a", 2), {"a": "set"}),
    "set again": (lambda state: state.set("a", 1), {"a": "set"}),
    "set new": (lambda state: state.set("new", [1]), {"new": "set"}),
    "set with a ttl": (lambda state: state.set("a", 1, ttl=5), {"a": "set"}),
    "set_many": (lambda state: state.set_many({"a": 2, "new": [3]}), {"a": "set", "new": "set"}),
    "set_many with a ttl": (lambda state: state.set_many({"a": 2, "new": 3}, ttl=5), {"a": "set", "new": "set"}),
    "set_if_absent": (lambda state: state.set_if_absent("new", 1), {"new": "set"}),
    "get_or_set": (lambda state: state.get_or_set("new", list), {"new": "set"}),
    "update": (lambda state: state.update("a", lambda value: value + 1), {"a": "set"}),
    "incr": (lambda state: state.incr("a"), {"a": "set"}),
    "set where something expired": (lambda state: state.set("old", 1), {"old": "set"}),
    "pop": (lambda state: state.pop("a"), {"a": "delete"}),
    "delete": (lambda state: state.delete("a"), {"a": "delete"}),
    "delete_many": (lambda state: state.delete_many(["a", "b", "x"]), {"a": "delete", "b": "delete"}),
    "delete_all of a prefix": (lambda state: state.delete_all("a"), {"a": "delete"}),
    "transaction": (several_changes, {"new": "set", "a": "delete", "b": "set"}),
    "transaction of sets": (only_sets, {"n/x": "set", "a": "set"}),
    "namespace": (lambda state: state.namespace("n").set("x", 1), {"n/x": "set"}),
    "entry": (lambda state: state.entry("a", int).update(lambda value: value + 1), {"a": "set"}),
    "entry delete": (lambda state: state.entry("a", int).delete(), {"a": "delete"}),
    "a thread": (lambda state: asyncio.to_thread(lambda: state.blocking.set("a", 5)), {"a": "set"}),
}


async def fail_in_a_transaction(state: Manager) -> None:
    with pytest.raises(ZeroDivisionError):
        async with state.transaction() as tx:
            tx.set("a", 2)
            raise ZeroDivisionError


async def nothing_in_a_transaction(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.get("a")


async def fail_in_an_update(state: Manager) -> None:
    with pytest.raises(ZeroDivisionError):
        await state.update("a", lambda value: value // 0)


NOT_TOLD: dict[str, Call] = {
    "get": lambda state: state.get("a"),
    "set_many of nothing": lambda state: state.set_many({}),
    "set_if_absent there": lambda state: state.set_if_absent("a", 2),
    "get_or_set there": lambda state: state.get_or_set("a", list),
    "delete missing": lambda state: state.delete("new"),
    "delete expired": lambda state: state.delete("old"),
    "pop missing": lambda state: state.pop("new", None),
    "delete_all of nothing": lambda state: state.delete_all("x"),
    "failed update": fail_in_an_update,
    "failed transaction": fail_in_a_transaction,
    "empty transaction": nothing_in_a_transaction,
}


@asynccontextmanager
async def watched(
    storage: FaultyStorage, clock: ManualClock, make: Maker = Manager, *, durable: bool
) -> AsyncIterator[tuple[Manager, Changes]]:
    async with running(storage, clock, make=make) as state:
        await state.set_many({"a": 1, "b": 2})
        await state.set("old", 1, ttl=0.5)
        await state.flush()
        clock.advance(0.5)
        async with state.watch(durable=durable) as changes:
            yield state, changes


class TestKinds:
    @EACH_WAY
    @pytest.mark.parametrize(("call", "expected"), TOLD.values(), ids=list(TOLD))
    async def test_every_call_is_told(
        self,
        storage: FaultyStorage,
        clock: ManualClock,
        in_role: InRole,
        call: Call,
        expected: dict[str, str],
        *,
        durable: bool,
    ) -> None:
        """Each key that a call changes is told once, with what became of it and the revision of the change."""
        async with watched(storage, clock, in_role, durable=durable) as (state, changes):
            before = state.revision
            await call(state)
            await state.flush()
            found = await told(changes)
            assert {change.key: change.kind for change in found} == expected
            assert len(found) == len(expected)
            assert {change.revision for change in found} == {before + 1} == {state.revision}

    @EACH_WAY
    @pytest.mark.parametrize("call", NOT_TOLD.values(), ids=list(NOT_TOLD))
    async def test_what_changes_nothing_is_not_told(
        self, storage: FaultyStorage, clock: ManualClock, in_role: InRole, call: Call, *, durable: bool
    ) -> None:
        """A call that changes nothing, or fails, is not told."""
        async with watched(storage, clock, in_role, durable=durable) as (state, changes):
            await call(state)
            await state.flush()
            assert await told(changes) == []

    @EACH_WAY
    async def test_everything_deleted(
        self, storage: FaultyStorage, clock: ManualClock, in_role: InRole, *, durable: bool
    ) -> None:
        """A delete_all of few keys is told key by key; in a transaction too, where what is set again is set."""
        async with watched(storage, clock, in_role, durable=durable) as (state, changes):
            await everything_anew(state)
            await state.flush()
            found = {change.key: change.kind for change in await told(changes)}
            assert found.items() >= {"a": "delete", "b": "set"}.items()
            assert found.keys() <= {"a", "b", "old"}
            await state.delete_all()
            await state.flush()
            assert kinds(await told(changes)) == [("b", "delete")]

    @EACH_WAY
    async def test_a_sweep_is_told(self, storage: FaultyStorage, clock: ManualClock, *, durable: bool) -> None:
        """What expires is told as that, when it is swept."""
        async with watched(storage, clock, durable=durable) as (state, changes):
            await state.set("soon", 1, ttl=1)
            await state.set("later", 1, ttl=5)
            await state.flush()
            await told(changes)
            clock.advance(3)
            await state.flush()
            found = await told(changes)
            assert sorted(kinds(found)) == [("old", "expire"), ("soon", "expire")]
            clock.advance(5)
            await state.flush()
            assert kinds(await told(changes)) == [("later", "expire")]

    @pytest.mark.parametrize("ttl", [0.03, 0.4, 1.001, 3.7, 61.5])
    @pytest.mark.parametrize("first", ["the watch", "the key"])
    async def test_an_expiry_is_told_at_its_time(
        self, state: Manager, clock: ManualClock, first: str, ttl: float
    ) -> None:
        """It is told 50 ms after its time at the latest, and not before it, whichever there was first."""
        clock.advance(0.777)
        if first == "the key":
            await state.set("a", 1, ttl=ttl)
        async with state.watch() as changes:
            if first == "the watch":
                await state.set("a", 1, ttl=ttl)
                assert kinds(await told(changes)) == [("a", "set")]
            clock.advance(ttl - 0.001)
            assert await told(changes) == []
            clock.advance(0.051)
            assert kinds(await told(changes)) == [("a", "expire")]

    async def test_a_change(self, state: Manager) -> None:
        """A change is immutable, equal by value, and has no value of the state in it."""
        async with state.watch() as changes:
            await state.set("a", "secret")
            change = await anext(changes)
        assert change == Change("a", "set", 1)
        assert len({change, Change("a", "set", 1)}) == 1
        assert "secret" not in repr(change)
        with pytest.raises(AttributeError):
            change.key = "b"  # type: ignore[misc]


class TestWhich:
    @EACH_WAY
    async def test_by_prefix(self, state: Manager, *, durable: bool) -> None:
        """Each watcher is told the keys that begin with its prefix, however many there are of one prefix or another."""
        prefixes = ["", "a", "a/", "a/", "a/x", "b", "ü", "a/x/y/z"]
        async with AsyncExitStack() as stack:
            watches = [await stack.enter_async_context(state.watch(prefix, durable=durable)) for prefix in prefixes]
            keys = ["a", "a/", "a/x", "a/x/y", "b", "ba", "ü", "A", "/a/x"]
            for key in keys:
                await state.set(key, 1)
            await state.delete("a/x")
            await state.flush()
            for prefix, changes in zip(prefixes, watches, strict=True):
                expected = {key: "delete" if key == "a/x" else "set" for key in keys if key.startswith(prefix)}
                assert dict(kinds(await told(changes))) == expected

    @EACH_WAY
    async def test_in_a_namespace(self, state: Manager, *, durable: bool) -> None:
        """A namespace is told its own keys, by the names that they have in it."""
        users = state.namespace("users")
        async with (
            users.watch(durable=durable) as all_users,
            users.watch("a", durable=durable) as some,
            users.namespace("x").watch("y", durable=durable) as nested,
        ):
            await users.set_many({"ann": 1, "bob": 1, "x/y1": 1, "x/z": 1})
            await state.set_many({"ann": 1, "users": 1, "usersx": 1})
            await state.delete("users/bob")
            await state.flush()
            assert sorted(kinds(await told(all_users))) == [
                ("ann", "set"),
                ("bob", "delete"),
                ("x/y1", "set"),
                ("x/z", "set"),
            ]
            assert kinds(await told(some)) == [("ann", "set")]
            assert kinds(await told(nested)) == [("y1", "set")]

    async def test_others_are_not_asked(self, state: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thousand watchers of other prefixes are not asked when a key changes."""
        asked: list[tuple[str, str]] = []
        tell = Watcher.tell

        def counted(self: Watcher, key: str, kind: Any, revision: int) -> None:
            asked.append((self.prefix, key))
            tell(self, key, kind, revision)

        monkeypatch.setattr(Watcher, "tell", counted)
        async with AsyncExitStack() as stack:
            for number in range(1_000):
                await stack.enter_async_context(state.watch(f"{number:04}/", durable=number % 2 == 1))
            await state.set_many({"0004/a": 1, "0005/a": 1, "other": 1})
            await state.flush()
            await idle()
            assert sorted(asked) == [("0004/", "0004/a"), ("0005/", "0005/a")]

    @pytest.mark.parametrize("prefix", [None, 5, b"a", ["a"]], ids=repr)
    async def test_a_prefix_that_is_no_str(self, state: Manager, prefix: Any) -> None:
        """It is TypeError, and there is no watch."""
        for scope in (state, state.namespace("n")):
            with pytest.raises(TypeError, match="a prefix must be a str"):
                async with scope.watch(prefix):
                    raise AssertionError
        assert state._core.state.on_change is None


class TestFromNow:
    async def test_from_now_on(self, state: Manager) -> None:
        """What changed before the watch was opened is not told, not even in the same turn of the loop."""
        async with state.watch() as first:
            await state.set_many({"a": 1, "b": 1})
            async with state.watch() as second:
                await state.set("b", 2)
                await state.set("c", 2)
                assert sorted(kinds(await told(second))) == [("b", "set"), ("c", "set")]
            assert sorted(kinds(await told(first))) == [("a", "set"), ("b", "set"), ("c", "set")]

    async def test_a_flood_before_now(self, state: Manager) -> None:
        """A resync for what changed before the watch was opened is not told."""
        async with state.watch() as first:
            await state.set_many(many(MOST_PENDING + 1))
            async with state.watch() as second:
                await idle()
                assert await told(second) == []
            assert [change.kind for change in await told(first)] == ["resync"]

    async def test_what_is_durable_from_now_on(self, state: Manager) -> None:
        """A durable watch is told what becomes durable after it was opened, also what was changed before."""
        await state.set("a", 1)
        await state.flush()
        await state.set("b", 1)
        async with state.watch(durable=True) as changes:
            await state.flush()
            assert kinds(await told(changes)) == [("b", "set")]

    async def test_open_then_read(self, state: Manager) -> None:
        """Who opens the watch and then reads everything misses nothing, whatever happens between."""
        seen: dict[str, int] = {}
        await state.set("a", 1)
        async with state.watch() as changes:
            await state.set("b", 1)
            seen = await state.get_all()
            await state.set("a", 2)
            await state.delete("b")
            for change in await told(changes):
                seen.pop(change.key, None)
                if change.kind == "set":
                    seen[change.key] = await state.get(change.key)
            assert seen == await state.get_all()


class TestSlowReaders:
    @EACH_WAY
    async def test_the_last_change_of_each_key(self, state: Manager, *, durable: bool) -> None:
        """A slow reader is told the last change of each key, in the order of these, with their revisions."""
        async with state.watch(durable=durable) as changes:
            for number, key in enumerate(["a", "b", "a", "c", "b"]):
                await state.set(key, number)
                await state.flush()
                await idle()
            await state.delete("a")
            await state.flush()
            await state.set("d", 1)
            await state.flush()
            expected = [Change("c", "set", 4), Change("b", "set", 5), Change("a", "delete", 6), Change("d", "set", 7)]
            assert await told(changes) == expected

    async def test_within_one_turn(self, state: Manager) -> None:
        """Changes within one turn of the loop are told as the last of each key, too."""
        async with state.watch() as changes:
            for number, key in enumerate(["a", "b", "a", "c", "b"]):
                await state.set(key, number)
            await state.delete("a")
            await state.set("d", 1)
            expected = [Change("c", "set", 4), Change("b", "set", 5), Change("a", "delete", 6), Change("d", "set", 7)]
            assert await told(changes) == expected

    async def test_a_key_that_is_told_is_told_again(self, state: Manager) -> None:
        """What changes after it was read is told anew."""
        async with state.watch() as changes:
            for number in range(1, 4):
                await state.set("a", number)
                assert await anext(changes) == Change("a", "set", number)
            assert await told(changes) == []

    async def test_handed_out_once_a_turn(self, state: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hundred writes in one turn of the loop are handed out once, in the next."""
        calls: list[int] = []
        tell = Watcher.tell

        def counted(self: Watcher, key: str, kind: Any, revision: int) -> None:
            calls.append(revision)
            tell(self, key, kind, revision)

        turns = 0
        hand_out = Watchers._hand_out

        def counted_turn(self: Watchers) -> None:
            nonlocal turns
            turns += 1
            hand_out(self)

        monkeypatch.setattr(Watcher, "tell", counted)
        monkeypatch.setattr(Watchers, "_hand_out", counted_turn)
        async with state.watch():
            for number in range(100):
                await state.set("a", number)
            await state.set_many({"a": 1})
            assert calls == []
            await asyncio.sleep(0)
            assert calls == [101]
            await idle()
            assert calls == [101]
            await state.set("a", 1)
            await asyncio.sleep(0)
            assert calls == [101, 102]
            assert turns == 2

    async def test_more_than_are_kept(self, state: Manager) -> None:
        """10,000 keys are kept for a reader; one more, and all of them are one resync, with the last revision."""
        async with state.watch() as full, state.watch() as flooded, state.watch("0") as other:
            for number in range(MOST_PENDING):
                await state.set(f"{number}", 1)
            await idle()
            await state.set("0", 2)  # pending already
            await idle()
            found = [await anext(full) for _ in range(MOST_PENDING)]
            assert len({change.key for change in found}) == MOST_PENDING
            assert (found[0].key, found[-1]) == ("1", Change("0", "set", MOST_PENDING + 1))
            await state.set("one more", 1)
            await idle()
            assert await told(flooded) == [Change("", "resync", MOST_PENDING + 2)]
            assert await told(full) == [Change("one more", "set", MOST_PENDING + 2)]
            assert await told(other) == [Change("0", "set", MOST_PENDING + 1)]
            await state.set("after", 1)
            assert await told(flooded) == [Change("after", "set", MOST_PENDING + 3)]

    async def test_changes_after_a_resync_that_was_not_read(self, state: Manager) -> None:
        """As long as a resync is not read it stands for what comes after it, too."""
        async with state.watch() as changes:
            await state.set_many(many(MOST_PENDING + 1))
            await idle()
            await state.set("a", 1)
            await idle()
            await state.set_many(many(MOST_PENDING + 1))
            await idle()
            await state.delete("a")
            await idle()
            assert await told(changes) == [Change("", "resync", 4)]

    @EACH_WAY
    async def test_many_at_once(self, state: Manager, *, durable: bool) -> None:
        """One change, or one turn, of 10,000 keys is told key by key; of more, as one resync."""
        async with state.watch(durable=durable) as changes:
            await state.set_many(many(MOST_PENDING))
            await state.flush()
            found = [await anext(changes) for _ in range(MOST_PENDING)]
            assert {change.key: change.kind for change in found} == dict.fromkeys(many(MOST_PENDING), "set")
            assert await told(changes) == []
            await state.set_many(many(MOST_PENDING + 1))
            await state.flush()
            assert await told(changes) == [Change("", "resync", 2)]
            await state.set_many(many(MOST_PENDING))
            await state.set("another", 1)
            await state.flush()
            assert await told(changes) == [Change("", "resync", 4)]

    @EACH_WAY
    async def test_delete_all(self, state: Manager, *, durable: bool) -> None:
        """Deleting 10,000 keys at once is told key by key; deleting more, as one resync, with what came after it."""
        await state.set_many(many(MOST_PENDING))
        await state.flush()
        async with state.watch(durable=durable) as changes:
            assert await state.delete_all() == MOST_PENDING
            await state.flush()
            found = [await anext(changes) for _ in range(MOST_PENDING)]
            assert {change.key: change.kind for change in found} == dict.fromkeys(many(MOST_PENDING), "delete")
            assert {change.revision for change in found} == {2}
            await state.set_many(many(MOST_PENDING + 1))
            await state.flush()
            assert await told(changes) == [Change("", "resync", 3)]
            assert await state.delete_all() == MOST_PENDING + 1
            await state.set("a", 1)
            await state.flush()
            assert await told(changes) == [Change("", "resync", 5)]
            await state.set("a", 2)
            await state.flush()
            assert await told(changes) == [Change("a", "set", 6)]

    async def test_resync_in_a_namespace(self, state: Manager) -> None:
        """A resync has no key, in a namespace either."""
        users = state.namespace("users")
        async with users.watch() as changes:
            await users.set_many(many(MOST_PENDING + 1))
            assert await told(changes) == [Change("", "resync", 1)]


class TestDurable:
    async def test_only_what_is_durable(self, storage: FaultyStorage, state: Manager) -> None:
        """A durable watch is told after the commit, not before; a live one at once."""
        async with state.watch(durable=True) as durable, state.watch() as live:
            await state.set("a", 1)
            assert await told(durable) == []
            assert await told(live) == [Change("a", "set", 1)]
            storage.hang("commit")
            flushing = asyncio.create_task(state.flush())
            await idle()
            assert storage.calls[-1] == "commit"
            await state.set("b", 1)
            assert await told(durable) == []
            storage.resume()
            await flushing
            assert await told(durable) == [Change("a", "set", 1)]
            await state.flush()
            assert await told(durable) == [Change("b", "set", 2)]

    @pytest.mark.parametrize("moment", ["before", "after"])
    async def test_a_failed_flush_is_not_told(self, storage: FaultyStorage, state: Manager, moment: Any) -> None:
        """What a flush failed to write is told when a later one succeeds, with what came since, and once."""
        async with state.watch(durable=True) as changes:
            storage.fail("commit", moment)
            await state.set_many({"a": 1, "b": 1})
            with pytest.raises(UnavailableError):
                await state.flush()
            assert await told(changes) == []
            await state.delete("b")
            await state.flush()
            assert sorted(kinds(await told(changes))) == [("a", "set"), ("b", "delete")]
            await state.flush()
            assert await told(changes) == []

    async def test_several_changes_of_one_commit(self, state: Manager) -> None:
        """A commit tells the last change of each key, all with the revision that it reached."""
        async with state.watch(durable=True) as changes:
            for number in range(5):
                await state.set("a", number)
            await state.set("b", 1)
            await state.delete("b")
            await state.flush()
            assert sorted(await told(changes), key=lambda change: change.key) == [
                Change("a", "set", 7),
                Change("b", "delete", 7),
            ]

    @EACH_WAY
    async def test_write_through(self, storage: FaultyStorage, clock: ManualClock, *, durable: bool) -> None:
        """With a flush_interval of 0, both are told when the write returns; a durable one what was swept, too."""
        async with running(storage, clock, 0) as state, state.watch(durable=durable) as changes:
            await state.set("a", 1)
            await state.set_many({"a": [2]}, ttl=1)
            assert await told(changes) == [Change("a", "set", 2)]
            assert state.durable_revision == 2
            clock.advance(2)
            assert await told(changes) == [Change("a", "expire", 3)]


class TestTheEnd:
    @EACH_WAY
    async def test_stop_ends_it_after_the_rest(
        self, storage: FaultyStorage, clock: ManualClock, *, durable: bool
    ) -> None:
        """The iteration ends when the manager stops, after what was not told yet, the last flush included."""
        found: list[Change] = []
        reading: list[asyncio.Task[None]] = []
        opened = asyncio.Event()

        async def read(state: Manager) -> None:
            async with state.watch(durable=durable) as changes:
                opened.set()
                async for change in changes:
                    found.append(change)
                    await asyncio.sleep(0)

        async with running(storage, clock) as state:
            reading.append(asyncio.create_task(read(state)))
            await opened.wait()
            await state.set("a", 1)
            await state.flush()
            await idle()
            assert kinds(found) == [("a", "set")]
            await state.set("b", 1)
            await state.set("c", 1)
        await asyncio.gather(*reading)
        assert sorted(kinds(found)) == [("a", "set"), ("b", "set"), ("c", "set")]

    async def test_a_failed_last_flush_is_not_told(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A stop that could not write ends a durable watch without telling what was lost; a live one was told."""
        state = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await state.start()
        async with state.watch(durable=True) as durable, state.watch() as live:
            await state.set("a", 1)
            storage.fail("commit", error=UnsupportedError("read-only"))
            with pytest.raises(UnsupportedError):
                await state.stop()
            assert [change async for change in durable] == []
            assert [change async for change in live] == [Change("a", "set", 1)]

    @EACH_WAY
    async def test_reading_after_the_stop(self, storage: FaultyStorage, clock: ManualClock, *, durable: bool) -> None:
        """What is left can be read after the stop, and leaving then, or after another start, is no error."""
        state = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await state.start()
        async with state.watch(durable=durable) as changes:
            await state.set("a", 1)
            await state.stop()
            await state.start()
            await state.set("b", 1)
            await state.flush()
            assert [change async for change in changes] == [Change("a", "set", 1)]
            async with state.watch(durable=durable) as others:
                await state.set("c", 1)
                await state.flush()
                assert kinds(await told(others)) == [("c", "set")]
            with pytest.raises(StopAsyncIteration):
                await anext(changes)
        assert is_off(state)
        await state.stop()

    async def test_an_end_in_the_turn_of_a_change(self) -> None:
        """What changed in the very turn in which the end comes is told, too, and once."""
        state = State()
        watchers = Watchers(state)
        watcher = Watcher("", 0, 0, durable=False)
        watchers.add(watcher)
        state.set("a", 1)
        watchers.close()
        assert [change async for change in watcher] == [Change("a", "set", 1)]
        await idle()
        with pytest.raises(StopAsyncIteration):
            await anext(watcher)

    async def test_leaving_ends_it(self, state: Manager) -> None:
        """Who reads in another task is told the rest and that it is over, when the block is left."""
        async with state.watch() as changes:
            reading = asyncio.ensure_future(anext(changes))
            await idle()
        with pytest.raises(StopAsyncIteration):
            await reading
        await state.set("a", 1)
        async with state.watch() as changes:
            await state.set("b", 1)
            await idle()
        await state.set("c", 1)
        await idle()
        assert kinds([change async for change in changes]) == [("b", "set")]

    async def test_the_last_one_to_leave(self, state: Manager) -> None:
        """While there is a watch, writes are noted; after the last one has left, they cost what they did before."""
        core = state._core
        assert is_off(state)
        async with state.watch():
            async with state.watch("a"), state.watch("a", durable=True), state.watch(durable=True):
                assert core.has_followup
            assert core.has_followup
            assert core.state.on_change is not None
        assert is_off(state)
        async with state.watch(durable=True):
            assert core.has_followup
        assert is_off(state)
        watchers = core._watchers
        assert not watchers
        assert list(watchers._live) == list(watchers._durable) == []
        assert watchers._live._by_length == watchers._durable._by_length == {}

    async def test_write_through_goes_on(self, storage: FaultyStorage, clock: ManualClock, in_role: InRole) -> None:
        """With a flush_interval of 0, a write waits for its commit before, during and after a watch."""
        async with running(storage, clock, 0, make=in_role) as state:
            for _ in range(2):
                assert await state.set("a", 1) == state.durable_revision
                async with state.watch():
                    assert await state.set("a", 1) == state.durable_revision

    async def test_an_error_in_the_body(self, state: Manager) -> None:
        """An exception of the body goes on, the watch is closed, and the manager is well."""
        for durable in (False, True):
            with pytest.raises(ZeroDivisionError):
                async with state.watch(durable=durable) as changes:
                    await state.set("a", 1)
                    await state.flush()
                    async for change in changes:
                        raise ZeroDivisionError(change.key)
            assert is_off(state)
        await state.set("a", 2)
        await state.flush()
        assert state.durable_revision == 3
        async with state.watch() as changes:
            await state.set("b", 1)
            assert await told(changes) == [Change("b", "set", 4)]

    async def test_a_cancelled_body(self, state: Manager) -> None:
        """A task that is cancelled while it reads leaves the watch."""

        async def read() -> None:
            async with state.watch() as changes:
                async for _ in changes:
                    pass

        reading = asyncio.create_task(read())
        await idle()
        assert state._core.has_followup
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not state._core.has_followup


class TestReaders:
    async def test_two_readers_of_one_watch(self, state: Manager) -> None:
        """A second task that reads the same watch is told so, and the first one reads on."""
        async with state.watch() as changes:
            assert aiter(changes) is changes
            first = asyncio.ensure_future(anext(changes))
            await idle()
            with pytest.raises(RuntimeError, match="two tasks read one watch: open a watch for each task"):
                await anext(changes)
            await state.set("a", 1)
            assert await first == Change("a", "set", 1)
            await state.set("b", 1)
            assert await anext(changes) == Change("b", "set", 2)

    async def test_a_cancelled_reader_loses_nothing(self, state: Manager) -> None:
        """A reader that is cancelled while it waits, before or after it was woken, can read on."""
        async with state.watch() as changes:
            for number, turns in enumerate([0, 1], 1):
                reading = asyncio.ensure_future(anext(changes))
                await idle()
                await state.set("a", number)
                for _ in range(turns):
                    await asyncio.sleep(0)
                assert not reading.done()
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                assert await told(changes) == [Change("a", "set", number)]

    async def test_a_reader_with_a_deadline(self, state: Manager) -> None:
        """A deadline that passes while nothing changes leaves the watch as it was."""
        async with state.watch() as changes:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anext(changes)
            await state.set("a", 1)
            assert await anext(changes) == Change("a", "set", 1)

    async def test_who_waits_is_woken_once(self, state: Manager) -> None:
        """A reader that waits is told the changes of one turn one after the other."""
        async with state.watch() as changes:
            reading = asyncio.ensure_future(anext(changes))
            await idle()
            await state.set_many({"a": 1, "b": 1, "c": 1})
            assert await reading == Change("a", "set", 1)
            assert await told(changes) == [Change("b", "set", 1), Change("c", "set", 1)]

    async def test_not_running(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """Before start() and after stop() it is ClosedError, when the block is entered."""
        state = Manager("test", storage, clock=clock)
        for _ in range(2):
            watch = state.watch()
            with pytest.raises(ClosedError, match="not running"):
                async with watch:
                    raise AssertionError
            await state.start()
            await state.stop()

    def test_another_event_loop(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """On another event loop than that of start() it is RuntimeError, and there is no watch."""
        state = Manager(Config(name="test", flush_interval=None), storage, clock=clock)

        async def watch() -> None:
            async with state.watch():
                raise AssertionError

        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(state.start())
            with pytest.raises(RuntimeError, match="belongs to the event loop"):
                asyncio.run(watch())
            assert state._core.state.on_change is None
            loop.run_until_complete(state.stop())
        finally:
            loop.close()


async def test_a_flood_then_a_watch_then_a_change(state: Manager) -> None:
    """A watch that is opened after a flood, in the same turn, is told what comes after that, and no resync."""
    async with state.watch():
        await state.set_many(many(MOST_PENDING + 1))
        async with state.watch() as changes:
            await state.set("a", 1)
            assert await told(changes) == [Change("a", "set", 2)]


@EACH_WAY
async def test_a_flood_elsewhere(state: Manager, *, durable: bool) -> None:
    """More than 10,000 changes under another prefix are no resync for who does not watch that."""
    async with state.watch("quiet/", durable=durable) as changes:
        await state.set_many(many(MOST_PENDING + 1))
        await state.set("quiet/a", 1)
        await state.flush()
        assert await told(changes) == [Change("quiet/a", "set", 2)]


async def test_a_flood_is_told_in_steps(state: Manager) -> None:
    """Many changes are told over several turns of the loop, so that no turn is long; a stop tells the rest at once."""
    async with state.watch() as changes:
        await state.set_many(many(3_500))
        await asyncio.sleep(0)
        assert (await anext(changes)).kind == "set"
        assert state._core._watchers._queue
        await state.stop()
        assert len([change async for change in changes]) == 3_499


async def test_many_watchers_of_many_keys_are_told_in_steps(state: Manager) -> None:
    """The bound is on reports, not on keys: one turn reports a key to a thousand watchers."""
    async with AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(state.watch("some")) for _ in range(600)]
        await state.set_many({f"some {number}": number for number in range(10)})
        told = []
        for _ in range(7):
            await asyncio.sleep(0)
            told.append(len(watches[-1]._pending))  # type: ignore[attr-defined]
    assert told == [2, 4, 6, 8, 10, 10, 10]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_stop_after_a_loop_that_was_closed_over_a_reader(*, durable: bool) -> None:
    """A reader that waited on an event loop that is closed does not keep stop() from its end."""
    state = Manager(Config(name="test", flush_interval=None), MemoryStorage())
    loop = asyncio.new_event_loop()
    readers = []

    async def read() -> None:
        async with state.watch(durable=durable) as changes:
            async for _ in changes:
                pass

    async def begin() -> None:
        await state.start()
        readers.append(asyncio.create_task(read()))
        await idle()
        await state.set("a", 1)

    loop.run_until_complete(begin())
    loop.close()
    asyncio.run(state.stop())
    assert (state.status().phase, state.durable_revision) == ("stopped", 1)
    readers.clear()
    gc.collect()  # they complain of their end here, and in no other test


async def test_a_watch_opened_after_a_large_delete_all(state: Manager) -> None:
    """A watch that is opened in the turn in which everything was deleted, but after that, is told nothing."""
    await state.set_many(many(MOST_PENDING + 1))
    async with state.watch() as before:
        await state.delete_all()
        async with state.watch() as after:
            assert await told(after) == []
        assert await told(before) == [Change("", "resync", 2)]


async def test_the_end_tells_everything_at_once() -> None:
    """What was not handed out when it ends, is: however much."""
    watchers = Watchers(State())
    watcher = Watcher("", 0, 0, durable=False)
    watchers.add(watcher)
    for number in range(3_500):
        watchers.note(f"{number}", 1, number + 1)
    watchers.close()
    assert len([change async for change in watcher]) == 3_500
    await idle()
