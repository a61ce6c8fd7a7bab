"""Starlette and FastAPI: a client reads its own writes in each worker, by the revision in a cookie or a header."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from members import apart, bury, crash, cut, member_of
from running import idle, until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket
from uvicorn_workers import workers

from lab_state import Config, FileStorage, Manager, MemoryStorage, Transaction, UnavailableError
from lab_state.integrations import fastapi, starlette
from lab_state.integrations._own_writes import revisions_of
from lab_state.integrations.starlette import ReadYourWrites, lifespan, manager
from lab_state.testing import ManualClock

HEADER = "Lab-State-Revision"
Endpoint = Callable[[Request], Awaitable[Response]]


def shared(directory: Path, name: str = "lab", **settings: Any) -> Manager:
    clock = settings.pop("clock", None)
    return Manager(Config(name, shared=True, **settings), FileStorage(directory), clock=clock)


async def write(request: Request) -> Response:
    return JSONResponse(await manager(request, request.query_params.get("name", "lab")).incr("n"))


async def read(request: Request) -> Response:
    return JSONResponse(await manager(request, request.query_params.get("name", "lab")).get("n", 0))


def worker(*more: Route, **settings: Any) -> Starlette:
    """Make the application of a worker: `POST /` adds one to a number, and `GET /` returns the number."""
    app = Starlette(routes=[Route("/", write, methods=["POST"]), Route("/", read), *more])
    app.add_middleware(ReadYourWrites, **settings)
    return app


def beside(app: ASGIApp, *states: Manager, scheme: str = "http") -> httpx2.AsyncClient:
    """Make a client without cookies of an application. The managers run already."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        named = {state.name: state for state in states}
        await app({**scope, "state": {"lab_state": named}}, receive, send)

    return httpx2.AsyncClient(transport=httpx2.ASGITransport(served), base_url=f"{scheme}://test")


@asynccontextmanager
async def two(directory: Path, app: Starlette | None = None, **settings: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Run an owner and a follower. Yield each with a client of its application: `(manager, client)`."""
    served = app or worker()
    owner, follower = shared(directory), shared(directory, **settings)
    async with owner, follower, beside(served, owner) as one, beside(served, follower) as other:
        yield (owner, one), (follower, other)


def questions(state: Manager) -> dict[int, Any]:
    """Return the questions of a follower that the owner has not answered."""
    return member_of(state).port.arrivals._questions


# The revision goes to the client and back


async def test_a_client_reads_its_own_write_in_another_worker(tmp_path: Path) -> None:
    """A request waits until its worker has the revision in the cookie. A request without it gets the older state at once."""
    async with two(tmp_path) as ((owner, one), (follower, other)):
        async with apart(owner):
            assert (await one.post("/")).json() == 1
            (cookie,) = one.cookies.jar
            other.cookies.update(one.cookies)
            waiting = asyncio.create_task(other.get("/"))
            await until(lambda: questions(follower))
            assert (await other.get("/", headers={"Cookie": ""})).json() == 0
            await idle()
            assert not waiting.done()
        assert (await waiting).json() == 1
        assert (cookie.name, cookie.value) == ("lab_state-lab", str(owner.revision))


async def test_a_client_without_cookies_sends_the_header(tmp_path: Path) -> None:
    """The header of a response does the same, if the client sends it with the next request."""
    async with two(tmp_path) as ((owner, one), (follower, other)):
        async with apart(owner):
            token = (await one.post("/")).headers[HEADER]
            assert token == f"lab={owner.revision}"
            waiting = asyncio.create_task(other.get("/", headers={HEADER: token}))
            await until(lambda: questions(follower))
        assert (await waiting).json() == 1


async def test_a_worker_that_has_the_revision_asks_nothing(tmp_path: Path) -> None:
    """A request whose revision the worker has is answered without a message to the owner, and without an owner."""
    async with two(tmp_path) as ((owner, _), (follower, other)):
        token = (await other.post("/")).headers[HEADER]
        async with apart(owner):
            assert (await other.get("/", headers={HEADER: token})).json() == 1
            assert not questions(follower)


async def test_several_states(tmp_path: Path) -> None:
    """Each state of an application has a cookie of its own, and one header has all revisions. A response has those that were written."""

    async def write_both(request: Request) -> Response:
        for name in ("lab", "Other.1"):
            await manager(request, name).incr("n")
        return Response()

    app = worker(Route("/both", write_both, methods=["POST"]))
    states = [shared(tmp_path), shared(tmp_path, "Other.1"), Manager("alone", MemoryStorage())]
    async with AsyncExitStack() as stack:
        for state in states:
            await stack.enter_async_context(state)
        client = await stack.enter_async_context(beside(app, *states))
        first = await client.post("/?name=Other.1")
        assert [(cookie.name, cookie.value) for cookie in client.cookies.jar] == [("lab_state-Other.1", "1")]
        assert first.headers[HEADER] == "Other.1=1"
        both = await client.post("/both")
        assert both.headers[HEADER] == "lab=1, Other.1=2"
        assert {cookie.name: cookie.value for cookie in client.cookies.jar} == {
            "lab_state-lab": "1",
            "lab_state-Other.1": "2",
        }
        assert HEADER not in (await client.post("/?name=alone")).headers


async def test_several_states_without_cookies(tmp_path: Path) -> None:
    """A client that sends only the last header keeps the revisions of all states. A response to a read has no header."""
    states = [shared(tmp_path), shared(tmp_path, "other")]
    async with states[0], states[1], beside(worker(cookie=False), *states) as client:
        first = await client.post("/?name=other")
        assert first.headers[HEADER] == "other=1"
        second = await client.post("/", headers={HEADER: first.headers[HEADER]})
        assert second.headers[HEADER] == "lab=1, other=1"
        third = await client.post("/", headers={HEADER: second.headers[HEADER] + ", other=99"})
        assert third.headers[HEADER] == "lab=2"  # the state `other` does not have the revision 99
        assert HEADER not in (await client.get("/", headers={HEADER: second.headers[HEADER]})).headers


@pytest.mark.parametrize(("scheme", "end"), [("http", ""), ("https", "; Secure")])
async def test_the_attributes_of_the_cookie(scheme: str, end: str, tmp_path: Path) -> None:
    """The cookie is for the whole site, for ten minutes, and not for scripts or other sites. Over HTTPS it is `Secure`."""
    async with shared(tmp_path) as state, beside(worker(), state, scheme=scheme) as client:
        answer = await client.post("/")
        expected = f"lab_state-lab=1; Path=/; Max-Age=600; HttpOnly; SameSite=Lax{end}"
        assert answer.headers.get_list("Set-Cookie") == [expected]


async def test_without_cookies(tmp_path: Path) -> None:
    """With `cookie=False`, a response has the header alone. Another value is an error."""
    async with shared(tmp_path) as state, beside(worker(cookie=False), state) as client:
        answer = await client.post("/")
        assert answer.headers[HEADER] == "lab=1"
        assert "Set-Cookie" not in answer.headers
    with pytest.raises(TypeError, match="cookie must be True or False, not str"):
        ReadYourWrites(worker(), cookie="no")  # type: ignore[arg-type]


# Which responses have a revision


async def set_(state: Manager) -> None:
    await state.set("key", 1)


async def update(state: Manager) -> None:
    await state.update("n", lambda n: n + 1)


async def pop(state: Manager) -> None:
    await state.pop("n")


async def transaction(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.set("key", 1)


async def transact(state: Manager) -> None:
    def change(tx: Transaction) -> None:
        tx.incr("n")

    await state.transact(change)


async def in_a_task(state: Manager) -> None:
    await asyncio.create_task(state.set("key", 1))


async def in_a_thread(state: Manager) -> None:
    await asyncio.to_thread(state.blocking.set, "key", 1)


WRITES = [set_, update, pop, transaction, transact, in_a_task, in_a_thread]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("role", ["owner", "follower"])
async def test_each_way_to_write_counts(role: str, method: str, tmp_path: Path) -> None:
    """A response has the revision of its write, whatever the call, the method and the role, and also from tasks and threads."""
    ways = {way.__name__: way for way in WRITES}

    async def write_so(request: Request) -> Response:
        await ways[request.path_params["way"]](manager(request))
        return Response()

    app = worker(Route("/by/{way}", write_so, methods=["GET", "POST"]))
    async with two(tmp_path, app) as ((owner, one), (follower, other)):
        state, client = (owner, one) if role == "owner" else (follower, other)
        for name in ways:
            await state.set("n", 1)
            before = state.revision
            answer = await client.request(method, f"/by/{name}")
            assert answer.headers[HEADER] == f"lab={before + 1}", name


async def test_a_response_that_is_only_read_has_no_revision(tmp_path: Path) -> None:
    """A request that writes nothing gets neither a header nor a cookie, also while others write. Nor does one whose call changed nothing."""

    async def read_while_others_write(request: Request) -> Response:
        asking.set()
        await written.wait()
        return await read(request)

    async def change_nothing(request: Request) -> Response:
        return JSONResponse(await manager(request).set_if_absent("n", 1))

    routes = [Route("/slow", read_while_others_write), Route("/absent", change_nothing, methods=["POST"])]
    async with shared(tmp_path) as state, beside(worker(*routes), state) as client:
        asking, written = asyncio.Event(), asyncio.Event()
        reading = asyncio.create_task(client.get("/slow"))
        await asking.wait()
        token = (await client.post("/")).headers[HEADER]
        written.set()
        slow = await reading
        assert (slow.json(), slow.headers.get(HEADER), slow.headers.get("Set-Cookie")) == (1, None, None)
        same = await client.post("/absent", headers={HEADER: token})
        assert (same.json(), HEADER in same.headers, "Set-Cookie" in same.headers) == (False, False, False)


async def test_a_write_after_the_response_began_is_not_in_it(tmp_path: Path) -> None:
    """A streaming response has the writes from before its start."""

    async def stream(request: Request) -> ASGIApp:
        state = manager(request)
        await state.incr("n")

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b"%d" % await state.incr("n"), "more_body": True})
            await send({"type": "http.response.body", "body": b"%d" % await state.incr("n")})

        return answer

    app = worker(Route("/stream", stream))
    async with shared(tmp_path) as state, beside(app, state) as client:
        answer = await client.get("/stream")
        assert (answer.text, answer.headers[HEADER], state.revision) == ("23", "lab=1", 3)


async def test_the_other_headers_stay(tmp_path: Path) -> None:
    """The cookies and headers of the application are sent as they are, and a response without headers is no error."""

    async def with_cookie(request: Request) -> Response:
        answer = await write(request)
        answer.set_cookie("mine", "1")
        answer.headers["Cache-Control"] = "public"
        return answer

    async def bare(_: Request) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

        return answer

    app = worker(Route("/cookie", with_cookie), Route("/bare", bare))
    async with shared(tmp_path) as state, beside(app, state) as client:
        answer = await client.get("/cookie")
        assert [cookie.split("=")[0] for cookie in answer.headers.get_list("Set-Cookie")] == ["mine", "lab_state-lab"]
        assert answer.headers["Cache-Control"] == "public"
        assert (await client.get("/bare")).status_code == 204


# Revisions that are not those of the state


TEXTS = [
    *(
        "lab=" + "9" * 20,
        "lab=" + "9" * 5000,
        "lab=-1",
        "lab=+1",
        "lab=1_0",
        "lab=1e3",
        "lab=\xb2",
        "lab= 7",
        "lab=7 7",
    ),
    *("lab=", "lab", "=7", "", ",,;=", "other=7", "LAB=7", "lab_state-lab=7 ", "\xe9=7"),
]
"""Texts with no revision of the state `lab`, as a cookie and as a header."""


def test_texts_that_are_no_revision() -> None:
    """A client may send anything. Only numbers of up to 19 digits for known states count, also beside other text."""
    for text in TEXTS:
        value = text.encode("latin-1")
        for header in ((b"cookie", b"lab_state-" + value), (b"lab-state-revision", value), (b"other", b"lab=7")):
            assert revisions_of([header], {"lab"}) == {}, header
        headers = [
            (b"cookie", b"a=b;lab_state-" + value),
            (b"cookie", b"lab_state-lab=3"),
            (b"lab-state-revision", b"x=1"),
        ]
        assert revisions_of(headers, {"lab", "x"}) == {"lab": 3, "x": 1}, text


@pytest.mark.parametrize("sent", ["lab=" + "9" * 19, "lab=1000", "lab=-1"])
async def test_a_revision_that_the_state_does_not_have(sent: str, tmp_path: Path) -> None:
    """A revision that was made up delays a request by one question to the owner at most. The next write replaces it."""
    async with two(tmp_path) as ((owner, _), (follower, other)):
        revision = await owner.set("n", 5)
        await follower.wait_revision(revision)
        assert (await other.get("/", headers={HEADER: sent})).json() == 5
        answer = await other.post("/", headers={HEADER: sent})
        assert answer.headers[HEADER] == f"lab={revision + 1}"
        assert not questions(follower)


def test_the_highest_revision_counts() -> None:
    """Of several revisions of one state, in cookies and headers, the highest one counts."""
    low, high = (b"cookie", b"lab_state-lab=1; lab_state-lab=0"), (b"lab-state-revision", b"lab=2, lab=12, lab=3")
    for headers in ([low, high], [high, low]):
        assert revisions_of(headers, {"lab"}) == {"lab": 12}


async def test_a_revision_of_a_state_that_was_deleted(tmp_path: Path) -> None:
    """A revision of an older state is higher than all that the new state has. It blocks no request, and gives way to the next write."""
    state, app = shared(tmp_path), worker()
    async with beside(app, state) as client:
        async with state:
            for _ in range(3):
                await client.post("/")
        assert {cookie.value for cookie in client.cookies.jar} == {"3"}
        for file in tmp_path.glob("lab.*"):
            file.unlink()
        async with state:
            assert (await client.get("/")).json() == 0
            assert (await client.post("/")).headers[HEADER] == "lab=1"
        assert {cookie.value for cookie in client.cookies.jar} == {"1"}


# No owner


async def test_without_an_owner_a_request_waits_and_is_then_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is 503 with `Retry-After`, because the page would lack the client's own write. A client without one gets the older state."""
    clock = ManualClock()
    async with two(tmp_path, clock=clock, owner_timeout=4) as ((owner, one), (follower, other)):
        token = (await one.post("/")).headers[HEADER]
        await follower.wait_revision(owner.revision)
        async with apart(owner):
            newer = (await one.post("/")).headers[HEADER]
            waiting = asyncio.create_task(other.get("/", headers={HEADER: newer}))
            await until(lambda: questions(follower))
            while not waiting.done():
                clock.advance(1.0)
                await idle()
            answer = await waiting
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json() == {"detail": "the state is not available at present; try again later"}
            assert (await other.get("/", headers={HEADER: token})).json() == 1
            assert (await other.get("/")).json() == 1
    assert "GET answered with 503: UnavailableError: catch_up() of 'lab' had no answer" in caplog.text


async def test_the_next_owner_has_the_revision(tmp_path: Path) -> None:
    """A request that waits when the owner crashes goes on when its worker is the owner."""
    owner, follower = shared(tmp_path), shared(tmp_path)
    app = worker()
    async with owner, beside(app, owner) as one, beside(app, follower) as other:
        await follower.start()
        answered = await one.post("/")
        cut(owner)  # until the follower has connected again, it lacks what comes now
        token = (await one.post("/")).headers[HEADER]
        await crash(owner)
        assert (await other.get("/", headers={HEADER: token})).json() == 2
        assert answered.headers[HEADER] < token
        await until(lambda: follower.role == "owner")
        await bury(owner)
        await follower.stop()


async def test_a_request_that_is_cancelled_waits_no_longer(tmp_path: Path) -> None:
    """A cancelled request leaves no question behind."""
    async with two(tmp_path) as ((owner, one), (follower, other)), apart(owner):
        token = (await one.post("/")).headers[HEADER]
        waiting = asyncio.create_task(other.get("/", headers={HEADER: token}))
        await until(lambda: questions(follower))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not questions(follower)


# Everything else goes through


def test_websockets_and_states_that_are_not_shared(tmp_path: Path) -> None:
    """The lifespan and WebSockets go through unchanged, and a state that is not shared has no revisions to send."""

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(await manager(websocket).incr("n"))
        await websocket.close()

    for state in (Manager("lab", MemoryStorage()), shared(tmp_path)):
        app = Starlette(routes=[*worker().routes, WebSocketRoute("/socket", socket)], lifespan=lifespan(state))
        app.add_middleware(ReadYourWrites)
        with TestClient(app) as client:
            with client.websocket_connect("/socket", headers={HEADER: "lab=1000"}) as connected:
                assert connected.receive_json() == 1
            answer = client.post("/", headers={HEADER: "lab=1000"})
            assert answer.json() == 2
            assert (HEADER in answer.headers) == state.config.shared


def test_the_lifespan_must_run(tmp_path: Path) -> None:
    """Without the lifespan of lab_state there is nothing to wait for, so a request is an error with the remedy."""
    client = TestClient(worker())
    with pytest.raises(LookupError, match="the application's lifespan does not run"):
        client.get("/")


def test_fastapi(tmp_path: Path) -> None:
    """The middleware of the module for FastAPI is the same. Writes of a `def` endpoint and of a dependency count."""
    assert fastapi.ReadYourWrites is starlette.ReadYourWrites
    state = shared(tmp_path)
    app = FastAPI(lifespan=lifespan(state))
    app.add_middleware(fastapi.ReadYourWrites)

    @app.post("/")
    def add() -> int:
        return state.blocking.incr("n", type=int)

    with TestClient(app) as client:
        assert client.post("/").headers[HEADER] == "lab=1"


async def test_a_state_that_is_lost(tmp_path: Path) -> None:
    """If a worker has lost its state, a request with a revision that it lacks is answered with 503."""
    async with shared(tmp_path) as state, beside(worker(), state) as client:
        await client.post("/")
        member_of(state).port.refuse(UnavailableError("the files are lost"))
        assert (await client.get("/", headers={HEADER: "lab=2"})).status_code == 503
        assert (await client.get("/", headers={HEADER: "lab=1"})).json() == 1


# Real servers


async def test_workers_of_a_server(tmp_path: Path) -> None:
    """Under uvicorn with three workers, clients with new connections find each of their visits, while the owner is killed."""
    example = Path(__file__).parents[2] / "docs" / "examples" / "workers_app"

    async def visitor(page: str) -> None:
        limits = httpx2.Limits(max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            for visit in range(1, 11):
                request_id = {"Idempotency-Key": f"{page}-{visit}"}
                assert int(await answered(client.post, f"/visits/{page}", headers=request_id)) == visit
                assert int(await answered(client.get, f"/visits/{page}")) == visit
                assert int(client.cookies["lab_state-visits"]) >= visit

    async def answered(method: Callable[..., Awaitable[httpx2.Response]], *what: Any, **more: Any) -> str:
        """Send a request until it is answered: the worker that is killed does not answer."""
        while True:
            try:
                return (await method(*what, **more)).raise_for_status().text
            except httpx2.TransportError:
                continue

    async with (
        workers(str(example), 3, tmp_path) as (_, url),
        httpx2.AsyncClient(base_url=url, timeout=60) as client,
        asyncio.TaskGroup() as group,
    ):
        for number in range(20):
            group.create_task(visitor(f"page{number}"))
        status = (await client.get("/health")).json()["managers"]["visits"]
        os.kill(status["owner_pid"], signal.SIGKILL)
