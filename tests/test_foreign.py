"""What is not ours - loggers, clocks, storages, caches, interrupts - raises, and the tasks of a manager go on."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any

import loguru
import pytest
from mirrored import mirror_of
from running import flusher_of, idle, running, until

from lab_state import Config, Manager, MemoryCache, MemoryStorage, StorageSession, UnavailableError
from lab_state._flusher import Flusher
from lab_state._foreign import described
from lab_state._log import Log
from lab_state._watch import Watchers
from lab_state.integrations import _lifespan
from lab_state.storage import Reading, SnapshotSource
from lab_state.testing import FaultyStorage, ManualClock


class Raises(logging.Filter, logging.Handler, logging.Formatter):  # type: ignore[misc]
    """A part of logging that raises what it was given."""

    def __init__(self, problem: BaseException) -> None:
        logging.Handler.__init__(self)
        self.problem = problem
        self.asked = 0

    def _raise(self) -> Any:
        self.asked += 1
        raise self.problem

    def filter(self, record: logging.LogRecord) -> bool:
        return bool(self._raise())

    def format(self, record: logging.LogRecord) -> str:
        return str(self._raise())


class RaisingHandler(logging.Handler):
    def __init__(self, raises: Raises) -> None:
        super().__init__()
        self.raises = raises

    def emit(self, record: logging.LogRecord) -> None:
        self.raises._raise()


class FormattingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


class RaisingLogger:
    """As structlog's, where its file is full."""

    def __init__(self, raises: Raises) -> None:
        self.raises = raises

    def __getattr__(self, name: str) -> Callable[..., None]:
        def method(*args: object, **more: object) -> None:
            assert not more
            self.raises._raise()

        return method


def logger_of(kind: str, raises: Raises) -> Any:
    if kind == "logger":
        return RaisingLogger(raises)
    logger = logging.Logger("raises", logging.DEBUG)  # noqa: LOG001 -- used here only
    if kind == "filter":
        logger.addFilter(raises)
    elif kind == "handler":
        logger.addHandler(RaisingHandler(raises))
    else:
        handler = FormattingHandler()
        handler.setFormatter(raises)
        logger.addHandler(handler)
    return logger


class TestLogger:
    @pytest.mark.parametrize("kind", ["filter", "handler", "formatter", "logger"])
    @pytest.mark.parametrize("interval", [None, 0, 1.0])
    async def test_flushes_go_on(
        self, storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage, kind: str, interval: float | None
    ) -> None:
        """A failed commit and a failed checkpoint are logged in vain; writes are told, retried and made durable."""
        raises = Raises(AttributeError("request_id"))
        state = Manager(
            Config(name="test", flush_interval=interval), storage, clock=clock, logger=logger_of(kind, raises)
        )
        await state.start()
        storage.fail("commit", times=2)
        storage.fail("checkpoint")
        for _ in range(2):
            with pytest.raises(UnavailableError, match="not durable yet"):
                await asyncio.gather(state.set("a", 1), state.flush())
        await state.set("b", "x" * 100_000)
        await state.flush()
        await until(lambda: storage.calls.count("checkpoint") == 1)
        await idle()
        assert raises.asked == 5  # the start, two commits, "flushed again", a checkpoint
        assert (state.durable_revision, state.status().task_failure) == (state.revision, None)
        storage.fail("aclose")
        await state.stop()
        assert raises.asked == 7  # letting go of the storage, and the stop
        async with Manager("test", memory) as again:
            assert sorted(await again.keys()) == ["a", "b"]

    async def test_a_logger_that_is_none_of_loggings(self, storage: FaultyStorage) -> None:
        """Loguru does not know `%s`: what it is given is complete, and only UTF-8."""
        told: list[str] = []
        sink = loguru.logger.add(lambda message: told.append(message.record["message"]), level="ERROR")
        try:
            state = Manager(Config(name="test", flush_interval=None), storage, logger=loguru.logger)
            async with state:
                await state.set("a", 1)
                storage.fail("commit", error=UnavailableError("no room in /\udcff for 100 %s"))
                with pytest.raises(UnavailableError):
                    await state.flush()
        finally:
            loguru.logger.remove(sink)
        assert len(told) == 1
        assert told[0].startswith("test: a flush failed; not durable yet")
        assert told[0].endswith(r"no room in /\udcff for 100 %s")

    async def test_who_waits_is_told_first(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """When the logger is called, no caller is still waiting, whether a commit or the task ended."""
        left: list[int] = []

        class Looks(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                waiters = flusher_of(state)._waiters
                left.append(len(waiters.next) + len(waiters.current))

        logger = logging.Logger("looks")  # noqa: LOG001 -- used here only
        logger.addHandler(Looks())
        state = Manager(Config(name="test", flush_interval=None), storage, clock=clock, logger=logger)
        await state.start()
        await state.set("a", 1)
        storage.fail("commit")
        with pytest.raises(UnavailableError):
            await state.flush()
        storage.hang("commit")
        waiting = [asyncio.ensure_future(state.flush())]
        await until(lambda: storage.calls.count("commit") == 2)
        await state.set("b", 1)
        waiting.append(asyncio.ensure_future(state.flush()))
        await idle()
        flusher_of(state)._task.cancel()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, UnavailableError)
        assert left == [0, 0]
        storage.resume()
        await state.stop()

    def test_the_message_goes_to_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        """From WARNING on, with what the logger raised, and without anything where there is no last resort."""
        log = Log(logger_of("filter", Raises(OSError("full"))))
        log.info("%s is %d", "a", 1)
        log.warning("%s is %d", "b", 2)
        log.error("%s is %d", "c", 3)
        said = capsys.readouterr().err
        assert said.splitlines() == ["b is 2 (the logger raised OSError)", "c is 3 (the logger raised OSError)"]

    def test_nowhere_to_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a last resort, or where it fails too, the message is dropped."""
        log = Log(logger_of("filter", Raises(OSError("full"))))
        monkeypatch.setattr(logging, "lastResort", None)
        log.error("a")
        monkeypatch.setattr(logging, "lastResort", RaisingHandler(Raises(OSError("full"))))
        log.error("a")

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_is_not_swallowed(self, interrupt: type[BaseException]) -> None:
        """It is the program's, not the logger's; a cancellation that a logger raises is swallowed."""
        Log(logger_of("filter", Raises(asyncio.CancelledError()))).error("a")
        with pytest.raises(interrupt):
            Log(logger_of("filter", Raises(interrupt()))).error("a")

    def test_the_caller_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        """A line of the log says which line of the package it is from, as without the function between."""
        Log(logging.getLogger("lab_state")).error("a")
        assert caplog.records[0].filename == "test_foreign.py"


class BrokenClock(ManualClock):
    """Raises in the calls that are named."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[str] = set()

    def _look(self, name: str) -> None:
        if name in self.broken:
            raise LookupError(name)

    def time(self) -> float:
        self._look("time")
        return super().time()

    def monotonic(self) -> float:
        self._look("monotonic")
        return super().monotonic()

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Any:
        self._look("call_later")
        return super().call_later(delay, callback)


class TestClock:
    @pytest.mark.parametrize("name", ["time", "monotonic", "call_later"])
    async def test_flushes_go_on(
        self, storage: FaultyStorage, memory: MemoryStorage, caplog: pytest.LogCaptureFixture, name: str
    ) -> None:
        """While the clock raises, its last time stands, and commits, retries and stop() work; it is logged once."""
        clock = BrokenClock()
        state = Manager(Config(name="test", flush_interval=None), storage, clock=clock)
        await state.start()
        clock.advance(5)
        await state.set("a", 1, ttl=1000)
        clock.broken = {name}
        storage.fail("commit")
        with pytest.raises(UnavailableError):
            await state.flush()
        await state.set("b", "x" * 100_000)
        await state.flush()
        await state.set("c", 1)
        await state.stop()
        assert state.status().durable_revision == 3
        assert caplog.text.count("the clock failed; its last time is used until it answers again: LookupError") == 1
        async with Manager("test", memory) as again:
            assert len(await again.keys()) >= 2

    async def test_a_background_flush_comes_all_the_same(self, storage: FaultyStorage) -> None:
        """Where the clock sets no timers, the event loop does."""
        clock = BrokenClock()
        async with running(storage, clock, 0.01) as state:
            clock.broken = {"call_later"}
            clock.advance(0.01)  # the last timer of the clock's
            await state.set("a", 1)
            await until(lambda: state.durable_revision == 1)

    @pytest.mark.parametrize("cache", [None, MemoryCache()], ids=["without a cache", "with a cache"])
    async def test_at_the_start_it_is_told(self, memory: MemoryStorage, cache: MemoryCache | None) -> None:
        """start() raises what the clock raised, leaves no task, no timer and no lock, and may be tried again."""
        clock = BrokenClock()
        state = Manager("test", memory, cache, clock=clock)
        before = asyncio.all_tasks()
        clock.broken = {"call_later"}
        with pytest.raises(LookupError, match="call_later"):
            await state.start()
        await idle()
        assert asyncio.all_tasks() == before
        assert (state.status().phase, memory.places["test"].session) == ("new", None)
        clock.advance(100)
        clock.broken = set()
        await state.start()
        await state.set("a", 1)
        await state.stop()

    async def test_a_start_that_fails_late_leaves_nothing(
        self, memory: MemoryStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the flush task cannot begin, the mirror's task and the sweeper end with it."""
        clock = BrokenClock()
        async with Manager("test", memory, clock=clock) as state:
            await state.set("a", 1, ttl=1000)
        state = Manager("test", memory, MemoryCache(), clock=clock)
        before = asyncio.all_tasks()

        def begin(flusher: Flusher) -> None:
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(Flusher, "start", begin)
            with pytest.raises(MemoryError):
                await state.start()
        await idle()
        assert asyncio.all_tasks() == before
        assert all(timer.callback is None for _, _, timer in clock._timers)
        async with state:
            assert await state.get("a") == 1

    @pytest.mark.parametrize("name", ["MirrorWriter._run", "Flusher._run"])
    async def test_a_start_without_a_task_leaves_nothing(
        self, memory: MemoryStorage, clock: ManualClock, name: str
    ) -> None:
        """Where a task factory of the application's raises, start() does, and leaves no timer, no task and no lock."""
        loop = asyncio.get_running_loop()

        def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> Any:
            if coroutine.__qualname__ == name:
                coroutine.close()
                raise LookupError("no task")
            return asyncio.Task(coroutine, loop=loop, **more)

        state = Manager("test", memory, MemoryCache(), clock=clock)
        before = asyncio.all_tasks()
        loop.set_task_factory(factory)
        try:
            with pytest.raises(LookupError):
                await state.start()
        finally:
            loop.set_task_factory(None)
        await idle()
        assert asyncio.all_tasks() == before
        assert all(timer.callback is None for _, _, timer in clock._timers)
        assert memory.places["test"].session is None
        async with state:
            await state.set("a", 1)


class StrangeSession:
    """A storage's session that raises, once, what no storage should."""

    def __init__(self, inner: StorageSession, problem: Callable[[], BaseException], during: str) -> None:
        self._inner, self._problem, self._during = inner, problem, during
        self.recovery = inner.recovery
        self.path = inner.path
        self.snapshot_bytes = self.journal_bytes = self.progress = 0
        self.warning = None

    def _strange(self, during: str) -> None:
        if self._during == during:
            self._during = ""
            raise self._problem()

    def commit(
        self, record: bytes, snapshot: SnapshotSource
    ) -> Any:  # it raises when it is called, not when it is awaited
        self._strange("commit")
        return self._inner.commit(record, snapshot)

    def checkpoint(self, snapshot: SnapshotSource) -> Any:
        self._strange("checkpoint")
        return self._inner.checkpoint(snapshot)

    def aclose(self) -> Any:
        closing = self._inner.aclose()
        try:
            self._strange("aclose")
        except BaseException:
            closing.close()
            raise
        return closing


class StrangeStorage:
    def __init__(self, inner: MemoryStorage, problem: Callable[[], BaseException], during: str) -> None:
        self._inner, self._problem, self._during = inner, problem, during

    async def open(self, name: str) -> Any:
        return StrangeSession(await self._inner.open(name), self._problem, self._during)

    async def read(self, name: str) -> Reading:
        return await self._inner.read(name)


class UnspeakableError(UnavailableError):
    def __str__(self) -> str:
        raise LookupError("no text")


class TestStorage:
    @pytest.mark.parametrize("during", ["commit", "checkpoint"])
    @pytest.mark.parametrize("problem", [asyncio.CancelledError, MemoryError, UnspeakableError])
    async def test_flushes_go_on(
        self, memory: MemoryStorage, clock: ManualClock, problem: type[BaseException], during: str
    ) -> None:
        """A storage that cancels itself, raises before it is awaited, or has an error without a text, ends nothing."""
        state = Manager(Config(name="test", flush_interval=None), StrangeStorage(memory, problem, during), clock=clock)
        await state.start()
        await state.set("a", 1)
        if during == "commit":
            outcomes = await asyncio.gather(*(state.flush() for _ in range(3)), return_exceptions=True)
            assert {isinstance(outcome, UnavailableError) for outcome in outcomes} == {True}
        else:
            await flusher_of(state).checkpoints.write(wait=False)
        assert state.status().flush_failures >= 1
        await state.set("b", 2)
        await state.flush()
        assert (state.durable_revision, state.status().task_failure) == (2, None)
        await state.stop()
        async with Manager("test", memory) as again:
            assert await again.get_all() == {"a": 1, "b": 2}

    async def test_letting_go_ends(self, memory: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
        """Where the end of a session raises what none should, stop() returns, and says so."""
        async with Manager("test", StrangeStorage(memory, LookupError, "aclose")) as state:
            await state.set("a", 1)
        assert "the storage could not be closed: the storage call ended with LookupError" in caplog.text


class TestTasks:
    async def test_no_memory_for_a_commit(
        self, storage: FaultyStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error beside the storage call is a failed commit: who waits is told, and the next one has everything."""
        async with running(storage, clock, None) as state:
            await state.set("a", 1)
            with monkeypatch.context() as patched:
                patched.setattr(type(state._core.state), "untaken", lambda _: [0] * sys.maxsize)
                with pytest.raises(UnavailableError, match="MemoryError"):
                    await state.flush()
            await state.flush()
            assert state.durable_revision == 1

    async def test_no_task_for_a_checkpoint(self, storage: FaultyStorage, clock: ManualClock) -> None:
        """A task factory of the application's that raises ends no flush."""
        loop = asyncio.get_running_loop()

        def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> Any:
            if coroutine.__qualname__ == "Checkpoints.write":
                coroutine.close()
                raise LookupError("no task")
            return asyncio.Task(coroutine, loop=loop, **more)

        async with running(storage, clock, None) as state:
            loop.set_task_factory(factory)
            try:
                await state.set("large", "x" * 100_000)
                await state.flush()
                await until(lambda: state.status().flush_failures == 1)
            finally:
                loop.set_task_factory(None)
            await state.set("a", 1)
            await state.flush()
            await until(lambda: state.status().snapshot_bytes > 0)
            assert state.durable_revision == 2

    async def test_who_follows_cannot_be_told(
        self,
        storage: FaultyStorage,
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A commit that cannot be handed to those who watch is durable all the same, and the mirror gets it."""
        cache = MemoryCache()
        config = Config(name="test", flush_interval=None)
        async with Manager(config, storage, cache, clock=clock) as state:
            await until(lambda: mirror_of(state).up)

            def committed(watchers: Watchers, taken: object) -> bool:
                raise MemoryError

            with monkeypatch.context() as patched:
                patched.setattr(Watchers, "committed", committed)
                await state.set("a", 1)
                await state.flush()
            await until(lambda: mirror_of(state).revision == 1)
            assert "watchers and mirror missed the changes of a commit: MemoryError at " in caplog.text
            await state.set("b", 1)
            await state.flush()
            assert state.durable_revision == 2

    @pytest.mark.parametrize("call", ["add", "merge"])
    async def test_no_memory_for_the_mirror(
        self, storage: FaultyStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        """A mirror that missed a commit, or half of one, is filled anew: it never skips a change."""
        cache = MemoryCache()
        async with Manager(Config(name="test", flush_interval=None), storage, cache, clock=clock) as state:
            await until(lambda: mirror_of(state).up)
            assert state._mirror is not None
            fails = iter([MemoryError()])
            inner = getattr(state._mirror._backlog, call)

            def once(argument: Any) -> Any:
                if (problem := next(fails, None)) is not None:
                    raise problem
                return inner(argument)

            monkeypatch.setattr(state._mirror._backlog, call, once)
            await state.set("a", 1)
            await state.flush()
            await until(lambda: mirror_of(state).revision == 1)
            fills = state.metrics().operations["fill", "success"]
            assert fills == 2
            await state.set("b", 1)
            await state.flush()
            await until(lambda: mirror_of(state).revision == 2)
            assert {"a", "b"} < cache.mirrors["test"].values.keys()

    async def test_a_cache_that_cancels_itself(
        self, storage: FaultyStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cancellation inside the cache is a failure of the cache; it is tried again."""
        cache = MemoryCache()
        fails = iter([asyncio.CancelledError()])
        inner = cache.open

        async def opened(name: str, writer: str) -> Any:
            if (problem := next(fails, None)) is not None:
                raise problem
            return await inner(name, writer)

        monkeypatch.setattr(cache, "open", opened)
        async with Manager(Config(name="test", flush_interval=None), storage, cache, clock=clock) as state:
            await until(lambda: mirror_of(state).error is not None)
            await idle()
            clock.advance(0.1)
            await until(lambda: mirror_of(state).up)

    @pytest.mark.parametrize("how", ["cancelled", "interrupted"])
    async def test_the_mirrors_task_ends(
        self,
        storage: FaultyStorage,
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        how: str,
    ) -> None:
        """status(), health and the log say so; writes go on, since none waits for it."""
        state = Manager(Config(name="test", flush_interval=None), storage, MemoryCache(), clock=clock)
        await state.start()
        await until(lambda: mirror_of(state).up)
        mirror = state._mirror
        assert mirror is not None
        if how == "cancelled":
            mirror._task.cancel()
        else:
            monkeypatch.setattr(mirror, "_attempt", lambda: [0] * sys.maxsize)
            mirror._wake.set()
        await asyncio.wait({mirror._task})
        await idle()
        failure = state.status().task_failure
        what = "was cancelled" if how == "cancelled" else "failed: MemoryError at"
        assert failure is not None
        assert failure.startswith(f"the mirror task of 'test' {what}")
        assert (mirror_of(state).up, failure in caplog.text) == (False, True)
        assert _lifespan.health_of({"test": state}, 30)[0] == 503
        await state.set("a", 1)
        await state.flush()
        await state.stop()

    @pytest.mark.parametrize("how", ["cancelled", "failed"])
    async def test_a_checkpoints_task_ends(
        self, storage: FaultyStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """The checkpoint is due again, and made."""
        async with running(storage, clock, None) as state:
            storage.hang("checkpoint")
            await state.set("large", "x" * 100_000)
            await state.flush()
            await until(lambda: "checkpoint" in storage.calls)
            task = flusher_of(state).checkpoints.task
            assert task is not None
            with monkeypatch.context() as patched:
                if how == "cancelled":
                    task.cancel()
                else:
                    patched.setattr(flusher_of(state)._checkpoint_pauses, "reset", lambda: [0] * sys.maxsize)
                    storage.resume()
                await asyncio.wait({task})
                await idle()
            storage.resume()
            clock.advance(1)
            if how == "cancelled":  # a commit sees that it is due
                await state.set("a", 1)
                await state.flush()
            await until(lambda: storage.calls.count("checkpoint") == 2)
            await until(lambda: not flusher_of(state).checkpoints.due)
            assert state.status().task_failure is None

    async def test_no_memory_for_a_sweep(
        self, storage: FaultyStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next sweep comes all the same."""
        async with running(storage, clock, None) as state:
            await state.set("a", 1, ttl=0.5)
            with monkeypatch.context() as patched:
                patched.setattr(type(state._core.state), "sweep", lambda *_: [0] * sys.maxsize)
                with pytest.raises(MemoryError):  # the clock of this test passes on what a timer raises
                    clock.advance(2.0)
            assert state.revision == 1
            clock.advance(2.0)
            assert (state.revision, state.metrics().operations["expire", "success"]) == (2, 1)


def test_a_foreign_error_without_a_traceback() -> None:
    """An error that was never raised is described by its class alone."""
    assert described(LookupError("secret")) == "LookupError"
