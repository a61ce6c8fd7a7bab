"""A crash at any point of a restore over a damaged state loses neither the damaged files nor a moment of the history.

LAB_STATE_HISTORY_STATES says how many states are looked at; see `test_history_states.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from explore import Plans, Recording, deaths, failing_syncs, full_disks
from recovery import Recovery
from restoring import (
    DAMAGES,
    Check,
    Damage,
    Made,
    both_flipped,
    make,
    no_snapshot,
    record_restore,
    removal_problem,
)

from lab_state.storage import _file_calls, _file_restore, _file_states, _fs
from lab_state.storage._file_calls import FileRestoring
from lab_state.storage._file_writer import Writer
from lab_state.storage._protocol import SnapshotSource

THOROUGH = int(os.environ.get("LAB_STATE_HISTORY_STATES", "400")) >= 50_000
LIMIT = 64 if THOROUGH else 4
"""About how many states are looked at, at each point."""

pytestmark = pytest.mark.timeout(3600 if THOROUGH else 240)


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: nearly all calls are made where no loop runs."""


@pytest.fixture(scope="module")
def made() -> Made:
    return make()


@pytest.fixture
def recovery() -> Iterator[Recovery]:
    with Recovery() as found:
        yield found


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_crash(made: Made, recovery: Recovery, damage: Damage) -> None:
    """A crash at any point leaves each damaged file whole: in its place, or in a directory of its own."""
    check = Check(record_restore(made, damage(made.state)), recovery)
    assert check.violation(LIMIT, 1) is None
    print(f"{damage.__name__}: {check.states} distinct states, 0 violations")
    assert check.states > 40


@pytest.mark.parametrize("damage", [both_flipped, no_snapshot], ids=lambda damage: damage.__name__)
def test_a_copy_that_was_not_synced(made: Made, recovery: Recovery, damage: Damage) -> None:
    """Damaged files that are only in the page cache are synced before they are replaced."""
    check = Check(record_restore(made, damage(made.state), is_synced=False), recovery)
    assert check.violation(LIMIT, 1) is None


def test_a_file_system_without_links(made: Made, recovery: Recovery) -> None:
    """The damaged files are copied before they are replaced."""
    check = Check(record_restore(made, both_flipped(made.state), has_links=False), recovery)
    assert check.violation(LIMIT, 1) is None


@pytest.mark.parametrize("plans", [failing_syncs, full_disks, deaths], ids=lambda plans: plans.__name__)
def test_a_crash_after_a_fault(made: Made, recovery: Recovery, plans: Plans) -> None:
    """So does a crash after a call that failed, or after a process that died. The next restore succeeds."""
    damaged = both_flipped(made.state)
    states = 0
    every = list(plans(_counts(made, damaged)))
    for number, faults in enumerate(every if THOROUGH else every[:: len(every) // 4]):
        check = Check(record_restore(made, damaged, faults), recovery)
        assert check.violation(16 if THOROUGH else 2, number) is None, faults
        states += check.states
    print(f"{plans.__name__}: {states} states, 0 violations")
    assert states > 40


def _counts(made: Made, damaged: dict[str, bytes]) -> Recording:
    recorder = record_restore(made, damaged).recorder
    return Recording({}, [], [], counts=(recorder.calls, recorder.syncs, recorder.writes))


@pytest.mark.parametrize("has_history", [False, True])
def test_a_crash_during_a_removal(made: Made, *, has_history: bool) -> None:
    """Each moment is in the files in use or in the history, even if the removal begins the history."""
    problem, states = removal_problem(made, has_history=has_history, limit=LIMIT)
    assert problem is None
    assert states > 10


# The test can fail

Bug = Callable[[pytest.MonkeyPatch], None]


def replaced_before_it_is_kept(patch: pytest.MonkeyPatch) -> None:
    """Replace the journal first."""
    put = FileRestoring.put

    async def late(self: FileRestoring, snapshot: SnapshotSource, *, is_damaged: bool) -> str | None:
        await self._session.commit(b"", snapshot)
        return await put(self, snapshot, is_damaged=is_damaged)

    patch.setattr(FileRestoring, "put", late)


def nothing_kept(patch: pytest.MonkeyPatch) -> None:
    """Replace the files without a link."""
    patch.setattr(_file_calls, "keep_apart", lambda writer: None)


def _without(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Let functions of `_fs` do nothing while the damaged files are kept."""
    keep = _file_restore.keep_apart

    def kept(writer: Writer) -> str:
        with pytest.MonkeyPatch.context() as inner:
            for name in names:
                inner.setattr(_fs, name, lambda path: None)
            return keep(writer)

    patch.setattr(_file_calls, "keep_apart", kept)


def no_sync_of_the_names(patch: pytest.MonkeyPatch) -> None:
    """Let the directory with the damaged files be lost."""
    _without(patch, "sync_directory")


def no_sync_of_the_files(patch: pytest.MonkeyPatch) -> None:
    """Let the bytes of the damaged files be lost."""
    _without(patch, "sync")


def moved_away(patch: pytest.MonkeyPatch) -> None:
    """Move the damaged files, so that a start would find an empty state."""

    def move(path: str, target: str) -> None:
        _fs.rename(path, target)

    patch.setattr(_file_restore, "_link_or_copy", move)


BUGS: tuple[tuple[Bug, bool], ...] = (
    (replaced_before_it_is_kept, True),
    (nothing_kept, True),
    (no_sync_of_the_names, True),
    (no_sync_of_the_files, False),
    (moved_away, True),
)


@pytest.mark.parametrize(("bug", "is_synced"), BUGS, ids=[bug.__name__ for bug, _ in BUGS])
def test_a_bug_is_found(made: Made, recovery: Recovery, bug: Bug, *, is_synced: bool) -> None:
    """With the bug, a crash loses a damaged file, or makes another state of it."""
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        restore = record_restore(made, both_flipped(made.state), is_synced=is_synced)
    assert Check(restore, recovery).violation(16, 1) is not None


def test_a_removal_without_links_is_found(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the links, a removal loses moments."""
    monkeypatch.setattr(_file_states, "_keep_last", lambda *_: None)
    problem, _ = removal_problem(made, has_history=True, limit=LIMIT)
    assert "are in no generation" in str(problem)
