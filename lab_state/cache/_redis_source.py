"""Reads the copy of a state in Redis."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lab_state._clock import Clock, within
from lab_state.cache._connection import Connection, Dialer, command
from lab_state.cache._feed import logger
from lab_state.cache._format import HEAD, Keys
from lab_state.cache._source import Found
from lab_state.exceptions import UnavailableError

_HEAD = HEAD.encode()
_SCANNED = b"500"
_MOST_LINKS = 16
_PING_SECONDS = 5.0


class RedisSource:
    """One copy; see `Source`. A read takes a connection that is free, or makes one."""

    def __init__(self, dialer: Dialer, keys: Keys, clock: Clock) -> None:
        self._dialer = dialer
        self._clock = clock
        self._told = False  # of fields that are another client's
        self._keys = keys
        self._free: list[Connection] = []
        self.path: str = f"{dialer.path} {keys.values.decode()}"

    async def fetch(self, keys: Sequence[str]) -> Found:
        """Some keys, in one round trip; see `Source.fetch`."""
        fields = [_HEAD, *[key.encode() for key in keys]]
        (value_head, *values), (expires_head, *expires) = await self._read(
            command(b"HMGET", self._keys.values, *fields), command(b"HMGET", self._keys.expires, *fields)
        )
        return Found(value_head, expires_head, _present(keys, values), _present(keys, expires))

    async def fetch_all(self) -> Found:
        """Every key, in one round trip; see `Source.fetch_all`."""
        values, expires = await self._read(
            command(b"HGETALL", self._keys.values), command(b"HGETALL", self._keys.expires)
        )
        return _found(self._pairs(values), self._pairs(expires))

    async def scan(self) -> AsyncIterator[Found]:
        """Every key, some hundreds at a time; see `Source.scan`."""
        for name, of_expires in ((self._keys.values, False), (self._keys.expires, True)):
            cursor = b"0"
            while True:
                [(cursor, flat)] = await self._read(command(b"HSCAN", name, cursor, b"COUNT", _SCANNED))
                found = self._pairs(flat)
                yield _found({}, found) if of_expires else _found(found, {})
                if cursor == b"0":
                    break

    async def subscribe(self) -> RedisSubscription:
        """Subscribe on a connection of its own; see `Source.subscribe`."""
        link = await self._dialer.connect(self._clock)
        try:
            link.good(await link.call(command(b"SUBSCRIBE", self._keys.channel)))
        except BaseException:
            await link.aclose()
            raise
        return RedisSubscription(link)

    async def aclose(self) -> None:
        """End the connections that are free; the others end when they are."""
        while self._free:
            await self._free.pop().aclose()

    async def _read(self, *commands: bytes) -> list[Any]:
        """The answers, of one moment; once more on a new connection where an old one has died meanwhile."""
        if self._free:
            try:
                return await self._on(self._free.pop(), commands)
            except UnavailableError:
                await self.aclose()  # the others are as old
        return await self._on(await self._dialer.connect(self._clock), commands)

    async def _on(self, link: Connection, commands: Sequence[bytes]) -> list[Any]:
        try:
            answers = await link.transaction(*commands)
        except BaseException:
            await link.aclose()
            raise
        if len(self._free) < _MOST_LINKS:
            self._free.append(link)
        else:
            await link.aclose()
        return answers

    def _pairs(self, flat: Sequence[bytes]) -> dict[str, bytes]:
        """Return the fields of a hash. Leave out bytes that are not UTF-8, and log them once: no key has them."""
        pairs: dict[str, bytes] = {}
        members = iter(flat)
        for field, value in zip(members, members, strict=True):
            try:
                pairs[field.decode()] = value
            except UnicodeDecodeError:
                if not self._told:
                    self._told = True
                    logger.warning(
                        "%s: a field of the copy is not from lab_state, so another client writes there; such fields "
                        "are left out, and a manager that runs fills the copy anew within seconds",
                        self.path,
                    )
        return pairs


class RedisSubscription:
    """Follows a copy; see `Subscription`."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._pings: deque[asyncio.Future[None]] = deque()

    async def receive(self) -> bytes:
        """The next message; see `Subscription.receive`."""
        while True:
            answer = await self._link.read()
            self._link.good([answer])
            if answer[0] == b"message":
                data: bytes = answer[2]
                return data
            pong = self._pings.popleft()
            if not pong.done():
                pong.set_result(None)

    async def ping(self) -> None:
        """Ask, and wait for the answer; see `Subscription.ping`."""
        pong = asyncio.get_running_loop().create_future()
        self._pings.append(pong)
        await self._link.send(command(b"PING"))
        try:
            with within(self._link.clock, _PING_SECONDS):
                await pong
        except TimeoutError:
            raise UnavailableError("the subscription does not answer") from None

    async def aclose(self) -> None:
        """End the connection; see `Subscription.aclose`."""
        await self._link.aclose()


def _present(keys: Sequence[str], values: Sequence[bytes | None]) -> dict[str, bytes]:
    return {key: value for key, value in zip(keys, values, strict=True) if value is not None}


def _found(values: dict[str, bytes], expires: dict[str, bytes]) -> Found:
    return Found(values.pop(HEAD, None), expires.pop(HEAD, None), values, expires)
