"""Plain integers that a monitoring system reads now and then."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left

import msgspec

_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf)


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the manager was made, over restarts.

    Attributes:
        operations: How often, by operation and status, `success` or `error`. `set`:
            values stored, and those refused. `get`: only those that failed, since the
            key was missing, without a default, or the value of another type; to count
            the others would cost as much as they do. `delete`: keys deleted.
            `expire`: keys swept after their time. `flush`: commits, and those that failed. With
            a cache, `mirror`: steps brought to it, and attempts that failed; `fill`: how often
            it was filled anew.
        flush_seconds: How long all commits that succeeded took, together.
        flush_buckets: How many of them took up to so many seconds: bound and count,
            each count with those before it; the last bound is infinity.
    """

    operations: dict[tuple[str, str], int]
    flush_seconds: float
    flush_buckets: tuple[tuple[float, int], ...]


class Counters:
    """What is counted outside the state, and what states that are gone have counted."""

    __slots__ = ("deletes", "expiries", "get_errors", "set_errors", "sets")

    def __init__(self) -> None:
        self.sets: int = 0
        self.deletes: int = 0
        self.expiries: int = 0
        self.get_errors: int = 0
        self.set_errors: int = 0


class MirrorCounts:
    """What was brought to a cache, and how often it failed."""

    def __init__(self) -> None:
        self.steps: int = 0
        self.fills: int = 0
        self.failures: int = 0


class FlushTimes:
    """How long commits took, and how many failed."""

    def __init__(self) -> None:
        self.failures: int = 0
        self.seconds: float = 0.0
        self._counts = [0] * len(_BOUNDS)

    def add(self, seconds: float) -> None:
        """One succeeded."""
        self.seconds += seconds
        self._counts[bisect_left(_BOUNDS, seconds)] += 1

    @property
    def successes(self) -> int:
        """How many succeeded."""
        return sum(self._counts)

    @property
    def buckets(self) -> tuple[tuple[float, int], ...]:
        """Bounds and cumulative counts."""
        return tuple(zip(_BOUNDS, itertools.accumulate(self._counts), strict=True))


def metrics(counters: Counters, flushes: FlushTimes, mirror: MirrorCounts | None) -> Metrics:
    """What there is to tell."""
    mirrored = {} if mirror is None else _mirrored(mirror)
    return Metrics(
        operations={
            ("get", "error"): counters.get_errors,
            ("set", "success"): counters.sets,
            ("set", "error"): counters.set_errors,
            ("delete", "success"): counters.deletes,
            ("expire", "success"): counters.expiries,
            ("flush", "success"): flushes.successes,
            ("flush", "error"): flushes.failures,
            **mirrored,
        },
        flush_seconds=flushes.seconds,
        flush_buckets=flushes.buckets,
    )


def _mirrored(counts: MirrorCounts) -> dict[tuple[str, str], int]:
    return {
        ("mirror", "success"): counts.steps,
        ("mirror", "error"): counts.failures,
        ("fill", "success"): counts.fills,
    }
