"""The subcommands that read, a thousand times each, beside a writer at full speed: each output is a moment between call and return.

`nox -s command` runs this file. `LAB_STATE_COMMAND_READINGS` sets the number.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command import Done, command

from lab_state import Config, FileStorage, Manager

READINGS = int(os.environ.get("LAB_STATE_COMMAND_READINGS", "1000"))
KEYS = 50
PAD = "x" * 2000
"""A value of each change. With it, a checkpoint follows after some thousand changes."""


class Between(NamedTuple):
    """The revisions of the state around one run.

    Attributes:
        first: The durable revision at the call.
        last: The revision at the return.
    """

    first: int
    last: int

    def check(self, revision: int) -> None:
        assert self.first <= revision <= self.last, (revision, self)


def content(revision: int) -> dict[str, Any]:
    """Return the state at a revision: each change sets `n`, one of the other keys, and the pad."""
    keys = {f"k/{key}": last for key in range(KEYS) if (last := revision - (revision - key) % KEYS) > 0}
    return {"n": revision, "pad": PAD, **keys}


def get(done: Done, between: Between) -> None:
    between.check(done.json["value"])
    assert done.json["revision"] == done.json["value"]


def keys(done: Done, between: Between) -> None:
    between.check(done.json["revision"])
    assert done.json["keys"] == sorted(content(between.first))


def dump(done: Done, between: Between) -> None:
    between.check(done.json["n"])
    assert done.json == content(done.json["n"])


def stats(done: Done, between: Between) -> None:
    between.check(done.json["revision"])
    assert done.json["keys"] == len(content(between.first))


def verify(done: Done, between: Between) -> None:
    stats(done, between)
    assert done.json["faults"] == []


def tail(done: Done, between: Between) -> None:
    """Check that each change is there once. After a checkpoint there are none."""
    lines = [line for line in done.lines if line["key"] == "n"]
    if lines:
        between.check(lines[-1]["revision"])
        first = lines[0]["revision"]
        assert [line["value"] for line in lines] == list(range(first, first + len(lines)))
        assert [line["revision"] for line in lines] == [line["value"] for line in lines]


def history(done: Done, between: Between) -> None:
    """Check that the generations follow each other without a hole, up to now."""
    found = done.json["generations"]
    between.check(found[-1]["last_revision"])
    assert [one["in_use"] for one in found] == [False] * (len(found) - 1) + [True]
    assert not any(one["hole_before"] for one in found[1:])
    assert all(one["last_revision"] >= two["first_revision"] for one, two in pairwise(found))


def diff(done: Done, between: Between) -> None:
    """Check that the second reading is not older than the first one."""
    found = {line["key"]: line for line in done.lines}
    if "n" in found:
        one, two = (found["n"][side]["value"] for side in ("before", "after"))
        assert between.first <= one < two <= between.last
        before, after = content(one), content(two)
        assert set(found) == {key for key in after if before[key] != after[key]}
    assert done.code == bool(found)


def ls(done: Done, between: Between) -> None:
    (one,) = done.lines
    between.check(one["revision"])
    assert (one["live"], one["keys"]) == (True, len(content(between.first)))


def doctor(done: Done, _: Between) -> None:
    found = {check["subject"]: check for check in done.json["checks"]}
    assert found["content"]["ok"]
    assert str(os.getpid()) in found["holder"]["text"]


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[Done, Between], None]]] = {
    "get": (("get", "--json", "state/shop", "n"), get),
    "keys": (("keys", "--json", "state/shop"), keys),
    "dump": (("dump", "state/shop"), dump),
    "stats": (("stats", "--json", "state/shop"), stats),
    "verify": (("verify", "--json", "state/shop"), verify),
    "tail": (("tail", "--nl", "state/shop"), tail),
    "history": (("history", "--json", "state/shop"), history),
    "diff": (("diff", "--nl", "state/shop", "state/shop"), diff),
    "ls": (("ls", "--nl", "state"), ls),
    "doctor": (("doctor", "--json", "state/shop"), doctor),
}


class Writer:
    """A state that is changed as fast as possible, with checkpoints, a history, and a new start now and then."""

    def __init__(self, directory: Path) -> None:
        self.storage = FileStorage(directory / "state", history=3600, history_bytes=64 << 20)
        self.durable = self.begun = 0

    async def run(self, ready: asyncio.Event) -> None:
        while True:
            async with Manager(Config(name="shop", flush_interval=0), self.storage) as state:
                for _ in range(20_000):
                    self.begun = state.revision + 1
                    await state.set_many({"n": self.begun, f"k/{self.begun % KEYS}": self.begun, "pad": PAD})
                    self.durable = state.durable_revision
                    if self.durable > KEYS:
                        ready.set()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [*CHECKS, "at"])
async def test_readings_beside_a_writer(tmp_path: Path, name: str) -> None:
    """Each reading ends with code 0, and shows one moment of the state between its call and its return."""
    writer, ready, codes = Writer(tmp_path), asyncio.Event(), Counter[int]()
    writing = asyncio.create_task(writer.run(ready))
    await ready.wait()
    for _ in range(READINGS):
        first, wanted = writer.durable, random.randint(max(1, writer.durable - 2000), writer.durable)
        arguments, check = CHECKS["dump"] if name == "at" else CHECKS[name]
        if name == "at":
            arguments = ("--at", f"r{wanted}", *arguments)
        done = await asyncio.to_thread(command, *arguments, cwd=tmp_path)
        codes[done.code] += 1
        between = Between(wanted, wanted) if name == "at" else Between(first, writer.begun)
        assert done.err == "", (arguments, done)
        assert done.code == 0 or name == "diff", (arguments, done)
        check(done, between)
    assert not writing.done()
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    sys.stdout.write(f"{name}: {READINGS} readings, exit codes {dict(codes)}, beside {writer.durable} changes\n")
