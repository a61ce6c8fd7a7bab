"""The contract between a storage and a manager.

A storage keeps one snapshot for each name, and the records that were committed after it. It
handles bytes, and never a key or a value. `lab_state.testing.StorageConformance` checks this
contract.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol, runtime_checkable

from lab_state.exceptions import UnsupportedError

SnapshotSource = Callable[[], AsyncIterator[bytes]]
"""A function that returns the snapshot as an async iterator of slices.

The call takes a view of the state at its present revision. The event loop runs between
two slices. For a checkpoint, the last slice comes only after every change in the view was
committed. So a storage that publishes all slices publishes only durable changes. If such a
commit fails, the iterator raises the `StorageError` of that commit.
"""


class Recovery(NamedTuple):
    """The content of a state when it was opened.

    Attributes:
        snapshot: The bytes of the snapshot; `None` if there is none.
        records: The records that were committed after the snapshot, oldest first. Some of them
            may be in the snapshot already.
        unsettled: Whether a crash may still lose the recovered changes. After an unclean end, the
            files may be only in a cache of the machine. If `unsettled` is True, the manager makes a
            commit at once, even without a new change. This commit makes the recovered changes
            durable.
        dropped_bytes: The size of a torn tail that was dropped; 0 if there was none. Its record
            was never acknowledged.
        crc32: The CRC-32 of the snapshot. If it is `None`, lab_state computes it.
    """

    snapshot: bytes | None
    records: tuple[bytes, ...]
    unsettled: bool
    dropped_bytes: int
    crc32: int | None = None

    def __repr__(self) -> str:
        """Return sizes and flags. The text has no bytes of the state, because they may contain secrets."""
        return (
            f"<Recovery of {_sizes(self.snapshot, self.records)}, unsettled={self.unsettled}, "
            f"dropped_bytes={self.dropped_bytes}>"
        )

    def used(self) -> Recovery:
        """Return a copy without the snapshot and the records. A session calls this to free their memory."""
        return self._replace(snapshot=None, records=())


class Reading(NamedTuple):
    """The content of a state that was read without being opened.

    Attributes:
        snapshot: The bytes of the snapshot; `None` if there is none.
        records: The records that were committed after the snapshot, oldest first. Some of them
            may be in the snapshot already.
        durable: The number of these records, counted from the first, that are certainly durable.
            The snapshot is durable too. A crash may still lose the other records: a
            running writer may be about to sync the last record.
        live: Whether a writer has the state open; `None` if it is not known.
        path: The place of the state, for messages, without credentials.
        crc32: The CRC-32 of the snapshot. If it is `None`, lab_state computes it.
    """

    snapshot: bytes | None
    records: tuple[bytes, ...]
    durable: int
    live: bool | None
    path: str
    crc32: int | None = None

    def __repr__(self) -> str:
        """Return path, sizes and flags. The text has no bytes of the state, because they may contain secrets."""
        sizes = _sizes(self.snapshot, self.records)
        return f"<Reading of {self.path}: {sizes}, {self.durable} of them durable, live={self.live}>"


class HistoryFigures(NamedTuple):
    """The history of a state that a session keeps.

    Attributes:
        failures: The number of times since the start that older files could not be added. On disk, a failure leaves a hole.
        generations: The number of generations when they were last counted, without the one in use.
        bytes: The number of bytes of these generations.
    """

    failures: int
    generations: int
    bytes: int


@runtime_checkable
class HistoryKeeper(Protocol):
    """A session that may keep a history."""

    @property
    def history(self) -> HistoryFigures | None:
        """The figures of the history; `None` if the session keeps none."""
        ...


def figures_of(session: object) -> HistoryFigures | None:
    """Return the figures of the history of a session; `None` if it keeps none. Sessions of other packages keep none."""
    return session.history if isinstance(session, HistoryKeeper) else None


@runtime_checkable
class Forgetter(Protocol):
    """A session that can free the memory of its recovery."""

    def forget_recovery(self) -> None:
        """Drop the snapshot and the records of the recovery. Call this when they are loaded, or no longer needed."""
        ...


def forget_recovery(session: object) -> None:
    """Free the memory of the recovery of a session. A session without this call keeps the memory until its first checkpoint."""
    if isinstance(session, Forgetter):
        session.forget_recovery()


def _sizes(snapshot: bytes | None, records: tuple[bytes, ...]) -> str:
    found = "no snapshot" if snapshot is None else f"a snapshot of {len(snapshot)} bytes"
    return f"{found} and {len(records)} records"


class StorageSession(Protocol):
    """One state that one writer has open until `aclose`.

    The manager makes at most one `commit` and one `checkpoint` at a time, and the two may overlap.
    Each method raises `StorageError` or a subclass, and no other error. The error is raised `from`
    its cause, unless the text of the cause may contain a credential. After a cancellation the
    outcome is unknown, as after an error. The stored state is intact in both cases.
    """

    @property
    def recovery(self) -> Recovery:
        """The snapshot and the records that were found when the state was opened.

        After the first checkpoint, the session may drop the snapshot and the records, because they need
        as much memory as the state; see `Recovery.used`. The manager has decoded them by then.
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

        The number grows while `commit` and `checkpoint` run. During a large write, it grows at
        least once for every few MiB. A storage that syncs must sync as often, because the number
        does not grow during a sync. The number never decreases. Bytes that are sent again need
        not be counted. Other progress may be counted, too. The event loop may read the number at any time, even after `aclose`.

        `stop()` gives up when the number has not changed for `Config.stop_timeout` seconds.
        So `stop()` can distinguish a slow storage from a storage that hangs.
        """
        ...

    @property
    def warning(self) -> str | None:
        """A fault that does not make any call fail, and its remedy; `None` if there is no fault. `status()` shows it."""
        ...

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        """Make one record durable.

        Args:
            record: The record.
            snapshot: A function that returns the slices of the whole state, with the changes of the
                record. A storage that cannot append at the moment writes the whole state instead.

        Returns:
            Whether a checkpoint is due. The record is durable when the call returns.

        Raises:
            StorageError: The outcome is unknown. The manager may commit the changes again,
                in this record or in another record.
            FencedError: A newer writer owns the state, or may own it. Every later commit and checkpoint raises
                this error too.
        """
        ...

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        """Replace the old snapshot, and the records that the new snapshot covers, by the new snapshot.

        Commits do not wait for the checkpoint, and run at the same time. Records that are
        committed after the call of `snapshot` are kept.

        Args:
            snapshot: A function that takes a view of the state, and returns the slices of its snapshot.

        Raises:
            StorageError: The old snapshot and records are unchanged, or the new snapshot has
                completely replaced them. There is no third case.
        """
        ...

    async def aclose(self) -> None:
        """Release the state. A second call changes nothing, and may wait for the first one.

        Calls that are still running end before the release. Until the release, this writer owns the
        state: a second writer is refused, or deposes this writer. If the caller of `aclose` is
        cancelled, the release goes on.

        Raises:
            StorageError: The release failed. The session is closed even then.
        """
        ...


class SharedSession(StorageSession, Protocol):
    """The session of a state that several processes share. Its `recovery` may lack the snapshot; see `whole`."""

    async def whole(self) -> Recovery:
        """Return the recovery with the snapshot. Read the snapshot, if it was left out.

        Call this before the first commit.

        Raises:
            StorageError: The snapshot cannot be read.
        """
        ...

    async def hand_over(self) -> bool:
        """Record that everything is durable, so that the next session continues without a commit that settles the state.

        After this call, only `checkpoint` and `aclose` may be called.

        Returns:
            False if the storage cannot record this now. Then the next session settles the state, unless a checkpoint follows.

        Raises:
            StorageError: The record could not be written. Everything that was durable still is.
        """
        ...


class Storage(Protocol):
    """A place for states. One storage object may be used for any number of names."""

    async def open(self, name: str) -> StorageSession:
        """Become the only writer of a state, and load it.

        Raises:
            LockedError: Another writer has the state open.
            CorruptionError: The stored data are damaged. They were not changed.
            UnavailableError: The state could not be read this time. Try again.
            UnsupportedError: The state cannot be used as it is. For example, a permission is missing, or
                a newer version of lab_state wrote the state.
        """
        ...

    async def read(self, name: str) -> Reading:
        """Read a state that another writer may have open, and change nothing.

        The call takes no lock, deposes no writer and writes nothing. It does not disturb a
        writer that opens, writes or closes the state meanwhile. The result is the state at
        one moment between call and return. It has at least all changes that were durable at
        the call. A state that was opened and never written is empty.

        Raises:
            UnsupportedError: There is no state of this name. Or the state cannot be read as it is. For
                example, a permission is missing, or a newer version of lab_state wrote the state.
            CorruptionError: The stored data are damaged. They were not changed.
            UnavailableError: The state could not be read this time. Try again.
        """
        ...


def no_state(path: str, advice: str) -> UnsupportedError:
    """Return the error for a state that does not exist. `advice` begins with the punctuation after the path."""
    return _missing(f"there is no state at {path}{advice}")


def no_directory(path: str) -> UnsupportedError:
    """Return the error for a state whose directory does not exist."""
    return _missing(f"there is no directory {path}: check the path")


def _missing(message: str) -> UnsupportedError:
    error = UnsupportedError(message)
    error.is_missing = True
    return error
