"""Start a session on disk: take the lock, read the files, choose the state to load, and delete old files. The calls block.

The page `docs/design/disk.md` has the rules, with a reason for each.
"""

from __future__ import annotations

import logging
import zlib

from lab_state import _journal as journal
from lab_state._clock import wall_now
from lab_state._journal import ANY_BASE, NO_BASE, SNAPSHOT_END_BYTES, Accepted, Scan
from lab_state._log import Log
from lab_state.exceptions import LockedError, StorageError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._file_writer import Need, Writer
from lab_state.storage._keeping import Keeping, KeptHistory
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._lock import Lock
from lab_state.storage._protocol import Recovery

_logger = Log(logging.getLogger("lab_state"))

_TORN_KEPT = 5
_RESERVED = b'"$lab_state"'
"""The name of the member of a snapshot that has the data of lab_state. A storage looks at no other part of a snapshot."""

_COPIED_AT_ONCE = 1024 * 1024


def open_writer(
    directory: str,
    name: str,
    tried: set[lookup.Identity],
    leftovers: Leftovers,
    *,
    create: bool = True,
    keeping: Keeping | None = None,
) -> tuple[Writer, Recovery]:
    """Lock the state, read its files, and decide which snapshot and records to load.

    Args:
        directory: The directory of the files.
        name: The name of the state.
        tried: The directories that were tried out; see `_directory.try_out`.
        leftovers: The listings of the files that earlier sessions left.
        create: Whether to create a missing directory and a missing state.
        keeping: The settings of the history; `None` to keep none.

    Raises:
        StorageError: See `Storage.open`.
    """
    paths, lock = take_lock(directory, name, create=create)
    return load_writer(paths, name, lock, tried, leftovers, create=create, keeping=keeping)


def take_lock(directory: str, name: str, *, create: bool, shared: bool = False) -> tuple[Paths, Lock]:
    """Find or create the directory, and lock the state. For the arguments, see `open_writer` and `Lock`.

    Raises:
        LockedError: Another process, or another session of this process, has the lock.
        StorageError: See `Storage.open`.
    """
    paths = Paths.of(folder.opened(directory, create=create), name)
    if not create:
        _check_there(paths)  # this comes before the lock file is created
    try:
        return paths, Lock(paths.lock, shared=shared)
    except LockedError as error:
        error.place = paths.snapshot
        raise


def load_writer(
    paths: Paths,
    name: str,
    lock: Lock,
    tried: set[lookup.Identity],
    leftovers: Leftovers,
    *,
    create: bool,
    whole: bool = True,
    keeping: Keeping | None = None,
) -> tuple[Writer, Recovery]:
    """Read the files of a locked state, and decide which snapshot and records to load. If this fails, release the lock.

    Without `whole`, the snapshot is left out if its last bytes show that the journal follows it; see `FileSession.whole`.
    """
    try:
        loaded = _load(paths, name, lock, leftovers, whole=whole)
        if not create:
            _check_there(paths)
        if not folder.try_out(paths.directory, paths.journal, tried, lock.noted):
            loaded[0].need = Need.FULL
        if keeping is not None:
            loaded[0].history = KeptHistory(paths, name, keeping)
            loaded[0].history.open(lock.noted)
        is_new = loaded[1].snapshot is None and not loaded[0].end
        discard_temporaries(paths, lock, leftovers, is_new=is_new)
    except BaseException:
        lock.release()
        raise
    return loaded


def discard_temporaries(paths: Paths, lock: Lock, leftovers: Leftovers, *, is_new: bool) -> None:
    """Delete the temporary files that earlier sessions left; see `Lock.left`. A new state has no such files.

    If these files are not known, list the directory to find them.
    """
    left = () if lock.is_new and is_new else lock.left
    if left is None:
        try:
            left = (*leftovers.temporary(paths.snapshot), *leftovers.temporary(paths.journal))
        except StorageError as error:
            _logger.warning("temporary files beside %s stay until the next start: %s", paths.snapshot, error)
            return
    for file in left:
        fs.discard(file)
    lock.note_left(left)


def _check_there(paths: Paths) -> None:
    if lookup.fingerprint(paths.snapshot) is None and lookup.fingerprint(paths.journal) is None:
        raise folder.missing(paths.snapshot)


def _load(paths: Paths, name: str, lock: Lock, leftovers: Leftovers, *, whole: bool = True) -> tuple[Writer, Recovery]:
    fingerprint, data = lookup.fingerprint(paths.snapshot), fs.read(paths.journal)
    scan = None if data is None else journal.scan(data, name, paths.journal)
    named = None if whole or scan is None else _named_base(paths.snapshot, fingerprint, scan)
    # If the journal has the whole state, the snapshot is opened, but not read. So the state is in memory only once.
    is_needed = named is None and (scan is None or scan.header.base != ANY_BASE)
    snapshot = fs.read(paths.snapshot, -1 if is_needed else 0)
    for path in (paths.snapshot, paths.journal):
        folder.check_replaceable(path, paths.directory)
    crc = None if snapshot is None else zlib.crc32(snapshot)
    base = NO_BASE if snapshot is None or crc is None else journal.base_of(len(snapshot), crc)
    if named is not None:
        snapshot, crc, base = None, None, named
    size = len(data or b"")
    accepted = journal.accept(scan, size, base, paths.journal)
    journal.check_followed(scan, base, paths.journal, is_followed=journal.is_followed(snapshot or b""))
    if accepted.full is None and snapshot is not None and scan is not None and not scan.names(base):
        _warn_if_stripped(paths.snapshot, snapshot)
    torn = size - scan.end if scan is not None and not scan.is_ended else 0
    if torn and data is not None:
        _keep_torn(paths.journal, data, size - torn, leftovers)
    writer = Writer(name, paths, lock)
    writer.base, writer.snapshot_fingerprint = base, fingerprint
    writer.snapshot_bytes = 0 if fingerprint is None else fingerprint.size
    writer.end = size
    writer.kept.is_unread = not is_needed
    if scan is not None:
        _continue(writer, scan, accepted)
    if accepted.full is not None:
        snapshot, crc = accepted.full, None
    return writer, Recovery(snapshot, accepted.records, accepted.unclean, torn, crc)


def _named_base(path: str, found: lookup.Fingerprint | None, scan: Scan) -> str | None:
    """Return the base of the snapshot, from its last bytes, if the journal names it. Otherwise return `None`."""
    if found is None:
        return None
    end = fs.read(path, start=max(0, found.size - SNAPSHOT_END_BYTES)) or b""
    base = journal.base_at_end(found.size, end)
    return base if base is not None and scan.names(base) else None


def _warn_if_stripped(path: str, snapshot: bytes) -> None:
    """Log a warning if a snapshot has no reserved member. The journal beside it follows another snapshot."""
    if _RESERVED not in snapshot:
        _logger.warning(
            "%s has no member $lab_state any longer, so it was replaced or edited: revisions begin at 0, and keys that had an expiry time "
            "have none",
            path,
        )


def _continue(writer: Writer, found: Scan, accepted: Accepted) -> None:
    """Decide how the first commit continues the journal that was found.

    After an unclean end, the records may not be durable. The first commit copies them to a new journal if they follow the
    snapshot in the header: that snapshot was durable before the journal was begun. In other cases the first commit writes
    the whole state. For example, if only a checkpoint frame names the snapshot, its rename may not be durable. The first
    commit also writes the whole state if the journal is larger than twice the bound for a checkpoint, because this takes
    less time.

    If the journal ends with an `E` frame, the first commit continues the journal. If the journal has only a header, the
    first commit writes a new journal.
    """
    if accepted.unclean:
        if found.header.base == writer.base and found.end <= 2 * writer.checkpoint_bytes:
            writer.inherit(accepted.records, found.header.wall)
        else:
            writer.need = Need.FULL
    elif found.is_ended and found.names(writer.base):
        opened = lookup.fingerprint(writer.paths.journal) or lookup.UNKNOWN
        writer.adopt(found.header.salt, found.end, opened._replace(size=writer.end))


def _keep_torn(path: str, data: bytes, start: int, leftovers: Leftovers) -> None:
    """Save a torn tail to a separate file for inspection. Keep only the newest `_TORN_KEPT` such files."""
    try:
        older = leftovers.torn(path)
        while len(older) >= _TORN_KEPT:
            fs.discard(older.pop(0))
        # The tail is copied in pieces, because one large copy would block every other thread.
        tail = [data[at : at + _COPIED_AT_ONCE] for at in range(start, len(data), _COPIED_AT_ONCE)]
        kept = f"{path}.torn-{wall_now()}"
        fs.close(fs.create(kept, tail, fs.WrittenBytes()))
        leftovers.add(path, kept)
    except StorageError as error:
        _logger.warning("the torn tail of %s could not be saved: %s", path, error)
