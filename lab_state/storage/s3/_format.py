"""The names and the bytes of what is kept in S3. Pure.

* `<prefix>/<name>.json` is the snapshot, as everywhere, with two more members in
  `$lab_state`: `seq`, the number of the last record object that it covers, and
  `fence`, the number of its writer's fence. Both are in the object's metadata too, so
  that HEAD tells them.
* `<prefix>/<name>.journal/<20 digits>` are the records, numbered from 1 without gaps,
  one frame of the journal each. A fence takes a number among them, and is empty.
* `<prefix>/<name>.probe` is where a store shows that it honours conditions.
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
"""The metadata key that says which snapshot a record follows.

`OWN_BASE` for one that the storage wrote, whose stamp says the rest; `NO_BASE` for none;
else the size and the CRC-32 of a file that another program put there.
"""

OWN_BASE = "own"

MOST_NUMBER = 10**19 - 1
"""The last number of a record or a fence. At a thousand records a second it takes 300 million years."""

_TAIL = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\}\Z')
_STAMPED = re.compile(rb',"seq":(\d{1,19}),"fence":(\d{1,19}),"crc32":"([0-9a-f]{8})"\}\}\Z')
_TAIL_BYTES = 96

_END_BYTES = 2 * _TAIL_BYTES
"""How much of the end of a snapshot holds its stamp."""

_NUMBER = re.compile(r"[0-9]{20}")  # `\d` would take digits of other scripts, too
_METADATA_NUMBER = re.compile(r"[0-9]{1,19}")


class Names(NamedTuple):
    """The keys of one state."""

    bucket: str
    name: str
    snapshot: str
    journal: str
    probe: str

    @classmethod
    def of(cls, bucket: str, prefix: str, name: str) -> Names:
        """Below a prefix, which may be empty."""
        base = f"{prefix}/{name}" if prefix else name
        return cls(bucket, name, f"{base}.json", f"{base}.journal/", f"{base}.probe")

    def record(self, number: int) -> str:
        """The key of a record or a fence."""
        return f"{self.journal}{number:020d}"

    def number(self, key: str) -> int | None:
        """The number of a record or a fence; `None` for a key that is neither."""
        digits = key.removeprefix(self.journal)
        return int(digits) if _NUMBER.fullmatch(digits) else None

    def url(self, key: str) -> str:
        """A key as messages show it."""
        return f"s3://{self.bucket}/{key}"


def frame(name: str, number: int, record: bytes) -> bytes:
    """The body of a record object. Its checksum covers the state's name and the number too."""
    return join_in_thread(journal.frame_parts(_salt(name, number), FrameKind.RECORD, record))


def unframe(name: str, number: int, body: bytes, path: str) -> bytes:
    """The record in an object.

    Raises:
        CorruptionError: The object is damaged, or belongs elsewhere.
    """
    record = journal.payload(body, _salt(name, number), FrameKind.RECORD)
    if record is None:
        raise CorruptionError(path, 0, "its checksum does not match its contents; restore a copy")
    return record


def _salt(name: str, number: int) -> str:
    return f"{name} {number}"


class Stamp(NamedTuple):
    """What a snapshot says about the journal behind it."""

    seq: int
    fence: int

    def metadata(self) -> dict[str, str]:
        """As the object's metadata."""
        return {SEQ: str(self.seq), FENCE: str(self.fence)}


def stamped(last: bytes, stamp: Stamp) -> bytes:
    """The last slice of a snapshot with its stamp, where it ends as the codec's do; else as it is.

    The checksum in it covers every byte before; so it is carried on over what is put in.
    """
    tail = _TAIL.search(last, max(0, len(last) - _TAIL_BYTES))
    if tail is None:
        return last
    inserted = b',"seq":%d,"fence":%d' % stamp
    crc = zlib.crc32(inserted, int(tail[1], 16))
    return b'%s%s,"crc32":"%08x"}}' % (last[: tail.start()], inserted, crc)


def stamp_in_metadata(metadata: dict[str, str], path: str) -> Stamp | None:
    """The stamp as HEAD shows it; `None` for an object that someone else put there.

    Raises:
        CorruptionError: It is not one.
    """
    if SEQ not in metadata:
        return None
    numbers = [metadata[SEQ], metadata.get(FENCE, "")]
    if not all(map(_METADATA_NUMBER.fullmatch, numbers)):
        raise CorruptionError(path, 0, "its metadata is damaged; restore a copy, with its metadata or without any")
    return Stamp(*map(int, numbers))


def same_stamp(inside: Stamp | None, outside: Stamp | None, path: str) -> Stamp | None:
    """The stamp in a snapshot and the one in its metadata are one, where both are there.

    Raises:
        CorruptionError: They are not.
    """
    if inside is not None and outside is not None and inside != outside:
        raise CorruptionError(
            path, 0, "its metadata is another snapshot's; restore a copy, with its metadata or without any"
        )
    return outside or inside


def stamp_in_body(data: bytes, path: str) -> Stamp | None:
    """The stamp in a snapshot itself, for a copy that lost its metadata; `None` when there is none.

    Raises:
        CorruptionError: The checksum beside it does not match.
    """
    found = _STAMPED.search(data, max(0, len(data) - _END_BYTES))
    if found is None:
        return None
    cut = len(data) - len(b',"crc32":"01234567"}}')
    with memoryview(data) as view:
        if zlib.crc32(view[:cut]) != int(found[3], 16):
            raise CorruptionError(path, 0, "its checksum does not match its contents; restore a copy")
    return Stamp(int(found[1]), int(found[2]))
