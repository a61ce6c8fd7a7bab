"""Callers that wait for a revision."""

from __future__ import annotations

import asyncio

from lab_state import CorruptionError, StorageError, UnavailableError
from lab_state._durability import Waiters, copied


async def begin(waiters: Waiters, *revisions: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(waiters.wait(waiters.next, revision)) for revision in revisions]
    await asyncio.sleep(0)
    return tasks


async def test_only_those_whose_revision_is_durable_wake() -> None:
    """The others go on waiting, in the list that they are in."""
    waiters = Waiters()
    first, second = await begin(waiters, 1, 2)
    waiters.start_commit()
    waiters.settle(1)
    await first
    assert not second.done()
    assert [revision for revision, _ in waiters.current] == [2]
    waiters.settle(2)
    await second


async def test_one_that_is_being_cancelled_is_passed_over() -> None:
    """Between the cancellation of a caller and its end, neither success nor failure touches it."""
    for fail in (False, True):
        waiters = Waiters()
        (cancelled,) = await begin(waiters, 1)
        cancelled.cancel()
        if fail:
            waiters.fail(UnavailableError("x"), "lost", all_lists=True)
        else:
            waiters.settle(9)
        assert (await asyncio.gather(cancelled, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_a_cancelled_caller_is_forgotten() -> None:
    """Callers that give up do not pile up."""
    waiters = Waiters()
    tasks = await begin(waiters, *range(100))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert waiters.next == []


class StatusError(StorageError):
    def __init__(self, *, status: int) -> None:
        super().__init__("no answer")
        self.status = status


def test_a_copy_of_an_error_says_what_became_of_the_changes() -> None:
    """Whatever the constructor takes, the copy has the note, and the error itself stays as it was."""
    error = StatusError(status=503)
    copy = copied(error, "not durable")
    assert (str(copy), copy.status, str(error)) == ("no answer (not durable)", 503, "no answer")


def test_an_error_with_several_arguments_gets_a_note() -> None:
    """The message of such an error is made from its arguments, so the note is one of the exception."""
    error = CorruptionError("a.json", 3, "restore it")
    error.add_note("of the application")
    copy = copied(error, "not durable")
    assert (str(copy), copy.__notes__) == (str(error), ["of the application", "(not durable)"])
    assert error.__notes__ == ["of the application"]
