"""The claim of a shared state on disk: its lock and its socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from claims import PROTOCOL, Gate, accepted, bind_stale, claimed, connected, descriptors, is_free, names

from lab_state import (
    CorruptionError,
    FencedError,
    FileStorage,
    LockedError,
    Manager,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from lab_state.shared._address import address_of
from lab_state.storage import _claim, _file_start, _fs, _lookup
from lab_state.storage._claim import Claim, Listener
from lab_state.storage._fs_socket import OwnSocket, peer_of
from lab_state.storage._protocol import Recovery
from lab_state.storage.file import files_of


@pytest.fixture(autouse=True)
async def _gives_back() -> AsyncIterator[None]:
    """Check that each test closes what it opened."""
    await asyncio.to_thread(gc.collect)
    before = descriptors()
    yield
    assert descriptors() == before


async def no_record() -> AsyncIterator[bytes]:
    yield b"{}"


# A claim


async def test_a_claim(tmp_path: Path) -> None:
    """A claim holds the lock, listens at a socket that only this user can connect to, and says so in the lock file."""
    directory = tmp_path / "new"
    async with claimed(directory) as claim:
        path = directory / "lab.sock"
        assert (claim.path, repr(claim)) == (str(path), f"<Claim of {path}>")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert claim.listener.getblocking() is False
        said = json.loads((directory / "lab.lock").read_bytes())
        assert (said["pid"], said["protocol"], said["socket"]) == (os.getpid(), PROTOCOL, "lab.sock")
        assert claim.holder == await files_of(FileStorage(directory)).holder("lab")
        assert not await is_free(directory)


async def test_the_mode_of_a_socket_has_no_moment_without_protection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket file has its mode before the process listens, whatever the umask is."""
    modes = []
    real = OwnSocket.listen

    def listen(own: OwnSocket, backlog: int) -> None:
        modes.append(stat.S_IMODE((tmp_path / "lab.sock").stat().st_mode))
        real(own, backlog)

    monkeypatch.setattr(OwnSocket, "listen", listen)
    before = os.umask(0)
    try:
        async with claimed(tmp_path):
            assert modes == [0o600]
    finally:
        os.umask(before)


async def test_a_connection(tmp_path: Path) -> None:
    """Another storage object connects, both ends see the user of the peer, and bytes go both ways."""
    async with claimed(tmp_path) as claim:
        with await connected(tmp_path) as mine, accepted(claim) as theirs:
            assert peer_of(mine) == peer_of(theirs) == (os.getpid(), os.geteuid())
            assert mine.getblocking() is theirs.getblocking() is False
            mine.send(b"hello")
            assert theirs.recv(10) == b"hello"
            theirs.send(b"welcome")
            assert mine.recv(10) == b"welcome"


async def test_a_user_of_a_closed_socket(tmp_path: Path) -> None:
    """The user of the peer of a closed socket is an OSError."""
    async with claimed(tmp_path) as claim:
        connection = await connected(tmp_path)
        with accepted(claim):
            connection.close()
            with pytest.raises(OSError, match="Bad file descriptor"):
                peer_of(connection)


async def test_no_connection_waits(tmp_path: Path) -> None:
    """The listening socket does not block."""
    async with claimed(tmp_path) as claim:
        with pytest.raises(BlockingIOError):
            claim.listener.accept()


async def test_a_session(tmp_path: Path) -> None:
    """The session of a claim commits. Its end deletes the socket file first, and frees the lock then."""
    claim = await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    session = await claim.load()
    await session.commit(b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":[],"expires":{}}', no_record)
    await claim.release()
    assert (tmp_path / "lab.sock").exists()
    assert not await is_free(tmp_path)
    seen = []
    real = _fs.unlock

    def unlock(fd: int) -> None:
        seen.append(((tmp_path / "lab.sock").exists(), claim.listener.fileno()))
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fs, "unlock", unlock)
        await session.aclose()
    assert seen == [(False, -1)]
    async with Manager("lab", FileStorage(tmp_path)) as state:
        assert await state.get("a") == 1


async def left_out(directory: Path) -> Recovery:
    """Load a state without its snapshot, if that is possible. Return what was loaded. Then read the whole of it."""
    claim = await files_of(FileStorage(directory)).claim("lab", PROTOCOL)
    session = await claim.load(whole=False)
    found = session.recovery
    for _ in range(2):
        whole = await session.whole()
        assert whole.snapshot == (directory / "lab.json").read_bytes()
        assert whole.records == found.records
    await session.aclose()
    return found


async def test_a_load_without_the_snapshot(tmp_path: Path) -> None:
    """The snapshot is left out if its last bytes show that the journal follows it. It can be read later."""
    async with Manager("lab", FileStorage(tmp_path)) as state:
        await state.set("a", 1)
    assert (await left_out(tmp_path)).snapshot is None
    claim = await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    session = await claim.load(whole=False)
    await session.commit(b'{"from":1,"to":2,"clear":false,"set":{"b":2},"delete":[],"expires":{}}', no_record)
    await session.aclose()
    found = await left_out(tmp_path)
    assert (found.snapshot, len(found.records), found.unsettled) == (None, 1, True)
    async with Manager("lab", FileStorage(tmp_path)) as state:
        assert await state.get_all() == {"a": 1, "b": 2}


@pytest.mark.parametrize("change", ["edited", "another", "no journal"])
async def test_a_snapshot_that_is_not_left_out(tmp_path: Path, change: str) -> None:
    """The snapshot is read if another program wrote it, if the journal does not follow it, and if there is no journal."""
    async with Manager("lab", FileStorage(tmp_path)) as state:
        await state.set("a", 1)
    before = (tmp_path / "lab.journal").read_bytes()
    if change == "edited":
        (tmp_path / "lab.json").write_bytes(b'{"a":2}')
    elif change == "another":
        async with Manager("lab", FileStorage(tmp_path)) as state:
            await state.set("a", 2)
        (tmp_path / "lab.journal").write_bytes(before)
    else:
        (tmp_path / "lab.journal").unlink()
    assert (await left_out(tmp_path)).snapshot is not None


async def test_nothing_is_left_out_of_a_new_state(tmp_path: Path) -> None:
    """Beside a journal without a snapshot, there is nothing to leave out."""
    claim = await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    session = await claim.load()
    await session.commit(b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":[],"expires":{}}', no_record)
    await session.aclose()
    claim = await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    session = await claim.load(whole=False)
    assert session.recovery == await session.whole()
    assert session.recovery.snapshot is None
    await session.aclose()


async def test_a_lock_file_after_a_load(tmp_path: Path) -> None:
    """Later changes of the lock file keep the protocol and the socket in it. A state that is not shared names neither."""
    claim = await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    session = await claim.load()
    await session.commit(b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":[],"expires":{}}', no_record)
    holder = await files_of(FileStorage(tmp_path)).holder("lab")
    await session.aclose()
    assert holder is not None
    assert (holder.protocol, holder.socket, bool(holder.boot)) == (PROTOCOL, "lab.sock", True)
    async with Manager("lab", FileStorage(tmp_path)):
        holder = await files_of(FileStorage(tmp_path)).holder("lab")
        assert holder is not None
        assert (holder.protocol, holder.socket, holder.kernel) == (0, "", "")


async def test_a_release(tmp_path: Path) -> None:
    """A release without a load deletes the socket file and frees the lock. A second one does nothing."""
    async with claimed(tmp_path) as claim:
        await claim.release()
        assert names(tmp_path) == ["lab.lock"]
        assert claim.listener.fileno() == -1
        async with claimed(tmp_path) as other:
            await claim.release()
            assert await claim.rebind_if_gone() is None
            assert (tmp_path / "lab.sock").exists()
            assert other.listener.fileno() >= 0


async def test_a_socket_file_of_another_program_is_left(tmp_path: Path) -> None:
    """A release deletes only its own socket file, and not a file that another program put in its place."""
    async with claimed(tmp_path) as claim:
        (tmp_path / "lab.sock").unlink()
        (tmp_path / "lab.sock").write_bytes(b"precious")
        await claim.release()
        assert (tmp_path / "lab.sock").read_bytes() == b"precious"


async def test_a_listening_socket_that_was_closed_before(tmp_path: Path) -> None:
    """The caller may close the listening socket itself. The release still deletes the socket file."""
    async with claimed(tmp_path) as claim:
        claim.listener.close()
        assert await files_of(FileStorage(tmp_path)).connect("lab") is None
        await claim.release()
        assert names(tmp_path) == ["lab.lock"]


async def test_a_claim_of_a_missing_state(tmp_path: Path) -> None:
    """With `create=False`, the claim of a missing state is refused, and no file is created."""
    with pytest.raises(UnsupportedError, match="there is no state at"):
        await files_of(FileStorage(tmp_path, create=False)).claim("lab", PROTOCOL)
    assert names(tmp_path) == []


# Claims that fail


async def test_only_one_claim_succeeds(tmp_path: Path) -> None:
    """If many claim a state at once, one of them gets it, and its socket is the one that is there."""
    results = await asyncio.gather(
        *(files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL) for _ in range(16)), return_exceptions=True
    )
    (claim,) = (result for result in results if not isinstance(result, LockedError))
    assert isinstance(claim, Claim)
    with await connected(tmp_path), accepted(claim):
        await claim.release()


async def test_a_second_claim(tmp_path: Path) -> None:
    """A second claim is a LockedError with the holder and the place. The first one goes on."""
    async with claimed(tmp_path) as claim:
        with pytest.raises(LockedError) as refused:
            await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
        assert str(refused.value) == (
            f"{tmp_path}/lab.lock is locked by {claim.holder}, another manager in this process (was its stop() called?)"
        )
        assert refused.value.place == f"{tmp_path}/lab.json"
        with await connected(tmp_path), accepted(claim):
            pass


async def test_a_state_that_is_not_shared(tmp_path: Path) -> None:
    """A manager that does not share the state is told that it could, if the state is shared or not."""
    async with claimed(tmp_path):
        with pytest.raises(LockedError, match=r"share it with Config\(shared=True\) in each of them"):
            await Manager("lab", FileStorage(tmp_path)).start()
    async with Manager("lab", FileStorage(tmp_path)):
        with pytest.raises(LockedError, match=r"share it with Config\(shared=True\) in each of them"):
            await Manager("lab", FileStorage(tmp_path)).start()


def link(path: Path) -> None:
    (path.parent / "precious").write_bytes(b"precious")
    path.symlink_to(path.parent / "precious")


def file(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("make", [bind_stale, link, file, os.mkfifo])
async def test_a_stale_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A file in the place of the socket is deleted, whatever it is. The target of a link is left."""
    make(tmp_path / "lab.sock")
    with contextlib.suppress(FileNotFoundError):
        assert (tmp_path / "lab.sock").lstat()
    async with claimed(tmp_path) as claim:
        with await connected(tmp_path), accepted(claim):
            pass
    assert not (tmp_path / "precious").exists() or (tmp_path / "precious").read_bytes() == b"precious"


async def test_a_directory_in_the_place_of_the_socket(tmp_path: Path) -> None:
    """A directory in the place of the socket is refused with its path and a remedy. The lock is free then."""
    (tmp_path / "lab.sock").mkdir()
    with pytest.raises(UnsupportedError, match=r"/lab.sock failed: Is a directory; a directory is in its place; move"):
        await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    assert await is_free(tmp_path)
    assert (tmp_path / "lab.sock").is_dir()


@pytest.mark.parametrize(
    ("code", "expected", "text"),
    [
        (errno.EPERM, UnsupportedError, "Operation not permitted; give this user the permission"),
        (errno.EADDRINUSE, UnsupportedError, "Address already in use; a shared state needs a directory that can have"),
        (errno.ENOSPC, UnavailableError, "No space left on device; free some space"),
        (errno.EIO, UnavailableError, "Input/output error; the disk may be failing"),
    ],
)
async def test_a_socket_that_cannot_be_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[StorageError], text: str
) -> None:
    """A failure of `bind` is an error with the path and a remedy. The lock is free then, and no socket is left."""

    def bind(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with (
        monkeypatch.context() as patch,
        pytest.raises(expected, match=re.escape(f"{tmp_path}/lab.sock failed: {text}")),
    ):
        patch.setattr(OwnSocket, "bind", bind)
        await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    assert await is_free(tmp_path)
    assert names(tmp_path) == ["lab.lock"]


async def test_a_socket_that_cannot_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure after `bind` leaves no socket file."""

    def listen(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patch, pytest.raises(UnsupportedError, match=r"lab\.sock failed: Operation not supp"):
        patch.setattr(OwnSocket, "listen", listen)
        await files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)
    assert names(tmp_path) == ["lab.lock"]


@pytest.mark.parametrize("call", ["claim", "connect"])
async def test_too_many_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Without a free descriptor for a socket, both calls are an UnavailableError, and nothing is changed."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    storage = files_of(FileStorage(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(UnavailableError, match="making a socket failed: Too many open"):
        patch.setattr(socket.socket, "__init__", full)
        await (storage.claim("lab", PROTOCOL) if call == "claim" else storage.connect("lab"))
    assert names(tmp_path) == []


async def test_a_damaged_state(tmp_path: Path) -> None:
    """A load that fails deletes the socket file and frees the lock. A release then does nothing."""
    (tmp_path / "lab.journal").write_bytes(b"00000000 2 H {}\n" * 3)
    async with claimed(tmp_path) as claim:
        with pytest.raises(CorruptionError):
            await claim.load()
        assert names(tmp_path) == ["lab.journal", "lab.lock"]
        with pytest.raises(CorruptionError):  # and not a LockedError
            await FileStorage(tmp_path).open("lab")


# Cancellation


async def test_a_cancelled_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that is cancelled leaves neither a lock nor a socket."""
    gate = Gate(_fs.try_lock)
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "try_lock", gate)
        await gate.cancel(asyncio.create_task(files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)))
    assert names(tmp_path) == ["lab.lock"]
    assert await is_free(tmp_path)


async def test_a_cancelled_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that is cancelled leaves neither a lock nor a socket."""
    async with claimed(tmp_path) as claim:
        gate = Gate(_file_start._load)
        with monkeypatch.context() as patch:
            patch.setattr(_file_start, "_load", gate)
            await gate.cancel(asyncio.create_task(claim.load()))
        assert names(tmp_path) == ["lab.lock"]
        assert await is_free(tmp_path)


async def test_a_cancelled_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release goes on if its caller is cancelled. The second call waits for it."""
    async with claimed(tmp_path) as claim:
        gate = Gate(_fs.unlock)
        with monkeypatch.context() as patch:
            patch.setattr(_fs, "unlock", gate)
            await gate.cancel(asyncio.create_task(claim.release()))
            await claim.release()
        assert await is_free(tmp_path)


# A socket file that is lost


async def test_a_socket_file_that_is_there(tmp_path: Path) -> None:
    """The socket is not bound anew while its file is there."""
    async with claimed(tmp_path) as claim:
        assert await claim.rebind_if_gone() is None


@pytest.mark.parametrize("make", [None, bind_stale, file])
async def test_a_socket_file_that_was_lost(tmp_path: Path, make: Callable[[Path], None] | None) -> None:
    """A socket file that was deleted or replaced is bound anew. Connections go on, and the end deletes the new file."""
    async with claimed(tmp_path) as claim:
        old = claim.listener
        with await connected(tmp_path) as mine, accepted(claim) as theirs:
            (tmp_path / "lab.sock").unlink()
            if make is not None:
                make(tmp_path / "lab.sock")
            new = await claim.rebind_if_gone()
            assert new is claim.listener is not old
            assert old.fileno() >= 0
            old.close()
            mine.send(b"still there")
            assert theirs.recv(20) == b"still there"
        assert stat.S_IMODE((tmp_path / "lab.sock").stat().st_mode) == 0o600
        with await connected(tmp_path), accepted(claim):
            pass
        assert await claim.rebind_if_gone() is None
    assert names(tmp_path) == ["lab.lock"]


async def test_a_socket_that_cannot_be_bound_anew(tmp_path: Path) -> None:
    """If no socket can be bound, the error says why, and a later call tries again."""
    async with claimed(tmp_path) as claim:
        old = claim.listener
        (tmp_path / "lab.sock").unlink()
        (tmp_path / "lab.sock").mkdir()
        for _ in range(2):
            with pytest.raises(UnsupportedError, match=r"lab\.sock failed: Is a directory"):
                await claim.rebind_if_gone()
            assert claim.listener is old
        (tmp_path / "lab.sock").rmdir()
        assert await claim.rebind_if_gone() is claim.listener is not old
        old.close()


async def test_a_lost_lock(tmp_path: Path) -> None:
    """If the lock is lost, nothing is bound: the socket file of the new owner stays, also at the end."""
    async with claimed(tmp_path) as claim:
        (tmp_path / "lab.lock").unlink()
        async with claimed(tmp_path) as newer:
            with pytest.raises(FencedError, match="another writer may own the state"):
                await claim.rebind_if_gone()
            await claim.release()
            with await connected(tmp_path), accepted(newer):
                pass


async def test_a_socket_that_is_bound_after_the_end(tmp_path: Path) -> None:
    """A socket that would replace that of a released claim is closed, and not bound."""
    async with claimed(tmp_path) as claim:
        await claim.release()
        new = OwnSocket()
        assert not claim._listener.replace(new)
        assert new.fileno() == -1
    assert names(tmp_path) == ["lab.lock"]


async def test_a_socket_file_that_cannot_be_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error at the end is ignored: the next owner deletes the file."""

    def failing(*_: object) -> bool:
        raise UnavailableError("looking up failed")

    async with claimed(tmp_path) as claim:
        with monkeypatch.context() as patch:
            patch.setattr(_lookup, "is_file", failing)
            with pytest.raises(UnavailableError, match="looking up failed"):
                await claim.rebind_if_gone()
            await claim.release()
    async with claimed(tmp_path):
        pass


def test_a_listener_is_closed_once(tmp_path: Path) -> None:
    """A second `close` does not delete the file of a later owner, even if it has the same inode number."""
    listener = Listener(address_of(str(tmp_path), "lab"), OwnSocket())
    listener.close()
    file(tmp_path / "lab.sock")
    found = (tmp_path / "lab.sock").stat()
    listener._identity = found.st_dev, found.st_ino
    listener.close()
    assert (tmp_path / "lab.sock").exists()


async def test_a_release_while_the_socket_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket file that is gone is not made again if the claim is released meanwhile."""
    async with claimed(tmp_path) as claim:
        (tmp_path / "lab.sock").unlink()
        gate = Gate(Listener.is_gone)
        monkeypatch.setattr(Listener, "is_gone", lambda listener: gate(listener))
        looking = asyncio.create_task(claim.rebind_if_gone())
        await gate.entered()
        releasing = asyncio.create_task(claim.release())
        await asyncio.sleep(0)
        gate.open()
        assert await looking is None
        await releasing
    assert names(tmp_path) == ["lab.lock"]


async def test_a_cancelled_claim_of_a_held_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled claim that fails later logs no error."""
    problems: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with claimed(tmp_path):
        gate = Gate(_claim._take)
        monkeypatch.setattr(_claim, "_take", gate)
        await gate.cancel(asyncio.create_task(files_of(FileStorage(tmp_path)).claim("lab", PROTOCOL)))
    await asyncio.to_thread(gc.collect)
    assert problems == []
