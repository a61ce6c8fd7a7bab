"""What a new owner finds in the files, beside its copy. Pure, apart from the log.

A process that has a copy needs only the records after it. They are shown when they are certainly durable: the
new owner first writes the whole state, with these records, as one frame. Rule 4 of the disk says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

from lab_state._clock import Clock
from lab_state._codec import LoadedState, decode_snapshot, encode_snapshot, replay
from lab_state._entries import Layer, StoredOrGone
from lab_state._log import Log
from lab_state._opening import time_of
from lab_state._state import State
from lab_state.exceptions import CorruptionError
from lab_state.shared._frames import BadMessageError
from lab_state.shared._records import ParsedRecord, parse_record
from lab_state.shared._results import ResultTable
from lab_state.storage._protocol import Recovery


class Found(NamedTuple):
    """The state in the files.

    Attributes:
        fresh: The whole state, which replaces the copy; `None` if the copy stays.
        tail: The records after the copy.
        revision: The revision of the state.
    """

    fresh: State | None
    tail: list[ParsedRecord]
    revision: int


def find(recovery: Recovery, path: str, copy: State | None, clock: Clock, logger: Log) -> Found:
    """Return what the files have beside a copy.

    Args:
        recovery: The content of the files.
        path: The place of the state, for messages.
        copy: The copy of this process; `None` if it has none.
        clock: The clock of the manager.
        logger: The logger of the manager.

    Raises:
        CorruptionError: The files are damaged, or have less than the copy.
    """
    if copy is not None and recovery.records and (tail := _tail(recovery.records, copy, path)) is not None:
        return Found(None, tail, max([copy.revision, *(record.end for record in tail)]))
    snapshot, records, _, _, crc = recovery
    loaded = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, path, crc)
    loaded = replay(loaded, records, path)
    if copy is not None and loaded.revision <= copy.revision:
        _check_reaches(loaded.revision, copy, path)
        return Found(None, [], copy.revision)
    return Found(_state(loaded, path, clock, logger), [], loaded.revision)


def _tail(records: tuple[bytes, ...], copy: State, path: str) -> list[ParsedRecord] | None:
    """Return the records after the copy; `None` if the first record begins above it."""
    try:
        parsed = [parse_record(record) for record in records]
    except BadMessageError:
        raise CorruptionError(path, 0, "a record of its journal has a valid checksum, but is not a record") from None
    if parsed[0].start > copy.revision:
        return None
    _check_reaches(parsed[-1].end, copy, path)
    tail = [record for record in parsed if record.end > copy.revision]
    at = copy.revision
    for record in tail:
        if record.start > at:
            raise CorruptionError(
                path, 0, f"the changes {at + 1} to {record.start} are missing in its journal; restore a copy"
            )
        at = record.end
    return tail


def _check_reaches(revision: int, copy: State, path: str) -> None:
    if revision < copy.revision:
        raise CorruptionError(
            path,
            0,
            f"it ends at revision {revision}, but this process has seen revision {copy.revision}, which was durable: the "
            "files were replaced or lost. Stop all processes, and restore the files",
        )


def _state(loaded: LoadedState, path: str, clock: Clock, logger: Log) -> State:
    state = State(clock.monotonic, time_of(loaded, path, clock, logger), clock.time)
    state.load(loaded.entries, loaded.revision, loaded.expires)
    state.results = loaded.results
    return state


class Settling:
    """The whole state as its new owner has found it: a snapshot, for the frame that settles it."""

    def __init__(self, base: State, tail: list[ParsedRecord]) -> None:
        """Prepare the snapshot of a state with the records after it."""
        self._base = base
        self._changes: dict[str, StoredOrGone] = {}
        self._cleared = False
        self._end = base.revision
        self._table: ResultTable | None = None
        if base.results is not None:
            self._table = ResultTable()
            self._table.load(base.results.snapshot())
        for record in tail:
            self._add(record)

    def _add(self, record: ParsedRecord) -> None:
        if record.cleared:
            self._changes, self._cleared = {}, True
        self._changes.update(record.changes)
        self._end = record.end
        if record.calls:
            self._table = self._table or ResultTable()
            self._table.apply(record.calls, record.end)

    @property
    def record(self) -> bytes:
        """A record without changes, at the revision of the snapshot."""
        return b'{"from":%d,"to":%d,"clear":false,"set":{},"delete":[],"expires":{}}' % (self._end, self._end)

    async def slices(self) -> AsyncIterator[bytes]:
        """Yield the snapshot. The event loop runs between two slices. The state must not change meanwhile."""
        base = self._base
        calls = None if self._table is None else self._table.snapshot()
        entries = Layer({} if self._cleared else base.entries, self._changes)
        for part in encode_snapshot(entries, self._end, base.now(), copy_loaded=False, wall=base.wall(), calls=calls):
            yield part
            await asyncio.sleep(0)
