"""Who holds a lock: what the one who is refused is told."""

from __future__ import annotations

import asyncio
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
    assert message.endswith(": stop it first, or use another name; a state has one writer")
    return message


def says(pid: int | str, host: str = HOST, started: str = STARTED) -> str:
    return json.dumps({"host": host, "pid": pid, "started": started}).replace('"PID"', "PID")


def test_another_process(tmp_path: Path) -> None:
    """It is named as the lock file says."""
    with locked(tmp_path / "lab.lock", says("PID")) as pid:
        assert f"by pid {pid} on {HOST}, since {STARTED}: stop" in refusal(tmp_path)


def test_a_process_with_our_pid_and_host_name(tmp_path: Path) -> None:
    """As in two containers: it is not called this process, whatever the file says; the kernel knows who it is."""
    with locked(tmp_path / "lab.lock", says(os.getpid())) as pid:
        assert f"by pid {pid} on {HOST}: stop" in refusal(tmp_path)


def test_a_dead_process_whose_child_holds_the_lock(tmp_path: Path) -> None:
    """Its pid is not called the one to be stopped: the message says how to find its child."""
    with locked(tmp_path / "lab.lock", says("PID"), "fork") as pid:
        expected = (
            f"by a child of pid {pid} on {HOST}, since {STARTED}, which has ended (`fuser {tmp_path}/lab.lock` finds"
        )
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
    """No line break and no escape sequence of it gets into the message; who holds the lock is found out without it."""
    with locked(tmp_path / "lab.lock", text) as pid:
        message = refusal(tmp_path)
    assert f"by pid {pid} on {HOST}: stop" in message
    assert message.isprintable()


def test_another_manager_in_this_process(tmp_path: Path) -> None:
    """This is known by the file itself, and under another path of it too."""
    lock = Lock(str(tmp_path / "lab.lock"))
    (tmp_path / "lab.lock").write_text(says(1, "elsewhere"))
    os.link(tmp_path / "lab.lock", tmp_path / "other.lock")
    with pytest.raises(LockedError, match=r"another manager in this process \(was its stop\(\) forgotten\?\)"):
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
    """`/proc/locks` goes before the lock file, and the file's word counts where the kernel does not show the holder."""
    assert describe(holder, shown, "x.lock") == expected


def test_a_holder_that_neither_runs_here_nor_shows() -> None:
    """It may be in another container, or its child has the lock: both are said."""
    holder = LockHolder(HOST, ended(), STARTED)
    told = describe(holder, [], "x.lock")
    assert told == f"{holder}, which does not run here: it is in another container, or its child holds the lock"


def test_a_holder_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not be signalled runs."""

    def refused(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    assert describe(None, [7], "x.lock") == f"pid 7 on {HOST}"


def test_a_host_name_that_cannot_stand_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes any bytes for one; the lock file names it without them."""
    monkeypatch.setattr(socket, "gethostname", lambda: "a b\n\x1b\udcff")
    lock = Lock(str(tmp_path / "lab.lock"))
    told = json.loads((tmp_path / "lab.lock").read_bytes())["host"]
    lock.release()
    assert re.fullmatch(r"a\?b\?+", told)


def test_a_lock_does_not_leave_a_descriptor_behind_when_refused(tmp_path: Path) -> None:
    """Nor does one that another process holds."""
    with (tmp_path / "lab.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            with pytest.raises(LockedError):
                Lock(str(tmp_path / "lab.lock"))
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_descriptors_of_a_file(tmp_path: Path) -> None:
    """What a child looks for that was forked while its parent opened a lock."""
    path = tmp_path / "lab.lock"
    assert _lookup.descriptors(str(path)) == []
    with path.open("w") as one, path.open("r") as two:
        assert sorted(_lookup.descriptors(str(path))) == sorted([one.fileno(), two.fileno()])


def test_a_file_that_cannot_be_looked_up_is_not_gone() -> None:
    """Only "no such file" means that there is none."""
    assert _lookup.is_gone("nowhere/at/all")
    assert not _lookup.is_gone("x" * 300)


def test_a_lock_that_cannot_be_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller that closes the session is told, and the descriptor is closed all the same."""

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
    """Other code closed the lock's descriptor, and a file of its own has the number: no note is written to that file."""
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
    """A start tells so as an error of the storage, and lets go of the lock."""

    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UnavailableError, match=r"reading .*lab\.lock failed: Input"):
        patch.setattr(os, "pread", failing)
        asyncio.run(Manager("lab", FileStorage(tmp_path)).start())
    Lock(str(tmp_path / "lab.lock")).release()


def test_a_boot_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for one that the kernel does not tell."""

    def denied(_: str) -> bytes:
        raise UnavailableError("denied")

    _lock._boot.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "read", denied)
        assert _lock._boot() == ""
    _lock._boot.cache_clear()
