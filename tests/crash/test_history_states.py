"""A crash never loses a generation that no rule lets go.

Each test records a workload with a history, lets the machine crash behind each operation, and looks for each version that was
acknowledged: in the files in use, or in a generation of the history. The state itself is recovered as in `test_states.py`.

LAB_STATE_HISTORY_STATES says how many distinct states all the tests together look at.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import workloads
from bugs import Bug
from explore import Explorer, Plans, deaths, failing_syncs, full_disks, record
from history_bugs import BUGS
from recorder import Faults
from recovery import Recovery
from test_seeded_bugs import violation
from workloads import Workload

STATES = int(os.environ.get("LAB_STATE_HISTORY_STATES", "120"))
THOROUGH = STATES >= 50_000
LEAST_FAULTS = 10 if THOROUGH else 1
"""The number of faults in each test. They are drawn from all those that its plan has."""

LIMITS = {"all": 1 << 30, "some": 1500} if THOROUGH else {"some": 1500}
"""The most bytes of a history: all generations, or a few of them. The ordinary run has no time for both."""

FAULTS: list[tuple[Plans, bool, Workload]] = [
    (failing_syncs, False, workloads.steps),
    (failing_syncs, False, workloads.checkpoints_beside_commits),
    (failing_syncs, True, workloads.steps),
    (failing_syncs, True, workloads.generations),
    (full_disks, False, workloads.steps),
    (deaths, True, workloads.steps),
    (deaths, True, workloads.checkpoints_beside_commits),
    (deaths, True, workloads.generations),
    *([(failing_syncs, False, workloads.by_age), (deaths, True, workloads.by_age)] if THOROUGH else []),
    (failing_syncs, False, workloads.restores),
    (failing_syncs, True, workloads.restores),
    (full_disks, False, workloads.restores),
    (deaths, True, workloads.restores),
]
RECOVERIES = [workloads.checkpoints_beside_commits, workloads.unclean_ends, workloads.generations]
SHARE = -(-STATES // (len(LIMITS) * (len(workloads.WITH_HISTORY) + len(FAULTS) + len(RECOVERIES))))

pytestmark = pytest.mark.timeout(3600 if THOROUGH else 240)


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: nearly all calls are made where no loop runs."""


@pytest.fixture
def recovery() -> Iterator[Recovery]:
    with Recovery() as found:
        yield found


@pytest.fixture
def explorer(recovery: Recovery) -> Explorer:
    return Explorer(recovery)


@pytest.fixture(params=LIMITS)
def most_bytes(request: pytest.FixtureRequest) -> int:
    return LIMITS[request.param]


def tell(name: str, states: int) -> None:
    print(f"{name}: {states} distinct states, 0 violations")
    assert states >= SHARE


@pytest.mark.parametrize("workload", workloads.WITH_HISTORY, ids=lambda workload: workload.__name__)
def test_a_crash(workload: Workload, explorer: Explorer, most_bytes: int) -> None:
    """A crash at any point of a workload leaves each acknowledged version in some generation."""
    states = 0
    for seed in itertools.count():
        result = explorer.explore(record(workload, seed, history_bytes=most_bytes), 64 if THOROUGH else 4, seed)
        assert not result.violations, result.violations[0]
        states += result.distinct
        if states >= SHARE:
            break
    tell(workload.__name__, states)


@pytest.mark.parametrize(
    ("plans", "restart", "workload"),
    FAULTS,
    ids=[f"{plans.__name__}{'-restart' * restart}-{workload.__name__}" for plans, restart, workload in FAULTS],
)
def test_a_crash_after_a_fault(
    plans: Plans, workload: Workload, explorer: Explorer, most_bytes: int, *, restart: bool
) -> None:
    """So does a crash after a failed call, or after a process that died. What could not be linked is a hole, and nothing more."""
    states = 0
    for seed in itertools.count():
        every = list(plans(record(workload, seed, history_bytes=most_bytes)))
        random.Random(seed).shuffle(every)
        for number, faults in enumerate(every):
            recording = record(workload, seed, faults, restart=restart, history_bytes=most_bytes)
            result = explorer.explore(recording, 4, seed + number)
            assert not result.violations, result.violations[0]
            states += result.distinct
            if states >= SHARE and number + 1 >= LEAST_FAULTS:
                break
        if states >= SHARE:
            break
    tell(f"{plans.__name__} {workload.__name__}", states)


@pytest.mark.parametrize("workload", RECOVERIES, ids=lambda workload: workload.__name__)
def test_a_crash_while_recovering(workload: Workload, explorer: Explorer, most_bytes: int) -> None:
    """Each version that a start finds in the history stays there, also if a sync fails, or if the process dies."""
    states = 0
    for seed in itertools.count():
        first = record(workload, seed, history_bytes=most_bytes)
        result = explorer.explore(first, 4, seed, keep=32)
        assert not result.violations, result.violations[0]
        dice = random.Random(seed)
        for number, (state, version) in enumerate(result.good):
            second = record(
                workloads.next_lives if number % 2 else workloads.next_life,
                f"{seed} {number}",
                Faults(syncs=frozenset({dice.randrange(1, 20)})) if number % 3 else None,
                restart=number % 3 == 2,
                state=state,
                versions=first.versions,
                stored=version,
                now=first.now,
                history_bytes=most_bytes,
            )
            found = explorer.explore(second, 8, seed + number)
            assert not found.violations, found.violations[0]
            states += found.distinct
            if states >= SHARE:
                tell(workload.__name__, states)
                return


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.apply.__name__)
def test_a_bug_is_found(bug: Bug, recovery: Recovery) -> None:
    """The workload for a bug shows a crash after which a version is in no generation."""
    assert violation(bug, recovery) is not None
