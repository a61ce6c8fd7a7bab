"""Expiry for readers, which use the wall clock, when the wall clock of the writer is set."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from faulty_cache import FaultyCache, manager
from mirrored import mirror_of

from lab_state import MemoryCache, RedisCache, UnavailableError
from lab_state._clock import within
from lab_state.testing import ManualClock

NOW = 1_700_000_000


def times(cache: Any) -> dict[str, int]:
    """Return when keys expire in the mirror, in seconds after the beginning of the test."""
    expires = cache.mirrors["name"].expires
    return {key: int(at) // 1000 - NOW for key, at in expires.items() if key != "$lab_state"}


@pytest.fixture(params=[False, True], ids=["remote", "local"])
def local(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("seconds", [7200, -7200])
async def test_a_key_lives_for_readers_as_for_the_manager(
    clock: ManualClock, until: Any, local: Any, seconds: int
) -> None:
    """After the wall clock was set forward or back, a new key lives for its ttl, and not longer."""
    cache = MemoryCache()
    async with manager(cache, clock) as state, cache.reader("name", local=local, clock=clock) as reader:
        clock.jump(seconds)
        await state.set("session", "ann", ttl=3600)
        await until(lambda: mirror_of(state).revision == 1)
        await until(lambda: not local or reader._local.highest == 1)
        assert await reader.get("session") == "ann"
        clock.jump(3599)
        assert await reader.exists("session")
        clock.jump(1)
        assert not await reader.exists("session")


@pytest.mark.parametrize("local", [True], ids=["local"])
async def test_keys_that_are_there_get_new_times(clock: ManualClock, until: Any, local: Any) -> None:
    """An idle writer notices within a heartbeat that its machine slept, and corrects the times in the mirror."""
    cache = MemoryCache()
    async with manager(cache, clock) as state, cache.reader("name", local=local, clock=clock) as reader:
        await state.set("session", "ann", ttl=3600)
        await until(lambda: mirror_of(state).revision == 1 and reader._local.fresh)
        clock.jump(7200)
        assert await reader.get("session", None) is None
        clock.advance(2)
        await until(lambda: times(cache) == {"session": 3600 + 7200})
        await until(lambda: bool(reader._local.shown))
        assert await reader.get("session") == "ann"
        assert await state.get("session") == "ann"
        clock.jump(-7200)
        clock.advance(2)
        await until(lambda: times(cache) == {"session": 3600})


async def test_a_small_jump_changes_nothing(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A drift below half a second changes no times. A mirror without times is never filled because of a clock."""
    async with manager(faulty, clock) as state:
        await state.set("a", 1)
        await until(lambda: faulty.revision == 1)
        clock.jump(100)
        looks = faulty.calls.count("look")
        clock.advance(2)
        await until(lambda: faulty.calls.count("look") > looks)
        await state.set("b", 1, ttl=50)
        await until(lambda: faulty.revision == 2)
        assert times(faulty.inner) == {"b": 2 + 100 + 50}
        clock.jump(0.4)
        await state.set("c", 1)
        await until(lambda: faulty.revision == 3)
        assert faulty.calls.count("fill") == 1
        clock.jump(0.2)
        await state.set("d", 1)
        await until(lambda: faulty.revision == 4)
        assert faulty.calls.count("fill") == 2


async def test_new_times_that_could_not_be_brought(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A fill for new times that fails is tried again, though the mirror is this writer's and at its revision."""
    async with manager(faulty, clock) as state:
        await state.set("a", 1, ttl=50)
        await until(lambda: faulty.revision == 1)
        clock.jump(100)
        faulty.fail("fill", UnavailableError("gone"))
        clock.advance(2)
        await until(lambda: mirror_of(state).error == "gone")
        clock.advance(1)
        await until(lambda: times(faulty.inner) == {"a": 150})
        await until(lambda: mirror_of(state).up)


async def held(clock: ManualClock, ends: asyncio.Event) -> str:
    try:
        with within(clock, 3):
            await ends.wait()
    except TimeoutError:
        return "late"
    return "in time"


async def test_a_timeout_by_a_clock(clock: ManualClock) -> None:
    """A timeout comes at its time by the clock. It does not come after the call has ended, or was cancelled by other code too."""
    ends = asyncio.Event()
    late, early, cancelled = (
        asyncio.create_task(held(clock, event)) for event in (asyncio.Event(), ends, asyncio.Event())
    )
    await asyncio.sleep(0)
    clock.advance(2.9)
    ends.set()
    assert await early == "in time"
    assert not late.done()
    cancelled.cancel()
    clock.advance(0.1)
    assert await late == "late"
    assert late.cancelling() == early.cancelling() == 0
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_a_redis_that_does_not_answer(redis_server: Any, proxy_to: Any, clock: ManualClock, until: Any) -> None:
    """The clock of the cache measures the timeouts of a connection. A reader's own clock measures the reader's."""
    proxy = await proxy_to(redis_server.port)
    cache = RedisCache(proxy.url, clock=clock)
    session = await cache.open("name", "one")
    subscription = await cache.reader("name")._source.subscribe()
    own = ManualClock()
    reader = cache.reader("name", clock=own)
    proxy.open.clear()
    tasks = [asyncio.ensure_future(each) for each in (session.look(), subscription.ping())]
    async with reader:
        reading = asyncio.create_task(reader.get("a"))
        await until(lambda: len(clock._timers) >= 2 and len(own._timers) >= 2)
        clock.advance(4.9)
        own.advance(4.9)
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in (*tasks, reading))
        clock.advance(0.1)
        for task, words in zip(tasks, ("does not answer in time", "the subscription does not answer"), strict=True):
            with pytest.raises(UnavailableError, match=words):
                await task
        assert not reading.done()
        own.advance(0.1)
        with pytest.raises(UnavailableError, match="does not answer in time"):
            await reading
    proxy.open.set()
    await session.aclose()
    await subscription.aclose()
