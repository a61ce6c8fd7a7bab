"""The source from which a reader reads a mirror in Redis, and the subscription to its changes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lab_state._clock import Clock, within
from lab_state.cache._connection import Connection, Dialer, command
from lab_state.cache._feed import logger
from lab_state.cache._format import HEAD, Keys
from lab_state.cache._source import Fetched
from lab_state.exceptions import UnavailableError

_HEAD = HEAD.encode()
_SCANNED = b"500"
_MOST_FREE = 16
_PING_SECONDS = 5.0


class RedisSource:
    """One mirror in Redis; see `Source`. A read uses a free connection, or opens one."""

    def __init__(self, dialer: Dialer, keys: Keys, clock: Clock) -> None:
        self._dialer = dialer
        self._clock = clock
        self._logged_foreign = False  # whether fields of another client were logged
        self._keys = keys
        self._free: list[Connection] = []
        self._closes = 0  # the number of calls of `aclose`
        self.path: str = f"{dialer.path} {keys.values.decode()}"

    async def fetch(self, keys: Sequence[str]) -> Fetched:
        """Return the values and expiry times of these keys, in one round trip; see `Source.fetch`."""
        fields = [_HEAD, *[key.encode() for key in keys]]
        (value_head, *values), (expires_head, *expires) = await self._read(
            command(b"HMGET", self._keys.values, *fields), command(b"HMGET", self._keys.expires, *fields)
        )
        return Fetched(value_head, expires_head, _present(keys, values), _present(keys, expires))

    async def fetch_all(self) -> Fetched:
        """Return the values and expiry times of all keys, in one round trip; see `Source.fetch_all`."""
        values, expires = await self._read(
            command(b"HGETALL", self._keys.values), command(b"HGETALL", self._keys.expires)
        )
        return _found(self._pairs(values), self._pairs(expires))

    async def scan(self) -> AsyncIterator[Fetched]:
        """Yield all keys, some hundreds at a time; see `Source.scan`."""
        for name, of_expires in ((self._keys.values, False), (self._keys.expires, True)):
            cursor = b"0"
            while True:
                [(cursor, flat)] = await self._read(command(b"HSCAN", name, cursor, b"COUNT", _SCANNED))
                found = self._pairs(flat)
                yield _found({}, found) if of_expires else _found(found, {})
                if cursor == b"0":
                    break

    async def subscribe(self) -> RedisSubscription:
        """Subscribe on a separate connection; see `Source.subscribe`."""
        connection = await self._dialer.connect(self._clock)
        try:
            connection.good(await connection.call(command(b"SUBSCRIBE", self._keys.channel)))
        except BaseException:
            await connection.aclose()
            raise
        return RedisSubscription(connection)

    async def aclose(self) -> None:
        """Close the free connections. The connection of a running read is closed after that read."""
        self._closes += 1
        await self._close_free()

    async def _close_free(self) -> None:
        while self._free:
            await self._free.pop().aclose()

    async def _read(self, *commands: bytes) -> list[Any]:
        """Run commands as one transaction of Redis. If this fails on a free connection, try again on a new one."""
        closes = self._closes
        if self._free:
            try:
                return await self._on(self._free.pop(), commands, closes)
            except UnavailableError:
                await self._close_free()  # the other free connections are probably lost, too
        return await self._on(await self._dialer.connect(self._clock), commands, closes)

    async def _on(self, connection: Connection, commands: Sequence[bytes], closes: int) -> list[Any]:
        """Run commands on a connection, and keep the connection for a later read.

        Close the connection instead if `aclose` was called meanwhile, or if enough connections are free. `closes` is the
        number of calls of `aclose` when the read began.
        """
        try:
            answers = await connection.transaction(*commands)
        except BaseException:
            await connection.aclose()
            raise
        if len(self._free) < _MOST_FREE and self._closes == closes:
            self._free.append(connection)
        else:
            await connection.aclose()
        return answers

    def _pairs(self, flat: Sequence[bytes]) -> dict[str, bytes]:
        """Return the fields of a hash. Skip fields that are not UTF-8, because each key of lab_state is UTF-8. Log this once."""
        pairs: dict[str, bytes] = {}
        members = iter(flat)
        for field, value in zip(members, members, strict=True):
            try:
                pairs[field.decode()] = value
            except UnicodeDecodeError:
                if not self._logged_foreign:
                    self._logged_foreign = True
                    logger.warning(
                        "%s: a field of the mirror is not from lab_state, so another client writes there; such fields "
                        "are skipped, and a running manager fills the mirror again within seconds",
                        self.path,
                    )
        return pairs


class RedisSubscription:
    """A subscription to the changes of a mirror; see `Subscription`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pings: deque[asyncio.Future[None]] = deque()

    async def receive(self) -> bytes:
        """Return the next message; see `Subscription.receive`."""
        while True:
            answer = await self._connection.read()
            self._connection.good([answer])
            if answer[0] == b"message":
                data: bytes = answer[2]
                return data
            pong = self._pings.popleft()
            if not pong.done():
                pong.set_result(None)

    async def ping(self) -> None:
        """Send PING, and wait for the answer; see `Subscription.ping`."""
        pong = asyncio.get_running_loop().create_future()
        self._pings.append(pong)
        await self._connection.send(command(b"PING"))
        try:
            with within(self._connection.clock, _PING_SECONDS):
                await pong
        except TimeoutError:
            raise UnavailableError("the subscription does not answer") from None

    async def aclose(self) -> None:
        """Close the connection; see `Subscription.aclose`."""
        await self._connection.aclose()


def _present(keys: Sequence[str], values: Sequence[bytes | None]) -> dict[str, bytes]:
    return {key: value for key, value in zip(keys, values, strict=True) if value is not None}


def _found(values: dict[str, bytes], expires: dict[str, bytes]) -> Fetched:
    return Fetched(values.pop(HEAD, None), expires.pop(HEAD, None), values, expires)
