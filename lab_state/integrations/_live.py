"""Changes for connected clients, until they leave, the manager stops, or the server begins to stop.

Theory of operation. A server tells an application late that it stops: when every request
has ended. A stream of changes never ends by itself, so it must learn of the stop earlier,
from the signal. The server has a handler for that already. `Stopping` puts one in front of
it that takes a note and passes the signal on, as soon as there is a stream to end.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import AbstractAsyncContextManager, contextmanager
from types import FrameType
from typing import Any, TypeAlias

import msgspec

from lab_state._watch import Change, Watcher

Watch: TypeAlias = AbstractAsyncContextManager[AsyncIterator[Change]]
"""What `Manager.watch`, `Namespace.watch` and `Reader.watch` return."""

Data: TypeAlias = Callable[[Change], object]
"""A function that returns the data to send about a change."""

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Of a stream of events: no cache and no proxy (nginx) holds it back."""

_COMMENT = b":\n\n"

MEDIA_TYPE = "text/event-stream"
RESTART = 1012
"""The code of a WebSocket that is closed because the server stops: clients come back."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Ending:
    """An event that comes once, and wakes up tasks that wait for something else."""

    def __init__(self) -> None:
        self.begun: bool = False
        self._callbacks: dict[Callable[[], object], None] = {}

    def begin(self) -> None:
        """End it. Only the first call does something."""
        if not self.begun:
            self.begun = True
            for callback in tuple(self._callbacks):
                callback()

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Generator[None]:
        """Call the function when this ends, or at once if it has ended. Leaving the block withdraws it."""
        self._callbacks[callback] = None
        try:
            if self.begun:
                callback()
            yield
        finally:
            del self._callbacks[callback]


class Stopping(Ending):
    """The beginning of the server's stop, as its signal tells it, once there was a stream."""

    def __init__(self) -> None:
        """Prepare for the running event loop."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._put: dict[int, tuple[Any, Any]] = {}

    def listen(self) -> None:
        """Listen for the signals for which the server has handlers.

        Without a handler, the signal ends the process at once. Outside of the main thread
        there are no signals: such a server is stopped by a program, which can call `begin`.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            known = signal.getsignal(number)
            if callable(known) and known is not self._put.get(number, (None, None))[0]:
                self._put_before(number, known)

    def close(self) -> None:
        """Stop listening. A handler that was put before ours meanwhile still calls it; then the signal is passed on."""
        self.begin()
        for number, (ours, theirs) in self._put.items():
            if signal.getsignal(number) is ours:
                signal.signal(number, theirs)
        self._put.clear()

    def _put_before(self, number: int, theirs: Callable[[int, FrameType | None], object]) -> None:
        def ours(number: int, frame: FrameType | None) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.begin)
            theirs(number, frame)

        self._put[number] = ours, theirs
        signal.signal(number, ours)
        if getattr(getattr(theirs, "__self__", None), "should_exit", False):
            self.begin()  # it is uvicorn, and it had its signal before there was a stream


async def told(watch: Watch, ending: Ending, heartbeat: float) -> AsyncGenerator[Change | None]:
    """Yield changes until an end. First comes a `resync`; `None` comes after `heartbeat` seconds without a change."""
    async with watch as changes:
        if isinstance(changes, Watcher) and changes.opened is not None:
            yield Change("", "resync", changes.opened)  # a reader of the cache begins with one by itself
        loop = asyncio.get_running_loop()
        while not ending.begun:
            change = None
            try:
                async with asyncio.timeout(None if heartbeat == math.inf else heartbeat) as waiting:

                    def wake(waiting: asyncio.Timeout = waiting) -> None:
                        if not waiting.expired():
                            waiting.reschedule(loop.time())

                    with ending.calling(wake):
                        change = await anext(changes)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if ending.begun:
                    return
            yield change


async def events(
    watch: Watch, ending: Ending, *, data: Data | None, heartbeat: float, retry: float
) -> AsyncGenerator[bytes]:
    """Yield the bytes of a stream of server-sent events."""
    yield b"retry: %d\n\n" % round(retry * 1000)
    changes = told(watch, ending, heartbeat)
    try:
        async for change in changes:
            yield _COMMENT if change is None else b"id: %d\ndata: %b\n\n" % (change.revision, encoded(change, data))
    finally:
        await changes.aclose()


def encoded(change: Change, data: Data | None) -> bytes:
    """Encode a change as JSON in one line."""
    return msgspec.json.encode(change if data is None else data(change))


def check_times(heartbeat: float, retry: float) -> None:
    """Check both times.

    Raises:
        TypeError: One of them is not a number.
        ValueError: `heartbeat` is not above 0, or `retry` is below 0, or not finite.
    """
    for name, seconds in (("heartbeat", heartbeat), ("retry", retry)):
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    if not 0 < heartbeat < math.inf:
        raise ValueError("heartbeat must be above 0 seconds, and finite")
    if not 0 <= retry < math.inf:
        raise ValueError("retry must be 0 seconds or more, and finite")
