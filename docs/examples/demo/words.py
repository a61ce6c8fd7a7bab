"""A FastAPI application on lab_state. It stores lines of text, and counts their words.

An answer means that the change is durable. Run it with `uvicorn words:app`. The state is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel

from lab_state import Config, FileStorage, Manager

# flush_interval=0: a write returns when it is durable. Concurrent requests share the syncs.
state = Manager(Config(name="words", flush_interval=0), FileStorage(os.environ.get("STATE_DIRECTORY", "state")))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Start the state with the server, and stop it with the server."""
    async with state:
        yield


app = FastAPI(lifespan=lifespan)


class Line(BaseModel):
    """A line of a page."""

    page: str
    number: int
    text: str


@app.post("/lines")
async def add(line: Line) -> int:
    """Store a line and count its words, both or neither. A line that is sent again is counted once."""
    key = f"line/{line.page}/{line.number}"
    async with state.transaction() as tx:
        words = 0 if key in tx else len(line.text.split())
        tx.set(key, line)
        # The answer is sent when the block has ended. Then the change is durable.
        return tx.incr(f"words/{line.page}", words, type=int)


@app.get("/state")
async def whole() -> dict[str, object]:
    """Return the whole state."""
    return await state.get_all()
