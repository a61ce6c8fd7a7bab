"""`Pauses`: growing pauses, and a failure that is final."""

from __future__ import annotations

from lab_state._clock import Pauses
from lab_state.testing import ManualClock


def test_an_endless_pause_does_not_become_finite() -> None:
    """A further failure leaves an endless pause endless; only a success ends it."""
    clock = ManualClock()
    pauses = Pauses(clock, 1.0, 8.0)
    assert pauses.start() == 1.0
    pauses.never_end()
    assert pauses.start() == 2.0
    clock.advance(1_000_000)
    assert not pauses.are_over
    pauses.reset()
    assert pauses.are_over
