"""Decide whether a reader may show a part of a mirror that it has read. This module does no I/O.

If one of the two hashes is missing, or their heads differ, nothing is shown. A revision below an earlier revision is shown only
after a running writer has reported it for some seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lab_state.cache._feed import logger
from lab_state.cache._format import Head, parse_head
from lab_state.cache._source import Fetched
from lab_state.exceptions import UnavailableError

STANDS_SECONDS = 10.0
"""The seconds for which a running writer must report a lower revision before that revision is accepted."""


class AcceptedHead(NamedTuple):
    """A head that may be shown, and whether its revision is lower than an earlier revision."""

    head: Head
    went_back: bool


class RevisionGuard:
    """A check that refuses revisions below the highest revision that was read before.

    A lower revision is accepted when a running writer has reported it for `STANDS_SECONDS`.

    Attributes:
        seen: The highest revision that was read. If a lower revision is accepted, `seen` is set to the lower revision.
    """

    def __init__(self, name: str, path: str) -> None:
        """Begin without a revision, so that any revision is accepted. `name` and `path` of the mirror are for messages."""
        self.seen: int = 0
        self._name = name
        self._path = path
        # The writer that reports a lower revision, and the time of its first report.
        self._lower: tuple[str, float] | None = None

    def close(self, highest: int) -> None:
        """Remember the highest revision for the next opening of the reader."""
        self.seen, self._lower = max(self.seen, highest), None

    def accept(self, found: Fetched, floor: int, lives: Callable[[str, int], bool], now: float) -> AcceptedHead:
        """Return the head of a part of a mirror, if that part may be shown.

        Args:
            found: The part that was read.
            floor: The lowest revision that may be shown: the highest revision that was known
                when the read began.
            lives: A function that returns whether a writer is running, and reports a revision below
                the given revision.
            now: The time of a monotonic clock, in seconds.

        Raises:
            UnavailableError: There is no mirror, half of it is missing, or its revision is below
                `floor` and not accepted yet.
            UnsupportedError: A newer version of lab_state wrote the mirror.
        """
        if found.head is None and found.head_of_expires is None:
            raise UnavailableError(
                f"there is no mirror of {self._name!r} at {self._path}: start its manager with this cache; "
                "if it runs, it fills the mirror within seconds"
            )
        head = parse_head(found.head or b"") if found.head == found.head_of_expires else None
        if head is None:
            raise UnavailableError(
                f"half of the mirror of {self._name!r} at {self._path} is missing, or is not from lab_state: the manager fills "
                "it again within seconds; if Redis evicts keys, set maxmemory-policy to noeviction"
            )
        went_back = head.revision < floor and self._stands(head, floor, lives, now)
        if head.revision < floor and not went_back:
            raise UnavailableError(
                f"the mirror of {self._name!r} at {self._path} is at revision {head.revision}, and {floor} was "
                "read before: Redis has lost recent data, and the manager fills it again within seconds; if the "
                f"state itself was restored from a backup, its manager reports that, and reads succeed after {STANDS_SECONDS:g} s"
            )
        self.seen = head.revision if went_back else max(self.seen, head.revision)
        self._lower = None
        return AcceptedHead(head, went_back)

    def _stands(self, head: Head, floor: int, lives: Callable[[str, int], bool], now: float) -> bool:
        """Return whether a lower revision is right: its writer is running, and has reported lower revisions for long enough."""
        if not lives(head.writer, floor):
            self._lower = None
        elif self._lower is None or self._lower[0] != head.writer:
            self._lower = head.writer, now
        elif now - self._lower[1] >= STANDS_SECONDS:
            logger.warning(
                "%s: revision %d was read before, but its manager is at %d: the state was restored from a backup, or "
                "another client had written to the mirror; reads continue from there",
                self._path,
                floor,
                head.revision,
            )
            return True
        return False
