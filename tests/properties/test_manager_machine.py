"""The manager against a dict, through failed flushes, crashes and restarts, on each storage of this machine."""

from __future__ import annotations

import asyncio
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lab_state import (
    Config,
    FileStorage,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    Storage,
    StorageSession,
    UnavailableError,
)
from lab_state.storage.file import FileSession
from lab_state.testing import FaultyStorage

PREFIXES = ("", "a", "a/", "none")
COUNTERS = ("n", "a/n")
KEYS = ("a", "b", "a/x", "a/y", "ü", "$")
ANY_KEYS = st.sampled_from(KEYS + COUNTERS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
MOMENTS = st.sampled_from(["before", "after"])
Moment = Literal["before", "after"]


class StopItError(Exception):
    """What a function given to `update` raises."""


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
        self.model: dict[str, Any] = {}
        self.revision = self.acknowledged = 0
        self.history: dict[int, dict[str, Any]] = {0: {}}
        self.start()

    def teardown(self) -> None:
        self.crash(self.runner.run(self._crash()))
        self.runner.close()

    def start(self) -> None:
        self.state = Manager(Config(name="state", flush_interval=None), self.storage)
        self.runner.run(self.state.start())

    def changed(self, *, whether: bool = True) -> None:
        """A call came back: one more revision, if it changed anything."""
        self.revision += whether
        self.history[self.revision] = dict(self.model)

    async def _crash(self) -> StorageSession:
        flusher = self.state._core.running
        session = flusher.abort()
        await asyncio.wait([task for task in (flusher._task, flusher._checkpointing) if task is not None])
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
        self.model.update(values)
        self.changed(whether=bool(values))
        assert self.runner.run(self.state.set_many(values)) == self.revision

    @rule(key=ANY_KEYS)
    def delete(self, key: str) -> None:
        was_there = key in self.model
        self.model.pop(key, None)
        assert self.runner.run(self.state.delete(key)) is was_there
        self.changed(whether=was_there)

    @rule(keys=st.lists(ANY_KEYS, max_size=5))
    def delete_many(self, keys: list[str]) -> None:
        found = {key for key in keys if self.model.pop(key, self) is not self}
        assert self.runner.run(self.state.delete_many(keys)) == len(found)
        self.changed(whether=bool(found))

    @rule(prefix=st.sampled_from(PREFIXES))
    def delete_all(self, prefix: str) -> None:
        found = [key for key in self.model if key.startswith(prefix)]
        for key in found:
            del self.model[key]
        assert self.runner.run(self.state.delete_all(prefix)) == len(found)
        self.changed(whether=bool(found))

    @rule(key=ANY_KEYS)
    def pop(self, key: str) -> None:
        was_there = key in self.model
        assert self.runner.run(self.state.pop(key, None)) == self.model.pop(key, None)
        self.changed(whether=was_there)

    @rule(key=st.sampled_from(KEYS), value=VALUES)
    def update(self, key: str, value: Any) -> None:
        self.model[key] = [self.model.get(key), value]
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
        self.model[key] = self.model.get(key, 0) + delta
        assert self.runner.run(self.state.incr(key, delta)) == self.model[key]
        self.changed()

    @rule(key=st.sampled_from(KEYS), value=VALUES)
    def set_if_absent(self, key: str, value: Any) -> None:
        absent = key not in self.model
        self.model.setdefault(key, value)
        assert self.runner.run(self.state.set_if_absent(key, value)) is absent
        self.changed(whether=absent)

    @rule(key=st.sampled_from(KEYS), value=VALUES)
    def get_or_set(self, key: str, value: Any) -> None:
        absent = key not in self.model
        assert self.runner.run(self.state.get_or_set(key, lambda: value)) == self.model.setdefault(key, value)
        self.changed(whether=absent)

    # Durability

    @rule()
    def flush(self) -> None:
        self.runner.run(self.state.flush())
        self.acknowledged = self.revision
        assert self.state.durable_revision == self.revision
        assert self.state.status().unflushed_keys == 0

    @precondition(lambda self: self.acknowledged < self.revision)
    @rule(moment=MOMENTS, times=st.integers(1, 3))
    def failed_flush(self, moment: Moment, times: int) -> None:
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
        """A clean stop, and a start."""
        self.runner.run(self.state.stop())
        self.acknowledged = self.revision
        self.start()
        assert self.state.durable_revision == self.revision

    @rule(moment=MOMENTS)
    def restart_without_checkpoint(self, moment: Moment) -> None:
        """A stop whose checkpoint fails, which loses nothing, and a start."""
        self.flush()
        self.storage.fail("checkpoint", moment)
        self.runner.run(self.state.stop())
        self.storage._faults.clear()
        self.start()

    @rule()
    def crash_and_reopen(self) -> None:
        """A crash, after which the state is as it was at some moment since the last acknowledged one."""
        self.crash(self.runner.run(self._crash()))
        self.start()
        found = self.state.revision
        assert self.acknowledged <= found <= self.revision
        self.model, self.revision, self.acknowledged = dict(self.history[found]), found, found
        self.history = {found: dict(self.model)}

    @rule()
    def flush_and_crash(self) -> None:
        """Where a change that an earlier failure dropped would be missed at once."""
        self.flush()
        self.crash_and_reopen()
        assert self.revision == self.acknowledged

    @invariant()
    def is_the_model(self) -> None:
        assert self.runner.run(self.state.get_all()) == self.model
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
    large = 600_000

    def make_storage(self) -> Storage:
        self.directory = tempfile.TemporaryDirectory(prefix="lab_state-")
        return FileStorage(Path(self.directory.name) / "state")

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()

    def crash(self, session: StorageSession) -> None:
        assert isinstance(session, FileSession)
        for thread in (session._checkpoints, session._commits):  # what is under way may still reach the disk
            thread.shutdown(wait=True)
        session._closing = Future()
        session._closing.set_result(None)
        session._writer.close()


@pytest.mark.parametrize(("machine", "examples"), [(MemoryMachine, 120), (FileMachine, 60)])
def test_the_manager_is_a_durable_dict(machine: type[ManagerMachine], examples: int) -> None:
    """Whatever is called in whatever order, the state is its model, and after a crash one that was acknowledged."""
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
