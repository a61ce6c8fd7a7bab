"""Reading a mirror: types, expiry, revisions that never go back, and waiting for one's own write."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from mirrored import mirror_of

from lab_state import (
    Change,
    ClosedError,
    Config,
    InvalidKeyError,
    KeyNotFoundError,
    Manager,
    MemoryCache,
    MemoryStorage,
    Reader,
    TypeMismatchError,
    UnavailableError,
    UnsupportedError,
    WaitTimeoutError,
)
from lab_state._entries import Expiring
from lab_state.cache import Slice, _feed
from lab_state.cache._format import Head, Message, message, parse_message, resync
from lab_state.cache._local_copy import LocalCopy
from lab_state.cache._source import Fetched
from lab_state.testing import ManualClock

HEAD = "$lab_state"


@dataclass
class User:
    name: str


def writer(cache: Any, clock: ManualClock | None = None) -> Manager:
    return Manager(Config(name="name", flush_interval=0), MemoryStorage(), cache, clock=clock)


def parsed(data: bytes) -> Message:
    found = parse_message(data)
    assert found is not None
    return found


@pytest.fixture(params=[False, True], ids=["remote", "local"])
def local(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_typed_reads(cache: Any, local: Any, until: Any) -> None:
    """Every call reads what the writer wrote, as the type asked for."""
    async with writer(cache) as state, cache.reader("name", local=local) as reader:
        values = {"u/ann": User("Ann"), "u/bob": {"name": 5}, "n": 1, "s": "x", "none": None, "list": [1]}
        await reader.wait_revision(await state.set_many(values))
        if local:
            await until(lambda: reader._local.fresh)
        assert await reader.get("u/ann", type=User) == User("Ann")
        assert await reader.get("u/ann") == {"name": "Ann"}
        assert [await reader.get(key) for key in ("n", "s", "none", "list")] == [1, "x", None, [1]]
        assert await reader.get("missing", 7) == 7
        assert await reader.get_many(["s", "missing", "n"]) == {"s": "x", "n": 1}
        assert await reader.get_many(["n"], type=float) == {"n": 1.0}
        assert await reader.get_all("u/a", type=User) == {"u/ann": User("Ann")}
        assert len(await reader.get_all()) == 6
        assert sorted(await reader.keys("u/")) == ["u/ann", "u/bob"]
        assert await reader.exists("n")
        assert not await reader.exists("missing")
        assert await reader.revision() == state.revision
        with pytest.raises(KeyNotFoundError):
            await reader.get("missing")
        with pytest.raises(TypeMismatchError, match="key 'u/bob': not a `User`") as caught:
            await reader.get("u/bob", type=User)
        assert caught.value.path == "$.name"
        for call in (reader.get, reader.exists):
            with pytest.raises(InvalidKeyError):
                await call("")
        with pytest.raises(TypeError):
            await reader.get_many("key")
        with pytest.raises(InvalidKeyError):
            await reader.get(["key"])
        with pytest.raises(InvalidKeyError):
            await reader.get(HEAD)
        with pytest.raises(TypeError):
            await reader.keys(5)
        first = await reader.get("list")
        first.append(2)
        assert await reader.get("list") == [1]


async def test_expiry(local: Any, until: Any) -> None:
    """A key has expired at its time, whether or not the writer has swept it."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache, clock) as state, cache.reader("name", local=local, clock=clock) as reader:
        await state.set("a", {}, ttl=10)
        await state.set("b", 1, ttl=20)
        await reader.wait_revision(await state.set("c", 1))
        await until(lambda: not local or reader._local.fresh)
        assert await reader.get_all() == {"a": {}, "b": 1, "c": 1}
        clock.jump(10)  # the reader's clock is ahead
        assert await reader.get("a", None) is None
        with pytest.raises(KeyNotFoundError):
            await reader.get("a")
        assert not await reader.exists("a")
        assert await reader.get("b") == 1
        assert await reader.get_many(["a", "b"]) == {"b": 1}
        assert sorted(await reader.keys()) == ["b", "c"]


class HastyClock(ManualClock):
    """A clock whose wall clock goes on by 40 milliseconds whenever it is read."""

    def time(self) -> float:
        self.jump(0.04)
        return super().time()


async def test_keys_that_expire_during_a_read() -> None:
    """If keys expire while `get_many` decodes their values, it returns the values of one moment, and raises no error."""
    cache, clock = MemoryCache(), ManualClock()
    async with writer(cache, clock) as state, cache.reader("name", clock=HastyClock()) as reader:
        await state.set_many({"a": 1, "b": 2}, ttl=0.1)
        await reader.wait_revision(await state.set("c", 3))
        assert await reader.get_many(["a", "b", "c"]) == {"a": 1, "b": 2, "c": 3}


async def test_no_copy_is_not_missing(cache: Any, local: Any) -> None:
    """Without a mirror, or with half of one, no key is reported as missing."""
    async with cache.reader("name", local=local) as reader:
        for call in (reader.get("a", 1), reader.get_many(["a"]), reader.get_all(), reader.exists("a"), reader.keys()):
            with pytest.raises(UnavailableError, match="no mirror of 'name'"):
                await call
        for revision in (3, -1):
            with pytest.raises(WaitTimeoutError, match=rf"revision {revision} within 0.01 s: there is no mirror"):
                await reader.wait_revision(revision, timeout=0.01)


@pytest.mark.parametrize("lost", [("values", None), ("expires", None), ("values", b"5"), ("expires", b"{}")])
async def test_half_a_copy_is_not_read(lost: tuple[str, bytes | None]) -> None:
    """A hash that was evicted, or belongs to another writer, is noticed."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name") as reader:
        await reader.wait_revision(await state.set("a", 1))
        which = getattr(cache.mirrors["name"], lost[0])
        which.clear()
        if lost[1] is not None:
            which[HEAD] = lost[1]
        with pytest.raises(UnavailableError, match="half of the mirror"):
            await reader.get("a")


async def test_a_newer_format_is_refused() -> None:
    """A mirror of a newer format is refused."""
    cache = MemoryCache()
    async with cache.reader("name") as reader:
        place = cache.mirrors["name"]
        place.values[HEAD] = place.expires[HEAD] = b'{"format":2,"revision":1,"writer":"x"}'
        with pytest.raises(UnsupportedError, match="format 2"):
            await reader.get("a")


async def test_a_reader_never_goes_back(until: Any) -> None:
    """A mirror that is older than what was read is refused, and the writer's next heartbeat repairs it."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache, clock) as state, cache.reader("name", clock=clock) as reader:
        await state.set("a", 1)
        await until(lambda: mirror_of(state).revision == 1)
        place = cache.mirrors["name"]
        old = dict(place.values), dict(place.expires)
        await reader.wait_revision(await state.set("a", 2))
        place.values, place.expires = old
        with pytest.raises(UnavailableError, match="is at revision 1, and 2 was read before"):
            await reader.get("a")
        async with cache.reader("name") as other:
            assert await other.get("a") == 1  # this one has seen nothing
        clock.advance(2)
        await until(lambda: place.seen().revision == 2)
        assert await reader.get("a") == 2


async def test_a_local_reader_does_not_go_back_either(until: Any) -> None:
    """After a read from memory, an older mirror in Redis is refused."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache, clock) as state, cache.reader("name", local=True, clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)
        place = cache.mirrors["name"]
        old = dict(place.values), dict(place.expires)
        await state.set("a", 2)
        await until(lambda: reader._local.shown["a"] == 2)
        assert await reader.get("a") == 2
        place.values, place.expires = old
        [subscription] = place.followers
        subscription.cut()
        await until(lambda: not reader._local.fresh)
        with pytest.raises(UnavailableError, match="is at revision 1, and 2 was read before"):
            await reader.get("a")


async def test_a_slow_read_may_be_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may return a lower revision than a read that began later and ended earlier."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name") as reader:
        await reader.wait_revision(await state.set("a", 1))
        fetch, going = reader._source.fetch, asyncio.Event()

        async def slow(keys: Any) -> Fetched:
            found = await fetch(keys)
            await going.wait()
            return found

        monkeypatch.setattr(reader._source, "fetch", slow)
        reading = asyncio.create_task(reader.get("a"))
        await asyncio.sleep(0)
        monkeypatch.setattr(reader._source, "fetch", fetch)
        await reader.wait_revision(await state.set("a", 2))
        assert await reader.get("a") == 2
        going.set()
        assert await reading == 1


class Held:
    """A follower that holds the messages, as a slow connection does."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()


@pytest.mark.parametrize("call", ["get", "get_all", "wait_revision"])
async def test_a_message_that_arrives_after_a_read(call: str, until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a read of the mirror, a local copy with a lower revision is not read until its messages have arrived."""
    cache = MemoryCache()
    async with writer(cache) as state:
        await state.set("a", 1)
        await until(lambda: mirror_of(state).revision == 1)
        async with cache.reader("name", local=True) as reader:
            source, going = reader._source, asyncio.Event()
            fetch, fetch_all = source.fetch, source.fetch_all

            async def slow(keys: Any) -> Fetched:
                await going.wait()
                return await fetch(keys)

            async def slow_all() -> Fetched:
                await going.wait()
                return await fetch_all()

            monkeypatch.setattr(source, "fetch", slow)
            monkeypatch.setattr(source, "fetch_all", slow_all)
            calls: dict[str, Any] = {
                "get": lambda: reader.get("a"),
                "get_all": reader.get_all,
                "wait_revision": lambda: reader.wait_revision(2),
            }
            reading = asyncio.ensure_future(calls[call]())
            await asyncio.sleep(0)
            monkeypatch.setattr(source, "fetch", fetch)
            await until(lambda: reader._local.fresh)
            place, held = cache.mirrors["name"], Held()
            followers, place.followers = place.followers, {held: None}  # type: ignore[dict-item]
            await state.set("a", 2)
            await until(lambda: mirror_of(state).revision == 2)
            going.set()
            assert await reading == {"get": 2, "get_all": {"a": 2}, "wait_revision": None}[call]
            assert await reader.get("a") == 2
            [subscription], place.followers = followers, followers
            while not held.queue.empty():
                subscription.queue.put_nowait(held.queue.get_nowait())
            await until(lambda: reader._local.fresh)
            assert reader._local.shown["a"] == 2


async def test_open_and_closed(cache: Any) -> None:
    """A reader is used inside `async with`, once at a time, and may be used again."""
    reader = cache.reader("name", local=True)
    assert repr(reader).startswith("<Reader 'name' at ")
    assert repr(reader).endswith(", local>")
    with pytest.raises(ClosedError):
        await reader.get("a")
    async with writer(cache) as state:
        for _ in range(2):
            async with reader:
                await reader.wait_revision(await state.set("a", 1))
                assert await reader.get("a") == 1
                with pytest.raises(RuntimeError, match="open already"):
                    await reader.__aenter__()
            await reader.aclose()
            with pytest.raises(ClosedError):
                await reader.get_all()
            with pytest.raises(ClosedError):
                await reader.wait_revision(1)


# Waiting and watching


async def test_waiting_for_a_revision(cache: Any, local: Any) -> None:
    """A waiter is woken by the step that brings its revision, and many wait at once."""
    async with writer(cache) as state, cache.reader("name", local=local) as reader:
        waiting = [asyncio.create_task(reader.wait_revision(3)) for _ in range(3)]
        for number in range(3):
            assert not any(task.done() for task in waiting)
            await reader.wait_revision(await state.set("a", number))
        await asyncio.gather(*waiting)
        assert await reader.get("a") == 2
        with pytest.raises(WaitTimeoutError, match=r"has not reached revision 99 within 0\.05 s: it is at 3"):
            await reader.wait_revision(99, timeout=0.05)
        for timeout, error in (("1", TypeError), (-1, ValueError), (float("inf"), ValueError)):
            with pytest.raises(error, match="timeout must be"):
                await reader.wait_revision(3, timeout)
        waiting = [asyncio.create_task(reader.wait_revision(4, timeout=None))]
        await asyncio.sleep(0)
        await state.set("a", 3)
        await asyncio.gather(*waiting)


async def test_waiting_looks_again(until: Any) -> None:
    """A waiter without a message reads the revision every second."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache) as state, cache.reader("name", clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        waiting = asyncio.create_task(reader.wait_revision(2))
        await until(lambda: len(clock._timers) >= 2)
        cache.mirrors["name"].followers.clear()
        await state.set("a", 2)
        await until(lambda: mirror_of(state).revision == 2)
        assert not waiting.done()
        clock.advance(1)
        await waiting


async def test_watching(cache: Any) -> None:
    """A watch begins with a resync, and then gets the changes of each step under its prefix."""
    async with writer(cache) as state, cache.reader("name") as reader:
        await reader.wait_revision(await state.set("x", 1))
        async with reader.watch("a/") as changes, reader.watch() as everything:
            assert (await anext(changes)).kind == (await anext(everything)).kind == "resync"
            await reader.wait_revision(await state.set_many({"a/1": 1, "b": 2}))
            await reader.wait_revision(await state.delete("a/1") and state.revision)
            found = await anext(changes)
            assert found.key == "a/1"
            assert found.kind in {"set", "delete"}
            await reader.wait_revision(await state.delete_all() and await state.set("a/2", 1))
            while (change := await anext(changes)).revision < state.revision:
                pass
            assert change in {Change("", "resync", 5), Change("a/2", "set", 5)}
            assert (await anext(everything)).revision >= 2
        with pytest.raises(TypeError):
            async with reader.watch(5):
                pass


async def test_each_watch_begins_with_a_resync(cache: Any) -> None:
    """A watch begins with a resync when the subscription begins, and also if the subscription works already."""
    async with writer(cache) as state, cache.reader("name") as reader:
        await reader.wait_revision(await state.set("x", 1))
        async with reader.watch() as first:
            assert (await anext(first)).kind == "resync"
            async with reader.watch("y") as second:
                assert (await anext(second)) == Change("", "resync", 1)


async def test_a_watch_ends_with_its_reader() -> None:
    """A watch ends when its reader is closed."""
    cache = MemoryCache()
    async with cache.reader("name") as reader, reader.watch() as changes:
        await reader.aclose()
        assert [change async for change in changes] == []


async def test_a_watch_ends_if_the_closing_is_cancelled() -> None:
    """A watch ends when its reader is closed, even if `aclose` is cancelled."""
    cache = MemoryCache()
    async with cache.reader("name") as reader, reader.watch() as changes:
        closing = asyncio.create_task(reader.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        async with asyncio.timeout(1):
            assert [change async for change in changes] == []


def test_closing_in_a_later_event_loop() -> None:
    """A reader whose event loop was closed can be closed in another loop, and opened again there."""
    reader = MemoryCache().reader("name")

    async def close_and_open() -> None:
        await reader.aclose()
        async with reader:
            assert not reader.up

    asyncio.run(reader.__aenter__())
    asyncio.run(close_and_open())


# Subscriptions that are lost


async def test_a_lost_subscription(until: Any, caplog: pytest.LogCaptureFixture, local: Any) -> None:
    """A lost subscription is logged once and made again after a pause, and every watch gets a resync."""
    caplog.set_level(logging.DEBUG, "lab_state")
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=local, clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: not local or reader._local.fresh)
        async with reader.watch() as changes:
            [subscription] = cache.mirrors["name"].followers
            subscription.cut()
            await until(lambda: not cache.mirrors["name"].followers)
            assert not reader._local.fresh
            await state.set("a", 2)
            await until(lambda: mirror_of(state).revision == 2)
            assert await reader.get("a") == 2  # from the cache itself
            clock.advance(1)
            await until(lambda: bool(cache.mirrors["name"].followers))
            while (await anext(changes)).kind != "resync":
                pass
            await state.set("a", 3)
            assert (await anext(changes)).key == "a"
            await until(lambda: not local or reader._local.fresh)
            assert await reader.get("a") == 3
    told = [record.message[:40] for record in caplog.records if "a reader" in record.message]
    assert told == ["a reader receives no changes at present,", "a reader receives changes again"]


async def test_a_message_before_the_first_head_of_a_subscription(until: Any) -> None:
    """If the first thing that a new subscription brings is a message, every watch gets a resync for the changes before it."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache) as state, cache.reader("name", clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        async with reader.watch() as changes:
            feed = reader._feed
            assert feed is not None
            answered, read_head = asyncio.Event(), feed._head

            async def slow() -> Any:
                await answered.wait()
                return await read_head()

            feed._head = slow
            [subscription] = cache.mirrors["name"].followers
            subscription.cut()
            await until(lambda: not cache.mirrors["name"].followers)
            await state.set("missed", 1)
            await until(lambda: mirror_of(state).revision == 2)
            clock.advance(1)
            await until(lambda: bool(cache.mirrors["name"].followers))
            await state.set("b", 1)
            await until(lambda: feed.revision == 3)
            answered.set()
            found = [await anext(changes)]
            while found[-1].revision < 3:
                found.append(await anext(changes))
            assert "resync" in [change.kind for change in found]


async def test_a_silent_subscription_is_asked(until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription without messages is lost if the mirror changes meanwhile. If nothing changes, it is not."""
    clock, cache = ManualClock(), MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True, clock=clock) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)
        place = cache.mirrors["name"]
        [before] = place.followers
        pings: list[int] = []
        ping = before.ping

        async def counted() -> None:
            await ping()
            pings.append(1)

        monkeypatch.setattr(before, "ping", counted)
        clock.advance(3)
        place.publish([message(1, 1, place.seen().writer or "", Slice({}, {}, []))])
        await until(before.queue.empty)
        clock.advance(2)
        await until(lambda: len(clock._timers) > 0)
        assert not pings  # it was heard
        clock.advance(5)
        await until(lambda: bool(pings))
        assert reader._local.fresh
        place.followers.clear()  # the server forgot it, and does not say so
        await state.set("a", 2)
        await until(lambda: mirror_of(state).revision == 2)
        clock.advance(5)
        await until(lambda: len(pings) == 2)
        await until(lambda: not reader._local.fresh)
        clock.advance(5)
        await until(lambda: reader._local.fresh)
        assert await reader.get("a") == 2


async def test_a_copy_that_does_not_fit_is_loaded_again(until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step of another writer, a gap or a resync, the local copy is loaded again."""
    cache = MemoryCache()
    async with writer(cache) as state, cache.reader("name", local=True) as reader:
        await reader.wait_revision(await state.set("a", 1))
        await until(lambda: reader._local.fresh)
        own = cache.mirrors["name"].seen().writer or ""
        nothing = Slice({}, {}, [])
        begin, begun = reader._local.start_loading, [0]

        def counted() -> None:
            begun[0] += 1
            begin()

        monkeypatch.setattr(reader._local, "start_loading", counted)
        for data in (message(1, 1, "other", nothing), message(5, 6, own, nothing), resync(1, 9, own)):
            cache.mirrors["name"].publish([data])
            await until(lambda: begun[0] and reader._local.fresh)
            begun[0] = 0
            assert await reader.get("a") == 1


async def test_a_load_that_fails_is_tried_again(until: Any) -> None:
    """A local copy is loaded as soon as there is something to load."""
    clock, cache = ManualClock(), MemoryCache()
    async with cache.reader("name", local=True, clock=clock) as reader:
        await until(lambda: len(clock._timers) >= 2)
        async with writer(cache) as state:
            await state.set("a", 1)
            await until(lambda: mirror_of(state).revision == 1)
            clock.advance(1)
            await until(lambda: reader._local.fresh)
            assert await reader.get("a") == 1


def test_more_messages_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load with too many messages meanwhile begins again."""
    from lab_state.cache import _local_copy  # noqa: PLC0415 -- to be patched

    monkeypatch.setattr(_local_copy, "_MOST_KEPT", 2)
    local, head = LocalCopy(), Head(1, 5, "w")
    local.start_loading()
    assert local.set_head(head)
    step = [parsed(message(5, 6, "w", Slice({}, {}, [])))]
    assert [local.receive(step) for _ in range(4)] == [True] * 4
    assert not local.finish_loading(head)


def test_a_load_that_broke_off() -> None:
    """After an interrupted load, the next one reads everything, also if the mirror has not changed."""
    local, head = LocalCopy(), Head(1, 5, "w")
    for _ in range(2):
        local.start_loading()
        assert local.set_head(head)
    local.add(Fetched(None, None, {"a": b"1"}, {}))
    assert local.finish_loading(head)
    local.start_loading()
    assert not local.set_head(head)
    assert local.finish_loading(head)
    assert local.shown == {"a": 1}


def test_a_load_that_ends_below_a_read() -> None:
    """A loaded copy is read when it has the revision of a read of the mirror that ended during the load."""
    local = LocalCopy()
    local.start_loading()
    assert local.set_head(Head(1, 5, "w"))
    local.has_read(6)
    assert local.finish_loading(Head(1, 5, "w"))
    assert (local.loaded, local.fresh, local.highest, local.shown) == (True, False, 0, {})
    assert local.receive([parsed(message(5, 6, "w", Slice({"n": b"6"}, {}, [])))])
    assert (local.fresh, local.highest, local.shown["n"]) == (True, 6, 6)
    local.reset()
    assert (local.loaded, local.fresh) == (False, False)


@pytest.mark.parametrize(
    ("told", "last", "good"),
    [
        ([(4, 5)], (6, "w"), False),  # something is missing
        ([(5, 6)], (6, "w"), True),
        ([(5, 6), (6, 8)], (6, "w"), True),
        ([(6, 7)], (7, "w"), False),  # a gap
        ([], (5, "v"), False),
        ([], (5, "w"), True),
    ],
)
def test_where_a_load_arrives(told: list[tuple[int, int]], last: tuple[int, str], good: Any) -> None:
    """A load succeeds if the messages lead from the first head to the second one or beyond it."""
    local = LocalCopy()
    local.start_loading()
    assert local.set_head(Head(1, 5, "w"))
    local.add(Fetched(None, None, {"a": b"1", "b": b"{}"}, {"a": b"5", "gone": b"5"}))
    local.add(Fetched(None, None, {}, {"a": b"7"}))
    for start, end in told:
        local.receive([parsed(message(start, end, "w", Slice({"n": b"%d" % end}, {}, [])))])
    assert local.finish_loading(Head(1, *last)) is good
    assert local.fresh is good
    assert local.shown.get("n") == (told[-1][1] if good and told else None)
    assert local.shown.get("a") == (Expiring(1, 7) if good else None)


def test_types() -> None:
    """A reader is what `reader()` gives."""
    assert isinstance(MemoryCache().reader("name"), Reader)
    assert repr(MemoryCache()) == "<MemoryCache []>"


async def test_an_outage_is_told_once(
    caplog: pytest.LogCaptureFixture, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that repeatedly fails to subscribe logs that once."""
    clock, reader, tried = ManualClock(), MemoryCache().reader("name", clock=None), [0]
    reader._clock = clock

    async def subscribe() -> Any:
        tried[0] += 1
        raise UnavailableError("gone")

    monkeypatch.setattr(reader._source, "subscribe", subscribe)
    async with reader:
        for number in range(1, 4):
            await until(lambda number=number: tried[0] == number)
            clock.advance(5)
    assert [record.message[:25] for record in caplog.records] == ["a reader receives no chan"]


async def test_each_outage_is_told_if_no_manager_runs(caplog: pytest.LogCaptureFixture, until: Any, local: Any) -> None:
    """A subscription that answers works again, even if it brings no messages. So the next outage is logged, too."""
    caplog.set_level(logging.DEBUG, "lab_state")
    clock, cache = ManualClock(), MemoryCache()
    session = await cache.open("name", "one")
    assert await session.fill(1, parts(), await session.look())
    async with cache.reader("name", local=local, clock=clock) as reader:
        followers = cache.mirrors["name"].followers
        for number in range(1, 3):
            await until(lambda: len(followers) == 1)
            [subscription] = followers
            subscription.cut()
            await until(lambda number=number: sum("no changes" in text for text in caplog.messages) == number)
            for _ in range(10):
                clock.advance(1)
                for _ in range(20):
                    await asyncio.sleep(0)
        assert reader.up
    assert [text[:25] for text in caplog.messages] == ["a reader receives no chan", "a reader receives changes"] * 2


async def parts() -> AsyncIterator[Slice]:
    """Yield the slices of a small state."""
    yield Slice({"a": b"1"}, {}, [])


@pytest.mark.parametrize("spoilt", [b"", b"nonsense", b'"\x89"', b"[1,", b"\xff"])
async def test_a_value_that_somebody_else_spoilt(until: Any, spoilt: bytes) -> None:
    """A value that is not JSON raises `TypeMismatchError`. Every other key can be read, from a local copy too."""
    cache = MemoryCache()
    async with writer(cache) as state:
        await state.set_many({"a": 1, "b": 2})
        async with cache.reader("name") as remote:
            await remote.wait_revision(1)
        cache.mirrors["name"].values["a"] = spoilt
        async with cache.reader("name", local=True) as local:
            await until(lambda: local._local.fresh)
            for reader in (local, await remote.__aenter__()):
                with pytest.raises(TypeMismatchError, match="key 'a'"):
                    await reader.get("a")
                assert await reader.get("b") == 2
            await remote.aclose()
            await local.wait_revision(await state.set("a", 3))
            assert await local.get("a") == 3


async def test_a_time_that_somebody_else_spoilt(until: Any) -> None:
    """An invalid expiry time raises `UnavailableError`. A local copy is loaded after the mirror is repaired."""
    cache, clock = MemoryCache(), ManualClock()
    async with writer(cache, clock) as state:
        await state.set("a", 1, ttl=1000)
        async with cache.reader("name", clock=clock) as remote, cache.reader("name", local=True, clock=clock) as local:
            await remote.wait_revision(1)
            good = cache.mirrors["name"].expires["a"]
            cache.mirrors["name"].expires["a"] = b"soon"
            for _ in range(20):
                await asyncio.sleep(0)
                clock.advance(5)
            for reader in (remote, local):
                with pytest.raises(UnavailableError, match="an expiry time in the mirror is not from lab_state"):
                    await reader.get("a")
            cache.mirrors["name"].expires["a"] = good
            clock.advance(10)
            await until(lambda: local._local.fresh)
            assert await local.get("a") == 1


def loading(steps: int) -> LocalCopy:
    """Return a local copy that was read at revision 0, and got so many steps of ten keys meanwhile."""
    local = LocalCopy()
    local.start_loading()
    assert local.set_head(Head(1, 0, "w"))
    for number in range(steps):
        values = {f"k{key}": b"%d" % number for key in range(10)}
        local.receive([parsed(message(number, number + 1, "w", Slice(values, {}, [])))])
    return local


def test_what_was_told_during_a_load_is_applied_in_steps() -> None:
    """The messages of a load are applied in steps of about as many keys as requested, with the same result as at once."""
    local, at_once = loading(300), loading(300)
    turns = 0
    while local.replay(100):
        turns += 1
        assert local.head is not None
        assert local.head.revision <= turns * 10
    assert turns >= 25
    assert local.finish_loading(Head(1, 300, "w"))
    assert at_once.finish_loading(Head(1, 300, "w"))
    assert local.shown == at_once.shown == {f"k{key}": 299 for key in range(10)}


def test_what_does_not_fit_ends_a_load_in_steps() -> None:
    """A gap or a resync among the messages ends the load, and nothing is shown."""
    for told in (message(301, 302, "w", Slice({}, {}, [])), resync(300, 301, "w")):
        local = loading(300)
        local.receive([parsed(told)])
        while local.replay(1_000):
            pass
        assert not local.finish_loading(Head(1, 300, "w"))
        assert local.shown == {}
    nothing = LocalCopy()
    nothing.start_loading()
    nothing.receive([parsed(message(0, 1, "w", Slice({}, {}, [])))])
    assert not nothing.replay(1)  # no head was seen, so nothing can be applied
    assert not nothing.finish_loading(Head(1, 1, "w"))


async def test_a_load_beside_a_writer_gives_the_loop_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """During a load beside a writer, messages are applied in steps, and the copy is of one moment."""
    replays: list[bool] = []
    real = LocalCopy.replay

    def replay(local: LocalCopy, keys: int) -> bool:
        replays.append(real(local, keys))
        return replays[-1]

    monkeypatch.setattr(LocalCopy, "replay", replay)
    monkeypatch.setattr(_feed, "_REPLAYED_AT_ONCE", 1)
    cache = MemoryCache()
    async with Manager(Config(name="x", flush_interval=0), MemoryStorage(), cache) as state:
        await state.set_many({f"k{number}": number for number in range(20_000)})
        async with cache.reader("x") as before:
            await before.wait_revision(state.revision)
            async with cache.reader("x", local=True) as reader:
                while not any(replays):
                    await state.set("last", state.revision)
                await reader.wait_revision(state.revision)
                assert await reader.get_all() == await state.get_all()
