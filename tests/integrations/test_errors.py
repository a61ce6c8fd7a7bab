"""The response of each framework when lab_state refuses a request, and the line in the log."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import aiohttp.test_utils
import fastapi
import httpx2
import litestar
import litestar.testing
import pytest
from aiohttp import web
from litestar.di import NamedDependency
from litestar.params import FromPath
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from lab_state import Config, ConflictError, FencedError, Manager, MemoryStorage
from lab_state.integrations import aiohttp as for_aiohttp
from lab_state.integrations import fastapi as for_fastapi
from lab_state.integrations import litestar as for_litestar
from lab_state.integrations import starlette as for_starlette
from lab_state.testing import FaultyStorage

SECRET = "hunter2"
Post = Callable[[str], Awaitable[tuple[int, Any, str | None]]]


async def act(state: Manager, what: str) -> int:
    """Do what the endpoint of each framework does."""
    match what:
        case "key":
            return await state.set("k" * 1025, SECRET)
        case "value":
            return await state.set("k", {"password": SECRET, "score": float("nan")})
        case "fenced":
            raise FencedError("a newer writer owns it")
        case "conflict":
            raise ConflictError("something was changed")
        case "bug":
            raise ZeroDivisionError
        case _:
            return await state.set("k", SECRET)


@asynccontextmanager
async def asgi(app: Any, state: Manager) -> AsyncIterator[Post]:
    """Yield an ASGI application whose manager is started here."""
    served = {"lab_state": {"errors": state}}

    async def with_state(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": served}, receive, send)

    transport = httpx2.ASGITransport(with_state, raise_app_exceptions=False)
    async with state, httpx2.AsyncClient(transport=transport, base_url="http://test") as client:

        async def post(what: str) -> tuple[int, Any, str | None]:
            answer = await client.post(f"/{what}")
            is_json = answer.headers.get("content-type", "").startswith("application/json")
            return answer.status_code, answer.json() if is_json else None, answer.headers.get("retry-after")

        yield post


def with_starlette(state: Manager) -> AbstractAsyncContextManager[Post]:
    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse(await act(for_starlette.manager(request), request.path_params["what"]))

    app = Starlette(routes=[Route("/{what}", endpoint, methods=["POST"])])
    for_starlette.errors(app, retry_after=7)
    return asgi(app, state)


def with_fastapi(state: Manager) -> AbstractAsyncContextManager[Post]:
    app = fastapi.FastAPI()
    for_fastapi.errors(app, retry_after=7)

    @app.post("/{what}")
    async def endpoint(what: str) -> int:
        return await act(state, what)

    return asgi(app, state)


def with_litestar(state: Manager) -> AbstractAsyncContextManager[Post]:
    @litestar.post("/{what:str}")
    async def endpoint(what: FromPath[str], errors: NamedDependency[Manager]) -> int:
        return await act(errors, what)

    app = litestar.Litestar(
        [endpoint],
        plugins=[for_litestar.LabStatePlugin(errors=state)],
        logging_config=None,
        exception_handlers={**for_litestar.errors(retry_after=7)},
    )
    return asgi(app, state)


@asynccontextmanager
async def with_aiohttp(state: Manager) -> AsyncIterator[Post]:
    async def endpoint(request: web.Request) -> web.Response:
        return web.json_response(await act(state, request.match_info["what"]))

    app = web.Application()
    for_aiohttp.setup(app, state)
    for_aiohttp.errors(app, retry_after=7)
    sub = web.Application()
    sub.router.add_post("/{what}", endpoint)
    app.add_subapp("/sub", sub)
    async with aiohttp.test_utils.TestClient(aiohttp.test_utils.TestServer(app)) as client:

        async def post(what: str) -> tuple[int, Any, str | None]:
            async with client.post(f"/sub/{what}") as answer:
                body = await answer.json() if answer.content_type == "application/json" else None
                return answer.status, body, answer.headers.get("Retry-After")

        yield post


FRAMEWORKS: dict[str, Callable[[Manager], AbstractAsyncContextManager[Post]]] = {
    "starlette": with_starlette,
    "fastapi": with_fastapi,
    "litestar": with_litestar,
    "aiohttp": with_aiohttp,
}
every_framework = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return what lab_state's answers logged."""
    records = [record for record in caplog.records if "answered with" in record.getMessage()]
    assert all(record.name == "lab_state" and record.exc_info is None for record in records)
    return [(record.levelname, record.getMessage()) for record in records]


@every_framework
async def test_a_failed_write_is_503(
    framework: Callable[[Manager], AbstractAsyncContextManager[Post]],
    storage: FaultyStorage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A write that is not durable is 503 with `Retry-After` and one line in the log without a traceback. The next one succeeds."""
    caplog.set_level(logging.DEBUG, "lab_state")
    async with framework(Manager(Config(name="errors", flush_interval=0), storage)) as post:
        storage.fail("commit", times=1)
        detail = "the state is not available at present; try again later"
        assert await post("write") == (503, {"detail": detail}, "7")
        assert (await post("write"))[0] in {200, 201}
    ((level, line),) = told(caplog)
    assert (level, line.partition(": ")[0]) == ("WARNING", "POST answered with 503")
    assert "UnavailableError: " in line
    assert "Traceback" not in caplog.text
    assert SECRET not in caplog.text


@every_framework
@pytest.mark.parametrize("what", ["fenced", "conflict"])
async def test_other_errors_that_are_503(
    framework: Callable[[Manager], AbstractAsyncContextManager[Post]],
    storage: FaultyStorage,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    """A subclass of `StorageError`, and a conflict, are answered in the same way, and the log names them."""
    async with framework(Manager(Config(name="errors", flush_interval=0), storage)) as post:
        assert (await post(what))[::2] == (503, "7")
    names = [line.partition(": ")[2].partition(":")[0] for _, line in told(caplog)]
    assert names == [{"fenced": "FencedError", "conflict": "ConflictError"}[what]]


@every_framework
@pytest.mark.parametrize(
    ("what", "line"),
    [("key", "POST answered with 422: InvalidKeyError: "), ("value", "POST answered with 422: InvalidValueError: ")],
)
async def test_what_cannot_be_kept_is_422(
    framework: Callable[[Manager], AbstractAsyncContextManager[Post]],
    storage: FaultyStorage,
    caplog: pytest.LogCaptureFixture,
    what: str,
    line: str,
) -> None:
    """A bad key or value is 422 with the reason and without the value, and one line in the log. Nothing changes."""
    caplog.set_level(logging.DEBUG, "lab_state")
    state = Manager("errors", storage)
    async with framework(state) as post:
        status, body, retry_after = await post(what)
        assert (status, retry_after, state.revision) == (422, None, 0)
    assert [(level, said[: len(line)]) for level, said in told(caplog)] == [("DEBUG", line)]
    assert told(caplog)[0][1] == f"{line}{body['detail']}"
    assert SECRET not in f"{body}{caplog.text}"
    assert "Traceback" not in caplog.text


@every_framework
async def test_other_errors_are_the_frameworks(
    framework: Callable[[Manager], AbstractAsyncContextManager[Post]],
    storage: FaultyStorage,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error of the application itself is a 500, as without `errors`."""
    async with framework(Manager("errors", storage)) as post:
        assert (await post("bug"))[0] == 500
    assert told(caplog) == []


@pytest.mark.parametrize(
    "errors",
    [for_starlette.errors, for_aiohttp.errors, lambda _, **more: for_litestar.errors(**more)],
    ids=["starlette", "aiohttp", "litestar"],
)
def test_retry_after_is_checked_at_once(errors: Callable[..., Any]) -> None:
    """`retry_after` must be a whole number of seconds, 0 or more."""
    app: Any = web.Application() if errors is for_aiohttp.errors else Starlette()
    for wrong in (1.5, True, "1", None):
        with pytest.raises(TypeError, match="retry_after must be a whole number of seconds"):
            errors(app, retry_after=wrong)
    with pytest.raises(ValueError, match="retry_after must be 0 seconds or more"):
        errors(app, retry_after=-1)
    errors(app, retry_after=0)


def test_starlette_errors_needs_an_application_that_does_not_run() -> None:
    """A running application would not use the handlers."""
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"^errors\(\) needs a Starlette or FastAPI application, not int$"):
        for_starlette.errors(wrong)
    app = Starlette()
    app.middleware_stack = app.build_middleware_stack()
    before = dict(app.exception_handlers)
    with pytest.raises(RuntimeError, match=r"errors\(\) came too late for .*: call it before the application starts"):
        for_starlette.errors(app)
    assert dict(app.exception_handlers) == before


# A response that has begun, and WebSockets


def socket_of(what: str, *, accepted: bool = True, left: bool = False) -> Starlette:
    async def endpoint(websocket: WebSocket) -> None:
        if accepted:
            await websocket.accept()
        if left:
            await websocket.close(4000)
        await act(for_starlette.manager(websocket), what)

    state = Manager(Config(name="errors", flush_interval=0), storage := FaultyStorage(MemoryStorage()))
    storage.fail("commit", times=1)
    app = Starlette(routes=[WebSocketRoute("/", endpoint)], lifespan=for_starlette.lifespan(state))
    for_starlette.errors(app)
    return app


@pytest.mark.parametrize(
    ("app", "code", "reason"),
    [
        (socket_of("write"), 1013, "try again later"),
        (socket_of("key"), 1008, "InvalidKeyError"),
        (socket_of("write", accepted=False), 1013, "try again later"),
        (socket_of("write", left=True), 4000, ""),
    ],
    ids=["storage", "key", "before it is accepted", "after it was closed"],
)
def test_a_websocket_is_closed_with_a_code(
    app: Starlette, code: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette closes a WebSocket once: with 1013 if the storage failed, with 1008 for a bad key or value. The log has one line."""
    caplog.set_level(logging.DEBUG, "lab_state")
    with (
        TestClient(app) as client,
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect("/") as connected,
    ):
        connected.receive_text()
    assert (closed.value.code, closed.value.reason) == (code, reason)
    assert [line.partition(" answered")[0] for _, line in told(caplog)] == ["WebSocket"]


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_websocket_whose_client_has_left(*, accepted: bool) -> None:
    """If the client has left, Starlette cannot close the WebSocket, and the server gets no second error."""

    async def endpoint(websocket: WebSocket) -> None:
        if accepted:
            await websocket.accept()
        raise FencedError("a newer writer owns it")

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "websocket.close":
            raise OSError("the client has left")

    sent: list[str] = []
    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    for_starlette.errors(app)
    await app({"type": "websocket", "path": "/", "query_string": b"", "headers": []}, receive, send)
    assert sent == ["websocket.accept"] * accepted + ["websocket.close"]


def test_starlette_cannot_change_a_response_that_has_begun() -> None:
    """An error within a stream breaks the response, so no client takes it for complete."""

    async def parts() -> AsyncIterator[str]:
        yield "begun"
        raise FencedError("a newer writer owns it")

    async def endpoint(_: Request) -> StreamingResponse:
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", endpoint)])
    for_starlette.errors(app)
    with pytest.raises(RuntimeError, match="response already started"), TestClient(app) as client:
        client.get("/")


async def test_aiohttp_does_not_change_a_response_that_has_begun(caplog: pytest.LogCaptureFixture) -> None:
    """An error within a stream breaks the response, so no client takes it for complete."""

    async def endpoint(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise FencedError("a newer writer owns it")

    app = web.Application()
    for_aiohttp.errors(app)
    app.router.add_get("/", endpoint)
    async with (
        aiohttp.test_utils.TestClient(aiohttp.test_utils.TestServer(app)) as client,
        client.get("/") as response,
    ):
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert told(caplog) == []
