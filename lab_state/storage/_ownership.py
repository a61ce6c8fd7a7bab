"""Owner, group, mode and access list of a file that is replaced: the new one gets them, as far as this process may.

Whatever cannot be kept makes the new file narrower, never wider: a process that is not in the
file's group leaves the group out, and not its own group in.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

P = ParamSpec("P")

_ACL = "system.posix_acl_access"
_OWNER = 0o700


def keep(fd: int, *replaced: str) -> None:
    """Give a new file what the file has that it replaces.

    Args:
        fd: The new file, which only this user may read so far.
        replaced: The path of the file, then that of one to go by if there is none yet.
            Without any, nothing is changed. What is no part of `rwx`, as the setuid bit, is left out.

    Raises:
        OSError: The replaced file cannot be looked at. What this process may not set is no error.
    """
    found = _first(replaced)
    if found is None:
        return
    path, old = found
    new, mode, acl = os.fstat(fd), old.st_mode & 0o777, _access_list(path)
    if acl is None and (old.st_uid, old.st_gid, mode) == (new.st_uid, new.st_gid, stat.S_IMODE(new.st_mode)):
        return
    has_group = old.st_gid == new.st_gid or _done(os.fchown, fd, -1, old.st_gid)
    if not has_group:
        mode = narrowed(mode)
    if not (has_group or acl is None) or not _set_access_list(fd, acl):
        mode &= _OWNER
    # The mode before the owner: after giving a file away, this process may not change its mode.
    _done(os.fchmod, fd, mode)
    if old.st_uid != new.st_uid:
        _done(os.fchown, fd, old.st_uid, -1)


def _first(paths: Iterable[str]) -> tuple[str, os.stat_result] | None:
    """Return the first regular file that there is; the mode of a link is 0777."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode):
                return path, found
    return None


def narrowed(mode: int) -> int:
    """Return the mode for a file whose group could not be kept.

    Members of the old group are others now, and others are members of the new one. So both
    get what both had.
    """
    shared = mode >> 3 & mode & 0o7
    return mode & _OWNER | shared << 3 | shared


def _access_list(path: str) -> bytes | None:
    """Return the access list; `None` if there is none, or no such thing."""
    if sys.platform != "linux":  # pragma: no cover -- never run there
        return None
    try:
        return os.getxattr(path, _ACL, follow_symlinks=False)
    except OSError:
        return None


def _set_access_list(fd: int, acl: bytes | None) -> bool:
    """Set it; without one, remove the one that the directory gave to the file. Return whether it is so."""
    if sys.platform != "linux":  # pragma: no cover -- never run there
        return True
    if acl is not None:
        return _done(os.setxattr, fd, _ACL, acl)
    try:
        os.getxattr(fd, _ACL)
    except OSError:
        return True
    return _done(os.removexattr, fd, _ACL)


def _done(function: Callable[P, object], *arguments: P.args, **rest: P.kwargs) -> bool:
    """Call a function of the system's; return whether this process may do that."""
    try:
        function(*arguments, **rest)
    except OSError:
        return False
    return True
