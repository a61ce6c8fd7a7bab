"""For aiohttp's server: managers and readers that run while an application does, and a health handler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress

from aiohttp import WSCloseCode, web
from aiohttp.typedefs import Handler, Middleware

from lab_state.cache import Reader
from lab_state.integrations._errors import ANSWERED, answer_to, check_retry_after
from lab_state.integrations._lifespan import Served, add, by_name, check_bound, choose, health_of, running
from lab_state.integrations._live import (
    HEADERS,
    MEDIA_TYPE,
    Data,
    Ending,
    Watch,
    check_times,
    encoded,
    events,
    told,
)
from lab_state.manager import Manager

__all__ = ["SERVED", "errors", "health", "manager", "push", "reader", "setup", "sse"]

SERVED: web.AppKey[Mapping[str, Manager | Reader]] = web.AppKey("lab_state.served", Mapping)
"""Where an application holds its managers and readers, by name."""

_STOPPING: web.AppKey[Ending] = web.AppKey("lab_state.stopping", Ending)


def setup(app: web.Application, *served: Manager | Reader) -> None:
    """Let managers and readers run while an application does.

    Adds to its `cleanup_ctx`: they are started in the order given, with what was added
    before them, and stopped in reverse order. When one cannot be started, those before
    it are stopped, and `web.run_app` ends with its error.

    Handlers find them with `manager` and `reader`, those of sub-applications too. May be
    called again, and for sub-applications with managers and readers of their own.

    Args:
        app: The application, not yet running.
        served: Managers, and readers of other processes' states: one or more, each with
            a name of its own.

    Raises:
        ValueError: None was given, or two have the same name.
        TypeError: One of them is neither.
    """
    named = by_name(served)
    known = _own(app)
    for one in named.values():
        add(known, one)
    app[SERVED] = known

    async def lab_state(_: web.Application) -> AsyncGenerator[None]:
        async with running(named.values()):
            yield

    app.cleanup_ctx.append(lab_state)
    if _STOPPING not in app:
        stopping = app[_STOPPING] = Ending()

        async def stop(_: web.Application) -> None:
            stopping.begin()

        app.on_shutdown.append(stop)  # aiohttp calls this before it waits for its connections


def _own(app: web.Application) -> dict[str, Served]:
    served: Mapping[str, Served] | None = app.get(SERVED)
    return dict(served or {})


def _served(source: web.Request | web.Application) -> Mapping[str, Served]:
    apps = source.match_info.apps if isinstance(source, web.Request) else (source,)
    # A sub-application comes after its parent, and what is its own before that.
    return {name: one for app in apps for name, one in _own(app).items()}


def manager(source: web.Request | web.Application, name: str | None = None) -> Manager:
    """A manager of an application.

    Args:
        source: A request: the managers of the application that handles it and of those
            that it is part of. Or an application: its own managers, since it does not
            know whose part it is.
        name: The manager's name; may be left out where there is only one.

    Raises:
        LookupError: There is no such manager; the message names those there are.
    """
    return choose(_served(source), Manager, name)


def reader(source: web.Request | web.Application, name: str | None = None) -> Reader:
    """A reader of an application; found as `manager` finds managers.

    Args:
        source: A request or an application.
        name: The name of the state that it reads; may be left out where there is only
            one reader.

    Raises:
        LookupError: There is no such reader; the message names those there are.
    """
    return choose(_served(source), Reader, name)


def health(*, max_unflushed_age: float | None = 30.0) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler for a load balancer.

    `app.router.add_get("/health", health())`.

    Answers 200 while every manager that `manager` would find runs and writes, and every
    reader is up, and 503 otherwise, with the status of each as JSON. No key and no value is in it; paths of
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

    async def health(request: web.Request) -> web.Response:
        status, body = health_of(_served(request), bound)
        return web.Response(body=body, status=status, content_type="application/json")

    return health


def errors(app: web.Application, *, retry_after: int = 1) -> None:
    """Answer requests that lab_state refuses, in place of a bare 500: `errors(app)`.

    `StorageError` is 503 with `Retry-After`, because the storage may be well again by then;
    `InvalidKeyError` and `InvalidValueError` are 422, with their message. The body is
    `{"detail": ...}`. Each is one line of the log `lab_state`, without a traceback and
    without a value: a warning for 503, INFO for 422.

    It adds a middleware around those that there are, so each of them sees the error
    first. Sub-applications are covered. A response that has begun, as a WebSocket's has,
    cannot be changed: there, the error goes on to aiohttp.

    Args:
        app: The application, not yet running.
        retry_after: In how many seconds callers may try again, 0 or more.

    Raises:
        TypeError: `retry_after` is not a whole number.
        ValueError: It is below 0.
        RuntimeError: The application runs.
    """
    app.middlewares.insert(0, _answering(check_retry_after(retry_after)))


def _answering(retry_after: int) -> Middleware:
    @web.middleware
    async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ANSWERED as error:
            if request.writer.output_size > 0:  # aiohttp, too, looks here for a response that has begun
                raise
            told = answer_to(error, request.method, retry_after)
            return web.Response(
                body=told.body, status=told.status, headers=told.headers, content_type="application/json"
            )

    return answering


def _stopping(request: web.Request) -> Ending:
    for app in reversed(request.match_info.apps):
        if _STOPPING in app:
            return app[_STOPPING]
    raise LookupError("this application has no lab_state managers: give them to it with setup()")


async def sse(
    request: web.Request, watch: Watch, *, data: Data | None = None, heartbeat: float = 15.0, retry: float = 2.0
) -> web.StreamResponse:
    """Send changes as server-sent events, until the server begins to stop.

    `return await sse(request, state.watch("jobs/"))`, from a handler.

    An event has the JSON of a change as its `data`, and the revision as its `id`. The
    first one is a `resync`: read everything, then follow the changes. So a browser that
    comes back after a lost connection misses nothing. A client that reads slowly is told
    the last change of each key once.

    The stream ends when the client leaves, when the manager stops, and when the server
    begins to stop: at SIGTERM or SIGINT, before it waits for its connections. aiohttp tells
    this to `on_shutdown`.
    A client that reads nothing at all delays the server's end, as with any response. Bound
    that delay with `shutdown_timeout` of `run_app`.

    Args:
        request: The request; its response has not begun.
        watch: What `Manager.watch`, `Namespace.watch` or `Reader.watch` returned, not yet
            entered.
        data: A plain function from a change to what is sent about it, which msgspec can
            encode as JSON. It is called for a `resync` too. Not given: the change itself.
        heartbeat: After how many seconds without a change a comment is sent, so that
            proxies keep the connection, and a client that is gone is noticed.
        retry: In how many seconds a browser comes back.

    Raises:
        LookupError: `setup` was not called for this application.
        TypeError: `heartbeat` or `retry` is not a number.
        ValueError: `heartbeat` is not above 0, or `retry` is below 0.
    """
    check_times(heartbeat, retry)
    stopping = _stopping(request)
    response = web.StreamResponse(headers={**HEADERS, "Content-Type": MEDIA_TYPE})
    await response.prepare(request)
    if request.method == "HEAD":  # no body, so nothing would ever end it
        return response
    stream = events(watch, stopping, data=data, heartbeat=heartbeat, retry=retry)
    with suppress(ConnectionError):  # the client has left
        async with aclosing(stream):
            async for part in stream:
                await response.write(part)
    return response


async def push(request: web.Request, watch: Watch, *, data: Data | None = None) -> web.WebSocketResponse:
    """Send changes through a WebSocket, until the server begins to stop.

    `return await push(request, state.watch("jobs/"))`, as the whole of a handler.

    A message is the JSON of a change, as text. The first one is a `resync`: read
    everything, then follow the changes. What the client sends is dropped. It returns
    when the client has left, when the manager stops, and when the server begins to stop
    (see `sse`); in the last two cases it closes the WebSocket with 1012, so that clients
    come back. Cancelled, it leaves the WebSocket open.

    Args:
        request: The request for a WebSocket.
        watch: What `Manager.watch`, `Namespace.watch` or `Reader.watch` returned, not yet
            entered.
        data: A plain function from a change to what is sent about it, which msgspec can
            encode as JSON. It is called for a `resync` too. Not given: the change itself.

    Raises:
        LookupError: `setup` was not called for this application.
    """
    stopping = _stopping(request)
    websocket = web.WebSocketResponse(heartbeat=30.0)
    await websocket.prepare(request)
    ending = Ending()
    reading = asyncio.create_task(_read(websocket, ending))
    try:
        with stopping.calling(ending.begin), suppress(ConnectionError):
            async with aclosing(told(watch, ending, math.inf)) as changes:
                async for change in changes:
                    assert change is not None
                    await websocket.send_str(encoded(change, data).decode())
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    await websocket.close(code=WSCloseCode.SERVICE_RESTART)
    return websocket


async def _read(websocket: web.WebSocketResponse, ending: Ending) -> None:
    """Drop what a client sends, until it leaves."""
    try:
        async for _ in websocket:
            pass
    finally:
        ending.begin()
