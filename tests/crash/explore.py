"""Every point of a recording at which the machine may crash; at each, the states that this may leave."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from chronicle import Chronicle, Promise, watching
from disk import (
    Ack,
    Disk,
    Entry,
    Kept,
    LetGo,
    Operation,
    Pruned,
    State,
    Try,
    Unsure,
    Withdraw,
    Wrong,
    inodes_of,
    is_kept,
)
from recorder import Faults, Recorder, determined, recording
from recovery import MEMORY, Recovery, ViolationError
from workloads import BY_AGE, Workload, next_life
from world import Beside, DiedError, Version, World


class Recording(NamedTuple):
    """What a workload did to a disk.

    Attributes:
        start: What was on the disk at the beginning.
        entries: What happened since.
        versions: Every state that there ever was.
        now: The clock of the application at the end, in seconds since it began.
        struck: How many entries there were when the first fault struck; 0 without one.
        counts: How many calls, syncs and writes there were.
        about: How to record it again.
        promised: The versions that were in the history at the beginning; `None` without a history.
    """

    start: State
    entries: list[Entry]
    versions: list[Version]
    now: int = 0
    struck: int = 0
    counts: tuple[int, int, int] = (0, 0, 0)
    about: str = ""
    promised: frozenset[Promise] | None = None


def record(
    workload: Workload,
    seed: int | str,
    faults: Faults | None = None,
    *,
    restart: bool = False,
    beside: Beside = Beside.HELD_UP,
    state: State | None = None,
    versions: list[Version] | None = None,
    stored: int = 0,
    now: int = 0,
    history_bytes: int | None = None,
) -> Recording:
    """Run a workload on the real library and a real directory.

    Args:
        workload: What to do.
        seed: What it draws from.
        faults: Which calls fail.
        restart: Whether the process dies at the first failure, and another one goes on.
        beside: When its checkpoints are made.
        state: What is on the disk; nothing if not given.
        versions: Every state that there ever was before.
        stored: Which of them `state` is.
        now: The clock, in seconds since the first application began.
        history_bytes: The most bytes of the history; without it, there is none.
    """
    promised = None
    if history_bytes is not None:
        promised = Chronicle(versions or [], frozenset()).all_moments(state or {})
    with tempfile.TemporaryDirectory(prefix="lab_state-", dir=MEMORY) as name:
        root = Path(name)
        put(root, state or {})
        recorder = Recorder(root, faults)
        world = World(
            root,
            recorder,
            seed,
            versions,
            stored=stored,
            now=now,
            dies=restart,
            beside=beside,
            history_bytes=history_bytes,
        )
        clock = world.clock if workload in BY_AGE else None
        with determined(seed, clock), recording(recorder), watching(recorder):
            asyncio.run(_live(workload, world))
    return Recording(
        recorder.start,
        recorder.entries,
        world.versions,
        int(world.clock.monotonic()),
        recorder.struck or 0,
        (recorder.calls, recorder.syncs, recorder.writes),
        f"{workload.__name__}, seed {seed}, {faults}, restart={restart}",
        promised,
    )


def put(root: Path, state: State) -> None:
    """Put the files of a state into an empty directory, with its second names; see `inodes_of`."""
    inodes = inodes_of(state)
    made: dict[int, Path] = {}
    for path, data in sorted(state.items(), key=lambda item: (is_kept(item[0]), item[0])):
        if data is None:
            (root / path).mkdir()
        elif (first := made.get(inodes[path])) is not None:
            (root / path).hardlink_to(first)
        else:
            (root / path).write_bytes(data)
            made[inodes[path]] = root / path


async def _live(workload: Workload, world: World) -> None:
    try:
        await workload(world)
    except DiedError:
        await world.crash()
        await next_life(world)
    except BaseException:  # the workload has found a fault: leave no manager running
        await world.crash()
        raise


class Result:
    """What an exploration saw.

    Attributes:
        points: At how many points the machine crashed.
        states: How many states it left, counted at each point.
        distinct: How many of them had not been seen before.
        good: Some of those that were recovered, with the version found.
        violations: What was wrong.
    """

    def __init__(self) -> None:
        self.points = self.states = self.distinct = 0
        self.good: list[tuple[State, int]] = []
        self.violations: list[str] = []


class Explorer:
    """Crashes at every point, and recovers.

    Attributes:
        seen: The digests of all the states so far.
    """

    def __init__(self, recovery: Recovery, *, at_first: bool = False) -> None:
        """Begin with no state seen. `at_first`: Whether to stop at the first violation."""
        self.seen: set[bytes] = set()
        self._recovery = recovery
        self._at_first = at_first

    def explore(self, recording: Recording, limit: int, seed: int, *, keep: int = 0) -> Result:
        """Crash at each point.

        Args:
            recording: What was done.
            limit: About how many states to look at, at each point.
            seed: What the choice of them is drawn from, where there are more.
            keep: How many good states to keep.
        """
        exploration = _Exploration(self.seen, self._recovery, recording, random.Random(seed), keep)
        exploration.run(limit, at_first=self._at_first)
        return exploration.result


class _Exploration:
    def __init__(
        self, seen: set[bytes], recovery: Recovery, recording: Recording, dice: random.Random, keep: int
    ) -> None:
        self._seen, self._recovery, self._recording = seen, recovery, recording
        self._dice, self._keep = dice, keep
        self._found: dict[bytes, int | str] = {}
        promised = recording.promised
        self._chronicle = None if promised is None else Chronicle(recording.versions, promised)
        self.result = Result()

    def run(self, limit: int, *, at_first: bool) -> None:
        disk = Disk(self._recording.start)
        acked: Ack | None = None  # and so nothing was promised
        tried = on_disk = 0
        last: Operation | None = None
        for position, entry in enumerate([*self._recording.entries, None]):
            if isinstance(entry, Try):
                tried = entry.version
            elif isinstance(entry, Ack):
                acked = entry
            elif isinstance(entry, Withdraw):
                acked = None
                if self._chronicle is not None:
                    self._chronicle.withdraw()
            elif isinstance(entry, Kept | LetGo | Pruned | Unsure | Wrong):
                if self._chronicle is not None:
                    self._chronicle.note(entry)
            else:
                # What was promised meanwhile holds already, and what was tried meanwhile is not there yet.
                if acked is not None and position >= self._recording.struck:
                    self._crash(disk.states(limit, self._dice), acked, on_disk, f"{position}: {last}")
                    if at_first and self.result.violations:
                        return
                if entry is not None:
                    disk.apply(entry)
                last, on_disk = entry, tried

    def _crash(self, states: Iterable[State], acked: Ack, tried: int, where: str) -> None:
        """Look at what a crash leaves."""
        result = self.result
        result.points += 1
        here = set()
        for state in states:
            key = _digest(state)
            if key in here:
                continue
            here.add(key)
            result.states += 1
            found = self._found.get(key)
            if found is None:
                found = self._found[key] = self._recover(state, key)
            problem: str | None
            if isinstance(found, str):
                problem = found
            elif found == acked.version or max(acked.version, acked.first) <= found <= tried:
                problem = None if self._chronicle is None else self._chronicle.problem(state)
                if problem is None:
                    continue
            else:
                problem = f"version {found} was found, but {acked} was promised and {tried} tried"
            about = f"{self._recording.about}: crash behind {where[:200]}"
            result.violations.append(f"{about}: {problem}; the disk: {_shown(state)}")

    def _recover(self, state: State, key: bytes) -> int | str:
        if key not in self._seen:
            self._seen.add(key)
            self.result.distinct += 1
        try:
            found = self._recovery.check(state, self._recording.versions, self._recording.now)
        except ViolationError as error:
            return str(error)
        if len(self.result.good) < self._keep:
            self.result.good.append((state, found))
        elif self._keep and self._dice.random() < self._keep / len(self._found):
            self.result.good[self._dice.randrange(self._keep)] = state, found
        return found


def _digest(state: State) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for path, data in state.items():
        digest.update(f"{path} {-1 if data is None else len(data)} ".encode())
        digest.update(data or b"")
    return digest.digest()


def _shown(state: State) -> dict[str, bytes | None]:
    return {path: data if data is None else data[:2000] for path, data in state.items()}


Plans = Callable[[Recording], Iterable[Faults]]


def failing_syncs(clean: Recording) -> Iterable[Faults]:
    """Return faults that let each sync fail in turn."""
    return (Faults(syncs=frozenset({number})) for number in range(1, clean.counts[1] + 1))


def full_disks(clean: Recording) -> Iterable[Faults]:
    """Yield faults for each write in turn: cut in half, and not written at all; every third time, undoing it fails too."""
    for number in range(1, clean.counts[2] + 1):
        for written in (0.5, 0.0):
            yield Faults(write=number, written=written, truncate=number % 3 == 0)


def deaths(clean: Recording) -> Iterable[Faults]:
    """Return faults that let the process die before each call in turn."""
    return (Faults(kill=number) for number in range(1, clean.counts[0] + 1))
