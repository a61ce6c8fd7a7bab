"""Every call with which the storage writes, made to fail: nothing acknowledged is lost, and the truth is told.

112 of 280 runs; all with the environment variable `LAB_STATE_FAULT_RUNS=280`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
from application import Plan
from injector import CALLS, Fault
from lives import REMEDIES, Life, Zygote, check_death, in_memory, zygote

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES")
POSITIONS = 8
End = Literal["kill", "stop"]
Totals = dict[tuple[str, End], int]
ALL = len(CALLS) * len(ERRORS) * POSITIONS
RUNS = int(os.environ.get("LAB_STATE_FAULT_RUNS", "112"))
BEFORE = {
    # Only what failed before is cut off, or deleted.
    "ftruncate": [Fault(call="write", name="/lab.journal", error="ENOSPC", first=3, every=2, times=12)],
    "unlink": [Fault(call="fsync", name=".tmp", error="EIO", first=2, every=2, times=10)],
}


def plan(directory: Path, call: str, error: str, position: int, totals: Totals) -> Plan:
    """The fault at one of eight positions among the calls of a life without it: once, three times, or for good."""
    times = {3: 1_000_000, 5: 3, 6: 1_000_000}.get(position, 1)
    other = position + ERRORS.index(error)
    end: End = "kill" if other % 2 else "stop"
    total = totals[call, end]
    # After other failures there are retries, whose number is a matter of time.
    first = 1 + (position if call in BEFORE else position * (total - 1) // (POSITIONS - 1))
    return Plan(
        directory=str(directory),
        interval=0 if other % 4 < 2 else None,
        end=end,
        faults=[*BEFORE.get(call, ()), Fault(call=call, error=error, first=first, times=times)],
        heals=times < 1000 or call in BEFORE,
    )


def spread(runs: int) -> list[tuple[str, str, int]]:
    """So many of all runs, evenly."""
    every = list(product(CALLS, ERRORS, range(POSITIONS)))
    return [every[number * len(every) // runs] for number in range(runs)]


def count(children: Zygote, directory: Path) -> Totals:
    """How many calls of each name there are in a life, with no faults but those that must come before."""
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
    """Whether the application was told of a failure, by an error or by `status()`."""
    return bool(life.of("error") or life.of("checkpoint failed"))


@pytest.mark.timeout(60 + RUNS)
def test_no_fault_loses_what_was_acknowledged(tmp_path: Path) -> None:
    """One call fails, once or for good; the application goes on, ends, and another one finds everything."""
    assert len(REMEDIES) == len(ERRORS)
    heard: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    with in_memory(tmp_path) as directory, zygote() as children:
        totals = count(children, directory / "state")
        assert min(totals.values()) >= POSITIONS, totals
        for call, error, position in spread(RUNS):
            life = children.live(plan(directory / "state", call, error, position, totals))
            try:
                check_death(life)
                assert life.struck[call] >= 1
                life.check()
                life.check_what_is_left()
            except BaseException as problem:
                problem.add_note(f"{call} {error} at position {position}: {life.plan}")
                raise
            heard[call] += told(life)
            ends[life.plan.end] += 1
            shutil.rmtree(directory / "state")
    sys.stdout.write(f"{RUNS} of {ALL} runs, of {ends}; told of it: {dict(heard)}; calls in a life: {totals}\n")
    assert all(heard[call] for call in CALLS), heard
    assert abs(ends["kill"] - ends["stop"]) <= RUNS // 8
