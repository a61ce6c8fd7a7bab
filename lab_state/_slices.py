r"""Large JSON in slices, which are encoded and decoded one by one. This module does no I/O.

A record or a call with many keys has tabs in each object and array of keys, even in an empty one: one tab before
each slice, and one before the closing bracket::

    {"from":41,"to":42,"clear":false,"set":{\t"a":1,"b":2\t,"c":3\t},"delete":[\t],...}

A tab between two members has no meaning in JSON. So a decoder finds the same contents with the tabs as without them.
`unsliced` uses the tabs: it decodes one slice after another. The text need not come from lab_state. If each slice is JSON
when it is put in brackets, and the text without the slices is JSON, then the whole text is JSON with these contents. If there
is a tab inside a value, the text before this tab is not JSON. Then `unsliced` tries a longer text, up to a later tab. If no
text fits, `unsliced` returns `None`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, NamedTuple, TypeAlias, cast

import msgspec
from msgspec import Raw

from lab_state._entries import Absent, Expiring, Json, StoredOrGone, Value, size_of
from lab_state._not_json import NOT_JSON

TAB = b"\t"
"""The mark before a slice, and before the closing bracket."""

SLICE_BYTES = 64 * 1024
"""The approximate size of a slice in bytes: a slice ends when it has reached this size.

A slice with one large value, or with long keys, may be several times as large.
"""

MOST_AT_ONCE = 500
"""The largest number of keys that one call of the encoder encodes in `names` and `times`. A record of more changes has tabs."""

_KEY_BYTES = 128  # added to the size of each value, because a key takes time even if its value is small
_LONGEST_HEAD = 64 * 1024  # in bytes: a text without a tab in its first `_LONGEST_HEAD` bytes was not written in slices

Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""A revision or a time in stored JSON. The decoder refuses numbers that a signed integer of 64 bits cannot hold."""

encode = msgspec.json.Encoder().encode

_find_tab = re.compile(TAB).search
_values: msgspec.json.Decoder[dict[str, Raw]] = msgspec.json.Decoder(dict[str, Raw])
_times: msgspec.json.Decoder[dict[str, Int64]] = msgspec.json.Decoder(dict[str, Int64])
_names: msgspec.json.Decoder[list[str]] = msgspec.json.Decoder(list[str])


# Encoding


def parts_of(
    items: Iterable[tuple[str, StoredOrGone]], expires: dict[str, int], deleted: list[str]
) -> Iterator[dict[str, Value]]:
    """Split entries and deletions into parts for `members`. A part may be empty.

    `encode` encodes a part in one step of the event loop. A value of `SLICE_BYTES` or more is alone in its part, and
    `pieces` encodes it. The function adds the expiry times to `expires`, and the deleted keys to `deleted`.
    """
    part: dict[str, Value] = {}
    size = 0
    for key, stored in items:
        before = size
        if isinstance(stored, bytes):  # true for most values, so it is checked first
            part[key] = Raw(stored)
            size += len(stored)
        elif isinstance(stored, Absent):
            deleted.append(key)
        else:
            if isinstance(stored, Expiring):
                expires[key], stored = stored.at, stored.value
            part[key] = Raw(stored) if isinstance(stored, bytes) else stored
            size += size_of(stored)
        if size - before >= SLICE_BYTES:
            large = part.pop(key)
            yield part
            yield {key: large}
            part, size = {}, 0
        size += _KEY_BYTES
        if size >= SLICE_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part


def members(parts: Iterable[dict[str, Value]], mark: bytes = b"") -> Iterator[bytes]:
    """Yield the JSON of the members of an object, without the braces, in pieces.

    An empty piece only lets the event loop run. `mark` is `TAB` or nothing. It is put before each part that is not
    empty, and not before each piece of a large value.
    """
    comma = mark
    for part in parts:
        if len(part) == 1 and size_of(next(iter(part.values()))) >= SLICE_BYTES:
            ((key, large),) = part.items()
            yield comma + encode(key) + b":"
            yield from pieces(large)
        else:
            text = encode(part)[1:-1]
            yield comma + text if text else b""
        comma = mark + b"," if part else comma


def names(keys: Iterable[str], mark: bytes = b"") -> Iterator[bytes]:
    """Yield the JSON of an array of keys, without the brackets. See `members`."""
    rest = iter(keys)
    comma = mark
    while part := list(islice(rest, MOST_AT_ONCE)):
        yield comma + encode(part)[1:-1]
        comma = mark + b","


def times(expires: Mapping[str, int], mark: bytes = b"") -> Iterator[bytes]:
    """Yield the JSON of the members of an object with the expiry times of keys, without the braces. See `members`."""
    rest = iter(expires.items())
    comma = mark
    while part := dict(islice(rest, MOST_AT_ONCE)):
        yield comma + encode(part)[1:-1]
        comma = mark + b","


def pieces(large: Value) -> Iterator[bytes]:
    """Yield the JSON of a large value in pieces. The value is stored as a `str`, or as JSON."""
    if isinstance(large, str):
        yield b'"'
        for start in range(0, len(large), SLICE_BYTES):
            yield encode(large[start : start + SLICE_BYTES])[1:-1]
        yield b'"'
    else:
        # The value is never a number, because the JSON of a number is short.
        view = memoryview(cast("Json | Raw", large))
        for start in range(0, len(view), SLICE_BYTES):
            yield bytes(view[start : start + SLICE_BYTES])


# Decoding


class Unsliced(NamedTuple):
    """A text that was decoded in slices.

    Attributes:
        frame: The text without the slices, in parts. Each part but the last ends with the opening bracket of an object or
            array that has slices. If the parts are joined, there is an empty object or array in place of each of these.
        contents: The contents of these objects and arrays, in order. The values of an object are numbers if its name is
            `expires`, and JSON otherwise.
    """

    frame: list[bytes]
    contents: list[Any]


def unsliced(data: bytes | memoryview) -> Generator[None, None, Unsliced | None]:
    """Decode the slices of a text, and yield after each slice. Return `None` if it has no slices, or they cannot be decoded.

    The frame is not decoded here. The text is JSON with these contents only if the frame is JSON.
    """
    frame: list[bytes] = []
    contents: list[Any] = []
    start = 0
    tab = _find_tab(data, 0, _LONGEST_HEAD)
    content: tuple[Any, int] | None
    while tab is not None:
        head = bytes(data[start : tab.start()])
        frame.append(head)
        start = tab.end()
        if head[-1:] == b"{":
            content = yield from _object(data, start, _times if head.endswith(b'"expires":{') else _values)
        elif head[-1:] == b"[":
            content = yield from _array(data, start)
        else:
            return None
        if content is None:
            return None
        found, start = content
        contents.append(found)
        tab = _find_tab(data, start)
    frame.append(bytes(data[start:]))
    return Unsliced(frame, contents) if contents else None


def _object(
    data: bytes | memoryview, start: int, decoder: msgspec.json.Decoder[Any]
) -> Generator[None, None, tuple[dict[str, Any], int] | None]:
    """Decode the slices of an object. Return its content, and the offset of its closing brace; `None` if a slice is not JSON."""
    content: dict[str, Any] = {}
    while data[start : start + 1] != b"}":
        found = _slice(data, start, lambda text: decoder.decode(b"{%b}" % text), is_first=not content)
        if found is None:
            return None
        content.update(found[0])
        start = found[1]
        yield
    return content, start


def _array(data: bytes | memoryview, start: int) -> Generator[None, None, tuple[list[str], int] | None]:
    """Decode the slices of an array of keys, as `_object` does."""
    content: list[str] = []
    while data[start : start + 1] != b"]":
        found = _slice(data, start, lambda text: _names.decode(b"[%b]" % text), is_first=not content)
        if found is None:
            return None
        content += found[0]
        start = found[1]
        yield
    return content, start


def _slice(
    data: bytes | memoryview, start: int, decode: Callable[[bytes], Any], *, is_first: bool
) -> tuple[Any, int] | None:
    """Decode the slice at an offset. Return its content, and the offset after the tab that ends it; `None` if this is not possible."""
    end = start
    while (tab := _find_tab(data, end)) is not None:
        text = bytes(data[start : tab.start()])
        if not is_first:
            if text[:1] != b",":
                return None
            text = text[1:]
        try:
            str(text, "utf-8")  # msgspec does not check a value that stays JSON
            content = decode(text)
        except NOT_JSON:
            # Try at least twice as many bytes. So all attempts together take at most about twice as long as the last attempt.
            end = 2 * tab.end() - start
        else:
            return (content, tab.end()) if content else None
    return None
