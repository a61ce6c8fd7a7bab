"""One end of a connection between two processes of a shared state: frames over a socket.

No task waits for the bytes of a connection: the event loop calls a function when bytes have arrived,
or when the socket accepts bytes again. All messages of one step of the event loop are sent together after the step.
If the messages are small, this needs only one system call.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias

from lab_state._clock import Clock
from lab_state.shared._frames import BadMessageError, Frames, ReceivedFrame
from lab_state.shared._queue import SendQueue

LIFE = 1.0
"""The time in seconds between two signs of life."""

Handle: TypeAlias = Callable[[ReceivedFrame], Awaitable[None] | None]
"""A function that handles a frame. If it returns an awaitable, no other frame is handled until the awaitable is done."""

Ended: TypeAlias = Callable[[BadMessageError | None], object]
"""A function that is called at the end of a connection, with the fault of the other end; `None` if there is none."""


class Channel:
    """One end of a connection.

    Attributes:
        is_open: Whether further frames are sent and handled. It is False after `finish` and after the end.
        kind: The kind of the last frame that was handled; empty before the first frame, and if the next bytes are not a frame.
        received_at: The time when bytes were last received, in seconds of the clock. Before the first bytes, it is the time
            at which the channel was made.
    """

    __slots__ = (
        "_ended",
        "_frames",
        "_handle",
        "_is_called_again",
        "_is_closed",
        "_is_scheduled",
        "_is_writing",
        "_loop",
        "_monotonic",
        "_most_received",
        "_queue",
        "_socket",
        "_waiting",
        "is_open",
        "kind",
        "received_at",
    )

    def __init__(
        self,
        connected: socket.socket,
        kinds: frozenset[bytes],
        handle: Handle,
        ended: Ended,
        *,
        clock: Clock,
        most_received: int,
        most_waiting: int | None,
    ) -> None:
        """Begin to receive on a connected socket that does not block.

        Args:
            connected: The socket. It is closed with the channel.
            kinds: The kinds of frames that may be received.
            handle: A function that handles a frame. If it raises an error, the channel is closed. A `BadMessageError` is a fault
                of the other end.
            ended: A function that is called once, when the channel is closed for any reason.
            clock: The clock for `received_at`.
            most_received: The largest number of bytes that are received and handled in one step of the event loop.
            most_waiting: The bound of the bytes that wait to be sent; `None` for no bound. See `SendQueue`.
        """
        self.is_open: bool = True
        self.kind: bytes = b""
        self._monotonic = clock.monotonic
        self.received_at: float = self._monotonic()
        self._socket = connected
        self._frames = Frames(kinds)
        self._handle = handle
        self._ended = ended
        self._most_received = most_received
        self._queue = SendQueue(most_waiting)
        self._is_closed = self._is_scheduled = self._is_writing = False
        self._waiting: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        # After the other end was killed, uvloop calls `_receive` once, even if more than one piece is left.
        self._is_called_again = isinstance(self._loop, asyncio.SelectorEventLoop)
        self._loop.add_reader(connected, self._receive)

    @property
    def has_unread(self) -> bool:
        """Whether bytes have arrived that were not received yet, or the other end has closed."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True  # `_receive` gets this error, too
        return True

    def send(self, parts: Iterable[bytes | memoryview]) -> bool:
        """Send a message after this step of the event loop, or when the socket accepts bytes again.

        Return True if the message will be sent. If too many bytes wait already, do not send it, and return False. If
        the channel is not open, do nothing, and return True.
        """
        if not self.is_open:
            return True
        if not self._queue.put(parts):
            return False
        if not self._is_scheduled and not self._is_writing:
            self._is_scheduled = True
            self._loop.call_soon(self.flush)
        return True

    def flush(self) -> None:
        """Send the waiting bytes now. Bytes that the socket does not accept now are sent later."""
        self._is_scheduled = False
        if not self._is_writing and not self._is_closed:
            self._write()

    def finish(self) -> None:
        """Handle nothing from now on, and close the channel when everything is sent. A second call does nothing."""
        self.is_open = False
        self.flush()

    def close(self) -> None:
        """Close the channel at once, and call `ended`. A second call does nothing."""
        self._close(None)

    def _close(self, problem: BadMessageError | None) -> None:
        if self._is_closed:
            return
        self._is_closed, self.is_open = True, False
        self._queue.clear()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting is not asyncio.current_task():
            waiting.cancel()
        self._ended(problem)

    def _receive(self) -> None:
        try:
            data = self._socket.recv(self._most_received)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # the other end has closed the connection before it read everything
        if not data:
            self._close(None)
        else:
            if self.is_open:
                self.received_at = self._monotonic()
                self._handle_all(iter(self._frames.feed(data)))
            if not self._is_called_again:
                self._loop.call_soon(self._receive_rest)

    def _receive_rest(self) -> None:
        """Receive what is left in the socket, such as the end of the connection."""
        if not self._is_closed and self._waiting is None:
            self._receive()

    def _handle_all(self, frames: Iterator[ReceivedFrame]) -> None:
        try:
            self._handle_each(frames)
        except BadMessageError as problem:
            self._close(problem)
        except BaseException:
            self._close(None)
            raise  # the event loop reports the error

    def _handle_each(self, frames: Iterator[ReceivedFrame]) -> None:
        for frame in frames:
            self.kind = frame.kind
            waits = self._handle(frame)
            if not self.is_open:
                return
            if waits is not None:
                self._loop.remove_reader(self._socket)
                self._waiting = asyncio.ensure_future(waits)
                self._waiting.add_done_callback(partial(self._go_on, frames))
                return
        if self._frames.problem is not None:
            self.kind = b""
            raise self._frames.problem

    def _go_on(self, frames: Iterator[ReceivedFrame], waited: asyncio.Future[None]) -> None:
        """Handle the frames that were received after a frame that was handled in steps."""
        self._waiting = None
        if waited.cancelled():
            self._close(None)
            return
        error = waited.exception()
        if isinstance(error, BadMessageError):
            self._close(error)
        elif error is not None:
            self._close(None)
            raise error  # the event loop reports the error
        elif self.is_open:
            self._loop.add_reader(self._socket, self._receive)
            self._handle_all(frames)

    def _write(self) -> None:
        if self._queue:
            self._send_piece()
        if not self._queue:
            if self._is_writing:
                self._is_writing = False
                self._loop.remove_writer(self._socket)
            if not self.is_open:
                self._close(None)
        elif not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._socket, self._write)

    def _send_piece(self) -> None:
        try:
            size = self._socket.send(self._queue.next_piece())
        except BlockingIOError:
            return
        except OSError:
            # The other end has closed the connection. Bytes that it sent before are still received.
            self._queue.clear()
        else:
            self._queue.sent(size)


def fault_of(channel: Channel, problem: BadMessageError) -> str:
    """Return a text for the log: the fault of the other end. The text has no key and no value."""
    return f"bad message{' of kind ' * bool(channel.kind)}{channel.kind.decode()}: {problem}"
