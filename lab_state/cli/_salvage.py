"""Decide what can be saved of the damaged files or objects of a state, and what is lost. This module does no I/O.

A change is kept only with all changes before it. So the result is a moment of the state, unless a value in the snapshot itself is
damaged. All losses are listed: bytes, revisions and keys.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from itertools import chain, repeat, takewhile
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import Raw

from lab_state import _journal as journal
from lab_state._codec import LoadedState, Meta, decode_record, decode_snapshot, replay
from lab_state._entries import Stored, Versions
from lab_state._journal import ANY_BASE, NO_BASE, FoundFrame, FrameKind, base_of
from lab_state._not_json import NOT_JSON
from lab_state.cli._text import changes_text, counted
from lab_state.cli._verify import faults_of
from lab_state.exceptions import CorruptionError

if TYPE_CHECKING:
    from lab_state.storage.s3._pieces import Pieces

_RESERVED = "$lab_state"
_SHOWN = 20
_MEMBERS = msgspec.json.Decoder(dict[str, Raw]).decode


class Salvaged(NamedTuple):
    """The content that can be saved.

    Attributes:
        state: The state.
        lost: A sentence about each loss, and about each part that may be wrong.
        highest: The highest revision in any record or snapshot. The repaired state must have a higher one.
    """

    state: LoadedState
    lost: list[str]
    highest: int


def salvage(snapshot: bytes | None, data: bytes | None, name: str) -> Salvaged:
    """Return what can be saved of a snapshot and a journal. Each of them may be damaged, or missing (`None`)."""
    lost: list[str] = []
    base = ANY_BASE
    frames: list[FoundFrame] = []
    if data is not None:
        base, frames = _frames(data, name, lost)
    full = next((frame.payload for frame in frames if frame.kind is FrameKind.FULL), None)
    records = [frame.payload for frame in frames if frame.kind is FrameKind.RECORD]
    state = LoadedState({}, 0)
    if full is not None:
        state = _snapshot(full, "the state in the journal", lost)
    elif snapshot is not None:
        state = _snapshot(snapshot, "the snapshot", lost)
        if data is None and journal.is_followed(snapshot):
            lost.append("the journal is missing: the changes since the last checkpoint are lost")
        followed = {base, *(frame.payload.decode() for frame in frames if frame.kind is FrameKind.CHECKPOINT)}
        if base != ANY_BASE and _is_foreign(snapshot) and base_of(len(snapshot), zlib.crc32(snapshot)) not in followed:
            return _replayed(state, [], records, lost)
    elif base != NO_BASE:
        lost.append("the snapshot is missing")
    return _replayed(state, records, [], lost)


def salvage_objects(pieces: Pieces) -> Salvaged:
    """Return what can be saved of the objects of a state in S3."""
    snapshot, base, records, is_followed, problems = pieces
    lost: list[str] = []
    state = LoadedState({}, 0)
    if snapshot is not None:
        state = _snapshot(snapshot, "the snapshot", lost)
    elif is_followed:
        lost.append("the snapshot is missing")
    lost += problems
    ordinary = [record for record, _ in records]
    if snapshot is not None and _is_foreign(snapshot):
        ordinary = [record for record, _ in takewhile(lambda one: one[1] in {None, base}, records)]
    return _replayed(state, ordinary, [record for record, _ in records[len(ordinary) :]], lost)


def _is_foreign(snapshot: bytes) -> bool:
    """Return whether another program wrote a snapshot, and the snapshot is intact. Such a snapshot has no revision, so it is not known which records follow it."""
    try:
        return decode_snapshot(snapshot, "the snapshot").revision == 0
    except CorruptionError:
        return False


def _frames(data: bytes, name: str, lost: list[str]) -> tuple[str, list[FoundFrame]]:
    """Return the base of a journal, and its valid frames. Add the bytes between the frames and after them to `lost`."""
    try:
        header = journal.read_header(data, name, "the journal")
    except CorruptionError as error:
        lost.append(
            f"the journal, {counted(len(data), 'byte')}: {error.detail}. The changes since the last checkpoint are lost"
        )
        return ANY_BASE, []
    frames = list(journal.valid_frames(data, header.salt))
    position = 0
    for frame in frames:
        if frame.start > position:
            lost.append(f"bytes {position} to {frame.start} of the journal are damaged; they were acknowledged")
        position = frame.end
    if position < len(data):
        lost.append(
            f"the end of the journal, {counted(len(data) - position, 'byte')}, is not a whole record; it was never acknowledged"
        )
    return header.base, frames


def _replayed(state: LoadedState, records: list[bytes], strange: list[bytes], lost: list[str]) -> Salvaged:
    """Apply each of `records`, unless changes before it are missing. Add the others to `lost`, and those in `strange`, which follow another snapshot."""
    highest = state.revision
    for data, is_strange in chain(zip(records, repeat(False)), zip(strange, repeat(True))):
        try:
            record = decode_record(data)
        except NOT_JSON:
            lost.append(f"a record of {counted(len(data), 'byte')}, which is not the JSON of a record")
            continue
        highest = max(highest, record.end)
        why = "made after another snapshot" if is_strange else "earlier changes are missing"
        if is_strange or record.start > state.revision:
            keys = [*record.set, *record.delete]
            lost.append(f"{changes_text(record.start + 1, record.end)} of {_names(keys)}: {why}")
            continue
        state = replay(state, [data], "the journal")
    return Salvaged(state, lost, highest)


def _names(keys: list[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"


def _snapshot(data: bytes, what: str, lost: list[str]) -> LoadedState:
    """Return the state of a snapshot, or what can be saved of it."""
    try:
        return decode_snapshot(data, what)
    except CorruptionError as error:
        reason = error.detail.split(";")[0]
    try:
        entries: dict[str, Stored] = dict(_MEMBERS(data))
        end = len(data)
    except NOT_JSON:
        entries, end = _members(data)
    member = entries.pop(_RESERVED, None)
    meta = _meta(member)
    expires = {key: at for key, at in meta.expires.items() if key in entries}
    if end < len(data):
        lost.append(f"{what}: bytes {end} to {len(data)}, which are not JSON. The keys in them are lost")
    else:
        lost.append(f"{what}: {reason}. No value is lost, but one or more of them may be wrong")
    if member is None or meta.format < 1:
        lost.append(f"{what}: its member {_RESERVED} is lost, and with it the revision and all expiry times")
    bad = [key for key in entries if any(faults_of({key: entries[key]}))]
    if bad:
        lost.append(f"{what}: the values of {_names(bad)}")
    good = {key: stored for key, stored in entries.items() if key not in set(bad)}
    times = {key: at for key, at in expires.items() if key in good}
    versions = Versions(meta.schema, meta.readable_by)
    return LoadedState(good, meta.revision, times, meta.time, meta.wall, versions=versions)


def _meta(member: Stored | None) -> Meta:
    """Return the reserved member. If it is missing or damaged, return one with revision 0 and without expiry times."""
    try:
        return msgspec.json.decode(bytes(member) if isinstance(member, Raw) else b"", type=Meta)
    except NOT_JSON:
        return Meta(format=0, revision=0, id="")


def _members(data: bytes) -> tuple[dict[str, Stored], int]:
    """Return the members of a JSON object up to the first byte that is not JSON, and the offset of that byte."""
    text = data.decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder()
    found: dict[str, Stored] = {}
    at = 1 if text.startswith("{") else len(text)
    with contextlib.suppress(ValueError, IndexError, RecursionError):  # the rest is not JSON
        while at < len(text):
            key, colon = decoder.raw_decode(text, at)
            _, end = decoder.raw_decode(text, colon + 1)
            if not isinstance(key, str) or text[colon] != ":":
                break
            found[key] = Raw(text[colon + 1 : end].encode("utf-8", "surrogateescape"))
            at = end + 1
            if text[end:at] != ",":
                break
    return found, len(text[:at].encode("utf-8", "surrogateescape"))
