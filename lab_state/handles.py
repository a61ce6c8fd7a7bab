"""The handles that narrow a manager: its namespaces, and what makes the others."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar, final, overload

from lab_state._arguments import check_key
from lab_state._calls import Calls
from lab_state._entries import MISSING
from lab_state._transaction import DraftCore, Transaction
from lab_state._types import check_type, optional
from lab_state._watch import Change, Watcher
from lab_state.blocking import Blocking
from lab_state.entry import Entry

T = TypeVar("T")


class Scope(Calls):
    """The calls, and the handles that narrow them: what a manager and a namespace are."""

    __slots__ = ()

    @overload
    def entry(self, key: str, type: type[T]) -> Entry[T]: ...
    @overload
    def entry(self, key: str, type: type[T], *, default: None) -> Entry[T | None]: ...
    @overload
    def entry(self, key: str, type: type[T], *, default: T) -> Entry[T]: ...
    @overload
    def entry(self, key: str, type: Any, *, default: Any = ...) -> Entry[Any]: ...
    def entry(self, key: str, type: Any, *, default: Any = MISSING) -> Entry[Any]:
        """Return a handle for one key. It may be made before `start()`, and kept.

        Args:
            key: The key.
            type: What its value is; see `get`.
            default: What `get` returns, and `update` starts from, when the key is missing.
                Where it is `None`, the value may be `None`, too.

        Raises:
            InvalidKeyError: The key is out of bounds.
            TypeError: The type is none that can be decoded; see `get`. A class that is
                defined further down in the file cannot be named yet.
        """
        check_key(self._full(key))
        check_type(type)
        return Entry(self, key, optional(type) if default is None else type, default)

    def namespace(self, name: str) -> Namespace:
        """A handle for the keys that begin with `name` and a slash; it may be made before `start()`, and kept.

        Args:
            name: 1 character or more, no slash at its end; namespaces can be nested.

        Raises:
            InvalidKeyError: The name is out of bounds for the beginning of a key.
        """
        return Namespace(self._core, self._nested(name))

    @property
    def blocking(self) -> Blocking:
        """The same calls without `await`, for other threads."""
        return Blocking(self)

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Make several changes as one: all of them or none, in memory and after a crash.

        Inside, call the transaction, without `await`. Leaving makes all its changes at
        once, as one revision; an exception or a cancellation drops them. One is open at
        a time: another one, and writers, wait for it. Readers never wait, and see what
        was before.

        Raises:
            RuntimeError: At entering, and from every call of the manager that writes:
                this task is inside a transaction of the same manager. It would wait
                for itself.
            ClosedError: At entering: the manager is not running. At leaving: it was
                stopped meanwhile, and nothing was changed.
            FencedError: At entering, and at leaving: a newer writer owns the state.
                Nothing was changed.
            StorageError: At leaving, with a `flush_interval` of 0: not durable yet.
        """
        return self._transaction()

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[Transaction]:
        core = self._core
        draft = DraftCore(core)
        await core.acquire(draft)
        try:
            draft.begin()
            yield Transaction(draft, self._prefix)
            revision = draft.merge()
        finally:
            draft.end()
            core.release(draft)
            core.leave(draft)
        if revision is not None:
            await self._written(revision)

    def watch(self, prefix: str = "", *, durable: bool = False) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """Iterate over the keys that change from now on.

        Open it first, then read: what changes after that is told. A reader that is slow
        is told the last change of each key only; with more than 10,000 keys to tell, or
        when more than 10,000 keys were deleted at once, it is told one `resync` instead:
        read again.
        The iteration ends when the manager stops or the block is left, after what was
        left to tell. One task reads it.

        Args:
            prefix: Which keys: those that begin with it.
            durable: Whether to tell changes only when they are durable; those that
                were made, but not durable, before the watch was opened are told too.

        Raises:
            InvalidKeyError: The prefix is not a `str`.
            ClosedError: At entering: the manager is not running.
            RuntimeError: At entering: this is not the event loop of `start()`.
        """
        return self._watch(prefix, durable=durable)

    @asynccontextmanager
    async def _watch(self, prefix: str, *, durable: bool) -> AsyncGenerator[AsyncIterator[Change]]:
        since = 0 if durable else self._core.state.revision
        watcher = Watcher(self._under(prefix), len(self._prefix), since, durable=durable)
        with self._core.watching(watcher):
            yield watcher


@final
class Namespace(Scope):
    """The calls of the manager, for the keys under one prefix, which they leave out."""

    __slots__ = ()

    def __repr__(self) -> str:
        """The name of the state and the prefix."""
        return f"<Namespace {self._prefix!r} of {self._core.name!r}>"
