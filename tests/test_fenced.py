"""A manager that knows that a newer writer owns the state: it refuses every write, and says so once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from running import flusher_of, idle, running, until

from lab_state import (
    Config,
    FencedError,
    Manager,
    MemoryStorage,
    UnavailableError,
)
from lab_state.integrations import _lifespan
from lab_state.integrations.key_value import LabStateStore
from lab_state.testing import FaultyStorage, ManualClock

BEFORE = {"a": 1, "b": 2, "n": 3, "users/ann": "Ann", "unflushed": 1}

Write = Callable[[Manager], Awaitable[object]]


async def transaction(state: Manager) -> None:
    async with state.transaction() as tx:
        tx.set("a", 2)


async def empty_transaction(state: Manager) -> None:
    async with state.namespace("users").transaction():
        pass


WRITES: dict[str, Write] = {
    "set": lambda state: state.set("a", 2),
    "set a new key": lambda state: state.set("new", 2),
    "set an unflushed key": lambda state: state.set("unflushed", 2),
    "set a dict": lambda state: state.set("unflushed", {"a": 1}),
    "set with ttl": lambda state: state.set("a", 2, ttl=10),
    "set_many": lambda state: state.set_many({"a": 2, "b": 3}),
    "set_many with ttl": lambda state: state.set_many({"a": 2}, ttl=10),
    "set_many of nothing": lambda state: state.set_many({}),
    "touch": lambda state: state.touch("a", 10),
    "touch what is not there": lambda state: state.touch("nope", 10),
    "delete": lambda state: state.delete("a"),
    "delete what is not there": lambda state: state.delete("nope"),
    "delete_many": lambda state: state.delete_many(["a", "b"]),
    "delete_all": lambda state: state.delete_all(),
    "delete_all of a prefix": lambda state: state.delete_all("users/"),
    "pop": lambda state: state.pop("a"),
    "pop what is not there": lambda state: state.pop("nope", None),
    "update": lambda state: state.update("n", lambda n: n + 1),
    "incr": lambda state: state.incr("n"),
    "incr of a new key": lambda state: state.incr("new", ttl=10),
    "get_or_set": lambda state: state.get_or_set("new", lambda: 1),
    "set_if_absent": lambda state: state.set_if_absent("new", 1),
    "transaction": transaction,
    "transaction without a change": empty_transaction,
    "namespace": lambda state: state.namespace("users").set("ann", "other"),
    "namespace delete_all": lambda state: state.namespace("users").delete_all(),
    "entry": lambda state: state.entry("n", int).set(4),
    "entry update": lambda state: state.entry("n", int).update(lambda n: n + 1),
    "entry delete": lambda state: state.entry("n", int).delete(),
    "entry incr": lambda state: state.entry("n", int).incr(),
    "entry pop": lambda state: state.entry("n", int).pop(),
    "entry set_if_absent": lambda state: state.entry("new", int).set_if_absent(4),
    "entry touch": lambda state: state.entry("n", int).touch(10),
    "blocking": lambda state: asyncio.to_thread(state.blocking.set, "a", 2),
    "blocking pop": lambda state: asyncio.to_thread(state.blocking.pop, "a"),
    "key-value store": lambda state: LabStateStore(state.namespace("users")).put("k", {"a": 1}),
    "key-value store delete": lambda state: LabStateStore(state.namespace("users")).delete("k"),
}


async def fence(state: Manager, storage: FaultyStorage) -> None:
    """Let a commit find out that a newer writer owns the state."""
    storage.fail("commit", error=FencedError("a newer writer owns it"), times=99)
    with pytest.raises(FencedError):
        await flusher_of(state).confirm_ownership()


async def fenced(storage: FaultyStorage, clock: ManualClock, interval: float | None, **more: Any) -> Manager:
    """Yield a manager that has `BEFORE`, one key of it unflushed, and has just learnt that it is fenced."""
    state = Manager(Config(name="test", flush_interval=interval), storage, clock=clock, **more)
    await state.start()
    await state.set_many({key: value for key, value in BEFORE.items() if key != "unflushed"})
    await state.flush()
    storage.fail("commit", error=FencedError("a newer writer owns it"), times=99)
    with contextlib.suppress(FencedError):  # where the write waits until it is durable
        await state.set("unflushed", 1)
        await state.flush()
    assert state.status().fenced
    return state


async def ended(state: Manager) -> None:
    with pytest.raises(FencedError):
        await state.stop()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("interval", [None, 0, 1.0])
async def test_every_write_is_refused_and_changes_nothing(
    storage: FaultyStorage, clock: ManualClock, interval: float | None
) -> None:
    """Each write of each handle raises FencedError, whatever the interval; memory and revision stay, reads go on."""
    state = await fenced(storage, clock, interval)
    revision = state.revision
    for name, write in WRITES.items():
        with pytest.raises(FencedError, match="nothing was changed"):
            await write(state)
            raise AssertionError(name)
        assert (await state.get_all(), state.revision) == (BEFORE, revision), name
    assert state.status().unflushed_keys == 1
    await ended(state)


async def test_functions_of_the_caller_are_not_called(storage: FaultyStorage, clock: ManualClock) -> None:
    """A function given to update() or get_or_set() has effects of its own, so it does not run in vain."""
    state = await fenced(storage, clock, None)
    called: list[object] = []
    for write in (state.update("n", called.append), state.get_or_set("new", lambda: called.append(1))):
        with pytest.raises(FencedError):
            await write
    assert called == []
    await ended(state)


async def test_a_transaction_that_is_open_is_refused_at_its_end(storage: FaultyStorage, clock: ManualClock) -> None:
    """A fence found while it is open is raised on leaving, and nothing of it was done."""
    async with running(storage, clock, None) as state:
        await state.set("a", 1)
        with pytest.raises(FencedError, match="nothing was changed"):
            async with state.transaction() as tx:
                tx.set("a", 2)
                await fence(state, storage)
                assert tx.get("a") == 2
        assert await state.get("a") == 1
        with pytest.raises(FencedError):
            await state.set("a", 4)
        await ended(state)


async def test_writers_that_wait_for_a_transaction_are_refused(storage: FaultyStorage, clock: ManualClock) -> None:
    """Who waited for the lock while the fence was found raises, and the lock is free again."""
    async with running(storage, clock, None) as state:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with state.transaction():
                entered.set()
                await leave.wait()

        holding = asyncio.ensure_future(holder())
        await entered.wait()
        waiting = [asyncio.ensure_future(write(state)) for write in (transaction, WRITES["set"], WRITES["incr"])]
        await idle()
        await fence(state, storage)
        leave.set()
        outcomes = await asyncio.gather(holding, *waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [FencedError] * 4
        assert (state.revision, state._core._lock.locked()) == (0, False)
        await ended(state)


async def test_expiry_goes_on_for_reads_and_makes_no_revisions(storage: FaultyStorage, clock: ManualClock) -> None:
    """What expires is missing at its time; nothing is swept, since no sweep could become durable."""
    state = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
    await state.start()
    for number in range(5):
        await state.set(f"key {number}", number, ttl=1 + number)
    await fence(state, storage)
    revision = state.revision
    for left in (4, 3, 2, 1, 0, 0, 0):
        clock.advance(1.0)
        await idle()
        assert (len(state), state.revision) == (left, revision)
    await ended(state)


async def test_a_checkpoint_finds_the_fence(
    storage: FaultyStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes are refused as well, one line says so, and it does not say that the journal goes on."""
    state = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
    await state.start()
    storage.fail("checkpoint", error=FencedError("a newer writer owns it"))
    await state.set("large", "x" * 100_000)
    await state.flush()
    await until(lambda: state.status().fenced)
    with pytest.raises(FencedError):
        await state.set("a", 1)
    with pytest.raises(FencedError, match="all its changes are durable: none is lost"):
        await state.stop()
    assert len(errors(caplog)) == 1
    assert "the journal goes on" not in caplog.text


async def test_stop_finds_the_fence_in_its_checkpoint(storage: FaultyStorage, clock: ManualClock) -> None:
    """stop() never returns without an error when another writer owns the state."""
    state = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
    await state.start()
    await state.set("a", 1)
    storage.fail("checkpoint", error=FencedError("a newer writer owns it"))
    await ended(state)
    assert (state.status().phase, state.status().fenced) == ("stopped", True)


async def test_one_line_and_health(
    storage: FaultyStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Without on_fenced, one ERROR line in a life says it, whatever is tried afterwards; /health answers 503."""
    state = await fenced(storage, clock, 1.0)
    clock.advance(100)
    for write in (WRITES["set"], transaction):
        with pytest.raises(FencedError):
            await write(state)
    code, body = _lifespan.health_of({"test": state}, 30)
    assert (code, b"is fenced: a newer writer owns the state" in body) == (503, True)
    await ended(state)
    (line,) = errors(caplog)
    assert line == (
        "test: fenced: nothing more becomes durable, and every write raises FencedError; end this process: "
        "a newer writer owns it"
    )


class TestOnFenced:
    @pytest.mark.parametrize("interval", [None, 0, 1.0])
    async def test_it_is_called_once(self, storage: FaultyStorage, clock: ManualClock, interval: float | None) -> None:
        """With the error, on the event loop, outside of our task; never again, whatever is tried afterwards."""
        told: list[tuple[FencedError, object, object]] = []

        def on_fenced(error: FencedError) -> None:
            told.append((error, asyncio.get_running_loop(), asyncio.current_task()))

        state = await fenced(storage, clock, interval, on_fenced=on_fenced)
        await idle()
        for call in (state.flush, state.wait_durable, lambda: state.set("a", 1)):
            with pytest.raises(FencedError):
                await call()
        clock.advance(100)
        await ended(state)
        await idle()
        ((error, loop, task),) = told
        assert (type(error), loop, task) == (FencedError, asyncio.get_running_loop(), None)

    async def test_it_is_called_in_a_stop_too(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """Where the last flush finds the fence, it is called before stop() raises."""
        told: list[FencedError] = []
        state = Manager(Config(name="test", flush_interval=None), storage, clock=clock, on_fenced=told.append)
        await state.start()
        await state.set("a", 1)
        storage.fail("commit", error=FencedError("a newer writer owns it"))
        await ended(state)
        assert len(told) == 1

    async def test_once_for_each_start(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A manager that became the owner again may be deposed again."""
        told: list[FencedError] = []
        state = Manager(Config(name="test", flush_interval=None), storage, clock=clock, on_fenced=told.append)
        for life in (1, 2):
            await state.start()
            await state.set("a", life)
            storage.fail("commit", error=FencedError("a newer writer owns it"), times=2)
            with pytest.raises(FencedError):
                await state.flush()
            with pytest.raises(FencedError):
                await state.stop()
            assert len(told) == life

    async def test_what_it_raises_is_logged(
        self, storage: FaultyStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The manager goes on as a fenced one; the line names the class of the error and its place, and not its text."""

        def on_fenced(_: FencedError) -> None:
            raise LookupError("no such process")

        state = await fenced(storage, clock, None, on_fenced=on_fenced)
        await idle()
        assert f"on_fenced failed: LookupError at {__file__}:" in caplog.text
        assert "no such process" not in caplog.text
        assert await state.get("a") == 1
        await ended(state)

    async def test_a_coroutine_is_closed_and_logged(
        self, storage: FaultyStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A plain function that returns a coroutine is found out when it is called."""

        async def work() -> None:
            raise AssertionError("nothing awaits it")

        state = await fenced(storage, clock, None, on_fenced=lambda _: work())
        await idle()
        assert "on_fenced returned a coroutine" in caplog.text
        await ended(state)

    def test_an_exit_ends_the_event_loop(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """`sys.exit()` in it ends the program, as anywhere else on the loop."""

        def on_fenced(_: FencedError) -> None:
            raise SystemExit(3)

        async def main() -> None:
            await fenced(storage, clock, None, on_fenced=on_fenced)
            await idle()
            raise AssertionError("the loop went on")

        with pytest.raises(SystemExit, match="3"):
            asyncio.run(main())

    async def _async(self, _: FencedError) -> None: ...

    class _AsyncCall:
        async def __call__(self, _: FencedError) -> None: ...

    @pytest.mark.parametrize("given", ["print", 5, True, FencedError("x")])
    def test_it_must_be_callable(self, given: Any) -> None:
        """Anything else is a TypeError where the manager is made."""
        with pytest.raises(TypeError, match="on_fenced must be a function of one argument"):
            Manager("test", MemoryStorage(), on_fenced=given)

    def test_it_must_not_be_async(self) -> None:
        """Nor may it be a coroutine function, a partial of one, or an object that is called as one."""
        for given in (self._async, functools.partial(self._async), self._AsyncCall()):
            with pytest.raises(TypeError, match="on_fenced must be a plain function"):
                Manager("test", MemoryStorage(), on_fenced=given)
        Manager("test", MemoryStorage(), on_fenced=print)


async def test_the_flush_task_of_a_fenced_manager_is_cancelled(storage: FaultyStorage, clock: ManualClock) -> None:
    """It stays fenced: status, writes and stop() say so, whatever became of the task."""
    state = await fenced(storage, clock, 1.0)
    flusher_of(state)._task.cancel()
    await idle()
    assert (state.status().fenced, state.status().task_failure) == (True, None)
    with pytest.raises(FencedError, match="nothing was changed"):
        await state.set("a", 2)
    await ended(state)


async def test_a_manager_without_its_flush_task_refuses_writes(
    storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage
) -> None:
    """Nothing could make them durable: each raises, status and health say why, reads go on, stop() still flushes."""
    state = Manager(Config(name="test", flush_interval=1.0), storage, clock=clock)
    await state.start()
    await state.set("a", 1)
    flusher_of(state)._task.cancel()
    await idle()
    for name in ("set", "incr", "transaction", "blocking"):
        with pytest.raises(UnavailableError, match=r"was cancelled: call stop\(\)"):
            await WRITES[name](state)
    for wait in (state.flush, state.wait_durable):
        with pytest.raises(UnavailableError, match="was cancelled"):
            await wait()
    failure = state.status().task_failure
    assert failure == "the flush task of 'test' was cancelled: call stop(), which flushes what is left"
    assert not state.status().fenced
    code, body = _lifespan.health_of({"test": state}, 30)
    assert (code, b"has a background task that ended too early: the flush task" in body) == (503, True)
    assert await state.get_all() == {"a": 1}
    await state.stop()
    assert state.status().task_failure is None
    async with Manager("test", memory) as again:
        assert await again.get_all() == {"a": 1}
