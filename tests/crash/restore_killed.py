"""A program that restores a state in one child process after the other. Each is killed at another call. Prints what was found.

Arguments: a directory, and `good` or `damaged`, for the state before the restore.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from injector import Injector, Kill

from lab_state import CorruptionError, FileStorage, Manager, list_generations, read_state, restore_state

WANTED, LAST = 4, 6


async def make(directory: Path) -> None:
    """Make a state with two generations."""
    async with Manager("lab", FileStorage(directory, history=3600)) as state:
        for number in range(1, 4):
            await state.set("a", number)
            await state.flush()
    async with Manager("lab", FileStorage(directory, history=3600)) as state:
        for number in range(4, LAST + 1):
            await state.set("a", number)
            await state.flush()


def restore(directory: Path, number: int) -> int:
    """Restore in a child process that is killed before its n-th call. Return its status."""
    child = os.fork()
    if child == 0:
        try:
            Injector(directory, [], Kill(number=number)).install()
            asyncio.run(restore_state("lab", FileStorage(directory), WANTED, into="lab"))
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 -- the parent reports it
            sys.stderr.write(f"{error!r}\n")
            os._exit(3)
    return os.waitpid(child, 0)[1]


async def check(directory: Path, *, is_damaged: bool) -> str:
    """Return whether the state is the one before or the restored one. Every moment of the history must still be there."""
    storage = FileStorage(directory)
    try:
        view = await read_state("lab", storage)
    except CorruptionError:
        assert is_damaged
        found = "before"
    else:
        found = {LAST: "before", LAST + 1: "restored"}[view.revision]
        assert await view.get("a") == (LAST if found == "before" else WANTED)
    for revision in range(1, LAST + 1 - is_damaged):
        assert await (await read_state("lab", storage, at=revision)).get("a") == revision
    if found == "restored" and is_damaged:
        assert any(len(list(path.iterdir())) == 2 for path in directory.glob("lab.damaged-*"))
    # The next call succeeds, whatever the kill has left.
    again = await restore_state("lab", storage, WANTED, into="lab")
    assert again.revision == {"before": LAST + 1, "restored": LAST + 2}[found]
    async with Manager("lab", storage) as state:
        assert (state.revision, await state.get("a")) == (again.revision, WANTED)
    assert not any(one.hole_before for one in await list_generations("lab", storage)) or is_damaged
    assert not list(directory.glob("*.tmp"))
    return found


def main() -> None:
    logging.disable()
    root, is_damaged = Path(sys.argv[1]), sys.argv[2] == "damaged"
    asyncio.run(make(root / "made"))
    if is_damaged:
        path = root / "made" / "lab.json"
        path.write_bytes(path.read_bytes().replace(b'"a":6', b'"a":7'))
    found: list[str] = []
    number = status = 1
    while status:
        shutil.rmtree(root / "state", ignore_errors=True)
        os.system(f"cp -a {root}/made {root}/state")
        status = restore(root / "state", number)
        if status not in {0, 9}:
            sys.exit(f"the child that should die at call {number} has the status {status}")
        found.append(asyncio.run(check(root / "state", is_damaged=is_damaged)))
        number += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main()
