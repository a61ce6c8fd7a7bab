"""The conformance suite, run against `S3Storage` on the store of this test run."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from s3_world import Bucket

from lab_state import Storage, StorageSession
from lab_state.storage.s3._session import S3Session
from lab_state.testing import StorageConformance


class TestS3Storage(StorageConformance):
    sampled = 1  # a start takes a third of a second here; test_s3_sweep.py flips every bit

    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        self.bucket = Bucket()

    def make_storage(self) -> Storage:
        return self.bucket.storage()

    async def crash(self, session: StorageSession) -> None:
        assert isinstance(session, S3Session)
        under_way = {task for task in (session._committing, session._publishing) if task is not None}
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way)
        await session.aclose()  # writes nothing

    def read_raw(self, name: str) -> Mapping[str, bytes]:
        return self.bucket.read_raw(name)

    def write_raw(self, name: str, part: str, data: bytes | None) -> None:
        self.bucket.write_raw(part, data)
