"""Processes of a shared state that are killed or stopped by signals, at every point of a call."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from members import RemoteError, manager, members, processes
from running import until

from lab_state import UnavailableError
from lab_state import _loading as loading
from lab_state.shared import _follower

DIE = """
import lab_state.shared._engine, lab_state.shared._connection, lab_state.storage._fs, lab_state.storage._file_writer
def dies(owner, name, after):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, call)
"""

POINTS = {
    "before the call is applied": "dies(lab_state.shared._engine.Engine, 'call', False)",
    "after it is applied": "dies(lab_state.shared._engine.Engine, 'call', True)",
    "before the write": "dies(lab_state.storage._fs, '_write', False)",
    "after the write": "dies(lab_state.storage._fs, '_sync_data', False)",
    "after the sync": "dies(lab_state.storage._fs, '_sync_data', True)",
    "before the copy has it": "dies(lab_state.shared._engine.Engine, 'landed', False)",
    "after the record is queued": "dies(lab_state.shared._connection.Connection, 'answers', False)",
    "after the answer is queued": "dies(lab_state.shared._connection.Connection, 'answers', True)",
    "in the middle of a checkpoint": """dies(lab_state.storage._file_writer.Writer, 'publish', False)
async def writes():
    await state.set("large", "x" * 5_000_000)
asyncio.get_running_loop().writes = asyncio.create_task(writes())""",
}


@pytest.mark.parametrize("point", POINTS)
async def test_an_owner_that_is_killed_during_a_call(tmp_path: Path, point: str) -> None:
    """Wherever the owner is killed, the call of a follower is made once, and returns the result of that."""
    async with processes(tmp_path) as (owner,):
        assert await owner.start() == "owner"
        async with members(tmp_path, 2) as (one, other):
            assert await one.incr("n", 5) == 5
            await owner.do(DIE + POINTS[point])
            made = await asyncio.gather(one.incr("n"), other.incr("n"), one.update("u", lambda old: old + 1, 0))
            assert sorted(made[:2]) == [6, 7]
            assert made[2] == 1
            assert await owner.ended() == -signal.SIGKILL
            await until(lambda: {one.role, other.role} == {"owner", "follower"})
            for each in (one, other):
                await each.catch_up()
                assert {key: await each.get(key) for key in ("n", "u")} == {"n": 7, "u": 1}
    content = json.loads((tmp_path / "lab.json").read_bytes())
    assert (content["n"], content["u"]) == (7, 1)


FAILS = """
import lab_state.storage._file_writer
def fails(*args):
    raise lab_state.UnavailableError("the disk fails")
lab_state.storage._file_writer.Writer.commit = fails
"""


async def test_a_commit_fails_and_the_owner_is_killed(tmp_path: Path) -> None:
    """A call whose commit failed raises the error of the owner's own callers. The next owner has lost it, or has it once."""
    async with processes(tmp_path) as (owner,):
        await owner.start()
        async with members(tmp_path, 1) as (one,):
            await one.set("a", 1)
            await owner.do(FAILS)
            with pytest.raises(UnavailableError, match="the disk fails"):
                await one.incr("n")
            await owner.kill()
            await one.catch_up()
            assert one.role == "owner"
            assert await one.get_all() == {"a": 1}
            assert await one.incr("n") == 1


@pytest.mark.parametrize("point", ["idle", "in the middle of a checkpoint"])
async def test_an_owner_that_is_killed_while_a_follower_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """What a process has read when the owner dies is dropped. The process becomes the owner, and loads what is durable."""
    async with processes(tmp_path) as (owner,):
        await owner.start()
        await owner.do("await state.set('a', 1)")
        begun, gate = asyncio.Event(), asyncio.Event()

        async def load(*args: Any) -> Any:
            found = await loading.load(*args)
            begun.set()
            await gate.wait()
            return found

        monkeypatch.setattr(_follower, "load", load)
        one = manager(tmp_path)
        start = asyncio.create_task(one.start())
        await begun.wait()
        await owner.do("await state.set('b', 2)")
        if point == "idle":
            await owner.kill()
        else:
            await owner.do(DIE + POINTS[point])
            assert await owner.ended() == -signal.SIGKILL
        await start
        assert one.role == "owner"
        assert await one.get_many(["a", "b"]) == {"a": 1, "b": 2}
        await one.stop()


async def test_owners_that_are_killed_in_a_row(tmp_path: Path) -> None:
    """Each newest owner is killed at once. No completed write is lost, and none is made twice."""
    async with processes(tmp_path, 4) as others:
        for process in others:
            await process.start()
        async with members(tmp_path, 1) as (last,):
            waiting = list(others)
            done = 0
            while waiting:
                made = asyncio.gather(*(last.incr("n") for _ in range(20)))
                roles = {process: await process.do("return state.role") for process in waiting}
                owner = next((process for process, role in roles.items() if role == "owner"), None)
                if owner is not None:
                    await owner.kill()
                    waiting.remove(owner)
                assert sorted(await made) == list(range(done + 1, done + 21))
                done += 20
                if last.role == "owner":
                    break
            assert await last.get("n") == done
            for process in waiting:
                assert await process.do("await state.catch_up()\nreturn await state.get('n')") == done


async def test_a_start_while_the_owner_is_killed(tmp_path: Path) -> None:
    """A process without a copy, and followers with one, race for the lock of a dead owner. All of them go on."""
    async with processes(tmp_path, 2) as (owner, new):
        await owner.start()
        async with members(tmp_path, 2) as (one, other):
            await one.set("a", 1)
            owner.signal(signal.SIGKILL)
            role, _ = await asyncio.gather(new.start(), other.set("b", 2))
            assert sorted([role, str(one.role), str(other.role)]) == ["follower", "follower", "owner"]
            assert await new.do("await state.catch_up()\nreturn await state.get_all()") == {"a": 1, "b": 2}


async def test_a_follower_that_is_killed_with_open_calls(tmp_path: Path) -> None:
    """The calls of a follower that is killed are made, or not made. The others go on."""
    async with members(tmp_path, 1) as (owner,), processes(tmp_path) as (other,):
        await other.start()
        await other.do("await state.incr('n')\nfor _ in range(100): asyncio.create_task(state.incr('n'))")
        await other.kill()
        await until(lambda: owner.status().followers == 0)
        # Calls of the follower that have arrived are in the queue of the owner, and are made before this one.
        count = await owner.incr("n")
        assert 2 <= count <= 102
        assert await owner.incr("n") == count + 1


# Signals that stop a process for a while


async def test_an_owner_that_hangs(tmp_path: Path) -> None:
    """While the owner is stopped, calls raise an error after `owner_timeout`, and name it. Reads go on. Then all works again."""
    async with processes(tmp_path) as (owner,):
        await owner.start()
        one, late = manager(tmp_path, owner_timeout=0.5), manager(tmp_path, owner_timeout=0.5)
        async with one:
            await one.set("a", 1)
            owner.signal(signal.SIGSTOP)
            with pytest.raises(
                UnavailableError, match=rf"the process {owner.pid}, which owns the state,.* once, or not"
            ) as info:
                await one.set("a", 2)
            assert info.value.outcome == "unknown"
            with pytest.raises(UnavailableError, match=str(owner.pid)):
                await one.catch_up()
            assert await one.get("a") == 1
            assert one.status().lag > 0.4
            assert one.status().owner_pid == owner.pid
            with pytest.raises(UnavailableError, match=rf"pid {owner.pid}\) gave no sign of life.*it may hang"):
                await late.start()
            owner.signal(signal.SIGCONT)
            assert await one.set("a", 3) > 1
            async with late:
                assert await late.get("a") == 3


FORGETS = "import lab_state.shared._clients as clients\nclients.FORGOTTEN_AFTER = 300_000_000"


async def test_a_follower_that_was_stopped_for_too_long(tmp_path: Path) -> None:
    """The owner forgets a follower that is away for a minute. Its call that was sent has an unknown outcome, and later calls work."""
    async with processes(tmp_path, 2, owner_timeout=60) as (owner, one):
        await owner.start()
        await owner.do(FORGETS)
        await one.start()
        await one.do(FORGETS)
        await one.do("import lab_state.shared._link as link\nlink.LIFE = 1e9")
        made = await one.do("await state.incr('n')\nreturn state.role")
        assert made == "follower"
        await owner.do(
            "import lab_state.shared._engine as engine\nengine.Engine.call = lambda *args: None"
        )  # it never answers
        calling = one.begin("return await state.incr('n')")
        await owner.do("owner = state._running._owner\nwhile not owner.server.followers: await asyncio.sleep(0)")
        await one.do("return 1")  # the call was sent
        one.signal(signal.SIGSTOP)
        await owner.do(
            "owner = state._running._owner\nfor connection in list(owner.server._connections): connection.close()\n"
            "await asyncio.sleep(0.4)\nowner.flusher.engine.forget_gone()"
        )
        one.signal(signal.SIGCONT)
        with pytest.raises(RemoteError) as info:
            await calling
        assert (info.value.kind, info.value.outcome) == ("UnavailableError", "unknown")
        assert "has forgotten this process" in info.value.text
        await owner.kill()
        assert await one.do("return await state.incr('n')") == 2


async def test_a_follower_whose_loop_is_blocked(tmp_path: Path) -> None:
    """A follower whose event loop was blocked for longer than `owner_timeout` does not take that for a silence of the owner."""
    async with members(tmp_path, 1) as (owner,), processes(tmp_path, owner_timeout=0.5) as (one,):
        await one.start()
        source = "import time\ncall = asyncio.create_task(state.incr('n'))\nawait asyncio.sleep(0)\ntime.sleep(1)\nreturn await call"
        assert await one.do(source) == 1
        assert await owner.get("n") == 1


async def test_a_follower_that_reads_slowly(tmp_path: Path) -> None:
    """The owner cuts off a follower that lets more than 64 MiB wait. It loads the state when it goes on."""
    async with members(tmp_path, 1) as (owner,), processes(tmp_path) as (one,):
        await one.start()
        one.signal(signal.SIGSTOP)
        for number in range(10):
            await owner.set(f"large {number % 2}", "x" * 10_000_000)
        assert owner.status().followers == 0
        one.signal(signal.SIGCONT)
        assert await one.do("await state.catch_up()\nreturn state.revision") == 10
        assert await one.do("return await state.incr('n')") == 1


# Forks


FORK = """
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, b"1")
    signal.pause()
os.read(reading, 1)
return child
"""


async def test_a_forked_child_outlives_a_killed_owner(tmp_path: Path) -> None:
    """A child keeps neither the lock nor the connections of its parent, so a follower takes over at once."""
    async with processes(tmp_path) as (owner,):
        await owner.start()
        async with members(tmp_path, 1) as (one,):
            child = await owner.do(FORK)
            try:
                owner.signal(signal.SIGKILL)
                assert await one.incr("n") == 1
                assert one.role == "owner"
            finally:
                os.kill(child, signal.SIGKILL)


async def test_a_forked_child_of_a_follower(tmp_path: Path) -> None:
    """A child of a follower has no connection. In the child, each call of the inherited manager is refused."""
    fork = (
        FORK.replace('os.write(writing, b"1")', "os.write(writing, refused().encode())")
        .replace("os.read(reading, 1)", "told = os.read(reading, 1000).decode()")
        .replace("return child", "return child, told")
    )
    refused = """
def refused():
    answers = []
    for call in (state.set("a", 1), state.catch_up(), state.stop()):
        try:
            call.send(None)
        except BaseException as error:
            answers.append(type(error).__name__)
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    return f"{answers} {state.role} {sum('lab.' in link for link in links)}"
"""
    async with members(tmp_path, 1) as (owner,), processes(tmp_path) as (one,):
        await one.start()
        child, told = await one.do(refused + fork)
        try:
            assert told == "['UnsupportedError', 'UnsupportedError', 'UnsupportedError'] None 0"
            one.signal(signal.SIGKILL)
            await until(lambda: owner.status().followers == 0)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_all_processes_end_at_once(tmp_path: Path) -> None:
    """When all processes stop at the same time, none of them hangs, and the last one writes the plain JSON file."""
    async with processes(tmp_path, 4) as workers:
        await asyncio.gather(*(worker.start() for worker in workers))
        await asyncio.gather(*(worker.do("await state.incr('n')") for worker in workers))
        await asyncio.gather(*(worker.do("await state.stop()") for worker in workers))
    content = json.loads((tmp_path / "lab.json").read_bytes())
    assert content["n"] == 4
    assert (tmp_path / "lab.journal").stat().st_size < 200
