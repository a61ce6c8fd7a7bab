"""For Litestar: a plugin that runs managers and readers and injects them, a store, and a health route."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.config.app import AppConfig
from litestar.constants import RESERVED_KWARGS
from litestar.di import Provide
from litestar.handlers import HTTPRouteHandler
from litestar.plugins import InitPlugin
from litestar.stores.base import NamespacedStore

from lab_state.cache import Reader
from lab_state.exceptions import KeyNotFoundError
from lab_state.handles import Namespace
from lab_state.integrations._errors import ANSWERED, answer_to, check_retry_after
from lab_state.integrations._parts import part
from lab_state.integrations._serving import KEY, LastWord, Named, Served, by_name, check_bound, health_of
from lab_state.manager import Manager

__all__ = ["LabStatePlugin", "LabStateStore", "errors", "health"]


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
        async with LastWord.told(self._named.values()):
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
        served = cast("Mapping[str, Served] | None", request.app.state.get(KEY))
        status, body = health_of(served, bound)
        return Response(body, status_code=status, media_type="application/json")

    return lab_state_health


def errors(
    *, retry_after: int = 1
) -> dict[int | type[Exception], Callable[[Request[Any, Any, Any], Any], Response[Any]]]:
    """Exception handlers for what lab_state refuses: `Litestar(exception_handlers={**errors()})`.

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
