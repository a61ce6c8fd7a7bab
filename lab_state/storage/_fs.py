"""The only module that opens, syncs, renames or locks a file.

Every function but `stream` is synchronous and runs in a thread of the storage's. The
rules: a new file is written under a temporary name in the same directory, synced,
renamed, and its directory synced, before anything relies on it; a failed sync is never
repeated, since the kernel marks the pages clean all the same (Rebello et al., "Can
Applications Recover from fsync Failures?", USENIX ATC 2020).

Linux is what is tested. macOS has no `fdatasync`, and its `fsync` does not reach the
platter: `F_FULLFSYNC` does. Windows has no `fcntl`: importing works, opening does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import IO

import aiofiles

from lab_state import _forks as forks
from lab_state.exceptions import StorageError, UnsupportedError
from lab_state.storage._os_errors import check_regular, storage_error, translated
from lab_state.storage._ownership import keep
from lab_state.storage._worker import Worker

if sys.platform != "win32":  # pragma: no branch -- never run there
    import fcntl

_SYNCED_AT_ONCE = 1024 * 1024
"""Of a large new file. A journal's sync has to wait for what the file system has taken in of it by then."""

_APPENDED_AT_ONCE = 4 * 1024 * 1024
"""Of a large record, between two syncs: one sync of a hundred megabytes cannot be told from a disk that hangs."""

_COPIED = 64 * 1024
"""Up to so many bytes are copied to spare a system call; a copy of more would hold up every other thread."""


_NOT_FOR_DIRECTORIES = {errno.EINVAL, errno.ENOSYS}
"""The errors of a file system that cannot sync a directory: CIFS, FUSE, DrvFs."""


class Progress:
    """The number of bytes that were handed to the disk.

    Attributes:
        count: The number. It never goes back, and may be read from any thread.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self._lock = threading.Lock()  # a checkpoint counts beside a commit

    def add(self, size: int) -> None:
        """Count so many bytes more; from any thread."""
        with self._lock:
            self.count += size


def open_lock(path: str) -> int:
    """Open a lock file, or make it; return its descriptor."""
    with translated("opening", path):
        return open_regular(path, os.O_RDWR | os.O_CREAT)


def try_lock(fd: int, path: str) -> bool:
    """Lock a file without waiting; return whether this succeeded."""
    if sys.platform == "win32":  # pragma: no cover -- never run there
        raise UnsupportedError("FileStorage needs flock, which this platform does not have")
    with translated("locking", path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def unlock(fd: int) -> None:
    """Let go of the lock, for each descriptor that shares it."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def read_lock(fd: int, path: str) -> bytes:
    """Return what a lock file says."""
    with translated("reading", path):
        return os.pread(fd, 4096, 0)


def write_lock(fd: int, data: bytes) -> None:
    """Say in a lock file who holds it. If that fails, as on a full disk, the lock holds all the same."""
    try:
        os.ftruncate(fd, os.pwrite(fd, data, 0))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)


def reopen(path: str) -> int:
    """Open a file for writing that this session has made; return its descriptor."""
    with translated("opening", path):
        return open_regular(path, os.O_RDWR)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file, and nothing else that may have its name.

    The opening of a FIFO waits for its other end, and that of a device may do something. So
    the name is looked up first. `O_NONBLOCK` and the second look are for what is put there
    in between.

    Raises:
        OSError: What `os.open` raises.
        UnsupportedError: It is a link, a FIFO, a socket or a device.
    """
    try:
        check_regular(path, os.lstat(path).st_mode)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        check_regular(path, os.fstat(fd).st_mode)
    except BaseException:
        close(fd)
        raise
    return fd


def read(path: str, most: int = -1) -> bytes | None:
    """Return the bytes of a regular file; `None` only when nothing has that name.

    Args:
        path: The file.
        most: How many bytes to read, from the first; all of them if it is negative.

    Raises:
        StorageError: It cannot be read. A link that leads nowhere is no missing file.
    """
    with translated("reading", path):
        try:
            fd = open_regular(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            with open(fd, "rb", closefd=False) as file:
                return file.read(most)
        finally:
            close(fd)


def create(path: str, parts: Sequence[bytes], progress: Progress, *replaced: str) -> int:
    """Make a new file with these bytes, and sync; return its descriptor. A failure leaves nothing behind.

    Args:
        path: Its name.
        parts: What is in it.
        progress: Counts the bytes.
        replaced: What it will replace; see `_ownership.keep`.
    """
    with translated("writing", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            offset = 0
            for step in _steps(parts):
                if offset:
                    _sync_data(fd)
                offset = _write(fd, step, offset, progress)
            keep(fd, *replaced)
            _sync(fd)
        except BaseException:
            close(fd)
            discard(path)
            raise
    return fd


def create_empty(path: str) -> int:
    """Make a new file, which is not synced; return its descriptor."""
    with translated("creating", path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def close(fd: int) -> None:
    """Close a file whose bytes were synced, or given up: an error now has nothing to say."""
    with contextlib.suppress(OSError):
        os.close(fd)


class NewFile:
    """A new file that is written in slices, one hop to a thread each, so that other work goes on between two.

    Every method but `write` is synchronous. Call them all in one thread; then `discard`
    may follow at any time, whatever was cancelled before it.
    """

    def __init__(self, path: str, progress: Progress, *replaced: str) -> None:
        """Prepare a file. No file is touched. `_ownership.keep` needs the file that it will replace."""
        self.path = path
        self._progress = progress
        self._replaced = replaced
        self._fd = -1
        forks.disown_in_children(self)

    def open(self) -> None:
        """Begin."""
        with translated("opening", self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    async def write(self, slices: AsyncIterator[bytes], thread: Worker, check: Callable[[], object]) -> None:
        """Write the slices, in the thread.

        `check` is called before each hop there, and raises once `discard` is on its way:
        what came behind it would go to whatever file has the descriptor's number then.
        """
        with translated("writing", self.path):
            # The descriptor stays ours: a file object of aiofiles' own would leak when its opening is cancelled,
            # and its context manager closes it in the event loop's own threads, whatever the executor.
            check()
            file = await aiofiles.open(self._fd, "wb", buffering=0, closefd=False, executor=thread)
            unsynced = 0
            async for part in slices:
                rest = memoryview(part)
                while rest:
                    check()
                    written = await file.write(rest[:_SYNCED_AT_ONCE])
                    rest = rest[written:]
                    unsynced += written
                    self._progress.add(written)
                    if unsynced >= _SYNCED_AT_ONCE:
                        check()
                        await asyncio.wrap_future(thread.submit(_sync_data, self._fd))
                        unsynced = 0

    def finish(self) -> None:
        """Sync and close."""
        with translated("syncing", self.path):
            keep(self._fd, *self._replaced)
            _sync(self._fd)
        self._close()

    def discard(self) -> None:
        """Close, and delete as far as that is possible."""
        self._close()
        discard(self.path)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close the descriptor. Runs in a forked child. The file is the parent's."""
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close(fd)


def sync(path: str) -> None:
    """Sync a file that is not open."""
    with translated("syncing", path):
        fd = open_regular(path, os.O_RDONLY)
        try:
            _sync(fd)
        finally:
            os.close(fd)


def rename(temporary: str, path: str) -> None:
    """Put a synced file in place of another; durable only after `sync_directory`."""
    with translated("renaming", path):
        os.replace(temporary, path)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    with translated("syncing the directory", path):
        sync_names(path)


def hold(path: str) -> int:
    """Keep what is in a file from being freed before the descriptor is closed, whatever takes its place.

    For the file system, freeing a hundred megabytes takes tens of milliseconds. -1 if it cannot be kept.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1


def temporary(path: str) -> str:
    """A name for a file that is to take the place of `path`; no other attempt, and no other writer, has it."""
    return f"{path}.{os.urandom(4).hex()}.tmp"


def discard(path: str) -> None:
    """Delete a temporary file, as far as that is possible; the next start tries again."""
    with contextlib.suppress(OSError):
        os.unlink(path)


class TornWriteError(Exception):
    """A failed append could not be undone, or its sync failed: the file must never be written again."""

    def __init__(self, error: StorageError) -> None:
        super().__init__(error)
        self.error = error


def append(fd: int, path: str, parts: Sequence[bytes], offset: int, progress: Progress) -> None:
    """Write at the end of a file, and sync. Large data goes in steps, each synced.

    Raises:
        StorageError: The write failed and was undone.
        TornWriteError: With the `StorageError`: the end of the file is unknown.
    """
    end = offset
    for step in _steps(parts):
        if end > offset:
            _sync_or_tear(fd, path)
        try:
            end = _write(fd, step, end, progress)
        except OSError as error:
            try:
                os.ftruncate(fd, offset)
            except OSError:
                raise TornWriteError(storage_error("writing", path, error)) from error
            if end > offset:  # the steps before are on the disk: so must be their end
                _sync_or_tear(fd, path)
            raise storage_error("writing", path, error) from error
    _sync_or_tear(fd, path)


def _sync_or_tear(fd: int, path: str) -> None:
    try:
        _sync_data(fd)
    except OSError as error:
        raise TornWriteError(storage_error("syncing", path, error)) from error


def _steps(parts: Sequence[bytes]) -> Iterable[Sequence[bytes | memoryview]]:
    """Group the parts into steps. The parts of a step are written between two syncs."""
    return (parts,) if sum(map(len, parts)) <= _APPENDED_AT_ONCE else _cut(parts)


def _cut(parts: Sequence[bytes]) -> Iterator[Sequence[memoryview]]:
    step: list[memoryview] = []
    size = 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            piece = rest[: _APPENDED_AT_ONCE - size]
            rest = rest[len(piece) :]
            step.append(piece)
            size += len(piece)
            if size == _APPENDED_AT_ONCE:
                yield step
                step, size = [], 0
    if step:
        yield step


def _write(fd: int, parts: Sequence[bytes | memoryview], offset: int, progress: Progress) -> int:
    """Write the parts one after the other, and return the offset behind them."""
    for batch in (b"".join(parts),) if sum(map(len, parts)) <= _COPIED else _batched(parts):
        rest = memoryview(batch)
        while rest:
            written = os.pwrite(fd, rest, offset)
            offset += written
            progress.add(written)
            rest = rest[written:]
    return offset


def _batched(parts: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Small parts joined, to spare system calls; a large one as it is."""
    batch: list[bytes | memoryview] = []
    size = 0
    for part in parts:
        if size and size + len(part) > _COPIED:
            yield batch[0] if len(batch) == 1 else b"".join(batch)
            batch, size = [], 0
        batch.append(part)
        size += len(part)
    yield batch[0] if len(batch) == 1 else b"".join(batch)


def _sync(fd: int) -> None:
    if sys.platform == "darwin":  # pragma: no cover -- never run there
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _sync_data(fd: int) -> None:
    if sys.platform == "darwin":  # pragma: no cover -- never run there
        _sync(fd)
    else:
        os.fdatasync(fd)


def sync_names(path: str) -> None:
    """Sync as `sync_directory` does, but raise an `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in _NOT_FOR_DIRECTORIES:
            raise OSError(errno.EOPNOTSUPP, "a directory cannot be synced") from error
        raise
    finally:
        os.close(fd)


def spool(in_memory: int) -> IO[bytes]:
    """A temporary file without a name, which is memory alone up to so many bytes."""
    return tempfile.SpooledTemporaryFile(max_size=in_memory)


def add_to_spool(file: IO[bytes], parts: list[bytes]) -> None:
    """Write at the end of it.

    Raises:
        StorageError: There is no room, or no directory for temporary files.
    """
    with translated("writing a temporary file in", tempfile.tempdir or "TMPDIR"):
        file.writelines(parts)
