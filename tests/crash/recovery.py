"""What the library makes of a state that a crash left: a version that there was, or a violation."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import pytest
from disk import State
from recorder import DIRECTORY, NAME
from world import QUIET, Clock, Contents, Version, abort, held, is_overdue

from lab_state import Config, FileStorage, Manager
from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state._migrations import ANY
from lab_state.storage import _file_start
from lab_state.storage._file_start import open_writer
from lab_state.storage._leftovers import Leftovers

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
"""Where files cost least."""


class ViolationError(Exception):
    """A state that the library refuses, or that never existed."""


class Recovery:
    """Puts states into a directory and lets the library recover them.

    Each is recovered twice the short way, which is what a start does before there is a
    manager. Every `whole_every`-th goes the whole way too: a manager starts, is killed,
    and another one starts.

    Attributes:
        short: How many states went the short way.
        whole: How many of them went the whole way too.
    """

    def __init__(self, whole_every: int = 25, also: Callable[[LoadedState], object] | None = None) -> None:
        """Begin. `also` checks more of each state, and raises a `ViolationError`."""
        self.short = self.whole = 0
        self._also = also
        self._whole_every = whole_every
        self._root = Path(tempfile.mkdtemp(prefix="lab_state-", dir=MEMORY))
        self._directory = self._root / DIRECTORY
        self._runner = asyncio.Runner()
        self._patch = pytest.MonkeyPatch()
        # Two starts within one millisecond would put a torn tail aside under the same name.
        self._patch.setattr(_file_start, "wall_now", itertools.count(10**12).__next__)
        self._known: set[str] = set()
        self._tried: set[tuple[int, int]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.undo()
        self._runner.close()
        shutil.rmtree(self._root)

    def put(self, state: State) -> Path:
        """Make the directory equal to the state; return it."""
        for path in self._known:
            for name in os.listdir(f"{self._root}/{path}"):  # noqa: PTH208 -- ten times as fast as pathlib
                if f"{path}/{name}" not in self._known:
                    os.unlink(f"{self._root}/{path}/{name}")  # noqa: PTH108 -- likewise
        directories = {path for path, data in state.items() if data is None}
        if self._known - directories:
            shutil.rmtree(self._root)
            self._root.mkdir()
            self._known = set()
        for path, data in state.items():
            if data is None:
                if path not in self._known:
                    (self._root / path).mkdir()
                    self._known.add(path)
            else:
                fd = os.open(f"{self._root}/{path}", os.O_WRONLY | os.O_CREAT, 0o600)
                os.write(fd, data)
                os.close(fd)
        self._known |= {"deep", DIRECTORY}  # the library makes them
        return self._root

    def check(self, state: State, versions: list[Version], now: int) -> int:
        """Return the version that the library finds in a state.

        Args:
            state: What a crash left.
            versions: Every state that there ever was.
            now: When the recovery takes place, in seconds of the clock of `World`.

        Raises:
            ViolationError: None of them.
        """
        self.put(state)
        try:
            answer = self._twice()
            number = _find(answer, versions)
            self.short += 1
            if self.short % self._whole_every == 0:
                self.whole += 1
                self._runner.run(self._whole(answer, now, self.whole % 3))
        except ViolationError:
            raise
        except Exception as error:
            raise ViolationError(f"{type(error).__name__}: {error}") from error
        return number

    def _twice(self) -> Version:
        found = self._open()
        if self._open() != found:
            raise ViolationError("the second recovery finds something else than the first one")
        return _loaded(*found, self._also)

    def _open(self) -> tuple[bytes | None, tuple[bytes, ...]]:
        """Open a state as `FileStorage.open` does, without threads and a loop."""
        writer, recovery = open_writer(str(self._directory), NAME, self._tried, Leftovers())
        writer.close()
        return recovery.snapshot, recovery.records

    async def _whole(self, expected: Version, now: int, turn: int) -> None:
        async with self._started(expected, now) as first:
            if turn > 0:  # else it is killed at once
                await first.flush()
            if turn == 2:
                await first.set("one-more", turn)
                await first.flush()
            expected = Version(first.revision, *held(first._core.state))
        if turn == 2:
            async with self._started(expected, now) as second:
                await second.stop()
        async with self._started(expected, now):
            pass

    @asynccontextmanager
    async def _started(self, expected: Version, now: int) -> AsyncIterator[Manager]:
        """Start a manager, and kill it at the end of the block unless it was stopped."""
        manager = await self._start(expected, now)
        try:
            yield manager
        finally:
            if manager.status().phase == "running":
                await abort(manager)

    async def _start(self, expected: Version, now: int) -> Manager:
        clock = Clock()
        clock.advance(now)
        manager = Manager(
            Config(name=NAME, flush_interval=None), FileStorage(self._directory), clock=clock, logger=QUIET, schema=ANY
        )
        await manager.start()
        state = manager._core.state
        found = manager.revision, held(state)
        if found != _swept(expected, state.now()):
            await abort(manager)
            raise ViolationError(f"a manager finds {found} where the short way found {expected}")
        return manager


def _loaded(
    snapshot: bytes | None, records: tuple[bytes, ...], also: Callable[[LoadedState], object] | None
) -> Version:
    """Return what `Manager.start` makes of it."""
    loaded = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, "snapshot")
    loaded = replay(loaded, records, "journal")
    if also is not None:
        also(loaded)
    values = msgspec.json.decode(msgspec.json.encode(loaded.entries)) if loaded.entries else {}
    return Version(loaded.revision, values, dict(loaded.expires))


def _swept(answer: Version, now: int) -> tuple[int, Contents]:
    """Return what a start makes of it: overdue keys are deleted, as one change."""
    gone = {key for key, at in answer.expires.items() if is_overdue(at, now)}
    values = {key: value for key, value in answer.values.items() if key not in gone}
    expires = {key: at for key, at in answer.expires.items() if key not in gone}
    return answer.revision + bool(gone), (values, expires)


def _find(answer: Version, versions: list[Version]) -> int:
    for number in reversed(range(len(versions))):
        if versions[number] == answer:
            return number
    raise ViolationError(f"revision {answer.revision} never was like this: {str(answer)[:1000]}")
