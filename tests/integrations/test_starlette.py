"""Starlette: the lifespan, how managers are found, and the health route."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from lab_state import Config, FencedError, FileStorage, LockedError, Manager, MemoryStorage, UnavailableError
from lab_state.integrations.starlette import health, lifespan, manager
from lab_state.testing import FaultyStorage, ManualClock


def make(name: str, storage: MemoryStorage | FaultyStorage | None = None, **options: Any) -> Manager:
    return Manager(Config(name=name, **options), storage or MemoryStorage())


async def visit(request: Request) -> JSONResponse:
    return JSONResponse(await manager(request, request.query_params.get("name")).incr("visits"))


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_json(await manager(websocket).incr("visits"))
    await websocket.close()


ROUTES = [
    Route("/", visit),
    WebSocketRoute("/socket", socket),
    Mount("/sub", app=Starlette(routes=[Route("/", visit)])),
    Route("/health", health(max_unflushed_age=10)),
]


def application(*managers: Manager, inner: Callable[..., Any] | None = None) -> Starlette:
    return Starlette(routes=ROUTES, lifespan=lifespan(*managers, inner=inner))


# The lifespan


def test_requests_sockets_and_mounted_applications_find_the_manager() -> None:
    """A request, a WebSocket and a request to a mounted application use the same manager."""
    with TestClient(application(make("my-module"))) as client:
        assert client.get("/").json() == 1
        with client.websocket_connect("/socket") as connected:
            assert connected.receive_json() == 2
        assert client.get("/sub/").json() == 3


def test_managers_live_as_long_as_the_application_and_can_be_started_again() -> None:
    """Leaving the client stops the manager; entering again finds what was written."""
    state = make("my-module")
    app = application(state)
    for expected in (1, 2):
        with TestClient(app) as client:
            assert state.status().phase == "running"
            assert client.get("/").json() == expected
        assert state.status().phase == "stopped"


def test_two_applications_share_nothing() -> None:
    """Each application in one process has its own managers, of the same name or not."""
    with TestClient(application(make("a"))) as one, TestClient(application(make("a"))) as other:
        assert [one.get("/").json(), one.get("/").json(), other.get("/").json()] == [1, 2, 1]


async def test_started_in_order_and_stopped_in_reverse() -> None:
    """The first manager is the first to start and the last to stop, and the inner lifespan is inside all."""
    first, second = make("first"), make("second")
    seen: list[Any] = []

    @asynccontextmanager
    async def inner(app: object) -> AsyncGenerator[None]:
        seen.append((app, first.status().phase, second.status().phase))
        yield
        seen.append((app, first.status().phase, second.status().phase))

    class Watched(Manager):
        async def start(self) -> None:
            await super().start()
            seen.append(self.config.name)

        async def stop(self) -> None:
            seen.append(f"{self.config.name} stops")
            await super().stop()

    third = Watched("third", MemoryStorage())
    fourth = Watched("fourth", MemoryStorage())
    async with lifespan(first, third, second, fourth, inner=inner)("app") as given:
        assert list(given) == ["lab_state"]
        assert list(given["lab_state"]) == ["first", "third", "second", "fourth"]
    running = ("app", "running", "running")
    assert seen == ["third", "fourth", running, running, "fourth stops", "third stops"]


async def test_what_had_started_is_stopped_when_a_later_one_fails() -> None:
    """A manager that cannot be started stops those before it, and its error is the lifespan's."""
    faulty = FaultyStorage(MemoryStorage())
    faulty.fail("open", error=UnavailableError("no disk"))
    first, second, third = make("first"), make("second", faulty), make("third")
    with pytest.raises(UnavailableError, match="no disk"):
        await lifespan(first, second, third)(None).__aenter__()
    assert [one.status().phase for one in (first, second, third)] == ["stopped", "new", "new"]


async def test_an_inner_lifespan_that_fails_stops_the_managers() -> None:
    """An error of the inner lifespan, at its start or its end, leaves no manager running."""
    state = make("my-module")

    @asynccontextmanager
    async def at_start(_: object) -> AsyncGenerator[None]:
        raise ZeroDivisionError
        yield

    @asynccontextmanager
    async def at_end(_: object) -> AsyncGenerator[None]:
        yield
        raise ZeroDivisionError

    for inner in (at_start, at_end):
        with pytest.raises(ZeroDivisionError):
            async with lifespan(state, inner=inner)(None):
                await state.set("key", 1)
        assert state.status().phase == "stopped"


async def test_a_stop_that_fails_does_not_keep_the_others_from_stopping() -> None:
    """Every manager is stopped, and the error of the one that failed is raised."""
    faulty = FaultyStorage(MemoryStorage())
    first, second = make("first"), make("second", faulty, flush_interval=None, stop_timeout=0.01)
    with pytest.raises(UnavailableError):
        async with lifespan(first, second)(None):
            await second.set("key", 1)
            faulty.fail("commit", times=1000)
    assert [one.status().phase for one in (first, second)] == ["stopped", "stopped"]


async def test_started_in_one_task_and_stopped_in_another() -> None:
    """A server or a fixture of pytest-asyncio may enter and leave the lifespan in different tasks."""
    state = make("my-module")
    running = lifespan(state)(None)
    await asyncio.create_task(running.__aenter__())
    assert state.status().phase == "running"
    await asyncio.create_task(running.__aexit__(None, None, None))
    assert state.status().phase == "stopped"


def test_the_state_of_the_inner_lifespan_is_merged() -> None:
    """`request.state` has the state of the inner lifespan beside the managers. The inner lifespan may use the managers."""
    state = make("my-module")

    @asynccontextmanager
    async def inner(_: Starlette) -> AsyncGenerator[dict[str, Any]]:
        yield {"answer": await state.incr("answer", 42)}

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse([request.state.answer, list(request.state.lab_state)])

    app = Starlette(routes=[Route("/", answer)], lifespan=lifespan(state, inner=inner))
    with TestClient(app) as client:
        assert client.get("/").json() == [42, ["my-module"]]


async def test_an_inner_lifespan_with_managers_of_its_own_is_refused() -> None:
    """A lifespan of lab_state inside another one would hide managers. It is an error at startup, and all managers are stopped."""
    outer, within = make("outer"), make("within")
    with pytest.raises(RuntimeError, match="pass all managers and readers to one lifespan"):
        await lifespan(outer, inner=lifespan(within))(None).__aenter__()
    assert [one.status().phase for one in (outer, within)] == ["stopped", "stopped"]


def test_arguments_are_checked_at_once() -> None:
    """No manager, two of one name, and other objects are errors when the lifespan is made."""
    with pytest.raises(ValueError, match="one or more"):
        lifespan()
    with pytest.raises(ValueError, match="two managers or readers have the name 'a'"):
        lifespan(make("a"), make("a"))
    with pytest.raises(TypeError, match=r"a lab_state\.Manager or a lab_state\.Reader was expected, not str$"):
        lifespan("redis://me:hunter2@host")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"was expected, not the class Manager$"):
        lifespan(Manager)  # type: ignore[arg-type]


# Finding a manager


def test_a_manager_that_is_not_there() -> None:
    """The error names the managers that exist. Without a name, there must be exactly one."""
    with TestClient(application(make("a"), make("b-c"))) as client:
        assert client.get("/?name=b-c").json() == 1
        with pytest.raises(LookupError, match="there is no manager 'd'; this application has 'a', 'b-c'"):
            client.get("/?name=d")
        with pytest.raises(LookupError, match="a name is needed; this application has 'a', 'b-c'"):
            client.get("/")


def test_a_lifespan_that_did_not_run() -> None:
    """A client that is not entered runs no startup, and the error says so."""
    client = TestClient(application(make("a")))
    with pytest.raises(LookupError, match="make sure that the server runs the application's startup"):
        client.get("/")


# The health route


def test_health_tells_the_status_and_no_value() -> None:
    """Health is 200, with the status of each manager under its name, and without values."""
    state = make("a")
    with TestClient(application(state, make("b"))) as client:
        assert client.portal is not None
        client.portal.call(state.set, "key", "a secret")
        answer = client.get("/health")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        told = answer.json()
        assert (told["healthy"], told["problems"]) == (True, [])
        assert (told["managers"]["a"]["keys"], told["managers"]["b"]["phase"]) == (1, "running")
        assert "secret" not in answer.text


def test_health_turns_when_writes_are_not_durable_for_long() -> None:
    """Health is 503 when the oldest change that is not durable is older than the bound, and 200 when it is durable."""
    clock = ManualClock()
    storage = FaultyStorage(MemoryStorage())
    state = Manager(Config(name="a", flush_interval=1), storage, clock=clock)
    storage.fail("commit", times=100, error=UnavailableError("no disk"))
    with TestClient(application(state)) as client:
        portal = client.portal
        assert portal is not None
        portal.call(state.set, "key", "value")
        portal.call(clock.advance, 10.0)
        assert client.get("/health").status_code == 200
        portal.call(clock.advance, 0.5)
        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["problems"] == ["a has a change that is 10.5 s old and not durable"]
        while state.status().unflushed_keys:
            try:
                portal.call(state.flush)
            except UnavailableError:
                continue
        assert client.get("/health").status_code == 200


def test_health_when_a_newer_writer_owns_the_state() -> None:
    """Health is 503 as soon as a manager knows that it is fenced, also without unflushed changes."""
    storage = FaultyStorage(MemoryStorage())
    state = Manager(Config(name="a", flush_interval=None), storage, clock=ManualClock())
    with pytest.raises(FencedError), TestClient(application(state)) as client:
        portal = client.portal
        assert portal is not None
        storage.fail("commit", times=9, error=FencedError("a newer writer owns it"))
        portal.call(state.set, "key", "value")
        with pytest.raises(FencedError):
            portal.call(state.flush)
        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["problems"] == ["a is fenced: a newer writer owns the state; end this process"]
        assert state.status().fenced


async def test_health_of_a_shared_state(tmp_path: Path) -> None:
    """Health has the role of the process, the pid of the owner, the number of followers, and the lag. A process whose owner is silent is not healthy."""
    clock, config, storage = ManualClock(), Config("a", shared=True), FileStorage(tmp_path)
    # The clock of the owner stands still, so the owner gives no sign of life.
    owner, follower = Manager(config, storage, clock=ManualClock()), Manager(config, storage, clock=clock)
    async with owner, lifespan(follower)(None) as given:
        request = Request({"type": "http", "state": dict(given)})
        told = {"owner": owner.status(), "follower": follower.status()}
        assert [status.followers for status in told.values()] == [1, None]
        healthy = await health()(request)
        clock.advance(9.9)
        still = await health()(request)
        clock.advance(0.1)
        answer = await health()(request)
    assert (healthy.status_code, still.status_code, answer.status_code) == (200, 200, 503)
    body = json.loads(bytes(answer.body))
    assert body["problems"] == [
        "a has had no sign of life of an owner for 10.0 s: writes fail, and reads return values as old as that"
    ]
    shown = {name: body["managers"]["a"][name] for name in ("role", "owner_pid", "followers", "lag")}
    assert shown == {"role": "follower", "owner_pid": os.getpid(), "followers": None, "lag": 10.0}


async def test_health_when_a_manager_does_not_run() -> None:
    """Health is 503 if a manager was stopped, or if the lifespan did not run."""
    state = make("a")
    endpoint = health()
    async with lifespan(state)(None) as given:
        await state.stop()
        answer = await endpoint(Request({"type": "http", "state": dict(given)}))
    assert answer.status_code == 503
    assert json.loads(bytes(answer.body))["problems"] == ["a is stopped"]
    answer = await endpoint(Request({"type": "http"}))
    assert answer.status_code == 503
    assert json.loads(bytes(answer.body))["problems"] == ["no manager was started"]


@pytest.mark.parametrize("bound", [0, -1, float("nan")])
def test_the_bound_must_be_above_0(bound: float) -> None:
    """A bound of 0 seconds or less, or NaN, is an error at once."""
    with pytest.raises(ValueError, match="above 0 seconds"):
        health(max_unflushed_age=bound)


@pytest.mark.parametrize("bound", [True, "10"])
def test_the_bound_must_be_a_number(bound: Any) -> None:
    """A bound that is not a number is an error at once."""
    with pytest.raises(TypeError, match="a number of seconds or None"):
        health(max_unflushed_age=bound)


async def test_without_a_bound_only_the_phase_counts() -> None:
    """With `None`, changes may wait for ever, as with a `flush_interval` of `None`."""
    clock = ManualClock()
    state = Manager(Config(name="a", flush_interval=None), MemoryStorage(), clock=clock)
    async with lifespan(state)(None) as given:
        await state.set("key", 1)
        clock.advance(10**6)
        answer = await health(max_unflushed_age=None)(Request({"type": "http", "state": dict(given)}))
    assert answer.status_code == 200


async def test_a_locked_state_is_named_with_its_remedy() -> None:
    """The error of a state that is open elsewhere says who has it, and what to do with several workers."""
    storage = MemoryStorage()
    async with Manager("a", storage):
        with pytest.raises(
            LockedError, match=r"^'a' is open .*if another worker of this server holds the lock, see docs/workers.md$"
        ):
            await lifespan(Manager("a", storage))(None).__aenter__()
