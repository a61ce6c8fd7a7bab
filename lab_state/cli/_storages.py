"""The storage of a place, and the reading of a state."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Raw

from lab_state._entries import Expiring, Stored
from lab_state._periods import LONGEST_TTL
from lab_state._state_view import StateView, read_state
from lab_state._values import encode
from lab_state.cli._exits import LOCKED, Stop
from lab_state.cli._target import Place, Target
from lab_state.cli._when import parse_when
from lab_state.storage._directory import Paths
from lab_state.storage._protocol import Storage
from lab_state.storage.file import FileStorage


def storage_at(place: Place, *, create: bool = False) -> Storage:
    """Return the storage of a place. With `create`, a missing directory or state is created.

    Raises:
        ValueError: No storage can be at this place.
        ImportError: The extra for S3 is missing.
    """
    if not place.bucket:
        return FileStorage(place.directory, create=create)
    from lab_state.storage.s3 import S3Storage  # noqa: PLC0415 -- only a bucket needs it

    return S3Storage(place.bucket, prefix=place.prefix)


async def storage_to_write(target: Target, *, create: bool = False) -> Storage:
    """Return the storage of a state that a subcommand will write. The files or objects that the write replaces are added to an existing history.

    Nothing is pruned: only the program knows the limits of its history, and prunes it later.

    Raises:
        ValueError: See `storage_at`.
        ImportError: See `storage_at`.
        StorageError: The store could not be asked for a history.
    """
    storage, place = storage_at(target.place, create=create), target.place
    if isinstance(storage, FileStorage):
        if _is_there(Paths.of(place.directory, target.name).history):
            return FileStorage(place.directory, create=create, history=LONGEST_TTL, history_bytes=None)
        return storage
    from lab_state.storage.s3 import S3Storage  # noqa: PLC0415 -- only a bucket needs it
    from lab_state.storage.s3._keeping import has_history  # noqa: PLC0415 -- only a bucket needs it

    assert isinstance(storage, S3Storage)
    if await storage._run(target.name, has_history):  # noqa: SLF001 -- a storage has no public call for this
        return S3Storage(place.bucket, prefix=place.prefix, history=LONGEST_TTL, history_bytes=None)
    return storage


def _is_there(path: str) -> bool:
    return os.path.exists(path)


def check_deposes(target: Target, *, depose: bool) -> None:
    """Check that a subcommand may write to a state: it is on disk, or the user has added `--depose`.

    Raises:
        Stop: The state is in a bucket, and `depose` is False.
    """
    if target.place.bucket and not depose:
        raise Stop(
            LOCKED,
            f"{target} may be open in a process: a bucket has no lock that would show it, and a new writer deposes that process. "
            "Stop it first, and add --depose",
        )


async def read(target: Target, at: str | None = None) -> StateView:
    """Read a state without its lock: as it is now, or at a moment.

    Raises:
        ValueError: `at` is not a moment, or the storage does not have it.
        LabStateError: See `read_state`.
    """
    return await read_state(target.name, storage_at(target.place), **moment(at))


def moment(at: str | None) -> dict[str, Any]:
    """Return the argument of `read_state` for a WHEN, which may be missing.

    Raises:
        ValueError: The text is not a moment.
    """
    return {} if at is None else {"at": parse_when(at, datetime.now().astimezone())}


def entries_of(view: StateView) -> dict[str, Stored]:
    """Return the entries of a view. The caller must not change them, and must not use the reading calls of the view before this call."""
    entries = view._core.state.entries  # noqa: SLF001 -- a million calls of `get` would take seconds
    assert isinstance(entries, dict)
    return entries


def json_of(stored: Stored) -> bytes:
    """Return the JSON of an entry, as it is stored."""
    value = stored.value if isinstance(stored, Expiring) else stored
    return bytes(value) if isinstance(value, bytes | Raw) else encode(value)


def raw_of(stored: Stored) -> bytes:
    """Return the JSON of an entry, in one line and without tabs. The JSON that another program has written may have both."""
    data = json_of(stored)
    return data if is_line(data) else msgspec.json.format(data, indent=-1)


def is_line(data: bytes, breaks: int = 0) -> bool:
    """Return whether JSON has this number of line breaks, and no other control characters. Inside a string, JSON has none."""
    return data.count(b"\n") == breaks and b"\r" not in data and b"\t" not in data


def expiry_of(stored: Stored) -> int | None:
    """Return the expiry of an entry, in milliseconds since 1970; `None` if it does not expire."""
    return stored.at if isinstance(stored, Expiring) else None


def described(view: StateView) -> dict[str, int | float | bool | None]:
    """Return the members of the JSON of a subcommand that say which moment was read, and whether a process has the state open."""
    wall = None if view.wall is None else round(view.wall * 1000)
    return {"live": view.live, "revision": view.revision, "durable_revision": view.durable_revision, "wall": wall}
