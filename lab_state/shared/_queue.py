"""The bytes that wait to be sent on one connection. This module does no I/O.

Small parts are joined, so that many messages need only one system call. A large part is sent without a
copy: the queues of all followers share a record of many megabytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MOST_WAITING = 64 * 1024 * 1024
"""The bound of a queue, in bytes. One message that is larger than the bound may wait in addition."""

_SMALL = 64 * 1024
"""The largest size in bytes of a part that is joined with others."""

_JOINED = 256 * 1024
"""If joined parts have this size in bytes or more, no further part is added to them."""


class SendQueue:
    """Parts of messages in the order in which they are sent."""

    __slots__ = ("_added", "_large", "_large_end", "_most", "_parts", "_sent")

    def __init__(self, most: int | None) -> None:
        """Set the bound in bytes. `None` sets no bound, for a sender that limits its messages itself."""
        self._most = most
        self._parts: deque[bytes | memoryview] = deque()
        self._added = self._sent = 0
        self._large = self._large_end = 0  # the size of the last large message, and the value of `_sent` at its end

    def __bool__(self) -> bool:
        """Return whether anything waits to be sent."""
        return bool(self._parts)

    @property
    def waiting(self) -> int:
        """The number of bytes that wait to be sent."""
        return self._added - self._sent

    def put(self, parts: Iterable[bytes | memoryview]) -> bool:
        """Append a message, and return True. If the queue is full, append nothing, and return False.

        A message that is larger than the bound does not count toward the bound. Only one such message may wait.
        """
        parts = tuple(parts)
        size = sum(map(len, parts))
        if self._most is not None and not self._has_room(size, self._most):
            return False
        self._parts += parts
        self._added += size
        return True

    def _has_room(self, size: int, most: int) -> bool:
        has_large = self._sent < self._large_end
        if size <= most:
            return self.waiting + size <= most + (self._large if has_large else 0)
        if has_large:
            return False
        self._large, self._large_end = size, self._added + size
        return True

    def next_piece(self) -> bytes | memoryview:
        """Return the bytes to send next, from a queue that is not empty. The bytes stay in the queue until `sent`."""
        parts = self._parts
        if len(parts) > 1 and len(parts[0]) <= _SMALL:
            small: list[bytes | memoryview] = []
            size = 0
            while parts and len(parts[0]) <= _SMALL and size < _JOINED:
                size += len(parts[0])
                small.append(parts.popleft())
            parts.appendleft(b"".join(small))
        return parts[0]

    def sent(self, size: int) -> None:
        """Remove the first `size` bytes of the piece that `next_piece` returned last."""
        piece = self._parts[0]
        if size == len(piece):
            self._parts.popleft()
        else:
            self._parts[0] = memoryview(piece)[size:]
        self._sent += size

    def clear(self) -> None:
        """Remove everything, because the connection has ended."""
        self._parts.clear()
        self._sent = self._added
