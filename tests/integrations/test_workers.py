"""The program of docs/workers.md under uvicorn with two workers: they share one state."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import aiohttp
from uvicorn_workers import workers

PAGE = Path(__file__).parents[2] / "docs" / "workers.md"
VISITS = 200


async def visit(session: aiohttp.ClientSession) -> int:
    async with session.post("/visits/home") as response:
        assert response.status == 200
        return int(await response.json())


async def role_of_a_worker(session: aiohttp.ClientSession) -> dict[str, Any]:
    """Return the status of the state in the worker that answers."""
    async with session.get("/health") as response:
        status: dict[str, Any] = (await response.json())["managers"]["visits"]
        return status


async def test_two_workers_share_a_state(tmp_path: Path) -> None:
    """Two workers count each visit once. When the worker that owns the state is killed, the other one goes on counting."""
    # A connection for each request: so the requests reach both workers.
    connector = aiohttp.TCPConnector(force_close=True, limit=20)
    program = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "app.py").write_text(program)
    async with (
        workers(f"{tmp_path}/app", 2, tmp_path) as (server, url),
        aiohttp.ClientSession(url, connector=connector) as session,
    ):
        found: dict[str, dict[str, Any]] = {}
        while found.keys() != {"owner", "follower"}:
            status = await role_of_a_worker(session)
            found[status["role"]] = status
        assert found["owner"]["owner_pid"] == found["follower"]["owner_pid"]
        counts = await asyncio.gather(*(visit(session) for _ in range(VISITS)))
        assert sorted(counts) == list(range(1, VISITS + 1))
        os.kill(found["owner"]["owner_pid"], signal.SIGKILL)
        assert await visit(session) == VISITS + 1
        while not (status := await role_of_a_worker(session))["followers"]:  # uvicorn has started another worker
            assert status["owner_pid"] != found["owner"]["owner_pid"]
        assert await visit(session) == VISITS + 2
        server.send_signal(signal.SIGTERM)
        await server.wait()
    assert json.loads((tmp_path / "state" / "visits.json").read_bytes())["home"] == VISITS + 2
