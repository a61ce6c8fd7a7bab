"""The task that commits the changes of a state to its storage.

Theory of operation. A writer changes the map and continues. The task wakes up once in each flush interval,
when a caller asks for a commit, and when many bytes have changed. Then it takes all unflushed changes, and
commits them as one record. If a commit fails, its changes are put back, and the next commit contains them.
`_durability.py` manages the callers that wait. `_outcomes.py` handles the outcome of each commit, and decides
when a failed commit is repeated. `_checkpoints.py` writes the checkpoints.

The task never cancels a commit or a checkpoint. `stop` gives up if the storage makes no progress for `timeout` seconds.
The session is then closed when the hanging call returns. So no second writer can open the state before that.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any
from weakref import finalize

from lab_state._buffers import join_in_steps
from lab_state._checkpoints import Checkpoints
from lab_state._clock import Clock, Timer, sleep
from lab_state._codec import encode_record, encode_small_record
from lab_state._durability import Waiters, copied
from lab_state._early import LOOK_EVERY, EarlyFlush
from lab_state._entries import ChangeSet
from lab_state._foreign import described, only_storage_errors, pass_on, storage_error
from lab_state._forgotten import forget
from lab_state._journal import is_followed
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._outcomes import Outcomes
from lab_state._snapshots import SnapshotViews
from lab_state._standstill import Progress, Standstill
from lab_state._state import State
from lab_state._state._contents import ignore, no_clock
from lab_state.config import Config
from lab_state.exceptions import FencedError, LabStateError, StorageError, UnavailableError
from lab_state.shared._results import RecordCalls
from lab_state.storage._protocol import HistoryFigures, StorageSession, figures_of

_LAST_CHANCE = 0.5
"""`stop` makes its last attempt this many seconds before its deadline.

If the event loop ends after `stop` has given up, the session gets this time to close.
"""


class Flusher(Outcomes):
    """The task that makes the changes of one state durable, from one start to one stop."""

    # Attributes of the base classes that are assigned here as well.
    durable_revision: int
    refusal: LabStateError | None
    last_error: StorageError | None

    def __init__(  # noqa: PLR0917 -- all are needed, and no two have the same type
        self,
        state: State,
        session: StorageSession,
        config: Config,
        clock: Clock,
        logger: Log,
        committed: Callable[[ChangeSet], bool],
        times: FlushTimes,
        on_fenced: Callable[[FencedError], object] | None = None,
    ) -> None:
        """Prepare the task for the running event loop. `start` starts it. All methods must be called on this loop.

        Args:
            state: The loaded state.
            session: The session of the storage.
            config: The settings.
            clock: The clock of the manager.
            logger: The logger of the manager.
            committed: A callback that gets the changes of each successful commit. The callback returns True if it
                keeps a reference to these changes.
            times: The object that collects the durations of successful commits, and counts failed commits.
            on_fenced: A function of the application; see `Manager`.
        """
        super().__init__(state, session.recovery, config, clock, logger, times, on_fenced)
        for one in (state, self.shown):
            one.free, one.on_staged = self._free, self._fold_staged
        self._committed = committed
        self._session = session
        self._abandoned = self._aborted = False
        self.forgotten: finalize[Any, Any] | None = None  # closes the session if this object is collected before `stop`
        self._deadline = math.inf
        self._progress = Progress(lambda: session.progress)
        self._stop_error: LabStateError | None = None
        self.checkpoints: Checkpoints = Checkpoints(
            config.name, session, self, clock, self._checkpoint_pauses, self._progress.count, self.shown
        )
        self.checkpoints.records = len(session.recovery.records) + self._unsettled
        self.checkpoints.is_marked = is_followed(session.recovery.snapshot or b"")
        if self._unsettled:
            self._wake_up()
        self._timer: Timer | None = None
        # Without early flushes, one record could contain all writes of a long interval. A short interval needs no early flush.
        often = self._interval is None or self._interval <= LOOK_EVERY
        self._early = None if often else EarlyFlush(state, clock, self._wake_up)

    def start(self) -> None:
        """Start the task, which flushes in the background. If this raises an error, no task is left running."""
        self._start(self._run())
        try:
            self._arm()
        except BaseException:
            self.abort()
            raise

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 -- it bounds the work, not the wait of the caller
        """Flush, write a checkpoint if one is needed, and close the session. See `Checkpoints.is_needed`.

        Give up if there is no progress for `timeout` seconds. A flush that fails with an `UnavailableError`
        is repeated until `timeout` seconds after the call.

        Raises:
            StorageError: A newer writer owns the state, or the last flush failed or hangs, so that changes may be lost.
        """
        self._stopping = True
        self._deadline = self._clock.monotonic() + timeout
        self._end_timers()
        standstill = Standstill(self._clock, timeout, self._progress.number)
        if self._task.done() or self._task.get_loop() is not self.loop:  # the task ended early, or its loop was closed
            self._start(self._run())
        self._wake.set()
        await asyncio.wait({self._task, standstill.reached}, return_when=asyncio.FIRST_COMPLETED)
        standstill.cancel()
        if not self._task.done():
            self._abandon(timeout)
        if self._stop_error is not None:
            raise self._stop_error

    def remember(self) -> None:
        """Detach the finalizer, which closes the session if this object is garbage-collected.

        Call this when the session is closed, or when it will be closed at the end of a storage call.
        """
        if self.forgotten is not None:
            self.forgotten.detach()
            forget(self)

    @property
    def is_aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._aborted

    def nudge(self) -> None:
        """Flush now if `flush_interval` is 0. This is called after a sweep, because no caller waits for the swept keys."""
        if self.write_through:
            self._wake_up()

    def abort(self) -> StorageSession:
        """End the task without a write, as in a crash, and return the open session. This is for tests, and for a start that fails."""
        self._stopping = self._aborted = True
        self.remember()
        self._end_timers()
        for task in (self._task, self.checkpoints.task):
            if task is not None:
                task.cancel()
        return self._session

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Prevent commits. This runs in a forked child."""
        self._pauses.never_end()
        self._checkpoint_pauses.never_end()
        self._waiters, self._confirming = Waiters(), Waiters()
        if self._timer is not None:
            self._timer.cancel()

    def move(self) -> None:
        """Move to the running event loop; see `Durability.move`."""
        if self.loop.is_closed():
            self.checkpoints.task = None
        super().move()

    def discard_entries(self) -> None:
        """Free the entries after `stop()`, unless a storage call still in flight may read them."""
        # The present callbacks are methods of this object. They would keep this object and its state in memory.
        for one in (self.state, self.shown):
            one.free, one.on_staged = ignore, no_clock
        self._discard(self.shown, entries=self._task.done() and not self._abandoned)

    def _folded(self) -> None:
        """Start a checkpoint if one is due."""
        self.checkpoint_if_due()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._is_closed = self.fenced
        if not self.fenced:
            self.refusal = None
        self._task = asyncio.create_task(work, name=f"lab_state {self._name} flusher")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End all waits when the task has ended. A wait for a revision that is durable succeeds. All others raise an error."""
        problem = None if task.cancelled() else task.exception()
        what = (
            "was cancelled" if task.cancelled() else f"failed: {described(problem)}" if problem is not None else "ended"
        )
        # The callers get their result first. Foreign code, such as a logger, is called after that.
        self._waiters.settle(self._certain_revision)
        if not self._stopping:
            self._refuse_from_now_on(
                self.refusal
                or UnavailableError(f"the flush task of {self._name!r} {what}: call stop(), which flushes what is left")
            )
            self._logger.error(
                "%s: the flush task %s: changes are not durable (keys: %d). Was stop() forgotten? Call stop(): it "
                "still flushes them; `async with` calls it by itself",
                self._name,
                what,
                self.unflushed_keys,
            )
            return
        lost = not self._all_durable
        cut_off = lost and task.cancelled() and not self._aborted and self._stop_error is None
        if cut_off:
            what = (
                f"was cancelled at the end of the event loop: changes may not be durable (keys: {self.unflushed_keys})"
            )
        error: LabStateError = UnavailableError(
            f"the {'last flush' if lost else 'flush task'} of {self._name!r} {what}"
        )
        if lost:
            error = self._stop_error = self._stop_error or error
        self._give_up(error)
        if cut_off:  # the caller of stop() may have been cancelled as well: then only the log shows the error
            self._logger.error("%s: stop() failed: %s", self._name, error)

    def _abandon(self, timeout: float) -> None:
        """Stop waiting for a storage call that hangs. The session is closed when the call ends."""
        self._abandoned = True
        if self._all_durable:
            self._logger.warning(
                "%s: everything is durable, but the storage made no progress for %s s during stop(); "
                "the state stays locked until the storage answers",
                self._name,
                timeout,
            )
            return
        why = "" if self._failure is None else f"; the previous flush failed: {self._failure}"
        self._stop_error = UnavailableError(
            f"stop() gave up, because the storage made no progress for {timeout} s: changes of {self._name!r} may not be "
            f"durable (keys: {self.unflushed_keys}); the state stays locked until the storage answers{why}"
        )
        self._stop_error.__cause__ = self._failure
        self._give_up(self._stop_error)

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot, in bytes."""
        return self._session.snapshot_bytes

    @property
    def journal_bytes(self) -> int:
        """The size of the journal, in bytes."""
        return self._session.journal_bytes

    @property
    def history(self) -> HistoryFigures | None:
        """The figures of the history; `None` if the storage keeps none."""
        return figures_of(self._session)

    @property
    def storage_warning(self) -> str | None:
        """A warning of the storage for the operator, with the fault and the remedy; `None` if there is none."""
        return self._session.warning

    @property
    def path(self) -> str:
        """The path of the state for messages, without credentials."""
        return self._session.path

    # The task

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._work()
                    break
                except (KeyboardInterrupt, SystemExit) as interrupt:
                    # A signal handler raised the interrupt while this task was running. Pass it on to the loop, and go on.
                    self._survive(interrupt)
                    self.loop.call_soon(pass_on, interrupt)
        except GeneratorExit:  # the event loop of this task was closed: `stop` starts another task
            raise
        except BaseException as error:  # for example, the event loop cancels all its tasks when it ends
            if self._stopping and not self._aborted:
                await self._close(hurried=self._abandoned and isinstance(error, asyncio.CancelledError))
            raise
        else:
            await self._close(hurried=False)

    async def _work(self) -> None:
        while not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._commit_all()
                self.checkpoint_if_due()
            except Exception as problem:  # noqa: BLE001 -- all writers depend on this task
                self._survive(problem)
            # Let the waiting callers run. If they write now, the next commit begins without another turn of the loop.
            await asyncio.sleep(0)
        await self._finish()

    def _survive(self, problem: BaseException) -> None:
        """Treat an error that was raised outside a storage call as a failed commit."""
        self._put_back()
        self._waiters.settle(self._certain_revision)
        self._waiters.start_commit()  # all waiting callers get the error, because it is unknown how far the commit has come
        self._failed(storage_error(problem))

    async def _commit_all(self) -> None:
        while self._waiters.next or (self._due and self._pauses.are_over):
            self._due = False
            if not self._unflushed:  # an earlier commit has included the changes of these callers
                self._waiters.settle(self._certain_revision)
                return
            await self._commit()

    async def _commit(self) -> StorageError | None:
        """Commit all unflushed changes. Return the error if the commit failed, and `None` otherwise."""
        self._begun += 1
        number = self._begun
        views = SnapshotViews(self.state, given=self._progress.count)
        taken: ChangeSet | None = None
        try:
            self._waiters.start_commit()
            started = self._clock.monotonic()
            # `_under_way` is set before the changes are taken, and reset when they are durable. So an interrupt loses no change.
            taken = self._under_way = self.state.untaken()
            self.state.take(taken)
            due = await self._write(taken, views)
            self.durable_revision = taken.end
        except Exception as problem:  # noqa: BLE001 -- with any error, the changes are kept, and the callers get the error
            self._put_back()
            error = storage_error(problem)
            self._failed(error)
            return error
        except BaseException:  # for example, the event loop cancels all its tasks when it ends
            if self._under_way is taken:  # otherwise `move` has put the changes back
                self._put_back()
            raise
        else:
            self.checkpoints.records += 1
            self._succeeded(self._clock.monotonic() - started)
            self._under_way = None
            self._confirming.settle(number)
            self.checkpoints.due = due
            if not self._hand_on(taken):
                self._free(taken.changes)
            return None
        finally:
            await views.fold()

    def _hand_on(self, taken: ChangeSet) -> bool:
        """Pass durable changes to the watchers and the mirror. Return whether a receiver may keep a reference to the changes."""
        try:
            return self._committed(taken)
        except Exception as problem:  # noqa: BLE001 -- an error of the callback must not end the task
            what = described(problem)
            self._logger.error("%s: watchers and mirror missed the changes of a commit: %s", self._name, what)  # noqa: TRY400 -- one line
            return True

    async def _write(self, taken: ChangeSet, views: SnapshotViews, calls: RecordCalls | None = None) -> bool:
        record = encode_small_record(taken, calls) or await join_in_steps(
            self._progress.counted(encode_record(taken, calls))
        )
        self._encoded(record)
        self.checkpoints.pace.commit_begins()
        return await only_storage_errors(lambda: self._session.commit(record, views.take))

    def _encoded(self, record: bytes) -> None:
        """Do nothing. `OwnerFlusher` overrides this method to keep the record for the followers of a shared state."""

    def checkpoint_if_due(self) -> None:
        """Start a checkpoint if `stop` was not called; see `Checkpoints.start_if_due`."""
        if not self._stopping:
            self.checkpoints.start_if_due()

    # Timers

    def _arm(self) -> None:
        if self._interval:
            self._timer = self._clock.call_later(self._interval, self._tick)

    def _end_timers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._early is not None:
            self._early.cancel()

    def _tick(self) -> None:
        self._arm()
        self._wake_up()

    # The end

    async def _finish(self) -> None:
        """Make the last flush. If it succeeded and a checkpoint is needed, write one."""
        error = await self._last_flush()
        self._is_closed = True
        if error is not None:
            self._give_up(error)
            error = copied(error, f"stop() gave up: changes are not durable and are lost (keys: {self.unflushed_keys})")
        self._stop_error = self._stop_error or error
        await self.checkpoints.ended()
        if error is None and self.checkpoints.is_needed and not (self._abandoned or self.fenced):
            await self._write_last()
        if self.refusal is not None and self.fenced and self._stop_error is None:
            self._stop_error = copied(self.refusal, "all its changes are durable: none is lost")

    async def _write_last(self) -> None:
        """Write a checkpoint. `OwnerFlusher` overrides this method."""
        await self.checkpoints.write(wait=False)

    async def _close(self, *, hurried: bool) -> None:
        """Close the session.

        Args:
            hurried: Whether to wait for half a second only. This is for an event loop that ends after
                `stop` has given up.
        """
        if not hurried:
            await self._close_session()
            return
        closing = asyncio.create_task(self._close_session())
        await asyncio.wait({closing}, timeout=_LAST_CHANCE)
        # The first cancellation ends the wait for a checkpoint, and the second one the wait in `aclose`. The storage still closes.
        for _ in range(2):
            closing.cancel()
            await asyncio.sleep(0)

    async def _close_session(self) -> None:
        try:
            await self.checkpoints.ended()
        finally:
            try:
                await only_storage_errors(self._session.aclose)
            except StorageError as error:
                self._logger.warning("%s: the storage could not be closed: %s", self._name, error)

    async def _last_flush(self) -> StorageError | None:
        error: StorageError | None = None
        while not self._abandoned and self._unflushed:
            error = await self._commit()
            if error is not None:
                until = self._pauses.until
                is_last = until >= self._deadline
                if is_last:
                    until = self._deadline - _LAST_CHANCE  # one more attempt, with enough time for a commit
                pause = until - self._clock.monotonic()
                # Do not give up only because the pause is over: logging, or folding a view, may have taken that long.
                if not isinstance(error, UnavailableError) or (is_last and pause <= 0):
                    break
                await sleep(self._clock, max(pause, 0.0))
        return error
