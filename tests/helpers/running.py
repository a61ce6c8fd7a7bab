"""What many tests begin with: a manager under a clock that stands still, and ways to let the loop go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from lab_state import Config, Manager, Storage
from lab_state._flusher import Flusher
from lab_state.testing import ManualClock


@asynccontextmanager
async def running(
    storage: Storage, clock: ManualClock, flush_interval: float | None = None, stop_timeout: float = 8.0
) -> AsyncIterator[Manager]:
    config = Config(name="test", flush_interval=flush_interval, stop_timeout=stop_timeout)
    async with Manager(config, storage, clock=clock) as manager:
        yield manager


def flusher_of(manager: Manager) -> Flusher:
    """Return the flusher of a manager that runs."""
    flusher = manager._flusher
    assert flusher is not None
    return flusher


async def idle() -> None:
    """Let everything run that needs no time and no thread."""
    for _ in range(50):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something happened, in a thread perhaps; the test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 -- what is waited for sets no event
        await asyncio.sleep(0)
