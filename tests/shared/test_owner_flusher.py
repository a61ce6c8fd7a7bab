"""The flusher of an owner: when changes are durable, who is told, and in which order."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Raw
from owner_parts import A, B, change, delete, incr, raw, set_, set_many
from owner_running import Owner, open_owner, owning
from running import idle, until

from lab_state import FencedError, FileStorage, MemoryStorage, StorageError, UnavailableError, UnsupportedError
from lab_state._loading import load
from lab_state._watch import Watcher, Watchers
from lab_state.exceptions import TypeMismatchError
from lab_state.shared._messages import Answer, Answers, Failed, Moved, Ok, Refused
from lab_state.shared._results import Result
from lab_state.shared._wire import encode_for_client
from lab_state.storage import Storage
from lab_state.testing import FaultyStorage, ManualClock


def commits(storage: FaultyStorage) -> int:
    return storage.calls.count("commit")


def ok(n: int, revision: int, result: object = None) -> Ok:
    return Ok(n, revision, raw(result))


async def hanging(storage: FaultyStorage, owner: Owner, key: str = "a") -> None:
    """Begin a commit that hangs. Client A has set a key in it, with the call 1."""
    storage.hang("commit")
    assert owner.left(set_(1, key, 1)) is None
    await until(lambda: commits(storage) == 1)


# Order


async def test_a_record_comes_before_its_answers(storage: FaultyStorage, clock: ManualClock) -> None:
    """When a commit succeeds, the copy has it, then the followers, then the callers. Until then nothing is shown."""
    async with owning(storage, clock) as owner:
        await hanging(storage, owner)
        assert owner.right(set_(1, "b", 2)) is None
        await idle()
        assert (owner.told(), owner.copy.revision, owner.layer.revision) == ([], 0, 2)
        storage.resume()
        await until(lambda: owner.copy.revision == 2)
        assert owner.told() == [
            ("record", 1),
            ("left", ok(1, 1)),
            ("record", 2),
            ("right", ok(1, 2)),
        ]
        assert owner.flusher.durable_revision == 2
        assert [(taken.start, taken.end) for taken in owner.committed] == [(0, 1), (1, 2)]


async def test_a_record_has_the_results_of_its_calls(storage: FaultyStorage, clock: ManualClock) -> None:
    """The bytes for the followers are those of the journal. A call of the owner's own is not in `calls`."""
    async with owning(storage, clock) as owner:
        owner.left(incr(1, "a"))
        assert await owner.flusher.make(incr(1, "a")) == (b"2", 2)
        owner.right(delete(1, "a"))
        assert await owner.flusher.make(set_(1, "b", 1)) == (b"null", 4)
    first, second = (msgspec.json.decode(data) for data in owner.connections.records)
    assert (first["from"], first["to"], first["set"]) == (0, 2, {"a": 2})
    assert first["calls"] == {A: [0, {"1": 1}]}
    assert (second["from"], second["to"], second["delete"]) == (2, 4, ["a"])
    assert second["calls"] == {B: [0, {"1": True}]}


async def test_a_record_without_calls_is_that_of_a_state_that_is_not_shared(
    storage: FaultyStorage, clock: ManualClock
) -> None:
    """It has no member `calls`."""
    async with owning(storage, clock) as owner:
        await owner.flusher.make(set_(1, "a", 1))
    record = b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":[],"expires":{},"wall":%d}'
    assert owner.connections.records == [record % (clock.time() * 1000)]


async def test_callers_share_a_commit(storage: FaultyStorage, clock: ManualClock) -> None:
    """Calls of clients and of the owner's own tasks that wait together are one record, and have its revision."""
    async with owning(storage, clock) as owner:
        own = [asyncio.create_task(owner.flusher.make(incr(1, "a"))) for _ in range(10)]
        await asyncio.sleep(0)
        for number in range(1, 11):
            owner.left(incr(number, "a"))
        assert await asyncio.gather(*own) == [(b"%d" % number, 20) for number in range(1, 11)]
        assert owner.told() == [("record", 20), *(("left", ok(number, 20, number + 10)) for number in range(1, 11))]
        assert commits(storage) == 1


async def test_a_commit_without_changes_is_told_to_no_follower(storage: FaultyStorage, clock: ManualClock) -> None:
    """Each copy would skip its record."""
    async with owning(storage, clock) as owner:
        await owner.flusher.confirm_ownership()
        assert (commits(storage), owner.told()) == (1, [])
        assert owner.flusher.last_records.after(0) == []


async def test_a_client_that_comes_back_gets_the_records_that_it_lacks(
    storage: FaultyStorage, clock: ManualClock
) -> None:
    """The owner keeps its records, and those that it has recovered."""
    async with owning(storage, clock) as owner:
        for number in range(3):
            await owner.flusher.make(set_(1, "a", number))
        assert owner.flusher.last_records.after(1) == owner.connections.records[1:]
        session = owner.flusher.abort()
    await session.aclose()
    before = owner.connections.records
    async with owning(storage, clock) as owner:
        await owner.flusher.make_durable(0)
        await owner.flusher.make(set_(1, "a", 3))
        assert owner.flusher.last_records.after(1) == [*before[1:], *owner.connections.records]


# Calls of the owner's own


async def test_a_function_runs_on_the_layer(storage: FaultyStorage, clock: ManualClock) -> None:
    """It sees a change that is under way, and waits until its own one is durable."""
    async with owning(storage, clock) as owner:
        await hanging(storage, owner)
        own = asyncio.create_task(owner.flusher.run(lambda calls: calls.update("a", lambda old: old + 1)))
        await idle()
        assert not own.done()
        storage.resume()
        assert await own == (2, 2)
        assert owner.copy.entries["a"] == 2


async def test_a_call_that_changes_nothing_waits_for_what_it_saw(storage: FaultyStorage, clock: ManualClock) -> None:
    """It asks for no commit of its own. So does a call that raises."""
    async with owning(storage, clock) as owner:
        await owner.flusher.make(set_(1, "text", "x"))
        assert await owner.flusher.make(delete(1, "missing")) == (b"false", 1)
        storage.hang("commit")
        owner.left(set_(1, "a", 1))
        await until(lambda: commits(storage) == 2)
        waiting = [
            asyncio.create_task(owner.flusher.make(delete(1, "missing"))),
            asyncio.create_task(owner.flusher.make(incr(1, "text"))),
            asyncio.create_task(owner.flusher.run(lambda calls: calls.get_or_set("a", int))),
        ]
        assert owner.right(delete(1, "missing")) is None
        await idle()
        assert not any(task.done() for task in waiting)
        storage.resume()
        unchanged, raised, found = await asyncio.gather(*waiting, return_exceptions=True)
        assert (unchanged, found) == ((b"false", 2), (1, 2))
        assert isinstance(raised, TypeMismatchError)
        assert owner.told()[-2:] == [("left", ok(1, 2)), ("right", ok(1, 2, False))]
        assert commits(storage) == 2


async def test_a_refused_call_returns_at_once(storage: FaultyStorage, clock: ManualClock) -> None:
    """The refusal shows what is not durable yet."""
    async with owning(storage, clock) as owner:
        await hanging(storage, owner)
        refused = Refused(1, 1, {"a": (Raw(b"1"), None)})
        assert await owner.flusher.make(change(1, 0, ["a"], {"a": 2})) == refused
        assert owner.right(change(1, 0, ["a"], {"a": 2})) == refused
        storage.resume()


async def test_a_cancelled_caller_does_not_cancel_its_call(storage: FaultyStorage, clock: ManualClock) -> None:
    """The change is made, and becomes durable without another caller."""
    async with owning(storage, clock) as owner:
        await hanging(storage, owner)
        own = asyncio.create_task(owner.flusher.make(set_(1, "b", 1)))
        await idle()
        own.cancel()
        await idle()
        storage.resume()
        await until(lambda: owner.copy.revision == 2)
        assert owner.copy.entries["b"] == 1


# Failures


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_failed_commit_answers_its_callers(
    storage: FaultyStorage, clock: ManualClock, moment: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A client gets the error of the owner's own callers. The changes and results stay, and are committed again."""
    async with owning(storage, clock) as owner:
        storage.fail("commit", moment)
        owner.left(incr(1, "a"))
        with pytest.raises(UnavailableError) as raised:
            await owner.flusher.make(incr(1, "a"))
        text = str(raised.value)
        assert "the changes stay in memory" in text
        assert owner.told() == [("left", Failed(1, "UnavailableError", text))]
        assert (owner.copy.revision, owner.layer.revision) == (0, 2)
        assert owner.left(incr(1, "a")) is None
        await until(lambda: owner.copy.revision == 2)
        assert owner.told() == [("record", 2), ("left", ok(1, 2, 1))]
        assert owner.copy.entries["a"] == 2
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["ERROR"]


async def test_the_text_of_an_error_can_be_sent(storage: FaultyStorage, clock: ManualClock) -> None:
    """A path may have bytes that are not UTF-8. They are escaped in the answer."""
    async with owning(storage, clock) as owner:
        storage.fail("commit", error=UnsupportedError("cannot write /state/\udcff.journal"))
        owner.left(set_(1, "a", 1))
        await until(lambda: owner.connections.told)
        ((_, answer),) = owner.told()
        assert answer.message.startswith(r"cannot write /state/\udcff.journal (not durable yet")
        assert encode_for_client(0, Answers([answer]))


async def test_a_client_asks_for_a_commit_as_a_task_does(storage: FaultyStorage, clock: ManualClock) -> None:
    """After a failure a new call does not wait for the end of the pause. It may fail at once as well."""
    async with owning(storage, clock) as owner:
        storage.fail("commit", times=3)
        for number in range(1, 4):
            assert owner.left(set_(number, "a", number)) is None
            assert owner.left(set_(number + 3, "b", number)) is None
            await until(lambda: commits(storage) == number)  # noqa: B023 -- it is called in this step
            await idle()
            assert [(to, answer.n) for to, answer in owner.told()] == [("left", number), ("left", number + 3)]
        assert commits(storage) == 3
        clock.advance(5.0)
        await until(lambda: owner.copy.revision == 6)
        assert owner.told() == [("record", 6)]


async def test_calls_of_the_next_commit_do_not_fail_with_this_one(storage: FaultyStorage, clock: ManualClock) -> None:
    """They are committed at once, together with the changes that were put back."""
    async with owning(storage, clock) as owner:
        storage.hang("commit")
        storage.fail("commit")
        owner.left(set_(1, "a", 1))
        await until(lambda: commits(storage) == 1)
        storage.resume()
        await until(lambda: owner.told())
        owner.left(set_(2, "a", 2))
        await until(lambda: commits(storage) == 2)
        owner.right(set_(1, "b", 1))
        await until(lambda: owner.copy.revision == 3)
        assert [(to, type(answer)) for to, answer in owner.told()] == [("left", Failed), ("record", int), ("right", Ok)]


@pytest.mark.parametrize("count", [2, 2_000])
async def test_a_failure_of_the_copy_is_one_of_the_commit(
    storage: FaultyStorage, clock: ManualClock, count: int
) -> None:
    """The record is durable, but not shown. It is committed and applied once more, which changes nothing but the revision."""
    async with owning(storage, clock) as owner:
        values = {f"key {number}": number for number in range(count)}

        def full(*_: object) -> None:
            raise MemoryError

        owner.copy.on_change = owner.copy.on_changes = full
        owner.left(set_many(1, values))
        owner.right(incr(1, "a"))
        with pytest.raises(StorageError, match="MemoryError"):
            await owner.flusher.make(delete(1, "key 0"))
        assert [(to, type(answer)) for to, answer in owner.told()] == [("left", Failed), ("right", Failed)]
        assert (owner.copy.revision, owner.copy.taken, owner.flusher.durable_revision) == (0, 0, 0)
        owner.copy.on_change = owner.copy.on_changes = None
        assert owner.right(incr(2, "a")) is None
        await until(lambda: owner.copy.revision == 4)
        assert owner.told() == [("record", 4), ("right", ok(2, 4, 2))]
        assert owner.right(incr(1, "a")) == ok(1, 4, 1)
        del values["key 0"]
        assert dict(owner.copy.entries.items()) == {**values, "a": 2}


async def test_a_fenced_owner_answers_no_call(storage: FaultyStorage, clock: ManualClock) -> None:
    """It closes the connections, so the clients send their calls to the next owner. Its own callers get the error."""
    owner = await open_owner(storage, clock)
    storage.fail("commit", error=FencedError("a newer writer"))
    owner.left(incr(1, "a"))
    with pytest.raises(FencedError):
        await owner.flusher.make(incr(1, "a"))
    assert owner.told() == [("closed", "FencedError")]
    for call in (owner.flusher.make(incr(1, "a")), owner.flusher.run(lambda calls: calls.pop("a"))):
        with pytest.raises(FencedError, match="nothing was changed"):
            await call
    assert owner.layer.revision == 2
    with pytest.raises(FencedError):
        await owner.flusher.stop(8.0)


async def test_a_call_on_another_loop_is_refused(storage: FaultyStorage, clock: ManualClock) -> None:
    """It would not be able to wait there."""
    async with owning(storage, clock) as owner:
        with pytest.raises(RuntimeError, match="belongs to the event loop"):
            await asyncio.to_thread(asyncio.run, owner.flusher.make(incr(1, "a")))
        assert owner.layer.revision == 0


# The beginning


async def test_a_state_is_settled_first(storage: FaultyStorage, clock: ManualClock) -> None:
    """What a crash may still lose is committed, and the wait ends then. If that fails, the caller learns it, and may wait again."""
    async with owning(storage, clock) as owner:
        await owner.flusher.make_durable(0)
        assert commits(storage) == 0
        await owner.flusher.make(set_(1, "a", 1))
    storage.cut_power(during="commit", moment="torn")
    torn = await open_owner(storage, clock)
    with pytest.raises(StorageError, match="power"):
        await torn.flusher.make(set_(1, "b", 1))
    with pytest.raises(StorageError, match="power"):
        await torn.flusher.stop(8.0)
    storage.fail("commit")
    async with owning(storage, clock) as owner:
        with pytest.raises(UnavailableError):
            await owner.flusher.make_durable(0)
        await owner.flusher.make_durable(0)
        assert owner.flusher.durable_revision == owner.copy.revision == 1
        assert owner.told() == []


# The end


async def test_a_planned_end(storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage) -> None:
    """The calls are answered, then there is a checkpoint, then the queues are sent, then the lock is freed."""
    async with owning(storage, clock) as owner:
        await hanging(storage, owner)
        owner.engine.is_ending = True
        stop = asyncio.create_task(owner.flusher.stop(8.0))
        await idle()
        assert owner.right(set_(1, "b", 2)) == Moved(1)
        assert owner.left(set_(1, "a", 1)) is None
        storage.resume()
        await stop
        assert owner.told() == [
            ("record", 1),
            ("left", ok(1, 1)),
            ("left", ok(1, 1)),
            ("finish", "commit", "checkpoint"),
            ("closed", "UnavailableError"),
        ]
        assert storage.calls[-1] == "aclose"
    found = await load("test", memory)
    assert found.state.entries == {"a": Raw(b"1")}
    assert found.state.results is not None
    assert found.state.results.find(A, 1) == Result(1, b"null")


async def test_a_failure_during_the_stop_is_not_an_answer(storage: FaultyStorage, clock: ManualClock) -> None:
    """The commit is repeated, and may succeed."""
    owner = await open_owner(storage, clock)
    await idle()
    storage.fail("commit", times=2)
    stop = asyncio.create_task(owner.flusher.stop(8.0))
    assert owner.left(incr(1, "b")) is None
    await until(lambda: commits(storage) == 2)
    await idle()
    assert owner.told() == []
    clock.advance(0.2)
    await stop
    assert owner.told()[:2] == [("record", 1), ("left", ok(1, 1, 1))]


async def test_a_last_flush_that_fails_answers_no_call(storage: FaultyStorage, clock: ManualClock) -> None:
    """The next owner may find the change or not, and answers accordingly."""
    owner = await open_owner(storage, clock)
    await idle()
    storage.fail("commit", times=2, error=UnsupportedError("the disk is read-only"))
    stop = asyncio.create_task(owner.flusher.stop(8.0))
    owner.left(incr(1, "b"))
    with pytest.raises(UnsupportedError):
        await stop
    assert storage.faults == 2
    assert [what for what, *_ in owner.told()] == ["closed", "finish", "closed"]


async def queues_that_hang(owner: Owner) -> asyncio.Task[None]:
    """Begin a stop that hangs while the queues are sent."""
    begun = asyncio.Event()

    async def forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    owner.connections.finish = forever  # type: ignore[method-assign]
    stop = asyncio.create_task(owner.flusher.stop(8.0))
    await begun.wait()
    return stop


async def test_the_lock_is_freed_if_the_loop_ends(storage: FaultyStorage, clock: ManualClock) -> None:
    """The event loop cancels the task while the queues are sent. The session is closed all the same."""
    owner = await open_owner(storage, clock)
    stop = await queues_that_hang(owner)
    owner.flusher._task.cancel()
    await asyncio.wait({stop})
    assert storage.calls[-1] == "aclose"


async def test_a_storage_that_hangs_closes_the_connections(storage: FaultyStorage, clock: ManualClock) -> None:
    """A call in a commit that hangs is not answered, also if the commit succeeds after `stop` has given up."""
    owner = await open_owner(storage, clock)
    await hanging(storage, owner)
    stop = asyncio.create_task(owner.flusher.stop(3.0))
    await idle()
    clock.advance(3.0 * 9 / 8)
    with pytest.raises(UnavailableError, match="no progress"):
        await stop
    assert owner.told() == [("closed", "UnavailableError")]
    storage.resume()
    await until(lambda: storage.calls[-1] == "aclose")
    assert all(what != "left" for what, *_ in owner.told())


async def test_a_loop_that_ends_sends_no_queue(storage: FaultyStorage, clock: ManualClock) -> None:
    """After `stop` has given up, the end of the loop closes the session only. The connections are closed already."""
    owner = await open_owner(storage, clock)
    await hanging(storage, owner)
    stop = asyncio.create_task(owner.flusher.stop(3.0))
    await idle()
    clock.advance(3.0 * 9 / 8)
    with pytest.raises(UnavailableError, match="no progress"):
        await stop
    owner.flusher._task.cancel()
    await asyncio.wait({owner.flusher._task})
    assert owner.told() == [("closed", "UnavailableError"), ("closed", "UnavailableError")]
    assert storage.calls[-1] == "aclose"


def abandoned(owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop with its tasks, and forget what the connections were told."""
    owner.flusher._task._log_destroy_pending = False  # type: ignore[attr-defined]
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    owner.told()


def test_a_loop_that_was_closed(storage: FaultyStorage, clock: ManualClock, memory: MemoryStorage) -> None:
    """`stop` on another loop commits what is left. The connections of the closed loop get nothing."""
    loop = asyncio.new_event_loop()
    owner = loop.run_until_complete(open_owner(storage, clock))
    loop.run_until_complete(hanging(storage, owner))
    abandoned(owner, loop)

    async def second() -> None:
        owner.flusher.move()
        owner.flusher.move()
        await owner.flusher.stop(8.0)
        assert (await load("test", memory)).state.entries == {"a": Raw(b"1")}

    asyncio.run(second())
    assert [what for what, *_ in owner.told()] == ["record", "finish", "closed"]


def test_a_loop_that_was_closed_while_queues_were_sent(storage: FaultyStorage, clock: ManualClock) -> None:
    """`stop` on another loop closes the session."""
    loop = asyncio.new_event_loop()
    owner = loop.run_until_complete(open_owner(storage, clock))
    stop = loop.run_until_complete(queues_that_hang(owner))
    abandoned(owner, loop)
    assert not stop.done()
    del stop

    async def second() -> None:
        owner.flusher.move()
        del owner.connections.finish
        await owner.flusher.stop(8.0)
        gc.collect()  # what the closed loop left behind ends now

    asyncio.run(second())
    assert storage.calls[-1] == "aclose"


# The copy


async def test_a_checkpoint_has_durable_changes_alone(storage: FaultyStorage, clock: ManualClock) -> None:
    """It does not wait for the commit under way, and has neither its changes nor its results."""
    async with owning(storage, clock) as owner:
        owner.right(incr(1, "a"))
        await until(lambda: owner.copy.revision == 1)
        storage.hang("commit")
        owner.left(incr(1, "a"))
        await until(lambda: commits(storage) == 2)
        await owner.flusher.checkpoints.write(wait=True)
        found = (await load("test", storage)).state
        assert (found.entries, found.revision) == ({"a": Raw(b"1")}, 1)
        assert found.results is not None
        assert (found.results.find(B, 1), found.results.find(A, 1)) == (Result(1, b"1"), None)
        storage.resume()


async def test_a_large_change_is_shown_in_one_moment(storage: FaultyStorage, clock: ManualClock) -> None:
    """The copy is prepared in steps, and the event loop runs meanwhile. A reader sees all of the keys, or none."""
    seen: set[tuple[int, int]] = set()
    async with owning(storage, clock) as owner:

        def look() -> None:
            seen.add((owner.copy.count(), owner.copy.revision))

        owner.left(set_many(1, {f"key {number}": number for number in range(5_000)}))
        while not owner.connections.told:
            look()
            await asyncio.sleep(0)
        look()
        assert seen == {(0, 0), (5_000, 1)}
        assert owner.told() == [("record", 1), ("left", ok(1, 1))]
        own = await owner.flusher.run(lambda calls: calls.delete_all("key"))
        assert own == (5_000, 2)
        assert owner.copy.count() == 0
        await idle()
        assert not owner.copy.frozen


async def test_a_whole_state_that_is_committed_has_nothing_newer(tmp_path: Path, clock: ManualClock) -> None:
    """After an unclean end the first commit writes everything. It has the results of its own calls, and no later ones."""
    first = await open_owner(FileStorage(tmp_path), clock)
    for number in range(1, 4):
        first.left(incr(number, "a"))
        await until(lambda: first.copy.revision == number)  # noqa: B023 -- it is called in this step
    await first.flusher.abort().aclose()
    storage = FaultyStorage(FileStorage(tmp_path))
    async with owning(storage, clock) as owner:
        owner.right(incr(1, "a"))
        storage.hang("commit", skip=1)
        await until(lambda: commits(storage) == 1)
        owner.right(incr(2, "a"))
        await until(lambda: commits(storage) == 2)
        found = (await load("test", FileStorage(tmp_path))).state
        assert (found.entries, found.revision) == ({"a": Raw(b"4")}, 4)
        assert found.results is not None
        assert [found.results.find(A, number) for number in (1, 3)] == [Result(1, b"1"), Result(3, b"3")]
        assert [found.results.find(B, number) for number in (1, 2)] == [Result(4, b"4"), None]
        storage.resume()
        await until(lambda: owner.copy.revision == 5)


async def test_watches_report_what_is_durable(storage: FaultyStorage, clock: ManualClock) -> None:
    """A watch of the copy gets a change with its record. A key that was swept is reported as expired."""
    async with owning(storage, clock) as owner:
        watchers = Watchers(owner.copy)
        watcher = Watcher("", 0, 0, durable=False)
        watchers.add(watcher)
        await hanging(storage, owner)
        owner.left(set_(2, "b", 1, 500))
        await idle()
        assert "pending: 0 keys" in repr(watcher)
        storage.resume()
        await until(lambda: owner.copy.revision == 2)
        changes = [await anext(watcher), await anext(watcher)]
        assert [(one.key, one.kind, one.revision) for one in changes] == [("a", "set", 1), ("b", "set", 2)]
        clock.advance(1.0)
        owner.layer.sweep(500)
        owner.flusher.nudge()
        one = await anext(watcher)
        assert (one.key, one.kind, one.revision) == ("b", "expire", 3)
        watchers.remove(watcher)


async def test_the_objects_of_an_owner_are_freed(storage: FaultyStorage, clock: ManualClock) -> None:
    """After the end the copy is emptied in steps, with its index."""
    async with owning(storage, clock) as owner:
        await owner.flusher.make(set_(1, "a", 1))
        assert owner.copy.names("") == ["a"]
    owner.flusher.discard_entries()
    await idle()
    assert (len(owner.copy.entries), owner.copy.index) == (0, None)


def answered(owner: Owner) -> list[Answer]:
    return [answer for to, answer in owner.told() if to in ("left", "right")]


async def test_a_storage_with_random_faults(memory: MemoryStorage, clock: ManualClock) -> None:
    """Each call is applied once, whatever fails: a client that repeats a failed call gets the result of its application."""
    storage: Storage = FaultyStorage.random(memory, seed=7, rate=0.3)
    async with owning(storage, clock) as owner:
        results: list[int] = []
        for number in range(1, 41):
            while True:
                answer = owner.left(incr(number, "a"))
                while answer is None:
                    clock.advance(0.1)
                    await idle()
                    answer = next(iter(answered(owner)), None)
                if isinstance(answer, Ok):
                    results.append(msgspec.json.decode(answer.result))
                    break
        assert results == list(range(1, 41))
        assert isinstance(storage, FaultyStorage)
        assert storage.faults > 5
