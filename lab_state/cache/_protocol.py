"""What a cache promises to the mirror that feeds it.

A cache keeps, for each name, a copy of one state that others may read: every value as
JSON, when it expires, the revision, and who wrote it. It shows one revision at a time,
whole. It is never read back into a manager.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol


class Slice(NamedTuple):
    """A part of a state, or of a change, small enough to give the event loop back after it.

    Attributes:
        values: The JSON of what is set.
        expires: When those of them expire that do, in milliseconds since 1970.
        deleted: What is deleted.
    """

    values: dict[str, bytes]
    expires: dict[str, int]
    deleted: list[str]


class Step(NamedTuple):
    """From one revision to a later one; `cleared`: what was there before was deleted first."""

    start: int
    end: int
    cleared: bool


class Seen(NamedTuple):
    """Who wrote the copy that is there, and at which revision; `None`: there is none that is whole."""

    writer: str | None
    revision: int


SPOILT = Seen(None, -1)
"""There is a copy of this writer's, but another client has written to it."""


class CacheSession(Protocol):
    """One writer's hold on the copy of one state.

    One call is under way at a time. Each raises `StorageError` or a subclass, and nothing
    else; then the outcome is unknown, readers see the state before or after the call and
    nothing between, and the session is of no more use than to be closed.
    """

    async def look(self) -> Seen:
        """Return which copy is there.

        If it was this writer's when the session looked, filled or applied last, and still
        is, those who follow it are told that its writer lives. `SPOILT` if another client
        has touched it since.
        """
        ...

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        """Put a whole state in the place of whatever is there, in one moment.

        Args:
            revision: The revision of the state.
            slices: The state. The last one comes when all of it is durable; empty ones
                may come meanwhile, so that what was brought so far is kept.
            over: What `look` saw. If another writer has put something else there since,
                nothing is done. What this writer put there itself is replaced.

        Returns:
            Whether it was done.
        """
        ...

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        """Take this writer's copy from one revision to a later one, in one moment.

        Args:
            step: The two revisions.
            slices: What changed, each key once.

        Returns:
            Whether it was done. If not, the copy is not this writer's at `step.start`,
            and nothing was changed.
        """
        ...

    async def aclose(self) -> None:
        """Let go; the copy stays. Idempotent, raises nothing, and waits for nobody."""
        ...


class Cache(Protocol):
    """Configuration: where copies are kept. One object may serve any number of names."""

    async def open(self, name: str, writer: str) -> CacheSession:
        """Begin to write the copy of a state.

        Args:
            name: The name of the state.
            writer: Who writes; no two writers have the same.

        Raises:
            StorageError: It cannot be reached, or refuses.
        """
        ...
