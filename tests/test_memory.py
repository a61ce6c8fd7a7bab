"""What a start behind an unclean end keeps in memory, and for how long."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import Raw

from lab_state import FileStorage, UnsupportedError
from lab_state._snapshots import SnapshotViews
from lab_state._state import State

SIZE = 8_000_000


async def test_a_commit_of_everything_leaves_no_copy_of_it_behind(tmp_path: Path) -> None:
    """A commit that writes the whole state lets its bytes go when it returns, without a garbage collection."""
    session = await FileStorage(tmp_path).open("x")
    session._writer._poison()
    whole = b"x" * SIZE

    async def slices() -> AsyncIterator[bytes]:
        yield whole

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        await session.commit(b"{}", slices)
        await session._commits.run(len, b"")  # now the thread has let go of what it was handed before
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
        await session.aclose()
    assert most > SIZE  # it was collected
    assert left < SIZE // 10


async def test_only_a_checkpoint_gives_values_bytes_of_their_own() -> None:
    """A commit that needs the whole state reads what was loaded as it is; a checkpoint copies it."""
    for own in (False, True):
        state = State()
        state.load({"a": Raw(b"[1]")}, 1)
        views = SnapshotViews(state, copy_loaded=own)
        data = b"".join([part async for part in views.take()])
        await views.fold()
        assert data.startswith(b'{"a":[1],')
        assert (state.entries["a"].__class__, state.borrowed) == ((bytes, False) if own else (Raw, True))


async def test_a_start_reads_no_snapshot_beside_a_journal_that_has_everything(tmp_path: Path) -> None:
    """Behind a second kill, the journal has the whole state, so the old snapshot beside it takes no memory."""
    (tmp_path / "x.json").write_bytes(b"o" * SIZE)
    session = await FileStorage(tmp_path).open("x")
    session._writer._poison()

    async def slices() -> AsyncIterator[bytes]:
        yield b"x" * SIZE

    await session.commit(b"{}", slices)
    await session.aclose()
    del session
    storage = FileStorage(tmp_path)
    tracemalloc.start()
    try:
        session = await storage.open("x")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert session.recovery.snapshot == b"x" * SIZE
    assert session.snapshot_bytes == SIZE
    await session.aclose()
    assert most < 2.1 * SIZE  # the journal, and the frame in it


async def test_the_snapshot_beside_a_journal_that_has_everything_is_looked_at(tmp_path: Path) -> None:
    """What the next checkpoint cannot replace is refused, though it is not read."""
    storage = FileStorage(tmp_path)
    session = await storage.open("x")
    session._writer._poison()

    async def slices() -> AsyncIterator[bytes]:
        yield b"{}"

    await session.commit(b"{}", slices)
    await session.aclose()
    (tmp_path / "other").write_bytes(b"{}")
    (tmp_path / "x.json").symlink_to(tmp_path / "other")
    with pytest.raises(UnsupportedError, match="link"):
        await storage.open("x")
