"""Makes any text one part of a key, and reads it back."""

from __future__ import annotations

from urllib.parse import unquote

from lab_state._arguments import RESERVED
from lab_state._escaping import CUT_KEY, LONGEST_ESCAPED, escape, escape_key

__all__ = ["LONGEST", "escape", "is_hash", "part", "unescape"]

LONGEST = LONGEST_ESCAPED
"""Characters of a part at most. A longer one is replaced by its hash."""


def part(text: str) -> str:
    """Return a text as a part of a key: `escape_key` of it.

    There is one exception: `$lab_state` stays as it is. It is reserved as a whole key only, and
    stores had this part before `escape_key` existed.
    """
    return text if text == RESERVED else escape_key(text)


def unescape(escaped: str) -> str:
    """Return the text that was escaped."""
    return "" if escaped == "%" else unquote(escaped, errors="surrogatepass")


def is_hash(part: str) -> bool:
    """Return whether a part was cut, so that its text cannot be read back from it."""
    return part.startswith(CUT_KEY)
