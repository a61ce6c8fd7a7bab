"""What the tests of the sockets share: the two sides of a connection, which note their calls, and a raw socket."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Raw

from lab_state._log import Log
from lab_state.shared import _messages as m
from lab_state.shared._connection import Connection
from lab_state.shared._frames import FROM_CLIENT, FROM_OWNER, BadMessageError, Frames
from lab_state.shared._link import Link
from lab_state.shared._server import Server
from lab_state.shared._wire import decode_from_client, decode_from_owner, encode_for_client, encode_for_owner
from lab_state.testing import ManualClock

CLIENT, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
STARTING = m.Starting(host="web-1", pid=7)
WELCOME = m.Welcome(host="web-1", pid=7, known=True, epoch=1.5, revision=42, load=False)
LOG = Log(logging.getLogger("lab_state.tests"))


def hello(client: str = CLIENT) -> m.Hello:
    return m.Hello(name="visits", client=client, revision=None, heard=None)


def call(n: int, ack: int = 0, key: str = "k") -> m.Call:
    return m.Set(n, ack, key, Raw(b"1"), None)


def answer(n: int, revision: int = 43) -> m.Answer:
    return m.Ok(n, revision, Raw(b"null"))


class Told:
    """The calls that a side got, in order."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def tell(self, *what: Any) -> None:
        self._told.put_nowait(what)

    async def next(self) -> tuple[Any, ...]:
        """Return the next call: its name and its arguments. Wait for it."""
        return await asyncio.wait_for(self._told.get(), 30)

    def rest(self) -> list[tuple[Any, ...]]:
        """Return the calls that have come and were not returned."""
        return [self._told.get_nowait() for _ in range(self._told.qsize())]


class Owner(Told):
    """An owner's side that notes its calls.

    `greetings` has the answers to the next hellos; the last one stays. `lacking` has the records for a
    client that is admitted. `error` is raised by each call.
    """

    def __init__(self, *greetings: m.Welcome | m.Starting | m.No) -> None:
        super().__init__()
        self.durable_revision = 42
        self.greetings = list(greetings or [WELCOME])
        self.lacking: list[bytes] = []
        self.acknowledged = 0
        self.error: Exception | None = None
        self.at_greeting: Callable[[], object] = lambda: None
        self.connections: list[Connection] = []

    def greeting(self, hello: m.Hello) -> m.Welcome | m.Starting | m.No:
        self.tell("greeting", hello)
        self.at_greeting()
        return self.greetings.pop(0) if len(self.greetings) > 1 else self.greetings[0]

    def admit(self, connection: Connection, hello: m.Hello) -> int:
        self.tell("admit", hello.client)
        self.connections.append(connection)
        for record in self.lacking:
            connection.record(record)
        return self.acknowledged

    def call(self, connection: Connection, call: m.Call) -> None:
        self.tell("call", connection, call.n)
        if self.error is not None:
            raise self.error

    def acknowledge(self, client: str, number: int) -> None:
        self.tell("acknowledge", client, number)

    def farewell(self, client: str) -> None:
        self.tell("farewell", client)

    def watched(self) -> None:
        self.tell("watched", [connection.is_watching for connection in self.connections])

    def left(self, connection: Connection) -> None:
        self.tell("left", connection)


class Client(Told):
    """A client's side that notes its calls. `slow` has the awaitables of the next records."""

    def __init__(self) -> None:
        super().__init__()
        self.acknowledgement = 0
        self.frames: list[bytes] = []
        self.slow: list[Awaitable[None] | BadMessageError] = []
        self.link: Link | None = None
        self.closes_at = ""
        self.at_record: Callable[[], object] = lambda: None

    def tell(self, *what: Any) -> None:
        super().tell(*what)
        if what[0] == self.closes_at and self.link is not None:
            self.link.close()

    def calls_to_send(self) -> Iterable[bytes | memoryview]:
        self.tell("calls_to_send")
        frames, self.frames = self.frames, []
        return frames

    def submit(self, *calls: m.Call) -> None:
        for one in calls:
            self.frames += encode_for_owner(one)

    def starting(self, starting: m.Starting) -> None:
        self.tell("starting", starting)

    def welcomed(self, welcome: m.Welcome) -> None:
        self.tell("welcomed", welcome)

    def refused(self, no: m.No) -> None:
        self.tell("refused", no)

    def record(self, record: memoryview) -> Awaitable[None] | None:
        self.tell("record", bytes(record))
        self.at_record()
        slow = self.slow.pop(0) if self.slow else None
        if isinstance(slow, BadMessageError):
            raise slow
        return slow

    def answers(self, answers: Sequence[m.Answer]) -> None:
        self.tell("answers", [one.n for one in answers])

    def revision(self, durable: int) -> None:
        self.tell("revision", durable)

    def reply(self, token: int, revision: int) -> None:
        self.tell("reply", token, revision)

    def farewell_confirmed(self) -> None:
        self.tell("farewell_confirmed")

    def ended(self, problem: BadMessageError | None) -> None:
        self.tell("ended", problem)


class Peer:
    """A raw socket at the other end, and the messages that come to it."""

    def __init__(self, sock: socket.socket, kinds: frozenset[bytes] = FROM_OWNER) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._kinds = kinds
        self._frames = Frames(kinds)
        self._messages: list[Any] = []
        self.pieces = 0

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def say(self, *messages: m.FromClient) -> None:
        """Send messages of a client in one piece."""
        await self.send(b"".join(b"".join(encode_for_owner(message)) for message in messages))

    async def tell(self, *messages: m.FromOwner, time: int = 1) -> None:
        """Send messages of an owner in one piece."""
        await self.send(b"".join(b"".join(encode_for_client(time, message)) for message in messages))

    async def next(self) -> Any:
        """Return the next message; `None` if the connection has ended."""
        while not self._messages:
            try:
                data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, 1 << 20), 30)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.pieces += 1
            for frame in self._frames.feed(data):
                if self._kinds is FROM_CLIENT:
                    self._messages.append(decode_from_client(frame))
                else:
                    _, message = decode_from_owner(frame)
                    self._messages.append(bytes(message.record) if isinstance(message, m.RecordMessage) else message)
        return self._messages.pop(0)

    async def all(self) -> list[Any]:
        """Return the messages until the connection ends."""
        found = []
        while (message := await self.next()) is not None:
            found.append(message)
        return found


class World:
    """A server on a real socket, and the clients that connect to it."""

    def __init__(self, owner: Owner, path: Path) -> None:
        self.clock = ManualClock()
        self.owner = owner
        self.time = 5
        self.server = Server(owner, "visits", clock=self.clock, log=LOG, monotonic_ns=lambda: self.time)
        self.path = path
        self.server.listen(listening(path))
        self.opened: list[socket.socket] = []

    def connect(self) -> Peer:
        peer = Peer(connected(self.path))
        self.opened.append(peer.socket)
        return peer

    async def admitted(self, client: str = CLIENT) -> tuple[Peer, Connection]:
        """Return a client that was admitted, and its connection."""
        peer = self.connect()
        await peer.say(hello(client))
        assert await peer.next() == self.owner.greetings[0]
        assert [(await self.owner.next())[0] for _ in "12"] == ["greeting", "admit"]
        return peer, self.owner.connections[-1]


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    sock.setblocking(False)
    return sock


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


@asynccontextmanager
async def serving(tmp_path: Path, *greetings: m.Welcome | m.Starting | m.No) -> AsyncIterator[World]:
    world = World(Owner(*greetings), tmp_path / "visits.sock")
    try:
        yield world
    finally:
        world.server.close()
        for sock in world.opened:
            sock.close()
