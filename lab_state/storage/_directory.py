"""The directory of the files of a state: found, made, synced, and tried out at the start.

Synchronous, in a thread of the storage's, as `_fs`.
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

from lab_state._log import Log
from lab_state.exceptions import UnavailableError, UnsupportedError
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._os_errors import translated

if sys.platform != "win32":  # pragma: no branch -- never run there
    import fcntl

_logger = Log(logging.getLogger("lab_state"))

_GET_FLAGS = 0x80086601
"""Linux: `FS_IOC_GETFLAGS`."""
_UNCHANGEABLE = 0x10 | 0x20
"""Linux: `FS_IMMUTABLE_FL` and `FS_APPEND_FL`, which `chattr` sets."""


def opened(path: str, *, create: bool) -> str:
    """Find the directory, or make it; return its real path, so that a link that is changed later changes nothing.

    Args:
        path: Where it is; a relative path begins in the current directory.
        create: Whether it is made if it is missing.

    Raises:
        StorageError: It cannot be made, or is none.
        UnsupportedError: It is missing, and is not to be made; or the path is relative, and
            the current directory is gone.
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
    """Return the error for a state that must be there, and is not."""
    return UnsupportedError(
        f"there is no state at {path}, and create=False: see that the volume is mounted and the path is right; "
        "to begin an empty state, start once with create=True and make a change"
    )


def absolute(path: str) -> str:
    """Return the path from the root on, without slashes at its end."""
    if not os.path.isabs(path):
        try:
            path = os.path.join(os.getcwd(), path)
        except FileNotFoundError:
            raise UnsupportedError(
                f"the relative path {path!r} leads nowhere, since the current directory of this process was deleted: "
                "give an absolute path, or start the process in a directory that stays"
            ) from None
    return path.rstrip(os.sep) or os.sep


def _make(path: str) -> None:
    """Make a directory that only this user can enter, with those above it, durably."""
    with translated("making the directory", path):
        new = [path, *itertools.takewhile(lambda parent: not os.path.exists(parent), _parents(path))]
        for directory in reversed(new):
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:
                if os.path.islink(directory) and not os.path.exists(directory):
                    raise UnsupportedError(
                        f"{directory} is a symbolic link that leads nowhere: mount what it leads to, or remove it"
                    ) from None
                if not os.path.isdir(directory):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            else:
                try:
                    fs.sync_names(os.path.dirname(directory))
                except BaseException:
                    # Not to be found by the next attempt, whose sync would return without having made it durable.
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
                    raise


def sync_parents(path: str) -> None:
    """Make the name of a directory durable, and those of the directories above it.

    The directory may be there only because another process made it, and was killed before
    its sync, or because it was copied. Nothing above a mount point is synced, nor what is
    in a directory that cannot be read: no name of ours was made there.
    """
    with translated("syncing the directories above", path):
        device = os.stat(path).st_dev
        for directory in itertools.takewhile(
            lambda parent: os.stat(parent).st_dev == device and os.access(parent, os.R_OK), _parents(path)
        ):
            fs.sync_names(directory)


def _parents(path: str) -> Iterator[str]:
    """Return the directories above, the nearest first."""
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def try_out(
    path: str, file: str, tried: set[lookup.Identity], noted: Callable[..., AbstractContextManager[None]]
) -> bool:
    """Do in the directory what a commit will have to do: create, rename and delete a file, and sync.

    Return whether the names in it can be relied on: after a failed sync, no later one makes
    them durable.

    Args:
        path: The directory.
        file: What the temporary files are named after.
        tried: Directories that were tried out. This one is added; if it is there, nothing is done.
        noted: Gives the context in which there may be temporary files of these names.

    Raises:
        StorageError: It cannot be done. A full disk, and an error of the sync, are logged alone.
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
        _logger.warning("%s was opened, but nothing can be written there now: %s", path, error)
        return True
    try:
        fs.sync_directory(path)
    except UnavailableError as error:
        _logger.warning("what was found may not be durable, so the next commit writes everything anew: %s", error)
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
    """Refuse a file that a rename cannot replace, before anything is promised that needs it.

    Nothing is wrong if there is no file.

    Raises:
        UnsupportedError: Something is mounted there, or `chattr` or the sticky bit forbids it.
        StorageError: It cannot be looked at.
    """
    with translated("looking at", path):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
        above = os.stat(directory)
        if found.st_dev != above.st_dev or _mount_of(path) != _mount_of(directory):
            raise UnsupportedError(
                f"{path} is a mount point, which no new file can replace: mount its directory instead"
            )
        if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, found.st_uid, above.st_uid):
            raise UnsupportedError(
                f"{path} is another user's, in a directory with the sticky bit, so that it cannot be replaced: "
                "give the file to this user, or choose another directory"
            )
        if _flags_of(path) & _UNCHANGEABLE:
            raise UnsupportedError(f"{path} is immutable or append-only: `chattr -i -a` it")


def _mount_of(path: str) -> bytes:
    """Return what tells the mount that a path is on from all others; empty where the kernel does not say."""
    if not hasattr(os, "O_PATH"):  # pragma: no cover -- Linux has it
        return b""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        told = fs.read(f"/proc/self/fdinfo/{fd}") or b""
    finally:
        fs.close(fd)
    return b"".join(line for line in told.splitlines() if line.startswith(b"mnt_id:"))


def _flags_of(path: str) -> int:
    """Return what `lsattr` shows; 0 where it cannot be had."""
    if sys.platform != "linux":  # pragma: no cover -- never run there
        return 0
    fd = fs.open_regular(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(8))[:4], sys.byteorder)
    except OSError:  # most file systems have none
        return 0
    finally:
        fs.close(fd)
