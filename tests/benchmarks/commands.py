"""The command `lab-state` on a large state, as ratios within one run: each side is a process of its own.

Times are processor time of the process (user and system), so other processes on the machine count little. Both sides
take turns, and the figure is the median of several rounds. The output goes to /dev/null. Memory is the highest resident memory
of the process, with the interpreter and everything that it imports.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from measure import Results, key_of

from lab_state import Config, FileStorage, Manager
from lab_state.cli._app import cli

NAME = "bench"
SMALL = {"id": 12345, "name": "some user's name", "active": True}
PLAIN = "x" * 50
LARGE = "x" * 1000

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Without this variable. An installed package has its bytecode, so no process of the command compiles it."""

IMPORTS = "import click, lab_state"
START = (
    "import asyncio, os, sys, click\n"
    "from lab_state import FileStorage, Manager\n"
    "async def main():\n"
    f"    state = Manager({NAME!r}, FileStorage(sys.argv[1]))\n"
    "    await state.start()\n"
    "    os._exit(0)\n"
    "asyncio.run(main())\n"
)
MEMORY = (
    "import sys\n"
    "from lab_state.cli import main\n"
    "try: main()\n"
    "finally:\n"
    "    with open('/proc/self/status') as file: sys.stderr.write(file.read())\n"
)
"""It tells its own memory. That of `wait4` may be that of the process that has started it."""

MEASURED = {"get", "dump", "stats"}
"""The subcommands that are measured here."""

AS_A_CALL = {
    "backup": "as `dump`, with the writes of a checkpoint",
    "check": "see the part `migrations`",
    "copy": "two reads and a checkpoint",
    "delete": "a start, a call, a stop",
    "diff": "two reads, and a comparison of bytes",
    "doctor": "a read",
    "edit": "a read, then a start, a call, a stop",
    "history": "see the part `history`",
    "keys": "as `dump`, without values",
    "load": "a start and one change of many keys; see the part `scan`",
    "ls": "a read of each state",
    "migrate": "see the part `migrations`",
    "repair": "a read and a checkpoint; rare",
    "restore": "see the part `history`",
    "set": "a start, a call, a stop",
    "tail": "a read of the journal",
    "verify": "a read, and a check of each value",
    "watch": "a read, then waits",
}
"""The subcommands that are not measured here, each with what it costs."""


def check_complete() -> None:
    """Check that each subcommand is measured, or has the reason why it is not.

    Raises:
        AssertionError: One is missing, or is there and gone.
    """
    assert cli.commands.keys() == MEASURED | AS_A_CALL.keys()
    assert not MEASURED & AS_A_CALL.keys()


def seconds(arguments: Sequence[str]) -> float:
    """Run a process to its end. Return its processor time."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return usage.ru_utime + usage.ru_stime


def memory(arguments: Sequence[str]) -> int:
    """Run the command to its end. Return its highest resident memory, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return next(int(line.split()[1]) * 1024 for line in done.stderr.splitlines() if line.startswith("VmHWM"))


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def lab_state(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lab_state", *arguments]


def ratio(ours: list[str], theirs: list[str], rounds: int) -> tuple[float, float, float]:
    """Return the median ratio, and the medians of both sides, in seconds of processor time."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    mine, its = zip(*pairs, strict=True)
    return statistics.median(a / b for a, b in pairs), statistics.median(mine), statistics.median(its)


def write(directory: str, values: dict[str, object]) -> Path:
    """Write a state as a program leaves it after a clean stop. Return the path of its file."""
    path = Path(directory) / f"{NAME}.json"
    path.parent.mkdir()
    path.write_bytes(msgspec.json.encode(values))

    async def settle() -> None:
        async with Manager(Config(name=NAME, flush_interval=None), FileStorage(directory)) as state:
            await state.set("last", 1)

    asyncio.run(settle())
    return path


def command(results: Results, directory: str, count: int, rounds: int) -> None:
    """Measure the ratios that the command is held to."""

    def row(work: str, ours: list[str], theirs: list[str], most: float, times: int) -> None:
        found, mine, its = ratio(ours, theirs, times)
        reached = f"{found:.2f} ({mine:.2f} s, {its:.2f} s)"
        results.add(work, reached, f"<= {most}", met=found <= most)

    help_, imports = lab_state("--help"), python(IMPORTS)
    seconds(help_)  # it may compile the package
    row("lab-state --help / import click, lab_state (processes)", help_, imports, 1.5, 3 * rounds)
    path = write(f"{directory}/small", {key_of(number): SMALL | {"id": number} for number in range(count)})
    state, start = f"{path.parent}/{NAME}", python(START, str(path.parent))
    row(
        f"get of one key of {count:,} / start() and import click",
        lab_state("get", state, key_of(7)),
        start,
        1.5,
        rounds,
    )
    row(f"stats of {count:,} keys / start() and import click", lab_state("stats", state), start, 3, rounds)
    _faster_than_jq(results, "objects", path, count, rounds)
    _memory(results, "small values", path, "")
    shutil.rmtree(path.parent)
    path = write(f"{directory}/plain", {key_of(number): PLAIN for number in range(count)})
    _faster_than_jq(results, "strings of 50 characters", path, count, rounds)
    shutil.rmtree(path.parent)
    path = write(f"{directory}/large", {key_of(number): LARGE for number in range(count)})
    _memory(results, "values of 1 kB", path, "<= 1.5")


def _faster_than_jq(results: Results, what: str, path: Path, count: int, rounds: int) -> None:
    """Compare a dump with that of `jq`. Both do less for a plain string than for an object, and `jq` saves more."""
    if shutil.which("jq") is None:
        print("jq is not installed, so dump --nl is not compared with it", flush=True)
        return
    dump = lab_state("dump", "--nl", f"{path.parent}/{NAME}")
    found, mine, its = ratio(["jq", "-c", "to_entries[]", str(path)], dump, rounds)
    results.add(
        f"dump --nl of {count:,} {what}: times as fast as jq -c 'to_entries[]'",
        f"{found:.1f} ({its:.2f} s, {mine:.2f} s)",
        ">= 3",
        met=found >= 3,
    )


def _memory(results: Results, what: str, path: Path, bound: str) -> None:
    """Measure the memory of a dump, in sizes of the file."""
    size, used = path.stat().st_size, memory(["dump", "--nl", f"{path.parent}/{NAME}"])
    text = f"{used / size:.2f} ({used / 2**20:.0f} MiB, {size / 2**20:.0f} MiB)"
    results.add(f"memory of dump --nl, {what} / the file", text, bound, met=not bound or used <= 1.5 * size)
