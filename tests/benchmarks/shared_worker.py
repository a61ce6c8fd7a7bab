"""One process of the part `shared`: it reads commands from its stdin, a line of JSON each, and prints a line of JSON for each.

Run by `shared.py` with the kind of its storage and its place: `python shared_worker.py shared DIRECTORY`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from measure import VALUE, VALUES, encode, together
from redis.asyncio import Redis

from lab_state import Config, FileStorage, Manager

NAME = "state"


class Client(ABC):
    """What one process does with a state."""

    @abstractmethod
    async def start(self, place: str) -> None: ...

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    async def set(self, key: str) -> object: ...

    async def sets(self, tasks: int, seconds: float) -> float:
        """Return the number of durable sets a second. Each task of each process has a key of its own."""
        rate, _ = await together(lambda key: self.set(f"{os.getpid()}-{key}"), tasks, seconds)
        return rate


class Shared(Client):
    """A process of a shared state."""

    config = Config(NAME, shared=True)

    async def start(self, place: str) -> None:
        self.state = Manager(self.config, FileStorage(place))
        await self.state.start()

    async def stop(self) -> None:
        await self.state.stop()

    async def set(self, key: str) -> object:
        return await self.state.set(key, next(VALUES))

    async def role(self) -> str | None:
        return self.state.role

    async def fill(self, count: int) -> int:
        return await self.state.set_many({f"key-{number:07}": VALUE for number in range(count)})

    async def incrs(self, tasks: int, seconds: float) -> float:
        """Return the number of increments of one key a second."""
        rate, _ = await together(lambda _: self.state.incr("counter"), tasks, seconds)
        return rate

    async def updates(self, tasks: int, seconds: float) -> float:
        """Return the number of updates of one key a second."""
        rate, _ = await together(lambda _: self.state.update("updated", lambda old: old + 1, 0), tasks, seconds)
        return rate

    async def readable(self, revision: int) -> float:
        """Return the time at which a revision can be read here."""
        await self.state.wait_revision(revision, timeout=10)
        return time.time()


class Alone(Shared):
    """The only process of a state that is not shared."""

    config = Config(NAME, flush_interval=0)


class Sqlite(Client):
    """A table of SQLite, in the mode that survives a power cut. A process that finds it locked waits."""

    async def start(self, place: str) -> None:
        self.connection = sqlite3.connect(Path(place) / "state.db", isolation_level=None, timeout=60)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute("CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")

    async def stop(self) -> None:
        self.connection.close()

    async def set(self, key: str) -> object:
        return self.connection.execute("REPLACE INTO state VALUES (?, ?)", (key, encode(next(VALUES))))


class RedisAlways(Client):
    """A client of a redis-server that syncs each write. Its place is the path of the socket."""

    async def start(self, place: str) -> None:
        self.redis = Redis(unix_socket_path=place)

    async def stop(self) -> None:
        await self.redis.aclose()

    async def set(self, key: str) -> object:
        return await self.redis.set(key, encode(next(VALUES)))


KINDS: dict[str, type[Client]] = {"shared": Shared, "alone": Alone, "sqlite": Sqlite, "redis": RedisAlways}


async def serve(client: Client) -> None:
    """Make the calls that the lines name, until the end of the input."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print(json.dumps("started"), flush=True)
    while line := await lines.readline():
        name, *arguments = json.loads(line)
        answer: Any = await getattr(client, name)(*arguments)
        print(json.dumps(answer), flush=True)


async def main(kind: str, place: str) -> None:
    client = KINDS[kind]()
    await client.start(place)
    try:
        await serve(client)
    finally:
        await client.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(main(*sys.argv[1:]))
