"""`Member`: processes of a shared state start, follow, take over and stop."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
from members import NAME, crash, manager, member_of, members, owner_of
from running import until

from lab_state import Manager

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
