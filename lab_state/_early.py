"""A flush before the end of `flush_interval`, if many bytes are not flushed.

While there are unflushed changes, a timer estimates their size 16 times a second. So `set` does not
have to count bytes. `Flusher` makes an `EarlyFlush` only if `flush_interval` is longer than 1/16 s.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from sys import getsizeof

from lab_state._clock import Clock, Timer
from lab_state._entries import Expiring, StoredOrGone
from lab_state._state import State

MANY_BYTES = 8 * 1024 * 1024
"""The estimated number of changed bytes at which a flush starts early."""

LOOK_EVERY = 1 / 16
"""The seconds between two estimates. A float holds this number exactly, so a test can compute the times exactly."""

_MEASURED_AT_ONCE = 20_000


class EarlyFlush:
    """The timer that estimates the size of the changes. It runs from the first change after a commit until all changes are taken."""

    def __init__(self, state: State, clock: Clock, flush: Callable[[], object]) -> None:
        """Prepare to call `flush` when `MANY_BYTES` have changed.

        The bytes are counted from the start of the last commit, or from the last call of `flush`.
        """
        self._state = state
        self._clock = clock
        self._flush = flush
        self._timer: Timer | None = None
        self._changes = state.changes
        self._keys = 0  # the number of changed keys at the last estimate
        self._stored = state.stored  # the number of stored values at the last estimate
        self._bytes = 0  # the last estimate
        self._asked = 0  # the estimate at the last call of `flush`, or a later estimate that is lower
        state.on_first_change = self._wait

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self._clock.call_later(LOOK_EVERY, self._look)

    def _look(self) -> None:
        self._timer = None
        state = self._state
        if state.revision == state.taken:
            return
        if state.changes is not self._changes:
            self._changes, self._keys, self._bytes, self._asked = state.changes, 0, 0, 0
        keys, stored = len(state.changes), state.stored
        if stored - self._stored > keys - self._keys:  # some keys were set again, perhaps to larger values
            self._bytes = _size(state.changes, keys, timed=state.expires)
        else:
            self._bytes += _size(state.changes, keys - self._keys, timed=state.expires)
        self._keys, self._stored = keys, stored
        self._asked = min(self._asked, self._bytes)
        if self._bytes - self._asked >= MANY_BYTES:
            self._asked = self._bytes
            self._flush()
        self._wait()

    def cancel(self) -> None:
        """Stop the timer. After this, no flush begins early."""
        self._state.on_first_change = None
        if self._timer is not None:
            self._timer.cancel()


def _size(changes: dict[str, StoredOrGone], newest: int, *, timed: bool) -> int:
    """Return an estimate of the bytes that the last `newest` changes take in a record. Measure at most 20,000 of them, and extrapolate."""
    some = min(newest, _MEASURED_AT_ONCE)
    if some <= 0:
        return 0
    keys = sum(map(len, islice(reversed(changes), some)))
    # `getsizeof` includes the overhead of the object. This overhead approximates the punctuation around the value.
    measure: Callable[[StoredOrGone], int] = _size_of if timed else getsizeof
    values = sum(measure(stored) for stored in islice(reversed(changes.values()), some))
    return (keys + values) * newest // some


def _size_of(stored: StoredOrGone) -> int:
    return getsizeof(stored.value if isinstance(stored, Expiring) else stored)
