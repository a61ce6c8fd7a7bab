"""Helpers of the tests of `FileStorage`: a disk with faults, child processes, and the contents of the files."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import flusher_of

from lab_state import (
    Config,
    FileStorage,
    Manager,
)
from lab_state import _journal as journal
from lab_state._flusher import Flusher

CHILD = Path(__file__).with_name("file_child.py")
COPY = "copy-of-what-is-on-disk"
MIB = 1024 * 1024
DUE = 4 * MIB
"""The size of a value that makes the journal large enough for a checkpoint, in bytes."""
SERVED = {f"key-{number}": number for number in range(5)}


# Tools


def plain(name: str) -> str:
    """Return the name of a temporary file without its unique part."""
    return re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", name)


@dataclass
class Fault:
    """A fault of one function on one file. After `skip` calls that succeed, `times` calls fail."""

    function: str
    name: str
    code: int
    skip: int
    times: float


class Gate:
    """A gate that holds a thread in a call until the test opens the gate."""

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
    """The module `os` for `_fs`: the real module with the planned faults. It also records the calls.

    The name of a file is the last part of its path. A renamed file has its new name. The directory of a state has the name
    `directory`, and all directories above it have the name `above`. Calls on the copies that `found` makes are not recorded.
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
        """Let the disk be full for these files. Half of the next write succeeds, and all later writes fail."""
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


def manager(directory: Path, name: str = "lab", **settings: Any) -> Manager:
    clock = settings.pop("clock", None)
    return Manager(Config(name=name, **{"flush_interval": None, **settings}), FileStorage(directory), clock=clock)


def flusher(state: Manager) -> Flusher:
    """Return the flusher of a running manager."""
    return flusher_of(state)


def start_child(command: str, directory: Path) -> subprocess.Popen[str]:
    """Start a child, and wait until it is ready."""
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
    """Let the event loop run until a thread or a task has made the condition true."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- there is no event to wait for
            await asyncio.sleep(0)


async def found(directory: Path) -> dict[str, Any]:
    """Return the values that the next start would load if this process were killed now."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as place:
        # Other threads create and delete temporary files meanwhile. No start reads them.
        copy = shutil.copytree(directory, Path(place) / COPY, ignore=shutil.ignore_patterns("*.tmp"))
        async with manager(copy) as state:
            return await state.get_all()


def scan(directory: Path, name: str = "lab") -> journal.Scan:
    path = directory / f"{name}.journal"
    return journal.scan(path.read_bytes(), name, str(path))


def kinds(directory: Path) -> str:
    """Return the kinds of the frames in the journal, after the header."""
    found = scan(directory)
    return "".join(frame.kind.value for frame in found.frames) + "E" * found.is_ended


def contents(directory: Path) -> dict[str, bytes]:
    """Return the contents of all files except the lock file."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.suffix != ".lock"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def view(data: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def slices() -> AsyncIterator[bytes]:
        yield data

    return slices


class Kept:
    """A journal with a second name, so that its inode is kept. The object can check that the journal was not written."""

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
        """Store the bytes. From now on, the journal must not be written."""
        self.bytes = self._path.read_bytes()
        self._disk.calls.clear()


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
        """Return whether this user is root, and root may mount here."""
        with tempfile.TemporaryDirectory() as place:
            try:
                with cls(Path(place)):
                    return True
            except (OSError, subprocess.CalledProcessError):
                return False
