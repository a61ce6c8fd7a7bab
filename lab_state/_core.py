"""The object that a manager shares with its handles, and the order in which writers run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from contextvars import ContextVar
from copy import copy
from typing import Any, Literal, Protocol, TypeVar

from lab_state._durability import Durability
from lab_state._entries import Value
from lab_state._metrics import Counters
from lab_state._state import State
from lab_state._watch import Watcher, Watchers
from lab_state.exceptions import ClosedError, LabStateError, UnsupportedError

R = TypeVar("R")


class Port(Protocol):
    """The writing calls of a state that several processes share. They go to the process that owns the state.

    Keys and prefixes include the prefix of the handle, and values are in their stored form. A `ttl` is in
    milliseconds. Each call returns when its change is durable, and in the copy of this process.
    """

    async def set(self, key: str, value: Value, ttl: int | None) -> int: ...
    async def set_many(self, values: Mapping[str, Value], ttl: int | None) -> int: ...
    async def touch(self, key: str, ttl: int | None) -> bool: ...
    async def delete_many(self, keys: Sequence[str]) -> int: ...
    async def delete_all(self, prefix: str) -> int: ...
    async def set_if_absent(self, key: str, value: Value, ttl: int | None) -> bool: ...

    async def incr(
        self,
        key: str,
        delta: float,
        default: float,
        kind: Literal["any", "int", "float"],
        ttl: int | None,
        *,
        prefix: str,
    ) -> int | float:
        """Add to a number, and return the new number.

        Args:
            key: The key.
            delta: The number to add.
            default: The number to start from if the key is missing.
            kind: The name of the type that the stored number and the new number must have.
            ttl: The time to live of a new key.
            prefix: The prefix of the handle on which the call was made. An error names the key without this prefix.
        """
        ...

    async def run(
        self, key: str, prefix: str, body: Callable[[Any], Coroutine[Any, Any, R]], *, may_read: bool = False
    ) -> R:
        """Run a call whose change depends on the value of one key, and return its result.

        Args:
            key: The key.
            prefix: The prefix of the handle on which the call was made.
            body: A function that is given a `Calls`, and makes the call on it. If another process has changed the
                key meanwhile, the function may be called again.
            may_read: Whether the call is a read if the key exists. Then the call needs no owner.
        """
        ...

    def transaction(self, seed: Any = None, *, is_repeated: bool = False) -> AbstractAsyncContextManager[Any]:
        """Open a transaction, as a `DraftCore`. At the end of the block it is committed.

        Args:
            seed: The values that the owner sent when it refused the previous attempt: the `seed` of its `ConflictError`. The
                transaction reads the keys of the seed from it, and can read no other keys.
            is_repeated: Whether the caller repeats the transaction after a conflict, and passes its `seed`.

        Raises:
            ConflictError: A key or a prefix that the transaction has read was changed meanwhile. The transaction
                changed nothing.
        """
        ...

    async def catch_up(self) -> None: ...
    async def wait_revision(self, revision: int, seconds: float) -> None: ...


class OpenTransaction(Protocol):
    """A transaction, or a `Bulk`: a call with many keys. It may have ended."""

    @property
    def is_held(self) -> bool:
        """Whether the transaction is open."""
        ...

    def end(self) -> None:
        """End the transaction, because the manager was stopped. Its changes are dropped."""
        ...


_INSIDE: ContextVar[tuple[OpenTransaction, ...]] = ContextVar("lab_state transactions", default=())
"""The transactions in whose block the present task runs, or in whose block it was started."""


class CallCore:
    """The part of a core that calls use. For example, a manager, a transaction and a `StateView` have one each.

    Attributes:
        name: The name of the state.
        state: The state. The state of a manager is empty before `start()` and after `stop()`. So if
            a call finds a key, the manager is running.
        transaction: The open transaction; `None` if there is none. Writers wait for its end.
        blocked: Whether a writer must call `turn` first, or `State.before_overwrite` if only a view is open. It is set
            while a transaction is open, no change can become durable, or a view of `items()` or `get_all()` is open.
            Otherwise a writer does not need the lock, because it changes the state without an `await`.
        counters: Counts of calls that failed, and the counts of earlier starts.
        has_followup: Whether a write has more to do after it has changed the state: notify
            watchers, drop an expiry or wait for durability.
        timed: Whether any key may expire.
        write_through: Whether a write waits for durability.
        passing: Whether a call without `await` runs now while a `Bulk` holds the lock. The call cannot
            wait, so it writes before the `Bulk` does.
        value_check: A function that checks each value before it is stored. It gets the whole key and the stored form, and
            raises an `InvalidValueError`. `None` if the schema has no types. In a manager with such a function,
            `blocked` is always set.
        port: The object that sends each write to the owner of a shared state; `None` if the state is not
            shared. With a port, `blocked` is always set.
    """

    __slots__ = (
        "blocked",
        "counters",
        "has_followup",
        "name",
        "passing",
        "port",
        "state",
        "timed",
        "transaction",
        "value_check",
        "write_through",
    )

    def __init__(self, name: str, state: State, counters: Counters) -> None:
        """Set the state. At first writers are not blocked, and a write has no follow-up."""
        self.name: str = name
        self.state: State = state
        self.counters: Counters = counters
        self.transaction: OpenTransaction | None = None
        self.blocked: bool = False
        self.has_followup: bool = False
        self.timed: bool = False
        self.write_through: bool = False
        self.passing: bool = False
        self.value_check: Callable[[str, Value], object] | None = None
        self.port: Port | None = None

    @property
    def durability(self) -> Durability:
        """The durability of the running state.

        Raises:
            LabStateError: No state is running. The message has the reason.
        """
        raise NotImplementedError

    def check_open(self) -> None:
        """Raise a `LabStateError` unless calls are allowed."""
        _ = self.durability  # raises an error if calls are not allowed

    @property
    def must_wait(self) -> bool:
        """Whether a writer may have to wait, or no change can become durable."""
        raise NotImplementedError

    async def turn(self) -> None:
        """Wait until the caller may write. Callers call this only if `blocked` is set."""
        raise NotImplementedError


class Core(CallCore):
    """The state and the open transaction that a manager shares with its handles.

    Attributes:
        is_inherited: Whether this process is a forked child, and the manager runs in its parent.
    """

    __slots__ = ("_durability", "_lock", "_released", "_watchers", "is_inherited")

    # Attributes of the base class that are assigned here as well.
    state: State
    counters: Counters
    write_through: bool
    timed: bool
    has_followup: bool
    blocked: bool

    def __init__(self, name: str, closed: State) -> None:
        super().__init__(name, closed, Counters())
        self.is_inherited: bool = False
        self._watchers = Watchers(closed)
        self._lock = asyncio.Lock()
        self._durability: Durability | None = None
        self._released: Callable[[], None] = _nothing

    def open(
        self,
        state: State,
        durability: Durability,
        watchers: Watchers,
        released: Callable[[], None],
        port: Port | None = None,
    ) -> None:
        """Accept calls from now on.

        Args:
            state: The loaded state.
            durability: The durability of the state. This call sets its `refused`.
            watchers: The watches of this start.
            released: A callback for the end of each transaction.
            port: The port of a shared state.
        """
        self.state = state
        self.port = port
        self._released = released
        self.write_through = durability.write_through
        self._watchers = watchers
        self._lock = asyncio.Lock()
        self._durability = durability
        self.update_followup()
        durability.refused = state.on_views = self._set_blocked
        self._set_blocked()

    def close(self, closed: State) -> Watchers:
        """Refuse calls from now on. Return the watchers, which still have to be closed."""
        _ = self.durability  # raises an error unless calls are allowed
        self.counters = self.counted()
        self.state.close_views()
        self.state, self._durability, self.port = closed, None, None
        self.write_through = False
        self.update_followup()
        if self.transaction is not None:
            self.transaction.end()
        self.release(self.transaction)  # tasks that wait for the lock then find the manager closed
        self._set_blocked()
        return self._watchers

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse every call. This runs in a forked child."""
        self.is_inherited = True
        self.counters = self.counted()
        self.state.close_views()
        self.state, self._durability, self.port = State(), None, None
        self.write_through = False
        self.update_followup()
        transaction, self.transaction = self.transaction, None
        if transaction is not None:
            transaction.end()
        self._set_blocked()
        self._watchers.disown(self._not_running())

    def check_process(self) -> None:
        """Check that the manager does not run in the parent of this process.

        Raises:
            UnsupportedError: This process is a forked child, and the manager runs in its parent.
        """
        if self.is_inherited:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
            raise self._not_running()

    def _not_running(self) -> LabStateError:
        if self.is_inherited:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
            return UnsupportedError(
                f"the manager of {self.name!r} runs in the parent of this forked process: call it there; to read here, "
                "use a reader of its cache; a state of this process needs a Manager of its own, with another name"
            )
        return ClosedError(
            f"the manager of {self.name!r} is not running: use it between start() and stop(), or inside `async with`"
        )

    def counted(self) -> Counters:
        """Return the counts of this start and of all earlier ones."""
        total, state = copy(self.counters), self.state
        total.sets += state.stored
        total.deletes += state.deleted
        total.expiries += state.swept
        return total

    def update_followup(self) -> None:
        """Recompute `has_followup` and `timed`."""
        self.timed = self.state.expires
        self.has_followup = self.write_through or self.timed or self.state.on_change is not None

    # Watching

    @contextmanager
    def watching(self, watcher: Watcher) -> Generator[Watcher]:
        """Report changes to a watcher during the block."""
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
        """The durability of the running state.

        Raises:
            ClosedError: The manager is not running.
            UnsupportedError: The manager runs in the parent of this forked process.
        """
        if self._durability is None:
            raise self._not_running()
        return self._durability

    def check_open(self) -> None:
        """Raise a `LabStateError` unless the manager is running; see `durability`."""
        if self._durability is None:  # this repeats `durability`, without the cost of a property
            raise self._not_running()

    # Transactions

    def _set_blocked(self) -> None:
        """Recompute `blocked`."""
        self.blocked = self.must_wait or bool(self.state.views) or self.port is not None or self.value_check is not None

    @property
    def must_wait(self) -> bool:
        """Whether a transaction is open, or no change can become durable."""
        return self.transaction is not None or (self._durability is not None and self._durability.refusal is not None)

    async def turn(self) -> None:
        """Wait until no transaction is open. Until its next `await` the caller writes alone.

        Raises:
            RuntimeError: The caller is inside the open transaction, and would wait for itself.
            ClosedError: The manager is not running, or was stopped during the wait.
            StorageError: No change can become durable; see `Durability.check_writable`.
        """
        self._check_outside()
        durability = self.durability
        durability.check_writable()
        if self.must_wait and not self.passing:
            async with self._lock:
                self._check_still(durability)

    async def acquire(self, transaction: OpenTransaction) -> None:
        """Acquire the lock for a transaction. The caller must call `release` and `leave` later.

        Raises:
            RuntimeError: The caller is inside a transaction, or on another event loop.
            ClosedError: The manager is not running, or was stopped during the wait.
            StorageError: No change can become durable; see `Durability.check_writable`.
        """
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
        self.transaction, self.blocked = transaction, True
        _INSIDE.set((*(other for other in _INSIDE.get() if other.is_held), transaction))

    def release(self, transaction: OpenTransaction | None) -> None:
        """Release the lock, if this transaction holds it."""
        if transaction is not None and self.transaction is transaction:
            self.transaction = None
            self._set_blocked()
            with suppress(RuntimeError):  # a task that waits for the lock may belong to a closed event loop
                self._lock.release()
            if self.is_open:
                self._released()

    @staticmethod
    def leave(transaction: OpenTransaction) -> None:
        """Remove the transaction from the present `contextvars` context. `acquire` may have run in another context."""
        _INSIDE.set(tuple(other for other in _INSIDE.get() if other is not transaction))

    def _check_still(self, durability: Durability) -> None:
        """Check after a wait that the manager was not stopped meanwhile, and that a change can become durable."""
        if self._durability is not durability:
            raise ClosedError(f"the manager of {self.name!r} was stopped while this call waited for a transaction")
        durability.check_writable()

    def _check_outside(self) -> None:
        """Check that the caller is not inside the open transaction. A caller inside it would wait for itself."""
        if self.transaction is not None and self.transaction in _INSIDE.get():
            raise RuntimeError(
                f"a transaction of {self.name!r} is open here: call the transaction itself, or leave it first"
            )


def _nothing() -> None: ...
