"""What the type checkers make of the integrations; checked by both, never run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import assert_type

from aiohttp import web
from fastapi import FastAPI
from key_value.aio.protocols import AsyncKeyValue
from litestar.stores.base import NamespacedStore
from litestar.stores.registry import StoreRegistry
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.routing import Route

from lab_state import Entry, Manager, Reader
from lab_state.integrations import aiohttp, fastapi, key_value, litestar, prometheus, starlette


def lifespans(state: Manager, copy: Reader) -> None:
    Starlette(routes=[Route("/health", starlette.health())], lifespan=starlette.lifespan(state, copy))
    FastAPI(lifespan=fastapi.lifespan(state, state, inner=starlette.lifespan(state)))
    Starlette().add_middleware(starlette.ReadYourWrites)
    FastAPI().add_middleware(fastapi.ReadYourWrites, cookie=False)


def dependencies(request: Request) -> None:
    assert_type(starlette.manager(request, "name"), Manager)
    assert_type(starlette.reader(request), Reader)
    assert_type(fastapi.reader("name"), Callable[[HTTPConnection], Awaitable[Reader]])
    assert_type(fastapi.manager("name"), Callable[[HTTPConnection], Awaitable[Manager]])
    assert_type(fastapi.entry("n", int, default=0), Callable[[HTTPConnection], Awaitable[Entry[int]]])
    assert_type(fastapi.entry("n", int, manager="name"), Callable[[HTTPConnection], Awaitable[Entry[int]]])
    assert_type(fastapi.entry("n", int, default=None), Callable[[HTTPConnection], Awaitable[Entry[int | None]]])


def applications(app: web.Application, request: web.Request, state: Manager, copy: Reader) -> None:
    aiohttp.setup(app, state, copy)
    litestar.LabStatePlugin(notes=state, jobs=copy)
    assert_type(aiohttp.reader(request, "jobs"), Reader)
    app.router.add_get("/health", aiohttp.health())
    assert_type(aiohttp.manager(request), Manager)
    assert_type(aiohttp.manager(app, "name"), Manager)


def stores(state: Manager) -> None:
    store: NamespacedStore = litestar.LabStateStore(state.namespace("litestar"))
    StoreRegistry(default_factory=store.with_namespace)
    _: AsyncKeyValue = key_value.LabStateStore(state.namespace("mcp"))
    prometheus.LabStateCollector(state, state)
