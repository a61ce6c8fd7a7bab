"""Seeded scenarios of several writers on one state in a real store, each behind a proxy with faults.

A `World` is one state with its writers. A `Writer` simulates one process from its start to its end or crash. In
some worlds, each writer uses only the storage. In other worlds, each writer is a whole manager. Each writer has a
separate proxy. For each request of the writer, the proxy chooses a fault, or no fault, at random. Each request that
reaches the store is also applied to a copy of the store in memory. After every change, that copy must load as a
state that the rules allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import re
import socket
import struct
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from aiobotocore.config import AioConfig
from s3_proxy import Forward, Proxy, Request, Response, error
from s3_world import QuickTime, session_of_all

from lab_state import Config, FencedError, Manager, S3Storage, UnavailableError, UnsupportedError
from lab_state._codec import LoadedState as Loaded
from lab_state._codec import decode_snapshot, replay
from lab_state._periods import LONGEST_TTL
from lab_state.storage.s3 import _keeping, _open, _session
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import FENCE, SEQ, Names, unframe
from lab_state.storage.s3._session import S3Session
from lab_state.testing import ManualClock

History = Literal["conditions", "bytes"]
"""Whether the store honours the condition of a copy, or the writers send the bytes."""

Fate = Callable[[Request, Forward], Awaitable[Response | None]]

PATIENCE = 240.0
"""The time limit of a scenario, in seconds of real time. After this time, it counts as stuck."""

_KEY = re.compile(rb"<Key>([^<]+)</Key>")
_RETRIES_BELOW = 15.0
_STANDSTILL = 15.0
_SLOW_FAILURE = 8.0
_LARGE = 300_000


class BrokenError(AssertionError):
    """The stored objects, or a state that was read from them, break the rules of the format."""


class ScenarioTime(QuickTime):
    def jitter(self, longest: float) -> float:
        return longest


class RetryClock(ManualClock):
    """A clock with which the pauses of a manager between attempts take no time. Longer time limits never expire."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Any:
        if delay < _RETRIES_BELOW:
            asyncio.get_running_loop().call_soon(self.advance, delay)
        return super().call_later(delay, callback)


# The records and snapshots of the writers


def record(start: int, ids: Sequence[str], padding: int) -> bytes:
    return json.dumps({"from": start, "ids": list(ids), "padding": "x" * padding}).encode()


def snapshot(ids: Sequence[str], unique: str, padding: int) -> bytes:
    """Return a snapshot with the same end as a snapshot of the codec, so that the storage adds its stamp."""
    body = json.dumps({"ids": list(ids), "padding": "x" * padding}).encode()[:-1]
    body += b',"$lab_state":{"id":"%s"' % unique.encode()
    return b'%s,"crc32":"%08x"}}' % (body, zlib.crc32(body))


def decode_plain(data: bytes | None, records: Sequence[bytes]) -> list[str]:
    """Return the ids of the changes in a state, in order. The revision of the state is the number of ids."""
    ids: list[str] = [] if data is None else json.loads(data)["ids"]
    for each in records:
        read = json.loads(each)
        start, more = read["from"], read["ids"]
        if start > len(ids):
            raise BrokenError(f"a gap: revision {len(ids)}, and then a record from {start}")
        common = min(len(ids) - start, len(more))
        if ids[start : start + common] != more[:common]:
            raise BrokenError(
                f"two records have different changes from revision {start + 1} on: {ids[start:]} and {more}"
            )
        ids += more[common:]
    return ids


def decode_managed(data: bytes | None, records: Sequence[bytes]) -> list[str]:
    """Return the keys of a manager's state. Each change sets a different key."""
    loaded = Loaded({}, 0) if data is None else decode_snapshot(data, "the copy")
    return list(replay(loaded, tuple(records), "the copy").entries)


class Thing(NamedTuple):
    """An object in the copy of the store."""

    body: bytes
    metadata: dict[str, str]
    void: bool = False  # a fence without effect, because the snapshot covered its number


@dataclass
class Hold:
    """A request that waits in the proxy until the scenario releases it."""

    reader: asyncio.StreamReader
    record: bool  # whether the request is for a record or a fence
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    @property
    def matters(self) -> bool:
        """Whether a client still waits for the response."""
        return not self.over and not self.reader.at_eof()


class FaultyProxy(Proxy):
    """A proxy that chooses a fault for each request. The choice depends on the seed, the request, and the number of its earlier attempts."""

    def __init__(self, upstream: str, writer: Writer) -> None:
        super().__init__(upstream)
        self.writer = writer
        self.ends: dict[asyncio.Task[Any] | None, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self.came: Counter[str] = Counter()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.ends[asyncio.current_task()] = reader, writer
        return await super()._answer(reader, writer)

    async def _forward(self, request: Request) -> Response:
        return await self.writer.world.forward(self.writer, request, super()._forward)

    def _planned(self, request: Request) -> Fate:
        writer = self.writer
        if writer.dead:
            return self.lost
        if writer.clean:
            return self.through
        what = f"{request.method} {unquote(request.target).split('?')[0].rsplit('/', 1)[-1]}"
        self.came[what] += 1
        drawn = random.Random(f"{writer.world.seed} {writer.number} {what} {self.came[what]}")
        fate = self.fate(drawn, request)
        if fate != self.through:
            writer.world.note(f"{writer}: {what}: {fate.__name__}")
        return fate

    def fate(self, drawn: random.Random, request: Request) -> Fate:
        writes = request.method in {"PUT", "POST"}
        writer = self.writer
        if writer.outage is not None:
            if request.method == "PUT":
                return writer.outage
            if not writer.outage_of_writes:
                return self.lost_slowly
        chance = drawn.random()
        # While an open waits between two of its requests, other writers make changes that the open must notice.
        if (chance := chance - (0.25 if writer.base is None and writer.rivals else writer.holds)) < 0:
            return drawn.choice((self.hold, self.hold, self.hold_after))
        if (chance := chance - writer.faults * (1.0 if writes else 0.4)) < 0:
            reads = (self.lost, self.reset, self.cut, self.answers, self.hangs, self.lost_slowly)
            wrote = (
                self.answer_lost, self.answer_reset, self.done_but_answers, self.hangs_after, self.late, self.late,
                self.hangs_late, self.hangs_late, self.repeated, self.repeated_late,
            )  # fmt: skip
            return drawn.choice(reads + wrote + wrote if writes else reads)
        if chance < writer.deaths:
            return drawn.choice((self.dies, self.dies_after, self.dies_late) if writes else (self.dies,))
        return self.through

    # The faults

    async def through(self, request: Request, forward: Forward) -> Response | None:
        return await forward(request)

    async def lost(self, request: Request, forward: Forward) -> Response | None:
        return None

    async def lost_slowly(self, request: Request, forward: Forward) -> Response | None:
        self.writer.time.manual.advance(_SLOW_FAILURE)
        return None

    async def lost_slowly_after(self, request: Request, forward: Forward) -> Response | None:
        await forward(request)
        return await self.lost_slowly(request, forward)

    async def late_slowly(self, request: Request, forward: Forward) -> Response | None:
        self.writer.world.late.append((self, request))
        return await self.lost_slowly(request, forward)

    async def reset(self, request: Request, forward: Forward) -> Response | None:
        connection = self.ends[asyncio.current_task()][1].get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return None

    async def answer_lost(self, request: Request, forward: Forward) -> Response | None:
        await forward(request)
        return None

    async def answer_reset(self, request: Request, forward: Forward) -> Response | None:
        await forward(request)
        return await self.reset(request, forward)

    async def cut(self, request: Request, forward: Forward) -> Response | None:
        """Send half of the response. It may end within the headers."""
        answer = (await forward(request)).encoded(request.method)
        out = self.ends[asyncio.current_task()][1]
        out.write(answer[: len(answer) // 2])
        await out.drain()
        return None

    async def answers(self, request: Request, forward: Forward) -> Response | None:
        status, code = random.Random(self.came.total()).choice(
            ((500, "InternalError"), (503, "SlowDown"), (502, ""), (429, "TooManyRequests"), (409, "Conflict"))
        )
        return error(status, code)

    async def done_but_answers(self, request: Request, forward: Forward) -> Response | None:
        await forward(request)
        status, code = random.Random(self.came.total()).choice(
            ((500, "InternalError"), (503, "SlowDown"), (409, "ConditionalRequestConflict"), (504, ""))
        )
        return error(status, code)

    async def hangs(self, request: Request, forward: Forward) -> Response | None:
        self.writer.time.manual.advance(_STANDSTILL)
        return None

    async def hangs_after(self, request: Request, forward: Forward) -> Response | None:
        await forward(request)
        self.writer.time.manual.advance(_STANDSTILL)
        return None

    async def late(self, request: Request, forward: Forward) -> Response | None:
        self.writer.world.late.append((self, request))
        return None

    async def hangs_late(self, request: Request, forward: Forward) -> Response | None:
        self.writer.world.late.append((self, request))
        self.writer.time.manual.advance(_STANDSTILL)
        return None

    async def repeated(self, request: Request, forward: Forward) -> Response | None:
        await forward(request)
        return await forward(request)

    async def repeated_late(self, request: Request, forward: Forward) -> Response | None:
        self.writer.world.late.append((self, request))
        return await forward(request)

    async def hold(self, request: Request, forward: Forward) -> Response | None:
        await self._held(request)
        if self.writer.dead:
            if self.writer.world.random.random() < 0.5:
                self.writer.world.late.append((self, request))
            return None
        return await forward(request)

    async def hold_after(self, request: Request, forward: Forward) -> Response | None:
        response = await forward(request)
        await self._held(request)
        return response

    async def _held(self, request: Request) -> None:
        of_record = request.method in {"PUT", "HEAD"} and ".journal/" in unquote(request.target)
        hold = Hold(self.ends[asyncio.current_task()][0], of_record)
        self.writer.held.append(hold)
        self.writer.stirred.set()
        await hold.ended.wait()

    async def dies(self, request: Request, forward: Forward) -> Response | None:
        self.writer.die()
        return None

    async def dies_after(self, request: Request, forward: Forward) -> Response | None:
        await forward(request)
        self.writer.die()
        return None

    async def dies_late(self, request: Request, forward: Forward) -> Response | None:
        self.writer.world.late.append((self, request))
        self.writer.die()
        return None


class Writer:
    """A simulated process that uses only the storage.

    Attributes:
        base: The ids that the writer found when it opened the state; `None` before that.
        changes: The ids of its own changes since then, in order.
        acked: The number of its changes that were acknowledged as durable.
        fence: The number of its fence.
    """

    def __init__(self, world: World, *, clean: bool = False) -> None:
        self.world = world
        self.number = len(world.writers)
        self.clean = clean
        draw = world.random
        self.faults, self.holds = draw.choice((0.02, 0.1, 0.2)), draw.choice((0.0, 0.05, 0.12))
        self.deaths = 0.02
        self.outage: Fate | None = None
        self.outage_of_writes = False
        self.dead = self.buried = self.deposed = self.closed = False
        self.held: list[Hold] = []
        self.stirred = asyncio.Event()
        self.running: dict[str, asyncio.Task[None]] = {}
        self.base: list[str] | None = None
        self.changes: list[str] = []
        self.acked = 0
        self.fence = 0
        self.first_seen = 0  # the highest fence of an owner when this writer began
        self.proxy = FaultyProxy(world.url, self)
        self.session: S3Session | None = None

    def __str__(self) -> str:
        return f"writer {self.number}"

    async def begin(self) -> None:
        await self.proxy.__aenter__()
        self.storage = S3Storage(
            self.world.bucket,
            prefix=self.world.prefix,
            endpoint_url=self.proxy.url,
            region_name="us-east-1",
            session=session_of_all(),
            config=AioConfig(user_agent="scenarios", parameter_validation=False),
            history=None if self.world.history is None else LONGEST_TTL,
            history_bytes=None,
        )
        self.time = ScenarioTime()
        self.storage._time = self.time

    def die(self) -> None:
        """Crash. From now on, nothing from this writer reaches the store, except requests that were sent before."""
        self.dead = True
        self.stirred.set()

    @property
    def rivals(self) -> list[Writer]:
        return [writer for writer in self.world.writers if writer is not self and writer.usable]

    @property
    def idle(self) -> set[str]:
        return {"commit", "checkpoint"} - {name for name, task in self.running.items() if not task.done()}

    @property
    def usable(self) -> bool:
        opening, closing = self.running.get("open"), "close" in self.running
        return not self.dead and not closing and opening is not None and opening.done() and self.base is not None

    # The calls

    async def open(self) -> None:
        self.session = await self.storage.open(self.world.name)
        data, records = self.session.recovery[:2]
        self.opened(self.session, decode_plain(data, records))

    def opened(self, session: S3Session, found: list[str]) -> None:
        self.fence = session._fence
        self.base = found
        self.world.opened(self)

    def change(self) -> None:
        self.changes.append(f"{self.number}.{len(self.changes)}")

    @property
    def _all(self) -> list[str]:
        return [*(self.base or ()), *self.changes]

    async def commit(self) -> None:
        assert self.session is not None
        assert self.base is not None
        end = len(self.changes)
        start = len(self.base) + self.acked
        padding = _LARGE if self.world.random.random() < 0.04 else self.world.random.randrange(200)
        await self.session.commit(record(start, self.changes[self.acked :], padding), self._view)
        self.acked = end

    def _view(self) -> AsyncIterator[bytes]:
        """Return a view of all changes in memory, as the flusher does. The last slice is yielded when all of them are committed."""
        end = len(self.changes)
        data = snapshot(self._all, self.world.unique(), self.world.random.randrange(2000))
        half = len(data) // 2

        async def slices() -> AsyncIterator[bytes]:
            yield data[:half]
            if self.acked < end:
                committing = self.running.get("commit")
                if (committing is None or committing.done()) and "close" not in self.running:
                    committing = self.start("commit", self.commit())
                if committing is not None:
                    await asyncio.wait({committing})
            if self.acked < end:
                raise UnavailableError("not durable")
            yield data[half:]

        return slices()

    async def checkpoint(self) -> None:
        assert self.session is not None
        await self.session.checkpoint(self._view)

    async def close(self) -> None:
        assert self.session is not None
        await self.session.aclose()
        self.closed = True

    # The control by the scenario

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.world.note(f"{self}: {name}")
        self.running[name] = task = asyncio.create_task(self._guarded(name, work))
        return task

    async def _guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except FencedError as fenced:
            self.deposed = True
            self.world.fenced(self, name, fenced)
        except UnavailableError as unavailable:
            self.world.note(f"{self}: {name} failed: {unavailable}")
        except Exception as problem:  # noqa: BLE001 -- named with its seed
            told = name == "checkpoint" and "close" in self.running and isinstance(problem, UnsupportedError)
            if not self.dead and not told:
                self.world.problem(f"{self}: {name} raised {problem!r}")
        else:
            self.world.note(f"{self}: {name} done")

    async def settle(self) -> None:
        """Wait until each task of this writer is done or waits in the proxy, or until the writer crashes."""
        while not self.dead:
            running = {task for name, task in self.running.items() if not task.done() and not self._waits(name)}
            if not running:
                return
            self.stirred.clear()
            stirred = asyncio.create_task(self.stirred.wait())
            try:
                await asyncio.wait({*running, stirred}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stirred.cancel()

    def _waits(self, name: str) -> bool:
        """Return whether a running task waits for a request that waits in the proxy."""
        held = {hold.record for hold in self.held if hold.matters}
        commits = "commit" in self.running and not self.running["commit"].done()
        if name == "checkpoint":  # it may have to wait for a commit first
            return False in held or (commits and True in held)
        return True in held if name == "commit" else bool(held)

    def release(self) -> None:
        """Release the oldest request that waits in the proxy."""
        hold = self.held.pop(0)
        hold.over = True
        hold.ended.set()

    async def bury(self) -> None:
        """End the connections and free the memory of a crashed process, as the operating system does."""
        if self.buried:
            return
        self.dead = self.buried = True
        self.world.note(f"{self} is dead")
        while self.held:
            self.release()
        await self._cancel(*self.running.values())
        await self._let_go()

    async def _cancel(self, *tasks: asyncio.Task[Any] | None) -> None:
        there = [task for task in tasks if task is not None]
        for task in there:
            task.cancel()
        await asyncio.gather(*there, return_exceptions=True)

    async def _let_go(self) -> None:
        if self.session is not None:
            await self._cancel(self.session._committing, self.session._publishing)
            await self.session.aclose()


class ManagedWriter(Writer):
    """A writer that is a whole manager."""

    manager: Manager | None = None

    def _waits(self, name: str) -> bool:
        return any(hold.matters for hold in self.held)

    made = 0  # the number of changes that were made in the manager

    async def _set(self) -> int:
        assert self.manager is not None
        while self.made < len(self.changes):
            self.made += 1
            await self.manager.set(self.changes[self.made - 1], "x" * self.world.random.choice((1, 1, 50, 3000)))
        return self.made

    async def open(self) -> None:
        config = Config(name=self.world.name, flush_interval=None, stop_timeout=_RETRIES_BELOW)
        manager = Manager(config, self.storage, clock=RetryClock())
        await manager.start()
        self.manager = manager
        assert manager._flusher is not None
        session = manager._flusher._session
        assert isinstance(session, S3Session)
        self.session = session
        self.opened(session, list(await manager.get_all()))

    async def commit(self) -> None:
        assert self.manager is not None
        end = await self._set()
        await self.manager.flush()
        self.acked = max(self.acked, end)

    async def checkpoint(self) -> None:
        """Commit. A manager makes its checkpoints itself, when they are due."""
        await self.commit()

    async def close(self) -> None:
        assert self.manager is not None
        end = self.acked
        if not self.deposed:
            end = await self._set()
        await self.manager.stop()
        self.acked = end
        self.closed = True

    async def _let_go(self) -> None:
        if self.manager is not None and self.manager._flusher is not None:
            flusher = self.manager._flusher
            flusher.abort()
            await self._cancel(flusher._task, flusher.checkpoints.task, self.manager._stopping)
        await super()._let_go()


class World:
    """One state, its writers, and a copy of the stored objects.

    Attributes:
        late: Requests that have not reached the store yet, although their clients no longer wait for them.
        problems: Descriptions of the broken rules.
    """

    def __init__(self, seed: int, bucket: str, url: str, history: History | None = None) -> None:
        self.seed = seed
        self.history = history
        self.past: dict[str, bytes] = {}  # the copies of older snapshots
        self.snapshots: dict[int, set[bytes]] = {}  # all snapshots, by the number that they cover
        self.random = random.Random(seed)
        self.bucket, self.url = bucket, url
        self.prefix, self.name = f"scenarios/{seed}", "state"
        self.names = Names.of(bucket, self.prefix, self.name)
        self.managed = seed % 5 == 4
        self.patient = seed % 3 == 0  # an open waits longer than in other worlds
        self.decode = decode_managed if self.managed else decode_plain
        self.writers: list[Writer] = []
        self.late: list[tuple[FaultyProxy, Request]] = []
        self.objects: dict[str, Thing] = {}
        self.problems: list[str] = []
        self.trace: list[str] = []
        self.stamp = (0, 0)
        self.count: Counter[str] = Counter()
        self._writing = asyncio.Lock()
        self._unique = 0

    def note(self, what: str) -> None:
        self.trace.append(what)

    def problem(self, what: str) -> None:
        self.problems.append(what)
        self.note(f"PROBLEM: {what}")

    def unique(self) -> str:
        self._unique += 1
        return f"{self.seed}-{self._unique}"

    # The copy

    async def forward(
        self, writer: Writer, request: Request, send: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        self.count["requests"] += 1
        if request.method in {"GET", "HEAD"}:
            return await send(request)
        async with self._writing:
            if self.history == "conditions" and self._differs(request):
                return error(412, "PreconditionFailed")
            response = await send(request)
            if response.status < 300:
                self._applied(writer, request)
        return response

    def _differs(self, request: Request) -> bool:
        """Return whether a request is a copy whose source has another ETag than its condition. The stores of the tests ignore it."""
        source = self._source(request)
        if source is None:
            return False
        etag = (
            hashlib.md5(self.objects[source].body, usedforsecurity=False).hexdigest() if source in self.objects else ""
        )
        return request.headers["x-amz-copy-source-if-match"].strip('"') != etag

    def _source(self, request: Request) -> str | None:
        """Return the key that a request copies; `None` if it is not a copy."""
        source = request.headers.get("x-amz-copy-source")
        return None if source is None else unquote(source).lstrip("/").removeprefix(f"{self.bucket}/")

    def _kept(self, writer: Writer, key: str, request: Request) -> None:
        """Note a copy of an older snapshot. It must be the snapshot that covers the number in its key, and must not change."""
        source = self._source(request)
        body = request.body if source is None else self.objects[source].body
        older = self.names.older(key)
        assert older is not None
        if body not in self.snapshots.get(older.seq, ()):
            self.problem(f"{writer}: {key} is not the snapshot that covers {older.seq}")
        if self.past.setdefault(key, body) != body:
            self.problem(f"{writer}: {key} was replaced by another snapshot")
        self.count["copies"] += 1

    def check_history(self) -> None:
        """Check that the records lead from each copy to the present state."""
        found = {number: key for key in self.objects if (number := self.names.number(key)) is not None}
        state = self._stored()
        for key, body in self.past.items():
            older = self.names.older(key)
            assert older is not None
            above = sorted(number for number in found if number > older.seq)
            if above != list(range(older.seq + 1, older.seq + 1 + len(above))):
                self.problem(f"behind {key} there are only {above}")
                continue
            records = [(number, self.objects[found[number]].body) for number in above]
            reached = self.decode(body, [unframe(self.name, number, data, key) for number, data in records if data])
            if sorted(reached) != sorted(state):
                self.problem(f"from {key} the records lead to {reached}, and the state is {state}")

    def _applied(self, writer: Writer, request: Request) -> None:
        before = len(self.problems)
        if request.method == "POST":
            for key in _KEY.findall(request.body):
                self._deleted(writer, key.decode())
        else:
            key = unquote(request.target.split("?")[0]).removeprefix(f"/{self.bucket}/")
            self._written(writer, key, request)
        if len(self.problems) == before:
            self._look(f"{writer}: {request.method} {request.target}")

    def _covered(self) -> int:
        there = self.objects.get(self.names.snapshot)
        return 0 if there is None else int(there.metadata[SEQ])

    def _written(self, writer: Writer, key: str, request: Request) -> None:
        metadata = {
            name.removeprefix("x-amz-meta-"): value
            for name, value in request.headers.items()
            if name.startswith("x-amz-meta-")
        }
        number = self.names.number(key)
        self.note(f"{writer} wrote {key.rsplit('/', 1)[-1]} {len(request.body)} {metadata.get(SEQ, '')}")
        if key == self.names.snapshot:
            stamp = int(metadata[FENCE]), int(metadata[SEQ])
            if stamp[0] < self.stamp[0] or stamp[1] < self.stamp[1]:
                self.problem(f"{writer}: the snapshot went back, from {self.stamp} to {stamp}")
            self.stamp = stamp
            self.snapshots.setdefault(stamp[1], set()).add(request.body)
            self.count["snapshots"] += 1
        elif key.startswith(self.names.history):
            self._kept(writer, key, request)
            return
        elif number is None:
            return
        elif key in self.objects:
            self.problem(f"{writer}: {key} was there, and was overwritten")
        else:
            self.count["records" if request.body else "fences"] += 1
        void = number is not None and not request.body and number <= self._covered()
        self.objects[key] = Thing(request.body, metadata, void)

    def _deleted(self, writer: Writer, key: str) -> None:
        self.note(f"{writer} deleted {key.rsplit('/', 1)[-1]}")
        gone = self.objects.pop(key, None)
        if gone is not None and not gone.body and not gone.void:
            self.problem(f"{writer}: the fence {key} was deleted")
        if gone is not None and self.history is not None:
            self.problem(f"{writer}: {key} was deleted, although the history keeps it")

    def _stored(self) -> list[str]:
        """Return the ids that a reader would load from the store at this moment."""
        covered = self._covered()
        there = self.objects.get(self.names.snapshot)
        found = {number: key for key in self.objects if (number := self.names.number(key)) is not None}
        above = sorted(number for number in found if number > covered)
        if above != list(range(covered + 1, covered + 1 + len(above))):
            raise BrokenError(f"the snapshot covers {covered}, and above it there are only {above}")
        bodies = ((number, self.objects[found[number]].body) for number in above)
        records = [unframe(self.name, number, body, "the copy") for number, body in bodies if body]
        return self.decode(None if there is None else there.body, records)

    def _look(self, after: str) -> None:
        try:
            state = self._stored()
        except Exception as problem:  # noqa: BLE001 -- any error means that this cannot be loaded
            self.problem(f"after {after}: {problem!r}")
            return
        owner = max((writer for writer in self.writers if writer.base is not None), key=_by_fence, default=None)
        self._check(state, owner, f"after {after}, the store")

    def _check(self, state: list[str], owner: Writer | None, where: str) -> None:
        """Check a state: it must have the base of the last owner, and the first of the owner's changes. No acknowledged change may be missing."""
        base, changes, acked = ([], [], 0) if owner is None else (owner.base or [], owner.changes, owner.acked)
        more = len(state) - len(base)
        expected = [*base, *changes[:more]] if more > 0 else base
        same = sorted(state) == sorted(expected) if self.managed else state == expected
        if not same:
            self.problem(f"{where} has {state}; {owner} found {base} and did {changes}")
        elif more < acked:
            self.problem(f"{where} lacks acknowledged changes of {owner}: {changes[more:acked]}")

    # The reports of the writers

    def opened(self, writer: Writer) -> None:
        self.count["opened"] += 1
        self.note(f"{writer} opened: fence {writer.fence}, {writer.base}")
        others = [each for each in self.writers if each.base is not None and each is not writer]
        if any(each.fence == writer.fence for each in others):
            self.problem(f"{writer} has the fence {writer.fence}, which another had")
        if writer.fence <= writer.first_seen:
            self.problem(f"{writer} has the fence {writer.fence}, not above {writer.first_seen}")
        self.check_found(writer)

    def check_found(self, writer: Writer) -> None:
        """Check that a writer has found the state of the owner before it."""
        before = [each for each in self.writers if each.base is not None and each.fence < writer.fence]
        self._check(writer.base or [], max(before, key=_by_fence, default=None), f"{writer}'s open")

    def highest_fence(self) -> int:
        """Return the number of the highest effective fence. A void fence deposes no writer, because its number was used before."""
        fences = [
            self.names.number(key) or 0 for key, thing in self.objects.items() if not thing.body and not thing.void
        ]
        return max([*fences, self.stamp[0]])

    def fenced(self, writer: Writer, doing: str, error: FencedError) -> None:
        self.count["fenced"] += 1
        self.note(f"{writer}: {doing}: {error}")
        if self.highest_fence() <= writer.fence:
            self.problem(f"{writer}, whose fence {writer.fence} is the highest, was told that it is deposed: {error}")

    # The scenario

    async def run(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._play()
                await self._end()
                if self.history is not None and not self.problems:
                    self.check_history()
        except TimeoutError:
            self.problem("stuck")
        except Exception as problem:  # noqa: BLE001 -- named with its seed
            self.problem(f"the scenario itself failed: {problem!r}")
        finally:
            for writer in self.writers:
                await writer.bury()
                await writer.proxy.__aexit__()

    async def _begin(self, *, clean: bool = False) -> Writer:
        writer = (ManagedWriter if self.managed else Writer)(self, clean=clean)
        writer.first_seen = max((each.fence for each in self.writers if each.base is not None), default=0)
        self.writers.append(writer)
        await writer.begin()
        await self._do(writer, "open", writer.open)
        return writer

    async def _do(self, writer: Writer, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if not writer.clean and name != "open" and self.random.random() < 0.15:
            proxy = writer.proxy
            writer.outage_of_writes = self.random.random() < 0.5
            writer.outage = self.random.choice((proxy.lost_slowly, proxy.lost_slowly_after, proxy.late_slowly))
        writer.start(name, work())
        await self._settle(writer)

    async def _settle(self, writer: Writer) -> None:
        await writer.settle()
        writer.outage = None
        if writer.dead:
            await writer.bury()

    async def _play(self) -> None:
        most = self.random.choice((2, 2, 3))
        for _ in range(self.random.randrange(6, 15)):
            if self.problems:
                return
            living = [writer for writer in self.writers if not writer.dead and not writer.closed]
            living = [writer for writer in living if writer.base is not None or not writer.running["open"].done()]
            if len(self.writers) < 4 and (not living or (len(living) < most and self.random.random() < 0.2)):
                await self._begin()
            elif self.late and self.random.random() < 0.15:
                await self._deliver()
            elif living:
                await self._step(self.random.choice(living))

    async def _step(self, writer: Writer) -> None:
        draw = self.random.random()
        opens = writer.base is None
        if writer.held and (draw < (0.2 if self.patient else 0.6) if opens else draw < 0.3 or not writer.usable):
            writer.release()
            await self._settle(writer)
        elif draw < 0.35 or not writer.usable:
            if draw < 0.04:
                await writer.bury()
        elif draw < 0.42:
            while writer.held:
                writer.release()
            await self._do(writer, "close", writer.close)
        elif "checkpoint" in writer.idle and draw < self._checkpoints(writer):
            await self._do(writer, "checkpoint", writer.checkpoint)
        elif "commit" in writer.idle:
            for _ in range(self.random.randrange(1, 4)):
                writer.change()
            await self._do(writer, "commit", writer.commit)

    def _checkpoints(self, writer: Writer) -> float:
        """Return the probability of a checkpoint. It is higher while another writer opens, or if the writer does not know that it is deposed."""
        unaware = writer.fence < self.highest_fence() and not writer.deposed
        return 0.85 if unaware or any(each.base is None for each in self.writers) else 0.6

    async def _deliver(self) -> None:
        proxy, request = self.late.pop(self.random.randrange(len(self.late)))
        self.note(f"late, of {proxy.writer}: {request.method} {request.target.rsplit('/', 1)[-1]}")
        self.count["late"] += 1
        await proxy._forward(request)

    async def _end(self) -> None:
        """Deliver all late requests. Check that a new writer and each writer that is not deposed find all changes and can write."""
        await self._calm()
        living = [writer for writer in self.writers if writer.usable and not writer.closed]
        for writer in living:
            if self.problems:
                return
            top = writer.fence == self.highest_fence()
            if top or self.random.random() < 0.5:
                await self._commit_cleanly(writer)
            if self.random.random() < 0.5:
                await self._do(writer, "close", writer.close)
        while self.late and not self.problems:
            await self._deliver()
        if self.problems:
            return
        last = await self._begin(clean=True)
        if last.base is None:
            self.problem("the last open failed")
            return
        await self._commit_cleanly(last)
        if not self.managed:
            await self._do(last, "checkpoint", last.checkpoint)
        for writer in self.writers:
            if writer.base is not None and not self.problems:
                self.check_found(writer)

    async def _calm(self) -> None:
        """Stop the faults, and wait for the end of all requests that still have a fault."""
        for writer in self.writers:
            writer.clean = True
            while writer.held and not writer.dead:
                writer.release()
                await self._settle(writer)
        for writer in self.writers:
            while not writer.dead and any(not task.done() for task in writer.running.values()):
                await asyncio.wait({task for task in writer.running.values() if not task.done()})

    async def _commit_cleanly(self, writer: Writer) -> None:
        """Commit without faults. Check that the commit succeeds exactly if the writer owns the state."""
        owns = self.highest_fence() <= writer.fence
        writer.change()
        await self._do(writer, "commit", writer.commit)
        durable = writer.acked == len(writer.changes)
        if durable is not owns:
            self.problem(f"{writer}: a commit without faults {'succeeded' if durable else 'failed'}: it {owns=}")


def _by_fence(writer: Writer) -> int:
    return writer.fence


class Outcome(NamedTuple):
    """The outcome of some scenarios."""

    problems: dict[int, World]
    counted: Counter[str]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute during the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


async def play(
    seeds: Sequence[int],
    bucket: str,
    url: str,
    *,
    at_once: int = 6,
    stop: bool = False,
    history: History | None = None,
) -> Outcome:
    """Run scenarios, `at_once` at a time. With `stop`, begin no further scenario after the first problem."""
    problems: dict[int, World] = {}
    count: Counter[str] = Counter()
    left = iter(seeds)

    async def some() -> None:
        for seed in left:
            world = World(seed, bucket, url, history)
            await world.run()
            count.update(world.count)
            count["scenarios"] += 1
            if world.problems:
                problems[seed] = world
            if problems and stop:
                return

    real = _open.probe

    async def probe(store: Requests, names: Names) -> None:
        """Probe only in one of four worlds. A probe needs a quarter of the requests of an open, and has separate tests."""
        if int(names.snapshot.split("/")[1]) % 4 == 0:
            await real(store, names)

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(_session, "_MOST_RECORDS", 4))
        stack.enter_context(replaced(_keeping, "_MOST_NUMBERS", 1))  # each snapshot is copied
        stack.enter_context(replaced(_open, "probe", probe))
        await asyncio.gather(*(some() for _ in range(at_once)))
    return Outcome(problems, count)


def told(outcome: Outcome) -> str:
    """Return a description of the problems, each with its seed, and the trace of the first scenario with a problem."""
    if not outcome.problems:
        return ""
    lines = [f"seed {seed}: {world.problems[0]}" for seed, world in outcome.problems.items()]
    first = next(iter(outcome.problems.values()))
    return "\n".join([*lines, f"the trace of seed {first.seed}:", *first.trace])
