"""The history and the list of the states of an `S3Storage`; see `storage/_history`.

The modules that need the extra `s3` are imported only inside the calls.
"""
# ruff: noqa: PLC0415 -- these modules need an extra

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from lab_state.storage._history import FoundGeneration, FoundState, Listing
from lab_state.storage._protocol import Reading, StorageSession

if TYPE_CHECKING:
    from lab_state.storage.s3._client import Requests
    from lab_state.storage.s3._format import Names
    from lab_state.storage.s3._restoring import S3Restoring


class Closeable(Protocol):
    """A state that was opened."""

    async def aclose(self) -> None: ...


R = TypeVar("R")
C = TypeVar("C", bound=Closeable)


class Run(Protocol):
    """A function that calls another function with new connections to the store, and with the names of a state."""

    async def __call__(self, name: str, work: Callable[[Requests, Names], Awaitable[R]], /) -> R: ...


class Open(Protocol):
    """A function that claims a state, and calls another function, which opens it.

    The other function gets a callback, which the session must call at its end.
    """

    async def __call__(
        self, name: str, opening: Callable[[Requests, Names, Callable[[], None]], Awaitable[C]], /
    ) -> C: ...


class S3History:
    """The generations of the states in a bucket; see `History`."""

    def __init__(self, run: Run, opened: Open, open_session: Callable[[str], Awaitable[StorageSession]]) -> None:
        """Keep the functions of a storage."""
        self._run = run
        self._opened = opened
        self._open_session = open_session

    async def generations(self, name: str) -> Listing:
        """Return the generations that can be read; see `History.generations`."""

        async def work(store: Requests, names: Names) -> Listing:
            from lab_state.storage.s3._generations import list_generations

            return Listing(await list_generations(store, names), unreadable=None)

        return await self._run(name, work)

    async def read(self, name: str, generation: FoundGeneration) -> Reading:
        """Read one generation; see `History.read`."""

        async def work(store: Requests, names: Names) -> Reading:
            from lab_state.storage.s3._generations import read_generation

            return await read_generation(store, names, generation)

        return await self._run(name, work)

    async def open_new(self, name: str) -> StorageSession:
        """Open a state that does not exist yet; see `History.open_new`."""

        async def work(store: Requests, names: Names) -> str | None:
            if await store.head(names.snapshot) is not None:
                return names.url(names.snapshot)
            for prefix in (names.journal, names.history):
                page, _ = await store.page(prefix, prefix)
                if page:
                    return names.url(next(iter(page)))
            return None

        found = await self._run(name, work)
        if found is not None:
            raise ValueError(
                f"{name!r} exists: {found} is there; restore into another name, or call "
                f"remove_state({name!r}, …, history=True) first"
            )
        return await self._open_session(name)

    async def restoring(self, name: str) -> S3Restoring:
        """Become the only writer of a state, to restore it in place; see `History.restoring`."""

        async def opening(store: Requests, names: Names, let_go: Callable[[], None]) -> S3Restoring:
            from lab_state.storage.s3._restoring import open_to_restore

            return await open_to_restore(store, names, let_go)

        return await self._opened(name, opening)


class S3Catalog:
    """The states in a bucket; see `Catalog`."""

    def __init__(self, run: Run, opened: Open, of: Callable[[str], Names], *, keeps: bool) -> None:
        """Keep the functions of a storage, and one that returns the names of the objects of a state.

        `keeps` says whether the storage keeps a history.
        """
        self._keeps = keeps
        self._run = run
        self._opened = opened
        self._of = of

    async def states(self) -> list[FoundState]:
        """Return the states, sorted by name; see `Catalog.states`."""

        async def work(store: Requests, _: Names) -> list[FoundState]:
            from lab_state.storage.s3._catalog import list_states

            return await list_states(store, self._of)

        return await self._run("states", work)

    async def remove(self, name: str, *, history: bool) -> None:
        """Remove a state; see `Catalog.remove`. Only writers of this process are noticed."""
        claimed = await self._opened(name, _claimed)
        try:
            from lab_state.storage.s3._catalog import remove_state

            await remove_state(claimed.store, claimed.names, history=history, keeps=self._keeps)
        finally:
            await claimed.aclose()


class _Claimed:
    """A state that no other call of this process can open."""

    def __init__(self, store: Requests, names: Names, let_go: Callable[[], None]) -> None:
        self.store: Requests = store
        self.names: Names = names
        self._let_go = let_go

    async def aclose(self) -> None:
        try:
            await self.store.aclose()
        finally:
            self._let_go()


async def _claimed(store: Requests, names: Names, let_go: Callable[[], None]) -> _Claimed:
    return _Claimed(store, names, let_go)
