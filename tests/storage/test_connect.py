"""Connections to the owner of a shared state, owners that are killed, and what the lock file names."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from claims import (
    PROTOCOL,
    Gate,
    accepted,
    bind_stale,
    claimed,
    connected,
    descriptors,
    is_free,
    killed,
    line_of,
    names,
    running,
)
from forked import error_of, in_child

from lab_state import (
    FileStorage,
    LockedError,
    Manager,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from lab_state.storage import _fs_socket, _lock
from lab_state.storage._fs_socket import OwnSocket
from lab_state.storage._lock import LockHolder, is_here, refusal
from lab_state.storage.file import files_of

STARTED = "2026-01-01T00:00:00+0000"


@pytest.fixture(autouse=True)
async def _gives_back() -> AsyncIterator[None]:
    """Check that each test closes what it opened."""
    await asyncio.to_thread(gc.collect)
    before = descriptors()
    yield
    assert descriptors() == before


# Connecting


async def test_no_owner(tmp_path: Path) -> None:
    """Without a directory, a socket or a listener there is no connection, and no error."""
    assert await files_of(FileStorage(tmp_path / "none")).connect("lab") is None
    for make in (bind_stale, Path.touch):
        assert await files_of(FileStorage(tmp_path)).connect("lab") is None
        make(tmp_path / "lab.sock")
        assert await files_of(FileStorage(tmp_path)).connect("lab") is None
        (tmp_path / "lab.sock").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "lab.sock"))
        assert await files_of(FileStorage(tmp_path)).connect("lab") is None


async def test_an_owner_that_does_not_accept(tmp_path: Path) -> None:
    """If too many connections wait to be accepted, there is no connection, and the call does not wait."""
    async with claimed(tmp_path):
        with contextlib.ExitStack() as stack:
            for _ in range(_fs_socket._BACKLOG + 1):
                stack.enter_context(await connected(tmp_path))
            assert await files_of(FileStorage(tmp_path)).connect("lab") is None


async def test_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path and a link lead to the same socket."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("state")
    async with claimed(Path("state")) as claim:
        assert claim.path == str(tmp_path / "state" / "lab.sock")
        with await connected(tmp_path / "link"), accepted(claim):
            pass


@pytest.mark.parametrize("name", ["lab", "n" * 77, "n" * 78, "n" * 128], ids=len)
@pytest.mark.parametrize("depth", [0, 1, 15])
async def test_a_long_path(tmp_path: Path, name: str, depth: int) -> None:
    """A path of any length, and each name of up to 128 characters, can be bound, reached and deleted."""
    directory = tmp_path.joinpath(*["d" * 200] * depth)
    async with claimed(directory, name) as claim:
        assert Path(claim.path).is_socket()
        with await connected(directory, name), accepted(claim):
            pass
        Path(claim.path).unlink()
        assert await files_of(FileStorage(directory)).connect(name) is None
        old = claim.listener
        assert await claim.rebind_if_gone() is claim.listener
        old.close()
        with await connected(directory, name), accepted(claim):
            pass
    assert names(directory) == [f"{name}.lock"]


async def test_a_socket_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket at which another user listens is refused. The message has both users. The connection is closed."""
    mine = os.geteuid()
    async with claimed(tmp_path) as claim:
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: mine + 1)
            with pytest.raises(UnsupportedError) as refused:
                await files_of(FileStorage(tmp_path)).connect("lab")
        assert str(refused.value) == (
            f"{tmp_path}/lab.sock is the socket of user {mine}, and this process runs as user {mine + 1}: "
            "run all processes of a shared state as one user"
        )
        with accepted(claim) as connection:
            assert connection.recv(1) == b""


AS_ANOTHER = """
import asyncio, os, sys
from lab_state import FileStorage, StorageError
from lab_state.storage.file import files_of
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.geteuid = lambda: 65534
async def main():
    try:
        print(await files_of(FileStorage(sys.argv[1])).connect("lab"))
    except StorageError as error:
        print(type(error).__name__, error, flush=True)
asyncio.run(main())
os._exit(0)  # functions that run at exit must not write here
"""


async def test_another_user(public: Path) -> None:
    """A process of another user, which may not connect, is refused with both users."""
    async with claimed(public):
        (public / "lab.sock").chmod(0)
        command = [sys.executable, "-c", AS_ANOTHER, str(public)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    expected = f"{public}/lab.sock is the socket of user {os.geteuid()}, and this process runs as user 65534: "
    assert done.stdout.startswith(f"UnsupportedError {expected}")


@pytest.mark.parametrize(
    ("code", "expected", "text"),
    [
        (errno.EACCES, UnsupportedError, "Permission denied; give this user the permission"),
        (errno.EMFILE, UnavailableError, "Too many open files"),
    ],
)
async def test_a_connection_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[StorageError], text: str
) -> None:
    """Another failure of `connect` is an error with the path. A socket file of this user is not that of another one."""

    def connect(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    async with claimed(tmp_path):
        monkeypatch.setattr(OwnSocket, "connect", connect)
        with pytest.raises(expected, match=re.escape(f"connecting to {tmp_path}/lab.sock failed: {text}")):
            await files_of(FileStorage(tmp_path)).connect("lab")
        os.unlink(tmp_path / "lab.sock")  # noqa: PTH108 -- on the event loop of a test
        with pytest.raises(expected, match=re.escape(f"connecting to {tmp_path}/lab.sock failed: {text}")):
            await files_of(FileStorage(tmp_path)).connect("lab")


async def test_a_cancelled_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of `connect` that is cancelled leaves no connection."""
    async with claimed(tmp_path) as claim:
        gate = Gate(_fs_socket.connect)
        storage = files_of(FileStorage(tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(_fs_socket, "connect", gate)
            await gate.cancel(asyncio.create_task(storage.connect("lab")))
        assert await storage.holder("lab") == claim.holder
        accept = asyncio.get_running_loop().sock_accept(claim.listener)
        connection, _ = await asyncio.wait_for(accept, 60)
        with connection:
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 1), 60) == b""


# Processes that are killed


@pytest.mark.parametrize("fork", [(), ("fork",)], ids=["alone", "with a child"])
async def test_a_killed_owner(tmp_path: Path, fork: tuple[str, ...]) -> None:
    """After SIGKILL the lock is free at once, and the old socket accepts nothing, also if a forked child lives on."""
    with killed(tmp_path, *fork):
        assert (tmp_path / "lab.sock").is_socket()
        assert await files_of(FileStorage(tmp_path)).connect("lab") is None
        async with claimed(tmp_path) as claim:
            with await connected(tmp_path), accepted(claim):
                pass


FOLLOWER = """
import asyncio, os, signal, sys
from lab_state import FileStorage
from lab_state.storage.file import files_of
async def main():
    connection = await files_of(FileStorage(sys.argv[1])).connect("lab")
    if os.fork():
        signal.pause()
    os.write(1, f"{os.getpid()}\\n".encode())
    signal.pause()
asyncio.run(main())
"""
"""Connects, forks a child that waits, and waits to be killed."""


async def test_a_killed_follower_whose_child_lives(tmp_path: Path) -> None:
    """The owner sees the end of a killed process, although its child inherited the connection."""
    async with claimed(tmp_path) as claim:
        with running(FOLLOWER, tmp_path) as process:
            child = int(await asyncio.to_thread(line_of, process))
            try:
                with accepted(claim) as connection:
                    with pytest.raises(BlockingIOError):
                        connection.recv(1)
                    process.kill()
                    await asyncio.to_thread(process.wait)
                    assert connection.recv(1) == b""
            finally:
                os.kill(child, signal.SIGKILL)


async def test_a_forked_child(tmp_path: Path) -> None:
    """A child has neither the lock nor the sockets, and each call of its claim is refused. The parent goes on."""
    async with claimed(tmp_path) as claim:
        with await connected(tmp_path) as mine, accepted(claim) as theirs:

            def child() -> Any:
                closed = [one.fileno() for one in (claim.listener, mine, theirs)]
                return closed, [error_of(call)[0] for call in (claim.load, claim.release, claim.rebind_if_gone)]

            assert await in_child(child) == [[-1] * 3, ["UnsupportedError"] * 3]
            mine.send(b"on")
            assert theirs.recv(2) == b"on"
        with await connected(tmp_path), accepted(claim):
            pass
        assert not await is_free(tmp_path)


async def test_a_fork_while_a_thread_binds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is forked while a thread binds the socket closes its copy, so the socket ends with its owner."""
    entered, gate = threading.Event(), threading.Event()
    real = OwnSocket.bind
    sockets: list[OwnSocket] = []

    def bind(own: OwnSocket, path: str) -> None:
        sockets.append(own)
        entered.set()
        gate.wait()
        real(own, path)

    monkeypatch.setattr(OwnSocket, "bind", bind)
    claiming = asyncio.create_task(files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL))
    await asyncio.to_thread(entered.wait)
    assert await in_child(lambda: sockets[0].fileno()) == -1
    gate.set()
    await (await claiming).release()


# The lock file


HERE = LockHolder(_lock._host(), 7, STARTED, protocol=1, socket="lab.sock", kernel=_lock._boot())


async def test_no_holder(tmp_path: Path) -> None:
    """Without a directory or a lock file there is no holder. After an end, the lock file names the earlier holder."""
    assert await files_of(FileStorage(tmp_path / "none")).holder("lab") is None
    assert await files_of(FileStorage(tmp_path)).holder("lab") is None
    async with claimed(tmp_path) as claim:
        pass
    assert await files_of(FileStorage(tmp_path)).holder("lab") == claim.holder


@pytest.mark.parametrize(
    "changed",
    [
        {"protocol": -1},
        {"protocol": "1"},
        {"socket": "../lab.sock"},
        {"socket": "a\nb"},
        {"socket": "n" * 134},
        {"kernel": "\x1b[31m"},
        {"kernel": "f" * 65},
        {"pid": 0},
    ],
    ids=str,
)
async def test_a_lock_file_that_others_wrote(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Content of a lock file that lab_state cannot have written names no holder."""
    said = {"host": "web-1", "pid": 7, "started": STARTED, "protocol": 1, "socket": "lab.sock", "kernel": "0-f"}
    (tmp_path / "lab.lock").write_text(json.dumps(said))
    assert await files_of(FileStorage(tmp_path)).holder("lab") == LockHolder(
        "web-1", 7, STARTED, protocol=1, socket="lab.sock", kernel="0-f"
    )
    (tmp_path / "lab.lock").write_text(json.dumps(said | changed))
    assert await files_of(FileStorage(tmp_path)).holder("lab") is None


async def test_a_lock_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A lock file that cannot be read is an error, and not a missing holder."""
    (tmp_path / "lab.lock").mkdir()
    with pytest.raises(UnsupportedError, match=r"lab\.lock failed: Is a directory"):
        await files_of(FileStorage(tmp_path)).holder("lab")


def with_values(host: str, kernel: str) -> LockHolder:
    return LockHolder(host, 7, STARTED, protocol=1, socket="lab.sock", kernel=kernel)


def test_the_machine_of_a_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot id of the kernel tells machines apart. The host name counts only if one boot id is not known."""
    monkeypatch.setattr(_lock, "_host", lambda: "web-1")
    monkeypatch.setattr(_lock, "_boot", lambda: "0-1")
    assert is_here(with_values("web-1", "0-1"))
    assert is_here(with_values("another-container", "0-1"))
    assert not is_here(with_values("web-1", "0-2"))
    assert is_here(with_values("web-1", ""))
    assert not is_here(with_values("web-2", ""))
    assert is_here(LockHolder("another-container", 7, STARTED, boot="0-1"))
    assert not is_here(LockHolder("web-1", 7, STARTED, boot="0-2"))
    monkeypatch.setattr(_lock, "_boot", lambda: "")
    assert is_here(with_values("web-1", "0-2"))
    assert not is_here(with_values("web-2", "0-2"))


async def test_who_can_be_followed(tmp_path: Path) -> None:
    """A shared owner on this machine can be followed."""
    async with claimed(tmp_path) as claim:
        assert files_of(FileStorage(tmp_path)).refusal("lab", claim.holder) is None
    assert refusal("lab.lock", HERE) is None


async def test_an_owner_that_is_not_shared(tmp_path: Path) -> None:
    """An owner that does not share the state is a LockedError that names it, and says how to share the state."""
    async with Manager("lab", FileStorage(tmp_path)):
        storage = files_of(FileStorage(tmp_path))
        holder = await storage.holder("lab")
        assert holder is not None
        error = storage.refusal("lab", holder)
    assert isinstance(error, LockedError)
    assert str(error) == (
        f"{tmp_path}/lab.lock is locked by {holder}, which does not share this state: start that process with "
        "Config(shared=True) as well, or stop it"
    )


def test_an_owner_that_is_not_shared_in_another_container() -> None:
    """The lock file of such an owner has the boot id of this machine, so the error does not say "another machine"."""
    boot = _lock._boot()
    error = refusal("/srv/lab.lock", LockHolder("another-container", 7, STARTED, boot=boot, inode=1))
    assert isinstance(error, LockedError)
    assert "which does not share this state" in str(error)


def test_an_owner_on_another_machine() -> None:
    """An owner on another machine is an UnsupportedError that names it, and says where to start the process."""
    error = refusal("/srv/lab.lock", LockHolder("web-2", 7, STARTED, protocol=1, socket="lab.sock", kernel="0-2"))
    assert isinstance(error, UnsupportedError)
    assert str(error) == (
        f"/srv/lab.lock is locked by pid 7 on web-2, since {STARTED}, on another machine: a shared state needs all of "
        "its processes on one machine; start this process there, or use a directory that only this machine has"
    )
