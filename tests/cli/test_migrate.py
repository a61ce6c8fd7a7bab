"""The subcommands `migrate` and `check`."""

from __future__ import annotations

from pathlib import Path

import pytest
from commanded import Kind, World, script

from lab_state import Config, FileStorage, Manager, Schema, read_state

APP = """
import msgspec
from lab_state import Schema

class Stock(msgspec.Struct):
    n: int

schema = Schema(3, types={"stock/": Stock})

@schema.migration(to=2)
def counts(draft):
    for key, value in draft.items("stock/"):
        draft.set(key, {"n": value})

@schema.migration(to=3)
def carts(draft):
    for key in draft.keys("cart/"):
        draft.move(key, key.replace("cart/", "carts/"))
    draft.delete("old")
    draft.set("new", "x" * 100)

plain = Schema(1)
typed = Schema(1, types={"stock/": Stock})
newer = Schema(1, types={"stock/": int})
gap = Schema(2)

broken = Schema(2)
@broken.migration(to=2)
def fails(draft):
    draft.get("missing")

wrong = Schema(2, types={"stock/": Stock})
@wrong.migration(to=2)
def changes_nothing(draft):
    pass

empty = Schema(3)
@empty.migration(to=2)
def empties(draft):
    draft.delete_all()
    draft.set("old", 2)

@empty.migration(to=3)
def stays(draft):
    pass

class Apps:
    schema = schema
"""


async def made(directory: Path, kind: Kind = "stopped") -> World:
    world = World(kind, directory)
    (directory / "app.py").write_text(APP)
    async with Manager("shop", world.storage()) as state:
        await state.set_many({"stock/apple": 12, "stock/pear": 3, "old": 1})
        await state.set("cart/ann", ["apple"], ttl=3600)
    return world


async def test_migrate(tmp_path: Path) -> None:
    """A dry run prints what would change, and writes nothing. Then the state is migrated, once."""
    world = await made(tmp_path)
    before = (tmp_path / "state/shop.json").read_bytes()
    dry = await world.run("migrate", "--dry-run", "app:schema", world.state)
    lines = dry.out.splitlines()
    assert dry.code == 0
    assert lines[0].startswith("to version 2: counts: 2 keys changed, ")
    assert lines[1].startswith("to version 3: carts: 4 keys changed, ")
    assert lines[2:4] == ['~ stock/apple  12 -> {"n":12}', '~ stock/pear  3 -> {"n":3}']
    assert lines[4] == '+ carts/ann  ["apple"]'
    assert lines[5].endswith(" s; nothing was written")
    found = (await world.run("migrate", "--dry-run", "--json", "app:Apps.schema", world.state)).json
    assert [(step["to"], step["name"], step["changed"]) for step in found["migrations"]] == [
        (2, "counts", 2),
        (3, "carts", 4),
    ]
    assert (found["before"], found["after"], found["misfits"], found["revision"]) == (1, 3, [], 2)
    assert found["first"][0] == {
        "key": "stock/apple",
        "before": {"value": 12, "expires": None},
        "after": {"value": {"n": 12}, "expires": None},
    }
    assert (tmp_path / "state/shop.json").read_bytes() == before
    assert (await world.run("migrate", "app:schema", world.state)).out == "migrated from version 1 to 3; revision 3\n"
    view = await read_state("shop", world.storage())
    assert (view.schema, await view.get("stock/apple"), await view.get("old", None)) == (3, {"n": 12}, None)
    assert (await view.expires_in("carts/ann") or 0) > 3000
    again = await world.run("migrate", "app:schema", world.state)
    assert again.out == "version 3 already: nothing was migrated; revision 3\n"
    assert (await world.run("migrate", "--json", "app:schema", world.state)).json == {
        "format": 1, "before": 3, "after": 3, "revision": 3,
    }  # fmt: skip
    dry = await world.run("migrate", "--dry-run", "app:schema", world.state)
    assert dry.out.splitlines()[0] == "version 3: nothing to migrate"
    done = await world.run("set", world.state, "stock/apple", '{"n": 1}')
    assert (done.code, (await read_state("shop", world.storage())).schema) == (0, 3)


async def test_more_changes_of_a_dry_run(tmp_path: Path) -> None:
    """Long values are cut, and a deleted key has no value afterwards."""
    world = await made(tmp_path)
    (tmp_path / "other.py").write_text(
        "from lab_state import Schema\nschema = Schema(2)\n@schema.migration(to=2)\ndef f(draft):\n"
        "    draft.delete('old')\n    draft.set('new', 'x' * 100)\n"
    )
    dry = await world.run("migrate", "--dry-run", "other:schema", world.state)
    assert dry.out.splitlines()[1:3] == ["- old  1", f'+ new  "{"x" * 59}…']


async def test_a_dry_run_of_a_migration_that_deletes_all_keys(tmp_path: Path) -> None:
    """A dry run of a migration that deletes all keys counts and shows the deleted keys."""
    world = await made(tmp_path)
    lines = (await world.run("migrate", "--dry-run", "app:empty", world.state)).out.splitlines()
    assert lines[0].startswith("to version 2: empties: 4 keys changed, ")
    assert lines[1].startswith("to version 3: stays: 0 keys changed, ")
    assert lines[2:5] == ["- stock/apple  12", "- stock/pear  3", "~ old  1 -> 2"]


async def test_migrations_that_fail(tmp_path: Path) -> None:
    """The exit code is 1 if a migration fails, or if a value would not be of its type. Nothing is changed."""
    world = await made(tmp_path)
    for arguments in (("--dry-run",), ()):
        failed = await world.run("migrate", *arguments, "app:broken", world.state)
        assert (failed.code, failed.out) == (1, "")
        assert "the migration fails of 'shop' to version 2 failed with KeyNotFoundError" in failed.err
    dry = await world.run("migrate", "--dry-run", "app:wrong", world.state)
    assert dry.code == 1
    assert "! stock/apple  $: not a `Stock`: Expected `object`, got `int`" in dry.out
    assert "the migration would fail: 2 values of a wrong type" in dry.err
    lines = "".join(f'{{"key":"stock/{number}","value":{number}}}\n' for number in range(100))
    assert (await world.run("load", "--nl", "--create", f"{world.place}/many", given=lines)).code == 0
    many = await world.run("migrate", "--dry-run", "app:wrong", f"{world.place}/many")
    assert "the migration would fail: 100 or more values of a wrong type" in many.err
    failed = await world.run("migrate", "app:wrong", world.state)
    assert (failed.code, "'stock/apple' does not fit the schema" in failed.err) == (1, True)
    assert (await read_state("shop", world.storage())).revision == 2
    await world.run("migrate", "app:schema", world.state)
    for arguments in (("--dry-run",), ()):
        older = await world.run("migrate", *arguments, "app:plain", world.state)
        assert (older.code, "by version 3 of the schema" in older.err) == (1, True)


async def test_check(tmp_path: Path) -> None:
    """`check` prints the values that are not of the types of a schema, as lines or as JSON. The exit code is then 1."""
    world = await made(tmp_path)
    found = await world.run("check", "app:typed", world.state)
    assert (found.code, found.err) == (1, "")
    assert found.out.splitlines() == [
        "! stock/apple  $: not a `Stock`: Expected `object`, got `int`",
        "! stock/pear  $: not a `Stock`: Expected `object`, got `int`",
    ]
    found = await world.run("check", "--nl", "--limit", "1", "app:typed", world.state)
    assert found.lines == [
        {"key": "stock/apple", "path": "$", "expected": "not a `Stock`: Expected `object`, got `int`"}
    ]
    good = await world.run("check", "app:newer", world.state)
    assert (good.code, good.out, good.err) == (0, "", "")
    other = await world.run("check", "app:schema", world.state)
    assert (other.code, "the state has version 1 of the schema, and app:schema has version 3" in other.err) == (1, True)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("app", "does not name a schema: write module:name"),
        (":schema", "does not name a schema"),
        ("nothing:schema", "cannot be imported: No module named 'nothing'"),
        ("app:nothing", "cannot be imported"),
        ("app:APP", "cannot be imported"),
        ("app:Stock", "is not a Schema, but an object of the class StructMeta"),
        ("app:gap", "no migration to version 2"),
        (".app:schema", "does not name a schema"),
        ("syntax:schema", "syntax:schema cannot be imported: invalid syntax (syntax.py, line 1)"),
        ("raises:schema", "raises:schema cannot be imported: KeyError at "),
        ("ends:schema", "ends:schema cannot be imported: SystemExit at "),
    ],
)
async def test_a_schema_that_is_none(tmp_path: Path, schema: str, text: str) -> None:
    """The exit code is 2, and the message says what is wrong."""
    world = await made(tmp_path)
    for name, code in (("syntax", "def ("), ("raises", "{}['secret']"), ("ends", "raise SystemExit(0)")):
        (tmp_path / f"{name}.py").write_text(code)
    for subcommand in ("migrate", "check"):
        done = await world.run(subcommand, schema, world.state)
        assert (done.code, done.out) == (2, "")
        assert text in done.err
        assert "secret" not in done.err
    assert (await world.run("check", "app:plain", world.state)).err.endswith("has no types: add types= to the Schema\n")


async def test_a_state_that_runs(tmp_path: Path) -> None:
    """A dry run and a check read beside a program. A migration is refused, with the exit code 3."""
    world = await made(tmp_path)
    async with Manager(Config("shop"), FileStorage(tmp_path / "state")):
        assert (await world.run("migrate", "--dry-run", "app:schema", world.state)).code == 0
        assert (await world.run("check", "app:newer", world.state)).code == 0
        refused = await world.run("migrate", "app:schema", world.state)
        assert (refused.code, "is locked by pid" in refused.err) == (3, True)


async def test_a_state_in_a_bucket(tmp_path: Path) -> None:
    """A state in a bucket is migrated only with `--depose`."""
    world = await made(tmp_path, "stopped in a bucket")
    refused = await world.run("migrate", "app:schema", world.state)
    assert (refused.code, "add --depose" in refused.err) == (3, True)
    done = await world.run("migrate", "--depose", "app:schema", world.state)
    assert done.out == "migrated from version 1 to 3; revision 3\n"
    assert (await read_state("shop", world.storage())).schema == 3


async def test_the_owner_checks_what_the_command_writes(tmp_path: Path) -> None:
    """A running shared state refuses a value that is not of its type in the schema of the owner. Nothing is written. A text is kept."""
    world = World("shared", tmp_path)
    config = Config(name="shop", shared=True)
    schema = Schema(1, types={"stock/": int})
    lines = "".join(f'{{"key":"stock/{number}","value":{number}}}\n' for number in range(1500))
    async with Manager(config, world.storage(), schema=schema) as state:
        assert (await world.run("set", world.state, "stock/apple", "12")).code == 0
        assert (await world.run("set", world.state, "name", '"x"')).code == 0
        refused = await world.run("set", world.state, "stock/apple", '"x"')
        assert (refused.code, refused.out) == (2, "")
        assert "the value of 'stock/apple' does not fit the schema: not a `int`" in refused.err
        assert (await world.run("set", world.state, "stock/apple", '"x"', "--if", "2")).code == 2
        wrong = await world.run("load", "--nl", world.state, given=lines + '{"key":"stock/x","value":"x"}\n')
        assert (wrong.code, wrong.out) == (2, "")
        assert "stop the processes" not in wrong.err
        env = {"EDITOR": script(tmp_path / "editor", 'echo "[]" > "$1"'), "TMPDIR": str(tmp_path)}
        edited = await world.run("edit", world.state, "stock/apple", env=env)
        assert (edited.code, "your text is kept in" in edited.err) == (2, True)
        assert (await state.get_all(), state.revision) == ({"stock/apple": 12, "name": "x"}, 2)
        assert (await world.run("load", "--nl", world.state, given=lines)).code == 0
        assert (len(state), state.revision) == (1502, 3)
