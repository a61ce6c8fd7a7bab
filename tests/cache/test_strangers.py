"""Other clients that write to a mirror or send on its channel: no reader and no writer ends, and the mirror is repaired."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from faulty_cache import lines
from mirrored import mirror_of

import lab_state.cache._feed
import lab_state.cache._mirror
import lab_state.cache._revision_guard
from lab_state import (
    Change,
    Config,
    InvalidKeyError,
    KeyNotFoundError,
    Manager,
    MemoryCache,
    MemoryStorage,
    RedisCache,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
)
from lab_state.cache import SPOILT, Seen, Slice, Step
from lab_state.cache._format import head, message, resync
from lab_state.testing import ManualClock

VALUES, EXPIRES, CHANNEL = "lab_state:{name}", "lab_state:{name}:expires", "lab_state:{name}:changes"
DEEP = b"[" * 500_000 + b"]" * 500_000  # Python 3.14 has room for 100,000
NOTHING = Slice({}, {}, [])


def writer(cache: Any, clock: ManualClock | None = None) -> Manager:
    return Manager(Config(name="name", flush_interval=0), MemoryStorage(), cache, clock=clock)


@pytest.fixture(params=[False, True], ids=["remote", "local"])
def local(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def own(redis_server: Any, monkeypatch: pytest.MonkeyPatch) -> RedisCache:
    """Return a cache on the real server, with short heartbeats and pauses."""
    monkeypatch.setattr(lab_state.cache._mirror, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(lab_state.cache._feed, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(lab_state.cache._revision_guard, "STANDS_SECONDS", 0.1)
    return RedisCache(redis_server.url)


async def pass_time(clock: ManualClock, seconds: float, step: float = 1.0) -> None:
    """Advance the clock, and run the tasks that wake up."""
    for _ in range(int(seconds / step)):
        clock.advance(step)
        for _ in range(20):
            await asyncio.sleep(0)


# Messages


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\xff",
        b'{"from":1,"to":2,"writer":"q","set":{"a":%b}}' % DEEP,
        b'{"from":1,"to":1e400,"writer":"q"}',
        b'{"from":1,"to":%d,"writer":"q"}' % 10**30,
        b'{"from":1,"to":%b,"writer":"q"}' % (b"9" * 5000),
    ],
    ids=["text", "bytes", "deep", "float", "huge", "digits"],
)
async def test_a_message_that_cannot_be_read_is_left_out(
    until: Any, caplog: pytest.LogCaptureFixture, data: bytes, local: Any
) -> None:
    """A message that cannot be decoded is logged once, and everything is read again once. The subscription goes on."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=local, clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: not local or reader._local.fresh)
        [subscription] = cache.mirrors["name"].followers
        async with reader.watch() as changes:
            cache.mirrors["name"].publish([data, data])
            await until(lambda: "a message on the channel cannot be decoded" in caplog.text)
            assert (await anext(changes)).kind == "resync"
            cache.mirrors["name"].publish([data])
            await reader.wait_revision(await state.set("a", 2))
            assert (await anext(changes)).key == "a"
        await until(lambda: not local or reader._local.fresh)
        assert await reader.get("a") == 2
        assert list(cache.mirrors["name"].followers) == [subscription]
        assert reader.up
    assert len(lines(caplog)) == 1


async def test_a_watch_after_steps_that_cannot_be_read(until: Any, caplog: pytest.LogCaptureFixture) -> None:
    """If steps cannot be decoded, a watch gets a `resync` with the next step, which does not begin where the last one ended."""
    cache = MemoryCache()
    session = await cache.open("name", "one")
    assert await session.fill(1, parts(NOTHING), await session.look())
    async with cache.reader("name") as reader, reader.watch() as changes:
        place = cache.mirrors["name"]
        assert (await anext(changes)).kind == "resync"
        place.publish([message(1, 2, "one", Slice({"a": b"1"}, {}, []))])
        assert (await anext(changes)).key == "a"
        place.publish([b"step 2 to 3"])
        await until(lambda: bool(lines(caplog)))
        assert (await anext(changes)).kind == "resync"
        place.publish([b"step 3 to 4", message(4, 5, "one", Slice({"b": b"1"}, {}, []))])
        assert await anext(changes) == Change("", "resync", 5)


async def test_messages_that_cannot_be_read_are_not_a_sign_of_life(
    until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A subscription with only such messages is tested like one without messages, and changes are read."""
    clock, cache = ManualClock(), MemoryCache()
    session = await cache.open("name", "one")
    assert await session.fill(1, parts(NOTHING), await session.look())
    async with cache.reader("name", local=True, clock=clock) as reader:
        place = cache.mirrors["name"]
        await until(lambda: reader._local.fresh)
        place.publish([b"{}"])
        await until(lambda: bool(lines(caplog)))
        await until(lambda: reader._local.fresh)
        [subscription] = place.followers
        place.values["$lab_state"] = place.expires["$lab_state"] = head(2, "newer", "f")
        for _ in range(6):
            place.publish([b'{"version":2}'])
            await pass_time(clock, 1)
        await until(lambda: subscription not in place.followers)
        clock.advance(1)
        await until(lambda: reader._local.fresh)
        assert await reader.revision() == 2


async def test_a_step_that_is_never_ended(until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a step of another client do not become parts of the next step, and are dropped."""
    monkeypatch.setattr(lab_state.cache._feed, "_MOST_BYTES", 1000)
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)
        place = cache.mirrors["name"]
        own = place.seen().writer or ""
        strange = message(0, 1, own, Slice({"strange": b'"%b"' % (b"x" * 300)}, {}, []), more=True)
        place.publish([strange])
        await reader.wait_revision(await state.set("a", 2))
        await until(lambda: reader._local.fresh)
        assert await reader.get_all() == {"a": 2}
        place.publish([strange] * 10)
        await until(lambda: all(follower.queue.empty() for follower in place.followers))
        assert reader._feed is not None
        assert len(reader._feed._parts) < 5
        await reader.wait_revision(await state.set("a", 3))
        await until(lambda: reader._local.fresh)
        assert await reader.get_all() == {"a": 3}


async def test_a_step_that_is_too_large_is_loaded(until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the messages of a step are too large, a local copy does not apply the last of them alone: it is loaded again."""
    monkeypatch.setattr(lab_state.cache._feed, "_MOST_BYTES", 100_000)
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)
        many = {f"key{number}": "x" * 10_000 for number in range(40)}
        await reader.wait_revision(await state.set_many(many))
        await until(lambda: reader._local.fresh)
        assert await reader.get_all() == {"a": 1, **many}
        await reader.wait_revision(await state.set("a", 2))
        assert await reader.get("a") == 2


async def test_a_step_that_is_too_long_to_be_true(until: Any) -> None:
    """A step over too many revisions is not applied, and its revision does not count as read."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)
        place = cache.mirrors["name"]
        place.publish([message(1, 10_000_000, place.seen().writer or "", Slice({"a": b"666"}, {}, []))])
        await until(lambda: all(follower.queue.empty() for follower in place.followers))
        await until(lambda: reader._local.fresh)
        assert await reader.get("a") == 1
        assert await reader.revision() == 1


async def test_whatever_a_source_raises_a_reader_goes_on(
    until: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that a source must not raise is logged once, like a lost subscription."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True, clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)

        async def broken() -> bytes:
            raise ZeroDivisionError("a secret")

        [subscription] = cache.mirrors["name"].followers
        monkeypatch.setattr(subscription, "receive", broken)
        cache.mirrors["name"].publish([b"wake up"])
        subscription.queue.put_nowait(None)
        await until(lambda: not cache.mirrors["name"].followers)
        clock.advance(1)
        await until(lambda: reader._local.fresh)
        assert await reader.get("a") == 1
    assert "receives no changes at present" in lines(caplog)[0] or "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("what", [b"hello", None], ids=["strange", "lost"])
async def test_a_logger_that_raises_ends_no_reader(until: Any, what: bytes | None) -> None:
    """A logging filter that raises for our lines ends no reader."""

    def failing(record: logging.LogRecord) -> bool:
        return bool(record.request_id)  # type: ignore[attr-defined]

    clock, cache, logger = ManualClock(), MemoryCache(), logging.getLogger("lab_state")
    logger.addFilter(failing)
    try:
        async with writer(cache) as state, cache.reader("name", local=True, clock=clock) as reader:
            await reader.wait_revision(await state.set("a", 1))
            await until(lambda: reader._local.fresh)
            [subscription] = cache.mirrors["name"].followers
            subscription.queue.put_nowait(what)
            await until(subscription.queue.empty)
            await pass_time(clock, 5)
            await until(lambda: reader._local.fresh)
            await reader.wait_revision(await state.set("a", 2))
            assert await reader.get("a") == 2
    finally:
        logger.removeFilter(failing)


# What is in the copy


async def test_a_field_that_is_no_utf_8(
    own: RedisCache, redis_server: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A field that is not UTF-8 is skipped, and each reader logs it once. The writer fills the mirror again."""
    async with writer(own) as state, own.reader("name") as remote, own.reader("name", local=True) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await remote.wait_revision(1)
        await until(lambda: mirror_of(state).up)
        fills = state.metrics().operations["fill", "success"]
        redis_server.call("HSET", VALUES, b"\xff", b"1", b"\xfe", b"2")
        redis_server.call("HSET", EXPIRES, b"\xff", b"1")
        assert await remote.get_all() == {"a": 1}
        assert await remote.keys() == ["a"]
        await until(lambda: state.metrics().operations["fill", "success"] == fills + 1)
        await until(lambda: reader._local.fresh)
        assert await reader.get_all() == {"a": 1}
        assert redis_server.call("HKEYS", VALUES) == [b"$lab_state", b"a"] or redis_server.call("HLEN", VALUES) == 2
    told = lines(caplog)
    assert sum("a field of the mirror is not from lab_state" in line for line in told) in {1, 2}
    assert sum("another client has written to the mirror" in line for line in told) == 1


@pytest.mark.parametrize(
    "commands",
    [
        [("HSET", VALUES, "a", "666")],
        [("HSET", VALUES, "a", DEEP), ("HSET", VALUES, "b", b" " + DEEP)],
        [("HDEL", VALUES, "a")],
        [("HSET", EXPIRES, "a", "soon")],
        [
            ("HSET", key, "$lab_state", b'{"format":1,"revision":1,"writer":"q","x":' + DEEP)
            for key in (VALUES, EXPIRES)
        ],
        [("HSET", key, "$lab_state", b'{"format":2,"revision":1,"writer":"q"}') for key in (VALUES, EXPIRES)],
        [("HSET", key, "$lab_state", b'{"format":0,"revision":1,"writer":"q"}') for key in (VALUES, EXPIRES)],
        [("HSET", key, "$lab_state", b'{"format":1,"revision":1000000,"writer":"q"}') for key in (VALUES, EXPIRES)],
    ],
    ids=["value", "deep", "deleted", "time", "deep-head", "newer-format", "older-format", "other-head"],
)
@pytest.mark.parametrize("busy", [False, True], ids=["beat", "step"])
async def test_what_another_client_writes_is_filled_anew(
    own: RedisCache, redis_server: Any, until: Any, commands: list[tuple[Any, ...]], busy: Any
) -> None:
    """A heartbeat or the next step finds the write of another client, and the mirror is filled."""
    async with writer(own) as state:
        await state.set_many({"a": 1, "b": 2})
        await until(lambda: mirror_of(state).revision == 1)
        for command in commands:
            redis_server.call(*command)
        if busy:
            await state.set("b", 3)
        everything = await state.get_all()
        async with own.reader("name") as remote, own.reader("name", local=True) as reader:
            for each in (remote, reader):
                await until_read(each, everything)
        assert mirror_of(state).error is None


async def test_a_step_finds_what_another_client_wrote(
    own: RedisCache, redis_server: Any, clock: ManualClock, until: Any
) -> None:
    """Without a heartbeat, a step on a mirror that another client has changed is refused, and the mirror is filled."""
    async with writer(own, clock) as state:
        await state.set_many({"a": 1, "b": 2})
        await until(lambda: mirror_of(state).revision == 1)
        fills = state.metrics().operations["fill", "success"]
        redis_server.call("HSET", VALUES, "a", "666")
        await state.set("b", 3)
        await until(lambda: mirror_of(state).revision == 2)
        assert redis_server.call("HMGET", VALUES, "a", "b") == [b"1", b"3"]
        assert state.metrics().operations["fill", "success"] == fills + 1


async def until_read(reader: Any, wanted: dict[str, Any]) -> None:
    """Read until a value is read."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(UnavailableError, UnsupportedError, TypeMismatchError):
                if await reader.get_all() == wanted:
                    return
            await asyncio.sleep(0.005)


async def test_a_local_copy_of_what_was_spoilt_is_loaded_anew(own: RedisCache, redis_server: Any, until: Any) -> None:
    """A local copy with another client's write is loaded again after the fill, though the revision is the same."""
    session = await own.open("name", "one")
    assert await session.fill(1, parts(Slice({"a": b"1"}, {}, [])), await session.look())
    redis_server.call("HSET", VALUES, "a", "666")
    async with own.reader("name", local=True) as reader:
        await until(lambda: reader._local.fresh)
        assert await reader.get("a") == 666
        assert await session.look() == SPOILT
        assert await session.fill(1, parts(Slice({"a": b"1"}, {}, [])), SPOILT)
        # By the message: a silent subscription is asked after 5 s only.
        await until(lambda: reader._local.fresh and reader._local.shown["a"] == 1, 3.0)
        redis_server.call("CLIENT", "KILL", "TYPE", "pubsub")  # and it may miss what comes now
        assert await session.fill(1, parts(Slice({"a": b"2"}, {}, [])), await session.look())
        await until(lambda: reader._local.fresh and reader._local.shown["a"] == 2)
    await session.aclose()


async def parts(*slices: Slice) -> Any:
    for part in slices:
        yield part


async def test_a_client_that_never_stops(
    own: RedisCache, redis_server: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """If another client writes repeatedly, the mirror is filled after growing pauses, and the status says why."""
    clock = ManualClock()
    async with Manager(Config(name="name", flush_interval=0), MemoryStorage(), own, clock=clock) as state:
        await state.set("a", 1)
        await until(lambda: mirror_of(state).revision == 1)
        fills = state.metrics().operations["fill", "success"]
        for _ in range(60):
            redis_server.call("HSET", VALUES, "a", "666")
            clock.advance(1)
            await asyncio.sleep(0.005)
        assert 2 <= state.metrics().operations["fill", "success"] - fills < 10
        await until(lambda: "another client writes to the mirror repeatedly" in str(mirror_of(state).error))
        clock.advance(300)
        await until(lambda: mirror_of(state).up)
        assert redis_server.call("HGET", VALUES, "a") == b"1"
        clock.advance(400)
        redis_server.call("HSET", VALUES, "a", "666")
        clock.advance(2)
        await until(lambda: redis_server.call("HGET", VALUES, "a") == b"1")
    assert sum("another client has written" in line for line in lines(caplog)) == 2  # and once more after a calm


async def test_a_value_that_is_nested_too_deeply(until: Any) -> None:
    """A value that is nested too deeply raises `TypeMismatchError`. Every other key can be read."""
    cache = MemoryCache()
    async with writer(cache) as state:
        await state.set_many({"a": 1, "b": 2})
        await until(lambda: mirror_of(state).revision == 1)
        for data in (DEEP, b" " + DEEP):
            cache.mirrors["name"].values["a"] = data
            async with cache.reader("name") as remote, cache.reader("name", local=True) as reader:
                await until(lambda reader=reader: reader._local.fresh)
                for each in (remote, reader):
                    with pytest.raises(TypeMismatchError, match="key 'a'"):
                        await each.get("a")
                    assert await each.get("b") == 2


# Reading


@pytest.mark.parametrize("lost", ["values", "both"])
async def test_waiting_for_a_revision_that_is_gone(cache: Any, redis_server: Any, lost: str, until: Any) -> None:
    """If the mirror is lost after its revision was announced, the wait for that revision ends in time, and the loop runs."""
    async with cache.reader("name") as reader:
        session = await cache.open("name", "one")
        assert await session.fill(3, parts(NOTHING), await session.look())
        await reader.wait_revision(3)
        if isinstance(cache, MemoryCache):
            cache.mirrors["name"].values.clear()
            if lost == "both":
                cache.mirrors["name"].expires.clear()
        else:
            redis_server.call("DEL", VALUES, *([EXPIRES] if lost == "both" else []))
        async with asyncio.timeout(5):
            with pytest.raises(UnavailableError, match=r"has not reached revision 3 within 0\.2 s: (there is no|half)"):
                await reader.wait_revision(3, timeout=0.2)
        await session.aclose()


async def test_waiting_by_a_clock_that_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's clock measures the wait for a lost mirror and for a cache that does not answer."""
    clock, cache = ManualClock(), MemoryCache()
    async with cache.reader("name", clock=clock) as reader:
        waiting = asyncio.create_task(reader.wait_revision(3, timeout=7))
        await asyncio.sleep(0)
        await pass_time(clock, 6)
        assert not waiting.done()
        await pass_time(clock, 1)
        with pytest.raises(UnavailableError, match="within 7 s: there is no mirror"):
            await waiting

        async def hangs(_: Any) -> Any:
            await asyncio.Event().wait()

        monkeypatch.setattr(reader._source, "fetch", hangs)
        waiting = asyncio.create_task(reader.wait_revision(3, timeout=0.5))
        await asyncio.sleep(0)
        await pass_time(clock, 1)
        with pytest.raises(UnavailableError, match=r"within 0\.5 s: memory:name does not answer"):
            await waiting


@pytest.mark.parametrize("kind", ["gone", "half", "newer", "lower"])
async def test_a_reader_that_cannot_read_is_not_up(until: Any, kind: str, local: Any) -> None:
    """If reads fail for any reason, `up` and `/health` change within seconds, also if the application reads nothing."""
    clock, cache = ManualClock(), MemoryCache()
    async with cache.reader("name", local=local, clock=clock) as reader:
        async with writer(cache) as state:
            await reader.wait_revision(await state.set("a", 1))
            await until(lambda: reader.up)
        await until(lambda: not local or reader._local.fresh)
        place = cache.mirrors["name"]
        before = dict(place.values), dict(place.expires)
        if kind == "gone":
            place.values, place.expires = {}, {}
        elif kind == "half":
            place.expires = {}
        else:
            data = b'{"format":2,"revision":1,"writer":"q"}' if kind == "newer" else head(0, "q", "")
            place.values["$lab_state"] = place.expires["$lab_state"] = data
        await pass_time(clock, 9)
        assert not reader.up
        with pytest.raises((UnavailableError, UnsupportedError)):
            await reader.get("a")
        place.values, place.expires = before
        await pass_time(clock, 12)
        await until(lambda: reader.up)
        assert await reader.get("a") == 1


async def test_a_revision_that_was_too_high(until: Any, local: Any, caplog: pytest.LogCaptureFixture) -> None:
    """After a revision that was too high, reads fail for ten seconds. Then the living writer's revision is accepted."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache, clock) as state, cache.reader("name", local=local, clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: not local or reader._local.fresh)
        place = cache.mirrors["name"]
        if local:
            place.publish([message(1, 900_000, place.seen().writer or "", Slice({"a": b"666"}, {}, []))])
            await until(lambda: reader._local.highest == 900_000)
        else:
            before = dict(place.values), dict(place.expires)
            place.values["$lab_state"] = place.expires["$lab_state"] = head(900_000, "staging", "")
            assert await reader.revision() == 900_000
            place.values, place.expires = before
        await pass_time(clock, 8)
        assert not reader.up
        with pytest.raises(UnavailableError, match="is at revision 1, and 900000 was read before"):
            await reader.get("a")
        async with reader.watch() as changes:
            await pass_time(clock, 8)
            await until(lambda: reader.up)
            assert (await anext(changes)).kind == "resync"
        assert await reader.get("a") == 1
        await until(lambda: not local or reader._local.fresh)
        await reader.wait_revision(await state.set("a", 2))
        assert await reader.get("a") == 2
    assert sum("reads continue from there" in line for line in lines(caplog)) == 1


async def test_a_lower_revision_of_a_writer_that_is_silent(until: Any) -> None:
    """Old data of a writer without heartbeats, or of two writers in turn, is never read."""
    clock, cache = ManualClock(), MemoryCache()
    async with cache.reader("name", clock=clock) as reader:
        session = await cache.open("name", "one")
        assert await session.fill(9, parts(NOTHING), await session.look())
        await reader.wait_revision(9)
        assert await session.fill(5, parts(NOTHING), await session.look())
        for _ in range(4):
            await pass_time(clock, 9)
            with pytest.raises(UnavailableError, match="is at revision 5, and 9 was read before"):
                await reader.get("a")
        place = cache.mirrors["name"]
        for number in range(12):
            name = f"writer {number}"
            place.values["$lab_state"] = place.expires["$lab_state"] = head(5, name, "")
            place.publish([resync(5, 5, name)])
            await pass_time(clock, 3)
            with pytest.raises(UnavailableError, match="is at revision 5, and 9 was read before"):
                await reader.get("a")


async def test_keys_that_nobody_can_write_are_read(cache: Any, until: Any, local: Any) -> None:
    """An imported state may have keys that `set` refuses. A reader reads them, as the manager does."""
    strange = ["", "k" * 5000, "a\0b"]
    session = await cache.open("name", "one")
    values = {key: b"%d" % number for number, key in enumerate(strange)}
    assert await session.fill(3, parts(Slice(values, {}, [])), await session.look())
    async with cache.reader("name", local=local) as reader:
        await reader.wait_revision(3)
        await until(lambda: not local or reader._local.fresh)
        assert [await reader.get(key) for key in strange] == [0, 1, 2]
        assert await reader.get_many([*strange, "x"]) == dict(zip(strange, range(3), strict=True))
        assert all([await reader.exists(key) for key in strange])
        assert sorted(await reader.keys()) == sorted(strange)
        with pytest.raises(KeyNotFoundError):
            await reader.get("x")
        with pytest.raises(InvalidKeyError, match="lone surrogate"):
            await reader.get("\ud800")
    await session.aclose()


# Rights


async def test_without_the_right_to_watch_nothing_is_brought(
    own_redis: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without the right to `WATCH` is refused with the remedy, because its steps could overwrite a successor's mirror."""
    monkeypatch.setattr(lab_state.cache._mirror, "_LONGEST_PAUSE", 0.05)
    redis = own_redis()
    redis.call("ACL", "SETUSER", "poor", "on", ">word", "~*", "&*", "+@all", "-watch")
    cache = RedisCache(f"redis://poor:word@127.0.0.1:{redis.port}")
    async with writer(cache) as state:
        await state.set("a", 1)
        await until(lambda: mirror_of(state).error is not None)
        assert "refuses WATCH" in str(mirror_of(state).error)
        assert "ACL SETUSER <user> +watch" in str(mirror_of(state).error)
        assert not mirror_of(state).up
        assert redis.call("KEYS", "*") == []
        redis.call("ACL", "SETUSER", "poor", "+watch")
        await until(lambda: mirror_of(state).revision == 1)
        assert redis.call("HGET", VALUES, "a") == b"1"


@pytest.mark.parametrize("taken", ["watch", "unwatch"])
async def test_a_right_that_is_taken_away_later(own_redis: Any, taken: str) -> None:
    """A session that loses the right to `WATCH` does not write any further step."""
    redis = own_redis()
    redis.call("ACL", "SETUSER", "poor", "on", ">word", "~*", "&*", "+@all")
    cache = RedisCache(f"redis://poor:word@127.0.0.1:{redis.port}")
    old = await cache.open("name", "old")
    assert await old.fill(5, parts(NOTHING), await old.look())
    new = await RedisCache(redis.url).open("name", "new")
    redis.call("ACL", "SETUSER", "poor", f"-{taken}")
    if taken == "watch":
        with pytest.raises(UnsupportedError, match="refuses WATCH"):
            await old.look()
        another = await cache.open("name", "another")
        with pytest.raises(UnsupportedError, match="refuses WATCH"):
            await another.fill(7, parts(NOTHING), Seen("old", 5))
        await another.aclose()
    else:
        with pytest.raises(UnsupportedError, match="NoPermissionError"):
            await old.fill(6, parts(NOTHING), Seen("old", 5))
    assert await new.fill(9, parts(NOTHING), await new.look())
    assert await new.apply(Step(9, 10, cleared=False), parts(Slice({"a": b"1"}, {}, [])))
    assert redis.call("HGET", VALUES, "a") == b"1"
    await old.aclose()
    await new.aclose()
