"""The conformance suite, run against every storage."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest

from lab_state import FileStorage, MemoryStorage, Storage, StorageSession
from lab_state.storage.file import FileSession
from lab_state.testing import FaultyStorage, StorageConformance


class TestMemoryStorage(StorageConformance):
    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        self.memory = MemoryStorage()

    def make_storage(self) -> Storage:
        return self.memory

    async def crash(self, session: StorageSession) -> None:
        for place in self.memory.places.values():
            if place.session is session:
                place.session = None

    def read_raw(self, name: str) -> Mapping[str, bytes]:
        place = self.memory.places[name]
        parts = {"snapshot": place.snapshot, "journal": place.journal}
        return {part: bytes(data) for part, data in parts.items() if data is not None}

    def write_raw(self, name: str, part: str, data: bytes | None) -> None:
        place = self.memory.places[name]
        if part == "journal":
            place.journal = None if data is None else bytearray(data)
        else:
            place.snapshot = data


class TestFileStorage(StorageConformance):
    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    def make_storage(self) -> Storage:
        return FileStorage(self.directory)

    async def crash(self, session: StorageSession) -> None:
        assert isinstance(session, FileSession)
        await asyncio.get_running_loop().run_in_executor(None, session._writer.lock.release)
        session._closing = Future()
        session._closing.set_result(None)

    def read_raw(self, name: str) -> Mapping[str, bytes]:
        parts = (self.directory / f"{name}.json", self.directory / f"{name}.journal")
        return {part.name: part.read_bytes() for part in parts if part.exists()}

    def write_raw(self, name: str, part: str, data: bytes | None) -> None:
        if data is None:
            (self.directory / part).unlink()
        else:
            (self.directory / part).write_bytes(data)


class TestFaultyStorage(TestMemoryStorage):
    """Without a fault, it answers as the storage that it wraps."""

    def make_storage(self) -> Storage:
        return FaultyStorage(self.memory)

    async def crash(self, session: StorageSession) -> None:
        await session.aclose()
