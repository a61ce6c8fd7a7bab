"""For aiohttp's server: managers and readers that run with an application, a health handler, error responses and live updates."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing

from aiohttp import WSCloseCode, web
from aiohttp.typedefs import Handler, Middleware

from lab_state.cache import Reader
from lab_state.integrations._errors import ANSWERED, answer_to, check_retry_after
from lab_state.integrations._lifespan import Served, add, by_name, check_bound, choose, health_of, running
from lab_state.integrations._live import (
    HEADERS,
    MEDIA_TYPE,
    Data,
    EndEvent,
    Watch,
    check_times,
    event_stream,
    send_changes,
)
from lab_state.manager import Manager

__all__ = ["SERVED", "errors", "health", "manager", "push", "reader", "setup", "sse"]

SERVED: web.AppKey[Mapping[str, Manager | Reader]] = web.AppKey("lab_state.served", Mapping)
"""The key of an application under which its managers and readers are found, by name."""

_STOP: web.AppKey[EndEvent] = web.AppKey("lab_state.stopping", EndEvent)


def setup(app: web.Application, *served: Manager | Reader) -> None:
    """Run managers and readers while an application runs.

    The managers and readers are added to the `cleanup_ctx` of the application. They are started in
    the order given, after all earlier items of `cleanup_ctx`, and stopped in reverse order. If
    one of them cannot be started, the managers and readers before it are stopped, and `web.run_app`
    ends with the error of the start.

    Handlers find them with `manager` and `reader`, even in sub-applications. `setup` may be called
    several times. A sub-application may have its own managers and readers, too.

    Args:
        app: The application, not yet running.
        served: Managers, and readers of other processes' states: one or more, each with a
            different name.

    Raises:
        ValueError: There is no manager and no reader, or two have the same name.
        TypeError: `app` is not an application of aiohttp, or an argument is neither a manager nor a reader.
        RuntimeError: The application is running, or is already a sub-application of another one. Nothing was changed: call
            `setup` earlier.
    """
    _check_open("setup", app)
    named = by_name(served)
    known = _own(app)
    for one in named.values():
        add(known, one)
    app[SERVED] = known

    async def lab_state(_: web.Application) -> AsyncGenerator[None]:
        async with running(named.values()):
            yield

    app.cleanup_ctx.append(lab_state)
    if _STOP not in app:
        stop = app[_STOP] = EndEvent()

        async def starting(_: web.Application) -> None:
            stop.clear()  # the application may have run before, as in a test

        async def stopping(_: web.Application) -> None:
            stop.set()

        app.on_startup.append(starting)
        app.on_shutdown.append(stopping)  # aiohttp calls this before it waits for its connections


def _check_open(call: str, app: object) -> None:
    """Check that an application can still be changed. `call` is the name of the function that got it, for the message.

    Raises:
        TypeError: The argument is not an application.
        RuntimeError: The application is running, or is a sub-application of another one.
    """
    if not isinstance(app, web.Application):
        raise TypeError(f"{call}() needs an aiohttp.web.Application, not {type(app).__name__}")
    if app.pre_frozen:
        raise RuntimeError(
            f"{call}() came too late for {app!r}: call it before the application starts, and before it is added to another one"
        )


def _own(app: web.Application) -> dict[str, Served]:
    served: Mapping[str, Served] | None = app.get(SERVED)
    return dict(served or {})


def _served(source: web.Request | web.Application) -> Mapping[str, Served]:
    apps = source.match_info.apps if isinstance(source, web.Request) else (source,)
    # A sub-application comes after its parent. So its managers replace managers of the parent with the same name.
    return {name: one for app in apps for name, one in _own(app).items()}


def manager(source: web.Request | web.Application, name: str | None = None) -> Manager:
    """Return a manager of an application.

    Args:
        source: A request or an application. A request finds the managers of the application
            that handles it, and of the parents of that application. An application does not know
            its parents, so with an application only its own managers are found.
        name: The name of the manager. It may be left out if there is only one.

    Raises:
        LookupError: There is no such manager. The message lists the managers that exist.
    """
    return choose(_served(source), Manager, name)


def reader(source: web.Request | web.Application, name: str | None = None) -> Reader:
    """Return a reader of an application. The same applications are searched as by `manager`.

    Args:
        source: A request or an application.
        name: The name of the state that the reader reads. It may be left out if there is
            only one reader.

    Raises:
        LookupError: There is no such reader. The message lists the readers that exist.
    """
    return choose(_served(source), Reader, name)


def health(*, max_unflushed_age: float | None = 30.0) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return a handler for a load balancer.

    Add it with `app.router.add_get("/health", health())`.

    The handler answers 200 if every manager that `manager` finds runs and can write, all background tasks of
    the managers run, every change that is older than `max_unflushed_age` is durable, and every reader is up.
    In all other cases, it answers 503.
    It also answers 503 if `setup` was not called. The body is JSON with the status of each manager and reader.
    It has no keys and no values, but error messages in it may have file paths. So do not expose the
    endpoint to the internet.

    Args:
        max_unflushed_age: The highest age of a change that is not durable, in seconds above 0.
            Choose a longer time than every `flush_interval`. With `None`, any age is accepted. Use
            `None` for managers whose `flush_interval` is `None`.

    Raises:
        ValueError: `max_unflushed_age` is not above 0.
        TypeError: `max_unflushed_age` is not a number.
    """
    bound = check_bound(max_unflushed_age)

    async def health(request: web.Request) -> web.Response:
        status, body = health_of(_served(request), bound)
        return web.Response(body=body, status=status, content_type="application/json")

    return health


def errors(app: web.Application, *, retry_after: int = 1) -> None:
    """Answer errors of lab_state with 503 or 422, in place of a plain 500: `errors(app)`.

    `StorageError` and `ConflictError` become 503 with `Retry-After`, because the request may succeed
    after that time. `InvalidKeyError` and `InvalidValueError` become 422, with their message. The body
    is `{"detail": ...}`. Each error is one line in the log `lab_state`, without a traceback and
    without a value. The level is WARNING for 503 and DEBUG for 422.

    The call adds a middleware outside the existing middlewares, so the existing ones get the error first. The new
    middleware also answers errors of sub-applications. A response that has begun, such as the response to a
    WebSocket request, cannot be changed. If an error occurs after that, it is passed on to aiohttp. A second call for
    the same application has no effect.

    Args:
        app: The application, not yet running.
        retry_after: The number of seconds after which a client may try again, 0 or more.

    Raises:
        TypeError: `app` is not an application of aiohttp, or `retry_after` is not a whole number.
        ValueError: `retry_after` is below 0.
        RuntimeError: The application is running, or is already a sub-application of another one. Nothing was changed: call
            `errors` earlier.
    """
    _check_open("errors", app)
    app.middlewares.insert(0, _answering(check_retry_after(retry_after)))


def _answering(retry_after: int) -> Middleware:
    @web.middleware
    async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ANSWERED as error:
            if request.writer.output_size > 0:  # the response has begun; aiohttp checks this, too
                raise
            answered = answer_to(error, request.method, retry_after)
            return web.Response(
                body=answered.body, status=answered.status, headers=answered.headers, content_type="application/json"
            )

    return answering


def _stop(request: web.Request) -> EndEvent:
    """Return the stop event of the application that handles a request, or of its nearest parent that has one."""
    for app in reversed(request.match_info.apps):
        if _STOP in app:
            return app[_STOP]
    raise LookupError("this application has no lab_state managers: pass the managers to setup()")


async def sse(
    request: web.Request, watch: Watch, *, data: Data | None = None, heartbeat: float = 15.0, retry: float = 2.0
) -> web.StreamResponse:
    """Send changes as server-sent events, until the server begins to stop.

    Write `return await sse(request, state.watch("jobs/"))` in a handler.

    Each event has the JSON of a change as its `data`, and the revision as its `id`; see the
    argument `data`. The first event is a `resync`. At a `resync`, the client should read
    everything. The later events are the changes since then. So a browser that connects again misses
    nothing. A client that reads slowly receives only the last change of each key, or another
    `resync` if too many keys have changed.

    The stream ends when the client leaves, when the manager or the reader stops, or when the server
    begins to stop. At SIGTERM or SIGINT, aiohttp calls the functions of `on_shutdown`, before it
    waits for its connections. One of these functions ends the stream. A client that reads nothing
    delays the end of the server. Limit that delay with `shutdown_timeout` of `run_app`.

    Args:
        request: The request. Its response has not begun.
        watch: The result of `Manager.watch`, `Namespace.watch` or `Reader.watch`, not yet
            entered.
        data: A plain function that takes a change and returns the data to send. msgspec must be
            able to encode the data as JSON. The function is called for a `resync` too. By default,
            the change itself is sent.
        heartbeat: The number of seconds without a change after which a comment is sent. It keeps
            proxies from closing the connection, and shows whether the client is still there.
        retry: The number of seconds after which a browser connects again.

    Raises:
        LookupError: `setup` was not called for this application.
        TypeError: `heartbeat` or `retry` is not a number.
        ValueError: `heartbeat` is not above 0, `retry` is below 0, or one of them is not finite.
    """
    check_times(heartbeat, retry)
    stop = _stop(request)
    response = web.StreamResponse(headers={**HEADERS, "Content-Type": MEDIA_TYPE})
    await response.prepare(request)
    if request.method == "HEAD":  # a HEAD request gets no body, so nothing would end the stream
        return response
    stream = event_stream(watch, stop, data=data, heartbeat=heartbeat, retry=retry)
    async with aclosing(stream):
        async for part in stream:
            try:
                await response.write(part)
            except ConnectionError:  # the client has left; the same error of `data` is passed on
                break
    return response


async def push(request: web.Request, watch: Watch, *, data: Data | None = None) -> web.WebSocketResponse:
    """Send changes through a WebSocket, until the server begins to stop.

    The body of a handler can be this one line: `return await push(request, state.watch("jobs/"))`.

    Each message is the JSON of a change, as text; see the argument `data`. The first message is a
    `resync`. At a `resync`, the client should read everything. Messages from the client are
    dropped. The call returns when the client has left, when the manager or the reader stops, or
    when the server begins to stop (see `sse`). In the last two cases, the call closes the WebSocket
    with code 1012, so that clients connect again. If the call is cancelled, it leaves the WebSocket
    open.

    Args:
        request: The request for a WebSocket.
        watch: The result of `Manager.watch`, `Namespace.watch` or `Reader.watch`, not yet
            entered.
        data: A plain function that takes a change and returns the data to send. msgspec must be
            able to encode the data as JSON. The function is called for a `resync` too. By default,
            the change itself is sent.

    Raises:
        LookupError: `setup` was not called for this application.
    """
    stop = _stop(request)
    websocket = web.WebSocketResponse(heartbeat=30.0)
    await websocket.prepare(request)

    async def drop_input() -> None:
        async for _ in websocket:
            pass

    await send_changes(
        watch, stop, data, drop_input=drop_input, send=websocket.send_str, client_left=(ConnectionError,)
    )
    await websocket.close(code=WSCloseCode.SERVICE_RESTART)
    return websocket
