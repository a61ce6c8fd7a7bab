"""Open a state in S3: become its only writer, and load it.

1. Check that the store honours conditions. This uses a separate object, the probe. Also check whether
   the store accepts deletions. If it does not, a warning is shown, and the start goes on.
2. Load: GET the snapshot, LIST the records after the last one that it covers, and GET them. If a
   number is missing, a checkpoint may have deleted that record meanwhile. In that case the snapshot
   has changed, too: load again. If four loads find the same snapshot and fail, the state is damaged,
   and the start fails before step 3. A fence above the missing numbers would do harm. Suppose that the
   numbers are missing only because there is a stray object above them. If the operator then deleted the
   stray object, the fence would stay, and the numbers below the fence would still be missing.
3. LIST again, and create a fence at the next number. The next record of an older writer would have
   the same number, so the store refuses that record.
4. Load again; only changed objects are fetched. If the snapshot covers the number of the fence,
   a record had that number and was deleted. Then the fence does not stop an older writer: go back
   to step 2. If there is an object above the fence, there is a newer writer: go back to step 2.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
import zlib
from collections.abc import Coroutine, Iterable
from typing import Any, NamedTuple

from lab_state._journal import NO_BASE, SNAPSHOT_END, SNAPSHOT_END_BYTES, base_of
from lab_state.exceptions import CorruptionError, UnsupportedError
from lab_state.storage._generations import moment_of_snapshot, start_of_record
from lab_state.storage._protocol import Recovery
from lab_state.storage.s3._body import LONG, Body
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import (
    BASE,
    MOST_NUMBER,
    OWN_BASE,
    OWNER,
    REMOVED,
    Names,
    Stamp,
    kept_in_metadata,
    same_stamp,
    stamp_in_body,
    stamp_in_metadata,
    unframe,
)
from lab_state.storage.s3._outcomes import NO_ETAG, WRITE_ID, NotOursError, ObjectInfo

AT_ONCE = 12
_SAME_SNAPSHOT = 3


class Loaded(NamedTuple):
    """A state at one moment.

    Attributes:
        etag: The ETag of the snapshot; `None` if there is no snapshot.
        snapshot_bytes: The size of the snapshot, in bytes.
        base: The snapshot that the next record follows; see `BASE`.
        covered: The number of the last record that the snapshot covers.
        last: The highest number of a record or a fence above `covered`; `covered` if there is none.
        records: The sizes of the records above `covered`, by number.
        recovery: The bytes of the snapshot and the records.
        kept: The number up to which the records belong to the history; `None` if it is not known.
        is_removed: Whether the state was removed, and its history was left. Then there is no snapshot.
    """

    etag: str | None
    snapshot_bytes: int
    base: str
    covered: int
    last: int
    records: dict[int, int]
    recovery: Recovery
    kept: int | None
    is_removed: bool = False


class Opened(NamedTuple):
    """A state that was opened and loaded.

    Attributes:
        fence: The number of the fence that this writer created.
        loaded: The state below this fence.
        undeletable: The reason why the store refuses deletions. `None` if it accepts them, or if
            this is not known.
    """

    fence: int
    loaded: Loaded
    undeletable: str | None


def new_write_id() -> str:
    """Return a new id for one write. All attempts of this write use the same id."""
    return uuid.uuid4().hex


async def open_state(store: Requests, names: Names) -> Opened:
    """Become the writer of a state, and load it. The docstring of the module has the steps.

    Raises:
        StorageError: See `Storage.open`.
    """
    await probe(store, names)
    undeletable = await _undeletable(store, names)
    tries = store.tries("opening", names.snapshot)
    loader = Loader(store, names)
    while True:
        before = await loader.load()
        fence = await _fence(store, names, before.covered)
        if fence is not None:
            loaded = await loader.load_below(fence)
            if loaded is not None:
                return Opened(fence, loaded, undeletable)
        await tries.pause("a change by another writer at the same time")


async def probe(store: Requests, names: Names) -> None:
    """Check that the store refuses a write whose condition is not met.

    Raises:
        UnsupportedError: The store ignores the condition.
    """

    async def written(if_match: str | None) -> bool:
        return await store.put_anyhow(names.probe, {WRITE_ID: new_write_id()}, if_match)

    # If there was no object, the first write creates it. Then the store must refuse the second write.
    if (await written(None) and await written(None)) or await written(NO_ETAG):
        raise UnsupportedError(
            f"the store of s3://{names.bucket} ignores If-None-Match or If-Match: it accepted a write that it should "
            "have refused, so it cannot keep two writers apart. Use a store with conditional writes; if versioning of the "
            "bucket is on, try a bucket without it"
        )


async def _undeletable(store: Requests, names: Names) -> str | None:
    """Return the reason why objects cannot be deleted. `S3Session.warning` shows the reason.

    Return `None` if objects can be deleted, or if this is not known.
    """
    try:
        await store.check_deletes(names.journal + "none")
    except UnsupportedError as refused:
        return str(refused)
    return None


async def _fence(store: Requests, names: Names, covered: int) -> int | None:
    """Create a fence above all records and fences, and return its number.

    Return `None` if another writer took that number, or if numbers are missing.
    """
    listed = await numbers(store, names, covered)
    fence = covered + len(listed) + 1
    # If a number is missing, a checkpoint is deleting records, or the state is damaged. The next load shows which it is.
    if listed and max(listed) >= fence:
        return None
    try:
        await store.put(names.record(fence), Body.of(b""), {WRITE_ID: new_write_id(), OWNER: owner()}, None)
    except NotOursError:
        return None
    return fence


def owner() -> str:
    """Return the name of this process for the metadata of its fence."""
    host = socket.gethostname().encode("ascii", "replace").decode()
    return f"{host} pid {os.getpid()}"


async def numbers(store: Requests, names: Names, after: int) -> dict[int, int]:
    """Return the sizes of the records and fences above `after`, by number, in order. A fence has the size 0.

    Raises:
        CorruptionError: A number is larger than the numbers that a writer can reach.
    """
    listed = await store.sizes(names.journal, names.record(after))
    found = {number: size for key, size in listed.items() if (number := names.number(key)) is not None}
    for number in found:
        if number > MOST_NUMBER:
            path = names.url(names.record(number))
            raise CorruptionError(
                path, 0, "no writer reaches this number, so this object is not part of the state; delete it"
            )
    return {number: found[number] for number in sorted(found) if number > after}


class NumberedObject(NamedTuple):
    """The content of the object with a number: a record or a fence.

    Attributes:
        record: The record; `None` for a fence.
        base: The snapshot that the record follows; `None` if the metadata of the object do not name it.
    """

    record: bytes | None
    base: str | None


async def fetch(store: Requests, names: Names, wanted: list[int], into: dict[int, NumberedObject]) -> bool:
    """Fetch the objects with these numbers, `AT_ONCE` at a time, except those that `into` has. Return False if one of them is missing.

    Raises:
        CorruptionError: One of the objects is damaged.
        StorageError: See `Requests.get`.
    """
    left = iter([number for number in wanted if number not in into])
    gone = False

    async def some() -> None:
        nonlocal gone
        for number in left:
            got = await store.get(names.record(number))
            if gone or got is None:
                gone = True
                return
            into[number] = _object(names, number, *got)

    await together([some() for _ in range(min(AT_ONCE, len(wanted)))])
    return not gone


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await several coroutines at the same time. If one of them raises an error, cancel the others."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Loader:
    """A loader of a state, for several loads. It fetches the snapshot again only if it has changed, and no record twice."""

    def __init__(self, store: Requests, names: Names) -> None:
        """Create a loader that has fetched nothing yet."""
        self._store = store
        self._names = names
        self._path = names.url(names.snapshot)
        self._looked = False
        self._snapshot: tuple[ObjectInfo, bytes] | None = None
        self._stamp: Stamp | None = None
        self._crc: int | None = None
        self._base = NO_BASE
        self._same = 0  # the number of failed loads since the snapshot was fetched
        self._objects: dict[int, NumberedObject] = {}  # the fetched objects by number; no number is used twice

    async def load(self) -> Loaded:
        """Load the whole state.

        Raises:
            CorruptionError: The state is damaged.
            StorageError: The state could not be read.
        """
        loaded = await self._load(None)
        assert loaded is not None, "without a fence, a load returns a state or raises an error"
        return loaded

    async def load_below(self, fence: int) -> Loaded | None:
        """Load the state below the fence of this writer.

        Return `None` if the fence does not stop older writers, or if there is a newer writer.

        Raises:
            CorruptionError: The state is damaged.
            StorageError: The state could not be read.
        """
        return await self._load(fence)

    async def _load(self, fence: int | None) -> Loaded | None:
        store, names = self._store, self._names
        tries = store.tries("loading", names.snapshot)
        while True:
            await self._look()
            covered = 0 if self._stamp is None else self._stamp.seq
            listed = await numbers(store, names, covered)
            if fence is not None and (covered >= fence or max(listed, default=0) > fence):
                return None
            if self._snapshot is not None and self._stamp is None and self._same >= _SAME_SNAPSHOT:
                # The snapshot has no stamp, so another program wrote it. It does not say which records it covers, so begin
                # with the first record in the list. If an earlier record is missing, revisions are missing, too. The
                # start notices this later.
                last = max(listed, default=covered + 1)
                covered = min((number for number, size in listed.items() if size), default=last) - 1
                listed = {number: size for number, size in listed.items() if number > covered}
            problem = gap(listed, covered, fence, names)
            if problem is None and await fetch(
                store, names, [number for number in listed if number != fence], self._objects
            ):
                problem = self._misfit(listed)
                if problem is None:
                    return self._loaded(covered, listed)
            self._same += 1
            if self._same > _SAME_SNAPSHOT:
                lost = f"the store lists a record under {names.journal}, but does not return it; restore that record"
                raise CorruptionError(self._path, 0, problem or lost)
            await tries.pause("a change of the state while it was read")

    async def _look(self) -> None:
        """Fetch the snapshot if it has changed."""
        if self._looked:
            found = await self._store.head(self._names.snapshot)
            if found == (None if self._snapshot is None else self._snapshot[0]):
                return
        self._snapshot = None  # free it before the next one is loaded, because both may be large
        self._same = 0
        got = await self._store.get(self._names.snapshot)
        self._stamp = _stamp(got, self._path)
        self._crc = None
        if got is None:
            self._base = NO_BASE
        elif self._stamp is not None:
            self._base = OWN_BASE
        else:
            self._crc = await self._checksum(got[1])
            self._base = base_of(len(got[1]), self._crc)
        self._snapshot, self._looked = got, True

    async def _checksum(self, data: bytes) -> int:
        if len(data) < LONG:
            return zlib.crc32(data)
        return await asyncio.get_running_loop().run_in_executor(self._store.thread, zlib.crc32, data)

    def _misfit(self, listed: dict[int, int]) -> str | None:
        """Return a description of the problem if a record follows another snapshot; otherwise `None`.

        A snapshot with a stamp needs no check, unless it was edited, because the stamp has the number of the last
        record that it covers.
        """
        if self._stamp is not None:
            return self._older_than_edit(listed)
        for number in listed:
            found = self._objects.get(number)
            if found is not None and found.record is not None and found.base not in {None, self._base}:
                if found.base == NO_BASE:
                    return (
                        f"record {number} follows no snapshot, but there is one, which another program wrote; move that "
                        "snapshot away. To start from that snapshot instead, without the records, delete everything "
                        f"under {self._names.journal}"
                    )
                what = "is missing" if self._snapshot is None else "is not the present one"
                return (
                    f"the snapshot that record {number} follows {what}; restore it. To start from the present snapshot, or "
                    f"with an empty state if there is none, delete everything under {self._names.journal}"
                )
        return None

    def _older_than_edit(self, listed: dict[int, int]) -> str | None:
        """Return a description of the problem if the snapshot was edited after a record was written; otherwise `None`.

        The edit and the changes of such a record have the same revisions, so the record cannot be applied to the edit.
        """
        assert self._snapshot is not None  # it has a stamp
        data = self._snapshot[1]
        first = next((one.record for number in listed if (one := self._objects.get(number)) and one.record), None)
        if first is None or SNAPSHOT_END.search(data, max(0, len(data) - SNAPSHOT_END_BYTES)) is not None:
            return None
        edit, start = moment_of_snapshot(data), start_of_record(first)
        if edit is None or start is None or start >= edit.revision:  # what cannot be decoded is found by the start
            return None
        return (
            "the snapshot was edited, but there are records that were written before the edit; restore the snapshot. To "
            f"start from the edited snapshot instead, without the records, delete everything under {self._names.journal}"
        )

    def _loaded(self, covered: int, listed: dict[int, int]) -> Loaded:
        found, data = (None, None) if self._snapshot is None else self._snapshot
        is_removed = found is not None and REMOVED in found.metadata
        if is_removed:
            data = None
        records = tuple(
            known.record
            for number in listed
            if (known := self._objects.get(number)) is not None and known.record is not None
        )
        return Loaded(
            None if found is None else found.etag,
            len(data or b""),
            self._base,
            covered,
            max(listed, default=covered),
            {number: size for number, size in listed.items() if size},
            Recovery(data, records, unsettled=False, dropped_bytes=0, crc32=self._crc),
            0 if found is None else kept_in_metadata(found.metadata),
            is_removed,
        )


def _stamp(got: tuple[ObjectInfo, bytes] | None, path: str) -> Stamp | None:
    if got is None:
        return None
    found, data = got
    return same_stamp(stamp_in_body(data, path), stamp_in_metadata(found.metadata, path), path)


def gap(listed: dict[int, int], covered: int, fence: int | None, names: Names) -> str | None:
    """Return a message if a number is missing between `covered` and the end; otherwise `None`.

    The end is the fence. Without a fence, it is the last number in the list.
    """
    end = max(listed, default=covered) if fence is None else fence
    if len(listed) == end - covered:
        return None
    first = next((number for number in range(covered + 1, end + 1) if number not in listed), end)
    above = min((number for number in listed if number > first), default=None)
    if above is None:
        return f"the records from {first} on are missing from {names.journal}; restore them"
    return (
        f"the records {first} to {above - 1} are missing from {names.journal}; restore them, or, if "
        f"{names.url(names.record(above))} and the objects after it are not part of this state, delete those"
    )


def _object(names: Names, number: int, found: ObjectInfo, body: bytes) -> NumberedObject:
    """Return the content of an object.

    Raises:
        CorruptionError: The object is damaged. An empty object is a fence, unless its metadata
            have a write id but no owner. In that case it was a record, and is damaged.
    """
    path = names.url(names.record(number))
    if not body:
        if WRITE_ID in found.metadata and OWNER not in found.metadata:
            raise CorruptionError(path, 0, "it is empty, and a record is never empty; restore a copy")
        return NumberedObject(None, None)
    return NumberedObject(unframe(names.name, number, body, path), found.metadata.get(BASE))
