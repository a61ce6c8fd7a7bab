"""The history of a state: the names of its files on disk, its generations, and the generation that has a moment. This module does no I/O.

`<name>.history/` has links to the files that earlier checkpoints replaced. Their names are::

    <first revision, 20 digits>-<wall>-<base>.json               a snapshot
    <first revision, 20 digits>-<wall>-<salt>-<base>.journal     a journal

`base` names a snapshot by its size and checksum; see `_journal.base_of`. The file name of a journal has the base that is in
the header of the journal: `none` without a snapshot, and `full` for a journal that starts with the whole state. The first
revision is that of the snapshot, or of the whole state; with `none` it is 0. `wall` is the recorded time: that of the
snapshot, or of the header. For a snapshot of another program, it is the modification time of the file.

So the names alone show which files form a generation. The last revision is in no name, because a file that was
linked early still grows.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from lab_state._journal import ANY_BASE, NO_BASE
from lab_state._not_json import NOT_JSON

_FULL = "full"
_NUMBER = r"(?:0|[1-9]\d{0,19})"
_BASE = rf"{_NUMBER}-[0-9a-f]{{8}}"
_SALT = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(
    rf"(?P<first>\d{{20}})-(?P<wall>{_NUMBER})-(?:(?P<snapshot>{_BASE})\.json|(?P<salt>[0-9a-f]{{16}})-(?P<base>{_BASE}|none|full)\.journal)",
    re.ASCII,
)
_REVISIONS = re.compile(rb'\{"from":\d{1,19},"to":(\d{1,19}),')
"""The start of a record, as `_codec` encodes it."""

_MEMBER = b'"$lab_state":'


class HistoryFile(NamedTuple):
    """A file of the history. Its name contains all of these attributes.

    Attributes:
        first: The revision of the state at the start of the file.
        wall: The recorded time, in milliseconds since 1970; 0 if it is not recorded.
        base: The base of this snapshot, or of the snapshot that this journal follows. For a journal, it may be `NO_BASE` or `ANY_BASE`.
        salt: The salt of a journal, or its substitute; empty for a snapshot.
    """

    first: int
    wall: int
    base: str
    salt: str = ""

    @property
    def is_snapshot(self) -> bool:
        """Whether this is a snapshot, and not a journal."""
        return not self.salt


def snapshot_file(first: int, wall: int, base: str) -> HistoryFile:
    """Return the description of a snapshot. For the arguments, see `HistoryFile`."""
    return HistoryFile(first, max(0, wall), base)


def journal_file(first: int, wall: int, base: str, salt: str) -> HistoryFile:
    """Return the description of a journal. For the arguments, see `HistoryFile`.

    A salt that lab_state has not made may be unsafe as a part of a file name. So the checksum of such a salt replaces it.
    """
    return HistoryFile(
        first, max(0, wall), base, salt if _SALT.fullmatch(salt) else f"{zlib.crc32(salt.encode()):016x}"
    )


def format_name(file: HistoryFile) -> str:
    """Return the name of a file in the directory of the history."""
    start = f"{file.first:020d}-{file.wall}-"
    if file.is_snapshot:
        return f"{start}{file.base}.json"
    return f"{start}{file.salt}-{_FULL if file.base == ANY_BASE else file.base}.journal"


def parse_name(name: str) -> HistoryFile | None:
    """Return the file that has this name. Return `None` for a name that `format_name` does not make, such as the name of a foreign file."""
    if (found := _NAME.fullmatch(name)) is None:
        return None
    first, wall = int(found["first"]), int(found["wall"])
    if found["snapshot"]:
        return HistoryFile(first, wall, found["snapshot"])
    base = found["base"]
    return HistoryFile(first, wall, ANY_BASE if base == _FULL else base, found["salt"])


class StoredGeneration(NamedTuple):
    """The files of one generation.

    Attributes:
        snapshot: The snapshot; `None` if the journal needs none.
        journals: The journals that follow the snapshot, the oldest first. Usually there is one. If there are several, each of
            them begins with copies of the records of the journal before it, and the longest journal has all records.
    """

    snapshot: HistoryFile | None
    journals: tuple[HistoryFile, ...] = ()

    @property
    def first(self) -> int:
        """The first revision."""
        return self.files[0].first

    @property
    def wall(self) -> int:
        """The recorded time of the first revision, in milliseconds since 1970."""
        return self.files[0].wall

    @property
    def files(self) -> tuple[HistoryFile, ...]:
        """All files, in the order in which they are read."""
        return self.journals if self.snapshot is None else (self.snapshot, *self.journals)


class Grouped(NamedTuple):
    """The files of a history, in generations.

    Attributes:
        generations: The generations, the oldest first.
        orphans: Journals whose snapshot is missing. They cannot be read.
    """

    generations: list[StoredGeneration]
    orphans: list[HistoryFile]


def grouped(files: Iterable[HistoryFile]) -> Grouped:
    """Group the files of a history into generations: a snapshot with its journals, or one journal that needs no snapshot."""
    snapshots: dict[str, HistoryFile] = {}
    journals: dict[str, list[HistoryFile]] = {}
    generations: list[StoredGeneration] = []
    for file in sorted(files):
        if file.is_snapshot:
            snapshots[file.base] = file
        elif file.base in (NO_BASE, ANY_BASE):
            generations.append(StoredGeneration(None, (file,)))
        else:
            journals.setdefault(file.base, []).append(file)
    for base, snapshot in snapshots.items():
        generations.append(StoredGeneration(snapshot, tuple(journals.pop(base, ()))))
    orphans = [file for left in journals.values() for file in left]
    return Grouped(sorted(generations, key=lambda one: one.files[0]), orphans)


# The revisions and times in the bytes of snapshots and records


class Moment(NamedTuple):
    """A revision, and the recorded time in milliseconds since 1970; 0 if it is not recorded."""

    revision: int
    wall: int


class _Member(msgspec.Struct, frozen=True):
    """The reserved member of a snapshot. Its other members are ignored."""

    format: int
    revision: int
    id: str
    crc32: str | None = None
    wall: int = 0


class _Record(msgspec.Struct, frozen=True, rename={"start": "from", "end": "to"}):
    """The revisions and the time of a record. Its keys and values are ignored."""

    start: int
    end: int
    wall: int = 0


class _Whole(msgspec.Struct, frozen=True, rename={"member": "$lab_state"}):
    """A whole snapshot. Its keys and values are ignored."""

    member: _Member


_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_member = msgspec.json.Decoder(_Member).decode
_decode_record = msgspec.json.Decoder(_Record).decode


def moment_of_snapshot(end: bytes) -> Moment | None:
    """Return the revision and the time of a snapshot, from its last bytes, or from all of them.

    Return `None` if these bytes do not have the whole reserved member. Then pass more bytes. If these bytes are the whole
    snapshot, another program or a person wrote the snapshot, and it is loaded as revision 0.
    The member is not checked against the checksum of the snapshot.
    """
    at = len(end)
    if not end.endswith(b"}"):
        end = end.rstrip()
    while (at := end.rfind(_MEMBER, 0, at)) >= 0:
        # A result of a call, which is inside the member, may contain the same text as the name of the member. Only after the
        # real name is the text up to the last brace one JSON object.
        if (found := _member(end[at + len(_MEMBER) : -1])) is not None:
            return _moment_of(found)
    if end.startswith(b"{") and _MEMBER in end:
        # In an edited snapshot, the member may be in another place. The end of a snapshot is no JSON object, and gives None.
        with contextlib.suppress(*NOT_JSON):
            return _moment_of(_decode_whole(end).member)
    return None


def _member(data: bytes) -> _Member | None:
    try:
        return _decode_member(data)
    except NOT_JSON:
        return None


def _moment_of(member: _Member) -> Moment:
    # A person who edits a snapshot deletes its checksum, and the edit is the next revision; see `_codec.check_member`.
    return Moment(member.revision + (member.crc32 is None), member.wall)


def moment_of_record(record: bytes) -> Moment | None:
    """Return the last revision of a record, and its time. Return `None` if it is not a record."""
    try:
        found = _decode_record(record)
    except NOT_JSON:
        return None
    return Moment(found.end, found.wall)


def start_of_record(record: bytes) -> int | None:
    """Return the revision before the first change of a record. Return `None` if it is not a record."""
    try:
        return _decode_record(record).start
    except NOT_JSON:
        return None


def revision_of_record(record: bytes) -> int | None:
    """Return the last revision of a record. Return `None` if it is not a record. Only the start of a record of lab_state is read."""
    if (found := _REVISIONS.match(record)) is not None:
        return int(found[1])
    moment = moment_of_record(record)
    return None if moment is None else moment.revision


# The order of generations


def lives(firsts: Collection[Moment], newest: int | None) -> Callable[[Moment], int]:
    """Return a function that numbers the lives of a state. A life begins when the revisions begin again at 0.

    In one life the revisions show the order of the generations, even if the clock was set back. A state that was removed and made
    again, or whose reserved member was deleted, begins another life. Only the times show the order of lives.

    A generation with revision 0 begins another life if a higher revision has an earlier time, and one of these holds: that
    time is not before an earlier revision 0, or the higher revision is above `newest`. Otherwise the clock was set back.

    Args:
        firsts: The first moments of the generations that are not in use.
        newest: The first revision of the generation in use; `None` if it is not known.
    """
    begins = sorted(one.wall for one in firsts if not one.revision)
    later = [one for one in firsts if one.revision]
    again = [
        begin
        for begin in begins
        if any(one.wall < begin and (begins[0] <= one.wall or _is_above(one.revision, newest)) for one in later)
    ]
    return lambda first: bisect_right(again, first.wall)


def _is_above(revision: int, newest: int | None) -> bool:
    return newest is not None and revision > newest


# Holes, and the generation of a moment


class Span(NamedTuple):
    """The moments of a generation.

    Attributes:
        first: The first moment.
        last: The last moment.
    """

    first: Moment
    last: Moment

    def has_begun(self, wall: int) -> bool:
        """Return whether the first or the last moment of the generation is at or before this time."""
        return min(self.first.wall, self.last.wall) <= wall


def holes(spans: Sequence[Span]) -> list[bool]:
    """Return for each generation whether there is a hole before it. A hole consists of revisions that no generation has.

    There is a hole before a generation if its first revision is more than 1 above the highest revision of the generations before
    it. A generation with revision 0 begins another life of the state. Generations before that life are not compared.

    Args:
        spans: The generations, the oldest first.
    """
    found: list[bool] = []
    reached: int | None = None
    for span in spans:
        found.append(reached is not None and span.first.revision > reached + 1)
        begins = reached is None or not span.first.revision  # another life of the state; see `lives`
        reached = span.last.revision if begins else max(reached or 0, span.last.revision)
    return found


def find_revision(spans: Sequence[Span], revision: int) -> int:
    """Return the index of the generation that has a revision. If several have it, return that of the newest one.

    Args:
        spans: The generations, the oldest first. There is at least one.
        revision: The revision.

    Raises:
        ValueError: No generation has the revision. The message names the first and the last moment, or the neighbours of the hole.
    """
    for number in range(len(spans) - 1, -1, -1):
        if spans[number].first.revision <= revision <= spans[number].last.revision:
            return number
    before = [span.last for span in spans if span.last.revision < revision]
    after = [span.first for span in spans if span.first.revision > revision]
    if not before or not after:
        raise ValueError(f"revision {revision} is outside of the history: {window(spans)}")
    raise ValueError(f"revision {revision} is in a hole of the history: {_neighbours(max(before), min(after))}")


def find_time(spans: Sequence[Span], wall: int) -> int:
    """Return the index of the generation with the newest record that is not after a time.

    The clock of the writer may have been set back. So a generation is chosen by the times of its first and its last moment.

    Args:
        spans: The generations, the oldest first. There is at least one.
        wall: The time, in milliseconds since 1970.

    Raises:
        ValueError: The time is before all generations, or in a hole. The message names the first and the last moment, or the neighbours of the hole.
    """
    for number in range(len(spans) - 1, -1, -1):
        span = spans[number]
        if not span.has_begun(wall) or _is_covered(span, spans[:number]):
            continue
        behind = spans[number + 1 :]
        if behind and wall > max(span.first.wall, span.last.wall) and holes(spans)[number + 1]:
            raise ValueError(f"{text_of(wall)} is in a hole of the history: {_neighbours(span.last, behind[0].first)}")
        return number
    raise ValueError(f"{text_of(wall)} is outside of the history: {window(spans)}")


def _is_covered(span: Span, before: Sequence[Span]) -> bool:
    """Return whether an older generation has later records, and this one has no records at all.

    A crash between the two renames of a checkpoint leaves such a generation: its snapshot was never followed by a journal.
    """
    first, last = span.first.revision, span.last.revision
    return first == last and any(one.first.revision <= first and last < one.last.revision for one in before)


def window(spans: Sequence[Span]) -> str:
    """Return the first and the last moment of a history, for a message."""
    oldest, newest = min(span.first for span in spans), max(span.last for span in spans)
    return f"the history has the revisions {described(oldest)} to {described(newest)}"


def _neighbours(before: Moment, after: Moment) -> str:
    return f"revision {described(before)} is the last one before it, and revision {described(after)} the first one after it"


def described(moment: Moment) -> str:
    """Return a revision with its time, for a message."""
    return f"{moment.revision} ({text_of(moment.wall)})" if moment.wall else str(moment.revision)


def text_of(wall: int) -> str:
    """Return a time in milliseconds since 1970 as ISO 8601 in UTC, or as a number if the calendar does not have this time."""
    try:
        return datetime.fromtimestamp(wall / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return f"the time {wall} ms"
