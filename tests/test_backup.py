"""`backup()`: the whole state of one moment in one file, while the manager runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from roles import InRole
from running import flusher_of, idle, running, until

from lab_state import (
    ClosedError,
    Config,
    FileStorage,
    Manager,
    MemoryStorage,
    StorageError,
    UnavailableError,
    UnsupportedError,
)
from lab_state._backup import Backups
from lab_state._codec import decode_snapshot
from lab_state.testing import FaultyStorage, ManualClock

NAME = "test"


async def restored(backup: Path, clock: ManualClock | None = None) -> tuple[dict[str, Any], int]:
    """Restore a backup as the documentation says. Return the values and the revision."""
    directory = backup.parent / f"restored-{backup.name}"
    directory.mkdir()
    shutil.copy(backup, directory / f"{NAME}.json")
    async with Manager(NAME, FileStorage(directory), clock=clock) as state:
        found = await state.get_all(), state.revision
    shutil.rmtree(directory)
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory for backups."""
    directory = tmp_path / "backups"
    directory.mkdir()
    return directory


async def test_a_backup_is_the_whole_state(in_role: InRole, place: Path, clock: ManualClock) -> None:
    """It has all values, the revision and the expiry times, as the owner, as a follower, and in a state that is not shared."""
    storage = MemoryStorage()
    async with running(storage, clock, make=in_role) as state:
        await state.set_many({"a": 1, "b": ["x", {"y": None}]})
        await state.set("short", 1, ttl=10)
        await state.set("long", 2, ttl=100)
        assert await state.backup(place / "b.json") == state.revision
        revision = state.revision
    assert names(place) == ["b.json"]
    assert (place / "b.json").stat().st_mode & 0o777 == 0o600
    clock.advance(20)
    assert json.loads((place / "b.json").read_bytes())["$lab_state"]["revision"] == revision
    assert (await restored(place / "b.json", clock))[0] == {"a": 1, "b": ["x", {"y": None}], "long": 2}


async def test_a_backup_of_an_empty_state_is_an_empty_state(memory: MemoryStorage, place: Path) -> None:
    """A state without any change has the revision 0."""
    async with Manager(NAME, memory) as state:
        assert await state.backup(place / "b.json") == 0
    assert await restored(place / "b.json") == ({}, 0)


async def test_everything_in_a_backup_is_committed(memory: MemoryStorage, clock: ManualClock, place: Path) -> None:
    """The call flushes, even if nothing else does."""
    async with running(memory, clock, flush_interval=None) as state:
        await state.set("a", 1)
        assert state.durable_revision == 0
        revision = await state.backup(place / "b.json")
        assert state.durable_revision == revision == 1


async def test_changes_that_cannot_be_committed_make_no_backup(
    storage: FaultyStorage, clock: ManualClock, place: Path
) -> None:
    """The error of the commit is raised, the older backup stays, and no temporary file is left."""
    async with running(storage, clock, flush_interval=None) as state:
        await state.set("a", 1)
        await state.backup(place / "b.json")
        before = (place / "b.json").read_bytes()
        await state.set("a", 2)
        storage.fail("commit")
        with pytest.raises(UnavailableError):
            await state.backup(place / "b.json")
        assert names(place) == ["b.json"]
        assert (place / "b.json").read_bytes() == before
        assert await state.backup(place / "b.json") == 2
    assert await restored(place / "b.json") == ({"a": 2}, 2)


async def test_a_backup_is_of_one_moment_while_writers_go_on(in_role: InRole, place: Path, clock: ManualClock) -> None:
    """Each of the backups has a state that there was, of a moment at or after the call."""
    seen: dict[int, int] = {}
    async with running(MemoryStorage(), clock, make=in_role) as state:
        await state.set_many({f"pad/{number}": "x" * 100 for number in range(3_000)})
        done = asyncio.Event()

        async def write() -> None:
            number = 0
            while not done.is_set():
                number += 1
                seen[await state.set_many({"first": number, "last": number})] = number
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        await until(lambda: seen)
        for turn in range(3):
            least = max(seen)
            revision = await state.backup(place / f"{turn}.json")
            assert revision >= least
        done.set()
        await writing
        for turn in range(3):
            values, revision = await restored(place / f"{turn}.json")
            assert (values["first"], values["last"]) == (seen[revision], seen[revision])
            assert len(values) == 3_002


async def test_a_backup_replaces_an_older_one_and_keeps_its_mode(memory: MemoryStorage, place: Path) -> None:
    """A backup that others may read can still be read by them."""
    path = place / "b.json"
    async with Manager(NAME, memory) as state:
        await state.set("a", 1)
        await state.backup(path)
        path.chmod(0o640)
        await state.set("a", 2)
        await state.backup(os.fspath(path))
    assert path.stat().st_mode & 0o777 == 0o640
    assert await restored(path) == ({"a": 2}, 2)


async def test_a_relative_path_begins_in_the_current_directory(
    memory: MemoryStorage, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name alone is enough."""
    monkeypatch.chdir(place)
    async with Manager(NAME, memory) as state:
        await state.backup("b.json")
    assert names(place) == ["b.json"]


async def test_a_backup_has_no_change_of_an_open_transaction(memory: MemoryStorage, place: Path) -> None:
    """It may be made inside the block, and does not wait for its end."""
    async with Manager(NAME, memory) as state:
        await state.set("a", 1)
        async with state.transaction() as tx:
            tx.set("a", 2)
            revision = await state.backup(place / "b.json")
    assert await restored(place / "b.json") == ({"a": 1}, revision)


async def test_two_backups_at_once_are_both_whole(storage: FaultyStorage, clock: ManualClock, place: Path) -> None:
    """The second one waits until the view of the first one is closed."""
    async with running(storage, clock, flush_interval=None) as state:
        await state.set_many({f"{number}": number for number in range(500)})
        storage.hang("commit")
        first = asyncio.create_task(state.backup(place / "1.json"))
        await until(lambda: state._core.state.frozen)
        second = asyncio.create_task(state.backup(place / "2.json"))
        await until(lambda: len(names(place)) == 2)
        await idle()
        storage.resume()
        assert (await first, await second) == (1, 1)
        assert isinstance(state._core.state.entries, dict)
    for name in ("1.json", "2.json"):
        assert len((await restored(place / name))[0]) == 500


async def test_a_backup_can_be_cancelled_at_any_time(memory: MemoryStorage, place: Path) -> None:
    """The path has the older backup or the new one. No temporary file is left, and no view."""
    path = place / "b.json"
    async with Manager(Config(NAME, flush_interval=None), memory) as state:
        await state.set_many({f"{number}": "x" * 1000 for number in range(500)})
        revision = await state.backup(path)
        turns, ended = 0, False
        while not ended:
            await state.set("a", turns)
            backup = asyncio.create_task(state.backup(path))
            for _ in range(turns):
                await asyncio.sleep(0)
            backup.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await backup
                ended = True
            await until(lambda: names(place) == ["b.json"] and not state._core.state.frozen)
            found = decode_snapshot(path.read_bytes(), "b.json").revision
            assert found in (revision, state.revision)
            revision, turns = found, turns + 1 + turns // 4
        assert revision == state.revision


async def test_a_backup_and_a_checkpoint_wait_for_each_other(
    storage: FaultyStorage, clock: ManualClock, place: Path
) -> None:
    """A state has at most one view at a time. The checkpoint that waited begins after the backup."""
    async with running(storage, clock, flush_interval=None) as state:
        await state.set("a", "x" * 100_000)
        storage.hang("checkpoint")
        await state.flush()  # the journal is large: a checkpoint begins
        checkpoints = flusher_of(state).checkpoints
        await until(lambda: checkpoints.is_running)
        backup = asyncio.create_task(state.backup(place / "b.json"))
        await idle()
        storage.resume()
        assert await backup == 1
        assert not checkpoints.is_running

        storage.hang("commit")
        await state.set("b", "y" * 200_000)
        backup = asyncio.create_task(state.backup(place / "b.json"))
        await until(lambda: state._core.state.frozen)
        checkpoints.due = True
        flusher_of(state).checkpoint_if_due()
        assert not checkpoints.is_running
        assert checkpoints.due
        storage.resume()
        assert await backup == 2
        await until(lambda: not checkpoints.due and not checkpoints.is_running)
        assert checkpoints.records == 0


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        (b"b.json", TypeError, "must be a str, not bytes"),
        (3, TypeError, "int"),
        (None, TypeError, "None"),
        ("", ValueError, "the path of a backup is empty"),
        ("~/b.json", ValueError, "expanduser"),
        ("a\0b", ValueError, "NUL"),
        ("\ud800.json", ValueError, "encoding of file names"),
        ("no/such/place/b.json", UnsupportedError, "there is no directory .*/no/such/place: create it"),
        ("full/b.json", UnsupportedError, "a part of the path is a file"),
        ("directory", UnsupportedError, "is a directory: add the name of a file"),
        ("directory/", UnsupportedError, "is a directory: add the name of a file"),
        ("socket", UnsupportedError, "is not a file"),
        ("link", UnsupportedError, "is a symbolic link"),
        ("dangling", UnsupportedError, "is a symbolic link"),
        ("x" * 300, UnsupportedError, "too long"),
    ],
)
async def test_a_bad_path_is_refused(
    memory: MemoryStorage,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    path: Any,
    error: type[Exception],
    text: str,
) -> None:
    """Nothing is written, and the message says what to do."""
    monkeypatch.chdir(place)
    Path("full").touch()
    Path("directory").mkdir()
    Path("link").symlink_to("full")
    Path("dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        before = names(place)
        async with Manager(NAME, memory) as state:
            with pytest.raises(error, match=text):
                await state.backup(path)
    assert names(place) == before


@pytest.mark.parametrize(
    "name",
    [
        "test.json",
        "test.journal",
        "test.lock",
        "test.sock",
        "test.history",
        "test.json.01234567.tmp",
        "test.json.replaced-1",
    ],
)
@pytest.mark.parametrize("shared", [False, True])
async def test_the_files_of_a_state_are_refused(tmp_path: Path, *, name: str, shared: bool) -> None:
    """The path may lead there through a link to the directory. Other names in the directory of the state are accepted."""
    directory, link = tmp_path / "state", tmp_path / "link"
    link.symlink_to(directory)
    async with Manager(Config(NAME, shared=shared), FileStorage(directory)) as state:
        await state.set("a", 1)
        await state.flush()
        for path in (directory / name, link / name):
            with pytest.raises(UnsupportedError, match="a file of the state 'test'"):
                await state.backup(path)
        await state.backup(directory / "test.json.bak")
        await state.backup(directory / "other.json")
    assert await restored(directory / "other.json") == ({"a": 1}, 1)
    async with Manager(NAME, FileStorage(directory)) as state:
        assert await state.get_all() == {"a": 1}


async def test_a_file_of_a_history_is_refused(tmp_path: Path) -> None:
    """A backup there would replace a generation. Other names in a directory with such a name are accepted."""
    async with Manager(NAME, FileStorage(tmp_path, history=3600)) as state:
        await state.set("a", 1)
    (kept,) = (tmp_path / "test.history").iterdir()
    (tmp_path / "other").mkdir()
    async with Manager(NAME, FileStorage(tmp_path, history=3600)) as state:
        with pytest.raises(UnsupportedError, match="a name for a file in the history of a state"):
            await state.backup(kept)
        await state.backup(tmp_path / "other" / kept.name)
        await state.backup(tmp_path / "test.history" / "mine")


@pytest.mark.parametrize("shared", [False, True])
async def test_a_hard_link_to_a_file_of_the_state_is_refused(tmp_path: Path, place: Path, *, shared: bool) -> None:
    """The owner of a state and a follower know the files. A hard link to another file is accepted."""
    directory = tmp_path / "state"
    config = Config(NAME, shared=shared)
    async with Manager(config, FileStorage(directory)) as owner:
        await owner.set("a", 1)
        await owner.flush()
        os.link(directory / "test.journal", place / "linked")
        os.link(directory / "test.lock", place / "other")
        async with contextlib.AsyncExitStack() as stack:
            states = [owner]
            if shared:
                states.append(await stack.enter_async_context(Manager(config, FileStorage(directory))))
            for state in states:
                for name in ("linked", "other"):
                    with pytest.raises(UnsupportedError, match="is a hard link to"):
                        await state.backup(place / name)
        (place / "mine").write_bytes(b"1")
        os.link(place / "mine", place / "also")
        await owner.backup(place / "mine")
    assert (place / "also").read_bytes() == b"1"


async def test_a_manager_that_does_not_run_makes_no_backup(memory: MemoryStorage, place: Path) -> None:
    """Before the start and after the stop."""
    state = Manager(NAME, memory)
    with pytest.raises(ClosedError):
        await state.backup(place / "b.json")
    async with state:
        pass
    with pytest.raises(ClosedError):
        await state.backup(place / "b.json")
    assert names(place) == []


async def test_another_event_loop_makes_no_backup(memory: MemoryStorage, place: Path) -> None:
    """The call belongs on the event loop of the manager."""
    async with Manager(NAME, memory) as state:
        with pytest.raises(RuntimeError, match="event loop"):
            await asyncio.to_thread(asyncio.run, state.backup(place / "b.json"))
    assert names(place) == []


async def test_a_cancelled_backup_leaves_nothing(storage: FaultyStorage, clock: ManualClock, place: Path) -> None:
    """The older backup stays, the view is closed, and the next backup succeeds."""
    async with running(storage, clock, flush_interval=None) as state:
        await state.set("a", 1)
        await state.backup(place / "b.json")
        before = (place / "b.json").read_bytes()
        storage.hang("commit")
        await state.set("a", 2)
        backup = asyncio.create_task(state.backup(place / "b.json"))
        await until(lambda: state._core.state.frozen and len(names(place)) == 2)
        backup.cancel()
        with pytest.raises(asyncio.CancelledError):
            await backup
        await until(lambda: len(names(place)) == 1 and not state._core.state.frozen)
        assert (place / "b.json").read_bytes() == before
        storage.resume()
        assert await state.backup(place / "b.json") == 2


@pytest.mark.parametrize("early", [False, True])
async def test_a_stop_ends_a_backup(storage: FaultyStorage, clock: ManualClock, place: Path, *, early: bool) -> None:
    """The backup raises an error, and the stop writes its checkpoint without a copy of the state."""
    async with running(storage, clock, flush_interval=None) as state:
        await state.set("a", 1)
        await state.flush()
        storage.hang("commit")
        await state.set("a", 2)
        backup = asyncio.create_task(state.backup(place / "b.json"))
        if not early:
            await until(lambda: state._core.state.frozen)
        else:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(state.stop())
        with pytest.raises(ClosedError, match="stopped during this backup"):
            await backup
        storage.resume()
        await stopping
    await until(lambda: not names(place))
    async with running(storage, clock) as state:
        assert await state.get_all() == {"a": 2}


async def test_the_end_of_another_event_loop_is_not_waited_for() -> None:
    """A loop that was closed during a backup does not make the stop on the next loop hang."""
    backups = Backups()

    async def never() -> int:
        await asyncio.Event().wait()
        return 0

    def begin() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        task = loop.create_task(backups.run("test", never()))
        loop.run_until_complete(asyncio.sleep(0))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        for inner in backups._tasks:
            inner._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        return loop

    await asyncio.to_thread(begin)
    await backups.end()


async def test_a_backup_of_a_shared_state_has_no_results_of_calls(tmp_path: Path, place: Path) -> None:
    """No process has sent a call to the state that is restored from it."""
    config = Config(NAME, shared=True)
    storage = FileStorage(tmp_path / "state")
    async with Manager(config, storage) as owner, Manager(config, storage) as follower:
        await follower.set("a", 1)
        assert owner._core.state.results is not None
        for state in (owner, follower):
            await state.backup(place / "b.json")
            assert "calls" not in json.loads((place / "b.json").read_bytes())["$lab_state"]


async def test_a_follower_has_the_changes_of_all_processes(tmp_path: Path, place: Path) -> None:
    """A change that another process has made before the call is in the backup."""
    config = Config(NAME, shared=True)
    storage = FileStorage(tmp_path / "state")
    async with Manager(config, storage) as owner, Manager(config, storage) as follower:
        for number in range(20):
            revision = await owner.set("a", number)
            assert await follower.backup(place / "b.json") >= revision
    assert await restored(place / "b.json") == ({"a": 19}, revision)


async def test_a_storage_error_names_the_file(memory: MemoryStorage, place: Path) -> None:
    """A directory in which no file can be made is refused with the reason."""
    async with Manager(NAME, memory) as state:
        with pytest.raises(StorageError, match="/proc/"):
            await state.backup("/proc/b.json")
