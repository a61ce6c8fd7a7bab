"""Streams of changes to connected clients. A stream ends when its client leaves, the manager stops, or the server begins to stop.

A server of the ASGI protocol waits until every request has ended. Only then does it tell the application
that it stops. A stream of changes does not end by itself. So the stream must be ended earlier, when the
signal to stop arrives. The server already has a handler for that signal. When the first stream begins,
`ServerStop` replaces that handler by another handler, which ends the streams, and then calls the server's
handler. For aiohttp, no signal handler is needed, because aiohttp calls `on_shutdown` early enough.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, suppress
from types import FrameType
from typing import Any, TypeAlias

import msgspec

from lab_state._watch import Change, Watcher

Watch: TypeAlias = AbstractAsyncContextManager[AsyncIterator[Change]]
"""The result of `Manager.watch`, `Namespace.watch` and `Reader.watch`."""

Data: TypeAlias = Callable[[Change], object]
"""A function that returns the data to send about a change."""

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""The headers of a stream of events. They tell caches and proxies such as nginx to pass each event on at once."""

_COMMENT = b":\n\n"

MEDIA_TYPE = "text/event-stream"
RESTART = 1012
"""The code for closing a WebSocket because the server stops. Clients then connect again."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EndEvent:
    """An event. When it is set, it calls all functions that were registered with `calling`.

    Attributes:
        is_set: Whether the event is set.
    """

    def __init__(self) -> None:
        self.is_set: bool = False
        self._callbacks: dict[Callable[[], object], None] = {}

    def set(self) -> None:
        """Set the event, and call the functions. A second call does nothing."""
        if not self.is_set:
            self.is_set = True
            for callback in tuple(self._callbacks):
                callback()

    def clear(self) -> None:
        """Let the event be set again, because the application is started again."""
        self.is_set = False

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Generator[None]:
        """Call a function when the event is set, or at once if it is set already. After the block, the function is not called."""
        self._callbacks[callback] = None
        try:
            if self.is_set:
                callback()
            yield
        finally:
            del self._callbacks[callback]


class ServerStop(EndEvent):
    """An event that is set when the server begins to stop. From the first stream on, the signals that stop the server set it."""

    def __init__(self) -> None:
        """Create the event for the running event loop."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._installed: dict[int, tuple[Any, Any]] = {}

    def listen(self) -> None:
        """Listen for the signals for which the server has handlers.

        A signal without a handler ends the process at once, or is ignored. So nothing has to be done
        for such a signal. Outside the main thread, do nothing, because a server there receives no
        signals. In that case, `close` or a call of `set` ends the streams.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            known = signal.getsignal(number)
            if callable(known) and known is not self._installed.get(number, (None, None))[0]:
                self._install(number, known)

    def close(self) -> None:
        """Set the event, and stop listening.

        If other code has replaced our handler meanwhile, that code may still call our handler. From now
        on, our handler only calls the server's handler.
        """
        self.set()
        for number, (ours, theirs) in self._installed.items():
            if signal.getsignal(number) is ours:
                signal.signal(number, theirs)
        self._installed.clear()

    def _install(self, number: int, theirs: Callable[[int, FrameType | None], object]) -> None:
        def ours(number: int, frame: FrameType | None) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.set)
            theirs(number, frame)

        self._installed[number] = ours, theirs
        signal.signal(number, ours)
        if getattr(getattr(theirs, "__self__", None), "should_exit", False):
            self.set()  # the server is uvicorn, and received the signal before the first stream began


async def changes_until(end: EndEvent, watch: Watch, heartbeat: float) -> AsyncGenerator[Change | None]:
    """Yield changes until an event is set, or the watch ends. The first change is a `resync`.

    Args:
        end: The event.
        watch: The watch, not yet entered.
        heartbeat: The number of seconds without a change after which `None` is yielded. With
            infinity, `None` is never yielded.
    """
    async with watch as changes:
        if isinstance(changes, Watcher) and changes.opened is not None:
            yield Change("", "resync", changes.opened)  # a watch of a reader already begins with a `resync`
        loop = asyncio.get_running_loop()
        while not end.is_set:
            change = None
            try:
                async with asyncio.timeout(None if heartbeat == math.inf else heartbeat) as waiting:

                    def wake(waiting: asyncio.Timeout = waiting) -> None:
                        if not waiting.expired():
                            waiting.reschedule(loop.time())

                    with end.calling(wake):
                        change = await anext(changes)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if end.is_set:
                    return
            yield change


async def event_stream(
    watch: Watch, stop: EndEvent, *, data: Data | None, heartbeat: float, retry: float
) -> AsyncGenerator[bytes]:
    """Yield the bytes of a stream of server-sent events, until `stop` is set or the watch ends. For the arguments, see `sse`."""
    yield b"retry: %d\n\n" % round(retry * 1000)
    changes = changes_until(stop, watch, heartbeat)
    try:
        async for change in changes:
            yield _COMMENT if change is None else b"id: %d\ndata: %b\n\n" % (change.revision, _encode(change, data))
    finally:
        await changes.aclose()


async def send_changes(
    watch: Watch,
    stop: EndEvent,
    data: Data | None,
    *,
    drop_input: Callable[[], Awaitable[object]],
    send: Callable[[str], Awaitable[object]],
    client_left: tuple[type[Exception], ...],
) -> None:
    """Send each change as text, until the watch ends, the server begins to stop, or the client leaves.

    Args:
        watch: The watch, not yet entered.
        stop: The event that is set when the server begins to stop.
        data: A function that returns the data to send for a change. With `None`, the change
            itself is sent.
        drop_input: A function that drops all messages of the client, and returns when the client
            has left.
        send: A function that sends one text.
        client_left: The errors that `send` and `drop_input` raise when the client has left.

    All other errors of `data`, `drop_input` and `send` are passed on.
    """
    end = EndEvent()

    async def read() -> None:
        try:
            await drop_input()
        finally:
            end.set()

    reading = asyncio.create_task(read())
    try:
        with stop.calling(end.set):
            async with aclosing(changes_until(end, watch, math.inf)) as changes:
                async for change in changes:
                    assert change is not None  # without a heartbeat, no change is `None`
                    text = _encode(change, data).decode()
                    try:
                        await send(text)
                    except client_left:  # the same errors of `data` and of the watch are passed on
                        break
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    with suppress(asyncio.CancelledError, *client_left):
        reading.result()  # raises another error of `drop_input`


async def drop_messages(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    """Drop the ASGI messages of a WebSocket, and return when the client has left."""
    while (await receive())["type"] != "websocket.disconnect":
        pass


def _encode(change: Change, data: Data | None) -> bytes:
    """Encode a change as JSON in one line. The result of `data` may have a `msgspec.Raw` with line breaks."""
    return msgspec.json.encode(change if data is None else data(change)).translate(None, b"\r\n")


def check_times(heartbeat: float, retry: float) -> None:
    """Check the two times of a stream.

    Raises:
        TypeError: One of them is not a number.
        ValueError: `heartbeat` is not above 0, `retry` is below 0, or one of them is not finite.
    """
    for name, seconds in (("heartbeat", heartbeat), ("retry", retry)):
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    if not 0 < _milliseconds(heartbeat) < math.inf:
        raise ValueError("heartbeat must be above 0 seconds, and finite")
    if not 0 <= _milliseconds(retry) < math.inf:
        raise ValueError("retry must be 0 seconds or more, and finite")


def _milliseconds(seconds: float) -> float:
    try:
        return seconds * 1000.0
    except OverflowError:  # an int that no float can hold
        return math.inf
