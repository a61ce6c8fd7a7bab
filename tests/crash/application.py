"""An application that meets faults: it goes on as a user's would, and says what it did and what it was told.

`python application.py zygote` has imported the package once, and forks a child for each
plan, one JSON object a line, on its standard input. `python application.py once PLAN`
follows one plan by itself, for a tracer. Either writes events to its standard output,
one JSON object a line, each in one write, so none is torn by a kill:

    try         the change that makes this revision follows
    durable     everything up to this revision is durable, says a call that returned, or `durable_revision`
    error       a call raised this; with what `status()` says in the same turn of the loop
    checkpoint failed   with what `status()` says in the same turn
    started     with this revision
    settled     the application has nothing more to do, and waited until all was well
    stopped     `stop()` has returned, or raised
    calls       the storage's calls so far, in order, and how many failed; at the end
    dead        from the zygote: the child has ended, with this wait status

Every change is a function of the revision that it makes, so `history` knows each state
that there can ever be.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import injector
import msgspec

from lab_state import Config, FileStorage, LockedError, Manager, StorageError
from lab_state.storage import _file_writer, _fs
from lab_state.storage import file as file_storage
from lab_state.storage._worker import Threads, Worker

NAME = "lab"
CHANGES = 22
RESTARTED_AT = 11
FULL = range(4, 17)
"""While the state has one of these revisions, the disk is full, where a plan says so."""
_MIN_CHECKPOINT_BYTES = 1900
"""Of the journal, in place of 1 MiB: several checkpoints in a short life."""
_FASTER = 50
_TRIES = 3
_LONGEST = 30
"""Seconds of a life that comes to its end; a longer wait is one for ever."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One life of the application.

    Attributes:
        directory: Of the state; everything beside it is none of the faults' business.
        interval: `Config.flush_interval`.
        end: By SIGKILL, or by a clean stop.
        faults: Which calls fail.
        kill: At which call it is killed, if it does not come to its end.
        heals: Whether the faults end, so that all is well some time.
        limit: How large a file may grow while the disk is `FULL`.
        ballast: A file that is deleted when the disk is to be no longer full.
        patient: Whether the application never calls `flush`, and leaves that to the background.
        history: Whether the storage keeps a history.
    """

    directory: str
    interval: float | None
    end: Literal["kill", "stop"]
    faults: list[injector.Fault] = []
    kill: injector.Kill | None = None
    heals: bool = True
    limit: int | None = None
    ballast: str | None = None
    patient: bool = False
    history: bool = False


class FastClock:
    """The machine's clock, fifty times as fast: pauses between attempts stay, but are short."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic() * _FASTER

    def call_later(self, delay: float, callback: Callable[[], object], /) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay / _FASTER, callback)


def manager(
    directory: Path | str, interval: float | None = None, clock: FastClock | None = None, *, history: bool = False
) -> Manager:
    config = Config(name=NAME, flush_interval=interval, stop_timeout=10)
    return Manager(config, FileStorage(directory, history=3600 if history else None), clock=clock)


async def change(state: Manager, revision: int) -> None:
    """Make the change that makes this revision."""
    kind, value = revision % 8, {"revision": revision, "text": "ü" * (revision * 7 % 60)}
    if kind == 0:
        await state.delete_all("some/")
    elif kind == 1:
        await state.set("one", value)
    elif kind == 2:
        await state.set_many({f"some/{number}": value for number in range(revision % 3 + 1)})
    elif kind == 3:
        await state.incr("count")
    elif kind == 4:
        async with state.transaction() as tx:
            tx.delete("one")
            tx.set_many({"two": value, f"some/{revision}": value})
    elif kind == 5:
        await state.set("large", f"{revision} " + "x" * 600)
    elif kind == 6:
        await state.update("two", lambda two: {**two, "updated": revision})
    else:
        await state.set("some/last", revision)


def history() -> list[dict[str, Any]]:
    """Return every state that there can be, by revision: the changes made one by one in a dict."""
    entries: dict[str, Any] = {}
    states: list[dict[str, Any]] = [{}]
    for revision in range(1, CHANGES + 1):
        kind, value = revision % 8, {"revision": revision, "text": "ü" * (revision * 7 % 60)}
        if kind == 0:
            entries = {key: old for key, old in entries.items() if not key.startswith("some/")}
        elif kind == 1:
            entries["one"] = value
        elif kind == 2:
            entries |= {f"some/{number}": value for number in range(revision % 3 + 1)}
        elif kind == 3:
            entries["count"] = entries.get("count", 0) + 1
        elif kind == 4:
            entries.pop("one", None)
            entries |= {"two": value, f"some/{revision}": value}
        elif kind == 5:
            entries["large"] = f"{revision} " + "x" * 600
        elif kind == 6:
            entries["two"] = {**entries["two"], "updated": revision}
        else:
            entries["some/last"] = revision
        states.append(copy.deepcopy(entries))
    return states


def say(event: str, **details: object) -> None:
    os.write(1, msgspec.json.encode({"event": event, **details}) + b"\n")


class Application:
    """One life."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._state = manager(plan.directory, plan.interval, FastClock(), history=plan.history)

    async def live(self) -> None:
        """Make every change, stop and start again in the middle, and wait until all is well."""
        state, restarted = self._state, False
        if not await self._start():
            return
        while state.revision < CHANGES:
            if state.revision >= RESTARTED_AT and not restarted:
                restarted = True
                await self._stop()
                if not await self._start():
                    return
            else:
                self._fill(state.revision)
                await self._change(state.revision + 1)
                await self._checkpointed()
        self._fill(CHANGES)
        await self._settle()
        if self._plan.end == "stop":
            await self._stop()

    async def _start(self) -> bool:
        for _ in range(_TRIES):
            try:
                await self._state.start()
            except LockedError:  # a stop() that ran out of its time has left a call to itself, which will end
                await asyncio.sleep(0.05)
            except StorageError as error:
                self._say_error("start", error)
            else:
                say("started", revision=self._state.revision, entries=await self._state.get_all())
                return True
        return False

    async def _change(self, revision: int) -> None:
        """Make a change.

        If it fails, it is in memory all the same, and the application goes on although it is not durable.
        """
        say("try", revision=revision)
        if await self._told("change", change(self._state, revision)) and self._plan.interval == 0:
            say("durable", revision=revision)
        if self._state.revision != revision:
            raise RuntimeError("a change did not make one revision")
        for _ in range(0 if self._plan.patient else _TRIES):
            if await self._told("flush", self._state.flush()):
                say("durable", revision=revision)
                break
        say("durable", revision=self._state.durable_revision)

    def _fill(self, revision: int) -> None:
        """Fill the disk, or free the space again."""
        if self._plan.limit is not None:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._plan.limit if revision in FULL else most, most))
        if self._plan.ballast is not None and revision >= FULL.stop:
            Path(self._plan.ballast).unlink(missing_ok=True)

    async def _told(self, where: str, call: Any) -> bool:
        try:
            await call
        except StorageError as error:
            self._say_error(where, error)
            return False
        return True

    def _say_error(self, where: str, error: StorageError) -> None:
        status = self._state.status()
        cause = error.__cause__
        say(
            "error",
            where=where,
            kind=type(error).__name__,
            message=str(error),
            errno=cause.errno if isinstance(cause, OSError) else None,
            last_error=status.last_error,
            durable=status.durable_revision,
            revision=status.revision,
            unflushed=status.unflushed_keys,
        )

    async def _checkpointed(self) -> None:
        """Wait for the checkpoint, so that the calls come in one order; its failures are told by `status()` alone."""
        before = self._state.status().flush_failures
        flusher = self._state._flusher
        assert flusher is not None
        error: str | None = None
        for _ in range(10):  # the error is read in each turn, because the next attempt may succeed
            await asyncio.sleep(0)
            error = error or self._state.status().last_error
        await flusher.checkpoints.ended()
        status = self._state.status()
        if status.flush_failures > before:
            say("checkpoint failed", last_error=error or status.last_error)

    async def _settle(self) -> None:
        for _ in range(500 if self._plan.heals else 2):
            if not self._plan.patient:
                await self._told("flush", self._state.flush())
            await self._checkpointed()
            if self._state.status().last_error is None and self._state.status().unflushed_keys == 0:
                break
            await asyncio.sleep(0.002)  # as long as a tenth of a second of the clock's
        status = self._state.status()
        say(
            "settled",
            last_error=status.last_error,
            durable=status.durable_revision,
            revision=status.revision,
            unflushed=status.unflushed_keys,
            age=status.unflushed_age,
        )

    async def _stop(self) -> None:
        well = await self._told("stop", self._state.stop())
        status = self._state.status()
        say("stopped", well=well, durable=status.durable_revision, revision=status.revision)


def follow(plan: Plan) -> None:
    """Live, say what the calls were, and die."""
    logging.disable()  # what is logged is in the errors too
    _file_writer._MIN_CHECKPOINT_BYTES = _MIN_CHECKPOINT_BYTES
    calls = injector.Injector(Path(plan.directory), plan.faults, plan.kill)
    if plan.faults or plan.kill or sys.argv[1] == "zygote":
        calls.install()
    asyncio.run(asyncio.wait_for(Application(plan).live(), _LONGEST))
    say("calls", calls=calls.calls, struck=calls.struck)
    if plan.end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def once(plan: Plan) -> None:
    """Follow one plan for a tracer.

    The tracer must know the names of all files beforehand. It counts the calls of each thread
    apart, so each worker has a thread of its own here. If workers shared their threads, the
    same fault would strike another call in each life.
    """
    numbers = itertools.count()
    _fs.temporary = lambda path: f"{path}.{next(numbers):08x}.tmp"
    file_storage.Worker = lambda _: Worker(Threads("lab_state, of one worker"))  # type: ignore[assignment, attr-defined]
    follow(plan)


def zygote() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                follow(msgspec.json.decode(line, type=Plan))
            except BaseException:  # noqa: BLE001 -- the test sees the status, people the traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        say("dead", status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    if sys.argv[1] == "zygote":
        zygote()
    else:
        once(msgspec.json.decode(sys.argv[2], type=Plan))
