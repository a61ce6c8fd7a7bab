"""`FileStorage` on a disk that is full or fails."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from file_tools import (
    DUE,
    SERVED,
    Disk,
    Kept,
    Tmpfs,
    found,
    kinds,
    manager,
    run_child,
    scan,
    until,
)

from lab_state import (
    Manager,
    StorageError,
    UnavailableError,
)
from lab_state import _journal as journal
from lab_state._entries import Overlay
from lab_state.testing import ManualClock

# A full disk


def test_a_file_size_limit(tmp_path: Path) -> None:
    """After a real short write and EFBIG, flushes fail, acknowledged data are unchanged, and a higher limit lets all succeed."""
    report = run_child("limited", tmp_path / "state", returncode=-signal.SIGKILL)
    assert report == {
        "failures": ["UnavailableError"] * 3,
        "untouched": True,
        "memory": ["before", "full-0", "full-1", "full-2"],
        "appended": True,
        "durable": True,
    }
    expected = {"before": "x" * 1000} | {f"full-{number}": "y" * 1000 for number in range(3)}
    assert asyncio.run(found(tmp_path / "state")) == expected


def fill(directory: Path) -> Path:
    """Take all the room that is left."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with pytest.raises(OSError, match="No space left on device"):
                while True:
                    file.write(b"x" * size)
    return ballast


if Tmpfs.can_be_mounted_by_this_user():

    async def test_a_full_tmpfs_mounted_by_root(tmp_path: Path) -> None:
        """Needs root. On a file system that is really full, flush and checkpoint fail, and room mends all."""
        value = "v" * 5000
        with Tmpfs(tmp_path) as place:
            state = manager(place / "state", clock=ManualClock())
            await state.start()
            await state.set("before", value)
            await state.flush()
            ballast = fill(place)
            for number in range(3):
                await state.set(f"full-{number}", value)
                with pytest.raises(UnavailableError, match="No space left on device"):
                    await state.flush()
            everything = {"before": value} | {f"full-{number}": value for number in range(3)}
            assert await state.get_all() == everything
            assert kinds(place / "state") == "R"
            ballast.unlink()
            await state.flush()
            assert kinds(place / "state") == "RR"
            ballast = fill(place)
            await state.stop()  # the checkpoint fails, which loses nothing
            assert not (place / "state" / "lab.json").exists()
            # After such an end the next start has much to write, and no room for it.
            await state.start()
            assert await state.get_all() == everything
            with pytest.raises(UnavailableError, match="No space left on device"):
                await state.flush()
            assert state.durable_revision == 0
            ballast.unlink()
            await state.flush()
            await state.set("after", value)
            await state.stop()
            loaded = json.loads((place / "state" / "lab.json").read_bytes())
            loaded.pop("$lab_state")
            assert loaded == everything | {"after": value}

else:
    sys.stderr.write(
        "tests/storage/test_file_faults.py: this user cannot mount a tmpfs; RLIMIT_FSIZE alone fills the disk\n"
    )


async def test_a_failed_write_is_undone(tmp_path: Path, disk: Disk) -> None:
    """Half a frame is removed by ftruncate, and the same journal is used on."""
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 1)
    await state.flush()
    path = tmp_path / "lab.journal"
    before, inode = path.read_bytes(), path.stat().st_ino
    disk.fill("lab.journal")
    await state.set("b", 2)
    for _ in range(3):
        with pytest.raises(
            UnavailableError, match=r"No space left on device; free some space \(not durable yet"
        ) as raised:
            await state.flush()
        assert isinstance(raised.value.__cause__, OSError)
    assert path.read_bytes() == before
    assert await state.get_all() == {"a": 1, "b": 2}
    assert await found(tmp_path) == {"a": 1}
    assert (state.durable_revision, state.status().unflushed_keys) == (1, 1)
    disk.heal()
    await state.flush()
    assert (path.stat().st_ino, kinds(tmp_path)) == (inode, "RR")
    assert await found(tmp_path) == {"a": 1, "b": 2}
    await state.stop()


async def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, disk: Disk) -> None:
    """A new journal and a snapshot that do not fit on the disk are deleted, because they take up the missing space."""
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 1)
    disk.fill("lab.journal.tmp")
    with pytest.raises(UnavailableError, match="No space left on device"):
        await state.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["lab.lock"]
    disk.heal()
    await state.flush()
    disk.fail("fsync", "lab.json.tmp", errno.ENOSPC)
    await state.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lab.journal", "lab.lock"]
    assert await found(tmp_path) == {"a": 1}


async def test_a_full_disk_does_not_keep_a_state_from_being_read(crashed: Path, disk: Disk) -> None:
    """A state starts and can be read even if the lock file cannot be written."""
    disk.fail("pwrite", "lab.lock", errno.ENOSPC)
    disk.fill("lab.journal.tmp")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
        disk.heal()


# Failed syncs and renames


async def test_a_failed_ftruncate_poisons(tmp_path: Path, disk: Disk) -> None:
    """If half a frame cannot be removed, the journal is replaced by a new one with the whole state."""
    state = manager(tmp_path, clock=ManualClock())
    await state.start()
    await state.set("a", 1)
    await state.flush()
    kept = Kept(tmp_path, disk)
    disk.fill("lab.journal")
    disk.fail("ftruncate", "lab.journal")
    await state.set("b", 2)
    with pytest.raises(UnavailableError, match="No space left on device"):
        await state.flush()
    kept.freeze()
    disk.heal()
    await check_written_anew(state, tmp_path, disk, kept)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
async def test_a_failed_fdatasync_poisons(tmp_path: Path, disk: Disk, code: int) -> None:
    """After a failed sync, whatever its errno, the journal is never written again."""
    state = manager(tmp_path, clock=ManualClock())
    await state.start()
    await state.set("a", 1)
    await state.flush()
    kept = Kept(tmp_path, disk)
    disk.fail("fdatasync", "lab.journal", code)
    await state.set("b", 2)
    with pytest.raises(StorageError, match=rf"syncing .*lab\.journal failed: {os.strerror(code)}"):
        await state.flush()
    assert state.durable_revision == 1
    kept.freeze()
    await check_written_anew(state, tmp_path, disk, kept)


async def test_a_failed_fdatasync_while_the_disk_is_full(tmp_path: Path, disk: Disk) -> None:
    """While no new journal can be written, every flush fails, the old journal is not touched, and memory keeps all changes."""
    state = manager(tmp_path, clock=ManualClock())
    await state.start()
    await state.set("a", 1)
    await state.flush()
    kept = Kept(tmp_path, disk)
    disk.fail("fdatasync", "lab.journal")
    await state.set("b", 2)
    with pytest.raises(UnavailableError, match="Input/output error"):
        await state.flush()
    kept.freeze()
    disk.fill("lab.journal.tmp")
    for _ in range(2):
        with pytest.raises(UnavailableError, match="No space left on device"):
            await state.flush()
    assert await state.get_all() == {"a": 1, "b": 2}
    assert (await found(tmp_path))["a"] == 1
    disk.heal()
    await check_written_anew(state, tmp_path, disk, kept)


@pytest.mark.parametrize(("function", "name"), [("fsync", "directory"), ("replace", "lab.journal")])
async def test_a_failed_name_of_the_first_journal_poisons(tmp_path: Path, disk: Disk, function: str, name: str) -> None:
    """If the rename of a new journal fails, or the sync of its directory, the new journal is not used."""
    state = manager(tmp_path, clock=ManualClock())
    await state.start()
    await state.set("a", 1)
    disk.fail(function, name)
    with pytest.raises(UnavailableError, match="Input/output error"):
        await state.flush()
    kept = None
    if (tmp_path / "lab.journal").exists():
        kept = Kept(tmp_path, disk)
    await state.set("b", 2)
    await check_written_anew(state, tmp_path, disk, kept)


async def test_a_failed_sync_of_what_came_last_leaves_the_old_journal_in_use(tmp_path: Path, disk: Disk) -> None:
    """The end of a new journal is written after the snapshot was replaced.

    If that fails, the old journal names both snapshots.
    """
    clock = ManualClock()
    state = manager(tmp_path, clock=clock)
    await state.start()
    await state.set("a", "x" * DUE)
    await state.flush()
    gate = disk.hold("fsync", "lab.journal.tmp")
    disk.fail("fdatasync", "lab.journal.tmp")
    await gate.entered()
    inode = (tmp_path / "lab.journal").stat().st_ino
    await state.set("beside", 1)
    await state.flush()
    gate.open()
    await until(lambda: state.status().flush_failures == 1)
    await state.set("b", 2)
    await state.flush()
    assert ((tmp_path / "lab.journal").stat().st_ino, kinds(tmp_path)) == (inode, "RRCR")
    await until(lambda: not list(tmp_path.glob("*.tmp")))
    assert await found(tmp_path) == {"a": "x" * DUE, "beside": 1, "b": 2}
    await state.stop()


async def test_a_failed_fsync_of_a_new_journal_leaves_the_old_one_in_use(tmp_path: Path, disk: Disk) -> None:
    """A failure before the rename of a new journal discards the new one. The old one stays in use."""
    clock = ManualClock()
    state = manager(tmp_path, clock=clock)
    await state.start()
    await state.set("a", "x" * DUE)
    disk.fail("fsync", "lab.journal.tmp", skip=1)
    await state.flush()
    inode = (tmp_path / "lab.journal").stat().st_ino
    await until(lambda: state.status().flush_failures == 1)
    await state.set("b", 2)
    await state.flush()
    assert ((tmp_path / "lab.journal").stat().st_ino, kinds(tmp_path)) == (inode, "RR")
    await until(lambda: not list(tmp_path.glob("*.tmp")))
    assert await found(tmp_path) == {"a": "x" * DUE, "b": 2}
    await state.stop()


@pytest.mark.parametrize(
    ("function", "name", "skip"),
    [
        ("fdatasync", "lab.journal", 0),  # of the frame C: the journal itself was synced under its temporary name
        ("fsync", "directory", 1),  # behind the rename of the snapshot
        ("replace", "lab.journal", 1),  # of the new journal
        ("fsync", "directory", 2),  # behind it
    ],
)
async def test_a_checkpoint_that_fails_behind_its_rename_poisons(
    tmp_path: Path, disk: Disk, function: str, name: str, skip: int
) -> None:
    """From the frame C on, a failed sync or rename of the journal leads to a new journal with the whole state."""
    state = manager(tmp_path, clock=ManualClock())
    await state.start()
    await state.set("a", "x" * DUE)
    disk.fail(function, name, skip=skip)
    gate = disk.hold("open", "lab.json.tmp")
    await state.flush()
    await gate.entered()
    kept = Kept(tmp_path, disk)
    gate.open()
    await until(lambda: state.status().flush_failures == 1)
    kept.freeze()
    assert await found(tmp_path) == {"a": "x" * DUE}
    await state.set("b", 2)
    await check_written_anew(state, tmp_path, disk, kept)


async def check_written_anew(state: Manager, directory: Path, disk: Disk, kept: Kept | None) -> None:
    """Check that the next commit goes to a new journal with everything, and so do those after it."""
    checkpoint = disk.hold("open", "lab.json.tmp")  # so that the new journal can be looked at
    await state.flush()
    assert scan(directory).header.base == journal.ANY_BASE
    assert kinds(directory) == "F"
    inode = (directory / "lab.journal").stat().st_ino
    assert await found(directory) == await state.get_all()
    await state.set("behind", "it")
    await state.flush()
    assert kinds(directory) == "FR"
    assert (directory / "lab.journal").stat().st_ino == inode
    assert await found(directory) == await state.get_all()
    if kept is not None:
        kept.check_never_written()
    everything = await state.get_all()
    checkpoint.open()
    await state.stop()
    if kept is not None:
        kept.check_never_written()
    loaded = json.loads((directory / "lab.json").read_bytes())
    loaded.pop("$lab_state")
    assert loaded == everything


async def test_a_failed_rename_of_a_snapshot_leaves_the_journal_in_use(tmp_path: Path, disk: Disk) -> None:
    """The old journal, with its frame C, takes the next commits, and the next checkpoint succeeds."""
    clock = ManualClock()
    state = manager(tmp_path, clock=clock)
    await state.start()
    await state.set("a", "x" * DUE)
    disk.fail("replace", "lab.json")
    await state.flush()
    inode = (tmp_path / "lab.journal").stat().st_ino
    await until(lambda: state.status().flush_failures == 1)
    await state.set("b", 2)
    await state.flush()
    assert ((tmp_path / "lab.journal").stat().st_ino, kinds(tmp_path)) == (inode, "RCR")
    assert await found(tmp_path) == {"a": "x" * DUE, "b": 2}
    clock.advance(10)
    await until(lambda: (tmp_path / "lab.json").exists() and kinds(tmp_path) == "")
    assert not list(tmp_path.glob("*.tmp"))
    assert await found(tmp_path) == {"a": "x" * DUE, "b": 2}
    await state.stop()


@pytest.mark.parametrize(
    ("function", "name"), [("open", "lab.json.tmp"), ("fdatasync", "lab.json.tmp"), ("fsync", "lab.json.tmp")]
)
async def test_a_failing_checkpoint_leaves_commits_working(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, function: str, name: str
) -> None:
    """However often a checkpoint fails, commits go on. Each failure is logged, and a later checkpoint succeeds."""
    clock = ManualClock()
    state = manager(tmp_path, clock=clock)
    await state.start()
    await state.set("a", "x" * DUE)
    disk.fail(function, name, times=3)
    for number in range(3):
        await state.set("number", number)
        await state.flush()
        await until(lambda number=number: state.status().flush_failures == number + 1)  # type: ignore[misc]
        assert await found(tmp_path) == {"a": "x" * DUE, "number": number}
        clock.advance(4 if number < 2 else 0)
    assert [record.levelname for record in caplog.records if "a checkpoint failed" in record.message] == ["WARNING"] * 3
    clock.advance(10)
    await until(lambda: kinds(tmp_path) == "")
    await state.stop()


async def test_a_commit_beside_the_repair_of_a_poisoned_journal_survives(tmp_path: Path, disk: Disk) -> None:
    """A change acknowledged while a checkpoint repairs the journal is on disk from then on, at every moment."""
    clock = ManualClock()
    state = manager(tmp_path, clock=clock)
    await state.start()
    for number in range(10):
        await state.set(f"large-{number}", "x" * 450_000)
    disk.fail("fsync", "directory", skip=1)  # in the checkpoint, which poisons the journal
    await state.flush()
    await until(lambda: state.status().flush_failures == 1)
    await state.set("in-the-view", 1)
    gate = disk.hold("open", "lab.json.tmp")
    clock.advance(1)
    await until(lambda: isinstance(state._core.state.entries, Overlay))  # the view was taken
    await state.set("after-the-view", 2)
    await state.flush()
    acknowledged = await state.get_all()
    try:
        assert await found(tmp_path) == acknowledged
        await until(lambda: state.status().flush_failures == 2)  # the checkpoint gives way to the commit
        assert await found(tmp_path) == acknowledged
        clock.advance(1)
        await gate.entered()
        assert await found(tmp_path) == acknowledged
        await state.set("later", 3)
        await state.flush()
        assert await found(tmp_path) == acknowledged | {"later": 3}
    finally:
        gate.open()
        await state.stop()
    assert await found(tmp_path) == acknowledged | {"later": 3}


async def test_a_failed_sync_of_a_restored_snapshot_is_not_repeated(tmp_path: Path, disk: Disk) -> None:
    """A snapshot whose sync failed is never relied on: the next journal starts with the whole state."""
    (tmp_path / "lab.json").write_bytes(b'{"a":1}')
    state = manager(tmp_path)
    await state.start()
    await state.set("b", 2)
    disk.fail("fsync", "lab.json")
    with pytest.raises(UnavailableError, match="Input/output error"):
        await state.flush()
    checkpoint = disk.hold("open", "lab.json.tmp")
    disk.calls.clear()
    await state.flush()
    assert kinds(tmp_path) == "F"
    assert "lab.json" not in [Path(call.path).name for call in disk.calls if call.function == "fsync"]
    assert await found(tmp_path) == {"a": 1, "b": 2}
    checkpoint.open()
    await state.stop()


async def test_a_checkpoint_repairs_a_poisoned_journal_by_itself(tmp_path: Path, disk: Disk) -> None:
    """If the last checkpoint failed after the rename, and nothing changed since, stop() still leaves one clean file."""
    state = manager(tmp_path, clock=ManualClock())
    await state.start()
    await state.set("large", "x" * 2 * DUE)
    disk.fail("fsync", "directory", skip=1)  # behind the rename of the snapshot
    await state.flush()
    await until(lambda: state.status().flush_failures == 1)
    await state.stop()
    assert kinds(tmp_path) == ""
    assert await found(tmp_path) == {"large": "x" * 2 * DUE}


async def test_a_journal_that_cannot_be_looked_up_leaves_no_descriptor(tmp_path: Path, disk: Disk) -> None:
    """A new journal for which `fstat` fails is closed and deleted, and the previous one stays in use."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        before = len(list(Path("/proc/self/fd").iterdir()))
        disk.fail("fstat", "lab.journal.tmp", errno.ESTALE, times=5)
        for _ in range(5):
            with pytest.raises(UnavailableError, match="looking up"):
                await state.flush()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert not list(tmp_path.glob("*.tmp"))
        await state.flush()
    assert await found(tmp_path) == {"a": 1}
