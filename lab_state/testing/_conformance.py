"""The conformance suite for storages. Its public name is `lab_state.testing.StorageConformance`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from lab_state.config import Config
from lab_state.exceptions import CorruptionError, LockedError, StorageError, UnavailableError, UnsupportedError
from lab_state.manager import Manager
from lab_state.testing._conformance_reading import ReadingConformance
from lab_state.testing._conformance_tools import (
    NAME,
    awaited,
    cancelled_at,
    failing,
    given,
    got_through,
    opened,
    raises,
    until,
)


class StorageConformance(ReadingConformance):
    """A suite of tests for a storage. Define `make_storage`, `crash`, `read_raw` and `write_raw` in a subclass.

    Each test method is a coroutine function without arguments, so any test runner for coroutines
    can run it. Each test needs an empty place: a directory or a bucket without states. With
    pytest, an autouse fixture can create it.
    """

    sampled: int = 50
    """The approximate number of evenly spread offsets at which each stored part is damaged. Choose fewer if opening is slow."""

    # Recovery

    async def test_a_new_state_is_empty(self) -> None:
        """The first open of a state finds no snapshot, no record and no torn tail."""
        session = await self.make_storage().open(NAME)
        snapshot, records, _, dropped, _ = session.recovery
        assert (snapshot, records, dropped) == (None, (), 0)
        await session.aclose()

    async def test_records_come_back_in_order(self) -> None:
        """The next open recovers every record whose `commit` has returned, in the order of the commits."""
        written = await self._commit_some(5)
        assert await self._recovered_records() == written

    async def test_records_survive_a_crash(self) -> None:
        """A session that ends with a crash loses no record."""
        written = await self._commit_some(5, crash=True)
        assert written == await self._recovered_records()

    async def test_a_large_record_comes_back(self) -> None:
        """A record of 4 MiB comes back as one record, although its bytes look like frames of a journal."""
        large = b'00000000 5 R "x"\n' * (4 * 1024 * 1024 // 17)
        async with opened(self.make_storage()) as session:
            await session.commit(large, given(b"{}"))
        assert (large,) == await self._recovered_records()

    async def test_a_checkpoint_takes_the_place_of_what_was_before(self) -> None:
        """After a checkpoint, the next open recovers its snapshot and the records that were committed after it."""
        async with opened(self.make_storage()) as session:
            await session.commit(b"1", given(b"{}"))
            await session.checkpoint(given(b'{"a":', b"1}"))
            await session.commit(b"2", given(b"{}"))
        async with opened(self.make_storage()) as session:
            assert session.recovery.snapshot == b'{"a":1}'
            assert session.recovery.records[-1:] == (b"2",)

    async def test_commits_beside_a_checkpoint_are_kept(self) -> None:
        """A record that is committed while a snapshot is written is recovered, as a record after that snapshot."""
        async with opened(self.make_storage()) as session:
            await session.commit(b"before", given(b"{}"))

            async def slices() -> AsyncIterator[bytes]:
                yield b"{"
                await session.commit(b"beside", given(b"{}"))
                yield b"}"

            await session.checkpoint(slices)
            await session.commit(b"after", given(b"{}"))
            await self.crash(session)
        async with opened(self.make_storage()) as session:
            assert session.recovery.snapshot == b"{}"
            assert session.recovery.records[-2:] == (b"beside", b"after")

    async def test_many_checkpoints_leave_one_snapshot(self) -> None:
        """Ten checkpoints leave one snapshot, and the stored bytes do not grow with their number."""
        async with opened(self.make_storage()) as session:
            for number in range(10):
                await session.commit(b"r" * 1000, given(b"{}"))
                await session.checkpoint(given(b"%d" % number))
            assert session.snapshot_bytes == 1
            assert session.journal_bytes < 1000
        assert sum(map(len, self.read_raw(NAME).values())) < 2000

    async def test_a_checkpoint_that_fails_changes_nothing(self) -> None:
        """If a view raises, the old snapshot and all records stay. Later commits succeed."""
        async with opened(self.make_storage()) as session:
            await session.checkpoint(given(b"old"))
            await session.commit(b"1", given(b"{}"))
            await raises(UnavailableError, session.checkpoint(failing(b"ne")))
            await session.commit(b"2", given(b"{}"))
        async with opened(self.make_storage()) as session:
            assert session.recovery.snapshot == b"old"
            assert session.recovery.records == (b"1", b"2")

    async def test_states_are_apart(self) -> None:
        """One storage serves states with different names. No state contains data of another."""
        storage = self.make_storage()
        async with opened(storage, "one") as one, opened(storage, "two") as two:
            await one.commit(b"1", given(b"{}"))
            await two.commit(b"2", given(b"{}"))
        async with opened(storage, "one") as one, opened(storage, "two") as two:
            assert (one.recovery.records, two.recovery.records) == ((b"1",), (b"2",))

    async def test_sizes_are_told(self) -> None:
        """`snapshot_bytes` is the size of the snapshot. A commit adds at least the size of its record to `journal_bytes`."""
        async with opened(self.make_storage()) as session:
            await session.checkpoint(given(b"x" * 500))
            assert session.snapshot_bytes == 500
            before = session.journal_bytes
            await session.commit(b"r" * 300, given(b"{}"))
            assert session.journal_bytes >= before + 300
            assert NAME in session.path

    async def test_progress_is_told(self) -> None:
        """`progress` grows by the bytes of a commit and of a checkpoint, never shrinks, and can be read at any time."""
        session = await self.make_storage().open(NAME)
        seen = [session.progress]

        async def slices() -> AsyncIterator[bytes]:
            for _ in range(3):
                seen.append(session.progress)
                yield b"s" * 1_000_000

        await session.commit(b"r" * 3_000_000, slices)
        seen.append(session.progress)
        assert seen[-1] - seen[0] >= 3_000_000
        await session.checkpoint(slices)
        seen.append(session.progress)
        assert seen[-1] - seen[0] >= 6_000_000
        await session.aclose()
        seen.append(session.progress)
        assert seen == sorted(seen)

    async def test_there_is_nothing_to_warn_of(self) -> None:
        """A session without a fault has no warning, neither before nor after a checkpoint."""
        async with opened(self.make_storage()) as session:
            assert session.warning is None
            await session.commit(b"1", given(b"{}"))
            await session.checkpoint(given(b"{}"))
            assert session.warning is None

    async def test_a_checkpoint_becomes_due(self) -> None:
        """`commit` returns True when the journal has grown large, and False after a checkpoint."""
        async with opened(self.make_storage()) as session:
            assert not await session.commit(b"small", given(b"{}"))
            assert await session.commit(b"r" * 8_000_000, given(b"{}"))
            await session.checkpoint(given(b"{}"))
            assert not await session.commit(b"small", given(b"{}"))

    # One writer

    async def test_a_second_writer_is_refused(self) -> None:
        """An open state is locked until it is closed, even for another storage object with the same place."""
        first = await self.make_storage().open(NAME)
        error = await raises(LockedError, self.make_storage().open(NAME))
        assert NAME in str(error)
        await first.commit(b"1", given(b"{}"))
        await first.aclose()
        second = await self.make_storage().open(NAME)
        assert second.recovery.records == (b"1",)
        await second.aclose()

    async def test_closing_twice_is_closing_once(self) -> None:
        """A second `aclose` does nothing, and does not release the lock of a later session."""
        first = await self.make_storage().open(NAME)
        await first.aclose()
        second = await self.make_storage().open(NAME)
        await first.aclose()
        await raises(LockedError, self.make_storage().open(NAME))
        await second.aclose()

    async def test_a_closed_session_writes_nothing(self) -> None:
        """After `aclose`, `commit` and `checkpoint` raise `StorageError`, and change nothing."""
        session = await self.make_storage().open(NAME)
        await session.commit(b"1", given(b"{}"))
        await session.aclose()
        before = self.read_raw(NAME)
        await raises(StorageError, session.commit(b"2", given(b"{}")))
        await raises(StorageError, session.checkpoint(given(b"{}")))
        assert self.read_raw(NAME) == before

    async def test_opened_in_one_task_and_closed_in_another(self) -> None:
        """A session can be opened by one task, used by a second task, and closed by a third task."""
        session = await asyncio.create_task(self.make_storage().open(NAME))
        await asyncio.create_task(awaited(session.commit(b"1", given(b"{}"))))
        await asyncio.create_task(session.aclose())
        assert await self._recovered_records() == (b"1",)

    # Cancellation

    async def test_open_can_be_cancelled_at_every_await(self) -> None:
        """A cancelled `open` leaves the state unlocked and unchanged."""
        await self._commit_some(1)
        for number in range(200):
            session = await cancelled_at(number, self.make_storage().open(NAME))
            if session is not None:
                await session.aclose()
                break
            async with opened(self.make_storage()) as session:
                assert session.recovery.records == (b"record 0",)
        else:
            raise AssertionError("open() awaits more than a hundred times")

    async def test_commit_can_be_cancelled_at_every_await(self) -> None:
        """A cancelled commit may be lost. The commits before and after it are recovered."""

        async def run(number: int) -> bool:
            async with opened(self.make_storage(), f"{NAME}-{number}") as session:
                await session.commit(b"before", given(b"{}"))
                done = await cancelled_at(number, session.commit(b"cancelled", given(b"{}"))) is not None
                await session.commit(b"after", given(b"{}"))
            async with opened(self.make_storage(), f"{NAME}-{number}") as session:
                records = [record for record in session.recovery.records if record != b"cancelled"]
                assert records == [b"before", b"after"]
            return done

        await until(run)

    async def test_checkpoint_can_be_cancelled_at_every_await(self) -> None:
        """A cancelled checkpoint has made the new snapshot or none, and loses no record."""

        async def run(number: int) -> bool:
            async with opened(self.make_storage(), f"{NAME}-{number}") as session:
                await session.commit(b"before", given(b"{}"))
                done = (
                    await cancelled_at(number, got_through(session.checkpoint(given(b"new", b" snapshot")))) is not None
                )
                await session.commit(b"after", given(b"{}"))
                await self.crash(session)
            async with opened(self.make_storage(), f"{NAME}-{number}") as session:
                snapshot, records = session.recovery[:2]
                assert snapshot == b"new snapshot" or (snapshot is None and records[0] == b"before")
                assert records[-1] == b"after"
            return done

        await until(run)

    async def test_close_can_be_cancelled_at_every_await(self) -> None:
        """If `aclose` is cancelled, and then called again, the state can be opened."""

        async def run(number: int) -> bool:
            session = await self.make_storage().open(NAME)
            done = await cancelled_at(number, got_through(session.aclose())) is not None
            await session.aclose()
            async with opened(self.make_storage()):
                return done

        await until(run)

    # Through a manager

    async def test_a_manager_finds_what_it_left(self) -> None:
        """After a stop and a start, a manager has the same values, deletions and revision."""
        async with Manager(NAME, self.make_storage()) as state:
            await state.set_many({"a": 1, "b": [2, {"c": None}]})
            await state.set("gone", "x")
            await state.delete("gone")
            left, revision = await state.get_all(), state.revision
        async with Manager(NAME, self.make_storage()) as state:
            assert (await state.get_all(), state.revision, state.durable_revision) == (left, revision, revision)

    async def test_what_was_flushed_survives_a_crash(self) -> None:
        """A crash loses nothing that was flushed. A change after the last flush is lost as a whole."""
        await self._crashed_manager({"a": 1, "b": 2})
        async with Manager(NAME, self.make_storage()) as state:
            assert await state.get_all() == {"a": 1, "b": 2}
            await state.flush()
            assert state.durable_revision == state.revision
            await state.set("c", 3)
        async with Manager(NAME, self.make_storage()) as state:
            assert await state.get_all() == {"a": 1, "b": 2, "c": 3}

    async def test_a_clean_stop_leaves_a_snapshot_alone(self) -> None:
        """After `stop`, there is a snapshot and no record."""
        async with Manager(NAME, self.make_storage()) as state:
            await state.set("a", 1)
        async with opened(self.make_storage()) as session:
            assert session.recovery.snapshot is not None
            assert session.recovery.records == ()

    async def test_nothing_is_written_when_nothing_changed(self) -> None:
        """If nothing changes from a start to a stop, every stored byte stays as it was."""
        await self._stopped_manager({"a": 1})
        before = self.read_raw(NAME)
        async with Manager(NAME, self.make_storage()) as state:
            assert await state.get("a") == 1
            await state.flush()
        assert self.read_raw(NAME) == before

    async def test_a_damaged_snapshot_is_refused_and_left_alone(self) -> None:
        """If a bit in the snapshot is flipped, a start is refused and changes nothing, or loads the right values."""
        await self._stopped_manager({"key": "value", "other": [1, 2, 3]})
        await self._flip_bits({"key": "value", "other": [1, 2, 3]})

    async def test_a_damaged_journal_is_refused_or_torn(self) -> None:
        """If a bit in the journal is flipped, a start is refused, or it drops whole records at the end."""
        config = Config(name=NAME, flush_interval=None)
        manager = Manager(config, self.make_storage())
        await manager.start()
        seen: list[dict[str, Any]] = [{}]
        for number in range(3):
            await manager.set(f"key {number}", "value")
            await manager.flush()
            seen.append(await manager.get_all())
        await self._end(manager)
        await self._flip_bits(*seen)

    async def test_empty_is_not_missing(self) -> None:
        """A stored part that has become empty is reported as damage. It is never loaded as an empty state."""
        await self._stopped_manager({"a": 1})
        for part, data in self.read_raw(NAME).items():
            self.write_raw(NAME, part, b"")
            await raises(CorruptionError, Manager(NAME, self.make_storage()).start())
            self.write_raw(NAME, part, data)
        async with Manager(NAME, self.make_storage()) as state:
            assert await state.get_all() == {"a": 1}

    # Helpers

    async def _commit_some(self, count: int, *, crash: bool = False) -> tuple[bytes, ...]:
        records = tuple(b"record %d" % number for number in range(count))
        session = await self.make_storage().open(NAME)
        for record in records:
            await session.commit(record, given(b"{}"))
        await (self.crash(session) if crash else session.aclose())
        return records

    async def _recovered_records(self) -> tuple[bytes, ...]:
        async with opened(self.make_storage()) as session:
            return session.recovery.records

    async def _stopped_manager(self, values: dict[str, Any]) -> None:
        async with Manager(NAME, self.make_storage()) as state:
            await state.set_many(values)

    async def _crashed_manager(self, values: dict[str, Any]) -> None:
        manager = Manager(Config(name=NAME, flush_interval=3600), self.make_storage())
        await manager.start()
        for key, value in values.items():
            await manager.set(key, value)
            await manager.flush()
        await manager.set("not flushed", 1)
        await self._end(manager)

    async def _end(self, manager: Manager) -> None:
        """End a manager as SIGKILL does."""
        flusher = manager._flusher  # noqa: SLF001 -- every public call that ends a manager also writes
        assert flusher is not None  # every manager that runs has a flusher
        session = flusher.abort()
        await asyncio.sleep(0)
        await self.crash(session)

    async def _flip_bits(self, *allowed: dict[str, Any]) -> None:
        """Flip single bits of each stored part. A start must be refused, or load one of the allowed states.

        At the end, all parts are repaired, and a start must load the last of these states.
        """
        whole = dict(self.read_raw(NAME))
        for part, data in whole.items():
            step = max(1, len(data) // self.sampled)
            for offset in range(step // 2, len(data), step):
                damaged = bytearray(data)
                damaged[offset] ^= 1 << offset % 8
                self.write_raw(NAME, part, bytes(damaged))
                before = self.read_raw(NAME)
                manager = Manager(NAME, self.make_storage())
                try:
                    await manager.start()
                except (CorruptionError, UnsupportedError):
                    assert self.read_raw(NAME) == before, "a refused start must not change a damaged part"
                else:
                    assert await manager.get_all() in allowed
                    await manager.stop()
                for each in {**whole, **self.read_raw(NAME)}:
                    self.write_raw(NAME, each, whole.get(each))
        async with Manager(NAME, self.make_storage()) as state:
            assert await state.get_all() == allowed[-1]
