"""A process of a shared state that is not the owner: its connection to the owner, and its copy.

Theory of operation. The follower applies the records that it receives to its copy. If the owner no longer has all
records that the copy lacks, the follower loads the copy from the files, without the lock. Records and answers that
arrive during the load are kept. The last record in the journal may not be synced yet. So the loaded state is shown
only when the owner has reported its revision as durable. If the connection ends before that, the load and all kept
messages are dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from lab_state import _batch
from lab_state._clock import Clock, done_within
from lab_state._codec import LoadedState
from lab_state._entries import Versions
from lab_state._foreign import described
from lab_state._loading import load
from lab_state._log import Log
from lab_state._migrations import WITHOUT, Schema, check_follower
from lab_state.exceptions import LabStateError, SchemaError, StorageError, UnavailableError, UnsupportedError
from lab_state.shared._copy import SharedCopy
from lab_state.shared._found import check_reaches
from lab_state.shared._frames import BadMessageError
from lab_state.shared._link import Link
from lab_state.shared._messages import Answer, Hello, No, Starting, Welcome
from lab_state.shared._records import Outcome, ParsedRecord, parse_in_turns, parse_record
from lab_state.shared._wire import OtherVersionError
from lab_state.storage._fs_socket import OwnSocket, peer_of
from lab_state.storage._protocol import Storage

MOST_KEPT = 64 * 1024 * 1024
"""The largest total size of the records that are kept during a load, in bytes."""

_SMALL = 16 * 1024
"""A record with fewer bytes is decoded in one step."""


class _Load:
    """A load that is under way, and the messages that have arrived meanwhile."""

    def __init__(self) -> None:
        self.records: list[ParsedRecord] = []
        self.answers: list[Answer] = []
        self.replies: list[tuple[int, int]] = []
        self.bytes = 0


class Follower:
    """One connection to an owner, from the hello to its end.

    Attributes:
        link: The connection.
        ready: A future. Its result is True when the copy can be read and calls can be sent, and False if the
            connection ended before that. If this process cannot follow the owner, the future has the error.
        over: A future that is done when the connection has ended.
        owner_pid: The pid of the owner; 0 before `open`. Before the owner sends its pid, this is the pid that the kernel
            reports, which is 0 for a process in another container.
        has_left: Whether the owner has confirmed the farewell of this client.
        is_bad: Whether a received record could not be decoded. Then the next connection must begin with a load.
    """

    def __init__(  # noqa: PLR0917 -- all are needed, and each has a type of its own
        self,
        name: str,
        storage: Storage,
        copy: SharedCopy,
        clock: Clock,
        logger: Log,
        met: Callable[[], object],
        schema: Schema = WITHOUT,
    ) -> None:
        """Prepare a connection.

        Args:
            name: The name of the state.
            storage: The storage of the state, for a load.
            copy: The copy of this process.
            clock: The clock of the manager.
            logger: The logger of the manager.
            met: A callback. It is called for a `Welcome` and for each `Starting`.
            schema: The schema of the code.
        """
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[bool] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.owner_pid: int = 0
        self.has_left: bool = False
        self.is_bad: bool = False
        self.link: Link = Link(self, clock=clock, log=logger)
        self._name = name
        self._storage = storage
        self._copy = copy
        self._port = copy.port
        self._clock = clock
        self._logger = logger
        self._met = met
        self._schema = schema
        self._load: _Load | None = None
        self._loading: asyncio.Task[None] | None = None
        self._is_known = False
        self._welcomed_at = 0  # the durable revision in the welcome
        self._named = 0  # the highest durable revision that the owner has reported
        self._named_more = asyncio.Event()

    def open(self, connected: OwnSocket, *, anew: bool) -> None:
        """Send the hello over a connected socket.

        With `anew`, send no revision. So this process loads the state again, even if it has a copy.
        """
        self.owner_pid = peer_of(connected).pid
        copy, port = self._copy, self._port
        revision = copy.state.revision if copy.has_state and not anew else None
        self.link.open(connected, Hello(name=self._name, client=port.client, revision=revision, heard=port.calls.heard))

    async def limit_silence(self, patience: float) -> None:
        """Wait until a start can use the connection, or the connection has ended.

        Raises:
            UnavailableError: The owner was silent for `patience` seconds.
        """
        while not self.ready.done():
            silent = self.link.silent_for()
            if silent >= patience:
                raise UnavailableError(
                    f"the owner of {self._name!r} (pid {self.owner_pid}) gave no sign of life for {silent:.0f} s: it "
                    "may hang; call start() again, or end that process"
                )
            await done_within(self.ready, self._clock, patience - silent)

    async def say_farewell(self, deadline: float) -> bool:
        """Tell the owner that this process is stopping. Return whether the owner confirmed the message before the deadline.

        The deadline is in seconds of the clock.
        """
        self.link.say_farewell()
        await done_within(self.over, self._clock, max(0.0, deadline - self._clock.monotonic()))
        return self.has_left

    def close(self) -> None:
        """End the connection. A second call does nothing."""
        self.link.close()
        self.ended(None)

    def abandon(self) -> None:
        """End the connection after its event loop was closed. No task waits for `ready` or `over`."""
        self.link.close()
        self._note_heard()  # otherwise an owner that has forgotten this client would execute its calls again

    # Calls of the link

    @property
    def acknowledgement(self) -> int:
        """The highest number such that the client needs no answer to the call with this number, nor to any call before it."""
        return self._port.acknowledgement

    def calls_to_send(self) -> Iterable[bytes | memoryview]:
        """Return the frames of the calls that are to be sent now."""
        return self._port.calls_to_send()

    def starting(self, starting: Starting) -> None:
        """Note that the owner is still loading its state.

        Store the time of this message as the last sign of life of an owner. There is one exception: if an owner may have
        forgotten this client since the time that is stored now, keep that time. A hello contains the stored time. By this
        time, an owner decides whether it may have forgotten the client.
        """
        self.owner_pid = starting.pid
        heard, calls = self.link.heard, self._port.calls
        if heard is not None and not calls.is_forgotten(heard):
            calls.heard = heard
        self._met()

    def welcomed(self, welcome: Welcome) -> None:
        """Follow the owner: send all open calls. Load the copy if the owner no longer has all records that the copy lacks.

        If the owner has forgotten this client, take a new id instead. The owner then closes the connection. If the state
        of the owner is older than the copy, send no call. In this case, the load raises a `CorruptionError`. If the code of
        this process does not fit the schema of the state, end the connection with a `SchemaError`.
        """
        self.owner_pid = welcome.pid
        self._met()
        if (error := self._schema_fault(welcome)) is not None:
            self.link.is_admitted = False  # no call may be sent
            self._give_up(error)
            return
        if not welcome.known:
            self._port.forgotten()
            return  # the owner closes the connection
        self._is_known = True
        self._copy.epoch = welcome.epoch
        self._welcomed_at = welcome.revision
        self._name_durable(welcome.revision)
        is_behind = self._copy.has_state and welcome.revision < self._copy.state.revision
        if welcome.load or is_behind:
            self._load = _Load()
            self._loading = asyncio.create_task(self._load_copy(), name=f"lab_state {self._name} load")
        if is_behind:
            self.link.is_admitted = False  # the load raises an error: no call may change a state that was replaced
            return
        self._port.follow(self.link.send_soon, self.link.ask)
        if self._copy.watchers:
            self.link.watch(are_watched=True)
        if not welcome.load:
            self.ready.set_result(True)

    def _schema_fault(self, welcome: Welcome) -> SchemaError | None:
        """Return the error if the code of this process has a schema that does not fit the state; otherwise `None`."""
        versions = Versions(welcome.schema, welcome.readable_by)
        try:
            check_follower(versions, self._schema, self._name, self.owner_pid)
        except SchemaError as error:
            return error
        return None

    def refused(self, no: No) -> None:
        """Note that the owner does not admit this process."""
        self._fail(UnsupportedError(f"the owner of the state {self._name!r} does not admit this process: {no.detail}"))

    def record(self, record: memoryview) -> Awaitable[None] | None:
        """Apply a record, or keep it during a load. For a large record, return an awaitable that does this in steps."""
        if len(record) >= _SMALL:
            return self._record_in_turns(record)
        try:
            parsed = parse_record(record)
        except BadMessageError:
            self.is_bad = True
            raise
        if self._load is not None:
            self._keep(self._load, parsed, len(record))
        elif len(parsed.changes) >= _batch.MANY:
            return self._apply_in_turns(parsed)
        else:
            self._note(self._copy.applier.apply(parsed), parsed)
        return None

    async def _record_in_turns(self, record: memoryview) -> None:
        try:
            parsed = await parse_in_turns(record)
        except BadMessageError:
            self.is_bad = True
            raise
        if self._load is not None:
            self._keep(self._load, parsed, len(record))
        else:
            await self._apply_in_turns(parsed)

    def _keep(self, load: _Load, record: ParsedRecord, size: int) -> None:
        load.records.append(record)
        load.bytes += size
        if load.bytes > MOST_KEPT:
            self.close()  # the load begins again on a new connection
        else:
            self._name_durable(record.end)

    async def _apply_in_turns(self, record: ParsedRecord) -> None:
        self._note(await self._copy.apply_in_turns(record), record)
        # This works in steps, because freeing 100,000 keys at once would take 10 ms.
        self._copy.state.free(record.changes)

    def _note(self, outcome: Outcome, record: ParsedRecord) -> None:
        if outcome is Outcome.GAP:
            raise BadMessageError("a gap in the records: this one does not follow the revision of the copy")
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
        """Note the answer to a question. During a load, keep the answer."""
        self._name_durable(revision)
        if self._load is not None:
            self._load.replies.append((token, revision))
        else:
            self._port.arrivals.reply(token, revision)

    def farewell_confirmed(self) -> None:
        """Note that the owner has forgotten this client."""
        self.has_left = True

    def ended(self, problem: BadMessageError | None) -> None:
        """Note the end of the connection. Drop a load that is under way. A second call does nothing."""
        if self.over.done():
            return
        self._load = None
        if self._loading is not None:
            self._loading.cancel()
        self._note_heard()
        self._port.unfollow()
        if problem is not None and (error := self._fault(problem)) is not None:
            self._fail(error)
        if not self.ready.done():
            self.ready.set_result(False)
        self.over.set_result(None)

    def _note_heard(self) -> None:
        if self._is_known:
            self._port.calls.heard = self.link.heard

    def _fault(self, problem: BadMessageError) -> UnsupportedError | None:
        """Return the error for a bad message, if another connection would have the same fault; otherwise `None`."""
        if isinstance(problem, OtherVersionError):
            return UnsupportedError(
                f"the owner of the state {self._name!r} (pid {self.owner_pid}) has another version of lab_state: "
                f"{problem}; all processes must run the same version"
            )
        if not self.link.is_greeted and not self._copy.has_state:
            return UnsupportedError(
                f"another program (pid {self.owner_pid}) answers at the socket of the state {self._name!r}: {problem}"
            )
        return None

    # Loading

    def _name_durable(self, revision: int) -> None:
        if revision > self._named:
            self._named = revision
            self._named_more.set()

    async def _load_copy(self) -> None:
        """Load the copy, and show it when all of it is durable."""
        try:
            loaded = await self._read()
            load, self._load = self._load, None
            assert load is not None  # the end of the connection would have cancelled this task
            self._show(loaded, load)
        except LabStateError as error:
            self._give_up(error)
        except Exception as problem:  # noqa: BLE001 -- such as a MemoryError; a start waits for this task
            self._give_up(StorageError(f"the state {self._name!r} could not be read: {described(problem)}"))

    def _show(self, loaded: LoadedState, load: _Load) -> None:
        """Show the loaded state with the kept records. Then handle the kept answers, in order."""
        self._copy.load(loaded)
        try:
            for record in load.records:
                self._note(self._copy.applier.apply(record), record)
        except BadMessageError as problem:
            self._logger.warning("%s: closed the connection to the owner: %s", self._name, problem)
            self.close()
            return
        self._port.answers(load.answers)
        for token, revision in load.replies:
            self._port.arrivals.reply(token, revision)
        self.ready.set_result(True)

    async def _read(self) -> LoadedState:
        """Read the files until the result is at least as new as the copy, and return the result.

        After each reading, wait until the owner has reported the revision of the result as durable.

        Raises:
            CorruptionError: The state of the owner is older than the copy, or the files are damaged.
            LabStateError: The files cannot be read.
        """
        while True:
            found, _, _, path, _ = await load(self._name, self._storage)
            if self._copy.has_state:
                check_reaches(self._welcomed_at, self._copy.state.revision, path)
            while self._named < found.revision:
                self._named_more.clear()
                await self._named_more.wait()
            if not self._copy.has_state or found.revision >= self._copy.state.revision:
                return found

    def _give_up(self, error: LabStateError) -> None:
        """End the connection with an error, unless it has ended."""
        self._fail(error)
        self.close()

    def _fail(self, error: LabStateError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # marks the error as retrieved, because there may be no task that waits
