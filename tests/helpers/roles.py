"""The roles in which the tests of the manager run, and the behaviour that must differ in a shared state.

A test runs in each role if its manager comes from the fixture `in_role`; see `conftest.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec

from lab_state import Config, FileStorage, Manager, Storage, StorageSession
from lab_state._clock import Clock
from lab_state._flusher import Flusher
from lab_state.storage._directory import Paths
from lab_state.storage._lock import Lock
from lab_state.storage._protocol import Recovery
from lab_state.storage.file import FileSession
from lab_state.testing import FaultyStorage

Role = Literal["alone", "owner", "follower"]
ROLES: tuple[Role, ...] = get_args(Role)


class InRole:
    """A factory of the managers of one test."""

    def __init__(self, role: Role, directory: Path) -> None:
        self.role = role
        self._directory = directory
        self._made: list[tuple[Storage, FileStorage]] = []

    def __call__(self, config: Config, storage: Storage, *, clock: Clock | None = None) -> Manager:
        """Return a manager. In a shared state it waits for each commit, and its storage has files."""
        if self.role == "alone":
            return Manager(config, storage, clock=clock)
        shared = msgspec.structs.replace(config, shared=True, flush_interval=0)
        files = self._files(storage)
        return SharedManager(
            shared, files, clock, Manager(shared, files, clock=clock) if self.role == "follower" else None
        )

    def _files(self, storage: Storage) -> FileStorage:
        """Return the storage of files that replaces a storage."""
        if isinstance(storage, FileStorage):
            return storage
        for known, files in self._made:
            if known is storage:
                return files
        directory = self._directory / f"shared-{len(self._made)}"
        files = FaultyFiles(directory, storage) if isinstance(storage, FaultyStorage) else FileStorage(directory)
        self._made.append((storage, files))
        return files


class SharedManager(Manager):
    """A manager that owns a shared state, or follows an owner. The owner starts before the follower, and stops after it."""

    def __init__(self, config: Config, storage: FileStorage, clock: Clock | None, owner: Manager | None) -> None:
        super().__init__(config, storage, clock=clock)
        self.owner = owner

    async def start(self) -> None:
        if self.owner is not None:
            await self.owner.start()
        await super().start()

    async def stop(self) -> None:
        try:
            await super().stop()
        finally:
            if self.owner is not None:
                await self.owner.stop()

    @property
    def _flusher(self) -> Flusher | None:
        """The flusher of the owner."""
        return super()._flusher if self.owner is None else self.owner._flusher


class FaultyFiles(FileStorage):
    """A storage of files. Its sessions have the faults that a `FaultyStorage` plans."""

    def __init__(self, directory: Path, faults: FaultyStorage) -> None:
        super().__init__(directory)
        self._faults = faults

    def _load(self, name: str, paths: Paths, lock: Lock, whole: bool, /) -> Awaitable[FileSession]:  # noqa: FBT001 -- as in `FileStorage`
        load = super()._load
        self._faults._inner = cast("Storage", _Opened(lambda: load(name, paths, lock, True)))
        return cast("Awaitable[FileSession]", self._opened(name))

    async def _opened(self, name: str) -> _FaultySession:
        return _FaultySession(await self._faults.open(name))


class _FaultySession:
    """A session of a `FaultyStorage` for a shared state. Its state is handed over by a checkpoint."""

    def __init__(self, session: StorageSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def whole(self) -> Recovery:
        return self._session.recovery

    async def hand_over(self) -> bool:
        return False


class _Opened:
    """The storage inside a `FaultyStorage`. It loads a state whose lock is held already."""

    def __init__(self, load: Callable[[], Awaitable[StorageSession]]) -> None:
        self._load = load

    async def open(self, _: str) -> StorageSession:
        return await self._load()


DIFFERENT: dict[str, tuple[str, ...]] = {
    "a transaction holds no lock: other writes and sweeps do not wait for it, and writes may come from inside": (
        "test_blocking.py::test_from_inside_a_transaction",
        "test_blocking.py::test_who_waits_for_a_transaction_is_told_of_the_stop",
        "test_plain_items.py::test_expiry_in_a_transaction",
        "test_transact.py::test_transact_inside_a_transaction_would_wait_for_itself",
        "test_transactions.py::test_transactions_come_one_at_a_time_in_order",
        "test_transactions.py::test_waiters_take_turns_in_the_order_in_which_they_came",
        "test_transactions.py::test_a_writer_waits_for_an_open_transaction",
        "test_transactions.py::test_a_writer_that_finds_no_transaction_open_takes_no_lock",
        "test_transactions.py::test_a_write_from_inside_is_an_error",
        "test_transactions.py::test_a_child_task_that_outlives_its_transaction_merely_waits",
        "test_transactions.py::test_transactions_of_two_managers_nest",
        "test_transactions.py::test_entering_and_leaving_in_different_tasks",
        "test_transactions.py::test_a_stop_ends_an_open_transaction",
        "test_transactions.py::test_a_transaction_of_an_earlier_start_does_not_touch_the_next_one",
        "test_transactions.py::test_nothing_is_kept_of_a_transaction_that_is_over",
        "test_transactions.py::test_what_expires_meanwhile_is_gone_and_swept_afterwards",
        "test_transactions.py::test_a_thread_of_its_own_merely_waits",
        "test_transactions.py::test_who_waited_at_a_stop_does_not_write_into_the_next_start",
        "test_ttl.py::TestSetting::test_beside_a_transaction",
        "test_ttl.py::TestSweeping::test_not_during_a_transaction",
    ),
    "flush_interval is 0: a write waits for its commit, and its change is not seen before": (
        "test_pages.py::test_much_is_of_one_moment",
        "test_transact.py::test_one_process_has_nothing_to_catch_up_with",
        "test_transact.py::test_a_revision_that_was_reached_needs_no_wait",
        "test_transactions.py::test_a_flush_meanwhile_writes_nothing_of_it",
        "test_watch.py::TestFromNow::test_what_is_durable_from_now_on",
        "test_watch.py::TestSlowReaders::test_handed_out_once_a_turn",
        "test_watch.py::TestSlowReaders::test_more_than_are_kept",
        "test_watch.py::TestDurable::test_only_what_is_durable",
        "test_watch.py::TestDurable::test_a_failed_flush_is_not_told",
        "test_watch.py::TestDurable::test_several_changes_of_one_commit",
        "test_watch.py::TestReaders::test_a_cancelled_reader_loses_nothing",
        "test_watch.py::test_many_watchers_of_many_keys_are_told_in_steps",
    ),
    "flush_interval is 0: a writing call without await is refused": (
        "test_items.py::test_a_later_change_is_not_shown[set_nowait]",
        "test_items.py::test_writers_do_not_wait",
        "test_nowait.py::test_in_a_namespace",
        "test_nowait.py::test_of_an_entry",
        "test_nowait.py::test_from_a_callback",
        "test_nowait.py::test_a_function_of_update_that_changes_its_own_key",
        "test_nowait.py::test_while_a_transaction_is_open",
        "test_nowait.py::test_without_the_flush_task",
    ),
    "the owner sweeps: an expired key leaves the copy, and a watch is told, when that is durable": (
        "test_items.py::test_expiry_is_that_of_the_moment",
        "test_items.py::test_a_sweep_does_not_wait_for_an_iterator",
        "test_ttl.py::TestRestarts::test_over_a_restart",
        "test_ttl.py::TestSweeping::test_what_expired_leaves_memory",
        "test_watch.py::TestKinds::test_an_expiry_is_told_at_its_time",
    ),
    "the fast way of a write, which this test looks at, is that of a state that is not shared": (
        "test_items.py::test_the_view_is_given_back_at_the_end",
        "test_items.py::test_a_block_that_is_left_gives_the_view_back",
        "test_items.py::test_a_loop_that_is_left_gives_the_view_back",
        "test_items.py::test_an_iterator_that_is_closed_amid_a_step",
        "test_items.py::test_an_iterator_that_is_closed_amid_its_first_step",
        "test_plain_items.py::test_a_thread_iterates",
        "test_plain_items.py::test_writes_go_on_beside_a_thread",
        "test_plain_items.py::test_a_thread_that_leaves_the_loop_early",
        "test_watch.py::TestTheEnd::test_the_last_one_to_leave",
        "test_watch.py::TestTheEnd::test_an_error_in_the_body",
        "test_watch.py::TestTheEnd::test_a_cancelled_body",
    ),
    "a shared state needs files, and this test looks into the memory of a MemoryStorage": (
        "test_pages.py::test_a_view_of_a_file_has_the_same_order",
        "test_transactions.py::test_a_checkpoint_runs_beside_it",
    ),
}
"""The behaviour that must differ in a shared state, and its tests. They do not run with a shared state. `test_roles.py` checks that each exists."""

_REASONS = {test: reason for reason, tests in DIFFERENT.items() for test in tests}


def names_of(nodeid: str) -> tuple[str, ...]:
    """Return the names under which `DIFFERENT` may list a test: with its parameters, and without them."""
    test, _, parameters = nodeid.partition("[")
    test = test.rpartition("/")[2]
    values = parameters.rstrip("]").split("-")
    if not {"owner", "follower"} & set(values):
        return ()
    others = "-".join(value for value in values if value not in ROLES)
    return test, f"{test}[{others}]"


def reason_to_differ(nodeid: str) -> str | None:
    """Return the reason why a test does not run in its role; `None` if it runs."""
    return next((_REASONS[name] for name in names_of(nodeid) if name in _REASONS), None)
