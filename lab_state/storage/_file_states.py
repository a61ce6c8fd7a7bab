"""List and remove the states in a directory. The calls block."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zlib

from lab_state import _journal as journal
from lab_state._journal import NO_BASE
from lab_state.exceptions import CorruptionError, StorageError
from lab_state.shared._address import address_of
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._file_reader import is_held
from lab_state.storage._file_start import take_lock
from lab_state.storage._generations import parse_name
from lab_state.storage._history import FoundState
from lab_state.storage._history_files import delete, link_present
from lab_state.storage._lock import read_holder
from lab_state.storage._os_errors import storage_error
from lab_state.storage._protocol import no_directory, no_state

_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})\.(json|journal|lock|history)", re.ASCII)
_LEFT = r"\.(?:json|journal)\.(?:[0-9a-f]{8}\.tmp|torn-\d+|replaced-\d+)"


def list_states(directory: str) -> list[FoundState]:
    """Return the states in a directory; see `Catalog.states`.

    Raises:
        StorageError: See `Catalog.states`.
    """
    whole = os.path.realpath(folder.absolute(directory))
    names = {found[1] for found in map(_FILE.fullmatch, _names_in(whole)) if found is not None}
    found = (_state(Paths.of(whole, name), name) for name in sorted(names))
    return [one for one in found if one is not None]


def _names_in(directory: str) -> list[str]:
    try:
        return lookup.names_in(directory)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise no_directory(directory) from error.__cause__
        raise


def _state(paths: Paths, name: str) -> FoundState | None:
    """Return a state; `None` if only directories, links or special files have its names."""
    sizes = {path: _status(path) for path in (paths.snapshot, paths.journal, paths.lock)}
    found = {path: status for path, status in sizes.items() if status is not None}
    history = _history_of(paths, {(status.st_dev, status.st_ino) for status in found.values()})
    if not found and not history:
        return None
    live = is_held(paths.lock)
    holder = read_holder(paths.lock) if live else None
    size = sum(status.st_size for path, status in found.items() if path != paths.lock)
    return FoundState(name, size, history, live, None if holder is None else str(holder))


def _history_of(paths: Paths, in_use: set[lookup.Identity]) -> int:
    """Return the number of bytes of a history, without the files in use."""
    try:
        names = lookup.names_in(paths.history)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return 0
        raise
    found = (_status(os.path.join(paths.history, name)) for name in names if parse_name(name) is not None)
    return sum(
        status.st_size for status in found if status is not None and (status.st_dev, status.st_ino) not in in_use
    )


def _status(path: str) -> os.stat_result | None:
    """Return the status of a regular file; `None` if there is none, or if it was deleted just now.

    Raises:
        StorageError: The file cannot be looked up.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("looking up", path, error) from error
    return found if stat.S_ISREG(found.st_mode) else None


def remove_state(directory: str, name: str, *, history: bool, keeps: bool) -> None:
    """Remove a state; see `Catalog.remove`. `keeps` says whether the storage keeps a history.

    Raises:
        StorageError: See `Catalog.remove`.
    """
    paths = Paths.of(os.path.realpath(folder.absolute(directory)), name)
    if all(map(lookup.is_gone, (paths.snapshot, paths.journal, paths.history))):
        raise no_state(paths.snapshot, ": check the name and the directory")
    paths, lock = take_lock(directory, name, create=True)
    try:
        if not history and (keeps or not lookup.is_gone(paths.history)):
            _keep_last(paths, name)
        _remove_files(paths, name)
        if history and not lookup.is_gone(paths.history):
            _remove_history(paths)
        lock.note_left(())
    finally:
        lock.release()


def _keep_last(paths: Paths, name: str) -> None:
    """Link the last generation into the history, unless it is damaged."""
    snapshot = fs.read(paths.snapshot)
    base = NO_BASE if snapshot is None else journal.base_of(len(snapshot), zlib.crc32(snapshot))
    with contextlib.suppress(CorruptionError):
        link_present(paths, name, base, lookup.fingerprint(paths.snapshot))


def _remove_files(paths: Paths, name: str) -> None:
    """Delete the files of a state, except its lock, its history, and damaged files that a restore has kept.

    The snapshot is deleted first. Without it, a journal that follows it is refused, and a journal that needs no snapshot is
    still the whole state. So a crash never leaves an older state that could be loaded.
    """
    for path in (paths.snapshot, paths.journal):
        fs.delete(path)
        fs.sync_directory(paths.directory)
    left = re.compile(re.escape(name) + _LEFT, re.ASCII)
    for file in filter(left.fullmatch, lookup.names_in(paths.directory)):
        fs.delete(os.path.join(paths.directory, file))
    fs.delete(address_of(paths.directory, name).path)  # an owner that was killed leaves the file of its socket


def _remove_history(paths: Paths) -> None:
    """Delete a history, each journal before its snapshot. If there are files with other names, they and the directory stay."""
    files = [file for file in map(parse_name, lookup.names_in(paths.history)) if file is not None]
    delete(paths.history, (file for file in files if not file.is_snapshot))
    fs.sync_directory(paths.history)
    delete(paths.history, (file for file in files if file.is_snapshot))
    with contextlib.suppress(OSError):
        os.rmdir(paths.history)
    fs.sync_directory(paths.directory)
