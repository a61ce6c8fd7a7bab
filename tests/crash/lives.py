"""Lives of the application that meets faults, and what must be true of them and of what they leave."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import application
import msgspec
from application import CHANGES, Plan
from witness import UNMEASURED

from lab_state import FileStorage, list_generations, read_state

HERE = Path(__file__).parent
SCRIPT = str(HERE / "application.py")
ENVIRONMENT = {
    **UNMEASURED,
    "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
}
HISTORY = application.history()
REMEDIES = {
    errno.EIO: ("UnavailableError", "Input/output error; the disk may be failing; see the log of the kernel"),
    errno.ENOSPC: ("UnavailableError", "No space left on device; free some space"),
    errno.EDQUOT: ("UnavailableError", "Disk quota exceeded; free some space"),
    errno.EFBIG: ("UnavailableError", "File too large; raise the limit on the size of files"),
    errno.EROFS: ("UnsupportedError", "Read-only file system; the file system is read-only; mount it writable"),
    errno.EACCES: ("UnsupportedError", "Permission denied; give this user the permission"),
}


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """Yield a directory that no disk slows down: a kill leaves to the next process all that was written, synced or not."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK | os.X_OK):
        with tempfile.TemporaryDirectory(dir=memory) as directory:
            yield Path(directory)
    else:
        yield otherwise


class Life:
    """What one life of the application said, and how it ended."""

    def __init__(self, plan: Plan, events: list[dict[str, Any]], status: int) -> None:
        self.plan = plan
        self.events = events
        self.status = status
        self.durable = self.tried = 0

    def of(self, event: str) -> list[dict[str, Any]]:
        return [said for said in self.events if said["event"] == event]

    @property
    def calls(self) -> list[str]:
        """The calls that the storage made."""
        (said,) = self.of("calls")
        return list(said["calls"])

    @property
    def struck(self) -> dict[str, int]:
        """How many calls of which name failed."""
        (said,) = self.of("calls")
        return dict(said["struck"])

    def check(self, durable: int = 0, tried: int = 0) -> None:
        """Check that what was said was true, and that all that was promised is there.

        Args:
            durable: Up to which revision everything was durable before.
            tried: Up to which one changes were tried.
        """
        for said in self.events:
            event = said["event"]
            if event == "try":
                tried = max(tried, said["revision"])
            elif event == "started":
                assert durable <= said["revision"] <= tried, said
                assert said["entries"] == HISTORY[said["revision"]]
            elif event == "durable":
                durable = max(durable, said["revision"])
            elif event == "checkpoint failed":
                assert self.plan.directory in said["last_error"]
            elif event in ("error", "settled", "stopped"):
                durable = max(durable, said["durable"])
                self._check(said)
        assert durable <= tried
        self.durable, self.tried = durable, tried

    def check_what_is_left(self) -> None:
        """Check that another process finds one of the states from the durable one to the tried one, and goes on with it."""
        asyncio.run(_check_what_is_left(Path(self.plan.directory), self.durable, self.tried))

    def check_history(self) -> None:
        """Check that each acknowledged revision can be read."""
        asyncio.run(_check_history(Path(self.plan.directory), self.durable))

    def _check(self, said: dict[str, Any]) -> None:
        if said["event"] == "error":
            self._check_error(said)
        elif said["event"] == "settled" and self.plan.heals:
            well = {"last_error": None, "durable": CHANGES, "revision": CHANGES, "unflushed": 0, "age": 0.0}
            assert said == {"event": "settled", **well}
        elif said["event"] == "stopped" and said["well"]:
            assert said["durable"] == said["revision"]

    def _check_error(self, said: dict[str, Any]) -> None:
        """Check an error: its class is right, it says where, why, and what to do, and the status of that moment has it."""
        where, message = said["where"], said["message"]
        if where == "stop" and "the storage made no progress for 10 s" in message:
            return  # a slow disk
        kind, remedy = REMEDIES[said["errno"]]
        assert said["kind"] == kind, said
        assert f" {self.plan.directory}" in message, said
        assert remedy in message, said
        if where in ("change", "flush"):
            assert "(not durable yet: the changes stay in memory, and " in message
            assert said["durable"] < said["revision"]
        if where != "start":
            assert f" {self.plan.directory}" in said["last_error"]  # of a checkpoint, where one failed since


async def _check_history(directory: Path, durable: int) -> None:
    if not durable:
        return
    storage = FileStorage(directory)
    found = await list_generations(application.NAME, storage)
    assert found[0].first_revision == 0
    assert not any(one.hole_before for one in found)
    assert found[-1].last_revision >= durable
    for revision in {1, durable // 2, durable} - {0}:
        view = await read_state(application.NAME, storage, at=revision)
        assert (view.revision, await view.get_all()) == (revision, HISTORY[revision])


async def _check_what_is_left(directory: Path, durable: int, tried: int) -> None:
    async with application.manager(directory) as state:
        found = await state.get_all()
        assert durable <= state.revision <= tried, (durable, state.revision, tried)
        assert found == HISTORY[state.revision]
        await state.set("more", "more")
    async with application.manager(directory) as state:
        assert await state.pop("more") == "more"
        assert await state.get_all() == found
    assert {file.name for file in directory.iterdir()} <= {"lab.json", "lab.journal", "lab.lock", "lab.history"} | {
        file.name for file in directory.glob("lab.journal.torn-*")
    }
    snapshot = json.loads((directory / "lab.json").read_bytes())
    del snapshot["$lab_state"]
    assert snapshot == found


class Zygote:
    """A process that has imported the package, and forks one child for each life."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def live(self, plan: Plan) -> Life:
        self._stdin.write(msgspec.json.encode(plan) + b"\n")
        self._stdin.flush()
        events: list[dict[str, Any]] = []
        for line in self._stdout:
            said = json.loads(line)
            if said["event"] == "dead":
                return Life(plan, events, said["status"])
            events.append(said)
        raise AssertionError("the zygote died")


@contextmanager
def zygote() -> Iterator[Zygote]:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    with process:
        try:
            yield Zygote(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # and the child that hangs, if that is why we are here


def check_death(life: Life) -> None:
    """Check that it ended as its plan says, and for no other reason."""
    killed = life.plan.end == "kill" or life.plan.kill is not None
    assert life.status == (-signal.SIGKILL if killed else 0), "see its standard error"
