"""The moments of a state: the check of a moment, the search for the generation that contains it, and its content."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from lab_state._loading import Decoded, decoded, load_by
from lab_state.exceptions import CorruptionError, StorageError, UnavailableError, UnsupportedError
from lab_state.storage._generations import (
    Moment,
    described,
    find_revision,
    find_time,
    moment_of_record,
    moment_of_snapshot,
    revision_of_record,
    text_of,
    window,
)
from lab_state.storage._history import FoundGeneration, GoneError, History, Listing, history_of
from lab_state.storage._protocol import Reading, Storage

At: TypeAlias = int | datetime
"""A moment: a revision, or an aware time."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOST_LISTS = 10
"""The number of times that the generations are listed while checkpoints replace the files in use."""


def check_at(at: object) -> At:
    """Check a moment that a caller has passed.

    Raises:
        TypeError: The moment is neither an `int` nor a `datetime`.
        ValueError: The moment is a `datetime` without a time zone.
    """
    if isinstance(at, datetime):
        if at.tzinfo is None or at.utcoffset() is None:
            raise ValueError(
                "at is a datetime without a time zone: write datetime.now(UTC) - timedelta(...), or call astimezone() to take the "
                "local time zone"
            )
        return at
    if isinstance(at, bool) or not isinstance(at, int):
        raise TypeError(f"at must be a revision (an int) or an aware datetime, not {type(at).__name__}")
    return at


def wall_of(at: datetime) -> int:
    """Return a time in milliseconds since 1970, rounded down."""
    return (at - _EPOCH) // timedelta(milliseconds=1)


def until(records: tuple[bytes, ...], at: At) -> int:
    """Return the number of records up to a moment. Earlier records may have later times, if the clock was set back.

    A record that cannot be decoded is counted, so that its replay raises an error.
    """
    if isinstance(at, datetime):
        wall = wall_of(at)
        for number in range(len(records), 0, -1):
            moment = moment_of_record(records[number - 1])
            if moment is None or moment.wall <= wall:
                return number
        return 0
    for number, record in enumerate(records):
        revision = revision_of_record(record)
        if revision is not None and revision > at:
            return number
    return len(records)


def find(found: list[FoundGeneration], at: At, now: float) -> FoundGeneration:
    """Return the generation that has a moment.

    Args:
        found: The generations, the oldest first. There is at least one.
        at: The moment.
        now: The time of the wall clock, in seconds since 1970.

    Raises:
        ValueError: No generation has the moment, or the moment is in the future.
    """
    spans = [one.span for one in found]
    is_whole = found[-1].in_use
    try:
        if not isinstance(at, datetime):
            return found[find_revision(spans, at)]
        wall = wall_of(at)
        if wall > max(now * 1000 if is_whole else 0, *(span.last.wall for span in spans)):
            what = "in the future" if wall > now * 1000 else "outside of the history"
            raise ValueError(f"{text_of(wall)} is {what}: {window(spans)}")  # noqa: TRY301 -- the end of the message is the same
        return found[find_time(spans, wall)]
    except ValueError as error:
        if is_whole:
            raise
        raise ValueError(f"{error}. The list lacks the state in use, which was removed or is damaged") from None


async def load_at(name: str, storage: Storage, at: At, now: float) -> Decoded:
    """Read a state at a moment, and decode it. As in `start()`, decoding blocks the event loop.

    For the arguments, see `find`.

    Raises:
        ValueError: The moment is outside of the history, in a hole of it, or in the future.
        UnsupportedError: There is no such state. Or no generation that can be read has the moment, and another one cannot be read.
        CorruptionError: No generation that has the moment can be read, and the oldest of them is damaged.
        UnavailableError: Ten times in a row, the generation was pruned or replaced before it could be read.
        StorageError: See `History`.
    """
    history = history_of(storage)
    for _ in range(MOST_LISTS):
        listed = await listing(history, name)
        with contextlib.suppress(GoneError):  # the next list does not have the generation
            return await _load_first(history, name, [_find(listed, at, now), *_others(listed.found, at)], at)
    raise UnavailableError(
        f"the history of {name!r} changed during each of {MOST_LISTS} attempts to read it; read it again"
    )


def _find(listed: Listing, at: At, now: float) -> FoundGeneration:
    """Return the generation that has a moment. If none has it, a generation that cannot be read may have it, so raise its error."""
    try:
        return find(listed.found, at, now)
    except ValueError:
        if listed.unreadable is None:
            raise
        raise listed.unreadable from None


def _others(listed: list[FoundGeneration], at: At) -> list[FoundGeneration]:
    """Return the generations that have a revision, the newest first. The newest of these is left out, because `find` returns it.

    A generation may end at the revision of the next snapshot. Then both generations have that revision. For a time, the
    list is empty, because `find` chooses one generation.
    """
    if isinstance(at, datetime):
        return []
    return [one for one in reversed(listed) if one.span.first.revision <= at <= one.span.last.revision][1:]


async def _load_first(history: History, name: str, found: list[FoundGeneration], at: At) -> Decoded:
    """Return the content of the first generation that can be read. If there is none, raise the error of the last one."""
    for one in found[:-1]:
        with contextlib.suppress(CorruptionError, UnsupportedError):
            return await _load_from(history, name, one, at)
    return await _load_from(history, name, found[-1], at)


async def generations(history: History, name: str) -> list[FoundGeneration]:
    """Return the generations of a state; at least one.

    Raises:
        UnsupportedError: A generation cannot be read, for example because a newer version of lab_state wrote it.
        StorageError: See `listing`.
    """
    found, unreadable = await listing(history, name)
    if unreadable is not None:
        raise unreadable
    return found


async def listing(history: History, name: str) -> Listing:
    """Return the generations of a state that can be read; at least one.

    Raises:
        CorruptionError: The state in use is damaged, and there is no history.
        StorageError: See `History.generations`.
    """
    listed = await history.generations(name)
    if not listed.found:
        raise CorruptionError(
            name, 0, "the files in use are damaged, and there is no earlier generation; restore a copy"
        )
    return listed


async def _load_from(history: History, name: str, found: FoundGeneration, at: At) -> Decoded:
    """Read one generation up to a moment.

    Raises:
        GoneError: A checkpoint has replaced the generation meanwhile, or the generation was pruned.
    """

    async def read(_: str) -> Reading:
        reading = await history.read(name, found)
        check_is_same(reading, found)
        count = until(reading.records, at)
        return reading._replace(records=reading.records[:count], durable=min(reading.durable, count))

    return await load_by(read, name) if found.in_use else await decoded(await read(name))


def check_is_same(reading: Reading, found: FoundGeneration) -> None:
    """Check that a reading is of the generation that was listed.

    Raises:
        GoneError: A checkpoint has replaced the generation in use.
    """
    if found.in_use and reading.snapshot is not None:
        begins = moment_of_snapshot(reading.snapshot)
        if begins is not None and begins.revision > found.span.first.revision:
            raise GoneError(f"{reading.path} was replaced; list the generations again")


async def with_remedy(error: CorruptionError, name: str, storage: Storage) -> CorruptionError:
    """Return the error of a state that cannot be loaded, with the newest good generation and the call that restores it.

    The named generation was read and decoded first, so it is good. If there is none, return the error as it is.
    """
    try:
        history = history_of(storage)
        found = (await history.generations(name)).found
    except StorageError:
        return error
    for generation in reversed(found):
        if generation.in_use:
            continue
        with contextlib.suppress(StorageError):
            state = (await decoded(await history.read(name, generation))).state
            place = described(Moment(state.revision, state.wall))
            call = f"await restore_state({name!r}, storage, {state.revision}, into={name!r})"
            return CorruptionError(
                error.path,
                error.offset,
                f"{error.detail}. The newest good generation ends at revision {place}; `{call}` restores it",
            )
    return error
