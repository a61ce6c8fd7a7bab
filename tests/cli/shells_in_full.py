"""Completion in bash, zsh and fish, as a user has it: the line of docs/command.md in the start-up file, and the Tab key on a terminal.

`nox -s command` runs this file.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "command.md"
STARTS = {"bash": "bash --rcfile {home}/.bashrc -i", "zsh": "zsh -i", "fish": "fish -i"}
PATIENCE = 30.0


def lines(shell: str) -> str:
    """Return the lines for the start-up file of a shell, from the page."""
    kind = "fish" if shell == "fish" else "sh"
    blocks: list[str] = re.findall(rf"```{kind}\n# [^\n]*{shell}[^\n]*\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = blocks
    return block


class Terminal:
    """A shell on a terminal of 80 columns."""

    def __init__(self, shell: str, home: Path) -> None:
        bin_ = home / "bin"
        bin_.mkdir()
        (bin_ / "lab-state").write_text(f'#!/bin/sh\nexec {sys.executable} -m lab_state "$@"\n')
        (bin_ / "lab-state").chmod(0o755)
        (home / ".config" / "fish").mkdir(parents=True)
        # Without this directory, fish makes completions of all manual pages in the background.
        (home / ".local" / "share" / "fish" / "generated_completions").mkdir(parents=True)
        name = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}[shell]
        prompt = "function fish_prompt; echo -n 'READY> '; end\n" if shell == "fish" else "PS1='READY> '\n"
        (home / name).write_text(prompt + lines(shell))
        env = {
            **{name: os.environ[name] for name in ("PYTHONPATH", "LANG") if name in os.environ},
            "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "PATH": f"{bin_}:{os.environ['PATH']}",
            "TERM": "dumb", "fish_greeting": "", "INPUTRC": "/dev/null",
        }  # fmt: skip
        self._ours, self._theirs = pty.openpty()
        # The first terminal that the leader of a session opens is the terminal of this session.
        opening = (
            f"exec <{os.ttyname(self._theirs)} >{os.ttyname(self._theirs)} 2>&1; exec {STARTS[shell].format(home=home)}"
        )
        self.process = subprocess.Popen(["sh", "-c", opening], cwd=home, env=env, start_new_session=True)
        self.text = ""
        self.wait_for("READY> ")

    def type(self, keys: str) -> None:
        self.text = ""
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + PATIENCE
        while text not in plain(self.text):
            ready, _, _ = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {plain(self.text)!r}"
            self.text += os.read(self._ours, 65536).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


def plain(text: str) -> str:
    """Return what a terminal gets, without what moves its cursor."""
    return re.sub(r"\x1b\[[\d;?<>=]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b.|\r|\x08", "", text)


@pytest.fixture(params=STARTS)
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Terminal:
    if shutil.which(request.param) is None:
        pytest.fail(f"{request.param} is not installed: apt-get install bash zsh fish")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shop.json").write_text('{"stock/apple": 12}\n')
    return Terminal(request.param, tmp_path)


def test_completion(terminal: Terminal) -> None:
    """The Tab key completes a subcommand, a directory, the name of a state in it, and an option. The line then runs."""
    try:
        terminal.type("lab-state ver\t")
        terminal.wait_for("verify ")
        terminal.type("sta\t")
        terminal.wait_for("state/shop ")
        terminal.type("\n")
        terminal.wait_for("1 key and 2 B of values")
        terminal.wait_for("READY> ")
        terminal.type("lab-state get --js\t")
        terminal.wait_for("json ")
        terminal.type("state/sh\t")
        terminal.wait_for("state/shop ")
        terminal.type("stock/apple\n")
        terminal.wait_for('"value":12')
    finally:
        terminal.close()
