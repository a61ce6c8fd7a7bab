"""What killed processes leave beside the files of a state, and how a start finds it: by the lock file, as a rule."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab_state import Config, FileStorage, Manager
from lab_state.storage import _fs, _lock, _lookup

KILLED = """
import asyncio, os, signal, sys
from lab_state import Config, FileStorage, Manager
from lab_state.storage import _fs
directory, function = sys.argv[1:]
real, calls = getattr(_fs, function), 0

def kill(*arguments):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

async def main():
    async with Manager(Config(name="lab", flush_interval=0), FileStorage(directory)) as state:
        await state.set("a", 1)
        setattr(_fs, function, kill)
        await state.set("b", "x" * 5 * 1024 * 1024)
        await asyncio.Event().wait()

asyncio.run(main())
"""
"""Ends in the middle of a checkpoint."""


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the directories that were listed."""
    found: list[str] = []
    real = _lookup.names_in

    def names_in(directory: str) -> list[str]:
        found.append(directory)
        return real(directory)

    monkeypatch.setattr(_lookup, "names_in", names_in)
    return found


async def life(directory: Path, storage: FileStorage | None = None) -> None:
    """Start, checkpoint, and stop cleanly."""
    async with Manager(Config(name="lab", flush_interval=0), storage or FileStorage(directory)) as state:
        await state.incr("n")


def temporary(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.tmp"))


def said(directory: Path) -> dict[str, Any]:
    """Return what the lock file says."""
    found: dict[str, Any] = json.loads((directory / "lab.lock").read_bytes())
    return found


async def test_a_start_does_not_list_the_directory(tmp_path: Path, listed: list[str]) -> None:
    """A start does not list the directory, neither for a new state nor for one that was stopped cleanly."""
    for _ in range(3):
        await life(tmp_path)
        assert said(tmp_path)["making"] == []
    assert listed == []


@pytest.mark.parametrize("function", ["_sync", "rename"])
def test_what_a_kill_leaves_is_deleted_by_name(tmp_path: Path, listed: list[str], function: str) -> None:
    """A checkpoint notes its temporary files. If the process is killed, the next start deletes exactly those."""
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path, function], timeout=60, check=False)
    assert killed.returncode == -9
    left = temporary(tmp_path)
    assert left
    assert set(left) <= set(said(tmp_path)["making"])
    foreign = tmp_path / "other.json.01234567.tmp"
    foreign.touch()
    asyncio.run(life(tmp_path))
    assert temporary(tmp_path) == [foreign.name]
    assert said(tmp_path)["making"] == []
    assert listed == []


STALE = ("lab.json.01234567.tmp", "lab.journal.89abcdef.tmp")


def spoil(directory: Path, how: str) -> None:
    """Make it unknown what the last session has left."""
    lock = directory / "lab.lock"
    match how:
        case "no lock file":
            lock.unlink()
        case "a copy":
            shutil.copy(lock, directory / "copy")
            (directory / "copy").replace(lock)
        case "another boot":
            lock.write_text(json.dumps(said(directory) | {"boot": "f" * 36}))
        case "an older version":
            lock.write_text(json.dumps({key: said(directory)[key] for key in ("host", "pid", "started")}))
        case "another file's name":
            lock.write_text(json.dumps(said(directory) | {"making": ["../precious", "other.json.01234567.tmp"]}))
        case _:
            lock.write_text("cut off")


@pytest.mark.parametrize(
    "how", ["no lock file", "a copy", "another boot", "an older version", "another file's name", "nothing that is read"]
)
async def test_where_the_lock_file_does_not_say_it(tmp_path: Path, listed: list[str], how: str) -> None:
    """If the lock file does not name the temporary files, the directory is listed once for a storage object."""
    directory = tmp_path / "state"
    for name in ("lab", "other"):
        async with Manager(name, FileStorage(directory)) as state:
            await state.set("a", 1)
    others = (tmp_path / "precious", directory / "other.json.01234567.tmp")
    for path in (*others, *(directory / name for name in STALE)):
        path.touch()
    spoil(directory, how)
    storage = FileStorage(directory)
    await life(directory, storage)
    assert temporary(directory) == ["other.json.01234567.tmp"]
    assert listed == [str(directory)]
    assert all(path.exists() for path in others)
    spoil(directory, how)
    await life(directory, storage)
    assert len(listed) == 1


async def test_what_cannot_be_deleted_is_noted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file that cannot be deleted is noted again, and the first start that can deletes it."""
    await life(tmp_path)
    (tmp_path / STALE[0]).touch()
    (tmp_path / "lab.lock").write_text(json.dumps(said(tmp_path) | {"making": [STALE[0]]}))
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "discard", lambda path: None)
        async with Manager("lab", FileStorage(tmp_path)):
            left = said(tmp_path)["making"]
    assert STALE[0] in left
    assert left == temporary(tmp_path)  # also what this start has made, to try the directory out
    await life(tmp_path)
    assert (temporary(tmp_path), said(tmp_path)["making"]) == ([], [])


async def test_a_kernel_that_does_not_tell_its_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: list[str]
) -> None:
    """Without a boot id nothing in a lock file is relied on."""
    _lock._boot.cache_clear()
    real = _fs.read
    monkeypatch.setattr(_fs, "read", lambda path, *most: None if "boot_id" in path else real(path, *most))
    await life(tmp_path)
    (tmp_path / STALE[0]).touch()
    await life(tmp_path)
    _lock._boot.cache_clear()
    assert temporary(tmp_path) == []
    assert listed


def test_a_lock_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: list[str]) -> None:
    """A lock file that cannot be written on a full disk is emptied, so it says nothing false.

    The next start lists the directory.
    """
    asyncio.run(life(tmp_path))

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    lock = _lock.Lock(str(tmp_path / "lab.lock"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        lock.note(str(tmp_path / STALE[0]))
    lock.release()
    assert (tmp_path / "lab.lock").read_bytes() == b""
    (tmp_path / STALE[0]).touch()
    asyncio.run(life(tmp_path))
    assert temporary(tmp_path) == []
    assert listed


async def test_torn_tails_are_counted_by_the_storage_object(tmp_path: Path, listed: list[str]) -> None:
    """The newest five torn tails are kept, and the directory is listed once."""
    storage = FileStorage(tmp_path)
    await life(tmp_path, storage)
    for _ in range(8):
        with (tmp_path / "lab.journal").open("ab") as file:
            file.write(b"torn")
        await life(tmp_path, storage)
    assert len(list(tmp_path.glob("lab.journal.torn-*"))) <= 5
    assert listed == [str(tmp_path)]


async def test_a_storage_object_can_be_given_to_another_process(tmp_path: Path) -> None:
    """A copy of a used storage object has threads of its own, and makes its own listings."""
    storage = FileStorage(tmp_path)
    await life(tmp_path, storage)
    await life(tmp_path, pickle.loads(pickle.dumps(storage)))
