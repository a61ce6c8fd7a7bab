"""The CRC-32 of any part of a buffer, computed from the checksums of the bytes before it.

zlib has to read a part to compute its checksum. Many parts that overlap would be read again
and again. But a CRC is linear. Take two checksums with different initial values, both over the
same bytes. The difference of the results depends only on the difference of the initial values
and on the number of bytes: it is the same as over zero bytes of that number. So one pass over the
buffer is enough for all of its parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0xEDB88320
_Tables = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def running(data: bytes, start: int, ends: Iterable[int]) -> dict[int, int]:
    """Return the CRC-32 of `data` from `start` to each of the ends, which must be in ascending order."""
    sums: dict[int, int] = {}
    crc, at = 0, start
    with memoryview(data) as view:
        for end in ends:
            crc = zlib.crc32(view[at:end], crc)
            sums[end], at = crc, end
    return sums


def part(before: int, whole: int, length: int, seed: int) -> int:
    """Return the CRC-32 of a part of a buffer.

    Args:
        before: The checksum of the bytes before the part.
        whole: The checksum of the same bytes and of the part.
        length: The number of bytes of the part.
        seed: The initial value of the result.
    """
    difference = before ^ seed
    shift = 0
    while length:
        if digit := length & 15:
            difference = _after(difference, _zeros(digit << shift))
        length >>= 4
        shift += 4
    return whole ^ difference


@cache
def _zeros(length: int) -> _Tables:
    """Make the tables that advance a checksum over `length` zero bytes: one table for each of its four bytes."""
    if length == 1:
        images = [_after_one(1 << bit) for bit in range(32)]
    else:
        most = 1 << (length.bit_length() - 1)
        first, second = _zeros(most if most < length else most // 2), _zeros(length - most or most // 2)
        images = [_after(_after(1 << bit, first), second) for bit in range(32)]
    a, b, c, d = (_by_value(images[first : first + 8]) for first in (0, 8, 16, 24))
    return a, b, c, d


def _after(difference: int, tables: _Tables) -> int:
    a, b, c, d = tables
    return a[difference & 255] ^ b[difference >> 8 & 255] ^ c[difference >> 16 & 255] ^ d[difference >> 24]


def _after_one(difference: int) -> int:
    for _ in range(8):
        difference = difference >> 1 ^ (_POLYNOMIAL if difference & 1 else 0)
    return difference


def _by_value(images: list[int]) -> tuple[int, ...]:
    """Return the table of all 256 byte values, from the results for the eight single bits."""
    found = [0]
    for image in images:
        found += [image ^ other for other in found]
    return tuple(found)
