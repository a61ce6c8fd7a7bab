"""The window of recent changes: whether something that a call has read has changed."""

from __future__ import annotations

from collections.abc import Generator

from hypothesis import given
from hypothesis import strategies as st

from lab_state.shared._checks import RecentChanges


def _run(steps: Generator[None, None, bool]) -> bool:
    """Run all steps, and return the result."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return bool(end.value)


def test_a_key_that_changed_since() -> None:
    """A check does not hold if one of its keys changed after its revision, also if the key was missing."""
    recent = RecentChanges(4)
    recent.note(["a", "b"], 5)
    recent.note(["a"], 7)
    assert recent.hold(7, ["a", "b"], [])
    assert not recent.hold(6, ["a"], [])
    assert recent.hold(6, ["b", "missing"], [])
    assert not recent.hold(4, ["b"], [])


def test_a_prefix_with_a_key_that_changed_since() -> None:
    """A check does not hold if a key under one of its prefixes changed. The empty prefix has all keys under it."""
    recent = RecentChanges(0)
    recent.note(["users/1"], 1)
    recent.note(["rooms/1"], 2)
    assert not recent.hold(0, [], ["users/"])
    assert not recent.hold(1, [], ["users/", "rooms/"])
    assert recent.hold(1, [], ["users/"])
    assert not recent.hold(1, [], [""])
    assert recent.hold(2, [], [""])


def test_a_prefix_with_a_key_that_changed_since_in_steps() -> None:
    """In steps, a check of a prefix does not hold either."""
    recent = RecentChanges(0)
    recent.note(["users/1"], 1)
    recent.note(["rooms/1"], 2)
    assert not _run(recent.hold_in_steps(0, [], ["users/"]))
    assert _run(recent.hold_in_steps(1, [], ["users/"]))


def test_a_check_below_the_floor_does_not_hold() -> None:
    """What changed before the window cannot be known, so such a check is refused."""
    recent = RecentChanges(4)
    assert not recent.hold(3, ["a"], [])
    assert not recent.hold(-1, [], ["x"])
    assert recent.hold(4, ["a"], [])


def test_a_check_of_nothing_holds() -> None:
    """A call that read nothing rests on nothing, whatever its revision is."""
    recent = RecentChanges(4)
    recent.note_clear(9)
    assert recent.hold(-1, [], [])


def test_a_clear_changes_every_key() -> None:
    """After a clear, each check of an older revision is refused, also of a key that was missing."""
    recent = RecentChanges(0)
    recent.note(["a"], 1)
    recent.note_clear(2)
    assert not recent.hold(1, ["never seen"], [])
    assert recent.hold(2, ["a"], [""])
    assert len(recent) == 0


def test_the_window_is_bounded() -> None:
    """The keys that changed longest ago leave the window, and the floor rises to the revision of the last of them."""
    recent = RecentChanges(0, most=2)
    recent.note(["a"], 1)
    recent.note(["b"], 2)
    recent.note(["a"], 3)
    assert (len(recent), recent.floor) == (2, 0)
    recent.note(["c"], 4)
    assert (len(recent), recent.floor) == (2, 2)
    assert not recent.hold(1, ["other"], [])
    assert recent.hold(2, ["b"], [])
    assert not recent.hold(2, ["a"], [])


def test_more_keys_than_the_window_has() -> None:
    """A change of more keys than are kept counts as a change of all keys."""
    recent = RecentChanges(0, most=2)
    recent.note(["a", "b", "c"], 1)
    assert (len(recent), recent.floor) == (0, 1)
    assert not recent.hold(0, ["d"], [])
    assert recent.hold(1, ["a"], [])


KEYS = ["a", "a/1", "a/2", "b", "b/1"]


@given(
    st.lists(st.one_of(st.none(), st.lists(st.sampled_from(KEYS), min_size=1, unique=True)), max_size=20),
    st.integers(1, 4),
    st.integers(-1, 20),
    st.lists(st.sampled_from(KEYS), unique=True),
    st.lists(st.sampled_from(["", "a", "a/", "c"]), unique=True),
)
def test_against_all_changes(
    changes: list[list[str] | None], most: int, since: int, keys: list[str], prefixes: list[str]
) -> None:
    """A check that holds read nothing that changed. At or above the floor, one that read nothing that changed holds."""
    recent = RecentChanges(0, most)
    for revision, changed in enumerate(changes, 1):
        if changed is None:
            recent.note_clear(revision)
        else:
            recent.note(changed, revision)
    assert len(recent) <= most
    after = changes[max(since, 0) :]
    touched = any(
        changed is None or key in keys or key.startswith(tuple(prefixes))
        for changed in after
        for key in (changed or [""])
    )
    holds = recent.hold(since, keys, prefixes)
    if not keys and not prefixes:
        assert holds
    elif holds:
        assert since >= 0
        assert not touched
    elif since >= recent.floor:
        assert touched
