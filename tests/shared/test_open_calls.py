"""The book of a client: numbers, the window, the acknowledgement, and calls that are sent again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lab_state.shared._clients import FORGOTTEN_AFTER
from lab_state.shared._open_calls import MOST_BYTES, NEVER, OpenCall, OpenCalls
from lab_state.shared._order import SPAN


def book(*sizes: int) -> tuple[OpenCalls[str], list[OpenCall[str]]]:
    """Return a book with a call for each size, and the calls. Those that fit have numbers."""
    calls: OpenCalls[str] = OpenCalls()
    added = [calls.submit(str(at), size) for at, size in enumerate(sizes, 1)]
    calls.number_next()
    return calls, added


def test_calls_get_numbers_in_order() -> None:
    """Numbers count up from 1, and each call is found by its own."""
    calls, added = book(1, 1, 1)
    assert [call.number for call in added] == [1, 2, 3]
    assert calls.find(2) is added[1]
    assert calls.find(4) is None
    assert len(calls) == 3


def test_the_acknowledgement() -> None:
    """It is one less than the lowest open number, or the last number if no call is open."""
    calls, added = book(1, 1, 1)
    assert calls.acknowledgement == 0
    assert calls.end(added[1])
    assert calls.acknowledgement == 0
    assert calls.end(added[0])
    assert calls.acknowledgement == 2
    assert calls.end(added[2])
    assert calls.acknowledgement == 3


def test_a_second_answer_changes_nothing() -> None:
    """An answer to a call that has one already, or that was given up, is noticed."""
    calls, added = book(1)
    assert calls.end(added[0])
    assert not calls.end(added[0])
    assert len(calls) == 0


def test_the_span_of_the_window() -> None:
    """The open numbers span at most 1,024, counted from the lowest. Further calls wait, in order."""
    calls, added = book(*[1] * (SPAN + 2))
    assert [call.number for call in added[-3:]] == [SPAN, 0, 0]
    calls.end(added[5])
    assert calls.number_next() == []
    calls.end(added[0])
    assert calls.number_next() == [added[SPAN]]
    assert added[SPAN].number == SPAN + 1
    assert len(calls) == SPAN


def test_the_bytes_of_the_window() -> None:
    """Open calls have at most 16 MiB together. A larger one is open alone, and those behind it wait."""
    calls, added = book(10, MOST_BYTES - 10, 1, MOST_BYTES + 1, 1)
    assert [call.number for call in added] == [1, 2, 0, 0, 0]
    calls.end(added[0])
    assert calls.number_next() == [added[2]]
    calls.end(added[1])
    assert calls.number_next() == []
    calls.end(added[2])
    assert calls.number_next() == [added[3]]
    calls.end(added[3])
    assert calls.number_next() == [added[4]]


def test_a_call_that_waits_is_given_up() -> None:
    """A call without a number is removed, and gets none."""
    calls, added = book(MOST_BYTES, 1, 1)
    assert calls.end(added[1])
    assert not calls.end(added[1])
    calls.end(added[0])
    assert calls.number_next() == [added[2]]
    assert added[2].number == 2


def test_the_outcome_of_a_call() -> None:
    """A call that was never sent, or that the owner has moved, was not made. After any other sending it is unknown."""
    calls, (call,) = book(1)
    outcomes: list[str] = [call.outcome]
    for step in (call.sent, call.moved, call.sent):
        step()
        outcomes.append(call.outcome)
    assert outcomes == ["not made", "unknown", "not made", "unknown"]
    assert calls.reconnect() == [call]


def test_open_calls_are_sent_again_in_order() -> None:
    """After a welcome, those that have a number and no answer are sent again, oldest first. Others wait for room."""
    calls, added = book(1, 1, MOST_BYTES, 1)
    calls.end(added[0])
    assert calls.reconnect() == [added[1]]
    assert calls.connection == 1


@pytest.mark.parametrize("was_sent", [False, True])
def test_a_check_that_rests_on_the_copy(*, was_sent: bool) -> None:
    """It counts on the next connection if the call was not sent, or was moved. Sent again, it is refused."""
    calls: OpenCalls[str] = OpenCalls()
    calls.reconnect()
    call, moved = calls.submit("x", 1, 7), calls.submit("y", 1, 7)
    calls.number_next()
    if was_sent:
        call.sent()
    moved.sent()
    moved.moved()
    calls.reconnect()
    assert (call.since, moved.since) == (NEVER if was_sent else 7, 7)


@pytest.mark.parametrize("was_sent", [False, True])
def test_a_check_that_rests_on_a_refusal(*, was_sent: bool) -> None:
    """It counts on the connection of the refusal only, whether the call was sent, moved, or still waits for a number."""
    calls: OpenCalls[str] = OpenCalls()
    calls.reconnect()
    call = calls.submit("x", MOST_BYTES, 7, refused_on=calls.connection)
    waits = calls.submit("y", MOST_BYTES, 8, refused_on=calls.connection)
    calls.number_next()
    assert (call.since, waits.since, waits.number) == (7, 8, 0)
    if was_sent:
        call.sent()
        call.moved()
    calls.reconnect()
    assert (call.since, waits.since) == (NEVER, NEVER)


def test_a_refusal_of_an_earlier_connection() -> None:
    """A call that is made after a new connection, on what a refusal brought before it, is refused."""
    calls: OpenCalls[str] = OpenCalls()
    calls.reconnect()
    refused_on = calls.connection
    calls.reconnect()
    assert calls.submit("x", 1, 7, refused_on=refused_on).since == NEVER


def test_a_call_without_a_check_has_none_when_it_is_sent_again() -> None:
    """Only a check is refused for being sent again."""
    calls, (call,) = book(1)
    call.sent()
    calls.reconnect()
    assert call.since is None


def test_a_client_that_was_forgotten_begins_anew() -> None:
    """The outcome of calls that were sent is unknown. The others get numbers from 1, under the new id."""
    calls: OpenCalls[str] = OpenCalls()
    calls.heard = 5
    calls.reconnect()
    added = [calls.submit(str(at), 1, 7) for at in range(3)]
    added.append(calls.submit("refused", 1, 7, refused_on=calls.connection))
    calls.number_next()
    added.append(calls.submit("waits", 1))
    calls.end(added[0])
    added[2].sent()
    assert calls.restart() == [added[2]]
    assert calls.acknowledgement == 0
    assert calls.heard is None
    assert [call.number for call in calls.number_next()] == [1, 2, 3]
    assert calls.reconnect() == [added[1], added[3], added[4]]
    assert [call.since for call in (added[1], added[3], added[4])] == [7, NEVER, None]
    assert calls.end(added[1])
    assert not calls.end(added[2])


def test_a_client_is_forgotten_by_the_clock_of_the_owner() -> None:
    """A new owner asks whether its own calls were forgotten, as the old owner would have."""
    calls: OpenCalls[str] = OpenCalls()
    assert not calls.is_forgotten(10 * FORGOTTEN_AFTER)
    calls.heard = 7
    assert not calls.is_forgotten(6 + FORGOTTEN_AFTER)
    assert calls.is_forgotten(7 + FORGOTTEN_AFTER)


class Book(RuleBasedStateMachine):
    """The book beside a plain list of calls: `(size, number, is ended)`."""

    def __init__(self) -> None:
        super().__init__()
        self.book: OpenCalls[int] = OpenCalls()
        self.calls: list[OpenCall[int]] = []
        self.ended: set[int] = set()
        self.last = 0

    @rule(size=st.sampled_from([1, 1000, MOST_BYTES // 2, MOST_BYTES, MOST_BYTES + 1]))
    def submit(self, size: int) -> None:
        self.calls.append(self.book.submit(len(self.calls), size))
        self.number()

    @precondition(lambda self: len(self.ended) < len(self.calls))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from([at for at in range(len(self.calls)) if at not in self.ended]))
        assert self.book.end(self.calls[at])
        self.ended.add(at)
        self.number()

    @rule()
    def reconnect(self) -> None:
        assert self.book.reconnect() == self.open()

    def number(self) -> None:
        for call in self.book.number_next():
            self.last += 1
            assert call.number == self.last

    def open(self) -> list[OpenCall[int]]:
        return [call for at, call in enumerate(self.calls) if at not in self.ended and call.number]

    @invariant()
    def the_window_is_full_and_no_more(self) -> None:
        """Check the bounds, and that no call waits without need."""
        opened = self.open()
        waiting = [call for at, call in enumerate(self.calls) if at not in self.ended and not call.number]
        lowest = opened[0].number if opened else self.last + 1
        total = sum(call.size for call in opened)
        assert self.book.acknowledgement == lowest - 1
        assert len(opened) <= 1 or total <= MOST_BYTES
        assert self.last - lowest < SPAN
        assert len(self.book) == len(opened) + len(waiting)
        if waiting:
            assert opened
            assert total + waiting[0].size > MOST_BYTES or self.last + 1 - lowest >= SPAN


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=40, stateful_step_count=40)
