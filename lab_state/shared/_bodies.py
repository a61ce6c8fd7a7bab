"""Calls whose change depends on the value of one key, in a process that is not the owner.

Theory of operation. Such a call runs a function of the application on the copy. Its change is sent to the
owner with the check that the key has not changed since. While the change for a key is under way, other
calls of this process for the same key wait. Then all waiting calls run, one after the other, on one draft, and
share one change. If each call were sent alone, the tasks of the owner, which need no check, would starve the
other processes.

If the check does not hold, the owner answers with the present value. All calls run again on that value. If the
value is too large for an answer, the calls wait until the copy has all changes of the owner. Then they run again
on the copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from lab_state._calls import Calls, at_once
from lab_state._core import CallCore, Core
from lab_state._draft import Draft
from lab_state._durability import Durability, copied
from lab_state._state import State
from lab_state.exceptions import StorageError, UnavailableError
from lab_state.shared._answers import Ended, Refusal, changes_of
from lab_state.shared._messages import Changes
from lab_state.shared._open_calls import Outcome
from lab_state.shared._optimistic import refused

R = TypeVar("R")
Make = Callable[[Calls], Coroutine[Any, Any, R]]

NOT_READ: Final = object()
"""The result of `Bodies.read` for a call that the owner must make."""


class ReadAt(NamedTuple):
    """The revision of a check.

    Attributes:
        since: The revision at which the key was read.
        refused_on: The number of the connection, if the revision comes from a refusal; `None` if it comes from the
            copy. See `OpenCalls.submit`.
    """

    since: int
    refused_on: int | None


class Sender(Protocol):
    """The port, which sends the changes."""

    def check_open(self) -> None:
        """Raise an error if no call can be made now."""
        ...

    def spawn(self, work: Coroutine[Any, Any, R], what: str) -> asyncio.Task[R]:
        """Start a task, and keep a reference to it."""
        ...

    async def send_change(self, key: str, at: ReadAt, changes: Changes, size: int, made: float) -> Ended:
        """Send changes with a check of one key, and return the end of the call.

        Args:
            key: The key.
            at: The revision at which the key was read.
            changes: The changes.
            size: An upper bound of the size of the changes, in bytes.
            made: The time of the call, in seconds of the clock.
        """
        ...

    async def see_all(self, made: float) -> None:
        """Wait until the copy has all changes that the owner has made so far."""
        ...


class _BodyCore(CallCore):
    """The core of the calls that run on one draft. None of these calls waits."""

    __slots__ = ("_durability",)

    def __init__(self, core: Core, durability: Durability, draft: State) -> None:
        super().__init__(core.name, draft, core.counters)
        self.value_check = core.value_check
        self._durability = durability

    @property
    def durability(self) -> Durability:
        """The durability of the manager."""
        return self._durability


class _Body(NamedTuple):
    """A call, and the future of its caller."""

    prefix: str
    make: Make[Any]
    made: float
    done: asyncio.Future[Any]


class _Outcome(NamedTuple):
    """The result or the error of a call that ran on a draft. The error is `None` if the call returned."""

    body: _Body
    result: Any
    error: Exception | None


class _Turn:
    """The calls for one key: the running calls, whose change is under way, and the waiting calls."""

    __slots__ = ("running", "waiting")

    def __init__(self) -> None:
        self.running: list[_Body] = []
        self.waiting: list[_Body] = []


class Bodies:
    """The calls of this process whose change depends on one key, by key."""

    def __init__(self, core: Core, durability: Durability, sender: Sender) -> None:
        self._core = core
        self._durability = durability
        self._sender = sender
        self._turns: dict[str, _Turn] = {}

    def read(self, key: str, prefix: str, make: Make[R]) -> R | object:
        """Run a call on the copy, and return its result. Return `NOT_READ` if the key is missing, or if the call makes a change."""
        copy = self._durability.state
        if not copy.has(key):
            return NOT_READ
        draft = Draft(copy)
        result = at_once(make(Calls(_BodyCore(self._core, self._durability, draft), prefix)))
        return NOT_READ if draft.changes else result  # the key may have expired since `has`

    async def run(self, key: str, prefix: str, make: Make[R], made: float) -> R:
        """Run a call, and return its result when its change is durable and in the copy; see `Port.run`."""
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        turn = self._turns.get(key)
        is_first = turn is None
        if turn is None:
            turn = self._turns[key] = _Turn()
        turn.waiting.append(_Body(prefix, make, made, done))
        if is_first:
            task = self._sender.spawn(self._serve(key, turn), "update")
            task.add_done_callback(partial(self._served, key, turn))
        return await done

    async def _serve(self, key: str, turn: _Turn) -> None:
        """Make the changes of one key, until no call for it waits."""
        while turn.waiting:
            turn.running, turn.waiting = turn.waiting, []
            try:
                outcomes = await self._made(key, turn.running)
            except Exception as error:  # noqa: BLE001 -- the callers get it
                for body in turn.running:
                    _fail(body.done, copied(error))
            else:
                for body, result, problem in outcomes:
                    if problem is not None:
                        _fail(body.done, problem)
                    elif not body.done.done():
                        body.done.set_result(result)
            turn.running = []
        del self._turns[key]

    def _served(self, key: str, turn: _Turn, _: asyncio.Task[None]) -> None:
        """Note the end of the task of a turn. If other code has cancelled the task, end the calls that are left with an error."""
        if self._turns.get(key) is turn:
            del self._turns[key]
        ends: dict[Outcome, list[_Body]] = {"unknown": turn.running, "not made": turn.waiting}
        for outcome, bodies in ends.items():
            how = "not made" if outcome == "not made" else "made once, or not at all"
            for body in bodies:
                error = UnavailableError(
                    f"other code has cancelled a task of {self._core.name!r}, which this call needs: the call was {how}"
                )
                error.outcome = outcome
                _fail(body.done, error)

    async def _made(self, key: str, bodies: list[_Body]) -> list[_Outcome]:
        """Run calls until the owner has made their change. Return their results and errors."""
        made = min(body.made for body in bodies)
        refusal: Refusal | None = None
        while True:
            self._sender.check_open()  # after a stop, the copy is empty, so the calls would find no key
            copy = self._durability.state
            if refusal is None:
                draft, at = Draft(copy), ReadAt(copy.revision, None)
            else:
                draft, at = Draft(refused(copy, refusal)), ReadAt(refusal.revision, refusal.connection)
            core = _BodyCore(self._core, self._durability, draft)
            outcomes = [outcome for body in bodies if (outcome := _run(body, core)) is not None]
            if not outcomes:
                return []
            bodies = [outcome.body for outcome in outcomes]
            changes, size = changes_of(draft.changes, cleared=False)
            ended = await self._sender.send_change(key, at, changes, size, made)
            if not isinstance(ended, Refusal):
                return outcomes
            refusal = ended
            if refusal.values is None:  # the values were too large for the answer
                await wait_for_others(self._sender.see_all(made), self._core.name)
                refusal = None


async def wait_for_others(see_all: Awaitable[None], name: str) -> None:
    """Wait for `see_all` after a refusal. If `see_all` fails, the call that was refused is not made.

    Args:
        see_all: The wait for the changes of other processes, which may not be durable yet.
        name: The name of the state.

    Raises:
        UnavailableError: `see_all` raised a `StorageError`, such as that of a commit that failed. The outcome is "not made".
        LabStateError: `see_all` raised this error, such as a `ClosedError`.
    """
    try:
        await see_all
    except StorageError as error:
        if getattr(error, "outcome", None) is not None:
            raise
        told = UnavailableError(f"a call of {name!r} was not made: a change before it failed: {error}")
        told.outcome = "not made"
        raise told from error


def _run(body: _Body, core: CallCore) -> _Outcome | None:
    """Run one call on the draft. A call that raises an error has changed nothing.

    If the call is interrupted, for example by Ctrl-C, its caller gets the interrupt at once. Then return `None`.
    """
    try:
        return _Outcome(body, at_once(body.make(Calls(core, body.prefix))), None)
    except Exception as error:  # noqa: BLE001 -- the caller gets it
        return _Outcome(body, None, error)
    except BaseException as interrupt:  # noqa: BLE001 -- the caller gets it; raised here, it would end the task of all callers
        _fail(body.done, interrupt)
        return None


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # marks the error as retrieved, because a cancelled caller does not retrieve it
