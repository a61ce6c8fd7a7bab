"""The command in processes of its own, as a user runs it: signals at any time, SIGKILL at each call, streams and locales.

`nox -s command` runs this file.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from each_subcommand import CASES, NEW, check_again, check_whole, editor, files, fresh, made

from lab_state import FileStorage, read_state
from lab_state.cli._app import cli

MOST = 300
"""More calls than any of the subcommands makes."""

NAMES = [name for name, case in CASES.items() if case.writes]

LAB_STATE = [sys.executable, "-m", "lab_state"]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale with ASCII alone. By itself, Python uses UTF-8 in this locale."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all that the subcommands need. Each test copies it."""
    return asyncio.run(made(tmp_path_factory.mktemp("real")))


def shell(
    line: str, place: Path, env: dict[str, str] | None = None, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of sh. In it, `lab-state` is the command."""
    program = place.parent / "lab-state"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(LAB_STATE)} "$@"\n')
    program.chmod(0o755)
    more = {"PATH": f"{place.parent}:{os.environ['PATH']}", **editor(place), **(env or {})}
    return subprocess.run(
        ["sh", "-c", line], cwd=place, input=given, capture_output=True, check=False, timeout=100,
        env={**os.environ, **more},
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_an_interrupt_at_any_time(template: Path, tmp_path: Path, name: str) -> None:
    """Ctrl-C at any time ends a process with code 130. While Python imports the package, it is the interpreter that ends."""
    case = CASES[name]
    place = await asyncio.to_thread(fresh, template, tmp_path / "place")
    env = {**os.environ, **editor(place), "PYTHONFAULTHANDLER": "1"}
    began = time.perf_counter()
    await asyncio.to_thread(
        subprocess.run,
        [*LAB_STATE, *case.arguments],
        cwd=place,
        input=case.given,
        env=env,
        check=False,
        capture_output=True,
    )
    length = time.perf_counter() - began
    codes = []
    for number in range(25):
        await asyncio.to_thread(fresh, template, place)
        process = await asyncio.to_thread(
            subprocess.Popen, [*LAB_STATE, *case.arguments], cwd=place, env=env, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if case.given:
            assert process.stdin is not None
            process.stdin.write(case.given)
        await asyncio.sleep(length * number / 24)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.to_thread(process.communicate)
        code = process.returncode
        codes.append(code)
        if code == -signal.SIGSEGV:
            # An interrupt while msgspec 0.23 makes a decoder may crash the interpreter. Decoders are made when a module is imported.
            assert err.split(b"\n")[3].endswith(b" in <module>"), (name, err)
        elif b"Traceback" not in err:
            assert code in {130, -signal.SIGINT, case.code}, (name, code, err)
        else:  # the interpreter had not reached the command
            assert code in {130, -signal.SIGINT, 1}, (name, code, err)
            assert b"cli/__init__.py" not in err or b", in main\n" not in err, (name, err)
        if case.writes:
            await check_whole(name, place, is_done=True if code == 0 else None)
    sys.stdout.write(f"{name}: {codes}\n")


@pytest.mark.parametrize("name", CASES)
async def test_streams_of_a_process(template: Path, tmp_path: Path, name: str) -> None:
    """A closed or full stream ends a process with its code, and the interpreter adds no word at its end."""
    case = CASES[name]
    line = f"lab-state {shlex.join(case.arguments)}"
    place = tmp_path / "place"
    for more, code in (
        (">&-", 141),
        ("> /dev/full", 5),
        ("2>&-", case.code),
        ("2> /dev/full", case.code),
        (">&- 2>&-", 141),
        ("<&-", 2 if name == "load" else case.code),
        ("< /dev/null", 2 if name == "load" else case.code),
    ):
        await asyncio.to_thread(fresh, template, place)
        done = await asyncio.to_thread(shell, f"{line} {more}", place, given=case.given)
        assert done.returncode == code, (name, more, done)
        assert b"Traceback" not in done.stderr, (name, more, done)
        assert b"Exception ignored" not in done.stderr, (name, more, done)
        if case.writes:
            await check_whole(name, place, is_done=True if code == 0 else None)
    await asyncio.to_thread(fresh, template, place)
    done = await asyncio.to_thread(shell, f"exec 3>&1; ({line}; echo $? >&3) | true", place, given=case.given)
    assert int(done.stdout) in {141, case.code}
    assert done.stderr == b""


@pytest.mark.parametrize("env", [C_LOCALE, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}])
async def test_locales(template: Path, tmp_path: Path, env: dict[str, str]) -> None:
    """In a locale without UTF-8, each subcommand and each help has the same exit code."""
    place = tmp_path / "place"
    for name, case in CASES.items():
        await asyncio.to_thread(fresh, template, place)
        done = await asyncio.to_thread(shell, f"lab-state {shlex.join(case.arguments)}", place, env, case.given)
        # An argument that this locale does not have is no key. It is never taken for another one.
        assert done.returncode == (1 if name == "get" and env is C_LOCALE else case.code), (name, done)
        if case.writes:
            await check_whole(name, place, is_done=True)
    for name in cli.commands:
        done = await asyncio.to_thread(shell, f"lab-state {name} --help", place, env)
        assert (done.returncode, done.stderr) == (0, b""), (name, done)


async def test_arguments_that_are_not_utf_8(template: Path, tmp_path: Path) -> None:
    """A key that is no UTF-8 is a usage error, or is not found. A path may have such bytes."""
    place = await asyncio.to_thread(fresh, template, tmp_path / "place")
    before = files(place / "state")
    for env in ({}, C_LOCALE):
        for line, code in (
            (r"lab-state get state/shop $(printf '\377')", 1),
            (r"lab-state set state/shop $(printf '\377') 1", 2),
            (r"""lab-state set state/shop a "$(printf '"\377"')" """, 2),
            (r"lab-state delete state/shop $(printf '\377')", 2),
            (r"lab-state keys state/shop $(printf '\377')", 0),
            (r"lab-state diff state/shop $(printf 'x\377/shop')", 1),
            (r"lab-state get state/$(printf '\377') a", 2),
        ):
            done = await asyncio.to_thread(shell, line, place, env)
            assert (done.returncode, b"Traceback" in done.stderr) == (code, False), (line, env, done)
        for more in ("", "--json"):
            done = await asyncio.to_thread(
                shell, rf"lab-state backup {more} state/shop $(printf 'x\377.json')", place, env
            )
            assert (done.returncode, done.stderr) == (0, b""), (env, done)
            assert b"\\udcff.json" in done.stdout
    assert files(place / "state") == before
    assert await check_backup(place)


async def check_backup(place: Path) -> bool:
    (place / os.fsdecode(b"x\xff.json")).rename(place / "x.json")
    return await (await read_state("x", FileStorage(place))).get_all() == NEW


# The kernel's own calls

PROGRAM = """
import itertools, sys
from lab_state.storage import _fs
numbers = itertools.count()
_fs.temporary = lambda path: f"{path}.{next(numbers):08x}.tmp"  # strace is told each name before
from lab_state.cli import main
main()
"""

CALLS = [
    "openat",
    "mkdir",
    "flock",
    "write",
    "pwrite64",
    "ftruncate",
    "fsync",
    "fdatasync",
    "rename",
    "linkat",
    "link",
    "unlink",
    "rmdir",
    "fchmod",
    "fchown",
    "chmod",
]
NEEDED = {"openat", "write", "fsync", "rename"}
FILES = (
    "",
    ".json",
    ".journal",
    ".lock",
    ".history",
    *(f".{kind}.{n:08x}.tmp" for kind in ("json", "journal") for n in range(8)),
)


def traced(name: str, place: Path, options: Sequence[str]) -> int:
    """Run a subcommand under strace, which sees only the calls for its files. Return its exit code."""
    case = CASES[name]
    names = [f"{directory}/{state}{file}" for directory, state in (
        ("state", "shop"), ("state", "again"), ("bad", "shop"), ("two", "copy"), (".", "backup"),
    ) for file in FILES]  # fmt: skip
    paths = [option for file in ("state", "bad", "two", *names) for option in ("-P", str(place / file))]
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", str(place / "trace"), "-e", f"trace={','.join(CALLS)}", *paths, *options,
         sys.executable, "-c", PROGRAM, *case.arguments],
        cwd=place, input=case.given, capture_output=True, check=False, env={**os.environ, **editor(place)},
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", NAMES)
async def test_killed_by_strace_at_each_call(template: Path, tmp_path: Path, name: str) -> None:
    """The same with the calls that the kernel sees, in a process of its own."""
    if shutil.which("strace") is None:
        pytest.fail("strace is not installed: apt-get install strace")
    killed: Counter[str] = Counter()
    for call in CALLS:
        for number in range(1, MOST):
            place = await asyncio.to_thread(fresh, template, tmp_path / "place")
            code = await asyncio.to_thread(traced, name, place, ["-e", f"inject={call}:signal=KILL:when={number}"])
            assert code in {0, -9, 137}, (name, call, number, code)
            await check_whole(name, place, is_done=True if code == 0 else None)
            if code == 0:
                break
            killed[call] += 1
            await check_again(name, place)
    sys.stdout.write(f"{name}: killed at {sum(killed.values())} calls: {dict(killed)}\n")
    assert set(killed) >= NEEDED, killed
