"""For Litestar: a plugin that runs managers and readers and injects them, a store, a health route, and live updates."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
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

from lab_state._argument_types import kind_of
from lab_state._transaction import Transaction
from lab_state.cache import Reader
from lab_state.exceptions import KeyNotFoundError
from lab_state.handles import Namespace
from lab_state.integrations._errors import ANSWERED, answer_to, check_retry_after
from lab_state.integrations._escaping import part
from lab_state.integrations._lifespan import KEY, Named, Served, by_name, check_bound, health_of, serving, stop_of
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
from lab_state.manager import Manager

__all__ = ["LabStatePlugin", "LabStateStore", "errors", "health", "push", "sse"]


class LabStatePlugin(InitPlugin):
    """A plugin that runs and injects managers and readers: `LabStatePlugin(notes=Manager("notes", storage))`.

    Pass it to the application: `Litestar(plugins=[plugin])`. A handler with a parameter
    `notes: NamedDependency[Manager]` receives that manager. Elsewhere, `app.state.lab_state` has
    the managers and readers by the names of their states. In the application's lifespan, the managers
    and readers are started before everything else, in the order given. They are stopped after
    everything else, in reverse order. If one of them cannot be started, the managers and readers before
    it are stopped, and the server exits with the error of the start.
    """

    def __init__(self, **served: Manager | Reader) -> None:
        """Keep the managers and readers. They are started with the application.

        Args:
            served: Managers, and readers of other processes' states. The name of each argument
                is the name of the parameter in handlers.

        Raises:
            ValueError: There is no manager and no reader, two of them have the same name, or Litestar
                reserves the name of an argument.
            TypeError: An argument is neither a manager nor a reader.
        """
        if taken := RESERVED_KWARGS & served.keys():
            raise ValueError(f"Litestar keeps the parameter {min(taken)!r} for itself; use another name")
        self._parameters = served
        self._named = Named(by_name(served.values()))

    def __repr__(self) -> str:
        """Return the class and the names of the managers and readers."""
        return f"<LabStatePlugin of {list(self._named)}>"

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add the managers and readers to the application. Litestar calls this.

        Raises:
            ValueError: The application already has a dependency with one of the names, or another plugin of this class.
        """
        if KEY in app_config.state:
            raise ValueError("there is a LabStatePlugin already; pass all managers and readers to one plugin")
        for parameter, one in self._parameters.items():
            if parameter in app_config.dependencies:
                raise ValueError(f"there is a dependency {parameter!r} already; choose another parameter")
            app_config.dependencies[parameter] = Provide(_always(one), sync_to_thread=False)
        app_config.state[KEY] = self._named
        app_config.lifespan = [self._lifespan, *app_config.lifespan]  # pyright: ignore[reportUnknownMemberType] -- partly untyped
        return app_config

    @asynccontextmanager
    async def _lifespan(self, _: Litestar) -> AsyncGenerator[None]:
        async with serving(self._named):
            yield


def _always(one: Served) -> Callable[[], Served]:
    def provide() -> Served:
        return one

    return provide


def health(path: str = "/health", *, max_unflushed_age: float | None = 30.0) -> HTTPRouteHandler:
    """Return a route for a load balancer: `Litestar([health()], plugins=[...])`.

    The route answers 200 if every manager of the plugin runs and can write, all background tasks of the managers
    run, every change that is older than `max_unflushed_age` is durable, and every reader is up. In all other cases,
    it answers 503. It also answers 503 if there is no plugin. The body is JSON with the status of each manager and reader. It has no
    keys and no values, but error messages in it may have file paths. So do not expose the endpoint to the
    internet.

    Args:
        path: The path of the route.
        max_unflushed_age: The highest age of a change that is not durable, in seconds above 0.
            Choose a longer time than every `flush_interval`. With `None`, any age is accepted. Use
            `None` for managers whose `flush_interval` is `None`.

    Raises:
        ValueError: `max_unflushed_age` is not above 0.
        TypeError: `max_unflushed_age` is not a number.
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

    `StorageError` and `ConflictError` become 503 with `Retry-After`, because the request may succeed
    after that time. `InvalidKeyError` and `InvalidValueError` become 422, with their message. The body
    is `{"detail": ...}`. Each error is one line in the log `lab_state`, without a traceback and
    without a value. The level is WARNING for 503 and DEBUG for 422.

    For a WebSocket, Litestar calls no exception handler. It closes the WebSocket with code 4500.

    Args:
        retry_after: The number of seconds after which a client may try again, 0 or more.

    Raises:
        TypeError: `retry_after` is not a whole number.
        ValueError: `retry_after` is below 0.
    """
    seconds = check_retry_after(retry_after)

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        answered = answer_to(error, request.method, seconds)
        return Response(
            answered.body, status_code=answered.status, headers=answered.headers, media_type="application/json"
        )

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

    Write `return sse(request, state.watch("jobs/"))` in an `async def` handler.

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
        request: The request.
        watch: The result of `Manager.watch`, `Namespace.watch` or `Reader.watch`, not yet
            entered.
        data: A plain function that takes a change and returns the data to send. msgspec must be
            able to encode the data as JSON. The function is called for a `resync` too. By default,
            the change itself is sent.
        heartbeat: The number of seconds without a change after which a comment is sent. It keeps
            proxies from closing the connection, and shows whether the client is still there.
        retry: The number of seconds after which a browser connects again.

    Raises:
        LookupError: The application has no `LabStatePlugin`, or its lifespan did not run.
        TypeError: `heartbeat` or `retry` is not a number.
        ValueError: `heartbeat` is not above 0, `retry` is below 0, or one of them is not finite.
    """
    check_times(heartbeat, retry)
    stop = stop_of(_served(request))
    if request.method == "HEAD":  # a HEAD request gets no body, so nothing would end the stream
        return Stream(iter(()), headers=HEADERS, media_type=MEDIA_TYPE)
    stream = event_stream(watch, stop, data=data, heartbeat=heartbeat, retry=retry)
    return Stream(stream, headers=HEADERS, media_type=MEDIA_TYPE)


async def push(socket: WebSocket[Any, Any, Any], watch: Watch, *, data: Data | None = None) -> None:
    """Send changes through a WebSocket, until the server begins to stop.

    The body of a handler can be this one line: `await push(socket, state.watch("jobs/"))`. The call
    accepts the WebSocket, unless it was accepted before.

    Each message is the JSON of a change, as text; see the argument `data`. The first message is a
    `resync`. At a `resync`, the client should read everything. Messages from the client are
    dropped. The call returns when the client has left, when the manager or the reader stops, or
    when the server begins to stop (see `sse`). In the last two cases, the call closes the WebSocket
    with code 1012, so that clients connect again. If the call is cancelled, it leaves the WebSocket
    open.

    Args:
        socket: The WebSocket. Other code must not read from it.
        watch: The result of `Manager.watch`, `Namespace.watch` or `Reader.watch`, not yet
            entered.
        data: A plain function that takes a change and returns the data to send. msgspec must be
            able to encode the data as JSON. The function is called for a `resync` too. By default,
            the change itself is sent.

    Raises:
        LookupError: The application has no `LabStatePlugin`, or its lifespan did not run.
    """
    stop = stop_of(_served(socket))
    if socket.connection_state == "init":
        await socket.accept()
    await send_changes(
        watch,
        stop,
        data,
        drop_input=partial(drop_messages, socket.receive),
        send=socket.send_data,
        client_left=(WebSocketDisconnect, OSError),
    )
    if socket.connection_state != "disconnect":
        with suppress(WebSocketDisconnect, OSError):
            await socket.close(RESTART)


class _Base64Bytes(msgspec.Struct, frozen=True):
    """The form in which bytes that are not UTF-8 are stored as JSON."""

    base64: bytes


class LabStateStore(NamespacedStore):
    """A Litestar store in a namespace: sessions, rate limits and cached responses survive a restart.

    With `StoreRegistry(default_factory=LabStateStore(state.namespace("litestar")).with_namespace)`
    all stores of an application are in this namespace, each under the name of the store.

    The store does not start the manager; `LabStatePlugin` does. With a `flush_interval` of 0, which a shared
    state always has, a write waits until its change is durable. With another interval, a later flush makes the
    change durable. Text, and bytes that are UTF-8, are stored as a JSON string. Other bytes are stored as
    `{"base64": ...}`. Any string may be a key. A key is escaped, as by `escape_key`. If the escaped key has more
    than 256 characters, the value is stored under the hash of the escaped key.

    Every call except `with_namespace` raises `ClosedError` while the manager does not run. A key that is not a
    `str` raises `TypeError`. If stores are nested so deep that a key would have more than 1,024 characters, the
    call raises `InvalidKeyError`. With a `flush_interval` of 0, each writing call raises `StorageError` if the
    storage fails. After this error, the change is not durable yet, and the manager tries again by itself. There
    are two exceptions. If the error has an `outcome`, see `UnavailableError`. If the flush task has ended, each
    writing call changes nothing and raises `UnavailableError`, with every `flush_interval`.

    Once the manager knows that it is fenced, each writing call changes nothing and raises `FencedError`, with
    every `flush_interval`. A write by which the manager learns of the newer writer raises this error, too: its
    change is in memory, and never becomes durable.
    """

    __slots__ = ()

    namespace: Namespace

    def __init__(self, namespace: Namespace) -> None:
        """Use a namespace. Other code must not store anything in it.

        Args:
            namespace: `Manager.namespace("litestar")`, or a namespace with another name.

        Raises:
            TypeError: `namespace` is not a `Namespace`.
        """
        if not isinstance(namespace, Namespace):
            raise TypeError(f"a Namespace was expected, such as state.namespace('litestar'); not {kind_of(namespace)}")
        self.namespace = namespace

    def __repr__(self) -> str:
        """Return the class and the namespace."""
        return f"<LabStateStore in {self.namespace!r}>"

    def with_namespace(self, namespace: str) -> LabStateStore:
        """Return a store under this store. `delete_all` of this store empties the new store, too.

        All other calls of this store ignore the values of the new store. Stores of the same name have
        the same values.

        Args:
            namespace: Any string.

        Raises:
            InvalidKeyError: The stores are nested too deep: a key may have 1,024 characters at most.
            TypeError: `namespace` is not a `str`.
        """
        return LabStateStore(self.namespace.namespace(part(namespace)))

    async def set(self, key: str, value: str | bytes, expires_in: int | timedelta | None = None) -> None:
        """Store a value.

        Args:
            key: Any string.
            value: Text or bytes. `get` returns bytes in either case.
            expires_in: The time until the value expires, in seconds or as a `timedelta`.
                With `None`, the value does not expire. With 0 or less, the key is deleted.

        Raises:
            InvalidValueError: The text has lone surrogates, or `expires_in` is NaN or more than
                10,000,000,000 seconds.
            TypeError: The value is neither text nor bytes, or `expires_in` is neither a number nor a `timedelta`.
        """
        kept = value if isinstance(value, str) else _from_bytes(value)
        ttl = expires_in.total_seconds() if isinstance(expires_in, timedelta) else expires_in
        if isinstance(ttl, int | float) and not isinstance(ttl, bool) and ttl <= 0:
            await self.delete(key)
            return
        await self.namespace.set(part(key), kept, ttl=ttl)

    async def get(self, key: str, renew_for: int | timedelta | None = None) -> bytes | None:
        """Return a value; `None` if it is missing or has expired.

        Args:
            key: Any string.
            renew_for: The new time until the value expires, in seconds or as a `timedelta`.
                With `None` or 0, or if the value does not expire, nothing changes. Reading and
                renewing are one step: no other write can happen in between.

        Raises:
            TypeMismatchError: Other code has stored the value in this namespace.
            InvalidValueError: The value expires, and `renew_for` is NaN, below 0 or more than
                10,000,000,000 seconds.
        """
        name = part(key)
        if not renew_for:
            return _as_bytes(await self.namespace.get(name, None, type=str | _Base64Bytes))

        def renewed(tx: Transaction) -> str | _Base64Bytes | None:
            value: str | _Base64Bytes | None = tx.get(name, None, type=str | _Base64Bytes)
            if value is not None and tx.expires_in(name) is not None:
                tx.set(name, value, ttl=renew_for)
            return value

        return _as_bytes(await self.namespace.transact(renewed))

    async def delete(self, key: str) -> None:
        """Delete a value, if it exists."""
        await self.namespace.delete(part(key))

    async def delete_all(self) -> None:
        """Delete all values in this store and in the stores under it."""
        await self.namespace.delete_all()

    async def exists(self, key: str) -> bool:
        """Return whether there is a value that has not expired."""
        return await self.namespace.exists(part(key))

    async def expires_in(self, key: str) -> int | None:
        """Return the seconds until a value expires, rounded up; -1 if it does not expire, `None` if there is no value."""
        try:
            seconds = await self.namespace.expires_in(part(key))
        except KeyNotFoundError:
            return None
        return -1 if seconds is None else math.ceil(seconds)


def _from_bytes(value: bytes) -> str | _Base64Bytes:
    if not isinstance(value, bytes | bytearray):
        raise TypeError(f"a value of a store is a str or bytes, not {type(value).__name__}")
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _Base64Bytes(value)


def _as_bytes(value: str | _Base64Bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else None if value is None else value.base64
