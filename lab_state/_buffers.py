"""Large bytes, joined from parts without a stall.

`b"".join` of a hundred megabytes holds up every thread during the copy. A `BytesIO` grows with
its parts, mostly by moving pages rather than bytes. In CPython it returns its buffer without
a copy.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterable, Iterable

_QUICK_BYTES = 4096
_COPIED_AT_ONCE = 1024 * 1024
_LARGE = 1024 * 1024
_ROOM = 40 * 1024 * 1024
"""Bytes. glibc always allocates blocks of more than 32 MiB as pages of their own, which it can move."""


class ByteBuffer:
    """Bytes that grow by parts. The cost of adding a part depends on the part, not on the bytes before it."""

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
        """Move to a block that grows by moving pages. A smaller block would be copied once or twice.

        The zeros take no memory until they are overwritten. `BytesIO` uses them without a copy.
        """
        roomy = io.BytesIO(bytes(_ROOM))
        with self._buffer.getbuffer() as view:
            roomy.write(view)
        self._buffer, self._is_roomy = roomy, True

    def taken(self) -> bytes:
        """Return all bytes. No part may be added after this."""
        self._buffer.truncate()
        return self._buffer.getvalue()


def join_in_thread(parts: Iterable[bytes]) -> bytes:
    """Join the parts in a thread. Other threads can run after each megabyte."""
    together = ByteBuffer()
    for part in parts:
        with memoryview(part) as view:
            for start in range(0, len(part), _COPIED_AT_ONCE):
                together.add(view[start : start + _COPIED_AT_ONCE])
    return together.taken()


async def join_in_steps(parts: Iterable[bytes]) -> bytes:
    """Join the parts. The event loop runs after each part that is not small, and after an empty one."""
    together = ByteBuffer()
    for part in parts:
        together.add(part)
        if not part or len(part) > _QUICK_BYTES:
            await asyncio.sleep(0)
    return together.taken()


async def collect(parts: AsyncIterable[bytes]) -> bytes:
    """Join the parts of an async iterator, which is what yields to the event loop."""
    together = ByteBuffer()
    async for part in parts:
        together.add(part)
    return together.taken()
