"""Decisions about the files of a state that were read while a writer may have replaced them. Pure.

A reader has no lock. It opens the journal, reads the snapshot, and then reads the journal.
In this order, a reader that sees a new snapshot also sees the frame `C` that names it. So
some readings are certain at once, whatever was renamed meanwhile. Every other reading may
be the result of a rename. It is accepted only if a second reading of the same files gives
the same result.
"""

from __future__ import annotations

from typing import NamedTuple

from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, Accepted, FrameKind, Scan
from lab_state.exceptions import StorageError


class Verdict(NamedTuple):
    """The result of one reading.

    Attributes:
        accepted: What `start()` would load; `None` if it would raise `error`.
        error: What `start()` would raise.
        durable: How many of the accepted records, from the first, are certainly durable.
        sure: Whether the result is certain although the files may have been replaced meanwhile.
    """

    accepted: Accepted | None
    error: StorageError | None
    durable: int
    sure: bool


class Seen(NamedTuple):
    """The files that one reading read, by device and inode, and its result.

    Attributes:
        journal: The journal; `None` if there is none.
        snapshot: The snapshot; `None` if there is none, or it was not needed.
        base: The size and CRC-32 of the snapshot that was read.
        verdict: The result.
    """

    journal: tuple[int, int] | None
    snapshot: tuple[int, int] | None
    base: str
    verdict: Verdict


def needs_snapshot(start: bytes, name: str, path: str) -> bool:
    """Return whether a journal that starts with these bytes follows a snapshot; True if its header is bad."""
    try:
        return journal.read_header(start, name, path).base != ANY_BASE
    except StorageError:
        return True


def judge(data: bytes | None, base: str, name: str, path: str) -> Verdict:
    """Return the result of reading a journal and a snapshot.

    Args:
        data: The bytes of the journal, read after the snapshot; `None` if there is none.
        base: `base_of` the snapshot, or `NO_BASE` if there is none.
        name: The name of the state.
        path: Where the journal is, for messages.
    """
    try:
        scan = None if data is None else journal.scan(data, name, path)
        accepted = journal.accept(scan, len(data or b""), base, path)
    except StorageError as error:
        return Verdict(None, error, 0, sure=False)
    if scan is None:
        return Verdict(accepted, None, 0, sure=False)
    # Only one frame is in flight, so all others are durable. The sync of the last one may be pending or have failed.
    last_is_record = bool(scan.frames) and scan.frames[-1].kind is FrameKind.RECORD
    return Verdict(accepted, None, len(accepted.records) - last_is_record, sure=_belongs(scan, base))


def _belongs(scan: Scan, base: str) -> bool:
    """Return whether the journal names this snapshot, or needs none."""
    return scan.header.base in (ANY_BASE, base) or (FrameKind.CHECKPOINT, base.encode()) in scan.frames


def is_answer(before: Seen | None, now: Seen) -> bool:
    """Return whether a reading can be accepted.

    Args:
        before: The previous reading, whose files are still open; `None` for the first one.
        now: The reading. A journal that only grew counts as the same file.
    """
    return now.verdict.sure or (before is not None and _key(before) == _key(now))


def _key(seen: Seen) -> tuple[object, ...]:
    verdict = seen.verdict
    return seen.journal, seen.snapshot, seen.base, verdict.accepted, str(verdict.error)


def is_empty(seen: Seen) -> bool:
    """Return whether there was nothing to read."""
    return seen.journal is None and seen.base == NO_BASE
