"""Frames on the socket of a shared state, and a decoder that receives their bytes in pieces. This module does no I/O.

A frame is `<length: 4 bytes, big endian> <kind: 1 byte> <payload>`. If a printable text is sent in place of a frame, its
first byte would be that of a length above the bound. So such a text is refused at its first byte.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lab_state._buffers import ByteBuffer
from lab_state.exceptions import InvalidValueError

MOST_BYTES = 256 * 1024 * 1024
"""The largest payload, in bytes."""

HELLO, CALL, LIFE, QUESTION, BYE, EXPIRIES = b"H", b"C", b"L", b"Q", b"B", b"E"
STARTING, WELCOME, NO, RECORD, ANSWERS = b"S", b"W", b"N", b"R", b"A"
FROM_CLIENT = frozenset({HELLO, CALL, LIFE, QUESTION, BYE, EXPIRIES})
FROM_OWNER = frozenset({STARTING, WELCOME, NO, RECORD, ANSWERS, LIFE, QUESTION, BYE})

_HEAD = struct.Struct(">Ic")
_FIRST_BYTE = MOST_BYTES >> 24


class BadMessageError(ValueError):
    """The error for a message that the protocol does not allow. The receiver closes the connection. The text has no key and no value."""


class ReceivedFrame(NamedTuple):
    """A frame that was received: its kind, and its payload."""

    kind: bytes
    payload: bytes


def frame(kind: bytes, *parts: bytes) -> list[bytes]:
    """Return a frame in parts. Joining them would copy the payload.

    Raises:
        InvalidValueError: The payload is too large.
    """
    size = sum(map(len, parts))
    if size > MOST_BYTES:
        raise InvalidValueError(
            f"a call or a change of {size} bytes is larger than the {MOST_BYTES} that processes can exchange; split it"
        )
    return [_HEAD.pack(size, kind), *parts]


class Frames:
    """A decoder of frames, which receives the bytes of one connection in pieces of any size.

    Attributes:
        problem: The fault in the received bytes; `None` if there is none. Nothing after a fault is decoded.
    """

    def __init__(self, kinds: frozenset[bytes]) -> None:
        """Prepare to decode frames of some kinds: `FROM_CLIENT` or `FROM_OWNER`."""
        self.problem: BadMessageError | None = None
        self._kinds = kinds
        self._rest = b""  # the first bytes of a head (length and kind) that is not complete
        self._kind = b""
        self._payload: ByteBuffer | None = None
        self._missing = 0

    def feed(self, data: bytes) -> list[ReceivedFrame]:
        """Add the next bytes, and return the frames that are complete now. Frames before a fault are returned, too."""
        found: list[ReceivedFrame] = []
        if self.problem is not None:
            return found
        if self._payload is not None:
            part = data[: self._missing]
            self._payload.add(part)
            self._missing -= len(part)
            if self._missing:
                return found
            found.append(ReceivedFrame(self._kind, self._payload.taken()))
            self._payload = None
            data = data[len(part) :]
        data, self._rest = self._rest + data, b""
        try:
            self._heads(data, found)
        except BadMessageError as problem:
            self.problem = problem
        return found

    def _heads(self, data: bytes, found: list[ReceivedFrame]) -> None:
        position = 0
        while len(data) - position >= _HEAD.size:
            size, kind = _HEAD.unpack_from(data, position)
            position += _HEAD.size
            if size > MOST_BYTES:
                raise BadMessageError(f"a message of {size} bytes; at most {MOST_BYTES} are allowed")
            if kind not in self._kinds:
                raise BadMessageError("a message of an unknown kind")
            payload = data[position : position + size]
            position += size
            if len(payload) < size:
                self._kind, self._payload, self._missing = kind, ByteBuffer(), size - len(payload)
                self._payload.add(payload)
                return
            found.append(ReceivedFrame(kind, payload))
        self._rest = data[position:]
        if self._rest and self._rest[0] > _FIRST_BYTE:  # a text in place of a frame may be shorter than a head
            raise BadMessageError("bytes that are not the beginning of a message")
