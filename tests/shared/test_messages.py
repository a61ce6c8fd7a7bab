"""The messages of a shared state: their bytes, bad ones, and their order on a connection."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from lab_state.exceptions import InvalidValueError
from lab_state.shared import _frames as frames
from lab_state.shared import _messages as m
from lab_state.shared._frames import FROM_CLIENT, FROM_OWNER, BadMessageError, Frames, ReceivedFrame, frame
from lab_state.shared._order import SPAN, ClientOrder, OwnerOrder
from lab_state.shared._wire import (
    OtherVersionError,
    decode_from_client,
    decode_from_owner,
    encode_for_client,
    encode_for_owner,
)

CLIENT = "0123456789abcdef" * 2
HELLO = m.Hello(name="visits", client=CLIENT, revision=41, heard=None)
WELCOME = m.Welcome(host="web-1", pid=7, known=True, epoch=1.5, revision=42, load=False)
CHANGES = m.Changes(set={"a": Raw(b"[1]")}, delete=["b"], expires={"a": 9})

CALLS: list[tuple[m.Call, str]] = [
    (m.Set(18, 17, "k", Raw(b'{"a":1}'), None), '["set",18,17,"k",{"a":1},null]'),
    (m.SetMany(18, 17, {"k": Raw(b"1")}, 500), '["set_many",18,17,{"k":1},500]'),
    (m.Delete(18, 17, "k"), '["delete",18,17,"k"]'),
    (m.DeleteMany(18, 17, ["k", "l"]), '["delete_many",18,17,["k","l"]]'),
    (m.DeleteAll(18, 17, ""), '["delete_all",18,17,""]'),
    (m.Incr(18, 17, "k", 1, 0.5, "any", None), '["incr",18,17,"k",1,0.5,"any",null]'),
    (m.SetIfAbsent(18, 17, "k", Raw(b"null"), None), '["set_if_absent",18,17,"k",null,null]'),
    (m.Touch(18, 17, "k", 1000), '["touch",18,17,"k",1000]'),
    (
        m.MakeChanges(18, 17, -1, ["a"], ["p/"], CHANGES),
        '["change",18,17,-1,["a"],["p/"],{"clear":false,"set":{"a":[1]},"delete":["b"],"expires":{"a":9}}]',
    ),
]
OTHERS: list[tuple[m.FromClient, bytes]] = [
    (
        HELLO,
        b'H{"lab_state":"shared","protocol":1,"name":"visits","client":"%s","revision":41,"heard":null,"checks":true}'
        % CLIENT.encode(),
    ),
    (m.Life(17), b"L\0\0\0\0\0\0\0\x11"),
    (m.Question(2), b"Q\0\0\0\0\0\0\0\x02"),
    (m.Expiries(are_watched=True), b"E\0\0\0\0\0\0\0\x01"),
    (m.Expiries(are_watched=False), b"E\0\0\0\0\0\0\0\0"),
    (m.Bye(17), b"B\0\0\0\0\0\0\0\x11"),
]
TIME = 5
ANSWERS: list[m.Answer] = [
    m.Ok(18, 42, Raw(b"true")),
    m.Raised(19, 42, "TypeMismatchError", "no", "$"),
    m.Refused(20, 43, {"k": (Raw(b"1"), None), "l": (Raw(b"[2]"), 9)}),
    m.Refused(21, 43, None),
    m.Moved(22),
    m.Failed(23, "UnavailableError", "later"),
]
OWNERS: list[tuple[m.FromOwner, bytes]] = [
    (m.Starting(host="web-1", pid=7), b'S........{"lab_state":"shared","protocol":1,"host":"web-1","pid":7}'),
    (
        WELCOME,
        (
            b'W........{"lab_state":"shared","protocol":1,"host":"web-1","pid":7,"known":true,"epoch":1.5,"revision":42,'
            b'"load":false,"schema":1,"readable_by":1}'
        ),
    ),
    (
        m.No(reason="name", detail="x"),
        b'N........{"lab_state":"shared","protocol":1,"reason":"name","detail":"x"}',
    ),
    (
        m.Answers(ANSWERS),
        (
            b'A........[["ok",18,42,true],["raised",19,42,"TypeMismatchError","no","$"],'
            b'["refused",20,43,{"k":[1,null],"l":[[2],9]}],["refused",21,43,null],["moved",22],'
            b'["failed",23,"UnavailableError","later"]]'
        ),
    ),
    (m.Life(42), b"L........\0\0\0\0\0\0\0\x2a"),
    (m.Reply(2, 42), b"Q........\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x2a"),
    (m.Bye(0), b"B........"),
]


def received(data: bytes, kinds: frozenset[bytes]) -> ReceivedFrame:
    decoder = Frames(kinds)
    (found,) = decoder.feed(data)
    assert decoder.problem is None
    return found


def from_client(body: bytes) -> m.FromClient:
    """Decode a payload after its kind."""
    return decode_from_client(ReceivedFrame(body[:1], body[1:]))


def from_owner(body: bytes) -> m.FromOwner:
    return decode_from_owner(ReceivedFrame(body[:1], body[1:]))[1]


def plain(message: Any) -> Any:
    return type(message), msgspec.json.encode(message)


# The bytes


@pytest.mark.parametrize(
    ("call", "text"), CALLS, ids=lambda value: "" if isinstance(value, str) else type(value).__name__
)
def test_the_bytes_of_a_call(call: m.Call, text: str) -> None:
    """A call is a frame of the kind C with a JSON array, as the page of the protocol has it."""
    data = b"".join(encode_for_owner(call))
    assert data == len(text).to_bytes(4, "big") + b"C" + text.encode()
    assert plain(decode_from_client(received(data, FROM_CLIENT))) == plain(call)


@pytest.mark.parametrize(("message", "body"), OTHERS)
def test_the_bytes_of_a_client(message: m.FromClient, body: bytes) -> None:
    """A client's other messages have the bytes that the page of the protocol has."""
    data = b"".join(encode_for_owner(message))
    assert data == (len(body) - 1).to_bytes(4, "big") + body
    assert decode_from_client(received(data, FROM_CLIENT)) == message


@pytest.mark.parametrize(("message", "body"), OWNERS)
def test_the_bytes_of_an_owner(message: m.FromOwner, body: bytes) -> None:
    """An owner's messages have the bytes that the page of the protocol has, each with the time before them."""
    data = b"".join(encode_for_client(TIME, message))
    assert data == (len(body) - 1).to_bytes(4, "big") + body.replace(b"." * 8, TIME.to_bytes(8, "big"), 1)
    time, found = decode_from_owner(received(data, FROM_OWNER))
    assert (time, plain(found)) == (TIME, plain(message))


def test_a_record_is_sent_as_it_is() -> None:
    """A record has the bytes of the journal, and sending it copies nothing."""
    record = b'{"from":1,"to":2}'
    parts = encode_for_client(TIME, m.RecordMessage(memoryview(record)))
    assert b"".join(parts) == (8 + len(record)).to_bytes(4, "big") + b"R" + TIME.to_bytes(8, "big") + record
    assert isinstance(parts[-1], memoryview)
    assert parts[-1].obj is record
    time, found = decode_from_owner(received(b"".join(parts), FROM_OWNER))
    assert isinstance(found, m.RecordMessage)
    assert (time, bytes(found.record)) == (TIME, record)


# Frames


@given(st.lists(st.tuples(st.sampled_from(sorted(FROM_OWNER)), st.binary(max_size=40))), st.lists(st.integers(0, 60)))
def test_frames_come_in_pieces_of_any_size(sent: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    """However the bytes of a connection are cut, the frames are those that were sent, in order."""
    data = b"".join(b"".join(frame(*one)) for one in sent)
    decoder, found = Frames(FROM_OWNER), []
    for size in [*cuts, len(data)]:
        found += decoder.feed(data[:size])
        data = data[size:]
    assert [tuple(one) for one in found] == sent
    assert decoder.problem is None


def test_a_frame_comes_byte_by_byte() -> None:
    """A frame is complete with its last byte, wherever its head and its payload are cut."""
    data = b"".join(frame(b"R", bytes(range(200))))
    decoder = Frames(FROM_OWNER)
    for at in range(len(data) - 1):
        assert decoder.feed(data[at : at + 1]) == []
    assert decoder.feed(data[-1:] + data) == [ReceivedFrame(b"R", bytes(range(200)))] * 2


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "bytes; at most"),
        (b"G", "not the beginning"),
        (b"\x10\0\0\x01C", "268435457 bytes; at most 268435456"),
        (b"\0\0\0\x01W1", "unknown kind"),
    ],
)
def test_bytes_that_are_no_frame(data: bytes, why: str) -> None:
    """Bytes that are no frame are noticed. Frames before them are returned, and nothing after them is."""
    decoder = Frames(FROM_CLIENT)
    before = b"".join(encode_for_owner(m.Life(1)))
    assert len(decoder.feed(before + data)) == 1
    assert why in str(decoder.problem)
    assert decoder.feed(before) == []


def test_the_largest_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload at the bound is sent. A larger one is refused before it is sent, with what to do."""
    monkeypatch.setattr(frames, "MOST_BYTES", 100)
    assert len(frame(b"C", bytes(60), bytes(40))) == 3
    with pytest.raises(InvalidValueError, match="split it"):
        frame(b"C", bytes(60), bytes(41))


# Bad contents


@pytest.mark.parametrize(
    "body",
    [
        b"C",
        b"C{}",
        b'C["set",18,17,"k",1]',
        b'C["set",18,17,"k",1,null,1]',
        b'C["unknown",18,17,"k"]',
        b'C["delete",0,0,"k"]',
        b'C["delete",18,-1,"k"]',
        b'C["delete",18,17,""]',
        b'C["delete",18,17,"$lab_state"]',
        b'C["delete_many",18,17,["k","\\u0000"]]',
        b'C["set_many",18,17,{"":1},null]',
        b'C["set",18,17,"k",1,0]',
        b'C["set",18,17,"k","\xff",null]',
        b'C["incr",18,17,"k",1,0,"str",null]',
        b'C["change",18,17,-2,[],[],{}]',
        b'C["change",18,17,1,[],[],{"set":{"a":1},"delete":["a"]}]',
        b'C["change",18,17,1,[],[],{"expires":{"a":1}}]',
        b'C["change",18,17,1,[""],[],{}]',
        b'C["change",18,17,1,[],[],{"more":1}]',
        b"H{}",
        b'H{"lab_state":"other","protocol":1}',
        OTHERS[0][1].replace(b"}", b',"more":1}'),
        OTHERS[0][1].replace(b"0123", b"XYZ4", 1),
        OTHERS[0][1].replace(b"41", b"-1"),
        b"L1234567",
        b"Q123456789",
        b"E",
        b"E\0\0\0\0\0\0\0\x02",
        b"B",
    ],
)
def test_a_bad_message_of_a_client(body: bytes) -> None:
    """A payload that its kind does not allow is refused, and the message has none of its contents."""
    with pytest.raises(BadMessageError) as caught:
        from_client(body)
    assert str(caught.value).startswith(("a payload", "a call"))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "body",
    [
        b"A",
        b"A12345678",
        b"A12345678{}",
        b'A12345678[["ok",1]]',
        b"L12345678",
        b"Q12345678",
        b"B",
        b"R",
        b"W12345678{}",
    ],
)
def test_a_bad_message_of_an_owner(body: bytes) -> None:
    """A payload that its kind does not allow is refused, also one that is too short for a time."""
    with pytest.raises(BadMessageError):
        from_owner(body)


@pytest.mark.parametrize("kind", [b"W", b"S", b"N"])
def test_another_version_of_an_owner(kind: bytes) -> None:
    """The version is compared before the other members, which may be others in another version."""
    with pytest.raises(OtherVersionError, match="version 2 of the protocol, and this process has 1") as caught:
        from_owner(kind + b'12345678{"lab_state":"shared","protocol":2,"other":[]}')
    assert caught.value.protocol == 2


def test_another_version_of_a_client() -> None:
    """So it is for the hello of a client."""
    with pytest.raises(OtherVersionError):
        from_client(b'H{"lab_state":"shared","protocol":2}')


@given(st.binary(max_size=200))
def test_bytes_of_any_kind(data: bytes) -> None:
    """Any payload of any kind is decoded or is a `BadMessageError`. No other error comes."""
    for kind in FROM_CLIENT:
        with contextlib.suppress(BadMessageError):
            decode_from_client(ReceivedFrame(kind, data))
    for kind in FROM_OWNER:
        with contextlib.suppress(BadMessageError):
            decode_from_owner(ReceivedFrame(kind, data))


# Order


def delete(n: int, ack: int) -> m.Delete:
    return m.Delete(n, ack, "k")


@pytest.mark.parametrize(
    "messages",
    [
        [HELLO],
        [
            HELLO,
            delete(1, 0),
            delete(2, 0),
            m.Life(1),
            delete(5, 3),
            m.Question(1),
            m.Expiries(are_watched=True),
            m.Bye(5),
        ],
        [HELLO, delete(SPAN, 0), m.Life(0)],
        [HELLO, delete(SPAN + 7, 7)],
    ],
)
def test_an_order_of_a_client_that_is_allowed(messages: list[m.FromClient]) -> None:
    """Numbers rise, with gaps, and so do acknowledgements."""
    order = ClientOrder()
    for message in messages:
        order.check(message)
    assert order.acknowledged == max(getattr(one, "ack", getattr(one, "number", 0)) for one in messages)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([m.Life(0)], "not a hello"),
        ([HELLO, HELLO], "second hello"),
        ([HELLO, m.Bye(0), m.Life(0)], "after the farewell"),
        ([HELLO, delete(2, 0), delete(2, 0)], "number 2 is not above 2, the number of the previous call"),
        ([HELLO, delete(2, 0), delete(1, 0)], "number 1 is not above 2, the number of the previous call"),
        ([HELLO, delete(2, 2)], "number 2 is not 1 to 1024 above the acknowledgement 2"),
        ([HELLO, delete(SPAN + 1, 0)], "number 1025 is not 1 to 1024 above the acknowledgement 0"),
        ([HELLO, m.Life(3), delete(9, 2)], "acknowledgement 2 is below"),
        ([HELLO, m.Life(3), m.Bye(2)], "acknowledgement 2 is below"),
    ],
)
def test_an_order_of_a_client_that_is_refused(messages: list[m.FromClient], why: str) -> None:
    """A message that may not come now is refused, and changes nothing."""
    order = ClientOrder()
    for message in messages[:-1]:
        order.check(message)
    before = order.acknowledged
    with pytest.raises(BadMessageError, match=why):
        order.check(messages[-1])
    assert order.acknowledged == before


def test_acknowledgements_of_earlier_connections_count() -> None:
    """The acknowledgement of a client never goes back, also over connections."""
    order = ClientOrder()
    order.resume(7)
    order.check(HELLO)
    with pytest.raises(BadMessageError, match="below an earlier one"):
        order.check(m.Life(6))
    order.check(delete(9, 8))
    assert order.acknowledged == 8


STARTING, NO = m.Starting(host="h", pid=1), m.No(reason="name", detail="")


def test_an_order_of_an_owner_that_is_allowed() -> None:
    """An owner tells to wait, then admits, then sends the rest, and a farewell is the last."""
    order = OwnerOrder()
    messages: list[m.FromOwner] = [STARTING, STARTING, WELCOME, m.Life(1), m.Answers([]), m.Bye(0)]
    for time, message in enumerate(messages):
        assert order.has_welcome is (time > 2)
        order.check(time // 2, message)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([m.Life(1)], "a message before the welcome"),
        ([STARTING, m.Answers([])], "a message before the welcome"),
        ([WELCOME, WELCOME], "an answer to the hello after the welcome"),
        ([WELCOME, STARTING], "an answer to the hello after the welcome"),
        ([NO, STARTING], "after a refusal or a farewell"),
        ([WELCOME, m.Bye(0), m.Life(1)], "after a refusal or a farewell"),
    ],
)
def test_an_order_of_an_owner_that_is_refused(messages: list[m.FromOwner], why: str) -> None:
    """A message that may not come now is refused."""
    order = OwnerOrder()
    for message in messages[:-1]:
        order.check(1, message)
    with pytest.raises(BadMessageError, match=why):
        order.check(1, messages[-1])


def test_the_time_of_an_owner_does_not_go_back() -> None:
    """A time before that of the previous message is refused: the message was replayed, or is not from an owner."""
    order = OwnerOrder()
    order.check(5, WELCOME)
    order.check(5, m.Life(1))
    with pytest.raises(BadMessageError, match="before that of the previous message"):
        order.check(4, m.Life(1))
