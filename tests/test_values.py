"""`_values`: one value to JSON and back, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import sys
import traceback
import tracemalloc
from collections.abc import Callable, Hashable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from itertools import count
from typing import Annotated, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from lab_state import _values
from lab_state._nesting import MAX_DEPTH, too_deep
from lab_state._types import decode_value
from lab_state._values import encode_value
from lab_state.exceptions import InvalidValueError, TypeMismatchError

NAN = math.nan
INF = math.inf
SECRET = "hunter2"


class AStruct(msgspec.Struct):
    x: Any


class RenamedStruct(msgspec.Struct, rename="camel"):
    some_field: Any


@dataclasses.dataclass
class ADataclass:
    x: Any


@attrs.define
class AnAttrs:
    x: Any


@attrs.define(slots=False)
class OpenAttrs:
    x: Any


class APydantic(pydantic.BaseModel):
    x: Any


class ATuple(NamedTuple):
    x: Any
    y: Any


class ADict(TypedDict):
    x: int


class FloatEnum(float, Enum):
    NOT_A_NUMBER = math.nan


class NanEnum(Enum):
    NOT_A_NUMBER = math.nan


class PlainEnum(Enum):
    A = "a"


class NumberEnum(IntEnum):
    ONE = 1


class StrSubclass(str):
    __slots__ = ()


class IntSubclass(int):
    pass


class FloatSubclass(float):
    __slots__ = ()


class Unknown:
    """Nothing that msgspec knows."""


def refused(value: object) -> InvalidValueError:
    with pytest.raises(InvalidValueError) as caught:
        encode_value(value)
    return caught.value


def mismatch(value: object, type_: Any) -> TypeMismatchError:
    with pytest.raises(TypeMismatchError) as caught:
        decode_value(encode_value(value), type_)
    return caught.value


def shown(error: BaseException) -> str:
    """Return everything that a log would show of an error."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))


def nested(levels: int, kind: str) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if kind == "lists" or (kind == "mixed" and level % 2) else {"a": value}
    return value


# What is kept, and how


@pytest.mark.parametrize(
    "value",
    [
        *("", "a", "é", "😀", "\0", '"\\\n', "\u2028"),
        *(0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**4299),
        *(0.0, -0.0, 0.1, 1e308, 5e-324, -1.5),
        *(True, False, None),
    ],
    ids=count(),
)
def test_a_scalar_is_kept_as_it_is(value: Any) -> None:
    """A JSON scalar is stored as the object that it is, and read back unchanged."""
    assert encode_value(value) is value
    assert decode_value(encode_value(value), Any) is value
    assert decode_value(encode_value(value), type(value)) is value


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ([], b"[]"),
        ({}, b"{}"),
        ((1, "a", None), b'[1,"a",null]'),
        ({1: 2}, b'{"1":2}'),
        (AStruct([1]), b'{"x":[1]}'),
        (RenamedStruct(1), b'{"someField":1}'),
        (ADataclass(None), b'{"x":null}'),
        (AnAttrs(1.5), b'{"x":1.5}'),
        (APydantic(x=None), b'{"x":null}'),
        ([APydantic(x=None)], b'[{"x":null}]'),
        (ATuple(1, 2), b"[1,2]"),
        (PlainEnum.A, b'"a"'),
        (NumberEnum.ONE, b"1"),
        (b"abc", b'"YWJj"'),
        (Raw(b'{"a": 1}'), b'{"a": 1}'),
        ([2**64], b"[18446744073709551616]"),
        (["null"], b'["null"]'),
        ({"null": None}, b'{"null":null}'),
    ],
    ids=count(),
)
def test_anything_else_is_kept_as_its_json(value: Any, data: bytes) -> None:
    """What is no scalar is stored as bytes, its JSON."""
    assert encode_value(value) == data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


@given(JSON)
def test_any_json_value_comes_back_exactly(value: Any) -> None:
    """Every JSON value is read back with the same types, the same order and the same sign of zero."""
    assert repr(decode_value(encode_value(value), Any)) == repr(value)


@given(JSON)
def test_any_json_value_comes_back_exactly_from_its_json(value: Any) -> None:
    """A value that was loaded from a file, scalars included, is read back exactly."""
    assert repr(decode_value(Raw(msgspec.json.encode(value)), Any)) == repr(value)


def test_a_later_mutation_of_the_callers_object_changes_nothing() -> None:
    """What was encoded no longer depends on the caller's object."""
    value = {"a": [1]}
    stored = encode_value(value)
    value["a"].append(2)
    assert decode_value(stored, Any) == {"a": [1]}


@pytest.mark.parametrize("type_", [Any, dict[str, list[int]], AStruct, APydantic])
def test_each_read_gives_a_fresh_value(type_: Any) -> None:
    """Mutating what was read changes nothing that is stored."""

    def x_of(value: Any) -> Any:
        return value["x"] if isinstance(value, dict) else value.x

    stored = encode_value({"x": [1]})
    first = decode_value(stored, type_)
    x_of(first).append(2)
    second = decode_value(stored, type_)
    assert x_of(second) == [1]
    assert second is not first


def test_the_same_object_twice_is_no_cycle() -> None:
    """A value that holds the same list twice, side by side, is kept."""
    part = [1]
    assert decode_value(encode_value([part, part]), Any) == [[1], [1]]


# NaN and infinity


@pytest.mark.parametrize("number", [NAN, INF, -INF], ids=repr)
@pytest.mark.parametrize(
    ("around", "path"),
    [
        (lambda x: x, "$"),
        (lambda x: [x], "$[0]"),
        (lambda x: (1, x), "$[1]"),
        (lambda x: {x}, "$[0]"),
        (lambda x: frozenset([x]), "$[0]"),
        (lambda x: {"a": [1, {"b": x}]}, "$.a[1].b"),
        (lambda x: {"a b": x}, "$['a b']"),
        (lambda x: {1: x}, "$[1]"),
        (lambda x: [None, None, x], "$[2]"),
        (AStruct, "$.x"),
        (ADataclass, "$.x"),
        (AnAttrs, "$.x"),
        (lambda x: ATuple(1, x), "$[1]"),
        (lambda x: APydantic(x=x), "$.x"),
        (lambda x: APydantic(x=APydantic(x=[x])), "$.x.x[0]"),
        (lambda x: [AStruct(ADataclass([AnAttrs({"k": APydantic(x=x)})]))], "$[0].x.x[0].x.k.x"),
    ],
    ids=count(),
)
def test_a_nan_at_any_depth_is_refused(number: float, around: Callable[[float], object], path: str) -> None:
    """NaN and infinity are refused at any depth, in any kind of object, with their path."""
    error = refused(around(number))
    assert error.path == path
    assert str(error).startswith("NaN and infinity cannot be kept: JSON has no such numbers")
    assert (path in str(error)) == (path != "$")


@pytest.mark.parametrize("value", [FloatEnum.NOT_A_NUMBER, NanEnum.NOT_A_NUMBER])
def test_a_nan_in_an_enum_is_refused(value: object) -> None:
    """An enum whose value is NaN is refused, alone and inside."""
    assert refused(value).path == "$"
    assert refused({"a": [value]}).path == "$.a[0]"


def test_a_nan_in_a_renamed_field_is_refused() -> None:
    """A NaN in a field that has another name in JSON is refused, with one of its names in the path."""
    assert refused(RenamedStruct([NAN])).path in {"$.some_field[0]", "$.someField[0]"}


class WithExtra(pydantic.BaseModel, extra="allow"):
    pass


class WithSerializer(pydantic.BaseModel):
    x: float

    @pydantic.model_serializer
    def as_dict(self) -> dict[str, float]:
        return {"x": math.nan}


class WithComputed(pydantic.BaseModel):
    x: float

    @pydantic.computed_field
    def y(self) -> float:
        return math.nan


class WithConstants(pydantic.BaseModel, ser_json_inf_nan="constants"):
    x: float


def test_a_nan_in_an_extra_field_of_a_pydantic_model_is_refused() -> None:
    """A NaN in a field that the model does not declare is refused, not kept as null."""
    assert refused(WithExtra.model_validate({"a": NAN})).path == "$.a"


def test_a_nan_from_a_pydantic_serializer_is_refused() -> None:
    """A NaN that the model's own serializer makes is refused, not kept as null."""
    assert refused([WithSerializer(x=1)]).path.startswith("$[0]")


def test_a_nan_in_a_constant_of_pydantic_is_refused() -> None:
    """A model that writes NaN as the constant NaN is refused: that is no JSON."""
    assert refused([WithConstants(x=NAN)]).path.startswith("$[0]")


def test_a_computed_field_is_not_kept() -> None:
    """A computed field, which cannot be read back, is left out, so that a NaN in it does not matter."""
    stored = encode_value(WithComputed(x=1))
    assert bytes(stored) == b'{"x":1.0}'  # type: ignore[arg-type]
    assert decode_value(stored, WithComputed) == WithComputed(x=1)


def test_a_nan_in_an_undeclared_attribute_is_refused() -> None:
    """A NaN in an attribute that attrs does not know, but msgspec writes, is refused."""
    value = OpenAttrs(1)
    value.y = NAN  # type: ignore[attr-defined]
    assert refused(value).path == "$.y"


class WithExcluded(pydantic.BaseModel):
    x: float = pydantic.Field(default=math.nan, exclude=True)
    y: int | None = None


class WithOmitted(msgspec.Struct, omit_defaults=True):
    x: float = NAN
    y: int | None = 3


@pytest.mark.parametrize("value", [WithExcluded(), WithOmitted(y=None)], ids=repr)
def test_a_nan_that_is_not_written_does_not_matter(value: object) -> None:
    """A NaN in a field that is left out of the JSON is no reason to refuse the rest."""
    assert decode_value(encode_value(value), Any) == {"y": None}


# Nesting and cycles


@pytest.mark.parametrize("kind", ["lists", "dicts", "mixed"])
def test_128_levels_are_kept(kind: str) -> None:
    """128 levels of nesting are kept and read back."""
    assert decode_value(encode_value(nested(MAX_DEPTH, kind)), Any) == nested(MAX_DEPTH, kind)


@pytest.mark.parametrize("kind", ["lists", "dicts", "mixed"])
@pytest.mark.parametrize("levels", [129, 1_000, 100_000])
def test_more_levels_are_refused(kind: str, levels: int) -> None:
    """129 levels of nesting and more are refused, with a path of bounded length."""
    error = refused(nested(levels, kind))
    assert str(error).startswith("more than 128 levels of nesting cannot be kept - at `$")
    assert len(error.path) <= 203
    assert error.path.startswith({"lists": "$[0][0]", "dicts": "$.a.a", "mixed": "$"}[kind])


def test_the_path_leads_to_the_part_that_is_too_deep() -> None:
    """Where one part of several is nested too deep, the path leads there."""
    assert refused({"ok": nested(127, "lists"), "deep": nested(128, "lists")}).path.startswith("$.deep[0][0]")


@pytest.mark.parametrize("around", [AStruct, ADataclass, AnAttrs, lambda x: APydantic(x=x)])
def test_an_object_counts_as_a_level(around: Callable[[Any], object]) -> None:
    """A Struct, a dataclass and a model are levels of nesting like a dict."""
    stored = encode_value(around(nested(127, "lists")))
    assert decode_value(stored, Any) == {"x": nested(127, "lists")}
    assert str(refused(around(nested(128, "lists")))).startswith("more than 128 levels")


def test_brackets_in_strings_are_no_levels() -> None:
    """Brackets in text, with quotes and backslashes around them, are not counted."""
    value = ['["[{' * 300, '\\"' + "[" * 300, "\\" * 3 + '"[[' * 200, {"[" * 300: "]" * 10}]
    assert decode_value(encode_value(value), Any) == value


def test_many_brackets_side_by_side_are_not_deep() -> None:
    """Thousands of lists and dicts side by side are two levels."""
    value: list[Any] = [[], {}] * 5_000
    assert decode_value(encode_value(value), Any) == value


@pytest.mark.parametrize(
    ("data", "deep"),
    [
        (b"[" * 128 + b"]" * 128, False),
        (b"[" * 129 + b"]" * 129, True),
        (b'{"a":' * 129 + b"1" + b"}" * 129, True),
        (b"[ { } , [ ] ]" * 100, False),
        (b'"' + b"[" * 1000 + b'"', False),
        (b'["' + b"\\\\" * 3 + b'",' + b"[" * 128 + b"]" * 129, True),
        (b'["' + b'\\"' * 3 + b"[" * 128 + b'"]', False),
        (b"", False),
    ],
)
def test_too_deep(data: bytes, deep: bool) -> None:  # noqa: FBT001
    """`too_deep` counts the nesting of JSON, whitespace and strings aside."""
    assert too_deep(data) is deep


def test_counting_levels_takes_little_memory() -> None:
    """Counting the levels of a large value takes memory of the order of the value, not a hundred times that."""
    data = b'["' + b"x" * 500_000 + b'\\"' * 250_000 + b'",' + b"[]," * 200 + b"1]"
    tracemalloc.start()
    try:
        assert not too_deep(data)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data)
    finally:
        tracemalloc.stop()


def list_cycle() -> object:
    value: list[Any] = []
    value.append(value)
    return value


def dict_cycle() -> object:
    value: dict[str, Any] = {"n": 1}
    value["a"] = {"b": [1, value]}
    return value


def struct_cycle() -> object:
    value = AStruct(None)
    value.x = [value]
    return value


def dataclass_cycle() -> object:
    value = ADataclass(None)
    value.x = {"k": value}
    return value


def attrs_cycle() -> object:
    value = AnAttrs(None)
    value.x = value
    return value


def pydantic_cycle() -> object:
    value = APydantic(x=None)
    value.x = [value]
    return value


@pytest.mark.parametrize(
    ("cycle", "path"),
    [
        (list_cycle, "$[0]"),
        (dict_cycle, "$.a.b[1]"),
        (struct_cycle, "$.x[0]"),
        (dataclass_cycle, "$.x.k"),
        (attrs_cycle, "$.x"),
        (pydantic_cycle, "$.x[0]"),
        (lambda: {"here": list_cycle()}, "$.here[0]"),
    ],
    ids=count(),
)
def test_a_cycle_is_refused(cycle: Callable[[], object], path: str) -> None:
    """A value that contains itself is refused, with the path at which it comes round."""
    error = refused(cycle())
    assert str(error) == f"a value that contains itself cannot be kept - at `{path}`"
    assert error.path == path


# Text and keys


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("\ud800", "$"),
        ("a\udfffb", "$"),
        (["ok", "\ud800"], "$[1]"),
        (AStruct({"a": "\udc00"}), "$.x.a"),
    ],
)
def test_a_lone_surrogate_is_refused(value: object, path: str) -> None:
    """Text that UTF-8 cannot hold is refused, with its path."""
    error = refused(value)
    assert str(error).startswith("a str with a lone surrogate cannot be kept: UTF-8 cannot hold it")
    assert error.path == path


@pytest.mark.parametrize(
    "key", ["\ud800", ("a", 1), None, True, object()], ids=["surrogate", "tuple", "None", "True", "object"]
)
def test_a_dict_with_a_key_that_json_cannot_hold_is_refused(key: Hashable) -> None:
    """A dict with a key that is neither text nor a number is refused, with the path of the dict."""
    assert refused({key: 1}).path == "$"
    error = refused({"a": [{"ok": 1}, {"ok": 2, key: 1}]})
    if isinstance(key, str):
        why = f"a dict with the key {key!r} cannot be kept: it has a lone surrogate, which UTF-8 cannot hold"
    else:
        kind = type(key).__name__
        why = f"a dict with a key of the class {kind} cannot be kept: use keys that are str, int or float"
    assert str(error) == f"{why} - at `$.a[1]`"
    assert error.path == "$.a[1]"


@pytest.mark.parametrize("key", [NAN, INF, -INF], ids=repr)
def test_a_key_that_is_not_finite_is_kept_as_text(key: float) -> None:
    """A float as a key becomes text like every number, so that NaN is text too."""
    assert decode_value(encode_value({key: 1}), Any) == {str(key): 1}


# Unknown classes


@pytest.mark.parametrize(
    ("value", "path", "name"),
    [
        (Unknown(), "$", "Unknown"),
        ([Unknown()], "$[0]", "Unknown"),
        ({"a": [1, {"b c": Unknown()}]}, "$.a[1]['b c']", "Unknown"),
        (AStruct([Unknown()]), "$.x[0]", "Unknown"),
        (ADataclass(Unknown()), "$.x", "Unknown"),
        (AnAttrs(Unknown()), "$.x", "Unknown"),
        (APydantic(x=[Unknown()]), "$.x[0]", "Unknown"),
        (complex(1), "$", "complex"),
        (range(3), "$", "range"),
        (Unknown, "$", "type"),
        (APydantic, "$", "ModelMetaclass"),
        (len, "$", "builtin_function_or_method"),
        (msgspec.UNSET, "$", "UnsetType"),
    ],
    ids=count(),
)
def test_an_unknown_class_is_refused(value: object, path: str, name: str) -> None:
    """An object of a class that nothing encodes is refused, with its path and the name of its class."""
    error = refused(value)
    assert str(error).startswith(f"an object of the class {name} cannot be kept: use what msgspec encodes")
    assert error.path == path


@pytest.mark.parametrize(
    ("value", "plain"),
    [(StrSubclass("a"), "str"), (IntSubclass(3), "int"), (FloatSubclass(1), "float")],
    ids=["str", "int", "float"],
)
def test_a_subclass_of_a_scalar_is_refused_for_what_it_is(value: object, plain: str) -> None:
    """A subclass of a scalar, which msgspec does not encode, is refused as a class, not for its contents."""
    error = refused([value])
    assert error.path == "$[0]"
    assert f"of the class {type(value).__name__} cannot be kept: make it a plain {plain}" in str(error)


# Numbers


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30, 10**4299], ids=count())
def test_a_large_int_comes_back_exactly(number: int) -> None:
    """An int beyond 64 bits is kept exactly, alone, inside and after a restart."""
    assert decode_value(encode_value(number), int) == number
    assert decode_value(encode_value({"n": [number]}), Any) == {"n": [number]}
    assert decode_value(encode_value([number]), list[int] if number.bit_length() <= 64 else Any) == [number]
    assert decode_value(Raw(msgspec.json.encode(number)), Any) == number


def test_an_int_of_too_many_digits_is_refused() -> None:
    """An int that Python itself would not write or read as text is refused."""
    assert str(refused(10**5000)) == "an int with more digits than Python converts cannot be kept; store it as a str"
    assert refused({"a": [1, -(10**5000)]}).path == "$.a[1]"


def test_an_int_is_a_float_where_one_is_asked_for() -> None:
    """An int is read as a float when asked, as JSON has one kind of number, but 1.5 is no int."""
    value = decode_value(encode_value(1), float)
    assert (value, type(value)) == (1.0, float)
    assert decode_value(encode_value([1]), list[float]) == [1.0]
    assert mismatch(1.5, int).path == "$"
    assert mismatch(True, int).path == "$"
    assert mismatch(1, bool).path == "$"


# msgspec.Raw


@pytest.mark.parametrize("data", [b"1", b'"a"', b"null", b' {"a" : [1, 2]} ', b"1e308", b"[]"])
def test_a_raw_that_is_json_is_kept(data: bytes) -> None:
    """A Raw that holds JSON is kept, alone and inside."""
    value = msgspec.json.decode(data)
    assert decode_value(encode_value(Raw(data)), Any) == value
    assert decode_value(encode_value({"a": [Raw(data)]}), Any) == {"a": [value]}


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b" ", b"{bad", b"[1", b"1 2", b"NaN", b"nan", b"-Infinity", b"'a'", b"\xff", b"01", b"1,"),
        *(
            b'"\\ud800"',
            b'"\xff"',
            b'{"\xff":1}',
        ),
    ],
    ids=count(),
)
def test_a_raw_that_is_not_json_is_refused(data: bytes) -> None:
    """A Raw that could not be read back is refused, alone and inside, with its path."""
    assert refused(Raw(data)).path == "$"
    error = refused({"a": [1, Raw(data)]})
    assert str(error) == "a msgspec.Raw that is not valid JSON cannot be kept - at `$.a[1]`"
    assert error.path == "$.a[1]"


OUT_OF_RANGE = [b"1e999", b"[-1e999]", b"1" + b"0" * 5000]


@pytest.mark.parametrize("data", OUT_OF_RANGE, ids=count())
def test_a_raw_number_out_of_range_is_refused(data: bytes) -> None:
    """A Raw with a number that could not be read back is refused."""
    assert refused(Raw(data)).path == "$"


@pytest.mark.parametrize("data", OUT_OF_RANGE, ids=count())
def test_a_raw_number_out_of_range_inside_is_a_mismatch_when_read(data: bytes) -> None:
    """A number in a Raw inside is not looked at until it is read; it harms nothing but its own key."""
    assert mismatch({"a": [1, Raw(data)]}, Any).path == "$"


def test_a_raw_that_is_json_only_with_what_surrounds_it() -> None:
    """It is refused alone, and inside is what it reads as at once: the value is one JSON value all the same."""
    assert refused(Raw(b"1,2")).path == "$"
    assert decode_value(encode_value({"a": [Raw(b"1,2")]}), Any) == {"a": [1, 2]}


@pytest.mark.parametrize("data", [b'1],"b":[2', b'1],"b":{"c":2},"d":[3', b'"\xff"', b'"', b"tru"], ids=count())
@pytest.mark.parametrize(
    "around", [lambda raw: [raw], lambda raw: {"a": raw}, lambda raw: [1, {"a": [[raw]]}]], ids=count()
)
def test_a_raw_inside_that_reaches_beyond_its_value(data: bytes, around: Any) -> None:
    """Bytes that would end their value, and begin another one beside it, are refused with the path of the Raw."""
    assert refused(around(Raw(data))).path in {"$[0]", "$.a", "$[1].a[0][0]"}


def test_a_raw_that_is_too_deep_is_refused() -> None:
    """The levels of nesting in a Raw count too."""
    assert encode_value(Raw(b"[" * 128 + b"]" * 128)) == b"[" * 128 + b"]" * 128
    assert "more than 128 levels" in str(refused([Raw(b"[" * 128 + b"]" * 128)]))
    assert "cannot be kept" in str(refused(Raw(b"[" * 129 + b"]" * 129)))


def test_a_raw_comes_back_as_a_raw() -> None:
    """`type=Raw` gives the JSON of whatever is stored."""
    assert bytes(decode_value(encode_value([1]), Raw)) == b"[1]"
    assert bytes(decode_value(encode_value("a"), Raw)) == b'"a"'


# Typed round trips


class Typed(msgspec.Struct):
    at: datetime
    ids: set[UUID]
    price: Decimal
    data: bytes
    kind: PlainEnum
    pair: ATuple


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (b"\0\xff", bytes),
        (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), datetime),
        (date(2026, 1, 2), date),
        (timedelta(seconds=1.5), timedelta),
        (UUID(int=7), UUID),
        (Decimal("1.10"), Decimal),
        ({1, 2, 3}, set[int]),
        (frozenset({"a"}), frozenset[str]),
        ((1, "a"), tuple[int, str]),
        ({1: "a"}, dict[int, str]),
        ({UUID(int=7): 1}, dict[UUID, int]),
        (PlainEnum.A, PlainEnum),
        (NumberEnum.ONE, NumberEnum),
        (AStruct([1]), AStruct),
        (RenamedStruct(1), RenamedStruct),
        (ADataclass("a"), ADataclass),
        (AnAttrs({"a": None}), AnAttrs),
        (ATuple(1, 2), ATuple),
        ({"x": 1}, ADict),
        (None, int | None),
        ("a", Literal["a", "b"]),
        (5, Annotated[int, msgspec.Meta(gt=1)]),
        (
            Typed(
                datetime(2026, 1, 2, tzinfo=UTC), {UUID(int=1)}, Decimal("0.30"), b"\xff", PlainEnum.A, ATuple(1, [2])
            ),
            Typed,
        ),
    ],
    ids=count(),
)
def test_a_typed_value_comes_back_with_its_type(value: object, type_: Any) -> None:
    """What msgspec knows goes in, and comes out with `type=`."""
    found = decode_value(encode_value(value), type_)
    assert found == value
    assert type(found) is type(value)


class Inner(pydantic.BaseModel):
    at: datetime
    n: int = pydantic.Field(alias="theNumber")


class Outer(msgspec.Struct):
    models: list[Inner]
    other: Inner | None = None


AN_INNER = Inner(at=datetime(2026, 1, 2, tzinfo=UTC), theNumber=7)


def test_a_pydantic_model_comes_back() -> None:
    """A Pydantic model is kept by the names of its fields; by name and by alias it is read."""
    stored = encode_value(AN_INNER)
    assert decode_value(stored, Any) == {"at": "2026-01-02T00:00:00Z", "n": 7}
    assert decode_value(stored, Inner) == AN_INNER
    assert decode_value(encode_value({"at": "2026-01-02T00:00:00Z", "theNumber": 7}), Inner) == AN_INNER


@pytest.mark.parametrize("other", [None, AN_INNER])
def test_a_pydantic_model_inside_a_struct_comes_back(other: Inner | None) -> None:
    """A Pydantic model inside a Struct is kept by name, and read back."""
    value = Outer([AN_INNER, AN_INNER], other)
    stored = encode_value(value)
    assert decode_value(stored, Any)["models"][0]["n"] == 7
    assert decode_value(stored, Outer) == value
    assert decode_value(encode_value([AN_INNER]), list[Inner]) == [AN_INNER]


class Telltale(pydantic.BaseModel):
    password: str

    @pydantic.field_serializer("password")
    def write(self, value: str) -> str:
        raise ValueError(f"cannot write {value}")


class WritesNonsense:
    def model_dump_json(self, **_: object) -> str:
        return f"not JSON: {SECRET}"


class WritesNothing:
    def model_dump_json(self, **_: object) -> None:
        return None


class Interrupts:
    def model_dump_json(self, **_: object) -> str:
        raise KeyboardInterrupt


class OutOfMemory:
    def model_dump_json(self, **_: object) -> str:
        raise MemoryError


@pytest.mark.parametrize(
    ("value", "field"),
    [(Telltale(password=SECRET), ".password"), (WritesNonsense(), ""), (WritesNothing(), "")],
    ids=lambda v: type(v).__name__,
)
def test_a_serializer_that_fails_tells_nothing(value: object, field: str) -> None:
    """A model whose serializer fails is refused with the field, and what its error quoted is nowhere to be seen."""
    assert refused(value).path == f"${field}"
    error = refused({"a": [1, AStruct(value)]})
    assert error.path == f"$.a[1].x{field}"
    assert type(value).__name__ in str(error)
    assert SECRET not in shown(error)
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_a_pydantic_model_that_fails_is_not_told_to_become_one() -> None:
    """The advice to use a Pydantic model is not given for a Pydantic model."""
    assert "or a Pydantic model" not in str(refused(Telltale(password=SECRET)))


@pytest.mark.parametrize(("value", "expected"), [(Interrupts(), KeyboardInterrupt), (OutOfMemory(), MemoryError)])
def test_what_is_not_about_the_value_goes_through(value: object, expected: type[BaseException]) -> None:
    """An interrupt or a lack of memory while encoding is not turned into an error about the value."""
    with pytest.raises(expected):
        encode_value(value)


# Types that do not match


class Checked(msgspec.Struct):
    x: str

    def __post_init__(self) -> None:
        raise ValueError(f"bad value {self.x}")


class CheckedLikeMsgspec(msgspec.Struct):
    x: str

    def __post_init__(self) -> None:
        raise ValueError(f"Expected `short`, got `{self.x}`")


class CheckedWithPath(msgspec.Struct):
    x: str

    def __post_init__(self) -> None:
        raise ValueError(f"bad value - at `{self.x}`")


class CheckedWithTypeError(msgspec.Struct):
    x: str

    def __post_init__(self) -> None:
        raise TypeError(self.x)


class Crashing(msgspec.Struct):
    x: str

    def __post_init__(self) -> None:
        raise RuntimeError(self.x)


class Model(pydantic.BaseModel):
    x: int


class Timed(pydantic.BaseModel):
    at: datetime


class One(pydantic.BaseModel):
    kind: Literal["one"]


class Two(pydantic.BaseModel):
    kind: Literal["two"]


class Either(pydantic.BaseModel):
    one: One | Two = pydantic.Field(discriminator="kind")


class CheckedModel(pydantic.BaseModel):
    x: str

    @pydantic.field_validator("x")
    @classmethod
    def check(cls, value: str) -> str:
        raise ValueError(f"bad value {value}")


class CrashingModel(pydantic.BaseModel):
    x: str

    @pydantic.field_validator("x")
    @classmethod
    def check(cls, value: str) -> str:
        raise RuntimeError(value)


class ModelMap(pydantic.BaseModel):
    m: dict[str, list[int]]


class HoldsModel(msgspec.Struct):
    model: Model


class TaggedA(msgspec.Struct, tag="a"):
    x: int


class TaggedB(msgspec.Struct, tag="b"):
    x: int


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


@pytest.mark.parametrize(
    ("value", "type_", "path"),
    [
        (SECRET, int, "$"),
        (SECRET, PlainEnum, "$"),
        (SECRET, Literal["a", "b"], "$"),
        (SECRET, UUID, "$"),
        (SECRET, datetime, "$"),
        (SECRET, Decimal, "$"),
        (SECRET, bytes, "$"),
        (SECRET, Annotated[str, msgspec.Meta(pattern="^x$")], "$"),
        (SECRET, Annotated[str, msgspec.Meta(max_length=3)], "$"),
        (SECRET, Model, "$"),
        ({"x": SECRET}, dict[str, PlainEnum], "$[...]"),
        ({"x": [1, SECRET]}, dict[str, list[int]], "$[...][1]"),
        ([{"x": SECRET}], list[ADict], "$[0].x"),
        ({"at": SECRET}, Typed, "$.at"),
        ({"x": SECRET}, Checked, "$"),
        ([{"x": SECRET}], list[Checked], "$[0]"),
        ({"x": SECRET}, CheckedLikeMsgspec, "$"),
        ([{"x": SECRET}], list[CheckedLikeMsgspec], "$[0]"),
        ({"x": SECRET}, CheckedWithPath, "$"),
        ([{"x": SECRET}], list[CheckedWithPath], "$[0]"),
        ({"x": SECRET}, CheckedWithTypeError, "$"),
        ({"x": SECRET}, Crashing, "$"),
        ({"x": SECRET}, Model, "$.x"),
        ({"x": SECRET}, CheckedModel, "$.x"),
        ({"x": SECRET}, CrashingModel, "$"),
        ({"m": {"a b": [1, SECRET]}}, ModelMap, "$.m['a b'][1]"),
        ({"model": {"x": SECRET}}, HoldsModel, "$.model.x"),
        ([{"x": SECRET}], list[Model], "$[0].x"),
        ({"x": SECRET}, Model | None, "$.x"),
        ({"at": SECRET}, Timed, "$.at"),
        ({"one": {"kind": SECRET}}, Either, "$.one"),
        ({"type": SECRET}, TaggedA | TaggedB, "$.type"),
        ({SECRET: 1}, Strict, "$"),
    ],
    ids=count(),
)
def test_a_mismatch_has_the_path_and_not_the_value(value: object, type_: Any, path: str) -> None:
    """A value of another type is refused with its path, and the value is nowhere to be seen."""
    error = mismatch(value, type_)
    assert error.path == path
    assert str(error).endswith(f" - at `{path}`")
    assert SECRET not in shown(error)
    assert error.__cause__ is None
    assert error.__suppress_context__


class WithSecret(pydantic.BaseModel):
    name: str = "**********"
    password: pydantic.SecretStr | pydantic.SecretBytes


class HoldsSecrets(pydantic.BaseModel):
    inner: list[WithSecret]


class WithOpenSecret(pydantic.BaseModel):
    password: pydantic.SecretStr

    @pydantic.field_serializer("password", when_used="json")
    def shown(self, secret: pydantic.SecretStr) -> str:
        return secret.get_secret_value()


@pytest.mark.parametrize(
    "secret", [pydantic.SecretStr(SECRET), pydantic.SecretBytes(SECRET.encode())], ids=["str", "bytes"]
)
def test_a_secret_that_would_not_be_read_back_is_refused(secret: Any) -> None:
    """Pydantic writes a secret as asterisks: what is read back would be those."""
    for value, path in (
        (WithSecret(password=secret), "$.password"),
        ([{"a": WithSecret(password=secret)}], "$[0].a.password"),
        (HoldsSecrets(inner=[WithSecret(password=secret)]), "$.inner[0].password"),
    ):
        error = refused(value)
        assert error.path == path
        assert "would be kept as asterisks: give its field a serializer" in str(error)
        assert SECRET not in shown(error)


def test_a_secret_that_is_written_is_kept() -> None:
    """With a serializer of its own a secret comes back; and asterisks that are no secret are kept as they are."""
    value = WithOpenSecret(password=pydantic.SecretStr("open"))
    assert decode_value(encode_value(value), WithOpenSecret) == value
    assert decode_value(encode_value(ModelMap(m={"**********": [1]})), ModelMap).m == {"**********": [1]}


@pytest.mark.parametrize(
    ("value", "type_", "message"),
    [
        ("a", int, "not a `int`: Expected `int`, got `str` - at `$`"),
        ({}, AStruct, "not a `AStruct`: Object missing required field `x` - at `$`"),
        ({}, Model, "not a `Model`: Field required - at `$.x`"),
        ({"x": []}, Model, "not a `Model`: Input should be a valid integer - at `$.x`"),
        ({"x": "a"}, CheckedModel, "not a `CheckedModel`: value_error - at `$.x`"),
        ([1, "a"], list[int], "not a `list[int]`: Expected `int`, got `str` - at `$[1]`"),
        (
            1,
            Annotated[int, msgspec.Meta(gt=5)],
            "not a `typing.Annotated[int, msgspec.Meta(gt=5)]`: Expected `int` >= 6 - at `$`",
        ),
    ],
)
def test_a_mismatch_says_what_was_expected(value: object, type_: Any, message: str) -> None:
    """The message says which type was asked for, and what was found in its place."""
    assert str(mismatch(value, type_)) == message


@pytest.mark.parametrize("type_", [5, "int", [int], {}, lambda: 0, math], ids=count())
def test_what_is_no_type_is_a_type_error(type_: Any) -> None:
    """What is no type at all is a TypeError that says so, never a mismatch of the value."""
    with pytest.raises(TypeError, match="is not a type that can be decoded"):
        decode_value(encode_value([1]), type_)


@pytest.mark.parametrize("type_", [complex, Unknown, list[complex]], ids=count())
def test_a_type_that_cannot_be_decoded_is_a_type_error(type_: Any) -> None:
    """A type that cannot be decoded is a TypeError that names the class, whatever is stored."""
    for value in (1, [1], {"a": 1}, "not even a list"):
        with pytest.raises(TypeError, match=r"neither msgspec nor Pydantic decodes the class (complex|Unknown)"):
            decode_value(encode_value(value), type_)


def test_a_type_that_is_not_hashable_is_decoded() -> None:
    """A type with a list in its annotation cannot be cached, but is decoded all the same."""
    type_ = Annotated[int, ["a note"]]
    assert decode_value(encode_value(1), type_) == 1
    assert mismatch("a", type_).path == "$"


class DecodesOutOfMemory:
    @classmethod
    def model_validate_json(cls, data: bytes, **_: object) -> object:
        raise MemoryError


class DecodesTooDeep:
    @classmethod
    def model_validate_json(cls, data: bytes, **_: object) -> object:
        raise RecursionError


@pytest.mark.parametrize(("type_", "expected"), [(DecodesOutOfMemory, MemoryError), (DecodesTooDeep, RecursionError)])
def test_what_is_not_about_the_type_goes_through(type_: Any, expected: type[BaseException]) -> None:
    """A lack of memory or of stack while decoding is not turned into a mismatch."""
    with pytest.raises(expected):
        decode_value(encode_value([1]), type_)


class Strange:
    """As a model, by its methods, whose two serializers disagree."""

    def __init__(self, error: type[Exception], written: str | None) -> None:
        self.error = error
        self.written = written

    def model_dump_json(self, **_: object) -> str:
        if self.written is None:
            raise self.error
        return self.written

    def model_dump(self, **_: object) -> object:
        raise self.error


def test_a_model_that_cannot_be_looked_into_is_refused() -> None:
    """Where `null` may stand for a NaN, the model itself must be able to tell."""
    assert "serializer failed" in str(refused({"a": Strange(ValueError, "null")}))


def test_no_room_for_recursion_is_told_as_that() -> None:
    """Deep in calls Python's own limit may leave no room: that is no fault of the value."""
    assert "recursion limit" in str(refused(Strange(RecursionError, None)))


def called_from(depth: int, value: object) -> object:
    """Encode a value so many calls below here."""
    return called_from(depth - 1, value) if depth else encode_value(value)


@pytest.mark.parametrize("nest", [lambda value: [value], lambda value: {"a": value}], ids=["lists", "dicts"])
def test_no_room_is_told_wherever_it_ends(nest: Callable[[object], object]) -> None:
    """A nested value that is refused near Python's limit is never called an object that cannot be kept.

    From Python 3.12 on, calls in C have a limit of their own, and the value is kept.
    """
    value: object = 1
    for _ in range(100):
        value = nest(value)
    told = set()
    for depth in range(sys.getrecursionlimit()):
        try:
            called_from(depth, value)
        except InvalidValueError as error:
            told.add(str(error).partition(" - ")[0])
        except RecursionError:
            break
    assert [("recursion limit" in text) for text in told] == ([True] if sys.version_info < (3, 12) else [])


class Encoded:
    """`encode`, with how many bytes it made."""

    def __init__(self) -> None:
        self.total = 0
        self._real = msgspec.json.Encoder().encode

    def __call__(self, value: object) -> bytes:
        data = self._real(value)
        self.total += len(data)
        return data


@pytest.mark.parametrize("levels", [0, 60])
@pytest.mark.parametrize("where", [0, 700, 1_999])
def test_a_refusal_costs_a_few_times_what_encoding_costs(
    where: int, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find the part to blame, each part is encoded a few times at most, however many there are, at any depth."""
    records: list[Any] = [{"id": number, "name": f"user {number}"} for number in range(2_000)]
    size = len(msgspec.json.encode(records))
    records[where]["bad"] = Unknown()
    value: Any = records
    for _ in range(levels):
        value = {"a": value}
    encoded = Encoded()
    monkeypatch.setattr("lab_state._values.encode", encoded)
    assert refused(value).path == _shown("$" + ".a" * levels + f"[{where}].bad")
    assert encoded.total < 3 * size


@pytest.mark.parametrize(
    "bad",
    [Unknown(), float("nan"), datetime(2020, 1, 1, tzinfo=timezone(timedelta(seconds=30)))],
    ids=["object", "nan", "time"],
)
def test_levels_around_a_large_part_do_not_encode_it_once_each(bad: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path through many levels is found by their scalars. The large part inside is looked at a few times."""
    records: list[Any] = [{"id": number, "name": f"user {number}"} for number in range(2_000)]
    records[700]["bad"] = bad
    value: Any = records
    for _ in range(100):
        value = {"a": value, "b": 1, "c": "d"}
    large = 0

    def counted(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(part: Any, **options: Any) -> Any:
            nonlocal large
            large += part is records or (isinstance(part, dict) and "a" in part)
            return function(part, **options)

        return call

    for name in ("encode", "check_str_keys", "moved_time"):
        monkeypatch.setattr(f"lab_state._values.{name}", counted(getattr(_values, name)))
    assert refused(value).path == _shown("$" + ".a" * 100 + "[700].bad")
    assert 0 < large < 20


def _shown(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:200]}..."


def test_a_part_to_blame_among_parts_of_any_kind() -> None:
    """In tuples, sets, dicts and objects, with one part or many, the path leads to the first that is to blame."""
    assert refused((1, 2, (3, Unknown()))).path == "$[2][1]"
    assert refused({"a": {"b": 1}, "c": AStruct([1, Unknown()]), "d": Unknown()}).path == "$.c.x[1]"
    assert refused({"a": {(1, 2): {"b": {"c": 1}}}}).path == "$.a"
    assert refused(frozenset({Unknown()})).path == "$[0]"


class Numbers(pydantic.BaseModel):
    """A model with what MessagePack cannot hold."""

    by_number: dict[int, int] | None = None
    large: int = 0
    part: float | None = None
    hidden: Any = pydantic.Field(default=None, exclude=True)
    as_text: float = 0.0

    @pydantic.field_serializer("as_text")
    def _text(self, number: float) -> str:
        return str(number)


class Omitting(msgspec.Struct, omit_defaults=True):
    """A Struct that does not write its default, which no JSON could hold."""

    part: Any = None
    number: float = math.nan


@pytest.mark.parametrize(
    "model", [Numbers(by_number={1: 2}), Numbers(large=2**70), Numbers(by_number={}, large=-(2**70))], ids=count()
)
def test_a_large_value_of_models_with_a_null_is_kept(model: Numbers) -> None:
    """Models with keys that are numbers, or with large numbers, are kept beside a None, however many there are."""
    value: list[Any] = [model, Numbers(), None] * 1_000
    stored = encode_value(value)
    assert decode_value(stored, list[Numbers | None]) == value
    assert refused([*value, math.nan]).path == "$[3000]"
    assert refused([*value, [{"a": math.inf}]]).path == "$[3000][0].a"


@pytest.mark.parametrize(
    "part",
    [Numbers(hidden=math.nan), Numbers(as_text=math.inf), Omitting([Numbers()])],
    ids=["hidden", "text", "omitted"],
)
def test_a_nan_that_is_not_written_is_no_fault(part: object) -> None:
    """A NaN that a model or a Struct leaves out, or writes as text, does no harm, however large the value is."""
    assert decode_value(encode_value([part]), Any) == [decode_value(encode_value(part), Any)]
    assert decode_value(encode_value([part] * 1_000), Any) == decode_value(encode_value([part]), Any) * 1_000
    assert refused([*[part] * 1_000, [Omitting(math.nan)]]).path == "$[1000][0].part"


def test_a_nan_is_found_in_any_container() -> None:
    """A NaN is refused with its path in tuples, in dicts and in what has a serializer; a None is none."""
    assert refused({"a": (None, {"b": math.nan})}).path == "$.a[1].b"
    assert refused([[1.5], [None, math.inf]]).path == "$[1][1]"
    assert refused([Raw(b"null"), {"a": math.nan}]).path == "$[1].a"
    assert (
        encode_value([None, 1e308, "\u02ff", {"a": 2**70, "b": None}])
        == b'[null,1e308,"\xcb\xbf",{"a":%d,"b":null}]' % 2**70
    )
