"""A watchdog for work that should make progress, and the number that shows the progress of a flush."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from lab_state._clock import Clock, resolver

_LOOKS = 8
"""The number of times that the watched number is read in `seconds`."""


class Standstill:
    """A watchdog that reads a number repeatedly. The number grows while the work makes progress.

    Attributes:
        reached: A future that is done when the number has not grown for `seconds`. It is never done earlier. If
            the event loop is not blocked, it is done at most an eighth of `seconds` later. `cancel` cancels it.
    """

    def __init__(self, clock: Clock, seconds: float, number: Callable[[], int]) -> None:
        """Call `number` now, and then eight times in `seconds` of the clock. `seconds` must be above 0."""
        self.reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = clock
        self._seconds = seconds
        self._number = number
        self._seen = number()
        self._end = clock.monotonic() + seconds
        self._wait()

    def _wait(self) -> None:
        # The difference of two floats that are close is exact. So the timer never ends just before `_end`.
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
        """Stop the watchdog. A second call does nothing."""
        self._timer.cancel()
        self.reached.cancel()


class Progress:
    """The progress of flushes and checkpoints: the bytes that are written, and the slices that are encoded."""

    def __init__(self, written: Callable[[], int]) -> None:
        """Call `written`, and raise its error, if any. `written` returns the number of bytes that the storage has written so far."""
        # An error here makes start() fail. Without this number, stop() could not distinguish a slow storage from one that hangs.
        written()
        self._written = written
        self._slices = 0

    def number(self) -> int:
        """Return a number that grows while bytes are encoded or written. If `written` fails, count only the slices."""
        try:
            return self._written() + self._slices
        except Exception:  # noqa: BLE001 -- stop() must end even if the storage violates its protocol
            return self._slices

    def count(self) -> None:
        """Count one encoded slice of a record or a snapshot."""
        self._slices += 1

    def counted(self, slices: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the slices, and count each."""
        for part in slices:
            self._slices += 1
            yield part
