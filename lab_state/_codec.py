"""Encode changes as records and states as snapshots, and decode both. This module does no I/O.

Both formats are JSON, in version 1:

* A record has the changes of one commit:
  `{"from":41,"to":42,"clear":false,"set":{...},"delete":[...],"expires":{...},"wall":1700000000000}`.
* A snapshot has the user's keys, and one reserved member at the end:
  `"$lab_state":{"format":1,"revision":42,"id":"...","expires":{...},"wall":1700000000000,"crc32":"9ae0daaf"}`.
  The CRC-32 covers every byte before `,"crc32":"`: the user's keys and values, and the rest of the member.
  `id` is a new random text for each snapshot, so two snapshots of the same state have different bytes.

`wall` is the time of the wall clock at the write. A later record may have an earlier time, because the clock may be set
back. `expires` has the expiry times of keys. A snapshot without expiries has no such member. If any key of the state
expires, there is also the member `time`: the time of the state at the write. All times are in milliseconds since 1970.
The next start continues from `time`, and adds the time that has passed on the wall clock since the write; see
`_expiry.resumed`.

If the state has other versions than `FIRST_VERSIONS`, they are in the members `schema` and `readable_by`, after `wall`. A record
has both members only if it changes one of them.

If there are results of calls that other processes made, they are in the member `calls` (`shared/_results.py`).
The snapshot of each checkpoint before `stop()` has the member `"followed":true`; see `_journal.is_followed`.
A snapshot in S3 has the members `seq` and `fence`, too (`storage/s3/_format.py`).
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import chain
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET, Raw, UnsetType

from lab_state._arguments import RESERVED, check_key
from lab_state._buffers import ByteBuffer
from lab_state._entries import FIRST_VERSIONS, ChangeSet, Expiring, Json, Layer, Stored, StoredOrGone, Value, Versions
from lab_state._journal import SNAPSHOT_END, SNAPSHOT_END_BYTES
from lab_state._nesting import MAX_DEPTH, too_deep
from lab_state._not_json import NOT_JSON, not_an_object
from lab_state._slices import MOST_AT_ONCE, SLICE_BYTES, TAB, Int64, members, names, parts_of, pieces, times
from lab_state._values import encode
from lab_state.exceptions import CorruptionError, InvalidKeyError, UnsupportedError
from lab_state.shared._results import RecordCalls, ResultTable, SnapshotCalls

FORMAT = 1

_CRC = b',"crc32":"'
_ID = re.compile(r"[0-9a-f]{16}")
_LAST_REVISION = 2**63 - 1

Version: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
"""A version of a schema in stored JSON."""


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The reserved member of a snapshot. Only a snapshot in S3 has `seq` and `fence`, the two numbers of its stamp.

    If `crc32` is missing, a person has edited the snapshot.
    """

    format: int
    revision: Int64
    id: str
    crc32: str | None = None
    expires: dict[str, Int64] = {}
    time: Int64 = 0
    wall: Int64 = 0
    schema: Version = 1
    readable_by: Version = 1
    calls: SnapshotCalls = {}
    followed: bool = False
    seq: int | None = None
    fence: int | None = None


class _AnyFormat(msgspec.Struct, frozen=True):
    """The format of a reserved member. All other fields are ignored, so the member of a newer version can be read."""

    format: int


class LoadedState(NamedTuple):
    """A whole state that was decoded.

    Times are in milliseconds since 1970. `wall` is 0 if it is not recorded. `results` is `None` if the state has no results of calls.
    """

    entries: dict[str, Stored]
    revision: int
    expires: Mapping[str, int] = {}
    time: int = 0
    wall: int = 0
    results: ResultTable | None = None
    versions: Versions = FIRST_VERSIONS


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"start": "from", "end": "to"}):
    """The changes of one commit. Their revisions are above `start`, and at most `end`."""

    start: Int64
    end: Int64
    clear: bool
    set: dict[str, Raw]
    delete: list[str]
    expires: dict[str, Int64] = {}
    time: Int64 = 0
    wall: Int64 = 0
    schema: Version | None = None
    readable_by: Version | None = None
    calls: RecordCalls | UnsetType = UNSET  # a default of {} would make a dict for each record

    @property
    def versions(self) -> Versions | None:
        """The versions from this record on; `None` if the record does not change them."""
        return None if self.schema is None else Versions(self.schema, self.readable_by or self.schema)


_decode_entries = msgspec.json.Decoder(dict[str, Raw]).decode
decode_record = msgspec.json.Decoder(Record).decode


def encode_small_record(taken: ChangeSet, calls: RecordCalls | None = None) -> bytes | None:
    """Return the record of a commit that only stores a few small values; otherwise `None`.

    The result is `None` if there are more than 500 changes, or more than about 64 KiB of values. It is also `None` if
    the changes delete single keys or have a loaded value, or if any key of the state expires. `calls` has the results
    of calls of other processes, if there are any.
    """
    if taken.time or not (values := _encode_small(taken.changes)):
        return None
    clear = b"true" if taken.cleared else b"false"
    record = b'{"from":%d,"to":%d,"clear":%s,"set":%s,"delete":[],"expires":{},"wall":%d}'
    record = record % (taken.start, taken.end, clear, values, taken.wall)
    end = _end(taken.versions, calls)
    return record[:-1] + end + b"}" if end else record


def encode_record(taken: ChangeSet, calls: RecordCalls | None = None) -> Iterator[bytes]:
    """Yield the record of a commit in slices. The caller may let the event loop run after each slice.

    `calls` has the results of calls of other processes, if there are any.
    """
    clear = b"true" if taken.cleared else b"false"
    expires: dict[str, int] = {}
    deleted: list[str] = []
    mark = TAB if len(taken.changes) > MOST_AT_ONCE else b""
    yield b'{"from":%d,"to":%d,"clear":%s,"set":{' % (taken.start, taken.end, clear)
    yield from members(parts_of(taken.changes.items(), expires, deleted), mark)
    yield mark + b'},"delete":['
    yield from names(deleted, mark)
    yield mark + b'],"expires":{'
    yield from times(expires, mark)
    time = b',"time":%d' % taken.time if taken.time else b""
    yield mark + b'}%s,"wall":%d' % (time, taken.wall)
    yield _end(taken.versions, calls) + b"}"


def _end(versions: Versions | None, calls: RecordCalls | SnapshotCalls | None) -> bytes:
    """Return the JSON of the members after `wall`; no bytes if there are none."""
    end = b"" if versions is None else b',"schema":%d,"readable_by":%d' % versions
    return end + _calls(calls) if calls else end


def _calls(calls: RecordCalls | SnapshotCalls) -> bytes:
    """Return the JSON of the member `calls`. It is encoded in one step, because each client has at most 1,024 results."""
    return b',"calls":' + encode(calls)


def _encode_small(changes: Mapping[str, StoredOrGone]) -> bytes | None:
    """Return the JSON of the changes, encoded in one call. Return `None` if they are not just a few small values.

    Most commits have only a few small values. For a hundred values, a single call saves 98 µs.
    """
    if len(changes) > MOST_AT_ONCE:
        return None
    part: dict[str, Value] = {}
    size = 0
    for key, stored in changes.items():
        if isinstance(stored, bytes):
            part[key] = Raw(stored)
            size += len(stored)
        elif isinstance(stored, str):
            part[key] = stored
            size += len(stored)
        elif isinstance(stored, int | float | None):
            part[key] = stored
        else:
            return None
    return encode(part) if size < SLICE_BYTES else None


def _copied(parts: Iterable[dict[str, Value]], view: dict[str, Stored]) -> Iterator[dict[str, Value]]:
    """Replace loaded values in `view` by copies, and yield the parts. While a large value is copied, yield empty parts."""
    for part in parts:
        for key in part:
            stored = view[key]
            value = stored.value if isinstance(stored, Expiring) else stored
            if isinstance(value, Raw):
                buffer = ByteBuffer()
                for number, piece in enumerate(pieces(value)):
                    if number:
                        yield {}
                    buffer.add(piece)
                copy = Json(buffer.taken())
                view[key] = Expiring(copy, stored.at) if isinstance(stored, Expiring) else copy
        yield part


def replay(snapshot: LoadedState, records: Iterable[bytes], path: str, *, first: int = 1) -> LoadedState:
    """Apply records to a loaded snapshot, and return the resulting state. The entries of `snapshot` may be changed.

    Args:
        snapshot: The state before the records.
        records: The records.
        path: The file or object that contains the records, for messages.
        first: The number of the first record, for messages.

    Raises:
        CorruptionError: A record cannot be decoded or has an expiry without a value, or changes before it are missing.
    """
    entries, revision, times, time, wall, results, versions = snapshot
    expires = dict(times)
    for number, data in enumerate(records, first):
        try:
            record = decode_record(data)
        except NOT_JSON:
            raise CorruptionError(path, 0, f"record {number} is not the JSON of a record; restore a copy") from None
        if record.end <= revision:
            continue
        if record.start > revision:
            raise CorruptionError(
                path,
                0,
                f"the changes {revision + 1} to {record.start} are missing before record {number}; restore a copy",
            )
        _check_times(record.expires, record.set.keys() - record.delete if record.expires else (), path)
        if record.clear:
            entries, expires = {}, {}
        entries.update(record.set)
        for key in record.delete:
            entries.pop(key, None)
        if expires:
            for key in chain(record.set, record.delete):
                expires.pop(key, None)
        expires.update(record.expires)
        time, wall = record.time or time, record.wall or wall
        versions = record.versions or versions
        revision = record.end
        if record.calls is not UNSET:
            results = results or ResultTable()
            results.apply(record.calls, revision)
    return LoadedState(entries, revision, expires, time, wall, results, versions)


def encode_snapshot(
    view: dict[str, Stored] | Layer,
    revision: int,
    time: int,
    *,
    copy_loaded: bool,
    wall: int = 0,
    versions: Versions = FIRST_VERSIONS,
    calls: SnapshotCalls | None = None,
    is_followed: bool = False,
) -> Iterator[bytes]:
    """Yield the snapshot of a view in slices, some of them empty. The caller may let the event loop run after each slice.

    Args:
        view: The entries. Other code must not change them until the last slice.
        revision: The revision of the view.
        time: The time of the state, in milliseconds since 1970.
        wall: The time of the wall clock, in milliseconds since 1970.
        copy_loaded: Whether to replace loaded values in the view by copies, if the view is a dict. A
            loaded value is a part of a large buffer, and keeps all of that buffer in memory.
        versions: The versions of the state at this revision.
        calls: The results of calls of other processes at this revision, if there are any.
        is_followed: Whether the snapshot gets the followed mark; see `_journal.is_followed`.
    """
    crc = 0
    end = _end(None if versions == FIRST_VERSIONS else versions, calls)
    if is_followed:
        end += b',"followed":true'
    for data in chain(_uncovered(view, revision, time, wall, copy_loaded=copy_loaded), (end,)):
        crc = zlib.crc32(data, crc)
        yield data
    yield b'%s%08x"}}' % (_CRC, crc)


def _uncovered(
    view: dict[str, Stored] | Layer, revision: int, time: int, wall: int, *, copy_loaded: bool
) -> Iterator[bytes]:
    """Yield a snapshot up to its member `wall`. The checksum covers these bytes, and the members after `wall`."""
    opening = b"{"
    expires: dict[str, int] = {}
    parts = parts_of(view.items(), expires, [])
    for part in members(_copied(parts, view) if copy_loaded and isinstance(view, dict) else parts):
        yield opening + part if part else b""
        opening = b"" if part else opening
    member = encode({"format": FORMAT, "revision": revision, "id": os.urandom(8).hex()})
    yield (opening or b",") + encode(RESERVED) + b":" + member[:-1]
    if expires:
        yield b',"expires":{'
        yield from times(expires)
        yield b'},"time":%d' % time if time else b"}"
    yield b',"wall":%d' % wall


def decode_snapshot(data: bytes, path: str, crc: int | None = None) -> LoadedState:
    """Decode a snapshot, or import a plain JSON object that another program wrote.

    Args:
        data: The bytes.
        path: The file or object that contains the bytes, for messages.
        crc: The CRC-32 of the bytes, if it is known.

    Raises:
        CorruptionError: The bytes are not a JSON object, or a snapshot was damaged or edited, or a key or value cannot be kept.
        UnsupportedError: A newer version of lab_state wrote the snapshot.
    """
    try:
        entries: dict[str, Any] = _decode_entries(data)
    except NOT_JSON as error:
        raise CorruptionError(path, *not_an_object(data, error)) from None
    member = entries.pop(RESERVED, None)
    if member is None:
        _check_foreign(data, entries, path)
        return LoadedState(entries, 0)
    meta = check_member(data, member, path, zlib.crc32(data) if crc is None else crc)
    expires: Mapping[str, int] = meta.expires
    if meta.crc32 is None:
        _check_entries(data, entries, path)
        expires = {key: at for key, at in expires.items() if key in entries}
    _check_times(expires, entries, path)
    results = None
    if meta.calls:
        results = ResultTable()
        results.load(meta.calls)
    versions = Versions(meta.schema, meta.readable_by)
    return LoadedState(entries, meta.revision, expires, meta.time, meta.wall, results, versions)


def check_member(data: bytes, member: Raw, path: str, crc: int) -> Meta:
    """Decode the reserved member of a snapshot, and check it against `crc`, the checksum of all bytes.

    If only the checksum is missing, a person has edited the snapshot. The edit counts as a change, so the result has the next revision.

    Raises:
        CorruptionError: The member is damaged, or the checksum is wrong.
        UnsupportedError: A newer version of lab_state wrote the snapshot.
    """
    try:
        found = msgspec.json.decode(member, type=_AnyFormat).format
        if found > FORMAT:
            raise UnsupportedError(
                f"{path} has format {found}, and this version of lab_state knows {FORMAT}: use the version that wrote it; "
                "it was left untouched"
            )
        meta = msgspec.json.decode(member, type=Meta)
    except NOT_JSON:
        raise CorruptionError(
            path,
            0,
            f"its member {RESERVED!r} is damaged; restore a copy. If it was edited by hand, delete the member: then no key "
            "expires, and revisions begin at 0",
        ) from None
    if is_edited(meta) and meta.format == FORMAT and 0 <= meta.revision < _LAST_REVISION:
        return msgspec.structs.replace(meta, revision=meta.revision + 1)
    # The member contains the checksum of all bytes before `,"crc32":"`. This checksum is continued over the other bytes.
    # The result must be `crc`.
    end = SNAPSHOT_END.search(data, max(0, len(data) - SNAPSHOT_END_BYTES))
    claimed = end is not None and end[1].decode() == meta.crc32 and zlib.crc32(end[0], int(end[1], 16)) == crc
    if not claimed or meta.format != FORMAT or meta.revision < 0:
        raise CorruptionError(
            path,
            0,
            "its checksum does not match its contents; restore a copy. If it was edited by hand, delete "
            f'`,"crc32":"…"` at the end of its member {RESERVED!r}: the rest of the member stays valid',
        )
    return meta


def is_edited(meta: Meta) -> bool:
    """Return whether a person has deleted the checksum of a reserved member, and nothing else in it."""
    return meta.crc32 is None and _ID.fullmatch(meta.id) is not None  # lost bytes rarely leave a whole id


def _check_times(expires: Mapping[str, int], entries: Container[str], path: str) -> None:
    for key in expires:
        if key not in entries:
            raise CorruptionError(path, 0, f"the key {key!r} has an expiry time, but no value; restore a copy")


def _check_foreign(data: bytes, entries: dict[str, Raw], path: str) -> None:
    """Check that an object without the reserved member is not a damaged snapshot; see also `_check_entries`."""
    tail = data[data.rfind(b'{"format":') : -1]
    for suspect in (next(reversed(entries.values()), Raw(b"null")), tail):
        if looks_like_member(suspect):
            raise CorruptionError(
                path,
                len(data) - len(tail),
                f"the name of its last member, {RESERVED!r}, is damaged; restore a copy",
            )
    if SNAPSHOT_END.search(data):
        raise CorruptionError(
            path,
            len(data) - len(tail),
            f"it ends as a state does, but its member {RESERVED!r} is missing, so bytes before the end are missing; "
            "restore a copy. If another program wrote it, add a newline at its end",
        )
    _check_entries(data, entries, path)


def _check_entries(data: bytes, entries: dict[str, Raw], path: str) -> None:
    """Check that lab_state can keep each key and value that a person or another program wrote."""
    for key, value in entries.items():
        try:
            check_key(key)
        except InvalidKeyError as error:
            raise CorruptionError(
                path, 0, f"lab_state cannot keep one of its keys ({error}); rename this key in the file"
            ) from None
        if (why_not := _why_not(value)) is not None:
            raise CorruptionError(path, data.find(bytes(value)), f"the value of {key!r} {why_not}")


def _why_not(value: Raw) -> str | None:
    try:
        msgspec.json.decode(value)
    except msgspec.ValidationError:  # no type was requested, so only a number can cause this error
        return "has a number that is out of range: larger than any float, or with too many digits; make it a string"
    except NOT_JSON:
        return "is not valid JSON in UTF-8; correct it by hand"
    return f"has more than {MAX_DEPTH} levels of nesting; use fewer" if too_deep(bytes(value)) else None


def looks_like_member(value: Raw | bytes) -> bool:
    """Return whether the JSON of a value has the members of the reserved member."""
    try:
        members = msgspec.json.decode(value, type=dict[str, Raw])
    except NOT_JSON:
        return False
    return members.keys() >= {"format", "revision", "id", "crc32"}
