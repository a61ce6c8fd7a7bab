"""The sweeps, which delete expired keys. One timer serves all keys. Each sweep deletes up to 500 keys.

One sweep per second is enough, because no read returns an expired key. If a sweep reaches its limit of
500 keys, the next sweep follows at once. While there is a watch, the timer also fires when the next
key is due. So the watch reports the expiry on time.
"""

from __future__ import annotations

from collections.abc import Callable

from lab_state._clock import Clock, Timer
from lab_state._state import State

_PERIOD = 1.0
"""The longest wait of the timer, in seconds. Without a watch, each wait is this long, unless the last sweep has reached its limit."""

SWEPT_AT_START = 100_000
"""The largest number of expired keys that one change deletes at a start.

If the state is not shared, a start makes such changes until no expired key is left. In a shared state, it makes one such change.
"""

_KEYS_PER_STEP = 500
_GAP = 0.02
"""The shortest wait for a key that is not due yet, in seconds. So keys with nearly the same expiry are deleted in one sweep."""


class Sweeper:
    """The timer that sweeps one state.

    The timer is set while any key has an expiry, unless a sweep is postponed. It fires at least once a second. While there
    is a watch, it also fires when a key is due.
    """

    def __init__(  # noqa: PLR0917 -- all are needed, and each has a type of its own
        self,
        state: State,
        clock: Clock,
        busy: Callable[[], bool],
        swept: Callable[[], None],
        begun: Callable[[], None],
        layer: State | None = None,
    ) -> None:
        """Start the timer, if any key has an expiry.

        Args:
            state: The state.
            clock: The clock of the manager.
            busy: A function that returns True while no sweep may run. If the state is not shared, no sweep may run while a
                transaction is open, or while no change can become durable. In a shared state, no sweep may run while the last
                sweep is not durable, or while a call is executed in steps. `resume` is called when such a transaction,
                commit or call has ended.
            swept: A callback. It is called after each sweep that deleted keys.
            begun: A callback. It is called when a key gets an expiry, if no other key has one.
            layer: The state that a sweep changes; by default `state`. In a shared state, this is the `OwnerLayer`, and
                `state` is the copy below it.
        """
        self._state = state
        self._layer = state if layer is None else layer
        self._clock = clock
        self._busy = busy
        self._swept = swept
        self._begun = begun
        self._timer: Timer | None = None
        self._due = 0.0  # the time at which the timer fires
        self._put_off = False  # whether a sweep was postponed, because `busy` returned True
        self._looking_ahead = False
        state.expiries.on_first = self._first
        if state.expiries:
            self._arm(_PERIOD)

    def stop(self) -> None:
        """Stop the timer. After this call, no sweep runs."""
        self._state.expiries.on_first = None
        self._state.expiries.on_nearer = None
        self._put_off = False
        self._disarm()

    def attend(self, watched: bool) -> None:  # noqa: FBT001 -- it is a callback
        """Sweep each key when it is due, as long as there is a watch (`watched`). Otherwise sweep once a second."""
        self._state.expiries.attend(wanted=watched)
        self._state.expiries.on_nearer = self._nearer if watched else None
        if watched and self._state.expiries:
            self._look_ahead()

    def resume(self) -> None:
        """Run the sweep that was postponed, if there is one.

        Call this when `busy` may return False again. If the state is not shared, call it at the end of each transaction,
        before the next transaction begins. In a shared state, call it after each successful commit, and after each call
        that was executed in steps or has waited for such a call. A sweep that waited for the timer instead could find
        `busy` True each time.
        """
        if self._put_off:
            self._tick()

    def _first(self) -> None:
        self._begun()
        self._look_ahead()

    def _nearer(self) -> None:
        if not self._looking_ahead:
            self._arm(self._delay())

    def _look_ahead(self) -> None:
        """Set the timer. While there is a watch, first put the keys that expire in the next seconds into the heap of `Expiries`.

        For each second, one call adds at most 500 keys to the heap. If keys are left, the timer fires at once, and the
        next call goes on.
        """
        self._looking_ahead = True
        try:
            more = self._state.expiries.load(self._state.now(), _KEYS_PER_STEP)
        finally:
            self._looking_ahead = False
        self._arm(0.0 if more else self._delay())

    def _delay(self) -> float:
        """Return the time from now to the next sweep, in seconds. It depends on the first key in the heap, if there is one."""
        at = self._state.expiries.nearest()
        if at is None:
            return _PERIOD
        # `now` is rounded down to a millisecond. One millisecond is added, so that the timer does not fire too early.
        left = (at - self._state.now() + 1) / 1000
        return min(_PERIOD, max(left, _GAP)) if left > 0 else 0.0

    def _arm(self, delay: float) -> None:
        """Set the timer to fire in `delay` seconds, unless it is set to fire earlier. Do nothing while a sweep is postponed."""
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
        layer = self._layer
        before = layer.revision
        try:
            more = layer.sweep(_KEYS_PER_STEP) == _KEYS_PER_STEP
            if layer.revision > before:
                self._swept()
            if more:
                self._arm(0.0)
            elif self._state.expiries:
                self._look_ahead()
        except BaseException:  # such as a MemoryError: the event loop reports it, and a later sweep tries again
            self._arm(_PERIOD)
            raise
