"""A process of a round: it runs a shared manager, makes calls of a seeded plan, and writes its history.

`python round_worker.py` is a parent of such processes: it forks one for each line of its input, because a
new interpreter would take longer than a round. It answers on its output: `started <name> <pid>`,
`joined <pid> 0`, `frozen <pid> <milliseconds>`, `ended <pid> <status>`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import random
import select
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import round_points
from round_bugs import BUGS
from round_history import ABSENT, Began, Ended, Gone, History, Kind, Outcome, Saw
from round_life import Life
from round_notes import note_call, note_durable, note_revisions, note_states

from lab_state import Config, Manager
from lab_state.exceptions import (
    ClosedError,
    ConflictError,
    LockedError,
    StorageError,
    TypeMismatchError,
    UnavailableError,
)
from lab_state.storage import FileStorage

STATE = "rounds"
NAMES, PASSING = 5, 2
TEXT = "t/text"
"""A key with a text that never changes."""

DIGITS = 31

_AFTER_ERROR = 0.002
"""The pause after a call that was refused, in seconds."""


class FailedOnPurpose(Exception):  # noqa: N818 -- it is no error
    """The function of the kind `raise` has failed."""


class Worker:
    """The calls of one process."""

    def __init__(self, life: Life, history: History) -> None:
        self.life = life
        self.history = history
        self.state: Manager = Manager(
            Config(STATE, shared=True, owner_timeout=life.owner_timeout, stop_timeout=life.stop_timeout),
            FileStorage(life.directory),
        )
        self._calls = 0
        self._adding = 0
        self._ending = asyncio.Event()
        self._shown = -1

    # What this process shows

    def saw(self) -> None:
        """Write down the whole state, in one step."""
        if self.state.role is None:
            return
        values = self.state.get_all_nowait()
        passing = {key: values.pop(key) for key in [key for key in values if key.startswith("e/")]}
        self.history.add(Saw(time.monotonic_ns(), self.state.revision, values, passing))

    # Life

    async def live(self) -> None:
        """Start, make calls until the end, stop."""
        life, state = self.life, self.state
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._ending.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            await state.start()
        except (UnavailableError, LockedError) as error:
            if life.owner_timeout >= 5:  # otherwise a frozen owner explains it
                raise
            self.history.say(f"start failed: {error}")
            return
        self.history.say(f"started as {state.role}")
        self.saw()
        os.write(1, b"joined %d 0\n" % os.getpid())
        if "mismatch" in life.calls:
            with contextlib.suppress(StorageError):
                await state.set_if_absent(TEXT, "text")
        async with asyncio.TaskGroup() as tasks:
            for number in range(life.tasks):
                tasks.create_task(self._call(random.Random(f"{life.seed} {number}")))
            if life.tasks:
                tasks.create_task(self._watch())
                tasks.create_task(self._look_again())
        self.saw()
        self.history.say("stops")
        try:
            await state.stop()
        except StorageError as error:
            if not self._may_fail:
                raise
            self.history.say(f"stop failed: {type(error).__name__} {error}")

    @property
    def _may_fail(self) -> bool:
        life = self.life
        return bool(life.disk.failing or life.disk.full or life.owner_timeout < 5)

    @property
    def is_over(self) -> bool:
        """Whether no further call is made."""
        return self._ending.is_set()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), seconds)

    async def _call(self, rng: random.Random) -> None:
        kinds = list(self.life.calls)
        weights = list(self.life.calls.values())
        while not self.is_over:
            kind: Any = rng.choices(kinds, weights)[0]
            if kind == "mismatch" and TEXT not in self.state:
                continue
            is_refused = await self.make(kind, rng)
            if is_refused:
                # A broken state refuses each call without a switch to another task. Without this pause, no other task
                # would run, and the history would grow until the test times out.
                await self._pause(_AFTER_ERROR)
            if self.life.pause:
                await self._pause(rng.expovariate(1 / self.life.pause))

    async def _watch(self) -> None:
        """Check what a watch reports: revisions that rise, up to that of the state."""
        last = 0
        async with self.state.watch() as changes:
            reading = asyncio.ensure_future(self._read_changes(changes, last))
            while not self.is_over and not reading.done():
                await self._pause(0.02)
            if not reading.cancel():
                await reading
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def _read_changes(self, changes: Any, last: int) -> None:
        async for change in changes:
            if not last <= change.revision <= self.state.revision:
                raise AssertionError(
                    f"a watch reported revision {change.revision} after {last}, at {self.state.revision}"
                )
            last = change.revision

    async def _look_again(self) -> None:
        """Read now and then, because keys expire without a change."""
        while not self.is_over:
            self.saw()
            await self._pause(0.02)

    # Calls

    async def make(self, kind: Kind, rng: random.Random) -> bool:
        """Make one call, and write down when it begins and how it ends. Return whether the state refused it."""
        self._calls += 1
        began = self._planned(kind, f"{self.life.name}-{self._calls}", rng)
        revisions = note_call()
        self.history.add(began)
        outcome: Outcome = "ok"
        result: Any = None
        text = ""
        failure: Exception | None = None
        try:
            result = await self._make(began)
        except ConflictError as error:
            outcome, text = "not made", repr(error)
        except ClosedError as error:
            outcome, text, failure = "not made", repr(error), error
        except (TypeMismatchError, FailedOnPurpose) as error:
            outcome, text = "raised", repr(error)
        except StorageError as error:
            told, failure = getattr(error, "outcome", None), error
            outcome, text = ("not made" if told == "not made" else "unknown"), f"{error!r} {told}"
        at = time.monotonic_ns()
        self.history.add(
            Ended(
                began.call, at, outcome, self.state.revision if self.state.role else 0, result,
                revisions[-1] if revisions and outcome == "ok" else None, text,
            )
        )  # fmt: skip
        return isinstance(failure, (ClosedError, StorageError))

    def _planned(self, kind: Kind, call: str, rng: random.Random) -> Began:
        digit, wanted = -1, 0
        name = f"s/{rng.randrange(NAMES)}"
        if kind == "incr":
            each = DIGITS // 8
            if self.life.slot < 0:
                kind, keys = "append", [f"l/{rng.randrange(self.life.lists)}"]
            else:
                keys = [f"n/{self._adding // each}"]
                digit = self.life.slot * each + self._adding % each
                self._adding += 1
        elif kind == "mismatch":
            keys = [TEXT]
        elif kind in {"append", "raise"}:
            keys = [f"l/{rng.randrange(self.life.lists)}"]
        elif kind == "append_both":
            keys = [f"l/{number}" for number in rng.sample(range(self.life.lists), 2)]
        elif kind == "set_many":
            keys = [f"s/{number}" for number in rng.sample(range(NAMES), 2)]
        elif kind == "delete_all":
            keys = ["s/"]
        elif kind == "expire":
            keys = [f"e/{rng.randrange(PASSING)}"]
        elif kind == "look":
            keys = [name, f"l/{rng.randrange(self.life.lists)}", f"s/{rng.randrange(NAMES)}"]
        elif kind in {"catch_up", "wait"}:
            keys, wanted = [], self.state.revision
        else:
            keys = [name]
        return Began(call, kind, keys, time.monotonic_ns(), digit, wanted)

    async def _make(self, began: Began) -> Any:
        state, own, kind = self.state, began.call, began.kind
        key = began.keys[0] if began.keys else ""
        simple: dict[str, Callable[[], Awaitable[Any]]] = {
            "incr": lambda: state.incr(key, 4**began.digit),
            "append": lambda: state.update(key, lambda ids: [*ids, own], []),
            "append_both": lambda: state.transact(lambda tx: _append(tx, began.keys, own)),
            "set": lambda: state.set(key, own),
            "set_many": lambda: state.set_many(dict.fromkeys(began.keys, own)),
            "delete": lambda: state.delete(key),
            "delete_all": lambda: state.delete_all(key),
            "pop": lambda: state.pop(key, ABSENT),
            "add": lambda: state.set_if_absent(key, own),
            "get_or_set": lambda: state.get_or_set(key, lambda: own),
            "claim": lambda: state.transact(lambda tx: _claim(tx, key, own)),
            "look": lambda: state.transact(lambda tx: {one: tx.get(one, ABSENT) for one in began.keys}),
            "expire": lambda: state.set(key, own, ttl=0.03),
            "mismatch": lambda: state.incr(key),
            "raise": lambda: state.update(key, _fail, []),
            "catch_up": state.catch_up,
            "wait": lambda: state.wait_revision(began.wanted, timeout=8),
        }
        return await simple[kind]()


def _append(tx: Any, keys: list[str], own: str) -> list[list[str]]:
    before = [tx.get(key, []) for key in keys]
    for key, ids in zip(keys, before, strict=True):
        tx.set(key, [*ids, own])
    return before


def _claim(tx: Any, key: str, own: str) -> Any:
    found = tx.get(key, ABSENT)
    if found is ABSENT:
        tx.set(key, own)
    return found


def _fail(ids: object) -> object:
    raise FailedOnPurpose


# The process


def run(life: Life) -> int:
    """Live this life, and return the status of the process."""
    history = History(life.history)
    history.say("begins")
    round_points.install(life, history.say)
    note_revisions()
    note_durable(history.add)
    if life.bug:
        BUGS[life.bug].patch()
    try:
        asyncio.run(_live(life, history))
    except BaseException as error:
        history.add(Gone(time.monotonic_ns(), repr(error)))
        if life.bug:
            return 1
        raise
    history.add(Gone(time.monotonic_ns(), "stopped"))
    return 0


async def _live(life: Life, history: History) -> None:
    worker = Worker(life, history)
    note_states(worker.saw)
    try:
        await worker.live()
    finally:
        # The event loop removes its handler at its end. Without this, a late SIGTERM would kill a process that has stopped.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, so that an aborted test leaves no process behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _fork(line: bytes) -> None:
    life, parent = msgspec.json.decode(line, type=Life), os.getpid()
    if (pid := os.fork()) != 0:
        os.write(1, b"started %s %d\n" % (life.name.encode(), pid))
        return
    status = 1
    try:
        _die_with(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(0)
        errors = os.open(f"{life.history}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(errors, 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        status = run(life)
    except BaseException:  # noqa: BLE001 -- the process ends here
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    """Fork a process for each line of the input, until the input ends."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    gc.freeze()
    woken, wakes = os.pipe()
    for end in (woken, wakes):
        os.set_blocking(end, False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until a child has a handler for it
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    os.write(1, b"ready\n")
    rest = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap()
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _fork(line)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            os.write(1, b"ended %d %d\n" % (pid, status))


if __name__ == "__main__":
    main()
