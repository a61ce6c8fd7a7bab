"""Restore a state in S3 in place: become its only writer, keep what is there, and replace it.

1. Check that the store honours conditions.
2. Create a fence above all records and fences, even if numbers are missing. Then look again, as a start does.
3. Copy the snapshot into the history. If the state cannot be loaded, copy its objects to `<name>.damaged-<time>/` instead. If a
   copy fails, nothing was changed, except for the fence.
4. Replace the snapshot, as a checkpoint does. The new snapshot covers the number of the fence. So the records below the fence are
   records of the history. Then delete objects whose number no writer reaches, because each start fails while they exist.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

from lab_state._journal import NO_BASE
from lab_state.exceptions import CorruptionError, UnavailableError
from lab_state.storage._generations import moment_of_record
from lab_state.storage._limits import Limits
from lab_state.storage._protocol import Recovery, SnapshotSource
from lab_state.storage.s3._body import Body
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import KEPT, MOST_NUMBER, OWNER, REMOVED, Names, Stamp, stamped
from lab_state.storage.s3._generations import begin_in_use
from lab_state.storage.s3._keeping import Keeper
from lab_state.storage.s3._open import (
    AT_ONCE,
    Loaded,
    NumberedObject,
    Opened,
    fetch,
    new_write_id,
    owner,
    probe,
    together,
)
from lab_state.storage.s3._outcomes import WRITE_ID, NotOursError, ObjectInfo
from lab_state.storage.s3._pieces import Pieces, read_pieces
from lab_state.storage.s3._session import S3Session


class _Found(NamedTuple):
    """The stored state under the fence of this writer.

    Attributes:
        present: The object of the snapshot; `None` if there is none.
        seq: The number of the last record that the snapshot covers. If the snapshot cannot be read, the number in the key of
            the newest older snapshot.
        revision: The revision of the snapshot; 0 if it is not known.
        listed: The sizes of the records and fences above `seq`, by number, without the fence of this writer.
        strays: The keys of objects whose number no writer reaches. They are not part of the state, and each start fails while they
            exist.
    """

    present: ObjectInfo | None
    seq: int
    revision: int
    listed: dict[int, int]
    strays: tuple[str, ...] = ()


async def open_to_restore(store: Requests, names: Names, let_go: Callable[[], None]) -> S3Restoring:
    """Become the only writer of a state, to restore it; see `History.restoring`.

    Raises:
        StorageError: See `History.restoring`.
    """
    await probe(store, names)
    tries = store.tries("opening", names.snapshot)
    while True:
        before = await _look(store, names)
        fence = max(before.listed, default=before.seq) + 1
        if await _create_fence(store, names, fence):
            found = await _look(store, names)
            if found.present == before.present and max(found.listed, default=0) == fence:
                del found.listed[fence]
                return S3Restoring(store, names, fence, found, let_go)
        await tries.pause("a change by another writer at the same time")


async def _create_fence(store: Requests, names: Names, number: int) -> bool:
    """Create a fence. Return False if another writer took its number."""
    try:
        await store.put(names.record(number), Body.of(b""), {WRITE_ID: new_write_id(), OWNER: owner()}, None)
    except NotOursError:
        return False
    return True


async def _look(store: Requests, names: Names) -> _Found:
    present = await store.head(names.snapshot)
    try:
        begin, listed = await begin_in_use(store, names, present)
    except CorruptionError:
        older = [
            one for key in await store.sizes(names.history, names.history) if (one := names.older(key)) is not None
        ]
        seq = max(older).seq if older else 0
        sizes = await store.sizes(names.journal, names.record(seq))
        numbered = {number: size for key, size in sizes.items() if (number := names.number(key)) is not None}
        strays = tuple(names.record(number) for number in sorted(numbered) if number > MOST_NUMBER)
        listed = {number: size for number, size in sorted(numbered.items()) if number <= MOST_NUMBER}
        return _Found(present, seq, 0, listed, strays)
    return _Found(present, begin.seq, begin.first.revision, listed)


class S3Restoring:
    """A state in S3 that is being restored in place; see `Restoring`."""

    def __init__(self, store: Requests, names: Names, fence: int, found: _Found, let_go: Callable[[], None]) -> None:
        """Begin with a fence. `let_go` is called at the end."""
        self.path: str = names.url(names.snapshot)
        self._store = store
        self._names = names
        self._fence = fence
        self._found = found
        self._keeper = Keeper(store, names, Limits(1, None), fence)
        etag = None if found.present is None else found.present.etag
        nothing = Recovery(None, (), unsettled=False, dropped_bytes=0)
        loaded = Loaded(etag, 0, NO_BASE, found.seq, fence, {}, nothing, kept=fence)
        self._session = S3Session(store, names, Opened(fence, loaded, None), let_go)

    async def highest(self) -> int:
        """Return the highest revision in any valid record or snapshot; see `Restoring.highest`."""
        highest = self._found.revision
        left = iter([number for number, size in self._found.listed.items() if size])

        async def some() -> None:
            nonlocal highest
            for number in left:
                record = await self._record(number)
                moment = None if record is None else moment_of_record(record)
                if moment is not None:
                    highest = max(highest, moment.revision)

        await together([some() for _ in range(AT_ONCE)])
        return highest

    async def pieces(self) -> Pieces:
        """Return the objects of the stored state, as far as they can be read."""
        return await read_pieces(self._store, self._names, self._fence)

    async def _record(self, number: int) -> bytes | None:
        """Return a record; `None` if it is damaged or missing."""
        found: dict[int, NumberedObject] = {}
        try:
            await fetch(self._store, self._names, [number], found)
        except CorruptionError:
            return None
        return found[number].record if number in found else None

    async def put(self, snapshot: SnapshotSource, *, is_damaged: bool) -> str | None:
        """Keep the stored state. Then replace it by this snapshot; see `Restoring.put`."""
        place = None
        if is_damaged:
            place = await self._keep_apart()
        elif self._found.present is not None and not await self._keeper.keep_or_raise(
            self._found.present.etag, self._found.seq
        ):
            raise UnavailableError(f"{self.path} was replaced while it was restored; restore it again")
        await self._session.checkpoint(snapshot)
        await self._store.delete(self._found.strays)
        return place

    async def _keep_apart(self) -> str | None:
        """Copy the objects of a damaged state. Return the place; `None` if there are none."""
        names, place = self._names, self._names.damaged(round(self._store.time.clock.time() * 1000))
        sources = [names.record(number) for number, size in self._found.listed.items() if size]
        sources += self._found.strays
        if self._found.present is not None:
            sources.append(names.snapshot)
        left = iter(sources)

        async def some() -> None:
            for source in left:
                info = await self._store.head(source)
                if info is not None and not await self._keeper.copy(source, info, place + source.rsplit("/", 1)[-1]):
                    raise UnavailableError(f"{names.url(source)} was replaced while it was copied; restore it again")

        await together([some() for _ in range(AT_ONCE)])
        return names.url(place) if sources else None

    async def remove(self) -> None:
        """Keep the stored state. Then put an object in its place which shows that the state was removed.

        Raises:
            StorageError: The state could not be kept, or could not be replaced. Then the state is the old one, or it is removed.
        """
        present = self._found.present
        if present is not None and not await self._keeper.keep_or_raise(present.etag, self._found.seq):
            raise UnavailableError(f"{self.path} was replaced while it was removed; remove it again")
        stamp = Stamp(self._fence, self._fence)
        write_id = new_write_id()
        # The id makes the bytes unique. So no other object has the ETag of this one.
        member = b'{"$lab_state":{"format":1,"revision":0,"id":"%s"' % write_id[:16].encode()
        body = stamped(b'%s,"crc32":"%08x"}}' % (member, zlib.crc32(member)), stamp)
        metadata = {WRITE_ID: write_id, **stamp.metadata(), KEPT: str(self._fence), REMOVED: "1"}
        try:
            await self._store.put(
                self._names.snapshot, Body.of(body), metadata, None if present is None else present.etag
            )
        except NotOursError:
            raise UnavailableError(f"{self.path} was replaced while it was removed; remove it again") from None

    async def aclose(self) -> None:
        """Release the state; see `Restoring.aclose`."""
        await self._session.aclose()
