"""Restores of a state in S3: in place, into another name, and the undo. The list of states, and their removal."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from itertools import product
from typing import Any

import pytest
from histories import checkpoint
from s3_proxy import Action, Before, Proxy, answer_lost, answers, done_but_answers, lost
from s3_world import THOROUGH, VIEW, Bucket, some
from seeded import Change, put_in

from lab_state import (
    CorruptionError,
    FencedError,
    LabStateError,
    LockedError,
    Manager,
    Restored,
    StorageError,
    UnavailableError,
    UnsupportedError,
    copy_state,
    list_generations,
    list_states,
    read_state,
    remove_state,
    restore_state,
)
from lab_state.storage._history import history_of
from lab_state.storage.s3 import _Claim, _restoring
from lab_state.storage.s3._restoring import S3Restoring
from lab_state.testing import ManualClock

NAME = "past"
BASE = f"state/modules/{NAME}"
JOURNAL = f"{BASE}.journal/"
SNAPSHOT = f"{BASE}.json"
HISTORY = f"{BASE}.history/"
FOREVER = float("inf")
WEEK = 7 * 24 * 3600.0

PARTS = (".json", ".journal", ".history", ".probe")

Model = dict[int, dict[str, Any]]


@pytest.fixture(params=[WEEK, None], ids=["history", "no history"])
def history(request: pytest.FixtureRequest) -> float | None:
    length: float | None = request.param
    return length


def records(bucket: Bucket) -> list[str]:
    return [key for key, size in bucket.keys(JOURNAL).items() if size]


_filled: dict[float | None, tuple[Model, dict[str, tuple[bytes, dict[str, str]]]]] = {}


async def fill(bucket: Bucket, clock: ManualClock, history: float | None) -> Model:
    """Make three revisions before a checkpoint, and three after it. Return their values. The writer has crashed.

    The objects are made once. Later calls put the same objects into their bucket.
    """
    if history not in _filled:
        _filled[history] = await _fill(bucket, ManualClock(), history)
    model, objects = _filled[history]
    clock.advance(6)
    for key in bucket.keys(BASE).keys() - objects.keys():
        bucket.delete(key)
    for key, (data, metadata) in objects.items():
        bucket.put(key, data, metadata)
    return model


async def _fill(
    bucket: Bucket, clock: ManualClock, history: float | None
) -> tuple[Model, dict[str, tuple[bytes, dict[str, str]]]]:
    model: Model = {}
    state = Manager(NAME, bucket.storage(history=history), clock=clock)
    await state.start()
    for number in range(6):
        clock.advance(1)
        await state.set(f"key-{number % 3}", number)
        await state.set(f"short-{number}", number, ttl=1000)
        await state.flush()
        model[state.revision] = await state.get_all()
        if number == 2:
            await checkpoint(state)
    objects = {key: bucket.get(key) for key in bucket.keys(BASE)}
    await state.stop()
    return model, objects


async def values(bucket: Bucket, clock: ManualClock, name: str = NAME, **arguments: Any) -> dict[str, Any]:
    return await (await read_state(name, bucket.storage(), clock=clock, **arguments)).get_all()


async def test_in_place_and_the_undo(bucket: Bucket, clock: ManualClock, history: float | None) -> None:
    """The restored state is a new revision, and the undo is the next one. The manager continues with both."""
    model = await fill(bucket, clock, history)
    storage = bucket.storage(history=history)
    assert await restore_state(NAME, storage, 8, into=NAME, clock=clock) == Restored(13, 12)
    assert await values(bucket, clock) == model[8]
    assert await restore_state(NAME, storage, 12, into=NAME, clock=clock) == Restored(14, 13)
    found = await list_generations(NAME, storage)
    assert [one.hole_before for one in found] == [False] * len(found)
    for revision in range(found[0].first_revision + found[0].first_revision % 2, 13, 2):
        assert revision == 0 or await values(bucket, clock, at=revision) == model[revision]
    assert await values(bucket, clock, at=13) == model[8]
    async with Manager(NAME, storage, clock=clock) as state:
        assert (state.revision, await state.get_all()) == (14, model[12])
        await state.set("new", 1)
    assert (await restore_state(NAME, storage, 13, into=NAME, clock=clock)).revision == 16
    assert await values(bucket, clock) == model[8]


async def test_expired_keys(bucket: Bucket, clock: ManualClock) -> None:
    """Keys that have expired since the moment are not restored. Other keys keep their expiry."""
    model = await fill(bucket, clock, WEEK)
    clock.advance(995)
    await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock)
    view = await read_state(NAME, bucket.storage(), clock=clock)
    assert await view.get_all() == {key: value for key, value in model[8].items() if key != "short-0"}
    assert (await view.expires_in("short-3")) == pytest.approx(3)


async def test_into_another_name(bucket: Bucket, clock: ManualClock, history: float | None) -> None:
    """The new state has the revision of the moment. A manager may be running on the first one, and is not disturbed."""
    model = await fill(bucket, clock, history)
    async with Manager(NAME, bucket.storage(history=history), clock=clock) as state:
        assert await restore_state(NAME, bucket.storage(), 8, into="other", clock=clock) == Restored(8, None)
        await state.set("a", 1)
        await state.flush()
    assert await values(bucket, clock, "other") == model[8]
    for storage in (bucket.storage(), bucket.storage(history=WEEK)):
        with pytest.raises(ValueError, match=r"'other' exists: s3://.*/other\.json is there"):
            await restore_state(NAME, storage, 13, into="other", clock=clock)


@pytest.mark.parametrize("key", ["other.journal/00000000000000000001", "other.history/x"])
async def test_into_a_name_with_something(bucket: Bucket, clock: ManualClock, key: str) -> None:
    """A name with a fence or a history is not new."""
    await fill(bucket, clock, None)
    bucket.put(f"state/modules/{key}", b"")
    with pytest.raises(ValueError, match=f"{key} is there"):
        await restore_state(NAME, bucket.storage(), 8, into="other", clock=clock)


async def test_a_state_that_runs(bucket: Bucket, clock: ManualClock, proxy: Proxy) -> None:
    """A manager of this process refuses a restore in place. One of another process is fenced by it."""
    model = await fill(bucket, clock, WEEK)
    async with Manager(NAME, bucket.storage(history=WEEK), clock=clock):
        with pytest.raises(LockedError):
            await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock)
    other = await bucket.storage(proxy.url, history=WEEK).open(NAME)  # the address differs, as in another process
    await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock)
    with pytest.raises(FencedError):
        await other.commit(b"late", VIEW)
    await other.aclose()
    assert await values(bucket, clock) == model[8]


async def test_two_restores_at_once(bucket: Bucket, clock: ManualClock) -> None:
    """In one process, one of them is refused."""
    model = await fill(bucket, clock, WEEK)
    storage = bucket.storage()
    done = await asyncio.gather(
        *(restore_state(NAME, storage, at, into=NAME, clock=clock) for at in (6, 8)), return_exceptions=True
    )
    assert {type(one) for one in done} == {Restored, LockedError}
    assert await values(bucket, clock) == model[6 if isinstance(done[0], Restored) else 8]


async def test_a_state_without_a_snapshot(bucket: Bucket, clock: ManualClock, history: float | None) -> None:
    """A state that has only records can be restored. Its records become the first generation."""
    session = await bucket.storage(history=history).open(NAME)
    for number in range(3):
        text = b'{"from":%d,"to":%d,"clear":false,"set":{"n":%d},"delete":[],"expires":{},"wall":%d}'
        await session.commit(text % (number, number + 1, number, int(clock.time() * 1000)), VIEW)
    await session.aclose()
    assert await restore_state(NAME, bucket.storage(history=history), 1, into=NAME, clock=clock) == Restored(4, 3)
    assert await values(bucket, clock) == {"n": 0}
    async with Manager(NAME, bucket.storage(history=history), clock=clock) as state:
        await state.set("b", 1)
    assert await values(bucket, clock, at=3) == {"n": 2}


# Faults


FAULTS = [lost, answer_lost, answers(500), done_but_answers(500), answers(503, "SlowDown")]


@pytest.mark.parametrize(("part", "fault"), some(product(PARTS, FAULTS), 6))
async def test_a_restore_gets_through(
    bucket: Bucket, proxy: Proxy, clock: ManualClock, fault: Action, part: str
) -> None:
    """Whatever happens to a write of a restore or to its answer, the state is restored once."""
    model = await fill(bucket, clock, WEEK)
    proxy.plan("PUT", part, fault, times=2)
    assert (await restore_state(NAME, bucket.storage(proxy.url), 8, into=NAME, clock=clock)).revision == 13
    assert await values(bucket, clock) == model[8]
    assert await values(bucket, clock, at=12) == model[12]


@pytest.mark.parametrize(("fault", "part"), some(product([lost, answer_lost, answers(403, "AccessDenied")], PARTS), 5))
async def test_a_restore_that_fails(bucket: Bucket, proxy: Proxy, clock: ManualClock, fault: Action, part: str) -> None:
    """The state is the old one or the restored one. The old one is still in the history. A second call restores it."""
    model = await fill(bucket, clock, WEEK)
    proxy.plan("PUT", part, fault, times=FOREVER)
    proxy.plan(
        "HEAD", part, lost if part != ".json" else answers(500), times=0 if fault is not answer_lost else FOREVER
    )
    with pytest.raises(StorageError):
        await restore_state(NAME, bucket.storage(proxy.url), 8, into=NAME, clock=clock)
    assert await values(bucket, clock) in (model[12], model[8])
    proxy.end_plans()
    assert (await restore_state(NAME, bucket.storage(proxy.url), 8, into=NAME, clock=clock)).revision in (13, 14)
    assert await values(bucket, clock) == model[8]
    assert await values(bucket, clock, at=12) == model[12]


async def restored_unless_cancelled(
    proxy: Proxy, number: int, restore: Coroutine[Any, Any, Restored]
) -> Restored | None:
    """Cancel a restore at one of its requests, by the number of the request. Return `None` if it was cancelled before its end."""
    end = len(proxy.seen) + number

    def cancel() -> None:
        if len(proxy.seen) == end:
            task.cancel()

    for method in ("GET", "HEAD", "PUT"):
        proxy.plan(method, "", Before(cancel), times=FOREVER)
    task = asyncio.create_task(restore)
    try:
        return await task
    except asyncio.CancelledError:
        return None
    finally:
        proxy.end_plans()


async def test_a_restore_that_is_cancelled(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """Whichever request is sent, the state is the old one or the restored one, and the next call restores it."""
    model = await fill(bucket, clock, WEEK)
    for number in itertools.count(1, 7 if THOROUGH else 23):
        storage = bucket.storage(proxy.url)
        restore = restore_state(NAME, storage, 8, into=NAME, clock=clock)
        if await restored_unless_cancelled(proxy, number, restore) is not None:
            break
        assert await values(bucket, clock) in (model[12], model[8])
    assert number > 20
    assert await values(bucket, clock) == model[8]
    assert await values(bucket, clock, at=12) == model[12]


async def test_a_writer_at_the_same_time(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """If another writer takes the number of the fence, or writes below it, the restore begins again under a new fence."""
    model = await fill(bucket, clock, WEEK)

    async def start_and_stop() -> None:
        session = await bucket.storage(history=WEEK).open(NAME)
        await session.aclose()

    proxy.plan("PUT", ".journal", Before(start_and_stop))
    proxy.plan("PUT", ".probe", Before(start_and_stop))
    assert (await restore_state(NAME, bucket.storage(proxy.url), 8, into=NAME, clock=clock)).revision == 13
    assert await values(bucket, clock) == model[8]


@pytest.mark.parametrize("is_damaged", [False, True])
async def test_a_snapshot_replaced_during_the_restore(
    bucket: Bucket, proxy: Proxy, clock: ManualClock, *, is_damaged: bool
) -> None:
    """If another program replaces the snapshot under the fence, the restore fails, and changes nothing."""
    await fill(bucket, clock, WEEK)
    restoring = await history_of(bucket.storage(proxy.url)).restoring(NAME)
    proxy.plan("GET", f"{NAME}.json", Before(lambda: bucket.put(SNAPSHOT, b'{"not":"ours"}')))
    with pytest.raises(UnavailableError, match="was replaced while it was"):
        await restoring.put(VIEW, is_damaged=is_damaged)
    await restoring.aclose()
    assert bucket.get(SNAPSHOT)[0] == b'{"not":"ours"}'


# Damaged states


def damage_snapshot(bucket: Bucket) -> None:
    bucket.put(SNAPSHOT, bucket.get(SNAPSHOT)[0][:-20], bucket.get(SNAPSHOT)[1])


def damage_metadata(bucket: Bucket) -> None:
    bucket.put(SNAPSHOT, bucket.get(SNAPSHOT)[0], {**bucket.get(SNAPSHOT)[1], "labstateseq": "x"})


def damage_record(bucket: Bucket) -> None:
    bucket.put(records(bucket)[-1], b"damaged", bucket.get(records(bucket)[-1])[1])


def lose_record(bucket: Bucket) -> None:
    bucket.delete(records(bucket)[-2])


def stray_number(bucket: Bucket) -> None:
    bucket.put(f"{JOURNAL}{10**19:020d}", b"")


@pytest.mark.parametrize("damage", [damage_snapshot, damage_metadata, damage_record, lose_record])
async def test_a_damaged_state(bucket: Bucket, clock: ManualClock, damage: Callable[[Bucket], None]) -> None:
    """It is restored like another one. Its objects are kept in a place of their own, until a person deletes them."""
    model = await fill(bucket, clock, WEEK)
    async with Manager(NAME, bucket.storage(history=WEEK), clock=clock) as state:
        await state.set("last", 1)
        await checkpoint(state)
        for number in range(3):
            await state.set("unsaved", number)
            await state.flush()
        objects = {key: bucket.get(key) for key in bucket.keys(BASE)}
    for key, (data, metadata) in objects.items():
        bucket.put(key, data, metadata)
    for key in bucket.keys(BASE).keys() - objects.keys():
        bucket.delete(key)
    damage(bucket)
    damaged = bucket.get(SNAPSHOT)
    with pytest.raises(CorruptionError, match="The newest good generation ends at revision"):
        await read_state(NAME, bucket.storage())
    restored = await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock)
    assert restored.before is None
    assert restored.revision >= 14
    async with Manager(NAME, bucket.storage(history=WEEK), clock=clock) as state:
        assert await state.get_all() == model[8]
        await state.set("again", 1)
    kept = [key for key in bucket.keys(BASE) if ".damaged-" in key]
    assert [key for key in kept if key.endswith(".json")]
    assert bucket.get(kept[-1]) == damaged
    assert await values(bucket, clock, at=10) == model[10]


async def test_a_damaged_state_whose_restore_is_cancelled(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """Whichever request is sent, each damaged object is in its place or in the place for it, with all its bytes."""
    model = await fill(bucket, clock, WEEK)
    damage_record(bucket)
    damaged = {key: bucket.get(key)[0] for key in [SNAPSHOT, *records(bucket)]}
    for number in itertools.count(1, 5 if THOROUGH else 40):
        storage = bucket.storage(proxy.url)
        restore = restore_state(NAME, storage, 4, into=NAME, clock=clock)
        done = await restored_unless_cancelled(proxy, number, restore)
        kept = [key for key in bucket.keys(BASE) if ".damaged-" in key]
        for key, data in damaged.items():
            copies = [one for one in kept if one.endswith(key.rpartition("/")[2])]
            assert any(bucket.get(one)[0] == data for one in [key, *copies])
        if done is not None:
            break
    assert number > 40
    assert await values(bucket, clock) == model[4]


async def test_a_stray_object(bucket: Bucket, clock: ManualClock) -> None:
    """An object with a number that no writer reaches has to be deleted first. The older generations can be read beside it."""
    model = await fill(bucket, clock, WEEK)
    async with Manager(NAME, bucket.storage(history=WEEK), clock=clock):
        pass
    stray_number(bucket)
    with pytest.raises(CorruptionError, match="no writer reaches this number"):
        await bucket.storage().open(NAME)
    assert not any(one.in_use for one in await list_generations(NAME, bucket.storage()))
    assert await values(bucket, clock, at=8) == model[8]
    await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock)
    bucket.delete(f"{JOURNAL}{10**19:020d}")
    assert await values(bucket, clock) == model[8]


async def test_a_damaged_state_without_objects(bucket: Bucket, clock: ManualClock) -> None:
    """If the objects are gone, only the history is left, and there is nothing to keep apart."""
    model = await fill(bucket, clock, WEEK)
    async with Manager(NAME, bucket.storage(history=WEEK), clock=clock):
        pass
    bucket.delete(SNAPSHOT)
    restored = await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock)
    assert restored.before is None
    assert await values(bucket, clock) == model[8]


async def test_the_highest_revision(bucket: Bucket, clock: ManualClock) -> None:
    """Damaged records are left out of the search for it. A record that is deleted during the search is left out, too."""
    await fill(bucket, clock, WEEK)
    damage_record(bucket)
    restoring = await history_of(bucket.storage()).restoring(NAME)
    assert await restoring.highest() == 10
    bucket.delete(records(bucket)[-2])
    assert await restoring.highest() == 8
    await restoring.aclose()


# The list of states, and removal


async def test_the_list(bucket: Bucket, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has each state with its size and that of its history. A name that no manager can use is not in it."""
    assert await list_states(bucket.storage()) == []
    await fill(bucket, clock, WEEK)
    bucket.put("state/modules/plain.json", b"{}")
    bucket.put("state/modules/bad name.json", b"{}")
    bucket.put("state/modules/notes.txt", b"{}")
    bucket.put("state/modules/cut.json", b"{}", {"labstateseq": "x"})
    session = await bucket.storage().open("empty")
    await session.aclose()
    monkeypatch.setattr("lab_state.storage.s3._client._LISTED_AT_ONCE", 2)
    found = {state.name: state for state in await list_states(bucket.storage())}
    assert list(found) == ["cut", "empty", NAME, "plain"]
    assert (found["plain"].size, found["empty"].size) == (2, 0)
    later = records(bucket)[3:]
    assert found[NAME].size == bucket.keys(SNAPSHOT)[SNAPSHOT] + sum(bucket.keys(key)[key] for key in later)
    with pytest.raises(UnsupportedError, match="no such bucket"):
        await list_states(type(bucket).storage(_missing(bucket)))


def _missing(bucket: Bucket) -> Bucket:
    missing = object.__new__(Bucket)
    missing.name = f"{bucket.name}-missing"
    return missing


async def test_removal(bucket: Bucket, clock: ManualClock) -> None:
    """A state without a history leaves nothing. It can be made again."""
    await fill(bucket, clock, None)
    bucket.put("state/modules/past2.json", b"{}")
    await remove_state(NAME, bucket.storage())
    assert list(bucket.keys()) == ["state/modules/past2.json"]
    with pytest.raises(UnsupportedError, match="no state"):
        await remove_state(NAME, bucket.storage())
    async with Manager(NAME, bucket.storage(), clock=clock) as state:
        assert await state.get_all() == {}


async def test_removal_with_a_storage_that_keeps_a_history(bucket: Bucket, clock: ManualClock) -> None:
    """The last generation gets into the history, also if there was none before."""
    model = await fill(bucket, clock, None)
    await remove_state(NAME, bucket.storage(history=WEEK))
    assert await values(bucket, clock, at=12) == model[12]


async def test_removal_without_the_history(bucket: Bucket, clock: ManualClock) -> None:
    """The history stays, also of a state that is made again. A moment of it can be restored."""
    model = await fill(bucket, clock, WEEK)
    await remove_state(NAME, bucket.storage())
    assert [one[:2] for one in await list_states(bucket.storage())] == [(NAME, 0)]
    objects = bucket.keys()
    with pytest.raises(UnsupportedError, match="there is no state"):
        await read_state(NAME, bucket.storage())
    assert await values(bucket, clock, at=12) == model[12]
    with pytest.raises(ValueError, match="lacks the state in use"):
        await read_state(NAME, bucket.storage(), at=13)
    await remove_state(NAME, bucket.storage())
    assert bucket.keys() == objects  # a second removal changes nothing
    async with Manager(NAME, bucket.storage(history=WEEK), clock=clock) as state:
        assert (state.revision, await state.get_all()) == (0, {})
        await state.set("new", 1)
        await state.flush()
        assert [one.name for one in await list_states(bucket.storage())] == [NAME]
    assert await values(bucket, clock, at=12) == model[12]
    assert await values(bucket, clock) == {"new": 1}
    assert (await restore_state(NAME, bucket.storage(), 12, into=NAME, clock=clock)).revision == 13
    assert await values(bucket, clock) == model[12]


async def test_a_restore_after_a_removal(bucket: Bucket, clock: ManualClock) -> None:
    """A removed state is restored in place. There was no state before."""
    model = await fill(bucket, clock, WEEK)
    await remove_state(NAME, bucket.storage())
    assert await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock) == Restored(13, None)
    assert await values(bucket, clock) == model[8]


async def test_a_copy_after_a_removal(bucket: Bucket, clock: ManualClock) -> None:
    """A removed state is empty, so another one can be copied to its name."""
    await fill(bucket, clock, WEEK)
    await remove_state(NAME, bucket.storage())
    source = bucket.storage(prefix="source")
    async with Manager(NAME, source, clock=clock) as state:
        await state.set("a", 1)
    await copy_state(NAME, source, bucket.storage())
    assert await values(bucket, clock) == {"a": 1}


async def test_removal_with_the_history(bucket: Bucket, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, whether the state was removed before or not."""
    monkeypatch.setattr("lab_state.storage.s3._client._LISTED_AT_ONCE", 2)
    for twice in (False, True):
        await fill(bucket, clock, WEEK)
        if twice:
            await remove_state(NAME, bucket.storage())
        await remove_state(NAME, bucket.storage(), history=True)
        assert bucket.keys() == {}


async def test_removal_of_a_state_in_use(bucket: Bucket, clock: ManualClock) -> None:
    """A state that this process has open is not removed."""
    async with Manager(NAME, bucket.storage(), clock=clock):
        with pytest.raises(LockedError):
            await remove_state(NAME, bucket.storage())


@pytest.mark.parametrize("fault", [lost, answers(403, "AccessDenied")])
@pytest.mark.parametrize("after", [0, 1, 2])
async def test_removal_that_is_interrupted(
    bucket: Bucket, proxy: Proxy, clock: ManualClock, fault: Action, after: int
) -> None:
    """The state is as it was, or is refused by a start, or is gone. The next call removes the rest."""
    model = await fill(bucket, clock, WEEK)
    proxy.plan("POST", "", Before(), times=after)
    proxy.plan("POST", "", fault, times=FOREVER)
    with pytest.raises(StorageError):
        await remove_state(NAME, bucket.storage(proxy.url), history=True)
    proxy.end_plans()
    if after == 1:
        with pytest.raises(CorruptionError):
            await bucket.storage().open(NAME)
    elif not after:
        assert await values(bucket, clock) == model[12]
    else:
        assert list(bucket.keys()) == [f"{BASE}.probe"]
        return
    await remove_state(NAME, bucket.storage(), history=True)
    assert bucket.keys() == {}


@pytest.mark.parametrize("step", ["copy", "put"])
async def test_removal_beside_another_program(bucket: Bucket, proxy: Proxy, clock: ManualClock, step: str) -> None:
    """If another program replaces the snapshot meanwhile, the removal fails, and leaves its file."""
    await fill(bucket, clock, WEEK)
    replace = Before(lambda: bucket.put(SNAPSHOT, b'{"not":"ours"}'))
    if step == "copy":
        restoring = await _restoring_of(bucket, proxy)
        proxy.plan("GET", f"{NAME}.json", replace)
    else:
        restoring = await _restoring_of(bucket, proxy)
        proxy.plan("PUT", f"{NAME}.json", replace)
    with pytest.raises(UnavailableError, match="was replaced while it was removed"):
        await restoring.remove()
    await restoring.aclose()
    assert bucket.get(SNAPSHOT)[0] == b'{"not":"ours"}'


async def _restoring_of(bucket: Bucket, proxy: Proxy) -> _restoring.S3Restoring:
    restoring = await history_of(bucket.storage(proxy.url)).restoring(NAME)
    assert isinstance(restoring, _restoring.S3Restoring)
    return restoring


# The tests can fail


async def restore_once(bucket: Bucket, clock: ManualClock) -> None:
    """Check a restore in a state without a history. The state before can still be read."""
    model = await fill(bucket, clock, None)
    assert await restore_state(NAME, bucket.storage(), 8, into=NAME, clock=clock) == Restored(13, 12)
    assert await values(bucket, clock) == model[8]
    assert await values(bucket, clock, at=12) == model[12]


Finder = Callable[[Bucket, ManualClock], Awaitable[None]]

# `fill` may run for the first time with one of these bugs, so no bug may change what a writer stores.
BUGS: dict[str, tuple[list[Change], Finder]] = {
    "a restore takes a number that a record has": (
        [(_restoring, "open_to_restore", "max(before.listed, default=before.seq) + 1", "before.seq + 1")],
        restore_once,
    ),
    "a restore keeps nothing": (
        [(S3Restoring, "put", "self._found.present is not None and not await", "False and not await")],
        restore_once,
    ),
    "a restore takes a revision that a change has": (
        [(S3Restoring, "highest", "highest = max(highest, moment.revision)", "highest = self._found.revision")],
        test_the_highest_revision,
    ),
    "a restore does not keep the damaged objects": (
        [(S3Restoring, "put", "place = await self._keep_apart()", "place = None")],
        lambda bucket, clock: test_a_damaged_state(bucket, clock, damage_snapshot),
    ),
}


# A test that fails leaves its sessions open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("bug", [*BUGS][: None if THOROUGH else 2])
async def test_a_bug_is_found(bug: str, bucket: Bucket, clock: ManualClock) -> None:
    """With a bug in the storage, a test above fails."""
    changes, finder = BUGS[bug]
    with put_in(changes), pytest.raises((AssertionError, LabStateError, ValueError)):
        await finder(bucket, clock)
    _Claim._held.clear()
