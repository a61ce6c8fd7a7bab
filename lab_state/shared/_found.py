"""The state that a new owner finds in the files.

A process that has a copy needs only the records after the copy. These records may not be durable yet, unless the last owner
has ended as planned. So the new owner first settles the state with a commit, and then shows the records. The storage writes a
new journal: with copies of the records, or with the whole state as one frame. Rule 4 of `docs/design/disk.md` gives the
reason, and says which of the two is written.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

import msgspec
from msgspec import Raw

from lab_state._arguments import RESERVED
from lab_state._batch import STEP
from lab_state._codec import LoadedState, check_member, decode_snapshot, encode_snapshot, replay
from lab_state._entries import Layer, StoredOrGone
from lab_state._foreign import only_storage_errors
from lab_state._not_json import NOT_JSON
from lab_state._state import State
from lab_state.exceptions import CorruptionError
from lab_state.shared._frames import BadMessageError
from lab_state.shared._last_records import MOST_BYTES
from lab_state.shared._records import ParsedRecord, parse_in_turns
from lab_state.shared._results import ResultTable
from lab_state.storage._protocol import Recovery, StorageSession

_MEMBER = f'"{RESERVED}":'.encode()

_CHECKED_AT_ONCE = 256 * 1024
"""The number of bytes of older records that one step checks. With small records, such a step takes some milliseconds."""


class _Span(msgspec.Struct, frozen=True, rename={"start": "from", "end": "to"}):
    """The revisions of a record. The other members are skipped."""

    start: int
    end: int


_span = msgspec.json.Decoder(_Span).decode


class Found(NamedTuple):
    """The state in the files.

    Attributes:
        whole: The whole state, which replaces the copy; `None` if the copy stays.
        tail: The records after the copy. It is empty if `whole` is not `None`.
    """

    whole: LoadedState | None
    tail: list[ParsedRecord]


class Files(Protocol):
    """The part of a `SharedSession` that `find` uses."""

    @property
    def recovery(self) -> Recovery:
        """The content of the files. The snapshot may be left out."""
        ...

    @property
    def path(self) -> str:
        """The place of the state, for messages."""
        ...

    async def whole(self) -> Recovery:
        """Return the content of the files, with the snapshot."""
        ...


async def find(files: Files, copy: State | None) -> Found:
    """Return the state of the files, or the part of it that a copy lacks.

    Loading the whole state blocks the event loop, as in `start()`. There is no such load if the journal has records, and
    begins at or below the revision of the copy. There is none either if the journal has no record, and the snapshot has the
    revision of the copy.

    Args:
        files: The files.
        copy: The copy of this process; `None` if the process has none. The copy must not change meanwhile.

    Raises:
        CorruptionError: The files are damaged, or their state is older than the copy.
        UnsupportedError: A newer version of lab_state wrote the files.
        StorageError: The snapshot cannot be read.
    """
    path, records = files.path, files.recovery.records
    if copy is not None and records and (tail := await _tail(records, copy.revision, path)) is not None:
        return Found(None, tail)
    snapshot, _, _, _, crc = await files.whole()
    if copy is not None and not records and _revision_of(snapshot, path, crc) == copy.revision:
        return Found(None, [])
    loaded = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, path, crc)
    loaded = replay(loaded, records, path)
    if copy is not None:
        check_reaches(loaded.revision, copy.revision, path)
    return Found(loaded, [])


def _revision_of(snapshot: bytes | None, path: str, crc: int | None) -> int | None:
    """Return the revision of a snapshot, without decoding its entries; `None` if the revision cannot be found."""
    if snapshot is None or (start := snapshot.rfind(_MEMBER)) < 0:
        return None
    member = Raw(snapshot[start + len(_MEMBER) : -1])
    try:
        meta = check_member(snapshot, member, path, zlib.crc32(snapshot) if crc is None else crc)
    except CorruptionError:
        # The snapshot is damaged, or from another program. The caller then decodes all of it, which raises the right error.
        return None
    # A snapshot without a checksum was edited, so it differs from each copy.
    return None if meta.crc32 is None else meta.revision


async def _tail(records: tuple[bytes, ...], revision: int, path: str) -> list[ParsedRecord] | None:
    """Return the records after a revision; `None` if the first record begins above this revision.

    Earlier records are checked, too, as far back as the owner may send them to processes with an older copy.
    """
    try:
        check_reaches(_span(records[-1]).end, revision, path)
        newer: list[bytes] = []
        start: float = math.inf  # the `from` of the oldest record that was examined
        older = 0  # the bytes of the records that the copy has
        for record in reversed(records):
            span = _span_of(record)
            if span.end < start < math.inf:
                raise CorruptionError(
                    path, 0, f"the changes {span.end + 1} to {start} are missing in its journal; restore a copy"
                )
            start = span.start
            if span.end > revision:
                newer.append(record)
                continue
            older += len(record)
            if older > MOST_BYTES:
                break
            if older % _CHECKED_AT_ONCE < len(record):
                await asyncio.sleep(0)
        if start > revision:
            return None
        return [await parse_in_turns(record) for record in reversed(newer)]
    except (*NOT_JSON, BadMessageError):
        raise CorruptionError(path, 0, "a record of its journal has a valid checksum, but is not a record") from None


def _span_of(record: bytes) -> _Span:
    span = _span(record)
    if not 0 <= span.start <= span.end:
        raise BadMessageError("a record with impossible revisions")
    return span


def check_reaches(end: int, revision: int, path: str) -> None:
    """Check that a state has each change that a copy has.

    Args:
        end: The last revision of the state.
        revision: The revision of the copy.
        path: The place of the state, for the message.

    Raises:
        CorruptionError: The state ends below the revision of the copy.
    """
    if end < revision:
        raise CorruptionError(
            path,
            0,
            f"it ends at revision {end}, but this process has seen revision {revision}, which was durable: the files "
            "were replaced or lost. Stop all processes, and restore the files",
        )


async def settle(session: StorageSession, base: State, tail: list[ParsedRecord]) -> None:
    """Commit a state and the records after it, so that they are certainly durable. The caller shows the records when this returns.

    Args:
        session: The session of the storage. Its next commit writes a new journal.
        base: The state. It must not change meanwhile.
        tail: The records after `base`.

    Raises:
        StorageError: The commit failed.
    """
    while base.fold_staged(STEP):  # noqa: ASYNC110 -- the condition does the work
        await asyncio.sleep(0)
    settling = Settling(base, tail)
    await only_storage_errors(lambda: session.commit(settling.record, settling.slices))


class Settling:
    """The snapshot of the whole state that a new owner has found. If the storage writes the whole state as one frame, the frame has this snapshot."""

    def __init__(self, base: State, tail: list[ParsedRecord]) -> None:
        """Prepare the snapshot of a state with the records after it."""
        self._base = base
        self._changes: dict[str, StoredOrGone] = {}
        self._cleared = False
        self._end = base.revision
        self._versions = base.versions
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
        self._versions = record.versions or self._versions
        if record.calls:
            self._table = self._table or ResultTable()
            self._table.apply(record.calls, record.end)

    @property
    def record(self) -> bytes:
        """A record without changes, at the revision of the snapshot."""
        record = b'{"from":%d,"to":%d,"clear":false,"set":{},"delete":[],"expires":{},"wall":%d}'
        return record % (self._end, self._end, self._base.wall())

    async def slices(self) -> AsyncIterator[bytes]:
        """Yield the snapshot. The event loop runs between two slices. The state must not change meanwhile."""
        base = self._base
        calls = None if self._table is None else self._table.snapshot()
        entries = Layer({} if self._cleared else base.entries, self._changes)
        slices = encode_snapshot(
            entries,
            self._end,
            base.now(),
            copy_loaded=False,
            wall=base.wall(),
            versions=self._versions,
            calls=calls,
        )
        for part in slices:
            yield part
            await asyncio.sleep(0)
