"""What a crash of the machine may leave, at every point of what the real library does to a disk, is recovered.

Each test records a workload, lets the machine crash behind each operation, and gives every
state that this may leave to the library, twice: it must find a version at or above the last
one that was acknowledged, exactly as it was.

LAB_STATE_CRASH_STATES says how many distinct states all the tests together look at.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest
import workloads
from explore import Explorer, Recording, Result, deaths, failing_syncs, full_disks, record
from recorder import Faults
from recovery import Recovery
from workloads import Workload

STATES = int(os.environ.get("LAB_STATE_CRASH_STATES", "6000"))
THOROUGH = STATES >= 100_000
"""Whether there is time for every plan, not only for as many as make the states."""

pytestmark = pytest.mark.timeout(3600 if THOROUGH else 120)


class Share(NamedTuple):
    """One exploration, and its share of the states, in thousandths."""

    workload: Workload
    share: int

    @property
    def states(self) -> int:
        return -(-STATES * self.share // 1000)


PLAIN = [Share(workload, 10 if workload is workloads.large_values else 33) for workload in workloads.WORKLOADS.values()]
RECOVERIES = [
    Share(workload, 40)
    for workload in (
        workloads.one_writer,
        workloads.expiring,
        workloads.checkpoints_beside_commits,
        workloads.unclean_ends,
        workloads.handed_over,
    )
]
Plans = Callable[[Recording], Iterable[Faults]]
FAULTS: list[tuple[Plans, bool, Share]] = [
    (failing_syncs, False, Share(workloads.steps, 50)),
    (failing_syncs, False, Share(workloads.checkpoints_beside_commits, 20)),
    (failing_syncs, False, Share(workloads.handed_over, 30)),
    (failing_syncs, True, Share(workloads.steps, 40)),
    (failing_syncs, True, Share(workloads.expiring, 20)),
    (failing_syncs, True, Share(workloads.handed_over, 30)),
    (failing_syncs, True, Share(workloads.killed_again_and_again, 20)),
    (full_disks, False, Share(workloads.steps, 30)),
    (full_disks, False, Share(workloads.handed_over, 20)),
    (full_disks, True, Share(workloads.steps, 20)),
    (full_disks, True, Share(workloads.handed_over, 20)),
    (deaths, True, Share(workloads.steps, 30)),
    (deaths, True, Share(workloads.expiring, 20)),
    (deaths, True, Share(workloads.checkpoints_beside_commits, 20)),
    (deaths, True, Share(workloads.handed_over, 30)),
    (deaths, True, Share(workloads.killed_again_and_again, 20)),
]


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: a million calls are made here, nearly all of them where no loop runs."""


@pytest.fixture(scope="module")
def recovery() -> Iterator[Recovery]:
    with Recovery() as found:
        yield found


@pytest.fixture(scope="module")
def explorer(recovery: Recovery) -> Explorer:
    """Return one explorer for all tests, so that a state that two of them find is counted once."""
    return Explorer(recovery)


class Tally:
    """What one test sees."""

    def __init__(self, name: str, recovery: Recovery) -> None:
        self._name = name
        self._recovery, self._whole = recovery, recovery.whole
        self._recordings = self._points = self._states = 0
        self.distinct = 0

    def add(self, result: Result) -> None:
        assert not result.violations, f"{len(result.violations)} violations: {result.violations[0]}"
        self._recordings += 1
        self._points += result.points
        self._states += result.states
        self.distinct += result.distinct

    def close(self, least: int) -> None:
        whole = self._recovery.whole - self._whole
        print(
            f"{self._name:60} {self._recordings:6} recordings {self._points:7} points {self._states:8} states "
            f"{self.distinct:7} distinct {whole:6} by managers, 0 violations"
        )
        assert self.distinct >= least
        assert whole


@pytest.fixture
def tally(request: pytest.FixtureRequest, recovery: Recovery) -> Tally:
    return Tally(request.node.name, recovery)


def test_the_shares_make_the_whole() -> None:
    """Together the tests look at no fewer states than they are asked to."""
    shares = [*PLAIN, *RECOVERIES, *(share for _, _, share in FAULTS)]
    assert sum(share.states for share in shares) >= STATES


TWO_THREADS = {workloads.foreign_snapshot}
"""In these, a thread deletes the files of an abandoned checkpoint while another one goes on. So the order may differ."""


@pytest.mark.parametrize("workload", workloads.WORKLOADS.values(), ids=lambda workload: workload.__name__)
def test_a_workload_can_be_repeated(workload: Workload) -> None:
    """The same seed makes the same operations, with the same bytes, in the same order; another seed makes others."""
    one, same, other = record(workload, 1), record(workload, 1), record(workload, 2)
    if workload in TWO_THREADS:
        one, same = (each._replace(entries=sorted(each.entries, key=repr)) for each in (one, same))
    assert one == same
    assert one.entries != other.entries


@pytest.mark.parametrize("share", PLAIN, ids=lambda share: share.workload.__name__)
def test_a_crash(share: Share, explorer: Explorer, tally: Tally) -> None:
    """A crash at any point of any workload loses nothing that was acknowledged."""
    for seed in itertools.count():
        tally.add(explorer.explore(record(share.workload, seed), 256 if THOROUGH else 24, seed))
        if tally.distinct >= share.states:
            break
    tally.close(share.states)


@pytest.mark.parametrize("share", RECOVERIES, ids=lambda share: share.workload.__name__)
def test_a_crash_while_recovering(share: Share, explorer: Explorer, tally: Tally) -> None:
    """A crash during a recovery, and one during the recovery after that, lose nothing."""
    for seed in itertools.count():
        first = record(share.workload, seed)
        for position, second in enumerate(recoveries(first, explorer, f"{seed}", 64)):
            tally.add(explorer.explore(second, 16, seed))
            if position % 4 == 0:
                for third in recoveries(second, explorer, f"{seed} {position}", 2):
                    tally.add(explorer.explore(third, 8, seed))
            if tally.distinct >= share.states:
                tally.close(share.states)
                return


def recoveries(recording: Recording, explorer: Explorer, seed: str, number: int) -> Iterator[Recording]:
    """Yield what a process does that starts on a state that a crash left, for some of these states.

    In every third one a sync fails; in another third the process dies of it, and the next one goes on.
    """
    result = explorer.explore(recording, 8, len(recording.entries), keep=number)
    assert not result.violations, result.violations[0]
    dice = random.Random(seed)
    dice.shuffle(result.good)
    for position, (state, version) in enumerate(result.good):
        yield record(
            workloads.next_lives if position % 2 else workloads.next_life,
            f"{seed} {position}",  # no salt comes a second time
            Faults(syncs=frozenset({dice.randrange(1, 16)})) if position % 3 else None,
            restart=position % 3 == 2,
            state=state,
            versions=recording.versions,
            stored=version,
            now=recording.now,
        )


@pytest.mark.parametrize(
    ("plans", "restart", "share"),
    FAULTS,
    ids=[f"{plans.__name__}{'-restart' * restart}-{share.workload.__name__}" for plans, restart, share in FAULTS],
)
def test_a_crash_after_a_fault(plans: Plans, *, restart: bool, share: Share, explorer: Explorer, tally: Tally) -> None:
    """A crash after a failed call to the disk loses nothing, whether the process goes on or another one starts."""
    for seed in itertools.count():
        every = list(plans(record(share.workload, seed)))
        random.Random(seed).shuffle(every)
        for number, faults in enumerate(every):
            recording = record(share.workload, seed, faults, restart=restart)
            assert recording.struck
            tally.add(explorer.explore(recording, 32 if THOROUGH else 8, seed + number))
            if tally.distinct >= share.states and not (THOROUGH and seed == 0):
                break
        if tally.distinct >= share.states:
            break
    tally.close(share.states)
