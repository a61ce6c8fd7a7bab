"""Waiting, by a clock that tests can replace: pauses, and limits on how long a request may stand still."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Self

from lab_state._clock import Clock, Timer


class Time:
    """Where the waiting is done."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        woken = asyncio.get_running_loop().create_future()
        timer = self.clock.call_later(seconds, lambda: None if woken.done() else woken.set_result(None))
        try:
            await woken
        finally:
            timer.cancel()

    def jitter(self, longest: float) -> float:
        """Some seconds between 0 and `longest`, so that clients that failed together do not come back together."""
        return random.uniform(0, longest)  # noqa: S311 -- not a secret

    def limit(self, seconds: float) -> Limit:
        """A limit on what runs inside `async with`; see `Limit`."""
        return Limit(self.clock, seconds)


class Limit:
    """Ends what runs inside with a `TimeoutError` when nothing moved for a while.

    `asyncio.timeout` knows no other clock than the event loop's.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        """Not more than `seconds` between entering, each call of `moved`, and leaving."""
        self._clock = clock
        self._seconds = seconds
        self._timer: Timer | None = None
        self._expired = False
        self._over = False

    def moved(self) -> None:
        """Something moved: the time begins again."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._over:
            self._timer = self._clock.call_later(self._seconds, self._expire)

    def _expire(self) -> None:
        self._expired = True
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
        self._over = True
        self.moved()
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError(f"nothing moved for {self._seconds:g} s") from error
