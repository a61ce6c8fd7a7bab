"""Any text as one part of a key."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote

from hypothesis import example, given
from hypothesis import strategies as st

from lab_state._arguments import check_key
from lab_state.integrations._escaping import LONGEST, escape, is_hash, part, unescape

texts = st.text(st.characters(exclude_categories=()), max_size=300)


@given(texts)
@example("")
@example("%")
@example("%~")
@example("%2F/")
@example("\0\ud83d\ude00\udc00")
@example("/" * 1000)
@example("$lab_state")
def test_a_text_survives(text: str) -> None:
    """An escaped text can be read back. A part has no slash, and is short enough to follow a namespace."""
    assert unescape(escape(text)) == text
    found = part(text)
    check_key(f"namespace/{found}")
    assert "/" not in found
    assert len(found) <= LONGEST
    assert is_hash(found) == (len(escape(text)) > LONGEST)


@given(texts, texts)
@example("", "%")
@example("/", "%2F")
@example("a" * 257, "a" * 258)
def test_different_texts_are_different_parts(one: str, other: str) -> None:
    """No two texts share a part."""
    assert (part(one) == part(other)) == (one == other)


def test_what_is_readable_stays_readable() -> None:
    """Only characters that a part cannot have are escaped."""
    assert part("GET https://example.com/a b?ü=1%") == "GET https:%2F%2Fexample.com%2Fa b?ü=1%25"


def before_escape_key(text: str) -> str:
    """Return the name of a part in version 0.1.0."""
    escaped = re.sub(
        "[%/\0\ud800-\udfff]", lambda match: quote(match[0].encode("utf-8", "surrogatepass"), safe=""), text
    )
    return (escaped or "%") if len(escaped) <= LONGEST else "%~" + hashlib.sha256(escaped.encode()).hexdigest()


@given(texts)
@example("")
@example("$lab_state")
@example("%24lab_state")
@example("/\0\ud83d\udc00%")
@example("a" * 256)
@example("a" * 257)
@example("/" * 86)
def test_existing_data_keeps_its_names(text: str) -> None:
    """A part is the same as in version 0.1.0, which wrote what is stored now."""
    assert part(text) == before_escape_key(text)
