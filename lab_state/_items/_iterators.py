"""`Items` and `PlainItems`: the iterators that `items()` returns. `Iterates`: the class with the method `items`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, final, overload

from lab_state._arguments import OnMismatch
from lab_state._handle import Handle
from lab_state._items._steps import Steps
from lab_state.exceptions import ClosedError

T = TypeVar("T")
R = TypeVar("R")


@final
class Items(Handle, AsyncIterator[tuple[str, T]]):
    """An asynchronous iterator over keys and values, in order of keys, all of one moment.

    The iterator returns the state as it is at the first step: the first call of `__anext__`. Later changes have no
    effect on the iterator, and no writer waits for it. The event loop runs about every millisecond, and after each
    value that takes longer. While the iterator is open, values that are replaced or deleted stay in memory, and
    `set` takes longer.

    The iterator is closed after the last key, by `aclose`, and at the end of `async with`. It is also
    closed when it is garbage-collected, for example after a `break` out of `async for`. A closed iterator
    yields nothing. If a task is cancelled in `__anext__`, no key is lost: the next call returns the same pair.

    Each call of `__anext__` can raise the following errors. After a `TypeMismatchError`, the next call continues with
    the next key. The first call on an iterator of a `Reader` can also raise the errors of a read; see `Reader`.

    Raises:
        TypeMismatchError: The value cannot be decoded as the requested type. The message has the key.
        ClosedError: The manager or the reader is not running, or was stopped since the first step.
        RuntimeError: Another task waits for `__anext__` of this iterator.
    """

    _kind = "an iterator"

    __slots__ = ("_steps",)

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __repr__(self) -> str:
        """Return a text that says whether the iterator is new, open or closed."""
        return f"<Items, {self._steps!r}>"

    def __aiter__(self) -> Self:
        """Return the iterator itself."""
        return self

    async def __anext__(self) -> tuple[str, T]:
        """Return the next key and its value; see `Items`."""
        steps = self._steps
        for row in steps.rows:  # the fastest way to take one row
            return row
        if not await steps.step(pause=True):
            raise StopAsyncIteration
        return next(steps.rows)

    async def aclose(self) -> None:
        """Close the iterator, and drop the values that it kept. A second call does nothing."""
        self._steps.close()

    async def __aenter__(self) -> Self:
        """Return the iterator itself. This takes no step."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the iterator; see `aclose`."""
        self._steps.close()


class Run(Protocol):
    """A function that runs a coroutine."""

    def __call__(self, coroutine: Coroutine[Any, Any, R], /) -> R:
        """Wait for the end of the coroutine, and return its result."""
        ...


@final
class PlainItems(Handle, Iterator[tuple[str, T]]):
    """An iterator over keys and values without `await`, in order of keys, all of one moment.

    It has the guarantees and the errors of `Items`, with one exception: if the caller runs on the event loop, the
    event loop does not run between two steps. The iterator is also a context manager. The end of the block closes it.
    """

    _kind = "an iterator"

    __slots__ = ("_pause", "_run", "_steps")

    def __init__(self, steps: Steps, run: Run, *, pause: bool) -> None:
        """Prepare the iterator. No step is taken yet.

        Args:
            steps: The steps.
            run: A function that runs a step.
            pause: Whether a step lets the event loop run. This is False if the caller runs on that loop.
        """
        self._steps = steps
        self._run = run
        self._pause = pause

    def __repr__(self) -> str:
        """Return a text that says whether the iterator is new, open or closed."""
        return f"<PlainItems, {self._steps!r}>"

    def __iter__(self) -> Self:
        """Return the iterator itself."""
        return self

    def __next__(self) -> tuple[str, T]:
        """Return the next key and its value; see `Items`."""
        steps = self._steps
        while True:  # a stop in the thread of the event loop may empty the rows just after a step
            for row in steps.rows:
                return row
            if steps.is_over or not self._run(steps.step(pause=self._pause)):
                raise StopIteration

    def close(self) -> None:
        """Close the iterator, and drop the values that it kept. A second call does nothing."""
        if self._steps.has_view:
            with suppress(ClosedError):  # the manager was stopped just now, and has closed the view
                self._run(_closed(self._steps))
        self._steps.is_over = True

    def __enter__(self) -> Self:
        """Return the iterator itself. This takes no step."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the iterator; see `close`."""
        self.close()


async def _closed(steps: Steps) -> None:
    """Close an iterator on the event loop."""
    steps.close()


class Iterates(Handle):
    """The base of the handles that read, with the call `items`."""

    __slots__ = ()

    @overload
    def items(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: type[T],
        on_mismatch: OnMismatch = ...,
    ) -> Items[T]: ...
    @overload
    def items(
        self,
        prefix: str = ...,
        *,
        after: str | None = ...,
        limit: int | None = ...,
        reverse: bool = ...,
        type: Any = ...,
        on_mismatch: OnMismatch = ...,
    ) -> Items[Any]: ...
    def items(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        limit: int | None = None,
        reverse: bool = False,
        type: Any = Any,
        on_mismatch: OnMismatch = "raise",
    ) -> Items[Any]:
        """Iterate over the keys that start with `prefix` and their values, in order, all of one moment.

        The result is for `async for`. The iterator returns the state as it is at the first step, without later changes,
        and no writer waits for the iterator. The event loop runs about every millisecond, and after each value that
        takes longer. So a program can read a large state and do other work meanwhile. If the `async for` may
        end early, put the iterator into `async with`, which closes it at once.

        While the iterator is open, the old values of keys that change stay in memory, and a
        `set` takes about twice as long. The first step may have to sort all keys of the state; see `keys`.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            after: Begin after this key: above it, or below it with `reverse`. The key need not
                exist.
            limit: The largest number of keys, 1 or more; `None` means all.
            reverse: Whether to begin with the highest key.
            type: The type to decode each value as; see `get`.
            on_mismatch: `"raise"`: a value that is not of the type raises `TypeMismatchError`. `"skip"`: such a value is left out. A
                `limit` does not count it.

        Returns:
            An iterator over pairs of a key and its value. For the errors of its steps, see `Items`. If the
            manager is not running, the first step raises `ClosedError`.

        Raises:
            InvalidKeyError: `after` cannot be a key.
            TypeError: An argument has a wrong type, or `type` cannot be decoded; see `get`.
            ValueError: `limit` is below 1, or `on_mismatch` is unknown.
        """
        return Items(self._steps(prefix, after, limit, type, on_mismatch, reverse=reverse))

    def _steps(
        self, prefix: str, after: str | None, limit: int | None, type_: Any, on_mismatch: OnMismatch, *, reverse: bool
    ) -> Steps:
        """Return the steps of an iterator; see `items`."""
        raise NotImplementedError
