"""The depth of nesting of JSON, found at about the price of copying it. Pure.

Each step is one that Python does at once for all of the bytes. First what is between
quotes and brackets is dropped. Two quotes side by side then change nothing about what is
inside of a string, so they go too. Then pairs of brackets with nothing between them go, a
level at a time, as long as that makes much less of the rest. What is left is counted
bracket by bracket.
"""

from __future__ import annotations

from itertools import accumulate

MAX_DEPTH = 128
"""So many levels of nesting are kept; Python's own limit differs by version and by the caller's stack."""

SHALLOW = 2 * MAX_DEPTH + 1
"""Fewer bytes than this cannot be nested deeper than `MAX_DEPTH`."""

_BACKSLASH = ord("\\")
_DROPPED = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = bytes(1 if byte in b"[{" else 255 if byte in b"]}" else 0 for byte in range(256))
_MOST_ROUNDS = 12
_LONGEST_UNIT = 64
_SHORT = 8 * 1024


def too_deep(data: bytes) -> bool:
    """Return whether JSON has more than `MAX_DEPTH` levels of nesting."""
    if len(data) < _SHORT and data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    return deeper(data, MAX_DEPTH)


def deeper(data: bytes, levels: int) -> bool:
    """Return whether JSON has more than so many levels of nesting."""
    if _BACKSLASH in data and b'\\"' in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = data.translate(None, _DROPPED)
    rest, gone = _without_what_repeats(structure)  # no more than so many levels went with what is gone
    rest = rest.replace(b'""', b"")
    for _ in range(_MOST_ROUNDS):
        before = len(rest)
        if before + gone <= levels:  # each level has a bracket of its own
            return False
        rest = rest.replace(b"[]", b"").replace(b"{}", b"").replace(b'""', b"")
        gone += 2
        if len(rest) > before * 3 // 4:
            break
    return _levels(rest) + gone > levels and _levels(structure) > levels


def _without_what_repeats(structure: bytes) -> tuple[bytes, int]:
    """Remove most of a list of records that are alike, and return how many levels that may have had."""
    first = structure[1:9]
    unit = structure[1 : max(0, structure.find(first, 9, _LONGEST_UNIT))]
    outside = unit.split(b'"')
    # From inside of a string too, it must leave things as they were.
    if not unit or len(outside) % 2 == 0 or any(_balance(b"".join(outside[half::2])) for half in (0, 1)):
        return structure, 0
    return structure.replace(unit, b""), len(unit)


def _balance(brackets: bytes) -> int:
    return sum(memoryview(brackets.translate(_STEPS)).cast("b"))


def _levels(structure: bytes) -> int:
    """Count the levels in quotes and brackets alone."""
    outside = b"".join(structure.split(b'"')[::2])
    return max(accumulate(memoryview(outside.translate(_STEPS)).cast("b")), default=0)
