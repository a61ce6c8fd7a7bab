"""Encode and decode the messages between the owner of a shared state and its clients. This module does no I/O.

A payload consists of 8-byte integers, or JSON, or both in this order. A record is JSON that `shared/_records.py` decodes.
Each payload is checked, because another program may be at the other end. The decoders of messages keep stored values as
JSON, and do not decode them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Generator, Iterable, Iterator
from typing import Any, TypeVar

import msgspec

from lab_state._arguments import check_keys
from lab_state._batch import in_parts
from lab_state._not_json import NOT_JSON
from lab_state._slices import TAB, Unsliced, members, names, parts_of, times, unsliced
from lab_state.exceptions import InvalidKeyError
from lab_state.shared._frames import (
    ANSWERS,
    BYE,
    CALL,
    EXPIRIES,
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
    Expiries,
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
        protocol: The protocol version of the other process.
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

_CHANGE = re.compile(rb'\["change",\d+,\d+,-?\d+,\[')
_DELETE, _EXPIRES = b'},"delete":[', b'],"expires":{'
"""The text between `set` and `delete`, and the text between `delete` and `expires`, in a `MakeChanges` that is written in slices."""

_CONTRADICTION = "a call whose changes contradict each other"


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
    if isinstance(message, Expiries):
        return frame(EXPIRIES, _ONE.pack(message.are_watched))
    if isinstance(message, Bye):
        return frame(BYE, _ONE.pack(message.number))
    return frame(CALL, _encode(message))


def encode_body(call: SetMany | DeleteMany | MakeChanges) -> Iterator[bytes]:
    """Yield the message of a call with many keys, in slices. Its beginning is missing: `encode_large_call` adds it."""
    if isinstance(call, SetMany):
        yield b"{"
        yield from members(parts_of(call.values.items(), {}, []), TAB)
        yield TAB + b"}," + _encode(call.ttl) + b"]"
    elif isinstance(call, DeleteMany):
        yield b"["
        yield from names(call.keys, TAB)
        yield TAB + b"]]"
    else:
        made = call.changes
        yield b"["
        yield from names(call.keys, TAB)
        yield TAB + b"]," + _encode(call.prefixes) + b',{"clear":' + _encode(made.clear) + b',"set":{'
        yield from members(parts_of(made.set.items(), {}, []), TAB)
        yield TAB + _DELETE
        yield from names(made.delete, TAB)
        yield TAB + _EXPIRES
        yield from times(made.expires, TAB)
        yield TAB + b"}}]"


def encode_large_call(call: Call, body: Iterable[bytes]) -> list[bytes]:
    """Return the frame of a call in parts. `body` is the result of `encode_body` for this call.

    `body` does not contain `n`, `ack` and `since`. So these may have changed since `encode_body` ran.

    Raises:
        InvalidValueError: The message is too large.
    """
    numbers = [call.n, call.ack, call.since] if isinstance(call, MakeChanges) else [call.n, call.ack]
    return frame(CALL, _encode([call.__struct_config__.tag, *numbers])[:-1] + b",", *body)


def encode_for_client(time: int, message: FromOwner) -> list[bytes]:
    """Return the frame of a message to a client, in parts. `time` is the time of `CLOCK_MONOTONIC`, in nanoseconds.

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
    """Return the frame of a record, in parts. The bytes of the record are not copied.

    Raises:
        InvalidValueError: The record is too large.
    """
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
    if kind == EXPIRIES:
        if number > 1:
            raise BadMessageError(f"a payload with the number {number} instead of 0 or 1")
        return Expiries(bool(number))
    return Question(number) if kind == QUESTION else Bye(number)


def decode_call_in_steps(payload: bytes) -> Generator[None, None, Call]:
    """Return the call in a payload, and yield between two steps. A call that was not written in slices is decoded in one step.

    Raises:
        BadMessageError: The payload is not a call.
    """
    found = yield from unsliced(payload)
    call = None if found is None else _filled(found)
    if call is None:
        call = _decode(_call, payload, "a call")
    for keys in in_parts(_keys(call)):
        _check_keys(keys)
        yield
    if isinstance(call, MakeChanges):
        values = call.changes.set.keys()
        for times in in_parts(call.changes.expires.items()):
            if not values >= {key for key, _ in times}:
                raise BadMessageError(_CONTRADICTION)
            yield
        for keys in in_parts(call.changes.delete):
            if not values.isdisjoint(keys):
                raise BadMessageError(_CONTRADICTION)
            yield
    return call


def _filled(found: Unsliced) -> Call | None:
    """Return a call from its slices; `None` if the slices are not at the places where `encode_body` puts them."""
    frame, contents = found
    call = _decode(_call, b"".join(frame), "a call")
    if isinstance(call, SetMany) and len(contents) == 1 and not call.values:
        return msgspec.structs.replace(call, values=contents[0])
    if isinstance(call, DeleteMany) and len(contents) == 1:
        return msgspec.structs.replace(call, keys=contents[0])
    is_change = isinstance(call, MakeChanges) and not call.changes.set and _CHANGE.fullmatch(frame[0])
    if not is_change or frame[2:-1] != [_DELETE, _EXPIRES]:
        return None
    assert isinstance(call, MakeChanges)
    keys, values, deleted, expires = contents
    if expires and min(expires.values()) < 0:
        raise BadMessageError("a payload that is not a call")
    changes = msgspec.structs.replace(call.changes, set=values, delete=deleted, expires=expires)
    return msgspec.structs.replace(call, keys=keys, changes=changes)


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
    _check_keys(_keys(call))
    if isinstance(call, MakeChanges):
        changes = call.changes
        if not changes.expires.keys() <= changes.set.keys() or not changes.set.keys().isdisjoint(changes.delete):
            raise BadMessageError(_CONTRADICTION)
    return call


def _check_keys(keys: Collection[str]) -> None:
    try:
        check_keys(keys)
    except InvalidKeyError:
        raise BadMessageError("a call with an invalid key") from None


def _keys(call: Call) -> Collection[str]:
    if isinstance(call, Set):  # the most frequent call
        return (call.key,)
    if isinstance(call, SetMany):
        return call.values
    if isinstance(call, DeleteMany):
        return call.keys
    if isinstance(call, DeleteAll):
        return ()
    if isinstance(call, MakeChanges):
        return [*call.keys, *call.changes.set, *call.changes.delete]
    return (call.key,)
