"""The files of a running manager that others change, and its lock."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path

import pytest
from file_tools import (
    SERVED,
    Disk,
    contents,
    flusher,
    found,
    kill,
    kinds,
    manager,
    run_child,
    start_child,
    view,
)

from lab_state import (
    CorruptionError,
    FencedError,
    FileStorage,
    LockedError,
    StorageError,
    UnavailableError,
)
from lab_state.storage._lock import Lock

# Files that change under a running manager


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_journal_that_disappears_is_written_anew(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, *, replaced: bool
) -> None:
    """A journal deleted or replaced under a running manager is noticed, logged, and written anew with everything."""
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 1)
    await state.flush()
    path = tmp_path / "lab.journal"
    if replaced:
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)
    else:
        path.unlink()
    checkpoint = disk.hold("open", "lab.json.tmp")
    await state.set("b", 2)
    await state.flush()
    assert [r.levelname for r in caplog.records if "lab.journal was deleted or replaced" in r.message] == ["ERROR"]
    assert kinds(tmp_path) == "F"
    assert await found(tmp_path) == {"a": 1, "b": 2}
    checkpoint.open()
    await state.stop()
    assert await found(tmp_path) == {"a": 1, "b": 2}


async def test_a_journal_that_disappears_before_a_checkpoint(tmp_path: Path) -> None:
    """A clean stop after the journal was deleted still leaves everything."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await state.flush()
        (tmp_path / "lab.journal").unlink()
        await state.set("b", 2)
    assert await found(tmp_path) == {"a": 1, "b": 2}


async def test_a_journal_that_disappears_behind_the_last_flush(tmp_path: Path) -> None:
    """A journal that is deleted after the last flush: a clean stop with nothing to flush still writes everything."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await state.flush()
        (tmp_path / "lab.journal").unlink()
    assert await found(tmp_path) == {"a": 1}


@pytest.mark.parametrize("moment", ["new journal", "old journal", "after a checkpoint"])
@pytest.mark.parametrize("replaced", [None, b'{"other":1}'])
async def test_a_snapshot_that_disappears_is_written_anew(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, replaced: bytes | None, moment: str
) -> None:
    """A snapshot deleted or replaced under a running manager is noticed by the next commit, which holds everything."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    state = manager(tmp_path)
    await state.start()
    if moment != "new journal":
        await state.set("b", 2)
        await state.flush()
    if moment == "after a checkpoint":
        await flusher(state).checkpoints.write(wait=False)
    path = tmp_path / "lab.json"
    path.unlink()
    if replaced is not None:
        path.write_bytes(replaced)
    checkpoint = disk.hold("open", "lab.json.tmp")
    await state.set("b", 3)
    await state.flush()
    assert [r.levelname for r in caplog.records if "lab.json was deleted or replaced" in r.message] == ["ERROR"]
    assert kinds(tmp_path) == "F"
    assert await found(tmp_path) == {"a": 1, "b": 3}
    checkpoint.open()
    await state.stop()
    assert kinds(tmp_path) == ""
    assert await found(tmp_path) == {"a": 1, "b": 3}


async def test_a_snapshot_that_disappears_before_a_checkpoint(tmp_path: Path) -> None:
    """A clean stop writes a new snapshot in place of a deleted one, because everything is in memory."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    async with manager(tmp_path) as state:
        await state.set("b", 2)
        await state.flush()
        (tmp_path / "lab.json").unlink()
    assert kinds(tmp_path) == ""
    assert await found(tmp_path) == {"a": 1, "b": 2}


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_lock_file_that_disappears_fences(tmp_path: Path, *, replaced: bool) -> None:
    """A writer whose lock file was deleted or replaced writes nothing more: another may own the state."""
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 1)
    await state.flush()
    before = contents(tmp_path)
    (tmp_path / "lab.lock").unlink()
    if replaced:
        (tmp_path / "lab.lock").touch()
    await state.set("b", 2)
    with pytest.raises(FencedError, match=r"lab\.lock was deleted or replaced.*end this process, and start it again"):
        await state.flush()
    with pytest.raises(FencedError):
        await state.stop()
    assert contents(tmp_path) == before
    assert await found(tmp_path) == {"a": 1}


async def test_a_directory_that_disappears(tmp_path: Path) -> None:
    """A commit raises a `StorageError` when the directory was deleted, or a file is in its place."""
    directory = tmp_path / "state"
    session = await FileStorage(directory).open("lab")
    shutil.rmtree(directory)
    with pytest.raises(FencedError):
        await session.commit(b"record", view(b"{}"))
    directory.write_bytes(b"")
    with pytest.raises(StorageError):
        await session.commit(b"record", view(b"{}"))
    await session.aclose()


# The lock


async def test_two_managers_in_one_process(tmp_path: Path) -> None:
    """A second manager of the same name gets an error with host and pid, and can start after the first one stopped."""
    first, second = manager(tmp_path), manager(tmp_path)
    await first.start()
    with pytest.raises(LockedError, match=rf"locked by pid {os.getpid()} on {socket.gethostname()}, since \d{{4}}-"):
        await second.start()
    await first.set("a", 1)
    await first.stop()
    async with second:
        assert await second.get_all() == {"a": 1}


async def test_two_processes(tmp_path: Path) -> None:
    """A state that another process owns is refused, with its host and pid.

    When that process ends, the state is free.
    """
    child = start_child("serve", tmp_path)
    with pytest.raises(
        LockedError, match=rf"locked by pid {child.pid} on {socket.gethostname()}, .*stop that writer first"
    ):
        await manager(tmp_path).start()
    kill(child)
    async with manager(tmp_path) as state:
        assert await state.get_all() == SERVED


async def test_a_lock_whose_owner_has_not_said_who_it_is(tmp_path: Path) -> None:
    """A lock is respected whatever the lock file contains."""
    async with manager(tmp_path):
        for text in (b"", b"\xff", b"[]"):
            (tmp_path / "lab.lock").write_bytes(text)
            with pytest.raises(LockedError, match=rf"locked by pid {os.getpid()}, another manager in this process"):
                await manager(tmp_path).start()


async def test_the_lock_file_stays(tmp_path: Path) -> None:
    """The lock file is never renamed nor deleted. Otherwise two processes could lock two files."""
    inodes = set()
    for _ in range(3):
        async with manager(tmp_path) as state:
            await state.incr("n")
        inodes.add((tmp_path / "lab.lock").stat().st_ino)
    assert len(inodes) == 1


async def test_a_failed_start_releases_the_lock(tmp_path: Path) -> None:
    """After a start that found a damaged snapshot, the lock is free, for this manager and for others."""
    (tmp_path / "lab.json").write_bytes(b'{"a":')
    state = manager(tmp_path)
    for _ in range(2):
        with pytest.raises(CorruptionError):
            await state.start()
    (tmp_path / "lab.json").write_bytes(b'{"a":1}')
    async with manager(tmp_path) as other:
        assert await other.get_all() == {"a": 1}
    async with state:
        assert await state.get_all() == {"a": 1}


async def test_a_cancelled_start_releases_the_lock(tmp_path: Path, disk: Disk) -> None:
    """A start cancelled while its thread takes the lock ends only when the lock is free again."""
    gate = disk.hold("open", "lab.lock")
    state = manager(tmp_path)
    starting = asyncio.create_task(state.start())
    await gate.entered()
    starting.cancel()
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await starting
    async with manager(tmp_path):
        pass
    async with state:
        pass


async def test_a_hung_write_keeps_the_lock(tmp_path: Path, disk: Disk) -> None:
    """When stop() runs out of time over a write that hangs, the state stays locked until the write ends."""
    state = manager(tmp_path, stop_timeout=0.05)
    await state.start()
    await state.set("a", 1)
    await state.flush()
    await state.set("b", 2)
    ending = flusher(state)
    gate = disk.hold("fdatasync", "lab.journal")
    flush = asyncio.create_task(state.flush())
    await gate.entered()
    with pytest.raises(UnavailableError, match=r"no progress for 0\.05 s"):
        await state.stop()
    with pytest.raises(StorageError):
        await flush
    for _ in range(2):
        with pytest.raises(LockedError):
            await manager(tmp_path).start()
    gate.open()
    await asyncio.wait({ending._task})
    async with manager(tmp_path) as other:
        assert await other.get_all() == {"a": 1, "b": 2}


async def test_a_hung_checkpoint_keeps_the_lock(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """When stop() runs out of time during a checkpoint, everything is durable, and the state stays locked until it ends."""
    state = manager(tmp_path, stop_timeout=0.05)
    await state.start()
    await state.set("a", 1)
    ending = flusher(state)
    gate = disk.hold("fsync", "lab.json.tmp")
    await state.stop()
    assert "the storage made no progress for 0.05 s during stop()" in caplog.text
    with pytest.raises(LockedError):
        await manager(tmp_path).start()
    assert await found(tmp_path) == {"a": 1}
    gate.open()
    await asyncio.wait({ending._task})
    async with manager(tmp_path) as other:
        assert await other.get_all() == {"a": 1}


def test_a_forked_child_cannot_use_the_session(tmp_path: Path) -> None:
    """A child process that uses the session it inherited gets `UnsupportedError`, and the parent goes on."""
    report = run_child("forked", tmp_path / "state")
    for call in ("commit", "checkpoint"):
        error, message = report[call]
        assert (call, error) == (call, "UnsupportedError")
        assert "fork" in message
    assert asyncio.run(found(tmp_path / "state")) == {"parent": 2}


def test_a_forked_child_cannot_use_the_manager(tmp_path: Path) -> None:
    """A child process that uses an inherited manager, in the inherited loop, gets an error at once that says why."""
    report = run_child("inherited", tmp_path / "state")
    for call in ("set", "flush", "stop", "start"):
        error, message = report[call]
        assert (call, error) == (call, "UnsupportedError")
        assert "runs in the parent of this forked process" in message
    assert report["parent"] == [2, 0]
    assert asyncio.run(found(tmp_path / "state")) == {"parent": 2}


def test_stop_releases_the_lock_from_a_forked_child(tmp_path: Path) -> None:
    """A child process that inherited the lock and lives on does not keep it after the parent has stopped."""
    assert run_child("outlived", tmp_path / "state") == {"error": None, "message": ""}


def test_a_lock_is_released_once(tmp_path: Path) -> None:
    """A second release does not close a file that got the same descriptor number meanwhile."""
    lock = Lock(str(tmp_path / "lab.lock"))
    lock.release()
    with (tmp_path / "other").open("w") as other:
        lock.release()
        other.write("still open")
