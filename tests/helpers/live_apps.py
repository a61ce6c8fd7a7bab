"""Applications with live updates, one for each framework: `/events`, `/socket`, and `POST /set/{key}`."""

# ruff: noqa: PLC0415 -- each imports its own framework alone, so that a server starts quickly

from __future__ import annotations

import os
from typing import Any

from lab_state import Change, Manager, MemoryStorage

state = Manager("live", MemoryStorage())
TIMES: dict[str, Any] = {"heartbeat": 15.0, "retry": 2.0}


def brief(change: Change) -> list[Any]:
    return [change.key, change.kind]


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket

    from lab_state.integrations.starlette import lifespan, push, sse

    async def events(request: Request) -> Response:
        return sse(request, state.watch(), **TIMES)

    async def socket(websocket: WebSocket) -> None:
        if "accepted" in websocket.query_params:
            await websocket.accept()
        await push(websocket, state.watch(), data=brief)

    async def set_key(request: Request) -> Response:
        await state.set(request.path_params["key"], 1)
        return Response()

    return Starlette(
        routes=[
            Route("/events", events),
            WebSocketRoute("/socket", socket),
            Route("/set/{key}", set_key, methods=["POST"]),
        ],
        lifespan=lifespan(state),
    )


def fastapi() -> Any:
    from fastapi import FastAPI, Request, WebSocket
    from fastapi.responses import Response

    from lab_state.integrations.fastapi import lifespan, push, sse

    globals().update(Request=Request, WebSocket=WebSocket)  # for the annotations

    app = FastAPI(lifespan=lifespan(state))

    @app.get("/events")
    async def events(request: Request) -> Response:
        return sse(request, state.watch(), **TIMES)

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await push(websocket, state.watch(), data=brief)

    @app.post("/set/{key}")
    async def set_key(key: str) -> None:
        await state.set(key, 1)

    return app


def litestar() -> Any:
    from litestar import Litestar, Request, WebSocket, post, route, websocket
    from litestar.params import FromPath
    from litestar.response import Stream

    from lab_state.integrations.litestar import LabStatePlugin, push, sse

    globals().update(Request=Request, WebSocket=WebSocket, Stream=Stream, FromPath=FromPath)  # for the annotations

    @route("/events", http_method=["GET", "HEAD"])
    async def events(request: Request[Any, Any, Any]) -> Stream:
        return sse(request, state.watch(), **TIMES)

    @websocket("/socket")
    async def socket(socket: WebSocket[Any, Any, Any]) -> None:
        if "accepted" in socket.query_params:
            await socket.accept()
        await push(socket, state.watch(), data=brief)

    @post("/set/{key:str}")
    async def set_key(key: FromPath[str]) -> None:
        await state.set(key, 1)

    return Litestar([events, socket, set_key], plugins=[LabStatePlugin(live=state)], logging_config=None)


def aiohttp() -> Any:
    from aiohttp import web

    from lab_state.integrations.aiohttp import push, setup, sse

    async def events(request: web.Request) -> web.StreamResponse:
        return await sse(request, state.watch(), **TIMES)

    async def socket(request: web.Request) -> web.WebSocketResponse:
        return await push(request, state.watch(), data=brief)

    async def set_key(request: web.Request) -> web.Response:
        await state.set(request.match_info["key"], 1)
        return web.Response()

    app = web.Application()
    setup(app, state)
    app.router.add_get("/events", events)
    app.router.add_get("/socket", socket)
    app.router.add_post("/set/{key}", set_key)
    return app


if __name__ == "__main__":
    from aiohttp import web

    web.run_app(aiohttp(), host="127.0.0.1", port=int(os.environ.get("PORT", "8080")))
