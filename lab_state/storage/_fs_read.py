"""Read files that another process may replace meanwhile.

No function here creates, changes or locks a file. So write permission is not needed, and the file
system may be mounted read-only.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from lab_state.exceptions import UnsupportedError
from lab_state.storage._os_errors import storage_error, translated


class OpenFile(NamedTuple):
    """A file that is open for reading. `status` is the result of `fstat` at the opening.

    While the file is open, no other file can get its inode number.
    """

    fd: int
    path: str
    status: os.stat_result

    @property
    def identity(self) -> tuple[int, int]:
        """The numbers of the device and of the inode."""
        return self.status.st_dev, self.status.st_ino

    def read(self, most: int | None = None, offset: int = 0) -> bytes:
        """Return the bytes from `offset` to the current end of the file, or the first `most` of them."""
        with translated("reading", self.path):
            left = os.fstat(self.fd).st_size - offset
            left = left if most is None else min(left, most)
            parts: list[bytes] = []
            # Except for huge files, one call is enough, and nothing has to be joined.
            while left > 0 and (part := os.pread(self.fd, left, offset)):
                parts.append(part)
                offset += len(part)
                left -= len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def open_to_read(path: str) -> OpenFile | None:
    """Open a file for reading. Return `None` only if there is no file of any type at the path. Follow a symbolic link.

    Raises:
        UnsupportedError: The path leads to no regular file, or is a broken symbolic link.
        StorageError: The file cannot be opened.
    """
    try:
        # Opening a device may have an effect. So the type is checked first, and again after opening.
        _check_regular(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UnsupportedError(
                f"{path} is a symbolic link to a missing file: put the file back, or delete the link"
            ) from None
        return None
    except OSError as error:
        raise storage_error("opening", path, error) from error
    try:
        with translated("looking up", path):
            status = os.fstat(fd)
        _check_regular(path, status)
    except BaseException:
        os.close(fd)
        raise
    return OpenFile(fd, path, status)


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnsupportedError(
            f"{path} is not a regular file, but a directory, a FIFO, a socket or a device: move it away"
        )


def has_moved(path: str, opened: OpenFile | None, *, grows: bool = False) -> bool:
    """Return whether the file at a path was replaced, changed, created or removed since it was opened.

    Args:
        path: The path.
        opened: The file that the path named before; `None` if there was no file.
        grows: Whether the file may grow. Then a new size or time is not a change.
    """
    now = status_of(path)
    if now is None or opened is None:
        return (now is None) != (opened is None)
    then = opened.status
    if (now.st_dev, now.st_ino) != opened.identity:
        return True
    return not grows and (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)


def is_there(path: str) -> bool:
    """Return whether there is a file of any type at the path."""
    return status_of(path) is not None


def status_of(path: str) -> os.stat_result | None:
    """Return the status of a file; `None` if it is missing. Follow a symbolic link.

    Raises:
        StorageError: The file cannot be looked up.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error("looking up", path, error) from error
