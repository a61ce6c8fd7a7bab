"""The index: keys in order of code points, in steps and at once, beside changes."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lab_state._order import _sorted_keys, bounds
from lab_state._order._sorted_keys import SortedKeys

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
        self.kept: list[tuple[list[list[str]], list[list[str]]]] = []

    def teardown(self) -> None:
        _sorted_keys.SIZE = self.size

    @initialize(keys=st.sets(NAMES, max_size=40), cut=st.integers(1, 9))
    def begin(self, keys: set[str], cut: int) -> None:
        ordered = sorted(keys)
        self.model = set(keys)
        self.keys = SortedKeys(ordered[i : i + cut] for i in range(0, len(ordered) + cut, cut))

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
        self.kept.append((pieces, [piece.copy() for piece in pieces]))

    @invariant()
    def nothing_that_was_given_changes(self) -> None:
        assert all(pieces == copies for pieces, copies in self.kept)
        assert len(self.keys) == len(self.model)


TestSortedKeys = SortedKeysMachine.TestCase
TestSortedKeys.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
