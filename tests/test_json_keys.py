"""`_json_keys`: two keys of one dict that are one key in JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from datetime import date
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from itertools import count
from typing import Any, ClassVar
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from key_value.aio.errors import SerializationError

from lab_state import Config, InvalidValueError, Manager, MemoryStorage
from lab_state._json_keys import double_key
from lab_state._types import decode_value
from lab_state._values import encode_value
from lab_state.integrations.key_value import LabStateStore


class Color(Enum):
    RED = "red"


class Letter(StrEnum):
    A = "a"
    B = "b"


class Number(IntEnum):
    ONE = 1


class Holder(msgspec.Struct):
    x: Any


@dataclasses.dataclass
class Data:
    x: Any


class Model(pydantic.BaseModel):
    x: dict[Any, Any]


class Numbers(pydantic.BaseModel):
    x: dict[int, float]


TWICE: list[tuple[dict[Any, Any], str]] = [
    ({7: "of today", "7": "of yesterday"}, "7"),
    ({"7": "of yesterday", 7: "of today"}, "7"),
    ({1.5: 1, "1.5": 2}, "1.5"),
    ({Number.ONE: 1, "1": 2}, "1"),
    ({Color.RED: 1, "red": 2}, "red"),
    ({UUID(int=7): 1, str(UUID(int=7)): 2}, str(UUID(int=7))),
    ({date(2026, 1, 2): 1, "2026-01-02": 2}, "2026-01-02"),
    ({Decimal("0.10"): 1, "0.10": 2}, "0.10"),
    ({float("nan"): 1, float("nan"): 2}, "nan"),
    ({7: 1, "7": 2, "a number that decoding makes longer": msgspec.Raw(b"1e6")}, "7"),
    ({n: n for n in range(100)} | {"7": 1}, "7"),
    ({str(n): n for n in range(100)} | {7: 1}, "7"),
]


@pytest.mark.parametrize(("value", "name"), TWICE, ids=count())
@pytest.mark.parametrize(
    ("around", "path"),
    [
        (lambda x: x, "$"),
        (lambda x: [{"a": 1}, x], "$[1]"),
        (lambda x: {"a": 1, "b": [{"c d": x}]}, "$.b[0]['c d']"),
        (lambda x: {"text": "{", "n": 10**30, "b": x}, "$.b"),
        (lambda x: ({1}, x), "$[1]"),
        (lambda x: Holder([x]), "$.x[0]"),
        (lambda x: [Data(x)], "$[0].x"),
        (lambda x: {"m": [Holder(1), Data({"k": x})]}, "$.m[1].x.k"),
    ],
    ids=count(),
)
def test_two_keys_that_are_one_in_json_are_refused(
    value: dict[Any, Any], name: str, around: Callable[[object], object], path: str
) -> None:
    """A dict with two keys that have the same text in JSON is refused at any depth, with the path of the dict."""
    with pytest.raises(InvalidValueError) as caught:
        encode_value(around(value))
    assert caught.value.path == path
    assert f"two keys that are both {name!r} in JSON" in str(caught.value)


@pytest.mark.parametrize("around", [lambda x: x, lambda x: [x, {1: 2}], Holder], ids=count())
def test_two_keys_in_a_pydantic_model_are_refused(around: Callable[[object], object]) -> None:
    """A field of a Pydantic model is looked at, too."""
    with pytest.raises(InvalidValueError, match="two keys that are both '7'"):
        encode_value(around(Model(x={7: 1, "7": 2})))
    assert decode_value(encode_value(Numbers(x={7: 1, 8: 1e16})), Numbers).x == {7: 1, 8: 1e16}


@pytest.mark.parametrize(
    "value",
    [
        {1: 2, 2: 3},
        {Color.RED: 1, "blue": 2},
        {"a": [{1: "{"}, {"1": 2}]},
        {1: 10**30, "a": 2**64},
        {1: msgspec.Raw(b'{"a" : 1}')},
        {"a": {"a": {"a": 1}}},
        {n: n for n in range(100)},
        {str(n): n for n in range(100)} | {Color.RED: 2},
        {str(n): n for n in range(100)} | {Letter.A: 1, Letter.B: 2},
        [{"a": 1}, {"a": 1}],
    ],
    ids=count(),
)
def test_other_keys_are_kept(value: object) -> None:
    """Keys that are not `str` are kept where each has a text of its own; the same key in two dicts is none twice."""
    stored = encode_value(value)
    assert decode_value(stored, Any) == msgspec.json.decode(msgspec.json.encode(value))


KEYS = st.integers(0, 3) | st.sampled_from(["0", "1", "2", "3", "a", Number.ONE])


@given(st.recursive(st.none() | st.integers(), lambda inner: st.dictionaries(KEYS, inner) | st.lists(inner)))
def test_no_member_is_lost(value: object) -> None:
    """What is accepted is read back with as many members as were set, in every dict."""

    def members(item: object) -> int:
        if isinstance(item, dict):
            return len(item) + sum(map(members, item.values()))
        return sum(map(members, item)) if isinstance(item, list) else 0

    try:
        stored = encode_value(value)
    except InvalidValueError:
        assert double_key(msgspec.json.encode(value)) is not None
    else:
        assert members(decode_value(stored, Any)) == members(value)


class Decoded:
    """A decoder, with how many bytes it was given."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, data: bytes) -> object:
        self.total += len(data)
        return msgspec.json.decode(data)


LARGE: list[Any] = [
    {**dict.fromkeys(range(5_000), 1), "x": 1},
    {number + 0.5: [number] for number in range(5_000)},
    [{number: 1, number + 1: 2} for number in range(5_000)],
    {"a": [{"b": {number + 0.5: 1}} for number in range(5_000)]},
]


@pytest.mark.parametrize("value", LARGE, ids=count())
def test_a_large_value_with_other_keys_is_decoded_once(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large value with keys that are numbers is decoded once to find that no key is there twice."""
    decoded = Decoded()
    monkeypatch.setattr("lab_state._json_keys._decode", decoded)
    data = encode_value(value)
    assert isinstance(data, bytes)
    assert decoded.total == len(data)


class Spaced:
    """An object with a serializer of its own, and a field that it never writes."""

    model_fields: ClassVar[dict[str, None]] = {"hidden": None}

    def __init__(self) -> None:
        self.hidden = object()

    def model_dump_json(self, **_: object) -> str:
        return '{"a" : 1}'


def test_a_field_that_is_never_written_is_no_fault() -> None:
    """Beside keys that are numbers, an object may write JSON in its own way, and leave out what cannot be encoded."""
    value: list[Any] = [{7: 1}, Spaced()] * 2_000
    assert decode_value(encode_value(value), Any) == [{"7": 1}, {"a": 1}] * 2_000
    value.append({7: 1, "7": 2})
    with pytest.raises(InvalidValueError, match="both '7'") as refused:
        encode_value(value)
    assert refused.value.path == "$[4000]"


@pytest.mark.parametrize("place", [0, 2_500, 4_999])
def test_a_double_key_in_a_large_value_is_found_by_halving(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find the dict with a key that is there twice, no more than three times the value is decoded."""
    value: list[dict[object, int]] = [{number: 1, number + 1: 2} for number in range(5_000)]
    size = len(msgspec.json.encode(value))
    value[place] = {7: 1, "7": 2}
    decoded = Decoded()
    monkeypatch.setattr("lab_state._json_keys._decode", decoded)
    with pytest.raises(InvalidValueError, match="both '7'") as refused:
        encode_value(value)
    assert refused.value.path == f"$[{place}]"
    assert decoded.total < 3 * size


@pytest.mark.parametrize("data", [b"[1e999]", b'{"a":1}', b"1" * 5000, b"[" * 5000 + b"]" * 5000], ids=count())
def test_json_that_cannot_be_read_has_no_double_key(data: bytes) -> None:
    """What is refused for another reason is not refused for its keys."""
    assert double_key(data) is None


Write = Callable[[Manager, Any], Awaitable[object]]


async def in_transaction(state: Manager, value: object) -> None:
    async with state.transaction() as tx:
        tx.set("users", value)


async def in_transaction_with_ttl(state: Manager, value: object) -> None:
    async with state.transaction() as tx:
        tx.set("users", value, ttl=60)


WRITES: dict[str, Write] = {
    "set": lambda state, value: state.set("users", value),
    "set with a ttl": lambda state, value: state.set("users", value, ttl=60),
    "set_many": lambda state, value: state.set_many({"users": value}),
    "set_if_absent": lambda state, value: state.set_if_absent("users", value),
    "get_or_set": lambda state, value: state.get_or_set("users", lambda: value),
    "update": lambda state, value: state.update("users", lambda _: value, 1),
    "entry.set": lambda state, value: state.entry("users", Any).set(value),
    "namespace.set": lambda state, value: state.namespace("a").set("users", value),
    "transaction": in_transaction,
    "transaction with a ttl": in_transaction_with_ttl,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("value", [{7: 1, "7": 2}, [{"a": 1}, {7: 1, "7": 2}]], ids=["dict", "list"])
async def test_every_write_refuses_them(write: Write, value: object) -> None:
    """Each call that writes raises `InvalidValueError`, and nothing is changed."""
    async with Manager(Config(name="x", flush_interval=None), MemoryStorage()) as state:
        with pytest.raises(InvalidValueError, match="two keys that are both '7'"):
            await write(state, value)
        assert (state.revision, len(state)) == (0, 0)


async def test_the_key_value_adapter_refuses_them() -> None:
    """The store for py-key-value raises its own error, as the other stores do."""
    async with Manager("x", MemoryStorage()) as state:
        with pytest.raises(SerializationError, match="two keys that are both '7'"):
            await LabStateStore(state.namespace("mcp")).put("users", {"a": {7: 1, "7": 2}})
        assert len(state) == 0
