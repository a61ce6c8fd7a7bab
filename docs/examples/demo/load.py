"""The load of the first act: several clients that send lines to one server, at a given rate."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import httpx2 as httpx
from lines import Line, key_of

CLIENTS = 20


class Pace:
    """The rate at which all clients of a server together send requests."""

    def __init__(self, rate: float) -> None:
        self._pause = 1 / rate
        self._next = 0.0

    async def turn(self) -> None:
        """Wait until the rate allows one more request."""
        now = time.monotonic()
        self._next = max(self._next + self._pause, now)
        await asyncio.sleep(self._next - now)


class Load:
    """The clients of one server. A line whose answer did not come is sent again in the next run.

    `acknowledged` has each line that was answered, under its key.
    """

    def __init__(self, client: httpx.AsyncClient, lines: Iterable[Line], rate: float) -> None:
        self.acknowledged: dict[str, Line] = {}
        self.waiting = deque(lines)
        self._client = client
        self._pace = Pace(rate)
        self._gone = False

    async def run(self, url: str, answered: Callable[[], None]) -> int:
        """Send the lines that wait, until each is acknowledged or the server is gone.

        Args:
            url: where the server is.
            answered: called after each line that is acknowledged.

        Returns:
            The number of requests that got no answer.

        Raises:
            httpx.HTTPStatusError: the server refused a line.
        """
        self._gone = False
        unanswered: list[Line] = []
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._send(url, answered, unanswered))
        self.waiting.extendleft(unanswered)
        return len(unanswered)

    async def state(self, url: str) -> dict[str, Any]:
        """Return the whole state of the server."""
        answer = await self._client.get(f"{url}/state")
        return dict(answer.raise_for_status().json())

    async def _send(self, url: str, answered: Callable[[], None], unanswered: list[Line]) -> None:
        """Send one line after the other, as one client."""
        while True:
            await self._pace.turn()
            if self._gone or not self.waiting:
                return
            line = self.waiting.popleft()
            try:
                (await self._client.post(f"{url}/lines", json=line)).raise_for_status()
            except httpx.TransportError:
                self._gone = True
                unanswered.append(line)
                return
            self.acknowledged[key_of(line)] = line
            answered()
