"""What a forked child makes of the managers, readers and locks that it inherited."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import uvloop
from forked import begin_in_child, error_of, in_child

from lab_state import (
    Config,
    FileStorage,
    Items,
    LockedError,
    Manager,
    MemoryCache,
    MemoryStorage,
    Reader,
    Transaction,
    UnavailableError,
)
from lab_state import _forks as forks
from lab_state.storage._fs_socket import OwnSocket
from lab_state.testing import ManualClock


@dataclass
class World:
    """What is there when the process forks."""

    state: Manager
    reader: Reader
    transaction: Transaction
    items: Items[Any]
    changes: AsyncIterator[Any]
    told: AsyncIterator[Any]
    read: Items[Any]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Yield a manager with a cache and a reader, both watched, in the middle of a transaction."""
    cache = MemoryCache()
    async with AsyncExitStack() as stack:
        state = Manager(Config(name="lab", flush_interval=None), FileStorage(tmp_path), cache, clock=ManualClock())
        await stack.enter_async_context(state)
        await state.set_many({"a": 1, "users/a": 2})
        await state.flush()
        reader = await stack.enter_async_context(cache.reader("lab", local=True))
        await reader.wait_revision(state.revision)
        told = await stack.enter_async_context(reader.watch())
        changes = await stack.enter_async_context(state.watch())
        transaction = await stack.enter_async_context(state.transaction())
        transaction.set("b", 2)
        items = state.items()
        await anext(items)
        read = reader.items()
        await anext(read)
        yield World(state, reader, transaction, items, changes, told, read)


CALLS: dict[str, Callable[[World], Any]] = {
    "get": lambda world: world.state.get("a"),
    "get with a default": lambda world: world.state.get("none", 1),
    "get_nowait": lambda world: world.state.get_nowait("a"),
    "get_many": lambda world: world.state.get_many(["a"]),
    "get_all": lambda world: world.state.get_all(),
    "exists": lambda world: world.state.exists("a"),
    "keys": lambda world: world.state.keys(),
    "expires_in": lambda world: world.state.expires_in("a"),
    "items": lambda world: anext(world.state.items()),
    "an open iterator": lambda world: anext(world.items),
    "blocking.items": lambda world: next(world.state.blocking.items()),
    "items in a transaction": lambda world: next(world.transaction.items()),
    "len": lambda world: len(world.state),
    "in": lambda world: "a" in world.state,
    "set": lambda world: world.state.set("a", 1),
    "set with ttl": lambda world: world.state.set("a", 1, ttl=5),
    "set_many": lambda world: world.state.set_many({"a": 1}),
    "touch": lambda world: world.state.touch("a", 5),
    "delete": lambda world: world.state.delete("a"),
    "delete_all": lambda world: world.state.delete_all(),
    "pop": lambda world: world.state.pop("a"),
    "update": lambda world: world.state.update("a", lambda old: old),
    "incr": lambda world: world.state.incr("a"),
    "set_if_absent": lambda world: world.state.set_if_absent("a", 1),
    "get_or_set": lambda world: world.state.get_or_set("a", int),
    "flush": lambda world: world.state.flush(),
    "catch_up": lambda world: world.state.catch_up(),
    "wait_durable": lambda world: world.state.wait_durable(),
    "wait_revision": lambda world: world.state.wait_revision(0),
    "transact": lambda world: world.state.transact(lambda tx: None),
    "start": lambda world: world.state.start(),
    "stop": lambda world: world.state.stop(),
    "transaction": lambda world: world.state.transaction().__aenter__(),
    "get in a transaction": lambda world: world.transaction.get("a"),
    "set in a transaction": lambda world: world.transaction.set("a", 1),
    "watch": lambda world: world.state.watch().__aenter__(),
    "an open watch": lambda world: anext(world.changes),
    "entry.get": lambda world: world.state.entry("a", int).get(),
    "entry.set": lambda world: world.state.entry("a", int).set(2),
    "namespace.get": lambda world: world.state.namespace("users").get("a"),
    "namespace.len": lambda world: len(world.state.namespace("users")),
    "blocking.get": lambda world: world.state.blocking.get("a"),
    "blocking.set": lambda world: world.state.blocking.set("a", 1),
}

READER_CALLS: dict[str, Callable[[World], Any]] = {
    "get": lambda world: world.reader.get("a"),
    "get_many": lambda world: world.reader.get_many(["a"]),
    "get_all": lambda world: world.reader.get_all(),
    "items": lambda world: anext(world.reader.items()),
    "an open iterator": lambda world: anext(world.read),
    "keys": lambda world: world.reader.keys(),
    "revision": lambda world: world.reader.revision(),
    "wait_revision": lambda world: world.reader.wait_revision(1),
    "watch": lambda world: world.reader.watch().__aenter__(),
    "an open watch": lambda world: anext(world.told),
    "__aenter__": lambda world: world.reader.__aenter__(),
}


async def test_every_call_of_a_running_manager_is_refused(world: World) -> None:
    """In a forked child each call raises UnsupportedError at once, reads and `blocking` too; the parent goes on."""
    answers = await in_child(lambda: {name: error_of(partial(call, world)) for name, call in CALLS.items()})
    assert {name: error for name, (error, _) in answers.items()} == dict.fromkeys(CALLS, "UnsupportedError")
    for _, message in answers.values():
        assert "the manager of 'lab' runs in the parent of this forked process: call it there" in message
    assert await world.state.get("a") == 1
    world.transaction.set("a", 3)


async def test_a_transaction_that_is_left_in_a_child(tmp_path: Path) -> None:
    """Leaving the block is refused too, and changes nothing in the parent."""
    async with Manager("lab", FileStorage(tmp_path)) as state:
        block = state.transaction()
        transaction = await block.__aenter__()
        transaction.set("a", 1)
        name, message = await in_child(lambda: error_of(lambda: block.__aexit__(None, None, None)))
        assert (name, "runs in the parent" in message) == ("UnsupportedError", True)
        await block.__aexit__(None, None, None)
        assert await state.get("a") == 1


async def test_every_call_of_an_open_reader_is_refused(world: World) -> None:
    """In a forked child each call raises UnsupportedError, `aclose` does nothing, and `up` is false."""
    calls = READER_CALLS
    answers = await in_child(lambda: {name: error_of(partial(call, world)) for name, call in calls.items()})
    assert {name: error for name, (error, _) in answers.items()} == dict.fromkeys(calls, "UnsupportedError")
    for _, message in answers.values():
        assert "the reader of 'lab' is open in the parent of this forked process" in message
    assert await in_child(lambda: [world.reader.up, error_of(world.reader.aclose)]) == [False, ["returned", "None"]]
    assert await world.reader.get("a") == 1


async def test_what_answers_in_a_child(world: World) -> None:
    """Status, revisions and metrics are those of a manager that was stopped at the fork, and do not raise."""
    metrics = world.state.metrics()

    def answers() -> list[Any]:
        state = world.state
        status = state.status()
        return [
            [status.phase, status.keys, status.revision, status.durable_revision],
            [state.revision, state.durable_revision, bool(state)],
            state.metrics() == metrics,
        ]

    assert await in_child(answers) == [["stopped", 0, 1, 1], [1, 1, True], True]
    assert world.state.status().phase == "running"


@pytest.mark.parametrize("before", [False, True])
async def test_a_manager_that_does_not_run_can_be_used_in_a_child(tmp_path: Path, *, before: bool) -> None:
    """One that was never started, or was stopped, starts in a forked child as anywhere else."""
    state = Manager(Config(name="lab", flush_interval=0), FileStorage(tmp_path))
    if before:
        async with state:
            await state.set("a", 1)

    async def use() -> int:
        async with state:
            return await state.incr("a", type=int)

    assert await in_child(lambda: asyncio.run(use())) == 1 + before
    async with state:
        assert await state.get("a") == 1 + before


async def test_a_manager_of_the_childs_own(tmp_path: Path) -> None:
    """A child is told that its parent holds the state, and can use other states of the same storage object."""
    storage = FileStorage(tmp_path)

    async def use(name: str) -> int:
        async with Manager(Config(name=name, flush_interval=0), storage) as mine:
            return await mine.set("a", 1)

    async with Manager("lab", storage):
        name, message = await in_child(lambda: error_of(lambda: asyncio.run(use("lab"))))
        assert (name, f"locked by pid {os.getpid()} on" in message) == (LockedError.__name__, True)
        assert "another manager in this process" not in message
        assert await in_child(lambda: asyncio.run(use("other"))) == 1


async def test_a_fork_while_a_thread_holds_a_lock_of_the_storage_object(tmp_path: Path) -> None:
    """A child has no such thread: its own manager starts and commits, and does not wait for the lock for ever."""
    storage = FileStorage(tmp_path)
    (tmp_path / "other.json").write_text("{}")  # without a lock file, the directory is listed

    async def use(name: str) -> int:
        async with Manager(Config(name=name, flush_interval=0), storage) as mine:
            return await mine.set("a", 1)

    def child() -> int:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a child that hangs ends
        signal.alarm(20)
        return asyncio.run(use("other"))

    (tmp_path / "lab.json").write_text("{}")
    await use("lab")
    with storage._leftovers._lock, storage._journals._lock:
        answer = begin_in_child(child)
    assert await asyncio.to_thread(answer) == 1


async def test_a_memory_storage_in_a_child_is_a_copy() -> None:
    """A manager of the child's own finds in it what was there at the fork, and the parent does not see its changes."""
    storage = MemoryStorage()

    async def use() -> Any:
        async with Manager(Config(name="lab", flush_interval=0), storage) as mine:
            return [await mine.get("a"), await mine.set("a", 2)]

    async with Manager(Config(name="lab", flush_interval=0), storage) as state:
        await state.set("a", 1)
        assert await in_child(lambda: asyncio.run(use())) == [1, 2]
        assert await state.get("a") == 1


class ClosedCache(MemoryCache):
    """Not there before it is let in."""

    is_there = False

    async def open(self, name: str, writer: str) -> Any:
        if not self.is_there:
            raise UnavailableError("not yet")
        return await super().open(name, writer)


def test_an_inherited_event_loop_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a child runs its parent's loop, whose timers and tasks it has, they write nothing and log nothing."""
    clock, cache = ManualClock(), ClosedCache()
    state = Manager(Config(name="lab", flush_interval=1), FileStorage(tmp_path), cache, clock=clock)

    async def turns() -> None:
        for _ in range(100):
            clock.advance(1)
            await asyncio.sleep(0)

    def run() -> list[Any]:
        caplog.clear()
        cache.is_there = True
        runner.run(turns())
        return [sorted(path.name for path in tmp_path.iterdir()), list(cache.mirrors), caplog.messages]

    with asyncio.Runner() as runner:
        runner.run(state.start())
        runner.run(asyncio.sleep(0))
        assert "the mirror is not up to date" in caplog.text
        runner.run(state.set("a", 1, ttl=5000))
        assert begin_in_child(run)() == [["lab.lock"], [], []]
        assert run()[1] == ["lab"]
        runner.run(state.flush())
        runner.run(state.stop())
    assert state.durable_revision == 1


def test_nothing_is_registered_before_the_first_start() -> None:
    """Importing the package, and making a manager, leaves a process's forks as they are."""
    code = (
        "import os\n"
        "calls = []\n"
        "os.register_at_fork = lambda **functions: calls.append(functions)\n"
        "import asyncio, lab_state\n"
        "state = lab_state.Manager('a', lab_state.MemoryStorage())\n"
        "assert all(functions.get('after_in_child', print).__module__ != 'lab_state._forks' for functions in calls)\n"
        "calls.clear()\n"
        "async def main():\n"
        "    for _ in range(3):\n"
        "        async with state: pass\n"
        "asyncio.run(main())\n"
        "assert [list(functions) for functions in calls] == [['after_in_child']], calls\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_what_is_gone_is_not_kept(tmp_path: Path) -> None:
    """Managers that came and went leave nothing behind to be looked at in a child."""
    before = len(forks._inherited)
    for _ in range(20):
        async with Manager("lab", FileStorage(tmp_path)) as state:
            await state.set("a", 1)
    del state
    gc.collect()
    assert len(forks._inherited) < before + 20


# Parents that are killed


@contextmanager
def killed(*command: str) -> Iterator[dict[str, Any]]:
    """Yield the output of a process that was then killed, while its children live."""
    parent = subprocess.Popen([sys.executable, forked.__file__, *command], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children: list[int] = []
    try:
        said = json.loads(parent.stdout.readline())
        children = said["children"]
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        yield said
    finally:
        parent.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
        parent.stdout.close()


async def kept(directory: Path) -> dict[str, Any]:
    """Return what a manager finds that is started now."""
    async with Manager("lab", FileStorage(directory)) as state:
        return await state.get_all()


def test_children_do_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    """After SIGKILL of the parent alone a manager starts at once, beside a pool's worker, a process and an `os.fork`."""
    with killed("children", str(tmp_path)) as said:
        assert len(said["children"]) == 3
        assert asyncio.run(kept(tmp_path)) == {"a": 1}
        for child in said["children"]:
            os.kill(child, 0)  # they are alive


@pytest.mark.parametrize("function", ["open_lock", "_sync_data", "_sync", "sync_directory"])
def test_a_fork_in_the_middle_of_a_call(tmp_path: Path, function: str) -> None:
    """Whatever a thread of the storage is doing: the child has no file open, no lock, and all is durable that was told."""
    with killed("held", str(tmp_path), function) as said:
        assert said["inherited"] == []
        found = asyncio.run(kept(tmp_path))
        assert found["c"] == 3
        assert found.keys() == ({"c"} if function == "open_lock" else {"a", "b", "c"})
        os.kill(said["children"][0], 0)


def test_a_forked_child_closes_sockets_that_uvloop_watches() -> None:
    """A socket that uvloop watches is closed in a forked child as well. There `close()` alone would not close it."""

    async def main() -> Any:
        ours, theirs = socket.socketpair()
        own = OwnSocket(fileno=ours.detach())
        loop, descriptor = asyncio.get_running_loop(), own.fileno()
        loop.add_reader(own, lambda: None)
        try:
            return await in_child(lambda: error_of(lambda: os.fstat(descriptor)))
        finally:
            loop.remove_reader(own)
            own.close()
            theirs.close()

    assert uvloop.run(main()) == ["OSError", "[Errno 9] Bad file descriptor"]
