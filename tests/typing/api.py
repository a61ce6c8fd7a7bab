"""What the type checkers make of the interface; checked by both, never run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_type

from pydantic import BaseModel

from lab_state import (
    Cache,
    Change,
    Config,
    FileStorage,
    Manager,
    MemoryCache,
    MemoryStorage,
    Reader,
    Recovery,
    RedisCache,
    Status,
    Storage,
    StorageSession,
)
from lab_state.testing import FaultyStorage, ManualClock


@dataclass
class User:
    name: str


class Model(BaseModel):
    name: str


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
    assert_type(await state.keys(), list[str])
    assert_type(await state.exists("key"), bool)
    assert_type(len(state), int)
    assert_type("key" in state, bool)


async def writing(state: Manager) -> None:
    assert_type(await state.set("key", User("Ann")), int)
    assert_type(await state.set_many({"key": 1}), int)
    assert_type(await state.delete("key"), bool)
    assert_type(await state.delete_many(["key"]), int)
    assert_type(await state.delete_all(), int)
    assert_type(await state.pop("key", None, type=int), int | None)
    assert_type(await state.update("key", lambda n: n + 1, 0, type=int), int)
    assert_type(await state.update("key", lambda user: user, type=User), User)
    assert_type(await state.update("key", lambda _: "text"), str)
    assert_type(await state.incr("key"), int)
    assert_type(await state.incr("key", 0.5), float)
    assert_type(await state.set_if_absent("key", 1), bool)
    assert_type(await state.get_or_set("key", lambda: User("Ann"), type=User), User)
    assert_type(await state.get_or_set("key", dict), Any)


async def life(state: Manager) -> None:
    async with state as same:
        assert_type(same, Manager)
    assert_type(state.status(), Status)
    assert_type(state.revision, int)
    await state.flush()
    await state.wait_durable(5)


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
        async with reader.watch("a") as changes:
            async for change in changes:
                assert_type(change, Change)


async def storages(file: FileStorage, memory: MemoryStorage, faulty: FaultyStorage, clock: ManualClock) -> None:
    for storage in (file, memory, faulty):
        each: Storage = storage
        Manager(Config(name="name"), each, clock=clock)
    session: StorageSession = await file.open("name")
    assert_type(session.recovery, Recovery)
