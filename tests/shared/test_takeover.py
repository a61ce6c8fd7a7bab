"""Takeovers, loads and cuts: what the processes of a shared state show and answer meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from claims import Gate, descriptors
from members import NAME, apart, bury, crash, cut, manager, member_of, members, owner_of
from running import idle, until

from lab_state import (
    Change,
    CorruptionError,
    FencedError,
    FileStorage,
    MemoryCache,
    StorageError,
    UnavailableError,
)
from lab_state import _loading as loading
from lab_state._batch import Batch
from lab_state._state import State
from lab_state.shared import _clients, _follower, _member
from lab_state.shared._found import settle
from lab_state.shared._last_records import LastRecords
from lab_state.shared._link import Link
from lab_state.shared._messages import RecordMessage
from lab_state.storage._claim import Listener
from lab_state.storage._file_writer import Need, Writer
from lab_state.storage.file import files_of
from lab_state.testing import ManualClock

# A takeover


async def test_watches_go_on(tmp_path: Path) -> None:
    """A watch of the next owner, and that of a follower, report the changes before and after a takeover, and no `resync`."""
    async with members(tmp_path, 3) as (first, one, other):
        async with one.watch() as changes, other.watch(durable=True) as durable:
            await first.set("a", 1)
            await one.catch_up()
            await crash(first)
            await other.set("b", 1)
            await one.catch_up()
            for watched in (changes, durable):
                assert [await anext(watched), await anext(watched)] == [Change("a", "set", 1), Change("b", "set", 2)]
        await first.stop()


async def test_every_kind_of_call_waits_for_an_owner(tmp_path: Path) -> None:
    """Calls of a process without an owner complete after the takeover."""
    async with members(tmp_path, 2) as (first, one):
        await one.set_many({"a": 1, "b": 2, "c": 3})
        await crash(first)
        await until(lambda: one.status().owner_pid is None)
        assert await one.get("a") == 1

        async def change(tx: Any) -> Any:
            tx.set("t", tx.get("a"))
            return tx.get("t")

        made = await asyncio.gather(
            one.set("d", 4),
            one.pop("b"),
            one.update("c", lambda old: old + 1),
            one.get_or_set("e", lambda: 5),
            one.delete("none"),
            one.transact(change),
            one.catch_up(),
            one.flush(),
            one.wait_revision(4),
            one.get("a"),
        )
        assert made[1:6] == [2, 4, 5, False, 1]
        assert one.role == "owner"
        assert await one.get_all() == {"a": 1, "c": 4, "d": 4, "e": 5, "t": 1}
        await first.stop()


async def test_no_owner_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an owner for `owner_timeout`, a call raises an error which says that it was not made, and names the holder."""
    async with members(tmp_path, 2, owner_timeout=0.5) as (first, one):
        owner_of(first)._close()  # it still holds the lock
        await until(lambda: one.status().owner_pid is None)
        with pytest.raises(UnavailableError, match=rf"locked by pid {os.getpid()}.*the call was not made") as info:
            await one.set("a", 1)
        assert info.value.outcome == "not made"
        assert one.status().lag >= 0.5
        with pytest.raises(UnavailableError, match="catch_up"):
            await one.catch_up()
        await first.stop()
        assert await one.set("a", 2) == 1


async def test_an_owner_that_hangs_when_a_process_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a copy waits for an owner that accepts its connection and says nothing. Its calls end, and reads go on."""
    first, one = manager(tmp_path), manager(tmp_path, owner_timeout=0.3)
    await first.start()
    await one.start()
    await one.set("a", 1)
    looks = 0
    real = Link.silent_for

    def silent_for(link: Link) -> float:
        nonlocal looks
        looks += 1
        return real(link)

    async with apart(first):
        await crash(first)
        claim = await files_of(FileStorage(tmp_path)).claim(NAME, 1)
    monkeypatch.setattr(Link, "silent_for", silent_for)
    with pytest.raises(UnavailableError, match=rf"the process {os.getpid()} does not answer: the call was not made"):
        await one.set("a", 2)
    assert await one.get("a") == 1
    assert looks < 10
    await claim.release()
    assert await one.set("a", 3) == 2
    assert one.role == "owner"
    await one.stop()
    await bury(first)


async def test_a_takeover_continues_the_clock(tmp_path: Path) -> None:
    """The next owner continues the clock of its copy: after the wall clock was set back, no expired key comes back."""
    clocks = ManualClock(), ManualClock()
    first, one = (manager(tmp_path, clock=clock) for clock in clocks)
    await first.start()
    await one.start()
    await first.set("a", 1, ttl=10)
    await one.catch_up()
    for clock in clocks:
        clock.advance(11)
        clock.jump(-1000)
    assert await one.get("a", None) is None
    await crash(first)
    while one.role != "owner":
        clocks[1].advance(0.001)  # the search pauses by this clock
        await asyncio.sleep(0)
    assert await one.incr("n") == 1
    assert await one.get_all() == {"n": 1}
    clocks[1].advance(1)  # the sweep
    await until(lambda: one.status().revision > 2)
    await one.stop()
    assert "a" not in json.loads((tmp_path / "lab.json").read_bytes())
    await bury(first)


async def test_a_watch_is_told_of_an_expiry(tmp_path: Path) -> None:
    """Followers sweep nothing. A deletion of a key that had expired is reported as `expire`."""
    clocks = ManualClock(), ManualClock()
    first, one = (manager(tmp_path, clock=clock) for clock in clocks)
    async with first, one, one.watch() as changes:
        await one.set("a", 1, ttl=10)
        assert (await anext(changes)).kind == "set"
        clocks[1].advance(20)
        assert await one.get("a", None) is None
        clocks[0].advance(20)
        assert await anext(changes) == Change("a", "expire", 2)


async def test_a_start_sweeps(tmp_path: Path) -> None:
    """A start deletes the keys that have expired since the last stop."""
    clock = ManualClock()
    async with members(tmp_path, 1, clock=clock) as (one,):
        await one.set_many({f"key {number}": number for number in range(2000)}, ttl=10)
        await one.set("stays", 1)
    clock.advance(20)
    async with members(tmp_path, 1, clock=clock) as (one,):
        assert len(one) == 1
        await one.set("b", 1)
        assert set(member_of(one).state.entries) == {"stays", "b"}


async def test_a_takeover_that_finds_records(tmp_path: Path) -> None:
    """A process that lacks the last records finds them in the journal, and shows them before it makes a call. Watches report them."""
    async with members(tmp_path, 2) as (first, one), one.watch() as changes:
        async with apart(first):
            await first.set("a", 1)
            await first.set_many({f"key {number}": number for number in range(1500)})
            await crash(first)
            assert await one.get_all() == {}
        assert await one.incr("n") == 1
        assert len(one) == 1502
        assert await anext(changes) == Change("a", "set", 1)
        await bury(first)


async def test_a_large_change_is_merged_before_it_is_settled(tmp_path: Path) -> None:
    """A copy with a change of many keys, which is not merged yet, is settled as a whole."""
    state = State()
    state.load({f"key {number}": 1 for number in range(20_000)}, 0)
    batch = Batch(state, {f"key {number}": 2 for number in range(3000)})
    for _ in batch.prepare():
        pass
    batch.switch()
    session = await FileStorage(tmp_path).open(NAME)
    session._writer.need = Need.FULL  # as after an unclean end
    await settle(session, state, [])
    await session.aclose()
    found = await loading.load(NAME, FileStorage(tmp_path))
    assert (len(found.state.entries), found.state.revision) == (20_000, 1)


# Loads


async def test_a_copy_that_fell_behind(tmp_path: Path) -> None:
    """If the owner has no more the records that a copy lacks, the copy is loaded. Watches report one `resync`."""
    async with members(tmp_path, 2) as (owner, one):
        await owner.set("a", 1)
        await one.catch_up()
        async with one.watch() as changes, one.watch(durable=True) as durable:
            async with apart(owner):
                await owner.set("b", 2)
            await one.catch_up()
            assert await one.get_all() == {"a": 1, "b": 2}
            for watched in (changes, durable):
                assert (await anext(watched)).kind == "resync"
            assert await one.incr("n") == 1


async def test_records_and_answers_during_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a load the old copy serves reads. Records and answers are kept, and shown with what was read."""
    async with members(tmp_path, 2) as (owner, one):
        await owner.set("a", 1)
        await one.catch_up()
        gate = asyncio.Event()
        real = loading.load

        async def load(*args: Any) -> Any:
            found = await real(*args)
            await gate.wait()
            return found

        monkeypatch.setattr(_follower, "load", load)
        async with apart(owner):
            await owner.set("a", 2)
        made = asyncio.gather(one.incr("n"), one.set("b", "x" * 20_000), one.catch_up())
        await until(lambda: owner.status().revision == 4)
        await owner.set_many({f"key {number}": number for number in range(1500)})
        assert await one.get_all() == {"a": 1}
        assert not made.done()
        gate.set()
        assert (await made)[0] == 1
        await one.catch_up()
        assert await one.get_all() == await owner.get_all()


@pytest.mark.parametrize("ends", ["cut", "too much is kept", "gap"])
async def test_a_load_that_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """If the connection ends during a load, if too much comes meanwhile, or if a record is missing, the load begins again."""
    async with members(tmp_path, 1) as (owner,):
        await owner.set("a", 1)
        gates = [asyncio.Event()]
        loads = 0
        real = loading.load

        async def load(*args: Any) -> Any:
            nonlocal loads
            gate = gates[0] if gates else None
            loads += 1
            found = await real(*args)
            if gate is not None:
                await gate.wait()
            return found

        monkeypatch.setattr(_follower, "load", load)
        one = manager(tmp_path)
        start = asyncio.create_task(one.start())
        await until(lambda: owner.status().followers == 1 and loads == 1)
        if ends == "cut":
            gate = gates.pop()
            cut(owner)
            await until(lambda: loads == 2)
            gate.set()
        elif ends == "gap":
            (connection,) = owner_of(owner).server._connections
            connection.record(b'{"from":8,"to":9,"clear":false,"set":{},"delete":[],"expires":{}}')
            connection._send(
                RecordMessage(memoryview(b'{"from":8,"to":9,"clear":false,"set":{},"delete":[],"expires":{}}'))
            )
            await owner.set("b", 1)
            gates.pop().set()
        else:
            gates.pop()
            monkeypatch.setattr(_follower, "MOST_KEPT", 10)
            await owner.set("b", 1)
            await until(lambda: loads == 2)
            monkeypatch.undo()
        await start
        assert await one.incr("n") == 1
        await one.stop()


async def test_a_reading_waits_until_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is shown when the owner has named its revision. A failed commit may remove it again."""
    async with members(tmp_path, 1) as (owner,):
        await owner.set("a", 1)
        gate, real = threading.Event(), Writer.commit

        def commit(self: Writer, *args: Any) -> None:
            real(self, *args)
            gate.wait(60)

        monkeypatch.setattr(Writer, "commit", commit)
        made = asyncio.create_task(owner.set("a", 2))
        await until(lambda: b'"a":2' in (tmp_path / "lab.journal").read_bytes())
        read = asyncio.Event()

        async def load(*args: Any) -> Any:
            found = await loading.load(*args)
            read.set()
            return found

        monkeypatch.setattr(_follower, "load", load)
        one = manager(tmp_path)
        start = asyncio.create_task(one.start())
        await read.wait()
        await idle()
        assert not start.done()
        gate.set()
        await made
        await start
        assert await one.get("a") == 2
        monkeypatch.undo()
        await one.stop()


async def test_a_reading_that_is_older_than_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading that is older than the copy is dropped, and the files are read again. Reads never go back."""
    async with members(tmp_path, 2) as (owner, one):
        await owner.set("a", 1)
        old = await loading.load(NAME, FileStorage(tmp_path))
        await owner.set("a", 2)
        await one.catch_up()
        readings = [old]
        real = loading.load

        async def load(*args: Any) -> Any:
            return readings.pop() if readings else await real(*args)

        monkeypatch.setattr(_follower, "load", load)
        flusher = owner_of(owner).flusher
        assert flusher is not None
        flusher.last_records = LastRecords((), 100)
        cut(owner)
        await one.catch_up()
        assert readings == []
        assert await one.get("a") == 2


async def test_a_record_that_is_no_record(tmp_path: Path) -> None:
    """After a record that is not one, the process loads everything on another connection, and goes on."""
    async with members(tmp_path, 2) as (owner, one):
        await owner.set("a", 1)
        for data in (b"{}", b"x" * 20_000):
            (connection,) = owner_of(owner).server._connections
            connection._send(RecordMessage(memoryview(data)))
            assert await one.incr("n") > 0
            assert await one.get("a") == 1


async def test_files_that_cannot_be_read_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A follower whose load fails tries again after growing pauses, and logs that once."""
    async with members(tmp_path, 2) as (owner, one):
        failures = [UnavailableError("the disk is slow"), UnavailableError("the disk is slow")]
        real = loading.load

        async def load(*args: Any) -> Any:
            if failures:
                raise failures.pop()
            return await real(*args)

        monkeypatch.setattr(_follower, "load", load)
        async with apart(owner):
            await owner.set("a", 1)
        await one.catch_up()
        assert await one.get("a") == 1
        told = [record.getMessage() for record in caplog.records if "tries again" in record.getMessage()]
        assert told == ["lab: can neither find an owner nor become the owner, and tries again: the disk is slow"]


@pytest.mark.parametrize(
    ("error", "message"), [(StorageError("broken"), "broken"), (RuntimeError("bug"), "could not be read: RuntimeError")]
)
async def test_a_start_that_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """A start whose load fails raises the error."""
    async with members(tmp_path, 1):

        async def load(*args: Any) -> Any:
            raise error

        monkeypatch.setattr(_follower, "load", load)
        with pytest.raises(StorageError, match=message):
            await manager(tmp_path).start()


# Cuts


async def test_a_cut_while_calls_are_not_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was applied and is not durable when its connection is cut returns the result of that one application."""
    async with members(tmp_path, 2) as (owner, one):
        await one.set("a", 1)
        real = Writer.commit
        gate = Gate(lambda: None)

        def commit(self: Writer, *args: Any) -> None:
            gate()
            real(self, *args)

        monkeypatch.setattr(Writer, "commit", commit)
        made = asyncio.gather(one.incr("n"), one.update("u", lambda old: old + 1, 0), one.pop("a"))
        await gate.entered()
        cut(owner)
        await until(lambda: owner.status().followers == 1)
        gate.open()
        assert list(await made) == [1, 1, 1]
        await one.catch_up()
        assert await one.get_all() == {"n": 1, "u": 1}


async def test_a_client_that_was_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that the owner has forgotten takes a new id. Its calls that were sent have an unknown outcome, the others are made."""
    async with members(tmp_path, 2) as (owner, one):
        await one.incr("n")
        port = member_of(one).port
        before = port.client
        gate = Gate(Writer.commit)
        monkeypatch.setattr(Writer, "commit", lambda *args: gate(*args))
        sent = asyncio.create_task(one.incr("n"))
        await gate.entered()
        monkeypatch.setattr(_clients, "FORGOTTEN_AFTER", 0)
        flusher = owner_of(owner).flusher
        assert flusher is not None
        cut(owner)
        flusher.engine.forget_gone()
        await until(lambda: one.status().owner_pid is None)
        other = asyncio.create_task(one.set("a", 1))
        with pytest.raises(UnavailableError, match="has forgotten this process") as info:
            await sent
        gate.open()
        assert info.value.outcome == "unknown"
        await other
        assert port.client != before
        monkeypatch.undo()
        assert await one.incr("n") == 3


async def test_many_small_changes(tmp_path: Path) -> None:
    """A record with many keys and few bytes is applied in steps, too."""
    async with members(tmp_path, 2) as (owner, one):
        await owner.set_many({str(number): number for number in range(1200)})
        await owner.delete_many([str(number) for number in range(1100)])
        await one.catch_up()
        assert len(one) == 100


# Disks


async def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers of a follower get the error that the owner's own callers get. When the disk works again, so do calls."""
    async with members(tmp_path, 2) as (owner, one):

        def commit(self: Writer, *args: Any) -> None:
            raise UnavailableError("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(Writer, "commit", commit)
            errors = await asyncio.gather(owner.set("a", 1), one.set("b", 1), return_exceptions=True)
        assert [type(error) for error in errors] == [UnavailableError] * 2
        assert str(errors[0]).replace("'a'", "") == str(errors[1]).replace("'b'", "")
        await one.set("c", 1)
        assert (await one.get("c"), await owner.get("c")) == (1, 1)


async def test_a_takeover_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that cannot settle the state tries again. Nothing is shown or answered before that."""
    async with members(tmp_path, 2) as (first, one):
        await one.set("a", 1)
        failures = [UnavailableError("the disk is full")] * 2
        real = settle

        async def settles(*args: Any) -> None:
            if failures:
                raise failures.pop()
            await real(*args)

        monkeypatch.setattr(_member, "settle", settles)
        await crash(first)
        assert await one.incr("n") == 1
        assert failures == []
        assert one.role == "owner"
        assert "tries again: the disk is full" in caplog.text
        await first.stop()


@pytest.mark.parametrize("damage", ["less", "torn", "removed"])
async def test_corruption_at_a_takeover(tmp_path: Path, damage: str) -> None:
    """If the files are damaged, or have less than the copies, each process raises the error, and none overwrites anything."""
    first, one, other = (manager(tmp_path) for _ in range(3))
    for each in (first, one, other):
        await each.start()
    await first.set("a", 1)
    before = (tmp_path / "lab.journal").read_bytes()
    await first.set("b", 2)
    for each in (one, other):
        await each.catch_up()
    journal = (tmp_path / "lab.journal").read_bytes()
    contents = {"less": before, "torn": journal[:60] + b"?" + journal[61:], "removed": b""}[damage]
    (tmp_path / "lab.journal").write_bytes(contents)
    made = [asyncio.create_task(each.set("c", 3)) for each in (one, other)]
    await crash(first)
    for call, each in zip(made, (one, other), strict=True):
        with pytest.raises(CorruptionError):
            await call
        with pytest.raises(CorruptionError):
            await each.incr("n")
        with pytest.raises(CorruptionError):
            await each.catch_up()
        assert await each.get_all() == {"a": 1, "b": 2}
        assert "cannot be loaded" in str(each.status().task_failure)
        with pytest.raises(CorruptionError):
            await each.stop()
    assert (tmp_path / "lab.journal").read_bytes() == contents
    await bury(first)


async def test_a_fault_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error in the task of a member is told to all callers."""
    async with members(tmp_path, 1) as (first,):
        one = manager(tmp_path)
        await one.start()

        def find(*args: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(_member, "find", find)
        await crash(first)
        with pytest.raises(StorageError, match="cannot be used: ZeroDivisionError at"):
            await one.set("a", 1)
        with pytest.raises(StorageError, match="cannot be used"):
            await one.stop()
        monkeypatch.undo()
        await first.stop()
        async with manager(tmp_path) as again:
            assert again.role == "owner"


# Fenced owners


async def test_a_lost_lock(tmp_path: Path) -> None:
    """An owner whose lock file was deleted learns of it within a second, without a change. It answers no call with that error."""
    fenced: list[FencedError] = []
    clock = ManualClock()
    first = manager(tmp_path, clock=clock, on_fenced=fenced.append)
    await first.start()
    async with members(tmp_path, 1) as (one,):
        await one.set("a", 1)
        (tmp_path / "lab.lock").unlink()
        (tmp_path / "lab.sock").unlink()
        clock.advance(1)
        await until(lambda: fenced)
        assert first.status().fenced
        assert await one.set("a", 2) == 2
        assert one.role == "owner"
        with pytest.raises(FencedError):
            await first.set("a", 3)
        with pytest.raises(FencedError):
            await first.stop()


# The socket


async def test_a_deleted_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An owner whose socket file was deleted or replaced makes it again within a second. Connections stay."""
    clock = ManualClock()
    async with members(tmp_path, 1, clock=clock) as (owner,), members(tmp_path, 1) as (one,):
        for number in range(2):
            caplog.clear()
            (tmp_path / "lab.sock").unlink()
            (tmp_path / "lab.sock").write_bytes(b"")
            clock.advance(1)
            await until(lambda: "was made again" in caplog.text)
            assert await one.incr("n") == 2 * number + 1
            async with members(tmp_path, 1) as (late,):
                assert late.role == "follower"
                assert await late.incr("n") == 2 * number + 2
        clock.advance(1)  # nothing is wrong
        assert owner.status().followers == 1


async def test_a_socket_that_cannot_be_bound_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the socket cannot be made again, this is logged once, and tried again each second."""
    caplog.set_level(logging.DEBUG, "lab_state")
    clock = ManualClock()
    async with members(tmp_path, 1, clock=clock) as (owner,):
        (tmp_path / "lab.sock").unlink()
        (tmp_path / "lab.sock").mkdir()
        for _ in range(3):
            clock.advance(1)
            await until(lambda: not owner_of(owner)._tasks)
        (tmp_path / "lab.sock").rmdir()
        clock.advance(1)
        await until(lambda: "can connect again" in caplog.text)
        assert caplog.text.count("processes that start now cannot connect") == 1
        async with members(tmp_path, 1) as (late,):
            assert late.role == "follower"


async def test_one_look_at_the_socket_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a look at the socket file waits for a slow disk, no other look begins. After it the looks go on."""
    clock = ManualClock()
    async with members(tmp_path, 1, clock=clock) as (owner,):
        gate = Gate(Listener.is_gone)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Listener, "is_gone", lambda *args: gate(*args))
            clock.advance(1)
            await gate.entered()
            clock.advance(3)
            assert len(owner_of(owner)._tasks) == 1
            gate.open()
            await until(lambda: not owner_of(owner)._tasks)
        clock.advance(1)
        assert len(owner_of(owner)._tasks) == 1
        await until(lambda: not owner_of(owner)._tasks)


async def test_a_socket_that_is_made_again_during_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is bound again just when the owner stops is closed, and its file is deleted."""
    clock = ManualClock()
    before = descriptors()
    async with members(tmp_path, 1, clock=clock) as (owner,):
        gate = Gate(Listener.replace)
        monkeypatch.setattr(Listener, "replace", lambda *args: gate(*args))
        (tmp_path / "lab.sock").unlink()
        clock.advance(1)
        await gate.entered()
        owner_of(owner)._stop_accepting()
        gate.open()
        await until(lambda: not owner_of(owner)._tasks)
    assert not (tmp_path / "lab.sock").exists()
    assert descriptors() == before


# Prefixes


async def test_delete_all_of_a_follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner builds the index of a large state in steps before it deletes a prefix."""
    async with members(tmp_path, 2) as (owner, one):
        await owner.set_many({f"{'ab'[number % 2]}/{number}": number for number in range(40_000)})
        assert owner_of(owner)._copy.state.is_index_behind
        assert (await asyncio.gather(one.delete_all("a/"), one.set("b/x", 1)))[0] == 20_000
        assert len(owner) == 20_001
        assert await one.delete_all("zzz/") == 0
        cut_early = asyncio.create_task(one.delete_all("b/"))
        await asyncio.sleep(0)
        cut(owner)
        assert await cut_early == 20_001


# The mirror


async def test_the_mirror_of_the_next_owner(tmp_path: Path) -> None:
    """The owner feeds the mirror, and a new owner fills it anew. Followers write nothing there."""
    cache = MemoryCache()
    async with contextlib.AsyncExitStack() as stack:
        first, one = manager(tmp_path, cache), manager(tmp_path, cache)
        await first.start()
        await stack.enter_async_context(one)
        reader = await stack.enter_async_context(cache.reader(NAME, local=True))
        await one.set("a", 1)
        await reader.wait_revision(1)
        assert await reader.get("a") == 1
        assert first.status().mirror is not None
        assert first.metrics().operations[("fill", "success")] == 1
        assert one.metrics().operations[("fill", "success")] == 0
        assert one.status().mirror is not None
        await first.stop()
        await one.set("a", 2)
        await reader.wait_revision(2)
        assert await reader.get("a") == 2
        assert one.metrics().operations[("fill", "success")] == 1
        status = one.status().mirror
        assert status is not None
        assert status.up
