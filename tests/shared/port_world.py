"""Processes of one shared state in one event loop: real owners and ports, and pipes in place of sockets.

A pipe carries the bytes of the protocol, and checks their order as a socket's ends do. A test can hold either
direction, cut a pipe, kill the owner, and let another process take over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from running import idle

from lab_state import Config, Namespace
from lab_state._core import Core
from lab_state._durability import Durability
from lab_state._entries import Expiring, Stored
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._opening import loaded
from lab_state._state import State
from lab_state._watch import Watchers
from lab_state.exceptions import LabStateError
from lab_state.handles import Scope
from lab_state.shared._engine import Engine
from lab_state.shared._frames import FROM_CLIENT, FROM_OWNER, Frames
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import (
    Answer,
    Answers,
    FromOwner,
    Hello,
    Life,
    Question,
    RecordMessage,
    Reply,
    Welcome,
)
from lab_state.shared._order import ClientOrder, OwnerOrder
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.shared._port import SharedPort
from lab_state.shared._records import Outcome, RecordApplier, parse_record
from lab_state.shared._wire import (
    decode_from_client,
    decode_from_owner,
    encode_for_client,
    encode_for_owner,
    frame_of_record,
)
from lab_state.testing import FaultyStorage, ManualClock

TIMEOUT = 10.0
T = TypeVar("T")


def started(work: Awaitable[T]) -> asyncio.Task[T]:
    """Start a call in a task of its own."""

    async def run() -> T:
        return await work

    return asyncio.create_task(run())


async def begun(work: Awaitable[T]) -> asyncio.Task[T]:
    """Start a call that has to wait, and let it come as far as it can."""
    task = started(work)
    await idle()
    assert not task.done()
    return task


def noted(seen: list[Any], value: Any) -> Any:
    """Note the argument of a function of the application, and return it."""
    seen.append(value)
    return value


class Process:
    """A process of the state: its copy, its port, and the calls of its manager."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        clock = world.clock
        self.copy = State(clock.monotonic, clock.time(), clock.time)
        self.core = Core("test", State())
        self.durability = Durability("test", self.copy, clock, unsettled=False, flush_interval=0)
        self.applier = RecordApplier(self.copy)
        self.port = SharedPort(self.core, self.durability, clock, TIMEOUT)
        self.core.open(self.copy, self.durability, Watchers(self.copy), lambda: None, self.port)
        self.calls = Scope(self.core, "")
        self.pipe: Pipe | None = None
        self.flusher: OwnerFlusher[Pipe] | None = None

    def namespace(self, name: str) -> Namespace:
        return self.calls.namespace(name)

    def changed(self, keys: list[str] | None) -> None:
        self.durability.durable_revision = self.copy.revision
        self.port.shows(keys)

    def load(self, entries: dict[str, Stored], revision: int) -> None:
        """Replace the copy by a state that was loaded."""
        fresh = State(self.copy.monotonic, 0.0, self.copy.wall)
        values = {key: to.value if isinstance(to, Expiring) else to for key, to in entries.items()}
        fresh.load({**values}, revision, {key: to.at for key, to in entries.items() if isinstance(to, Expiring)})
        fresh.epoch = self.copy.epoch
        self.copy.adopt(fresh)
        self.changed(None)


class Direction:
    """One direction of a pipe. `held` keeps the messages until the test lets them go."""

    def __init__(self) -> None:
        self.held = False
        self.data: list[bytes] = []


class Pipe:
    """A connection of a follower to the owner."""

    def __init__(self, process: Process, owner: Process) -> None:
        assert owner.flusher is not None
        self.process, self.owner, self.flusher = process, owner, owner.flusher
        self.client = process.port.client
        self.to_owner, self.to_client = Direction(), Direction()
        self.is_open = True
        self.sent: list[object] = []  # the calls that have come to the owner
        self._heard: int | None = None
        self._is_asked = False
        self._from_client, self._from_owner = Frames(FROM_CLIENT), Frames(FROM_OWNER)
        self._client_order, self._owner_order = ClientOrder(), OwnerOrder()

    # The end of the client

    def open(self) -> None:
        port = self.process.port
        self._up(
            encode_for_owner(
                Hello(name="test", client=port.client, revision=self.process.copy.revision, heard=port.calls.heard)
            )
        )

    def send_soon(self) -> None:
        if not self._is_asked and self.is_open:
            self._is_asked = True
            asyncio.get_running_loop().call_soon(self._send_calls)

    def _send_calls(self) -> None:
        self._is_asked = False
        if self.is_open:
            self._up(list(self.process.port.calls_to_send()))

    def ask(self, token: int) -> None:
        self._up(encode_for_owner(Question(token)))

    def _from_the_owner(self, time: int, message: FromOwner) -> None:
        self._owner_order.check(time, message)
        self._heard, port = time, self.process.port
        if isinstance(message, Welcome):
            if not message.known:
                port.forgotten()
                self.cut()
                return
            if message.load:
                copy = self.owner.copy
                self.process.load(dict(copy.entries.items()), copy.revision)
            port.follow(self.send_soon, self.ask)
            self.send_soon()
        elif isinstance(message, RecordMessage):
            record = parse_record(message.record)
            if self.process.applier.apply(record) is Outcome.GAP:
                self.cut()
                return
            self.process.changed(None if record.cleared else list(record.changes))
        elif isinstance(message, Answers):
            port.answers(message.answers)
        else:
            assert isinstance(message, Reply)
            port.arrivals.reply(message.token, message.revision)

    # The end of the owner

    def record(self, data: bytes) -> None:
        if self._client_order._has_hello:
            self._down(frame_of_record(self.world.now(), data))

    def answers(self, answers: Sequence[Answer]) -> None:
        self._down(encode_for_client(self.world.now(), Answers(answers)))

    def _from_the_client(self, message: object) -> None:
        engine, copy = self.flusher.engine, self.owner.copy
        self._client_order.check(message)  # type: ignore[arg-type]
        if isinstance(message, Hello):
            known = engine.admit(message.client, message.heard)
            lacks = message.revision is None or self.flusher.last_records.after(message.revision) is None
            self._down(
                encode_for_client(
                    self.world.now(),
                    Welcome(host="h", pid=1, known=known, epoch=0.0, revision=copy.revision, load=lacks),
                )
            )
            if known and message.revision is not None and not lacks:
                for data in self.flusher.last_records.after(message.revision) or ():
                    self.record(data)
            if known:
                self._client_order.resume(engine.clients.acknowledged[message.client])
        elif isinstance(message, Question):
            self._down(encode_for_client(self.world.now(), Reply(message.token, copy.revision)))
        elif isinstance(message, Life):
            engine.clients.acknowledge(self.client, message.number)
        else:
            self.sent.append(message)
            if (answer := self.flusher.call(self, self.client, message)) is not None:  # type: ignore[arg-type]
                self.answers([answer])

    # Between them

    @property
    def world(self) -> World:
        return self.process.world

    def _up(self, parts: Sequence[bytes | memoryview]) -> None:
        self.to_owner.data.append(b"".join(parts))
        asyncio.get_running_loop().call_soon(self.flow)

    def _down(self, parts: Sequence[bytes]) -> None:
        if self.is_open:
            self.to_client.data.append(b"".join(parts))
            asyncio.get_running_loop().call_soon(self.flow)

    def flow(self) -> None:
        """Deliver everything that is not held."""
        while self.is_open and not self.to_owner.held and self.to_owner.data:
            for frame in self._from_client.feed(self.to_owner.data.pop(0)):
                if self.is_open:
                    self._from_the_client(decode_from_client(frame))
        while self.is_open and not self.to_client.held and self.to_client.data:
            for frame in self._from_owner.feed(self.to_client.data.pop(0)):
                if self.is_open:
                    self._from_the_owner(*decode_from_owner(frame))

    def release(self) -> None:
        """Let both directions flow."""
        self.to_owner.held = self.to_client.held = False
        self.flow()

    def cut(self) -> None:
        """End the connection. Nothing that is still in it arrives."""
        if self.is_open:
            self.is_open = False
            self.world.pipes.remove(self)
            self.process.pipe = None
            if self._heard is not None:
                self.process.port.calls.heard = self._heard
            self.process.port.unfollow()
            self.flusher.engine.drop(self)
            self.flusher.engine.disconnect(self.client)


class World:
    """A state in a storage, its owner and the other processes."""

    def __init__(self, storage: FaultyStorage, clock: ManualClock) -> None:
        self.storage, self.clock = storage, clock
        self.owner: Process | None = None
        self.pipes: list[Pipe] = []

    def now(self) -> int:
        return int(self.clock.monotonic() * 1_000_000_000)

    async def own(self, process: Process) -> OwnerFlusher[Pipe]:
        """Let a process become the owner."""
        log = Log(logging.getLogger("lab_state"))
        session = await self.storage.open("test")
        found = loaded(session, "test", self.clock, log, 0.0)
        found.epoch = process.copy.epoch
        process.copy.adopt(found)
        process.changed(None)
        layer = OwnerLayer(process.copy)
        engine: Engine[Pipe] = Engine(layer, self.now)

        def note(taken: object) -> bool:
            changes = taken.changes  # type: ignore[attr-defined]
            process.changed(None if taken.cleared else list(changes))  # type: ignore[attr-defined]
            return True

        config = Config(name="test", flush_interval=0, stop_timeout=8.0)
        flusher = OwnerFlusher(
            layer, engine, Listener(self, process), session, config, self.clock, log, note, FlushTimes()
        )
        flusher.start()
        self.owner, process.flusher = process, flusher
        process.port.own(flusher, self.now())
        return flusher

    def connect(self, process: Process) -> Pipe:
        """Let a process follow the owner."""
        assert self.owner is not None
        pipe = Pipe(process, self.owner)
        self.pipes.append(pipe)
        process.pipe = pipe
        pipe.open()
        return pipe

    async def kill(self) -> None:
        """Kill the owner. Its own callers get no answer."""
        assert self.owner is not None
        assert self.owner.flusher is not None
        for pipe in list(self.pipes):
            pipe.cut()
        session = self.owner.flusher.abort()
        await session.aclose()
        self.owner = None

    async def end(self) -> None:
        """End the owner as planned."""
        assert self.owner is not None
        assert self.owner.flusher is not None
        self.owner.flusher.engine.is_ending = True
        await self.owner.flusher.stop(8.0)
        self.owner = None


class Listener:
    """The pipes of one owner."""

    def __init__(self, world: World, owner: Process) -> None:
        self._world, self._owner = world, owner

    def _pipes(self) -> list[Pipe]:
        return [pipe for pipe in self._world.pipes if pipe.owner is self._owner]

    def record(self, data: bytes) -> None:
        for pipe in self._pipes():
            pipe.record(data)

    def answers(self, connection: Pipe, answers: Sequence[Answer]) -> None:
        connection.answers(answers)

    def closed(self, error: LabStateError) -> None:
        for pipe in self._pipes():
            pipe.cut()

    async def hand_over(self) -> bool:
        return False

    async def finish(self) -> None:
        for pipe in self._pipes():
            pipe.flow()
            pipe.cut()


@asynccontextmanager
async def world_of(storage: FaultyStorage, clock: ManualClock) -> AsyncIterator[tuple[World, Process, Process]]:
    """Yield a world with an owner, and a process that follows it."""
    world = World(storage, clock)
    owner, follower = Process(world, "owner"), Process(world, "follower")
    await world.own(owner)
    world.connect(follower)
    await idle()
    yield world, owner, follower
    storage.resume()
    if world.owner is not None:
        await world.end()
