"""What expires when: times to live, the index of what is due, the state's part in it, and the sweeper."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from lab_state._arguments import milliseconds
from lab_state._entries import DELETED, EXPIRED, MISSING, ChangeSet, Expiring, Stored, StoredOrGone
from lab_state._expiry import Expiries
from lab_state._periods import LONGEST_TTL
from lab_state._state import State
from lab_state._sweeper import _KEYS_PER_STEP, Sweeper
from lab_state.exceptions import InvalidValueError
from lab_state.testing import ManualClock

# Times to live


@pytest.mark.parametrize(
    ("ttl", "expected"),
    [
        (1, 1000),
        (0.25, 250),
        (True + 1, 2000),
        (0.001, 1),
        (0.0001, 1),
        (5e-324, 1),
        (1.0005, 1001),
        (59.9999, 60_000),
        (LONGEST_TTL, LONGEST_TTL * 1000),
        (float(LONGEST_TTL), LONGEST_TTL * 1000),
        (timedelta(seconds=1), 1000),
        (timedelta(days=1, milliseconds=5), 86_400_005),
        (timedelta(microseconds=1), 1),
        (timedelta(seconds=LONGEST_TTL), LONGEST_TTL * 1000),
    ],
)
def test_a_ttl_in_milliseconds(ttl: float | timedelta, expected: int) -> None:
    """A ttl in seconds or as a timedelta becomes whole milliseconds, rounded up so that it is never 0."""
    result = milliseconds(ttl)
    assert result == expected
    assert type(result) is int


@pytest.mark.parametrize(
    "ttl",
    [
        *(0, 0.0, -0.0, -1, -1e-9, math.nan, math.inf, -math.inf),
        *(LONGEST_TTL + 1, math.nextafter(LONGEST_TTL, math.inf), 10**400, -(10**400)),
        *(timedelta(0), timedelta(microseconds=-1), timedelta.max, timedelta.min),
    ],
)
def test_a_ttl_out_of_bounds(ttl: float | timedelta) -> None:
    """A ttl that is not above 0 and at most 10,000,000,000 s is refused, and the message says what to do instead."""
    with pytest.raises(InvalidValueError) as caught:
        milliseconds(ttl)
    assert str(caught.value) == (
        "ttl must be above 0 and at most 10000000000 seconds; to delete a key use delete(), "
        "for a key that never expires pass ttl=None"
    )


@pytest.mark.parametrize(
    ("ttl", "name"),
    [
        *((True, "bool"), (False, "bool"), ("1", "str"), (b"1", "bytes"), (None, "NoneType"), ([1], "list")),
        *((Decimal(1), "Decimal"), (Fraction(1), "Fraction"), (1j, "complex")),
    ],
)
def test_a_ttl_of_another_type(ttl: Any, name: str) -> None:
    """What is neither a number of seconds nor a timedelta is refused by its type, without its value."""
    with pytest.raises(TypeError) as caught:
        milliseconds(ttl)
    assert str(caught.value) == f"ttl must be a number of seconds or a timedelta, not {name}"


@given(st.floats(1e-9, 1e9))
def test_a_ttl_is_never_cut_short(seconds: float) -> None:
    """The milliseconds are never fewer than the seconds, and 1 ms more at most, as exactly as a float can tell."""
    more = Fraction(milliseconds(seconds), 1000) - Fraction(seconds)
    error = Fraction(seconds) / 10**15
    assert -error <= more <= Fraction(1, 1000) + error


# The index

NOW = 5_500


def keys_of(buckets: Iterable[Iterable[str]]) -> list[str]:
    return [key for bucket in buckets for key in bucket]


def test_an_index_of_nothing() -> None:
    """A new index is false, and nothing has passed."""
    index = Expiries(NOW)
    assert not index
    assert keys_of(index.passed(10**15)) == []
    assert index.take(10**15, 5) == []


def test_what_may_have_passed() -> None:
    """`passed` names the keys of every second that has begun, oldest first, and none of a later one."""
    index = Expiries(NOW)
    for key, at in {"late": 9_000, "soon": 6_999, "now": 5_600, "past": 10}.items():
        index.add(key, at)
    assert keys_of(index.passed(5_999)) == ["now", "past"]
    assert keys_of(index.passed(6_000)) == ["now", "past", "soon"]
    assert keys_of(index.passed(8_999)) == ["now", "past", "soon"]
    assert keys_of(index.passed(9_000)) == ["now", "past", "soon", "late"]


def test_what_is_taken() -> None:
    """`take` gives the keys of the seconds that are over, and forgets them."""
    index = Expiries(NOW)
    for key, at in {"late": 9_000, "soon": 6_999, "now": 5_600, "past": 10}.items():
        index.add(key, at)
    assert index.take(5_999, 10) == []
    assert index.take(6_000, 10) == ["past", "now"]
    assert index.take(6_999, 10) == []
    assert index.take(1_000_000, 10) == ["soon", "late"]
    assert not index


def test_taking_in_parts() -> None:
    """`take` gives no more than asked for, those of the oldest second first, and the rest the next time."""
    index = Expiries(NOW)
    for number in range(10):
        index.add(f"{number}", 6_000 + number * 300)
    parts = [index.take(20_000, 4) for _ in range(4)]
    assert parts == [["3", "2", "1", "0"], ["6", "5", "4", "9"], ["8", "7"], []]


def test_a_key_has_one_time() -> None:
    """A key that is added again is due at the new time and at no other."""
    index = Expiries(NOW)
    index.add("a", 6_000)
    index.add("a", 8_000)
    assert index.take(7_999, 10) == []
    assert index.take(9_000, 10) == ["a"]
    index.add("b", 12_000)
    index.add("b", 10_000)
    assert index.take(11_000, 10) == ["b"]
    assert index.take(99_000, 10) == []


def test_a_time_that_was_looked_at_before() -> None:
    """A key whose time lies before the seconds that were taken is found by the next look, not never."""
    index = Expiries(NOW)
    index.take(60_000, 10)
    index.add("a", 20_000)
    assert keys_of(index.passed(60_000)) == ["a"]
    assert index.take(61_000, 10) == ["a"]


def test_taking_for_an_earlier_time_changes_nothing() -> None:
    """A look with an earlier time takes nothing and loses nothing."""
    index = Expiries(60_000)
    index.add("a", 61_000)
    assert index.take(1_000, 10) == []
    assert keys_of(index.passed(61_000)) == ["a"]


def test_discard_and_clear() -> None:
    """A key that is discarded, or all that are cleared, are never due; one that was not there is no error."""
    index = Expiries(NOW)
    for key in "abc":
        index.add(key, 6_000)
    index.discard("b")
    index.discard("b")
    index.discard("never there")
    assert keys_of(index.passed(6_000)) == ["a", "c"]
    index.discard("a")
    assert index
    index.discard("c")
    assert not index
    assert index._buckets == {}
    index.add("a", 6_000)
    index.clear()
    assert not index
    assert keys_of(index.passed(10**6)) == []
    index.add("a", 7_000)
    assert index.take(8_000, 10) == ["a"]


def test_a_wide_gap_costs_nothing() -> None:
    """Hundreds of years between two looks are not counted second by second."""
    index = Expiries(0)
    index.add("a", LONGEST_TTL * 1000)
    index.add("b", LONGEST_TTL * 500)
    assert keys_of(index.passed(LONGEST_TTL * 2000)) == ["b", "a"]
    assert index.take(LONGEST_TTL * 2000, 10) == ["b", "a"]


def test_the_first_key_is_told() -> None:
    """`first` is called when a key has come into an empty index, each time it was empty, and for no other key."""
    index = Expiries(NOW)
    calls: list[bool] = []
    index.on_first = lambda: calls.append(bool(index))
    index.add("a", 6_000)
    index.add("b", 6_000)
    index.add("a", 7_000)
    assert calls == [True]
    index.discard("a")
    index.discard("b")
    index.add("a", 6_000)
    assert len(calls) == 2
    index.take(8_000, 10)
    index.add("a", 9_000)
    assert len(calls) == 3
    index.clear()
    index.add("a", 9_000)
    assert len(calls) == 4


TIMES = st.integers(0, 40_000) | st.integers(0, 10**12)
STEPS = st.lists(
    st.tuples(st.just("add"), st.sampled_from("abcdefgh"), TIMES)
    | st.tuples(st.just("discard"), st.sampled_from("abcdefgh"), st.just(0))
    | st.tuples(st.just("clear"), st.just(""), st.just(0))
    | st.tuples(st.just("take"), st.just(""), st.integers(1, 10))
    | st.tuples(st.just("wait"), st.just(""), st.integers(0, 5_000) | st.integers(0, 10**12)),
    max_size=60,
)


@given(st.integers(0, 10**6), STEPS)
def test_an_index_against_a_dict(now: int, steps: list[tuple[str, str, int]]) -> None:
    """Whatever was added, discarded and taken: each key is found once, never too early, and the oldest second first."""
    index = Expiries(now)
    times: dict[str, int] = {}
    model: dict[str, int] = {}  # the second of each key, one that was not looked at yet; in the order of the adds
    looked_at = now // 1000
    for what, key, number in steps:
        if what in ("add", "discard"):
            model.pop(key, None)
        if what == "add":
            times[key] = number
            model[key] = max(number // 1000, looked_at)
            index.add(key, number)
        elif what == "discard":
            index.discard(key)
        elif what == "clear":
            model.clear()
            index.clear()
        elif what == "wait":
            now += number
        else:
            due = [key for key in reversed(list(model)) if model[key] < now // 1000]  # within a second, the last first
            expected = sorted(due, key=model.__getitem__)[:number]
            assert index.take(now, number) == expected
            assert all(times[key] <= now for key in expected)
            model = {key: second for key, second in model.items() if key not in expected}
            looked_at = now // 1000 if len(expected) < number else looked_at
        found = keys_of(index.passed(now))
        assert found == [key for key in sorted(model, key=model.__getitem__) if model[key] <= now // 1000]
        assert {key for key in model if times[key] <= now} <= set(found)
        assert index.due(now) == sum(times[key] <= now for key in model)
        assert bool(index) is bool(model)
    assert sorted(index.take(now + 10**13, 100)) == sorted(model)
    assert not index._buckets


def test_everything_due_is_taken_a_second_later() -> None:
    """A key is taken at the latest in the second after its own, also one that was overdue when it came."""
    for now in range(0, 4_000, 250):
        for at in range(0, 6_000, 250):
            index = Expiries(now)
            index.add("a", at)
            seconds = (second for second in count(now // 1000 + 1) if index.take(second * 1000, 1))
            assert next(seconds) == max(at // 1000, now // 1000) + 1


# The state


class Ticks:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


START = 1_000_000
"""What `State.now` begins with, in milliseconds."""


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def state(ticks: Ticks) -> State:
    """Return two keys that stay, and two that expire a second apart."""
    state = State(ticks, START / 1000)
    state.load(
        {"stays": 1, "list": Raw(b"[1]"), "one": 1, "two": Raw(b"[2]")}, 10, {"one": START + 1, "two": START + 2000}
    )
    return state


class Notes:
    """What a state tells those who watch."""

    def __init__(self, state: State) -> None:
        self.told: list[tuple[str | None, StoredOrGone, int]] = []
        state.on_change = lambda key, changed, revision: self.told.append((key, changed, revision))


def entries_of(state: State) -> dict[str, Stored]:
    return dict(state.entries.items())


def expired(state: State) -> set[str]:
    """Return the entries whose time has come."""
    names = state.names("")
    assert state.count() == len(names)
    return set(state.entries) - set(names)


def test_the_time_of_a_state(ticks: Ticks) -> None:
    """A state begins with the wall clock, and counts the seconds that pass."""
    state = State(ticks, 1000.0)
    assert state.now() == 1_000_000
    ticks.now += 1.5
    assert state.now() == 1_001_500
    assert type(state.now()) is int


def test_alive_until_its_time(state: State, ticks: Ticks) -> None:
    """A value is there until its time has come, to the millisecond, and then missing."""
    expiring = Expiring("x", START + 1000)
    ticks.now += 0.999
    assert state.alive(expiring) == "x"
    ticks.now = 101.0
    assert state.alive(expiring) is MISSING
    assert state.alive(Expiring(None, START + 2000)) is None


def test_a_value_that_expires_is_not_tracked() -> None:
    """The garbage collector looks neither at a value that expires, nor, because of it, at the dict of a state."""
    assert not gc.is_tracked(Expiring(Raw(b"[1]"), START))


def test_loaded_times_are_kept_with_the_values(state: State) -> None:
    """What is loaded with a time is wrapped, indexed, and no change."""
    assert entries_of(state) == {
        "stays": 1,
        "list": Raw(b"[1]"),
        "one": Expiring(1, START + 1),
        "two": Expiring(Raw(b"[2]"), START + 2000),
    }
    assert state.expiries
    assert (state.revision, state.taken, state.changes) == (10, 10, {})


def test_loading_again_forgets_the_times_before(state: State) -> None:
    """What was loaded before has no part in what expires afterwards."""
    state.load({"one": 1}, 20)
    assert not state.expiries
    assert state.has("one")


def test_what_was_overdue_when_it_was_loaded(ticks: Ticks) -> None:
    """A key whose time had come before the start is not there, and is swept like another."""
    state = State(ticks, START / 1000)
    state.load({"a": 1, "b": 2}, 1, {"a": 5})
    assert expired(state) == {"a"}
    assert [state.has(key) for key in "ab"] == [False, True]
    ticks.now += 1
    assert state.sweep(10) == 1
    assert entries_of(state) == {"b": 2}


def test_has_and_expired(state: State, ticks: Ticks) -> None:
    """`has` is false and `expired` names a key from the millisecond on in which it expires; the others stay."""
    keys = ["stays", "list", "one", "two", "never there"]
    assert [state.has(key) for key in keys] == [True, True, True, True, False]
    assert expired(state) == set()
    ticks.now += 0.001
    assert [state.has(key) for key in keys] == [True, True, False, True, False]
    assert expired(state) == {"one"}
    ticks.now = 102.0
    assert [state.has(key) for key in keys] == [True, True, False, False, False]
    assert expired(state) == {"one", "two"}
    assert len(state.entries) == 4


def test_without_times_nothing_is_looked_up(ticks: Ticks) -> None:
    """Where nothing expires, nothing is expired."""
    state = State(ticks)
    state.load({"a": 1}, 1)
    ticks.now += 10**6
    assert state.has("a")
    assert expired(state) == set()
    assert state.sweep(10) == 0


def test_a_sweep_is_one_change(state: State, ticks: Ticks) -> None:
    """A sweep takes away what is due as one change, which says that it expired, and nothing else."""
    notes = Notes(state)
    ticks.now += 3
    assert state.sweep(10) == 2
    assert entries_of(state) == {"stays": 1, "list": Raw(b"[1]")}
    assert (state.revision, state.changes) == (11, {"one": EXPIRED, "two": EXPIRED})
    assert notes.told == [("one", EXPIRED, 11), ("two", EXPIRED, 11)]
    assert not state.expiries
    assert expired(state) == set()


def test_a_sweep_of_nothing_is_no_change(state: State, ticks: Ticks) -> None:
    """A sweep that finds nothing makes no revision."""
    ticks.now += 0.5
    assert state.sweep(10) == 0
    assert (state.revision, state.changes, len(state.entries)) == (10, {}, 4)


def test_a_sweep_in_steps(ticks: Ticks) -> None:
    """A sweep takes as many as it may, the oldest first, each step one change; what is left is gone to readers too."""
    state = State(ticks, START / 1000)
    for number in range(25):
        state.set(f"{number}", Expiring(number, START + 1000 + 100 * number))
    ticks.now += 10
    assert len(expired(state)) == 25
    assert [state.sweep(10) for _ in range(3)] == [10, 10, 5]
    assert state.revision == 28
    assert entries_of(state) == {}
    state.set("a", Expiring(1, START))
    state.set("b", Expiring(1, START))
    ticks.now += 1
    assert state.sweep(1) == 1
    assert len(expired(state)) == 1


def test_a_sweep_leaves_a_value_that_stays(state: State, ticks: Ticks) -> None:
    """A key that was set again, for good or for longer, is not swept at the old time, whichever call set it."""
    state.entries["one"] = state.changes["one"] = "stays"  # as `Calls.set` does
    state.expiries.discard("one")
    state.set_many({"two": "stays too"})
    state.set("a", Expiring(1, START + 1000))
    state.set("a", Expiring(2, START + 60_000))
    ticks.now += 10
    assert expired(state) == set()
    assert state.sweep(10) == 0
    assert [state.has(key) for key in ("one", "two", "a")] == [True, True, True]
    ticks.now += 60
    assert state.sweep(10) == 1
    assert entries_of(state) == {"stays": 1, "list": Raw(b"[1]"), "one": "stays", "two": "stays too"}


def test_a_sweep_asks_the_entry(state: State, ticks: Ticks) -> None:
    """Whatever the index says, what is not there and what stays is not swept."""
    state.set("three", Expiring(3, START + 2000))
    del state.entries["one"]
    state.entries["two"] = "stays"
    ticks.now += 10
    assert not state.has("one")
    assert state.sweep(10) == 3
    assert state.changes == {"three": EXPIRED}
    assert entries_of(state) == {"stays": 1, "list": Raw(b"[1]"), "two": "stays"}


def test_delete_many_does_not_count_what_expired(state: State, ticks: Ticks) -> None:
    """Deleting what has expired is deleting what is not there."""
    ticks.now += 0.5
    assert state.delete_many(["one"]) == 0
    assert state.revision == 10
    assert state.delete_many(["one", "two", "stays"]) == 2
    assert (state.revision, state.changes) == (11, {"two": DELETED, "stays": DELETED})
    ticks.now += 10
    assert state.sweep(10) == 1
    assert entries_of(state) == {"list": Raw(b"[1]")}


def test_clear_does_not_count_what_expired(state: State, ticks: Ticks) -> None:
    """Clearing counts what was there, and leaves nothing that expires."""
    ticks.now += 0.5
    assert state.clear() == 3
    assert (entries_of(state), state.cleared) == ({}, True)
    assert not state.expiries
    state.set("one", 1)
    ticks.now += 10
    assert state.sweep(10) == 0
    assert state.has("one")


@pytest.mark.parametrize("watched", [False, True])
def test_apply_keeps_the_index(state: State, ticks: Ticks, watched: bool) -> None:  # noqa: FBT001
    """What is applied expires, is deleted, or is all that is left after a clear, watched or not."""
    if watched:
        Notes(state)
    state.apply({"one": DELETED, "three": Expiring("x", START + 3000), "four": 4}, cleared=False)
    assert state.changes == {"one": DELETED, "three": Expiring("x", START + 3000), "four": 4}
    ticks.now += 3
    assert expired(state) == {"two", "three"}
    state.apply({"five": Expiring("y", START + 4000), "two": "stays"}, cleared=True)
    assert expired(state) == set()
    ticks.now += 1
    assert expired(state) == {"five"}
    assert entries_of(state) == {"five": Expiring("y", START + 4000), "two": "stays"}


def test_what_expires_is_taken_and_put_back(state: State, ticks: Ticks) -> None:
    """A commit takes times with values, and what has been swept; and the time at which it did."""
    state.set("a", Expiring("x", START + 5000))
    ticks.now += 3
    state.sweep(10)
    taken = state.take()
    expected: dict[str, StoredOrGone] = {"a": Expiring("x", START + 5000), "one": EXPIRED, "two": EXPIRED}
    assert taken == ChangeSet(10, 12, cleared=False, changes=expected, since=100.0, time=START + 3000)
    state.set("one", Expiring("again", START + 9000))
    ticks.now += 3
    state.sweep(10)
    state.put_back(taken)
    expected = {"a": EXPIRED, "one": Expiring("again", START + 9000), "two": EXPIRED}
    assert state.take() == ChangeSet(10, 14, cleared=False, changes=expected, since=100.0, time=START + 6000)


def test_a_view_has_the_times(state: State, ticks: Ticks) -> None:
    """A view stands still with its times while keys expire and are swept, set and deleted beside it."""
    before = entries_of(state)
    view = state.freeze()
    state.set("new", Expiring("x", START + 9000))
    state.set("stays", Expiring("no more", START + 1000))
    ticks.now += 3
    assert expired(state) == {"one", "two", "stays"}
    assert not state.has("one")
    assert state.sweep(10) == 3
    assert entries_of(state) == {"list": Raw(b"[1]"), "new": Expiring("x", START + 9000)}
    assert view == before
    while state.fold(view, 1):
        assert state.has("new")
        assert not state.has("one")
    assert state.entries is view
    assert view == {"list": Raw(b"[1]"), "new": Expiring("x", START + 9000)}


# The sweeper


class Swept:
    """A state with a sweeper, and how often it was told of a change."""

    def __init__(self, expires: Iterable[int] = ()) -> None:
        self.clock = ManualClock(START / 1000)
        self.state = State(self.clock.monotonic, START / 1000)
        times = {f"{number}": at for number, at in enumerate(expires)}
        self.state.load(dict.fromkeys(times, 1), 10, times)
        self.busy = False
        self.told: list[int] = []
        self.sweeper = Sweeper(
            self.state, self.clock, lambda: self.busy, lambda: self.told.append(self.state.revision), lambda: None
        )

    @property
    def timers(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self.clock._timers)


def test_no_timer_where_nothing_expires() -> None:
    """A sweeper of a state in which nothing expires waits for nothing."""
    swept = Swept()
    swept.state.set("a", 1)
    assert swept.timers == 0
    swept.sweeper.stop()


def test_one_timer_for_any_number_of_keys() -> None:
    """The first key that expires starts the sweeper, and a thousand more change nothing."""
    swept = Swept()
    for number in range(1000):
        swept.state.set(f"{number}", Expiring(1, START + 10_000 + number))
        assert swept.timers == 1
    swept.clock.advance(5)
    assert swept.timers == 1
    assert swept.told == []


def test_a_sweeper_rests_when_all_is_swept() -> None:
    """The timer runs as long as something expires, and starts again with the next key."""
    swept = Swept()
    for _ in range(3):
        swept.state.set("a", Expiring(1, swept.state.now() + 1500))
        swept.clock.advance(1)
        assert swept.timers == 1
        swept.clock.advance(2)
        assert entries_of(swept.state) == {}
        assert swept.timers == 0
    assert swept.told == [12, 14, 16]


def test_a_sweeper_of_what_was_loaded() -> None:
    """What was loaded with a time starts the sweeper; a key goes in the second after its own."""
    swept = Swept([START + 500, START + 1500])
    assert swept.timers == 1
    swept.clock.advance(1)
    assert set(swept.state.entries) == {"1"}
    swept.clock.advance(1)
    assert not len(swept.state.entries)
    assert swept.told == [11, 12]


def test_one_timer_after_all_keys_went() -> None:
    """A state that is emptied and filled again before the timer rings still has one timer, and is swept."""
    swept = Swept([START + 500])
    emptied: list[Callable[[], int]] = [lambda: swept.state.delete_many(["0"]), swept.state.clear]
    for empty in emptied:
        assert empty() == 1
        assert not swept.state.expiries
        swept.state.set("0", Expiring(1, START + 500))
        assert swept.timers == 1
    swept.clock.advance(1)
    assert (len(swept.state.entries), swept.timers) == (0, 0)


def test_a_key_that_stays_stops_the_sweeper_at_its_old_time() -> None:
    """A key that was set again for good is looked at once, is no change, and then nothing is left to do."""
    swept = Swept([START + 1500])
    swept.state.set_many({"0": "stays"})
    swept.clock.advance(10)
    assert (swept.timers, swept.told, swept.state.has("0")) == (0, [], True)


def test_many_keys_are_swept_in_steps() -> None:
    """A sweep takes a few hundred keys at a time, one change each, and lets other timers in between."""
    assert _KEYS_PER_STEP <= 1_000
    swept = Swept([START + 500] * (3 * _KEYS_PER_STEP + 1))
    seen: list[int] = []

    def look() -> None:
        seen.append(len(swept.state.entries))
        if len(seen) < 4:
            swept.clock.call_later(0.0, look)

    swept.clock.call_later(1.0, look)
    swept.clock.advance(1)
    assert seen == [2 * _KEYS_PER_STEP + 1, _KEYS_PER_STEP + 1, 1, 0]
    assert swept.told == [11, 12, 13, 14]
    assert swept.timers == 0


def test_no_step_more_than_needed() -> None:
    """Exactly as many keys as one step takes are one change, and the sweeper rests."""
    swept = Swept([START + 500] * _KEYS_PER_STEP)
    swept.clock.advance(1)
    assert (swept.told, swept.timers) == ([11], 0)


def test_a_sweeper_waits_while_someone_is_busy() -> None:
    """Nothing is swept while a transaction is open; as soon as it is over, it is."""
    swept = Swept([START + 500])
    swept.busy = True
    swept.clock.advance(5)
    assert (len(swept.state.entries), swept.timers, swept.told) == (1, 0, [])
    swept.state.set("new", Expiring(1, START + 60_000))
    assert swept.timers == 0
    swept.busy = False
    swept.sweeper.resume()
    assert (len(swept.state.entries), swept.timers, swept.told) == (1, 1, [12])
    swept.sweeper.resume()  # nothing was put off
    assert swept.timers == 1


def test_a_sweeper_that_was_stopped_while_it_put_something_off() -> None:
    """What was put off is not done after the stop."""
    swept = Swept([START + 500])
    swept.busy = True
    swept.clock.advance(5)
    swept.sweeper.stop()
    swept.busy = False
    swept.sweeper.resume()
    assert (len(swept.state.entries), swept.timers, swept.told) == (1, 0, [])


@pytest.mark.parametrize("expires", [[], [START + 500]], ids=["resting", "armed"])
def test_a_sweeper_that_was_stopped(expires: list[int]) -> None:
    """After a stop nothing is swept, no timer is left, and new keys start none; whether it rested or not."""
    swept = Swept(expires)
    swept.sweeper.stop()
    swept.state.clear()
    swept.state.set("a", Expiring(1, START + 500))
    assert swept.timers == 0
    swept.clock.advance(10)
    assert (len(swept.state.entries), swept.told) == (1, [])


# The sweeper, while there is a watch


def watched(expires: Iterable[int] = ()) -> Swept:
    swept = Swept(expires)
    swept.sweeper.attend(True)
    return swept


def test_watched_keys_are_swept_at_their_time() -> None:
    """Each key goes within 50 ms of its time, and not before; also one that came in while another was waited for."""
    swept = watched([START + 1_400])
    swept.state.set("soon", Expiring(1, START + 700))
    swept.state.set("sooner", Expiring(1, START + 300))
    for at, gone in ((300, "sooner"), (700, "soon"), (1_400, "0")):
        swept.clock.advance((START + at - 1 - swept.state.now()) / 1000)
        assert gone in swept.state.entries
        swept.clock.advance(0.051)
        assert gone not in swept.state.entries
    assert swept.timers == 0
    assert len(swept.told) == 3


def test_watched_keys_of_later_seconds_are_swept_at_their_time() -> None:
    """The keys of later seconds are found in time, with a look at each second."""
    swept = watched([START + second * 1000 + 250 for second in range(10)])
    for second in range(10):
        swept.clock.advance((START + second * 1000 + 249 - swept.state.now()) / 1000)
        assert f"{second}" in swept.state.entries
        swept.clock.advance(0.051)
        assert f"{second}" not in swept.state.entries
    assert swept.timers == 0


def test_watched_keys_that_are_due_together_are_swept_together() -> None:
    """A thousand keys in a second cost fifty sweeps at most, and one timer."""
    swept = watched([START + number for number in range(1, 1001)])
    swept.clock.advance(1.05)
    assert entries_of(swept.state) == {}
    assert len(swept.told) <= 53


@pytest.mark.parametrize("later", [0, 1_000, 2_000])
def test_many_watched_keys_are_looked_for_in_steps(later: int) -> None:
    """Of 5,000 keys in one second, 500 are put in order at once; all are swept at their time all the same."""
    swept = watched([START + later + 900] * 5_000)
    assert len(swept.state.expiries._heap or ()) == _KEYS_PER_STEP
    assert swept.timers == 1
    swept.clock.advance((later + 899) / 1000)
    assert len(swept.state.entries) == 5_000
    swept.clock.advance(0.051)
    assert entries_of(swept.state) == {}


def test_what_changes_while_it_is_looked_for() -> None:
    """Keys that are deleted, kept for good or get another time between the steps are swept when they are due, or not."""
    swept = watched([START + 900] * 1_500)
    swept.state.delete_many(["0"])
    swept.state.set("1", 1)
    swept.state.set("2", Expiring(1, START + 1_200))
    swept.clock.advance(0.95)
    assert set(entries_of(swept.state)) == {"1", "2"}
    swept.clock.advance(0.3)
    assert set(entries_of(swept.state)) == {"1"}


def test_watched_keys_that_change_are_swept_at_their_last_time() -> None:
    """A key that is set again, deleted or kept for good is not swept at its old time."""
    swept = watched()
    for key in ("again", "deleted", "kept", "all"):
        swept.state.set(key, Expiring(1, START + 300))
    swept.state.set("again", Expiring(1, START + 800))
    swept.state.delete_many(["deleted"])
    swept.state.set("kept", 1)
    swept.clock.advance(0.35)
    assert set(swept.state.entries) == {"again", "kept"}
    swept.clock.advance(0.5)
    assert set(swept.state.entries) == {"kept"}


def test_what_was_left_behind_by_many_changes_is_passed_over_in_steps() -> None:
    """A key that was set 10,000 times with the same end leaves as many places behind, and goes at its time."""
    swept = watched()
    for number in range(10_000):
        swept.state.set("a", Expiring(1, START + 300 + number % 2))
    swept.clock.advance(0.35)
    assert entries_of(swept.state) == {}
    assert swept.timers == 0


def test_clearing_a_watched_state() -> None:
    """Nothing is swept of what was cleared, also amid the steps; what is set later goes at its time."""
    swept = watched([START + 900] * 1_500)
    swept.state.clear()
    swept.state.set("a", Expiring(1, START + 400))
    swept.clock.advance(0.45)
    assert entries_of(swept.state) == {}
    assert swept.told[-1] == swept.state.revision


def test_a_watched_sweep_waits_for_a_transaction() -> None:
    """A key whose time comes while a transaction is open goes when that is over."""
    swept = watched([START + 300])
    swept.busy = True
    swept.clock.advance(0.7)
    assert set(swept.state.entries) == {"0"}
    swept.busy = False
    swept.sweeper.resume()
    assert entries_of(swept.state) == {}


def test_when_nobody_watches_any_more() -> None:
    """Keys go with their second again, and nothing is kept in order."""
    swept = watched([START + 1_300])
    swept.sweeper.attend(False)
    assert swept.state.expiries._heap is None
    swept.clock.advance(1.4)
    assert set(swept.state.entries) == {"0"}
    swept.clock.advance(1.6)
    assert entries_of(swept.state) == {}
    assert swept.state.expiries.load(swept.state.now(), 1) is False


def test_watches_that_are_opened_all_the_time_put_nothing_off() -> None:
    """What is overdue is swept within a second, however often a watch is opened and left."""
    swept = Swept([START - 5_000])
    for _ in range(11):
        swept.sweeper.attend(True)
        swept.clock.advance(0.1)
        swept.sweeper.attend(False)
    assert entries_of(swept.state) == {}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(1, 4_000), st.integers(0, 1_500)), max_size=30)
)
def test_watched_keys_are_there_until_their_time_and_no_longer(steps: list[tuple[str, int | None, int]]) -> None:
    """Whatever was set, set again and deleted before: no key goes early, and none stays 50 ms longer."""
    swept = watched()
    times: dict[str, int] = {}
    for key, ttl, passes in steps:
        if ttl is None:
            swept.state.delete_many([key] if key in swept.state.entries else [])
            times.pop(key, None)
        else:
            times[key] = swept.state.now() + ttl
            swept.state.set(key, Expiring(1, times[key]))
        swept.clock.advance(passes / 1000)
        now = swept.state.now()
        assert {key for key, at in times.items() if at > now} <= set(swept.state.entries)
        assert set(swept.state.entries) <= {key for key, at in times.items() if at > now - 50}


def test_a_stopped_sweeper_has_no_timer() -> None:
    """After its end, a watch that is left, and what the index calls, arm none."""
    swept = watched([START + 300])
    swept.sweeper.stop()
    swept.sweeper.attend(False)
    assert swept.timers == 0


def test_overdue_keys_are_found_and_stay() -> None:
    """The owner of a shared state sweeps keys that stay in the index until the sweep is durable."""
    index = Expiries(0)
    for key, at in {"a": 500, "b": 1_500, "c": 2_100, "d": 9_000}.items():
        index.add(key, at)
    assert index.overdue(2_200, 9) == ["a", "b"]
    assert index.overdue(2_200, 1) == ["a"]
    assert index.overdue(2_200, 9) == ["a", "b"]
    assert index.due(2_200) == 3
    index.discard("a")
    index.discard("b")
    assert index.overdue(2_200, 9) == []


def test_overdue_keys_are_found_at_their_exact_time() -> None:
    """While there is a watch, keys of this second are found too. Items of removed keys leave the heap."""
    index = Expiries(0)
    index.attend(wanted=True)
    for key, at in {"a": 500, "b": 2_050, "c": 2_100, "d": 2_900}.items():
        index.add(key, at)
    assert not index.load(2_000, 9)
    assert index.overdue(2_200, 9) == ["a", "b", "c"]
    assert index.overdue(2_200, 2) == ["a", "b"]
    assert index.nearest() == 2_050
    index.discard("b")
    index.add("c", 7_000)
    assert index.overdue(2_200, 9) == ["a"]
    assert index.nearest() == 2_900
    assert index.take(9_000, 9) == ["a", "d", "c"]


def test_a_search_begins_where_the_last_one_ended() -> None:
    """`advance` skips the seconds without keys, and no key is missed. A key that is added late is found, too."""
    index = Expiries(0)
    index.add("a", 5_000)
    index.advance(3_900)
    assert index._next == 3
    index.advance(8_000)
    index.advance(7_000)
    assert index._next == 5
    assert index.due_keys(8_000) == ["a"]
    index.discard("a")
    index.advance(8_000)
    assert index._next == 8
    index.add("late", 6_000)
    assert index.due_keys(8_000) == ["late"]
    index.advance(9_000)
    assert index.overdue(9_000, 9) == ["late"]
