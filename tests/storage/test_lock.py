"""Who holds a lock: what the one who is refused is told."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab_state import FileStorage, LockedError, Manager, UnavailableError
from lab_state.storage import _fs, _lock, _lookup
from lab_state.storage._lock import Lock, LockHolder, describe

HOST = socket.gethostname()
STARTED = "2026-01-01T00:00:00+0000"

LOCKING = """
import fcntl, json, os, signal, sys
path, text, fork = sys.argv[1:]
fd = os.open(path, os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, text.replace("PID", str(os.getpid())).encode())
child = os.fork() if fork else 0
if child or not fork:
    print(json.dumps([os.getpid(), child]), flush=True)
    if fork:
        os._exit(0)
signal.pause()
"""
"""Takes a lock without the library, and writes what it is told; with `fork`, it ends, and a child keeps the lock."""


@contextmanager
def locked(path: Path, text: str, fork: str = "") -> Iterator[int]:
    """Let another process hold the lock; yield the pid of the one that took it."""
    process = subprocess.Popen([sys.executable, "-c", LOCKING, path, text, fork], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, child = json.loads(process.stdout.readline())
    if fork:
        process.wait()
    try:
        yield pid
    finally:
        os.kill(child or pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def refusal(directory: Path) -> str:
    """Return the error of a manager that cannot start."""
    with pytest.raises(LockedError) as refused:
        asyncio.run(Manager("lab", FileStorage(directory)).start())
    message = str(refused.value)
    assert message.startswith(f"{directory}/lab.lock is locked by ")
    assert message.endswith(
        ": stop that writer first, use another name for this state, or let processes of one machine share it with "
        "Config(shared=True) in each of them"
    )
    return message


def says(pid: int | str, host: str = HOST, started: str = STARTED) -> str:
    return json.dumps({"host": host, "pid": pid, "started": started}).replace('"PID"', "PID")


def test_another_process(tmp_path: Path) -> None:
    """The error names the process that the lock file names."""
    with locked(tmp_path / "lab.lock", says("PID")) as pid:
        assert f"by pid {pid} on {HOST}, since {STARTED}: stop" in refusal(tmp_path)


def test_a_process_with_our_pid_and_host_name(tmp_path: Path) -> None:
    """A process with our pid and host name, as in another container, is not called this process."""
    with locked(tmp_path / "lab.lock", says(os.getpid())) as pid:
        assert f"by pid {pid} on {HOST}: stop" in refusal(tmp_path)


def test_a_dead_process_whose_child_holds_the_lock(tmp_path: Path) -> None:
    """If a child of a dead process holds the lock, the message does not name the dead process but says how to find the child."""
    with locked(tmp_path / "lab.lock", says("PID"), "fork") as pid:
        expected = f"by a child of pid {pid} on {HOST}, since {STARTED}; that parent has ended (`fuser {tmp_path}/lab.lock` finds"
        assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        says(1, "h\n2026-01-01 CRITICAL root: hacked \x1b[31m"),
        says(1, HOST, "now\n"),
        says(1, "x" * 300),
        says(-5),
        says(2**40),
        '{"host":"\ud800"}'.encode("utf-8", "surrogatepass").decode("latin-1"),
        "nothing",
    ],
)
def test_a_lock_file_that_was_written_by_others(tmp_path: Path, text: str) -> None:
    """Line breaks and escape sequences in a lock file do not get into the message.

    The holder is found without the file.
    """
    with locked(tmp_path / "lab.lock", text) as pid:
        message = refusal(tmp_path)
    assert f"by pid {pid} on {HOST}: stop" in message
    assert message.isprintable()


def test_another_manager_in_this_process(tmp_path: Path) -> None:
    """Another manager in this process is recognised by the file itself, also under another path."""
    lock = Lock(str(tmp_path / "lab.lock"))
    (tmp_path / "lab.lock").write_text(says(1, "elsewhere"))
    os.link(tmp_path / "lab.lock", tmp_path / "other.lock")
    with pytest.raises(LockedError, match=r"another manager in this process \(was its stop\(\) called\?\)"):
        Lock(str(tmp_path / "other.lock"))
    lock.release()
    lock.release()
    Lock(str(tmp_path / "other.lock")).release()


MINE = LockHolder(HOST, os.getpid(), STARTED)


def ended() -> int:
    """Return the pid of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("holder", "shown", "expected"),
    [
        (None, [], "another writer"),
        (MINE, [], f"{MINE}, in another container"),
        (LockHolder("elsewhere", 7, STARTED), [], f"pid 7 on elsewhere, since {STARTED}"),
        (LockHolder("elsewhere", 7, STARTED), [1], f"pid 1 on {HOST}"),
        (LockHolder(HOST, 1, STARTED), [], f"pid 1 on {HOST}, since {STARTED}"),
        (LockHolder(HOST, 1, STARTED), [1], f"pid 1 on {HOST}, since {STARTED}"),
    ],
    # The texts have the pid of the test's process in them, and the processes of a run must agree on the names.
    ids=["no holder", "this pid", "elsewhere", "elsewhere, shown", "this host", "this host, shown"],
)
def test_what_is_told(holder: LockHolder | None, shown: list[int], expected: str) -> None:
    """`/proc/locks` is believed before the lock file. The lock file counts if the kernel does not show the holder."""
    assert describe(holder, shown, "x.lock") == expected


def test_a_holder_that_neither_runs_here_nor_shows() -> None:
    """For a holder that is not visible, the message says that it may be in another container, or its child has the lock."""
    holder = LockHolder(HOST, ended(), STARTED)
    told = describe(holder, [], "x.lock")
    assert told == f"{holder}, which does not run here: it is in another container, or its child holds the lock"


def test_a_holder_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that this user may not signal counts as running."""

    def refused(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    assert describe(None, [7], "x.lock") == f"pid 7 on {HOST}"


def test_a_host_name_that_cannot_stand_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name may have any bytes. The lock file has only the characters that are safe in a message."""
    monkeypatch.setattr(socket, "gethostname", lambda: "a b\n\x1b\udcff")
    lock = Lock(str(tmp_path / "lab.lock"))
    told = json.loads((tmp_path / "lab.lock").read_bytes())["host"]
    lock.release()
    assert re.fullmatch(r"a\?b\?+", told)


def test_a_lock_does_not_leave_a_descriptor_behind_when_refused(tmp_path: Path) -> None:
    """A refused lock leaves no descriptor open, in this process or with another process as the holder."""
    with (tmp_path / "lab.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            with pytest.raises(LockedError):
                Lock(str(tmp_path / "lab.lock"))
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_descriptors_of_a_file(tmp_path: Path) -> None:
    """The descriptors of a file are found by `/proc`, for a child that was forked while its parent opened a lock."""
    path = tmp_path / "lab.lock"
    assert _lookup.descriptors(str(path)) == []
    with path.open("w") as one, path.open("r") as two:
        assert sorted(_lookup.descriptors(str(path))) == sorted([one.fileno(), two.fileno()])


def test_a_file_that_cannot_be_looked_up_is_not_gone() -> None:
    """Only "no such file" means that there is none."""
    assert _lookup.is_gone("nowhere/at/all")
    assert not _lookup.is_gone("x" * 300)


def test_a_lock_that_cannot_be_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the unlock fails, the caller that closes the session gets the error, and the descriptor is closed all the same."""

    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    async def main() -> None:
        session = await FileStorage(tmp_path).open("lab")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
            patch.setattr(_fs, "unlock", failing)
            await session.aclose()
        await (await FileStorage(tmp_path).open("lab")).aclose()

    asyncio.run(main())


def test_a_descriptor_that_is_another_files_by_now(tmp_path: Path) -> None:
    """If other code closed the descriptor of the lock and another file has its number, nothing is written to that file."""
    other = tmp_path / "precious"
    other.write_bytes(b"precious" * 100)
    lock = Lock(str(tmp_path / "lab.lock"))
    number = lock._fd
    with other.open("r+b") as file:
        os.dup2(file.fileno(), number)
    try:
        with lock.noted(str(tmp_path / "lab.json.01234567.tmp")):
            assert other.read_bytes() == b"precious" * 100
        lock.note_left((str(tmp_path),))
        lock.release()
        assert other.read_bytes() == b"precious" * 100
    finally:
        os.close(number)


def test_a_lock_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file that cannot be read fails the start with a StorageError, and the lock is released."""

    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UnavailableError, match=r"reading .*lab\.lock failed: Input"):
        patch.setattr(os, "pread", failing)
        asyncio.run(Manager("lab", FileStorage(tmp_path)).start())
    Lock(str(tmp_path / "lab.lock")).release()


def test_a_boot_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A boot id that cannot be read counts as missing."""

    def denied(_: str) -> bytes:
        raise UnavailableError("denied")

    _lock._boot.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "read", denied)
        assert _lock._boot() == ""
    _lock._boot.cache_clear()


def test_an_error_of_a_look_is_no_lost_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error of `fstat` does not say that the lock is gone: the writer goes on."""
    lock = Lock(str(tmp_path / "lab.lock"))
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        if fd == lock._fd:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    with monkeypatch.context() as patch:
        patch.setattr("lab_state.storage._lookup.os.fstat", fstat)
        lock.check()
    lock.check()
    lock.release()
