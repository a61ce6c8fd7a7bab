"""`Metrics`, the counts for a monitoring system, and the counters from which they are made."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left

import msgspec

_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf)


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the manager was created. `stop()` and `start()` do not reset them.

    Attributes:
        operations: The number of operations, by name and status (`success` or `error`).
            `set`: values stored, and values and times to live that were refused. `get`: only reads of a key that
            failed, because the key was missing without a default, or the value could not be decoded as `type`. A
            value that `on_mismatch="skip"` leaves out counts, too. Successful reads are not counted, because
            counting would take as long as reading. `delete`: keys deleted. `expire`: expired keys deleted.
            `flush`: commits that succeeded, and commits that failed. With a cache, there are two more names. `mirror`: steps sent to the cache,
            and failed attempts to update the mirror. `fill`: the number of times the whole state was sent.
            In a shared state, values stored, keys deleted and keys expired are counted for all processes, as far
            as this process has received the changes. The other numbers count this process only.
        flush_seconds: The total duration of all successful commits, in seconds.
        flush_buckets: A histogram of the durations of these commits. Each pair is a bound in seconds and
            the number of commits that took at most that long. The last bound is infinity.
    """

    operations: dict[tuple[str, str], int]
    flush_seconds: float
    flush_buckets: tuple[tuple[float, int], ...]


class Counters:
    """The counts that `State` does not have: the failures of reads and writes, and the totals of earlier starts."""

    __slots__ = ("deletes", "expiries", "get_errors", "set_errors", "sets")

    def __init__(self) -> None:
        self.sets: int = 0
        self.deletes: int = 0
        self.expiries: int = 0
        self.get_errors: int = 0
        self.set_errors: int = 0


class MirrorCounts:
    """The numbers of steps and fills that were sent to a mirror, and the number of attempts that failed."""

    def __init__(self) -> None:
        self.steps: int = 0
        self.fills: int = 0
        self.failures: int = 0


class FlushTimes:
    """The durations of the successful commits, and the number of commits that failed."""

    def __init__(self) -> None:
        self.failures: int = 0
        self.seconds: float = 0.0
        self._counts = [0] * len(_BOUNDS)

    def add(self, seconds: float) -> None:
        """Add a successful commit that took `seconds`."""
        self.seconds += seconds
        self._counts[bisect_left(_BOUNDS, seconds)] += 1

    @property
    def successes(self) -> int:
        """The number of successful commits."""
        return sum(self._counts)

    @property
    def buckets(self) -> tuple[tuple[float, int], ...]:
        """Pairs of a bound in seconds and a cumulative count; see `Metrics.flush_buckets`."""
        return tuple(zip(_BOUNDS, itertools.accumulate(self._counts), strict=True))


def metrics(counters: Counters, flushes: FlushTimes, mirror: MirrorCounts | None) -> Metrics:
    """Return the counts as `Metrics`."""
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
