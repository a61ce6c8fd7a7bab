"""The fault matrix, and SIGKILL at every call, by strace: the kernel's own calls of a process of its own.

With the environment variable `LAB_STATE_CRASH_STRACE=1`, where strace is installed and may trace.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import msgspec
import pytest
from application import Plan
from injector import CALLS
from lives import ENVIRONMENT, SCRIPT, Life, check_death, in_memory
from matrix import ALL, FOR_GOOD, POSITIONS, RUNS, Run, spread

pytestmark = pytest.mark.skipif(
    os.environ.get("LAB_STATE_CRASH_STRACE") != "1",
    reason="asked for with LAB_STATE_CRASH_STRACE=1, as nox -s crash does",
)

KERNEL = {"write": ("pwrite64", "write")}
"""What the kernel calls it, where that is another name, or two: the journal's, and the snapshot's."""
TEMPORARIES = 100
BEFORE = {
    # Only what failed before is cut off, or deleted. Each thread counts for itself.
    "ftruncate": ["inject=pwrite64:error=ENOSPC:when=3..30+3"],
    "unlink": ["inject=fsync:error=EIO:when=2..16+2"],
}


class Tracer:
    """strace around one life of the application at a time."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self._log = directory / "trace"
        names = [f"lab.{kind}.{number:08x}.tmp" for kind in ("json", "journal") for number in range(TEMPORARIES)]
        files = ["", "lab.json", "lab.journal", "lab.lock", *names]
        self._paths = [option for name in files for option in ("-P", str(self.state / name))]

    def live(self, plan: Plan, injections: Sequence[str]) -> Life:
        """Follow the plan, with these injections of strace's own language."""
        shutil.rmtree(self.state, ignore_errors=True)
        calls = ",".join(name for call in CALLS for name in KERNEL.get(call, (call,)))
        # Without --seccomp-bpf, under which strace 6.1 injects errors, but no signals.
        options = ["-f", "-qq", "-o", str(self._log), "-e", f"trace={calls}", *self._paths]
        options += [option for injection in injections for option in ("-e", injection)]
        done = subprocess.run(
            ["strace", *options, sys.executable, SCRIPT, "once", msgspec.json.encode(plan).decode()],
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            check=False,
        )
        return Life(plan, [json.loads(line) for line in done.stdout.splitlines()], done.returncode)

    def injected(self, call: str) -> int:
        """Return how many calls were made to fail in the last life."""
        return sum(
            len(re.findall(rf"\b{name}(?:\(| resumed).*\(INJECTED\)", self._log.read_text()))
            for name in KERNEL.get(call, (call,))
        )

    def counts(self) -> dict[str, int]:
        """Return, by the kernel's names, how often the busiest thread made each call in the last life."""
        calls = re.findall(r"^(\d+) +(\w+)\(", self._log.read_text(), re.MULTILINE)
        most: dict[str, int] = {}
        for (_, name), number in Counter(calls).items():
            most[name] = max(most.get(name, 0), number)
        return most


def tracer(directory: Path) -> Tracer:
    """Return a tracer that works; fail with what is missing if it does not."""
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed, and LAB_STATE_CRASH_STRACE=1 asks for it: apt-get install strace")
    probe = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.fail(f"strace may not trace here (container without ptrace?): {probe.stderr.strip()}")
    return Tracer(directory)


def injections(run: Run, counts: dict[str, int]) -> list[str]:
    """Return the run in strace's language, for each name of its call."""
    found = list(BEFORE.get(run.call, ()))
    for name in KERNEL.get(run.call, (run.call,)):
        first = 1 + run.position // 2 if run.call in BEFORE else run.first(counts[name])
        last = {1: str(first), 3: f"{first}..{first + 2}"}.get(run.times, f"{first}+")
        found.append(f"inject={name}:error={run.error}:when={last}")
    return found


@pytest.mark.timeout(120 + 5 * RUNS)
def test_no_fault_loses_what_was_acknowledged(tmp_path: Path) -> None:
    """One call fails, once or for good; the application goes on, ends, and another one finds everything."""
    struck: Counter[str] = Counter()
    with in_memory(tmp_path) as directory:
        trace = tracer(directory)
        ends = {}
        for end in ("kill", "stop"):
            check_death(trace.live(Plan(directory=str(trace.state), interval=0, end=end), ()))
            ends[end] = trace.counts()
        for run in spread(RUNS):
            heals = run.times < FOR_GOOD
            plan = Plan(directory=str(trace.state), interval=run.interval, end=run.end, heals=heals)
            options = injections(run, ends[run.end])
            life = trace.live(plan, options)
            try:
                check_death(life)
                struck[run.call] += trace.injected(run.call) > 0
                life.check()
                life.check_what_is_left()
            except BaseException as problem:
                problem.add_note(f"{run}: {options}")
                raise
    sys.stdout.write(f"{RUNS} of {ALL} runs under strace; struck in {sum(struck.values())} of them: {dict(struck)}\n")
    assert sum(struck.values()) == RUNS, struck
    assert min(struck.values()) >= POSITIONS or RUNS < ALL


@pytest.mark.timeout(900)
def test_killed_at_every_call(tmp_path: Path) -> None:
    """SIGKILL on entering each call that touches the state's files: whatever was acknowledged is there."""
    killed: Counter[str] = Counter()
    with in_memory(tmp_path) as directory:
        trace = tracer(directory)
        for call in CALLS:
            for name in KERNEL.get(call, (call,)):
                for number in count(1):
                    plan = Plan(directory=str(trace.state), interval=0, end="stop")
                    life = trace.live(plan, [f"inject={name}:signal=KILL:when={number}"])
                    life.check()
                    life.check_what_is_left()
                    if life.status == 0:
                        break
                    assert life.status in {-9, 137}, life.status
                    killed[name] += 1
    sys.stdout.write(
        f"killed by strace at {sum(killed.values())} points: {dict(killed)}; nothing acknowledged was lost\n"
    )
    assert all(killed[name] for call in CALLS for name in KERNEL.get(call, (call,))), killed
