"""The meaning of the files of a state that were read while a writer may have replaced them. Pure.

A reader has no lock. It opens the journal, reads the snapshot, and only then reads the
journal. In this order, a reader that sees a new snapshot also sees the frame `C` that names
it. So there are readings that are an answer at once, whatever was renamed meanwhile; every
other one may be due to a rename, and is believed only when a second reading, of the same
files, says the same.
"""

from __future__ import annotations

from typing import NamedTuple

from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, Accepted, FrameKind, Scan
from lab_state.exceptions import StorageError


class Verdict(NamedTuple):
    """The result of one reading.

    Attributes:
        accepted: What `start()` would load; `None` where it would raise `error`.
        error: What `start()` would raise.
        durable: How many of the accepted records, from the first, are durable for certain.
        sure: Whether this is an answer although the files may have been replaced meanwhile.
    """

    accepted: Accepted | None
    error: StorageError | None
    durable: int
    sure: bool


class Seen(NamedTuple):
    """Which files one reading read, by device and inode, and what they say.

    Attributes:
        journal: The journal; `None` where there is none.
        snapshot: The snapshot; `None` where there is none, or it was not needed.
        base: The size and CRC-32 of the snapshot that was read.
        verdict: What they say.
    """

    journal: tuple[int, int] | None
    snapshot: tuple[int, int] | None
    base: str
    verdict: Verdict


def needs_snapshot(start: bytes, name: str, path: str) -> bool:
    """Return whether a journal that starts with these bytes follows a snapshot; True where its header is bad."""
    try:
        return journal.read_header(start, name, path).base != ANY_BASE
    except StorageError:
        return True


def judge(data: bytes | None, base: str, name: str, path: str) -> Verdict:
    """Return what a journal and a snapshot say.

    Args:
        data: The bytes of the journal, read after the snapshot; `None` where there is none.
        base: `base_of` the snapshot, `NO_BASE` where there is none.
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
    # One frame is in flight: every other one is durable. The last may be about to be synced, or its sync failed.
    last_is_record = bool(scan.frames) and scan.frames[-1].kind is FrameKind.RECORD
    return Verdict(accepted, None, len(accepted.records) - last_is_record, sure=_belongs(scan, base))


def _belongs(scan: Scan, base: str) -> bool:
    """Return whether the journal names the snapshot, or needs none."""
    return scan.header.base in (ANY_BASE, base) or (FrameKind.CHECKPOINT, base.encode()) in scan.frames


def is_answer(before: Seen | None, now: Seen) -> bool:
    """Return whether a reading can be believed.

    Args:
        before: The reading before it, whose files are still open; `None` for the first.
        now: The reading. A journal that only grew is the same file.
    """
    return now.verdict.sure or (before is not None and _key(before) == _key(now))


def _key(seen: Seen) -> tuple[object, ...]:
    verdict = seen.verdict
    return seen.journal, seen.snapshot, seen.base, verdict.accepted, str(verdict.error)


def is_empty(seen: Seen) -> bool:
    """Return whether there was nothing to read."""
    return seen.journal is None and seen.base == NO_BASE
