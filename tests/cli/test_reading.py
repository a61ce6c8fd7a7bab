"""The subcommands that read, on each kind of state: they need neither the lock nor its holder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from commanded import KINDS, Kind, World, on_terminal

from lab_state import FileStorage, Manager


# A bucket does not show whether a process has the state open. So reading it is the same in both cases.
@pytest.fixture(params=[kind for kind in KINDS if kind != "running in a bucket"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    kind: Kind = request.param
    return World(kind, tmp_path)


async def test_each_reading_subcommand_on_each_kind_of_state(world: World) -> None:
    """Each subcommand that reads gives the same answer, whether the state is stopped, running or shared, on disk or in a bucket."""
    async with world.filled():
        live = None if world.in_bucket else world.is_running
        got = (await world.run("get", world.state, "stock/pear", "--json")).json
        wall = got.pop("wall")
        assert wall > 1_700_000_000_000
        assert got == {
            "format": 1, "key": "stock/pear", "value": {"n": 3, "of": ["x", None]}, "expires": None,
            "live": live, "revision": 3, "durable_revision": 3 if live is not True else got["durable_revision"],
        }  # fmt: skip
        assert (await world.run("get", world.state, "stock/apple")).out == "12\n"

        listed = await world.run("keys", world.state)
        assert listed.out == "cart/ann\nodd\\n\\x1b[31mkey\nstock/apple\nstock/pear\n"
        assert (await world.run("keys", "--nl", world.state, "odd")).lines == ["odd\n\x1b[31mkey"]

        dumped = await world.run("dump", world.state)
        assert dumped.json == await world.reading()
        lines = (await world.run("dump", "--nl", world.state, "cart/")).lines
        assert [line["key"] for line in lines] == ["cart/ann"]
        assert lines[0]["expires"] > wall

        found = (await world.run("stats", "--json", "--top", "1", world.state)).json
        assert (found["keys"], found["expiring"]["keys"], found["live"]) == (4, 1, live)
        assert found["prefixes"][0] == {"prefix": "stock/", "keys": 2, "bytes": 46}
        assert found["largest"] == [{"key": "stock/pear", "bytes": 33}]

        checked = await world.run("verify", "--json", world.state)
        assert (checked.code, checked.json["keys"], checked.json["faults"], checked.json["torn_bytes"]) == (0, 4, [], 0)

        same = await world.run("diff", world.state, world.state)
        assert (same.code, same.out) == (0, "")


async def test_a_missing_key_and_a_missing_state(world: World) -> None:
    """The exit code is 1, and the message names the key or the state. Nothing is made."""
    async with world.filled():
        missing = await world.run("get", world.state, "stock/plum")
        assert (missing.code, missing.out) == (1, "")
        assert missing.err == f"lab-state: there is no key 'stock/plum' in {world.state}\n"
        nothing = await world.run("dump", f"{world.place}/none")
        assert (nothing.code, nothing.out) == (1, "")
        assert "there is no state at" in nothing.err
    if not world.in_bucket:
        assert (await world.run("get", "nowhere/shop", "a")).code == 1
        assert not (world.directory / "nowhere").exists()


async def made(directory: Path, values: dict[str, object]) -> World:
    """Return a state on disk with these values."""
    world = World("stopped", directory)
    async with Manager("shop", FileStorage(directory / "state")) as state:
        await state.set_many(values)
    return world


async def test_keys_in_order(tmp_path: Path) -> None:
    """`keys` takes a prefix, a first key and a number, and prints a tree, as lines or as JSON."""
    world = await made(tmp_path, {"a": 1, "b/1": 1, "b/2": 1, "c/d/e": 1})
    assert (await world.run("keys", world.state, "--after", "a", "--limit", "2")).out == "b/1\nb/2\n"
    assert (await world.run("keys", world.state, "b/", "--json")).json["keys"] == ["b/1", "b/2"]
    tree = await world.run("keys", "--tree", world.state)
    assert tree.out == "a\nb/  (2)\n  1\n  2\nc/  (1)\n  d/  (1)\n    e\n"
    for more in (["--tree"], ["--nl"]):
        refused = await world.run("keys", "--json", *more, world.state)
        assert (refused.code, refused.out) == (2, "")
    branches = (await world.run("keys", "--tree", "--nl", "--limit", "2", world.state)).lines
    assert branches == [{"depth": 0, "name": "a", "keys": 1}, {"depth": 0, "name": "b/", "keys": 2}]


async def test_an_empty_state(tmp_path: Path) -> None:
    """A state without keys is an object without members, and no lines."""
    world = await made(tmp_path, {"a": 1})
    assert (await world.run("delete", world.state, "a")).code == 0
    assert (await world.run("dump", world.state)).out == "{}\n"
    assert (await world.run("dump", "--nl", world.state)).out == ""
    stats = await world.run("stats", world.state)
    assert stats.out.splitlines() == ["stopped; revision 2, durable up to 2", "0 keys, 0 B"]
    assert (await world.run("stats", "--json", world.state)).json["percentiles"] == {}


async def test_stats_for_people(tmp_path: Path) -> None:
    """`stats` prints sizes, prefixes and the largest keys, and says how many prefixes it leaves out."""
    world = await made(tmp_path, {"a/x": "y" * 2000, "ü/x": 1, "z": 1})
    async with Manager("shop", FileStorage(tmp_path / "state")) as state:
        await state.set("b/x", 1, ttl=50)
    found = (await world.run("stats", "--top", "2", world.state)).out.splitlines()
    assert found[1:3] == [
        "4 keys, 2.0 KiB",
        "a key with its value: 50 % up to 4 B, 90 % up to 2.0 KiB, 99 % up to 2.0 KiB, 100 % up to 2.0 KiB",
    ]
    assert found[3].startswith(
        "expiring keys: 1; 1 within one minute, 1 within one hour, 1 within one day; the next at 20"
    )
    assert found[5:9] == [
        "PREFIX  KEYS    BYTES",
        "a/         1  2.0 KiB",
        "ü/         1      5 B",
        "and 2 more",
    ]
    assert found[10:] == ["LARGEST KEYS    BYTES", "a/x           2.0 KiB", "ü/x               5 B"]


async def test_differences(tmp_path: Path) -> None:
    """`diff` tells added, removed and changed keys and other expiry times apart. The order of members is no difference, and 1 is not 1.0."""
    one = await made(tmp_path / "one", {"a": {"x": 1, "y": 2}, "b": 1, "c": 1, "e": 1, "long": "x" * 100})
    two = await made(tmp_path / "two", {"a": {"y": 2, "x": 1}, "b": 1.0, "d": 1, "long": "y" * 100})
    async with Manager("shop", FileStorage(tmp_path / "two" / "state")) as state:
        await state.set("e", 1, ttl=100)
    found = await one.run("diff", one.state, two.state)
    assert found.code == 1
    lines = found.out.splitlines()
    assert lines[:3] == ["~ b  1 -> 1.0", "- c  1", "+ d  1"]
    assert lines[3].startswith("~ e  1 -> 1 (expires 20")
    assert lines[4] == f'~ long  "{"x" * 59}… -> "{"y" * 59}…'
    found_lines = (await one.run("diff", "--nl", one.state, two.state)).lines
    assert [line["kind"] for line in found_lines] == ["changed", "removed", "added", "changed", "changed"]
    assert found_lines[0] == {
        "key": "b", "kind": "changed",
        "before": {"value": 1, "expires": None}, "after": {"value": 1.0, "expires": None},
    }  # fmt: skip
    assert found_lines[1] == {"key": "c", "kind": "removed", "before": {"value": 1, "expires": None}}
    assert (await one.run("diff", one.state, "state/no such name")).code == 2


async def test_a_file_of_another_program(tmp_path: Path) -> None:
    """Values with line breaks are printed in one line each."""
    world = World("stopped", tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shop.json").write_text(json.dumps({"a": {"b": [1, 2]}, "c": 1}, indent=4))
    lines = (await world.run("dump", "--nl", world.state)).lines
    assert lines == [{"key": "a", "value": {"b": [1, 2]}, "expires": None}, {"key": "c", "value": 1, "expires": None}]
    assert (await world.run("dump", world.state)).out == '{"a":{"b":[1,2]},\n"c":1}\n'
    assert (await world.run("get", f"{world.state}.json", "a")).out == '{"b":[1,2]}\n'
    seen = (await world.run("get", "--json", world.state, "a")).json
    assert (seen["revision"], seen["wall"]) == (0, None)


async def test_tabs_of_another_program(tmp_path: Path) -> None:
    """JSON with tabs is printed without them. So it stays JSON on a terminal, where control characters are escaped."""
    world = World("stopped", tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shop.json").write_text('{"a":\t{"b":\t1}}')
    for arguments in (("dump", world.state), ("dump", "--nl", world.state), ("history", "--nl", world.state, "a")):
        shown = await asyncio.to_thread(on_terminal, *arguments, cwd=tmp_path)
        assert '{"b":1}' in json.dumps(json.loads(shown.out), separators=(",", ":")), arguments


async def test_damage_is_code_4(tmp_path: Path) -> None:
    """Each reading subcommand refuses a damaged state, and `verify` prints the reason."""
    world = await made(tmp_path, {"a": 12345})
    path = tmp_path / "state" / "shop.json"
    path.write_bytes(path.read_bytes().replace(b"12345", b"12346"))
    for name in ("verify", "dump", "stats", "keys", "tail"):
        found = await world.run(name, world.state)
        assert (found.code, found.out) == ((4, "") if name != "tail" else (0, "")), name
    assert "its checksum does not match" in (await world.run("verify", world.state)).err


async def test_verify_shows_what_is_left_of_a_crash(tmp_path: Path) -> None:
    """A torn tail is no damage: `verify` prints its size. A journal of another state is damage."""
    world = World("running", tmp_path)
    async with world.filled():
        files = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir() if path.suffix != ".lock"}
    other = tmp_path / "other"
    other.mkdir()
    for name, data in files.items():
        (other / name).write_bytes(data + (b"torn" if name.endswith(".journal") else b""))
    torn = await world.run("verify", other / "shop")
    assert torn.code == 0
    assert "the end of the journal, 4 bytes, is not a whole record; it was never acknowledged" in torn.out
    assert (await world.run("verify", "--json", other / "shop")).json["torn_bytes"] == 4
    (other / "shop.journal").write_bytes(b"no journal\n")
    assert (await world.run("verify", other / "shop")).code == 4
    (other / "shop.journal").unlink()
    (other / "shop.json").write_text("{}")
    assert (await world.run("verify", "--json", other / "shop")).json["torn_bytes"] == 0


async def test_tail(tmp_path: Path) -> None:
    """`tail` prints the changes that the journal has, after a moment, as lines or as JSON."""
    world = World("running", tmp_path)
    async with world.filled():
        assert world.manager is not None
        await world.manager.delete("stock/apple")
        every = (await world.run("tail", "--nl", world.state)).lines
        assert [(line["revision"], line["kind"], line["key"]) for line in every] == [
            (1, "set", "stock/apple"), (1, "set", "stock/pear"), (2, "set", "cart/ann"),
            (3, "set", "odd\n\x1b[31mkey"), (4, "delete", "stock/apple"),
        ]  # fmt: skip
        assert every[2]["value"] == ["apple"]
        assert every[2]["expires"] > every[2]["wall"]
        assert "value" not in every[4]
        assert [line["revision"] for line in (await world.run("tail", "--nl", "--since", "r3", world.state)).lines] == [
            4
        ]
        assert len((await world.run("tail", "--nl", "--since", "1h", world.state)).lines) == 5
        assert (await world.run("tail", "--since", "2100-01-01", world.state)).out == ""
        line = (await world.run("tail", world.state, "stock/p")).out
        assert line.endswith('  r1  set  stock/pear  {"n":3,"of":["x",null]}\n')
        assert (await world.run("tail", "--since", "soon", world.state)).code == 2


async def test_wrong_arguments(tmp_path: Path) -> None:
    """A name that no state can have, a moment that is none, and a moment for a subcommand without one are usage errors."""
    world = World("stopped", tmp_path)
    for arguments in (
        ("get", "state/no such name", "a"),
        ("get", "s3://", "a"),
        ("--at", "soon", "get", "state/shop", "a"),
        ("--at", "10m", "set", "state/shop", "a", "1"),
        ("keys", "state/shop", "--limit", "-1"),
        ("no-such-subcommand",),
        ("get", "state/shop"),
    ):
        found = await world.run(*arguments)
        assert (found.code, found.out) == (2, ""), arguments
        assert found.err
    late = await world.run("keys", "state/shop", "--at", "r1")
    assert late.err.endswith("Write the moment before the subcommand: lab-state --at WHEN keys ...\n")
    (tmp_path / "file").touch()
    assert (await world.run("get", "file/shop", "a")).code == 2
