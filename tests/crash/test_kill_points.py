"""SIGKILL before every call with which the storage writes, and in the middle of every write."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from application import Plan
from injector import Kill
from lives import Life, Zygote, check_death, in_memory, zygote

RECORD = ("write", "fdatasync")


def points(calls: list[str]) -> Iterator[Kill]:
    """Yield each moment in which the files differ from those of the moment before."""
    for number, call in enumerate(calls, 1):
        yield Kill(number=number)
        if call == "write":
            yield Kill(number=number, half=True)


def plan(directory: Path, kill: Kill | None = None, *, history: bool = False) -> Plan:
    return Plan(directory=str(directory), interval=0, end="stop", kill=kill, history=history)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("history", [False, True] if os.environ.get("LAB_STATE_FAULT_RUNS") else [False])
def test_killed_at_every_call(tmp_path: Path, *, history: bool) -> None:
    """Whatever was acknowledged up to that call is there, and the next process goes on. In a history, each moment can be read."""
    killed = 0
    with in_memory(tmp_path) as directory, zygote() as children:
        unharmed = children.live(plan(directory / "state", history=history))
        check_death(unharmed)
        assert ("linkat" in unharmed.calls) == history
        for kill in points(unharmed.calls):
            shutil.rmtree(directory / "state")
            life = children.live(plan(directory / "state", kill, history=history))
            check_death(life)
            life.check()
            if history:
                life.check_history()
            life.check_what_is_left()
            killed += 1
    sys.stdout.write(f"killed at {killed} points of {len(unharmed.calls)} calls: nothing acknowledged was lost\n")


RECOVERY = 60
"""Calls: the lock and what is noted in it, what is read, the torn tail, the temporary files, a new journal, a checkpoint, and a few changes."""


def cut_short(children: Zygote, directory: Path) -> Life:
    """Return a life that ended in the middle of a record, late, beside a snapshot that was being written."""
    calls = children.live(plan(directory / "unharmed")).calls
    records = [number for number, (call, then) in enumerate(pairwise(calls), 1) if (call, then) == RECORD]
    life = children.live(plan(directory / "cut", Kill(number=records[len(records) * 2 // 3], half=True)))
    check_death(life)
    life.check()
    assert 0 < life.durable < life.tried
    (directory / "cut" / "lab.json.00000000.tmp").write_bytes(b'{"half')
    return life


@pytest.mark.timeout(180)
def test_killed_at_every_call_of_a_recovery(tmp_path: Path) -> None:
    """A process that recovers what a kill left is killed at each of its calls, and the next one recovers all."""
    killed = 0
    with in_memory(tmp_path) as directory, zygote() as children:
        first = cut_short(children, directory)
        shutil.copytree(directory / "cut", directory / "state")
        calls = children.live(plan(directory / "state")).calls[:RECOVERY]
        assert {"openat", "write", "ftruncate", "fsync", "rename", "unlink", "fdatasync", "mkdir"} == set(calls)
        for kill in points(calls):
            shutil.rmtree(directory / "state")
            shutil.copytree(directory / "cut", directory / "state")
            life = children.live(plan(directory / "state", kill))
            check_death(life)
            life.check(first.durable, first.tried)
            life.check_what_is_left()
            killed += 1
    sys.stdout.write(f"killed at {killed} points of a recovery: nothing acknowledged was lost\n")
