"""One state, many processes: the writer, and the web workers that read its mirror in Redis.

Run `uvicorn shared:writer --port 8001` once, and `uvicorn shared:worker --port 8000 --workers 4`.
The state is in `$STATE_DIRECTORY`. `$REDIS_URL` is the URL of Redis. `$WRITER_URL` is the URL of the writer, for the
workers.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2 as httpx
from fastapi import FastAPI, Request, Response

from lab_state import Config, FileStorage, Manager, RedisCache, UnavailableError
from lab_state.integrations.fastapi import health, lifespan

NAME = "shared"
cache = RedisCache(os.environ.get("REDIS_URL", "redis://localhost"))

# The writer

state = Manager(
    Config(name=NAME, flush_interval=0),
    FileStorage(os.environ.get("STATE_DIRECTORY", "state/modules")),
    cache,
)

writer = FastAPI(lifespan=lifespan(state))


@writer.put("/{key}")
async def put(key: str, value: int) -> int:
    return await state.set(key, value)  # returns the revision, when the change is durable


# The workers

reader = cache.reader(NAME, local=True)
writer_url = os.environ.get("WRITER_URL", "http://localhost:8001")


@asynccontextmanager
async def reading(app: FastAPI) -> AsyncIterator[None]:
    async with httpx.AsyncClient(base_url=writer_url) as client:
        app.state.client = client
        yield


worker = FastAPI(lifespan=lifespan(reader, inner=reading))
worker.add_api_route("/health", health())


@worker.exception_handler(UnavailableError)
async def unavailable(_: Request, error: UnavailableError) -> Response:
    return Response(str(error), 503, {"Retry-After": "1"})


@worker.get("/{key}")
async def get(key: str, response: Response) -> int:
    response.headers["worker"] = str(os.getpid())
    return await reader.get(key, 0, type=int)


@worker.put("/{key}")
async def change(key: str, value: int, request: Request) -> int:
    answer = await request.app.state.client.put(f"/{key}", params={"value": value})
    await reader.wait_revision(answer.raise_for_status().json())
    return await reader.get(key, type=int)  # the value that was just written, or a newer one
