"""The last durable records of an owner, for clients that connect with a copy. This module does no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import msgspec

MOST_BYTES = 16 * 1024 * 1024
"""The largest total size of the records that are kept, in bytes."""


class _Kept(msgspec.Struct, frozen=True, rename={"start": "from", "end": "to"}):
    start: int
    end: int


class _Record(NamedTuple):
    start: int
    end: int
    data: bytes


_decode = msgspec.json.Decoder(_Kept).decode


class LastRecords:
    """The last durable records, up to `MOST_BYTES` together, oldest first."""

    def __init__(self, recovered: Sequence[bytes], revision: int, most: int = MOST_BYTES) -> None:
        """Keep the last of the records that were recovered.

        Args:
            recovered: The records, oldest first. Each has the members `from` and `to`.
            revision: The revision that was recovered.
            most: The largest total size, in bytes.
        """
        self._end = revision
        self._most = most
        self._bytes = 0
        self._records: deque[_Record] = deque()
        for data in reversed(recovered):
            self._bytes += len(data)
            if self._bytes > most:
                self._bytes -= len(data)
                break
            kept = _decode(data)
            self._records.appendleft(_Record(kept.start, kept.end, data))

    def add(self, start: int, end: int, data: bytes) -> None:
        """Add a record. If the records together are too large, drop the oldest ones."""
        self._end = end
        self._records.append(_Record(start, end, data))
        self._bytes += len(data)
        while self._bytes > self._most:
            self._bytes -= len(self._records.popleft().data)

    def after(self, revision: int) -> list[bytes] | None:
        """Return the records that end above a revision, oldest first; `None` if some of them are not kept.

        Also return `None` for a revision that the owner has not reached.
        """
        first = self._records[0].start if self._records else self._end
        if not first <= revision <= self._end:
            return None
        newer = takewhile(lambda record: record.end > revision, reversed(self._records))
        return [record.data for record in newer][::-1]
