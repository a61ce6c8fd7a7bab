"""Commits and checkpoints of `FileStorage`, one beside the other."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from file_tools import (
    DUE,
    MIB,
    Disk,
    flusher,
    found,
    kinds,
    manager,
    mode,
    plain,
    until,
    view,
)

from lab_state import (
    FileStorage,
    UnavailableError,
    UnsupportedError,
)
from lab_state import _journal as journal
from lab_state.storage import _file_start, _fs
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._new_journal import NewJournal
from lab_state.testing import ManualClock


async def test_a_large_snapshot_is_synced_as_it_grows(tmp_path: Path, disk: Disk) -> None:
    """A large snapshot is synced a mebibyte at a time, so no commit has to wait for one long sync."""

    async def slices() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * (MIB // 4)

    session = await FileStorage(tmp_path).open("lab")
    await session.checkpoint(slices)
    await session.aclose()
    syncs = [call.function for call in disk.calls if "lab.json" in call.path and "sync" in call.function]
    assert syncs == ["fdatasync", "fdatasync", "fsync"]


async def test_a_checkpoint_is_due_after_four_mebibytes(tmp_path: Path) -> None:
    """A journal grows up to 4 MiB. Above that, a checkpoint replaces it, and no caller waits for the checkpoint."""
    state = manager(tmp_path)
    await state.start()
    for number in range(3):
        await state.set("key", "x" * 1_200_000 + str(number))
        await state.flush()
    assert kinds(tmp_path) == "RRR"
    assert flusher(state).checkpoints.task is None
    assert not (tmp_path / "lab.json").exists()
    await state.set("key", "x" * 1_200_000)
    await state.flush()
    await until(lambda: (tmp_path / "lab.json").exists() and kinds(tmp_path) == "")
    assert await found(tmp_path) == {"key": "x" * 1_200_000}
    assert mode(tmp_path / "lab.json") == mode(tmp_path / "lab.journal") == 0o600
    await state.stop()


async def test_commits_go_on_beside_a_slow_snapshot(tmp_path: Path, disk: Disk) -> None:
    """While a snapshot is being written, commits are acknowledged. They survive a kill and the publication."""
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
    """Records committed during a checkpoint are in the next journal before commits wait for the publication."""
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
    """If commits are faster than the preparation of the next journal, the preparation ends, and the publication adds the rest."""
    (tmp_path / "state").mkdir()
    writer, _ = _file_start.open_writer(str(tmp_path / "state"), "lab", set(), Leftovers())
    since: list[bytes] = []

    class Upcoming(NewJournal):
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
    """Files that a checkpoint replaced stay open until it is tidied up, and are freed then. No file stays open."""
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
    """Without a free descriptor the old snapshot is not kept open. The rename frees it while commits wait."""
    session = await FileStorage(tmp_path).open("lab")
    await session.checkpoint(slices_of(b'{"a":1}'))
    disk.fail("open", "lab.json", errno.EMFILE)
    await session.checkpoint(slices_of(b'{"a":2}'))
    await session.aclose()
    assert (tmp_path / "lab.json").read_bytes() == b'{"a":2}'


async def test_what_was_loaded_is_let_go_of(tmp_path: Path) -> None:
    """The first checkpoint frees the loaded bytes. They are no longer needed, and as large as the state."""
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
    """Small parts are joined, to save system calls. A large part is not copied."""
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
    assert "was abandoned; another checkpoint follows" in str(state.status().last_error)
    assert not (tmp_path / "lab.json").exists()
    assert await found(tmp_path) == await state.get_all()
    clock.advance(10)
    await until(lambda: kinds(tmp_path) == "")
    assert await found(tmp_path) == {"large": "x" * DUE, "beside": 1}
    await state.stop()


async def test_a_commit_before_a_cancelled_checkpoint_survives(tmp_path: Path, disk: Disk) -> None:
    """A checkpoint that is cancelled in its last step, after a commit, does not drop what that commit acknowledged."""
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


async def test_group_commit_writes_one_frame(tmp_path: Path, disk: Disk) -> None:
    """All callers that wait while a sync is under way share the next frame and the next sync."""
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


async def test_a_session_closed_under_a_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    """If the session is closed during a checkpoint, its temporary files are deleted, and its caller gets an error."""
    session = await FileStorage(tmp_path).open("lab")

    async def closing() -> AsyncIterator[bytes]:
        yield b"{"
        await session.aclose()

    with pytest.raises(UnsupportedError, match="is closed"):
        await session.checkpoint(closing)
    await session.aclose()
    assert not list(tmp_path.glob("*.tmp"))


async def test_a_session_closed_under_a_checkpoint_writes_into_no_other_file(tmp_path: Path) -> None:
    """While a close waits for a slow commit, further slices of a checkpoint are refused: their descriptor may belong to another file."""
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
