"""A random life of a state with a history: changes, checkpoints, kills, stops, restores, and a clock that is set."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from histories import checkpoint
from running import flusher_of

from lab_state import Config, Generation, Manager, list_generations, read_state, restore_state
from lab_state.storage import Storage
from lab_state.testing import ManualClock


class Moment(NamedTuple):
    """A durable state, and the time of its record in milliseconds."""

    wall: int
    values: dict[str, Any]


class Walk:
    """A random life of a state, and the model of its moments. The storage keeps all generations."""

    def __init__(self, storage: Storage, clock: ManualClock, seed: int) -> None:
        self.dice = random.Random(seed)
        self.clock = clock
        self.storage = storage
        self.moments: dict[int, Moment] = {0: Moment(0, {})}
        self.read = 0  # the number of moments that were read
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

    async def check(self, number: int) -> int:
        """Read random moments, by revision and by time. Each of them is equal to the model. Return the number of generations."""
        self.clock.jump(1000)
        found = await list_generations("lab", self.storage)
        assert not any(one.hole_before for one in found)
        for _ in range(number):
            at, expected = self._choose(found)
            if expected is None:
                with pytest.raises(ValueError, match="outside of the history"):
                    await read_state("lab", self.storage, at=at, clock=self.clock)
                continue
            view = await read_state("lab", self.storage, at=at, clock=self.clock)
            assert (view.revision, await view.get_all()) == (expected, self.moments[expected].values), at
            self.read += 1
        return len(found)

    def _choose(self, found: list[Generation]) -> tuple[int | datetime, int | None]:
        """Return a random moment, and the revision that it has; `None` if it is before all moments."""
        if self.dice.random() < 0.5:
            revision = self.dice.randrange(max(self.moments) + 1)
            return revision, self.at_revision(revision)
        wall = self.dice.choice(list(self.moments.values())[1:]).wall + self.dice.choice([-700, 0, 0, 700])
        return datetime.fromtimestamp(wall / 1000, UTC), self.at_time(wall, found)
