"""Transactions without a lock: the draft shows the state of its beginning, or raises `ConflictError`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from port_world import Process, World

from lab_state import ClosedError, ConflictError, MemoryStorage, Transaction
from lab_state._entries import DELETED, Absent, Json, Stored, StoredOrGone
from lab_state._state import State
from lab_state.shared import _optimistic
from lab_state.shared._checks import RecentChanges
from lab_state.shared._optimistic import OptimisticCore, OptimisticDraft
from lab_state.shared._records import ParsedRecord, RecordApplier
from lab_state.testing import FaultyStorage, ManualClock


class Shown:
    """A copy with the keys "a", "b" and "u/1" to "u/3", and a transaction over it.

    The manager of the copy runs, and its port is that of a process without an owner.
    """

    def __init__(self) -> None:
        self.process = Process(World(FaultyStorage(MemoryStorage()), ManualClock()), "alone")
        self.copy = self.process.copy
        self.applier = RecordApplier(self.copy)
        self.drafts: list[OptimisticDraft] = []
        self.record({"a": 1, "b": [2], "u/1": 1, "u/2": 2, "u/3": 3})
        self.core = OptimisticCore(self.process.core)
        self.draft = self.core.draft
        self.drafts.append(self.draft)
        self.tx = Transaction(self.core, "")

    def record(self, changes: Mapping[str, Any], *, cleared: bool = False) -> None:
        """Apply a record to the copy, as the process of the transaction does."""
        stored: dict[str, StoredOrGone] = {key: Json(b"[2]") if to == [2] else to for key, to in changes.items()}
        revision = self.copy.revision
        self.applier.apply(ParsedRecord(revision, revision + 1, cleared, stored))
        for draft in self.drafts:
            draft.note_changed(None if cleared else stored.keys())


@pytest.fixture
async def shown() -> Shown:
    return Shown()


READS: dict[str, Callable[[Transaction], object]] = {
    "get": lambda tx: tx.get("u/1"),
    "get of a missing key": lambda tx: tx.get("u/4", None),
    "in": lambda tx: "u/4" in tx,
    "exists": lambda tx: tx.exists("u/1"),
    "get_many": lambda tx: tx.get_many(["a", "u/1"]),
    "expires_in": lambda tx: tx.expires_in("u/1"),
    "get_all": lambda tx: tx.get_all("u/"),
    "a page of values": lambda tx: tx.get_all("u", limit=1, after="u/0"),
    "keys": lambda tx: tx.keys("u/"),
    "a page of keys": lambda tx: tx.keys(limit=1),
    "a page backwards": lambda tx: tx.keys("u/", limit=1, reverse=True),
    "items": lambda tx: list(tx.items("u")),
    "len": len,
    "len of a namespace": lambda tx: len(tx.namespace("u")),
    "set_if_absent": lambda tx: tx.set_if_absent("u/1", 5),
    "touch": lambda tx: tx.touch("u/1", 5),
    "delete": lambda tx: tx.delete("u/4"),
    "pop": lambda tx: tx.pop("u/1"),
    "update": lambda tx: tx.update("u/1", lambda n: n + 1),
    "get_or_set": lambda tx: tx.get_or_set("u/1", int),
    "incr": lambda tx: tx.incr("u/1"),
    "delete_all of a prefix": lambda tx: tx.delete_all("u/"),
    "delete_all": lambda tx: tx.delete_all(),
}
WRITES: dict[str, Callable[[Transaction], object]] = {
    "set": lambda tx: tx.set("u/1", 5),
    "set with a ttl": lambda tx: tx.set("u/1", 5, ttl=5),
    "set of a new key": lambda tx: tx.set("u/4", 5),
    "set_many": lambda tx: tx.set_many({"u/1": 5, "u/4": 6}),
    "set_many with a ttl": lambda tx: tx.set_many({"u/1": 5}, ttl=5),
}
CHANGES: dict[str, Mapping[str, Any]] = {
    "another value": {"u/1": 9},
    "a deletion": {"u/1": DELETED},
    "a new key": {"u/4": 9, "u/0": 9},
}
SEES_NEW = {"get of a missing key", "in", "delete", "get_all", "a page of values", "keys", "a page of keys"} | {
    *("a page backwards", "items", "len", "len of a namespace", "delete_all of a prefix", "delete_all")
}
SEES_OLD = READS.keys() - {"get of a missing key", "in", "delete"}


def conflicts(read: str, change: str) -> bool:
    """Return whether a read and a change of another process are in conflict."""
    return read in (SEES_NEW if change == "a new key" else SEES_OLD)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", READS)
async def test_a_read_of_what_has_changed_is_a_conflict(shown: Shown, read: str, change: str) -> None:
    """It raises at once. A page is a read of its whole prefix."""
    shown.record(CHANGES[change])
    if conflicts(read, change):
        with pytest.raises(ConflictError, match="run it again"):
            READS[read](shown.tx)
        assert shown.core.has_conflict
    else:
        READS[read](shown.tx)
        shown.draft.check()
        assert not shown.core.has_conflict


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", READS)
async def test_a_change_of_what_was_read_is_a_conflict(shown: Shown, read: str, change: str) -> None:
    """The commit raises, and the owner would refuse its check."""
    before = shown.copy.revision
    READS[read](shown.tx)
    shown.record(CHANGES[change])
    owner = RecentChanges(before)
    owner.note(CHANGES[change].keys(), shown.copy.revision)
    keys, prefixes = shown.draft.reads()
    if conflicts(read, change):
        with pytest.raises(ConflictError):
            shown.draft.check()
        assert not owner.hold(shown.draft.read_at, keys, prefixes)
    else:
        shown.draft.check()
        assert owner.hold(shown.draft.read_at, keys, prefixes)


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_alone_reads_nothing(shown: Shown, name: str) -> None:
    """A change of the same key by another process is no conflict: the last one wins."""
    shown.record(CHANGES["another value"])
    WRITES[name](shown.tx)
    shown.record(CHANGES["a deletion"])
    shown.draft.check()
    assert shown.draft.reads() == ([], [])


async def test_a_key_that_the_transaction_has_set_is_its_own(shown: Shown) -> None:
    """A later look at it reads nothing of the copy."""
    shown.tx.set("a", 5)
    shown.record({"a": 9, "b": DELETED})
    assert (shown.tx.get("a"), "a" in shown.tx, shown.tx.pop("a")) == (5, True, 5)
    assert "a" not in shown.tx
    assert shown.draft.reads() == ([], [])


async def test_after_delete_all_the_transaction_reads_only_its_own_keys(shown: Shown) -> None:
    """The number of deleted keys was a read of all of them. Nothing after it is one."""
    assert shown.tx.delete_all() == 5
    assert shown.draft.reads() == ([], [""])
    shown.tx.set("c", 1)
    assert (shown.tx.keys(), len(shown.tx), "a" in shown.tx) == (["c"], 1, False)
    shown.tx.set_many({"d": 1}, ttl=5)
    assert list(shown.tx.items()) == [("c", 1), ("d", 1)]
    assert shown.draft.reads() == ([], [""])
    assert shown.draft.cleared
    assert shown.draft.changes.keys() == {"c", "d"}


async def test_a_clear_by_another_process_changes_all_keys(shown: Shown) -> None:
    """Also those that are missing. So does a copy that was loaded."""
    shown.tx.get("missing", None)
    shown.record({}, cleared=True)
    with pytest.raises(ConflictError):
        shown.draft.check()
    with pytest.raises(ConflictError):
        shown.tx.get("other", None)
    shown.record({"x": 1})
    with pytest.raises(ConflictError):
        shown.tx.keys()


async def test_too_many_changes_count_as_a_change_of_all_keys(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner does not know older ones either. So the memory of a long transaction is bounded."""
    monkeypatch.setattr(_optimistic, "MOST_KEYS", 3)
    shown.tx.get("b")
    shown.record({"x": 1, "y": 2, "z": 3})
    shown.draft.check()
    shown.record({"w": 1})
    with pytest.raises(ConflictError):
        shown.draft.check()


async def test_an_iterator_reads_at_its_first_step(shown: Shown) -> None:
    """A change before that step is a conflict. One after it is a conflict for each value that was not read."""
    late, early = shown.tx.items("u"), shown.tx.items("u")
    assert shown.draft.reads() == ([], [])
    assert next(early) == ("u/1", 1)
    shown.record({"u/2": DELETED})
    with pytest.raises(ConflictError):
        next(late)


async def test_an_iterator_keeps_the_values_of_its_first_step(shown: Shown) -> None:
    """Also those that the transaction changes later."""
    items = shown.tx.items("u")
    assert next(items) == ("u/1", 1)
    shown.tx.set("u/2", 9)
    assert list(items) == [("u/2", 2), ("u/3", 3)]


async def test_all_entries_are_a_listing(shown: Shown) -> None:
    """A look at the map itself reads all keys."""
    assert dict(shown.draft.entries.items()).keys() == {"a", "b", "u/1", "u/2", "u/3"}
    assert shown.draft.reads() == ([], [""])
    shown.draft.prefixes.clear()
    assert len(shown.draft.entries) == 5
    assert shown.draft.reads() == ([], [""])
    assert len(shown.draft.known) == 5


async def test_a_transaction_of_an_earlier_start(shown: Shown) -> None:
    """It raises `ClosedError`, while the manager is stopped and after it was started again."""
    process = shown.process
    process.core.close(State())
    with pytest.raises(ClosedError, match="not running"):
        _ = shown.core.durability
    again = Process(process.world, "again")
    process.core.open(again.copy, again.durability, again.core._watchers, lambda: None, again.port)
    with pytest.raises(ClosedError, match="was stopped while this transaction was open: nothing was changed"):
        _ = shown.core.durability
    shown.core.end()
    assert not shown.core.is_held
    with pytest.raises(RuntimeError, match="is over"):
        _ = shown.core.durability


# Against a plain dict

KEYS = ["a", "b", "u/1", "u/2", "v"]
SOME = st.dictionaries(st.sampled_from(KEYS), st.one_of(st.integers(0, 3), st.just(DELETED)), min_size=1, max_size=3)
READING: list[Callable[[Transaction], object]] = [
    *(lambda tx, key=key: tx.get(key, None) for key in KEYS),
    *(lambda tx, key=key: key in tx for key in KEYS),
    lambda tx: tx.get_all(),
    lambda tx: tx.get_all("u/"),
    lambda tx: tx.keys("u", limit=1),
    lambda tx: tx.keys(reverse=True),
    lambda tx: list(tx.items("u/")),
    lambda tx: list(tx.items(limit=2)),
    len,
    lambda tx: len(tx.namespace("u")),
]
WRITING: list[Callable[[Transaction, int], object]] = [
    *(lambda tx, n, key=key: tx.set(key, n) for key in KEYS),
    *(lambda tx, n, key=key: tx.delete(key) for key in KEYS),
    lambda tx, n: tx.set_many({"a": n, "v": n}),
    lambda tx, n: tx.incr("u/1", n),
    lambda tx, n: tx.get_or_set("b", lambda: n),
    lambda tx, n: tx.delete_all("u/"),
    lambda tx, n: tx.delete_all(),
]


class TransactionMachine(RuleBasedStateMachine):
    """A transaction over a copy that records change, and the same transaction over a copy that stands still."""

    @initialize(values=st.dictionaries(st.sampled_from(KEYS), st.integers(0, 3)))
    def begin(self, values: dict[str, int]) -> None:
        self.values: dict[str, StoredOrGone] = {**values}
        self.begun: list[Iterator[tuple[str, object]]] = []
        self.live, self.still = self._process(), self._process()
        self.left, self.right = OptimisticCore(self.live.core), OptimisticCore(self.still.core)
        self.tx, self.model = Transaction(self.left, ""), Transaction(self.right, "")
        self.has_conflict = False

    def _process(self) -> Process:
        process = Process(World(FaultyStorage(MemoryStorage()), ManualClock()), "alone")
        process.applier.apply(ParsedRecord(0, 1, cleared=False, changes=dict(self.values)))
        return process

    @rule(changes=SOME, cleared=st.booleans())
    def record(self, changes: dict[str, StoredOrGone], *, cleared: bool) -> None:
        live = self.live
        if cleared:
            changes = {key: to for key, to in changes.items() if not isinstance(to, Absent)}
        revision = live.copy.revision
        live.applier.apply(ParsedRecord(revision, revision + 1, cleared, changes))
        self.left.draft.note_changed(None if cleared else changes.keys())

    @rule(changes=SOME)
    def load(self, changes: dict[str, StoredOrGone]) -> None:
        values: dict[str, Stored] = {key: to for key, to in changes.items() if not isinstance(to, Absent)}
        self.live.load(values, self.live.copy.revision + 1)
        self.left.draft.note_changed(None)

    @rule(read=st.sampled_from(READING))
    def read(self, read: Callable[[Transaction], object]) -> None:
        with suppress(ConflictError):
            found = read(self.tx)
            assert found == read(self.model)

    @rule(write=st.sampled_from(WRITING), number=st.integers(0, 3))
    def write(self, write: Callable[[Transaction, int], object], number: int) -> None:
        try:
            found = write(self.tx, number)
        except ConflictError:
            return
        assert found == write(self.model, number)

    @rule()
    def iterate(self) -> None:
        self.pair = iter(self.tx.items()), iter(self.model.items())

    @rule()
    def step(self) -> None:
        if (pair := getattr(self, "pair", None)) is not None:
            with suppress(ConflictError):
                assert next(pair[0], None) == next(pair[1], None)

    @invariant()
    def commits_what_the_still_one_commits(self) -> None:
        """Check that both transactions would make the same changes, if nothing that was read has changed."""
        if hasattr(self, "left"):
            assert self.left.draft.changes == self.right.draft.changes
            assert self.left.draft.cleared == self.right.draft.cleared


async def test_a_transaction_shows_the_state_of_its_beginning_or_a_conflict() -> None:
    """Whatever records come, each read is that of a copy that stands still, or raises `ConflictError`."""
    run_state_machine_as_test(
        TransactionMachine, settings=settings(max_examples=80, stateful_step_count=30, deadline=None)
    )
