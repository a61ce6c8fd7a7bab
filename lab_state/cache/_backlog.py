"""The durable changes that are not in the mirror yet. This module does no I/O.

The flusher adds each commit to a queue, which takes almost no time. The task of the mirror merges
the commits key by key, in small steps. If there are more than `MOST_KEYS` keys, or if the merged
values have more than `MOST_BYTES` bytes, all changes are dropped, and the mirror has to be filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lab_state._entries import MISSING, Absent, ChangeSet, Expiring, StoredOrGone, size_of

MOST_KEYS = 100_000
MOST_BYTES = 32 * 1024 * 1024


class Backlog:
    """The changes of commits, merged into one step.

    Attributes:
        overflowed: Whether changes were dropped, so that the mirror must be filled.
        end: The last revision in the backlog; 0 while it is empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop everything, and forget an overflow."""
        self.overflowed: bool = False
        self.end: int = 0
        self._queue: deque[tuple[ChangeSet, Iterator[tuple[str, StoredOrGone]]]] = deque()
        self._queued = 0
        self._changes: dict[str, StoredOrGone] = {}
        self._cleared = False
        self._bytes = 0

    def __bool__(self) -> bool:
        return self.end > 0

    @property
    def keys(self) -> int:
        """The number of keys. A key that is not merged yet counts once for each commit."""
        return len(self._changes) + self._queued

    def overflow(self) -> None:
        """Drop everything, and add nothing until `clear`. Call this if changes are missing, or if there are too many changes."""
        self.clear()
        self.overflowed = True

    def add(self, taken: ChangeSet) -> None:
        """Add the changes of a commit."""
        if self.overflowed:
            return
        if self.keys + len(taken.changes) > MOST_KEYS:
            self.overflow()
            return
        self._queue.append((taken, iter(taken.changes.items())))
        self._queued += len(taken.changes)
        self.end = max(self.end, taken.end)

    def merge(self, most: int) -> bool:
        """Merge up to `most` keys. Return whether commits are left in the queue."""
        while self._queue and most:
            taken, rest = self._queue[0]
            if taken.cleared:
                self._changes, self._bytes, self._cleared = {}, 0, True
                self._queue[0] = taken._replace(cleared=False), rest
            for key, changed in rest:
                self._put(key, changed)
                self._queued -= 1
                most -= 1
                if not most:
                    break
            else:
                self._queue.popleft()
        if self._bytes > MOST_BYTES:
            self.overflow()
        return bool(self._queue)

    def take(self, start: int) -> ChangeSet:
        """Return all changes as one step from revision `start`, and empty the backlog. All commits must be merged; see `merge`."""
        taken = ChangeSet(start, self.end, self._cleared, self._changes, 0.0)
        self.clear()
        return taken

    def put_back(self, taken: ChangeSet) -> None:
        """Put back the changes that `take` returned, because they may not be in the mirror. They do not replace newer changes."""
        if self.overflowed:
            return
        self._queue.appendleft((taken, iter(taken.changes.items())))
        self._queued += len(taken.changes)
        self.end = max(self.end, taken.end)
        if self.keys > MOST_KEYS:
            self.overflow()

    def _put(self, key: str, changed: StoredOrGone) -> None:
        if (before := self._changes.get(key, MISSING)) is not MISSING:
            self._bytes -= _size(before)
        self._changes[key] = changed
        self._bytes += _size(changed)


def _size(changed: StoredOrGone) -> int:
    if isinstance(changed, Expiring):
        changed = changed.value
    return 8 if isinstance(changed, Absent) else size_of(changed)
