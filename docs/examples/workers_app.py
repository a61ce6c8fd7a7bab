"""A FastAPI application for several workers, which share one state.

Run it with `uvicorn workers_app:app --workers 4`. The state is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import FastAPI, Header

from lab_state import Config, FileStorage, Manager, Transaction
from lab_state.integrations.fastapi import ReadYourWrites, errors, health, lifespan

visits = Manager(Config("visits", shared=True), FileStorage(os.environ.get("STATE_DIRECTORY", "state")))
app = FastAPI(lifespan=lifespan(visits))
app.add_middleware(ReadYourWrites)  # a client reads its own visit in each worker
app.add_api_route("/health", health())
errors(app)  # if there is no owner for 10 s, the answer to a write is 503

RequestId = Annotated[str, Header(alias="Idempotency-Key", min_length=1, max_length=100)]


@app.post("/visits/{page}")
async def visit(page: str, request_id: RequestId) -> int:
    """Count a visit, and return the count. A client that gets no answer sends the request again, with the same id."""

    def count(tx: Transaction) -> int:
        counted = tx.get(f"request/{request_id}", None, type=int)
        if counted is None:
            counted = tx.incr(f"page/{page}", type=int)
            tx.set(f"request/{request_id}", counted, ttl=3600)  # a client gives up within an hour
        return counted

    return await visits.transact(count)


@app.get("/visits/{page}")
async def visited(page: str) -> int:
    return await visits.get(f"page/{page}", 0, type=int)
