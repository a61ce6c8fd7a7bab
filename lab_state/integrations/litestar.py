"""For Litestar: a plugin that runs managers and readers and injects them, a store, and a health route."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, cast

import msgspec
from litestar import Litestar, Request, Response, WebSocket, get
from litestar.config.app import AppConfig
from litestar.constants import RESERVED_KWARGS
from litestar.di import Provide
from litestar.exceptions import WebSocketDisconnect
from litestar.handlers import HTTPRouteHandler
from litestar.plugins import InitPlugin
from litestar.response import Stream
from litestar.stores.base import NamespacedStore

from lab_state.cache import Reader
from lab_state.exceptions import KeyNotFoundError
from lab_state.handles import Namespace
from lab_state.integrations._errors import ANSWERED, answer_to, check_retry_after
from lab_state.integrations._escaping import part
from lab_state.integrations._lifespan import KEY, LastWord, Named, Served, by_name, check_bound, health_of, stopping_of
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

__all__ = ["LabStatePlugin", "LabStateStore", "errors", "health", "push", "sse"]


class LabStatePlugin(InitPlugin):
    """Runs managers and readers, and injects them: `Litestar(plugins=[LabStatePlugin(notes=Manager("notes", storage))])`.

    A handler with a parameter `notes: NamedDependency[Manager]` is given that manager. Elsewhere they
    are in `app.state.lab_state`, by the names of their states. They are started before
    everything else in the application's lifespan, in the order given, and stopped after
    it in reverse order; when one cannot be started, those before it are stopped, and the
    server exits with its error. Under uvicorn, the last line that it prints says which.
    """

    def __init__(self, **served: Manager | Reader) -> None:
        """Nothing is started before the application is.

        Args:
            served: Managers, and readers of other processes' states, by the parameter
                under which handlers ask for them.

        Raises:
            ValueError: None was given, two have the same name, or a parameter is
                one that Litestar keeps for itself.
            TypeError: One of them is neither.
        """
        if taken := RESERVED_KWARGS & served.keys():
            raise ValueError(f"Litestar keeps the parameter {min(taken)!r} for itself; use another name")
        self._parameters = served
        self._named = Named(by_name(served.values()))

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add them to the application.

        Raises:
            ValueError: It has a dependency of the same name already.
        """
        for parameter, one in self._parameters.items():
            if parameter in app_config.dependencies:
                raise ValueError(f"there is a dependency {parameter!r} already; choose another parameter")
            app_config.dependencies[parameter] = Provide(_always(one), sync_to_thread=False)
        app_config.state[KEY] = self._named
        app_config.lifespan = [self._lifespan, *app_config.lifespan]  # pyright: ignore[reportUnknownMemberType] -- partly untyped
        return app_config

    @asynccontextmanager
    async def _lifespan(self, _: Litestar) -> AsyncGenerator[None]:
        async with LastWord.told(self._named):
            yield


def _always(one: Served) -> Callable[[], Served]:
    def provide() -> Served:
        return one

    return provide


def health(path: str = "/health", *, max_unflushed_age: float | None = 30.0) -> HTTPRouteHandler:
    """A route for a load balancer: `Litestar([health()], plugins=[...])`.

    Answers 200 while every manager of the plugin runs and writes and every reader is up,
    and 503 otherwise, with the status of each as JSON. No key and no value is in it; paths of files are, in
    error messages: keep it off the public internet.

    Args:
        path: Where it is.
        max_unflushed_age: For how long changes may fail to become durable, in seconds
            above 0; more than every `flush_interval`. `None`: for any time, as for
            managers whose `flush_interval` is `None`.

    Raises:
        ValueError: The bound is not above 0.
        TypeError: It is not a number.
    """
    bound = check_bound(max_unflushed_age)

    @get(path, media_type="application/json", sync_to_thread=False)
    def lab_state_health(request: Request[Any, Any, Any]) -> Response[bytes]:
        status, body = health_of(_served(request), bound)
        return Response(body, status_code=status, media_type="application/json")

    return lab_state_health


def errors(
    *, retry_after: int = 1
) -> dict[int | type[Exception], Callable[[Request[Any, Any, Any], Any], Response[Any]]]:
    """Return exception handlers for the errors of lab_state: `Litestar(exception_handlers={**errors()})`.

    `StorageError` is 503 with `Retry-After`, because the storage may be well again by then;
    `InvalidKeyError` and `InvalidValueError` are 422, with their message. The body is
    `{"detail": ...}`. Each is one line of the log `lab_state`, without a traceback and
    without a value: a warning for 503, INFO for 422.

    Litestar asks no exception handler about a WebSocket: it closes it with 4500.

    Args:
        retry_after: In how many seconds callers may try again, 0 or more.

    Raises:
        TypeError: `retry_after` is not a whole number.
        ValueError: It is below 0.
    """
    seconds = check_retry_after(retry_after)

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        told = answer_to(error, request.method, seconds)
        return Response(told.body, status_code=told.status, headers=told.headers, media_type="application/json")

    handlers: dict[int | type[Exception], Callable[[Request[Any, Any, Any], Any], Response[Any]]] = {}
    handlers.update(dict.fromkeys(ANSWERED, answer))
    return handlers


def _served(connection: Request[Any, Any, Any] | WebSocket[Any, Any, Any]) -> Mapping[str, Served] | None:
    return cast("Mapping[str, Served] | None", connection.app.state.get(KEY))


def sse(
    request: Request[Any, Any, Any],
    watch: Watch,
    *,
    data: Data | None = None,
    heartbeat: float = 15.0,
    retry: float = 2.0,
) -> Stream:
    """Send changes as server-sent events, until the server begins to stop.

    `return sse(request, state.watch("jobs/"))`, from a handler that is `async def`.

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
        request: The request.
        watch: What `Manager.watch`, `Namespace.watch` or `Reader.watch` returned, not yet
            entered.
        data: A plain function from a change to what is sent about it, which msgspec can
            encode as JSON. It is called for a `resync` too. Not given: the change itself.
        heartbeat: After how many seconds without a change a comment is sent, so that
            proxies keep the connection, and a client that is gone is noticed.
        retry: In how many seconds a browser comes back.

    Raises:
        LookupError: The application has no `LabStatePlugin`, or its lifespan did not run.
        TypeError: `heartbeat` or `retry` is not a number.
        ValueError: `heartbeat` is not above 0, or `retry` is below 0.
    """
    check_times(heartbeat, retry)
    stopping = stopping_of(_served(request))
    stream = events(watch, stopping, data=data, heartbeat=heartbeat, retry=retry)
    return Stream(stream, headers=HEADERS, media_type=MEDIA_TYPE)


async def push(socket: WebSocket[Any, Any, Any], watch: Watch, *, data: Data | None = None) -> None:
    """Send changes through a WebSocket, until the server begins to stop.

    `await push(socket, state.watch("jobs/"))`, as the whole of a handler. It accepts the
    WebSocket, unless that was done.

    A message is the JSON of a change, as text. The first one is a `resync`: read
    everything, then follow the changes. What the client sends is dropped. It returns
    when the client has left, when the manager stops, and when the server begins to stop
    (see `sse`); in the last two cases it closes the WebSocket with 1012, so that clients
    come back. Cancelled, it leaves the WebSocket open.

    Args:
        socket: The WebSocket; nothing else reads from it.
        watch: What `Manager.watch`, `Namespace.watch` or `Reader.watch` returned, not yet
            entered.
        data: A plain function from a change to what is sent about it, which msgspec can
            encode as JSON. It is called for a `resync` too. Not given: the change itself.

    Raises:
        LookupError: The application has no `LabStatePlugin`, or its lifespan did not run.
    """
    stopping = stopping_of(_served(socket))
    if socket.connection_state == "init":
        await socket.accept()
    ending = Ending()
    reading = asyncio.create_task(_read(socket, ending))
    try:
        with stopping.calling(ending.begin), suppress(WebSocketDisconnect, OSError):
            async with aclosing(told(watch, ending, math.inf)) as changes:
                async for change in changes:
                    assert change is not None
                    await socket.send_data(encoded(change, data).decode())
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    if socket.connection_state != "disconnect":
        with suppress(WebSocketDisconnect, OSError):
            await socket.close(RESTART)


async def _read(socket: WebSocket[Any, Any, Any], ending: Ending) -> None:
    """Drop what a client sends, until it leaves."""
    try:
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass
    finally:
        ending.begin()


class _Bytes(msgspec.Struct, frozen=True):
    """Bytes that are not text, in JSON."""

    base64: bytes


class LabStateStore(NamespacedStore):
    """A Litestar store in a namespace: sessions, rate limits and cached responses that outlive the process.

    `StoreRegistry(default_factory=LabStateStore(state.namespace("litestar")).with_namespace)`
    keeps all of an application's stores there, each under its own name.

    It does not own the manager, which must run: `LabStatePlugin` sees to that. A write is
    durable as the manager's `flush_interval` says. Text is kept as a JSON string, other
    bytes as `{"base64": ...}`. Any string is a key: slashes are escaped, and one of more
    than 256 characters is kept under its hash.

    Every call raises `ClosedError` while the manager does not run, and those that write
    raise `StorageError` with a `flush_interval` of 0: not durable yet.
    """

    __slots__ = ()

    namespace: Namespace

    def __init__(self, namespace: Namespace) -> None:
        """Keep everything under a namespace, and nothing else there.

        Args:
            namespace: `Manager.namespace("litestar")`, or what you like to call it.

        Raises:
            TypeError: It is not a `Namespace`.
        """
        if not isinstance(namespace, Namespace):
            raise TypeError(f"a Namespace was expected, such as state.namespace('litestar'); not {namespace!r}")
        self.namespace = namespace

    def with_namespace(self, namespace: str) -> LabStateStore:
        """A store under this one: `delete_all` here deletes what it holds, other calls here do not see it.

        Args:
            namespace: Any string.

        Raises:
            InvalidKeyError: They are nested too deep: a key has 1,024 characters at most.
        """
        return LabStateStore(self.namespace.namespace(part(namespace)))

    async def set(self, key: str, value: str | bytes, expires_in: int | timedelta | None = None) -> None:
        """Store a value.

        Args:
            key: Any string.
            value: Text or bytes; read as bytes.
            expires_in: How long it lives, in seconds or as a `timedelta`; for good when
                not given. 0 and less: it has expired, and is not stored.

        Raises:
            InvalidValueError: The text has lone surrogates.
        """
        ttl = expires_in.total_seconds() if isinstance(expires_in, timedelta) else expires_in
        if ttl is not None and ttl <= 0:
            await self.delete(key)
            return
        await self.namespace.set(part(key), value if isinstance(value, str) else _from_bytes(value), ttl=ttl)

    async def get(self, key: str, renew_for: int | timedelta | None = None) -> bytes | None:
        """A value; `None` if it is missing or has expired.

        Args:
            key: Any string.
            renew_for: How long it lives from now on, in seconds or as a `timedelta`;
                nothing is changed when the value does not expire, or for 0. Reading and
                renewing is one step, which no other write comes between.

        Raises:
            TypeMismatchError: Something else keeps its values in this namespace.
            InvalidValueError: `renew_for` is below 0, and the value expires.
        """
        name = part(key)
        if not renew_for:
            return _as_bytes(await self.namespace.get(name, None, type=str | _Bytes))
        async with self.namespace.transaction() as tx:
            value: str | _Bytes | None = tx.get(name, None, type=str | _Bytes)
            if value is not None and tx.expires_in(name) is not None:
                tx.set(name, value, ttl=renew_for)
        return _as_bytes(value)

    async def delete(self, key: str) -> None:
        """Delete a value, if it is there."""
        await self.namespace.delete(part(key))

    async def delete_all(self) -> None:
        """Delete everything here and in the stores under this one."""
        await self.namespace.delete_all()

    async def exists(self, key: str) -> bool:
        """Whether there is a value that has not expired."""
        return await self.namespace.exists(part(key))

    async def expires_in(self, key: str) -> int | None:
        """The seconds until a value expires, rounded up; -1 if it does not, `None` if there is none."""
        try:
            seconds = await self.namespace.expires_in(part(key))
        except KeyNotFoundError:
            return None
        return -1 if seconds is None else math.ceil(seconds)


def _from_bytes(value: bytes) -> str | _Bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _Bytes(value)


def _as_bytes(value: str | _Bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else None if value is None else value.base64
