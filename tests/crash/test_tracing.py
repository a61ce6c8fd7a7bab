"""What the in-process recorder sees is what the kernel sees, and a crash of that loses nothing either.

Only with LAB_STATE_CRASH_STRACE=1, since it needs strace and the right to use it; without
these it fails then, and says what is missing.
"""

from __future__ import annotations

import os

import pytest
from explore import Explorer, record
from recovery import Recovery
from tracing import missing, trace
from workloads import WORKLOADS
from world import Beside

pytestmark = pytest.mark.skipif(
    os.environ.get("LAB_STATE_CRASH_STRACE") != "1", reason="strace is asked for by LAB_STATE_CRASH_STRACE=1"
)


@pytest.fixture(autouse=True)
def _strace() -> None:
    if why := missing():
        pytest.fail(why)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_recorders_agree(workload: str) -> None:
    """Nothing that the library does to a file goes past the in-process recorder."""
    traced = trace(workload, 1, Beside.BEFORE)
    seen = record(WORKLOADS[workload], 1, beside=Beside.BEFORE)
    assert traced.versions == seen.versions
    assert traced.entries == seen.entries


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_crash_under_strace(workload: str) -> None:
    """A crash loses nothing in the order in which the kernel saw the calls of two threads."""
    with Recovery() as recovery:
        result = Explorer(recovery).explore(trace(workload, 2, Beside.FREELY), 64, 1)
    print(f"{workload:30} {result.points:5} points {result.states:6} states {result.distinct:6} distinct by strace")
    assert not result.violations, result.violations[0]
