"""A schema in a shared state: the owner migrates before others come in, and a process with another schema is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from members import NAME, bury, crash, manager, member_of, owner_of
from running import until

from lab_state import FileStorage, InvalidValueError, Manager, MigrationDraft, MigrationError, Schema, SchemaError
from lab_state._loading import load


class User(msgspec.Struct):
    age: int


def double(draft: MigrationDraft) -> None:
    for key, value in draft.items("n/"):
        draft.set(key, value * 2)


def schema(version: int, **more: Any) -> Schema:
    made = Schema(version, **more)
    for to in range(2, version + 1):
        made.migration(to=to)(double)
    return made


def member(directory: Path, code: Schema | None, **settings: Any) -> Manager:
    return manager(directory, schema=code, **settings)


async def filled(directory: Path) -> None:
    async with Manager(NAME, FileStorage(directory)) as state:
        await state.set_many({"n/a": 1, "n/b": 2})


async def versions(directory: Path) -> tuple[int, int]:
    return (await load(NAME, FileStorage(directory))).state.versions


async def test_the_owner_migrates(tmp_path: Path) -> None:
    """The owner migrates before it admits others, whether they start then or wait. All have the new values and revisions."""
    await filled(tmp_path)
    code = schema(2)
    first, second = member(tmp_path, code), member(tmp_path, code)
    await asyncio.gather(first.start(), second.start())
    async with member(tmp_path, code) as third:
        for state in (first, second, third):
            assert (await state.get_all(), state.revision, state.durable_revision) == ({"n/a": 2, "n/b": 4}, 2, 2)
        assert await third.set("n/c", 5) == 3
    owner, follower = (first, second) if first.role == "owner" else (second, first)
    await owner.stop()
    await follower.set("n/d", 1)
    await follower.stop()
    assert await versions(tmp_path) == (2, 2)


async def test_a_copy_from_before_gets_the_migration(tmp_path: Path) -> None:
    """A process with a copy from before the migration, whose code `readable_by` allows, gets the record of the migration."""
    old = schema(1)
    first, second = member(tmp_path, old), member(tmp_path, old)
    await first.start()
    await second.start()
    await first.set_many({"n/a": 1, "n/b": 2})
    await second.catch_up()
    held = asyncio.Event()

    election = type(member_of(second)._election)
    original = election.role
    with pytest.MonkeyPatch.context() as patch:

        async def role(self: Any, *, has_copy: bool) -> Any:
            if has_copy:
                await held.wait()
            return await original(self, has_copy=has_copy)

        patch.setattr(election, "role", role)
        await crash(first)
        newer = member(tmp_path, schema(2, readable_by=1))
        await newer.start()
        assert newer.revision == 2
        held.set()
        await until(lambda: second.revision == 2)
    assert await second.get_all() == {"n/a": 2, "n/b": 4}
    assert second.role == "follower"
    await second.stop()
    await newer.stop()
    await bury(first)
    assert await versions(tmp_path) == (2, 1)


@pytest.mark.parametrize("code", [None, 1, 3])
async def test_a_process_with_another_schema(tmp_path: Path, code: int | None) -> None:
    """An older process, one without a schema, and a newer one that would migrate the state are refused. The owner goes on."""
    async with member(tmp_path, schema(2)) as owner:
        await owner.set("n/a", 1)
        other = member(tmp_path, None if code is None else schema(code))
        with pytest.raises(
            SchemaError, match=f"this process has version {code or 1}.* a migration needs all processes to stop"
        ):
            await other.start()
        await owner.set("n/a", 2)
        async with member(tmp_path, schema(2)) as follower:
            assert await follower.get("n/a") == 2
        await until(lambda: owner.status().followers == 0)


async def test_a_process_that_readable_by_allows(tmp_path: Path) -> None:
    """An older process follows if `readable_by` allows it. As the next owner it keeps the versions of the state."""
    first, second = member(tmp_path, schema(3, readable_by=2)), member(tmp_path, schema(2))
    await first.start()
    await first.set("n/a", 1)
    await second.start()
    await second.set("n/a", 2)
    await first.stop()
    await second.set("n/a", 3)
    assert second.role == "owner"
    await second.stop()
    assert await versions(tmp_path) == (3, 2)


async def test_a_follower_meets_another_schema(tmp_path: Path) -> None:
    """If newer code migrates the state between two owners, a process that does not fit loses its state with a SchemaError."""
    first, second = member(tmp_path, schema(1)), member(tmp_path, schema(1))
    await first.start()
    await second.start()
    await first.set("n/a", 1)
    election = type(member_of(second)._election)
    original, held = election.role, asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:

        async def role(self: Any, *, has_copy: bool) -> Any:
            if has_copy:
                await held.wait()
            return await original(self, has_copy=has_copy)

        patch.setattr(election, "role", role)
        await crash(first)
        async with member(tmp_path, schema(2)):
            held.set()
            with pytest.raises(SchemaError, match="with version 2 of the schema, and this process has version 1"):
                await second.set("n/a", 2)
    with pytest.raises(SchemaError):
        await second.stop()
    await bury(first)


async def test_a_takeover_of_a_newer_state(tmp_path: Path) -> None:
    """A process that takes over finds that newer code has migrated the state, and loses its state."""
    first, second = member(tmp_path, schema(1)), member(tmp_path, schema(1))
    await first.start()
    await second.start()
    await first.set("n/a", 1)
    election = type(member_of(second)._election)
    original, held = election.role, asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:

        async def role(self: Any, *, has_copy: bool) -> Any:
            if has_copy:
                await held.wait()
            return await original(self, has_copy=has_copy)

        patch.setattr(election, "role", role)
        await crash(first)
        async with member(tmp_path, schema(2)):
            pass
        held.set()
        with pytest.raises(SchemaError, match=r"was written at .* by version 2 of the schema"):
            await second.set("n/a", 2)
    with pytest.raises(SchemaError):
        await second.stop()
    await bury(first)
    assert await versions(tmp_path) == (2, 2)


async def test_a_migration_that_fails(tmp_path: Path) -> None:
    """The start fails, and releases the state untouched."""
    await filled(tmp_path)
    broken = Schema(2)
    broken.migration(to=2)(lambda draft: draft.get("missing"))
    with pytest.raises(MigrationError, match="failed with KeyNotFoundError"):
        await member(tmp_path, broken).start()
    async with member(tmp_path, schema(2)) as state:
        assert (await state.get_all(), state.revision) == ({"n/a": 2, "n/b": 4}, 2)


async def test_typed_writes_of_each_process(tmp_path: Path) -> None:
    """Each process refuses values that are not of their type, in each writing call."""
    code = Schema(1, types={"users/": User, "n": int})
    async with member(tmp_path, code) as first, member(tmp_path, code) as second:
        for state in (first, second):
            await state.set("users/ann", User(3))
            with pytest.raises(InvalidValueError, match=r"at `\$.age`"):
                await state.set("users/ann", {"age": "x"})
            with pytest.raises(InvalidValueError, match=r"Expected `int`"):
                await state.update("users/ann", lambda user: {**user, "age": "x"})
            with pytest.raises(InvalidValueError, match=r"Expected `int`"):
                await state.get_or_set("users/new", lambda: {"age": "x"})
            with pytest.raises(InvalidValueError, match=r"Expected `int`"):
                await state.incr("n", 0.5)
            async with state.transaction() as tx:
                with pytest.raises(InvalidValueError, match=r"Expected `int`"):
                    tx.set("users/ann", {"age": "x"})
            assert await state.get_all() == {"users/ann": {"age": 3}}
        assert owner_of(first).flusher is not None
