"""What the in-process recorder sees is what the kernel sees, and a crash of that loses nothing either.

The tests that trace run only with LAB_STATE_CRASH_STRACE=1, since they need strace and the
right to use it. Without these they fail then, and say what is missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disk import Create, Rename, Sync, Write
from explore import Explorer, record
from recovery import Recovery
from tracing import entries, missing, trace
from workloads import WORKLOADS
from world import Beside

asked_for = pytest.mark.skipif(
    os.environ.get("LAB_STATE_CRASH_STRACE") != "1", reason="strace is asked for by LAB_STATE_CRASH_STRACE=1"
)


LINES = (
    '1 openat(AT_FDCWD, "/root/new", O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0600) = 8',
    '1 pwrite64(8, "ab", 2, 0) = 2',
    "1 fsync(8) = 0",
    '1 rename("/root/new", "/root/file") = 0',
)
RECORDED = [Create("new", 1, False), Write(1, 0, b"ab"), Sync(1, True), Rename("new", "file", 1)]


def hexadecimal(line: str) -> str:
    """Return a line as `strace -xx` writes it."""
    parts = line.split('"')
    parts[1::2] = ["".join(f"\\x{byte:02x}" for byte in part.encode()) for part in parts[1::2]]
    return '"'.join(parts)


@pytest.mark.parametrize("after", range(len(LINES) + 1))
def test_a_descriptor_is_used_again_before_its_close_ends(after: int) -> None:
    """A file that gets the number of a descriptor is recorded, whenever strace sees the end of the close."""
    log = [
        '2 openat(AT_FDCWD, "/root/old", O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0600) = 8',
        "2 close(8 <unfinished ...>",
        *LINES[:after],
        "2 <... close resumed>)              = 0",
        *LINES[after:],
    ]
    assert entries("\n".join(map(hexadecimal, log)), Path("/root")) == [Create("old", 0, False), *RECORDED]


def test_a_call_that_another_one_interrupts_comes_where_it_ended() -> None:
    """A sync counts from its end, which strace writes on a line of its own."""
    log = [
        *LINES[:2],
        "1 fsync(8 <unfinished ...>",
        '2 openat(AT_FDCWD, "/root/other", O_RDWR|O_CREAT|O_EXCL|O_CLOEXEC, 0600) = 9',
        "1 <... fsync resumed>)              = 0",
    ]
    assert entries("\n".join(map(hexadecimal, log)), Path("/root")) == [
        Create("new", 0, False),
        Write(0, 0, b"ab"),
        Create("other", 1, False),
        Sync(0, True),
    ]


@pytest.fixture
def _strace() -> None:
    if why := missing():
        pytest.fail(why)


@asked_for
@pytest.mark.usefixtures("_strace")
@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_recorders_agree(workload: str) -> None:
    """Nothing that the library does to a file goes past the in-process recorder."""
    traced = trace(workload, 1, Beside.BEFORE)
    seen = record(WORKLOADS[workload], 1, beside=Beside.BEFORE)
    assert traced.versions == seen.versions
    assert traced.entries == seen.entries


@asked_for
@pytest.mark.usefixtures("_strace")
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_crash_under_strace(workload: str) -> None:
    """A crash loses nothing in the order in which the kernel saw the calls of two threads."""
    with Recovery() as recovery:
        result = Explorer(recovery).explore(trace(workload, 2, Beside.FREELY), 64, 1)
    print(f"{workload:30} {result.points:5} points {result.states:6} states {result.distinct:6} distinct by strace")
    assert not result.violations, result.violations[0]
