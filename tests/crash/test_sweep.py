"""Every bit, every length, every block of a real journal and a real snapshot damaged: the right state, or a refusal.

The mass goes through the pure functions that a start is made of; of each kind of damage, some go through the files of
a real storage too, and some through a whole manager. All must say the same.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from running import flusher_of

from lab_state import (
    Config,
    CorruptionError,
    FileStorage,
    Manager,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from lab_state import _journal as journal
from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state._journal import NO_BASE, FrameKind
from lab_state.storage import _directory, _fs, _lookup
from lab_state.storage._file_start import open_writer
from lab_state.storage._leftovers import Leftovers
from lab_state.storage._new_journal import NewJournal

NAME = "lab"
SNAPSHOT, JOURNAL = f"{NAME}.json", f"{NAME}.journal"
REFUSED = -1
"""In place of a revision: the start must fail."""


TRIED: set[tuple[int, int]] = set()
"""The directories that were tried out: each one once, for all tests."""


class Broken:
    """The module `os` as `_fs` sees it. The calls in `calls`, named by function and end of the path, fail."""

    def __init__(self) -> None:
        self.calls: set[tuple[str, str]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self._check("open", path)
        return os.open(path, flags, mode)

    def fdatasync(self, fd: int) -> None:
        self._check("fdatasync", str(Path(f"/proc/self/fd/{fd}").readlink()))
        os.fdatasync(fd)

    def _check(self, function: str, path: str) -> None:
        plain = re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", path)
        if any(function == broken and plain.endswith(end) for broken, end in self.calls):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class Case(NamedTuple):
    """Files as a kill would leave them, and what they mean.

    Attributes:
        directory: Where they are.
        history: Every state that there ever was, by revision.
        lines: The revision that so many whole lines of the journal stand for.
    """

    directory: Path
    history: dict[int, dict[str, Any]]
    lines: list[int]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    module = Broken()
    for used in (_fs, _lookup, _directory):
        monkeypatch.setattr(used, "os", module)
    return module


def manager(directory: Path) -> Manager:
    return Manager(Config(name=NAME, flush_interval=None), FileStorage(directory))


async def everything(state: Manager) -> dict[str, Any]:
    """Return each key with its value, and whether it expires."""
    return {key: [value, await state.expires_in(key) is not None] for key, value in (await state.get_all()).items()}


class Author:
    """Writes a state, one flushed change after the other, and keeps its history."""

    def __init__(self, directory: Path) -> None:
        self.state = manager(directory)
        self.directory = directory
        self.history: dict[int, dict[str, Any]] = {0: {}}

    async def write(self, *, expect_failure: bool = False) -> None:
        """Make one change; each is of a new kind."""
        number = self.state.revision
        if number == 1:
            await self.state.delete_all()
        elif number == 4:
            await self.state.delete("key-3")
        else:
            value = {"n": [number, "ü"], "text": "0123456789abcdef" * 4}
            async with self.state.transaction() as tx:
                tx.set(f"key-{number}", value)
                tx.set("last", number, ttl=3600)
        self.history[self.state.revision] = await everything(self.state)
        if expect_failure:
            with pytest.raises(StorageError):
                await self.state.flush()
        else:
            await self.state.flush()


def no_room(self: NewJournal, records: list[bytes]) -> None:
    raise UnavailableError("no room for the end of a new journal")


def killed(author: Author, copy: Path) -> Path:
    """Return what its process would leave if it was killed now."""
    # Temporary files come and go in its threads, and no start reads them.
    return shutil.copytree(author.directory, copy, ignore=shutil.ignore_patterns("*.tmp"))


@pytest.fixture
async def checkpointed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return a state killed between the rename of a snapshot and its journal: header, two records, frame C, two records."""
    author = Author(tmp_path / "source")
    async with author.state:
        await author.write()
    await author.state.start()
    await author.write()
    await author.write()
    monkeypatch.setattr(NewJournal, "add", no_room)
    await flusher_of(author.state).checkpoints.write(wait=False)
    assert author.state.status().flush_failures == 1
    await author.write()
    await author.write()
    directory = killed(author, tmp_path / "checkpointed")
    monkeypatch.undo()
    await author.state.stop()
    assert frames(directory) == "RRCRR"
    return Case(directory, author.history, [REFUSED, 3, REFUSED, REFUSED, 3, 4, 5])


@pytest.fixture
async def poisoned(tmp_path: Path, broken: Broken) -> Case:
    """Return a state killed after a failed sync: header, frame F, two records, beside an older snapshot."""
    author = Author(tmp_path / "source")
    async with author.state:
        await author.write()
    await author.state.start()
    await author.write()
    broken.calls |= {("fdatasync", ".journal"), ("open", ".json.tmp")}
    await author.write(expect_failure=True)
    broken.calls.discard(("fdatasync", ".journal"))
    await author.state.flush()
    await author.write()
    await author.write()
    directory = killed(author, tmp_path / "poisoned")
    broken.calls.clear()
    await author.state.stop()
    assert frames(directory) == "FRR"
    return Case(directory, author.history, [REFUSED, REFUSED, 3, 4, 5])


@pytest.fixture
async def stopped(tmp_path: Path) -> Case:
    """Return a state stopped cleanly: a snapshot and a journal with its header alone."""
    author = Author(tmp_path / "stopped")
    async with author.state:
        for _ in range(6):
            await author.write()
    assert frames(author.directory) == ""
    return Case(author.directory, author.history, [REFUSED, 6])


def frames(directory: Path) -> str:
    path = directory / JOURNAL
    return "".join(frame.kind.value for frame in journal.scan(path.read_bytes(), NAME, str(path)).frames)


Outcome = tuple[int, Any]


def state_of(snapshot: bytes | None, records: tuple[bytes, ...], crc: int | None = None) -> Outcome:
    begin = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, SNAPSHOT, crc)
    entries, revision, expires, *_ = replay(begin, records, SNAPSHOT)
    values = msgspec.json.decode(msgspec.json.encode(entries))
    return revision, {key: [value, key in expires] for key, value in values.items()}


def read(snapshot: bytes | None, data: bytes | None) -> Outcome:
    """Return what a start would find in these bytes: revision and state."""
    base = NO_BASE if snapshot is None else journal.base_of(len(snapshot), zlib.crc32(snapshot))
    scan = None if data is None else journal.scan(data, NAME, JOURNAL)
    full, records, _ = journal.accept(scan, len(data or b""), base, JOURNAL)
    return state_of(snapshot if full is None else full, records)


def load(directory: Path) -> Outcome:
    """Return the same from the files, without threads and a loop."""
    writer, recovery = open_writer(str(directory), NAME, TRIED, Leftovers())
    try:
        return state_of(recovery.snapshot, recovery.records, recovery.crc32)
    finally:
        writer.close()


async def start(directory: Path) -> Outcome:
    """Return the same through a manager, which goes on to write, stop and start again."""
    async with manager(directory) as state:
        found = state.revision, await everything(state)
        await state.set("more", 1)
        await state.flush()
    async with manager(directory) as state:
        assert await state.delete("more")
        assert await everything(state) == found[1]
    return found


def outcome(call: Callable[[], Outcome]) -> Outcome:
    try:
        return call()
    except (CorruptionError, UnsupportedError):
        return REFUSED, None


class Damage(NamedTuple):
    """Bytes that are not what they were from `start` to `end`, in the places of the whole ones."""

    data: bytes
    start: int
    end: int


def flips(data: bytes) -> Iterator[Damage]:
    """Yield every way to flip one bit."""
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            yield Damage(bytes(damaged), position, position + 1)


def cuts(data: bytes) -> Iterator[Damage]:
    """Return every shorter length."""
    return (Damage(data[:length], length, len(data)) for length in range(len(data)))


def blocks(data: bytes, size: int, instead: bytes = b"\0") -> Iterator[Damage]:
    """Yield a block of zeros, or of nothing, at every offset."""
    for start in range(len(data)):
        end = min(start + size, len(data))
        yield Damage(data[:start] + instead * (end - start) + data[end:], start, end)


def every_damage(data: bytes) -> Iterator[Damage]:
    return chain(flips(data), cuts(data), blocks(data, 64), blocks(data, 512))


def count_of(data: bytes) -> int:
    """Return how many `every_damage` makes."""
    return (8 + 1 + 1 + 1) * len(data)


ON_DISK, MANAGED = 97, 1009
"""Every so manieth case goes through the files, and through a manager."""


def sweep(case: Case, name: str, damaged: Iterator[tuple[bytes, set[int]]]) -> int:
    """Check each damaged version of a file. The second part of each item says which revisions are right."""
    path = case.directory / name
    other = case.directory / (SNAPSHOT if name == JOURNAL else JOURNAL)
    beside = other.read_bytes() if other.exists() else None
    count = 0
    for count, (data, right) in enumerate(damaged, 1):
        files = (beside, data) if name == JOURNAL else (data, beside)
        found = outcome(lambda files=files: read(*files))  # type: ignore[misc]
        revision, entries = found
        assert revision in right, f"case {count}: revision {revision}, not one of {right}: {data!r}"
        assert entries == case.history.get(revision)
        if count % ON_DISK == 1:
            path.write_bytes(data)
            assert outcome(lambda: load(case.directory)) == found
            assert path.read_bytes() == data
            assert (other.read_bytes() if other.exists() else None) == beside
        if count % MANAGED == 1:
            copy = shutil.copytree(case.directory, case.directory.with_name("copy"))
            (copy / name).write_bytes(data)
            assert outcome(lambda copy=copy: asyncio.run(start(copy))) == found  # type: ignore[misc]
            if revision == REFUSED:
                assert (copy / name).read_bytes() == data
            shutil.rmtree(copy)
    return count


def lines_of(case: Case) -> list[bytes]:
    lines = (case.directory / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) == len(case.lines) - 1
    return lines


@pytest.fixture(params=["checkpointed", "poisoned"])
def journaled(request: pytest.FixtureRequest) -> Case:
    case: Case = request.getfixturevalue(request.param)
    return case


def test_every_bit_length_and_block_of_a_journal(journaled: Case) -> None:
    """Damage that reaches the end leaves the frames before it, as a torn tail would; any other is refused."""
    lines = lines_of(journaled)
    data, ends = b"".join(lines), list(accumulate(map(len, lines)))

    def right(damage: Damage) -> int:
        whole = bisect_right(ends, damage.start)
        behind = len(data) if damage.end == len(data) else ends[bisect_right(ends, damage.end - 1)]
        return journaled.lines[whole] if behind == len(data) else REFUSED

    judged = ((damage.data, {right(damage)}) for damage in every_damage(data))
    assert sweep(journaled, JOURNAL, judged) == count_of(data) > 8_000
    assert sweep(journaled, JOURNAL, iter([(data, {journaled.lines[-1]})])) == 1


def test_bytes_that_were_never_written_behind_a_journal(journaled: Case) -> None:
    """What a crash leaves behind the last frame, zeros or an older file's, is a torn tail: no frame is lost for it."""
    lines = lines_of(journaled)
    data = b"".join(lines)
    stale = b"".join(journal.frame("another salt", FrameKind.RECORD, b'{"from":5,"to":6}') for _ in range(20))
    behind = ((data + tail[:size], {journaled.lines[-1]}) for tail in (bytes(600), stale) for size in range(600))
    assert sweep(journaled, JOURNAL, behind) == 1_200


def test_bytes_lost_and_bytes_put_in(journaled: Case) -> None:
    """Missing or additional bytes leave whole frames, or are refused. No data are invented."""
    lines = lines_of(journaled)
    data, ends = b"".join(lines), list(accumulate(map(len, lines)))

    def damaged() -> Iterator[tuple[bytes, set[int]]]:
        for size in (1, 64, 512):
            for damage in blocks(data, size, instead=b""):
                whole = journaled.lines[bisect_right(ends, damage.start)]
                aligned = damage.start in ends and damage.end in ends
                reached = damage.end > ends[-2]
                yield damage.data, {REFUSED, *([journaled.lines[-1]] if aligned else []), *([whole] if reached else [])}
        for position in range(len(data)):
            torn = {journaled.lines[-2]} if position > ends[-2] else {REFUSED}
            yield data[:position] + b"\xff" + data[position:], torn

    assert sweep(journaled, JOURNAL, damaged()) == 4 * len(data)


def test_whole_frames_dropped_doubled_and_swapped(journaled: Case) -> None:
    """Lost, repeated or swapped frames are refused, or have no effect because the snapshot or a double holds them."""
    lines = lines_of(journaled)
    number = len(lines)

    def damaged() -> Iterator[tuple[bytes, set[int]]]:
        right = {journaled.lines[-1], REFUSED}
        for index in range(number):
            dropped = {journaled.lines[index]} if index == number - 1 else right
            yield b"".join(lines[:index] + lines[index + 1 :]), dropped
            for place in range(number + 1):
                yield b"".join([*lines[:place], lines[index], *lines[place:]]), right
            for other in range(index):
                swapped = list(lines)
                swapped[index], swapped[other] = swapped[other], swapped[index]
                yield b"".join(swapped), right

    assert sweep(journaled, JOURNAL, damaged()) == number + number * (number + 1) + number * (number - 1) // 2


@pytest.mark.parametrize("alone", [False, True])
def test_every_bit_length_and_block_of_a_snapshot(stopped: Case, *, alone: bool) -> None:
    """A damaged snapshot is refused, with its journal and without. It is never taken for another state."""
    data = (stopped.directory / SNAPSHOT).read_bytes()
    if alone:
        (stopped.directory / JOURNAL).unlink()
    refused = ((damage.data, {REFUSED}) for damage in every_damage(data))
    assert sweep(stopped, SNAPSHOT, refused) == count_of(data) > 3_500
    kept = len(b',"crc32":"01234567"}}')  # what remains without it may be JSON of any program
    lost = [data[:start] + data[end:] for end in range(1, len(data) - kept + 1) for start in range(end)]
    assert sweep(stopped, SNAPSHOT, ((damaged, {REFUSED}) for damaged in lost)) == len(lost) > 50_000
    assert sweep(stopped, SNAPSHOT, ((data + bytes(size), {REFUSED}) for size in range(1, 600))) == 599
    assert sweep(stopped, SNAPSHOT, iter([(data, {6})])) == 1


def test_every_damage_of_a_snapshot_with_records_behind_it(checkpointed: Case) -> None:
    """A damaged snapshot is not the one that the journal names, and is refused."""
    data = (checkpointed.directory / SNAPSHOT).read_bytes()
    refused = ((damage.data, {REFUSED}) for damage in every_damage(data))
    assert sweep(checkpointed, SNAPSHOT, refused) == count_of(data) > 2_000


def test_every_damage_of_a_snapshot_that_does_not_count(poisoned: Case) -> None:
    """If the journal starts with the whole state, the snapshot may be damaged in any way."""
    data = (poisoned.directory / SNAPSHOT).read_bytes()
    assert sweep(poisoned, SNAPSHOT, ((damage.data, {5}) for damage in every_damage(data))) == count_of(data)
