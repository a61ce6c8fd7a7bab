"""The one task that feeds a cache with the mirror of a state.

The flusher reports each commit to `MirrorWriter.committed`. The task sends the changes to the
cache, one step at a time. Commits that come meanwhile are merged into the next step. If a mirror
has another writer or an unexpected revision, it is filled: the whole state replaces it. A fill
sends a view of the state in slices. Readers see the fill when the slices end, and the slices end only
when the whole view is durable. So readers never see a change that a crash could undo.

No caller except `stop()` waits for this task. An error here does not affect the manager. The first error of a
series is logged, and `status()` shows the last error. The task tries again after growing pauses. No exception
of a cache, a logger or a clock ends the task.

If another client has written to the mirror, the mirror is filled again, because the changes of that client
are not known. If the mirror has expiry times, it is also filled again when the wall clock was set by half
a second or more, or the machine slept for as long. The reason is that readers use the wall clock, and the
state counts the seconds that pass.

A fill holds a view of the state, and no checkpoint can begin meanwhile. So a checkpoint that is due
cancels the fill. The fill begins again after the checkpoint. It then has time until the next
checkpoint is due. With `FileStorage`, this is when the journal is larger than the snapshot, and larger
than 4 MiB. A cache that needs more time for a fill would also be too slow for the steps.

The mirror of another writer may be from an earlier start of this state, or from a newer owner
of the state. A commit shows which case it is: if the commit succeeds, the state has no newer
owner. So a commit is made before the mirror of another writer is replaced. Right after the
start this is not needed, because the start has made this manager the owner.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator

from lab_state._clock import Clock, Pauses, Timer, done_within
from lab_state._entries import ChangeSet, Stored
from lab_state._flusher import Flusher
from lab_state._foreign import described, is_cancelled
from lab_state._log import Log
from lab_state._metrics import MirrorCounts
from lab_state._snapshots import SnapshotViews
from lab_state._state import State
from lab_state.cache._backlog import Backlog
from lab_state.cache._format import slices
from lab_state.cache._protocol import SPOILT, Cache, CacheSession, Seen, Slice, Step
from lab_state.exceptions import FencedError, StorageError, UnavailableError

STOP_SECONDS = 1.0
HEARTBEAT_SECONDS = 2.0
"""The seconds between two checks of the mirror (`CacheSession.look`). A check also sends readers a heartbeat."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_FIRST_SPOILT, _LONGEST_SPOILT = 1.0, 300.0
"""The first and the longest pause between two fills, in seconds, while another client writes to the mirror repeatedly."""

_CALM_SECONDS = 60.0
"""If no other client writes for this many seconds after a pause, the pauses are reset: the next such write is logged, and a fill
follows at once."""

_MOST_DRIFT_MILLISECONDS = 500
"""The drift between the two clocks at which the mirror is filled again. So no expiry time in the mirror is wrong by more than this."""

_REST_SECONDS = 0.006
"""The pause after a step. In this pause, the application can use the event loop, and more commits are merged."""

_LONG_REST_SECONDS = 0.02
"""The pause after a step with more than `_MANY_COMMITS` commits. It is longer, so that more commits are merged into the next step."""

_MANY_COMMITS = 5

_MERGED_AT_ONCE = 1000

_KEPT_SECONDS = 10.0
"""The seconds between two empty slices. They keep the cache from dropping a fill that waits for a commit."""

_PROGRESS_SECONDS = 5.0
_LARGE_KEYS = 100_000
"""A fill of this many keys or more logs its progress, at most once in `_PROGRESS_SECONDS`."""


class MirrorWriter:
    """The writer of the mirror of one state, from one start of its manager to one stop.

    Attributes:
        revision: The revision of the mirror; `None` while there is no mirror of this writer,
            or while its revision is unknown.
        up: Whether the last attempt succeeded; False before the first success, and after the end of the task.
        last_error: The error of the last attempt; `None` if it succeeded.
        task_failure: The reason why the task ended before `stop`; `None` if it has not ended before `stop`.
    """

    def __init__(self, name: str, cache: Cache, clock: Clock, logger: Log, counts: MirrorCounts) -> None:
        """Prepare the writer. `start` starts its task."""
        self.revision: int | None = None
        self.up: bool = False
        self.last_error: StorageError | None = None
        self.task_failure: str | None = None
        self._name = name
        self._cache = cache
        self._clock = clock
        self._logger = logger
        self._counts = counts
        self._writer = os.urandom(8).hex()
        self._backlog = Backlog()
        self._wake = asyncio.Event()
        self._pauses = Pauses(clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        self._spoilt = False  # whether another client has written to this writer's mirror
        self._spoilt_pauses = Pauses(clock, _FIRST_SPOILT, _LONGEST_SPOILT)
        self._session: CacheSession | None = None
        self._seen: Seen | None = None  # the result of the last `look`, if nothing was written since
        # The wall clock minus the time of the state, in milliseconds, as it was added to the expiry times in the mirror.
        self._ahead = 0
        self._has_times = False  # whether the mirror may have expiry times
        self._tried: int | None = None  # the revision of a step or a fill whose outcome is unknown
        self._is_owner = True  # True until the first fill, because the start has just made this manager the owner
        self._idle = False  # whether a check of the mirror is due
        self._stopping = False
        self._holding: asyncio.Timeout | None = None  # the timeout of a fill, while it holds a view

    def start(self, flusher: Flusher) -> None:
        """Start the task for the state of a flusher. If this raises an error, no task was started."""
        self._flusher = flusher
        self._schedule_heartbeat()
        self._commits = 0  # the number of commits since the last step
        self._known = flusher.state.taken  # the revision of the last commit that `committed` got
        self._wake.set()
        try:
            self._task = asyncio.create_task(self._run(), name=f"lab_state {self._name} mirror")
        except BaseException:
            self._timer.cancel()
            raise
        self._task.add_done_callback(self._ended)

    def abort(self) -> None:
        """Cancel the task at once, and send nothing more."""
        self._stopping = True
        self._timer.cancel()
        self._task.cancel()

    def committed(self, taken: ChangeSet) -> None:
        """Add the changes of a commit, which are durable now. The task sends them later."""
        if taken.end > taken.start:
            try:
                if taken.start > self._known:  # an earlier call of this method failed
                    self._backlog.overflow()
                self._backlog.add(taken)
            except BaseException:
                self._backlog.overflow()  # a step without these changes would be wrong, so the mirror is filled
                raise
            finally:
                self._known = taken.end
                self._commits += 1
                self._wake.set()
                if self._holding is not None and self._flusher.checkpoints.is_waiting:
                    self._holding.reschedule(0.0)  # cancel the fill at once
                    self._holding = None

    async def stop(self) -> None:
        """Send the remaining changes, for one second at most. If some changes are left, the fill of the next start includes them."""
        self._stopping = True
        self._timer.cancel()
        task = self._task
        if task.get_loop() is not asyncio.get_running_loop():
            return  # the event loop of the task was closed while the task ran
        self._wake.set()
        await done_within(task, self._clock, STOP_SECONDS)
        task.cancel()
        await asyncio.wait({task})

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Send nothing more. This runs in a forked child. The connection belongs to the parent."""
        self._pauses.never_end()
        self._timer.cancel()

    # The task

    async def _run(self) -> None:
        try:
            while not (self._stopping or self._flusher.fenced):
                await self._wake.wait()
                self._wake.clear()
                await self._merge()
                while self._may_try and await self._attempt():
                    pass
        finally:
            self._timer.cancel()
            self.up = False
            await self._close()

    @property
    def _may_try(self) -> bool:
        return self._pauses.are_over and not self._flusher.fenced

    async def _merge(self) -> None:
        try:
            while self._backlog.merge(_MERGED_AT_ONCE):  # noqa: ASYNC110 -- the condition does the work
                await asyncio.sleep(0)
        except Exception:  # noqa: BLE001 -- such as MemoryError; changes are missing then, so the mirror is filled
            self._backlog.overflow()

    async def _attempt(self) -> bool:
        """Update the mirror; see `_act`. If that fails, note the error and start a pause. Return whether there is more to do now."""
        try:
            await self._act()
        except StorageError as error:
            await self._failed(error)
            return False
        except (Exception, asyncio.CancelledError) as error:  # a cache must not raise such an error, but may do so
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            problem = UnavailableError(f"the cache failed with {type(error).__name__}, which a cache must not raise")
            problem.__cause__ = error
            await self._failed(problem)
            return False
        if self.revision is not None and not self.up:
            self._recovered()
        return self.revision is None or bool(self._backlog) or self._backlog.overflowed

    async def _act(self) -> None:
        """Open a session if there is none. Then fill the mirror, or send a step, or do nothing if the mirror is up to date."""
        if self._session is None:
            self._session = await self._cache.open(self._name, self._writer)
            await self._look(self._session)
        elif self._idle:
            await self._look(self._session)
        self._idle = False
        await self._merge()
        if self._backlog.overflowed:
            self.revision = None
        self._check_clocks()
        if self.revision is None:
            await self._fill(self._session)
        elif self._backlog.end > self.revision:
            await self._step(self._session, self.revision)
        else:
            self._backlog.clear()

    def _check_clocks(self) -> None:
        """Request a fill if the wall clock has drifted from the time of the state, and the mirror has expiry times, which are wrong then."""
        ahead = _ahead(self._flusher.shown)
        if abs(ahead - self._ahead) >= _MOST_DRIFT_MILLISECONDS:
            if self._has_times:
                self.revision = None
            else:
                self._ahead = ahead

    async def _look(self, session: CacheSession) -> None:
        """Check the mirror, and set `revision`. A step whose answer was lost may have changed the mirror."""
        seen = self._seen = await session.look()
        if seen == SPOILT:
            self._spoil()
        elif seen.writer != self._writer:
            self._spoilt = False  # the mirror is missing, or belongs to another writer
        ours = not self._spoilt and seen.writer == self._writer and seen.revision in {self.revision, self._tried}
        self.revision = seen.revision if ours else None
        self._tried = None

    async def _step(self, session: CacheSession, start: int) -> None:
        taken = self._backlog.take(start)
        commits, self._commits = self._commits, 0
        self._tried, self._seen = taken.end, None
        try:
            done = await session.apply(Step(start, taken.end, taken.cleared), self._changed(taken))
        except BaseException:
            self._backlog.put_back(taken)
            raise
        if done:
            self.revision = taken.end
            self._counts.steps += 1
            # This pause is in real time, and lets the event loop run. A manual clock would delay the next step forever.
            await asyncio.sleep(_LONG_REST_SECONDS if commits > _MANY_COMMITS else _REST_SECONDS)
        else:
            self._backlog.put_back(taken)
            self._tried = None  # the step was not done, so the mirror cannot have its revision
            await self._look(session)
            if self.revision == start:  # the revision is right, so another client has changed something else
                self._spoil()
                self.revision = None
        self._tried = None

    async def _fill(self, session: CacheSession) -> None:
        if self._spoilt and not self._spoilt_pauses.are_over:
            raise UnavailableError(
                "another client writes to the mirror repeatedly, so it is filled again after growing pauses; "
                "let other clients use other keys, or remove their right to write to these"
            )
        seen, self._seen = self._seen or await session.look(), None
        if seen.writer not in {None, self._writer} and not self._is_owner:
            await self._flusher.confirm_ownership()
        self._is_owner = False
        await self._flusher.wait_flushed(0)  # after an unclean end, the first commit begins at once and holds a view
        self._flusher.checkpoint_if_due()
        await self._flusher.checkpoints.ended()  # a second view at the same time would need a copy of the state
        while self._flusher.shown.frozen:  # noqa: ASYNC110 -- a commit of the whole state holds a view too, and sets no event
            await asyncio.sleep(_REST_SECONDS)
        self._backlog.clear()
        await self._replace(session, seen)
        self._counts.fills += 1
        if self._spoilt:
            self._spoilt = False
            self._spoilt_pauses.start()

    async def _replace(self, session: CacheSession, seen: Seen) -> None:
        """Replace the mirror that `look` found by the present state. A checkpoint that is due cancels the fill."""
        state = self._flusher.shown
        views, revision, ahead = SnapshotViews(state), state.revision, _ahead(state)
        self._tried = revision
        # `freeze` takes the view here, and not when the first slice is requested.
        parts = self._whole(views, views.freeze(), revision, ahead)
        self._holding = bound = asyncio.timeout(None)
        try:
            async with bound:
                done = await session.fill(revision, parts, seen)
        except TimeoutError:
            if not bound.expired():
                raise
            raise UnavailableError(
                "a fill was cut off for a checkpoint that was due, and begins again after it: the cache takes the state "
                "more slowly than it changes"
            ) from None
        finally:
            self._holding = None
            await parts.aclose()
            await views.fold()
            self._flusher.checkpoint_if_due()
        self._tried = None
        if not done:
            raise UnavailableError("another writer replaced the mirror while it was filled")
        self.revision, self._ahead = revision, ahead

    def _spoil(self) -> None:
        """Request a fill, because another client has written to the mirror."""
        if self._clock.monotonic() >= self._spoilt_pauses.until + _CALM_SECONDS:
            self._spoilt_pauses.reset()
        if not self._spoilt and not self._spoilt_pauses.failures:
            self._logger.warning("%s: another client has written to the mirror; it is filled again", self._name)
        self._spoilt = True

    async def _changed(self, taken: ChangeSet) -> AsyncGenerator[Slice]:
        """Yield the changes of a step in slices."""
        for part in slices(taken.changes.items(), self._ahead):
            if part is not None:
                self._has_times = self._has_times or bool(part.expires)
                yield part
            await asyncio.sleep(0)

    async def _whole(
        self, views: SnapshotViews, view: dict[str, Stored], revision: int, ahead: int
    ) -> AsyncGenerator[Slice]:
        """Yield a view of the state in slices. The generator ends when the whole view is durable."""
        total, sent, logged = len(view), 0, self._clock.monotonic()
        for part in slices(view.items(), ahead):
            if part is None:
                await asyncio.sleep(0)
                continue
            self._has_times = self._has_times or bool(part.expires)
            yield part
            await asyncio.sleep(0)
            sent += len(part.values)
            if total >= _LARGE_KEYS and self._clock.monotonic() - logged >= _PROGRESS_SECONDS:
                logged = self._clock.monotonic()
                self._logger.debug("%s: filling the mirror, %d of %d keys", self._name, sent, total)
        del view
        await views.fold()
        self._holding = None
        durable = asyncio.ensure_future(self._flusher.wait_flushed(revision))
        try:
            while not durable.done():
                if not await done_within(durable, self._clock, _KEPT_SECONDS):
                    yield Slice({}, {}, [])
            await durable
        finally:
            durable.cancel()
        if total >= _LARGE_KEYS:
            self._logger.debug("%s: filled the mirror with %d keys", self._name, total)

    # Failures

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log the end of the task, unless the manager is stopped or fenced."""
        if not task.cancelled() and (problem := task.exception()) is not None:
            what = f"failed: {described(problem)}"
        else:
            what = "was cancelled"
        if not (self._stopping or self._flusher.fenced):
            self.task_failure = f"the mirror task of {self._name!r} {what}: the mirror is not updated"
            self._logger.error("the mirror task of %r %s: the mirror is not updated", self._name, what)

    async def _failed(self, error: StorageError) -> None:
        self._counts.failures += 1
        if self.last_error is None and not self._stopping and not isinstance(error, FencedError):
            self._logger.warning(
                "%s: the mirror is not up to date, so readers see old values or none; nothing is lost, and the update "
                "is tried again: %s",
                self._name,
                error,
            )
        self.up, self.last_error = False, error
        await self._close()
        self._clock.call_later(self._pauses.start(), self._wake.set)

    def _recovered(self) -> None:
        """End the pauses after a success. If there was a failure before, log the success."""
        self._pauses.reset()
        if self.last_error is not None:
            self._logger.debug("%s: the mirror works again, at revision %s", self._name, self.revision)
        self.up, self.last_error = True, None

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                await session.aclose()
            except (Exception, asyncio.CancelledError) as error:  # no error of a cache may end the task
                if isinstance(error, asyncio.CancelledError) and is_cancelled():
                    raise

    # Heartbeats

    def _schedule_heartbeat(self) -> None:
        self._timer: Timer = self._clock.call_later(HEARTBEAT_SECONDS, self._heartbeat)

    def _heartbeat(self) -> None:
        self._schedule_heartbeat()
        self._idle = True
        self._wake.set()


def _ahead(state: State) -> int:
    """Return the time of the wall clock minus the time of the state, in milliseconds."""
    return state.wall() - state.now()
