"""Any string as one part of a key: without slashes, within bounds, and back."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote, unquote

LONGEST = 256
"""Characters of a part, at most; a longer one is kept as its hash."""

_ESCAPED = re.compile("[%/\0\ud800-\udfff]")
_EMPTY = "%"
_HASH = "%~"
# Neither can come from `quote`, which puts two hexadecimal digits after each `%`.


def escape(text: str) -> str:
    """The text without slashes, NUL and lone surrogates, readable otherwise; never empty."""
    return _ESCAPED.sub(lambda match: quote(match[0].encode("utf-8", "surrogatepass"), safe=""), text) or _EMPTY


def unescape(escaped: str) -> str:
    """What was escaped."""
    return "" if escaped == _EMPTY else unquote(escaped, errors="surrogatepass")


def part(text: str) -> str:
    """A part of a key: 1 to `LONGEST` characters, no slash, and different for different texts."""
    escaped = escape(text)
    if len(escaped) <= LONGEST:
        return escaped
    return _HASH + hashlib.sha256(escaped.encode()).hexdigest()


def is_hash(part: str) -> bool:
    """Whether a part does not tell its text."""
    return part.startswith(_HASH)
