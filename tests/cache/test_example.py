"""The example application: one writer process, four uvicorn workers, and each client reads its own writes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def serving(app: str, port: int, environment: dict[str, str], *options: str) -> Iterator[None]:
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), f"shared:{app}", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--log-level", "warning", *options], env={**os.environ, **environment}, start_new_session=True
    )
    try:
        yield
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def ready(client: httpx.AsyncClient, url: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if (await client.get(url)).status_code < 500:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the application does not start"
        await asyncio.sleep(0.05)


async def test_four_workers_read_their_own_writes(own_redis: Any, tmp_path: Path) -> None:
    """Each of many clients changes a key through a worker, and reads the change from that worker. In the end all workers have it."""
    ports = free_port(), free_port()
    environment = {
        "REDIS_URL": own_redis().url,
        "STATE_DIRECTORY": str(tmp_path),
        "WRITER_URL": f"http://127.0.0.1:{ports[0]}",
    }
    url = f"http://127.0.0.1:{ports[1]}"
    workers: set[str] = set()

    async def use(client: httpx.AsyncClient, number: int) -> None:
        for value in range(10):
            answer = await client.put(f"{url}/key-{number}", params={"value": value})
            assert answer.raise_for_status().json() == value

    new_each_time = httpx.Limits(max_keepalive_connections=0)  # each request may reach another worker
    with (
        serving("writer", ports[0], environment),
        serving("worker", ports[1], environment, "--workers", "4"),
    ):
        async with httpx.AsyncClient(timeout=20, limits=new_each_time) as client:
            await ready(client, f"{url}/ready")
            await asyncio.gather(*(use(client, number) for number in range(6)))
            deadline = time.monotonic() + 20
            while len(workers) < 4:
                assert time.monotonic() < deadline, f"only {workers} answered"
                answer = await client.get(f"{url}/key-5")
                if answer.json() == 9:  # another worker may hear of it a moment later
                    workers.add(answer.headers["worker"])
