"""`State` and `Overlay`: the map, its unflushed changes, its revisions, and views that stand still."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import Raw

from lab_state._entries import DELETED, Absent, ChangeSet, Expiring, Overlay, Stored
from lab_state._state import State
from lab_state.shared._results import ResultTable


class Ticks:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def state_of(**entries: Stored) -> State:
    state = State(Ticks())
    state.load(dict(entries), 10)
    return state


def entries_of(state: State) -> dict[str, Stored]:
    return dict(state.entries.items())


def applied(before: Mapping[str, Stored], taken: ChangeSet) -> dict[str, Stored]:
    """Return what a storage holds after this commit."""
    after = {} if taken.cleared else dict(before)
    for key, value in taken.changes.items():
        if isinstance(value, Absent):
            after.pop(key, None)
        else:
            after[key] = value
    return after


def folded(state: State, view: dict[str, Stored], most: int = 1) -> int:
    """Fold to the end; how many steps it took."""
    for steps in count(1):
        if not state.fold(view, most):
            return steps
    raise AssertionError


# Another state in its place


def test_a_state_adopts_the_contents_of_another() -> None:
    """Entries, expiries, results, revision and time are those of the other state. Nothing is left of its own changes."""
    state, other = state_of(a=1, b=2), State(Ticks())
    other.load({"a": 5, "c": 6}, 20, {"c": 3_000_000})
    other.epoch, other.results = 2000.0, ResultTable()
    state.set("a", 3)
    state.clear()
    state.set("d", 4)
    assert state.names("") == ["d"]
    state.adopt(other)
    assert (state.revision, state.taken, state.changes, state.cleared) == (20, 20, {}, False)
    assert (entries_of(state), state.names("")) == ({"a": 5, "c": Expiring(6, 3_000_000)}, ["a", "c"])
    assert (state.epoch, state.now(), state.results) == (2000.0, 2_100_000, other.results)
    assert state.expires
    state.epoch = 2901.0
    assert (state.count(), state.sweep(10), entries_of(state)) == (1, 1, {"a": 5})
    assert state.set("a", 6) == 22


def test_the_counts_go_on_after_an_adoption() -> None:
    """A counter of the metrics never goes back."""
    state, other = state_of(a=1, b=2), state_of(c=3)
    state.set_many({"d": 4, "e": 5})
    state.delete_many(["a"])
    before = (state.stored, state.deleted, state.swept)
    assert before == (2, 1, 0)
    state.adopt(other)
    assert (state.stored, state.deleted, state.swept) == before
    state.set("x", 1)
    state.delete_many(["c"])
    assert (state.stored, state.deleted, state.swept) == (3, 2, 0)


def test_an_open_view_keeps_what_it_has_before_an_adoption() -> None:
    """The old entries are freed when the last view is closed."""
    freed: list[dict[Any, Any]] = []
    state = state_of(a=1, b=2)
    state.free = lambda large, *_: freed.append(large)
    view, old = state.view(), state.entries
    state.adopt(state_of(a=5))
    assert list(view.values(["a", "b"])) == [1, 2]
    assert not any(one is old for one in freed)
    state.close_view(view)
    assert any(one is old for one in freed)


# Changes and revisions


def test_a_new_state_is_empty() -> None:
    """A new state has no entries, no changes and no revision."""
    state = State(Ticks())
    assert (entries_of(state), state.changes, state.revision, state.taken) == ({}, {}, 0, 0)
    assert not state.cleared
    assert not state.borrowed


def test_loaded_entries_are_taken() -> None:
    """Entries that were loaded are no changes, and may keep a buffer alive."""
    state = state_of(a=1)
    assert entries_of(state) == {"a": 1}
    assert (state.revision, state.taken, state.changes, state.cleared) == (10, 10, {}, False)
    assert state.borrowed


def test_set_makes_a_revision() -> None:
    """Each set makes a revision, also one that sets the same value."""
    state = state_of(a=1)
    assert state.set("a", 2) == 11
    assert state.set("b", 3) == 12
    assert state.set("b", 3) == 13
    assert entries_of(state) == {"a": 2, "b": 3}
    assert state.changes == {"a": 2, "b": 3}
    assert (state.revision, state.taken) == (13, 10)


def test_set_many_makes_one_revision() -> None:
    """Setting many keys makes one revision."""
    state = state_of(a=1)
    assert state.set_many({"a": 2, "b": 3, "c": None}) == 11
    assert entries_of(state) == {"a": 2, "b": 3, "c": None}
    assert state.changes == {"a": 2, "b": 3, "c": None}


def test_delete_many_makes_one_revision() -> None:
    """Deleting many keys makes one revision, and counts those that were there, once each."""
    state = state_of(a=1, b=2, c=3)
    assert state.delete_many(["a", "b", "a", "never there"]) == 2
    assert entries_of(state) == {"c": 3}
    assert state.changes == {"a": DELETED, "b": DELETED}
    assert state.revision == 11


def test_delete_many_takes_any_iterable() -> None:
    """The keys to delete may come from an iterator, also one over the entries themselves."""
    state = state_of(a=1, b=2)
    assert state.delete_many(key for key in state.entries) == 2
    assert entries_of(state) == {}


@pytest.mark.parametrize("keys", [(), ("never there",)])
def test_deleting_nothing_makes_no_revision(keys: tuple[str, ...]) -> None:
    """Deleting what is not there changes nothing and makes no revision."""
    state = state_of(a=1)
    assert state.delete_many(keys) == 0
    assert (state.revision, state.changes, entries_of(state)) == (10, {}, {"a": 1})


def test_a_key_that_is_set_again_is_no_longer_deleted() -> None:
    """The last change of a key is the one that counts."""
    state = state_of(a=1)
    state.delete_many(["a"])
    state.set("a", 2)
    assert state.changes == {"a": 2}
    state.delete_many(["a"])
    assert state.changes == {"a": DELETED}
    assert "a" not in state.entries


def test_clear_makes_one_revision() -> None:
    """Clearing deletes everything in one revision, counts it, and forgets the changes before it."""
    state = state_of(a=1, b=2)
    state.set("c", 3)
    assert state.clear() == 3
    assert entries_of(state) == {}
    assert (state.changes, state.cleared, state.revision) == ({}, True, 12)
    state.set("d", 4)
    assert (state.changes, state.cleared) == ({"d": 4}, True)


def test_clearing_nothing_makes_no_revision() -> None:
    """Clearing an empty state changes nothing and makes no revision."""
    state = state_of(a=1)
    state.delete_many(["a"])
    assert state.clear() == 0
    assert (state.changes, state.cleared, state.revision) == ({"a": DELETED}, False, 11)


def test_since_is_when_the_oldest_change_was_made() -> None:
    """`since` is the time of the first change after the last take."""
    made: tuple[Callable[[State], object], ...] = (
        lambda state: state.set("b", 1),
        lambda state: state.set_many({"b": 1}),
        lambda state: state.delete_many(["a"]),
        lambda state: state.clear(),
    )
    for change in made:
        ticks = Ticks()
        state = State(ticks)
        state.load({"a": 1}, 10)
        change(state)
        ticks.now = 200.0
        state.set("c", 2)
        state.set_many({"c": 3})
        state.delete_many(["c"])
        assert state.since == 100.0
        assert state.take().since == 100.0
        state.set("c", 2)
        assert state.since == 200.0


def test_settling_is_no_change() -> None:
    """A value that was found to be a scalar is kept as one, which changes nothing."""
    state = state_of(a=Raw(b"1"))
    state.keep_decoded("a", state.entries["a"], 1)
    assert entries_of(state) == {"a": 1}
    assert (state.revision, state.changes) == (10, {})


def test_settling_leaves_a_view_alone() -> None:
    """While a view stands still, nothing is settled."""
    value = Raw(b"1")
    state = state_of(a=value)
    view = state.freeze()
    state.keep_decoded("a", state.entries["a"], 1)
    assert view["a"] is value
    assert state.entries["a"] is value
    assert folded(state, view) == 1


# Commits


def test_take_gives_the_changes_away() -> None:
    """A commit takes the changes, and what comes after is the next one's."""
    state = state_of(a=1, b=2)
    state.set("a", 2)
    state.delete_many(["b"])
    taken = state.take()
    assert taken == ChangeSet(10, 12, cleared=False, changes={"a": 2, "b": DELETED}, since=100.0)
    assert (state.changes, state.cleared, state.revision, state.taken) == ({}, False, 12, 12)
    state.set("c", 3)
    assert taken.changes == {"a": 2, "b": DELETED}
    assert state.take() == ChangeSet(12, 13, cleared=False, changes={"c": 3}, since=100.0)


def test_take_after_a_clear() -> None:
    """A commit after a clear says so, and has only what came after it."""
    state = state_of(a=1)
    state.set("b", 1)
    state.clear()
    state.set("c", 1)
    assert state.take() == ChangeSet(10, 13, cleared=True, changes={"c": 1}, since=100.0)
    assert not state.cleared


def test_put_back_gives_everything_back() -> None:
    """Changes that are put back at once are as they were."""
    state = state_of(a=1)
    state.set("a", 2)
    state.delete_many(["a"])
    state.set("b", 3)
    taken = state.take()
    state.put_back(taken)
    assert state.take() == taken


def test_put_back_goes_under_newer_changes() -> None:
    """Changes of a failed commit do not undo what came since."""
    ticks = Ticks()
    state = State(ticks)
    state.load({"a": 1, "b": 1, "c": 1}, 10)
    state.set_many({"a": 2, "b": 2, "d": 2})
    taken = state.take()
    ticks.now = 200.0
    state.set("a", 3)
    state.delete_many(["b"])
    state.put_back(taken)
    assert state.take() == ChangeSet(10, 13, cleared=False, changes={"a": 3, "b": DELETED, "d": 2}, since=100.0)
    assert entries_of(state) == {"a": 3, "c": 1, "d": 2}


@pytest.mark.parametrize("larger", ["older", "newer"])
def test_put_back_moves_the_smaller_part(larger: str) -> None:
    """What a failed commit carried is not copied, however much it is, nor what came since, if that is more."""
    state = state_of(a=1)
    state.set_many({"a": 2, "b": 3})
    taken = state.take()
    state.set("b", 4)
    if larger == "newer":
        state.set_many({"c": 5, "d": 6})
    newer = state.changes
    state.put_back(taken)
    assert state.changes is (newer if larger == "newer" else taken.changes)
    assert state.changes == {"a": 2, "b": 4} | ({"c": 5, "d": 6} if larger == "newer" else {})


def test_put_back_goes_under_a_newer_clear() -> None:
    """A clear since the failed commit took everything of it away."""
    state = state_of(a=1)
    state.set("b", 2)
    taken = state.take()
    state.clear()
    state.set("c", 3)
    state.put_back(taken)
    assert state.take() == ChangeSet(10, 13, cleared=True, changes={"c": 3}, since=100.0)


def test_put_back_of_a_clear_keeps_it() -> None:
    """A clear whose commit failed stays, with what came after it."""
    state = state_of(a=1)
    state.clear()
    state.set("b", 2)
    taken = state.take()
    state.set("c", 3)
    state.put_back(taken)
    assert state.take() == ChangeSet(10, 13, cleared=True, changes={"b": 2, "c": 3}, since=100.0)


# Views


def test_a_view_stands_still() -> None:
    """A view shows the entries of its moment while writes go on."""
    state = state_of(a=1, b=2, c=3)
    view = state.freeze()
    state.set("a", 9)
    state.set_many({"d": 4})
    state.delete_many(["b"])
    assert view == {"a": 1, "b": 2, "c": 3}
    assert entries_of(state) == {"a": 9, "c": 3, "d": 4}
    assert (len(state.entries), sorted(state.entries)) == (3, ["a", "c", "d"])


def test_a_view_is_folded_in_small_steps() -> None:
    """Folding merges so many writes at a time, with other writes between, and reads do not show it."""
    state = state_of(**{f"key {n}": n for n in range(10)})
    view = state.freeze()
    expected: dict[str, Stored] = {f"key {n}": n for n in range(10)}
    for n in range(5, 15):
        state.set(f"key {n}", -n)
        expected[f"key {n}"] = -n
    state.delete_many(["key 0", "key 14"])
    del expected["key 0"], expected["key 14"]
    steps = 0
    while state.fold(view, 3):
        steps += 1
        assert entries_of(state) == expected
        assert len(state.entries) == len(expected)
        state.set(f"key {steps}", "between")
        expected[f"key {steps}"] = "between"
        assert entries_of(state) == expected
    assert steps >= 4
    assert state.entries is view
    assert view == expected


def test_folding_loses_no_write_if_memory_is_short() -> None:
    """A write that cannot be merged into the view stays in the layer, and the next step merges it."""

    class Full(dict[str, Stored]):
        is_full = True

        def __setitem__(self, key: str, stored: Stored) -> None:
            if self.is_full:
                raise MemoryError
            super().__setitem__(key, stored)

    view = Full(a=1)
    overlay = Overlay(view, {"b": 2, "a": 3})
    with pytest.raises(MemoryError):
        overlay.fold(10)
    assert (overlay["a"], overlay["b"]) == (3, 2)
    view.is_full = False
    assert not overlay.fold(10)
    assert view == {"a": 3, "b": 2}


def test_folding_keeps_ahead_of_writers() -> None:
    """A step takes no more than it was told to, unless more come than that: then twice as many."""
    state = state_of(a=1)
    view = state.freeze()
    state.set_many({f"key {n}": n for n in range(1000)})
    overlay = state.entries
    assert isinstance(overlay, Overlay)
    left = []
    while state.fold(view, 10):
        left.append(len(overlay.top))
        if len(left) < 3:
            state.set_many({f"new {len(left)} {n}": n for n in range(100)})
    assert left[:3] == [990, 890, 790]
    assert left[3] == 780
    assert len(left) == 3 + 78


@pytest.mark.parametrize("most", [1, 2, 500])
def test_folding_ends(most: int) -> None:
    """Folding takes as many steps as there are writes to bring home, and one at least."""
    state = state_of(a=1)
    view = state.freeze()
    assert folded(state, view, most) == 1
    view = state.freeze()
    state.set_many({f"key {n}": n for n in range(6)})
    assert folded(state, view, most) == max(1, 6 // most)
    assert not state.fold(view, most)


def test_a_second_view_is_a_copy() -> None:
    """A second view shows its own moment, stands still too, and folding it changes nothing."""
    state = state_of(a=1)
    first = state.freeze()
    state.set("b", 2)
    second = state.freeze()
    state.set("c", 3)
    assert (first, second) == ({"a": 1}, {"a": 1, "b": 2})
    assert not state.fold(second, 1)
    assert state.entries is not first
    assert entries_of(state) == {"a": 1, "b": 2, "c": 3}
    assert folded(state, first) == 2
    assert (first, second) == ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2})
    assert state.entries is first


def test_what_a_clear_leaves_is_handed_over() -> None:
    """The entries and the unflushed changes of before are given to the function that frees them; of a view, what lay over it."""
    state = state_of(a=1)
    discarded: list[dict[str, Any]] = []
    state.free = discarded.append
    state.set("b", 2)
    state.clear()
    assert list(filter(None, discarded)) == [{"b": 2}, {"a": 1, "b": 2}]
    state.set("c", 3)
    view = state.freeze()
    state.set("d", 4)
    discarded.clear()
    state.clear()
    assert list(filter(None, discarded)) == [{"c": 3, "d": 4}, {"d": 4}]
    assert view == {"c": 3}


def test_a_view_outlives_a_clear() -> None:
    """A clear leaves the view as it is, and the view has nothing to be folded into afterwards."""
    state = state_of(a=1)
    view = state.freeze()
    state.set("b", 2)
    assert state.clear() == 2
    assert (view, entries_of(state)) == ({"a": 1}, {})
    state.set("c", 3)
    assert not state.fold(view, 1)
    assert (view, entries_of(state)) == ({"a": 1}, {"c": 3})


def test_an_old_view_is_not_folded_into_a_newer_one() -> None:
    """After a clear and another view, folding the old view leaves the new one alone."""
    state = state_of(a=1)
    old = state.freeze()
    state.clear()
    state.set("b", 2)
    new = state.freeze()
    state.set("c", 3)
    assert not state.fold(old, 10)
    assert (old, new, entries_of(state)) == ({"a": 1}, {"b": 2}, {"b": 2, "c": 3})
    assert folded(state, new) == 1
    assert state.entries is new


def test_a_view_can_be_taken_again() -> None:
    """After it was folded, the map can be frozen again, any number of times."""
    state = state_of()
    for n in range(5):
        view = state.freeze()
        state.set(f"key {n}", n)
        assert len(view) == n
        assert folded(state, view) == 1
    assert entries_of(state) == {f"key {n}": n for n in range(5)}


def test_changes_are_taken_beside_a_view() -> None:
    """A view has no part in what a commit takes or puts back."""
    state = state_of(a=1)
    view = state.freeze()
    state.set("a", 2)
    taken = state.take()
    assert taken.changes == {"a": 2}
    state.put_back(taken)
    assert folded(state, view) == 1
    assert state.changes == {"a": 2}


# The overlay itself


def overlay() -> Overlay:
    over = Overlay({"a": 1, "b": 2, "c": None})
    over["b"] = 3
    over["d"] = 4
    del over["a"]
    return over


def test_an_overlay_is_a_map() -> None:
    """An overlay reads like the dict that it stands for."""
    over = overlay()
    expected = {"b": 3, "c": None, "d": 4}
    assert {key: over[key] for key in over} == expected
    assert dict(over.items()) == expected
    assert len(over) == 3
    assert [key in over for key in "abcde"] == [False, True, True, True, False]
    assert over.base == {"a": 1, "b": 2, "c": None}


@pytest.mark.parametrize("key", ["a", "e"])
def test_an_overlay_misses_what_is_not_there(key: str) -> None:
    """Reading or deleting a key that was deleted or never there is KeyError, and changes nothing."""
    over = overlay()
    with pytest.raises(KeyError, match=key):
        over[key]
    with pytest.raises(KeyError, match=key):
        del over[key]
    assert len(over) == 3


def test_an_overlay_takes_a_deleted_key_back() -> None:
    """A key that was deleted and set again is there once."""
    over = overlay()
    over["a"] = 5
    over["a"] = 6
    assert over["a"] == 6
    assert len(over) == 4
    assert sorted(over) == ["a", "b", "c", "d"]
    del over["a"], over["d"]
    assert len(over) == 2


# All of it against a dict

KEYS = st.sampled_from("abcdef")


class Model(RuleBasedStateMachine):
    """A state, the dict that it stands for, and the dict that a storage holds."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State(Ticks())
        self.state.load({"a": 0, "b": 0}, 5)
        self.expected: dict[str, Stored] = {"a": 0, "b": 0}
        self.durable: dict[str, Stored] = {"a": 0, "b": 0}
        self.durable_revision = 5
        self.in_flight: ChangeSet | None = None
        self.views: list[tuple[dict[str, Stored], dict[str, Stored]]] = []
        self.folding: dict[str, Stored] | None = None
        self.revision = 5
        self.numbers = count(1)

    @rule(key=KEYS)
    def set(self, key: str) -> None:
        self.expected[key] = value = next(self.numbers)
        self.revision += 1
        assert self.state.set(key, value) == self.revision

    @rule(keys=st.lists(KEYS, min_size=1))
    def set_many(self, keys: list[str]) -> None:
        values = {key: next(self.numbers) for key in keys}
        self.expected.update(values)
        self.revision += 1
        assert self.state.set_many(values) == self.revision

    @rule(keys=st.lists(KEYS))
    def delete_many(self, keys: list[str]) -> None:
        found = self.expected.keys() & set(keys)
        for key in found:
            del self.expected[key]
        self.revision += bool(found)
        assert self.state.delete_many(keys) == len(found)

    @rule()
    def clear(self) -> None:
        self.revision += bool(self.expected)
        assert self.state.clear() == len(self.expected)
        self.expected = {}

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def take(self) -> None:
        self.in_flight = self.state.take()
        assert (self.in_flight.start, self.in_flight.end) == (self.durable_revision, self.revision)

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def commit(self) -> None:
        assert self.in_flight is not None
        self.durable = applied(self.durable, self.in_flight)
        self.durable_revision = self.in_flight.end
        self.in_flight = None

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def fail(self) -> None:
        assert self.in_flight is not None
        self.state.put_back(self.in_flight)
        self.in_flight = None

    @precondition(lambda self: len(self.views) < 3)
    @rule()
    def freeze(self) -> None:
        self.views.append((self.state.freeze(), dict(self.expected)))

    @precondition(lambda self: self.views and self.folding is None)
    @rule(data=st.data())
    def begin_folding(self, data: st.DataObject) -> None:
        view, _ = self.views.pop(data.draw(st.integers(0, len(self.views) - 1)))
        self.folding = view

    @precondition(lambda self: self.folding is not None)
    @rule(most=st.integers(1, 3))
    def fold(self, most: int) -> None:
        assert self.folding is not None
        if not self.state.fold(self.folding, most):
            self.folding = None

    @invariant()
    def the_entries_are_those_of_the_dict(self) -> None:
        entries = self.state.entries
        assert dict(entries.items()) == self.expected
        assert sorted(entries) == sorted(self.expected)
        assert len(entries) == len(self.expected)
        for key in "abcdef":
            assert (key in entries) == (key in self.expected)
        assert all(entries[key] == value for key, value in self.expected.items())

    @invariant()
    def views_stand_still(self) -> None:
        assert all(view == expected for view, expected in self.views)

    @invariant()
    def nothing_unflushed_is_forgotten(self) -> None:
        state = self.state
        durable = self.durable if self.in_flight is None else applied(self.durable, self.in_flight)
        unflushed: Any = ChangeSet(state.taken, state.revision, state.cleared, state.changes, 0.0)
        assert applied(durable, unflushed) == self.expected
        assert state.revision == self.revision


TestStateMachine = Model.TestCase
TestStateMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_owned_values_are_noted_for_the_view_that_comes_home() -> None:
    """A second view at the same time is a copy: what was done to that says nothing of the entries."""
    state = State(lambda: 0.0)
    state.load({"a": 1}, 1)
    view, copy = state.freeze(), state.freeze()
    state.note_copied(copy)
    assert state.borrowed
    state.note_copied(view)
    assert not state.borrowed
    state.fold(view, 1)
    state.note_copied(view)
    assert not state.borrowed
