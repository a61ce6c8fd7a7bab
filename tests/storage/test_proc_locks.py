"""`/proc/locks`: who holds a lock."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from lab_state.exceptions import UnavailableError
from lab_state.storage import _fs as fs
from lab_state.storage._proc_locks import FIRST_PID_NAMESPACE, LOCKS, find_holders, holders, would_show

DEVICE = os.makedev(0xFE, 0)

TEXT = """\
1: FLOCK  ADVISORY  WRITE 6835 fe:00:2147003 0 EOF
1: -> FLOCK  ADVISORY  WRITE 6840 fe:00:2147003 0 EOF
2: POSIX  ADVISORY  WRITE 700 fe:00:2147003 0 EOF
3: OFDLCK ADVISORY  READ  -1 fe:00:2147003 0 EOF
4: LEASE  ACTIVE    READ  701 fe:00:2147003 0 EOF
5: FLOCK  ADVISORY  READ  702 fe:00:2147004 0 EOF
6: FLOCK  ADVISORY  READ  703 fe:00:2147004 0 EOF
7: FLOCK  ADVISORY  WRITE 0 fe:01:9 0 EOF
8: FLOCK  ADVISORY  WRITE 12 103:1f:77 0 EOF
"""

MOUNTS = """\
29 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 29 0:25 / /dev/shm rw,nosuid shared:3 master:1 - tmpfs tmpfs rw
31 29 0:40 / /work rw - btrfs /dev/vdb rw,subvol=/
32 29 0:50 / /merged rw - overlay overlay rw,lowerdir=/a
"""


@pytest.mark.parametrize(
    ("device", "inode", "pids"),
    [
        (DEVICE, 2147003, (6835,)),
        (DEVICE, 2147004, (702, 703)),
        (os.makedev(0xFE, 1), 9, (0,)),
        (os.makedev(0x103, 0x1F), 77, (12,)),
        (DEVICE, 9, ()),
        (DEVICE, 214700, ()),
    ],
)
def test_the_holders_of_a_lock_are_found(device: int, inode: int, pids: tuple[int, ...]) -> None:
    """Only flocks count, and no waiting process. Device and inode must both match. The pid 0 is another namespace."""
    assert holders(TEXT, device, inode) == pids


def test_an_unknown_line_is_no_holder() -> None:
    """A line in another format names no process."""
    assert holders("", DEVICE, 1) == holders("FLOCK\n\nx: FLOCK ADVISORY WRITE y fe:00:1 0 EOF\n", DEVICE, 1) == ()


def test_a_real_lock_shows(tmp_path: Path) -> None:
    """The kernel names this process as the holder of its own lock, and no process after the unlock."""
    with (tmp_path / "lock").open("w") as file:
        found = os.fstat(file.fileno())
        assert find_holders(found.st_dev, found.st_ino, fs.read) == ()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find_holders(found.st_dev, found.st_ino, fs.read) == (os.getpid(),)
        fcntl.flock(file, fcntl.LOCK_UN)
        assert find_holders(found.st_dev, found.st_ino, fs.read) == ()


def test_a_machine_without_the_file_tells_nothing() -> None:
    """Without `/proc/locks`, or if it cannot be read, the result is None, not that the lock is free."""

    def failing(path: str) -> bytes:
        raise UnavailableError(path)

    assert find_holders(DEVICE, 1, lambda _: None) is None
    assert find_holders(DEVICE, 1, failing) is None


def test_a_long_text_is_read_again() -> None:
    """A long text is read again, because the kernel returns it in pieces and a held lock may be missing once."""
    other = b"9: FLOCK  ADVISORY  WRITE 1 fe:00:5 0 EOF\n" * 200
    texts = [other, other + TEXT.encode(), other]

    def read(path: str) -> bytes:
        assert path == LOCKS
        return texts.pop(0)

    assert find_holders(DEVICE, 2147003, read) == (6835,)
    assert len(texts) == 1
    assert find_holders(DEVICE, 2147003, lambda _: other) == ()


@pytest.mark.parametrize(
    ("device", "namespace", "shown"),
    [
        ((254, 0), FIRST_PID_NAMESPACE, True),
        ((0, 25), FIRST_PID_NAMESPACE, True),
        ((254, 0), 4026532000, False),
        ((0, 40), FIRST_PID_NAMESPACE, False),
        ((0, 41), FIRST_PID_NAMESPACE, False),
        ((0, 50), FIRST_PID_NAMESPACE, False),
    ],
)
def test_where_a_holder_would_show(device: tuple[int, int], namespace: int, *, shown: bool) -> None:
    """A holder shows only in the first pid namespace, on a local file system whose device is the same for `stat`."""
    assert would_show(MOUNTS, os.makedev(*device), namespace) is shown
    assert not would_show("", os.makedev(*device), namespace)
    assert not would_show("29 1\n\n", os.makedev(*device), namespace)
