"""A Starlette application that counts visits. It answers when the visit is durable.

Run it with `uvicorn starlette_app:app`; the state is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lab_state import Config, FileStorage, Manager
from lab_state.integrations.starlette import errors, health, lifespan, manager

# flush_interval=0: a write returns when it is durable; concurrent requests share the syncs.
visits = Manager(
    Config(name="visits", flush_interval=0),
    FileStorage(os.environ.get("STATE_DIRECTORY", "state/modules")),
)


async def visit(request: Request) -> JSONResponse:
    state = manager(request, "visits")  # or request.state.lab_state["visits"]
    return JSONResponse(await state.incr(f"page/{request.path_params['page']}"))


async def pages(request: Request) -> JSONResponse:
    return JSONResponse(await manager(request).get_all("page/", type=int))


app = Starlette(
    routes=[
        Route("/visits/{page}", visit, methods=["POST"]),
        Route("/visits", pages),
        Route("/health", health()),
    ],
    lifespan=lifespan(visits),
)
errors(app)  # after a failed write, the answer is 503; for a bad key, it is 422
