"""The application of the tests of servers, with Starlette."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from server_counting import count, make_manager
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lab_state.integrations.starlette import errors, health, lifespan, manager


async def post_count(request: Request) -> JSONResponse:
    return JSONResponse(await count(manager(request), request.query_params["id"]))


def close_connections() -> None:
    """Close the sockets of HTTP, which a forked child has as well. Otherwise the clients of its parent would wait for it."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            one = socket.socket(fileno=int(descriptor.name))
            if one.family == socket.AF_INET:
                one.close()
            else:
                one.detach()


async def post_fork(_: Request) -> JSONResponse:
    """Fork a child that outlives this worker, as a library may do. It ends with the session of the server."""
    child = os.fork()
    if not child:
        close_connections()
        while True:
            time.sleep(60)  # noqa: ASYNC251 -- this is the child
    return JSONResponse({"pid": os.getpid(), "child": child})


app = Starlette(
    routes=[
        Route("/count", post_count, methods=["POST"]),
        Route("/fork", post_fork, methods=["POST"]),
        Route("/health", health()),
    ],
    lifespan=lifespan(make_manager()),
)
errors(app)
