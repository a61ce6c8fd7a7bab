"""A scan of the keys under a prefix, with their values, in lab_state and in what has ordered keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec
from measure import Numbers, Results, Scale, each, encode
from peer import NOTHING, Peer, Values
from peers import LabState, Lmdb, RedisAlways, Sqlite
from scan import FLAT, TEN, THOUSAND, keys_of
from sortedcontainers import SortedDict
from versus import in_turns, opened

decode = msgspec.json.decode


def above(prefix: str) -> str:
    """Return the smallest text above all texts that start with this prefix. Its last character is of ASCII."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


class LabStateScan(LabState):
    setup = "get_all(prefix)"

    async def scan(self, prefix: str) -> dict[str, Any]:
        return await self.manager.get_all(prefix)


class SqliteScan(Sqlite):
    setup = "SELECT … WHERE key >= ? AND key < ?, by the primary key, on the event loop"

    async def scan(self, prefix: str) -> dict[str, Any]:
        query = "SELECT key, value FROM state WHERE key >= ? AND key < ?"
        return {key: decode(value) for key, value in self.connection.execute(query, (prefix, above(prefix)))}


class LmdbScan(Lmdb):
    setup = "a cursor: set_range, then iternext, on the event loop"

    async def scan(self, prefix: str) -> dict[str, Any]:
        with self.environment.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            return dict(self._found(cursor, prefix.encode()))

    @staticmethod
    def _found(cursor: Any, start: bytes) -> Iterator[tuple[str, Any]]:
        end = above(start.decode()).encode()
        if cursor.set_range(start):
            for key, value in cursor.iternext():
                if (name := bytes(key)) >= end:
                    break
                yield name.decode(), decode(value)


class RedisScan(RedisAlways):
    setup = "the keys in a sorted set: ZRANGEBYLEX, then MGET; a Unix socket, redis-py with hiredis"

    async def fill(self, values: Values) -> None:
        await super().fill(values)
        names = iter(values)
        while part := list(islice(names, 10_000)):
            await self.redis.zadd("keys in order", dict.fromkeys(part, 0))

    async def scan(self, prefix: str) -> dict[str, Any]:
        names: list[Any] = await self.redis.zrangebylex("keys in order", f"[{prefix}", f"({above(prefix)}")
        found = await self.redis.mget(names)
        return {name.decode(): decode(value) for name, value in zip(names, found, strict=True) if value is not None}


class SortedDictScan(Peer):
    name = "SortedDict"
    survives = NOTHING
    setup = "sortedcontainers, JSON as bytes: irange"
    module = "sortedcontainers"

    async def open(self) -> None:
        self.map = SortedDict()

    async def close(self) -> None:
        self.map.clear()

    async def fill(self, values: Values) -> None:
        self.map.update({key: encode(value) for key, value in values.items()})

    async def get(self, key: str) -> Any:
        return decode(self.map[key])

    async def set(self, key: str, value: Any) -> None:
        self.map[key] = encode(value)

    async def scan(self, prefix: str) -> dict[str, Any]:
        found = self.map
        return {key: decode(found[key]) for key in found.irange(prefix, above(prefix), (True, False))}


KINDS: tuple[type[Peer], ...] = (LabStateScan, SqliteScan, LmdbScan, RedisScan, SortedDictScan)


async def ranges(results: Results, directory: str, scale: Scale) -> None:
    """Measure a scan of 10 and of 1,000 keys, in a state of all keys."""
    values = dict.fromkeys(keys_of(scale.keys), FLAT)

    async def work(peer: Any) -> Numbers:
        return {str(size): await each(peer.scan, [prefix], scale.seconds) for size, prefix in SIZES.items()}

    async with opened(directory, KINDS) as peers:
        for peer in peers:
            await peer.fill(values)
            found: Any = peer
            for size, prefix in SIZES.items():
                got = await found.scan(prefix)
                if len(got) != size or list(got) != sorted(got) or any(value != FLAT for value in got.values()):
                    raise RuntimeError(f"{peer.name} found {len(got)} keys, and not the {size} of {prefix!r} in order")
        results.put(scans=await in_turns(peers, scale.rounds, work), setup={peer.name: peer.setup for peer in peers})


SIZES = {10: TEN, 1000: THOUSAND}
