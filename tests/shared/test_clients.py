"""The clients that an owner knows, and when it forgets them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lab_state.shared._clients import FORGOTTEN_AFTER, Clients, may_be_forgotten

A, B = "a" * 32, "b" * 32
MINUTE = FORGOTTEN_AFTER


def test_a_new_client_is_admitted() -> None:
    """A client that has heard from no owner is new. One that heard a moment ago made no call that is in the table."""
    clients = Clients({}, 0)
    assert clients.admit(A, None, 5)
    assert clients.admit(B, 6, 7)
    assert clients.acknowledged == {A: 0, B: 0}
    assert clients.connected == 2


def test_a_client_that_may_have_been_forgotten_is_not_admitted() -> None:
    """An unknown client is refused if it heard from an owner a minute ago, or ahead of the clock."""
    clients = Clients({}, 0)
    assert not clients.admit(A, 10, 10 + MINUTE)
    assert not clients.admit(A, 11, 10)
    assert A not in clients
    assert clients.admit(A, 11, 10 + MINUTE)
    assert A in clients


def test_a_known_client_is_always_admitted() -> None:
    """A client of the table is known, however long ago it heard."""
    clients = Clients({A: 3}, 100 * MINUTE)
    assert clients.admit(A, 0, 100 * MINUTE)
    assert clients.acknowledged == {A: 3}


def test_a_client_without_a_connection_is_forgotten_after_a_minute() -> None:
    """The minute begins with the end of the connection. A client with a connection is never forgotten."""
    clients = Clients({}, 0)
    clients.admit(A, None, 0)
    clients.admit(B, None, 0)
    clients.disconnect(A, 5)
    assert clients.connected == 1
    assert clients.forget_gone(4 + MINUTE) == []
    assert clients.forget_gone(5 + MINUTE) == [A]
    assert clients.forget_gone(100 * MINUTE) == []
    assert A not in clients
    assert B in clients


def test_a_client_that_comes_back_is_not_forgotten() -> None:
    """A new connection ends the minute."""
    clients = Clients({}, 0)
    clients.admit(A, None, 0)
    clients.disconnect(A, 1)
    clients.admit(A, 1, 2)
    assert clients.forget_gone(10 * MINUTE) == []


def test_a_new_owner_begins_the_minute_of_each_client() -> None:
    """The clients of the table have a minute from the takeover on."""
    clients = Clients({A: 0, B: 0}, 7)
    clients.admit(B, 0, 8)
    assert clients.forget_gone(6 + MINUTE) == []
    assert clients.forget_gone(7 + MINUTE) == [A]


def test_a_farewell_forgets_at_once() -> None:
    """A second farewell, and the end of the connection after it, change nothing."""
    clients = Clients({A: 3}, 0)
    clients.forget(A)
    clients.forget(A)
    clients.disconnect(A, 1)
    assert A not in clients
    assert clients.forget_gone(MINUTE * 2) == []


def test_an_acknowledgement_does_not_go_back() -> None:
    """The highest acknowledgement of a client counts."""
    clients = Clients({A: 3}, 0)
    clients.acknowledge(A, 5)
    clients.acknowledge(A, 4)
    assert clients.acknowledged == {A: 5}


@given(st.integers(0, 3 * MINUTE), st.integers(0, 3 * MINUTE), st.integers(0, 3 * MINUTE))
def test_a_forgotten_client_is_never_admitted_as_known(heard: int, gone: int, later: int) -> None:
    """A client hears nothing after its connection ended. So once it was forgotten, its old times are refused."""
    heard, gone = sorted((heard, gone))
    now = gone + later
    clients = Clients({}, 0)
    clients.admit(A, None, 0)
    clients.disconnect(A, gone)
    if clients.forget_gone(now):
        assert not clients.admit(A, heard, now)
    else:
        assert clients.admit(A, heard, now)


def test_a_client_that_heard_nothing_was_not_forgotten() -> None:
    """Without a time, there is no call of an earlier connection."""
    assert not may_be_forgotten(None, 10 * MINUTE)
