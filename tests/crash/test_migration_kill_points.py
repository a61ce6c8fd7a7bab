"""SIGKILL before each call of a migration to the disk, and in the middle of each write: before or after, never between."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import migrating
import msgspec
import pytest
from injector import Kill
from lives import ENVIRONMENT, in_memory
from migrating import NAME, Death, Plan

from lab_state import FileStorage, Manager, read_state

OLD: dict[str, Any] = {"users/ann": {"name": "Ann B"}, "users/bob": {"name": "Bob C"}, "n": 1}
NEW: dict[str, Any] = {"people/ann": {"first": "Ann", "last": "B"}, "people/bob": {"first": "Bob", "last": "C"}, "n": 1}


@contextmanager
def children() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that forks a child for each plan."""
    command = [sys.executable, str(Path(migrating.__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def live(process: subprocess.Popen[bytes], plan: Plan) -> Death:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(plan) + b"\n")
    process.stdin.flush()
    return msgspec.json.decode(process.stdout.readline(), type=Death)


async def fill(directory: Path, *, is_clean: bool) -> None:
    """Make a state of version 1, after a clean stop or after a kill."""
    state = Manager(NAME, FileStorage(directory))
    await state.start()
    await state.set_many({**OLD, "users/ann": 0})
    await state.set("users/ann", OLD["users/ann"], ttl=1_000_000)
    await state.flush()
    if is_clean:
        await state.stop()
        return
    assert state._flusher is not None
    await state._flusher.abort().aclose()
    await state.stop()


async def check(directory: Path) -> bool:
    """Check that the state is that from before or after. Return whether it is migrated."""
    view = await read_state(NAME, FileStorage(directory))
    found = view.schema, await view.get_all()
    assert found in [(1, OLD), (3, NEW)]
    key = "people/ann" if view.schema == 3 else "users/ann"
    assert (await view.expires_in(key) or 0) > 900_000
    return view.schema == 3


async def complete(directory: Path) -> None:
    """Start on what is left, and check that the migration is complete, and was made once."""
    async with Manager(NAME, FileStorage(directory), schema=migrating.schema()) as state:
        assert await state.get_all() == NEW
        assert (await state.expires_in("people/ann") or 0) > 900_000


@pytest.mark.timeout(180)
@pytest.mark.parametrize("is_clean", [True, False], ids=["clean", "unclean"])
@pytest.mark.parametrize("history", [False, True], ids=["plain", "history"])
def test_killed_at_each_call(tmp_path: Path, *, history: bool, is_clean: bool) -> None:
    """Up to some call the state is that from before, and from then on that from after. The next start completes the migration."""
    outcomes: list[bool] = []
    with in_memory(tmp_path) as root, children() as process:
        asyncio.run(fill(root / "old", is_clean=is_clean))
        directory = root / "state"
        shutil.copytree(root / "old", directory)
        unharmed = live(process, Plan(directory=str(directory), history=history))
        assert unharmed.status == 0
        assert asyncio.run(check(directory))
        for number, call in enumerate(unharmed.calls, 1):
            for half in (False, True) if call == "write" else (False,):
                shutil.rmtree(directory)
                shutil.copytree(root / "old", directory)
                plan = Plan(directory=str(directory), history=history, kill=Kill(number=number, half=half))
                assert live(process, plan).status == -signal.SIGKILL
                outcomes.append(asyncio.run(check(directory)))
                asyncio.run(complete(directory))
    assert outcomes == sorted(outcomes)
    assert {*outcomes} == {False, True}
    print(f"killed at {len(outcomes)} points, {outcomes.count(False)} before the migration was made")
