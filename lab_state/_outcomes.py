"""The outcomes of commits and checkpoints.

`Outcomes` counts successful commits, and all failures. It logs each failure, but a `FencedError` only once. A failed
checkpoint is repeated after a pause. A failed commit is repeated too, unless `flush_interval` is `None` and the loaded
changes are durable. After a `FencedError`, nothing is repeated. The callers that wait for a commit receive its outcome.
"""

from __future__ import annotations

from collections.abc import Callable

from lab_state._clock import Clock, Pauses
from lab_state._foreign import tell_fenced
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._state import State
from lab_state._upkeep import Upkeep
from lab_state.config import Config
from lab_state.exceptions import FencedError, StorageError
from lab_state.storage._protocol import Recovery

_FIRST_PAUSE = 0.1  # this and the next two values are in seconds
_LONGEST_PAUSE = 5.0
_LONG_CHECKPOINT = 1.0


class Outcomes(Upkeep):
    """The outcomes of the commits and checkpoints of one state. `Flusher` makes the commits.

    Attributes:
        flushes: The number of commits that succeeded.
        failures: The number of commits and checkpoints that failed.
        last_error: The error of the last commit or checkpoint; `None` if it succeeded. While commits fail, a
            checkpoint that succeeds does not remove the error.
        last_flush_at: The time of the last commit that succeeded, in seconds since 1970; `None` before the first.
        last_flush_seconds: The duration of the last commit that succeeded, in seconds; `None` before the first.
    """

    def __init__(  # noqa: PLR0917 -- all are needed, and no two have the same type
        self,
        state: State,
        recovery: Recovery,
        config: Config,
        clock: Clock,
        logger: Log,
        times: FlushTimes,
        on_fenced: Callable[[FencedError], object] | None,
    ) -> None:
        super().__init__(
            config.name,
            state,
            clock,
            unsettled=recovery.unsettled,
            flush_interval=config.flush_interval,
        )
        self.flushes: int = 0
        self.failures: int = 0
        self.last_error: StorageError | None = None
        self.last_flush_at: float | None = None
        self.last_flush_seconds: float | None = None
        self._failure: StorageError | None = None  # the error of the last commit; `None` if it succeeded
        self._interval = config.flush_interval
        self._logger = logger
        self._times = times
        self._on_fenced = on_fenced
        longest = max(self._interval or 0.0, _LONGEST_PAUSE)
        self._pauses = Pauses(clock, _FIRST_PAUSE, longest)
        self._checkpoint_pauses = Pauses(clock, _FIRST_PAUSE, longest)
        self._stopping = False

    def _succeeded(self, seconds: float) -> None:
        failures = self._pauses.failures
        self._unsettled = False
        self.flushes += 1
        self.last_error = self._failure = None
        self.last_flush_at = self._clock.time()
        self.last_flush_seconds = seconds
        self._times.add(seconds)
        self._pauses.reset()
        self._waiters.settle(self.durable_revision)
        if failures:
            self._logger.debug("%s: flushed again (failures before: %d)", self._name, failures)

    def _failed(self, error: StorageError) -> None:
        self.failures += 1
        self._times.failures += 1
        self.last_error = self._failure = error
        pause = self._pauses.start()
        retried = self._interval is not None or self._unsettled
        if self._stopping or isinstance(error, FencedError):
            note = "not durable"
        elif retried:
            note = "not durable yet: the changes stay in memory, and the flush is repeated"
        else:
            note = "not durable yet: the changes stay in memory, and the next flush() tries again"
        # The callers receive the error first. The logger of the application is called after that.
        self._confirming.fail(error, note, all_lists=True)
        if isinstance(error, FencedError):
            self._fence(error)
            return
        self._waiters.fail(error, note, all_lists=False)
        self._commit_failed(error, note)
        if not self._stopping:  # even if `flush_interval` is `None`: `confirm_ownership` waits for the end of the pause
            self._clock.call_later(pause, self._wake_up if retried else self._wake.set)
        self._logger.error("%s: a flush failed; %s: %s", self._name, note, error)

    def _commit_failed(self, error: StorageError, note: str) -> None:
        """Do nothing. `OwnerFlusher` overrides this method to answer its clients. `note` says what happens to the changes."""

    def _fence(self, error: FencedError) -> None:
        """Refuse every write from now on, because a newer writer owns the state. Log the error, and schedule `on_fenced`.

        A second call does nothing.
        """
        if self.fenced:
            return
        self._pauses.never_end()
        self._checkpoint_pauses.never_end()
        self._refuse_from_now_on(error)
        self._logger.error(
            "%s: fenced: nothing more becomes durable, and every write raises FencedError; end this process: %s",
            self._name,
            error,
        )
        if self._on_fenced is not None:
            self.loop.call_soon(tell_fenced, self._on_fenced, error, self._name, self._logger)

    def checkpoint_succeeded(self, seconds: float, size: int) -> None:
        """Note that a checkpoint of `size` bytes succeeded in `seconds`. Log a checkpoint that took more than a second."""
        self._checkpoint_pauses.reset()
        if not self._pauses.failures:  # while commits fail, `last_error` keeps the error of the last commit
            self.last_error = None
        if seconds > _LONG_CHECKPOINT:
            self._logger.info("%s: a checkpoint of %d bytes took %.1f s", self._name, size, seconds)

    def checkpoint_failed(self, error: StorageError) -> None:
        """Note that a checkpoint failed, and log it. After a pause, wake the flush task, unless the manager stops or is fenced."""
        self.failures += 1
        self.last_error = error
        pause = self._checkpoint_pauses.start()
        if isinstance(error, FencedError):
            self._fence(error)
            return
        if not self._stopping:
            self._clock.call_later(pause, self._wake.set)
        self._logger.warning(
            "%s: a checkpoint failed; the journal still has every durable change: %s", self._name, error
        )
