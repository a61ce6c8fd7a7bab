"""The contract between a cache and the mirror writer of a manager.

A cache keeps one mirror for each name. A mirror is a copy of a state for other processes. It has
every value as JSON, the expiry times, the revision, and the id of its writer. Readers always see
one whole revision. A manager never reads values from a mirror.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol


class Slice(NamedTuple):
    """A part of a fill or of a step. It is small, unless a value is large. The event loop can run after each slice.

    Attributes:
        values: The JSON of each key that is set.
        expires: The expiry time of each of these keys that expires, in milliseconds since 1970.
        deleted: The keys that are deleted.
    """

    values: dict[str, bytes]
    expires: dict[str, int]
    deleted: list[str]

    def __repr__(self) -> str:
        """Return the numbers of keys. The text has no values, because they may be secret."""
        return (
            f"<Slice of {len(self.values)} values, {len(self.expires)} expiry times, {len(self.deleted)} deleted keys>"
        )


class Step(NamedTuple):
    """A change of a mirror from one revision to a later one.

    Attributes:
        start: The revision before the step.
        end: The revision after the step.
        cleared: Whether all keys are deleted before the changes of the step.
    """

    start: int
    end: int
    cleared: bool


class Seen(NamedTuple):
    """The writer and the revision of the present mirror. The writer is `None` if there is no whole mirror."""

    writer: str | None
    revision: int


SPOILT = Seen(None, -1)
"""The result of `look` for a mirror of this writer to which another client has written."""


class CacheSession(Protocol):
    """A session in which one writer writes the mirror of one state.

    Calls do not overlap. If a call fails, it raises `StorageError` or a subclass, and no other error. After
    an error the outcome is unknown: readers see the mirror without the change of the call, or with
    the whole change, and never with a part of it. After an error the session can only be closed.
    """

    async def look(self) -> Seen:
        """Return the writer and the revision of the present mirror.

        If this writer wrote the mirror, and the mirror is unchanged since the last call of the session,
        send readers a heartbeat. If another client has changed the mirror since then, but not its writer
        and revision, return `SPOILT`.
        """
        ...

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        """Replace the mirror by a whole state, in one moment.

        Args:
            revision: The revision of the state.
            slices: The slices of the state. They end when the whole state is durable. Before the end
                there may be empty slices. They keep the cache from dropping the slices that it has received.
            over: The result of `look`. If another writer has written a mirror since that call,
                nothing is done. A mirror of this writer is always replaced.

        Returns:
            Whether the mirror was replaced. The result is also False if the cache has dropped slices.
        """
        ...

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        """Change this writer's mirror from one revision to a later one, in one moment.

        Args:
            step: The two revisions.
            slices: The slices of the changes. Each key comes once.

        Returns:
            Whether the mirror was changed. False means that there is no mirror of this writer at
            revision `step.start`, or that another client has written to it. Then nothing was changed.
        """
        ...

    async def aclose(self) -> None:
        """End the session; the mirror stays. A second call does nothing. The call raises no error, and does not wait."""
        ...


class Cache(Protocol):
    """A place for mirrors. One object may be used for any number of names."""

    async def open(self, name: str, writer: str) -> CacheSession:
        """Open a session that writes the mirror of a state.

        Args:
            name: The name of the state.
            writer: The id of the writer. Each writer has a different id.

        Raises:
            StorageError: The cache cannot be reached, or refuses the session.
        """
        ...
