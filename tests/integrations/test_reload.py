"""A graceful reload (HUP) of real servers, which start the new worker before the old one has ended."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lab_state import FileStorage, Manager

HELPERS = Path(__file__).parents[1] / "helpers"
SERVERS = {
    "gunicorn": [
        *("gunicorn", "reloaded_app:app", "-k", "uvicorn_worker.UvicornWorker", "-w", "1", "-b", "{host}:{port}"),
        "--no-control-socket",  # it would be in the home directory
    ],
    "granian": [
        *("granian", "reloaded_app:app", "--interface", "asgi", "--workers", "1", "--respawn-interval", "0.1"),
        *("--host", "{host}", "--port", "{port}"),
    ],
}
LISTENS = {"gunicorn": "Booting worker", "granian": "Started worker"}


class Server:
    """A server in a process of its own, and what it prints."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url
        self.said: list[str] = []

    async def says(self, text: str) -> str:
        """Wait for the next line with this text."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.said.append(line.decode())
            if text in self.said[-1]:
                return self.said[-1]
        raise AssertionError("".join(self.said))


@asynccontextmanager
async def started(server: str, directory: Path, **environment: str) -> AsyncIterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *(part.format(host=host, port=port) for part in SERVERS[server]),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        cwd=HELPERS,
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "STATE_DIRECTORY": str(directory),
            **environment,
        },
    )
    try:
        yield Server(process, f"http://{host}:{port}")
    finally:
        with suppress(ProcessLookupError):  # the workers too: they have the pipe
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


class Clients:
    """Clients of a server that try again after a request without an answer."""

    def __init__(self, url: str) -> None:
        self._session = aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=30))
        self._pages = itertools.count()
        self.counted: dict[str, int] = {}
        self.pids: set[int] = set()
        self.refused: list[int] = []

    async def visit(self, page: str, body: Any = None) -> bool:
        """Visit a page; whether an answer came."""
        try:
            async with self._session.post(f"/visits/{page}", data=body) as response:
                if response.status != 200:
                    self.refused.append(response.status)
                    return False
                answer = await response.json()
        except aiohttp.ClientConnectionError:  # the old worker closed the connection
            return False
        self.counted[page] = answer["count"]
        self.pids.add(answer["pid"])
        return True

    async def run(self) -> None:
        """Visit one page after the other, each until it was answered, up to the first answer of a second process."""
        while len(self.pids) < 2:
            page = f"p{next(self._pages)}"
            while not await self.visit(page):
                pass

    async def end(self) -> None:
        await self._session.close()


class Withheld:
    """A request body that ends when `end` is set."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.end = asyncio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        yield b"first half"
        self.arrived.set()
        await self.end.wait()
        yield b"second half"


@pytest.mark.parametrize("server", SERVERS)
async def test_a_graceful_reload_loses_no_answer(server: str, tmp_path: Path) -> None:
    """With `lock_timeout`, the new worker waits for the running request. Each visit is answered and stored."""
    async with started(server, tmp_path, LOCK_TIMEOUT="20") as running:
        await running.says(LISTENS[server])
        clients, withheld = Clients(running.url), Withheld()
        while not await clients.visit("first"):
            pass
        (old,) = clients.pids
        slow = asyncio.create_task(clients.visit("slow", withheld.body()))
        await withheld.arrived.wait()
        visitors = [asyncio.create_task(clients.run()) for _ in range(5)]
        running.process.send_signal(signal.SIGHUP)
        assert f"pid {old} " in await running.says("start() waits")
        withheld.end.set()
        assert await slow, "the request under way was cut off"
        await asyncio.gather(*visitors)
        await clients.end()
        assert clients.refused == []
        running.process.send_signal(signal.SIGTERM)
        assert await running.process.wait() == 0
    async with Manager("visits", FileStorage(tmp_path)) as state:
        kept = await state.get_all(type=int)
    assert [page for page, count in clients.counted.items() if kept.get(page, 0) < count] == []


@pytest.mark.parametrize("server", SERVERS)
async def test_a_graceful_reload_of_a_shared_state(server: str, tmp_path: Path) -> None:
    """The new worker follows the old one, and answers while the old one still has a request. Each visit is counted once."""
    async with started(server, tmp_path, SHARED="yes") as running:
        await running.says(LISTENS[server])
        clients, withheld = Clients(running.url), Withheld()
        while not await clients.visit("first"):
            pass
        slow = asyncio.create_task(clients.visit("slow", withheld.body()))
        await withheld.arrived.wait()
        running.process.send_signal(signal.SIGHUP)
        await asyncio.gather(*(clients.run() for _ in range(5)))
        assert not slow.done()
        withheld.end.set()
        assert await slow, "the request under way was cut off"
        assert await clients.visit("last")
        await clients.end()
        assert clients.refused == []
        running.process.send_signal(signal.SIGTERM)
        assert await running.process.wait() == 0
    async with Manager("visits", FileStorage(tmp_path)) as state:
        kept = await state.get_all(type=int)
    assert [page for page, count in clients.counted.items() if kept.get(page, 0) < count] == []


async def test_gunicorn_halts_without_a_lock_timeout(tmp_path: Path) -> None:
    """Without `lock_timeout`, a graceful reload with a request under way ends gunicorn with exit code 3."""
    async with started("gunicorn", tmp_path, LOCK_TIMEOUT="0") as running:
        await running.says(LISTENS["gunicorn"])
        clients, withheld = Clients(running.url), Withheld()
        while not await clients.visit("first"):
            pass
        slow = asyncio.create_task(clients.visit("slow", withheld.body()))
        await withheld.arrived.wait()
        running.process.send_signal(signal.SIGHUP)
        await running.says("LockedError")
        withheld.end.set()
        await running.says("Worker failed to boot")
        assert await running.process.wait() == 3
        await slow
        await clients.end()
