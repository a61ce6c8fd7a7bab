"""After a crash, the results of calls are those of the changes that are there: neither is there without the other.

Each record has, with the changes of a commit, a result for each changed key, as if a client of its own had changed
it. The result is the value, and a key that is deleted forgets its client. So the table of results and the values
of each state that a crash leaves must be alike.

LAB_STATE_CALL_STATES says how many distinct states all the tests together look at.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import pytest
import workloads
from explore import Explorer, Plans, deaths, failing_syncs, full_disks, record
from msgspec import Raw, json
from recovery import Recovery, ViolationError
from workloads import Workload

from lab_state import _flusher, _snapshots
from lab_state._codec import LoadedState, encode_record, encode_small_record, encode_snapshot
from lab_state._entries import Absent, ChangeSet, Expiring, Stored
from lab_state.shared._results import RecordCalls, ResultTable, SnapshotCalls

STATES = int(os.environ.get("LAB_STATE_CALL_STATES", "1500"))

pytestmark = pytest.mark.timeout(3600 if STATES > 10_000 else 120)

PLAIN = (
    workloads.one_writer,
    workloads.hundred_writers,
    workloads.transactions,
    workloads.expiring,
    workloads.checkpoints_beside_commits,
    workloads.journals_written_beside_commits,
    workloads.unclean_ends,
    workloads.steps,
)
FAULTS: tuple[tuple[Plans, bool, Workload], ...] = (
    (failing_syncs, False, workloads.steps),
    (failing_syncs, True, workloads.expiring),
    (full_disks, False, workloads.steps),
    (deaths, True, workloads.steps),
)
SHARE = -(-STATES // (len(PLAIN) + len(FAULTS)))


@pytest.fixture(autouse=True)
def _no_blocking() -> None:
    """Replace the watch of the other tests: nearly all calls are made where no loop runs."""


def client_of(key: str) -> str:
    return blake2b(key.encode(), digest_size=16).hexdigest()


def text_of(stored: Stored) -> Raw:
    value: Any = stored.value if isinstance(stored, Expiring) else stored
    return Raw(bytes(value) if isinstance(value, bytes | Raw) else json.encode(value))


class Mirrored:
    """Records and snapshots whose results are their values."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def of_record(self, taken: ChangeSet) -> RecordCalls:
        calls: RecordCalls = dict.fromkeys(self._known) if taken.cleared else {}
        for key, stored in taken.changes.items():
            client = client_of(key)
            self._known.add(client)
            calls[client] = None if isinstance(stored, Absent) else (taken.end - 1, {taken.end: text_of(stored)})
        return calls

    def of_snapshot(self, view: dict[str, Stored], revision: int) -> SnapshotCalls:
        return {
            client_of(key): (max(revision - 1, 0), {max(revision, 1): (revision, text_of(stored))})
            for key, stored in view.items()
        }

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        """Let the manager write the results."""

        def snapshot(view: dict[str, Stored], revision: int, *args: Any, **kwargs: Any) -> Iterator[bytes]:
            kwargs["calls"] = self.of_snapshot(view, revision)
            return encode_snapshot(view, revision, *args, **kwargs)

        # The second argument has the results of the calls of other processes. Here there are none.
        patch.setattr(
            _flusher, "encode_small_record", lambda taken, _: encode_small_record(taken, self.of_record(taken))
        )
        patch.setattr(_flusher, "encode_record", lambda taken, _: encode_record(taken, self.of_record(taken)))
        patch.setattr(_snapshots, "encode_snapshot", snapshot)


def check_alike(loaded: LoadedState) -> None:
    """Check that each key has one result, its value, and that there is no other result."""
    expected = {client_of(key): [json.decode(text_of(stored))] for key, stored in loaded.entries.items()}
    table = {} if loaded.results is None else loaded.results.snapshot()
    found = {client: [json.decode(value) for _, value in results.values()] for client, (_, results) in table.items()}
    if found != expected:
        raise ViolationError(f"the results are {found}, and the values {expected}")


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recovery]:
    Mirrored().apply(monkeypatch)
    with Recovery(also=check_alike) as found:
        yield found


@pytest.mark.parametrize("workload", PLAIN, ids=lambda workload: workload.__name__)
def test_a_crash(workload: Workload, recovery: Recovery) -> None:
    """A crash at any point of a workload leaves the results of its changes, and no others."""
    explorer, states = Explorer(recovery), 0
    for seed in itertools.count():
        result = explorer.explore(record(workload, seed), 16, seed)
        assert not result.violations, result.violations[0]
        states += result.distinct
        if states >= SHARE:
            break
    print(f"{workload.__name__}: {states} states, 0 violations")


@pytest.mark.parametrize(
    ("plans", "restart", "workload"),
    FAULTS,
    ids=[f"{plans.__name__}{'-restart' * restart}-{workload.__name__}" for plans, restart, workload in FAULTS],
)
def test_a_crash_after_a_fault(plans: Plans, workload: Workload, recovery: Recovery, *, restart: bool) -> None:
    """So does a crash after a commit that failed, or after a process that died."""
    explorer, states = Explorer(recovery), 0
    for seed in itertools.count():
        for number, faults in enumerate(plans(record(workload, seed))):
            result = explorer.explore(record(workload, seed, faults, restart=restart), 8, seed + number)
            assert not result.violations, result.violations[0]
            states += result.distinct
            if states >= SHARE:
                print(f"{plans.__name__} {workload.__name__}: {states} states, 0 violations")
                return


@pytest.mark.parametrize("bug", ["a record without results", "a snapshot without results", "results of another record"])
def test_a_bug_is_found(bug: str, recovery: Recovery, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash shows results that are missing from records or from snapshots, and results that come a record late."""
    late: list[RecordCalls] = [{}]

    def small(taken: ChangeSet, _: object) -> bytes | None:
        late.append(Mirrored().of_record(taken))
        return encode_small_record(taken, late[-2])

    if bug == "a record without results":
        monkeypatch.setattr(_flusher, "encode_small_record", encode_small_record)
    elif bug == "a snapshot without results":
        monkeypatch.setattr(_snapshots, "encode_snapshot", encode_snapshot)
    else:
        monkeypatch.setattr(_flusher, "encode_small_record", small)
    result = Explorer(recovery, at_first=True).explore(record(workloads.steps, 1), 8, 1)
    assert "the results are" in result.violations[0]


def test_what_is_not_alike_is_a_violation() -> None:
    """A value without a result, and a result without a value, are violations."""
    table = ResultTable()
    table.apply({client_of("a"): (0, {1: Raw(b"1")})}, 1)
    check_alike(LoadedState({"a": 1}, 1, results=table))
    check_alike(LoadedState({}, 1))
    for wrong in (LoadedState({"a": 1}, 1), LoadedState({}, 1, results=table), LoadedState({"a": 2}, 1, results=table)):
        with pytest.raises(ViolationError):
            check_alike(wrong)
