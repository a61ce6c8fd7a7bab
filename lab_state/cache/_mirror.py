"""The one task that feeds a cache.

Theory of operation. The flusher tells what it has made durable; the task brings it to
the cache, one step at a time, and what becomes durable meanwhile is merged for the next
step. A copy that is not this writer's, or not at the revision where this writer left it,
is replaced in full; the view for that is the state's own, and the copy is put in place
only when all of the view is durable. So a reader never sees what a crash could take back.

Nobody waits for this task, and nothing that goes wrong here is anybody else's problem:
it is logged once, shown in `status()`, tried again after growing pauses, and mended.
Whatever a cache, a logger or a clock raises, the task goes on.

A copy that another client has written to is filled anew, like one that is gone: nothing
says what was changed in it. So is one with expiry times, when the wall clock was set or
the machine slept: readers go by that clock, and the state by the seconds that pass.

A fill holds a view of the state, and no checkpoint can begin meanwhile. So one that is
due cuts the fill off. The fill begins anew behind it, with the time that the journal
takes to grow again to the size of a snapshot: a cache for which that is too little could
not follow the changes either.

A copy of another writer is one of an earlier life of this state, or of a newer writer
that this one does not know of yet. The storage knows: a commit that succeeds says that
nobody else owns the state, so one is made before the other's copy is replaced. Right
after the start the storage has just said so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from typing import Any

from lab_state._clock import Clock, Pauses, Timer, resolver
from lab_state._entries import ChangeSet, Stored
from lab_state._flusher import Flusher
from lab_state._foreign import is_cancelled
from lab_state._log import Log
from lab_state._metrics import MirrorCounts
from lab_state._snapshots import SnapshotViews
from lab_state._state import State
from lab_state.cache._backlog import Backlog
from lab_state.cache._format import slices
from lab_state.cache._protocol import SPOILT, Cache, CacheSession, Seen, Slice, Step
from lab_state.exceptions import FencedError, StorageError, UnavailableError

STOP_SECONDS = 1.0
BEAT_SECONDS = 2.0
"""How often an idle writer looks after its copy, and says that it lives."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_FIRST_SPOILT, _LONGEST_SPOILT = 1.0, 300.0
"""Between two fills, where another client writes to the copy again and again."""

_CALM_SECONDS = 60.0
"""After so long without that, it is told again, and the next fill is not held up."""

_AHEAD_MILLISECONDS = 500
"""Times in the copy are wrong by less than this: so far the clocks may drift apart before it is filled anew."""

_REST_SECONDS = 0.006
"""After a step: a writer that flushes has the loop to itself meanwhile, and more is coalesced."""

_LONG_REST_SECONDS = 0.02
"""After a step that held more than `_MANY` commits: that writer flushes all the time."""

_MANY = 5

_MERGED_AT_ONCE = 1000
_KEPT_SECONDS = 10.0
_TOLD_SECONDS = 5.0
_LARGE = 100_000


class Mirror:
    """Keeps the copy of one state, from a start to a stop.

    Attributes:
        revision: The revision of the copy; `None` while there is none, or it is not
            known which.
        up: Whether the last attempt succeeded.
        last_error: What it failed with.
        task_failure: How the task has ended before `stop`, if it has.
    """

    def __init__(self, name: str, cache: Cache, clock: Clock, logger: Log, counts: MirrorCounts) -> None:
        """Nothing happens before `begin`; what `committed` is told is kept."""
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
        self._pending = Backlog()
        self._wake = asyncio.Event()
        self._pauses = Pauses(clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        self._spoilt = False  # the copy is this writer's, but another client has written to it
        self._spoils = Pauses(clock, _FIRST_SPOILT, _LONGEST_SPOILT)
        self._session: CacheSession | None = None
        self._seen: Seen | None = None  # what the last call of `look` saw, if nothing was done since
        self._ahead = 0  # how far the wall clock is ahead of the state's time in the copy, in milliseconds
        self._has_times = False  # whether the copy may have expiry times
        self._tried: int | None = None  # the revision of a step whose outcome is unknown
        self._is_owner = True  # the storage has just said so
        self._idle = False  # nothing was brought since the last beat
        self._stopping = False
        self._holding: asyncio.Timeout | None = None  # the fill, while its view is out

    def begin(self, flusher: Flusher) -> None:
        """Begin to bring the state of this flusher. If this raises, nothing has begun."""
        self._flusher = flusher
        self._arm()
        self._commits = 0  # since the last step was begun
        self._told = flusher.state.taken  # the revision up to which `committed` was told
        self._wake.set()
        try:
            self._task = asyncio.create_task(self._run(), name=f"lab_state {self._name} mirror")
        except BaseException:
            self._timer.cancel()
            raise
        self._task.add_done_callback(self._ended)

    def abort(self) -> None:
        """End at once, and bring nothing more."""
        self._stopping = True
        self._timer.cancel()
        self._task.cancel()

    def committed(self, taken: ChangeSet) -> None:
        """These changes are durable; they are looked at later."""
        if taken.end > taken.start:
            try:
                if taken.start > self._told:  # what is between was not told, whatever failed there
                    self._pending.overflow()
                self._pending.add(taken)
            except BaseException:
                self._pending.overflow()  # a step without them would be wrong: everything is brought anew
                raise
            finally:
                self._told = taken.end
                self._commits += 1
                self._wake.set()
                if self._holding is not None and self._flusher.checkpoints.is_waiting:
                    self._holding.reschedule(0.0)  # at once
                    self._holding = None

    async def stop(self) -> None:
        """Bring what is left, for a second at most; what was not brought is by the next start."""
        self._stopping = True
        self._timer.cancel()
        task = self._task
        if task.get_loop() is not asyncio.get_running_loop():
            return  # its loop was closed over it
        self._wake.set()
        await self._wait(task, STOP_SECONDS)
        task.cancel()
        await asyncio.wait({task})

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Bring nothing. Runs in a forked child, where the connection is the parent's."""
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
            while self._pending.merge(_MERGED_AT_ONCE):  # noqa: ASYNC110 -- it is not waited for, it is done
                await asyncio.sleep(0)
        except Exception:  # noqa: BLE001 -- memory ran out halfway: everything is brought anew
            self._pending.overflow()

    async def _attempt(self) -> bool:
        """Do the next thing; returns whether there is more to do."""
        try:
            await self._act()
        except StorageError as error:
            await self._failed(error)
            return False
        except (Exception, asyncio.CancelledError) as error:  # a cache that breaks its promise must not end the mirror
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            problem = UnavailableError(f"the cache failed with {type(error).__name__}, which none should raise")
            problem.__cause__ = error
            await self._failed(problem)
            return False
        if self.revision is not None and not self.up:
            self._back()
        return self.revision is None or bool(self._pending) or self._pending.overflowed

    async def _act(self) -> None:
        if self._session is None:
            self._session = await self._cache.open(self._name, self._writer)
            await self._recognise(self._session)
        elif self._idle:
            await self._recognise(self._session)
        self._idle = False
        await self._merge()
        if self._pending.overflowed:
            self.revision = None
        self._follow_clocks()
        if self.revision is None:
            await self._fill(self._session)
        elif self._pending.end > self.revision:
            await self._step(self._session, self.revision)
        else:
            self._pending.clear()

    def _follow_clocks(self) -> None:
        """Ask for a fill if the wall clock has moved against the state's time: times in the copy are wrong then."""
        ahead = _ahead(self._flusher.state)
        if abs(ahead - self._ahead) >= _AHEAD_MILLISECONDS:
            if self._has_times:
                self.revision = None
            else:
                self._ahead = ahead

    async def _recognise(self, session: CacheSession) -> None:
        """Whether the copy is where it was left, or where a step that got no answer took it."""
        seen = self._seen = await session.look()
        if seen == SPOILT:
            self._spoil()
        elif seen.writer != self._writer:
            self._spoilt = False  # it is gone, or another writer's
        ours = not self._spoilt and seen.writer == self._writer and seen.revision in {self.revision, self._tried}
        self.revision = seen.revision if ours else None
        self._tried = None

    async def _step(self, session: CacheSession, start: int) -> None:
        taken = self._pending.take(start)
        commits, self._commits = self._commits, 0
        self._tried, self._seen = taken.end, None
        try:
            done = await session.apply(Step(start, taken.end, taken.cleared), self._changed(taken))
        except BaseException:
            self._pending.put_back(taken)
            raise
        if done:
            self.revision = taken.end
            self._counts.steps += 1
            # Of real time: it is for the loop, and a clock that stands would hold the next step up.
            await asyncio.sleep(_LONG_REST_SECONDS if commits > _MANY else _REST_SECONDS)
        else:
            self._pending.put_back(taken)
            self._tried = None  # it was not made, so it is no revision that the copy may have
            await self._recognise(session)
            if self.revision == start:  # it was touched, and is where it was left all the same
                self._spoil()
                self.revision = None
        self._tried = None

    async def _fill(self, session: CacheSession) -> None:
        if self._spoilt and not self._spoils.are_over:
            raise UnavailableError(
                "another client writes to the copy again and again, so it is filled anew after growing pauses; "
                "give other clients other keys, or no right to write to these"
            )
        seen, self._seen = self._seen or await session.look(), None
        if seen.writer not in {None, self._writer} and not self._is_owner:
            await self._flusher.confirm_ownership()
        self._is_owner = False
        await self._flusher.wait_flushed(0)  # behind an unclean end, the first commit has a view, and comes at once
        self._flusher.checkpoint_if_due()
        await self._flusher.checkpoints.ended()  # two views at a time would be a copy
        while self._flusher.state.frozen:  # noqa: ASYNC110 -- a commit that writes everything anew has one too, and tells nobody
            await asyncio.sleep(_REST_SECONDS)
        self._pending.clear()
        await self._replace(session, seen)
        self._counts.fills += 1
        if self._spoilt:
            self._spoilt = False
            self._spoils.start()

    async def _replace(self, session: CacheSession, seen: Seen) -> None:
        """Replace the copy that was seen by the present state. A checkpoint that is due cuts this off."""
        state = self._flusher.state
        views, revision, ahead = SnapshotViews(state), state.revision, _ahead(state)
        self._tried = revision
        parts = self._whole(views, views.freeze(), revision, ahead)  # whenever the first part is asked for
        self._holding = bound = asyncio.timeout(None)
        try:
            async with bound:
                done = await session.fill(revision, parts, seen)
        except TimeoutError:
            if not bound.expired():
                raise
            raise UnavailableError(
                "a fill was cut off for a checkpoint that was due, and begins anew behind it: the cache takes the state "
                "more slowly than it is changed"
            ) from None
        finally:
            self._holding = None
            await parts.aclose()
            await views.fold()
            self._flusher.checkpoint_if_due()
        self._tried = None
        if not done:
            raise UnavailableError("the copy was changed by somebody else while it was filled")
        self.revision, self._ahead = revision, ahead

    def _spoil(self) -> None:
        """Ask for a fill, because another client has written to the copy."""
        if self._clock.monotonic() >= self._spoils.until + _CALM_SECONDS:
            self._spoils.reset()
        if not self._spoilt and not self._spoils.failures:
            self._logger.warning("%s: another client has written to the copy; it is filled anew", self._name)
        self._spoilt = True

    async def _changed(self, taken: ChangeSet) -> AsyncGenerator[Slice]:
        """Split the changes of a step into parts."""
        for part in slices(taken.changes.items(), self._ahead):
            if part is not None:
                self._has_times = self._has_times or bool(part.expires)
                yield part
            await asyncio.sleep(0)

    async def _whole(
        self, views: SnapshotViews, view: dict[str, Stored], revision: int, ahead: int
    ) -> AsyncGenerator[Slice]:
        """A view of the state, in parts; the last one comes when all of it is durable."""
        total, brought, told = len(view), 0, self._clock.monotonic()
        for part in slices(view.items(), ahead):
            if part is None:
                await asyncio.sleep(0)
                continue
            self._has_times = self._has_times or bool(part.expires)
            yield part
            await asyncio.sleep(0)
            brought += len(part.values)
            if total >= _LARGE and self._clock.monotonic() - told >= _TOLD_SECONDS:
                told = self._clock.monotonic()
                self._logger.info("%s: filling the mirror, %d of %d keys", self._name, brought, total)
        del view
        await views.fold()
        self._holding = None
        durable = asyncio.ensure_future(self._flusher.wait_flushed(revision))
        try:
            while not durable.done():
                if not await self._wait(durable, _KEPT_SECONDS):
                    yield Slice({}, {}, [])
            await durable
        finally:
            durable.cancel()
        if total >= _LARGE:
            self._logger.info("%s: filled the mirror with %d keys", self._name, total)

    # Failures

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log the end of the task, unless the manager has ended, or is fenced."""
        if not task.cancelled() and (problem := task.exception()) is not None:
            what = f"failed: {problem!r}"
        else:
            what = "was cancelled"
        if not (self._stopping or self._flusher.fenced):
            self.task_failure = f"the mirror's task of {self._name!r} {what}: the cache is not kept up to date"
            self._logger.error("%s", self.task_failure)

    async def _failed(self, error: StorageError) -> None:
        self._counts.failures += 1
        if self.last_error is None and not self._stopping and not isinstance(error, FencedError):
            self._logger.warning(
                "%s: the mirror is behind, and others read what is old or nothing; nothing is lost, it is tried "
                "again: %s",
                self._name,
                error,
            )
        self.up, self.last_error = False, error
        await self._close()
        self._clock.call_later(self._pauses.start(), self._wake.set)

    def _back(self) -> None:
        self._pauses.reset()
        if self.last_error is not None:
            self._logger.info("%s: the mirror is back, at revision %s", self._name, self.revision)
        self.up, self.last_error = True, None

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):  # as little as anything else may end the mirror
                await session.aclose()

    # Beats

    def _arm(self) -> None:
        self._timer: Timer = self._clock.call_later(BEAT_SECONDS, self._beat)

    def _beat(self) -> None:
        self._arm()
        self._idle = True
        self._wake.set()

    async def _wait(self, future: asyncio.Future[Any], seconds: float) -> bool:
        """Wait for a future for at most so many seconds of the clock, and return whether it is done."""
        over = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(seconds, resolver(over))
        try:
            await asyncio.wait({future, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            over.cancel()
        return future.done()


def _ahead(state: State) -> int:
    """Return how far the wall clock is ahead of the state's own time, in milliseconds."""
    return state.wall() - state.now()
