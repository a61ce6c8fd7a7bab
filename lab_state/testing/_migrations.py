"""`check_migrations`: the migrations of a schema, tested with one file for each version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from lab_state._codec import LoadedState, decode_snapshot
from lab_state._entries import Expiring
from lab_state._migrations import Schema, checked_schema
from lab_state._migrations._chain import migrate, misfits
from lab_state._migrations._draft import StateDraft
from lab_state._state import State
from lab_state._types import decode_value
from lab_state.storage import _fs as fs


def check_migrations(schema: Schema, directory: str | os.PathLike[str]) -> None:
    """Check that the migrations bring the state of each version to the same newest state.

    The directory has one file for each version: `v1.json`, `v2.json`, and so on. Each file has the same state, as code of that version has
    stored it: a plain JSON object of keys and values, or the `.json` of a state after a clean stop. When you add a version, add
    one file. The file of the newest version has the expected result of all migrations. Expiry times are compared as well,
    and each value is checked against the types of the schema.

    The call reads files, and runs the migrations. It needs no event loop. If one runs, the call blocks it.

    Args:
        schema: The schema.
        directory: The directory with the files.

    Raises:
        AssertionError: A file is missing or has another version, a state differs from the newest one, or a value is not of its
            type. The message names the file, and the key if there is one.
        MigrationError: A migration failed.
        CorruptionError: A file cannot be read as a state.
        ValueError: The schema lacks a migration.
        TypeError: `schema` is not a `Schema`.
        StorageError: A file cannot be read.
    """
    checked_schema(schema)
    files = [Path(directory) / f"v{version}.json" for version in range(1, schema.version + 1)]
    contents = [(file, data) for file in files if (data := fs.read(str(file))) is not None]
    if len(contents) < len(files):
        missing = [file.name for file in files if file not in dict(contents)]
        raise AssertionError(f"{directory} lacks {', '.join(missing)}: add one file for each version")
    states = [_migrated(schema, version, *content) for version, content in enumerate(contents, 1)]
    newest = states[-1]
    for file, state in zip(files, states, strict=True):
        for key in sorted(newest.keys() | state.keys()):
            if (why := _difference(state.get(key), newest.get(key))) is not None:
                raise AssertionError(f"{file.name}: after the migrations, the key {key!r} {why} in {files[-1].name}")


class _Kept(NamedTuple):
    value: Any
    at: int | None


def _migrated(schema: Schema, version: int, file: Path, data: bytes) -> dict[str, _Kept]:
    """Return the state of a file after the migrations from its version on."""
    found = decode_snapshot(data, str(file))
    if found.revision and found.versions.schema != version:
        raise AssertionError(
            f"{file.name} has version {found.versions.schema} of the schema: its name must be that version"
        )
    state = _state_of(found)
    draft = StateDraft(state)
    for to, function in schema.after(version):
        migrate(draft, file.name, to, function)
    draft.merge()
    for wrong in misfits(state, schema.checks) if schema.checks is not None else ():
        if wrong is not None:
            raise AssertionError(
                f"{file.name}: after the migrations, the value of {wrong.key!r} does not fit the schema: {wrong.expected} - at "
                f"`{wrong.path}`"
            )
    return {key: _kept(stored) for key, stored in state.entries.items()}


def _state_of(found: LoadedState) -> State:
    """Return a state whose time is that of the file, and does not advance."""
    state = State(start=found.time / 1000)
    state.load(found.entries, found.revision, found.expires)
    return state


def _kept(stored: Any) -> _Kept:
    at = stored.at if isinstance(stored, Expiring) else None
    return _Kept(decode_value(stored.value if isinstance(stored, Expiring) else stored, Any), at)


def _equal(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal. In Python, `True == 1`, but in JSON `true` is not a number."""
    kinds = type(one), type(other)  # pyright: ignore[reportUnknownVariableType] -- the types of JSON values
    if kinds == (dict, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if kinds == (list, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return (kinds[0] is bool) == (kinds[1] is bool) and bool(one == other)


def _difference(kept: _Kept | None, newest: _Kept | None) -> str | None:
    """Return how a value differs from that of the newest state; `None` if it does not."""
    if kept is None:
        return "is missing, and it is"
    if newest is None:
        return "is there, and it is not"
    if not _equal(kept.value, newest.value):
        return "has another value than"
    return None if kept.at == newest.at else "has another expiry time than"
