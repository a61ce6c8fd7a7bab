"""`escape_key` and `escape_name`: any text as a key, or as the name of a state."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from lab_state import Config, Manager, MemoryStorage, escape_key, escape_name
from lab_state._arguments import check_key

SHA = "[0-9a-f]{64}"

escapes = st.sampled_from(["%", "%~", "%2F", "%24lab_state", "$lab_state", "x_", "x__2E", "_", "_.", "_5F", "0" * 64])
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=300),
    # What looks like the result of an escaping, or of a cut, and is near the bounds.
    st.lists(escapes, max_size=8).map("".join),
    st.tuples(st.sampled_from(["a", "_", "é", "%", "/"]), st.integers(1, 400), escapes).map(
        lambda t: t[0] * t[1] + t[2]
    ),
)
escaped_again = st.recursive(
    texts, lambda inner: st.one_of(inner.map(escape_key), inner.map(escape_name)), max_leaves=3
)


@given(escaped_again)
@example("")
@example("$lab_state")
@example("/" * 1000)
@example("\0\ud83d\ude00\udc00")
def test_any_text_becomes_a_key(text: str) -> None:
    """A key of 1 to 256 characters, whole and as one part of several."""
    key = escape_key(text)
    assert check_key(key) == key
    assert "/" not in key
    assert len(key) <= 256
    assert (len(key) == 66 and bool(re.fullmatch(f"%~{SHA}", key))) == key.startswith("%~")


@given(escaped_again)
@example("")
@example(".hidden")
@example("_" * 42)
@example("_" * 43)
@example("a" * 129)
@example("\ud83d\ude00")
def test_any_text_becomes_a_name(text: str) -> None:
    """What `Config` takes as the name of a state."""
    name = escape_name(text)
    assert Config(name=name).name == name
    assert ("_." in name) == bool(len(name) == 128 and re.search(rf"_\.{SHA}\Z", name))


@pytest.mark.parametrize("escape", [escape_key, escape_name])
@given(escaped_again, escaped_again)
@example("", "%")
@example("", "x_")
@example("/", "%2F")
@example("$lab_state", "%24lab_state")
@example(".", "x__2E")
@example("_", "_5F")
@example("a" * 257, "a" * 258)
@example("\U0001f600", "\ud83d\ude00")
@example("A", "a")
def test_two_texts_never_have_one_result(escape: Callable[[str], str], one: str, other: str) -> None:
    """Nor does a text have the result of its own result, as it would if that looked like an escaped text."""
    assert (escape(one) == escape(other)) == (one == other)
    assert (escape(one) == escape(escape(one))) == (escape(one) == one)


@pytest.mark.parametrize("escape", [escape_key, escape_name])
@given(st.data())
def test_the_result_of_a_cut_text_is_that_of_no_other(escape: Callable[[str], str], data: st.DataObject) -> None:
    """A text that is written like a cut result is escaped or cut itself."""
    long = data.draw(st.text(min_size=257, max_size=400))
    cut = escape(long)
    assert cut != long
    assert escape(cut) != cut


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [
        ("", "%", "x_"),
        ("ann", "ann", "ann"),
        ("a.b-c", "a.b-c", "a.b-c"),
        ("my_state", "my_state", "my_5Fstate"),
        ("ann@example.com", "ann@example.com", "ann_40example.com"),
        ("a/b 100%", "a%2Fb 100%25", "a_2Fb_20100_25"),
        ("é", "é", "x__C3_A9"),
        (".hidden", ".hidden", "x__2Ehidden"),
        ("$lab_state", "%24lab_state", "x__24lab_5Fstate"),
        ("\0", "%00", "x__00"),
        ("\ud800", "%ED%A0%80", "x__ED_A0_80"),
        (
            "a" * 257,
            "%~e8d95cc2b4bc198c54b40bd214df958afb65f5e73d2c2eafe0593cf5c635c1f0",
            "a" * 62 + "_.e8d95cc2b4bc198c54b40bd214df958afb65f5e73d2c2eafe0593cf5c635c1f0",
        ),
    ],
)
def test_what_the_results_are(text: str, key: str, name: str) -> None:
    """They are kept in files, so they never change."""
    assert (escape_key(text), escape_name(text)) == (key, name)


@pytest.mark.parametrize("escape", [escape_key, escape_name])
@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a"]])
def test_what_is_no_text_is_a_type_error(escape: Callable[[str], str], text: Any) -> None:
    """The message names the call and the type."""
    with pytest.raises(TypeError, match=rf"{escape.__name__}\(\) needs a str, not {type(text).__name__}"):
        escape(text)


@pytest.mark.parametrize("escape", [escape_key, escape_name])
def test_a_subclass_of_str_is_plain_text(escape: Callable[[str], str]) -> None:
    """A class that changes text which is joined to it, such as `Markup`, changes nothing here."""
    assert escape(Markup("<b>")) == escape("<b>")
    assert type(escape(Markup("ann"))) is str


async def test_they_are_used_as_they_are() -> None:
    """A state whose name was a text, with two texts in one key."""
    async with Manager(escape_name("tenant: ann@example.com"), MemoryStorage()) as state:
        await state.set(f"{escape_key('a/b')}/{escape_key('')}", 1)
        assert await state.get("a%2Fb/%") == 1
