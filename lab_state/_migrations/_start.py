"""The start of a state with a schema: the decision, the migration, and its commit.

All migrations run on one draft over the loaded state. Then the draft is merged, each value is checked against its type, and
one commit makes the change durable, with the new versions. Until then the state is shown to no caller.
If anything fails before the commit, the loaded state is dropped, and the files are as before.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from msgspec import Raw

from lab_state._arguments import name_of
from lab_state._buffers import join_in_steps
from lab_state._clock import Clock
from lab_state._codec import encode_record, encode_small_record
from lab_state._entries import Expiring, Json, Versions
from lab_state._foreign import only_storage_errors
from lab_state._log import Log
from lab_state._migrations._chain import migrate, misfits, unfit
from lab_state._migrations._draft import StateDraft
from lab_state._migrations._schema import Schema
from lab_state._migrations._versions import Step, Stored, decide
from lab_state._snapshots import SnapshotViews
from lab_state._state import State
from lab_state.exceptions import SchemaError
from lab_state.storage._protocol import StorageSession, figures_of, forget_recovery


class Committed(NamedTuple):
    """The durable record of a migration.

    Attributes:
        start: The revision before the migration.
        end: The revision of the migration.
        data: The record.
        is_due: Whether a checkpoint is due.
    """

    start: int
    end: int
    data: bytes
    is_due: bool


class SchemaStart(NamedTuple):
    """The schema of the code, and the objects that a start needs to use it.

    Attributes:
        name: The name of the state.
        schema: The schema of the code.
        may_migrate: Whether the start may migrate the state.
        clock: The clock of the manager.
        logger: The logger of the manager.
    """

    name: str
    schema: Schema
    may_migrate: bool
    clock: Clock
    logger: Log

    def check(self, state: State, session: StorageSession) -> None:
        """Check that the code may use a state without a migration.

        Raises:
            SchemaError: Code of this version cannot read the state, or the state needs a migration.
        """
        stored = Stored(state.versions, is_new=False, wall=state.written_at, path=session.path)
        decide(stored, self.schema, may_migrate=False)

    async def use(self, state: State, session: StorageSession, *, is_alone: bool) -> Committed | None:
        """Check that the code may use a loaded state, and migrate the state if it is older. Return the commit of the migration.

        Args:
            state: The loaded state. It is not shown to others yet. After an error it must be dropped.
            session: The session of the storage.
            is_alone: Whether the state is not shared. Then a migration that changes more than half of the keys frees
                the memory of the recovery.

        Raises:
            SchemaError: The code cannot use the state, or must not migrate it. Or a value does not fit a strict schema.
            MigrationError: A migration failed, or a value does not fit the schema after the migrations.
            StorageError: The commit failed.
        """
        schema = self.schema
        is_new = session.recovery.snapshot is None and not session.recovery.records
        stored = Stored(state.versions, is_new, state.written_at, session.path)
        step = decide(stored, schema, may_migrate=self.may_migrate)
        if step is Step.MIGRATE:
            return await self._migrate(state, session, is_alone=is_alone)
        if step is Step.SET:
            state.versions, state.versions_at = schema.versions, state.revision + 1
        if schema.strict:
            await self._check(state)
        return None

    async def _migrate(self, state: State, session: StorageSession, *, is_alone: bool) -> Committed:
        before, began = state.versions.schema, self.clock.monotonic()
        schema, name = self.schema, self.name
        self.logger.info("%s: migrates from version %d of the schema to version %d", name, before, schema.version)
        draft = StateDraft(state)
        for to, function in schema.after(before):
            migrate(draft, name, to, function)
            self.logger.info(
                "%s: the migration %s to version %d is done (keys that differ from the stored state: %d)",
                name,
                name_of(function),
                to,
                len(draft.all_changes()),
            )
            await asyncio.sleep(0)
        start, count = state.revision, len(draft.all_changes())
        if draft.merge() is None:
            state.apply({}, cleared=False)  # the new version is a change, even if no value has changed
        if schema.checks is not None:
            for found in misfits(state, schema.checks):
                if found is not None:
                    raise unfit(found, name, schema.version) from None
                await asyncio.sleep(0)
        # The owner of a shared state needs the records for other processes.
        if is_alone and 2 * count > len(state.entries):
            copy_loaded(state)
            forget_recovery(session)
        committed = await commit(state, session, schema.versions)
        self.logger.info(
            "%s: migrated from version %d of the schema to version %d in %.3f s (keys changed: %d); the change is revision %d, "
            "and the state before it is revision %d",
            name,
            before,
            schema.version,
            self.clock.monotonic() - began,
            count,
            committed.end,
            start,
        )
        if figures_of(session) is not None:
            self.logger.info(
                "%s: restore_state(%r, storage, %d, into=%r) undoes the migration: the history has the state before it",
                name,
                name,
                start,
                name,
            )
        return committed

    async def _check(self, state: State) -> None:
        assert self.schema.checks is not None  # a strict schema has types
        for found in misfits(state, self.schema.checks):
            if found is not None:
                raise SchemaError(
                    f"the value of {found.key!r} in {self.name!r} does not fit the strict schema: {found.expected} - at "
                    f"`{found.path}`; change the type, or add a migration. The state was left untouched"
                )
            await asyncio.sleep(0)


def copy_loaded(state: State) -> None:
    """Copy the values that are parts of the loaded buffer. So the buffer is freed before the commit needs memory."""
    entries = state.entries
    for key, stored in entries.items():
        value = stored.value if isinstance(stored, Expiring) else stored
        if isinstance(value, Raw):
            copy = Json(bytes(value))
            entries[key] = Expiring(copy, stored.at) if isinstance(stored, Expiring) else copy
    state.borrowed = False


async def commit(state: State, session: StorageSession, versions: Versions) -> Committed:
    """Make the changes of a state durable, together with new versions. No other commit may run.

    Raises:
        StorageError: The commit failed. It is not known whether the changes are durable.
    """
    state.versions, state.versions_at = versions, state.revision
    views = SnapshotViews(state)
    taken = state.take()
    try:
        data = encode_small_record(taken) or await join_in_steps(encode_record(taken))
        is_due = await only_storage_errors(lambda: session.commit(data, views.take))
    finally:
        await views.fold()
    return Committed(taken.start, taken.end, data, is_due)
