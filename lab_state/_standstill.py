"""Noticing that something that should go on stands still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lab_state._clock import Clock, resolver

_LOOKS = 8


class Standstill:
    """Looks at a number that grows while there is progress.

    Attributes:
        reached: Done when the number has not grown for `seconds`: not earlier, and at most
            an eighth later.
    """

    def __init__(self, clock: Clock, seconds: float, number: Callable[[], int]) -> None:
        """Begin to look at once. `seconds` are of the clock, above 0."""
        self.reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = clock
        self._seconds = seconds
        self._number = number
        self._seen = number()
        self._end = clock.monotonic() + seconds
        self._wait()

    def _wait(self) -> None:
        # The difference is exact where it is small, so no look comes a moment before the end again and again.
        self._timer = self._clock.call_later(
            min(self._end - self._clock.monotonic(), self._seconds / _LOOKS), self._look
        )

    def _look(self) -> None:
        now, number = self._clock.monotonic(), self._number()
        if number > self._seen:
            self._seen, self._end = number, now + self._seconds
        if now >= self._end:
            resolver(self.reached)()
        else:
            self._wait()

    def cancel(self) -> None:
        """Stop looking."""
        self._timer.cancel()
        self.reached.cancel()
