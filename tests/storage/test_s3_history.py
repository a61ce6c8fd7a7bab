"""The history in S3, as its writer keeps it: copies of older snapshots, records that stay, and their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import product
from typing import Any

import pytest
from s3_proxy import (
    Action,
    Before,
    Copies,
    Forward,
    Hang,
    Late,
    Proxy,
    Request,
    Response,
    answer_lost,
    answers,
    cut,
    done_but_answers,
    lost,
    without_etag,
)
from s3_world import VIEW, Bucket, QuickTime, given, some
from seeded import Change, put_in

from lab_state import FencedError, LabStateError, Manager, S3Storage, UnsupportedError
from lab_state.storage.s3 import _Claim, _client, _keeping
from lab_state.storage.s3._format import KEPT, Names, Older
from lab_state.storage.s3._keeping import Keeper
from lab_state.storage.s3._outcomes import WRITE_ID
from lab_state.storage.s3._session import S3Session

NAME = "past"
JOURNAL = f"state/modules/{NAME}.journal/"
SNAPSHOT = f"state/modules/{NAME}.json"
HISTORY = f"state/modules/{NAME}.history/"
FOREVER = float("inf")
WEEK = 7 * 24 * 3600.0
START = 1_700_000_000_000


def time_of(storage: S3Storage) -> QuickTime:
    assert isinstance(storage._time, QuickTime)
    return storage._time


def kept(seq: int, wall: int = START) -> str:
    return f"{HISTORY}{seq:020d}-{wall}.json"


def copies(bucket: Bucket) -> dict[int, str]:
    """Return the keys of the copies, by the number that each covers."""
    return {int(key.removeprefix(HISTORY)[:20]): key for key in bucket.keys(HISTORY) if key.endswith(".json")}


def record(number: int) -> str:
    return f"{JOURNAL}{number:020d}"


def records(bucket: Bucket) -> list[int]:
    """Return the numbers of the records, without fences."""
    return [int(key.removeprefix(JOURNAL)) for key, size in bucket.keys(JOURNAL).items() if size]


def fences(bucket: Bucket) -> list[int]:
    return [int(key.removeprefix(JOURNAL)) for key, size in bucket.keys(JOURNAL).items() if not size]


def failures(session: S3Session) -> int:
    assert session.history is not None
    return session.history.failures


@pytest.fixture(autouse=True)
def _each_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each snapshot be copied, also if only a few records came since the last copy."""
    monkeypatch.setattr(_keeping, "_MOST_NUMBERS", 1)


@pytest.fixture(params=["conditions", "bytes"])
def copying(request: pytest.FixtureRequest, bucket: Bucket, proxy: Proxy) -> Action:
    """Let the store honour the condition of a copy, or ignore it as the stores of the tests do. Return what it does with a PUT."""
    if request.param == "bytes":
        return through
    return Copies(bucket.etag)


async def through(request: Request, forward: Forward) -> Response | None:
    return await forward(request)


async def opened(bucket: Bucket, url: str | None = None, **arguments: Any) -> S3Session:
    return await bucket.storage(url, **{"history": WEEK, **arguments}).open(NAME)


async def generation(session: S3Session, *texts: bytes) -> None:
    """Commit records, and make a checkpoint whose snapshot shows them."""
    for text in texts:
        await session.commit(text, VIEW)
    await session.checkpoint(given(b'{"is":"', texts[-1], b'"}'))


# Copies


async def test_what_is_kept(bucket: Bucket, proxy: Proxy, copying: Action) -> None:
    """Each checkpoint copies the old snapshot with its metadata. All records and fences stay."""
    proxy.plan("PUT", "", copying, times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1", b"2")
    first = bucket.get(SNAPSHOT)
    await generation(session, b"3")
    second = bucket.get(SNAPSHOT)
    await session.aclose()
    assert list(copies(bucket)) == [3]

    session = await opened(bucket, proxy.url)
    await generation(session, b"4")
    await session.aclose()
    assert list(copies(bucket)) == [3, 4]
    assert bucket.get(copies(bucket)[3]) == first
    assert bucket.get(copies(bucket)[4]) == second
    assert first[1][KEPT] == "3"
    assert (records(bucket), fences(bucket)) == ([2, 3, 4, 6], [1, 5])
    assert failures(session) == 0


async def test_the_store_copies_where_it_can(bucket: Bucket, proxy: Proxy) -> None:
    """A store that honours the condition of a copy makes it itself. The bytes of the snapshot are not fetched."""
    proxy.plan("PUT", "", Copies(bucket.etag), times=FOREVER)
    session = await opened(bucket, proxy.url)
    for number in range(4):
        await generation(session, b"%d" % number)
    await session.aclose()
    assert sum(line.startswith("PUT") and ".history/" in line for line in proxy.seen) == 3
    assert (
        sum(line.startswith("PUT") and ".probe" in line for line in proxy.seen) == 3 + 2
    )  # the last two are one trial
    assert sum(line.startswith("GET") and line.endswith(".json") for line in proxy.seen) == 1 + 3  # the end of each


@pytest.mark.parametrize("form", ['"{}"', "{}"])
async def test_quotation_marks(bucket: Bucket, proxy: Proxy, form: str) -> None:
    """The ETag in the condition is sent with quotation marks, and then without, because stores differ."""

    class Strict(Copies):
        async def __call__(self, request: Request, forward: Forward) -> Response | None:
            given = request.headers.get("x-amz-copy-source-if-match")
            if given is not None and (given[0] == '"') != (form[0] == '"'):
                request.headers["x-amz-copy-source-if-match"] = "another form"
            return await super().__call__(request, forward)

    proxy.plan("PUT", "", Strict(bucket.etag, form), times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    await generation(session, b"2")
    await session.aclose()
    assert list(copies(bucket)) == [2]
    assert session._keeper is not None
    assert session._keeper._honours


@pytest.mark.parametrize(
    "answer", [answers(501, "NotImplemented"), answers(400, "NotImplemented"), answers(403, "AccessDenied")]
)
async def test_a_store_without_copies(bucket: Bucket, proxy: Proxy, answer: Action) -> None:
    """If the store does not copy, the bytes are fetched and sent."""

    async def action(request: Request, forward: Forward) -> Response | None:
        return await (answer if "x-amz-copy-source" in request.headers else through)(request, forward)

    proxy.plan("PUT", "", action, times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    await generation(session, b"2")
    await session.aclose()
    assert list(copies(bucket)) == [2]


async def test_a_store_whose_fence_is_gone(bucket: Bucket, proxy: Proxy) -> None:
    """If the object of the trial copy is missing, its refusal says nothing. Then the bytes are fetched and sent."""
    proxy.plan("PUT", "", Copies(bucket.etag), times=FOREVER)
    session = await opened(bucket, proxy.url)
    bucket.delete(record(1))
    await generation(session, b"1")
    await generation(session, b"2")
    await session.aclose()
    assert list(copies(bucket)) == [2]
    assert session._keeper is not None
    assert session._keeper._honours is False


async def test_large_snapshots_are_copied_in_parts(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a snapshot that is fetched and sent are in a spool, and not in memory."""
    monkeypatch.setattr("lab_state.storage.s3._body._IN_MEMORY", 1000)
    session = await opened(bucket)
    large = b"x" * 3_000_000
    await generation(session, large)
    data = bucket.get(SNAPSHOT)
    await generation(session, b"2")
    await session.aclose()
    assert bucket.get(copies(bucket)[2]) == data


FAULTS = [
    answer_lost,
    lost,
    done_but_answers(500),
    done_but_answers(409, "ConditionalRequestConflict"),
    answers(500, "InternalError"),
    answers(502),
    answers(503, "SlowDown"),
    answers(504),
    answers(429, "TooManyRequests"),
    answers(409, "ConcurrentModification"),
    answers(400, "RequestTimeout"),
    without_etag,
]


@pytest.mark.parametrize(("times", "fault"), some(product([1, 3], FAULTS), 3))
async def test_a_copy_gets_through(bucket: Bucket, proxy: Proxy, copying: Action, fault: Action, times: int) -> None:
    """Whatever happens to the request of a copy or its answer, the copy is whole when the checkpoint has replaced the snapshot."""
    proxy.plan("PUT", ".history/", fault, times=times)
    proxy.plan("PUT", "", copying, times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    data = bucket.get(SNAPSHOT)
    await generation(session, b"2")
    await session.aclose()
    assert list(copies(bucket)) == [2]
    assert bucket.get(copies(bucket)[2]) == data
    assert failures(session) == 0


@pytest.mark.parametrize("fault", [lost, cut, answers(500)])
async def test_reading_the_old_snapshot_again(bucket: Bucket, proxy: Proxy, fault: Action) -> None:
    """An answer that is cut while the snapshot is fetched is fetched again, and leaves nothing of the first part."""
    session = await opened(bucket, proxy.url)
    await generation(session, b"1" * 100_000)
    data = bucket.get(SNAPSHOT)
    proxy.plan("GET", ".json", fault, times=3)
    await generation(session, b"2")
    await session.aclose()
    assert bucket.get(copies(bucket)[2]) == data


async def test_a_copy_that_hangs(bucket: Bucket, proxy: Proxy, copying: Action) -> None:
    """A copy without progress for 15 s is made again. A commit does not wait for it."""
    proxy.plan("PUT", ".history/", hang := Hang())
    proxy.plan("PUT", "", copying, times=FOREVER)
    storage = bucket.storage(proxy.url, history=WEEK)
    session = await storage.open(NAME)
    await generation(session, b"1")
    checkpoint = asyncio.create_task(session.checkpoint(VIEW)) if await session.commit(b"2", VIEW) else None
    assert checkpoint is None
    checkpoint = asyncio.create_task(session.checkpoint(VIEW))
    await hang.reached.wait()
    await session.commit(b"3", VIEW)
    time_of(storage).manual.advance(15)
    await checkpoint
    hang.released.set()
    await session.aclose()
    assert list(copies(bucket)) == [2]


async def test_a_late_request_overwrites_no_copy(bucket: Bucket, proxy: Proxy, copying: Action) -> None:
    """A copy that the network delivers after the next checkpoint is refused, so it does not put a newer snapshot there."""
    late = Late()
    proxy.plan("PUT", ".history/", late)
    proxy.plan("PUT", "", copying, times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    data = bucket.get(SNAPSHOT)
    await generation(session, b"2")
    assert await late.arrive(copying) == [412]
    await session.aclose()
    assert bucket.get(copies(bucket)[2]) == data


@pytest.mark.parametrize("fault", [lost, answers(503), answers(403, "AccessDenied")])
async def test_a_copy_that_fails(
    bucket: Bucket, proxy: Proxy, copying: Action, fault: Action, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint succeeds, with one ERROR and a count. The records stay, so the generation before goes on."""
    proxy.plan("PUT", ".history/", fault, times=FOREVER)
    proxy.plan("PUT", "", copying, times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    await generation(session, b"2")
    assert failures(session) == 1
    assert bucket.get(SNAPSHOT)[0] == b'{"is":"2"}'
    errors = [
        entry.getMessage() for entry in caplog.records if (entry.name, entry.levelno) == ("lab_state", logging.ERROR)
    ]
    assert len(errors) == 1
    assert "could not be copied into the history" in errors[0]
    proxy.end_plans()
    proxy.plan("PUT", "", copying, times=FOREVER)
    await generation(session, b"3")
    await session.aclose()
    assert list(copies(bucket)) == [3]
    assert records(bucket) == [2, 3, 4]
    assert failures(session) == 1


async def test_an_answer_that_is_always_lost(bucket: Bucket, proxy: Proxy, copying: Action) -> None:
    """A copy that exists, but whose answer never came, counts as failed. The next start finds it."""
    proxy.plan("PUT", ".history/", answer_lost, times=FOREVER)
    proxy.plan("HEAD", ".history/", lost, times=FOREVER)
    proxy.plan("PUT", "", copying, times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    await generation(session, b"2")
    await session.aclose()
    assert failures(session) == 1
    assert list(copies(bucket)) == [2]
    session = await opened(bucket)
    await generation(session, b"3")
    await session.aclose()
    assert list(copies(bucket)) == [2, 3]


async def test_a_checkpoint_that_is_repeated(bucket: Bucket, proxy: Proxy, copying: Action) -> None:
    """If the PUT of the snapshot fails after the copy, the next checkpoint does not copy again."""
    proxy.plan("PUT", "", copying, times=FOREVER)
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    proxy.end_plans()
    proxy.plan("PUT", f"{NAME}.json", answers(403, "AccessDenied"))
    proxy.plan("PUT", "", copying, times=FOREVER)
    with pytest.raises(Exception, match="permission is missing"):
        await generation(session, b"2")
    assert list(copies(bucket)) == [2]
    before = len(proxy.seen)
    await generation(session, b"3")
    await session.aclose()
    assert not [line for line in proxy.seen[before:] if line.startswith("PUT") and ".history/" in line]
    assert list(copies(bucket)) == [2]


async def test_a_copy_of_an_earlier_session(bucket: Bucket, proxy: Proxy) -> None:
    """If a session ended between its copy and the new snapshot, the next session does not copy again."""
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    await session.commit(b"2", VIEW)
    proxy.plan("PUT", f"{NAME}.json", answers(403, "AccessDenied"))
    with pytest.raises(UnsupportedError, match="permission is missing"):
        await session.checkpoint(VIEW)
    await session.aclose()
    key = copies(bucket)[2]
    etag = bucket.etag(key)
    session = await opened(bucket, proxy.url)
    before = len(proxy.seen)
    await generation(session, b"3")
    await session.aclose()
    assert not [line for line in proxy.seen[before:] if line.startswith("PUT") and ".history/" in line]
    assert (list(copies(bucket)), bucket.etag(key)) == ([2], etag)


async def test_equal_snapshots_are_not_copied(bucket: Bucket) -> None:
    """A snapshot that covers the same records as the next one has the same state, so it is left out."""
    session = await opened(bucket)
    await generation(session, b"1")
    await session.checkpoint(given(b'{"is":"again"}'))
    await session.aclose()
    assert bucket.keys(HISTORY) == {}
    assert bucket.get(SNAPSHOT)[0] == b'{"is":"again"}'


async def test_a_writer_that_was_replaced(bucket: Bucket, proxy: Proxy, copying: Action) -> None:
    """A writer that does not know yet that it was replaced copies nothing of the newer writer."""
    proxy.plan("PUT", "", copying, times=FOREVER)
    older = await opened(bucket, proxy.url)
    await generation(older, b"1")
    await older.commit(b"2", VIEW)
    newer = await opened(bucket)
    await generation(newer, b"3")
    assert list(copies(bucket)) == [2]
    data = bucket.get(copies(bucket)[2])
    with pytest.raises(FencedError):
        await older.checkpoint(VIEW)
    await newer.aclose()
    await older.aclose()
    assert (list(copies(bucket)), bucket.get(copies(bucket)[2])) == ([2], data)
    assert failures(older) == 0


@pytest.mark.parametrize("step", ["put", "delete"])
async def test_a_snapshot_that_goes_during_the_copy(bucket: Bucket, proxy: Proxy, copying: Action, step: str) -> None:
    """If another program replaces or deletes the snapshot before it is copied, nothing is copied."""
    change = (lambda: bucket.put(SNAPSHOT, b'{"not":"ours"}')) if step == "put" else (lambda: bucket.delete(SNAPSHOT))
    session = await opened(bucket, proxy.url)
    await generation(session, b"1")
    proxy.plan("PUT", ".probe", Before(change))
    proxy.plan("PUT", "", copying, times=FOREVER)
    await session.commit(b"2", VIEW)
    if step == "put":
        with pytest.raises(FencedError):
            await session.checkpoint(VIEW)
    else:
        await session.checkpoint(VIEW)
    await session.aclose()
    assert bucket.keys(HISTORY) == {}
    assert failures(session) == 0


async def test_another_object_under_the_key(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """An object of another program under the key of a copy is not overwritten. The copy fails, and the message names the object."""
    session = await opened(bucket)
    await generation(session, b"1")
    time_of_copy = kept(2)
    bucket.put(HISTORY + "notes.txt", b"foreign")
    await session.commit(b"2", VIEW)
    assert session._keeper is not None
    await session._keeper._listed()
    bucket.put(time_of_copy, b"foreign")
    await session.checkpoint(VIEW)
    await session.aclose()
    assert bucket.get(time_of_copy)[0] == b"foreign"
    assert failures(session) == 1
    assert f"s3://{bucket.name}/{time_of_copy} is another object" in caplog.text


async def test_records_that_are_few(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session copies the snapshot that it found. Its own are copied when the records since then are many, or large."""
    monkeypatch.setattr(_keeping, "_MOST_NUMBERS", 5)
    monkeypatch.setattr(_keeping, "_LEAST_BYTES", 3000)
    session = await opened(bucket)
    for number in range(7):  # the snapshots cover the numbers 2 to 8
        await generation(session, b"%d" % number)
    await session.aclose()
    assert list(copies(bucket)) == [2, 7]
    session = await opened(bucket)
    for _ in range(3):  # 10 to 12; the fence is 9
        await generation(session, b"x" * 2000)
    await session.aclose()
    assert list(copies(bucket)) == [2, 7, 8, 11]
    assert records(bucket) == [2, 3, 4, 5, 6, 7, 8, 10, 11, 12]


async def test_records_that_are_not_counted_yet(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the records of earlier sessions are not counted, each snapshot is copied."""
    session = await opened(bucket)
    await generation(session, *(b"%d" % number for number in range(20)))
    await session.aclose()
    monkeypatch.setattr(_keeping, "_MOST_NUMBERS", 1000)
    monkeypatch.setattr(_client, "_LISTED_AT_ONCE", 3)
    monkeypatch.setattr(_keeping, "_MOST_PAGES", 1)
    session = await opened(bucket)
    await generation(session, b"a")
    await generation(session, b"b")
    await session.aclose()
    assert list(copies(bucket)) == [21, 23]


# The recorded time, and imported files


async def test_the_name_of_a_copy(bucket: Bucket) -> None:
    """It has the number that the snapshot covers, and the time that the snapshot has recorded."""
    async with Manager(NAME, bucket.storage(history=WEEK)) as state:
        await state.set("a", 1)
    body = bucket.get(SNAPSHOT)[0]
    async with Manager(NAME, bucket.storage(history=WEEK)) as state:
        await state.set("a", 2)
    wall = int(body.partition(b'"wall":')[2].partition(b",")[0])
    assert list(bucket.keys(HISTORY)) == [kept(2, wall)]
    assert bucket.get(kept(2, wall))[0] == body


async def test_an_imported_file(bucket: Bucket) -> None:
    """A file of another program is copied as it is. It covers no record, and has the time of the copy."""
    bucket.put(SNAPSHOT, b'{"a":1}')
    session = await opened(bucket)
    await generation(session, b"1")
    await generation(session, b"2")
    await session.aclose()
    assert list(copies(bucket)) == [0, 2]
    data, metadata = bucket.get(copies(bucket)[0])
    assert (data, list(metadata)) == (b'{"a":1}', [WRITE_ID])


def test_keys_of_copies() -> None:
    """Only keys that this code makes are read. So other objects under the prefix are left alone."""
    names = Names.of("bucket", "p", "n")
    older = Older(42, 1700)
    assert names.kept(older) == "p/n.history/00000000000000000042-1700.json"
    assert names.older(names.kept(older)) == older
    for key in ("p/n.history/42-1700.json", "p/n.history/00000000000000000042-01.json", "p/n.json", names.record(1)):
        assert names.older(key) is None


# Pruning


async def test_by_age(bucket: Bucket) -> None:
    """A generation ends with its records when the next one began before the history. Fences stay."""
    storage = bucket.storage(history=100)
    time = time_of(storage)
    session = await storage.open(NAME)
    for number in range(4):
        await generation(session, b"%d" % number)
        time.manual.advance(40)
    # The snapshots that cover the numbers 2 to 4 were copied after 40, 80 and 120 s.
    assert list(bucket.keys(HISTORY)) == [kept(2, START + 40_000), kept(3, START + 80_000), kept(4, START + 120_000)]
    assert records(bucket) == [2, 3, 4, 5]
    await generation(session, b"4")  # after 160 s: the records before the first snapshot end at 40 s
    assert records(bucket) == [3, 4, 5, 6]
    time.manual.advance(40)
    await generation(session, b"5")
    await session.aclose()
    assert next(iter(bucket.keys(HISTORY))) == kept(3, START + 80_000)
    assert (records(bucket), fences(bucket)) == ([4, 5, 6, 7], [1])


async def test_by_size(bucket: Bucket) -> None:
    """The oldest generations end when all of them have too many bytes. Records of earlier sessions count as well."""
    for _number in range(3):
        session = await opened(bucket)
        await generation(session, b"x" * 1000)
        await session.aclose()
    assert records(bucket) == [2, 4, 6]
    session = await opened(bucket, history_bytes=4500)
    await generation(session, b"y" * 1000)
    assert records(bucket) == [6, 8]
    await generation(session, b"z" * 1000)
    assert session.history is not None
    assert session.history[:2] == (0, 2)
    assert session.history.bytes == sum(bucket.keys(HISTORY).values()) + sum(bucket.keys(JOURNAL).values())
    await session.aclose()
    assert records(bucket) == [8, 9]
    assert list(copies(bucket)) == [6, 8]
    assert fences(bucket) == [1, 3, 5, 7]


async def test_a_clock_set_forward(bucket: Bucket) -> None:
    """At most two generations end for each one that is added."""
    storage = bucket.storage(history=WEEK)
    session = await storage.open(NAME)
    for number in range(6):
        await generation(session, b"%d" % number)
    time_of(storage).manual.advance(100 * WEEK)
    await generation(session, b"6")
    await session.aclose()
    assert records(bucket) == [4, 5, 6, 7, 8]


async def test_many_records(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are listed page by page. If there are too many, the next checkpoint goes on."""
    session = await opened(bucket)
    await generation(session, *(b"%d" % number for number in range(10)))
    await generation(session, *(b"%d" % number for number in range(10)))
    await session.aclose()
    monkeypatch.setattr(_client, "_LISTED_AT_ONCE", 3)
    monkeypatch.setattr(_keeping, "_MOST_PAGES", 2)
    session = await opened(bucket, history_bytes=1)
    left = []
    for number in range(12):
        await generation(session, b"%d" % number)
        left.append(len(records(bucket)))
    await session.aclose()
    assert left[0] > 15
    assert left[-1] == 0
    assert sorted(left, reverse=True) == left


@pytest.mark.parametrize("fault", [lost, answer_lost, answers(500), done_but_answers(500)])
async def test_pruning_that_is_interrupted(bucket: Bucket, proxy: Proxy, fault: Action) -> None:
    """If a deletion fails, the checkpoint succeeds, and the next one deletes the rest. A snapshot is deleted after its records."""
    session = await opened(bucket, proxy.url, history_bytes=1)
    proxy.plan("POST", "", fault, times=FOREVER)
    await generation(session, b"1")
    for number in (2, 3, 4):
        await generation(session, b"%d" % number)
        assert copies(bucket).keys() >= {record - 1 for record in records(bucket) if record > 2}
    proxy.end_plans()
    for number in range(6):
        await generation(session, b"%d" % number)
    await session.aclose()
    assert len(bucket.keys(HISTORY)) <= 1
    assert len(records(bucket)) <= 1


async def test_a_store_that_refuses_deletions(bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """The warning is shown until a generation could be deleted."""
    proxy.plan("POST", "", answers(403, "AccessDenied"), times=FOREVER)
    session = await opened(bucket, proxy.url, history_bytes=1)
    assert "s3:DeleteObject" in (session.warning or "")
    for number in range(3):
        await generation(session, b"%d" % number)
    assert session.warning
    assert sum("s3:DeleteObject" in entry.getMessage() for entry in caplog.records) == 1
    proxy.end_plans()
    for number in range(3):
        await generation(session, b"%d" % number)
    assert session.warning is None
    await session.aclose()


# Sessions without a history


async def test_without_a_history(bucket: Bucket) -> None:
    """A session without a history leaves the records of a history, and deletes those that came after it."""
    session = await opened(bucket)
    await generation(session, b"1", b"2")
    await session.aclose()
    for _ in range(2):
        session = await opened(bucket, history=None)
        await generation(session, b"3", b"4")
        await session.aclose()
        assert session.history is None
    assert records(bucket) == [2, 3]
    assert bucket.get(SNAPSHOT)[1][KEPT] == "3"
    session = await opened(bucket)
    await generation(session, b"5")
    await session.aclose()
    assert records(bucket) == [2, 3, 11]


@pytest.mark.parametrize("has_history", [True, False])
async def test_a_snapshot_that_lost_its_metadata(bucket: Bucket, *, has_history: bool) -> None:
    """Without the metadata of the snapshot, copies in the history show that there is one."""

    async def run(*, history: float | None) -> None:
        async with Manager(NAME, bucket.storage(history=history)) as state:
            await state.incr("a")

    for _ in range(2):
        await run(history=WEEK if has_history else None)
    bucket.put(SNAPSHOT, bucket.get(SNAPSHOT)[0])
    for _ in range(2):
        await run(history=None)
    assert records(bucket) == ([2, 4] if has_history else [])
    assert bucket.get(SNAPSHOT)[1][KEPT] == ("4" if has_history else "0")


async def test_a_history_that_begins_later(bucket: Bucket) -> None:
    """A history can begin at a state that had none. It has no records before its first snapshot."""
    session = await opened(bucket, history=None)
    await generation(session, b"1", b"2")
    await session.aclose()
    session = await opened(bucket)
    await generation(session, b"3")
    await session.aclose()
    assert list(copies(bucket)) == [3]
    assert records(bucket) == [5]


# Starts and readings


async def test_a_start_does_not_list_the_history(bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start and a reading list what comes after the snapshot. They take as many requests as without a history."""
    monkeypatch.setattr(_client, "_LISTED_AT_ONCE", 2)

    async def requests(name: str, *, history: float | None) -> tuple[int, int]:
        session = await bucket.storage(history=history).open(name)
        await generation(session, *(b"%d" % number for number in range(20)))
        await generation(session, *(b"%d" % number for number in range(20)))
        await session.commit(b"last", VIEW)
        await session.aclose()
        start = len(proxy.seen)
        await bucket.storage(proxy.url).read(name)
        reading = len(proxy.seen)
        session = await bucket.storage(proxy.url, history=history).open(name)
        opening = len(proxy.seen)
        await session.aclose()
        return reading - start, opening - reading

    assert await requests("with", history=WEEK) == await requests("without", history=None)


# The tests can fail

Finder = Callable[[Bucket, Proxy], Awaitable[None]]

BUGS: dict[str, tuple[list[Change], Finder]] = {
    "a snapshot is deleted before its records": (
        [(
            Keeper, "_delete_oldest", "        if not await self._delete_records(start, end):\n",
            "        await self._store.delete(list(map(self._names.kept, kept[: not is_first])))\n        if not await self._delete_records(start, end):\n",
        )],
        lambda bucket, proxy: test_pruning_that_is_interrupted(bucket, proxy, answer_lost),
    ),
    "the records of the next generation are deleted as well": (
        [(Keeper, "_delete_oldest", "following[0].seq if following else", "following[1].seq if following[1:] else")],
        lambda bucket, _: test_by_age(bucket),
    ),
    "a generation is deleted that the history still reaches": (
        [(Keeper, "prune", "Held(older.wall, size)", "Held(older.wall - 40_000, size)")],
        lambda bucket, _: test_by_age(bucket),
    ),
    "fences are deleted with the records": (
        [(Keeper, "_delete_records", "for number, size in sizes.items() if size]", "for number in sizes]")],
        lambda bucket, _: test_by_age(bucket),
    ),
    "deletions that were not needed are made later": (
        [(Keeper, "prune", "        self._added = 0\n", "")],
        lambda bucket, _: test_a_clock_set_forward(bucket),
    ),
    "the snapshot is replaced before it is copied": (
        [
            (S3Session, "_publish", "            if self._keeper", "            covered = await self._replace(body, stamp)\n            if self._keeper"),
            (S3Session, "_publish", "self.snapshot_bytes)\n            covered = await self._replace(body, stamp)\n", "self.snapshot_bytes)\n"),
        ],
        lambda bucket, proxy: test_what_is_kept(bucket, proxy, through),
    ),
    "a condition is used that the store may ignore": (
        [(Keeper, "copy", "if await self._honours_conditions():", "if True:")],
        lambda bucket, proxy: test_a_late_request_overwrites_no_copy(bucket, proxy, through),
    ),
    "the object that is copied is not compared": (
        [(Keeper, "keep_or_raise", "source is None or source[0].etag != unquoted(etag)", "source is None")],
        lambda bucket, proxy: test_a_writer_that_was_replaced(bucket, proxy, through),
    ),
    "a session without a history deletes the records of one": (
        [(S3Session, "_clean_pages", "max(self._cleaned, self._left or 0)", "self._cleaned")],
        lambda bucket, _: test_without_a_history(bucket),
    ),
}  # fmt: skip


# A test that fails leaves its sessions open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("bug", BUGS)
async def test_a_bug_is_found(bug: str, bucket: Bucket, proxy: Proxy) -> None:
    """With a bug in the storage, a test above fails."""
    changes, finder = BUGS[bug]
    with put_in(changes), pytest.raises((AssertionError, LabStateError, pytest.fail.Exception)):
        await finder(bucket, proxy)
    _Claim._held.clear()
