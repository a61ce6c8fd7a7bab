"""The list of the states of a storage, and their removal."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from file_tools import kill, start_child
from histories import checkpoint

from lab_state import (
    Config,
    CorruptionError,
    FileStorage,
    LockedError,
    Manager,
    MemoryStorage,
    StateInfo,
    StorageError,
    UnavailableError,
    UnsupportedError,
    list_generations,
    list_states,
    read_state,
    remove_state,
    restore_state,
)
from lab_state.storage import _lookup

WEEK = 7 * 24 * 3600


async def fill(storage: FileStorage | MemoryStorage, name: str = "lab") -> None:
    async with Manager(name, storage) as state:
        for number in range(3):
            await state.set("a", number)
            await state.flush()
            await checkpoint(state)


async def test_the_states_of_a_directory(tmp_path: Path) -> None:
    """Each has its size, the size of its history, and its holder. The order is that of the names."""
    storage = FileStorage(tmp_path, history=WEEK)
    await fill(storage)
    await fill(FileStorage(tmp_path), "b.c")
    (tmp_path / "imported.json").write_text('{"a":1}')
    async with Manager("a", storage):
        found = await list_states(storage)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    history = sum(file.stat().st_size for file in (tmp_path / "lab.history").iterdir())
    assert [one[:4] for one in found] == [
        ("a", 0, 0, True),
        ("b.c", sizes["b.c.json"] + sizes["b.c.journal"], 0, found[1].live),
        ("imported", 7, 0, False),
        ("lab", sizes["lab.json"] + sizes["lab.journal"], history, found[3].live),
    ]
    assert found[0].holder is not None
    assert found[0].holder.startswith(f"pid {os.getpid()} on ")
    assert {one.holder for one in found[1:]} == {None}


async def test_a_linked_file_in_use_is_not_counted_twice(tmp_path: Path) -> None:
    """A crash after the link of a checkpoint leaves such a file."""
    storage = FileStorage(tmp_path, history=WEEK)
    await fill(storage)
    (before,) = await list_states(storage)
    (tmp_path / "lab.history" / f"{9:020}-1-7-ee7d2b8b.json").hardlink_to(tmp_path / "lab.json")
    assert await list_states(storage) == [before]


async def test_other_files_are_no_states(tmp_path: Path) -> None:
    """Directories, files with other names, and files that are gone when they are looked at."""
    (tmp_path / "dir.json").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "x.json.replaced-1").touch()
    (tmp_path / "-x.json").touch()
    (tmp_path / "file.history").touch()
    (tmp_path / "empty.history").mkdir()
    assert await list_states(FileStorage(tmp_path)) == []


async def test_a_removed_state_with_a_history_is_listed(tmp_path: Path) -> None:
    """So the operator sees what still needs room."""
    storage = FileStorage(tmp_path, history=WEEK)
    await fill(storage)
    await remove_state("lab", storage)
    (tmp_path / "lab.lock").unlink()
    (found,) = await list_states(storage)
    assert (found.name, found.size, found.live) == ("lab", 0, False)
    assert found.history_size > 0


async def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    """The error says so. A missing directory is not an empty one."""
    with pytest.raises(UnsupportedError, match="there is no directory"):
        await list_states(FileStorage(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["", "lab.history"])
async def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The error of the system is reported."""
    await fill(FileStorage(tmp_path, history=WEEK))
    names_in = _lookup.names_in

    def refuse(path: str) -> list[str]:
        if path == str(tmp_path / name):
            raise UnavailableError(f"listing {path} failed")
        return names_in(path)

    monkeypatch.setattr(_lookup, "names_in", refuse)
    with pytest.raises(UnavailableError, match="listing"):
        await list_states(FileStorage(tmp_path))


async def test_removal_without_a_history(tmp_path: Path) -> None:
    """Nothing but the lock is left. The name can be used again."""
    storage = FileStorage(tmp_path)
    await fill(storage)
    for name in ("lab.json.0123abcd.tmp", "lab.journal.torn-1", "lab.json.replaced-2", "lab.sock"):
        (tmp_path / name).touch()
    for name in ("lab2.journal.torn-1", "notes"):
        (tmp_path / name).touch()
    await remove_state("lab", storage)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lab.lock", "lab2.journal.torn-1", "notes"]
    with pytest.raises(UnsupportedError, match="there is no state"):
        await remove_state("lab", storage)
    async with Manager("lab", storage) as state:
        assert (state.revision, len(state)) == (0, 0)


async def test_a_removed_state_can_be_restored(tmp_path: Path) -> None:
    """The last generation goes into the history first."""
    storage = FileStorage(tmp_path, history=WEEK)
    await fill(storage)
    await remove_state("lab", storage)
    assert (await list_generations("lab", storage))[-1].last_revision == 3
    restored = await restore_state("lab", storage, 3, into="lab")
    assert (restored.revision, restored.before) == (4, None)
    assert await (await read_state("lab", storage)).get("a") == 2


async def test_a_removal_begins_a_history(tmp_path: Path) -> None:
    """The last generation is kept if the storage keeps a history, even if the state has no history yet."""
    await fill(FileStorage(tmp_path))
    storage = FileStorage(tmp_path, history=WEEK)
    await remove_state("lab", storage)
    assert (await list_generations("lab", storage))[-1].last_revision == 3
    assert await (await read_state("lab", storage, at=3)).get("a") == 2


async def test_removal_with_the_history(tmp_path: Path) -> None:
    """Foreign files stay, and their directory with them."""
    storage = FileStorage(tmp_path, history=WEEK)
    for left in ([], ["lab.history"]):
        await fill(storage)
        for name in left:
            (tmp_path / name / "mine").touch()
        await remove_state("lab", storage, history=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "lab.lock"]
    assert [path.name for path in (tmp_path / "lab.history").iterdir()] == ["mine"]


async def test_a_damaged_state_can_be_removed(tmp_path: Path) -> None:
    """It does not go into the history. Kept files of an earlier restore stay until a person deletes them."""
    storage = FileStorage(tmp_path, history=WEEK)
    await fill(storage)
    before = len(list((tmp_path / "lab.history").iterdir()))
    (tmp_path / "lab.journal").write_bytes(b"damaged")
    (tmp_path / "lab.damaged-1").mkdir()
    await remove_state("lab", storage)
    assert len(list((tmp_path / "lab.history").iterdir())) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lab.damaged-1", "lab.history", "lab.lock"]


async def test_a_state_without_the_snapshot_that_its_journal_follows_can_be_removed(tmp_path: Path) -> None:
    """It is damaged, too. Each further call failed in the same way before."""
    await fill(FileStorage(tmp_path))
    async with Manager("lab", FileStorage(tmp_path)) as state:
        await state.set("a", 9)
        await state.flush()
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy/lab.journal").write_bytes((tmp_path / "lab.journal").read_bytes())
    await remove_state("lab", FileStorage(tmp_path / "copy", history=WEEK))
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["lab.lock"]


@pytest.mark.parametrize("shared", [False, True])
async def test_a_state_that_runs(tmp_path: Path, *, shared: bool) -> None:
    """It is not removed, whether it is shared or not."""
    storage = FileStorage(tmp_path)
    async with Manager(Config(name="lab", shared=shared), storage) as state:
        await state.set("a", 1)
        await state.flush()
        with pytest.raises(LockedError):
            await remove_state("lab", storage)
        assert await state.get("a") == 1


async def test_a_state_that_runs_in_another_process(tmp_path: Path) -> None:
    """The message names that process, and so does the list."""
    child = start_child("serve", tmp_path)
    try:
        with pytest.raises(LockedError, match=str(child.pid)):
            await remove_state("lab", FileStorage(tmp_path))
        (found,) = await list_states(FileStorage(tmp_path))
        assert (found.live, str(child.pid) in str(found.holder)) == (True, True)
    finally:
        kill(child)


async def test_a_removal_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start refuses what is left, so no older state opens without a word. The next removal ends it."""
    storage = FileStorage(tmp_path)
    async with Manager("lab", storage) as state:
        await state.set("a", 1)
    async with Manager("lab", storage) as state:
        await state.set("a", 2)
        await state.flush()
        journal = (tmp_path / "lab.journal").read_bytes()
        snapshot = (tmp_path / "lab.json").read_bytes()
    (tmp_path / "lab.journal").write_bytes(journal)
    (tmp_path / "lab.json").write_bytes(snapshot)
    unlink = os.unlink

    def refuse(path: str) -> None:
        if path.endswith(".journal"):
            raise OSError(errno.EIO, "broken")
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        with pytest.raises(StorageError, match=r"deleting .*lab.journal failed"):
            await remove_state("lab", storage)
    with pytest.raises(CorruptionError, match="is missing"):
        await Manager("lab", storage).start()
    await remove_state("lab", storage)
    assert await list_states(storage) == [StateInfo("lab", 0, 0, (await list_states(storage))[0].live, None)]


async def test_names_are_checked(tmp_path: Path) -> None:
    """A name that leads out of the directory is refused."""
    with pytest.raises(ValueError, match="out of bounds"):
        await remove_state("../lab", FileStorage(tmp_path))


async def test_memory() -> None:
    """Its states are listed and removed, too. There is no history."""
    storage = MemoryStorage()
    await fill(storage)
    async with Manager("open", storage):
        with pytest.raises(LockedError, match="stop its manager first"):
            await remove_state("open", storage)
        found = await list_states(storage)
    assert [(one.name, one.history_size, one.live, one.holder) for one in found] == [
        ("lab", 0, False, None),
        ("open", 0, True, f"pid {os.getpid()}"),
    ]
    assert found[0].size > 0
    await remove_state("lab", storage, history=True)
    with pytest.raises(UnsupportedError, match="there is no state at memory:lab"):
        await remove_state("lab", storage)


async def test_a_file_that_cannot_be_looked_up_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that cannot be looked up is not left out."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr(_lookup, "names_in", lambda _: ["lab.json"])
    with pytest.raises(UnsupportedError, match=r"looking up .*lab.json failed: .*loop of symbolic links"):
        await list_states(FileStorage(tmp_path / "loop"))


async def test_a_file_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was in the directory, and was deleted before it was looked at."""
    names: Any = {str(tmp_path): ["gone.json"]}
    monkeypatch.setattr(_lookup, "names_in", lambda path: names[path])
    names[str(tmp_path / "gone.history")] = [f"{9:020}-1-7-ee7d2b8b.json"]
    assert await list_states(FileStorage(tmp_path)) == []
