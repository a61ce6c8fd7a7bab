"""The history of a state in S3: its writer keeps older snapshots, and the records that the snapshot in use covers.

A generation is a snapshot with the records after it, up to the next snapshot. Before a checkpoint replaces a snapshot, the
snapshot is copied under a separate key. The records keep their keys. If the copy fails, no record is missing: the records
after the missing snapshot belong to the generation before it.

A session does not copy each snapshot, because the last copy and the records after it have the same moments. The session copies the
snapshot that it has found at its start. Later it copies a snapshot that it has written, if there are many records since the last
copy, or if these records have at least 1 MiB, and at least as many bytes as the snapshot.

The store makes the copy, on the condition that the snapshot still has its ETag. Without this condition, a request that arrives
late would replace a copy by another snapshot. Before the first copy, a test shows whether the store honours the condition. If
it does not, the bytes are fetched, and sent with the condition that there is no copy yet.

Pruning deletes the records of a generation first, and then its snapshot. It does not delete fences.
"""

from __future__ import annotations

import logging
from bisect import bisect_left

from lab_state._log import Log
from lab_state.exceptions import StorageError, UnavailableError, UnsupportedError
from lab_state.storage._generations import moment_of_snapshot
from lab_state.storage._limits import Held, Limits, to_prune
from lab_state.storage._protocol import HistoryFigures
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import Names, Older, kept_in_metadata
from lab_state.storage.s3._outcomes import NO_ETAG, WRITE_ID, NotOursError, ObjectInfo, unquoted

_logger = Log(logging.getLogger("lab_state"))

END_BYTES = 4096
"""The number of bytes at the end of a snapshot that usually have its reserved member."""

_MOST_PAGES = 100
_LEAST_BYTES = 1024 * 1024
_MOST_NUMBERS = 1024  # a reader fetches this number of records in some seconds


class Keeper:
    """The history of a state that this session has open."""

    def __init__(self, store: Requests, names: Names, limits: Limits, fence: int) -> None:
        """Set the attributes. `fence` is the number of the fence of this session."""
        self._failures = 0
        self._store = store
        self._names = names
        self._limits = limits
        self._fence = fence
        self._honours: bool | None = None  # whether the store honours the condition of a copy; None if not known yet
        self._kept: list[Older] | None = None  # the older snapshots, in order; None until they were listed
        self._sizes: list[int] = []  # the sizes of these snapshots, each with the records after it
        self._before = 0  # the number of bytes of records before the first snapshot
        self._counted = 0  # the number of the last record whose size was counted
        self._last: tuple[Older, int] | None = None  # the last copy of this session, with its size
        self._added = 0  # the number of generations that were added since the last pruning

    @property
    def figures(self) -> HistoryFigures:
        """The figures of the history. Before the first checkpoint, no generation is known."""
        generations = len(self._sizes) + (self._before > 0)
        return HistoryFigures(self._failures, generations, sum(self._sizes) + self._before)

    # Keeping

    async def keep(self, etag: str, seq: int, size: int) -> None:
        """Copy the present snapshot into the history. Do nothing if it has another ETag, or if few records came since the last copy.

        A failure is logged and counted, and not raised.

        Args:
            etag: The ETag.
            seq: The number of the last record that the snapshot covers.
            size: The number of bytes of the snapshot.
        """
        if self._goes_on(seq, size):
            return
        try:
            await self.keep_or_raise(etag, seq)
        except StorageError as error:
            self._failures += 1
            _logger.error(  # noqa: TRY400 -- the message has everything
                "%s: a snapshot could not be copied into the history, so the records after it belong to the generation before it: %s",
                self._names.url(self._names.snapshot),
                error,
            )

    def _goes_on(self, seq: int, size: int) -> bool:
        """Return whether this snapshot need not be copied, because there are few records since the last copy of this session."""
        if self._last is None or self._counted < seq:
            return False
        older, copied = self._last
        if not self._kept or self._kept[-1] != older:  # that copy was pruned
            return False
        records = self._sizes[-1] - copied
        return seq - older.seq < _MOST_NUMBERS and records < max(_LEAST_BYTES, size)

    async def keep_or_raise(self, etag: str, seq: int) -> bool:
        """Copy the present snapshot as `keep` does, even if few records came since the last copy. Return whether the history has the snapshot.

        Raises:
            StorageError: The snapshot could not be copied.
        """
        source = await self._store.get_end(self._names.snapshot, END_BYTES)
        if source is None or source[0].etag != unquoted(etag):
            return False  # another writer has replaced or deleted the snapshot, and the checkpoint will notice this
        found, end = source
        moment = moment_of_snapshot(end)
        wall = moment.wall if moment is not None else 0
        older = Older(seq, max(0, wall) or self._now())
        kept = await self._listed()
        if older in kept:
            self._last = older, found.size
            return True
        if not await self.copy(self._names.snapshot, found, self._names.kept(older)):
            return False
        at = bisect_left(kept, older)
        kept.insert(at, older)
        self._sizes.insert(at, found.size)
        self._added += 1
        self._last = older, found.size
        return True

    def _now(self) -> int:
        return round(self._store.time.clock.time() * 1000)

    async def copy(self, source: str, found: ObjectInfo, target: str) -> bool:
        """Copy an object. Return False if the object is no longer `found`.

        Raises:
            StorageError: The object could not be copied.
        """
        if await self._honours_conditions():
            return await self._store.copy(source, target, found.etag)
        return await self._copy_bytes(source, found, target)

    async def _honours_conditions(self) -> bool:
        """Return whether the store refuses a copy whose condition is not met. Test this only once."""
        if self._honours is None:
            fence = self._names.record(self._fence)
            try:
                ignores = await self._store.copy(fence, self._names.probe, NO_ETAG)
                # If the fence did not exist, the store would refuse to copy it even without a condition.
                self._honours = not ignores and await self._store.head(fence) is not None
            except UnsupportedError:
                self._honours = False
        return self._honours

    async def _copy_bytes(self, source: str, expected: ObjectInfo, target: str) -> bool:
        """Copy an object with a GET and a PUT. Return False if the object is no longer `expected`."""
        got = await self._store.get_spooled(source)
        if got is None:
            return False
        found, spool = got
        try:
            if found.etag != expected.etag:
                return False
            body = await spool.body()
            # The copy has the write id of the object, or an id made from its ETag. So if there is an earlier copy, perhaps of another session, the copy succeeds.
            metadata = {WRITE_ID: f"of {found.etag}", **found.metadata}
            await self._store.put(target, body, metadata, None)
        except NotOursError:
            raise UnavailableError(f"{self._names.url(target)} is another object: move it away") from None
        finally:
            spool.discard()
        return True

    async def _listed(self) -> list[Older]:
        """Return the older snapshots. List them only once, because no other writer adds or deletes one."""
        if self._kept is None:
            sizes = await self._store.sizes(self._names.history, self._names.history)
            found = {older: size for key, size in sizes.items() if (older := self._names.older(key)) is not None}
            self._kept = sorted(found)
            self._sizes = [found[older] for older in self._kept]
        return self._kept

    # Pruning

    async def prune(self, covered: int) -> bool:
        """Delete the generations that the limits do not allow. Call this after a checkpoint.

        Args:
            covered: The number of the last record that the snapshot in use covers.

        Returns:
            Whether something was deleted.

        Raises:
            StorageError: Some of these generations may still exist. A later call deletes them.
        """
        kept = await self._listed()
        await self._count(covered)
        now = self._now()
        held = [Held(0, self._before)] if self._before else []
        held += [Held(older.wall, size) for older, size in zip(kept, self._sizes, strict=True)]
        number = to_prune(held, now, self._limits, now, self._added)
        self._added = 0
        for _ in range(number):
            if not await self._delete_oldest(covered):
                break
        return number > 0

    async def _count(self, covered: int) -> None:
        """Add up the sizes of the records up to `covered`. After `_MOST_PAGES` pages, leave the rest to the next call."""
        kept = await self._listed()
        for _ in range(_MOST_PAGES):
            if self._counted >= covered:
                return
            sizes, self._counted = await self._page(self._counted, covered)
            for number, size in sizes.items():
                at = bisect_left(kept, Older(number, 0)) - 1  # the last snapshot that does not cover this record
                if at < 0:
                    self._before += size
                else:
                    self._sizes[at] += size

    async def _delete_oldest(self, covered: int) -> bool:
        """Delete the oldest generation. Return False if a part of it is left for the next call."""
        kept = await self._listed()
        is_first = self._before > 0  # whether the oldest generation consists of the records before the first snapshot
        start = 0 if is_first else kept[0].seq
        following = kept if is_first else kept[1:]
        end = following[0].seq if following else covered
        if not await self._delete_records(start, end):
            return False
        if is_first:
            self._before = 0
        else:
            await self._store.delete([self._names.kept(kept[0])])
            del kept[0], self._sizes[0]
        return True

    async def _delete_records(self, start: int, end: int) -> bool:
        """Delete the records above `start`, up to `end`. Return False if some are left after `_MOST_PAGES` pages."""
        for _ in range(_MOST_PAGES):
            if start >= end:
                return True
            sizes, start = await self._page(start, end)
            await self._store.delete([self._names.record(number) for number, size in sizes.items() if size])
        return False

    async def _page(self, start: int, end: int) -> tuple[dict[int, int], int]:
        """Return the sizes of some records and fences above `start`, up to `end`. Also return the number after which the next page starts."""
        page, more = await self._store.page(self._names.journal, self._names.record(start))
        sizes = {number: size for key, size in page.items() if (number := self._names.number(key)) is not None}
        last = max(sizes, default=end)  # keys that come after all numbers are not records
        return {number: size for number, size in sizes.items() if number <= end}, end if more is None else min(
            last, end
        )


async def keeps_something(store: Requests, names: Names) -> bool:
    """Return whether there is a history. A session that keeps no history must not delete the records of an existing one."""
    page, _ = await store.page(names.history, names.history)
    return any(names.older(key) is not None for key in page)


async def has_history(store: Requests, names: Names) -> bool:
    """Return whether there is a history of a state, or the snapshot says that its records belong to a history."""
    present = await store.head(names.snapshot)
    if present is not None and kept_in_metadata(present.metadata):
        return True
    return await keeps_something(store, names)
