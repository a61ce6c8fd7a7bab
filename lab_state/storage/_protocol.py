"""The contract between a storage and the flusher.

A storage keeps one snapshot for each name, and the records committed after it. It
sees bytes, never a key or a value. `lab_state.testing.StorageConformance` checks this
contract.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

SnapshotSource = Callable[[], AsyncIterator[bytes]]
"""A function that returns the snapshot as an async iterator of slices.

The call takes a view of the state at its present revision. The event loop runs between
two slices. For a checkpoint, the last slice comes only after everything in the view was
committed. So a storage that publishes all slices publishes only what is durable. If that
commit fails, the iterator raises its `StorageError`.
"""


class Recovery(NamedTuple):
    """The content of a state when it was opened.

    Attributes:
        snapshot: The bytes of the snapshot; `None` when there never was one.
        records: The records committed after it, oldest first. Some of them may be
            in the snapshot already.
        unsettled: Whether a crash may still lose what was recovered. This is so when the
            last writer did not end cleanly: what was read may be in a cache only. The
            first commit makes it durable. It comes at once then, even without a change.
        dropped_bytes: The size of a torn tail that was dropped. It was never acknowledged.
        crc32: The CRC-32 of the snapshot, if the storage knows it. Then it is not
            computed again.
    """

    snapshot: bytes | None
    records: tuple[bytes, ...]
    unsettled: bool
    dropped_bytes: int
    crc32: int | None = None

    def __repr__(self) -> str:
        """Return sizes and flags; the bytes may hold secrets."""
        return (
            f"<Recovery of {_sizes(self.snapshot, self.records)}, unsettled={self.unsettled}, "
            f"dropped_bytes={self.dropped_bytes}>"
        )

    def used(self) -> Recovery:
        """Return a copy without the bytes."""
        return self._replace(snapshot=None, records=())


class Reading(NamedTuple):
    """The content of a state that was read without being opened.

    Attributes:
        snapshot: The bytes of the snapshot; `None` when there never was one.
        records: The records after it, oldest first. Some of them may be in the
            snapshot already.
        durable: How many of these records, counted from the first, are certainly durable.
            The snapshot is durable too. A crash may still lose the other records: a
            running writer may be about to sync the last one.
        live: Whether a writer has the state open; `None` if the storage cannot tell.
        path: Where the state is, for messages; without credentials.
        crc32: The CRC-32 of the snapshot, if the storage knows it.
    """

    snapshot: bytes | None
    records: tuple[bytes, ...]
    durable: int
    live: bool | None
    path: str
    crc32: int | None = None

    def __repr__(self) -> str:
        """Return path, sizes and flags; the bytes may hold secrets."""
        sizes = _sizes(self.snapshot, self.records)
        return f"<Reading of {self.path}: {sizes}, {self.durable} of them durable, live={self.live}>"


def _sizes(snapshot: bytes | None, records: tuple[bytes, ...]) -> str:
    found = "no snapshot" if snapshot is None else f"a snapshot of {len(snapshot)} bytes"
    return f"{found} and {len(records)} records"


class StorageSession(Protocol):
    """One state, owned by this writer until `aclose`.

    At most one `commit` and one `checkpoint` run at a time. Each method raises
    `StorageError` or a subclass, and nothing else. It is raised `from` its cause if the
    text of the cause cannot hold a credential. After a cancellation the outcome is
    unknown, as after an error. The stored state is intact in both cases.
    """

    @property
    def recovery(self) -> Recovery:
        """The snapshot and the records that were found when the state was opened.

        After the first checkpoint they may be dropped; see `Recovery.used`. They take as much
        memory as the state, and they were read before.
        """
        ...

    @property
    def path(self) -> str:
        """The path of the state for messages, without credentials."""
        ...

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot in bytes; 0 if there is none."""
        ...

    @property
    def journal_bytes(self) -> int:
        """The number of bytes that a checkpoint would drop."""
        ...

    @property
    def progress(self) -> int:
        """The number of bytes that were written to the disk or sent to the store since the state was opened.

        The number grows while `commit` and `checkpoint` run. It also grows within a large
        write: every few MiB are counted as soon as they are sent, or written and, if the
        storage syncs, synced. It never decreases. A repetition need not be counted. The
        event loop may read it at any time, also after `aclose`.

        `stop()` gives up when the number has not changed for `Config.stop_timeout` seconds.
        So it can distinguish a slow storage from one that hangs.
        """
        ...

    @property
    def warning(self) -> str | None:
        """A fault that makes no call fail, and its remedy; `None` if there is none. `status()` shows it."""
        ...

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        """Make one record durable.

        Args:
            record: The record.
            snapshot: The whole state, for a storage that cannot append at the moment and
                must write everything anew. It contains the record's changes.

        Returns:
            Whether a checkpoint is due. The record is durable by then.

        Raises:
            StorageError: The outcome is unknown. The flusher may commit the changes again,
                in this record or in another one.
            FencedError: A newer writer owns the state. Every later call raises this too.
        """
        ...

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        """Replace the snapshot and the records before it by a new snapshot.

        Commits go on meanwhile and do not wait for it. Records committed after the
        view was taken are kept.

        Raises:
            StorageError: Either the old snapshot and records are unchanged, or the new
                snapshot has completely replaced them.
        """
        ...

    async def aclose(self) -> None:
        """Release the state. A second call does nothing.

        Calls that are still running end first. The state stays owned until then, so no
        second writer can open it meanwhile. This also holds when the caller is cancelled.

        Raises:
            StorageError: The release failed. The session is closed all the same.
        """
        ...


class Storage(Protocol):
    """Configuration: where states are kept. One object may serve any number of names."""

    async def open(self, name: str) -> StorageSession:
        """Become the only writer of a state, and load it.

        Raises:
            LockedError: Another writer has the state open.
            CorruptionError: The stored data are damaged. They were not changed.
            UnavailableError: The state could not be read this time. Try again.
            UnsupportedError: The state cannot be read as it is: a permission is missing, or
                the format is newer.
        """
        ...

    async def read(self, name: str) -> Reading:
        """Read a state that another writer may have open, and change nothing.

        This takes no lock, replaces no writer and writes nothing. It does not disturb a
        writer that opens, writes or closes the state meanwhile. The result is the state at
        one moment between call and return. It holds at least everything that was durable at
        the call. A state that was opened and never written is empty.

        Raises:
            UnsupportedError: There is no state of this name. Or it cannot be read as it is: a
                permission is missing, or the format is newer.
            CorruptionError: The stored data are damaged.
            UnavailableError: The state could not be read this time. Try again.
        """
        ...
