"""The depth of nesting of JSON, found in about half the time of encoding it. This module does no I/O.

Short JSON with few brackets is accepted at once. Most of the following steps call a method of `bytes`, which
is faster than a loop in Python:

1. Escaped backslashes and escaped quotes are removed, and then all bytes except quotes and brackets.
2. If there are few quotes, the strings are removed.
3. A group of brackets and quotes that repeats is removed.
4. Pairs of adjacent quotes are removed. The number of quotes before each bracket stays odd or even, so
   the same brackets are inside of strings as before.
5. Pairs of adjacent brackets are removed, in up to 12 rounds. Each round removes at most two
   levels. The rounds end when a round removes less than a quarter of the remaining bytes.
6. The remaining levels are counted bracket by bracket. Remaining and removed levels together are an
   upper bound. If this bound is above the limit, the levels after step 2 are counted exactly.
"""

from __future__ import annotations

from itertools import accumulate

MAX_DEPTH = 128
"""The largest depth of a stored value. It is fixed, because Python's limit depends on the version and on the caller's stack."""

SHALLOW = 2 * MAX_DEPTH + 1
"""JSON of fewer bytes than this cannot have more than `MAX_DEPTH` levels."""

_BACKSLASH = ord("\\")
_DROPPED = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = bytes(1 if byte in b"[{" else 255 if byte in b"]}" else 0 for byte in range(256))
"""A table for `translate`: an opening bracket becomes 1, and a closing one -1, as signed bytes."""

_MOST_ROUNDS = 12
_LONGEST_UNIT = 64

_SHORT = 8 * 1024
"""JSON of fewer bytes than this is accepted at once if it has no more opening brackets than the allowed levels."""

_FEW = 16
"""The strings are removed if there is less than one quote among this many quotes and brackets."""


def too_deep(data: bytes) -> bool:
    """Return whether JSON has more than `MAX_DEPTH` levels of nesting."""
    return deeper(data, MAX_DEPTH)


def deeper(data: bytes, levels: int) -> bool:
    """Return whether JSON has more than `levels` levels of nesting."""
    if len(data) < _SHORT and (len(data) <= 2 * levels or data.count(b"[") + data.count(b"{") <= levels):
        return False
    if _BACKSLASH in data and b'\\"' in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = data.translate(None, _DROPPED)
    if structure.count(b'"') * _FEW < len(structure):
        structure = _outside(structure)
    rest, gone = _without_what_repeats(structure)  # at most `gone` levels were removed
    rest = rest.replace(b'""', b"")
    for _ in range(_MOST_ROUNDS):
        before = len(rest)
        if before + gone <= levels:  # each level of the rest needs at least one bracket
            return False
        rest = rest.replace(b"[]", b"").replace(b"{}", b"").replace(b'""', b"")
        gone += 2
        if len(rest) > before * 3 // 4:
            break
    return _levels(rest) + gone > levels and _levels(structure) > levels


def _without_what_repeats(structure: bytes) -> tuple[bytes, int]:
    """Return the structure without a group that repeats in its middle, and an upper bound of the levels that were removed.

    If there is no such group, return the structure and 0.
    """
    middle = len(structure) // 2
    length = structure.find(structure[middle : middle + 8], middle + 8, middle + _LONGEST_UNIT) - middle
    unit = structure[middle : middle + max(0, length)]
    halves = unit.split(b'"')
    if not unit or len(halves) % 2 == 0:
        return structure, 0
    start, end = structure.find(unit), structure.rfind(unit) + length
    times, more = divmod(end - start, length)
    if not more and structure[start:end] == unit * times:  # a slice is much faster than `replace`
        outside = structure.count(b'"', 0, start) % 2
        if not _balance(b"".join(halves[outside::2])):
            return structure[:start] + structure[end:], length
    # The unit may begin inside of a string or outside. In both cases it must close as many brackets as it opens.
    if any(_balance(b"".join(halves[half::2])) for half in (0, 1)):
        return structure, 0
    return structure.replace(unit, b""), length


def _balance(brackets: bytes) -> int:
    """Return the number of opening brackets minus the number of closing brackets."""
    return sum(memoryview(brackets.translate(_STEPS)).cast("b"))


def _levels(structure: bytes) -> int:
    """Return the number of levels of a text that has only quotes and brackets."""
    return max(accumulate(memoryview(_outside(structure).translate(_STEPS)).cast("b")), default=0)


def _outside(structure: bytes) -> bytes:
    """Remove the strings: the quotes, and the bytes between them."""
    return b"".join(structure.split(b'"')[::2])
