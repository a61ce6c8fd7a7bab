"""What is durable of one state, and who waits for it.

Theory of operation. Callers say up to which revision they wait, and for whom: the commit
under way if it holds all of that, else the next one, which they ask for; or whichever
commit it will be. So all who wait share one write (group commit). Each has a future of
its own: cancelling one touches neither the write nor the others. Who commits is `Flusher`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import TypeVar

from lab_state._clock import Clock, within
from lab_state._entries import ChangeSet
from lab_state._state import State
from lab_state.exceptions import FencedError, LabStateError, UnavailableError, WaitTimeoutError

E = TypeVar("E", bound=LabStateError)

Waiter = tuple[int, "asyncio.Future[None]"]


class Waiters:
    """Callers in three lists.

    Attributes:
        next: Wait for the next commit; they asked for one.
        current: Wait for the commit under way.
        passive: Wait for whichever commit it will be; they asked for nothing.
    """

    def __init__(self) -> None:
        self.next: list[Waiter] = []
        self.current: list[Waiter] = []
        self.passive: list[Waiter] = []

    async def wait(self, waiters: list[Waiter], revision: int) -> None:
        """Wait in one of the lists."""
        future = asyncio.get_running_loop().create_future()
        waiters.append((revision, future))
        try:
            await future
        except asyncio.CancelledError:
            self.forget_cancelled()
            raise

    def start_commit(self) -> None:
        """A commit begins: who waits for the next one waits for this."""
        self.current, self.next = self.current + self.next, []

    def settle(self, durable: int) -> None:
        """Wake all whose revision is durable."""
        for waiters in (self.next, self.current, self.passive):
            if not waiters:
                continue
            rest: list[Waiter] = []
            for revision, future in waiters:
                if revision > durable:
                    rest.append((revision, future))
                elif not future.done():
                    future.set_result(None)
            waiters[:] = rest

    def fail(self, error: LabStateError, note: str, *, everyone: bool) -> None:
        """Wake those of the commit under way with an error, or everyone.

        Args:
            error: The error; each gets a copy, since a raised exception carries the
                traceback of who raised it.
            note: What is to be said of the changes.
            everyone: Whether nobody has anything to wait for any more.
        """
        for waiters in (self.current, self.next, self.passive) if everyone else (self.current,):
            for _, future in waiters:
                if not future.done():
                    future.set_exception(copied(error, note))
                    future.exception()  # a waiter that is cancelled right now will not look
            waiters.clear()

    def forget_cancelled(self) -> None:
        """Nobody waits for these any more."""
        for waiters in (self.next, self.current, self.passive):
            waiters[:] = [waiter for waiter in waiters if not waiter[1].cancelled()]


def copied(error: E, note: str) -> E:
    """The same error once more, whatever its constructor takes, with a word on the changes."""
    told = error.__class__.__new__(error.__class__)
    told.__dict__.update(error.__dict__)
    told.args = (f"{error} ({note})",) if len(error.args) == 1 else error.args
    told.__cause__ = error.__cause__
    return told


class Durability:
    """What is durable, seen from one event loop.

    Attributes:
        state: The state, loaded.
        durable_revision: Everything up to this revision is durable.
        loop: The event loop that everything runs on.
        write_through: Whether a write returns only when it is durable.
        refusal: Why no further change can become durable; `None` while one can.
        refused: Called when `refusal` was set.
    """

    def __init__(self, name: str, state: State, clock: Clock, *, unsettled: bool, flush_interval: float | None) -> None:
        """The running loop is the one that everything else must be called on.

        `unsettled`: what was loaded may not be durable. `flush_interval` is that of `Config`.
        """
        self.state: State = state
        self.durable_revision: int = 0 if unsettled else state.revision
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._name = name
        self._clock = clock
        self._unsettled = unsettled
        self.write_through: bool = flush_interval == 0
        self._only_when_asked = flush_interval is None
        self._waiters = Waiters()
        self._confirming = Waiters()
        self._begun = self._wanted = 0  # commits: how many, and up to which one somebody wants
        self._under_way: ChangeSet | None = None
        self._wake = asyncio.Event()
        self._due = False  # a background flush is
        self._is_closed = False  # nobody commits any more
        self.refusal: LabStateError | None = None
        self.refused: Callable[[], object] = _nothing

    # Waiting

    async def make_durable(self, revision: int) -> None:
        """Ask for a commit, and return when `revision` is durable."""
        if self._must_wait(revision):
            taken, waiters = self._under_way, self._waiters
            if taken is not None and revision <= taken.end:
                await waiters.wait(waiters.current, revision)
            else:
                self._wake.set()
                await waiters.wait(waiters.next, revision)

    async def make_latest_durable(self, revision: int) -> None:
        """`durable`, for a change that the caller has just made: on this event loop, and in no commit yet."""
        if get_ident() != self._thread or not self.loop.is_running():  # `check_loop` may be a system call
            self.check_loop()
        self._wake.set()  # a commit will come: `check_writable`, or what stands for it, came before the change
        # `Waiters.wait`, written out: a coroutine less for each of a hundred writers.
        future: asyncio.Future[None] = self.loop.create_future()
        self._waiters.next.append((revision, future))
        try:
            await future
        except asyncio.CancelledError:
            self._waiters.forget_cancelled()
            raise

    async def wait_durable(self, revision: int, timeout: float = math.inf) -> None:  # noqa: ASYNC109 -- by the manager's clock
        """Wait until `revision` is durable. Ask for no commit.

        Raises:
            WaitTimeoutError: It is not durable after `timeout` seconds.
        """
        if not self._must_wait(revision):
            return
        if timeout == math.inf:
            await self._waiters.wait(self._waiters.passive, revision)
            return
        if timeout > 0:
            with suppress(TimeoutError), within(self._clock, timeout):
                await self._waiters.wait(self._waiters.passive, revision)
        if self._must_wait(revision):  # it may have become durable at the moment of the timeout
            raise WaitTimeoutError(
                f"revision {revision} of {self._name!r} is not durable after {timeout:g} s: the durable revision is "
                f"{self.durable_revision}; wait again, or see status().last_error"
            )

    async def wait_flushed(self, revision: int) -> None:
        """Return when `revision` is durable; asks for a commit where the background makes them anyway."""
        await (self.wait_durable if self._only_when_asked else self.make_durable)(revision)

    async def confirm_ownership(self) -> None:
        """Return when a commit that began after the call has succeeded: nobody else owns the state.

        It is made even if nothing changed.

        Raises:
            FencedError: Somebody does.
            StorageError: The commit failed.
        """
        self._must_wait(-1, even_durable=True)
        self._wanted = self._begun + 1
        self._wake_up()
        await self._confirming.wait(self._confirming.next, self._wanted)

    def _must_wait(self, revision: int, *, even_durable: bool = False) -> bool:
        """Whether a revision is not durable yet; raises if it never will be."""
        self.check_loop()
        if revision <= self._certain_revision and not even_durable:
            return False
        if self._is_closed:
            self._refuse()
        return True

    def check_writable(self) -> None:
        """Make sure that a change that is made now can become durable.

        Raises:
            FencedError: It cannot: a newer writer owns the state.
            UnavailableError: It cannot before `stop()`: the flush task has ended.
        """
        if self.refusal is not None:
            raise copied(self.refusal, "nothing was changed")

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise copied(self.refusal, "not durable")
        raise UnavailableError(f"nobody flushes {self._name!r} any more; stop() does, if it was not called yet")

    def _give_up(self, error: LabStateError) -> None:
        """Nobody has anything to wait for any more."""
        self._is_closed = True
        self._waiters.fail(error, "not durable", everyone=True)
        self._confirming.fail(error, "not confirmed", everyone=True)

    def _refuse_from_now_on(self, error: LabStateError) -> None:
        """Refuse every further change, and tell all callers that wait or write."""
        self.refusal = error
        self._give_up(error)
        self.refused()

    def _put_back(self) -> None:
        """Count the changes of the commit under way as unflushed again, if there is one."""
        if (taken := self._under_way) is not None:
            self.state.put_back(taken)
            self._under_way = None

    def _wake_up(self) -> None:
        self._due = True
        self._wake.set()

    # The event loop

    def check_loop(self) -> None:
        """Whether this is the event loop that the manager was started on.

        Raises:
            RuntimeError: It is another one, or another thread's.
        """
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError(
                f"the manager of {self._name!r} belongs to the event loop that start() ran on; "
                "use it there, or stop it there and start it here (a forked process needs a manager of its own)"
            )

    def move(self) -> None:
        """Let this event loop do the stop, if the one of the start is closed; what ran there has ended.

        Raises:
            RuntimeError: It is not closed.
        """
        if self.loop.is_closed():
            self.loop, self._thread = asyncio.get_running_loop(), get_ident()
            self._put_back()  # closed over it, without a cancellation
            self._wake = asyncio.Event()  # who waited for these has ended
            self._waiters, self._confirming = Waiters(), Waiters()
        self.check_loop()

    # Numbers

    @property
    def fenced(self) -> bool:
        """Whether a newer writer owns the state."""
        return isinstance(self.refusal, FencedError)

    @property
    def task_failure(self) -> str | None:
        """Return how the flush task has ended before `stop`, if it has."""
        return None if self.refusal is None or self.fenced else str(self.refusal)

    @property
    def unflushed_keys(self) -> int:
        """How many keys have changes that are not durable; a cleared state counts as one more."""
        pending = len(self.state.changes) + self.state.cleared
        if (taken := self._under_way) is not None:
            pending += len(taken.changes) + taken.cleared
        return pending

    @property
    def unflushed_age(self) -> float:
        """How old the oldest change is that is not durable, in seconds; 0 when all is durable."""
        if (taken := self._under_way) is not None:
            return max(0.0, self._clock.monotonic() - taken.since)
        if self.state.revision > self.state.taken:
            return max(0.0, self._clock.monotonic() - self.state.since)
        return 0.0

    @property
    def _unflushed(self) -> bool:
        """Whether a commit has anything to do; one under way does not count."""
        return self._unsettled or self._wanted > self._begun or self.state.revision > self.state.taken

    @property
    def _certain_revision(self) -> int:
        """The durable revision, as far as anyone can rely on it."""
        return -1 if self._unsettled else self.durable_revision

    @property
    def _all_durable(self) -> bool:
        return self._certain_revision >= self.state.revision


def _nothing() -> None: ...
