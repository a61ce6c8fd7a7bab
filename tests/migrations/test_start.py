"""The start of a state with a schema: migrated as one change, or left untouched."""

from __future__ import annotations

import logging
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import TypeAdapter
from running import flusher_of

from lab_state import (
    Config,
    FileStorage,
    Manager,
    MemoryStorage,
    MigrationDraft,
    MigrationError,
    Restored,
    Schema,
    SchemaError,
    Storage,
    UnavailableError,
    copy_state,
    read_state,
    restore_state,
)
from lab_state._codec import decode_snapshot
from lab_state._entries import Expiring
from lab_state._loading import load
from lab_state._migrations import ANY
from lab_state.testing import FaultyStorage, ManualClock


class User(msgspec.Struct):
    first: str
    last: str
    age: int = 0


def split_names(draft: MigrationDraft) -> None:
    """Split the name of each user."""
    for key, user in draft.get_all("users/").items():
        first, _, last = user.pop("name").partition(" ")
        draft.set(key, {**user, "first": first, "last": last})


def rename_keys(draft: MigrationDraft) -> None:
    """Move the users to another prefix."""
    for key in draft.keys("users/"):
        draft.move(key, key.replace("users/", "people/"))


def people(version: int = 2, **more: Any) -> Schema:
    """Return the schema of a version."""
    schema = Schema(version, **more)
    for to, function in enumerate((split_names, rename_keys)[: version - 1], 2):
        schema.migration(to=to)(function)
    return schema


OLD: dict[str, Any] = {"users/ann": {"name": "Ann B", "age": 30}, "users/bob": {"name": "Bob C"}, "n": 1}
NEW: dict[str, Any] = {
    "n": 1,
    "users/ann": {"age": 30, "first": "Ann", "last": "B"},
    "users/bob": {"first": "Bob", "last": "C"},
}


async def filled(storage: Storage) -> None:
    async with Manager("people", storage) as state:
        await state.set_many(OLD)


async def versions(storage: Storage) -> tuple[int, int]:
    return (await load("people", storage)).state.versions


@pytest.fixture(params=["files", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return FileStorage(tmp_path) if request.param == "files" else MemoryStorage()


async def test_a_state_is_migrated(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    """All migrations are one change. The state then has the new version, and is not migrated again."""
    await filled(storage)
    caplog.set_level(logging.INFO)
    async with Manager("people", storage, schema=people(3, types={"people/": User})) as state:
        assert (state.revision, state.durable_revision) == (2, 2)
        assert await state.get_all("people/", type=User) == {
            "people/ann": User("Ann", "B", 30),
            "people/bob": User("Bob", "C"),
        }
        assert await state.keys() == ["n", "people/ann", "people/bob"]
    assert [
        record.getMessage()
        for record in caplog.records
        if ": migrates" in record.getMessage() or ": the migration" in record.getMessage()
    ] == [
        "people: migrates from version 1 of the schema to version 3",
        "people: the migration split_names to version 2 is done (keys that differ from the stored state: 2)",
        "people: the migration rename_keys to version 3 is done (keys that differ from the stored state: 4)",
    ]
    assert "(keys changed: 4); the change is revision 2, and the state before it is revision 1" in caplog.text
    assert await versions(storage) == (3, 3)
    async with Manager("people", storage, schema=people(3)) as state:
        assert state.revision == 2


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
async def test_the_undo(tmp_path: Path, caplog: pytest.LogCaptureFixture, *, shared: bool) -> None:
    """With a history, the log names the revision before the migration. `restore_state` with it gives older code its state again."""
    storage = FileStorage(tmp_path, history=timedelta(days=7))
    config = Config("people", shared=shared)
    await filled(storage)
    caplog.set_level(logging.INFO)
    async with Manager(config, storage, schema=people()) as state:
        await state.set("later", 1)
    before = revision_before(caplog)
    assert before == 1
    assert await restore_state("people", storage, before, into="people") == Restored(4, 3)
    assert await versions(storage) == (1, 1)
    async with Manager(config, storage) as older:
        assert await older.get_all() == OLD
    async with Manager(config, storage, schema=people()) as state:
        assert (await state.get_all(), state.revision) == (NEW, 5)


async def test_the_undo_of_imported_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The state before may be a file of another program, which has revision 0. Without a history, the log names no undo."""
    caplog.set_level(logging.INFO)
    for name, storage in {"a": FileStorage(tmp_path / "a", history=60), "b": FileStorage(tmp_path / "b")}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "people.json").write_bytes(msgspec.json.encode(OLD))
        async with Manager("people", storage, schema=people()):
            pass
        assert revision_before(caplog) == (0 if name == "a" else None)
        caplog.clear()
    storage = FileStorage(tmp_path / "a")
    await restore_state("people", storage, 0, into="people")
    async with Manager("people", storage) as state:
        assert await state.get_all() == OLD


def revision_before(caplog: pytest.LogCaptureFixture) -> int | None:
    """Return the revision with which the log says that a migration can be undone; `None` if it says nothing."""
    found = re.search(r"people: restore_state\('people', storage, (\d+), into='people'\) undoes", caplog.text)
    return None if found is None else int(found[1])


async def test_a_chain_that_has_begun(storage: Storage) -> None:
    """Only the migrations after the stored version run."""
    await filled(storage)
    async with Manager("people", storage, schema=people(2)):
        pass
    async with Manager("people", storage, schema=people(3)) as state:
        assert (await state.get("people/ann"), state.revision) == (NEW["users/ann"], 3)


async def test_a_migration_that_changes_nothing(storage: Storage) -> None:
    """The new version is a change of its own, and is durable when `start()` returns."""
    schema = Schema(2, readable_by=1)
    schema.migration(to=2)(lambda _: None)
    await filled(storage)
    async with Manager(Config("people", flush_interval=None), storage, schema=schema) as state:
        assert (state.revision, await state.get_all()) == (2, OLD)
        assert await versions(storage) == (2, 1)


async def test_a_new_state(storage: Storage) -> None:
    """A new state gets the version of the code with its first change, and no migration runs."""
    async with Manager("people", storage, schema=people(3, readable_by=2)) as state:
        assert await state.set("a", 1) == 1
        await state.flush()
        assert await versions(storage) == (3, 2)
    async with Manager("people", storage, schema=people(3)) as state:
        assert state.revision == 1
        await state.set("a", 2)  # `readable_by` changes with this change
    assert await versions(storage) == (3, 3)
    async with Manager("other", storage, schema=people(3)):
        pass
    assert (await load("other", storage)).size == 0


async def test_a_state_of_another_program(tmp_path: Path) -> None:
    """Imported JSON has version 1, even if it is empty. So has a state from which the member was deleted."""
    (tmp_path / "people.json").write_bytes(msgspec.json.encode(OLD))
    storage = FileStorage(tmp_path)
    async with Manager("people", storage, schema=people()) as state:
        assert await state.get_all() == NEW
    (tmp_path / "empty.json").write_bytes(b"{}")
    schema = Schema(2)
    schema.migration(to=2)(lambda draft: draft.set("migrated", value=True))
    async with Manager("empty", storage, schema=schema) as state:
        assert await state.get_all() == {"migrated": True}


async def test_versions_survive_a_crash(storage: Storage) -> None:
    """After a crash before the next checkpoint, the records have the new version. The migration does not run again."""
    await filled(storage)
    state = Manager("people", storage, schema=people())
    await state.start()
    await state.set("n", 2)
    await state.flush()
    assert state._flusher is not None
    await state._flusher.abort().aclose()
    async with Manager("people", storage, schema=people()) as again:
        assert await again.get_all() == {**NEW, "n": 2}
    await state.stop()


async def test_a_value_that_is_not_its_type(storage: Storage) -> None:
    """A value under `types` that is not its type fails the migration, touched or not. The error has key and path, and no value."""
    await filled(storage)
    async with Manager("people", storage) as state:
        await state.set("users/old", {"name": "Old One", "age": "secret"})
    before = await load("people", storage)
    with pytest.raises(MigrationError) as error:
        await Manager("people", storage, schema=people(types={"users/": User})).start()
    assert str(error.value) == (
        "after the migration of 'people' to version 2, the value of 'users/old' does not fit the schema: not a `User`: "
        "Expected `int`, got `str` - at `$.age`; the state was left untouched"
    )
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    assert (error.value.migration, error.value.key, error.value.path) == (2, "users/old", "$.age")
    after = await load("people", storage)
    assert (after.state.revision, after.state.entries, after.state.versions) == (
        before.state.revision,
        before.state.entries,
        (1, 1),
    )


async def test_expired_and_other_values_are_not_checked(clock: ManualClock) -> None:
    """A migration checks no value that has expired, and none without a type. The longest prefix decides."""
    storage = MemoryStorage()
    async with Manager("people", storage, clock=clock) as state:
        await state.set("users/gone", 1, ttl=10)
        await state.set("users/stays", {"first": "A", "last": "B"}, ttl=100)
        await state.set_many({"users/count": 3, "other": "x"})
    clock.advance(50)
    schema = Schema(2, types={"users/": User, "users/count": int})
    schema.migration(to=2)(lambda _: None)
    async with Manager("people", storage, clock=clock, schema=schema) as state:
        assert await state.keys() == ["other", "users/count", "users/stays"]


async def test_types_of_nested_prefixes() -> None:
    """Where prefixes are nested, or some keys have none, each value is checked against its own type."""
    types: dict[str, Any] = {"n/": list[int], "n/text/": str, "m/": dict[str, int]}
    values: dict[str, Any] = {"n/1": [1], "n/text/2": "two", "n/z": [3], "m/1": {"a": 1}, "other": 1}
    for wrong in ({}, {"n/text/2": [2]}, {"m/1": {"a": "x"}}, {"n/z": "x"}):
        storage = MemoryStorage()
        async with Manager("people", storage) as state:
            await state.set_many({**values, **wrong})
        schema = Schema(2, types=types)
        schema.migration(to=2)(lambda draft: draft.set("new", 1))
        if not wrong:
            async with Manager("people", storage, schema=schema) as state:
                assert await state.get_all() == {**values, "new": 1}
            continue
        with pytest.raises(MigrationError) as error:
            await Manager("people", storage, schema=schema).start()
        assert error.value.key in wrong


async def test_a_migration_that_was_changed(storage: Storage) -> None:
    """A migration that was changed after it ran does not run again: the state has its version already."""
    await filled(storage)
    async with Manager("people", storage, schema=people()):
        pass
    changed = Schema(2)
    changed.migration(to=2)(lambda draft: draft.delete_all())
    async with Manager("people", storage, schema=changed) as state:
        assert (await state.get_all(), state.revision) == (NEW, 2)


async def test_types_of_many_kinds() -> None:
    """A migration checks scalars, values of Pydantic, and values of a `TypeAdapter`, together with other values of the same type."""
    types: dict[str, Any] = {"n/": int | list[int], "adapter/": TypeAdapter(list[int])}
    values: dict[str, Any] = {"n/1": 1, "n/2": [2], "n/3": [3], "adapter/1": [1], "adapter/2": [2]}
    for bad in (None, "n/2", "adapter/2"):
        storage = MemoryStorage()
        async with Manager("people", storage) as state:
            await state.set_many({**values, **({} if bad is None else {bad: ["x"]})})
        schema = Schema(2, types=types)
        schema.migration(to=2)(lambda draft: draft.set("n/1", 1))  # other values are JSON, as they were loaded
        state = Manager("people", storage, schema=schema)
        if bad is None:
            async with state:
                assert await state.get_all() == values
        else:
            with pytest.raises(MigrationError) as error:
                await state.start()
            assert error.value.key == bad


async def test_a_newer_state_is_left_untouched(tmp_path: Path) -> None:
    """Older code, or code without a schema, is refused. The files are as before."""
    storage = FileStorage(tmp_path)
    await filled(storage)
    async with Manager("people", storage, schema=people(2)):
        pass
    before = (tmp_path / "people.json").read_bytes()
    for schema in (None, Schema(1)):
        state = Manager("people", storage, schema=schema)
        with pytest.raises(SchemaError, match="by version 2 of the schema, which code from version 2 on can read"):
            await state.start()
        assert state.status().phase == "new"
    assert (tmp_path / "people.json").read_bytes() == before
    async with Manager("people", storage, schema=ANY) as state:
        await state.set("n", 5)
    assert await versions(storage) == (2, 2)


async def test_two_versions_take_turns(storage: Storage) -> None:
    """Where `readable_by` allows it, older code runs. The state keeps its versions, so the newer code does not migrate again."""
    runs = 0

    def count(draft: MigrationDraft) -> None:
        nonlocal runs
        runs += 1
        split_names(draft)

    newer = Schema(2, readable_by=1)
    newer.migration(to=2)(count)
    await filled(storage)
    for number in range(3):
        async with Manager("people", storage, schema=newer) as state:
            await state.set("n", number)
        async with Manager("people", storage, schema=None if number else Schema(1)) as state:
            assert await state.get("n") == number
            await state.set("n", -1)
        assert await versions(storage) == (2, 1)
    assert runs == 1


async def test_a_start_that_must_not_migrate(storage: Storage) -> None:
    """With `migrate="refuse"`, a state that needs a migration is refused. A new state and a migrated one start."""
    await filled(storage)
    refusing = Config("people", migrate="refuse")
    with pytest.raises(SchemaError, match="lab-state migrate"):
        await Manager(refusing, storage, schema=people()).start()
    assert await versions(storage) == (1, 1)
    async with Manager("people", storage, schema=people()):
        pass
    async with Manager(refusing, storage, schema=people()) as state:
        assert await state.get_all() == NEW
    async with Manager(Config("new", migrate="refuse"), storage, schema=people()) as state:
        await state.set("a", 1)


@pytest.mark.parametrize("when", ["before", "torn", "after"])
async def test_a_commit_that_fails(when: Any) -> None:
    """If the commit of the migration fails, so does the start. The next start finds the state before or after, and completes."""
    storage = FaultyStorage(MemoryStorage())
    await filled(storage)
    storage.fail("commit", when, error=UnavailableError("no room"))
    with pytest.raises(UnavailableError, match="no room"):
        await Manager("people", storage, schema=people()).start()
    assert await versions(storage) == ((2, 2) if when == "after" else (1, 1))
    async with Manager("people", storage, schema=people()) as state:
        assert (await state.get_all(), state.revision) == (NEW, 2)


async def test_a_copy_and_a_backup_have_the_versions(tmp_path: Path) -> None:
    """`copy_state`, `backup` and `read_state` know the versions of the state."""
    storage, target = FileStorage(tmp_path / "a"), FileStorage(tmp_path / "b")
    await filled(storage)
    async with Manager("people", storage, schema=people(2, readable_by=1)) as state:
        await state.backup(tmp_path / "backup.json")
    await copy_state("people", storage, target)
    assert await versions(target) == (2, 1)
    data = (tmp_path / "backup.json").read_bytes()
    assert decode_snapshot(data, "backup.json").versions == (2, 1)
    view = await read_state("people", target)
    assert (view.schema, view.readable_by) == (2, 1)


async def test_a_strict_schema(storage: Storage) -> None:
    """A strict schema refuses members that the type does not know: at each start, and in each write."""
    strict = Schema(1, types={"users/": User}, strict=True)
    async with Manager("people", storage, schema=strict) as state:
        await state.set("users/ann", {"first": "Ann", "last": "B", "age": 0})
        with pytest.raises(ValueError, match=r"the type does not know this member - at `\$.name`"):
            await state.set("users/ann", {"first": "Ann", "last": "B", "name": "Ann B"})
    async with Manager("people", storage, schema=strict) as state:
        assert await state.get("users/ann", type=User) == User("Ann", "B")
    async with Manager("people", storage, schema=Schema(1, types={"users/": User})) as state:
        await state.set("users/ann", {"first": "Ann", "last": "B", "name": "Ann B"})
    with pytest.raises(SchemaError, match=r"'users/ann' in 'people' does not fit the strict schema: .* at `\$.name`"):
        await Manager("people", storage, schema=strict).start()


async def test_the_loaded_bytes_are_freed(tmp_path: Path, clock: ManualClock) -> None:
    """A migration of most keys copies the other values, so that no value keeps the loaded bytes in memory."""
    storage = FileStorage(tmp_path)
    async with Manager("people", storage, clock=clock) as state:
        await state.set_many(OLD)
        await state.set("session", [1], ttl=100)
    schema = Schema(2)
    schema.migration(to=2)(lambda draft: draft.set_many({"a": [1], "b": [2], "c": [3], "n": 2}))
    async with Manager("people", storage, clock=clock, schema=schema) as state:
        kept = state._core.state
        assert not kept.borrowed
        values = [stored.value if isinstance(stored, Expiring) else stored for stored in kept.entries.values()]  # type: ignore[union-attr]
        assert msgspec.Raw not in map(type, values)
        assert flusher_of(state)._session.recovery.snapshot is None
        assert await state.get_all() == {**OLD, "a": [1], "b": [2], "c": [3], "n": 2, "session": [1]}
        assert await state.expires_in("session") == 100
    async with Manager("people", storage, clock=clock, schema=schema) as state:
        assert (len(state), state.revision) == (7, 3)


async def test_a_large_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop runs between two parts of the check of the values."""
    monkeypatch.setattr("lab_state._migrations._chain.AT_ONCE", 10)
    storage = MemoryStorage()
    async with Manager("people", storage) as state:
        await state.set_many({f"n/{number}": number for number in range(2_000)})
    schema = Schema(2, types={"n/": int}, strict=True)
    schema.migration(to=2)(lambda draft: draft.set_many({key: value + 1 for key, value in draft.items("n/")}))
    for _ in range(2):
        async with Manager("people", storage, schema=schema) as state:
            assert sum((await state.get_all()).values()) == sum(range(2_000)) + 2_000
