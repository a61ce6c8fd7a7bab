"""`FileStorage`: a snapshot and a journal for each state, in a directory.

The rules, each with its reason, are in `docs/design/disk.md`. In short:

* `<name>.json` is the snapshot, `<name>.journal` the records after it, `<name>.lock`
  the lock.
* A commit appends one frame and syncs. One frame is in flight at a time.
* A checkpoint writes the snapshot under a temporary name beside the commits, then, in
  one step that no commit interrupts: a frame that names the new snapshot, the rename,
  a new journal.
* After a failed sync the journal is never written again: the next commit writes a new
  one that begins with the whole state. So does a start after an unclean end, since the
  frames that it inherits may be in the page cache alone.

Everything that touches the journal runs in one thread, one function at a time, and
keeps its own state there. So a caller that is cancelled tears nothing. A second thread
writes the snapshot. Both belong to the session: what other code does in the event
loop's own threads cannot hold up a write.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, Kind
from lab_state.exceptions import StorageError, UnavailableError, UnsupportedError
from lab_state.storage import _fs as fs
from lab_state.storage._protocol import Recovery, Snapshot
from lab_state.storage._worker import Worker

P = ParamSpec("P")
R = TypeVar("R")

_logger = logging.getLogger("lab_state")

_MIN_CHECKPOINT_BYTES = 1024 * 1024
_TORN_KEPT = 5


class FileStorage:
    """States in a directory of this machine's, one snapshot and one journal each.

    Durable means: survives SIGKILL, a crash of the machine and a power cut, as far as
    the file system and the disk keep what they promise for `fsync`.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Nothing is touched before a manager starts.

        Args:
            directory: Where the files are. It is made when it is missing, with those
                above it, for this user alone (mode 0700, files 0600).

        Raises:
            ValueError: It has a NUL character.
        """
        if "\0" in os.fspath(directory):
            raise ValueError("the path of a directory cannot hold a NUL character")
        self._directory = Path(directory)

    def __repr__(self) -> str:
        """The directory; there is nothing secret in it."""
        return f"FileStorage({str(self._directory)!r})"

    async def open(self, name: str) -> FileSession:
        """Lock the state and load it; see `Storage.open`."""
        thread = Worker(f"lab_state {name} commits")
        opening = thread.submit(_open, self._directory, name)
        try:
            writer, recovery = await asyncio.shield(asyncio.wrap_future(opening))
        except BaseException:
            # Cancelled, the lock may be taken all the same: give it back before anyone is told.
            giving_up = thread.submit(_give_up, opening)
            thread.shutdown(wait=False)
            await asyncio.shield(asyncio.wrap_future(giving_up))
            raise
        return FileSession(writer, recovery, thread)


class _Paths(NamedTuple):
    snapshot: Path
    journal: Path
    lock: Path

    @classmethod
    def of(cls, directory: Path, name: str) -> _Paths:
        return cls(*(directory / f"{name}{suffix}" for suffix in (".json", ".journal", ".lock")))


def _open(directory: Path, name: str) -> tuple[_Writer, Recovery]:
    """Lock, read, decide. Blocking."""
    directory = directory.absolute()
    paths = _Paths.of(directory, name)
    fs.make_directory(directory)
    lock = fs.Lock(paths.lock)
    try:
        loaded = _load(paths, name, lock)
    except BaseException:
        lock.release()
        raise
    try:
        fs.discard_temporaries(paths.snapshot)
        fs.discard_temporaries(paths.journal)
    except StorageError as error:
        _logger.warning("temporary files beside %s stay until the next start: %s", paths.snapshot, error)
    return loaded


def _load(paths: _Paths, name: str, lock: fs.Lock) -> tuple[_Writer, Recovery]:
    fingerprint = fs.fingerprint(paths.snapshot)
    snapshot, data = fs.read(paths.snapshot), fs.read(paths.journal)
    if data is None:  # whoever made one did this before
        fs.sync_parents(paths.journal.parent)
    base = NO_BASE if snapshot is None else journal.base_of(len(snapshot), zlib.crc32(snapshot))
    scan = None if data is None else journal.scan(data, name, str(paths.journal))
    size = len(data or b"")
    accepted = journal.accept(scan, size, base, str(paths.journal))
    torn = size - scan.end if scan is not None else 0
    if torn and data is not None:
        _keep_torn(paths.journal, data[-torn:])
    writer = _Writer(name, paths, lock)
    writer.base, writer.snapshot = base, fingerprint
    writer.snapshot_bytes = len(snapshot or b"")
    writer.end = size
    writer.need = _Need.FULL if accepted.unclean else _Need.NEW
    # A snapshot that no journal vouches for was put there by hand, maybe a moment ago.
    writer.unsynced = snapshot is not None and (scan is None or scan.header.base != base)
    loaded = snapshot if accepted.full is None else accepted.full
    return writer, Recovery(loaded, accepted.records, accepted.unclean, torn)


def _give_up(opening: Future[tuple[_Writer, Recovery]]) -> None:
    if opening.exception() is None:
        opening.result()[0].close()


def _keep_torn(path: Path, tail: bytes) -> None:
    """Put a torn tail aside, for whoever wants to look; the newest few are kept."""
    torn = re.compile(re.escape(f"{path.name}.torn-") + r"\d+")  # digits to the end: no state has such a file
    copy = path.with_name(f"{path.name}.torn-{time.time_ns() // 1_000_000}")
    try:
        older = [file for file in fs.files_in(path.parent) if torn.fullmatch(file.name)]
        for old in older[: -(_TORN_KEPT - 1)]:
            fs.discard(old)
        fs.close(fs.create(copy, tail))
    except StorageError as error:
        _logger.warning("the torn tail of %s could not be put aside: %s", path, error)


class _Need(Enum):
    """What a commit has to do before it can append."""

    NOTHING = "nothing"
    NEW = "a new journal behind the snapshot"
    FULL = "a new journal that begins with the whole state"


class _FullNeededError(Exception):
    """The journal cannot be appended to, and the whole state was not at hand."""


class _Writer:
    """The journal of one state. Blocking; used from one thread, but for reading its numbers."""

    def __init__(self, name: str, paths: _Paths, lock: fs.Lock) -> None:
        self.paths = paths
        self.base: str = NO_BASE
        self.snapshot: fs.Fingerprint | None = None  # the file that the base names
        self.need: _Need = _Need.NEW
        self.unsynced: bool = False
        self.snapshot_bytes: int = 0
        self.end: int = 0
        self.starts_full: bool = False
        self.generation: int = 0  # counts the journals given up because of an error
        self.since: list[bytes] | None = None  # records committed since the view of a checkpoint
        self._name = name
        self.lock = lock
        self._fd = -1
        self._identity = fs.NO_FILE
        self._salt = ""

    def commit(self, record: bytes, full: bytes | None) -> None:
        """Make a record durable, alone or in the whole state."""
        self._check()
        self._check_snapshot()
        if self.need is _Need.FULL:
            if full is None:
                raise _FullNeededError
            self._create(ANY_BASE, (Kind.FULL, full))
        elif self.need is _Need.NEW:
            self._create(self.base, (Kind.RECORD, record))
        else:
            self._append(Kind.RECORD, record)
        if self.since is not None:
            self.since.append(record)

    def repair(self, full: bytes, generation: int) -> None:
        """A new journal that begins with the whole state, unless a commit made one since the view was taken."""
        self._check()
        if self.need is not _Need.FULL or generation != self.generation:
            raise self._abandoned()
        self._create(ANY_BASE, (Kind.FULL, full))

    def publish(self, new: Path, base: str, size: int, since: list[bytes], generation: int) -> None:
        """Put a new snapshot in place of the old one and of the journal so far."""
        self._check()
        if self.need is _Need.FULL or generation != self.generation:
            raise self._abandoned()
        if self.need is _Need.NEW:
            self._create(self.base)
        self._append(Kind.CHECKPOINT, base.encode())
        snapshot = fs.fingerprint(new)
        fs.rename(new, self.paths.snapshot)
        try:
            fs.sync_directory(self.paths.snapshot.parent)
        except StorageError:
            self._poison()
            raise
        self.base, self.snapshot, self.snapshot_bytes, self.unsynced = base, snapshot, size, False
        self._create(base, *((Kind.RECORD, record) for record in since))

    def _abandoned(self) -> UnavailableError:
        return UnavailableError(
            f"{self.paths.journal} was replaced meanwhile, so this checkpoint was abandoned; another is due"
        )

    @property
    def checkpoint_due(self) -> bool:
        """Whether the journal has grown so much that a byte changed costs about three written."""
        return self.starts_full or self.end > max(_MIN_CHECKPOINT_BYTES, self.snapshot_bytes)

    def close(self) -> None:
        """Let go of the journal, then of the lock."""
        self._use(-1)
        self.lock.release()

    def _check(self) -> None:
        """Nobody else writes here, and what is written here can be found again."""
        self.lock.check()
        if self.need is _Need.NOTHING and not fs.is_file(self.paths.journal, self._identity):
            _logger.error("%s was deleted or replaced while in use: writing it anew", self.paths.journal)
            self._poison()

    def _check_snapshot(self) -> None:
        """Behind a snapshot that is gone, a record would be refused by the next start."""
        relied_on = self.need is not _Need.FULL and not self.starts_full
        if relied_on and fs.fingerprint(self.paths.snapshot) != self.snapshot:
            _logger.error("%s was deleted or replaced while in use: writing everything anew", self.paths.snapshot)
            self._poison()

    def _create(self, base: str, *frames: tuple[Kind, bytes]) -> None:
        salt = journal.new_salt()
        parts = [
            journal.header(self._name, salt, base),
            *(journal.frame(salt, kind, payload) for kind, payload in frames),
        ]
        if self.unsynced and base != ANY_BASE:
            self._sync_snapshot()
        # Until the rename, whatever was in use stays in use.
        new = fs.temporary(self.paths.journal)
        fd = fs.create(new, *parts)
        try:
            fs.rename(new, self.paths.journal)
            fs.sync_directory(self.paths.journal.parent)
        except StorageError:
            # Which of the two files a crash leaves is unknown: neither may be written.
            fs.close(fd)
            fs.discard(new)
            self._poison()
            raise
        self._salt, self.end = salt, sum(map(len, parts))
        self._use(fd)
        self.starts_full = base == ANY_BASE
        if self.starts_full:
            self.generation += 1
        self.need = _Need.NOTHING

    def _append(self, kind: Kind, payload: bytes) -> None:
        data = journal.frame(self._salt, kind, payload)
        try:
            fs.append(self._fd, self.paths.journal, data, self.end)
        except fs.TornWriteError as torn:
            self._poison()
            raise torn.error from torn.__cause__
        self.end += len(data)

    def _sync_snapshot(self) -> None:
        """Before a journal relies on a snapshot that was put there by hand; a failed sync is not repeated."""
        self.unsynced = False
        try:
            fs.sync(self.paths.snapshot)
            fs.sync_directory(self.paths.snapshot.parent)
        except StorageError:
            self._poison()
            raise

    def _poison(self) -> None:
        self.need = _Need.FULL
        self.generation += 1
        self._use(-1)

    def _use(self, fd: int) -> None:
        """Another journal, or none, in place of the one that was open."""
        identity = fs.NO_FILE if fd < 0 else fs.identity(fd, self.paths.journal)
        old, self._fd, self._identity = self._fd, fd, identity
        if old >= 0:
            fs.close(old)


class FileSession:
    """A state on disk, owned until `aclose`; see `StorageSession`."""

    def __init__(self, writer: _Writer, recovery: Recovery, commits: Worker) -> None:
        self.recovery = recovery
        self._writer = writer
        self._commits = commits
        self._checkpoints = ThreadPoolExecutor(1, thread_name_prefix=f"{writer.paths.snapshot.name} checkpoints")
        self._closing: Future[None] | None = None
        self._new: fs.NewFile | None = None

    @property
    def path(self) -> str:
        """The snapshot's path."""
        return str(self._writer.paths.snapshot)

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot."""
        return self._writer.snapshot_bytes

    @property
    def journal_bytes(self) -> int:
        """The size of the journal."""
        return self._writer.end

    async def commit(self, record: bytes, snapshot: Snapshot) -> bool:
        """Append one frame and sync, in one hop; see `StorageSession.commit`."""
        self._check_open()
        try:
            await self._commits.run(self._writer.commit, record, None)
        except _FullNeededError:
            full = b"".join([part async for part in snapshot()])
            self._check_open()
            await self._commits.run(self._writer.commit, record, full)
        return self._writer.checkpoint_due

    async def checkpoint(self, snapshot: Snapshot) -> None:
        """Write the snapshot beside the commits, then publish it; see `StorageSession.checkpoint`."""
        self._check_open()
        writer, thread = self._writer, self._checkpoints
        slices = snapshot()
        since: list[bytes] = []
        writer.since = since
        self._new = new = fs.NewFile(fs.temporary(writer.paths.snapshot))
        try:
            generation = writer.generation
            if writer.need is _Need.FULL:
                full = b"".join([part async for part in slices])
                await self._run(self._commits, writer.repair, full, generation)
                generation, slices = writer.generation, _one(full)
            counted = _Counted(slices)
            await self._run(thread, writer.lock.check)
            await self._run(thread, new.open)
            await new.write(counted.slices(), thread)
            await self._run(thread, new.finish)
            base = journal.base_of(counted.size, counted.crc)
            await self._run(self._commits, writer.publish, new.path, base, counted.size, since, generation)
        except BaseException:
            if self._closing is None:  # else it does that too
                thread.submit(new.discard)
            raise
        finally:
            writer.since = None

    async def aclose(self) -> None:
        """Wait for both threads, then let go of the lock; see `StorageSession.aclose`."""
        self._writer.lock.check_process()  # the threads that would close it are the parent's
        if self._closing is None:
            # Behind whatever is queued in either thread, and whether anyone waits or not.
            self._closing = self._checkpoints.submit(self._close)
        await asyncio.shield(asyncio.wrap_future(self._closing))

    def _close(self) -> None:
        try:
            if self._new is not None:
                self._new.discard()
            self._commits.submit(self._writer.close).result()
        finally:
            self._commits.shutdown(wait=False)
            self._checkpoints.shutdown(wait=False)

    def _check_open(self) -> None:
        self._writer.lock.check_process()
        if self._closing is not None:
            raise UnsupportedError(f"the session of {self.path} is closed: open the state again")

    async def _run(
        self, thread: Worker | ThreadPoolExecutor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        self._check_open()
        return await asyncio.wrap_future(thread.submit(function, *args, **kwargs))


class _Counted:
    """Slices on their way, with the size and CRC-32 of what went through."""

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
