"""`S3Storage` behind a proxy that loses, cuts, delays and invents answers; two writers; what a crash leaves."""

from __future__ import annotations

import asyncio
import logging
from itertools import product

import pytest
from running import flusher_of
from s3_proxy import (
    Action,
    Before,
    Forward,
    Hang,
    Proxy,
    Request,
    Response,
    answer_lost,
    answers,
    cut,
    done_but_answers,
    error,
    lost,
    without_etag,
)
from s3_world import VIEW, Bucket, QuickTime, given, some

from lab_state import (
    Config,
    CorruptionError,
    FencedError,
    Manager,
    Recovery,
    S3Storage,
    StorageSession,
    UnavailableError,
    UnsupportedError,
)
from lab_state.storage.s3._format import OWNER
from lab_state.storage.s3._open import numbers
from lab_state.storage.s3._outcomes import WRITE_ID

NAME = "faults"
JOURNAL = f"state/modules/{NAME}.journal/"
SNAPSHOT = f"state/modules/{NAME}.json"
FOREVER = float("inf")


def time_of(storage: S3Storage) -> QuickTime:
    assert isinstance(storage._time, QuickTime)
    return storage._time


async def records(bucket: Bucket) -> tuple[bytes, ...]:
    """Return what a new writer finds.

    The claims of the process do not stop it, because the address of the proxy differs.
    """
    session = await bucket.storage().open(NAME)
    await session.aclose()
    return session.recovery.records


# A commit


FAULTS_OF_A_COMMIT = [
    answer_lost,
    lost,
    done_but_answers(500),
    done_but_answers(409, "ConditionalRequestConflict"),
    done_but_answers(412, "PreconditionFailed"),
    done_but_answers(304),
    done_but_answers(404, "NoSuchKey"),
    answers(500, "InternalError"),
    answers(502),
    answers(503, "SlowDown"),
    answers(504),
    answers(429, "TooManyRequests"),
    answers(409, "ConditionalRequestConflict"),
    answers(409, "ConcurrentModification"),
    answers(400, "RequestTimeout"),
    answers(400, "BadDigest"),
    without_etag,
]


@pytest.mark.parametrize(("times", "fault"), some(product([1, 3], FAULTS_OF_A_COMMIT), 2))
async def test_a_commit_gets_through(bucket: Bucket, proxy: Proxy, fault: object, times: int) -> None:
    """Whatever happens to the request of a commit or its answer, the record is stored once when `commit` returns."""
    session = await bucket.storage(proxy.url).open(NAME)
    await session.commit(b"before", VIEW)
    proxy.plan("PUT", JOURNAL, fault, times=times)  # type: ignore[arg-type]
    await session.commit(b"1", VIEW)
    await session.commit(b"2", VIEW)
    await session.aclose()
    assert len(bucket.keys(JOURNAL)) == 4
    assert await records(bucket) == (b"before", b"1", b"2")


async def test_a_look_that_fails_decides_nothing(bucket: Bucket, proxy: Proxy) -> None:
    """If the answer is lost and HEAD fails too, HEAD is repeated. The commit is neither lost nor doubled."""
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", JOURNAL, done_but_answers(503), times=1)
    proxy.plan("HEAD", JOURNAL, answers(500), times=3)
    await session.commit(b"1", VIEW)
    await session.aclose()
    assert await records(bucket) == (b"1",)


@pytest.mark.parametrize("after", [False, True])
async def test_a_request_that_hangs_is_given_up(bucket: Bucket, proxy: Proxy, *, after: bool) -> None:
    """A request without progress for 15 s is repeated. If it arrives late, it does no harm."""
    storage = bucket.storage(proxy.url)
    session = await storage.open(NAME)
    proxy.plan("PUT", JOURNAL, hang := Hang(after=after))
    committing = asyncio.create_task(session.commit(b"1", VIEW))
    await hang.reached.wait()
    time_of(storage).manual.advance(15)
    await committing
    hang.released.set()
    await session.commit(b"2", VIEW)
    await session.aclose()
    assert await records(bucket) == (b"1", b"2")


@pytest.mark.parametrize("fault", [lost, answer_lost, answers(503), done_but_answers(500)])
async def test_an_unknown_outcome_is_settled_first(bucket: Bucket, proxy: Proxy, fault: object) -> None:
    """A record with an unknown outcome keeps its number and bytes. The next commit sends it before its own record."""
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", JOURNAL, fault, times=FOREVER)  # type: ignore[arg-type]
    proxy.plan("HEAD", JOURNAL, lost, times=FOREVER)
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"failed \d+ times"):
            await session.commit(b"1", VIEW)
    proxy.end_plans()
    await session.commit(b"1 and 2", VIEW)
    await session.aclose()
    assert await records(bucket) == (b"1", b"1 and 2")
    assert set(bucket.keys(JOURNAL)) == {f"{JOURNAL}{number:020d}" for number in range(1, 5)}


async def test_an_opening_warns_from_the_second_failure_on(
    bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """One failed request of an opening is not logged; two failures of one request are one WARNING."""
    storage = bucket.storage(proxy.url)
    for failures in (1, 2):
        proxy.plan("HEAD", ".json", answers(503, "SlowDown"), times=failures)
        await (await storage.open(NAME)).aclose()
        told = [record.getMessage() for record in caplog.records if "waits for S3" in record.getMessage()]
        assert len(told) == failures - 1
    assert "failed 2 times, last with 503" in told[0]


async def test_pauses_grow_and_end(bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Requests are repeated after random pauses of at most 2 s, for half a minute. Only an opening logs this."""
    storage = bucket.storage(proxy.url)
    session = await storage.open(NAME)
    proxy.plan("PUT", JOURNAL, answers(503, "SlowDown"), times=FOREVER)
    with pytest.raises(UnavailableError, match="503 SlowDown") as caught:
        await session.commit(b"1", VIEW)
    slept = time_of(storage).slept
    assert 30 <= sum(slept) < 31
    assert max(slept) <= 2
    assert slept[0] <= 0.1
    assert caught.value.__cause__ is caught.value.__context__ is None  # it could hold a credential
    assert "waits for S3" not in caplog.text
    await session.aclose()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "s3:PutObject"),
        (403, "RequestTimeTooSkewed", "clock"),
        (501, "NotImplemented", "conditional writes"),
        (400, "InvalidArgument", "refuses"),
    ],
)
async def test_what_cannot_succeed_is_not_repeated(
    bucket: Bucket, proxy: Proxy, status: int, code: str, words: str
) -> None:
    """A refusal for another reason than the condition is an error at once, and the record stays pending."""
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", JOURNAL, answers(status, code))
    with pytest.raises(UnsupportedError, match=words):
        await session.commit(b"1", VIEW)
    await session.commit(b"2", VIEW)
    await session.aclose()
    assert await records(bucket) == (b"1", b"2")


async def test_a_large_record_is_hashed_in_a_thread(bucket: Bucket, proxy: Proxy) -> None:
    """A record of megabytes comes back whole, and repeating it sends the same bytes."""
    record = b"x" * 3_000_000
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", JOURNAL, answer_lost, times=2)
    assert await session.commit(record, VIEW)
    await session.aclose()
    assert await records(bucket) == (record,)


async def test_a_commit_sends_one_small_object(bucket: Bucket, proxy: Proxy) -> None:
    """A commit is one request, of hardly more bytes than its record."""
    session = await bucket.storage(proxy.url).open(NAME)
    await session.checkpoint(given(b"x" * 3_000_000))
    seen = len(proxy.seen)
    await session.commit(b"r" * 100, VIEW)
    assert [line.split("?")[0] for line in proxy.seen[seen:]] == [f"PUT /{bucket.name}/{JOURNAL}{2:020d}"]
    assert proxy.sizes[-1] < 150
    await session.aclose()


# Two writers


async def deposed(session: StorageSession) -> None:
    for _ in range(2):
        with pytest.raises(FencedError, match="newer writer"):
            await session.commit(b"late", VIEW)
    with pytest.raises(FencedError, match="newer writer"):
        await session.checkpoint(VIEW)
    await session.aclose()


async def test_a_deposed_writer_hears_of_it_at_its_next_commit(bucket: Bucket, proxy: Proxy) -> None:
    """After another writer opened the state, the next commit of the first one fails.

    So do later calls, without a request.
    """
    old = await bucket.storage(proxy.url).open(NAME)
    await old.commit(b"1", VIEW)
    new = await bucket.storage().open(NAME)
    assert new.recovery.records == (b"1",)
    with pytest.raises(FencedError, match=r"newer writer \(.* pid \d+\)"):
        await old.commit(b"2", VIEW)
    seen = len(proxy.seen)
    await deposed(old)
    assert len(proxy.seen) == seen
    await new.commit(b"3", VIEW)
    await new.aclose()
    assert await records(bucket) == (b"1", b"3")


async def test_a_writer_that_sleeps_over_a_checkpoint_is_deposed_all_the_same(bucket: Bucket, proxy: Proxy) -> None:
    """A number is never free again: a fence stays when the records before it are deleted."""
    old = await bucket.storage(proxy.url).open(NAME)
    await old.commit(b"1", VIEW)
    new = await bucket.storage().open(NAME)
    for number in range(5):
        await new.commit(b"%d" % number, VIEW)
    await new.checkpoint(VIEW)
    assert list(bucket.keys(JOURNAL).values()) == [0, 0]
    await new.aclose()
    await deposed(old)


async def test_a_pending_record_of_a_deposed_writer(bucket: Bucket, proxy: Proxy) -> None:
    """A record that never arrived finds its number taken by the fence of the next writer."""
    old = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", JOURNAL, lost, times=FOREVER)
    with pytest.raises(UnavailableError):
        await old.commit(b"1", VIEW)
    proxy.end_plans()
    new = await bucket.storage().open(NAME)
    await new.aclose()
    await deposed(old)
    assert await records(bucket) == ()


async def test_a_pending_record_that_the_successor_saw(bucket: Bucket, proxy: Proxy) -> None:
    """A record that did arrive is acknowledged late, even if the next writer has covered and deleted it."""
    old = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", JOURNAL, answer_lost, times=FOREVER)
    proxy.plan("HEAD", JOURNAL, lost, times=FOREVER)
    with pytest.raises(UnavailableError):
        await old.commit(b"1", VIEW)
    proxy.end_plans()
    new = await bucket.storage().open(NAME)
    assert new.recovery.records == (b"1",)
    await new.checkpoint(VIEW)
    proxy.plan("PUT", JOURNAL, answers(412, "PreconditionFailed"))
    with pytest.raises(FencedError):  # it settled the first record, and found the fence with the second
        await old.commit(b"2", VIEW)
    assert f"PUT /{bucket.name}/{JOURNAL}{3:020d}" in proxy.seen[-2]
    await old.aclose()
    await new.aclose()
    assert await records(bucket) == ()


async def test_an_opener_that_loses_the_race_begins_again(bucket: Bucket, proxy: Proxy) -> None:
    """An opener whose fence collides with another one loads again, and opens above it."""
    rival = bucket.storage()
    sessions: list[StorageSession] = []

    async def overtake() -> None:
        sessions.append(await rival.open(NAME))
        await sessions[0].commit(b"1", VIEW)

    proxy.plan("PUT", JOURNAL, Before(overtake))
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.recovery.records == (b"1",)
    await deposed(sessions[0])
    await session.aclose()


async def test_an_opener_that_is_overtaken_while_it_loads_begins_again(bucket: Bucket, proxy: Proxy) -> None:
    """A record that a newer writer wrote above our fence is never loaded."""
    rival = bucket.storage()
    sessions: list[StorageSession] = []

    async def overtake() -> None:
        sessions.append(await rival.open(NAME))
        await sessions[0].commit(b"1", VIEW)

    proxy.plan("HEAD", SNAPSHOT, Before(overtake))  # it is looked at again behind the fence
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.recovery.records == (b"1",)
    assert session._fence == 4
    await deposed(sessions[0])
    await session.aclose()


async def test_a_deletion_under_an_opener_is_not_damage(bucket: Bucket, proxy: Proxy) -> None:
    """An opener that lists while a checkpoint deletes creates no fence above the gap, but loads again."""
    old = await bucket.storage().open(NAME)
    for number in range(3):
        await old.commit(b"%d" % number, VIEW)

    async def half_deleted() -> None:
        await old.checkpoint(given(b"late"))
        bucket.put(f"{JOURNAL}{4:020d}", b"about to be deleted")

    async def loading(request: Request, forward: Forward) -> Response | None:
        proxy.plan("GET", "list-type", Before(half_deleted))
        return await forward(request)

    proxy.plan("GET", "list-type", loading)
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.recovery == Recovery(b"late", (), unsettled=False, dropped_bytes=0)
    await session.aclose()
    await old.aclose()


async def test_a_fence_at_a_used_number_is_void(bucket: Bucket, proxy: Proxy) -> None:
    """A fence whose number the snapshot covers stops no writer, so the opener starts again."""
    other = await bucket.storage().open(NAME)

    async def cover() -> None:
        await other.commit(b"1", VIEW)
        await other.checkpoint(given(b"covered"))  # 2 is deleted
        await other.aclose()

    proxy.plan("PUT", f"{JOURNAL}{2:020d}", Before(cover))
    session = await bucket.storage(proxy.url).open(NAME)
    assert session._fence == 3
    assert session.recovery.snapshot == b"covered"
    await session.commit(b"2", VIEW)
    await session.aclose()
    assert await records(bucket) == (b"2",)


async def test_a_checkpoint_while_loading_is_noticed(bucket: Bucket, proxy: Proxy) -> None:
    """If a checkpoint deletes records during an opening, they are found in the new snapshot."""
    old = await bucket.storage().open(NAME)
    await old.commit(b"1", VIEW)
    proxy.plan("GET", f"{JOURNAL}{2:020d}", Before(lambda: old.checkpoint(given(b"late"))))
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.recovery == Recovery(b"late", (), unsettled=False, dropped_bytes=0)
    await session.aclose()
    await old.aclose()


async def test_a_checkpoint_between_two_looks_is_noticed(bucket: Bucket, proxy: Proxy) -> None:
    """A snapshot read before a checkpoint, and a list made after it, are not taken for damage."""
    old = await bucket.storage().open(NAME)
    await old.commit(b"1", VIEW)

    async def fenced_and_late(request: Request, forward: Forward) -> Response | None:
        response = await forward(request)
        await old.checkpoint(given(b"late"))
        return response

    proxy.plan("GET", SNAPSHOT, fenced_and_late)
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.recovery == Recovery(b"late", (), unsettled=False, dropped_bytes=0)
    await session.commit(b"2", VIEW)
    await session.checkpoint(given(b"after"))  # the snapshot that it replaces is the old writer's
    await session.aclose()
    await old.aclose()
    assert bucket.get(SNAPSHOT)[0] == b"after"


async def test_opening_gives_up_when_others_never_stop(bucket: Bucket, proxy: Proxy) -> None:
    """An opener that is overtaken again and again gives up after half a minute with an error."""

    async def overtake(request: Request, forward: Forward) -> Response | None:
        key = request.target.partition("?")[0].removeprefix(f"/{bucket.name}/")
        bucket.put(key, b"", {WRITE_ID: "theirs", OWNER: "theirs"})
        return await forward(request)

    proxy.plan("PUT", JOURNAL, overtake, times=FOREVER)
    with pytest.raises(UnavailableError, match="opening"):
        await bucket.storage(proxy.url).open(NAME)


# Checkpoints


FAULTS_OF_A_CHECKPOINT = [
    answer_lost,
    lost,
    done_but_answers(500),
    done_but_answers(412, "PreconditionFailed"),
    answers(503, "SlowDown"),
    answers(409, "ConditionalRequestConflict"),
    without_etag,
]


@pytest.mark.parametrize(("before", "fault"), some(product([0, 1], FAULTS_OF_A_CHECKPOINT), 2))
async def test_a_checkpoint_gets_through(bucket: Bucket, proxy: Proxy, fault: object, before: int) -> None:
    """Whatever happens to its request, the snapshot is stored when `checkpoint` returns, and the next one succeeds."""
    session = await bucket.storage(proxy.url).open(NAME)
    for number in range(before):
        await session.checkpoint(given(b"before %d" % number))
    await session.commit(b"1", VIEW)
    proxy.plan("PUT", SNAPSHOT, fault, times=2)  # type: ignore[arg-type]
    await session.checkpoint(given(b"first"))
    await session.checkpoint(given(b"second"))
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == b"second"
    assert await records(bucket) == ()


@pytest.mark.parametrize("fault", [answer_lost, lost])
async def test_a_checkpoint_of_unknown_outcome_deletes_nothing(bucket: Bucket, proxy: Proxy, fault: object) -> None:
    """If the outcome of a checkpoint stays unknown, the records stay, and the next checkpoint continues from either result."""
    session = await bucket.storage(proxy.url).open(NAME)
    await session.checkpoint(given(b"before"))
    await session.commit(b"1", VIEW)
    proxy.plan("PUT", SNAPSHOT, fault, times=FOREVER)  # type: ignore[arg-type]
    proxy.plan("HEAD", SNAPSHOT, lost, times=FOREVER)
    with pytest.raises(UnavailableError):
        await session.checkpoint(given(b"unknown"))
    proxy.end_plans()
    assert len([size for size in bucket.keys(JOURNAL).values() if size]) == 1
    await session.commit(b"2", VIEW)
    await session.checkpoint(given(b"known"))
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == b"known"


async def test_a_late_snapshot_that_covers_as_much_is_adopted(bucket: Bucket, proxy: Proxy) -> None:
    """A failed attempt that arrived later counts as the success of the attempt that finds it."""
    session = await bucket.storage(proxy.url).open(NAME)
    await session.commit(b"1", VIEW)
    proxy.plan("PUT", SNAPSHOT, answer_lost, times=FOREVER)
    proxy.plan("HEAD", SNAPSHOT, lost, times=FOREVER)
    with pytest.raises(UnavailableError):
        await session.checkpoint(given(b"arrived late"))
    proxy.end_plans()
    await session.checkpoint(given(b"{}"))
    assert session.snapshot_bytes == len(b"arrived late")
    assert session.journal_bytes == 0
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == b"arrived late"


async def test_a_successors_snapshot_deposes(bucket: Bucket, proxy: Proxy) -> None:
    """A writer that finds a snapshot with a higher fence is deposed."""
    old = await bucket.storage(proxy.url).open(NAME)
    new = await bucket.storage().open(NAME)
    await new.checkpoint(given(b"new"))
    await new.aclose()
    with pytest.raises(FencedError, match="newer writer"):
        await old.checkpoint(given(b"old"))
    await deposed(old)
    assert bucket.get(SNAPSHOT)[0] == b"new"


async def test_a_snapshot_that_someone_put_there_is_not_overwritten(bucket: Bucket) -> None:
    """A file that replaces the snapshot while the manager runs stays, and the manager stops writing."""
    session = await bucket.storage().open(NAME)
    bucket.put(SNAPSHOT, b'{"by":"hand"}')
    with pytest.raises(FencedError):
        await session.checkpoint(VIEW)
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == b'{"by":"hand"}'


async def test_a_snapshot_that_was_deleted_is_written_anew(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """A deleted snapshot is logged as an error, and the next checkpoint writes it again."""
    session = await bucket.storage().open(NAME)
    await session.checkpoint(given(b"1"))
    bucket.delete(SNAPSHOT)
    await session.checkpoint(given(b"2"))
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == b"2"
    assert "was deleted while in use" in caplog.text


@pytest.mark.parametrize("head_quotes", [True, False])
async def test_a_store_that_compares_unquoted(bucket: Bucket, proxy: Proxy, *, head_quotes: bool) -> None:
    """If the right ETag is refused in quotes, it is sent without quotes, and from then on always."""
    asked: list[str] = []

    async def picky(request: Request, forward: Forward) -> Response | None:
        etag = request.headers.get("if-match")
        if etag is not None:
            asked.append(etag)
            if '"' in etag:
                return error(412, "PreconditionFailed")
        return await forward(request)

    async def bare(request: Request, forward: Forward) -> Response | None:
        response = await forward(request)
        if "etag" in response.headers:
            response.headers["etag"] = response.headers["etag"].strip('"')
        return response

    proxy.plan("PUT", SNAPSHOT, picky, times=FOREVER)
    if not head_quotes:
        proxy.plan("HEAD", SNAPSHOT, bare, times=FOREVER)
    session = await bucket.storage(proxy.url).open(NAME)
    for number in range(4):
        await session.checkpoint(given(b"%d" % number))
    await session.aclose()
    assert [etag.startswith('"') for etag in asked] == [True, False, False, False]
    assert bucket.get(SNAPSHOT)[0] == b"3"


async def test_a_failed_deletion_is_made_up_for(bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Records that a checkpoint could not delete are logged, do no harm, and are deleted by the next one."""
    session = await bucket.storage(proxy.url).open(NAME)
    await session.commit(b"1", VIEW)
    proxy.plan("POST", "?delete", answers(503, "SlowDown"), times=FOREVER)
    await session.checkpoint(given(b"a"))
    proxy.end_plans()
    assert "stay until the next checkpoint" in caplog.text
    assert session.warning is None
    assert session.journal_bytes == 0
    assert sum(bucket.keys(JOURNAL).values()) > 0
    await session.checkpoint(given(b"b"))
    assert sum(bucket.keys(JOURNAL).values()) == 0
    await session.aclose()


async def test_a_deletion_that_fails_in_part_is_noticed(
    bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer to a deletion of many says which of them failed."""
    session = await bucket.storage(proxy.url).open(NAME)
    await session.commit(b"1", VIEW)
    proxy.plan("POST", "?delete", undeleted("InternalError"))
    await session.checkpoint(given(b"a"))
    assert "InternalError" in caplog.text
    assert session.warning is None
    await session.aclose()


def undeleted(code: str) -> Action:
    """Answer a deletion of many keys: one of them was not deleted."""

    async def action(request: Request, forward: Forward) -> Response | None:
        body = f"<DeleteResult><Error><Key>k</Key><Code>{code}</Code></Error></DeleteResult>".encode()
        return Response(200, {"content-type": "application/xml"}, body)

    return action


@pytest.mark.parametrize(
    "denied", [answers(403, "AccessDenied"), undeleted("AccessDenied"), answers(501, "NotImplemented")]
)
async def test_without_the_permission_to_delete(
    bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture, denied: Action
) -> None:
    """A missing permission to delete is logged once, at the start, and shown in `status()`.

    Checkpoints then list nothing.
    """
    proxy.plan("POST", "?delete", denied, times=FOREVER)
    async with Manager(Config(name=NAME, flush_interval=None), bucket.storage(proxy.url)) as state:
        assert "s3:DeleteObject" in (state.status().storage_warning or "") or "NotImplemented" in caplog.text
        session = flusher_of(state)._session
        seen = len(proxy.seen)
        for number in range(3):
            await state.set("a", number)
            await state.flush()
            await session.checkpoint(VIEW)
        assert not [line for line in proxy.seen[seen:] if "list-type" in line]
        assert len([line for line in proxy.seen[seen:] if line.startswith("POST")]) == 3
        assert len(caplog.messages) == 1
        assert len(bucket.keys(JOURNAL)) == 4

        proxy.end_plans()
        caplog.set_level(logging.DEBUG, "lab_state")
        await state.set("a", 3)
        await state.flush()
        await session.checkpoint(VIEW)
        assert state.status().storage_warning is None
        assert "can be deleted again" in caplog.text
        assert sum(bucket.keys(JOURNAL).values()) == 0  # those left by the checkpoints before, too
        await state.delete_all()
    assert state.status().storage_warning is None


async def test_a_permission_that_is_taken_away(bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """If the permission to delete is lost while a manager runs, this is logged once, with the name of the permission."""
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.warning is None
    proxy.plan("POST", "?delete", answers(403, "AccessDenied"), times=FOREVER)
    for number in range(3):
        await session.commit(b"%d" % number, VIEW)
        await session.checkpoint(given(b"%d" % number))
        assert "s3:DeleteObject" in str(session.warning)
    assert len(caplog.messages) == 1
    await session.aclose()


@pytest.mark.parametrize("fault", [answers(500), lost, answers(404, "NoSuchKey")])
async def test_a_question_about_deleting_that_is_not_answered(bucket: Bucket, proxy: Proxy, fault: Action) -> None:
    """The permission to delete is checked once. Without an answer the start goes on."""
    proxy.plan("POST", "?delete", fault)
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.warning is None
    await session.aclose()


async def test_cleaning_goes_on_from_where_it_stood(
    bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that a crash left are deleted some pages at each checkpoint. No page is listed twice."""
    monkeypatch.setattr("lab_state.storage.s3._client._LISTED_AT_ONCE", 3)
    monkeypatch.setattr("lab_state.storage.s3._session._MOST_PAGES", 2)
    old = await bucket.storage().open(NAME)
    for number in range(12):
        await old.commit(b"%d" % number, VIEW)
    monkeypatch.setattr(old, "_clean", _leave)
    await old.checkpoint(VIEW)
    await old.aclose()
    session = await bucket.storage(proxy.url).open(NAME)
    left = []
    for _ in range(3):
        seen = len(proxy.seen)
        await session.checkpoint(VIEW)
        left.append(len([size for size in bucket.keys(JOURNAL).values() if size]))
    assert left == [7, 1, 0]
    assert "list-type" not in "".join(proxy.seen[seen + 3 :])
    seen = len(proxy.seen)
    await session.checkpoint(VIEW)
    assert len(proxy.seen) == seen + 1  # the snapshot alone
    await session.aclose()


async def _leave(*_: object) -> None:
    """Delete nothing, as a writer that is killed."""


async def test_what_a_crash_left_behind_is_cleaned(bucket: Bucket, proxy: Proxy) -> None:
    """Records that a killed writer did not delete are deleted by the first checkpoint of the next one. Fences stay."""
    old = await bucket.storage(proxy.url).open(NAME)
    await old.commit(b"1", VIEW)
    proxy.plan("POST", "?delete", answers(403, "AccessDenied"), times=FOREVER)
    await old.checkpoint(given(b"a"))
    new = await bucket.storage().open(NAME)
    assert new.recovery == Recovery(b"a", (), unsettled=False, dropped_bytes=0)
    await new.checkpoint(given(b"b"))
    assert list(bucket.keys(JOURNAL).values()) == [0, 0]
    await new.aclose()
    await old.aclose()


async def test_checkpoints_become_due(bucket: Bucket) -> None:
    """A checkpoint is due after 64 records, or when they are as large as the snapshot and at least a megabyte."""
    session = await bucket.storage().open(NAME)
    due = [await session.commit(b"%d" % number, VIEW) for number in range(64)]
    assert due == [False] * 63 + [True]
    await session.checkpoint(given(b"x" * 2_000_000))
    assert [await session.commit(b"r" * 1_500_000, VIEW) for _ in range(2)] == [False, True]
    await session.aclose()
    again = await bucket.storage().open(NAME)
    assert again.journal_bytes > 3_000_000
    assert await again.commit(b"small", VIEW)
    await again.aclose()


async def test_a_large_snapshot_goes_through_a_file(bucket: Bucket, proxy: Proxy) -> None:
    """A snapshot of 20 MB is spooled and streamed. After a failure it is streamed again from the start."""
    data = b"0123456789abcdef" * 64 * 1024
    session = await bucket.storage(proxy.url).open(NAME)
    proxy.plan("PUT", SNAPSHOT, answers(500))
    proxy.plan("PUT", SNAPSHOT, lost)
    await session.checkpoint(given(*[data] * 20))
    assert session.snapshot_bytes == 20 * len(data)
    await session.aclose()
    assert bucket.get(SNAPSHOT)[0] == data * 20


async def test_a_second_page_of_the_list_is_read(bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers after the first page of a list count."""
    monkeypatch.setattr("lab_state.storage.s3._client._LISTED_AT_ONCE", 10)
    session = await bucket.storage(proxy.url).open(NAME)
    for number in range(2, 13):
        bucket.put(f"{JOURNAL}{number:020d}", b"", {WRITE_ID: "theirs", OWNER: "theirs"})
    with pytest.raises(FencedError, match="theirs"):
        await session.commit(b"1", VIEW)
    assert list(await numbers(session._store, session._names, 0)) == list(range(1, 13))
    assert any("continuation-token" in line for line in proxy.seen)
    await session.aclose()


# Opening


@pytest.mark.parametrize("fault", [cut, answer_lost, answers(503), answers(500)])
async def test_loading_is_repeated(bucket: Bucket, proxy: Proxy, fault: object) -> None:
    """Answers that are cut or lost during loading are requested again. Half an object is never taken for the whole."""
    first = await bucket.storage().open(NAME)
    await first.checkpoint(given(b"snapshot"))
    await first.commit(b"1", VIEW)
    await first.commit(b"2", VIEW)
    await first.aclose()
    for part in (SNAPSHOT, JOURNAL, "list-type"):
        proxy.plan("GET", part, fault)  # type: ignore[arg-type]
    proxy.plan("HEAD", SNAPSHOT, lost)
    session = await bucket.storage(proxy.url).open(NAME)
    assert session.recovery == Recovery(b"snapshot", (b"1", b"2"), unsettled=False, dropped_bytes=0)
    await session.aclose()


async def test_an_answer_that_hangs_while_loading_is_given_up(bucket: Bucket, proxy: Proxy) -> None:
    """A record that does not arrive within 15 s is requested again."""
    first = await bucket.storage().open(NAME)
    await first.commit(b"1", VIEW)
    await first.aclose()
    hangs = [Hang(after=True)]
    proxy.plan("GET", JOURNAL + "0", hangs[0])
    storage = bucket.storage(proxy.url)
    opening = asyncio.create_task(storage.open(NAME))
    await hangs[0].reached.wait()
    time_of(storage).manual.advance(15)
    session = await opening
    assert session.recovery.records == (b"1",)
    await session.aclose()


async def test_a_missing_record_is_damage(bucket: Bucket) -> None:
    """A record object missing in the middle is refused, and nothing is deleted or skipped."""
    first = await bucket.storage().open(NAME)
    for number in range(3):
        await first.commit(b"%d" % number, VIEW)
    await first.aclose()
    gone = f"{JOURNAL}{3:020d}"
    data, metadata = bucket.get(gone)
    bucket.delete(gone)
    for _ in range(2):
        with pytest.raises(CorruptionError, match="missing"):
            await bucket.storage().open(NAME)
    bucket.put(gone, data, metadata)
    assert await records(bucket) == (b"0", b"1", b"2")


@pytest.mark.parametrize(
    ("number", "body", "edited"),
    [
        (9_999, b"a copy under a wrong key", False),
        (9_999, b"a copy under a wrong key", True),
        (9_999, b"", False),
        (3, b"a copy under a wrong key", False),
        (3, b"", True),
        (10**20 - 1, b"a copy under a wrong key", False),
    ],
)
async def test_a_stray_object_leaves_nothing_behind(bucket: Bucket, number: int, body: bytes, *, edited: bool) -> None:
    """A start that is refused because of an object with a wrong number writes no fence.

    Without the object it succeeds.
    """
    async with Manager(NAME, bucket.storage()) as state:
        await state.set("a", 1)
    if edited:
        bucket.put(SNAPSHOT, b'{"a":1}')
    before = bucket.keys()
    stray = f"{JOURNAL}{number:020d}"
    bucket.put(stray, body, {WRITE_ID: "copied"})
    for _ in range(2):
        with pytest.raises(CorruptionError):
            await Manager(NAME, bucket.storage()).start()
    bucket.delete(stray)
    assert bucket.keys() == before
    async with Manager(NAME, bucket.storage()) as state:
        assert await state.get_all() == {"a": 1}


async def test_a_gap_names_what_is_above_it(bucket: Bucket) -> None:
    """Either records are missing, or the object above the gap is stray. The error names both."""
    stray = f"{JOURNAL}{9_999:020d}"
    bucket.put(stray, b"x")
    with pytest.raises(CorruptionError, match=rf"records 1 to 9998 are missing .*{stray} .*delete"):
        await bucket.storage().open(NAME)


async def test_a_fence_that_vanishes_is_damage(bucket: Bucket, proxy: Proxy) -> None:
    """A fence that was deleted, or that the store does not list, is refused."""

    async def vanished(request: Request, forward: Forward) -> Response | None:
        response = await forward(request)
        bucket.delete(f"{JOURNAL}{1:020d}")
        return response

    proxy.plan("PUT", JOURNAL, vanished)
    with pytest.raises(CorruptionError, match="records from 1 on are missing"):
        await bucket.storage(proxy.url).open(NAME)


async def test_digits_of_other_scripts_are_no_number(bucket: Bucket) -> None:
    """A key with digits of another script is not a number, and belongs to another program."""
    bucket.put(f"{JOURNAL}{'٣' * 20}", b"x")
    assert await records(bucket) == ()


# The snapshot that the records follow


async def test_a_file_put_there_in_the_first_run(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """A snapshot put in place while the first manager runs is not merged: it deposes, and is refused if there are records."""
    state = Manager(Config(name=NAME, flush_interval=0), bucket.storage())
    await state.start()
    await state.set("mine", 1)
    bucket.put(SNAPSHOT, b'{"theirs": 1}')
    with pytest.raises(FencedError, match="replaced by a file that no manager wrote"):
        await state.stop()
    assert state.status().fenced
    assert len(caplog.messages) == 1  # not one that says that nothing is lost, and one that it is
    assert "fenced" in caplog.text
    with pytest.raises(
        CorruptionError,
        match=r"record 2 follows no snapshot, .*; move that snapshot away\. To start from that snapshot",
    ):
        await Manager(NAME, bucket.storage()).start()
    bucket.delete(SNAPSHOT)
    async with Manager(NAME, bucket.storage()) as again:
        assert await again.get_all() == {"mine": 1}


@pytest.mark.parametrize("there", [b'{"theirs": 2}', None])
async def test_an_imported_file_that_is_exchanged(bucket: Bucket, there: bytes | None) -> None:
    """Records after an imported file are refused with another file or none, and loaded when the file is back."""
    bucket.put(SNAPSHOT, b'{"theirs": 1}')
    session = await bucket.storage().open(NAME)
    await session.commit(b"1", VIEW)
    await session.aclose()
    if there is None:
        bucket.delete(SNAPSHOT)
    else:
        bucket.put(SNAPSHOT, there)
    before = bucket.keys()
    words = "is missing" if there is None else "is not the present one"
    with pytest.raises(CorruptionError, match=f"the snapshot that record 2 follows {words}"):
        await bucket.storage().open(NAME)
    assert bucket.keys() == before
    bucket.put(SNAPSHOT, b'{"theirs": 1}')
    assert await records(bucket) == (b"1",)


async def test_a_large_imported_file(bucket: Bucket) -> None:
    """The checksum of a file of megabytes is computed in a thread."""
    data = b'{"a":"%s"}' % (b"x" * 3_000_000)
    bucket.put(SNAPSHOT, data)
    for _ in range(2):
        session = await bucket.storage().open(NAME)
        assert session.recovery.snapshot == data
        await session.commit(b"1", VIEW)
        await session.aclose()


async def test_a_record_without_its_metadata(bucket: Bucket) -> None:
    """A record restored without its metadata does not name a snapshot, and is loaded."""
    session = await bucket.storage().open(NAME)
    await session.commit(b"1", VIEW)
    await session.aclose()
    key = f"{JOURNAL}{2:020d}"
    bucket.put(key, bucket.get(key)[0])
    assert await records(bucket) == (b"1",)


async def test_a_record_that_vanishes_while_it_is_loaded_is_damage(bucket: Bucket, proxy: Proxy) -> None:
    """A record that is listed but cannot be read, while the snapshot stays the same, is refused."""
    first = await bucket.storage().open(NAME)
    await first.commit(b"1", VIEW)
    await first.aclose()
    proxy.plan("GET", f"{JOURNAL}{2:020d}", answers(404, "NoSuchKey"), times=FOREVER)
    with pytest.raises(CorruptionError, match=r"lists a record under .* but does not return it"):
        await bucket.storage(proxy.url).open(NAME)


async def test_other_objects_below_the_journal_are_ignored(bucket: Bucket) -> None:
    """A key that is no number belongs to another program."""
    bucket.put(f"{JOURNAL}readme", b"hello")
    assert await records(bucket) == ()


# A manager


async def test_a_manager_survives_an_outage(bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """During an outage of the store changes stay in memory. They are written when it is back, without a call."""
    async with Manager(Config(name=NAME, flush_interval=0.01), bucket.storage(proxy.url)) as state:
        await state.set("a", 1)
        await state.flush()
        proxy.plan("PUT", JOURNAL, lost, times=FOREVER)
        await state.set("b", 2)
        with pytest.raises(UnavailableError, match="not durable yet"):
            await state.flush()
        assert await state.get("b") == 2
        proxy.end_plans()
        await state.wait_durable()
    async with Manager(NAME, bucket.storage()) as state:
        assert await state.get_all() == {"a": 1, "b": 2}


async def test_a_rolling_deployment(bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """The new manager has everything that the old one acknowledged.

    The next flush and the stop of the old one raise an error.
    """
    old = Manager(Config(name=NAME, flush_interval=None), bucket.storage(proxy.url))
    await old.start()
    await old.set("a", 1)
    await old.flush()
    async with Manager(NAME, bucket.storage()) as new:
        assert await new.get_all() == {"a": 1}
        await old.set("b", 2)
        with pytest.raises(FencedError, match="newer writer"):
            await old.flush()
        with pytest.raises(FencedError):
            await old.stop()
        await new.set("c", 3)
    async with Manager(NAME, bucket.storage()) as state:
        assert await state.get_all() == {"a": 1, "c": 3}


async def test_nothing_secret_is_logged(
    bucket: Bucket, proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key, value or credential is in a log line or an error."""
    caplog.set_level(logging.DEBUG, "lab_state")
    proxy.plan("PUT", JOURNAL, answers(403, "SignatureDoesNotMatch"))
    storage = bucket.storage(proxy.url)
    with pytest.raises(UnsupportedError) as caught:
        await storage.open(NAME)
    text = repr(storage) + str(caught.value) + "".join(r.getMessage() for r in caplog.records if r.name == "lab_state")
    assert "testsecret" not in text
    assert "testaccess" not in text
