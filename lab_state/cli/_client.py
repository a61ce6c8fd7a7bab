"""A client of a running shared state, without a copy of the state. Each call is sent to the owner.

The client is a process of the shared state, but it applies no record. So it starts at once, also if the state is large. Each
call has a number. If the owner ends without an answer, the client connects to the next owner, and sends the call once more
with the same number and id. The next owner finds the result in its table, or executes the call. So the call is made once, or
not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from lab_state._clock import SystemClock
from lab_state._foreign import described
from lab_state._log import Log
from lab_state.exceptions import ConflictError, UnavailableError, UnsupportedError
from lab_state.shared._answers import Refusal, Settled, ended
from lab_state.shared._election import Doubts
from lab_state.shared._frames import BadMessageError
from lab_state.shared._link import Link
from lab_state.shared._messages import Answer, Call, Failed, Hello, Moved, No, Ok, Raised, Refused, Starting, Welcome
from lab_state.shared._open_calls import NEVER
from lab_state.shared._wire import OtherVersionError, encode_for_owner
from lab_state.storage._fs_socket import peer_of
from lab_state.storage.file import FileStorage

PATIENCE = 10.0
"""The seconds for which a client waits for an owner, or for a sign of life of the owner. `Config.owner_timeout` has the same default."""

_NEXT = 2.0
"""The seconds for which `connect_again` waits for the next owner."""

_AGAIN = 0.05
"""The seconds between two attempts to connect to the next owner."""

Make = Callable[[int, int, int], Call]
"""A function that makes a call from its number, the acknowledgement, and the revision of its check."""


def _ignore(_: memoryview) -> None:
    """Drop a record."""


class Client:
    """A client from its first connection to `aclose`. It makes one call at a time.

    Attributes:
        pid: The pid of the owner.
        revision: The highest revision that the owner has named as durable.
    """

    def __init__(self, storage: FileStorage, name: str, on_record: Callable[[memoryview], object] = _ignore) -> None:
        """Prepare a client. `on_record` gets each record that becomes durable while the client is connected."""
        self.pid: int = 0
        self.revision: int = 0
        self._epoch = 0.0
        self._name = name
        self._files = storage._shared_files()  # noqa: SLF001 -- a manager uses it, too
        self._on_record = on_record
        self._id = os.urandom(16).hex()
        self._clock = SystemClock()
        self._doubts = Doubts(self._clock)
        self._last = 0
        self._unsent: list[bytes] = []
        self._frame: list[bytes] = []
        self._answer: asyncio.Future[Answer] | None = None
        self._connection: _Connection | None = None

    @property
    def now(self) -> float:
        """The time of the state, in seconds since 1970."""
        return self._epoch + self._clock.monotonic()

    async def connect(self) -> bool:
        """Connect to the owner. Return whether it has admitted this client.

        Return False if no process accepts the connection, or if the connection ends before the owner's welcome. Return False, too,
        if the owner may have forgotten this client since the last connection.

        Raises:
            UnsupportedError: The owner refuses this client, or another program answers. Or a permission is missing.
            UnavailableError: The owner gave no sign of life for 10 s. Or the process has too many open files.
        """
        heard = None if self._connection is None else self._connection.link.heard
        own = await self._files.connect(self._name)
        if own is None:
            return False
        connection = _Connection(self, self._name)
        self._connection, self.pid = connection, peer_of(own).pid
        connection.link.open(own, Hello(name=self._name, client=self._id, revision=None, heard=heard, checks=False))
        await self._patient(connection.ready)
        is_admitted = connection.ready.result()
        if not is_admitted:
            connection.link.close()
        return is_admitted

    async def connect_again(self) -> bool:
        """Connect to the next owner, which may not have the lock yet. Return whether there is one.

        If the holder of the lock does not share the state, return False within a second.
        """
        end = self._clock.monotonic() + _NEXT
        while not await self.connect():
            if self._clock.monotonic() >= end or not await self.may_appear():
                return False
            await asyncio.sleep(_AGAIN)
        return True

    async def may_appear(self) -> bool:
        """Return whether an owner may listen soon. Call this after each attempt to connect.

        The answer is False if the lock file has named the same process in several attempts, and that process does not share the
        state on this machine. One attempt is not enough: a process takes the lock first, and only then writes to the lock file
        that it shares the state.
        """
        holder = await self._files.holder(self._name)
        if holder is not None:
            # The first call in a process reads the boot id of the machine, which blocks.
            refusal = await asyncio.to_thread(self._files.refusal, self._name, holder)
            holder = None if refusal is None else holder
        self._doubts.add(holder)
        return not self._doubts.are_over

    def welcomed(self, welcome: Welcome) -> None:
        """Note the pid of the owner, and the revision and time of the state. The open call is sent on each connection."""
        self.pid, self._epoch = welcome.pid, welcome.epoch
        self._unsent = self._frame
        self.named(welcome.revision)

    def named(self, revision: int) -> None:
        """Note a revision that the owner has named as durable."""
        self.revision = max(self.revision, revision)

    def record(self, record: memoryview) -> None:
        """Pass a record to `on_record`."""
        self._on_record(record)

    @property
    def acknowledgement(self) -> int:
        """The number up to which this client needs no answer."""
        return self._last - (self._answer is not None)

    def take_frame(self) -> list[bytes]:
        """Return the frame of the open call, once for each connection; empty if there is none."""
        taken, self._unsent = self._unsent, []
        return taken

    def answered(self, answer: Answer) -> None:
        """Give the answer to the open call. Ignore an answer to another call."""
        if self._answer is not None and not self._answer.done() and answer.n == self._last:
            self._answer.set_result(answer)

    async def call(self, make: Make, since: int = NEVER) -> Settled:
        """Make a call, and return its result. `since` is the revision of its check.

        Raises:
            ConflictError: The check does not hold: one of its keys has changed after `since`, or the owner that got the call
                first has ended. Nothing was changed.
            TypeMismatchError: The stored value does not allow the call. Nothing was changed.
            InvalidValueError: The call is too large for one message, or the owner refuses the new value. Nothing was changed.
            UnavailableError: No owner has answered for 10 s. The call was made once, or not at all.
            UnsupportedError: The next owner does not admit this client.
            StorageError: The owner could not write. The change may still become durable.
        """
        self._last += 1
        self._frame = self._unsent = encode_for_owner(make(self._last, self._last - 1, since))
        self._answer = asyncio.get_running_loop().create_future()
        try:
            answer = await self._settled(make)
        finally:
            self._answer, self._frame = None, []
        made = ended(answer, [], 0)
        if isinstance(made, Refusal):
            raise ConflictError("the key was changed meanwhile, so nothing was written: read it again")
        return made

    async def _settled(self, make: Make) -> Ok | Raised | Refused | Failed:
        """Send the open call until an owner has answered. For the errors, see `call`."""
        while True:
            assert self._connection is not None
            assert self._answer is not None
            self._connection.link.send_soon()
            await self._patient(self._answer, self._connection.over)
            if not self._answer.done():
                # The check was valid only for the owner that got it first.
                self._frame = encode_for_owner(make(self._last, self._last - 1, NEVER))
            elif isinstance(answer := self._answer.result(), Moved):
                self._answer = asyncio.get_running_loop().create_future()
            else:
                return answer
            await self._reconnect()

    async def _reconnect(self) -> None:
        """Connect to the next owner. After its welcome, the open call counts as not sent, and is sent again."""
        assert self._connection is not None
        self._connection.link.close()
        end = self._clock.monotonic() + PATIENCE
        while not await self.connect():
            if self._clock.monotonic() >= end:
                raise self._unknown(
                    f"the owner of the state {self._name!r} ended without an answer, and no other process has answered since"
                )
            await asyncio.sleep(_AGAIN)

    def _unknown(self, cause: str) -> UnavailableError:
        """Return the error for an open call that was not answered."""
        error = UnavailableError(f"{cause}. The change was made once, or not at all: read the state to find out")
        error.outcome = "unknown"
        return error

    async def reach(self, revision: int) -> None:
        """Wait until the owner has named a revision as durable.

        Raises:
            UnavailableError: The owner has not named such a revision within 10 s, or has ended.
        """
        connection = self._connection
        assert connection is not None
        end = self._clock.monotonic() + PATIENCE
        while self.revision < revision and not connection.over.done() and self._clock.monotonic() < end:
            connection.link.ask(1)
            await asyncio.sleep(_AGAIN)
        if self.revision < revision:
            raise UnavailableError(
                f"the owner of the state {self._name!r} has not made revision {revision} durable; try again"
            )

    async def _patient(self, *futures: asyncio.Future[Any]) -> None:
        """Wait until one of the futures is done.

        Raises:
            UnavailableError: The owner gave no sign of life.
        """
        assert self._connection is not None
        while not any(future.done() for future in futures):
            silent = self._connection.link.silent_for()
            if silent >= PATIENCE:
                cause = f"the owner of the state {self._name!r} (pid {self.pid}) gave no sign of life for {silent:.0f} s: it may hang"
                if self._answer is not None:
                    raise self._unknown(cause)
                raise UnavailableError(f"{cause}. Nothing was changed: try again, or end that process")
            await asyncio.wait(futures, timeout=PATIENCE - silent, return_when=asyncio.FIRST_COMPLETED)

    def watch(self, on_end: Callable[[], object]) -> None:
        """Ask the owner to delete each key at its expiry. Otherwise the owner may delete the key up to a second later.

        `on_end` is called when the connection has ended.
        """
        assert self._connection is not None
        self._connection.link.watch(are_watched=True)
        self._connection.over.add_done_callback(lambda _: on_end())

    async def aclose(self) -> None:
        """Tell the owner that this client ends, and close the connection. A second call does nothing."""
        if self._connection is not None:
            if self._connection.link.is_open:
                self._connection.link.say_farewell()
                await asyncio.wait([self._connection.over], timeout=1.0)
            self._connection.link.close()


class _Connection:
    """The client's side of one connection: a `ClientSide`.

    Attributes:
        link: The connection.
        ready: A future. Its result is whether the owner has admitted the client.
        over: A future that is done when the connection has ended.
    """

    def __init__(self, client: Client, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[bool] = loop.create_future()
        self.over: asyncio.Future[bool] = loop.create_future()
        self.link: Link = Link(self, clock=SystemClock(), log=Log(logging.getLogger("lab_state")))
        self._client = client
        self._name = name

    @property
    def acknowledgement(self) -> int:
        """The number up to which the client needs no answer; see `ClientSide`."""
        return self._client.acknowledgement

    def calls_to_send(self) -> Iterable[bytes | memoryview]:
        """Return the frame of the open call."""
        return self._client.take_frame()

    def starting(self, starting: Starting) -> None:
        """Note the pid of the owner."""
        self._client.pid = starting.pid

    def welcomed(self, welcome: Welcome) -> None:
        """Note the welcome."""
        self._client.welcomed(welcome)
        self._settle(self.ready, welcome.known)

    def refused(self, no: No) -> None:
        """Make `Client.connect` raise an error."""
        self._fail(f"the owner of the state {self._name!r} does not admit this process: {no.detail}")

    def record(self, record: memoryview) -> Awaitable[None] | None:
        """Pass the record to the client."""
        self._client.record(record)
        return None

    def answers(self, answers: Sequence[Answer]) -> None:
        """Give the answers to the client."""
        for answer in answers:
            self._client.answered(answer)

    def revision(self, durable: int) -> None:
        """Note the durable revision."""
        self._client.named(durable)

    def reply(self, token: int, revision: int) -> None:
        """Note the durable revision."""
        self._client.named(revision)

    def farewell_confirmed(self) -> None:
        """Do nothing, because `ended` is called next."""

    def ended(self, problem: BadMessageError | None) -> None:
        """Note the end of the connection."""
        if isinstance(problem, OtherVersionError):
            self._fail(
                f"the owner of the state {self._name!r} has another version of lab_state: {problem}; use its version"
            )
        elif problem is not None and not self.link.is_greeted:
            self._fail(f"another program answers at the socket of the state {self._name!r}: {described(problem)}")
        self._settle(self.ready, False)
        self._settle(self.over, True)

    def _fail(self, message: str) -> None:
        self.ready.set_exception(UnsupportedError(message))

    def _settle(self, future: asyncio.Future[bool], result: bool) -> None:  # noqa: FBT001 -- a result
        if not future.done():
            future.set_result(result)
