"""What expires when. Pure and synchronous.

Theory of operation. A value that expires is kept wrapped, with the time, so that a view
of the entries holds the times too and nothing else is asked when a value is read. The
index beside it, `Expiries`, only finds what is due: a bucket of keys for each second, so
that a sweep looks at the seconds that passed since the last one and at nothing else, and
what is due is counted without a look at each key.

While there is a watch, keys must be found at their time, not with their second. Then the keys
of the next few seconds are in a heap, too. A key that is deleted or gets another time leaves
its place in the heap behind. That is noticed when its time comes.

Time here is the state's own (`State.now`): it starts from the wall clock, and then counts
the seconds that pass, so a wall clock that is set while the manager runs expires nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

_AHEAD = 3
"""Keys of so many seconds are in the heap, the present one included: more than passes between two sweeps."""

_LEFT_BEHIND = 4
"""So many places of the heap are looked at for each key that may be taken."""


def resumed(time: int, wall: int, now: float) -> tuple[float, float]:
    """Return the time that expiry goes by, and how far the wall clock is behind the recorded time.

    It goes on from `time` with what the wall clock has gone on since. Where the wall clock was
    wrong when this was written, or is behind, keys live longer.

    Args:
        time: The time of the state when it was written, in milliseconds since 1970.
        wall: What the wall clock showed then, likewise.
        now: What the wall clock shows now, in seconds since 1970.

    Returns:
        Both in seconds; the second is 0 where the wall clock is not behind.
    """
    passed = now - max(wall, time) / 1000
    return time / 1000 + max(0.0, passed), max(0.0, -passed)


class Bucket(dict[str, int]):
    """Keys that expire in the same second, with their times in milliseconds.

    Attributes:
        first: No time is before this one.
        last: No time is behind this one.
    """

    __slots__ = ("first", "last")

    def __init__(self, at: int) -> None:
        """For keys of about this time."""
        super().__init__()
        self.first: int = at
        self.last: int = at


class Expiries:
    """Keys by the second in which they expire.

    Attributes:
        on_first: Called when the first key has come in.
        on_nearer: Called when a key has come in that is due before those in the heap.
    """

    __slots__ = ("_buckets", "_heap", "_heaped", "_loading", "_next", "_second", "on_first", "on_nearer")

    def __init__(self, now: int) -> None:
        """No keys; what is due at `now` comes with the next sweep."""
        self._second: dict[str, int] = {}
        self._buckets: dict[int, Bucket] = {}
        self._next = now // 1000
        self._heap: list[tuple[int, str]] | None = None
        self._heaped = -1  # keys of earlier seconds are in the heap
        self._loading: tuple[Bucket, list[str]] | None = None
        self.on_first: Callable[[], object] | None = None
        self.on_nearer: Callable[[], object] | None = None

    def __bool__(self) -> bool:
        return bool(self._second)

    def __contains__(self, key: object) -> bool:
        return key in self._second

    def add(self, key: str, at: int) -> None:
        """A key expires at this time, in milliseconds, and at no other."""
        is_first = not self._second
        self.discard(key)
        second = self._second[key] = max(at // 1000, self._next)
        bucket = self._buckets.get(second)
        if bucket is None:
            bucket = self._buckets[second] = Bucket(at)
        bucket[key] = at
        bucket.first, bucket.last = min(bucket.first, at), max(bucket.last, at)
        if second < self._heaped:
            self._put_in_heap(at, key)
        if is_first and self.on_first is not None:
            self.on_first()

    def discard(self, key: str) -> None:
        """A key is gone."""
        second = self._second.pop(key, None)
        if second is not None:
            bucket = self._buckets[second]
            del bucket[key]
            if not bucket:
                del self._buckets[second]

    def clear(self) -> tuple[dict[Any, Any], ...]:
        """All keys are gone; returns the maps that held them."""
        held = self._second, self._buckets
        self._second, self._buckets = {}, {}
        if self._heap is not None:
            self._heap, self._loading = [], None
        return held

    def attend(self, *, wanted: bool) -> None:
        """Begin, or end, to give keys at their time; see `load`."""
        self._heap = [] if wanted else None
        self._heaped, self._loading = -1, None

    def load(self, now: int, most: int) -> bool:
        """Put keys of the next seconds into the heap, up to `most`; returns whether there are more."""
        if self._heap is None:
            return False
        present = now // 1000
        while self._loading is not None or self._heaped < present + _AHEAD:
            if self._loading is None:
                second = max(self._heaped, present)
                self._heaped = second + 1
                bucket = self._buckets.get(second)
                if bucket is None:
                    continue
                self._loading = bucket, list(bucket)
            bucket, keys = self._loading
            for key in keys[-most:]:
                at = bucket.get(key)
                if at is not None:
                    self._put_in_heap(at, key)
            del keys[-most:]
            if keys:
                return True
            self._loading = None
        return False

    def nearest(self) -> int | None:
        """Return when to look at the heap again, in milliseconds: the time of a key, which may be gone."""
        return self._heap[0][0] if self._heap else None

    def _put_in_heap(self, at: int, key: str) -> None:
        assert self._heap is not None
        heapq.heappush(self._heap, (at, key))
        if self._heap[0][1] is key and self.on_nearer is not None:
            self.on_nearer()

    def due(self, now: int) -> int:
        """How many keys are due. Looks at each of those that expire this very second, at most."""
        total = 0
        for bucket in self.passed(now):
            if bucket.last <= now:
                total += len(bucket)
            elif bucket.first <= now:
                total += sum(at <= now for at in bucket.values())
        return total

    def passed(self, now: int) -> Iterator[Bucket]:
        """The buckets that may hold keys that are due, in order of time."""
        end = now // 1000 + 1
        if end - self._next <= len(self._buckets):
            seconds = [second for second in range(self._next, end) if second in self._buckets]
        else:
            seconds = sorted(second for second in self._buckets if second < end)
        return (self._buckets[second] for second in seconds)

    def take(self, now: int, most: int) -> list[str]:
        """Take up to `most` keys whose second is over out of the index, those of the oldest first.

        And those in the heap whose time is over.
        """
        over = now // 1000 * 1000 - 1
        taken: list[str] = []
        for bucket in self.passed(over):
            while bucket and len(taken) < most:
                taken.append(bucket.popitem()[0])
        for key in taken:
            second = self._second.pop(key)
            if not self._buckets.get(second, True):
                del self._buckets[second]
        if len(taken) < most:
            self._next = over // 1000 + 1
            self._take_near(now, most, taken)
        return taken

    def _take_near(self, now: int, most: int, taken: list[str]) -> None:
        heap, looks = self._heap, most * _LEFT_BEHIND
        while heap and heap[0][0] <= now and len(taken) < most and looks:
            looks -= 1
            at, key = heapq.heappop(heap)
            second = self._second.get(key)
            if second is not None and self._buckets[second][key] == at:
                self.discard(key)
                taken.append(key)
