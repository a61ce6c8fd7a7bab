"""Bad input and bad surroundings: what each subcommand does on a closed pipe, a full disk, a narrow terminal, and so on."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import signal
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Done, Under, command, start, under
from commanded import on_terminal
from each_subcommand import (
    CASES,
    CHOSEN,
    CONTROL,
    IN_FULL,
    WRITING,
    Case,
    check_whole,
    editor,
    files,
    fresh,
    made,
    run,
)

from lab_state import FileStorage, Manager
from lab_state._codec import encode_snapshot
from lab_state.cli import _app, main
from lab_state.cli._app import cli
from lab_state.cli._exits import Stop
from lab_state.cli._output import Output
from lab_state.cli._run import asynchronous

ANOTHER_USER = 65534
MOST = 300
"""More calls than any of the subcommands makes."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all that the subcommands need. Each test copies it."""
    return asyncio.run(made(tmp_path_factory.mktemp("each")))


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "place")


def chosen() -> list[tuple[str, Case]]:
    """Return the subcommands of this run of the tests."""
    return [(name, CASES[name]) for name in CHOSEN]


def is_one_line(done: Done) -> bool:
    """Return whether the message is one line with the reason."""
    return message(done).startswith("lab-state: ") and message(done).count("\n") == 1


def message(done: Done) -> str:
    """Return what a run wrote to stderr, without the line that says where the text of an edit is kept."""
    return re.sub(r"lab-state: your text is kept in .*\n", "", done.err)


def test_the_table_is_complete() -> None:
    """Each subcommand is in the table of these tests."""
    assert {case.arguments[0] for case in CASES.values()} == set(cli.commands) - {"watch", "inspect"}


async def test_a_path_that_is_not_utf_8(place: Path) -> None:
    """The JSON of a backup has an escape for each byte of its path that is not UTF-8."""
    done = await asyncio.to_thread(command, "backup", "--json", "state/shop", os.fsdecode(b"x\xff.json"), cwd=place)
    assert (done.code, done.json["path"]) == (0, "x\\udcff.json")


async def test_each_works(template: Path, tmp_path: Path) -> None:
    """Without any trouble, each subcommand has its exit code, and those that write have done their work."""
    for name, case in chosen():
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(run, name, place)
        assert (done.code, "Traceback" in done.err) == (case.code, False), (name, done)
        if case.writes:
            await check_whole(name, place, is_done=True)


async def test_a_directory_that_is_missing(place: Path) -> None:
    """For each subcommand it is code 1, a path through a file is code 2, and the message is one line. Nothing is made."""
    before = await asyncio.to_thread(files, place)
    for directory, code, reason in (
        ("nowhere", 1, r"there is no (directory|state at) .*nowhere.*: check"),
        ("backup.json", 2, "a part of the path is a file"),
    ):
        for _, case in chosen():
            paths = {"state": directory, case.state: f"{directory}/shop"}
            arguments = [paths.get(argument, argument) for argument in case.arguments]
            done = await asyncio.to_thread(command, *arguments, cwd=place, given=case.given, env=editor(place))
            assert (done.code, done.out, is_one_line(done)) == (code, "", True), (arguments, done)
            assert re.search(reason, done.err), (arguments, done)
    assert await asyncio.to_thread(files, place) == before


# The streams


@pytest.mark.parametrize("conditions", [Under(stdout=""), Under(closed=[1])], ids=["pipe", "descriptor"])
async def test_a_closed_stdout_is_quiet(template: Path, tmp_path: Path, conditions: Under) -> None:
    """If the reader of the pipe has ended, or stdout is closed, the exit code is 141, without a word. A write is done, or not."""
    for name, case in chosen():
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(run, name, place, under(**conditions))
        assert (done.code, done.err) == (141, ""), (name, done)
        if case.writes:
            await check_whole(name, place)


async def test_a_full_device_as_stdout(template: Path, tmp_path: Path) -> None:
    """If stdout cannot be written, the exit code is 5, and the message has the reason."""
    for name, case in chosen():
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(run, name, place, under(stdout="/dev/full"))
        assert (done.code, done.err.splitlines()[-1]) == (
            5,
            "lab-state: stdout cannot be written: No space left on device",
        )
        if case.writes:
            await check_whole(name, place)


async def test_closed_stdin_and_stderr(template: Path, tmp_path: Path) -> None:
    """A closed stdin is an empty input. If stderr is closed, or its reader has ended, the messages are dropped, and the exit code stays."""
    for name, case in chosen():
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(run, name, place, under(closed=[0, 2]))
        assert (done.code, done.err) == (2 if name == "load" else case.code, ""), (name, done)
    for arguments, code in ((("get", "state/shop", "none"), 1), (("get",), 2), (("--help",), 0)):
        for conditions in (Under(closed=[2]), Under(stderr="/dev/full")):
            done = await asyncio.to_thread(command, *arguments, cwd=place, env=under(**conditions))
            assert (done.code, done.err) == (code, ""), (arguments, conditions, done)


async def test_a_help_that_cannot_be_written(place: Path) -> None:
    """The help, too, ends with code 5 on a device without room, and without a word if stdout is closed."""
    done = await asyncio.to_thread(command, "--help", cwd=place, env=under(stdout="/dev/full"))
    assert (done.code, done.err) == (5, "lab-state: stdout cannot be written: No space left on device\n")
    done = await asyncio.to_thread(command, "get", "--help", cwd=place, env=under(stdout=""))
    assert done.err == ""


# Ctrl-C


async def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """Ctrl-C ends a command at once that waits for the reader of its output."""
    async with Manager("shop", FileStorage(tmp_path / "state")) as state:
        await state.set("long", "x" * 300_000)
    run = await asyncio.to_thread(start, "get", "state/shop", "long", cwd=tmp_path)
    waiting = bytearray(4)
    while int.from_bytes(waiting, sys.byteorder) < 65536:  # a pipe holds no more
        await asyncio.sleep(0.01)
        fcntl.ioctl(run.stdout.fileno(), termios.FIONREAD, waiting)
    run.kill(signal.SIGINT)
    while Path(f"/proc/{run.pid}").exists():  # noqa: ASYNC110 -- another process ends
        await asyncio.sleep(0.01)
    done = await asyncio.to_thread(run.wait)
    assert (done.code, done.err) == (130, "")


async def test_a_process_that_ignores_ctrl_c(place: Path) -> None:
    """A job in the background, which ignores Ctrl-C from its beginning, goes on to ignore it."""
    for name in ("get", "load"):
        env = under(at=2, signal=signal.SIGINT, ignores=signal.SIGINT)
        assert (await asyncio.to_thread(run, name, place, env)).code == 0


def test_an_interrupt_outside_of_a_subcommand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right before or after a subcommand is code 130, too."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_app, "run", interrupt)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_an_interrupt_during_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the command is imported, the kernel handles Ctrl-C. Afterwards Ctrl-C is a `KeyboardInterrupt`, or ignored, as before."""
    seen: list[object] = []

    def find(_name: str) -> object:
        seen.append(signal.getsignal(signal.SIGINT))
        return object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(_app, "run", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    try:
        for usual, imports in ((signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)):
            signal.signal(signal.SIGINT, usual)
            main()
            assert seen == [imports, imports, usual]
            seen.clear()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", CHOSEN)
async def test_an_interrupt_at_each_call(template: Path, tmp_path: Path, name: str) -> None:
    """Ctrl-C before any call ends the subcommand without a word and with code 130, or it was too late. Nothing half done looks whole."""
    case, codes = CASES[name], list[int]()
    for number in range(1, MOST) if IN_FULL else (2, 9):
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(run, name, place, under(at=number, signal=signal.SIGINT))
        assert done.code in {130, case.code}, (name, number, done)
        assert done.code == case.code or message(done) == "", (name, number, done)
        if case.writes:
            await check_whole(name, place, is_done=True if done.code != 130 else None)
        codes.append(done.code)
        if codes[-20:].count(case.code) == 20:
            break  # there are no more calls
    assert 130 in codes
    assert case.code in codes or not IN_FULL


# The log


def test_the_log_of_the_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning is a line on stderr. An error is one as well, if the subcommand succeeds all the same. Otherwise its message is enough."""
    monkeypatch.setattr(Output, "flush", lambda _: None)

    async def work(_: Output, fails: bool) -> None:  # noqa: FBT001 -- one value
        logging.getLogger("lab_state").warning("odd\x1b")
        logging.getLogger("lab_state").error("no history")
        if fails:
            raise ValueError("wrong")

    asynchronous(work, writes=True)(False)
    assert capsys.readouterr().err == "lab-state: odd\\x1b\nlab-state: no history\n"
    with pytest.raises(Stop, match="wrong"):
        asynchronous(work, writes=True)(True)
    assert capsys.readouterr().err == "lab-state: odd\\x1b\n"


# The disk


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_no_permission(template: Path, tmp_path: Path) -> None:
    """Without the permission to read, the exit code is 5, and one line says which file. Nothing is changed."""
    place = await asyncio.to_thread(fresh, template, tmp_path / "place")
    for directory in list(place.parents)[:4]:  # up to the directory for all temporary files
        directory.chmod(directory.stat().st_mode | 0o11)
    place.chmod(0o777)
    before = files(place)
    for name, case in chosen():
        done = await asyncio.to_thread(run, name, place, under(user=ANOTHER_USER))
        assert done.code == 5, (name, done)
        assert is_one_line(done) or name == "doctor", (name, done)
        assert "ermission" in done.err + done.out, (name, case, done)
    assert files(place) == before


async def test_a_read_only_file_system(template: Path, tmp_path: Path) -> None:
    """On a read-only file system, reading works as usual. A write ends with code 5 and one line, and changes nothing."""
    for name, case in chosen():
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        usual = await asyncio.to_thread(run, name, place)
        await asyncio.to_thread(fresh, template, tmp_path / "place")
        before = files(place)
        done = await asyncio.to_thread(run, name, place, under(read_only=str(place)))
        if case.writes:
            assert (done.code, done.out) == (5, ""), (name, done)
            assert is_one_line(done), (name, done)
            assert "Read-only file system" in done.err, (name, done)
        elif name not in {"doctor", "ls"}:  # these print the free room, and the age
            assert (done.code, done.out, done.err) == (usual.code, usual.out, usual.err)
        assert files(place) == before, name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_the_permission_to_read_alone(template: Path, tmp_path: Path) -> None:
    """With the permission to read alone, reading works, and a write ends with code 5, one line, and nothing changed."""
    place = await asyncio.to_thread(fresh, template, tmp_path / "place")
    for directory in list(place.parents)[:4]:  # up to the directory for all temporary files
        directory.chmod(directory.stat().st_mode | 0o11)
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() or path.name == "editor" else 0o444)
    before = files(place)
    for name, case in chosen():
        done = await asyncio.to_thread(run, name, place, under(user=ANOTHER_USER))
        assert done.code == (5 if case.writes else case.code), (name, done)
        if case.writes:
            assert done.out == "", (name, done)
            assert is_one_line(done), (name, done)
            assert "Permission denied" in done.err
    assert files(place) == before


@pytest.mark.parametrize("name", WRITING)
async def test_no_room(template: Path, tmp_path: Path, name: str) -> None:
    """A disk that is full at any write ends a write with code 5 and one line, or the rest was not needed.

    Nothing half done looks whole. With room again, the same command works.
    """
    case, failed = CASES[name], 0
    for first in range(1, MOST if IN_FULL else 2):
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        fault: dict[str, str | int] = {"call": "write", "error": "ENOSPC", "first": first}
        done = await asyncio.to_thread(run, name, place, under(faults=[fault]))
        assert done.code in {5, 0}, (name, first, done)
        assert done.code == 0 or (done.out == "" and is_one_line(done) and "No space left" in done.err), (
            name,
            first,
            done,
        )
        await check_whole(name, place, is_done=True if done.code == 0 else None)
        if done.code == 0:
            break
        again = await asyncio.to_thread(run, name, place)
        assert again.code in {0, case.code}, (name, first, again)
        await check_whole(name, place, is_done=True)
        failed += 1
    assert failed


@pytest.mark.parametrize("name", WRITING)
async def test_a_limit_on_the_size_of_files(template: Path, tmp_path: Path, name: str) -> None:
    """A write that ends in the middle of a file is not taken for a whole one."""
    codes = set()
    for limit in range(1, 1500, 25) if IN_FULL else (100, 5000):
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(run, name, place, under(most_bytes=limit))
        assert done.code in {5, 0}, (name, limit, done)
        await check_whole(name, place, is_done=True if done.code == 0 else None)
        codes.add(done.code)
    assert codes == {0, 5}


# The terminal


async def test_a_narrow_terminal_without_colour(template: Path, tmp_path: Path) -> None:
    """On a terminal of 40 columns, each subcommand has the same exit code as elsewhere. No key controls the terminal, and no cell is cut off."""
    for name, case in chosen():
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        done = await asyncio.to_thread(
            on_terminal, *case.arguments, cwd=place, columns=40, env={"NO_COLOR": "1", **editor(place)},
            typed=case.given + b"\n\x04" if case.given else b"",
        )  # fmt: skip
        text = re.sub(r"\x1b\[[01]m|\r\x1b\[K", "", done.out)
        assert done.code == case.code, (name, done)
        assert not set(text) & CONTROL, (name, text)
        assert "…" not in text or name in {"diff", "check"}, (name, text)
        if name in {"ls", "stats"}:
            assert max(map(len, text.split("NAME")[-1].splitlines())) <= 40 or name == "stats"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
async def test_an_encoding_that_is_not_utf_8(template: Path, tmp_path: Path, encoding: str) -> None:
    """With another encoding, each subcommand has the same exit code, and what people read can be shown. So can each help."""
    for name, case in chosen():
        place = await asyncio.to_thread(fresh, template, tmp_path / "place")
        env = {"PYTHONIOENCODING": encoding, "NO_COLOR": "1", **editor(place)}
        typed = case.given + b"\n\x04" if case.given else b""
        done = await asyncio.to_thread(on_terminal, *case.arguments, cwd=place, env=env, typed=typed)
        assert done.code == case.code, (name, done)
        shown = done.bytes.decode(encoding)
        assert "€" not in shown, (name, shown)
        assert not set(re.sub(r"\x1b\[[01]m|\r\x1b\[K", "", shown)) & CONTROL, (name, shown)
        done = await asyncio.to_thread(command, case.arguments[0], "--help", cwd=place, env=env)
        assert done.code == 0


# The state


def journal_alone(directory: Path) -> None:
    (directory / "shop.json").unlink()


def snapshot_alone(directory: Path) -> None:
    """Leave the snapshot of a checkpoint without the journal that followed it."""
    (directory / "shop.journal").unlink()
    (directory / "shop.json").write_bytes(b"".join(encode_snapshot({}, 2, 0, copy_loaded=False, is_followed=True)))


def half_copied(directory: Path) -> None:
    path = directory / "shop.json"
    path.write_bytes(path.read_bytes()[:150])


def of_two_moments(directory: Path) -> None:
    (directory / "shop.json").write_bytes(b"".join(encode_snapshot({}, 2, 0, copy_loaded=False)))


@pytest.mark.parametrize("damage", [journal_alone, snapshot_alone, half_copied, of_two_moments])
async def test_files_that_are_no_whole_state(template: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A journal without its snapshot, a snapshot without its journal and a file that is cut off are code 4. Nothing is changed."""
    place = await asyncio.to_thread(fresh, template, tmp_path / "place")
    damage(place / "state")
    before = files(place)
    for name, _ in chosen():
        if name in {"ls", "tail", "history", "restore", "restore into", "repair"}:
            continue  # they do not need the state in use, or have an own test
        done = await asyncio.to_thread(run, name, place)
        assert done.code == 4, (name, done)
        if name != "doctor":
            assert done.out == "", (name, done)
            assert is_one_line(done), (name, done)
        assert files(place) == before, name
    listed = await asyncio.to_thread(command, "ls", "--nl", "state", cwd=place)
    assert (listed.code, "error" in listed.json) == (0, True)
