"""Deletes what has expired: many keys at once, in steps, and no timer for each."""

from __future__ import annotations

from collections.abc import Callable

from lab_state._clock import Clock, Timer
from lab_state._state import State

_PERIOD = 1.0
_AT_ONCE = 500


class Sweeper:
    """Sweeps one state once a second, as long as something in it expires."""

    def __init__(
        self, state: State, clock: Clock, busy: Callable[[], bool], swept: Callable[[], None], begun: Callable[[], None]
    ) -> None:
        """Begin; `busy` says whether a transaction is open.

        `swept` is called after a change, `begun` when a key expires where none did.
        """
        self._state = state
        self._clock = clock
        self._busy = busy
        self._swept = swept
        self._begun = begun
        self._timer: Timer | None = None
        self._put_off = False
        state.expiries.first = self._first
        if state.expiries:
            self._arm()

    def stop(self) -> None:
        """Sweep no more."""
        self._state.expiries.first = None
        self._put_off = False
        if self._timer is not None:
            self._timer.cancel()

    def resume(self) -> None:
        """A transaction is over: do at once what was put off for it, or they could follow each other for ever."""
        if self._put_off:
            self._tick()

    def _first(self) -> None:
        self._begun()
        self._arm()

    def _arm(self, delay: float = _PERIOD) -> None:
        if self._timer is None and not self._put_off:
            self._timer = self._clock.call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._put_off = self._busy()
        if self._put_off:
            return
        before = self._state.revision
        try:
            more = self._state.sweep(_AT_ONCE) == _AT_ONCE
        except BaseException:  # memory ran out, or an interrupt: the event loop tells, and the next sweep comes
            self._arm()
            raise
        if self._state.revision > before:
            self._swept()
        if more:
            self._arm(0.0)
        elif self._state.expiries:
            self._arm()
