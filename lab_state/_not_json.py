"""Invalid JSON, from another program or after damage: the exceptions of the decoder, and the messages about the fault."""

from __future__ import annotations

import codecs
import re
from typing import Final

import msgspec

NOT_JSON: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""The exceptions of the decoder: for invalid JSON, JSON of another type, bytes that are not UTF-8, and too many levels."""

_BYTE = re.compile(r" \(byte (\d+)\)")
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_ESCAPE_BYTES = 6
_HIGH, _LOW = range(0xD800, 0xDC00), range(0xDC00, 0xE000)


def not_an_object(data: bytes, error: Exception) -> tuple[int, str]:
    """Return the offset and a description of the fault in `data`, the bytes of a file that should contain a state.

    `error` is the exception that the decoder raised for these bytes.
    """
    if data.startswith(codecs.BOM_UTF8):
        return 0, "it begins with a byte order mark, which JSON must not have; save it without one"
    if not data.strip():
        return (
            0,
            "it has no JSON, but a state is always one JSON object; restore a copy, or delete it and the journal beside it to start with an empty state",
        )
    if data.lstrip()[:1] != b"{":
        return 0, "it is not a JSON object; a state is one object, with a member for each key; restore a copy"
    if (lone := _lone_surrogate(data)) is not None:
        return lone, "it has a lone surrogate, which UTF-8 cannot hold; write the whole character, or leave it out"
    # The text of a `msgspec.DecodeError` of this decoder contains no value. The text of another error may contain one.
    where = str(error) if isinstance(error, msgspec.DecodeError) else type(error).__name__
    byte = _BYTE.search(where)
    return int(byte[1]) if byte else 0, f"it is not valid JSON ({_BYTE.sub('', where)}); correct it, or restore a copy"


def _lone_surrogate(data: bytes) -> int | None:
    """Return the offset of an escaped surrogate without its other half; `None` if there is none."""
    high = None
    for escape in _ESCAPE.finditer(data):
        code = int(escape[1] or b"0", 16)
        if high is not None and not (code in _LOW and escape.start() == high + _ESCAPE_BYTES):
            return high
        if code in _LOW and high is None:
            return escape.start()
        high = escape.start() if code in _HIGH else None
    return high
