"""Find the depth of nesting of JSON, at about half the price of encoding it. Pure.

Each step is one that Python does at once for all of the bytes. First everything but quotes and
brackets is dropped. If there are few quotes, strings are removed one by one. Then a group that
repeats is removed. Two quotes side by side change nothing about what is inside of a string, so
they are removed too. Then pairs of brackets with nothing between them are removed, a level at a
time, as long as that makes the rest much shorter. What is left is counted bracket by bracket.
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

_FEW = 16
"""With more brackets than this for each quote, strings are removed one by one."""


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
        if before + gone <= levels:  # each level has a bracket of its own
            return False
        rest = rest.replace(b"[]", b"").replace(b"{}", b"").replace(b'""', b"")
        gone += 2
        if len(rest) > before * 3 // 4:
            break
    return _levels(rest) + gone > levels and _levels(structure) > levels


def _without_what_repeats(structure: bytes) -> tuple[bytes, int]:
    """Remove most of a list of records that are alike, and return how many levels that may have had."""
    middle = len(structure) // 2
    length = structure.find(structure[middle : middle + 8], middle + 8, middle + _LONGEST_UNIT) - middle
    unit = structure[middle : middle + max(0, length)]
    halves = unit.split(b'"')
    if not unit or len(halves) % 2 == 0:
        return structure, 0
    start, end = structure.find(unit), structure.rfind(unit) + length
    times, more = divmod(end - start, length)
    if not more and structure[start:end] == unit * times:  # which costs far less than to look for each
        outside = structure.count(b'"', 0, start) % 2
        if not _balance(b"".join(halves[outside::2])):
            return structure[:start] + structure[end:], length
    # From inside of a string too, it must leave things as they were.
    if any(_balance(b"".join(halves[half::2])) for half in (0, 1)):
        return structure, 0
    return structure.replace(unit, b""), length


def _balance(brackets: bytes) -> int:
    return sum(memoryview(brackets.translate(_STEPS)).cast("b"))


def _levels(structure: bytes) -> int:
    """Count the levels in quotes and brackets alone."""
    return max(accumulate(memoryview(_outside(structure).translate(_STEPS)).cast("b")), default=0)


def _outside(structure: bytes) -> bytes:
    """Remove quotes and what is between them."""
    return b"".join(structure.split(b'"')[::2])
