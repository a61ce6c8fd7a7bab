"""The internal protocols by which calls reach the history of a storage, and its list of states.

A storage of this package has a method `_history` or `_catalog`. Storages of other packages have neither: these
protocols may still change.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from lab_state._argument_types import check_storage
from lab_state.exceptions import StorageError, UnsupportedError
from lab_state.storage._generations import Span
from lab_state.storage._protocol import Reading, SnapshotSource, StorageSession


class FoundGeneration(NamedTuple):
    """A generation, as the storage has listed it.

    Attributes:
        span: Its moments.
        size: The number of its bytes.
        in_use: Whether the next start loads this generation.
        key: The names by which the storage finds it again. Only the storage reads them.
    """

    span: Span
    size: int
    in_use: bool
    key: object


class Listing(NamedTuple):
    """The generations of a state.

    Attributes:
        found: The generations that can be read, the oldest first. The one in use, if it can be read, is the last.
        unreadable: Why the list lacks a generation that is not damaged, but cannot be read; `None` if it lacks none. Of several
            errors, the one of the generation in use.
    """

    found: list[FoundGeneration]
    unreadable: UnsupportedError | None


class FoundState(NamedTuple):
    """A state, as the storage has listed it.

    Attributes:
        name: Its name.
        size: The number of bytes of the snapshot, and of the journal or the records after it.
        history: The number of bytes of its history. A file in use that is linked there already is not counted.
        live: Whether a writer has the state open; `None` if it is not known.
        holder: The process that has the state open, for a message; `None` if there is none, or if it is not known.
    """

    name: str
    size: int
    history: int
    live: bool | None
    holder: str | None


class GoneError(StorageError):
    """The files of a generation were pruned or replaced after it was listed: list the generations again."""


class Restoring(Protocol):
    """A state that is being restored in place. Until `aclose`, a second writer is refused, or deposes this writer.

    Each method raises `StorageError` or a subclass.
    """

    @property
    def path(self) -> str:
        """The path of the state for messages, without credentials."""
        ...

    async def highest(self) -> int:
        """Return the highest revision in any valid record or snapshot of the state in use; 0 if there is none.

        The state may be damaged. Damaged parts are left out. The history is not searched.
        """
        ...

    async def put(self, snapshot: SnapshotSource, *, is_damaged: bool) -> str | None:
        """Keep the stored state as a generation. Then replace it by this snapshot, in one step that a crash cannot divide.

        Call this once. If the caller is cancelled, or the call fails, the state is the old one or the new one.

        Args:
            snapshot: The whole new state.
            is_damaged: Whether the state cannot be loaded. Then it is kept apart from the history, and stays until a person
                deletes it.

        Returns:
            The place where a damaged state was kept; `None` if the state is not damaged, or there was nothing to keep.

        Raises:
            StorageError: The state could not be kept, or could not be replaced. If it could not be kept, nothing was changed.
        """
        ...

    async def aclose(self) -> None:
        """Release the state. A second call waits for the first one. If the caller is cancelled, the release goes on."""
        ...


class History(Protocol):
    """The generations of the states of a storage."""

    async def generations(self, name: str) -> Listing:
        """Return the generations that can be read.

        The call takes no lock, and works while a writer has the state open. It usually reads only the first and the last bytes
        of each file. If the state in use is damaged or cannot be read, the list has only the older generations. If it is damaged,
        the list may be empty. See `Listing.unreadable` for files that a newer version of lab_state wrote, or without a permission.

        Raises:
            UnsupportedError: There is neither a state of this name nor a history of it. Or a permission is missing. Or the state
                in use cannot be read, and there is no older generation.
            UnavailableError: The list could not be read this time.
        """
        ...

    async def read(self, name: str, generation: FoundGeneration) -> Reading:
        """Read one generation, and no other one. Each record of a generation that is not in use is durable.

        The generation in use is read as by `Storage.read`. If a checkpoint has begun a later generation since the listing, that
        generation is read.

        Raises:
            GoneError: The generation was pruned or replaced since it was listed.
            CorruptionError: The generation is damaged.
            StorageError: The generation could not be read.
        """
        ...

    async def open_new(self, name: str) -> StorageSession:
        """Open a state that does not exist yet, as `Storage.open` does.

        Raises:
            ValueError: The state exists, or a history of it.
            StorageError: See `Storage.open`.
        """
        ...

    async def restoring(self, name: str) -> Restoring:
        """Become the only writer of a state, to restore it in place. Nothing is loaded, and nothing is changed yet.

        Raises:
            LockedError: A writer has the state open. The writer may share the state with other processes.
            StorageError: See `Storage.open`. Damage is not an error here.
        """
        ...


class Catalog(Protocol):
    """The states of a storage."""

    async def states(self) -> list[FoundState]:
        """Return the states, sorted by name. The call takes no lock, and reads no state.

        Raises:
            StorageError: The states cannot be listed.
        """
        ...

    async def remove(self, name: str, *, history: bool) -> None:
        """Remove a state that no writer has open. With `history`, remove its history, too.

        A crash during the call leaves the state as it was, a state that a start refuses, or no state.

        Raises:
            LockedError: A writer has the state open.
            UnsupportedError: There is neither a state of this name nor a history of it.
            StorageError: A part could not be removed: call again.
        """
        ...


@runtime_checkable
class _HasHistory(Protocol):
    def _history(self) -> History: ...


@runtime_checkable
class _HasCatalog(Protocol):
    def _catalog(self) -> Catalog: ...


def history_of(storage: object) -> History:
    """Return the history of a storage.

    Raises:
        UnsupportedError: The storage keeps no history.
        TypeError: The argument is not a storage.
    """
    if isinstance(storage, _HasHistory) and not isinstance(storage, type):
        return storage._history()  # noqa: SLF001 -- the storages of this package have it for this function
    check_storage(storage)
    raise UnsupportedError(
        f"{type(storage).__name__} keeps no history: use a FileStorage or an S3Storage to read or restore earlier moments of a state"
    )


def catalog_of(storage: object) -> Catalog:
    """Return the list of states of a storage.

    Raises:
        UnsupportedError: The storage cannot list its states.
        TypeError: The argument is not a storage.
    """
    if isinstance(storage, _HasCatalog) and not isinstance(storage, type):
        return storage._catalog()  # noqa: SLF001 -- the storages of this package have it for this function
    check_storage(storage)
    raise UnsupportedError(f"{type(storage).__name__} cannot list or remove its states: use its own tools")
