"""Read the files of a state while a writer may have it open. The calls block.

The section "Reading without the lock" of `docs/design/disk.md` has the steps, with a reason for
each. No file is created, changed or locked. Even a short lock could make a `start()` fail.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable

from lab_state import _journal as journal
from lab_state._journal import NO_BASE
from lab_state.exceptions import StorageError, UnavailableError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage._directory import Paths
from lab_state.storage._fs_read import OpenFile, has_moved, is_there, open_to_read
from lab_state.storage._proc_locks import MOUNTS, find_holders, would_show
from lab_state.storage._protocol import Reading, no_directory, no_state
from lab_state.storage._reading import ReadFiles, is_answer, is_empty, judge, needs_snapshot

_LONGEST = 5.0
_PAUSE = 0.05
_HEADER_BYTES = 4096
"""A number of bytes that is larger than any header. A name has up to 128 characters."""


def read_files(
    directory: str, name: str, given_up: threading.Event, monotonic: Callable[[], float] = time.monotonic
) -> Reading:
    """Read a state; see `Storage.read`.

    Args:
        directory: The directory of the files.
        name: The name of the state.
        given_up: An event, which the caller sets when it no longer waits. Then the call soon ends,
            with any result or error.
        monotonic: A function that returns the time in seconds. The call gives up after 5 s and at least two readings.

    Raises:
        StorageError: See `Storage.read`.
    """
    paths = Paths.of(folder.absolute(directory), name)
    end = monotonic() + _LONGEST
    before: _Look | None = None
    is_first = True
    try:
        while not given_up.is_set():
            look = _Look(paths, name)
            try:
                if is_answer(before.seen if before else None, look.seen):
                    return look.reading()
            finally:
                # Close the older files only after the comparison: an open file keeps its inode number.
                before, older = look, before
                if older is not None:
                    older.close()
            # The call never gives up after one reading, because one reading of a large file on a slow disk may take longer than 5 s.
            if monotonic() >= end and not is_first:
                break
            is_first = False
            look.snapshot_bytes = None
            if not look.has_moved():
                given_up.wait(_PAUSE)
    finally:
        if before is not None:
            before.close()
    raise UnavailableError(
        f"the files of {paths.snapshot} changed faster than they could be read, for {_LONGEST:.0f} s; read the state again"
    )


class _Look:
    """One reading of the files. The files stay open until `close`."""

    def __init__(self, paths: Paths, name: str) -> None:
        self._paths = paths
        self._name = name
        self._snapshot: OpenFile | None = None
        self.snapshot_bytes: bytes | None = None
        self._crc: int | None = None
        self._read_snapshot = False
        self._journal = open_to_read(paths.journal)
        try:
            self.seen: ReadFiles = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> ReadFiles:
        name, path = self._name, self._paths.journal
        base = NO_BASE
        if self._journal is None or needs_snapshot(self._journal.read(_HEADER_BYTES), name, path):
            self._read_snapshot = True
            self._snapshot = open_to_read(self._paths.snapshot)
            if self._snapshot is not None:
                self.snapshot_bytes = self._snapshot.read()
                self._crc = zlib.crc32(self.snapshot_bytes)
                base = journal.base_of(len(self.snapshot_bytes), self._crc)
        # The journal is read after the snapshot. So a reader that sees a new snapshot also sees the frame that names it.
        data = None if self._journal is None else self._journal.read()
        return ReadFiles(
            None if self._journal is None else self._journal.identity,
            None if self._snapshot is None else self._snapshot.identity,
            base,
            judge(data, base, name, path, is_followed=journal.is_followed(self.snapshot_bytes or b"")),
        )

    def has_moved(self) -> bool:
        """Return whether a file was replaced since this reading, or the snapshot was changed. Then the next reading can follow at once."""
        if has_moved(self._paths.journal, self._journal, grows=True):
            return True
        return self._read_snapshot and has_moved(self._paths.snapshot, self._snapshot)

    def reading(self) -> Reading:
        """Return the state that the files contain.

        Raises:
            CorruptionError: The files are damaged, or do not belong together.
            UnsupportedError: There are no files, not even a lock file. Or a newer version of
                lab_state wrote them.
        """
        accepted, error, durable, _ = self.seen.judgement
        if accepted is None:
            assert error is not None, "a judgement has either an accepted state or an error"
            raise error
        if is_empty(self.seen) and not is_there(self._paths.lock):
            if not is_there(self._paths.directory):
                raise no_directory(self._paths.directory)
            raise no_state(self._paths.snapshot, ": check the name and the directory")
        snapshot, crc = self.snapshot_bytes, self._crc
        if accepted.full is not None:
            snapshot, crc = accepted.full, None
        return Reading(snapshot, accepted.records, durable, is_held(self._paths.lock), self._paths.snapshot, crc)

    def close(self) -> None:
        """Close the files."""
        for file in (self._journal, self._snapshot):
            if file is not None:
                file.close()


def is_held(path: str) -> bool | None:
    """Return whether a process holds the lock. Return `None` if only an attempt to take the lock would show this."""
    try:
        lock = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False  # a writer whose lock file was deleted cannot write
    except OSError:
        return None
    holders = find_holders(lock.st_dev, lock.st_ino, fs.read)
    if holders is None:
        return None
    if holders:
        return True
    try:
        mounts, namespace = fs.read(MOUNTS), os.stat("/proc/self/ns/pid").st_ino
    except (OSError, StorageError):
        return None
    shown = mounts is not None and would_show(mounts.decode(errors="replace"), lock.st_dev, namespace)
    return False if shown else None
