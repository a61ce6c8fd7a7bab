"""For Starlette: a lifespan for managers and readers, a health route, error responses, reads of own writes, and live updates."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from lab_state.cache import Reader
from lab_state.exceptions import StorageError
from lab_state.integrations._errors import ANSWERED, answer_to, check_retry_after
from lab_state.integrations._lifespan import (
    KEY,
    Named,
    Served,
    by_name,
    check_bound,
    choose,
    health_of,
    serving,
    stop_of,
)
from lab_state.integrations._live import (
    HEADERS,
    MEDIA_TYPE,
    RESTART,
    Data,
    Watch,
    check_times,
    drop_messages,
    event_stream,
    send_changes,
)
from lab_state.integrations._own_writes import headers_for, reached, revisions_of, shared_states
from lab_state.manager import Manager
from lab_state.shared._own_writes import noting_writes

__all__ = ["ReadYourWrites", "errors", "health", "lifespan", "manager", "push", "reader", "sse"]


def lifespan(
    *served: Manager | Reader,
    inner: Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]] | None = None,
) -> Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Return a lifespan that runs managers and readers: `Starlette(lifespan=lifespan(state))`.

    The managers and readers are started in the order given, and stopped in reverse order. If one
    of them cannot be started, the managers and readers before it are stopped, and the server exits
    with the error of the start.

    Endpoints find them by name in `request.state.lab_state`; see `manager` and `reader`. WebSockets
    and mounted applications find them there, too. There are no global variables, so each
    application of a process, and each test, has its own managers.

    Args:
        served: Managers, and readers of other processes' states: one or more, each with a
            different name.
        inner: Your own lifespan, a function with `@asynccontextmanager`. It runs while the
            managers run, so it may use them. If it yields a mapping, the items of the mapping are
            in `request.state` too.

    Raises:
        ValueError: There is no manager and no reader, or two have the same name.
        TypeError: An argument is neither a manager nor a reader.
        RuntimeError: At startup: `inner` yields an item named `lab_state`, or a manager
            already runs in another application.
    """
    named = Named(by_name(served))

    @asynccontextmanager
    async def run(app: Any) -> AsyncGenerator[Mapping[str, Any]]:
        async with serving(named):
            if inner is None:
                yield {KEY: named}
                return
            async with inner(app) as state:
                if state is not None and KEY in state:
                    raise RuntimeError(
                        f"the inner lifespan yields {KEY!r} too: pass all managers and readers to one lifespan()"
                    )
                yield {**(state or {}), KEY: named}

    return run


def _served(connection: HTTPConnection) -> Mapping[str, Served] | None:
    """Return the managers and readers of the application; `None` if its lifespan did not run."""
    found: Mapping[str, Served] | None = connection.scope.get("state", {}).get(KEY)
    return found


def manager(connection: HTTPConnection, name: str | None = None) -> Manager:
    """Return a manager of the application that received a request or a WebSocket.

    Args:
        connection: The request or the WebSocket.
        name: The name of the manager. It may be left out if there is only one.

    Raises:
        LookupError: There is no such manager, or the lifespan did not run. The message lists the
            managers that exist.
    """
    return choose(_served(connection), Manager, name)


def reader(connection: HTTPConnection, name: str | None = None) -> Reader:
    """Return a reader of the application that received a request or a WebSocket.

    Args:
        connection: The request or the WebSocket.
        name: The name of the state that the reader reads. It may be left out if there is
            only one reader.

    Raises:
        LookupError: There is no such reader, or the lifespan did not run. The message lists the
            readers that exist.
    """
    return choose(_served(connection), Reader, name)


def health(*, max_unflushed_age: float | None = 30.0) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for a load balancer.

    Add it with `Route("/health", health())`, or with FastAPI's
    `app.add_api_route("/health", health())`.

    The endpoint answers 200 if every manager runs and can write, all background tasks of the managers run, every
    change that is older than `max_unflushed_age` is durable, and every reader is up. In all other cases, it answers 503.
    It also answers 503 if the lifespan did not run. The body is JSON with the status of each manager and reader. It has no
    keys and no values, but error messages in it may have file paths. So do not expose the endpoint
    to the internet.

    Args:
        max_unflushed_age: The highest age of a change that is not durable, in seconds above 0.
            Choose a longer time than every `flush_interval`. With `None`, any age is accepted. Use
            `None` for managers whose `flush_interval` is `None`.

    Raises:
        ValueError: `max_unflushed_age` is not above 0.
        TypeError: `max_unflushed_age` is not a number.
    """
    bound = check_bound(max_unflushed_age)

    async def health(request: Request) -> Response:
        status, body = health_of(_served(request), bound)
        return Response(body, status, media_type="application/json")

    return health


def errors(app: Starlette, *, retry_after: int = 1) -> None:
    """Answer errors of lab_state with 503 or 422, in place of a plain 500: `errors(app)`.

    `StorageError` and `ConflictError` become 503 with `Retry-After`, because the request may succeed
    after that time. `InvalidKeyError` and `InvalidValueError` become 422, with their message. The body
    is `{"detail": ...}`, as in FastAPI. Each error is one line in the log `lab_state`, without a
    traceback and without a value. The level is WARNING for 503 and DEBUG for 422.

    A WebSocket is closed with code 1013 (try again later) in place of 503, and with code 1008 in
    place of 422. If it was not accepted yet, the server answers with HTTP 403 instead.

    A response that has begun cannot be changed. If an error occurs after that, Starlette raises a `RuntimeError`.
    Mounted applications have their own error handlers: call this function for each of them.

    If the application later adds a handler for one of these errors or for a subclass, that handler
    is used. A second call of this function replaces the first.

    Args:
        app: The application, not yet running.
        retry_after: The number of seconds after which a client may try again, 0 or more.

    Raises:
        TypeError: `app` is not an application of Starlette, or `retry_after` is not a whole number.
        ValueError: `retry_after` is below 0.
        RuntimeError: The application is running, so it would not use the handlers. Nothing was changed: call `errors` earlier.
    """
    if not isinstance(app, Starlette):
        raise TypeError(f"errors() needs a Starlette or FastAPI application, not {type(app).__name__}")
    if app.middleware_stack is not None:
        raise RuntimeError(f"errors() came too late for {app!r}: call it before the application starts")
    seconds = check_retry_after(retry_after)

    async def answer(connection: Request | WebSocket, error: Exception) -> Response | None:
        if isinstance(connection, Request):
            answered = answer_to(error, connection.method, seconds)
            return Response(answered.body, answered.status, answered.headers, "application/json")
        answered = answer_to(error, "WebSocket", seconds)
        if WebSocketState.DISCONNECTED not in {connection.client_state, connection.application_state}:
            with suppress(WebSocketDisconnect, OSError):  # the client has left
                await connection.close(answered.close_code, answered.close_reason)
        return None

    for kind in ANSWERED:
        app.exception_handlers[kind] = cast("Any", answer)  # Starlette uses this table for requests and for WebSockets


class ReadYourWrites:
    """An ASGI middleware with which a client reads its own writes in each worker: `app.add_middleware(ReadYourWrites)`.

    The workers of a server share a state. A write is in the other workers within milliseconds, and the next request of the
    client may come earlier. This middleware sends the revision of the write to the client. The client sends the revision back
    with each request, and the request waits until its worker has that revision. If the worker has it already, there is no wait.

    The middleware finds the shared states in the lifespan of the application. States that are not shared need no wait.

    * A response has a revision if the endpoint has made a writing call to a shared state before the response began, unless
      the client has sent this revision. The method of the request does not matter. The response to a request that only reads
      has neither header nor cookie, so that caches treat it as before. The response to an exception without a handler has
      none, either.
    * The revision of the state `visits` is sent as the cookie `lab_state-visits`, for ten minutes, and in the header
      `Lab-State-Revision: visits=42`. With each request, a client without cookies must send the last such header that it
      received. So this header also has the revisions of other states that the client has sent.
    * A client may send any number. For each state, a request waits for at most one answer of the owner. If the worker does
      not have the revision after this answer, the number is not a revision of this state. Then the request does not wait longer.
    * If there is no owner, the request waits for an owner, as a write does. After `Config.owner_timeout` seconds, it is
      answered with 503.
    * WebSockets do not wait.

    If the request is cancelled, its wait ends.
    """

    def __init__(self, app: ASGIApp, *, cookie: bool = True) -> None:
        """Wrap an ASGI application.

        Args:
            app: The application.
            cookie: Whether a revision is sent as a cookie, too. Pass `False` if no client is a browser.

        Raises:
            TypeError: `cookie` is not a `bool`.
        """
        if not isinstance(cookie, bool):
            raise TypeError(f"cookie must be True or False, not {type(cookie).__name__}")
        self._app = app
        self._cookie = cookie

    def __repr__(self) -> str:
        """Return the settings."""
        return f"ReadYourWrites(cookie={self._cookie})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request.

        Raises:
            LookupError: The lifespan did not run.
            ClosedError: The client has sent a revision of a manager that is not running.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        states = shared_states(_served(HTTPConnection(scope)))
        try:
            sent = await reached(states, revisions_of(scope["headers"], states))
        except StorageError as error:
            answered = answer_to(error, scope["method"], 1)
            response = Response(answered.body, answered.status, answered.headers, "application/json")
            await response(scope, receive, send)
            return
        with noting_writes() as written:

            async def send_with_revisions(message: Message) -> None:
                if message["type"] == "http.response.start":
                    new = {name: revision for name, revision in written.items() if revision > sent.get(name, 0)}
                    more = headers_for(new, sent, cookie=self._cookie, secure=scope.get("scheme") == "https")
                    message["headers"] = [*message.get("headers", ()), *more]
                await send(message)

            await self._app(scope, receive, send_with_revisions)


def sse(
    connection: HTTPConnection, watch: Watch, *, data: Data | None = None, heartbeat: float = 15.0, retry: float = 2.0
) -> Response:
    """Send changes as server-sent events, until the server begins to stop.

    Write `return sse(request, state.watch("jobs/"))` in an `async def` endpoint.

    Each event has the JSON of a change as its `data`, and the revision as its `id`; see the
    argument `data`. The first event is a `resync`. At a `resync`, the client should read
    everything. The later events are the changes since then. So a browser that connects again misses
    nothing. A client that reads slowly receives only the last change of each key, or another
    `resync` if too many keys have changed.

    The stream ends when the client leaves, when the manager or the reader stops, or when the server
    begins to stop. The server begins to stop at SIGTERM or SIGINT, before it waits for its
    connections. To notice the signal, the first stream installs a signal handler, which stays until the
    lifespan ends. This handler ends the streams, and then calls the server's handler. A server outside the main thread
    receives no signal. The streams of such a server end only at the end of the lifespan. A client that
    reads nothing delays the end of the server. Limit that delay, for example with uvicorn's
    `--timeout-graceful-shutdown`.

    Args:
        connection: The request.
        watch: The result of `Manager.watch`, `Namespace.watch` or `Reader.watch`, not yet
            entered.
        data: A plain function that takes a change and returns the data to send. msgspec must be
            able to encode the data as JSON. The function is called for a `resync` too. By default,
            the change itself is sent.
        heartbeat: The number of seconds without a change after which a comment is sent. It keeps
            proxies from closing the connection, and shows whether the client is still there.
        retry: The number of seconds after which a browser connects again.

    Raises:
        LookupError: The lifespan did not run.
        TypeError: `heartbeat` or `retry` is not a number.
        ValueError: `heartbeat` is not above 0, `retry` is below 0, or one of them is not finite.
    """
    check_times(heartbeat, retry)
    stop = stop_of(_served(connection))
    return _EventStream(event_stream(watch, stop, data=data, heartbeat=heartbeat, retry=retry))


class _EventStream(StreamingResponse):
    """A response that closes its stream when it ends, even after an error."""

    def __init__(self, stream: AsyncGenerator[bytes]) -> None:
        super().__init__(stream, headers=HEADERS, media_type=MEDIA_TYPE)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._stream):
            if scope.get("method") == "HEAD":  # a HEAD request gets no body, so nothing would end the stream
                await Response(headers=HEADERS, media_type=MEDIA_TYPE)(scope, receive, send)
            else:
                with suppress(ClientDisconnect):  # Starlette raises it under a server of ASGI 2.4
                    await super().__call__(scope, receive, send)


async def push(websocket: WebSocket, watch: Watch, *, data: Data | None = None) -> None:
    """Send changes through a WebSocket, until the server begins to stop.

    The body of an endpoint can be this one line: `await push(websocket, state.watch("jobs/"))`. The
    call accepts the WebSocket, unless it was accepted before.

    Each message is the JSON of a change, as text; see the argument `data`. The first message is a
    `resync`. At a `resync`, the client should read everything. Messages from the client are
    dropped. The call returns when the client has left, when the manager or the reader stops, or
    when the server begins to stop (see `sse`). In the last two cases, the call closes the WebSocket
    with code 1012, so that clients connect again. If the call is cancelled, it leaves the WebSocket
    open.

    Args:
        websocket: The WebSocket. Other code must not read from it.
        watch: The result of `Manager.watch`, `Namespace.watch` or `Reader.watch`, not yet
            entered.
        data: A plain function that takes a change and returns the data to send. msgspec must be
            able to encode the data as JSON. The function is called for a `resync` too. By default,
            the change itself is sent.

    Raises:
        LookupError: The lifespan did not run.
    """
    stop = stop_of(_served(websocket))
    if websocket.client_state is WebSocketState.DISCONNECTED:  # there is nothing to receive, which would be an error
        return
    if websocket.application_state is WebSocketState.CONNECTING:
        await websocket.accept()
    await send_changes(
        watch,
        stop,
        data,
        drop_input=partial(drop_messages, websocket.receive),
        send=websocket.send_text,
        client_left=(WebSocketDisconnect,),
    )
    if WebSocketState.DISCONNECTED not in {websocket.client_state, websocket.application_state}:
        with suppress(WebSocketDisconnect):
            await websocket.close(RESTART)
