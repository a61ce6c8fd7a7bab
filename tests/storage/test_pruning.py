"""Which generations of a history are deleted: those that are too old or too many, and never more than a few at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_state._journal import ANY_BASE, NO_BASE
from lab_state.storage._generations import HistoryFile, journal_file, snapshot_file
from lab_state.storage._limits import Limits
from lab_state.storage._pruning import Deletions, InUse, counted, deletions

IN_USE = InUse("99-00000099", "f" * 16, 1000)
NOW = 2000


def deleted(
    sizes: dict[HistoryFile, int], *, oldest: int = 0, most_bytes: int | None = None, added: int = 9
) -> Deletions:
    """Decide at `NOW`. Generations before `oldest` are too old."""
    return deletions(sizes, IN_USE, limits=Limits(NOW - oldest, most_bytes), now=NOW, added=added)


def snapshot(number: int, *, wall: int | None = None) -> HistoryFile:
    return snapshot_file(number, number if wall is None else wall, f"{number}-{number:08d}")


def journal(number: int, salt: str = "", *, base: str | None = None) -> HistoryFile:
    return journal_file(number, number, f"{number}-{number:08d}" if base is None else base, salt or f"{number:016x}")


def files(*numbers: int) -> dict[HistoryFile, int]:
    """Return generations of 30 bytes each: the first revision and the time of each one is its number."""
    sizes = {snapshot(number): 10 for number in numbers}
    return sizes | {journal(number): 20 for number in numbers}


def gone(*numbers: int) -> Deletions:
    return Deletions(tuple(map(journal, numbers)), tuple(map(snapshot, numbers)))


@pytest.mark.parametrize(
    ("oldest", "expected"),
    [(0, ()), (2, ()), (3, (1,)), (4, (1, 2)), (1000, (1, 2, 3)), (1001, (1, 2, 3, 4))],
)
def test_a_generation_is_kept_until_the_next_one_is_too_old(oldest: int, expected: tuple[int, ...]) -> None:
    """So each moment since then can be reached: the next one of the newest is the one in use."""
    assert deleted(files(1, 2, 3, 4), oldest=oldest) == gone(*expected)


@pytest.mark.parametrize(
    ("most_bytes", "expected"), [(120, ()), (119, (1,)), (90, (1,)), (89, (1, 2)), (1, (1, 2, 3, 4))]
)
def test_the_oldest_generations_go_if_there_are_too_many_bytes(most_bytes: int, expected: tuple[int, ...]) -> None:
    """The bytes of the generation in use do not count."""
    sizes = files(1, 2, 3, 4) | {snapshot(99): 1000}
    assert deleted(sizes, most_bytes=most_bytes) == gone(*expected)


@pytest.mark.parametrize(("added", "expected"), [(0, ()), (1, (1, 2)), (2, (1, 2, 3, 4))])
def test_two_go_for_each_one_that_was_added(added: int, expected: tuple[int, ...]) -> None:
    """A clock that was set forward by mistake does not empty the history."""
    assert deleted(files(1, 2, 3, 4), oldest=NOW, most_bytes=1, added=added) == gone(*expected)


def test_a_time_that_is_not_recorded_is_not_old() -> None:
    """The time of the next generation takes its place."""
    sizes = {snapshot(1): 1, snapshot(2, wall=0): 1, snapshot(3): 1}
    assert deleted(sizes, oldest=3).snapshots == ()
    assert deleted(sizes, oldest=5).snapshots == (snapshot(1), snapshot(2, wall=0))


def test_a_snapshot_goes_with_all_its_journals() -> None:
    """A journal that was copied after a crash has the same snapshot as the copy."""
    copy = journal(1, "c" * 16)
    found = deleted(files(1, 2) | {copy: 5}, oldest=3)
    assert found == Deletions((journal(1), copy), (snapshot(1),))


@pytest.mark.parametrize("base", [ANY_BASE, NO_BASE])
def test_a_journal_without_a_base_is_a_generation(base: str) -> None:
    """It needs no snapshot."""
    sizes = {journal(1, base=base): 5, **files(2)}
    assert counted(sizes, IN_USE) == (2, 35)
    assert deleted(sizes, oldest=3) == Deletions((journal(1, base=base),), ())


def test_a_journal_without_its_snapshot_goes() -> None:
    """It cannot be read. No limit holds for it, and it is no generation."""
    sizes = {journal(1): 5, **files(2)}
    assert counted(sizes, IN_USE) == (1, 30)
    assert deleted(sizes, added=0) == Deletions((journal(1),), ())


def test_generations_with_the_same_first_revision() -> None:
    """The one with later records is the newest. The clock was set back after the others were made."""
    whole = journal_file(5, 900, ANY_BASE, "a" * 16)
    alone = snapshot_file(5, 800, "7-00000007")
    with_records = {snapshot(5, wall=10): 10, journal(5): 20}
    sizes = {**with_records, alone: 10, whole: 10}
    assert deleted(sizes, most_bytes=40) == Deletions((), (alone,))
    assert deleted(sizes, most_bytes=30) == Deletions((whole,), (alone,))
    assert deleted(sizes, most_bytes=1) == Deletions((whole, journal(5)), (alone, snapshot(5, wall=10)))


def test_revisions_that_began_again() -> None:
    """The generations of a removed state are older than those of a new one with the same name, although their revisions are higher."""
    old = {snapshot_file(number, number, f"1-{number:08d}"): 10 for number in (57, 80)}
    new = {snapshot_file(number, 500 + number, f"2-{number:08d}"): 10 for number in (0, 20)}
    in_use = IN_USE._replace(first=40)
    for length, most_bytes, number in ((NOW - 100, None, 1), (NOW - 505, None, 2), (NOW, 30, 1), (NOW, 20, 2)):
        found = deletions({**new, **old}, in_use, limits=Limits(length, most_bytes), now=NOW, added=9)
        assert list(found.snapshots) == list(old)[:number]


def test_the_files_in_use_stay() -> None:
    """A crash may leave links to them: to the snapshot, to its journal, or to a journal that starts with the whole state."""
    linked = {snapshot(99): 1, journal(99): 1, journal(9, "f" * 16, base=ANY_BASE): 1, journal(8, base=IN_USE.base): 1}
    for file in linked:
        assert deleted({file: 1}, oldest=NOW, most_bytes=1) == Deletions((), ())
        assert counted({file: 1}, IN_USE) == (0, 0)


@given(
    sizes=st.lists(st.integers(0, 50), max_size=12),
    walls=st.lists(st.integers(0, 40), min_size=12, max_size=12),
    oldest=st.integers(0, 60),
    most_bytes=st.none() | st.integers(1, 200),
    added=st.integers(0, 5),
)
def test_only_what_a_rule_lets_go_is_deleted(
    sizes: list[int], walls: list[int], oldest: int, most_bytes: int | None, added: int
) -> None:
    """The next recorded time after each deleted generation is old, or those that are not older have too many bytes."""
    kept = {snapshot(number + 1, wall=walls[number]): size for number, size in enumerate(sizes)}
    order = list(kept)
    found = deleted(kept, oldest=oldest, most_bytes=most_bytes, added=added).snapshots
    assert len(found) <= 2 * added
    assert list(found) == [file for file in order if file in found]
    for number, file in enumerate(order):
        if file in found:
            ended = next((later.wall for later in order[number + 1 :] if later.wall > 0), IN_USE.wall)
            rest = sum(size for other, size in kept.items() if other not in found or other.first >= file.first)
            assert ended < oldest or (most_bytes is not None and rest > most_bytes)
