"""Turn any text into a part of a key, and such a part back into the text."""

from __future__ import annotations

from urllib.parse import unquote

from lab_state._arguments import RESERVED
from lab_state._escaping import CUT_KEY, LONGEST_ESCAPED, escape, escape_key

__all__ = ["LONGEST", "escape", "is_hash", "part", "unescape"]

LONGEST = LONGEST_ESCAPED
"""The largest number of characters in a part. If the escaped text is longer, the part is `%~` and the hash of the escaped text."""


def part(text: str) -> str:
    """Return a text as a part of a key: the result of `escape_key`, with one exception.

    The text `$lab_state` is not changed. It is reserved only as a whole key, not as a part. Existing
    states may have keys with this part.
    """
    return text if text == RESERVED else escape_key(text)


def unescape(escaped: str) -> str:
    """Return the text from which `part` made this part. `is_hash` must be False for the part."""
    return "" if escaped == "%" else unquote(escaped, errors="surrogatepass")


def is_hash(part: str) -> bool:
    """Return whether a part contains only the hash of an escaped text. Then the text cannot be recovered from it."""
    return part.startswith(CUT_KEY)
