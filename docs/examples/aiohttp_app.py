"""An aiohttp application that counts visits. It answers when the visit is durable.

Run it with `python aiohttp_app.py`; the state is in `$STATE_DIRECTORY`, the port is `$PORT`.
"""

from __future__ import annotations

import os

from aiohttp import web

from lab_state import Config, FileStorage, Manager
from lab_state.integrations.aiohttp import errors, health, manager, setup

routes = web.RouteTableDef()


@routes.post("/visits/{page}")
async def visit(request: web.Request) -> web.Response:
    state = manager(request, "visits")
    return web.json_response(await state.incr(f"page/{request.match_info['page']}"))


@routes.get("/visits")
async def pages(request: web.Request) -> web.Response:
    return web.json_response(await manager(request).get_all("page/", type=int))


def make_app() -> web.Application:
    # flush_interval=0: a write returns when it is durable; concurrent requests share the syncs.
    visits = Manager(
        Config(name="visits", flush_interval=0),
        FileStorage(os.environ.get("STATE_DIRECTORY", "state/modules")),
    )
    app = web.Application()
    setup(app, visits)
    errors(app)  # after a failed write, the answer is 503; for a bad key, it is 422
    app.add_routes(routes)
    app.router.add_get("/health", health())
    return app


if __name__ == "__main__":
    web.run_app(make_app(), host="127.0.0.1", port=int(os.environ.get("PORT", "8080")))
