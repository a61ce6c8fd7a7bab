"""The durable revision of one state, and the callers that wait for it.

Theory of operation. A caller waits for a revision. If the commit under way contains that
revision, the caller waits for this commit. Otherwise it asks for the next commit. So all callers
that ask at the same time share one write (group commit). A passive caller asks for no commit,
and waits until any commit has made the revision durable. Each caller has its own future: if one
caller is cancelled, the write and the other callers continue. `Flusher` makes the commits.
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

E = TypeVar("E", bound=Exception)

Waiter = tuple[int, "asyncio.Future[None]"]


class Waiters:
    """The callers that wait, in three lists.

    Attributes:
        next: The callers that asked for the next commit.
        current: The callers that wait for the commit under way.
        passive: The callers that wait for any commit, and did not ask for one.
    """

    def __init__(self) -> None:
        self.next: list[Waiter] = []
        self.current: list[Waiter] = []
        self.passive: list[Waiter] = []

    async def wait(self, waiters: list[Waiter], revision: int) -> None:
        """Add the caller to a list, and wait for `settle` or `fail`. Raise the error of `fail`. A cancelled caller is removed from the list."""
        future = asyncio.get_running_loop().create_future()
        waiters.append((revision, future))
        try:
            await future
        except asyncio.CancelledError:
            self.forget_cancelled()
            raise

    def start_commit(self) -> None:
        """Move the callers in `next` to `current`, because the commit that they asked for starts now."""
        self.current, self.next = self.current + self.next, []

    def settle(self, durable: int) -> None:
        """End the wait of all callers whose revision is at most `durable`."""
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

    def fail(self, error: LabStateError, note: str, *, all_lists: bool) -> None:
        """Give an error to the callers that wait for the commit under way, or to all callers.

        Args:
            error: The error. Each caller gets a copy, because each `raise` adds a traceback
                to the exception.
            note: A text about the changes, which is appended to the message.
            all_lists: Whether the callers in all three lists get the error. Otherwise only
                the callers in `current` get it.
        """
        for waiters in (self.current, self.next, self.passive) if all_lists else (self.current,):
            for _, future in waiters:
                if not future.done():
                    future.set_exception(copied(error, note))
                    future.exception()  # otherwise asyncio would log the error, if the caller is cancelled now
            waiters.clear()

    def forget_cancelled(self) -> None:
        """Remove the callers that were cancelled."""
        for waiters in (self.next, self.current, self.passive):
            waiters[:] = [waiter for waiter in waiters if not waiter[1].cancelled()]


def copied(error: E, note: str | None = None) -> E:
    """Return a copy of an error, with the note if there is one.

    If the message is the only argument of the error, the note is appended to the message.
    Otherwise the note is added with `add_note`.
    """
    # `copy.copy` is not used: it calls the constructor, and an error of a foreign storage may need other arguments.
    told = error.__class__.__new__(error.__class__)
    told.__dict__.update({name: list(value) if name == "__notes__" else value for name, value in vars(error).items()})
    told.__cause__ = error.__cause__
    if note is None:
        told.args = error.args
    elif len(error.args) == 1:
        told.args = (f"{error} ({note})",)
    else:
        told.args = error.args
        told.add_note(f"({note})")
    return told


class Durability:
    """The durable revision of a loaded state, on one event loop.

    Attributes:
        state: The loaded state.
        durable_revision: Every change up to this revision is durable.
        loop: The event loop of `start()`. After `move`, it is the event loop of `stop()`.
        write_through: Whether each write waits until it is durable, because `flush_interval` is 0.
        refusal: The error that every write raises, because no further change can become durable; `None` if writes are accepted.
        refused: A callback that is called after `refusal` is set.
    """

    def __init__(self, name: str, state: State, clock: Clock, *, unsettled: bool, flush_interval: float | None) -> None:
        """Remember the running event loop. All waits must be made on this loop.

        Args:
            name: The name of the state.
            state: The loaded state.
            clock: The clock of the manager.
            unsettled: Whether some of the loaded changes may not be durable. Then a commit is due.
            flush_interval: The `flush_interval` of `Config`.
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
        self._begun = 0  # the number of commits that were started
        self._wanted = 0  # the number of the last commit that a caller of `confirm_ownership` waits for
        self._under_way: ChangeSet | None = None
        self._wake = asyncio.Event()
        self._due = False  # whether a flush in the background is due
        self._is_closed = False  # whether there will be no further commit
        self.refusal: LabStateError | None = None
        self.refused: Callable[[], object] = _nothing

    @property
    def shown(self) -> State:
        """The state that reads and checkpoints use. In the owner of a shared state, it is the copy, and `state` is the layer."""
        return self.state

    # Waiting

    async def make_durable(self, revision: int) -> None:
        """Wait until `revision` is durable. Ask for a commit, unless the commit under way contains the revision.

        Raises:
            LabStateError: The commit failed, or there will be no further commit.
            RuntimeError: The caller runs on another event loop.
        """
        if self._must_wait(revision):
            taken, waiters = self._under_way, self._waiters
            if taken is not None and revision <= taken.end:
                await waiters.wait(waiters.current, revision)
            else:
                self._wake.set()
                await waiters.wait(waiters.next, revision)

    async def make_latest_durable(self, revision: int) -> None:
        """Wait as `make_durable` does, for a change that the caller has just made. No commit can contain it yet."""
        # This test is cheaper than `check_loop`, which makes a system call in some versions of Python.
        if get_ident() != self._thread or not self.loop.is_running():
            self.check_loop()
        self._wake.set()  # the task will commit, because the caller has checked that writes are accepted
        # This repeats the body of `Waiters.wait`, because a coroutine for each writer takes time.
        future: asyncio.Future[None] = self.loop.create_future()
        self._waiters.next.append((revision, future))
        try:
            await future
        except asyncio.CancelledError:
            self._waiters.forget_cancelled()
            raise

    async def wait_durable(self, revision: int, timeout: float = math.inf) -> None:  # noqa: ASYNC109 -- by the manager's clock
        """Wait until `revision` is durable. Do not ask for a commit.

        Raises:
            WaitTimeoutError: The revision is not durable after `timeout` seconds.
            LabStateError: There will be no further commit.
            RuntimeError: The caller runs on another event loop.
        """
        if not self._must_wait(revision):
            return
        if timeout == math.inf:
            await self._waiters.wait(self._waiters.passive, revision)
            return
        if timeout > 0:
            with suppress(TimeoutError), within(self._clock, timeout):
                await self._waiters.wait(self._waiters.passive, revision)
        if self._must_wait(revision):  # the revision may have become durable at the moment of the timeout
            raise WaitTimeoutError(
                f"revision {revision} of {self._name!r} is not durable after {timeout:g} s: the durable revision is "
                f"{self.durable_revision}; wait again, or see status().last_error"
            )

    async def wait_flushed(self, revision: int) -> None:
        """Wait until `revision` is durable. Ask for a commit, unless `flush_interval` is `None`."""
        await (self.wait_durable if self._only_when_asked else self.make_durable)(revision)

    async def confirm_ownership(self) -> None:
        """Wait for a commit that starts after this call. If it succeeds, this writer still owned the state at that commit.

        The commit is made even if nothing has changed.

        Raises:
            FencedError: Another writer owns the state.
            StorageError: The commit failed, or there will be no further commit.
            RuntimeError: The caller runs on another event loop.
        """
        self._must_wait(-1, even_durable=True)
        self._wanted = self._begun + 1
        self._wake_up()
        await self._confirming.wait(self._confirming.next, self._wanted)

    def _must_wait(self, revision: int, *, even_durable: bool = False) -> bool:
        """Return whether a revision is not durable yet. Raise an error if it will never become durable.

        With `even_durable`, a durable revision counts as not durable.
        """
        self.check_loop()
        if revision <= self._certain_revision and not even_durable:
            return False
        if self._is_closed:
            self._refuse()
        return True

    def check_writable(self) -> None:
        """Check that a change that is made now can become durable.

        Raises:
            FencedError: A newer writer owns the state.
            UnavailableError: The flush task has ended. Only `stop()` can flush.
            LabStateError: This process of a shared state has lost its state.
        """
        if self.refusal is not None:
            raise copied(self.refusal, "nothing was changed")

    def _refuse(self) -> None:
        """Raise an error that says why there will be no further commit."""
        if self.refusal is not None:
            raise copied(self.refusal, "not durable")
        raise UnavailableError(
            f"the flush task of {self._name!r} has ended, because stop() was called: start the manager again"
        )

    def _give_up(self, error: LabStateError) -> None:
        """Give an error to all callers that wait. There will be no further commit, unless `stop` starts the task again."""
        self._is_closed = True
        self._waiters.fail(error, "not durable", all_lists=True)
        self._confirming.fail(error, "not confirmed", all_lists=True)

    def _refuse_from_now_on(self, error: LabStateError) -> None:
        """Refuse every further change. All callers that wait or write get the error."""
        self.refusal = error
        self._give_up(error)
        self.refused()

    def _put_back(self) -> None:
        """Put the changes of the commit under way back to the unflushed ones, if there is a commit."""
        if (taken := self._under_way) is not None:
            self.state.put_back(taken)
            self._under_way = None

    def _wake_up(self) -> None:
        self._due = True
        self._wake.set()

    # The event loop

    def check_loop(self) -> None:
        """Check that the caller runs on the event loop that the manager was started on.

        Raises:
            RuntimeError: The caller runs on another event loop, or on none.
        """
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError(
                f"the manager of {self._name!r} belongs to the event loop that start() ran on; "
                "use it there, or stop it there and start it here (a forked process needs a manager of its own)"
            )

    def move(self) -> None:
        """Use the running event loop for `stop()`, if the event loop of `start()` is closed.

        Raises:
            RuntimeError: The event loop of `start()` is another one, and is not closed.
        """
        if self.loop.is_closed():
            self.loop, self._thread = asyncio.get_running_loop(), get_ident()
            self._put_back()  # if the loop was closed during a commit, the commit has not put back its changes
            # All tasks of the old loop have ended, so no task waits for the event or for a commit.
            self._wake = asyncio.Event()
            self._waiters, self._confirming = Waiters(), Waiters()
        self.check_loop()

    # Numbers

    @property
    def fenced(self) -> bool:
        """Whether a newer writer owns the state."""
        return isinstance(self.refusal, FencedError)

    @property
    def task_failure(self) -> str | None:
        """The reason why the flush task ended before `stop()`.

        `None` if it has not ended before `stop()`, or if the state is fenced.
        """
        return None if self.refusal is None or self.fenced else str(self.refusal)

    @property
    def unflushed_keys(self) -> int:
        """The number of keys with changes that are not durable. Deleting all keys in one call counts as one key.

        A key counts twice if it is in the commit under way, and has changed again since.
        """
        pending = len(self.state.changes) + self.state.cleared
        if (taken := self._under_way) is not None:
            pending += len(taken.changes) + taken.cleared
        return pending

    @property
    def unflushed_age(self) -> float:
        """The age of the oldest change that is not durable, in seconds; 0 if there is none. Loaded changes do not count."""
        if (taken := self._under_way) is not None and taken.end > taken.start:
            return max(0.0, self._clock.monotonic() - taken.since)
        if self.state.revision > self.state.taken:
            return max(0.0, self._clock.monotonic() - self.state.since)
        return 0.0

    @property
    def _unflushed(self) -> bool:
        """Whether there is work for a further commit, after the commit under way."""
        return self._unsettled or self._wanted > self._begun or self.state.revision > self.state.taken

    @property
    def _certain_revision(self) -> int:
        """The durable revision; -1 as long as some of the loaded changes may not be durable."""
        return -1 if self._unsettled else self.durable_revision

    @property
    def _all_durable(self) -> bool:
        return self._certain_revision >= self.state.revision


def _nothing() -> None: ...
