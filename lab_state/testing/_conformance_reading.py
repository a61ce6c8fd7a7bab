"""The tests of `Storage.read`: a part of `lab_state.testing.StorageConformance`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

from lab_state._state_view import read_state
from lab_state.config import Config
from lab_state.exceptions import CorruptionError, StorageError, UnsupportedError
from lab_state.manager import Manager
from lab_state.storage._protocol import Reading
from lab_state.testing._conformance_tools import NAME, Hooks, cancelled_at, given, opened, raises

_COMMITS = 30
_A_CHECKPOINT_EVERY = 4


class ReadingConformance(Hooks):
    """The tests of `Storage.read`. A storage without that method fails each of them."""

    async def test_reading_what_is_not_there(self) -> None:
        """Reading a state that was never opened raises an error. It does not return an empty state, and creates nothing."""
        for _ in range(2):
            error = await raises(UnsupportedError, self.make_storage().read(NAME))
            assert NAME in str(error)

    async def test_reading_a_state_without_a_record(self) -> None:
        """A state that was opened, and has no record yet, is read as an empty state."""
        async with opened(self.make_storage()):
            reading = await self.make_storage().read(NAME)
            assert (reading.snapshot, reading.records, reading.durable) == (None, (), 0)

    async def test_reading_beside_a_writer(self) -> None:
        """A reading has the committed records. It changes nothing, and the writer can continue."""
        async with opened(self.make_storage()) as session:
            await session.commit(b"0", given(b"{}"))
            await session.checkpoint(given(b"snapshot"))
            for number in range(3):
                await session.commit(b"%d" % number, given(b"{}"))
                before = self.read_raw(NAME)
                reading = await self.make_storage().read(NAME)
                assert self.read_raw(NAME) == before
                assert reading.snapshot == b"snapshot"
                assert reading.records[-number - 1 :] == tuple(b"%d" % old for old in range(number + 1))
                assert len(reading.records) - 1 <= reading.durable <= len(reading.records)
                assert reading.live is not False
                assert NAME in reading.path

    async def test_reading_after_a_clean_end(self) -> None:
        """After a clean end, a reading has the snapshot, and does not report a writer. Then the state can be opened as usual."""
        async with opened(self.make_storage()) as session:
            await session.commit(b"1", given(b"{}"))
            await session.checkpoint(given(b"snapshot"))
        reading = await self.make_storage().read(NAME)
        assert (reading.snapshot, reading.records) == (b"snapshot", ())
        assert not reading.live
        async with opened(self.make_storage()) as session:
            assert session.recovery.snapshot == b"snapshot"

    async def test_reading_after_a_crash(self) -> None:
        """A reading after a crash has the same records as the next open. This holds before that open and after it."""
        session = await self.make_storage().open(NAME)
        for number in range(3):
            await session.commit(b"%d" % number, given(b"{}"))
        await self.crash(session)
        for _ in range(2):
            reading = await self.make_storage().read(NAME)
            assert (reading.snapshot, reading.records) == (None, (b"0", b"1", b"2"))
            async with opened(self.make_storage()) as session:
                assert session.recovery.records == (b"0", b"1", b"2")

    async def test_reading_while_everything_is_replaced(self) -> None:
        """During commits and checkpoints, each reading is the state of one moment. It has all records that were durable at the call."""
        durable, applied, readings = 0, 0, 0
        begun = asyncio.Event()

        async def write() -> None:
            nonlocal durable, applied
            async with opened(self.make_storage()) as session:
                for number in range(1, _COMMITS + 1):
                    applied = number
                    await session.commit(b"%d" % number, given(b"{}"))
                    durable = number
                    begun.set()
                    await asyncio.sleep(0)  # the storage may have no await that lets the reader run
                    if number % _A_CHECKPOINT_EVERY == 0:
                        await session.checkpoint(given(b"%d" % number))

        writing = asyncio.create_task(write())
        storage = self.make_storage()
        await begun.wait()
        while not writing.done():
            before = durable
            reached = _one_moment(await storage.read(NAME))
            assert before <= reached <= applied
            readings += 1
            await asyncio.sleep(0)
        await writing
        assert readings > 1
        assert _one_moment(await storage.read(NAME)) == _COMMITS

    async def test_a_reading_of_what_is_damaged(self) -> None:
        """A reading of a damaged part raises an error, or drops the last record. It is never empty, and changes no part."""
        manager = Manager(Config(name=NAME, flush_interval=None), self.make_storage())
        await manager.start()
        for number in range(2):
            await manager.set(f"key {number}", "value")
            await manager.flush()
        seen = [{"key 0": "value"}, await manager.get_all()]
        await manager.stop()
        async with opened(self.make_storage()) as session:
            set_two = b'{"from":2,"to":3,"clear":false,"set":{"key 2":"value"},"delete":[],"expires":{}}'
            await session.commit(set_two, given(b"{}"))
            seen.append({**seen[1], "key 2": "value"})
            await self.crash(session)
        for part, data in dict(self.read_raw(NAME)).items():
            for damaged in _damages(data):
                self.write_raw(NAME, part, damaged)
                before = self.read_raw(NAME)
                with suppress(CorruptionError, UnsupportedError):
                    view = await read_state(NAME, self.make_storage())
                    assert await view.get_all() in seen[1:]
                assert self.read_raw(NAME) == before
            self.write_raw(NAME, part, data)
        assert await (await read_state(NAME, self.make_storage())).get_all() == seen[-1]

    async def test_read_can_be_cancelled_at_every_await(self) -> None:
        """A cancelled reading leaves nothing that would stop a writer."""
        async with opened(self.make_storage()) as session:
            await session.commit(b"1", given(b"{}"))
            for number in range(400):
                if await cancelled_at(number, self.make_storage().read(NAME)) is not None:
                    break
            else:
                raise AssertionError("read() awaits more than two hundred times")
            await session.commit(b"2", given(b"{}"))
        assert (await self.make_storage().read(NAME)).records == (b"1", b"2")

    async def test_a_closed_storage_session_is_read(self) -> None:
        """A storage object can still read the state after its session was closed."""
        storage = self.make_storage()
        session = await storage.open(NAME)
        await session.commit(b"1", given(b"{}"))
        await session.aclose()
        await raises(StorageError, session.commit(b"2", given(b"{}")))
        assert (await storage.read(NAME)).records == (b"1",)


def _one_moment(reading: Reading) -> int:
    """Return the number of the last record. Check that no record is missing between the snapshot and that record."""
    reached = 0 if reading.snapshot is None else int(reading.snapshot)
    for number in map(int, reading.records):
        assert number <= reached + 1, "a record is missing"
        reached = max(reached, number)
    return reached


def _damages(data: bytes) -> Iterator[bytes]:
    """Yield copies of the bytes: four with one flipped bit each, and then an empty one."""
    for offset in (0, len(data) // 3, 2 * len(data) // 3, len(data) - 1):
        damaged = bytearray(data)
        damaged[offset] ^= 1
        yield bytes(damaged)
    yield b""
