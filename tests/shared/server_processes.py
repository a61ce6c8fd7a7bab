"""Real servers with several workers, each in a session of its own, and a supervisor that starts a server again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
from server_counting import NAME

HERE = Path(__file__).parent
GUNICORN = ("gunicorn", "-w", "4", "-b", "{host}:{port}", "--no-control-socket", "--log-level", "warning")
SERVERS = {
    "uvicorn": (
        *("uvicorn", "--workers", "4", "--host", "{host}", "--port", "{port}"),
        *("--no-access-log", "--log-level", "warning", "server_{app}:app"),
    ),
    "gunicorn": (*GUNICORN, "-k", "uvicorn_worker.UvicornWorker", "server_{app}:app"),
    "gunicorn-asgi": (*GUNICORN, "-k", "asgi", "server_{app}:app"),
    "gunicorn-aiohttp": (*GUNICORN, "-k", "aiohttp.GunicornWebWorker", "server_{app}:make_app"),
    "hypercorn": ("hypercorn", "--workers", "4", "--bind", "{host}:{port}", "server_{app}:app"),
    "granian": (
        *("granian", "--interface", "asgi", "--workers", "4", "--host", "{host}", "--port", "{port}"),
        *("--workers-kill-timeout", "10", "--log-level", "warning", "server_{app}:app"),
    ),
}
"""The commands. Each is run as `python -m`."""


class Server:
    """A server that is started again whenever it ends, until it is told to end.

    Attributes:
        port: Its port.
        state: The directory of the state.
        log: The file with all that it prints.
        statuses: The exit statuses of the servers that have ended.
        process: The process of the server that was started last.
    """

    def __init__(self, directory: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            host, self.port = free.getsockname()
        self.log = directory / "server.log"
        self.statuses: list[int] = []
        self.process: asyncio.subprocess.Process | None = None
        self.state = Path(environment.get("STATE_DIRECTORY", directory / "state"))
        self._directory = directory
        self._command = [part.format(host=host, port=self.port, **environment) for part in command]
        self._environment = environment
        self._is_ending = False

    async def run(self, *, again: bool) -> None:
        """Run the server until it ends. Start it again whenever it has ended, if `again` is set and `end` was not called."""
        await self.start()
        while True:
            assert self.process is not None
            self.statuses.append(await self.process.wait())
            if self._is_ending or not again:
                return
            await self.start()

    async def start(self) -> None:
        """Start the server."""
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *self._command),
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self._directory,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "PYTHONUNBUFFERED": "1",
                    "STATE_DIRECTORY": str(self.state),
                    **self._environment,
                },
            )

    def end(self, how: signal.Signals = signal.SIGTERM, *, all_workers: bool = False) -> None:
        """Send a signal to the server, or to it and all of its workers. From now on, it is not started again."""
        self._is_ending = True
        assert self.process is not None
        if all_workers:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)

    def kill(self) -> None:
        """Kill what is left of the server and its workers."""
        self._is_ending = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def said(self) -> str:
        """Return the end of the output, for a message."""
        return self.log.read_text()[-3000:]

    def owner(self) -> int | None:
        """Return the process id in the lock file; `None` if it has none."""
        with suppress(OSError, msgspec.DecodeError):
            pid: int = msgspec.json.decode((self.state / f"{NAME}.lock").read_bytes())["pid"]
            return pid
        return None


@asynccontextmanager
async def served(
    server: str,
    directory: Path,
    *more: str,
    app: str = "starlette",
    again: bool = False,
    environment: dict[str, str] | None = None,
) -> AsyncIterator[tuple[Server, asyncio.Task[None]]]:
    """Run a server during the block. Yield it with the task that ends when it has ended."""
    made = Server(directory, (*SERVERS[server], *more), {"app": app, **(environment or {})})
    running = asyncio.create_task(made.run(again=again))
    try:
        yield made, running
    finally:
        made.kill()
        await running
