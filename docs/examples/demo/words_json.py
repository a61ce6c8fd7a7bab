"""The application of `words.py` on a dict that `json.dump` writes to a file each second.

It does this with care. A thread writes a copy of the dict to a new file, syncs it, and renames it over the old one.
Run it with `uvicorn words_json:app`. The file is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

PATH = Path(os.environ.get("STATE_DIRECTORY", "state")) / "words.json"
state: dict[str, Any] = {}


def save(copy: dict[str, Any]) -> None:
    """Write a new file and rename it over the old one, so that a kill leaves the old file or the new one."""
    aside = PATH.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(copy, file)
        file.flush()
        os.fsync(file.fileno())  # noqa: TID251 -- this is not lab_state
    aside.replace(PATH)


async def save_each_second() -> None:
    """Save each second. The copy is made on the event loop, so that no request changes it."""
    while True:
        await asyncio.sleep(1)
        await asyncio.to_thread(save, state.copy())


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Load the file, save it each second, and once more at the end."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    if PATH.exists():
        state.update(json.loads(PATH.read_text("utf-8")))
    saving = asyncio.create_task(save_each_second())
    yield
    saving.cancel()
    with suppress(asyncio.CancelledError):
        await saving
    save(state)


app = FastAPI(lifespan=lifespan)


class Line(BaseModel):
    """A line of a page."""

    page: str
    number: int
    text: str


@app.post("/lines")
async def add(line: Line) -> int:
    """Store a line and count its words. A line that is sent again is counted once."""
    key, count = f"line/{line.page}/{line.number}", f"words/{line.page}"
    words = 0 if key in state else len(line.text.split())
    state[key] = line.model_dump()
    total: int = state.get(count, 0) + words
    state[count] = total
    return total


@app.get("/state")
async def whole() -> dict[str, object]:
    """Return the whole state."""
    return state
