"""The example applications under real servers, over HTTP: after any end, each change that was acknowledged is there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from s3_world import client, endpoint

from lab_state import FileStorage, Manager

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
UVICORN = ["-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", "0", "--no-access-log"]
SERVERS = {
    "starlette": [*UVICORN, "starlette_app:app"],
    "fastapi": [*UVICORN, "fastapi_app:app"],
    "litestar": [*UVICORN, "litestar_app:app"],
    "aiohttp": [str(EXAMPLES / "aiohttp_app.py")],
}
CLIENTS = 200

every_server = pytest.mark.parametrize("server", SERVERS)


@asynccontextmanager
async def started(
    server: str, directory: Path, *more: str, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server in a process of its own, which is gone at the end; it prints to its `stdout` alone."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *SERVERS.get(server, [*UVICORN, server]),
        *more,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={
            **os.environ,
            "STATE_DIRECTORY": str(directory),
            "PORT": "0",
            "PYTHONUNBUFFERED": "1",
            **environment,
        },
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def url_of(process: asyncio.subprocess.Process) -> str:
    """Return where it serves, as soon as it says so."""
    assert process.stdout is not None
    said = b""
    async for line in process.stdout:
        said += line
        if match := re.search(rb"unning on (http://127\.0\.0\.1:[1-9]\d*)", line):
            return match[1].decode()
    raise AssertionError(said.decode())


async def lines_of(process: asyncio.subprocess.Process) -> list[str]:
    """Return everything that it prints until it exits by itself."""
    said, _ = await process.communicate()
    return said.decode().splitlines()


class Visitors:
    """Clients that write all the time, each visit to a different page, until the server has ended."""

    def __init__(self, process: asyncio.subprocess.Process, how: signal.Signals) -> None:
        self._process, self._how = process, how
        self.tried = 0
        self.durable: list[str] = []
        self.on_their_way = 0

    async def run(self, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(self._visit(session) for _ in range(CLIENTS)))

    async def _visit(self, session: aiohttp.ClientSession) -> None:
        while True:
            self.tried += 1
            page = f"p{self.tried}"
            try:
                async with session.post(f"/visits/{page}") as response:
                    if response.status != 200:  # what is refused while shutting down is not acknowledged
                        return
                    assert await response.json() == 1
            except aiohttp.ClientError:
                return
            self.durable.append(page)
            if len(self.durable) == 2 * CLIENTS:
                self.on_their_way = self.tried - len(self.durable)
                self._process.send_signal(self._how)


async def visited(server: str, directory: Path, how: signal.Signals) -> list[str]:
    """Return the pages whose visits a server called durable before a signal ended it."""
    async with started(server, directory) as process:
        visitors = Visitors(process, how)
        await visitors.run(await url_of(process))
        await process.wait()
    assert visitors.on_their_way >= CLIENTS - 1
    return visitors.durable


@every_server
async def test_sigterm_loses_nothing_that_was_called_durable(server: str, tmp_path: Path) -> None:
    """After SIGTERM during 200 concurrent writes, each that was answered is in the one JSON file."""
    durable = await visited(server, tmp_path, signal.SIGTERM)
    state = json.loads((tmp_path / "visits.json").read_bytes())
    assert [page for page in durable if state.get(f"page/{page}") != 1] == []


@every_server
async def test_sigkill_loses_nothing_that_was_called_durable(server: str, tmp_path: Path) -> None:
    """After SIGKILL during 200 concurrent writes, the next start finds each that was answered."""
    durable = await visited(server, tmp_path, signal.SIGKILL)
    async with Manager("visits", FileStorage(tmp_path)) as state:
        found = await state.get_all("page/")
    assert [page for page in durable if found.get(f"page/{page}") != 1] == []


@every_server
async def test_a_locked_state_ends_the_server(server: str, tmp_path: Path) -> None:
    """A server exits if another process has its state. The last line of the traceback says which one, and what to do."""
    async with Manager("visits", FileStorage(tmp_path)), started(server, tmp_path) as process:
        lines = await lines_of(process)
    assert process.returncode not in {0, None}
    last = [line for line in lines if "LockedError: " in line][-1]
    assert str(tmp_path / "visits.lock") in last
    assert f"pid {os.getpid()} " in last
    assert "stop that writer first, use another name" in last


async def test_two_workers_are_refused(tmp_path: Path) -> None:
    """`uvicorn --workers 2` on a state that is not shared ends, and says what to do instead."""
    async with started("fastapi", tmp_path, "--workers", "2") as process:
        lines = await lines_of(process)
    told = [line for line in lines if "LockedError: " in line]
    assert all("share it with Config(shared=True) in each of them" in line for line in told)
    assert all("if another worker of this server holds the lock, see docs/workers.md" in line for line in told)
    assert told


@every_server
async def test_the_examples_serve(server: str, tmp_path: Path) -> None:
    """Each example counts, goes on counting after a restart, and reports its health."""
    for expected in (1, 2):
        async with (
            started(server, tmp_path) as process,
            aiohttp.ClientSession(await url_of(process)) as session,
        ):
            async with session.post("/visits/home") as response:
                assert await response.json() == expected
            async with session.get("/visits") as response:
                assert await response.json() == {"page/home": expected}
            async with session.get("/health") as response:
                assert response.status == 200
                health = await response.json()
            assert health["healthy"]
            assert health["managers"]["visits"]["durable_revision"] >= expected
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def test_a_deposed_process_ends_itself_and_loses_nothing(tmp_path: Path) -> None:
    """A deposed process on S3 answers 503 with Retry-After, and ends gracefully. Its successor has every change that was acknowledged."""
    bucket = uuid.uuid4().hex
    await asyncio.to_thread(lambda: client().create_bucket(Bucket=bucket))
    place = {"BUCKET": bucket, "AWS_ENDPOINT_URL": endpoint()}
    async with (
        started("rolling_app:app", tmp_path, **place) as old,
        aiohttp.ClientSession(await url_of(old)) as session,
    ):
        for expected in (1, 2, 3):
            async with session.post("/visits/home") as response:
                assert await response.json() == expected
        async with (
            started("rolling_app:app", tmp_path, **place) as new,
            aiohttp.ClientSession(await url_of(new)) as other,
        ):
            async with session.post("/visits/home") as response:  # this write finds the fence
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
            said = "\n".join(await lines_of(old))
            async with other.post("/visits/home") as response:
                assert await response.json() == 4
    assert said.count("visits: fenced: ") == 1
    assert "Waiting for application shutdown" in said
    assert old.returncode == -signal.SIGTERM  # uvicorn passes the signal on when it has ended gracefully
