"""The meaning of errors of the operating system for a storage, and their remedies. This module does no I/O."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Generator

from lab_state.exceptions import StorageError, UnavailableError, UnsupportedError

_TO_BE_FIXED = {
    errno.EACCES: "give this user the permission",
    errno.EPERM: "give this user the permission",
    errno.EROFS: "the file system is read-only; mount it writable",
    errno.ENOTDIR: "a part of the path is a file; choose another directory",
    errno.EISDIR: "a directory is in its place; move it away",
    errno.ELOOP: "the path has a loop of symbolic links",
    errno.ENAMETOOLONG: "the path is too long for the file system",
    errno.EBUSY: "it is a mount point; mount its directory instead",
    errno.EOPNOTSUPP: "the file system cannot do this; choose another one",
    errno.ENOLCK: "the file system cannot lock; choose another one",
}
"""The remedies for errors that stay until the operator has changed something."""

_TO_BE_MENDED = {
    errno.EIO: "the disk may be failing; see the log of the kernel",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EMFILE: "close some, or raise the limit on open files",
    errno.ENFILE: "close some, or raise the limit on open files",
}
"""The remedies for errors that may be gone at the next attempt, because other programs can end their cause."""


@contextlib.contextmanager
def translated(what: str, path: str) -> Generator[None, None, None]:
    """Raise a `StorageError` with a remedy in place of an `OSError` of the block."""
    try:
        yield
    except OSError as error:
        raise storage_error(what, path, error) from error


def storage_error(what: str, path: str, error: OSError) -> StorageError:
    """Return the storage error for an `OSError`. Its message has the failed operation, the path and, if one is known, the remedy."""
    message = f"{what} {path} failed: {error.strerror or error}"
    if error.errno in _TO_BE_FIXED:
        return UnsupportedError(f"{message}; {_TO_BE_FIXED[error.errno]}")
    if error.errno in _TO_BE_MENDED:
        return UnavailableError(f"{message}; {_TO_BE_MENDED[error.errno]}")
    return UnavailableError(message)


def may_pass(error: OSError) -> bool:
    """Return whether the error is known as one that may be gone at the next attempt. For an unknown error, return False."""
    return error.errno in _TO_BE_MENDED


def is_out_of_descriptors(error: StorageError) -> bool:
    """Return whether the cause is that the process or the machine has too many open files.

    Such an error says nothing about the file itself.
    """
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)


_NOT_REGULAR = {
    stat.S_IFLNK: (
        "a symbolic link: put the file itself there, or remove the link and "
        "give FileStorage the directory that the file is in"
    ),
    stat.S_IFIFO: "a FIFO, not a file: move it away",
    stat.S_IFSOCK: "a socket, not a file: move it away",
    stat.S_IFCHR: "a device, not a file: move it away",
    stat.S_IFBLK: "a device, not a file: move it away",
}


def check_regular(path: str, mode: int) -> None:
    """Check that a file is a regular file.

    Args:
        path: The path, for the message.
        mode: The `st_mode` that `lstat` returned.

    Raises:
        UnsupportedError: The file is a symbolic link, a FIFO, a socket or a device.
        IsADirectoryError: The file is a directory. Call this inside `translated`, which replaces
            the error.
    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if (what := _NOT_REGULAR.get(stat.S_IFMT(mode))) is not None:
        raise UnsupportedError(f"{path} is {what}")
