"""The application of the tests of servers, with aiohttp."""

from __future__ import annotations

from aiohttp import web
from server_counting import count, make_manager

from lab_state.integrations.aiohttp import errors, health, manager, setup


async def post_count(request: web.Request) -> web.Response:
    return web.json_response(await count(manager(request), request.query["id"]))


async def make_app() -> web.Application:
    """Return the application of one worker of gunicorn."""
    app = web.Application()
    setup(app, make_manager())
    errors(app)
    app.router.add_post("/count", post_count)
    app.router.add_get("/health", health())
    return app
