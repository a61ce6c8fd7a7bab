"""A client's end of its connection to the owner: the order of messages, silence, ends, and bad messages."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from msgspec import Raw
from running import idle
from shared_sockets import (
    CLIENT,
    LOG,
    OTHER,
    STARTING,
    WELCOME,
    Client,
    Peer,
    answer,
    call,
    connected,
    hello,
    serving,
)

from lab_state.shared import _messages as m
from lab_state.shared._frames import FROM_CLIENT, BadMessageError, frame
from lab_state.shared._link import Link
from lab_state.shared._wire import OtherVersionError, encode_for_client
from lab_state.testing import ManualClock

MIB = 1024 * 1024


class World:
    """A link, its client, and the owner at the other end."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.client = Client()
        self.link = self.client.link = Link(self.client, clock=self.clock, log=LOG)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.owner = Peer(theirs, FROM_CLIENT)
        self.link.open(ours, hello())


@asynccontextmanager
async def linked(*, is_admitted: bool = True) -> AsyncIterator[World]:
    world = World()
    try:
        if is_admitted:
            await world.owner.tell(WELCOME)
            assert await world.owner.next() == hello()
            assert [await world.client.next() for _ in "12"] == [("welcomed", WELCOME), ("calls_to_send",)]
        yield world
    finally:
        world.link.close()
        world.owner.socket.close()


# The beginning


async def test_a_hello_is_answered() -> None:
    """The hello is sent at once. The welcome reaches the client, and the open calls are sent behind it."""
    async with linked(is_admitted=False) as world:
        assert await world.owner.next() == hello()
        assert (world.link.is_greeted, world.link.is_admitted, world.link.heard) == (False, False, None)
        world.client.submit(call(1), call(2))
        world.link.send_soon()
        await world.owner.tell(STARTING, time=6)
        assert await world.client.next() == ("starting", STARTING)
        assert (world.link.is_greeted, world.link.is_admitted, world.link.heard) == (True, False, 6)
        await world.owner.tell(WELCOME, time=7)
        assert await world.client.next() == ("welcomed", WELCOME)
        assert (world.link.is_admitted, world.link.heard) == (True, 7)
        assert [(await world.owner.next()).n for _ in "12"] == [1, 2]
        assert world.client.rest() == [("calls_to_send",)]


async def test_a_welcome_that_does_not_know_the_client() -> None:
    """A client that may have been forgotten sends no calls on this connection."""
    forgotten = m.Welcome(host="web-1", pid=7, known=False, epoch=1.5, revision=42, load=True)
    async with linked(is_admitted=False) as world:
        await world.owner.tell(forgotten)
        assert await world.client.next() == ("welcomed", forgotten)
        world.link.send_soon()
        world.link.ask(1)
        world.clock.advance(5)
        world.owner.socket.shutdown(socket.SHUT_WR)
        assert await world.client.next() == ("ended", None)
        assert await world.owner.all() == [hello()]


async def test_an_owner_that_refuses() -> None:
    """A client learns why it is refused, and that the owner has closed the connection."""
    no = m.No(reason="name", detail="this is another state")
    async with linked(is_admitted=False) as world:
        await world.owner.tell(no)
        world.owner.socket.close()
        assert [await world.client.next() for _ in "12"] == [("refused", no), ("ended", None)]
        assert world.link.is_greeted


def test_an_owner_that_is_killed_on_uvloop() -> None:
    """The client learns the end of an owner that was killed before it read everything. uvloop reports such an end once, together with the last messages."""

    async def killed() -> list[Any]:
        async with linked(is_admitted=False) as world:
            await idle()  # the hello has arrived, and the owner does not read it
            world.owner.socket.sendall(b"".join(encode_for_client(1, STARTING)))
            world.owner.socket.close()
            return [await world.client.next() for _ in "12"]

    assert uvloop.run(killed()) == [("starting", STARTING), ("ended", None)]


def test_an_owner_that_is_killed_on_uvloop_while_a_record_is_applied() -> None:
    """The client learns the end of an owner after a record that is applied in steps, also on uvloop."""

    async def killed() -> list[Any]:
        async with linked() as world:
            world.client.slow = [asyncio.sleep(0)]
            world.link.ask(1)
            await idle()  # the question has arrived, and the owner does not read it
            record = m.RecordMessage(memoryview(b'{"to":43}'))
            world.owner.socket.sendall(b"".join(encode_for_client(2, record)))
            world.owner.socket.close()
            return [await world.client.next() for _ in "12"]

    assert uvloop.run(killed()) == [("record", b'{"to":43}'), ("ended", None)]


# Records and answers


async def test_records_and_answers_come_in_order() -> None:
    """All messages reach the client in order, and the last time of the owner is noted."""
    async with linked() as world:
        record = m.RecordMessage(memoryview(b'{"to":43}'))
        await world.owner.tell(record, m.Answers([answer(1), answer(2)]), m.Life(43), m.Reply(9, 43), time=8)
        assert [await world.client.next() for _ in "1234"] == [
            ("record", b'{"to":43}'),
            ("answers", [1, 2]),
            ("revision", 43),
            ("reply", 9, 43),
        ]
        assert world.link.heard == 8


async def test_a_record_that_is_applied_in_steps() -> None:
    """What comes behind a record waits until the record is applied. Nothing else waits for it."""
    async with linked() as world:
        first, second = asyncio.Event(), asyncio.Event()

        async def apply(event: asyncio.Event) -> None:
            await event.wait()

        world.client.slow = [apply(first), apply(second)]
        record = m.RecordMessage(memoryview(b"{}"))
        await world.owner.tell(record, m.Life(1), record, m.Life(2))
        assert await world.client.next() == ("record", b"{}")
        await world.owner.tell(m.Life(3))
        world.client.submit(call(1))
        world.link.send_soon()
        assert (await world.owner.next()).n == 1
        assert world.client.rest() == [("calls_to_send",)]
        first.set()
        assert [await world.client.next() for _ in "12"] == [("revision", 1), ("record", b"{}")]
        assert world.client.rest() == []
        second.set()
        assert [await world.client.next() for _ in "12"] == [("revision", 2), ("revision", 3)]


async def test_a_link_that_is_closed_while_a_record_is_applied() -> None:
    """Closing the link cancels the application of the record. Nothing behind the record is handled."""
    async with linked() as world:
        applying = asyncio.get_running_loop().create_future()
        world.client.slow = [applying]
        await world.owner.tell(m.RecordMessage(memoryview(b"{}")), m.Life(1))
        assert await world.client.next() == ("record", b"{}")
        await asyncio.sleep(0)
        world.link.close()
        await asyncio.wait({applying})
        assert applying.cancelled()
        assert await world.owner.all() == []
        assert world.client.rest() == []


async def test_a_record_whose_application_is_cancelled() -> None:
    """If the task that applies a record is cancelled, the link ends: the copy lacks the record."""
    async with linked() as world:
        applying = asyncio.get_running_loop().create_future()
        world.client.slow = [applying]
        await world.owner.tell(m.RecordMessage(memoryview(b"{}")), m.Life(1))
        assert await world.client.next() == ("record", b"{}")
        applying.cancel()
        assert await world.client.next() == ("ended", None)
        assert await world.owner.all() == []


async def test_a_link_that_is_closed_before_a_record_is_applied() -> None:
    """A coroutine that has not begun to apply a record is closed with the link."""
    async with linked() as world:
        applied = []

        async def apply() -> None:
            applied.append(1)

        world.client.slow = [apply()]
        world.client.at_record = lambda: asyncio.get_running_loop().call_soon(world.link.close)
        await world.owner.tell(m.RecordMessage(memoryview(b"{}")))
        assert await world.owner.all() == []
        assert applied == []


async def test_a_record_that_closes_the_link_while_it_is_applied() -> None:
    """The application of a record may close the link itself, and then goes on."""
    async with linked() as world:
        done = asyncio.Event()

        async def apply() -> None:
            world.link.close()
            await asyncio.sleep(0)
            done.set()

        world.client.slow = [apply()]
        await world.owner.tell(m.RecordMessage(memoryview(b"{}")), m.Life(1))
        await done.wait()
        assert await world.owner.all() == []
        assert world.client.rest() == [("record", b"{}")]


async def test_a_record_that_is_not_a_record(caplog: pytest.LogCaptureFixture) -> None:
    """A record that the client cannot apply is a fault of the owner, found at once or in steps. The link ends."""

    async def apply() -> None:
        await asyncio.sleep(0)
        raise BadMessageError("a record with a gap")

    for slow in (apply(), BadMessageError("a record with a gap")):
        async with linked() as world:
            world.client.slow = [slow]
            await world.owner.tell(m.RecordMessage(memoryview(b"secret")), m.Life(1))
            assert await world.client.next() == ("record", b"secret")
            what, problem = await world.client.next()
            assert (what, str(problem)) == ("ended", "a record with a gap")
            assert not world.link.is_open
            assert await world.owner.all() == []
    assert [record.getMessage() for record in caplog.records] == [
        "visits: closed the connection to the owner: bad message of kind R: a record with a gap"
    ] * 2


async def test_a_failure_of_the_client_itself() -> None:
    """An unexpected error while a record is applied ends the link. The event loop reports it."""
    reported: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.put_nowait(context))
    error = RuntimeError("a fault")

    async def apply() -> None:
        raise error

    async with linked() as world:
        world.client.slow = [apply()]
        await world.owner.tell(m.RecordMessage(memoryview(b"{}")))
        assert [await world.client.next() for _ in "12"] == [("record", b"{}"), ("ended", None)]
        assert (await reported.get())["exception"] is error


# Calls


async def test_the_calls_of_many_tasks_leave_together() -> None:
    """However often the link is told that there are calls, it asks for them once, and sends them in one piece."""
    async with linked() as world:

        async def one(n: int) -> None:
            world.client.submit(call(n))
            world.link.send_soon()

        before = world.owner.pieces
        await asyncio.gather(*map(one, range(1, 101)))
        assert [(await world.owner.next()).n for _ in range(100)] == list(range(1, 101))
        assert world.owner.pieces == before + 1
        assert world.client.rest() == [("calls_to_send",)]


async def test_a_call_leaves_at_once() -> None:
    """A call is sent in the next step of the event loop."""
    async with linked() as world:
        world.client.submit(call(1))
        world.link.send_soon()
        await asyncio.sleep(0)
        assert world.owner.socket.recv(1, socket.MSG_PEEK) == b"\0"


async def test_a_large_call() -> None:
    """A call that the socket does not take at once is sent as the owner reads."""
    async with linked() as world:
        large = m.Set(1, 0, "k", Raw(b'"%s"' % (b"x" * (5 * MIB))), None)
        world.client.submit(large, call(2))
        world.link.send_soon()
        received = await world.owner.next()
        assert bytes(received.value) == bytes(large.value)
        world.client.submit(call(3))
        world.link.send_soon()
        assert [(await world.owner.next()).n for _ in "12"] == [2, 3]


async def test_a_question_and_a_farewell() -> None:
    """A question is sent. A farewell has the acknowledgement, and nothing is sent after it. The owner confirms it."""
    async with linked() as world:
        world.link.ask(5)
        world.link.watch(are_watched=True)
        world.client.acknowledgement = 3
        world.client.submit(call(4))
        world.link.send_soon()
        world.link.say_farewell()
        world.link.ask(6)
        world.link.send_soon()
        world.clock.advance(1)
        said = [await world.owner.next() for _ in "123"]
        assert said == [m.Question(5), m.Expiries(are_watched=True), m.Bye(3)]
        await world.owner.tell(m.Answers([answer(1)]), m.Bye(0))
        world.owner.socket.shutdown(socket.SHUT_WR)
        told = [await world.client.next() for _ in "123"]
        assert told == [("answers", [1]), ("farewell_confirmed",), ("ended", None)]
        assert await world.owner.all() == []


async def test_signs_of_life() -> None:
    """The client gives a sign of life with its acknowledgement each second, from the welcome on."""
    async with linked(is_admitted=False) as world:
        world.clock.advance(3)
        await world.owner.tell(WELCOME)
        assert await world.client.next() == ("welcomed", WELCOME)
        for number in (0, 4):
            world.client.acknowledgement = number
            world.clock.advance(1)
        assert [await world.owner.next() for _ in "123"] == [hello(), m.Life(0), m.Life(4)]


# Silence and ends


async def test_silence() -> None:
    """Silence is measured from the last bytes, whatever they are."""
    async with linked() as world:
        assert world.link.silent_for() == 0
        world.clock.advance(7)
        assert world.link.silent_for() == 7
        await world.owner.tell(m.Life(1))
        await world.client.next()
        assert world.link.silent_for() == 0
        world.clock.advance(2)
        assert world.link.silent_for() == 2


async def test_a_blocked_event_loop_is_no_silence() -> None:
    """Bytes that wait to be read are a sign of life of the owner, however long this process did not read them."""
    async with linked() as world:
        world.clock.advance(7)
        world.owner.socket.send(b"\0")
        assert world.link.silent_for() == 0


async def test_a_link_that_ended_is_not_silent() -> None:
    """A link that is not open yet, or that has ended, is not silent."""
    assert Link(Client(), clock=ManualClock(), log=LOG).silent_for() == 0
    async with linked() as world:
        world.clock.advance(7)
        world.link.close()
        assert world.link.silent_for() == 0


async def test_an_owner_that_ends() -> None:
    """The client gets all that was sent before the end, and then the end. Nothing is sent any longer."""
    async with linked() as world:
        await world.owner.tell(m.Answers([answer(1)]))
        world.owner.socket.close()
        assert [await world.client.next() for _ in "12"] == [("answers", [1]), ("ended", None)]
        assert (world.link.is_open, world.link.is_admitted, world.link.is_greeted) == (False, False, True)
        world.link.send_soon()
        world.link.ask(1)
        world.clock.advance(9)
        world.link.close()
        assert world.client.rest() == []


async def test_an_owner_that_ends_without_reading() -> None:
    """An answer that the owner sent counts, also if the owner has not read the last calls before its end."""
    async with linked() as world:
        world.client.submit(call(2))
        world.link.send_soon()
        await world.owner.tell(m.Answers([answer(1)]))
        assert await world.client.next() == ("calls_to_send",)
        world.owner.socket.close()
        world.client.submit(call(3))
        world.link.send_soon()
        told = [await world.client.next() for _ in "123"]
        assert sorted(told, key=str) == [("answers", [1]), ("calls_to_send",), ("ended", None)]
        assert told[-1] == ("ended", None)


@pytest.mark.parametrize("at", ["welcomed", "record", "answers", "revision"])
async def test_a_link_that_the_client_closes(at: str) -> None:
    """From `close` on, the client is told nothing, also if it closed the link while it was told something."""
    async with linked(is_admitted=False) as world:
        world.client.closes_at = at
        await world.owner.tell(WELCOME, m.RecordMessage(memoryview(b"{}")), m.Answers([]), m.Life(1))
        assert await world.owner.all() == [hello()]
        told = [what[0] for what in world.client.rest()]
        assert told == ["welcomed", "record", "answers", "revision"][: len(told)]
        assert told[-1] == at


async def test_a_link_that_was_never_opened() -> None:
    """A link can be closed before it is opened."""
    link = Link(Client(), clock=ManualClock(), log=LOG)
    assert not link.is_open
    link.close()


# Bad messages


def bad(kind: bytes, body: bytes) -> bytes:
    return b"".join(frame(kind, bytes(8), body))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", ": a message of 1213486160 bytes; at most 268435456 are allowed"),
        (b"SSH", ": bytes that are not the beginning of a message"),
        (bad(b"L", bytes(8)), " of kind L: a message before the welcome"),
        (bad(b"W", b"secret"), " of kind W: a payload that is not a welcome"),
        (bad(b"C", b"secret"), ": a message of an unknown kind"),
    ],
)
async def test_another_program(data: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """A first message that is no message of an owner ends the link, and it is known that no owner has answered."""
    async with linked(is_admitted=False) as world:
        await world.owner.send(data)
        what, problem = await world.client.next()
        assert what == "ended"
        assert why.endswith(f": {problem}")
        assert not world.link.is_greeted
        assert [one.getMessage() for one in caplog.records] == [
            f"visits: closed the connection to the owner: bad message{why}"
        ]


async def test_an_owner_of_another_version() -> None:
    """The client learns which version the owner has."""
    async with linked(is_admitted=False) as world:
        await world.owner.send(bad(b"W", b'{"lab_state":"shared","protocol":2,"other":[]}'))
        what, problem = await world.client.next()
        assert what == "ended"
        assert isinstance(problem, OtherVersionError)
        assert problem.protocol == 2


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bad(b"A", b"secret"), "a payload that is not a list of answers"),
        (bad(b"L", b"secret"), "a payload of 14 bytes instead of 16"),
        (bad(b"L", bytes(8)), "a time before that of the previous message"),
    ],
)
async def test_a_bad_message(data: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """What came before a bad message counts, and nothing after it. The log has no content of it."""
    async with linked() as world:
        await world.owner.tell(m.Life(7))
        await world.owner.send(data)
        assert await world.client.next() == ("revision", 7)
        what, problem = await world.client.next()
        assert (what, str(problem)) == ("ended", why)
        assert world.link.is_greeted
        assert len(caplog.records) == 1
        assert "secret" not in caplog.text


async def test_a_second_welcome() -> None:
    """An owner admits a client once."""
    async with linked() as world:
        await world.owner.tell(WELCOME)
        assert str((await world.client.next())[1]) == "an answer to the hello after the welcome"


# Both ends


async def test_a_link_to_a_server(tmp_path: Path) -> None:
    """Two clients of one owner call, get records and answers, and say farewell."""
    async with serving(tmp_path) as world:
        clients = []
        for name in (CLIENT, OTHER):
            client = Client()
            link = Link(client, clock=world.clock, log=LOG)
            sock = connected(world.path)
            sock.setblocking(False)
            link.open(sock, hello(name))
            assert [await client.next() for _ in "12"] == [("welcomed", WELCOME), ("calls_to_send",)]
            client.submit(call(1))
            link.send_soon()
            assert [(await world.owner.next())[0] for _ in "123"] == ["greeting", "admit", "call"]
            clients.append((client, link))
        world.server.record(b"{}")
        for connection in world.owner.connections:
            connection.answers([answer(1)])
        for client, link in clients:
            assert [await client.next() for _ in "123"] == [("calls_to_send",), ("record", b"{}"), ("answers", [1])]
            link.say_farewell()
            assert [await client.next() for _ in "12"] == [("farewell_confirmed",), ("ended", None)]
        assert world.server.followers == 0
