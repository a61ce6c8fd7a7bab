"""The last records of an owner: which ones are kept, and for which copies they are enough."""

from __future__ import annotations

from lab_state.shared._last_records import LastRecords


def record(start: int, end: int, size: int = 100) -> bytes:
    head, tail = b'{"from":%d,"to":%d,"clear":false,"set":{"a":"' % (start, end), b'"},"delete":[],"expires":{}}'
    return head.ljust(size - len(tail), b"x") + tail


def test_a_copy_gets_the_records_that_it_lacks() -> None:
    """They are in order. A record that starts below the copy and ends above it is one of them."""
    first, second, third = record(3, 5), record(5, 8), record(8, 9)
    kept = LastRecords([first, second], 8)
    kept.add(8, 9, third)
    assert kept.after(3) == [first, second, third]
    assert kept.after(5) == [second, third]
    assert kept.after(6) == [second, third]
    assert kept.after(8) == [third]
    assert kept.after(9) == []


def test_an_older_copy_has_to_load() -> None:
    """The owner does not have all records that it lacks. The same holds for a copy that is ahead of the owner."""
    kept = LastRecords([record(3, 5)], 5)
    assert kept.after(2) is None
    assert kept.after(6) is None


def test_without_records_only_the_same_revision_is_enough() -> None:
    """A state whose journal was empty has nothing to send."""
    kept = LastRecords([], 5)
    assert kept.after(5) == []
    assert kept.after(4) is None
    assert kept.after(6) is None


def test_the_oldest_records_are_dropped() -> None:
    """The records have a bound together, both those that were recovered and later ones."""
    recovered = [record(number, number + 1) for number in range(5)]
    kept = LastRecords(recovered, 5, most=300)
    assert kept.after(1) is None
    assert kept.after(2) == recovered[2:]
    kept.add(5, 6, record(5, 6))
    assert kept.after(2) is None
    assert kept.after(3) == [*recovered[3:], record(5, 6)]


def test_a_record_above_the_bound_is_not_kept() -> None:
    """A copy below it has to load, and a copy that has it goes on."""
    kept = LastRecords([record(3, 4), record(4, 5, 301)], 5, most=300)
    assert kept.after(3) is None
    kept.add(5, 6, record(5, 6))
    assert kept.after(5) == [record(5, 6)]
    kept.add(6, 7, record(6, 7, 301))
    assert kept.after(6) is None
    assert kept.after(7) == []
