"""A crash at any point never loses a file that a person has put in the place of a snapshot."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest
from disk import Disk, Mark, State
from explore import Recording, record
from recorder import DIRECTORY, NAME
from world import World

from lab_state.storage import _fs, _kept
from lab_state.storage._generations import moment_of_snapshot

FOREIGN = b'{"foreign":true}'
BEFORE = 2
"""The revision when the file is put there."""


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: nearly all calls are made where no loop runs."""


async def foreign_file(world: World) -> None:
    """Put a file in the place of the snapshot of a running state, and let checkpoints replace it."""
    await world.start()
    await world.set("key-0")
    await world.flush()
    await world.checkpoint()
    await world.set("key-1")
    await world.flush()
    assert world.state.revision == BEFORE
    world.replace_the_snapshot(FOREIGN)
    await world.set("key-2")
    await world.flush()
    await world.checkpoint()
    await world.set("key-0")
    await world.stop()


def _states(recording: Recording, limit: int) -> Iterator[State]:
    disk, dice = Disk(recording.start), random.Random(1)
    for entry in recording.entries:
        if not isinstance(entry, Mark):
            yield from disk.states(limit, dice)
            disk.apply(entry)
    yield from disk.states(limit, dice)


def _is_lost(state: State) -> bool:
    """Return whether a newer snapshot has replaced the foreign file, and the file is not kept."""
    snapshot = state.get(f"{DIRECTORY}/{NAME}.json")
    moment = None if snapshot is None else moment_of_snapshot(snapshot)
    if moment is None or moment.revision <= BEFORE:
        return False
    kept = [path for path in state if PurePosixPath(path).name.startswith(f"{NAME}.json.replaced-")]
    return not any(state[path] == FOREIGN for path in kept)


@pytest.mark.parametrize("history_bytes", [None, 1 << 30], ids=["no history", "history"])
def test_a_crash(history_bytes: int | None) -> None:
    """The file and its second name are synced before a snapshot replaces the file."""
    states = [_is_lost(state) for state in _states(record(foreign_file, 1, history_bytes=history_bytes), 32)]
    assert not any(states)
    assert len(states) > 500


@pytest.mark.parametrize("missing", ["sync", "sync_directory"])
def test_a_bug_is_found(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of the two syncs, a crash loses the file."""
    keep = _kept._keep

    def kept(path: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fs, missing, lambda path: None)
            return keep(path)

    monkeypatch.setattr(_kept, "_keep", kept)
    assert any(_is_lost(state) for state in _states(record(foreign_file, 1), 32))
