"""Every call with which the storage writes, made to fail: nothing acknowledged is lost, and the truth is told.

112 of 280 runs; all with the environment variable `LAB_STATE_FAULT_RUNS=280`.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
from application import Plan
from injector import CALLS, Fault, errno_of
from lives import REMEDIES, Life, Zygote, check_death, in_memory, zygote
from matrix import ALL, ERRORS, FOR_GOOD, POSITIONS, RUNS, Run, spread

End = Literal["kill", "stop"]
Totals = dict[tuple[str, str], int]
BEFORE = {
    # Only what failed before is cut off, or deleted.
    "ftruncate": [Fault(call="write", name="/lab.journal", error="ENOSPC", first=3, every=2, times=12)],
    "unlink": [Fault(call="fsync", name=".tmp", error="EIO", first=2, times=12)],
}


def plan(directory: Path, run: Run, totals: Totals) -> Plan:
    # After other failures there are retries, whose number is a matter of time.
    first = 1 + run.position if run.call in BEFORE else run.first(totals[run.call, run.end])
    return Plan(
        directory=str(directory),
        interval=run.interval,
        end=run.end,
        faults=[*BEFORE.get(run.call, ()), Fault(call=run.call, error=run.error, first=first, times=run.times)],
        heals=run.times < FOR_GOOD or run.call in BEFORE,
    )


def count(children: Zygote, directory: Path) -> Totals:
    """Return how many calls of each name there are in a life, with no faults but those that must come before."""
    found: Totals = {}
    ends: tuple[End, ...] = ("kill", "stop")
    for call, end in product(CALLS, ends):
        life = children.live(Plan(directory=str(directory), interval=0, end=end, faults=BEFORE.get(call, [])))
        check_death(life)
        life.check()
        found[call, end] = Counter(life.calls)[call]
        shutil.rmtree(directory)
    return found


def told(life: Life) -> bool:
    """Return whether the application was told of a failure, by an error or by `status()`."""
    return bool(life.of("error") or life.of("checkpoint failed"))


@pytest.mark.timeout(60 + RUNS)
def test_no_fault_loses_what_was_acknowledged(tmp_path: Path) -> None:
    """One call fails, once or for good; the application goes on, ends, and another one finds everything."""
    assert {errno_of(error) for error in ERRORS} <= set(REMEDIES)
    heard: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    with in_memory(tmp_path) as directory, zygote() as children:
        totals = count(children, directory / "state")
        assert min(totals.values()) >= POSITIONS, totals
        for run in spread(RUNS):
            life = children.live(plan(directory / "state", run, totals))
            try:
                check_death(life)
                assert life.struck[run.call] >= 1
                life.check()
                life.check_what_is_left()
            except BaseException as problem:
                problem.add_note(f"{run}: {life.plan}")
                raise
            heard[run.call] += told(life)
            ends[life.plan.end] += 1
            shutil.rmtree(directory / "state")
    sys.stdout.write(f"{RUNS} of {ALL} runs, of {ends}; told of it: {dict(heard)}; calls in a life: {totals}\n")
    assert all(heard[call] for call in CALLS), heard
    assert abs(ends["kill"] - ends["stop"]) <= RUNS // 8
