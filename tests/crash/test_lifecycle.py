"""The life of a manager cut short on a real disk: loops that close, stops in the middle, functions that raise."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab_state import ClosedError, Config, FileStorage, Manager, UnavailableError
from lab_state.storage import _fs


class Gates:
    """Syncs that are held up until the test lets them go on."""

    def __init__(self) -> None:
        self.held: dict[str, threading.Event] = {}
        self.entered: dict[str, threading.Event] = {}

    def hold(self, call: str) -> None:
        self.held[call], self.entered[call] = threading.Event(), threading.Event()

    def open(self, call: str) -> None:
        self.held.pop(call).set()

    async def reached(self, call: str) -> None:
        assert await asyncio.to_thread(self.entered[call].wait, 30)

    def standing_in(self, call: str, real: Callable[[int], None]) -> Callable[[int], None]:
        def stand_in(fd: int) -> None:
            # The gate is looked up once: a test may open it, and hold the next call.
            if (gate := self.held.get(call)) is not None:
                self.entered[call].set()
                assert gate.wait(60)
            real(fd)

        return stand_in


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gates]:
    """Yield the gates: `commit` holds the sync of a record, `checkpoint` that of a new file."""
    made = Gates()
    monkeypatch.setattr(_fs, "_sync_data", made.standing_in("commit", _fs._sync_data))
    monkeypatch.setattr(_fs, "_sync", made.standing_in("checkpoint", _fs._sync))
    yield made
    for call in list(made.held):
        made.open(call)


def manager(directory: Path, interval: float | None = None) -> Manager:
    return Manager(Config(name="lab", flush_interval=interval), FileStorage(directory))


def on_disk(directory: Path) -> dict[str, object]:
    """Return what the snapshot holds; after a clean stop that is everything, and the journal holds nothing more."""
    assert len((directory / "lab.journal").read_bytes().splitlines()) == 1
    found: dict[str, object] = json.loads((directory / "lab.json").read_bytes())
    del found["$lab_state"]
    return found


async def flushing(state: Manager, gates: Gates) -> asyncio.Task[None]:
    """Make three changes: one is durable, one is being made durable, and one waits for the next commit."""
    await state.start()
    await state.set("durable", 1)
    await state.flush()
    gates.hold("commit")
    await state.set("under way", 2)
    task = asyncio.create_task(state.flush())
    await gates.reached("commit")
    await state.set("behind", 3)
    return task


@pytest.mark.filterwarnings("ignore")  # of what was pending when its loop was closed
@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_a_loop_that_closes_under_a_pending_flush(
    tmp_path: Path, gates: Gates, caplog: pytest.LogCaptureFixture, *, cancelled: bool, early: bool
) -> None:
    """If the loop ends during a flush, with its tasks cancelled or forgotten, stop() on another loop makes everything durable."""
    caplog.set_level(logging.CRITICAL)
    state = manager(tmp_path)
    kept: list[asyncio.Task[None]] = []

    async def first() -> None:
        kept.append(await flushing(state, gates))

    async def second() -> None:
        if not early:
            gates.open("commit")
        await state.stop()

    if cancelled:
        asyncio.run(first())
    else:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(first())
        loop.close()
    assert kept[0].cancelled() == cancelled
    if early:
        gates.open("commit")
    asyncio.run(second())
    assert state.status().phase == "stopped"
    assert state.durable_revision == state.revision == 3
    assert on_disk(tmp_path) == {"durable": 1, "under way": 2, "behind": 3}


@pytest.mark.parametrize("order", [("commit", "checkpoint"), ("checkpoint", "commit")])
@pytest.mark.parametrize("impatient", [False, True])
async def test_a_stop_during_a_flush_during_a_checkpoint(
    tmp_path: Path, gates: Gates, order: tuple[str, str], *, impatient: bool
) -> None:
    """A stop during a flush and a checkpoint makes all durable in any order, also if it is cancelled.

    No caller waits for ever.
    """
    state = manager(tmp_path)
    await state.start()
    gates.hold("checkpoint")
    await state.set("large", "x" * 5_000_000)
    await asyncio.sleep(0)
    first = asyncio.create_task(state.flush())
    await gates.reached("checkpoint")
    # The first journal is a new file, too.
    gates.open("checkpoint")
    gates.hold("checkpoint")
    await first
    await gates.reached("checkpoint")
    gates.hold("commit")
    await state.set("a", 1)
    flush = asyncio.create_task(state.flush())
    patient = asyncio.create_task(state.wait_durable())
    await gates.reached("commit")
    await state.set("b", 2)
    stop = asyncio.create_task(state.stop())
    await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await state.get("a")
    if impatient:
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop
    assert not flush.done()
    for call in order:
        gates.open(call)
        if call == "commit":
            await flush
    await asyncio.gather(flush, patient, state.stop())
    assert state.durable_revision == state.revision == 3
    assert on_disk(tmp_path) == {"large": "x" * 5_000_000, "a": 1, "b": 2}


async def test_a_stop_that_runs_out_of_time_says_what_is_not_durable(tmp_path: Path, gates: Gates) -> None:
    """It returns within its timeout, names the number of keys and the state, and so does each waiting caller."""
    state = Manager(Config(name="lab", flush_interval=None, stop_timeout=0.05), FileStorage(tmp_path))
    flush = await flushing(state, gates)
    told = r"stop\(\) gave up, .* no progress for 0\.05 s: changes of 'lab' may not be durable \(keys: 2\); the state stays locked"
    with pytest.raises(UnavailableError, match=told):
        await state.stop()
    with pytest.raises(UnavailableError, match=told):
        await flush
    status = state.status()
    assert (status.phase, status.durable_revision, status.revision, status.unflushed_keys) == ("stopped", 1, 3, 2)
    gates.open("commit")


class OwnError(Exception):
    """An error of a function of the application."""


def failing(value: object) -> object:
    raise OwnError


@pytest.mark.parametrize("interval", [0, None])
async def test_what_a_function_raises_is_its_callers_alone(tmp_path: Path, interval: float | None) -> None:
    """An update, a factory, a transaction or a reader that raises changes nothing, now and for the next start."""
    state = manager(tmp_path, interval)
    await state.start()
    await state.set("a", {"n": 1})
    revision = state.revision
    for call in (
        lambda: state.update("a", failing),
        lambda: state.update("new", failing, default=0),
        lambda: state.get_or_set("new", factory=lambda: failing(None)),
    ):
        with pytest.raises(OwnError):
            await call()
    with pytest.raises(OwnError):
        async with state.transaction() as tx:
            tx.set("a", 2)
            tx.update("a", failing)
    async with state.watch() as other:
        with pytest.raises(OwnError):
            async with state.watch() as mine:
                await state.set("b", 2)
                async for change in mine:
                    failing(change)
        assert (await anext(other)).key == "b"
        await state.set("c", 3)
        assert (await anext(other)).key == "c"
    await state.flush()
    assert state.durable_revision == state.revision == revision + 2
    await state.stop()
    assert on_disk(tmp_path) == {"a": {"n": 1}, "b": 2, "c": 3}
