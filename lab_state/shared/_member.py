"""`Member`: one process of a shared state, from its start to its stop. It becomes the owner, or follows it.

Theory of operation. The copy, the port and the watches stay the same from start to stop. What changes is
the role: a `Follower` for each connection to an owner, or one `Owner`, which stays until the stop. When the
connection ends, the member looks for the next owner, and may become it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from lab_state._batch import STEP
from lab_state._clock import Clock, Timer, done_within, sleep
from lab_state._core import Core
from lab_state._durability import Durability
from lab_state._entries import DELETED, ChangeSet
from lab_state._foreign import described, only_storage_errors
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._state import State
from lab_state._state._contents import ignore, no_clock
from lab_state._status import Phase, Role, Status, status_of
from lab_state._watch import Watchers
from lab_state.cache._mirror import MirrorWriter
from lab_state.config import Config
from lab_state.exceptions import (
    ClosedError,
    FencedError,
    LabStateError,
    LockedError,
    StorageError,
    UnavailableError,
)
from lab_state.shared._follower import Follower
from lab_state.shared._found import Found, Settling, find
from lab_state.shared._messages import PROTOCOL
from lab_state.shared._owner import Owner
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.shared._port import SharedPort
from lab_state.shared._records import ParsedRecord, RecordApplier
from lab_state.storage._claim import Claim
from lab_state.storage._protocol import StorageSession
from lab_state.storage.file import FileStorage, files_of

_SOON = 0.001
"""The pause in seconds between two attempts right after the end of an owner."""

_SOON_FOR = 0.1
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.05
_LOOK_EVERY = 0.25
"""The seconds between two looks for calls that have waited too long."""

_BELIEVED_AFTER = 0.5
"""A lock file that names another kind of owner is believed if it is the same for this time, in seconds."""

_ATTEMPTS = 3
_FREED_AT_ONCE = 1000


class Member(Durability):
    """One process of a shared state. All that its copy shows is durable, so it is the durability of its manager.

    Attributes:
        port: The calls of this process.
        watchers: The watches of this start.
        copy: The copy.
        applier: The way in which records change the copy.
        has_state: Whether the copy has a state.
    """

    def __init__(  # noqa: PLR0917 -- all are needed, and each has a type of its own
        self,
        core: Core,
        config: Config,
        storage: FileStorage,
        clock: Clock,
        logger: Log,
        times: FlushTimes,
        on_fenced: Callable[[FencedError], object] | None,
        make_mirror: Callable[[], MirrorWriter | None],
    ) -> None:
        """Prepare for the running event loop.

        Args:
            core: The core of the manager. It is opened when there is something to show.
            config: The settings of the manager.
            storage: Its storage.
            clock: Its clock.
            logger: Its logger.
            times: The object that gets the duration of each commit.
            on_fenced: A function of the application; see `Manager`.
            make_mirror: A function that returns the writer of the mirror, if there is one.
        """
        copy = State(clock.monotonic, clock.time(), clock.time)
        super().__init__(config.name, copy, clock, unsettled=False, flush_interval=0)
        self.copy: State = copy
        self.applier: RecordApplier = RecordApplier(copy)
        self.has_state: bool = False
        self.watchers: Watchers = Watchers(copy)
        self.port: SharedPort = SharedPort(core, self, clock, config.owner_timeout)
        self._core = core
        self._config = config
        self._storage = storage
        self._files = files_of(storage)
        self._logger = logger
        self._times = times
        self._on_fenced = on_fenced
        self._make_mirror = make_mirror
        self._owner: Owner | None = None
        self._follower: Follower | None = None
        self._owner_pid: int | None = None
        self._life: asyncio.Task[None] | None = None
        self._look: Timer | None = None
        self._lost_at: float | None = clock.monotonic()  # since when there is no owner
        self._failure: LabStateError | None = None
        self._stopping = False
        self._turned = asyncio.Event()  # set when the role has changed
        copy.free, copy.on_staged = self._free, self._fold
        self.watchers.attended = self._attend

    # Start

    async def start(self) -> None:
        """Become the owner, or follow it, and open the core.

        Raises:
            LabStateError: See `Manager.start`.
        """
        try:
            await self._join()
        except BaseException:
            await self._abort()
            raise
        self._life = asyncio.create_task(self._live(), name=f"lab_state {self._name} member")
        self._look = self._clock.call_later(_LOOK_EVERY, self._look_at_calls)

    async def _abort(self) -> None:
        """Release what a start that failed has taken."""
        if self._follower is not None:
            self._follower.close()
        if self._owner is not None:
            await self._owner.abort()
        if self._core.is_open:
            self._core.close(State(self._clock.monotonic))

    def _show(self) -> None:
        """Open the core, if this is the first state that the copy has."""
        self.has_state = True
        if not self._core.is_open and not self._stopping:
            self._core.open(self.copy, self, self.watchers, _nothing, self.port)

    # Election

    async def _join(self) -> None:
        """Become the owner, or follow one. After the start this goes on until it succeeds.

        Raises:
            UnavailableError: There was no owner for `owner_timeout` seconds. Only a start raises it.
            LockedError: The owner does not share the state.
            StorageError: The files or the socket cannot be used.
        """
        began = self._clock.monotonic()
        doubts = _Doubts(self._clock)
        pause = _FIRST_PAUSE
        while True:
            claim, locked = await self._claim()
            if claim is not None:
                await self._become_owner(claim)
                return
            if await self._follow():
                return
            now = self._clock.monotonic()
            if self._follower is not None:  # an owner accepted the connection: it exists, or has just ended
                began, pause, self._follower = now, _FIRST_PAUSE, None
            else:
                holder = await self._files.holder(self._name)
                refusal = None if holder is None else self._files.refusal(self._name, holder)
                doubts.add(None if refusal is None else holder)
                if refusal is not None and doubts.are_over and not self.has_state:
                    raise refusal
            if not self.has_state and now - began >= self._config.owner_timeout:
                raise self._no_owner(locked)
            if self.has_state and now - began < _SOON_FOR:
                await sleep(self._clock, _SOON)
            else:
                await sleep(self._clock, pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _no_owner(self, locked: LockedError | None) -> StorageError:
        seconds = self._config.owner_timeout
        if locked is None:
            return UnavailableError(f"the state {self._name!r} had no owner for {seconds:g} s: start again")
        error = LockedError(f"{locked}; it did not answer at the socket of the state for {seconds:g} s")
        error.place = locked.place
        return error

    async def _claim(self) -> tuple[Claim | None, LockedError | None]:
        try:
            return await self._files.claim(self._name, PROTOCOL), None
        except LockedError as error:
            return None, error

    async def _follow(self) -> bool:
        """Connect to the owner, and return whether this process follows it now."""
        connected = await self._files.connect(self._name)
        if connected is None:
            return False
        self._follower = follower = Follower(self._name, self._storage, self, self.port, self._clock, self._logger)
        try:
            follower.open(connected)
            return await self._ready(follower)
        except BaseException:
            follower.close()
            raise

    async def _ready(self, follower: Follower) -> bool:
        """Wait until the copy is shown and calls can be sent. Return False if the connection ended before that."""
        while not follower.ready.done():
            await done_within(follower.ready, self._clock, _LOOK_EVERY)
            if not self.has_state and follower.link.silent_for() >= self._config.owner_timeout:
                raise UnavailableError(
                    f"the owner of {self._name!r} (pid {follower.owner_pid or 'unknown'}) gave no sign of life for "
                    f"{self._config.owner_timeout:g} s: it may hang; start again, or end that process"
                )
        if not follower.ready.result():
            return False
        self._lost_at, self._owner_pid = None, follower.owner_pid
        self._show()
        self._turned.set()
        return True

    # The owner

    async def _become_owner(self, claim: Claim) -> None:
        """Load the state, or what the copy lacks of it. Settle and show it, and admit other processes."""
        owner = Owner(self._config, claim, self._clock, self._logger)
        self._owner = owner
        owner.listen()
        session = await claim.load()
        try:
            found = find(
                session.recovery, session.path, self.copy if self.has_state else None, self._clock, self._logger
            )
            if session.recovery.unsettled:
                await self._settle(session, found)
            self._take(found)
            flusher = owner.own(
                self.copy,
                session,
                self._committed,
                self._times,
                self._on_fenced,
                self._core.update_followup,
                self._make_mirror(),
            )
        except BaseException:
            await session.aclose()
            raise
        owner.attend(bool(self.watchers))
        self._owner_pid, self._lost_at = os.getpid(), None
        self._show()
        owner.is_settled = True
        self.port.own(flusher, time.monotonic_ns())
        owner.server.greet_waiting()
        self._turned.set()

    async def _settle(self, session: StorageSession, found: Found) -> None:
        """Make everything that was found certainly durable, before it is shown."""
        base = self.copy if found.fresh is None else found.fresh
        while base.fold_staged(STEP):  # noqa: ASYNC110 -- the condition does the work
            await asyncio.sleep(0)
        settling = Settling(base, found.tail)
        await only_storage_errors(lambda: session.commit(settling.record, settling.slices))

    def _take(self, found: Found) -> None:
        """Show what was found, in one step. It is settled."""
        if found.fresh is not None:
            self._replace(found.fresh)
        for record in found.tail:
            self.applier.apply(record)
            self.changed(record)

    # The copy

    def replace(self, loaded: Any) -> None:
        """Show a state that was loaded."""
        fresh = State(self._clock.monotonic, self._clock.time(), self._clock.time)
        fresh.load(loaded.entries, loaded.revision, loaded.expires)
        fresh.epoch, fresh.results = self.copy.epoch, loaded.results
        self._replace(fresh)

    def _replace(self, fresh: State) -> None:
        is_first = not self.has_state
        self.copy.adopt(fresh)
        self.durable_revision = self.copy.revision
        self.has_state = True
        if is_first:
            return
        if self.copy.on_change is not None:
            self.copy.on_change(None, DELETED, fresh.revision)
        self.watchers.committed(ChangeSet(0, fresh.revision, cleared=True, changes={}, since=0.0))
        self.port.shows(None)

    def changed(self, record: ParsedRecord) -> None:
        """Tell watches, transactions and waiting callers that a record was applied."""
        taken = ChangeSet(record.start, record.end, record.cleared, record.changes, 0.0, record.time, record.wall)
        self._committed(taken)

    def _committed(self, taken: ChangeSet) -> None:
        self.durable_revision = self.copy.revision
        self.watchers.committed(taken)
        self.port.shows(None if taken.cleared else taken.changes.keys())

    def set_epoch(self, epoch: float) -> None:
        """Continue the clock of the owner; see `Welcome`."""
        self.copy.epoch = epoch + time.monotonic() - self._clock.monotonic()

    def _free(self, large: dict[Any, Any], most: int = _FREED_AT_ONCE) -> None:
        """Free a map in steps; see `Flusher`."""
        for _ in range(min(len(large), most)):
            large.popitem()
        if large:
            self.loop.call_soon(self._free, large, most)

    def _fold(self) -> None:
        """Merge a change of many keys into the map of the copy, in steps."""
        if self.copy.fold_staged(STEP):
            self.loop.call_soon(self._fold)

    def _attend(self, watched: bool) -> None:  # noqa: FBT001 -- it is a callback
        if self._owner is not None:
            self._owner.attend(watched)

    # Life

    async def _live(self) -> None:
        """Follow one owner after the other, until this process is the owner or stops."""
        while self._follower is not None:
            await self._follower.ended_at_all
            self._follower = None
            self._lost_at = self._clock.monotonic()
            try:
                await self._join()
            except LabStateError as error:
                self._fail(error)
                return
            except Exception as problem:  # noqa: BLE001 -- all calls of this process depend on this task
                self._fail(StorageError(f"the state {self._name!r} cannot be used: {described(problem)}"))
                return

    def _fail(self, error: LabStateError) -> None:
        """Refuse all calls from now on."""
        self._failure = error
        self._turned.set()
        self._logger.error(
            "%s: this process has lost its state: every write raises this error; restart it: %s", self._name, error
        )
        self._refuse_from_now_on(error)
        self.port.refuse(error)

    def _look_at_calls(self) -> None:
        """Give up calls that have waited too long."""
        self._look = self._clock.call_later(_LOOK_EVERY, self._look_at_calls)
        follower = self._follower
        if self._lost_at is not None:
            self.port.give_up(self._lost_at, "no process owns the state")
        elif follower is not None and (silent := follower.link.silent_for()) > 2 * _LOOK_EVERY:
            who = f"its owner (pid {follower.owner_pid}) gives no sign of life"
            self.port.give_up(self._clock.monotonic() - silent, who)

    # The end

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 -- it bounds the work, not the wait of the caller
        """End all calls, and leave the state: with a farewell, or, as the owner, with a checkpoint.

        Without an owner, this process becomes the owner first. So the last process that stops writes the checkpoint.

        Raises:
            StorageError: Calls had no answer in time, or the last flush failed.
        """
        self._stopping = True
        deadline = self._clock.monotonic() + timeout
        try:
            while self._failure is None and self._clock.monotonic() < deadline:
                self._turned.clear()
                if self._owner is not None and self._owner.is_settled:
                    await self._stop_owner(self._owner, deadline)
                    return
                if (follower := self._follower) is not None and follower.link.is_admitted:
                    await self.port.finish(deadline)
                    if await follower.say_farewell(deadline):
                        return
                await self._wait_for_turn(deadline)
        finally:
            await self._end()
        if self._failure is not None:
            raise self._failure
        if not self.port.is_idle:
            raise UnavailableError(
                f"stop() gave up after {timeout:g} s: no process owned the state {self._name!r}, and calls had no answer"
            )

    async def _wait_for_turn(self, deadline: float) -> None:
        """Wait until the role changes, or until the deadline."""
        waiting = asyncio.ensure_future(self._turned.wait())
        await done_within(waiting, self._clock, max(0.0, deadline - self._clock.monotonic()))
        waiting.cancel()

    async def _stop_owner(self, owner: Owner, deadline: float) -> None:
        owner.begin_stop()
        assert owner.flusher is not None
        await owner.flusher.stop(max(0.0, deadline - self._clock.monotonic()))

    async def _end(self) -> None:
        """End the tasks. The port refuses all calls."""
        if self._look is not None:
            self._look.cancel()
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait({self._life})
        if self._follower is not None:
            self._follower.close()
        if self._owner is not None:
            await self._owner.aclose()
        self.port.close(ClosedError(f"the manager of {self._name!r} was stopped"))

    def check_writable(self) -> None:
        """Check that a change that is made now can become durable; see `Durability.check_writable`."""
        super().check_writable()
        if (flusher := self.flusher) is not None:
            flusher.check_writable()

    def remember(self) -> None:
        """Do nothing: `stop` has released the state."""

    def discard_entries(self) -> None:
        """Free the entries after `stop`."""
        self.copy.free, self.copy.on_staged = ignore, no_clock
        if isinstance(self.copy.entries, dict):
            self._free(self.copy.entries)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Prevent commits. This runs in a forked child, in which all sockets and the lock close themselves."""
        if self.flusher is not None:
            self.flusher.disown()

    # Numbers

    def status(self, phase: Phase, mirror: MirrorWriter | None, before: Status) -> Status:
        """Return the status of the manager. Without a flusher, `before` has the figures of the cache."""
        flusher = self.flusher
        if flusher is not None and self.role == "owner":
            found = status_of(phase, flusher, mirror)
        else:
            found = Status(
                phase=phase,
                keys=self.copy.count(),
                revision=self.copy.revision,
                durable_revision=self.copy.revision,
                task_failure=None if self._failure is None else str(self._failure),
                mirror=before.mirror,
            )
        if phase != "running":
            return found
        return msgspec.structs.replace(
            found, role=self.role, owner_pid=self.owner_pid, followers=self.followers, lag=self.lag
        )

    @property
    def is_aborted(self) -> bool:
        """Return False: only a flusher can be aborted."""
        return False

    @property
    def flusher(self) -> OwnerFlusher[Any] | None:
        """The flusher, if this process is the owner."""
        return None if self._owner is None else self._owner.flusher

    @property
    def role(self) -> Role:
        """The role of this process."""
        return "owner" if self._owner is not None and self._owner.is_settled else "follower"

    @property
    def owner_pid(self) -> int | None:
        """The process id of the owner; `None` while there is no owner."""
        return None if self._lost_at is not None else self._owner_pid

    @property
    def followers(self) -> int | None:
        """The number of followers, if this process is the owner."""
        return self._owner.server.followers if self.role == "owner" and self._owner is not None else None

    @property
    def lag(self) -> float:
        """The seconds since the last sign of life of the owner. The copy may lack what became durable in this time."""
        if self._lost_at is not None:
            return self._clock.monotonic() - self._lost_at
        return 0.0 if self._follower is None else self._follower.link.silent_for()


class _Doubts:
    """Lock files that name an owner which cannot be followed. Such a file may be that of an earlier holder."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: object = None
        self._since = 0.0
        self._times = 0

    def add(self, seen: object) -> None:
        """Note what an attempt has found; `None` if the file names an owner that can be followed."""
        if seen is None or seen != self._seen:
            self._seen, self._since, self._times = seen, self._clock.monotonic(), 0
        self._times += 1

    @property
    def are_over(self) -> bool:
        """Whether the same was found often enough, and for long enough, to be believed."""
        return (
            self._seen is not None
            and self._times >= _ATTEMPTS
            and self._clock.monotonic() - self._since >= _BELIEVED_AFTER
        )


def _nothing() -> None: ...
