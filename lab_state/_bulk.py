"""`Bulk`: the turn of a call that changes many keys in steps. A call has the turn while it holds the lock of `Core`.

Other writers wait for the end of the turn, as they wait for a transaction. So each of their changes is
ordered before or after the whole call. `set_nowait` and similar calls cannot wait. Their changes are
ordered before the call; see `Batch.before`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, TypeVar, cast

from lab_state._batch import Batch
from lab_state._core import Core
from lab_state._durability import Durability
from lab_state.exceptions import ClosedError

R = TypeVar("R")


class Bulk:
    """The turn of one call. `Core` treats it as an open transaction; see `OpenTransaction`."""

    def __init__(self, core: Core, batch: Batch) -> None:
        """Prepare the turn. `make` waits for it."""
        self._core = core
        self.batch: Batch = batch

    @property
    def is_held(self) -> bool:
        """Whether this call has the turn."""
        return self._core.transaction is self

    def end(self) -> None:
        """Do nothing. `Core.close` calls this at a stop, and then ends the turn. `check` notices the stop before the next step."""

    def check(self) -> None:
        """Check that the manager was not stopped during the call.

        Raises:
            ClosedError: The manager was stopped. Nothing was changed.
            UnsupportedError: This process is a forked child, and the manager runs in its parent.
        """
        if not self.is_held:
            self._core.check_process()
            raise ClosedError(f"the manager of {self._core.name!r} was stopped during this call: nothing was changed")

    async def make(
        self, durability: Durability, collect: Callable[[Bulk], Coroutine[Any, Any, None]] | None = None
    ) -> int | None:
        """Make the changes of the batch in steps. Return the new revision, or `None` if nothing changed.

        If the caller is cancelled, nothing is changed.

        Args:
            durability: The durability of the manager at the beginning of the call.
            collect: An async function that adds the changes to the batch. It is awaited when this call has the turn.

        Raises:
            ClosedError: The manager was stopped during the call, or is not running. Nothing was changed.
            RuntimeError: The caller is inside a transaction, or on another event loop.
            StorageError: No change can become durable; see `Durability.check_writable`.
        """
        core = self._core
        if core.durability is not durability:
            raise ClosedError(f"the manager of {core.name!r} was stopped during this call: nothing was changed")
        await core.acquire(self)
        try:
            if collect is not None:
                await collect(self)
            await run_in_steps(self.batch.prepare(), self.check)
            durability.check_writable()
            return self.batch.switch()
        finally:
            core.release(self)
            core.leave(self)


async def run_in_steps(steps: Iterator[None], check: Callable[[], object]) -> None:
    """Run all steps. At each `yield` between two steps, let the event loop run, and then call `check`, which may raise an error."""
    for _ in steps:
        await asyncio.sleep(0)
        check()


async def run_whole(steps: Generator[None, None, R]) -> R:
    """Run all steps, and return their result. The event loop runs between two steps.

    If the caller is interrupted, for example by the end of the event loop, run the remaining steps at once.
    """
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return cast("R", stop.value)
        try:
            await asyncio.sleep(0)
        except BaseException:
            for _ in steps:
                pass
            raise
