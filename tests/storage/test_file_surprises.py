"""Files that are not as `FileStorage` left them: links, FIFOs, mount points, copies, changes under a running manager."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from running import flusher_of

from lab_state import (
    Config,
    FencedError,
    FileStorage,
    LockedError,
    Manager,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from lab_state import _journal as journal
from lab_state._journal import FrameKind
from lab_state.integrations._lifespan import health_of
from lab_state.storage import _directory, _file_writer, _fs, _lock, _lookup, _os_errors
from lab_state.storage._file_writer import Writer
from lab_state.storage._new_journal import NewJournal
from lab_state.storage.file import FileSession

FILES = ["lab.json", "lab.journal", "lab.lock"]


def manager(directory: Path, name: str = "lab", **settings: Any) -> Manager:
    return Manager(Config(name=name, **{"flush_interval": 0, **settings}), FileStorage(directory))


def session(state: Manager) -> FileSession:
    found = flusher_of(state)._session
    assert isinstance(found, FileSession)
    return found


def writer(state: Manager) -> Writer:
    return session(state)._writer


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the synced paths, in order; temporary names without their unique part."""
    paths: list[str] = []

    def noting(real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            real(fd)
            paths.append(re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", str(Path(f"/proc/self/fd/{fd}").readlink())))

        return sync

    monkeypatch.setattr(_fs.os, "fsync", noting(os.fsync))  # type: ignore[attr-defined]
    return paths


# Names that are not those of regular files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dangling", [False, True])
async def test_a_link_in_place_of_a_file(tmp_path: Path, name: str, *, dangling: bool) -> None:
    """A symbolic link in place of a file is refused, broken or not, and its target is not changed."""
    directory, target = tmp_path / "state", tmp_path / "target"
    directory.mkdir()
    if not dangling:
        target.write_bytes(b'{"precious":1}')
    (directory / name).symlink_to(target)
    with pytest.raises(UnsupportedError, match=rf"{name} is a symbolic link: put the file itself there"):
        await manager(directory).start()
    assert (directory / name).is_symlink()
    assert target.exists() != dangling
    assert dangling or target.read_bytes() == b'{"precious":1}'


@pytest.mark.parametrize("name", FILES)
async def test_a_fifo_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    """A FIFO in place of a file is refused at once. Opening it would wait for its other end."""
    os.mkfifo(tmp_path / name)
    async with asyncio.timeout(10):
        with pytest.raises(UnsupportedError, match=rf"{name} is a FIFO, not a file: move it away"):
            await manager(tmp_path).start()


@pytest.mark.parametrize("name", FILES)
async def test_a_fifo_that_takes_the_place_of_a_file_while_it_is_opened(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type is checked again after opening, because a FIFO put there meanwhile would read as an empty file."""
    os.mkfifo(tmp_path / name)
    real = _os_errors.check_regular

    def late(path: str, mode: int) -> None:
        if path.endswith(name) and not late_calls:
            late_calls.append(path)
        else:
            real(path, mode)

    late_calls: list[str] = []
    monkeypatch.setattr(_fs, "check_regular", late)
    with pytest.raises(UnsupportedError, match=rf"{name} is a FIFO"):
        await manager(tmp_path).start()
    assert late_calls


@pytest.mark.parametrize("kind", [stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
def test_what_else_a_name_may_stand_for(kind: int) -> None:
    """Sockets and devices are refused; a regular file is not."""
    with pytest.raises(UnsupportedError, match=r"x is a (socket|device), not a file: move it away"):
        _os_errors.check_regular("x", kind | 0o600)
    _os_errors.check_regular("x", stat.S_IFREG | 0o600)


async def test_a_lock_file_that_becomes_a_link_fences(tmp_path: Path) -> None:
    """A lock file that was replaced by a link to it fences the writer: another process would refuse the link."""
    async with manager(tmp_path / "state") as state:
        await state.set("a", 1)
        lock = tmp_path / "state" / "lab.lock"
        lock.rename(tmp_path / "moved")
        lock.symlink_to(tmp_path / "moved")
        assert not _lookup.is_file(str(lock), (lock.stat().st_dev, lock.stat().st_ino))
        lock.unlink()
        (tmp_path / "moved").rename(lock)


# Names that are no text


async def test_a_host_name_that_is_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name that is not UTF-8 is written to the lock file as far as possible, and the second writer's message has it."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h\udcff")
    async with manager(tmp_path):
        with pytest.raises(LockedError, match=r"on h\?, since"):
            await manager(tmp_path).start()


# Places where no state can be kept


async def test_a_mount_point_in_place_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point in place of a file is refused at the start, because no rename can replace it."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    for name in ("lab.json", "lab.journal"):
        monkeypatch.setattr(_directory, "_mount_of", lambda path, name=name: name in path)
        with pytest.raises(UnsupportedError, match=rf"{name} is a mount point.* mount its directory instead"):
            await manager(tmp_path).start()


def test_what_is_mounted_where(tmp_path: Path) -> None:
    """Two mounts are told apart, even of one file system.

    The flags of `chattr` are read if the file system has them.
    """
    file = tmp_path / "file"
    file.touch()
    assert _directory._mount_of("/proc") != _directory._mount_of("/") == _directory._mount_of("/") != b""
    assert _directory._mount_of(str(file)) == _directory._mount_of(str(tmp_path))
    assert not _directory._flags_of(str(file)) & _directory._UNCHANGEABLE
    assert _directory._flags_of("/proc/self/status") == 0


async def test_another_users_file_under_the_sticky_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another user in a directory with the sticky bit is refused at the start: this user cannot replace it."""
    (tmp_path / "lab.json").write_bytes(b"{}")
    tmp_path.chmod(0o1777)
    async with manager(tmp_path):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(
        UnsupportedError, match=r"lab\.json belongs to another user, and its directory has the sticky bit"
    ):
        await manager(tmp_path).start()
    tmp_path.chmod(0o777)
    async with manager(tmp_path):
        pass


async def test_an_immutable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An immutable file is refused at the start."""
    (tmp_path / "lab.json").write_bytes(b"{}")
    monkeypatch.setattr(_directory, "_flags_of", lambda path: 0x10)
    with pytest.raises(UnsupportedError, match=r"lab\.json is immutable or append-only: run `chattr -i -a` on it"):
        await manager(tmp_path).start()


def fail(patch: pytest.MonkeyPatch, function: str, code: int) -> None:
    """Make a function of the kernel's fail."""

    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    patch.setattr(_fs.os, function, failing)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("function", "code", "told"),
    [
        ("replace", errno.EIO, r"renaming .* failed: Input/output error"),
        ("replace", errno.EPERM, r"renaming .* failed: .*; give this user the permission"),
        (
            "fsync",
            errno.EINVAL,
            r"syncing the directory .* failed: a directory cannot be synced; .*choose ano",
        ),
        (
            "fsync",
            errno.ENOSYS,
            r"syncing the directory .* failed: a directory cannot be synced; .*choose ano",
        ),
    ],
)
async def test_a_directory_in_which_a_commit_would_fail(tmp_path: Path, function: str, code: int, told: str) -> None:
    """A directory in which a commit would fail is refused at the start. No file is left, and the lock is released."""
    state = manager(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, function, code)
        with pytest.raises(StorageError, match=told):
            await state.start()
    assert [path.name for path in tmp_path.iterdir()] == ["lab.lock"]
    async with state:
        await state.set("a", 1)


async def test_a_trial_whose_sync_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If the sync at the start fails, the names found cannot be made durable, so the first commit writes everything anew."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    state = manager(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, "fsync", errno.EIO)
        await state.start()
    assert "the next commit writes everything anew: syncing the directory" in caplog.text
    await state.set("b", 2)
    assert writer(state).generation
    await state.stop()
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1, "b": 2}


async def test_a_directory_that_became_read_only(tmp_path: Path) -> None:
    """A directory that became read-only is refused at the start, although its files can be opened."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    with pytest.MonkeyPatch.context() as patch:
        real = os.open

        def opened(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_EXCL:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return real(path, flags, mode)

        patch.setattr(_fs.os, "open", opened)  # type: ignore[attr-defined]
        with pytest.raises(UnsupportedError, match=r"creating .* failed: Permission denied; give this user the"):
            await manager(tmp_path).start()


async def test_a_full_disk_is_no_reason_not_to_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a full disk a start succeeds with a warning, the state can be read, and the next start tries the directory again."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    storage = FileStorage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, "replace", errno.ENOSPC)
        async with Manager("lab", storage) as state:
            assert await state.get_all() == {"a": 1}
    assert "but cannot be written to now" in caplog.text
    assert storage._tried == set()


async def test_a_directory_is_tried_out_once_for_each_storage(tmp_path: Path, synced: list[str]) -> None:
    """Only the first start of a storage object tries the directory out. A start without a commit syncs nothing else."""
    storage = FileStorage(tmp_path)
    for name, expected in (("one", [str(tmp_path)]), ("two", []), ("one", [])):
        synced.clear()
        async with Manager(name, storage):
            assert synced == expected


async def test_a_current_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a current directory an absolute path works. A relative one is refused with the remedy."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    async with manager(tmp_path / "state") as state:
        await state.set("a", 1)
    with pytest.raises(
        UnsupportedError, match=r"'state' cannot be resolved, because the current directory .* give an absolute"
    ):
        await Manager("lab", FileStorage("state")).start()
    monkeypatch.chdir("/")


def test_a_path_that_cannot_be_encoded() -> None:
    """A path that cannot be encoded is refused by the constructor."""
    with pytest.raises(ValueError, match=r"'a\\ud800' cannot be written in utf-8, the encoding of file names here"):
        FileStorage("a\ud800")


async def test_a_path_that_is_no_utf_8(tmp_path: Path) -> None:
    """A path that is not UTF-8 works. `/health` escapes the characters that JSON cannot hold."""
    state = manager(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    async with state:
        await state.set("a", 1)
        with pytest.MonkeyPatch.context() as patch:
            fail(patch, "pwrite", errno.ENOSPC)
            with pytest.raises(UnavailableError):
                await state.set("b", 1)
            code, body = health_of({"lab": state}, 30)
        assert code == 200
        assert r"/\udcff/lab.journal failed" in json.loads(body)["managers"]["lab"]["last_error"]
        assert r"/\udcff/lab.journal failed" in str(state.status().last_error)


async def test_a_link_above_the_files_that_is_changed(tmp_path: Path) -> None:
    """The directory is resolved once, at the start. So a deployment that changes a link above it fences no writer."""
    (tmp_path / "release1" / "state").mkdir(parents=True)
    (tmp_path / "release2" / "state").mkdir(parents=True)
    (tmp_path / "current").symlink_to("release1")
    state = manager(tmp_path / "current" / "state")
    await state.start()
    (tmp_path / "new").symlink_to("release2")
    (tmp_path / "new").replace(tmp_path / "current")
    await state.set("last", "word")
    await state.stop()
    async with manager(tmp_path / "release1" / "state") as state:
        assert await state.get_all() == {"last": "word"}
    async with manager(tmp_path / "current" / "state") as state:
        assert await state.get_all() == {}


@pytest.mark.parametrize("below", ["", "state"])
async def test_a_directory_that_is_a_link_that_leads_nowhere(tmp_path: Path, below: str) -> None:
    """A broken link as the directory is refused: a disk that is not mounted must not become an empty state."""
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "state")
    with pytest.raises(UnsupportedError, match=r"link is a broken symbolic link: mount its target"):
        await manager(tmp_path / "link" / below).start()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


# States that are missing


async def test_a_start_without_a_state_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The INFO line of a start names the place, and says whether there was a state."""
    caplog.set_level(logging.INFO, "lab_state")
    for keys, end in ((0, "a new state"), (1, "after a clean end")):
        caplog.clear()
        async with manager(tmp_path) as state:
            await state.set("a", 1)
        told = caplog.records[0]
        assert told.levelname == "INFO"
        assert f"loaded revision {keys} (keys: {keys}) from {tmp_path / 'lab.json'} in " in told.message
        assert told.message.endswith(f" s: {end}")


@pytest.mark.parametrize("left", ["nothing", "directory", "lock"])
async def test_a_state_that_must_be_there(tmp_path: Path, left: str) -> None:
    """With `create=False` a start without snapshot and journal is refused, and creates nothing."""
    directory = tmp_path / "not" / "mounted"
    if left != "nothing":
        directory.mkdir(parents=True)
    if left == "lock":
        (directory / "lab.lock").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnsupportedError, match=r"no state at .*/not/mounted.*create=False: .*mounted"):
        await Manager("lab", FileStorage(directory, create=False)).start()
    assert sorted(tmp_path.rglob("*")) == before
    async with manager(directory) as state:
        await state.set("a", 1)
    async with Manager("lab", FileStorage(directory, create=False)) as state:
        assert await state.get_all() == {"a": 1}
    (directory / "lab.json").unlink()
    (directory / "lab.journal").unlink()


async def test_a_file_in_place_of_the_directory_of_a_state_that_must_be_there(tmp_path: Path) -> None:
    """With `create=False` the error for a file in place of the directory is not the one for a missing directory."""
    (tmp_path / "file").touch()
    with pytest.raises(UnsupportedError, match=r"file failed: Not a directory; .*choose another directory"):
        await Manager("lab", FileStorage(tmp_path / "file", create=False)).start()


async def test_a_state_that_goes_while_it_is_locked(tmp_path: Path) -> None:
    """With `create=False` the files are looked up a second time, under the lock."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    with pytest.MonkeyPatch.context() as patch:
        real = _lock.Lock.__init__

        def locking(self: _lock.Lock, path: str, *, shared: bool) -> None:
            real(self, path, shared=shared)
            for name in ("lab.json", "lab.journal"):
                (tmp_path / name).unlink()

        patch.setattr(_lock.Lock, "__init__", locking)
        with pytest.raises(UnsupportedError, match=r"no state at .*lab\.json, and create=False"):
            await Manager("lab", FileStorage(tmp_path, create=False)).start()
    async with manager(tmp_path):
        pass


# Files that were copied


@pytest.mark.parametrize("how", ["moved", "restored"])
async def test_a_copied_directory_is_synced_before_the_first_commit(
    tmp_path: Path, synced: list[str], how: str
) -> None:
    """In a copied directory the snapshot, the directory and those above it are synced, although the journal names the snapshot."""
    async with manager(tmp_path / "old") as state:
        await state.set("a", 1)
    directory = tmp_path / "new" / "state"
    if how == "moved":
        shutil.copytree(tmp_path / "old", directory)
    else:
        directory = tmp_path / "old"
        (directory / "lab.json").write_bytes((directory / "lab.json").read_bytes())
    async with manager(directory) as state:
        synced.clear()
        await state.set("b", 2)
        snapshot = synced.index(str(directory / "lab.json"))
        assert synced.index(str(directory.parent)) < snapshot
        assert synced.index(str(tmp_path)) < snapshot
        assert synced[snapshot + 1 :][:2] == [str(directory), str(directory / "lab.journal.tmp")]
        synced.clear()
        await state.set("c", 3)
        assert synced == []


async def test_a_copy_of_a_killed_state_is_synced_before_the_first_commit(tmp_path: Path, synced: list[str]) -> None:
    """In a copy of a killed state only the directories are synced: the first commit replaces snapshot and journal."""
    state = manager(tmp_path / "old")
    await state.start()
    await state.set("a", 1)
    directory = tmp_path / "new" / "state"
    shutil.copytree(tmp_path / "old", directory)
    await state.stop()
    synced.clear()
    async with manager(directory) as state:
        await state.flush()
        assert synced.index(str(directory.parent)) < synced.index(str(directory / "lab.journal.tmp"))
        assert await state.get_all() == {"a": 1}


async def test_a_snapshot_that_only_its_owner_may_write_is_synced(tmp_path: Path, synced: list[str]) -> None:
    """A snapshot that this user may only read is synced, because nothing is written to it."""
    (tmp_path / "lab.json").write_bytes(b'{"a":1}')
    opened: list[int] = []
    real = os.open

    def opening(path: str, flags: int, mode: int = 0o777) -> int:
        if path == str(tmp_path / "lab.json"):
            opened.append(flags & os.O_ACCMODE)
        return real(path, flags, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fs.os, "open", opening)  # type: ignore[attr-defined]
        async with manager(tmp_path) as state:
            await state.set("b", 2)
            assert set(opened) == {os.O_RDONLY}
    assert str(tmp_path / "lab.json") in synced


# Files that change under a running manager


def overwrite(path: Path, data: bytes) -> None:
    """Change bytes in place; the time of the file changes, however coarse the file system's clock is."""
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(0, 0))


def truncated(path: Path, _: bytes) -> None:
    os.truncate(path, 0)


def shorter_copy(path: Path, older: bytes) -> None:
    path.write_bytes(older)


def longer(path: Path, _: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"more\n")


def zeroed(path: Path, _: bytes) -> None:
    overwrite(path, bytes(path.stat().st_size))


def one_byte(path: Path, _: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    overwrite(path, bytes(data))


def another_journal(path: Path, _: bytes) -> None:
    """Put another journal there, of the same state and the same size, in which every frame is valid."""
    salt = journal.new_salt()
    size = path.stat().st_size
    head = journal.header("lab", salt, "none")
    record = b'{"from":0,"to":1,"clear":false,"set":{"a":"%s"},"delete":[],"expires":{}}'
    rest = size - len(head) - len(journal.frame(salt, FrameKind.RECORD, record % (b"x" * 100))) + 100
    data = head + journal.frame(salt, FrameKind.RECORD, record % (b"x" * rest))
    assert len(data) == size
    overwrite(path, data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (truncated, "cut off or written to"),
        (shorter_copy, "cut off or written to"),
        (longer, "cut off or written to"),
        (zeroed, "overwritten"),
        (one_byte, "overwritten"),
        (another_journal, "overwritten"),
    ],
)
@pytest.mark.parametrize("then", ["commit", "checkpoint"])
async def test_a_journal_that_is_changed_in_place(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path, bytes], None],
    told: str,
    then: str,
) -> None:
    """A journal changed in place is noticed before the next acknowledgement.

    It is logged, and everything is written anew.
    """
    directory = tmp_path / "state"
    path = directory / "lab.journal"
    state = manager(directory)
    await state.start()
    await state.set("a", "x" * 200)
    older = path.read_bytes()
    await state.set("b", "x" * 200)
    change(path, older)
    expected: dict[str, object] = {"a": "x" * 200, "b": "x" * 200}
    if then == "commit":
        await state.set("c", 3)
        expected["c"] = 3
        copy = shutil.copytree(directory, tmp_path / "copy")
        async with manager(copy) as killed:
            assert await killed.get_all() == expected
    await state.stop()
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert f"{path} was {told} by other code while in use: writing everything anew" in errors[0]
    async with manager(directory) as state:
        assert await state.get_all() == expected


async def test_a_journal_whose_time_alone_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A journal whose time alone changes is read once and stays in use: some file systems set the time long after a write."""
    path = tmp_path / "lab.journal"
    reads: list[str] = []
    real = _fs.read

    def read(path: str) -> bytes | None:
        reads.append(path)
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        async with manager(tmp_path) as state:
            await state.set("a", 1)
            inode = path.stat().st_ino
            patch.setattr(_fs, "read", read)
            for number in range(5):
                os.utime(path, ns=(number, number))
                await state.set("a", number)
            assert reads == [str(path)]
            assert path.stat().st_ino == inode
            await flusher_of(state).checkpoints.write(wait=False)
            os.utime(path, ns=(0, 0))
            await state.set("a", 6)
            assert reads == [str(path)] * 2  # another journal, which is read once, too
            truncated(path, b"")
            await state.set("b", 7)  # the size is still compared
            assert "cut off" in caplog.text
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 6, "b": 7}


async def test_a_large_journal_whose_time_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large journal whose time changes is written anew without being read, because reading would cost as much."""
    monkeypatch.setattr(_file_writer, "_LARGEST_READ_AGAIN", 100)
    path = tmp_path / "lab.journal"
    async with manager(tmp_path) as state:
        await state.set("a", "x" * 100)
        inode = path.stat().st_ino
        os.utime(path, ns=(0, 0))
        await state.set("b", 1)
        assert path.stat().st_ino != inode
        assert len(state) == 2


# Descriptors that other code closed


def reopened(number: int, path: Path) -> int:
    """Close a descriptor, and open a file with its number."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.dup2(fd, number)
    os.close(fd)
    return number


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("then", ["commit", "checkpoint"])
async def test_a_descriptor_that_the_application_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, then: str, *, reused: bool
) -> None:
    """If other code closed the descriptor, the file that now has its number is neither written nor closed."""
    directory, other = tmp_path / "state", tmp_path / "other"
    state = manager(directory)
    await state.start()
    await state.set("a", 1)
    number = writer(state)._fd
    if reused:
        reopened(number, other)
    else:
        os.close(number)
    if then == "commit":
        await state.set("b", 2)
    await state.stop()
    assert "lab.journal cannot be written: other code in this process closed its descriptor" in caplog.text
    if reused:
        os.write(number, b"precious")
        os.close(number)
        assert other.read_bytes() == b"precious"
    async with manager(directory) as state:
        assert await state.get_all() == {"a": 1} | ({"b": 2} if then == "commit" else {})


@pytest.mark.parametrize(
    ("failing", "given_up"),
    [
        pytest.param({1, 2}, True, id="before-a-write"),
        pytest.param({3, 4}, True, id="before-the-next-write"),
        pytest.param({1}, False, id="once"),
        pytest.param({2}, False, id="behind-a-write"),
    ],
)
async def test_a_descriptor_that_cannot_be_looked_up(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    failing: set[int],
    given_up: bool,  # noqa: FBT001
) -> None:
    """An I/O error does not say that the descriptor is another file's: it is closed, and the journal is written anew.

    After one error the descriptor is looked up again. Where only what a write left could not be had, the next commit
    reads the journal, and goes on with it.
    """
    before = len(list(Path("/proc/self/fd").iterdir()))
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        number, inode = writer(state)._fd, (tmp_path / "lab.journal").stat().st_ino
        real, calls = os.fstat, [0]

        def fstat(fd: int) -> os.stat_result:
            if fd == number:
                calls[0] += 1
                if calls[0] in failing:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fs.os, "fstat", fstat)  # type: ignore[attr-defined]
            await state.set("b", 2)
            await state.set("c", 3)
        # Without an error, each write has one call before it and one behind it.
        assert ("cannot be looked up by its descriptor" in caplog.text) == given_up
        assert ((tmp_path / "lab.journal").stat().st_ino != inode) == given_up
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("reused", [False, True])
async def test_a_lock_whose_descriptor_the_application_closed(tmp_path: Path, *, reused: bool) -> None:
    """If other code closed the lock, another writer may hold it: nothing more is written, and no other file is closed."""
    state = manager(tmp_path / "state")
    await state.start()
    await state.set("a", 1)
    number = writer(state).lock._fd
    if reused:
        reopened(number, tmp_path / "other")
    else:
        os.close(number)
    with pytest.raises(FencedError, match=r"lab\.lock is no longer locked: other code in this process closed its"):
        await state.set("b", 2)
    with pytest.raises(FencedError):
        await state.stop()
    if reused:
        os.write(number, b"still open")
        os.close(number)
    async with manager(tmp_path / "state") as second:
        assert await second.get_all() == {"a": 1}


@pytest.mark.parametrize("how", ["closed", "cut off", "replaced"])
async def test_a_new_journal_that_is_not_what_was_written(tmp_path: Path, how: str) -> None:
    """A new journal that other code changed is not put in place.

    The old one stays in use, and the next attempt succeeds.
    """
    other = tmp_path / "other"
    taken: list[int] = []

    def create(self: NewJournal, base: str, *frames: tuple[FrameKind, bytes], after: int) -> None:
        real(self, base, *frames, after=after)
        if how == "closed":
            taken.append(reopened(self.fd, other))
        elif how == "replaced":
            Path(self.path).unlink()
            Path(self.path).touch()
        else:
            os.truncate(self.path, 10)

    async with manager(tmp_path / "state", flush_interval=None) as state:
        await state.set("a", 1)
        with pytest.MonkeyPatch.context() as patch:
            real = NewJournal.create
            patch.setattr(NewJournal, "create", create)
            with pytest.raises(UnavailableError, match="is not what was written: other code changed it, or closed"):
                await state.flush()
        for fd in taken:
            os.write(fd, b"precious")
            os.close(fd)
            assert other.read_bytes() == b"precious"
        await state.flush()
    async with manager(tmp_path / "state") as state:
        assert await state.get_all() == {"a": 1}


async def test_a_new_snapshot_that_is_not_what_was_written(tmp_path: Path) -> None:
    """A new snapshot that other code changed is not put in place, and the next checkpoint writes another one."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        with pytest.MonkeyPatch.context() as patch:
            real = _fs.NewFile.finish

            def finish(self: _fs.NewFile) -> None:
                real(self)
                os.truncate(self.path, 3)

            async def slices() -> AsyncIterator[bytes]:
                yield b'{"b":1}'

            patch.setattr(_fs.NewFile, "finish", finish)
            with pytest.raises(UnavailableError, match=r"json\.[0-9a-f]{8}\.tmp is not what was written"):
                await session(state).checkpoint(slices)
        await state.set("b", 2)
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1, "b": 2}
