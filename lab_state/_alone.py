"""The tasks and timers of a manager whose state is not shared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from lab_state._clock import Clock
from lab_state._core import Core
from lab_state._entries import ChangeSet
from lab_state._flusher import Flusher
from lab_state._sweeper import SWEPT_AT_START, Sweeper
from lab_state._watch import Watchers
from lab_state.cache._mirror import MirrorWriter


def told_of_commits(watchers: Watchers, mirror: MirrorWriter | None) -> Callable[[ChangeSet], bool]:
    """Return a function that passes a commit to the watchers, and then to the mirror, even if the watchers raise an error."""
    if mirror is None:
        return watchers.committed

    def committed(taken: ChangeSet) -> bool:
        try:
            watchers.committed(taken)
        finally:
            mirror.committed(taken)
        return True

    return committed


def run_alone(core: Core, flusher: Flusher, watchers: Watchers, mirror: MirrorWriter | None, clock: Clock) -> Sweeper:
    """Start the flusher of a loaded state, its sweeper and its mirror. If the call raises an error, none of them runs.

    None of these objects refers to the manager. So a manager that was never stopped can be collected.
    """
    # Many keys may have expired since the last stop. They are deleted here, because `start()` may block the event loop.
    while flusher.state.sweep(SWEPT_AT_START):
        flusher.nudge()
    with ExitStack() as undo:
        if mirror is not None:
            mirror.start(flusher)
            undo.callback(mirror.abort)
        sweeper = Sweeper(flusher.state, clock, lambda: core.must_wait, flusher.nudge, core.update_followup)
        undo.callback(sweeper.stop)
        watchers.attended = sweeper.attend
        flusher.start()
        undo.pop_all()
    return sweeper
