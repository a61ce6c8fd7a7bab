"""The generations of a state in S3, and the state at each moment of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from histories import checkpoint
from s3_proxy import Before, Proxy, answers, lost
from s3_world import Bucket, given, some

from lab_state import CorruptionError, Manager, UnavailableError, UnsupportedError, list_generations, read_state
from lab_state._codec import encode_snapshot
from lab_state.storage._history import GoneError, history_of
from lab_state.storage.s3 import _keeping
from lab_state.storage.s3._format import KEPT, Names
from lab_state.storage.s3._generations import reach
from lab_state.testing import ManualClock

NAME = "past"
JOURNAL = f"state/modules/{NAME}.journal/"
SNAPSHOT = f"state/modules/{NAME}.json"
HISTORY = f"state/modules/{NAME}.history/"
FOREVER = float("inf")
WEEK = 7 * 24 * 3600.0

START = 1_700_000_000_000

Model = dict[int, tuple[float, dict[str, Any]]]


def record(number: int) -> str:
    return f"{JOURNAL}{number:020d}"


def copies(bucket: Bucket) -> list[str]:
    return list(bucket.keys(HISTORY))


async def run(
    bucket: Bucket, clock: ManualClock, model: Model, *, changes: int = 3, history: float | None = WEEK
) -> None:
    """Make some changes, one second apart, and a checkpoint at the stop. Note the values at each revision in the model."""
    async with Manager(NAME, bucket.storage(history=history), clock=clock) as state:
        for _ in range(changes):
            clock.advance(1)
            await state.incr("n")
            await state.set(f"key-{state.revision % 5}", state.revision)
            await state.flush()
            model[state.revision] = clock.time(), await state.get_all()
        clock.advance(1)


async def check(bucket: Bucket, model: Model, clock: ManualClock) -> None:
    """Compare each moment of the model with what is read."""
    storage = bucket.storage()
    for revision, (time, values) in some(model.items(), 3):
        view = await read_state(NAME, storage, at=revision)
        assert (view.revision, await view.get_all()) == (revision, values)
        view = await read_state(NAME, storage, at=datetime.fromtimestamp(time, UTC), clock=clock)
        assert (view.revision, await view.get_all()) == (revision, values)


async def test_each_moment(bucket: Bucket, clock: ManualClock) -> None:
    """Each revision and each time give the state at that moment. There is no hole between generations."""
    model: Model = {}
    for _ in range(3):
        await run(bucket, clock, model)
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision, one.hole_before, one.in_use) for one in found] == [
        (0, 6, False, False),
        (6, 12, False, False),
        (12, 18, False, False),
        (18, 18, False, True),
    ]
    assert found[0].first_wall == min(time for time, _ in model.values())
    sizes = {**bucket.keys(HISTORY), **bucket.keys(JOURNAL), **bucket.keys(SNAPSHOT)}
    assert sum(one.size for one in found) == sum(sizes.values())
    await check(bucket, model, clock)
    with pytest.raises(ValueError, match="outside of the history"):
        await read_state(NAME, bucket.storage(), at=19)


async def test_beside_a_writer(bucket: Bucket, clock: ManualClock) -> None:
    """The generation in use grows while a manager runs. A checkpoint moves its moments into the history."""
    model: Model = {}
    async with Manager(NAME, bucket.storage(history=WEEK), clock=clock) as state:
        for number in range(4):
            clock.advance(1)
            await state.set("n", number)
            await state.flush()
            model[state.revision] = clock.time(), await state.get_all()
            if number % 2:
                clock.advance(1)
                await checkpoint(state)
            await check(bucket, model, clock)


async def test_reading_changes_nothing(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """A list takes two requests for each generation, and a reading one for each object. None of them writes."""
    model: Model = {}
    for _ in range(4):
        await run(bucket, clock, model)
    found = await list_generations(NAME, bucket.storage(proxy.url))
    assert len(found) == 5
    assert {line.split()[0] for line in proxy.seen} == {"GET", "HEAD"}
    assert len(proxy.seen) <= 6 + 4 * len(found)
    before = len(proxy.seen)
    history = history_of(bucket.storage(proxy.url))
    generations = await history.generations(NAME)
    listing = len(proxy.seen) - before
    await history.read(NAME, generations.found[1])
    assert len(proxy.seen) - before - listing == 1 + 4  # the snapshot, three records and a fence


async def test_a_snapshot_with_later_changes(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot may have a change whose record it does not cover. Each revision before it is read from the generation before."""
    monkeypatch.setattr(_keeping, "_MOST_NUMBERS", 1)
    session = await bucket.storage(history=WEEK).open(NAME)

    async def commit(revision: int) -> None:
        text = b'{"from":%d,"to":%d,"clear":false,"set":{"n":%d},"delete":[],"expires":{},"wall":%d}'
        await session.commit(text % (revision - 1, revision, revision, START + revision), given(b"{}"))

    def snapshot(revision: int) -> Any:
        return given(*encode_snapshot({"n": revision}, revision, 0, copy_loaded=False, wall=START + revision))

    await commit(1)
    await session.checkpoint(snapshot(1))
    await commit(2)
    await session.checkpoint(snapshot(4))  # taken while the records 3 and 4 are being committed
    await commit(3)
    await commit(4)
    await commit(5)
    await session.checkpoint(snapshot(6))
    await commit(6)
    await session.aclose()
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision, one.hole_before) for one in found] == [
        (0, 1, False), (1, 4, False), (4, 6, False), (6, 6, False),
    ]  # fmt: skip
    for revision in range(1, 7):
        view = await read_state(NAME, bucket.storage(), at=revision)
        assert (view.revision, await view.get("n")) == (revision, revision)


async def test_a_hole(bucket: Bucket, clock: ManualClock) -> None:
    """A session without a history leaves a hole. A moment in it raises an error that names the neighbours."""
    model: Model = {}
    lost_moments: Model = {}
    await run(bucket, clock, model)
    await run(bucket, clock, model)
    await run(bucket, clock, lost_moments, history=None)
    await run(bucket, clock, model)
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision, one.hole_before) for one in found] == [
        (0, 6, False), (6, 12, False), (18, 24, True), (24, 24, False),
    ]  # fmt: skip
    await check(bucket, model, clock)
    with pytest.raises(ValueError, match=r"hole of the history: revision 12 .* and revision 18 "):
        await read_state(NAME, bucket.storage(), at=14)


async def test_a_copy_that_failed(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """Without a copy of a snapshot, the records go on from the snapshot before. So no moment is lost."""
    model: Model = {}
    await run(bucket, clock, model)
    await run(bucket, clock, model)
    proxy.plan("PUT", ".history/", answers(403, "AccessDenied"), times=FOREVER)
    async with Manager(NAME, bucket.storage(proxy.url, history=WEEK), clock=clock) as state:
        await state.set("n", 0)
        await state.flush()
        model[state.revision] = clock.time(), await state.get_all()
        await checkpoint(state)
        assert state.status().history_failures == 1
        clock.advance(1)
    await run(bucket, clock, model)
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision, one.hole_before) for one in found] == [
        (0, 6, False), (6, 13, False), (13, 19, False), (19, 19, False),
    ]  # fmt: skip
    await check(bucket, model, clock)


async def test_a_snapshot_edited_by_hand(bucket: Bucket, clock: ManualClock) -> None:
    """An edit is a change. The moments before it and the edit itself are read."""
    model: Model = {}
    await run(bucket, clock, model)
    data, metadata = bucket.get(SNAPSHOT)
    bucket.put(SNAPSHOT, data[: data.rfind(b',"crc32"')].replace(b'"n":3', b'"n":30') + b"}}", metadata)
    model[7] = clock.time(), {**model[6][1], "n": 30}
    clock.advance(1)
    await run(bucket, clock, model)
    await run(bucket, clock, model)
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision) for one in found] == [(0, 7), (7, 13), (13, 19), (19, 19)]
    for revision, (_, values) in model.items():
        view = await read_state(NAME, bucket.storage(), at=revision)
        assert (view.revision, await view.get_all()) == (revision, values)


async def test_a_state_that_began_again(bucket: Bucket, clock: ManualClock) -> None:
    """A snapshot that was replaced by a plain file begins at revision 0 again. Older moments with higher revisions are still read."""
    model: Model = {}
    for _ in range(2):
        await run(bucket, clock, model)
    bucket.put(SNAPSHOT, b'{"n":100}', bucket.get(SNAPSHOT)[1])
    await run(bucket, clock, {}, changes=1)
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision) for one in found] == [(0, 6), (6, 12), (0, 2), (2, 2)]
    for revision in (8, 12):
        view = await read_state(NAME, bucket.storage(), at=revision)
        assert await view.get_all() == model[revision][1]
    assert await (await read_state(NAME, bucket.storage(), at=2)).get("n") == 101


@pytest.mark.parametrize("metadata", [True, False])
async def test_an_imported_file(bucket: Bucket, clock: ManualClock, *, metadata: bool) -> None:
    """A file of another program is revision 0, in use and in the history."""
    model: Model = {}
    bucket.put(SNAPSHOT, b'{"n":100}')
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.first_wall, one.in_use) for one in found] == [(0, None, True)]
    await run(bucket, clock, model)
    if not metadata:
        bucket.put(SNAPSHOT, bucket.get(SNAPSHOT)[0])
    view = await read_state(NAME, bucket.storage(), at=0)
    assert await view.get_all() == {"n": 100}
    await check(bucket, model, clock)


async def test_a_plain_file_after_records(bucket: Bucket, clock: ManualClock) -> None:
    """A plain file without metadata, beside fences only, is the state in use."""
    for _ in range(2):
        await run(bucket, clock, {}, history=None)
    bucket.put(SNAPSHOT, b'{"n":100}')
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision, one.in_use) for one in found] == [(0, 0, True)]


async def test_many_expiry_times(bucket: Bucket, clock: ManualClock) -> None:
    """If the end of a snapshot does not show its revision, more of it is fetched."""
    for number in range(2):
        async with Manager(NAME, bucket.storage(history=WEEK), clock=clock) as state:
            await state.set_many({f"key-{number}-{key}": key for key in range(300)}, ttl=WEEK)
    found = await list_generations(NAME, bucket.storage())
    assert [one.first_revision for one in found] == [0, 1, 2]


# A state without a history, or without anything


async def test_without_a_history(bucket: Bucket, clock: ManualClock) -> None:
    """There is only the generation in use, with the moments since the last checkpoint."""
    async with Manager(NAME, bucket.storage(), clock=clock) as state:
        await state.set("n", 1)
        await state.flush()
        found = await list_generations(NAME, bucket.storage())
        assert [one[:2] + one[5:] for one in found] == [(0, 1, False, True)]
        assert found[0].first_wall == clock.time()
        await checkpoint(state)
        await state.set("n", 2)
        await state.flush()
        assert [one[:2] for one in await list_generations(NAME, bucket.storage())] == [(1, 2)]


async def test_an_empty_state(bucket: Bucket) -> None:
    """A state that was opened and never written has revision 0. A name that was never opened is an error."""
    session = await bucket.storage(history=WEEK).open(NAME)
    await session.aclose()
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision, one.size) for one in found] == [(0, 0, 0)]
    with pytest.raises(UnsupportedError, match=r"there is no state at s3://.*/other\.json, and no history"):
        await list_generations("other", bucket.storage())


# Damage


def damage(bucket: Bucket, key: str, data: bytes = b"damaged") -> None:
    bucket.put(key, data, bucket.get(key)[1])


@pytest.mark.parametrize("how", ["empty", "metadata", "record", "gap", "snapshot deleted"])
async def test_a_damaged_state_in_use(bucket: Bucket, clock: ManualClock, how: str) -> None:
    """The generations before it can be read. The message says that the state in use is missing from the list."""
    model: Model = {}
    await run(bucket, clock, model)
    await run(bucket, clock, model)
    session = await bucket.storage(history=WEEK).open(NAME)
    for number in (12, 13):
        text = b'{"from":%d,"to":%d,"clear":false,"set":{"n":0},"delete":[],"wall":%d}'
        await session.commit(text % (number, number + 1, round(clock.time() * 1000)), given(b"{}"))
    await session.aclose()
    if how == "empty":
        damage(bucket, SNAPSHOT, b"")
    elif how == "metadata":
        bucket.put(SNAPSHOT, bucket.get(SNAPSHOT)[0], {**bucket.get(SNAPSHOT)[1], "labstateseq": "x"})
    elif how == "record":
        damage(bucket, max(bucket.keys(JOURNAL)))
    elif how == "gap":
        bucket.delete(list(bucket.keys(JOURNAL))[-2])
    else:
        bucket.delete(SNAPSHOT)
    found = await list_generations(NAME, bucket.storage())
    assert [one.in_use for one in found] == [False, False]
    await check(bucket, model, clock)
    with pytest.raises(ValueError, match="lacks the state in use, which was removed or is damaged"):
        await read_state(NAME, bucket.storage(), at=100)


async def test_everything_is_damaged(bucket: Bucket, clock: ManualClock) -> None:
    """If the state in use is damaged and there is no history, the error says so."""
    await run(bucket, clock, {}, history=None)
    damage(bucket, SNAPSHOT, b"")
    with pytest.raises(CorruptionError, match="no earlier generation"):
        await list_generations(NAME, bucket.storage())


async def test_a_damaged_generation(bucket: Bucket, clock: ManualClock) -> None:
    """Damage in one generation is an error for its moments alone. An empty copy is left out."""
    model: Model = {}
    for _ in range(4):
        await run(bucket, clock, model)
    first, second, third = copies(bucket)
    damage(bucket, first, b'{"n":')
    with pytest.raises(CorruptionError, match=r"past\.history/"):
        await read_state(NAME, bucket.storage(), at=8)
    damage(bucket, third, b"")
    assert [one.first_revision for one in await list_generations(NAME, bucket.storage())] == [0, 0, 12, 24]
    await check(bucket, {revision: one for revision, one in model.items() if revision > 12}, clock)
    damage(bucket, [key for key, size in bucket.keys(JOURNAL).items() if size][-2])
    with pytest.raises(CorruptionError, match=r"past\.journal/"):
        await read_state(NAME, bucket.storage(), at=23)
    found = await list_generations(NAME, bucket.storage())
    bucket.put(second, bucket.get(second)[0], {"labstateseq": "x"})
    assert await list_generations(NAME, bucket.storage()) == found  # the key of a copy has its number


async def test_records_that_are_missing(bucket: Bucket, clock: ManualClock) -> None:
    """A generation ends before the first record that is missing."""
    model: Model = {}
    for _ in range(3):
        await run(bucket, clock, model)
    records = [key for key, size in bucket.keys(JOURNAL).items() if size]
    bucket.delete(records[4])
    bucket.delete(records[0])
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision, one.hole_before) for one in found] == [
        (6, 8, False), (12, 18, True), (18, 18, False),
    ]  # fmt: skip
    for key in records[1:6]:
        bucket.delete(key)
    found = await list_generations(NAME, bucket.storage())
    assert [(one.first_revision, one.last_revision) for one in found] == [(6, 6), (12, 18), (18, 18)]


@pytest.mark.parametrize("which", [0, 2])
async def test_a_damaged_record_at_an_end(bucket: Bucket, clock: ManualClock, which: int) -> None:
    """Records without a snapshot whose first record is damaged cannot be read. After a snapshot, the damage is an error of its moments."""
    model: Model = {}
    for _ in range(2):
        await run(bucket, clock, model)
    damage(bucket, [key for key, size in bucket.keys(JOURNAL).items() if size][which + which // 2 * 3])
    found = await list_generations(NAME, bucket.storage())
    assert [one.first_revision for one in found] == ([6, 12] if not which else [0, 6, 12])


async def test_records_of_an_imported_file_that_was_not_copied(
    bucket: Bucket, proxy: Proxy, clock: ManualClock
) -> None:
    """Records that follow a file which is missing are not read as if they began with an empty state."""
    bucket.put(SNAPSHOT, b'{"n":100}')
    proxy.plan("PUT", ".history/", answers(403, "AccessDenied"), times=FOREVER)
    async with Manager(NAME, bucket.storage(proxy.url, history=WEEK), clock=clock) as state:
        await state.set("n", 1)
    assert [one.first_revision for one in await list_generations(NAME, bucket.storage())] == [1]


# Changes during the call


async def test_a_checkpoint_during_the_list(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """If the snapshot in use is replaced during the list, the list begins again."""
    model: Model = {}
    await run(bucket, clock, model)
    await run(bucket, clock, model)

    async def again() -> None:
        await run(bucket, clock, model)

    proxy.plan("GET", ".history/", Before(again))
    proxy.plan("GET", ".journal", Before(again))
    found = await list_generations(NAME, bucket.storage(proxy.url))
    assert [(one.first_revision, one.hole_before) for one in found][-3:] == [(12, False), (18, False), (24, False)]


async def test_a_generation_that_is_pruned(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """A copy that is deleted during the list is left out. One that is deleted after the list is gone."""
    for _ in range(3):
        await run(bucket, clock, {})
    first, second = copies(bucket)
    history = history_of(bucket.storage())
    generations = await history.generations(NAME)
    proxy.plan("GET", first.rsplit("/", 1)[1], Before(lambda: bucket.delete(first)))
    found = await list_generations(NAME, bucket.storage(proxy.url))
    assert [(one.first_revision, one.last_revision) for one in found] == [(0, 12), (12, 18), (18, 18)]
    with pytest.raises(GoneError, match="was pruned"):
        await history.read(NAME, generations.found[1])
    bucket.delete(next(key for key, size in bucket.keys(JOURNAL).items() if size))
    with pytest.raises(GoneError, match=r"past\.journal/ was pruned"):
        await history.read(NAME, generations.found[0])
    assert second in copies(bucket)


async def test_a_list_that_fails(bucket: Bucket, proxy: Proxy, clock: ManualClock) -> None:
    """If the store does not answer, the call raises an error after half a minute."""
    await run(bucket, clock, {})
    proxy.plan("GET", "", lost, times=FOREVER)
    with pytest.raises(UnavailableError, match="listing s3://"):
        await list_generations(NAME, bucket.storage(proxy.url))


def test_reach() -> None:
    """Numbers are reached up to the first gap."""
    assert reach([], 5) == 5
    assert reach([6, 7, 9], 5) == 7
    assert reach([7], 5) == 5


def test_names_of_the_history() -> None:
    """The metadata of a snapshot are short, and are the same for each version of lab_state."""
    assert KEPT == "labstatekept"
    assert Names.of("b", "", "n").history == "n.history/"
