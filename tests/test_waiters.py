"""Callers that wait for a revision."""

from __future__ import annotations

import asyncio

from lab_state import UnavailableError
from lab_state._durability import Waiters


async def begin(waiters: Waiters, *revisions: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(waiters.wait(waiters.next, revision)) for revision in revisions]
    await asyncio.sleep(0)
    return tasks


async def test_only_those_whose_revision_is_durable_wake() -> None:
    """The others go on waiting, in the list that they are in."""
    waiters = Waiters()
    first, second = await begin(waiters, 1, 2)
    waiters.start_commit()
    waiters.settle(1)
    await first
    assert not second.done()
    assert [revision for revision, _ in waiters.current] == [2]
    waiters.settle(2)
    await second


async def test_one_that_is_being_cancelled_is_passed_over() -> None:
    """Between the cancellation of a caller and its end, neither success nor failure touches it."""
    for fail in (False, True):
        waiters = Waiters()
        (cancelled,) = await begin(waiters, 1)
        cancelled.cancel()
        if fail:
            waiters.fail(UnavailableError("x"), "lost", everyone=True)
        else:
            waiters.settle(9)
        assert (await asyncio.gather(cancelled, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_a_cancelled_caller_is_forgotten() -> None:
    """Callers that give up do not pile up."""
    waiters = Waiters()
    tasks = await begin(waiters, *range(100))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert waiters.next == []
