"""The mirror of a manager: which changes are sent to the cache, when, and what happens when a cache fails."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from faulty_cache import FaultyCache, FaultySession, lines, manager
from mirrored import mirror_of

import lab_state.cache._backlog
import lab_state.cache._mirror
from lab_state import (
    Config,
    FencedError,
    Manager,
    MemoryCache,
    MemoryStorage,
    MirrorStatus,
    UnavailableError,
    UnsupportedError,
)
from lab_state.cache import Slice
from lab_state.cache._format import slices
from lab_state.integrations._lifespan import health_of
from lab_state.testing import FaultyStorage, ManualClock

# What is brought


async def test_what_is_durable_is_brought(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A flushed change is mirrored; one that is not flushed is not."""
    async with manager(faulty, clock, interval=None) as state:
        await until(lambda: faulty.revision == 0)
        await state.set("a", 1)
        await state.flush()
        await until(lambda: faulty.entries == {"a": 1})
        assert mirror_of(state).revision == 1
        assert mirror_of(state).up
        await state.set("a", 2)
        clock.advance(60)
        await until(lambda: faulty.calls.count("look") > 1)  # a beat
        assert faulty.entries == {"a": 1}
    assert faulty.entries == {"a": 2}  # the last flush
    assert state.metrics().operations["mirror", "success"] == 2
    assert state.metrics().operations["fill", "success"] == 1
    assert mirror_of(state) == MirrorStatus(up=False, revision=2)


async def test_a_manager_with_a_cache_has_a_mirror_before_its_start(faulty: FaultyCache, clock: ManualClock) -> None:
    """`status().mirror` of a manager with a cache is a MirrorStatus before `start()` too, which is not up."""
    assert manager(faulty, clock).status().mirror == MirrorStatus(up=False, revision=None, error=None)


async def test_the_health_page_shows_the_mirror(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """`/health` has the mirror as an object, or null without a cache. An error may name a path that is not UTF-8."""
    faulty.fail("open", UnavailableError("no socket at /\udcff"))
    async with manager(faulty, clock) as state, manager(None, clock) as other:
        await until(lambda: mirror_of(state).error is not None)
        code, body = health_of({"name": state, "other": other}, 30)
    told = json.loads(body)["managers"]
    assert code == 200
    assert told["name"]["mirror"] == {"up": False, "revision": None, "error": r"no socket at /\udcff"}
    assert told["other"]["mirror"] is None


async def test_a_manager_without_a_cache_has_no_mirror(clock: ManualClock) -> None:
    """`status().mirror` is None in every phase of a manager without a cache."""
    state = manager(None, clock)
    assert state.status().mirror is None
    async with state:
        assert state.status().mirror is None
        assert ("fill", "success") not in state.metrics().operations


@pytest.mark.parametrize("cache", [MemoryCache, "redis://host", 1])
def test_a_cache_is_an_object(cache: Any) -> None:
    """A class or a URL is refused as a cache."""
    with pytest.raises(TypeError, match="RedisCache"):
        Manager("name", MemoryStorage(), cache)


async def test_a_start_fills_with_what_was_recovered(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """The mirror of an earlier start is replaced at a start, without a commit that confirms the ownership."""
    storage = MemoryStorage()
    async with manager(faulty, clock, storage) as state:
        await state.set("a", [1], ttl=100)
        await state.set("b", 2)
    faulty.inner.mirrors["name"].values["a"] = b"spoilt"
    async with manager(faulty, clock, storage) as state:
        await until(lambda: mirror_of(state).up)
        assert faulty.entries == {"a": [1], "b": 2}
        assert state.status().flushes == 0
        assert faulty.inner.mirrors["name"].expires["a"] == b"1700000100000"


async def test_steps_are_coalesced(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """All changes that become durable during a step, deletions and clears too, are sent as one step."""
    async with manager(faulty, clock) as state:
        await until(lambda: faulty.revision == 0)
        faulty.going.clear()
        await state.set("first", 0)
        await until(lambda: faulty.calls[-1] == "apply")
        for number in range(5):
            await state.set("a", number)
        await state.delete_all()
        await state.set_many({"b": 1, "c": None, "d": "x"})
        await state.set("c", None)
        await state.delete("b")
        faulty.going.set()
        await until(lambda: faulty.revision == state.revision)
        assert faulty.entries == {"c": None, "d": "x"}
    assert faulty.calls.count("apply") == 2


async def test_a_view_is_shown_only_when_it_is_durable(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A fill waits until its view is durable, for any time, and is kept alive with empty slices."""
    storage = FaultyStorage(MemoryStorage())
    async with manager(faulty, clock, storage, interval=None) as state:
        await until(lambda: faulty.revision == 0)
        await state.set("a", 1)
        storage.hang("commit")
        del faulty.inner.mirrors["name"].values["$lab_state"]
        clock.advance(2)
        await until(lambda: faulty.calls.count("fill") == 2)
        for _ in range(3):
            clock.advance(10)
            await asyncio.sleep(0)
        flushing = asyncio.create_task(state.flush())
        await until(lambda: storage.calls.count("commit") == 1)
        assert faulty.entries == {}
        storage.resume()
        await flushing
        await until(lambda: faulty.entries == {"a": 1})


async def test_a_view_is_of_the_moment_of_its_revision(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A change after the view was taken and before the first slice is requested is not in the view."""
    faulty.held = "fill"
    faulty.going.clear()
    async with manager(faulty, clock, interval=None) as state:
        await until(lambda: faulty.calls[-1:] == ["fill"])
        await state.set("a", 1)
        faulty.going.set()
        await until(lambda: faulty.revision == 0)
        assert faulty.entries == {}


async def test_the_sweep_is_mirrored(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A key that expires is deleted from the mirror."""
    async with manager(faulty, clock) as state:
        await state.set("a", 1, ttl=1)
        await until(lambda: faulty.entries == {"a": 1})
        clock.advance(3)
        await until(lambda: faulty.entries == {})


# Failures


async def test_an_outage_is_told_once_and_mended(
    faulty: FaultyCache, clock: ManualClock, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage is one line at its beginning and one at its end. Writes and flushes go on, and no fill is needed."""
    caplog.set_level(logging.DEBUG, "lab_state")
    async with manager(faulty, clock) as state:
        await until(lambda: mirror_of(state).up)
        faulty.fail("apply", UnavailableError("gone"))
        faulty.fail("open", *[UnavailableError("gone")] * 3)
        await state.set("a", "secret")
        await until(lambda: mirror_of(state).error == "gone")
        for _ in range(3):
            await state.set("b", 1)
            opened = faulty.calls.count("open")
            await state.set("c", 1)
            assert faulty.calls.count("open") == opened  # not before the pause is over
            clock.advance(5)
            await until(lambda opened=opened: faulty.calls.count("open") > opened)
        await until(lambda: not faulty.faults["open"])
        clock.advance(5)
        await until(lambda: faulty.revision == state.revision)
        await until(lambda: mirror_of(state).up)
        assert mirror_of(state).error is None
        assert faulty.entries == {"a": "secret", "b": 1, "c": 1}
        assert faulty.calls.count("fill") == 1
    assert [line.partition(":")[2][:25] for line in lines(caplog)] == [
        " the mirror is not up to ",
        " the mirror works again, ",
    ]
    assert "secret" not in caplog.text
    assert state.metrics().operations["mirror", "error"] == 4


@pytest.mark.parametrize("call", ["apply", "fill"])
async def test_an_answer_that_was_lost(faulty: FaultyCache, clock: ManualClock, until: Any, call: str) -> None:
    """A step or a fill whose answer was lost is recognised, and not sent again."""
    if call == "fill":
        faulty.fail("fill", "after")
    async with manager(faulty, clock) as state:
        await until(lambda: faulty.revision == 0)
        faulty.fail("apply", *(["after"] if call == "apply" else []))
        await state.set("a", 1)
        await until(lambda: faulty.calls[-1] == "aclose" or mirror_of(state).revision == 1)
        await state.set("b", 1)
        clock.advance(1)
        await until(lambda: faulty.entries == {"a": 1, "b": 1})
    assert faulty.calls.count("fill") == 1


async def test_a_cache_that_breaks_its_promise(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """After any exception of a cache, the task tries again."""
    faulty.fail("open", ZeroDivisionError("with a secret"))
    async with manager(faulty, clock) as state:
        await until(lambda: mirror_of(state).error is not None)
        assert mirror_of(state).error == "the cache failed with ZeroDivisionError, which a cache must not raise"
        clock.advance(1)
        await until(lambda: mirror_of(state).up)


async def test_a_session_that_cancels_its_end(
    faulty: FaultyCache, clock: ManualClock, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `CancelledError` of `aclose` does not end the task. A cancellation of the task ends it, even during `aclose`."""
    closing = asyncio.Event()

    async def aclose(_: FaultySession) -> None:
        if closing.is_set():
            await asyncio.Event().wait()
        closing.set()
        raise asyncio.CancelledError

    monkeypatch.setattr(FaultySession, "aclose", aclose)
    faulty.fail("look", UnavailableError("gone"))
    async with manager(faulty, clock) as state:
        await until(closing.is_set)
        clock.advance(1)
        await until(lambda: mirror_of(state).up)
        faulty.fail("apply", UnavailableError("gone"))
        await state.set("a", 1)
        await until(lambda: not mirror_of(state).up)
        mirror = state._mirror
        assert mirror is not None
        mirror._task.cancel()
        await asyncio.wait({mirror._task})
        assert mirror._task.cancelled()


async def test_more_than_is_kept(
    faulty: FaultyCache, clock: ManualClock, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more changes than are kept, the mirror is filled once."""
    monkeypatch.setattr(lab_state.cache._backlog, "MOST_KEYS", 10)
    async with manager(faulty, clock) as state:
        await until(lambda: mirror_of(state).up)
        faulty.fail("apply", UnavailableError("gone"))
        await state.set("a", 1)
        await until(lambda: mirror_of(state).error is not None)
        for number in range(30):
            await state.set(str(number), number)
        clock.advance(1)
        await until(lambda: faulty.revision == state.revision)
        assert len(faulty.entries) == 31
    assert faulty.calls.count("fill") == 2


async def test_a_commit_that_was_not_told(
    faulty: FaultyCache, clock: ManualClock, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If `committed` missed a commit, the mirror is filled, because a step without it would be wrong."""
    async with manager(faulty, clock) as state:
        await until(lambda: mirror_of(state).up)
        mirror = state._mirror
        assert mirror is not None
        with monkeypatch.context() as patch:
            patch.setattr(mirror, "committed", lambda _: None)
            await state.set("a", 1)
        await state.set("b", 2)
        await until(lambda: faulty.entries == {"a": 1, "b": 2})
        assert faulty.calls.count("apply") == 0
        assert faulty.calls.count("fill") == 2


async def test_a_copy_that_is_lost_is_filled(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A heartbeat or the next step finds that the mirror is missing or old, and fills it."""
    async with manager(faulty, clock) as state:
        await state.set("a", 1)
        await until(lambda: faulty.revision == 1)
        faulty.inner.mirrors["name"].values.clear()
        clock.advance(2)
        await until(lambda: faulty.entries == {"a": 1})
        old = dict(faulty.inner.mirrors["name"].values)
        await state.set("b", 1)
        await until(lambda: faulty.revision == 2)
        faulty.inner.mirrors["name"].values = old
        await state.set("c", 1)
        await until(lambda: faulty.revision == 3)
        assert faulty.entries == {"a": 1, "b": 1, "c": 1}


async def test_a_fill_that_somebody_was_faster_than(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A fill that was refused is tried again, after a commit has confirmed the ownership."""
    storage = FaultyStorage(MemoryStorage())
    async with manager(faulty, clock, storage) as state:
        await until(lambda: mirror_of(state).up)
        other = await faulty.inner.open("name", "other")
        assert await other.fill(9, _nothing(), await other.look())
        clock.advance(2)
        await until(lambda: faulty.revision == 0)
        assert storage.calls.count("commit") == 1
        assert state.status().flushes == 1
        assert await other.fill(9, _nothing(), await other.look())
        await state.set("a", 1)  # a step finds it as well
        await until(lambda: faulty.entries == {"a": 1})


async def _nothing() -> AsyncIterator[Slice]:
    yield Slice({}, {}, [])


async def test_a_fenced_writer_gives_way(
    faulty: FaultyCache, clock: ManualClock, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A writer that finds another writer's mirror, and then that it is fenced, does not write to it."""
    storage = FaultyStorage(MemoryStorage())
    state = manager(faulty, clock, storage)
    await state.start()
    await until(lambda: mirror_of(state).up)
    storage.fail("commit", error=FencedError("a newer writer"), times=9)
    other = await faulty.inner.open("name", "other")
    assert await other.fill(9, _nothing(), await other.look())
    clock.advance(2)
    await until(lambda: state._mirror is not None and state._mirror._task.done())
    assert faulty.inner.mirrors["name"].seen() == ("other", 9)
    assert not mirror_of(state).up
    assert [line for line in lines(caplog) if "the mirror" in line] == []
    calls = len(faulty.calls)
    clock.advance(10)
    with pytest.raises(FencedError):
        await state.set("a", 1)
    with pytest.raises(FencedError):
        await state.stop()
    assert len(faulty.calls) == calls


async def test_a_confirmation_that_fails(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """While the storage cannot confirm the ownership, another writer's mirror stays."""
    storage = FaultyStorage(MemoryStorage())
    async with manager(faulty, clock, storage) as state:
        await until(lambda: mirror_of(state).up)
        storage.fail("commit")
        other = await faulty.inner.open("name", "other")
        assert await other.fill(9, _nothing(), await other.look())
        clock.advance(2)
        await until(lambda: mirror_of(state).error is not None)
        assert faulty.inner.mirrors["name"].seen() == ("other", 9)
        clock.advance(1)
        await until(lambda: faulty.revision == 0)


async def test_a_fill_that_is_not_made(
    faulty: FaultyCache, clock: ManualClock, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror that another writer replaces during a fill is filled again after a pause."""

    def disturbed(items: Any, ahead: int) -> Any:
        monkeypatch.undo()
        place = faulty.inner.mirrors["name"]
        place.values["$lab_state"] = place.expires["$lab_state"] = b'{"format":1,"revision":1,"writer":"x"}'
        return slices(items, ahead)

    monkeypatch.setattr(lab_state.cache._mirror, "slices", disturbed)
    async with manager(faulty, clock) as state:
        await until(lambda: mirror_of(state).error is not None)
        assert mirror_of(state).error == "another writer replaced the mirror while it was filled"
        assert faulty.calls.count("fill") == 1
        clock.advance(1)
        await until(lambda: mirror_of(state).up)


# The end


async def test_a_stop_waits_a_second_at_most(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A cache that hangs holds `stop()` up for one second."""
    state = manager(faulty, clock)
    await state.start()
    await until(lambda: mirror_of(state).up)
    faulty.going.clear()
    await state.set("a", 1)
    stopping = asyncio.create_task(state.stop())
    await until(lambda: state._mirror is not None and state._mirror._stopping)
    clock.advance(0.9)
    await asyncio.sleep(0)
    assert not stopping.done()
    clock.advance(0.2)
    await stopping
    assert faulty.calls[-1] == "aclose"


async def test_a_stop_brings_what_is_left(faulty: FaultyCache, clock: ManualClock) -> None:
    """A stop right after a change still sends the change."""
    async with manager(faulty, clock, interval=None) as state:
        await state.set("a", 1)
    assert faulty.entries == {"a": 1}


async def test_a_stop_does_not_try_what_fails(
    faulty: FaultyCache, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop does not wait for a cache that cannot be reached."""
    faulty.fail("open", *[UnsupportedError("no")] * 9)
    async with manager(faulty, clock) as state:
        await state.set("a", 1)
    assert mirror_of(state).error == "no"


def test_a_stop_on_another_loop(clock: ManualClock) -> None:
    """If the event loop of the mirror was closed, the state can still be stopped on another one."""
    faulty = MemoryCache()
    state = Manager(Config(name="name", flush_interval=None), MemoryStorage(), faulty, clock=clock)

    async def begin() -> None:
        await state.start()
        await state.set("a", 1)

    asyncio.run(begin())
    asyncio.run(state.stop())
    assert state.status().phase == "stopped"


async def test_a_large_fill_is_told(
    clock: ManualClock, until: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fill of a large state logs its progress."""
    caplog.set_level(logging.DEBUG, "lab_state")
    monkeypatch.setattr(lab_state.cache._mirror, "_LARGE_KEYS", 10)
    monkeypatch.setattr(lab_state.cache._mirror, "_PROGRESS_SECONDS", 0.0)
    storage = MemoryStorage()
    async with manager(None, clock, storage) as state:
        await state.set_many({str(number): number for number in range(120)})
    async with manager(MemoryCache(), clock, storage) as state:
        await until(lambda: mirror_of(state).up)
    assert lines(caplog) == [
        "name: filling the mirror, 50 of 120 keys",
        "name: filling the mirror, 100 of 120 keys",
        "name: filling the mirror, 120 of 120 keys",
        "name: filled the mirror with 120 keys",
    ]


async def test_a_checkpoint_waits_for_a_fill(faulty: FaultyCache, clock: ManualClock, until: Any) -> None:
    """A checkpoint waits for a fill, because two views at a time would need a copy of the state."""
    storage = FaultyStorage(MemoryStorage())

    async with manager(faulty, clock, storage) as state:
        await until(lambda: mirror_of(state).up)
        view = state._core.state.freeze()
        await state.set("a", "x" * 100_000)
        assert "checkpoint" not in storage.calls
        state._core.state.fold(view, 10)
        await state.set("b", 1)
        await until(lambda: "checkpoint" in storage.calls)


async def test_a_fill_waits_while_a_view_of_the_state_is_out(
    faulty: FaultyCache, clock: ManualClock, until: Any
) -> None:
    """During a commit of the whole state, as after an unclean end, a fill waits and makes no copy of the entries."""
    async with manager(faulty, clock) as state:
        held = state._core.state
        view = held.freeze()
        await until(lambda: "look" in faulty.calls)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert "fill" not in faulty.calls
        assert not held.fold(view, 1)
        await until(lambda: faulty.revision == 0)
