"""`_buffers`: bytes put together from parts."""

from __future__ import annotations

import sys

import pytest

from lab_state import _buffers
from lab_state._buffers import ByteBuffer, join_in_steps, join_in_thread

PART = bytes(range(256)) * 256


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 18, 100])
def test_all_of_it(count: int) -> None:
    """What comes out is what went in, whatever block it was put together in, and takes no more memory."""
    together = ByteBuffer()
    for _ in range(count):
        together.add(PART)
    together.add(b"end")
    data = together.taken()
    assert data == PART * count + b"end"
    assert sys.getsizeof(data) < len(data) + 100


async def test_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than the block with room is whole, too."""
    monkeypatch.setattr(_buffers, "_LARGE", 100)
    monkeypatch.setattr(_buffers, "_ROOM", 1000)
    parts = [b"%d," % number * 50 for number in range(1000)]
    assert await join_in_steps(parts) == join_in_thread(parts) == b"".join(parts)
