"""The subcommands that write: to a stopped state, to the owner of a shared one, and not to a state with another holder."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import Done
from commanded import Kind, World, script

from lab_state import FencedError, read_state

WRITABLE: tuple[Kind, ...] = ("stopped", "shared", "stopped in a bucket")


def depose(world: World) -> list[str]:
    return ["--depose"] if world.in_bucket else []


@pytest.fixture(params=WRITABLE)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    kind: Kind = request.param
    return World(kind, tmp_path)


async def test_each_writing_subcommand_on_each_kind_of_state(world: World, tmp_path: Path) -> None:
    """Each change is durable when the command ends, keeps what it should keep, and has the next revision."""
    async with world.filled():
        wrote = await world.run("set", world.state, "stock/apple", "13", "--json", *depose(world))
        assert (wrote.code, wrote.json) == (0, {"format": 1, "revision": 4})
        wrote = await world.run("set", world.state, "new", '"x"', "--ttl", "100", "--if", "4", *depose(world))
        assert (wrote.code, wrote.out) == (0, "revision 5\n")

        deleted = await world.run("delete", world.state, "stock/pear", "no", "odd\n\x1b[31mkey", *depose(world))
        assert (deleted.code, deleted.out) == (1, "deleted 2; revision 6\n")
        assert deleted.err == "lab-state: 1 of 3 keys did not exist\n"
        deleted = await world.run("delete", "--json", world.state, "new", *depose(world))
        assert (deleted.code, deleted.json) == (0, {"format": 1, "revision": 7, "deleted": 1})

        before = await read_state("shop", world.storage())
        edited = await world.run(
            "edit",
            world.state,
            "cart/ann",
            *depose(world),
            env={"EDITOR": script(tmp_path / "editor", 'sed -i s/apple/plum/ "$1"')},
        )
        assert (edited.code, edited.out) == (0, "revision 8\n")
        after = await read_state("shop", world.storage())
        assert await after.get("cart/ann") == ["plum"]
        assert after._expiry("cart/ann") == before._expiry("cart/ann") is not None

        lines = (
            '{"key":"a","value":1}\n{"key":"b","value":2,"expires":99999999999999}\n{"key":"c","value":3,"expires":1}\n'
        )
        loaded = await world.run("load", "--nl", "--json", world.state, *depose(world), given=lines)
        assert (loaded.code, loaded.json) == (0, {"format": 1, "revision": 9, "keys": 2})
        assert await world.reading() == {"stock/apple": 13, "cart/ann": ["plum"], "a": 1, "b": 2}
        view = await read_state("shop", world.storage())
        assert view._expiry("b") == 99999999999999
        loaded = await world.run("load", "--replace", world.state, *depose(world), given='{"z": null}')
        assert (loaded.code, loaded.out) == (0, "loaded 1 key; revision 10\n")
        assert await world.reading() == {"z": None}
        if world.manager is not None:
            assert (await world.manager.get("z"), world.manager.revision) == (None, 10)


async def test_a_dump_is_loaded_as_it_was(world: World) -> None:
    """`load --nl` of a dump of more than a thousand keys gives the same state, with the same expiry times."""
    async with world.filled():
        lines = [{"key": f"k/{n:04}", "value": n, "expires": 9999999999999 if n % 3 else None} for n in range(1200)]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        loaded = await world.run("load", "--nl", "--replace", world.state, *depose(world), given=text)
        assert (loaded.code, loaded.out) == (0, "loaded 1200 keys; revision 4\n")
        assert (await world.run("dump", "--nl", world.state)).out == text


async def test_a_write_that_depends_on_a_revision(world: World) -> None:
    """`set --if` writes if the key has not changed after the revision. Otherwise the exit code is 6, and nothing is written."""
    async with world.filled():
        assert (await world.run("set", world.state, "stock/apple", "1", "--if", "3", *depose(world))).code == 0
        assert (await world.run("set", world.state, "cart/ann", "1", "--if", "4", *depose(world))).code == 0
        refused = await world.run("set", world.state, "stock/apple", "2", "--if", "3", *depose(world))
        assert (refused.code, refused.out) == (6, "")
        assert "nothing was written" in refused.err
        assert (await world.reading())["stock/apple"] == 1


def kept(edited: Done) -> str:
    """Return the text of the file that the command has kept, and delete the file. Check that only this user can read it."""
    path = Path(edited.err.partition("your text is kept in ")[2].splitlines()[0])
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    text = path.read_text()
    shutil.rmtree(path.parent)
    return text


async def test_edits_that_write_nothing(world: World, tmp_path: Path) -> None:
    """An editor that fails, writes garbage or changes nothing, and an edit of a value that was changed meanwhile, write nothing."""
    async with world.filled():
        before = await world.reading()
        temporary = tmp_path / "temporary"
        temporary.mkdir()

        async def edit(code: str, key: str = "stock/pear") -> Done:
            env = {"EDITOR": script(tmp_path / "editor", code), "TMPDIR": str(temporary)}
            return await world.run("edit", world.state, key, *depose(world), env=env)

        failed = await edit("exit 3")
        assert (failed.code, "is kept in" in failed.err) == (2, False)
        failed = await edit('echo "[2]" > "$1"; exit 3')
        assert (failed.code, kept(failed)) == (2, "[2]\n")
        vanished = await edit('rm "$1"')
        assert (vanished.code, "is kept in" in vanished.err) == (5, False)
        garbage = await edit('echo "{secret" > "$1"; chmod 644 "$1"')
        assert (garbage.code, garbage.out) == (2, "")
        assert "nothing was written" in garbage.err
        assert "secret" not in garbage.err
        assert kept(garbage) == "{secret\n"
        assert (await edit('echo > "$1"')).code == 2
        assert list(temporary.iterdir()) == []
        for code in ("true", 'touch -d 2100-01-01 "$1"', 'echo >> "$1"'):
            same = await edit(code)
            assert (same.code, same.out, same.err) == (0, "", "lab-state: not changed, nothing was written\n")
        assert (await edit("true", "none")).code == 1
        assert (await world.run("edit", world.state, "stock/pear", *depose(world), env={"EDITOR": "/no"})).code == 2
        assert await world.reading() == before


async def test_an_edit_of_a_value_in_several_lines(tmp_path: Path) -> None:
    """A value that another program has written in several lines can be edited."""
    world = World("stopped", tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shop.json").write_text('{"a": {\n"b": 1}}')
    env = {"EDITOR": script(tmp_path / "editor", 'sed -i s/1/2/ "$1"')}
    assert (await world.run("edit", world.state, "a", env=env)).code == 0
    assert await world.reading() == {"a": {"b": 2}}


async def changed_meanwhile(world: World, tmp_path: Path, other: list[Any]) -> Done:
    """Edit a value, while another writer changes the state."""
    await asyncio.to_thread(os.mkfifo, tmp_path / "go")
    code = f'echo "[1]" > "$1"; touch {tmp_path}/open; read line < {tmp_path}/go'
    env = {"EDITOR": script(tmp_path / "editor", code)}
    editing = asyncio.create_task(world.run("edit", world.state, "stock/pear", env=env))
    while not (tmp_path / "open").exists():  # noqa: ASYNC110 -- another process makes it
        await asyncio.sleep(0.01)
    await world.run(*other)
    await asyncio.to_thread((tmp_path / "go").write_text, "\n")
    return await editing


@pytest.mark.parametrize("kind", ["stopped", "shared"])
@pytest.mark.parametrize("other", ["set", "delete"])
async def test_an_edit_does_not_overwrite_another_change(tmp_path: Path, kind: Kind, other: str) -> None:
    """A value that was changed or deleted while the editor was open is not overwritten: exit code 6."""
    world = World(kind, tmp_path)
    async with world.filled():
        change = [other, world.state, "stock/pear", *(["5"] if other == "set" else [])]
        edited = await changed_meanwhile(world, tmp_path, change)
        assert (edited.code, edited.out, kept(edited)) == (6, "", "[1]\n")
        assert (await world.reading()).get("stock/pear") == (5 if other == "set" else None)


@pytest.mark.parametrize("kind", ["stopped", "shared"])
async def test_an_edit_beside_a_change_of_another_key(tmp_path: Path, kind: Kind) -> None:
    """A change of another key does not disturb an edit."""
    world = World(kind, tmp_path)
    async with world.filled():
        edited = await changed_meanwhile(world, tmp_path, ["set", world.state, "stock/apple", "5"])
        assert (edited.code, edited.out) == (0, "revision 5\n")
        assert (await world.reading())["stock/pear"] == [1]


async def test_a_running_state_is_not_written(tmp_path: Path) -> None:
    """A state that a process has open alone is refused with exit code 3 and the pid. The files stay as they are."""
    world = World("running", tmp_path)
    async with world.filled():
        before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
        for arguments, given in (
            (("set", world.state, "a", "1"), ""),
            (("delete", world.state, "stock/apple"), ""),
            (("load", world.state), "{}"),
            (("edit", world.state, "stock/apple"), ""),
        ):
            env = {"EDITOR": script(tmp_path / "editor", 'echo 1 > "$1"')}
            refused = await world.run(*arguments, given=given, env=env)
            assert (refused.code, refused.out) == (3, ""), arguments
            assert f"pid {os.getpid()}" in refused.err
        assert kept(refused) == "1\n"
        assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before


async def test_a_state_in_a_bucket_is_not_deposed_by_chance(tmp_path: Path) -> None:
    """A bucket does not show whether a process has the state open. So a write needs `--depose`, which fences that process."""
    world = World("running in a bucket", tmp_path)
    with pytest.raises(FencedError):
        async with world.filled():
            refused = await world.run("set", world.state, "a", "1")
            assert (refused.code, refused.out) == (3, "")
            assert "--depose" in refused.err
            assert world.manager is not None
            await world.manager.set("b", 1)
            assert (await world.run("set", world.state, "a", "1", "--depose")).code == 0
            await world.manager.set("b", 2)
    assert (await world.reading())["a"] == 1


async def test_a_missing_state_is_not_made(tmp_path: Path) -> None:
    """`set`, `delete`, `load` and `edit` make no state, and no directory. With `--create`, `set` and `load` do."""
    world = World("stopped", tmp_path)
    for arguments in (
        ("set", world.state, "a", "1"),
        ("delete", world.state, "a"),
        ("load", world.state),
        ("edit", world.state, "a"),
    ):
        refused = await world.run(*arguments, given="{}")
        assert (refused.code, refused.out) == (1, ""), arguments
    assert list(tmp_path.iterdir()) == []
    assert (await world.run("set", "--create", world.state, "a", "1")).code == 0
    assert (await world.run("load", "--create", f"{world.place}/two", given='{"b":2}')).code == 0
    assert (await world.run("get", f"{world.place}/two", "b")).out == "2\n"


async def test_bad_input_is_refused_before_the_state_is_opened(tmp_path: Path) -> None:
    """A value that is no JSON, truncated JSON, a bad key and a bad ttl are usage errors, and nothing is made."""
    world = World("stopped", tmp_path)
    for arguments, given in (
        (("set", "--create", world.state, "a", "apple"), ""),
        (("set", "--create", world.state, "", "1"), ""),
        (("set", "--create", world.state, "$lab_state", "1"), ""),
        (("set", "--create", "--ttl", "0", world.state, "a", "1"), ""),
        (("set", "--create", "--ttl", "nan", world.state, "a", "1"), ""),
        (("set", "--create", "--if", str(2**63), world.state, "a", "1"), ""),
        (("load", "--create", world.state), '{"a": 1, "b'),
        (("load", "--create", "--nl", world.state), '{"key":"a","value":1}\n{"key":"b","va'),
        (("delete", world.state, "\0"), ""),
    ):
        refused = await world.run(*arguments, given=given)
        assert (refused.code, refused.out) == (2, ""), arguments
    assert list(tmp_path.iterdir()) == []


async def test_a_revision_that_is_not_reached_or_not_known(tmp_path: Path) -> None:
    """`set --if` of a stopped state is refused for a later revision, and for one that no record reaches back to."""
    world = World("stopped", tmp_path)
    async with world.filled():
        for revision, text in (("9", "is at revision 3"), ("1", "use --if 3")):
            refused = await world.run("set", world.state, "stock/apple", "1", "--if", revision)
            assert refused.code == 6
            assert text in refused.err
    # After a crash the journal has its records.
    world = World("running", tmp_path / "two")
    async with world.filled():
        files = {
            path.name: path.read_bytes() for path in (world.directory / "state").iterdir() if path.suffix != ".lock"
        }
    for key, code in (("cart/ann", 6), ("stock/apple", 0)):
        crashed = tmp_path / key
        crashed.mkdir(parents=True)
        for name, data in files.items():
            (crashed / name).write_bytes(data)
        wrote = await world.run("set", crashed / "shop", key, "1", "--if", "1")
        assert wrote.code == code
        assert ("'cart/ann' was changed meanwhile" in wrote.err) is (code == 6)


async def test_backup_and_copy(tmp_path: Path) -> None:
    """A backup of a running state is a state. A copy has each key and expiry, and replaces no state."""
    world = World("running", tmp_path)
    async with world.filled():
        done = await world.run("backup", world.state, "backup.json")
        assert (done.code, done.out.split(",")[0]) == (0, "backup.json: 4 keys")
        done = await world.run("backup", "--json", world.state, "backup.json")
        size = (tmp_path / "backup.json").stat().st_size
        assert done.json == {"format": 1, "revision": 3, "keys": 4, "bytes": size, "path": "backup.json"}
        assert (await world.run("backup", world.state, f"{world.state}.json")).code == 2
        assert (await world.run("backup", world.state, "no/backup.json")).code == 2
        copied = await world.run("copy", world.state, "two/other")
        assert (copied.code, copied.out) == (0, "two/other: 4 keys, read back and compared\n")
        for target in ("two/other", world.state):
            refused = await world.run("copy", world.state, target)
            assert (refused.code, refused.err) == (
                6,
                f"lab-state: {target} exists: choose another target, or delete it first\n",
            )
        for other in ("backup", "two/other"):
            assert (await world.run("diff", world.state, other)).out == ""
        assert (await world.run("copy", "--json", "backup.json", "three/x")).json == {"format": 1, "keys": 4}
        assert (await world.run("copy", "none/x", "three/y")).code == 1


async def test_copy_to_a_bucket_and_back(tmp_path: Path) -> None:
    """A state moves to a bucket under another name, and back. A state that is there already is not deposed."""
    world = World("running in a bucket", tmp_path)
    async with world.filled():
        back = await world.run("copy", world.state, "state/back")
        assert back.code == 0
        there = await world.run("copy", "state/back", f"{world.place}/other")
        assert there.code == 0
        assert (await world.run("diff", world.state, f"{world.place}/other")).code == 0
        assert (await world.run("copy", "state/back", world.state)).code == 6
        assert world.manager is not None
        await world.manager.set("still", "the writer")
