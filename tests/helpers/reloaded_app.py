"""The application for the tests of a graceful reload. Each visit is durable before the answer is sent."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lab_state import Config, FileStorage, Manager
from lab_state.integrations.starlette import lifespan, manager

seconds = float(os.environ.get("LOCK_TIMEOUT", "0"))
config = (
    Config("visits", shared=True)
    if "SHARED" in os.environ
    else Config("visits", flush_interval=0, lock_timeout=seconds)
)
state = Manager(config, FileStorage(os.environ["STATE_DIRECTORY"]))


async def visit(request: Request) -> JSONResponse:
    """Count a visit when the whole body has arrived. A client that does not send the end of the body keeps the request open."""
    await request.body()
    count = await manager(request, "visits").incr(request.path_params["page"])
    return JSONResponse({"pid": os.getpid(), "count": count})


app = Starlette(lifespan=lifespan(state), routes=[Route("/visits/{page}", visit, methods=["POST"])])
