"""The history of a `FileStorage` and its list of states, on the event loop. The blocking steps run in threads of the storage."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeAlias, TypeVar

from lab_state._log import Log
from lab_state.exceptions import StorageError
from lab_state.storage import _lookup as lookup
from lab_state.storage._file_history import list_generations, read_generation
from lab_state.storage._file_restore import (
    highest_revision,
    keep_apart,
    keep_present,
    new_writer,
    restoring_writer,
)
from lab_state.storage._file_states import list_states, remove_state
from lab_state.storage._file_writer import Writer
from lab_state.storage._history import FoundGeneration, FoundState, Listing
from lab_state.storage._keeping import Keeping
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._protocol import Reading, Recovery, SnapshotSource, StorageSession
from lab_state.storage._worker import Threads, Worker, waited

P = ParamSpec("P")
R = TypeVar("R")

Start: TypeAlias = Callable[[Callable[[], tuple[Writer, Recovery]]], Awaitable[StorageSession]]
"""A function that calls its argument in a thread, and returns a session of the writer; see `FileStorage`."""

_logger = Log(logging.getLogger("lab_state"))


class Settings(NamedTuple):
    """The settings of a `FileStorage` that its history needs."""

    directory: str
    threads: Threads
    tried: set[lookup.Identity]
    leftovers: Leftovers
    keeping: Keeping | None


class FileHistory:
    """The generations of the states in a directory; see `History`."""

    def __init__(self, settings: Settings, start: Start) -> None:
        """Keep the settings of a storage."""
        self._settings = settings
        self._start = start

    async def generations(self, name: str) -> Listing:
        """Return the generations that can be read; see `History.generations`."""
        return await self._run(list_generations, self._settings.directory, name)

    async def read(self, name: str, generation: FoundGeneration) -> Reading:
        """Read one generation; see `History.read`."""
        return await self._run(read_generation, self._settings.directory, name, generation)

    async def open_new(self, name: str) -> StorageSession:
        """Open a state that does not exist yet; see `History.open_new`."""
        directory, _, tried, leftovers, keeping = self._settings
        return await self._start(lambda: new_writer(directory, name, tried, leftovers, keeping))

    async def restoring(self, name: str) -> FileRestoring:
        """Lock a state to restore it in place; see `History.restoring`."""
        directory, threads, tried, leftovers, _ = self._settings
        writers: list[Writer] = []

        def opening() -> tuple[Writer, Recovery]:
            writer, recovery = restoring_writer(directory, name, tried, leftovers)
            writers.append(writer)
            return writer, recovery

        session = await self._start(opening)
        return FileRestoring(session, writers[0], Worker(threads))

    async def _run(
        self, function: Callable[Concatenate[threading.Event, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call a function in a thread. If the caller is cancelled, the function ends soon, and leaves nothing open."""
        thread = Worker(self._settings.threads)
        given_up = threading.Event()
        try:
            return await thread.run(function, given_up, *args, **kwargs)
        finally:
            given_up.set()
            thread.shutdown()


class FileCatalog:
    """The states in a directory; see `Catalog`."""

    def __init__(self, directory: str, threads: Threads, *, keeps: bool) -> None:
        """Keep the settings of a storage. `keeps` says whether the storage keeps a history."""
        self._directory = directory
        self._threads = threads
        self._keeps = keeps

    async def states(self) -> list[FoundState]:
        """Return the states, sorted by name; see `Catalog.states`."""
        return await self._run(list_states, self._directory)

    async def remove(self, name: str, *, history: bool) -> None:
        """Remove a state; see `Catalog.remove`. If the caller is cancelled, the removal goes on."""
        await self._run(remove_state, self._directory, name, history=history, keeps=self._keeps)

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        thread = Worker(self._threads)
        running = thread.submit(function, *args, **kwargs)
        thread.shutdown()
        return await waited(running)


class FileRestoring:
    """A state on disk that is being restored in place; see `Restoring`."""

    def __init__(self, session: StorageSession, writer: Writer, thread: Worker) -> None:
        self.path: str = writer.paths.snapshot
        self._session = session
        self._writer = writer
        self._thread = thread
        self._closing: asyncio.Task[None] | None = None

    async def highest(self) -> int:
        """Return the highest revision in any valid record or snapshot; see `Restoring.highest`."""
        return await self._run(highest_revision, self._writer.paths, self._writer.name)

    async def put(self, snapshot: SnapshotSource, *, is_damaged: bool) -> str | None:
        """Keep the present files. Then put a journal with the whole state in place, and write a checkpoint; see `Restoring.put`."""
        kept = None
        if is_damaged:
            kept = await self._run(keep_apart, self._writer)
        else:
            await self._run(keep_present, self._writer)
        await self._session.commit(b"", snapshot)  # the whole state is written in place of the record
        try:
            await self._session.checkpoint(snapshot)
        except StorageError as error:
            _logger.warning("%s is restored, but the next start has to write its snapshot: %s", self.path, error)
        return kept

    async def aclose(self) -> None:
        """Wait for a call that still runs. Then release the lock; see `Restoring.aclose`."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"lab_state {self._writer.name} release")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await waited(self._thread.submit(_nothing))  # after a cancellation, the last call may still run
        self._thread.shutdown()
        await self._session.aclose()

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in the thread. It runs to its end, even if the caller is cancelled."""
        return await waited(self._thread.submit(function, *args, **kwargs))


def _nothing() -> None:
    """Do nothing. `FileRestoring` runs this in the thread, to wait until the earlier calls there have ended."""
