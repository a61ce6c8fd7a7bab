"""What the history of a state must hold after a crash: each version that was acknowledged, unless a rule lets it go.

The checks use only the files that a crash has left, and the formats. They share no code with the linking and the pruning.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec
import pytest
from disk import HistoryMark, Kept, LetGo, Pruned, State, Unsure, Wrong
from recorder import DIRECTORY, NAME, Recorder
from world import Version, generation_in_use, generation_of

from lab_state import CorruptionError, StorageError
from lab_state import _journal as journal
from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state.storage import _keeping, _pruning
from lab_state.storage._generations import HistoryFile, moment_of_snapshot, parse_name
from lab_state.storage._keeping import KeptHistory
from lab_state.storage._limits import Limits
from lab_state.storage._pruning import Deletions, InUse

Promise = tuple[int, str]
"""A version, and the generation that was in use when it was acknowledged."""


class _Files(NamedTuple):
    """The files that a crash has left.

    Attributes:
        snapshots: Those of the history and the one in use, by their bases.
        journals: Those of the history and the one in use. The second value is the base in the name of a journal of the history.
    """

    snapshots: dict[str, bytes]
    journals: list[tuple[bytes, str | None]]


def _files(state: State) -> _Files:
    snapshots: dict[str, bytes] = {}
    journals: list[tuple[bytes, str | None]] = []
    for path, data in state.items():
        name, parent = PurePosixPath(path).name, PurePosixPath(path).parent.name
        is_kept = parent == f"{NAME}.history"
        if data is None or not (is_kept or name in {f"{NAME}.json", f"{NAME}.journal"}):
            continue
        if name.endswith(".json"):
            snapshots[journal.base_of(len(data), zlib.crc32(data))] = data
        elif name.endswith(".journal"):
            file = parse_name(name)
            journals.append((data, None if file is None else file.base))
    return _Files(snapshots, journals)


class Chronicle:
    """The promises of a recording, and what must hold of each state that a crash leaves.

    Attributes:
        promised: The promises so far.
    """

    def __init__(self, versions: list[Version], promised: frozenset[Promise]) -> None:
        self.promised: set[Promise] = set(promised)
        self._versions = versions
        self._walls: dict[int, int] = {}  # when each version was first acknowledged, in the order of the versions
        self._wrong: str | None = None
        self._is_sure = True
        self._known: dict[tuple[bytes | None, bytes], frozenset[int]] = {}
        self._numbers: dict[int, list[int]] = {}
        for number, version in enumerate(versions):
            self._numbers.setdefault(version.revision, []).append(number)

    def note(self, mark: HistoryMark) -> None:
        """Note a promise, or an event that lets promises go."""
        match mark:
            case Kept(version, generation, wall):
                self.promised.add((version, generation))
                self._walls.setdefault(version, wall)
            case LetGo(gone):
                self.promised = {one for one in self.promised if one[1] != gone}
            case Pruned():
                self._prune(mark)
            case Unsure():
                self._is_sure = False
            case Wrong(text):
                self._wrong = text

    def _prune(self, mark: Pruned) -> None:
        generations, heir, revision, window = mark
        old = {version for version, _ in self.promised if self._versions[version].revision < revision}
        shown = [] if window is None else sorted(version for version in old if self._is_shown(version, *window))
        if shown:
            self._wrong = f"the versions {shown} may be pruned, although the history must show them in {window}"
        left = {one for one in self.promised if one[0] not in old}
        self.promised = {(version, heir if name in generations else name) for version, name in left}

    def _is_shown(self, version: int, first: int, last: int) -> bool:
        """Return whether a time between `first` and `last` shows a version: the newest one whose time is not after it.

        This needs neither generations nor their times.
        """
        if version not in self._walls:
            return False  # it is from before the recording
        later = [wall for number, wall in self._walls.items() if number > version]
        return max(first, self._walls[version]) < min([*later, last + 1])

    def withdraw(self) -> None:
        self.promised = set()

    def problem(self, state: State) -> str | None:
        """Return what is wrong with a state that a crash has left; `None` if it is right."""
        if self._wrong is not None:
            return self._wrong
        reached: set[int] = set()
        for numbers, orphan, _ in self._moments(state):
            if orphan is not None:
                return orphan
            reached |= numbers
        lost = {version for version, _ in self.promised} - reached
        return f"the versions {sorted(lost)} are in no generation" if lost else None

    def all_moments(self, state: State) -> frozenset[Promise]:
        """Return each version that can be reached, with its generation."""
        return frozenset((number, name) for numbers, _, name in self._moments(state) for number in numbers)

    def _moments(self, state: State) -> Iterator[tuple[frozenset[int], str | None, str]]:
        """Yield the versions that each journal holds, what is wrong with it, and the name of its generation."""
        snapshots, journals = _files(state)
        yield self._of(None, b""), None, ""  # the empty state, before the first record
        for base, data in snapshots.items():
            yield self._of(data, b""), None, base
        for data, named in journals:
            try:
                scan = journal.scan(data, NAME, "journal")
            except CorruptionError as error:
                yield frozenset(), f"a journal is damaged: {error}", ""
                continue
            # A checkpoint frame may name the snapshot that is there. In the history, the name of the journal says which one it follows.
            bases = {
                scan.header.base,
                *(one.payload.decode() for one in scan.frames if one.kind is FrameKind.CHECKPOINT),
            }
            if named is not None:
                bases &= {named}
            if bases & {ANY_BASE, NO_BASE}:
                yield self._of(None, data), None, generation_of(data)
            elif named is not None and not bases & snapshots.keys() and self._is_sure:
                yield frozenset(), f"the snapshot {named} of a journal in the history is missing", ""
            for base in bases & snapshots.keys():
                yield self._of(snapshots[base], data), None, base

    def _of(self, snapshot: bytes | None, data: bytes) -> frozenset[int]:
        known = self._known.get((snapshot, data))
        if known is None:
            known = self._known[snapshot, data] = frozenset(
                number for version in _versions(snapshot, data) for number in self._matching(version)
            )
        return known

    def _matching(self, version: Version) -> Iterator[int]:
        for number in self._numbers.get(version.revision, ()):
            if self._versions[number] == version:
                yield number


def _versions(snapshot: bytes | None, data: bytes) -> Iterator[Version]:
    """Yield the versions of a snapshot and of the records that follow it."""
    frames = journal.scan(data, NAME, "journal").frames if data else ()
    if frames and frames[0].kind is FrameKind.FULL:
        snapshot = frames[0].payload
    loaded = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, "snapshot")
    yield _plain(loaded)
    for frame in frames:
        if frame.kind is FrameKind.RECORD:
            loaded = replay(loaded, (frame.payload,), "journal")
            yield _plain(loaded)


def _plain(loaded: LoadedState) -> Version:
    values = msgspec.json.decode(msgspec.json.encode(loaded.entries)) if loaded.entries else {}
    return Version(loaded.revision, values, dict(loaded.expires))


@contextmanager
def watching(recorder: Recorder) -> Iterator[None]:
    """Record the generations that could not be linked, those that are pruned, and a pruning that no rule allows."""
    keep, prune, choose = KeptHistory._keep, KeptHistory._prune, _pruning.deletions
    linked = 0  # the number of generations of this session for which no other one has been deleted yet

    def opened(self: KeptHistory, *args: Any) -> None:
        nonlocal linked
        linked = 0
        start(self, *args)

    def kept(self: KeptHistory, *args: Any, **kwargs: Any) -> bool:
        nonlocal linked
        before, links = self.failures, recorder.links
        found = keep(self, *args, **kwargs)
        linked += recorder.links > links
        if self.failures > before and not recorder.is_dead:
            recorder.mark(LetGo(generation_in_use(recorder.root)))
            recorder.mark(Unsure())
        return found

    def chosen(sizes: Mapping[HistoryFile, int], in_use: InUse, *, limits: Limits, now: int, added: int) -> Deletions:
        nonlocal linked
        gone = choose(sizes, in_use, limits=limits, now=now, added=added)
        allowed, by_size = _allowed(sizes, in_use, recorder.limits, now, min(added, linked))
        linked -= min(added, linked)
        if allowed:
            names = frozenset(map(_name, allowed))
            window = None if by_size else (now - recorder.limits.length, now)
            recorder.mark(Pruned(names, *_first_left(allowed, sizes, in_use, recorder.root), window))
        if allowed != {*gone.journals, *gone.snapshots}:
            recorder.mark(Wrong(f"{gone} was pruned, and not {allowed}"))
        return gone

    def pruned(self: KeptHistory) -> None:
        try:
            prune(self)
        except StorageError:
            recorder.mark(Unsure())
            raise

    start = KeptHistory.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptHistory, "__init__", opened)
        patch.setattr(KeptHistory, "_keep", kept)
        patch.setattr(KeptHistory, "_prune", pruned)
        patch.setattr(_keeping, "deletions", chosen)
        yield


def _allowed(
    sizes: Mapping[HistoryFile, int], in_use: InUse, limits: Limits, now: int, added: int
) -> tuple[set[HistoryFile], bool]:
    """Return the files that the rules let go, and whether some of them go only because of the size."""
    kept = _generations(sizes, in_use)
    allowed: set[HistoryFile] = set()
    by_size = False
    for _ in range(2 * added):
        if not kept:
            break
        # The moments of the oldest one end at the first later time that has passed by now.
        later = [*(_age(files)[2] for files in kept[1:]), in_use.wall]
        is_old = min([wall for wall in later if 0 < wall <= now][:1], default=now) < now - limits.length
        is_large = (
            limits.most_bytes is not None and sum(sizes[one] for files in kept for one in files) > limits.most_bytes
        )
        if not (is_old or is_large):
            break
        by_size |= not is_old
        allowed |= kept.pop(0)
    return allowed, by_size


def _generations(sizes: Iterable[HistoryFile], in_use: InUse) -> list[set[HistoryFile]]:
    """Return the files of each generation that is not in use, the oldest first."""
    generations: dict[str, set[HistoryFile]] = {}
    for file in sizes:
        generations.setdefault(_name(file), set()).add(file)
    kept = [files for key, files in generations.items() if key not in {in_use.base, in_use.salt}]
    return sorted(kept, key=_age)


def _age(files: set[HistoryFile]) -> tuple[int, bool, int, int]:
    """Return a key that is smaller for an older generation: its revision, whether it has later records, its time, and that of its journal."""
    walls = [file.wall for file in files if file.is_snapshot]
    later = [file.wall for file in files if not file.is_snapshot]
    has_records = bool(later) and (bool(walls) or any(file.base == NO_BASE for file in files))
    return min(file.first for file in files), has_records, min(walls or later), max(later, default=0)


def _name(file: HistoryFile | InUse) -> str:
    """Return the name of the generation of a file, as `generation_of` does."""
    return file.salt if file.base in {ANY_BASE, NO_BASE} else file.base


def _first_left(gone: set[HistoryFile], sizes: Iterable[HistoryFile], in_use: InUse, root: Path) -> tuple[str, int]:
    """Return the first generation that is left, and its first revision."""
    left = _generations((file for file in sizes if file not in gone), in_use)
    if left:
        first = min(left[0])
        return _name(first), first.first
    present = moment_of_snapshot((root / DIRECTORY / f"{NAME}.json").read_bytes())
    assert present is not None
    return _name(in_use), present.revision
