"""Bytes put together from parts.

`b"".join` of a hundred megabytes holds up every thread for as long as the copy takes. A
`BytesIO` grows with its parts, by a call of the kernel that moves pages rather than
bytes, and in CPython gives away its buffer as it is.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterable, Iterable

_QUICK_BYTES = 4096


async def joined(parts: Iterable[bytes]) -> bytes:
    """All of it; the loop runs between two parts that took any time to make."""
    whole = io.BytesIO()
    for part in parts:
        whole.write(part)
        if len(part) > _QUICK_BYTES:
            await asyncio.sleep(0)
    return whole.getvalue()


async def collected(parts: AsyncIterable[bytes]) -> bytes:
    """All of it; whoever gives the parts lets the loop run."""
    whole = io.BytesIO()
    async for part in parts:
        whole.write(part)
    return whole.getvalue()
