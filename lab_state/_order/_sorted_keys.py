"""Keys in order of code points, in lists of some thousand. Pure and synchronous.

Theory of operation. The keys are in sorted lists, the chunks. Each chunk has at most
`2 * SIZE` keys. `_lasts` has the last key of each chunk, so two binary searches find a key.
`_tree` is a Fenwick tree over the lengths of the chunks. It gives the number of keys before
a chunk in O(log n). It is made anew after chunks were split or joined, when it is needed.

`pieces` returns chunks themselves, not copies. So it first marks all chunks as shared: it
raises `_epoch`. A shared chunk is copied before it changes. The pieces therefore never change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

SIZE = 1000
"""The number of keys of a new chunk. A chunk of twice as many keys is split, and one of a quarter is joined."""


class SortedKeys:
    """A set of keys in order of code points, with positions.

    A range is given by two bounds. A key is in it if `low <= key`, and `key < high` unless
    `high` is `None`. A bound need not be a valid key.
    """

    __slots__ = ("_chunks", "_epoch", "_epochs", "_lasts", "_size", "_tree")

    def __init__(self, chunks: Iterable[list[str]] = ()) -> None:
        """Take the keys. The chunks are sorted lists, without repetition, one above the other. They are not copied."""
        self._chunks: list[list[str]] = [
            part
            for chunk in chunks
            if chunk
            for part in (
                [chunk] if len(chunk) < 2 * SIZE else [chunk[i : i + SIZE] for i in range(0, len(chunk), SIZE)]
            )
        ]
        self._lasts: list[str] = [chunk[-1] for chunk in self._chunks]
        self._size: int = sum(map(len, self._chunks))
        self._epoch: int = 0
        self._epochs: list[int] = [0] * len(self._chunks)  # `_epoch` when each chunk was made
        self._tree: list[int] | None = None

    def __len__(self) -> int:
        return self._size

    def add(self, key: str) -> None:
        """Add a key. Do nothing if it is there."""
        at = bisect_left(self._lasts, key)
        if at == len(self._lasts):
            self._append(key)
            return
        chunk = self._chunks[at]
        place = bisect_left(chunk, key)
        if chunk[place] != key:
            self._own(at).insert(place, key)
            self._resized(at, 1)

    def _append(self, key: str) -> None:
        """Add a key that is above all others."""
        at = len(self._chunks) - 1
        if at < 0:
            self._chunks, self._lasts, self._epochs, self._tree = [[key]], [key], [self._epoch], None
            self._size = 1
            return
        self._own(at).append(key)
        self._lasts[at] = key
        self._resized(at, 1)

    def remove(self, key: str) -> None:
        """Remove a key. Do nothing if it is not there."""
        at = bisect_left(self._lasts, key)
        if at == len(self._lasts):
            return
        chunk = self._chunks[at]
        place = bisect_left(chunk, key)
        if chunk[place] == key:
            chunk = self._own(at)
            del chunk[place]
            if chunk:
                self._lasts[at] = chunk[-1]
            self._resized(at, -1)

    def _own(self, at: int) -> list[str]:
        """Return a chunk that may be changed. A shared one is copied first."""
        if self._epochs[at] != self._epoch:
            self._chunks[at] = self._chunks[at].copy()
            self._epochs[at] = self._epoch
        return self._chunks[at]

    def _resized(self, at: int, by: int) -> None:
        """Note that a chunk has `by` keys more. Split it or join it with the next one if its length is out of bounds."""
        self._size += by
        length = len(self._chunks[at])
        if length >= 2 * SIZE:
            chunk = self._chunks[at]
            self._replace(at, at + 1, [chunk[:SIZE], chunk[SIZE:]])
        elif length * 4 < SIZE and by < 0 and (not length or len(self._chunks) > 1):
            first = max(0, min(at, len(self._chunks) - 2))
            joined = [key for chunk in self._chunks[first : first + 2] for key in chunk]
            half = len(joined) // 2
            parts = [joined] if len(joined) < SIZE else [joined[:half], joined[half:]]
            self._replace(first, first + 2, [part for part in parts if part])
        elif self._tree is not None:
            tree = self._tree
            while at < len(tree):
                tree[at] += by
                at |= at + 1

    def _replace(self, start: int, stop: int, chunks: list[list[str]]) -> None:
        self._chunks[start:stop] = chunks
        self._lasts[start:stop] = [chunk[-1] for chunk in chunks]
        self._epochs[start:stop] = [self._epoch] * len(chunks)
        self._tree = None

    def position(self, bound: str | None) -> int:
        """Return the number of keys below a bound, in O(log n). `None` is above all keys."""
        at, place = self._find(bound)
        tree = self._tree
        if tree is None:
            tree = self._tree = [len(chunk) for chunk in self._chunks]
            for child in range(len(tree)):
                parent = child | (child + 1)
                if parent < len(tree):
                    tree[parent] += tree[child]
        while at:
            place += tree[at - 1]
            at &= at - 1
        return place

    def count(self, low: str, high: str | None) -> int:
        """Return the number of keys in a range, in O(log n)."""
        return max(0, self.position(high) - self.position(low))

    def _find(self, bound: str | None) -> tuple[int, int]:
        """Return the chunk of the first key that is not below a bound, and the place of the key in the chunk."""
        if bound is None:
            return len(self._chunks), 0
        at = bisect_left(self._lasts, bound)
        return at, bisect_left(self._chunks[at], bound) if at < len(self._chunks) else 0

    def pieces(self, low: str, high: str | None) -> list[list[str]]:
        """Return the keys of a range as sorted lists, one above the other, which never change. Do not change them.

        Each list has 1 to `2 * SIZE` keys. The cost is O(log n), and some nanoseconds for each list.
        """
        first, start = self._find(low)
        last, stop = self._find(high)
        if first == last:
            pieces = [self._chunks[first][start:stop]] if start < stop else []
        elif first > last:
            pieces = []
        else:
            pieces = [self._chunks[first][start:], *self._chunks[first + 1 : last]]
            if stop:
                pieces.append(self._chunks[last][:stop])
            self._epoch += 1
        return pieces

    def page(self, low: str, high: str | None, limit: int | None = None, *, reverse: bool = False) -> list[str]:
        """Return the first keys of a range, at most `limit`; the last ones, from the highest down, with `reverse`.

        The cost is O(log n), and some nanoseconds for each key.
        """
        first, start = self._find(low)
        last, stop = self._find(high)
        room = self._size if limit is None else limit
        found: list[str] = []
        at, step, end = (min(last, len(self._chunks) - 1), -1, first - 1) if reverse else (first, 1, last + 1)
        while at != end and 0 <= at < len(self._chunks) and first <= last and len(found) < room:
            chunk = self._chunks[at]
            begin = start if at == first else 0
            finish = stop if at == last else len(chunk)
            if reverse:
                begin = max(begin, finish - room + len(found))
                found += chunk[begin:finish][::-1]
            else:
                finish = min(finish, begin + room - len(found))
                found += chunk[begin:finish]
            at += step
        return found
