"""The second act: four workers share one state, and the worker that owns it is killed each second.

Clients send lines meanwhile. A client that gets no answer sends its line again, to any of the other workers. In the end, the
act compares each counter with the lines that were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from crowd import Crowd
from lines import Line, counts_of
from load import CLIENTS
from rich.table import Table
from screen import Screen
from servers import PATIENCE, DemoError, Server

APPLICATION = "words"
WORKERS = 4
BETWEEN = 1.0  # seconds from a kill to the next one
LOOK = 0.05  # seconds


@dataclass(frozen=True)
class Row:
    """The row of one owner in the table.

    Attributes:
        takeovers: The number of takeovers up to this owner.
        owner: Its pid; `None` until there is an owner.
        rate: The answers a second, from the kill of the owner before it.
        gap: The longest time without an answer, in seconds.
    """

    takeovers: int
    owner: int | None
    rate: float
    gap: float

    def __str__(self) -> str:
        """Return the row as one line of text."""
        owner, rate, gap = self.cells()
        return f"takeovers {self.takeovers}, owner {owner}, {rate} requests a second, longest gap {gap}"

    def cells(self) -> tuple[str, str, str]:
        """Return the owner, the rate and the gap as text."""
        owner = "-" if self.owner is None else str(self.owner)
        return owner, f"{self.rate:,.0f}", f"{self.gap * 1e3:,.0f} ms"


class Owners:
    """The owners of the state, one after the other, and the table of them."""

    def __init__(self, server: Server, client: httpx.AsyncClient, crowd: Crowd, screen: Screen) -> None:
        self._server = server
        self._client = client
        self._crowd = crowd
        self._screen = screen
        self._rows: list[Row] = []
        self._owner: int | None = None
        self._is_over = False

    async def run(self, url: str, kills: int) -> None:
        """Kill the owner, about a second after the kill before. The last owner works for a second, too.

        Raises:
            DemoError: the server does not answer, or starts no other worker.
        """
        owner = self._owner = await self._next(url, None)
        for number in range(kills):
            await self._let_work(2 + number)  # the other workers may still be starting; two are enough for a takeover
            self._server.kill_worker(owner)
            self._end_row()
            self._owner = None
            owner = self._owner = await self._next(url, owner)
        await self._let_work(0)
        self._end_row()
        self._is_over = True

    async def _let_work(self, started: int) -> None:
        """Let the owner work for a second, and until this number of workers have started. Workers that were killed count, too."""
        end = time.monotonic() + BETWEEN
        while time.monotonic() < end or self._server.started < started:
            if time.monotonic() > end + PATIENCE:
                raise self._server.error("starts no other worker")
            await self._wait()

    async def _wait(self) -> None:
        if self._crowd.meter.silence > PATIENCE:
            raise self._server.error("does not answer")
        await asyncio.sleep(LOOK)

    async def _next(self, url: str, before: int | None) -> int:
        """Return the pid of the owner, when it is another one than before."""
        while True:
            with contextlib.suppress(httpx.TransportError):  # the worker that was asked may be the one that was killed
                owner = (await self._client.get(f"{url}/owner")).raise_for_status().json()
                if owner not in {None, before}:
                    return int(owner)
            await self._wait()

    def _end_row(self) -> None:
        row = self._row()
        self._rows.append(row)
        self._crowd.meter.reset()
        if not self._screen.is_live:
            self._screen.say(str(row))

    def _row(self) -> Row:
        meter = self._crowd.meter
        return Row(len(self._rows), self._owner, meter.rate, meter.gap)

    def table(self) -> Table:
        """Return the table. The last row is that of the present owner, until the act is over."""
        return table_of(self._rows if self._is_over else [*self._rows, self._row()])


def table_of(rows: list[Row]) -> Table:
    """Return the rows as a table."""
    table = Table(title="four workers on one state", title_justify="left")
    for column in ("takeovers", "owner", "requests a second", "longest gap"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row.takeovers), *row.cells())
    return table


async def run(directory: Path, lines: list[Line], rate: float, kills: int) -> None:
    """Run the act, and print its table.

    Raises:
        DemoError: the server failed, or a counter is wrong.
    """
    screen = Screen()
    screen.say(
        f"Four workers of one FastAPI server share one state. {CLIENTS} clients send them lines of text, up to {rate:,.0f} a "
        f"second. Each second the worker that owns the state is killed with SIGKILL. Another worker takes over. A client without an "
        "answer sends its line again."
    )
    server = Server(APPLICATION, directory / "workers", WORKERS)
    try:
        url = await server.start()
        limits = httpx.Limits(max_connections=None)
        # Without the settings of the environment: a proxy does not reach the loopback interface of this machine.
        async with httpx.AsyncClient(limits=limits, timeout=PATIENCE, trust_env=False) as client:
            crowd = Crowd(client, lines, rate)
            owners = Owners(server, client, crowd, screen)
            async with asyncio.TaskGroup() as group:
                group.create_task(crowd.run(url))
                with screen.live(owners.table) if screen.is_live else contextlib.nullcontext():
                    await owners.run(url, kills)
                crowd.end()
            if not screen.is_live:
                screen.show(owners.table())
            counters = check(crowd.sent, (await client.get(f"{url}/state")).raise_for_status().json())
        await server.stop()
        check(crowd.sent, json.loads((server.directory / "words.json").read_bytes()))
    finally:
        server.kill()
    screen.say(
        f"{len(crowd.sent):,} lines were acknowledged. {crowd.again:,} times a client sent its line again. Each line is counted once: all "
        f"{counters:,} counters of words are exact, also in the file that the last worker wrote."
    )


def check(sent: dict[str, Line], state: dict[str, Any]) -> int:
    """Compare a state with the lines that were acknowledged. Return the number of counters.

    Raises:
        DemoError: a line is missing or was never sent, or a counter is not that of the lines.
    """
    for prefix, kind, right in (("line/", "lines", sent), ("words/", "counters", counts_of(sent.values()))):
        found = {key: value for key, value in state.items() if key.startswith(prefix)}
        wrong = sum(found.get(key) != right.get(key) for key in {*found, *right})
        if wrong:
            raise DemoError(f"{wrong:,} of {len(right):,} {kind} are wrong. Please report this.")
    return len(right)
