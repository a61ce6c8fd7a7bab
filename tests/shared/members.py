"""Managers of one shared state: several in this process, and others in processes that can be killed or stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lab_state import Config, FileStorage, LabStateError, Manager
from lab_state.cache import Cache
from lab_state.shared._address import address_of
from lab_state.shared._election import Election
from lab_state.shared._last_records import LastRecords
from lab_state.shared._member import Member
from lab_state.shared._owner import Owner

NAME = "lab"


def manager(directory: Path, cache: Cache | None = None, **settings: Any) -> Manager:
    """Make a manager of the shared state. Settings may be `clock`, `logger`, `on_fenced` and `schema` of `Manager`, or those of `Config`."""
    given = {key: settings.pop(key) for key in ("clock", "logger", "on_fenced", "schema") if key in settings}
    return Manager(Config(NAME, shared=True, **settings), FileStorage(directory), cache, **given)


@asynccontextmanager
async def members(directory: Path, count: int, **settings: Any) -> AsyncIterator[list[Manager]]:
    """Start managers of the shared state, one after the other. The first one is the owner. Stop the last one first."""
    started: list[Manager] = []
    try:
        for _ in range(count):
            one = manager(directory, **settings)
            await one.start()
            started.append(one)
        yield started
    finally:
        for one in reversed(started):
            await one.stop()


def member_of(one: Manager) -> Member:
    running = one._running
    assert isinstance(running, Member)
    return running


def owner_of(one: Manager) -> Owner:
    owner = member_of(one)._owner
    assert owner is not None
    return owner


async def crash(one: Manager) -> None:
    """End an owner of this process as SIGKILL would: its connections and its lock end, and nothing more is written."""
    member = member_of(one)
    owner = owner_of(one)
    assert owner.flusher is not None
    session = owner.flusher.abort()
    owner._close()
    if member._look is not None:
        member._look.cancel()
    await session.aclose()


async def bury(one: Manager) -> None:
    """Stop a manager after `crash`."""
    with contextlib.suppress(LabStateError):
        await one.stop()


def cut(one: Manager) -> None:
    """Cut the connections of an owner."""
    for connection in list(owner_of(one).server._connections):
        connection.close()


class _Forgetful(LastRecords):
    """The last records of an owner, which keeps none."""

    def add(self, start: int, end: int, data: bytes) -> None:
        super().add(start, end, data)
        self._records.clear()
        self._bytes = 0


@asynccontextmanager
async def apart(owner: Manager) -> AsyncIterator[None]:
    """Cut the connections of an owner. In the block, no process can connect again. After it, each one has to load."""
    gate, real = asyncio.Event(), Election.role

    async def role(self: Election, *, has_copy: bool) -> Any:
        await gate.wait()
        return await real(self, has_copy=has_copy)

    flusher = owner_of(owner).flusher
    assert flusher is not None
    flusher.last_records = _Forgetful((), flusher.durable_revision)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Election, "role", role)
        cut(owner)
        yield
    gate.set()


def connect(directory: Path) -> socket.socket:
    """Connect to the owner, without a word."""
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(address_of(str(directory), NAME).path)
    raw.setblocking(False)
    return raw


PROGRAM = """
import asyncio, json, logging, os, signal, sys
import lab_state
from lab_state import Config, FileStorage, Manager

async def main():
    state = Manager(Config("lab", shared=True, **json.loads(sys.argv[2])), FileStorage(sys.argv[1]))
    tasks = set()

    async def run(number, source):
        try:
            names = {"state": state, "asyncio": asyncio, "os": os, "signal": signal, "lab_state": lab_state}
            exec("async def work():\\n" + "\\n".join("    " + line for line in source.splitlines()), names)
            answer = {"result": await names["work"]()}
        except BaseException as error:
            answer = {"error": [type(error).__name__, str(error), getattr(error, "outcome", None)]}
        print(json.dumps({"number": number, **answer}), flush=True)

    while line := await asyncio.to_thread(sys.stdin.readline):
        task = asyncio.create_task(run(*json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

asyncio.run(main())
"""
"""Runs what it reads: each line is a number, and the body of a coroutine function with `state`, a manager."""


class RemoteError(Exception):
    """An error in another process: its class, its text, and its outcome."""

    def __init__(self, kind: str, text: str, outcome: str | None) -> None:
        super().__init__(kind, text, outcome)
        self.kind, self.text, self.outcome = kind, text, outcome


class Process:
    """Another process with a manager of the shared state."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, source: str) -> asyncio.Future[Any]:
        """Run the body of a coroutine function there. Return the future of its result."""
        number = len(self._waiting)
        done = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, source]).encode() + b"\n")
        return done

    async def do(self, source: str) -> Any:
        """Run the body of a coroutine function there, and return its result."""
        return await self.begin(source)

    async def start(self) -> str:
        """Start the manager, and return its role."""
        role = await self.do("await state.start()\nreturn state.role")
        assert isinstance(role, str)
        return role

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            answer = json.loads(line)
            done = self._waiting[answer["number"]]
            if "error" in answer:
                done.set_exception(RemoteError(*answer["error"]))
                done.exception()
            else:
                done.set_result(answer["result"])

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill the process, and wait for its end."""
        if self._process.returncode is None:
            self._process.kill()
        await self.ended()

    async def ended(self) -> int:
        """Wait for the end of the process, and return how it ended."""
        code = await self._process.wait()
        await self._reading
        if self._process.stdin is not None:
            self._process.stdin.close()
        return code


@asynccontextmanager
async def processes(directory: Path, count: int = 1, **settings: Any) -> AsyncIterator[list[Process]]:
    """Run processes with a manager that is not started. Kill them at the end."""
    arguments = (sys.executable, "-c", PROGRAM, str(directory), json.dumps(settings))
    pipe = asyncio.subprocess.PIPE
    begun = [
        Process(await asyncio.create_subprocess_exec(*arguments, stdin=pipe, stdout=pipe, limit=2**24))
        for _ in range(count)
    ]
    try:
        yield begun
    finally:
        for process in begun:
            await process.kill()
