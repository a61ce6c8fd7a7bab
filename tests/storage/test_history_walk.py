"""Random lives of a state with a history: each moment that is read is the one that was written.

LAB_STATE_HISTORY_READS says how many moments are read beside a writer. LAB_STATE_HISTORY_MOMENTS says how many are read after each
random life.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from histories import START, checkpoint
from history_walk import Walk
from s3_world import Bucket, QuickTime, session_of_all

from lab_state import Config, FileStorage, Manager, list_generations, read_state
from lab_state.storage import _keeping, _new_journal
from lab_state.storage.s3 import _keeping as _s3_keeping
from lab_state.testing import ManualClock

YEAR = 366 * 24 * 3600
READS = int(os.environ.get("LAB_STATE_HISTORY_READS", "150"))
MOMENTS = int(os.environ.get("LAB_STATE_HISTORY_MOMENTS", "60"))
THOROUGH = MOMENTS >= 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """Return a clock that gives the times of journals and of pruning, too."""
    clock = ManualClock(START)
    for module in (_new_journal, _keeping):
        monkeypatch.setattr(module, "wall_now", lambda: int(clock.time() * 1000))
    return clock


@pytest.mark.timeout(3600 if THOROUGH else 120)
@pytest.mark.parametrize("seed", range(4 if THOROUGH else 2))
async def test_a_random_walk(tmp_path: Path, clock: ManualClock, seed: int) -> None:
    """With checkpoints, kills, stops, restores and changes of the clock. Random moments are each equal to the model."""
    walk = Walk(FileStorage(tmp_path, history=YEAR, history_bytes=None), clock, seed)
    await walk.live(80)
    assert await walk.check(MOMENTS) > 10
    print(f"{walk.read} moments of {max(walk.moments)} were right")
    assert walk.read > MOMENTS // 2


@pytest.fixture
def session() -> Any:
    """Return a session for all clients. It is made outside of the event loop, because it reads files."""
    return session_of_all()


@pytest.mark.timeout(3600 if THOROUGH else 120)
@pytest.mark.parametrize("seed", range(4 if THOROUGH else 1))
async def test_a_random_walk_in_s3(
    bucket: Bucket, clock: ManualClock, session: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds in S3. There, some snapshots are copied, and the records lead to the others."""
    monkeypatch.setattr(_s3_keeping, "_MOST_NUMBERS", 4)
    storage = bucket.storage(history=YEAR, history_bytes=None, session=session)
    storage._time = QuickTime(clock)
    walk = Walk(storage, clock, seed)
    await walk.live(80 if THOROUGH else 6)
    assert await walk.check(MOMENTS if THOROUGH else 4) > (10 if THOROUGH else 1)
    print(f"{walk.read} moments of {max(walk.moments)} were right")
    assert walk.read > (MOMENTS // 2 if THOROUGH else 1)


async def test_beside_a_writer(tmp_path: Path) -> None:
    """A writer makes checkpoints and prunes all the time. Each read is right, or says that its moment was pruned."""
    dice = random.Random(1)
    storage = FileStorage(tmp_path, history=YEAR, history_bytes=4000)
    moments: dict[int, dict[str, Any]] = {}
    right = 0

    async def write(state: Manager) -> None:
        while True:
            for _ in range(dice.randrange(1, 4)):
                await state.set(f"key-{dice.randrange(6)}", dice.random())
                moments[state.revision] = await state.get_all()
                await state.flush()
            await checkpoint(state)

    async with Manager(Config(name="lab", flush_interval=None), storage) as state:
        writing = asyncio.create_task(write(state))
        while right < READS:
            oldest = (await list_generations("lab", storage))[0].first_revision
            wanted = (
                dice.randrange(max(1, oldest), state.durable_revision + 1) if state.durable_revision > oldest else 0
            )
            try:
                view = await read_state("lab", storage, at=wanted)
            except ValueError:
                # Its journal goes before its snapshot. So for a moment the list may have a hole in place of its end.
                for _ in range(100):
                    if (await list_generations("lab", storage))[0].first_revision > wanted:
                        break
                else:
                    pytest.fail(f"revision {wanted} was not found, and was not pruned")
                continue
            finally:
                assert not writing.done()
            assert view.revision == wanted
            assert await view.get_all() == moments.get(wanted, {})
            right += 1
        writing.cancel()
        await asyncio.wait([writing])
    print(f"{right} reads beside a writer were right")
    assert max(moments) > 10
