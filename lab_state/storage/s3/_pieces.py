"""The objects of a state in S3 that may be damaged, for a repair. Nothing is written, and no damage is an error.

1. GET the snapshot, LIST the objects after the last record that it covers, and GET them.
2. HEAD the snapshot. If it was replaced meanwhile, go back to step 1: a checkpoint may have deleted the records.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from lab_state._journal import NO_BASE, base_of
from lab_state.exceptions import CorruptionError
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import MOST_NUMBER, REMOVED, Names, stamp_at_end, stamp_in_metadata
from lab_state.storage.s3._open import AT_ONCE, NumberedObject, fetch, together
from lab_state.storage.s3._outcomes import ObjectInfo

_FENCE = NumberedObject(None, None)


class Pieces(NamedTuple):
    """The objects of a state, as far as they can be read.

    Attributes:
        snapshot: The bytes of the snapshot; `None` if it is missing.
        base: The name of a snapshot that another program wrote; see `BASE`. `None` for any other snapshot.
        records: The valid records in order, each with the name of the snapshot that it follows, if its metadata have one.
        is_followed: Whether the records follow a snapshot, which may be missing.
        problems: A sentence for each object that is damaged, missing, or not part of the state.
    """

    snapshot: bytes | None
    base: str | None
    records: list[tuple[bytes, str | None]]
    is_followed: bool
    problems: list[str]


async def read_pieces(store: Requests, names: Names, fence: int | None = None) -> Pieces:
    """Read the objects of a state. `fence` is the number of the fence that the caller has created. This fence is left out.

    Raises:
        StorageError: An object could not be read.
    """
    tries = store.tries("reading", names.snapshot)
    while True:
        got = await store.get(names.snapshot)
        covered = 0 if got is None else _covered(*got)
        listed = [number for number in await _listed(store, names, covered or 0) if number != fence]
        found = await _objects(store, names, [number for number in listed if number <= MOST_NUMBER])
        now = await store.head(names.snapshot)
        if (None if got is None else got[0].etag) == (None if now is None else now.etag):
            return _pieces(names, got, covered, listed, found)
        await tries.pause("a change of the state while it was read")


def _covered(found: ObjectInfo, data: bytes) -> int | None:
    """Return the number of the last record that a snapshot covers; `None` if it is not known.

    If metadata and body have different numbers, return the lower one. A record that the snapshot has already is left out by its revision.
    """
    stamps = [stamp_at_end(data)]
    with contextlib.suppress(CorruptionError):
        stamps.append(stamp_in_metadata(found.metadata, ""))
    return min((stamp.seq for stamp in stamps if stamp is not None), default=None)


async def _listed(store: Requests, names: Names, after: int) -> list[int]:
    sizes = await store.sizes(names.journal, names.record(after))
    return sorted(number for key in sizes if (number := names.number(key)) is not None)


async def _objects(store: Requests, names: Names, numbers: list[int]) -> dict[int, NumberedObject | None]:
    """Return the objects with these numbers; `None` for one that is damaged. Leave out one that was deleted meanwhile."""
    found: dict[int, NumberedObject | None] = {}
    left = iter(numbers)

    async def some() -> None:
        for number in left:
            into: dict[int, NumberedObject] = {}
            try:
                await fetch(store, names, [number], into)
            except CorruptionError:
                found[number] = None
            else:
                found.update(into)

    await together([some() for _ in range(min(AT_ONCE, len(numbers)))])
    return found


def _pieces(
    names: Names,
    got: tuple[ObjectInfo, bytes] | None,
    covered: int | None,
    listed: list[int],
    found: dict[int, NumberedObject | None],
) -> Pieces:
    snapshot = None if got is None or REMOVED in got[0].metadata else got[1]
    records = [
        (object_.record, object_.base)
        for _, object_ in sorted(found.items())
        if object_ is not None and object_.record is not None
    ]
    # Without the number in the snapshot, it is not known which records a checkpoint has deleted. So begin with the first record in the list.
    start = covered or next((number - 1 for number in listed if found.get(number) != _FENCE), max(listed, default=0))
    base = None if snapshot is None or covered is not None else base_of(len(snapshot), zlib.crc32(snapshot))
    is_followed = any(base not in {None, NO_BASE} for _, base in records)
    return Pieces(snapshot, base, records, is_followed, list(_problems(names, start, listed, found)))


def _problems(names: Names, start: int, listed: list[int], found: dict[int, NumberedObject | None]) -> Iterator[str]:
    """Yield a sentence for each object that is damaged, missing, or not part of a state, in order."""
    for before, number in pairwise([start, *(number for number in listed if number > start)]):
        if number > MOST_NUMBER:
            yield f"{names.url(names.record(number))} has a number that no writer reaches, so it is not part of the state"
            continue
        if number == before + 2:
            yield f"{names.url(names.record(before + 1))} is missing"
        elif number > before + 2:
            yield f"the objects {names.url(names.record(before + 1))} to {number - 1} are missing"
        if number not in found:
            yield f"{names.url(names.record(number))} is missing, but the store lists it"
        elif found[number] is None:
            yield f"{names.url(names.record(number))} is damaged; it was acknowledged"
