"""The checker of the six facts: it accepts a right history, and finds what is wrong in each wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from round_calls import Effect, digits, explains
from round_facts import Broken, check
from round_history import ABSENT, Began, Durable, Ended, Event, Gone, Kind, Note, Outcome, Process, Saw, encode, read


class Tale:
    """A history that is made up. Each event is later than the one before it."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {"a": [], "b": []}
        self.values: dict[str, Any] = {}
        self._calls: dict[str, str] = {}
        self._now = 0

    def add(self, process: str, event: Any) -> None:
        """Append an event."""
        self.events[process].append(event)

    def now(self) -> int:
        """Return a later time."""
        self._now += 1_000_000
        return self._now

    def begin(self, process: str, call: str, kind: Kind, *keys: str, digit: int = -1, wanted: int = 0) -> None:
        """Begin a call."""
        self._calls[call] = process
        self.add(process, Began(call, kind, list(keys), self.now(), digit, wanted))

    def end(
        self, call: str, result: Any = None, revision: int | None = None, seen: int | None = None, how: Outcome = "ok"
    ) -> None:
        """End a call."""
        process = self._calls[call]
        if seen is None:
            seen = max(event.revision for event in self.events[process] if isinstance(event, Saw))
        self.add(process, Ended(call, self.now(), how, seen, result, revision))

    def commit(self, revision: int, **changes: Any) -> None:
        """Let both processes show a revision. A key `s_0` means `s/0`; `None` deletes it."""
        self.values = {**self.values, **{key.replace("_", "/"): value for key, value in changes.items()}}
        self.values = {key: value for key, value in self.values.items() if value is not ABSENT}
        self.add("a", Durable(self.now(), revision))
        for process in self.events:
            self.add(process, Saw(self.now(), revision, dict(self.values), {"e/0": "x1"} if revision == 2 else {}))

    def one(self, kind: type[Any], process: str = "", **wanted: Any) -> Any:
        """Return the first event with these attributes."""
        for name, events in self.events.items():
            for event in events:
                matches = all(getattr(event, field, None) == value for field, value in wanted.items())
                if isinstance(event, kind) and process in {"", name} and matches:
                    return event
        raise AssertionError(f"no {kind.__name__} with {wanted}")

    def broken(self) -> list[Broken]:
        """Check the history."""
        return check([Process(name, events) for name, events in self.events.items()])


def told() -> Tale:
    """Return a right history with a call of each kind, and of each outcome."""
    tale = Tale()
    for process in tale.events:
        tale.add(process, Saw(tale.now(), 0, {}))
    tale.begin("a", "a1", "incr", "n/0", digit=0)
    tale.commit(1, n_0=1)
    tale.end("a1", 1, 1)
    tale.begin("a", "a2", "expire", "e/0")
    tale.commit(2)
    tale.end("a2", 2, 2)
    # A record with four calls, of which two change the same key, and one saw what was not durable.
    tale.begin("a", "a3", "append", "l/0")
    tale.begin("b", "b1", "append", "l/0")
    tale.begin("b", "b2", "set", "s/0")
    tale.begin("a", "a4", "delete", "s/0")
    tale.begin("a", "a5", "add", "s/0")
    tale.begin("b", "b3", "get_or_set", "s/0")
    tale.commit(6, l_0=["b1", "a3"], s_0="a5")
    tale.end("b1", ["b1"], 6)
    tale.end("a3", ["b1", "a3"], 6)
    tale.end("b2", 6, 6)
    tale.end("a4", result=True, revision=6)
    tale.end("a5", result=True, revision=6)
    tale.end("b3", "b2", 4)
    # Calls that change nothing, at a revision that is shown
    tale.begin("b", "b4", "add", "s/0")
    tale.end("b4", result=False, revision=6)
    tale.begin("b", "b5", "get_or_set", "s/0")
    tale.end("b5", "a5")
    tale.begin("a", "a6", "claim", "s/0")
    tale.end("a6", "a5", 6)
    tale.begin("a", "a7", "pop", "s/1")
    tale.end("a7", ABSENT, 6)
    tale.begin("a", "a8", "look", "s/0", "l/0", "s/1")
    tale.end("a8", {"s/0": "a5", "l/0": ["b1", "a3"], "s/1": ABSENT}, 6)
    tale.begin("b", "b6", "catch_up")
    tale.end("b6")
    tale.begin("b", "b7", "wait", wanted=6)
    tale.end("b7")
    tale.begin("a", "a9", "mismatch", "t/text")
    tale.end("a9", how="raised")
    tale.begin("a", "a10", "raise", "l/0")
    tale.end("a10", how="raised")
    # Several keys
    tale.begin("a", "a11", "append_both", "l/0", "l/1")
    tale.commit(8, l_0=["b1", "a3", "a11"], l_1=["a11"])
    tale.end("a11", [["b1", "a3"], []], 8)
    tale.begin("b", "b8", "set_many", "s/1", "s/2")
    tale.commit(10, s_1="b8", s_2="b8")
    tale.end("b8", 10, 10)
    tale.begin("b", "b9", "delete_all", "s/")
    tale.commit(13, s_0=None, s_1=None, s_2=None)
    tale.end("b9", 3, 13)
    tale.begin("a", "a12", "claim", "s/1")
    tale.commit(14, s_1="a12")
    tale.end("a12", ABSENT, 14)
    tale.begin("b", "b10", "pop", "s/1")
    tale.commit(15, s_1=None)
    tale.end("b10", "a12", 15)
    # Numbers
    tale.begin("b", "b11", "incr", "n/0", digit=2)
    tale.begin("a", "a13", "incr", "n/0", digit=1)
    tale.commit(17, n_0=1 + 4 + 16)
    tale.end("a13", 5, 17)
    tale.end("b11", 21, 17)
    # Calls without a certain outcome, of which one is there and one is not, and one that was not made
    tale.begin("a", "a14", "append", "l/1")
    tale.begin("a", "a15", "append", "l/1")
    tale.begin("a", "a16", "append", "l/1")
    tale.begin("b", "b12", "set", "s/1")
    tale.commit(18, l_1=["a11", "a14"])
    tale.end("a14", how="unknown")
    tale.end("a15", how="unknown")
    tale.end("a16", how="not made")
    tale.commit(19, s_1="b12")
    tale.add("b", Gone(tale.now(), "killed"))
    tale.add("a", Note(tale.now(), "a note"))
    tale.add("a", Saw(tale.now(), 19, dict(tale.values)))
    tale.add("a", Gone(tale.now(), "stopped"))
    return tale


def test_a_right_history_is_accepted() -> None:
    """The checker finds nothing in it, and it has each kind of call."""
    tale = told()
    assert tale.broken() == []
    kinds = {event.kind for events in tale.events.values() for event in events if isinstance(event, Began)}
    assert kinds == set(Kind.__args__)  # type: ignore[attr-defined]


def lower_revision(tale: Tale) -> None:
    """Let a call have a lower revision than one that had returned."""
    tale.one(Ended, call="a12").revision = 13


def lower_read(tale: Tale) -> None:
    """Let a call that changed nothing have a lower revision than a call that had returned."""
    tale.one(Ended, call="b4").revision = 2


def lags(tale: Tale) -> None:
    """Let `catch_up` return too early."""
    tale.one(Ended, call="b6").seen = 2


def waits_too_short(tale: Tale) -> None:
    """Let `wait_revision` return too early."""
    tale.one(Began, call="b7").wanted = 7


def no_revision(tale: Tale) -> None:
    """Let a call that returned have no revision."""
    tale.one(Ended, call="a5").revision = None


def goes_back(tale: Tale) -> None:
    """Let a process show an older state."""
    tale.events["a"].insert(-1, Saw(tale.now(), 1, {"n/0": 1}))


def differs(tale: Tale) -> None:
    """Let two processes show different states at one revision."""
    tale.one(Saw, "b", revision=10).values["s/2"] = "b2"


def not_durable(tale: Tale) -> None:
    """Let a process show a revision before it was durable."""
    tale.one(Durable, revision=8).at += 10_000_000


def never_durable(tale: Tale) -> None:
    """Let the last revision never become durable."""
    tale.events["a"].remove(tale.one(Durable, revision=19))


def own_call_is_missing(tale: Tale) -> None:
    """Let a call return before its process shows it."""
    tale.one(Ended, call="b8").seen = 8


def own_call_is_forgotten(tale: Tale) -> None:
    """Let a process show a state without a call that it had completed."""
    seen = tale.one(Saw, "b", revision=8)
    tale.events["b"].remove(seen)
    end = tale.one(Ended, call="b8")
    tale.events["b"].insert(tale.events["b"].index(end) + 1, Saw(end.at + 1, 8, seen.values))


def reads_another_value(tale: Tale) -> None:
    """Let a read of the copy return a value that the process did not show."""
    tale.one(Ended, call="b5").result = "b2"


def sees_two_states(tale: Tale) -> None:
    """Let a transaction see values of two states."""
    tale.one(Ended, call="a8").result["s/1"] = "b8"


def list_loses(tale: Tale) -> None:
    """Let a list lose an element."""
    for process in "ab":
        for event in tale.events[process]:
            if isinstance(event, Saw) and event.revision >= 18:
                event.values["l/0"] = ["b1", "a3"]


def number_loses(tale: Tale) -> None:
    """Let a number lose what was added."""
    for process in "ab":
        for event in tale.events[process]:
            if isinstance(event, Saw) and event.revision >= 18:
                event.values["n/0"] = 1 + 16


def comes_back(tale: Tale) -> None:
    """Let an expired value come back."""
    tale.one(Saw, "b", revision=15).passing = {"e/0": "x1"}


def same_number(tale: Tale) -> None:
    """Let two calls return the same number."""
    tale.one(Ended, call="b11").result = 5


def gap(tale: Tale) -> None:
    """Let a call return a number that lacks an earlier call."""
    tale.one(Ended, call="b11").result = 16


def foreign_element(tale: Tale) -> None:
    """Let a list have something that no call has added."""
    for process in "ab":
        for event in tale.events[process]:
            if isinstance(event, Saw) and event.revision >= 18:
                event.values["l/1"] = ["a11", "a14", "zz"]


def foreign_digit(tale: Tale) -> None:
    """Let a number have a digit that no call has added."""
    for process in "ab":
        for event in tale.events[process]:
            if isinstance(event, Saw) and event.revision >= 18:
                event.values["n/0"] += 4**9


def lost(tale: Tale) -> None:
    """Let a call that returned be in no state."""
    tale.one(Ended, call="a15").outcome = "ok"
    tale.one(Ended, call="a15").revision = 18
    tale.one(Ended, call="a15").result = ["a11", "a14", "a15"]


def lost_at_the_end(tale: Tale) -> None:
    """Let the last state be older than a call that returned."""
    for process in "ab":
        tale.events[process] = [
            event for event in tale.events[process] if not (isinstance(event, Saw) and event.revision >= 17)
        ]


def too_early(tale: Tale) -> None:
    """Let a call be in a state before its revision."""
    tale.one(Ended, call="a14").outcome = "ok"
    tale.one(Ended, call="a14").revision = 19
    tale.one(Ended, call="a14").seen = 19
    tale.one(Ended, call="a14").result = ["a11", "a14"]


def not_made_is_made(tale: Tale) -> None:
    """Let a call be in the state, although its error said that it was not made."""
    tale.one(Ended, call="a14").outcome = "not made"


def stored_by_another(tale: Tale) -> None:
    """Let a key have a value that no call has stored there."""
    tale.one(Began, call="b12").keys = ["s/3"]


def twice_in_a_list(tale: Tale) -> None:
    """Let a call be in a list twice."""
    for process in "ab":
        for event in tale.events[process]:
            if isinstance(event, Saw) and event.revision >= 18:
                event.values["l/1"] = ["a11", "a14", "a14"]


def twice_in_a_number(tale: Tale) -> None:
    """Let a call be in a number twice."""
    for process in "ab":
        for event in tale.events[process]:
            if isinstance(event, Saw) and event.revision >= 18:
                event.values["n/0"] += 1


def twice_in_a_key(tale: Tale) -> None:
    """Let a call store its value again."""
    for process in "ab":
        for event in tale.events[process]:
            if isinstance(event, Saw) and event.revision >= 19:
                event.values["s/1"] = "a12"


def popped_twice(tale: Tale) -> None:
    """Let two calls get the same value."""
    tale.one(Ended, call="a7").result = "a12"


def another_list(tale: Tale) -> None:
    """Let a call return the list of another moment."""
    tale.one(Ended, call="a3").result = ["a3"]


def another_kind(tale: Tale) -> None:
    """Let a call have a result of another kind."""
    tale.one(Ended, call="a13").result = ["a13"]


def read_another_list(tale: Tale) -> None:
    """Let a transaction have read the list of another moment."""
    tale.one(Ended, call="a11").result = [["b1"], []]


def found_what_was_not_there(tale: Tale) -> None:
    """Let a call find a key that was missing."""
    tale.one(Began, call="b4").keys = ["s/1"]


def missed_what_was_there(tale: Tale) -> None:
    """Let a call that changed nothing miss a key."""
    tale.one(Began, call="b4").kind = "delete"


def deleted_nothing(tale: Tale) -> None:
    """Let a key vanish without a call."""
    tale.one(Ended, call="b10").result = ABSENT


def wrong_count(tale: Tale) -> None:
    """Let `delete_all` return another count."""
    tale.one(Ended, call="b9").result = 2


def hangs(tale: Tale) -> None:
    """Let a call have no end in a process that has stopped."""
    tale.events["a"].remove(tale.one(Ended, call="a15"))


def takes_long(tale: Tale) -> None:
    """Let a call take a minute."""
    tale.one(Ended, call="a15").at += 60_000_000_000


def ends_by_itself(tale: Tale) -> None:
    """Let a process end with an error."""
    tale.one(Gone, how="stopped").how = "AssertionError()"


def ends_without_a_word(tale: Tale) -> None:
    """Let a process end without a word."""
    tale.events["a"].pop()


WRONG: dict[int, list[Callable[[Tale], None]]] = {
    1: [lower_revision, lower_read, lags, waits_too_short, no_revision],
    2: [
        goes_back, differs, not_durable, never_durable, own_call_is_missing, own_call_is_forgotten, reads_another_value,
        sees_two_states, list_loses, number_loses, comes_back,
    ],
    3: [same_number, gap, foreign_element, foreign_digit],
    4: [lost, lost_at_the_end, too_early, not_made_is_made, stored_by_another],
    5: [
        twice_in_a_list, twice_in_a_number, twice_in_a_key, popped_twice, another_list, another_kind, read_another_list,
        found_what_was_not_there, missed_what_was_there, deleted_nothing, wrong_count,
    ],
    6: [hangs, takes_long, ends_by_itself, ends_without_a_word],
}  # fmt: skip


@pytest.mark.parametrize(
    ("fact", "wrong"),
    [(fact, wrong) for fact, wrongs in WRONG.items() for wrong in wrongs],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_wrong_history_is_found(fact: int, wrong: Callable[[Tale], None]) -> None:
    """The checker names the fact that a wrong history breaks."""
    tale = told()
    wrong(tale)
    assert fact in {number for number, _ in tale.broken()}, tale.broken()


def test_a_history_without_a_state_is_noticed() -> None:
    """Without the last state, nothing is known about what was lost."""
    assert [one.fact for one in check([Process("a", [Gone(1, "stopped")])])] == [4]


def test_calls_of_a_key_need_an_order() -> None:
    """Some order of all calls that returned, and of some without an answer, must explain the value at the end."""
    put, drop, claim = Effect("any", ("x",)), Effect("present", (None,)), Effect("absent", ("y",))
    assert explains(None, None, [drop, put], [])
    assert not explains(None, "y", [put, claim], [])
    assert explains(None, "x", [put, claim], [])
    assert explains(None, "y", [put, claim], [drop])
    assert explains(None, None, [], [put])
    assert not explains(None, None, [put], [claim])
    assert explains("x", None, [Effect(("x",), (None,))], [])
    assert not explains("z", None, [Effect(("x",), (None,))], [])
    assert explains("z", "x", [Effect(("x",), ())], [put])


def test_a_number_names_its_calls() -> None:
    """The digits in base 4 say how often each call was applied."""
    assert digits(0) == {}
    assert digits(1 + 16 + 2 * 4**30) == {0: 1, 2: 1, 30: 2}


def test_a_history_is_read_without_the_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    """A process that is killed during a write leaves a part of a line."""
    path = tmp_path / "w.jsonl"
    event = Began("c", "set", ["s/0"], 7)
    path.write_bytes(encode(event) + b"\n" + encode(Gone(9, "stopped"))[:9])
    assert read(path) == Process("w", [event])
