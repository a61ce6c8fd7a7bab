"""The table of docs/values.md: each row, and the rule behind it for generated classes of each library."""

from __future__ import annotations

import dataclasses
import ipaddress
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from types import new_class
from typing import Any, NamedTuple, TypedDict, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab_state import InvalidValueError, Manager, MemoryStorage, TypeMismatchError
from lab_state._types import decode_value
from lab_state._values import encode_value

PAGE = Path(__file__).parent.parent / "docs" / "values.md"


def read_back(value: Any, type_: Any = None) -> Any:
    return decode_value(encode_value(value), type(value) if type_ is None else type_)


def is_refused_when_read(value: object) -> bool:
    try:
        read_back(value)
    except TypeMismatchError:
        return True
    return False


def is_refused(value: object) -> bool:
    try:
        encode_value(value)
    except InvalidValueError:
        return True
    return False


class Level(Enum):
    LOW = "low"
    HIGH = "high"


class Number(IntEnum):
    ONE = 1


class Mixed(Enum):
    ONE = 1
    TWO = "two"


FIELDS: dict[str, tuple[Any, Any]] = {
    "a": (int, 5),
    "b": (str, "text"),
    "c": (list[int], [1, 2]),
    "d": (dict[str, float], {"x": 1.5}),
    "e": (datetime, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
    "f": (bytes, b"ascii"),
    "g": (Level, Level.LOW),
    "h": (tuple[int, str], (1, "a")),
    "i": (set[int], {1, 2}),
    "j": (Path, Path("/srv")),
    "k": (dict[int, str], {1: "one"}),
    "l": (UUID | None, None),
}
NAMES = {name: type_ for name, (type_, _) in FIELDS.items()}
VALUES = {name: value for name, (_, value) in FIELDS.items()}


def a_struct(fields: dict[str, Any]) -> Any:
    return msgspec.defstruct("Made", list(fields.items()))


def a_dataclass(fields: dict[str, Any]) -> Any:
    return dataclasses.make_dataclass("Made", list(fields.items()))


def an_attrs(fields: dict[str, Any]) -> Any:
    return attrs.make_class("Made", {name: attrs.field(type=type_) for name, type_ in fields.items()})


def a_named_tuple(fields: dict[str, Any]) -> Any:
    make: Any = NamedTuple
    return make("Made", list(fields.items()))


def a_model(fields: dict[str, Any]) -> Any:
    made = {name: (type_, ...) for name, type_ in fields.items()}
    # As msgspec writes them; without it, only bytes that are UTF-8 are taken.
    config = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    return pydantic.create_model("Made", __config__=config, **cast("Any", made))


def a_pydantic_dataclass(fields: dict[str, Any]) -> Any:
    return pydantic.dataclasses.dataclass(a_dataclass(fields))


LIBRARIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "`msgspec.Struct`": a_struct,
    "dataclass": a_dataclass,
    "attrs": an_attrs,
    "`NamedTuple`": a_named_tuple,
    "Pydantic model": a_model,
    "Pydantic dataclass": a_pydantic_dataclass,
}


class Base(msgspec.Struct):
    x: int


class Sub(Base):
    y: int = 2


class HoldsBase(msgspec.Struct):
    part: Base
    anything: Any = None


@dataclasses.dataclass
class DataBase:
    x: int


@dataclasses.dataclass
class DataSub(DataBase):
    y: int = 2


@dataclasses.dataclass
class DataHolder:
    part: DataBase
    n: int = 3


@attrs.define
class Private:
    a: int
    _b: int = 0


class Members(TypedDict):
    at: datetime
    ids: list[UUID]


class Pair(NamedTuple):
    at: date
    n: int = 1


class Hidden(pydantic.BaseModel):
    a: int
    b: int = pydantic.Field(0, exclude=True)
    _c: int = pydantic.PrivateAttr(0)

    @pydantic.computed_field
    def d(self) -> int:
        return self.a


class AnyModel(pydantic.BaseModel):
    x: Any


class Blob(pydantic.BaseModel):
    x: bytes


class Extra(pydantic.BaseModel, extra="allow"):
    a: int


Roots = pydantic.RootModel[list[int]]


@pydantic.dataclasses.dataclass
class Bytes:
    x: bytes


def row_of_containers() -> None:
    assert read_back({"a": [1, None]}) == {"a": [1, None]}
    assert read_back((1, "a")) == (1, "a")
    assert read_back({1}) == {1}
    assert read_back({1: ((1,), date(2026, 1, 2))}) == {"1": [[1], "2026-01-02"]}
    assert read_back({1: Base(1)}, dict[int, Base]) == {1: Base(1)}
    assert is_refused({1: 1, "1": 1})


def row_of_collections() -> None:
    assert list(read_back(OrderedDict(b=1, a=2))) == ["b", "a"]
    assert read_back(OrderedDict({1: 2})) == OrderedDict({"1": 2})
    assert read_back(Counter([1]), Counter[int]) == Counter([1])
    assert read_back(defaultdict(list, a=1)).default_factory is None
    assert read_back(deque([1, 2], maxlen=5)) == deque([1, 2])
    assert read_back(deque([1, 2], maxlen=5)).maxlen is None


def row_of_structs() -> None:
    assert read_back(HoldsBase(Sub(1))) == HoldsBase(Base(1))
    assert read_back(HoldsBase(Base(1), (1, date(2026, 1, 2)))) == HoldsBase(Base(1), [1, "2026-01-02"])
    assert is_refused(msgspec.defstruct("Bad", [("x", Mixed | None)])(None))
    assert is_refused_when_read(Base("text"))  # type: ignore[arg-type]


def row_of_dataclasses() -> None:
    assert read_back(DataHolder(DataSub(1))) == DataHolder(DataBase(1))
    assert vars(read_back({"part": {"x": 1}}, DataHolder))["n"] == 3
    assert is_refused_when_read(DataBase("text"))  # type: ignore[arg-type]
    assert is_refused(dataclasses.make_dataclass("Bad", [("x", dataclasses.InitVar[int])])(1))
    loose = DataBase(1)
    loose.z = 5  # type: ignore[attr-defined]
    assert not hasattr(read_back(loose), "z")


def row_of_attrs() -> None:
    assert is_refused(Private(1, 2))
    assert read_back([Private(1, 2)]) == [{"a": 1}]
    assert is_refused_when_read(an_attrs({"x": int})("text"))


def row_of_typed_dicts() -> None:
    value = Members(at=datetime(2026, 1, 2, tzinfo=UTC), ids=[UUID(int=1)])
    assert read_back(value, Members) == value
    assert read_back(value)["ids"] == [str(UUID(int=1))]


def row_of_named_tuples() -> None:
    assert read_back(Pair(date(2026, 1, 2))) == Pair(date(2026, 1, 2))
    assert read_back(Pair(date(2026, 1, 2)), Any) == ["2026-01-02", 1]
    assert is_refused(a_named_tuple({"x": Mixed | None})(None))


def row_of_models() -> None:
    value = Hidden(a=1, b=2)
    value._c = 3
    assert read_back(value) == Hidden(a=1, b=0)
    assert read_back(value, Any) == {"a": 1}
    extra = Extra.model_validate({"a": 1, "z": [2]})
    assert read_back(extra) == extra
    assert read_back(Roots([1])) == Roots([1])
    assert is_refused(AnyModel(x=date(2026, 1, 2)))
    assert is_refused(Blob(x=b"\xff"))


def row_of_pydantic_dataclasses() -> None:
    assert is_refused(a_pydantic_dataclass({"x": pydantic.HttpUrl})("https://example.org"))
    assert read_back(Bytes(b"a")) != Bytes(b"a")


ROWS: dict[str, Callable[[], None]] = {
    "dict, list, tuple, set": row_of_containers,
    "`OrderedDict`, `defaultdict`, `Counter`, `deque`": row_of_collections,
    "`msgspec.Struct`": row_of_structs,
    "dataclass": row_of_dataclasses,
    "attrs": row_of_attrs,
    "`TypedDict`": row_of_typed_dicts,
    "`NamedTuple`": row_of_named_tuples,
    "Pydantic model": row_of_models,
    "Pydantic dataclass": row_of_pydantic_dataclasses,
}


def test_each_row_of_the_table_has_a_test() -> None:
    """What the page lists is what is tested here."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert list(dict.fromkeys(line.split("|")[1].strip() for line in lines)) == ["class", *ROWS]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_of_the_table(row: Callable[[], None]) -> None:
    """What the row says is refused is refused, and what it says changes does."""
    row()


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("name", FIELDS)
def test_each_type_survives_in_each_library(make: Callable[[dict[str, Any]], Any], name: str) -> None:
    """A field of each type comes back equal, with its class."""
    if make is a_pydantic_dataclass and name == "f":
        return  # the table lists it
    value = make({name: NAMES[name]})(**{name: VALUES[name]})
    found = read_back(value)
    assert found == value
    assert type(getattr(found, name)) is type(getattr(value, name))


async def test_what_survives_does_so_over_a_restart() -> None:
    """What is read after a restart is equal, too."""
    storage = MemoryStorage()
    made = {library: make(NAMES)(**VALUES) for library, make in LIBRARIES.items() if library != "Pydantic dataclass"}
    async with Manager("x", storage) as state:
        await state.set_many(made)
    async with Manager("x", storage) as state:
        for library, value in made.items():
            assert await state.get(library, type=type(value)) == value


SCALARS = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(),
    bytes: st.binary(),
    date: st.dates(),
    # Python never finds a time that the clocks show twice equal to a time of another zone: see PEP 495.
    datetime: st.datetimes(timezones=st.just(UTC) | st.timezones().map(lambda zone: ZoneInfo(str(zone)))).filter(
        lambda at: at.replace(fold=0).utcoffset() == at.replace(fold=1).utcoffset()
    ),
    timedelta: st.timedeltas(min_value=timedelta(-1000), max_value=timedelta(1000)),
    time: st.times() | st.times(timezones=st.just(timezone(timedelta(hours=2)))),
    UUID: st.uuids(),
    Decimal: st.decimals(allow_nan=False, allow_infinity=False, places=3),
    Level: st.sampled_from(Level),
    Number: st.sampled_from(Number),
    Path: st.sampled_from(["/srv", "a/b", "ä"]).map(pathlib.Path),
    ipaddress.IPv4Address: st.ip_addresses(v=4),
}
LIST: Any = list
DEQUE: Any = deque
DICT: Any = dict
TUPLE: Any = tuple
Typed = tuple[Any, st.SearchStrategy[Any]]


def typed(depth: int = 2) -> st.SearchStrategy[Typed]:
    """Return a strategy for a type and its values."""
    scalars = st.sampled_from(list(SCALARS.items()))
    if not depth:
        return scalars
    inner = typed(depth - 1)
    return st.one_of(
        scalars,
        inner.map(lambda part: (LIST[part[0]], st.lists(part[1], max_size=3))),
        inner.map(lambda part: (DEQUE[part[0]], st.lists(part[1], max_size=3).map(deque))),
        inner.map(lambda part: (DICT[str, part[0]], st.dictionaries(st.text(), part[1], max_size=3))),
        inner.map(lambda part: (DICT[int, part[0]], st.dictionaries(st.integers(-9, 9), part[1], max_size=3))),
        inner.map(lambda part: (TUPLE[part[0], ...], st.lists(part[1], max_size=3).map(tuple))),
        inner.map(lambda part: (part[0] | None, st.none() | part[1])),
    )


@pytest.mark.parametrize("make", [make for make in LIBRARIES.values() if make is not a_pydantic_dataclass])
@settings(suppress_health_check=[HealthCheck.too_slow])  # a draw takes seconds if other processes have the cores
@given(data=st.data())
def test_the_rule_holds_for_generated_classes(make: Callable[[dict[str, Any]], Any], data: st.DataObject) -> None:
    """What is accepted comes back equal; the rest is refused."""
    fields = data.draw(st.lists(typed(), min_size=1, max_size=3))
    names = [f"field{number}" for number in range(len(fields))]
    kind = make({name: type_ for name, (type_, _) in zip(names, fields, strict=True)})
    value = kind(**{name: data.draw(values) for name, (_, values) in zip(names, fields, strict=True)})
    try:
        stored = encode_value(value)
    except InvalidValueError:
        return
    found = decode_value(stored, kind)
    assert found == value
    assert type(found) is kind


def test_a_class_made_at_run_time_is_decoded() -> None:
    """Nothing is looked up by a name."""
    made = new_class("Made", (Base,))
    assert read_back(made(1)) == made(1)
