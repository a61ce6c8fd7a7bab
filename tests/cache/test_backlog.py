"""The durable changes that are not in the mirror yet: they are merged like updates of a dict, within bounds."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_state._entries import DELETED, ChangeSet, Expiring
from lab_state.cache import _backlog
from lab_state.cache._backlog import Backlog

KEYS = st.sampled_from("abc")
CHANGES = st.dictionaries(KEYS, st.none() | st.integers() | st.just(DELETED))


def changes(start: int, end: int, what: dict[str, Any], *, cleared: bool = False) -> ChangeSet:
    return ChangeSet(start, end, cleared, what, 0.0)


def applied(before: dict[str, Any], taken: ChangeSet) -> dict[str, Any]:
    after = {} if taken.cleared else dict(before)
    for key, value in taken.changes.items():
        if value is DELETED:
            after.pop(key, None)
        else:
            after[key] = value
    return after


@given(st.lists(st.tuples(st.booleans(), CHANGES, st.booleans())), st.integers(1, 3))
def test_merged_is_the_same_as_one_by_one(commits: list[tuple[bool, dict[str, Any], bool]], most: int) -> None:
    """In any sequence of merges, takes and put-backs, the result is that of all commits in order."""
    model: dict[str, Any] = {}
    mirror: dict[str, Any] = {}
    pending = Backlog()
    for number, (cleared, what, taken_back) in enumerate(commits, 1):
        commit = changes(number - 1, number, what, cleared=cleared)
        model = applied(model, commit)
        pending.add(commit)
        if taken_back:
            while pending.merge(most):
                pass
            pending.put_back(pending.take(0))
    while pending.merge(most):
        pass
    assert bool(pending) is bool(commits)
    assert applied(mirror, pending.take(0)) == model
    assert not pending


def test_too_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the bound nothing is kept until `clear`."""
    monkeypatch.setattr(_backlog, "MOST_KEYS", 3)
    pending = Backlog()
    pending.add(changes(0, 1, {"a": 1, "b": 2}))
    pending.merge(10)
    taken = pending.take(0)
    pending.add(changes(1, 2, {"c": 1, "d": 2}))
    pending.put_back(taken)
    assert pending.overflowed
    assert pending.keys == 0
    pending.add(changes(2, 3, {"a": 1}))
    pending.put_back(taken)
    assert pending.keys == 0
    pending.clear()
    pending.add(changes(3, 4, dict.fromkeys("abcd")))
    assert pending.overflowed


@pytest.mark.parametrize(
    "value",
    ["x" * 60, b"x" * 60, msgspec.Raw(b"x" * 60), Expiring("x" * 60, 5)],
    ids=["str", "bytes", "raw", "expiring"],
)
def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    """The bytes of a value that is replaced do not count."""
    monkeypatch.setattr(_backlog, "MOST_BYTES", 100)
    pending = Backlog()
    for number in range(5):
        pending.add(changes(number, number + 1, {"a": value}))
        pending.merge(10)
    assert not pending.overflowed
    pending.add(changes(5, 6, {"b": value}))
    pending.merge(10)
    assert pending.overflowed
