"""A crash of the machine at any point of a migration leaves the state before it or after it, with and without a history.

As in `test_states.py`, each operation on the disk is recorded, and the library recovers each state that a crash behind it may leave.
`also` checks that the versions of the schema and the values belong together.

LAB_STATE_MIGRATION_STATES says how many distinct states each test looks at.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import workloads
from explore import Explorer, Plans, deaths, failing_syncs, full_disks, record
from recovery import Recovery, ViolationError

from lab_state._codec import LoadedState

STATES = int(os.environ.get("LAB_STATE_MIGRATION_STATES", "100"))

pytestmark = pytest.mark.timeout(3600 if STATES > 1_000 else 120)


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: nearly all calls are made where no loop runs."""


def belong_together(loaded: LoadedState) -> None:
    """Check that no key is from a later version than the state, and that each state after version 1 has keys of a migration."""
    versions = {int(key.rpartition(" ")[2]) for key in loaded.entries if ", version " in key}
    if loaded.versions.schema != max(versions, default=1):
        raise ViolationError(f"a state of version {loaded.versions.schema} with keys of the versions {versions}")


@pytest.fixture
def recovery() -> Iterator[Recovery]:
    with Recovery(also=belong_together) as found:
        yield found


@pytest.mark.parametrize("history_bytes", [None, 1 << 30], ids=["plain", "history"])
def test_a_crash(recovery: Recovery, history_bytes: int | None) -> None:
    """A crash at any point leaves one of the acknowledged states, or the one that was being committed."""
    explorer, states = Explorer(recovery), 0
    for seed in itertools.count():
        result = explorer.explore(record(workloads.migrations, seed, history_bytes=history_bytes), 24, seed)
        assert not result.violations, result.violations[0]
        states += result.distinct
        if states >= STATES:
            break
    print(f"migrations: {states} distinct states, 0 violations")


@pytest.mark.parametrize("history_bytes", [None, 1 << 30], ids=["plain", "history"])
@pytest.mark.parametrize(
    ("plans", "restart"),
    [(failing_syncs, False), (failing_syncs, True), (full_disks, False), (full_disks, True), (deaths, True)],
)
def test_a_crash_after_a_fault(plans: Plans, recovery: Recovery, history_bytes: int | None, *, restart: bool) -> None:
    """So does a crash after a failed call, or after the death of the process that migrates."""
    explorer, states = Explorer(recovery), 0
    for seed in itertools.count():
        every = list(plans(record(workloads.migrations, seed, history_bytes=history_bytes)))
        random.Random(seed).shuffle(every)
        for number, faults in enumerate(every):
            recording = record(workloads.migrations, seed, faults, restart=restart, history_bytes=history_bytes)
            result = explorer.explore(recording, 8, seed + number)
            assert not result.violations, result.violations[0]
            states += result.distinct
            if states >= STATES:
                print(f"migrations, {plans.__name__}: {states} distinct states, 0 violations")
                return
