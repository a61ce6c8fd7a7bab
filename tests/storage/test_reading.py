"""Reading a state without its lock: what is decided, and what is done on disk."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import flusher_of

from lab_state import (
    Config,
    CorruptionError,
    FileStorage,
    Manager,
    MemoryStorage,
    Reading,
    StorageError,
    UnavailableError,
    UnsupportedError,
    copy_state,
    read_state,
)
from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state._loading import load
from lab_state.storage import _file_reader, _fs_read
from lab_state.storage._file_reader import is_held, read_files
from lab_state.storage._fs_read import open_to_read
from lab_state.storage._reading import Judgement, ReadFiles, is_answer, judge, needs_snapshot

NAME = "lab"
SALT = "0123456789abcdef"
BASE, OTHER = "10-00000001", "12-00000002"


def written(base: str, *frames: tuple[FrameKind, bytes], tail: bytes = b"", name: str = NAME) -> bytes:
    return b"".join([journal.header(name, SALT, base), *(journal.frame(SALT, *frame) for frame in frames), tail])


ONE, TWO = (FrameKind.RECORD, b"1"), (FrameKind.RECORD, b"2")
TORN = journal.frame(SALT, FrameKind.RECORD, b"in flight")[:-3]
DAMAGED = written(BASE, tail=b"x" + journal.frame(SALT, *ONE))

# What is decided


@pytest.mark.parametrize(
    ("data", "base", "records", "durable"),
    [
        (written(ANY_BASE, (FrameKind.FULL, b"{}")), NO_BASE, (), 0),
        (written(ANY_BASE, (FrameKind.FULL, b"{}"), ONE), OTHER, (b"1",), 0),
        (written(BASE), BASE, (), 0),
        (written(BASE, ONE, TWO), BASE, (b"1", b"2"), 1),
        (written(BASE, ONE, TWO, tail=TORN), BASE, (b"1", b"2"), 1),
        (written(BASE, ONE, (FrameKind.CHECKPOINT, OTHER.encode())), BASE, (b"1",), 1),
        (written(BASE, ONE, (FrameKind.CHECKPOINT, OTHER.encode())), OTHER, (b"1",), 1),
        (written(NO_BASE), NO_BASE, (), 0),
        (written(NO_BASE, ONE), NO_BASE, (b"1",), 0),
        (written(NO_BASE, ONE, (FrameKind.CHECKPOINT, BASE.encode()), TWO), BASE, (b"1", b"2"), 1),
    ],
)
def test_what_is_an_answer_at_the_first_reading(
    data: bytes, base: str, records: tuple[bytes, ...], durable: int
) -> None:
    """A first reading is accepted if the journal has the whole state, names the snapshot, or needs none."""
    judgement = judge(data, base, NAME, "path")
    assert judgement.accepted is not None
    assert (judgement.accepted.records, judgement.durable) == (records, durable)
    assert is_answer(None, ReadFiles((1, 2), (1, 3), base, judgement))


@pytest.mark.parametrize(
    ("data", "base", "accepted"),
    [
        (None, NO_BASE, True),
        (None, BASE, True),
        (written(BASE), OTHER, True),
        (written(BASE), NO_BASE, False),
        (written(BASE, ONE), OTHER, False),
        (written(NO_BASE, ONE), BASE, False),
        (written(ANY_BASE, ONE), NO_BASE, False),
        (DAMAGED, BASE, False),
        (b"", BASE, False),
        (b"not a header\n", BASE, False),
        (written(BASE, name="other"), BASE, False),
    ],
)
def test_what_takes_a_second_reading(data: bytes | None, base: str, *, accepted: bool) -> None:
    """Missing files, files that do not belong together, and damage are accepted only in a second reading."""
    seen = ReadFiles((1, 2), (1, 3), base, judge(data, base, NAME, "path"))
    assert (seen.judgement.accepted is not None) is accepted
    assert (seen.judgement.error is not None) is not accepted
    assert not is_answer(None, seen)
    again = ReadFiles((1, 2), (1, 3), base, judge(data, base, NAME, "path"))
    assert is_answer(seen, again)


@pytest.mark.parametrize(
    "change",
    [
        {"journal": (1, 9)},
        {"journal": None},
        {"snapshot": (1, 9)},
        {"snapshot": None},
        {"base": OTHER},
        {"judgement": judge(written(BASE, ONE, tail=b"x" + journal.frame(SALT, *TWO)), BASE, NAME, "path")},
        {"judgement": judge(None, BASE, NAME, "path")},
    ],
)
def test_another_second_reading_is_not_believed(change: dict[str, Any]) -> None:
    """A second reading with another file, another snapshot or other damage is not accepted: something was replaced meanwhile."""
    seen = ReadFiles((1, 2), (1, 3), BASE, judge(DAMAGED, BASE, NAME, "path"))
    assert is_answer(seen, seen)
    assert not is_answer(seen, seen._replace(**change))


def test_damage_behind_which_the_journal_grew_is_the_same() -> None:
    """Damage is the same in two readings although a writer appended between them."""
    grown = judge(DAMAGED + journal.frame(SALT, *TWO), BASE, NAME, "path")
    seen = ReadFiles((1, 2), (1, 3), BASE, judge(DAMAGED, BASE, NAME, "path"))
    assert is_answer(seen, seen._replace(judgement=grown))


def test_only_a_journal_with_the_whole_state_needs_no_snapshot() -> None:
    """The snapshot is not read only if the journal has the whole state. With a bad header it is read."""
    assert not needs_snapshot(written(ANY_BASE, (FrameKind.FULL, b"{}")), NAME, "path")
    assert needs_snapshot(written(BASE), NAME, "path")
    assert needs_snapshot(b"", NAME, "path")


# What is done on disk


async def some(directory: Path, *, stop: bool = True) -> Manager:
    """Write a state with two changes in the snapshot, and one after it."""
    manager = Manager(Config(name=NAME, flush_interval=None), FileStorage(directory))
    for values in ({"a": 1}, {"b": [2]}):
        await manager.start()
        await manager.set_many(values)
        await manager.stop()
    await manager.start()
    await manager.set("c", 3)
    await manager.flush()
    if stop:
        await killed(manager)
    return manager


async def killed(manager: Manager) -> None:
    """End a manager as SIGKILL would."""
    session: Any = flusher_of(manager).abort()
    await asyncio.sleep(0)
    await session._commits.run(session._writer.close)


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(directory.iterdir())}


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read(directory: Path, **arguments: Any) -> Reading:
    """Read a state, and check that no file stays open, whatever the outcome."""
    before = open_files()
    try:
        return read_files(str(directory), NAME, threading.Event(), **arguments)
    finally:
        assert open_files() == before


def test_a_file_that_takes_long_to_read(tmp_path: Path) -> None:
    """A snapshot without a journal has to be read twice. That is done also if the first reading takes longer than 5 s."""
    (tmp_path / f"{NAME}.json").write_text('{"a": 1}')
    times = iter([0.0, 6.0])
    assert read(tmp_path, monotonic=lambda: next(times)).snapshot == b'{"a": 1}'


async def test_a_running_state_is_read(tmp_path: Path) -> None:
    """A running, locked state is read with all that is durable. No file is changed, and the manager goes on."""
    manager = await some(tmp_path, stop=False)
    await manager.set("not flushed", 1)
    before = contents(tmp_path)
    view = await read_state(NAME, FileStorage(tmp_path))
    assert contents(tmp_path) == before
    assert await view.get_all() == {"a": 1, "b": [2], "c": 3}
    assert (view.revision, view.durable_revision, view.live) == (3, 2, True)
    await manager.flush()
    assert await view.get_all() == {"a": 1, "b": [2], "c": 3}
    assert (await read_state(NAME, FileStorage(tmp_path))).revision == 4
    await manager.stop()
    view = await read_state(NAME, FileStorage(tmp_path))
    assert (view.revision, view.durable_revision, view.live) == (4, 4, False)


async def test_a_state_of_a_dead_process_is_read(tmp_path: Path) -> None:
    """A state of a dead process is read as the next start would find it. The last record counts as not durable."""
    await some(tmp_path)
    view = await read_state(NAME, FileStorage(tmp_path))
    assert await view.get_all() == {"a": 1, "b": [2], "c": 3}
    assert (view.revision, view.durable_revision, view.live) == (3, 2, False)


async def test_a_mistyped_name_leaves_nothing(tmp_path: Path) -> None:
    """Reading a name without a state is an error with its path, and creates neither file nor directory."""
    with pytest.raises(UnsupportedError, match=r"there is no state at .*lab\.json: check the name"):
        await read_state(NAME, FileStorage(tmp_path))
    with pytest.raises(UnsupportedError, match=r"there is no directory .*/missing/deep: check the path"):
        await read_state(NAME, FileStorage(tmp_path / "missing" / "deep"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UnsupportedError, match="a part of the path is a file"):
        await read_state(NAME, FileStorage(tmp_path / "file"))


async def test_a_state_that_was_never_written_is_empty(tmp_path: Path) -> None:
    """If there is only a lock file, the state was opened and is empty, as for `start()`."""
    async with Manager(NAME, FileStorage(tmp_path)):
        view = await read_state(NAME, FileStorage(tmp_path))
        assert (len(view), view.revision, view.live) == (0, 0, True)


READ_AND_START = """
import asyncio, ctypes, json, os, sys
from lab_state import FileStorage, Manager, read_state, StorageError
{change}
async def main():
    view = await read_state("lab", FileStorage(sys.argv[1]))
    try:
        await Manager("lab", FileStorage(sys.argv[1])).start()
    except StorageError as error:
        refused = str(error)
    print(json.dumps([await view.get_all(), view.revision, view.live, refused]))
asyncio.run(main())
"""
"""Changes its user or its mounts, reads a state, tries to start it, and prints what was read and the error."""

AS_NOBODY = """
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""


def run(change: str, *arguments: str) -> Any:
    code = READ_AND_START.replace("{change}", change)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


async def test_the_permission_to_read_is_enough(tmp_path: Path) -> None:
    """A user who may only read the files can read a running state, but cannot start it."""
    manager = await some(tmp_path, stop=False)
    for directory in list(tmp_path.parents)[:3]:  # as root, the reader becomes another user
        directory.chmod(directory.stat().st_mode | 0o11)
    for file in tmp_path.iterdir():
        file.chmod(0o444)
    tmp_path.chmod(0o555)
    found = await asyncio.to_thread(run, AS_NOBODY, str(tmp_path))
    assert found[:3] == [{"a": 1, "b": [2], "c": 3}, 3, True]
    assert "Permission denied" in found[3]
    (tmp_path / f"{NAME}.journal").chmod(0)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        await asyncio.to_thread(run, AS_NOBODY, str(tmp_path))
    assert "lab.journal failed: Permission denied; give this user the permission" in failed.value.stderr
    tmp_path.chmod(0o700)
    await manager.stop()


READ_ONLY = """
libc = ctypes.CDLL(None, use_errno=True)
directory = sys.argv[1].encode()
def check(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
# CLONE_NEWNS: mounts of this process alone; CLONE_NEWUSER: to be allowed to
check(libc.unshare(0x20000 if os.geteuid() == 0 else 0x10020000))
check(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
check(libc.mount(directory, directory, None, 0x1000, None))  # MS_BIND
check(libc.mount(b"none", directory, None, 0x1021, None))  # MS_BIND | MS_REMOUNT | MS_RDONLY
"""


async def test_a_read_only_mount_is_read(tmp_path: Path) -> None:
    """On a read-only mount, such as a ConfigMap, an image layer or a CD, a state can be read, but not started."""
    await some(tmp_path)
    found = await asyncio.to_thread(run, READ_ONLY, str(tmp_path))
    assert found[:2] == [{"a": 1, "b": [2], "c": 3}, 3]
    assert "Read-only file system" in found[3]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to("not there")


@pytest.mark.parametrize("suffix", ["json", "journal"])
@pytest.mark.parametrize("make", [fifo, directory, bound_socket, device, dangling], ids=lambda make: make.__name__)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], suffix: str, tmp_path: Path) -> None:
    """A FIFO is refused without waiting, a device without reading it, and a broken link is not a missing file."""
    path = tmp_path / f"{NAME}.{suffix}"
    make(path)
    with pytest.raises(UnsupportedError, match=f"{NAME}.{suffix} is "):
        read(tmp_path)


def test_a_device_that_comes_between_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device put in place between the check and the opening is noticed after opening, and closed."""
    path = tmp_path / "file"
    path.touch()
    opened = []
    system = os.open

    def replaced(path: str, flags: int) -> int:
        opened.append(system("/dev/zero", flags))
        return opened[0]

    monkeypatch.setattr(_fs_read.os, "open", replaced)  # type: ignore[attr-defined]  # its own, not for export
    with pytest.raises(UnsupportedError, match="is not a regular file"):
        open_to_read(str(path))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


async def test_a_link_to_the_files_is_followed(tmp_path: Path) -> None:
    """Symbolic links to the files are followed, as a ConfigMap has them."""
    await some(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for suffix in ("json", "journal"):
        (tmp_path / "links" / f"{NAME}.{suffix}").symlink_to(tmp_path / "real" / f"{NAME}.{suffix}")
    view = await read_state(NAME, FileStorage(tmp_path / "links"))
    assert (await view.get_all(), view.live) == ({"a": 1, "b": [2], "c": 3}, False)


def test_a_long_file_is_read_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read in several calls, as the kernel returns at most two gigabytes.

    One that is cut meanwhile ends early.
    """
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    file = open_to_read(str(path))
    assert file is not None
    assert (file.read(), file.read(4)) == (b"0123456789", b"0123")
    system = os.pread
    monkeypatch.setattr(_fs_read.os, "pread", lambda fd, size, offset: system(fd, min(size, 3), offset))  # type: ignore[attr-defined]  # likewise
    assert (file.read(), file.read(4)) == (b"0123456789", b"0123")
    monkeypatch.setattr(_fs_read.os, "pread", lambda fd, size, offset: b"" if offset else b"01")  # type: ignore[attr-defined]  # likewise
    assert file.read() == b"01"
    file.close()


def test_an_error_of_the_disk_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error in a read or a lookup is an `UnavailableError`, and descriptors are closed."""
    (tmp_path / f"{NAME}.journal").write_bytes(written(BASE))

    def fails(*_: object) -> Any:
        raise OSError(5, "Input/output error")

    for name in ("pread", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(_fs_read.os, name, fails)  # type: ignore[attr-defined]  # likewise
            with pytest.raises(UnavailableError, match="Input/output error"):
                read(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(_fs_read.os, "stat", fails)  # type: ignore[attr-defined]  # likewise
        with pytest.raises(UnavailableError, match=r"looking up .*Input/output error"):
            _fs_read.is_there(str(tmp_path))


# What is replaced meanwhile


class Steps:
    """A stand-in for `judge` that makes the next change to the files before each reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
        self.readings = 0
        self._steps = iter(steps)
        self._judge = judge
        monkeypatch.setattr(_file_reader, "judge", self)

    def __call__(self, *arguments: Any, is_followed: bool) -> Judgement:
        self.readings += 1
        judgement = self._judge(*arguments, is_followed=is_followed)
        next(self._steps, int)()
        return judgement


def put(path: Path, data: bytes) -> None:
    """Replace a file by another one, as a writer does."""
    new = path.with_name("new")
    new.write_bytes(data)
    new.replace(path)


def base(data: bytes) -> str:
    return journal.base_of(len(data), zlib.crc32(data))


def test_files_replaced_meanwhile_are_read_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a file was replaced during a reading that is not accepted, the next reading follows without a pause."""
    old, new = b'{"old":1}', b'{"newer":1}'
    snapshot, log = tmp_path / f"{NAME}.json", tmp_path / f"{NAME}.journal"
    snapshot.write_bytes(new)
    log.write_bytes(written(base(old), ONE))
    monkeypatch.setattr(_file_reader, "_PAUSE", 1000.0)
    steps = Steps(monkeypatch, lambda: put(log, written(base(new), TWO)))
    reading = read(tmp_path)
    assert (reading.snapshot, reading.records, steps.readings) == (new, (b"2",), 2)


def test_a_snapshot_changed_meanwhile_is_read_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same holds if the snapshot was replaced, or has another size or time."""
    old, new = b'{"old":1}', b'{"newer":1}'
    snapshot, log = tmp_path / f"{NAME}.json", tmp_path / f"{NAME}.journal"
    log.write_bytes(written(base(new), ONE))
    monkeypatch.setattr(_file_reader, "_PAUSE", 1000.0)
    for change in (lambda: put(snapshot, new), lambda: snapshot.write_bytes(new)):
        snapshot.write_bytes(old)
        steps = Steps(monkeypatch, change)
        assert (read(tmp_path).snapshot, steps.readings) == (new, 2)
        monkeypatch.setattr(_file_reader, "judge", judge)


def test_an_old_snapshot_beside_the_next_journal_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old snapshot with the next journal is not accepted, although `start()` would: the changes between them would be lost."""
    old, new = b'{"old":1}', b'{"newer":1}'
    snapshot, log = tmp_path / f"{NAME}.json", tmp_path / f"{NAME}.journal"
    snapshot.write_bytes(old)
    log.write_bytes(written(base(new)))
    Steps(monkeypatch, lambda: put(snapshot, new))
    assert read(tmp_path).snapshot == new
    snapshot.write_bytes(old)  # put there by hand, and nothing moves: then it is what `start()` would load
    assert read(tmp_path).snapshot == old


def test_files_missing_for_a_moment_are_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing files are accepted only if they are missing in two readings. The same holds for the journal alone."""
    data = b'{"a":1}'
    snapshot, log = tmp_path / f"{NAME}.json", tmp_path / f"{NAME}.journal"
    Steps(monkeypatch, lambda: put(snapshot, data), lambda: put(log, written(base(data), ONE)))
    assert read(tmp_path).records == (b"1",)
    log.unlink()
    assert read(tmp_path).records == ()


def test_a_journal_with_the_whole_state_needs_no_snapshot(tmp_path: Path) -> None:
    """If the journal holds the whole state, nothing else is read, whatever the snapshot is."""
    (tmp_path / f"{NAME}.json").mkdir()
    (tmp_path / f"{NAME}.journal").write_bytes(written(ANY_BASE, (FrameKind.FULL, b'{"a":1}'), ONE, tail=TORN))
    reading = read(tmp_path)
    assert (reading.snapshot, reading.crc32, reading.records, reading.durable) == (b'{"a":1}', None, (b"1",), 0)


def test_a_journal_with_the_whole_state_is_damaged(tmp_path: Path) -> None:
    """Damage in a journal with the whole state is accepted in the second reading, without reading a snapshot."""
    log = tmp_path / f"{NAME}.journal"
    log.write_bytes(written(ANY_BASE, ONE))
    (tmp_path / f"{NAME}.json").mkdir()
    with pytest.raises(CorruptionError, match="its first frame must contain the whole state, and does not"):
        read(tmp_path)


def test_a_reading_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the files change at each reading, it gives up after 5 s. If its caller was cancelled, it ends at once."""
    log = tmp_path / f"{NAME}.journal"
    log.write_bytes(b"0")
    numbers = iter(range(10))
    change = lambda: put(log, b"%d" % next(numbers))  # noqa: E731 -- named once
    steps = Steps(monkeypatch, *[change] * 10)
    times = iter([0.0, 1.0, 4.9, 5.0])
    with pytest.raises(UnavailableError, match="changed faster than they could be read, for 5 s"):
        read(tmp_path, monotonic=lambda: next(times))
    assert steps.readings == 3
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(UnavailableError):
        read_files(str(tmp_path), NAME, given_up)
    assert steps.readings == 3


async def test_a_caller_that_is_cancelled_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a cancelled reading does not wait until the end of its pause."""
    monkeypatch.setattr(_file_reader, "_PAUSE", 1000.0)
    begun = threading.Event()
    Steps(monkeypatch, begun.set)
    reading = asyncio.create_task(FileStorage(tmp_path).read(NAME))
    await asyncio.to_thread(begun.wait)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    threads = [thread for thread in threading.enumerate() if thread.name == f"lab_state {NAME} read"]
    for thread in threads:
        await asyncio.to_thread(thread.join, 60)
    assert not any(thread.is_alive() for thread in threads)


# Whether a writer has it


def test_whether_the_lock_is_held_cannot_always_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `/proc`, in another pid namespace, or if the lock cannot be looked up, the result is None."""
    lock = tmp_path / "lock"
    assert is_held(str(lock)) is False
    lock.touch()
    assert is_held(str(lock)) is False
    with monkeypatch.context() as patch:
        patch.setattr(_file_reader, "would_show", lambda *_: False)
        assert is_held(str(lock)) is None
    with monkeypatch.context() as patch:
        patch.setattr(_file_reader, "find_holders", lambda *_: None)
        assert is_held(str(lock)) is None
    with monkeypatch.context() as patch:
        patch.setattr(_file_reader, "MOUNTS", str(tmp_path / "missing"))
        assert is_held(str(lock)) is None
        patch.setattr(_file_reader, "MOUNTS", str(tmp_path))
        assert is_held(str(lock)) is None
    assert is_held(str(tmp_path / ("x" * 300))) is None


# What is decoded


class Told:
    """A storage that returns these readings in turn, and then repeats the last one."""

    def __init__(self, *readings: Reading) -> None:
        self.readings = list(readings)
        self.calls = 0

    async def open(self, name: str) -> Any:
        raise AssertionError(name)

    async def read(self, name: str) -> Reading:
        self.calls += 1
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def told(snapshot: bytes | None, *records: bytes, durable: int = 0) -> Reading:
    return Reading(snapshot, records, durable, live=None, path="told")


def record(start: int, end: int, *, value: int = 1) -> bytes:
    return b'{"from":%d,"to":%d,"clear":false,"set":{"a":%d},"delete":[],"expires":{}}' % (start, end, value)


async def test_what_is_durable_ends_before_the_last_records() -> None:
    """The durable revision is the one before the records that may still be lost."""
    loaded = await load(NAME, Told(told(None, record(0, 3), record(3, 4), durable=1)))
    assert (loaded.state.revision, loaded.durable_revision) == (4, 3)
    loaded = await load(NAME, Told(told(None, record(0, 3), record(3, 4), durable=2)))
    assert (loaded.state.revision, loaded.durable_revision) == (4, 4)


async def test_damage_is_believed_the_second_time() -> None:
    """A gap or a bad snapshot is accepted only in a second reading. The journal may grow between the two."""
    gap, whole = told(None, record(0, 1), record(2, 3)), told(None, record(0, 1), record(1, 2))
    storage = Told(gap, whole)
    assert (await load(NAME, storage)).state.revision == 2
    for first, second in ((gap, gap), (gap, told(None, record(0, 1), record(2, 3), record(3, 4)))):
        storage = Told(first, second)
        with pytest.raises(CorruptionError, match="the changes 2 to 2 are missing before record 2"):
            await load(NAME, storage)
        assert storage.calls == 2
    changing = [told(b"x" * number) for number in range(10)]
    storage = Told(*changing)
    with pytest.raises(UnavailableError, match="told changed during each of 10 attempts to read it"):
        await load(NAME, storage)
    assert storage.calls == 10
    storage = Told(gap, told(None, record(2, 3)), gap, gap)
    with pytest.raises(CorruptionError, match="before record 2"):
        await load(NAME, storage)
    assert storage.calls == 4


async def test_a_message_counts_all_records() -> None:
    """The number of a record in a message counts all records of the journal, durable or not."""
    storage = Told(told(None, record(0, 1), record(1, 2), record(5, 6), durable=2))
    with pytest.raises(CorruptionError, match="before record 3"):
        await load(NAME, storage)


@pytest.mark.parametrize("storage", ["state", Path("state"), FileStorage, None, object()], ids=range(5))
async def test_a_storage_that_cannot_read(storage: Any) -> None:
    """For a storage without the method `read`, or something else, the error says what is missing."""
    with pytest.raises(TypeError, match="a storage needs `async def read"):
        await read_state(NAME, storage)


async def test_a_manager_needs_no_read() -> None:
    """A storage without the method `read` still serves a manager."""

    class Old:
        def __init__(self) -> None:
            self.open = MemoryStorage().open

    async with Manager(NAME, Old()) as state:  # type: ignore[arg-type]  # what is missing is the point
        await state.set("a", 1)


async def test_errors_of_a_storage_reach_the_caller() -> None:
    """What `read` of a storage raises is raised as it is."""

    class Failing(Told):
        async def read(self, name: str) -> Reading:
            raise StorageError(name)

    with pytest.raises(StorageError, match=NAME):
        await read_state(NAME, Failing())


async def test_a_state_that_was_never_written_is_not_copied(tmp_path: Path) -> None:
    """`copy_state` of a state without content is an error, and creates nothing in the target."""
    target = MemoryStorage()
    async with Manager("lab", FileStorage(tmp_path)):
        pass
    with pytest.raises(UnsupportedError, match=r"there is no state at .*lab\.json: check the name and the storage"):
        await copy_state("lab", FileStorage(tmp_path), target)
    with pytest.raises(UnsupportedError):
        await target.read("lab")
