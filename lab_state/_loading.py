"""A state read without being opened, and decoded."""

from __future__ import annotations

import asyncio
import os
from typing import NamedTuple

from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state.exceptions import CorruptionError, UnavailableError
from lab_state.storage._protocol import Reading, Storage

_MOST_READINGS = 10


class Loaded(NamedTuple):
    """A state as it was read.

    Attributes:
        state: What is in it.
        durable_revision: Everything up to this revision is durable for certain.
        live: Whether a writer has it open; `None` where that cannot be told.
        path: Where it is, for messages.
        size: How many bytes it has there.
    """

    state: LoadedState
    durable_revision: int
    live: bool | None
    path: str
    size: int


async def load(name: str, storage: Storage) -> Loaded:
    """Read a state beside the writer that may have it open; decoding holds up the event loop as `start()` does.

    Raises:
        TypeError: The storage is none, or cannot read.
        StorageError: See `Storage.read`.
    """
    # Storages that others wrote may be older than this method.
    if isinstance(storage, type | os.PathLike) or not callable(getattr(storage, "read", None)):
        raise TypeError(
            f"{type(storage).__name__} cannot be read without being opened: a storage needs "
            "`async def read(self, name: str) -> Reading`; see lab_state.Storage"
        )
    before: tuple[Reading, str] | None = None
    path = name
    for _ in range(_MOST_READINGS):
        reading = await storage.read(name)
        path = reading.path
        try:
            return await _decoded(reading)
        except CorruptionError as error:
            # Damage is there a second time; what a writer replaced meanwhile is not.
            if before is not None and _is_the_same(before, (reading, str(error))):
                raise
            before = reading, str(error)
    raise UnavailableError(f"{path} changed each time that it was read; read it again")


def _is_the_same(before: tuple[Reading, str], now: tuple[Reading, str]) -> bool:
    """Return whether two readings have the same fault, and are of one state, which may have grown."""
    (first, error), (second, again) = before, now
    grown = first.snapshot == second.snapshot and first.records == second.records[: len(first.records)]
    return error == again and grown


async def _decoded(reading: Reading) -> Loaded:
    snapshot, records, durable, live, path, crc = reading
    start = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, path, crc)
    await asyncio.sleep(0)
    durable_state = replay(start, records[:durable], path)
    whole = replay(durable_state, records[durable:], path, first=durable + 1)
    size = len(snapshot or b"") + sum(map(len, records))
    return Loaded(whole, durable_state.revision, live, path, size)
