"""The steps of a restore on disk: lock the state, link its files, and find the highest revision in them. The calls block.

The writer of a restore loads nothing. Its first commit puts a journal with the whole restored state in place, by
rule 6 of `docs/design/disk.md`. The rename of this journal is the moment of the restore. So the present snapshot
need not be valid.
"""

from __future__ import annotations

import contextlib
import os
import zlib

from lab_state import _journal as journal
from lab_state._clock import wall_now
from lab_state._journal import NO_BASE, FrameKind
from lab_state.exceptions import CorruptionError, StorageError, UnsupportedError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._file_start import discard_temporaries, load_writer, take_lock
from lab_state.storage._file_writer import Need, Writer
from lab_state.storage._generations import Moment, moment_of_record, moment_of_snapshot
from lab_state.storage._history_files import NO_LINKS, link_present
from lab_state.storage._keeping import Keeping
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._os_errors import storage_error
from lab_state.storage._protocol import Recovery


def restoring_writer(
    directory: str, name: str, tried: set[lookup.Identity], leftovers: Leftovers
) -> tuple[Writer, Recovery]:
    """Lock a state, and return a writer whose first commit replaces it. Nothing is loaded. For the arguments, see `open_writer`.

    Raises:
        StorageError: See `History.restoring`.
    """
    paths, lock = take_lock(directory, name, create=True)
    try:
        for path in (paths.snapshot, paths.journal):
            folder.check_replaceable(path, paths.directory)
        folder.try_out(paths.directory, paths.journal, tried, lock.noted)
        writer = Writer(name, paths, lock)
        writer.need = Need.FULL
        writer.snapshot_fingerprint = lookup.fingerprint(paths.snapshot)
        writer.base = _base_of(fs.read(paths.snapshot))
        discard_temporaries(paths, lock, leftovers, is_new=False)
    except BaseException:
        lock.release()
        raise
    return writer, Recovery(None, (), unsettled=False, dropped_bytes=0)


def new_writer(
    directory: str, name: str, tried: set[lookup.Identity], leftovers: Leftovers, keeping: Keeping | None
) -> tuple[Writer, Recovery]:
    """Open a state that does not exist yet; see `History.open_new`. For the arguments, see `open_writer`.

    Raises:
        ValueError: The state exists, or a history of it.
        StorageError: See `Storage.open`.
    """
    paths, lock = take_lock(directory, name, create=True)
    try:
        there = next((path for path in (paths.snapshot, paths.history) if lookup.fingerprint(path) is not None), None)
    except BaseException:
        lock.release()
        raise
    if there is not None:
        lock.release()
        raise _exists(name, there)
    try:
        writer, recovery = load_writer(paths, name, lock, tried, leftovers, create=True, keeping=keeping)
    except CorruptionError as error:
        raise _exists(name, paths.journal) from error
    if recovery.records or recovery.snapshot is not None:  # the journal may have the whole state
        writer.close()
        raise _exists(name, paths.journal)
    return writer, recovery


def _exists(name: str, path: str) -> ValueError:
    return ValueError(
        f"{name!r} exists: {path} is there; restore into another name, or call remove_state({name!r}, …, history=True) first"
    )


def highest_revision(paths: Paths, name: str) -> int:
    """Return the highest revision in a valid record or snapshot; 0 if there is none. Damaged parts are left out.

    The revisions of a journal grow, so its last valid frame has the highest one. Without a valid header no frame can be verified.

    Raises:
        StorageError: A file cannot be read.
    """
    found = [Moment(0, 0)]
    snapshot = fs.read(paths.snapshot) or b""
    if journal.base_at_end(len(snapshot), snapshot[-journal.SNAPSHOT_END_BYTES :]) == _base_of(snapshot):
        found.append(moment_of_snapshot(snapshot) or Moment(0, 0))
    data = fs.read(paths.journal) or b""
    with contextlib.suppress(StorageError):
        frame = journal.last_content(data, journal.read_header(data, name, paths.journal).salt)
        if frame is not None:
            moment = moment_of_snapshot if frame.kind is FrameKind.FULL else moment_of_record
            found.append(moment(frame.payload) or Moment(0, 0))
    return max(found).revision


def keep_present(writer: Writer) -> None:
    """Link the present files into the history, even without `history=`.

    Raises:
        UnsupportedError: Hard links are not possible, or a permission is missing. Nothing may be replaced.
        StorageError: A file could not be linked. Then nothing may be replaced.
    """
    paths = writer.paths
    try:
        link_present(paths, writer.name, writer.base, writer.snapshot_fingerprint)
    except StorageError as error:
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno in NO_LINKS):
            raise
        raise UnsupportedError(
            f"{paths.snapshot} is not restored in place, because its files could not be linked into {paths.history} "
            f"({cause.strerror}): restore into another name, or move the state to a file system with hard links"
        ) from cause


def keep_apart(writer: Writer) -> str:
    """Link the damaged files into a new directory `<name>.damaged-<time>`. Return its path.

    The files are synced first, since they may be only in the page cache. Where the file system has no hard links, copy the files.

    Raises:
        StorageError: A file could not be kept. Then nothing may be replaced.
    """
    paths = writer.paths
    files = [path for path in (paths.snapshot, paths.journal) if lookup.fingerprint(path) is not None]
    directory = folder.make_new(f"{paths.snapshot.removesuffix('.json')}.damaged-", wall_now())
    made: list[str] = []
    try:
        for path in files:
            fs.sync(path)
            made.append(os.path.join(directory, os.path.basename(path)))
            _link_or_copy(path, made[-1])
        fs.sync_directory(directory)
        fs.sync_directory(paths.directory)
    except BaseException:
        for path in made:
            fs.discard(path)
        with contextlib.suppress(OSError):
            os.rmdir(directory)
        raise
    return directory


def _link_or_copy(path: str, target: str) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise storage_error("linking a damaged file to", target, error) from error
        fs.close(fs.create(target, [fs.read(path) or b""], fs.WrittenBytes(), path))


def _base_of(snapshot: bytes | None) -> str:
    return NO_BASE if snapshot is None else journal.base_of(len(snapshot), zlib.crc32(snapshot))
