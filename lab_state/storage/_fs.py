"""Create, write, sync, rename, delete and lock the files of a state. For sockets, `_fs_socket` does this.

All functions are synchronous, except `NewFile.write`. Functions that block run in a thread of the storage.
Two rules hold:

* A new snapshot or journal is written under a temporary name in the same directory, synced and renamed.
  Then its directory is synced. No other step relies on the file before that.
* A failed sync of a file is not repeated. The kernel may have marked the pages as clean, and a second
  sync would then report success (Rebello et al., "Can Applications Recover from fsync
  Failures?", USENIX ATC 2020).

Only Linux is tested. macOS has no `fdatasync`, and its `fsync` may leave data in the cache of
the disk. So `F_FULLFSYNC` is used there. Windows has no `fcntl`. The module can be imported
there, but no state can be opened.
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
"""The number of bytes of a `NewFile`, such as a snapshot, that are written between two syncs.

A sync of the journal also waits for unsynced bytes of other files in the same file system. With
small steps, a commit does not wait long for the snapshot that is being written.
"""

_APPENDED_AT_ONCE = 4 * 1024 * 1024
"""The number of bytes of a large record or a new journal that are written between two syncs.

One sync of a hundred megabytes would look like a disk that hangs, because `progress` does not grow
during a sync.
"""

_COPIED = 64 * 1024
"""The largest number of bytes that are copied to save a system call. A larger copy would block every other thread."""


_NOT_FOR_DIRECTORIES = {errno.EINVAL, errno.ENOSYS}
"""The errors of file systems that cannot sync a directory: CIFS, FUSE, DrvFs."""


class WrittenBytes:
    """The number of bytes that were written to the disk.

    Attributes:
        count: The number of bytes. It never decreases. Any thread may read it.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self._lock = threading.Lock()  # a checkpoint and a commit may call `add` at the same time

    def add(self, size: int) -> None:
        """Add a number of bytes. Any thread may call this."""
        with self._lock:
            self.count += size


def open_lock(path: str) -> int:
    """Open a lock file, or create it. Return its descriptor."""
    with translated("opening", path):
        return open_regular(path, os.O_RDWR | os.O_CREAT)


def try_lock(fd: int, path: str) -> bool:
    """Try to lock a file without waiting. Return whether this succeeded."""
    if sys.platform == "win32":  # pragma: no cover -- never run there
        raise UnsupportedError("FileStorage needs flock, which this platform does not have")
    with translated("locking", path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def unlock(fd: int) -> None:
    """Release the lock, for every descriptor that shares it."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def read_lock(fd: int, path: str) -> bytes:
    """Return the content of a lock file."""
    with translated("reading", path):
        return os.pread(fd, 4096, 0)


def write_lock(fd: int, data: bytes) -> None:
    """Write the holder to a lock file. An error, such as a full disk, is ignored: the lock does not need the content."""
    try:
        os.ftruncate(fd, os.pwrite(fd, data, 0))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)


def reopen(path: str) -> int:
    """Open an existing file for reading and writing. Return its descriptor."""
    with translated("opening", path):
        return open_regular(path, os.O_RDWR)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file. Refuse files of all other types.

    Opening a FIFO waits for its other end, and opening a device may have an effect. So the
    type is checked first. Another file may take the place of the checked file before the opening.
    Therefore `O_NONBLOCK` is used, and the type is checked again.

    Raises:
        OSError: See `os.open`. A directory is an error, too.
        UnsupportedError: The path leads to a symbolic link, a FIFO, a socket or a device.
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


def read(path: str, most: int = -1, start: int = 0) -> bytes | None:
    """Return the bytes of a regular file. Return `None` only if there is no file of any type at the path.

    Args:
        path: The path of the file.
        most: The largest number of bytes to read. If it is negative, all bytes are read.
        start: The offset of the first of these bytes.

    Raises:
        StorageError: The file cannot be read. A broken symbolic link is an error too.
    """
    with translated("reading", path):
        try:
            fd = open_regular(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            with open(fd, "rb", closefd=False) as file:
                file.seek(start)
                return file.read(most)
        finally:
            close(fd)


def create(path: str, parts: Sequence[bytes], progress: WrittenBytes, *replaced: str) -> int:
    """Create a file with these bytes, and sync it. Return its descriptor. After a failure the file is deleted.

    Args:
        path: The name of the file.
        parts: The bytes of the file.
        progress: The counter for the bytes.
        replaced: The files that the new file will replace; see `_ownership.keep`.
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
    """Create an empty file without a sync. Return its descriptor."""
    with translated("creating", path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def close(fd: int) -> None:
    """Close a file, and ignore errors. The bytes of the file must be synced already, or not be needed."""
    with contextlib.suppress(OSError):
        os.close(fd)


class NewFile:
    """A new file that is written in pieces of up to 1 MiB, each in one call in a thread. Other work can run between two calls.

    Every method except `write` is synchronous. Call these methods in the worker that `write` gets.
    Then `discard` may be called at any time, even after a cancellation.
    """

    def __init__(self, path: str, progress: WrittenBytes, *replaced: str) -> None:
        """Prepare a file without creating it. `replaced` is passed to `_ownership.keep`."""
        self.path = path
        self._progress = progress
        self._replaced = replaced
        self._fd = -1
        forks.disown_in_children(self)

    def open(self) -> None:
        """Create the file."""
        with translated("opening", self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    async def write(self, slices: AsyncIterator[bytes], thread: Worker, check: Callable[[], object]) -> None:
        """Write the slices in the thread.

        `check` is called before each call in the thread. It must raise an error as soon as `discard` is
        queued, because the number of the descriptor may belong to another file after that.
        """
        with translated("writing", self.path):
            # A file that aiofiles opens itself would leak if the opening is cancelled. `closefd=False` is needed because
            # the context manager of aiofiles always closes a file in the default executor of the event loop.
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
        """Give the file the owner, group, mode and access list of the file that it replaces. Then sync and close the file."""
        with translated("syncing", self.path):
            keep(self._fd, *self._replaced)
            _sync(self._fd)
        self._close()

    def discard(self) -> None:
        """Close the file, and delete it if possible."""
        self._close()
        discard(self.path)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close the descriptor. This runs in a forked child. The file belongs to the parent."""
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
    """Rename a synced file, in place of another file. The rename is durable only after `sync_directory`."""
    with translated("renaming", path):
        os.replace(temporary, path)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    with translated("syncing the directory", path):
        sync_names(path)


def hold(path: str) -> int:
    """Open a file that a rename will replace. Return the descriptor; -1 if the file cannot be opened.

    While the file is open, the rename does not free its blocks. `close` frees them later. The file
    system needs tens of milliseconds to free a hundred megabytes.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1


def open_null(flags: int) -> int:
    """Open the null device."""
    return os.open(os.devnull, flags)


def temporary(path: str) -> str:
    """Return a temporary name for a file that will replace `path`. No other attempt and no other writer uses it."""
    return f"{path}.{os.urandom(4).hex()}.tmp"


def discard(path: str) -> None:
    """Delete a file if possible. If a temporary file of a state is left, the next start tries again."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def delete(path: str) -> None:
    """Delete a file, if it is there."""
    with translated("deleting", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class TornWriteError(Exception):
    """A failed append could not be undone, or a sync failed. The file must never be written again."""

    def __init__(self, error: StorageError) -> None:
        super().__init__(error)
        self.error = error


def append(fd: int, path: str, parts: Sequence[bytes], offset: int, progress: WrittenBytes) -> None:
    """Append to a file, and sync it. Large data are written in steps, and each step is synced.

    Raises:
        StorageError: The write failed and was undone.
        TornWriteError: The end of the file is unknown. Its `error` is the `StorageError`.
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
            if end > offset:  # earlier steps are on the disk, so the truncation must be synced, too
                _sync_or_tear(fd, path)
            raise storage_error("writing", path, error) from error
    _sync_or_tear(fd, path)


def _sync_or_tear(fd: int, path: str) -> None:
    try:
        _sync_data(fd)
    except OSError as error:
        raise TornWriteError(storage_error("syncing", path, error)) from error


def _steps(parts: Sequence[bytes]) -> Iterable[Sequence[bytes | memoryview]]:
    """Group the parts into steps of up to 4 MiB. The parts of a step are written between two syncs."""
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


def _write(fd: int, parts: Sequence[bytes | memoryview], offset: int, progress: WrittenBytes) -> int:
    """Write the parts one after the other. Return the offset after the last one."""
    for batch in (b"".join(parts),) if sum(map(len, parts)) <= _COPIED else _batched(parts):
        rest = memoryview(batch)
        while rest:
            written = os.pwrite(fd, rest, offset)
            offset += written
            progress.add(written)
            rest = rest[written:]
    return offset


def _batched(parts: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Join small parts, to save system calls. Yield a large part as it is."""
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
    """Make the names in a directory durable.

    Raises:
        OSError: The sync failed. The error is EOPNOTSUPP if the file system cannot sync directories.
    """
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
    """Return a temporary file without a name. As long as it has at most `in_memory` bytes, it is in memory."""
    return tempfile.SpooledTemporaryFile(max_size=in_memory)


def add_to_spool(file: IO[bytes], parts: list[bytes]) -> None:
    """Append to a spool.

    Raises:
        StorageError: The file cannot be written. For example, the disk is full, or there is no directory for temporary files.
    """
    with translated("writing a temporary file in", tempfile.tempdir or "TMPDIR"):
        file.writelines(parts)
