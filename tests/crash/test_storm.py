"""Hundreds of tasks that write and are cancelled at random, in a process that is killed: what returned is there."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lives import in_memory
from storm import FOUND
from witness import zygote

from lab_state import FileStorage, Manager

STORM = Path(__file__).with_name("storm.py")
LONGEST_LIFE = 0.2
CYCLES = int(os.environ.get("LAB_STATE_STORM_CYCLES", "30"))


class Ledger:
    """What the tasks said, and what that means for what the next process finds."""

    def __init__(self, found: Path) -> None:
        """Begin with nothing told. `found`: Where a process puts what its start found."""
        self._found = found
        self.told: Counter[str] = Counter()
        self._revision = 0
        self._kept: dict[str, str] = {}
        self._tried: set[str] = set()
        self._counts = [0, 0]  # acknowledged, tried

    def hear(self, word: str, *rest: str) -> None:
        self.told[word] += 1
        assert word != "LOST", rest
        if word == "AT":
            self.check(int(rest[0]), json.loads(self._found.read_bytes()))
        elif word == "TRY":
            self._tried.add(rest[0])
            self._counts[1] += rest[1] == "incr"
        elif word == "ACK":
            task, call, revision = rest
            self._revision = max(self._revision, int(revision))
            self._counts[0] += call == "incr"
            self._kept.update({f"{kind}/{task}": task for kind in KEYS.get(call, ())})

    def check(self, revision: int, found: dict[str, Any]) -> None:
        """Check what a start found."""
        assert revision >= self._revision
        self._revision = revision
        missing = self._kept.items() - found.items()
        assert not missing
        acknowledged, tried = self._counts
        count, last = found.pop("count", 0), found.pop("last", None)
        assert acknowledged <= count <= tried
        assert last is None or last in self._tried
        for key, task in found.items():
            kind, _, name = key.partition("/")
            assert name == task
            assert name in self._tried
            if kind in ("left", "right"):
                assert f"left/{name}" in found
                assert f"right/{name}" in found


KEYS = {"set": ("set",), "incr": ("incr",), "transaction": ("left", "right")}
"""Which keys a call leaves, each with the task's name."""


async def left(directory: Path) -> tuple[int, dict[str, Any]]:
    async with Manager("storm", FileStorage(directory)) as state:
        return state.revision, await state.get_all()


@pytest.mark.timeout(60 + 5 * CYCLES)
def test_a_storm_of_cancellations(tmp_path: Path) -> None:
    """Every change whose call returned is there after the kill, transactions are whole, and no revision goes back."""
    dice = random.Random(20_250_303)
    with in_memory(tmp_path) as directory, zygote(directory, script=STORM) as children:
        ledger = Ledger(directory / FOUND)
        for cycle in range(1, CYCLES + 1):
            for word, *rest in children.live(cycle, dice, LONGEST_LIFE):
                if word == "END":
                    os.kill(int(rest[0]), signal.SIGKILL)
                elif word == "DEAD":
                    assert int(rest[0]) == -signal.SIGKILL, "the child died of something else; see its standard error"
                else:
                    ledger.hear(word, *rest)
        ledger.check(*asyncio.run(left(directory)))
    told = ledger.told
    sys.stdout.write(f"{CYCLES} kills: {told['ACK']} calls returned, none lost; {told['GONE']} were cancelled\n")
    assert min(told["ACK"], told["GONE"]) > CYCLES
