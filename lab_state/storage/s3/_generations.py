"""The generations of a state in S3: their list, and the reading of one. Nothing is written.

1. LIST the older snapshots.
2. Fetch the end of the snapshot in use, and LIST the records after the last one that it covers.
3. For each older snapshot, fetch the end, which has the revision and the time, and LIST the records after the snapshot.
4. HEAD the snapshot in use. If it was replaced meanwhile, begin again.

A generation has the records from its snapshot to the next snapshot. If all of these records are there, the generation reaches
the first moment of the next generation. If a number is missing, the generation ends before the gap. A snapshot that could not be
copied leaves no gap: the records after it belong to the generation before it. A snapshot that is pruned between two of these
steps is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lab_state._journal import NO_BASE
from lab_state.exceptions import CorruptionError
from lab_state.storage._generations import Moment, Span, moment_of_record, moment_of_snapshot
from lab_state.storage._history import FoundGeneration, GoneError
from lab_state.storage._protocol import Reading, no_state
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import MOST_NUMBER, REMOVED, Names, Older, same_stamp, stamp_at_end, stamp_in_metadata
from lab_state.storage.s3._keeping import END_BYTES
from lab_state.storage.s3._open import AT_ONCE, NumberedObject, fetch, gap, numbers, together
from lab_state.storage.s3._outcomes import ObjectInfo
from lab_state.storage.s3._read import read_objects

_LONGER = 64


class Part(NamedTuple):
    """The objects of a generation that is not in use.

    Attributes:
        older: Its snapshot; `None` for records that follow no snapshot.
        seq: The number of the last record that the snapshot covers; 0 without a snapshot.
        end: The number of the last record or fence that follows without a gap.
        until: The revision of the next snapshot, if the records reach it; otherwise `None`. That snapshot may have changes of
            records that it does not cover. So records up to this revision may come after `end`.
    """

    older: Older | None
    seq: int
    end: int
    until: int | None


class Begin(NamedTuple):
    """The beginning of a generation.

    It has the snapshot, the number of the last record that the snapshot covers, the first moment, and the size of the snapshot.
    """

    older: Older | None
    seq: int
    first: Moment
    size: int


class _InUse(NamedTuple):
    """The generation in use: the beginning, the last moment, and the number of bytes of the records."""

    begin: Begin
    last: Moment
    size: int


async def list_generations(store: Requests, names: Names) -> list[FoundGeneration]:
    """Return the generations that can be read, the oldest first; see `History.generations`.

    Raises:
        StorageError: See `History.generations`.
    """
    tries = store.tries("listing the history of", names.snapshot)
    while True:
        sizes = await store.sizes(names.history, names.history)
        kept = {older: size for key, size in sizes.items() if (older := names.older(key)) is not None and size}
        present = await store.head(names.snapshot)
        in_use = await _in_use(store, names, present, has_older=bool(kept))
        found = await _found(store, names, kept, in_use)
        if await store.head(names.snapshot) == present:
            break
        await tries.pause("a change of the state while it was read")
    if not found and (present is None or REMOVED in present.metadata) and not (await _first_numbers(store, names)):
        raise no_state(names.url(names.snapshot), ", and no history of it: check the name, the prefix and the bucket")
    return found


async def _first_numbers(store: Requests, names: Names) -> dict[str, int]:
    return (await store.page(names.journal, names.record(0)))[0]


async def _in_use(store: Requests, names: Names, present: ObjectInfo | None, *, has_older: bool) -> _InUse | None:
    """Return the generation in use; `None` if there is none, or if its list of objects, its first record or its last record shows damage."""
    try:
        begin, listed = await begin_in_use(store, names, present)
        lost = gap(listed, begin.seq, None, names) is not None
        # A start refuses records without their snapshot. Without any object, there is no state.
        if lost or (present is None and has_older) or not (begin.size or listed):
            return None
        first, last = await _ends(store, names, begin, listed)
    except CorruptionError:
        return None
    return _InUse(begin._replace(first=first), last, sum(listed.values()))


async def begin_in_use(store: Requests, names: Names, present: ObjectInfo | None) -> tuple[Begin, dict[int, int]]:
    """Return the beginning of the generation in use, and the sizes of its records and fences, by number.

    Raises:
        CorruptionError: The generation is damaged, or its snapshot was deleted meanwhile.
    """
    if present is None:
        return Begin(None, 0, Moment(0, 0), 0), await numbers(store, names, 0)
    looked = await _look(store, names.snapshot) if present.size else None
    if looked is None:
        raise CorruptionError(names.url(names.snapshot), 0, "it is empty, or was deleted; restore a copy")
    found, end, moment = looked
    path = names.url(names.snapshot)
    stamp = same_stamp(stamp_at_end(end), stamp_in_metadata(found.metadata, path), path)
    seq = 0 if stamp is None else stamp.seq
    listed = await numbers(store, names, seq)
    # The snapshot does not say which records it covers; see `Loader`.
    if stamp is None and gap(listed, 0, None, names) is not None:
        seq = min((number for number, size in listed.items() if size), default=max(listed) + 1) - 1
        listed = {number: size for number, size in listed.items() if number > seq}
    # A snapshot without a moment is from another program, and is loaded as revision 0.
    size = 0 if REMOVED in present.metadata else present.size
    return Begin(None, seq, moment or Moment(0, 0), size), listed


async def _look(store: Requests, key: str) -> tuple[ObjectInfo, bytes, Moment | None] | None:
    """Return a snapshot, the bytes at its end that have its moment, and the moment. Return `None` if the snapshot is missing."""
    size = END_BYTES
    while (got := await store.get_end(key, size)) is not None:
        found, end = got
        moment = moment_of_snapshot(end)
        if moment is not None or len(end) >= found.size:
            return found, end, moment
        size *= _LONGER
    return None


async def _ends(store: Requests, names: Names, begin: Begin, listed: dict[int, int]) -> tuple[Moment, Moment]:
    """Return the first and the last moment of a generation, from its first and its last record.

    Raises:
        CorruptionError: One of these records is damaged, or missing.
    """
    found = [number for number, size in listed.items() if size]
    if not found:
        return begin.first, begin.first
    first = begin.first
    if not begin.size:  # the first record shows when the state was empty
        first = Moment(0, (await _record(store, names, found[0]))[0].wall)
    last, _ = await _record(store, names, found[-1])
    return first, last if last.revision > first.revision else first


async def _record(store: Requests, names: Names, number: int) -> tuple[Moment, str | None]:
    """Return the moment of a record, and the base in its metadata.

    Raises:
        CorruptionError: The record is damaged, or missing.
    """
    into: dict[int, NumberedObject] = {}
    record = into[number].record if await fetch(store, names, [number], into) else None
    moment = None if record is None else moment_of_record(record)
    if moment is None:
        raise CorruptionError(names.url(names.record(number)), 0, "it is not a record; restore a copy")
    return moment, into[number].base


async def _found(store: Requests, names: Names, kept: dict[Older, int], in_use: _InUse | None) -> list[FoundGeneration]:
    """Return the generations. `kept` has the sizes of the older snapshots."""
    begins = await _begins(store, names, kept, None if in_use is None else in_use.begin)
    nexts = [*begins[1:], None if in_use is None else in_use.begin]
    found: list[FoundGeneration | None] = [None] * len(begins)
    left = iter(range(len(begins)))

    async def some() -> None:
        for number in left:
            found[number] = await _past_generation(store, names, begins[number], nexts[number])

    await together([some() for _ in range(min(AT_ONCE, len(begins)))])
    generations = [one for one in found if one is not None]
    if in_use is not None:
        begin, last, size = in_use
        generations.append(FoundGeneration(Span(begin.first, last), begin.size + size, in_use=True, key=None))
    return generations


async def _begins(store: Requests, names: Names, kept: dict[Older, int], in_use: Begin | None) -> list[Begin]:
    """Return the beginnings of the generations before the one in use, in order."""
    wanted = [older for older in sorted(kept) if in_use is None or older.seq < in_use.seq]
    looked: dict[Older, Begin] = {}
    left = iter(wanted)

    async def some() -> None:
        for older in left:
            seen = await _look(store, names.kept(older))
            if seen is not None:
                looked[older] = Begin(older, older.seq, seen[2] or Moment(0, older.wall), kept[older])

    await together([some() for _ in range(min(AT_ONCE, len(wanted)))])
    begins = [looked[older] for older in wanted if older in looked]
    first = begins[0] if begins else in_use
    # The records that follow no snapshot are a generation, unless they are the one in use.
    return [Begin(None, 0, Moment(0, 0), 0), *begins] if first is None or first.seq else begins


async def _past_generation(
    store: Requests, names: Names, begin: Begin, following: Begin | None
) -> FoundGeneration | None:
    """Return a generation that is not in use; `None` for records that follow a missing snapshot."""
    listed = await _between(store, names, begin.seq, MOST_NUMBER if following is None else following.seq)
    end = reach(listed, begin.seq)
    whole = {number: size for number, size in listed.items() if number <= end}
    if begin.older is None:
        number = next((number for number, size in whole.items() if size), None)
        try:
            if number is None or (await _record(store, names, number))[1] not in {None, NO_BASE}:
                return None
        except CorruptionError:
            return None
    until = None
    while True:
        try:
            first, last = await _ends(store, names, begin, whole)
            break
        except CorruptionError:  # the last record is damaged: end before it
            end = max(number for number, size in whole.items() if size) - 1
            whole = {number: size for number, size in whole.items() if number <= end}
    if following is not None and end >= following.seq and following.first.revision >= last.revision:
        last, until = following.first, following.first.revision
    size = begin.size + sum(whole.values())
    return FoundGeneration(Span(first, last), size, in_use=False, key=Part(begin.older, begin.seq, end, until))


async def _between(store: Requests, names: Names, start: int, end: int) -> dict[int, int]:
    """Return the sizes of the records and fences above `start`, up to `end`, by number, in order."""
    found: dict[int, int] = {}
    while start < end:
        page, more = await store.page(names.journal, names.record(start))
        sizes = {number: size for key, size in page.items() if (number := names.number(key)) is not None}
        found |= {number: size for number, size in sizes.items() if number <= end}
        start = end if more is None else max(sizes, default=end)
    return dict(sorted(found.items()))


def reach(listed: Iterable[int], start: int) -> int:
    """Return the last of the numbers that follow `start` without a gap; `start` if there is none. `listed` is in order."""
    for number in listed:
        if number != start + 1:
            break
        start = number
    return start


async def read_generation(store: Requests, names: Names, generation: FoundGeneration) -> Reading:
    """Read one generation; see `History.read`.

    Raises:
        GoneError: The generation was pruned.
        StorageError: See `History.read`.
    """
    part = generation.key
    if not isinstance(part, Part):
        return await read_objects(store, names)
    older, seq, end, until = part
    path = names.url(names.journal if older is None else names.kept(older))
    got = None if older is None else await store.get(names.kept(older))
    found: dict[int, NumberedObject] = {}
    is_gone = older is not None and got is None
    if is_gone or not await fetch(store, names, list(range(seq + 1, end + 1)), found):
        raise GoneError(f"{path} was pruned: list the generations again")
    records = [record for _, (record, _) in sorted(found.items()) if record is not None]
    last = moment_of_record(records[-1]) if records else None
    if until is not None and (last is None or last.revision < until):
        records += await _records_beyond(store, names, end, until)
    return Reading(None if got is None else got[1], tuple(records), len(records), None, path)


async def _records_beyond(store: Requests, names: Names, end: int, until: int) -> list[bytes]:
    """Return the records after the number `end` that end at or below the revision `until`."""
    records: list[bytes] = []
    found: dict[int, NumberedObject] = {}
    number = end + 1
    while await fetch(store, names, [number], found):
        record = found[number].record
        moment = None if record is None else moment_of_record(record)
        if record is not None and (moment is None or moment.revision > until):
            break
        if record is not None:
            records.append(record)
        number += 1
    return records
