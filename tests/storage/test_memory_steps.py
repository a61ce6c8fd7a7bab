"""`MemoryStorage`: a large record is appended in steps, and none of what may happen meanwhile tears it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lab_state import Config, Manager, MemoryStorage, UnsupportedError
from lab_state._journal import FrameKind, frame, frame_in_steps
from lab_state.storage import SnapshotSource
from lab_state.storage.memory import MemorySession

LARGE = b'{"from":0,"to":1,"clear":false,"set":{"large":"%s"},"delete":[],"expires":{}}' % (b"x" * 2_000_000)
SMALL = b'{"from":1,"to":2,"clear":false,"set":{"small":1},"delete":[],"expires":{}}'


def snapshot_of(data: bytes) -> SnapshotSource:
    async def slices() -> AsyncIterator[bytes]:
        yield data

    return slices


NOTHING = snapshot_of(b"")


async def begun(session: MemorySession, steps: int) -> asyncio.Task[bool]:
    """Return a commit of the large record, after so many steps."""
    task = asyncio.create_task(session.commit(LARGE, NOTHING))
    for _ in range(steps):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def steps_to_append() -> int:
    """Return how many steps are taken before the first append, and one more."""
    return next(number for number, piece in enumerate(frame_in_steps("a", FrameKind.RECORD, LARGE), 1) if piece) + 1


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 1_000_000])
def test_a_frame_in_steps(size: int) -> None:
    """The joined steps are the frame, and no step is larger than a piece."""
    payload = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    pieces = list(frame_in_steps("salt", FrameKind.RECORD, payload))
    assert b"".join(pieces) == frame("salt", FrameKind.RECORD, payload)
    assert max(map(len, pieces)) <= 256 * 1024


async def test_a_large_record_is_durable_when_commit_returns() -> None:
    """Other tasks run while it is appended, no reading shows a part of it, and it is there when `commit` returns."""
    storage = MemoryStorage()
    session = await storage.open("x")
    task = await begun(session, steps_to_append())
    before = session.journal_bytes
    assert len(storage.places["x"].journal or b"") > before
    assert (await storage.read("x")).records == ()
    assert await task
    assert (await storage.read("x")).records == (LARGE,)
    assert session.journal_bytes == len(storage.places["x"].journal or b"") > before + len(LARGE)
    await session.commit(SMALL, NOTHING)
    await session.aclose()
    assert (await storage.open("x")).recovery.records == (LARGE, SMALL)


async def test_a_cancelled_commit_leaves_nothing() -> None:
    """A commit that is cancelled halfway leaves nothing of its record, and the next record follows the previous one."""
    storage = MemoryStorage()
    session = await storage.open("x")
    for steps in (1, steps_to_append()):
        task = await begun(session, steps)
        task.cancel()
        await asyncio.wait({task})
        assert len(storage.places["x"].journal or b"") == session.journal_bytes
    await session.commit(SMALL, NOTHING)
    await session.aclose()
    session = await storage.open("x")
    assert session.recovery.records == (SMALL,)
    assert session.recovery.dropped_bytes == 0


async def test_a_session_that_is_closed_meanwhile() -> None:
    """If the session is closed during a commit, the next session drops the part, and the old commit changes nothing there."""
    storage = MemoryStorage()
    session = await storage.open("x")
    task = await begun(session, steps_to_append())
    await session.aclose()
    second = await storage.open("x")
    assert second.recovery.dropped_bytes > 0
    await second.commit(SMALL, NOTHING)
    with pytest.raises(UnsupportedError, match="closed"):
        await task
    assert (await storage.read("x")).records == (SMALL,)


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_checkpoint_that_ends_meanwhile(is_cancelled: bool) -> None:  # noqa: FBT001 -- a parameter
    """A checkpoint that ends during a commit keeps the record after its snapshot, unless the commit is cancelled."""
    storage = MemoryStorage()
    session = await storage.open("x")
    await session.commit(b"covered by the snapshot", NOTHING)
    task = await begun(session, steps_to_append())
    await session.checkpoint(snapshot_of(b'{"a":1}'))
    assert not task.done()
    if is_cancelled:
        task.cancel()
    await asyncio.wait({task})
    await session.commit(SMALL, NOTHING)
    await session.aclose()
    recovery = (await storage.open("x")).recovery
    assert recovery.snapshot == b'{"a":1}'
    assert recovery.records == ((SMALL,) if is_cancelled else (LARGE, SMALL))


async def test_commits_beside_a_checkpoint() -> None:
    """Records committed during a checkpoint, large or small, are kept after the snapshot. Earlier ones are dropped."""
    storage = MemoryStorage()
    session = await storage.open("x")
    await session.commit(b"covered by the snapshot", NOTHING)

    async def slices() -> AsyncIterator[bytes]:
        await session.commit(LARGE, NOTHING)
        yield b'{"a"'
        await session.commit(SMALL, NOTHING)
        yield b":1}"

    await session.checkpoint(slices)
    await session.aclose()
    recovery = (await storage.open("x")).recovery
    assert (recovery.snapshot, recovery.records) == (b'{"a":1}', (LARGE, SMALL))


async def test_a_manager_with_large_values() -> None:
    """Large values are there after a restart, whether a checkpoint took them or not."""
    storage, config = MemoryStorage(), Config(name="x", flush_interval=None)
    value = ["x" * 1_500_000]
    async with Manager(config, storage) as state:
        for number in range(3):
            await state.set(f"k{number}", value)
            await state.flush()
    async with Manager(config, storage) as state:
        assert await state.get_all() == {f"k{number}": value for number in range(3)}
