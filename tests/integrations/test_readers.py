"""Readers of another process's state in an application: they run, are found and are checked as managers are."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any

import httpx2 as httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fastapi import Depends, FastAPI
from litestar import Litestar, get
from litestar.di import NamedDependency
from litestar.testing import AsyncTestClient
from running import idle, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lab_state import ClosedError, Manager, MemoryCache, MemoryStorage, Reader
from lab_state.integrations import aiohttp, fastapi, litestar, starlette
from lab_state.testing import ManualClock

Ask = Callable[[str], Any]
"""Asks a running application for a path; returns the status and the JSON."""


@asynccontextmanager
async def asked(app: Any, lifespan: Any) -> AsyncIterator[Ask]:
    async with lifespan(app) as given:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(given)}, receive, send)

        transport = httpx.ASGITransport(with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(path: str) -> Any:
                answer = await client.get(path)
                return answer.status_code, answer.json()

            yield ask


def in_starlette(own: Manager, jobs: Reader) -> AbstractAsyncContextManager[Ask]:
    async def job(request: Request) -> JSONResponse:
        await starlette.manager(request).incr("visits")
        return JSONResponse(await starlette.reader(request, "jobs").get("job"))

    routes = [Route("/job", job), Route("/health", starlette.health())]
    return asked(Starlette(routes=routes), starlette.lifespan(own, jobs))


def in_fastapi(own: Manager, jobs: Reader) -> AbstractAsyncContextManager[Ask]:
    app = FastAPI()

    @app.get("/job")
    async def job(
        state: Annotated[Manager, Depends(fastapi.manager())], jobs: Annotated[Reader, Depends(fastapi.reader())]
    ) -> int:
        await state.incr("visits")
        return await jobs.get("job", type=int)

    app.add_api_route("/health", fastapi.health())
    return asked(app, fastapi.lifespan(own, jobs))


@asynccontextmanager
async def in_aiohttp(own: Manager, jobs: Reader) -> AsyncIterator[Ask]:
    async def job(request: web.Request) -> web.Response:
        await aiohttp.manager(request).incr("visits")
        return web.json_response(await aiohttp.reader(request).get("job"))

    app = web.Application()
    aiohttp.setup(app, own, jobs)
    app.router.add_get("/job", job)
    app.router.add_get("/health", aiohttp.health())
    async with TestClient(TestServer(app)) as client:

        async def ask(path: str) -> Any:
            async with client.get(path) as answer:
                return answer.status, await answer.json()

        yield ask


@asynccontextmanager
async def in_litestar(own: Manager, jobs: Reader) -> AsyncIterator[Ask]:
    @get("/job")
    async def job(own: NamedDependency[Manager], jobs: NamedDependency[Reader]) -> int:
        await own.incr("visits")
        return await jobs.get("job", type=int)

    app = Litestar([job, litestar.health()], plugins=[litestar.LabStatePlugin(own=own, jobs=jobs)])
    async with AsyncTestClient(app) as client:

        async def ask(path: str) -> Any:
            answer = await client.get(path)
            return answer.status_code, answer.json()

        yield ask


@pytest.mark.parametrize("serve", [in_starlette, in_fastapi, in_aiohttp, in_litestar])
async def test_an_application_reads_a_state_that_is_not_its_own(
    serve: Callable[[Manager, Reader], AbstractAsyncContextManager[Ask]],
) -> None:
    """The reader is open while the application runs. Its health changes when there is no mirror, and back."""
    cache = MemoryCache()
    own, jobs = Manager("own", MemoryStorage()), cache.reader("jobs")
    async with serve(own, jobs) as ask:
        assert not jobs.up
        status, told = await ask("/health")
        assert (status, told["readers"]) == (503, {"jobs": {"up": False}})
        assert told["problems"] == ["jobs receives no changes: there is no mirror, or it cannot be reached"]
        async with Manager("jobs", MemoryStorage(), cache) as writer:
            await writer.set("job", 7)
            await writer.flush()
            await jobs.wait_revision(1)
            await until(lambda: jobs.up)
            assert await ask("/job") == (200, 7)
            status, told = await ask("/health")
            assert (status, told["problems"], told["readers"]) == (200, [], {"jobs": {"up": True}})
            assert list(told["managers"]) == ["own"]
    assert not jobs.up
    with pytest.raises(ClosedError):
        await jobs.get("job")


async def test_a_reader_whose_copy_is_gone_is_not_healthy() -> None:
    """A reader whose mirror is lost is not healthy, though nothing is read and the subscription works. With a new mirror it is healthy again."""
    cache, clock = MemoryCache(), ManualClock()
    jobs = cache.reader("jobs", clock=clock)

    async def until_told(status: int) -> None:
        while (await ask("/health"))[0] != status:
            clock.advance(2)
            await idle()

    async with in_starlette(Manager("own", MemoryStorage()), jobs) as ask:
        async with Manager("jobs", MemoryStorage(), cache):
            await until(lambda: jobs.up)
            assert (await ask("/health"))[0] == 200
        place = cache.mirrors["jobs"]
        before = dict(place.values), dict(place.expires)
        place.values.clear()
        place.expires.clear()
        await until_told(503)
        assert list(place.followers)
        place.values, place.expires = before
        await until_told(200)


def test_a_reader_is_not_found_as_a_manager() -> None:
    """`manager` does not find a reader, and `reader` finds no manager. The error names those that exist."""
    app = web.Application()
    aiohttp.setup(app, Manager("own", MemoryStorage()), MemoryCache().reader("jobs"), MemoryCache().reader("users"))
    assert aiohttp.reader(app, "users").name == "users"
    with pytest.raises(LookupError, match="there is no manager 'jobs'; this application has 'own'"):
        aiohttp.manager(app, "jobs")
    with pytest.raises(LookupError, match="a name is needed; this application has 'jobs', 'users'"):
        aiohttp.reader(app)
    with pytest.raises(
        LookupError, match="this application has no lab_state readers: pass the managers and readers to the integration"
    ):
        aiohttp.reader(web.Application())


async def test_a_reader_and_a_manager_of_one_state_are_an_error() -> None:
    """A reader and a manager of one state in one application are refused."""
    cache = MemoryCache()
    with pytest.raises(ValueError, match="two managers or readers have the name 'jobs': give each of them"):
        starlette.lifespan(Manager("jobs", MemoryStorage(), cache), cache.reader("jobs"))


async def test_a_reader_that_is_open_already_cannot_be_served() -> None:
    """A reader that is open already is an error at startup, and everything that was started before it is stopped."""
    own, jobs = Manager("own", MemoryStorage()), MemoryCache().reader("jobs")
    async with jobs, contextlib.AsyncExitStack() as stack:
        with pytest.raises(RuntimeError, match="open already"):
            await stack.enter_async_context(starlette.lifespan(own, jobs)(None))
    assert own.status().phase == "stopped"
