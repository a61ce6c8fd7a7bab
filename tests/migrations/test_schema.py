"""`Schema`: its definition, its bounds and its migrations. `Manager` checks that no migration is missing."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest

from lab_state import Manager, MemoryCache, MemoryStorage, MigrationDraft, Schema, read_state
from lab_state._entries import Versions


class User(msgspec.Struct):
    name: str


def nothing(_: MigrationDraft) -> None:
    """Change nothing."""


def whole(version: int, **more: Any) -> Schema:
    """Return a schema with migrations that change nothing."""
    schema = Schema(version, **more)
    for to in range(2, version + 1):
        schema.migration(to=to)(nothing)
    return schema


@pytest.mark.parametrize("version", [1, 2, 2**31])
def test_a_version_within_its_bounds(version: int) -> None:
    """A version is 1 to 2^31. By default only code of the same version can read it."""
    assert Schema(version).versions == Versions(version, version)


@pytest.mark.parametrize(
    ("version", "error"),
    [(0, ValueError), (-1, ValueError), (2**31 + 1, ValueError), (True, TypeError), ("2", TypeError)],
)
def test_a_version_out_of_bounds(version: Any, error: type[Exception]) -> None:
    """0, a number above 2^31, and everything but an int are refused."""
    with pytest.raises(error, match="version must be"):
        Schema(version)


@pytest.mark.parametrize(
    ("readable_by", "error"), [(0, ValueError), (4, ValueError), (True, TypeError), (1.0, TypeError)]
)
def test_readable_by_out_of_bounds(readable_by: Any, error: type[Exception]) -> None:
    """`readable_by` is an int from 1 to the version."""
    with pytest.raises(error, match="readable_by must be"):
        Schema(3, readable_by=readable_by)
    assert Schema(3, readable_by=3).readable_by == 3


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        ({"types": [User]}, TypeError, "types must be a mapping"),
        ({"types": {1: User}}, TypeError, "a prefix must be a str"),
        ({"types": {"users/": object()}}, TypeError, "not a type that can be decoded"),
        ({"strict": 1}, TypeError, "strict must be a bool"),
        ({"strict": True}, ValueError, "strict=True needs types"),
        ({"strict": True, "types": {}}, ValueError, "strict=True needs types"),
    ],
)
def test_types_that_are_refused(more: dict[str, Any], error: type[Exception], text: str) -> None:
    """The types are a mapping of prefixes to types that can be decoded. `strict` needs one of them."""
    with pytest.raises(error, match=text):
        Schema(1, **more)


def test_the_types_cannot_be_changed() -> None:
    """A schema keeps a copy of its types."""
    types: dict[str, Any] = {"users/": User}
    schema = Schema(1, types=types)
    types.clear()
    assert dict(schema.types) == {"users/": User}
    assert repr(schema) == "<Schema version 1, readable by 1, types of ['users/']>"
    assert Schema(1).checks is None


@pytest.mark.parametrize(
    ("to", "error"), [(0, ValueError), (1, ValueError), (4, ValueError), (True, TypeError), ("2", TypeError)]
)
def test_a_migration_out_of_bounds(to: Any, error: type[Exception]) -> None:
    """A migration leads to a version from 2 to that of the schema."""
    with pytest.raises(error, match="migration"):
        Schema(3).migration(to=to)


def test_a_second_migration_to_a_version() -> None:
    """A second migration to a version is refused at its definition. The error names the first one."""
    schema = Schema(3)
    late = schema.migration(to=2)
    schema.migration(to=2)(nothing)
    with pytest.raises(ValueError, match="a migration to version 2 already: nothing"):
        schema.migration(to=2)
    with pytest.raises(ValueError, match="a migration to version 2 already: nothing"):
        late(nothing)


async def asynchronous(_: MigrationDraft) -> None: ...


async def asynchronous_generator(_: MigrationDraft) -> Any:
    yield


def generator(_: MigrationDraft) -> Any:
    yield


class Caller:
    async def __call__(self, _: MigrationDraft) -> None: ...


@pytest.mark.parametrize("function", [asynchronous, asynchronous_generator, generator, Caller(), partial(generator)])
def test_a_migration_that_is_not_plain(function: Any) -> None:
    """A migration that is async or a generator is refused at its definition."""
    with pytest.raises(TypeError, match="must be a plain function"):
        Schema(2).migration(to=2)(function)


def test_a_migration_that_is_no_function() -> None:
    """An object that cannot be called is refused. The decorator returns the function that it gets."""
    schema = Schema(2)
    with pytest.raises(TypeError, match="must be a function, not int"):
        schema.migration(to=2)(3)  # type: ignore[type-var]
    assert schema.migration(to=2)(nothing) is nothing


def test_a_gap() -> None:
    """A manager refuses a schema without one of its migrations, and names the first one that is missing."""
    schema = Schema(4)
    schema.migration(to=2)(nothing)
    with pytest.raises(ValueError, match=r"no migration to version 3: add @schema.migration\(to=3\)"):
        Manager("gap", MemoryStorage(), schema=schema)
    with pytest.raises(TypeError, match="schema must be a Schema, not int"):
        Manager("gap", MemoryStorage(), schema=3)  # type: ignore[arg-type]


async def test_a_reader_has_no_schema() -> None:
    """Only a manager migrates. A call that reads a state or a mirror refuses a schema, as any unknown argument."""
    schema: dict[str, Any] = {"schema": Schema(1)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'schema'"):
        MemoryCache().reader("gap", **schema)
    with pytest.raises(TypeError, match="unexpected keyword argument 'schema'"):
        await read_state("gap", MemoryStorage(), **schema)


def test_the_migrations_after_a_version() -> None:
    """The chain begins after the stored version, and ends with that of the schema."""
    schema = whole(4)
    assert [to for to, _ in schema.after(1)] == [2, 3, 4]
    assert [to for to, _ in schema.after(3)] == [4]
    assert schema.after(4) == []
