"""The keys for which a client is about to make another attempt, because its check was refused. This module does no I/O.

A call of a task of the owner needs no check. So such calls could change a key again and again before the next
attempt of a client arrives, above all on a busy machine. Each attempt of the client would then be refused. Therefore
a task of the owner waits until the client has made its attempt, for at most 10 ms (see `OwnerFlusher.run`).
"""

from __future__ import annotations

from collections.abc import Callable

PATIENCE = 5_000_000
"""The time in nanoseconds for which an attempt is awaited. On an idle machine, an attempt arrives after some 200 microseconds."""


class Attempts:
    """The keys of checks that were refused lately. For each key, another attempt is awaited for `PATIENCE`.

    Attributes:
        on_made: A callback. It gets the key when an awaited attempt was made, and its check held.
    """

    def __init__(self, monotonic_ns: Callable[[], int]) -> None:
        """Begin without a key. `monotonic_ns` returns the time of `CLOCK_MONOTONIC`, in nanoseconds."""
        self.on_made: Callable[[str], object] | None = None
        self._now = monotonic_ns
        self._until: dict[
            str, int
        ] = {}  # the time until which an attempt is awaited, by key, in the order of these times

    def __len__(self) -> int:
        """Return the number of keys that are kept."""
        return len(self._until)

    def refuse(self, key: str) -> None:
        """Note that a check of one key was refused."""
        now, until = self._now(), self._until
        until.pop(key, None)
        until[key] = now + PATIENCE
        while until[oldest := next(iter(until))] <= now:
            del until[oldest]

    def make(self, key: str) -> None:
        """Note that a check of one key held. If an attempt was awaited, call `on_made`."""
        if self._until.pop(key, None) is not None and self.on_made is not None:
            self.on_made(key)

    def is_awaited(self, key: str) -> bool:
        """Return whether an attempt with a check of this key is awaited."""
        return key in self._until and self._until[key] > self._now()
