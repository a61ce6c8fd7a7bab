"""A FastAPI application on S3 for rolling deployments: a process that a newer one has deposed ends itself.

Run it with `uvicorn rolling_app:app`; the state is in the bucket `$BUCKET`.
"""

from __future__ import annotations

import os
import signal

from fastapi import FastAPI

from lab_state import Config, FencedError, Manager, S3Storage
from lab_state.integrations.fastapi import errors, health, lifespan


def end_process(_: FencedError) -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # as `kubectl delete pod` does: the server ends gracefully


# flush_interval=0: what is answered is durable, so a process that is deposed has promised nothing that is lost.
visits = Manager(
    Config(name="visits", flush_interval=0),
    S3Storage(os.environ.get("BUCKET", "my-bucket")),
    on_fenced=end_process,
)
app = FastAPI(lifespan=lifespan(visits))
app.add_api_route("/health", health())
errors(app)  # a write that failed is 503. Fenced: the same request, a second later, reaches the new process


@app.post("/visits/{page}")
async def visit(page: str) -> int:
    return await visits.incr(f"page/{page}", type=int)


@app.get("/visits/{page}")
async def visited(page: str) -> int:
    return await visits.get(f"page/{page}", 0, type=int)
