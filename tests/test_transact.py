"""`transact`, the revision of a transaction, `catch_up` and `wait_revision`, in a state of one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from roles import InRole
from running import idle, running, until

from lab_state import (
    ClosedError,
    ConflictError,
    LabStateError,
    Manager,
    StorageError,
    Transaction,
    UnavailableError,
    WaitTimeoutError,
)
from lab_state.testing import FaultyStorage, ManualClock


@pytest.fixture
async def state(storage: FaultyStorage, clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    """Yield a manager with two accounts, at revision 1."""
    async with running(storage, clock, make=in_role) as manager:
        await manager.set_many({"ann": 100, "bob": 0})
        yield manager


def pay(tx: Transaction) -> int:
    """Move 10 from one account to the other."""
    tx.incr("ann", -10)
    return tx.incr("bob", 10, type=int)


async def test_transact_commits_and_returns_the_result(state: Manager) -> None:
    """The changes of the function are one change, and its result is returned."""
    assert await state.transact(pay) == 10
    assert await state.get_many(["ann", "bob"]) == {"ann": 90, "bob": 10}
    assert state.revision == 2


async def test_transact_takes_a_coroutine_function(state: Manager) -> None:
    """A coroutine function may wait, and its result is returned."""

    async def slow(tx: Transaction) -> str:
        tx.incr("bob")
        await asyncio.sleep(0)
        tx.incr("bob")
        return "paid"

    assert await state.transact(slow) == "paid"
    assert await state.get("bob") == 2


async def test_transact_of_a_namespace_sees_its_keys(state: Manager) -> None:
    """The function is given the transaction of the namespace."""
    users = state.namespace("users")
    await users.transact(lambda tx: tx.set("ann", 1))
    assert await state.get("users/ann") == 1


async def test_a_conflict_of_another_state_is_no_reason_to_run_again(state: Manager) -> None:
    """A `ConflictError` that does not come from this transaction is passed on, and the function is not called again."""
    calls: list[Transaction] = []

    def fails(tx: Transaction) -> None:
        calls.append(tx)
        raise ConflictError("of another state")

    with pytest.raises(ConflictError, match="of another state"):
        await state.transact(fails)
    assert len(calls) == 1


async def test_an_exception_of_the_function_drops_the_changes(state: Manager) -> None:
    """The exception is passed on, nothing is changed, and the function is not called again."""
    calls: list[Transaction] = []

    def fails(tx: Transaction) -> None:
        calls.append(tx)
        tx.set("ann", 0)
        raise LookupError

    with pytest.raises(LookupError):
        await state.transact(fails)
    assert len(calls) == 1
    assert (await state.get("ann"), state.revision) == (100, 1)


@pytest.mark.parametrize("fn", [None, 1, "pay"], ids=repr)
async def test_something_that_cannot_be_called(state: Manager, fn: Any) -> None:
    """An argument that is not a function is a TypeError that names the call."""
    with pytest.raises(TypeError, match=r"^transact\(\) needs a function, not \w+$"):
        await state.transact(fn)
    assert state.revision == 1


async def test_transact_inside_a_transaction_would_wait_for_itself(state: Manager) -> None:
    """`transact` inside of a transaction of the same manager is a RuntimeError."""
    async with state.transaction():
        with pytest.raises(RuntimeError, match="call the transaction itself"):
            await state.transact(pay)


# The revision


async def test_the_revision_of_a_transaction(state: Manager) -> None:
    """After the block, a transaction has the revision of its change; its writes return None."""
    async with state.transaction() as tx:
        assert tx.set("ann", 1) is None  # type: ignore[func-returns-value]
        assert tx.set("ann", 1, ttl=60) is None  # type: ignore[func-returns-value]
        assert tx.set_many({"bob": 2}) is None  # type: ignore[func-returns-value]
        with pytest.raises(RuntimeError, match="has no revision: it is not committed"):
            _ = tx.revision
    assert tx.revision == state.revision == 2


async def test_the_revision_of_a_transaction_that_changed_nothing(state: Manager) -> None:
    """A transaction that changed nothing has the revision that it has read."""
    async with state.transaction() as tx:
        assert tx.get("ann") == 100
    assert tx.revision == 1


async def test_the_revision_of_a_transaction_that_failed(state: Manager) -> None:
    """A transaction whose block raised has no revision."""
    with pytest.raises(LookupError):
        async with state.transaction() as tx:
            tx.set("ann", 1)
            raise LookupError
    with pytest.raises(RuntimeError, match="has no revision"):
        _ = tx.revision


# Roles and waits


async def test_the_role(storage: FaultyStorage, clock: ManualClock) -> None:
    """A manager that runs alone is the owner of its state; one that does not run has no role."""
    manager = Manager("a", storage, clock=clock)
    assert manager.role is None
    async with manager:
        assert manager.role == "owner"
    assert manager.role is None


async def test_one_process_has_nothing_to_catch_up_with(state: Manager) -> None:
    """`catch_up` returns at once if the state has one process, and asks for no flush."""
    await state.catch_up()
    assert state.durable_revision == 0


async def test_a_revision_that_was_reached_needs_no_wait(state: Manager) -> None:
    """`wait_revision` returns at once for a revision that the state has, durable or not."""
    await state.wait_revision(1)
    await state.wait_revision(-5)
    assert state.durable_revision == 0


async def test_a_later_revision_is_awaited(state: Manager) -> None:
    """`wait_revision` waits for a revision that does not exist yet, until it is durable."""
    waiting = asyncio.create_task(state.wait_revision(3))
    await state.set("ann", 1)
    await state.flush()
    assert not waiting.done()
    await state.set("ann", 2)
    await state.flush()
    await waiting


async def test_a_revision_that_does_not_come(state: Manager, clock: ManualClock) -> None:
    """After its timeout, `wait_revision` raises an error that is both an UnavailableError and a TimeoutError."""
    waiting = asyncio.create_task(state.wait_revision(9, timeout=2))
    await idle()
    clock.advance(2)
    with pytest.raises(WaitTimeoutError, match="revision 9 of 'test'"):
        await waiting


@pytest.mark.parametrize(
    ("arguments", "error"), [(("x",), TypeError), ((True,), TypeError), ((1, "x"), TypeError), ((1, -1), ValueError)]
)
async def test_arguments_out_of_bounds(state: Manager, arguments: Any, error: type[Exception]) -> None:
    """A revision is an int, and a timeout a number of seconds from 0 on."""
    with pytest.raises(error):
        await state.wait_revision(*arguments)


async def test_a_stop_ends_the_wait(storage: FaultyStorage, clock: ManualClock) -> None:
    """A wait for a revision ends with an error when the manager stops."""
    async with running(storage, clock) as state:
        waiting = asyncio.create_task(state.wait_revision(9))
        await until(lambda: bool(state._core.durability._waiters.passive))
    with pytest.raises((StorageError, ClosedError)):
        await waiting


# Errors


def test_a_conflict_is_no_error_of_the_storage() -> None:
    """ConflictError means "run it again". It is a LabStateError, and no StorageError."""
    assert issubclass(ConflictError, LabStateError)
    assert not issubclass(ConflictError, StorageError)


def test_the_outcome_of_most_errors_is_none() -> None:
    """An UnavailableError has an outcome only if a call of a shared state raises it."""
    assert UnavailableError("x").outcome is None
