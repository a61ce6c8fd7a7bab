"""A foreign file in the place of a snapshot, which is kept under a second name. The calls block."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib

from lab_state import _journal as journal
from lab_state._clock import wall_now
from lab_state._journal import SNAPSHOT_END_BYTES
from lab_state._log import Log
from lab_state.exceptions import StorageError, UnsupportedError
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._os_errors import translated

_logger = Log(logging.getLogger("lab_state"))

_AT_ONCE = 1024 * 1024


class KeptFiles:
    """The files that other code has put in the place of the snapshot of one state. They are kept before a rename replaces them.

    Attributes:
        is_unread: Whether the start has not read the snapshot, and `look` has not checked it.
    """

    def __init__(self, path: str) -> None:
        """Set the path of the snapshot. No file is touched."""
        self.is_unread: bool = False
        self._path = path
        self._seen: set[lookup.Fingerprint] = set()  # files that need not be kept, or were kept already

    def look(self, known: lookup.Fingerprint | None, base: str) -> None:
        """Link a foreign file at the path as `<path>.replaced-<time>`, and log an ERROR. Do nothing if there is none.

        A file is foreign if this process has neither loaded nor written its bytes. A snapshot that the start has not read is
        foreign only if it has no valid checksum. A file that was checked is not checked again, unless it has changed.

        Args:
            known: The fingerprint of the snapshot that this process has found or written.
            base: The name of this snapshot, by its bytes.

        Raises:
            StorageError: The file could not be kept. Then the caller must not replace it.
        """
        found = lookup.fingerprint(self._path)
        if found == known and not self.is_unread:
            self._seen.clear()
            return
        if found is None or found in self._seen:
            return
        if not (_is_snapshot(self._path, found.size) if found == known else has_bytes(self._path, found.size, base)):
            kept = _keep(self._path)
            _logger.error(
                "%s was put there or changed by other code while the state was in use: it is kept as %s, and replaced by the present state",
                self._path,
                kept,
            )
        self.is_unread = False
        self._seen.add(found)

    def wrote(self, snapshot: lookup.Fingerprint) -> None:
        """Note a snapshot of this process that is about to get its name. So it is not foreign, even if the sync of the directory fails."""
        self._seen.add(snapshot)


def _is_snapshot(path: str, size: int) -> bool:
    """Return whether a file ends with the checksum of its bytes, as a snapshot does. Return False if its end cannot be read.

    Raises:
        StorageError: See `has_bytes`.
    """
    try:
        end = fs.read(path, start=max(0, size - SNAPSHOT_END_BYTES)) or b""
    except StorageError:
        return False
    base = journal.base_at_end(size, end)
    return base is not None and has_bytes(path, size, base)


def has_bytes(path: str, size: int, base: str) -> bool:
    """Return whether a file has the bytes that `base` names. Return False if it cannot be opened.

    Raises:
        StorageError: The file was opened, but cannot be read.
    """
    if not base.startswith(f"{size}-"):
        return False
    try:
        with translated("opening", path):
            fd = fs.open_regular(path, os.O_RDONLY)
    except StorageError:
        return False
    try:
        with translated("reading", path):
            return journal.base_of(size, _checksum(fd, size)) == base
    finally:
        fs.close(fd)


def _checksum(fd: int, size: int) -> int:
    """Return the CRC-32 of the first bytes of a file."""
    crc = 0
    for start in range(0, size, _AT_ONCE):
        crc = zlib.crc32(os.pread(fd, min(_AT_ONCE, size - start), start), crc)
    return crc


def _keep(path: str) -> str:
    """Give a file a second name, and return that name. Copy the file if a link is not possible.

    The file and its second name are synced: a crash after the rename that replaces the file must not lose them.
    """
    number = wall_now()
    while os.path.lexists(kept := f"{path}.replaced-{number}"):
        number += 1
    with contextlib.suppress(UnsupportedError):  # a file that cannot be opened, or a symbolic link, is kept as well
        fs.sync(path)
    try:
        os.link(path, kept, follow_symlinks=False)
    except OSError:  # for example, the file system has no hard links, or the file belongs to another user
        fs.close(fs.create(kept, [fs.read(path) or b""], fs.WrittenBytes(), path))
    fs.sync_directory(os.path.dirname(path))
    return kept
