"""The views of `items()`: a map at one moment, while it changes."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lab_state._entries import Expiring, Stored
from lab_state._state import State
from lab_state._undo import UndoView

KEYS = st.sampled_from([f"k{n}" for n in range(8)])


def state_of(*keys: str) -> State:
    state = State()
    state.load({key: f"old {key}" for key in keys}, 10)
    return state


def found(view: UndoView[Stored], *keys: str) -> dict[str, Stored]:
    return dict(zip(keys, view.values(list(keys)), strict=True))


class Views(RuleBasedStateMachine):
    """Views that are opened, read, closed and collected while a state changes in each way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 100.0
        self.state = State(lambda: self.seconds)
        self.freed: list[dict[Any, Any]] = []
        self.state.free = self.freed.append
        self.views: list[tuple[UndoView[Stored], dict[str, Stored]]] = []
        self.frozen: list[dict[str, Stored]] = []
        self.number = 0

    @rule()
    def open(self) -> None:
        self.views.append((self.state.view(), dict(self.state.entries.items())))

    @precondition(lambda self: self.views)
    @rule(data=st.data(), closed=st.booleans())
    def end(self, *, data: st.DataObject, closed: bool) -> None:
        view, _ = self.views.pop(data.draw(st.integers(0, len(self.views) - 1)))
        if closed:
            self.state.close_view(view)

    @rule(key=KEYS, ttl=st.sampled_from([None, 5]))
    def set_one(self, key: str, ttl: int | None) -> None:
        self.number += 1
        self.state.set(key, self.number if ttl is None else Expiring(self.number, self.state.now() + ttl * 1000))

    @rule(keys=st.sets(KEYS))
    def set_many(self, keys: set[str]) -> None:
        self.number += 1
        self.state.set_many(dict.fromkeys(keys, self.number))

    @rule(keys=st.sets(KEYS))
    def delete_many(self, keys: set[str]) -> None:
        self.state.delete_many(keys)

    @rule(watched=st.booleans())
    def clear(self, *, watched: bool) -> None:
        self.state.on_change = (lambda *_: None) if watched else None
        self.state.clear()
        self.state.on_change = None

    @rule(seconds=st.integers(1, 7))
    def sweep(self, seconds: int) -> None:
        self.seconds += seconds
        self.state.sweep(5)

    @precondition(lambda self: not self.frozen)
    @rule()
    def freeze(self) -> None:
        self.frozen.append(self.state.freeze())

    @precondition(lambda self: self.frozen)
    @rule()
    def fold(self) -> None:
        if not self.state.fold(self.frozen[0], 2):
            view = self.frozen.pop()
            if self.state.entries is not view:
                self.state.release(view)

    @invariant()
    def each_view_shows_its_moment(self) -> None:
        for view, before in self.views:
            assert found(view, *before) == before
        for unneeded in self.freed:  # as the manager does, in steps
            unneeded.clear()

    def teardown(self) -> None:
        self.views.clear()
        self.state.before_overwrite([])
        assert not self.state.views
        assert not self.state._held


Views.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestViews = Views.TestCase


def test_collected_view_is_forgotten_at_the_next_change() -> None:
    """A view that is collected leaves nothing behind: the next change removes the dead reference."""
    state = state_of("a")
    notices: list[bool] = []
    state.on_views = lambda: notices.append(bool(state.views))
    view = state.view()
    state.set("a", 1)
    assert notices == [True]
    del view
    gc.collect()
    state.set("a", 2)
    assert notices == [True, False]
    assert state.views == []


def test_cleared_map_is_freed_when_no_view_needs_it() -> None:
    """A map that was replaced is freed in steps, but only after the last view was closed."""
    state = state_of("a", "b")
    freed: list[dict[Any, Any]] = []
    state.free = freed.append
    first, second = state.view(), state.view()
    entries = state.entries
    state.clear()
    state.set("a", "new")
    state.close_view(first)
    assert all(map(entries.__ne__, freed))
    assert found(second, "a", "b") == {"a": "old a", "b": "old b"}
    state.close_view(second)
    assert freed[-1] is entries


def test_many_keys_are_noted_in_steps() -> None:
    """The values of many keys are put into each view in steps, and a view that is opened meanwhile gets all of them."""
    state = state_of(*map(str, range(12_000)))
    views = [state.view()]
    keys = list(map(str, range(12_000)))
    steps = 0
    for _ in state.prepare_overwrite(keys):
        steps += 1
        if steps == 2:
            views.append(state.view())
    assert steps == 6
    del state.entries["7"]  # as an assignment of a new map would
    assert [found(view, "7") for view in views] == [{"7": "old 7"}] * 2


def test_preparing_costs_nothing_without_a_view() -> None:
    """Without a view, there is no step."""
    assert list(state_of("a").prepare_overwrite(["a"])) == []


def test_view_that_is_collected_amid_the_steps() -> None:
    """The steps end if the views are collected meanwhile."""
    state = state_of(*map(str, range(12_000)))
    views = [state.view()]
    steps = state.prepare_overwrite(list(map(str, range(12_000))))
    next(steps)
    views.clear()
    assert list(steps) == [None, None]


def test_closed_view_notes_nothing() -> None:
    """A view that was closed by the state ignores changes, and can be closed again."""
    state = state_of("a")
    view = state.view()
    state.close_views()
    assert view.is_closed
    view.note(["a"])
    view.keep()
    view.close()
    with pytest.raises(AssertionError):
        view.values(["a"])
    assert all(first != second for first, second in pairwise(state.views))
