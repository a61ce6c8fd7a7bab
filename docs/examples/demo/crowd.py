"""The load of the second act: several clients that send each line until it is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator

import httpx2 as httpx
from lines import Line, key_of
from load import CLIENTS, Pace

BEFORE_REPEATING = 0.01  # seconds


class Meter:
    """The answers since the last reset: how many a second, and the longest time without one."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.reset()

    def reset(self) -> None:
        """Begin to count. The time since the last answer goes on."""
        self._began = time.monotonic()
        self._answers = 0
        self._gap = 0.0

    def answered(self) -> None:
        """Count an answer."""
        self._gap = self.gap
        self._last = time.monotonic()
        self._answers += 1

    @property
    def silence(self) -> float:
        """The time since the last answer, in seconds."""
        return time.monotonic() - self._last

    @property
    def gap(self) -> float:
        """The longest time without an answer, in seconds."""
        return max(self._gap, self.silence)

    @property
    def rate(self) -> float:
        """The number of answers per second."""
        return self._answers / max(time.monotonic() - self._began, 1e-6)


class Crowd:
    """The clients.

    Attributes:
        meter: The answers that they get.
        sent: Each line that was sent, under its key. When `run` has ended, each of them was answered.
        again: How often a line was sent again, because it was not answered.
    """

    def __init__(self, client: httpx.AsyncClient, lines: Iterable[Line], rate: float) -> None:
        self.meter: Meter = Meter()
        self.sent: dict[str, Line] = {}
        self.again: int = 0
        self._client = client
        self._lines = numbered(list(lines))
        self._pace = Pace(rate)
        self._is_over = False

    async def run(self, url: str) -> None:
        """Send lines until `end` is called. Then wait for the last answers.

        Raises:
            httpx.HTTPStatusError: the server refused a line.
        """
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._send(url))

    def end(self) -> None:
        """Send no other lines."""
        self._is_over = True

    async def _send(self, url: str) -> None:
        """Send one line after the other, as one client."""
        while True:
            await self._pace.turn()
            if self._is_over:
                return
            line = next(self._lines)
            self.sent[key_of(line)] = line
            while not await self._is_answered(url, line):
                self.again += 1
                await asyncio.sleep(BEFORE_REPEATING)
            self.meter.answered()

    async def _is_answered(self, url: str, line: Line) -> bool:
        """Send a line, and return whether there was an answer. The worker that has the line may be killed."""
        try:
            (await self._client.post(f"{url}/lines", json=line)).raise_for_status()
        except httpx.TransportError:
            return False
        return True


def numbered(lines: list[Line]) -> Iterator[Line]:
    """Yield the lines without end. The lines get other numbers when they come again, so no two have the same key."""
    most = 1 + max(int(line["number"]) for line in lines)
    shift = 0
    while True:
        for line in lines:
            yield {**line, "number": int(line["number"]) + shift}
        shift += most
