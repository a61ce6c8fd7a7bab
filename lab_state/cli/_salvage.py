"""Decide what can be saved of the damaged files or objects of a state, and what is lost. This module does no I/O.

A record is applied only if all changes before it are there. So the result is a moment of the state, unless the snapshot itself is
damaged: then keys may be missing, and values may be wrong. If only revisions show that records follow the snapshot, the list of
losses says so.

The losses that can be seen are listed: bytes, revisions and keys. After damage inside the snapshot, a value or an expiry time may
also be wrong or missing without a line of its own.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import Raw

from lab_state import _journal as journal
from lab_state._arguments import RESERVED
from lab_state._codec import (
    LoadedState,
    Meta,
    Record,
    decode_record,
    decode_snapshot,
    is_edited,
    looks_like_member,
    replay,
)
from lab_state._entries import Versions
from lab_state._journal import ANY_BASE, NO_BASE, FoundFrame, FrameKind, base_of
from lab_state._not_json import NOT_JSON
from lab_state.cli._text import changes_text, counted
from lab_state.cli._verify import faults_of
from lab_state.exceptions import CorruptionError

if TYPE_CHECKING:
    from lab_state.storage.s3._pieces import Pieces

_SHOWN = 20
_MOST_REVISION = 2**62  # no state reaches it
_SPACES = frozenset(" \t\r\n")
_AFTER_NUMBER = _SPACES | {",", "}"}
_decode_at = json.JSONDecoder(parse_int=float).raw_decode  # `int` refuses a number of more than 4,300 digits


class Salvaged(NamedTuple):
    """The content that can be saved.

    Attributes:
        state: The state.
        lost: One line for each loss, and for each part that may be wrong.
        highest: The highest revision in the snapshot that was used and in all records. The caller must also look at the other
            files before it chooses the revision of the repaired state.
    """

    state: LoadedState
    lost: list[str]
    highest: int


class _Start(NamedTuple):
    """The state before the records.

    Attributes:
        state: The state.
        is_intact: Whether nothing in it is damaged.
        is_dated: Whether its revision is known. Otherwise the revision is 0.
        is_outside: Whether it was written or edited outside of lab_state. Then its revision does not show which records follow it.
    """

    state: LoadedState
    is_intact: bool = True
    is_dated: bool = True
    is_outside: bool = False

    def refuses(self, record: Record, *, is_named: bool | None) -> bool:
        """Return whether a record follows another snapshot, or may do so."""
        if not self.is_outside or is_named:
            return False
        return is_named is False or record.start < self.state.revision


def salvage(snapshot: bytes | None, data: bytes | None, name: str) -> Salvaged:
    """Return what can be saved of a snapshot and a journal. Each of them may be damaged, or missing (`None`)."""
    lost: list[str] = []
    base, frames = (NO_BASE, []) if data is None else _frames(data, name, lost)
    records = [frame.payload for frame in frames if frame.kind is FrameKind.RECORD]
    full = next((frame.payload for frame in frames if frame.kind is FrameKind.FULL), None)
    if full is not None:
        return _replayed(_snapshot(full, "the state in the journal", lost), zip(records, repeat(True)), lost)
    if base == ANY_BASE:
        lost.append("the state at the start of the journal is lost")
    if snapshot is None:
        if base is None:
            lost.append("there is no snapshot, and the journal cannot show whether one is missing")
        elif base not in {NO_BASE, ANY_BASE}:
            lost.append("the snapshot is missing")
        return _replayed(_Start(LoadedState({}, 0)), zip(records, repeat(True)), lost)
    start = _snapshot(snapshot, "the snapshot", lost)
    is_named = _is_named(snapshot, base, frames)
    if journal.is_followed(snapshot) and data is None:
        lost.append("the journal is missing: the changes since the last checkpoint are lost")
    elif journal.is_followed(snapshot) and not is_named and base is not None:
        lost.append(
            "the journal does not name the snapshot, which a running manager wrote: later changes may be missing"
        )
    return _replayed(start, zip(records, repeat(is_named)), lost)


def salvage_objects(pieces: Pieces) -> Salvaged:
    """Return what can be saved of the objects of a state in S3."""
    snapshot, base, records, is_followed, problems = pieces
    lost: list[str] = []
    start = _Start(LoadedState({}, 0))
    if snapshot is not None:
        start = _snapshot(snapshot, "the snapshot", lost)
    elif is_followed:
        lost.append("the snapshot is missing")
    lost += problems

    def is_named(found: str | None) -> bool | None:
        if base is None:  # the numbers of the objects fit the snapshot, but they are the same before and after an edit
            return None if start.is_outside else True
        return None if found is None else found == base

    return _replayed(start, [(record, is_named(found)) for record, found in records], lost)


def _is_named(snapshot: bytes, base: str | None, frames: list[FoundFrame]) -> bool:
    """Return whether a journal names a snapshot: in its header, or in a checkpoint frame."""
    own = journal.base_at_end(len(snapshot), snapshot[-journal.SNAPSHOT_END_BYTES :])
    wanted = own or base_of(len(snapshot), zlib.crc32(snapshot))
    named = {frame.payload for frame in frames if frame.kind is FrameKind.CHECKPOINT}
    return wanted == base or wanted.encode() in named


def _frames(data: bytes, name: str, lost: list[str]) -> tuple[str | None, list[FoundFrame]]:
    """Return the base of a journal, and its valid frames. If its header is damaged, the base is `None`.

    Add the bytes between the frames and after them to `lost`.
    """
    try:
        header = journal.read_header(data, name, "the journal")
    except CorruptionError as error:
        reason = error.detail.split(";")[0]
        lost.append(f"the journal, {counted(len(data), 'byte')}: {reason}. All changes in it are lost")
        return None, []
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


def _replayed(start: _Start, records: Iterable[tuple[bytes, bool | None]], lost: list[str]) -> Salvaged:
    """Apply records to a state, and return the result. Add a line to `lost` for each record that is left out.

    A record is left out if changes before it are missing, or if it follows another snapshot. Each record comes with whether it
    names the snapshot; `None` if it names none.
    """
    state, highest, is_strange = start.state, start.state.revision, False
    guessed: list[Record] = []
    skipped: list[Record] = []
    for data, is_named in records:
        try:
            record = decode_record(data)
        except NOT_JSON:
            lost.append(f"a record of {counted(len(data), 'byte')}, which is not the JSON of a record")
            continue
        highest = max(highest, record.end)
        is_strange = is_strange or start.refuses(record, is_named=is_named)
        if is_strange or record.start > state.revision:
            why = "made after another snapshot" if is_strange else "earlier changes are missing"
            lost.append(f"{changes_text(record.start + 1, record.end)}{_keys_of(record)}: {why}")
        elif record.end > state.revision:
            state = replay(state, [data], "the journal")
            guessed += [] if is_named and start.is_dated else [record]
        elif not (is_named and start.is_intact and record.end <= start.state.revision):
            skipped.append(record)
    return Salvaged(state, [*lost, *_doubts(guessed, skipped)], highest)


def _doubts(guessed: list[Record], skipped: list[Record]) -> Iterator[str]:
    """Yield a line about the records that were applied only by their revisions, and one about those that were skipped by them."""
    if guessed:
        yield (
            f"{changes_text(guessed[0].start + 1, guessed[-1].end)}: applied only because the revisions fit. Nothing else shows that "
            "the snapshot is the right one, so the result may be a mix of two moments"
        )
    if skipped:
        yield (
            f"{changes_text(skipped[0].start + 1, skipped[-1].end)}: left out, because the state already has these revisions. It may "
            "still lack what was changed"
        )


def _keys_of(record: Record) -> str:
    """Return the words for the keys that a record has changed, such as ` of 'a', 'b'`. If it has changed none, they are empty."""
    keys = _names([*record.set, *record.delete])
    if record.clear:
        return f" of all keys, then {keys}" if keys else " of all keys"
    return f" of {keys}" if keys else ""


def _names(keys: list[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"


def _snapshot(data: bytes, what: str, lost: list[str]) -> _Start:
    """Return the state of a snapshot, or what can be saved of it."""
    try:
        state = decode_snapshot(data, what)
    except CorruptionError as error:
        return _damaged(data, what, error.detail.split(";")[0], lost)
    return _Start(state, is_outside=journal.SNAPSHOT_END.search(data[-journal.SNAPSHOT_END_BYTES :]) is None)


def _damaged(data: bytes, what: str, reason: str, lost: list[str]) -> _Start:
    """Return what can be saved of a damaged snapshot. Add a line to `lost` for each part that is lost."""
    entries, twice, end, is_whole = _members(data)
    if not entries:
        lost.append(f"{what}, {counted(len(data), 'byte')}: {reason}. All keys in it are lost")
    elif is_whole:
        lost.append(
            f"{what}: {reason}. The keys and values that can be read are kept, but one or more of them may be wrong"
        )
    else:
        lost.append(f"{what}: no member can be read from byte {end} of {len(data)} on. All keys from there on are lost")
    found = _meta(entries, is_whole=is_whole)
    meta = found or Meta(format=0, revision=0, id="")
    if found is None:
        lost.append(
            f"{what}: its member {RESERVED} is lost, and with it the revision, all expiry times and the version of the schema"
        )
    was_edited = is_edited(meta)
    if twice:
        lost.append(f"{what}: all values but the last one of {_names(twice)}, because the key is there more than once")
    bad = [key for key, value in entries.items() if any(faults_of({key: value}))]
    if not was_edited:  # in an edit, a person may have deleted a key, and left its expiry time
        bad += [key for key in meta.expires if key not in entries]
    if bad:
        lost.append(f"{what}: the values of {_names(bad)}")
    left_out = set(bad)
    good = {key: value for key, value in entries.items() if key not in left_out}
    times = {key: at for key, at in meta.expires.items() if key in good}
    versions = Versions(meta.schema, meta.readable_by)
    state = LoadedState(dict(good), meta.revision + was_edited, times, meta.time, meta.wall, versions=versions)
    return _Start(state, is_intact=False, is_dated=found is not None, is_outside=was_edited)


def _meta(entries: dict[str, Raw], *, is_whole: bool) -> Meta | None:
    """Take the reserved member out of `entries`, and return it. Return `None` if it is missing or damaged, or its revision is impossible.

    Its name may be damaged. Then it is the last member, if all members could be read.
    """
    last = next(reversed(entries), RESERVED) if is_whole else RESERVED
    is_renamed = RESERVED not in entries and last in entries and looks_like_member(entries[last])
    member = entries.pop(last if is_renamed else RESERVED, None)
    try:
        meta = msgspec.json.decode(member or b"", type=Meta)
    except NOT_JSON:
        return None
    return meta if 0 <= meta.revision < _MOST_REVISION else None


class _Members(NamedTuple):
    """The members of a JSON object before the first one that cannot be read.

    Attributes:
        found: The values by key. Of two values with the same key, the last one.
        twice: The keys that have several values.
        end: The offset of the first member that cannot be read. If all can be read, the offset of the closing brace.
        is_whole: Whether all can be read, and nothing follows the closing brace.
    """

    found: dict[str, Raw]
    twice: list[str]
    end: int
    is_whole: bool


def _members(data: bytes) -> _Members:
    """Return the members of a JSON object that can be read. A damaged opening brace and a byte order mark are skipped."""
    text = data.decode("utf-8", "surrogateescape")
    found: dict[str, Raw] = {}
    twice: dict[str, None] = {}
    at = _past_spaces(text, int(text.startswith("\ufeff")))
    if text[at : at + 1] != '"':  # it is the brace, or a damaged byte in its place
        at = _past_spaces(text, at + 1)
    with contextlib.suppress(ValueError, RecursionError):  # the member at `at` cannot be read
        while (member := _member(text, at)) is not None:
            key, value, at = member
            if key in found:
                twice[key] = None
            found[key] = value
            if text[at : at + 1] != ",":
                break
            at = _past_spaces(text, at + 1)
    is_whole = text[at : at + 1] == "}" and _past_spaces(text, at + 1) == len(text)
    return _Members(found, list(twice), len(text[:at].encode("utf-8", "surrogateescape")), is_whole)


def _member(text: str, at: int) -> tuple[str, Raw, int] | None:
    """Return the key and the value of the member at an offset, and the offset after it and after spaces. Return `None` if it is not whole.

    Raises:
        ValueError: The key or the value is not JSON.
        RecursionError: The value has too many levels.
    """
    if text[at : at + 1] != '"':
        return None
    key, at = _decode_at(text, at)
    at = _past_spaces(text, at)
    if text[at : at + 1] != ":":
        return None
    start = _past_spaces(text, at + 1)
    _, end = _decode_at(text, start)
    if text[end - 1].isdigit() and text[end : end + 1] not in _AFTER_NUMBER:  # the number may have lost digits
        return None
    return key, Raw(text[start:end].encode("utf-8", "surrogateescape")), _past_spaces(text, end)


def _past_spaces(text: str, at: int) -> int:
    """Return the offset of the first character from `at` on that is not a space."""
    while text[at : at + 1] in _SPACES:
        at += 1
    return at
