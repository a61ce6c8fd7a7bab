"""The journal of one state on disk. Commits append to it, and checkpoints replace it. The calls block.

The page `docs/design/disk.md` has the rules, with a reason for each. The worker for commits calls
the methods of `Writer`, one at a time. A method that has begun is completed, even if the task that
waits for it is cancelled. The worker for checkpoints calls a few methods; their docstrings say so.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from enum import Enum

from lab_state import _forks as forks
from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state._log import Log
from lab_state.exceptions import StorageError, UnavailableError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._keeping import KeptHistory
from lab_state.storage._kept import KeptFiles
from lab_state.storage._lock import Lock
from lab_state.storage._new_journal import NewJournal, spoiled
from lab_state.storage._os_errors import is_out_of_descriptors

_logger = Log(logging.getLogger("lab_state"))

_MIN_CHECKPOINT_BYTES = 4 * 1024 * 1024
_LEFT_TO_PUBLISH = 256 * 1024
"""If the upcoming journal lacks at most this many bytes of records, `prepare` leaves them to `publish`."""

_LARGEST_READ_AGAIN = 16 * 1024 * 1024
"""The size in bytes up to which a journal is read again, to see whether its frames are still valid."""

_MOST_ROUNDS = 8


class Need(Enum):
    """The work that a commit has to do before it can append."""

    NOTHING = "nothing"
    NEW = "a new journal that follows the snapshot, with the inherited records"
    FULL = "a new journal that begins with the whole state"


class FullNeededError(Exception):
    """A commit must write the whole state, and was called without it. Nothing was written."""


class AbandonedError(UnavailableError):
    """The journal that was in use when the checkpoint began was given up or replaced meanwhile."""


class Writer:
    """The journal of one state. The module says which worker calls which method. Any thread may read the numbers.

    Attributes:
        name: The name of the state.
        paths: The paths of the files.
        lock: The lock.
        base: The snapshot that a new journal follows, by size and CRC-32.
        snapshot_fingerprint: The fingerprint of the present snapshot; `None` if there is no snapshot.
        need: The work that the next commit has to do first.
        unsynced: Whether the files that the start found may be only in the page cache. True until
            this session has synced or replaced them.
        snapshot_bytes: The size of the snapshot, in bytes.
        end: The size of the journal in bytes, without an `E` frame at its end.
        starts_full: Whether the journal starts with the whole state.
        generation: A number that grows when a journal is given up. It also grows when a journal
            that starts with the whole state is put in place. It does not count generations of a history.
        since: The records that were committed after a checkpoint took its view; `None` while
            there is no checkpoint.
        replaced: Descriptors of replaced files, which the worker for checkpoints closes.
        progress: The counter of the bytes that commits and checkpoints write to the disk.
        kept: The foreign files in the place of the snapshot.
        history: The history; `None` if the storage keeps none.
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
        self.progress: fs.WrittenBytes = fs.WrittenBytes()
        self.kept: KeptFiles = KeptFiles(paths.snapshot)
        self.history: KeptHistory | None = None
        self._fd = -1
        self._left = lookup.UNKNOWN
        self._is_timed = True
        self._salt = ""
        self._is_ended = False  # whether the journal ends with an `E` frame
        self._inherited: tuple[bytes, ...] = ()
        self._found_wall = 0
        forks.disown_in_children(self)

    # What the start has found

    def inherit(self, records: tuple[bytes, ...], wall: int) -> None:
        """Let the first journal of this session begin with these records. The snapshot of `base` was durable before they were written.

        Args:
            records: The records of the journal that the start found.
            wall: The time in its header, in milliseconds since 1970. The time in the new header is later, even if the clock was set back.
        """
        self.need, self._inherited, self._found_wall = Need.NEW, records, wall

    def adopt(self, salt: str, end: int, left: lookup.Fingerprint) -> None:
        """Continue the journal that the start found, whose `E` frame begins at `end`. The journal is opened at the first write."""
        self.need, self._salt, self.end, self._left, self._is_ended = Need.NOTHING, salt, end, left, True

    # Commits

    def commit(self, record: bytes, full: bytes | None) -> None:
        """Make a record durable: append it, or write the whole state `full` that contains it.

        Raises:
            FullNeededError: The whole state must be written, and `full` is `None`. Call again with `full`.
            StorageError: See `StorageSession.commit`.
        """
        self._check()
        self._check_snapshot()
        if self.need is Need.FULL:
            if full is None:
                raise FullNeededError
            self._create(ANY_BASE, (FrameKind.FULL, full))
        elif self.need is Need.NEW:
            self._follow_snapshot(record)
        else:
            self._append(FrameKind.RECORD, record)
        if (since := self.since) is not None:  # read once: the event loop may set it to `None` meanwhile
            since.append(record)

    def _append(self, kind: FrameKind, payload: bytes) -> None:
        if self.unsynced:  # the journal was adopted
            self._sync_found(self.base, self.paths.journal)
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
        self._is_ended = False
        self._note()

    def _note(self) -> None:
        """Store the fingerprint after a write of this session. If the lookup fails, the next commit examines the journal; see `_check`."""
        self._left = self._opened() or self._left._replace(size=self.end, modified=-1)

    def hand_over(self) -> bool:
        """End the journal with an `E` frame, so that the next session can continue the journal. Return True.

        After that, the caller must write nothing, except a checkpoint. Return False if this session has no journal yet or has
        given it up, or if the journal starts with the whole state. Then the next session settles the state, unless the caller
        writes a checkpoint.
        """
        self._check()
        self._check_snapshot()
        if self.need is not Need.NOTHING or self.starts_full:
            return False
        if not self._is_ended:
            end = self.end
            self._append(FrameKind.END, b"")
            self.end, self._is_ended = end, True
        return True

    # Checkpoints

    def note_checkpoint(self, *paths: str) -> None:
        """Note the temporary files of a checkpoint before they are created. The caller must call `end_checkpoint` later.

        The worker for checkpoints calls this.
        """
        self.lock.check()
        self.lock.note(*paths)

    def end_checkpoint(self, upcoming: NewJournal) -> None:
        """Discard the upcoming journal, unless it was put in place."""
        upcoming.discard()
        self.lock.forget(upcoming.path)

    def repair(self, full: bytes, generation: int) -> None:
        """Create a journal that starts with the whole state.

        Raises:
            AbandonedError: Since the view was taken, a commit has created such a journal, or has tried to.
            StorageError: The journal could not be created.
        """
        self._check()
        if self.need is not Need.FULL or generation != self.generation:
            raise self._abandoned()
        self._create(ANY_BASE, (FrameKind.FULL, full))

    def prepare(self, upcoming: NewJournal, base: str, since: list[bytes]) -> None:
        """Write most of the journal that will follow a new snapshot, while commits go on and add to `since`.

        The worker for checkpoints calls this. Commits have to wait for `publish`, which is short
        because of this method.
        """
        self.kept.look(self.snapshot_fingerprint, self.base)
        if self.history is not None and not self.unsynced:  # otherwise `publish` syncs and links the files
            self.history.keep_early(self.base, self.snapshot_fingerprint)
        upcoming.create(base)
        for _ in range(_MOST_ROUNDS):
            more = since[upcoming.records :]
            if sum(map(len, more)) <= _LEFT_TO_PUBLISH:
                break
            upcoming.add(more)
        self.replaced.append(fs.hold(self.paths.snapshot))

    def publish(self, new: str, upcoming: NewJournal, size: int, since: list[bytes], generation: int) -> None:
        """Replace the old snapshot by a new one, and the current journal by the upcoming one.

        Raises:
            AbandonedError: The journal was given up or replaced since the view was taken.
            StorageError: See `StorageSession.checkpoint`.
        """
        self._check()
        if self.need is Need.FULL or generation != self.generation:
            raise self._abandoned()
        self.kept.look(self.snapshot_fingerprint, self.base)
        if self.need is Need.NEW:
            self._follow_snapshot()
        if self.history is not None:
            if self.unsynced:
                self._sync_found(self.base, self.paths.journal)
            self.history.keep_rest(self.base, self.snapshot_fingerprint)
        self._append(FrameKind.CHECKPOINT, upcoming.base.encode())
        snapshot = lookup.fingerprint(new)
        if snapshot is None or snapshot.size != size:
            raise spoiled(new)
        self.kept.wrote(snapshot)
        fs.rename(new, self.paths.snapshot)
        try:
            fs.sync_directory(self.paths.directory)
        except StorageError:
            self._poison()
            raise
        self.base, self.snapshot_fingerprint, self.snapshot_bytes, self.unsynced = upcoming.base, snapshot, size, False
        upcoming.add(since[upcoming.records :])
        self._put_in_place(upcoming, self.replaced)
        if self.history is not None:
            self.history.is_due = True

    def _abandoned(self) -> AbandonedError:
        return AbandonedError(
            f"{self.paths.journal} was given up or replaced during this checkpoint, which was abandoned; another checkpoint follows"
        )

    def close_replaced(self) -> None:
        """Close the replaced files. The worker for checkpoints calls this, because freeing a file can take long."""
        while self.replaced:
            fs.close(self.replaced.pop())

    @property
    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due: the journal is large, or starts with the whole state.

        With this bound for the size of the journal, at most about three bytes are written for each changed byte.
        """
        return self.starts_full or self.end > self.checkpoint_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """The size of the journal, in bytes, above which a checkpoint is due."""
        return max(_MIN_CHECKPOINT_BYTES, self.snapshot_bytes)

    def close(self) -> None:
        """Close the journal, then release the lock."""
        self._use(-1)
        self.lock.release()

    def rest(self) -> None:
        """Close the journal until the next commit, so that an idle state has only one descriptor. Do nothing during a checkpoint.

        All bytes are synced by now.
        """
        if self.need is Need.NOTHING and self.since is None and lookup.is_open(self._fd, self._left.identity):
            fd, self._fd = self._fd, -1
            fs.close(fd)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close all descriptors. This runs in a forked child.

        The files belong to the parent, and the lock refuses every call in the child.
        """
        if not self._left.is_same_file(self._opened()):
            self._fd = -1  # the number may belong to another file, as in `_problem`
        self._use(-1)
        self.close_replaced()

    # Common to commits and checkpoints

    def _check(self) -> None:
        """Check the lock. If the journal has changed since the last write, give it up."""
        self.lock.check()
        if self.need is Need.NOTHING:
            if self._fd < 0:
                self._wake_up()
            if not lookup.is_as_left(self.paths.journal, self._fd, self._left):
                self._look_into_journal()

    def _look_into_journal(self) -> None:
        """Find out what has changed. Give the journal up, unless it certainly still has the same bytes."""
        if self.need is Need.NOTHING and (
            problem := self._problem(lookup.fingerprint(self.paths.journal), self._opened())
        ):
            _logger.error("%s %s: writing everything anew", self.paths.journal, problem)
            self._poison()

    def _wake_up(self) -> None:
        """Open the journal again after `rest`. Give the journal up, unless the file has the same inode and the same size.

        While the journal was closed, another file may have got its inode number. But such a file
        hardly ever has the same size, too.

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
        """Return the fingerprint of the open journal; `None` if the lookup fails."""
        try:
            return lookup.fingerprint_of(self._fd, self.paths.journal)
        except StorageError:
            return None

    def _problem(self, named: lookup.Fingerprint | None, opened: lookup.Fingerprint | None) -> str | None:
        """Return a description of the change of the journal since the last write; `None` if its bytes are the same.

        The modification time of a file may change although its bytes did not. Then the frames are
        read and checked once. After that, the modification time of this journal is ignored.
        """
        left = self._left
        if not lookup.is_open(self._fd, left.identity):
            self._fd = -1  # the number may belong to another file now; closing it would close that file
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
        """Read the journal. Return whether all of its frames are valid, and its size is the last one. Return False if it is too large.

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
        return (
            found.header.salt == self._salt
            and (found.end, found.is_ended) == (self.end, self._is_ended)
            and len(data) == self._left.size
        )

    def _check_snapshot(self) -> None:
        """Give the journal up if it needs the snapshot, but the snapshot was deleted, replaced or changed.

        Otherwise the next start would refuse the journal.
        """
        relied_on = self.need is not Need.FULL and not self.starts_full
        if relied_on and lookup.fingerprint(self.paths.snapshot) != self.snapshot_fingerprint:
            _logger.error("%s was deleted or replaced while in use: writing everything anew", self.paths.snapshot)
            self._poison()

    def _follow_snapshot(self, *records: bytes) -> None:
        """Create the first journal of this session. It follows the snapshot, and has the inherited records, then the given ones."""
        frames = [(FrameKind.RECORD, record) for record in (*self._inherited, *records)]
        self._create(self.base, *frames, after=self._found_wall)

    def _create(self, base: str, *frames: tuple[FrameKind, bytes], after: int = 0) -> None:
        if self.unsynced:
            self._sync_found(base)
        new = NewJournal(self.paths, self.name, self.progress)
        with self.lock.noted(new.path):
            try:
                new.create(base, *frames, after=after)
                self._put_in_place(new)
            finally:
                new.discard()

    def _put_in_place(self, new: NewJournal, replaced: list[int] | None = None) -> None:
        """Rename a new journal, and use it. The old journal is in use until the rename.

        The old descriptor is added to `replaced`. If there is no such list, the old descriptor is closed.
        """
        left = new.check()
        try:
            with self._replacing(is_copied=replaced is not None or self.need is Need.NEW):
                fs.rename(new.path, self.paths.journal)
                fs.sync_directory(self.paths.directory)
        except StorageError:
            # After a crash, the name may lead to the old file or to the new one. So neither of them may be written again.
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
        self.need, self._inherited, self._is_ended = Need.NOTHING, (), False

    def _replacing(self, *, is_copied: bool) -> AbstractContextManager[None]:
        """Return a context manager for the replacement of the journal in use. Before its block runs, it links the journal into the history.

        It links nothing at the end of a checkpoint, or with `Need.NEW`: then the next journal has copies of all records that
        the history does not have.
        """
        if self.history is None:
            return nullcontext()
        return self.history.replacing(self.base, self.snapshot_fingerprint, is_copied=is_copied)

    def _sync_found(self, base: str, *journal: str) -> None:
        """Sync the directories above the directory of the files. Sync the snapshot, unless the base needs none, and the given journal.

        The start found these files, so they may be only in the page cache. A failed sync of a file or of its
        directory is not repeated. Instead, the next journal starts with the whole state.
        """
        folder.sync_parents(self.paths.directory)
        self.unsynced = False
        files = journal if base in (ANY_BASE, NO_BASE) else (self.paths.snapshot, *journal)
        try:
            for path in files:
                fs.sync(path)
            if files:
                fs.sync_directory(self.paths.directory)
        except StorageError:
            self._poison()
            raise

    def _poison(self) -> None:
        """Give the journal up: the next commit writes another one that starts with the whole state."""
        self.need = Need.FULL
        self.generation += 1
        self._use(-1)

    def _use(self, fd: int, left: lookup.Fingerprint = lookup.UNKNOWN) -> None:
        """Close the open journal, if there is one. Use another descriptor; -1 means that no journal is open."""
        old, self._fd, self._left, self._is_timed = self._fd, fd, left, True
        if old >= 0:
            fs.close(old)
