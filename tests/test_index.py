"""The index: keys in order of code points, in steps and at once, beside changes."""

from __future__ import annotations

import gc
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lab_state._draft import Draft
from lab_state._entries import ChangeSet, Expiring, Stored
from lab_state._order import _index, _sorted_keys, bounds
from lab_state._order._sorted_keys import SortedKeys
from lab_state._state import State
from lab_state.cache._local_copy import LocalCopy

HIGHEST = "\U0010ffff"
NAMES = st.text(st.sampled_from("ab/é\ud7ff\ue000" + HIGHEST), min_size=1, max_size=3)
TEXTS = st.text(st.sampled_from("ab/é\ud7ff\ue000" + HIGHEST), max_size=3)


def in_range(keys: Any, low: str, high: str | None) -> list[str]:
    """Return the sorted keys of a range, as the model."""
    return sorted(key for key in keys if low <= key and (high is None or key < high))


@given(prefix=TEXTS, keys=st.sets(NAMES))
def test_the_range_of_a_prefix_holds_the_keys_that_start_with_it(prefix: str, keys: set[str]) -> None:
    """The range of a prefix contains exactly the keys that start with it, for the highest code point as well."""
    assert in_range(keys, *bounds(prefix)) == sorted(key for key in keys if key.startswith(prefix))


@given(prefix=TEXTS, after=NAMES, keys=st.sets(NAMES), reverse=st.booleans())
def test_the_range_after_a_key_begins_behind_it(prefix: str, after: str, keys: set[str], *, reverse: bool) -> None:
    """With `after`, the range has the keys above that key, or below it in reverse. The key need not exist."""
    expected = sorted(k for k in keys if k.startswith(prefix) and (k < after if reverse else k > after))
    assert in_range(keys, *bounds(prefix, after, reverse=reverse)) == expected


@pytest.mark.parametrize(
    ("prefix", "high"),
    [("", None), ("a", "b"), ("a" + HIGHEST, "b"), (HIGHEST, None), (HIGHEST * 3, None), ("\ud7ff", "\ud800")],
)
def test_the_upper_bound_of_a_prefix_carries(prefix: str, high: str | None) -> None:
    """The bound above a prefix leaves out the highest code points at its end, and there is none above these alone."""
    assert bounds(prefix) == (prefix, high)


class SortedKeysMachine(RuleBasedStateMachine):
    """`SortedKeys` with chunks of a few keys, beside a set."""

    def __init__(self) -> None:
        super().__init__()
        self.size, _sorted_keys.SIZE = _sorted_keys.SIZE, 4
        self.model: set[str] = set()

    def teardown(self) -> None:
        _sorted_keys.SIZE = self.size

    @initialize(keys=st.sets(NAMES, max_size=40), length=st.integers(1, 7))
    def begin(self, keys: set[str], length: int) -> None:
        ordered = sorted(keys)
        self.model = set(keys)
        self.keys = SortedKeys([tuple(ordered[at : at + length]) for at in range(0, len(ordered), length)])

    @rule(keys=st.lists(NAMES, max_size=9))
    def add(self, keys: list[str]) -> None:
        for key in keys:
            self.keys.add(key)
        self.model.update(keys)

    @rule(keys=st.lists(NAMES, max_size=9))
    def remove(self, keys: list[str]) -> None:
        for key in keys:
            self.keys.remove(key)
        self.model.difference_update(keys)

    @rule(low=TEXTS, high=TEXTS | st.none(), limit=st.integers(1, 9) | st.none(), reverse=st.booleans())
    def page(self, low: str, high: str | None, limit: int | None, *, reverse: bool) -> None:
        expected = in_range(self.model, low, high)
        expected = (expected[::-1] if reverse else expected)[:limit]
        assert self.keys.page(low, high, limit, reverse=reverse) == expected

    @rule(low=TEXTS, high=TEXTS | st.none())
    def count(self, low: str, high: str | None) -> None:
        assert self.keys.count(low, high) == len(in_range(self.model, low, high))
        assert self.keys.position(low) == bisect_left(sorted(self.model), low)

    @rule(low=TEXTS, high=TEXTS | st.none())
    def pieces(self, low: str, high: str | None) -> None:
        pieces = self.keys.pieces(low, high)
        assert all(pieces)
        assert [key for piece in pieces for key in piece] == in_range(self.model, low, high)

    @invariant()
    def the_length_is_the_number_of_keys(self) -> None:
        assert len(self.keys) == len(self.model)


TestSortedKeys = SortedKeysMachine.TestCase
TestSortedKeys.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


SMALL_STEPS = {"FEW": 2, "SMALL": 3, "_KEYS_IN_STEP": 2, "_SAMPLE": 12, "_BUCKET": 3}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the index take steps of two keys."""
    for name, value in SMALL_STEPS.items():
        monkeypatch.setattr(_index, name, value)


def state_of(*keys: str) -> State:
    state = State()
    state.load(dict.fromkeys(keys, 1), 0)
    return state


def set_as_the_hot_path(state: State, key: str) -> None:
    """Store a value as `Writing.set` does: it notes a key only at the first change of the key since a commit."""
    if key not in state.changes:
        if key not in state.entries and state.index is not None:
            state.index.note(key)
        state.before_change()
    state.entries[key] = state.changes[key] = 1
    state.revision += 1
    state.expiries.discard(key)


# A key that is deleted and stored again before the next commit: `set` does not note it


def test_a_key_stored_again_is_found() -> None:
    """A key that was deleted, left out by a call, and stored again is found by the next call."""
    state = state_of("a", "b")
    assert state.names("") == ["a", "b"]
    state.delete_many(["a"])
    assert state.names("") == ["b"]
    set_as_the_hot_path(state, "a")
    assert state.names("") == ["a", "b"]


def test_a_key_stored_again_before_a_commit_is_found_after_it() -> None:
    """A commit between storing the key again and the next call changes nothing."""
    state = state_of("a", "b")
    assert state.names("") == ["a", "b"]
    state.delete_many(["a"])
    assert state.names("") == ["b"]
    set_as_the_hot_path(state, "a")
    state.take()
    assert state.names("") == ["a", "b"]


def test_a_key_stored_again_after_a_failed_commit_is_found() -> None:
    """After a failed commit the key counts as changed again, so `set` does not note it, and it is found."""
    state = state_of("a", "b")
    assert state.names("") == ["a", "b"]
    state.delete_many(["a"])
    assert state.names("") == ["b"]
    state.put_back(state.take())
    set_as_the_hot_path(state, "a")
    assert state.names("") == ["a", "b"]


def test_a_key_deleted_before_there_was_an_index_is_found_again() -> None:
    """A key that was deleted before the first call, and is stored after it, is found by the next call."""
    state = state_of("a", "b")
    state.delete_many(["a"])
    assert state.names("") == ["b"]
    set_as_the_hot_path(state, "a")
    assert state.names("") == ["a", "b"]


@pytest.mark.usefixtures("small_steps")
def test_a_key_stored_again_is_found_while_others_wait() -> None:
    """A call that leaves keys for later calls looks at keys that were stored again, too."""
    state = state_of("a", "b")
    assert state.names("") == ["a", "b"]
    state.delete_many(["a"])
    assert state.names("") == ["b"]
    set_as_the_hot_path(state, "a")
    state.set_many(dict.fromkeys("cdefgh", 1))
    assert state.names("") == list("abcdefgh")
    assert state.index is not None
    assert state.index.batches > 0
    assert state.count_in("a", "b") == 1


# The build, beside changes

KEYS = [f"{number:02}" for number in range(40)]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("keys", [KEYS, KEYS[::-1], KEYS[20:] + KEYS[:20]], ids=["in order", "falling", "rotated"])
def test_an_index_is_built_in_steps(keys: list[str]) -> None:
    """A build takes many steps, and has the same result whatever the order of the keys in the dict was."""
    state = state_of(*keys)
    assert len(list(state.index_steps())) >= 20
    assert not state.is_index_behind
    assert state.names("") == KEYS


@pytest.mark.usefixtures("small_steps")
def test_a_dict_that_is_packed_amid_a_build_loses_no_key() -> None:
    """As many keys go as come between two steps, so the dict keeps its size while its keys move: none is missed."""
    state = state_of(*KEYS)
    steps = state.index_steps()
    next(steps)
    state.delete_many(KEYS[:20])
    state.set_many({f"x{number:02}": 1 for number in range(20)})
    for _ in steps:
        pass
    assert state.names("") == [*KEYS[20:], *(f"x{number:02}" for number in range(20))]


@pytest.mark.usefixtures("small_steps")
def test_a_key_that_comes_without_a_note_amid_a_build_is_found() -> None:
    """A key that is stored again amid a build changes the size of the dict, and is found."""
    state = state_of(*KEYS)
    state.delete_many(["07"])
    steps = state.index_steps()
    next(steps)
    set_as_the_hot_path(state, "07")
    for _ in steps:
        pass
    assert state.names("") == KEYS


@pytest.mark.usefixtures("small_steps")
def test_a_build_begins_again_after_a_clear() -> None:
    """Deleting all keys amid a build ends the build."""
    state = state_of(*KEYS)
    steps = state.index_steps()
    next(steps)
    state.clear()
    state.set_many({"b": 1, "a": 1})
    assert len(list(steps)) == 0
    assert state.names("") == ["a", "b"]


@pytest.mark.usefixtures("small_steps")
def test_a_call_without_steps_ends_a_build() -> None:
    """A synchronous call amid a build does the rest at once, and the steps end."""
    state = state_of(*KEYS[::-1])
    steps = state.index_steps()
    next(steps)
    assert state.count_in("10", "20") == 10
    assert list(steps) == []


@pytest.mark.usefixtures("small_steps")
def test_steps_end_while_writers_go_on() -> None:
    """The steps look up the keys that were touched at the beginning. They do not wait for a writer that adds more."""
    state = state_of("a")
    assert state.names("") == ["a"]
    state.set_many(dict.fromkeys(KEYS, 1))
    taken = 0
    for number, _ in enumerate(state.index_steps()):
        taken += 1
        state.set_many({f"x{number}{letter}": 1 for letter in "abc"})
    assert taken == len(KEYS) // 2
    assert state.names("0", "1") == KEYS[:10]


@pytest.mark.parametrize("already", ["", "mnop"], ids=["fewer", "more"])
def test_a_set_of_keys_is_taken_over(already: str) -> None:
    """The index keeps a set of notes, or adds it to its own if that is larger. Either way it has the notes of both."""
    state = state_of("a")
    assert state.names("") == ["a"]
    state.set_many(dict.fromkeys(already, 1))
    assert state.index is not None
    state.index.take_over({"x", "y"})
    state.entries.update({"x": 1, "y": 1})  # type: ignore[union-attr]
    assert state.names("") == ["a", *already, "x", "y"]


@pytest.mark.usefixtures("small_steps")
def test_a_set_of_keys_is_merged_in_steps() -> None:
    """To take over a set merges nothing. Pages and counts are right before, amid and after the merge."""
    state = state_of("a")
    assert state.names("") == ["a"]
    assert state.index is not None
    state.set_many(dict.fromkeys("efghi", 1))
    state.entries.update(dict.fromkeys("xyz", 1))  # type: ignore[union-attr]
    state.index.take_over(set("xyz"))
    assert state.index.batches == 4
    assert state.index.merge_some(1)
    assert state.names("f", "g") == ["f"]
    assert state.names("", limit=20) == [*"aefghi", *"xyz"]
    assert state.count() == 9
    while state.fold_staged(1):
        pass
    assert not state.index.merge_some(1)
    assert state.names("", limit=20) == [*"aefghi", *"xyz"]


def test_a_second_set_is_taken_over_before_the_first_is_merged() -> None:
    """The index has the keys of both."""
    state = state_of("a")
    assert state.names("") == ["a"]
    assert state.index is not None
    state.set_many(dict.fromkeys("mn", 1))
    for keys in ("xyz", "uvw"):
        state.entries.update(dict.fromkeys(keys, 1))  # type: ignore[union-attr]
        state.index.take_over(set(keys))
    assert state.names("") == [*"amn", *"uvw", *"xyz"]


# What an index costs that is not used


def test_no_index_is_made_by_other_calls() -> None:
    """Without a call that needs an order there is no index."""
    state = state_of("a", "b")
    state.set("c", 1)
    state.delete_many(["a"])
    state.take()
    assert state.count() == 2
    assert state.index is None


def test_an_index_that_is_not_used_is_dropped() -> None:
    """When many keys came or went since its last use, the index is given to the owner of the state, to be freed."""
    state = state_of(*KEYS)
    freed: list[dict[Any, Any]] = []
    state.free = lambda large, *_: freed.append(large)
    assert state.names("") == KEYS
    state.set_many({f"x{number}": 1 for number in range(_index.SMALL)})
    state.take()
    assert state.index is not None
    state.set("y", 1)
    state.take()
    assert state.index is None
    assert [key for chunks in freed for chunk in chunks.values() for key in chunk] == KEYS
    assert state.names("0", "1") == KEYS[:10]


def test_the_keys_of_an_index_are_freed_with_the_state() -> None:
    """Deleting all keys gives the keys of the index to the owner of the state, to be freed."""
    state = state_of(*KEYS)
    freed: list[dict[Any, Any]] = []
    state.free = lambda large, *_: freed.append(large)
    assert state.names("") == KEYS
    state.clear()
    assert {0: tuple(KEYS)} in freed


class IndexMachine(RuleBasedStateMachine):
    """A state whose index is built and brought up to date a few keys at a time, beside a sorted dict."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        for name, value in SMALL_STEPS.items():
            self.patches.setattr(_index, name, value)
        self.patches.setattr(_sorted_keys, "SIZE", 3)
        self.time = 1000.0
        self.state = State(lambda: self.time)
        self.model: dict[str, int | None] = {}
        self.taken: list[ChangeSet] = []
        self.views: list[dict[str, Stored]] = []
        self.steps: Iterator[None] = iter(())

    def teardown(self) -> None:
        self.patches.undo()

    def living(self, low: str = "", high: str | None = None) -> list[str]:
        now = self.state.now()
        return in_range((key for key, at in self.model.items() if at is None or at > now), low, high)

    @initialize(keys=st.sets(NAMES, max_size=20), ordered=st.booleans())
    def load(self, keys: set[str], *, ordered: bool) -> None:
        names = sorted(keys) if ordered else list(keys)
        self.state.load(dict.fromkeys(names, 1), 0)
        self.model = dict.fromkeys(names)

    @rule(keys=st.lists(NAMES, max_size=5))
    def set_(self, keys: list[str]) -> None:
        for key in keys:
            set_as_the_hot_path(self.state, key)
        self.model.update(dict.fromkeys(keys))

    @rule(keys=st.lists(NAMES, max_size=5), seconds=st.integers(0, 3))
    def set_expiring(self, keys: list[str], seconds: int) -> None:
        at = self.state.now() + seconds * 400
        self.state.apply({key: Expiring(1, at) for key in keys}, cleared=False)
        self.model.update(dict.fromkeys(keys, at))

    @rule(keys=st.lists(NAMES, max_size=9))
    def set_many(self, keys: list[str]) -> None:
        self.state.set_many(dict.fromkeys(keys, 1))
        self.model.update(dict.fromkeys(keys))

    @rule(keys=st.lists(NAMES, max_size=9))
    def delete(self, keys: list[str]) -> None:
        living = set(self.living())
        self.state.delete_many(keys)
        for key in living.intersection(keys):
            del self.model[key]

    @rule(keys=st.lists(NAMES, max_size=3))
    def clear(self, keys: list[str]) -> None:
        self.state.apply(dict.fromkeys(keys, 1), cleared=True)
        self.model = dict.fromkeys(keys)

    @rule(most=st.integers(1, 9))
    def sweep(self, most: int) -> None:
        self.state.sweep(most)

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0]))
    def wait(self, seconds: float) -> None:
        self.time += seconds

    @rule()
    def take(self) -> None:
        self.taken = [self.state.take()]

    @precondition(lambda self: self.taken)
    @rule()
    def put_back(self) -> None:
        self.state.put_back(self.taken.pop())

    @precondition(lambda self: not self.views)
    @rule()
    def freeze(self) -> None:
        self.views = [self.state.freeze()]

    @precondition(lambda self: self.views)
    @rule(most=st.integers(1, 3))
    def fold(self, most: int) -> None:
        if not self.state.fold(self.views[0], most):
            self.views = []

    @rule(steps=st.integers(1, 9))
    def some_steps(self, steps: int) -> None:
        if next(self.steps, self) is self:
            self.steps = self.state.index_steps()
        for _ in range(steps):
            next(self.steps, None)

    @rule(low=TEXTS, high=TEXTS | st.none(), limit=st.integers(1, 9) | st.none(), reverse=st.booleans())
    def names(self, low: str, high: str | None, limit: int | None, *, reverse: bool) -> None:
        expected = self.living(low, high)
        expected = (expected[::-1] if reverse else expected)[:limit]
        assert self.state.names(low, high, limit, reverse=reverse) == expected

    @rule(low=TEXTS, high=TEXTS | st.none())
    def count(self, low: str, high: str | None) -> None:
        assert self.state.count_in(low, high) == len(self.living(low, high))

    @rule(low=TEXTS, high=TEXTS | st.none())
    def pieces(self, low: str, high: str | None) -> None:
        pieces = self.state.pieces(low, high)
        assert all(pieces)
        found = [key for piece in pieces for key in piece]
        assert found == in_range(self.state.entries, low, high)
        assert self.state.living(found) == self.living(low, high)

    @rule(prefix=TEXTS, limit=st.integers(1, 9) | st.none(), keys=st.lists(NAMES, max_size=5), reverse=st.booleans())
    def draft(self, prefix: str, limit: int | None, keys: list[str], *, reverse: bool) -> None:
        """Merge the index of the base with the changes of a draft."""
        draft, half = Draft(self.state), len(keys) // 2
        draft.set_many(dict.fromkeys(keys[:half], 1))
        draft.delete_many(keys[half:])
        low, high = bounds(prefix)
        expected = in_range({*self.living(), *keys[:half]}.difference(keys[half:]), low, high)
        assert draft.count_in(low, high) == len(expected)
        assert draft.living([key for piece in draft.pieces(low, high) for key in piece]) == expected
        assert draft.names(low, high, limit, reverse=reverse) == (expected[::-1] if reverse else expected)[:limit]
        draft.clear()
        draft.set_many(dict.fromkeys(keys, 1))
        assert draft.names(low, high) == in_range(set(keys), low, high)
        assert draft.count_in(low, high) == len(in_range(set(keys), low, high))


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_looks_at_new_keys_in_small_numbers(enabled: bool) -> None:  # noqa: FBT001
    """A build has young collections of its own, each after few new tuples; none if the program has turned the collector off."""
    state = State()
    state.load({f"{number * 7919 % 100_003:06}": 1 for number in range(100_000)}, 1)
    seen: list[str] = []
    (gc.enable if enabled else gc.disable)()
    gc.callbacks.append(lambda phase, _: seen.append(phase))
    try:
        for _ in state.index_steps():
            pass
    finally:
        gc.callbacks.pop()
        gc.enable()
    assert (seen.count("stop") >= 4) is enabled
    assert state.names("", None, 3) == ["000000", "000001", "000002"]


def called_deeper_and_deeper(call: Callable[[], object]) -> int:
    """Make a call at smaller and smaller depths, until it succeeds. Return how often it failed for want of stack."""

    def at_depth(left: int) -> object:
        return at_depth(left - 1) if left else call()

    for number, depth in enumerate(range(sys.getrecursionlimit() - 1, 0, -1)):
        try:
            at_depth(depth)
        except RecursionError:
            continue
        return number
    raise AssertionError("the call never succeeded")


@pytest.mark.usefixtures("small_steps")
def test_an_index_that_an_error_has_stopped_is_made_anew() -> None:
    """A `RecursionError` during the build, or while touched keys are looked up, hides no key from later calls."""
    state = state_of(*KEYS[::-1])
    assert called_deeper_and_deeper(lambda: state.names("")) > 0
    assert state.names("") == sorted(KEYS)
    added = [f"added {number}" for number in range(30)]
    state.set_many(dict.fromkeys(added, 1))
    assert called_deeper_and_deeper(lambda: state.count_in("", None)) > 0
    assert state.names("") == sorted([*KEYS, *added])
    assert state.count_in("", None) == len(KEYS) + 30


@pytest.mark.usefixtures("small_steps")
def test_an_index_of_a_local_copy_is_made_anew() -> None:
    """The index of a reader that an error has stopped is not used, either."""
    local = LocalCopy()
    local.entries.update(dict.fromkeys(KEYS[::-1], 1))
    assert called_deeper_and_deeper(lambda: local.pieces("", None)) > 0
    assert [key for piece in local.pieces("", None) for key in piece] == sorted(KEYS)


def test_pieces_are_right_while_the_index_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """If so many keys changed that the index is behind, the pieces have them all the same."""
    monkeypatch.setattr(_index, "FEW", 2)
    state = State()
    state.set_many({f"key/{number}": number for number in range(9)})
    for _ in state.index_steps():
        pass
    state.set_many({f"new/{number}": number for number in range(9)})
    state.delete_many([f"key/{number}" for number in range(3)])
    steps = state.index_steps()
    expected = [f"key/{number}" for number in range(3, 9)] + [f"new/{number}" for number in range(9)]
    while True:
        assert [key for piece in state.pieces("", None) for key in piece] == expected
        assert state.pieces("other", None) == []
        if next(steps, "end") == "end":
            break
