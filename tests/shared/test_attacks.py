"""Faults that a hostile reader of the shared state has found, each with the events that showed it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from members import apart, bury, crash, cut, manager, member_of, members, owner_of
from running import until

from lab_state import CorruptionError, FencedError, StorageError, UnavailableError
from lab_state.shared import _clients
from lab_state.shared._connection import Connection
from lab_state.shared._copy import SharedCopy
from lab_state.shared._election import Election
from lab_state.storage._claim import Claim
from lab_state.storage._fs_socket import OwnSocket
from lab_state.testing import ManualClock

R = TypeVar("R")


async def test_a_fenced_owner_ends_the_waits_for_a_revision(tmp_path: Path) -> None:
    """In an owner that is fenced, a wait for a revision ends with the error, whether it began before that or after it."""
    clock = ManualClock()
    owner = manager(tmp_path, clock=clock)
    await owner.start()
    await owner.set("a", 1)
    waiting = asyncio.create_task(owner.wait_revision(100))
    (tmp_path / "lab.lock").unlink()
    with pytest.raises(FencedError):
        await owner.set("a", 2)
    with pytest.raises(FencedError):
        await waiting
    with pytest.raises(FencedError):
        await owner.wait_revision(100)
    await owner.wait_revision(1)
    await bury(owner)


async def test_an_owner_whose_task_was_cancelled_ends_the_waits_for_a_revision(tmp_path: Path) -> None:
    """If other code cancels the flush task of an owner, a wait for a revision ends with an error that names `stop()`."""
    async with members(tmp_path, 1) as (owner,):
        flusher = owner_of(owner).flusher
        assert flusher is not None
        waiting = asyncio.create_task(owner.wait_revision(1))
        await asyncio.sleep(0)
        flusher._task.cancel()
        with pytest.raises(UnavailableError, match="call stop"):
            await waiting


@contextmanager
def other_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def run_on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, R]) -> R:
    return asyncio.run_coroutine_threadsafe(work, loop).result(30)


def test_a_call_of_a_closed_loop_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was made before its event loop was closed is not made again by `stop`, if the owner has forgotten the client."""
    owner, one = manager(tmp_path), manager(tmp_path)
    monkeypatch.setattr(Connection, "answers", lambda *_: None)

    async def begin() -> None:
        await one.start()
        calls.append(asyncio.create_task(one.incr("n")))
        await until(lambda: one.get_nowait("n", None) == 1)
        assert not calls[0].done()

    async def forget() -> None:
        cut(owner)
        flusher = owner_of(owner).flusher
        assert flusher is not None
        flusher.engine.forget_gone()
        await owner.set("a", 1)  # its record removes the results of the client
        monkeypatch.undo()
        monkeypatch.setattr(_clients, "FORGOTTEN_AFTER", 1)

    async def counted() -> object:
        return await owner.get("n")

    calls: list[asyncio.Task[float]] = []
    with other_thread() as loop:
        run_on(loop, owner.start())
        closed = asyncio.new_event_loop()
        closed.run_until_complete(begin())
        closed.close()
        monkeypatch.setattr(_clients, "FORGOTTEN_AFTER", 0)
        run_on(loop, forget())
        asyncio.run(one.stop())
        assert run_on(loop, counted()) == 1
        run_on(loop, owner.stop())


async def test_an_owner_that_loads_does_not_know_its_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that was away for a minute does not send its calls again because it has met an owner that was loading."""
    async with members(tmp_path, 2) as (owner, one):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Connection, "answers", lambda *_: None)
            call = asyncio.create_task(one.incr("n"))
            await until(lambda: one.get_nowait("n", None) == 1)
        role, flusher = owner_of(owner), owner_of(owner).flusher
        assert flusher is not None
        async with apart(owner):
            await until(lambda: one.status().owner_pid is None)
            role.server._time = flusher.engine._now = lambda: time.monotonic_ns() + _clients.FORGOTTEN_AFTER
            flusher.engine.forget_gone()
            await owner.set("a", 1)  # its record removes the results of the client
            role.is_settled = False
        await until(lambda: one.status().owner_pid is not None)
        role.is_settled = True
        cut(owner)
        with pytest.raises(UnavailableError, match="forgotten") as caught:
            await call
        assert caught.value.outcome == "unknown"
        assert await owner.get("n") == 1
        assert await one.incr("n") == 2


async def test_calls_of_a_process_that_loads_as_the_next_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process loads as the next owner, its calls wait, as those of other processes do."""
    clock, gate, begun, real = ManualClock(), asyncio.Event(), asyncio.Event(), Claim.load

    async def load(self: Claim, **options: Any) -> Any:
        begun.set()
        await gate.wait()
        return await real(self, **options)

    first = manager(tmp_path)
    await first.start()
    async with members(tmp_path, 1, clock=clock) as (one,):
        monkeypatch.setattr(Claim, "load", load)
        await crash(first)
        call = asyncio.create_task(one.incr("n"))
        while not begun.is_set():
            clock.advance(0.001)  # the lock may still be held when the process tries it first
            await asyncio.sleep(0)
        clock.advance(1.5 * one.config.owner_timeout)
        await asyncio.sleep(0)
        assert not call.done()
        gate.set()
        assert await call == 1
        await bury(first)


async def test_a_new_socket_that_cannot_be_used_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are too many open files just when the socket was made again, the owner accepts connections there a second later."""
    clock = ManualClock()
    async with members(tmp_path, 1, clock=clock) as (owner,):

        def fails(_: OwnSocket) -> OwnSocket:
            raise UnavailableError("too many open files")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(OwnSocket, "dup", fails)
            (tmp_path / "lab.sock").unlink()
            clock.advance(1)
            await until(lambda: not owner_of(owner)._tasks)
        clock.advance(1)
        await until(lambda: not owner_of(owner)._tasks)
        async with asyncio.timeout(5), members(tmp_path, 1) as (late,):
            assert late.role == "follower"


async def test_an_owner_that_loads_an_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the next owner has less than the copy of a process, the files were replaced. Calls of this process change nothing, and say so."""
    gate, real = asyncio.Event(), Election.role

    async def role(self: Election, *, has_copy: bool) -> Any:
        if has_copy:
            await gate.wait()
        return await real(self, has_copy=has_copy)

    first, one, new = manager(tmp_path), manager(tmp_path), manager(tmp_path)
    await first.start()
    await one.start()
    await one.set("a", 1)
    monkeypatch.setattr(Election, "role", role)
    await crash(first)
    await until(lambda: one.status().owner_pid is None)
    for path in tmp_path.glob("lab.j*"):
        path.unlink()
    await new.start()
    gate.set()
    with pytest.raises(CorruptionError, match=r"(?s)revision 1, .* not made"):
        await one.set("a", 2)
    assert await one.get("a") == 1
    assert await new.set("b", 1) == 1
    for each in (one, first):
        await bury(each)
    await new.stop()


async def test_a_copy_that_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a copy that was read cannot be shown, as for lack of memory, a start ends with an error."""

    def fails(*_: object) -> None:
        raise MemoryError

    async with members(tmp_path, 1):
        monkeypatch.setattr(SharedCopy, "load", fails)
        with pytest.raises(StorageError, match="MemoryError"):
            async with asyncio.timeout(5):
                await manager(tmp_path).start()


async def test_a_status_of_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status that another thread asks for is right, also if a connection or the role changes in the middle of it."""
    async with members(tmp_path, 2) as (owner, one):
        clients = owner_of(owner).server._by_client

        class Leaving:
            @property
            def is_admitted(self) -> bool:
                clients.pop("b", None)
                return True

        clients |= {"a": Leaving(), "b": Leaving()}  # type: ignore[dict-item]
        assert owner.status().followers == 3
        del clients["a"]

        member, clock = member_of(one), member_of(one)._clock
        member._lost_at = clock.monotonic()

        def found() -> float:
            member._lost_at = None
            return monotonic()

        monotonic = clock.monotonic
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(clock), "monotonic", lambda _: found())
            assert member.lag >= 0
