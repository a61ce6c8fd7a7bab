"""Reading and decoding a state without opening it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from lab_state._argument_types import kind_of
from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state._entries import Expiring, Stored
from lab_state.exceptions import CorruptionError, UnavailableError
from lab_state.storage._protocol import Reading, Storage

_MOST_READINGS = 10


class Decoded(NamedTuple):
    """A state that was read without opening it.

    Attributes:
        state: The content of the state.
        durable_revision: Every change up to this revision is certainly durable.
        live: Whether a writer has the state open; `None` if it is not known.
        path: The place of the state, for messages.
        size: The number of bytes of the snapshot and the records.
    """

    state: LoadedState
    durable_revision: int
    live: bool | None
    path: str
    size: int


async def load(name: str, storage: Storage) -> Decoded:
    """Read a state that a writer may have open, and decode it. As in `start()`, decoding blocks the event loop.

    Raises:
        TypeError: `storage` is not a storage, or has no method `read`.
        CorruptionError: Two consecutive readings found the same damage.
        UnsupportedError: A newer version of lab_state wrote the state.
        UnavailableError: Ten readings found damage, but never the same damage twice in a row. Probably a writer changed the state.
        StorageError: Reading failed; see `Storage.read`.
    """
    # A storage from another package may lack `read`, because a manager does not call it.
    if isinstance(storage, type | os.PathLike) or not callable(getattr(storage, "read", None)):
        raise TypeError(
            f"{kind_of(storage)} cannot be read without being opened: a storage needs "
            "`async def read(self, name: str) -> Reading`; see lab_state.Storage"
        )
    return await load_by(storage.read, name)


async def load_by(read: Callable[[str], Awaitable[Reading]], name: str) -> Decoded:
    """Read a state by a function such as `Storage.read`, and decode it. For the errors, see `load`."""
    before: tuple[Reading, str] | None = None
    path = name
    for _ in range(_MOST_READINGS):
        reading = await read(name)
        path = reading.path
        try:
            return await decoded(reading)
        except CorruptionError as error:
            # If a writer replaces files during a reading, the reading looks damaged. Only real damage is found twice.
            if before is not None and _is_the_same(before, (reading, str(error))):
                raise
            before = reading, str(error)
    raise UnavailableError(f"{path} changed during each of {_MOST_READINGS} attempts to read it; read it again")


def _is_the_same(before: tuple[Reading, str], now: tuple[Reading, str]) -> bool:
    """Return whether two readings have the same error and the same state. The later reading may have more records."""
    (first, error), (second, again) = before, now
    grown = first.snapshot == second.snapshot and first.records == second.records[: len(first.records)]
    return error == again and grown


async def decoded(reading: Reading) -> Decoded:
    """Decode a reading. This blocks the event loop, as in `start()`.

    Raises:
        CorruptionError: The reading is damaged.
        UnsupportedError: A newer version of lab_state wrote the state.
    """
    snapshot, records, durable, live, path, crc = reading
    start = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, path, crc)
    await asyncio.sleep(0)
    durable_state = replay(start, records[:durable], path)
    whole = replay(durable_state, records[durable:], path, first=durable + 1)
    size = len(snapshot or b"") + sum(map(len, records))
    return Decoded(whole, durable_state.revision, live, path, size)


def view_of(state: LoadedState) -> dict[str, Stored]:
    """Return the entries with their expiry times, as `encode_snapshot` takes them."""
    return {key: _with_time(state, key) for key in state.entries}


def _with_time(state: LoadedState, key: str) -> Stored:
    value, at = state.entries[key], state.expires.get(key)
    return value if at is None or isinstance(value, Expiring) else Expiring(value, at)
