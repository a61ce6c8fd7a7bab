"""A FastAPI application on S3 for rolling deployments: when a newer process deposes a process, the older one ends itself.

Run it with `uvicorn rolling_app:app`; the state is in the bucket `$BUCKET`.
"""

from __future__ import annotations

import os
import signal

from fastapi import FastAPI

from lab_state import Config, FencedError, Manager, S3Storage
from lab_state.integrations.fastapi import errors, health, lifespan


def end_process(_: FencedError) -> None:
    os.kill(os.getpid(), signal.SIGTERM)  # `kubectl delete pod` sends the same signal: the server ends gracefully


# flush_interval=0: each answered write is durable, so no answered write is lost when the process is deposed.
visits = Manager(
    Config(name="visits", flush_interval=0),
    S3Storage(os.environ.get("BUCKET", "my-bucket")),
    on_fenced=end_process,
)
app = FastAPI(lifespan=lifespan(visits))
app.add_api_route("/health", health())
# After a failed write, the answer is 503. If this process is fenced, a client that tries again reaches the new one.
errors(app)


@app.post("/visits/{page}")
async def visit(page: str) -> int:
    return await visits.incr(f"page/{page}", type=int)


@app.get("/visits/{page}")
async def visited(page: str) -> int:
    return await visits.get(f"page/{page}", 0, type=int)
