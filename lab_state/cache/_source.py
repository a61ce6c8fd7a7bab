"""The source that a reader reads from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol


class Fetched(NamedTuple):
    """A part of a mirror, as it was at one moment.

    Attributes:
        head: The field `$lab_state` of the values; `None` if it is missing.
        head_of_expires: The field `$lab_state` of the expiry times. It has the same bytes as
            `head`, as long as the mirror is whole.
        values: The JSON of each requested key that exists.
        expires: For each of these keys that expires, the time in milliseconds since 1970.
    """

    head: bytes | None
    head_of_expires: bytes | None
    values: dict[str, bytes]
    expires: dict[str, bytes]


class Subscription(Protocol):
    """The messages about changes of a mirror: all of them, in order, from the subscribing on."""

    async def receive(self) -> bytes:
        """Return the next message.

        Raises:
            StorageError: The subscription is lost, so messages may be lost too.
        """
        ...

    async def ping(self) -> None:
        """Make sure that the subscription is not lost.

        Another task calls `receive` meanwhile. This call returns when `receive` has returned
        every message that was sent before it.

        Raises:
            StorageError: The subscription is lost.
        """
        ...

    async def aclose(self) -> None:
        """End the subscription. A second call does nothing. It raises nothing."""
        ...


class Source(Protocol):
    """One mirror, to be read. Every call raises `StorageError` or a subclass, and no other error."""

    @property
    def path(self) -> str:
        """Where the mirror is, for messages; without credentials."""
        ...

    async def fetch(self, keys: Sequence[str]) -> Fetched:
        """Return some keys, all from one moment."""
        ...

    async def fetch_all(self) -> Fetched:
        """Return every key, all from one moment."""
        ...

    def scan(self) -> AsyncIterator[Fetched]:
        """Yield every key, in parts.

        A key that exists all the time comes once or more often. The heads may be `None`.
        """
        ...

    async def subscribe(self) -> Subscription:
        """Subscribe to the changes."""
        ...

    async def aclose(self) -> None:
        """Close all connections. A second call does nothing. It raises nothing."""
        ...
