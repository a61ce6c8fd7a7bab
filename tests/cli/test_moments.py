"""`ls`, `history`, `restore` and `--at`: the states of a place, and the moments of a state."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from commanded import Kind, World
from s3_world import endpoint

from lab_state import Config, FileStorage, Manager, S3Storage, UnavailableError, read_state
from lab_state._codec import decode_record
from lab_state.cli import _moments
from lab_state.cli._moments import readings


class Past(World):
    """A state with a history of three generations: of the key `n` with the values 0 to 5, and of a key `gone`."""

    def history(self) -> FileStorage | S3Storage:
        if self.in_bucket:
            return S3Storage(
                self.bucket.name, prefix="states", endpoint_url=endpoint(), region_name="us-east-1", history=3600
            )
        return FileStorage(self.directory / "state", history=3600)

    async def made(self) -> None:
        for start in (0, 2, 4):
            async with Manager(Config(name="shop", flush_interval=0), self.history()) as state:
                await state.set("n", start)
                await state.set("n", start + 1)
                if start == 0:
                    await state.set("gone", [1])
                elif start == 2:
                    await state.delete("gone")


@pytest.fixture(params=["stopped", "stopped in a bucket"])
async def past(request: pytest.FixtureRequest, tmp_path: Path) -> Past:
    world = Past(request.param, tmp_path)
    await world.made()
    return world


async def test_moments_of_a_state(past: Past) -> None:
    """`--at` reads a revision of the history, `history` lists the generations and the changes of a key, and `restore` goes back."""
    assert (await past.run("--at", "r3", "dump", past.state)).json == {"n": 1, "gone": [1]}
    assert (await past.run("--at", "r5", "get", past.state, "n")).out == "3\n"

    listed = (await past.run("history", "--json", past.state)).json
    assert listed["format"] == 1
    assert listed["generations"][-1]["in_use"] is True
    assert [one["last_revision"] for one in listed["generations"]][-1] == 8
    changes = (await past.run("history", "--nl", past.state, "gone")).lines
    assert [(one["revision"], one["kind"]) for one in changes] == [(3, "set"), (6, "delete")]
    assert changes[0]["value"] == [1]
    for more in (["--nl"], ["gone"]):
        refused = await past.run("history", "--json", past.state, *more)
        assert (refused.code, refused.out) == (2, "")
    assert [one["revision"] for one in (await past.run("tail", "--nl", "--since", "r5", past.state)).lines] == [6, 7, 8]

    outside = await past.run("--at", "r99", "get", past.state, "n")
    assert (outside.code, outside.out) == (2, "")
    assert "8" in outside.err

    as_json = (await past.run("restore", past.state, "--at", "r3", "--into", "shop", "--dry-run", "--json")).json
    assert (as_json["at_revision"], as_json["keys"], as_json["added"]) == (3, 2, 1)
    other = await past.run("restore", past.state, "--at", "r3", "--into", "other")
    assert (other.code, other.out) == (0, f"{past.place}/other: revision 3\n")
    if past.in_bucket:
        refused = await past.run("restore", past.state, "--at", "r3", "--into", "shop")
        assert (refused.code, refused.out) == (3, "")
        assert "--depose" in refused.err
    more = ["--depose"] if past.in_bucket else []
    back = await past.run("restore", past.state, "--at", "r3", "--into", "shop", "--json", *more)
    assert (back.code, back.json) == (0, {"format": 1, "revision": 9, "before": 8})
    assert await past.reading() == {"n": 1, "gone": [1]}
    undone = await past.run("restore", past.state, "--at", "r8", "--into", "shop", *more)
    assert undone.out.splitlines()[1] == f"to undo this: lab-state restore {past.state} --at r9 --into shop"
    assert await past.reading() == {"n": 5}


async def test_history_for_people(tmp_path: Path) -> None:
    """Generations and changes are lines with revisions, times and sizes."""
    past = Past("stopped", tmp_path)
    await past.made()
    lines = (await past.run("history", past.state)).out.splitlines()
    assert lines[0].split() == ["REVISIONS", "FROM", "TO", "BYTES"]
    assert lines[-1].split()[0].endswith("r8")
    assert lines[-1].endswith("in use")
    nl = (await past.run("history", "--nl", past.state)).lines
    assert len(nl) == len(lines) - 1
    dry = await past.run("restore", past.state, "--at", "r3", "--into", "shop", "--dry-run")
    assert dry.out.splitlines()[1] == "compared with revision 8: 1 added, 0 removed, 1 changed; nothing was written"
    assert (await past.run("restore", past.state, "--at", "r3", "--into", "other")).code == 0
    assert (await past.run("restore", past.state, "--at", "r3", "--into", "other")).code == 2
    changes = (await past.run("history", past.state, "n")).out.splitlines()
    assert [line.split("  ")[1:] for line in changes] == [
        [f"r{r}", "set", "n", str(n)] for n, r in enumerate((1, 2, 4, 5, 7, 8))
    ]
    assert (await past.run("history", past.state, "none")).out == ""


async def test_a_value_of_another_program_is_in_the_history(tmp_path: Path) -> None:
    """The file of another program has revision 0. `history` shows its value, and the changes after it."""
    world = World("stopped", tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shop.json").write_text('{"a": 1}')
    async with Manager(Config(name="shop", flush_interval=0), world.storage()) as state:
        await state.set("a", 2)
        found = (await world.run("history", "--nl", world.state, "a")).lines
    assert [(one["revision"], one["value"]) for one in found] == [(0, 1), (1, 2)]


async def test_a_checkpoint_while_the_history_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a checkpoint replaces the generation in use before it is read, it is read from the history. No change is left out.

    If checkpoints replace it again and again, an error says so.
    """
    storage = FileStorage(tmp_path, history=3600)
    config = Config(name="shop", flush_interval=0)
    async with Manager(config, storage) as state:
        await state.set("a", 1)
    async with Manager(config, storage) as state:
        await state.set("a", 2)
        await state.set("a", 3)
        reading = readings(storage, "shop", None)
        revisions = [decode_record(record).end for record in (await anext(reading)).records]
    async with Manager(config, storage) as state:
        await state.set("a", 4)
        revisions += [decode_record(record).end async for one in reading for record in one.records]
        assert revisions == [1, 2, 3, 4]
        monkeypatch.setattr(_moments, "MOST_LISTS", 1)
        reading = readings(storage, "shop", None)
        await anext(reading)
    async with Manager(config, storage) as state:
        await state.set("a", 5)
        with pytest.raises(UnavailableError, match="read it again"):
            _ = [one async for one in reading]


async def test_a_dry_run_leaves_out_what_has_expired(tmp_path: Path) -> None:
    """A key that has expired since the moment is not restored, so `restore --dry-run` does not count it."""
    past = Past("stopped", tmp_path)
    async with Manager(Config(name="shop", flush_interval=0), past.history()) as state:
        await state.set_many({"a": 1, "long": 1})
        await state.set("soon", 1, ttl=0.001)
        await state.set("long", 2, ttl=3600)
    dry = ("restore", past.state, "--at", "r2", "--into", "shop", "--dry-run", "--json")
    found = (await past.run(*dry)).json
    assert [found[name] for name in ("keys", "added", "removed", "changed")] == [2, 0, 0, 1]


async def test_a_restore_names_the_command_that_undoes_it(tmp_path: Path) -> None:
    """The line works in a shell as it stands, with any path."""
    past = Past("stopped", tmp_path / "a directory's name")
    past.directory.mkdir()
    await past.made()
    done = await past.run("restore", past.state, "--at", "r3", "--into", "shop")
    program, *undo = shlex.split(done.out.splitlines()[1].removeprefix("to undo this: "))
    assert (program, (await past.run(*undo)).code) == ("lab-state", 0)
    assert await past.reading() == {"n": 5}


async def test_a_clear_and_a_hole_in_the_changes_of_a_key(tmp_path: Path) -> None:
    """A clear ends each key. If records are missing, the snapshot shows what has changed."""
    world = Past("stopped", tmp_path)
    async with Manager(Config(name="shop", flush_interval=0), world.history()) as state:
        await state.set("a", 1)
        await state.delete_all()
        await state.set("b", 1, ttl=1000)
        kinds = [(one["revision"], one["kind"]) for one in (await world.run("history", "--nl", world.state, "a")).lines]
        assert kinds == [(1, "set"), (2, "clear")]
    # Without a history, the records are gone, and only the snapshot is left.
    for value in (1, 2, None):
        async with Manager("plain", FileStorage(tmp_path / "state")) as state:
            if value is None:
                await state.delete("a")
            else:
                await state.set("a", value)
        found = (await world.run("history", "--nl", f"{world.place}/plain", "a")).lines
        assert [one["value"] for one in found] == ([value] if value else [])


async def test_a_list_of_states(tmp_path: Path) -> None:
    """`ls` prints each state with its holder. A damaged state has the reason in its line."""
    world = World("running", tmp_path)
    async with world.filled():
        async with Manager("other", FileStorage(tmp_path / "state")) as state:
            await state.set("a", 1)
        (tmp_path / "state" / "broken.json").write_text("{")
        (tmp_path / "state" / "plain.json").write_text('{"a": 1}\n')
        lines = {one["name"]: one for one in (await world.run("ls", "--nl", world.place)).lines}
        assert sorted(lines) == ["broken", "other", "plain", "shop"]
        assert (lines["shop"]["keys"], lines["shop"]["live"]) == (4, True)
        assert f"pid {os.getpid()} " in lines["shop"]["holder"]
        assert (lines["other"]["keys"], lines["other"]["live"], lines["other"]["holder"]) == (1, False, None)
        assert "cannot be loaded" in lines["broken"]["error"]
        table = (await world.run("ls", world.place)).out.splitlines()
        assert table[0].split() == ["NAME", "KEYS", "BYTES", "REVISION", "AGE", "HOLDER"]
        assert table[1].split()[:5] == ["broken", "-", "1", "B", "-"]
        assert "stopped" in table[2]
        assert table[3].split()[:6] == ["plain", "1", "9", "B", "0", "-"]
        assert f"pid {os.getpid()}" in table[4]


async def test_the_remedy_for_damage_is_a_subcommand(tmp_path: Path) -> None:
    """If a generation of the history is good, the message has the subcommand that restores it, and this works as it stands."""
    past = Past("stopped", tmp_path / "a directory's name")
    past.directory.mkdir()
    await past.made()
    path = past.directory / "state" / "shop.json"
    path.write_bytes(path.read_bytes().replace(b'"n":5', b'"n":7'))
    (row,) = (await past.run("ls", "--nl", past.place)).lines
    refused = await past.run("verify", past.state)
    assert refused.code == 4
    for message in (refused.err, row["error"]):
        (remedy,) = re.findall("; `lab-state (restore .*)` restores it", message)
    assert (await past.run(*shlex.split(remedy))).code == 0
    assert await past.reading() == {"n": 5}


async def test_a_list_of_states_in_a_bucket(tmp_path: Path) -> None:
    """`ls` lists the states under a prefix."""
    world = World("stopped in a bucket", tmp_path)
    async with world.filled():
        (line,) = (await world.run("ls", "--nl", world.place)).lines
        assert (line["name"], line["keys"], line["live"]) == ("shop", 4, None)


async def test_a_running_state_is_not_restored(tmp_path: Path) -> None:
    """A restore in place of a running state is refused with exit code 3. A restore into a new state works beside it."""
    for kind in ("running", "shared"):
        world = World(kind, tmp_path / kind)
        world.directory.mkdir()
        async with world.filled():
            refused = await world.run("restore", world.state, "--at", "r2", "--into", "shop")
            assert (refused.code, refused.out) == (3, "")
            assert (await world.run("restore", world.state, "--at", "r1", "--into", "copy")).code == 0
            view = await read_state("copy", world.storage())
            assert (view.revision, len(view)) == (1, 2)


@pytest.mark.parametrize("kind", ["stopped", "stopped in a bucket"])
async def test_a_write_by_hand_stays_in_the_history(tmp_path: Path, kind: Kind) -> None:
    """If a state has a history, each write of the command can be undone. A write to a state without one begins none."""
    world = World(kind, tmp_path)
    depose = ["--depose"] if world.in_bucket else []
    bucket = (
        S3Storage(world.bucket.name, prefix="states", endpoint_url=endpoint(), region_name="us-east-1", history=1000)
        if world.in_bucket
        else None
    )
    async with Manager("shop", bucket or FileStorage(tmp_path / "state", history=1000)) as state:
        await state.set("a", 1)
    for value in ("2", "3"):
        assert (await world.run("set", world.state, "a", value, *depose)).code == 0
    assert await (await read_state("shop", world.storage(), at=2)).get("a") == 2
    if not world.in_bucket:
        assert not any(one["hole_before"] for one in (await world.run("history", "--nl", world.state)).lines)
        assert (await world.run("set", "--create", "plain/shop", "a", "1")).code == 0
        assert (await world.run("set", "plain/shop", "a", "2")).code == 0
        assert not (tmp_path / "plain" / "shop.history").exists()
