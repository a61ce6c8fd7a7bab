"""For Starlette: a lifespan that managers and readers run in, and a health route."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from lab_state.cache import Reader
from lab_state.integrations._serving import KEY, LastWord, Named, Served, by_name, check_bound, choose, health_of
from lab_state.manager import Manager

__all__ = ["health", "lifespan", "manager", "reader"]


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
        async with LastWord.told(named.values()):
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
