"""The writing calls of one process of a shared state.

If this process is the owner, a call is executed on the layer at once. Otherwise it becomes an open call,
which is sent to the owner. If this owner ends without an answer, it is sent again to the next one. If this
process is the next owner, it looks its open calls up in the table of results, and executes the others.

`Member` tells the port of each connection, answer and record, and of the role of this process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy as copy_of
from typing import Any, Literal, NamedTuple, TypeVar, cast

from lab_state._calls import Calls
from lab_state._clock import Clock, done_within
from lab_state._core import Core
from lab_state._durability import Durability
from lab_state._entries import Value
from lab_state.exceptions import InvalidValueError, LabStateError, UnavailableError
from lab_state.shared._answers import Ended, Refusal, Settled, changes_of, ended, raw_of, result_of
from lab_state.shared._arrivals import Arrivals
from lab_state.shared._bodies import Bodies
from lab_state.shared._frames import MOST_BYTES
from lab_state.shared._messages import (
    Answer,
    Call,
    Changes,
    Delete,
    DeleteAll,
    DeleteMany,
    Incr,
    MakeChanges,
    Moved,
    Refused,
    Set,
    SetIfAbsent,
    SetMany,
    Touch,
)
from lab_state.shared._open_calls import NEVER, OpenCall, OpenCalls
from lab_state.shared._optimistic import OptimisticCore
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.shared._wire import encode_for_owner

R = TypeVar("R")

Make = Callable[[int, int, int], Call]
"""A function that makes the message of a call from its number, the acknowledgement, and the revision of its check."""

_HEAD_BYTES = 256
"""The most bytes of a message beside its keys and values."""


class PendingCall(NamedTuple):
    """A call of this process.

    Attributes:
        make: See `Make`.
        keys: The keys of its check.
        made: When it was made, in seconds of the clock.
        done: The future of its end.
    """

    make: Make
    keys: list[str]
    made: float
    done: asyncio.Future[Ended]


class SharedPort:
    """The port of one manager, from its start to its stop; see `Port`.

    Attributes:
        client: The id of this client.
        calls: Its calls without an answer.
        arrivals: The callers that wait for a revision of the copy.
    """

    def __init__(self, core: Core, durability: Durability, clock: Clock, owner_timeout: float) -> None:
        """Begin without an owner. Calls wait for one.

        Args:
            core: The core of the manager.
            durability: The durability of this start. Its state is the copy.
            clock: The clock of the manager.
            owner_timeout: See `Config`.
        """
        self.client: str = os.urandom(16).hex()
        self.calls: OpenCalls[PendingCall] = OpenCalls()
        self.arrivals: Arrivals = Arrivals(durability.state, core.name, clock)
        self._core = core
        self._clock = clock
        self._owner_timeout = owner_timeout
        self._owner: OwnerFlusher[Any] | None = None
        self._send_soon: Callable[[], object] = _nothing
        self._again: list[OpenCall[PendingCall]] = []
        self._bodies = Bodies(core, durability, self)
        self._drafts: set[OptimisticCore] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed: LabStateError | None = None

    # The calls

    async def set(self, key: str, value: Value, ttl: int | None) -> int:
        """Store a value, and return the revision."""
        raw = raw_of(value)
        settled = await self._made(lambda n, ack, _: Set(n, ack, key, raw, ttl), _size(key, raw))
        return settled.revision

    async def set_many(self, values: Mapping[str, Value], ttl: int | None) -> int:
        """Store several values, and return the revision."""
        raws = {key: raw_of(value) for key, value in values.items()}
        size = sum(_size(key, raw) for key, raw in raws.items())
        settled = await self._made(lambda n, ack, _: SetMany(n, ack, raws, ttl), size)
        return settled.revision

    async def touch(self, key: str, ttl: int | None) -> bool:
        """Give a key another time to live, and return whether it existed."""
        return bool(result_of(await self._made(lambda n, ack, _: Touch(n, ack, key, ttl), len(key))))

    async def delete_many(self, keys: Sequence[str]) -> int:
        """Delete keys, and return how many of them existed."""
        if len(keys) == 1:
            return int(bool(result_of(await self._made(lambda n, ack, _: Delete(n, ack, keys[0]), len(keys[0])))))
        given = list(keys)
        settled = await self._made(lambda n, ack, _: DeleteMany(n, ack, given), sum(map(len, given)))
        return cast("int", result_of(settled))

    async def delete_all(self, prefix: str) -> int:
        """Delete the keys with a prefix, and return their number."""
        return cast("int", result_of(await self._made(lambda n, ack, _: DeleteAll(n, ack, prefix), len(prefix))))

    async def set_if_absent(self, key: str, value: Value, ttl: int | None) -> bool:
        """Store a value if the key is missing, and return whether it was stored."""
        raw = raw_of(value)
        return bool(result_of(await self._made(lambda n, ack, _: SetIfAbsent(n, ack, key, raw, ttl), _size(key, raw))))

    async def incr(
        self, key: str, delta: float, default: float, kind: Literal["any", "int", "float"], ttl: int | None
    ) -> int | float:
        """Add to a number, and return the new number."""
        settled = await self._made(lambda n, ack, _: Incr(n, ack, key, delta, default, kind, ttl), len(key))
        return cast("int | float", result_of(settled))

    async def run(
        self, key: str, prefix: str, body: Callable[[Calls], Coroutine[Any, Any, R]], *, may_read: bool = False
    ) -> R:
        """Run a call whose change depends on one key; see `Port.run`."""
        self._check_open()
        if self._owner is not None:
            return (await self._owner.run(body, prefix))[0]
        return await self._bodies.run(key, prefix, body, may_read=may_read)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[OptimisticCore]:
        """Open a transaction that holds no lock; see `Port.transaction`."""
        self._check_open()
        shared = OptimisticCore(self._core)
        self._drafts.add(shared)
        try:
            yield shared
            shared.committed = await self._commit(shared)
        finally:
            self._drafts.discard(shared)
            shared.end()

    async def _commit(self, shared: OptimisticCore) -> int:
        """Commit a transaction, and return its revision."""
        draft = shared.draft
        _ = shared.durability  # raises if the manager was stopped meanwhile
        draft.check()
        keys, prefixes, since = list(draft.keys), list(draft.prefixes), draft.read_at
        changes, size = changes_of(draft.changes, cleared=draft.cleared)
        reads = bool(keys or prefixes)
        if not reads and not draft.changes and not draft.cleared:
            return since
        shared.end()  # from here on, other tasks cannot add changes
        made = await self._ended(
            lambda n, ack, at: MakeChanges(n, ack, at, keys, prefixes, changes),
            size + sum(map(len, keys)) + sum(map(len, prefixes)),
            since if reads else None,
            keys=keys,
        )
        if isinstance(made, Refusal):
            raise draft.conflict()
        return made.revision

    async def catch_up(self) -> None:
        """Wait until the copy has everything that was durable at the call."""
        self._check_open()
        if self._owner is None:
            await self.arrivals.catch_up(self._clock.monotonic())

    async def wait_revision(self, revision: int, seconds: float) -> None:
        """Wait until the copy has a revision, for at most `seconds`."""
        self._check_open()
        await self.arrivals.wait(revision, seconds)

    async def reach(self, revision: int) -> None:
        """Wait until the copy has a revision that the owner has named."""
        await self.arrivals.reach(revision)

    # Making a call

    async def _made(self, make: Make, size: int) -> Settled:
        """Make a call without a check, and return its end."""
        made = await self._ended(make, size)
        assert isinstance(made, Settled)  # only a check is refused
        return made

    async def send_change(self, key: str, since: int, refused_on: int | None, changes: Changes, size: int) -> Ended:
        """Send changes with a check of one key, and return the end of the call."""
        keys = [key]
        return await self._ended(
            lambda n, ack, at: MakeChanges(n, ack, at, keys, [], changes),
            size + len(key),
            since,
            refused_on,
            keys,
        )

    async def _ended(
        self,
        make: Make,
        size: int,
        since: int | None = None,
        refused_on: int | None = None,
        keys: list[str] | None = None,
    ) -> Ended:
        """Make a call, and return its end. If the caller is cancelled, the call goes on.

        Args:
            make: See `Make`.
            size: The approximate size of its message, in bytes.
            since: The revision of its check; `None` without a check.
            refused_on: See `OpenCalls.submit`.
            keys: The keys of its check.
        """
        self._check_open()
        if size > MOST_BYTES - _HEAD_BYTES:
            raise InvalidValueError(
                f"a call with {size} bytes of keys and values is larger than the {MOST_BYTES} that processes of a shared "
                "state can exchange; split it"
            )
        if self._owner is not None:
            if refused_on is not None and refused_on != self.calls.connection:
                since = NEVER
            return await self._execute(self._owner, make, since, keys or [])
        done: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        call = PendingCall(make, keys or [], self._clock.monotonic(), done)
        self.calls.submit(call, size + _HEAD_BYTES, since, refused_on)
        self._send_soon()
        return await done

    async def _execute(self, owner: OwnerFlusher[Any], make: Make, since: int | None, keys: list[str]) -> Ended:
        """Execute a call in this process, which is the owner."""
        made = await owner.make(make(1, 0, 0 if since is None else since))
        if isinstance(made, Refused):
            return ended(made, keys, self.calls.connection)
        return Settled(made[1], made[0])

    def _check_open(self) -> None:
        if self._closed is not None:
            raise copy_of(self._closed)

    # The connection

    @property
    def acknowledgement(self) -> int:
        """The number up to which this client needs no more answers."""
        return self.calls.acknowledgement

    def follow(self, send_soon: Callable[[], object], ask: Callable[[int], object]) -> None:
        """Use a connection on which the owner knows this client. All open calls are sent again.

        Args:
            send_soon: A function that asks for `calls_to_send` later in this step.
            ask: A function that asks the owner for its durable revision; see `Arrivals`.
        """
        self._again = self.calls.reconnect()
        self._send_soon = send_soon
        self.arrivals.follow(ask)

    def unfollow(self) -> None:
        """Note that there is no connection. Calls wait for the next one."""
        self._send_soon = _nothing
        self._again = []
        self.arrivals.follow(None)

    def calls_to_send(self) -> Iterable[bytes | memoryview]:
        """Yield the frames of the calls that are to be sent now, in order and in parts."""
        again, self._again = self._again, []
        for call in [*again, *self.calls.number_next()]:
            yield from self._frame(call)

    def _frame(self, call: OpenCall[PendingCall]) -> Iterable[bytes | memoryview]:
        if self.calls.find(call.number) is not call:
            return ()  # it was given up meanwhile
        try:
            parts = encode_for_owner(call.call.make(call.number, self.calls.acknowledgement, call.since or 0))
        except InvalidValueError as error:
            self.calls.end(call)
            _fail(call, error)
            return ()
        call.sent()
        return parts

    def answers(self, answers: Iterable[Answer]) -> None:
        """End the calls that were answered. The copy has the revisions of the answers."""
        for answer in answers:
            call = self.calls.find(answer.n)
            if call is None:  # it was given up
                continue
            if isinstance(answer, Moved):
                call.moved()
                continue
            self.calls.end(call)
            try:
                self._finish(call, ended(answer, call.call.keys, self.calls.connection))
            except LabStateError as error:
                _fail(call, error)
        self._send_soon()  # calls that waited for room

    @staticmethod
    def _finish(call: OpenCall[PendingCall], end: Ended) -> None:
        if not call.call.done.done():
            call.call.done.set_result(end)

    def forgotten(self) -> None:
        """Take a new id, because the owner has forgotten this client. The calls that were sent have an unknown outcome."""
        for call in self.calls.restart():
            _fail(
                call,
                self._unavailable(call, "the owner of the state has forgotten this process, which was away too long"),
            )
        self.client = os.urandom(16).hex()

    # The owner

    def own(self, owner: OwnerFlusher[Any], now: int) -> None:
        """Execute all calls in this process from now on, because it is the owner. The copy has everything that is durable.

        Args:
            owner: The flusher. Everything that was loaded is settled.
            now: The time of `CLOCK_MONOTONIC`, in nanoseconds.
        """
        self.unfollow()
        if self.calls.is_forgotten(now):
            self.forgotten()
        self._owner = owner
        for call in self.calls.reconnect():
            found = owner.engine.find(self.client, call.number)
            if found is not None:
                self.calls.end(call)
                self._finish(call, Settled(found.revision, found.value))
        for call in list(self.calls.everything()):
            self.calls.end(call)
            self._execute_soon(owner, call)
        self.arrivals.have_all()

    def _execute_soon(self, owner: OwnerFlusher[Any], call: OpenCall[PendingCall]) -> None:
        task = asyncio.create_task(self._execute_again(owner, call), name=f"lab_state {self._core.name} call")
        self._tasks.add(task)  # the event loop keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def _execute_again(self, owner: OwnerFlusher[Any], call: OpenCall[PendingCall]) -> None:
        try:
            self._finish(call, await self._execute(owner, call.call.make, call.since, call.call.keys))
        except LabStateError as error:
            _fail(call, error)

    # The copy

    def shows(self, keys: Collection[str] | None) -> None:
        """Note that the copy has changed: these keys, or all of them (`None`)."""
        for shared in self._drafts:
            shared.draft.note_changed(keys)
        self.arrivals.settle()

    # The end

    def give_up(self, since: float, why: str) -> None:
        """End the calls that have waited for longer than `owner_timeout`.

        Args:
            since: The time since which there is no owner, or no sign of life of it, in seconds of the clock.
            why: The reason, for the message.
        """
        now = self._clock.monotonic()
        for call in list(self.calls.everything()):
            if now >= max(since, call.call.made) + self._owner_timeout:
                self.calls.end(call)
                _fail(call, self._unavailable(call, why))
        self.arrivals.give_up(now, since, self._owner_timeout, why)

    def _unavailable(self, call: OpenCall[PendingCall], why: str) -> UnavailableError:
        how = "it was not made" if call.outcome == "not made" else "it was made once, or not at all"
        error = UnavailableError(f"a call of {self._core.name!r} had no answer, because {why}: {how}")
        error.outcome = call.outcome
        return error

    async def finish(self, deadline: float) -> None:
        """Wait until no call waits for an answer, or until the deadline, in seconds of the clock."""
        while not self.is_idle and (left := deadline - self._clock.monotonic()) > 0:
            unfinished: list[asyncio.Future[Any]] = [call.call.done for call in self.calls.everything()]
            unfinished += [*self._tasks, *self._bodies.tasks]
            waiting = asyncio.ensure_future(asyncio.wait(unfinished))
            await done_within(waiting, self._clock, left)
            waiting.cancel()

    @property
    def is_idle(self) -> bool:
        """Whether no call waits for an answer."""
        return not len(self.calls) and not self._tasks and not self._bodies.tasks

    def close(self, error: LabStateError) -> None:
        """End all calls and transactions, because the manager has stopped. Later calls raise the error."""
        self._closed = error
        for call in list(self.calls.everything()):
            self.calls.end(call)
            _fail(call, self._unavailable(call, "the manager was stopped"))
        for shared in list(self._drafts):
            shared.end()
        self.arrivals.close(error)


def _size(key: str, raw: Any) -> int:
    """Return the approximate size of a key and its value in a message, in bytes."""
    return len(key) + memoryview(raw).nbytes + 8


def _fail(call: OpenCall[PendingCall], error: LabStateError) -> None:
    done = call.call.done
    if not done.done():
        done.set_exception(error)
        done.exception()  # marks it as retrieved: a caller that was cancelled will not do that


def _nothing() -> None: ...
