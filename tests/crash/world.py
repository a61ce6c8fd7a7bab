"""The application that uses a state while its disk is recorded, and the model of what it must find again."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import msgspec
from disk import Ack, Kept, Mark, Try, Withdraw
from recorder import DIRECTORY, NAME, Gate, Recorder

from lab_state import Config, FileStorage, Manager, MigrationDraft, Schema, StorageError, read_state, restore_state
from lab_state._draft import Draft
from lab_state._entries import Expiring
from lab_state._flusher import Flusher
from lab_state._journal import ANY_BASE, NO_BASE, read_header
from lab_state._migrations import ANY
from lab_state._periods import LONGEST_TTL
from lab_state._state import State
from lab_state._types import decode_value
from lab_state.storage import _fs
from lab_state.storage._limits import Limits
from lab_state.storage.file import FileSession
from lab_state.testing import ManualClock

QUIET = logging.getLogger("lab_state.crash")
QUIET.disabled = True

Contents = tuple[dict[str, Any], dict[str, int]]
"""Values, and when those expire that do, in milliseconds."""


class DiedError(Exception):
    """The process of the application is dead."""


class Version(NamedTuple):
    """The state at one revision in one process. After a restart, a revision may come again."""

    revision: int
    values: dict[str, Any]
    expires: dict[str, int]


class Clock(ManualClock):
    """A clock that stands still. Calls that are due at once are made at once."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Any:
        if delay <= 0:
            return asyncio.get_running_loop().call_soon(callback)
        return super().call_later(delay, callback)


class Beside(Enum):
    """When a checkpoint is made, beside which something else is to happen."""

    HELD_UP = "while it stands at one of its steps"
    BEFORE = "before that begins"
    FREELY = "whenever the threads get to it"


class Marks(Protocol):
    """Where the application says what it tries and what was acknowledged."""

    def mark(self, entry: Mark) -> None: ...


def generation_in_use(root: Path) -> str:
    """Return the name of the generation in use: the base of its journal, or the salt, if the journal follows no snapshot."""
    path = root / DIRECTORY / f"{NAME}.journal"
    return generation_of(path.read_bytes()) if path.exists() else ""


def generation_of(data: bytes) -> str:
    """Return the name of the generation that has a journal; see `generation_in_use`."""
    header = read_header(data, NAME, "the journal")
    return header.salt if header.base in {ANY_BASE, NO_BASE} else header.base


def is_overdue(at: int, now: int) -> bool:
    """Return whether a sweep deletes a key: the second in which it expires is over."""
    return at // 1000 < now // 1000


def held(state: State) -> Contents:
    """Return what is in memory, expired or not."""
    values, expires = {}, {}
    for key, stored in state.entries.items():
        if isinstance(stored, Expiring):
            expires[key], stored = stored.at, stored.value
        values[key] = decode_value(stored, Any)
    return values, expires


class World:
    """One state, the application that changes it, and its model.

    Attributes:
        versions: Every state that there ever was, by number; 0 is the empty one.
    """

    def __init__(
        self,
        root: Path,
        marks: Marks,
        seed: int | str,
        versions: list[Version] | None = None,
        *,
        stored: int = 0,
        now: int = 0,
        dies: bool = False,
        beside: Beside = Beside.HELD_UP,
        history_bytes: int | None = None,
    ) -> None:
        """Touch nothing.

        Args:
            root: The storage's directory is made below it.
            marks: Is told what is tried, and what is acknowledged.
            seed: What the values are drawn from.
            versions: Every state that there ever was; the empty one if not given.
            stored: Which of them is on the disk, and was acknowledged.
            now: The clock, in seconds since the first application began.
            dies: Whether the process dies when a call to the disk has failed.
            beside: When checkpoints are made.
            history_bytes: The most bytes of the history; without it, there is none.
        """
        self.root = root
        self._history_bytes = history_bytes
        self._history_seconds = LONGEST_TTL
        self.dice = random.Random(seed)
        self.versions = list(versions or [Version(0, {}, {})])
        self._dies = dies
        self._beside = beside
        self._is_beside = False
        self.clock = Clock()
        self.clock.advance(now)
        self._marks = marks
        self._recorder = marks if isinstance(marks, Recorder) else None
        self._first = len(self.versions)  # of this process
        self._found = stored  # what it began with
        self._unpromised = -1  # the version that a user put there, and of which nothing was promised
        self._is_new = True
        self._state: Manager | None = None

    @property
    def state(self) -> Manager:
        assert self._state is not None
        return self._state

    @property
    def latest(self) -> int:
        """The number of the version in memory."""
        return len(self.versions) - 1 if len(self.versions) > self._first else self._found

    # Lifecycle

    async def start(self, *, write_through: bool = False, schema: Schema = ANY) -> None:
        """Begin a process; the state that it finds must be one of the versions. By default it takes a state of any schema."""
        self._check_alive()
        if self._is_new:
            self._is_new = False
            self._ack()
        config = Config(name=NAME, flush_interval=0 if write_through else None, stop_timeout=1e9)
        storage = FileStorage(self.root / DIRECTORY, **self._keeping())
        manager = Manager(config, storage, clock=self.clock, logger=QUIET, schema=schema)
        try:
            await manager.start()
        except StorageError:
            self._check_alive()
            await manager.start()
        self._state = manager
        state = manager._core.state
        self._begin(manager.revision - bool(state.swept), held(state), state.now())
        await self.flush()

    async def migrate(self, version: int) -> None:
        """Begin a process whose code has a newer schema: its start wraps some values, moves some keys and deletes one."""
        schema = Schema(version)
        for to in range(2, version):
            schema.migration(to=to)(lambda _: None)

        def change(draft: MigrationDraft) -> None:
            base = cast("Draft", draft._core.state).base
            self._begin(base.revision, held(base), base.now())
            values, expires = self._copy()
            for number, key in enumerate(draft.keys()):
                value, at = values.pop(key), expires.pop(key, None)
                to = key if number % 3 else f"{key}, version {version}"
                if number % 3 == 2:
                    draft.delete(key)
                    continue
                draft.move(key, to)
                if number % 3:
                    value = [version, value]
                    draft.set(to, value)
                values[to] = value
                if at is not None:
                    expires[to] = at
            self._add(values, expires)

        schema.migration(to=version)(change)
        await self.start(schema=schema)
        assert self.state._core.state.versions == (version, version)

    async def restore(self, number: int) -> None:
        """Restore a version in place, while the state is stopped, unless it was pruned. Start the state after this call."""
        self._check_alive()
        storage = FileStorage(self.root / DIRECTORY, **self._keeping())
        wanted = self.versions[number]
        try:
            view = await read_state(NAME, storage, at=wanted.revision, clock=self.clock)
        except ValueError:
            return
        assert (view.revision, await view.get_all()) == wanted[:2]
        self._add(dict(wanted.values), dict(wanted.expires))
        try:
            restored = await restore_state(NAME, storage, wanted.revision, into=NAME, clock=self.clock)
        except StorageError:  # the state is the one before or the restored one, and the next start finds out which
            self._check_alive()
            return
        assert restored.revision == self.versions[self.latest].revision
        self._ack()
        self._check_alive()

    def _keeping(self) -> dict[str, Any]:
        """Return the arguments for a history."""
        if self._history_bytes is None:
            return {}
        if self._recorder is not None:
            self._recorder.limits = Limits(self._history_seconds * 1000, self._history_bytes)
        return {"history": self._history_seconds, "history_bytes": self._history_bytes}

    def _begin(self, revision: int, found: Contents, now: int) -> None:
        self._first = len(self.versions)
        for number in reversed(range(len(self.versions))):
            version = self.versions[number]
            kept = {key: at for key, at in version.expires.items() if not is_overdue(at, now)}
            values = {key: version.values[key] for key in version.values if key in kept or key not in version.expires}
            if version.revision == revision and (values, kept) == found:
                self._found = number
                if len(kept) < len(version.expires):
                    self._add(values, kept)
                return
        raise AssertionError(f"a start found revision {revision}, which never was: {found}")

    def put_by_hand(self, values: dict[str, Any]) -> None:
        """Put a state there as a user does: make directories and a file, and sync nothing.

        Nothing is promised about it before a change on top of it is acknowledged.
        """
        self._is_new = False
        self._unpromised = 0
        self.versions[0] = Version(0, values, {})
        self._put({f"{NAME}.json": msgspec.json.encode(values)})

    def _put(self, files: dict[str, bytes]) -> None:
        """Make the directories and these files."""
        system = vars(_fs)["os"]
        for path in ("deep", DIRECTORY):
            system.mkdir(str(self.root / path))
        for name, data in files.items():
            fd = system.open(str(self.root / DIRECTORY / name), os.O_RDWR | os.O_CREAT | os.O_EXCL)
            system.pwrite(fd, data, 0)
            system.close(fd)

    def move_to_a_new_directory(self, *, stopped: bool) -> None:
        """Copy the directory as `cp -a`, `tar x` or `rsync` does: make it anew with its contents, and sync nothing.

        After a clean stop nothing is promised about it before a change on top of it is
        acknowledged. What was left by a kill is promised once it was written anew.
        """
        self._marks.mark(Withdraw())
        self._unpromised = self.latest if stopped else -1
        directory = self.root / DIRECTORY
        files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix != ".lock"}
        system = vars(_fs)["os"]
        for path in sorted(directory.iterdir()):
            system.unlink(str(path))
        for path in (directory, directory.parent):
            system.rmdir(str(path))
        self._put(files)

    def limit_the_history(self, *, most_bytes: int | None = None, seconds: int | None = None) -> None:
        """Set another limit for the history, from the next start on."""
        self._history_bytes = most_bytes or self._history_bytes
        self._history_seconds = seconds or self._history_seconds

    def fail_the_next_sync(self) -> None:
        """Let the next sync of a file or a directory fail."""
        if self._recorder is not None:
            self._recorder.fail_the_next_sync()

    def change_the_journal(self, size: int, data: bytes) -> None:
        """Overwrite the journal of a running manager in its place, as a user may do."""
        self._marks.mark(Withdraw())
        path = self.root / DIRECTORY / f"{NAME}.journal"
        system = vars(_fs)["os"]
        fd = system.open(str(path), os.O_RDWR)
        system.ftruncate(fd, size)
        if data:
            system.pwrite(fd, data, 0)
        system.close(fd)
        os.utime(path, ns=(0, 0))  # however coarse the file system's clock is

    def replace_the_snapshot(self, data: bytes) -> None:
        """Put another file in the place of the snapshot of a running manager, as a user may do."""
        path = self.root / DIRECTORY / f"{NAME}.json"
        system = vars(_fs)["os"]
        fd = system.open(f"{path}.other", os.O_RDWR | os.O_CREAT)
        system.pwrite(fd, data, 0)
        system.close(fd)
        system.replace(f"{path}.other", str(path))

    def close_its_descriptor(self) -> int:
        """Close a descriptor twice and open a file, as an application may do; return its descriptor."""
        session = flusher_of(self.state)._session
        assert isinstance(session, FileSession)
        system = vars(_fs)["os"]
        number: int = session._writer._fd
        fd = system.open(str(self.root / DIRECTORY / "other"), os.O_RDWR | os.O_CREAT)
        system.dup2(fd, number)
        system.close(fd)
        return number

    async def stop(self) -> None:
        """Stop cleanly."""
        self._check_alive()
        flusher = flusher_of(self.state)
        session = flusher._session
        if self._recorder is not None:  # a dead process does not try again until its time is over
            loop = asyncio.get_running_loop()
            self._recorder.at_death = lambda: loop.call_soon_threadsafe(flusher.abort)
        try:
            await self.state.stop()
        except StorageError:
            self._check_alive()
        else:
            self._ack()
        finally:
            await session.aclose()  # idempotent; `abort` has left it open
        self._check_alive()

    async def hand_over(self) -> None:
        """Stop as the owner of a shared state does if it has followers: end the journal, and leave the snapshot as it is."""
        self._check_alive()
        flusher = flusher_of(self.state)
        session, write_checkpoint = flusher._session, flusher._write_last
        assert isinstance(session, FileSession)

        async def write_last() -> None:
            try:
                is_handed_over = await session.hand_over()
            except StorageError:
                return  # the next owner settles the state
            if not is_handed_over:
                await write_checkpoint()

        flusher._write_last = write_last  # type: ignore[method-assign]
        await self.stop()

    async def crash(self) -> None:
        """Crash: the process dies, and the page cache stays."""
        if self._recorder is not None:
            self._recorder.die()
        if self._state is not None and self._state.status().phase == "running":
            await abort(self._state)
        self._state = None
        if self._recorder is not None:
            self._recorder.revive()

    def _check_alive(self) -> None:
        recorder = self._recorder
        if recorder is not None and (recorder.is_dead or (self._dies and recorder.struck is not None)):
            self._dies = False
            recorder.die()
            raise DiedError

    # Changes

    async def set(self, key: str, value: Any = None, ttl: float | None = None) -> None:
        value = self.value() if value is None else value
        values, expires = self._copy()
        values[key] = value
        expires.pop(key, None)
        if ttl is not None:
            expires[key] = self.state._core.state.now() + int(ttl * 1000)
        await self._make(values, expires, self.state.set(key, value, ttl=ttl))

    async def set_many(self, *keys: str) -> None:
        values, expires = self._copy()
        new = {key: self.value() for key in keys}
        values.update(new)
        for key in keys:
            expires.pop(key, None)
        await self._make(values, expires, self.state.set_many(new))

    async def delete(self, key: str) -> None:
        values, expires = self._copy()
        del values[key]
        expires.pop(key, None)
        await self._make(values, expires, self.state.delete(key))

    async def delete_all(self) -> None:
        await self._make({}, {}, self.state.delete_all())

    async def transaction(self, put: dict[str, Any], gone: tuple[str, ...] = (), *, give_up: bool = False) -> None:
        """Make several changes as one, or none if the transaction is given up."""
        values, expires = self._copy()
        values.update(put)
        for key in gone:
            del values[key]

        async def make() -> None:
            async with self.state.transaction() as draft:
                for key, value in put.items():
                    draft.set(key, value)
                for key in gone:  # all at once, their order would be that of a set
                    draft.delete(key)
                if give_up:
                    raise ZeroDivisionError

        if give_up:
            try:
                await make()
            except ZeroDivisionError:
                return
        await self._make(values, expires, make())

    def pass_time(self, seconds: int) -> None:
        """Let time pass second by second; a sweep that deletes keys is a change."""
        for _ in range(seconds):
            before = self.state.revision
            self.clock.advance(1.0)
            if self.state.revision > before:
                values, expires = self._copy()
                now = self.state._core.state.now()
                gone = [key for key, at in expires.items() if is_overdue(at, now)]
                for key in gone:
                    del values[key], expires[key]
                self._add(values, expires)

    def value(self) -> Any:
        """Return a value that no other version has."""
        return [len(self.versions), "".join(self.dice.choices("abcdefgh", k=self.dice.randrange(120)))]

    def _copy(self) -> Contents:
        latest = self.versions[self.latest]
        return dict(latest.values), dict(latest.expires)

    def _add(self, values: dict[str, Any], expires: dict[str, int]) -> None:
        revision = self.versions[self.latest].revision + 1
        self.versions.append(Version(revision, values, expires))
        self._marks.mark(Try(self.latest))

    async def _make(self, values: dict[str, Any], expires: dict[str, int], call: Awaitable[Any]) -> None:
        self._add(values, expires)
        number = self.latest
        with suppress(StorageError):  # then it stays, and goes with the next flush
            await call
            if self.state._core.write_through:
                self._marks.mark(Ack(number, self._first))
        self._check_alive()

    # Durability

    async def flush(self) -> None:
        """Flush until it succeeds, three times at most; then wait for the checkpoint that was due for it."""
        await self._flush()
        if not self._is_beside:
            await self.checkpoints_ended()

    async def _flush(self) -> None:
        for _ in range(3):
            try:
                await self.state.flush()
            except StorageError:
                self._check_alive()
            else:
                self._ack()
                self._check_alive()
                return

    def _ack(self) -> None:
        if self.latest == self._unpromised:
            return
        self._marks.mark(Ack(self.latest, self._first))
        if self._history_bytes is not None:
            wall = int(self.clock.time() * 1000)
            self._marks.mark(Kept(self.latest, generation_in_use(self.root), wall))

    async def checkpoint(self) -> None:
        """Make a checkpoint after the one that is under way: the flusher has one at a time."""
        flusher = flusher_of(self.state)
        await flusher.checkpoints.ended()
        flusher.checkpoints.start()
        await self.checkpoints_ended()

    async def pruned(self) -> None:
        """Wait until the thread of the checkpoints has deleted what is too old at this time."""
        session = flusher_of(self.state)._session
        assert isinstance(session, FileSession)
        await asyncio.wrap_future(session._checkpoints.submit(lambda: None))

    async def checkpoints_ended(self) -> None:
        """Wait for the checkpoints that the flusher began by itself."""
        await flusher_of(self.state).checkpoints.ended()
        self._check_alive()

    @asynccontextmanager
    async def held_up(self, work: Awaitable[None], function: str, suffix: str) -> AsyncIterator[None]:
        """Hold the work at this call within the block; see `Beside`."""
        task = asyncio.ensure_future(work)
        gate = None
        if self._recorder is not None and self._beside is Beside.HELD_UP:
            gate = self._recorder.gate = Gate(function, suffix)
            entered = asyncio.ensure_future(gate.entered.wait())
            await asyncio.wait([task, entered], return_when=asyncio.FIRST_COMPLETED)
            entered.cancel()
        elif self._beside is Beside.BEFORE:
            await asyncio.wait([task])
        self._is_beside = True
        try:
            yield
        finally:
            self._is_beside = False
            if self._recorder is not None and gate is not None:
                self._recorder.gate = None
                gate.open()
            await asyncio.wait([task])
            task.exception()  # asked for: where the block fails, this is not what counts
        await task


def flusher_of(manager: Manager) -> Flusher:
    """Return the flusher of a manager that runs."""
    flusher = manager._flusher
    assert flusher is not None
    return flusher


async def abort(manager: Manager) -> None:
    """End a manager as a crash does: nothing more is written, and its threads and its lock are gone."""
    flusher = flusher_of(manager)
    session = flusher.abort()
    await asyncio.wait([task for task in (flusher._task, flusher.checkpoints.task) if task is not None])
    await session.aclose()


def encoded(versions: list[Version]) -> bytes:
    return msgspec.json.encode(versions)


def decoded(data: bytes) -> list[Version]:
    return msgspec.json.decode(data, type=list[Version])
