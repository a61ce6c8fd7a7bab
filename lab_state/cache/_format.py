"""The bytes of a mirror, and of the messages about its changes. This module does no I/O.

A mirror has two hashes: values and expiry times. Each of them has one more field, `$lab_state`, with
the same JSON: format, revision, writer, and the id of the fill that wrote the mirror. So a reader
notices if a hash is missing, evicted or old, and never treats a missing hash as empty.

Any client of the cache may write to a mirror. So the code never assumes that the bytes that it
reads are from lab_state.

A message on the channel is a step, or a part of one: `{"from":41,"to":42,"writer":"...",
"set":{...},"delete":[...],"expires":{...}}`. `clear` says that all keys are deleted before
the changes of this message are made. `more` says that another message of the same step follows. `resync` says that the
message has no changes, and that the mirror must be read again. A message without `resync` whose `from`
equals `to` is a heartbeat, which only says that the writer is running.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Raw

from lab_state._arguments import RESERVED
from lab_state._buffers import ByteBuffer
from lab_state._entries import Absent, Expiring, StoredOrGone, Value, size_of
from lab_state._not_json import NOT_JSON
from lab_state._slices import pieces
from lab_state._values import encode
from lab_state.cache._protocol import Seen, Slice
from lab_state.exceptions import UnavailableError, UnsupportedError

T = TypeVar("T")

FORMAT = 1
HEAD = RESERVED
"""The name of the field with format, revision, writer and fill. It is reserved: no key has this name."""

_MOST_KEYS = 50  # the largest number of keys in one slice
_MOST_BYTES = 32 * 1024  # a slice ends with the key that reaches this size
_LARGE = 64 * 1024  # a value of this size is encoded in pieces

MOST_MESSAGE_BYTES = 4 * 1024 * 1024
"""The largest size in bytes of the messages of a step, as estimated by `message_bytes`. A larger step ends with a resync."""

Revision: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
"""A revision in JSON. Every JSON reader can represent integers below 2**53 exactly. No state has a higher revision."""


class Keys:
    """The names of the two keys and of the channel of one mirror."""

    def __init__(self, prefix: str, name: str) -> None:
        self.values: bytes = f"{prefix}{{{name}}}".encode()
        self.expires: bytes = self.values + b":expires"
        self.channel: bytes = self.values + b":changes"

    def fill(self) -> tuple[bytes, bytes]:
        """Return new names for the two hashes of a fill. So a delayed command of an earlier fill cannot change them."""
        values = self.values + b":fill:" + os.urandom(8).hex().encode()
        return values, values + b":expires"


class Head(msgspec.Struct, frozen=True):
    """The contents of `$lab_state`. `fill` is the id of the fill that wrote the mirror."""

    format: int
    revision: Revision
    writer: str
    fill: str = ""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"start": "from", "end": "to"}):
    """A message on the channel: a step, or a part of a step. The docstring of the module explains its members."""

    start: Revision
    end: Revision
    writer: str
    set: dict[str, Raw] = {}
    delete: list[str] = []
    expires: dict[str, int] = {}
    clear: bool = False
    more: bool = False
    resync: bool = False


_decode_message = msgspec.json.Decoder(Message).decode
_decode_head = msgspec.json.Decoder(Head).decode


def _read(decode: Callable[[bytes], T], data: bytes) -> T | None:
    """Decode bytes that any client may have written. Return `None` if they are not from lab_state."""
    try:
        return decode(data)
    except NOT_JSON:
        return None


def parse_message(data: bytes) -> Message | None:
    """Return the contents of a message; `None` if it is not from lab_state."""
    return _read(_decode_message, data)


def new_fill() -> str:
    """Return a new id for a fill."""
    return os.urandom(4).hex()


def head(revision: int, writer: str, fill: str) -> bytes:
    """Return the contents of `$lab_state`."""
    return encode(Head(FORMAT, revision, writer, fill))


def parse_head(data: bytes) -> Head | None:
    """Return the contents of `$lab_state`; `None` if it is not from lab_state.

    Raises:
        UnsupportedError: A newer version of lab_state wrote the mirror.
    """
    found = _read(_decode_head, data)
    if found is not None and found.format > FORMAT:
        raise UnsupportedError(
            f"the mirror has format {found.format}, and this version of lab_state knows {FORMAT}: use the version that wrote it"
        )
    return found if found is not None and found.format == FORMAT else None


def seen_in(values: bytes | None, expires: bytes | None) -> tuple[Seen, str]:
    """Return the writer, the revision and the id of the fill, from the field `$lab_state` of the two hashes.

    If the two fields are not equal, or are not a head, return `Seen(None, 0)` and an empty id: there is no whole mirror.
    """
    found = None if values is None or values != expires else _read(_decode_head, values)
    if found is None:
        return Seen(None, 0), ""
    # A mirror of another format is treated as that of another writer, with the id "". No writer has this id.
    return Seen(found.writer if found.format == FORMAT else "", found.revision), found.fill


def parse_time(data: bytes) -> int:
    """Return the expiry time of a key, in milliseconds since 1970.

    Raises:
        UnavailableError: The bytes are not a number.
    """
    try:
        return int(data)
    except ValueError:
        raise UnavailableError(
            "an expiry time in the mirror is not from lab_state: another client has written there; a running manager "
            "fills the mirror again within seconds"
        ) from None


def message(start: int, end: int, writer: str, part: Slice, *, clear: bool = False, more: bool = False) -> bytes:
    """Return one message of a step."""
    values = {key: Raw(data) for key, data in part.values.items()}
    return encode(
        Message(
            start=start,
            end=end,
            writer=writer,
            set=values,
            delete=part.deleted,
            expires=part.expires,
            clear=clear,
            more=more,
        )
    )


def resync(start: int, end: int, writer: str) -> bytes:
    """Return the message of a fill, or of a step whose changes are not all sent.

    A reader that gets this message loads its local copy again.
    """
    return encode(Message(start=start, end=end, writer=writer, resync=True))


def message_bytes(part: Slice) -> int:
    """Estimate the size in bytes of a message with a slice. A character of a key counts as one byte."""
    return sum(map(len, part.values)) + sum(map(len, part.values.values())) + sum(map(len, part.deleted))


def slices(items: Iterable[tuple[str, StoredOrGone]], ahead: int) -> Iterator[Slice | None]:
    """Yield the slices of a fill or of a step: one or more. The last slice may be empty.

    While a large value is encoded, `None` is yielded after each piece, so that the event loop can
    run. `ahead` is the time of the wall clock minus the time of the state, in milliseconds. It is
    added to each expiry time, because readers use the wall clock.
    """
    values: dict[str, bytes] = {}
    expires: dict[str, int] = {}
    deleted: list[str] = []
    size = 0
    for key, stored in items:
        if isinstance(stored, Absent):
            deleted.append(key)
        else:
            if isinstance(stored, Expiring):
                expires[key] = stored.at + ahead
                stored = stored.value
            values[key] = data = _json(stored) if size_of(stored) < _LARGE else (yield from _large_json(stored))
            size += len(data)
        if size >= _MOST_BYTES or len(values) + len(deleted) >= _MOST_KEYS:
            yield Slice(values, expires, deleted)
            values, expires, deleted, size = {}, {}, [], 0
    yield Slice(values, expires, deleted)


def _json(stored: Value) -> bytes:
    if isinstance(stored, Raw):
        return bytes(stored)
    return stored if isinstance(stored, bytes) else encode(stored)


def _large_json(stored: Value) -> Generator[None, None, bytes]:
    if isinstance(stored, bytes):
        return stored
    together = ByteBuffer()
    for piece in pieces(stored):
        together.add(piece)
        yield
    return together.taken()
