"""The bytes that wait to be sent on one connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_state.shared._queue import SendQueue

SMALL = 64 * 1024


@given(st.lists(st.lists(st.binary(max_size=6), max_size=4)), st.lists(st.integers(1, 12)))
def test_the_bytes_leave_in_order(messages: list[list[bytes]], steps: list[int]) -> None:
    """Whatever part of each piece is sent, the bytes are those that were put, in order."""
    queue, sent = SendQueue(None), b""
    sizes = iter(steps)
    for message in messages:
        assert queue.put(message)
        if queue and (size := next(sizes, 0)):
            piece = bytes(queue.next_piece())[:size]
            queue.sent(len(piece))
            sent += piece
    assert queue.waiting == sum(len(part) for message in messages for part in message) - len(sent)
    while queue:
        piece = bytes(queue.next_piece())
        queue.sent(len(piece))
        sent += piece
    assert sent == b"".join(b"".join(message) for message in messages)
    assert queue.waiting == 0


def test_small_parts_are_joined() -> None:
    """The parts of many small messages are one piece."""
    queue = SendQueue(None)
    for _ in range(1000):
        queue.put([b"head", b"time", b"body"])
    assert queue.next_piece() == b"headtimebody" * 1000


def test_a_piece_has_a_bound() -> None:
    """Parts are joined only up to some size: the rest waits."""
    queue = SendQueue(None)
    for _ in range(10):
        queue.put([bytes(SMALL)])
    assert len(queue.next_piece()) == 4 * SMALL
    queue.sent(4 * SMALL)
    assert queue.waiting == 6 * SMALL


def test_a_large_part_is_not_copied() -> None:
    """A large part is sent as it is, also after a part of it was sent."""
    queue, large = SendQueue(None), bytes(SMALL + 1)
    queue.put([b"head", large])
    queue.sent(len(queue.next_piece()))
    assert queue.next_piece() is large
    queue.sent(1)
    rest = queue.next_piece()
    assert isinstance(rest, memoryview)
    assert rest.obj is large
    assert len(rest) == SMALL


@pytest.mark.parametrize(("waiting", "size", "fits"), [(0, 100, True), (60, 40, True), (60, 41, False), (0, 101, True)])
def test_a_queue_has_a_bound(waiting: int, size: int, fits: bool) -> None:  # noqa: FBT001 -- a case of the table
    """A message that would go beyond the bound is refused, and nothing of it is appended."""
    queue = SendQueue(100)
    assert queue.put([bytes(waiting)])
    assert queue.put([bytes(size)]) is fits
    assert queue.waiting == waiting + size * fits


def test_one_larger_message_may_wait_besides() -> None:
    """A message above the bound does not count, so answers fit behind it. A second one has to wait until the first is sent."""
    queue = SendQueue(100)
    assert queue.put([bytes(50)])
    assert queue.put([bytes(500)])
    assert queue.put([bytes(50)])
    assert not queue.put([bytes(1)])
    assert not queue.put([bytes(101)])
    queue.sent(len(queue.next_piece()) - 51)
    assert not queue.put([bytes(101)])
    queue.sent(1)
    assert queue.waiting == 50
    assert queue.put([bytes(50)])
    assert queue.put([bytes(101)])
    assert not queue.put([bytes(1)])


def test_a_queue_is_emptied() -> None:
    """A connection that ended has nothing to send."""
    queue = SendQueue(100)
    queue.put([bytes(60)])
    queue.clear()
    assert not queue
    assert queue.waiting == 0
    assert queue.put([bytes(100)])
