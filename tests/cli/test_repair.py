"""`repair` and `doctor`: what can be saved of a damaged state, and what a state needs to work."""

from __future__ import annotations

import json
import os
import socket
import zlib
from pathlib import Path
from typing import Any

import pytest
from command import under
from commanded import World

from lab_state import CorruptionError, FileStorage, Manager, read_state
from lab_state import _journal as journal
from lab_state.cli._doctor import file_system
from lab_state.cli._salvage import salvage


async def crashed(directory: Path) -> World:
    """Return a state whose journal has five records, as after a crash."""
    world = World("running", directory / "first")
    world.directory.mkdir()
    target = directory / "state"
    target.mkdir()
    async with world.filled():
        assert world.manager is not None
        await world.manager.set("last", 1)
        for path in (world.directory / "state").iterdir():
            if path.suffix in {".json", ".journal"}:
                (target / path.name).write_bytes(path.read_bytes())
    return World("stopped", directory)


def damage(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


async def repaired(world: World) -> dict[str, Any]:
    """Repair a state. Check that its files are kept, and that it can be loaded. Return the JSON of the command."""
    files = {path.name: path.read_bytes() for path in (world.directory / "state").iterdir() if path.suffix != ".lock"}
    dry = await world.run("repair", "--dry-run", "--json", world.state)
    assert dry.code == 0
    assert {
        path.name: path.read_bytes() for path in (world.directory / "state").iterdir() if path.suffix != ".lock"
    } == files
    done = await world.run("repair", "--json", world.state)
    assert done.code == 0, done
    found: dict[str, Any] = done.json
    assert (found["lost"], found["keys"], found["repaired"]) == (dry.json["lost"], dry.json["keys"], True)
    kept = Path(world.directory, found["kept"])
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == files
    async with Manager("shop", FileStorage(world.directory / "state")) as state:
        assert (len(state), state.revision) == (found["keys"], found["revision"])
    return found


async def test_damage_in_the_middle_of_the_journal(tmp_path: Path) -> None:
    """Records before the damage are kept. Those behind it are listed with their keys, and the new revision is above them."""
    world = await crashed(tmp_path)
    damage(tmp_path / "state" / "shop.journal", b'"cart/ann":["apple"]', b'"cart/ann":["appl!"]')
    found = await repaired(world)
    assert found["keys"] == 2
    assert found["revision"] == 5
    assert "are damaged; they were acknowledged" in found["lost"][0]
    assert found["lost"][1] == "change 3 of 'odd\\n\\x1b[31mkey': earlier changes are missing"
    assert found["lost"][2] == "change 4 of 'last': earlier changes are missing"
    assert await world.reading() == {"stock/apple": 12, "stock/pear": {"n": 3, "of": ["x", None]}}


async def test_a_bad_header_and_a_missing_journal(tmp_path: Path) -> None:
    """Without a journal that can be read, the snapshot is kept. The loss is named."""
    world = await crashed(tmp_path)
    journal = tmp_path / "state" / "shop.journal"
    async with Manager("shop", FileStorage(tmp_path / "state")) as state:
        await state.set("x", 1)
    journal.write_bytes(b"#" + journal.read_bytes()[1:])
    found = await repaired(world)
    assert (found["keys"], found["revision"]) == (6, 6)
    assert "its first line is not a valid journal header" in found["lost"][0]


async def test_values_that_may_be_wrong(tmp_path: Path) -> None:
    """A snapshot with a wrong checksum keeps each value that is JSON, with revision and expiry times."""
    world = World("stopped", tmp_path)
    async with world.filled():
        pass
    damage(tmp_path / "state" / "shop.json", b":12,", b":13,")
    found = await repaired(world)
    assert (found["keys"], found["revision"]) == (4, 4)
    assert found["lost"] == [
        "the snapshot: its checksum does not match its contents. The keys and values that can be read are kept, but one or more of them may be wrong"
    ]
    view = await read_state("shop", FileStorage(tmp_path / "state"))
    assert await view.expires_in("cart/ann") is not None


async def test_a_snapshot_that_is_cut_off(tmp_path: Path) -> None:
    """The keys before the end are kept. The revision and the expiry times are lost with the end."""
    world = World("stopped", tmp_path)
    async with world.filled():
        pass
    path = tmp_path / "state" / "shop.json"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b'"cart/ann"') + 14])
    found = await repaired(world)
    assert found["keys"] == 2
    assert "All keys from there on are lost" in found["lost"][0]
    assert "and with it the revision, all expiry times and the version of the schema" in found["lost"][1]


async def test_nothing_to_repair(tmp_path: Path) -> None:
    """A state that can be loaded is left alone. A missing state is code 1, and a running one code 3."""
    world = World("running", tmp_path)
    async with world.filled():
        done = await world.run("repair", world.state)
        assert (done.code, done.out) == (0, "the state can be loaded: there is nothing to repair\n")
        assert (await world.run("repair", "--json", world.state)).json["repaired"] is False
        assert (await world.run("repair", "state/none")).code == 1
        assert not (tmp_path / "state" / "none.lock").exists()
        damage(tmp_path / "state" / "shop.journal", b'"cart/ann"', b'"cart/xxx"')
        refused = await world.run("repair", world.state)
        assert (refused.code, refused.out) == (3, "")
        assert f"pid {os.getpid()}" in refused.err
        damage(tmp_path / "state" / "shop.journal", b'"cart/xxx"', b'"cart/ann"')


async def test_a_repair_for_people(tmp_path: Path) -> None:
    """The damage, each loss, what is kept and the place of the files are lines."""
    world = await crashed(tmp_path)
    damage(tmp_path / "state" / "shop.journal", b'"cart/ann":["apple"]', b'"cart/ann":["appl!"]')
    dry = (await world.run("repair", "--dry-run", world.state)).out.splitlines()
    assert dry[0].startswith("damage: ")
    assert dry[-1] == "a repair would keep 2 keys, with the changes up to 1"
    done = (await world.run("repair", world.state)).out.splitlines()
    assert done[-2] == "revision 5 has 2 keys, with the changes up to 1"
    assert "shop.damaged-" in done[-1]


async def test_many_losses(tmp_path: Path) -> None:
    """A person gets the first 20 losses, and their number. JSON has each of them."""
    world = World("running", tmp_path)
    (tmp_path / "two").mkdir()
    async with world.filled():
        assert world.manager is not None
        for number in range(40):
            await world.manager.set(f"k{number}", number)
        journal = (tmp_path / "state" / "shop.journal").read_bytes()
    (tmp_path / "two" / "shop.journal").write_bytes(journal.replace(b'"cart/ann":["apple"]', b'"cart/ann":["appl!"]'))
    lines = (await world.run("repair", "--dry-run", "two/shop")).out.splitlines()
    assert sum(line.startswith("lost: ") for line in lines) == 21
    assert lines[-2] == "lost: 22 more: --json lists all of them"
    assert len((await world.run("repair", "--dry-run", "--json", "two/shop")).json["lost"]) == 42


def test_what_can_be_saved() -> None:
    """Pieces of a snapshot without an object, without a member, with bad values and with bad keys give what is whole in them."""
    assert salvage(b"nonsense", None, "shop").state.entries == {}
    assert salvage(b'{"a":1,2:3}', None, "shop").state.entries.keys() == {"a"}
    assert salvage(b'{"a":1 "b":2}', None, "shop").state.entries.keys() == {"a"}
    assert salvage(b'{"a" 1', None, "shop").state.entries == {}
    deep = b'{"a":' + b"[" * 200 + b"]" * 200 + b',"b":"\xff","c":1}'
    found = salvage(deep, None, "shop")
    assert found.state.entries.keys() == {"c"}
    assert found.lost[-1] == "the snapshot: the values of 'a', 'b'"
    many = json.dumps({f"k{n}": 1e999 for n in range(30)}).replace("Infinity", "1e999").encode()
    assert salvage(many, None, "shop").lost[-1].endswith("'k19' and 10 more")
    nothing = salvage(None, b"#", "shop")
    assert (nothing.state.entries, len(nothing.lost)) == ({}, 2)


def test_a_snapshot_of_another_program() -> None:
    """Records that follow another snapshot are not mixed with one that has no revision. A record that is not one is listed."""
    record = b'{"from":0,"to":1,"clear":false,"set":{"x":1},"delete":[],"expires":{}}'
    snapshot = b'{"a":1}'
    frames = journal.frame("salt", journal.FrameKind.RECORD, record) + journal.frame(
        "salt", journal.FrameKind.RECORD, b"{}"
    )
    found = salvage(snapshot, journal.header("shop", "salt", "9-01234567") + frames, "shop")
    assert found.state.entries.keys() == {"a"}
    assert found.lost == [
        "change 1 of 'x': made after another snapshot",
        "a record of 2 bytes, which is not the JSON of a record",
    ]
    base = journal.base_of(len(snapshot), zlib.crc32(snapshot))
    named = journal.frame("salt", journal.FrameKind.CHECKPOINT, base.encode())
    for data in (journal.header("shop", "salt", base), journal.header("shop", "salt", "9-01234567") + named):
        assert salvage(snapshot, data + frames, "shop").state.entries.keys() == {"a", "x"}


async def test_the_whole_state_in_a_journal(tmp_path: Path) -> None:
    """A journal that begins with the whole state needs no snapshot. A torn tail and a missing journal are named."""
    world = World("running", tmp_path)
    async with world.filled():
        assert world.manager is not None
        (tmp_path / "state" / "shop.journal").unlink()
        await world.manager.set("more", 1)
        data = (tmp_path / "state" / "shop.journal").read_bytes()
    found = salvage(None, data + b"torn", "shop")
    assert len(found.state.entries) == 5
    assert found.lost == ["the end of the journal, 4 bytes, is not a whole record; it was never acknowledged"]
    followed = b'{"a":1,"$lab_state":{"format":1,"revision":1,"id":"743364091beeb863","wall":1,"followed":true,"crc32":"%08x"}}'
    whole = followed.split(b',"crc32"')[0]
    found = salvage(followed % zlib.crc32(whole), None, "shop")
    assert found.lost == ["the journal is missing: the changes since the last checkpoint are lost"]
    with pytest.raises(CorruptionError):
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "shop.json").write_bytes(followed % zlib.crc32(whole))
        await read_state("shop", FileStorage(tmp_path / "two"))


def subjects(report: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    return {check["subject"]: (check["ok"], check["text"]) for check in report["checks"]}


@pytest.mark.parametrize("kind", ["stopped", "running", "shared"])
async def test_a_report_on_a_state(tmp_path: Path, kind: Any) -> None:
    """`doctor` reports content, holder, socket, permissions, file system and room."""
    world = World(kind, tmp_path)
    async with world.filled():
        done = await world.run("doctor", "--json", world.state)
        assert (done.code, done.err) == (0, "")
        found = subjects(done.json)
        assert found["content"][0]
        assert found["content"][1].startswith("4 keys, ")
        assert (f"pid {os.getpid()} " in found["holder"][1]) is world.is_running
        assert (f"pid {os.getpid()} answers" in found["socket"][1]) is (kind == "shared")
        assert found["directory"][0]
        assert found["room"][0]
        assert found["shop.lock"] == (True, f"owner {os.geteuid()}, mode 0600")
        assert "file system" in found


async def test_a_report_on_what_needs_a_look(tmp_path: Path) -> None:
    """`doctor` marks damage, other users' access, left files and a socket without an owner. The exit code is that of a reading."""
    world = World("stopped", tmp_path)
    async with world.filled():
        pass
    state = tmp_path / "state"
    (state / "shop.json").chmod(0o644)
    os.chown(state / "shop.lock", 12345, 12345)
    for name in ("shop.json.replaced-1", "shop.journal.torn-1", "shop.damaged-1", "shopping.json.replaced-1"):
        (state / name).touch()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(state / "shop.sock"))
    damage(state / "shop.json", b":12,", b":13,")
    done = await world.run("doctor", "--json", world.state)
    found = subjects(done.json)
    bad = {"content", "socket", "shop.json", "shop.lock", "shop.json.replaced-1", "shop.damaged-1"}
    assert {subject for subject, (ok, _) in found.items() if not ok} - {"file system", "holder"} == bad
    assert done.code == 4
    lines = (await world.run("doctor", world.state)).out.splitlines()
    assert lines[0].startswith("LOOK  content: ")
    assert (await world.run("doctor", "state/none")).code == 1
    (state / "shop.sock").unlink()
    (state / "shop.sock").mkdir()
    assert subjects((await world.run("doctor", "--json", world.state)).json)["socket"][0] is False


async def test_a_report_without_all_permissions(tmp_path: Path) -> None:
    """If a directory cannot be listed or searched, `doctor` says so in the lines of these checks, and makes the other ones."""
    world = World("stopped", tmp_path)
    async with world.filled():
        pass
    state = tmp_path / "state"
    for path in (state / "shop.sock", state / "shop.lock"):  # a link in a circle is an error for each user
        path.unlink(missing_ok=True)
        path.symlink_to(path)
    found = subjects((await world.run("doctor", "--json", world.state)).json)
    assert found["socket"] == (False, "this cannot be checked: Too many levels of symbolic links")
    assert found["directory"] == (False, "this cannot be checked: Too many levels of symbolic links")
    assert found["room"][0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_report_on_a_directory_that_cannot_be_listed(tmp_path: Path) -> None:
    """The state can be read, but its holder and the files that were left are not known."""
    world = World("stopped", tmp_path)
    async with world.filled():
        pass
    state = tmp_path / "state"
    for directory in (state, *list(state.parents)[:3]):  # up to the directory for all temporary files
        directory.chmod(directory.stat().st_mode & 0o700 | 0o11)
    for path in state.iterdir():
        path.chmod(0o644)
    done = await world.run("doctor", "--json", world.state, env=under(user=65534))
    assert done.code == 0
    found = subjects(done.json)
    assert found["content"][0]
    assert {subject for subject, (_, text) in found.items() if "Permission denied" in text} == {
        "holder", "files that were left",
    }  # fmt: skip


async def test_names_in_a_report(tmp_path: Path) -> None:
    """In JSON, a path that is not UTF-8 is escaped. Files that another state has left are not in the report."""
    directory = tmp_path / "a\udcff\x1b"
    world = World("stopped", directory)
    directory.mkdir()
    async with world.filled():
        pass
    for name in ("shop.damaged-1.json", "shop.v2.json.torn-1", "shop.json.torn-\x1b", "shop.journal.torn-7"):
        (directory / "state" / name).touch()
    done = await world.run("doctor", "--json", "state/shop")
    assert done.code == 0
    (directory / "state" / "broken.json").write_text("{")
    broken = (await world.run("ls", "--nl", "state")).lines[0]
    assert f"{tmp_path}/a\\udcff\x1b/state/broken.json cannot be loaded" in broken["error"]
    repaired = await world.run("repair", "--json", world.state.replace("shop", "broken"))
    assert "/a\\udcff\x1b/state/broken.damaged-" in repaired.json["kept"]
    found = subjects(done.json)
    assert found["directory"][1].startswith(f"{tmp_path}/a\\udcff\x1b/state can be written")
    assert [subject for subject in found if "torn" in subject or "damaged" in subject] == ["shop.journal.torn-7"]
    assert "\x1b" not in (await world.run("doctor", "state/shop")).out


async def test_a_report_on_a_bucket(tmp_path: Path) -> None:
    """In a bucket, `doctor` tries out whether the store refuses a write whose condition is not met."""
    world = World("stopped in a bucket", tmp_path)
    async with world.filled():
        pass
    found = subjects((await world.run("doctor", "--json", world.state)).json)
    assert found["store"] == (True, "it refuses a write whose condition is not met; a start can write there")


def test_the_file_system_of_a_device() -> None:
    """The type stands behind the dash, in the line of the device."""
    mounts = "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n23 22 0:25 / /n rw - nfs4 host:/x rw\n"
    assert file_system(mounts, os.makedev(8, 1)) == "ext4"
    assert file_system(mounts, os.makedev(0, 25)) == "nfs4"
    assert file_system(mounts, os.makedev(9, 9)) == "unknown"
