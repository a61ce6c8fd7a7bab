"""SIGKILL before each call with which a subcommand touches a file: nothing that is half done looks whole."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from command import KILL_AT, command

from lab_state import Config, CorruptionError, FileStorage, Manager, UnsupportedError, read_state

OLD = {"a": 1, "b": [1, 2], "c": "x" * 200}
SECOND = {**OLD, "a": 2}
LOADED = {"new": 1, "other": 2}
EVERY = int(os.environ.get("LAB_STATE_COMMAND_KILLS", "7"))
"""The distance between two of the calls before which a process is killed. `nox -s crash` kills at each of them."""

MOST = 200
"""More calls than any of the subcommands makes."""


async def made(directory: Path) -> None:
    """Make a state with two moments: `OLD` at revision 1, and `SECOND` at revision 2."""
    async with Manager(Config(name="shop", flush_interval=0), FileStorage(directory / "state", history=3600)) as state:
        await state.set_many(OLD)
    async with Manager(Config(name="shop", flush_interval=0), FileStorage(directory / "state", history=3600)) as state:
        await state.set("a", 2)


def damaged(directory: Path) -> None:
    path = directory / "state" / "shop.json"
    path.write_bytes(path.read_bytes().replace(b"[1,2]", b"[1,3]"))


async def values(directory: Path, name: str = "shop", folder: str = "state") -> dict[str, Any] | None:
    """Return the values of a state; `None` if there is no state."""
    try:
        found: dict[str, Any] = await (await read_state(name, FileStorage(directory / folder))).get_all()
    except UnsupportedError as error:
        assert error.is_missing  # noqa: PT017 -- another error of the storage is a defect
        return None
    return found


async def state_is(directory: Path, *allowed: dict[str, Any]) -> None:
    assert await values(directory) in allowed


async def after_load(directory: Path) -> None:
    await state_is(directory, SECOND, LOADED)


async def after_set(directory: Path) -> None:
    await state_is(directory, SECOND, {**SECOND, "a": 3})


async def after_copy(directory: Path) -> None:
    """Check that the copy is missing, was never written, or is whole. The source is as before."""
    assert await values(directory, "copy", "two") in (None, {}, SECOND)
    await state_is(directory, SECOND)


async def after_backup(directory: Path) -> None:
    """Check that the path has the older backup or the new one."""
    assert await values(directory, "backup", ".") in (OLD, SECOND)
    await state_is(directory, SECOND)


async def after_restore(directory: Path) -> None:
    await state_is(directory, SECOND, OLD)


async def after_restore_into(directory: Path) -> None:
    assert await values(directory, "again") in (None, {}, OLD)
    await state_is(directory, SECOND)


async def after_repair(directory: Path) -> None:
    """Check that the state is refused as before, or is repaired. The damaged file is there in both cases."""
    try:
        assert await values(directory) == {**SECOND, "b": [1, 3]}
    except CorruptionError:
        assert b"[1,3]" in (directory / "state" / "shop.json").read_bytes()
    else:
        kept = list((directory / "state").glob("shop.damaged-*"))
        assert any(b"[1,3]" in (path / "shop.json").read_bytes() for path in kept)


CASES: dict[str, tuple[tuple[str, ...], bytes, Callable[[Path], Awaitable[None]]]] = {
    "set": (("set", "state/shop", "a", "3"), b"", after_set),
    "load": (("load", "--replace", "state/shop"), b'{"new":1,"other":2}', after_load),
    "copy": (("copy", "state/shop", "two/copy"), b"", after_copy),
    "backup": (("backup", "state/shop", "backup.json"), b"", after_backup),
    "restore": (("restore", "state/shop", "--at", "r1", "--into", "shop"), b"", after_restore),
    "restore into": (("restore", "state/shop", "--at", "r1", "--into", "again"), b"", after_restore_into),
    "repair": (("repair", "state/shop"), b"", after_repair),
}


@pytest.mark.parametrize("name", CASES)
async def test_killed_at_each_call(tmp_path: Path, name: str) -> None:
    """After a SIGKILL at any call, the state is the old one or the new one. The same command then works."""
    arguments, given, check = CASES[name]
    template = tmp_path / "template"
    await made(template)
    (template / "backup.json").write_text(json.dumps(OLD) + "\n")
    if name == "repair":
        damaged(template)
    killed = 0
    for number in range(1, MOST, EVERY):
        directory = tmp_path / str(number)
        await asyncio.to_thread(shutil.copytree, template, directory)
        done = await asyncio.to_thread(command, *arguments, cwd=directory, given=given, env={KILL_AT: str(number)})
        assert done.code in {0, -9}, done
        await check(directory)
        if done.code == 0:
            break
        killed += 1
        if killed % 4 == 0 and name in {"set", "load", "restore", "repair"}:
            again = await asyncio.to_thread(command, *arguments, cwd=directory, given=given)
            assert again.code == 0, again
            await check(directory)
        shutil.rmtree(directory)
    assert 10 < killed * EVERY < MOST - 1
