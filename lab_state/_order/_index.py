"""The index of a state: its keys in order of code points. This module does no I/O.

Theory of operation. The sorted keys (`SortedKeys`) may be out of date. `_touched` has the keys that may have
been added or removed since the last correction. A write only adds a key to this set. When a call needs the
order, touched keys are looked up in the state, and then added to the sorted keys or removed from them.

If few keys are touched, the call looks up all of them. If more are touched, an asynchronous call looks
them up in steps. A synchronous call looks up at most `FEW`, and corrects its result for the others. So each result
is right, and the next call has less to do.

A change of many keys gives its set of keys to the index in one short step. The larger one of this set and `_touched`
becomes `_touched`. The smaller one becomes `_waiting`, and its keys are moved to `_touched` in steps.

In one case, a write does not add its key to `_touched`: `set` stores a key that was deleted after the last
`State.take`. The deletion of this key is still in `State.changes`, so `set` treats the key as one that exists.
Therefore `_gone` has the keys that were removed since the last `take`. If no key is touched, the number of sorted
keys differs from the number of entries only if `set` has stored such a key.

A large index is built in steps. The build takes the keys of the dict of entries, 2,000 in a step. If a key is added
or removed before all are taken, the build takes all keys again, in one step of about 50 ms for a million keys. If
no key was added or removed, and all keys of the dict are in order already, they are only cut into chunks. Otherwise the
keys are distributed to buckets, and each bucket is sorted. A sorted sample of the keys gives the bounds of the buckets.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol

from lab_state._order._sorted_keys import Chunk, SortedKeys, cut


class Held(Protocol):
    """The entries of a state, with the two calls that the index needs."""

    def __contains__(self, key: object, /) -> bool: ...
    def __len__(self) -> int: ...


FEW = 300
"""The largest number of touched keys that one step looks up. Such a step takes about 2 ms."""

SMALL = 4_000
"""An index of at most this many keys is built in one step, which takes about 2 ms."""

_SAMPLE = 4_096
"""The approximate number of keys that are sorted to find the bounds of the buckets."""

_BUCKET = 1_000
"""The approximate number of keys in a bucket. With more than a million keys there are about 1,000 buckets, which are larger."""

_KEYS_IN_STEP = 2_000
"""The approximate number of keys that a step of the build takes, distributes or sorts."""

_UNTRACKED_AT_ONCE = 16
"""The number of steps or buckets after which the build runs the garbage collector; see `_untrack`."""


CHUNKS_AT_ONCE = 16
"""The number of chunks that are freed in one step: about 4,000 keys."""


def bounds(prefix: str, after: str | None = None, *, reverse: bool = False) -> tuple[str, str | None]:
    """Return the bounds of a range. The range has the keys with `low <= key < high`. If `high` is `None`, it has no upper bound.

    Args:
        prefix: The beginning of the keys, as they are in the state.
        after: The range begins above this key, or ends below it if `reverse` is set.
        reverse: Whether the keys are wanted from the highest down.
    """
    low, high = prefix, _above(prefix)
    if after is not None:
        if not reverse:
            low = max(low, after + "\0")  # the first text above `after`
        elif high is None or after < high:
            high = after
    return low, high


def _above(prefix: str) -> str | None:
    """Return the smallest text above all texts that start with `prefix`; `None` if there is none."""
    stem = prefix.rstrip("\U0010ffff")
    return stem[:-1] + chr(ord(stem[-1]) + 1) if stem else None


class Index:
    """The keys of a state in order of code points.

    Attributes:
        is_whole: Whether the sorted keys may be used. It is False if an error, such as a `RecursionError`, has
            stopped a step half-way. Then the state makes a new index.
    """

    __slots__ = ("_build", "_gone", "_keys", "_touched", "_waiting", "is_whole")

    def __init__(self, base: dict[str, Any], touched: Iterable[str], gone: Iterable[str]) -> None:
        """Begin an index. A small index is built now, and a large one in steps.

        Args:
            base: A dict with the keys. Each change of its keys must be noted.
            touched: Keys of layers over `base`. The layers may have added or removed them.
            gone: See `note_gone`.
        """
        self.is_whole: bool = True
        self._touched: set[str] = set(touched)
        self._waiting: set[str] = set()  # other touched keys, which `merge_some` moves to `_touched`
        self._gone: set[str] = set(gone)
        self._build: Generator[None] | None = None
        if len(base) <= SMALL:
            self._keys = SortedKeys(cut(sorted(base)))
        else:
            self._keys = SortedKeys([])
            self._build = self._built(base)

    # Notes

    def note(self, key: str) -> None:
        """Note that a key may have been added or removed. The next call that needs the order looks up the key."""
        self._touched.add(key)

    def note_many(self, keys: Iterable[str]) -> None:
        """Note that keys may have been added or removed; see `note`."""
        self._touched.update(keys)

    def take_over(self, keys: set[str]) -> None:
        """Note that keys may have been added or removed. The index may keep the given set, and change it.

        The call is short, unless `_waiting` still has keys of an earlier call. All of these are moved to `_touched` now.
        """
        if self._waiting:
            self.merge_some(len(self._waiting))
        self._touched, self._waiting = (
            (self._touched, keys) if len(keys) < len(self._touched) else (keys, self._touched)
        )

    def merge_some(self, most: int) -> bool:
        """Move at most `most` keys from `_waiting` to `_touched`. Return whether `_waiting` has more keys."""
        self.is_whole = False
        touched, waiting = self._touched, self._waiting
        for _ in range(min(most, len(waiting))):
            touched.add(waiting.pop())
        self.is_whole = True
        return bool(waiting)

    def note_gone(self, keys: Iterable[str]) -> None:
        """Note keys that were deleted since the last commit, because `set` may store them again without a note."""
        self._gone.update(keys)

    def forget_gone(self, entries: Held) -> None:
        """Note that all changes were taken for a commit. `set` now notes each key that was deleted before this call.

        A key that is deleted from now on may be stored without a note.
        """
        self._touched.update([key for key in self._gone if key in entries])
        self._gone.clear()

    def is_too_old(self, entries: Held) -> bool:
        """Return whether a new index costs no more than looking up the touched keys.

        `State.end_window` drops such an index. So the memory of an unused index is bounded.
        """
        return len(self._touched) + len(self._waiting) > max(len(entries) // 4, SMALL)

    # Steps

    @property
    def is_building(self) -> bool:
        """Whether the build has not ended yet."""
        return self._build is not None

    @property
    def batches(self) -> int:
        """The number of calls of `catch_up` after which fewer than `FEW` keys are touched, if no writer touches more keys."""
        return (len(self._touched) + len(self._waiting)) // FEW

    def build_some(self) -> None:
        """Take one step of the build. Do nothing if the build has ended."""
        self.is_whole = False
        if self._build is not None and next(self._build, self) is self:
            self._build = None
        self.is_whole = True

    def catch_up(self, entries: Held) -> None:
        """Look up at most `FEW` touched keys, and correct the sorted keys. If the build has not ended, finish it first."""
        while self._build is not None:
            self.build_some()
        self.merge_some(FEW)
        self.is_whole = False
        keys, touched, gone = self._keys, self._touched, self._gone
        for _ in range(min(FEW, len(touched))):
            key = touched.pop()
            if key in entries:
                keys.add(key)
            else:
                keys.remove(key)
                gone.add(key)
        if gone and not (touched or self._waiting) and len(keys) != len(entries):
            back = [key for key in gone if key in entries]
            gone.difference_update(back)
            for key in back:
                keys.add(key)
        self.is_whole = True

    # Reading

    def page(self, entries: Held, low: str, high: str | None, limit: int | None, *, reverse: bool) -> list[str]:
        """Return the first keys in a range, at most `limit`. With `reverse`, return the last ones, from the highest down.

        Expired keys are included.
        """
        self.catch_up(entries)
        doubtful = self._doubtful(low, high)
        most = None if limit is None else limit + len(doubtful)
        found = self._keys.page(low, high, most, reverse=reverse)
        return corrected(found, doubtful, entries, reverse=reverse)[:limit] if doubtful else found

    def pieces(self, entries: Held, low: str, high: str | None) -> list[Chunk]:
        """Return the keys in a range, including expired keys, as sorted tuples. Each tuple is above the one before."""
        self.catch_up(entries)
        doubtful = self._doubtful(low, high)
        if not doubtful:
            return self._keys.pieces(low, high)
        patched = corrected(self._keys.page(low, high), doubtful, entries)
        return [tuple(patched)] if patched else []

    def count(self, entries: Held, low: str, high: str | None) -> int:
        """Return the number of keys in a range, including expired keys."""
        self.catch_up(entries)
        total = self._keys.count(low, high)
        if doubtful := self._doubtful(low, high):
            known = set(self._keys.page(low, high))
            total += sum((key in entries) - (key in known) for key in doubtful)
        return total

    def _doubtful(self, low: str, high: str | None) -> list[str]:
        """Return the keys in a range that the sorted keys may lack, or may still have after a deletion."""
        if not (self._touched or self._waiting):
            return []
        return in_range(self._touched.union(self._waiting, self._gone), low, high)

    def release(self) -> dict[int, Chunk]:
        """Return a new dict whose values are the chunks. The caller can free this dict in steps."""
        return dict(enumerate(self._keys.pieces("", None)))

    # The build

    def _built(self, base: dict[str, Any]) -> Generator[None]:
        """Build the sorted keys in steps. A key that other code adds or removes meanwhile is in `_touched`, `_waiting` or `_gone`."""
        parts: list[Chunk] = []
        chunks: list[Chunk] = []
        in_order, last, names = True, "", iter(base)
        while (part := self._slice(names)) is not None:
            if not part:
                break
            if in_order:
                in_order = part[0] > last and tuple(sorted(part)) == part
                last = part[-1]
                chunks += cut(part)
            parts.append(part)
            _untrack(len(parts))
            yield
        else:
            in_order, rest = False, list(base)
            parts.clear()
            while rest:
                yield
                parts.append(tuple(rest[-_KEYS_IN_STEP:]))
                del rest[-_KEYS_IN_STEP:]
        if in_order:
            self._keys = SortedKeys(chunks)
            return
        chunks.clear()
        count = len(parts) * _KEYS_IN_STEP
        stride = max(1, count // _SAMPLE)
        sample = sorted(chain.from_iterable(part[::stride] for part in parts))
        limits = sample[:: max(4, len(sample) * _BUCKET // count)][1:]
        buckets: list[list[str]] = [[] for _ in range(len(limits) + 1)]
        # Move the buckets to the oldest generation of the garbage collector now, because this is quick while they are
        # empty. From then on, only a full collection visits them.
        _untrack(0, 1)
        while parts:
            yield
            for key in parts.pop():
                buckets[bisect_right(limits, key)].append(key)
        done = 0
        buckets.reverse()
        while buckets:  # each bucket is freed in the step that sorts it
            bucket = buckets.pop()
            bucket.sort()
            chunks += cut(bucket)
            _untrack(len(buckets))
            done += len(bucket)
            if done >= _KEYS_IN_STEP:
                done = 0
                yield
        self._keys = SortedKeys(chunks)

    def _slice(self, names: Iterator[str]) -> Chunk | None:
        """Return the next keys of the dict; `None` if keys may have been added or removed, so that the iterator cannot be used."""
        if self._touched or self._waiting:
            return None
        try:
            return tuple(islice(names, _KEYS_IN_STEP))
        except RuntimeError:  # `set` has stored a key without a note; see the top of this module
            return None


def in_range(keys: Iterable[str], low: str, high: str | None) -> list[str]:
    """Return the keys that are in a range, in no particular order."""
    if high is None:
        return [key for key in keys if key >= low]
    return [key for key in keys if low <= key < high]


def corrected(keys: list[str], doubtful: list[str], present: Held, *, reverse: bool = False) -> list[str]:
    """Return `keys` with each key of `doubtful` that is in `present`, and without the other keys of `doubtful`.

    The keys are in order, or in the opposite order if `reverse` is set.
    """
    asked = set(doubtful)
    found = [key for key in keys if key not in asked]
    found += [key for key in asked if key in present]
    found.sort(reverse=reverse)
    return found


def _untrack(number: int, generation: int = 0) -> None:
    """Run the garbage collector, if `number` is a multiple of `_UNTRACKED_AT_ONCE`, and the collector is enabled.

    The collector finds that the newest tuples have only strings, and never visits them again. Without these runs,
    a later collection would visit all tuples in one step, which takes 50 ms for a million keys.
    """
    if not number % _UNTRACKED_AT_ONCE and gc.isenabled():
        gc.collect(generation)
