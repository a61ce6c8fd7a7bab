"""What the conformance suite is written with."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from lab_state.exceptions import UnavailableError
from lab_state.storage._protocol import SnapshotSource, Storage, StorageSession

E = TypeVar("E", bound=BaseException)
R = TypeVar("R")

NAME = "conformance"


class Hooks:
    """The facts about the storage under test that a suite needs."""

    def make_storage(self) -> Storage:
        """Make a storage on the place of this test. Each call gives one on the same place."""
        raise NotImplementedError

    async def crash(self, session: StorageSession) -> None:
        """End a session as SIGKILL would: what it holds is let go, nothing is written."""
        raise NotImplementedError

    def read_raw(self, name: str) -> Mapping[str, bytes]:
        """Read everything that is stored for a state, part by part, past the storage."""
        raise NotImplementedError

    def write_raw(self, name: str, part: str, data: bytes | None) -> None:
        """Replace one of these parts, past the storage, or delete it."""
        raise NotImplementedError


@asynccontextmanager
async def opened(storage: Storage, name: str = NAME) -> AsyncGenerator[StorageSession]:
    """A session, closed at the end."""
    session = await storage.open(name)
    try:
        yield session
    finally:
        await session.aclose()


def given(*slices: bytes) -> SnapshotSource:
    """A view in these slices."""

    async def view() -> AsyncIterator[bytes]:
        for part in slices:
            yield part

    return view


def failing(*slices: bytes) -> SnapshotSource:
    """A view that ends with an error behind these slices."""

    async def view() -> AsyncIterator[bytes]:
        for part in slices:
            yield part
        raise UnavailableError("the view cannot be finished")

    return view


async def awaited(call: Awaitable[object]) -> None:
    """As a coroutine, so that it can be a task."""
    await call


async def got_through(call: Awaitable[object]) -> bool:
    """Something else than `None` when it returns."""
    await call
    return True


async def raises(kind: type[E], call: Awaitable[object]) -> E:
    """The error that it must raise."""
    try:
        await call
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


async def until(run: Callable[[int], Coroutine[Any, Any, bool]]) -> None:
    """Cancel at the first await, the second, and so on, in both ways, until the call gets through."""
    for number in range(200):
        if await run(number):
            return
    raise AssertionError("the call awaits more than a hundred times")


@types.coroutine
def cancelled_at(number: int, call: Coroutine[Any, Any, R]) -> Generator[Any, Any, R | None]:
    """Run a coroutine, and cancel it at one of its awaits as `Task.cancel` would; `None` if that hit it.

    An even number means while it waits, an odd one when it has been woken.
    """
    awaits, woken = divmod(number, 2)
    try:
        for _ in range(awaits):
            yield call.send(None)
        waiting: Any = call.send(None)
        if woken:
            yield waiting
        else:
            _ = asyncio.isfuture(waiting) and waiting.cancel()
        waiting = call.throw(asyncio.CancelledError())
        while True:  # what the call still awaits to clean up
            yield waiting
            waiting = call.send(None)
    except asyncio.CancelledError:
        return None
    except StopIteration as end:
        result: R = end.value
        return result
