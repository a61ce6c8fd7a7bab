"""Bytes put together from parts.

`b"".join` of a hundred megabytes holds up every thread for as long as the copy takes. A
`BytesIO` grows with its parts, mostly by moving pages rather than bytes, and in CPython
gives away its buffer as it is.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterable, Iterable

_QUICK_BYTES = 4096
_COPIED_AT_ONCE = 1024 * 1024
_LARGE = 1024 * 1024
_ROOM = 40 * 1024 * 1024
"""glibc gives blocks of more than 32 MiB pages of their own, whatever it was asked for before."""


class ByteBuffer:
    """Bytes that grow part by part. To add a part costs what the part has, and never what is there."""

    __slots__ = ("_buffer", "_is_roomy")

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._is_roomy = False

    def add(self, part: bytes | memoryview) -> None:
        """Append a part."""
        if not self._is_roomy and self._buffer.tell() >= _LARGE:
            self._make_room()
        self._buffer.write(part)

    def _make_room(self) -> None:
        """Move to a block that grows by moving pages. A smaller one would be copied as a whole, once or twice.

        The zeros take no memory before they are written over. `BytesIO` takes them over without a copy.
        """
        roomy = io.BytesIO(bytes(_ROOM))
        with self._buffer.getbuffer() as view:
            roomy.write(view)
        self._buffer, self._is_roomy = roomy, True

    def taken(self) -> bytes:
        """Return all of it. Nothing may be added then."""
        self._buffer.truncate()
        return self._buffer.getvalue()


def join_in_thread(parts: Iterable[bytes]) -> bytes:
    """All of it, for a thread: the others get their turn between two megabytes."""
    together = ByteBuffer()
    for part in parts:
        with memoryview(part) as view:
            for start in range(0, len(part), _COPIED_AT_ONCE):
                together.add(view[start : start + _COPIED_AT_ONCE])
    return together.taken()


async def join_in_steps(parts: Iterable[bytes]) -> bytes:
    """All of it; the loop runs between two parts that took any time to make, and at an empty one."""
    together = ByteBuffer()
    for part in parts:
        together.add(part)
        if not part or len(part) > _QUICK_BYTES:
            await asyncio.sleep(0)
    return together.taken()


async def collect(parts: AsyncIterable[bytes]) -> bytes:
    """All of it; whoever gives the parts lets the loop run."""
    together = ByteBuffer()
    async for part in parts:
        together.add(part)
    return together.taken()
