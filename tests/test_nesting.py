"""`_nesting`: how deep JSON is nested, however it is written."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_state._nesting import deeper, too_deep

TEXTS = st.text('[]{}"\\,: xé\n', max_size=6)
TREES = st.recursive(
    TEXTS | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def nested(levels: int, inner: Any, text: str) -> Any:
    for level in range(levels):
        inner = [text, inner] if level % 2 else {text: inner, text + "x": text}
    return inner


@given(tree=TREES, separators=st.sampled_from([(",", ":"), (" , ", " : ")]))
def test_the_depth_is_that_of_the_tree(tree: Any, separators: tuple[str, str]) -> None:
    """Whatever is in its strings, JSON is deeper than each number below its depth, and than no other."""
    data = json.dumps(tree, separators=separators, ensure_ascii=False).encode()
    depth = depth_of(tree)
    assert [deeper(data, levels) for levels in range(depth + 3)] == [levels < depth for levels in range(depth + 3)]


@given(
    unit=TREES,
    text=TEXTS,
    count=st.integers(1, 60),
    inside=st.integers(0, 12),
    levels=st.integers(120, 136),
    at=st.sampled_from(["first", "last", "middle"]),
)
def test_the_limit_is_exact(unit: Any, text: str, count: int, inside: int, levels: int, at: str) -> None:  # noqa: PLR0917
    """Among parts that are alike, and with brackets in strings around each level, one part decides by its depth."""
    deep = nested(levels, nested(inside, None, "]"), text)
    same = [unit] * count
    tree = {"first": [deep, *same], "last": [*same, deep], "middle": [*same, deep, *same]}[at]
    assert too_deep(json.dumps(tree, separators=(",", ":")).encode()) is (depth_of(tree) > 128)


@pytest.mark.parametrize("closer", ["]", "}", '\\"]', "[]", "]["])
def test_brackets_in_strings_hide_no_level(closer: str) -> None:
    """A string behind each opening bracket does not make the level less deep, nor a string before its end deeper."""
    inner: Any = 1
    for _ in range(129):
        inner = [closer, inner, "["]
    assert too_deep(json.dumps(inner).encode())
    assert not too_deep(json.dumps([inner[1][1], "[" * 1_000]).encode())


def test_steps_are_counted() -> None:
    """The reference of these tests counts as the text does."""
    value = [[1], {"a": [[]]}]
    steps = [{"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in json.dumps(value)]
    assert depth_of(value) == max(accumulate(steps)) == 4
