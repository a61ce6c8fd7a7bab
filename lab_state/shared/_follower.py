"""A process of a shared state that is not the owner: its connection to the owner, and its copy.

Theory of operation. The copy changes by the records that come over the connection. If the owner no longer
has the records that the copy lacks, the copy is loaded from the files, without the lock. Meanwhile records
and answers are kept. What was read is shown when the owner has named its revision as durable, because the
end of the journal may not be synced. If the connection ends before that, everything is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, Protocol

from lab_state import _batch
from lab_state._bulk import run_in_steps
from lab_state._clock import Clock, done_within
from lab_state._codec import LoadedState
from lab_state._foreign import described
from lab_state._loading import load
from lab_state._log import Log
from lab_state.exceptions import LabStateError, StorageError, UnsupportedError
from lab_state.shared._frames import BadMessageError
from lab_state.shared._link import Link
from lab_state.shared._messages import Answer, Hello, No, Starting, Welcome
from lab_state.shared._port import SharedPort
from lab_state.shared._records import Outcome, ParsedRecord, RecordApplier, parse_in_steps
from lab_state.shared._wire import OtherVersionError
from lab_state.storage._protocol import Storage

MOST_KEPT = 64 * 1024 * 1024
"""The largest total size of the records that are kept during a load, in bytes."""


class Copy(Protocol):
    """The copy of this process, and the objects that are told of its changes."""

    applier: RecordApplier
    has_state: bool

    def replace(self, loaded: LoadedState) -> None:
        """Show another state, which was loaded."""
        ...

    def changed(self, record: ParsedRecord) -> None:
        """Tell watches, transactions and waiting callers that a record was applied."""
        ...

    def set_epoch(self, epoch: float) -> None:
        """Continue the clock of the state: its time, in seconds, when `CLOCK_MONOTONIC` is 0."""
        ...


class _Load:
    """A load that is under way, and what has come meanwhile."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.records: list[ParsedRecord] = []
        self.answers: list[Answer] = []
        self.replies: list[tuple[int, int]] = []
        self.bytes = 0


class Follower:
    """One connection to an owner, from the hello to its end.

    Attributes:
        ready: The future of the first moment at which the copy is shown and calls can be sent. Its result is
            False if the connection ended before that. An error of it ends a start.
        ended: The future of the end of the connection.
        owner_pid: The process id of the owner; `None` until it is known.
        is_forgotten: Whether the owner has answered that it does not know this client.
        named: The highest durable revision that the owner has named.
    """

    def __init__(  # noqa: PLR0917 -- all are needed, and each has a type of its own
        self, name: str, storage: Storage, copy: Copy, port: SharedPort, clock: Clock, logger: Log
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[bool] = loop.create_future()
        self.ended_at_all: asyncio.Future[None] = loop.create_future()
        self.owner_pid: int | None = None
        self.named: int = 0
        self.link: Link = Link(self, clock=clock, log=logger)
        self._name = name
        self._storage = storage
        self._copy = copy
        self._port = port
        self._clock = clock
        self._logger = logger
        self._load: _Load | None = None
        self._named_more = asyncio.Event()
        self._confirmed: asyncio.Future[None] = loop.create_future()

    def open(self, connected: Any) -> None:
        """Send the hello over a connected socket."""
        copy, port = self._copy, self._port
        revision = copy.applier.copy.revision if copy.has_state else None
        self.link.open(connected, Hello(name=self._name, client=port.client, revision=revision, heard=port.calls.heard))

    async def say_farewell(self, deadline: float) -> bool:
        """Tell the owner that this process stops. Return whether the owner has confirmed it before the deadline."""
        self.link.say_farewell()
        over = asyncio.ensure_future(
            asyncio.wait({self._confirmed, self.ended_at_all}, return_when=asyncio.FIRST_COMPLETED)
        )
        await done_within(over, self._clock, max(0.0, deadline - self._clock.monotonic()))
        over.cancel()
        return self._confirmed.done()

    def close(self) -> None:
        """End the connection. A second call does nothing."""
        self.link.close()
        self.ended(None)

    @property
    def is_loading(self) -> bool:
        """Whether the copy is being loaded."""
        return self._load is not None

    # What the link tells

    @property
    def acknowledgement(self) -> int:
        """The number up to which this client needs no more answers."""
        return self._port.acknowledgement

    def calls_to_send(self) -> Any:
        """Return the frames of the calls that are to be sent now."""
        return self._port.calls_to_send()

    def starting(self, starting: Starting) -> None:
        """Note that the owner loads its state."""
        self.owner_pid = starting.pid

    def welcomed(self, welcome: Welcome) -> None:
        """Follow the owner: send all open calls, and load the copy if the owner lacks the records for it."""
        self.owner_pid = welcome.pid
        if not welcome.known:
            self._port.forgotten()
            return  # the owner closes the connection
        self._copy.set_epoch(welcome.epoch)
        self._name_durable(welcome.revision)
        if welcome.load:
            task = asyncio.create_task(self._load_copy(), name=f"lab_state {self._name} load")
            self._load = _Load(task)
        self._port.follow(self.link.send_soon, self.link.ask)
        if not welcome.load:
            self._set_ready()

    def refused(self, no: No) -> None:
        """Note that the owner does not admit this process."""
        self._fail(UnsupportedError(f"the owner of the state {self._name!r} does not admit this process: {no.detail}"))

    def record(self, record: memoryview) -> Awaitable[None] | None:
        """Apply a record, or keep it during a load."""
        steps = parse_in_steps(record)
        size = len(record)
        if size < _SMALL:
            try:
                while True:
                    next(steps)
            except StopIteration as stop:
                return self._received(stop.value, size)
        return self._parse(steps, size)

    async def _parse(self, steps: Any, size: int) -> None:
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                more = self._received(stop.value, size)
                break
            await asyncio.sleep(0)
        if more is not None:
            await more

    def _received(self, record: ParsedRecord, size: int) -> Coroutine[Any, Any, None] | None:
        if self._load is not None:
            self._keep(self._load, record, size)
            return None
        if len(record.changes) >= _batch.MANY:
            return self._apply_in_steps(record)
        self._apply(record)
        return None

    def _keep(self, load: _Load, record: ParsedRecord, size: int) -> None:
        load.records.append(record)
        load.bytes += size
        if load.bytes > MOST_KEPT:
            self.close()  # the member connects again, and loads again
        else:
            self._name_durable(record.end)

    def _apply(self, record: ParsedRecord) -> None:
        self._note(self._copy.applier.apply(record), record)

    async def _apply_in_steps(self, record: ParsedRecord) -> None:
        applier = self._copy.applier
        await run_in_steps(applier.prepare(record), bool)
        self._note(applier.finish(), record)

    def _note(self, outcome: Outcome, record: ParsedRecord) -> None:
        if outcome is Outcome.GAP:
            raise BadMessageError("a record that starts above the copy")
        self._name_durable(record.end)
        if outcome is Outcome.APPLIED:
            self._copy.changed(record)

    def answers(self, answers: Sequence[Answer]) -> None:
        """End the calls that were answered. During a load, keep the answers."""
        if self._load is not None:
            self._load.answers += answers
        else:
            self._port.answers(answers)

    def revision(self, durable: int) -> None:
        """Note the durable revision of a sign of life."""
        self._name_durable(durable)

    def reply(self, token: int, revision: int) -> None:
        """Note the answer to a question. During a load, keep it."""
        self._name_durable(revision)
        if self._load is not None:
            self._load.replies.append((token, revision))
        else:
            self._port.arrivals.reply(token, revision)

    def farewell_confirmed(self) -> None:
        """Note that the owner has forgotten this client."""
        if not self._confirmed.done():
            self._confirmed.set_result(None)

    def ended(self, problem: BadMessageError | None) -> None:
        """Note the end of the connection. Drop a load that is under way. A second call does nothing."""
        if self.ended_at_all.done():
            return
        load, self._load = self._load, None
        if load is not None:
            load.task.cancel()
        if self.link.heard is not None:
            self._port.calls.heard = self.link.heard
        self._port.unfollow()
        if isinstance(problem, OtherVersionError):
            self._fail(
                UnsupportedError(
                    f"the owner of the state {self._name!r} has another version of lab_state: {problem}; all processes need one version"
                )
            )
        elif problem is not None and not self.link.is_greeted:
            self._fail(
                UnsupportedError(f"another program answers on the socket of the state {self._name!r}: {problem}")
            )
        if not self.ready.done():
            self.ready.set_result(False)
        self.ended_at_all.set_result(None)

    # Loading

    def _name_durable(self, revision: int) -> None:
        if revision > self.named:
            self.named = revision
            self._named_more.set()

    async def _load_copy(self) -> None:
        """Load the copy, and show it when all of it is durable."""
        try:
            loaded = await self._read()
        except LabStateError as error:
            self._fail(error)
            self.close()
            return
        except Exception as problem:  # noqa: BLE001 -- a storage must not raise it
            self._fail(StorageError(f"the state {self._name!r} could not be read: {described(problem)}"))
            self.close()
            return
        load, self._load = self._load, None
        if load is None:  # the connection has ended in this moment
            return
        self._copy.replace(loaded)
        try:
            for record in load.records:
                self._apply(record)
        except BadMessageError as problem:
            self._logger.warning("%s: closed the connection to the owner: %s", self._name, problem)
            self.close()
            return
        self._port.answers(load.answers)
        for token, revision in load.replies:
            self._port.arrivals.reply(token, revision)
        self._set_ready()

    async def _read(self) -> LoadedState:
        """Read the files until the result is not older than the copy, and wait until the owner has named its revision."""
        while True:
            found = (await load(self._name, self._storage)).state
            while self.named < found.revision:
                self._named_more.clear()
                await self._named_more.wait()
            if not self._copy.has_state or found.revision >= self._copy.applier.copy.revision:
                return found

    def _set_ready(self) -> None:
        if not self.ready.done():
            self.ready.set_result(True)

    def _fail(self, error: LabStateError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # marks it as retrieved


_SMALL = 16 * 1024
"""A record with fewer bytes is decoded in one step."""
