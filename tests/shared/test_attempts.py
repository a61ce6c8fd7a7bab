"""A task of the owner lets a client go first whose attempt to change the same key was refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from owner_parts import PureOwner, change
from owner_running import Owner, owning
from running import idle

from lab_state import FencedError
from lab_state.shared import _owner_flusher
from lab_state.shared._attempts import PATIENCE, Attempts
from lab_state.shared._messages import Refused
from lab_state.testing import FaultyStorage, ManualClock


class Clock:
    now = 1_000

    def __call__(self) -> int:
        return self.now


def test_an_attempt_is_awaited_for_a_while() -> None:
    """It is awaited from the refusal on, until it is made or is late."""
    clock, made = Clock(), list[str]()
    attempts = Attempts(clock)
    attempts.make("a")
    attempts.refuse("a")
    attempts.make("a")  # nothing has to be told
    attempts.on_made = made.append
    attempts.make("a")
    assert (attempts.is_awaited("a"), made) == (False, [])
    attempts.refuse("a")
    clock.now += PATIENCE - 1
    attempts.refuse("b")
    assert (attempts.is_awaited("a"), attempts.is_awaited("b"), attempts.is_awaited("c")) == (True, True, False)
    clock.now += 1
    assert (attempts.is_awaited("a"), attempts.is_awaited("b")) == (False, True)
    attempts.make("b")
    assert (attempts.is_awaited("b"), made) == (False, ["b"])


def test_attempts_that_are_late_are_dropped() -> None:
    """Keys of clients that have given up take no memory."""
    clock = Clock()
    attempts = Attempts(clock)
    for number in range(100):
        attempts.refuse(f"key {number}")
        attempts.refuse("again and again")
        clock.now += PATIENCE // 4
    assert len(attempts) <= 5


def test_which_checks_count() -> None:
    """An attempt has a check of one key, as that of `update` is. A transaction raises an error instead."""
    owner = PureOwner({"a": 1, "b": 2})
    owner.engine.execute(change(1, 10, [], {"a": 2, "b": 3}))
    for keys, prefixes in ((["a", "b"], ()), (["a"], ("b",)), ([], ("a",))):
        assert isinstance(owner.engine.execute(change(1, 10, keys, {"a": 3}, prefixes=prefixes)), Refused)
    assert len(owner.engine.attempts) == 0
    assert isinstance(owner.engine.execute(change(1, 10, ["a"], {"a": 3})), Refused)
    assert owner.engine.attempts.is_awaited("a")
    owner.engine.execute(change(1, 11, ["a"], {"a": 3}))
    assert not owner.engine.attempts.is_awaited("a")


@pytest.fixture
async def owner(storage: FaultyStorage, clock: ManualClock) -> AsyncIterator[Owner]:
    async with owning(storage, clock) as found:
        yield found


def refuse(owner: Owner) -> None:
    """Change a key by a task of the owner, and refuse the check of a client."""
    owner.engine.execute(change(1, 0, [], {"n": 1}))
    assert isinstance(owner.left(change(1, 0, ["n"], {"n": 10})), Refused)


def update(owner: Owner, key: str = "n") -> asyncio.Task[tuple[int, int]]:
    return asyncio.create_task(owner.flusher.run(lambda calls: calls.update(key, lambda n: n + 1, 0), key=key))


async def test_the_client_goes_first(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of the owner that change the same key wait for the next attempt. Those with another key do not.

    If one of the tasks is cancelled meanwhile, its call is made all the same.
    """
    monkeypatch.setattr(_owner_flusher, "PATIENCE", 60_000_000_000)
    owner.engine.attempts._now = lambda: 0  # the attempt is never late
    refuse(owner)
    waiting, other = [update(owner), update(owner)], update(owner, "other")
    assert await other == (1, 2)
    waiting[0].cancel()
    await idle()
    assert not waiting[1].done()
    assert owner.left(change(2, 1, ["n"], {"n": 10})) is None
    assert (await waiting[1])[0] == 12
    assert waiting[0].cancelled()


async def test_an_attempt_that_does_not_come(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task waits for a few milliseconds, also if further attempts are refused meanwhile."""
    monkeypatch.setattr(_owner_flusher, "PATIENCE", 1_000)
    owner.engine.attempts._now = lambda: 0
    refuse(owner)
    assert (await update(owner))[0] == 2


async def test_a_task_that_waits_when_no_change_can_become_durable(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises the error, and changes nothing."""
    monkeypatch.setattr(_owner_flusher, "PATIENCE", 60_000_000_000)
    owner.engine.attempts._now = lambda: 0
    refuse(owner)
    waiting = update(owner)
    await idle()
    error = FencedError("a newer writer")
    owner.flusher.refusal = error
    owner.engine.attempts.make("n")
    with pytest.raises(FencedError, match="nothing was changed"):
        await waiting
    owner.flusher.refusal = None
