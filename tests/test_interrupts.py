"""Ctrl-C, signal handlers that raise, and event loops that are closed too early: no change is lost, nothing stays locked."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from mirrored import mirror_of
from running import until

from lab_state import Config, FileStorage, Manager, MemoryCache, MemoryStorage, UnavailableError
from lab_state import _durability as durability
from lab_state import _flusher as flusher
from lab_state import _outcomes as outcomes
from lab_state import _state as state_module
from lab_state._watch import Watchers
from lab_state.testing import FaultyStorage, ManualClock

STEPS = {
    flusher.__file__: {"_commit", "_work", "_survive", "_last_flush"},
    outcomes.__file__: {"_succeeded"},
    durability.__file__: {"_put_back"},
    state_module.__file__: {"untaken", "take", "put_back"},
}
"""Where changes are on their way from the state to a record, or back."""


class Interrupt:
    """A signal handler that raises at one bytecode of `STEPS`, counted from when it is armed."""

    def __init__(self, at: int, kind: type[BaseException]) -> None:
        self.left = at
        self.came = False
        self._kind = kind

    @contextlib.contextmanager
    def armed(self) -> Any:
        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 reports opcodes only if a frame had asked for them before
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_name not in STEPS.get(frame.f_code.co_filename, ()):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.came:
            self.left -= 1
            if self.left < 0:
                self.came = True
                raise self._kind
        return self._trace


def life(storage: FaultyStorage, memory: MemoryStorage, interrupt: Interrupt, *, fails: bool) -> int:
    """Live with an interrupt in the flush or in the stop, and return how many keys the next one finds."""
    loop = asyncio.new_event_loop()
    manager = Manager(Config(name="test", flush_interval=None), storage)
    wanted: dict[str, object] = {"a": 1}

    def run(coroutine: Any) -> None:
        try:
            loop.run_until_complete(coroutine)
        except UnavailableError:
            pass
        except KeyboardInterrupt:
            # If the coroutine has ended in the same turn, asyncio has kept a request to stop for the next run.
            with contextlib.suppress(RuntimeError):
                loop.run_until_complete(asyncio.sleep(0))

    run(manager.start())
    run(manager.set("a", 1))
    run(manager.flush())
    if fails:
        run(manager.delete_all())
        wanted.clear()
        storage.fail("commit")
    run(manager.set("b", 2))
    wanted["b"] = 2
    with interrupt.armed():
        run(manager.flush())
        run(manager.set("c", 3))
        wanted["c"] = 3
        storage.fail("checkpoint", times=9)  # only a snapshot would hide a gap in the records
        for _ in range(3):
            if manager.status().phase != "stopped":
                run(manager.stop())
    assert (manager.status().phase, manager.durable_revision) == ("stopped", manager.revision)
    run(asyncio.sleep(0))
    loop.close()

    async def found() -> dict[str, object]:
        async with Manager("test", memory) as again:
            return await again.get_all()

    assert asyncio.run(found()) == wanted
    return len(wanted)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # interrupted before its `await`
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails after a clear"])
def test_an_interrupt_at_any_step_loses_nothing(monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    """At any bytecode between the state and the record, Ctrl-C ends the loop, and the task goes on afterwards."""
    monkeypatch.setattr(outcomes, "_FIRST_PAUSE", 0.0)
    for at in itertools.count():
        memory = MemoryStorage()
        storage = FaultyStorage(memory)
        interrupt = Interrupt(at, KeyboardInterrupt)
        assert life(storage, memory, interrupt, fails=fails)
        if not interrupt.came:
            break
    assert at > 300


def test_an_interrupt_ends_the_loop_and_not_the_task(storage: FaultyStorage) -> None:
    """The program gets the interrupt, who waits gets an error, and the next flush on that loop succeeds."""

    class Signalled(ManualClock):
        """Has a signal handler that calls `sys.exit()` come when a commit asks for the time."""

        def monotonic(self) -> float:
            if signals and sys._getframe(2).f_code.co_name == "_commit":
                raise signals.pop()
            return super().monotonic()

    signals: list[BaseException] = []
    loop = asyncio.new_event_loop()
    manager = Manager(Config(name="test", flush_interval=None), storage, clock=Signalled())
    loop.run_until_complete(manager.start())
    loop.run_until_complete(manager.set("a", 1))
    flushing = loop.create_task(manager.flush())
    signals.append(SystemExit())
    with pytest.raises(SystemExit):
        loop.run_until_complete(asyncio.wait({flushing}))
    with pytest.raises(UnavailableError, match=r"SystemExit \(not durable yet"):
        loop.run_until_complete(flushing)
    assert manager.status().task_failure is None
    loop.run_until_complete(manager.flush())
    assert manager.durable_revision == 1
    loop.run_until_complete(manager.stop())
    loop.close()


def test_an_interrupt_at_the_end_of_a_stop(memory: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hits the last step, the manager is stopped, and can be started again."""
    manager = Manager("test", memory)

    def close(watchers: Watchers) -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        await manager.start()
        await manager.set("a", 1)
        await manager.stop()

    with monkeypatch.context() as patched:
        patched.setattr(Watchers, "close", close)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
    assert manager.status().phase == "stopped"

    async def again() -> object:
        async with manager:
            return await manager.get_all()

    assert asyncio.run(again()) == {"a": 1}


def broken_off(manager: Manager, when: Any, *, cached: bool = False) -> asyncio.AbstractEventLoop:
    """Close the loop of a manager while it stops, as the timeout of a test does."""
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        await manager.start()
        if cached:
            await until(lambda: mirror_of(manager).up)
        await manager.set_many({f"key {number}": number for number in range(3000)})

    loop.run_until_complete(begin())
    stopping = loop.create_task(manager.stop())
    loop.run_until_complete(until(when))
    assert not stopping.done()
    assert manager.status().phase == "stopping"
    stopping._log_destroy_pending = False  # type: ignore[attr-defined]
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    return loop


WHEN: dict[str, Callable[[Manager], bool]] = {
    "at once": lambda manager: True,
    "after the flush": lambda manager: manager.durable_revision == 1,
    "in the checkpoint": lambda manager: manager._flusher is not None and manager._flusher.state.frozen,
}


@pytest.mark.parametrize("when", WHEN)
def test_a_loop_closed_under_stop(tmp_path: Path, when: str) -> None:
    """stop() on another loop goes on with it: all is durable, the lock is free, and what is left is collected in peace."""
    manager = Manager(Config(name="test", flush_interval=None), FileStorage(tmp_path))
    broken_off(manager, lambda: WHEN[when](manager))

    async def second() -> None:
        with pytest.raises(RuntimeError, match="while it is stopping"):
            await manager.start()
        await manager.stop()
        await manager.stop()
        assert (manager.status().phase, manager.durable_revision) == ("stopped", 1)
        async with manager:
            gc.collect()  # what the closed loop left behind ends now
            assert (len(await manager.keys()), manager.status().phase) == (3000, "running")
        async with Manager("test", FileStorage(tmp_path)) as other:
            assert len(await other.keys()) == 3000

    asyncio.run(second())


@pytest.mark.parametrize("hanging", ["commit", "checkpoint", "aclose"])
def test_a_loop_closed_under_a_call_of_the_storage(
    storage: FaultyStorage, memory: MemoryStorage, clock: ManualClock, hanging: Any
) -> None:
    """Whichever call the closed loop has left half done, it is made again; the mirror ends with the loop."""
    manager = Manager(Config(name="test", flush_interval=None), storage, MemoryCache(), clock=clock)
    storage.hang(hanging)
    broken_off(manager, lambda: hanging in storage.calls, cached=True)

    async def second() -> object:
        await manager.stop()
        gc.collect()
        assert memory.places["test"].session is None
        async with manager:
            return len(await manager.keys())

    assert asyncio.run(second()) == 3000
