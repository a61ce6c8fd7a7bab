"""What a crash may leave on a disk: operations in, states out. Pure.

The model is weaker than any file system in use, so what survives it survives them:

* An unsynced write is cut in chunks of 64 bytes. Each is kept, lost, torn in half, zeroed
  (the file grew, the data did not come) or stale (what an older file had in these blocks
  shows through), whatever becomes of the others. An unsynced truncation is kept or lost.
* An unsynced name (made, renamed, removed) is kept or lost, whatever becomes of the
  others. A rename is atomic. A directory that is lost takes with it what is in it.
* The sync of a file forces its data and its size, not its name; that of a directory the
  names in it.
* A failed sync dooms what was pending: no later sync forces it, since the
  kernel marks the pages clean (Rebello et al., USENIX ATC 2020).

The idea is that of ALICE (Pillai et al., OSDI 2014).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from pathlib import PurePosixPath
from typing import NamedTuple, TypeAlias

CHUNK = 64
_MOST_NAMINGS = 64
_LEAST_EACH = 8
_SMALL = 4096

State: TypeAlias = dict[str, bytes | None]
"""Paths with what is there: the bytes of a file, or `None` for a directory."""


class Create(NamedTuple):
    """A name for a new file or directory."""

    path: str
    inode: int
    is_directory: bool = False


class Write(NamedTuple):
    inode: int
    offset: int
    data: bytes


class Truncate(NamedTuple):
    inode: int
    size: int


class Rename(NamedTuple):
    source: str
    target: str
    inode: int


class Link(NamedTuple):
    """A second name for a file."""

    path: str
    inode: int


class Unlink(NamedTuple):
    path: str


class Sync(NamedTuple):
    """A sync of a file; `ok` says what the call returned."""

    inode: int
    ok: bool


class SyncDirectory(NamedTuple):
    path: str
    ok: bool


class Try(NamedTuple):
    """A mark without an operation: from here on, this version may be on the disk."""

    version: int


class Ack(NamedTuple):
    """A mark without an operation: from here on, this version, or a later one numbered `first` or above, must be there."""

    version: int
    first: int


class Withdraw(NamedTuple):
    """A mark without an operation: earlier promises no longer hold, because the user is about to change files."""


class Kept(NamedTuple):
    """A mark without an operation: this version was acknowledged while this generation was in use. So the history keeps it.

    Attributes:
        version: The number of the version.
        generation: The name of the generation.
        wall: The time of the wall clock, in milliseconds.
    """

    version: int
    generation: str
    wall: int


class LetGo(NamedTuple):
    """A mark without an operation: this generation could not be linked into the history."""

    generation: str


class Pruned(NamedTuple):
    """A mark without an operation: these generations are pruned. The next one has copies of some of their records.

    Attributes:
        generations: The names of the generations.
        heir: The name of the next one.
        revision: The first revision of the next one.
        window: The first and the last moment at which the history must still show the state, in milliseconds; `None` if
            the generations are also too large.
    """

    generations: frozenset[str]
    heir: str
    revision: int
    window: tuple[int, int] | None


class Unsure(NamedTuple):
    """A mark without an operation: a sync of the history has failed, so a journal that was deleted may come back without its snapshot."""


class Wrong(NamedTuple):
    """A mark without an operation: something has happened that no rule allows."""

    text: str


HistoryMark: TypeAlias = Kept | LetGo | Pruned | Unsure | Wrong
Operation: TypeAlias = Create | Write | Truncate | Rename | Link | Unlink | Sync | SyncDirectory
Mark: TypeAlias = Try | Ack | Withdraw | HistoryMark
Entry: TypeAlias = Operation | Mark


class Fate(Enum):
    """What became of a change so far."""

    PENDING = "pending"
    SURE = "sure"
    DOOMED = "doomed"


class Outcome(IntEnum):
    """The effect of a crash on a change that is not durable."""

    KEPT = 0
    LOST = 1
    TORN = 2
    ZEROED = 3
    STALE = 4


_OF_A_WRITE = tuple(Outcome)
_OF_ANYTHING_ELSE = (Outcome.KEPT, Outcome.LOST)


class _Change:
    """One chunk of a write, or a truncation where `data` is `None`."""

    __slots__ = ("data", "fate", "offset", "stale")

    def __init__(self, offset: int, data: bytes | None, stale: bytes) -> None:
        self.offset = offset
        self.data = data
        self.stale = stale
        self.fate = Fate.PENDING

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return _OF_ANYTHING_ELSE if self.data is None else _OF_A_WRITE

    def put(self, buffer: bytearray, outcome: Outcome) -> None:
        offset, data = self.offset, self.data
        if data is None:
            del buffer[offset:]
            buffer.extend(bytes(offset - len(buffer)))
            return
        if outcome is Outcome.ZEROED:
            data = bytes(len(data))
        elif outcome is Outcome.STALE:
            data = self.stale
        elif outcome is Outcome.TORN:
            data = data[: max(1, len(data) // 2)]
        if len(buffer) < offset:
            buffer.extend(bytes(offset - len(buffer)))
        buffer[offset : offset + len(data)] = data


class _File:
    """One inode: what is on the disk for sure, and the changes since, in order."""

    def __init__(self, base: bytes, older: bytes) -> None:
        self._base = base
        self._older = older
        self._changes: list[_Change] = []

    def write(self, offset: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            start = offset + position
            part = data[position : position + CHUNK - start % CHUNK]
            stale = self._older[start : start + len(part)]
            self._changes.append(_Change(start, part, stale + b"y" * (len(part) - len(stale))))
            position += len(part)

    def truncate(self, size: int) -> None:
        self._changes.append(_Change(size, None, b""))

    def sync(self, *, ok: bool) -> None:
        for change in self._changes:
            if change.fate is Fate.PENDING:
                change.fate = Fate.SURE if ok else Fate.DOOMED
        sure = list(itertools.takewhile(lambda change: change.fate is Fate.SURE, self._changes))
        if sure:
            buffer = bytearray(self._base)
            for change in sure:
                change.put(buffer, Outcome.KEPT)
            self._base = bytes(buffer)
            del self._changes[: len(sure)]

    def open_changes(self) -> list[_Change]:
        """Return the changes that a crash may undo."""
        return [change for change in self._changes if change.fate is not Fate.SURE]

    def content(self, outcomes: Iterable[Outcome] | None = None) -> bytes:
        """Return the content for an outcome of each open change; all of them are kept if not given."""
        if not self._changes:
            return self._base
        buffer = bytearray(self._base)
        given = itertools.repeat(Outcome.KEPT) if outcomes is None else iter(outcomes)
        for change in self._changes:
            outcome = Outcome.KEPT if change.fate is Fate.SURE else next(given)
            if outcome is not Outcome.LOST:
                change.put(buffer, outcome)
        return bytes(buffer)


class _Naming:
    """One change of the names in a directory."""

    __slots__ = ("change", "directory", "fate")

    def __init__(self, change: Create | Rename | Link | Unlink) -> None:
        self.change = change
        path = change.target if isinstance(change, Rename) else change.path
        self.directory = _parent(path)
        self.fate = Fate.PENDING

    def put(self, names: dict[str, int]) -> None:
        match self.change:
            case Create(path, inode) | Link(path, inode):
                names[path] = inode
            case Rename(source, target, inode):
                names.pop(source, None)
                names[target] = inode
            case Unlink(path):
                names.pop(path, None)


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


def inodes_of(state: Mapping[str, bytes | None]) -> dict[str, int]:
    """Return an inode for each path. A file in a history is a second name of the file in use that has the same bytes.

    No two snapshots and no two journals have the same bytes.
    """
    inodes = {path: inode for inode, path in enumerate(state)}
    first = {data: path for path, data in state.items() if data and not is_kept(path)}
    return {
        path: inodes[first[data]] if is_kept(path) and (data := state[path]) in first else inodes[path]
        for path in state
    }


def is_kept(path: str) -> bool:
    """Return whether a file is in the history of a state."""
    return _parent(path).endswith(".history")


class Disk:
    """A disk on which operations go on, until it is asked what a crash would leave now."""

    def __init__(self, state: Mapping[str, bytes | None]) -> None:
        """Begin with a state that is on the disk for sure. For the inodes, see `inodes_of`."""
        self._names = inodes_of(state)
        self._directories = {self._names[path] for path, data in state.items() if data is None}
        self._files = {self._names[path]: _File(data, b"") for path, data in state.items() if data is not None}
        self._namings: list[_Naming] = []
        self._latest: dict[str, int] = {}

    def apply(self, operation: Operation) -> None:
        match operation:
            case Create(path, inode, is_directory):
                self._create(path, inode, is_directory=is_directory)
            case Write(inode, offset, data):
                self._files[inode].write(offset, data)
            case Truncate(inode, size):
                self._files[inode].truncate(size)
            case Sync(inode, ok):
                self._files[inode].sync(ok=ok)
            case SyncDirectory(path, ok):
                self._sync_directory(path, ok=ok)
            case Rename() | Link() | Unlink():
                self._namings.append(_Naming(operation))

    def _create(self, path: str, inode: int, *, is_directory: bool) -> None:
        self._namings.append(_Naming(Create(path, inode)))
        if is_directory:
            self._directories.add(inode)
            return
        # What the new file's blocks had before: the newest file of its kind.
        kind = "".join(PurePosixPath(path).suffixes[:1])
        older = self._latest.get(kind)
        self._files[inode] = _File(b"", b"" if older is None else self._files[older].content())
        self._latest[kind] = inode

    def _sync_directory(self, path: str, *, ok: bool) -> None:
        for naming in self._namings:
            if naming.directory == path and naming.fate is Fate.PENDING:
                naming.fate = Fate.SURE if ok else Fate.DOOMED
        while self._namings and self._namings[0].fate is Fate.SURE:
            self._namings.pop(0).put(self._names)

    def states(self, limit: int, dice: random.Random) -> Iterator[State]:
        """Yield what a crash may leave now: every state if there are not many more than `limit`, else a choice.

        The choice has the corner cases first. A state may come more than once.
        """
        namings = list(self._all_names(dice))
        choices = sorted((_Contents(self._files, names) for names in namings), key=lambda contents: contents.number)
        left = limit
        for position, contents in enumerate(choices):
            share = max(left // (len(choices) - position), _LEAST_EACH)
            left -= min(share, contents.number)
            for files in contents.all() if contents.number <= share else contents.some(share, dice):
                yield {
                    path: None if inode in self._directories else files[inode] for path, inode in contents.names.items()
                }

    def _all_names(self, dice: random.Random) -> Iterator[dict[str, int]]:
        """Yield the distinct sets of names that a crash may leave."""
        open_ = sum(naming.fate is not Fate.SURE for naming in self._namings)
        combinations: Iterable[Sequence[Outcome]]
        if 2**open_ <= _MOST_NAMINGS:
            combinations = itertools.product(_OF_ANYTHING_ELSE, repeat=open_)
        else:
            combinations = _corners([_OF_ANYTHING_ELSE] * open_, _MOST_NAMINGS, dice)
        seen = set()
        for outcomes in combinations:
            names = dict(self._names)
            given = iter(outcomes)
            for naming in self._namings:
                if naming.fate is Fate.SURE or next(given) is Outcome.KEPT:
                    naming.put(names)
            names = {path: inode for path, inode in sorted(names.items()) if self._is_reached(path, names)}
            key = tuple(names.items())
            if key not in seen:
                seen.add(key)
                yield names

    def _is_reached(self, path: str, names: dict[str, int]) -> bool:
        parent = _parent(path)
        return parent == "." or (parent in names and self._is_reached(parent, names))


class _Contents:
    """What the files may hold under one set of names.

    Attributes:
        names: The names.
        number: How many combinations there are.
    """

    def __init__(self, files: Mapping[int, _File], names: dict[str, int]) -> None:
        self.names = names
        self._files = {inode: files[inode] for inode in names.values() if inode in files}
        changes = {inode: file.open_changes() for inode, file in self._files.items()}
        self._widths = {inode: len(found) for inode, found in changes.items()}
        self._outcomes = [change.outcomes for found in changes.values() for change in found]
        self.number = math.prod(map(len, self._outcomes))
        self._built: dict[tuple[int, tuple[Outcome, ...]], bytes] = {}

    def all(self) -> Iterator[dict[int, bytes]]:
        return map(self._build, itertools.product(*self._outcomes))

    def some(self, limit: int, dice: random.Random) -> Iterator[dict[int, bytes]]:
        return map(self._build, _corners(self._outcomes, limit, dice))

    def _build(self, outcomes: Sequence[Outcome]) -> dict[int, bytes]:
        built, position, files = self._built, 0, {}
        for inode, width in self._widths.items():
            key = inode, tuple(outcomes[position : position + width])
            data = built.get(key)
            if data is None:
                data = self._files[inode].content(key[1])
                if len(data) < _SMALL:
                    built[key] = data
            files[inode] = data
            position += width
        return files


def _corners(outcomes: Sequence[tuple[Outcome, ...]], limit: int, dice: random.Random) -> Iterator[Sequence[Outcome]]:
    """Yield up to `limit` combinations: all and nothing kept; prefixes and suffixes; one that differs; and random ones."""
    width = len(outcomes)
    kept, lost = [Outcome.KEPT] * width, [Outcome.LOST] * width
    yield kept
    yield lost
    corners = [(kind, position) for position in range(width) for kind in range(2 + 2 * len(outcomes[position]))]
    if len(corners) > limit // 2:
        corners = dice.sample(corners, limit // 2)
    for kind, position in corners:
        if kind == 0:
            yield kept[:position] + lost[position:]
        elif kind == 1:
            yield lost[:position] + kept[position:]
        else:
            one = (kept if kind % 2 else lost).copy()
            one[position] = outcomes[position][(kind - 2) // 2]
            yield one
    for _ in range(limit - 2 - len(corners)):
        tame = dice.choice((0.3, 0.8, 0.95))
        yield [Outcome.KEPT if dice.random() < tame else dice.choice(of) for of in outcomes]
