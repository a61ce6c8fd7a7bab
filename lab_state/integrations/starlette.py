"""For Starlette: a lifespan that managers and readers run in, and a health route."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from lab_state.cache import Reader
from lab_state.integrations._errors import ANSWERED, answer_to, check_retry_after
from lab_state.integrations._lifespan import (
    KEY,
    LastWord,
    Named,
    Served,
    by_name,
    check_bound,
    choose,
    health_of,
    stopping_of,
)
from lab_state.integrations._live import (
    HEADERS,
    MEDIA_TYPE,
    RESTART,
    Data,
    Ending,
    Watch,
    check_times,
    encoded,
    events,
    told,
)
from lab_state.manager import Manager

__all__ = ["errors", "health", "lifespan", "manager", "push", "reader", "sse"]


def lifespan(
    *served: Manager | Reader,
    inner: Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]] | None = None,
) -> Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """A lifespan that managers and readers run in: `Starlette(lifespan=lifespan(state))`.

    They are started in the order given, and stopped in reverse order; when one
    cannot be started, those before it are stopped, and the server exits with its error.
    Under uvicorn, the last line that it prints says which.

    In `request.state.lab_state` requests find them by name, in WebSockets and in
    mounted applications too; see `manager` and `reader`. Nothing is global: several applications in
    one process, and tests, have each their own.

    Args:
        served: Managers, and readers of other processes' states: one or more, each with
            a name of its own.
        inner: A lifespan of your own, a function with `@asynccontextmanager`. It runs
            while they do, and so may use them. The state that it yields, if
            any, is in `request.state` too.

    Raises:
        ValueError: None was given, or two have the same name.
        TypeError: One of them is neither.
        RuntimeError: At startup: `inner` yields a state named `lab_state`; or a manager
            runs already, in another application.
    """
    named = Named(by_name(served))

    @asynccontextmanager
    async def run(app: Any) -> AsyncGenerator[Mapping[str, Any]]:
        async with LastWord.told(named):
            if inner is None:
                yield {KEY: named}
                return
            async with inner(app) as state:
                if state is not None and KEY in state:
                    raise RuntimeError(f"the inner lifespan yields {KEY!r} too: give all to one lifespan()")
                yield {**(state or {}), KEY: named}

    return run


def _served(connection: HTTPConnection) -> Mapping[str, Served] | None:
    """What the application was given; `None` where its lifespan did not run."""
    found: Mapping[str, Served] | None = connection.scope.get("state", {}).get(KEY)
    return found


def manager(connection: HTTPConnection, name: str | None = None) -> Manager:
    """A manager of the application that a request or a WebSocket came to.

    Args:
        connection: The request or the WebSocket.
        name: The manager's name; may be left out where there is only one.

    Raises:
        LookupError: There is no such manager, the message names those there are; or the
            lifespan did not run.
    """
    return choose(_served(connection), Manager, name)


def reader(connection: HTTPConnection, name: str | None = None) -> Reader:
    """A reader of the application that a request or a WebSocket came to.

    Args:
        connection: The request or the WebSocket.
        name: The name of the state that it reads; may be left out where there is only
            one reader.

    Raises:
        LookupError: There is no such reader, the message names those there are; or the
            lifespan did not run.
    """
    return choose(_served(connection), Reader, name)


def health(*, max_unflushed_age: float | None = 30.0) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint for a load balancer.

    `Route("/health", health())`, or FastAPI's `app.add_api_route("/health", health())`.

    Answers 200 while every manager of the application runs and writes and every reader
    is up, and 503 otherwise, with the status of each as JSON. No key and no value is in it; paths of
    files are, in error messages: keep it off the public internet.

    Args:
        max_unflushed_age: For how long changes may fail to become durable, in seconds
            above 0; more than every `flush_interval`. `None`: for any time, as for
            managers whose `flush_interval` is `None`.

    Raises:
        ValueError: The bound is not above 0.
        TypeError: It is not a number.
    """
    bound = check_bound(max_unflushed_age)

    async def health(request: Request) -> Response:
        status, body = health_of(_served(request), bound)
        return Response(body, status, media_type="application/json")

    return health


def errors(app: Starlette, *, retry_after: int = 1) -> None:
    """Answer requests that lab_state refuses, in place of a bare 500: `errors(app)`.

    `StorageError` is 503 with `Retry-After`, because the storage may be well again by then;
    `InvalidKeyError` and `InvalidValueError` are 422, with their message. The body is
    `{"detail": ...}`, as FastAPI has it. Each is one line of the log `lab_state`, without
    a traceback and without a value: a warning for 503, INFO for 422.

    A WebSocket is closed with 1013 (try again later), or with 1008. A response that has
    begun cannot be changed: there, Starlette raises a `RuntimeError`. Mounted
    applications have error handlers of their own: call it for each.

    A handler of the application's own for one of these errors, or for a subclass, that
    is added later takes its place. A second call replaces the first.

    Args:
        app: The application, not yet running.
        retry_after: In how many seconds callers may try again, 0 or more.

    Raises:
        TypeError: `retry_after` is not a whole number.
        ValueError: It is below 0.
    """
    seconds = check_retry_after(retry_after)

    async def answer(connection: Request | WebSocket, error: Exception) -> Response | None:
        if isinstance(connection, Request):
            told = answer_to(error, connection.method, seconds)
            return Response(told.body, told.status, told.headers, "application/json")
        told = answer_to(error, "WebSocket", seconds)
        if WebSocketState.DISCONNECTED not in {connection.client_state, connection.application_state}:
            await connection.close(told.close_code, told.close_reason)
        return None

    for kind in ANSWERED:
        app.exception_handlers[kind] = cast("Any", answer)  # requests and WebSockets have one table


def sse(
    connection: HTTPConnection, watch: Watch, *, data: Data | None = None, heartbeat: float = 15.0, retry: float = 2.0
) -> Response:
    """Send changes as server-sent events, until the server begins to stop.

    `return sse(request, state.watch("jobs/"))`, from an endpoint that is `async def`.

    An event has the JSON of a change as its `data`, and the revision as its `id`. The
    first one is a `resync`: read everything, then follow the changes. So a browser that
    comes back after a lost connection misses nothing. A client that reads slowly is told
    the last change of each key once.

    The stream ends when the client leaves, when the manager stops, and when the server
    begins to stop: at SIGTERM or SIGINT, before it waits for its connections. For this, a
    signal handler is put in front of the server's. It passes the signal on, and is removed
    with the lifespan. Signals reach only the main thread.
    A client that reads nothing at all delays the server's end, as with any response. Bound
    that delay, for example with uvicorn's `--timeout-graceful-shutdown`.

    Args:
        connection: The request.
        watch: What `Manager.watch`, `Namespace.watch` or `Reader.watch` returned, not yet
            entered.
        data: A plain function from a change to what is sent about it, which msgspec can
            encode as JSON. It is called for a `resync` too. Not given: the change itself.
        heartbeat: After how many seconds without a change a comment is sent, so that
            proxies keep the connection, and a client that is gone is noticed.
        retry: In how many seconds a browser comes back.

    Raises:
        LookupError: The lifespan did not run.
        TypeError: `heartbeat` or `retry` is not a number.
        ValueError: `heartbeat` is not above 0, or `retry` is below 0.
    """
    check_times(heartbeat, retry)
    stopping = stopping_of(_served(connection))
    return _EventStream(events(watch, stopping, data=data, heartbeat=heartbeat, retry=retry))


class _EventStream(StreamingResponse):
    """A stream that ends what it reads from, however it ends."""

    def __init__(self, stream: AsyncGenerator[bytes]) -> None:
        super().__init__(stream, headers=HEADERS, media_type=MEDIA_TYPE)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._stream):
            if scope.get("method") == "HEAD":  # no body, so nothing would ever end it
                await Response(headers=HEADERS, media_type=MEDIA_TYPE)(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)


async def push(websocket: WebSocket, watch: Watch, *, data: Data | None = None) -> None:
    """Send changes through a WebSocket, until the server begins to stop.

    `await push(websocket, state.watch("jobs/"))`, as the whole of an endpoint. It accepts the
    WebSocket, unless that was done.

    A message is the JSON of a change, as text. The first one is a `resync`: read
    everything, then follow the changes. What the client sends is dropped. It returns
    when the client has left, when the manager stops, and when the server begins to stop
    (see `sse`); in the last two cases it closes the WebSocket with 1012, so that clients
    come back. Cancelled, it leaves the WebSocket open.

    Args:
        websocket: The WebSocket; nothing else reads from it.
        watch: What `Manager.watch`, `Namespace.watch` or `Reader.watch` returned, not yet
            entered.
        data: A plain function from a change to what is sent about it, which msgspec can
            encode as JSON. It is called for a `resync` too. Not given: the change itself.

    Raises:
        LookupError: The lifespan did not run.
    """
    stopping = stopping_of(_served(websocket))
    if websocket.application_state is WebSocketState.CONNECTING:
        await websocket.accept()
    ending = Ending()
    reading = asyncio.create_task(_read(websocket, ending))
    try:
        with stopping.calling(ending.begin), suppress(WebSocketDisconnect):
            async with aclosing(told(watch, ending, math.inf)) as changes:
                async for change in changes:
                    assert change is not None
                    await websocket.send_text(encoded(change, data).decode())
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    if WebSocketState.DISCONNECTED not in {websocket.client_state, websocket.application_state}:
        with suppress(WebSocketDisconnect):
            await websocket.close(RESTART)


async def _read(websocket: WebSocket, ending: Ending) -> None:
    """Drop what a client sends, until it leaves."""
    try:
        while (await websocket.receive())["type"] != "websocket.disconnect":
            pass
    finally:
        ending.begin()
