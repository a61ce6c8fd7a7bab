"""Claims of a shared state on disk, connections to it, and an owner that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab_state import FileStorage, LockedError
from lab_state.storage._claim import Claim
from lab_state.storage._fs_socket import OwnSocket
from lab_state.storage.file import files_of

PROTOCOL = 1


def descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def names(directory: Path) -> list[str]:
    """Return the names of the files in a directory."""
    return sorted(path.name for path in directory.iterdir())


@asynccontextmanager
async def claimed(directory: Path, name: str = "lab") -> AsyncIterator[Claim]:
    """Claim a state, and release it at the end."""
    claim = await files_of(FileStorage(directory)).claim(name, PROTOCOL)
    try:
        yield claim
    finally:
        await claim.release()


@contextmanager
def accepted(claim: Claim) -> Iterator[socket.socket]:
    """Accept a waiting connection."""
    connection, _ = claim.listener.accept()
    with connection:
        yield connection


async def connected(directory: Path, name: str = "lab") -> OwnSocket:
    """Connect to an owner."""
    connection = await files_of(FileStorage(directory)).connect(name)
    assert connection is not None
    return connection


async def is_free(directory: Path, name: str = "lab") -> bool:
    """Return whether a process that does not share the state can start it."""
    try:
        session = await FileStorage(directory).open(name)
    except LockedError:
        return False
    await session.aclose()
    return True


def bind_stale(path: Path) -> None:
    """Create a socket file on which no socket listens."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))


class Gate:
    """A function in a thread. A call waits until the test opens the gate."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real
        self._entered, self._opened = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._entered.set()
        assert self._opened.wait(60)
        return self._real(*args, **kwargs)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 60)

    def open(self) -> None:
        self._opened.set()

    async def cancel(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task in the call. Then let the call go on."""
        await self.entered()
        task.cancel()
        await asyncio.sleep(0)
        self.open()
        with pytest.raises(asyncio.CancelledError):
            await task


OWNER = """
import asyncio, os, signal, sys
from lab_state import FileStorage
from lab_state.storage.file import files_of
async def main():
    claim = await files_of(FileStorage(sys.argv[1])).claim("lab", 1)
    with await files_of(FileStorage(sys.argv[1])).connect("lab") as mine, claim.listener.accept()[0] as theirs:
        child = 0
        if len(sys.argv) > 2:
            reading, writing = os.pipe()
            if (child := os.fork()) == 0:
                os.write(writing, b"1")
                signal.pause()
            os.read(reading, 1)  # the child runs, and has closed what it inherited
        print(child, flush=True)
        signal.pause()
asyncio.run(main())
"""
"""A program that claims a state, and waits to be killed. With a second argument, it forks a child that also waits."""


@contextmanager
def running(program: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run a program in another process. Kill it at the end."""
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def line_of(process: subprocess.Popen[str]) -> str:
    """Wait for a line of a program's output, and return it."""
    assert process.stdout is not None
    return process.stdout.readline()


@contextmanager
def killed(directory: Path, *fork: str) -> Iterator[None]:
    """Let a process claim a state, and kill the process. Its child runs until the end of the block."""
    with running(OWNER, directory, *fork) as process:
        child = int(line_of(process))
        process.kill()
        process.wait()
        try:
            yield
        finally:
            if child:
                os.kill(child, signal.SIGKILL)  # it was running until now
