"""A reader beside a writer at full speed: what it reads is a state that the writer had between call and return."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import racing
from lives import ENVIRONMENT, in_memory
from racing import NAME, Shared, contents

from lab_state import CorruptionError, FileStorage, Reading, StateView, read_state
from lab_state._journal import NO_BASE, base_of
from lab_state.storage import _file_reader
from lab_state.storage import file as module
from lab_state.storage._file_reader import _Look as Look
from lab_state.storage._fs_read import OpenFile, open_to_read
from lab_state.storage._reading import Judgement, ReadFiles, judge

Patch = pytest.MonkeyPatch

READS = int(os.environ.get("LAB_STATE_READINGS", "300"))
LONGEST_STEP = 0.02
SLOWEST = 0.05
"""Seconds for a reading and what the test does beside it, on a busy machine."""


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: this one kills processes between two readings."""


class Race:
    """Readings beside the writer.

    Attributes:
        counts: What there was: `readings`, `kills`, `again` (second looks at the files),
            `unsettled` (the last record was not durable for certain).
    """

    def __init__(self, directory: Path, shared: Shared, process: subprocess.Popen[str]) -> None:
        self.counts: Counter[str] = Counter()
        self.numbers = shared.numbers
        self._shared = shared
        self._process = process
        self._storage = FileStorage(directory)

    async def read(self) -> None:
        """Read once, and compare with what the writer had meanwhile."""
        numbers = self.numbers
        life, acknowledged, held = numbers[racing._LIFE], numbers[racing._ACKNOWLEDGED], numbers[racing._HELD]
        view = await read_state(NAME, self._storage)
        still_held = held and numbers[racing._HELD]
        last = numbers[racing._LIFE]
        assert acknowledged <= view.revision <= self._shared.peak(life, last), f"revision {view.revision}"
        assert await view.get_all() == contents(view.revision), f"revision {view.revision} is not what was written"
        self._check_durable(view)
        if still_held and life == last:
            assert view.live is not False
        self._check_alive()
        self.counts["readings"] += 1

    def _check_alive(self) -> None:
        assert self._process.poll() is None, "the writer died of something else"

    def _check_durable(self, view: StateView) -> None:
        assert view.durable_revision <= view.revision
        assert view.durable_revision <= self.numbers[racing._SYNCED], "what is not synced was called durable"
        self.counts["unsettled"] += view.durable_revision < view.revision

    def kill(self) -> None:
        """Kill the writer, and wait until another one starts."""
        pid = self.numbers[racing._PID]
        os.kill(pid, signal.SIGKILL)
        while self.numbers[racing._PID] == pid:
            self._check_alive()
            os.sched_yield()
        self.counts["kills"] += 1


@contextmanager
def race(tmp_path: Path) -> Iterator[Race]:
    """Yield a writer that has made its first change."""
    with in_memory(tmp_path) as directory:
        path = tmp_path / "shared"
        path.touch()
        shared = Shared(path)
        script = Path(racing.__file__)
        arguments = [sys.executable, str(script), str(directory), str(path), "20250304"]
        with subprocess.Popen(arguments, env=ENVIRONMENT, start_new_session=True, text=True) as process:
            try:
                while not shared.numbers[racing._ACKNOWLEDGED]:
                    assert process.poll() is None, "the writer died of something else"
                    os.sched_yield()
                yield Race(directory, shared, process)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(60 + SLOWEST * READS)
def test_readings_beside_a_writer(tmp_path: Path, monkeypatch: Patch) -> None:
    """Each reading is one state, all keys of one moment, with all that was durable at the call.

    None is reported as damaged.
    """
    dice = random.Random(20_250_304)

    async def run(race: Race) -> None:
        for _ in range(READS):
            await race.read()
            if dice.random() < 0.01:
                race.kill()

    begun = time.monotonic()
    with race(tmp_path) as running:
        counted(monkeypatch, running.counts)
        asyncio.run(run(running))
        counts, numbers = running.counts, running.numbers
        again = counts["looks"] - READS
        revisions, lives, faults = numbers[racing._ACKNOWLEDGED], numbers[racing._LIFE], numbers[racing._FAULTS]
    sys.stdout.write(
        f"{READS} readings in {time.monotonic() - begun:.0f} s beside {revisions} changes, {lives} starts, {counts['kills']} "
        f"kills and {faults} faults: {again} took another look, {counts['unsettled']} had a last record that was not "
        "durable for certain\n"
    )


def counted(patch: Patch, counts: Counter[str]) -> None:
    """Count how often the files are looked at."""

    def judged(data: bytes | None, base: str, name: str, path: str, *, is_followed: bool) -> Judgement:
        counts["looks"] += 1
        return judge(data, base, name, path, is_followed=is_followed)

    patch.setattr(_file_reader, "judge", judged)


@pytest.fixture(autouse=True)
def _slow_reader(monkeypatch: Patch) -> None:
    """Let the reader be overtaken at some steps, as on a busy machine. A reading takes less than a checkpoint otherwise."""
    dice = random.Random(20_250_305)
    read = OpenFile.read

    def slow(self: OpenFile, *part: Any) -> bytes:
        if dice.random() < 0.1:
            time.sleep(dice.uniform(0, LONGEST_STEP))
        return read(self, *part)

    monkeypatch.setattr(OpenFile, "read", slow)


# Wrong readers


def first_reading_believed(patch: Patch) -> None:
    """Accept the first reading, whatever it is."""
    patch.setattr(_file_reader, "is_answer", lambda before, now: True)


def snapshot_read_first(patch: Patch) -> None:
    """Open the journal after the snapshot, and accept what `start()` would accept."""

    def read(self: Look) -> ReadFiles:
        self._snapshot = open_to_read(self._paths.snapshot)
        if self._snapshot is not None:
            self.snapshot_bytes = self._snapshot.read()
        if self._journal is not None:
            self._journal.close()
        self._journal = open_to_read(self._paths.journal)
        data = None if self._journal is None else self._journal.read()
        found = self.snapshot_bytes
        base = NO_BASE if found is None else base_of(len(found), zlib.crc32(found))
        judgement = judge(data, base, self._name, self._paths.journal)
        return ReadFiles(None, None, base, judgement._replace(sure=judgement.accepted is not None))

    patch.setattr(Look, "_read", read)


def last_record_called_durable(patch: Patch) -> None:
    """Count a frame that can be read as synced."""

    def judged(data: bytes | None, base: str, name: str, path: str, *, is_followed: bool) -> Judgement:
        judgement = judge(data, base, name, path, is_followed=is_followed)
        return judgement if judgement.accepted is None else judgement._replace(durable=len(judgement.accepted.records))

    patch.setattr(_file_reader, "judge", judged)


def lock_shared_meanwhile(patch: Patch) -> None:
    """Share the lock while reading, as other readers of files do."""

    def locked(directory: str, name: str, given_up: threading.Event) -> Reading:
        with Path(directory, f"{name}.lock").open("rb") as file:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _file_reader.read_files(directory, name, given_up)

    patch.setattr(module, "read_files", locked)


@pytest.mark.parametrize(
    "bug",
    [first_reading_believed, snapshot_read_first, last_record_called_durable, lock_shared_meanwhile],
    ids=lambda bug: bug.__name__,
)
def test_a_wrong_reader_is_found(bug: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch) -> None:
    """The race finds a reader that breaks one of the rules."""

    async def run(race: Race) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            await race.read()

    bug(monkeypatch)
    with race(tmp_path) as running, pytest.raises((AssertionError, CorruptionError)):
        asyncio.run(run(running))
