"""Deletes what has expired: many keys at once, in steps, and no timer for each.

Once a second is enough, because no read shows an expired key. While there is a watch, the
timer is for the next key that is due, so that its end is told at its time.
"""

from __future__ import annotations

from collections.abc import Callable

from lab_state._clock import Clock, Timer
from lab_state._state import State

_PERIOD = 1.0
_AT_ONCE = 500
_GAP = 0.02
"""Seconds between two sweeps, at least, so that keys which are due one after the other are swept together."""


class Sweeper:
    """Sweeps one state once a second, or when a key is due, as long as something in it expires."""

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
        self._due = 0.0  # when the timer ends
        self._put_off = False
        self._looking_ahead = False
        state.expiries.on_first = self._first
        if state.expiries:
            self._arm(_PERIOD)

    def stop(self) -> None:
        """Sweep no more."""
        self._state.expiries.on_first = None
        self._state.expiries.on_nearer = None
        self._put_off = False
        self._disarm()

    def attend(self, watched: bool) -> None:  # noqa: FBT001 -- it is a callback
        """Sweep keys when they are due, while there is a watch. Without one, sweep them with their second."""
        self._state.expiries.attend(wanted=watched)
        self._state.expiries.on_nearer = self._nearer if watched else None
        if watched and self._state.expiries:
            self._look_ahead()

    def resume(self) -> None:
        """A transaction is over: do at once what was put off for it, or they could follow each other for ever."""
        if self._put_off:
            self._tick()

    def _first(self) -> None:
        self._begun()
        self._look_ahead()

    def _nearer(self) -> None:
        if not self._looking_ahead:
            self._arm(self._delay())

    def _look_ahead(self) -> None:
        """Find the keys of the next seconds, a step of it, and arm the timer."""
        self._looking_ahead = True
        try:
            more = self._state.expiries.load(self._state.now(), _AT_ONCE)
        finally:
            self._looking_ahead = False
        self._arm(0.0 if more else self._delay())

    def _delay(self) -> float:
        at = self._state.expiries.nearest()
        if at is None:
            return _PERIOD
        # `now` leaves out what is less than a millisecond.
        left = (at - self._state.now() + 1) / 1000
        return min(_PERIOD, max(left, _GAP)) if left > 0 else 0.0

    def _arm(self, delay: float) -> None:
        """Sweep after so many seconds, unless that is done earlier."""
        due = self._clock.monotonic() + delay
        if self._put_off or (self._timer is not None and self._due <= due):
            return
        self._disarm()
        self._timer, self._due = self._clock.call_later(delay, self._tick), due

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._disarm()
        self._put_off = self._busy()
        if self._put_off:
            return
        before = self._state.revision
        try:
            more = self._state.sweep(_AT_ONCE) == _AT_ONCE
            if self._state.revision > before:
                self._swept()
            if more:
                self._arm(0.0)
            elif self._state.expiries:
                self._look_ahead()
        except BaseException:  # memory ran out, or an interrupt: the event loop tells, and the next sweep comes
            self._arm(_PERIOD)
            raise
