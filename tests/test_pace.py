"""The turns of a checkpoint beside commits: when a slice is encoded, and how much a storage gets at once."""

from __future__ import annotations

import asyncio

import pytest
from running import flusher_of, idle

from lab_state import Config, Manager, MemoryStorage
from lab_state._codec import encode_snapshot
from lab_state._snapshots import _GIVEN_AT_ONCE, Pace, SnapshotViews
from lab_state._state import State

FOR_EVER = 3600.0


async def test_without_commits_no_slice_waits() -> None:
    """Slices go on at once if there was no commit, and if the last one began too long ago."""
    never, before = Pace(FOR_EVER), Pace(0)
    before.commit_begins()
    for pace in (never, before):
        for _ in range(3):
            await asyncio.wait_for(pace.turn(), 10)


async def test_a_slice_waits_for_the_next_commit() -> None:
    """Each commit is followed by one slice. A second one waits for the next commit."""
    pace = Pace(FOR_EVER)
    for _ in range(3):
        pace.commit_begins()
        await asyncio.wait_for(pace.turn(), 10)
        second = asyncio.create_task(pace.turn())
        await idle()
        assert not second.done()
        pace.commit_begins()
        pace.commit_begins()  # the task has not run yet
        await asyncio.wait_for(second, 10)


async def test_a_slice_does_not_wait_for_long() -> None:
    """Without another commit, a slice goes on after the longest time that it may wait."""
    pace = Pace(0.01)
    pace.commit_begins()
    await pace.turn()
    await asyncio.wait_for(pace.turn(), 10)


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    """After a cancellation, the next slice waits and gets its turn as before."""
    pace = Pace(FOR_EVER)
    pace.commit_begins()
    await pace.turn()
    waiting = asyncio.create_task(pace.turn())
    await idle()
    pace.commit_begins()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await idle()
    await asyncio.wait_for(pace.turn(), 10)
    last = asyncio.create_task(pace.turn())
    await idle()
    assert not last.done()
    pace.commit_begins()
    await asyncio.wait_for(last, 10)


async def test_slices_are_joined() -> None:
    """A storage gets slices of about 128 KiB, and together they are the snapshot."""
    state = State()
    state.set_many({f"key {number:05}": "x" * 100 for number in range(10_000)})
    parts = list(encode_snapshot(dict(state.entries.items()), 1, 0, copy_loaded=False))
    views = SnapshotViews(state)
    given = [part async for part in views.take()]
    await views.fold()
    without_id = [b"".join(some).partition(b'"id":"')[0] for some in (parts, given)]
    assert without_id[0] == without_id[1]
    assert len(given) < len(parts) / 2
    assert all(_GIVEN_AT_ONCE <= len(part) < 2 * _GIVEN_AT_ONCE for part in given[:-1])


async def test_a_checkpoint_goes_on_with_each_commit() -> None:
    """While commits follow each other, a checkpoint encodes one slice for each of them, and ends."""
    async with Manager(Config(name="paced", flush_interval=None), MemoryStorage()) as state:
        await state.set_many({f"key {number:05}": "x" * 100 for number in range(5_000)})
        checkpoints = flusher_of(state).checkpoints
        await state.flush()
        await checkpoints.ended()
        slices = sum(1 for _ in encode_snapshot(dict(state._core.state.entries.items()), 1, 0, copy_loaded=False))
        pace = checkpoints.pace = Pace(FOR_EVER)
        pace.commit_begins()
        checkpoints.start()
        assert checkpoints.task is not None
        commits = 0
        while not checkpoints.task.done():
            await idle()
            await state.set("one", commits)
            await state.flush()
            commits += 1
        assert commits >= slices - 1
        checkpoints.pace = Pace()
