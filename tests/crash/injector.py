"""Faults and kills at system calls, in this process: for a child process that has nothing else to do.

Stands in for what the package calls to write, sync, rename, open, delete and cut off files;
all that is outside of one directory goes through. Calls are named as the kernel names them.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiofiles.threadpool
import msgspec

CALLS = ("write", "fsync", "fdatasync", "rename", "openat", "unlink", "ftruncate")
_HALF_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""These come after a part of the bytes was written; the others say that nothing was."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Calls that fail: the first-th of its name, and every so many-th after it, up to so many times.

    Only those on files whose paths end as `name` says are counted.
    """

    call: str
    name: str = ""
    error: str
    first: int
    every: int = 1
    times: int = 1_000_000


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    """SIGKILL of this process before the n-th call, whatever its name, or when half of it is written. It may be another signal."""

    number: int
    half: bool = False
    signal: int = signal.SIGKILL


class Injector:
    """Counts the calls, and makes those fail, or kill, that the plan names.

    Attributes:
        calls: Those that there were, in order.
        struck: How many of each failed.
    """

    def __init__(self, root: Path, faults: list[Fault], kill: Kill | None) -> None:
        self.calls: list[str] = []
        self.struck: Counter[str] = Counter()
        self._root = str(root)
        self._faults = faults
        self._numbers = [0] * len(faults)
        self._killed_at = 0 if kill is None else kill.number
        self._half = kill is not None and kill.half
        self._signal = signal.SIGKILL if kill is None else kill.signal
        self._lock = threading.Lock()

    def install(self) -> None:
        """Install the faults for the rest of the process."""
        for name, call in (
            ("open", "openat"),
            ("listdir", "openat"),
            ("scandir", "openat"),
            ("fsync", "fsync"),
            ("fdatasync", "fdatasync"),
            ("ftruncate", "ftruncate"),
            ("replace", "rename"),
            ("unlink", "unlink"),
            ("link", "linkat"),
            ("mkdir", "mkdir"),
        ):
            setattr(os, name, self._standing_in(call, getattr(os, name)))
        io.open = self._standing_in("openat", io.open)  # pathlib's
        os.pwrite = self._writing(os.pwrite)
        injector = self

        class Written(io.FileIO):
            def write(self, data: Any) -> int:
                def write(fd: int, part: Any) -> int:
                    return super(Written, self).write(part)

                return injector._writing(write)(self.fileno(), data)

        def opened(fd: int, mode: str, **rest: Any) -> Written:
            return Written(fd, mode, closefd=rest["closefd"])

        vars(aiofiles.threadpool)["sync_open"] = opened

    def _standing_in(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(file: Any, *args: Any, **kwargs: Any) -> Any:
            path = _path(file)
            if not path.startswith(self._root):
                return real(file, *args, **kwargs)
            error, killing = self._next(call, path)
            if killing:
                self._die()
            if error is not None:
                raise error
            return real(file, *args, **kwargs)

        return stand_in

    def _writing(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(fd: int, data: Any, *args: Any) -> int:
            path = _path(fd)
            if not path.startswith(self._root):
                return real(fd, data, *args)
            error, killing = self._next("write", path)
            if (killing and self._half) or (error is not None and error.errno in _HALF_WRITTEN):
                real(fd, data[: len(data) // 2], *args)
            if killing:
                self._die()
            if error is not None:
                raise error
            return real(fd, data, *args)

        return write

    def _die(self) -> None:
        os.kill(os.getpid(), self._signal)

    def _next(self, call: str, path: str) -> tuple[OSError | None, bool]:
        with self._lock:
            self.calls.append(call)
            killing = len(self.calls) == self._killed_at
            for number, fault in enumerate(self._faults):
                if fault.call == call and path.endswith(fault.name):
                    self._numbers[number] += 1
                    strikes, rest = divmod(self._numbers[number] - fault.first, fault.every)
                    if strikes >= 0 and not rest and strikes < fault.times:
                        self.struck[call] += 1
                        return OSError(errno_of(fault.error), os.strerror(errno_of(fault.error))), killing
        return None, killing


def _path(file: Any) -> str:
    return str(Path(f"/proc/self/fd/{file}").readlink()) if isinstance(file, int) else os.fspath(file)


def errno_of(name: str) -> int:
    return int(getattr(errno, name))
