"""What is peculiar to `FileStorage`: its files, its lock, the faults of a disk, and what a kill leaves."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from running import flusher_of

from lab_state import (
    Config,
    CorruptionError,
    FencedError,
    FileStorage,
    LockedError,
    Manager,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from lab_state import _journal as journal
from lab_state._flusher import Flusher
from lab_state._journal import Kind
from lab_state._state import Overlay
from lab_state.storage import _directory, _file_start, _file_writer, _fs, _lookup
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._lock import Lock
from lab_state.testing import ManualClock

CHILD = Path(__file__).with_name("child.py")
COPY = "copy-of-what-is-on-disk"
MIB = 1024 * 1024
DUE = 4 * MIB
"""In a value: the journal is large enough for a checkpoint."""
SERVED = {f"key-{number}": number for number in range(5)}


# Tools


def plain(name: str) -> str:
    """The name of a temporary file without what makes it unique."""
    return re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", name)


@dataclass
class Fault:
    """Calls of one function on one file that fail: `times` of them, after the first `skip`."""

    function: str
    name: str
    code: int
    skip: int
    times: float


class Gate:
    """Holds up a thread in a call until the test opens it."""

    def __init__(self, function: str, name: str) -> None:
        self.function = function
        self.name = name
        self._entered = threading.Event()
        self._opened = threading.Event()

    def enter(self) -> None:
        self._entered.set()
        assert self._opened.wait(60)

    def open(self) -> None:
        self._opened.set()

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 10), f"{self.function} of {self.name} was never called"


@dataclass(frozen=True)
class Call:
    """One call that `_fs` made."""

    function: str
    path: str
    inode: int


class Disk:
    """The module `os` as `_fs` sees it: the real one, but for the faults asked for; it remembers what was called.

    A file is named by the last part of its path, a renamed file by its new name. The
    directory of a state is named `directory`, those above it `above`. The copies that `found` makes are none of its business.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._faults: list[Fault] = []
        self._gates: list[Gate] = []
        self._full: set[str] = set()
        self._shortened: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fail(self, function: str, name: str, code: int = errno.EIO, *, skip: int = 0, times: float = 1) -> None:
        self._faults.append(Fault(function, name, code, skip, times))

    def hold(self, function: str, name: str) -> Gate:
        gate = Gate(function, name)
        self._gates.append(gate)
        return gate

    def fill(self, *names: str) -> None:
        """No more room for these files: half a write fits, then none."""
        self._full.update(names)
        self._shortened.clear()

    def heal(self) -> None:
        self._faults.clear()
        self._full.clear()

    def written_inodes(self) -> set[int]:
        return {call.inode for call in self.calls if call.function == "pwrite"}

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self._called("open", Path(path))
        return os.open(path, flags, mode)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        name = self._called("pwrite", fd)
        if name not in self._full:
            return os.pwrite(fd, data, offset)
        if name in self._shortened or len(data) < 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._shortened.add(name)
        return os.pwrite(fd, data[: len(data) // 2], offset)

    def ftruncate(self, fd: int, size: int) -> None:
        self._called("ftruncate", fd)
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        self._called("fsync", fd)
        os.fsync(fd)

    def fstat(self, fd: int) -> os.stat_result:
        self._called("fstat", fd)
        return os.fstat(fd)

    def fdatasync(self, fd: int) -> None:
        self._called("fdatasync", fd)
        os.fdatasync(fd)

    def replace(self, source: str, target: str) -> None:
        self._called("replace", Path(target))
        os.replace(source, target)  # noqa: PTH105 -- the call that `_fs` makes

    def _called(self, function: str, file: int | Path) -> str:
        path = file if isinstance(file, Path) else Path(f"/proc/self/fd/{file}").readlink()
        if COPY in path.parts:
            return ""
        known = None if isinstance(file, Path) else os.fstat(file)
        name = plain(path.name)
        if known is not None and stat.S_ISDIR(known.st_mode):
            name = "directory" if (path / "lab.lock").exists() else "above"
        self.calls.append(Call(function, str(path), known.st_ino if known is not None else 0))
        for gate in self._gates:
            if (gate.function, gate.name) == (function, name):
                self._gates.remove(gate)
                gate.enter()
                break
        for fault in self._faults:
            if (fault.function, fault.name) == (function, name):
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    raise OSError(fault.code, os.strerror(fault.code))
        return name


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    faulty = Disk()
    for used in (_fs, _lookup, _directory):
        monkeypatch.setattr(used, "os", faulty)
    return faulty


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a process that was killed with five acknowledged changes in its journal."""
    directory = tmp_path_factory.mktemp("killed") / "state"
    child = start_child("serve", directory)
    kill(child)
    return directory


@pytest.fixture
def crashed(killed: Path, tmp_path: Path) -> Path:
    """A copy of `killed`, to be opened."""
    return Path(shutil.copytree(killed, tmp_path / "crashed"))


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can enter, unlike `tmp_path`."""
    directory = Path(tempfile.mkdtemp(prefix="lab_state-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def manager(directory: Path, name: str = "lab", **settings: Any) -> Manager:
    clock = settings.pop("clock", None)
    return Manager(Config(name=name, **{"flush_interval": None, **settings}), FileStorage(directory), clock=clock)


def flusher(state: Manager) -> Flusher:
    """What awaits the storage; of a running manager."""
    return flusher_of(state)


def start_child(command: str, directory: Path) -> subprocess.Popen[str]:
    """A child that has said that it is ready."""
    child = subprocess.Popen([sys.executable, CHILD, command, directory], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert json.loads(child.stdout.readline()) == {"pid": child.pid}
    return child


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def run_child(command: str, directory: Path, returncode: int = 0) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, CHILD, command, directory], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == returncode, child.stderr
    report: dict[str, Any] = json.loads(child.stdout)
    return report


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until a thread or a task got there."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- what is waited for sets no event
            await asyncio.sleep(0)


async def found(directory: Path) -> dict[str, Any]:
    """What the next start would find, were this process killed now."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as place:
        # Temporary files come and go beside us, and no start reads them.
        copy = shutil.copytree(directory, Path(place) / COPY, ignore=shutil.ignore_patterns("*.tmp"))
        async with manager(copy) as state:
            return await state.get_all()


def scan(directory: Path, name: str = "lab") -> journal.Scan:
    path = directory / f"{name}.journal"
    return journal.scan(path.read_bytes(), name, str(path))


def kinds(directory: Path) -> str:
    """The kinds of the frames in the journal, after the header."""
    return "".join(frame.kind.value for frame in scan(directory).frames)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.suffix != ".lock"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Kept:
    """A journal under a second name, so that its inode stays; tells whether it was written since."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._path = directory.parent / f"{directory.name}-kept"
        os.link(directory / "lab.journal", self._path)
        self._disk = disk
        disk.calls.clear()
        self.bytes = self._path.read_bytes()

    def check_never_written(self) -> None:
        assert self._path.stat().st_ino not in self._disk.written_inodes()
        assert self._path.read_bytes() == self.bytes

    def freeze(self) -> None:
        """From now on it must not be written."""
        self.bytes = self._path.read_bytes()
        self._disk.calls.clear()


# The files


async def test_modes_and_nested_directories(tmp_path: Path, disk: Disk) -> None:
    """Directories are made for this user alone and synced into their parents, and every file is private."""
    directory = tmp_path / "a" / "b"
    state = manager(directory)
    await state.start()
    await state.set("key", 1)
    await state.flush()
    files = ["lab.journal", "lab.lock"]
    assert {path.name: mode(path) for path in directory.iterdir()} == dict.fromkeys(files, 0o600)
    await state.stop()
    files.append("lab.json")
    assert {path.name: mode(path) for path in directory.iterdir()} == dict.fromkeys(files, 0o600)
    assert (mode(tmp_path / "a"), mode(directory)) == (0o700, 0o700)
    assert synced(disk)[:2] == [str(tmp_path), str(tmp_path / "a")]


def synced(disk: Disk) -> list[str]:
    return [call.path for call in disk.calls if call.function == "fsync"]


async def test_a_directory_whose_sync_failed_is_made_again(tmp_path: Path, disk: Disk) -> None:
    """The next start does not find it: a second sync would succeed although the name may never reach the disk."""
    directory = tmp_path / "a" / "b"
    disk.fail("fsync", "above", skip=1)
    state = manager(directory)
    with pytest.raises(UnavailableError, match="making the directory"):
        await state.start()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    disk.calls.clear()
    async with state:
        assert synced(disk)[0] == str(tmp_path / "a")


async def test_a_directory_that_a_dead_process_made(tmp_path: Path, disk: Disk) -> None:
    """Killed behind its mkdir, it did not sync: the first commit of a session syncs every name above it, once."""
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    above = [str(tmp_path / "a"), str(tmp_path)]
    async with manager(directory) as state:
        disk.calls.clear()
        await state.set("key", 1)
        await state.flush()
        assert synced(disk)[:2] == above
        disk.calls.clear()
        await state.set("key", 2)
        await state.flush()
        assert synced(disk) == []


@pytest.mark.parametrize("ending", ["", "/", "//"])
async def test_a_path_may_be_relative_and_end_with_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """The directory is found from where the process is at the start, and stays that one."""
    monkeypatch.chdir(tmp_path)
    async with Manager("lab", FileStorage(f"a/./b{ending}")) as state:
        monkeypatch.chdir("/")
        await state.set("key", 1)
    assert (tmp_path / "a" / "b" / "lab.json").exists()
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        FileStorage(b"a")  # type: ignore[arg-type]


async def test_nothing_is_synced_across_a_mount_point(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No directory was ever made across one, and the file system on the other side may not be able to."""
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    elsewhere = os.stat_result([0] * 10)
    monkeypatch.setattr(
        disk, "stat", lambda path: elsewhere if Path(path) == tmp_path else Path(path).stat(), raising=False
    )
    async with manager(directory) as state:
        disk.calls.clear()
        await state.set("key", 1)
        await state.flush()
        assert synced(disk)[:1] == [str(tmp_path / "a")]
        assert str(tmp_path) not in synced(disk)


async def test_an_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    """A directory that is there already is used as it is."""
    directory = tmp_path / "shared"
    directory.mkdir(0o755)
    async with manager(directory) as state:
        await state.set("key", 1)
    assert mode(directory) == 0o755


async def test_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative directory is looked up once, at the start: a later chdir moves nothing."""
    monkeypatch.chdir(tmp_path)
    async with manager(Path("state")) as state:
        await state.set("key", 1)
        monkeypatch.chdir("/")
    assert await found(tmp_path / "state") == {"key": 1}


async def test_plain_json_after_a_clean_stop(tmp_path: Path) -> None:
    """After a clean stop the file is one JSON object, the user's keys and `$lab_state`, for any reader of JSON."""
    values = {"text": "ü\n\u2028", "list": [1, 2.5, None, {"x": True}], "empty": {}, "number": 2**60}
    async with manager(tmp_path) as state:
        await state.set_many(values)
    path = tmp_path / "lab.json"
    loaded = json.loads(path.read_bytes())
    member = loaded.pop("$lab_state")
    assert loaded == values
    assert (member["format"], member["revision"]) == (1, 1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "json.tool", "--compact", str(path), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert (process.returncode, json.loads(output)) == (0, values | {"$lab_state": member})
    assert kinds(tmp_path) == ""


async def test_an_unused_state_leaves_only_its_lock(tmp_path: Path) -> None:
    """Starting and stopping without a change writes neither a snapshot nor a journal."""
    async with manager(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lab.lock"]


async def test_a_foreign_map_is_rewritten_only_after_a_change(tmp_path: Path) -> None:
    """The Go original's file is loaded as it is, left byte for byte alone, and rewritten after the first change."""
    path = tmp_path / "lab.json"
    original = json.dumps({"last": 12, "modules": {"a": [1, 2]}}, indent=2).encode()
    path.write_bytes(original)
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"last": 12, "modules": {"a": [1, 2]}}
        assert state.revision == 0
    assert contents(tmp_path) == {"lab.json": original}
    async with manager(tmp_path) as state:
        await state.set("new", 1)
    assert path.read_bytes() != original
    assert json.loads(path.read_bytes()).keys() == {"last", "modules", "new", "$lab_state"}


async def test_a_foreign_map_is_synced_before_the_first_commit(tmp_path: Path, disk: Disk) -> None:
    """A snapshot that was put there by hand is synced, with its directory, before a journal names it."""
    (tmp_path / "lab.json").write_bytes(b'{"a":1}')
    async with manager(tmp_path) as state:
        await state.set("b", 2)
        disk.calls.clear()
        await state.flush()
        synced = [plain(Path(call.path).name) for call in disk.calls if call.function in ("fsync", "replace")]
        assert synced[-5:] == ["lab.json", tmp_path.name, "lab.journal.tmp", "lab.journal", tmp_path.name]
        assert await found(tmp_path) == {"a": 1, "b": 2}


async def test_three_names_on_one_storage(tmp_path: Path) -> None:
    """One `FileStorage` serves several managers at a time, each with files of its own."""
    storage = FileStorage(tmp_path)
    managers = [Manager(Config(name=name, flush_interval=0), storage) for name in ("one", "two", "one.json")]
    await asyncio.gather(*(state.start() for state in managers))
    await asyncio.gather(*(state.set("me", number) for number, state in enumerate(managers)))
    await asyncio.gather(*(state.stop() for state in managers))
    for number, name in enumerate(("one", "two", "one.json")):
        assert json.loads((tmp_path / f"{name}.json").read_bytes())["me"] == number


async def test_large_values(tmp_path: Path) -> None:
    """Values of 8 MiB go through the journal, a checkpoint, and a restart."""
    first, second = "a" * (8 * MIB), ["b" * 1000] * (8 * 1024)
    async with manager(tmp_path) as state:
        await state.set("first", first)
        await state.flush()
        await state.set("second", second)
        await state.flush()
        assert await found(tmp_path) == {"first": first, "second": second}
    assert json.loads((tmp_path / "lab.json").read_bytes())["second"] == second
    assert await found(tmp_path) == {"first": first, "second": second}


async def test_stale_temporary_files_are_removed(crashed: Path) -> None:
    """Temporary files that a crash left are removed by the next start, and never read."""
    stale = [crashed / "lab.json.0123abcd.tmp", crashed / "lab.journal.0123abcd.tmp"]
    for path in stale:
        path.write_bytes(b"half of something")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
        await state.flush()
        assert [path.name for path in stale if path.exists()] == []


# What cannot be opened


async def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    """A file where the directory should be, or above it, is refused with path and remedy."""
    (tmp_path / "file").write_bytes(b"")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UnsupportedError, match=r"choose another directory") as raised:
            await manager(directory).start()
        assert str(directory) in str(raised.value)


@pytest.mark.parametrize("name", ["lab.json", "lab.journal", "lab.lock"])
async def test_a_directory_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    """A directory in place of one of the files is refused, and start works once it is moved away."""
    (tmp_path / name).mkdir()
    state = manager(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"{name} failed: Is a directory; a directory is in its place"):
        await state.start()
    (tmp_path / name).rmdir()
    async with state:
        assert await state.get_all() == {}


def test_a_directory_without_permission_to_write(public: Path) -> None:
    """Another user's directory is refused, naming the path and the remedy."""
    public.chmod(0o555)
    report = run_child("refused", public)
    assert report["error"] == "UnsupportedError"
    assert f"{public}/lab.lock" in report["message"]
    assert "give this user the permission" in report["message"]


def test_a_directory_that_cannot_be_made(public: Path) -> None:
    """A directory that this user may not make is refused, naming the path and the remedy."""
    public.chmod(0o555)
    report = run_child("refused", public / "state")
    assert report["error"] == "UnsupportedError"
    assert f"{public}/state" in report["message"]
    assert "give this user the permission" in report["message"]


@pytest.mark.parametrize("below", ["state", "state/deeper"])
def test_a_directory_that_cannot_be_entered(public: Path, below: str) -> None:
    """A directory below one that this user may not enter is refused, naming the path and the remedy."""
    (public / "closed").mkdir(0o000)
    report = run_child("refused", public / "closed" / below)
    assert report["error"] == "UnsupportedError"
    assert f"{public}/closed/{below}" in report["message"]
    assert "give this user the permission" in report["message"]


def test_a_state_that_cannot_be_read(public: Path) -> None:
    """A snapshot without permission to read is an error that names it, never an empty state."""
    public.chmod(0o777)
    (public / "lab.json").write_bytes(b'{"a":1}')
    (public / "lab.json").chmod(0o000)
    report = run_child("refused", public)
    assert report["error"] == "UnsupportedError"
    assert f"{public}/lab.json" in report["message"]
    assert "give this user the permission" in report["message"]


async def test_a_read_only_file_system(tmp_path: Path, disk: Disk) -> None:
    """A read-only file system is refused with path and remedy, at start and at a commit, and can be mended."""
    disk.fail("open", "lab.lock", errno.EROFS)
    state = manager(tmp_path)
    with pytest.raises(UnsupportedError, match=r"lab\.lock failed: Read-only file system; .*mount it writable"):
        await state.start()
    await state.start()
    await state.set("key", 1)
    disk.fail("open", "lab.journal.tmp", errno.EROFS)
    with pytest.raises(
        UnsupportedError, match=r"lab\.journal\.[0-9a-f]{8}\.tmp failed: Read-only file system; .*mount it writable"
    ):
        await state.flush()
    await state.flush()
    assert await found(tmp_path) == {"key": 1}
    await state.stop()


async def test_an_unreadable_disk_is_not_an_empty_state(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error while loading fails the start and releases the lock."""

    class Unreadable(io.BytesIO):
        """A file with a bad sector."""

        def read(self, _: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = contents(crashed)
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "open", lambda *_, **__: Unreadable(), raising=False)
        with pytest.raises(UnavailableError, match=r"reading .*lab\.journal failed: Input/output error"):
            await manager(crashed).start()
    assert contents(crashed) == before
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED


# A full disk


def test_a_file_size_limit(tmp_path: Path) -> None:
    """A real short write, then EFBIG: flushes fail, nothing acknowledged is touched, and more room mends all."""
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


class Tmpfs:
    """A small file system of its own; mounting it needs root."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> Path:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", self.place],
            check=True,
            capture_output=True,
        )
        return self.place

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.place], check=True)

    @classmethod
    def can_be_mounted_by_this_user(cls) -> bool:
        """Whether this user is root, and root may mount here."""
        with tempfile.TemporaryDirectory() as place:
            try:
                with cls(Path(place)):
                    return True
            except (OSError, subprocess.CalledProcessError):
                return False


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
    sys.stderr.write("tests/storage/test_file.py: this user cannot mount a tmpfs; RLIMIT_FSIZE alone fills the disk\n")


async def test_a_failed_write_is_undone(tmp_path: Path, disk: Disk) -> None:
    """Half a frame is cut off again with ftruncate, and the same journal goes on."""
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 1)
    await state.flush()
    path = tmp_path / "lab.journal"
    before, inode = path.read_bytes(), path.stat().st_ino
    disk.fill("lab.journal")
    await state.set("b", 2)
    for _ in range(3):
        with pytest.raises(UnavailableError, match=r"No space left on device; free some \(not durable yet") as raised:
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
    """A new journal and a snapshot that find no room are deleted again: they hold the missing room."""
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
    """With no room even for the name of the lock's owner, a state starts and can be read."""
    disk.fail("pwrite", "lab.lock", errno.ENOSPC)
    disk.fill("lab.journal.tmp")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
        disk.heal()


# Failed syncs and renames


async def test_a_failed_ftruncate_poisons(tmp_path: Path, disk: Disk) -> None:
    """Where half a frame cannot be cut off, the journal is given up for a new one with the whole state."""
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
    """While no new journal can be written, every flush fails, the old one stays untouched, and memory stays whole."""
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
    """Where the rename of a new journal, or the sync of its directory, fails, it is not used."""
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
    """The end of a new journal is written when the snapshot is in its place: if that fails, the old one names both."""
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
    """What fails before the rename of a new journal is thrown away, and is no reason to give up the old one."""
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
    """From the frame C on, a failed sync or rename of the journal means a new journal with the whole state."""
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
    """The next commit goes to a new journal with everything, and so do those behind it."""
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
    """However often a checkpoint fails, commits go on, it is logged, and a later one makes up for it."""
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


# Checkpoints


async def test_a_large_snapshot_is_synced_as_it_grows(tmp_path: Path, disk: Disk) -> None:
    """A mebibyte at a time, so that no commit beside it waits for the sync of all of it."""

    async def slices() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * (MIB // 4)

    session = await FileStorage(tmp_path).open("lab")
    await session.checkpoint(slices)
    await session.aclose()
    syncs = [call.function for call in disk.calls if "lab.json" in call.path and "sync" in call.function]
    assert syncs == ["fdatasync", "fdatasync", "fsync"]


async def test_a_checkpoint_is_due_after_four_mebibytes(tmp_path: Path) -> None:
    """A journal of up to 4 MiB is left to grow; above that a snapshot takes its place without anyone waiting."""
    state = manager(tmp_path)
    await state.start()
    for number in range(3):
        await state.set("key", "x" * 1_200_000 + str(number))
        await state.flush()
    assert kinds(tmp_path) == "RRR"
    assert flusher(state)._checkpointing is None
    assert not (tmp_path / "lab.json").exists()
    await state.set("key", "x" * 1_200_000)
    await state.flush()
    await until(lambda: (tmp_path / "lab.json").exists() and kinds(tmp_path) == "")
    assert await found(tmp_path) == {"key": "x" * 1_200_000}
    assert mode(tmp_path / "lab.json") == mode(tmp_path / "lab.journal") == 0o600
    await state.stop()


async def test_commits_go_on_beside_a_slow_snapshot(tmp_path: Path, disk: Disk) -> None:
    """While a snapshot is being written, commits are acknowledged, survive a kill, and survive its publication."""
    state = manager(tmp_path)
    await state.start()
    await state.set("large", "x" * DUE)
    await state.set("deleted", value=True)
    gate = disk.hold("fsync", "lab.json.tmp")
    await state.flush()
    await gate.entered()
    for number in range(20):
        await state.set(f"beside-{number % 7}", number)
        if number == 10:
            await state.delete("deleted")
        await state.flush()
    everything = await state.get_all()
    assert not (tmp_path / "lab.json").exists()
    assert await found(tmp_path) == everything
    gate.open()
    await until(lambda: (tmp_path / "lab.json").exists() and kinds(tmp_path) == "R" * 20)
    snapshot = json.loads((tmp_path / "lab.json").read_bytes())
    assert snapshot.keys() == {"large", "deleted", "$lab_state"}
    assert await found(tmp_path) == everything
    await state.set("after", 1)
    await state.flush()
    assert await found(tmp_path) == everything | {"after": 1}
    await state.stop()
    assert await found(tmp_path) == everything | {"after": 1}


async def test_the_next_journal_is_written_beside_the_commits(tmp_path: Path, disk: Disk) -> None:
    """What was committed beside a snapshot is in the next journal before commits have to wait for its publication."""
    state = manager(tmp_path)
    await state.start()
    await state.set("large", "x" * DUE)
    gate = disk.hold("fsync", "lab.json.tmp")
    await state.flush()
    await gate.entered()
    for number in range(20):
        await state.set(f"beside-{number}", "x" * 50_000)
        await state.flush()
    disk.calls.clear()
    gate.open()
    await until(lambda: kinds(tmp_path) == "R" * 20)
    journals = [(call.function, plain(Path(call.path).name)) for call in disk.calls if ".journal" in call.path]
    written = [name for function, name in journals if function == "pwrite"]
    assert written.count("lab.journal.tmp") >= 3
    assert written[-1] == "lab.journal"  # the frame that names the snapshot
    assert ("fdatasync", "lab.journal.tmp") in journals[: journals.index(("pwrite", "lab.journal"))]
    await state.stop()


def test_a_journal_is_not_prepared_for_ever(tmp_path: Path) -> None:
    """Where more is committed while it is written than the end may hold, that is left to the end all the same."""
    (tmp_path / "state").mkdir()
    writer, _ = _file_start.open_writer(str(tmp_path / "state"), "lab", set(), Leftovers())
    since: list[bytes] = []

    class Upcoming(_file_writer.NewJournal):
        def add(self, records: list[bytes]) -> None:
            super().add(records)
            since.append(b"x" * 300_000)

    upcoming = Upcoming(writer.paths, "lab", writer.progress)
    since.append(b"x" * 300_000)
    writer.prepare(upcoming, journal.NO_BASE, since)
    assert len(since) == upcoming.records + 1 == 9
    upcoming.discard()
    writer.close()


async def test_what_is_replaced_is_closed_behind_the_commits(tmp_path: Path, disk: Disk) -> None:
    """What a checkpoint replaced has no name any more, and is freed where the checkpoint is tidied up; nothing stays open."""
    session = await FileStorage(tmp_path).open("lab")
    callers: list[list[str]] = []
    close = disk.close

    def closed(fd: int) -> None:
        if os.fstat(fd).st_nlink == 0:
            callers.append([frame.f_code.co_name for frame, _ in traceback.walk_stack(None)])
        close(fd)

    disk.close = closed  # type: ignore[attr-defined]
    await session.commit(b"before", slices_of(b"{}"))
    await session.checkpoint(slices_of(b'{"a":1}'))
    await until(lambda: len(callers) == 1)  # the first journal
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(3):
        await session.commit(b"%d" % number, slices_of(b"{}"))
        await session.checkpoint(slices_of(b'{"a":%d}' % number))
    await until(lambda: len(callers) == 1 + 2 * 3)  # a journal and a snapshot each
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all("_tidy" in caller for caller in callers)
    await session.aclose()


async def test_a_snapshot_that_cannot_be_kept_open_is_replaced_all_the_same(tmp_path: Path, disk: Disk) -> None:
    """Where no descriptor is left, the file system frees it while commits wait, and that is all."""
    session = await FileStorage(tmp_path).open("lab")
    await session.checkpoint(slices_of(b'{"a":1}'))
    disk.fail("open", "lab.json", errno.EMFILE)
    await session.checkpoint(slices_of(b'{"a":2}'))
    await session.aclose()
    assert (tmp_path / "lab.json").read_bytes() == b'{"a":2}'


async def test_what_was_loaded_is_let_go_of(tmp_path: Path) -> None:
    """The first checkpoint has made it needless; it is as large as the state."""
    for number in range(2):
        session = await FileStorage(tmp_path).open("lab")
        assert session.recovery.snapshot == (b'{"a":1}' if number else None)
        await session.checkpoint(slices_of(b'{"a":1}'))
        assert (session.recovery.snapshot, session.recovery.records) == (None, ())
        await session.aclose()


def slices_of(*parts: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def slices() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return slices


def test_large_parts_are_written_as_they_are() -> None:
    """Small parts are joined, to spare system calls; a large one is not copied."""
    large = b"x" * 100_000
    parts = [b"head", large, b"\n", *[b"y" * 1000] * 100]
    batches = list(_fs._batched(parts))
    assert b"".join(batches) == b"".join(parts)
    assert [len(batch) for batch in batches] == [4, 100_000, 65_001, 35_000]
    assert batches[1] is large


async def test_a_journal_poisoned_beside_a_slow_snapshot(tmp_path: Path, disk: Disk) -> None:
    """A checkpoint whose journal was given up meanwhile is abandoned, and the next one holds everything."""
    clock = ManualClock()
    state = manager(tmp_path, clock=clock)
    await state.start()
    await state.set("large", "x" * DUE)
    gate = disk.hold("fsync", "lab.json.tmp")
    await state.flush()
    await gate.entered()
    await state.set("beside", 1)
    disk.fail("fdatasync", "lab.journal")
    with pytest.raises(UnavailableError, match="Input/output error"):
        await state.flush()
    await state.flush()
    assert kinds(tmp_path) == "F"
    gate.open()
    await until(lambda: state.status().flush_failures == 2)
    assert "was abandoned; another is due" in str(state.status().last_error)
    assert not (tmp_path / "lab.json").exists()
    assert await found(tmp_path) == await state.get_all()
    clock.advance(10)
    await until(lambda: kinds(tmp_path) == "")
    assert await found(tmp_path) == {"large": "x" * DUE, "beside": 1}
    await state.stop()


async def test_a_commit_before_a_cancelled_checkpoint_survives(tmp_path: Path, disk: Disk) -> None:
    """A checkpoint cancelled in its last step, behind a commit, does not drop what that commit acknowledged."""
    session = await FileStorage(tmp_path).open("lab")
    await session.commit(b"first", view(b"one"))
    gate = disk.hold("fdatasync", "lab.journal")
    commit = asyncio.create_task(session.commit(b"second", view(b"two")))
    await gate.entered()
    checkpoint = asyncio.create_task(session.checkpoint(view(b"one")))
    await until(lambda: bool(session._commits.todo))
    checkpoint.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checkpoint
    gate.open()
    await commit
    await session.aclose()
    session = await FileStorage(tmp_path).open("lab")
    assert session.recovery.records[-1:] == (b"second",)
    await session.aclose()


def view(data: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def slices() -> AsyncIterator[bytes]:
        yield data

    return slices


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
    """What it held is in memory alone; a clean stop that has nothing to flush leaves everything all the same."""
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
        await flusher_of(state)._checkpoint(wait=False)
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
    """A clean stop puts another one in its place, since all that it needs is in memory."""
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
    with pytest.raises(FencedError, match=r"lab\.lock was deleted or replaced.*restart"):
        await state.flush()
    with pytest.raises(FencedError):
        await state.stop()
    assert contents(tmp_path) == before
    assert await found(tmp_path) == {"a": 1}


async def test_a_directory_that_disappears(tmp_path: Path) -> None:
    """When the whole directory goes, or a file takes its place, a commit raises a `StorageError`."""
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
    """A second manager of the same name is refused, told host and pid, and welcome after the first one's stop."""
    first, second = manager(tmp_path), manager(tmp_path)
    await first.start()
    with pytest.raises(LockedError, match=rf"locked by pid {os.getpid()} on {socket.gethostname()}, since \d{{4}}-"):
        await second.start()
    await first.set("a", 1)
    await first.stop()
    async with second:
        assert await second.get_all() == {"a": 1}


async def test_two_processes(tmp_path: Path) -> None:
    """A state that another process owns is refused, with its host and pid; its death gives it free."""
    child = start_child("serve", tmp_path)
    with pytest.raises(LockedError, match=rf"locked by pid {child.pid} on {socket.gethostname()}, .*stop it first"):
        await manager(tmp_path).start()
    kill(child)
    async with manager(tmp_path) as state:
        assert await state.get_all() == SERVED


async def test_a_lock_whose_owner_has_not_said_who_it_is(tmp_path: Path) -> None:
    """Whatever the lock file says, its owner is respected."""
    async with manager(tmp_path):
        for text in (b"", b"\xff", b"[]"):
            (tmp_path / "lab.lock").write_bytes(text)
            with pytest.raises(LockedError, match=rf"locked by pid {os.getpid()}, another manager in this process"):
                await manager(tmp_path).start()


async def test_the_lock_file_stays(tmp_path: Path) -> None:
    """The lock file is never renamed nor deleted, so that two processes cannot lock two files."""
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
    """When stop() runs out of time over a checkpoint, everything is durable, and the state stays locked meanwhile."""
    state = manager(tmp_path, stop_timeout=0.05)
    await state.start()
    await state.set("a", 1)
    ending = flusher(state)
    gate = disk.hold("fsync", "lab.json.tmp")
    await state.stop()
    assert "the checkpoint of stop() made no progress for 0.05 s" in caplog.text
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
    """A child process that uses the manager it inherited, in the loop that it inherited, is told why at once."""
    report = run_child("inherited", tmp_path / "state")
    for call in ("set", "flush", "stop", "start"):
        error, message = report[call]
        assert (call, error) == (call, "UnsupportedError")
        assert "runs in the parent of this forked process" in message
    assert report["parent"] == [2, 0]
    assert asyncio.run(found(tmp_path / "state")) == {"parent": 2}


def test_stop_releases_the_lock_from_a_forked_child(tmp_path: Path) -> None:
    """A child process that lives on does not keep the lock which it inherited, once the parent has stopped."""
    assert run_child("outlived", tmp_path / "state") == {"error": None, "message": ""}


# After a kill


async def test_a_kill_loses_nothing_that_was_flushed(crashed: Path) -> None:
    """After SIGKILL every acknowledged change is there, in order, and what was never flushed is not."""
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
        assert state.revision == 5
    assert json.loads((crashed / "lab.json").read_bytes()).keys() == {*SERVED, "$lab_state"}


async def test_the_first_act_after_a_kill(crashed: Path, disk: Disk) -> None:
    """After a kill nothing counts as durable until a new journal with the whole state does, and flush waits for it."""
    inherited = (crashed / "lab.journal").stat().st_ino
    gate = disk.hold("fsync", "lab.journal.tmp")
    snapshot = disk.hold("open", "lab.json.tmp")
    state = manager(crashed)
    await state.start()
    assert await state.get_all() == SERVED
    await gate.entered()
    flush = asyncio.create_task(state.flush())
    waiting = asyncio.create_task(state.wait_durable())
    for _ in range(10):
        await asyncio.sleep(0)
    assert (state.durable_revision, flush.done(), waiting.done()) == (0, False, False)
    assert kinds(crashed) == "RRRRR"
    gate.open()
    await snapshot.entered()
    assert scan(crashed).header.base == journal.ANY_BASE
    assert kinds(crashed) == "F"
    snapshot.open()
    await asyncio.gather(flush, waiting)
    assert state.durable_revision == 5
    assert inherited not in disk.written_inodes()
    await until(lambda: kinds(crashed) == "")
    assert await found(crashed) == SERVED
    await state.stop()


async def test_durability_after_a_kill_does_not_wait_for_the_snapshot(crashed: Path, disk: Disk) -> None:
    """Once the new journal with the whole state is durable, flush returns, however slow or impossible a snapshot is."""
    snapshot = disk.hold("open", "lab.json.tmp")
    disk.fail("fsync", "lab.json.tmp", times=float("inf"))
    state = manager(crashed)
    await state.start()
    await snapshot.entered()
    assert kinds(crashed) == "F"
    try:
        async with asyncio.timeout(3):
            await state.flush()
        assert state.durable_revision == 5
        await state.set("more", 6)
        async with asyncio.timeout(3):
            await state.flush()
        assert await found(crashed) == SERVED | {"more": 6}
    finally:
        snapshot.open()
        disk.heal()
        await state.stop()


async def test_a_full_disk_after_a_kill(crashed: Path, disk: Disk) -> None:
    """With no room for the first act, start succeeds, reads work, flush raises, and room mends it."""
    before = contents(crashed)
    disk.fill("lab.journal.tmp")
    state = manager(crashed, clock=ManualClock())
    await state.start()
    assert await state.get_all() == SERVED
    await state.set("new", 1)
    for _ in range(3):
        with pytest.raises(UnavailableError, match="No space left on device"):
            await state.flush()
    assert (state.durable_revision, state.revision) == (0, 6)
    assert await state.get_all() == SERVED | {"new": 1}
    assert contents(crashed) == before
    disk.heal()
    await state.flush()
    assert state.durable_revision == 6
    assert await found(crashed) == SERVED | {"new": 1}
    await state.stop()


async def test_a_full_disk_after_a_kill_heals_by_itself(crashed: Path, disk: Disk) -> None:
    """The first act is tried again in the background, without a flush."""
    clock = ManualClock()
    disk.fill("lab.journal.tmp")
    state = manager(crashed, clock=clock)
    await state.start()
    await until(lambda: state.status().flush_failures == 1)
    disk.heal()
    clock.advance(10)
    await state.wait_durable()
    assert state.durable_revision == 5
    await state.stop()


async def test_killed_again_and_again(tmp_path: Path) -> None:
    """Processes that are killed one after the other hand the state on."""
    for _ in range(3):
        child = start_child("serve", tmp_path)
        kill(child)
    async with manager(tmp_path) as state:
        assert await state.get_all() == SERVED
        assert state.revision == 15


async def test_an_inherited_header_is_not_appended_to(tmp_path: Path, disk: Disk) -> None:
    """A journal that holds only its header is replaced by the first commit, never appended to."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    kept = Kept(tmp_path, disk)
    assert kinds(tmp_path) == ""
    async with manager(tmp_path) as state:
        await state.set("b", 2)
        await state.flush()
        assert kinds(tmp_path) == "R"
        assert scan(tmp_path).header.base == journal.scan(kept.bytes, "lab", "kept").header.base
        await state.set("c", 3)
        await state.flush()
        assert await found(tmp_path) == {"a": 1, "b": 2, "c": 3}
    kept.check_never_written()


@pytest.mark.parametrize("cut", [1, 30])
async def test_a_torn_tail_is_put_aside(crashed: Path, caplog: pytest.LogCaptureFixture, cut: int) -> None:
    """A last frame that a crash cut short is copied aside, logged, dropped, and everything before it is there."""
    data = (crashed / "lab.journal").read_bytes()
    last = data.rindex(b"\n", 0, len(data) - 1) + 1
    (crashed / "lab.journal").write_bytes(data[:-cut])
    async with manager(crashed) as state:
        assert await state.get_all() == {key: value for key, value in SERVED.items() if value < 4}
        await state.set("new", 1)
        await state.flush()
        assert (await found(crashed))["new"] == 1
    (torn,) = crashed.glob("lab.journal.torn-*")
    assert (torn.read_bytes(), mode(torn)) == (data[last:-cut], 0o600)
    assert f"the last {len(data) - cut - last} bytes of its journal are no whole record" in caplog.text
    async with manager(crashed):
        pass
    assert list(crashed.glob("lab.journal.torn-*")) == [torn]


async def test_five_torn_tails_are_kept(crashed: Path) -> None:
    """Of the torn tails that were put aside, the newest five are kept."""
    for number in range(1, 8):
        (crashed / f"lab.journal.torn-{number:013}").write_bytes(b"%d" % number)
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
    kept = sorted(path.read_bytes() for path in crashed.glob("lab.journal.torn-*"))
    assert kept == [b"4", b"5", b"6", b"7", b"torn"]


async def test_a_torn_tail_that_cannot_be_put_aside(
    crashed: Path, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the copy of a torn tail is logged, and keeps nothing from starting."""
    monkeypatch.setattr("time.time_ns", lambda: 7_000_000)
    disk.fill("lab.journal.torn-7")
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
    assert "the torn tail of" in caplog.text
    assert list(crashed.glob("lab.journal.torn-*")) == []


async def test_a_directory_that_cannot_be_listed(
    crashed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged that a torn tail and temporary files stay where they are; start, stop and the lock work."""
    stale = crashed / "lab.journal.00000000.tmp"
    stale.touch()
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", denied)
        async with manager(crashed) as state:
            assert await state.get_all() == SERVED
    assert f"listing {crashed} failed: Permission denied; give this user the permission" in caplog.text
    assert "the torn tail of" in caplog.text
    assert f"temporary files beside {crashed / 'lab.json'} stay until the next start" in caplog.text
    assert stale.exists()
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
    assert not stale.exists()


def denied(*args: object) -> list[str]:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EIO, "look into the log of the kernel"),
        (errno.ENOSPC, "free some"),
        (errno.EDQUOT, "have the quota raised"),
        (errno.EFBIG, "raise the limit on the size of files"),
        (errno.EMFILE, "raise the limit on open files"),
        (errno.EIO + 1, "(not durable yet"),
    ],
)
async def test_what_may_mend_itself_is_told_with_its_remedy(tmp_path: Path, disk: Disk, code: int, remedy: str) -> None:
    """The error names the file, says why, and what to do; it is one that a repetition may find mended."""
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 1)
    disk.fail("open", "lab.journal.tmp", code)
    with pytest.raises(UnavailableError) as raised:
        await state.flush()
    assert re.search(
        rf"lab\.journal\.\w+\.tmp failed: {re.escape(os.strerror(code))}.*{re.escape(remedy)}", str(raised.value)
    )
    await state.flush()
    await state.stop()


async def test_a_state_whose_name_looks_like_a_torn_tail(crashed: Path) -> None:
    """Putting a torn tail aside deletes no file of another state, whatever its name."""
    names = [f"lab.journal.torn-{number}" for number in range(7)]
    for name in names:
        async with manager(crashed, name) as state:
            await state.set("me", name)
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    async with manager(crashed):
        pass
    for name in names:
        async with manager(crashed, name) as state:
            assert await state.get_all() == {"me": name}


# Damage


def damaged_snapshot(directory: Path) -> None:
    path = directory / "lab.json"
    path.write_bytes(path.read_bytes().replace(b"snapshot", b"snapshoT"))


def empty_snapshot(directory: Path) -> None:
    (directory / "lab.json").write_bytes(b"")


def missing_snapshot(directory: Path) -> None:
    (directory / "lab.json").unlink()


def older_snapshot(directory: Path) -> None:
    (directory / "lab.json").write_bytes(b'{"older":true}')


def damaged_record(directory: Path) -> None:
    path = directory / "lab.journal"
    path.write_bytes(path.read_bytes().replace(b"record-1", b"record-X"))


def glued_records(directory: Path) -> None:
    path = directory / "lab.journal"
    head, first, rest = path.read_bytes().split(b"\n", 2)
    path.write_bytes(head + b"\n" + first + b"\x0b" + rest)


def missing_record(directory: Path) -> None:
    path = directory / "lab.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


def empty_journal(directory: Path) -> None:
    (directory / "lab.journal").write_bytes(b"")


def damaged_header(directory: Path) -> None:
    path = directory / "lab.journal"
    path.write_bytes(path.read_bytes().replace(b'"salt"', b'"sale"', 1))


def another_states_journal(directory: Path) -> None:
    data = journal.header("other", "0" * 16, journal.NO_BASE)
    (directory / "lab.journal").write_bytes(data)


def two_halves(directory: Path) -> None:
    """A journal that begins with the whole state, without it."""
    (directory / "lab.journal").write_bytes(journal.header("lab", "0" * 16, journal.ANY_BASE))


def full_frame_too_late(directory: Path) -> None:
    salt = "0" * 16
    frames = journal.header("lab", salt, journal.NO_BASE) + journal.frame(salt, Kind.FULL, b"{}")
    (directory / "lab.journal").write_bytes(frames)


def unknown_frame(directory: Path) -> None:
    path = directory / "lab.journal"
    header = scan(directory).header
    path.write_bytes(path.read_bytes() + journal.frame(header.salt, Kind.HEADER, b"{}"))


def no_record(directory: Path) -> None:
    path = directory / "lab.journal"
    path.write_bytes(path.read_bytes() + journal.frame(scan(directory).header.salt, Kind.RECORD, b'{"from":1}'))


@pytest.mark.parametrize(
    "damage",
    [
        damaged_snapshot,
        empty_snapshot,
        missing_snapshot,
        older_snapshot,
        damaged_record,
        glued_records,
        missing_record,
        empty_journal,
        damaged_header,
        another_states_journal,
        two_halves,
        full_frame_too_late,
        unknown_frame,
        no_record,
    ],
)
async def test_damage_is_refused_and_left_untouched(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Damage fails the start with its path, changes no byte, and the right files put back are opened as before."""
    directory = tmp_path / "state"
    async with manager(directory) as state:
        await state.set("snapshot", "snapshot")
    state = manager(directory)
    await state.start()
    for number in range(4):
        await state.set(f"record-{number}", number)
        await state.flush()
    right = shutil.copytree(directory, tmp_path / "right")
    everything = await state.get_all()
    await state.stop()
    for path in directory.iterdir():
        shutil.copy(right / path.name, path)
    damage(directory)
    before = contents(directory)
    for _ in range(2):
        with pytest.raises(CorruptionError) as raised:
            await manager(directory).start()
        assert raised.value.path in {str(directory / "lab.json"), str(directory / "lab.journal")}
        assert raised.value.path in str(raised.value)
        assert contents(directory) == before
    for name in ("lab.json", "lab.journal"):
        shutil.copy(right / name, directory / name)
    async with manager(directory) as state:
        assert await state.get_all() == everything


async def test_the_other_states_name_is_in_the_message(tmp_path: Path) -> None:
    """A journal that belongs to another state says so."""
    another_states_journal(tmp_path)
    with pytest.raises(CorruptionError, match="it is the journal of 'other', not of 'lab'; put the right file back"):
        await manager(tmp_path).start()


async def test_newer_formats_are_refused_and_left_untouched(tmp_path: Path) -> None:
    """A newer format of the journal or the snapshot is not damage: the message says which version to use."""
    salt = "0" * 16
    newer = b'{"format":2,"name":"lab","salt":"%s","base":"none"}' % salt.encode()
    for name, data in (
        ("lab.journal", journal.frame(salt, Kind.HEADER, newer)),
        ("lab.json", b'{"$lab_state":{"format":2,"whatever":1}}'),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            UnsupportedError, match=rf"{name} has .*format 2, .* knows 1: use the version that wrote it"
        ):
            await manager(tmp_path).start()
        assert contents(tmp_path) == {name: data}
        (tmp_path / name).unlink()


async def test_an_edited_snapshot_without_its_member_is_accepted(tmp_path: Path) -> None:
    """After a clean stop, a snapshot edited by hand is accepted once its reserved member is deleted."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    path = tmp_path / "lab.json"
    edited = json.loads(path.read_bytes()) | {"b": 2}
    path.write_text(json.dumps(edited))
    with pytest.raises(CorruptionError, match="delete the member"):
        await manager(tmp_path).start()
    del edited["$lab_state"]
    path.write_text(json.dumps(edited))
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1, "b": 2}
        await state.set("c", 3)
        await state.flush()
        assert await found(tmp_path) == {"a": 1, "b": 2, "c": 3}


async def test_the_loops_own_threads_are_not_needed(tmp_path: Path) -> None:
    """Commits, checkpoints and stop go on while other code keeps every thread of the loop's default executor busy."""
    busy = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        executor.submit(busy.wait)
        try:
            state = manager(tmp_path, stop_timeout=2)
            await state.start()
            await state.set("a", 1)
            await state.flush()
            await state.stop()
            assert (tmp_path / "lab.json").exists()
            assert kinds(tmp_path) == ""
        finally:
            busy.set()


async def test_threads_end_with_the_session(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stopped manager leaves no thread and no open file behind, after failures and cancelled starts too."""
    caplog.set_level(logging.CRITICAL)
    threads = set(threading.enumerate())
    for _ in range(2):  # the first round makes what the process keeps: the loop's own descriptors
        before = set(Path("/proc/self/fd").iterdir())
        async with manager(tmp_path, "good") as state:
            await state.set("a", "x" * DUE)
            await state.flush()
        (tmp_path / "bad.json").write_bytes(b"bad")
        with pytest.raises(CorruptionError):
            await manager(tmp_path, "bad").start()
        starting = asyncio.create_task(manager(tmp_path, "cancelled").start())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await until(lambda: all(t in threads or t.name.startswith("asyncio_") for t in threading.enumerate()))
    assert set(Path("/proc/self/fd").iterdir()) == before


async def test_group_commit_writes_one_frame(tmp_path: Path, disk: Disk) -> None:
    """Everyone who waits while a sync is under way shares the next frame and the next sync."""
    state = manager(tmp_path, flush_interval=0)
    await state.start()
    await state.set("first", 0)
    gate = disk.hold("fdatasync", "lab.journal")
    second = asyncio.create_task(state.set("second", 0))
    await gate.entered()
    disk.calls.clear()
    others = [asyncio.create_task(state.set(f"other-{number}", number)) for number in range(50)]
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(second, *others)
    assert [call.function for call in disk.calls if call.function != "fstat"] == ["pwrite", "fdatasync"]
    assert kinds(tmp_path) == "RRR"
    await state.stop()


async def test_a_failed_sync_of_a_restored_snapshot_is_not_repeated(tmp_path: Path, disk: Disk) -> None:
    """What the kernel said it could not write is never relied on: the next journal holds everything itself."""
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
    """When the last checkpoint failed behind the rename and nothing changed since, stop() still leaves one clean file."""
    state = manager(tmp_path, clock=ManualClock())
    await state.start()
    await state.set("large", "x" * 2 * DUE)
    disk.fail("fsync", "directory", skip=1)  # behind the rename of the snapshot
    await state.flush()
    await until(lambda: state.status().flush_failures == 1)
    await state.stop()
    assert kinds(tmp_path) == ""
    assert await found(tmp_path) == {"large": "x" * 2 * DUE}


async def test_a_session_closed_under_a_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    """What the checkpoint had begun to write is gone, and its caller is told."""
    session = await FileStorage(tmp_path).open("lab")

    async def closing() -> AsyncIterator[bytes]:
        yield b"{"
        await session.aclose()

    with pytest.raises(UnsupportedError, match="is closed"):
        await session.checkpoint(closing)
    await session.aclose()
    assert not list(tmp_path.glob("*.tmp"))


async def test_a_session_closed_under_a_checkpoint_writes_into_no_other_file(tmp_path: Path) -> None:
    """Where the close waits for a slow commit, slices that come meanwhile are refused: their descriptor is another's."""
    session = await FileStorage(tmp_path).open("lab")
    gate, other = threading.Event(), tmp_path / "other"
    session._commits.submit(gate.wait)
    closing: list[asyncio.Task[None]] = []
    files: list[io.FileIO] = []

    async def slices() -> AsyncIterator[bytes]:
        yield b"{" * 2 * MIB
        assert session._new is not None
        new, _ = session._new
        number = new._fd
        closing.append(asyncio.create_task(session.aclose()))
        await until(lambda: new._fd < 0)
        files.append(await asyncio.to_thread(io.FileIO, other, "w"))
        assert files[0].fileno() == number
        await asyncio.to_thread(files[0].write, b"precious")
        yield b"{" * 2 * MIB

    checkpoint = asyncio.create_task(session.checkpoint(slices))
    with pytest.raises(UnsupportedError, match="is closed"):
        await checkpoint
    gate.set()
    await closing[0]
    files[0].close()
    assert other.read_bytes() == b"precious"


async def test_a_journal_that_cannot_be_looked_up_leaves_no_descriptor(tmp_path: Path, disk: Disk) -> None:
    """A new journal that is refused by `fstat` is closed and deleted, and the one before it stays in use."""
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


HANGING = """
import asyncio, sys, threading
from lab_state import Config, FileStorage, Manager, UnavailableError
from lab_state.storage import _fs

async def main(directory, where):
    state = Manager(Config(name="lab", flush_interval=None, stop_timeout=0.05), FileStorage(directory))
    await state.start()
    await state.set("a", 1)
    await state.flush()
    await state.set("b", 2)
    if where == "commit":
        _fs._sync_data = lambda fd: threading.Event().wait()
    else:
        await state.flush()
        _fs._sync = lambda fd: threading.Event().wait()
    try:
        await state.stop()
    except UnavailableError:
        pass

run = asyncio.run if sys.argv[3] == "cancelled" else asyncio.new_event_loop().run_until_complete
run(main(*sys.argv[1:3]))
print("ended")
"""


@pytest.mark.parametrize("where", ["commit", "checkpoint"])
@pytest.mark.parametrize("end", ["cancelled", "forgotten"])
def test_a_disk_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path, where: str, end: str) -> None:
    """Once stop() has given up, neither the end of the event loop nor that of the interpreter waits for the disk."""
    command = [sys.executable, "-c", HANGING, str(tmp_path / "state"), where, end]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "ended\n"


def test_a_lock_is_released_once(tmp_path: Path) -> None:
    """A second release does not close what another file got as its number."""
    lock = Lock(str(tmp_path / "lab.lock"))
    lock.release()
    with (tmp_path / "other").open("w") as other:
        lock.release()
        other.write("still open")


def test_a_file_that_cannot_be_looked_up_is_not_one_that_is_gone() -> None:
    """What keeps a lookup from being answered is told; only "no such file" means that there is none."""
    longer = "x" * 300
    for look_up in (_lookup.fingerprint, lambda path: _lookup.is_file(path, _lookup.NO_FILE)):
        with pytest.raises(UnsupportedError, match=r"looking up x+ failed: File name too long; the path is too long"):
            look_up(longer)
    assert _lookup.fingerprint("nowhere/at/all") is None
    assert not _lookup.is_file("nowhere/at/all", _lookup.NO_FILE)
