"""`Member`: processes of a shared state start, follow, take over and stop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import logging
import os
import re
import sys
import threading
from pathlib import Path

import pytest
from claims import Gate, descriptors
from members import bury, crash, manager, member_of, members, owner_of
from running import until

from lab_state import ClosedError, LockedError, Manager, UnavailableError
from lab_state.shared._election import Election
from lab_state.storage import _file_start


def collect() -> None:
    """Collect what was forgotten, and wait until it is closed."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "lab_state forgotten":
            thread.join()


# Starts


async def test_the_first_process_owns_the_state(tmp_path: Path) -> None:
    """The first manager is the owner and the others follow it. Without a start, there is no role."""
    assert manager(tmp_path).role is None
    async with members(tmp_path, 3) as (first, second, third):
        assert [one.role for one in (first, second, third)] == ["owner", "follower", "follower"]
        assert [one.status().owner_pid for one in (first, second, third)] == [os.getpid()] * 3
        assert [one.status().followers for one in (first, second, third)] == [2, None, None]
        assert first.status().lag == 0.0
        assert second.status().lag < 60
    assert [one.role for one in (first, second, third)] == [None] * 3


async def test_a_write_is_in_the_copy_of_its_process(tmp_path: Path) -> None:
    """When a write returns, a read of the same process has it, in the owner and in a follower. The others catch up."""
    async with members(tmp_path, 3) as (first, second, third):
        for one in (first, second, third):
            revision = await one.set("a", one.revision)
            assert await one.get("a") == revision - 1
            for other in (first, second, third):
                await other.catch_up()
                assert await other.get("a") == revision - 1


async def test_processes_that_start_at_once(tmp_path: Path) -> None:
    """Of several managers that start at the same time, one becomes the owner."""
    started = [manager(tmp_path) for _ in range(4)]
    await asyncio.gather(*(one.start() for one in started))
    assert sorted(str(one.role) for one in started) == ["follower", "follower", "follower", "owner"]
    await asyncio.gather(*(one.incr("n") for one in started))
    await asyncio.gather(*(one.stop() for one in started))
    content = json.loads((tmp_path / "lab.json").read_bytes())
    assert content["n"] == 4
    assert not (tmp_path / "lab.sock").exists()


async def test_a_planned_end(tmp_path: Path) -> None:
    """When the owner stops, a follower takes over, and its calls complete. The last one writes the plain JSON."""
    async with members(tmp_path, 3) as (first, second, third):
        made = asyncio.gather(*(one.incr("n") for one in (second, third) for _ in range(50)))
        await first.stop()
        assert sorted(await made) == list(range(1, 101))
        await until(lambda: "owner" in {second.role, third.role})
        assert await second.incr("n") == 101
    assert json.loads((tmp_path / "lab.json").read_bytes())["n"] == 101


async def test_the_end_of_an_owner_that_is_killed(tmp_path: Path) -> None:
    """When the owner dies, a follower takes over. Each open call is made once, and returns its result."""
    async with members(tmp_path, 3) as (first, second, third):
        assert await first.set("a", 1) == 1
        made = asyncio.gather(*(one.incr("n") for one in (second, third) for _ in range(50)))
        await asyncio.sleep(0)
        await crash(first)
        assert sorted(await made) == list(range(1, 101))
        assert {second.role, third.role} == {"owner", "follower"}
        await first.stop()
        for one in (second, third):
            await one.catch_up()
            assert await one.get_all() == {"a": 1, "n": 100}


async def test_ownership_that_moves_all_the_time(tmp_path: Path) -> None:
    """Managers that stop and start again move the ownership. Each completed call counts once."""
    async with members(tmp_path, 2) as (one, other):
        done = 0
        for _ in range(10):
            moving = [manager(tmp_path) for _ in range(2)]
            for each in moving:
                await each.start()
            made = asyncio.gather(*(each.incr("n") for each in (one, other, *moving) for _ in range(5)))
            await asyncio.sleep(0)
            stopping = [each.stop() for each in moving]
            if other.role == "owner":
                one, other = other, one
            stopping.append(one.stop())
            answers = await asyncio.gather(made, *stopping)
            done += 20
            assert answers[0] is not None
            assert max(answers[0]) == done
            await one.start()
    assert json.loads((tmp_path / "lab.json").read_bytes())["n"] == done


async def test_a_stop_while_there_is_no_owner(tmp_path: Path) -> None:
    """A follower that stops just after the end of its owner takes over, and writes the plain JSON file."""
    async with members(tmp_path, 1) as (first,):
        one = manager(tmp_path)
        await one.start()
        made = asyncio.create_task(one.set("a", 1))
        await asyncio.sleep(0)
        await crash(first)
        await one.stop()
        assert await made == 1
        assert json.loads((tmp_path / "lab.json").read_bytes())["a"] == 1
        await bury(first)


async def test_a_stop_beside_an_owner_that_does_not_answer(tmp_path: Path) -> None:
    """A stop ends after `stop_timeout`. It raises an error if calls had no answer, and these calls say so."""
    async with members(tmp_path, 1) as (owner,):
        one, idle = (manager(tmp_path, stop_timeout=0.4) for _ in range(2))
        await one.start()
        await idle.start()
        owner_of(owner)._close()  # it still holds the lock
        made = asyncio.create_task(one.set("a", 1))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match=r"stop\(\) gave up after 0.4 s: calls of 'lab' had no answer"):
            await one.stop()
        with pytest.raises(UnavailableError, match="the manager was stopped"):
            await made
        await idle.stop()


async def test_a_farewell_without_an_answer(tmp_path: Path) -> None:
    """A follower whose farewell has no answer until `stop_timeout` ends without an error: all its calls are complete."""
    async with members(tmp_path, 1) as (owner,):
        one = manager(tmp_path, stop_timeout=0.3)
        await one.start()
        assert await one.set("a", 1) == 1
        (connection,) = owner_of(owner).server._connections
        connection._channel._handle = lambda _: None  # it ignores all messages
        await one.stop()
        assert one.role is None


async def test_a_stop_beside_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the middle of a takeover ends after `stop_timeout`, also if the disk hangs."""
    async with members(tmp_path, 1) as (first,):
        one = manager(tmp_path, stop_timeout=0.3)
        await one.start()
        gate = Gate(_file_start._load)
        monkeypatch.setattr(_file_start, "_load", gate)
        await crash(first)
        await gate.entered()
        await one.stop()
        gate.open()
        await bury(first)
    while True:
        with contextlib.suppress(LockedError):
            async with manager(tmp_path, owner_timeout=5) as again:
                assert again.role == "owner"
                break


async def test_calls_during_a_stop(tmp_path: Path) -> None:
    """Calls after `stop()` raise an error. Calls before it complete, in each role."""
    async with members(tmp_path, 2) as (owner, one):
        for each in (one, owner):
            made = asyncio.gather(*(each.incr("n") for _ in range(10)), each.update("u", lambda old: old + 1, 0))
            stop = asyncio.create_task(each.stop())
            await asyncio.sleep(0)
            with pytest.raises(ClosedError):
                await each.set("a", 1)
            await stop
            assert len(set(await made)) >= 10


async def test_a_farewell(tmp_path: Path) -> None:
    """A follower that has stopped looks for no owner, and the results of its calls are forgotten."""
    async with members(tmp_path, 1) as (owner,):
        one = manager(tmp_path)
        await one.start()
        await one.incr("n")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Election, "role", None)
            await one.stop()
        await owner.set("a", 1)
        results = member_of(owner).state.results
        assert results is not None
        assert results.snapshot() == {}


# Event loops


async def test_a_stop_frees_the_map_and_the_index(tmp_path: Path) -> None:
    """After a stop, in each role, the copy has no index, and its map is freed."""
    async with members(tmp_path, 2) as all_:
        await all_[0].set_many({f"key{number}": number for number in range(3_000)})
        await all_[1].catch_up()
        copies = [member_of(one).state for one in all_]
        assert [len(await one.keys("key1")) for one in all_] == [1_111, 1_111]
        assert all(copy.index is not None for copy in copies)
    assert all(copy.index is None for copy in copies)
    await until(lambda: not any(copy.entries for copy in copies))


def test_a_loop_that_is_closed_before_the_stop(tmp_path: Path) -> None:
    """A manager whose event loop was closed is stopped on another one, in each role. Nothing stays locked or open."""
    before = descriptors()

    async def begin() -> tuple[Manager, Manager]:
        owner, one = manager(tmp_path), manager(tmp_path)
        await owner.start()
        await one.start()
        await one.set("a", 1)
        return owner, one

    async def end(*all_: Manager) -> None:
        for each in all_:
            await each.stop()

    asyncio.run(end(*asyncio.run(begin())))
    assert json.loads((tmp_path / "lab.json").read_bytes())["a"] == 1
    gc.collect()
    assert descriptors() == before


def test_a_loop_that_is_closed_with_open_calls(tmp_path: Path) -> None:
    """Open calls of a closed event loop are made once or not at all, and do not hinder the stop."""

    async def begin() -> Manager:
        owner, one = manager(tmp_path), manager(tmp_path)
        await owner.start()
        await one.start()
        owners.append(owner)
        for _ in range(10):
            tasks.append(asyncio.create_task(one.incr("n")))
            tasks.append(asyncio.create_task(one.update("u", lambda old: old + 1, 0)))
        tasks.append(asyncio.create_task(one.catch_up()))
        await asyncio.sleep(0)
        return one

    owners: list[Manager] = []
    tasks: list[asyncio.Task[object]] = []
    one = asyncio.run(begin())
    asyncio.run(owners[0].stop())
    asyncio.run(one.stop())
    content = json.loads((tmp_path / "lab.json").read_bytes())
    assert content.get("n", 0) in range(11)
    assert content.get("u", 0) in range(11)


async def test_a_task_that_other_code_cancels(tmp_path: Path) -> None:
    """If other code cancels the task of a member, each write raises an error that says so. A stop works as always."""
    async with members(tmp_path, 1) as (owner,):
        one = manager(tmp_path)
        await one.start()
        await one.set("a", 1)
        life = member_of(one)._life
        assert life is not None
        life.cancel()
        await asyncio.wait({life})
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="was cancelled; was stop"):
            await one.set("a", 2)
        assert await one.get("a") == 1
        await one.stop()
        assert owner.status().followers == 0


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_a_loop_that_runs_eager_tasks(tmp_path: Path) -> None:
    """On an event loop whose tasks begin at once, everything works as on another one."""
    asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 -- 3.11 has none
    async with members(tmp_path, 3) as (first, one, other):
        made = [each.incr("n") for each in (first, one, other) for _ in range(5)]
        made += [each.update("n", lambda old: old + 1, 0) for each in (first, one, other)]
        assert sorted(await asyncio.gather(*made)) == list(range(1, 19))
        await crash(first)
        assert await other.incr("n") == 19
        await bury(first)


def test_another_loop_that_runs(tmp_path: Path) -> None:
    """While the event loop of the start runs, a stop on another one is refused."""

    async def main() -> None:
        async with members(tmp_path, 1) as (one,):
            with pytest.raises(RuntimeError, match="belongs to the event loop"):
                await asyncio.to_thread(asyncio.run, one.stop())

    asyncio.run(main())


def test_two_managers_on_two_loops(tmp_path: Path) -> None:
    """Two managers of one process, in threads with event loops of their own, share the state."""

    async def work() -> None:
        async with manager(tmp_path) as one:
            await asyncio.to_thread(barrier.wait)
            for _ in range(50):
                await one.incr("n")
            await asyncio.to_thread(barrier.wait)
            await one.catch_up()
            assert await one.get("n") == 100
            await asyncio.to_thread(barrier.wait)

    barrier = threading.Barrier(2, timeout=30)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(asyncio.run, work()) for _ in range(2)]:
            done.result()


def test_an_application_that_is_loaded_again_and_again(tmp_path: Path) -> None:
    """A process can start and stop the state many times, each time on another event loop."""

    async def life(number: int) -> None:
        async with members(tmp_path, 2) as (_, one):
            assert await one.incr("n") == number

    for number in range(1, 6):
        asyncio.run(life(number))


@pytest.mark.parametrize("role", ["owner", "follower"])
def test_a_forgotten_manager(tmp_path: Path, role: str) -> None:
    """A manager that is collected while it runs shows a `ResourceWarning`. When its loop is closed, nothing stays locked."""
    before = descriptors()

    async def forgets() -> None:
        one, other = manager(tmp_path), manager(tmp_path)
        await one.start()
        if role == "follower":
            await other.start()
            await other.set("a", 1)
            del other
            gc.collect()
            await one.stop()
        else:
            await one.set("a", 1)
            del one
            gc.collect()

    with pytest.warns(ResourceWarning, match=r"was collected while it runs: .* started at .*test_member\.py:\d+, in"):
        asyncio.run(forgets())
    collect()
    assert descriptors() == before

    async def again() -> None:
        async with manager(tmp_path) as state:
            assert (state.role, await state.get("a")) == ("owner", 1)

    asyncio.run(again())


# Logs


async def test_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each start, takeover and stop is one line at level INFO."""
    caplog.set_level(logging.INFO, "lab_state")

    def lines() -> list[str]:
        found = [re.sub(r"\d\.\d{3} s", "S s", record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    first, one = manager(tmp_path), manager(tmp_path)
    await first.start()
    assert lines() == [f"lab: loaded revision 0 (keys: 0) from {tmp_path}/lab.json in S s: a new state"]
    await first.set("a", 1)
    await one.start()
    assert lines() == [f"lab: follows process {os.getpid()} at revision 1 (keys: 1), after S s"]
    await first.stop()
    await one.set("b", 1)
    assert sorted(lines()) == [
        "lab: stopped at revision 1, durable up to revision 1, in S s",
        "lab: this process owns the state now, at revision 1 (keys: 1), after S s",
    ]
    await one.stop()
    assert lines() == ["lab: stopped at revision 2, durable up to revision 2, in S s"]
