"""Join parts into large `bytes` objects without blocking other threads for long.

`b"".join` of a hundred megabytes blocks every thread during the copy. A `BytesIO` grows part by
part. On Linux, a large `BytesIO` mostly grows by moving pages of memory, without copying bytes. In CPython,
`BytesIO.getvalue` returns the buffer without a copy.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterable, Iterable

_QUICK_BYTES = 4096  # see `join_in_steps`
_COPIED_AT_ONCE = 1024 * 1024
_LARGE = 1024 * 1024
_ROOM = 40 * 1024 * 1024
"""The first size in bytes of a large block. glibc allocates each block of more than 32 MiB as separate pages, which can be moved."""


class ByteBuffer:
    """Bytes that grow part by part. On average, the cost of adding a part depends on its size, not on the bytes before it."""

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
        """Move the bytes to a large block, which can grow by moving pages. A small block would be copied when it grows.

        The new block begins as zeros, which take no memory until they are overwritten. `BytesIO`
        uses the block without a copy.
        """
        roomy = io.BytesIO(bytes(_ROOM))
        with self._buffer.getbuffer() as view:
            roomy.write(view)
        self._buffer, self._is_roomy = roomy, True

    def taken(self) -> bytes:
        """Return all bytes. After this call, no part may be added."""
        self._buffer.truncate()
        return self._buffer.getvalue()


def join_in_thread(parts: Iterable[bytes]) -> bytes:
    """Join the parts. Call this in a separate thread: the other threads can run after each megabyte."""
    together = ByteBuffer()
    for part in parts:
        with memoryview(part) as view:
            for start in range(0, len(part), _COPIED_AT_ONCE):
                together.add(view[start : start + _COPIED_AT_ONCE])
    return together.taken()


async def join_in_steps(parts: Iterable[bytes]) -> bytes:
    """Join the parts. Let the event loop run after each part of more than 4,096 bytes, and after each empty part."""
    together = ByteBuffer()
    for part in parts:
        together.add(part)
        if not part or len(part) > _QUICK_BYTES:
            await asyncio.sleep(0)
    return together.taken()


async def collect(parts: AsyncIterable[bytes]) -> bytes:
    """Join the parts of an async iterator. The iterator must let the event loop run between parts."""
    together = ByteBuffer()
    async for part in parts:
        together.add(part)
    return together.taken()
