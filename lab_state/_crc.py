"""The CRC-32 of any part of a buffer, computed from the checksums of the bytes up to its start and up to its end.

To compute the checksum of a part, zlib has to read the part. If parts overlap, it reads the same
bytes many times. But a CRC is linear. Suppose that two checksums start from different initial
values, and read the same bytes. Then the XOR of the results depends only on the XOR of the initial
values and on the number of bytes. So this XOR can be computed with zeros in place of the bytes. One
pass over the buffer is then enough for all of its parts. In this module, such an XOR is called a difference.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0xEDB88320
_Tables = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def running(data: bytes, start: int, ends: Iterable[int]) -> dict[int, int]:
    """Return the CRC-32 of `data` from `start` to each end, by end. The ends must be in ascending order."""
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
        before: The checksum of the bytes from any place to the start of the part.
        whole: The checksum of the bytes from the same place to the end of the part.
        length: The number of bytes of the part.
        seed: The initial value from which the checksum of the part starts.
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
    """Return the tables that advance a difference over `length` zero bytes. There is one table for each byte of a difference."""
    if length == 1:
        images = [_after_one(1 << bit) for bit in range(32)]
    else:
        most = 1 << (length.bit_length() - 1)
        first, second = _zeros(most if most < length else most // 2), _zeros(length - most or most // 2)
        images = [_after(_after(1 << bit, first), second) for bit in range(32)]
    a, b, c, d = (_by_value(images[first : first + 8]) for first in (0, 8, 16, 24))
    return a, b, c, d


def _after(difference: int, tables: _Tables) -> int:
    """Return a difference after the zero bytes for which the tables were made."""
    a, b, c, d = tables
    return a[difference & 255] ^ b[difference >> 8 & 255] ^ c[difference >> 16 & 255] ^ d[difference >> 24]


def _after_one(difference: int) -> int:
    """Return a difference after one zero byte."""
    for _ in range(8):
        difference = difference >> 1 ^ (_POLYNOMIAL if difference & 1 else 0)
    return difference


def _by_value(images: list[int]) -> tuple[int, ...]:
    """Return the results for all 256 values of a byte. `images` has the results for the eight single bits."""
    found = [0]
    for image in images:
        found += [image ^ other for other in found]
    return tuple(found)
