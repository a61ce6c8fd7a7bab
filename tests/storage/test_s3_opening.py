"""What `S3Storage` must give back, however an opening or a write of it ends."""

from __future__ import annotations

import asyncio
import gc
import threading
import types
from collections.abc import Coroutine, Generator
from typing import Any

import aiohttp
import pytest
from s3_proxy import Proxy, answers
from s3_world import VIEW, Bucket, given

from lab_state import S3Storage, UnavailableError
from lab_state.storage import s3 as module
from lab_state.storage.s3 import _client, _connect, _open, _session, _threads

NAME = "opening"
SNAPSHOT = f"state/modules/{NAME}.json"


async def nothing_is_left() -> None:
    """Check that no claim, task or thread of an opening is left."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)
    assert not [key for key in module._Claim._held if key[2] == SNAPSHOT]
    for thread in threading.enumerate():
        if thread.name.startswith(f"lab_state {NAME}"):
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()


def no_connection_is_left() -> None:
    """Check that no connector is open, and that no client was forgotten."""
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, aiohttp.TCPConnector) and not each.closed]


class Interrupter:
    """Cancels the caller of an opening at one of its awaits, and once more when it has heard of the first."""

    def __init__(self, storage: S3Storage, at: int) -> None:
        self._begun = storage._open_claimed
        self._at = at
        self._awaits = 0
        storage._open_claimed = self._open  # type: ignore[assignment, method-assign]
        self.caller = asyncio.create_task(storage.open(NAME))

    async def _open(self, *arguments: Any) -> Any:
        return await self._counted(self._begun(*arguments))

    @types.coroutine
    def _counted(self, call: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        action: Any = call.send
        value: Any = None
        while True:
            try:
                waiting = action(value)
            except StopIteration as end:
                return end.value
            if self._awaits == self._at:
                self.caller.cancel()
                asyncio.get_running_loop().call_soon(self.caller.cancel)
            self._awaits += 1
            try:
                action, value = call.send, (yield waiting)
            except BaseException as error:  # noqa: BLE001 -- it is passed on
                action, value = call.throw, error


async def test_cancelled_twice_anywhere(bucket: Bucket) -> None:
    """An opening that is cancelled at any of its awaits, and once more while it is undone, leaves nothing open."""
    first = await bucket.storage().open(NAME)
    await first.checkpoint(given(b"snapshot"))
    await first.commit(b"1", VIEW)
    await first.aclose()
    for number in range(1000):
        storage = bucket.storage()
        caller = Interrupter(storage, number).caller
        try:
            session = await caller
        except asyncio.CancelledError:
            await nothing_is_left()
        else:
            break
    assert number > 20
    await session.aclose()
    await nothing_is_left()
    no_connection_is_left()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (module, "_Claim"),
        (module, "S3Threads"),
        (module, "_import"),
        (_client, "Requests"),
        (_connect, "connect"),
        (_connect, "_made"),
        (_open, "probe"),
        (_open, "_object"),
        (_open, "_fence"),
        (_open, "Opened"),
        (_session, "S3Session"),
    ],
)
async def test_out_of_memory_anywhere(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """An opening that runs out of memory leaves nothing open, and another one succeeds."""
    first = await bucket.storage().open(NAME)
    await first.commit(b"1", VIEW)
    await first.aclose()

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(MemoryError):
            await bucket.storage().open(NAME)
    await nothing_is_left()
    no_connection_is_left()
    again = await bucket.storage().open(NAME)
    assert again.recovery.records == (b"1",)
    await again.aclose()


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def test_no_thread_for_an_opening(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the opening is an error that says so, and nothing stays open."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(UnavailableError, match="ulimit -u"):
            await bucket.storage().open(NAME)
    await nothing_is_left()
    session = await bucket.storage().open(NAME)
    await session.aclose()


async def test_no_thread_for_a_write(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit and a checkpoint for which no thread can be started fail, and succeed later."""
    session = await bucket.storage().open(NAME)
    await asyncio.to_thread(session._store.thread.shutdown)
    session._store.thread = _threads.S3Threads(NAME)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(UnavailableError, match="can't start new thread"):
            await session.commit(b"1" * 300_000, VIEW)
        with pytest.raises(UnavailableError, match="can't start new thread"):
            await session.checkpoint(given(b"x"))
    await session.commit(b"2", VIEW)
    await session.checkpoint(given(b"y"))
    await session.aclose()
    await asyncio.to_thread(session._store.thread.shutdown)
    assert bucket.get(SNAPSHOT)[0] == b"y"


# A store that contradicts itself


async def test_a_store_whose_answers_disagree(bucket: Bucket, proxy: Proxy) -> None:
    """If the store refuses to replace a snapshot that HEAD shows unchanged, it is sent a few times, with pauses."""
    storage = bucket.storage(proxy.url)
    session = await storage.open(NAME)
    await session.checkpoint(given(b"before"))
    proxy.plan("PUT", SNAPSHOT, answers(412, "PreconditionFailed"), times=float("inf"))
    slept: list[float] = storage._time.slept  # type: ignore[attr-defined]
    seen = len(proxy.seen)
    await session.commit(b"1", VIEW)
    with pytest.raises(UnavailableError, match="refused 4 times"):
        await session.checkpoint(given(b"after"))
    sent = [line for line in proxy.seen[seen:] if line.startswith("PUT") and SNAPSHOT in line]
    assert len(sent) == 8  # each time with the ETag in quotation marks, and without
    assert len(slept) == 4
    proxy.end_plans()
    await session.checkpoint(given(b"after"))
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == b"after"
