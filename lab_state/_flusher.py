"""The one task that awaits a storage.

Theory of operation. Writers change the map and go on. The task wakes up once an
interval, or when someone waits for durability, takes the changes away, and commits
them as one record. Whoever asks while a commit is under way waits for the next one,
unless the one under way holds all that it asks for; so all who wait share one write
(group commit). A commit that fails puts the changes back under what came since, and
is repeated after growing pauses.

A checkpoint runs in a task of its own, beside the commits. The task that commits
never cancels a storage call: at the deadline of `stop` it is left to end by itself,
and the session is closed behind it, so no second writer can slip in meanwhile.

Callers wait on futures of their own, so cancelling one touches neither the write nor
the others.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from lab_state._clock import Clock, Timer
from lab_state._codec import PoisonedError, encode_record, encode_snapshot
from lab_state._state import Changes, State
from lab_state.config import Config
from lab_state.exceptions import (
    ClosedError,
    FencedError,
    LabStateError,
    StorageError,
    UnavailableError,
)
from lab_state.storage._protocol import StorageSession

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_FOLDED_AT_ONCE = 1000

Waiter = tuple[int, "asyncio.Future[None]"]


class Flusher:
    """Makes the changes of one state durable, from one start to one stop.

    Attributes:
        state: The state, loaded.
        write_through: Whether a write returns only when it is durable.
        durable_revision: Everything up to this revision is durable.
        flushes: How many commits succeeded.
        failures: How many commits and checkpoints failed.
        last_error: What the last attempt failed with; `None` when it succeeded.
        last_flush_at: When the last commit succeeded, in seconds since 1970.
        last_flush_seconds: How long it took.
    """

    def __init__(
        self, state: State, session: StorageSession, config: Config, clock: Clock, logger: logging.Logger
    ) -> None:
        """Begin at once; the running loop is the one that everything else must be called on."""
        self.state = state
        self.write_through = config.flush_interval == 0
        self.flushes = self.failures = 0
        self.last_error: StorageError | None = None
        self.last_flush_at: float | None = None
        self.last_flush_seconds: float | None = None
        self._session = session
        self._interval = config.flush_interval
        self._name = config.name
        self._clock = clock
        self._logger = logger
        self._next: list[Waiter] = []  # wait for the next commit
        self._riding: list[Waiter] = []  # wait for the commit under way
        self._patient: list[Waiter] = []  # wait for whichever commit it will be
        self._under_way: Changes | None = None
        self._due = False  # a background flush is
        self._failed_in_a_row = self._checkpoints_failed_in_a_row = 0
        self._not_before = self._checkpoint_not_before = 0.0
        self._stopping = self._abandoned = False
        self._deadline = math.inf
        self._stop_error: StorageError | None = None
        self._unsettled = session.recovery.unsettled
        self.durable_revision = 0 if self._unsettled else state.revision
        self._records = len(session.recovery.records) + self._unsettled  # behind the last snapshot
        self._checkpoint_due = False
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        if self._unsettled:
            self._wake_up()
        self._checkpointing: asyncio.Task[None] | None = None
        self._timer: Timer | None = None
        self._task = asyncio.create_task(self._run(), name=f"lab_state {self._name} flusher")
        self._task.add_done_callback(self._ended)
        self._arm()

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 -- a bound on what it does, not on being awaited
        """Flush, checkpoint, close the session; not longer than `timeout` seconds.

        Raises:
            StorageError: What kept the last flush from succeeding.
        """
        self.check_loop()
        self._stopping = True
        self._deadline = self._clock.monotonic() + timeout
        if self._timer is not None:
            self._timer.cancel()
        expired = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(timeout, _resolver(expired))
        if self._task.done():  # cancelled, by whoever cancels all the tasks of a loop
            self._task = asyncio.create_task(self._finish())
        self._wake.set()
        await asyncio.wait({self._task, expired}, return_when=asyncio.FIRST_COMPLETED)
        timer.cancel()
        expired.cancel()
        if not self._task.done():
            self._abandon(timeout)
        self._release_waiters(self._stop_error or ClosedError(f"{self._name!r} was stopped before this became durable"))
        if self._stop_error is not None:
            raise self._stop_error

    def abort(self) -> StorageSession:
        """End without writing anything, as a crash would; for tests of crashes. Returns the session, open."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for task in (self._task, self._checkpointing):
            if task is not None:
                task.cancel()
        return self._session

    def _abandon(self, timeout: float) -> None:
        """Leave a storage call that hangs to itself; the session is closed when it ends."""
        self._abandoned = True
        if self._unsettled or self.durable_revision < self.state.revision:
            self._stop_error = UnavailableError(
                f"stop() ran out of its {timeout} s while the storage was at work: {self.unflushed_keys} changed keys of "
                f"{self._name!r} may not be durable; the state stays locked until the storage answers"
            )
        else:
            self._logger.warning(
                "%s: everything is durable, but stop() ran out of its %s s during the checkpoint; "
                "the state stays locked until the storage answers",
                self._name,
                timeout,
            )

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody may wait for a task that is gone."""
        if not self._stopping or task.cancelled() or task.exception() is not None:
            what = "was cancelled with its event loop" if task.cancelled() else f"failed: {task.exception()!r}"
            self._logger.error("%s: the flush task %s; stop() still flushes", self._name, what)
            self._release_waiters(UnavailableError(f"the flush task of {self._name!r} {what}; stop() still flushes"))

    def _release_waiters(self, error: LabStateError) -> None:
        self._settle_all()
        for waiters in (self._next, self._riding, self._patient):
            _fail(waiters, error, "not durable")

    # Waiting for durability

    async def flush(self) -> None:
        """Return when everything so far is durable."""
        if self._unsettled or self.durable_revision < self.state.revision:
            await self.durable(self.state.revision)

    async def durable(self, revision: int) -> None:
        """Ask for a commit, and return when `revision` is durable."""
        self._check_alive()
        future = asyncio.get_running_loop().create_future()
        if self._under_way is not None and revision <= self._under_way.end:
            self._riding.append((revision, future))
        else:
            self._next.append((revision, future))
            self._wake.set()
        await future

    async def wait_durable(self, revision: int) -> None:
        """Return when `revision` is durable; ask for nothing."""
        self._check_alive()
        if self._unsettled or self.durable_revision < revision:
            future = asyncio.get_running_loop().create_future()
            self._patient.append((revision, future))
            await future

    def check_loop(self) -> None:
        """Whether this is the event loop that the manager was started on.

        Raises:
            RuntimeError: It is another one, or another thread's.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                f"the manager of {self._name!r} belongs to the event loop that start() ran on; "
                "use it there, or stop it there and start it here"
            )

    def _check_alive(self) -> None:
        self.check_loop()
        if isinstance(self.last_error, FencedError):
            raise copy.copy(self.last_error)
        if self._task.done():
            raise UnavailableError(
                f"the flush task of {self._name!r} has ended with its event loop; only stop() flushes now"
            )

    # Numbers

    @property
    def unflushed_keys(self) -> int:
        """How many keys have changes that are not durable; a cleared state counts as one more."""
        pending = len(self.state.changes) + self.state.cleared
        if (taken := self._under_way) is not None:
            pending += len(taken.changes) + taken.cleared
        return pending

    @property
    def unflushed_age(self) -> float:
        """How old the oldest change is that is not durable, in seconds; 0 when all is durable."""
        if (taken := self._under_way) is not None:
            return max(0.0, self._clock.monotonic() - taken.since)
        if self.state.revision > self.state.taken:
            return max(0.0, self._clock.monotonic() - self.state.since)
        return 0.0

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot."""
        return self._session.snapshot_bytes

    @property
    def journal_bytes(self) -> int:
        """The size of the journal."""
        return self._session.journal_bytes

    @property
    def _unflushed(self) -> bool:
        """Whether a commit has anything to do; one under way does not count."""
        return self._unsettled or self.state.revision > self.state.taken

    # The task

    async def _run(self) -> None:
        while not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            await self._commit_all()
            if self._checkpoint_due and self._clock.monotonic() >= self._checkpoint_not_before:
                self._start_checkpoint()
        await self._finish()

    async def _commit_all(self) -> None:
        while self._next or (self._due and self._clock.monotonic() >= self._not_before):
            self._due = False
            if self._unflushed:
                await self._commit()
            else:  # what they wait for was committed with others
                self._settle_all()
                return

    async def _commit(self) -> StorageError | None:
        """One commit of all that is unflushed."""
        self._riding, self._next = self._next, []
        taken = self._under_way = self.state.take()
        views: list[dict[str, Any]] = []
        started = self._clock.monotonic()
        try:
            while (record := await self._record(taken)) is None:
                taken = self._under_way = self.state.take()
            due = await _only_storage_errors(self._session.commit(record, lambda: self._view(views, wait=False)))
        except StorageError as error:
            self.state.put_back(taken)
            self._failed(error)
            return error
        except BaseException:  # the loop cancels all its tasks
            self.state.put_back(taken)
            raise
        finally:
            self._under_way = None
            await self._fold(views)
        self._unsettled = False
        self._records += 1
        self._succeeded(taken.end, self._clock.monotonic() - started)
        self._checkpoint_due = self._checkpoint_due or due
        return None

    async def _record(self, taken: Changes) -> bytes | None:
        """The record; `None` if it would have made the state unreadable, and the changes were put back without that."""
        try:
            return await _joined(encode_record(taken))
        except PoisonedError as poisoned:
            self.state.put_back(taken)
            self.state.delete_many(poisoned.keys)
            self._logger.error(  # noqa: TRY400 -- the traceback would tell nothing
                "%s: deleted the keys %s: they held a msgspec.Raw that is not JSON", self._name, poisoned.keys
            )
            return None

    def _succeeded(self, revision: int, seconds: float) -> None:
        if self._failed_in_a_row:
            self._logger.info("%s: flushed again after %d failures", self._name, self._failed_in_a_row)
        self.durable_revision = max(self.durable_revision, revision)
        self.flushes += 1
        self.last_error = None
        self.last_flush_at = self._clock.time()
        self.last_flush_seconds = seconds
        self._failed_in_a_row = 0
        self._settle_all()

    def _failed(self, error: StorageError) -> None:
        self.failures += 1
        self.last_error = error
        self._failed_in_a_row += 1
        fenced = isinstance(error, FencedError)
        if fenced or self._stopping:
            stay = "not durable"
        elif self._interval is None and not self._unsettled:
            stay = "not durable yet: the changes stay in memory, and the next flush() tries again"
        else:
            stay = "not durable yet: the changes stay in memory, and it is tried again"
        self._logger.error("%s: a flush failed; %s: %s", self._name, stay, error)
        _fail(self._riding, error, stay)
        if fenced:
            self._not_before = math.inf
            _fail(self._patient, error, stay)
        elif (self._interval is not None or self._unsettled) and not self._stopping:
            pause = self._pause(self._failed_in_a_row)
            self._not_before = self._clock.monotonic() + pause
            self._clock.call_later(pause, self._wake_up)

    def _settle_all(self) -> None:
        for waiters in (self._riding, self._next, self._patient):
            _settle(waiters, self.durable_revision)

    def _pause(self, failures: int) -> float:
        longest = max(self._interval or 0.0, _LONGEST_PAUSE)
        return min(longest, _FIRST_PAUSE * 2.0 ** min(failures - 1, 30))

    # Timers

    def _arm(self) -> None:
        if self._interval:
            self._timer = self._clock.call_later(self._interval, self._tick)

    def _tick(self) -> None:
        self._arm()
        self._wake_up()

    def _wake_up(self) -> None:
        self._due = True
        self._wake.set()

    # Checkpoints

    def _start_checkpoint(self) -> None:
        if self._checkpointing is None or self._checkpointing.done():
            name = f"lab_state {self._name} checkpoint"
            self._checkpointing = asyncio.create_task(self._checkpoint_beside(), name=name)

    async def _checkpoint_beside(self) -> None:
        await self._checkpoint(wait=True)

    async def _checkpoint(self, *, wait: bool) -> None:
        self._checkpoint_due = False
        views: list[dict[str, Any]] = []
        before = self._records

        def snapshot() -> AsyncIterator[bytes]:
            nonlocal before
            before = self._records  # what is committed from here on stays behind the snapshot
            return self._view(views, wait=wait)

        try:
            await _only_storage_errors(self._session.checkpoint(snapshot))
        except StorageError as error:
            self._checkpoint_failed(error)
        else:
            self._records -= before
            self._checkpoints_failed_in_a_row = 0
        finally:
            await self._fold(views)

    def _checkpoint_failed(self, error: StorageError) -> None:
        self.failures += 1
        self.last_error = error
        self._checkpoints_failed_in_a_row += 1
        self._checkpoint_due = True
        pause = self._pause(self._checkpoints_failed_in_a_row)
        self._checkpoint_not_before = self._clock.monotonic() + pause
        self._logger.warning("%s: a checkpoint failed; nothing is lost, the journal goes on: %s", self._name, error)
        if not self._stopping:
            self._clock.call_later(pause, self._wake.set)

    def _view(self, views: list[dict[str, Any]], *, wait: bool) -> AsyncIterator[bytes]:
        """A view of the state at this moment, as a snapshot in slices."""
        view = self.state.freeze()
        views.append(view)
        return self._slices(view, self.state.revision, wait=wait)

    async def _slices(self, view: dict[str, Any], revision: int, *, wait: bool) -> AsyncIterator[bytes]:
        last = b""
        for part in encode_snapshot(view, revision, own=self.state.borrowed):
            if last:
                yield last
                await asyncio.sleep(0)
            last = part
        if wait and self.durable_revision < revision:
            await self.durable(revision)
        yield last

    async def _fold(self, views: list[dict[str, Any]]) -> None:
        for view in views:
            while self.state.fold(view, _FOLDED_AT_ONCE):  # noqa: ASYNC110 -- it is the loop that does the work
                await asyncio.sleep(0)

    # The end

    async def _finish(self) -> None:
        """The last flush, a checkpoint as far as time allows, and the end of the session."""
        try:
            self._stop_error = await self._last_flush()
            await self._checkpoint_ended()
            if self._stop_error is None and self._records and not self._abandoned:
                await self._checkpoint(wait=False)
        finally:
            await self._checkpoint_ended()
            try:
                await _only_storage_errors(self._session.aclose())
            except StorageError as error:
                self._logger.warning("%s: letting go of the storage failed: %s", self._name, error)

    async def _checkpoint_ended(self) -> None:
        if self._checkpointing is not None:
            await asyncio.wait({self._checkpointing})

    async def _last_flush(self) -> StorageError | None:
        error: StorageError | None = None
        while not self._abandoned and self._unflushed:
            error = await self._commit()
            if error is not None:
                pause = self._pause(self._failed_in_a_row)
                if not isinstance(error, UnavailableError) or self._clock.monotonic() + pause >= self._deadline:
                    break
                await self._sleep(pause)
        return error

    async def _sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._clock.call_later(seconds, _resolver(woken))
        await woken


def _resolver(future: asyncio.Future[None]) -> Callable[[], None]:
    return lambda: None if future.done() else future.set_result(None)


def _settle(waiters: list[Waiter], durable: int) -> None:
    """Wake those whose revision is durable; the others stay."""
    rest: list[Waiter] = []
    for revision, future in waiters:
        if revision > durable:
            rest.append((revision, future))
        elif not future.done():
            future.set_result(None)
    waiters[:] = rest


def _fail(waiters: list[Waiter], error: LabStateError, stay: str) -> None:
    for _, future in waiters:
        if not future.done():
            # One each: a raised exception carries the traceback of who raised it.
            told = copy.copy(error)
            if len(error.args) == 1:
                told.args = (f"{error} ({stay})",)
            told.__cause__ = error.__cause__
            future.set_exception(told)
            future.exception()  # a waiter that is cancelled right now will not look
    waiters.clear()


async def _joined(slices: Iterable[bytes]) -> bytes:
    parts: list[bytes] = []
    for part in slices:
        if parts:
            await asyncio.sleep(0)
        parts.append(part)
    return b"".join(parts)


async def _only_storage_errors(call: Coroutine[Any, Any, Any]) -> Any:
    """A storage that breaks its promise must not end the task."""
    try:
        return await call
    except StorageError:
        raise
    except Exception as error:
        raise UnavailableError(f"the storage raised {type(error).__name__}, which no storage should") from error
