"""Pauses, and limits on the time for which a request makes no progress. Tests replace the clock."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Self

from lab_state._clock import Clock, Timer, sleep


class Time:
    """The pauses and limits of a session, measured by one clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds` seconds."""
        await sleep(self.clock, seconds)

    def jitter(self, longest: float) -> float:
        """Return a random number of seconds from 0 to `longest`.

        So clients that failed at the same moment repeat their requests at different moments.
        """
        return random.uniform(0, longest)  # noqa: S311 -- not a secret

    def limit(self, seconds: float) -> Limit:
        """Return a limit for the block of an `async with`; see `Limit`."""
        return Limit(self.clock, seconds)


class Limit:
    """A context manager that cancels its block and raises `TimeoutError` if the block makes no progress in time.

    `asyncio.timeout` cannot be used, because it uses only the clock of the event loop.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        """Allow at most `seconds` before the first call of `moved`, between two calls, and after the last one."""
        self._clock = clock
        self._seconds = seconds
        self._timer: Timer | None = None
        self._is_expired = False
        self._has_ended = False

    def moved(self) -> None:
        """Note progress, and start the time limit again. After the end of the block, do nothing."""
        self._stop_timer()
        if not self._has_ended:
            self._timer = self._clock.call_later(self._seconds, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self._is_expired = True
        self._task.cancel()

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a coroutine that awaits runs in a task"
        self._task = task
        self._cancelling = task.cancelling()
        self.moved()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._has_ended = True
        self._stop_timer()
        if self._is_expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError(f"no bytes were sent or received for {self._seconds:g} s") from error
