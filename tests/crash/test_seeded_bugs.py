"""The exploration of crash states proves itself: bugs that are put into the library are found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bugs import BUGS, Bug
from explore import Explorer, record
from recovery import Recovery

from lab_state import CorruptionError

LIMIT = 16
"""States at each point."""


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: nearly all calls are made where no loop runs."""


@pytest.fixture
def recovery() -> Iterator[Recovery]:
    with Recovery() as found:
        yield found


def violation(bug: Bug, recovery: Recovery) -> str | None:
    """Return the first violation."""
    clean = record(bug.workload, 1, history_bytes=bug.history_bytes)
    plans = list(bug.plans(clean))
    for faults in plans[bug.first :] + plans[: bug.first]:
        with pytest.MonkeyPatch.context() as patch:
            bug.apply(patch)
            try:
                recording = record(bug.workload, 1, faults, restart=bug.restart, history_bytes=bug.history_bytes)
            except (AssertionError, CorruptionError) as error:  # a process that goes on finds it already
                return str(error)
            found = Explorer(recovery, at_first=True).explore(recording, LIMIT, 1).violations
        if found:
            return found[0]
    return None


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.apply.__name__)
def test_a_bug_is_found(bug: Bug, recovery: Recovery) -> None:
    """The workload for a bug shows a crash after which something is lost, is refused, or was never there."""
    assert violation(bug, recovery) is not None
