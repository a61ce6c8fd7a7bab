"""The callers that wait until the copy of their process has a revision."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import NamedTuple

from lab_state._clock import Clock, within
from lab_state._durability import copied
from lab_state._state import State
from lab_state.exceptions import LabStateError, UnavailableError, WaitTimeoutError


class _Question(NamedTuple):
    """A caller of `catch_up` that waits for the durable revision of the owner."""

    made: float
    done: asyncio.Future[int]


class Arrivals:
    """The callers that wait for the copy of one process."""

    def __init__(self, copy: State, name: str, clock: Clock) -> None:
        """Begin without an owner to ask.

        Args:
            copy: The copy.
            name: The name of the state.
            clock: The clock of the manager.
        """
        self._copy = copy
        self._name = name
        self._clock = clock
        self._ask: Callable[[int], object] | None = None
        self._token = 0
        self._questions: dict[int, _Question] = {}
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._error: LabStateError | None = None  # the reason why the copy will reach no further revision

    async def catch_up(self, now: float) -> None:
        """Ask the owner for its durable revision, and wait until the copy has this revision. If there is no owner, wait for the next one.

        Args:
            now: The time of the clock, in seconds.

        Raises:
            LabStateError: `give_up` or `close` has ended the wait.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._token += 1
        token = self._token
        self._questions[token] = _Question(now, done)
        if self._ask is not None:
            self._ask(token)
        try:
            revision = await done
        finally:
            self._questions.pop(token, None)
        await self._reach(revision)

    async def wait(self, revision: int, seconds: float) -> None:
        """Wait until the copy has a revision, for at most `seconds`, which may be infinite.

        Raises:
            WaitTimeoutError: The revision was not reached in time.
            LabStateError: `close` was called, and the copy does not have the revision.
        """
        try:
            if seconds == math.inf:
                await self._reach(revision)
            else:
                with within(self._clock, seconds):
                    await self._reach(revision)
        except TimeoutError:
            if self._copy.revision < revision:  # the revision may have come at the moment of the timeout
                raise WaitTimeoutError(
                    f"revision {revision} of {self._name!r} was not reached after {seconds:g} s: this process has "
                    f"revision {self._copy.revision}; wait again, or use the present state"
                ) from None

    async def _reach(self, revision: int) -> None:
        if self._copy.revision >= revision:
            return
        if self._error is not None:
            raise copied(self._error)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[done] = revision
        try:
            await done
        finally:
            self._waiting.pop(done, None)

    def follow(self, ask: Callable[[int], object] | None) -> None:
        """Ask a new owner all questions that wait.

        Args:
            ask: A function that sends a question with a token to the owner. `None` if there is no owner: the questions
                then wait for the next one.
        """
        self._ask = ask
        if ask is not None:
            for token in list(self._questions):
                ask(token)

    def reply(self, token: int, revision: int) -> None:
        """Note the answer to a question."""
        question = self._questions.pop(token, None)
        if question is not None and not question.done.done():
            question.done.set_result(revision)

    def have_all(self) -> None:
        """Answer all questions, because this process is the owner, and its copy has every durable change."""
        for token in list(self._questions):
            self.reply(token, self._copy.revision)

    def settle(self) -> None:
        """Wake up the callers whose revision the copy has reached."""
        if not self._waiting:
            return
        reached = self._copy.revision
        for done in [done for done, revision in self._waiting.items() if revision <= reached]:
            del self._waiting[done]
            if not done.done():
                done.set_result(None)

    def give_up(self, is_due: Callable[[float], bool], why: str) -> None:
        """End the questions that were not answered in time, with an `UnavailableError`.

        Args:
            is_due: A function that returns whether the wait of a call has to end. Its argument is the time of the call,
                in seconds of the clock.
            why: The reason, for the message.
        """
        for token, question in list(self._questions.items()):
            if is_due(question.made):
                del self._questions[token]
                _fail(question.done, UnavailableError(f"catch_up() of {self._name!r} had no answer, because {why}"))

    def close(self, error: LabStateError) -> None:
        """End all waits with an error, because the copy of this process will reach no further revision.

        A later `wait` for a revision that the copy does not have raises the error, too. After this, `catch_up` must not be called.
        """
        self._error = error
        for question in self._questions.values():
            _fail(question.done, copied(error))
        for done in self._waiting:
            _fail(done, copied(error))
        self._questions, self._waiting = {}, {}


def _fail(done: asyncio.Future[int] | asyncio.Future[None], error: LabStateError) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # marks the error as retrieved, because a cancelled caller does not retrieve it
