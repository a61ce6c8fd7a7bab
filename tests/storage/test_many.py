"""Many states on one storage object: what an idle one keeps open, and what happens to it meanwhile."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab_state import Config, FileStorage, Manager, UnavailableError
from lab_state.storage import file
from lab_state.storage.file import FileSession

COUNT = 10
OPEN = 3


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a storage object keep three journals open."""
    monkeypatch.setattr(file, "_MOST_OPEN", OPEN)


@pytest.fixture
async def states(tmp_path: Path) -> AsyncIterator[list[Manager]]:
    """Yield ten states that have written."""
    storage = FileStorage(tmp_path)
    async with AsyncExitStack() as stack:
        made = [Manager(Config(name=f"user{number}", flush_interval=0), storage) for number in range(COUNT)]
        for state in made:
            await stack.enter_async_context(state)
            await state.set("a", 1)
        await closed(tmp_path, OPEN)
        yield made


def opened(directory: Path, ending: str) -> list[str]:
    """Return the files that this process has open, by name."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            path = descriptor.readlink()
        except FileNotFoundError:  # that of the listing
            continue
        if path.parent == directory and path.suffix == ending:
            found.append(path.name)
    return sorted(found)


async def closed(directory: Path, count: int) -> None:
    """Wait until that many journals are open, in the storage's own time."""
    async with asyncio.timeout(10):
        while len(opened(directory, ".journal")) != count:  # noqa: ASYNC110 -- it sets no event
            await asyncio.sleep(0)


async def test_an_idle_state_has_one_descriptor(tmp_path: Path, states: list[Manager]) -> None:
    """An idle state has only the descriptor of its lock open. Three journals stay open, and there are few threads."""
    assert len(opened(tmp_path, ".lock")) == COUNT
    assert opened(tmp_path, ".journal") == [f"user{number}.journal" for number in range(COUNT - OPEN, COUNT)]
    assert sum(thread.name == "lab_state files" for thread in threading.enumerate()) < COUNT


async def test_the_journal_of_an_idle_state_goes_on(tmp_path: Path, states: list[Manager]) -> None:
    """The next write of an idle state opens its journal again and appends. Another journal is closed instead."""
    before = (tmp_path / "user0.journal").stat()
    await states[0].set("b", 2)
    after = (tmp_path / "user0.journal").stat()
    assert after.st_ino == before.st_ino
    assert after.st_size > before.st_size
    await closed(tmp_path, OPEN)
    assert "user0.journal" in opened(tmp_path, ".journal")
    for _ in range(3):
        for state in states:
            await state.incr("n")
    assert [await state.get("n") for state in states] == [3] * COUNT


def gone(journal: Path) -> None:
    journal.unlink()


def replaced(journal: Path) -> None:
    data = journal.read_bytes()
    journal.rename(journal.with_suffix(".older"))
    journal.write_bytes(data)


def cut(journal: Path) -> None:
    with journal.open("r+b") as opened_again:
        opened_again.truncate(journal.stat().st_size - 3)


def overwritten(journal: Path) -> None:
    data = journal.read_bytes()
    journal.write_bytes(data[:-10] + b"x" * 10)


@pytest.mark.parametrize("change", [gone, replaced, cut, overwritten])
async def test_a_journal_that_is_changed_while_it_is_closed(
    tmp_path: Path, states: list[Manager], caplog: pytest.LogCaptureFixture, change: Callable[[Path], None]
) -> None:
    """The next write notices it, and writes everything anew, before it is acknowledged."""
    await asyncio.to_thread(change, tmp_path / "user0.journal")
    caplog.set_level(logging.ERROR)
    await states[0].set("b", 2)
    assert "user0.journal" in caplog.text
    assert "writing everything anew" in caplog.text
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "user0.journal").write_bytes((tmp_path / "user0.journal").read_bytes())
    async with Manager("user0", FileStorage(copy)) as found:
        assert await found.get_all() == {"a": 1, "b": 2}


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Let every opening of a file fail with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def commit(session: FileSession, record: bytes) -> None:
    async def slices() -> AsyncIterator[bytes]:
        yield b"{}"

    await session.commit(record, slices)


@pytest.mark.parametrize("reason", ["idle", "another time"])
async def test_too_many_open_files_do_not_cost_the_journal(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A commit that has to open its journal fails with EMFILE as the reason, and the next one goes on in that file."""
    session = await FileStorage(tmp_path).open("lab")
    await commit(session, b"one")
    path = tmp_path / "lab.journal"
    inode = path.stat().st_ino
    if reason == "idle":
        await session._commits.run(session._writer.rest)
    else:  # the file has another time than the last write left, so the next commit reads it
        os.utime(path, ns=(0, 0))
    with no_descriptor_left(), pytest.raises(UnavailableError, match="Too many open files; close some, or raise"):
        await commit(session, b"refused")
    await commit(session, b"two")
    assert path.stat().st_ino == inode
    await session.aclose()
    again = await FileStorage(tmp_path).open("lab")
    await again.aclose()
    assert again.recovery.records == (b"one", b"two")
    assert "writing everything anew" not in caplog.text


async def test_a_checkpoint_of_an_idle_state(tmp_path: Path, states: list[Manager]) -> None:
    """The stop of an idle state opens its journal again. Afterwards nothing of the state is open."""
    await states[0].stop()
    assert "user0.lock" not in opened(tmp_path, ".lock")
    assert "user0.journal" not in opened(tmp_path, ".journal")
    async with Manager("user0", FileStorage(tmp_path)) as again:
        assert await again.get("a") == 1


async def test_states_that_come_and_go_are_not_kept(tmp_path: Path) -> None:
    """A storage object knows the sessions that are open, and no others."""
    storage = FileStorage(tmp_path)
    for number in range(2 * OPEN):
        async with Manager(Config(name=f"user{number}", flush_interval=0), storage) as state:
            await state.set("a", 1)
    journals: Any = storage._journals
    assert (len(journals._open), journals.last) == (0, None)


async def test_a_session_that_was_dropped_is_passed_over(tmp_path: Path) -> None:
    """One that was not closed does not keep the others from being closed."""
    storage = FileStorage(tmp_path)

    async def slices() -> AsyncIterator[bytes]:
        yield b"{}"

    for number in range(3 * OPEN):
        session = await storage.open(f"user{number}")
        await session.commit(b"record", slices)
    del session
    await asyncio.to_thread(gc.collect)
    async with Manager(Config(name="last", flush_interval=0), storage) as state:
        await state.set("a", 1)


async def test_a_session_that_is_being_closed_is_left_alone(tmp_path: Path) -> None:
    """`rest` of a session that is closed does nothing."""
    session = await FileStorage(tmp_path).open("lab")
    await session.aclose()
    session.rest()


async def test_a_journal_that_rests_already_is_left_alone(tmp_path: Path) -> None:
    """A second `rest` does nothing, and the next commit opens the journal again."""
    session = await FileStorage(tmp_path).open("lab")

    async def slices() -> AsyncIterator[bytes]:
        yield b"{}"

    await session.commit(b"one", slices)
    for _ in range(2):
        await session._commits.run(session._writer.rest)
        assert session._writer._fd == -1
    await session.commit(b"two", slices)
    await session.aclose()
    again = await FileStorage(tmp_path).open("lab")
    await again.aclose()
    assert again.recovery.records == (b"one", b"two")
