"""`MemoryStorage`: states in memory, for tests, and for states that are not needed after the end of the process."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncIterator

from lab_state import _forks as forks
from lab_state import _journal as journal
from lab_state._buffers import collect
from lab_state._clock import wall_now
from lab_state._journal import NO_BASE, FrameKind
from lab_state.exceptions import LockedError, UnsupportedError
from lab_state.storage._history import FoundState
from lab_state.storage._protocol import Reading, Recovery, SnapshotSource, no_state

_MIN_CHECKPOINT_BYTES = 64 * 1024
_LARGE = 1024 * 1024


class StoredState:
    """One state in memory: its snapshot, its journal, and the open session, if there is one."""

    def __init__(self) -> None:
        self.snapshot: bytes | None = None
        self.journal: bytearray | None = None
        self.session: MemorySession | None = None


class MemoryStorage:
    """States in the memory of this process.

    A durable change survives the end of its manager: another manager with the same storage object
    loads it. When the storage object is garbage-collected, the states are lost.
    """

    def __init__(self) -> None:
        """Create a storage without states."""
        self.places: dict[str, StoredState] = {}

    def __repr__(self) -> str:
        """Return the class, and the names of the states."""
        return f"<MemoryStorage {sorted(self.places)}>"

    async def open(self, name: str) -> MemorySession:
        """Lock the state and load it; see `Storage.open`."""
        stored = self.places.setdefault(name, StoredState())
        if stored.session is not None:
            raise LockedError(f"{name!r} is open in this {type(self).__name__} already: stop its manager first")
        return MemorySession(stored, name)

    async def read(self, name: str) -> Reading:
        """Read the state while a manager may have it open; see `Storage.read`. Every record is durable."""
        path = _path(name)
        if (stored := self.places.get(name)) is None:
            raise no_state(path, ": check the name and the storage")
        data = None if stored.journal is None else bytes(stored.journal)
        scan = None if data is None else journal.scan(data, name, path)
        records = journal.accept(scan, len(data or b""), _base(stored.snapshot), path).records
        return Reading(stored.snapshot, records, len(records), stored.session is not None, path)

    def _catalog(self) -> MemoryCatalog:
        return MemoryCatalog(self.places)


class MemoryCatalog:
    """The states of a `MemoryStorage`; see `Catalog`."""

    def __init__(self, places: dict[str, StoredState]) -> None:
        self._places = places

    async def states(self) -> list[FoundState]:
        """Return the states, sorted by name; see `Catalog.states`."""
        return [
            FoundState(
                name,
                len(stored.snapshot or b"") + len(stored.journal or b""),
                0,
                stored.session is not None,
                None if stored.session is None else f"pid {os.getpid()}",
            )
            for name, stored in sorted(self._places.items())
        ]

    async def remove(self, name: str, *, history: bool) -> None:  # noqa: ARG002 -- there is no history
        """Remove a state; see `Catalog.remove`."""
        stored = self._places.get(name)
        if stored is None:
            raise no_state(_path(name), ": check the name and the storage")
        if stored.session is not None:
            raise LockedError(f"{name!r} is open in this MemoryStorage: stop its manager first")
        del self._places[name]


class MemorySession:
    """A state in memory that one writer has open until `aclose`; see `StorageSession`."""

    def __init__(self, stored: StoredState, name: str) -> None:
        self._name = name
        self._stored = stored
        self.path: str = _path(name)
        self.progress: int = 0
        self.warning: str | None = None
        base = _base(stored.snapshot)
        data = bytes(stored.journal or b"")
        scan = None if stored.journal is None else journal.scan(data, name, self.path)
        accepted = journal.accept(scan, len(data), base, self.path)
        torn = len(data) - scan.end if scan is not None else 0
        # A torn tail is here if a test has damaged this journal, or if the last session was closed while it appended a
        # large frame. Drop the tail, as `FileStorage` does.
        self._salt = scan.header.salt if scan is not None else journal.new_salt()
        if stored.journal is None:
            stored.journal = bytearray(journal.header(name, self._salt, base, wall_now()))
        elif torn:
            del stored.journal[-torn:]
        self._journal = stored.journal
        self._end = len(self._journal)  # a frame that is being appended begins here
        self._crc = 0  # the CRC-32 of the snapshot that is being written
        self.recovery: Recovery = Recovery(stored.snapshot, accepted.records, unsettled=False, dropped_bytes=torn)
        stored.session = self
        forks.disown_in_children(self)

    def __repr__(self) -> str:
        """Return the class, and the path of the state."""
        return f"<MemorySession of {self.path}>"

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close the session. This runs in a forked child. Managers of the child may then use the child's copy of the state."""
        if self._stored.session is self:
            self._stored.session = None

    @property
    def snapshot_bytes(self) -> int:
        """The size of the snapshot, in bytes."""
        return len(self._stored.snapshot or b"")

    @property
    def journal_bytes(self) -> int:
        """The size of the journal, in bytes."""
        return self._end

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:  # noqa: ARG002 -- memory can always append
        """Append one frame. A large frame is appended in steps; see `StorageSession.commit`."""
        self._check_open()
        if len(record) < _LARGE:
            self._journal += journal.frame(self._salt, FrameKind.RECORD, record)
        else:
            await self._append_in_steps(record)
        self._end = len(self._journal)
        self.progress += len(record)
        return self.journal_bytes > max(_MIN_CHECKPOINT_BYTES, self.snapshot_bytes)

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        """Collect the slices. Then replace the snapshot and the journal in one step; see `StorageSession.checkpoint`."""
        self._check_open()
        slices = snapshot()
        before, self._crc = self._end, 0
        data = await collect(self._counted(slices))
        self._check_open()
        header = journal.header(self._name, self._salt, journal.base_of(len(data), self._crc), wall_now())
        # The journal keeps the records after the view, and a frame that is being appended.
        self._journal[:before] = header
        self._end += len(header) - before
        self._stored.snapshot = data
        self.recovery = self.recovery.used()

    async def _counted(self, slices: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for part in slices:
            self.progress += len(part)
            self._crc = zlib.crc32(part, self._crc)
            yield part

    async def _append_in_steps(self, record: bytes) -> None:
        try:
            for piece in journal.frame_in_steps(self._salt, FrameKind.RECORD, record):
                self._journal += piece
                await asyncio.sleep(0)
                self._check_open()
        except BaseException:
            if self._stored.session is self:  # otherwise the next session has dropped the frame as a torn tail
                del self._journal[self._end :]
            raise

    async def aclose(self) -> None:
        """Close the session; see `StorageSession.aclose`. A call that is still running raises `UnsupportedError`."""
        if self._stored.session is self:
            self._stored.session = None

    def _check_open(self) -> None:
        if self._stored.session is not self:
            raise UnsupportedError(f"the session of {self.path} is closed: open the state again")


def _path(name: str) -> str:
    return f"memory:{name}"


def _base(snapshot: bytes | None) -> str:
    return NO_BASE if snapshot is None else journal.base_of(len(snapshot), zlib.crc32(snapshot))
