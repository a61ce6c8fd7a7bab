"""States for the tests of the command: on disk or in a bucket; stopped, running, or running and shared."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from command import Done, command, start
from msgspec import Raw
from s3_world import Bucket, endpoint

from lab_state import Config, FileStorage, Manager, S3Storage, Storage
from lab_state.cli import _client
from lab_state.shared._messages import Set

Kind = Literal["stopped", "running", "shared", "stopped in a bucket", "running in a bucket"]
KINDS: tuple[Kind, ...] = ("stopped", "running", "shared", "stopped in a bucket", "running in a bucket")


class World:
    """One state with the name `shop`, and the command."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        self.kind = kind
        self.directory = directory
        self.env: dict[str, str] = {}
        self.manager: Manager | None = None
        if self.in_bucket:
            self.bucket = Bucket()
            self.env = {"AWS_ENDPOINT_URL": endpoint()}

    @property
    def in_bucket(self) -> bool:
        return self.kind.endswith("bucket")

    @property
    def is_running(self) -> bool:
        return self.kind.startswith(("running", "shared"))

    @property
    def place(self) -> str:
        return f"s3://{self.bucket.name}/states" if self.in_bucket else str(self.directory / "state")

    @property
    def state(self) -> str:
        return f"{self.place}/shop"

    def storage(self) -> Storage:
        if self.in_bucket:
            return S3Storage(self.bucket.name, prefix="states", endpoint_url=endpoint(), region_name="us-east-1")
        return FileStorage(self.directory / "state")

    @asynccontextmanager
    async def filled(self) -> AsyncGenerator[None]:
        """Make some changes. Then stop the state, or let it run for the time of the block."""
        shared = self.kind == "shared"
        config = Config(name="shop", flush_interval=0, shared=shared)
        async with Manager(config, self.storage()) as state:
            await state.set_many({"stock/apple": 12, "stock/pear": {"n": 3, "of": ["x", None]}})
            await state.set("cart/ann", ["apple"], ttl=3600)
            await state.set("odd\n\x1b[31mkey", "ü\x1b\u202e")
            if self.is_running:
                self.manager = state
                yield
                return
        yield

    async def run(self, *arguments: Any, given: bytes | str = b"", env: dict[str, str] | None = None) -> Done:
        """Run the command, while the event loop of the test goes on."""
        return await asyncio.to_thread(
            command, *arguments, cwd=self.directory, given=given, env={**self.env, **(env or {})}
        )

    async def reading(self) -> dict[str, Any]:
        """Return all values, as the library reads them."""
        from lab_state import read_state  # noqa: PLC0415

        return await (await read_state("shop", self.storage())).get_all()


def script(path: Path, code: str) -> str:
    """Write a program for $EDITOR, and return its path."""
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return str(path)


OWNER = """
import asyncio, sys
from lab_state import Config, FileStorage, Manager
async def main():
    async with Manager(Config(name="shop", shared=True), FileStorage(sys.argv[1])) as state:
        await state.set("a", 0)
        print(flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@asynccontextmanager
async def owner(directory: Path) -> AsyncGenerator[subprocess.Popen[bytes]]:
    """Run the owner of a shared state in another process."""
    process = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", OWNER, str(directory)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    try:
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)


def set_to(value: bytes) -> _client.Make:
    return lambda n, ack, _: Set(n, ack, "a", Raw(value), None)


def on_terminal(
    *arguments: str, cwd: Path, columns: int = 80, env: dict[str, str] | None = None, typed: bytes = b""
) -> Done:
    """Run the command on a terminal, and return what the terminal gets."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    given = {"COLUMNS": str(columns), "TERM": "xterm", **(env or {})}
    run = start(*arguments, cwd=cwd, env=given, terminal=theirs)
    os.close(theirs)
    os.write(ours, typed)
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                return
            parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    done = run.wait()
    reader.join()
    os.close(ours)
    return Done(done.code, b"".join(parts), b"")
