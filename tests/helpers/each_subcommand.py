"""Each subcommand of `lab-state` with arguments, for tests of what is the same for all of them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from command import Done, command
from commanded import script

from lab_state import Config, CorruptionError, FileStorage, Manager, UnsupportedError, read_state

HOSTILE = "odd\n\x1b[31m\x9b\u202e\x7fkey"
"""A key with characters that would control a terminal."""

CONTROL = frozenset("\x1b\x9b\u202e\x7f")

OLD: dict[str, Any] = {"a": 1, "b": [1, 2], "long": "x" * 200, HOSTILE: f"ü€{HOSTILE}", HOSTILE + "2": 1}
NEW: dict[str, Any] = {**OLD, "a": 2, HOSTILE: HOSTILE}

APPLICATION = f"""
from lab_state import Schema
typed = Schema(1, types={{"b": str, {HOSTILE!r}: int}})
schema = Schema(2)
@schema.migration(to=2)
def currency(draft):
    draft.set("a", "EUR")
    draft.set({HOSTILE!r}, {HOSTILE + "!"!r})
"""


class Case(NamedTuple):
    """A subcommand with its arguments.

    Attributes:
        arguments: The arguments, for a state `state/shop` in the current directory.
        code: The exit code.
        given: The input.
        writes: Whether it writes to that state, or makes a new one.
        state: The state that it reads.
    """

    arguments: tuple[str, ...]
    code: int = 0
    given: bytes = b""
    writes: bool = False
    state: str = "state/shop"


CASES: dict[str, Case] = {
    "ls": Case(("ls", "state")),
    "get": Case(("get", "state/shop", HOSTILE)),
    "keys": Case(("keys", "state/shop")),
    "dump": Case(("dump", "state/shop")),
    "stats": Case(("stats", "state/shop")),
    "diff": Case(("diff", "backup.json", "state/shop"), code=1),
    "verify": Case(("verify", "state/shop")),
    "tail": Case(("tail", "state/shop")),
    "history": Case(("history", "state/shop", HOSTILE)),
    "check": Case(("check", "app:typed", "state/shop"), code=1),
    "doctor": Case(("doctor", "state/shop")),
    "backup": Case(("backup", "state/shop", "backup.json"), writes=True),
    "copy": Case(("copy", "state/shop", "two/copy"), writes=True),
    "set": Case(("set", "state/shop", "a", "3"), writes=True),
    "delete": Case(("delete", "state/shop", "a"), writes=True),
    "load": Case(("load", "--replace", "state/shop"), given=b'{"new":1,"other":2}', writes=True),
    "edit": Case(("edit", "state/shop", "a"), writes=True),
    "migrate": Case(("migrate", "app:schema", "state/shop"), writes=True),
    "restore": Case(("restore", "state/shop", "--at", "r1", "--into", "shop"), writes=True),
    "restore into": Case(("restore", "state/shop", "--at", "r1", "--into", "again"), writes=True),
    "repair": Case(("repair", "bad/shop"), writes=True, state="bad/shop"),
}
"""All subcommands but `watch`, which has no end, and `inspect`, which is a server."""

IN_FULL = os.environ.get("LAB_STATE_COMMAND") == "full"
"""Whether each subcommand is run, at each moment. `nox -s command` does so. The usual run has a few of each kind."""

CHOSEN = list(CASES) if IN_FULL else ["ls", "get", "doctor", "load", "copy", "restore"]
WRITING = [name for name in CHOSEN if CASES[name].writes]


async def made(directory: Path) -> Path:
    """Make what the subcommands need: a state `state/shop` with two moments, `OLD` and `NEW`, a damaged state, a backup and a schema."""
    storage = FileStorage(directory / "live", history=3600)
    async with Manager(Config(name="shop", flush_interval=0), storage) as state:
        await state.set_many(OLD)
    async with Manager(Config(name="shop", flush_interval=0), storage) as state:
        await state.set("a", 2)
        await state.set(HOSTILE, HOSTILE, ttl=1e6)
        # As after a crash: the journal has the second moment.
        shutil.copytree(directory / "live", directory / "state")
    shutil.rmtree(directory / "live")
    damaged = shutil.copytree(directory / "state", directory / "bad") / "shop.journal"
    damaged.write_bytes(damaged.read_bytes().replace(b'"a":2', b'"a":3'))
    (directory / "backup.json").write_text(json.dumps(OLD) + "\n")
    (directory / "app.py").write_text(APPLICATION)
    script(directory / "editor", 'echo 3 > "$1"')
    return directory


def editor(directory: Path) -> dict[str, str]:
    """Return the environment with an editor that writes the value 3."""
    return {"EDITOR": str(directory / "editor")}


def files(directory: Path, *, without: tuple[str, ...] = (".lock", ".sock")) -> dict[str, bytes]:
    """Return the files below a directory, with their content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix not in without and "__pycache__" not in path.parts
    }


def run(name: str, place: Path, env: Mapping[str, str] = {}) -> Done:
    """Run a subcommand of the table."""
    case = CASES[name]
    return command(*case.arguments, cwd=place, given=case.given, env={**editor(place), **env})


def fresh(template: Path, place: Path) -> Path:
    """Return a new copy of the template in the place of an older one."""
    shutil.rmtree(place, ignore_errors=True)
    return shutil.copytree(template, place)


async def values(place: Path, state: str) -> dict[str, object] | None:
    """Return the values of a state; `None` if there is no state."""
    directory, name = state.split("/")
    try:
        return await (await read_state(name, FileStorage(place / directory))).get_all()
    except UnsupportedError as error:
        assert error.is_missing  # noqa: PT017 -- another error of the storage is a defect
        return None


AFTER: dict[str, object] = {
    "set": {**NEW, "a": 3},
    "edit": {**NEW, "a": 3},
    "delete": {key: value for key, value in NEW.items() if key != "a"},
    "load": {"new": 1, "other": 2},
    "migrate": {**NEW, "a": "EUR", HOSTILE: HOSTILE + "!"},
    "restore": OLD,
}
"""The content of the state after each subcommand that changes it."""


async def check_whole(name: str, place: Path, *, is_done: bool | None = None) -> None:
    """Check that a subcommand has done its work or nothing. With `is_done`, check which of them."""
    before: object = NEW
    if name == "repair":
        try:
            assert await values(place, "bad/shop") == OLD
            found: object = OLD
        except CorruptionError:
            found = before
        after: object = OLD
        assert any(b'"a":3' in path.read_bytes() for path in (place / "bad").rglob("shop.journal")), "the damaged file"
    elif name == "backup":
        before, found, after = OLD, await values(place, "./backup"), NEW
    elif name in {"copy", "restore into"}:
        before, after = None, NEW if name == "copy" else OLD
        found = await values(place, "two/copy" if name == "copy" else "state/again") or None
    else:
        found, after = await values(place, "state/shop"), AFTER[name]
    assert found in ([before, after] if is_done is None else [after if is_done else before]), name
    if name not in AFTER:
        assert await values(place, "state/shop") == NEW


async def check_again(name: str, place: Path) -> None:
    """Check that the command works after a kill. A copy or a new state that is whole is not written again."""
    there = name in {"copy", "restore into"} and await is_done(name, place)
    again = await asyncio.to_thread(run, name, place)
    assert again.code in ({2, 6} if there else {0, 1} if name == "delete" else {0}), (name, again)
    await check_whole(name, place, is_done=True)


async def is_done(name: str, place: Path) -> bool:
    """Return whether a subcommand has done its work."""
    try:
        await check_whole(name, place, is_done=True)
    except AssertionError:
        return False
    return True
