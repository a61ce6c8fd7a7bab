"""What a storage promises to the flusher.

A storage keeps, for each name, one snapshot and the records committed after it. It
sees bytes, never a key or a value. `lab_state.testing.StorageConformance` checks what
is written here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

SnapshotSource = Callable[[], AsyncIterator[bytes]]
"""Takes a view of the state, at one revision, at the moment of the call; gives it in slices.

The slices come one after the other, and the event loop runs between two. For a
checkpoint the last slice comes only when everything in the view has been committed,
so a storage that publishes what it was given publishes nothing that could be undone;
if that commit fails, the iterator raises its `StorageError`.
"""


class Recovery(NamedTuple):
    """What was found when a state was opened.

    Attributes:
        snapshot: The bytes of the snapshot; `None` when there never was one.
        records: The records committed after it, oldest first. Records that the
            snapshot holds already may be among them.
        unsettled: Whether what was recovered may not be durable: the last writer did
            not end cleanly, and what is read may be in a cache alone. The first
            commit, which comes at once then, even without a change, makes it durable.
        dropped_bytes: The size of a torn tail that was dropped: never acknowledged.
        crc32: The CRC-32 of the snapshot, where the storage has it at hand: it need not
            be computed again.
    """

    snapshot: bytes | None
    records: tuple[bytes, ...]
    unsettled: bool
    dropped_bytes: int
    crc32: int | None = None

    def used(self) -> Recovery:
        """The same without the bytes."""
        return self._replace(snapshot=None, records=())


class Reading(NamedTuple):
    """A state as it was read without being opened.

    Attributes:
        snapshot: The bytes of the snapshot; `None` when there never was one.
        records: The records after it, oldest first. Records that the snapshot holds
            already may be among them.
        durable: How many of these records, from the first, are durable for certain. The
            snapshot is. The others may still be lost: a writer that runs may be about to
            make the last one durable.
        live: Whether a writer has the state open; `None` where that cannot be told.
        path: Where the state is, for messages; without credentials.
        crc32: The CRC-32 of the snapshot, where the storage has it at hand.
    """

    snapshot: bytes | None
    records: tuple[bytes, ...]
    durable: int
    live: bool | None
    path: str
    crc32: int | None = None


class StorageSession(Protocol):
    """One state, owned by this writer until `aclose`.

    At most one `commit` and one `checkpoint` are under way at a time. Each method
    raises `StorageError` or a subclass, and nothing else, `from` the cause if its text
    can hold no credential. A caller that is cancelled leaves the outcome unknown, as
    after an error; what is on the storage is whole either way.
    """

    @property
    def recovery(self) -> Recovery:
        """What was found when the state was opened.

        After the first checkpoint it may be without its bytes, `Recovery.used`: by then
        they were read, and they are as large as the state.
        """
        ...

    @property
    def path(self) -> str:
        """Where the state is, for messages; without credentials."""
        ...

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot in bytes; 0 when there is none."""
        ...

    @property
    def journal_bytes(self) -> int:
        """The size in bytes of what a checkpoint would drop."""
        ...

    @property
    def progress(self) -> int:
        """Return how many bytes were handed to the disk or the store since the state was opened.

        It grows while `commit` and `checkpoint` write or send, also within a large
        write: every few MiB are counted once they are written, and synced where the
        storage syncs, or sent. It never goes back, and what is written or sent again
        need not be counted again. Read on the event loop at any time, after `aclose` as well.

        `stop()` ends when this stands still for `Config.stop_timeout` seconds: a slow
        storage is told from one that hangs.
        """
        ...

    @property
    def warning(self) -> str | None:
        """Return a fault that does not fail calls, and what to do about it; `None` for none. `status()` shows it."""
        ...

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        """Make one record durable.

        Args:
            record: The record.
            snapshot: For a storage that cannot append at the moment, and must write
                everything anew. The view holds the record's changes.

        Returns:
            Whether a checkpoint is due. When this returns, the record survives.

        Raises:
            StorageError: The outcome is unknown. The changes may be committed again,
                in this record or in another that holds them too.
            FencedError: A newer writer owns the state; so it is for every later call.
        """
        ...

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        """Write a snapshot in place of everything before it.

        Runs beside commits and does not hold them up. Records committed after the
        view was taken are kept.

        Raises:
            StorageError: What was there before is as good as it was, or the new
                snapshot is in its place whole.
        """
        ...

    async def aclose(self) -> None:
        """Let go of the state. Idempotent.

        What is still under way ends first, and the state stays owned until then, so
        that no second writer can slip in; this holds when the caller is cancelled too.

        Raises:
            StorageError: Letting go failed. The session is closed all the same.
        """
        ...


class Storage(Protocol):
    """Configuration: where states are kept. One object may serve any number of names."""

    async def open(self, name: str) -> StorageSession:
        """Become the only writer of a state, and load it.

        Raises:
            LockedError: Someone else is the writer.
            CorruptionError: What is stored is damaged; it was left untouched.
            UnavailableError: It could not be read this time.
            UnsupportedError: It cannot be read as it is: permissions, a newer format.
        """
        ...

    async def read(self, name: str) -> Reading:
        """Read a state that another writer may have open, and leave everything as it is.

        It takes no lock, replaces no writer and writes nothing. A writer that opens, writes
        or closes the state meanwhile notices nothing. The result is the state at one moment
        between call and return, and holds at least everything that was durable at the call.
        A state that was opened and never written is empty.

        Raises:
            UnsupportedError: There is no state of this name; or it cannot be read as it is:
                permissions, a newer format.
            CorruptionError: What is stored is damaged.
            UnavailableError: It could not be read this time.
        """
        ...
