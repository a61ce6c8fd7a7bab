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


def whole(parts: Iterable[bytes]) -> bytes:
    """All of it, for a thread: the others get their turn between two megabytes."""
    together = io.BytesIO()
    for part in parts:
        with memoryview(part) as view:
            for start in range(0, len(part), _COPIED_AT_ONCE):
                together.write(view[start : start + _COPIED_AT_ONCE])
    return together.getvalue()


async def joined(parts: Iterable[bytes]) -> bytes:
    """All of it; the loop runs between two parts that took any time to make, and at an empty one."""
    together = io.BytesIO()
    for part in parts:
        together.write(part)
        if not part or len(part) > _QUICK_BYTES:
            await asyncio.sleep(0)
    return together.getvalue()


async def collected(parts: AsyncIterable[bytes]) -> bytes:
    """All of it; whoever gives the parts lets the loop run."""
    together = io.BytesIO()
    async for part in parts:
        together.write(part)
    return together.getvalue()
