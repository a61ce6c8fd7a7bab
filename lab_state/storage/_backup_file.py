"""The file of a backup: a snapshot outside the files of its state. All calls except `BackupFile.write` block."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import AsyncIterator

from lab_state.exceptions import UnsupportedError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._generations import parse_name
from lab_state.storage._new_journal import spoiled
from lab_state.storage._os_errors import translated
from lab_state.storage._worker import Worker

_OF_A_STATE = re.compile(
    r"(.+)\.(?:lock|sock|history|(?:json|journal)(?:\.(?:[0-9a-f]{8}\.tmp|(?:torn|replaced)-\d+(?:-\d+)?))?)", re.DOTALL
)
"""A name that a file of a state may have. The file belongs to a state if the lock file of that state is beside it."""


class BackupFile:
    """A new file with a temporary name. When the file is complete, it takes the place of an older backup.

    The worker that `write` gets calls the other methods, too. `discard` must be called at the end.
    """

    def __init__(self, path: str, own: Paths | None) -> None:
        """Check the path, and create the file under its temporary name.

        Args:
            path: The path of the backup. A relative path is resolved now.
            own: The files of the state, if it is on disk.

        Raises:
            UnsupportedError: The path leads to a file of a state, or cannot be written. The message says why.
            UnavailableError: The path cannot be looked up now, or the file cannot be created now.
        """
        self._path = folder.absolute(path)
        _check_place(self._path, own)
        self._written = fs.WrittenBytes()
        self._new = fs.NewFile(fs.temporary(self._path), self._written, self._path)
        self._new.open()

    async def write(self, slices: AsyncIterator[bytes], thread: Worker) -> None:
        """Write the slices; see `NewFile.write`. After a cancellation, the caller must queue `discard`, and call nothing else."""
        await self._new.write(slices, thread, _nothing)

    def publish(self) -> None:
        """Sync the file, rename it, and sync its directory.

        Raises:
            StorageError: One of these steps failed. If the rename was not made, the older backup is unchanged.
        """
        self._new.finish()
        found = lookup.fingerprint(self._new.path)
        if found is None or found.size != self._written.count:
            raise spoiled(self._new.path)
        fs.rename(self._new.path, self._path)
        fs.sync_directory(os.path.dirname(self._path))

    def discard(self) -> None:
        """Close the file, and delete it, unless `publish` has renamed it."""
        self._new.discard()


def own_files(snapshot: str) -> Paths | None:
    """Return the files of a state whose snapshot is at this path; `None` if this is not the path of a file."""
    if not os.path.isabs(snapshot):
        return None
    directory, name = os.path.split(snapshot.removesuffix(".json"))
    return Paths.of(directory, name)


def _check_place(path: str, own: Paths | None) -> None:
    directory, name = os.path.split(path)
    with translated("opening the directory", directory):
        try:
            real = os.path.realpath(directory, strict=True)
        except FileNotFoundError:
            raise UnsupportedError(f"there is no directory {directory}: create it, or choose another path") from None
    match = _OF_A_STATE.fullmatch(name)
    if match is not None and lookup.fingerprint(os.path.join(real, f"{match[1]}.lock")) is not None:
        raise UnsupportedError(
            f"{path} is a name for a file of the state {match[1]!r} in this directory: choose another name or another directory"
        )
    if parse_name(name) is not None and real.endswith(".history"):
        raise UnsupportedError(
            f"{path} is a name for a file in the history of a state: choose another name or another directory"
        )
    with translated("looking up", path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
    if stat.S_ISDIR(found.st_mode):
        raise UnsupportedError(f"{path} is a directory: add the name of a file")
    if stat.S_ISLNK(found.st_mode):
        raise UnsupportedError(f"{path} is a symbolic link: give the path that it leads to, or remove the link")
    if not stat.S_ISREG(found.st_mode):
        raise UnsupportedError(f"{path} is not a file: choose another path")
    for file in () if own is None else own[1:]:
        if lookup.is_file(file, (found.st_dev, found.st_ino)):
            raise UnsupportedError(f"{path} is a hard link to {file}, a file of the state itself: remove the link")


def _nothing() -> None: ...
