"""Calls whose change depends on the value of one key, in a process that is not the owner.

Theory of operation. Such a call runs a function of the application on the copy. Its change is sent to the
owner with a check: nothing has changed the key since. While the change for a key is under way, other
calls of this process for the same key wait. Then all of them run, one after the other, on one draft, and
share one change. Otherwise the tasks of the owner, which need no check, would starve the other processes.

If the check does not hold, the owner answers with the present value. All calls run again on that value.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from copy import copy as copy_of
from typing import Any, NamedTuple, Protocol, TypeVar

from lab_state._calls import Calls, at_once
from lab_state._core import CallCore, Core
from lab_state._durability import Durability
from lab_state._entries import Absent
from lab_state._state import State
from lab_state._transaction import Draft
from lab_state.exceptions import LabStateError
from lab_state.shared._answers import Ended, Refusal, changes_of
from lab_state.shared._messages import Changes

R = TypeVar("R")


class Sender(Protocol):
    """The port, which sends the changes."""

    async def send_change(self, key: str, since: int, refused_on: int | None, changes: Changes, size: int) -> Ended:
        """Send changes with a check of one key, and return the end of the call; see `OpenCalls.submit`."""
        ...

    async def reach(self, revision: int) -> None:
        """Wait until the copy has a revision."""
        ...


class _BodyCore(CallCore):
    """The core of the calls that run on one draft. None of them waits."""

    __slots__ = ("_durability",)

    def __init__(self, core: Core, durability: Durability, draft: State) -> None:
        super().__init__(core.name, draft, core.counters)
        self._durability = durability

    @property
    def durability(self) -> Durability:
        """The durability of the manager."""
        return self._durability


class _Body(NamedTuple):
    """A call that waits for its turn."""

    prefix: str
    make: Callable[[Calls], Coroutine[Any, Any, Any]]
    may_read: bool
    done: asyncio.Future[Any]


class _Outcome(NamedTuple):
    result: Any
    error: Exception | None


class Bodies:
    """The calls of this process whose change depends on one key, by key.

    Attributes:
        tasks: The tasks that make them.
    """

    def __init__(self, core: Core, durability: Durability, sender: Sender) -> None:
        self._core = core
        self._durability = durability
        self._sender = sender
        self._waiting: dict[str, list[_Body]] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self, key: str, prefix: str, make: Callable[[Calls], Coroutine[Any, Any, R]], *, may_read: bool) -> R:
        """Run a call, and return its result when its change is durable and in the copy; see `Port.run`."""
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        body = _Body(prefix, make, may_read, done)
        if (waiting := self._waiting.get(key)) is not None:
            waiting.append(body)
        else:
            self._waiting[key] = [body]
            task = asyncio.create_task(self._serve(key), name=f"lab_state {self._core.name} update")
            self.tasks.add(task)  # the event loop keeps no reference
            task.add_done_callback(self.tasks.discard)
        return await done

    async def _serve(self, key: str) -> None:
        """Make the changes of one key, until no call for it waits."""
        try:
            while bodies := self._waiting[key]:
                self._waiting[key] = []
                await self._settle(key, bodies)
        finally:
            for body in self._waiting.pop(key):  # if this task was cancelled, with its event loop
                body.done.cancel()

    async def _settle(self, key: str, bodies: list[_Body]) -> None:
        """Run calls until their change is made, and end them."""
        try:
            outcomes = await self._made(key, bodies)
        except LabStateError as error:
            for body in bodies:
                _fail(body.done, copy_of(error))  # an error that is raised gets the traceback of its caller
        except BaseException:
            for body in bodies:
                body.done.cancel()
            raise
        else:
            for body, outcome in zip(bodies, outcomes, strict=True):
                if outcome.error is not None:
                    _fail(body.done, outcome.error)
                elif not body.done.done():
                    body.done.set_result(outcome.result)

    async def _made(self, key: str, bodies: list[_Body]) -> list[_Outcome]:
        refusal: Refusal | None = None
        while True:
            copy = self._durability.state
            if refusal is None:
                base, since, refused_on = copy, copy.revision, None
            else:
                base, since, refused_on = _refused(copy, refusal), refusal.revision, refusal.connection
            draft = Draft(base)
            core = _BodyCore(self._core, self._durability, draft)
            outcomes = [_run(body, core) for body in bodies]
            if (
                refusal is None
                and not draft.changes
                and all(body.may_read and outcome.error is None for body, outcome in zip(bodies, outcomes, strict=True))
            ):
                return outcomes
            changes, size = changes_of(draft.changes, cleared=False)
            ended = await self._sender.send_change(key, since, refused_on, changes, size)
            if not isinstance(ended, Refusal):
                return outcomes
            refusal = ended
            if refusal.values is None:
                await self._sender.reach(refusal.revision)
                refusal = None


def _refused(copy: State, refusal: Refusal) -> State:
    """Return the copy with the values of a refusal."""
    seen = Draft(copy)
    assert refusal.values is not None
    seen.apply(
        {key: to for key, to in refusal.values.items() if not isinstance(to, Absent) or key in copy.entries},
        cleared=False,
    )
    return seen


def _run(body: _Body, core: CallCore) -> _Outcome:
    """Run one call on the draft. A call that raises has changed nothing."""
    try:
        return _Outcome(at_once(body.make(Calls(core, body.prefix))), None)
    except Exception as error:  # noqa: BLE001 -- the caller gets it
        return _Outcome(None, error)


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # marks it as retrieved: a caller that was cancelled will not do that
