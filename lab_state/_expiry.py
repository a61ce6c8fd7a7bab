"""The expiry of keys, and the index that finds keys that are due. This module does no I/O.

The expiry of a key is a time, in milliseconds since 1970. A key is due from this time on. A value that expires
is stored together with its expiry, as an `Expiring`. So a view of the entries contains each expiry, and a
read needs no index. The index `Expiries` finds the keys that are due. It has a bucket for each second in
which keys expire. A sweep examines only the buckets of the seconds since the last sweep. If all keys of a bucket are
due, the size of the bucket is their number.

While there is a watch, a key must be found exactly at its expiry, not at the end of that second.
So the keys of the next few seconds are in a heap, too. If a key is deleted or gets another
expiry, its old item stays in the heap. The item is skipped when the old expiry comes.

A change of many keys does not change the main index in one step. Instead, `replace` sets two small indexes beside
the main one. `_stale` has the keys with their old expiries, and `_fresh` has the keys with their new expiries. The
counts consider both. `merge_replaced` removes the stale keys from the main index, and moves the fresh ones into it, in
steps.

The time of the state (`State.now`), and not the wall clock, decides which keys are due. If any loaded key
expires, a start calculates the time of the state from the recorded time (`resumed`). Otherwise it uses the time
of the wall clock. After the start, the time of the state counts the seconds that pass. So if the wall clock is
set while the manager runs, no expiry is affected before the next start.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

_AHEAD = 3
"""The heap has the keys of this many seconds, beginning with the current second. The time between two sweeps is shorter."""

_LEFT_BEHIND = 4
"""The largest number of heap items that a sweep examines for each key that it may remove. Deleted keys leave items in the heap."""


def resumed(time: int, wall: int, now: float) -> tuple[float, float]:
    """Return the time of a loaded state, and the seconds by which the wall clock is behind the recorded times.

    The time of the state is `time`, plus the seconds that have passed since the write. The wall clock counts these
    seconds, from the later one of `time` and `wall`. If the wall clock is before that time, no seconds have passed. So
    if the wall clock was set back since the write, keys live longer. If it was set forward, keys expire earlier.

    Args:
        time: The time of the state at the write, in milliseconds since 1970.
        wall: The time of the wall clock at the write, in milliseconds since 1970.
        now: The time of the wall clock now, in seconds since 1970.

    Returns:
        The time in seconds since 1970, and the seconds by which the wall clock is behind; 0 if it is not behind.
    """
    passed = now - max(wall, time) / 1000
    return time / 1000 + max(0.0, passed), max(0.0, -passed)


class Bucket(dict[str, int]):
    """Keys that expire in the same second, with the expiry of each in milliseconds.

    If a key is added after the second of its expiry was swept, the key goes into a later bucket, with its earlier expiry.

    Attributes:
        first: A lower bound of the expiries, in milliseconds.
        last: An upper bound of the expiries, in milliseconds.
    """

    __slots__ = ("first", "last")

    def __init__(self, at: int) -> None:
        """Make an empty bucket for the second that contains the time `at`, in milliseconds."""
        super().__init__()
        self.first: int = at
        self.last: int = at


class Expiries:
    """An index of keys by the second in which they expire.

    Attributes:
        on_first: A callback. It is called when an empty index gets keys.
        on_nearer: A callback. It is called when the heap gets a key that is due before all other keys in the heap.
    """

    __slots__ = (
        "_buckets",
        "_fresh",
        "_heap",
        "_heaped",
        "_loading",
        "_next",
        "_second",
        "_stale",
        "on_first",
        "on_nearer",
    )

    def __init__(self, now: int) -> None:
        """Make an empty index. A key that is added with an earlier expiry goes into the bucket of the second of `now`.

        `now` is in milliseconds since 1970.
        """
        self._second: dict[str, int] = {}  # the second in which each key expires; `_buckets` has the bucket of a second
        self._buckets: dict[int, Bucket] = {}
        self._next = now // 1000  # all keys of the seconds before this one were swept
        self._heap: list[tuple[int, str]] | None = None
        self._heaped = -1  # the heap has the keys of the seconds before this one, except those in `_loading`
        self._loading: tuple[Bucket, list[str]] | None = None  # a bucket, and its keys that are not in the heap yet
        self._stale: Expiries | None = None  # keys of this index whose expiry is no longer valid
        self._fresh: Expiries | None = None  # keys whose new expiry is not in this index yet
        self.on_first: Callable[[], object] | None = None
        self.on_nearer: Callable[[], object] | None = None

    def __bool__(self) -> bool:
        return bool(self._second) or self._fresh is not None

    def __contains__(self, key: object) -> bool:
        return key in self._second or (self._fresh is not None and key in self._fresh)

    def time_of(self, key: str) -> int:
        """Return the expiry of a key that is in the index, in milliseconds. `merge_replaced` must have merged all keys."""
        return self._buckets[self._second[key]][key]

    def add(self, key: str, at: int) -> None:
        """Add a key with its expiry, in milliseconds since 1970. If the index has the key, replace its expiry."""
        is_first = not self
        self.discard(key)
        self._put(key, at)
        if is_first and self.on_first is not None:
            self.on_first()

    def _put(self, key: str, at: int) -> None:
        second = self._second[key] = max(at // 1000, self._next)
        bucket = self._buckets.get(second)
        if bucket is None:
            bucket = self._buckets[second] = Bucket(at)
        bucket[key] = at
        bucket.first, bucket.last = min(bucket.first, at), max(bucket.last, at)
        if second < self._heaped:
            self._put_in_heap(at, key)

    def discard(self, key: str) -> None:
        """Remove a key, if the index has it."""
        self._remove(key)
        if self._stale is not None and self._fresh is not None:
            self._stale.discard(key)
            self._fresh.discard(key)

    def _remove(self, key: str) -> None:
        second = self._second.pop(key, None)
        if second is not None:
            bucket = self._buckets[second]
            del bucket[key]
            if not bucket:
                del self._buckets[second]

    def clear(self) -> tuple[dict[Any, Any], ...]:
        """Remove all keys. Return the dicts that contained them, so that the caller can free these in steps."""
        held: tuple[dict[Any, Any], ...] = self._second, self._buckets
        for other in (self._stale, self._fresh):
            held += () if other is None else other.clear()
        self._second, self._buckets = {}, {}
        self._stale = self._fresh = None
        if self._heap is not None:
            self._heap, self._loading = [], None
        return held

    # Changes of many keys

    def replace(self, stale: Expiries, fresh: Expiries) -> None:
        """Replace the expiries of many keys. `merge_replaced` must have merged all keys of an earlier call.

        Args:
            stale: Keys of this index whose expiry is no longer valid, with that expiry.
            fresh: Keys that get an expiry. If one of them is in this index, it is in `stale`, too.
        """
        is_first = not self
        self._stale, self._fresh = stale, fresh
        if is_first and fresh and self.on_first is not None:
            self.on_first()

    def merge_replaced(self, most: int) -> bool:
        """Merge up to `most` keys of `replace` into this index. Return False if all keys are merged."""
        stale, fresh = self._stale, self._fresh
        if stale is None or fresh is None:
            return False
        for _ in range(most):
            if fresh:
                key, at = fresh.popped()
                try:
                    self._remove(key)
                    stale.discard(key)
                    self._put(key, at)
                except BaseException:  # without an expiry, the key would never be swept
                    fresh.add(key, at)
                    raise
            elif stale:
                self._remove(stale.popped()[0])
            else:
                self._stale = self._fresh = None
                return False
        return True

    def popped(self) -> tuple[str, int]:
        """Remove one of the keys, and return it with its expiry. The index must have a key, and `merge_replaced` must have merged all keys."""
        key, second = self._second.popitem()
        bucket = self._buckets[second]
        at = bucket.pop(key)
        if not bucket:
            del self._buckets[second]
        return key, at

    def attend(self, *, wanted: bool) -> None:
        """Start or stop the use of the heap, which finds keys exactly at their expiry. `load` fills the heap."""
        self._heap = [] if wanted else None
        self._heaped, self._loading = -1, None

    def load(self, now: int, most: int) -> bool:
        """Put keys of the next seconds into the heap, up to `most` of each second. Return whether keys of these seconds are left."""
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
        """Return the first expiry in the heap, in milliseconds; `None` if the heap has no keys.

        The key may have been removed already, or may have a new expiry.
        """
        return self._heap[0][0] if self._heap else None

    def _put_in_heap(self, at: int, key: str) -> None:
        assert self._heap is not None
        heapq.heappush(self._heap, (at, key))
        if self._heap[0][1] is key and self.on_nearer is not None:
            self.on_nearer()

    def due(self, now: int) -> int:
        """Return the number of keys that are due. A bucket is examined key by key only if it may have both due and other keys."""
        total = 0
        for bucket in self.passed(now):
            if bucket.last <= now:
                total += len(bucket)
            elif bucket.first <= now:
                total += sum(at <= now for at in bucket.values())
        if self._stale is not None and self._fresh is not None:
            total += self._fresh.due(now) - self._stale.due(now)
        return total

    def due_keys(self, now: int) -> list[str]:
        """Return the keys that are due, in no particular order. Only the buckets up to the second of `now` are examined."""
        found = [key for bucket in self.passed(now) for key, at in bucket.items() if at <= now]
        if self._stale is not None and self._fresh is not None:
            stale = self._stale
            found = [key for key in found if key not in stale] + self._fresh.due_keys(now)
        return found

    def passed(self, now: int) -> Iterator[Bucket]:
        """Yield the buckets that may contain keys that are due, in order of time."""
        return (self._buckets[second] for second in self._passed_seconds(now))

    def _passed_seconds(self, now: int) -> list[int]:
        end = now // 1000 + 1
        if end - self._next <= len(self._buckets):
            return [second for second in range(self._next, end) if second in self._buckets]
        return sorted(second for second in self._buckets if second < end)

    def advance(self, now: int) -> None:
        """Let later searches begin at the first past second with a key, or at the present second.

        `take` does so, too. If neither were called, each search would examine all past seconds.
        """
        present = now // 1000
        seconds = self._passed_seconds(present * 1000 - 1)
        self._next = max(self._next, seconds[0] if seconds else present)

    def take(self, now: int, most: int) -> list[str]:
        """Remove up to `most` keys that are due, and return them.

        First take the keys of the seconds that have passed, in order of the seconds, and then keys of the heap. Without
        the heap, a key is found only when the whole second of its expiry has passed. A returned key may have a new expiry
        that is not merged yet, so the caller must check each key.
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
        if self._stale is not None:
            for key in taken:
                self._stale.discard(key)
        return taken

    def overdue(self, now: int, most: int) -> list[str]:
        """Return up to `most` keys that are due, as `take` does, and remove none of them."""
        found: dict[str, None] = {}
        for bucket in self.passed(now // 1000 * 1000 - 1):
            found.update(dict.fromkeys(islice(bucket, most - len(found))))
        if self._heap:
            self._find_near(self._heap, now, most, found)
        return list(found)

    def _find_near(self, heap: list[tuple[int, str]], now: int, most: int, found: dict[str, None]) -> None:
        """Add keys of the heap that are due, up to `most` keys in all. Drop items whose expiry is no longer valid."""
        looks, held = most * _LEFT_BEHIND, list[tuple[int, str]]()
        while heap and heap[0][0] <= now and len(found) < most and looks:
            looks -= 1
            item = heapq.heappop(heap)
            second = self._second.get(item[1])
            if second is not None and self._buckets[second][item[1]] == item[0]:
                found[item[1]] = None
                held.append(item)
        for item in held:
            heapq.heappush(heap, item)

    def _take_near(self, now: int, most: int, taken: list[str]) -> None:
        heap, looks = self._heap, most * _LEFT_BEHIND
        while heap and heap[0][0] <= now and len(taken) < most and looks:
            looks -= 1
            at, key = heapq.heappop(heap)
            second = self._second.get(key)
            if second is not None and self._buckets[second][key] == at:
                self._remove(key)
                taken.append(key)
