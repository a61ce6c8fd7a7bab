"""The holders of a lock, from `/proc/locks` of Linux. Only `find_holders` reads files.

The file has a line for each lock, and a line with an arrow for each process that waits for that lock::

    1: FLOCK  ADVISORY  WRITE 6835 fe:00:2147003 0 EOF
    1: -> FLOCK  ADVISORY  WRITE 6840 fe:00:2147003 0 EOF

The line of a lock has the pid of the process that took it. That process may have ended, if a child
inherited the lock. A holder in another pid namespace has no line, or a line with the pid 0.
The device is that of the file system. On most file systems this number is equal to `st_dev` of `stat`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from lab_state.exceptions import StorageError

LOCKS = "/proc/locks"
MOUNTS = "/proc/self/mountinfo"

FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""The inode of `/proc/self/ns/pid` in the first pid namespace, which has all processes: `PROC_PID_INIT_INO` of the kernel."""

_LINE = re.compile(
    r"^\d+: FLOCK +\S+ +\S+ +(-?\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) ", re.MULTILINE
)  # a line with "-> FLOCK" is a process that waits, and does not match

_SHOWN_AT_ONCE = 4000
"""A little less than the number of bytes that the kernel returns in one piece. In a longer text, a line may be missing."""

_AS_STAT_SAYS = {"ext2", "ext3", "ext4", "f2fs", "jfs", "tmpfs", "xfs"}
"""Local file systems for which `/proc/locks` shows the same device and inode as `stat`."""

Read = Callable[[str], bytes | None]
"""A function that returns the bytes of a file; `None` if there is no file. It raises `StorageError` on a failure."""


def holders(text: str, device: int, inode: int) -> tuple[int, ...]:
    """Return the pids of the processes that hold an flock on a file, from the text of `/proc/locks`.

    Args:
        text: The text of `/proc/locks`.
        device: `st_dev` of the file.
        inode: `st_ino` of the file.

    Returns:
        The pids. The pid 0 means a process of another pid namespace. The result is empty if
        the lock is free, or if `/proc/locks` does not show its holder.
    """
    file = os.major(device), os.minor(device), inode
    return tuple(
        max(0, int(pid))
        for pid, major, minor, number in _LINE.findall(text)
        if (int(major, 16), int(minor, 16), int(number)) == file
    )


def find_holders(device: int, inode: int, read: Read) -> tuple[int, ...] | None:
    """Read `/proc/locks`, and return the result of `holders`; `None` if that file is missing or cannot be read.

    Args:
        device: `st_dev` of the file.
        inode: `st_ino` of the file.
        read: The function that reads a file.
    """
    found: tuple[int, ...] = ()
    for _ in range(3):  # the kernel returns a long text in pieces, and a line between two pieces may be missing
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
    """Return whether `/proc/locks` would certainly show a holder of the lock, if there were one.

    Args:
        mounts: The text of `/proc/self/mountinfo`.
        device: `st_dev` of the locked file.
        pid_namespace: The inode of `/proc/self/ns/pid`.

    Returns:
        True if a lock without a line is certainly free. The result is False outside the first
        pid namespace of the machine. It is also False on file systems for which `stat` shows
        another device or inode (btrfs, overlay), and on file systems that other machines can lock (NFS).
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
