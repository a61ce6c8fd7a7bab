"""What `test_reading_race.py` reads beside: a process that writes at full speed, replaces its files, fails, and dies.

`python racing.py <directory> <shared file> <seed>` forks one child after the other. A child
writes until it is killed. Each change makes one revision, and what a state holds follows from
its revision alone (`contents`). The shared file says, as numbers in memory, what a reader may find.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import mmap
import os
import random
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab_state import Config, FileStorage, Manager, StorageError
from lab_state.storage import _file_writer, _fs

NAME = "race"
LIVES = 1 << 16
"""More than there can be."""

_LIFE, _ACKNOWLEDGED, _SYNCED, _PID, _HELD, _FAULTS, _PEAKS = range(7)
_SIZE = 8 * (_PEAKS + LIVES)
_MIN_CHECKPOINT_BYTES = 1500
_CLEARED_EVERY = 40
_SLOTS = 7


class Shared:
    """Numbers that two processes see.

    Attributes:
        numbers: `life` counts the starts; `acknowledged` is the last revision that a flush
            returned for; `synced` the last one in a frame whose sync returned; `held` is 1 for
            as long as a manager runs for certain. From `_PEAKS` on, for each life, the
            last revision that was made in it.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(_SIZE)
            self.numbers = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("q")

    def peak(self, first: int, last: int) -> int:
        return max(self.numbers[_PEAKS + life] for life in range(first, last + 1))


def contents(revision: int) -> dict[str, Any]:
    """Return the contents of the state at a revision."""
    if not revision:
        return {}
    found: dict[str, Any] = {}
    for each in range(max(1, revision // _CLEARED_EVERY * _CLEARED_EVERY), revision + 1):
        found.update(change(each))
    if revision % 2:
        found.pop("even", None)
    return found


def change(revision: int) -> dict[str, Any]:
    """Return the values that the change with this number sets.

    It deletes `even` if the number is odd, and all keys if `_CLEARED_EVERY` says so.
    """
    values: dict[str, Any] = {
        "revision": revision,
        f"slot/{revision % _SLOTS}": [revision],
        f"blob/{revision % 3}": f"{revision} " * (revision * 37 % 50),
    }
    return values if revision % 2 else {**values, "even": revision}


async def make(state: Manager, revision: int) -> None:
    async with state.transaction() as tx:
        if revision % _CLEARED_EVERY == 0:
            tx.delete_all()
        elif revision % 2:
            tx.delete("even")
        tx.set_many(change(revision))


class Failing:
    """Calls of the system that fail at random; and what a sync that returned made durable."""

    def __init__(self, numbers: memoryview[int], dice: random.Random) -> None:
        self.on = False
        self._numbers = numbers
        self._dice = dice
        fs: Any = _fs  # what takes the place of its functions passes on what it does not know
        self._write, self._append, self._create = fs._write, fs.append, fs.create
        self._sync_data, self._sync_directory, self._rename = fs._sync_data, fs.sync_directory, fs.rename
        fs._write, fs.append, fs.create = self.write, self.append, self.create
        fs._sync_data, fs.sync_directory, fs.rename = self.sync_data, self.sync_directory, self.rename

    def _fails(self, rate: float) -> bool:
        failing = self.on and self._dice.random() < rate
        self._numbers[_FAULTS] += failing
        return failing

    def write(self, fd: int, parts: Sequence[bytes], offset: int, *rest: Any) -> Any:
        if self._fails(0.02):
            whole = b"".join(parts)
            os.pwrite(fd, whole[: self._dice.randrange(len(whole))], offset)
            raise OSError(errno.ENOSPC, "on demand")
        return self._write(fd, parts, offset, *rest)

    def sync_data(self, fd: int) -> None:
        if self._fails(0.02):
            raise OSError(errno.EIO, "on demand")
        self._sync_data(fd)

    def sync_directory(self, path: str) -> None:
        if self._fails(0.02):
            raise StorageError("on demand")
        self._sync_directory(path)

    def rename(self, temporary: str, path: str, *rest: Any) -> Any:
        if self._fails(0.02):
            raise StorageError("on demand")
        return self._rename(temporary, path, *rest)

    def append(self, fd: int, path: str, parts: Sequence[bytes], *rest: Any) -> None:
        self._append(fd, path, parts, *rest)
        self._synced(parts)

    def create(self, path: str, parts: Sequence[bytes], *rest: Any) -> Any:
        fd = self._create(path, parts, *rest)
        self._synced(parts)
        return fd

    def _synced(self, parts: Sequence[bytes]) -> None:
        for part in parts:
            for found in re.findall(rb'^\{"from":\d+,"to":(\d+),|,"\$lab_state":\{"format":1,"revision":(\d+),', part):
                self._numbers[_SYNCED] = max(self._numbers[_SYNCED], *map(int, filter(None, found)))


async def killed(manager: Manager) -> None:
    """End a manager as SIGKILL would, and go on in this process."""
    flusher = manager._flusher
    assert flusher is not None
    session: Any = flusher.abort()
    await asyncio.sleep(0)
    await session._commits.run(session._writer.close)


async def live(directory: str, numbers: memoryview[int], dice: random.Random) -> None:
    _file_writer._MIN_CHECKPOINT_BYTES = _MIN_CHECKPOINT_BYTES
    failing = Failing(numbers, dice)
    while True:
        life = numbers[_LIFE]
        numbers[_PEAKS + life + 1] = numbers[_PEAKS + life]
        numbers[_LIFE] = life = life + 1
        state = Manager(Config(name=NAME, flush_interval=None), FileStorage(directory))
        await state.start()
        numbers[_PEAKS + life] = revision = state.revision
        if await state.get_all() != contents(revision):
            raise RuntimeError(f"revision {revision} is not what was written")
        numbers[_HELD] = failing.on = True
        for _ in range(dice.randrange(200)):
            for _ in range(dice.choice((1, 1, 1, 2, 5))):
                revision += 1
                numbers[_PEAKS + life] = revision
                await make(state, revision)
            try:
                await state.flush()
            except StorageError:
                continue
            numbers[_ACKNOWLEDGED] = revision
        numbers[_HELD] = failing.on = False
        await (state.stop() if dice.random() < 0.5 else killed(state))


def main() -> None:
    directory, shared, seed = sys.argv[1:]
    logging.getLogger("lab_state").setLevel(logging.CRITICAL)  # thousands of faults on demand
    numbers, dice = Shared(Path(shared)).numbers, random.Random(int(seed))
    while True:
        number = dice.randrange(2**32)
        pid = os.fork()
        if pid == 0:
            numbers[_HELD] = 0
            numbers[_PID] = os.getpid()
            asyncio.run(live(directory, numbers, random.Random(number)))
        _, status = os.waitpid(pid, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise SystemExit("the child died of something else")


if __name__ == "__main__":
    main()
