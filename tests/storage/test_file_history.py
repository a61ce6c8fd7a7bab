"""Earlier moments of a state on disk: the list of generations, and reads of one moment."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from histories import START, checkpoint, link_files, make_history
from running import flusher_of

from lab_state import (
    CorruptionError,
    FileStorage,
    Generation,
    Manager,
    MemoryStorage,
    Reading,
    UnavailableError,
    UnsupportedError,
    _past,
    list_generations,
    read_state,
    remove_state,
    restore_state,
)
from lab_state import _journal as journal
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state.storage import _file_history, _lookup, _new_journal
from lab_state.storage._directory import Paths
from lab_state.storage._generations import parse_name
from lab_state.storage._history import FoundGeneration, Listing, history_of
from lab_state.storage._history_files import link_present
from lab_state.testing import ManualClock

NAIVE = datetime(2023, 11, 14, 22, 13, 20)  # noqa: DTZ001 -- this is the subject


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """Return a clock that gives the times of journals, too."""
    clock = ManualClock(START)
    monkeypatch.setattr(_new_journal, "wall_now", lambda: int(clock.time() * 1000))
    return clock


def history(directory: Path) -> list[Path]:
    return sorted((directory / "lab.history").iterdir())


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(START + seconds, UTC)


async def get(directory: Path, clock: ManualClock, moment: int | datetime) -> tuple[int, dict[str, Any]]:
    view = await read_state("lab", FileStorage(directory), at=moment, clock=clock)
    return view.revision, await view.get_all()


async def test_each_moment(tmp_path: Path, clock: ManualClock) -> None:
    """By its revision, and by its time and half a second later, in a stopped state. The view says where it is."""
    model = await make_history(tmp_path, clock)
    assert sorted(model) == list(range(1, 13))
    for revision, (time, values) in model.items():
        for moment in (revision, datetime.fromtimestamp(time, UTC), datetime.fromtimestamp(time + 0.5, UTC)):
            view = await read_state("lab", FileStorage(tmp_path), at=moment, clock=clock)
            assert (view.revision, view.durable_revision, await view.get_all()) == (revision, revision, values)
            assert view.live is not True
    assert await get(tmp_path, clock, 0) == (0, {})


async def test_the_list(tmp_path: Path, clock: ManualClock) -> None:
    """It has the first and the last moment of each generation, their bytes, and the one in use last."""
    await make_history(tmp_path, clock)
    found = await list_generations("lab", FileStorage(tmp_path))
    assert [(one.first_revision, one.last_revision, one.hole_before, one.in_use) for one in found] == [
        (0, 4, False, False),
        (4, 8, False, False),
        (8, 12, False, False),
        (12, 12, False, True),
    ]
    assert [one.last_wall for one in found[:3]] == [START + 4, START + 9, START + 14]
    assert found[1].first_wall == START + 5
    assert sum(one.size for one in found[:3]) == sum(file.stat().st_size for file in history(tmp_path))
    assert found[3].size == sum((tmp_path / f"lab.{end}").stat().st_size for end in ("json", "journal"))


async def test_files_in_use_that_are_linked_are_listed_once(tmp_path: Path, clock: ManualClock) -> None:
    """A crash after the links of a checkpoint leaves them. The generation is then the one in use."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        for _ in range(2):
            await state.set("a", 1)
            await state.flush()
            link_files(tmp_path)
            found = await list_generations("lab", FileStorage(tmp_path))
            assert [one.in_use for one in found] == [False] * (len(found) - 1) + [True]
            assert found[-1].last_revision == state.revision
            assert await get(tmp_path, clock, state.revision) == (state.revision, {"a": 1})
            await checkpoint(state)
    assert len(found) == 2


async def test_a_snapshot_in_use_that_is_linked_is_listed_once(tmp_path: Path, clock: ManualClock) -> None:
    """The journal beside it has another inode, because its link was not made."""
    await make_history(tmp_path, clock, generations=1)
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        await state.set("a", 1)
        await state.flush()
        link_files(tmp_path)
        history(tmp_path)[-1].unlink()
        assert [one.in_use for one in await list_generations("lab", FileStorage(tmp_path))] == [False, True]


async def test_without_a_history(tmp_path: Path, clock: ManualClock) -> None:
    """The moments since the last checkpoint can be read, beside the manager. The message names this window."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        for number in range(3):
            await state.set("a", number)
            await state.flush()
        assert await get(tmp_path, clock, 2) == (2, {"a": 1})
        view = await read_state("lab", FileStorage(tmp_path), at=3, clock=clock)
        assert (view.revision, view.durable_revision, view.live) == (3, 2, True)
        await checkpoint(state)
        with pytest.raises(ValueError, match=r"revision 2 is outside of the history: the history has the revisions 3 "):
            await get(tmp_path, clock, 2)


async def test_inside_of_a_record(tmp_path: Path, clock: ManualClock) -> None:
    """Changes that were made durable together have no moment between them."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        await state.set("a", 1)
        await state.flush()
        for number in range(2, 6):
            await state.set("a", number)
        await state.flush()
        for revision in range(1, 5):
            assert await get(tmp_path, clock, revision) == (1, {"a": 1})
        assert await get(tmp_path, clock, 5) == (5, {"a": 5})


@pytest.mark.parametrize("moment", [13, -1])
async def test_a_revision_outside(tmp_path: Path, clock: ManualClock, moment: int) -> None:
    """The error names the window."""
    await make_history(tmp_path, clock)
    with pytest.raises(ValueError, match=rf"revision {moment} is outside of the history: .* 0 .* to 12 \(2023-11-14"):
        await get(tmp_path, clock, moment)


async def test_a_time_outside(tmp_path: Path, clock: ManualClock) -> None:
    """A time before all moments, or in the future, is refused. The present is not."""
    await make_history(tmp_path, clock)
    clock.advance(100)
    with pytest.raises(ValueError, match=r"22:13:19.000\+00:00 is outside of the history"):
        await get(tmp_path, clock, at(-1))
    with pytest.raises(ValueError, match="is in the future: the history has the revisions 0 "):
        await get(tmp_path, clock, at(1000))
    assert (await get(tmp_path, clock, datetime.fromtimestamp(clock.time(), UTC)))[0] == 12


@pytest.mark.parametrize(
    ("moment", "error", "text"),
    [
        (NAIVE, ValueError, "without a time zone"),
        (True, TypeError, "not bool"),
        ("yesterday", TypeError, "not str"),
        (1.5, TypeError, "not float"),
    ],
)
async def test_a_moment_of_a_wrong_type(tmp_path: Path, moment: Any, error: type[Exception], text: str) -> None:
    """The error says what to write instead."""
    with pytest.raises(error, match=text):
        await read_state("lab", FileStorage(tmp_path), at=moment)


async def test_a_hole(tmp_path: Path, clock: ManualClock) -> None:
    """A deleted generation is a hole. The list shows it, and a moment in it is an error with the neighbours."""
    await make_history(tmp_path, clock)
    for file in history(tmp_path):
        if file.name.startswith(f"{4:020}"):
            file.unlink()
    found = await list_generations("lab", FileStorage(tmp_path))
    assert [(one.first_revision, one.hole_before) for one in found] == [(0, False), (8, True), (12, False)]
    for moment in (6, at(7.5)):
        with pytest.raises(ValueError, match=r"in a hole of the history: revision 4 .*, and revision 8 "):
            await get(tmp_path, clock, moment)
    assert (await get(tmp_path, clock, at(4)))[0] == 4


async def test_a_clock_that_was_set_back(tmp_path: Path, clock: ManualClock) -> None:
    """The newest record that is not after the time is found, also behind records with later times."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        for number, jump in enumerate((10, 10, -15, 7)):
            clock.jump(jump)
            await state.set("a", number)
            await state.flush()
        clock.jump(100)
        assert (await get(tmp_path, clock, at(10)))[1] == {"a": 2}
        assert (await get(tmp_path, clock, at(12)))[1] == {"a": 3}


async def test_keys_that_expired_since_are_in_the_view(tmp_path: Path, clock: ManualClock) -> None:
    """The view shows the state at its moment. By a time, a key is gone if it had expired by that time."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        await state.set("short", 1, ttl=10)
        await state.flush()
        clock.advance(100)
        for moment, left in ((1, 10), (at(0), 10), (at(4), 6)):
            view = await read_state("lab", FileStorage(tmp_path), at=moment, clock=clock)
            assert await view.expires_in("short") == pytest.approx(left)
        assert await get(tmp_path, clock, at(11)) == (1, {})


def cut(path: Path, size: int = 5) -> None:
    os.truncate(path, path.stat().st_size - size)


def flip(path: Path, offset: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def part(directory: Path, *, journal: bool) -> Path:
    """Return a file of the second generation."""
    (found,) = [
        file
        for file in history(directory)
        if file.name.startswith(f"{4:020}") and file.name.endswith(".journal") == journal
    ]
    return found


async def test_a_snapshot_that_was_deleted(tmp_path: Path, clock: ManualClock) -> None:
    """Its journal is of no use, so there is a hole."""
    await make_history(tmp_path, clock)
    part(tmp_path, journal=False).unlink()
    with pytest.raises(ValueError, match="in a hole"):
        await get(tmp_path, clock, 6)


async def test_a_journal_that_was_deleted(tmp_path: Path, clock: ManualClock) -> None:
    """The snapshot is one moment. The others are in a hole."""
    await make_history(tmp_path, clock)
    part(tmp_path, journal=True).unlink()
    assert (await get(tmp_path, clock, 4))[0] == 4
    with pytest.raises(ValueError, match=r"in a hole of the history: revision 4 .*, and revision 8 "):
        await get(tmp_path, clock, 6)


async def test_a_journal_that_was_cut_off(tmp_path: Path, clock: ManualClock) -> None:
    """The whole records are left, and the others are in a hole."""
    await make_history(tmp_path, clock)
    cut(part(tmp_path, journal=True), 80)
    assert (await get(tmp_path, clock, 6))[0] == 6
    found = await list_generations("lab", FileStorage(tmp_path))
    assert found[1].last_revision == 7
    assert not found[2].hole_before


@pytest.mark.parametrize("change", [cut, flip])
async def test_a_snapshot_that_was_changed(tmp_path: Path, clock: ManualClock, change: Callable[[Path], None]) -> None:
    """Its name tells its bytes, so each read of the generation names the damaged file. Other generations are not affected."""
    await make_history(tmp_path, clock)
    change(path := part(tmp_path, journal=False))
    with pytest.raises(CorruptionError, match="contents do not match its name") as raised:
        await get(tmp_path, clock, 6)
    assert raised.value.path == str(path)
    assert (await get(tmp_path, clock, 3))[0] == 3


async def test_a_journal_that_was_changed(tmp_path: Path, clock: ManualClock) -> None:
    """The error names the file and the byte."""
    await make_history(tmp_path, clock)
    path = part(tmp_path, journal=True)
    flip(path, path.read_bytes().index(b'{"from"') + 3)
    with pytest.raises(CorruptionError, match="a valid frame follows") as raised:
        await get(tmp_path, clock, 6)
    assert raised.value.path == str(path)


async def test_a_header_that_was_changed(tmp_path: Path, clock: ManualClock) -> None:
    """Without its salt no frame can be verified. The snapshot is left, or nothing if the journal had the whole state."""
    await make_history(tmp_path, clock)
    flip(part(tmp_path, journal=True), 20)
    flip(history(tmp_path)[0], 20)
    found = await list_generations("lab", FileStorage(tmp_path))
    assert [(one.first_revision, one.last_revision) for one in found[:2]] == [(4, 4), (8, 12)]
    assert (await get(tmp_path, clock, 4))[0] == 4


async def test_foreign_files(tmp_path: Path, clock: ManualClock) -> None:
    """They are left out, whatever they are."""
    await make_history(tmp_path, clock)
    before = await list_generations("lab", FileStorage(tmp_path))
    shutil.copy(history(tmp_path)[1], tmp_path / "lab.history/copy.journal")
    (tmp_path / "lab.history/notes.txt").write_text("mine")
    (tmp_path / "lab.history/00000000000000000001.json").mkdir()
    assert await list_generations("lab", FileStorage(tmp_path)) == before


async def test_a_file_in_place_of_the_directory(tmp_path: Path, clock: ManualClock) -> None:
    """There is no history then."""
    await make_history(tmp_path, clock)
    shutil.rmtree(tmp_path / "lab.history")
    (tmp_path / "lab.history").touch()
    assert len(await list_generations("lab", FileStorage(tmp_path))) == 1


async def test_a_history_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the system is reported. An unreadable history is not an empty one."""
    async with Manager("lab", FileStorage(tmp_path)) as state:
        await state.set("a", 1)

    def refuse(path: str) -> list[str]:
        raise UnsupportedError(f"listing {path} failed")

    monkeypatch.setattr(_lookup, "names_in", refuse)
    with pytest.raises(UnsupportedError, match="listing"):
        await list_generations("lab", FileStorage(tmp_path))


async def test_no_state(tmp_path: Path) -> None:
    """Neither a state nor a history: the error says where it was looked for."""
    with pytest.raises(UnsupportedError, match="there is no state at"):
        await list_generations("lab", FileStorage(tmp_path))
    with pytest.raises(UnsupportedError, match="there is no state at"):
        await read_state("lab", FileStorage(tmp_path), at=1)


async def test_an_empty_state(tmp_path: Path) -> None:
    """A state that was opened and never written has one moment."""
    async with Manager("lab", FileStorage(tmp_path)):
        pass
    assert await list_generations("lab", FileStorage(tmp_path)) == [Generation(0, 0, None, None, 0, False, True)]


async def test_memory_keeps_no_history() -> None:
    """The error says which storage to use."""
    for call in (list_generations("lab", MemoryStorage()), read_state("lab", MemoryStorage(), at=1)):
        with pytest.raises(UnsupportedError, match="MemoryStorage keeps no history: use a FileStorage"):
            await call


def write_in_a_newer_format(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a journal by one that a newer version of lab_state wrote."""
    head = journal.read_header(path.read_bytes(), "lab", str(path))
    monkeypatch.setattr(journal, "FORMAT", 2)
    newer = journal.header("lab", head.salt, head.base)
    monkeypatch.undo()
    path.unlink()  # it may be a link to a file of the history
    path.write_bytes(newer)


async def test_a_state_of_a_newer_version(tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not listed as a removed one. The history can be read. A moment that only the newer files may have is an error."""
    await make_history(tmp_path, clock)
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        await state.set("a", 1)
    path = tmp_path / "lab.journal"
    write_in_a_newer_format(path, monkeypatch)
    with pytest.raises(UnsupportedError, match="journal format 2"):
        await list_generations("lab", FileStorage(tmp_path))
    assert (await get(tmp_path, clock, 12))[0] == 12
    with pytest.raises(UnsupportedError, match="journal format 2"):
        await get(tmp_path, clock, 13)
    restored = await restore_state("lab", FileStorage(tmp_path), 12, into="copy")
    assert restored.revision == 12
    for file in history(tmp_path):
        file.unlink()
    with pytest.raises(UnsupportedError, match="journal format 2"):
        await get(tmp_path, clock, 12)


async def test_a_snapshot_of_a_newer_version(tmp_path: Path, clock: ManualClock) -> None:
    """It is listed. Its revision is read from the generation before it, which has this revision, too."""
    await make_history(tmp_path, clock)
    path = tmp_path / "lab.json"
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":9'))
    assert (await list_generations("lab", FileStorage(tmp_path)))[-1].in_use
    assert (await get(tmp_path, clock, 12))[0] == 12
    part(tmp_path, journal=True).unlink()
    for file in history(tmp_path)[-2:]:
        file.unlink()
    with pytest.raises(UnsupportedError, match="has format 9"):
        await get(tmp_path, clock, 12)


async def test_a_generation_of_a_newer_version(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not left out of the list without a word. Other generations can be read. The error is also that of its own moments."""
    await make_history(tmp_path, clock)
    path = part(tmp_path, journal=True)
    write_in_a_newer_format(path, monkeypatch)
    for _ in range(2):
        for call in (list_generations("lab", FileStorage(tmp_path)), get(tmp_path, clock, 6)):
            with pytest.raises(UnsupportedError, match=f"{path.name} has journal format 2"):
                await call
        for name in ("lab.json", "lab.journal"):  # a removed state
            (tmp_path / name).unlink(missing_ok=True)
        assert (await get(tmp_path, clock, 3))[0] == 3


async def test_only_a_generation_of_a_newer_version_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a removed state does not hide it."""
    monkeypatch.setattr(journal, "FORMAT", 2)
    newer = journal.header("lab", "0" * 16, NO_BASE)
    monkeypatch.undo()
    (tmp_path / "lab.history").mkdir()
    (tmp_path / "lab.history" / f"{0:020}-0-{'0' * 16}-none.journal").write_bytes(newer)
    with pytest.raises(UnsupportedError, match="journal format 2"):
        await list_generations("lab", FileStorage(tmp_path))


@pytest.mark.parametrize("end", ["json", "journal"])
async def test_a_file_in_use_that_cannot_be_opened(tmp_path: Path, clock: ManualClock, end: str) -> None:
    """The history can be read. The list, and a moment that only this file may have, raise its error."""
    await make_history(tmp_path, clock)
    (tmp_path / f"lab.{end}").unlink()
    (tmp_path / f"lab.{end}").mkdir()
    assert (await get(tmp_path, clock, 11))[0] == 11
    for call in (list_generations("lab", FileStorage(tmp_path)), get(tmp_path, clock, 13)):
        with pytest.raises(UnsupportedError, match=rf"lab.{end} is not a regular file"):
            await call


async def test_a_snapshot_that_cannot_be_looked_up(tmp_path: Path, clock: ManualClock) -> None:
    """It is not taken for a pruned one."""
    await make_history(tmp_path, clock)
    path = part(tmp_path, journal=False)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UnsupportedError, match=f"looking up .*{path.name} failed: .*loop of symbolic links"):
        await list_generations("lab", FileStorage(tmp_path))


async def test_an_edited_snapshot_whose_member_is_not_the_last_one(tmp_path: Path, clock: ManualClock) -> None:
    """A tool that sorts the keys moves the member to another place. The list has the revision that a start loads."""
    await make_history(tmp_path, clock, generations=1)
    entries = json.loads((tmp_path / "lab.json").read_bytes())
    member = entries.pop("$lab_state")
    del member["crc32"]
    (tmp_path / "lab.json").write_text(json.dumps({"$lab_state": member, **entries}))
    assert (await list_generations("lab", FileStorage(tmp_path)))[-1][:2] == (5, 5)
    assert (await get(tmp_path, clock, 5))[0] == 5


async def test_a_linked_journal_with_the_whole_state_is_listed_once(tmp_path: Path, clock: ManualClock) -> None:
    """Its name in the history has the time of its header, which is later than the time of the whole state in it.

    The earlier time is that of the generation, in use and in the history.
    """
    async with Manager("lab", FileStorage(tmp_path / "other"), clock=clock) as state:
        await state.set("a", 1)
    clock.advance(1)
    whole = (tmp_path / "other/lab.json").read_bytes()
    start = journal.header("lab", "0" * 16, ANY_BASE, int(clock.time() * 1000))
    (tmp_path / "lab.journal").write_bytes(start + journal.frame("0" * 16, FrameKind.FULL, whole))
    await asyncio.to_thread(link_present, Paths.of(str(tmp_path), "lab"), "lab", NO_BASE, None)
    assert len(history(tmp_path)) == 1
    (found,) = await list_generations("lab", FileStorage(tmp_path))
    assert (found.in_use, found.first_wall) == (True, START)
    (tmp_path / "lab.journal").unlink()
    (found,) = await list_generations("lab", FileStorage(tmp_path))
    assert (found.in_use, found.first_wall) == (False, START)


async def test_a_damaged_state_in_use(tmp_path: Path, clock: ManualClock) -> None:
    """The history can be listed and read. A moment that only the damaged files may have is an error that says so."""
    await make_history(tmp_path, clock)
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        await state.set("a", 1)
    clock.advance(5)
    flip(tmp_path / "lab.json")
    found = await list_generations("lab", FileStorage(tmp_path))
    assert [(one.last_revision, one.in_use) for one in found] == [(4, False), (8, False), (12, False)]
    assert (await get(tmp_path, clock, 12))[0] == 12
    for moment in (13, datetime.fromtimestamp(clock.time(), UTC)):
        with pytest.raises(ValueError, match=r"outside of the history: .* The list lacks the state in use"):
            await get(tmp_path, clock, moment)
    with pytest.raises(ValueError, match=r"in the future: .* The list lacks"):
        await get(tmp_path, clock, datetime.fromtimestamp(clock.time() + 9, UTC))


async def test_a_damaged_state_without_a_history(tmp_path: Path) -> None:
    """There is nothing to list: the error is the one of a damaged state."""
    (tmp_path / "lab.journal").write_bytes(b"{")
    with pytest.raises(CorruptionError, match="no earlier generation"):
        await list_generations("lab", FileStorage(tmp_path))


async def test_a_removed_state(tmp_path: Path, clock: ManualClock) -> None:
    """Without files in use, the history alone is listed, with the lock file or without it."""
    await make_history(tmp_path, clock)
    (tmp_path / "lab.json").unlink()
    (tmp_path / "lab.journal").unlink()
    for _ in range(2):
        assert [one.last_revision for one in await list_generations("lab", FileStorage(tmp_path))] == [4, 8, 12]
        (tmp_path / "lab.lock").unlink(missing_ok=True)


async def test_a_state_that_was_made_again(tmp_path: Path, clock: ManualClock) -> None:
    """A removed state has left its history. The list is in the order of time, and a time shows the state that there was then."""
    first = await make_history(tmp_path, clock)
    await remove_state("lab", FileStorage(tmp_path))
    clock.advance(100)
    second = await make_history(tmp_path, clock, generations=2, records=2)
    found = await list_generations("lab", FileStorage(tmp_path))
    walls = [one.first_wall or 0.0 for one in found]
    assert walls == sorted(walls)
    assert found[-1].in_use
    assert not any(one.hole_before for one in found)
    for model in (first, second):
        for revision, (time, values) in model.items():
            assert await get(tmp_path, clock, datetime.fromtimestamp(time, UTC)) == (revision, values)
    assert await get(tmp_path, clock, 3) == (3, second[3][1])
    assert await get(tmp_path, clock, 9) == (9, first[9][1])


async def test_a_file_of_another_program_has_the_time_of_the_file(tmp_path: Path, clock: ManualClock) -> None:
    """Its content has none. So it is not taken for a state of long ago."""
    old = tmp_path / "lab.history" / f"{0:020}-0-7-ee7d2b8b.json"
    for path, wall in ((old, 45), (tmp_path / "lab.json", 50)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b'{"a":1}')
        os.utime(path, (START + wall, START + wall))
    parsed = parse_name(old.name)
    assert parsed is not None
    found = await list_generations("lab", FileStorage(tmp_path))
    assert [one.first_wall for one in found] == [START + 45, START + 50]
    clock.advance(100)
    assert await get(tmp_path, clock, at(60)) == (0, {"a": 1})
    with pytest.raises(ValueError, match="outside"):
        await get(tmp_path, clock, at(40))


async def test_a_journal_with_the_whole_state(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a generation without a snapshot: in use, and in the history."""
    await make_history(tmp_path, clock, generations=1)
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        # No checkpoint begins by itself after the journal was written anew.
        monkeypatch.setattr(flusher_of(state).checkpoints, "start_if_due", lambda: None)
        await state.set("a", "x" * 100_000)
        await state.flush()
        (tmp_path / "lab.json").unlink()  # so the next commit writes everything anew
        for key in ("b", "d"):
            await state.set(key, 1)
            await state.flush()
        assert [one.first_revision for one in await list_generations("lab", FileStorage(tmp_path))] == [0, 6]
        link_files(tmp_path)
        await checkpoint(state)
        await state.set("c", 1)
        await state.flush()
        found = await list_generations("lab", FileStorage(tmp_path))
        assert [(one.first_revision, one.last_revision) for one in found] == [(0, 4), (6, 7), (7, 8)]
        assert [one.hole_before for one in found] == [False, True, False]
        revision, values = await get(tmp_path, clock, 6)
        assert (revision, sorted(values)) == (6, ["a", "b", *(f"key-{number}" for number in range(4))])


async def test_a_journal_without_the_whole_state_that_it_names(tmp_path: Path) -> None:
    """Its first frame is another one. That is damage, also for the list."""
    parts = journal.header("lab", "salt", ANY_BASE), journal.frame("salt", FrameKind.RECORD, b"{}")
    (tmp_path / "lab.journal").write_bytes(b"".join(parts))
    with pytest.raises(CorruptionError, match="no earlier generation"):
        await list_generations("lab", FileStorage(tmp_path))


async def test_a_large_last_record_and_a_large_member(tmp_path: Path, clock: ManualClock) -> None:
    """More of a file is read where its end does not have the whole record, or the whole reserved member."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        await state.set("a", "x" * 300_000)
        for number in range(3000):
            await state.set(f"key-{number}", 1, ttl=1000)
        await state.flush()
        assert (await list_generations("lab", FileStorage(tmp_path)))[-1].last_revision == 3001
        await checkpoint(state)
        await state.set("b", 1)
        await state.flush()
        found = await list_generations("lab", FileStorage(tmp_path))
        assert [(one.first_revision, one.last_revision) for one in found] == [(3001, 3002)]


class Beside:
    """A history that changes after each list, before the generation is read."""

    def __init__(self, directory: Path, change: Callable[[], Awaitable[object]]) -> None:
        self.inner = history_of(FileStorage(directory))
        self.change = change
        self.lists = 0

    async def generations(self, name: str) -> Listing:
        found = await self.inner.generations(name)
        self.lists += 1
        await self.change()
        return found

    async def read(self, name: str, generation: FoundGeneration) -> Reading:
        return await self.inner.read(name, generation)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Awaitable[object]]], Beside]:
    """Return a function that puts a history with a change in the place of the one of the storage."""

    def put(change: Callable[[], Awaitable[object]]) -> Beside:
        found = Beside(tmp_path, change)
        monkeypatch.setattr(_past, "history_of", lambda _: found)
        return found

    return put


async def test_a_generation_that_is_pruned_meanwhile(tmp_path: Path, clock: ManualClock, beside: Any) -> None:
    """The list is read once more. Then the moment is outside of the history."""
    await make_history(tmp_path, clock)
    oldest = history(tmp_path)[0]
    found = beside(lambda: asyncio.to_thread(oldest.unlink, missing_ok=True))
    with pytest.raises(ValueError, match="outside of the history: the history has the revisions 4 "):
        await get(tmp_path, clock, 2)
    assert found.lists == 2


async def test_a_generation_that_a_checkpoint_replaces_meanwhile(
    tmp_path: Path, clock: ManualClock, beside: Any
) -> None:
    """The one in use goes into the history. The moment is found there."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        for number in range(3):
            await state.set("a", number)
            await state.flush()

        async def replace() -> None:
            if found.lists == 1:
                await asyncio.to_thread(link_files, tmp_path)
                await checkpoint(state)

        found = beside(replace)
        assert await get(tmp_path, clock, 2) == (2, {"a": 1})
        assert found.lists == 2


async def test_a_history_that_changes_all_the_time(tmp_path: Path, clock: ManualClock, beside: Any) -> None:
    """After ten lists the call gives up, with an error that may pass."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:

        async def go_on() -> None:
            await state.set("a", found.lists)
            await state.flush()
            await checkpoint(state)

        found = beside(go_on)
        await go_on()
        with pytest.raises(UnavailableError, match="changed during each of 10 attempts to read it"):
            await get(tmp_path, clock, datetime.fromtimestamp(clock.time(), UTC))
        assert found.lists == 10


@pytest.mark.parametrize("times", [2, 9])
async def test_checkpoints_during_a_list(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The writer makes two checkpoints after the look at the files in use. Then the files are looked at again, up to five times."""
    async with Manager("lab", FileStorage(tmp_path), clock=clock) as state:
        await state.set("a", 0)
        await state.flush()
        await checkpoint(state)
        loop, kept, calls = asyncio.get_running_loop(), _file_history._kept, 0

        async def go_on() -> None:
            for number in range(2):
                clock.advance(1)
                await state.set("a", number)
                await state.flush()
                await asyncio.to_thread(link_files, tmp_path)
                await checkpoint(state)

        def listed(*args: Any) -> list[FoundGeneration]:
            nonlocal calls
            calls += 1
            if calls < times:
                asyncio.run_coroutine_threadsafe(go_on(), loop).result()
            return kept(*args)

        monkeypatch.setattr(_file_history, "_kept", listed)
        found = await list_generations("lab", FileStorage(tmp_path))
        assert calls == min(times, 5)
        reached = {revision for one in found for revision in range(one.first_revision, one.last_revision + 1)}
        assert reached >= set(range(1, 4))
        if times == 2:
            assert [(one.first_revision, one.last_revision, one.hole_before) for one in found] == [
                (1, 2, False),
                (2, 3, False),
                (3, 3, False),
            ]


async def test_a_file_that_is_pruned_during_the_list(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in the directory, and is gone when it is opened. The list goes on."""
    await make_history(tmp_path, clock)
    names = [file.name for file in history(tmp_path)]
    monkeypatch.setattr(_lookup, "names_in", lambda _: names)
    snapshot = part(tmp_path, journal=False)
    part(tmp_path, journal=True).unlink()
    assert [one.last_revision for one in await list_generations("lab", FileStorage(tmp_path))] == [4, 12, 12]
    snapshot.unlink()
    assert [one.last_revision for one in await list_generations("lab", FileStorage(tmp_path))] == [4, 12, 12]
