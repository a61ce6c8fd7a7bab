"""The journal of one state on disk: appending, replacing it behind a checkpoint. Blocking.

The rules, each with its reason, are in `docs/design/disk.md`. `Writer` is used from one
thread, one function at a time, and keeps its own state there; so a caller that is
cancelled tears nothing. What else the checkpoint's thread may do is said where it does it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from lab_state import _forks as forks
from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state._log import Log
from lab_state.exceptions import StorageError, UnavailableError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._lock import Lock
from lab_state.storage._os_errors import is_out_of_descriptors

_logger = Log(logging.getLogger("lab_state"))

_MIN_CHECKPOINT_BYTES = 4 * 1024 * 1024
_LEFT_TO_PUBLISH = 256 * 1024
_LARGEST_READ_AGAIN = 16 * 1024 * 1024
"""Of a journal: up to so many bytes, reading it costs less than writing the state anew."""
_MOST_ROUNDS = 8


class Paths(NamedTuple):
    """Where the files of a state are."""

    directory: str
    snapshot: str
    journal: str
    lock: str

    @classmethod
    def of(cls, directory: str, name: str) -> Paths:
        """Those of the state of this name."""
        path = os.path.join(directory, name)
        return cls(directory, f"{path}.json", f"{path}.journal", f"{path}.lock")


def _spoiled(path: str) -> UnavailableError:
    return UnavailableError(
        f"{path} is not what was written: other code changed it, or closed its descriptor; the next attempt writes another"
    )


class Need(Enum):
    """What a commit has to do before it can append."""

    NOTHING = "nothing"
    NEW = "a new journal behind the snapshot"
    FULL = "a new journal that begins with the whole state"


class FullNeededError(Exception):
    """The journal cannot be appended to, and the whole state was not at hand."""


class AbandonedError(UnavailableError):
    """The journal that a checkpoint began beside is not in use any more."""


class NewJournal:
    """A journal under a temporary name: nothing relies on it before `Writer` puts it in place.

    Attributes:
        path: The temporary name.
        base: The snapshot that it follows.
        salt: Of its frames.
        fd: The file; -1 before `create`, and when it is in place or gone.
        end: How many bytes there are, all of them synced.
        records: How many records were added.
    """

    def __init__(self, paths: Paths, name: str, progress: fs.Progress) -> None:
        """Prepare a journal for the state of this name. No file is touched."""
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

    def create(self, base: str, *frames: tuple[FrameKind, bytes]) -> None:
        """Make the file, with a header and these frames, and sync."""
        self.base = base
        parts = [journal.header(self._name, self.salt, base), *self._framed(frames)]
        self.fd = fs.create(self.path, parts, self._progress, *self._replaced)
        self.end = sum(map(len, parts))

    def add(self, records: list[bytes]) -> None:
        """Write them behind what is there, and sync."""
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
        """Return the fingerprint of the file, which must be what was written here.

        Raises:
            UnavailableError: Other code closed the descriptor, or changed the file.
        """
        opened, named = lookup.fingerprint_of(self.fd, self.path), lookup.fingerprint(self.path)
        if not opened.is_same_file(named):
            self.fd = -1  # the number is that of another file by now, which is not ours to close
        if not opened.is_same_size(named) or opened.size != self.end:
            raise _spoiled(self.path)
        return opened

    def _framed(self, frames: Iterable[tuple[FrameKind, bytes]]) -> list[bytes]:
        return [part for frame in frames for part in journal.frame_parts(self.salt, *frame)]

    def discard(self) -> None:
        """Close and delete it, unless it is in place."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            fs.close(fd)
            fs.discard(self.path)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close the file, which is the parent's. Runs in a forked child."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            fs.close(fd)


class Writer:
    """The journal of one state; used from one thread, but for reading its numbers.

    Attributes:
        name: The name of the state.
        paths: Where the files are.
        lock: The lock.
        base: The snapshot that a new journal follows.
        snapshot: The file that this names.
        need: What the next commit has to do.
        unsynced: Whether what was found at the start may be in the page cache alone.
        snapshot_bytes: Its size.
        end: The size of the journal.
        starts_full: Whether the journal begins with the whole state.
        generation: Counts the journals given up because of an error.
        since: The records committed since the view of a checkpoint, while there is one.
        replaced: Files that have no name any more, for the checkpoint's thread to close.
        progress: Counts the bytes that commits and checkpoints hand to the disk.
    """

    def __init__(self, name: str, paths: Paths, lock: Lock) -> None:
        self.name: str = name
        self.paths: Paths = paths
        self.lock: Lock = lock
        self.base: str = NO_BASE
        self.snapshot_fingerprint: lookup.Fingerprint | None = None
        self.need: Need = Need.NEW
        self.unsynced: bool = True
        self.snapshot_bytes: int = 0
        self.end: int = 0
        self.starts_full: bool = False
        self.generation: int = 0
        self.since: list[bytes] | None = None
        self.replaced: list[int] = []
        self.progress: fs.Progress = fs.Progress()
        self._fd = -1
        self._left = lookup.UNKNOWN
        self._is_timed = True
        self._salt = ""
        forks.disown_in_children(self)

    # Commits

    def commit(self, record: bytes, full: bytes | None) -> None:
        """Make a record durable, alone or in the whole state."""
        self._check()
        self._check_snapshot()
        if self.need is Need.FULL:
            if full is None:
                raise FullNeededError
            self._create(ANY_BASE, (FrameKind.FULL, full))
        elif self.need is Need.NEW:
            self._create(self.base, (FrameKind.RECORD, record))
        else:
            self._append(FrameKind.RECORD, record)
        if (since := self.since) is not None:  # the event loop may take it away meanwhile
            since.append(record)

    def _append(self, kind: FrameKind, payload: bytes) -> None:
        parts = journal.frame_parts(self._salt, kind, payload)
        try:
            fs.append(self._fd, self.paths.journal, parts, self.end, self.progress)
        except fs.TornWriteError as torn:
            self._poison()
            raise torn.error from torn.__cause__
        except StorageError:
            self._note()
            raise
        self.end += sum(map(len, parts))
        self._note()

    def _note(self) -> None:
        """Note what our own write left. If that cannot be found out, the next commit reads the journal."""
        self._left = self._opened() or self._left._replace(size=self.end, modified=-1)

    # Checkpoints

    def note_checkpoint(self, *paths: str) -> None:
        """Note the temporary files of a checkpoint before they are made. `end_checkpoint` follows in any case."""
        self.lock.check()
        self.lock.note(*paths)

    def end_checkpoint(self, upcoming: NewJournal) -> None:
        """Let go of the upcoming journal, unless it is in place."""
        upcoming.discard()
        self.lock.forget(upcoming.path)

    def repair(self, full: bytes, generation: int) -> None:
        """A new journal that begins with the whole state, unless a commit made one since the view was taken."""
        self._check()
        if self.need is not Need.FULL or generation != self.generation:
            raise self._abandoned()
        self._create(ANY_BASE, (FrameKind.FULL, full))

    def prepare(self, upcoming: NewJournal, base: str, since: list[bytes]) -> None:
        """Write most of the journal that will follow a new snapshot, while commits go on and add to `since`.

        In the checkpoint's thread; so `publish`, which commits wait for, has little left to do.
        """
        upcoming.create(base)
        for _ in range(_MOST_ROUNDS):
            more = since[upcoming.records :]
            if sum(map(len, more)) <= _LEFT_TO_PUBLISH:
                break
            upcoming.add(more)
        self.replaced.append(fs.hold(self.paths.snapshot))

    def publish(self, new: str, upcoming: NewJournal, size: int, since: list[bytes], generation: int) -> None:
        """Put a new snapshot in place of the old one, and the upcoming journal in place of the one so far."""
        self._check()
        if self.need is Need.FULL or generation != self.generation:
            raise self._abandoned()
        if self.need is Need.NEW:
            self._create(self.base)
        self._append(FrameKind.CHECKPOINT, upcoming.base.encode())
        snapshot = lookup.fingerprint(new)
        if snapshot is None or snapshot.size != size:
            raise _spoiled(new)
        fs.rename(new, self.paths.snapshot)
        try:
            fs.sync_directory(self.paths.directory)
        except StorageError:
            self._poison()
            raise
        self.base, self.snapshot_fingerprint, self.snapshot_bytes, self.unsynced = upcoming.base, snapshot, size, False
        upcoming.add(since[upcoming.records :])
        self._put_in_place(upcoming, self.replaced)

    def _abandoned(self) -> AbandonedError:
        return AbandonedError(
            f"{self.paths.journal} was replaced meanwhile, so this checkpoint was abandoned; another is due"
        )

    def close_replaced(self) -> None:
        """Close what has no name any more; in the checkpoint's thread, since the file system takes its time to free it."""
        while self.replaced:
            fs.close(self.replaced.pop())

    @property
    def checkpoint_due(self) -> bool:
        """Whether the journal has grown so much that a byte changed costs about three written."""
        return self.starts_full or self.end > max(_MIN_CHECKPOINT_BYTES, self.snapshot_bytes)

    def close(self) -> None:
        """Let go of the journal, then of the lock."""
        self._use(-1)
        self.lock.release()

    def rest(self) -> None:
        """Close the journal until the next commit, so that an idle state has one descriptor. All of it is synced."""
        if self.need is Need.NOTHING and self.since is None and lookup.is_open(self._fd, self._left.identity):
            fd, self._fd = self._fd, -1
            fs.close(fd)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close all descriptors. Runs in a forked child. The files are the parent's; the lock refuses every call."""
        if not self._left.is_same_file(self._opened()):
            self._fd = -1  # not ours to close, as in `_problem`
        self._use(-1)
        self.close_replaced()

    # What commits and checkpoints share

    def _check(self) -> None:
        """Nobody else writes here, and what is written here can be found again."""
        self.lock.check()
        if self.need is Need.NOTHING:
            if self._fd < 0:
                self._wake_up()
            if not lookup.is_as_left(self.paths.journal, self._fd, self._left):
                self._look_into_journal()

    def _look_into_journal(self) -> None:
        """Give the journal up, unless it holds what was written."""
        if self.need is Need.NOTHING and (
            problem := self._problem(lookup.fingerprint(self.paths.journal), self._opened())
        ):
            _logger.error("%s %s: writing everything anew", self.paths.journal, problem)
            self._poison()

    def _wake_up(self) -> None:
        """Open the journal again after `rest`, or give it up if it is not the file that was left.

        While it was closed, another file may have got its inode number, but hardly its size too.

        Raises:
            UnavailableError: There are too many open files. The journal is kept: the next commit
                tries again.
        """
        path = self.paths.journal
        try:
            self._fd = fs.reopen(path)
            is_left = self._left.is_same_size(self._opened())
        except StorageError as error:
            if is_out_of_descriptors(error):
                raise
            is_left = False
        if not is_left:
            _logger.error("%s was deleted, replaced or changed while it was idle: writing everything anew", path)
            self._poison()

    def _opened(self) -> lookup.Fingerprint | None:
        """Look at the journal by its descriptor; `None` if that is not possible."""
        try:
            return lookup.fingerprint_of(self._fd, self.paths.journal)
        except StorageError:
            return None

    def _problem(self, named: lookup.Fingerprint | None, opened: lookup.Fingerprint | None) -> str | None:
        """Say what became of the journal since the last write; `None` if it holds what was written.

        The time of a file may change although its bytes did not. Then the bytes are read, once:
        from then on, the times of this journal say nothing.
        """
        left = self._left
        if not lookup.is_open(self._fd, left.identity):
            self._fd = -1  # the number is that of another file by now, which is not ours to close
            return "cannot be written: other code in this process closed its descriptor"
        if opened is None:
            return "cannot be looked up by its descriptor"
        if not left.is_same_file(named):
            return "was deleted or replaced while in use"
        if not left.is_same_size(named):
            return "was cut off or written to by other code while in use"
        if self._is_timed and not self._is_intact():
            return "was overwritten by other code while in use"
        self._is_timed = False
        return None

    def _is_intact(self) -> bool:
        """Read the journal and return whether every frame in it is ours; one that is too large counts as changed.

        Raises:
            UnavailableError: There are too many open files, so the journal could not be read.
        """
        if self.end > _LARGEST_READ_AGAIN:
            return False
        path = self.paths.journal
        try:
            data = fs.read(path) or b""
            found = journal.scan(data, self.name, path)
        except StorageError as error:
            if is_out_of_descriptors(error):
                raise
            return False
        return found.header.salt == self._salt and found.end == len(data) == self.end

    def _check_snapshot(self) -> None:
        """Behind a snapshot that is gone, a record would be refused by the next start."""
        relied_on = self.need is not Need.FULL and not self.starts_full
        if relied_on and lookup.fingerprint(self.paths.snapshot) != self.snapshot_fingerprint:
            _logger.error("%s was deleted or replaced while in use: writing everything anew", self.paths.snapshot)
            self._poison()

    def _create(self, base: str, *frames: tuple[FrameKind, bytes]) -> None:
        if self.unsynced:
            self._sync_found(snapshot=base not in (ANY_BASE, NO_BASE))
        new = NewJournal(self.paths, self.name, self.progress)
        with self.lock.noted(new.path):
            try:
                new.create(base, *frames)
                self._put_in_place(new)
            finally:
                new.discard()

    def _put_in_place(self, new: NewJournal, replaced: list[int] | None = None) -> None:
        """Until the rename, whatever was in use stays in use; its descriptor goes to `replaced`, or is closed."""
        left = new.check()
        try:
            fs.rename(new.path, self.paths.journal)
            fs.sync_directory(self.paths.directory)
        except StorageError:
            # Which of the two files a crash leaves is unknown: neither may be written.
            self._poison()
            raise
        fd, new.fd = new.fd, -1
        if replaced is not None:
            replaced.append(self._fd)
            self._fd = -1
        self._salt, self.end = new.salt, new.end
        self._use(fd, left)
        self.starts_full = new.base == ANY_BASE
        if self.starts_full:
            self.generation += 1
        self.need = Need.NOTHING

    def _sync_found(self, *, snapshot: bool) -> None:
        """Sync what was found at the start, before the first journal relies on it: it may have been copied just now.

        A failed sync of the snapshot is not repeated: the next journal holds everything instead.
        """
        folder.sync_parents(self.paths.directory)
        self.unsynced = False
        if snapshot:
            try:
                fs.sync(self.paths.snapshot)
                fs.sync_directory(self.paths.directory)
            except StorageError:
                self._poison()
                raise

    def _poison(self) -> None:
        self.need = Need.FULL
        self.generation += 1
        self._use(-1)

    def _use(self, fd: int, left: lookup.Fingerprint = lookup.UNKNOWN) -> None:
        """Another journal, or none, in place of the one that was open."""
        old, self._fd, self._left, self._is_timed = self._fd, fd, left, True
        if old >= 0:
            fs.close(old)
