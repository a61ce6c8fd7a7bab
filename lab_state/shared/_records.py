"""Records of an owner, and the copies that they change.

Each process has a copy: the durable state in its memory. After the copy was loaded, only records change it. The owner applies a record
when its commit is durable, and a follower when it receives the record. Both use `RecordApplier`, so all copies
are the same at the same revision, and each watch reports the same changes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Generator, Iterator
from enum import Enum
from typing import NamedTuple, cast

import msgspec
from msgspec import UNSET

from lab_state._arguments import check_keys
from lab_state._batch import in_parts
from lab_state._codec import Record, decode_record
from lab_state._entries import DELETED, ChangeSet, StoredOrGone, Versions
from lab_state._following import Step, apply_step, changes_of
from lab_state._not_json import NOT_JSON
from lab_state._slices import unsliced
from lab_state._state import State
from lab_state.exceptions import InvalidKeyError
from lab_state.shared._frames import BadMessageError
from lab_state.shared._results import RecordCalls, ResultTable

_HEAD = re.compile(rb'\{"from":\d+,"to":\d+,"clear":(true|false),"set":\{')
_MIDDLE = [b'},"delete":[', b'],"expires":{']
"""The texts between the members of a record that have slices: `set`, `delete` and `expires`."""

_CONTRADICTION = "a record whose changes contradict each other"


class ParsedRecord(NamedTuple):
    """The changes of one commit, and the results of its calls.

    Attributes:
        start: The revision before the first change.
        end: The revision of the last change.
        cleared: Whether all keys were deleted before `changes`.
        changes: The last change of each key. A key that was deleted need not have existed.
        time: The time of the state at the commit, in milliseconds since 1970; 0 if no key of the state expires.
        wall: The time of the owner's wall clock, in milliseconds since 1970.
        calls: The results of calls; `None` if there are none.
        versions: The new versions of the state; `None` if they have not changed.
    """

    start: int
    end: int
    cleared: bool
    changes: dict[str, StoredOrGone]
    time: int = 0
    wall: int = 0
    calls: RecordCalls | None = None
    versions: Versions | None = None


def record_of(taken: ChangeSet, calls: RecordCalls | None = None) -> ParsedRecord:
    """Return the record of an owner's own changes. It has the same effect as the record that was encoded from them."""
    start, end, cleared, changes, _, time, wall, versions = taken
    return ParsedRecord(start, end, cleared, changes, time, wall, calls, versions)


def parse_record(data: bytes | memoryview) -> ParsedRecord:
    """Return the contents of a record. Its `changes` do not keep `data` alive, but its `calls` do.

    Raises:
        BadMessageError: The bytes are not a record.
    """
    record = _decoded(data)
    _check(record)
    _check_keys(record.set)
    _check_keys(record.delete)
    return _parsed(record, changes_of(record.set, record.expires, record.delete))


def parse_in_steps(data: bytes | memoryview) -> Generator[None, None, ParsedRecord]:
    """Return the contents of a record, as `parse_record` does. Yield after each 500 keys.

    A record of more than 500 keys that was not written in slices is decoded in the first step; see `_slices`.

    Raises:
        BadMessageError: The bytes are not a record.
    """
    record = yield from _decoded_in_steps(data)
    if not 0 <= record.start <= record.end:
        raise BadMessageError("a record with impossible revisions")
    changes: dict[str, StoredOrGone] = {}
    for part in in_parts(record.set):
        _check_keys(part)
        changes |= changes_of({key: record.set[key] for key in part}, record.expires, ())
        yield
    for part in in_parts(record.expires):
        if not record.set.keys() >= set(part):
            raise BadMessageError(_CONTRADICTION)
        yield
    for part in in_parts(record.delete):
        _check_keys(part)
        if not record.set.keys().isdisjoint(part):
            raise BadMessageError(_CONTRADICTION)
        changes |= dict.fromkeys(part, DELETED)
        yield
    return _parsed(record, changes)


def _decoded_in_steps(data: bytes | memoryview) -> Generator[None, None, Record]:
    found = yield from unsliced(data)
    if found is None or not _HEAD.fullmatch(found.frame[0]) or found.frame[1:-1] != _MIDDLE:
        return _decoded(data)
    record = _decoded(b"".join(found.frame))
    values, deleted, expires = found.contents
    return msgspec.structs.replace(record, set=values, delete=deleted, expires=expires)


async def parse_in_turns(data: bytes | memoryview) -> ParsedRecord:
    """Return the contents of a record, as `parse_record` does. The event loop runs after each 500 keys.

    Raises:
        BadMessageError: The bytes are not a record.
    """
    steps = parse_in_steps(data)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return cast("ParsedRecord", stop.value)
        await asyncio.sleep(0)


def _decoded(data: bytes | memoryview) -> Record:
    try:
        str(data, "utf-8")  # msgspec does not check the bytes of a value that is not decoded
        return decode_record(data)
    except NOT_JSON:
        raise BadMessageError("a record that is not JSON, or has other members than a record") from None


def _check(record: Record) -> None:
    if not 0 <= record.start <= record.end:
        raise BadMessageError("a record with impossible revisions")
    if not record.expires.keys() <= record.set.keys() or not record.set.keys().isdisjoint(record.delete):
        raise BadMessageError(_CONTRADICTION)


def _check_keys(keys: Collection[str]) -> None:
    try:
        check_keys(keys)
    except InvalidKeyError:
        raise BadMessageError("a record with an invalid key") from None


def _parsed(record: Record, changes: dict[str, StoredOrGone]) -> ParsedRecord:
    calls = None if record.calls is UNSET else record.calls
    return ParsedRecord(
        record.start, record.end, record.clear, changes, record.time, record.wall, calls, record.versions
    )


class Outcome(Enum):
    """The outcome of a record for a copy."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    """The copy contains the record already."""
    GAP = "gap"
    """An earlier record is missing. Nothing was changed."""


class RecordApplier:
    """An object that applies records to a copy.

    Attributes:
        copy: The copy. No other code may change it.
    """

    def __init__(self, copy: State) -> None:
        """Prepare to change a copy. The copy must have no untaken changes."""
        self.copy: State = copy
        self._prepared: tuple[ParsedRecord, Step | None] | None = None

    def outcome(self, record: ParsedRecord) -> Outcome:
        """Return the outcome that `apply` would have. A record that starts below the copy and ends above it is applied."""
        if record.end <= self.copy.revision:
            return Outcome.SKIPPED
        return Outcome.APPLIED if record.start <= self.copy.revision else Outcome.GAP

    def apply(self, record: ParsedRecord) -> Outcome:
        """Apply a record to the copy in one step, and return the outcome.

        With many keys, this blocks the event loop; `prepare` and `finish` do the same in steps. The copy has no untaken
        changes afterwards.
        """
        outcome = self.outcome(record)
        if outcome is Outcome.APPLIED:
            self._note_members(record)  # this comes first: if the step fails, the same record is applied again
            apply_step(self.copy, record.changes, record.end, cleared=record.cleared, time=record.time)
        return outcome

    def prepare(self, record: ParsedRecord) -> Iterator[None]:
        """Do most of the work of `apply`, and yield between two parts of it. Reads do not see the record before `finish`.

        No other record may be applied until `finish` was called. To cancel the preparation, drop the iterator.
        """
        step: Step | None = None
        if self.outcome(record) is Outcome.APPLIED:
            step = Step(self.copy, record.changes, record.end, cleared=record.cleared, time=record.time)
        self._prepared = record, step
        if step is not None:
            yield from step.prepare()

    def finish(self) -> Outcome:
        """Show the prepared record, in one short step, and return the outcome."""
        assert self._prepared is not None  # `prepare` was called, and has ended
        record, step = self._prepared
        self._prepared = None
        outcome = self.outcome(record)
        if step is not None:
            self._note_members(record)
            step.finish()
        return outcome

    def _note_members(self, record: ParsedRecord) -> None:
        self.copy.versions = record.versions or self.copy.versions
        if record.calls:
            if self.copy.results is None:
                self.copy.results = ResultTable()
            self.copy.results.apply(record.calls, record.end)
