"""The history and the list of the states of an `S3Storage`; see `storage/_history`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from lab_state.storage._history import FoundGeneration
from lab_state.storage._protocol import Reading

if TYPE_CHECKING:
    from lab_state.storage.s3._client import Requests
    from lab_state.storage.s3._format import Names

R = TypeVar("R")


class Run(Protocol):
    """A function that calls another one with new connections to the store, and with the names of a state."""

    async def __call__(self, name: str, work: Callable[[Requests, Names], Awaitable[R]], /) -> R: ...


class S3History:
    """The generations of the states in a bucket; see `History`."""

    def __init__(self, run: Run) -> None:
        """Keep the function that makes the connections."""
        self._run = run

    async def generations(self, name: str) -> list[FoundGeneration]:
        """Return the generations that can be read, the oldest first; see `History.generations`."""

        async def work(store: Requests, names: Names) -> list[FoundGeneration]:
            from lab_state.storage.s3._generations import list_generations  # noqa: PLC0415 -- see `_import`

            return await list_generations(store, names)

        return await self._run(name, work)

    async def read(self, name: str, generation: FoundGeneration) -> Reading:
        """Read one generation; see `History.read`."""

        async def work(store: Requests, names: Names) -> Reading:
            from lab_state.storage.s3._generations import read_generation  # noqa: PLC0415 -- see `_import`

            return await read_generation(store, names, generation)

        return await self._run(name, work)
