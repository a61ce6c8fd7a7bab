r"""The journal, format 1: frames, checksums, and the scan that distinguishes a torn tail from damage.

This module does no I/O. The journal is text, with one frame in each line::

    <crc32, 8 hex digits> <payload length> <kind> <payload>\n

The CRC-32 covers the salt, the length, the kind and the payload. The salt is a random text for each
journal, and is stored in its header. So old bytes in reused blocks of the disk are not a valid
frame, except with a chance of one in 2**32. A user who does not know the salt cannot store a valid
frame in a value.

The writer has at most one frame in flight: it writes a frame only after the sync of the previous frame
has returned. So invalid bytes at the end, with no valid frame after them, are a torn tail, which
was never acknowledged. If a valid frame follows invalid bytes, acknowledged data is damaged.

A frame of the kind `E` ends a journal: every frame before it was synced. The next writer puts its first frame in
the place of `E`. So bytes after an `E` belong to a torn frame whose beginning, in the place of the `E`, was not written.

The WAL repair of etcd and `kPointInTimeRecovery` of RocksDB follow the same rule. But their writers
may have several frames in flight, so they cannot always distinguish the two cases.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import msgspec

from lab_state import _crc
from lab_state._not_json import NOT_JSON
from lab_state.exceptions import CorruptionError, UnsupportedError

FORMAT = 1

ANY_BASE = "*"
"""The base of a journal whose first frame contains the whole state."""

NO_BASE = "none"
"""The base of a journal that follows no snapshot."""


class FrameKind(StrEnum):
    """The kind of a frame. A `CHECKPOINT` contains the base of a new snapshot, a `FULL` the whole state, and an `END` nothing."""

    HEADER = "H"
    RECORD = "R"
    CHECKPOINT = "C"
    FULL = "F"
    END = "E"


_LETTERS = {kind: kind.value.encode() for kind in FrameKind}


class Header(msgspec.Struct, frozen=True):
    """The first line of a journal. It has the name of the state, and the base: the snapshot that the journal follows.

    `wall` is the time of the wall clock when the journal was made, in milliseconds since 1970; 0 if it is not recorded.
    """

    format: int
    name: str
    salt: str
    base: str
    wall: int = 0


_decode_header = msgspec.json.Decoder(Header).decode


class Frame(NamedTuple):
    """A frame that follows the header."""

    kind: FrameKind
    payload: bytes


class Scan(NamedTuple):
    """The contents of a journal.

    Attributes:
        header: The header.
        frames: The valid frames after the header, without an `END`.
        end: The offset after the last of these frames. The next frame belongs there. Other bytes than an
            `END` from there on are a torn tail.
        is_ended: Whether the journal ends with an `END`. Then every frame was synced.
    """

    header: Header
    frames: tuple[Frame, ...]
    end: int
    is_ended: bool

    def names(self, base: str) -> bool:
        """Return whether the journal follows the snapshot with this base, or has a checkpoint frame with this base."""
        return self.header.base == base or (FrameKind.CHECKPOINT, base.encode()) in self.frames


_FOLLOWED = re.compile(rb',"followed":true(?:,"seq":\d{1,19},"fence":\d{1,19})?,"crc32":"[0-9a-f]{8}"\}\}\Z')
_FOLLOWED_BYTES = 128  # the longest match has fewer bytes

_FRAME = re.compile(rb"([0-9a-f]{8}) ((\d{1,15}) ([A-Z]) )")
_LONGEST_HEAD = 8 + 1 + 15 + 3
_HEAD_BEHIND = re.compile(rb" (?=(\d{1,15}) [A-Z] )")
"""The space after a checksum, and the rest of a head. The pattern begins with one fixed byte, so the search is fast."""

_CHECKSUM = re.compile(rb"[0-9a-f]{8}")  # checked only where `_HEAD_BEHIND` was found
_SEARCHED_AT_ONCE = 256 * 1024
_NEWLINE = 0x0A
_PIECE = 256 * 1024


def new_salt() -> str:
    """Return a new salt: 16 random hexadecimal digits."""
    return os.urandom(8).hex()


def base_of(size: int, crc: int) -> str:
    """Return the name by which a journal refers to a snapshot: the size and the CRC-32 of its bytes."""
    return f"{size}-{crc:08x}"


def is_followed(snapshot: bytes) -> bool:
    """Return whether a snapshot has the followed mark: a running manager wrote it, so records may follow it in a journal.

    In a snapshot whose checksum a person has deleted, the mark has no effect.
    """
    return _FOLLOWED.search(snapshot, max(0, len(snapshot) - _FOLLOWED_BYTES)) is not None


SNAPSHOT_END = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\}\Z')
"""The end of a snapshot, with the checksum of all bytes before it."""

SNAPSHOT_END_BYTES = len(b',"crc32":"00000000"}}')


def base_at_end(size: int, end: bytes) -> str | None:
    """Return the base of a snapshot, from its size and its last bytes. Return `None` if these are not the end of a snapshot.

    The bytes before the end are not read. If these bytes are damaged, the result is still the base of the snapshot as it
    was written.
    """
    found = SNAPSHOT_END.search(end)
    return None if found is None else base_of(size, zlib.crc32(found[0], int(found[1], 16)))


def frame(salt: str, kind: FrameKind, payload: bytes) -> bytes:
    """Return one line of the journal."""
    return b"".join(frame_parts(salt, kind, payload))


def frame_parts(salt: str, kind: FrameKind, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """Return one line of the journal, in parts. Joining them would copy the payload, and block every other thread."""
    head = b"%d %s " % (len(payload), _LETTERS[kind])
    crc = zlib.crc32(payload, zlib.crc32(head, zlib.crc32(salt.encode())))
    return b"%08x %s" % (crc, head), payload, b"\n"


def frame_in_steps(salt: str, kind: FrameKind, payload: bytes) -> Iterator[bytes]:
    """Yield one line of the journal in pieces. The first pieces are empty: one after each step of the checksum."""
    head = b"%d %s " % (len(payload), _LETTERS[kind])
    crc = zlib.crc32(head, zlib.crc32(salt.encode()))
    for start in range(0, len(payload), _PIECE):
        crc = zlib.crc32(payload[start : start + _PIECE], crc)
        yield b""
    yield b"%08x %s" % (crc, head)
    for start in range(0, len(payload), _PIECE):
        yield payload[start : start + _PIECE]
    yield b"\n"


def payload(data: bytes, salt: str, kind: FrameKind) -> bytes | None:
    """Return the payload if `data` is exactly one valid frame of this kind, and `None` otherwise."""
    found = _frame_at(data, 0, salt)
    if found is None or found[0] != kind.value.encode() or found[2] != len(data):
        return None
    return found[1]


def header(name: str, salt: str, base: str, wall: int = 0) -> bytes:
    """Return the first line of a journal. The arguments are the attributes of `Header`."""
    return frame(salt, FrameKind.HEADER, msgspec.json.encode(Header(FORMAT, name, salt, base, wall)))


def scan(data: bytes, name: str, path: str) -> Scan:
    """Return the contents of a journal. A torn tail is left out, and damage is an error.

    Args:
        data: The bytes of the journal.
        name: The name of the state that the journal must belong to.
        path: The file or object that contains the journal, for messages.

    Raises:
        CorruptionError: The header or acknowledged data is damaged. Or the kind of a frame is unknown, a frame with the
            whole state is missing, or a frame follows the end of the journal. Or the journal belongs to another state.
        UnsupportedError: A newer version of lab_state wrote the journal.
    """
    head, position = _read_header(data, name, path)
    frames: list[Frame] = []
    searched = position  # a valid frame that starts here or later means that acknowledged data is damaged
    while (found := _frame_at(data, position, head.salt)) is not None:
        kind, payload, searched = found
        if (known := _known_kind(kind, position, path)) is FrameKind.END:
            break
        frames.append(Frame(known, payload))
        position = searched
    if (behind := _valid_frame_behind(data, searched, head.salt)) is not None:
        if searched > position:
            raise CorruptionError(
                path, position, f"a valid frame follows at byte {behind}, after the end of the journal; restore a copy"
            )
        raise CorruptionError(
            path,
            position,
            f"a valid frame follows at byte {behind}, so the damaged bytes were acknowledged; restore a copy",
        )
    if head.base == ANY_BASE and not (frames and frames[0].kind is FrameKind.FULL):
        raise CorruptionError(
            path, position, "its first frame must contain the whole state, and does not; restore a copy"
        )
    return Scan(head, tuple(frames), position, is_ended=searched > position and searched == len(data))


def last_content(end: bytes, salt: str) -> Frame | None:
    """Return the last valid frame with a record or with the whole state in the last bytes of a journal; `None` if they have none.

    Bytes after the frame are ignored: they are an `END`, a checkpoint frame, a torn tail, or damaged.
    """
    for match in reversed(list(_HEAD_BEHIND.finditer(end))):
        start = match.start() - 8
        found = None if start < 0 else _frame_at(end, start, salt)
        if found is not None and found[0] in (b"R", b"F"):
            return Frame(FrameKind(found[0].decode()), found[1])
    return None


class FoundFrame(NamedTuple):
    """A valid frame in a journal that may be damaged: its kind, its payload, and the offsets of its first byte and after its last byte."""

    kind: FrameKind
    payload: bytes
    start: int
    end: int


def valid_frames(data: bytes, salt: str) -> Iterator[FoundFrame]:
    """Yield each valid frame of a journal, and leave out all bytes between them. Only a repair reads a damaged journal."""
    position = 0
    while True:
        start: int | None = position
        if (found := _frame_at(data, position, salt)) is None:
            start = _valid_frame_behind(data, position, salt)
            found = None if start is None else _frame_at(data, start, salt)
        if start is None or found is None:
            return
        kind, payload, position = found
        with contextlib.suppress(ValueError):  # a kind that no version of lab_state has written
            yield FoundFrame(FrameKind(kind.decode()), payload, start, position)


def read_header(data: bytes, name: str, path: str) -> Header:
    """Return the header of a journal. `data` contains at least the first line.

    Raises:
        CorruptionError: The line is not a header, or the journal belongs to another state.
        UnsupportedError: A newer version of lab_state wrote the journal.
    """
    return _read_header(data, name, path)[0]


class FrameHead(NamedTuple):
    """The start of a frame.

    Attributes:
        kind: The letter of its kind.
        start: The offset of its payload.
        end: The offset after its payload.
    """

    kind: str
    start: int
    end: int


def read_start(data: bytes, name: str, path: str) -> tuple[Header, FrameHead | None]:
    """Return the header of a journal, and the start of the frame after it; `None` if there is none. See `read_header`.

    The checksum of the frame is not verified.
    """
    header, position = _read_header(data, name, path)
    found = _FRAME.match(data, position)
    if found is None:
        return header, None
    return header, FrameHead(found[4].decode(), found.end(), found.end() + int(found[3]))


def _read_header(data: bytes, name: str, path: str) -> tuple[Header, int]:
    """Return the header and the offset after it. Verify the checksum of the header with the salt that is in the header."""
    line = _FRAME.match(data)
    if line is None or line[4] != _LETTERS[FrameKind.HEADER]:
        raise _bad_line(path)
    try:
        head = _decode_header(data[line.end() : line.end() + int(line[3])])
    except NOT_JSON:
        raise _bad_line(path) from None
    found = _frame_at(data, 0, head.salt)
    if found is None:
        raise _bad_line(path)
    if head.format != FORMAT:
        raise UnsupportedError(
            f"{path} has journal format {head.format}, and this version of lab_state knows {FORMAT}: "
            "use the version that wrote it; it was left untouched"
        )
    if head.name != name:
        raise CorruptionError(path, 0, f"it is the journal of {head.name!r}, not of {name!r}; put the right file back")
    return head, found[2]


def _bad_line(path: str) -> CorruptionError:
    return CorruptionError(path, 0, "its first line is not a valid journal header; restore a copy")


def _frame_at(data: bytes, position: int, salt: str) -> tuple[bytes, bytes, int] | None:
    """Return kind, payload and end offset of the valid frame that starts at `position`; `None` if there is none."""
    match = _FRAME.match(data, position)
    if match is None:
        return None
    end = match.end() + int(match[3])
    # The last byte is checked first. In a torn tail this saves the checksum of a long payload.
    if end >= len(data) or data[end] != _NEWLINE:
        return None
    with memoryview(data) as view:
        crc = zlib.crc32(view[match.start(2) : end], zlib.crc32(salt.encode()))
    if crc != int(match[1], 16):
        return None
    return match[4], data[match.end() : end], end + 1


def _known_kind(kind: bytes, position: int, path: str) -> FrameKind:
    if kind in (b"R", b"C", b"F", b"E"):
        return FrameKind(kind.decode())
    raise CorruptionError(path, position, f"it has a frame of the unknown kind {kind.decode()!r}; restore a copy")


def _valid_frame_behind(data: bytes, position: int, salt: str) -> int | None:
    """Return the offset of the first valid frame that starts at any byte from `position` on; `None` if there is none.

    The search tests each byte, not only the start of a line. If the newline between two
    frames is damaged, a search by lines would miss the second frame, which was acknowledged. A
    user's value may contain very many texts that look like the head of a frame. So all checksums
    are computed in one pass.
    """
    heads = list(_heads_behind(data, position))
    sums = _crc.running(data, position, sorted({at for head in heads for at in (head.covered, head.end)}))
    seed = zlib.crc32(salt.encode())
    for head in heads:
        if head.crc == _crc.part(sums[head.covered], sums[head.end], head.end - head.covered, seed):
            return head.start
    return None


class _Head(NamedTuple):
    """Bytes that look like the head of a frame, with a newline at `end`.

    In a valid frame, `crc` is the checksum of the salt and of the bytes from `covered` to `end`.
    """

    start: int
    covered: int
    end: int
    crc: int


def _heads_behind(data: bytes, position: int) -> Iterator[_Head]:
    """Yield all possible heads from `position` on, in order. Search in pieces, because one long search would block other threads."""
    for piece in range(position, len(data), _SEARCHED_AT_ONCE):
        stop = piece + _SEARCHED_AT_ONCE
        for match in _HEAD_BEHIND.finditer(data, piece, stop + _LONGEST_HEAD):
            start, covered = match.start() - 8, match.end()
            if start < position or match.start() >= stop or _CHECKSUM.match(data, start) is None:
                continue
            end = match.end(1) + 3 + int(match[1])
            if end < len(data) and data[end] == _NEWLINE:
                yield _Head(start, covered, end, int(data[start : start + 8], 16))


class Accepted(NamedTuple):
    """The state that results from a journal and a snapshot.

    Attributes:
        full: The whole state at the start of the journal, if the journal contains it. If this
            is `None`, the state begins with the snapshot.
        records: The records to apply to that state. Some of them may be in the snapshot already.
        unclean: True if the records may not be durable: the journal has a torn tail or starts with the whole state, or
            it has a frame after its header and no `END`. A clean stop leaves none of these.
    """

    full: bytes | None
    records: tuple[bytes, ...]
    unclean: bool


def accept(found: Scan | None, size: int, snapshot_base: str, path: str) -> Accepted:
    """Decide which state to load.

    Args:
        found: The journal; `None` if there is none.
        size: The size of the journal in bytes, including a torn tail.
        snapshot_base: The base of the present snapshot; `NO_BASE` if there is no snapshot.
        path: The file or object of the journal, for messages.

    Raises:
        CorruptionError: The journal has records that do not follow this snapshot, its snapshot is missing, or it
            has the whole state in a wrong place.
    """
    if found is None:
        return Accepted(None, (), unclean=False)
    base, frames = found.header.base, found.frames
    if any(kind is FrameKind.FULL for kind, _ in frames[base == ANY_BASE :]):
        raise CorruptionError(
            path, 0, "it has a frame with the whole state, which is not allowed in this place; restore a copy"
        )
    records = tuple(payload for kind, payload in frames if kind is FrameKind.RECORD)
    if base == ANY_BASE:
        return Accepted(frames[0].payload, records, unclean=True)
    if not found.names(snapshot_base):
        if records:
            raise CorruptionError(
                path,
                0,
                "its records do not follow the snapshot beside it, or that snapshot is missing; put the right snapshot back, or "
                "delete this journal to continue without its records",
            )
        if snapshot_base == NO_BASE:
            raise CorruptionError(
                path,
                0,
                "the snapshot that this journal follows is missing; put it back, or delete this journal too, to start with an empty state",
            )
    return Accepted(None, records, unclean=not found.is_ended and (bool(frames) or size > found.end))


def check_followed(found: Scan | None, snapshot_base: str, path: str, *, is_followed: bool) -> None:
    """Check that a journal follows a snapshot with the followed mark.

    Args:
        found: The journal; `None` if there is none.
        snapshot_base: The base of the snapshot; `NO_BASE` if there is no snapshot.
        path: The file or object of the journal, for messages.
        is_followed: Whether the snapshot has the followed mark.

    Raises:
        CorruptionError: No journal follows the snapshot.
    """
    if is_followed and (found is None or not found.names(snapshot_base)):
        raise CorruptionError(
            path,
            0,
            "this journal is missing or follows another snapshot. A running manager wrote the snapshot beside it, and wrote later "
            "changes to a journal: put that journal back, or restore a snapshot that backup() or a clean stop has written. To open this "
            'snapshot without the later changes, delete `,"crc32":"…"` at its end',
        )
