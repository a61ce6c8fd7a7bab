"""`Batch`: many changes that are prepared in steps and made in one moment, against a dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lab_state import _batch, _state
from lab_state._batch import Batch
from lab_state._entries import DELETED, Absent, ChangeSet, Expiring, Staged, Stored, StoredOrGone
from lab_state._expiry import Expiries
from lab_state._order import bounds
from lab_state._state import State
from lab_state._undo import UndoView

KEYS = st.sampled_from([f"{first}{second}" for first in "ab" for second in "uvwxyz"])
SOURCES = st.dictionaries(KEYS, st.sampled_from(["value", "expiring", "deleted"]), min_size=1)


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_batch, "STEP", 2)
    monkeypatch.setattr(_batch, "MANY", 3)
    monkeypatch.setattr(_batch, "_ADDED_AT_ONCE", 4)
    for module in (_batch, _state):
        monkeypatch.setattr(module, "WATCHED_CLEAR", 4)


def applied(base: dict[str, Any], taken: ChangeSet) -> dict[str, Any]:
    """Return what a commit of these changes makes of a map."""
    after = {} if taken.cleared else dict(base)
    for key, to in taken.changes.items():
        if isinstance(to, Absent):
            after.pop(key, None)
        else:
            after[key] = to
    return after


class BatchMachine(RuleBasedStateMachine):
    """A state and a dict; batches are prepared while everything that may happen meanwhile happens."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0
        self.state = State(lambda: self.seconds)
        self.model: dict[str, Stored] = {}
        self.revision = 0
        self.deleted = self.stored = self.swept = 0
        self.numbers = iter(range(1_000_000))
        self.batch: Batch | None = None
        self.wanted: dict[str, StoredOrGone] = {}
        self.prefix: str | None = None
        self.cleared = False
        self.steps: Iterator[None] | None = None
        self.in_flight: ChangeSet | None = None
        self.durable: dict[str, Any] = {}
        self.views: list[tuple[dict[str, Stored], dict[str, Stored]]] = []
        self.folding: dict[str, Stored] | None = None
        self.undo: list[tuple[UndoView[Stored], dict[str, Stored]]] = []
        self.told: dict[str, Any] | None = None

    # One batch

    def began(self, **options: Any) -> None:
        self.batch = Batch(self.state, dict(self.wanted), prefix=self.prefix, **options)
        self.steps = self.batch.prepare()

    @precondition(lambda self: self.batch is None)
    @rule(source=SOURCES, cleared=st.booleans())
    def begin(self, source: dict[str, str], *, cleared: bool) -> None:
        make: dict[str, Callable[[], StoredOrGone]] = {
            "value": lambda: next(self.numbers),
            "expiring": lambda: Expiring(next(self.numbers), self.state.now() + 2500),
            "deleted": lambda: DELETED,
        }
        self.wanted = {key: make[what]() for key, what in source.items()}
        self.prefix, self.cleared = None, cleared
        self.began(cleared=cleared)

    @precondition(lambda self: self.batch is None)
    @rule(prefix=st.sampled_from(["", "a", "b", "c"]))
    def begin_prefix(self, prefix: str) -> None:
        self.wanted = dict.fromkeys([key for key in self.model if key.startswith(prefix)], DELETED)
        self.prefix, self.cleared = prefix, False
        self.began()

    @precondition(lambda self: self.batch is None)
    @rule(keys=st.sets(KEYS, min_size=1))
    def begin_lifetime(self, keys: set[str]) -> None:
        self.wanted = {key: next(self.numbers) for key in keys}
        self.prefix, self.cleared = None, False
        self.began(lifetime=3500)
        self.wanted = {key: Expiring(value, self.state.now() + 3500) for key, value in self.wanted.items()}  # type: ignore[arg-type]
        self.step(1)  # they live from the first step on

    @precondition(lambda self: self.batch is not None)
    @rule(most=st.integers(1, 4))
    def step(self, most: int) -> None:
        assert self.steps is not None
        for _ in range(most):
            if next(self.steps, True):
                self.switch()
                return

    def switch(self) -> None:
        batch, model = self.batch, self.model
        assert batch is not None
        before = dict(model)
        wanted = dict(self.wanted)
        if self.prefix is not None:
            wanted.update(dict.fromkeys([key for key in model if key.startswith(self.prefix)], DELETED))
        if self.cleared:
            model.clear()
        for key, to in wanted.items():
            if isinstance(to, Absent):
                model.pop(key, None)
            else:
                model[key] = to
        revision = batch.switch()
        changed = [key for key, to in wanted.items() if not isinstance(to, Absent)]
        if changed or (before and self.cleared) or before != model:
            self.revision += 1
            assert revision == self.revision
        else:
            assert revision is None
        gone = len(before.keys() - model.keys())
        if self.cleared:  # with a watch, an old key that is stored again is not counted
            assert self.state.deleted - self.deleted in {gone, len(before)}
            self.deleted = self.state.deleted
        else:
            assert batch.deleted == gone
            self.deleted += gone
        self.stored += len(changed)
        self.batch = self.steps = None

    @precondition(lambda self: self.batch is not None)
    @rule()
    def drop(self) -> None:
        """Drop the batch, as a call that is cancelled does. Nothing has happened."""
        self.batch = self.steps = None

    # What may happen meanwhile

    @rule(key=KEYS, expiring=st.booleans())
    def set(self, key: str, *, expiring: bool) -> None:
        value: Stored = next(self.numbers)
        if expiring:
            value = Expiring(value, self.state.now() + 4500)  # type: ignore[arg-type]
        if self.batch is not None:
            self.batch.before(key)
        self.model[key] = value
        self.revision += 1
        self.stored += 1
        assert self.state.set(key, value) == self.revision

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        if self.batch is not None:
            self.batch.before(key)
        there = self.model.pop(key, None) is not None
        self.revision += there
        self.deleted += there
        assert self.state.delete_many([key]) == there

    @precondition(lambda self: self.batch is None)
    @rule()
    def clear(self) -> None:
        self.revision += bool(self.model)
        self.deleted += len(self.model)
        assert self.state.clear() == len(self.model)
        self.model.clear()

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def take(self) -> None:
        self.in_flight = self.state.take()

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def commit(self) -> None:
        assert self.in_flight is not None
        self.durable, self.in_flight = applied(self.durable, self.in_flight), None

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def fail(self) -> None:
        assert self.in_flight is not None
        self.state.put_back(self.in_flight)
        self.in_flight = None

    @precondition(lambda self: len(self.views) < 2)
    @rule()
    def freeze(self) -> None:
        self.views.append((self.state.freeze(), dict(self.model)))

    @precondition(lambda self: self.views and self.folding is None)
    @rule()
    def begin_folding(self) -> None:
        self.folding, _ = self.views.pop(0)

    @precondition(lambda self: self.folding is not None)
    @rule(most=st.integers(1, 3))
    def fold(self, most: int) -> None:
        assert self.folding is not None
        if not self.state.fold(self.folding, most):
            self.folding = None

    @rule(most=st.integers(1, 3))
    def fold_staged(self, most: int) -> None:
        self.state.fold_staged(most)

    @precondition(lambda self: self.batch is None)
    @rule(seconds=st.integers(1, 4))
    def sweep(self, seconds: int) -> None:
        """Let time pass, and sweep: at once, and again when everything is merged. While a batch is made, there is no sweep."""
        for more in (seconds, 1):
            self.seconds += more
            self.model, before = (
                {
                    key: to
                    for key, to in self.model.items()
                    if not (isinstance(to, Expiring) and to.at <= self.state.now())
                },
                self.model,
            )
            self.swept += len(before) - len(self.model)
            assert self.state.count() == len(self.model)
            self.state.sweep(100)
            assert self.state.count() == len(self.model)
            while self.state.fold_staged(1):
                assert self.state.count() == len(self.model)
        assert self.state.swept == self.swept
        self.revision = self.state.revision

    @precondition(lambda self: len(self.undo) < 2)
    @rule()
    def open_view(self) -> None:
        self.undo.append((self.state.view(), dict(self.model)))

    @precondition(lambda self: self.undo)
    @rule()
    def close_view(self) -> None:
        self.state.close_view(self.undo.pop(0)[0])

    @rule()
    def watch(self) -> None:
        """Begin to watch: what is told must make the present of the past."""
        self.told = dict(self.model)

        def told(key: str | None, to: StoredOrGone, _: int) -> None:
            assert self.told is not None
            if key is None:
                self.told.clear()
            elif isinstance(to, Absent):
                del self.told[key]
            else:
                self.told[key] = to

        def many(keys: Any, values: Any, revision: int) -> None:
            for key, to in zip(keys, values, strict=True):
                told(key, to, revision)

        self.state.on_change, self.state.on_changes = told, many

    @precondition(lambda self: self.told is not None)
    @rule()
    def unwatch(self) -> None:
        self.told = self.state.on_change = self.state.on_changes = None

    # What must hold

    @invariant()
    def reads_see_the_model(self) -> None:
        entries = self.state.entries
        assert dict(entries.items()) == self.model
        assert len(entries) == self.state.count() == len(self.model)
        for key in self.model:
            assert key in entries
            assert entries[key] == self.model[key]
        assert self.state.revision == self.revision
        assert (self.state.stored, self.state.deleted) == (self.stored, self.deleted)
        assert self.told is None or self.told == self.model

    @invariant()
    def the_order_is_right(self) -> None:
        assert self.state.names(*bounds("a")) == sorted(key for key in self.model if key.startswith("a"))
        assert self.state.count_in(*bounds("b")) == sum(key.startswith("b") for key in self.model)

    @invariant()
    def the_times_are_right(self) -> None:
        timed = {key: to.at for key, to in self.model.items() if isinstance(to, Expiring)}
        for late in (0, 2500, 10_000):
            now = self.state.now() + late
            due = sorted(key for key, at in timed.items() if at <= now)
            assert self.state.expiries.due(now) == len(due)
            assert sorted(self.state.expiries.due_keys(now)) == due
            assert bool(self.state.expiries) or not due

    @invariant()
    def views_stand_still(self) -> None:
        assert all(view == expected for view, expected in self.views)
        for view, expected in self.undo:
            assert dict(zip(expected, view.values(list(expected)), strict=True)) == expected

    @invariant()
    def nothing_unflushed_is_forgotten(self) -> None:
        durable = self.durable if self.in_flight is None else applied(self.durable, self.in_flight)
        assert applied(durable, self.state.untaken()) == self.model


def test_a_batch_is_one_change() -> None:
    """Whatever happens between two steps, the changes are made in one moment, completely, or not at all."""
    run_state_machine_as_test(
        BatchMachine,
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate],
        ),
    )


def test_both_dicts_of_a_batch_grow_in_different_steps() -> None:
    """After each step but the last, one dict has a step's keys more than the other: so no step has both growths."""
    batch = Batch(State(), {f"key{number}": number for number in range(10)})
    sizes = [(len(batch._top), len(batch._changes)) for _ in batch.prepare()]
    assert sizes == [(2, 0), (4, 2), (6, 4), (8, 6)]
    assert batch._top == batch._changes
    assert len(batch._top) == 10


def test_few_changes_that_become_many_end_their_expiries() -> None:
    """A key that is stored while the batch waits to begin may make it large. Its expiry, and those of the others, end with it."""
    state = State()
    for key in ("a/1", "a/2"):
        state.set(key, Expiring(1, 1_000))
    batch = Batch(state, dict.fromkeys(["a/1", "a/2"], DELETED), prefix="a/")
    batch.before("a/3")
    state.set("a/3", Expiring(1, 1_000))
    assert list(batch.prepare()) == []
    assert batch.switch() == 4
    assert state.count() == state.expiries.due(2_000) == 0


@pytest.mark.parametrize("older", [4, 40, 400])
def test_a_small_batch_costs_the_same_after_many_changes(older: int) -> None:
    """The unflushed changes before a small batch are not copied: its steps are as many, and the dict is the same one."""
    state = State()
    for number in range(older):
        state.set(f"old/{number}", number)
    state.take()
    for number in range(older):
        state.set(f"old/{number}", -number)
    before = state.changes
    batch = Batch(state, {"old/0": 5, "old/1": DELETED, "new": 6})
    assert len(list(batch.prepare())) == 1
    assert state.changes == {f"old/{number}": -number for number in range(older)}
    batch.switch()
    assert state.changes is before
    assert state.changes == {f"old/{number}": -number for number in range(2, older)} | {
        "old/0": 5,
        "old/1": DELETED,
        "new": 6,
    }


def test_a_small_batch_that_clears_drops_the_changes_before_it() -> None:
    """After a clear, the unflushed changes are those of the batch alone."""
    state = State()
    for number in range(10):
        state.set(f"old/{number}", number)
    batch = Batch(state, {"a": 1, "b": 2, "c": 3}, cleared=True)
    assert len(list(batch.prepare())) == 1
    batch.switch()
    assert state.cleared
    assert state.changes == {"a": 1, "b": 2, "c": 3}
    assert dict(state.entries.items()) == state.changes


def test_a_key_that_changes_amid_a_small_batch_is_overwritten_by_it() -> None:
    """A `set` between two steps comes before the batch, in the unflushed changes too."""
    state = State()
    for number in range(10):
        state.set(f"old/{number}", number)
    batch = Batch(state, {"a": 1, "old/0": 2, "old/1": DELETED})
    steps = batch.prepare()
    next(steps)
    for key in ("a", "old/0", "old/1", "other"):
        batch.before(key)
        state.set(key, 77)
    assert list(steps) == []
    batch.switch()
    assert {key: state.changes[key] for key in ("a", "old/0", "old/1", "other", "old/9")} == {
        "a": 1,
        "old/0": 2,
        "old/1": DELETED,
        "other": 77,
        "old/9": 9,
    }
    assert batch.deleted == 1


def test_a_batch_that_clears_many_keys_tells_the_watches_so() -> None:
    """Above the bound for single reports, the watches hear of the clear first, and then of the new keys."""
    state, told = State(), list[Any]()
    for number in range(5):
        state.set(f"old/{number}", number)
    state.on_change = lambda key, to, _: told.append((key, to))
    state.on_changes = lambda keys, values, _: told.extend(zip(keys, values, strict=True))
    batch = Batch(state, {"a": 1, "b": 2, "c": 3}, cleared=True)
    assert len(list(batch.prepare())) == 1
    batch.switch()
    assert told == [(None, DELETED), ("a", 1), ("b", 2), ("c", 3)]


def staged() -> State:
    """Return a state with old keys, and with a batch that is not merged yet."""
    state = State()
    for number in range(5):
        state.set(f"old/{number}", number)
    batch = Batch(state, {"old/0": DELETED, "b": 2, "c": 3})
    for _ in batch.prepare():
        pass
    batch.switch()
    assert isinstance(state.entries, Staged)
    return state


def test_a_clear_frees_the_map_below_a_batch() -> None:
    """If all keys are deleted before a batch is merged, its layer and the map below it are freed."""
    state, freed = staged(), list[dict[Any, Any]]()
    state.free = lambda large, *_: freed.append(large)
    assert state.clear() == 6
    assert {"old/0": DELETED, "b": 2, "c": 3} in freed
    assert {f"old/{number}": number for number in range(5)} in freed
    assert dict(state.entries.items()) == {}


def test_a_view_merges_a_batch_first() -> None:
    """A view that is taken before a batch is merged shows the batch, and stands still."""
    state = staged()
    view = state.freeze()
    state.set("old/1", 77)
    assert view == {"old/1": 1, "old/2": 2, "old/3": 3, "old/4": 4, "b": 2, "c": 3}
    assert state.entries["old/1"] == 77


def test_writers_that_change_much_amid_the_last_steps() -> None:
    """While a batch keeps old values for a view, other writers may change so much that it has to merge their changes again."""
    state = State()
    for number in range(9):
        state.set(f"old/{number}", number)
    state.take()
    view = state.view()
    batch = Batch(state, {f"old/{number}": -number for number in range(9)})
    steps = batch.prepare()
    for _ in range(5):  # all are placed, and the first old values are kept
        next(steps)
    for number in range(5):
        batch.before(f"new/{number}")
        state.before_overwrite([f"new/{number}"])
        state.set(f"new/{number}", number)
    for _ in steps:
        pass
    batch.switch()
    assert state.changes == {f"old/{number}": -number for number in range(9)} | {
        f"new/{number}": number for number in range(5)
    }
    assert list(view.values([f"old/{number}" for number in range(9)])) == list(range(9))


def test_an_error_amid_the_merge_of_expiries_loses_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory is short while the times of a batch are merged, the next step merges the rest."""
    state = State()
    batch = Batch(state, {f"key/{number}": Expiring(number, 1_000) for number in range(5)})
    for _ in batch.prepare():
        pass
    batch.switch()
    put, calls = Expiries._put, iter(range(100))

    def put_without_memory(expiries: Expiries, key: str, at: int) -> None:
        if expiries is state.expiries and next(calls) == 2:
            raise MemoryError
        put(expiries, key, at)

    monkeypatch.setattr(Expiries, "_put", put_without_memory)
    with pytest.raises(MemoryError):
        state.expiries.merge_replaced(10)
    assert state.expiries.due(1_000) == 5
    while state.expiries.merge_replaced(10):
        pass
    assert sorted(state.expiries.take(2_000, 10)) == [f"key/{number}" for number in range(5)]


def test_a_view_is_merged_before_the_batch_above_it() -> None:
    """If a view is given back while a batch lies above it, the batch then rests on the map, and is merged later."""
    state = State()
    for number in range(5):
        state.set(f"old/{number}", number)
    view = state.freeze()
    state.set("old/1", 77)
    batch = Batch(state, {"old/0": DELETED, "b": 2, "c": 3})
    for _ in batch.prepare():
        pass
    batch.switch()
    assert not state.has_as_base(view)
    assert not state.fold(view, 10)
    assert isinstance(state.entries, Staged)
    assert state.has_as_base(view)
    assert view == {"old/0": 0, "old/1": 77, "old/2": 2, "old/3": 3, "old/4": 4}
    while state.fold_staged(1):
        pass
    merged: object = state.entries
    assert merged is view
    assert view == {"old/1": 77, "old/2": 2, "old/3": 3, "old/4": 4, "b": 2, "c": 3}


def test_a_batch_merges_the_one_before_it() -> None:
    """A batch that begins before the last one is merged does that first, in steps."""
    state = staged()
    batch = Batch(state, {"old/1": DELETED, "b": 5, "d": 6})
    steps = batch.prepare()
    next(steps)
    assert isinstance(state.entries, Staged)
    for _ in steps:
        pass
    assert isinstance(state.entries, dict)
    batch.switch()
    assert dict(state.entries.items()) == {"old/2": 2, "old/3": 3, "old/4": 4, "b": 5, "c": 3, "d": 6}


def test_the_due_keys_amid_a_merge_of_expiries() -> None:
    """While the times of a batch are merged, the keys that are due are those of the batch and of the rest."""
    state = State()
    for key in ("a", "b", "c"):
        state.set(key, Expiring(0, 1_000))
    batch = Batch(state, {"a": 1, "b": Expiring(2, 9_000), "d": Expiring(3, 1_000)})
    for _ in batch.prepare():
        pass
    batch.switch()
    assert sorted(state.expiries.due_keys(2_000)) == ["c", "d"]
    while state.fold_staged(1):
        assert sorted(state.expiries.due_keys(2_000)) == ["c", "d"]
    assert sorted(state.expiries.due_keys(2_000)) == ["c", "d"]
