"""Who runs the workers that are killed at random moments, and knows what their state may be."""

from __future__ import annotations

import asyncio
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

import worker

from lab_state import Config, FileStorage, Manager

WORKER = Path(__file__).with_name("worker.py")
LONGEST_LIFE = 0.1
"""Seconds from a child's start to its death; for every fourth, from its fork, so that some die before they live."""

UNMEASURED = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
"""The environment of processes that are killed: their coverage is never written, and measuring it costs time."""


class Zygote:
    """The process that forks the children, and the pipe that they all write to."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout.fileno()
        self._buffer = b""

    def live(self, cycle: int, dice: random.Random, longest: float = LONGEST_LIFE) -> Iterator[list[str]]:
        """Yield the words of each line of a child until it is dead; in between, `END <pid>`: kill it now."""
        self._stdin.write(b"%d %d\n" % (cycle, dice.randrange(2**32)))
        self._stdin.flush()
        deadline, pid = float("inf"), ""
        since, life = "PID" if dice.random() < 0.25 else "AT", dice.uniform(0, longest)
        while True:
            for line in self._lines(deadline):
                words = line.split()
                if words[0] == since:
                    deadline = time.monotonic() + life
                if words[0] == "PID":
                    pid = words[1]
                else:
                    yield words
                    if words[0] == "DEAD":
                        return
            if time.monotonic() >= deadline:
                yield ["END", pid]
                deadline = float("inf")

    def _lines(self, deadline: float) -> list[str]:
        """Read whole lines, as soon as there are any; none at the deadline."""
        timeout = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        if not select.select([self._stdout], [], [], timeout)[0]:
            return []
        data = os.read(self._stdout, 1 << 20)
        assert data, "the zygote died"
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [line.decode() for line in lines]


@contextmanager
def zygote(directory: Path, stderr: int | None = None, script: Path = WORKER) -> Iterator[Zygote]:
    process = subprocess.Popen(
        [sys.executable, script, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=UNMEASURED,
        bufsize=0,
        start_new_session=True,
    )
    with process:
        try:
            yield Zygote(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # and the child that still lives, if that is why we are here


class Witness:
    """What may be on disk: every state from the last acknowledged revision to the last tried."""

    def __init__(self) -> None:
        self._known = worker.Model({}, 0)
        self._cycle = 0
        self._acknowledged = self._tried = 0
        self.all_acknowledged = self.all_lost = self.never_started = 0

    def hear(self, cycle: int, word: str, *rest: str, evidence: bool = True) -> None:
        """Hear a line of a child; `evidence` says whether what it acknowledges counts."""
        if word == "AT":
            self.never_started -= 1
            self.found(int(rest[0]), rest[1])
        elif word == "TRY":
            self._cycle, revision = cycle, int(rest[0])
            assert revision == self._tried + 1
            self._tried = revision
        elif word == "ACK" and evidence:
            assert int(rest[0]) == self._tried
            self.all_acknowledged += self._tried - self._acknowledged
            self._acknowledged = self._tried

    def found(self, revision: int, digest: str) -> None:
        """Check that what a child found at its start is exactly one of these states."""
        assert self._acknowledged <= revision <= self._tried
        while self._known.revision < revision:
            self._known.next(self._cycle)
        assert digest == self._known.digest(), f"revision {revision} is not what was written"
        self.all_lost += self._tried - revision
        self._acknowledged = self._tried = revision

    async def check_the_end(self, directory: Path) -> None:
        """Start a last time, in this process, and stop cleanly, which leaves plain JSON."""
        async with Manager(Config(name=worker.NAME), FileStorage(directory)) as state:
            everything = await state.get_all()
            self.found(state.revision, worker.digest(everything))
        loaded = json.loads(await asyncio.to_thread((directory / f"{worker.NAME}.json").read_bytes))
        del loaded["$lab_state"]
        assert loaded == everything
