"""Clients of a real server, which repeat each request with the same id until it is answered, and the facts that must hold then."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

CLIENTS = 200
LONGEST = 30.0
"""The seconds after which a request without an answer hangs."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Tally:
    """What the clients of one server have seen.

    Attributes:
        numbers: The number of each id that was acknowledged.
        unanswered: The ids whose requests had no answer when the server ended.
        repeats: How often a request was sent again.
        statuses: How often each status was answered.
        roles: The role of each worker in its last answer, by process id.
        broken: What must not happen, as text.
        longest: The longest time in seconds from the first attempt of an id to its acknowledgement.
        is_ending: Whether the server is being stopped. Then a request without an answer is not repeated.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.unanswered: set[str] = set()
        self.repeats = 0
        self.statuses: Counter[int] = Counter()
        self.roles: dict[int, str] = {}
        self.broken: list[str] = []
        self.longest = 0.0
        self.is_ending = False
        self._changed = asyncio.Event()

    def acknowledge(self, name: str, answer: dict[str, Any], seconds: float) -> None:
        """Note an answer to an id."""
        number = answer["number"]
        self.roles[answer["pid"]] = answer["role"]
        known = self.numbers.setdefault(name, number)
        if known != number:
            self.violated(f"{name} was answered with {known} and then with {number}")
        self.longest = max(self.longest, seconds)
        self._changed.set()

    def count_status(self, status: int) -> None:
        """Note the status of an answer."""
        self.statuses[status] += 1
        self._changed.set()

    def violated(self, what: str) -> None:
        """Note what must not happen. The clients end, and so do the waits for them."""
        self.broken.append(what)
        self.is_ending = True
        self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition is true. It is tried after each answer."""
        while not condition():
            assert not self.broken, self.broken[0]
            self._changed.clear()
            await self._changed.wait()

    async def more(self, number: int) -> None:
        """Wait until a number of further ids was acknowledged."""
        enough = len(self.numbers) + number
        await self.until(lambda: len(self.numbers) >= enough)

    async def refusals(self, number: int) -> None:
        """Wait until a number of further requests was answered with 503."""
        enough = self.statuses[503] + number
        await self.until(lambda: self.statuses[503] >= enough)

    def __str__(self) -> str:
        """Return the counts of the clients."""
        return (
            f"{len(self.numbers)} acknowledged, {self.repeats} repeats, {self.statuses[503]} times 503, "
            f"{self.longest:.1f} s at most, {len(self.unanswered)} unanswered at the end"
        )


class Client:
    """One client, with one connection at a time."""

    def __init__(self, tally: Tally, port: int, number: int, longest: float = LONGEST) -> None:
        self._tally, self._port, self._longest = tally, port, longest
        self._name = f"c{number}"  # its counter, too
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        """Count one id after the other, until the server is being stopped.

        Each tenth id is counted again after its acknowledgement, over a new connection, which may reach another worker.
        """
        for number in count():
            if self._tally.is_ending:
                break
            name = f"{self._name}-{number}"
            await self._count(name)
            if number % 10 == 9 and name in self._tally.numbers:
                self._close()
                await self._count(name)
        self._close()

    async def _count(self, name: str) -> None:
        loop, tally = asyncio.get_running_loop(), self._tally
        began = loop.time()
        while (answer := await self._ask(name)) is None:
            if tally.is_ending:
                if name not in tally.numbers:
                    tally.unanswered.add(name)
                return
            tally.repeats += 1
        tally.acknowledge(name, answer, loop.time() - began)

    async def _ask(self, name: str) -> dict[str, Any] | None:
        """Send a request. Return the answer, or `None` if the request must be repeated."""
        tally = self._tally
        try:
            async with asyncio.timeout(self._longest):
                status, body = await self._exchange(name)
        except TimeoutError:
            tally.violated(f"{name} had no answer for {self._longest:g} s")
            self._close()
            return None
        except (OSError, asyncio.IncompleteReadError):
            self._close()
            return None
        tally.count_status(status)
        if status == 200:
            answer: dict[str, Any] = json.loads(body)
            return answer
        if status != 503:
            tally.violated(f"{name} was answered with status {status}: {body[:200]!r}")
        await asyncio.sleep(0.1)  # as `Retry-After` asks for, but sooner
        return None

    async def _exchange(self, name: str) -> tuple[int, bytes]:
        if self._reader is None or self._writer is None:
            try:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                await asyncio.sleep(0.05)  # the server is being started
                raise
        self._writer.write(b"POST /count?id=%s HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n" % name.encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        assert length is not None, head
        body = await self._reader.readexactly(int(length[1]))
        if _CLOSES.search(head) is not None:
            self._close()
        return int(head[9:12]), body

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@asynccontextmanager
async def clients(tally: Tally, *ports: int, longest: float = LONGEST, number: int = CLIENTS) -> AsyncIterator[None]:
    """Run clients during the block, divided among the ports of servers. They begin after the first answer.

    The block must end by `Tally.is_ending`, after which the clients end, or by an error.
    """
    tasks: list[asyncio.Task[None]] = []
    try:
        for one in range(number):
            tasks.append(asyncio.create_task(Client(tally, ports[one % len(ports)], one, longest).run()))
            if one < len(ports):
                await tally.more(1)
        yield
        assert tally.is_ending
        async with asyncio.timeout(longest + 5):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def wrong(state: dict[str, Any], tally: Tally) -> list[str]:
    """Return what is wrong with the state of a server that has ended.

    Each acknowledged id is in the state, with the number that was answered. The ids of a counter have the numbers from 1
    to the value of the counter, each once. Another id is one whose request had no answer.
    """
    found = list(tally.broken)
    ids = {key.removeprefix("id/"): number for key, number in state.items() if key.startswith("id/")}
    for name, number in tally.numbers.items():
        if ids.get(name) != number:
            found.append(f"{name} was answered with {number}, and the state has {ids.get(name)}")
    if others := ids.keys() - tally.numbers.keys() - tally.unanswered:
        found.append(f"the state has ids for which no client waits: {sorted(others)[:5]}")
    numbers: dict[str, list[int]] = {key: [] for key in state if key.startswith("count/")}
    for name, number in ids.items():
        numbers.setdefault(f"count/{name.partition('-')[0]}", []).append(number)
    for key, given in numbers.items():
        if sorted(given) != list(range(1, state.get(key, 0) + 1)):
            found.append(f"{key} is {state.get(key)}, and {len(given)} ids have {len(set(given))} numbers")
    return found
