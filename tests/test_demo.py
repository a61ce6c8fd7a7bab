"""The demo in a short form: real servers, with and without a terminal, interrupted, and with a state that loses lines."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import itertools
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import act_kill
import act_workers
import demo
import pytest
from act_workers import Row
from crowd import numbered
from lines import Line, counts_of, key_of, lines
from screen import Bars
from servers import DemoError, Server

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "docs" / "examples" / "demo"
SHORT = ["--lines", "200", "--rate", "1000", "--kills", "1"]
COLUMNS = 60
ROW = re.compile(r"[│|] (\S+) +[│|] +([\d,]+) [│|] +([\d,]+) [│|] +([\d,]+) [│|]")
ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
FIRST = "Two FastAPI servers"
SECOND = "Four workers of one FastAPI server"


def environment(directory: Path, **more: str) -> dict[str, str]:
    """Return an environment whose temporary directory is that of the test, without settings for colours."""
    kept = {name: value for name, value in os.environ.items() if name not in {"FORCE_COLOR", "COLUMNS", "NO_COLOR"}}
    return {**kept, "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1", "TERM": "xterm", **more}


def rows(printed: str) -> dict[str, tuple[int, ...]]:
    """Return the table: acknowledged, found and lost for each server."""
    return {name: tuple(int(number.replace(",", "")) for number in numbers) for name, *numbers in ROW.findall(printed)}


def left_behind(directory: Path) -> list[str]:
    """Return the commands of the processes that still have the temporary directory of the test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={directory}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended, or it belongs to another user
            continue
    return found


def check_table(printed: str, total: int) -> None:
    table = rows(printed)
    assert list(table) == ["lab_state", "json.dump"]
    for acknowledged, found, lost in table.values():
        assert total // 2 <= acknowledged < total
        assert lost == acknowledged - found
    assert table["lab_state"][2] == 0
    kept = re.search(r"lab_state\s+has\s+(\d+),\s+json\.dump\s+has\s+(\d+)\.", printed)
    assert kept is not None
    assert [int(number) for number in kept.groups()] == [total, total - table["json.dump"][2]]


def owners_in(printed: str) -> list[list[str]]:
    """Return the rows of the table of the second act: takeovers, owner, rate and gap."""
    return re.findall(r"│ +(\d+) │ +(\d+) │ +([\d,]+) │ +([\d,]+) ms │", printed)


def check_owners(printed: str, kills: int) -> None:
    """Check the table and the last sentence of the second act."""
    found = owners_in(printed[printed.rindex("longest gap ┃") :])
    assert [takeovers for takeovers, *_ in found] == [str(number) for number in range(kills + 1)]
    assert len({owner for _, owner, *_ in found}) == kills + 1
    assert re.search(r"all\s+\d+\s+counters\s+of\s+words\s+are\s+exact", printed)


def command_in(printed: str) -> str:
    """Return the command that the demo prints."""
    return next(line for line in printed.splitlines() if "json.tool" in line)


def check_command(printed: str, directory: Path) -> None:
    """Run the command, and compare its output with the file."""
    shown = subprocess.run(command_in(printed), shell=True, check=True, capture_output=True, text=True, cwd="/")
    (file,) = directory.glob("lab_state-demo-*/lab_state/words.json")
    state = json.loads(file.read_bytes())
    words = {key: count for key, count in state.items() if key.startswith("words/")}
    assert words
    assert json.loads("{" + shown.stdout.strip().rstrip(",") + "}") == words


def test_the_table_of_the_readme_is_that_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's table is what the demo prints for its numbers."""
    block = re.search(r"```text\n(lines at the SIGKILL\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    outcomes = [
        act_kill.Outcome(name, Path("words.json"), acknowledged, found, in_the_end=2400 - lost)
        for name, (acknowledged, found, lost) in rows(block[1]).items()
    ]
    act_kill.report(outcomes, 2400, Bars([], 2400))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    expected = block[1].splitlines()
    assert printed[: len(expected)] == expected


def test_the_owners_of_the_readme_are_those_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's table of the second act is what the demo prints for its numbers."""
    block = re.search(r"```text\n(four workers on one state\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    rows_of_the_page = [
        Row(int(takeovers), int(owner), float(rate), float(gap) / 1e3)
        for takeovers, owner, rate, gap in owners_in(block[1])
    ]
    assert len(rows_of_the_page) == demo.KILLS + 1
    Bars([], 0).show(act_workers.table_of(rows_of_the_page))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed == block[1].splitlines()


def test_the_pages_have_enough_lines() -> None:
    """The pages have as many lines as the demo sends, and each line has a key of its own."""
    sent = lines()
    assert len({key_of(line) for line in sent}) == len(sent) >= demo.LINES


def test_demo_without_a_terminal(tmp_path: Path) -> None:
    """The demo prints plain lines and a true table, whatever port, workers and proxy the environment asks for.

    The command that it prints shows the file. No process is left.
    """
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        more = {"UVICORN_PORT": port, "WEB_CONCURRENCY": "4", "HTTP_PROXY": f"http://127.0.0.1:{port}"}
        ran = subprocess.run(
            [sys.executable, DEMO, *SHORT],
            env=environment(tmp_path, **more),
            capture_output=True,
            text=True,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    for name in ("lab_state", "json.dump"):
        quarters = re.findall(rf"{name}: (\d+) of 200 lines acknowledged", ran.stdout)
        assert quarters == ["50", "100", "150", "200"]
    check_table(ran.stdout, 200)
    check_command(ran.stdout, tmp_path)
    for number in range(2):
        assert re.search(rf"takeovers {number}, owner \d+, [\d,]+ requests a second, longest gap [\d,]+ ms", ran.stdout)
    check_owners(ran.stdout, 1)
    assert left_behind(tmp_path) == []


@contextmanager
def in_terminal(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run the demo in a terminal of 60 columns. Yield the process, and the descriptor of the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    # setsid makes the terminal the controlling one, so that Ctrl-C is a signal.
    command = ["setsid", "--ctty", "--wait", sys.executable, str(DEMO), *SHORT]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(directory))
    os.close(theirs)
    try:
        yield process, ours
    finally:
        os.close(ours)
        process.wait(60)


def read_until(descriptor: int, text: str | None) -> str:
    """Return the output of a terminal until a text is in it, or all of it for `None`."""
    found = b""
    while text is None or text.encode() not in found:
        try:
            found += os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            assert text is None, found.decode()
            break
    return found.decode()


def test_demo_in_60_columns(tmp_path: Path) -> None:
    """In a terminal of 60 columns both bars fill, the table of the owners changes, and no line is wider.

    Only the command is wider, so that it can be copied.
    """
    with in_terminal(tmp_path) as (process, terminal):
        drawn = read_until(terminal, None)
        assert process.wait(60) == 0
    printed = ESCAPE.sub("", drawn).replace("\r\n", "\n").replace("\r", "\n")
    for name in ("lab_state", "json.dump"):
        last = re.findall(rf"{name} (\S+) (\d+)/200 +(\d+)%", printed)[-1]
        assert last[1:] == ("200", "100")
    command = command_in(printed)
    assert [
        line for line in printed.splitlines() if len(line) > COLUMNS and line != command and tmp_path.name not in line
    ] == []
    check_table(printed, 200)
    check_command(printed, tmp_path)
    check_owners(printed, 1)
    assert left_behind(tmp_path) == []


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C ends the demo with 130. The cursor is shown again, and no process and no file is left."""
    with in_terminal(tmp_path) as (process, terminal):
        drawn = read_until(terminal, "SIGKILL after")
        os.write(terminal, b"\x03")
        drawn += read_until(terminal, None)
        assert process.wait(60) == 130, drawn
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")
    check_interrupted(drawn, tmp_path)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (FIRST, signal.SIGINT),
        ("lab_state: 50 of", signal.SIGINT),
        ("json.dump: SIGKILL", signal.SIGINT),
        ("lab_state: started again", signal.SIGINT),
        (FIRST, signal.SIGTERM),
        (FIRST, signal.SIGHUP),
        (SECOND, signal.SIGINT),
        ("takeovers 0", signal.SIGINT),
    ],
)
def test_interrupted(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C at any moment ends the demo with 130 and a sentence. No process and no file is left.

    SIGTERM, and SIGHUP when a terminal is closed, do the same.
    """
    act = "2" if moment in {SECOND, "takeovers 0"} else "1"
    with started([str(DEMO), *SHORT, "--act", act], tmp_path) as (process, output):
        printed = until(output, moment)
        process.send_signal(number)
        printed += output.read()
        assert process.wait(60) == 128 + number
    check_interrupted(printed, tmp_path)


def test_its_reader_ends(tmp_path: Path) -> None:
    """If the reader of the output ends, as `head` does, the demo says so and ends with 1. No process is left."""
    with subprocess.Popen(
        [sys.executable, DEMO, *SHORT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        until(process.stdout, "json.dump: 50 of")
        process.stdout.close()
        said = process.stderr.read().splitlines()
        assert process.wait(60) == 1
    assert said[0] == "The demo failed: the reader of its output has ended."
    assert said[1].startswith("The files and logs are in ")
    assert len(said) == 2
    assert left_behind(tmp_path) == []


def test_interrupted_while_it_is_imported(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the imports ends the demo without a traceback."""
    with started(["-X", "importtime", str(DEMO)], tmp_path) as (process, output):
        printed = until(output, "| httpx2\n", "|   httpx2\n", "|     httpx2\n")
        process.send_signal(signal.SIGINT)
        printed += output.read()
        assert process.wait(60) == -signal.SIGINT
    assert "Traceback" not in printed
    assert FIRST not in printed
    assert left_behind(tmp_path) == []


@contextmanager
def started(arguments: list[str], directory: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Run Python with arguments. Yield the process, and all that it prints."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(directory),
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout


def until(output: IO[str], *texts: str) -> str:
    """Return the lines up to the first one with one of the texts."""
    found = ""
    for line in output:
        found += line
        if any(text in line for text in texts):
            return found
    raise AssertionError(found)


def check_interrupted(printed: str, directory: Path) -> None:
    assert "Interrupted. The servers have ended, and their files are removed." in printed
    assert "Traceback" not in printed
    assert left_behind(directory) == []
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lines", "99"], "--lines 99: give a number from 100 to "),
        (["--lines", "1000000"], "--lines 1000000: give a number from 100 to "),
        (["--kills", "0"], "--kills 0: give a number from 1 to 1,000"),
        (["--act", "3"], "argument --act: invalid choice:"),
        (["--rate", "0"], "--rate 0.0: give a number from 1 to 1,000,000"),
        (["--rate", "nan"], "--rate nan: give a number from 1 to 1,000,000"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    """A number out of bounds ends the demo with 2 and a message, before it starts a server."""
    ran = subprocess.run(
        [sys.executable, DEMO, *arguments], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert message in ran.stderr
    assert list(tmp_path.iterdir()) == []


def options(*arguments: str) -> argparse.Namespace:
    """Return the options of the demo for arguments."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["demo", *arguments])
        return demo.parsed()


def test_demo_that_loses_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the server called lab_state loses lines, the table shows them and the demo fails with 1 and a message."""
    (tmp_path / "forgetful.py").write_text(
        "import asyncio, words_json\n"
        "async def never():\n"
        "    await asyncio.Event().wait()\n"
        "words_json.save_each_second = never\n"
        "app = words_json.app\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(act_kill.APPLICATIONS, act_kill.OURS, "forgetful")
    assert asyncio.run(demo.run(options(*SHORT, "--act", "1"))) == 1
    printed = capsys.readouterr()
    acknowledged, found, lost = rows(printed.out)["lab_state"]
    assert (found, lost) == (0, acknowledged)
    assert f"The demo failed: lab_state lost {lost} lines." in printed.err


def test_a_server_whose_workers_all_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If no worker is left, the second act does not wait without end. It fails with 1 and the end of the log."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(act_workers, "PATIENCE", 0.5)
    monkeypatch.setattr(act_workers, "BETWEEN", 0.1)
    monkeypatch.setattr(Server, "kill_worker", lambda server, _: server.kill())
    assert asyncio.run(demo.run(options("--act", "2"))) == 1
    assert "The demo failed: the server of workers does not answer; its log ends with:" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_lines_and_counters_are_compared() -> None:
    """A line and a counter that are missing, that have another value, or that should not be there, are errors."""
    sent: dict[str, Line] = {key_of(line): line for line in lines()[:50]}
    counts = counts_of(sent.values())
    right = {**sent, **counts}
    assert act_workers.check(sent, right) == len(counts)
    for key, more, message in [
        (next(iter(sent)), "line/x/1", "1 of 50 lines are wrong"),
        (next(iter(counts)), "words/x", f"1 of {len(counts)} counters are wrong"),
    ]:
        missing = {known: value for known, value in right.items() if known != key}
        for wrong in (missing, {**right, key: 0}, {**right, more: 1}):
            with pytest.raises(DemoError, match=message):
                act_workers.check(sent, wrong)


def test_no_two_lines_have_the_same_key() -> None:
    """The second act may send the lines again and again. Then they have other numbers."""
    given = lines()[:50]
    sent = list(itertools.islice(numbered(given), 150))
    assert len({key_of(line) for line in sent}) == 150
    assert [line["text"] for line in sent] == [line["text"] for line in given] * 3


async def test_servers_take_free_ports(tmp_path: Path) -> None:
    """Servers at the same time serve on ports of their own, also after a restart of one. One that cannot start says why."""
    one, other = Server("words_json", tmp_path / "one"), Server("words_json", tmp_path / "other")
    try:
        first, second = await asyncio.gather(one.start(), other.start())
        one.kill()
        assert second not in {first, await one.start()}
        with pytest.raises(DemoError, match=f"has no worker with pid {os.getpid()}"):
            one.kill_worker(os.getpid())
        with pytest.raises(DemoError, match=r'(?s)missing did not start; its log ends with:.*module "missing"'):
            await Server("missing", tmp_path / "missing").start()
    finally:
        one.kill()
        other.kill()
