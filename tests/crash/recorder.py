"""Stands between the library and the file system, and writes down what reaches the disk in which order.

`lab_state.storage._fs` is the only module that opens, writes, syncs, renames, unlinks or
truncates a file. Within `recording` it sees a `Recorder` in place of the module `os`; what
it does through `pathlib` and `aiofiles` is caught there. Every call is made for real, one
at a time. On demand one fails, or the process is dead from there on.

Within `determined` nothing in the library is random, and no pause is long.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from disk import Create, Entry, Link, Mark, Rename, State, Sync, SyncDirectory, Truncate, Unlink, Write, inodes_of

from lab_state import _codec, _journal, _outcomes
from lab_state._clock import Clock
from lab_state._periods import LONGEST_TTL
from lab_state.storage import (
    _directory,
    _file_restore,
    _file_start,
    _fs,
    _history_files,
    _keeping,
    _kept,
    _lookup,
    _new_journal,
)
from lab_state.storage._limits import Limits

NAME = "lab"
DIRECTORY = "deep/states"
"""Where the states are, under the root: the library makes both."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Which calls fail; the first one is number 1.

    Attributes:
        syncs: Syncs, of files and directories alike, that fail with EIO.
        write: The write that is cut short; what follows it has no space left.
        written: How much of that is written, as a fraction; 0 means none, and the call itself fails.
        truncate: Whether the truncation that is to undo it fails.
        kill: The call (of any kind) at which the process dies, before it is made.
    """

    syncs: frozenset[int] = frozenset()
    write: int = 0
    written: float = 0.5
    truncate: bool = False
    kill: int = 0


class Gate:
    """Holds up the thread that makes a call until it is opened."""

    def __init__(self, function: str, suffix: str) -> None:
        self.function, self.suffix = function, suffix
        self.entered = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._opened = threading.Event()

    def enter(self) -> None:
        self._loop.call_soon_threadsafe(self.entered.set)
        self._opened.wait()

    def open(self) -> None:
        self._opened.set()


class Recorder:
    """The module `os` as `_fs` sees it.

    Attributes:
        root: Paths are relative to it; nothing outside of it is recorded.
        start: What was there at the beginning, all of it on the disk for sure.
        entries: What happened since.
        struck: How many entries there were when a fault struck first.
        calls: How many calls there were that can be killed at.
        syncs: How many of these were syncs.
        writes: How many of these were writes.
        links: How many of them were links.
        limits: The limits of the history, as the application has set them.
        gate: Where the next thread that comes along stands still.
        at_death: Called when the process dies.
    """

    def __init__(self, root: Path, faults: Faults | None = None) -> None:
        self.root = root
        self.start: State = dict(_found(root))
        self.entries: list[Entry] = []
        self.struck: int | None = None
        self.calls = self.syncs = self.writes = self.links = 0
        self.limits = Limits(LONGEST_TTL * 1000, None)
        self.gate: Gate | None = None
        self.at_death: Callable[[], object] = lambda: None
        self._faults = faults or Faults()
        self._full = self._dead = self._failing = False
        self._inodes = inodes_of(self.start)
        self._number = len(self.start)
        self._open: dict[int, str | int] = {}  # a path for a directory, else an inode
        self._positions: dict[int, int] = {}
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mark(self, entry: Mark) -> None:
        with self._lock:
            self.entries.append(entry)

    def fail_the_next_sync(self) -> None:
        with self._lock:
            self._failing = True

    def die(self) -> None:
        """Die: from here on, every call of the process fails."""
        self._dead = True

    def revive(self) -> None:
        """Begin the next process. The page cache holds what the dead one did."""
        self._dead = False
        self.at_death = lambda: None
        self._full = False

    @property
    def is_dead(self) -> bool:
        return self._dead

    # What `_fs` calls

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        name = self._name(path)
        if name is not None:
            self._wait("open", name)
        with self._lock:
            creates = name is not None and flags & os.O_CREAT and name not in self._inodes
            if creates:
                self._alive(counts=True)
            fd = os.open(path, flags, mode)
            if name is None:
                return fd
            if creates:
                self._create(name, is_directory=False)
            self._open[fd] = name if flags & os.O_DIRECTORY else self._inodes[name]
            self._positions[fd] = 0
            return fd

    def close(self, fd: int) -> None:
        with self._lock:
            self._open.pop(fd, None)
            os.close(fd)

    def dup2(self, fd: int, number: int) -> None:
        with self._lock:
            self._open[number] = self._open[fd]
            os.dup2(fd, number)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if fd not in self._open:
            return os.pwrite(fd, data, offset)
        self._wait("write", fd)
        return self._write(fd, data, offset)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Write where the last write ended, as a stream of `aiofiles` does."""
        self._wait("write", fd)
        with self._lock:
            number = self._write(fd, data, self._positions[fd])
            self._positions[fd] += number
            return number

    def _write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        with self._lock:
            inode = self._open[fd]
            assert isinstance(inode, int)
            self._alive(counts=True)
            if self._full:
                self._full = False
                _fail(errno.ENOSPC)
            self.writes += 1
            if self.writes == self._faults.write:
                self._strike()
                data = data[: int(len(data) * self._faults.written)]
                if not data:
                    _fail(errno.ENOSPC)
                self._full = True
            number = os.pwrite(fd, data, offset)
            self.entries.append(Write(inode, offset, bytes(data[:number])))
            return number

    def ftruncate(self, fd: int, size: int) -> None:
        with self._lock:
            inode = self._open.get(fd)
            if isinstance(inode, int):
                self._alive(counts=True)
                if self._faults.truncate:
                    _fail(errno.EIO)
                self.entries.append(Truncate(inode, size))
            os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        self._sync(fd)

    def fdatasync(self, fd: int) -> None:
        self._sync(fd)

    def _sync(self, fd: int) -> None:
        what = self._open.get(fd)
        if what is None:
            return
        self._wait("sync", fd)
        with self._lock:
            self._alive(counts=True)
            self.syncs += 1
            ok = self.syncs not in self._faults.syncs and not self._failing
            if self.syncs in self._faults.syncs:
                self._strike()
            self._failing = False
            self.entries.append(SyncDirectory(what, ok) if isinstance(what, str) else Sync(what, ok))
            if not ok:
                _fail(errno.EIO)

    def replace(self, source: str, target: str) -> None:
        old, new = self._name(source), self._name(target)
        assert old is not None
        assert new is not None
        self._wait("rename", old)
        with self._lock:
            self._alive(counts=True)
            os.replace(source, target)  # noqa: PTH105 -- the call that `_fs` makes
            self._inodes[new] = self._inodes.pop(old)
            self.entries.append(Rename(old, new, self._inodes[new]))

    def link(self, source: str, target: str, *, follow_symlinks: bool) -> None:
        old, new = self._name(source), self._name(target)
        assert old is not None
        assert new is not None
        self._wait("link", new)
        with self._lock:
            self._alive(counts=True)
            os.link(source, target, follow_symlinks=follow_symlinks)
            self._inodes[new] = self._inodes[old]
            self.links += 1
            self.entries.append(Link(new, self._inodes[old]))

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        name = self._name(path)
        with self._lock:
            if name is None or name in self._inodes:
                os.mkdir(path, mode)  # noqa: PTH102 -- likewise
                return
            self._alive(counts=True)
            os.mkdir(path, mode)  # noqa: PTH102 -- likewise
            self._create(name, is_directory=True)

    def rmdir(self, path: str) -> None:
        self._remove(path, os.rmdir)

    def unlink(self, path: str) -> None:
        self._remove(path, os.unlink)

    def _remove(self, path: str, remove: Callable[[str], None]) -> None:
        name = self._name(path)
        with self._lock:
            if name is None or name not in self._inodes:
                remove(path)
                return
            self._alive(counts=True)
            remove(path)
            del self._inodes[name]
            self.entries.append(Unlink(name))

    # What they share

    def _name(self, path: str) -> str | None:
        """Return the path relative to the root. The content of the lock file does not matter: `Lock` makes it anew."""
        if path.endswith(".lock") or not Path(path).is_relative_to(self.root):
            return None
        return str(Path(path).relative_to(self.root))

    def _path(self, opened: str | int) -> str:
        if isinstance(opened, str):
            return opened
        return next((path for path, inode in self._inodes.items() if inode == opened), "")

    def _create(self, name: str, *, is_directory: bool) -> None:
        self._inodes[name] = self._number
        self.entries.append(Create(name, self._number, is_directory))
        self._number += 1

    def _alive(self, *, counts: bool) -> None:
        self.calls += counts
        if self.calls == self._faults.kill and not self._dead:
            self._dead = True
            self._strike()
            self.at_death()
        if self._dead:
            _fail(errno.EIO)

    def _strike(self) -> None:
        if self.struck is None:
            self.struck = len(self.entries)

    def _wait(self, function: str, what: str | int) -> None:
        """Stand at the gate, if it is for this path or descriptor; without the lock, so that other calls go on."""
        gate = self.gate
        if gate is None or gate.function != function:
            return
        path = what if isinstance(what, str) else self._path(self._open[what])
        if gate.suffix in path:
            self.gate = None
            gate.enter()


def _fail(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


def _found(root: Path) -> Iterator[tuple[str, bytes | None]]:
    for path in sorted(root.rglob("*")):
        if path.suffix != ".lock":
            yield str(path.relative_to(root)), None if path.is_dir() else path.read_bytes()


class _Opened:
    """A file of `aiofiles`, as far as `_fs` uses it, that tells the recorder."""

    def __init__(self, recorder: Recorder, fd: int, executor: Any) -> None:
        self._recorder, self._fd, self._executor = recorder, fd, executor

    async def write(self, data: memoryview) -> int:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._recorder.write, self._fd, data)


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Let the recorder see what the library does."""

    async def opened(fd: int, *_: Any, executor: Any, **__: Any) -> _Opened:
        return _Opened(recorder, fd, executor)

    with pytest.MonkeyPatch.context() as patch:
        recorder.urandom = _fs.os.urandom  # type: ignore[attr-defined]
        for used in (_fs, _lookup, _directory, _kept, _history_files, _file_restore):
            patch.setattr(used, "os", recorder)
        patch.setattr(_fs, "aiofiles", SimpleNamespace(open=opened))
        yield recorder


class _Seeded:
    """A module with other random bytes, or another time."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def determined(seed: int | str, clock: Clock | None = None) -> Iterator[None]:
    """Let the library draw the same salts, names and numbers each time, and repeat a failed call at once.

    With a clock, it has the time for journals and for pruning. Each of these times is a millisecond later than the one before.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (_fs, _journal, _codec):
            patch.setattr(module, "os", _Seeded(os, urandom=random.Random(f"{module.__name__} {seed}").randbytes))
        numbers, later = iter(range(10**12, 10**13)), itertools.count()

        def wall() -> int:
            return next(numbers) if clock is None else int(clock.time() * 1000) + next(later)

        for dated in (_file_start, _kept, _file_restore):
            patch.setattr(dated, "wall_now", lambda: next(numbers))
        for dated in (_new_journal, _keeping):
            patch.setattr(dated, "wall_now", wall)
        patch.setattr(_outcomes, "_FIRST_PAUSE", 0.0)
        patch.setattr(_outcomes, "_LONGEST_PAUSE", 0.0)
        yield
