"""Find the files of a state that belong in its history on disk, and link them. The calls block.

A restore copies a file of the history. With a link, an edit of the restored file would change the history, too.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import msgspec

from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state._log import Log
from lab_state.exceptions import CorruptionError, UnavailableError, UnsupportedError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._generations import (
    HistoryFile,
    Moment,
    format_name,
    journal_file,
    moment_of_snapshot,
    parse_name,
    snapshot_file,
)
from lab_state.storage._kept import has_bytes
from lab_state.storage._os_errors import storage_error, translated

_logger = Log(logging.getLogger("lab_state"))

HEAD_BYTES = 4096
"""The number of bytes at the start of a journal that certainly have its header and the start of the next frame."""

_END_BYTES = 64 * 1024
"""The number of bytes at the end of a snapshot that are read first, to find its revision."""

_PLAIN_END = re.compile(rb',"wall":(\d{1,19})(?:,"[a-z_]+":(?:\d+|true))*,"crc32":"[0-9a-f]{8}"\}\}\Z')
"""The end of a snapshot without results of calls. Only expiry times can be between the head of the reserved member and this end."""

_MEMBER = b'"$lab_state":{'
"""The start of the reserved member. No key in a file contains this text: a quotation mark in a key has a backslash before it."""
_MEMBER_HEAD = re.compile(rb'"\$lab_state":\{"format":\d+,"revision":(\d{1,19}),')
_HEAD_MOST = 64
_PIECE = 1024 * 1024

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""The errors of file systems without hard links."""


class Link(NamedTuple):
    """A file of a state, and its name in the history."""

    path: str
    found: lookup.Fingerprint
    file: HistoryFile


def link_present(paths: Paths, name: str, base: str, known: lookup.Fingerprint | None) -> None:
    """Link the files of a state into its history, and make the links durable. The files are synced first.

    `restore_state` and `remove_state` call this before they replace or delete the files, for a storage with `history=` or without.
    The caller has the lock of the state.

    Args:
        paths: The paths of the files.
        name: The name of the state.
        base: The snapshot that is there, by its bytes; see `_journal.base_of`.
        known: The fingerprint of this snapshot; `None` if there is none.

    Raises:
        StorageError: A file could not be linked. Then the caller must neither replace nor delete it.
    """
    check_directory(paths)
    link_all(paths, present_files(paths, name, base, known), sync=True, sync_parent=True)


def present_files(paths: Paths, name: str, base: str, known: lookup.Fingerprint | None) -> list[Link]:
    """Return the files of a state that belong in its history, the snapshot first. For the arguments, see `link_present`.

    A journal is left out if nothing but an `END` follows its header. A snapshot is left out if the journal is not left out,
    and does not follow it.

    Raises:
        CorruptionError: The journal is damaged, or the snapshot that it needs is missing.
        StorageError: A file cannot be read.
    """
    snapshot = _present_snapshot(paths.snapshot, base, known)
    found, head = lookup.fingerprint(paths.journal), fs.read(paths.journal, HEAD_BYTES)
    if found is None or head is None:
        return [] if snapshot is None else [snapshot]
    header, frame = journal.read_start(head, name, paths.journal)
    if frame is None or frame.kind == FrameKind.END:
        return [] if snapshot is None else [snapshot]
    follows = snapshot if snapshot is not None and snapshot.file.base == header.base else None
    if header.base == ANY_BASE:
        first = _moment(paths.journal, frame.start, frame.end).revision
    elif header.base == NO_BASE:
        first = 0
    elif follows is not None:
        first = follows.file.first
    elif (there := _revision_in_history(paths, header.base)) is not None:
        first = there
    elif snapshot is not None and _names(paths, name, base):
        # A crash during a checkpoint left the new snapshot beside this journal, and the history does not have the old one.
        header, follows, first = msgspec.structs.replace(header, base=base), snapshot, snapshot.file.first
    else:
        raise CorruptionError(
            paths.journal, 0, "the snapshot that this journal follows is missing, so its records cannot be kept"
        )
    link = Link(paths.journal, found, journal_file(first, header.wall, header.base, header.salt))
    return [link] if follows is None else [follows, link]


def first_revision(paths: Paths, base: str) -> int | None:
    """Return the first revision of the generation in use, whose journal has this base. Return `None` if only the journal has this revision.

    Return `None`, too, if the snapshot is missing.

    Raises:
        StorageError: The snapshot cannot be read.
    """
    if base == NO_BASE:
        return 0
    found = lookup.fingerprint(paths.snapshot)
    return None if base == ANY_BASE or found is None else _moment(paths.snapshot, 0, found.size).revision


def _present_snapshot(path: str, base: str, known: lookup.Fingerprint | None) -> Link | None:
    """Return the snapshot, if the file at the path has the bytes that `base` names."""
    found = lookup.fingerprint(path)
    if found is None or known is None or (found != known and not has_bytes(path, found.size, base)):
        return None
    moment = _moment(path, 0, found.size)
    # A file of another program has no recorded time. So its modification time is used.
    return Link(path, found, snapshot_file(moment.revision, moment.wall or found.modified // 1_000_000, base))


def _moment(path: str, start: int, end: int) -> Moment:
    """Return the revision and the time of the snapshot in a part of a file. Both are 0 if another program wrote it.

    The times of expiring keys may take many bytes. Decoding them would block every other thread, so they are skipped.
    """
    size = _END_BYTES
    while True:
        at = max(start, end - size)
        tail = fs.read(path, end - at, at) or b""
        moment = moment_of_snapshot(tail)
        if moment is not None or at == start:
            return moment or Moment(0, 0)
        if (plain := _PLAIN_END.search(tail)) and (revision := _revision_before(path, start, at)) is not None:
            return Moment(revision, int(plain[1]))
        size *= 8


def _revision_before(path: str, start: int, end: int) -> int | None:
    """Return the revision in the reserved member that begins in a part of a file. Search in pieces, the last one first."""
    while end > start:
        at = max(start, end - _PIECE)
        piece = fs.read(path, end - at + _HEAD_MOST, at) or b""
        if (position := piece.rfind(_MEMBER)) >= 0:
            found = _MEMBER_HEAD.match(piece, position)
            return None if found is None else int(found[1])
        end = at
    return None


def _revision_in_history(paths: Paths, base: str) -> int | None:
    """Return the revision of a snapshot that is only in the history; `None` if it is not there."""
    return next((file.first for file in sizes_in(paths.history) if file.is_snapshot and file.base == base), None)


def _names(paths: Paths, name: str, base: str) -> bool:
    """Return whether the journal names the snapshot with this base."""
    return journal.scan(fs.read(paths.journal) or b"", name, paths.journal).names(base)


def link_all(paths: Paths, links: list[Link], *, sync: bool, sync_parent: bool) -> bool:
    """Link files into the history, and make the links durable. Return whether one of the links is new.

    If a step fails, the new links are deleted: after a failed sync, it is not certain that a later sync makes their names durable.

    Args:
        paths: The paths of the state.
        links: The files.
        sync: Whether to sync the files first.
        sync_parent: Whether the name of the directory may not be durable, because a killed process has made it.

    Raises:
        StorageError: A step failed.
    """
    if not links:
        return False
    made: list[str] = []
    try:
        for link in links if sync else ():
            fs.sync(link.path)
        _make(paths, sync_parent=sync_parent)
        for link in links:
            target = os.path.join(paths.history, format_name(link.file))
            if _link(link, target):
                made.append(target)
        fs.sync_directory(paths.history)
    except BaseException:
        for target in made:
            fs.discard(target)
        with contextlib.suppress(OSError):
            os.rmdir(paths.history)  # this fails if the directory is not empty
        raise
    return bool(made)


def _make(paths: Paths, *, sync_parent: bool) -> None:
    """Create the directory of the history if it is missing, and make its name durable."""
    with translated("making the directory", paths.history):
        try:
            os.mkdir(paths.history, 0o700)
        except FileExistsError:
            if not sync_parent:
                return
    fs.sync_directory(paths.directory)


def _link(link: Link, target: str) -> bool:
    """Link a file. Return False if it was linked before.

    Raises:
        StorageError: The link failed, or another file has the name.
    """
    with translated("linking a file of the state to", target):
        try:
            os.link(link.path, target, follow_symlinks=False)
        except FileExistsError:
            there = lookup.fingerprint(target)
            # In a copy of the directory, the two names may belong to two files, and not to one. The name of a snapshot has its size and checksum.
            is_copy = link.file.is_snapshot and there is not None and there.size == link.found.size
            if is_copy or link.found.is_same_file(there):
                return False
            raise
    if not link.found.is_same_file(lookup.fingerprint(target)):
        fs.discard(target)
        raise UnavailableError(f"{link.path} was replaced by other code while it was linked to {target}")
    return True


def sizes_in(directory: str) -> dict[HistoryFile, int]:
    """Return the files of a history, with their sizes in bytes. Files with other names are left out. A missing directory has no files.

    Raises:
        StorageError: The directory cannot be listed.
    """
    sizes: dict[HistoryFile, int] = {}
    with translated("listing", directory), contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            file = parse_name(entry.name)
            if file is not None:
                with contextlib.suppress(FileNotFoundError):  # a person has deleted it just now
                    sizes[file] = entry.stat(follow_symlinks=False).st_size
    return sizes


def delete(directory: str, files: Iterable[HistoryFile]) -> None:
    """Delete files of a history.

    Raises:
        StorageError: A file cannot be deleted.
    """
    for file in files:
        fs.delete(os.path.join(directory, format_name(file)))


def check_directory(paths: Paths) -> None:
    """Check that files can be linked into the directory of the history, if it is there.

    Raises:
        UnsupportedError: The path is not a directory, or is a mount point, or a permission is missing.
        StorageError: The path cannot be looked up.
    """
    path = paths.history
    with translated("linking files into", path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode):
            raise UnsupportedError(f"{path} must be a directory, for the history of the state: move the file away")
        if not folder.is_same_mount(path, paths.directory):
            raise UnsupportedError(
                f"{path} is on another device than the files of the state, and a hard link cannot lead there: unmount it, "
                "or leave out history="
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def try_link(paths: Paths, tried: set[lookup.Identity], noted: Callable[..., AbstractContextManager[None]]) -> None:
    """Try a hard link in the directory of the state. For the arguments, see `_directory.try_out`.

    Raises:
        UnsupportedError: The file system has no hard links, or a permission is missing.
        StorageError: The link failed for another reason. If no file can be created now, for example because the disk is full,
            this is only logged.
    """
    with translated("looking up", paths.directory):
        found = os.stat(paths.directory)
    if (found.st_dev, found.st_ino) in tried:
        return
    first, second = fs.temporary(paths.journal), fs.temporary(paths.journal)
    with noted(first, second):
        try:
            fs.close(fs.create_empty(first))
            os.link(first, second, follow_symlinks=False)
        except UnavailableError as error:
            _logger.warning("hard links could not be tested in %s: %s", paths.directory, error)
            return
        except OSError as error:
            if error.errno in NO_LINKS:
                raise UnsupportedError(
                    f"the file system of {paths.directory} has no hard links, which a history needs: choose another one, "
                    "or leave out history="
                ) from error
            raise storage_error("linking a file in", paths.directory, error) from error
        finally:
            fs.discard(first)
            fs.discard(second)
    tried.add((found.st_dev, found.st_ino))
