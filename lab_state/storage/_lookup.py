"""Find out to which file a path or a descriptor leads, and whether another program has changed a file.

All functions are synchronous, and run in a thread of the storage, like the functions of `_fs`.
No function opens or changes a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import NamedTuple, TypeAlias

from lab_state.storage._os_errors import storage_error, translated

Identity: TypeAlias = tuple[int, int]
"""The numbers of device and inode. They identify a file while it is open: no other file can get the same numbers then."""

NO_FILE: Identity = (-1, -1)


def identity(fd: int, path: str) -> Identity:
    """Return the identity of an open file."""
    with translated("looking up", path):
        found = os.fstat(fd)
        return found.st_dev, found.st_ino


def is_open(fd: int, which: Identity) -> bool:
    """Return whether a descriptor still refers to this file. If not, its number may belong to another file.

    If the lookup fails with another error than EBADF, the answer is not known. Then return True.
    """
    try:
        found = os.fstat(fd)
    except OSError as error:
        return error.errno != errno.EBADF
    return (found.st_dev, found.st_ino) == which


def is_file(path: str, which: Identity) -> bool:
    """Return whether a path still names this open file. Do not follow a link.

    Raises:
        StorageError: The lookup fails, and not because the file is missing.
    """
    try:  # without `translated`, which would take as long as `lstat`
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error("looking up", path, error) from error
    return (found.st_dev, found.st_ino) == which


class Fingerprint(NamedTuple):
    """The identity, the size and the modification time of a file.

    A replaced file has another fingerprint. A changed file has another one, too, unless its
    size is the same and the change is within one tick of the file system's clock. Some file
    systems set the time once more after a write. So a file with another time may have the same bytes.
    """

    device: int
    inode: int
    size: int
    modified: int

    @property
    def identity(self) -> Identity:
        """The identity of the file."""
        return self.device, self.inode

    def is_same_file(self, other: Fingerprint | None) -> bool:
        """Return whether both belong to the same file, changed or not. The answer is reliable only for an open file."""
        return other is not None and self[:2] == other[:2]

    def is_same_size(self, other: Fingerprint | None) -> bool:
        """Return whether both belong to the same file and have the same size."""
        return other is not None and self[:3] == other[:3]


UNKNOWN = Fingerprint(*NO_FILE, -1, -1)
"""A fingerprint that no file has."""


def both_refer_to(path: str, fd: int, which: Identity) -> bool:
    """Return whether a path and a descriptor both refer to this file. Do not follow a link. Return False on an error."""
    try:  # without `translated`, which would take as long as `lstat`: each commit calls this
        named, opened = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == which == (opened.st_dev, opened.st_ino)


def is_as_left(path: str, fd: int, left: Fingerprint) -> bool:
    """Return whether a path and a descriptor refer to the file with this fingerprint. Return False on an error.

    Each commit that appends calls this. If the answer is False, `fingerprint` shows what has changed.
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
    """Return whether a file does not exist. Return False if the lookup fails."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def user_of(path: str) -> int | None:
    """Return the user who owns a file; `None` if the lookup fails. Do not follow a link."""
    try:
        return os.lstat(path).st_uid
    except OSError:
        return None


def fingerprint(path: str) -> Fingerprint | None:
    """Return the fingerprint of the file or link at a path; `None` if there is neither.

    Raises:
        StorageError: The lookup fails for another reason.
    """
    try:  # without `translated`, as in `is_file`
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error("looking up", path, error) from error
    return Fingerprint(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def fingerprint_of(fd: int, path: str) -> Fingerprint:
    """Return the fingerprint of an open file. The path is for the message of an error."""
    try:  # without `translated`, as in `is_file`
        found = os.fstat(fd)
    except OSError as error:
        raise storage_error("looking up", path, error) from error
    return Fingerprint(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def descriptors(path: str) -> list[int]:
    """Return the descriptors of this process for a file; an empty list if `/proc` does not show them."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        file = os.stat(path)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the descriptor of `listdir` itself is closed by now
                if os.path.samestat(os.fstat(int(name)), file):
                    found.append(int(name))
    return found


def names_in(directory: str) -> list[str]:
    """Return the names in a directory.

    Raises:
        StorageError: The directory cannot be listed.
    """
    with translated("listing", directory):
        return os.listdir(directory)
