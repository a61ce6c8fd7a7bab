"""A process that starts on a state of version 1, and migrates it. It is killed at a call to the disk.

`python migrating.py` forks a child for each JSON object on its standard input, and writes one for each to its standard output.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import injector
import msgspec

from lab_state import FileStorage, Manager, MigrationDraft, Schema
from lab_state.storage import _file_writer

NAME = "lab"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One life. Without `kill`, it comes to its end."""

    directory: str
    history: bool
    kill: injector.Kill | None = None


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one life: the wait status, and the calls to the disk. There are none if it was killed."""

    status: int
    calls: list[str]


def split(draft: MigrationDraft) -> None:
    for key, user in draft.items("users/"):
        first, _, last = user["name"].partition(" ")
        draft.set(key, {"first": first, "last": last})


def move(draft: MigrationDraft) -> None:
    for key in draft.keys("users/"):
        draft.move(key, key.replace("users/", "people/"))


def schema() -> Schema:
    made = Schema(3)
    made.migration(to=2)(split)
    made.migration(to=3)(move)
    return made


def storage(plan: Plan) -> FileStorage:
    return FileStorage(plan.directory, history=timedelta(days=7)) if plan.history else FileStorage(plan.directory)


async def live(plan: Plan) -> None:
    async with Manager(NAME, storage(plan), schema=schema()):
        pass


def follow(plan: Plan, report: int) -> None:
    logging.disable()
    _file_writer._MIN_CHECKPOINT_BYTES = 1  # a checkpoint is due after each commit
    calls = injector.Injector(Path(plan.directory), [], plan.kill)
    calls.install()
    asyncio.run(live(plan))
    os.write(report, msgspec.json.encode(calls.calls))


def main() -> None:
    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                follow(msgspec.json.decode(line, type=Plan), writing)
            except BaseException:  # noqa: BLE001 -- the test sees the status, people the traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as report:
            calls = report.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        death = Death(status=status, calls=msgspec.json.decode(calls or b"[]", type=list[str]))
        os.write(1, msgspec.json.encode(death) + b"\n")


if __name__ == "__main__":
    main()
