"""The clock of a manager, and the waits and pauses that use it.

The clock is an argument of the manager, so that tests do not have to sleep.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol


class Timer(Protocol):
    """A call that `Clock.call_later` has scheduled."""

    def cancel(self) -> None:
        """Cancel the scheduled call. Do nothing if the call was made already."""


class Clock(Protocol):
    """The source of time of a manager. For tests, use `lab_state.testing.ManualClock`."""

    def time(self) -> float:
        """Return the seconds since 1970. The value may jump."""
        ...

    def monotonic(self) -> float:
        """Return the seconds since an arbitrary moment. The value never decreases."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Schedule a call of `callback` on the running event loop, `delay` seconds of `monotonic` from now. Return its timer."""
        ...


def wall_now() -> int:
    """Return the time of the wall clock of the machine, in milliseconds since 1970. A storage, which has no `Clock`, uses this."""
    return time.time_ns() // 1_000_000


class SystemClock:
    """The clock of the machine, with the timers of the event loop."""

    def time(self) -> float:
        """Return `time.time()`."""
        return time.time()

    def monotonic(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Schedule a call of `callback` with a timer of the running event loop, and return the timer."""
        return asyncio.get_running_loop().call_later(delay, callback)


class GuardedClock:
    """A wrapper for the clock of the application, which may raise errors.

    If the wrapped clock raises an error, `time` and `monotonic` return their last results, and
    `call_later` uses a timer of the event loop. The next call uses the wrapped clock again.

    Attributes:
        strict: Whether errors of the clock are raised to the caller instead. This is `True` from the
            construction to the end of the first `start()`, and during each later `start()`. So the
            application learns that its clock fails.
    """

    def __init__(self, clock: Clock, failed: Callable[[Exception], object]) -> None:
        """Wrap a clock, and read its times. If the clock raises an error here, raise it. `failed` is called once, with the first error that is not raised."""
        self.strict: bool = True
        self._clock = clock
        self._failed: Callable[[Exception], object] | None = failed
        self._time = clock.time()
        self._monotonic = clock.monotonic()

    def time(self) -> float:
        """Return the `time` of the clock, or its last result; see `GuardedClock`."""
        try:
            self._time = self._clock.time()
        except Exception as error:  # noqa: BLE001 -- see `GuardedClock`
            self._tell(error)
        return self._time

    def monotonic(self) -> float:
        """Return the `monotonic` of the clock, or its last result; see `GuardedClock`."""
        try:
            self._monotonic = self._clock.monotonic()
        except Exception as error:  # noqa: BLE001 -- see `GuardedClock`
            self._tell(error)
        return self._monotonic

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Schedule a call with the clock, or with the event loop; see `GuardedClock`. Return the timer."""
        try:
            return self._clock.call_later(delay, callback)
        except Exception as error:  # noqa: BLE001 -- see `GuardedClock`
            self._tell(error)
        return asyncio.get_running_loop().call_later(delay, callback)

    def _tell(self, error: Exception) -> None:
        if self.strict:
            raise error
        if self._failed is not None:
            failed, self._failed = self._failed, None
            failed(error)


def resolver(future: asyncio.Future[None]) -> Callable[[], None]:
    """Return a callback that resolves the future unless it is already done."""
    return lambda: None if future.done() else future.set_result(None)


async def sleep(clock: Clock, seconds: float) -> None:
    """Wait until `seconds` have passed on the clock. If the caller is cancelled, the timer is cancelled too."""
    woken = asyncio.get_running_loop().create_future()
    timer = clock.call_later(seconds, resolver(woken))
    try:
        await woken
    finally:
        timer.cancel()


async def done_within(future: asyncio.Future[Any], clock: Clock, seconds: float) -> bool:
    """Wait for a future, for at most `seconds` of the clock. Return whether it is done. Do not cancel it."""
    timeout = asyncio.get_running_loop().create_future()
    timer = clock.call_later(seconds, resolver(timeout))
    try:
        await asyncio.wait({future, timeout}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
        timeout.cancel()
    return future.done()


class within:  # noqa: N801 -- in lower case, like asyncio.timeout
    """A context manager like `asyncio.timeout`, for any `Clock`. After `seconds` the block is cancelled and raises `TimeoutError`."""

    __slots__ = ("_cancelling", "_clock", "_expired", "_seconds", "_task", "_timer")

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._expired = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None  # `within` is used only in tasks
        self._task, self._cancelling = task, task.cancelling()
        self._timer = self._clock.call_later(self._seconds, self._expire)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # If the task was cancelled for another reason as well, that cancellation is passed on.
        if self._expired and self._task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()


class Pauses:
    """Growing pauses between attempts that fail.

    Attributes:
        failures: The number of attempts that failed since the last success.
        until: The end of the last pause, in seconds of `monotonic`; 0 if there was none since the last success, and
            infinity after `never_end`.
    """

    def __init__(self, clock: Clock, first: float, longest: float) -> None:
        """Set the length of the first pause and of the longest pause, in seconds."""
        self._clock = clock
        self._first = first
        self._longest = longest
        self.failures: int = 0
        self.until: float = 0.0

    @property
    def are_over(self) -> bool:
        """Whether the next attempt may begin."""
        return self._clock.monotonic() >= self.until

    def start(self) -> float:
        """Start a pause after a failure, and return its length in seconds: twice the last length, up to the longest."""
        self.failures += 1
        pause = min(self._longest, self._first * 2.0 ** min(self.failures - 1, 30))
        if self.until < math.inf:
            self.until = self._clock.monotonic() + pause
        return pause

    def reset(self) -> None:
        """Forget the failures, after a success."""
        self.failures, self.until = 0, 0.0

    def never_end(self) -> None:
        """Make the pause endless, after a failure that is final. Then `are_over` is False until `reset`."""
        self.until = math.inf
