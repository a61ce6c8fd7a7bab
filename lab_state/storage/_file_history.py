"""List and read the generations of a state on disk, while a writer may have it open. The calls block.

No file is created, changed or locked, as in `_file_reader`. A list usually needs only the first and the last bytes of each
file. The name of a file has the first revision of its generation. The last record of the journal has the last revision.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Generator, Iterator
from typing import NamedTuple

from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, SNAPSHOT_END_BYTES, FrameKind
from lab_state.exceptions import CorruptionError, StorageError, UnsupportedError
from lab_state.storage import _directory as folder
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._file_reader import is_held, read_files
from lab_state.storage._fs_read import OpenFile, open_to_read, status_of
from lab_state.storage._generations import (
    Moment,
    Span,
    StoredGeneration,
    format_name,
    grouped,
    lives,
    moment_of_record,
    moment_of_snapshot,
    parse_name,
)
from lab_state.storage._history import FoundGeneration, GoneError, Listing
from lab_state.storage._protocol import Reading
from lab_state.storage._reading import judge

_FIRST_READ = 4096
"""The number of bytes that are read first at the start and at the end of a file. It is larger than any header."""
_GROWTH = 16

_MOST_LISTS = 5
"""The largest number of attempts to list the generations. An attempt is repeated if the writer made a checkpoint meanwhile."""


class FileKey(NamedTuple):
    """The files of a generation in a history: the base of the snapshot, its name, and the name of the journal."""

    base: str
    snapshot: str | None
    journal: str | None


def list_generations(given_up: threading.Event, directory: str, name: str) -> Listing:
    """Return the generations of a state; see `History.generations`. For `given_up`, see `read_files`.

    Raises:
        StorageError: See `History.generations`.
    """
    paths = Paths.of(folder.absolute(directory), name)
    found: list[FoundGeneration] = []
    errors: list[UnsupportedError] = []
    for _ in range(_MOST_LISTS):
        in_use, found, errors = _listed(paths, name, given_up)
        found = _in_order(found, None if in_use is None else in_use.span.first.revision)
        if in_use is None:
            break
        # The generation in use may be linked already. A generation with the same first moment is the same one.
        same = [one for one in found if one.span.first == in_use.span.first]
        reached = max([in_use, *same], key=lambda one: one.span.last.revision)
        if in_use.size or not found:
            found = [*(one for one in found if one not in same), in_use._replace(span=reached.span)]
        if reached is in_use:
            break
        # The writer has made a checkpoint since the files in use were read. So the history may have later generations by now.
    unreadable = next((error for error in errors if not error.is_missing), None)
    if errors and not found:
        raise unreadable or errors[0]
    return Listing(found, unreadable)


def _listed(
    paths: Paths, name: str, given_up: threading.Event
) -> tuple[FoundGeneration | None, list[FoundGeneration], list[UnsupportedError]]:
    """Return the generation in use, those of the history, and the errors of the generations that are missing or cannot be read.

    The files in use come first: a generation that a checkpoint moves meanwhile is then found twice, and never missed.
    """
    in_use: FoundGeneration | None = None
    errors: list[UnsupportedError] = []
    try:
        with (
            contextlib.suppress(CorruptionError),  # a call that needs this generation raises the error
            _opened(paths.journal) as found_journal,
            _opened(paths.snapshot) as found_snapshot,
        ):
            in_use = _in_use(paths, name, found_journal, found_snapshot, given_up)
    except UnsupportedError as error:
        errors.append(error)
    return in_use, _kept(paths, name, errors), errors


def read_generation(given_up: threading.Event, directory: str, name: str, generation: FoundGeneration) -> Reading:
    """Read one generation; see `History.read`. For `given_up`, see `read_files`.

    Raises:
        StorageError: See `History.read`.
    """
    if generation.in_use:
        return read_files(directory, name, given_up)
    key = generation.key
    assert isinstance(key, FileKey)  # `_kept` has made it
    paths = Paths.of(folder.absolute(directory), name)
    snapshot = None if key.snapshot is None else _read(paths, key.snapshot)
    data = None if key.journal is None else _read(paths, key.journal)
    crc = None if snapshot is None else zlib.crc32(snapshot)
    base = NO_BASE if snapshot is None or crc is None else journal.base_of(len(snapshot), crc)
    if key.snapshot is not None and base != key.base:
        raise CorruptionError(
            os.path.join(paths.history, key.snapshot),
            0,
            "its contents do not match its name; use another generation",
        )
    path = os.path.join(paths.history, key.journal or key.snapshot or "")
    accepted, error, _, _ = judge(data, base, name, path)
    if accepted is None:
        assert error is not None  # see `Judgement`
        raise error
    if accepted.full is not None:
        snapshot, crc = accepted.full, None
    return Reading(snapshot, accepted.records, len(accepted.records), is_held(paths.lock), path, crc)


def _read(paths: Paths, file: str) -> bytes:
    with _opened(os.path.join(paths.history, file)) as found:
        if found is None:
            raise GoneError(f"{os.path.join(paths.history, file)} was pruned; list the generations again")
        return found.read()


@contextlib.contextmanager
def _opened(path: str) -> Generator[OpenFile | None]:
    file = open_to_read(path)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


# The generation in use


def _in_use(
    paths: Paths,
    name: str,
    found_journal: OpenFile | None,
    found_snapshot: OpenFile | None,
    given_up: threading.Event,
) -> FoundGeneration:
    """Return the generation in use.

    Raises:
        CorruptionError: Its files are damaged.
        UnsupportedError: There is no state of this name. Or its files cannot be read.
        UnavailableError: The files changed faster than they could be read.
    """
    span = None
    size = sum(file.status.st_size for file in (found_journal, found_snapshot) if file is not None)
    if found_journal is not None:
        span = _span_by_ends(name, found_journal, found_snapshot)
    if span is None:
        # The files do not belong together, or one is edited or missing. So all of them are read, as at a start.
        reading = read_files(paths.directory, name, given_up)
        _check_end(reading)
        first = moment_of_snapshot(reading.snapshot or b"") or Moment(0, _modified(found_snapshot))
        records = [moment for moment in map(moment_of_record, reading.records[-1:]) if moment is not None]
        span = Span(first, max([first, *records], key=lambda moment: moment.revision))
        size = size or len(reading.snapshot or b"")
    return FoundGeneration(span, size, in_use=True, key=None)


def _check_end(reading: Reading) -> None:
    """Check the checksum of a snapshot, if it has one.

    Raises:
        CorruptionError: The checksum is wrong.
    """
    snapshot, crc = reading.snapshot or b"", reading.crc32
    claimed = journal.base_at_end(len(snapshot), snapshot[-SNAPSHOT_END_BYTES:])
    if claimed is not None and crc is not None and claimed != journal.base_of(len(snapshot), crc):
        raise CorruptionError(reading.path, 0, "its checksum does not match its contents; restore a copy")


def _span_by_ends(name: str, found_journal: OpenFile, found_snapshot: OpenFile | None) -> Span | None:
    """Return the moments of a journal and its snapshot, from the ends of both files. Return `None` if the files may not belong together."""
    start = found_journal.read(_FIRST_READ)
    try:
        head = journal.read_header(start, name, found_journal.path)
    except StorageError:
        return None
    if head.base == ANY_BASE:
        first = _first_of_full(name, found_journal)
    elif head.base == NO_BASE:
        first = Moment(0, head.wall) if found_snapshot is None else None
    else:
        first = None if found_snapshot is None else _first_of_snapshot(found_snapshot, head.base)
    return None if first is None else Span(first, _last(found_journal, start, head.salt, first))


def _first_of_full(name: str, file: OpenFile) -> Moment | None:
    """Return the moment of the whole state with which a journal begins."""
    _, frame = journal.read_start(file.read(_FIRST_READ), name, file.path)
    if frame is None or frame.kind != FrameKind.FULL:
        return None
    return _moment_at_end(file, frame.start, frame.end)


def _first_of_snapshot(file: OpenFile, base: str) -> Moment | None:
    size = file.status.st_size
    end = file.read(SNAPSHOT_END_BYTES, max(0, size - SNAPSHOT_END_BYTES))
    return _moment_at_end(file, 0, size) if journal.base_at_end(size, end) == base else None


def _moment_at_end(file: OpenFile, start: int, end: int) -> Moment | None:
    """Return the moment of a snapshot that is a part of a file. Read its end, and more only if the reserved member is longer."""
    for most in _sizes(end - start):
        if (found := moment_of_snapshot(file.read(most, end - most))) is not None:
            return found
    return None


def _last(file: OpenFile, start: bytes, salt: str, first: Moment) -> Moment:
    """Return the moment of the last record of a journal; `first` if it has none. Read its end, and more only if the record is longer.

    `start` has the first bytes of the journal. Often these are the whole journal, and nothing has to be read.
    """
    size = file.status.st_size
    for most in _sizes(size):
        frame = journal.last_content(start if size <= len(start) else file.read(most, size - most), salt)
        if frame is not None:
            found = None if frame.kind is FrameKind.FULL else moment_of_record(frame.payload)
            return first if found is None or found.revision < first.revision else found
    return first


def _sizes(whole: int) -> Iterator[int]:
    """Yield growing numbers of bytes to read, up to all of them."""
    most = _FIRST_READ
    while most < whole:
        yield most
        most *= _GROWTH
    yield whole


def _modified(file: OpenFile | None) -> int:
    """Return the time of the last change of a file, in milliseconds since 1970; 0 without a file."""
    return 0 if file is None else file.status.st_mtime_ns // 1_000_000


# The history


def _in_order(found: list[FoundGeneration], newest: int | None) -> list[FoundGeneration]:
    """Return the generations of a history, the oldest first. For `newest`, see `lives`."""
    life = lives([one.span.first for one in found], newest)
    return sorted(found, key=lambda one: (life(one.span.first), one.span.first, one.span.last))


def _kept(paths: Paths, name: str, errors: list[UnsupportedError]) -> list[FoundGeneration]:
    """Return the generations in the directory of the history. Add the error of each generation that cannot be read to `errors`."""
    try:
        names = lookup.names_in(paths.history)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return []
        raise
    found: list[FoundGeneration] = []
    for one in grouped(file for file in map(parse_name, names) if file is not None).generations:
        try:
            if (generation := _found(paths, name, one)) is not None:
                found.append(generation)
        except UnsupportedError as error:
            errors.append(error)
    return found


def _found(paths: Paths, name: str, generation: StoredGeneration) -> FoundGeneration | None:
    """Return one generation with its last moment. Return `None` if it was pruned, or if no file of it can be used.

    Raises:
        UnsupportedError: A newer version of lab_state wrote a journal of it. Or a permission is missing.
        StorageError: A file cannot be looked up or read.
    """
    first, size = Moment(generation.first, generation.wall), 0
    snapshot = None if generation.snapshot is None else format_name(generation.snapshot)
    if snapshot is not None:
        status = status_of(f"{paths.history}/{snapshot}")
        if status is None:
            return None
        size = status.st_size
        if not first.wall:
            first = first._replace(wall=status.st_mtime_ns // 1_000_000)
    span, longest = Span(first, first), None
    for file in map(format_name, generation.journals):
        with _opened(f"{paths.history}/{file}") as found:
            if found is None:
                return None  # the generation is being pruned, and its snapshot is deleted next
            size += found.status.st_size
            ends = _span_of(name, found, first)
            if ends is not None and (longest is None or ends.last.revision >= span.last.revision):
                span, longest = ends, file
    if snapshot is None and longest is None:
        return None
    key = FileKey(generation.files[0].base, snapshot, longest)
    return FoundGeneration(span, size, in_use=False, key=key)


def _span_of(name: str, file: OpenFile, first: Moment) -> Span | None:
    """Return the moments of a journal in a history. Return `None` if its header is damaged.

    The first moment is that of the whole state, if the journal has it. Otherwise it is `first`. The file name of such a journal has
    another time, that of the header.
    """
    start = file.read(_FIRST_READ)
    try:
        head = journal.read_header(start, name, file.path)
    except CorruptionError:
        return None
    if head.base == ANY_BASE:
        first = _first_of_full(name, file) or first
    return Span(first, _last(file, start, head.salt, first))
