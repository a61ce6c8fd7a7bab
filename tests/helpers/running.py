"""Helpers of many tests: a manager with a manual clock, and functions that let the event loop run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from lab_state import Config, Manager, Storage
from lab_state._flusher import Flusher
from lab_state.testing import ManualClock


class Maker(Protocol):
    """A factory of managers: the class `Manager`, or `InRole`."""

    def __call__(self, config: Config, storage: Storage, *, clock: ManualClock) -> Manager: ...


@asynccontextmanager
async def running(
    storage: Storage,
    clock: ManualClock,
    flush_interval: float | None = None,
    stop_timeout: float = 8.0,
    make: Maker = Manager,
) -> AsyncIterator[Manager]:
    config = Config(name="test", flush_interval=flush_interval, stop_timeout=stop_timeout)
    async with make(config, storage, clock=clock) as manager:
        yield manager


def flusher_of(manager: Manager) -> Flusher:
    """Return the flusher of a running manager."""
    flusher = manager._flusher
    assert flusher is not None
    return flusher


async def idle() -> None:
    """Run all tasks that do not wait for a clock or a thread."""
    for _ in range(50):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until a condition is true. A thread may make it true. The timeout of the test limits the wait."""
    while not condition():  # noqa: ASYNC110 -- there is no event to wait for
        await asyncio.sleep(0)
