"""A new journal on disk, under a temporary name until it is put in place. The calls block."""

from __future__ import annotations

from collections.abc import Iterable

from lab_state import _forks as forks
from lab_state import _journal as journal
from lab_state._clock import wall_now
from lab_state._journal import NO_BASE, FrameKind
from lab_state.exceptions import UnavailableError
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths


def spoiled(path: str) -> UnavailableError:
    """Return the error for a new file that other code changed."""
    return UnavailableError(
        f"{path} is not what was written: other code changed it, or closed its descriptor; the next attempt writes another file"
    )


class NewJournal:
    """A new journal under a temporary name. Nothing relies on it until `Writer` puts it in place.

    Attributes:
        path: The temporary name.
        base: The snapshot that the journal follows.
        salt: The salt of its frames.
        fd: The descriptor of the file; -1 before `create`, and after the file was put in
            place or closed.
        end: The size of the file. All of it is synced.
        records: The number of records that were added with `add`.
    """

    def __init__(self, paths: Paths, name: str, progress: fs.WrittenBytes) -> None:
        """Prepare a journal for the state of this name. No file is created yet."""
        self.path: str = fs.temporary(paths.journal)
        self.base: str = NO_BASE
        self.salt: str = journal.new_salt()
        self.fd: int = -1
        self.end: int = 0
        self.records: int = 0
        self._name = name
        self._progress = progress
        self._replaced = paths.journal, paths.snapshot
        forks.disown_in_children(self)

    def create(self, base: str, *frames: tuple[FrameKind, bytes], after: int = 0) -> None:
        """Create the file with a header and these frames, and sync it. Later, the caller must call `discard`.

        The time in the header is that of the wall clock, but later than `after`, which is in milliseconds since 1970.
        """
        self.base = base
        wall = max(wall_now(), after + 1)
        parts = [journal.header(self._name, self.salt, base, wall), *self._framed(frames)]
        self.fd = fs.create(self.path, parts, self._progress, *self._replaced)
        self.end = sum(map(len, parts))

    def add(self, records: list[bytes]) -> None:
        """Append records, and sync the file."""
        if not records:
            return
        parts = self._framed((FrameKind.RECORD, record) for record in records)
        try:
            fs.append(self.fd, self.path, parts, self.end, self._progress)
        except fs.TornWriteError as torn:
            raise torn.error from torn.__cause__
        self.end += sum(map(len, parts))
        self.records += len(records)

    def check(self) -> lookup.Fingerprint:
        """Return the fingerprint of the file. First check that the file has not changed since the last write.

        Raises:
            UnavailableError: Other code closed the descriptor, or changed the file.
        """
        opened, named = lookup.fingerprint_of(self.fd, self.path), lookup.fingerprint(self.path)
        if not opened.is_same_file(named):
            self.fd = -1  # the number belongs to another file now; closing it would close that file
        if not opened.is_same_size(named) or opened.size != self.end:
            raise spoiled(self.path)
        return opened

    def _framed(self, frames: Iterable[tuple[FrameKind, bytes]]) -> list[bytes]:
        return [part for frame in frames for part in journal.frame_parts(self.salt, *frame)]

    def discard(self) -> None:
        """Close and delete the file, unless it was put in place."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            fs.close(fd)
            fs.discard(self.path)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close the file. This runs in a forked child. The file belongs to the parent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            fs.close(fd)
