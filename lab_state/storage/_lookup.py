"""Looking files up: which one a path or a descriptor leads to, and whether it is as it was left.

Synchronous, in a thread of the storage's, as `_fs`. Nothing here opens or changes a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import NamedTuple, TypeAlias

from lab_state.storage._os_errors import storage_error, translated

Identity: TypeAlias = tuple[int, int]
"""Device and inode: what tells a file from all others, as long as it is open, since no other can get the number."""

NO_FILE: Identity = (-1, -1)


def identity(fd: int, path: str) -> Identity:
    """Which file this is."""
    with translated("looking up", path):
        found = os.fstat(fd)
        return found.st_dev, found.st_ino


def is_open(fd: int, which: Identity) -> bool:
    """Return whether a descriptor is still that of a file; else its number may be another file's.

    An error other than that there is no such descriptor does not say whose it is.
    """
    try:
        found = os.fstat(fd)
    except OSError as error:
        return error.errno != errno.EBADF
    return (found.st_dev, found.st_ino) == which


def is_file(path: str, which: Identity) -> bool:
    """Return whether the path itself, and no link, still names a file that is open."""
    try:  # not `translated`: each commit asks twice, and it would cost as much as the call
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error("looking up", path, error) from error
    return (found.st_dev, found.st_ino) == which


class Fingerprint(NamedTuple):
    """The marks that tell a file from another one of its name, and mostly from its state before a change in place.

    The size is exact. The time may be as coarse as the file system keeps it, and some file
    systems set it once more later.
    """

    device: int
    inode: int
    size: int
    modified: int

    @property
    def identity(self) -> Identity:
        """Return which file it is."""
        return self.device, self.inode

    def is_same_file(self, other: Fingerprint | None) -> bool:
        """Return whether both are of one file, changed or not. While it is open, no other gets its number."""
        return other is not None and self[:2] == other[:2]

    def is_same_size(self, other: Fingerprint | None) -> bool:
        """Return whether both are of one file, of one size."""
        return other is not None and self[:3] == other[:3]


UNKNOWN = Fingerprint(*NO_FILE, -1, -1)
"""The fingerprint of no file."""


def is_same_file(path: str, fd: int, which: Identity) -> bool:
    """Return whether a path, and no link, and a descriptor are still those of a file. `False` for any error."""
    try:  # not `translated`: each commit asks, and it would cost as much as the call
        named, opened = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == which == (opened.st_dev, opened.st_ino)


def is_as_left(path: str, fd: int, left: Fingerprint) -> bool:
    """Return whether a path and a descriptor are still those of a file, and its fingerprint is still this one.

    Each commit asks. Where the answer is no, or there was an error, `fingerprint` tells more.
    """
    try:
        named, opened = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (
        named.st_ino == left.inode == opened.st_ino
        and named.st_size == left.size
        and named.st_mtime_ns == left.modified
        and named.st_dev == left.device == opened.st_dev
    )


def is_gone(path: str) -> bool:
    """Return whether there is no such file, for certain."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def fingerprint(path: str) -> Fingerprint | None:
    """Return the fingerprint of a file, or of a link in its place; `None` when there is none."""
    try:  # not `translated`: as above
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error("looking up", path, error) from error
    return Fingerprint(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def fingerprint_of(fd: int, path: str) -> Fingerprint:
    """Return the fingerprint of an open file; the path is for the message."""
    try:  # not `translated`: as above
        found = os.fstat(fd)
    except OSError as error:
        raise storage_error("looking up", path, error) from error
    return Fingerprint(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def descriptors(path: str) -> list[int]:
    """Return the descriptors of this process on a file; none where `/proc` does not show them."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        file = os.stat(path)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that of the listing itself is closed by now
                if os.path.samestat(os.fstat(int(name)), file):
                    found.append(int(name))
    return found


def names_in(directory: str) -> list[str]:
    """Return the names of the files in a directory."""
    with translated("listing", directory):
        return os.listdir(directory)
