"""A process that cannot share a state: each start ends with a clear error, and with nothing changed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from claims import Gate, descriptors
from members import NAME, apart, bury, connect, crash, manager, members, owner_of
from running import until

from lab_state import (
    Config,
    CorruptionError,
    FileStorage,
    LockedError,
    Manager,
    MemoryStorage,
    UnavailableError,
    UnsupportedError,
)
from lab_state.shared._election import Election
from lab_state.shared._messages import Hello, No, Starting
from lab_state.shared._wire import encode_for_client, encode_for_owner
from lab_state.storage import _file_start
from lab_state.storage._claim import Claim, SharedFiles
from lab_state.storage.file import files_of
from lab_state.testing import FaultyStorage, ManualClock


def files(directory: Path) -> dict[str, bytes]:
    """Return the contents of the files of a state."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# Storages


@pytest.mark.parametrize("storage", [MemoryStorage(), FaultyStorage(MemoryStorage())])
async def test_other_storages(storage: Any) -> None:
    """Only a `FileStorage` can be shared. The error says what to use."""
    state = Manager(Config(NAME, shared=True), storage)
    with pytest.raises(UnsupportedError, match=r"needs a FileStorage.*RedisCache"):
        await state.start()
    assert state.status().phase == "new"


# An owner that cannot be followed


async def test_an_owner_that_is_not_shared(tmp_path: Path) -> None:
    """The error names the process, `shared=True`, and where this process has started it. Nothing was changed."""
    async with Manager(NAME, FileStorage(tmp_path)) as other:
        await other.set("a", 1)
        await other.flush()
        before = files(tmp_path)
        with pytest.raises(
            LockedError, match=r"(?s)does not share this state.*shared=True.*started at .*test_refusals"
        ):
            await manager(tmp_path).start()
        assert files(tmp_path) == before
    async with members(tmp_path, 1) as (one,):
        assert await one.get("a") == 1


async def test_a_process_that_is_not_shared(tmp_path: Path) -> None:
    """A manager that is not shared finds the owner, and is told of `shared=True`."""
    async with members(tmp_path, 1):
        with pytest.raises(LockedError, match=r"shared=True.*started at .*members\.py"):
            await Manager(NAME, FileStorage(tmp_path)).start()


async def test_a_lock_file_of_an_earlier_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file that names a holder which is not shared is not believed at once: the holder may be about to write it anew."""
    async with Manager(NAME, FileStorage(tmp_path)):
        pass
    claim = await files_of(FileStorage(tmp_path)).claim(NAME, 1)
    stale = json.loads((tmp_path / "lab.lock").read_bytes())
    written = (tmp_path / "lab.lock").read_bytes()
    (tmp_path / "lab.lock").write_bytes(json.dumps({**stale, "protocol": 0}).encode())
    claim.listener.close()
    looks = 0
    real = SharedFiles.refusal

    def refusal(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return real(*args)

    monkeypatch.setattr(SharedFiles, "refusal", refusal)
    one = manager(tmp_path)
    start = asyncio.create_task(one.start())
    await until(lambda: looks == 4)
    assert not start.done()
    (tmp_path / "lab.lock").write_bytes(written)
    await claim.release()
    await start
    await one.stop()


async def test_an_owner_on_another_machine(tmp_path: Path) -> None:
    """The error names the machine. Nothing was changed."""
    claim = await files_of(FileStorage(tmp_path)).claim(NAME, 1)
    claim.listener.close()
    held = json.loads((tmp_path / "lab.lock").read_bytes())
    (tmp_path / "lab.lock").write_bytes(json.dumps({**held, "host": "far", "kernel": "0" * 36}).encode())
    before = files(tmp_path)
    with pytest.raises(UnsupportedError, match=r"far.*on another machine"):
        await manager(tmp_path).start()
    assert files(tmp_path) == before
    await claim.release()


async def test_an_owner_that_does_not_accept(tmp_path: Path) -> None:
    """If the holder of the lock accepts no connection, a start ends after `owner_timeout`, and names the holder."""
    claim = await files_of(FileStorage(tmp_path)).claim(NAME, 1)
    claim.listener.close()
    with pytest.raises(LockedError, match=rf"pid {os.getpid()}.*and no process has answered for 0.3 s: wait until"):
        await manager(tmp_path, owner_timeout=0.3).start()
    await claim.release()


async def test_an_owner_that_says_nothing(tmp_path: Path) -> None:
    """If the owner accepts the connection and says nothing, a start ends after `owner_timeout`, and names the owner."""
    claim = await files_of(FileStorage(tmp_path)).claim(NAME, 1)
    with pytest.raises(UnavailableError, match=rf"pid {os.getpid()}\) gave no sign of life for 2 s: it may hang"):
        await manager(tmp_path, owner_timeout=0.3).start()
    await claim.release()


@asynccontextmanager
async def answering(directory: Path, *answers: bytes | None) -> AsyncIterator[Claim]:
    """Hold the lock and the socket. Give these bytes to one connection after the other. `None` closes it at once."""
    claim = await files_of(FileStorage(directory)).claim(NAME, 1)
    loop = asyncio.get_running_loop()

    async def answer() -> None:
        for data in answers:
            connection, _ = await loop.sock_accept(claim.listener)
            with connection:
                if data is not None:
                    await loop.sock_recv(connection, 1000)  # the hello
                    await loop.sock_sendall(connection, data)
                    while await loop.sock_recv(connection, 1000):
                        pass

    task = asyncio.create_task(answer())
    try:
        yield claim
    finally:
        task.cancel()
        await claim.release()


def said(message: Any) -> bytes:
    return b"".join(encode_for_client(1, message))


OTHER = said(Starting(host="h", pid=1)).replace(b'"protocol":1', b'"protocol":2')


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (OTHER, r"another version of lab_state.*all processes must run the same version"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", r"another program \(pid \d+\) answers at the socket"),
        (b"\0\0\0\1?x", "another program"),
        (said(No(reason="name", detail="this is another state")), "does not admit this process: this is another state"),
        (said(No(reason="protocol", detail="version 2 here")), "does not admit this process: version 2 here"),
    ],
)
async def test_an_answer_that_ends_a_start(tmp_path: Path, answer: bytes, message: str) -> None:
    """Another version, another program and a refusal end a start with an error that says which. Nothing was changed."""
    async with answering(tmp_path, answer):
        before = files(tmp_path)
        with pytest.raises(UnsupportedError, match=message):
            await manager(tmp_path).start()
        assert files(tmp_path) == before


@pytest.mark.parametrize("answer", [OTHER, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_bad_bytes_for_a_follower(tmp_path: Path, answer: bytes) -> None:
    """A process that follows an owner connects again after bad bytes, and goes on."""
    async with members(tmp_path, 2) as (owner, one):
        await one.set("a", 1)
        (connection,) = owner_of(owner).server._connections
        connection._channel.send([answer])
        await until(lambda: connection not in owner_of(owner).server._connections)
        assert await one.incr("n") == 1


async def test_another_program_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process with a copy that meets another program at the socket tries again, until it finds an owner."""
    async with members(tmp_path, 1) as (first,):
        one = manager(tmp_path)
        await one.start()
        await first.set("a", 1)
        async with contextlib.AsyncExitStack() as stack:
            async with apart(first):
                await crash(first)
                other = answering(tmp_path, *[b"HTTP/1.1 400 Bad Request\r\n\r\n"] * 3)
                await stack.enter_async_context(other)
            made = asyncio.create_task(one.incr("n"))
            await until(lambda: caplog.text.count("closed the connection to the owner: bad message") == 3)
        assert await made == 1
        assert one.role == "owner"
        await one.stop()
        await bury(first)


async def test_a_client_of_another_state(tmp_path: Path) -> None:
    """An owner refuses a client that asks for another state."""
    async with members(tmp_path, 1):
        loop = asyncio.get_running_loop()
        with connect(tmp_path) as raw:
            hello = Hello(name="other", client="a" * 32, revision=None, heard=None)
            await loop.sock_sendall(raw, b"".join(encode_for_owner(hello)))
            answer = await loop.sock_recv(raw, 1000)
            assert b"this is the state 'lab', and not 'other'" in answer


async def test_processes_wait_while_the_owner_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the owner loads, it says each second that it starts. So a long load is not silence."""
    gate = Gate(_file_start._load)
    monkeypatch.setattr(_file_start, "_load", gate)
    clock = ManualClock()
    owner, one = manager(tmp_path, clock=clock), manager(tmp_path, owner_timeout=0.1)
    loads = asyncio.create_task(owner.start())
    await gate.entered()
    waits = asyncio.create_task(one.start())
    for _ in range(25):  # for longer than the 2 s after which silence is believed
        await asyncio.sleep(0.1)
        clock.advance(1)
    assert not waits.done()
    gate.open()
    await loads
    await waits
    assert (owner.role, one.role) == ("owner", "follower")
    await one.stop()
    await owner.stop()


async def test_why_there_is_no_role(tmp_path: Path) -> None:
    """The reason for calls that wait names the holder of the lock, and says that it has not answered. It gives no advice."""
    shared = files_of(FileStorage(tmp_path))
    claim = await shared.claim(NAME, 1)
    claim.listener.close()
    election = Election(shared, NAME, ManualClock(), 0.0)
    with pytest.raises(LockedError):
        await election.role(has_copy=False)
    assert election.why == (
        f"{tmp_path}/{NAME}.lock is locked by {claim.holder}, another manager in this process (was its stop() called?), "
        "and that process has not answered"
    )
    await claim.release()


async def test_an_owner_that_closes_connections(tmp_path: Path) -> None:
    """A program that closes each connection is no owner: the start ends after `owner_timeout`."""
    async with answering(tmp_path, *[None] * 1000):
        with pytest.raises(LockedError, match=rf"pid {os.getpid()}.*and no process has answered for 0.3 s: wait until"):
            await manager(tmp_path, owner_timeout=0.3).start()


async def test_an_owner_that_ends_during_a_start(tmp_path: Path) -> None:
    """A process without a copy whose owner ends while it loads leaves the lock to others first, and then takes it."""
    claim = await files_of(FileStorage(tmp_path)).claim(NAME, 1)
    loop = asyncio.get_running_loop()
    one = manager(tmp_path)
    start = asyncio.create_task(one.start())
    connection, _ = await loop.sock_accept(claim.listener)
    with connection:
        await loop.sock_recv(connection, 1000)
        await loop.sock_sendall(connection, said(Starting(host="h", pid=1)))
        await until(lambda: not start.done())
        await claim.release()
    await start
    assert one.role == "owner"
    await one.stop()


# Files


async def test_no_socket_can_be_bound(tmp_path: Path) -> None:
    """A directory in the place of the socket ends a start. The lock is free again."""
    (tmp_path / "lab.sock").mkdir()
    with pytest.raises(UnsupportedError, match=r"lab\.sock"):
        await manager(tmp_path).start()
    async with Manager(NAME, FileStorage(tmp_path)):
        pass


async def test_a_stale_socket(tmp_path: Path) -> None:
    """The socket file of an owner that was killed does not hinder the next one."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "lab.sock"))
    async with members(tmp_path, 2) as (_, other):
        assert await other.incr("n") == 1


async def test_a_long_path(tmp_path: Path) -> None:
    """A path that is too long for a socket, and a name of 128 characters, can be shared."""
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    name = "n" * 128
    one, other = (Manager(Config(name, shared=True), FileStorage(directory)) for _ in range(2))
    async with one, other:
        assert await other.incr("n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user(tmp_path: Path) -> None:
    """A process of another user cannot follow. The error names both users."""
    tmp_path.chmod(0o777)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(0o755)
    async with members(tmp_path, 1):
        for path in tmp_path.iterdir():
            path.chmod(0o666)
        os.seteuid(65534)
        try:
            with pytest.raises(UnsupportedError, match="socket of user 0, and this process runs as user 65534"):
                await manager(tmp_path).start()
        finally:
            os.seteuid(0)


# Failed starts


async def test_too_many_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no descriptor for the socket of the owner, the start fails, and nothing stays open."""

    def dup(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "dup", dup)
        with pytest.raises(UnavailableError, match="open files"):
            await manager(tmp_path).start()
    assert descriptors() == before
    assert not (tmp_path / "lab.sock").exists()


async def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    """After a start that failed or was cancelled, nothing is open, and the manager can be started."""
    one = manager(tmp_path)
    (tmp_path / "lab.json").write_bytes(b"{")
    before = descriptors()
    with pytest.raises(CorruptionError):
        await one.start()
    assert descriptors() == before
    assert files(tmp_path)["lab.json"] == b"{"
    (tmp_path / "lab.json").unlink()
    for turns in range(40):
        start = asyncio.create_task(one.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await start
            await one.stop()
    assert one.role is None
    async with one:
        assert await one.incr("n") == 1
