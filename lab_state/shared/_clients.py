"""The clients that an owner knows, their acknowledgements, and the time after which they are forgotten. This module does no I/O.

All times are times of the owner's `CLOCK_MONOTONIC`, in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

FORGOTTEN_AFTER = 60 * 1_000_000_000
"""The time in nanoseconds after which a client without a connection is forgotten."""


def may_be_forgotten(heard: int | None, now: int) -> bool:
    """Return whether an owner may have forgotten a client.

    Args:
        heard: The time in the last message that the client got from an owner; `None` for a new client. A time
            ahead of the clock is from another machine, or from before the last boot. Such a time proves
            nothing, so the result is True.
        now: The present time.
    """
    return heard is not None and not 0 <= now - heard < FORGOTTEN_AFTER


class Clients:
    """The clients that an owner knows.

    Attributes:
        acknowledged: The acknowledgement of each client.
    """

    def __init__(self, acknowledged: Mapping[str, int], now: int) -> None:
        """Add the clients of the table of results. Each of them is forgotten if it does not connect within a minute."""
        self.acknowledged: dict[str, int] = dict(acknowledged)
        self._gone: dict[str, int] = dict.fromkeys(acknowledged, now)

    def __contains__(self, client: str) -> bool:
        """Return whether a client is known."""
        return client in self.acknowledged

    @property
    def connected(self) -> int:
        """The number of clients with a connection."""
        return len(self.acknowledged) - len(self._gone)

    def admit(self, client: str, heard: int | None, now: int) -> bool:
        """Note a new connection. If the client is not known and may have been forgotten, note nothing and return False."""
        if client not in self.acknowledged:
            if may_be_forgotten(heard, now):
                return False
            self.acknowledged[client] = 0
        self._gone.pop(client, None)
        return True

    def acknowledge(self, client: str, number: int) -> None:
        """Note the acknowledgement of a known client. It never decreases."""
        self.acknowledged[client] = max(self.acknowledged[client], number)

    def disconnect(self, client: str, now: int) -> None:
        """Note the end of the last connection of a client. For an unknown client, do nothing."""
        if client in self.acknowledged:
            self._gone[client] = now

    def forget(self, client: str) -> None:
        """Forget a client. A second call changes nothing."""
        self.acknowledged.pop(client, None)
        self._gone.pop(client, None)

    def forget_gone(self, now: int) -> list[str]:
        """Forget the clients that have had no connection for a minute, and return them."""
        due = [client for client, since in self._gone.items() if now - since >= FORGOTTEN_AFTER]
        for client in due:
            self.forget(client)
        return due
