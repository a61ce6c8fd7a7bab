"""The subcommands `migrate` and `check`: the schema of an application, applied to a state."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from msgspec import Raw

from lab_state._arguments import name_of
from lab_state._checking import Misfit
from lab_state._entries import Absent, Stored, StoredOrGone, Versions
from lab_state._foreign import described as foreign_error
from lab_state._migrations import Schema, checked_schema
from lab_state._migrations._chain import migrate as run_migration
from lab_state._migrations._chain import misfits
from lab_state._migrations._draft import StateDraft
from lab_state._migrations._versions import Step, decide
from lab_state._migrations._versions import Stored as StoredVersions
from lab_state._state import State
from lab_state._state_view import StateView
from lab_state.cli._exits import NOT_FOUND, USAGE, Stop
from lab_state.cli._output import Output
from lab_state.cli._storages import check_deposes, described, expiry_of, raw_of, read, storage_to_write
from lab_state.cli._target import Target
from lab_state.cli._text import counted
from lab_state.config import Config
from lab_state.manager import Manager

_SHOWN = 60
"""The largest number of characters of a value in a line for people."""

_MOST_MISFITS = 100
"""The number of values of a wrong type after which a dry run looks for no more."""


def schema_at(text: str) -> Schema:
    """Import the schema that `module:name` names. The current directory is searched first.

    Raises:
        Stop: There is no such module or name, or its code raises an error, or the object is not a schema.
        ValueError: The schema lacks a migration.
    """
    module, colon, name = text.partition(":")
    if not colon or not module or not name or module.startswith("."):
        raise Stop(USAGE, f"{text} does not name a schema: write module:name, such as app:schema")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise Stop(USAGE, f"{text} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # the code of the user may raise any error, or exit
        raise Stop(USAGE, f"{text} cannot be imported: {foreign_error(error)}") from error
    if not isinstance(found, Schema):
        raise Stop(USAGE, f"{text} is not a Schema, but an object of the class {type(found).__qualname__}")
    return checked_schema(found)


async def migrate(output: Output, schema: str, state: Target, *, dry_run: bool, depose: bool, json: bool) -> None:
    """Migrate a state, or show what a migration would change."""
    code = schema_at(schema)
    view = await read(state)
    if dry_run:
        _Trial(output, code, view, state).run(json=json)
        return
    check_deposes(state, depose=depose)
    storage = await storage_to_write(state)
    manager = Manager(Config(name=state.name, flush_interval=None), storage, schema=code)
    async with manager:
        before, revision = view.schema, manager.revision
        after = manager._core.state.versions.schema  # noqa: SLF001 -- a manager has no public call for the versions
    if json:
        output.one(before=before, after=after, revision=revision)
    elif before == after:
        output.line(f"version {after} already: nothing was migrated; revision {revision}")
    else:
        output.line(f"migrated from version {before} to {after}; revision {revision}")


class _Trial:
    """The migrations of a state, made on a draft that is dropped."""

    def __init__(self, output: Output, schema: Schema, view: StateView, target: Target) -> None:
        self._output = output
        self._schema = schema
        self._view = view
        self._target = target
        self._base: State = view._core.state  # noqa: SLF001 -- a view has no public call for its state

    def run(self, *, json: bool) -> None:
        """Run the migrations, and print the counts, the first values that differ, and the time.

        Raises:
            Stop: A value is not of its type after the migrations.
            LabStateError: A migration failed, or the code is older than the state.
        """
        view, began = self._view, time.perf_counter()
        is_new = not view.revision and not len(view)
        wall = 0 if view.wall is None else int(view.wall * 1000)
        stored = StoredVersions(Versions(view.schema, view.readable_by), is_new, wall, str(self._target))
        draft, steps = StateDraft(self._base), list[dict[str, Any]]()
        if decide(stored, self._schema, may_migrate=True) is Step.MIGRATE:
            for to, function in self._schema.after(view.schema):
                at = time.perf_counter()
                before = dict(draft.all_changes())
                run_migration(draft, self._target.name, to, function)
                changed = sum(before.get(key, before) is not now for key, now in draft.all_changes().items())
                seconds = round(time.perf_counter() - at, 3)
                steps.append({"to": to, "name": name_of(function), "changed": changed, "seconds": seconds})
        changes = draft.all_changes()
        entries = {key: self._base.entries[key] for key in islice(changes, 3) if key in self._base.entries}
        first = [self._difference(key, entries.get(key), changes[key]) for key in islice(changes, 3)]
        draft.merge()
        wrong = _misfits(self._base, self._schema, _MOST_MISFITS)
        seconds = round(time.perf_counter() - began, 3)
        if json:
            found = [one._asdict() for one in wrong]
            members = {"before": view.schema, "after": self._schema.version, "migrations": steps, "first": first}
            self._output.one(**described(view), **members, misfits=found, seconds=seconds)
        else:
            self._show(steps, first, wrong, seconds)
        if wrong:
            count = counted(len(wrong), "value") if len(wrong) < _MOST_MISFITS else f"{_MOST_MISFITS} or more values"
            raise Stop(NOT_FOUND, f"the migration would fail: {count} of a wrong type")

    def _difference(self, key: str, before: Stored | None, after: StoredOrGone) -> dict[str, Any]:
        """Return a key with its value before and after the migrations. A value that is missing is left out."""
        found: dict[str, Any] = {"key": key}
        if before is not None:
            found["before"] = {"value": Raw(raw_of(before)), "expires": expiry_of(before)}
        if not isinstance(after, Absent):
            found["after"] = {"value": Raw(raw_of(after)), "expires": expiry_of(after)}
        return found

    def _show(
        self, steps: list[dict[str, Any]], first: list[dict[str, Any]], wrong: list[Misfit], seconds: float
    ) -> None:
        output = self._output
        if not steps:
            output.line(f"version {self._view.schema}: nothing to migrate")
        for step in steps:
            output.line(
                f"to version {step['to']}: {step['name']}: {counted(step['changed'], 'key')} changed, {step['seconds']:.3f} s"
            )
        for found in first:
            texts = [self._short(found[side]["value"]) for side in ("before", "after") if side in found]
            sign = "~" if len(texts) > 1 else "+" if "after" in found else "-"
            output.line(f"{sign} {output.text(found['key'])}  {' -> '.join(texts)}")
        _show_misfits(output, wrong)
        output.line(f"{seconds:.3f} s; nothing was written")

    def _short(self, value: Raw) -> str:
        text = self._output.json_text(bytes(value))
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


async def check(output: Output, schema: str, state: Target, *, limit: int, nl: bool) -> None:
    """Print the values that are not of the types of a schema. The exit code is 1 if there are any."""
    code = schema_at(schema)
    if code.checks is None:
        raise Stop(USAGE, f"{schema} has no types: add types= to the Schema")
    view = await read(state)
    if view.schema != code.version:
        output.note(
            f"lab-state: the state has version {view.schema} of the schema, and {schema} has version {code.version}"
        )
    await asyncio.sleep(0)
    wrong = _misfits(view._core.state, code, limit)  # noqa: SLF001 -- a view has no public call for its state
    if nl:
        for found in wrong:
            output.json(found._asdict())
    else:
        _show_misfits(output, wrong)
    if wrong:
        raise Stop(NOT_FOUND)


def _misfits(state: State, schema: Schema, limit: int) -> list[Misfit]:
    """Return the first values that are not of their types."""
    if schema.checks is None:
        return []
    return list(islice((found for found in misfits(state, schema.checks) if found is not None), limit))


def _show_misfits(output: Output, wrong: list[Misfit]) -> None:
    for found in wrong:
        output.line(f"! {output.text(found.key)}  {output.text(found.path)}: {output.text(found.expected)}")
