"""Decide whether a reading of a state's files is valid. A writer may have replaced them meanwhile. This module does no I/O.

A reader has no lock. It opens the journal, reads the snapshot, and then reads the journal.
In this order, a reader that sees a new snapshot also sees the frame of the kind `C` that names it.
So a reading is certain at once if the journal names the snapshot, or does not need one. It is certain even if files
were renamed meanwhile. Every other reading may be a mixture of old and new files. Such a reading is
accepted only if a second reading of the same files has the same result.
"""

from __future__ import annotations

from typing import NamedTuple

from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, Accepted, FrameKind
from lab_state.exceptions import StorageError


class Judgement(NamedTuple):
    """The result of one reading.

    Attributes:
        accepted: The state that `start()` would load; `None` if it would raise `error`.
        error: The error that `start()` would raise; `None` if it would load the state.
        durable: The number of the accepted records, from the first, that are certainly durable.
        sure: Whether the result is certain, even if the files were replaced meanwhile.
    """

    accepted: Accepted | None
    error: StorageError | None
    durable: int
    sure: bool


class ReadFiles(NamedTuple):
    """One reading: its files, by device and inode, and its result.

    Attributes:
        journal: The journal; `None` if there is no journal.
        snapshot: The snapshot; `None` if there is no snapshot, or if it was not needed.
        base: The size and CRC-32 of the snapshot that was read.
        judgement: The result.
    """

    journal: tuple[int, int] | None
    snapshot: tuple[int, int] | None
    base: str
    judgement: Judgement


def needs_snapshot(start: bytes, name: str, path: str) -> bool:
    """Return whether the snapshot is needed, too, because the journal does not begin with the whole state.

    Args:
        start: The first bytes of the journal. If the header in them is bad, the result is True.
        name: The name of the state.
        path: The path of the journal, for messages.
    """
    try:
        return journal.read_header(start, name, path).base != ANY_BASE
    except StorageError:
        return True


def judge(data: bytes | None, base: str, name: str, path: str, *, is_followed: bool = False) -> Judgement:
    """Return the result of reading a journal and a snapshot.

    Args:
        data: The bytes of the journal, read after the snapshot; `None` if there is none.
        base: The result of `base_of` for the snapshot; `NO_BASE` if there is no snapshot.
        name: The name of the state.
        path: The path of the journal, for messages.
        is_followed: Whether the snapshot has the followed mark.
    """
    try:
        scan = None if data is None else journal.scan(data, name, path)
        accepted = journal.accept(scan, len(data or b""), base, path)
        journal.check_followed(scan, base, path, is_followed=is_followed)
    except StorageError as error:
        return Judgement(None, error, 0, sure=False)
    if scan is None:
        return Judgement(accepted, None, 0, sure=False)
    # A frame is written only after the sync of the previous one. So all frames are synced, except perhaps the last one.
    last_is_record = bool(scan.frames) and scan.frames[-1].kind is FrameKind.RECORD and not scan.is_ended
    return Judgement(
        accepted,
        None,
        len(accepted.records) - last_is_record,
        sure=scan.header.base == ANY_BASE or scan.names(base),
    )


def is_answer(before: ReadFiles | None, now: ReadFiles) -> bool:
    """Return whether a reading can be accepted.

    Args:
        before: The previous reading, whose files are still open; `None` for the first one.
        now: The new reading. It is accepted if it is certain, or if it has the same files and
            the same result as `before`. A journal that only grew counts as the same file.
    """
    return now.judgement.sure or (before is not None and _key(before) == _key(now))


def _key(seen: ReadFiles) -> tuple[object, ...]:
    judgement = seen.judgement
    return seen.journal, seen.snapshot, seen.base, judgement.accepted, str(judgement.error)


def is_empty(seen: ReadFiles) -> bool:
    """Return whether there is neither a journal nor a snapshot. There may be a lock file."""
    return seen.journal is None and seen.base == NO_BASE
