"""Large values, and many keys, go to a cache in steps of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from msgspec import Raw
from redis.asyncio.connection import AbstractConnection

import lab_state.cache.memory
from lab_state import Config, Manager, MemoryCache, MemoryStorage, RedisCache
from lab_state._entries import Expiring, Json, StoredOrGone
from lab_state.cache import Seen, Slice, Step
from lab_state.cache._connection import _pieces, hset, sent_bytes
from lab_state.cache._format import parse_message, slices
from lab_state.cache.memory import MemorySubscription

SIZE = 1_000_000
LARGE: dict[str, Any] = {"str": "é\n" * SIZE, "list": ["x" * SIZE], "small": 1}


async def parts(*slices: Slice) -> AsyncIterator[Slice]:
    for part in slices:
        yield part


def values(**entries: bytes) -> Slice:
    return Slice(entries, {}, [])


@pytest.mark.parametrize("text", ["é\n" * SIZE, '"' * SIZE, "x" * 65_536])
def test_a_large_str_is_encoded_in_steps(text: str) -> None:
    """A large str is encoded in pieces, and the event loop runs after each. Together they are its JSON."""
    items: list[tuple[str, StoredOrGone]] = [("before", 1), ("large", Expiring(text, 5)), ("behind", "y")]
    found = list(slices(items, 0))
    assert found.count(None) >= len(text) // 65_536
    whole = {key: data for part in found if part is not None for key, data in part.values.items()}
    assert whole == {"before": b"1", "large": msgspec.json.encode(text), "behind": b'"y"'}


def test_a_large_value_of_a_loaded_file_is_copied_in_steps() -> None:
    """A large value that is a part of the file's bytes is copied in pieces. A value with separate bytes is not copied."""
    data = b'["' + b"x" * SIZE + b'"]'
    (*steps, part, last) = slices([("large", Raw(data))], 0)
    assert set(steps) == {None}
    assert len(steps) >= SIZE // 65_536
    assert (part, last) == (Slice({"large": data}, {}, []), Slice({}, {}, []))
    own = Json(data)
    part, _ = slices([("large", own)], 0)
    assert part is not None
    assert part.values["large"] is own


@pytest.mark.parametrize("size", [0, 65_536, 65_537, SIZE])
def test_a_large_value_is_sent_in_pieces(size: int) -> None:
    """The pieces of a command have at most 64 kB of the value each, and together they are the command."""
    members = {"a": b"1", "large": b"x" * size, "é": b"22"}
    sent = hset(b"key", members)
    fields = b"".join(
        b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(k.encode()), k.encode(), len(v), v) for k, v in members.items()
    )
    expected = b"*8\r\n$4\r\nHSET\r\n$3\r\nkey\r\n" + fields
    assert sent_bytes([b"before", sent, b"behind"]) == len(expected) + 12
    pieces = list(_pieces([b"before", sent, b"behind"]))
    assert b"".join(pieces) == b"before" + expected + b"behind"
    assert all(pieces)
    assert max(map(len, pieces)) < 65_536 + 200


async def test_large_values_in_redis(redis_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fill and a step with large values are sent in pieces, and are read back as they were."""
    sent: list[int] = []
    real = AbstractConnection.send_packed_command

    async def noted(self: AbstractConnection, command: Any, *args: Any, **options: Any) -> None:
        sent.append(len(command))
        await real(self, command, *args, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", noted)
    cache, storage = RedisCache(redis_server.url), MemoryStorage()
    async with Manager(Config(name="name", flush_interval=0), storage, cache) as state, cache.reader("name") as reader:
        await state.set_many(LARGE, ttl=1_000)
        await reader.wait_revision(1)
        assert await reader.get_all() == LARGE
        await state.set("list", [*LARGE["list"], 2])
        await reader.wait_revision(2)
        assert await reader.get("list") == [*LARGE["list"], 2]
    redis_server.call("FLUSHALL")
    async with Manager(Config(name="name", flush_interval=0), storage, cache) as state, cache.reader("name") as reader:
        await reader.wait_revision(2)
        assert await reader.get_all() == await state.get_all()
    assert max(sent) < 70_000


# In memory


async def test_a_large_step_is_told_as_a_resync(until: Any) -> None:
    """In memory too, the message of a large step is a resync, and the message of a small one has the changes."""
    cache = MemoryCache()
    session = await cache.open("name", "one")
    assert await session.fill(5, parts(values(a=b"1")), Seen(None, 0))
    subscription = await cache.reader("name")._source.subscribe()
    small = [Slice({"a": b"2"}, {}, []), Slice({"b": b"3"}, {"b": 9}, ["a"])]
    assert await session.apply(Step(5, 6, cleared=True), parts(*small))
    first, last = [parse_message(await subscription.receive()) for _ in small]
    assert first is not None
    assert last is not None
    assert (first.clear, first.more, first.set) == (True, True, {"a": Raw(b"2")})
    assert (last.clear, last.more, last.delete, last.expires) == (False, False, ["a"], {"b": 9})
    large = values(c=b'"%s"' % (b"x" * 5_000_000))
    assert await session.apply(Step(6, 7, cleared=False), parts(values(a=b"1"), large, values(d=b"4")))
    told = parse_message(await subscription.receive())
    assert told is not None
    assert (told.start, told.end, told.resync, told.set) == (6, 7, True, {})
    assert isinstance(subscription, MemorySubscription)
    assert subscription.queue.empty()
    async with cache.reader("name", local=True) as reader:
        await until(lambda: reader._local.fresh)
        assert (await reader.get_all()).keys() == {"a", "c", "d"}  # b has expired


@pytest.mark.parametrize("by", ["fill", "clear"])
async def test_a_copy_that_is_replaced_is_freed_in_steps(by: str) -> None:
    """A million keys that are replaced are freed in steps."""
    cache = MemoryCache()
    session = await cache.open("name", "one")
    many = Slice({f"k{number}": b"1" for number in range(2_500)}, {}, [])
    assert await session.fill(5, parts(many), Seen(None, 0))
    old = cache.mirrors["name"].values
    if by == "fill":
        assert await session.fill(6, parts(values(a=b"2")), Seen("one", 5))
    else:
        assert await session.apply(Step(5, 6, cleared=True), parts(values(a=b"2")))
    sizes = [len(old)]
    while old:
        await asyncio.sleep(0)
        sizes.append(len(old))
    assert sizes == [1_501, 501, 0]
    assert cache.mirrors["name"].values.keys() == {"a", "$lab_state"}


async def test_a_local_reader_in_memory_reads_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local copy of a mirror in memory is read some hundred keys at a time, with expiry times."""
    monkeypatch.setattr(lab_state.cache.memory, "_SCANNED", 10)
    cache = MemoryCache()
    async with (
        Manager(Config(name="name", flush_interval=0), MemoryStorage(), cache) as state,
        cache.reader("name", local=True) as reader,
    ):
        await state.set_many({f"k{number}": number for number in range(25)}, ttl=1_000)
        await reader.wait_revision(1)
        found = [part async for part in reader._source.scan()]
        assert [len(part.values) for part in found] == [10, 10, 5]
        assert sum(len(part.expires) for part in found) == 25
        assert await reader.get_all() == await state.get_all()
