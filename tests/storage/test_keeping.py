"""The history of a state on disk while a manager runs: which files are linked, and what happens if one cannot be."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from file_tools import Disk, Tmpfs, flusher, mode, scan

from lab_state import Config, FileStorage, Manager, StorageError, UnavailableError, UnsupportedError, read_state
from lab_state import _journal as journal
from lab_state._clock import wall_now
from lab_state._journal import ANY_BASE, NO_BASE
from lab_state.storage import _directory, _fs, _history_files, _keeping, _new_journal
from lab_state.storage._generations import HistoryFile, format_name, journal_file, parse_name
from lab_state.storage._history_files import link_present
from lab_state.storage._protocol import figures_of

HOUR = timedelta(hours=1)
HOLE = "lacks the files of the state that are now replaced"


def manager(directory: Path, **more: Any) -> Manager:
    storage = FileStorage(directory, **{"history": HOUR, **more})
    return Manager(Config(name="lab", flush_interval=0), storage)


async def checkpoint(state: Manager) -> None:
    checkpoints = flusher(state).checkpoints
    checkpoints.start()
    await checkpoints.ended()
    # The generations are counted and pruned in the thread of the checkpoint, behind it.
    session = flusher(state)._session
    await session._run(session._checkpoints, lambda: None)  # type: ignore[attr-defined]


def kept(directory: Path) -> list[HistoryFile]:
    """Return the files of the history, the oldest first."""
    files = [parse_name(path.name) for path in (directory / "lab.history").iterdir()]
    return sorted(file for file in files if file is not None)


def shown(directory: Path) -> list[str]:
    """Return the files of the history: the first revision, `s` for a snapshot, `j` for a journal and its base, if it is not a snapshot."""
    return [
        f"{file.first}{'s' if file.is_snapshot else 'j' + (file.base if file.base in {ANY_BASE, NO_BASE} else '')}"
        for file in kept(directory)
    ]


async def generations(directory: Path, number: int, **more: Any) -> None:
    """Make generations of one record each."""
    for at in range(number):
        async with manager(directory, **more) as state:
            await state.set("a", at)


# What is linked


async def test_a_checkpoint_links_snapshot_and_journal(tmp_path: Path) -> None:
    """They are the files that were replaced, with their inodes, and the journal has its records."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await checkpoint(state)
        await state.set("a", 2)
        before = {(tmp_path / f"lab.{end}").stat().st_ino for end in ("json", "journal")}
        await checkpoint(state)
        assert shown(tmp_path) == ["0jnone", "1s", "1j"]
        names = [tmp_path / "lab.history" / format_name(file) for file in kept(tmp_path)[1:]]
        assert {path.stat().st_ino for path in names} == before
        size = sum(path.stat().st_size for path in (tmp_path / "lab.history").iterdir())
        status = state.status()
    assert (status.history_failures, status.history_generations, status.history_bytes) == (0, 2, size)
    assert mode(tmp_path / "lab.history") == 0o700
    snapshot, records = kept(tmp_path)[1:3]
    meta = json.loads((tmp_path / "lab.history" / format_name(snapshot)).read_bytes())["$lab_state"]
    assert (meta["revision"], meta["wall"]) == snapshot[:2]
    assert records.base == snapshot.base


async def test_without_a_history_nothing_is_linked(tmp_path: Path) -> None:
    """And `status()` has no figures."""
    async with Manager(Config(name="lab", flush_interval=0), FileStorage(tmp_path)) as state:
        await state.set("a", 1)
        status = state.status()
    assert (status.history_failures, status.history_generations, status.history_bytes) == (0, None, None)
    assert not (tmp_path / "lab.history").exists()
    assert figures_of(object()) is None


async def test_a_history_that_is_switched_off_stays(tmp_path: Path) -> None:
    """Without `history=`, older files are neither added nor deleted."""
    await generations(tmp_path, 3)
    before = kept(tmp_path)
    async with Manager(Config(name="lab", flush_interval=0), FileStorage(tmp_path)) as state:
        await state.set("a", 9)
    assert kept(tmp_path) == before


async def test_a_journal_without_records_is_left_out(tmp_path: Path) -> None:
    """A checkpoint links only the snapshot before it."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await checkpoint(state)
        await checkpoint(state)
        assert shown(tmp_path) == ["0jnone", "1s"]


async def test_a_journal_that_is_copied_is_left_out(tmp_path: Path, disk: Disk) -> None:
    """After a kill, all its records are in the next one, which follows the same snapshot."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    await killed(tmp_path)
    async with manager(tmp_path) as state:
        await state.flush()
        assert shown(tmp_path) == ["0jnone"]
        await state.set("a", 3)
        assert len(scan(tmp_path).frames) == 3
    assert shown(tmp_path) == ["0jnone", "1s", "1j"]


async def test_a_copied_journal_is_newer_even_if_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was cut off has linked the journal. The next one keeps the copied journal, which has all records."""
    await killed(tmp_path)
    found = scan(tmp_path).header
    (tmp_path / "lab.history").mkdir(exist_ok=True)
    linked = tmp_path / "lab.history" / format_name(journal_file(0, found.wall, NO_BASE, found.salt))
    linked.hardlink_to(tmp_path / "lab.journal")
    monkeypatch.setattr(_new_journal, "wall_now", lambda: found.wall - 1000)
    async with manager(tmp_path, history_bytes=300) as state:
        await state.set("a", 3)
        assert scan(tmp_path).header.wall == found.wall + 1
    assert not linked.exists()
    copied = await read_state("lab", FileStorage(tmp_path, history=HOUR), at=2)
    assert await copied.get("a") == 3


async def killed(directory: Path, value: int = 2) -> None:
    """Set a value in a process that ends without a stop."""
    state = manager(directory)
    await state.start()
    await state.set("a", value)
    await flusher(state).abort().aclose()


async def test_a_journal_that_is_given_up_is_linked_with_its_snapshot(tmp_path: Path, disk: Disk) -> None:
    """The next journal begins with the whole state, and needs neither of them."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await checkpoint(state)
        await state.set("a", 2)
        disk.fail("fdatasync", "lab.journal")
        with pytest.raises(StorageError):
            await state.set("a", 3)
        await state.flush()
        assert scan(tmp_path).header.base == ANY_BASE
        assert shown(tmp_path) == ["0jnone", "1s", "1j"]
        await state.set("a", 4)
        await checkpoint(state)
        assert shown(tmp_path) == ["0jnone", "1s", "1j", "3j*"]
        assert state.status().history_failures == 0


async def test_files_that_a_start_found_are_synced_before_they_are_linked(tmp_path: Path, disk: Disk) -> None:
    """A journal that was given up is the last place of its records, and may be only in the page cache."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        disk.fail("fdatasync", "lab.journal")
        with pytest.raises(StorageError):
            await state.set("a", 2)
        await state.flush()
        await flusher(state).abort().aclose()
    disk.calls.clear()
    async with manager(tmp_path) as state:
        await state.flush()
        synced = [Path(call.path).name for call in disk.calls if call.function == "fsync"]
    assert synced.index("lab.journal") < synced.index("lab.history")
    assert "2j*" in shown(tmp_path)


async def test_links_are_durable_before_anything_is_replaced(tmp_path: Path, disk: Disk) -> None:
    """The history is synced after the new snapshot was written, and before it gets its name."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await checkpoint(state)
        await state.set("a", 2)
        disk.calls.clear()
        await checkpoint(state)
    calls = [(call.function, Path(call.path).name) for call in disk.calls]
    first = calls.index(("fsync", "lab.history"))
    assert first < calls.index(("replace", "lab.json")) < calls.index(("replace", "lab.journal"))
    assert first < len(calls) - 1 - calls[::-1].index(("fdatasync", "lab.journal"))  # commits go on behind it


async def test_a_journal_that_had_no_records_at_a_failed_checkpoint(tmp_path: Path, disk: Disk) -> None:
    """The checkpoint has left it out. The records that came later are linked before it is given up."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await checkpoint(state)
        disk.fail("replace", "lab.json")
        await checkpoint(state)
        assert state.status().last_error is not None
        await state.set("a", 2)
        disk.fail("fdatasync", "lab.journal")
        with pytest.raises(StorageError):
            await state.set("a", 3)
        await state.flush()
        assert shown(tmp_path) == ["0jnone", "1s", "1j"]


async def test_a_new_history_is_durable_before_its_first_use(tmp_path: Path, disk: Disk) -> None:
    """Its parent is synced, and again in each session: a killed process may have made it."""
    for value in (1, 2):
        disk.calls.clear()
        async with manager(tmp_path) as state:
            await state.set("a", value)
            disk.calls.clear()
            await checkpoint(state)
            names = [Path(call.path).name for call in disk.calls if call.function == "fsync"]
            assert tmp_path.name in names[: names.index("lab.history")]
            await state.set("a", value + 10)
            disk.calls.clear()
            await checkpoint(state)
            names = [Path(call.path).name for call in disk.calls if call.function == "fsync"]
            assert tmp_path.name not in names[: names.index("lab.history")]


async def test_a_checkpoint_without_a_commit_before_it(tmp_path: Path, disk: Disk) -> None:
    """The snapshot that the start has found is synced and linked before it is replaced."""
    await generations(tmp_path, 1)
    async with manager(tmp_path) as state:
        disk.calls.clear()
        await checkpoint(state)
        calls = [(call.function, Path(call.path).name) for call in disk.calls]
        assert calls.index(("fsync", "lab.json")) < calls.index(("fsync", "lab.history"))
        assert calls.index(("fsync", "lab.history")) < calls.index(("replace", "lab.json"))
        assert shown(tmp_path) == ["0jnone", "1s"]


async def test_a_checkpoint_of_a_journal_that_was_handed_over(tmp_path: Path, disk: Disk) -> None:
    """The journal and the snapshot that the start has found are synced before they are linked."""
    await generations(tmp_path, 1)
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 2)
    await flusher(state)._session.hand_over()  # type: ignore[attr-defined]
    await flusher(state).abort().aclose()
    async with manager(tmp_path) as state:
        disk.calls.clear()
        await checkpoint(state)
        synced = [Path(call.path).name for call in disk.calls if call.function == "fsync"]
        first = synced.index("lab.history")
        assert {"lab.json", "lab.journal"} <= set(synced[:first])
        assert shown(tmp_path) == ["0jnone", "1s", "1j"]


async def test_a_file_of_another_program_is_a_generation(tmp_path: Path) -> None:
    """It has revision 0, and its time is that of the file."""
    (tmp_path / "lab.json").write_bytes(b'{"a": "x"}')
    os.utime(tmp_path / "lab.json", ns=(0, 5_000_000_000))
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    assert shown(tmp_path) == ["0s", "0j"]
    assert kept(tmp_path)[0].wall == 5000


@pytest.mark.parametrize("piece", [1024 * 1024, 100, 7])
@pytest.mark.parametrize("is_edited", [False, True])
async def test_a_large_end_of_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, piece: int, is_edited: bool
) -> None:
    """The revision is found although many keys expire: their times are behind it in the file. An edit is the next revision."""
    monkeypatch.setattr(_history_files, "_PIECE", piece)
    monkeypatch.setattr(_history_files, "_END_BYTES", 512)
    trap = {"$lab_state": {"format": 1, "revision": 7, "id": "0" * 16}, '"$lab_state":{"format":1,"revision":8,"id"': 1}
    async with manager(tmp_path) as state:
        await state.set_many(
            {f'"$lab_state":{{"format":1,"revision":{number},': trap for number in range(50)}, ttl=1000
        )
    path = tmp_path / "lab.json"
    data = path.read_bytes()
    assert len(data) > 2000
    if is_edited:
        path.write_bytes(re.sub(rb',"crc32":"[0-9a-f]{8}"', b"", data))
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        await checkpoint(state)
        revision = 2 if is_edited else 1
        assert shown(tmp_path) == ["0jnone", f"{revision}s", f"{revision}j"]
        assert kept(tmp_path)[1].wall == json.loads(data)["$lab_state"]["wall"]


@pytest.mark.parametrize("old", [b'"revision":1', b'"$lab_state":{'])
def test_a_member_in_another_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes) -> None:
    """A newer version, or a tool, may write the reserved member with spaces. It is found by decoding."""
    monkeypatch.setattr(_history_files, "_END_BYTES", 512)
    data = b'{"k":1,"$lab_state":{"format":1,"revision":1,"id":"0000000000000000","expires":{"k":%s},"wall":5,"crc32":"00000000"}}'
    path = tmp_path / "file"
    path.write_bytes((data % (b" " * 1000 + b"1700000000000")).replace(old, old.replace(b":", b": ")))
    moment = _history_files._moment(str(path), 0, path.stat().st_size)
    assert moment == (1, 5)


async def test_a_link_that_is_there_already(tmp_path: Path) -> None:
    """A crash may have left it. It is the same file, and no new generation. A copy with another inode is not the journal in use."""
    await generations(tmp_path, 1)
    async with manager(tmp_path) as state:
        await state.set("a", 3)
        await asyncio.to_thread(link, state)
        before = kept(tmp_path)
        assert shown(tmp_path) == ["0jnone", "1s", "1j"]
        await asyncio.to_thread(link, state)
        assert kept(tmp_path) == before
        await state.set("a", 4)
        await checkpoint(state)
        assert state.status().history_failures == 0
        assert kept(tmp_path) == before


def link(state: Manager) -> None:
    """Link the present files, as a restore does."""
    writer = flusher(state)._session._writer  # type: ignore[attr-defined]
    link_present(writer.paths, "lab", writer.base, writer.snapshot_fingerprint)


@pytest.mark.parametrize(("end", "failures"), [("json", 0), ("journal", 1)])
async def test_a_copied_history(tmp_path: Path, end: str, failures: int) -> None:
    """A tool that copies may make two files of one with two names. For a snapshot this is success: its bytes do not change.

    A journal still grows, so the copy lacks records, and this is a hole.
    """
    await generations(tmp_path, 1)
    async with manager(tmp_path) as state:
        await state.set("a", 3)
        await asyncio.to_thread(link, state)
        (copied,) = (tmp_path / "lab.history").glob(f"{1:020}-*.{end}")
        data = copied.read_bytes()
        copied.unlink()
        copied.write_bytes(data)
        await state.set("a", 4)
        await checkpoint(state)
        assert state.status().history_failures == failures
        assert copied.read_bytes() == data


async def test_a_shared_state(tmp_path: Path) -> None:
    """Each owner keeps the history. A planned end of an owner, whose journal is continued, begins no generation."""
    config = Config(name="lab", flush_interval=0, shared=True)
    first, second = (Manager(config, FileStorage(tmp_path, history=HOUR)) for _ in range(2))
    async with first:
        await second.start()
        await second.set("a", 1)
        assert second.status().history_generations is None  # the owner has the files
    await second.set("a", 2)
    assert second.status().history_generations == 0
    await second.stop()
    assert shown(tmp_path) == ["0jnone"]
    assert [frame.kind.value for frame in of_the_history(tmp_path).frames] == ["R", "R", "C"]


def of_the_history(directory: Path) -> journal.Scan:
    (path,) = directory.glob("lab.history/*.journal")
    return journal.scan(path.read_bytes(), "lab", str(path))


# What fails


def failing(function: str, code: int, suffix: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    """Let a system call on the history fail, where the path ends with `suffix`."""

    def fail(patch: pytest.MonkeyPatch) -> None:
        real = getattr(os, function)

        def failed(*args: Any, **kwargs: Any) -> Any:
            path = [one for one in args if isinstance(one, str)][-1]
            if ".history" in path and path.endswith(suffix):
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        patch.setattr(os, function, failed)

    return fail


@pytest.mark.parametrize(
    ("is_new", "fault", "told"),
    [
        (False, failing("link", errno.ENOSPC, ".json"), "No space left on device; free some space"),
        (False, failing("link", errno.ENOSPC, ".journal"), "No space left on device; free some space"),
        (False, failing("link", errno.EMLINK), "Too many links"),
        (False, failing("link", errno.EROFS), "Read-only file system"),
        (False, failing("link", errno.EACCES), "Permission denied; give this user the permission"),
        (True, failing("mkdir", errno.ENOSPC), "No space left on device; free some space"),
    ],
    ids=["snapshot", "journal", "links", "read-only", "permission", "mkdir"],
)
async def test_a_failed_link_fails_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    is_new: bool,
    fault: Any,
    told: str,
) -> None:
    """The checkpoint succeeds. There are one ERROR, a count, and a hole; nothing half-made is left, and the next one is linked."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        if not is_new:
            await checkpoint(state)
        before = [] if is_new else kept(tmp_path)
        await state.set("a", 2)
        with monkeypatch.context() as patch:
            fault(patch)
            await checkpoint(state)
        assert state.status().history_failures == 1
        assert state.status().last_error is None
        assert (kept(tmp_path) if (tmp_path / "lab.history").exists() else []) == before
        (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert HOLE in error.message
        assert told in error.message
        await state.set("a", 3)
        await checkpoint(state)
        assert state.status().history_failures == 1
        assert [file.first for file in kept(tmp_path)][len(before) :] == [2, 2]


async def test_a_failed_sync_of_the_links(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """The links are deleted: no later sync makes their names durable for certain. Then the directory is empty, and goes, too."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        disk.fail("fsync", "above")  # the directory of the history has no lock file
        await checkpoint(state)
        assert not (tmp_path / "lab.history").exists()
        assert state.status().history_failures == 1
        assert state.status().last_error is None
        assert HOLE in caplog.text
        await state.set("a", 2)
        await checkpoint(state)
        assert shown(tmp_path) == ["1s", "1j"]


async def test_a_failure_of_a_new_journal(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that replaces a journal which cannot be linked is durable."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        disk.fail("fdatasync", "lab.journal")
        with pytest.raises(StorageError):
            await state.set("a", 2)
        with monkeypatch.context() as patch:
            failing("link", errno.EIO)(patch)
            await state.flush()
        assert state.status().durable_revision == 2
        assert state.status().history_failures == 1
        await checkpoint(state)
        assert shown(tmp_path) == ["2j*"]


@pytest.mark.parametrize("how", ["deleted", "replaced", "other state"])
async def test_a_journal_of_other_code_is_not_linked(tmp_path: Path, how: str) -> None:
    """A journal that was deleted or replaced while in use cannot be kept. Its file is not put into the history."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
        path = tmp_path / "lab.journal"
        path.unlink()
        if how == "replaced":
            path.write_bytes(b"foreign")
        elif how == "other state":
            path.write_bytes(journal.header("other", "0" * 16, NO_BASE))
        await state.set("a", 2)
        assert state.status().history_failures == (how != "deleted")
        assert not (tmp_path / "lab.history").exists()
        await checkpoint(state)
        assert shown(tmp_path) == ["2j*"]


async def test_a_snapshot_of_other_code_is_not_linked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The journal that followed the snapshot cannot be read without it, so it is left out, too. The other file is kept beside it."""
    await generations(tmp_path, 1)
    async with manager(tmp_path) as state:
        await state.set("a", 2)
        (tmp_path / "lab.json").unlink()
        (tmp_path / "lab.json").write_bytes(b"{}")
        await state.set("a", 3)
        assert state.status().history_failures == 1
        assert "the snapshot that" in caplog.text
        assert "follows is missing" in caplog.text
        await checkpoint(state)
        assert shown(tmp_path) == ["0jnone", "3j*"]


async def test_a_snapshot_that_is_only_in_the_history(tmp_path: Path) -> None:
    """The records of a journal that follows it are kept."""
    await generations(tmp_path, 1)
    async with manager(tmp_path) as state:
        await state.set("a", 2)
        await asyncio.to_thread(link, state)
        (tmp_path / "lab.history" / format_name(kept(tmp_path)[-1])).unlink()
        (tmp_path / "lab.json").unlink()
        await state.set("a", 3)
        assert state.status().history_failures == 0
        assert shown(tmp_path) == ["0jnone", "1s", "1j"]


async def test_a_snapshot_with_another_time(tmp_path: Path) -> None:
    """Its bytes are compared. It is linked if they are ours."""
    await generations(tmp_path, 1)
    async with manager(tmp_path) as state:
        await state.set("a", 2)
        os.utime(tmp_path / "lab.json", ns=(0, 0))
        await state.set("a", 3)
        assert scan(tmp_path).header.base == ANY_BASE
        assert shown(tmp_path) == ["0jnone", "1s", "1j"]


async def test_a_file_that_is_replaced_while_it_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another inode gets the name. The link is deleted."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)

        def swapped(source: str, target: str, *, follow_symlinks: bool) -> None:
            (tmp_path / "other").write_bytes(b"x")
            os.replace(tmp_path / "other", source)  # noqa: PTH105
            link_of_os(source, target, follow_symlinks=follow_symlinks)

        link_of_os = os.link
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", swapped)
            await checkpoint(state)
        assert state.status().history_failures > 0
        assert "was replaced by other code while it was linked" in caplog.text
        assert [path for path in tmp_path.glob("lab.history/*") if path.read_bytes() == b"x"] == []


# Pruning


async def test_old_generations_are_deleted_behind_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two for each new one, the oldest first, the journal before the snapshot."""
    await generations(tmp_path, 4)
    assert shown(tmp_path) == ["0jnone", "1s", "1j", "2s", "2j", "3s", "3j"]
    deleted: list[str] = []
    unlink = os.unlink

    def noted(path: Any, **more: Any) -> None:
        if Path(path).parent.name == "lab.history":
            deleted.append(Path(path).suffix)
        unlink(path, **more)

    now = wall_now()
    monkeypatch.setattr(_keeping, "wall_now", lambda: now + 10 * 3_600_000)
    monkeypatch.setattr(os, "unlink", noted)
    async with manager(tmp_path) as state:
        await state.set("a", 5)
        await checkpoint(state)
        assert shown(tmp_path) == ["2s", "2j", "3s", "3j", "4s", "4j"]
        assert state.status().history_generations == 3
        assert deleted == [".journal", ".journal", ".json"]


async def test_the_size_of_a_history_is_limited(tmp_path: Path) -> None:
    """Of a history that is too large, the newest generations stay, and the state in use."""
    await generations(tmp_path, 6, history_bytes=700)
    status_bytes = sum(path.stat().st_size for path in (tmp_path / "lab.history").iterdir())
    assert 300 < status_bytes <= 700
    assert shown(tmp_path)[-2:] == ["5s", "5j"]


async def test_foreign_files_in_a_history_stay(tmp_path: Path) -> None:
    """They are not counted, and not deleted. Neither is a directory."""
    await generations(tmp_path, 1)
    foreign = [tmp_path / "lab.history" / name for name in ("notes.txt", "5-5-none.journal", ".hidden")]
    for path in foreign:
        path.write_bytes(b"x" * 1000)
    (tmp_path / "lab.history" / "directory").mkdir()
    await generations(tmp_path, 3, history_bytes=1)
    assert all(path.exists() for path in foreign)
    assert (tmp_path / "lab.history" / "directory").is_dir()


async def test_a_failed_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails no checkpoint, and is logged. The next checkpoint tries again."""
    await generations(tmp_path, 3)
    async with manager(tmp_path, history_bytes=1) as state:
        await state.set("a", 9)
        with monkeypatch.context() as patch:
            failing("unlink", errno.EACCES)(patch)
            await checkpoint(state)
        assert state.status().last_error is None
        assert "old files could not be deleted before the next checkpoint: deleting" in caplog.text
        assert shown(tmp_path)[0] == "0jnone"
        await state.set("a", 10)
        await checkpoint(state)
        assert shown(tmp_path)[0] != "0jnone"


async def test_a_file_that_another_process_has_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file is deleted."""
    await generations(tmp_path, 3)
    sizes = _history_files.sizes_in

    def listed(directory: str) -> dict[HistoryFile, int]:
        found = sizes(directory)
        (tmp_path / "lab.history" / format_name(min(found))).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(_history_files, "sizes_in", listed)
    await generations(tmp_path, 1, history_bytes=1)
    assert "0jnone" not in shown(tmp_path)


def test_a_file_that_is_deleted_during_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list has all other files. Otherwise a journal after it would look like one without a snapshot, and would be deleted."""
    names = [f"{number:020}-1-7-ee7d2b8b.json" for number in range(3)]
    for name in names:
        (tmp_path / name).write_bytes(b"1")

    def parsed(name: str) -> HistoryFile | None:
        monkeypatch.undo()
        (tmp_path / name).unlink()
        return parse_name(name)

    monkeypatch.setattr(_history_files, "parse_name", parsed)
    assert len(_history_files.sizes_in(str(tmp_path))) == 2


async def test_the_journal_is_gone_when_generations_are_deleted(tmp_path: Path, disk: Disk) -> None:
    """Nothing is known to be in use then. A rule of the limits still holds."""
    await generations(tmp_path, 2)
    async with manager(tmp_path) as state:
        await state.set("a", 9)
        keeping = flusher(state)._session._writer.history  # type: ignore[attr-defined]
        (tmp_path / "lab.journal").unlink()
        keeping.is_due = True
        await asyncio.to_thread(keeping.prune)
        assert state.status().history_generations == 2
        await state.set("a", 10)


# The start


async def test_a_history_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start says so, and what to do. Nothing is left behind."""

    def refused(source: str, target: str, *, follow_symlinks: bool) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(UnsupportedError, match=r"has no hard links, which a history needs: .*leave out history="):
        await manager(tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["lab.lock"]
    async with Manager(Config(name="lab"), FileStorage(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("code", "error", "told"),
    [
        (errno.EACCES, UnsupportedError, "Permission denied; give this user the permission"),
        (errno.EIO, UnavailableError, "Input/output error; the disk may be failing"),
    ],
)
async def test_a_link_that_cannot_be_tried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, code: int, error: type[StorageError], told: str
) -> None:
    """Another error of the first link has its own remedy."""

    def refused(source: str, target: str, *, follow_symlinks: bool) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(error, match=f"linking a file in {tmp_path} failed: {told}"):
        await manager(tmp_path).start()


async def test_a_full_disk_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Hard links are tried out at the next start."""

    def full(path: str) -> int:
        raise UnavailableError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_directory, "try_out", lambda *_: True)
        patch.setattr(_fs, "create_empty", full)
        async with manager(tmp_path):
            assert "hard links could not be tested" in caplog.text


async def test_hard_links_are_tried_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each storage object and directory."""
    tried: list[str] = []
    real = os.link

    def noted(source: str, target: str, *, follow_symlinks: bool) -> None:
        tried.append(source)
        real(source, target, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "link", noted)
    storage = FileStorage(tmp_path, history=1)
    for name in ("one", "two", "one"):
        async with Manager(name, storage):
            pass
    assert len(tried) == 1


async def test_a_file_in_the_place_of_a_history(tmp_path: Path) -> None:
    """A file, or a symbolic link, is refused."""
    path = tmp_path / "lab.history"
    path.write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"lab\.history must be a directory, .*: move the file away"):
        await manager(tmp_path).start()
    path.unlink()
    path.symlink_to(tmp_path.parent, target_is_directory=True)
    with pytest.raises(UnsupportedError, match=r"lab\.history must be a directory"):
        await manager(tmp_path).start()


async def test_a_history_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard link cannot lead there."""
    (tmp_path / "lab.history").mkdir()
    monkeypatch.setattr(_directory, "is_same_mount", lambda path, other: not path.endswith(".history"))
    with pytest.raises(
        UnsupportedError, match=r"lab\.history is on another device .*: unmount it, or leave out history="
    ):
        await manager(tmp_path).start()


if Tmpfs.can_be_mounted_by_this_user():

    async def test_a_history_on_a_mounted_device(tmp_path: Path) -> None:
        """The start refuses it, and leaves nothing in it."""
        place = tmp_path / "lab.history"
        place.mkdir()
        with Tmpfs(place):
            with pytest.raises(UnsupportedError, match=r"lab\.history is on another device"):
                await manager(tmp_path).start()
            assert list(place.iterdir()) == []


async def test_a_history_without_a_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start says so: a later failure would leave a hole."""
    (tmp_path / "lab.history").mkdir()
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(
        UnsupportedError, match=r"lab\.history failed: Permission denied; give this user the permission"
    ):
        await manager(tmp_path).start()


@pytest.mark.parametrize(
    ("more", "error", "told"),
    [
        ({"history": 0}, ValueError, "history must be above 0"),
        ({"history": "7d"}, TypeError, "history must be a number of seconds, a timedelta or None, not str"),
        ({"history": 1, "history_bytes": 0}, ValueError, "history_bytes must be 1 or more"),
        ({"history": 1, "history_bytes": 1.5}, TypeError, "history_bytes must be an int"),
    ],
)
def test_wrong_settings(tmp_path: Path, *, more: Any, error: type[Exception], told: str) -> None:
    """They are refused when the storage is made."""
    with pytest.raises(error, match=told):
        FileStorage(tmp_path, **more)
