"""Random chains of migrations against a model, which is a dict of values and expiry times."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lab_state import Manager, MemoryStorage, MigrationDraft, Schema
from lab_state.testing import ManualClock

Model = dict[str, tuple[Any, int | None]]
"""For each key: the value, and the seconds from the beginning until it expires."""

LATER = 50
"""Seconds from the beginning to the first migration."""

KEYS = st.sampled_from(["a", "b", "c", "d/1", "d/2", "e"])
VALUES = st.one_of(
    st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2), st.dictionaries(KEYS, st.none(), max_size=2)
)
TTLS = st.one_of(st.none(), st.sampled_from([10, 40, 60, 500]))
STATES = st.dictionaries(KEYS, st.tuples(VALUES, TTLS), min_size=1)
STEPS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES, TTLS),
    st.tuples(st.just("set_many"), st.dictionaries(KEYS, VALUES, max_size=3), TTLS),
    st.tuples(st.just("move"), KEYS, KEYS),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("touch"), KEYS, TTLS),
    st.tuples(st.just("update"), KEYS, VALUES),
    st.tuples(st.just("delete_all"), st.sampled_from(["d/", "x"])),
    st.tuples(st.just("clear")),
)
CHAINS = st.lists(st.lists(STEPS, max_size=6), min_size=1, max_size=4)


def at(ttl: int | None) -> int | None:
    return None if ttl is None else LATER + ttl


def apply(model: Model, step: tuple[Any, ...]) -> None:
    """Apply one step to the model."""
    kind, *rest = step
    if kind == "set":
        key, value, ttl = rest
        model[key] = value, at(ttl) if ttl is not None else model.get(key, (None, None))[1]
    elif kind == "set_many":
        for key, value in rest[0].items():
            apply(model, ("set", key, value, rest[1]))
    elif kind == "move":
        old, new = rest
        if old in model and new not in model:
            model[new] = model.pop(old)
    elif kind == "delete":
        model.pop(rest[0], None)
    elif kind == "touch":
        if rest[0] in model:
            model[rest[0]] = model[rest[0]][0], at(rest[1])
    elif kind == "update":
        if rest[0] in model:
            model[rest[0]] = rest[1], model[rest[0]][1]
    else:
        prefix = rest[0] if rest else ""
        for key in [key for key in model if key.startswith(prefix)]:
            del model[key]


def make(draft: MigrationDraft, step: tuple[Any, ...]) -> None:
    """Make one step with the calls of a migration."""
    kind, *rest = step
    if kind == "set":
        draft.set(rest[0], rest[1], ttl=rest[2])
    elif kind == "set_many":
        draft.set_many(rest[0], ttl=rest[1])
    elif kind == "move":
        if rest[0] in draft and rest[1] not in draft:
            draft.move(*rest)
    elif kind == "touch":
        draft.touch(*rest)
    elif kind == "delete":
        draft.delete(rest[0])
    elif kind == "update":
        if rest[0] in draft:
            draft.update(rest[0], lambda _: rest[1])
    else:
        draft.delete_all(*rest)


async def migrated(start: Model, chain: list[list[tuple[Any, ...]]], stops: int) -> Model:
    """Migrate a state: in two starts, the first up to version `stops`, or in one."""
    storage, clock = MemoryStorage(), ManualClock()
    async with Manager("chain", storage, clock=clock) as state:
        for key, (value, ttl) in start.items():
            await state.set(key, value, ttl=ttl)
    clock.advance(LATER)
    versions = [min(stops, len(chain)) + 1, len(chain) + 1]
    for version in versions:
        schema = Schema(version)
        for to, steps in enumerate(chain[: version - 1], 2):

            def run(draft: MigrationDraft, steps: list[tuple[Any, ...]] = steps) -> None:
                for step in steps:
                    make(draft, step)

            schema.migration(to=to)(run)
        async with Manager("chain", storage, clock=clock, schema=schema) as state:
            found = {key: (await state.get(key), await state.expires_in(key)) for key in await state.keys()}
    return {key: (value, None if left is None else LATER + round(left)) for key, (value, left) in found.items()}


@settings(max_examples=40, deadline=None)
@given(start=STATES, chain=CHAINS, stops=st.integers(0, 4))
def test_chains(start: Model, chain: list[list[tuple[Any, ...]]], stops: int) -> None:
    """A chain in one start, and the same chain in two, leave the values and expiry times of the model."""
    model = {key: (value, ttl) for key, (value, ttl) in start.items() if ttl is None or ttl > LATER}
    for steps in chain:
        for step in steps:
            apply(model, step)
    assert asyncio.run(migrated(start, chain, stops)) == model
