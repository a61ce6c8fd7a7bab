"""Live updates: what clients get, and how a stream ends under each server."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import live_apps
import msgspec
import pytest
import uvicorn
from aiohttp import web
from starlette.requests import Request
from starlette.websockets import WebSocket

from lab_state import Change, Manager, MemoryStorage
from lab_state._watch import Watcher
from lab_state.integrations import aiohttp as for_aiohttp
from lab_state.integrations import litestar as for_litestar
from lab_state.integrations import starlette as for_starlette
from lab_state.integrations._live import EndEvent, ServerStop, event_stream, send_changes

importlib.import_module("anyio._backends._asyncio")  # which Starlette would import on the event loop
HELPERS = Path(live_apps.__file__).parent
UVICORN = ["-m", "uvicorn", "--factory", "--app-dir", str(HELPERS), "--port", "0", "--no-access-log"]
SERVERS = {
    "starlette": [*UVICORN, "live_apps:starlette"],
    "fastapi": [*UVICORN, "live_apps:fastapi"],
    "litestar": [*UVICORN, "live_apps:litestar"],
    "aiohttp": [str(HELPERS / "live_apps.py")],
}
FIRST = b'retry: 2000\n\nid: 0\ndata: {"key":"","kind":"resync","revision":0}\n\n'


# Servers in processes of their own, and their signals


@asynccontextmanager
async def serving(server: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, aiohttp.ClientSession]]:
    """Run a server, and a client of it; what it prints is left to read."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *SERVERS[server],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=HELPERS,
        env={**os.environ, "PORT": "0", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": ""},
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            if match := re.search(rb"(?:unning on|istening at:) (http://127\.0\.0\.1:[1-9]\d*)", line):
                break
        else:
            raise AssertionError("it did not begin to serve")
        async with aiohttp.ClientSession(match[1].decode(), connector=aiohttp.TCPConnector(limit=0)) as session:
            yield process, session
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("server", SERVERS)
async def test_a_server_with_streams_stops_at_sigterm(server: str) -> None:
    """With 100 streams and 20 WebSockets, a server ends within a second after SIGTERM. Each client gets all changes and a clean end."""
    ready = asyncio.Semaphore(0)

    async def stream() -> bytes:
        async with session.get("/events") as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            got = await response.content.readexactly(len(FIRST))
            ready.release()
            return got + await response.read()

    async def socket() -> tuple[list[Any], int | None]:
        async with session.ws_connect("/socket") as connected:
            got = [await connected.receive_json()]
            ready.release()
            got += [json.loads(message.data) async for message in connected]
            return got, connected.close_code

    async with serving(server) as (process, session):
        streams = [asyncio.create_task(stream()) for _ in range(100)]
        sockets = [asyncio.create_task(socket()) for _ in range(20)]
        for _ in range(120):
            await ready.acquire()
        async with session.post("/set/a") as response:
            assert response.ok
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        said, _ = await process.communicate()
        took = time.monotonic() - begun
        told = FIRST + b'id: 1\ndata: {"key":"a","kind":"set","revision":1}\n\n'
        assert set(await asyncio.gather(*streams)) == {told}
        expected = [["", "resync"], ["a", "set"]], aiohttp.WSCloseCode.SERVICE_RESTART
        assert [got for got in await asyncio.gather(*sockets) if got != expected] == []
    assert b"Traceback" not in said
    assert b"ERROR" not in said
    assert took < 1
    assert process.returncode == (0 if server == "aiohttp" else -signal.SIGTERM)


# The signals, in this process


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Install a server's handlers; yield the signals that came to them."""
    came: list[int] = []

    def handler(number: int, frame: object) -> None:
        came.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    yield came
    for number, known in before.items():
        signal.signal(number, known)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_is_noted_and_passed_on(handled: list[int], number: signal.Signals) -> None:
    """On a signal the server's own handler runs, and streams end in the next turn of the loop. Closing restores the handler."""
    theirs = signal.getsignal(number)
    stopping, heard = ServerStop(), asyncio.Event()
    stopping.listen()
    stopping.listen()
    with stopping.calling(heard.set):
        signal.raise_signal(number)
        assert handled == [number]
        await heard.wait()
        signal.raise_signal(number)
        await asyncio.sleep(0)
    assert handled == [number, number]
    assert stopping.is_set
    stopping.close()
    assert signal.getsignal(number) is theirs


async def test_a_handler_that_came_later_is_kept(handled: list[int]) -> None:
    """A handler that is installed after ours also ends the next stream. It stays after closing, and the server's handler is still called."""
    stopping = ServerStop()
    stopping.listen()
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)

    def later(number: int, frame: Any) -> None:
        ours(number, frame)

    signal.signal(signal.SIGTERM, later)
    stopping.close()
    assert signal.getsignal(signal.SIGTERM) is later
    signal.raise_signal(signal.SIGTERM)
    assert handled == [signal.SIGTERM]

    stopping = ServerStop()
    stopping.listen()
    signal.signal(signal.SIGTERM, lambda *_: None)  # a server that replaces it, as granian does at its start
    stopping.listen()
    with stopping.calling((heard := asyncio.Event()).set):
        signal.raise_signal(signal.SIGTERM)
        await heard.wait()
    stopping.close()


@pytest.mark.parametrize("known", [signal.SIG_DFL, signal.SIG_IGN], ids=lambda known: known.name)
async def test_where_a_server_has_no_handler_there_is_none_of_ours(handled: list[int], known: signal.Handlers) -> None:
    """If the server has no handler for a signal, none is installed."""
    signal.signal(signal.SIGTERM, known)
    stopping = ServerStop()
    stopping.listen()
    assert signal.getsignal(signal.SIGTERM) is known
    stopping.close()


async def test_a_stream_that_is_opened_after_the_signal_ends_at_once(handled: list[int]) -> None:
    """If uvicorn got its signal before the first stream, that stream ends at once."""

    class Server:
        should_exit = True

        def handle_exit(self, number: int, frame: object) -> None: ...

    signal.signal(signal.SIGTERM, Server().handle_exit)
    stopping = ServerStop()
    stopping.listen()
    assert stopping.is_set
    with stopping.calling((called := asyncio.Event()).set):
        assert called.is_set()
    stopping.close()


def test_in_a_thread_there_are_no_signals(handled: list[int]) -> None:
    """Outside the main thread, no signal handler is installed."""
    theirs = signal.getsignal(signal.SIGTERM)

    async def main() -> None:
        stopping = ServerStop()
        stopping.listen()
        assert signal.getsignal(signal.SIGTERM) is theirs
        stopping.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_a_signal_after_the_loop_has_ended_is_passed_on(handled: list[int]) -> None:
    """Our handler passes a signal on after its event loop was closed."""

    async def main() -> None:
        stopping = ServerStop()
        stopping.listen()

    asyncio.run(main())
    signal.raise_signal(signal.SIGTERM)
    assert handled == [signal.SIGTERM]


# What is told, in this process


@asynccontextmanager
async def under_uvicorn(app: Any) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    server.capture_signals = nullcontext  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 -- uvicorn has no event for it
        await asyncio.sleep(0)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    yield f"http://{host}:{port}"
    server.should_exit = True
    await task


@asynccontextmanager
async def under_aiohttp(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield site.name
    await runner.cleanup()


FRAMEWORKS: dict[str, Callable[[], AbstractAsyncContextManager[str]]] = {
    "starlette": lambda: under_uvicorn(live_apps.starlette()),
    "litestar": lambda: under_uvicorn(live_apps.litestar()),
    "aiohttp": lambda: under_aiohttp(live_apps.aiohttp()),
}


@pytest.fixture(params=FRAMEWORKS)
async def client(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client of each framework; heartbeats come every 5 ms."""
    monkeypatch.setitem(live_apps.TIMES, "heartbeat", 0.005)
    async with FRAMEWORKS[request.param]() as url, aiohttp.ClientSession(url) as session:
        yield session


async def nobody_watches() -> None:
    """Wait until every watch has ended."""
    while live_apps.state._core._watchers:  # noqa: ASYNC110 -- there is no event for it
        await asyncio.sleep(0)


async def test_heartbeats_keep_a_stream_alive(client: aiohttp.ClientSession) -> None:
    """A stream without changes gets comments. A change comes between them, with its revision as id."""
    async with client.get("/events") as response:
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Accel-Buffering"] == "no"
        await response.content.readuntil(b"\n\n:\n\n")
        await live_apps.state.delete_all()
        await live_apps.state.set("b", 1)
        revision = live_apps.state.revision
        got = await response.content.readuntil(b'"b"')
        assert got.endswith(b'id: %d\ndata: {"key":"b"' % revision)


async def test_a_client_that_leaves_is_noticed(client: aiohttp.ClientSession) -> None:
    """Neither a stream nor a WebSocket leaves a watch behind."""
    response = await client.get("/events")
    await response.content.readuntil(b":\n\n")
    async with client.ws_connect("/socket") as connected:
        assert await connected.receive_json() == ["", "resync"]
        await connected.send_str("what a client says is dropped")
        assert live_apps.state._core._watchers
    response.close()
    await nobody_watches()


async def test_a_websocket_whose_connection_is_cut_is_noticed(client: aiohttp.ClientSession) -> None:
    """If the connection of a WebSocket is cut, the watch ends with the next changes at the latest."""
    connected = await client.ws_connect("/socket")
    assert await connected.receive_json() == ["", "resync"]
    transport = connected.get_extra_info("socket")
    assert transport is not None
    connected._response.connection.transport.abort()  # type: ignore[union-attr]
    for number in range(3):
        await live_apps.state.set("b", number)
        await asyncio.sleep(0)
    await nobody_watches()
    await connected.close()


async def test_a_head_request_has_no_stream(client: aiohttp.ClientSession) -> None:
    """A HEAD request gets only the headers, and leaves no watch. Its connection is free for the next request."""
    async with client.head("/events") as response:
        assert (response.status, await response.read()) == (200, b"")
    async with asyncio.timeout(5), client.post("/set/a") as response:
        assert response.ok
    await nobody_watches()


async def test_a_slow_client_is_told_the_last_change_of_each_key(client: aiohttp.ClientSession) -> None:
    """A client that does not read during 20,000 changes of a key gets a few of them, and the last one."""
    async with client.get("/events") as response:
        await response.content.readuntil(b"resync")
        for number in range(20_000):
            await live_apps.state.set(f"{number % 10}-{'k' * 1000}", number)
            if number % 10 == 0:
                await asyncio.sleep(0)
        last = b"id: %d\n" % live_apps.state.revision
        got = b""
        async for part in response.content.iter_any():
            got += part
            if last in got:
                break
        assert got.count(b"id: ") < 10_000


async def test_connections_end_with_the_manager(client: aiohttp.ClientSession) -> None:
    """When the manager stops, streams end, and WebSockets are closed with 1012, also before they were accepted."""
    async with (
        client.get("/events") as response,
        client.ws_connect("/socket") as first,
        client.ws_connect("/socket?accepted=1") as second,
    ):
        await response.content.readuntil(b"resync")
        for connected in (first, second):
            assert await connected.receive_json() == ["", "resync"]
        await live_apps.state.stop()
        await response.read()
        for connected in (first, second):
            assert (await connected.receive()).data == aiohttp.WSCloseCode.SERVICE_RESTART


async def test_a_stream_ends_with_the_manager() -> None:
    """When the manager stops, the stream ends after the remaining changes."""
    ending = EndEvent()
    state = Manager("a", MemoryStorage())
    await state.start()
    stream = event_stream(state.watch(), ending, data=lambda change: change.kind, heartbeat=60, retry=0)
    assert [await anext(stream), await anext(stream)] == [b"retry: 0\n\n", b'id: 0\ndata: "resync"\n\n']
    await state.set("k", 1)
    await state.stop()
    assert [part async for part in stream] == [b'id: 1\ndata: "set"\n\n']


async def test_an_end_while_a_client_is_written_to() -> None:
    """A stream whose end comes while it waits for the client sends no remaining changes."""
    ending = EndEvent()
    async with Manager("a", MemoryStorage()) as state:
        stream = event_stream(state.watch(), ending, data=None, heartbeat=60, retry=0)
        await anext(stream), await anext(stream)
        await state.set("k", 1)
        ending.set()
        ending.set()
        assert [part async for part in stream] == []


async def test_an_end_that_comes_with_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the end and a heartbeat come in the same turn of the loop, the stream ends without an error."""
    async with Manager("a", MemoryStorage()) as state:
        ending = EndEvent()
        stream = event_stream(state.watch(), ending, data=None, heartbeat=0.001, retry=0)
        await anext(stream), await anext(stream)
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(anext(stream, b"the end"))
        await asyncio.sleep(0)
        loop.call_later(0.001, ending.set)
        time.sleep(0.01)  # noqa: ASYNC251 -- both are due at once, the heartbeat first
        assert await waiting in {b":\n\n", b"the end"}
        assert [part async for part in stream] == []


async def test_a_watch_of_a_reader_begins_by_itself() -> None:
    """The watch of a reader begins with a `resync`, and the stream adds no second one."""
    watcher = Watcher("", 0, -1, durable=True)
    watcher.resync(7)

    @asynccontextmanager
    async def watch() -> AsyncIterator[AsyncIterator[Change]]:
        yield watcher

    stream = event_stream(watch(), EndEvent(), data=None, heartbeat=60, retry=0)
    await anext(stream)
    assert await anext(stream) == b'id: 7\ndata: {"key":"","kind":"resync","revision":7}\n\n'
    watcher.close()
    assert [part async for part in stream] == []


async def test_an_event_is_one_line() -> None:
    """Raw JSON with line breaks, from `data`, stays one event."""
    async with Manager("a", MemoryStorage()) as state:
        stream = event_stream(
            state.watch(), EndEvent(), data=lambda _: msgspec.Raw(b'{\n"a": 1\r\n}'), heartbeat=60, retry=0
        )
        await anext(stream)
        assert await anext(stream) == b'id: 0\ndata: {"a": 1}\n\n'
        await stream.aclose()


# Errors


def broken(_: Change) -> object:
    raise ConnectionResetError("the data cannot be read")


async def test_an_error_of_the_data_is_not_a_client_that_left() -> None:
    """An error of `data` breaks the response and the WebSocket, even if its class is that of a client that left."""
    app = web.Application()
    state = Manager("a", MemoryStorage())
    for_aiohttp.setup(app, state)

    async def events(request: web.Request) -> web.StreamResponse:
        return await for_aiohttp.sse(request, state.watch(), data=broken)

    async def socket(request: web.Request) -> web.StreamResponse:
        return await for_aiohttp.push(request, state.watch(), data=broken)

    app.router.add_get("/events", events)
    app.router.add_get("/socket", socket)
    async with under_aiohttp(app) as url, aiohttp.ClientSession(url) as session:
        async with session.get("/events") as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        async with session.ws_connect("/socket") as connected:
            assert (await connected.receive()).type is aiohttp.WSMsgType.CLOSED


async def test_an_error_while_messages_are_dropped() -> None:
    """An error of the function that drops messages is raised, unless it says that the client has left."""

    async def sent(_: str) -> None: ...

    async with Manager("a", MemoryStorage()) as state:
        for error in (OSError("the client has left"), RuntimeError("two tasks read")):

            async def drop_input(error: Exception = error) -> None:
                raise error

            ending = nullcontext() if isinstance(error, OSError) else pytest.raises(RuntimeError, match="two tasks")
            with ending:
                await send_changes(
                    state.watch(), EndEvent(), None, drop_input=drop_input, send=sent, client_left=(OSError,)
                )


async def test_a_client_that_leaves_a_server_of_asgi_2_4() -> None:
    """Starlette: the server raises `OSError` when it cannot send, and the stream ends without an error."""

    async def receive() -> Any:
        raise AssertionError("such a server does not report that the client has left")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the client has left")

    state = Manager("a", MemoryStorage())
    async with for_starlette.lifespan(state)(None) as served:
        scope = {"type": "http", "method": "GET", "headers": [], "state": served, "asgi": {"spec_version": "2.4"}}
        await for_starlette.sse(Request(scope), state.watch())(scope, receive, send)
        assert not state._core._watchers


async def test_a_websocket_whose_client_has_left_before() -> None:
    """Starlette: if the endpoint has received that the client left, `push` returns and sends nothing."""
    received = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    state = Manager("a", MemoryStorage())
    async with for_starlette.lifespan(state)(None) as served:
        websocket = WebSocket({"type": "websocket", "headers": [], "state": served}, receive, send)
        await websocket.accept()
        await websocket.receive()
        await for_starlette.push(websocket, state.watch())
    assert sent == ["websocket.accept"]


# Bad input


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        ({"heartbeat": "1"}, TypeError, "heartbeat must be a number of seconds, not str"),
        ({"heartbeat": 0}, ValueError, "heartbeat must be above 0 seconds"),
        ({"heartbeat": float("nan")}, ValueError, "heartbeat must be above 0 seconds"),
        ({"heartbeat": 10**400}, ValueError, "heartbeat must be .* finite"),
        ({"retry": True}, TypeError, "retry must be a number of seconds, not bool"),
        ({"retry": -1}, ValueError, "retry must be 0 seconds or more"),
        ({"retry": float("inf")}, ValueError, "retry must be 0 seconds or more"),
        ({"retry": 1e308}, ValueError, "retry must be .* finite"),
    ],
    ids=repr,
)
async def test_times_are_checked(times: dict[str, Any], error: type[Exception], message: str) -> None:
    """A heartbeat is above 0 seconds, and `retry` not below 0."""
    any_request: Any = None
    watch = live_apps.state.watch()
    for sse in (for_starlette.sse, for_litestar.sse):
        with pytest.raises(error, match=message):
            sse(any_request, watch, **times)
    with pytest.raises(error, match=message):
        await for_aiohttp.sse(any_request, watch, **times)


async def test_without_a_lifespan_there_is_no_stream() -> None:
    """If the application has no managers, the error says so."""
    watch = live_apps.state.watch()
    scope = {"type": "http", "state": {}}
    with pytest.raises(LookupError, match="the application's lifespan does not run"):
        for_starlette.sse(Request(scope), watch)
    with pytest.raises(LookupError, match="the application's lifespan does not run"):
        unused: Any = None
        await for_starlette.push(WebSocket({"type": "websocket"}, unused, unused), watch)
    bare: Any = SimpleNamespace(app=SimpleNamespace(state={}))
    with pytest.raises(LookupError, match="the application's lifespan does not run"):
        for_litestar.sse(bare, watch)
    bare = SimpleNamespace(match_info=SimpleNamespace(apps=[web.Application()]))
    with pytest.raises(LookupError, match=r"pass the managers to setup\(\)"):
        await for_aiohttp.push(bare, watch)
