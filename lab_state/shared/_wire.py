"""Encode and decode the messages between the owner of a shared state and its followers. Pure.

A payload has 8-byte integers, or JSON, or both in this order. A record is JSON that `_records.py` decodes. A stored
value in a message is not checked again, because the client that encoded the value has checked it. Everything else
is checked, because another program may be at the other end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from lab_state._arguments import check_key
from lab_state._not_json import NOT_JSON
from lab_state.exceptions import InvalidKeyError
from lab_state.shared._frames import (
    ANSWERS,
    BYE,
    CALL,
    HELLO,
    LIFE,
    NO,
    QUESTION,
    RECORD,
    STARTING,
    WELCOME,
    BadMessageError,
    ReceivedFrame,
    frame,
)
from lab_state.shared._messages import (
    PROTOCOL,
    Answer,
    Answers,
    AnyVersion,
    Bye,
    Call,
    DeleteAll,
    DeleteMany,
    FromClient,
    FromOwner,
    Hello,
    Life,
    MakeChanges,
    No,
    Question,
    RecordMessage,
    Reply,
    Set,
    SetMany,
    Starting,
    Welcome,
)

T = TypeVar("T")

_ONE, _TWO, _THREE = struct.Struct(">Q"), struct.Struct(">QQ"), struct.Struct(">QQQ")


class OtherVersionError(BadMessageError):
    """The error for a message of a process that has another version of the protocol.

    Attributes:
        protocol: The version of the other process.
    """

    def __init__(self, protocol: int) -> None:
        super().__init__(f"it has version {protocol} of the protocol, and this process has {PROTOCOL}")
        self.protocol = protocol


_encode = msgspec.json.Encoder().encode
_call: msgspec.json.Decoder[Call] = msgspec.json.Decoder(Call)
_answers: msgspec.json.Decoder[list[Answer]] = msgspec.json.Decoder(list[Answer])
_hello, _starting, _welcome, _no = (
    msgspec.json.Decoder(Hello),
    msgspec.json.Decoder(Starting),
    msgspec.json.Decoder(Welcome),
    msgspec.json.Decoder(No),
)
_any_version = msgspec.json.Decoder(AnyVersion)


def encode_for_owner(message: FromClient) -> list[bytes]:
    """Return the frame of a message to the owner, in parts.

    Raises:
        InvalidValueError: The message is too large.
    """
    if isinstance(message, Hello):
        return frame(HELLO, _encode(message))
    if isinstance(message, Life):
        return frame(LIFE, _ONE.pack(message.number))
    if isinstance(message, Question):
        return frame(QUESTION, _ONE.pack(message.token))
    if isinstance(message, Bye):
        return frame(BYE, _ONE.pack(message.number))
    return frame(CALL, _encode(message))


def encode_for_client(time: int, message: FromOwner) -> list[bytes]:
    """Return the frame of a message to a client, in parts. `time` is `CLOCK_MONOTONIC`, in nanoseconds.

    Raises:
        InvalidValueError: The message is too large.
    """
    if isinstance(message, RecordMessage):
        return frame_of_record(time, message.record)
    if isinstance(message, Answers):
        return frame(ANSWERS, _ONE.pack(time), _encode(message.answers))
    if isinstance(message, Life):
        return frame(LIFE, _TWO.pack(time, message.number))
    if isinstance(message, Reply):
        return frame(QUESTION, _THREE.pack(time, *message))
    if isinstance(message, Bye):
        return frame(BYE, _ONE.pack(time))
    kind = {Starting: STARTING, Welcome: WELCOME, No: NO}[type(message)]
    return frame(kind, _ONE.pack(time), _encode(message))


def frame_of_record(time: int, record: Any) -> list[bytes]:
    """Return the frame of a record, in parts. The bytes of the record are not copied."""
    return frame(RECORD, _ONE.pack(time), record)


def decode_from_client(received: ReceivedFrame) -> FromClient:
    """Return the message of a client.

    Raises:
        OtherVersionError: The client has another version of the protocol.
        BadMessageError: The frame is not a message of this protocol.
    """
    kind, payload = received
    if kind == CALL:
        return _checked(_decode(_call, payload, "a call"))
    if kind == HELLO:
        return _versioned(_hello, payload, "a hello")
    (number,) = _numbers(_ONE, payload)
    if kind == LIFE:
        return Life(number)
    return Question(number) if kind == QUESTION else Bye(number)


def decode_from_owner(received: ReceivedFrame) -> tuple[int, FromOwner]:
    """Return the time and the message of an owner.

    Raises:
        OtherVersionError: The owner has another version of the protocol.
        BadMessageError: The frame is not a message of this protocol.
    """
    kind, payload = received
    if kind == LIFE:
        time, revision = _numbers(_TWO, payload)
        return time, Life(revision)
    if kind == QUESTION:
        time, token, revision = _numbers(_THREE, payload)
        return time, Reply(token, revision)
    (time,) = _numbers(_ONE, payload if kind == BYE else payload[: _ONE.size])
    return time, Bye(0) if kind == BYE else _message_of(kind, memoryview(payload)[_ONE.size :])


def _message_of(kind: bytes, body: memoryview) -> FromOwner:
    if kind == RECORD:
        return RecordMessage(body)
    if kind == ANSWERS:
        answers = _decode(_answers, body, "a list of answers")
        return Answers(answers)
    if kind == STARTING:
        return _versioned(_starting, body, "a sign that the owner starts")
    if kind == WELCOME:
        return _versioned(_welcome, body, "a welcome")
    return _versioned(_no, body, "a refusal of a hello")


def _numbers(form: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise BadMessageError(f"a payload of {len(payload)} bytes instead of {form.size}")
    numbers: tuple[int, ...] = form.unpack(payload)
    return numbers


def _decode(decoder: msgspec.json.Decoder[T], payload: bytes | memoryview, what: str) -> T:
    """Decode JSON. Check that the payload is UTF-8, because msgspec does not check the bytes of a `Raw`."""
    try:
        str(payload, "utf-8")
        return decoder.decode(payload)
    except NOT_JSON:
        raise BadMessageError(f"a payload that is not {what}") from None


def _versioned(decoder: msgspec.json.Decoder[T], payload: bytes | memoryview, what: str) -> T:
    protocol = _decode(_any_version, payload, what).protocol
    if protocol != PROTOCOL:
        raise OtherVersionError(protocol)
    return _decode(decoder, payload, what)


def _checked(call: Call) -> Call:
    """Check the keys of a call, and that its changes do not contradict each other."""
    try:
        if isinstance(call, Set):  # the most frequent call: without the loop, its check takes a third of the time
            check_key(call.key)
        else:
            for key in _keys(call):
                check_key(key)
    except InvalidKeyError:
        raise BadMessageError("a call with an invalid key") from None
    if isinstance(call, MakeChanges):
        changes = call.changes
        if not changes.expires.keys() <= changes.set.keys() or not changes.set.keys().isdisjoint(changes.delete):
            raise BadMessageError("a call whose changes contradict each other")
    return call


def _keys(call: Call) -> Iterable[str]:
    if isinstance(call, SetMany):
        return call.values
    if isinstance(call, DeleteMany):
        return call.keys
    if isinstance(call, DeleteAll):
        return ()
    if isinstance(call, MakeChanges):
        return [*call.keys, *call.changes.set, *call.changes.delete]
    return (call.key,)
