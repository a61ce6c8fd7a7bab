"""Who waits for which revision to be durable. One future each: cancelling one caller touches no other."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from lab_state.exceptions import LabStateError

E = TypeVar("E", bound=LabStateError)

Waiter = tuple[int, "asyncio.Future[None]"]


class Waiters:
    """Callers in three lists.

    Attributes:
        next: Wait for the next commit; they asked for one.
        riding: Wait for the commit under way.
        patient: Wait for whichever commit it will be; they asked for nothing.
    """

    def __init__(self) -> None:
        self.next: list[Waiter] = []
        self.riding: list[Waiter] = []
        self.patient: list[Waiter] = []

    async def wait(self, waiters: list[Waiter], revision: int) -> None:
        """Wait in one of the lists."""
        future = asyncio.get_running_loop().create_future()
        waiters.append((revision, future))
        try:
            await future
        except asyncio.CancelledError:
            self.forget_cancelled()
            raise

    def board(self) -> None:
        """A commit begins: who waits for the next one waits for this."""
        self.riding, self.next = self.riding + self.next, []

    def settle(self, durable: int) -> None:
        """Wake all whose revision is durable."""
        for waiters in (self.next, self.riding, self.patient):
            if not waiters:
                continue
            rest: list[Waiter] = []
            for revision, future in waiters:
                if revision > durable:
                    rest.append((revision, future))
                elif not future.done():
                    future.set_result(None)
            waiters[:] = rest

    def fail(self, error: LabStateError, stay: str, *, everyone: bool) -> None:
        """Wake those of the commit under way with an error, or everyone.

        Args:
            error: The error; each gets a copy, since a raised exception carries the
                traceback of who raised it.
            stay: What is to be said of the changes.
            everyone: Whether nobody has anything to wait for any more.
        """
        for waiters in (self.riding, self.next, self.patient) if everyone else (self.riding,):
            for _, future in waiters:
                if not future.done():
                    future.set_exception(copied(error, stay))
                    future.exception()  # a waiter that is cancelled right now will not look
            waiters.clear()

    def forget_cancelled(self) -> None:
        """Nobody waits for these any more."""
        for waiters in (self.next, self.riding, self.patient):
            waiters[:] = [waiter for waiter in waiters if not waiter[1].cancelled()]


def copied(error: E, stay: str) -> E:
    """The same error once more, whatever its constructor takes, with a word on the changes."""
    told = error.__class__.__new__(error.__class__)
    told.__dict__.update(error.__dict__)
    told.args = (f"{error} ({stay})",) if len(error.args) == 1 else error.args
    told.__cause__ = error.__cause__
    return told
