"""Any string as one part of a key: without slashes, within bounds, and back."""

from __future__ import annotations

from urllib.parse import unquote

from lab_state._arguments import RESERVED
from lab_state._escaping import CUT_KEY, LONGEST_ESCAPED, escape, escape_key

__all__ = ["LONGEST", "escape", "is_hash", "part", "unescape"]

LONGEST = LONGEST_ESCAPED
"""Characters of a part, at most; a longer one is kept as its hash."""


def part(text: str) -> str:
    """Return a text as a part of a key: `escape_key` of it.

    One text has another part, which it had before there was `escape_key`: `$lab_state`, which is
    reserved as a whole key and not as a part of one.
    """
    return text if text == RESERVED else escape_key(text)


def unescape(escaped: str) -> str:
    """Return the text that was escaped."""
    return "" if escaped == "%" else unquote(escaped, errors="surrogatepass")


def is_hash(part: str) -> bool:
    """Return whether a part was cut, so that its text cannot be read back from it."""
    return part.startswith(CUT_KEY)
