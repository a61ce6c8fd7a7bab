"""A FastAPI application whose answers are durable: it counts the words of the lines that it is sent.

Run it with `uvicorn words:app`; the state is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel

from lab_state import Config, FileStorage, Manager

# flush_interval=0: a write returns when it is durable; concurrent requests share the syncs.
state = Manager(
    Config(name="words", flush_interval=0),
    FileStorage(os.environ.get("STATE_DIRECTORY", "state/modules")),
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with state:
        yield


app = FastAPI(lifespan=lifespan)


class Line(BaseModel):
    module: str
    number: int
    text: str


@app.post("/lines")
async def add(line: Line) -> int:
    words = len(line.text.split())
    _, total = await asyncio.gather(
        state.set(f"line/{line.module}/{line.number}", line),
        state.incr(f"words/{line.module}", words, type=int),
    )
    return total


@app.get("/lines")
async def lines() -> dict[str, Line]:
    return await state.get_all("line/", type=Line)


@app.get("/words")
async def words() -> dict[str, int]:
    return await state.get_all("words/", type=int)
