"""What a reader reads from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol


class Found(NamedTuple):
    """What was read in one moment.

    Attributes:
        head: The field `$lab_state` of the values; `None` if it is not there.
        head_of_expires: The same of the expiry times: as long as the copy is whole, the
            same bytes.
        values: The JSON of those of the keys that are there.
        expires: When those of them expire that do, in milliseconds since 1970.
    """

    head: bytes | None
    head_of_expires: bytes | None
    values: dict[str, bytes]
    expires: dict[str, bytes]


class Subscription(Protocol):
    """Follows the changes of a copy: every message from the moment of subscribing on, in order."""

    async def receive(self) -> bytes:
        """The next message.

        Raises:
            StorageError: The subscription is lost, and so may be messages.
        """
        ...

    async def ping(self) -> None:
        """Make sure that the subscription is not lost.

        Returns when `receive`, which somebody goes on calling, has given every message that
        was sent before the call.

        Raises:
            StorageError: It is lost.
        """
        ...

    async def aclose(self) -> None:
        """Follow no more. Idempotent, raises nothing."""
        ...


class Source(Protocol):
    """One copy, to be read. Every call raises `StorageError` or a subclass, and nothing else."""

    @property
    def path(self) -> str:
        """Where it is, for messages; without credentials."""
        ...

    async def fetch(self, keys: Sequence[str]) -> Found:
        """Some keys, in one moment."""
        ...

    async def fetch_all(self) -> Found:
        """Every key, in one moment."""
        ...

    def scan(self) -> AsyncIterator[Found]:
        """Every key, in steps: what is there throughout comes once or more often; the heads may be `None`."""
        ...

    async def subscribe(self) -> Subscription:
        """Follow the changes."""
        ...

    async def aclose(self) -> None:
        """Let go. Idempotent, raises nothing."""
        ...
