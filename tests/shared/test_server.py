"""The owner's sockets: hellos, calls, records and answers, bounds, and bad messages."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from running import until
from shared_sockets import (
    CLIENT,
    LOG,
    OTHER,
    STARTING,
    WELCOME,
    Owner,
    answer,
    call,
    connected,
    hello,
    listening,
    serving,
)

from lab_state.shared import _frames as frames
from lab_state.shared import _messages as m
from lab_state.shared._frames import BadMessageError
from lab_state.shared._server import Server
from lab_state.shared._wire import encode_for_owner
from lab_state.testing import ManualClock

MIB = 1024 * 1024


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# Hellos


async def test_a_client_is_admitted(tmp_path: Path) -> None:
    """A hello is answered with the welcome, and behind it come the records that the client lacks."""
    async with serving(tmp_path) as world:
        world.owner.lacking = [b'{"from":40,"to":41}', b'{"from":41,"to":42}']
        peer, connection = await world.admitted()
        assert (connection.client, connection.is_admitted, world.server.followers) == (CLIENT, True, 1)
        assert [await peer.next(), await peer.next()] == world.owner.lacking
        assert peer.pieces == 1


async def test_a_client_waits_while_the_owner_loads(tmp_path: Path) -> None:
    """A hello is answered with "starting" at once and each second, and with the welcome when the owner is ready."""
    async with serving(tmp_path, STARTING, STARTING, WELCOME) as world:
        peer = world.connect()
        await peer.say(hello(), m.Life(0))
        assert await peer.next() == STARTING
        assert world.server.followers == 0
        world.clock.advance(1)
        assert await peer.next() == STARTING
        world.server.greet_waiting()
        world.server.greet_waiting()
        assert await peer.next() == WELCOME
        assert [what[0] for what in world.owner.rest()] == ["greeting", "greeting", "greeting", "admit"]
        assert world.server.followers == 1


async def test_a_client_waits_long(tmp_path: Path) -> None:
    """A client whose hello has come may wait as long as the owner loads."""
    async with serving(tmp_path, STARTING) as world:
        peer = world.connect()
        await peer.say(hello())
        assert await peer.next() == STARTING
        world.clock.advance(60)
        assert [await peer.next() for _ in range(60)] == [STARTING] * 60


async def test_a_client_that_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A connection without a hello is closed after five seconds."""
    async with serving(tmp_path) as world:
        silent = world.connect()
        await world.admitted()
        world.clock.advance(4)
        assert logged(caplog) == []
        world.clock.advance(1)
        assert logged(caplog) == [f"visits: closed the connection of process {os.getpid()}: it sent no hello in 5 s"]
        assert await silent.all() == []
        assert world.server.followers == 1


async def test_a_client_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client with another version of the protocol is told so, and the connection is closed."""
    async with serving(tmp_path) as world:
        peer = world.connect()
        body = b'{"lab_state":"shared","protocol":2,"other":[]}'
        await peer.send(b"".join(frames.frame(b"H", body)))
        why = "it has version 2 of the protocol, and this process has 1"
        assert await peer.all() == [m.No(reason="protocol", detail=why)]
        assert logged(caplog) == [f"visits: refused the process {os.getpid()}: {why}"]
        assert world.owner.rest() == []


async def test_a_client_that_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client that the owner does not admit gets the reason, and the connection is closed."""
    no = m.No(reason="name", detail="this is the state 'visits'")
    async with serving(tmp_path, no) as world:
        peer = world.connect()
        await peer.say(hello())
        assert await peer.all() == [no]
        assert logged(caplog) == [f"visits: refused the process {os.getpid()}: this is the state 'visits'"]
        assert [what[0] for what in world.owner.rest()] == ["greeting"]


async def test_a_client_that_was_forgotten(tmp_path: Path) -> None:
    """A client that the owner may have forgotten gets the welcome that says so, is not admitted, and the connection is closed."""
    forgotten = m.Welcome(host="web-1", pid=7, known=False, epoch=1.5, revision=42, load=True)
    async with serving(tmp_path, forgotten) as world:
        peer = world.connect()
        await peer.say(hello(), call(1))
        assert await peer.all() == [forgotten]
        assert [what[0] for what in world.owner.rest()] == ["greeting"]


async def test_a_second_connection_of_a_client(tmp_path: Path) -> None:
    """A hello closes the other connection of its client first, so nothing that is sent on that one is applied later."""
    async with serving(tmp_path) as world:
        first, before = await world.admitted()
        refused: list[type] = []

        def send_on_first() -> None:
            try:
                first.socket.send(said(call(1)))
            except BrokenPipeError as problem:
                refused.append(type(problem))

        world.owner.at_greeting = send_on_first
        second = world.connect()
        await second.say(hello())
        assert await second.next() == WELCOME
        assert refused == [BrokenPipeError]
        assert [what[0] for what in world.owner.rest()] == ["left", "greeting", "admit"]
        assert await first.all() == []
        assert (before.is_admitted, before.is_open, world.server.followers) == (False, False, 1)
        before.answers([answer(1)])
        world.server.record(b"{}")
        assert await second.next() == b"{}"


async def test_two_clients(tmp_path: Path) -> None:
    """Each client gets all records, and its own answers."""
    async with serving(tmp_path) as world:
        one, connection = await world.admitted()
        two, _ = await world.admitted(OTHER)
        assert world.server.followers == 2
        world.server.record(b"{}")
        connection.answers([answer(1)])
        assert [await one.next(), await one.next()] == [b"{}", m.Answers([answer(1)])]
        world.server.record(b"[]")
        assert [await two.next(), await two.next()] == [b"{}", b"[]"]


# Calls


async def test_calls_come_in_order(tmp_path: Path) -> None:
    """Calls reach the owner in the order in which they were sent, wherever their bytes are cut."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        data = b"".join(b"".join(encode_for_owner(call(n, n - 1))) for n in range(1, 6))
        for at in range(len(data)):
            await peer.send(data[at : at + 1])
            await asyncio.sleep(0)
        assert [await world.owner.next() for _ in range(5)] == [("call", connection, n) for n in range(1, 6)]


async def test_a_record_and_its_answers_leave_together(tmp_path: Path) -> None:
    """All that is put in one step is one piece for the client, with the answers behind the record."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        before = peer.pieces
        world.server.record(b'{"to":43}')
        for n in range(1, 50):
            connection.answers([answer(n)])
        assert await peer.next() == b'{"to":43}'
        assert [await peer.next() for _ in range(1, 50)] == [m.Answers([answer(n)]) for n in range(1, 50)]
        assert peer.pieces == before + 1


async def test_a_question(tmp_path: Path) -> None:
    """The answer to a question comes behind the records, with the durable revision of the moment of the question."""
    async with serving(tmp_path) as world:
        peer, _ = await world.admitted()
        world.server.record(b"{}")
        world.owner.durable_revision = 44
        await peer.say(m.Question(9))
        assert [await peer.next(), await peer.next()] == [b"{}", m.Reply(9, 44)]


async def test_a_client_that_watches(tmp_path: Path) -> None:
    """The owner is told of the first watch of a client, and of the end of its last one."""
    async with serving(tmp_path) as world:
        peer, _ = await world.admitted()
        assert not world.server.is_watched
        await peer.say(m.Expiries(are_watched=True))
        assert await world.owner.next() == ("watched", [True])
        assert world.server.is_watched
        await peer.say(m.Expiries(are_watched=False))
        assert await world.owner.next() == ("watched", [False])
        assert not world.server.is_watched


async def test_signs_of_life(tmp_path: Path) -> None:
    """An admitted client gets a sign of life each second, with the durable revision. Its own has its acknowledgement."""
    async with serving(tmp_path) as world:
        peer, _ = await world.admitted()
        for revision in (42, 43):
            world.owner.durable_revision = revision
            world.clock.advance(1)
            assert await peer.next() == m.Life(revision)
        await peer.say(m.Life(7))
        assert await world.owner.next() == ("acknowledge", CLIENT, 7)


async def test_a_farewell(tmp_path: Path) -> None:
    """A farewell has the last acknowledgement. It is confirmed, and then the connection is closed."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        await peer.say(m.Bye(3))
        assert await peer.all() == [m.Bye(0)]
        assert world.owner.rest() == [("acknowledge", CLIENT, 3), ("farewell", CLIENT), ("left", connection)]
        assert world.server.followers == 0


async def test_a_large_call_is_decoded_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages after it are handled after it. If the connection ends meanwhile, the call is not made."""
    monkeypatch.setattr("lab_state.shared._connection._LARGE", 10_000)
    large = m.SetMany(1, 0, {f"k{number}": Raw(b"1") for number in range(2_000)}, None)
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        await peer.say(large, call(2), m.Life(1))
        told = [await world.owner.next() for _ in range(3)]
        assert told == [("call", connection, 1), ("call", connection, 2), ("acknowledge", CLIENT, 1)]
        other, second = await world.admitted(OTHER)
        await other.say(large)
        await until(lambda: second._channel._waiting is not None)
        second.finish()
        await other.all()
        assert [what[0] for what in world.owner.rest()] == ["left"]


# Bad messages


def bad(kind: bytes, body: bytes) -> bytes:
    return b"".join(frames.frame(kind, body))


def said(*messages: m.FromClient) -> bytes:
    return b"".join(b"".join(encode_for_owner(message)) for message in messages)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (said(m.Life(0)), "bad message of kind L: a first message that is not a hello"),
        (said(call(1)), "bad message of kind C: a first message that is not a hello"),
        (b"GET / HTTP/1.1\r\n\r\n", "bad message: a message of 1195725856 bytes; at most 268435456 are allowed"),
        (bad(b"H", b"secret"), "bad message of kind H: a payload that is not a hello"),
        (said(hello(), hello()), "bad message of kind H: a second hello"),
        (bad(b"W", b"secret"), "bad message: a message of an unknown kind"),
    ],
)
async def test_a_bad_first_message(tmp_path: Path, data: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that does not begin with a hello is closed. One line of the log says why, without the content."""
    async with serving(tmp_path) as world:
        peer = world.connect()
        await peer.send(data)
        assert [message for message in await peer.all() if message != WELCOME] == []
        assert logged(caplog) == [f"visits: closed the connection of process {os.getpid()}: {why}"]
        assert world.server.followers == 0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bad(b"C", b'["set",2,0,"secret"]'), " of kind C: a payload that is not a call"),
        (bad(b"C", b'["set",2,0,"secret",1,0]'), " of kind C: a payload that is not a call"),
        (bad(b"C", b'["delete",2,0,"$lab_state"]'), " of kind C: a call with an invalid key"),
        (said(call(1)), " of kind C: the number 1 is not above 1, the number of the previous call"),
        (said(call(2000)), " of kind C: the number 2000 is not 1 to 1024 above the acknowledgement 0"),
        (said(m.Life(1), call(2)), " of kind C: the acknowledgement 0 is below an earlier one"),
        (said(m.Life(1), m.Bye(0)), " of kind B: the acknowledgement 0 is below an earlier one"),
        (said(hello()), " of kind H: a second hello"),
        (bad(b"Q", b""), " of kind Q: a payload of 0 bytes instead of 8"),
        (b"\xff\xff\xff\xff", ": a message of 4294967295 bytes; at most 268435456 are allowed"),
    ],
)
async def test_a_bad_message(tmp_path: Path, data: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """What came before a bad message counts, and nothing after it. The connection is closed, and this is logged once."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        await peer.send(said(call(1)) + data + said(call(3)))
        assert await peer.all() == []
        told = world.owner.rest()
        assert (told[0], told[-1]) == (("call", connection, 1), ("left", connection))
        assert ("call", connection, 3) not in told
        assert logged(caplog) == [f"visits: closed the connection of process {os.getpid()}: bad message{why}"]


@pytest.mark.parametrize("message", [call(1), m.Question(1), m.Expiries(are_watched=True), m.Bye(0)])
async def test_a_message_before_the_welcome(
    tmp_path: Path, message: m.FromClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that was told to wait sends only signs of life."""
    async with serving(tmp_path, STARTING) as world:
        peer = world.connect()
        await peer.say(hello(), message)
        assert await peer.all() == []
        assert [what[0] for what in world.owner.rest()] == ["greeting"]
        assert ": a message before the welcome" in caplog.text


async def test_a_message_after_the_farewell(tmp_path: Path) -> None:
    """Nothing that comes behind a farewell is handled."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        await peer.say(m.Bye(0), call(1))
        assert [await world.owner.next() for _ in "123"][-1] == ("left", connection)
        world.server.record(b"{}")
        assert await peer.all() == [m.Bye(0)]
        assert world.owner.rest() == []


async def test_an_acknowledgement_of_an_earlier_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The acknowledgement of a client does not go back over connections."""
    async with serving(tmp_path) as world:
        world.owner.acknowledged = 7
        peer, _ = await world.admitted()
        await peer.say(m.Life(6))
        assert await peer.all() == []
        assert "the acknowledgement 6 is below an earlier one" in caplog.text


async def test_a_fault_that_the_owner_finds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The owner's side may refuse a call as a bad message."""
    async with serving(tmp_path) as world:
        peer, _ = await world.admitted()
        world.owner.error = BadMessageError("not so")
        await peer.say(call(1))
        assert await peer.all() == []
        assert "bad message of kind C: not so" in caplog.text


async def test_a_failure_of_the_owner_itself(tmp_path: Path) -> None:
    """An unexpected error closes the connection, so no call is left without an answer. The event loop reports it."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        world.owner.error = RuntimeError("a fault")
        await peer.say(call(1), call(2))
        assert await peer.all() == []
        assert [what["exception"] for what in reported] == [world.owner.error]
        assert world.owner.rest() == [("call", connection, 1), ("left", connection)]


# Ends and bounds


async def test_a_client_that_goes(tmp_path: Path) -> None:
    """The owner learns that a client has gone. What it sent before that counts."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        await peer.say(call(1))
        peer.socket.close()
        assert await world.owner.next() == ("call", connection, 1)
        assert await world.owner.next() == ("left", connection)
        assert world.server.followers == 0
        connection.answers([answer(1)])
        connection.close()
        assert world.owner.rest() == []


async def test_a_client_that_goes_without_reading(tmp_path: Path) -> None:
    """A connection that breaks is the same as one that ends, also if both sides have sent something."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        world.server.record(b"{}")
        await asyncio.sleep(0)
        await peer.say(call(1))
        peer.socket.close()
        world.server.record(b"[]")
        assert await world.owner.next() == ("call", connection, 1)
        assert await world.owner.next() == ("left", connection)


async def test_a_client_that_reads_slowly(tmp_path: Path) -> None:
    """What a socket does not take waits, and is sent in order when the client reads."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        large = bytes(3 * MIB)
        for _ in range(3):
            world.server.record(large)
            connection.answers([answer(1)])
            await asyncio.sleep(0)
        assert [await peer.next() for _ in range(6)] == [large, m.Answers([answer(1)])] * 3
        world.server.record(b"{}")
        assert await peer.next() == b"{}"


async def test_a_client_that_does_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client for which more than 64 MiB wait is cut off. The others go on."""
    async with serving(tmp_path) as world:
        _, connection = await world.admitted()
        record, count = bytes(16 * MIB), 0
        while connection.is_open:
            world.server.record(record)
            count += 1
        assert 4 <= count <= 5
        assert logged(caplog) == [
            f"visits: closed the connection of process {os.getpid()}: it reads too slowly: more than 67108864 bytes wait for it"
        ]
        assert world.owner.rest() == [("left", connection)]
        other, _ = await world.admitted(OTHER)
        world.server.record(b"{}")
        assert await other.next() == b"{}"


async def test_a_record_that_is_larger_than_the_queue(tmp_path: Path) -> None:
    """A record of more than 64 MiB is sent, with its answers behind it."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        record = bytes(65 * MIB)
        world.server.record(record)
        connection.answers([answer(1)])
        assert [await peer.next() == record, await peer.next()] == [True, m.Answers([answer(1)])]


async def test_a_record_that_is_larger_than_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A record that no message can carry cuts off all clients: they read it from the files."""
    async with serving(tmp_path) as world:
        one, _ = await world.admitted()
        two, _ = await world.admitted(OTHER)
        monkeypatch.setattr(frames, "MOST_BYTES", 100)
        world.server.record(bytes(100))
        assert [await one.all(), await two.all()] == [[], []]
        assert [line.split(": ", 2)[2] for line in logged(caplog)] == [
            "a call or a change of 108 bytes is larger than the 100 that processes can exchange; split it"
        ] * 2


async def test_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A connection of another user is closed before anything is read, and this is logged once for each user."""
    async with serving(tmp_path) as world:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        for _ in "12":
            peer = world.connect()
            await peer.say(hello())
            assert await peer.all() == []
        assert world.owner.rest() == []
        assert logged(caplog) == [
            f"visits: closed a connection of user {mine}: only user {mine + 1} may use this state; run all processes as one user"
        ]


async def test_no_descriptor_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If connections cannot be accepted, the owner says so once, and tries again each second, and not all the time."""
    loop = asyncio.get_running_loop()
    async with serving(tmp_path) as world:
        for client in (CLIENT, OTHER):
            caplog.clear()
            peer = world.connect()
            bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (peer.socket.fileno() + 1, bounds[1]))
            try:
                for _ in "123":
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    assert world.server._listener is not None
                    assert not loop.remove_reader(world.server._listener)
                    world.clock.advance(1)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, bounds)
            why = os.strerror(errno.EMFILE)
            assert logged(caplog) == [
                f"visits: the owner cannot accept connections, and tries again each second: {why}"
            ]
            await peer.say(hello(client))
            world.clock.advance(1)
            assert await peer.next() == WELCOME
        assert world.server.followers == 2


# The listening socket, and the end


async def test_another_listening_socket(tmp_path: Path) -> None:
    """A socket that was bound anew replaces the old one, and connections go on."""
    async with serving(tmp_path) as world:
        first, _ = await world.admitted()
        world.path.unlink()
        world.server.listen(listening(world.path))
        await world.admitted(OTHER)
        world.server.record(b"{}")
        assert await first.next() == b"{}"
        assert world.server.followers == 2


async def test_an_owner_that_accepts_no_longer(tmp_path: Path) -> None:
    """New clients and those that wait are turned away. The clients that were admitted stay."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        silent, waiting = world.connect(), world.connect()
        world.owner.greetings = [STARTING]
        await waiting.say(hello(OTHER))
        assert await waiting.next() == STARTING
        world.server.stop_accepting()
        world.server.stop_accepting()
        assert [await silent.all(), await waiting.all()] == [[], []]
        with pytest.raises(ConnectionRefusedError):
            connected(world.path)
        world.owner.rest()
        await peer.say(call(1))
        assert await world.owner.next() == ("call", connection, 1)
        world.clock.advance(1)
        assert await peer.next() == m.Life(42)


async def test_an_end_with_answers(tmp_path: Path) -> None:
    """What waits is sent before the connections are closed. Calls that come meanwhile are not handled."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        large = bytes(3 * MIB)
        world.server.record(large)
        connection.answers([answer(1)])
        closing = asyncio.create_task(world.server.aclose())
        await asyncio.sleep(0)
        await peer.say(call(1))
        assert await peer.all() == [large, m.Answers([answer(1)])]
        await closing
        assert world.owner.rest() == [("left", connection)]
        await world.server.aclose()


async def test_an_end_with_a_client_that_does_not_read(tmp_path: Path) -> None:
    """The owner waits for a second, and then closes the connections."""
    async with serving(tmp_path) as world:
        peer, _ = await world.admitted()
        world.server.record(bytes(3 * MIB))
        closing = asyncio.create_task(world.server.aclose())
        await asyncio.sleep(0)
        world.clock.advance(0.9)
        await asyncio.sleep(0)
        assert not closing.done()
        world.clock.advance(0.1)
        await closing
        assert await peer.all() == []


async def test_an_end_that_is_cancelled(tmp_path: Path) -> None:
    """If the caller is cancelled, the connections are closed at once."""
    async with serving(tmp_path) as world:
        peer, _ = await world.admitted()
        world.server.record(bytes(3 * MIB))
        closing = asyncio.create_task(world.server.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await peer.all() == []


async def test_an_end_at_once(tmp_path: Path) -> None:
    """A fenced owner closes all connections in one step, and sends nothing more."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        connection.answers([answer(1)])
        world.server.close()
        world.server.close()
        assert await peer.all() == []
        assert world.owner.rest() == [("left", connection)]
        with pytest.raises(ConnectionRefusedError):
            connected(world.path)


async def test_a_last_message_that_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that was told its last message is closed after five seconds, even if the client does not read."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        world.server.record(bytes(3 * MIB))
        await peer.say(m.Bye(0))
        assert [(await world.owner.next())[0] for _ in "123"] == ["acknowledge", "farewell", "left"]
        world.clock.advance(4)
        assert not connection.is_open
        assert world.server._connections == {connection}
        world.clock.advance(1)
        assert world.server._connections == set()
        assert await peer.all() == []
        assert logged(caplog) == []


async def test_a_socket_that_is_full(tmp_path: Path) -> None:
    """A message to a socket that takes no byte waits, like the rest of a message."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        sock, filled = connection._channel._socket, 0
        part = said(m.Life(0))
        with pytest.raises(BlockingIOError):
            while True:
                filled += sock.send(part)
        world.server.record(b"{}")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(await asyncio.get_running_loop().sock_recv(peer.socket, filled)) == filled
        assert await peer.next() == b"{}"


async def test_a_wake_up_without_a_reason(tmp_path: Path) -> None:
    """The kernel may wake a process although nothing has arrived. Then nothing happens."""
    async with serving(tmp_path) as world:
        peer, connection = await world.admitted()
        connection._channel._receive()
        listener = world.server._listener
        assert listener is not None
        world.server._accept(listener)
        await peer.say(call(1))
        assert await world.owner.next() == ("call", connection, 1)


async def test_a_server_that_never_listened(tmp_path: Path) -> None:
    """A server can be closed before it has a socket."""
    server = Server(Owner(), "visits", clock=ManualClock(), log=LOG)
    await server.aclose()
    server.close()
