"""A foreign file in the place of a snapshot: it is kept before it is replaced, and the log says so."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from file_tools import Disk, flusher, manager

from lab_state import Manager, StorageError
from lab_state import _journal as journal
from lab_state._codec import encode_snapshot
from lab_state._journal import FrameKind
from lab_state.storage import _fs, _kept

FOREIGN = b'{"mine": 1}'
TEXT = "was put there or changed by other code while the state was in use"


def kept(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(directory.glob("lab.json.replaced-*"))]


async def checkpoint(state: Manager) -> None:
    checkpoints = flusher(state).checkpoints
    checkpoints.start()
    await checkpoints.ended()


def put(path: Path) -> None:
    """Replace the file as `cp` to a temporary name and `mv` do."""
    path.with_suffix(".new").write_bytes(FOREIGN)
    path.with_suffix(".new").replace(path)


def edit(path: Path) -> None:
    """Write another file of the same length over the file, as an editor may do."""
    data = FOREIGN + b" " * (path.stat().st_size - len(FOREIGN))
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))  # however coarse the clock of the file system is


@pytest.mark.parametrize("change", [put, edit])
@pytest.mark.parametrize("noticed", [False, True])
async def test_a_foreign_file_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, change: Callable[[Path], None], noticed: bool
) -> None:
    """Whether a commit has noticed it before, or only the checkpoint of the stop does. The state is the one in memory."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    async with manager(tmp_path) as state:
        change(tmp_path / "lab.json")
        put_there = (tmp_path / "lab.json").read_bytes()
        await state.set("b", 2)
        if noticed:
            await state.flush()
            await checkpoint(state)
    assert kept(tmp_path) == [put_there]
    assert caplog.text.count(TEXT) == 1
    assert next(record for record in caplog.records if TEXT in record.message).levelname == "ERROR"
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1, "b": 2}
    assert kept(tmp_path) == [put_there]


async def test_a_foreign_file_beside_a_new_state_is_kept(tmp_path: Path) -> None:
    """There was no snapshot when the state was started."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        put(tmp_path / "lab.json")
    assert kept(tmp_path) == [FOREIGN]


async def test_a_symbolic_link_is_kept_as_it_is(tmp_path: Path) -> None:
    """The file that it leads to is not touched."""
    target = tmp_path.parent / "target"
    target.write_bytes(FOREIGN)
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        (tmp_path / "lab.json").symlink_to(target)
    (found,) = tmp_path.glob("lab.json.replaced-*")
    assert found.readlink() == target
    assert target.read_bytes() == FOREIGN
    assert json.loads((tmp_path / "lab.json").read_bytes())["a"] == 1


@pytest.mark.parametrize("how", ["touched", "copied", "deleted"])
async def test_our_own_bytes_are_not_kept(tmp_path: Path, how: str) -> None:
    """A snapshot with another time, or a copy of it in its place, loses nothing when it is replaced."""
    path = tmp_path / "lab.json"
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    async with manager(tmp_path) as state:
        if how == "touched":
            os.utime(path, ns=(0, 0))
        elif how == "copied":
            shutil.copy(path, tmp_path / "copy")
            (tmp_path / "copy").replace(path)
        else:
            path.unlink()
        await state.set("a", 2)
    assert kept(tmp_path) == []
    assert json.loads(path.read_bytes())["a"] == 2


@pytest.mark.parametrize(
    ("found", "is_kept"),
    [
        (b"".join(encode_snapshot({"old": 1}, 1, 0, copy_loaded=False)), False),
        (b"".join(encode_snapshot({"old": 1}, 1, 0, copy_loaded=False)).replace(b"1", b"2", 1), True),
        (FOREIGN, True),
        (b"x", True),
        (b"", True),
    ],
    ids=["ours", "edited", "of another program", "no JSON", "empty"],  # the bytes of `ours` are not the same each time
)
@pytest.mark.parametrize("replaced", [False, True])
async def test_a_snapshot_that_the_start_has_not_read(
    tmp_path: Path, *, found: bytes, is_kept: bool, replaced: bool
) -> None:
    """Behind a journal with the whole state, a file is foreign if it has no valid checksum, or came after the start."""
    whole = b"".join(encode_snapshot({"a": 1}, 3, 0, copy_loaded=False))
    salt = "0" * 16
    (tmp_path / "lab.journal").write_bytes(
        journal.header("lab", salt, journal.ANY_BASE) + journal.frame(salt, FrameKind.FULL, whole)
    )
    (tmp_path / "lab.json").write_bytes(found)
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1}
        if replaced:
            put(tmp_path / "lab.json")
    expected = [FOREIGN] if replaced else [found] if is_kept else []
    assert kept(tmp_path) == expected


async def test_a_file_is_kept_once(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """Also if the first checkpoint after it fails."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await state.flush()
        put(tmp_path / "lab.json")
        disk.fail("replace", "lab.json", times=3)
        for _ in range(2):
            await checkpoint(state)
        disk.heal()
    assert kept(tmp_path) == [FOREIGN]
    assert caplog.text.count(TEXT) == 1


async def test_our_own_snapshot_is_not_kept_after_a_failed_sync(tmp_path: Path, disk: Disk) -> None:
    """After the rename, the sync of the directory fails. The next checkpoint replaces a file that this process has written."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await state.flush()
        disk.calls.clear()
        disk.fail("fsync", "directory")
        await checkpoint(state)
        assert (tmp_path / "lab.json").exists()
        assert state.status().last_error is not None
        await state.set("a", 2)
        await state.flush()
        await checkpoint(state)
    assert kept(tmp_path) == []
    assert json.loads((tmp_path / "lab.json").read_bytes())["a"] == 2


async def test_each_kept_file_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if two are kept within a millisecond."""
    monkeypatch.setattr(_kept, "wall_now", lambda: 7)
    async with manager(tmp_path) as state:
        for number in range(3):
            await state.set("a", number)
            await state.flush()
            put(tmp_path / "lab.json")
            await checkpoint(state)
    assert sorted(path.name for path in tmp_path.glob("*.replaced-*")) == [
        f"lab.json.replaced-{number}" for number in (7, 8, 9)
    ]


async def test_without_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its mode. If it cannot be copied either, it is not replaced, and the journal keeps the state."""

    def link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "lab.json"
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        put(path)
        path.chmod(0o640)
        with monkeypatch.context() as patch:
            patch.setattr(_fs, "read", failing)
            await state.flush()
            await checkpoint(state)
            assert state.status().last_error == "full"
            assert path.read_bytes() == FOREIGN
    (found,) = tmp_path.glob("lab.json.replaced-*")
    assert (found.read_bytes(), found.stat().st_mode & 0o777) == (FOREIGN, 0o640)
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1}


def failing(*_: object) -> bytes:
    raise StorageError("full")


async def test_an_unread_file_is_kept_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint cannot keep it and fails. The next one tries again."""
    whole = b"".join(encode_snapshot({"a": 1}, 3, 0, copy_loaded=False))
    head = journal.header("lab", "0" * 16, journal.ANY_BASE)
    (tmp_path / "lab.journal").write_bytes(head + journal.frame("0" * 16, FrameKind.FULL, whole))
    (tmp_path / "lab.json").write_bytes(FOREIGN)
    async with manager(tmp_path) as state:
        with monkeypatch.context() as patch:
            patch.setattr(_kept, "_keep", failing)
            await state.set("a", 2)
            await state.flush()
            await checkpoint(state)
            assert (tmp_path / "lab.json").read_bytes() == FOREIGN
    assert kept(tmp_path) == [FOREIGN]


@pytest.mark.parametrize("start", [False, True])
async def test_a_file_that_cannot_be_read_is_kept(tmp_path: Path, disk: Disk, *, start: bool) -> None:
    """It is linked, which needs no permission to read it."""
    path = tmp_path / "lab.json"
    if start:
        whole = b"".join(encode_snapshot({"a": 1}, 3, 0, copy_loaded=False))
        salt = "0" * 16
        head = journal.header("lab", salt, journal.ANY_BASE)
        (tmp_path / "lab.journal").write_bytes(head + journal.frame(salt, FrameKind.FULL, whole))
        path.write_bytes(whole)
    async with manager(tmp_path) as state:
        await state.set("a", 2)
        await state.flush()
        if not start:
            await checkpoint(state)
            os.utime(path, ns=(0, 0))
        data = path.read_bytes()
        disk.fail("open", "lab.json", errno.EACCES, times=1)
    assert kept(tmp_path) == [data]
