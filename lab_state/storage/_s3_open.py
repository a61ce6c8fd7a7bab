"""Becoming the only writer of a state in S3, and loading it.

1. Show that the store honours conditions, on an object of its own.
2. HEAD the snapshot, LIST what comes after the number it covers, and create a fence at
   the next number. Whoever wrote there before finds it in the way of its next record.
3. HEAD the snapshot again. If it covers the fence's number, the number had been used
   and deleted: the fence keeps nobody out, begin again.
4. GET the snapshot, LIST what comes after it. Something above the fence: someone newer
   came, begin again. Else exactly the numbers up to the fence must be there. If one is
   not, a checkpoint of the writer before may have deleted it meanwhile, which shows in
   the snapshot's ETag: load again. If the snapshot stays the same, it is damage.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from typing import NamedTuple

from lab_state.exceptions import CorruptionError, UnavailableError, UnsupportedError
from lab_state.storage._protocol import Recovery
from lab_state.storage._s3_body import Body
from lab_state.storage._s3_client import Requests
from lab_state.storage._s3_format import (
    END_BYTES,
    OWNER,
    Names,
    Stamp,
    same_stamp,
    stamp_at_end,
    stamp_in_body,
    stamp_in_metadata,
    unframe,
)
from lab_state.storage._s3_outcomes import WRITE_ID, Found, NotOursError

_AT_ONCE = 12
_SAME_SNAPSHOT = 3
_NO_ETAG = f'"{"0" * 32}"'


class Opened(NamedTuple):
    """A state that is ours, loaded.

    Attributes:
        fence: The number of our fence.
        etag: The snapshot's ETag; `None` when there is none.
        snapshot_bytes: Its size.
        records: The sizes of the records behind it, by number.
        recovery: What was loaded.
    """

    fence: int
    etag: str | None
    snapshot_bytes: int
    records: dict[int, int]
    recovery: Recovery


def new_write_id() -> str:
    """The id of one write, the same for all its attempts."""
    return uuid.uuid4().hex


async def open_state(store: Requests, names: Names) -> Opened:
    """Become the writer; see the module.

    Raises:
        StorageError: It could not; see `Storage.open`.
    """
    await _probe(store, names)
    tries = store.tries("opening", names.snapshot)
    while True:
        fence = await _fence(store, names)
        if fence is not None:
            opened = await _load(store, names, fence)
            if opened is not None:
                return opened
        await tries.pause(UnavailableError("others are opening it at the same time"))


async def _probe(store: Requests, names: Names) -> None:
    """Refuse a store that writes although the condition does not hold."""

    async def written(if_match: str | None) -> bool:
        return await store.put_anyhow(names.probe, {WRITE_ID: new_write_id()}, if_match)

    # The first may find nothing there; then the second must find the first.
    if (await written(None) and await written(None)) or await written(_NO_ETAG):
        raise UnsupportedError(
            f"the store of s3://{names.bucket} ignores If-None-Match or If-Match: it wrote where it should have "
            "refused, so it cannot keep two writers apart. Use a store with conditional writes; if the bucket has "
            "versioning on, try one without"
        )


async def _fence(store: Requests, names: Names) -> int | None:
    """A fence of ours above everything that is there; `None` if someone else came first."""
    covered = await _covered(store, names, proven=True)
    listed = await numbers(store, names, covered)
    fence = max([covered, *listed]) + 1
    metadata = {WRITE_ID: new_write_id(), OWNER: _owner()}
    try:
        await store.put(names.record(fence), Body.of(b""), metadata, None)
    except NotOursError:
        return None
    return fence if await _covered(store, names) < fence else None


def _owner() -> str:
    host = socket.gethostname().encode("ascii", "replace").decode()
    return f"{host} pid {os.getpid()}"


async def _covered(store: Requests, names: Names, *, proven: bool = False) -> int:
    """The number of the last record that the snapshot covers.

    A fence beyond a number that was damaged would outlive the damage. So before there is
    one, what the metadata say is `proven` by the end of the snapshot.
    """
    found = await store.head(names.snapshot)
    if found is None:
        return 0
    path = names.url(names.snapshot)
    stamp = stamp_in_metadata(found.metadata, path)
    if stamp is None:  # a copy, or someone else's: only its bytes can tell
        got = await store.get(names.snapshot)
        stamp = None if got is None else stamp_in_body(got[1], path)
    elif proven and found.size and (got := await store.get(names.snapshot, END_BYTES)) is not None:
        same_stamp(stamp_at_end(got[1]), stamp_in_metadata(got[0].metadata, path), path)
    return 0 if stamp is None else stamp.seq


async def numbers(store: Requests, names: Names, after: int) -> dict[int, int]:
    """The numbers of records and fences above one, in order, with their sizes; a fence has none."""
    listed = await store.sizes(names.journal, names.record(after))
    found = {number: size for key, size in listed.items() if (number := names.number(key)) is not None}
    return {number: found[number] for number in sorted(found) if number > after}


async def _load(store: Requests, names: Names, fence: int) -> Opened | None:
    """The snapshot and the records up to our fence; `None` if the fence does not hold."""
    path = names.url(names.snapshot)
    same = 0
    while True:
        got = await store.get(names.snapshot)
        etag, data = (None, None) if got is None else (got[0].etag, got[1])
        stamp = _stamp(got, path)
        covered = 0 if stamp is None else stamp.seq
        listed = await numbers(store, names, covered)
        if covered >= fence or max(listed, default=0) > fence:
            return None
        sizes = {number: size for number, size in listed.items() if size}
        if _whole(listed, covered, fence, edited=data is not None and stamp is None and same >= _SAME_SNAPSHOT):
            records = await _records(store, names, [number for number in listed if number != fence])
            if records is not None:
                recovery = Recovery(data, records, unsettled=False, dropped_bytes=0)
                return Opened(fence, etag, len(data or b""), sizes, recovery)
        now = await store.head(names.snapshot)
        same = same + 1 if (None if now is None else now.etag) == etag else 0
        if same > _SAME_SNAPSHOT:
            raise CorruptionError(
                path, 0, f"records between {covered + 1} and {fence - 1} are missing from {names.journal}; restore them"
            )


def _stamp(got: tuple[Found, bytes] | None, path: str) -> Stamp | None:
    if got is None:
        return None
    found, data = got
    return same_stamp(stamp_in_body(data, path), stamp_in_metadata(found.metadata, path), path)


def _whole(listed: dict[int, int], covered: int, fence: int, *, edited: bool) -> bool:
    """Whether nothing is missing between the snapshot and the fence."""
    if edited:
        # A file put there by hand does not say what it covers; the revisions in the records do.
        covered = min((number for number, size in listed.items() if size), default=fence) - 1
    wanted = range(covered + 1, fence + 1)
    return len(wanted) <= len(listed) and all(number in listed for number in wanted)


async def _records(store: Requests, names: Names, wanted: list[int]) -> tuple[bytes, ...] | None:
    """The records among these, in order, fetched some at a time; `None` if one, or a fence, is gone."""
    found: dict[int, bytes | None] = {}
    left = iter(wanted)
    gone = False

    async def fetch() -> None:
        nonlocal gone
        for number in left:
            got = await store.get(names.record(number))
            if gone or got is None:
                gone = True
                return
            found[number] = _record(names, number, *got)

    fetching = [asyncio.create_task(fetch()) for _ in range(min(_AT_ONCE, len(wanted)))]
    try:
        await asyncio.gather(*fetching)
    finally:
        for task in fetching:
            task.cancel()
        await asyncio.gather(*fetching, return_exceptions=True)
    return None if gone else tuple(record for number in wanted if (record := found[number]) is not None)


def _record(names: Names, number: int, found: Found, body: bytes) -> bytes | None:
    """The record; `None` for a fence. What is empty, and was written by us without an owner, was a record once."""
    path = names.url(names.record(number))
    if not body:
        if WRITE_ID in found.metadata and OWNER not in found.metadata:
            raise CorruptionError(path, 0, "it is empty, which no record is; restore a copy")
        return None
    return unframe(names.name, number, body, path)
