"""The callers that wait until their process has a revision."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from running import idle

from lab_state import ClosedError, UnavailableError, WaitTimeoutError
from lab_state._state import State
from lab_state.shared._arrivals import Arrivals
from lab_state.testing import ManualClock


class Copy:
    """A copy that gets revisions one by one, and the callers that wait for it."""

    def __init__(self, clock: ManualClock) -> None:
        self.state = State()
        self.arrivals = Arrivals(self.state, "test", clock)

    def get(self, revision: int) -> None:
        self.state.skip_to(revision)
        self.arrivals.settle()


@pytest.fixture
def copy(clock: ManualClock) -> Copy:
    return Copy(clock)


async def begun(work: Any) -> asyncio.Task[Any]:
    task = asyncio.create_task(work)
    await idle()
    return task


async def test_each_caller_wakes_at_its_revision(copy: Copy) -> None:
    """A later revision wakes it, too. A revision that is there needs no wait."""
    waiting = [await begun(copy.arrivals.wait(revision, math.inf)) for revision in (0, 3, 1, 2)]
    assert [task.done() for task in waiting] == [True, False, False, False]
    copy.get(2)
    await idle()
    assert [task.done() for task in waiting] == [True, False, True, True]
    copy.get(9)
    await asyncio.gather(*waiting)
    copy.arrivals.settle()


async def test_a_wait_has_a_time_limit(copy: Copy, clock: ManualClock) -> None:
    """After it, a caller gets an error that says what is there. Nothing of the wait is left."""
    waiting = await begun(copy.arrivals.wait(5, 2.5))
    copy.get(4)
    clock.advance(2.5)
    with pytest.raises(
        WaitTimeoutError, match=r"revision 5 of .test. was not reached after 2\.5 s: .* has revision 4; "
    ):
        await waiting
    assert copy.arrivals._waiting == {}


async def test_a_revision_that_comes_at_the_moment_of_the_timeout(copy: Copy, clock: ManualClock) -> None:
    """It was reached, so the call returns."""
    waiting = await begun(copy.arrivals.wait(5, 2.5))
    clock.advance(2.5)
    copy.get(5)
    await waiting


async def test_a_cancelled_wait_leaves_nothing(copy: Copy, clock: ManualClock) -> None:
    """Neither a wait for a revision, nor a question, which the owner may still answer."""
    asked: list[int] = []
    copy.arrivals.follow(asked.append)
    waiting = [await begun(copy.arrivals.wait(5, math.inf)), await begun(copy.arrivals.catch_up(clock.monotonic()))]
    for task in waiting:
        task.cancel()
    copy.get(5)  # in the step of the cancellation
    await asyncio.wait(waiting)
    assert (copy.arrivals._waiting, copy.arrivals._questions) == ({}, {})
    (token,) = asked
    copy.arrivals.reply(token, 5)


async def test_a_question_that_is_answered_in_the_step_of_its_cancellation(copy: Copy, clock: ManualClock) -> None:
    """The answer has no caller."""
    asked: list[int] = []
    copy.arrivals.follow(asked.append)
    waiting = await begun(copy.arrivals.catch_up(clock.monotonic()))
    waiting.cancel()
    copy.arrivals.reply(asked[0], 0)
    copy.arrivals.give_up(lambda _: True, "of a test")
    await asyncio.wait([waiting])
    assert waiting.cancelled()


async def test_a_question_waits_for_an_owner(copy: Copy, clock: ManualClock) -> None:
    """Each owner is asked again. The caller waits until the copy has the revision of the answer."""
    waiting = await begun(copy.arrivals.catch_up(clock.monotonic()))
    asked: list[int] = []
    copy.arrivals.follow(asked.append)
    copy.arrivals.follow(None)
    copy.arrivals.follow(asked.append)
    assert asked == [1, 1]
    copy.arrivals.reply(1, 7)
    await idle()
    assert not waiting.done()
    copy.get(7)
    await waiting


async def test_a_process_that_becomes_the_owner_has_everything(copy: Copy, clock: ManualClock) -> None:
    """All questions are answered."""
    waiting = [await begun(copy.arrivals.catch_up(clock.monotonic())) for _ in range(2)]
    copy.arrivals.have_all()
    await asyncio.gather(*waiting)


async def test_questions_are_given_up(copy: Copy, clock: ManualClock) -> None:
    """Those that have waited too long. Each caller gets an error of its own."""
    old = [await begun(copy.arrivals.catch_up(1.0)) for _ in range(2)]
    new = await begun(copy.arrivals.catch_up(2.0))
    copy.arrivals.give_up(lambda made: made < 2, "no process owns the state")
    found = await asyncio.gather(*old, return_exceptions=True)
    assert [str(error) for error in found] == [
        "catch_up() of 'test' had no answer, because no process owns the state"
    ] * 2
    assert all(isinstance(error, UnavailableError) and error.outcome is None for error in found)
    assert found[0] is not found[1]
    assert not new.done()
    copy.arrivals.have_all()
    await new


async def test_the_end_wakes_all(copy: Copy, clock: ManualClock) -> None:
    """Each caller gets an error of its own. One that was cancelled gets none."""
    waiting = [
        await begun(copy.arrivals.catch_up(clock.monotonic())),
        await begun(copy.arrivals.wait(5, math.inf)),
        await begun(copy.arrivals.wait(5, 3)),
        await begun(copy.arrivals.wait(5, math.inf)),
    ]
    waiting[-1].cancel()
    copy.arrivals.close(ClosedError("stopped"))
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(error) for error in found] == ["stopped"] * 3 + [""]
    assert len({id(error) for error in found}) == 4
