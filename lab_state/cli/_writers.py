"""The writer of a subcommand. It opens a state that is stopped, or sends its calls to the owner of a running shared state."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from msgspec import Raw

from lab_state._codec import decode_record
from lab_state._durability import copied
from lab_state._entries import Expiring
from lab_state._flusher import Flusher
from lab_state._migrations import ANY
from lab_state._values import encode_value
from lab_state.cli._client import PATIENCE, Client
from lab_state.cli._exits import NOT_FOUND, Stop, is_missing
from lab_state.cli._input import Item, has_changed, json_of
from lab_state.cli._storages import check_deposes, raw_of, storage_at, storage_to_write
from lab_state.cli._target import Target
from lab_state.config import Config
from lab_state.exceptions import (
    ConflictError,
    InvalidValueError,
    KeyNotFoundError,
    LockedError,
    StorageError,
    UnsupportedError,
)
from lab_state.manager import Manager
from lab_state.shared._answers import result_of
from lab_state.shared._messages import Changes, Delete, DeleteMany, MakeChanges, Set
from lab_state.shared._open_calls import NEVER
from lab_state.storage.file import FileStorage

CHANGED = "the key {!r} was changed meanwhile, so nothing was written: read it again"


class Writer(Protocol):
    """The writing calls of the command. Their changes are durable at the end of the block of `writer`."""

    async def set(self, key: str, value: Any, ttl: float | None, since: int | None) -> int:
        """Store a value, and return the revision. With `since`, store the value only if the key has not changed after this revision.

        Raises:
            ConflictError: The key was changed, or the records do not show whether it was. Or the state is stopped, and its
                revision is below `since`. Nothing was written.
        """
        ...

    async def replace(self, key: str, before: bytes, expires: int | None, value: Any, since: int) -> int:
        """Replace a value that was read at a revision, keep its expiry, and return the revision.

        The files of a stopped state may not have a record of each change. So for a stopped state, the value and the expiry are
        compared.

        Raises:
            ConflictError: The key was changed after it was read, or has expired. Nothing was written.
        """
        ...

    async def delete(self, keys: list[str]) -> tuple[int, int]:
        """Delete keys, and return how many of them existed, and the revision."""
        ...

    async def load(self, items: Mapping[str, Item], *, replace: bool) -> tuple[int, int]:
        """Store items as one change, and return how many were stored, and the revision.

        Items that have expired are left out. With `replace`, delete all other keys.
        """
        ...


@asynccontextmanager
async def writer(target: Target, *, create: bool = False, depose: bool = False) -> AsyncGenerator[Writer]:
    """Open the writer of a state for the time of the block.

    Args:
        target: The state.
        create: Whether to create a missing state.
        depose: Whether to open a state in a bucket, although a process may have it open.

    Raises:
        Stop: The state is in a bucket, and `depose` is False. Or there is no state, and `create` is False.
        LockedError: A process that does not share the state has it open.
        LabStateError: The state cannot be opened, or a change could not be written.
    """
    check_deposes(target, depose=depose)
    storage = await storage_to_write(target, create=create)
    manager = Manager(Config(name=target.name, flush_interval=None), storage, schema=ANY)
    client = Client(storage, target.name) if isinstance(storage, FileStorage) else None
    try:
        if await _is_shared(client, manager, target):
            assert client is not None
            yield Shared(client)
            return
        try:
            yield Stopped(manager, target)
            await _flush(manager)
        finally:
            await manager.stop()
    finally:
        if client is not None:
            await client.aclose()


async def _flush(manager: Manager) -> None:
    """Flush. If this fails, close the state at once: a stop would try for seconds, and the user can run the command again.

    Raises:
        StorageError: The flush failed.
    """
    try:
        await manager.flush()
    except StorageError as error:
        flusher = manager._running  # noqa: SLF001 -- only a stop is public
        assert isinstance(flusher, Flusher)
        # The raised error has a note that the next flush tries again. This is not so here, so the note is replaced.
        reason = flusher.last_error or error
        await flusher.abort().aclose()
        with contextlib.suppress(StorageError):
            await manager.stop()
        raise copied(reason, "the change was made, or not: look at the state before you try again") from error


async def _is_shared(client: Client | None, manager: Manager, target: Target) -> bool:
    """Connect to the owner of a shared state, or start the manager. Return whether the client is connected.

    An owner may end, and the next one may not listen yet. So connecting and starting are tried again for some time, if the holder
    of the lock shares the state.
    """
    end = time.monotonic() + PATIENCE
    while True:
        if client is not None and await client.connect():
            return True
        try:
            await _start(manager, target)
        except LockedError:
            if client is None or time.monotonic() >= end or not await client.may_appear():
                raise
            await asyncio.sleep(0.05)
        else:
            return False


async def _start(manager: Manager, target: Target) -> None:
    """Start the manager. If there is no state, the error names the option `--create`, and not the argument of `FileStorage`.

    Raises:
        Stop: There is no state.
        LabStateError: The state cannot be opened.
    """
    try:
        await manager.start()
    except UnsupportedError as error:
        if not is_missing(error):
            raise
        advice = "check the name and the directory; set and load make one with --create"
        raise Stop(NOT_FOUND, f"there is no state at {target}: {advice}") from None


class Stopped:
    """The writer of a state that no other process has open."""

    def __init__(self, manager: Manager, target: Target) -> None:
        """Write with a manager that runs."""
        self._manager = manager
        self._target = target

    async def set(self, key: str, value: Any, ttl: float | None, since: int | None) -> int:
        """Store a value; see `Writer`."""
        if since is not None:
            await self._check(key, since)
        return await self._manager.set(key, value, ttl=ttl)

    async def _check(self, key: str, since: int) -> None:
        """Check that a key has not changed after a revision.

        Raises:
            ConflictError: The key has changed, or the journal does not reach back to that revision.
        """
        reading = await storage_at(self._target.place).read(self._target.name)
        revision = self._manager.revision
        if since > revision:
            raise ConflictError(f"the state is at revision {revision}, which is below {since}: nothing was written")
        changed = has_changed(key, since, map(decode_record, reading.records), revision)
        if changed is None:
            raise ConflictError(
                f"the journal does not show whether {key!r} was changed after revision {since}: nothing was written; "
                f"look at the value, and use --if {revision}"
            )
        if changed:
            raise ConflictError(CHANGED.format(key))

    async def replace(self, key: str, before: bytes, expires: int | None, value: Any, since: int) -> int:
        """Replace a value; see `Writer`."""
        manager = self._manager
        try:
            # The file of another program may have the value in several lines; `before` is one line.
            value_now = raw_of(await manager.get(key, type=Raw))
            same = value_now == before and manager._expiry(key) == expires  # noqa: SLF001 -- `expires_in` is not exact
        except KeyNotFoundError:
            same = False
        if not same:
            raise ConflictError(CHANGED.format(key))
        await manager.update(key, lambda _: value)
        return manager.revision

    async def delete(self, keys: list[str]) -> tuple[int, int]:
        """Delete keys; see `Writer`."""
        return await self._manager.delete_many(keys), self._manager.revision

    async def load(self, items: Mapping[str, Item], *, replace: bool) -> tuple[int, int]:
        """Store items as one change; see `Writer`."""
        now = self._manager._core.state.now()  # noqa: SLF001 -- a manager has no public call for the time of its state
        plain, expiring = _split(items, now)
        async with self._manager.transaction() as draft:
            if replace:
                draft.delete_all()
            draft.set_many(plain)
            for key, (value, at) in expiring.items():
                draft.set(key, value)
                # With `ttl=`, the expiry would be another one: rounded, and counted from a later time.
                draft._core.changes[key] = Expiring(encode_value(value), at)  # noqa: SLF001
        return len(plain) + len(expiring), draft.revision


def _split(items: Mapping[str, Item], now: int) -> tuple[dict[str, Any], dict[str, tuple[Any, int]]]:
    """Return the values that do not expire, and those that do, with their times. Leave out those that have expired at `now`."""
    plain = {key: item.value for key, item in items.items() if item.expires is None}
    expiring = {key: (item.value, item.expires) for key, item in items.items() if item.expires is not None}
    return plain, {key: found for key, found in expiring.items() if found[1] > now}


class Shared:
    """The writer of a shared state that runs: each call is sent to its owner."""

    def __init__(self, client: Client) -> None:
        """Write through a client that is connected."""
        self._client = client

    async def set(self, key: str, value: Any, ttl: float | None, since: int | None) -> int:
        """Store a value; see `Writer`."""
        raw = json_of(value)
        milliseconds = None if ttl is None else math.ceil(ttl * 1000)
        if since is None:
            return (await self._client.call(lambda n, ack, _: Set(n, ack, key, raw, milliseconds))).revision
        expires = {} if milliseconds is None else {key: int(self._client.now * 1000) + milliseconds}
        return await self._change(Changes(set={key: raw}, expires=expires), since, [key])

    async def replace(self, key: str, before: bytes, expires: int | None, value: Any, since: int) -> int:
        """Replace a value; see `Writer`."""
        await self._client.reach(since)
        # The owner deletes an expired key up to a second later, so the check of the call may not show it yet.
        if expires is not None and expires <= self._client.now * 1000:
            raise ConflictError(CHANGED.format(key))
        times = {} if expires is None else {key: expires}
        return await self._change(Changes(set={key: json_of(value)}, expires=times), since, [key])

    async def delete(self, keys: list[str]) -> tuple[int, int]:
        """Delete keys; see `Writer`."""
        if len(keys) == 1:
            made = await self._client.call(lambda n, ack, _: Delete(n, ack, keys[0]))
        else:
            made = await self._client.call(lambda n, ack, _: DeleteMany(n, ack, keys))
        found = result_of(made)
        assert isinstance(found, int)
        return int(found), made.revision

    async def load(self, items: Mapping[str, Item], *, replace: bool) -> tuple[int, int]:
        """Store items as one change; see `Writer`."""
        plain, expiring = _split(items, int(self._client.now * 1000))
        values = {key: json_of(value) for key, value in plain.items()}
        values |= {key: json_of(value) for key, (value, _) in expiring.items()}
        times = {key: at for key, (_, at) in expiring.items()}
        try:
            return len(values), await self._change(Changes(clear=replace, set=values, expires=times), NEVER, [])
        except InvalidValueError as error:
            if not str(error).endswith("split it"):  # the owner refuses a value
                raise
            raise InvalidValueError(f"{error}, or stop the processes of the state first") from None

    async def _change(self, changes: Changes, since: int, keys: list[str]) -> int:
        return (await self._client.call(lambda n, ack, at: MakeChanges(n, ack, at, keys, [], changes), since)).revision
