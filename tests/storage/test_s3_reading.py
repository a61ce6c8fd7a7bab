"""Reading a state in S3 beside its writer."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_world import VIEW, Bucket, given

from lab_state import (
    Config,
    CorruptionError,
    FileStorage,
    Manager,
    MemoryStorage,
    UnavailableError,
    UnsupportedError,
    copy_state,
    read_state,
)
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._outcomes import ObjectInfo
from lab_state.testing._conformance_tools import opened

NAME = "lab"


async def test_a_running_state_is_read(bucket: Bucket) -> None:
    """Reading writes no fence and no probe. The bucket stays as it was, and the writer goes on."""
    async with Manager(Config(name=NAME, flush_interval=None), bucket.storage()) as state:
        await state.set("a", 1)
        await state.flush()
        before = bucket.keys()
        view = await read_state(NAME, bucket.storage())
        assert bucket.keys() == before
        assert (await view.get_all(), view.revision, view.durable_revision, view.live) == ({"a": 1}, 1, 1, None)
        await state.set("b", 2)
        await state.flush()
        assert (await read_state(NAME, bucket.storage())).revision == 2
    assert (await read_state(NAME, bucket.storage())).revision == 2


async def test_a_mistyped_name_leaves_nothing_in_the_bucket(bucket: Bucket) -> None:
    """Reading or copying a name without a state is an error, and nothing is written."""
    for call in (read_state(NAME, bucket.storage()), copy_state(NAME, bucket.storage(), MemoryStorage())):
        with pytest.raises(UnsupportedError, match=r"there is no state at s3://.*lab\.json: check the name"):
            await call
    assert bucket.keys() == {}


async def test_a_copy_leaves_its_source_alone(bucket: Bucket, tmp_path: Path) -> None:
    """A copy deposes no writer of its source and creates no object there. A mistyped name on disk creates no file."""
    target = MemoryStorage()
    async with Manager(Config(name=NAME, flush_interval=None), bucket.storage()) as state:
        await state.set("a", 1)
        await state.flush()
        before = bucket.keys()
        assert await copy_state(NAME, bucket.storage(), target) == 1
        assert bucket.keys() == before
        await state.set("b", 2)
        await state.flush()
    assert (await read_state(NAME, target)).revision == 1
    with pytest.raises(UnsupportedError, match="there is no directory"):
        await copy_state("mistyped", FileStorage(tmp_path / "new"), target)
    assert list(tmp_path.iterdir()) == []


def first(monkeypatch: pytest.MonkeyPatch, request: str, *, before: Any = None, after: Any = None) -> list[str]:
    """Make a call before or after the first request of a kind; return the list of requests, as they come."""
    send, seen = getattr(Requests, request), list[str]()

    async def sent(store: Requests, *where: str) -> Any:
        seen.append(where[0])
        is_first = len(seen) == 1
        if is_first and before is not None:
            await before()
        found = await send(store, *where)
        if is_first and after is not None:
            await after()
        return found

    monkeypatch.setattr(Requests, request, sent)
    return seen


async def test_a_checkpoint_between_snapshot_and_list(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint between the snapshot and the list is noticed. The old snapshot alone would be a loss."""
    async with opened(bucket.storage(), NAME) as session:
        await session.checkpoint(given(b'{"old":1}'))
        for number in range(3):
            await session.commit(b"%d" % number, VIEW)
        lists = first(monkeypatch, "sizes", before=lambda: session.checkpoint(given(b'{"new":1}')))
        reading = await bucket.storage().read(NAME)
        assert len(lists) > 1
    assert (reading.snapshot, reading.records) == (b'{"new":1}', ())


async def test_a_checkpoint_between_list_and_records(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """If records were deleted before they are fetched, a snapshot covers them, and everything is read again."""
    async with opened(bucket.storage(), NAME) as session:
        await session.commit(b"1", VIEW)
        first(monkeypatch, "sizes", after=lambda: session.checkpoint(given(b'{"new":1}')))
        reading = await bucket.storage().read(NAME)
    assert (reading.snapshot, reading.records) == (b'{"new":1}', ())


async def test_a_missing_record_is_damage_for_a_reader(bucket: Bucket) -> None:
    """A gap is damage while the snapshot stays the same, and nothing is written."""
    async with opened(bucket.storage(), NAME) as session:
        for number in range(3):
            await session.commit(b"%d" % number, VIEW)
    keys = sorted(key for key, size in bucket.keys().items() if size)
    bucket.delete(keys[1])
    before = bucket.keys()
    with pytest.raises(CorruptionError, match="missing"):
        await bucket.storage().read(NAME)
    assert bucket.keys() == before


async def test_a_snapshot_replaced_again_and_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader gives up after half a minute if the snapshot is replaced during each reading."""
    bucket.put(f"state/modules/{NAME}.json", b'{"a":1}')
    etags = itertools.count()

    async def headed(store: Requests, key: str) -> Any:
        return ObjectInfo(f'"{next(etags)}"', {}, 7)

    monkeypatch.setattr(Requests, "head", headed)
    with pytest.raises(UnavailableError, match=r"reading s3://.* failed \d+ times in 30 s"):
        await bucket.storage().read(NAME)


async def test_a_snapshot_put_there_by_hand_is_read(bucket: Bucket) -> None:
    """A snapshot without a stamp is read. It says neither what it covers nor its revision."""
    bucket.put(f"state/modules/{NAME}.json", b'{"a":1}')
    view = await read_state(NAME, bucket.storage())
    assert (await view.get_all(), view.revision) == ({"a": 1}, 0)


@pytest.mark.parametrize("again", [False, True])
async def test_a_reading_cancelled_anywhere(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, *, again: bool) -> None:
    """A reading that is cancelled at any request, and once more later, leaves no task, thread or connection."""
    close, closed = Requests.aclose, list[Requests]()

    async def closed_slowly(store: Requests) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        await close(store)
        closed.append(store)

    async with opened(bucket.storage(), NAME) as session:
        await session.checkpoint(given(b"snapshot"))
        await session.commit(b"1", VIEW)
    monkeypatch.setattr(Requests, "aclose", closed_slowly)
    for number in itertools.count():
        storage = bucket.storage()
        caller = asyncio.create_task(storage.read(NAME))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Requests, "_client", cancelling(caller, number, again=again))
            try:
                await caller
            except asyncio.CancelledError:
                assert {asyncio.current_task()} == asyncio.all_tasks() or again
            else:
                break
        await quiet()
        assert len(closed) == number + 1
    assert number >= 3


def cancelling(caller: asyncio.Task[Any], number: int, *, again: bool) -> Callable[[Requests], Any]:
    """Replace the first step of each request, so that one of them cancels the caller."""
    client, requests, later = Requests._client, itertools.count(), list[asyncio.Task[None]]()

    async def connected(store: Requests) -> Any:
        found = await client(store)
        if next(requests) == number:
            caller.cancel()
            if again:
                later.append(asyncio.create_task(cancel_later(caller)))
        return found

    return connected


async def cancel_later(caller: asyncio.Task[Any]) -> None:
    for _ in range(4):  # when it has heard of the first, and closes what is open
        await asyncio.sleep(0)
    caller.cancel()


async def quiet() -> None:
    """Wait until no other task and no thread of a reading is left."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)
    for thread in threading.enumerate():
        if thread.name.startswith(f"lab_state {NAME}"):
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()
