"""Faults of the disk during `backup()`: the older backup stays whole, and no temporary file is left."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from file_tools import Disk
from s3_world import Bucket

from lab_state import FileStorage, Manager, MemoryStorage, StorageError, UnavailableError, UnsupportedError
from lab_state._codec import decode_snapshot
from lab_state.storage import _fs

BACKS_UP = """
import asyncio, sys
from lab_state import Manager, MemoryStorage

async def main():
    async with Manager("test", MemoryStorage()) as state:
        await state.set_many({f"{number}": "x" * 1000 for number in range(1_000)})
        while True:
            await state.set("a", 1)
            print(await state.backup(sys.argv[1] + "/b.json"), flush=True)

asyncio.run(main())
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("function", "name", "code", "error"),
    [
        ("open", "b.json.tmp", errno.EROFS, UnsupportedError),
        ("open", "b.json.tmp", errno.EACCES, UnsupportedError),
        ("open", "b.json.tmp", errno.ENOSPC, UnavailableError),
        ("fdatasync", "b.json.tmp", errno.EIO, UnavailableError),
        ("fsync", "b.json.tmp", errno.ENOSPC, UnavailableError),
        ("replace", "b.json", errno.EIO, UnavailableError),
    ],
)
async def test_a_failure_before_the_rename_leaves_the_older_backup(
    tmp_path: Path, disk: Disk, *, function: str, name: str, code: int, error: type[StorageError]
) -> None:
    """The error has the reason of the system. The manager goes on, and the next backup succeeds."""
    place = tmp_path / "backups"
    place.mkdir()
    async with Manager("test", MemoryStorage()) as state:
        await state.set_many({f"{number}": "x" * 1000 for number in range(3_000)})
        await state.backup(place / "b.json")
        before = (place / "b.json").read_bytes()
        await state.set("a", 1)
        disk.fail(function, name, code)
        with pytest.raises(error, match=os.strerror(code)):
            await state.backup(place / "b.json")
        assert names(place) == ["b.json"]
        assert (place / "b.json").read_bytes() == before
        assert await state.backup(place / "b.json") == 2


async def test_a_failed_sync_of_the_directory_is_an_error(tmp_path: Path, disk: Disk) -> None:
    """The new backup is there, but it may be lost in a power cut."""
    async with Manager("test", MemoryStorage()) as state:
        await state.set("a", 1)
        disk.fail("fsync", "above")
        with pytest.raises(UnavailableError, match="syncing the directory"):
            await state.backup(tmp_path / "b.json")
    assert names(tmp_path) == ["b.json"]


async def test_without_room_there_is_no_backup(tmp_path: Path) -> None:
    """A real limit of the file size strikes in the middle of the file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with Manager("test", MemoryStorage()) as state:
        await state.set_many({f"{number}": "x" * 1000 for number in range(2_000)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(UnavailableError, match="raise the limit"):
                await state.backup(tmp_path / "b.json")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == []
        await state.backup(tmp_path / "b.json")


async def test_a_file_that_other_code_cut_off_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is checked before the rename."""
    finish = _fs.NewFile.finish

    def cut_off(self: _fs.NewFile) -> None:
        finish(self)
        os.truncate(self.path, 3)

    monkeypatch.setattr(_fs.NewFile, "finish", cut_off)
    async with Manager("test", MemoryStorage()) as state:
        await state.set("a", 1)
        with pytest.raises(UnavailableError, match="is not what was written"):
            await state.backup(tmp_path / "b.json")
    assert names(tmp_path) == []


async def test_a_disk_that_hangs_does_not_delay_a_cancellation(tmp_path: Path, disk: Disk) -> None:
    """The file is deleted when the disk answers."""
    async with Manager("test", MemoryStorage()) as state:
        await state.set("a", 1)
        gate = disk.hold("fsync", "b.json.tmp")
        backup = asyncio.create_task(state.backup(tmp_path / "b.json"))
        await gate.entered()
        backup.cancel()
        with pytest.raises(asyncio.CancelledError):
            await backup
    assert len(names(tmp_path)) == 1
    gate.open()
    async with asyncio.timeout(10):
        while names(tmp_path) and not (tmp_path / "b.json").exists():  # noqa: ASYNC110 -- a thread deletes it
            await asyncio.sleep(0)
    assert [name for name in names(tmp_path) if name.endswith(".tmp")] == []


def test_a_process_that_is_killed_leaves_a_whole_backup(tmp_path: Path) -> None:
    """The backup at the path is the older one or the new one. A temporary file may be left."""
    child = subprocess.Popen([sys.executable, "-c", BACKS_UP, tmp_path], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = [int(child.stdout.readline()) for _ in range(4)][-1]
    child.kill()
    child.communicate()
    assert decode_snapshot((tmp_path / "b.json").read_bytes(), "b.json").revision >= acknowledged
    assert all(name == "b.json" or name.endswith(".tmp") for name in names(tmp_path))


async def test_a_state_in_s3_is_backed_up_to_a_local_file(tmp_path: Path, bucket: Bucket) -> None:
    """The file can be opened by a `FileStorage`."""
    async with Manager("test", bucket.storage()) as state:
        await state.set("a", [1], ttl=1000)
        revision = await state.backup(tmp_path / "test.json")
    async with Manager("test", FileStorage(tmp_path)) as state:
        assert (await state.get_all(), state.revision) == ({"a": [1]}, revision)
        assert 0 < (await state.expires_in("a") or 0) <= 1000
