"""`FileStorage`: a snapshot and a journal for each state, in a directory.

The page `docs/design/disk.md` has the rules, with a reason for each. In short:

* `<name>.json` is the snapshot. `<name>.journal` has the records after it. `<name>.lock`
  is the lock.
* A commit appends one frame and syncs the file. A frame is written only after the sync of
  the previous frame has returned.
* A checkpoint writes the snapshot under a temporary name while commits go on. Then it
  makes three changes in one call that no commit interrupts: it appends a frame that names
  the new snapshot, renames the snapshot, and puts a new journal in place.
* After a failed sync, nothing more is written to that journal file. The next commit creates
  a new journal file, which starts with the whole state.
* The frames that a start finds after an unclean end may be only in the page cache. So the
  first commit creates a new journal file, with copies of these frames or with the whole
  state.

For each session, one worker makes all calls that change the present journal, one at a time. A call
that has begun is completed, even if its caller is cancelled. These calls are methods of `Writer`. A
second worker writes the snapshot and the next journal. The threads belong to the storage object. So
other code that uses the default executor of the event loop cannot delay a write.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import ParamSpec, TypeVar

from lab_state import _forks as forks
from lab_state import _journal as journal
from lab_state._buffers import collect
from lab_state._journal import NO_BASE
from lab_state._periods import Seconds, check_history
from lab_state.exceptions import UnsupportedError
from lab_state.storage import _directory as folder
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._claim import SharedFiles
from lab_state.storage._directory import Paths
from lab_state.storage._file_calls import FileCatalog, FileHistory, Settings
from lab_state.storage._file_reader import read_files
from lab_state.storage._file_start import load_writer, open_writer
from lab_state.storage._file_writer import AbandonedError, FullNeededError, Need, Writer
from lab_state.storage._keeping import Keeping
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._limits import Limits
from lab_state.storage._lock import Lock
from lab_state.storage._new_journal import NewJournal
from lab_state.storage._protocol import HistoryFigures, Reading, Recovery, SnapshotSource
from lab_state.storage._worker import Threads, Worker, waited

_MOST_OPEN = 64
"""The largest number of journals that stay open, for one storage object. Opening one takes a tenth of the time of a sync."""

P = ParamSpec("P")
R = TypeVar("R")


class FileStorage:
    """States in a directory of this machine, each with one snapshot and one journal.

    A durable change survives SIGKILL, a crash of the machine and a power cut. For this, the data
    must be on the medium when the system call `fdatasync` or `fsync` has returned.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        create: bool = True,
        history: Seconds | None = None,
        history_bytes: int | None = 1 << 30,
    ) -> None:
        """Check and keep the settings. This touches no file.

        Args:
            directory: The directory of the files. If it is missing, `start()` creates it and
                the directories above it. Only the user of the process can read new directories
                and files: their modes are 0700 and 0600. A file that replaces another file gets
                the mode of the old file. `start()` resolves a relative path from the current
                directory of the process, and resolves symbolic links. A link that is changed
                later has no effect on a running manager.
            create: Whether `start()` creates a missing state. With `False`, `start()` raises
                `UnsupportedError` if there is neither a snapshot nor a journal, and creates
                nothing. Use `False` for a volume that is sometimes not mounted.
            history: The time for which older snapshots and journals are kept, in seconds or as
                a `timedelta`. The state at each moment of this time can be read or restored, unless
                the moment is in a hole of the history, or `history_bytes` was reached. The files are
                in `<name>.history/`, with mode 0700. They are hard links, so they must be in the same
                file system as the directory. With `None`, no older files are kept, and
                existing ones are not deleted.
            history_bytes: The largest total size of these files, in bytes; `None` for no limit. If
                they are larger, the oldest ones are deleted after a checkpoint, at most two
                generations for each new one. A generation is a snapshot with its journal.

        Raises:
            TypeError: `directory` is not a path, or is a path of bytes. Or `history` is not a
                number, a `timedelta` or `None`. Or `history_bytes` is not an `int` or `None`.
            ValueError: `directory` is empty, starts with `~`, or contains a NUL character or
                a character that this system's encoding of file names does not have. Or `history`
                is not above 0, or is longer than 10,000,000,000 seconds. Or `history_bytes` is below 1.
        """
        self._directory = folder.check_path(directory, "directory")
        self._create = create
        age = check_history(history, history_bytes)
        self._keeping = None if age is None else Keeping(Limits(age, history_bytes))
        self._tried: set[lookup.Identity] = set()
        self._leftovers = Leftovers()
        self._journals = Journals()
        self._threads = Threads("lab_state files")

    def __repr__(self) -> str:
        """Return the class and the directory, which is not a secret."""
        return f"FileStorage({self._directory!r})"

    async def open(self, name: str) -> FileSession:
        """Lock the state and load it; see `Storage.open`."""
        return await self._start(
            partial(
                open_writer,
                self._directory,
                name,
                self._tried,
                self._leftovers,
                create=self._create,
                keeping=self._keeping,
            )
        )

    async def read(self, name: str) -> Reading:
        """Read the files while a writer may have them open; see `Storage.read`.

        The call needs only read permission, and works on a file system that is mounted
        read-only. A relative path is resolved at the call, from the current directory of the
        process. A cancelled call leaves nothing open.

        Raises:
            UnsupportedError: There is no state of this name in the directory, a permission is
                missing, or a newer version of lab_state wrote the files. The message says which.
            CorruptionError: The stored data are damaged.
            UnavailableError: The files could not be read this time. Or, for 5 s, they were
                replaced faster than they could be read. Try again.
        """
        thread = Worker(self._threads)
        given_up = threading.Event()
        try:
            return await thread.run(read_files, self._directory, name, given_up)
        finally:
            given_up.set()
            thread.shutdown()

    def _history(self) -> FileHistory:
        settings = Settings(self._directory, self._threads, self._tried, self._leftovers, self._keeping)
        return FileHistory(settings, self._start)

    def _catalog(self) -> FileCatalog:
        return FileCatalog(self._directory, self._threads, keeps=self._keeping is not None)

    def _shared_files(self) -> SharedFiles:
        return SharedFiles(self._directory, self._threads, self._load, create=self._create)

    def _load(self, name: str, paths: Paths, lock: Lock, whole: bool, /) -> Awaitable[FileSession]:  # noqa: FBT001 -- a `Load`
        """Load a state whose lock is held."""
        return self._start(
            partial(
                load_writer,
                paths,
                name,
                lock,
                self._tried,
                self._leftovers,
                create=self._create,
                whole=whole,
                keeping=self._keeping,
            )
        )

    async def _start(self, opening: Callable[[], tuple[Writer, Recovery]]) -> FileSession:
        """Open a state: call `opening` in a thread. Return the session. If the caller is cancelled, close the files and release the lock."""
        commits, checkpoints = Worker(self._threads), Worker(self._threads)
        opened = commits.submit(opening)
        try:
            writer, recovery = await waited(opened)
            return FileSession(writer, recovery, commits, checkpoints, self._journals)
        except BaseException:
            # After a cancellation, the thread may still take the lock. Release it before the caller continues.
            giving_up = commits.submit(_give_up, opened)
            commits.shutdown()
            checkpoints.shutdown()
            await waited(giving_up)
            raise


def files_of(storage: FileStorage) -> SharedFiles:
    """Return the files by which processes share the states of a storage."""
    return storage._shared_files()  # noqa: SLF001 -- `FileStorage` is in this module, and this is not for its users


def paths_of(storage: FileStorage, name: str) -> Paths:
    """Return the paths of the files of a state. A relative directory is resolved now."""
    return Paths.of(os.path.realpath(folder.absolute(storage._directory)), name)  # noqa: SLF001 -- `FileStorage` is in this module, and this is not for its users


def _give_up(opening: Future[tuple[Writer, Recovery]]) -> None:
    if opening.exception() is None:
        opening.result()[0].close()


class Journals:
    """The sessions of a storage object that committed most recently. Only their journals may be open.

    Attributes:
        last: A reference to the session that committed last; `None` if that session has ended, or before the first commit.
    """

    def __init__(self) -> None:
        self.last: weakref.ref[FileSession] | None = None
        self._lock = threading.Lock()
        self._open: OrderedDict[weakref.ref[FileSession], None] = OrderedDict()

    def __reduce__(self) -> tuple[type[Journals], tuple[()]]:
        """Let `copy` and `pickle` make an object without sessions. The sessions belong to the original storage object."""
        return Journals, ()

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Forget all sessions, and make a new lock. This runs in a forked child.

        The sessions belong to the parent. A thread of the parent may have held the lock at the fork.
        """
        self.last = None
        self._lock = threading.Lock()
        self._open = OrderedDict()

    def used(self, one: weakref.ref[FileSession]) -> None:
        """Note that a session has committed. If too many journals are open, close the journal of the session that committed least recently."""
        forks.disown_in_children(self)
        with self._lock:
            self.last = one
            self._open[one] = None
            self._open.move_to_end(one)
            oldest = self._open.popitem(last=False)[0] if len(self._open) > _MOST_OPEN else None
        if oldest is not None and (session := oldest()) is not None:
            session.rest()

    def left(self, one: weakref.ref[FileSession]) -> None:
        """Note that a session has ended."""
        with self._lock:
            self._open.pop(one, None)
            if self.last is one:
                self.last = None


class FileSession:
    """A state on disk that one writer has open until `aclose`; see `StorageSession`."""

    def __init__(
        self, writer: Writer, recovery: Recovery, commits: Worker, checkpoints: Worker, journals: Journals
    ) -> None:
        self.recovery: Recovery = recovery
        self.warning: str | None = None
        self._writer = writer
        self._commits = commits
        self._checkpoints = checkpoints
        self._journals = journals
        self.place: object = writer.paths.snapshot  # see `LockedError.place`
        self._own: weakref.ref[FileSession] = weakref.ref(self)
        self._closing: Future[None] | None = None
        self._new: tuple[fs.NewFile, NewJournal] | None = None

    def __repr__(self) -> str:
        """Return the class, and the path of the state."""
        return f"<FileSession of {self.path}>"

    @property
    def path(self) -> str:
        """The path of the snapshot."""
        return self._writer.paths.snapshot

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot, in bytes."""
        return self._writer.snapshot_bytes

    @property
    def journal_bytes(self) -> int:
        """The size of the journal, in bytes."""
        return self._writer.end

    @property
    def history(self) -> HistoryFigures | None:
        """The figures of the history; `None` if the storage keeps none."""
        return None if self._writer.history is None else self._writer.history.figures

    @property
    def progress(self) -> int:
        """A number that grows while commits and checkpoints make progress.

        It counts the bytes that are written to the disk. While a call waits for a thread, it also
        counts the calls of other states. So a call that waits for its turn is not taken for a
        call that hangs.
        """
        return self._writer.progress.count + self._commits.waited + self._checkpoints.waited

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        """Append one frame and sync the journal, in one call of a worker; see `StorageSession.commit`."""
        self._check_open()
        full_needed = False
        try:
            await self._commits.run(self._writer.commit, record, None)
        except FullNeededError:
            full_needed = True
        if full_needed:
            await self._commit_full(record, snapshot)
        if self.recovery.unsettled:
            self.recovery = self.recovery._replace(unsettled=False)
        if self._journals.last is not self._own:
            self._journals.used(self._own)
        return self._writer.checkpoint_due

    async def _commit_full(self, record: bytes, snapshot: SnapshotSource) -> None:
        """Commit the whole state.

        This is a separate function, because the traceback of `FullNeededError` may keep the local
        variables of `commit` in memory.
        """
        full = await collect(snapshot())
        self._check_open()
        await self._commits.run(self._writer.commit, record, full)

    def forget_recovery(self) -> None:
        """Free the memory of the recovery; see `Forgetter`."""
        self.recovery = self.recovery.used()

    async def whole(self) -> Recovery:
        """Return the recovery with the snapshot; see `SharedSession.whole`."""
        if self.recovery.snapshot is None and self._writer.base != NO_BASE:  # the snapshot was left out
            snapshot = await self._run(self._commits, fs.read, self._writer.paths.snapshot)
            self.recovery = self.recovery._replace(snapshot=snapshot)
        return self.recovery

    async def hand_over(self) -> bool:
        """End the journal with an `END` frame: all frames before it were synced; see `SharedSession.hand_over`."""
        return await self._run(self._commits, self._writer.hand_over)

    def rest(self) -> None:
        """Close the journal until the next commit. Any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the session is being closed
            self._commits.submit(self._writer.rest)

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        """Write the snapshot while commits go on. Then publish it; see `StorageSession.checkpoint`."""
        try:
            await self._checkpoint(snapshot)
        except AbandonedError:
            if self._writer.need is not Need.FULL:
                raise
            # The journal was given up, because it was deleted, for example. No commit has written another one yet. So the
            # changes after the old snapshot are only in memory: write another snapshot now.
            await self._checkpoint(snapshot)

    async def _checkpoint(self, snapshot: SnapshotSource) -> None:
        self._check_open()
        writer, thread = self._writer, self._checkpoints
        slices = snapshot()
        since: list[bytes] = []
        writer.since = since
        paths = writer.paths
        new = fs.NewFile(fs.temporary(paths.snapshot), writer.progress, paths.snapshot, paths.journal)
        upcoming = NewJournal(paths, writer.name, writer.progress)
        self._new = new, upcoming
        try:
            generation = writer.generation
            if writer.need is Need.FULL:
                full = await collect(slices)
                await self._run(self._commits, writer.repair, full, generation)
                generation, slices = writer.generation, _one(full)
            counted = _Counted(slices)
            await self._run(thread, writer.note_checkpoint, new.path, upcoming.path)
            await self._run(thread, new.open)
            await new.write(counted.slices(), thread, self._check_open)
            await self._run(thread, new.finish)
            base = journal.base_of(counted.size, counted.crc)
            await self._run(thread, writer.prepare, upcoming, base, since)
            await self._run(self._commits, writer.publish, new.path, upcoming, counted.size, since, generation)
            self.forget_recovery()
        finally:
            writer.since = None
            if self._closing is None:  # otherwise `_close` calls `_tidy`
                thread.submit(self._tidy, new, upcoming)

    def _tidy(self, new: fs.NewFile, upcoming: NewJournal) -> None:
        """Close and delete the temporary files of a checkpoint, except renamed files. The worker for checkpoints calls this."""
        new.discard()
        self._writer.lock.forget(new.path)
        # This call comes after the queued call that may put the journal in place.
        self._commits.submit(self._writer.end_checkpoint, upcoming)
        self._writer.close_replaced()
        if self._writer.history is not None:
            self._writer.history.prune()

    async def aclose(self) -> None:
        """Wait for both workers. Then release the lock; see `StorageSession.aclose`."""
        self._writer.lock.check_process()  # in a forked child, no thread can close the session
        if self._closing is None:
            # `_close` runs after all queued calls of the second worker, and `_let_go` after all queued calls of the first
            # one. Both run even if this caller is cancelled.
            self._closing = Future()
            self._closing.set_running_or_notify_cancel()
            self._checkpoints.submit(self._close, self._closing)
        await waited(self._closing)

    def _close(self, closing: Future[None]) -> None:
        try:
            if self._new is not None:
                self._tidy(*self._new)
        finally:
            # Do not wait here: if all threads waited like this, no thread would be left for the commits.
            self._commits.submit(self._let_go, closing)

    def _let_go(self, closing: Future[None]) -> None:
        """Close the files and release the lock, after the last commit."""
        self._journals.left(self._own)
        try:
            self._writer.close()
        except BaseException as error:  # noqa: BLE001 -- `aclose` raises it
            closing.set_exception(error)
        else:
            closing.set_result(None)
        finally:
            self._writer.close_replaced()
            self._commits.shutdown()
            self._checkpoints.shutdown()

    def _check_open(self) -> None:
        self._writer.lock.check_process()
        if self._closing is not None:
            raise UnsupportedError(f"the session of {self.path} is closed: open the state again")

    async def _run(self, thread: Worker, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        self._check_open()
        return await asyncio.wrap_future(thread.submit(function, *args, **kwargs))


class _Counted:
    """The size and the CRC-32 of the slices that pass through `slices`."""

    def __init__(self, slices: AsyncIterator[bytes]) -> None:
        self._slices = slices
        self.size = 0
        self.crc = 0

    async def slices(self) -> AsyncIterator[bytes]:
        async for part in self._slices:
            self.size += len(part)
            self.crc = zlib.crc32(part, self.crc)
            yield part


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data
