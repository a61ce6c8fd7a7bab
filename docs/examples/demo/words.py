"""A FastAPI application on lab_state. It stores lines of text, and counts their words.

An answer means that the change is durable. Run it with `uvicorn words:app`, or with several workers: they share the
state, which is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from pydantic import BaseModel

from lab_state import Config, FileStorage, Manager, Transaction
from lab_state.integrations.fastapi import lifespan

state = Manager(Config("words", shared=True), FileStorage(os.environ.get("STATE_DIRECTORY", "state")))
app = FastAPI(lifespan=lifespan(state))


class Line(BaseModel):
    """A line of a page."""

    page: str
    number: int
    text: str


@app.post("/lines")
async def add(line: Line) -> int:
    """Store a line and count its words, both or neither. A line that is sent again is counted once."""
    key = f"line/{line.page}/{line.number}"

    def change(tx: Transaction) -> int:
        words = 0 if key in tx else len(line.text.split())
        tx.set(key, line)
        return tx.incr(f"words/{line.page}", words, type=int)

    return await state.transact(change)  # it returns when the change is durable


@app.get("/state")
async def whole() -> dict[str, object]:
    """Return the whole state."""
    await state.catch_up()  # another worker may have made the last change
    return await state.get_all()


@app.get("/owner")
async def owner() -> int | None:
    """Return the pid of the worker that owns the state."""
    return state.status().owner_pid
