"""The application of the tests of servers, with Litestar."""

from __future__ import annotations

from typing import Any

from litestar import Litestar, post
from litestar.params import FromQuery
from server_counting import count, make_manager

from lab_state.integrations.litestar import LabStatePlugin, errors, health

state = make_manager()


@post("/count", status_code=200)
async def post_count(id: FromQuery[str]) -> dict[str, Any]:
    return await count(state, id)


app = Litestar([post_count, health()], plugins=[LabStatePlugin(counts=state)], exception_handlers=errors())
