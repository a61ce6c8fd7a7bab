"""The quick checks of `_values` and `_json_keys` refuse exactly the values that slow ones would refuse."""

from __future__ import annotations

import json
import math
import struct
from datetime import UTC, datetime, time, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from lab_state import Config, InvalidValueError, Manager, MemoryStorage
from lab_state._json_keys import check_str_keys
from lab_state._values import ALL_ONES, COLON, DEL, encode_value, find_colon, find_del, find_ones

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
    """The patterns find each NaN and infinity, of either sign and with each payload, and no other number."""
    packed = check_str_keys({"a": -1, "b": [number]})
    found = (DEL in packed and find_del(packed)) or (ALL_ONES in packed and find_ones(packed))
    assert bool(found) is not math.isfinite(number)


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
