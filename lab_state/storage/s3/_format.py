"""The names and the bytes of the objects in S3. This module does no I/O.

* `<prefix>/<name>.json` is the snapshot, in the same format as on disk. Its `$lab_state`
  has two more members: `seq` is the number of the last record that the snapshot covers,
  and `fence` is the number of the fence of its writer. Both are also in the metadata of
  the object, so HEAD returns them.
* `<prefix>/<name>.journal/<20 digits>` are the records, numbered from 1 without gaps. Each
  is one frame of the journal. A fence has a number of the same sequence, and is empty.
* `<prefix>/<name>.probe` is the object with which a start checks that the store honours
  conditions.
* `<prefix>/<name>.history/<20 digits>-<wall>.json` are older snapshots. The digits are the
  number of the last record that the snapshot covers, and `wall` is its recorded time.
* `<prefix>/<name>.damaged-<time>/` has the objects of a state that could not be loaded, and
  was replaced by an earlier moment or by a repair.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from lab_state import _journal as journal
from lab_state._buffers import join_in_thread
from lab_state._journal import FrameKind
from lab_state.exceptions import CorruptionError

SEQ = "labstateseq"
FENCE = "labstatefence"
OWNER = "labstateowner"

BASE = "labstatebase"
"""The metadata key for the snapshot that a record follows.

The value is `OWN_BASE` for a snapshot that lab_state wrote. Such a snapshot is identified by its
stamp. The value is `NO_BASE` if there was no snapshot. If another program wrote the snapshot, the
value is the size and the CRC-32 of that snapshot.
"""

OWN_BASE = "own"

REMOVED = "labstateremoved"
"""The metadata key of the object that replaces the snapshot when a state is removed and its history is kept."""

KEPT = "labstatekept"
"""The metadata key for the number of the last record that belongs to a history; 0 if there is no history."""

MOST_NUMBER = 10**19 - 1
"""The largest number of a record or a fence. At 1,000 records a second it is reached after 300 million years."""

_TAIL = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\}\Z')
_STAMPED = re.compile(rb',"seq":(\d{1,19}),"fence":(\d{1,19}),"crc32":"([0-9a-f]{8})"\}\}\Z')
_TAIL_BYTES = 96

_END_BYTES = 2 * _TAIL_BYTES
"""The number of bytes at the end of a snapshot that contain its stamp."""

_NUMBER = re.compile(r"[0-9]{20}")  # `\d` would match digits of other scripts too
_OLDER = re.compile(r"([0-9]{20})-(0|[1-9][0-9]{0,18})\.json")
_METADATA_NUMBER = re.compile(r"[0-9]{1,19}")


class Older(NamedTuple):
    """An older snapshot that the history keeps. Its key has these numbers.

    Attributes:
        seq: The number of the last record that the snapshot covers.
        wall: The recorded time, in milliseconds since 1970; the time of the copy if no time is recorded.
    """

    seq: int
    wall: int


class Names(NamedTuple):
    """The bucket, the name of a state, and the keys of its objects in S3.

    Attributes:
        bucket: The bucket.
        name: The name of the state.
        snapshot: The key of the snapshot.
        journal: The beginning of the keys of records and fences, with a slash at its end.
        probe: The key of the probe.
        history: The beginning of the keys of older snapshots, with a slash at its end.
    """

    bucket: str
    name: str
    snapshot: str
    journal: str
    probe: str
    history: str

    @classmethod
    def of(cls, bucket: str, prefix: str, name: str) -> Names:
        """Return the names for a state under a prefix, which may be empty."""
        base = f"{prefix}/{name}" if prefix else name
        return cls(bucket, name, f"{base}.json", f"{base}.journal/", f"{base}.probe", f"{base}.history/")

    def record(self, number: int) -> str:
        """Return the key of a record or a fence."""
        return f"{self.journal}{number:020d}"

    def number(self, key: str) -> int | None:
        """Return the number in the key of a record or a fence; `None` for another key."""
        digits = key.removeprefix(self.journal)
        return int(digits) if _NUMBER.fullmatch(digits) else None

    def kept(self, older: Older) -> str:
        """Return the key of an older snapshot."""
        return f"{self.history}{older.seq:020d}-{older.wall}.json"

    def older(self, key: str) -> Older | None:
        """Return the older snapshot that has this key; `None` for another key."""
        found = _OLDER.fullmatch(key.removeprefix(self.history))
        return None if found is None else Older(int(found[1]), int(found[2]))

    def damaged(self, wall: int) -> str:
        """Return the beginning of the keys of a damaged state that was replaced at this time, in milliseconds since 1970."""
        return f"{self.snapshot.removesuffix('.json')}.damaged-{wall}/"

    def url(self, key: str) -> str:
        """Return the URL of a key for messages: `s3://bucket/key`."""
        return f"s3://{self.bucket}/{key}"


def frame(name: str, number: int, record: bytes) -> bytes:
    """Return the body of a record object. Its checksum also covers the name of the state and the number of the record."""
    return join_in_thread(journal.frame_parts(_salt(name, number), FrameKind.RECORD, record))


def unframe(name: str, number: int, body: bytes, path: str) -> bytes:
    """Return the record in an object.

    Raises:
        CorruptionError: The object is damaged, or belongs to another state or to another number.
    """
    record = journal.payload(body, _salt(name, number), FrameKind.RECORD)
    if record is None:
        raise CorruptionError(path, 0, "its checksum does not match its contents; restore a copy")
    return record


def _salt(name: str, number: int) -> str:
    return f"{name} {number}"


class Stamp(NamedTuple):
    """The two numbers in a snapshot: that of the last record that the snapshot covers, and that of its writer's fence."""

    seq: int
    fence: int

    def metadata(self) -> dict[str, str]:
        """Return the stamp as metadata of the object."""
        return {SEQ: str(self.seq), FENCE: str(self.fence)}


def stamped(last: bytes, stamp: Stamp) -> bytes:
    """Return the last slice of a snapshot with the stamp added.

    If the slice does not end as the codec ends a snapshot, it is returned unchanged. The checksum of
    a snapshot covers every byte before the checksum. So the new checksum covers the inserted bytes, too.
    """
    tail = _TAIL.search(last, max(0, len(last) - _TAIL_BYTES))
    if tail is None:
        return last
    inserted = b',"seq":%d,"fence":%d' % stamp
    crc = zlib.crc32(inserted, int(tail[1], 16))
    return b'%s%s,"crc32":"%08x"}}' % (last[: tail.start()], inserted, crc)


def stamp_in_metadata(metadata: dict[str, str], path: str) -> Stamp | None:
    """Return the stamp in the metadata; `None` if there is none, because another program wrote the object.

    Raises:
        CorruptionError: The metadata are damaged.
    """
    if SEQ not in metadata:
        return None
    numbers = [metadata[SEQ], metadata.get(FENCE, "")]
    if not all(map(_METADATA_NUMBER.fullmatch, numbers)):
        raise CorruptionError(path, 0, "its metadata is damaged; restore a copy, with its metadata or without any")
    return Stamp(*map(int, numbers))


def kept_in_metadata(metadata: dict[str, str]) -> int | None:
    """Return the number up to which the records belong to the history; `None` if the metadata do not have it."""
    number = metadata.get(KEPT, "")
    return int(number) if _METADATA_NUMBER.fullmatch(number) else None


def same_stamp(inside: Stamp | None, outside: Stamp | None, path: str) -> Stamp | None:
    """Return the stamp of a snapshot, from its body or its metadata; `None` if it has none.

    Raises:
        CorruptionError: Body and metadata have different stamps.
    """
    if inside is not None and outside is not None and inside != outside:
        raise CorruptionError(
            path, 0, "its metadata belongs to another snapshot; restore a copy, with its metadata or without any"
        )
    return outside or inside


def stamp_at_end(end: bytes) -> Stamp | None:
    """Return the stamp in the last bytes of a snapshot; `None` if there is none. The checksum is not checked."""
    found = _STAMPED.search(end, max(0, len(end) - _END_BYTES))
    return None if found is None else Stamp(int(found[1]), int(found[2]))


def stamp_in_body(data: bytes, path: str) -> Stamp | None:
    """Return the stamp in the body of a snapshot; `None` if there is none.

    The stamp in the body is needed for a copy that has lost its metadata.

    Raises:
        CorruptionError: The checksum after the stamp does not match.
    """
    found = _STAMPED.search(data, max(0, len(data) - _END_BYTES))
    if found is None:
        return None
    cut = len(data) - len(b',"crc32":"01234567"}}')
    with memoryview(data) as view:
        if zlib.crc32(view[:cut]) != int(found[3], 16):
            raise CorruptionError(path, 0, "its checksum does not match its contents; restore a copy")
    return Stamp(int(found[1]), int(found[2]))
