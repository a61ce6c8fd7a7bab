"""The one task that awaits a storage.

Theory of operation. Writers change the map and go on. The task wakes up once an
interval, or when someone waits for durability, takes the changes away, and commits
them as one record. A commit that fails puts the changes back under what came since,
and is repeated after growing pauses. Who waits is in `_durability.py`, what became of a
commit in `_outcomes.py`.

The task never cancels a storage call. At the deadline of `stop`, a call that hangs is left
to end by itself, and the session is closed after it. So no second writer can open the state
meanwhile. Checkpoints are in `_checkpoints.py`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any
from weakref import finalize

from lab_state._buffers import join_in_steps
from lab_state._checkpoints import Checkpoints
from lab_state._clock import Clock, Timer, resolver
from lab_state._codec import encode_record, encode_small_record
from lab_state._durability import Waiters, copied
from lab_state._early import LOOK_EVERY, EarlyFlush
from lab_state._entries import ChangeSet
from lab_state._foreign import only_storage_errors, pass_on, storage_error
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._outcomes import Outcomes
from lab_state._snapshots import SnapshotViews
from lab_state._standstill import Standstill
from lab_state._state import State
from lab_state.config import Config
from lab_state.exceptions import FencedError, LabStateError, StorageError, UnavailableError
from lab_state.storage._protocol import StorageSession

_FREED_AT_ONCE = 1000
_LAST_CHANCE = 0.5


class Flusher(Outcomes):
    """Makes the changes of one state durable, from one start to one stop."""

    # They belong to the base classes, and are assigned here as well.
    durable_revision: int
    refusal: LabStateError | None
    last_error: StorageError | None

    def __init__(  # noqa: PLR0917 -- all are needed, and each has a type of its own
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
        """Prepare for the running event loop. Nothing happens before `begin`, and every call needs that loop.

        `committed` is called with what has become durable, and returns whether that is
        looked at later; `times` takes how long it took. `on_fenced` is the application's.
        """
        super().__init__(state, session.recovery, config, clock, logger, times, on_fenced)
        state.free = self._free
        self._committed = committed
        self._session = session
        self._abandoned = self._aborted = False
        self.forgotten: finalize[Any, Any] | None = None  # closes the session when all else is collected
        self._deadline = math.inf
        _ = session.progress  # without it stop() could not tell a slow storage from one that hangs: not noticed then
        self._slices = 0  # of records and snapshots, given to the storage: to encode them is progress too
        self._stop_error: LabStateError | None = None
        self.checkpoints: Checkpoints = Checkpoints(config.name, session, self, self._checkpoint_pauses, self._count)
        self.checkpoints.records = len(session.recovery.records) + self._unsettled
        if self._unsettled:
            self._wake_up()
        self._timer: Timer | None = None
        # A record of a bulk writer does not become as large as what it writes in an interval.
        often = self._interval is None or self._interval <= LOOK_EVERY
        self._early = None if often else EarlyFlush(state, clock, self._wake_up)

    def start(self) -> None:
        """Begin to flush in the background. If this raises, nothing has begun."""
        self._start(self._run())
        try:
            self._arm()
        except BaseException:
            self.abort()
            raise

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 -- a bound on what it does, not on being awaited
        """Flush, checkpoint, close the session; end once there was no progress for `timeout` seconds.

        A flush that fails is tried again until `timeout` seconds after the call.

        Raises:
            StorageError: What kept the last flush from succeeding.
        """
        self._stopping = True
        self._deadline = self._clock.monotonic() + timeout
        self._end_timers()
        standstill = Standstill(self._clock, timeout, self._progress)
        if self._task.done() or self._task.get_loop() is not self.loop:  # its loop was torn down before
            self._start(self._run())
        self._wake.set()
        await asyncio.wait({self._task, standstill.reached}, return_when=asyncio.FIRST_COMPLETED)
        standstill.cancel()
        if not self._task.done():
            self._abandon(timeout)
        if self._stop_error is not None:
            raise self._stop_error

    def remember(self) -> None:
        """Note that the session is closed, or left to its storage call. Collecting this has nothing left to do then."""
        if self.forgotten is not None:
            self.forgotten.detach()

    @property
    def is_aborted(self) -> bool:
        """Return whether it was ended without writing anything."""
        return self._aborted

    def nudge(self) -> None:
        """A change that nobody waits for was made: flush, if that is what each write does."""
        if self.write_through:
            self._wake_up()

    def abort(self) -> StorageSession:
        """End without writing anything, as a crash would; for tests of crashes. Returns the session, open."""
        self._stopping = self._aborted = True
        self.remember()
        self._end_timers()
        for task in (self._task, self.checkpoints.task):
            if task is not None:
                task.cancel()
        return self._session

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Commit nothing. Runs in a forked child. If the task runs there, it finds nothing to do."""
        self._pauses.never_end()
        self._checkpoint_pauses.never_end()
        self._waiters, self._confirming = Waiters(), Waiters()
        if self._timer is not None:
            self._timer.cancel()

    def move(self) -> None:
        """See `Durability.move`."""
        if self.loop.is_closed():
            self.checkpoints.task = None
        super().move()

    def discard_entries(self) -> None:
        """After `stop`: nobody reads them any more, but for a storage call that is still under way, and its views."""
        self.state.free = len  # not a cycle
        if self._task.done() and not self._abandoned and isinstance(self.state.entries, dict):
            self._free(self.state.entries)

    def _free(self, large: dict[Any, Any]) -> None:
        """Free a map in steps: a million values at once would hold up the event loop."""
        for _ in range(min(len(large), _FREED_AT_ONCE)):
            large.popitem()
        if large:
            self.loop.call_soon(self._free, large)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._is_closed = self.fenced
        if not self.fenced:
            self.refusal = None
        self._task = asyncio.create_task(work, name=f"lab_state {self._name} flusher")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody may wait for a task that is gone; what it should have made durable decides."""
        problem = None if task.cancelled() else task.exception()
        what = "was cancelled" if task.cancelled() else f"failed: {problem!r}" if problem is not None else "ended"
        # Who waits is told before foreign code is called: a logger.
        self._waiters.settle(self._certain_revision)
        if not self._stopping:
            self._refuse_from_now_on(
                self.refusal
                or UnavailableError(f"the flush task of {self._name!r} {what}: call stop(), which flushes what is left")
            )
            self._logger.error(
                "%s: the flush task %s: %d changed keys are not durable. Was stop() forgotten? It still flushes; "
                "`async with` does not forget it",
                self._name,
                what,
                self.unflushed_keys,
            )
            return
        lost = not self._all_durable
        cut_off = lost and task.cancelled() and not self._aborted and self._stop_error is None
        if cut_off:
            what = f"was cut off by the end of the event loop: {self.unflushed_keys} changed keys may not be durable"
        error: LabStateError = UnavailableError(
            f"the {'last flush' if lost else 'flush task'} of {self._name!r} {what}"
        )
        if lost:
            error = self._stop_error = self._stop_error or error
        self._give_up(error)
        if cut_off:  # so may be the caller of stop(): then the log alone tells
            self._logger.error("%s: stop() failed: %s", self._name, error)

    def _abandon(self, timeout: float) -> None:
        """Leave a storage call that hangs to itself; the session is closed when it ends."""
        self._abandoned = True
        if self._all_durable:
            self._logger.warning(
                "%s: everything is durable, but the checkpoint of stop() made no progress for %s s; "
                "the state stays locked until the storage answers",
                self._name,
                timeout,
            )
            return
        why = "" if self._failure is None else f"; the flush before failed: {self._failure}"
        self._stop_error = UnavailableError(
            f"stop() gave up, since the storage made no progress for {timeout} s: {self.unflushed_keys} changed keys of "
            f"{self._name!r} may not be durable; the state stays locked until the storage answers{why}"
        )
        self._stop_error.__cause__ = self._failure
        self._give_up(self._stop_error)

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot."""
        return self._session.snapshot_bytes

    @property
    def journal_bytes(self) -> int:
        """The size of the journal."""
        return self._session.journal_bytes

    @property
    def storage_warning(self) -> str | None:
        """Return the fault that the storage asks the operator to mend."""
        return self._session.warning

    # The task

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._work()
                    break
                except (KeyboardInterrupt, SystemExit) as interrupt:
                    # It was sent to the program, and hit this task by chance: the loop gets it, and the work goes on.
                    self._survive(interrupt)
                    self.loop.call_soon(pass_on, interrupt)
        except GeneratorExit:  # its loop was closed under it: whoever stops has another task
            raise
        except BaseException as error:  # the loop cancels all its tasks
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
            except Exception as problem:  # noqa: BLE001 -- all who write wait for this task
                self._survive(problem)
            # The callers that waited run now. What they write at once is committed without another turn of the loop.
            await asyncio.sleep(0)
        await self._finish()

    def _survive(self, problem: BaseException) -> None:
        """Treat what was raised beside a storage call as a failed commit."""
        self._put_back()
        self._waiters.settle(self._certain_revision)
        self._waiters.start_commit()  # those too who came since: it is not known how far the commit got
        self._failed(storage_error(problem))

    async def _commit_all(self) -> None:
        while self._waiters.next or (self._due and self._pauses.are_over):
            self._due = False
            if not self._unflushed:  # what they wait for was committed with others
                self._waiters.settle(self._certain_revision)
                return
            await self._commit()

    async def _commit(self) -> StorageError | None:
        """One commit of all that is unflushed."""
        self._begun += 1
        number = self._begun
        views = SnapshotViews(self.state, given=self._count)
        taken: ChangeSet | None = None
        try:
            self._waiters.start_commit()
            started = self._clock.monotonic()
            # Noted before it is taken, and forgotten when it is durable: whatever interrupts this loses none of it.
            taken = self._under_way = self.state.untaken()
            self.state.take(taken)
            due = await self._write(taken, views)
            self.durable_revision = taken.end
        except Exception as problem:  # noqa: BLE001 -- whatever it is, the changes note and who waits is told
            self._put_back()
            error = storage_error(problem)
            self._failed(error)
            return error
        except BaseException:  # the loop cancels all its tasks
            if self._under_way is taken:  # else `move` has done it
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
        """Tell those who follow what is durable, and return whether they will look at it later."""
        try:
            return self._committed(taken)
        except Exception as problem:  # noqa: BLE001 -- they must not end the task
            self._logger.error("%s: those who follow could not be told of a commit: %r", self._name, problem)  # noqa: TRY400 -- one line
            return True

    async def _write(self, taken: ChangeSet, views: SnapshotViews) -> bool:
        record = encode_small_record(taken) or await join_in_steps(self._counted(encode_record(taken)))
        return await only_storage_errors(lambda: self._session.commit(record, views.take))

    def _progress(self) -> int:
        """Return a number that grows while anything is written, or made ready for it."""
        try:
            return self._session.progress + self._slices
        except Exception:  # noqa: BLE001 -- a storage that breaks its promise must not make stop() endless
            return self._slices

    def _count(self) -> None:
        self._slices += 1

    def _counted(self, slices: Iterable[bytes]) -> Iterator[bytes]:
        for part in slices:
            self._slices += 1
            yield part

    def checkpoint_if_due(self) -> None:
        """Start a checkpoint if one is due, no view is out, and `stop` was not called."""
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
        """The last flush, and a checkpoint as far as time allows."""
        error = await self._last_flush()
        self._is_closed = True
        if error is not None:
            self._give_up(error)
            error = copied(error, f"stop() gave up: {self.unflushed_keys} changed keys are not durable, and lost")
        self._stop_error = self._stop_error or error
        await self.checkpoints.ended()
        if error is None and self.checkpoints.records and not (self._abandoned or self.fenced):
            await self.checkpoints.write(wait=False)
        if self.refusal is not None and self.fenced and self._stop_error is None:
            self._stop_error = copied(self.refusal, "nothing of this writer is lost: all of it was durable before")

    async def _close(self, *, hurried: bool) -> None:
        """The end of the session. `hurried`: of the event loop as well, and `stop` has given the storage up."""
        if not hurried:
            await self._let_go()
            return
        letting_go = asyncio.create_task(self._let_go())
        await asyncio.wait({letting_go}, timeout=_LAST_CHANCE)
        # Out of the wait for a checkpoint, into `aclose`, and out of that: what it has begun goes on.
        for _ in range(2):
            letting_go.cancel()
            await asyncio.sleep(0)

    async def _let_go(self) -> None:
        try:
            await self.checkpoints.ended()
        finally:
            try:
                await only_storage_errors(self._session.aclose)
            except StorageError as error:
                self._logger.warning("%s: letting go of the storage failed: %s", self._name, error)

    async def _last_flush(self) -> StorageError | None:
        error: StorageError | None = None
        while not self._abandoned and self._unflushed:
            error = await self._commit()
            if error is not None:
                until = self._pauses.until
                is_last = until >= self._deadline
                if is_last:
                    until = self._deadline - _LAST_CHANCE  # one more, with the time that a commit takes
                pause = until - self._clock.monotonic()
                # A pause that is over already is no reason to give up: to log, or to fold a view, took as long.
                if not isinstance(error, UnavailableError) or (is_last and pause <= 0):
                    break
                await self._sleep(max(pause, 0.0))
        return error

    async def _sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._clock.call_later(seconds, resolver(woken))
        await woken
