"""SIGKILL at random moments of one growing state: nothing acknowledged is lost, nothing is mixed up."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from lab_state import Config, FileStorage, Manager

CYCLES = int(os.environ.get("LAB_STATE_KILL_CYCLES", "500"))
WORKER = Path(__file__).with_name("worker.py")
LONGEST_LIFE = 0.1
"""Seconds from the fork of a child to its death; a start is the first 10 ms of it, so some die before they live."""


def _import_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _import_worker()


class Zygote:
    """The process that forks the children, and the pipe that they all write to."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout.fileno()
        self._buffer = b""

    def live_and_die(self, cycle: int, dice: random.Random) -> Iterator[list[str]]:
        """The words of each line of a child that is killed at a random moment."""
        self._stdin.write(b"%d %d\n" % (cycle, dice.randrange(2**32)))
        self._stdin.flush()
        deadline, pid = float("inf"), 0
        while True:
            for line in self._lines(deadline):
                words = line.split()
                if words[0] == "PID":
                    pid, deadline = int(words[1]), time.monotonic() + dice.uniform(0, LONGEST_LIFE)
                elif words[0] == "DEAD":
                    assert int(words[1]) == -signal.SIGKILL, "the child died of something else; see its standard error"
                    return
                else:
                    yield words
            if time.monotonic() >= deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = float("inf")

    def _lines(self, deadline: float) -> list[str]:
        """Whole lines, as soon as there are any; none at the deadline."""
        timeout = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        if not select.select([self._stdout], [], [], timeout)[0]:
            return []
        data = os.read(self._stdout, 1 << 20)
        assert data, "the zygote died"
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [line.decode() for line in lines]


@contextmanager
def zygote(directory: Path) -> Iterator[Zygote]:
    process = subprocess.Popen(
        [sys.executable, WORKER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    with process:
        try:
            yield Zygote(process)
        finally:
            process.stdout.close()  # type: ignore[union-attr]  # a child that still lives ends at its next line
            process.stdin.close()  # type: ignore[union-attr]


class Witness:
    """What may be on disk: every state from the last acknowledged revision to the last tried."""

    def __init__(self) -> None:
        self._known = worker.Model({}, 0)
        self._cycle = 0
        self._acknowledged = self._tried = 0
        self.all_acknowledged = self.all_lost = self.never_started = 0

    def found(self, revision: int, digest: str) -> None:
        """A child started: is what it found one of these states, exactly?"""
        assert self._acknowledged <= revision <= self._tried
        while self._known.revision < revision:
            self._known.next(self._cycle)
        assert digest == self._known.digest(), f"revision {revision} is not what was written"
        self.all_lost += self._tried - revision
        self._acknowledged = self._tried = revision

    def try_(self, cycle: int, revision: int) -> None:
        assert revision == self._tried + 1
        self._cycle, self._tried = cycle, revision

    def acknowledge(self, revision: int) -> None:
        assert revision == self._tried
        self.all_acknowledged += revision - self._acknowledged
        self._acknowledged = revision


@pytest.mark.timeout(60 + CYCLES)
def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """After each of 500 SIGKILLs the state is a prefix of what was tried, with everything that was acknowledged."""
    dice, witness = random.Random(20_250_101), Witness()
    with zygote(tmp_path) as children:
        for cycle in range(1, CYCLES + 1):
            witness.never_started += 1
            for word, revision, *digest in children.live_and_die(cycle, dice):
                if word == "AT":
                    witness.never_started -= 1
                    witness.found(int(revision), *digest)
                elif word == "TRY":
                    witness.try_(cycle, int(revision))
                else:
                    witness.acknowledge(int(revision))
    asyncio.run(_check_the_end(tmp_path, witness))
    sys.stdout.write(
        f"{CYCLES} cycles: {witness.all_acknowledged} changes acknowledged, none lost; {witness.all_lost} tried and "
        f"gone; {witness.never_started} killed before they had started\n"
    )
    assert witness.all_acknowledged > CYCLES
    assert 0 < witness.never_started < CYCLES / 2


async def _check_the_end(directory: Path, witness: Witness) -> None:
    """A last start, in this process, and a clean stop, which leaves plain JSON."""
    async with Manager(Config(name=worker.NAME), FileStorage(directory)) as state:
        everything = await state.get_all()
        witness.found(state.revision, worker.digest(everything))
    loaded = json.loads((directory / f"{worker.NAME}.json").read_bytes())
    del loaded["$lab_state"]
    assert loaded == everything
