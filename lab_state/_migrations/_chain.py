"""All migrations of a state on one draft, and the check of the values after them. This module does no I/O."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import islice

from lab_state._arguments import name_of
from lab_state._checking import Misfit
from lab_state._entries import Expiring, Value
from lab_state._migrations._draft import MigrationCore, MigrationDraft, StateDraft
from lab_state._migrations._schema import Migrate
from lab_state._migrations._types import Types
from lab_state._state import State
from lab_state.exceptions import InvalidValueError, LabStateError, MigrationError, TypeMismatchError

AT_ONCE = 200
"""The number of values that one step of `misfits` checks."""


def migrate(draft: StateDraft, name: str, to: int, function: Migrate) -> None:
    """Run one migration on a draft.

    Args:
        draft: The draft, which has the changes of the earlier migrations.
        name: The name of the state.
        to: The version to which the migration leads.
        function: The migration.

    Raises:
        MigrationError: The migration has raised an exception, or has not returned `None`.
    """
    core = MigrationCore(name, draft)
    what = f"the migration {name_of(function)} of {name!r} to version {to}"
    try:
        result = function(MigrationDraft(core))
    except Exception as error:
        # The text of another exception may contain values. The exceptions of lab_state contain none.
        detail = f"{type(error).__name__}: {error}" if isinstance(error, LabStateError) else type(error).__name__
        key = core.refused if error is core.refusal else None
        path = error.path if isinstance(error, InvalidValueError | TypeMismatchError) else "$"
        raise MigrationError(f"{what} failed with {detail}; the state was left untouched", to, key, path) from error
    finally:
        core.end()
    if result is not None:
        if inspect.iscoroutine(result):
            result.close()
        raise MigrationError(
            f"{what} returned an object of the class {type(result).__qualname__}: a migration changes its draft, and returns "
            "nothing; the state was left untouched",
            to,
        )


def misfits(state: State, types: Types) -> Iterator[Misfit | None]:
    """Check each value that has not expired against the type of its key.

    Yield each misfit, and `None` after each `AT_ONCE` values.
    """
    now = state.now()
    entries = iter(state.entries.items())
    while some := list(islice(entries, AT_ONCE)):
        if types.fit(some):
            yield None
            continue
        alive: list[tuple[str, Value]] = []
        for key, stored in some:
            if not isinstance(stored, Expiring):
                alive.append((key, stored))
            elif stored.at > now:
                alive.append((key, stored.value))
        yield from types.misfits(alive)
        yield None


def unfit(found: Misfit, name: str, version: int) -> MigrationError:
    """Return the error of a value that is not of its type after all migrations."""
    return MigrationError(
        f"after the migration of {name!r} to version {version}, the value of {found.key!r} does not fit the schema: "
        f"{found.expected} - at `{found.path}`; the state was left untouched",
        version,
        found.key,
        found.path,
    )
