"""Which generations are deleted: by age, by size, and never more than two for each one that was added."""

from __future__ import annotations

import pytest

from lab_state.storage._limits import Held, Limits, to_prune

DAY = 24 * 3600 * 1000


def of(*walls: int, size: int = 10) -> list[Held]:
    return [Held(wall, size) for wall in walls]


@pytest.mark.parametrize(
    ("now", "number"),
    [(400, 0), (1199, 0), (1200, 0), (1201, 1), (1300, 1), (1301, 2), (1401, 3), (10**6, 3)],
)
def test_by_age(now: int, number: int) -> None:
    """A generation is deleted when the next one began before the history. The one in use is the next one of the newest."""
    assert to_prune(of(100, 200, 300), 400, Limits(1000, None), now, added=9) == number


@pytest.mark.parametrize(("most", "number"), [(None, 0), (30, 0), (29, 1), (20, 1), (19, 2), (9, 3), (1, 3)])
def test_by_size(most: int | None, number: int) -> None:
    """All generations together have at most the number of bytes that is the limit."""
    assert to_prune(of(100, 200, 300), 400, Limits(DAY, most), 500, added=9) == number


@pytest.mark.parametrize(("added", "number"), [(0, 0), (1, 2), (2, 4), (3, 5)])
@pytest.mark.parametrize("limits", [Limits(1, None), Limits(DAY, 1)])
def test_at_most_two_for_each_that_was_added(limits: Limits, added: int, number: int) -> None:
    """A clock that is set forward by a year does not empty the history."""
    now = 365 * DAY if limits.most_bytes is None else 600
    assert to_prune(of(100, 200, 300, 400, 500), 600, limits, now, added) == number


def test_a_clock_that_was_set_back() -> None:
    """A time in the future says nothing. The next time that has passed takes its place."""
    assert to_prune(of(100, 10**9, 300), 400, Limits(1000, None), 1250, added=9) == 0
    assert to_prune(of(100, 10**9, 300), 400, Limits(1000, None), 1301, added=9) == 2
    assert to_prune(of(10**9, 10**9), 10**9, Limits(1000, None), 1301, added=9) == 0


def test_a_time_that_is_not_recorded() -> None:
    """It is not known to be old. The next recorded time takes its place."""
    assert to_prune(of(100, 0, 300), 400, Limits(1000, None), 1250, added=9) == 0
    assert to_prune(of(100, 0, 300), 400, Limits(1000, None), 1301, added=9) == 2
    assert to_prune(of(0, 0), 0, Limits(1000, None), 1301, added=9) == 0


def test_no_generations() -> None:
    """An empty history has nothing to delete."""
    assert to_prune([], 400, Limits(1, 1), 10**6, added=5) == 0
