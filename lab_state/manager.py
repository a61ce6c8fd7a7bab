"""`Manager`: its start and stop, its status, and the objects that it consists of."""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from lab_state import _forks as forks
from lab_state._alone import run_alone, told_of_commits
from lab_state._argument_types import check_cache, check_clock, check_storage
from lab_state._backup import BackedUp, Backups
from lab_state._clock import Clock, GuardedClock, SystemClock
from lab_state._core import Core
from lab_state._flusher import Flusher
from lab_state._foreign import check_on_fenced, described
from lab_state._forgotten import caller, note, started_here
from lab_state._log import Log, Logs, check_logger
from lab_state._metrics import FlushTimes, Metrics, MirrorCounts, metrics
from lab_state._migrations import WITHOUT, Committed, Schema, SchemaStart, checked_schema
from lab_state._opening import check_asyncio, loaded, opened
from lab_state._past import with_remedy
from lab_state._state import State
from lab_state._status import MirrorStatus, Phase, Role, Status, status_of
from lab_state._sweeper import Sweeper
from lab_state._watch import Watchers
from lab_state.cache._mirror import MirrorWriter
from lab_state.cache._protocol import Cache
from lab_state.config import Config
from lab_state.exceptions import CorruptionError, FencedError, LockedError, UnsupportedError
from lab_state.handles import Scope
from lab_state.shared._member import Member
from lab_state.shared._owner import Surroundings
from lab_state.storage._backup_file import own_files
from lab_state.storage._directory import Paths
from lab_state.storage._protocol import Storage, StorageSession
from lab_state.storage.file import FileStorage, paths_of


class Manager(Scope, BackedUp):
    """A map from string keys to JSON values, in memory and durable.

    One manager is the only writer of its state, unless several processes share the state; see `Config.shared`. From `start()` to
    `stop()`, the manager belongs to the event loop that `start()` runs on. If a running manager is garbage-collected, a
    `ResourceWarning` is issued. The lock and the files of the state are released when the event loop has been closed. `copy.copy`
    and `copy.deepcopy` return the manager itself. A manager cannot be pickled.

    The texts of the calls do not repeat these errors. A read or a write raises `ClosedError` before `start()` and after `stop()`,
    and `InvalidKeyError` for a key that is not allowed. A write raises `RuntimeError` on another event loop. A write raises
    `UnavailableError` if the flush task has ended, or if the owner of a shared state does not answer.
    """

    _kind = "a manager"
    _remedy = "make one in the other process, with another name or with Config(shared=True)"

    __slots__ = (
        "_backups",
        "_cache",
        "_clock",
        "_config",
        "_ended",
        "_logger",
        "_mirrored",
        "_on_fenced",
        "_own_mirror",
        "_phase",
        "_running",
        "_schema",
        "_started_at",
        "_stop_began",
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
        schema: Schema | None = None,
    ) -> None:
        """Check and keep the settings. No file is touched before `start()`.

        Args:
            config: The settings, or just the name of the state.
            storage: The storage that keeps the state. Any number of managers may use one storage object, each with a different
                name. Managers with `Config(shared=True)` may have the same name.
            cache: The cache in which the manager keeps a mirror for other processes, such as `RedisCache(url)`. Only `stop()`
                waits for the cache, for at most one second. No call fails because of the cache. `status().mirror` shows its
                errors. In a shared state, only the owner writes the mirror.
            logger: The logger for the messages on the page "Logging"; by default `logging.getLogger("lab_state")`. It may be an
                adapter, a logger of loguru or structlog, or any object with the methods `info`, `warning` and `error`. No
                value and no credential is logged. If the logger raises an error, its messages of level WARNING and ERROR go to stderr.
            clock: A clock for tests; by default the clock of the machine. If the clock raises an error in this call or during
                `start()`, that call raises it. The first error after that is logged. As long as the clock raises errors, the
                manager uses the last time that the clock returned.
            on_fenced: A plain function that takes the `FencedError`. It is called on the event loop when the manager learns that
                a newer writer owns the state. This may happen during `stop()`, too. The function is called at most once for each
                `start()`. Use it to end the process: `os.kill(os.getpid(), signal.SIGTERM)`. An error of the function is
                logged. If the function raises `SystemExit` or `KeyboardInterrupt`, the event loop ends. With or without
                this function, one line at level ERROR says that the manager is fenced.
            schema: The version and the types of the values, and the migrations of older states. A manager without a schema
                has version 1, and no types.

        Raises:
            InvalidNameError: The name of the state is not allowed; see `Config.name`.
            TypeError: An argument has the wrong type.
            ValueError: A migration is missing in the schema.
        """
        self._config = Config(name=config) if isinstance(config, str) else config
        if not isinstance(self._config, Config):
            raise TypeError(f"config must be a Config or a str, the name of the state; not {type(config).__name__}")
        check_storage(storage)
        if cache is not None:
            check_cache(cache)
        check_clock(clock)
        if on_fenced is not None:
            check_on_fenced(on_fenced)
        self._schema = WITHOUT if schema is None else checked_schema(schema)
        self._storage = storage
        self._on_fenced = on_fenced
        self._cache = cache
        self._own_mirror: MirrorWriter | None = None
        self._mirrored = None if cache is None else MirrorCounts()
        if logger is not None:
            check_logger(logger)
        self._logger = Log(logging.getLogger("lab_state") if logger is None else logger)
        self._clock: SystemClock | GuardedClock = (
            SystemClock() if clock is None else GuardedClock(clock, self._clock_failed)
        )
        self._phase: Phase = "new"
        self._started_at = ""
        self._stop_began = 0.0
        self._running: Flusher | Member | None = None
        self._ended = Status(
            phase="new", keys=0, revision=0, durable_revision=0, mirror=None if cache is None else MirrorStatus()
        )
        self._times = FlushTimes()
        self._sweeper: Sweeper | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._backups: Backups = Backups()
        core = Core(self._config.name, State(self._clock.monotonic))
        core.value_check = None if self._schema.checks is None else self._schema.checks.check
        super().__init__(core, "")

    def __repr__(self) -> str:
        """Return the name, the phase and the storage."""
        return f"<Manager {self._config.name!r} {self._phase} on {self._storage!r}>"

    @property
    def name(self) -> str:
        """The name of the state."""
        return self._config.name

    @property
    def config(self) -> Config:
        """The settings."""
        return self._config

    @property
    def role(self) -> Role | None:
        """The role of this manager in the state: `"owner"` or `"follower"`. `None` while the manager does not run.

        The manager of a state that is not shared is its owner.
        """
        flusher = self._running
        if not self._core.is_open:
            return None
        return flusher.role if isinstance(flusher, Member) else "owner"

    # Lifecycle

    async def start(self) -> None:
        """Become the only writer of the state, or one of the processes that share it. Load the state.

        Decoding blocks the event loop, for about 0.8 s with a million keys. A start that fails or is cancelled releases
        everything, and may be tried again. A manager can be started again after `stop()`, even on another event loop.

        If another writer holds a state that is not shared, the call tries again for `Config.lock_timeout` seconds. While it
        waits, a message at level WARNING names that writer, at once and then about every 10 s.

        If the schema of the manager is newer than the state, all migrations run on one draft. Then each value is checked against
        the types of the schema, and one commit makes the change durable. If a migration or a check fails, the stored state stays
        as it was. Each migration blocks the event loop until its function returns. The log shows the progress. A start after the
        commit does not repeat the migration.

        In a shared state, the call waits until this process is the owner, or follows the owner. While the owner loads the
        state, the call waits without a limit.

        Raises:
            RuntimeError: The manager is running already, another start or stop is under way, or the event loop is not asyncio's.
            LockedError: Another writer still holds the state after `Config.lock_timeout` seconds. The message names that writer.
                If it is a manager of this process, the message also says where its `start()` was called. Stop that manager
                first. In a shared state: the holder of the lock does not share the state. Or for `Config.owner_timeout` seconds,
                the holder accepted no connection, or closed each connection without an answer.
            CorruptionError: The stored state is damaged. Nothing was changed. If the storage has a history, the message names
                the newest good generation, and the call of `restore_state` that restores it.
            UnavailableError: The state could not be read this time, or the owner of a shared state gave no sign of life for
                `Config.owner_timeout` seconds. Call `start()` again.
            UnsupportedError: The state cannot be opened as it is. For example, a permission is missing, or a newer version of
                lab_state wrote it. Or the state is shared, and the storage is not a `FileStorage`. Or the state is shared, and the
                owner has another version of lab_state.
            SchemaError: The schema of the manager does not fit the state. Nothing was changed.
            MigrationError: A migration failed, or a value is not of its type after the migrations. Nothing was changed.
        """
        self._core.check_process()
        check_asyncio()
        if self._phase not in ("new", "stopped"):
            raise RuntimeError(
                f"start() of {self._config.name!r} was called while it is {self._phase}: await stop() first"
            )
        self._started_at = caller()
        before, self._phase = self._phase, "starting"
        forks.disown_in_children(self)
        self._set_strict(strict=True)
        try:
            await (self._start_shared() if self._config.shared else self._start_alone())
        except LockedError as error:
            self._phase = before
            first = started_here(self._config.name, self._storage, error.place)
            raise LockedError(f"{error}{first}") from error.__cause__
        except CorruptionError as error:
            self._phase = before
            raise await with_remedy(error, self._config.name, self._storage) from error.__cause__
        except BaseException:
            self._phase = before
            raise
        finally:
            self._set_strict(strict=False)
        self._stopping = None
        self._phase = "running"

    async def _start_alone(self) -> None:
        """Start as the only process of the state."""
        began = self._clock.monotonic()
        session = await opened(self._storage, self._config, self._clock, self._logger)
        try:
            state = loaded(session, self._config.name, self._clock, self._logger, began)
            committed = await self._schema_start().use(state, session, is_alone=True)
            self._run(state, session, committed)
        except BaseException:
            await session.aclose()
            raise

    def _schema_start(self) -> SchemaStart:
        may_migrate = self._config.migrate == "auto"
        return SchemaStart(self._config.name, self._schema, may_migrate, self._clock, self._logger)

    async def _start_shared(self) -> None:
        """Start as one of the processes of a shared state."""
        storage = self._storage
        if not isinstance(storage, FileStorage):
            raise UnsupportedError(
                f"a shared state needs a FileStorage, and {storage!r} is none: processes on one machine share the files of a "
                "directory. Processes on several machines can read a mirror; see RedisCache"
            )
        around = Surroundings(
            storage,
            self._clock,
            self._logger,
            self._times,
            self._on_fenced,
            self._mirror_maker(),
            self._started_at,
            self._schema_start(),
        )
        member = Member(self._core, self._config, around)
        await member.start()
        self._running = member

    def _mirror_maker(self) -> Callable[[], MirrorWriter] | None:
        """Return a function that returns a writer of the mirror; `None` if the manager has no cache."""
        if self._cache is None or self._mirrored is None:
            return None
        return partial(MirrorWriter, self._config.name, self._cache, self._clock, self._logger, self._mirrored)

    def _run(self, state: State, session: StorageSession, migration: Committed | None) -> None:
        """Start the tasks and timers of a loaded state, and accept calls. If this raises an error, none of them runs."""
        watchers = Watchers(state)
        make_mirror = self._mirror_maker()
        mirror = None if make_mirror is None else make_mirror()
        committed = told_of_commits(watchers, mirror)
        flusher = Flusher(
            state, session, self._config, self._clock, self._logger, committed, self._times, self._on_fenced
        )
        if migration is not None:
            flusher.checkpoints.note_commit(is_due=migration.is_due)
        self._own_mirror = mirror
        sweeper = run_alone(self._core, flusher, watchers, mirror, self._clock)
        flusher.forgotten = note(flusher, session, self._config.name, self._storage, self._started_at)
        self._running, self._sweeper = flusher, sweeper
        self._core.open(state, flusher, watchers, sweeper.resume)

    async def stop(self) -> None:
        """Flush, write a checkpoint, and release the state.

        The call continues while bytes are written or sent. If there is no progress for `Config.stop_timeout` seconds, it gives up, at
        most an eighth of that time later. A flush that fails with `UnavailableError` is tried again, for `Config.stop_timeout`
        seconds at most. A storage call that hangs continues after `stop()` has given up, and the state stays locked until the
        storage call ends. At the end, `stop()` sends the last changes to the cache, for at most one second. A second
        call waits for the end of the first call. A call before `start()` does nothing. If the caller is cancelled, the stop
        continues.

        In a shared state, a follower waits for the answers to its calls, for at most `Config.stop_timeout` seconds, and writes
        nothing. If there is no owner, the follower becomes the owner first. So the last process that stops writes the checkpoint.

        Raises:
            StorageError: The last flush failed, or the storage hangs before all changes are durable. The manager is stopped. The
                changes above `durable_revision` may be lost. If the storage hangs, and the flush before that failed, the message
                also has the error of that flush. In a shared state: calls got no answer, or this process had lost its state.
            FencedError: A newer writer owns the state. The message says whether changes are lost.
            RuntimeError: `start()` is still under way: cancel `start()` instead. Or this is not the event loop of `start()`, and
                that loop is not closed.
        """
        self._core.check_process()
        if self._phase == "starting":
            raise RuntimeError(
                f"stop() of {self._config.name!r} was called while it is starting: cancel start() instead"
            )
        flusher = self._running
        if self._phase == "running" and flusher is not None:
            flusher.move()
            self._phase = "stopping"
            # From here on, new calls find an empty state, and raise `ClosedError`. Calls that already run use the loaded state.
            if self._sweeper is not None:
                self._sweeper.stop()
            self._watchers = self._core.close(State(self._clock.monotonic))
            self._start_stopping(flusher)
        elif self._stopping is not None and self._stopping.get_loop().is_closed() and self._running is not None:
            self._running.move()  # the loop was closed during the stop: continue on the present loop
            self._start_stopping(self._running)
        if self._stopping is not None and self._phase == "stopping":
            await asyncio.shield(self._stopping)

    def _start_stopping(self, flusher: Flusher | Member) -> None:
        self._stop_began = self._clock.monotonic()
        name = f"lab_state {self._config.name} stop"
        self._stopping = asyncio.create_task(self._stop(flusher), name=name)

    async def _stop(self, flusher: Flusher | Member) -> None:
        try:
            await self._stop_tasks(flusher)
        except GeneratorExit:  # the loop was closed during the stop: the next `stop()` continues
            raise
        except BaseException:
            self._stopped(flusher)
            raise
        self._stopped(flusher)

    async def _stop_tasks(self, flusher: Flusher | Member) -> None:
        try:
            await self._backups.end()
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

    def _stopped(self, flusher: Flusher | Member) -> None:
        flusher.remember()
        try:
            self._watchers.close()
        finally:
            self._phase = "stopped"
            try:
                self._ended = msgspec.structs.replace(self._status_of("stopped", flusher), keys=0)
            finally:
                self._own_mirror = None
                self._running = None
                flusher.discard_entries()
        self._logger.info(
            "%s: stopped at revision %d, durable up to revision %d, in %.3f s",
            self._config.name,
            flusher.state.revision,
            flusher.durable_revision,
            self._clock.monotonic() - self._stop_began,
        )

    def __del__(self) -> None:
        flusher = getattr(self, "_running", None)
        if flusher is not None and self._phase == "running" and not flusher.is_aborted and not sys.is_finalizing():
            warnings.warn(
                f"{self!r} was collected while it runs: `await stop()` was not called; it was started at {self._started_at}",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call, if the manager is running. This runs in a forked child. The parent's manager is not affected."""
        if self._phase in {"new", "stopped"}:
            return
        flusher, mirror = self._running, self._mirror
        self._phase, self._running, self._own_mirror = "stopped", None, None
        if flusher is not None:
            flusher.disown()
            self._ended = Status(
                phase="stopped",
                keys=0,
                revision=flusher.state.revision,
                durable_revision=flusher.durable_revision,
                mirror=self._ended.mirror,
            )
        if self._core.is_open:  # otherwise the parent was forked during its start
            if self._sweeper is not None:
                self._sweeper.stop()
            if mirror is not None:
                mirror.disown()
        forks.keep(flusher, mirror, self._stopping)
        self._core.disown()

    async def __aenter__(self) -> Self:
        """Call `start()`."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Call `stop()`. If the block and `stop()` both fail, raise the error of the block, with the error of `stop()` as a note."""
        try:
            await self.stop()
        except Exception as problem:
            if error is None:
                raise
            self._logger.error("%s: stop() failed as well: %s", self._config.name, problem)  # noqa: TRY400 -- the exception of the block is passed on, with its own traceback
            error.add_note(f"lab_state: stop() of {self._config.name!r} failed as well: {problem}")

    @property
    def _flusher(self) -> Flusher | None:
        """The flusher, if this process owns the state; otherwise `None`."""
        running = self._running  # read once: another thread may run this while `stop()` ends
        return running.flusher if isinstance(running, Member) else running

    def _own_files(self) -> Paths | None:
        """Return the files of the state; `None` if they are not on this machine. The call may block."""
        if (flusher := self._flusher) is not None:
            return own_files(flusher.path)
        return paths_of(self._storage, self._config.name) if isinstance(self._storage, FileStorage) else None

    @property
    def _mirror(self) -> MirrorWriter | None:
        """The writer of the mirror, if this process owns the state and has a cache; otherwise `None`."""
        running = self._running  # read once, because another thread may call this
        return running.mirror if isinstance(running, Member) else self._own_mirror

    def _set_strict(self, *, strict: bool) -> None:
        if isinstance(self._clock, GuardedClock):
            self._clock.strict = strict

    def _clock_failed(self, error: Exception) -> None:
        self._logger.error(
            "%s: the clock failed; its last time is used until it answers again: %s",
            self._config.name,
            described(error),
        )

    # Durability

    @property
    def revision(self) -> int:
        """The number of the last change; 0 for a new state, and before the first `start()`. A restart does not reset it."""
        flusher = self._running  # read once: another thread may run this while `stop()` ends
        return self._ended.revision if flusher is None else flusher.shown.revision

    @property
    def durable_revision(self) -> int:
        """The last durable revision: every change up to it is durable.

        After an unclean end of a state on disk, it is 0 from the start until the first commit, unless the state is shared.
        """
        flusher = self._running
        return self._ended.durable_revision if flusher is None else flusher.durable_revision

    def status(self) -> Status:
        """Return the present status of the manager. The call works in every phase."""
        flusher = self._running
        if flusher is None:
            return msgspec.structs.replace(self._ended, phase=self._phase)
        return self._status_of(self._phase, flusher)

    def _status_of(self, phase: Phase, flusher: Flusher | Member) -> Status:
        if isinstance(flusher, Flusher):
            return status_of(phase, flusher, self._mirror)
        return flusher.status(phase, self._mirror, self._ended)

    def metrics(self) -> Metrics:
        """Return counts for a monitoring system. The call works in every phase, and from any thread."""
        return metrics(self._core.counted(), self._times, self._mirrored)
