"""The manager against a dict: transactions, expiry, failed flushes, crashes and restarts, on both local storages."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from itertools import permutations
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from roles import InRole, Role, SharedManager
from running import flusher_of, idle, until

from lab_state import (
    Config,
    FileStorage,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    Storage,
    StorageSession,
    Transaction,
    UnavailableError,
    _batch,
    _writing,
)
from lab_state.storage import _file_writer
from lab_state.storage.file import FileSession
from lab_state.testing import FaultyStorage, ManualClock

SHARED = int(os.environ.get("LAB_STATE_SHARED_EXAMPLES", "12"))
"""The number of examples for each role in a shared state."""

PREFIXES = ("", "a", "a/", "none")
COUNTERS = ("n", "a/n")
KEYS = ("a", "b", "a/x", "a/y", "ü", "$")
ANY_KEYS = st.sampled_from(KEYS + COUNTERS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TTLS = st.integers(1, 40)
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(KEYS), VALUES),
    st.tuples(st.just("expiring"), st.sampled_from(KEYS), TTLS),
    st.tuples(st.just("incr"), st.sampled_from(COUNTERS), st.integers()),
    st.tuples(st.just("delete"), ANY_KEYS, st.none()),
    st.tuples(st.just("delete_all"), st.sampled_from(PREFIXES), st.none()),
)
PAGES = st.fixed_dictionaries(
    {
        "prefix": st.sampled_from(PREFIXES),
        "after": st.none() | st.sampled_from((*KEYS, "a/xx", "\U0010ffff")),
        "limit": st.none() | st.integers(1, 4),
        "reverse": st.booleans(),
    }
)
MOMENTS = st.sampled_from(["before", "after"])
Moment = Literal["before", "after"]


class StopItError(Exception):
    """What a function given to `update`, or the body of a transaction, raises."""


class Model(dict[str, Any]):
    """What the state must hold.

    Attributes:
        expires: When a key expires, in milliseconds.
    """

    def __init__(self, values: dict[str, Any], expires: dict[str, int]) -> None:
        super().__init__(values)
        self.expires = dict(expires)

    def twin(self) -> Model:
        return Model(self, self.expires)

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a key as `set` does: without an expiry."""
        super().__setitem__(key, value)
        self.expires.pop(key, None)

    def replace(self, key: str, value: Any) -> None:
        """Set a key as `update` does: an expiry stays."""
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.expires.pop(key, None)

    def remove_keys(self, keys: list[str]) -> set[str]:
        """Remove those that are there."""
        found = {key for key in keys if key in self}
        for key in found:
            del self[key]
        return found

    def page(self, *, prefix: str, after: str | None, limit: int | None, reverse: bool, cut: int = 0) -> dict[str, Any]:
        """Return what `get_all` must return, in order. The prefix is that of the namespace, and more."""
        names = sorted((name for name in self if name.startswith(prefix)), reverse=reverse)
        if after is not None:
            behind = prefix[:cut] + after
            names = [name for name in names if (name < behind if reverse else name > behind)]
        return {name[cut:]: self[name] for name in names[:limit]}

    def live(self, now: int) -> Model:
        return Model(
            {key: value for key, value in self.items() if self.expires.get(key, now + 1) > now},
            {key: at for key, at in self.expires.items() if at > now},
        )


class ManagerMachine(RuleBasedStateMachine):
    """One state and its model.

    Attributes:
        model: What the state must hold.
        revision: The number of the last change.
        history: What the state held at each revision since the last start.
        acknowledged: The revision that a flush has promised.
    """

    large = 0
    """A value of so many characters makes a checkpoint due."""

    def make_storage(self) -> Storage:
        raise NotImplementedError

    def crash(self, session: StorageSession) -> None:
        """Let the next start in, as the death of the process would; write nothing."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.storage = FaultyStorage(self.make_storage())
        self.clock = ManualClock()
        self.model = Model({}, {})
        self.revision = self.acknowledged = 0
        self.history: dict[int, Model] = {0: self.model.twin()}
        self.start()

    def teardown(self) -> None:
        self.crash(self.runner.run(self._crash()))
        self.runner.close()

    def make(self, config: Config) -> Manager:
        return Manager(config, self.storage, clock=self.clock)

    def start(self) -> None:
        self.state = self.make(Config(name="state", flush_interval=None, stop_timeout=1e9))
        self.runner.run(self.state.start())

    async def settle(self) -> None:
        """Wait for what happens in the background, if it could change the revision later."""

    def check_durable(self) -> None:
        """Check, after a clean restart, that everything from before is durable, and no change since then."""
        assert self.state.durable_revision == self.revision

    def now(self) -> int:
        return self.state._core.state.now()

    def write_time(self) -> None:
        """Make a change if keys expire. Otherwise a stop may write nothing, and the next start has only the time of the last write."""
        if self.model.expires or self.has_expired():
            self.set("$", None)

    def has_expired(self) -> bool:
        """Return whether expired keys are still stored. To delete them with all keys is a change, as a sweep is."""
        return len(self.state._core.state.entries) > len(self.model)

    def began_again(self) -> None:
        """Follow a start: keys that have expired by the wall clock are gone, which may be one more change."""
        self.model = self.model.live(self.now())
        while self.revision < self.state.revision:
            self.changed()

    def changed(self, *, whether: bool = True) -> None:
        """Count one more revision after a call, if it changed anything."""
        self.revision += whether
        self.history[self.revision] = self.model.twin()

    async def _crash(self) -> StorageSession:
        flusher = flusher_of(self.state)
        session = flusher.abort()
        await asyncio.wait([task for task in (flusher._task, flusher.checkpoints.task) if task is not None])
        return session._inner  # type: ignore[attr-defined,no-any-return]  # what `FaultyStorage` wraps

    # Writing

    @rule(key=st.sampled_from(KEYS), value=VALUES)
    def set(self, key: str, value: Any) -> None:
        self.model[key] = value
        self.changed()
        assert self.runner.run(self.state.set(key, value)) == self.revision

    @rule(key=st.sampled_from(KEYS))
    def set_large(self, key: str) -> None:
        self.set(key, "x" * self.large)

    @rule(values=st.dictionaries(st.sampled_from(KEYS), VALUES))
    def set_many(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self.model[key] = value
        self.changed(whether=bool(values))
        assert self.runner.run(self.state.set_many(values)) == self.revision

    @rule(key=ANY_KEYS)
    def delete(self, key: str) -> None:
        was_there = bool(self.model.remove_keys([key]))
        assert self.runner.run(self.state.delete(key)) is was_there
        self.changed(whether=was_there)

    @rule(keys=st.lists(ANY_KEYS, max_size=5))
    def delete_many(self, keys: list[str]) -> None:
        found = self.model.remove_keys(keys)
        assert self.runner.run(self.state.delete_many(keys)) == len(found)
        self.changed(whether=bool(found))

    @rule(prefix=st.sampled_from(PREFIXES))
    def delete_all(self, prefix: str) -> None:
        found = self.model.remove_keys([key for key in self.model if key.startswith(prefix)])
        has_expired = self.has_expired()
        assert self.runner.run(self.state.delete_all(prefix)) == len(found)
        self.changed(whether=bool(found) or (not prefix and has_expired))

    @rule(key=ANY_KEYS)
    def pop(self, key: str) -> None:
        expected = self.model.get(key)
        was_there = bool(self.model.remove_keys([key]))
        assert self.runner.run(self.state.pop(key, None)) == expected
        self.changed(whether=was_there)

    @rule(key=st.sampled_from(KEYS), value=VALUES)
    def update(self, key: str, value: Any) -> None:
        self.model.replace(key, [self.model.get(key), value])
        assert self.runner.run(self.state.update(key, lambda old: [old, value], None)) == self.model[key]
        self.changed()

    @rule(key=st.sampled_from(KEYS))
    def failed_update(self, key: str) -> None:
        def fail(_: object) -> object:
            raise StopItError

        with pytest.raises(StopItError if key in self.model else KeyNotFoundError):
            self.runner.run(self.state.update(key, fail))

    @rule(key=st.sampled_from(COUNTERS), delta=st.integers(-(2**70), 2**70))
    def incr(self, key: str, delta: int) -> None:
        self.model.replace(key, self.model.get(key, 0) + delta)
        assert self.runner.run(self.state.incr(key, delta)) == self.model[key]
        self.changed()

    @rule(key=st.sampled_from(KEYS), value=VALUES)
    def set_if_absent(self, key: str, value: Any) -> None:
        absent = key not in self.model
        if absent:
            self.model[key] = value
        assert self.runner.run(self.state.set_if_absent(key, value)) is absent
        self.changed(whether=absent)

    @rule(key=st.sampled_from(KEYS), value=VALUES)
    def get_or_set(self, key: str, value: Any) -> None:
        absent = key not in self.model
        if absent:
            self.model[key] = value
        assert self.runner.run(self.state.get_or_set(key, lambda: value)) == self.model[key]
        self.changed(whether=absent)

    # Reading

    @rule(page=PAGES)
    def read_page(self, page: dict[str, Any]) -> None:
        """Read a page in each way."""
        expected = list(self.model.page(**page).items())
        assert list(self.runner.run(self.state.get_all(**page)).items()) == expected
        assert list(self.state.get_all_nowait(**page).items()) == expected
        assert (
            self.runner.run(self.state.keys(**page)) == self.state.keys_nowait(**page) == [key for key, _ in expected]
        )

    @rule(page=PAGES)
    def read_page_of_a_namespace(self, page: dict[str, Any]) -> None:
        """Read a page of a namespace, whose keys are relative to it."""
        space = self.state.namespace("a")
        expected = list(self.model.page(**{**page, "prefix": "a/" + page["prefix"]}, cut=2).items())
        assert list(self.runner.run(space.get_all(**page)).items()) == expected
        assert self.runner.run(space.keys(**page)) == [key for key, _ in expected]
        assert len(space) == sum(key.startswith("a/") for key in self.model)

    @rule(
        values=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1),
        keys=st.lists(ANY_KEYS, min_size=1),
        prefix=st.sampled_from(PREFIXES),
        key=st.sampled_from(KEYS),
    )
    def together(self, values: dict[str, Any], keys: list[str], prefix: str, key: str) -> None:
        """Call four writes at once: they come one after another in some order, and each reader sees that order."""

        def set_all(model: Model) -> bool:
            for each, value in values.items():
                model[each] = value
            return True

        def append(model: Model) -> bool:
            model.replace(key, [model.get(key)])
            return True

        state = self.state
        if not prefix and self.has_expired():
            return  # whether `delete_all` makes a change then depends on the order of the calls
        calls: list[tuple[Callable[[], Coroutine[Any, Any, object]], Callable[[Model], bool]]] = [
            (lambda: state.set_many(values), set_all),
            (lambda: state.delete_many(keys), lambda model: bool(model.remove_keys(keys))),
            (
                lambda: state.delete_all(prefix),
                lambda model: bool(model.remove_keys([each for each in model if each.startswith(prefix)])),
            ),
            (lambda: state.update(key, lambda old: [old], None), append),
        ]
        seen: list[tuple[int, dict[str, Any]]] = [(self.revision, dict(self.model))]

        async def run() -> None:
            tasks = [asyncio.create_task(call()) for call, _ in calls]
            while not all(task.done() for task in tasks):
                seen.append((state.revision, state.get_all_nowait()))
                await asyncio.sleep(0)
            for task in tasks:
                await task
            seen.append((state.revision, state.get_all_nowait()))

        self.runner.run(run())
        orders = [history for order in permutations(calls) if self._explains(history := self._history(order), seen)]
        assert orders
        self.history.update(orders[0])
        self.revision = max(orders[0])
        self.model = orders[0][self.revision].twin()

    def _history(self, order: Iterable[tuple[object, Callable[[Model], bool]]]) -> dict[int, Model]:
        """Return what the state holds at each revision, if calls are made in this order."""
        model, revision = self.model.twin(), self.revision
        history = {revision: model.twin()}
        for _, change in order:
            if change(model):
                revision += 1
                history[revision] = model.twin()
        return history

    @staticmethod
    def _explains(history: dict[int, Model], seen: list[tuple[int, dict[str, Any]]]) -> bool:
        return max(history) == seen[-1][0] and all(history[revision] == values for revision, values in seen)

    # Transactions

    @rule(page=PAGES, operations=st.lists(OPERATIONS, max_size=6), commit=st.booleans())
    def transaction(self, operations: list[tuple[str, str, Any]], page: dict[str, Any], *, commit: bool) -> None:
        """Make all changes or none, as one revision if there are any."""
        draft = self.model.twin()
        touched = self.runner.run(self._transaction(operations, draft, page, commit=commit))
        if commit:
            self.model = draft
            # What was only ever in the draft may be gone again, and nothing changed.
            self.changed(whether=touched and self.state.revision > self.revision)

    async def _transaction(
        self, operations: list[tuple[str, str, Any]], draft: Model, page: dict[str, Any], *, commit: bool
    ) -> bool:
        before = dict(draft)
        touched = False
        with suppress(StopItError):
            async with self.state.transaction() as tx:
                for what, key, argument in operations:
                    touched |= self._apply(tx, draft, what, key, argument)
                    assert tx.get_all() == draft
                    assert len(tx) == len(draft)
                    assert list(tx.get_all(**page).items()) == list(draft.page(**page).items())
                    assert len(tx.namespace("a")) == sum(name.startswith("a/") for name in draft)
                    assert await self.state.get_all() == before
                if not commit:
                    raise StopItError
        return touched

    def _apply(self, tx: Transaction, draft: Model, what: str, key: str, argument: Any) -> bool:
        """Do one of `OPERATIONS` in a transaction and its model; returns whether it changed anything."""
        match what:
            case "set":
                draft[key] = argument
                tx.set(key, argument)
            case "expiring":
                draft[key] = argument
                draft.expires[key] = self.now() + argument * 1000
                tx.set(key, argument, ttl=argument)
            case "incr":
                draft.replace(key, draft.get(key, 0) + argument)
                assert tx.incr(key, argument) == draft[key]
            case "delete":
                was_there = bool(draft.remove_keys([key]))
                assert tx.delete(key) is was_there
                return was_there
            case _:
                found = draft.remove_keys([each for each in draft if each.startswith(key)])
                assert tx.delete_all(key) == len(found)
                return bool(found)
        return True

    # Expiry

    @rule(key=st.sampled_from(KEYS), ttl=TTLS)
    def set_expiring(self, key: str, ttl: int) -> None:
        self.model[key] = ttl
        self.model.expires[key] = self.now() + ttl * 1000
        self.changed()
        assert self.runner.run(self.state.set(key, ttl, ttl=ttl)) == self.revision

    @rule(seconds=st.integers(1, 60))
    def advance(self, seconds: int) -> None:
        """Advance the clock: expired keys are gone at once; a sweep, which is a change, may come later."""

        async def advanced() -> None:
            self.clock.advance(seconds)
            await self.settle()

        self.runner.run(advanced())
        self.model = self.model.live(self.now())
        while self.revision < self.state.revision:
            self.changed()

    @rule(seconds=st.integers(-100_000, 100_000))
    def jump(self, seconds: int) -> None:
        """Set the wall clock, which expires nothing before the next start."""
        self.clock.jump(seconds)

    # Durability

    @rule()
    def flush(self) -> None:
        self.runner.run(self.state.flush())
        self.acknowledged = self.revision
        assert self.state.durable_revision == self.revision
        assert self.state.status().unflushed_keys == 0

    @rule(moment=MOMENTS, times=st.integers(1, 3))
    def failed_flush(self, moment: Moment, times: int) -> None:
        # No precondition, which must not depend on time: it is not known what the background wrote in the meantime.
        if self.acknowledged == self.revision:
            return
        self.storage.fail("commit", moment, times=times)
        for _ in range(times):
            # A commit that began in the background may still succeed, and take everything along.
            try:
                self.runner.run(self.state.flush())
            except UnavailableError as error:
                event("a flush failed")
                assert "on demand" in str(error)  # noqa: PT017 -- whether it raises is not known
            else:
                assert self.state.durable_revision == self.revision
                self.acknowledged = self.revision
        self.storage._faults.clear()

    @rule()
    def restart(self) -> None:
        """Stop cleanly, and start."""
        self.write_time()
        before, expires = self.now(), bool(self.model.expires)
        self.runner.run(self.state.stop())
        self.acknowledged = self.revision
        self.start()
        self.check_durable()
        assert self.now() <= max(before, int(self.clock.time() * 1000))
        assert self.now() >= before or not expires
        self.began_again()

    @rule(moment=MOMENTS)
    def restart_without_checkpoint(self, moment: Moment) -> None:
        """Stop with a checkpoint that fails, which loses nothing, and start."""
        self.write_time()
        self.flush()
        self.storage.fail("checkpoint", moment)
        self.runner.run(self.state.stop())
        self.storage._faults.clear()
        self.start()
        self.began_again()

    @rule()
    def crash_and_reopen(self) -> None:
        """Crash; the state is then as it was at some moment since the last acknowledged one."""
        self.crash(self.runner.run(self._crash()))
        self.start()
        found = self.state._core.state._loaded_revision
        assert self.acknowledged <= found <= self.revision
        self.model, self.revision, self.acknowledged = self.history[found].twin(), found, found
        self.history = {found: self.model.twin()}
        self.began_again()

    @rule()
    def flush_and_crash(self) -> None:
        """Flush and crash: a change that an earlier failure dropped would be missing at once."""
        self.flush()
        before = self.revision
        self.crash_and_reopen()
        assert self.acknowledged == before

    @invariant()
    def is_the_model(self) -> None:
        assert list(self.runner.run(self.state.get_all()).items()) == sorted(self.model.items(), key=itemgetter(0))
        assert {key for key in self.model if self.runner.run(self.state.expires_in(key))} == set(self.model.expires)
        assert (self.state.revision, len(self.state)) == (self.revision, len(self.model))
        assert self.state.durable_revision <= self.revision


class MemoryMachine(ManagerMachine):
    large = 40_000

    def make_storage(self) -> Storage:
        self.memory = MemoryStorage()
        return self.memory

    def crash(self, session: StorageSession) -> None:
        self.memory.places["state"].session = None


class FileMachine(ManagerMachine):
    large = 60_000

    def make_storage(self) -> Storage:
        self.directory = tempfile.TemporaryDirectory(prefix="lab_state-")
        return FileStorage(Path(self.directory.name) / "state")

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()

    def crash(self, session: StorageSession) -> None:
        assert isinstance(session, FileSession)
        for worker in (session._checkpoints, session._commits):
            worker.submit(int).result()  # what is under way may still reach the disk
            worker.shutdown()
        session._closing = Future()
        session._closing.set_result(None)
        session._writer.close()


class SharedMachine(ManagerMachine):
    """The same in a shared state. Each change is durable when its call returns."""

    large = 60_000
    role: Role

    # Processes that are killed have tests of their own, with real ones.
    crash_and_reopen = flush_and_crash = None  # type: ignore[assignment]

    def make_storage(self) -> Storage:
        self.directory = tempfile.TemporaryDirectory(prefix="lab_state-")
        self.in_role = InRole(self.role, Path(self.directory.name))
        return MemoryStorage()  # takes no part: there are files in its place

    def make(self, config: Config) -> Manager:
        return self.in_role(config, self.storage, clock=self.clock)

    def teardown(self) -> None:
        self.runner.run(self.state.stop())
        self.runner.close()
        self.directory.cleanup()

    def start(self) -> None:
        super().start()
        self.runner.run(self.settle())

    def check_durable(self) -> None:
        """Check that everything is durable, also what a start as the owner has swept."""
        assert self.state.durable_revision == self.state.revision >= self.revision

    async def settle(self) -> None:
        flusher = flusher_of(self.state)
        await until(lambda: not flusher.unflushed_keys)
        await self.state.catch_up()


class OwnerMachine(SharedMachine):
    role = "owner"


class FollowerMachine(SharedMachine):
    role = "follower"

    @rule()
    def take_over(self) -> None:
        """Stop the owner: the follower becomes the owner, and loses nothing."""

        async def taken_over() -> None:
            assert isinstance(self.state, SharedManager)
            if self.state.owner is not None:
                await self.state.owner.stop()
                self.state.owner = None
                while self.state.role != "owner":
                    # The pause between two attempts. Floats add this number exactly, so no clock falls behind another.
                    self.clock.advance(1 / 512)
                    await idle()
                await self.settle()

        self.runner.run(taken_over())
        self.began_again()


@pytest.mark.parametrize(
    ("machine", "examples", "in_steps"),
    [
        (MemoryMachine, 120, False),
        (FileMachine, 60, False),
        (MemoryMachine, 60, True),
        (OwnerMachine, SHARED, False),
        (FollowerMachine, SHARED, False),
        (FollowerMachine, SHARED, True),
    ],
)
def test_the_manager_is_a_durable_dict(
    machine: type[ManagerMachine], examples: int, monkeypatch: pytest.MonkeyPatch, *, in_steps: bool
) -> None:
    """Whatever is called in whatever order, the state is its model, and after a crash one that was acknowledged."""
    if in_steps:
        for module, constant in ((_batch, "MANY"), (_batch, "STEP"), (_writing, "_STEP_BYTES")):
            monkeypatch.setattr(module, constant, 1)
    monkeypatch.setattr(_file_writer, "_MIN_CHECKPOINT_BYTES", 100_000)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
        ),
    )
