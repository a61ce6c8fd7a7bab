"""A server process of the demo: started on a free port, killed, started again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
URL = re.compile(r"running on (http://127\.0\.0\.1:[1-9]\d*)")
STARTED = "Application startup complete"
PATIENCE = 20.0  # seconds for a start, and for an end


class DemoError(Exception):
    """The demo cannot go on. The message says why."""


class Server:
    """One application under uvicorn. Its state is in a directory, and its log in a file beside it."""

    def __init__(self, application: str, directory: Path, workers: int = 1) -> None:
        self._application = application
        self.directory = directory
        self._workers = workers
        self._log = directory.with_name(f"{directory.name}.log")
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> str:
        """Start the server, and return its URL when all workers serve. The kernel chooses a port that is free.

        Raises:
            DemoError: the process ended, or did not serve within 20 s. The message has the end of its log.
        """
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(HERE), f"{self._application}:app"]
        options = ["--host", "127.0.0.1", "--port", "0", "--no-use-colors", "--no-access-log"]
        options += ["--workers", str(self._workers)]
        with self._log.open("wb") as log:
            # In a session of its own it gets no Ctrl-C: the demo alone decides when it ends.
            self._process = subprocess.Popen(  # noqa: ASYNC220 -- some milliseconds, and no await before it is known
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment(self.directory),
            )
        deadline = time.monotonic() + PATIENCE
        while not (found := URL.search(self._said())) or self.started < self._workers:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self.error("did not start")
            await asyncio.sleep(0.02)
        return found[1]

    @property
    def started(self) -> int:
        """The number of workers that have started, including those that were killed since."""
        return self._said().count(STARTED)

    def _said(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def kill(self) -> None:
        """Kill the process and its workers with SIGKILL. Do nothing if they are gone already."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def kill_worker(self, pid: int) -> None:
        """Kill one worker with SIGKILL. uvicorn starts another one.

        Raises:
            DemoError: there is no such worker.
        """
        assert self._process is not None
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == self._process.pid:
                os.kill(pid, signal.SIGKILL)
                return
        raise self.error(f"has no worker with pid {pid}")

    async def stop(self) -> None:
        """Send SIGTERM, and wait until the process has stopped its application and ended.

        Raises:
            DemoError: it did not end within 20 s, or it failed. The message has the end of its log.
        """
        assert self._process is not None
        self._process.terminate()
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110 -- no event reports its end
            await asyncio.sleep(0.02)
        # uvicorn passes the signal on to itself when it has ended gracefully.
        if self._process.returncode not in {0, -signal.SIGTERM}:
            raise self.error("did not stop")

    def error(self, what: str) -> DemoError:
        """Return an error that says what the server did, with the end of its log."""
        log = self._said().splitlines()
        return DemoError("\n".join([f"the server of {self.directory.name} {what}; its log ends with:", *log[-10:]]))


def environment(directory: Path) -> dict[str, str]:
    """Return the environment of a server. Settings for uvicorn are left out: the demo passes its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UVICORN_")}
    return {**kept, "STATE_DIRECTORY": str(directory)}
