"""Visit every world that the steps of the model can reach. Pure."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from shared_owners import Model
from shared_world import Faults, Violation, World, start


class Scenario(NamedTuple):
    """The calls of each client, the faults that may come, and the steps that come first in each search."""

    programs: tuple[tuple[str, ...], ...]
    faults: Faults
    prelude: tuple[str, ...] = ()


class Found(NamedTuple):
    """The result of a search: the violation, the steps that lead to it, and the number of worlds."""

    violation: str | None
    steps: tuple[str, ...]
    worlds: int


def search(scenario: Scenario, wrong: str = "", most: int | None = None) -> Found:
    """Visit all worlds, those with few steps first. Stop at the first violation, or at `most` worlds."""
    model = Model(wrong)
    first = start(scenario.programs, scenario.faults)
    for name in scenario.prelude:
        first = dict(model.steps(first))[name]
    before: dict[World, tuple[World, str] | None] = {first: None}
    waiting = deque([first])
    while waiting and (most is None or len(before) < most):
        world = waiting.popleft()
        try:
            for name, after in model.steps(world):
                if after not in before:
                    before[after] = world, name
                    waiting.append(after)
        except Violation as violation:
            steps: list[str] = []
            at = world
            while (step := before[at]) is not None:
                at, name = step
                steps.append(name)
            return Found(str(violation), tuple(reversed(steps)), len(before))
    return Found(None, (), len(before))
