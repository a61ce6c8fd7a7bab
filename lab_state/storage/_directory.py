"""Find, create, sync and try out the directory of the files of a state.

All functions are synchronous, and run in a thread of the storage, like the functions of `_fs`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, cast

from lab_state._log import Log
from lab_state.exceptions import UnavailableError, UnsupportedError
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._os_errors import translated
from lab_state.storage._protocol import no_state

if sys.platform != "win32":  # pragma: no branch -- never run there
    import fcntl

_logger = Log(logging.getLogger("lab_state"))

_GET_FLAGS = 0x80086601
"""The number of the request `FS_IOC_GETFLAGS` in Linux."""
_UNCHANGEABLE = 0x10 | 0x20
"""The flags `FS_IMMUTABLE_FL` and `FS_APPEND_FL` of Linux, which `chattr` sets."""


class Paths(NamedTuple):
    """The directory of a state, and the paths of its three files."""

    directory: str
    snapshot: str
    journal: str
    lock: str

    @classmethod
    def of(cls, directory: str, name: str) -> Paths:
        """Return the paths for the state of this name."""
        path = os.path.join(directory, name)
        return cls(directory, f"{path}.json", f"{path}.journal", f"{path}.lock")

    @property
    def history(self) -> str:
        """The directory of the history."""
        return f"{self.snapshot.removesuffix('.json')}.history"


def check_path(path: object, what: Literal["directory", "backup"]) -> str:
    """Return a path as a `str`. `what` names the purpose of the path, for the messages.

    Raises:
        TypeError: The path is neither a `str` nor a path object, or is a path of bytes.
        ValueError: The path is empty, starts with `~`, or contains a NUL character or a character that this system's
            encoding of file names does not have.
    """
    found: object = os.fspath(cast("str", path))
    if not isinstance(found, str):
        raise TypeError(f"the path of a {what} must be a str, not {type(found).__name__}")
    if "\0" in found:
        raise ValueError(f"the path of a {what} cannot hold a NUL character")
    if not found:
        hint = "; for the current directory write '.'" if what == "directory" else ""
        raise ValueError(f"the path of a {what} is empty{hint}")
    if found.startswith("~"):
        raise ValueError(f"{found!r} starts with '~', which is not expanded: use os.path.expanduser(), or write './~'")
    try:
        os.fsencode(found)
    except UnicodeEncodeError as error:
        raise ValueError(f"{found!r} cannot be written in {error.encoding}, the encoding of file names here") from None
    return found


def opened(path: str, *, create: bool) -> str:
    """Find the directory, or create it. Return its real path.

    The real path has no symbolic links. So a link that is changed later has no effect.

    Args:
        path: The path. A relative path starts in the current directory.
        create: Whether to create a missing directory.

    Raises:
        StorageError: The directory cannot be created or looked up, or the path is not a directory.
        UnsupportedError: The directory is missing, and `create` is False. Or the path is
            relative, and the current directory was deleted.
    """
    whole = absolute(path)
    if create:
        _make(whole)
    with translated("opening the directory", whole):
        try:
            found = os.path.realpath(whole, strict=True)
        except FileNotFoundError:
            raise missing(whole) from None
        if not os.path.isdir(found):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return found


def missing(path: str) -> UnsupportedError:
    """Return the error for a missing state or directory, for a storage with `create=False`."""
    return no_state(
        path,
        ", and create=False: check that the volume is mounted and the path is right; to create an empty state, start once with "
        "create=True and make a change",
    )


def absolute(path: str) -> str:
    """Return the absolute path, without slashes at its end.

    Raises:
        UnsupportedError: The path is relative, and the current directory was deleted.
    """
    if not os.path.isabs(path):
        try:
            path = os.path.join(os.getcwd(), path)
        except FileNotFoundError:
            raise UnsupportedError(
                f"the relative path {path!r} cannot be resolved, because the current directory of this process was deleted: "
                "give an absolute path, or start the process in another directory"
            ) from None
    return path.rstrip(os.sep) or os.sep


def _make(path: str) -> None:
    """Create a directory and the missing directories above it, and sync their names. Only this user can enter them."""
    with translated("making the directory", path):
        new = [path, *itertools.takewhile(lambda parent: not os.path.exists(parent), _parents(path))]
        for directory in reversed(new):
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:
                if os.path.islink(directory) and not os.path.exists(directory):
                    raise UnsupportedError(
                        f"{directory} is a broken symbolic link: mount its target, or remove the link"
                    ) from None
                if not os.path.isdir(directory):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            else:
                try:
                    fs.sync_names(os.path.dirname(directory))
                except BaseException:
                    # Remove the directory. Otherwise the next attempt finds it, and no second sync makes it durable.
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
                    raise


def make_new(start: str, number: int) -> str:
    """Create a directory that only this user can enter, and return its path.

    The path is `start`, followed by `number`, or by the next number for which no file exists.
    """
    while os.path.lexists(path := f"{start}{number}"):
        number += 1
    with translated("making the directory", path):
        os.mkdir(path, 0o700)
    return path


def sync_parents(path: str) -> None:
    """Make the names of a directory and of the directories above it durable.

    These names may not be durable if the directory is a copy, or if the process that created it was killed
    before its sync. The call ends at the first directory that is on another file system, or cannot be
    read. lab_state has not created any name there, or above it.
    """
    with translated("syncing the directories above", path):
        device = os.stat(path).st_dev
        for directory in itertools.takewhile(
            lambda parent: os.stat(parent).st_dev == device and os.access(parent, os.R_OK), _parents(path)
        ):
            fs.sync_names(directory)


def _parents(path: str) -> Iterator[str]:
    """Yield the directories above a path, the nearest first."""
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def try_out(
    path: str, file: str, tried: set[lookup.Identity], noted: Callable[..., AbstractContextManager[None]]
) -> bool:
    """Try the operations of a commit in the directory: create, rename and delete a file, and sync.

    Args:
        path: The directory.
        file: The path with which the names of the temporary files start.
        tried: The directories that were tried out with success. If this directory is one of them,
            nothing is done. Otherwise it is added after a success.
        noted: A function that takes the names of temporary files, and returns a context
            manager. The files exist only inside the block of that manager; see `Lock.noted`.

    Returns:
        False if the sync of the directory failed. Then the names in it may not be durable, and no
        later sync makes them durable. Otherwise True.

    Raises:
        StorageError: One of these operations failed. A full disk, and a sync with an error that
            may be gone later, are only logged.
    """
    with translated("looking up", path):
        found = os.stat(path)
    identity = found.st_dev, found.st_ino
    if identity in tried:
        return True
    try:
        names = fs.temporary(file), fs.temporary(file)
        with noted(*names):
            _create_and_rename(*names)
    except UnavailableError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _logger.warning("%s was opened, but cannot be written to now: %s", path, error)
        return True
    try:
        fs.sync_directory(path)
    except UnavailableError as error:
        _logger.warning(
            "the files that were found may not be durable, so the next commit writes everything anew: %s", error
        )
        return False
    tried.add(identity)
    return True


def _create_and_rename(first: str, second: str) -> None:
    fs.close(fs.create_empty(first))
    try:
        fs.rename(first, second)
    except BaseException:
        fs.discard(first)
        raise
    fs.discard(second)


def check_replaceable(path: str, directory: str) -> None:
    """Check that a rename can replace a file. A missing file is accepted.

    Raises:
        UnsupportedError: The file is a mount point, or is not a regular file. Or `chattr` or the sticky bit forbids
            the rename. Or a permission is missing.
        StorageError: The file cannot be looked up.
    """
    with translated("looking at", path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
        above = os.stat(directory)
        if not is_same_mount(path, directory):
            raise UnsupportedError(
                f"{path} is a mount point, which no new file can replace: mount its directory instead"
            )
        if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, found.st_uid, above.st_uid):
            raise UnsupportedError(
                f"{path} belongs to another user, and its directory has the sticky bit, so it cannot be replaced: "
                "give the file to this user, or choose another directory"
            )
        if _flags_of(path) & _UNCHANGEABLE:
            raise UnsupportedError(f"{path} is immutable or append-only: run `chattr -i -a` on it")


def is_same_mount(path: str, other: str) -> bool:
    """Return whether two paths are in the same mount of the same file system. Links are not followed.

    Raises:
        OSError: A path cannot be looked up.
    """
    return os.lstat(path).st_dev == os.lstat(other).st_dev and _mount_of(path) == _mount_of(other)


def _mount_of(path: str) -> bytes:
    """Return the id of the mount that contains a path; empty if the kernel does not show it."""
    if not hasattr(os, "O_PATH"):  # pragma: no cover -- Linux has it
        return b""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        told = fs.read(f"/proc/self/fdinfo/{fd}") or b""
    finally:
        fs.close(fd)
    return b"".join(line for line in told.splitlines() if line.startswith(b"mnt_id:"))


def _flags_of(path: str) -> int:
    """Return the flags that `lsattr` shows; 0 if they cannot be read."""
    if sys.platform != "linux":  # pragma: no cover -- never run there
        return 0
    fd = fs.open_regular(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(8))[:4], sys.byteorder)
    except OSError:  # most file systems have no flags
        return 0
    finally:
        fs.close(fd)
