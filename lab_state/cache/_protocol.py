"""The promise of a cache to the mirror writer that feeds it.

A cache keeps one mirror for each name: a copy of a state that others may read. It has
every value as JSON, its expiry time, the revision, and the id of its writer. It shows one
whole revision at a time. A manager never reads it back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol


class Slice(NamedTuple):
    """A part of a fill or of a step. It is small, so that the event loop can run after it.

    Attributes:
        values: The JSON of each key that is set.
        expires: For each of these keys that expires, the time in milliseconds since 1970.
        deleted: The keys that are deleted.
    """

    values: dict[str, bytes]
    expires: dict[str, int]
    deleted: list[str]

    def __repr__(self) -> str:
        """Return the numbers of keys, and no values, which may be secret."""
        return (
            f"<Slice of {len(self.values)} values, {len(self.expires)} expiry times, {len(self.deleted)} deleted keys>"
        )


class Step(NamedTuple):
    """A change of a mirror from one revision to a later one.

    Attributes:
        start: The revision before it.
        end: The revision after it.
        cleared: Whether everything that was there before is deleted first.
    """

    start: int
    end: int
    cleared: bool


class Seen(NamedTuple):
    """The writer and the revision of the mirror that is there. The writer is `None` if there is no whole mirror."""

    writer: str | None
    revision: int


SPOILT = Seen(None, -1)
"""There is a mirror of this writer, but another client has written to it."""


class CacheSession(Protocol):
    """The right of one writer to write the mirror of one state.

    Calls do not overlap. Each raises `StorageError` or a subclass, and no other error. After
    an error the outcome is unknown: readers see the mirror as it was before or after the
    call, and nothing between. Then the session can only be closed.
    """

    async def look(self) -> Seen:
        """Return who wrote the mirror that is there, and its revision.

        It may be this writer's, unchanged since the session's last call. Then readers that
        follow it get the message that its writer lives. If another client has changed it
        since then, the answer is `SPOILT`.
        """
        ...

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        """Replace the mirror by a whole state, in one moment.

        Args:
            revision: The revision of the state.
            slices: The state. The last slice comes when all of it is durable. Meanwhile there
                may be empty slices, so that a cache does not drop what it got so far.
            over: What `look` returned. If another writer has written a mirror since then,
                nothing is done. A mirror of this writer is replaced in any case.

        Returns:
            Whether the mirror was replaced.
        """
        ...

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        """Change this writer's mirror from one revision to a later one, in one moment.

        Args:
            step: The two revisions.
            slices: The changes. Each key comes once.

        Returns:
            Whether it was changed. If not, the mirror is not this writer's at `step.start`,
            and it is as it was.
        """
        ...

    async def aclose(self) -> None:
        """End the session; the mirror stays. A second call does nothing. It raises nothing, and does not wait."""
        ...


class Cache(Protocol):
    """The place of mirrors. One object may serve any number of names."""

    async def open(self, name: str, writer: str) -> CacheSession:
        """Open a session that writes the mirror of a state.

        Args:
            name: The name of the state.
            writer: The id of the writer. No two writers have the same.

        Raises:
            StorageError: The cache cannot be reached, or refuses.
        """
        ...
