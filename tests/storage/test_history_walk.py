"""Random lives of a state with a history: each moment that is read is the one that was written.

LAB_STATE_HISTORY_READS says how many moments are read beside a writer.
"""

from __future__ import annotations

import asyncio
import os
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from histories import START, checkpoint
from running import flusher_of

from lab_state import Config, FileStorage, Generation, Manager, list_generations, read_state, restore_state
from lab_state.storage import _keeping, _new_journal
from lab_state.testing import ManualClock

YEAR = 366 * 24 * 3600
READS = int(os.environ.get("LAB_STATE_HISTORY_READS", "150"))


class Moment(NamedTuple):
    """A durable state, and the time of its record in milliseconds."""

    wall: int
    values: dict[str, Any]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """Return a clock that gives the times of journals and of pruning, too."""
    clock = ManualClock(START)
    for module in (_new_journal, _keeping):
        monkeypatch.setattr(module, "wall_now", lambda: int(clock.time() * 1000))
    return clock


class Walk:
    """A random life, and the model of its moments."""

    def __init__(self, directory: Path, clock: ManualClock, seed: int) -> None:
        self.dice = random.Random(seed)
        self.clock = clock
        self.storage = FileStorage(directory, history=YEAR, history_bytes=None)
        self.moments: dict[int, Moment] = {0: Moment(0, {})}
        self.state = self._manager()

    def _manager(self) -> Manager:
        return Manager(Config(name="lab", flush_interval=None), self.storage, clock=self.clock)

    async def live(self, steps: int) -> None:
        await self.state.start()
        await self.state.set("first", 0)
        await self.flush()
        choices = [self.change] * 8 + [self.checkpoint] * 3 + [self.kill, self.stop, self.jump, self.restore]
        for _ in range(steps):
            await self.dice.choice(choices)()
        await self.flush()
        await self.state.stop()

    async def flush(self) -> None:
        await self.state.flush()
        if self.state.revision not in self.moments:
            self.moments[self.state.revision] = Moment(int(self.clock.time() * 1000), await self.state.get_all())

    async def change(self) -> None:
        for _ in range(self.dice.randrange(1, 4)):
            key = f"key-{self.dice.randrange(6)}"
            await (self.state.delete(key) if self.dice.random() < 0.2 else self.state.set(key, self.dice.random()))
        self.clock.advance(self.dice.randrange(3))
        if self.dice.random() < 0.8:
            await self.flush()

    async def checkpoint(self) -> None:
        await self.flush()
        self.clock.advance(1)
        await checkpoint(self.state)

    async def stop(self) -> None:
        await self.flush()
        await self.state.stop()
        self.state = self._manager()
        await self.state.start()

    async def kill(self) -> None:
        """Kill the process. Changes that were not flushed are lost, and their revisions come again."""
        flusher = flusher_of(self.state)
        session = flusher.abort()
        await asyncio.wait([task for task in (flusher._task, flusher.checkpoints.task) if task is not None])
        await session.aclose()
        self.state = self._manager()
        await self.state.start()

    async def jump(self) -> None:
        """Set the clock back or forward."""
        self.clock.jump(self.dice.choice([-50, -5, 5, 20]))

    async def restore(self) -> None:
        """Restore a random revision in place."""
        await self.flush()
        await self.state.stop()
        wanted = self.dice.choice(sorted(self.moments))
        restored = await restore_state("lab", self.storage, wanted, into="lab", clock=self.clock)
        assert restored.revision == max(self.moments) + 1
        self.moments[restored.revision] = Moment(int(self.clock.time() * 1000), self.moments[wanted].values)
        self.state = self._manager()
        await self.state.start()

    def at_revision(self, revision: int) -> int:
        return max(one for one in self.moments if one <= revision)

    def at_time(self, wall: int, found: list[Generation]) -> int | None:
        """Return the newest moment that is not after a time, in the newest generation with such a first or last moment."""
        for number in range(len(found) - 1, -1, -1):
            one = found[number]
            first, last = (int((wall or 0) * 1000) for wall in (one.first_wall, one.last_wall))
            covered = one.first_revision == one.last_revision and any(
                other.first_revision <= one.first_revision and one.last_revision < other.last_revision
                for other in found[:number]
            )
            if min(first, last) <= wall and not covered:
                inside = range(one.first_revision + 1, one.last_revision + 1)
                fit = [revision for revision in inside if revision in self.moments]
                return max(
                    [revision for revision in fit if self.moments[revision].wall <= wall], default=one.first_revision
                )
        return None


@pytest.mark.parametrize("seed", range(4))
async def test_a_random_walk(tmp_path: Path, clock: ManualClock, seed: int) -> None:
    """With checkpoints, kills, stops, restores and changes of the clock. 250 random moments are each equal to the model."""
    walk = Walk(tmp_path, clock, seed)
    await walk.live(80)
    clock.jump(1000)
    found = await list_generations("lab", walk.storage)
    assert not any(one.hole_before for one in found)
    times = 0
    for _ in range(250):
        expected: int | None
        if walk.dice.random() < 0.5:
            revision = walk.dice.randrange(max(walk.moments) + 1)
            at: int | datetime = revision
            expected = walk.at_revision(revision)
        else:
            wall = walk.dice.choice(list(walk.moments.values())[1:]).wall + walk.dice.choice([-700, 0, 0, 700])
            at = datetime.fromtimestamp(wall / 1000, UTC)
            expected = walk.at_time(wall, found)
        if expected is None:
            with pytest.raises(ValueError, match="outside of the window"):
                await read_state("lab", walk.storage, at=at, clock=clock)
            continue
        view = await read_state("lab", walk.storage, at=at, clock=clock)
        times += isinstance(at, datetime)
        assert (view.revision, await view.get_all()) == (expected, walk.moments[expected].values), at
    assert len(found) > 10
    assert times > 50


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
