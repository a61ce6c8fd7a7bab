"""SIGKILL at random moments of one growing state: nothing acknowledged is lost, nothing is mixed up."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from witness import Witness, zygote

CYCLES = int(os.environ.get("LAB_STATE_KILL_CYCLES", "250"))


@pytest.mark.timeout(60 + CYCLES)
def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """After each SIGKILL the state is a prefix of what was tried, with everything that was acknowledged."""
    dice, witness = random.Random(20_250_101), Witness()
    with zygote(tmp_path) as children:
        for cycle in range(1, CYCLES + 1):
            witness.never_started += 1
            for word, *rest in children.live(cycle, dice):
                if word == "END":
                    os.kill(int(rest[0]), signal.SIGKILL)
                elif word == "DEAD":
                    assert int(rest[0]) == -signal.SIGKILL, "the child died of something else; see its standard error"
                else:
                    witness.hear(cycle, word, *rest)
    asyncio.run(witness.check_the_end(tmp_path))
    sys.stdout.write(
        f"{CYCLES} cycles: {witness.all_acknowledged} changes acknowledged, none lost; {witness.all_lost} tried and "
        f"gone; {witness.never_started} killed before they had started\n"
    )
    assert witness.all_acknowledged > CYCLES
    assert 0 < witness.never_started < CYCLES / 2
