"""The migration of a state in a bucket: one change, at each crash before or after it, and its undo."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from s3_proxy import Forward, Proxy, Request, Response
from s3_world import THOROUGH, Bucket, endpoint

from lab_state import Manager, MigrationDraft, Restored, Schema, SchemaError, StorageError, read_state, restore_state
from lab_state.testing import ManualClock

NAME = "people"
WEEK = 7 * 24 * 3600.0
OLD: dict[str, Any] = {"users/ann": {"name": "Ann B"}, "users/bob": {"name": "Bob C"}, "n": 1}
NEW: dict[str, Any] = {"people/ann": {"first": "Ann", "last": "B"}, "people/bob": {"first": "Bob", "last": "C"}, "n": 1}

POINTS = [*product(range(1, 12), (False, True))] if THOROUGH else [(5, False), (5, True)]
"""The write at which the process crashes, and whether the store has executed that write. Otherwise only the record of the migration."""


def split(draft: MigrationDraft) -> None:
    for key, user in draft.items("users/"):
        first, _, last = user["name"].partition(" ")
        draft.set(key, {"first": first, "last": last})


def move(draft: MigrationDraft) -> None:
    for key in draft.keys("users/"):
        draft.move(key, key.replace("users/", "people/"))


def schema(**more: Any) -> Schema:
    made = Schema(3, types={"people/": dict[str, str]}, **more)
    made.migration(to=2)(split)
    made.migration(to=3)(move)
    return made


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with Proxy(endpoint()) as proxy:
        yield proxy


async def fill(bucket: Bucket, clock: ManualClock) -> None:
    """Make a state of version 1 with a snapshot. One key expires."""
    async with Manager(NAME, bucket.storage(), clock=clock) as state:
        await state.set_many(OLD)
        await state.set("users/ann", OLD["users/ann"], ttl=1000)


async def is_migrated(bucket: Bucket, clock: ManualClock) -> bool:
    """Check that the state is that from before the migration or after it. Return whether it is migrated."""
    view = await read_state(NAME, bucket.storage(), clock=clock)
    assert (view.schema, await view.get_all()) in [(1, OLD), (3, NEW)]
    assert await view.expires_in("people/ann" if view.schema == 3 else "users/ann") == 1000
    return view.schema == 3


async def test_a_migration_and_its_undo(bucket: Bucket, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """A start migrates once. With a history, the log names the revision before, and `restore_state` with it is the undo."""
    caplog.set_level("INFO")
    await fill(bucket, clock)
    storage = bucket.storage(history=WEEK)
    for _ in range(2):
        async with Manager(NAME, storage, clock=clock, schema=schema()) as state:
            assert (await state.get_all(), state.revision) == (NEW, 3)
    assert caplog.text.count("restore_state('people', storage, 2, into='people') undoes the migration") == 1
    assert await restore_state(NAME, storage, 2, into=NAME, clock=clock) == Restored(4, 3)
    assert not await is_migrated(bucket, clock)
    async with Manager(NAME, storage, clock=clock) as older:
        assert await older.get_all() == OLD


async def test_a_newer_state(bucket: Bucket, clock: ManualClock) -> None:
    """Older code is refused without a change, unless `readable_by` allows it. The error names the object, the version and the time."""
    await fill(bucket, clock)
    async with Manager(NAME, bucket.storage(), clock=clock, schema=schema(readable_by=2)):
        pass
    objects = bucket.keys(f"state/modules/{NAME}.json")
    with pytest.raises(
        SchemaError,
        match=rf"s3://{bucket.name}/state/modules/people.json was written at {TIME} by version 3 of the schema, which code from "
        "version 2 on can read",
    ):
        await Manager(NAME, bucket.storage(), clock=clock).start()
    assert bucket.keys(f"state/modules/{NAME}.json") == objects
    assert await is_migrated(bucket, clock)
    older = Schema(2)
    older.migration(to=2)(split)
    async with Manager(NAME, bucket.storage(), clock=clock, schema=older) as state:
        await state.set("n", 2)
    assert (await read_state(NAME, bucket.storage(), clock=clock)).schema == 3


TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


class Crash:
    """An action after which no request reaches the store: from a request that writes on, before or after that request is done."""

    def __init__(self, number: int, *, is_done: bool) -> None:
        self.left = number
        self.is_done = is_done

    async def __call__(self, request: Request, forward: Forward) -> Response | None:
        if request.method in {"PUT", "POST", "DELETE"}:
            self.left -= 1
            if self.left == 0 and self.is_done:
                await forward(request)
        return await forward(request) if self.left > 0 else None


@pytest.mark.parametrize("history", [None, WEEK] if THOROUGH else [WEEK])
async def test_a_crash_at_each_write(bucket: Bucket, proxy: Proxy, clock: ManualClock, history: float | None) -> None:
    """Up to some request the state is that from before, and from then on that from after. The next start completes the migration."""
    await fill(bucket, clock)
    objects = {key: bucket.get(key) for key in bucket.keys("")}
    outcomes: list[bool] = []
    for number, is_done in POINTS:
        for key in bucket.keys("").keys() - objects.keys():
            bucket.delete(key)
        for key, (data, metadata) in objects.items():
            bucket.put(key, data, metadata)
        crash = Crash(number, is_done=is_done)
        proxy.end_plans()
        for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            proxy.plan(method, "", crash, times=float("inf"))
        with suppress(StorageError):
            async with Manager(NAME, bucket.storage(proxy.url, history=history), clock=clock, schema=schema()):
                pass
        outcomes.append(await is_migrated(bucket, clock))
        async with Manager(NAME, bucket.storage(history=history), clock=clock, schema=schema()) as again:
            assert (await again.get_all(), again.revision) == (NEW, 3)
    assert outcomes == sorted(outcomes)
    assert {*outcomes} == {False, True}
    assert not THOROUGH or crash.left > 0  # the last life has met no crash
