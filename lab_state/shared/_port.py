"""The writing calls of one process of a shared state.

If this process is the owner, a call is executed on the layer at once. Otherwise the call becomes an open call,
and is sent to the owner. If the owner ends before it has answered, the call is sent to the next owner. If this
process becomes the next owner, it looks up its open calls in the table of results, and executes those that have no
result there.

`Member`, and its `Follower`, inform the port about each connection, answer and record, and about the role of this process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar, cast

from lab_state import _batch
from lab_state._calls import Calls
from lab_state._clock import Clock, done_within
from lab_state._core import Core
from lab_state._durability import Durability, copied
from lab_state.exceptions import ClosedError, LabStateError, UnavailableError
from lab_state.shared._answers import Ended, Refusal, Settled, ended, size_of
from lab_state.shared._arrivals import Arrivals
from lab_state.shared._bodies import NOT_READ, Bodies, ReadAt, wait_for_others
from lab_state.shared._data_calls import DataCalls, Make, changes_in_turns, encoded_in_turns
from lab_state.shared._frames import MOST_BYTES
from lab_state.shared._messages import Answer, Changes, MakeChanges, Moved, Refused
from lab_state.shared._open_calls import NEVER, OpenCall, OpenCalls, Outcome
from lab_state.shared._optimistic import OptimisticCore
from lab_state.shared._own_writes import note_write
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.shared._wire import encode_for_owner, encode_large_call

R = TypeVar("R")

_HEAD_BYTES = 256
"""An upper bound of the size of a message without its keys and values, in bytes."""

_LARGEST = 2**63 - 1
"""The largest number that a message may have."""

_NO_CHANGES: Final = Changes()


class PendingCall(NamedTuple):
    """A call of this process.

    Attributes:
        make: See `Make`.
        keys: The keys of the check.
        made: The time of the call, in seconds of the clock.
        is_empty: Whether the call makes no change.
        done: A future for the end of the call.
        body: The message without its beginning, if the call has many keys; see `encode_large_call`.
    """

    make: Make
    keys: list[str]
    made: float
    is_empty: bool
    done: asyncio.Future[Ended]
    body: list[bytes] | None


class SharedPort(DataCalls):
    """The port of one manager, from its start to its stop; see `Port`.

    Attributes:
        client: The id of this client.
        calls: The calls of this client that have no answer yet.
        arrivals: The callers that wait for a revision of the copy.
    """

    def __init__(self, core: Core, durability: Durability, clock: Clock, owner_timeout: float) -> None:
        """Begin without an owner. Calls wait for an owner.

        Args:
            core: The core of the manager.
            durability: The durability of this start. Its state is the copy.
            clock: The clock of the manager.
            owner_timeout: See `Config`.
        """
        self.client: str = os.urandom(16).hex()
        self.calls: OpenCalls[PendingCall] = OpenCalls()
        self._core = core
        self._durability = durability
        self._clock = clock
        self._owner_timeout = owner_timeout
        self._owner: OwnerFlusher[Any] | None = None
        self._send_soon: Callable[[], object] = _nothing
        self._again: list[OpenCall[PendingCall]] = []
        self._closed: LabStateError | None = None
        self._begin()

    def _begin(self) -> None:
        """Begin on the running event loop, without callers."""
        self.arrivals: Arrivals = Arrivals(self._durability.state, self._core.name, self._clock)
        self._bodies = Bodies(self._core, self._durability, self)
        self._drafts: set[OptimisticCore] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle: asyncio.Future[None] | None = None

    def move(self) -> None:
        """Move to the running event loop, for a stop, because the event loop of the start is closed.

        The callers have ended with their loop. Their calls stay open.
        """
        self.unfollow()
        self._begin()
        loop = asyncio.get_running_loop()
        for call in self.calls.everything():
            call.call = call.call._replace(done=loop.create_future())

    # The calls

    async def run(
        self, key: str, prefix: str, body: Callable[[Calls], Coroutine[Any, Any, R]], *, may_read: bool = False
    ) -> R:
        """Run a call whose change depends on one key; see `Port.run`."""
        self.check_open()
        if may_read and (found := self._bodies.read(key, prefix, body)) is not NOT_READ:
            return cast("R", found)
        if self._owner is not None:
            result = (await self._owner.run(body, prefix, key))[0]
        else:
            result = await self._bodies.run(key, prefix, body, self._clock.monotonic())
        self._note_write()
        return result

    @asynccontextmanager
    async def transaction(
        self, seed: Refusal | None = None, *, is_repeated: bool = False
    ) -> AsyncGenerator[OptimisticCore]:
        """Open a transaction that holds no lock; see `Port.transaction`."""
        self.check_open()
        shared = OptimisticCore(self._core, seed)
        self._drafts.add(shared)
        try:
            yield shared
            shared.committed = await self._commit(shared, is_repeated=is_repeated)
        finally:
            self._drafts.discard(shared)
            shared.end()

    async def _commit(self, shared: OptimisticCore, *, is_repeated: bool) -> int:
        """Commit a transaction, and return its revision."""
        self.check_open()
        draft = shared.draft
        shared.durability.check_loop()  # raises an error if the manager was stopped meanwhile
        draft.check()
        (keys, prefixes), since = draft.reads(), draft.read_at
        reads = bool(keys or prefixes)
        is_empty = not draft.changes and not draft.cleared
        if is_empty and draft.seed is not None:
            raise draft.conflict()  # the values of a refusal may not be durable, so a transaction that changes nothing cannot return them
        if not reads and is_empty:
            return since
        shared.end()  # from here on, other tasks cannot add changes
        changes, size = await changes_in_turns(draft.changes, cleared=draft.cleared)
        size += sum(map(size_of, keys)) + sum(map(size_of, prefixes))
        made = await self._ended(
            lambda n, ack, at: MakeChanges(n, ack, at, keys, prefixes, changes),
            size,
            since if reads else None,
            None if draft.seed is None else draft.seed.connection,
            keys=keys,
            is_empty=is_empty,
            count=len(keys) + len(draft.changes),
        )
        if isinstance(made, Settled):
            self._note_write()
            return made.revision
        if is_repeated and made.values is not None and not prefixes:
            shared.refusal = made
            raise draft.conflict()
        # Otherwise the next attempt might read a copy without the change that caused the refusal, and be refused again.
        await wait_for_others(self.see_all(), self._core.name)
        raise draft.conflict()

    async def catch_up(self) -> None:
        """Wait until the copy has all changes that were durable at the call."""
        self.check_open()
        if self._owner is None:
            await self.arrivals.catch_up(self._clock.monotonic())

    async def wait_revision(self, revision: int, seconds: float) -> None:
        """Wait until the copy has a revision, for at most `seconds`."""
        self.check_open()
        await self.arrivals.wait(revision, seconds)

    # Making a call

    async def _made(self, make: Make, size: int, count: int = 0) -> Settled:
        """Make a call without a check, and return its end; see `DataCalls`."""
        made = await self._ended(make, size, count=count)
        assert isinstance(made, Settled)  # only a check is refused
        self._note_write()
        return made

    def _note_write(self) -> None:
        note_write(self._core.name, self._durability.state.revision)

    async def send_change(self, key: str, at: ReadAt, changes: Changes, size: int, made: float) -> Ended:
        """Send changes with a check of one key, and return the end of the call; see `Sender.send_change`."""
        keys = [key]
        return await self._ended(
            lambda n, ack, since: MakeChanges(n, ack, since, keys, [], changes),
            size + size_of(key),
            *at,
            keys=keys,
            made=made,
            is_empty=not changes.set and not changes.delete,
        )

    async def see_all(self, made: float | None = None) -> None:
        """Make a call without changes, and wait for its answer. Then the copy has all changes that the owner had made at the call."""
        await self._ended(lambda n, ack, _: MakeChanges(n, ack, 0, [], [], _NO_CHANGES), 0, made=made, is_empty=True)

    async def _ended(
        self,
        make: Make,
        size: int,
        since: int | None = None,
        refused_on: int | None = None,
        *,
        keys: list[str] | None = None,
        made: float | None = None,
        is_empty: bool = False,
        count: int = 0,
    ) -> Ended:
        """Make a call, and return its end. If the caller is cancelled, the call goes on.

        Args:
            make: See `Make`.
            size: An upper bound of the size of the keys and values, in bytes.
            since: The revision of the check; `None` without a check.
            refused_on: See `OpenCalls.submit`.
            keys: The keys of the check.
            made: The time of the call, in seconds of the clock; by default now.
            is_empty: Whether the call makes no change.
            count: The number of keys, if the call may have many. A message with many keys is encoded in steps.
        """
        self.check_open()
        size += _HEAD_BYTES
        body: list[bytes] | None = None
        if count >= _batch.MANY and (self._owner is None or size > MOST_BYTES):
            body = await encoded_in_turns(make(_LARGEST, _LARGEST, _LARGEST))
            self.check_open()
        elif size > MOST_BYTES:  # raise an error if the message is too large, in the owner too
            encode_for_owner(make(_LARGEST, _LARGEST, _LARGEST))
        if self._owner is not None:
            if refused_on is not None and refused_on != self.calls.connection:
                since = NEVER
            return await self._execute(self._owner, make, since, keys or [])
        done: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        call = PendingCall(make, keys or [], self._clock.monotonic() if made is None else made, is_empty, done, body)
        self.calls.submit(call, size, since, refused_on)
        self._send_soon()
        return await done

    async def _execute(self, owner: OwnerFlusher[Any], make: Make, since: int | None, keys: list[str]) -> Ended:
        """Execute a call in this process, which is the owner."""
        made = await owner.make(make(1, 0, 0 if since is None else since))
        if isinstance(made, Refused):
            return ended(made, keys, self.calls.connection)
        return Settled(made[1], made[0])

    def check_open(self) -> None:
        """Raise an error if no call can be made now."""
        if self._closed is not None:
            raise copied(self._closed)

    def spawn(self, work: Coroutine[Any, Any, R], what: str) -> asyncio.Task[R]:
        """Start a task, and keep a reference to it, because the event loop keeps only a weak one."""
        task = asyncio.create_task(work, name=f"lab_state {self._core.name} {what}")
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._note_end()

    # The connection

    @property
    def acknowledgement(self) -> int:
        """The highest number such that the client needs no answer to the call with this number, nor to any call before it."""
        return self.calls.acknowledgement

    def follow(self, send_soon: Callable[[], object], ask: Callable[[int], object]) -> None:
        """Use a connection on which the owner knows this client. The calls that have a number are sent again.

        Args:
            send_soon: A function that asks for `calls_to_send` later in this step.
            ask: A function that asks the owner for its durable revision; see `Arrivals`.
        """
        self._again = self.calls.reconnect()
        self._send_soon = send_soon
        self.arrivals.follow(ask)

    def unfollow(self) -> None:
        """Note that there is no connection. Calls wait for the next connection, or until this process is the owner."""
        self._send_soon = _nothing
        self._again = []
        self.arrivals.follow(None)

    def calls_to_send(self) -> Iterable[bytes | memoryview]:
        """Yield the frames of the calls that are to be sent now, in order and in parts."""
        again, self._again = self._again, []
        for call in [*again, *self.calls.number_next()]:
            if self.calls.find(call.number) is call:  # otherwise the call has ended meanwhile
                call.sent()
                made = call.call.make(call.number, self.acknowledgement, call.since or 0)
                body = call.call.body
                yield from encode_for_owner(made) if body is None else encode_large_call(made, body)

    def answers(self, answers: Iterable[Answer]) -> None:
        """End the calls that were answered. A call with the answer `Moved` stays open.

        The copy has already reached the revisions of the answers, except those of refusals.
        """
        for answer in answers:
            call = self.calls.find(answer.n)
            if call is None:  # the call has ended before its answer
                continue
            if isinstance(answer, Moved):
                call.moved()
                continue
            try:
                end = ended(answer, call.call.keys, self.calls.connection)
            except LabStateError as error:
                self._end(call, error)
            else:
                self._end(call, end)
        self._send_soon()  # send the calls for which there is room now

    def _end(self, call: OpenCall[PendingCall], end: Ended | BaseException) -> None:
        """End a call, and give the end to its caller, unless the caller was cancelled."""
        self.calls.end(call)
        done = call.call.done
        if not done.done():
            if isinstance(end, BaseException):
                done.set_exception(end)
                done.exception()  # marks the error as retrieved, because a cancelled caller does not retrieve it
            else:
                done.set_result(end)
        self._note_end()

    def forgotten(self) -> None:
        """Take a new id, because the owner has forgotten this client. Calls that may have been executed end with an error."""
        for call in self.calls.restart():
            why = "the owner of the state has forgotten this process, which had no connection for too long"
            self._end(call, self._unavailable(call, why))
        self.client = os.urandom(16).hex()

    # The owner

    def own(self, owner: OwnerFlusher[Any], now: int) -> None:
        """Execute all calls in this process from now on, because it is the owner. The copy has every durable change.

        Args:
            owner: The flusher. All loaded changes are durable.
            now: The present time of `CLOCK_MONOTONIC`, in nanoseconds.
        """
        self.unfollow()
        if self.calls.is_forgotten(now):
            self.forgotten()
        self._owner = owner
        for call in self.calls.reconnect():
            found = owner.engine.find(self.client, call.number)
            if found is not None:
                self._end(call, Settled(found.revision, found.value))
        for call in list(self.calls.everything()):
            pending = call.call
            task = self.spawn(self._execute(owner, pending.make, call.since, pending.keys), "call")
            self.calls.end(call)
            task.add_done_callback(partial(self._executed, call))
        self.arrivals.have_all()

    def _executed(self, call: OpenCall[PendingCall], task: asyncio.Task[Ended]) -> None:
        """Note the end of a call that this process has executed itself, as the next owner."""
        if task.cancelled():
            self._end(call, self._unavailable(call, "other code has cancelled the task that waits for it"))
        else:
            self._end(call, task.exception() or task.result())

    # The copy

    def shows(self, keys: Collection[str] | None) -> None:
        """Note which keys of the copy have changed; `None` if all may have changed."""
        for shared in self._drafts:
            shared.draft.note_changed(keys)
        self.arrivals.settle()

    # The end

    def give_up(self, since: float, why: str) -> None:
        """End the calls that have waited for an owner for `owner_timeout` seconds, also those of `catch_up`.

        Args:
            since: The time since which there is no owner, or the owner is silent, in seconds of the clock. The wait of a call
                begins at this time, or at the call if it was made later.
            why: The reason, for the message.
        """
        now = self._clock.monotonic()

        def is_due(made: float) -> bool:
            return now >= max(since, made) + self._owner_timeout

        for call in list(self.calls.everything()):
            if is_due(call.call.made):
                self._end(call, self._unavailable(call, why))
        self.arrivals.give_up(is_due, why)
        self._send_soon()  # send the calls for which there is room now

    def _unavailable(self, call: OpenCall[PendingCall], why: str) -> UnavailableError:
        outcome: Outcome = "not made" if call.call.is_empty else call.outcome
        how = "the call was not made" if outcome == "not made" else "the call was made once, or not at all"
        error = UnavailableError(f"a call of {self._core.name!r} had no answer, because {why}: {how}")
        error.outcome = outcome
        return error

    async def finish(self, deadline: float) -> None:
        """Wait until no call waits for an answer, or until the deadline, in seconds of the clock."""
        while not self.is_idle and (left := deadline - self._clock.monotonic()) > 0:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await done_within(self._idle, self._clock, left)

    def _note_end(self) -> None:
        if self.is_idle and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    @property
    def is_idle(self) -> bool:
        """Whether no call waits for an answer."""
        return not len(self.calls) and not self._tasks

    def refuse(self, error: LabStateError) -> None:
        """End all calls, because this process has lost its state, or the manager has stopped. Later calls raise the error."""
        self._closed = error
        for call in list(self.calls.everything()):
            self._end(call, self._lost(call, error))
        self.arrivals.close(error)

    def _lost(self, call: OpenCall[PendingCall], error: LabStateError) -> LabStateError:
        if isinstance(error, ClosedError):
            return self._unavailable(call, "the manager was stopped")
        made = "not made" if call.call.is_empty or call.outcome == "not made" else "made once, or not at all"
        return copied(error, f"the call was {made}")

    def close(self, error: LabStateError) -> None:
        """End all calls and transactions, because the manager has stopped. Later calls raise the error."""
        self.refuse(error)
        for shared in self._drafts:
            shared.end()


def _nothing() -> None: ...
