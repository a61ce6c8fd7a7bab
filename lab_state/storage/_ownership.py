"""Give a new file the owner, group, mode and access list of the file that it replaces.

If this process cannot set one of these, the new file has fewer permissions, never more. For
example, if the process is not a member of the file's group, the permissions of the group are
removed. The group of the process does not get them.
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
    """Give a new file the owner, group, mode and access list of the file that it replaces.

    Args:
        fd: The new file, which only this user may read so far.
        replaced: The path of the replaced file, and then paths of files to use in its place if
            there is no such file yet. The first one that is a regular file is used. If there is
            none, nothing is changed. Only the `rwx` bits of the mode are kept. For example, the
            setuid bit is not kept.

    Raises:
        OSError: The replaced file cannot be looked up. If this process cannot set one of the
            attributes, no error is raised.
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
    # Set the mode before the owner: after a change of the owner, this process may no longer change the mode.
    _done(os.fchmod, fd, mode)
    if old.st_uid != new.st_uid:
        _done(os.fchown, fd, old.st_uid, -1)


def _first(paths: Iterable[str]) -> tuple[str, os.stat_result] | None:
    """Return the first path that leads to a regular file, with its status. Skip links, because their mode is 0777."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode):
                return path, found
    return None


def narrowed(mode: int) -> int:
    """Return the mode for a file whose group could not be kept.

    Members of the old group now belong to "others", and some of the "others" are members of the
    new group. So both classes get only the permissions that both had before.
    """
    shared = mode >> 3 & mode & 0o7
    return mode & _OWNER | shared << 3 | shared


def _access_list(path: str) -> bytes | None:
    """Return the access list; `None` if there is none, or the file system has no access lists."""
    if sys.platform != "linux":  # pragma: no cover -- never run there
        return None
    try:
        return os.getxattr(path, _ACL, follow_symlinks=False)
    except OSError:
        return None


def _set_access_list(fd: int, acl: bytes | None) -> bool:
    """Set the access list. With `None`, remove the list that the directory gave to the file. Return whether this succeeded."""
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
    """Call a function of the operating system. Return whether it succeeded."""
    try:
        function(*arguments, **rest)
    except OSError:
        return False
    return True
