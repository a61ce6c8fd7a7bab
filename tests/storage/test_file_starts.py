"""A start that fails, wherever it does, gives back what it took: the lock, descriptors, threads and tasks."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lab_state import Config, FileStorage, Manager, UnavailableError, _journal, _opening, _state, _sweeper, manager
from lab_state.storage import _file_start, _fs, file
from lab_state.storage._lock import Lock


def descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def at_work() -> list[Any]:
    """Return the threads and tasks of managers."""
    named = [(one, one.name) for one in threading.enumerate()] + [(one, one.get_name()) for one in asyncio.all_tasks()]
    return [one for one, name in named if name.startswith("lab_state")]


@pytest.fixture(autouse=True)
async def _gives_back(tmp_path: Path) -> AsyncIterator[None]:
    """Check that nothing is left at the end, and that a manager can start."""
    async with Manager("lab", FileStorage(tmp_path)) as state:  # makes what the process keeps
        await state.set("a", 1)
    await asyncio.to_thread(gc.collect)
    before = descriptors()
    yield
    async with asyncio.timeout(10):
        while at_work():  # noqa: ASYNC110 -- threads end by themselves
            await asyncio.sleep(0)
    assert descriptors() == before
    async with Manager("lab", FileStorage(tmp_path)) as state:
        assert await state.get("a") == 1


@pytest.mark.parametrize("there_are", [0, 1])
async def test_threads_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, there_are: int
) -> None:
    """If no thread can be started, start() raises an UnavailableError, and nothing stays locked.

    One thread is enough.
    """
    real, started = threading.Thread.start, 0

    def start(thread: threading.Thread) -> None:
        nonlocal started
        if thread.name.startswith("lab_state"):
            if started == there_are:
                raise RuntimeError("can't start new thread")
            started += 1
        real(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        state = Manager(Config(name="lab", flush_interval=0), FileStorage(tmp_path))
        if not there_are:
            with pytest.raises(UnavailableError, match=r"no thread could be started .*raise the limit of processes"):
                await state.start()
            return
        async with state:
            await state.set("b", "x" * 5 * 1024 * 1024)  # a checkpoint is due
    assert started == 1


PLACES: dict[str, tuple[Any, str]] = {
    "locking": (_fs, "try_lock"),
    "the lock's file": (_fs, "write_lock"),
    "reading": (_fs, "read"),
    "scanning": (_journal, "scan"),
    "the recovery": (_file_start, "Recovery"),
    "temporary files": (Lock, "note_left"),
    "the session": (file.FileSession, "__init__"),
    "decoding": (_opening, "decode_snapshot"),
    "the map": (_opening, "State"),
    "the flush task": (manager, "Flusher"),
    "sweeping": (_state.State, "sweep"),
    "the sweeper": (_sweeper.Sweeper, "__init__"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
async def test_whatever_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: type[BaseException],
) -> None:
    """A MemoryError or an interrupt at any step of a start is raised, and everything is released."""

    def fail(*_: object, **__: object) -> None:
        raise error

    state = Manager("lab", FileStorage(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place], fail)
        with pytest.raises(error):
            await state.start()
    assert state.status().phase == "new"


async def test_a_second_cancellation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is cancelled a second time, while it releases what it took, ends at once. The release goes on."""
    entered, gate = threading.Event(), threading.Event()
    real = _fs.try_lock

    def hold(fd: int, path: str) -> bool:
        entered.set()
        gate.wait()
        return real(fd, path)

    with monkeypatch.context() as patch:
        patch.setattr(_fs, "try_lock", hold)
        starting = asyncio.create_task(Manager("lab", FileStorage(tmp_path)).start())
        await asyncio.to_thread(entered.wait)
        for _ in range(2):
            starting.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await starting
        gate.set()
