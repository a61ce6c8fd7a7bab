"""A Litestar application that counts visits. It answers when the visit is durable. Sessions survive a restart.

Run it with `uvicorn litestar_app:app`; the state is in `$STATE_DIRECTORY`.
"""

from __future__ import annotations

import os
from typing import Any

from litestar import Litestar, Request, get, post
from litestar.di import NamedDependency
from litestar.middleware.session.server_side import ServerSideSessionConfig
from litestar.params import FromPath
from litestar.stores.registry import StoreRegistry

from lab_state import Config, FileStorage, Manager
from lab_state.integrations.litestar import LabStatePlugin, LabStateStore, errors, health

# flush_interval=0: a write returns when it is durable; concurrent requests share the syncs.
manager = Manager(
    Config(name="visits", flush_interval=0),
    FileStorage(os.environ.get("STATE_DIRECTORY", "state/modules")),
)


@post("/visits/{page:str}", status_code=200)
async def visit(page: FromPath[str], visits: NamedDependency[Manager]) -> int:
    return await visits.incr(f"page/{page}", type=int)


@get("/visits")
async def pages(visits: NamedDependency[Manager]) -> dict[str, int]:
    return await visits.get_all("page/", type=int)


@post("/mine", status_code=200)
async def mine(request: Request[Any, Any, Any]) -> int:
    request.session["visits"] = request.session.get("visits", 0) + 1
    return int(request.session["visits"])


app = Litestar(
    [visit, pages, mine, health()],
    plugins=[LabStatePlugin(visits=manager)],
    exception_handlers=errors(),  # after a failed write, the answer is 503; for a bad key, it is 422
    # Sessions, rate limits and cached responses are in separate namespaces.
    stores=StoreRegistry(default_factory=LabStateStore(manager.namespace("litestar")).with_namespace),
    middleware=[ServerSideSessionConfig().middleware],
)
