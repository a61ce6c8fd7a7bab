"""The quick checks of `_values` and `_json_keys` refuse exactly the values that slow ones would refuse."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from datetime import UTC, datetime, time, timedelta, timezone
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_state import Config, InvalidValueError, Manager, MemoryStorage
from lab_state._entries import SCALARS
from lab_state._json_keys import check_str_keys
from lab_state._records import is_flat
from lab_state._values import (
    ALL_ONES,
    COLON,
    DEL,
    _refusal,
    _refusal_of_depth,
    encode_value,
    find_colon,
    find_del,
    find_ones,
)


class Color(StrEnum):
    RED = "red"


ZONES = st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
ZONED = (
    st.none()
    | st.just(UTC)
    | st.just(ZoneInfo("Europe/Berlin"))
    | st.sampled_from([-30, 1, 30, 3600, 3601]).map(lambda seconds: timezone(timedelta(seconds=seconds)))
)


@given(st.times(timezones=ZONED) | st.datetimes(timezones=ZONED | ZONES))
def test_each_time_shows_in_messagepack(at: datetime | time) -> None:
    """The patterns find each time of day and each datetime with a zone, whatever is around it."""
    if isinstance(at, time) or at.tzinfo is not None:
        for value in ({"at": at}, [at, 1], {"a": -1, "b": [at, "x"]}):
            packed = check_str_keys(value)
            assert (COLON in packed and find_colon(packed)) or (ALL_ONES in packed and find_ones(packed))


@given(st.floats() | st.binary(min_size=8, max_size=8).map(lambda bits: struct.unpack(">d", bits)[0]))
def test_each_nan_shows_in_messagepack(number: float) -> None:
    """The patterns find each NaN and infinity, of either sign and with each payload, and few other numbers."""
    packed = check_str_keys({"a": -1, "b": [number]})
    found = (DEL in packed and find_del(packed)) or (ALL_ONES in packed and find_ones(packed))
    assert found or math.isfinite(number)
    packed = check_str_keys([-1, 1.5, 127, 255, 1e308])
    assert find_del(packed) is find_ones(packed) is None


def _differs(value: Any) -> bool:
    """Return whether JSON holds a value as another one: the slow way, without any pattern."""
    if isinstance(value, dict):
        names = [json.loads(msgspec.json.encode({key: 0}), object_pairs_hook=list)[0][0] for key in value]
        return len(set(names)) < len(names) or any(map(_differs, value.values()))
    if isinstance(value, list):
        return any(map(_differs, value))
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, datetime | time) and value.tzinfo is not None:
        offset = value.utcoffset()
        return offset is None or bool(offset.total_seconds() % 60)
    return False


_LEAVES = (
    st.none()
    | st.integers(-300, 2**65)
    | st.floats()
    | st.sampled_from(
        ["12:00:00", "2026-01-02T03:04:05+01:00", "\x7f\xff", "\xcb\x7f\xf8", "null", ":", "é", "x" * 300]
    )
    | st.times(timezones=ZONED)
    | st.datetimes(timezones=ZONED)
)
_KEYS = st.sampled_from(["1", "2", "x", 1, 2, 3, 1.5, "1.5"])


@given(
    st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4)),
    st.sampled_from([0, 40, 400]),
)
async def test_each_way_to_check_a_value_gives_the_same_verdict(value: Any, more: int) -> None:
    """`set` of a small value, of a large one, and `encode_value` refuse what JSON would change, and nothing else."""
    async with Manager(Config(name="x", flush_interval=None), MemoryStorage()) as state:
        for whole in (value, [value, "x" * more], {f"k{n}": value for n in range(1 + more // 10)}):
            verdicts = []
            for write in (state.set, _encode):
                try:
                    await write("k", whole)
                except InvalidValueError:
                    verdicts.append(True)
                else:
                    verdicts.append(False)
            assert verdicts == [_differs(whole)] * 2


async def _encode(_: str, value: object) -> object:
    return encode_value(value)


_NAMES = st.sampled_from(["id", "a b", "", "é", "class", "f1", '"', "\\", "\n", 1, 2.5])
_SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3) | st.just(Color.RED)
)
_OTHERS = st.lists(st.none(), max_size=1) | st.just(msgspec.Raw(b"1")) | st.times(timezones=ZONED) | st.just(b"x")
_RECORDS = st.lists(st.dictionaries(_NAMES, _SCALARS | _OTHERS, max_size=3), min_size=1, max_size=3)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))


@given(records=_RECORDS, scalars=st.lists(_SCALARS | _OTHERS, min_size=1, max_size=3), more=st.sampled_from([1, 300]))
def test_what_is_found_to_be_flat_is_flat(records: list[Any], scalars: list[Any], more: int) -> None:
    """Only lists and dicts of scalars, or of records of scalars with `str` keys, need no other check."""
    names = list(records[0])
    named = {str(n): record for n, record in enumerate(records)}
    if is_flat(records * more, 10**6):
        assert all(type(name) is str for record in records for name in record)
        assert all(_is_scalar(part) for record in records for part in record.values())
        assert is_flat(named, 10**6)
    elif names and not set(names) & {'"', "\\", "\n", 1, 2.5} and all(set(record) <= set(names) for record in records):
        assert not all(_is_scalar(part) for record in records for part in record.values())
    same = all(map(_is_scalar, scalars))
    if type(scalars[0]) in SCALARS:
        assert is_flat(scalars * more, 10**6) is is_flat(dict(enumerate(scalars)), 10**6) is same
    assert not is_flat(tuple(scalars), 10**6)
    assert not is_flat({1.5: 1}, 10**6)


def test_a_class_is_made_when_it_pays() -> None:
    """The class for a kind of record is made when enough bytes of it were checked, and for ordinary keys alone."""
    record = {"made when it pays": 1}
    assert [is_flat([record], 32 * 1024) for _ in range(3)] == [False, True, True]
    assert not is_flat([{str(n): n for n in range(33)}], 10**6)
    assert not is_flat([{"x" * 1025: 1}], 10**6)
    assert not is_flat([record], 4095)


def test_classes_are_dropped_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of records that were seen once do not stay for good."""
    monkeypatch.setattr("lab_state._records._MOST_CLASSES", 3)
    monkeypatch.setattr("lab_state._records._classes", classes := dict[Any, Any]())
    for number in range(10):
        assert is_flat([{f"key {number}": 1}], 10**6)
        assert len(classes) <= 3


class Model(pydantic.BaseModel):
    """A model is packed as NaN."""

    x: int | None


class Box(msgspec.Struct):
    x: Any


@given(
    st.lists(st.sampled_from("[ld1tbs"), min_size=1, max_size=4),
    st.integers(127, 140),
    st.sampled_from([1, [1], {"a": {}}, msgspec.Raw(b"[[[[1]]]]")]),
)
def test_the_path_to_what_is_too_deep_is_that_of_the_general_search(shapes: list[str], levels: int, value: Any) -> None:
    """Levels with one part, which are passed quickly, lead to the same place as those that are looked at."""
    for level in range(levels):
        shape = shapes[level % len(shapes)]
        around = {"[": [value], "l": [1, value, "x"], "d": {"a": value, "b": 1}, "1": {"a b": value}, "t": (value,)}
        value = around.get(shape, Box(value) if shape == "b" else [[[]], value, [1]])
    with contextlib.suppress(InvalidValueError):
        encode_value(value)
        return
    assert str(_refusal_of_depth(value)) == str(_refusal(value))


@given(st.lists(st.sampled_from("lds"), max_size=5), st.sampled_from([30, 3601]), st.booleans())
def test_the_path_to_a_time_leads_to_it(shapes: list[str], seconds: int, as_key: bool) -> None:  # noqa: FBT001
    """Beside times that are kept, the path leads to the first one that is not, also where it is a key."""
    odd = datetime(2026, 1, 1, tzinfo=timezone(timedelta(seconds=seconds)))
    fine = datetime(2026, 1, 1, tzinfo=UTC)
    value: Any = {odd: 1} if as_key else odd
    path = f"[{odd!r}]" if as_key else ""
    for shape in shapes:
        value = {"l": [fine, value, odd], "d": {"x": value, "y": odd}, "s": Box(value)}[shape]
        path = {"l": "[1]", "d": ".x", "s": ".x"}[shape] + path
    with pytest.raises(InvalidValueError) as caught:
        encode_value(value)
    assert caught.value.path == "$" + path


@pytest.mark.parametrize("number", [math.nan, -math.nan, math.inf, -math.inf], ids=range(4))
@pytest.mark.parametrize("size", [10, 20_000])
def test_the_path_to_a_nan_leads_to_it(number: float, size: int) -> None:
    """In a small value and in a large one, with numbers whose bytes look like a NaN, and beside a model."""
    looks_like_nan = 0xCB7FF8CBFFF8
    value = [None, looks_like_nan, {"x": ["a" * size, {"y": number}, number]}, number]
    with pytest.raises(InvalidValueError) as caught:
        encode_value(value)
    assert caught.value.path in {"$[2].x[1].y", "$[3]"}
    with pytest.raises(InvalidValueError) as caught:
        encode_value([None, {"x": ["a" * size, {"y": number}]}])
    assert caught.value.path == "$[1].x[1].y"
    encode_value([None, looks_like_nan, "a" * size])
    with pytest.raises(InvalidValueError) as caught:
        encode_value([Model(x=None), "a" * size, number])
    assert caught.value.path == "$[2]"
    encode_value([Model(x=None), "a" * size])
