"""The command as a process: its entry point, its terminals, its signals and its pipes."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import Done, command, start
from commanded import on_terminal

from lab_state import FileStorage, Manager


async def filled(directory: Path, **values: object) -> None:
    async with Manager("shop", FileStorage(directory / "state")) as state:
        await state.set_many(values)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a user does, without the server of `command`."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=60
    )


async def test_python_runs_the_package(tmp_path: Path) -> None:
    """`python -m lab_state` is the command. Its version is that of the package."""
    await filled(tmp_path, a=1)
    done = await asyncio.to_thread(python, "-m", "lab_state", "get", "state/shop", "a", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    version = await asyncio.to_thread(command, "--version", cwd=tmp_path)
    assert version.out.startswith("lab-state 0.")


def test_without_the_extra(tmp_path: Path) -> None:
    """Without click or rich, one line says what to install, and the exit code is 2."""
    code = "import sys; sys.modules[{!r}] = None; from lab_state.cli import main; main()"
    for name in ("click", "rich"):
        done = python("-c", code.format(name), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "lab-state: the command needs the extra `cli`: pip install 'lab-state[cli]'\n"


def test_what_the_help_imports(tmp_path: Path) -> None:
    """`lab-state --help` imports neither rich nor the client of S3."""
    code = (
        "import sys; sys.argv = ['lab-state', '--help']\nfrom lab_state.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('rich', 'aiobotocore', 'botocore') if name in sys.modules], file=sys.stderr)"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stderr == "[]\n"
    assert "Exit codes:" in done.stdout


def test_each_subcommand_has_an_example(tmp_path: Path) -> None:
    """The help of each subcommand ends with an example, and its first line is in the list of subcommands."""
    from lab_state.cli._app import cli  # noqa: PLC0415

    assert len(cli.commands) >= 14
    for name in cli.commands:
        done = command(name, "--help", cwd=tmp_path)
        assert done.code == 0
        assert "  Example:\n    " in done.out, name
        assert f" {name}" in done.out.split("Example:")[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_shells_complete_names_of_states(tmp_path: Path, shell: str) -> None:
    """Each shell gets a script, and completes subcommands and the names of states."""
    await filled(tmp_path, a=1)
    script = await asyncio.to_thread(command, cwd=tmp_path, env={"_LAB_STATE_COMPLETE": f"{shell}_source"})
    assert "_LAB_STATE_COMPLETE" in script.out
    words = {"COMP_WORDS": "lab-state get state/s", "COMP_CWORD": "2" if shell != "fish" else "state/s"}
    offered = await asyncio.to_thread(command, cwd=tmp_path, env={"_LAB_STATE_COMPLETE": f"{shell}_complete", **words})
    assert "state/shop" in offered.out
    words = {"COMP_WORDS": "lab-state ver", "COMP_CWORD": "1" if shell != "fish" else "ver"}
    offered = await asyncio.to_thread(command, cwd=tmp_path, env={"_LAB_STATE_COMPLETE": f"{shell}_complete", **words})
    assert "verify" in offered.out


async def test_a_terminal_gets_no_control_character_of_a_key(tmp_path: Path) -> None:
    """Keys and values are escaped on a terminal, in each subcommand that prints them. JSON stays JSON."""
    hostile = "k\x1b[31m\x9b\u202e\x7f"
    await filled(tmp_path, **{hostile: f"v{hostile}", "b": [1]})
    await filled(tmp_path / "two", a=1)
    for arguments in (
        ("get", "state/shop", hostile),
        ("keys", "state/shop"),
        ("keys", "--nl", "state/shop"),
        ("keys", "--tree", "state/shop"),
        ("dump", "state/shop"),
        ("dump", "--nl", "state/shop"),
        ("stats", "state/shop"),
        ("diff", "state/shop", "two/state/shop"),
        ("get", "state/shop", f"no{hostile}"),
    ):
        done = await asyncio.to_thread(on_terminal, *arguments, cwd=tmp_path, env={"NO_COLOR": "1"})
        without = done.out.replace("\x1b[1m", "").replace("\x1b[0m", "")
        assert not set(without) & {"\x1b", "\x9b", "\u202e", "\x7f"}, arguments
        assert done.code == (1 if "diff" in arguments or arguments[-1].startswith("no") else 0)


async def test_a_narrow_terminal_without_colour(tmp_path: Path) -> None:
    """On 40 columns a long key is folded, and no part of it is left out. With `NO_COLOR` there is no colour."""
    key = "a" * 100
    await filled(tmp_path, **{key: 1})
    done = await asyncio.to_thread(on_terminal, "stats", "state/shop", cwd=tmp_path, columns=40, env={"NO_COLOR": "1"})
    lines = re.sub(r"\x1b\[\d*m", "", done.out).split("LARGEST KEYS")[1].splitlines()
    assert sum(line.count("a") for line in lines) == 100
    assert max(map(len, lines)) <= 40
    assert "\x1b[3" not in done.out
    done = await asyncio.to_thread(on_terminal, "get", "state/shop", key, cwd=tmp_path)
    assert done.out == "1\r\nstopped; revision 1, durable up to 1\r\n"


async def test_a_copy_shows_its_progress_on_a_terminal(tmp_path: Path) -> None:
    """A terminal sees how far a copy is. The line is gone at the end."""
    await filled(tmp_path, a=1)
    done = await asyncio.to_thread(on_terminal, "copy", "state/shop", "two/shop", cwd=tmp_path)
    assert "written: " in done.out
    assert done.out.endswith("\r\x1b[Ktwo/shop: 1 key, read back and compared\r\n")


async def test_a_locale_without_utf_8(tmp_path: Path) -> None:
    """In a locale without UTF-8, keys are escaped. JSON to a pipe is UTF-8 all the same, and on a terminal it is escaped."""
    await filled(tmp_path, ü="€")
    env = {"PYTHONIOENCODING": "ascii"}
    assert (await asyncio.to_thread(command, "keys", "state/shop", cwd=tmp_path, env=env)).out == "\\xfc\n"
    assert (
        await asyncio.to_thread(command, "dump", "state/shop", cwd=tmp_path, env=env)
    ).bytes == '{"ü":"€"}\n'.encode()
    shown = await asyncio.to_thread(on_terminal, "dump", "state/shop", cwd=tmp_path, env=env)
    assert shown.out == '{"\\u00fc":"\\u20ac"}\r\n'
    missing = await asyncio.to_thread(command, "get", "state/shop", "ö", cwd=tmp_path, env=env)
    assert (missing.code, missing.err) == (1, "lab-state: there is no key '\\xf6' in state/shop\n")


async def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    """A reader that closes the pipe ends the command without a word, as SIGPIPE would."""
    await filled(tmp_path, **{f"k{n}": "x" * 1000 for n in range(500)})

    def closed(*arguments: str) -> Done:
        run = start(*arguments, cwd=tmp_path)
        run.stdout.close()
        return run.wait()

    # More than a pipe holds. So the command still writes when the pipe is closed.
    for arguments in (("dump", "--nl", "state/shop"), ("dump", "state/shop")):
        done = await asyncio.to_thread(closed, *arguments)
        assert (done.code, done.err) == (141, ""), arguments


async def test_an_interrupt_is_quiet(tmp_path: Path) -> None:
    """Ctrl-C ends a command that waits for its input with code 130, and the state is as before."""
    await filled(tmp_path, a=1)

    def interrupted() -> Done:
        run = start("load", "state/shop", cwd=tmp_path)
        # A pipe holds 64 KiB. So the command reads when it has taken more than that.
        run.stdin.write(b"[" * 200_000)
        run.kill(signal.SIGINT)
        return run.wait()

    done = await asyncio.to_thread(interrupted)
    assert (done.code, done.out, done.err) == (130, "", "")


async def test_an_unwritable_directory_and_a_device(tmp_path: Path) -> None:
    """A directory that cannot be written ends with code 5 and the reason. A backup on a device is a wrong argument."""
    await filled(tmp_path, a=1)
    done = await asyncio.to_thread(command, "backup", "state/shop", "/dev/full", cwd=tmp_path)
    assert done.code == 2
    done = await asyncio.to_thread(command, "backup", "state/shop", "/proc/backup.json", cwd=tmp_path)
    assert done.code == 5
    done = await asyncio.to_thread(command, "set", "--create", "/proc/x/shop", "a", "1", cwd=tmp_path)
    assert done.code == 5
    assert done.err.startswith("lab-state: ")
