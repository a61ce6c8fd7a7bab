"""The calls of a transaction. Its changes are in a draft until they are made."""

from __future__ import annotations

from collections.abc import Callable, Container, Coroutine, Mapping
from typing import Any, TypeVar, final

from lab_state import _batch
from lab_state._bulk import run_in_steps
from lab_state._calls import Calls, at_once
from lab_state._core import CallCore, Core
from lab_state._draft import Draft
from lab_state._durability import Durability
from lab_state._entries import StoredOrGone, Value
from lab_state._periods import Seconds
from lab_state._plain import Plain
from lab_state._state import State
from lab_state._values import encode_value
from lab_state.exceptions import ClosedError, InvalidValueError

R = TypeVar("R")


class DraftCore(CallCore):
    """The part of a transaction that its handles share; see `CallCore`.

    Attributes:
        changes: The changes of the draft; an empty dict after the transaction.
        known: The keys of the state, which are valid and not checked again; empty after the transaction.
        committed: The revision of the changes, or of the state if nothing was changed; `None` before the end of `conclude`.
    """

    __slots__ = ("_core", "_is_over", "changes", "committed", "known")

    # The base class declares these attributes, too. `pyright --verifytypes` needs a declaration in each class that assigns them.
    state: State
    value_check: Callable[[str, Value], object] | None

    def __init__(self, core: Core) -> None:
        super().__init__(core.name, core.state, core.counters)
        self.value_check = core.value_check
        self._core = core
        self.changes: dict[str, StoredOrGone] = {}
        self.known: Container[str] = ()
        self.committed: int | None = None
        self._is_over = False

    @property
    def durability(self) -> Durability:
        """The durability of the manager.

        Raises:
            RuntimeError: The transaction is over.
            ClosedError: The manager is not running.
            UnsupportedError: The manager runs in the parent of this forked process.
        """
        if not self.is_held and self._core.is_open:
            raise RuntimeError(f"this transaction of {self.name!r} is over: begin another one")
        return self._core.durability

    @property
    def has_conflict(self) -> bool:
        """Whether something that was read has changed meanwhile; always False if the state is not shared."""
        return False

    @property
    def seed(self) -> Any:
        """The values with which the next attempt can begin after a conflict; `None` if it begins with the present state."""
        return None

    @property
    def is_held(self) -> bool:
        """Whether the transaction is open."""
        return self._core.transaction is self and not self._is_over

    def begin(self) -> None:
        """Begin a draft over the present state."""
        self._take(Draft(self._core.state))

    def _take(self, draft: Draft) -> None:
        self.state = draft
        self.changes = draft.changes
        self.known = draft.base.entries

    async def conclude(self) -> int | None:
        """Make the changes of the draft, and note their revision in `committed`. Return what `merge` returns, and raise its errors."""
        made = await self.merge()
        self.committed = self._core.state.revision if made is None else made
        return made

    async def merge(self) -> int | None:
        """Make the changes of the draft. Return the new revision, or `None` if nothing changed.

        Many changes are made in steps. If the caller is cancelled meanwhile, nothing is changed.

        Raises:
            ClosedError: The manager was stopped meanwhile; nothing was changed.
            RuntimeError: The caller is on another event loop.
            StorageError: No change can become durable; see `Durability.check_writable`. Or this process is a forked
                child. Nothing was changed.
        """
        self._check_turn()
        draft, durability = self.state, self.durability
        durability.check_loop()
        durability.check_writable()
        assert isinstance(draft, Draft)  # `begin` was called, and `end` was not
        if len(draft.changes) < _batch.MANY:
            return draft.merge()
        batch = draft.batch()
        self.end()  # from now on, other tasks cannot add changes
        await run_in_steps(batch.prepare(), self._check_turn)
        durability.check_writable()
        return batch.switch()

    def _check_turn(self) -> None:
        """Check that the manager has not been stopped since the beginning of the transaction.

        Raises:
            ClosedError: The manager was stopped. Nothing was changed.
            UnsupportedError: This process is a forked child.
        """
        if self._core.transaction is not self:
            self._core.check_process()
            raise ClosedError(
                f"the manager of {self.name!r} was stopped while this transaction was open: nothing was changed"
            )

    def end(self) -> None:
        """Drop the draft. Every later call of the transaction raises an error. A second call does nothing."""
        if isinstance(self.state, Draft):
            self.state.close_views()
        self.state = State()
        self.changes, self.known, self._is_over = {}, (), True


@final
class Transaction(Plain):
    """An open transaction. Its calls need no `await`. The state gets its changes when the block ends without an exception.

    Each call has the guarantees and errors of the manager's call of the same name. It sees the
    changes made in the transaction so far, and never waits. `set` and `set_many` return `None`,
    because the revision is not known before the end of the block; see `revision`.

    The event loop does not run during a call, even if the call returns many keys: `get_all` of a million
    keys takes a second or more. The cost of a call that returns keys in order also grows with the number
    of changes in the transaction. Such a call may have to sort all keys of the state first; see `Manager.keys`.

    Raises:
        RuntimeError: The transaction is over. Each call that reads or writes raises it; `items` does so at the first step.
        ConflictError: In a shared state, the value to read was changed meanwhile; see `Manager.transaction`.
    """

    __slots__ = ("_core", "_prefix")

    _may_wait = False

    def __init__(self, core: DraftCore, prefix: str) -> None:
        super().__init__(Calls(core, prefix))
        self._core = core
        self._prefix = prefix

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        return at_once(coroutine)

    @property
    def revision(self) -> int:
        """The revision of the changes. If nothing was changed, this is the revision of the state at the end of the block.

        Raises:
            RuntimeError: The transaction is open: read the revision after the block. Or the block ended with an
                exception, and nothing was changed.
        """
        if self._core.committed is None:
            raise RuntimeError(
                f"this transaction of {self._core.name!r} has no revision: it is not committed; read it after the block"
            )
        return self._core.committed

    def set(self, key: str, value: object, *, ttl: Seconds | None = None) -> None:
        """Store a value in the transaction; see `Manager.set`."""
        core = self._core
        if ttl is not None or core.value_check is not None:
            self._run(self._calls._put(key, value, ttl))  # noqa: SLF001 -- `Transaction` is the only user of its `_calls`
            return
        # This repeats `Writing.set`, because running its coroutine would take longer than storing the value.
        try:
            stored = encode_value(value)
        except InvalidValueError:
            core.counters.set_errors += 1
            raise
        full = self._prefix + key if key.__class__ is str else self._calls._full(key)  # noqa: SLF001 -- `Transaction` is the only user of these calls
        changes = core.changes
        if full not in changes and full not in core.known:
            self._calls._before_first_change(full)  # noqa: SLF001 -- `Transaction` is the only user of these calls
        changes[full] = stored

    def set_many(self, values: Mapping[str, object], *, ttl: Seconds | None = None) -> None:
        """Store several values in the transaction; see `Manager.set_many`."""
        self._run(self._calls.set_many(values, ttl=ttl))

    def namespace(self, name: str) -> Transaction:
        """Return a handle of this transaction for the keys that start with `name` and a slash; see `Manager.namespace`."""
        return Transaction(self._core, self._calls._nested(name))  # noqa: SLF001 -- `Transaction` is the only user of these calls

    def __repr__(self) -> str:
        """Return the prefix, the name of the state, and whether the transaction is open."""
        prefix = f"{self._prefix!r} of " if self._prefix else "of "
        return f"<Transaction {prefix}{self._core.name!r}, {'open' if self._core.is_held else 'over'}>"

    def __len__(self) -> int:
        """Return the number of keys, with the changes made so far. The cost grows with the number of these changes."""
        return len(self._calls)

    def __contains__(self, key: object) -> bool:
        """Return whether the key exists, with the changes made so far."""
        return key in self._calls
