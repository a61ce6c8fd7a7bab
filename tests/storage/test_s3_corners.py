"""Rare answers in the calls for the history and the list of states in S3."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from s3_proxy import Proxy, answers
from s3_world import Bucket

from lab_state import CorruptionError, Manager, UnsupportedError, list_states
from lab_state.storage._history import history_of
from lab_state.storage.s3 import _restoring
from lab_state.storage.s3._body import Spool
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import Names
from lab_state.storage.s3._generations import _record
from lab_state.storage.s3._restoring import _Found

NAME = "past"


async def fill(bucket: Bucket) -> None:
    async with Manager(NAME, bucket.storage()) as state:
        await state.set("a", 1)


async def test_two_first_requests_at_once(bucket: Bucket) -> None:
    """They share one connection."""
    await fill(bucket)

    async def work(store: Requests, _: Names) -> bool:
        connecting = store._connecting

        async def slowly() -> Any:
            await asyncio.sleep(0)  # the other request comes meanwhile
            return await connecting()

        store._connecting = slowly
        first, second = await asyncio.gather(store._client(), store._client())
        return first is second

    assert await bucket.storage()._run(NAME, work)


async def test_a_copy_that_cannot_be_kept(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the bytes of an object cannot be kept, the error is raised, and what was kept is discarded."""
    await fill(bucket)
    discarded: list[object] = []
    discard = Spool.discard

    async def add(*_: object) -> None:
        raise MemoryError

    def noted(self: Spool) -> None:
        discarded.append(self)
        discard(self)

    monkeypatch.setattr(Spool, "add", add)
    monkeypatch.setattr(Spool, "discard", noted)

    async def work(store: Requests, names: Names) -> object:
        return await store.get_spooled(names.snapshot)

    with pytest.raises(MemoryError):
        await bucket.storage()._run(NAME, work)
    assert len(discarded) == 1


async def test_states_of_a_missing_bucket(bucket: Bucket, proxy: Proxy) -> None:
    """If the store does not find what is listed, the bucket is missing. The error says so."""
    await fill(bucket)
    proxy.plan("GET", "delimiter", answers(404, "NoSuchKey"), times=float("inf"))
    with pytest.raises(UnsupportedError, match="bucket"):
        await list_states(bucket.storage(proxy.url))


async def test_a_foreign_object_among_the_records(bucket: Bucket) -> None:
    """It does not count as a part of the state."""
    await fill(bucket)
    (before,) = await list_states(bucket.storage())
    bucket.put(f"state/modules/{NAME}.journal/notes", b"foreign")
    assert await list_states(bucket.storage()) == [before]


async def test_a_record_that_is_missing(bucket: Bucket) -> None:
    """Its moment cannot be read: the state is damaged."""
    await fill(bucket)

    async def work(store: Requests, names: Names) -> object:
        return await _record(store, names, 999)

    with pytest.raises(CorruptionError, match="it is not a record"):
        await bucket.storage()._run(NAME, work)


async def test_another_writer_during_a_restore(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another writer has changed the state since the first look, the restore creates another fence."""
    await fill(bucket)
    look = _restoring._look
    looks: list[_Found] = []

    async def looked(store: Requests, names: Names) -> _Found:
        found = await look(store, names)
        looks.append(found)
        if len(looks) == 2:
            found.listed[max(found.listed) + 1] = 1
        return found

    monkeypatch.setattr(_restoring, "_look", looked)
    restoring = await history_of(bucket.storage()).restoring(NAME)
    await restoring.aclose()
    assert len(looks) == 4
