"""`Namespace`, and `Scope`, the base of a manager and of a namespace."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from inspect import isawaitable
from typing import Any, TypeVar, final, overload

from lab_state._arguments import check_callable
from lab_state._calls import Calls
from lab_state._core import Core
from lab_state._entries import MISSING
from lab_state._transaction import DraftCore, Transaction
from lab_state._watch import Change, Watcher
from lab_state.blocking import Blocking
from lab_state.entry import Entry, entry_of
from lab_state.exceptions import ConflictError

T = TypeVar("T")
R = TypeVar("R")


class Scope(Calls):
    """The base of a manager and of a namespace: the calls for keys, and the calls that make handles."""

    __slots__ = ()

    _core: Core  # pyright: ignore[reportIncompatibleVariableOverride] -- it is assigned once, in `__init__`

    def __init__(self, core: Core, prefix: str) -> None:
        super().__init__(core, prefix)

    @overload
    def entry(self, key: str, type: type[T]) -> Entry[T]: ...
    @overload
    def entry(self, key: str, type: type[T], *, default: None) -> Entry[T | None]: ...
    @overload
    def entry(self, key: str, type: type[T], *, default: T) -> Entry[T]: ...
    @overload
    def entry(self, key: str, type: Any, *, default: Any = ...) -> Entry[Any]: ...
    def entry(self, key: str, type: Any, *, default: Any = MISSING) -> Entry[Any]:
        """Return a handle for one key.

        The handle can be made before `start()`, and used again after a restart of the manager.

        Args:
            key: The key.
            type: The type of the value; see `get`.
            default: The value that `get`, `pop`, `update` and `incr` use when the key is
                missing. If the default is `None`, the stored value may be `None` too.

        Raises:
            InvalidKeyError: The key is not allowed.
            TypeError: The type cannot be decoded; see `get`. A possible cause: an annotation names
                a class that its module defines later. Then make the entry after this definition.
        """
        return entry_of(self, key, type, default)

    def namespace(self, name: str) -> Namespace:
        """Return a handle for the keys that begin with `name` and a slash.

        The handle can be made before `start()`, and used again after a restart of the manager.
        Namespaces can be nested.

        Args:
            name: The text before the slash: 1 character or more, without a slash at its end.

        Raises:
            InvalidKeyError: The name is empty, ends with a slash, or no key can begin with it.
            TypeError: The name is not a `str`.
        """
        return Namespace(self._core, self._nested(name))

    @property
    def blocking(self) -> Blocking:
        """The calls without `await`, for threads that do not run the event loop of the manager."""
        return Blocking(self)

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Make several changes as one: all of them or none, in memory and after a crash.

        Use it with `async with`. Inside the block, call the methods of the transaction, without
        `await`. At the end of the block all changes of the transaction are made as one change, with
        one revision. If an exception or a cancellation ends the block, the changes are dropped.
        With 1,000 changes or more, the end of the block works in steps, and the event loop runs between two
        steps. All changes are still made in one moment.

        If the state is not shared, only one transaction is open at a time. Other transactions and writers wait for its
        end. Readers never wait. They see the state from before the transaction.

        In a shared state a transaction holds no lock, and delays no writer and no other transaction. It sees the
        state as it was at its beginning. If something that it has read changes before the end of the block, the
        block raises `ConflictError`. `transact` catches this error, and runs the transaction again.

        Raises:
            ConflictError: Something that the transaction has read was changed meanwhile. Only a shared state raises
                this error, from a read in the block or at its end. The transaction changed nothing. Run it again.
            RuntimeError: This task is inside another transaction of the same manager, and would wait for
                itself. Only a state that is not shared raises this, at the beginning, and from a writing
                call of the manager in the block. Use the methods of the open transaction. Or, at the
                beginning: this is not the event loop of `start()`.
            ClosedError: At the beginning: the manager is not running. At the end: the manager
                was stopped meanwhile, and nothing was changed.
            FencedError: At the beginning or at the end: the manager has learned that a newer writer owns the state.
                Nothing was changed.
            UnavailableError: At the beginning or at the end: the flush task has ended; see
                `Status.task_failure`. Nothing was changed.
            StorageError: At the end, with a `flush_interval` of 0: the changes are made in memory,
                but not durable yet. The manager tries again automatically. In a shared state, the owner may
                not have answered: `outcome` of the error says whether the changes were made.
        """
        return self._transaction()

    @asynccontextmanager
    async def _transaction(self, seed: Any = None, *, is_repeated: bool = False) -> AsyncGenerator[Transaction]:
        core = self._core
        if (port := core.port) is not None:
            core.durability.check_loop()
            core.durability.check_writable()
            async with port.transaction(seed, is_repeated=is_repeated) as shared:
                yield Transaction(shared, self._prefix)
            return
        draft = DraftCore(core)
        await core.acquire(draft)
        try:
            draft.begin()
            yield Transaction(draft, self._prefix)
            revision = await draft.conclude()
        finally:
            draft.end()
            core.release(draft)
            core.leave(draft)
        if revision is not None:
            await self._written(revision)

    @overload
    async def transact(self, fn: Callable[[Transaction], Coroutine[Any, Any, R]]) -> R: ...
    @overload
    async def transact(self, fn: Callable[[Transaction], R]) -> R: ...
    async def transact(self, fn: Callable[[Transaction], Any]) -> Any:
        """Call `fn` with a transaction, make the changes of the transaction, and return the result of `fn`.

        The changes are made at the end of `fn`: all of them or none, as `transaction` describes. After that, the call
        returns. In a shared state, another task or process may change a value that `fn` has read. Then the transaction
        changes nothing, and `fn` is called again, with a new transaction. So `fn` should have no other effects. In a
        shared state, `fn` may also read values that are not durable yet. The call then returns when they are durable.
        If the state is not shared, `fn` is called once. If `fn` raises an error, the transaction changes nothing, and the
        call raises that error.

        Args:
            fn: A plain function, or a coroutine function. Its argument is the transaction.

        Raises:
            TypeError: `fn` is not callable.
            RuntimeError: In a state that is not shared: this task is inside a transaction of the same manager, and
                would wait for itself. Or this is not the event loop of `start()`.
            ClosedError: The manager is not running, or was stopped meanwhile. Nothing was changed.
            FencedError: The manager has learned that a newer writer owns the state. Nothing was changed.
            UnavailableError: The flush task has ended; see `Status.task_failure`. Nothing was changed.
            StorageError: With a `flush_interval` of 0: the changes are made in memory, but not durable yet.
                The manager tries again automatically. In a shared state, see `transaction`.
        """
        check_callable("transact", fn)
        seed: Any = None
        is_repeated = True
        while True:
            tx: Transaction | None = None
            try:
                async with self._transaction(seed, is_repeated=is_repeated) as tx:
                    result = await _result_of(fn, tx, is_seeded=seed is not None)
            except ConflictError as error:
                assert tx is not None  # the beginning of a transaction raises no `ConflictError`
                core = tx._core  # noqa: SLF001 -- the handle and its transactions belong together
                found = core.seed
                if not core.has_conflict and not isinstance(error, _NotDurableError):
                    raise  # a transaction that `fn` has opened elsewhere raised the error
                # If an attempt with a seed brings no new seed, `fn` reads more than a seed contains. Then use no further seed.
                is_repeated = is_repeated and (seed is None or found is not None)
                seed = found if is_repeated else None
            else:
                return result

    def watch(self, prefix: str = "", *, durable: bool = False) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """Iterate over the keys that change from now on.

        Use it with `async with`, and iterate over the result. Open the watch first, and then read
        the state. Then no change is missed. A slow task receives only the last change of each key.
        If changes of more than 10,000 keys are pending, the task receives one `resync` instead. It also
        receives a `resync` when a single call deletes all keys of a state with more than 10,000 keys, and when
        a follower of a shared state loads the state again. After a `resync`, read the state again. When
        the manager stops or the block is left, the iteration ends after the pending changes. Only one task may
        iterate over a watch: a second task gets a `RuntimeError`. In a shared state, the changes of all processes are
        reported, when they are durable.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            durable: Whether to report a change only when it is durable. Then a change that was
                made before the watch was opened, and becomes durable after that, is reported too. If that change
                has deleted all keys, the task receives a `resync`.

        Raises:
            TypeError: The prefix is not a `str`.
            ClosedError: At the beginning: the manager is not running.
            RuntimeError: At the beginning: this is not the event loop of `start()`.
        """
        return self._watch(prefix, durable=durable)

    @asynccontextmanager
    async def _watch(self, prefix: str, *, durable: bool) -> AsyncGenerator[AsyncIterator[Change]]:
        if self._core.port is not None:  # a change that a shared state shows is durable
            durable = False
        since = 0 if durable else self._core.state.revision
        watcher = Watcher(self._under(prefix), len(self._prefix), since, durable=durable)
        with self._core.watching(watcher):
            yield watcher


@final
class Namespace(Scope):
    """The calls of the manager for the keys under one prefix. These calls take and return keys without the prefix."""

    __slots__ = ()

    @property
    def prefix(self) -> str:
        """The beginning of the keys in the whole state: `"users/"`, or `"web/sessions/"` if namespaces are nested."""
        return self._prefix

    def __repr__(self) -> str:
        """Return the prefix and the name of the state."""
        return f"<Namespace {self._prefix!r} of {self._core.name!r}>"


class _NotDurableError(ConflictError):
    """The function of a transaction has raised an error. Values that are not durable may be the cause."""


async def _result_of(fn: Callable[[Transaction], Any], tx: Transaction, *, is_seeded: bool) -> Any:
    """Call a plain function or a coroutine function, and return its result.

    Raises:
        _NotDurableError: The transaction has a seed, and the function has raised an error. The caller must not get that
            error, because the values of the seed may not be durable.
    """
    try:
        result = fn(tx)
        return await result if isawaitable(result) else result
    except ConflictError:
        raise
    except Exception:
        if is_seeded:
            raise _NotDurableError from None
        raise
