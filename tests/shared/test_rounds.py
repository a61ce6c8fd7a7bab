"""Rounds of four processes that share a state, are killed, frozen, stopped and cut off, and keep the six facts.

`round_facts` has the facts, `round_plan` the faults, and `round_bugs` the bugs that the rounds must find.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterable
from contextlib import aclosing
from pathlib import Path

import pytest
from round_bugs import BUGS
from round_driver import run_rounds
from round_plan import CALLS, PROCESSES, Round, planned
from round_points import POINTS

ROUNDS = int(os.environ.get("LAB_STATE_SHARED_ROUNDS", "60"))
"""How many rounds are run. `nox -s shared` sets it to 2,000."""

SEED = int(os.environ.get("LAB_STATE_SHARED_SEED", "0"))
"""The seed of the first round. Each round is repeated with its seed by `python tests/shared/round_driver.py`."""

MOST = 60
"""In how many rounds a bug must be found."""

QUICK = (
    "the owner reads its layer",
    "catch_up returns at once",
    "a new owner skips the results of the tail",
    "a record has no results",
    "admits before it has settled",
    "feeds before the sync",
    "shows a load at once",
    "a new owner checks from 0",
    "answers before the record",
    "an unchanged call has the durable revision",
    "a check misses what was not there",
    "a new owner does not look up its own calls",
    "a check rests on a lost revision",
    "sends again with new numbers",
    "a repeat misses what is not durable",
    "acknowledges what is open",
    "a new owner keeps to its copy",
    "hands over to followers that leave",
)
"""The bugs that are found in seconds. `nox -s shared` looks for all of them."""

TRIED = QUICK if ROUNDS <= 200 else tuple(BUGS)


async def violations(rounds: Iterable[Round], directory: Path, bug: str = "", *, enough: float = 3) -> list[str]:
    """Run rounds until a few have a violation. Return the first violations of each, with its seed."""
    found: list[str] = []
    number = calls = 0
    async with aclosing(run_rounds(rounds, directory, bug)) as results:
        async for one, path, ran in results:
            number += 1
            calls += sum(len(process.events) for process in ran.processes)
            if ran.broken:
                found.append(f"seed {one.seed}, histories in {path}: {[tuple(broken) for broken in ran.broken[:3]]}")
            if len(found) >= enough:
                break
    print(f"{number} rounds, {calls} events, {len(found)} with a violation")
    return found


@pytest.mark.timeout(7200)
def test_processes_keep_the_facts(tmp_path: Path) -> None:
    """No round breaks a fact, whatever is killed, frozen, cut or delayed in it."""
    found = asyncio.run(violations(map(planned, range(SEED, SEED + ROUNDS)), tmp_path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("bug", TRIED)
def test_a_bug_is_found(bug: str, tmp_path: Path) -> None:
    """A wrong reading of the protocol breaks a fact in one of its rounds."""
    plan = BUGS[bug].plan
    rounds = (plan(random.Random(seed), f"{seed}") for seed in range(MOST))
    assert asyncio.run(violations(rounds, tmp_path, bug, enough=1))


def test_the_rounds_of_a_bug_are_sound(tmp_path: Path) -> None:
    """Without the bug, the same rounds break nothing: the bug is at fault."""
    rounds = [BUGS[bug].plan(random.Random(1), "1") for bug in TRIED]
    found = asyncio.run(violations(rounds, tmp_path))
    assert not found, "\n".join(found)


def test_the_plans_have_all_faults() -> None:
    """The rounds of an ordinary run have each kind of fault, and each point at which a process may die."""
    plans = [planned(seed) for seed in range(200)]
    points = {trap.point for plan in plans for traps in plan.traps for trap in traps}
    assert points == set(POINTS)
    assert {trap.action for plan in plans for traps in plan.traps for trap in traps} == {"kill", "freeze"}
    assert {fault.action for plan in plans for fault in plan.faults} == {"kill", "freeze", "end"}
    assert all(plan.processes == PROCESSES and plan.calls == CALLS for plan in plans)
    assert any(plan.network.cut_after for plan in plans)
    assert any(plan.network.delay for plan in plans)
    assert any(plan.network.is_split for plan in plans)
    assert any(plan.disk.failing for plan in plans)
    assert any(plan.disk.checkpoint_at for plan in plans)
    assert any(plan.owner_timeout < 1 for plan in plans)
    assert planned(3) == planned(3) != planned(4)


def test_there_are_enough_bugs() -> None:
    """There are more than fifteen, and four of them need a round that is made for them."""
    assert len(BUGS) > len(set(QUICK)) > 15
    assert set(QUICK) < set(BUGS)
    made = {
        "a repeat misses what is not durable",
        "a new owner was not forgotten",
        "answers go to a later connection",
        "a check rests on a lost revision",
    }
    assert made <= set(BUGS)
