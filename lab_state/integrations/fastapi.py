"""For FastAPI: dependencies. All other names are the same objects as in the module for Starlette."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

from fastapi.requests import HTTPConnection

from lab_state._arguments import check_key
from lab_state._entries import MISSING
from lab_state.cache import Reader
from lab_state.entry import Entry
from lab_state.integrations.starlette import ReadYourWrites, errors, health, lifespan, push, sse
from lab_state.integrations.starlette import manager as manager_of
from lab_state.integrations.starlette import reader as reader_of
from lab_state.manager import Manager

__all__ = ["ReadYourWrites", "entry", "errors", "health", "lifespan", "manager", "push", "reader", "sse"]

T = TypeVar("T")


def manager(name: str | None = None) -> Callable[[HTTPConnection], Awaitable[Manager]]:
    """Return a dependency for a manager: `Annotated[Manager, Depends(manager("my-module"))]`.

    The dependency works in endpoints, in WebSockets, and in mounted applications. A mounted application finds
    the managers of its parent. The dependency also works in a plain `def` endpoint; use `.blocking` there.
    FastAPI always calls the dependency itself on the event loop.

    Args:
        name: The name of the manager. It may be left out if the application has only one.

    Raises:
        LookupError: In a request: there is no such manager, or the lifespan did not run. The message lists
            the managers that exist.
    """

    async def manager(connection: HTTPConnection) -> Manager:
        return manager_of(connection, name)

    return manager


def reader(name: str | None = None) -> Callable[[HTTPConnection], Awaitable[Reader]]:
    """Return a dependency for a reader: `Annotated[Reader, Depends(reader("my-module"))]`.

    Args:
        name: The name of the state that the reader reads. It may be left out if the
            application has only one reader.

    Raises:
        LookupError: In a request: there is no such reader, or the lifespan did not run. The message lists
            the readers that exist.
    """

    async def reader(connection: HTTPConnection) -> Reader:
        return reader_of(connection, name)

    return reader


@overload
def entry(key: str, type: type[T], *, manager: str | None = ...) -> Callable[[HTTPConnection], Awaitable[Entry[T]]]: ...
@overload
def entry(
    key: str, type: type[T], *, default: None, manager: str | None = ...
) -> Callable[[HTTPConnection], Awaitable[Entry[T | None]]]: ...
@overload
def entry(
    key: str, type: type[T], *, default: T, manager: str | None = ...
) -> Callable[[HTTPConnection], Awaitable[Entry[T]]]: ...
@overload
def entry(
    key: str, type: Any, *, default: Any = ..., manager: str | None = ...
) -> Callable[[HTTPConnection], Awaitable[Entry[Any]]]: ...
def entry(
    key: str, type: Any, *, default: Any = MISSING, manager: str | None = None
) -> Callable[[HTTPConnection], Awaitable[Entry[Any]]]:
    """Return a dependency for one typed key: `Annotated[Entry[int], Depends(entry("visits", int, default=0))]`.

    Args:
        key: The key.
        type: The type of the value; see `Manager.entry`.
        default: The value for a missing key: `get` and `pop` return it, and `update` and `incr` start from it.
        manager: The name of the manager. It may be left out if the application has only one.

    Raises:
        InvalidKeyError: The key is not valid.
        TypeError: In a request: the type cannot be decoded.
        LookupError: In a request: there is no such manager, or the lifespan did not run. The message lists
            the managers that exist.
    """
    check_key(key)

    async def entry(connection: HTTPConnection) -> Entry[Any]:
        found: Entry[Any] = manager_of(connection, manager).entry(key, type, default=default)
        return found

    return entry
