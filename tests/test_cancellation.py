"""Every public call that can wait, cancelled at every moment at which it waits: nothing is half done, lost or left behind.

Each call is cancelled the first time that it waits, the second time, and so on, until it gets through: once while it
waits, and once at the moment at which what it waits for has come, but it has not gone on. After each, the manager must
be as if the call had been made, or not; go on to work; and find everything after a crash, and after a stop.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import shutil
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from running import flusher_of
from s3_world import Bucket

import lab_state
from lab_state import (
    Config,
    Entry,
    FileStorage,
    LockedError,
    Manager,
    MemoryCache,
    MemoryStorage,
    Namespace,
    Reader,
    Reading,
    Recovery,
    Storage,
    StorageSession,
    _batch,
    _in_steps,
    _writing,
    copy_state,
    list_generations,
    list_states,
    read_state,
    remove_state,
    restore_state,
)
from lab_state._items import _collected, _pages
from lab_state._order import _index, _sorted_keys
from lab_state.storage._protocol import SnapshotSource
from lab_state.storage.s3 import _Claim

R = TypeVar("R")

NAME = "lab"
MOST_WAITS = 200
LATE = pytest.mark.parametrize("late", [False, True], ids=["waiting", "woken"])

# The driver


@types.coroutine
def stepped(
    call: Coroutine[Any, Any, R], at: Callable[[int], object], woken: int = 0
) -> Generator[Any, Any, tuple[int, R]]:
    """Run a coroutine, and call `at` each time that it waits; or cancel it when it is `woken` from such a wait.

    Returns:
        How often it waited, and what it returned.
    """
    waits = 0
    try:
        waiting = call.send(None)
        while True:
            waits += 1
            at(waits)
            try:
                yield waiting
            except BaseException as error:  # noqa: BLE001 -- whatever it is, it is the call's
                waiting = call.throw(error)
            else:
                waiting = call.throw(asyncio.CancelledError()) if waits == woken else call.send(None)
    except StopIteration as stop:
        return waits, stop.value


async def cancelled_at(call: Coroutine[Any, Any, Any], number: int, *, late: bool) -> bool:
    """Run a coroutine, and cancel it the `number`-th time that it waits; whether it ended before.

    Who is cancelled says so.
    """

    def cancel(waits: int) -> None:
        if waits == number and not late:
            asyncio.get_running_loop().call_soon(task.cancel)

    async def run() -> bool:
        waits, _ = await stepped(call, cancel, number if late else 0)
        return waits < number

    task = asyncio.create_task(run())
    async with asyncio.timeout(60):
        await asyncio.wait({task})
    if task.cancelled():
        return False
    assert task.result(), "the call was cancelled, and did not tell its caller"
    return True


async def at_every_wait(run: Callable[[int], Awaitable[bool]]) -> int:
    """Cancel the call at each moment until it gets through; return the number of these moments."""
    for number in range(1, MOST_WAITS):
        before = asyncio.all_tasks()
        through = await run(number)
        await quiet()
        left = {task for task in asyncio.all_tasks() - before if not task.done()}
        assert not left, f"left behind: {left}"
        if through:
            return number - 1
    raise AssertionError(f"the call waits more than {MOST_WAITS} times")


async def quiet() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_each_wait_is_cancelled_once() -> None:
    """The driver itself: at a third wait, a call has waited twice, or three times where it was woken."""
    seen: list[int] = []

    async def call() -> None:
        for number in range(3):
            seen.append(number)
            await asyncio.sleep(0)

    for late in (False, True):
        assert await at_every_wait(lambda number, late=late: cancelled_at(call(), number, late=late)) == 3  # type: ignore[misc]
    assert seen == [0, 0, 1, 0, 1, 2, 0, 1, 2] * 2


async def test_what_a_cancelled_call_leaves_behind_is_noticed() -> None:
    """A lock, a waiter, a task, half of a change: the checks themselves."""
    async with running(storage := WaitingStorage()) as state:
        with pytest.raises(AssertionError):
            await check(state, storage, [{}])
        await state._core._lock.acquire()
        with pytest.raises(AssertionError):
            await check(state, storage, [await state.get_all()])
        state._core._lock.release()

    async def left(_: int) -> bool:
        left.task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[attr-defined]
        return True

    with pytest.raises(AssertionError, match="left behind"):
        await at_every_wait(left)
    left.task.cancel()  # type: ignore[attr-defined]


# What is under test


class WaitingStorage:
    """States in memory; each operation waits before and after it does what it does."""

    def __init__(self, inner: MemoryStorage | None = None) -> None:
        self.inner = MemoryStorage() if inner is None else inner

    async def open(self, name: str) -> StorageSession:
        await asyncio.sleep(0)
        session = await self.inner.open(name)
        try:
            await asyncio.sleep(0)
        except BaseException:
            await session.aclose()
            raise
        return WaitingSession(session)

    async def read(self, name: str) -> Reading:
        await asyncio.sleep(0)
        reading = await self.inner.read(name)
        await asyncio.sleep(0)
        return reading

    def crashed(self) -> Storage:
        """Return what a crash would leave now."""
        left = MemoryStorage()
        for name, place in self.inner.places.items():
            left.places[name] = copy.copy(place)
            left.places[name].session = None
            left.places[name].journal = None if place.journal is None else bytearray(place.journal)
        return WaitingStorage(left)


class WaitingSession:
    def __init__(self, inner: StorageSession) -> None:
        self._inner = inner

    @property
    def recovery(self) -> Recovery:
        return self._inner.recovery

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def snapshot_bytes(self) -> int:
        return self._inner.snapshot_bytes

    @property
    def progress(self) -> int:
        return self._inner.progress

    @property
    def journal_bytes(self) -> int:
        return self._inner.journal_bytes

    @property
    def warning(self) -> str | None:
        return self._inner.warning

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        await asyncio.sleep(0)
        due = await self._inner.commit(record, snapshot)
        await asyncio.sleep(0)
        return due

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        await asyncio.sleep(0)
        await self._inner.checkpoint(snapshot)
        await asyncio.sleep(0)

    async def aclose(self) -> None:
        try:
            await asyncio.sleep(0)
        finally:
            await self._inner.aclose()


class FilesStorage(FileStorage):
    """Files, with what a crash would leave."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory

    def crashed(self) -> Storage:
        # Temporary files come and go in its threads, and no start reads them.
        there = self.directory.with_name(f"{self.directory.name}-crashed")
        return FileStorage(shutil.copytree(self.directory, there, ignore=shutil.ignore_patterns("*.tmp")))


Place = Callable[[], Any]


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    numbers = iter(range(1_000_000))
    return WaitingStorage if request.param == "memory" else lambda: FilesStorage(tmp_path / str(next(numbers)))


FIRST = {"a": 1, "b": {"x": [1]}, "ns/a": 1, "ns/b": {"x": [1]}}


def manager(storage: Storage, cache: MemoryCache | None = None) -> Manager:
    return Manager(Config(name=NAME, flush_interval=0), storage, cache)


@asynccontextmanager
async def running(storage: Any) -> AsyncIterator[Manager]:
    async with manager(storage) as state:
        await state.set_many(FIRST)
        await state.set("ttl", 1, ttl=1000)
        await state.set("ns/ttl", 1, ttl=1000)
        yield state


async def contents(storage: Storage) -> dict[str, Any]:
    """Return what the next manager finds. A task that was cancelled during the release may end before the lock is free."""
    state = manager(storage)
    async with asyncio.timeout(60):
        while state.status().phase == "new":
            with suppress(LockedError):
                await state.start()
    try:
        return await state.get_all()
    finally:
        await state.stop()


async def check(state: Manager, storage: Any, allowed: list[dict[str, Any]]) -> None:
    """Check that the manager is whole and still works, and that what it acknowledges survives a crash."""
    assert await state.get_all() in allowed
    assert state._core.transaction is None
    assert not state._core._lock.locked()
    async with asyncio.timeout(60):
        async with state.transaction() as tx:
            tx.set("later", 1)
        await state.incr("ns/later")
        await state.flush()
    waiters = flusher_of(state)._waiters
    assert [waiters.next, waiters.current, waiters.passive] == [[], [], []]
    everything = await state.get_all()
    assert await contents(storage.crashed()) == everything


# The calls of managers, namespaces and entries


async def _in_transaction(calls: Any) -> None:
    async with calls.transaction() as tx:
        tx.set("a", 5)
        tx.delete("b")


def _sets(tx: Any) -> None:
    tx.set("a", 5)
    tx.delete("b")


async def _walked(calls: Any) -> None:
    async with calls.items() as items:
        async for _ in items:
            pass


async def _cleared_in_transaction(calls: Any) -> None:
    async with calls.transaction() as tx:
        tx.delete_all()
        tx.set_many({"a": 5, "b": 6})


async def _watched(calls: Any) -> None:
    async with calls.watch() as changes:
        calls._core.durability.loop.call_soon(asyncio.ensure_future, calls.incr("a"))
        await anext(changes)


CALLS: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {
    "check": lambda calls: calls.check(type=int),
    "delete": lambda calls: calls.delete("a"),
    "delete_all": lambda calls: calls.delete_all(),
    "delete_many": lambda calls: calls.delete_many(["a", "b"]),
    "exists": lambda calls: calls.exists("a"),
    "expires_in": lambda calls: calls.expires_in("ttl"),
    "flush": lambda calls: _set_and(calls, calls.flush),
    "get": lambda calls: calls.get("a"),
    "get_all": lambda calls: calls.get_all(),
    "get_many": lambda calls: calls.get_many(["a"]),
    "get_or_set": lambda calls: calls.get_or_set("new", lambda: 1),
    "incr": lambda calls: calls.incr("a"),
    "items": _walked,
    "keys": lambda calls: calls.keys(),
    "pop": lambda calls: calls.pop("b"),
    "set": lambda calls: calls.set("a", {"x": 2}),
    "set_if_absent": lambda calls: calls.set_if_absent("new", 1),
    "set_many": lambda calls: calls.set_many({"a": 7, "new": 8}),
    "touch": lambda calls: calls.touch("ttl", 500),
    "transaction": _in_transaction,
    "update": lambda calls: calls.update("a", lambda old: old + 1),
    "catch_up": lambda calls: _set_and(calls, calls.catch_up),
    "transact": lambda calls: calls.transact(_sets),
    "wait_durable": lambda calls: _set_and(calls, calls.wait_durable),
    "wait_revision": lambda calls: _set_and(calls, lambda: calls.wait_revision(1)),
    "watch": _watched,
}

ENTRY_CALLS: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {
    "delete": lambda entry: entry.delete(),
    "exists": lambda entry: entry.exists(),
    "expires_in": lambda entry: entry.expires_in(),
    "get": lambda entry: entry.get(),
    "incr": lambda entry: entry.incr(),
    "pop": lambda entry: entry.pop(),
    "set": lambda entry: entry.set(3),
    "set_if_absent": lambda entry: entry._calls.entry("new", int).set_if_absent(3),
    "touch": lambda entry: entry.touch(60),
    "update": lambda entry: entry.update(lambda old: old + 1),
}

LIFECYCLE = {"__aenter__", "__aexit__", "start", "stop"}

READER_CALLS: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {
    "exists": lambda reader: reader.exists("a"),
    "get": lambda reader: reader.get("a"),
    "get_all": lambda reader: reader.get_all(),
    "get_many": lambda reader: reader.get_many(["a"]),
    "items": _walked,
    "keys": lambda reader: reader.keys(),
    "revision": lambda reader: reader.revision(),
    "wait_revision": lambda reader: reader.wait_revision(5),
    "watch": lambda reader: _reader_watched(reader),
}


async def _set_and(calls: Any, then: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.get_running_loop().call_soon(asyncio.ensure_future, calls.set("a", 9))
    await quiet()
    await then()


async def _reader_watched(reader: Reader) -> None:
    async with reader.watch() as changes:
        await anext(changes)


def waiting_calls(of: type) -> set[str]:
    """Return the public calls that can wait, from the class itself."""

    def can_wait(name: str) -> bool:
        call = inspect.getattr_static(of, name)
        if isinstance(call, property) or not callable(call):
            return False
        call = inspect.unwrap(call)
        returns = str(inspect.signature(call).return_annotation) if inspect.isfunction(call) else ""
        return inspect.iscoroutinefunction(call) or returns.startswith(
            ("Abstract", "Async", "Awaitable", "Coroutine", "Items")
        )

    public = (name for name in dir(of) if not name.startswith("_") or name in {"__aenter__", "__aexit__", "__anext__"})
    return {name for name in public if can_wait(name)} | ({"watch"} & {*dir(of)})


ALONE = (copy_state, read_state, list_states, remove_state, list_generations, restore_state)
"""The functions that wait. Those of a history and of the list of states are cancelled in tests/storage."""


def test_no_public_call_is_forgotten() -> None:
    """Each call that can wait is in one of the tables: a new one has to be put there."""
    covered = {
        Manager: CALLS.keys() | LIFECYCLE | {"backup"},  # test_backup.py cancels a backup
        Namespace: CALLS.keys(),
        Entry: ENTRY_CALLS.keys(),
        Reader: READER_CALLS.keys() | {"__aenter__", "__aexit__", "aclose"},
        # Those of storages are the conformance suite's, and those of caches, which only the mirror calls, tests/cache's.
        FileStorage: {"open", "read"},
        MemoryStorage: {"open", "read"},
        lab_state.S3Storage: {"open", "read"},
        StorageSession: {"aclose", "checkpoint", "commit"},
        lab_state.Storage: {"open", "read"},
        # It changes nothing, and never waits.
        lab_state.StateView: READS | {"items"},
        # Its steps are those of `items` in CALLS, and of test_items.py.
        lab_state.Items: {"__aenter__", "__aexit__", "__anext__", "aclose"},
        lab_state.MemoryCache: {"open"},
        lab_state.RedisCache: {"open"},
        lab_state.Cache: {"open"},
        lab_state.CacheSession: {"aclose", "apply", "fill", "look"},
    }
    for name in lab_state.__all__:
        there = getattr(lab_state, name)
        if inspect.isclass(there):
            assert waiting_calls(there) == covered.get(there, set()), name
        else:
            assert not inspect.iscoroutinefunction(there) or there in ALONE, name


HANDLES: dict[str, Callable[[Manager], Any]] = {
    "manager": lambda state: state,
    "namespace": lambda state: state.namespace("ns"),
    "entry": lambda state: state.entry("a", int),
}
READS = {"check", "exists", "expires_in", "get", "get_all", "get_many", "keys"}
ON_DISK = ("delete_all", "flush", "set", "transaction", "wait_durable")
"""What is run on files too: their threads are the same for all writes."""
CASES = [
    *(("memory", handle, name) for handle in ("manager", "namespace") for name in CALLS),
    *(("memory", "entry", name) for name in ENTRY_CALLS),
    *(("file", "manager", name) for name in ON_DISK),
]


@LATE
@pytest.mark.parametrize(("place", "handle", "name"), CASES, indirect=["place"], ids=map("-".join, CASES))
async def test_a_call_cancelled_wherever_it_waits(place: Place, handle: str, name: str, *, late: bool) -> None:
    """The change was made whole, or not at all; no other caller notices."""
    call = (ENTRY_CALLS if handle == "entry" else CALLS)[name]
    waits = await cancelled_everywhere(call, place, handle, late=late)
    assert waits or name in READS


async def cancelled_everywhere(
    call: Callable[[Any], Coroutine[Any, Any, Any]], place: Place, handle: str, *, late: bool
) -> int:
    """Cancel a call at each moment, and check what it leaves. Return the number of these moments."""
    async with running(place()) as state:
        await call(HANDLES[handle](state))
        await quiet()
        after = await state.get_all()

    async def run(number: int, *, held: bool) -> bool:
        async with running(storage := place()) as state:
            before = await state.get_all()
            holding = asyncio.create_task(hold(state)) if held else None
            await asyncio.sleep(0)
            through = await cancelled_at(call(HANDLES[handle](state)), number, late=late)
            if holding is not None:
                await holding
            await quiet()
            await check(state, storage, [before, after])
            everything = await state.get_all()
        assert await contents(storage) == everything
        return through

    async def hold(state: Manager) -> None:
        async with state.transaction():
            await quiet()

    waits = await at_every_wait(lambda number: run(number, held=False))
    waits_in_turn = await at_every_wait(lambda number: run(number, held=True))
    assert waits_in_turn >= waits
    return waits


@pytest.fixture(autouse=True)
def _long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no step end because of its time, so that a call waits equally often on a busy machine."""
    for module in (_collected, _pages):
        monkeypatch.setattr(module, "_SECONDS_IN_STEP", 3600.0)


IN_STEPS: dict[str, Callable[[Any], Coroutine[Any, Any, Any]]] = {
    "set_many": lambda calls: calls.set_many({"a": 7, "new": 8, "ttl": 9}),
    "set_many-ttl": lambda calls: calls.set_many({"a": 7, "new": 8, "ttl": 9}, ttl=500),
    "delete_many": lambda calls: calls.delete_many(["a", "b", "ttl", "none"]),
    "delete_all": lambda calls: calls.namespace("ns").delete_all(),
    "transaction": _in_transaction,
    "transaction-cleared": lambda calls: _cleared_in_transaction(calls),
    "keys": lambda calls: calls.keys(),
    "get_all": lambda calls: calls.get_all(reverse=True),
}

STEPS: list[tuple[Any, str]] = [
    (_batch, "MANY"),
    (_batch, "STEP"),
    (_writing, "_STEP_BYTES"),
    (_in_steps, "MANY"),
    (_in_steps, "_PIECES_IN_STEP"),
    (_index, "FEW"),
    (_index, "SMALL"),
    (_index, "_KEYS_IN_STEP"),
    (_sorted_keys, "SIZE"),
    (_pages, "_KEYS_IN_STEP"),
]
"""The size of each step."""


@LATE
@pytest.mark.parametrize("name", IN_STEPS)
async def test_a_call_in_steps_cancelled_wherever_it_waits(
    name: str, monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    """With steps of one key it waits more often, and the change was made whole, or not at all."""
    at_once = await cancelled_everywhere(IN_STEPS[name], WaitingStorage, "manager", late=late)
    for module, constant in STEPS:
        monkeypatch.setattr(module, constant, 1)
    monkeypatch.setattr(_collected, "_SECONDS_IN_STEP", -1)
    assert await cancelled_everywhere(IN_STEPS[name], WaitingStorage, "manager", late=late) > at_once


# Lifecycle


@LATE
@pytest.mark.parametrize("name", ["start", "__aenter__"])
async def test_a_start_cancelled_wherever_it_waits(name: str, place: Place, *, late: bool) -> None:
    """It lets go of everything, and may be made again."""

    async def run(number: int) -> bool:
        async with running(storage := place()):
            pass
        state = manager(storage)
        through = await cancelled_at(getattr(state, name)(), number, late=late)
        if not through:
            assert state.status().phase == "new"
            await state.start()
        await check(state, storage, [{**FIRST, "ttl": 1, "ns/ttl": 1}])
        await state.stop()
        return through

    assert await at_every_wait(run)


@LATE
@pytest.mark.parametrize("name", ["stop", "__aexit__"])
async def test_a_stop_cancelled_wherever_it_waits(name: str, place: Place, *, late: bool) -> None:
    """It goes on all the same: nothing is lost, and who asks again waits for its end."""

    async def run(number: int) -> bool:
        state = Manager(Config(name=NAME, flush_interval=None), storage := place())
        await state.start()
        await state.set_many(FIRST)
        stop = state.stop() if name == "stop" else state.__aexit__(None, None, None)
        through = await cancelled_at(stop, number, late=late)
        await state.stop()
        assert state.status().phase == "stopped"
        assert await contents(storage) == FIRST
        return through

    assert await at_every_wait(run)


@LATE
async def test_a_block_cancelled_wherever_it_waits(place: Place, *, late: bool) -> None:
    """Start, writes and stop in one: what was acknowledged is there, and the state is free."""

    async def run(number: int) -> bool:
        storage, acknowledged = place(), dict[str, int]()

        async def block() -> None:
            async with manager(storage) as state:
                for key in ("a", "b"):
                    await state.set(key, 1)
                    acknowledged[key] = 1

        through = await cancelled_at(block(), number, late=late)
        if stopping := [task for task in asyncio.all_tasks() if task.get_name() == f"lab_state {NAME} stop"]:
            await asyncio.wait(stopping, timeout=60)
        found = await contents(storage)
        assert acknowledged.items() <= found.items()
        return through

    assert await at_every_wait(run) >= 4


@LATE
async def test_a_copy_cancelled_wherever_it_waits(place: Place, *, late: bool) -> None:
    """The source is what it was, and both are free."""

    async def run(number: int) -> bool:
        source, target = place(), place()
        async with running(source):
            pass
        through = await cancelled_at(copy_state(NAME, source, target), number, late=late)
        expected = {**FIRST, "ttl": 1, "ns/ttl": 1}
        assert await contents(source) == expected
        assert await contents(target) in ([expected] if through else [{}, expected])
        return through

    assert await at_every_wait(run) > 5


@LATE
async def test_a_reading_cancelled_wherever_it_waits(place: Place, *, late: bool) -> None:
    """Nothing is left behind, and the manager beside it notices nothing."""

    async def run(number: int) -> bool:
        storage = place()
        async with running(storage) as state:
            through = await cancelled_at(read_state(NAME, storage), number, late=late)
            await state.set("after", number)
            await state.flush()
        assert (await contents(storage))["after"] == number
        return through

    assert await at_every_wait(run) >= 2


@LATE
@pytest.mark.parametrize(
    "call", [list_states, partial(list_generations, NAME)], ids=["list_states", "list_generations"]
)
async def test_a_list_cancelled_wherever_it_waits(
    call: Callable[[FileStorage], Coroutine[Any, Any, object]], tmp_path: Path, *, late: bool
) -> None:
    """Nothing is left behind, and the manager beside it notices nothing."""

    async def run(number: int) -> bool:
        storage = FileStorage(tmp_path / str(number))
        async with running(storage) as state:
            through = await cancelled_at(call(storage), number, late=late)
            await state.set("after", number)
        assert (await contents(storage))["after"] == number
        return through

    assert await at_every_wait(run) >= 1


@LATE
async def test_a_removal_cancelled_wherever_it_waits(tmp_path: Path, *, late: bool) -> None:
    """The state is what it was, or is gone, and the lock is free."""

    async def run(number: int) -> bool:
        storage = FileStorage(tmp_path / str(number))
        async with running(storage):
            pass
        through = await cancelled_at(remove_state(NAME, storage), number, late=late)
        expected = {**FIRST, "ttl": 1, "ns/ttl": 1}
        assert await contents(storage) in ([{}] if through else [{}, expected])
        return through

    assert await at_every_wait(run) >= 1


async def test_an_opening_in_s3_cancelled_at_every_request() -> None:
    """Wherever its requests are, nothing is left: no task, no thread, no claim; and the state is what it was."""
    bucket = Bucket()
    async with manager(bucket.storage()) as state:
        await state.set_many(FIRST)

    async def run(number: int) -> bool:
        storage = bucket.storage()
        opening = storage._open_claimed

        def cancel(waits: int) -> None:
            if waits == number:
                asyncio.get_running_loop().call_soon(task.cancel)

        async def _open_claimed(*arguments: Any) -> Any:
            return (await stepped(opening(*arguments), cancel))[1]

        storage._open_claimed = _open_claimed  # type: ignore[assignment, method-assign]
        task = asyncio.create_task(storage.open(NAME))
        await asyncio.wait({task}, timeout=60)
        if not task.cancelled():
            await task.result().aclose()
        assert not _Claim._held
        return not task.cancelled()

    assert await at_every_wait(run) > 10
    for thread in threading.enumerate():
        if thread.name.startswith(f"lab_state {NAME}"):
            thread.join(60)
            assert not thread.is_alive()
    assert await contents(bucket.storage()) == FIRST


# Readers


@LATE
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", [*READER_CALLS, "aclose", "__aenter__", "__aexit__"])
async def test_a_reader_cancelled_wherever_it_waits(name: str, *, local: bool, late: bool) -> None:
    """It goes on to read, and is closed by the next attempt."""

    async def run(number: int) -> bool:
        cache = MemoryCache()
        async with manager(MemoryStorage(), cache) as state:
            await state.set_many(FIRST)
            reader = cache.reader(NAME, local=local)
            if name == "__aenter__":
                through = await cancelled_at(reader.__aenter__(), number, late=late)
                assert through  # it does not wait
            else:
                await reader.__aenter__()
                await reader.wait_revision(1)
                writing = asyncio.create_task(write(state))
                if name in READER_CALLS:
                    through = await cancelled_at(READER_CALLS[name](reader), number, late=late)
                    await writing
                    await reader.wait_revision(5)
                    assert await reader.get("a") == 5
                    assert not reader._feed.watchers  # type: ignore[union-attr]
                else:
                    close = reader.aclose() if name == "aclose" else reader.__aexit__(None, None, None)
                    through = await cancelled_at(close, number, late=late)
                    await writing
            await reader.aclose()
            assert not cache.mirrors[NAME].followers
            return through

    async def write(state: Manager) -> None:
        for number in range(2, 6):
            await asyncio.sleep(0)
            await state.set("a", number)

    await at_every_wait(run)
