"""The first act: two servers get the same load, and each is killed in the middle of it.

One server is on lab_state, the other one on a careful `json.dump`. Both are started again. The act compares what they
acknowledged with what they have, sends the rest, and compares again.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from lines import Line, counts_of, key_of
from load import CLIENTS, Load
from rich.table import Table
from screen import Bars, Screen
from servers import DemoError, Server

OURS = "lab_state"
APPLICATIONS = {OURS: "words", "json.dump": "words_json"}


@dataclass(frozen=True)
class Outcome:
    """The outcome for one server: lines at the time of the SIGKILL, and lines in its file in the end."""

    name: str
    file: Path
    acknowledged: int
    found: int
    in_the_end: int

    @property
    def lost(self) -> int:
        """The lines that were acknowledged, and are missing after the restart."""
        return self.acknowledged - self.found


class Contest:
    """One server and its load."""

    def __init__(self, name: str, directory: Path, lines: list[Line], load: Load, screen: Bars) -> None:
        self._name = name
        self._server = Server(APPLICATIONS[name], directory / name)
        self._file = self._server.directory / "words.json"
        self._sent = {key_of(line): line for line in lines}
        self._load = load
        self._screen = screen

    async def run(self) -> Outcome:
        """Send half of the lines, kill the server, start it again, compare, send the rest, stop it, and compare.

        Raises:
            DemoError: a server failed, or it has something that was not sent.
        """
        try:
            acknowledged = await self._until_the_kill()
            found = await self._after_the_restart()
            in_the_end = self._lines_in(json.loads(self._file.read_bytes()))
        finally:
            self._server.kill()
        return Outcome(self._name, self._file, len(acknowledged), len(acknowledged & found), len(in_the_end))

    async def _until_the_kill(self) -> set[str]:
        """Kill the server when half of the lines are acknowledged. Return the keys of the acknowledged lines."""
        url = await self._server.start()
        half = len(self._sent) // 2

        def answered() -> None:
            self._screen.advance(self._name)
            if len(self._load.acknowledged) == half:
                self._server.kill()

        unanswered = await self._load.run(url, answered)
        acknowledged = set(self._load.acknowledged)
        if len(acknowledged) < half:
            raise self._server.error("ended by itself")
        self._screen.say(f"{self._name}: SIGKILL after {len(acknowledged):,} answers, {unanswered} got no answer")
        return acknowledged

    async def _after_the_restart(self) -> set[str]:
        """Start the server again, read its lines, and send the rest. Return the keys of the lines that it had."""
        url = await self._server.start()
        found = self._lines_in(await self._load.state(url))
        self._screen.say(f"{self._name}: started again, it has {len(found):,} lines; sending the rest")
        await self._load.run(url, lambda: self._screen.advance(self._name))
        if self._load.waiting:
            raise self._server.error("ended by itself")
        await self._server.stop()
        return found

    def _lines_in(self, state: dict[str, Any]) -> set[str]:
        """Return the keys of the lines in a state, after a check of each line and of each count.

        Raises:
            DemoError: a line was never sent, or a count of words is not that of the lines beside it.
        """
        lines = {key: value for key, value in state.items() if key.startswith("line/")}
        counts = {key: value for key, value in state.items() if key.startswith("words/")}
        if any(self._sent.get(key) != line for key, line in lines.items()):
            raise DemoError(f"{self._name} has a line that was never sent")
        if counts != counts_of(lines.values()):
            raise DemoError(f"the counts of {self._name} are not those of its lines")
        return set(lines)


async def run(directory: Path, lines: list[Line], rate: float) -> None:
    """Run the act, and print its table.

    Raises:
        DemoError: a server failed, or lab_state lost something.
    """
    screen = Bars(list(APPLICATIONS), len(lines))
    screen.say(
        f"Two FastAPI servers get the same {len(lines):,} lines of text, up to {rate:,.0f} a second from {CLIENTS} clients. "
        "Each is killed half way with SIGKILL, and started again. The server on lab_state answers when a line is on the "
        "disk. The server on json.dump answers at once. Each second it writes all its lines to a new file, syncs "
        "that file, and renames it over the old one."
    )
    limits = httpx.Limits(max_connections=None)
    with screen:
        # Without the settings of the environment: a proxy does not reach the loopback interface of this machine.
        async with (
            httpx.AsyncClient(limits=limits, timeout=20, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            contests = [Contest(name, directory, lines, Load(client, lines, rate), screen) for name in APPLICATIONS]
            tasks = [group.create_task(contest.run()) for contest in contests]
    outcomes = [task.result() for task in tasks]
    report(outcomes, len(lines), screen)
    for outcome in outcomes:
        if outcome.name == OURS and (outcome.lost or outcome.in_the_end != len(lines)):
            raise DemoError(
                f"{OURS} lost {outcome.lost or len(lines) - outcome.in_the_end:,} lines. Please report this."
            )


def report(outcomes: list[Outcome], total: int, screen: Screen) -> None:
    """Print the table, what the files have in the end, and how to look at one."""
    table = Table("server", title="lines at the SIGKILL", title_justify="left")
    for column in ("acknowledged", "found", "lost"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        lost = f"[{'bold red' if outcome.lost else 'bold green'}]{outcome.lost:,}[/]"
        table.add_row(outcome.name, f"{outcome.acknowledged:,}", f"{outcome.found:,}", lost)
    screen.show(table)
    have = ", ".join(f"{outcome.name} has {outcome.in_the_end:,}" for outcome in outcomes)
    for outcome in outcomes:
        if outcome.lost and outcome.name != OURS:
            screen.say(f"{outcome.name} acknowledged {outcome.lost:,} lines after its last save. They are lost.")
    screen.say(f"In the end, all {total:,} lines were acknowledged by both. Of these, {have}.")
    ours = next(outcome.file for outcome in outcomes if outcome.name == OURS)
    screen.say("The state is one file of plain JSON. This command prints the words of each page:")
    screen.say_whole(f"""{shlex.quote(sys.executable)} -m json.tool {shlex.quote(str(ours))} | grep '^    "words/'""")
