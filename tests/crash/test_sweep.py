"""Every prefix and every single-bit flip of a real journal and a real snapshot: the right state, or a refusal."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from lab_state import Config, CorruptionError, FileStorage, Manager, StorageError, UnsupportedError
from lab_state import _journal as journal
from lab_state._codec import Snapshot, decode_snapshot, replay
from lab_state.storage import _fs
from lab_state.storage.file import _open

NAME = "lab"
SNAPSHOT, JOURNAL = f"{NAME}.json", f"{NAME}.journal"
REFUSED = -1
"""In place of a revision: the start must fail."""


class Broken:
    """The module `os` as `_fs` sees it; calls that are in `calls`, as function and end of the path, fail."""

    def __init__(self) -> None:
        self.calls: set[tuple[str, str]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self._check("open", str(path))
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
    monkeypatch.setattr(_fs, "os", module)
    return module


def manager(directory: Path) -> Manager:
    return Manager(Config(name=NAME, flush_interval=None), FileStorage(directory))


class Author:
    """Writes a state, one flushed change after the other, and keeps its history."""

    def __init__(self, directory: Path) -> None:
        self.state = manager(directory)
        self.directory = directory
        self.history: dict[int, dict[str, Any]] = {0: {}}

    async def write(self, *, expect_failure: bool = False) -> None:
        """One change; a new kind each."""
        number = self.state.revision
        if number == 1:
            await self.state.delete_all()
        elif number == 4:
            await self.state.delete("key-3")
        else:
            await self.state.set_many({f"key-{number}": {"n": [number, "ü"]}, "last": number})
        self.history[self.state.revision] = await self.state.get_all()
        if expect_failure:
            with pytest.raises(StorageError):
                await self.state.flush()
        else:
            await self.state.flush()


@pytest.fixture
async def checkpointed(tmp_path: Path, broken: Broken) -> Case:
    """Killed between the rename of a snapshot and its journal: header, two records, frame C, two records."""
    author = Author(tmp_path / "source")
    async with author.state:
        await author.write()
    await author.state.start()
    await author.write()
    await author.write()
    broken.calls.add(("open", ".journal.tmp"))
    await author.state._core.running._checkpoint(wait=False)
    assert author.state.status().flush_failures == 1
    await author.write()
    await author.write()
    directory = shutil.copytree(author.directory, tmp_path / "checkpointed")
    broken.calls.clear()
    await author.state.stop()
    assert frames(directory) == "RRCRR"
    return Case(directory, author.history, [REFUSED, 3, REFUSED, REFUSED, 3, 4, 5])


@pytest.fixture
async def poisoned(tmp_path: Path, broken: Broken) -> Case:
    """Killed after a failed sync: header, frame F, two records, beside an older snapshot."""
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
    directory = shutil.copytree(author.directory, tmp_path / "poisoned")
    broken.calls.clear()
    await author.state.stop()
    assert frames(directory) == "FRR"
    return Case(directory, author.history, [REFUSED, REFUSED, 3, 4, 5])


@pytest.fixture
async def stopped(tmp_path: Path) -> Case:
    """Stopped cleanly: a snapshot and a journal with its header alone."""
    author = Author(tmp_path / "stopped")
    async with author.state:
        for _ in range(3):
            await author.write()
    assert frames(author.directory) == ""
    return Case(author.directory, author.history, [REFUSED, 3])


def frames(directory: Path) -> str:
    path = directory / JOURNAL
    return "".join(frame.kind.value for frame in journal.scan(path.read_bytes(), NAME, str(path)).frames)


def load(directory: Path) -> tuple[int, Any]:
    """What a start would find: revision and state, without threads and a loop."""
    path = str(directory / SNAPSHOT)
    writer, recovery = _open(directory, NAME)
    try:
        snapshot = Snapshot({}, 0) if recovery.snapshot is None else decode_snapshot(recovery.snapshot, path)
        entries, revision, *_ = replay(snapshot, recovery.records, path)
        return revision, msgspec.json.decode(msgspec.json.encode(entries))
    finally:
        writer.close()


async def start(directory: Path) -> tuple[int, Any]:
    """The same through a manager, which goes on to write, stop and start again."""
    async with manager(directory) as state:
        found = state.revision, await state.get_all()
        await state.set("more", 1)
        await state.flush()
    async with manager(directory) as state:
        assert await state.delete("more")
        assert await state.get_all() == found[1]
    return found


def outcome(call: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
    try:
        return call()
    except (CorruptionError, UnsupportedError):
        return REFUSED, None


Damaged = Iterator[tuple[bytes, set[int]]]


def sweep(case: Case, name: str, damaged: Damaged) -> int:
    """Look what becomes of each damaged version of a file; the second part says which revisions are right.

    Returns:
        How many of them there were.
    """
    path = case.directory / name
    other = case.directory / (SNAPSHOT if name == JOURNAL else JOURNAL)
    untouched = other.read_bytes() if other.exists() else None
    count = 0
    for count, (data, right) in enumerate(damaged, 1):
        path.write_bytes(data)
        revision, entries = outcome(lambda: load(case.directory))
        assert revision in right, f"case {count}: revision {revision}, not one of {right}"
        assert entries == case.history.get(revision)
        assert path.read_bytes() == data
        assert (other.read_bytes() if other.exists() else None) == untouched
        if count % 50 == 0:
            copy = shutil.copytree(case.directory, case.directory.with_name("copy"))
            assert outcome(lambda copy=copy: asyncio.run(start(copy))) == (revision, entries)  # type: ignore[misc]
            if revision == REFUSED:
                assert (copy / name).read_bytes() == data
            shutil.rmtree(copy)
    return count


def flips(data: bytes, start: int, end: int) -> Iterator[bytes]:
    """Every way to flip one bit of the bytes from `start` to `end`."""
    for position in range(start, end):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            yield bytes(damaged)


def lines_of(case: Case) -> list[bytes]:
    lines = (case.directory / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) == len(case.lines) - 1
    return lines


@pytest.fixture(params=["checkpointed", "poisoned"])
def journaled(request: pytest.FixtureRequest) -> Case:
    case: Case = request.getfixturevalue(request.param)
    return case


def test_every_prefix_of_a_journal(journaled: Case) -> None:
    """A journal cut anywhere stands for its whole frames, or is refused where these do not fit the snapshot."""
    lines = lines_of(journaled)
    data, ends = b"".join(lines), list(accumulate(map(len, lines)))
    right = [journaled.lines[sum(end <= length for end in ends)] for length in range(len(data) + 1)]
    assert (
        sweep(journaled, JOURNAL, ((data[:length], {right[length]}) for length in range(len(data) + 1)))
        == len(data) + 1
    )


def test_every_bit_of_a_journal(journaled: Case) -> None:
    """One flipped bit makes the last frame a torn tail, and every other journal damaged: never another state."""
    lines = lines_of(journaled)
    data, last = b"".join(lines), len(lines[-1])
    before = ((flipped, {REFUSED}) for flipped in flips(data, 0, len(data) - last))
    behind = ((flipped, {journaled.lines[-2]}) for flipped in flips(data, len(data) - last, len(data)))
    assert sweep(journaled, JOURNAL, before) == 8 * (len(data) - last)
    assert sweep(journaled, JOURNAL, behind) == 8 * last


def test_whole_frames_dropped_doubled_and_swapped(journaled: Case) -> None:
    """Frames lost, repeated or out of order are refused, or make no difference: the snapshot or a double holds them."""
    lines = lines_of(journaled)

    def damaged() -> Damaged:
        last = len(lines) - 1
        right = {journaled.lines[-1], REFUSED}
        for index in range(len(lines)):
            dropped = {journaled.lines[index]} if index == last else right
            yield b"".join(lines[:index] + lines[index + 1 :]), dropped
            yield b"".join(lines[: index + 1] + lines[index:]), right
            if index < last:
                yield b"".join([*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]]), right

    assert sweep(journaled, JOURNAL, damaged()) == 3 * len(lines) - 1


@pytest.mark.parametrize("alone", [False, True])
def test_every_prefix_and_every_bit_of_a_snapshot(stopped: Case, *, alone: bool) -> None:
    """A damaged snapshot is refused, with its journal beside it and without: never taken for another state."""
    data = (stopped.directory / SNAPSHOT).read_bytes()
    if alone:
        (stopped.directory / JOURNAL).unlink()
    assert sweep(stopped, SNAPSHOT, ((data[:length], {REFUSED}) for length in range(len(data)))) == len(data)
    assert sweep(stopped, SNAPSHOT, ((flipped, {REFUSED}) for flipped in flips(data, 0, len(data)))) == 8 * len(data)
    assert sweep(stopped, SNAPSHOT, iter([(data, {3})])) == 1


def test_every_bit_of_a_snapshot_with_records_behind_it(checkpointed: Case) -> None:
    """A snapshot with one flipped bit is not the one that the journal names, and is refused."""
    data = (checkpointed.directory / SNAPSHOT).read_bytes()
    assert sweep(checkpointed, SNAPSHOT, ((flipped, {REFUSED}) for flipped in flips(data, 0, len(data)))) == 8 * len(
        data
    )


def test_every_bit_of_a_snapshot_that_does_not_count(poisoned: Case) -> None:
    """Beside a journal that begins with the whole state, the snapshot may be damaged in any way."""
    data = (poisoned.directory / SNAPSHOT).read_bytes()
    assert sweep(poisoned, SNAPSHOT, ((flipped, {5}) for flipped in flips(data, 0, len(data)))) == 8 * len(data)
