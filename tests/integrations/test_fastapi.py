"""FastAPI: managers and entries as dependencies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient

from lab_state import Entry, FileStorage, InvalidKeyError, Manager, MemoryStorage
from lab_state.integrations.fastapi import entry, health, lifespan, manager

MyModule = Annotated[Manager, Depends(manager("my-module"))]
Other = Annotated[Manager, Depends(manager("other.module"))]
Counter = Annotated[Entry[int], Depends(entry("counter", int, default=0, manager="my-module"))]

router = APIRouter()


@router.get("/async")
async def with_await(state: MyModule, other: Other) -> list[Any]:
    return [await state.incr("n"), await other.incr("n", 10), threading.current_thread().name]


@router.get("/plain")
def without_await(state: MyModule) -> list[Any]:
    return [state.blocking.incr("n"), state.blocking.get_all(type=int)]


@router.get("/entry")
async def typed(counter: Counter) -> int:
    return await counter.update(lambda n: n + 1)


@router.get("/only")
async def only(state: Annotated[Manager, Depends(manager())]) -> str:
    return state.config.name


@router.get("/missing")
async def missing(state: Annotated[Manager, Depends(manager("nowhere"))]) -> None:
    raise AssertionError(state)


@router.websocket("/socket")
async def socket(websocket: WebSocket, state: MyModule) -> None:
    await websocket.accept()
    await websocket.send_json(await state.incr("n"))
    await websocket.close()


def application(*managers: Manager) -> FastAPI:
    app = FastAPI(lifespan=lifespan(*managers))
    app.include_router(router)
    app.add_api_route("/health", health())
    sub = FastAPI()
    sub.include_router(router)
    app.mount("/sub", sub)
    return app


def both() -> FastAPI:
    return application(Manager("my-module", MemoryStorage()), Manager("other.module", MemoryStorage()))


def test_dependencies_of_every_kind_of_endpoint() -> None:
    """Endpoints with and without `async`, WebSockets and mounted applications get the same manager."""
    with TestClient(both()) as client:
        assert client.get("/async").json()[:2] == [1, 10]
        assert client.get("/plain").json() == [2, {"n": 2}]
        with client.websocket_connect("/socket") as connected:
            assert connected.receive_json() == 3
        assert client.get("/sub/async").json()[:2] == [4, 20]
        assert client.get("/sub/plain").json()[0] == 5
        with client.websocket_connect("/sub/socket") as connected:
            assert connected.receive_json() == 6


def test_fifty_endpoints_in_threads_wait_for_durable_writes(tmp_path: Path) -> None:
    """With more `def` endpoints at once than threads, each write through `blocking` still becomes durable."""
    state = Manager("my-module", FileStorage(tmp_path))
    app = FastAPI(lifespan=lifespan(state))

    @app.post("/write/{n}")
    def write(n: int, state: MyModule) -> int:
        state.blocking.set(f"k{n}", n)
        state.blocking.flush()
        return n

    async def main() -> list[int]:
        async with lifespan(state)(app) as given:

            async def with_state(scope: Any, receive: Any, send: Any) -> None:
                await app({**scope, "state": dict(given)}, receive, send)

            transport = httpx.ASGITransport(with_state)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                answers = await asyncio.gather(*(client.post(f"/write/{n}") for n in range(50)))
        return [answer.json() for answer in answers]

    assert asyncio.run(main()) == list(range(50))


def test_an_entry_is_typed_and_has_its_default() -> None:
    """An entry starts from its default, and keeps to its key."""
    state = Manager("my-module", MemoryStorage())
    with TestClient(application(state)) as client:
        assert [client.get("/entry").json() for _ in range(2)] == [1, 2]
        assert client.portal is not None
        assert client.portal.call(state.get_all) == {"counter": 2}


def test_the_only_manager_needs_no_name() -> None:
    """`manager()` returns the only manager. If there are several, the error names them."""
    with TestClient(application(Manager("alone", MemoryStorage()))) as client:
        assert client.get("/only").json() == "alone"
    with (
        TestClient(both()) as client,
        pytest.raises(LookupError, match=r"a name is needed; this application has 'my-module', 'other\.module'"),
    ):
        client.get("/only")


def test_a_manager_that_the_application_does_not_have() -> None:
    """The error names the managers that there are."""
    with (
        TestClient(both()) as client,
        pytest.raises(LookupError, match=r"no manager 'nowhere'; this application has 'my-module', 'other\.module'"),
    ):
        client.get("/missing")


def test_a_bad_key_is_an_error_at_once() -> None:
    """An entry with a bad key fails when the dependency is made, and not at the first request."""
    with pytest.raises(InvalidKeyError):
        entry("", int)


def test_openapi_shows_no_trace_of_the_dependencies() -> None:
    """The schema has no parameter for a manager or an entry."""
    paths = both().openapi()["paths"]
    assert "parameters" not in paths["/async"]["get"]
    assert "parameters" not in paths["/entry"]["get"]


def test_health_is_a_route_like_others() -> None:
    """`add_api_route` accepts the health endpoint."""
    with TestClient(both()) as client:
        assert client.get("/health").json()["healthy"]


# pytest-asyncio


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = application(Manager("my-module", MemoryStorage()), Manager("other.module", MemoryStorage()))
    async with app.router.lifespan_context(app) as given:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(given or {})}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_state), base_url="http://test") as client:
            yield client


async def test_a_fixture_runs_the_application_on_the_tests_loop(client: httpx.AsyncClient) -> None:
    """With pytest-asyncio a fixture runs the lifespan, and the test awaits the requests."""
    assert (await client.get("/entry")).json() == 1
    assert (await client.get("/async")).json()[:2] == [1, 10]
