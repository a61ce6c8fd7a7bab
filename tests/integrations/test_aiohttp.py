"""aiohttp: managers that run while an application does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from lab_state import Config, Manager, MemoryStorage, UnavailableError
from lab_state.integrations.aiohttp import SERVED, errors, health, manager, setup, sse
from lab_state.testing import FaultyStorage, ManualClock


def make(name: str, storage: MemoryStorage | FaultyStorage | None = None) -> Manager:
    return Manager(name, storage or MemoryStorage())


async def visit(request: web.Request) -> web.Response:
    try:
        return web.json_response(await manager(request, request.query.get("name")).incr("visits"))
    except LookupError as error:
        return web.json_response(str(error))


async def socket(request: web.Request) -> web.WebSocketResponse:
    connected = web.WebSocketResponse()
    await connected.prepare(request)
    await connected.send_json(await manager(request, "parent").incr("visits"))
    await connected.close()
    return connected


def application(*managers: Manager) -> web.Application:
    app = web.Application()
    if managers:
        setup(app, *managers)
    app.router.add_get("/", visit)
    app.router.add_get("/socket", socket)
    app.router.add_get("/health", health(max_unflushed_age=10))
    return app


async def json_of(client: TestClient[Any, Any], path: str) -> Any:
    async with client.get(path) as response:
        return await response.json()


async def test_handlers_and_sub_applications_find_managers() -> None:
    """A sub-application finds its own managers and then its parent's. The parent finds only its own."""
    parent = application(make("parent"), make("shared"))
    sub = application(make("sub"), make("shared"))
    parent.add_subapp("/sub/", sub)
    async with TestClient(TestServer(parent)) as client:
        assert await json_of(client, "/?name=parent") == 1
        assert await json_of(client, "/sub/?name=parent") == 2
        async with client.ws_connect("/sub/socket") as connected:
            assert await connected.receive_json() == 3
        assert await json_of(client, "/sub/?name=shared") == 1
        assert await json_of(client, "/?name=shared") == 1
        assert (
            await json_of(client, "/?name=sub") == "there is no manager 'sub'; this application has 'parent', 'shared'"
        )


async def test_a_manager_of_an_application() -> None:
    """Given an application, its own managers are found; the only one needs no name."""
    app = web.Application()
    state = make("a")
    setup(app, state)
    assert manager(app) is manager(app, "a") is app[SERVED]["a"] is state
    with pytest.raises(LookupError, match="no lab_state managers"):
        manager(web.Application())


async def test_managers_live_as_long_as_the_application() -> None:
    """Managers run while the server runs. They are started in order and stopped in reverse, among the other members of `cleanup_ctx`."""
    first, second = make("first"), make("second")
    app = web.Application()
    seen = []

    async def between(_: web.Application) -> AsyncIterator[None]:
        seen.append((first.status().phase, second.status().phase))
        yield
        seen.append((first.status().phase, second.status().phase))

    setup(app, first)
    app.cleanup_ctx.append(between)
    setup(app, second)
    async with TestServer(app):
        assert {first.status().phase, second.status().phase} == {"running"}
    assert {first.status().phase, second.status().phase} == {"stopped"}
    assert seen == [("running", "new"), ("running", "stopped")]


async def test_streams_of_an_application_that_is_started_again() -> None:
    """A stream ends when the application stops. After another start, a new stream stays open."""
    state = make("a")
    app = web.Application()
    setup(app, state)

    async def events(request: web.Request) -> web.StreamResponse:
        return await sse(request, state.watch())

    app.router.add_get("/", events)
    for _ in range(2):
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with aiohttp.ClientSession() as session, session.get(site.name) as response:
            await response.content.readuntil(b"resync")
            await state.set("key", 1)
            assert (await response.content.readuntil(b'"set"')).endswith(b'"set"')
            await runner.cleanup()
            await response.read()


async def test_a_client_that_has_left_is_noticed_by_the_next_changes() -> None:
    """Without a heartbeat, the handler of a stream ends when a change cannot be sent."""
    state, ended = make("a"), list[web.StreamResponse]()
    app = web.Application()
    setup(app, state)

    async def events(request: web.Request) -> web.StreamResponse:
        ended.append(await sse(request, state.watch(), heartbeat=60))
        return ended[0]

    app.router.add_get("/", events)
    async with TestClient(TestServer(app)) as client:
        response = await client.get("/")
        await response.content.readuntil(b"resync")
        response.close()
        while not ended:
            await state.incr("n")
            await asyncio.sleep(0)


async def test_what_had_started_is_stopped_when_a_later_one_fails() -> None:
    """A manager that cannot be started stops those before it, of the same call and of earlier ones."""
    faulty = FaultyStorage(MemoryStorage())
    faulty.fail("open", error=UnavailableError("no disk"))
    first, second, third = make("first"), make("second"), make("third", faulty)
    app = web.Application()
    setup(app, first)
    setup(app, second, third)
    runner = web.AppRunner(app)
    with pytest.raises(UnavailableError, match="no disk"):
        await runner.setup()
    await runner.cleanup()
    assert [one.status().phase for one in (first, second, third)] == ["stopped", "stopped", "new"]


async def test_started_in_one_task_and_stopped_in_another() -> None:
    """A runner that is set up in one task may be cleaned up in another."""
    state = make("a")
    runner = web.AppRunner(application(state))
    await asyncio.create_task(runner.setup())
    assert state.status().phase == "running"
    await asyncio.create_task(runner.cleanup())
    assert state.status().phase == "stopped"


@pytest.mark.parametrize("make_late", ["started", "added"])
async def test_a_call_that_comes_too_late(make_late: str) -> None:
    """It is refused at a running application, and at a sub-application that was added. The application stays as it was."""
    app = web.Application()
    if make_late == "started":
        setup(app, make("a"))
        app.router.add_get("/health", health())
    else:
        web.Application().add_subapp("/sub/", app)
    runner = web.AppRunner(app)
    if make_late == "started":
        await runner.setup()
    too_late = r"came too late for .*: call it before the application starts"
    with pytest.raises(RuntimeError, match=too_late):
        setup(app, make("b"))
    with pytest.raises(RuntimeError, match=too_late):
        errors(app)
    found = [name for name in ("a", "b") if SERVED in app and name in app[SERVED]]
    assert found == (["a"] if make_late == "started" else [])
    await runner.cleanup()


async def test_an_argument_that_is_no_application() -> None:
    """The error names the call."""
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"^setup\(\) needs an aiohttp\.web\.Application, not int$"):
        setup(wrong, make("a"))
    with pytest.raises(TypeError, match=r"^errors\(\) needs an aiohttp\.web\.Application, not int$"):
        errors(wrong)


async def test_two_managers_of_one_name_are_an_error_at_once() -> None:
    """Two managers of one name are refused, in one call or in two. The application stays as it was."""
    app = web.Application()
    with pytest.raises(ValueError, match="two managers or readers have the name 'a'"):
        setup(app, make("a"), make("a"))
    setup(app, make("a"))
    with pytest.raises(ValueError, match="two managers or readers have the name 'a'"):
        setup(app, make("b"), make("a"))
    managers = app[SERVED]
    assert list(managers) == ["a"]
    assert len(app.cleanup_ctx) == 1 + len(web.Application().cleanup_ctx)


async def test_health() -> None:
    """Health is 200 while all managers write, and 503 when changes have not been durable for longer than the bound."""
    clock, storage = ManualClock(), FaultyStorage(MemoryStorage())
    state = Manager(Config(name="a"), storage, clock=clock)
    storage.fail("commit", times=100)
    async with TestClient(TestServer(application(state))) as client:
        async with client.get("/health") as response:
            assert (response.status, response.content_type) == (200, "application/json")
        await state.set("key", 1)
        clock.advance(11)
        async with client.get("/health") as response:
            assert response.status == 503
            assert (await response.json())["problems"] == ["a has a change that is 11.0 s old and not durable"]
        while state.status().unflushed_keys:
            await asyncio.gather(state.flush(), return_exceptions=True)
        async with client.get("/health") as response:
            assert response.status == 200


async def test_health_without_managers() -> None:
    """An application without managers is not healthy."""
    async with (
        TestClient(TestServer(application())) as client,
        client.get("/health") as response,
    ):
        assert response.status == 503


@pytest.fixture
async def url() -> AsyncIterator[str]:
    runner = web.AppRunner(application(make("a")))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield site.name
    await runner.cleanup()


async def test_a_fixture_runs_a_server_on_the_tests_loop(url: str) -> None:
    """With pytest-asyncio a fixture runs the server, and the test makes requests."""
    async with aiohttp.ClientSession(url) as session, session.get("/") as response:
        assert await response.json() == 1
