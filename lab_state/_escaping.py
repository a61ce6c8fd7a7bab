"""`escape_key` and `escape_name` turn any text into a key, or into the name of a state. This module does no I/O.

Both functions are injective: different texts never have the same result. The proof has four parts.

* Each character that is not allowed is encoded as UTF-8. Each of these bytes is written as the escape
  character and two hexadecimal digits. The escape character itself is replaced in the same way. So
  an escaped text can be decoded, and different texts have different escaped texts.
* Three results are made in another way: the key of an empty text, a name with a prefix, and a
  result that was cut. Each has an escape character without two hexadecimal digits after it. No
  escaped text has such an escape character.
* Two results that were cut differ in their SHA-256, because no two texts with the same SHA-256 are known.
* The text `$lab_state` is reserved as a key, and becomes `%24lab_state`. No other text becomes
  `%24lab_state`, because `$` is not replaced in other texts.
"""

from __future__ import annotations

import re

from lab_state._arguments import RESERVED

LONGEST_ESCAPED = 256
"""The largest length of an escaped key, in characters. A key may have 1,024, which is room for a prefix and three escaped keys."""

CUT_KEY = "%~"
"""The beginning of an escaped key that was cut."""

_NOT_IN_A_KEY = re.compile("[%/\0\ud800-\udfff]")
_EMPTY_KEY = "%"

_NOT_IN_A_NAME = re.compile("[^A-Za-z0-9.-]")
_LONGEST_NAME = 128
_CUT_NAME = "_."
_BEFORE_A_FIRST = "x_"


def escape_key(text: str) -> str:
    """Return a valid key for any text. Different texts never have the same key.

    The result has 1 to 256 characters. It has no slash, no NUL and no lone surrogate, and is not
    `$lab_state`. So `f"{escape_key(user)}/{escape_key(path)}"` is a valid key too, and different
    for each pair. A slash, a NUL, a lone surrogate and `%` are encoded as UTF-8. Each byte becomes `%`
    and two hexadecimal digits, as in a URL. All other characters stay as they are. An empty text
    becomes `%`. If the escaped text has more than 256 characters, the result is `%~` and the SHA-256
    of the escaped text, in hexadecimal digits. Then the text cannot be recovered from the key.

    Args:
        text: The text. It may have any length and any characters.

    Raises:
        TypeError: `text` is not a `str`.
    """
    escaped = escape(_checked("escape_key", text))
    if len(escaped) > LONGEST_ESCAPED:
        return CUT_KEY + _sha256(escaped)
    return f"%24{RESERVED[1:]}" if escaped == RESERVED else escaped


def escape_name(text: str) -> str:
    """Return a valid name of a state for any text. Different texts never have the same name.

    The result is a valid `Config.name`: 1 to 128 characters of `A-Z a-z 0-9 . _ -`. The first one is a
    letter or a digit. Letters and digits of ASCII, `.` and `-` stay as they are. Every other
    character, including `_`, is encoded as UTF-8. Each byte becomes `_` and two hexadecimal digits. If
    the first character is not a letter or a digit of ASCII, it is replaced as well, and `x_` is put
    before it. An empty text becomes `x_`. If the escaped text has more than 128 characters, the result
    is the first 62 of them, `_.` and the SHA-256 of the whole escaped text, in hexadecimal digits. Then
    the text cannot be recovered from the name.

    Upper and lower case differ, as in every name. On a file system that ignores case, do not use
    texts that differ only in case.

    Args:
        text: The text. It may have any length and any characters.

    Raises:
        TypeError: `text` is not a `str`.
    """
    text = _checked("escape_name", text)
    if text[:1].isascii() and text[:1].isalnum():
        escaped = _NOT_IN_A_NAME.sub(_in_a_name, text)
    else:
        escaped = _BEFORE_A_FIRST + "".join(map(_hex, text[:1])) + _NOT_IN_A_NAME.sub(_in_a_name, text[1:])
    if len(escaped) <= _LONGEST_NAME:
        return escaped
    end = _CUT_NAME + _sha256(escaped)
    return escaped[: _LONGEST_NAME - len(end)] + end


def escape(text: str) -> str:
    """Return the escaped form of a text. It may be longer than a key.

    It is never empty, and has no slash, NUL or lone surrogate.
    """
    return _NOT_IN_A_KEY.sub(_in_a_key, text) or _EMPTY_KEY


def _in_a_key(match: re.Match[str]) -> str:
    return _hex(match[0]).replace("_", "%")


def _in_a_name(match: re.Match[str]) -> str:
    return _hex(match[0])


def _hex(character: str) -> str:
    return "".join(f"_{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _sha256(escaped: str) -> str:
    import hashlib  # noqa: PLC0415 -- the import takes a millisecond, and is rarely needed

    return hashlib.sha256(escaped.encode()).hexdigest()


def _checked(call: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{call}() needs a str, not {type(text).__name__}")
    return str.__str__(text)
