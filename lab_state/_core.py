"""What a manager and its handles share; and whose turn it is to write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from copy import copy
from typing import Protocol

from lab_state._durability import Durability
from lab_state._metrics import Counters
from lab_state._state import State
from lab_state._watch import Watcher, Watchers
from lab_state.exceptions import ClosedError, LabStateError, UnsupportedError


class OpenTransaction(Protocol):
    """A transaction."""

    @property
    def is_held(self) -> bool:
        """Whether it is open."""
        ...

    def end(self) -> None:
        """Show nothing more."""
        ...


_INSIDE: ContextVar[tuple[OpenTransaction, ...]] = ContextVar("lab_state transactions", default=())
"""The transactions that this task, or the one that it comes from, is inside of."""


class Core:
    """The state and the transaction that a manager and its handles share.

    Attributes:
        name: The name of the state.
        state: The state; a closed, empty one before `start()` and from `stop()` on. A
            call that finds its key there so knows that the manager is running.
        transaction: The transaction that is open: writers wait for it.
        blocked: Whether a writer must call `turn` first: a transaction is open, or no
            change can become durable. Otherwise it need not take the lock, since it
            does not await before it is done.
        counters: What is counted here, and what the states of earlier starts counted.
        has_followup: Whether a write has something to do when it is done: tell those who
            watch, take the key's time away, or wait until it is durable.
        timed: Whether keys may have a time at which they expire.
        is_inherited: Whether this is a forked child, and the manager runs in its parent.
    """

    __slots__ = (
        "_durability",
        "_lock",
        "_released",
        "_watchers",
        "blocked",
        "counters",
        "has_followup",
        "is_inherited",
        "name",
        "state",
        "timed",
        "transaction",
        "write_through",
    )

    def __init__(self, name: str, closed: State) -> None:
        self.counters: Counters = Counters()
        self.name: str = name
        self.state: State = closed
        self.transaction: OpenTransaction | None = None
        self.blocked: bool = False
        self.has_followup: bool = False
        self.timed: bool = False
        self.write_through: bool = False
        self.is_inherited: bool = False
        self._watchers = Watchers(closed)
        self._lock = asyncio.Lock()
        self._durability: Durability | None = None
        self._released: Callable[[], None] = _nothing

    def open(self, state: State, durability: Durability, watchers: Watchers, released: Callable[[], None]) -> None:
        """Let the calls in; `released` is called when a transaction is over."""
        self.state = state
        self._released = released
        self.write_through = durability.write_through
        self._watchers = watchers
        self._lock = asyncio.Lock()
        self._durability = durability
        self.update_followup()
        durability.refused = self._set_blocked
        self._set_blocked()

    def close(self, closed: State) -> Watchers:
        """Keep the calls out; returns the watchers, which still have to be closed."""
        _ = self.durability  # raises unless it is open
        self.counters = self.counted()
        self.state, self._durability = closed, None
        self.write_through = False
        self.update_followup()
        if self.transaction is not None:
            self.transaction.end()
        self.release(self.transaction)  # who waits for a transaction is told that it is over
        self._set_blocked()
        return self._watchers

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call. Runs in a forked child."""
        self.is_inherited = True
        self.counters = self.counted()
        self.state, self._durability = State(), None
        self.write_through = False
        self.update_followup()
        held, self.transaction = self.transaction, None
        if held is not None:
            held.end()
        self._set_blocked()
        self._watchers.disown(self._not_running())

    def check_process(self) -> None:
        """Make sure that the manager does not run in the parent of this process.

        Raises:
            UnsupportedError: It does.
        """
        if self.is_inherited:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
            raise self._not_running()

    def _not_running(self) -> LabStateError:
        if self.is_inherited:  # pragma: no cover -- likewise
            return UnsupportedError(
                f"the manager of {self.name!r} runs in the parent of this forked process: call it there; to read here, "
                "use a reader of its cache; a state of this process needs a Manager of its own, with another name"
            )
        return ClosedError(
            f"the manager of {self.name!r} is not running: use it between start() and stop(), or inside `async with`"
        )

    def counted(self) -> Counters:
        """What was counted up to now, over restarts."""
        total, state = copy(self.counters), self.state
        total.sets += state.stored
        total.deletes += state.deleted
        total.expiries += state.swept
        return total

    def update_followup(self) -> None:
        """Whether a write has something to do when it is done may have changed."""
        self.timed = self.state.expires
        self.has_followup = self.write_through or self.timed or self.state.on_change is not None

    # Watching

    @contextmanager
    def watching(self, watcher: Watcher) -> Generator[Watcher]:
        """Tell a watcher what changes, meanwhile."""
        self.durability.check_loop()
        watchers = self._watchers
        watchers.add(watcher)
        self.update_followup()
        try:
            yield watcher
        finally:
            watchers.remove(watcher)
            watcher.close()
            self.update_followup()

    @property
    def is_open(self) -> bool:
        """Whether the manager is running."""
        return self._durability is not None

    @property
    def durability(self) -> Durability:
        """Return what is durable, and who waits for it.

        Raises:
            ClosedError: The manager is not running.
            UnsupportedError: It runs in the parent of this forked process.
        """
        if self._durability is None:
            raise self._not_running()
        return self._durability

    def check_open(self) -> None:
        """Raise a `ClosedError` unless the manager is running."""
        if self._durability is None:
            _ = self.durability  # which raises it

    # Transactions

    def _set_blocked(self) -> None:
        """Note again whether a writer must call `turn`."""
        self.blocked = self.transaction is not None or (
            self._durability is not None and self._durability.refusal is not None
        )

    async def turn(self) -> None:
        """Wait until no transaction is open. Until its next `await` the caller writes alone.

        Raises:
            RuntimeError: The caller is inside that transaction, and would wait for itself.
            StorageError: No change can become durable; see `Durability.check_writable`.
        """
        self._check_outside()
        durability = self.durability
        durability.check_writable()
        async with self._lock:
            self._check_still(durability)

    async def acquire(self, holder: OpenTransaction) -> None:
        """Let a transaction hold the lock; what it is done with is `release` and `leave`."""
        self._check_outside()
        durability, lock = self.durability, self._lock
        durability.check_loop()
        durability.check_writable()
        await lock.acquire()
        try:
            self._check_still(durability)
        except LabStateError:
            lock.release()
            raise
        self.transaction, self.blocked = holder, True
        _INSIDE.set((*(other for other in _INSIDE.get() if other.is_held), holder))

    def release(self, holder: OpenTransaction | None) -> None:
        """Let go of the lock, if this is who holds it."""
        if holder is not None and self.transaction is holder:
            self.transaction = None
            self._set_blocked()
            with suppress(RuntimeError):  # who waits for it does so on a loop that is closed
                self._lock.release()
            if self.is_open:
                self._released()

    @staticmethod
    def leave(holder: OpenTransaction) -> None:
        """The caller is inside no more. By value: who leaves may not be the task that entered."""
        _INSIDE.set(tuple(other for other in _INSIDE.get() if other is not holder))

    def _check_still(self, durability: Durability) -> None:
        if self._durability is not durability:
            raise ClosedError(f"the manager of {self.name!r} was stopped while this waited for a transaction")
        durability.check_writable()

    def _check_outside(self) -> None:
        if self.transaction is not None and self.transaction in _INSIDE.get():
            raise RuntimeError(
                f"a transaction of {self.name!r} is open here: call the transaction itself, or leave it first"
            )


def _nothing() -> None: ...
