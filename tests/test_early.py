"""A flush begins early once 8 MiB are unflushed, so that a bulk writer cannot lose a whole interval of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from running import idle, running, until

from lab_state import Manager, MemoryStorage, UnavailableError
from lab_state._early import LOOK_EVERY, MANY_BYTES
from lab_state.testing import FaultyStorage, ManualClock

HOUR = 3600.0
PAGE = "x" * 50_000
PAGES = MANY_BYTES // len(PAGE) + 1


@pytest.fixture
async def state(storage: FaultyStorage, clock: ManualClock) -> AsyncIterator[Manager]:
    async with running(storage, clock, HOUR) as state:
        yield state


async def looked(clock: ManualClock) -> None:
    """Let the time pass to the next look, and what that begins get to its end."""
    await idle()
    clock.advance(LOOK_EVERY)
    for _ in range(20):  # a record of 8 MiB is made in many steps
        await idle()


async def pages(state: Manager, begin: int, end: int, **arguments: Any) -> None:
    for number in range(begin, end):
        await state.set(f"page {number}", PAGE, **arguments)


async def test_8_mebibytes_are_flushed_early(state: Manager, clock: ManualClock) -> None:
    """Below 8 MiB nothing is written before the interval is over; with the page that fills them, all of it is."""
    await pages(state, 0, PAGES - 2)
    await looked(clock)
    assert state.durable_revision == 0
    await pages(state, PAGES - 2, PAGES)
    await looked(clock)
    assert state.durable_revision == PAGES


async def test_it_counts_from_the_last_commit(state: Manager, clock: ManualClock) -> None:
    """What is durable does not count again: the next flush comes after as many bytes."""
    await pages(state, 0, PAGES)
    await looked(clock)
    await pages(state, PAGES, PAGES + 100)
    await looked(clock)
    assert state.durable_revision == PAGES
    await pages(state, PAGES + 100, 2 * PAGES)
    await looked(clock)
    assert state.durable_revision == 2 * PAGES


@pytest.mark.parametrize(
    "write",
    [
        lambda state: pages(state, 0, PAGES, ttl=60),
        lambda state: state.set_many({f"page {number}": PAGE for number in range(PAGES)}),
        lambda state: state.set_many({f"{number}": {"n": number, "text": "y" * 70} for number in range(90_000)}),
        lambda state: state.set_many({f"{'k' * 1000} {number}": True for number in range(9000)}),
    ],
    ids=["values that expire", "one large change", "many small keys", "long keys"],
)
async def test_whatever_the_bytes_are(state: Manager, clock: ManualClock, write: Callable[[Manager], Any]) -> None:
    """Values that expire, many small ones and long keys count by their bytes."""
    await write(state)
    assert state.durable_revision == 0
    await looked(clock)
    assert state.durable_revision == state.revision


async def test_a_key_that_is_set_again_counts_once(state: Manager, clock: ManualClock) -> None:
    """A record has the last value of a key alone, so a counter does not fill it."""
    for _ in range(2 * PAGES):
        await state.set("page", PAGE)
    await looked(clock)
    await state.set("page", PAGE)
    await looked(clock)
    assert state.durable_revision == 0


async def test_keys_that_are_set_again_count_with_what_they_hold_now(state: Manager, clock: ManualClock) -> None:
    """Small values that are replaced by large ones are flushed early, though no key came."""
    for number in range(PAGES):
        await state.set(f"page {number}", number)
    await looked(clock)
    await pages(state, 0, PAGES - 2)
    await looked(clock)
    assert state.durable_revision == 0
    await pages(state, PAGES - 2, PAGES)
    await looked(clock)
    assert state.durable_revision == state.revision


async def test_values_that_are_set_again_and_smaller(state: Manager, clock: ManualClock) -> None:
    """Where large values became small ones, a flush comes after 8 MiB more."""
    await pages(state, 0, PAGES - 2)
    await looked(clock)
    for number in range(PAGES - 2):
        await state.set(f"page {number}", number)
    await looked(clock)
    await pages(state, PAGES, 2 * PAGES - 2)
    await looked(clock)
    assert state.durable_revision == 0
    await pages(state, 2 * PAGES, 2 * PAGES + 2)
    await looked(clock)
    assert state.durable_revision == state.revision


async def test_a_transaction_is_never_split(state: Manager, clock: ManualClock, memory: MemoryStorage) -> None:
    """A transaction, and a `set_many`, of three times as many bytes are one record each, whenever the flush begins."""
    async with state.transaction() as tx:
        for number in range(3 * PAGES):
            tx.set(f"page {number}", PAGE)
            if number % 100 == 0:
                await looked(clock)
        assert state.durable_revision == 0
    await state.set_many({f"more {number}": PAGE for number in range(3 * PAGES)})
    await looked(clock)
    assert state.durable_revision == state.revision == 2
    journal = memory.places["test"].journal
    assert journal is not None
    assert journal.count(b' R {"') == 1


async def test_without_an_interval_nothing_begins_early(storage: FaultyStorage, clock: ManualClock) -> None:
    """With `flush_interval=None`, only flush() and stop() write."""
    async with running(storage, clock, None) as state:
        await pages(state, 0, 2 * PAGES)
        await looked(clock)
        clock.advance(1000)
        await idle()
        assert storage.calls == ["open"]


async def test_a_storage_that_fails_is_not_asked_more_often(
    state: Manager, storage: FaultyStorage, clock: ManualClock
) -> None:
    """Bulk writes do not shorten the pauses between attempts that fail."""
    storage.fail("commit", times=100, error=UnavailableError("full"))
    for number in range(10):
        await pages(state, number * PAGES, (number + 1) * PAGES)
        await looked(clock)
    assert storage.calls.count("commit") == 3  # and after pauses of 0.1 and 0.2 s
    storage._faults.clear()
    clock.advance(HOUR)
    await until(lambda: state.durable_revision == state.revision)


async def test_nothing_is_looked_at_where_nothing_changes(state: Manager, clock: ManualClock) -> None:
    """The looks end with a commit and with a stop; an idle manager wakes up for its interval alone."""
    await state.set("a", 1)
    await state.flush()
    clock.advance(LOOK_EVERY)
    assert len([timer for _, _, timer in clock._timers if timer.callback is not None]) == 1
    await state.set("b", 1)
    await state.stop()
    assert [timer for _, _, timer in clock._timers if timer.callback is not None] == []


async def test_a_clock_that_raises_fails_no_write(state: Manager, clock: ManualClock) -> None:
    """Where no timer can be had, writes go on, and the flush comes after the interval."""

    def broken(delay: float, callback: object, /) -> Any:
        raise LookupError

    clock.call_later = broken  # type: ignore[method-assign]
    await state.set("a", 1)
    assert await state.get("a") == 1
    del clock.call_later
