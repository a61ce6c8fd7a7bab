"""Restores of a state on disk: in place, into another name, and the undo."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from file_tools import Disk, kill, start_child
from histories import START, checkpoint

from lab_state import (
    Config,
    CorruptionError,
    FileStorage,
    LockedError,
    Manager,
    MemoryStorage,
    Restored,
    Schema,
    SchemaError,
    StorageError,
    UnavailableError,
    UnsupportedError,
    list_generations,
    read_state,
    restore_state,
)
from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state.storage import _file_restore, _fs, _keeping, _lookup, _new_journal
from lab_state.storage._history import history_of
from lab_state.testing import ManualClock

WEEK = 7 * 24 * 3600


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """Return a clock that gives the times of journals and of pruning, too."""
    clock = ManualClock(START)
    for module in (_new_journal, _keeping):
        monkeypatch.setattr(module, "wall_now", lambda: int(clock.time() * 1000))
    return clock


@pytest.fixture(params=[True, False], ids=["history", "no history"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> FileStorage:
    """Return a storage with a history, and one without. In both, the moments since the last checkpoint can be restored."""
    return FileStorage(tmp_path, history=WEEK if request.param else None)


async def fill(storage: FileStorage, clock: ManualClock, *, name: str = "lab") -> dict[int, dict[str, Any]]:
    """Make three revisions after each of two checkpoints. Return their values. The last three are after the last checkpoint."""
    model = {}
    async with Manager(name, storage, clock=clock) as state:
        for generation in range(2):
            for number in range(3):
                clock.advance(1)
                await state.set(f"key-{number}", [generation, number])
                await state.flush()
                model[state.revision] = await state.get_all()
            if not generation:
                await checkpoint(state)
        directory = Path(storage._directory)
        copy = Path(shutil.copytree(directory, directory.with_name(f"{directory.name}-copy")))
    shutil.rmtree(directory)
    copy.rename(directory)  # so the files are those of a killed process
    return model


async def values(storage: FileStorage, clock: ManualClock, name: str = "lab", **options: Any) -> dict[str, Any]:
    return await (await read_state(name, storage, clock=clock, **options)).get_all()


async def test_in_place_and_the_undo(storage: FileStorage, clock: ManualClock) -> None:
    """The restored state is a new revision. The undo is the next one. The manager continues with both."""
    model = await fill(storage, clock)
    assert await restore_state("lab", storage, 4, into="lab", clock=clock) == Restored(7, 6)
    async with Manager("lab", storage, clock=clock) as state:
        assert (state.revision, state.durable_revision, await state.get_all()) == (7, 7, model[4])
    assert await restore_state("lab", storage, 6, into="lab", clock=clock) == Restored(8, 7)
    async with Manager("lab", storage, clock=clock) as state:
        assert (state.revision, await state.get_all()) == (8, model[6])
        await state.set("new", 1)
        assert state.revision == 9


async def test_by_time(storage: FileStorage, clock: ManualClock) -> None:
    """An aware time is a moment, too."""
    model = await fill(storage, clock)
    at = datetime.fromtimestamp(START + 5.5, UTC)
    assert (await restore_state("lab", storage, at, into="lab", clock=clock)).revision == 7
    assert await values(storage, clock) == model[5]


async def test_the_files_after_a_restore(storage: FileStorage, clock: ManualClock, tmp_path: Path) -> None:
    """A checkpoint follows: the snapshot is one of a clean stop, and no temporary file is left. The history shares no file in use."""
    await fill(storage, clock)
    await restore_state("lab", storage, 4, into="lab", clock=clock)
    member = json.loads((tmp_path / "lab.json").read_bytes())["$lab_state"]
    assert (member["revision"], "followed" in member) == (7, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lab.history", "lab.journal", "lab.json", "lab.lock"]
    assert all(path.stat().st_nlink == 1 for path in tmp_path.glob("lab.j*"))


async def test_the_history_after_a_restore(storage: FileStorage, clock: ManualClock) -> None:
    """There is no hole at the restored state, and each moment before it can still be read."""
    model = await fill(storage, clock)
    await restore_state("lab", storage, 4, into="lab", clock=clock)
    found = await list_generations("lab", storage)
    assert [one.hole_before for one in found] == [False] * len(found)
    assert (found[-1].first_revision, found[-1].in_use) == (7, True)
    for revision in range(found[0].first_revision or 1, 7):
        assert await values(storage, clock, at=revision) == model[revision]


async def test_expiry(clock: ManualClock, tmp_path: Path) -> None:
    """A restore keeps expiry times, and drops the keys that have expired since. The undo brings the same times back."""
    storage = FileStorage(tmp_path, history=WEEK)
    async with Manager("lab", storage, clock=clock) as state:
        await state.set("short", 1, ttl=10)
        await state.set("long", 1, ttl=1000)
        await state.set("ever", 1)
        await state.flush()
        before = await state.expires_in("long")
        await state.set("long", 2, ttl=5000)
        await state.flush()
        clock.advance(100)
    restored = await restore_state("lab", storage, 3, into="lab", clock=clock)
    view = await read_state("lab", storage, clock=clock)
    assert before is not None
    assert (await view.get_all(), await view.expires_in("long")) == ({"long": 1, "ever": 1}, before - 100)
    clock.advance(100)
    assert restored.before is not None
    await restore_state("lab", storage, restored.before, into="lab", clock=clock)
    view = await read_state("lab", storage, clock=clock)
    assert (await view.get_all(), await view.expires_in("long")) == ({"long": 2, "ever": 1}, 5000 - 200)


async def test_the_undo_of_a_migration(clock: ManualClock, tmp_path: Path) -> None:
    """The restored state has the version that it had at the moment. So older code can start it again, and newer code migrates it."""
    storage = FileStorage(tmp_path, history=WEEK)
    async with Manager("lab", storage, clock=clock) as state:
        await state.set("a", 1)
    schema = Schema(2)
    schema.migration(to=2)(lambda draft: draft.set("a", 2))
    async with Manager("lab", storage, clock=clock, schema=schema) as state:
        assert (state.revision, await state.get("a")) == (2, 2)
    with pytest.raises(SchemaError):
        await Manager("lab", storage, clock=clock, schema=Schema(1)).start()
    await restore_state("lab", storage, 1, into="lab", clock=clock)
    async with Manager("lab", storage, clock=clock, schema=Schema(1)) as state:
        assert (state.revision, await state.get("a")) == (3, 1)
    async with Manager("lab", storage, clock=clock, schema=schema) as state:
        assert (state.revision, await state.get("a")) == (4, 2)


async def test_the_time_of_the_state_goes_on(clock: ManualClock, tmp_path: Path) -> None:
    """The clock was set back after the moment. The state's own time goes on from the present, not from the moment."""
    storage = FileStorage(tmp_path, history=WEEK)
    async with Manager("lab", storage, clock=clock) as state:
        await state.set("a", 1, ttl=1000)
        await state.flush()
        clock.advance(400)
        clock.jump(-300)
        await state.set("b", 1)
        await state.flush()
    await restore_state("lab", storage, 1, into="lab", clock=clock)
    view = await read_state("lab", storage, clock=clock)
    assert await view.expires_in("a") == pytest.approx(600)


async def test_into_another_name(storage: FileStorage, clock: ManualClock) -> None:
    """A new state with the revision of the moment, made while a manager runs on the first one."""
    model = await fill(storage, clock)
    async with Manager("lab", storage, clock=clock):
        assert await restore_state("lab", storage, 4, into="copy", clock=clock) == Restored(4, None)
        assert await values(storage, clock, "copy") == model[4]
        view = await read_state("copy", storage, clock=clock)
        assert view.revision == 4
    assert await values(storage, clock) == model[6]


@pytest.mark.parametrize("there", ["copy.json", "copy.journal", "copy.history"])
async def test_into_a_name_that_exists(storage: FileStorage, clock: ManualClock, tmp_path: Path, there: str) -> None:
    """A file or a history is enough. Nothing is changed, and the lock is released."""
    await fill(storage, clock)
    (tmp_path / there).mkdir() if there.endswith("history") else (tmp_path / there).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"'copy' exists: .*{there} is there; restore into another name"):
            await restore_state("lab", storage, 4, into="copy", clock=clock)


async def test_into_a_state_without_a_snapshot(storage: FileStorage, clock: ManualClock, tmp_path: Path) -> None:
    """Its records are in its journal. A journal without records is that of a state that was never written."""
    await fill(storage, clock)
    start = journal.header("copy", "salt", NO_BASE)
    record = journal.frame("salt", FrameKind.RECORD, b'{"from":0,"to":1,"clear":false,"set":{},"delete":[]}')
    (tmp_path / "copy.journal").write_bytes(start + record)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'copy' exists: .*copy.journal is there"):
            await restore_state("lab", storage, 4, into="copy", clock=clock)
    (tmp_path / "copy.journal").write_bytes(start)
    await restore_state("lab", storage, 4, into="copy", clock=clock)


async def test_into_a_state_whose_journal_has_the_whole_state(
    storage: FileStorage, clock: ManualClock, tmp_path: Path
) -> None:
    """A writer that was killed after a failed write may leave such a journal without a snapshot. Nothing is changed."""
    await fill(storage, clock)
    async with Manager("copy", FileStorage(tmp_path / "other"), clock=clock) as state:
        await state.set("mine", 1)
    whole = journal.frame("salt", FrameKind.FULL, (tmp_path / "other/copy.json").read_bytes())
    (tmp_path / "copy.journal").write_bytes(journal.header("copy", "salt", ANY_BASE) + whole)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'copy' exists: .*copy.journal is there"):
            await restore_state("lab", storage, 4, into="copy", clock=clock)
    assert await values(storage, clock, "copy") == {"mine": 1}


async def test_a_name_that_cannot_be_looked_up(
    storage: FileStorage, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised, and the lock is released."""
    await fill(storage, clock)
    fingerprint = _lookup.fingerprint

    def refused(path: str) -> object:
        if path.endswith("copy.history"):
            raise UnavailableError(f"looking up {path} failed")
        return fingerprint(path)

    with monkeypatch.context() as patch:
        patch.setattr(_lookup, "fingerprint", refused)
        with pytest.raises(UnavailableError, match="looking up"):
            await restore_state("lab", storage, 4, into="copy", clock=clock)
    await restore_state("lab", storage, 4, into="copy", clock=clock)


async def test_a_link_in_place_of_a_file(storage: FileStorage, clock: ManualClock, tmp_path: Path) -> None:
    """A reader follows it, and a writer refuses it. The lock is released."""
    await fill(storage, clock)
    (tmp_path / "lab.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "lab.json").symlink_to(tmp_path / "elsewhere.json")
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="symbolic link"):
            await restore_state("lab", storage, 4, into="lab", clock=clock)


async def test_a_second_release(storage: FileStorage, clock: ManualClock, tmp_path: Path) -> None:
    """It does nothing. The state is free after the first one."""
    await fill(storage, clock)
    restoring = await history_of(storage).restoring("lab")
    assert restoring.path == str(tmp_path / "lab.json")
    await restoring.aclose()
    async with Manager("lab", storage, clock=clock):
        await restoring.aclose()


async def test_a_state_that_runs_here(storage: FileStorage, clock: ManualClock) -> None:
    """In place, and as the target of another one: the lock is held."""
    model = await fill(storage, clock)
    async with Manager("lab", storage, clock=clock) as state, Manager("copy", storage, clock=clock):
        for into in ("lab", "copy"):
            with pytest.raises(LockedError, match="is locked by"):
                await restore_state("lab", storage, 4, into=into, clock=clock)
        assert await state.get_all() == model[6]


async def test_a_shared_state_that_runs(storage: FileStorage, clock: ManualClock) -> None:
    """Its owner holds the same lock."""
    await fill(storage, clock)
    async with Manager(Config(name="lab", shared=True), storage):
        with pytest.raises(LockedError):
            await restore_state("lab", storage, 4, into="lab", clock=clock)


async def test_a_state_that_runs_in_another_process(tmp_path: Path) -> None:
    """The lock of another process is respected."""
    child = start_child("serve", tmp_path)
    try:
        with pytest.raises(LockedError, match=str(child.pid)):
            await restore_state("lab", FileStorage(tmp_path), 0, into="lab")
    finally:
        kill(child)


async def test_two_restores_at_once(storage: FileStorage, clock: ManualClock) -> None:
    """One of them gets the lock, and the other one is refused."""
    model = await fill(storage, clock)
    calls = [restore_state("lab", storage, number, into="lab", clock=clock) for number in (4, 5)]
    first, second = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted((type(first), type(second)), key=str) == sorted((Restored, LockedError), key=str)
    assert await values(storage, clock) == model[4 if isinstance(first, Restored) else 5]


@pytest.mark.parametrize(
    ("at", "error"),
    [
        (99, ValueError),
        (datetime(2023, 1, 1), ValueError),  # noqa: DTZ001 -- this is the subject
        (datetime(2023, 1, 1, tzinfo=UTC), ValueError),
        (True, TypeError),
        ("r4", TypeError),
    ],
)
async def test_a_moment_that_is_refused(
    storage: FileStorage, clock: ManualClock, tmp_path: Path, at: Any, error: type[Exception]
) -> None:
    """Nothing is changed, and the lock is released."""
    model = await fill(storage, clock)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")}
    for into in ("lab", "copy"):
        with pytest.raises(error):
            await restore_state("lab", storage, at, into=into, clock=clock)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")} == before
    async with Manager("lab", storage, clock=clock) as state:
        assert await state.get_all() == model[6]


async def test_no_state(storage: FileStorage, tmp_path: Path) -> None:
    """Not even a lock file is made."""
    for into in ("lab", "copy"):
        with pytest.raises(UnsupportedError, match="there is no state"):
            await restore_state("lab", storage, 1, into=into)
    assert list(tmp_path.iterdir()) == []


async def test_memory() -> None:
    """It keeps no history."""
    with pytest.raises(UnsupportedError, match="keeps no history"):
        await restore_state("lab", MemoryStorage(), 1, into="lab")


async def test_create_false_makes_the_new_state(storage: FileStorage, clock: ManualClock, tmp_path: Path) -> None:
    """`create=False` protects against a volume that is not mounted. Here the directory is there."""
    await fill(storage, clock)
    careful = FileStorage(tmp_path, create=False)
    await restore_state("lab", careful, 4, into="copy", clock=clock)
    assert (await read_state("copy", careful)).revision == 4


# States that cannot be loaded


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


async def damaged(tmp_path: Path, clock: ManualClock) -> tuple[FileStorage, dict[int, dict[str, Any]]]:
    storage = FileStorage(tmp_path, history=WEEK)
    return storage, await fill(storage, clock)


async def test_the_error_names_the_newest_good_generation(tmp_path: Path, clock: ManualClock) -> None:
    """The start and a read say which call restores the state. That call does."""
    storage, model = await damaged(tmp_path, clock)
    flip(tmp_path / "lab.journal", -100)
    flip(tmp_path / "lab.journal", 150)
    text = r"The newest good generation ends at revision 3 \(2023-11-14T22:13:23.000\+00:00\); `await restore_state\('lab', storage, 3, into='lab'\)` restores it"
    with pytest.raises(CorruptionError, match=text):
        await Manager("lab", storage, clock=clock).start()
    with pytest.raises(CorruptionError, match=text):
        await read_state("lab", storage, clock=clock)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")}
    restored = await restore_state("lab", storage, 3, into="lab", clock=clock)
    assert restored.before is None
    assert restored.revision > 4
    assert await values(storage, clock) == model[3]
    (kept,) = tmp_path.glob("lab.damaged-*")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == files
    assert kept.stat().st_mode & 0o777 == 0o700


async def test_the_error_passes_over_damaged_generations(tmp_path: Path, clock: ManualClock) -> None:
    """If no generation is good, or there is no history, the error is the one of the state."""
    storage, _ = await damaged(tmp_path, clock)
    flip(tmp_path / "lab.json", 5)
    (link,) = (tmp_path / "lab.history").iterdir()
    flip(link, 200)
    with pytest.raises(CorruptionError) as raised:
        await Manager("lab", storage, clock=clock).start()
    assert "newest good" not in str(raised.value)
    memory = MemoryStorage()
    async with Manager("lab", memory):
        pass
    memory.places["lab"].snapshot = b"{"
    with pytest.raises(CorruptionError) as raised:
        await Manager("lab", memory).start()
    assert "newest good" not in str(raised.value)


async def test_the_revision_of_a_damaged_state_is_not_used_again(tmp_path: Path, clock: ManualClock) -> None:
    """Its last valid frame counts, also behind the damage."""
    storage, _ = await damaged(tmp_path, clock)
    path = tmp_path / "lab.journal"
    flip(path, path.read_bytes().index(b'{"from"') + 2)
    assert (await restore_state("lab", storage, 2, into="lab", clock=clock)).revision == 7


@pytest.mark.parametrize("name", ["lab.json", "lab.journal"])
async def test_one_file_is_missing(tmp_path: Path, clock: ManualClock, name: str) -> None:
    """The other one is kept, and the state is restored."""
    storage, model = await damaged(tmp_path, clock)
    (tmp_path / name).unlink()
    await restore_state("lab", storage, 2, into="lab", clock=clock)
    assert await values(storage, clock) == model[2]
    (kept,) = tmp_path.glob("lab.damaged-*")
    assert len(list(kept.iterdir())) == 1


async def test_both_files_are_missing(tmp_path: Path, clock: ManualClock) -> None:
    """There is nothing to keep. The revision is above those of the history."""
    storage, model = await damaged(tmp_path, clock)
    for name in ("lab.json", "lab.journal"):
        (tmp_path / name).unlink()
    assert await restore_state("lab", storage, 2, into="lab", clock=clock) == Restored(4, None)
    assert await values(storage, clock) == model[2]
    assert list(tmp_path.glob("lab.damaged-*")) == []


async def test_two_damaged_states_in_the_same_millisecond(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets a directory of its own."""
    storage, _ = await damaged(tmp_path, clock)
    monkeypatch.setattr(_file_restore, "wall_now", lambda: 5)
    for _ in range(2):
        (tmp_path / "lab.json").write_bytes(b"{")
        await restore_state("lab", storage, 2, into="lab", clock=clock)
    assert sorted(path.name for path in tmp_path.glob("lab.damaged-*")) == ["lab.damaged-5", "lab.damaged-6"]


async def test_damaged_files_are_copied_without_links(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without hard links is no reason to refuse the restore."""
    storage, model = await damaged(tmp_path, clock)
    (tmp_path / "lab.json").write_bytes(b"{")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    await restore_state("lab", FileStorage(tmp_path), 2, into="lab", clock=clock)
    monkeypatch.undo()
    assert await values(storage, clock) == model[2]
    (kept,) = tmp_path.glob("lab.damaged-*")
    assert (kept / "lab.json").read_bytes() == b"{"


async def test_damaged_files_that_cannot_be_kept(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is replaced, and no half of a directory is left."""
    storage, _ = await damaged(tmp_path, clock)
    (tmp_path / "lab.json").write_bytes(b"{")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")}
    link = os.link

    def refuse(path: str, target: str, **options: Any) -> None:
        if target.endswith(".journal"):
            raise OSError(errno.EIO, "broken")
        link(path, target, **options)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"linking a damaged file to .*journal failed"):
        await restore_state("lab", storage, 2, into="lab", clock=clock)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")} == before
    assert list(tmp_path.glob("lab.damaged-*")) == []


async def test_a_snapshot_that_only_a_checkpoint_frame_names(clock: ManualClock, tmp_path: Path) -> None:
    """A crash between the two renames of a checkpoint, without a history: the undo needs the records of the old journal."""
    storage = FileStorage(tmp_path)
    model = await fill(storage, clock)
    data = (tmp_path / "lab.journal").read_bytes()
    salt = journal.scan(data, "lab", "").header.salt
    async with Manager("lab", FileStorage(tmp_path / "other"), clock=clock) as state:
        for _ in range(5):
            await state.set("a", 1)
    # The snapshot of a checkpoint whose view was taken at revision 5.
    shutil.copy(tmp_path / "other/lab.json", tmp_path / "lab.json")
    snapshot = (tmp_path / "lab.json").read_bytes()
    base = _file_restore._base_of(snapshot)
    (tmp_path / "lab.journal").write_bytes(data + journal.frame(salt, FrameKind.CHECKPOINT, base.encode()))
    present = await values(storage, clock)
    assert model
    restored = await restore_state("lab", storage, 5, into="lab", clock=clock)
    assert restored == Restored(7, 6)
    await restore_state("lab", storage, 6, into="lab", clock=clock)
    assert await values(storage, clock) == present


# Faults and cancellation


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Return a disk whose calls can fail."""
    disk = Disk()
    monkeypatch.setattr(_fs, "os", disk)
    return disk


async def test_a_damaged_generation(storage: FileStorage, clock: ManualClock, tmp_path: Path) -> None:
    """Its moments cannot be restored. The error names the file, and nothing is changed."""
    await fill(storage, clock)
    await restore_state("lab", storage, 4, into="lab", clock=clock)
    kept = next(path for path in (tmp_path / "lab.history").iterdir() if path.suffix == ".json")
    kept.write_bytes(kept.read_bytes().replace(b"key-1", b"key-7"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")}
    for into in ("lab", "copy"):
        with pytest.raises(CorruptionError, match=re.escape(str(kept))):
            await restore_state("lab", storage, 5, into=into, clock=clock)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")} == before
    assert not (tmp_path / "copy.json").exists()
    assert (await restore_state("lab", storage, 7, into="lab", clock=clock)).revision == 8


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EROFS, "Read-only file system"),
        (errno.EPERM, r"is not restored in place, because .* \(Operation not permitted\): restore into another name"),
    ],
)
async def test_files_that_cannot_be_linked(
    clock: ManualClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int, told: str
) -> None:
    """The state before could not be read any more, so nothing is replaced. The next restore succeeds."""
    storage = FileStorage(tmp_path)
    model = await fill(storage, clock)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(StorageError, match=told):
            await restore_state("lab", storage, 4, into="lab", clock=clock)
        assert (await restore_state("lab", storage, 4, into="copy", clock=clock)).revision == 4
    assert {path.name: path.read_bytes() for path in tmp_path.glob("lab.j*")} == before
    assert not (tmp_path / "lab.history").exists()
    assert await restore_state("lab", storage, 4, into="lab", clock=clock) == Restored(7, 6)
    assert await values(storage, clock) == model[4]


async def test_a_file_in_the_place_of_the_history(clock: ManualClock, tmp_path: Path) -> None:
    """The error says what to do, and nothing is replaced."""
    storage = FileStorage(tmp_path)
    model = await fill(storage, clock)
    (tmp_path / "lab.history").touch()
    with pytest.raises(UnsupportedError, match=r"lab\.history must be a directory"):
        await restore_state("lab", storage, 4, into="lab", clock=clock)
    assert await values(storage, clock) == model[6]


async def test_a_failed_write(storage: FileStorage, clock: ManualClock, disk: Disk) -> None:
    """The state before is there, and the next restore succeeds."""
    model = await fill(storage, clock)
    disk.fail("replace", "lab.journal")
    with pytest.raises(UnavailableError):
        await restore_state("lab", storage, 4, into="lab", clock=clock)
    assert await values(storage, clock) == model[6]
    assert await restore_state("lab", storage, 4, into="lab", clock=clock) == Restored(7, 6)


async def test_a_failed_checkpoint(
    storage: FileStorage, clock: ManualClock, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal has the restored state, so the restore has succeeded. The log says what is left to do."""
    model = await fill(storage, clock)
    disk.fail("replace", "lab.json")
    assert await restore_state("lab", storage, 4, into="lab", clock=clock) == Restored(7, 6)
    assert "is restored, but the next start has to write its snapshot" in caplog.text
    assert await values(storage, clock) == model[4]
    async with Manager("lab", storage, clock=clock) as state:
        assert (state.revision, await state.get_all()) == (7, model[4])


async def test_a_failed_restore_into_another_name(storage: FileStorage, clock: ManualClock, disk: Disk) -> None:
    """The other state does not exist, and the next restore makes it."""
    model = await fill(storage, clock)
    disk.fail("replace", "copy.json")
    with pytest.raises(UnavailableError):
        await restore_state("lab", storage, 4, into="copy", clock=clock)
    await restore_state("lab", storage, 4, into="copy", clock=clock)
    assert await values(storage, clock, "copy") == model[4]


async def test_a_cancelled_restore(storage: FileStorage, clock: ManualClock, disk: Disk) -> None:
    """The call in the thread ends before the lock is released. The state is the restored one or the one before."""
    model = await fill(storage, clock)
    for function, name, expected in (("fsync", "lab.journal", 6), ("replace", "lab.journal", 4)):
        gate = disk.hold(function, name)
        restoring = asyncio.create_task(restore_state("lab", storage, 4, into="lab", clock=clock))
        await gate.entered()
        restoring.cancel()
        await asyncio.sleep(0)
        with pytest.raises(LockedError):
            await Manager("lab", storage, clock=clock).start()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await restoring
        assert await values(storage, clock) == model[expected]
        async with Manager("lab", storage, clock=clock) as state:
            assert await state.get_all() == model[expected]
