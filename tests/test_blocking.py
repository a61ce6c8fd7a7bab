"""`Blocking`: the calls of a manager from other threads, and from the one that must not wait."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import itertools
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import httpx2
import msgspec
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from roles import InRole
from running import running, until

from lab_state import (
    Blocking,
    BlockingEntry,
    ClosedError,
    Config,
    Entry,
    FileStorage,
    InvalidKeyError,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    TypeMismatchError,
    UnavailableError,
)
from lab_state._calls import Calls
from lab_state._plain import Plain
from lab_state._reads import Reads
from lab_state._waits import Waits
from lab_state._writing import Writing
from lab_state.testing import FaultyStorage, ManualClock

R = TypeVar("R")

BEFORE = {"a": 1, "b": [2], "n": 5, "users/ann": {"age": 30}}


class User(msgspec.Struct):
    age: int


@pytest.fixture
async def state(memory: MemoryStorage, clock: ManualClock, in_role: InRole) -> AsyncIterator[Manager]:
    async with running(memory, clock, make=in_role) as manager:
        await manager.set_many(BEFORE)
        yield manager


def thread(function: Callable[[], R]) -> Future[R]:
    """Call it in a thread of its own, which knows nothing of asyncio."""
    future = Future[R]()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 -- the caller's
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a test that fails leaves none to wait for
    return future


async def in_raw_thread(function: Callable[[], R]) -> R:
    return await asyncio.wrap_future(thread(function))


async def in_executor(function: Callable[[], R]) -> R:
    return await asyncio.get_running_loop().run_in_executor(None, function)


THREADS: dict[str, Callable[[Callable[[], Any]], Awaitable[Any]]] = {
    "a raw thread": in_raw_thread,
    "asyncio.to_thread": asyncio.to_thread,
    "an executor": in_executor,
    "an anyio worker thread": anyio.to_thread.run_sync,
}


# The calls


SAME: dict[str, list[Callable[[Any], Any]]] = {
    "get": [
        lambda calls: calls.get("b"),
        lambda calls: calls.get("users/ann", type=User),
        lambda calls: calls.get("nope", None),
        lambda calls: calls.get("nope"),
        lambda calls: calls.get("users/ann", type=dict[str, str]),
    ],
    "get_many": [lambda calls: calls.get_many(["n", "nope", "a"]), lambda calls: calls.get_many("abc")],
    "get_all": [lambda calls: calls.get_all("users/", type=User), lambda calls: calls.get_all(type=int)],
    "check": [lambda calls: calls.check(type=str), lambda calls: calls.check(type=str, limit=0)],
    "exists": [lambda calls: calls.exists("a"), lambda calls: calls.exists("")],
    "keys": [lambda calls: calls.keys("users/"), lambda calls: calls.keys()],
    "expires_in": [
        lambda calls: calls.expires_in("a"),
        lambda calls: calls.expires_in("nope"),
        lambda calls: calls.expires_in("nope", None),
    ],
    "set": [
        lambda calls: calls.set("a", {"x": [1, None]}),
        lambda calls: calls.set("new", 1.5, ttl=60),
        lambda calls: calls.set("new", {"x": [float("nan")]}),
        lambda calls: calls.set("x" * 1025, 1),
    ],
    "set_many": [
        lambda calls: calls.set_many({"a": 9, "new": 1}, ttl=timedelta(minutes=1)),
        lambda calls: calls.set_many({"a": 9, "bad": [object()]}),
    ],
    "delete": [lambda calls: calls.delete("a"), lambda calls: calls.delete("nope")],
    "touch": [lambda calls: calls.touch("a", 5), lambda calls: calls.touch("nope", None)],
    "delete_many": [lambda calls: calls.delete_many(["a", "nope", "n"])],
    "delete_all": [lambda calls: calls.delete_all(), lambda calls: calls.delete_all("users/")],
    "pop": [lambda calls: calls.pop("b"), lambda calls: calls.pop("nope")],
    "update": [
        lambda calls: calls.update("n", lambda n: n * 2, type=int),
        lambda calls: calls.update("n", lambda n: n // 0),
        lambda calls: calls.update("b", lambda n: n.append(1)),
        lambda calls: calls.update("n", lambda n: n + 1, ttl=60),
    ],
    "get_or_set": [lambda calls: calls.get_or_set("new", lambda: User(1), type=User, ttl=60)],
    "set_if_absent": [lambda calls: calls.set_if_absent("a", 2), lambda calls: calls.set_if_absent("new", 2)],
    "incr": [
        lambda calls: calls.incr("n", 0.5),
        lambda calls: calls.incr("b"),
        lambda calls: calls.incr("n", type=int),
        lambda calls: calls.incr("n", 0.5, type=int),
    ],
    "flush": [lambda calls: calls.flush()],
    "wait_durable": [
        lambda calls: calls.wait_durable(9),
        lambda calls: calls.wait_durable("x"),
        lambda calls: calls.wait_durable(timeout=0),
    ],
    "catch_up": [lambda calls: calls.catch_up()],
    "wait_revision": [
        lambda calls: calls.wait_revision(0),
        lambda calls: calls.wait_revision("x"),
        lambda calls: calls.wait_revision(99, timeout=0),
    ],
}
"""Each call, as it is made of a manager and of `blocking`."""


def test_every_call_is_lifted() -> None:
    """Every coroutine function of a manager's calls is one of `Blocking` too, with its name and description."""
    calls = {
        name: function
        for cls in (Reads, Writing, Waits, Calls)
        for name, function in vars(cls).items()
        if name[0] != "_" and inspect.iscoroutinefunction(function)
    }
    lifted = {name: getattr(Blocking, name) for cls in (Plain, Blocking) for name in vars(cls) if name[0] != "_"}
    for name in ("entry", "items", "namespace"):  # they make handles and iterators, and wait for nothing
        del lifted[name]
    assert lifted.keys() == calls.keys() == SAME.keys()
    for name, function in lifted.items():
        assert (function.__name__, function.__doc__) == (name, calls[name].__doc__)


@pytest.mark.parametrize("name", ["get", "get_many", "pop", "set", "update", "incr", "wait_durable"])
def test_help_shows_the_arguments(name: str) -> None:
    """`help()` and editors show the arguments of the call. Frameworks still see a plain function, not a coroutine function."""
    lifted = getattr(Blocking, name)
    assert inspect.signature(lifted) == inspect.signature(getattr(Calls, name))
    assert not inspect.iscoroutinefunction(inspect.unwrap(lifted))


async def outcome(call: Callable[[], Any]) -> tuple[object, ...]:
    """Return what a call gave, or how it failed."""
    try:
        result = call()
        return (await result if inspect.isawaitable(result) else result,)
    except Exception as error:  # noqa: BLE001 -- it is compared
        return type(error), str(error), getattr(error, "path", None)


@pytest.mark.parametrize("name", SAME)
async def test_each_call_is_that_of_the_manager(name: str, clock: ManualClock) -> None:
    """It gives the same result or error, with its path, and leaves the same behind."""
    for call in SAME[name]:
        async with running(MemoryStorage(), clock) as one, running(MemoryStorage(), clock) as other:
            await one.set_many(BEFORE)
            await other.set_many(BEFORE)
            expected = await outcome(lambda call=call: call(one))  # type: ignore[misc]
            assert await outcome(lambda call=call: asyncio.to_thread(call, other.blocking)) == expected  # type: ignore[misc]
            left = {key: await one.expires_in(key) for key in await one.keys()}
            assert {key: await other.expires_in(key) for key in await other.keys()} == left
            assert await other.get_all() == await one.get_all()
            assert (other.revision, other.durable_revision) == (one.revision, one.durable_revision)


@pytest.mark.parametrize("where", THREADS)
async def test_from_every_kind_of_thread(state: Manager, where: str) -> None:
    """From each kind of thread, a write is visible to all, and an error goes to the thread that caused it."""
    run, calls = THREADS[where], state.blocking
    assert await run(lambda: calls.incr("n")) == 6
    assert await state.get("n") == 6
    assert await run(lambda: calls.get("users/ann", type=User)) == User(30)
    with pytest.raises(TypeMismatchError) as error:
        await run(lambda: calls.get("b", type=list[str]))
    assert error.value.path == "$[0]"
    with pytest.raises(KeyNotFoundError):
        await run(lambda: calls.get("nope"))
    assert await asyncio.gather(*(run(lambda: calls.incr("many")) for _ in range(20)))
    assert await state.get("many") == 20


async def test_functions_run_on_the_event_loop(state: Manager) -> None:
    """A function given to update or get_or_set is called where the manager is, between two turns."""
    seen: list[threading.Thread] = []

    def make(*_: object) -> int:
        seen.append(threading.current_thread())
        return 7

    assert await asyncio.to_thread(state.blocking.update, "n", make) == 7
    assert await asyncio.to_thread(state.blocking.get_or_set, "new", make) == 7
    assert seen == [threading.current_thread()] * 2


async def test_a_call_with_the_wrong_arguments_is_a_type_error(state: Manager) -> None:
    """At once, and nothing is left behind."""
    with pytest.raises(TypeError):
        await asyncio.to_thread(state.blocking.delete)  # type: ignore[call-arg]
    with pytest.raises(InvalidKeyError):
        await asyncio.to_thread(state.blocking.set, 5, 1)  # type: ignore[arg-type]


async def test_it_may_be_kept(memory: MemoryStorage, clock: ManualClock) -> None:
    """Made before the start, it works whenever the manager runs, and is true."""
    state = Manager("test", memory, clock=clock)
    calls = state.blocking
    assert calls
    for expected in (1, 2):
        async with state:
            assert await asyncio.to_thread(calls.incr, "n") == expected


# Its handles


async def test_how_many_keys_and_which(state: Manager) -> None:
    """`len` and `in` are answered by the event loop, in a namespace too."""
    calls = state.blocking
    assert await asyncio.to_thread(len, calls) == 4
    assert await asyncio.to_thread(lambda: ("a" in calls, "nope" in calls, 5 in calls)) == (True, False, False)
    users = calls.namespace("users")
    assert await asyncio.to_thread(lambda: (len(users), "ann" in users, "a" in users)) == (1, True, False)
    for call in (len, lambda calls: "a" in calls):
        with pytest.raises(RuntimeError, match="await the call of the manager itself"):
            call(calls)


async def test_a_namespace_of_it(state: Manager) -> None:
    """Keys leave the prefix out; namespaces nest; a name out of bounds is refused at once."""
    users = state.blocking.namespace("users")
    assert await asyncio.to_thread(users.get, "ann", type=User) == User(30)
    await asyncio.to_thread(users.namespace("deep").set, "x", 1)
    assert await state.get("users/deep/x") == 1
    with pytest.raises(InvalidKeyError):
        state.blocking.namespace("")
    with pytest.raises(TypeError):
        state.blocking.namespace(5)  # type: ignore[arg-type]


ENTRY_CALLS: dict[str, list[Callable[[Any], Any]]] = {
    "get": [lambda entry: entry.get()],
    "exists": [lambda entry: entry.exists()],
    "expires_in": [lambda entry: entry.expires_in(), lambda entry: entry.expires_in(-1.0)],
    "set": [lambda entry: entry.set(5, ttl=60), lambda entry: entry.set(1j)],
    "set_if_absent": [lambda entry: entry.set_if_absent(5, ttl=60)],
    "update": [lambda entry: entry.update(lambda n: n + 1, ttl=60), lambda entry: entry.update(str)],
    "incr": [lambda entry: entry.incr(), lambda entry: entry.incr(5, ttl=60), lambda entry: entry.incr(0.5)],
    "touch": [lambda entry: entry.touch(60), lambda entry: entry.touch(0)],
    "delete": [lambda entry: entry.delete()],
    "pop": [lambda entry: entry.pop()],
}


def test_an_entry_has_every_call_of_an_entry() -> None:
    """With the same arguments and result; and nothing else."""
    names = {name for name, fn in vars(Entry).items() if name[0] != "_" and inspect.iscoroutinefunction(fn)}
    mine = {name for name, fn in vars(BlockingEntry).items() if name[0] != "_" and inspect.isfunction(fn)}
    assert mine == names == ENTRY_CALLS.keys()
    for name in names:
        assert (
            inspect.signature(getattr(BlockingEntry, name)).parameters.keys()
            == inspect.signature(getattr(Entry, name)).parameters.keys()
        )


@pytest.mark.parametrize("default", [{}, {"default": 7}], ids=["no default", "default"])
@pytest.mark.parametrize("key", ["n", "b", "new"])
@pytest.mark.parametrize("name", ENTRY_CALLS)
async def test_each_call_of_an_entry_is_that_of_the_entry(
    name: str, key: str, default: dict[str, int], clock: ManualClock
) -> None:
    """It gives the same result or error, and leaves the same behind."""
    for call in ENTRY_CALLS[name]:
        async with running(MemoryStorage(), clock) as one, running(MemoryStorage(), clock) as other:
            await one.set_many(BEFORE)
            await other.set_many(BEFORE)
            expected = await outcome(lambda call=call: call(one.entry(key, int, **default)))  # type: ignore[misc]
            entry = other.blocking.entry(key, int, **default)
            assert await outcome(lambda call=call, entry=entry: asyncio.to_thread(call, entry)) == expected  # type: ignore[misc]
            assert await other.get_all() == await one.get_all()
            assert await other.expires_in(key, None) == await one.expires_in(key, None)


async def test_an_entry_is_made_anywhere_and_checked_at_once(memory: MemoryStorage, clock: ManualClock) -> None:
    """Before the start, on the event loop, in a namespace; a wrong key or type is refused there."""
    state = Manager("test", memory, clock=clock)
    entry = state.blocking.namespace("users").entry("n", int, default=None)
    assert entry.key == "n"
    async with state:
        assert await asyncio.to_thread(entry.get) is None
        await asyncio.to_thread(entry.set, 5)
        assert await state.get("users/n") == 5
    with pytest.raises(InvalidKeyError):
        state.blocking.entry("", int)
    with pytest.raises(TypeError):
        state.blocking.entry("n", object)


def test_what_they_say_of_themselves(memory: MemoryStorage) -> None:
    """The repr has the prefix, the name of the state, the key and the type; never a value."""
    calls = Manager("test", memory).blocking
    assert repr(calls) == "<Blocking of 'test'>"
    assert repr(calls.namespace("users")) == "<Blocking 'users/' of 'test'>"
    assert repr(calls.entry("n", int, default=5)) == "<BlockingEntry 'n' of <class 'int'>>"


# From the event loop itself


async def test_from_the_loop_that_it_would_wait_for(state: Manager) -> None:
    """RuntimeError that says what to do: from a coroutine, a callback, and a function given to a call."""
    expected = "'test' would wait for the event loop that it was made on: await the call of the manager itself"
    with pytest.raises(RuntimeError, match=expected):
        state.blocking.set("a", 2)
    with pytest.raises(RuntimeError, match=expected):
        state.namespace("x").blocking.get("a")
    called: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def callback() -> None:
        try:
            state.blocking.get("a")
        except RuntimeError as error:
            called.set_exception(error)

    asyncio.get_running_loop().call_soon(callback)
    with pytest.raises(RuntimeError, match=expected):
        await called
    with pytest.raises(RuntimeError, match=expected):
        await asyncio.to_thread(state.blocking.update, "n", lambda _: state.blocking.get("a"))
    assert (await state.get("a"), await state.get("n"), state.revision) == (1, 5, 1)


@pytest.mark.parametrize("where", ["asyncio.to_thread", "an anyio worker thread"])
async def test_from_inside_a_transaction(state: Manager, where: str) -> None:
    """A thread that was started with the transaction's context is inside of it: a write would wait for itself."""
    async with state.transaction() as tx:
        tx.set("a", 2)
        with pytest.raises(RuntimeError, match="a transaction of 'test' is open here"):
            await THREADS[where](lambda: state.blocking.set("a", 3))
        context = copy_context()
        with pytest.raises(RuntimeError, match="a transaction of 'test' is open here"):
            await in_raw_thread(lambda: context.run(state.blocking.set, "a", 3))
        assert await THREADS[where](lambda: state.blocking.get("a")) == 1
    assert (await state.get("a"), state.revision) == (2, 2)


# Before the start, after the stop, and over it


async def test_before_the_start_and_after_the_stop(memory: MemoryStorage, clock: ManualClock) -> None:
    """ClosedError from every call, from the loop's own thread too."""
    state = Manager("test", memory, clock=clock)
    for _ in range(2):
        for calls in SAME.values():
            with pytest.raises(ClosedError):
                await asyncio.to_thread(calls[0], state.blocking)
        with pytest.raises(ClosedError):
            state.blocking.get("a")
        async with state:
            pass


async def test_a_write_that_waits_over_a_stop_returns_when_it_is_durable(
    storage: FaultyStorage, memory: MemoryStorage, clock: ManualClock
) -> None:
    """The last flush is what it waited for."""
    async with running(storage, clock, 0) as state:
        storage.hang("commit")
        calls = [asyncio.create_task(in_raw_thread(lambda n=n: state.blocking.set(f"key {n}", n))) for n in range(5)]  # type: ignore[misc]
        await until(lambda: state.revision == 5)
        stop = asyncio.create_task(state.stop())
        await until(lambda: state.status().phase == "stopping")
        storage.resume()
        assert sorted(await asyncio.gather(*calls)) == [1, 2, 3, 4, 5]
        await stop
    async with running(memory, clock) as state:
        assert len(state) == 5


async def test_a_write_that_a_stop_gives_up_is_told(storage: FaultyStorage, clock: ManualClock) -> None:
    """Where the storage hangs for longer than stop may take, the thread has the error, and goes on."""
    async with running(storage, clock, 0) as state:
        storage.hang("commit")
        call = asyncio.create_task(in_raw_thread(lambda: state.blocking.set("a", 1)))
        await until(lambda: "commit" in storage.calls)
        stop = asyncio.create_task(state.stop())
        await until(lambda: clock._timers and state.status().phase == "stopping")
        clock.advance(60)
        with pytest.raises(UnavailableError, match="not durable"):
            await call
        with pytest.raises(UnavailableError):
            await stop
        storage.resume()


async def test_who_waits_for_a_transaction_is_told_of_the_stop(state: Manager) -> None:
    """ClosedError, from every thread that waited for its turn."""
    with pytest.raises(ClosedError):
        async with state.transaction() as tx:
            tx.set("n", 0)
            calls = [asyncio.create_task(in_raw_thread(lambda: state.blocking.incr("n"))) for _ in range(5)]
            await until(lambda: len(state._core._lock._waiters or ()) == 5)
            await state.stop()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [ClosedError] * 5


async def test_threads_that_never_pause_end_with_the_manager(memory: MemoryStorage, clock: ManualClock) -> None:
    """Each call of theirs returns or raises ClosedError; what returned is kept."""
    told = [0] * 4

    def write(number: int, calls: Blocking) -> None:
        for told[number] in itertools.count():
            calls.set(f"key {number}", told[number] + 1)

    async with running(memory, clock) as state:
        threads = [asyncio.create_task(in_raw_thread(lambda n=n: write(n, state.blocking))) for n in range(4)]  # type: ignore[misc]
        await until(lambda: all(count > 20 for count in told))
    for result in await asyncio.gather(*threads, return_exceptions=True):
        assert type(result) is ClosedError
    async with running(memory, clock) as state:
        assert await state.get_all() == {f"key {number}": count for number, count in enumerate(told)}


# A loop that ends without a stop


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads check often whether the loop still runs."""
    monkeypatch.setattr("lab_state.blocking._LOOK_AGAIN", 0.001)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Yield a loop that the test itself ends."""
    loop = asyncio.new_event_loop()
    yield loop
    if not loop.is_closed():
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def started(loop: asyncio.AbstractEventLoop, storage: FaultyStorage, clock: ManualClock) -> Manager:
    """Return a manager on that loop whose next commit hangs."""
    state = Manager(Config(name="test", flush_interval=0), storage, clock=clock)
    loop.run_until_complete(state.start())
    storage.hang("commit")
    return state


async def committing(storage: FaultyStorage) -> None:
    await until(lambda: "commit" in storage.calls)


@pytest.mark.usefixtures("_impatient")
class TestLoopEnded:
    ENDED = "the event loop of the manager does not run; wait for all threads that use `blocking` before you stop the event loop"

    def test_by_asyncio_run(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """It cancels what is under way, so the thread is told at once."""
        storage.hang("commit")
        state, go = Manager(Config(name="test", flush_interval=0), storage, clock=clock), threading.Event()
        call = thread(lambda: go.wait() and state.blocking.set("a", 1))

        async def main() -> None:
            await state.start()
            go.set()
            await committing(storage)

        asyncio.run(main())
        with pytest.raises(ClosedError, match=self.ENDED):
            call.result()
        with pytest.raises(ClosedError, match=self.ENDED):
            state.blocking.get("a")
        asyncio.run(state.stop())

    def test_without_a_word(
        self,
        loop: asyncio.AbstractEventLoop,
        storage: FaultyStorage,
        clock: ManualClock,
    ) -> None:
        """The loop is closed while the call runs, without a cancellation: the thread notices by itself."""
        state = started(loop, storage, clock)
        call = thread(lambda: _when_running(loop, lambda: state.blocking.set("a", 1)))
        loop.run_until_complete(committing(storage))
        loop.close()
        with pytest.raises(ClosedError, match=self.ENDED):
            call.result()
        with pytest.raises(ClosedError, match=self.ENDED):
            state.blocking.set("a", 2)
        asyncio.run(state.stop())

    def test_that_pauses(
        self,
        loop: asyncio.AbstractEventLoop,
        storage: FaultyStorage,
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A loop that does not run gives no answer, and is not asked; when it runs again, the manager goes on."""
        state = started(loop, storage, clock)
        call = thread(lambda: _when_running(loop, lambda: state.blocking.set("a", 1)))
        loop.run_until_complete(committing(storage))
        with pytest.raises(ClosedError, match=self.ENDED):
            call.result()
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "run_coroutine_threadsafe", lambda *_: pytest.fail("it was asked"))
            with pytest.raises(ClosedError, match=self.ENDED):
                state.blocking.set("a", 9)
        storage.resume()
        loop.run_until_complete(state.wait_durable(1))
        call = thread(lambda: _when_running(loop, lambda: state.blocking.set("a", 2)))
        assert loop.run_until_complete(asyncio.wrap_future(call, loop=loop)) == 2
        loop.run_until_complete(state.stop())

    @pytest.mark.parametrize("closed", [True, False])
    def test_before_the_call_began(
        self,
        loop: asyncio.AbstractEventLoop,
        storage: FaultyStorage,
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
        closed: bool,  # noqa: FBT001 -- a parameter
    ) -> None:
        """A call that the loop was asked for and never began is ClosedError, and leaves no coroutine behind."""
        state, submitted = started(loop, storage, clock), threading.Event()
        submit = asyncio.run_coroutine_threadsafe

        def and_tell(*arguments: Any) -> Future[Any]:
            future = submit(*arguments)
            submitted.set()
            return future

        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", and_tell)
        call = thread(lambda: _when_running(loop, lambda: state.blocking.set("a", 1)))

        def end() -> None:
            submitted.wait()
            loop.stop()

        loop.call_soon(end)
        loop.run_forever()
        if closed:
            loop.close()
        with pytest.raises(ClosedError, match=self.ENDED):
            call.result()
        del call
        gc.collect()
        monkeypatch.undo()
        assert state.revision == 0
        storage.resume()
        if closed:
            asyncio.run(state.stop())
        else:
            loop.run_until_complete(state.stop())


async def test_a_loop_that_was_closed_since_the_thread_looked(state: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """ClosedError too, and no coroutine is left behind."""

    def closed(*_: object) -> None:
        raise RuntimeError("Event loop is closed")

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "run_coroutine_threadsafe", closed)
        with pytest.raises(ClosedError, match=TestLoopEnded.ENDED):
            await in_raw_thread(lambda: state.blocking.set("a", 2))
    gc.collect()
    assert await state.get("a") == 1


def _when_running(loop: asyncio.AbstractEventLoop, call: Callable[[], R]) -> R:
    """Make the call as soon as the loop runs."""
    runs = threading.Event()
    loop.call_soon_threadsafe(runs.set)
    runs.wait()
    return call()


async def test_a_thread_that_is_interrupted_leaves_its_call_to_go_on(
    storage: FaultyStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a KeyboardInterrupt: the exception is the thread's, and the write becomes durable all the same."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    async with running(storage, clock, 0) as state:
        with monkeypatch.context() as patch:
            patch.setattr(concurrent.futures, "wait", interrupted)
            storage.hang("commit")
            with pytest.raises(KeyboardInterrupt):
                await in_raw_thread(lambda: state.blocking.set("a", 1))
        await until(lambda: state.revision == 1)
        storage.resume()
        await state.wait_durable(1)
        assert await state.get("a") == 1


# All the threads there are


@contextmanager
def full_executor() -> Iterator[None]:
    """Fill the loop's default executor, so that it has no thread left."""
    loop, release = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    loop.run_in_executor(None, release.wait)
    try:
        yield
    finally:
        release.set()


@pytest.mark.parametrize("where", THREADS)
async def test_fifty_durable_writes_at_once(tmp_path: Path, where: str) -> None:
    """Threads that wait for a durable write hold every thread of their pool, and none that the write needs."""
    async with Manager(Config(name="test", flush_interval=0), FileStorage(tmp_path)) as state:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(50))
        calls = [THREADS[where](lambda: state.blocking.incr("n")) for _ in range(50)]
        assert sorted(await asyncio.gather(*calls)) == list(range(1, 51))
        assert state.durable_revision == 50
    async with Manager("test", FileStorage(tmp_path)) as state:
        assert await state.get("n") == 50


@pytest.mark.parametrize("where", ["a raw thread", "an anyio worker thread"])
async def test_a_full_executor_holds_nothing_up(tmp_path: Path, where: str) -> None:
    """Start, fifty durable writes and stop need no thread of the loop's default executor."""
    with full_executor():
        async with Manager(Config(name="test", flush_interval=0), FileStorage(tmp_path)) as state:
            calls = [THREADS[where](lambda: state.blocking.incr("n")) for _ in range(50)]
            assert sorted(await asyncio.gather(*calls)) == list(range(1, 51))


# Behind FastAPI


def application(directory: Path) -> FastAPI:
    """Return an application with plain `def` endpoints, which FastAPI calls in threads."""
    state = Manager(Config(name="test", flush_interval=0), FileStorage(directory))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with state:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/count")
    def count() -> int:
        return state.blocking.incr("n", type=int)

    @app.get("/count")
    def read() -> int:
        return state.blocking.get("n", 0, type=int)

    @app.get("/wrong")
    async def wrong() -> str:
        try:
            state.blocking.get("n")
        except RuntimeError as error:
            return str(error)
        raise AssertionError

    return app


def test_def_endpoints(tmp_path: Path) -> None:
    """They use `blocking`; an `async def` endpoint that does is told what to do instead."""
    for expected in (1, 2):
        with TestClient(application(tmp_path)) as client:
            assert client.post("/count").json() == expected
            assert client.get("/count").json() == expected
            assert "await the call of the manager itself" in client.get("/wrong").json()


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Run a server on this loop."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def test_fifty_requests_at_once(tmp_path: Path) -> None:
    """More than there are worker threads, each waiting for its durable write, beside a full executor: all are served."""
    async with (
        serving(application(tmp_path)) as url,
        httpx2.AsyncClient(base_url=url, timeout=None, trust_env=False) as client,
    ):
        with full_executor():
            answers = await asyncio.gather(*(client.post("/count") for _ in range(50)))
        assert sorted(answer.json() for answer in answers) == list(range(1, 51))
        assert (await client.get("/count")).json() == 50
    async with Manager("test", FileStorage(tmp_path)) as state:
        assert await state.get("n") == 50
