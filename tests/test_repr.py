"""Every public object shows what it is, in one line, without a value or a credential."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

import lab_state
from lab_state import (
    Config,
    FileStorage,
    Generation,
    Manager,
    MemoryCache,
    MemoryStorage,
    MigrationDraft,
    Misfit,
    RedisCache,
    Restored,
    S3Storage,
    Schema,
    list_states,
    read_state,
)
from lab_state._migrations._draft import MigrationCore, StateDraft
from lab_state._state import State
from lab_state.cache import SPOILT, Slice, Step
from lab_state.integrations.key_value import LabStateStore as KeyValueStore
from lab_state.integrations.litestar import LabStatePlugin, LabStateStore
from lab_state.integrations.prometheus import LabStateCollector
from lab_state.integrations.starlette import ReadYourWrites
from lab_state.testing import FaultyStorage, ManualClock

SECRET = "hunter2"

PAGES = ("cache", "storage", "testing", *(f"integrations.{name}" for name in (
    "aiohttp", "fastapi", "key_value", "litestar", "prometheus", "starlette"
)))  # fmt: skip
MODULES = [lab_state, *(importlib.import_module(f"lab_state.{name}") for name in PAGES)]

LEFT_OUT = {"StorageConformance"}
"""Base classes of tests: pytest makes their instances."""


def public_classes() -> set[str]:
    """Return the public classes, as `module.name`, that have instances: without protocols and errors."""
    found = set()
    for module in MODULES:
        for name in module.__all__:
            public = getattr(module, name)
            if inspect.isclass(public) and not getattr(public, "_is_protocol", False) and name not in LEFT_OUT:
                found.add(f"{public.__module__}.{name}")
    return {name for name in found if not name.startswith("lab_state.exceptions.")}


async def objects(directory: Path) -> list[Any]:
    """Return an instance of each public class, and of the sessions and watches that others get, with a secret inside."""
    storage, cache = MemoryStorage(), MemoryCache()
    state = Manager(Config("jobs", flush_interval=0), FaultyStorage(storage), cache, clock=ManualClock())
    async with state, cache.reader("jobs") as reader, state.watch("us") as changes, reader.watch() as followed:
        await state.set("user", SECRET)
        await reader.wait_revision(state.revision)
        async with state.transaction() as tx:
            tx.set("other", SECRET)
            shown: list[Any] = [tx, tx.namespace("a"), tx.items(), state.items()]
        view = await read_state("jobs", storage)
        reading = await storage.read("jobs")
        users = state.namespace("users")
        file = FileStorage(directory)
        session, other = await file.open("jobs"), await storage.open("other")
        shown += [state, state.config, state.status(), state.status().mirror, state.metrics(), reader, view, reading]
        shown += [state.blocking, state.entry("user", str), state.blocking.entry("user", str), users, users.blocking]
        shown += [file, storage, FaultyStorage(storage), session, other, session.recovery, await anext(changes)]
        shown += [changes, followed, await cache.open("jobs", "me"), state._core.durability._session]  # type: ignore[attr-defined]
        shown += [cache, Slice({"user": SECRET.encode()}, {}, []), Step(1, 2, cleared=False), SPOILT]
        shown += [LabStatePlugin(jobs=state), LabStateStore(users), KeyValueStore(users), LabStateCollector(state)]
        shown += [
            ReadYourWrites(Starlette()),
            ManualClock(),
            RedisCache(f"redis://me:{SECRET}@host:7000"),
            S3Storage("bucket"),
        ]
        shown += [
            Misfit("user", "$", "an int"),
            Restored(3, 2),
            Generation(1, 2, 0.5, 0.6, 10, hole_before=False, in_use=True),
        ]
        shown += [Schema(1), MigrationDraft(MigrationCore("jobs", StateDraft(State()))), *await list_states(storage)]
        text = [repr(one) for one in shown]
        await session.aclose()
        await other.aclose()
    return list(zip(shown, text, strict=True))


async def test_every_public_object_shows_itself(tmp_path: Path) -> None:
    """The representation of each is one line of its own making, and shows no value and no credential."""
    shown = await objects(tmp_path)
    assert {f"{type(one).__module__}.{type(one).__name__}" for one, _ in shown} >= public_classes()
    for _, text in shown:
        assert text
        assert "\n" not in text
        assert " object at 0x" not in text, text
        assert SECRET not in text, text


def test_what_is_left_out_is_there() -> None:
    """Nothing is left out that does not exist."""
    assert {name for module in MODULES for name in module.__all__} >= LEFT_OUT
