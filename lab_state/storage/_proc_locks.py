"""The holders of a lock, as Linux lists them in `/proc/locks`. Pure, but for the function that reads files.

A line of that file for each lock, and one with an arrow for each process that waits for it::

    1: FLOCK  ADVISORY  WRITE 6835 fe:00:2147003 0 EOF
    1: -> FLOCK  ADVISORY  WRITE 6840 fe:00:2147003 0 EOF

The process is the one that took the lock. It may be dead, where a child has inherited
the lock. A holder in another pid namespace has no line, or one with the pid 0. The
device is the file system's own, which `stat` gives as `st_dev` on most file systems.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from lab_state.exceptions import StorageError

LOCKS = "/proc/locks"
MOUNTS = "/proc/self/mountinfo"

FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""The inode of `/proc/self/ns/pid` where this process sees all others: `PROC_PID_INIT_INO` of the kernel."""

_LINE = re.compile(
    r"^\d+: FLOCK +\S+ +\S+ +(-?\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) ", re.MULTILINE
)  # "-> FLOCK" waits, and does not match

_SHOWN_AT_ONCE = 4000
"""Up to about so many bytes the kernel gives in one piece. In a longer text, a line may be missing."""

_AS_STAT_SAYS = {"ext2", "ext3", "ext4", "f2fs", "jfs", "tmpfs", "xfs"}
"""File systems of this machine alone, where device and inode in `/proc/locks` are those of `stat`."""

Read = Callable[[str], bytes | None]
"""Give the bytes of a file, `None` where there is no such file; raise a `StorageError` where it cannot be read."""


def holders(text: str, device: int, inode: int) -> tuple[int, ...]:
    """Return the pids of the processes that hold an flock on a file, as the text of `/proc/locks` has them.

    Args:
        text: The text of `/proc/locks`.
        device: `st_dev` of the file.
        inode: `st_ino` of the file.

    Returns:
        The pids; 0 stands for a process of another pid namespace. Empty where no line
        is about this file: then the lock is free, or its holder does not show here.
    """
    file = os.major(device), os.minor(device), inode
    return tuple(
        max(0, int(pid))
        for pid, major, minor, number in _LINE.findall(text)
        if (int(major, 16), int(minor, 16), int(number)) == file
    )


def find_holders(device: int, inode: int, read: Read) -> tuple[int, ...] | None:
    """Read `/proc/locks`, and return what `holders` finds; `None` where there is no such file, or it cannot be read.

    Args:
        device: `st_dev` of the file.
        inode: `st_ino` of the file.
        read: What reads a file.
    """
    found: tuple[int, ...] = ()
    for _ in range(3):  # the kernel gives a long text in pieces: a lock that is held may be between two of them
        try:
            data = read(LOCKS)
        except StorageError:
            return None
        if data is None:
            return None
        found = holders(data.decode("ascii", "replace"), device, inode)
        if found or len(data) <= _SHOWN_AT_ONCE:
            break
    return found


def would_show(mounts: str, device: int, pid_namespace: int) -> bool:
    """Return whether a holder, if there were one, would have a line in `/proc/locks` for certain.

    Args:
        mounts: The text of `/proc/self/mountinfo`.
        device: `st_dev` of the locked file.
        pid_namespace: The inode of `/proc/self/ns/pid`.

    Returns:
        False in another pid namespace than the machine's first, and on file systems
        that give `stat` another device or inode (btrfs, overlay), or that other
        machines lock too (NFS).
    """
    if pid_namespace != FIRST_PID_NAMESPACE:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, file_system = line.partition(" - ")
        fields = mount.split()
        if len(fields) > 2 and fields[2] == wanted:  # noqa: PLR2004 -- id, parent, device
            return file_system.split(" ", 1)[0] in _AS_STAT_SAYS
    return False
