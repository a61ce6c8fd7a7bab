"""Expiries that watches of followers report: the owner deletes a key when it expires, as long as any process has a watch."""

from __future__ import annotations

from pathlib import Path

from members import apart, bury, crash, cut, member_of, members, owner_of
from running import idle, until

from lab_state.testing import ManualClock


async def test_a_follower_hears_of_an_expiry_at_its_time(tmp_path: Path, clock: ManualClock) -> None:
    """It is told 50 ms after the time at the latest, and not before it, as in the owner."""
    async with members(tmp_path, 3, clock=clock) as (owner, follower, _):
        async with follower.watch() as changes, owner.watch() as own:
            await until(lambda: owner_of(owner).server.is_watched)
            await owner.set("a", 1, ttl=1.5)
            assert [(await anext(one)).kind for one in (changes, own)] == ["set"] * 2
            clock.advance(1.499)
            await idle()
            assert await follower.get("a") == 1
            clock.advance(0.051)
            assert [(await anext(one)).kind for one in (changes, own)] == ["expire"] * 2
        await until(lambda: not owner_of(owner).server.is_watched)
        assert not owner_of(owner)._is_watched


async def test_the_last_watch_of_all_processes(tmp_path: Path) -> None:
    """Without a watch, expired keys are deleted once a second. A connection that ends takes its watches with it."""
    async with members(tmp_path, 3) as (owner, follower, other):
        process = owner_of(owner)
        async with other.watch("a"):
            async with follower.watch("b"):
                await until(lambda: process.server.is_watched)
                assert process._is_watched
            assert process._is_watched
            cut(owner)
            assert not process._is_watched
            await until(lambda: process.server.is_watched)
            assert process._is_watched
        await until(lambda: not process._is_watched)
        async with owner.watch():
            assert process._is_watched
        assert not process._is_watched


async def test_a_watch_without_an_owner(tmp_path: Path) -> None:
    """A watch that is opened while a process has no owner is told to the next one. One that is closed by then is not."""
    async with members(tmp_path, 2) as (owner, follower):
        async with apart(owner):
            await until(lambda: member_of(follower)._follower is None)
            async with follower.watch():
                pass
        await follower.catch_up()
        assert not owner_of(owner)._is_watched


async def test_the_next_owner_knows_the_watches(tmp_path: Path) -> None:
    """A follower with a watch tells each owner of it."""
    async with members(tmp_path, 3) as (owner, follower, other):
        async with follower.watch(), other.watch():
            await crash(owner)
            await until(lambda: "owner" in {follower.role, other.role})
            new = owner_of(follower if follower.role == "owner" else other)
            assert new._is_watched
            await until(lambda: new.server.is_watched)
        await bury(owner)
