"""The planned end of an owner: the journal says that everything is durable, and the last process writes the snapshot."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from file_tools import Disk, kinds
from members import NAME, crash, manager, members, owner_of
from running import until

from lab_state import Config, FileStorage, Manager, StorageError, read_state
from lab_state.shared._found import Settling
from lab_state.shared._server import Server
from lab_state.storage import _fs
from lab_state.storage.file import FileSession


def plain(directory: Path) -> dict[str, Any]:
    """Return the entries of the snapshot, without those of the journal."""
    values: dict[str, Any] = json.loads((directory / f"{NAME}.json").read_bytes())
    del values["$lab_state"]
    return values


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    replaced = Disk()
    monkeypatch.setattr(_fs, "os", replaced)
    return replaced


async def test_the_journal_goes_on(tmp_path: Path) -> None:
    """The owner ends its journal and writes no snapshot. The next owner continues this journal. The last one writes the snapshot."""
    async with members(tmp_path, 2) as (first, one):
        await first.set("a", 1)
        await first.stop()
        assert kinds(tmp_path) == "RE"
        assert not (tmp_path / f"{NAME}.json").exists()
        journal = (tmp_path / f"{NAME}.journal").stat().st_ino
        await one.set("b", 2)
        assert one.role == "owner"
        assert kinds(tmp_path) == "RR"
        assert (tmp_path / f"{NAME}.journal").stat().st_ino == journal
    assert kinds(tmp_path) == ""
    assert plain(tmp_path) == {"a": 1, "b": 2}


async def test_nothing_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a planned end, everything that the next owner finds is durable. It writes nothing before its first change."""
    monkeypatch.setattr(Settling, "slices", None)
    async with members(tmp_path, 3) as (first, one, other):
        await first.set("a", 1)
        await first.stop()
        await until(lambda: "owner" in {one.role, other.role})
        assert kinds(tmp_path) == "RE"
        async with manager(tmp_path) as late:
            assert late.role == "follower"
            assert await late.get("a") == 1
        owner, following = (one, other) if one.role == "owner" else (other, one)
        await until(lambda: owner.status().followers == 1)
        await owner.stop()
        assert kinds(tmp_path) == "RE"  # it was there already
        assert await following.set("b", 2) == 2
    assert plain(tmp_path) == {"a": 1, "b": 2}


async def test_a_journal_that_ends_is_read(tmp_path: Path) -> None:
    """A reading beside the files, and a start of a state that is not shared, understand the end of the journal."""
    async with members(tmp_path, 2) as (first, one):
        await first.set_many({"a": 1, "b": 2})
        await first.stop()
        await until(lambda: one.role == "owner")
        view = await read_state(NAME, FileStorage(tmp_path))
        assert (view.revision, await view.get_all()) == (1, {"a": 1, "b": 2})
        await crash(one)
        async with Manager(Config(NAME, flush_interval=0), FileStorage(tmp_path)) as alone:
            assert alone.durable_revision == 1
            await alone.set("c", 3)
            assert kinds(tmp_path) == "RR"
        assert plain(tmp_path) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
async def test_all_stop_at_once(tmp_path: Path, count: int) -> None:
    """If all processes stop at once, the last one writes the snapshot, whichever it is."""
    started = [manager(tmp_path) for _ in range(count)]
    for one in started:
        await one.start()
    await asyncio.gather(*(one.set(f"{number}", number) for number, one in enumerate(started)))
    await asyncio.gather(*(one.stop() for one in started))
    assert plain(tmp_path) == {f"{number}": number for number in range(count)}
    assert kinds(tmp_path) == ""


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_the_next_owner_does_not_read_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The next owner has a copy, so it reads only the end of the snapshot, which shows that the journal follows it."""
    async with members(tmp_path, 1) as (alone,):
        await alone.set("a", 1)
    async with members(tmp_path, 2) as (first, one):
        await first.set("b", 2)
        monkeypatch.setattr(FileSession, "whole", None)
        await (first.stop() if end == "stop" else crash(first))
        assert await one.set("c", 3) == 3
        assert one.role == "owner"
        assert kinds(tmp_path) == ("RR" if end == "stop" else "RRR")
        assert await one.get_all() == {"a": 1, "b": 2, "c": 3}
        monkeypatch.undo()
    assert plain(tmp_path) == {"a": 1, "b": 2, "c": 3}


async def test_followers_that_leave_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the last follower leaves while the journal is ended, the owner writes the snapshot after all."""
    entered, opened, real = asyncio.Event(), asyncio.Event(), FileSession.hand_over

    async def hand_over(session: FileSession) -> bool:
        handed = await real(session)
        entered.set()
        await opened.wait()
        return handed

    monkeypatch.setattr(FileSession, "hand_over", hand_over)
    async with members(tmp_path, 2) as (first, one):
        await first.set("a", 1)
        ending = asyncio.create_task(first.stop())
        await entered.wait()
        assert kinds(tmp_path) == "RE"
        await one.stop()
        opened.set()
        await ending
        assert kinds(tmp_path) == ""
        assert plain(tmp_path) == {"a": 1}


async def test_a_follower_that_stops_too_late_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no owner confirms the farewell of a follower, this follower becomes the owner, and writes the snapshot."""
    real = Server.aclose

    async def aclose(server: Server, seconds: float = 1.0) -> None:
        leaving.append(asyncio.create_task(one.stop()))
        await real(server, seconds)

    leaving: list[asyncio.Task[None]] = []
    async with members(tmp_path, 2) as (first, one):
        await first.set("a", 1)
        with monkeypatch.context() as patch:
            patch.setattr(Server, "aclose", aclose)
            await first.stop()
        assert kinds(tmp_path) == "RE"
        await asyncio.gather(*leaving)
        assert kinds(tmp_path) == ""
        assert plain(tmp_path) == {"a": 1}


async def test_a_checkpoint_under_way_ends_first(tmp_path: Path, disk: Disk) -> None:
    """An owner that stops lets its checkpoint end before it refuses calls. So the calls of the followers do not wait for the checkpoint."""
    async with members(tmp_path, 2) as (first, one):
        await first.set("a", 1)
        flusher = owner_of(first).flusher
        assert flusher is not None
        gate = disk.hold("fsync", f"{NAME}.json.tmp")
        flusher.checkpoints.start()
        await gate.entered()
        ending = asyncio.create_task(first.stop())
        assert await one.set("b", 2) == 2
        assert one.role == "follower"
        gate.open()
        await ending
        assert plain(tmp_path) == {"a": 1}
        assert kinds(tmp_path) == "RE"
    assert plain(tmp_path) == {"a": 1, "b": 2}


async def test_a_journal_that_starts_with_the_whole_state(tmp_path: Path, disk: Disk) -> None:
    """If the journal starts with the whole state, the owner writes a checkpoint, which is due anyway."""
    async with members(tmp_path, 2) as (first, _):
        disk.fail("fdatasync", f"{NAME}.journal")
        await first.set("a", 0)
        with pytest.raises(StorageError):
            await first.set("a", 1)
        disk.fail("open", f"{NAME}.json.tmp", errno.ENOSPC)  # the checkpoint that follows
        await first.set("a", 2)
        await until(lambda: first.status().last_error is not None)
        assert kinds(tmp_path) == "F"
        await first.stop()
        assert kinds(tmp_path) == ""
        assert plain(tmp_path) == {"a": 2}


@pytest.mark.parametrize("function", ["pwrite", "fdatasync"])
async def test_the_end_cannot_be_written(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    """If the end of the journal cannot be written, the owner still stops, and the next owner settles the state."""
    caplog.set_level(logging.WARNING, "lab_state")
    async with members(tmp_path, 2) as (first, one):
        await first.set("a", 1)
        disk.fail(function, f"{NAME}.journal")
        await first.stop()
        assert (
            "cannot note in the journal that everything is durable, so the next owner writes a new journal: "
            in caplog.text
        )
        assert await one.set("b", 2) == 2
        assert one.role == "owner"
    assert plain(tmp_path) == {"a": 1, "b": 2}
