"""`Schema`: the version of the stored values, the migrations to it, and the types of the values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeVar, cast

from lab_state._arguments import name_of
from lab_state._entries import FIRST_VERSIONS, Versions
from lab_state._migrations._draft import MigrationDraft
from lab_state._migrations._types import Types

Migrate = Callable[[MigrationDraft], object]
F = TypeVar("F", bound=Callable[[MigrationDraft], object])

LARGEST: Final = 2**31
"""The largest version."""


class Schema:
    """The version of the values that a program stores, and the migrations from older versions.

    Pass a schema to `Manager`. At `start()`, a state of an older version is migrated: see `Manager.start`. A state
    without a stored version has version 1, such as a state of a program without a schema, or a file of another program.
    A new, empty state gets the version of the schema. A manager without a schema counts as version 1.

    A schema may be used by any number of managers. The migration of a state runs once: a migration that is changed later has
    no effect on states that were migrated already.
    """

    __slots__ = ("_migrations", "_types", "checks", "keeps_any", "readable_by", "strict", "version")

    def __init__(
        self,
        version: int,
        *,
        readable_by: int | None = None,
        types: Mapping[str, Any] | None = None,
        strict: bool = False,
    ) -> None:
        """Define a schema. Then add a migration for each version from 2 on, with `migration`.

        Args:
            version: The version of the code: 1 to 2,147,483,648. Add 1 for each change that needs a migration.
            readable_by: The oldest version of the code that can read what this version stores: 1 to `version`. By default it is
                `version`: older code is refused. Lower it for an additive change, so that the change does not block a
                downgrade. The older code then leaves the stored version as it is. So this code must be able to read,
                without a migration, what the older code writes.
            types: The types of the values by the prefix of their keys, such as `{"users/": User}`. For each key, the
                longest prefix that fits it is used. At the end of a migration, each value under these prefixes is checked. A write of
                a key under them raises `InvalidValueError` if the value is not of its type. For this check, the
                write decodes the encoded value.
            strict: Whether a member that a type does not know is an error. Then `start()` checks each value under `types`, which
                takes several times as long as loading the state, and each write checks its value.

        Raises:
            TypeError: An argument has the wrong type, or one of `types` cannot be decoded; see `Manager.get`.
            ValueError: `version` or `readable_by` is out of bounds, or `strict` is given without `types`.
        """
        self.version: Final[int] = _checked("version", version, LARGEST)
        self.readable_by: Final[int] = version if readable_by is None else _checked("readable_by", readable_by, version)
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be a bool, not {type(strict).__name__}")
        if types is not None and not isinstance(types, Mapping):
            raise TypeError(f"types must be a mapping of prefixes to types, not {type(types).__name__}")
        if strict and not types:
            raise ValueError("strict=True needs types: without them there is no member to refuse")
        self.strict: Final[bool] = strict
        self._types = MappingProxyType(dict(types or {}))
        self.checks: Final[Types | None] = Types(self._types, strict=strict) if types else None
        self.keeps_any: bool = False
        self._migrations: dict[int, Migrate] = {}

    @property
    def types(self) -> Mapping[str, Any]:
        """The types by prefix."""
        return self._types

    def __repr__(self) -> str:
        """Return the version, the oldest code that can read it, and the prefixes."""
        return f"<Schema version {self.version}, readable by {self.readable_by}, types of {list(self._types)}>"

    def migration(self, to: int) -> Callable[[F], F]:
        """Return a decorator for the function that migrates a state from version `to - 1` to version `to`.

        The function gets a `MigrationDraft`, changes it, and returns nothing. It runs on the event loop, which waits for its
        end. It must not be `async`. If a start fails after the function has run, the next start runs it again. So the function
        should have no other effects.

        Args:
            to: The version to which the function leads: 2 to `version`.

        Raises:
            TypeError: `to` is not an int, or the function is not a plain function.
            ValueError: `to` is out of bounds, or there is a migration to this version already.
        """
        if to.__class__ is not int:
            raise TypeError(f"migration(to=...) needs an int, not {type(to).__name__}")
        if not 1 < to <= self.version:
            raise ValueError(
                f"migration(to={to}) is out of bounds: a schema of version {self.version} has migrations to 2 … {self.version}"
            )
        if to in self._migrations:
            raise ValueError(f"there is a migration to version {to} already: {name_of(self._migrations[to])}")

        def add(function: F) -> F:
            if not callable(function):
                raise TypeError(f"a migration must be a function, not {type(function).__name__}")
            if _is_not_plain(function):
                raise TypeError(
                    f"the migration {name_of(function)} must be a plain function: neither async nor a generator"
                )
            if to in self._migrations:
                raise ValueError(f"there is a migration to version {to} already: {name_of(self._migrations[to])}")
            self._migrations[to] = function
            return function

        return add

    @property
    def versions(self) -> Versions:
        """The versions that a state gets from this schema."""
        return Versions(self.version, self.readable_by)

    def check_whole(self) -> None:
        """Check that there is a migration to each version.

        Raises:
            ValueError: A migration is missing.
        """
        if len(self._migrations) != self.version - 1:
            missing = next(to for to in range(2, self.version + 1) if to not in self._migrations)
            raise ValueError(
                f"the schema has version {self.version}, and no migration to version {missing}: add @schema.migration(to={missing})"
            )

    def after(self, version: int) -> list[tuple[int, Migrate]]:
        """Return the migrations from a version to the version of this schema, in order, each with its number."""
        return [(to, self._migrations[to]) for to in range(version + 1, self.version + 1)]


def _checked(name: str, version: int, most: int) -> int:
    """Return a version, after its check."""
    if version.__class__ is not int:
        raise TypeError(f"{name} must be an int, not {type(version).__name__}")
    if not 1 <= version <= most:
        raise ValueError(f"{name} must be 1 to {most}, not {version}")
    return version


def _is_not_plain(function: object) -> bool:
    while isinstance(function, partial):
        function = cast("partial[object]", function).func
    call = function if inspect.isfunction(function) or inspect.ismethod(function) else cast("Any", function).__call__
    return any(
        test(call) for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    )


def checked_schema(schema: object) -> Schema:
    """Return the schema that `Manager` has got, after its checks.

    Raises:
        TypeError: The object is not a `Schema`.
        ValueError: The schema lacks a migration.
    """
    if not isinstance(schema, Schema):
        raise TypeError(f"schema must be a Schema, not {type(schema).__name__}")
    schema.check_whole()
    return schema


def _keeps_any() -> Schema:
    schema = Schema(1)
    schema.keeps_any = True
    return schema


WITHOUT: Final = Schema(FIRST_VERSIONS.schema)
"""The schema of a manager that was made without one."""

ANY: Final = _keeps_any()
"""The schema of tools. It fits a state of any version, and keeps that version."""
