"""Iterators beside a dict that is copied at their first step, while the state changes in each way that there is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from lab_state import Config, Items, Manager, MemoryStorage
from lab_state import _batch as batch
from lab_state._entries import Stored
from lab_state._items import _pages as pages
from lab_state._order import _index
from lab_state.testing import ManualClock

NAMES = [f"{first}{second}" for first in ("a", "a/", "b") for second in "uvwxyz"]
KEYS = st.sampled_from(NAMES)
VALUES = st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2))


class Walk:
    """An iterator that has begun, and the keys and values that it has to show next."""

    def __init__(self, items: Items[Any], expected: Iterator[tuple[str, Any]]) -> None:
        self.items = items
        self.expected = expected


class ItemsMachine(RuleBasedStateMachine):
    """A manager, a dict, and iterators."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.state = Manager(Config(name="state", flush_interval=None), MemoryStorage(), clock=self.clock)
        self.runner.run(self.state.start())
        self.model: dict[str, tuple[Any, float]] = {}
        self.walks: list[Walk] = []
        self.frozen: list[dict[str, Stored]] = []
        self.store_many({name: [0] for name in NAMES}, None)

    def teardown(self) -> None:
        self.walks.clear()
        self.runner.run(self.state.stop())
        self.runner.close()

    def alive(self) -> dict[str, Any]:
        now = self.clock.monotonic()
        return {key: value for key, (value, until) in self.model.items() if until > now}

    # Changes

    @rule(key=KEYS, value=VALUES, ttl=st.sampled_from([None, 0.5, 5]))
    def store(self, key: str, value: Any, ttl: float | None) -> None:
        self.runner.run(self.state.set(key, value, ttl=ttl))
        self.model[key] = value, float("inf") if ttl is None else self.clock.monotonic() + ttl

    @rule(new=st.dictionaries(KEYS, VALUES, min_size=6), ttl=st.sampled_from([None, None, 0.75]))
    def store_many(self, new: dict[str, Any], ttl: float | None) -> None:
        self.runner.run(self.state.set_many(new, ttl=ttl))
        until = float("inf") if ttl is None else self.clock.monotonic() + ttl
        self.model.update({key: (value, until) for key, value in new.items()})

    @rule(keys=st.sets(KEYS))
    def delete_many(self, keys: set[str]) -> None:
        self.runner.run(self.state.delete_many(keys))
        for key in keys:
            self.model.pop(key, None)

    @rule(prefix=st.sampled_from(["", "", "a/"]))
    def delete_all(self, prefix: str) -> None:
        self.runner.run(self.state.delete_all(prefix))
        self.model = {key: value for key, value in self.model.items() if not key.startswith(prefix)}

    @rule(new=st.dictionaries(KEYS, VALUES, max_size=9), gone=st.sets(KEYS), clear=st.booleans())
    def transaction(self, *, new: dict[str, Any], gone: set[str], clear: bool) -> None:
        async def commit() -> None:
            async with self.state.transaction() as tx:
                if clear:
                    tx.delete_all()
                tx.delete_many(gone)
                for key, value in new.items():
                    tx.set(key, value)
                shown = {} if clear else self.alive()
                shown = {**{key: value for key, value in shown.items() if key not in gone}, **new}
                assert list(tx.items()) == sorted(shown.items())

        self.runner.run(commit())
        if clear:
            self.model.clear()
        for key in gone:
            self.model.pop(key, None)
        self.model.update({key: (value, float("inf")) for key, value in new.items()})

    @rule(seconds=st.sampled_from([0.25, 0.5, 4]))
    def pass_time(self, seconds: float) -> None:
        async def advance() -> None:
            self.clock.advance(seconds)

        self.runner.run(advance())

    @rule()
    def flush(self) -> None:
        self.runner.run(self.state.flush())

    @precondition(lambda self: not self.frozen and not self.state._core.state.frozen)
    @rule()
    def begin_checkpoint(self) -> None:
        self.frozen.append(self.state._core.state.freeze())

    @precondition(lambda self: self.frozen)
    @rule()
    def fold_some(self) -> None:
        async def fold() -> None:
            state = self.state._core.state
            view = self.frozen[0]
            if not state.fold(view, 2):
                self.frozen.clear()
                if not state.has_as_base(view):
                    state.release(view)

        self.runner.run(fold())

    # Iterators

    @rule(
        prefix=st.sampled_from(["", "", "a", "a/", "c"]),
        after=st.sampled_from([None, None, *NAMES]),
        limit=st.sampled_from([None, None, 1, 9]),
        reverse=st.booleans(),
    )
    def begin(self, *, prefix: str, after: str | None, limit: int | None, reverse: bool) -> None:
        chosen = sorted(
            [
                row
                for row in self.alive().items()
                if row[0].startswith(prefix) and (after is None or (row[0] < after if reverse else row[0] > after))
            ],
            reverse=reverse,
        )[:limit]
        items = self.state.items(prefix, after=after, limit=limit, reverse=reverse)
        self.walks.append(Walk(items, iter(chosen)))
        self.go_on(self.walks[-1], 1)

    def go_on(self, walk: Walk, steps: int) -> None:
        """Take some steps, and compare each with the copy. Forget the iterator at its end."""

        async def walked() -> None:
            for _ in range(steps):
                expected = next(walk.expected, None)
                assert await anext(walk.items, None) == expected
                if expected is None:
                    self.walks.remove(walk)
                    return

        self.runner.run(walked())

    @precondition(lambda self: self.walks)
    @rule(data=st.data(), steps=st.integers(1, 4))
    def step(self, data: st.DataObject, steps: int) -> None:
        self.go_on(data.draw(st.sampled_from(self.walks)), steps)

    @precondition(lambda self: self.walks)
    @rule(data=st.data(), closed=st.booleans())
    def leave(self, *, data: st.DataObject, closed: bool) -> None:
        walk = self.walks.pop(data.draw(st.integers(0, len(self.walks) - 1)))
        if closed:
            self.runner.run(walk.items.aclose())


def test_iterators_show_their_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written between two steps, an iterator shows the keys and values of its first step, in order."""
    monkeypatch.setattr(pages, "_KEYS_IN_STEP", 2)
    monkeypatch.setattr(batch, "MANY", 4)
    monkeypatch.setattr(batch, "STEP", 2)
    for name, value in {"FEW": 2, "SMALL": 3}.items():
        monkeypatch.setattr(_index, name, value)
    run_state_machine_as_test(
        ItemsMachine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None, database=None)
    )
