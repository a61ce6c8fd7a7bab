"""The application of the tests of servers, with FastAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from server_counting import count, make_manager

from lab_state.integrations.fastapi import errors, health, lifespan

state = make_manager()
app = FastAPI(lifespan=lifespan(state))
app.add_api_route("/health", health())
errors(app)


@app.post("/count")
async def post_count(id: str) -> dict[str, Any]:
    return await count(state, id)
