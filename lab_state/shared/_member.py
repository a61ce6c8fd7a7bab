"""`Member`: one process of a shared state, from its start to its stop. It becomes the owner, or follows the owner.

Theory of operation. The copy, the port and the watches stay the same from start to stop. Only the role changes.
A follower has one `Follower` for each connection to an owner. When the connection ends, the member looks for the
next owner, or becomes the owner. An owner has one `Owner`, and stays the owner until the stop.
"""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from lab_state._clock import Pauses, Timer, done_within, sleep
from lab_state._core import Core
from lab_state._durability import copied
from lab_state._foreign import described
from lab_state._forgotten import note
from lab_state._migrations import Committed
from lab_state._opening import state_of, tell_loaded, warn_of_torn_tail
from lab_state._status import Phase, Role, Status, status_of, status_of_follower
from lab_state._sweeper import SWEPT_AT_START
from lab_state.cache._mirror import MirrorWriter
from lab_state.config import Config
from lab_state.exceptions import ClosedError, LabStateError, StorageError, UnavailableError
from lab_state.shared._connection import Connection
from lab_state.shared._copy import SharedCopy
from lab_state.shared._election import Election
from lab_state.shared._follower import Follower
from lab_state.shared._found import find, settle
from lab_state.shared._owner import Owner, Surroundings
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.storage._claim import Claim
from lab_state.storage._fs_socket import OwnSocket
from lab_state.storage._protocol import SharedSession
from lab_state.storage.file import files_of

_LOOK_EVERY = 0.25
"""The seconds between two checks for calls that have waited too long."""

_SILENT = 2.0
"""The seconds without a message after which an owner counts as silent. An owner sends a message each second."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""The first and the longest pause between two attempts to find a role, in seconds, while the files cannot be used."""

_LAST_CHANCE = 0.5
"""The longest time in seconds that `stop` waits for its cancelled task, and then for the release of the lock."""


class Member(SharedCopy):
    """One process of a shared state."""

    def __init__(self, core: Core, config: Config, around: Surroundings) -> None:
        """Prepare for the running event loop.

        Args:
            core: The core of the manager. It is opened when the copy has its first state.
            config: The settings of the manager.
            around: See `Surroundings`.
        """
        super().__init__(core, config, around.clock)
        self.mirror: MirrorWriter | None = None
        self._core = core
        self._config = config
        self._around = around
        self._logger = around.logger
        self._owner: Owner | None = None
        self._follower: Follower | None = None
        self._election = self._new_election()
        self._owner_pid: int | None = None
        # The time since which there is no owner; `None` if there is one.
        self._lost_at: float | None = self._clock.monotonic()
        self._must_load = False
        self._life: asyncio.Task[None] | None = None
        self._look: Timer | None = None
        self._failure: LabStateError | None = None
        self._stopping = False
        self._turned = asyncio.Event()  # set when the role has changed, or the state was lost
        self.watchers.attended = self._attend

    # Start

    async def start(self) -> None:
        """Become the owner, or follow the owner. Open the core.

        Raises:
            LabStateError: See `Manager.start`.
        """
        began = self._clock.monotonic()
        await self._join()
        if self._follower is not None:
            self._logger.info(
                "%s: follows process %d at revision %d (keys: %d), after %.3f s",
                self._name,
                self._follower.owner_pid,
                self.state.revision,
                self.state.count(),
                self._clock.monotonic() - began,
            )
        self._live()
        self._look_at_calls()

    def _live(self) -> None:
        self._life = asyncio.create_task(self._follow_all(), name=f"lab_state {self._name} member")
        self._life.add_done_callback(self._life_ended)

    def _show(self) -> None:
        """Open the core, if it is not open and the member does not stop."""
        if not self._core.is_open and not self._stopping:
            self._core.open(self.state, self, self.watchers, _nothing, self.port)

    # The role

    def _new_election(self) -> Election:
        around = self._around
        return Election(files_of(around.storage), self._name, around.clock, self._config.owner_timeout)

    async def _follow_all(self) -> None:
        """Follow one owner after another, until this process is the owner, has left, or has lost its state."""
        while self._owner is None:
            if (follower := self._follower) is not None:
                await follower.over
                if follower.has_left:
                    return
                self._follower, self._lost_at = None, self._clock.monotonic()
                self._must_load = follower.is_bad
                self._election = self._new_election()
            try:
                await self._join_again()
            except LabStateError as error:
                self._fail(error)
                return
            except Exception as problem:  # noqa: BLE001 -- all calls of this process depend on this task
                self._fail(StorageError(f"the state {self._name!r} cannot be used: {described(problem)}"))
                return

    async def _join_again(self) -> None:
        """Find a role. While the files cannot be used, such as on a full disk, try again."""
        pauses = Pauses(self._clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            try:
                await self._join()
            except UnavailableError as error:
                self._election.why = str(error)
                if not pauses.failures:
                    self._logger.warning(
                        "%s: can neither find an owner nor become the owner, and tries again: %s", self._name, error
                    )
                await sleep(self._clock, pauses.start())
            else:
                return

    async def _join(self) -> None:
        """Become the owner, or follow the owner."""
        while True:
            role = await self._election.role(has_copy=self.has_state)
            if isinstance(role, Claim):
                await self._become_owner(role)
                return
            if await self._follow(role):
                return

    async def _follow(self, connected: OwnSocket) -> bool:
        """Follow the owner at the other end. Return True when calls can be made, or False if the connection has ended before that."""
        follower = Follower(
            self._name,
            self._around.storage,
            self,
            self._clock,
            self._logger,
            lambda: self._met(follower),
            self._around.schema.schema,
        )
        self._follower = follower
        try:
            follower.open(connected, anew=self._must_load)
            if not self.has_state:
                await follower.limit_silence(max(self._config.owner_timeout, _SILENT))
            # No time limit is needed here: reads go on, and each call has its own time limit.
            await asyncio.wait({follower.ready})
            is_ready = follower.ready.result()
        except BaseException:
            follower.close()
            self._follower = None
            raise
        if not is_ready:
            self._follower = None
            self._must_load |= follower.is_bad
            if follower.link.is_greeted:
                self._lost_at = self._clock.monotonic()
            self._election.ended(greeted=follower.link.is_greeted, has_copy=self.has_state)
            return False
        self._must_load = False
        self._show()
        self._turned.set()
        return True

    def _met(self, follower: Follower) -> None:
        """Note that an owner has answered."""
        self._owner_pid, self._lost_at = follower.owner_pid, None

    async def _become_owner(self, claim: Claim) -> None:
        """Load the state, or only the records that the copy lacks. Settle it, show it, and admit other processes."""
        began = self._clock.monotonic()
        owner = Owner(self, self._config, claim, self._around)
        lost_at = self._lost_at
        try:
            owner.listen()
            # From here on, the calls of this process wait for the load, like the calls of other processes.
            self._lost_at, self._owner_pid = None, os.getpid()
            session = await claim.load(whole=not self.has_state)
            try:
                flusher = await self._own(owner, session, began)
            except BaseException:
                await session.aclose()
                raise
        except BaseException:
            self._lost_at = lost_at  # otherwise no call would reach its time limit while all attempts fail
            await owner.release()
            raise
        # The following is one step of the event loop, so no process sees only a part of it.
        self._owner, owner.is_settled = owner, True
        self._show()
        self.port.own(flusher, time.monotonic_ns())
        owner.server.greet_waiting()
        self._turned.set()

    async def _own(self, owner: Owner, session: SharedSession, began: float) -> OwnerFlusher[Connection]:
        """Settle and show the state of the files, and start the tasks of the owner."""
        around, is_start, recovery = self._around, not self.has_state, session.recovery
        warn_of_torn_tail(session, self._logger)
        found = await find(session, None if is_start else self.state)
        whole = None if found.whole is None else state_of(found.whole, session.path, self._clock, self._logger)
        if whole is not None and not is_start:
            # If the epoch were set from the wall clock again, an expired key could reappear.
            whole.epoch = self.state.epoch
        if recovery.unsettled:
            await settle(session, self.state if whole is None else whole, found.tail)
        if whole is not None:
            self.replace(whole)
        await self.apply_all(found.tail)
        migration = await self._use_schema(session) if is_start else around.schema.check(self.state, session)
        mirror = None if around.make_mirror is None else around.make_mirror()
        flusher = owner.own(session, mirror, SWEPT_AT_START if is_start else 0)
        flusher.refused = self._end_waits
        if migration is not None:
            flusher.checkpoints.note_commit(is_due=migration.is_due)
            flusher.last_records.add(migration.start, migration.end, migration.data)
        flusher.forgotten = note(flusher, session, self._name, around.storage, around.started_at)
        self.mirror = mirror
        seconds = self._clock.monotonic() - began
        if is_start:
            tell_loaded(recovery, session.path, self._name, self.state, self._logger, seconds)
        else:
            self._logger.info(
                "%s: this process owns the state now, at revision %d (keys: %d), after %.3f s",
                self._name,
                self.state.revision,
                len(self.state.entries),
                seconds,
            )
        return flusher

    async def _use_schema(self, session: SharedSession) -> Committed | None:
        """Migrate the state, if it is older than the code. Other processes wait meanwhile."""
        committed = await self._around.schema.use(self.state, session, is_alone=False)
        self.durable_revision = self.state.revision
        return committed

    def _attend(self, watched: bool) -> None:  # noqa: FBT001 -- it is a callback
        if self._owner is not None:
            self._owner.watched()
        elif self._follower is not None:
            self._follower.link.watch(are_watched=watched)

    # Faults

    def _life_ended(self, life: asyncio.Task[None]) -> None:
        """Refuse all calls if other code, or the end of the event loop, has cancelled the task."""
        if life.cancelled() and not self._stopping:
            self._refuse_calls(
                UnavailableError(
                    f"the task of {self._name!r} that follows the owner was cancelled; was stop() forgotten? Call stop()"
                )
            )

    def _fail(self, error: LabStateError) -> None:
        """Refuse all calls from now on. `stop` raises the error as well."""
        self._failure = error
        self._refuse_calls(error)
        self._turned.set()

    def _refuse_calls(self, error: LabStateError) -> None:
        self._logger.error(
            "%s: this process has lost its state, and every write raises this error; fix the fault, and restart this process: %s",
            self._name,
            error,
        )
        self._refuse_from_now_on(error)
        self.port.refuse(error)

    def _end_waits(self) -> None:
        """End the waits for a revision, because this process is the owner, and there will be no further commit."""
        flusher = self.flusher
        assert flusher is not None  # the flusher calls this method
        assert flusher.refusal is not None
        self.port.arrivals.close(flusher.refusal)

    def _look_at_calls(self) -> None:
        """End the calls that have waited too long."""
        self._look = self._clock.call_later(_LOOK_EVERY, self._look_at_calls)
        follower = self._follower
        if self._lost_at is not None:
            who = self._election.why if follower is None else f"the process {follower.owner_pid} does not answer"
            self.port.give_up(self._lost_at, who)
        elif follower is not None and (silent := follower.link.silent_for()) > _SILENT:
            who = (
                f"the process {follower.owner_pid}, which owns the state, has given no sign of life for {silent:.0f} s"
            )
            self.port.give_up(self._clock.monotonic() - silent, who)

    # The end

    async def stop(self, timeout: float) -> None:  # noqa: ASYNC109 -- it bounds the work, not the wait of the caller
        """Wait for the answers to all calls. Then leave the state: a follower says farewell, and the owner hands the state over.

        If there is no follower, the owner writes a checkpoint instead. If there is no owner, this process becomes the owner
        first. So the last process that stops writes the checkpoint.

        Args:
            timeout: The time limit in seconds for the answers, and for the search for a role. The last flush of an owner has
                its own limit; see `Flusher.stop`.

        Raises:
            StorageError: Calls had no answer in time, or the last flush failed.
            LabStateError: This process has lost its state. Every write has raised the same error since then.
        """
        self._stopping = True
        deadline = self._clock.monotonic() + timeout
        if self._life is None or self._life.cancelled():  # for example, because the event loop of the start has ended
            self._live()
        try:
            has_left = await self._leave(deadline)
        finally:
            is_idle = self.port.is_idle
            await self._end()
        if self._failure is not None:
            raise copied(self._failure, "each write that returned was durable")
        if not has_left and not is_idle:
            raise UnavailableError(f"stop() gave up after {timeout:g} s: calls of {self._name!r} had no answer")

    async def _leave(self, deadline: float) -> bool:
        """Leave the state, as a follower or as the owner. Return whether this succeeded before the deadline."""
        while self._failure is None and self._clock.monotonic() < deadline:
            self._turned.clear()
            owner, follower = self._owner, self._follower
            if owner is not None and owner.flusher is not None:
                await self.port.finish(deadline)  # calls from the time before this process was the owner
                await owner.begin_stop(deadline)
                await owner.flusher.stop(self._config.stop_timeout)
                return True
            if follower is not None and follower.link.is_admitted:
                await self.port.finish(deadline)
                if await follower.say_farewell(deadline):
                    return True
            turned = asyncio.ensure_future(self._turned.wait())
            await done_within(turned, self._clock, deadline - self._clock.monotonic())
            turned.cancel()
        return False

    async def _end(self) -> None:
        """End the tasks. The port refuses all calls."""
        if self._look is not None:
            self._look.cancel()
        assert self._life is not None  # `stop` has started the task, if `start` had not
        self._life.cancel()
        await done_within(self._life, self._clock, _LAST_CHANCE)
        if self._follower is not None:
            self._follower.close()
        if self._owner is not None:
            release = asyncio.ensure_future(self._owner.release())
            await done_within(release, self._clock, _LAST_CHANCE)
        self.port.close(ClosedError(f"the manager of {self._name!r} was stopped"))

    def move(self) -> None:
        """Move to the running event loop; see `Durability.move`. The connection is lost, and `stop` makes another one."""
        was_closed = self.loop.is_closed()
        super().move()
        if not was_closed:
            return
        self._life = self._look = None
        self._turned = asyncio.Event()
        self.port.move()
        if self._follower is not None:
            self._follower.abandon()
            self._follower, self._lost_at, self._election = None, self._clock.monotonic(), self._new_election()
        if self._owner is not None:
            self._owner.move()

    def check_writable(self) -> None:
        """Check that a change that is made now can become durable; see `Durability.check_writable`."""
        super().check_writable()
        if (flusher := self.flusher) is not None:
            flusher.check_writable()

    def remember(self) -> None:
        """Note that `stop` has released the state; see `Flusher.remember`."""
        if (flusher := self.flusher) is not None:
            flusher.remember()

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Prevent commits. This runs in a forked child. The objects of the sockets and of the lock close their own descriptors."""
        if self.flusher is not None:
            self.flusher.disown()

    # Numbers

    def status(self, phase: Phase, mirror: MirrorWriter | None, before: Status) -> Status:
        """Return the status of the manager. In a follower, the status of the mirror is taken from `before`."""
        flusher = self.flusher
        if flusher is not None:
            found = status_of(phase, flusher, mirror)
        else:
            found = status_of_follower(phase, self.state, self._failure, before.mirror)
        if phase != "running":
            return found
        return msgspec.structs.replace(
            found, role=self.role, owner_pid=self.owner_pid, followers=self.followers, lag=self.lag
        )

    @property
    def is_aborted(self) -> bool:
        """Whether this process is the owner, and its flusher was aborted."""
        return self.flusher is not None and self.flusher.is_aborted

    @property
    def flusher(self) -> OwnerFlusher[Connection] | None:
        """The flusher, if this process is the owner; otherwise `None`."""
        return None if self._owner is None else self._owner.flusher

    @property
    def role(self) -> Role:
        """The role of this process."""
        return "follower" if self._owner is None else "owner"

    @property
    def owner_pid(self) -> int | None:
        """The process id of the owner; `None` while there is no owner."""
        return None if self._lost_at is not None else self._owner_pid

    @property
    def followers(self) -> int | None:
        """The number of followers, if this process is the owner; otherwise `None`."""
        return None if self._owner is None else self._owner.server.followers

    @property
    def lag(self) -> float:
        """The seconds since the last sign of life of the owner, or since there is no owner; 0 in the owner.

        The copy may lack the changes of these seconds.
        """
        lost_at, follower = self._lost_at, self._follower  # read once: another thread may call this
        if lost_at is not None:
            return self._clock.monotonic() - lost_at
        return 0.0 if follower is None else follower.link.silent_for()


def _nothing() -> None: ...
