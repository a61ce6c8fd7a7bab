"""What `FileStorage` finds at the start: after a kill, and after damage."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from file_tools import (
    SERVED,
    Disk,
    Kept,
    contents,
    found,
    kill,
    kinds,
    manager,
    mode,
    scan,
    start_child,
    until,
    view,
)

from lab_state import (
    CorruptionError,
    FileStorage,
    UnavailableError,
    UnsupportedError,
)
from lab_state import _journal as journal
from lab_state._journal import FrameKind
from lab_state.storage import _file_writer
from lab_state.testing import ManualClock

# After a kill


async def test_a_kill_loses_nothing_that_was_flushed(crashed: Path) -> None:
    """After SIGKILL every acknowledged change is there, in order, and what was never flushed is not."""
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
        assert state.revision == 5
    assert json.loads((crashed / "lab.json").read_bytes()).keys() == {*SERVED, "$lab_state"}


async def test_the_first_act_after_a_kill(crashed: Path, disk: Disk) -> None:
    """After a kill nothing counts as durable until a new journal with copies of the records is. A flush waits for it."""
    inherited = scan(crashed)
    inode = (crashed / "lab.journal").stat().st_ino
    gate = disk.hold("fsync", "lab.journal.tmp")
    state = manager(crashed)
    await state.start()
    assert await state.get_all() == SERVED
    await gate.entered()
    flush = asyncio.create_task(state.flush())
    waiting = asyncio.create_task(state.wait_durable())
    for _ in range(10):
        await asyncio.sleep(0)
    assert (state.durable_revision, flush.done(), waiting.done()) == (0, False, False)
    assert kinds(crashed) == "RRRRR"
    gate.open()
    await asyncio.gather(flush, waiting)
    assert state.durable_revision == 5
    copied = scan(crashed)
    assert copied.header.base == inherited.header.base
    assert copied.header.salt != inherited.header.salt
    assert copied.frames[:-1] == inherited.frames
    assert kinds(crashed) == "RRRRRR"
    assert inode not in disk.written_inodes()
    assert await found(crashed) == SERVED
    await state.stop()


async def test_a_copy_that_fails(crashed: Path, disk: Disk) -> None:
    """If the copied journal cannot be written, the inherited one stays as it is, and the next flush copies it again."""
    before = contents(crashed)
    disk.fail("fsync", "lab.journal.tmp")
    state = manager(crashed, clock=ManualClock())
    await state.start()
    with pytest.raises(UnavailableError):
        await state.flush()
    assert contents(crashed) == before
    await state.set("more", 6)
    await state.flush()
    assert kinds(crashed) == "RRRRRR"
    assert await found(crashed) == SERVED | {"more": 6}
    await state.stop()


async def test_a_checkpoint_before_the_first_commit(crashed: Path) -> None:
    """A session that writes a checkpoint first copies the records before it."""
    session = await FileStorage(crashed).open("lab")
    await session.checkpoint(view(b'{"a":1}'))
    await session.aclose()
    assert kinds(crashed) == ""
    assert (crashed / "lab.json").read_bytes() == b'{"a":1}'


async def test_a_journal_that_is_large_after_a_kill(crashed: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the records need much more room than the state, a journal with the whole state is written. A flush does not wait for a snapshot."""
    monkeypatch.setattr(_file_writer, "_MIN_CHECKPOINT_BYTES", 10)
    snapshot = disk.hold("open", "lab.json.tmp")
    disk.fail("fsync", "lab.json.tmp", times=float("inf"))
    state = manager(crashed)
    await state.start()
    await snapshot.entered()
    assert scan(crashed).header.base == journal.ANY_BASE
    assert kinds(crashed) == "F"
    try:
        async with asyncio.timeout(3):
            await state.flush()
        assert state.durable_revision == 5
        await state.set("more", 6)
        async with asyncio.timeout(3):
            await state.flush()
        assert await found(crashed) == SERVED | {"more": 6}
    finally:
        snapshot.open()
        disk.heal()
        await state.stop()


# After a journal was ended


async def ended(directory: Path) -> None:
    """End the journal of a state that was killed."""
    session = await FileStorage(directory).open("lab")
    await session.commit(b'{"from":5,"to":6,"clear":false,"set":{"more":6},"delete":[],"expires":{}}', view(b""))
    assert await session.hand_over()
    await session.aclose()
    assert kinds(directory) == "RRRRRRE"


async def test_the_end_of_a_journal_is_replaced(crashed: Path, disk: Disk) -> None:
    """After the end of a journal, the state is settled. The first commit syncs what the start found, and puts its frame in the place of the end."""
    await ended(crashed)
    disk.calls.clear()
    async with manager(crashed) as state:
        assert state.durable_revision == 6
        await state.set("last", 7)
        await state.flush()
        assert kinds(crashed) == "RRRRRRR"
        calls = [(call.function, Path(call.path).name) for call in disk.calls if call.function in {"fsync", "pwrite"}]
        assert calls[-3:] == [("fsync", "lab.journal"), ("fsync", "crashed"), ("pwrite", "lab.journal")]
        assert await found(crashed) == SERVED | {"more": 6, "last": 7}


@pytest.mark.parametrize("name", ["lab.journal", "directory"])
async def test_a_continued_journal_that_cannot_be_synced(crashed: Path, disk: Disk, name: str) -> None:
    """If what the start found cannot be synced, the journal is not continued, and everything is written anew."""
    await ended(crashed)
    async with manager(crashed) as state:
        disk.fail("fsync", name)
        await state.set("last", 7)
        with pytest.raises(UnavailableError):
            await state.flush()
        await state.flush()
        assert scan(crashed).header.base == journal.ANY_BASE
        assert await found(crashed) == SERVED | {"more": 6, "last": 7}


@pytest.mark.parametrize("change", ["cut off", "replaced", "overwritten", "touched", "deleted"])
async def test_a_journal_that_was_changed_before_it_is_continued(crashed: Path, change: str) -> None:
    """If the journal was changed after the start, everything is written anew. Another time alone makes no difference."""
    await ended(crashed)
    path = crashed / "lab.journal"
    data = path.read_bytes()
    async with manager(crashed) as state:
        if change == "cut off":
            os.truncate(path, len(data) - 14)
        elif change == "replaced":
            path.unlink()
            path.write_bytes(data + b"x")
        elif change == "overwritten":
            path.write_bytes(data[:-1] + b"x")
            os.utime(path, ns=(0, 0))
        elif change == "touched":
            os.utime(path, ns=(0, 0))
        else:
            path.unlink()
        await state.set("last", 7)
        await state.flush()
        assert scan(crashed).header.base == ("none" if change == "touched" else journal.ANY_BASE)
        assert await found(crashed) == SERVED | {"more": 6, "last": 7}


async def test_an_end_is_written_once(crashed: Path) -> None:
    """A session that changed nothing leaves the end as it is. A journal that starts with the whole state gets none."""
    await ended(crashed)
    before = contents(crashed)
    session = await FileStorage(crashed).open("lab")
    assert await session.hand_over()
    await session.aclose()
    assert contents(crashed) == before
    (crashed / "lab.journal").unlink()
    session = await FileStorage(crashed).open("lab")
    assert not await session.hand_over()
    await session.aclose()
    assert not (crashed / "lab.journal").exists()


async def test_a_restored_snapshot_beside_an_ended_journal(tmp_path: Path) -> None:
    """A journal whose records do not follow the snapshot is refused, also if it has an end. Without a record, the snapshot counts."""
    for record in (None, b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":[],"expires":{}}'):
        path = tmp_path / f"{record is None}"
        path.mkdir()
        frames = [] if record is None else [(FrameKind.RECORD, record)]
        data = journal.header("lab", "0" * 16, "9-00000000")
        for kind, payload in (*frames, (FrameKind.END, b"")):
            data += journal.frame("0" * 16, kind, payload)
        (path / "lab.journal").write_bytes(data)
        (path / "lab.json").write_bytes(b'{"restored":1}')
        if record is None:
            async with manager(path) as state:
                await state.set("b", 1)
                await state.flush()
                assert await found(path) == {"restored": 1, "b": 1}
        else:
            with pytest.raises(CorruptionError, match="do not follow the snapshot"):
                await manager(path).start()
        assert record is None or (path / "lab.journal").read_bytes() == data


# A full disk


async def test_a_full_disk_after_a_kill(crashed: Path, disk: Disk) -> None:
    """If the first commit after a kill finds the disk full, start and reads work, flush raises, and free space fixes it."""
    before = contents(crashed)
    disk.fill("lab.journal.tmp")
    state = manager(crashed, clock=ManualClock())
    await state.start()
    assert await state.get_all() == SERVED
    await state.set("new", 1)
    for _ in range(3):
        with pytest.raises(UnavailableError, match="No space left on device"):
            await state.flush()
    assert (state.durable_revision, state.revision) == (0, 6)
    assert await state.get_all() == SERVED | {"new": 1}
    assert contents(crashed) == before
    disk.heal()
    await state.flush()
    assert state.durable_revision == 6
    assert await found(crashed) == SERVED | {"new": 1}
    await state.stop()


async def test_a_full_disk_after_a_kill_heals_by_itself(crashed: Path, disk: Disk) -> None:
    """The first commit after a kill is tried again in the background, without a flush."""
    clock = ManualClock()
    disk.fill("lab.journal.tmp")
    state = manager(crashed, clock=clock)
    await state.start()
    await until(lambda: state.status().flush_failures == 1)
    disk.heal()
    clock.advance(10)
    await state.wait_durable()
    assert state.durable_revision == 5
    await state.stop()


async def test_killed_again_and_again(tmp_path: Path) -> None:
    """A state passes through a series of processes that are all killed, and loses nothing."""
    for _ in range(3):
        child = start_child("serve", tmp_path)
        kill(child)
    async with manager(tmp_path) as state:
        assert await state.get_all() == SERVED
        assert state.revision == 15


async def test_an_inherited_header_is_not_appended_to(tmp_path: Path, disk: Disk) -> None:
    """A journal that holds only its header is replaced by the first commit, never appended to."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    kept = Kept(tmp_path, disk)
    assert kinds(tmp_path) == ""
    async with manager(tmp_path) as state:
        await state.set("b", 2)
        await state.flush()
        assert kinds(tmp_path) == "R"
        assert scan(tmp_path).header.base == journal.scan(kept.bytes, "lab", "kept").header.base
        await state.set("c", 3)
        await state.flush()
        assert await found(tmp_path) == {"a": 1, "b": 2, "c": 3}
    kept.check_never_written()


@pytest.mark.parametrize("cut", [1, 30])
async def test_a_torn_tail_is_put_aside(crashed: Path, caplog: pytest.LogCaptureFixture, cut: int) -> None:
    """A last frame that a crash cut short is saved to another file, logged and dropped.

    Everything before it is loaded.
    """
    data = (crashed / "lab.journal").read_bytes()
    last = data.rindex(b"\n", 0, len(data) - 1) + 1
    (crashed / "lab.journal").write_bytes(data[:-cut])
    async with manager(crashed) as state:
        assert await state.get_all() == {key: value for key, value in SERVED.items() if value < 4}
        await state.set("new", 1)
        await state.flush()
        assert (await found(crashed))["new"] == 1
    (torn,) = crashed.glob("lab.journal.torn-*")
    assert (torn.read_bytes(), mode(torn)) == (data[last:-cut], 0o600)
    assert f"the last {len(data) - cut - last} bytes of its journal are not a whole record" in caplog.text
    async with manager(crashed):
        pass
    assert list(crashed.glob("lab.journal.torn-*")) == [torn]


async def test_five_torn_tails_are_kept(crashed: Path) -> None:
    """The newest five saved torn tails are kept."""
    for number in range(1, 8):
        (crashed / f"lab.journal.torn-{number:013}").write_bytes(b"%d" % number)
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
    kept = sorted(path.read_bytes() for path in crashed.glob("lab.journal.torn-*"))
    assert kept == [b"4", b"5", b"6", b"7", b"torn"]


async def test_a_torn_tail_that_cannot_be_put_aside(
    crashed: Path, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a torn tail cannot be saved, this is logged, and the start succeeds."""
    monkeypatch.setattr("time.time_ns", lambda: 7_000_000)
    disk.fill("lab.journal.torn-7")
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
    assert "the torn tail of" in caplog.text
    assert list(crashed.glob("lab.journal.torn-*")) == []


async def test_a_directory_that_cannot_be_listed(
    crashed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the directory cannot be listed, a log line says that torn tails and temporary files stay.

    Start and stop work.
    """
    stale = crashed / "lab.journal.00000000.tmp"
    stale.touch()
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", denied)
        async with manager(crashed) as state:
            assert await state.get_all() == SERVED
    assert f"listing {crashed} failed: Permission denied; give this user the permission" in caplog.text
    assert "the torn tail of" in caplog.text
    assert f"temporary files beside {crashed / 'lab.json'} stay until the next start" in caplog.text
    assert stale.exists()
    async with manager(crashed) as state:
        assert await state.get_all() == SERVED
    assert not stale.exists()


def denied(*args: object) -> list[str]:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EIO, "see the log of the kernel"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "have the quota raised"),
        (errno.EFBIG, "raise the limit on the size of files"),
        (errno.EMFILE, "raise the limit on open files"),
        (errno.EIO + 1, "(not durable yet"),
    ],
)
async def test_what_may_mend_itself_is_told_with_its_remedy(tmp_path: Path, disk: Disk, code: int, remedy: str) -> None:
    """An error that may be gone at the next attempt names the file, the reason and the remedy."""
    state = manager(tmp_path)
    await state.start()
    await state.set("a", 1)
    disk.fail("open", "lab.journal.tmp", code)
    with pytest.raises(UnavailableError) as raised:
        await state.flush()
    assert re.search(
        rf"lab\.journal\.\w+\.tmp failed: {re.escape(os.strerror(code))}.*{re.escape(remedy)}", str(raised.value)
    )
    await state.flush()
    await state.stop()


async def test_a_state_whose_name_looks_like_a_torn_tail(crashed: Path) -> None:
    """Saving a torn tail deletes no file of another state, whatever its name."""
    names = [f"lab.journal.torn-{number}" for number in range(7)]
    for name in names:
        async with manager(crashed, name) as state:
            await state.set("me", name)
    with (crashed / "lab.journal").open("ab") as file:
        file.write(b"torn")
    async with manager(crashed):
        pass
    for name in names:
        async with manager(crashed, name) as state:
            assert await state.get_all() == {"me": name}


# Damage


def damaged_snapshot(directory: Path) -> None:
    path = directory / "lab.json"
    path.write_bytes(path.read_bytes().replace(b"snapshot", b"snapshoT"))


def empty_snapshot(directory: Path) -> None:
    (directory / "lab.json").write_bytes(b"")


def missing_snapshot(directory: Path) -> None:
    (directory / "lab.json").unlink()


def older_snapshot(directory: Path) -> None:
    (directory / "lab.json").write_bytes(b'{"older":true}')


def damaged_record(directory: Path) -> None:
    path = directory / "lab.journal"
    path.write_bytes(path.read_bytes().replace(b"record-1", b"record-X"))


def glued_records(directory: Path) -> None:
    path = directory / "lab.journal"
    head, first, rest = path.read_bytes().split(b"\n", 2)
    path.write_bytes(head + b"\n" + first + b"\x0b" + rest)


def missing_record(directory: Path) -> None:
    path = directory / "lab.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


def empty_journal(directory: Path) -> None:
    (directory / "lab.journal").write_bytes(b"")


def damaged_header(directory: Path) -> None:
    path = directory / "lab.journal"
    path.write_bytes(path.read_bytes().replace(b'"salt"', b'"sale"', 1))


def another_states_journal(directory: Path) -> None:
    data = journal.header("other", "0" * 16, journal.NO_BASE)
    (directory / "lab.journal").write_bytes(data)


def two_halves(directory: Path) -> None:
    """Leave a journal that should begin with the whole state, without that state."""
    (directory / "lab.journal").write_bytes(journal.header("lab", "0" * 16, journal.ANY_BASE))


def full_frame_too_late(directory: Path) -> None:
    salt = "0" * 16
    frames = journal.header("lab", salt, journal.NO_BASE) + journal.frame(salt, FrameKind.FULL, b"{}")
    (directory / "lab.journal").write_bytes(frames)


def unknown_frame(directory: Path) -> None:
    path = directory / "lab.journal"
    header = scan(directory).header
    path.write_bytes(path.read_bytes() + journal.frame(header.salt, FrameKind.HEADER, b"{}"))


def no_record(directory: Path) -> None:
    path = directory / "lab.journal"
    path.write_bytes(path.read_bytes() + journal.frame(scan(directory).header.salt, FrameKind.RECORD, b'{"from":1}'))


@pytest.mark.parametrize(
    "damage",
    [
        damaged_snapshot,
        empty_snapshot,
        missing_snapshot,
        older_snapshot,
        damaged_record,
        glued_records,
        missing_record,
        empty_journal,
        damaged_header,
        another_states_journal,
        two_halves,
        full_frame_too_late,
        unknown_frame,
        no_record,
    ],
)
async def test_damage_is_refused_and_left_untouched(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Damage fails the start with its path, and changes no byte. After a repair the state opens as before."""
    directory = tmp_path / "state"
    async with manager(directory) as state:
        await state.set("snapshot", "snapshot")
    state = manager(directory)
    await state.start()
    for number in range(4):
        await state.set(f"record-{number}", number)
        await state.flush()
    right = shutil.copytree(directory, tmp_path / "right")
    everything = await state.get_all()
    await state.stop()
    for path in directory.iterdir():
        shutil.copy(right / path.name, path)
    damage(directory)
    before = contents(directory)
    for _ in range(2):
        with pytest.raises(CorruptionError) as raised:
            await manager(directory).start()
        assert raised.value.path in {str(directory / "lab.json"), str(directory / "lab.journal")}
        assert raised.value.path in str(raised.value)
        assert contents(directory) == before
    for name in ("lab.json", "lab.journal"):
        shutil.copy(right / name, directory / name)
    async with manager(directory) as state:
        assert await state.get_all() == everything


async def test_the_other_states_name_is_in_the_message(tmp_path: Path) -> None:
    """The error for a journal of another state names that state."""
    another_states_journal(tmp_path)
    with pytest.raises(CorruptionError, match="it is the journal of 'other', not of 'lab'; put the right file back"):
        await manager(tmp_path).start()


async def test_newer_formats_are_refused_and_left_untouched(tmp_path: Path) -> None:
    """A newer format of the journal or the snapshot is not damage: the message says which version to use."""
    salt = "0" * 16
    newer = b'{"format":2,"name":"lab","salt":"%s","base":"none"}' % salt.encode()
    for name, data in (
        ("lab.journal", journal.frame(salt, FrameKind.HEADER, newer)),
        ("lab.json", b'{"$lab_state":{"format":2,"whatever":1}}'),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            UnsupportedError, match=rf"{name} has .*format 2, .* knows 1: use the version that wrote it"
        ):
            await manager(tmp_path).start()
        assert contents(tmp_path) == {name: data}
        (tmp_path / name).unlink()


async def test_an_edit_that_keeps_the_expiry_times(tmp_path: Path, clock: ManualClock) -> None:
    """After a clean stop, a snapshot whose checksum alone is deleted is one change."""
    async with manager(tmp_path, clock=clock) as state:
        await state.set("a", 1, ttl=10**9)
        revision = await state.set("b", 2)
    path = tmp_path / "lab.json"
    data = path.read_text()
    path.write_text(data[: data.rindex(',"crc32":')].replace('"b":2', '"b":3') + "}}")
    for _ in range(2):
        async with manager(tmp_path, clock=clock) as state:
            assert (await state.get_all(), state.revision) == ({"a": 1, "b": 3}, revision + 1)
            assert await state.expires_in("a") == 10**9
    async with manager(tmp_path, clock=clock) as state:
        assert await state.set("c", 4) == revision + 2
        await state.flush()
        assert await found(tmp_path) == {"a": 1, "b": 3, "c": 4}
    assert '"crc32"' in path.read_text()


async def test_a_snapshot_without_its_member_beside_a_journal_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A WARNING says that the expiry times are gone. A file of another program, without a journal of ours, is no reason for it."""
    path, text = tmp_path / "lab.json", "has no member $lab_state any longer"
    path.write_text('{"a": 1}')
    async with manager(tmp_path) as state:
        await state.set("b", 2)
        await state.flush()
        kill = tmp_path.parent / "killed"
        shutil.copytree(tmp_path, kill)
    async with manager(kill) as state:
        assert await state.get_all() == {"a": 1, "b": 2}
    async with manager(tmp_path):
        pass
    assert text not in caplog.text
    path.write_text('{"a": 1, "b": 3}')
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1, "b": 3}
    assert caplog.text.count(text) == 1


async def test_an_edited_snapshot_without_its_member_is_accepted(tmp_path: Path) -> None:
    """After a clean stop, a snapshot edited by hand is accepted once its reserved member is deleted."""
    async with manager(tmp_path) as state:
        await state.set("a", 1)
    path = tmp_path / "lab.json"
    edited = json.loads(path.read_bytes()) | {"b": 2}
    path.write_text(json.dumps(edited))
    with pytest.raises(CorruptionError, match="If it was edited by hand, delete"):
        await manager(tmp_path).start()
    del edited["$lab_state"]
    path.write_text(json.dumps(edited))
    async with manager(tmp_path) as state:
        assert await state.get_all() == {"a": 1, "b": 2}
        await state.set("c", 3)
        await state.flush()
        assert await found(tmp_path) == {"a": 1, "b": 2, "c": 3}
