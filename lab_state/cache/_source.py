"""The source from which a reader reads a mirror."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol


class Fetched(NamedTuple):
    """A part of a mirror at one moment.

    Attributes:
        head: The field `$lab_state` of the values; `None` if it is missing.
        head_of_expires: The field `$lab_state` of the expiry times. In a mirror without damage
            it has the same bytes as `head`.
        values: The value of each key of this part that exists, as JSON.
        expires: The expiry times of keys that expire, as decimal digits, in milliseconds since 1970. A part that `Source.scan`
            yields may have expiry times of keys of earlier parts.
    """

    head: bytes | None
    head_of_expires: bytes | None
    values: dict[str, bytes]
    expires: dict[str, bytes]


class Subscription(Protocol):
    """The messages about changes of a mirror, in order. No message that is sent after the return of `subscribe` is missing."""

    async def receive(self) -> bytes:
        """Return the next message.

        Raises:
            StorageError: The subscription is lost. Messages may be lost, too.
        """
        ...

    async def ping(self) -> None:
        """Check that the subscription is not lost.

        Another task must call `receive` during this call. The call returns when `receive` has returned
        every message that was sent before the call.

        Raises:
            StorageError: The subscription is lost.
        """
        ...

    async def aclose(self) -> None:
        """End the subscription. A second call does nothing. The call raises no error."""
        ...


class Source(Protocol):
    """A mirror that can be read. If a call fails, it raises `StorageError` or a subclass, and no other error."""

    @property
    def path(self) -> str:
        """The place of the mirror, for messages, without credentials."""
        ...

    async def fetch(self, keys: Sequence[str]) -> Fetched:
        """Return the values and expiry times of these keys, all from one moment."""
        ...

    async def fetch_all(self) -> Fetched:
        """Return the values and expiry times of all keys, from one moment."""
        ...

    def scan(self) -> AsyncIterator[Fetched]:
        """Yield all keys in parts, which may be from different moments.

        A key that exists during the whole scan is yielded at least once. The value of a key comes before its expiry time, or
        in the same part. In a part, `head` and `head_of_expires` may be `None`.
        """
        ...

    async def subscribe(self) -> Subscription:
        """Subscribe to the changes of the mirror."""
        ...

    async def aclose(self) -> None:
        """Close all connections. A second call does nothing. The call raises no error."""
        ...
