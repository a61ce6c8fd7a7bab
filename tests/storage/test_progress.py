"""`StorageSession.progress`: what tells a slow storage from one that hangs, also within one large write."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import until
from s3_proxy import Hang, Proxy, answers
from s3_world import Bucket, given

from lab_state import FileStorage, StorageSession, UnavailableError
from lab_state.storage import _fs as fs
from lab_state.storage._file_writer import Need

MIB = 1024 * 1024
STEP = fs._APPENDED_AT_ONCE
LARGE = b"x" * (2 * STEP + 1)
RECORD = (b"before",)


class Os:
    """The module `os` as `_fs` sees it: each sync, and each write of more than `small` bytes, is shown to `look` first."""

    def __init__(self) -> None:
        self.look: Callable[[str], object] = len
        self.small = 1000

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if len(data) > self.small:
            self.look("pwrite")
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self.look("fdatasync")
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self.look("fsync")
        os.fsync(fd)

    def fail(self, function: str, *numbers: int) -> None:
        """Let these calls of a function fail, counted from 1."""
        calls: list[str] = []

        def look(called: str) -> None:
            calls.append(called)
            if called == function and calls.count(function) in numbers:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        self.look = look


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Os:
    calls = Os()
    monkeypatch.setattr(fs, "os", calls)
    return calls


async def opened(directory: Path) -> StorageSession:
    """Return a session with a record and a snapshot, so that its next commit appends."""
    session = await FileStorage(directory).open("test")
    await session.commit(RECORD[0], given(b"{}"))
    return session


async def recovered(directory: Path) -> tuple[bytes | None, tuple[bytes, ...]]:
    session = await FileStorage(directory).open("test")
    await session.aclose()
    return session.recovery[:2]


# How a large write goes to the disk


@pytest.mark.parametrize("size", [2 * STEP, 2 * STEP + 1])
def test_the_steps_of_an_append(tmp_path: Path, size: int) -> None:
    """Every byte is in one step, also if the last step is full."""
    data = os.urandom(size)
    steps = [b"".join(step) for step in fs._steps([data[:10], data[10:]])]
    assert [len(step) for step in steps] == [STEP, STEP, 1][: len(steps)]
    assert b"".join(steps) == data


async def test_a_large_commit_is_synced_as_it_grows(tmp_path: Path, calls: Os) -> None:
    """Between two syncs of an append at most 4 MiB are written, and counted before the sync."""
    session = await opened(tmp_path)
    synced = [session.progress]
    calls.look = lambda called: synced.append(session.progress) if called == "fdatasync" else None
    await session.commit(LARGE, given(b"{}"))
    steps = [after - before for before, after in itertools.pairwise(synced)]
    assert max(steps) == STEP
    assert len(steps) == 3
    assert sum(steps) == session.progress - synced[0] > len(LARGE)
    await session.aclose()
    assert await recovered(tmp_path) == (None, (*RECORD, LARGE))


async def test_a_whole_state_in_a_new_journal_is_synced_as_it_grows(tmp_path: Path, calls: Os) -> None:
    """After an unclean end, the journal that begins with the whole state goes to the disk 4 MiB at a time."""
    session = await opened(tmp_path)
    session._writer.need = Need.FULL  # type: ignore[attr-defined]  # as after a failed sync
    synced = [session.progress]
    calls.look = lambda called: synced.append(session.progress) if called != "pwrite" else None
    await session.commit(b"2", given(LARGE))
    assert max(after - before for before, after in itertools.pairwise(synced)) == STEP
    assert session.progress - synced[0] > len(LARGE)
    await session.aclose()
    assert (await recovered(tmp_path))[0] == LARGE


async def test_a_snapshot_of_one_large_slice_is_synced_as_it_grows(tmp_path: Path, calls: Os) -> None:
    """A checkpoint writes and syncs a MiB at a time, whatever slices it is given."""
    session = await opened(tmp_path)
    synced = [session.progress]
    calls.look = lambda called: synced.append(session.progress) if called == "fdatasync" else None
    await session.checkpoint(given(LARGE))
    assert max(after - before for before, after in itertools.pairwise(synced)) == MIB
    assert session.progress - synced[0] > len(LARGE)
    await session.aclose()
    assert await recovered(tmp_path) == (LARGE, ())


async def test_many_small_parts_are_cut_into_steps(tmp_path: Path, calls: Os) -> None:
    """Records that a new journal takes over during a checkpoint are written in steps too."""
    session = await opened(tmp_path)
    synced = [session.progress]

    async def slices() -> Any:
        for _ in range(60):
            await session.commit(b"r" * 100_000, given(b"{}"))
        synced.append(session.progress)
        calls.look = lambda called: synced.append(session.progress) if called != "pwrite" else None
        yield b"{}"

    await session.checkpoint(slices)
    assert max(after - before for before, after in itertools.pairwise(synced[1:])) == STEP
    await session.aclose()
    assert await recovered(tmp_path) == (b"{}", (b"r" * 100_000,) * 60)


# What fails within one


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_sync_that_fails_within_a_large_commit_ends_the_journal(tmp_path: Path, calls: Os, number: int) -> None:
    """A failed sync is not repeated, at whichever step: the next commit writes the whole state into a new journal."""
    session = await opened(tmp_path)
    calls.fail("fdatasync", number)
    with pytest.raises(UnavailableError, match="syncing"):
        await session.commit(LARGE, given(b"{}"))
    await session.commit(LARGE, given(b"whole"))
    await session.aclose()
    assert await recovered(tmp_path) == (b"whole", ())


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_write_that_fails_within_a_large_commit_is_undone(tmp_path: Path, calls: Os, number: int) -> None:
    """The earlier steps of a failed write are removed, on the disk too, and the journal is used on."""
    calls.small = 0
    session = await opened(tmp_path)
    size = (tmp_path / "test.journal").stat().st_size
    calls.fail("pwrite", number)
    with pytest.raises(UnavailableError, match="writing"):
        await session.commit(LARGE, given(b"{}"))
    assert (tmp_path / "test.journal").stat().st_size == size
    await session.commit(b"after", given(b"never asked for"))
    await session.aclose()
    assert await recovered(tmp_path) == (None, (*RECORD, b"after"))


async def test_an_undo_that_cannot_be_synced_ends_the_journal(tmp_path: Path, calls: Os) -> None:
    """If the sync of the truncation fails, the next commit writes everything anew."""
    calls.small = 0
    session = await opened(tmp_path)
    called: list[str] = []

    def look(function: str) -> None:
        called.append(function)
        if function == "pwrite" and called.count("pwrite") > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if function == "fdatasync" and called.count("pwrite") > 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    calls.look = look
    with pytest.raises(UnavailableError):
        await session.commit(LARGE, given(b"{}"))
    calls.look = len
    await session.commit(b"after", given(b"whole"))
    await session.aclose()
    assert await recovered(tmp_path) == (b"whole", ())


# S3


async def test_a_body_counts_as_it_is_sent(bucket: Bucket, proxy: Proxy) -> None:
    """The number grows while a store takes a large body, and is complete before the answer."""
    large = b"x" * (20 * MIB)  # more than the buffers of a socket hold
    session = await bucket.storage(proxy.url).open("test")
    hang, before = Hang(), session.progress
    proxy.plan("PUT", "test.journal/", hang, times=1)
    committing = asyncio.create_task(session.commit(large, given(b"{}")))
    seen: list[int] = []

    def arrived() -> bool:
        seen.append(session.progress - before)
        return hang.reached.is_set()

    await until(arrived)
    assert any(0 < sent < len(large) for sent in seen)
    await until(lambda: session.progress - before > len(large))
    hang.released.set()
    await committing
    before = session.progress
    await session.checkpoint(given(large))
    assert session.progress - before >= len(large)
    await session.aclose()


async def test_what_is_sent_again_does_not_count(bucket: Bucket, proxy: Proxy) -> None:
    """A store that accepts a body and then refuses it, again and again, makes no progress."""
    session = await bucket.storage(proxy.url).open("test")
    before = session.progress
    proxy.plan("PUT", "test.journal/", answers(503, "SlowDown"), times=3)
    await session.commit(LARGE, given(b"{}"))
    assert len(LARGE) < session.progress - before < len(LARGE) + 1000
    proxy.plan("PUT", "test.journal/", answers(503, "SlowDown"), times=3)
    before = session.progress
    await session.commit(b"small", given(b"{}"))
    assert 0 < session.progress - before < 1000
    await session.aclose()
