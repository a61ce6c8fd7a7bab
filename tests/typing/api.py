"""What the type checkers make of the interface; checked by both, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, assert_type

from pydantic import BaseModel

from lab_state import (
    Blocking,
    BlockingEntry,
    Cache,
    Change,
    Config,
    Entry,
    FileStorage,
    Items,
    Manager,
    MemoryCache,
    MemoryStorage,
    MirrorStatus,
    Misfit,
    Namespace,
    PlainItems,
    Reader,
    Reading,
    Recovery,
    RedisCache,
    StateView,
    Status,
    Storage,
    StorageSession,
    Transaction,
    __version__,
    escape_key,
    escape_name,
    read_state,
)
from lab_state.testing import FaultyStorage, ManualClock


@dataclass
class User:
    name: str


class Model(BaseModel):
    name: str


def pays(tx: Transaction) -> int:
    return tx.incr("paid", type=int)


async def pays_slowly(tx: Transaction) -> str:
    return tx.get("paid", type=str)


async def reading(state: Manager) -> None:
    assert_type(await state.get("key"), Any)
    assert_type(await state.get("key", 0), Any)
    assert_type(await state.get("key", type=User), User)
    assert_type(await state.get("key", type=Model), Model)
    assert_type(await state.get("key", None, type=User), User | None)
    assert_type(await state.get("key", User("Ann"), type=User), User)
    assert_type(await state.get("key", type=list[int]), list[int])
    assert_type(state.get_nowait("key", None, type=int), int | None)
    assert_type(await state.get_many(["a"], type=User), dict[str, User])
    assert_type(await state.get_many(["a"]), dict[str, Any])
    assert_type(await state.get_all(type=int), dict[str, int])
    assert_type(await state.get_all(type=int, on_mismatch="skip"), dict[str, int])
    assert_type(await state.get_many(["a"], type=int, on_mismatch="skip"), dict[str, int])
    assert_type(await state.check("users/", type=User), list[Misfit])
    assert_type(await state.keys(), list[str])
    assert_type(await state.exists("key"), bool)
    assert_type(await state.expires_in("key"), float | None)
    assert_type(await state.expires_in("key", 0.0), float | None)
    assert_type(await state.expires_in("key", "gone"), float | str | None)
    assert_type(len(state), int)
    assert_type("key" in state, bool)


async def iterating(state: Manager, tx: Transaction, blocking: Blocking, reader: Reader, view: StateView) -> None:
    assert_type(state.items(), Items[Any])
    assert_type(state.namespace("a").items("u", after="v", limit=5, reverse=True, type=User), Items[User])
    assert_type(reader.items(type=User), Items[User])
    assert_type(reader.items(type=User, on_mismatch="skip"), Items[User])
    assert_type(view.items(), Items[Any])
    assert_type(tx.items(type=User), PlainItems[User])
    assert_type(blocking.items(), PlainItems[Any])
    async with state.items(type=User) as items:
        async for key, user in items:
            assert_type(key, str)
            assert_type(user, User)
    with blocking.items(type=int) as numbers:
        assert_type(next(numbers), tuple[str, int])


def reading_at_once(state: Manager) -> None:
    assert_type(state.get_nowait("key"), Any)
    assert_type(state.get_nowait("key", type=User), User)
    assert_type(state.get_many_nowait(["a"], type=User), dict[str, User])
    assert_type(state.get_many_nowait(["a"]), dict[str, Any])
    assert_type(state.get_all_nowait("a", type=int), dict[str, int])
    assert_type(state.get_all_nowait(), dict[str, Any])
    assert_type(state.keys_nowait("a"), list[str])
    assert_type(state.expires_in_nowait("key"), float | None)
    assert_type(state.expires_in_nowait("key", "gone"), float | str | None)


def writing_at_once(state: Manager, users: Namespace, ttl: timedelta) -> None:
    assert_type(state.set_nowait("key", User("Ann"), ttl=ttl), int)
    assert_type(state.delete_nowait("key"), bool)
    assert_type(state.update_nowait("key", lambda n: n + 1, 0, type=int, ttl=5), int)
    assert_type(state.update_nowait("key", lambda user: user, type=User), User)
    assert_type(state.update_nowait("key", lambda _: "text"), str)
    assert_type(users.set_nowait("key", 1), int)
    state.set_nowait(5, 1)  # type: ignore[arg-type]


async def writing(state: Manager) -> None:
    assert_type(await state.set("key", User("Ann")), int)
    assert_type(await state.set_many({"key": 1}), int)
    assert_type(await state.delete("key"), bool)
    assert_type(await state.delete_many(["key"]), int)
    assert_type(await state.touch("key", 5), bool)
    assert_type(await state.delete_all(), int)
    assert_type(await state.pop("key", None, type=int), int | None)
    assert_type(await state.update("key", lambda n: n + 1, 0, type=int), int)
    assert_type(await state.update("key", lambda user: user, type=User), User)
    assert_type(await state.update("key", lambda _: "text"), str)
    assert_type(await state.update("key", lambda n: n + 1, 0, type=int, ttl=5), int)
    assert_type(await state.incr("key"), int | float)
    assert_type(await state.incr("key", type=int), int)
    assert_type(await state.incr("key", 2, type=int, default=5, ttl=5), int)
    assert_type(await state.incr("key", 0.5, type=float), float)
    assert_type(await state.incr("key", 0.5), int | float)
    assert_type(await state.set_if_absent("key", 1), bool)
    assert_type(await state.get_or_set("key", lambda: User("Ann"), type=User), User)
    assert_type(await state.get_or_set("key", dict), Any)


async def expiring(state: Manager, ttl: timedelta) -> None:
    assert_type(await state.set("key", 1, ttl=5), int)
    assert_type(await state.set("key", 1, ttl=ttl), int)
    assert_type(await state.set("key", 1, ttl=None), int)
    assert_type(await state.set_many({"key": 1}, ttl=0.5), int)
    assert_type(await state.set_if_absent("key", 1, ttl=ttl), bool)
    assert_type(await state.incr("key", ttl=5), int | float)
    assert_type(await state.incr("key", 0.5, ttl=ttl), int | float)
    assert_type(await state.get_or_set("key", lambda: User("Ann"), type=User, ttl=5), User)
    assert_type(await state.get_or_set("key", dict, ttl=ttl), Any)


async def namespaces(state: Manager) -> None:
    users = state.namespace("users")
    assert_type(users, Namespace)
    assert_type(users.prefix, str)
    assert_type(users.namespace("deep"), Namespace)
    assert_type(users.blocking, Blocking)
    assert_type(users.transaction(), AbstractAsyncContextManager[Transaction])
    assert_type(await users.get("key"), Any)
    assert_type(await users.get("key", type=User), User)
    assert_type(await users.get("key", None, type=User), User | None)
    assert_type(users.get_nowait("key", 0, type=int), int)
    assert_type(await users.get_many(["a"], type=int), dict[str, int])
    assert_type(await users.get_all("a", type=User), dict[str, User])
    assert_type(await users.keys(), list[str])
    assert_type(await users.exists("key"), bool)
    assert_type(await users.expires_in("key"), float | None)
    assert_type(len(users), int)
    assert_type("key" in users, bool)
    assert_type(await users.set("key", 1, ttl=5), int)
    assert_type(await users.set_many({"key": 1}), int)
    assert_type(await users.delete("key"), bool)
    assert_type(await users.delete_many(["key"]), int)
    assert_type(await users.touch("key", 5), bool)
    assert_type(await users.delete_all(), int)
    assert_type(await users.pop("key", type=User), User)
    assert_type(await users.update("key", lambda n: n + 1, 0, type=int), int)
    assert_type(await users.get_or_set("key", dict), Any)
    assert_type(await users.set_if_absent("key", 1), bool)
    assert_type(await users.incr("key"), int | float)
    await users.flush()
    await users.wait_durable(5)


async def entries(state: Manager, ttl: timedelta) -> None:
    counter = state.entry("counter", int)
    assert_type(counter, Entry[int])
    assert_type(state.entry("counter", int, default=0), Entry[int])
    assert_type(state.entry("user", User, default=None), Entry[User | None])
    assert_type(state.entry("numbers", list[int]), Entry[list[int]])
    assert_type(state.entry("anything", int | None), Entry[Any])
    assert_type(state.entry("anything", Literal["a", "b"], default="a"), Entry[Any])
    assert_type(state.namespace("users").entry("ann", User), Entry[User])
    declared: Entry[Literal["a", "b"]] = state.entry("anything", Literal["a", "b"])
    assert_type(await declared.get(), Literal["a", "b"])
    assert_type(await counter.get(), int)
    assert_type(await state.entry("user", User, default=None).get(), User | None)
    assert_type(await counter.set(1), int)
    assert_type(await counter.set(1, ttl=ttl), int)
    assert_type(await counter.update(lambda n: n + 1), int)
    assert_type(await counter.update(lambda n: n + 1, ttl=ttl), int)
    assert_type(await counter.delete(), bool)
    assert_type(await counter.exists(), bool)
    assert_type(counter.key, str)
    assert_type(await counter.incr(), int)
    assert_type(await counter.incr(2, ttl=ttl), int)
    assert_type(await state.entry("mean", float).incr(0.5), float)
    assert_type(await counter.pop(), int)
    assert_type(await state.entry("user", User, default=None).pop(), User | None)
    assert_type(await counter.set_if_absent(1, ttl=ttl), bool)
    assert_type(await counter.touch(None), bool)
    assert_type(await counter.expires_in(), float | None)
    assert_type(await counter.expires_in("gone"), float | str | None)
    assert_type(counter.get_nowait(), int)
    assert_type(counter.set_nowait(1, ttl=5), int)
    assert_type(counter.update_nowait(lambda n: n + 1, ttl=5), int)
    assert_type(counter.delete_nowait(), bool)
    assert_type(counter.expires_in_nowait(0), float | int | None)
    await counter.incr(0.5)  # type: ignore[arg-type]
    await state.entry("user", User).incr()  # type: ignore[misc]
    await counter.set("text")  # type: ignore[arg-type]
    await counter.update(lambda _: "text")  # type: ignore[arg-type,return-value]


async def transactions(state: Manager) -> None:
    async with state.transaction() as tx:
        assert_type(tx, Transaction)
        assert_type(tx.namespace("users"), Transaction)
        assert_type(tx.get("key"), Any)
        assert_type(tx.get("key", 0), Any)
        assert_type(tx.get("key", type=User), User)
        assert_type(tx.get("key", None, type=User), User | None)
        assert_type(tx.get("key", User("Ann"), type=User), User)
        assert_type(tx.get_many(["a"]), dict[str, Any])
        assert_type(tx.get_many(["a"], type=User), dict[str, User])
        assert_type(tx.get_all(), dict[str, Any])
        assert_type(tx.get_all("a", type=int), dict[str, int])
        assert_type(tx.exists("key"), bool)
        assert_type(tx.keys("a"), list[str])
        assert_type(tx.expires_in("key"), float | None)
        assert_type(len(tx), int)
        assert_type("key" in tx, bool)
        tx.set("key", User("Ann"))
        tx.set("key", 1, ttl=timedelta(hours=1))
        tx.set_many({"key": 1}, ttl=5)
        assert_type(tx.revision, int)
        assert_type(tx.delete("key"), bool)
        assert_type(tx.delete_many(["key"]), int)
        assert_type(tx.touch("key", 5), bool)
        assert_type(tx.delete_all("a"), int)
        assert_type(tx.pop("key"), Any)
        assert_type(tx.pop("key", type=User), User)
        assert_type(tx.pop("key", None, type=User), User | None)
        assert_type(tx.update("key", lambda n: n + 1, 0, type=int), int)
        assert_type(tx.update("key", lambda user: user, type=User), User)
        assert_type(tx.update("key", lambda _: "text"), str)
        assert_type(tx.get_or_set("key", lambda: User("Ann"), type=User), User)
        assert_type(tx.get_or_set("key", dict, ttl=5), Any)
        assert_type(tx.set_if_absent("key", 1, ttl=5), bool)
        assert_type(tx.incr("key"), int | float)
        assert_type(tx.incr("key", 0.5, ttl=5), int | float)
        tx.set(5, 1)  # type: ignore[arg-type]
        tx.get()  # type: ignore[call-overload]


def threads(state: Manager) -> None:
    calls = state.blocking
    assert_type(calls, Blocking)
    assert_type(calls.get("key"), Any)
    assert_type(calls.get("key", 0), Any)
    assert_type(calls.get("key", type=User), User)
    assert_type(calls.get("key", None, type=User), User | None)
    assert_type(calls.get("key", User("Ann"), type=User), User)
    assert_type(calls.get_many(["a"]), dict[str, Any])
    assert_type(calls.get_many(["a"], type=User), dict[str, User])
    assert_type(calls.get_all(), dict[str, Any])
    assert_type(calls.get_all("a", type=int), dict[str, int])
    assert_type(calls.exists("key"), bool)
    assert_type(calls.keys("a"), list[str])
    assert_type(calls.expires_in("key"), float | None)
    assert_type(calls.set("key", User("Ann")), int)
    assert_type(calls.set("key", 1, ttl=timedelta(hours=1)), int)
    assert_type(calls.set_many({"key": 1}, ttl=5), int)
    assert_type(calls.delete("key"), bool)
    assert_type(calls.delete_many(["key"]), int)
    assert_type(calls.touch("key", 5), bool)
    assert_type(calls.delete_all("a"), int)
    assert_type(calls.pop("key"), Any)
    assert_type(calls.pop("key", type=User), User)
    assert_type(calls.pop("key", None, type=User), User | None)
    assert_type(calls.update("key", lambda n: n + 1, 0, type=int), int)
    assert_type(calls.update("key", lambda user: user, type=User), User)
    assert_type(calls.update("key", lambda _: "text"), str)
    assert_type(calls.get_or_set("key", lambda: User("Ann"), type=User), User)
    assert_type(calls.get_or_set("key", dict, ttl=5), Any)
    assert_type(calls.set_if_absent("key", 1, ttl=5), bool)
    assert_type(calls.incr("key"), int | float)
    assert_type(calls.incr("key", 0.5, ttl=5), int | float)
    assert_type(calls.incr("key", type=int), int)
    assert_type(calls.expires_in("key", "gone"), float | str | None)
    assert_type(len(calls), int)
    assert_type("key" in calls, bool)
    assert_type(calls.namespace("users"), Blocking)
    counter = calls.entry("counter", int, default=0)
    assert_type(counter, BlockingEntry[int])
    assert_type(calls.entry("user", User, default=None), BlockingEntry[User | None])
    assert_type(counter.key, str)
    assert_type(counter.get(), int)
    assert_type(counter.exists(), bool)
    assert_type(counter.expires_in(), float | None)
    assert_type(counter.expires_in("gone"), float | str | None)
    assert_type(counter.set(1, ttl=5), int)
    assert_type(counter.set_if_absent(1, ttl=5), bool)
    assert_type(counter.update(lambda n: n + 1, ttl=5), int)
    assert_type(counter.incr(2, ttl=5), int)
    assert_type(calls.entry("mean", float).incr(0.5), float)
    assert_type(counter.touch(5), bool)
    assert_type(counter.delete(), bool)
    assert_type(counter.pop(), int)
    counter.set("text")  # type: ignore[arg-type]
    calls.flush()
    calls.wait_durable(5)
    calls.wait_durable(5, timeout=0.5)
    calls.catch_up()
    calls.wait_revision(5, timeout=0.5)
    calls.set(5, 1)  # type: ignore[arg-type]
    calls.get()  # type: ignore[call-overload]


async def watching(state: Manager) -> None:
    assert_type(state.watch(), AbstractAsyncContextManager[AsyncIterator[Change]])
    async with state.watch("a", durable=True) as changes:
        async for change in changes:
            assert_type(change, Change)
            assert_type(change.key, str)
            assert_type(change.kind, Literal["set", "delete", "expire", "resync"])
            assert_type(change.revision, int)
    async with state.namespace("users").watch() as changes:
        assert_type(await anext(changes), Change)


async def life(state: Manager) -> None:
    async with state as same:
        assert_type(same, Manager)
    assert_type(state.status(), Status)
    assert_type(state.revision, int)
    await state.flush()
    await state.wait_durable(5)
    await state.wait_durable(timeout=1)
    await state.wait_durable(5, timeout=None)
    await state.catch_up()
    assert_type(await state.backup("backup.json"), int)
    assert_type(await state.backup(Path("backup.json")), int)
    await state.backup(b"backup.json")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await state.wait_revision(5)
    await state.wait_revision(5, timeout=1)
    assert_type(state.role, Literal["owner", "follower"] | None)
    assert_type(await state.transact(pays), int)
    assert_type(await state.transact(pays_slowly), str)
    assert_type(await state.namespace("users").transact(pays), int)
    await state.wait_durable(5, timeout="1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert_type(state.name, str)
    assert_type(state.status().mirror, MirrorStatus | None)


async def mirror(cache: RedisCache, memory: MemoryCache) -> None:
    for each in (cache, memory):
        kept: Cache = each
        Manager("name", MemoryStorage(), kept)
    async with cache.reader("name", local=True) as reader:
        assert_type(reader, Reader)
        assert_type(await reader.get("key"), Any)
        assert_type(await reader.get("key", type=User), User)
        assert_type(await reader.get("key", None, type=Model), Model | None)
        assert_type(await reader.get("key", 0, type=int), int)
        assert_type(await reader.get_many(["a"], type=User), dict[str, User])
        assert_type(await reader.get_all(type=int), dict[str, int])
        assert_type(await reader.keys("a"), list[str])
        assert_type(await reader.exists("key"), bool)
        assert_type(await reader.revision(), int)
        await reader.wait_revision(5, timeout=1)
        await reader.wait_revision(5, timeout=None)
        assert_type(reader.watch("a"), AbstractAsyncContextManager[AsyncIterator[Change]])
        async with reader.watch("a") as changes:
            assert_type(changes, AsyncIterator[Change])
            async for change in changes:
                assert_type(change, Change)


async def view(storage: Storage) -> None:
    read = await read_state("my-module", storage)
    assert_type(read, StateView)
    assert_type(await read.get("key", type=User), User)
    assert_type(await read.get_all(), dict[str, Any])
    assert_type(len(read), int)
    assert_type(read.revision, int)
    assert_type(read.wall, float | None)
    assert_type(read.live, bool | None)
    assert_type(await storage.read("my-module"), Reading)


async def storages(file: FileStorage, memory: MemoryStorage, faulty: FaultyStorage, clock: ManualClock) -> None:
    for storage in (file, memory, faulty):
        each: Storage = storage
        Manager(Config(name="name"), each, clock=clock)
        Manager(Config("name", flush_interval=0), each)
        Config("name", 1.0)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    session: StorageSession = await file.open("name")
    assert_type(session.recovery, Recovery)


def texts() -> None:
    assert_type(escape_key("any text"), str)
    assert_type(escape_name("any text"), str)
    assert_type(__version__, str)
