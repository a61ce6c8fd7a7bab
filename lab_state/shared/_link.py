"""A client's end of its connection to the owner. It sends a hello and calls, and receives records and answers.

`Link` checks the order of messages. `ClientSide` has the copy and the open calls. All methods of `ClientSide`
are synchronous, except that a large record may be applied in steps.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Iterable, Sequence
from typing import Protocol

from lab_state._clock import Clock, Timer
from lab_state._log import Log
from lab_state.shared._channel import LIFE, Channel, fault_of
from lab_state.shared._frames import FROM_OWNER, BadMessageError, ReceivedFrame
from lab_state.shared._messages import (
    Answer,
    Answers,
    Bye,
    Expiries,
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
from lab_state.shared._order import OwnerOrder
from lab_state.shared._wire import decode_from_owner, encode_for_owner

_MOST_RECEIVED = 64 * 1024
"""The largest number of bytes that a link receives in one step of the event loop."""


class ClientSide(Protocol):
    """The interface of the client for its link. Each method is called on the event loop, and may close the link."""

    @property
    def acknowledgement(self) -> int:
        """The highest number such that the client needs no answer to the call with this number, nor to any call before it."""
        ...

    def calls_to_send(self) -> Iterable[bytes | memoryview]:
        """Return the frames of the calls that are to be sent now, in order and in parts.

        The link calls this once after a step of the event loop, if `Link.send_soon` was called in that step, or if a
        welcome admitted the client in that step.
        """
        ...

    def starting(self, starting: Starting) -> None:
        """Note that the owner is loading its state. The link waits for the next answer to the hello."""
        ...

    def welcomed(self, welcome: Welcome) -> None:
        """Handle the welcome. If it admits the client, the link then calls `calls_to_send`."""
        ...

    def refused(self, no: No) -> None:
        """Note that the owner does not admit this process. `ended` follows."""
        ...

    def record(self, record: memoryview) -> Awaitable[None] | None:
        """Apply a record, or keep it. If this returns an awaitable, the link awaits it before the next message.

        Raises:
            BadMessageError: The bytes are not a record, or the record starts above the revision of the copy. The link ends.
        """
        ...

    def answers(self, answers: Sequence[Answer]) -> None:
        """End the calls that were answered. All records up to the revisions of the answers were received before.

        A refusal is the exception: its revision may not be durable yet.
        """
        ...

    def revision(self, durable: int) -> None:
        """Note the durable revision of a sign of life."""
        ...

    def reply(self, token: int, revision: int) -> None:
        """Note the answer to `Link.ask`. All records up to the revision were received before."""
        ...

    def farewell_confirmed(self) -> None:
        """Note that the owner has forgotten this client. `ended` follows."""
        ...

    def ended(self, problem: BadMessageError | None) -> None:
        """Note the end of the connection. `problem` is the fault of the owner; `None` if there was none.

        The link makes this call last, and at most once. After `Link.close`, the link does not make this call.
        """
        ...


class Link:
    """A connection to the owner.

    Attributes:
        heard: The owner's time in the last message, in nanoseconds; `None` before the first message.
        is_greeted: Whether an owner has answered the hello. Before that, the other end may be another program.
        is_admitted: Whether calls can be sent: from a welcome that admits the client to the farewell or the end. The
            `ClientSide` may set it to False, so that no call is sent.
    """

    def __init__(self, side: ClientSide, *, clock: Clock, log: Log) -> None:
        """Prepare a link. `clock` measures silence, and the time between signs of life."""
        self.heard: int | None = None
        self.is_greeted: bool = False
        self.is_admitted: bool = False
        self._side = side
        self._clock = clock
        self._log = log
        self._name = ""
        self._order = OwnerOrder()
        self._channel: Channel | None = None
        self._timer: Timer | None = None
        self._is_asked_soon = False
        self._is_closed = False

    @property
    def is_open(self) -> bool:
        """Whether messages are sent and handled."""
        return self._channel is not None and self._channel.is_open

    def open(self, connected: socket.socket, hello: Hello) -> None:
        """Send the hello over a connected socket, and begin to receive. Do not wait for an answer.

        The socket belongs to the link from now on. A link is opened once.
        """
        self._name = hello.name
        self._channel = Channel(
            connected,
            FROM_OWNER,
            self._handle,
            self._end,
            clock=self._clock,
            most_received=_MOST_RECEIVED,
            most_waiting=None,  # the window of `OpenCalls` limits the bytes that wait
        )
        self._channel.send(encode_for_owner(hello))
        self._timer = self._clock.call_later(LIFE, self._tick)

    def send_soon(self) -> None:
        """Send what `ClientSide.calls_to_send` returns, after this step of the event loop. So the calls of many tasks are sent together.

        If no calls can be sent, do nothing.
        """
        if self.is_admitted and not self._is_asked_soon:
            self._is_asked_soon = True
            asyncio.get_running_loop().call_soon(self._send_calls)

    def ask(self, token: int) -> None:
        """Ask the owner for its durable revision, if calls can be sent. `ClientSide.reply` gets the answer."""
        self._send(Question(token))

    def watch(self, *, are_watched: bool) -> None:
        """Tell the owner whether this client has a watch, if calls can be sent."""
        self._send(Expiries(are_watched))

    def say_farewell(self) -> None:
        """Tell the owner that this client stops. From now on, nothing is sent."""
        self._send(Bye(self._side.acknowledgement))
        self.is_admitted = False

    def silent_for(self) -> float:
        """Return the seconds since bytes were last received. The result is 0 if bytes have arrived that were not read yet.

        Otherwise a process whose event loop was blocked would treat the owner as silent. The result is also 0 before
        `open` and after the end.
        """
        if self._channel is None or self._channel.has_unread:
            return 0.0
        return self._clock.monotonic() - self._channel.received_at

    def close(self) -> None:
        """Close the connection at once. The link no longer calls its `ClientSide`. A second call does nothing."""
        self._is_closed = True
        self._stop()
        if self._channel is not None:
            self._channel.close()

    def _stop(self) -> None:
        self.is_admitted = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send(self, message: Question | Expiries | Bye | Life) -> None:
        if self.is_admitted and self._channel is not None:
            self._channel.send(encode_for_owner(message))

    def _send_calls(self) -> None:
        self._is_asked_soon = False
        if self.is_admitted and self._channel is not None:
            self._channel.send(self._side.calls_to_send())
            self._channel.flush()  # send now, because this runs at the end of the step

    def _tick(self) -> None:
        self._timer = self._clock.call_later(LIFE, self._tick)
        self._send(Life(self._side.acknowledgement))

    def _handle(self, frame: ReceivedFrame) -> Awaitable[None] | None:
        time, message = decode_from_owner(frame)
        self._order.check(time, message)
        self.heard = time
        if isinstance(message, RecordMessage):
            return self._side.record(message.record)
        if isinstance(message, Answers):
            self._side.answers(message.answers)
        else:
            self._handle_other(message)
        return None

    def _handle_other(self, message: FromOwner) -> None:
        if isinstance(message, Life):
            self._side.revision(message.number)
        elif isinstance(message, Reply):
            self._side.reply(message.token, message.revision)
        elif isinstance(message, Bye):
            self._side.farewell_confirmed()
        else:
            self.is_greeted = True
            if isinstance(message, Starting):
                self._side.starting(message)
            elif isinstance(message, Welcome):
                self._receive_welcome(message)
            else:
                assert isinstance(message, No)
                self._side.refused(message)

    def _receive_welcome(self, welcome: Welcome) -> None:
        self.is_admitted = welcome.known
        self._side.welcomed(welcome)
        self.send_soon()

    def _end(self, problem: BadMessageError | None) -> None:
        self._stop()
        if self._is_closed:
            return
        if problem is not None and self._channel is not None:
            self._log.warning(
                "%s: closed the connection to the owner: %s", self._name, fault_of(self._channel, problem)
            )
        self._side.ended(problem)
