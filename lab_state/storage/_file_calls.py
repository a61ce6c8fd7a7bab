"""The history and the list of states of a `FileStorage`, on the event loop. The blocking steps run in a thread of the storage."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from lab_state.storage._file_history import list_generations, read_generation
from lab_state.storage._history import FoundGeneration
from lab_state.storage._protocol import Reading
from lab_state.storage._worker import Threads, Worker

P = ParamSpec("P")
R = TypeVar("R")


class FileHistory:
    """The generations of the states in a directory; see `History`."""

    def __init__(self, directory: str, threads: Threads) -> None:
        """Keep the settings of a storage; see `FileStorage`."""
        self._directory = directory
        self._threads = threads

    async def generations(self, name: str) -> list[FoundGeneration]:
        """Return the generations that can be read, the oldest first; see `History.generations`."""
        return await self._run(list_generations, self._directory, name)

    async def read(self, name: str, generation: FoundGeneration) -> Reading:
        """Read one generation; see `History.read`."""
        return await self._run(read_generation, self._directory, name, generation)

    async def _run(
        self, function: Callable[Concatenate[threading.Event, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call a function in a thread. If the caller is cancelled, the function ends soon, and leaves nothing open."""
        thread = Worker(self._threads)
        given_up = threading.Event()
        try:
            return await thread.run(function, given_up, *args, **kwargs)
        finally:
            given_up.set()
            thread.shutdown()
