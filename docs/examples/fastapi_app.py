"""A FastAPI application that counts visits. It answers when the visit is durable.

Run it with `uvicorn fastapi_app:app`; the state is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response, WebSocket

from lab_state import Config, Entry, FileStorage, Manager
from lab_state.integrations.fastapi import entry, errors, health, lifespan, manager, push, sse

# flush_interval=0: a write returns when it is durable; concurrent requests share the syncs.
visits = Manager(
    Config(name="visits", flush_interval=0),
    FileStorage(os.environ.get("STATE_DIRECTORY", "state/modules")),
)
app = FastAPI(lifespan=lifespan(visits))
app.add_api_route("/health", health())
errors(app)  # after a failed write, the answer is 503; for a bad key, it is 422

Visits = Annotated[Manager, Depends(manager("visits"))]
Total = Annotated[Entry[int], Depends(entry("total", int, default=0))]


@app.post("/visits/{page}")
async def visit(page: str, state: Visits) -> int:
    return await state.incr(f"page/{page}", type=int)


@app.get("/visits")
def pages(state: Visits) -> dict[str, int]:  # FastAPI runs a plain function in a thread, so use `blocking`
    return state.blocking.get_all("page/", type=int)


@app.post("/total")
async def count(total: Total) -> int:
    return await total.update(lambda n: n + 1)


@app.websocket("/changes")
async def changes(websocket: WebSocket, state: Visits) -> None:
    await push(websocket, state.watch("page/", durable=True))


@app.get("/events")
async def events(request: Request, state: Visits) -> Response:
    return sse(
        request, state.watch("page/", durable=True), data=lambda change: [change.key, state.get_nowait(change.key, 0)]
    )
