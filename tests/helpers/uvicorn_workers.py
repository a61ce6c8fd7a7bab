"""A uvicorn server with several workers, in a separate process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


@asynccontextmanager
async def workers(
    application: str, count: int, directory: Path
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run an application with workers, and yield the server and its URL when all workers serve. Kill all processes at the end.

    Args:
        application: The folder and the name of the module, such as `docs/examples/workers_app`.
        count: The number of workers.
        directory: The directory in which the server runs. Its folder `state` has the state.
    """
    folder, module = os.path.split(application)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "--app-dir", folder, f"{module}:app", "--workers", str(count)),
        *("--port", "0", "--no-access-log"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "STATE_DIRECTORY": "state"},
        start_new_session=True,
    )
    try:
        yield process, await _url_of(process, count)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # the workers, too
        await process.communicate()


async def _url_of(process: asyncio.subprocess.Process, count: int) -> str:
    """Return the URL that the server prints, when all workers serve."""
    assert process.stdout is not None
    said = b""
    async for line in process.stdout:
        said += line
        if said.count(b"Application startup complete") == count:
            found = re.search(rb"unning on (http://127\.0\.0\.1:[1-9]\d*)", said)
            assert found is not None
            return found[1].decode()
    raise AssertionError(said.decode())
