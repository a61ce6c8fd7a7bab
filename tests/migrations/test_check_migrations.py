"""`check_migrations`: one file for each version, and what is reported if they do not fit."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab_state import CorruptionError, FileStorage, Manager, MigrationDraft, MigrationError, Schema
from lab_state.testing import ManualClock, check_migrations


class User(msgspec.Struct):
    first: str
    last: str


def split(draft: MigrationDraft) -> None:
    for key, user in draft.items("users/"):
        first, _, last = user["name"].partition(" ")
        draft.set(key, {"first": first, "last": last})


def move(draft: MigrationDraft) -> None:
    for key in draft.keys("users/"):
        draft.move(key, key.replace("users/", "people/"))


SCHEMA = Schema(3, types={"people/": User})
SCHEMA.migration(to=2)(split)
SCHEMA.migration(to=3)(move)

FILES: dict[str, Any] = {
    "v1": {"users/a": {"name": "A B"}, "n": 1},
    "v2": {"users/a": {"first": "A", "last": "B"}, "n": 1},
    "v3": {"people/a": {"first": "A", "last": "B"}, "n": 1},
}


def written(directory: Path, **changed: Any) -> Path:
    for name, content in {**FILES, **changed}.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_files_that_fit(tmp_path: Path) -> None:
    """If the migrations bring each file to the newest one, the check passes. It takes a `str`, too."""
    check_migrations(SCHEMA, written(tmp_path))
    check_migrations(SCHEMA, str(tmp_path))
    plain = Schema(1)
    check_migrations(plain, tmp_path)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"v2": None}, "lacks v2.json: add one file for each version"),
        ({"v1": {"n": 1}}, "v1.json: after the migrations, the key 'people/a' is missing, and it is in v3.json"),
        (
            {"v2": {**FILES["v2"], "m": 1}},
            "v2.json: after the migrations, the key 'm' is there, and it is not in v3.json",
        ),
        (
            {"v2": {**FILES["v2"], "n": 2}},
            "v2.json: after the migrations, the key 'n' has another value than in v3.json",
        ),
        (
            {"v2": {**FILES["v2"], "n": True}},
            "v2.json: after the migrations, the key 'n' has another value than in v3.json",
        ),
        (
            {name: {**content, "m": {"a": [0, name != "v2"]}} for name, content in FILES.items()},
            "v2.json: after the migrations, the key 'm' has another value than in v3.json",
        ),
        (
            {name: {**content, "m": {"a": [0, 1 if name == "v3" else True]}} for name, content in FILES.items()},
            "v1.json: after the migrations, the key 'm' has another value than in v3.json",
        ),
        ({"v3": {"people/a": {"first": 1}}}, "v3.json: .* does not fit the schema: .* - at `"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], text: str) -> None:
    """A missing file, a missing or another value, and a value that is not of its type are reported, with file and key."""
    with pytest.raises(AssertionError, match=text):
        check_migrations(SCHEMA, written(tmp_path, **changed))


def test_errors_that_are_passed_on(tmp_path: Path) -> None:
    """A migration that fails, a file that is no state, and a schema with a gap raise their own errors."""
    with pytest.raises(MigrationError, match=r"split of 'v1\.json' to version 2 failed with KeyError"):
        check_migrations(SCHEMA, written(tmp_path, v1={"users/a": {}}))
    (tmp_path / "v1.json").write_text("[]")
    with pytest.raises(CorruptionError, match=r"v1\.json"):
        check_migrations(SCHEMA, tmp_path)
    with pytest.raises(ValueError, match="no migration to version 2"):
        check_migrations(Schema(2), tmp_path)


async def test_files_of_states(tmp_path: Path, clock: ManualClock) -> None:
    """The `.json` of a stopped state can be such a file. Its version and its expiry times are compared."""
    schemas = [Schema(1), Schema(2), SCHEMA]
    schemas[1].migration(to=2)(split)
    for number, schema in enumerate(schemas, 1):
        async with Manager("app", FileStorage(tmp_path), clock=clock, schema=schema) as state:
            if number == 1:
                await state.set("users/a", {"name": "A B"}, ttl=100)
        (tmp_path / "app.json").rename(tmp_path / f"v{number}.json")
        (tmp_path / "app.json").write_bytes((tmp_path / f"v{number}.json").read_bytes())
    await asyncio.to_thread(check_migrations, SCHEMA, tmp_path)
    first = (tmp_path / "v1.json").read_bytes()
    (tmp_path / "v1.json").write_text('{"users/a": {"name": "A B"}}')
    with pytest.raises(AssertionError, match="'people/a' has another expiry time than in"):
        await asyncio.to_thread(check_migrations, SCHEMA, tmp_path)
    (tmp_path / "v1.json").write_bytes(first)
    (tmp_path / "v2.json").write_bytes(first)
    with pytest.raises(AssertionError, match=r"v2\.json has version 1 of the schema"):
        await asyncio.to_thread(check_migrations, SCHEMA, tmp_path)
