"""A restore over a damaged state while its disk is recorded, and what a crash may leave of it.

At each moment, each damaged file is where it was, or whole in a directory `<name>.damaged-<time>/`. The state is refused as
before, or it is the restored one. No moment of the history is lost. A removal that keeps the history loses no moment either.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from chronicle import Chronicle, Promise
from disk import Ack, Disk, State
from explore import put
from recorder import DIRECTORY, NAME, Faults, Recorder, determined, recording
from recovery import MEMORY, Recovery, ViolationError
from world import QUIET, Clock, Version, abort, held

from lab_state import Config, CorruptionError, FileStorage, Manager, StorageError, remove_state, restore_state

SNAPSHOT, JOURNAL = f"{DIRECTORY}/{NAME}.json", f"{DIRECTORY}/{NAME}.journal"
WANTED = 2
"""The revision that is restored."""


class Made(NamedTuple):
    """A state with a history, before it is damaged.

    Attributes:
        state: Its files.
        versions: What it was, by revision.
        promised: The versions that its history has, without those of the files in use.
    """

    state: State
    versions: list[Version]
    promised: frozenset[Promise]


class Restore(NamedTuple):
    """A recorded restore over a damaged state.

    Attributes:
        made: The state before.
        damaged: The damaged files, by their paths.
        recorder: What the restore did to the disk.
        is_synced: Whether the damaged files were on the disk for sure.
    """

    made: Made
    damaged: dict[str, bytes]
    recorder: Recorder
    is_synced: bool


def make() -> Made:
    """Make a state with older generations, and with a snapshot and a journal in use."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name, determined("made"):
        root = Path(name)
        versions = asyncio.run(_live(root))
        recorder = Recorder(root)
        older = {path: data for path, data in recorder.start.items() if path not in {SNAPSHOT, JOURNAL}}
        return Made(recorder.start, versions, Chronicle(versions, frozenset()).all_moments(older))


async def _live(root: Path) -> list[Version]:
    versions = [Version(0, {}, {})]
    for life in range(3):
        manager = Manager(
            Config(name=NAME, flush_interval=None),
            FileStorage(root / DIRECTORY, history=3600),
            clock=Clock(),
            logger=QUIET,
        )
        await manager.start()
        for number in range(3):
            await manager.set(f"key-{number}", f"{life}" * 100)
            await manager.flush()
            versions.append(Version(manager.revision, *held(manager._core.state)))
        await (manager.stop() if life < 2 else abort(manager))
    return versions


def record_restore(
    made: Made,
    damaged: dict[str, bytes],
    faults: Faults | None = None,
    *,
    is_synced: bool = True,
    has_links: bool = True,
) -> Restore:
    """Restore a damaged state, and once more if that fails.

    Args:
        made: The state before.
        damaged: The files that are in place of its snapshot and its journal.
        faults: Which calls fail.
        is_synced: Whether the damaged files are on the disk for sure.
        has_links: Whether the file system has hard links.
    """
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        root = Path(name)
        left = {path: data for path, data in made.state.items() if path not in {SNAPSHOT, JOURNAL}}
        put(root, {**left, **(damaged if is_synced else {})})
        recorder = Recorder(root, faults) if has_links else _WithoutLinks(root, faults)
        with determined("restored"), recording(recorder):
            if not is_synced:
                for path, data in damaged.items():
                    fd = recorder.open(str(root / path), 0o102)  # O_RDWR | O_CREAT
                    recorder.pwrite(fd, data, 0)
                    recorder.close(fd)
            asyncio.run(_restore(root, recorder))
    return Restore(made, damaged, recorder, is_synced)


class _WithoutLinks(Recorder):
    """A file system without hard links."""

    def link(self, source: str, target: str, *, follow_symlinks: bool) -> None:
        raise PermissionError(1, "Operation not permitted")


async def _restore(root: Path, recorder: Recorder) -> None:
    for _ in range(2):
        try:
            await restore_state(NAME, FileStorage(root / DIRECTORY), WANTED, into=NAME, clock=Clock())
        except StorageError:
            recorder.revive()
        else:
            recorder.mark(Ack(0, 0))
            return


class Check:
    """Looks at each state that a crash of the machine may leave.

    Attributes:
        states: The number of distinct states so far.
    """

    def __init__(self, restore: Restore, recovery: Recovery) -> None:
        self.states = 0
        self._restore = restore
        self._recovery = recovery
        versions = restore.made.versions
        self._versions = [
            *versions,
            *(Version(revision, *versions[WANTED][1:]) for revision in range(len(versions) - 3, len(versions) + 3)),
        ]
        self._chronicle = Chronicle(versions, restore.made.promised)
        self._seen: dict[bool, set[tuple[tuple[str, bytes | None], ...]]] = {False: set(), True: set()}

    def violation(self, limit: int, seed: int) -> str | None:
        """Return the first violation; `None` if there is none. Look at about `limit` states at each point."""
        recorder, dice = self._restore.recorder, random.Random(seed)
        disk = Disk(recorder.start)
        has_returned = False
        for entry in [*recorder.entries, None]:
            if isinstance(entry, Ack):
                has_returned = True
                continue
            for state in disk.states(limit, dice):
                key = tuple(state.items())
                if key not in self._seen[has_returned]:
                    self._seen[has_returned].add(key)
                    self.states += 1
                    problem = self._problem(state, has_returned=has_returned)
                    if problem is not None:
                        return f"before {str(entry)[:200]}: {problem}; the disk has {sorted(state)}"
            if entry is not None:
                disk.apply(entry)  # type: ignore[arg-type]  # no other mark is made
        return None

    def _problem(self, state: State, *, has_returned: bool) -> str | None:
        damaged, is_synced = self._restore.damaged, self._restore.is_synced
        problem: str | None = None
        try:
            found = self._recovery.check(state, self._versions, 0)
        except ViolationError as error:
            problem = None if isinstance(error.__cause__, CorruptionError) else str(error)
            is_restored = False
        else:
            is_restored = found >= len(self._restore.made.versions)
            problem = None if is_restored else f"the damaged state became version {found}"
        if has_returned and not is_restored:
            return "the restore has returned, but the state is not the restored one"
        if not is_restored and not is_synced:
            return None  # the crash may have lost more of the damaged files
        if problem is not None:
            return problem
        lost = [path for path in damaged if not _is_somewhere(path, damaged[path], state)]
        if lost:
            return f"the damaged files {lost} are neither in place nor kept"
        rest = {path: data for path, data in state.items() if path not in damaged or data != damaged[path]}
        return self._chronicle.problem({path: data for path, data in rest.items() if ".damaged-" not in path})


def _is_somewhere(path: str, data: bytes, state: State) -> bool:
    """Return whether a file is in its place or in a directory for damaged files, with all its bytes."""
    name = PurePosixPath(path).name
    kept = [one for one in state if PurePosixPath(one).name == name and ".damaged-" in one]
    return any(state.get(one) == data for one in [path, *kept])


def removal_problem(made: Made, *, has_history: bool, limit: int) -> tuple[str | None, int]:
    """Remove a state by a storage that keeps a history.

    Return what is wrong with the history after a crash, and the number of states that were looked at.
    """
    before = made.state if has_history else {path: data for path, data in made.state.items() if ".history" not in path}
    with tempfile.TemporaryDirectory(dir=MEMORY) as name, determined("removed"):
        root = Path(name)
        put(root, before)
        recorder = Recorder(root)
        with recording(recorder):
            asyncio.run(remove_state(NAME, FileStorage(root / DIRECTORY, history=3600)))
    empty = Chronicle(made.versions, frozenset())
    chronicle = Chronicle(made.versions, empty.all_moments(before))
    disk, dice, states = Disk(recorder.start), random.Random(1), 0
    for entry in [*recorder.entries, None]:
        for state in disk.states(limit, dice):
            states += 1
            problem = chronicle.problem(state)
            if problem is not None:
                return f"before {entry}: {problem}; the disk has {sorted(state)}", states
        if entry is not None:
            disk.apply(entry)  # type: ignore[arg-type]  # a removal makes no mark
    return None, states


Damage = Callable[[State], dict[str, bytes]]
"""What is in place of the snapshot and the journal of a state."""


def _flipped(data: bytes | None, at: int) -> bytes:
    assert data is not None
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def flipped_snapshot(state: State) -> dict[str, bytes]:
    return {SNAPSHOT: _flipped(state[SNAPSHOT], 20), JOURNAL: state[JOURNAL] or b""}


def flipped_header(state: State) -> dict[str, bytes]:
    return {SNAPSHOT: state[SNAPSHOT] or b"", JOURNAL: _flipped(state[JOURNAL], 30)}


def flipped_record(state: State) -> dict[str, bytes]:
    journal = state[JOURNAL] or b""
    return {SNAPSHOT: state[SNAPSHOT] or b"", JOURNAL: _flipped(journal, journal.index(b"\n") + 60)}


def both_flipped(state: State) -> dict[str, bytes]:
    return {**flipped_snapshot(state), JOURNAL: flipped_header(state)[JOURNAL]}


def no_snapshot(state: State) -> dict[str, bytes]:
    return {JOURNAL: state[JOURNAL] or b""}


DAMAGES: tuple[Damage, ...] = (flipped_snapshot, flipped_header, flipped_record, both_flipped, no_snapshot)
