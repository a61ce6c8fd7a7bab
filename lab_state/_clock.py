"""The clock of a manager, an argument so that tests need not sleep; and pauses measured by it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol


class Timer(Protocol):
    """What `Clock.call_later` gives."""

    def cancel(self) -> None:
        """Do not call. Nothing happens when it was called already."""


class Clock(Protocol):
    """Where a manager gets the time from; `lab_state.testing.ManualClock` is another one."""

    def time(self) -> float:
        """Seconds since 1970; may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Call `callback` on the running event loop, `delay` seconds of `monotonic` from now."""
        ...


class SystemClock:
    """The machine's own clock."""

    def time(self) -> float:
        """`time.time`."""
        return time.time()

    def monotonic(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """The event loop's own timer."""
        return asyncio.get_running_loop().call_later(delay, callback)


class GuardedClock:
    """A clock of the application's. When it raises, its last time stands, and the event loop's timers are used.

    Attributes:
        strict: Whether an error of the clock is raised instead, to the caller, who can
            mend it: during `start()`.
    """

    def __init__(self, clock: Clock, failed: Callable[[Exception], object]) -> None:
        """Guard a clock. `failed` is called with its first error."""
        self.strict: bool = True
        self._clock = clock
        self._failed: Callable[[Exception], object] | None = failed
        self._time = clock.time()
        self._monotonic = clock.monotonic()

    def time(self) -> float:
        """Seconds since 1970; may jump."""
        try:
            self._time = self._clock.time()
        except Exception as error:  # noqa: BLE001 -- see the class
            self._tell(error)
        return self._time

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""
        try:
            self._monotonic = self._clock.monotonic()
        except Exception as error:  # noqa: BLE001 -- see the class
            self._tell(error)
        return self._monotonic

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Call `callback` on the running event loop, `delay` seconds from now."""
        try:
            return self._clock.call_later(delay, callback)
        except Exception as error:  # noqa: BLE001 -- see the class
            self._tell(error)
        return asyncio.get_running_loop().call_later(delay, callback)

    def _tell(self, error: Exception) -> None:
        if self.strict:
            raise error
        if self._failed is not None:
            failed, self._failed = self._failed, None
            failed(error)


def resolver(future: asyncio.Future[None]) -> Callable[[], None]:
    """Sets the result of a future that nobody may have cancelled."""
    return lambda: None if future.done() else future.set_result(None)


class within:  # noqa: N801 -- used as asyncio.timeout is
    """`asyncio.timeout`, by a clock: cancel what runs in it after so many seconds, and raise `TimeoutError`."""

    __slots__ = ("_cancelling", "_clock", "_expired", "_seconds", "_task", "_timer")

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._expired = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # it is used in a coroutine
        self._task, self._cancelling = task, task.cancelling()
        self._timer = self._clock.call_later(self._seconds, self._expire)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # Was it cancelled by something else as well, then that cancellation goes on.
        if self._expired and self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()


class Pauses:
    """Growing pauses between attempts that fail.

    Attributes:
        failures: How many failed since the last success.
        until: When the pause is over, in seconds of `monotonic`.
    """

    def __init__(self, clock: Clock, first: float, longest: float) -> None:
        self._clock = clock
        self._first = first
        self._longest = longest
        self.failures: int = 0
        self.until: float = 0.0

    @property
    def are_over(self) -> bool:
        """Whether it is time for another attempt."""
        return self._clock.monotonic() >= self.until

    def start(self) -> float:
        """After a failure: a pause twice as long as the one before; returns its seconds."""
        self.failures += 1
        pause = min(self._longest, self._first * 2.0 ** min(self.failures - 1, 30))
        self.until = self._clock.monotonic() + pause
        return pause

    def reset(self) -> None:
        """After a success."""
        self.failures, self.until = 0, 0.0

    def never_end(self) -> None:
        """After a failure that is final."""
        self.until = math.inf
