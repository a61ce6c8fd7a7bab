"""`Manager`: lifecycle, durability, status."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from lab_state import _forks as forks
from lab_state._clock import Clock, GuardedClock, SystemClock
from lab_state._codec import Snapshot, decode_snapshot, replay
from lab_state._core import Core
from lab_state._expiry import resumed
from lab_state._flusher import Flusher
from lab_state._foreign import check_on_fenced
from lab_state._forgotten import caller, note, started_here
from lab_state._log import Log, Logs, check_logger
from lab_state._metrics import FlushTimes, Metrics, MirrorCounts, metrics
from lab_state._opening import check_asyncio, opened
from lab_state._state import Changes, State
from lab_state._sweeper import Sweeper
from lab_state._watch import Watchers
from lab_state.cache._mirror import Mirror
from lab_state.cache._protocol import Cache
from lab_state.config import Config
from lab_state.exceptions import FencedError, LockedError
from lab_state.handles import Scope
from lab_state.storage._protocol import Storage, StorageSession

_SWEPT_AT_START = 100_000

Phase = Literal["new", "starting", "running", "stopping", "stopped"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What a manager looks like at one moment.

    Attributes:
        phase: Where it is in its life.
        keys: How many keys there are; 0 after `stop()`, when they are no longer in memory.
        revision: The number of the last change.
        durable_revision: Everything up to this revision is durable.
        unflushed_keys: How many keys have changes that are not durable.
        unflushed_age: How old the oldest of these changes is, in seconds: what a
            crash would lose now.
        last_flush_at: When the last flush that wrote something succeeded, in seconds
            since 1970.
        last_flush_seconds: How long it took.
        flushes: How many flushes succeeded since the start.
        flush_failures: How many flushes and checkpoints failed since the start.
        last_error: What the last attempt failed with, `None` when it succeeded.
        snapshot_bytes: The size of the snapshot.
        journal_bytes: The size of the journal behind it.
        storage_warning: What does not fail, but has to be mended in the storage, and what
            to do; `None` for nothing.
        fenced: Whether a newer writer owns the state: nothing more becomes durable, and
            every write raises `FencedError`. End the process.
        task_failure: Which task of the manager has ended before `stop()`, and why;
            `None` while all of them run. Without its flush task a manager refuses every
            write with `UnavailableError`; `stop()` still flushes. Without the mirror's
            task the cache is no longer kept up to date.
        mirror_up: Whether the cache answers and is kept up to date; `None` without one.
        mirror_revision: The revision that it was brought to; `None` while that is not
            known.
        mirror_error: What the last attempt failed with, `None` when it succeeded.
    """

    phase: Phase
    keys: int
    revision: int
    durable_revision: int
    unflushed_keys: int = 0
    unflushed_age: float = 0.0
    last_flush_at: float | None = None
    last_flush_seconds: float | None = None
    flushes: int = 0
    flush_failures: int = 0
    last_error: str | None = None
    snapshot_bytes: int = 0
    journal_bytes: int = 0
    storage_warning: str | None = None
    fenced: bool = False
    task_failure: str | None = None
    mirror_up: bool | None = None
    mirror_revision: int | None = None
    mirror_error: str | None = None


class Manager(Scope):
    """A map from string keys to JSON values: in memory, and durable.

    One manager is the only writer of its state. It belongs to the event loop that
    `start()` runs on, until `stop()`. A running one that is collected gives a
    `ResourceWarning`; its lock and its files go back when its loop is closed. A copy of it, deep or not, is the manager itself;
    it cannot be pickled.
    """

    _kind = "a manager"
    _remedy = "make one of another name in the other process: a state has one writer"

    __slots__ = (
        "_cache",
        "_clock",
        "_config",
        "_ended",
        "_flusher",
        "_logger",
        "_mirror",
        "_mirrored",
        "_on_fenced",
        "_phase",
        "_started_at",
        "_stopping",
        "_storage",
        "_sweeper",
        "_times",
        "_watchers",
    )

    def __init__(
        self,
        config: Config | str,
        storage: Storage,
        cache: Cache | None = None,
        *,
        logger: logging.Logger | logging.LoggerAdapter[Any] | Logs | None = None,
        clock: Clock | None = None,
        on_fenced: Callable[[FencedError], object] | None = None,
    ) -> None:
        """Take the settings. No file is touched before `start()`.

        Args:
            config: The settings, or just the name of the state.
            storage: Where the state is kept. One object may serve any number of
                managers, each with a name of its own.
            cache: Where a copy is kept that other processes read, such as
                `RedisCache(url)`. No call ever waits for it or fails because of it; see
                `status()`.
            logger: Where failures are told; `logging.getLogger("lab_state")` when
                not given. An adapter, or a logger of loguru or structlog, will do: any
                object with the methods `info`, `warning` and `error`. No value is ever
                logged. An error of the logger itself is
                swallowed; the message then goes to stderr.
            clock: For tests; the machine's own when not given. `start()` raises an error
                of the clock. Later, the first error is logged. Until the clock answers
                again, its last time is used.
            on_fenced: A plain function that is called when the manager learns that a
                newer writer owns the state: with the `FencedError`, on the event loop,
                once for each `start()`, during `stop()` too. Use it to end the process:
                `os.kill(os.getpid(), signal.SIGTERM)`. An error of the function is
                logged; `SystemExit` and `KeyboardInterrupt` end the event loop. With and
                without the function, one line is logged at level ERROR.

        Raises:
            InvalidNameError: The name is out of bounds.
            TypeError: An argument is not what it should be.
        """
        self._config = Config(name=config) if isinstance(config, str) else config
        if not isinstance(self._config, Config):
            raise TypeError(f"config must be a Config or a str, the name of the state; not {type(config).__name__}")
        # A path can be opened too, and would make a file of the state's name, or empty one.
        if isinstance(storage, type | os.PathLike) or not callable(getattr(storage, "open", None)):
            raise TypeError(f"storage must be an object such as FileStorage('directory'), not {storage!r}")
        if cache is not None and (isinstance(cache, type) or not callable(getattr(cache, "open", None))):
            raise TypeError(f"cache must be an object such as RedisCache('redis://host'), not {type(cache).__name__}")
        if on_fenced is not None:
            check_on_fenced(on_fenced)
        self._storage = storage
        self._on_fenced = on_fenced
        self._cache = cache
        self._mirror: Mirror | None = None
        self._mirrored = None if cache is None else MirrorCounts()
        if logger is not None:
            check_logger(logger)
        self._logger = Log(logging.getLogger("lab_state") if logger is None else logger)
        self._clock: SystemClock | GuardedClock = (
            SystemClock() if clock is None else GuardedClock(clock, self._clock_failed)
        )
        self._phase: Phase = "new"
        self._started_at = ""
        self._flusher: Flusher | None = None
        self._ended = Status(phase="new", keys=0, revision=0, durable_revision=0)
        self._times = FlushTimes()
        self._stopping: asyncio.Task[None] | None = None
        super().__init__(Core(self._config.name, State(self._clock.monotonic)), "")

    def __repr__(self) -> str:
        """Name, phase and storage."""
        return f"<Manager {self._config.name!r} {self._phase} on {self._storage!r}>"

    @property
    def config(self) -> Config:
        """The settings."""
        return self._config

    # Lifecycle

    async def start(self) -> None:
        """Become the only writer, load the state, and begin to flush in the background.

        Loading decodes on the event loop, about 0.8 s for a million keys. A start that
        fails or is cancelled lets go of everything; it may be tried again. Starting
        again after `stop()` works, on another event loop too.

        If another writer holds the state, this tries again for `Config.lock_timeout`
        seconds. At the first refusal, and every 10 s after it, a WARNING names the
        holder.

        Raises:
            RuntimeError: It is running already, or another start or stop is under way. Or
                this is no event loop of asyncio, but trio's.
            LockedError: Another writer still holds the state after
                `Config.lock_timeout` seconds; the message says who, and for a manager of
                this process where it was started. Stop it first.
            CorruptionError: What is stored is damaged; it was left untouched.
            UnavailableError: It could not be read this time.
            UnsupportedError: It cannot be read as it is: permissions, a newer format.
        """
        self._core.check_process()
        check_asyncio()
        if self._phase not in ("new", "stopped"):
            raise RuntimeError(f"start() of {self._config.name!r} while it is {self._phase}: await stop() first")
        self._started_at = caller()
        before, self._phase = self._phase, "starting"
        forks.disown_in_children(self)
        self._set_strict(strict=True)
        try:
            session = await opened(self._storage, self._config, self._clock, self._logger)
            try:
                state = self._load(session)
                self._run(state, session)
            except BaseException:
                await session.aclose()
                raise
        except LockedError as error:
            self._phase = before
            first = started_here(self._config.name, repr(self._storage))
            raise LockedError(f"{error}{first}") from error.__cause__
        except BaseException:
            self._phase = before
            raise
        finally:
            self._set_strict(strict=False)
        self._stopping = None
        self._phase = "running"

    def _run(self, state: State, session: StorageSession) -> None:
        """Begin. If this raises, nothing has begun."""
        watchers = Watchers(state)
        committed = watchers.committed
        mirror: Mirror | None = None
        if self._cache is not None and self._mirrored is not None:
            mirror = follower = Mirror(self._config.name, self._cache, self._clock, self._logger, self._mirrored)

            def committed(taken: Changes) -> bool:
                try:
                    watchers.committed(taken)
                finally:
                    follower.committed(taken)
                return True

        flusher = Flusher(
            state, session, self._config, self._clock, self._logger, committed, self._times, self._on_fenced
        )
        # What expired while nothing ran may be much, and loading is where it may take its time.
        while state.sweep(_SWEPT_AT_START):
            flusher.nudge()
        with ExitStack() as undo:
            if mirror is not None:
                mirror.begin(flusher)
                undo.callback(mirror.abort)
            core = self._core  # not the manager: it is to be collected when it is forgotten
            sweeper = Sweeper(state, self._clock, lambda: core.blocked, flusher.nudge, core.set_after)
            undo.callback(sweeper.stop)
            watchers.attended = sweeper.attend
            flusher.begin()
            undo.pop_all()
        flusher.forgotten = note(flusher, session, self._config.name, repr(self._storage), self._started_at)
        self._flusher, self._mirror, self._sweeper = flusher, mirror, sweeper
        self._core.open(state, flusher, watchers, sweeper.resume)

    def _load(self, session: StorageSession) -> State:
        snapshot, records, _, dropped, crc = session.recovery
        if dropped:
            self._logger.warning(
                "%s: the last %d bytes of its journal are no whole record, as after a crash during a write; dropped",
                session.path,
                dropped,
            )
        loaded = Snapshot({}, 0) if snapshot is None else decode_snapshot(snapshot, session.path, crc)
        loaded = replay(loaded, records, session.path)
        state = State(self._clock.monotonic, self._time(loaded, session.path), self._clock.time)
        state.load(loaded.entries, loaded.revision, loaded.expires)
        return state

    def _time(self, loaded: Snapshot, path: str) -> float:
        """What time it is for what expires, in seconds since 1970."""
        wall = self._clock.time()
        if not loaded.expires:
            return wall
        # By the wall clock; by the state's own, where that one was wrong when this was written.
        time, behind = resumed(loaded.time, loaded.wall, wall)
        if behind:
            self._logger.warning(
                "%s: the wall clock is %.0f s behind what was written; keys live that much longer", path, behind
            )
        return time

    async def stop(self) -> None:
        """Flush, write a checkpoint, and let go of the state.

        The call goes on while bytes are written or sent. It ends after
        `Config.stop_timeout` seconds without progress, or up to an eighth later. A flush
        that fails is tried again for the same time. A storage call that hangs is left to
        itself, and the state stays locked until that call ends. Bringing the last changes
        to the cache takes one second more at most. A second call waits for the first; a
        call before `start()` does nothing. Cancelling the caller does not cancel the stop.

        Raises:
            StorageError: What kept the last flush from succeeding, or that the storage
                hangs, with what the flush before failed with. Everything was let go all
                the same; the changes since `durable_revision` are lost.
            RuntimeError: `start()` is still under way; cancel that instead. Or this is
                another event loop than that of `start()`, which is not closed.
        """
        self._core.check_process()
        if self._phase == "starting":
            raise RuntimeError(f"stop() of {self._config.name!r} while it is starting: cancel start() instead")
        if self._phase == "running":
            self._core.running.move()
            self._phase = "stopping"
            # Calls see an empty, closed state from here on; what is under way keeps the old one.
            self._sweeper.stop()
            flusher, self._watchers = self._core.close(State(self._clock.monotonic))
            self._begin_stop(flusher)
        elif self._stopping is not None and self._stopping.get_loop().is_closed() and self._flusher is not None:
            self._flusher.move()  # the loop was closed under the stop: go on with it here
            self._begin_stop(self._flusher)
        if self._stopping is not None and self._phase == "stopping":
            await asyncio.shield(self._stopping)

    def _begin_stop(self, flusher: Flusher) -> None:
        name = f"lab_state {self._config.name} stop"
        self._stopping = asyncio.create_task(self._stop(flusher), name=name)

    async def _stop(self, flusher: Flusher) -> None:
        try:
            await self._stop_tasks(flusher)
        except GeneratorExit:  # its loop was closed under it: the next `stop()` goes on
            raise
        except BaseException:
            self._stopped(flusher)
            raise
        self._stopped(flusher)

    async def _stop_tasks(self, flusher: Flusher) -> None:
        try:
            await flusher.stop(self._config.stop_timeout)
        except GeneratorExit:
            raise
        except BaseException:
            await self._stop_mirror()
            raise
        await self._stop_mirror()

    async def _stop_mirror(self) -> None:
        if self._mirror is not None:
            await self._mirror.stop()

    def _stopped(self, flusher: Flusher) -> None:
        flusher.remember()
        try:
            self._watchers.close()
        finally:
            self._phase = "stopped"
            try:
                self._ended = msgspec.structs.replace(self._status_of(flusher), keys=0)
            finally:
                self._mirror = None
                self._flusher = None
                flusher.discard_entries()

    def __del__(self) -> None:
        flusher = getattr(self, "_flusher", None)
        if flusher is not None and self._phase == "running" and not flusher.is_aborted and not sys.is_finalizing():
            warnings.warn(
                f"{self!r} was collected while it runs: await stop() was forgotten; started at {self._started_at}",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call, if the manager is running. Runs in a forked child; the parent's manager goes on."""
        if self._phase in {"new", "stopped"}:
            return
        flusher, mirror = self._flusher, self._mirror
        self._phase, self._flusher, self._mirror = "stopped", None, None
        if flusher is not None:
            flusher.disown()
            self._ended = Status(
                phase="stopped", keys=0, revision=flusher.state.revision, durable_revision=flusher.durable_revision
            )
        if self._core.is_open:  # else the fork came in the middle of a start
            self._sweeper.stop()
            if mirror is not None:
                mirror.disown()
        forks.keep(flusher, mirror, self._stopping)
        self._core.disown()

    async def __aenter__(self) -> Self:
        """`start()`."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """`stop()`; an exception of the body goes on, with the stop's error as a note."""
        try:
            await self.stop()
        except Exception as problem:
            if error is None:
                raise
            self._logger.error("%s: stop() failed as well: %s", self._config.name, problem)  # noqa: TRY400 -- the body's error goes on, with its own traceback
            error.add_note(f"lab_state: stop() of {self._config.name!r} failed as well: {problem}")

    def _set_strict(self, *, strict: bool) -> None:
        if isinstance(self._clock, GuardedClock):
            self._clock.strict = strict

    def _clock_failed(self, error: Exception) -> None:
        self._logger.error("%s: the clock failed, and its last time stands: %r", self._config.name, error)

    # Durability

    @property
    def revision(self) -> int:
        """The number of the last change; 0 for a new state. Goes on over restarts."""
        flusher = self._flusher  # once: another thread may read this while `stop()` ends
        return self._ended.revision if flusher is None else flusher.state.revision

    @property
    def durable_revision(self) -> int:
        """Everything up to this revision is durable."""
        flusher = self._flusher
        return self._ended.durable_revision if flusher is None else flusher.durable_revision

    def status(self) -> Status:
        """What the manager looks like now. Works in every phase."""
        flusher = self._flusher
        if flusher is None:
            return msgspec.structs.replace(self._ended, phase=self._phase)
        return self._status_of(flusher)

    def metrics(self) -> Metrics:
        """Counts for a monitoring system. Works in every phase, and from any thread."""
        return metrics(self._core.counted(), self._times, self._mirrored)

    def _status_of(self, flusher: Flusher) -> Status:
        mirror = self._mirror
        return Status(
            phase=self._phase,
            keys=flusher.state.count(),
            revision=flusher.state.revision,
            durable_revision=flusher.durable_revision,
            unflushed_keys=flusher.unflushed_keys,
            unflushed_age=flusher.unflushed_age,
            last_flush_at=flusher.last_flush_at,
            last_flush_seconds=flusher.last_flush_seconds,
            flushes=flusher.flushes,
            flush_failures=flusher.failures,
            last_error=None if flusher.last_error is None else str(flusher.last_error),
            snapshot_bytes=flusher.snapshot_bytes,
            journal_bytes=flusher.journal_bytes,
            storage_warning=flusher.storage_warning,
            fenced=flusher.fenced,
            task_failure=flusher.task_failure or (None if mirror is None else mirror.task_failure),
            mirror_up=None if mirror is None else mirror.up,
            mirror_revision=None if mirror is None else mirror.revision,
            mirror_error=None if mirror is None or mirror.last_error is None else str(mirror.last_error),
        )
