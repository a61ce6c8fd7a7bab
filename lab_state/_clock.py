"""The clock of a manager: an argument, so that tests need not sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
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
