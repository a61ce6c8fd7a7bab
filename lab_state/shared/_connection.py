"""The owner's end of the connection to one client. It receives a hello and calls, and sends records and answers.

`Connection` checks the order of messages. `OwnerSide` admits clients and executes calls. No public method of the two is a
coroutine function, but `OwnerSide.call` may return an awaitable. So a record, and the answers that wait for it, are put
into the queue in one step, and are sent together.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

from lab_state._bulk import run_whole
from lab_state._clock import Clock
from lab_state._log import Log
from lab_state.exceptions import InvalidValueError
from lab_state.shared._channel import Channel, fault_of
from lab_state.shared._frames import CALL, FROM_CLIENT, BadMessageError, ReceivedFrame
from lab_state.shared._messages import (
    Answer,
    Answers,
    Bye,
    Call,
    Expiries,
    FromClient,
    FromOwner,
    Hello,
    Life,
    No,
    Question,
    RecordMessage,
    Reply,
    Starting,
    Welcome,
)
from lab_state.shared._order import ClientOrder
from lab_state.shared._queue import MOST_WAITING
from lab_state.shared._wire import OtherVersionError, decode_call_in_steps, decode_from_client, encode_for_client

_PATIENCE = 5.0
"""The time limit in seconds: for the hello of a client, and for a client to receive the last messages of the owner."""

_LARGE = 64 * 1024
"""A call with at least this many bytes is decoded in steps."""

_MOST_RECEIVED = 16 * 1024
"""The largest number of bytes that a connection receives in one step of the event loop. The calls of 25 tasks have a few
thousand bytes.
"""


class OwnerSide(Protocol):
    """The interface of the owner for its connections. Each method is called on the event loop, and may close connections."""

    @property
    def durable_revision(self) -> int:
        """The revision of the owner's copy. Each record up to this revision was given to the connections."""
        ...

    def greeting(self, hello: Hello) -> Welcome | Starting | No:
        """Return the answer to a hello. After `Starting`, the connection asks again each second, and at `Server.greet_waiting`."""
        ...

    def admit(self, connection: Connection, hello: Hello) -> int:
        """Accept a known client, after the welcome was put into the queue. Send the records that the copy of the client lacks.

        Return the acknowledgement of the client's earlier connections; 0 if there was none.
        """
        ...

    def call(self, connection: Connection, call: Call) -> Awaitable[None] | None:
        """Execute a call, and note its acknowledgement. The connection has checked the order of both numbers.

        If this returns an awaitable, the connection handles its next message after that.
        """
        ...

    def acknowledge(self, client: str, number: int) -> None:
        """Note the acknowledgement of a message that is not a call."""
        ...

    def farewell(self, client: str) -> None:
        """Forget a client. The connection sends the confirmation."""
        ...

    def watched(self) -> None:
        """Note that a client has said whether it has a watch; see `Connection.is_watching`."""
        ...

    def left(self, connection: Connection) -> None:
        """Drop the answers that wait for a connection. This is called once for each admitted connection, when it ends or is finished."""
        ...


class Connection:
    """One connection of a client.

    Attributes:
        client: The id of the client; empty before the hello.
        is_admitted: Whether the client is admitted and has not left. Records and answers are sent only to such a client.
        is_watching: Whether the client has a watch.
    """

    def __init__(
        self,
        owner: OwnerSide,
        connected: socket.socket,
        pid: int,
        *,
        name: str,
        by_client: dict[str, Connection],
        ended: Callable[[Connection], object],
        clock: Clock,
        log: Log,
        monotonic_ns: Callable[[], int],
    ) -> None:
        """Begin to receive on a connected socket that does not block, and wait for the hello.

        Args:
            owner: The owner's side.
            connected: The socket. It is closed with the connection.
            pid: The process id of the other end.
            name: The name of the state, for the log.
            by_client: The present connection of each client. A connection adds and removes itself.
            ended: A function that is called once, when the connection has ended.
            clock: The clock for the time limits.
            log: The log.
            monotonic_ns: The source of the time in each message.
        """
        self.client: str = ""
        self.is_admitted: bool = False
        self.is_watching: bool = False
        self._owner = owner
        self._pid = pid
        self._name = name
        self._by_client = by_client
        self._has_ended = ended
        self._clock = clock
        self._log = log
        self._time = monotonic_ns
        self._hello: Hello | None = None
        self._order = ClientOrder()
        self._until = clock.monotonic() + _PATIENCE
        self._channel = Channel(
            connected,
            FROM_CLIENT,
            self._handle,
            self._end,
            clock=clock,
            most_received=_MOST_RECEIVED,
            most_waiting=MOST_WAITING,
        )

    @property
    def is_open(self) -> bool:
        """Whether messages are handled and sent."""
        return self._channel.is_open

    def record(self, data: bytes) -> None:
        """Send a record. If the client cannot take the record, close the connection. Then the client connects again."""
        self._send(RecordMessage(memoryview(data)))

    def answers(self, answers: Sequence[Answer]) -> None:
        """Send answers in one message. If the connection is not open, do nothing: the client sends its calls again."""
        self._send(Answers(answers))

    def send_parts(self, parts: list[bytes]) -> None:
        """Send a message that was encoded for all clients. If too many bytes wait, close the connection."""
        if not self._channel.send(parts):
            self._cut_off(f"it reads too slowly: more than {MOST_WAITING} bytes wait for it")

    def tick(self, now: float) -> None:
        """Send a sign of life, greet again, or close a connection whose time limit has passed. Call this each second."""
        if self.is_admitted:
            self._send(Life(self._owner.durable_revision))
        elif now >= self._until:
            if self.is_open:
                self._log.warning(
                    "%s: closed the connection of process %d: it sent no hello in %g s",
                    self._name,
                    self._pid,
                    _PATIENCE,
                )
            self.close()
        else:
            self.greet()

    def greet(self) -> None:
        """Answer the hello, if it came and the client is not admitted yet."""
        hello = self._hello
        if hello is None or self.is_admitted or not self.is_open:
            return
        answer = self._owner.greeting(hello)
        self._send(answer)
        if isinstance(answer, Starting):
            return
        if isinstance(answer, Welcome) and answer.known:
            self.is_admitted = True
            self._order.resume(self._owner.admit(self, hello))
            return
        if isinstance(answer, No):
            self._log.warning("%s: refused the process %d: %s", self._name, self._pid, answer.detail)
        self.finish()

    def finish(self) -> None:
        """Close the connection when all waiting messages are sent, or after about 5 s at the latest. From now on, no message is handled."""
        self._until = self._clock.monotonic() + _PATIENCE
        self._leave()
        self._channel.finish()

    def close(self) -> None:
        """Close the connection at once. A second call does nothing."""
        self._leave()
        self._channel.close()

    def _leave(self) -> None:
        if self._by_client.get(self.client) is self:
            del self._by_client[self.client]
        if self.is_admitted:
            self.is_admitted = False
            self._owner.left(self)

    def _cut_off(self, why: str) -> None:
        self._log.warning("%s: closed the connection of process %d: %s", self._name, self._pid, why)
        self.close()

    def _send(self, message: FromOwner) -> None:
        try:
            parts = encode_for_client(self._time(), message)
        except InvalidValueError as problem:
            self._cut_off(str(problem))
        else:
            self.send_parts(parts)

    def _handle(self, frame: ReceivedFrame) -> Awaitable[None] | None:
        if frame.kind == CALL and len(frame.payload) >= _LARGE:
            return self._handle_large(frame)
        try:
            message = decode_from_client(frame)
        except OtherVersionError as problem:
            self._log.warning("%s: refused the process %d: %s", self._name, self._pid, problem)
            self._send(No(reason="protocol", detail=str(problem)))
            self.finish()
            return None
        if frame.kind == CALL:
            return self._handle_call(cast("Call", message))
        self._order.check(message)
        self._handle_other(message)
        return None

    async def _handle_large(self, frame: ReceivedFrame) -> None:
        call = await run_whole(decode_call_in_steps(frame.payload))
        if self.is_open and (waits := self._handle_call(call)) is not None:
            await waits

    def _handle_call(self, call: Call) -> Awaitable[None] | None:
        self._order.check_call(call)
        if not self.is_admitted:
            raise BadMessageError("a message before the welcome")
        return self._owner.call(self, call)

    def _handle_other(self, message: FromClient) -> None:
        if isinstance(message, Hello):
            self._receive_hello(message)
        elif not self.is_admitted:
            if not isinstance(message, Life):
                raise BadMessageError("a message before the welcome")
        elif isinstance(message, Question):
            self._send(Reply(message.token, self._owner.durable_revision))
        elif isinstance(message, Life):
            self._owner.acknowledge(self.client, message.number)
        elif isinstance(message, Expiries):
            self.is_watching = message.are_watched
            self._owner.watched()
        else:
            assert isinstance(message, Bye)
            self._owner.acknowledge(self.client, message.number)
            self._owner.farewell(self.client)
            self._send(Bye(0))
            self.finish()

    def _receive_hello(self, hello: Hello) -> None:
        if (other := self._by_client.get(hello.client)) is not None:
            other.close()  # close the older connection first, so that none of its calls is executed from now on
        self._until = math.inf
        self._hello = hello
        self.client = hello.client
        self._by_client[hello.client] = self
        self.greet()

    def _end(self, problem: BadMessageError | None) -> None:
        if problem is not None:
            why = fault_of(self._channel, problem)
            self._log.warning("%s: closed the connection of process %d: %s", self._name, self._pid, why)
        self._leave()
        self._has_ended(self)
