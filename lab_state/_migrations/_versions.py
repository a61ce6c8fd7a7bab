"""The decision whether code may use a state. This module does no I/O."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import Enum
from typing import NamedTuple

from lab_state._entries import Versions
from lab_state._migrations._schema import Schema
from lab_state.exceptions import SchemaError


class Step(Enum):
    """The effect of a start on the versions of a state."""

    KEEP = "keep"
    """The state is used, and keeps its versions."""
    SET = "set"
    """The state is used, and its next change sets the versions of the code."""
    MIGRATE = "migrate"
    """The state is migrated to the versions of the code."""


class Stored(NamedTuple):
    """The known facts about a stored state, for the decision and for messages.

    Attributes:
        versions: Its versions.
        is_new: Whether it is a new state, without any change.
        wall: The time of its last write, in milliseconds since 1970, as the writer's clock had it; 0 if that is not known.
        path: Its path or its address in S3.
    """

    versions: Versions
    is_new: bool
    wall: int
    path: str


def decide(stored: Stored, schema: Schema, *, may_migrate: bool) -> Step:
    """Return the effect of a start on a stored state, with a schema of the code.

    Raises:
        SchemaError: The state cannot be read by code of this version. Or it needs a migration, and `may_migrate` is False.
    """
    versions, code = stored.versions, schema.versions
    if schema.keeps_any:
        return Step.KEEP
    if stored.is_new:
        return Step.SET
    if versions.schema > code.schema:
        if versions.readable_by > code.schema:
            raise SchemaError(_newer(stored, code.schema))
        return Step.KEEP
    if versions.schema == code.schema:
        return Step.KEEP if versions == code else Step.SET
    if not may_migrate:
        raise SchemaError(
            f"{stored.path} has version {versions.schema} of the schema, the code has version {code.schema}, and this start must "
            'not migrate the state: run `lab-state migrate`, or start one process with Config(migrate="auto"). The state was '
            "left untouched"
        )
    return Step.MIGRATE


def check_follower(versions: Versions, code: Schema, name: str, pid: int) -> None:
    """Check that a process may follow the owner of a shared state.

    Args:
        versions: The versions of the state.
        code: The schema of the code of this process.
        name: The name of the state.
        pid: The process id of the owner.

    Raises:
        SchemaError: This process needs another version of the schema.
    """
    if code.keeps_any or versions.readable_by <= code.version <= versions.schema:
        return
    raise SchemaError(
        f"the state {name!r} is in use by process {pid} with version {versions.schema} of the schema, and this process has "
        f"version {code.version}. Processes with different versions cannot share a state, unless its `readable_by` allows the "
        "older code; and a migration needs all processes to stop first. Stop all processes, and start them with the same code"
    )


def _newer(stored: Stored, code: int) -> str:
    try:
        when = f" at {datetime.fromtimestamp(stored.wall / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC" if stored.wall else ""
    except (OverflowError, OSError, ValueError):  # a year that `datetime` does not have
        when = ""
    return (
        f"{stored.path} was written{when} by version {stored.versions.schema} of the schema, which code from version "
        f"{stored.versions.readable_by} on can read. This code has version {code}: run the newer code, or go back to a "
        "state that older code wrote - with `restore_state` if the storage has a history, or from a backup. The state was left untouched"
    )
