"""Helpers of the conformance suite."""

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
    """The four methods that a subclass of the suite defines. With them, the tests reach its storage."""

    def make_storage(self) -> Storage:
        """Return a new storage object. All objects of one test must use the same place."""
        raise NotImplementedError

    async def crash(self, session: StorageSession) -> None:
        """End a session as SIGKILL does: locks and files are released, and nothing is written."""
        raise NotImplementedError

    def read_raw(self, name: str) -> Mapping[str, bytes]:
        """Return all stored bytes of a state, by part, without using the storage. A part is a file or an object."""
        raise NotImplementedError

    def write_raw(self, name: str, part: str, data: bytes | None) -> None:
        """Replace one of these parts, without using the storage. If `data` is `None`, delete the part."""
        raise NotImplementedError


@asynccontextmanager
async def opened(storage: Storage, name: str = NAME) -> AsyncGenerator[StorageSession]:
    """Open a session, and close it at the end."""
    session = await storage.open(name)
    try:
        yield session
    finally:
        await session.aclose()


def given(*slices: bytes) -> SnapshotSource:
    """Return a source of a snapshot that consists of these slices."""

    async def view() -> AsyncIterator[bytes]:
        for part in slices:
            yield part

    return view


def failing(*slices: bytes) -> SnapshotSource:
    """Return a source of a snapshot that raises an error after these slices."""

    async def view() -> AsyncIterator[bytes]:
        for part in slices:
            yield part
        raise UnavailableError("the view cannot be finished")

    return view


async def awaited(call: Awaitable[object]) -> None:
    """Await a call. This function returns a coroutine, which `create_task` needs."""
    await call


async def got_through(call: Awaitable[object]) -> bool:
    """Await a call that returns nothing, and return True. So `cancelled_at` returns True, or `None` if the call was cancelled."""
    await call
    return True


async def raises(kind: type[E], call: Awaitable[object]) -> E:
    """Await a call that must raise an error of this class, and return the error."""
    try:
        await call
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


async def until(run: Callable[[int], Coroutine[Any, Any, bool]]) -> None:
    """Call `run` with 0, 1, 2 and so on, until it returns True. Then the call under test ended before its cancellation."""
    for number in range(200):
        if await run(number):
            return
    raise AssertionError("the call awaits a hundred times or more")


@types.coroutine
def cancelled_at(number: int, call: Coroutine[Any, Any, R]) -> Generator[Any, Any, R | None]:
    """Run a coroutine, and cancel it at one of its awaits as `Task.cancel` does. Return `None` if it was cancelled.

    The index of this await, counted from 0, is `number // 2`. An even number cancels the coroutine while it waits
    there. An odd number cancels the coroutine after the wait has ended, and before it continues. A wait that fails
    raises its error in the coroutine, which may handle it.
    """
    left, woken = divmod(number, 2)
    thrown: BaseException | None = None
    try:
        while True:  # the call may also await during its cleanup
            waiting: Any = call.send(None) if thrown is None else call.throw(thrown)
            thrown = None
            if left == 0 and not woken:
                _ = asyncio.isfuture(waiting) and waiting.cancel()
            else:
                try:
                    yield waiting
                except BaseException as error:  # noqa: BLE001 -- it is raised in the call
                    thrown = error
            if left == 0:
                thrown = asyncio.CancelledError()
            left -= 1
    except asyncio.CancelledError:
        return None
    except StopIteration as end:
        result: R = end.value
        return result
