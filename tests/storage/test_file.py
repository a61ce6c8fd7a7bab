"""`FileStorage`: its files, what it refuses to open, and its threads."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from file_tools import (
    DUE,
    MIB,
    SERVED,
    Disk,
    contents,
    found,
    kinds,
    manager,
    mode,
    plain,
    run_child,
    until,
)

from lab_state import (
    Config,
    CorruptionError,
    FileStorage,
    Manager,
    UnavailableError,
    UnsupportedError,
)
from lab_state.storage import _fs, _lookup

# The files


async def test_modes_and_nested_directories(tmp_path: Path, disk: Disk) -> None:
    """Directories are made for this user alone and synced into their parents, and every file is private."""
    directory = tmp_path / "a" / "b"
    state = manager(directory)
    await state.start()
    await state.set("key", 1)
    await state.flush()
    files = ["lab.journal", "lab.lock"]
    assert {path.name: mode(path) for path in directory.iterdir()} == dict.fromkeys(files, 0o600)
    await state.stop()
    files.append("lab.json")
    assert {path.name: mode(path) for path in directory.iterdir()} == dict.fromkeys(files, 0o600)
    assert (mode(tmp_path / "a"), mode(directory)) == (0o700, 0o700)
    assert synced(disk)[:2] == [str(tmp_path), str(tmp_path / "a")]


def synced(disk: Disk) -> list[str]:
    return [call.path for call in disk.calls if call.function == "fsync"]


async def test_a_directory_whose_sync_failed_is_made_again(tmp_path: Path, disk: Disk) -> None:
    """A directory whose sync failed is removed.

    A second sync would succeed although the name may never reach the disk.
    """
    directory = tmp_path / "a" / "b"
    disk.fail("fsync", "above", skip=1)
    state = manager(directory)
    with pytest.raises(UnavailableError, match="making the directory"):
        await state.start()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    disk.calls.clear()
    async with state:
        assert synced(disk)[0] == str(tmp_path / "a")


async def test_a_directory_that_a_dead_process_made(tmp_path: Path, disk: Disk) -> None:
    """A process killed after its mkdir did not sync, so the first commit of each session syncs every name above, once."""
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    above = [str(tmp_path / "a"), str(tmp_path)]
    async with manager(directory) as state:
        disk.calls.clear()
        await state.set("key", 1)
        await state.flush()
        assert synced(disk)[:2] == above
        disk.calls.clear()
        await state.set("key", 2)
        await state.flush()
        assert synced(disk) == []


@pytest.mark.parametrize("ending", ["", "/", "//"])
async def test_a_path_may_be_relative_and_end_with_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A relative directory is resolved at the start, from the current directory of the process, and does not change later."""
    monkeypatch.chdir(tmp_path)
    async with Manager("lab", FileStorage(f"a/./b{ending}")) as state:
        monkeypatch.chdir("/")
        await state.set("key", 1)
    assert (tmp_path / "a" / "b" / "lab.json").exists()
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        FileStorage(b"a")  # type: ignore[arg-type]


async def test_nothing_is_synced_across_a_mount_point(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directories above a mount point are not synced: none was created there, and their file system may not support it."""
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    elsewhere = os.stat_result([0] * 10)
    monkeypatch.setattr(
        disk, "stat", lambda path: elsewhere if Path(path) == tmp_path else Path(path).stat(), raising=False
    )
    async with manager(directory) as state:
        disk.calls.clear()
        await state.set("key", 1)
        await state.flush()
        assert synced(disk)[:1] == [str(tmp_path / "a")]
        assert str(tmp_path) not in synced(disk)


async def test_an_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    """A directory that is there already is used as it is."""
    directory = tmp_path / "shared"
    directory.mkdir(0o755)
    async with manager(directory) as state:
        await state.set("key", 1)
    assert mode(directory) == 0o755


async def test_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative directory is looked up once, at the start: a later chdir moves nothing."""
    monkeypatch.chdir(tmp_path)
    async with manager(Path("state")) as state:
        await state.set("key", 1)
        monkeypatch.chdir("/")
    assert await found(tmp_path / "state") == {"key": 1}


async def test_plain_json_after_a_clean_stop(tmp_path: Path) -> None:
    """After a clean stop the file is one JSON object, the user's keys and `$lab_state`, for any reader of JSON."""
    values = {"text": "ü\n\u2028", "list": [1, 2.5, None, {"x": True}], "empty": {}, "number": 2**60}
    async with manager(tmp_path) as state:
        await state.set_many(values)
    path = tmp_path / "lab.json"
    loaded = json.loads(path.read_bytes())
    member = loaded.pop("$lab_state")
    assert loaded == values
    assert (member["format"], member["revision"]) == (1, 1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "json.tool", "--compact", str(path), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert (process.returncode, json.loads(output)) == (0, values | {"$lab_state": member})
    assert kinds(tmp_path) == ""


async def test_an_unused_state_leaves_only_its_lock(tmp_path: Path) -> None:
    """Starting and stopping without a change writes neither a snapshot nor a journal."""
    async with manager(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lab.lock"]


async def test_a_foreign_map_is_rewritten_only_after_a_change(tmp_path: Path) -> None:
    """A file of the Go original is loaded, left unchanged byte for byte, and rewritten after the first change."""
    path = tmp_path / "lab.json"
    original = json.dumps({"last": 12, "modules": {"a": [1, 2]}}, indent=2).encode()
    path.write_bytes(original)
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"last": 12, "modules": {"a": [1, 2]}}
        assert state.revision == 0
    assert contents(tmp_path) == {"lab.json": original}
    async with manager(tmp_path) as state:
        await state.set("new", 1)
    assert path.read_bytes() != original
    assert json.loads(path.read_bytes()).keys() == {"last", "modules", "new", "$lab_state"}


async def test_a_foreign_map_is_synced_before_the_first_commit(tmp_path: Path, disk: Disk) -> None:
    """A snapshot that was put there by hand is synced, with its directory, before a journal names it."""
    (tmp_path / "lab.json").write_bytes(b'{"a":1}')
    async with manager(tmp_path) as state:
        await state.set("b", 2)
        disk.calls.clear()
        await state.flush()
        synced = [plain(Path(call.path).name) for call in disk.calls if call.function in ("fsync", "replace")]
        assert synced[-5:] == ["lab.json", tmp_path.name, "lab.journal.tmp", "lab.journal", tmp_path.name]
        assert await found(tmp_path) == {"a": 1, "b": 2}


async def test_three_names_on_one_storage(tmp_path: Path) -> None:
    """One `FileStorage` serves several managers at a time, each with files of its own."""
    storage = FileStorage(tmp_path)
    managers = [Manager(Config(name=name, flush_interval=0), storage) for name in ("one", "two", "one.json")]
    await asyncio.gather(*(state.start() for state in managers))
    await asyncio.gather(*(state.set("me", number) for number, state in enumerate(managers)))
    await asyncio.gather(*(state.stop() for state in managers))
    for number, name in enumerate(("one", "two", "one.json")):
        assert json.loads((tmp_path / f"{name}.json").read_bytes())["me"] == number


async def test_large_values(tmp_path: Path) -> None:
    """Values of 8 MiB go through the journal, a checkpoint, and a restart."""
    first, second = "a" * (8 * MIB), ["b" * 1000] * (8 * 1024)
    async with manager(tmp_path) as state:
        await state.set("first", first)
        await state.flush()
        await state.set("second", second)
        await state.flush()
        assert await found(tmp_path) == {"first": first, "second": second}
    assert json.loads((tmp_path / "lab.json").read_bytes())["second"] == second
    assert await found(tmp_path) == {"first": first, "second": second}


async def test_stale_temporary_files_are_removed(crashed: Path) -> None:
    """Temporary files that a crash left are removed by the next start, and never read."""
    stale = [crashed / "lab.json.0123abcd.tmp", crashed / "lab.journal.0123abcd.tmp"]
    for path in stale:
        path.write_bytes(b"half of something")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
        await state.flush()
        assert [path.name for path in stale if path.exists()] == []


# What cannot be opened


async def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    """A file where the directory should be, or above it, is refused with path and remedy."""
    (tmp_path / "file").write_bytes(b"")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UnsupportedError, match=r"choose another directory") as raised:
            await manager(directory).start()
        assert str(directory) in str(raised.value)


@pytest.mark.parametrize("name", ["lab.json", "lab.journal", "lab.lock"])
async def test_a_directory_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    """A directory in place of one of the files is refused, and start works once it is moved away."""
    (tmp_path / name).mkdir()
    state = manager(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"{name} failed: Is a directory; a directory is in its place"):
        await state.start()
    (tmp_path / name).rmdir()
    async with state:
        assert await state.get_all() == {}


def test_a_directory_without_permission_to_write(public: Path) -> None:
    """Another user's directory is refused, naming the path and the remedy."""
    public.chmod(0o555)
    report = run_child("refused", public)
    assert report["error"] == "UnsupportedError"
    assert f"{public}/lab.lock" in report["message"]
    assert "give this user the permission" in report["message"]


def test_a_directory_that_cannot_be_made(public: Path) -> None:
    """A directory that this user may not make is refused, naming the path and the remedy."""
    public.chmod(0o555)
    report = run_child("refused", public / "state")
    assert report["error"] == "UnsupportedError"
    assert f"{public}/state" in report["message"]
    assert "give this user the permission" in report["message"]


@pytest.mark.parametrize("below", ["state", "state/deeper"])
def test_a_directory_that_cannot_be_entered(public: Path, below: str) -> None:
    """A directory below one that this user may not enter is refused, naming the path and the remedy."""
    (public / "closed").mkdir(0o000)
    report = run_child("refused", public / "closed" / below)
    assert report["error"] == "UnsupportedError"
    assert f"{public}/closed/{below}" in report["message"]
    assert "give this user the permission" in report["message"]


def test_a_state_that_cannot_be_read(public: Path) -> None:
    """A snapshot without permission to read is an error that names it, never an empty state."""
    public.chmod(0o777)
    (public / "lab.json").write_bytes(b'{"a":1}')
    (public / "lab.json").chmod(0o000)
    report = run_child("refused", public)
    assert report["error"] == "UnsupportedError"
    assert f"{public}/lab.json" in report["message"]
    assert "give this user the permission" in report["message"]


async def test_a_read_only_file_system(tmp_path: Path, disk: Disk) -> None:
    """A read-only file system is refused with path and remedy, at start and at a commit, and can be mended."""
    disk.fail("open", "lab.lock", errno.EROFS)
    state = manager(tmp_path)
    with pytest.raises(UnsupportedError, match=r"lab\.lock failed: Read-only file system; .*mount it writable"):
        await state.start()
    await state.start()
    await state.set("key", 1)
    disk.fail("open", "lab.journal.tmp", errno.EROFS)
    with pytest.raises(
        UnsupportedError, match=r"lab\.journal\.[0-9a-f]{8}\.tmp failed: Read-only file system; .*mount it writable"
    ):
        await state.flush()
    await state.flush()
    assert await found(tmp_path) == {"key": 1}
    await state.stop()


async def test_an_unreadable_disk_is_not_an_empty_state(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error while loading fails the start and releases the lock."""

    class Unreadable(io.BytesIO):
        """A file with a bad sector."""

        def read(self, _: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = contents(crashed)
    with monkeypatch.context() as patch:
        patch.setattr(_fs, "open", lambda *_, **__: Unreadable(), raising=False)
        with pytest.raises(UnavailableError, match=r"reading .*lab\.journal failed: Input/output error"):
            await manager(crashed).start()
    assert contents(crashed) == before
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED


# Threads and the end


async def test_the_loops_own_threads_are_not_needed(tmp_path: Path) -> None:
    """Commits, checkpoints and stop go on while other code keeps every thread of the loop's default executor busy."""
    busy = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        executor.submit(busy.wait)
        try:
            state = manager(tmp_path, stop_timeout=2)
            await state.start()
            await state.set("a", 1)
            await state.flush()
            await state.stop()
            assert (tmp_path / "lab.json").exists()
            assert kinds(tmp_path) == ""
        finally:
            busy.set()


async def test_threads_end_with_the_session(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stopped manager leaves no thread and no open file behind, after failures and cancelled starts too."""
    caplog.set_level(logging.CRITICAL)
    threads = set(threading.enumerate())
    for _ in range(2):  # the first round makes what the process keeps: the loop's own descriptors
        before = set(Path("/proc/self/fd").iterdir())
        async with manager(tmp_path, "good") as state:
            await state.set("a", "x" * DUE)
            await state.flush()
        (tmp_path / "bad.json").write_bytes(b"bad")
        with pytest.raises(CorruptionError):
            await manager(tmp_path, "bad").start()
        starting = asyncio.create_task(manager(tmp_path, "cancelled").start())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await until(lambda: all(t in threads or t.name.startswith("asyncio_") for t in threading.enumerate()))
    assert set(Path("/proc/self/fd").iterdir()) == before


HANGING = """
import asyncio, sys, threading
from lab_state import Config, FileStorage, Manager, UnavailableError
from lab_state.storage import _fs

async def main(directory, where):
    state = Manager(Config(name="lab", flush_interval=None, stop_timeout=0.05), FileStorage(directory))
    await state.start()
    await state.set("a", 1)
    await state.flush()
    await state.set("b", 2)
    if where == "commit":
        _fs._sync_data = lambda fd: threading.Event().wait()
    else:
        await state.flush()
        _fs._sync = lambda fd: threading.Event().wait()
    try:
        await state.stop()
    except UnavailableError:
        pass

run = asyncio.run if sys.argv[3] == "cancelled" else asyncio.new_event_loop().run_until_complete
run(main(*sys.argv[1:3]))
print("ended")
"""


@pytest.mark.parametrize("where", ["commit", "checkpoint"])
@pytest.mark.parametrize("end", ["cancelled", "forgotten"])
def test_a_disk_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path, where: str, end: str) -> None:
    """Once stop() has given up, neither the end of the event loop nor that of the interpreter waits for the disk."""
    command = [sys.executable, "-c", HANGING, str(tmp_path / "state"), where, end]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "ended\n"


def test_a_file_that_cannot_be_looked_up_is_not_one_that_is_gone() -> None:
    """A lookup that fails raises an error. Only "no such file" means that there is none."""
    longer = "x" * 300
    for look_up in (_lookup.fingerprint, lambda path: _lookup.is_file(path, _lookup.NO_FILE)):
        with pytest.raises(UnsupportedError, match=r"looking up x+ failed: File name too long; the path is too long"):
            look_up(longer)
    assert _lookup.fingerprint("nowhere/at/all") is None
    assert not _lookup.is_file("nowhere/at/all", _lookup.NO_FILE)
