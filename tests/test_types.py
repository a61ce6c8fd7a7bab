"""`_types` and `_models`: what a value is read as, by msgspec or by Pydantic; types that cannot be decoded."""

from __future__ import annotations

import dataclasses
import ipaddress
import pathlib
import sys
import traceback
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag
from itertools import count
from typing import Annotated, Any, Literal, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pydantic.v1
import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, TypeAdapter

from lab_state import InvalidValueError, Manager, MemoryCache, MemoryStorage, TypeMismatchError
from lab_state._types import decode_value
from lab_state._values import encode_value

SECRET = "hunter2"


def kept(value: Any, type_: Any = None) -> Any:
    """Return what is read back."""
    return decode_value(encode_value(value), type(value) if type_ is None else type_)


def refused(value: object) -> InvalidValueError:
    with pytest.raises(InvalidValueError) as caught:
        encode_value(value)
    return caught.value


def no_type(type_: Any) -> str:
    with pytest.raises(TypeError) as caught:
        decode_value(encode_value([1]), type_)
    assert caught.value.__suppress_context__
    return str(caught.value)


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    at: datetime = datetime(2026, 1, 2, tzinfo=UTC)


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"


@pydantic.dataclasses.dataclass
class PydanticPoint:
    x: Annotated[int, Field(gt=0)]


class StructA(msgspec.Struct):
    x: int


class StructB(msgspec.Struct):
    y: int


class TaggedA(msgspec.Struct, tag=True):
    x: int


class TaggedB(msgspec.Struct, tag=True):
    y: int


@dataclasses.dataclass
class DataA:
    x: int


@dataclasses.dataclass
class DataB:
    y: int


class Unknown:
    """Nothing that anything decodes."""


class HoldsUnion(msgspec.Struct):
    pet: Cat | Dog


class HoldsUnknown(msgspec.Struct):
    parts: list[Unknown]


# Types with something of Pydantic's


Discriminated = Annotated[Cat | Dog, Field(discriminator="kind")]
Small = Annotated[int, Field(lt=10)]


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (Dog(), Cat | Dog),
        (Dog(), Discriminated),
        ([Dog(), Cat()], list[Cat | Dog]),
        ({"a": [Cat()]}, dict[str, list[Discriminated]]),
        (Dog(), Dog | int),
        (5, Dog | int),
        (None, Cat | Dog | None),
        (Dog(), TypeAdapter(Cat | Dog)),
        ([1, 2], TypeAdapter(list[int])),
        (5, Small),
        (PydanticPoint(1), PydanticPoint),
        ([PydanticPoint(1)], list[PydanticPoint]),
        ((Dog(), b"\xff"), tuple[Dog, bytes]),
        ([Dog(), timedelta(seconds=1.5), Decimal("1.10")], tuple[Dog, timedelta, Decimal]),
        ({UUID(int=7): Dog()}, dict[UUID, Dog]),
    ],
    ids=count(),
)
def test_a_type_with_something_of_pydantics_is_decoded_by_it(value: Any, type_: Any) -> None:
    """Unions, discriminators, constraints, Pydantic dataclasses and type adapters are decoded."""
    found = decode_value(encode_value(value), type_)
    assert (list(found) if isinstance(value, list) else found) == value


def test_a_type_of_pydantics_own_is_decoded() -> None:
    """`HttpUrl` and the like are decoded from their text, alone, in a list and in a field of a Struct."""
    url = pydantic.HttpUrl("https://example.org/")

    class Page(msgspec.Struct):
        url: pydantic.HttpUrl

    assert decode_value(encode_value("https://example.org/"), pydantic.HttpUrl) == url
    assert decode_value(encode_value(["https://example.org/"]), list[pydantic.HttpUrl]) == [url]
    assert decode_value(encode_value({"url": "https://example.org/"}), Page).url == url


@pytest.mark.parametrize(
    ("value", "type_", "path"),
    [
        ({"kind": SECRET}, Cat | Dog, "$.Cat.kind"),
        ({"kind": SECRET}, Discriminated, "$"),
        ([{"kind": SECRET}], list[Discriminated], "$[0]"),
        (11, Small, "$"),
        ({"x": 0}, PydanticPoint, "$.x"),
        (SECRET, TypeAdapter(list[int]), "$"),
        (SECRET, pydantic.HttpUrl, "$"),
    ],
    ids=count(),
)
def test_a_mismatch_of_pydantics_has_the_path_and_not_the_value(value: Any, type_: Any, path: str) -> None:
    """What Pydantic does not take is a mismatch of the value, which is nowhere to be seen."""
    with pytest.raises(TypeMismatchError) as caught:
        decode_value(encode_value(value), type_)
    assert caught.value.path == path
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# Types that cannot be decoded


@pytest.mark.parametrize(
    ("type_", "advice"),
    [
        (StructA | StructB, "give the Structs of the union tags: class A(msgspec.Struct, tag=True)"),
        (list[StructA | StructB], "give the Structs of the union tags"),
        (DataA | DataB, "make them msgspec.Structs with tag=True, or Pydantic models"),
        (datetime | date, "JSON cannot tell them apart"),
        (HoldsUnion, "wrap the union: pydantic.RootModel[A | B]"),
        (Cat | StructA, "Unable to generate pydantic-core schema"),
        (HoldsUnknown, "neither msgspec nor Pydantic decodes the class Unknown"),
        (Iterable[int], "neither msgspec nor Pydantic decodes the class Iterable"),
        ("int", "is not supported"),
        (list["Nowhere"], "Nowhere"),  # type: ignore[name-defined]  # noqa: F821 -- that is the point
    ],
    ids=count(),
)
def test_a_type_that_cannot_be_decoded_is_a_type_error_that_says_what_to_write(type_: Any, advice: str) -> None:
    """It says which type it is, and what to write in its place."""
    message = no_type(type_)
    assert "is not a type that can be decoded" in message
    assert advice in message


def test_tagged_structs_are_told_apart() -> None:
    """What the message says to write works."""
    assert kept(TaggedB(1), TaggedA | TaggedB) == TaggedB(1)


class Undefined(BaseModel):
    x: Later  # type: ignore[name-defined]  # noqa: F821 -- that is the point


class HoldsUndefined(msgspec.Struct):
    x: Undefined


def test_what_is_not_defined_to_its_end_is_a_type_error() -> None:
    """A model, a Struct with one, and a type adapter that name something that does not exist."""
    adapter: Any = cast("Any", TypeAdapter)("list[Later]", config=ConfigDict(defer_build=True))
    for type_ in (Undefined, HoldsUndefined, adapter, list[Undefined]):
        assert "is not a type that can be decoded" in no_type(type_)


def test_a_type_adapter_that_is_built_late_is_decoded() -> None:
    """A type adapter that defers its building is built."""
    adapter = TypeAdapter(list[int], config=ConfigDict(defer_build=True))
    assert decode_value(encode_value([1]), adapter) == [1]


Read = Callable[[Manager, Any], Any]

READS: dict[str, Read] = {
    "get": lambda state, type_: state.get("pet", type=type_),
    "get of a missing key": lambda state, type_: state.get("none", None, type=type_),
    "get_many": lambda state, type_: state.get_many(["pet"], type=type_),
    "get_many of no key": lambda state, type_: state.get_many([], type=type_),
    "get_all": lambda state, type_: state.get_all(type=type_),
    "get_all of no key": lambda state, type_: state.get_all("none", type=type_),
    "pop": lambda state, type_: state.pop("pet", type=type_),
    "update": lambda state, type_: state.update("pet", lambda pet: pet, type=type_),
    "update of a missing key": lambda state, type_: state.update("none", lambda _: 1, 1, type=type_),
    "get_or_set": lambda state, type_: state.get_or_set("pet", dict, type=type_),
    "get_or_set of a missing key": lambda state, type_: state.get_or_set("none", dict, type=type_),
    "a namespace": lambda state, type_: state.namespace("a").get("none", None, type=type_),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("type_", [StructA | StructB, "int", complex], ids=str)
async def test_each_call_refuses_a_type_before_it_looks(read: Read, type_: Any) -> None:
    """Whatever is stored, and where nothing is, the call raises `TypeError`, and changes nothing."""
    async with Manager("x", MemoryStorage()) as state:
        revision = await state.set("pet", {"x": "precious"})
        with pytest.raises(TypeError, match="is not a type that can be decoded"):
            await read(state, type_)
        assert (state.revision, await state.get_all()) == (revision, {"pet": {"x": "precious"}})


async def test_an_entry_refuses_a_type_when_it_is_made() -> None:
    """`entry()` raises, with a default too, and before `start()`."""
    state = Manager("x", MemoryStorage())
    for type_ in (StructA | StructB, "int", complex):
        for default in ({}, {"default": None}, {"default": 1}):
            with pytest.raises(TypeError, match="is not a type that can be decoded"):
                state.entry("pet", type_, **default)


async def test_a_reader_refuses_a_type_before_it_looks() -> None:
    """So do the readers of a mirror."""
    cache = MemoryCache()
    async with Manager("x", MemoryStorage(), cache), cache.reader("x") as reader:
        for read in (reader.get("none", None, type=complex), reader.get_many([], type=complex)):
            with pytest.raises(TypeError, match="is not a type that can be decoded"):
                await read
        with pytest.raises(TypeError, match="is not a type that can be decoded"):
            await reader.get_all(type=complex)


async def test_an_entry_of_a_type_adapter() -> None:
    """An entry takes a type adapter, and `None` where that is the default."""
    async with Manager("x", MemoryStorage()) as state:
        pets: Any = state.entry("pets", TypeAdapter(list[Cat | Dog]), default=None)
        assert await pets.get() is None
        await pets.set(None)
        assert await pets.get() is None
        await pets.set([Dog()])
        assert await pets.get() == [Dog()]
        assert await pets.update(lambda old: [*old, Cat()]) == [Dog(), Cat()]
        assert "TypeAdapter" in repr(pets)
        with pytest.raises(TypeMismatchError, match="TypeAdapter"):
            await state.get("pets", type=TypeAdapter(int))


async def test_good_data_is_never_overwritten_for_its_type() -> None:
    """A migration that begins at `TypeMismatchError` does not begin for a type that cannot be decoded."""
    async with Manager("x", MemoryStorage()) as state:
        await state.set("u", {"y": "precious"})
        with pytest.raises(TypeError):
            try:
                await state.get("u", type=StructA | StructB)
            except TypeMismatchError:
                await state.set("u", {"x": 0})
        assert await state.get("u") == {"y": "precious"}


# Paths, addresses, deques and dicts


@pytest.mark.parametrize(
    "value",
    [
        pathlib.Path("/srv/ä b"),
        pathlib.PurePosixPath("a/b"),
        pathlib.PureWindowsPath("C:\\a"),
        ipaddress.ip_address("10.0.0.1"),
        ipaddress.ip_address("::1"),
        ipaddress.ip_network("10.0.0.0/8"),
        ipaddress.ip_network("2001:db8::/32"),
        ipaddress.ip_interface("10.0.0.1/8"),
        ipaddress.ip_interface("2001:db8::1/32"),
        deque([1, "a", None]),
        OrderedDict(b=1, a=2),
        defaultdict(int, a=1),
        Counter("aab"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_msgspec_does_not_know_comes_back(value: Any) -> None:
    """Alone, in a list, and as a field of a Struct."""
    holder = msgspec.defstruct("Holder", [("x", type(value))])
    assert kept(value) == value
    assert type(kept(value)) is type(value)
    assert kept([value], list[type(value)]) == [value]  # type: ignore[misc]
    assert kept(holder(value)) == holder(value)
    assert kept(None, type(value) | None) is None


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (deque([date(2026, 1, 2)]), deque[date]),
        (OrderedDict([(1, Dog())]), OrderedDict[int, Dog]),
        (defaultdict(list, {1: [2]}), defaultdict[int, list[int]]),
        (Counter([1, 1, 2]), Counter[int]),
        ({pathlib.Path("/a"): 1}, dict[pathlib.Path, int]),
        (pathlib.PosixPath("/a"), pathlib.Path),
    ],
    ids=count(),
)
def test_their_parts_have_types_too(value: Any, type_: Any) -> None:
    """What is inside of brackets is the type of the parts."""
    found = kept(value, type_)
    assert found == value
    assert isinstance(found, type(value))


class OwnDict(dict[str, Any]):
    pass


class OwnList(list[Any]):
    pass


def test_subclasses_of_dict_and_list_are_made_from_one() -> None:
    """A class of one's own that can be made of a plain dict or list comes back as itself."""
    assert type(kept(OwnDict(a=1))) is OwnDict
    assert type(kept(OwnList([1]))) is OwnList


@pytest.mark.parametrize(
    ("value", "type_", "path"),
    [
        ([5], list[pathlib.Path], "$[0]"),
        (SECRET, ipaddress.IPv4Address, "$"),
        ({"a": [1, SECRET]}, dict[str, deque[int]], "$[...][1]"),
        (SECRET, deque, "$"),
        ([[1, SECRET]], list[deque[int]], "$[0][1]"),
    ],
    ids=count(),
)
def test_a_mismatch_in_them_has_the_path(value: Any, type_: Any, path: str) -> None:
    """A value that does not fit is a mismatch with its path, without the value."""
    with pytest.raises(TypeMismatchError) as caught:
        decode_value(encode_value(value), type_)
    assert caught.value.path == path
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_path_that_is_no_text_is_refused() -> None:
    """A path with bytes that are not UTF-8 has no text that JSON could hold."""
    error = refused({"a": pathlib.Path("/x/\udcff")})
    assert (error.path, "whose text is not UTF-8" in str(error)) == ("$.a", True)


def test_parts_of_a_deque_are_looked_at() -> None:
    """NaN, two keys that are one, unknown classes and cycles in a deque are refused with their path."""
    assert refused(deque([1, float("nan")])).path == "$[1]"
    assert refused([deque([{1: 1, "1": 2}])]).path == "$[0][0]"
    assert refused(deque([1, Unknown()])).path == "$[1]"
    assert refused(OrderedDict(a=1, b=Unknown())).path == "$.b"
    cycle: deque[Any] = deque()
    cycle.append(cycle)
    assert "contains itself" in str(refused(cycle))


# Pydantic models


class ByAlias(BaseModel):
    n: int = Field(0, serialization_alias="number")


class OldNames(BaseModel):
    n: int = Field(0, validation_alias=AliasChoices("number", AliasPath("counts", 0)))


class Required(BaseModel, extra="forbid"):
    n: int = Field(validation_alias="number")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=lambda name: name.upper())
    first: ByAlias
    others: list[OldNames] = []


@pytest.mark.parametrize(
    "value",
    [
        ByAlias(n=5),
        OldNames.model_validate({"number": 5}),
        Required.model_validate({"number": 1}),
        Camel.model_validate({"FIRST": {"n": 1}, "OTHERS": [{"counts": [3]}]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_alias_comes_back(value: Any) -> None:
    """Aliases for one way only, with and without a default, at any depth."""
    assert kept(value) == value
    assert kept([value], list[type(value)]) == [value]  # type: ignore[misc]


class Animal(BaseModel):
    name: str


class Horse(Animal):
    speed: int = 0


class Farm(BaseModel):
    animals: list[Animal]
    by_name: dict[str, Animal] = {}


class Showing(BaseModel):
    animals: tuple[pydantic.SerializeAsAny[Animal], ...]


class Flags(Flag):
    R = 1
    W = 2


class Rights(BaseModel):
    d: dict[Flags, int]


class Lossy(BaseModel):
    a: int = 0
    b: list[int] = [1]

    @pydantic.field_serializer("b")
    def short(self, value: list[int]) -> list[int]:
        return value[:1]


class Eyeless:
    """Equal to nothing but itself."""

    def __init__(self, n: int) -> None:
        self.n = n


class Opaque(BaseModel, arbitrary_types_allowed=True):
    x: Annotated[
        Eyeless,
        pydantic.PlainSerializer(lambda x: {"n": [x.n]}, return_type=dict),
        pydantic.PlainValidator(lambda x: Eyeless(x["n"][0] + 1)),
    ]


class Faithful(BaseModel, arbitrary_types_allowed=True):
    x: Annotated[
        Eyeless,
        pydantic.PlainSerializer(lambda x: {"n": x.n}, return_type=dict),
        pydantic.PlainValidator(lambda x: Eyeless(x["n"]) if isinstance(x, dict) else x),
    ]


class Extra(BaseModel, extra="allow"):
    @pydantic.model_serializer
    def short(self) -> dict[str, Any]:
        return {"a": [1]}


class Hashed(BaseModel):
    h: str

    @pydantic.field_validator("h")
    @classmethod
    def hash(cls, value: str) -> str:
        return f"#{value}"


class Crashes(BaseModel):
    x: int

    @pydantic.field_validator("x")
    @classmethod
    def check(cls, value: int) -> int:
        if value < 0:
            raise RuntimeError(SECRET)
        return value


class Blob(BaseModel):
    name: str = ""
    blob: bytes


class OptionalFloat(BaseModel):
    x: float | None


class Odd(BaseModel):
    at: datetime


ODD = timezone(timedelta(hours=1, seconds=30))


@pytest.mark.parametrize(
    ("value", "path", "why"),
    [
        (Farm(animals=[Animal(name="a"), Horse(name="h", speed=9)]), "$.animals[1]", "read back as Animal"),
        (Farm(animals=[], by_name={"h": Horse(name="h")}), "$.by_name.h", "read back as Animal"),
        (Showing(animals=(Horse(name="h", speed=9),)), "$.animals[0]", "read back as Animal"),
        (Rights(d={Flags.R | Flags.W: 1}), "$.d", "it cannot read what it writes"),
        (Lossy(b=[1, 2]), "$.b", "read back changed"),
        (Opaque.model_construct(x=Eyeless(1)), "$.x", "read back changed"),
        (Extra.model_validate({"a": [1, 2]}), "$.a", "read back changed"),
        (Hashed(h="a"), "$.h", "read back changed"),
        (Crashes.model_construct(x=-1), "$", "its own serializer failed with RuntimeError"),
        (Crashes.model_construct(x="a"), "$.x", "it cannot read what it writes"),
        (Blob(blob=b"\xff"), "$.blob", "set ser_json_bytes and val_json_bytes to 'base64'"),
        (OptionalFloat(x=float("nan")), "$.x", "NaN and infinity"),
        (Odd(at=datetime(2020, 1, 1, tzinfo=ODD)), "$.at", "read back changed"),
    ],
    ids=count(),
)
def test_a_model_that_would_come_back_changed_is_refused(value: Any, path: str, why: str) -> None:
    """`set` reads back what a model writes, and refuses it with the path where it is another value."""
    error = refused(value)
    assert error.path.startswith(path)
    assert why in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert refused({"a": [value]}).path.startswith(f"$.a[0]{path.removeprefix('$')}")


class Hidden(BaseModel):
    name: str
    password_hash: str = Field("", exclude=True)
    pet: Animal | None = Field(None, exclude=True)
    _cached: int = pydantic.PrivateAttr(0)


def test_what_a_model_does_not_write_comes_back_as_its_default() -> None:
    """Excluded fields and private attributes are not kept; the docs list it."""
    value = Hidden(name="ann", password_hash="x", pet=Horse(name="h"))
    value._cached = 5
    assert kept(value) == Hidden.model_validate({"name": "ann"})


def test_what_cannot_be_compared_is_compared_by_its_json() -> None:
    """An object without `==` in a model is kept if it writes the same again."""
    assert kept(Faithful(x=Eyeless(3))).x.n == 3


def test_an_int_of_too_many_digits_in_a_model_is_refused() -> None:
    """A model writes it, and nothing would read it, `get_all` of other keys neither."""

    class Key(BaseModel):
        n: int

    assert refused(Key(n=10**4300)).path == "$.n"
    assert refused({"a": Key(n=10**4300)}).path == "$.a.n"


def test_an_int_of_too_many_digits_is_refused_where_pythons_limit_was_lifted() -> None:
    """The limit of msgspec stays, whatever that of Python is."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        assert refused(10**5000).path == "$"
        assert refused([1, 10**5000]).path == "$[1]"
        assert kept(["1" * 5000]) == ["1" * 5000]
    finally:
        sys.set_int_max_str_digits(before)


# Messages


def numpy_class(name: str, ndim: int, plain: object) -> object:
    """Return an object like those of numpy, which is not needed for this."""
    return type(name, (), {"__module__": "numpy", "ndim": ndim, "item": lambda _: plain})()


class OldModel(pydantic.v1.BaseModel):
    a: int = 1


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        (numpy_class("bool", 0, True), "$", "the class numpy.bool cannot be kept: make it a plain bool by .item()"),
        (numpy_class("int64", 0, 5), "$", "the class int64 cannot be kept: make it a plain int by .item()"),
        (numpy_class("ndarray", 1, None), "$", "the class ndarray cannot be kept: use .tolist()"),
        ({"a\ud800": 1}, "$", "a dict with the key 'a\\ud800' cannot be kept: it has a lone surrogate"),
        ({"x": {None: 1}}, "$.x", "a dict with a key of the class NoneType cannot be kept"),
        (OldModel(), "$", "OldModel is a model of Pydantic 1, which cannot be kept: keep its dict()"),
        (pydantic.SecretStr(SECRET), "$", "would be kept as asterisks"),
        (pydantic.HttpUrl("https://example.org"), "$", "the class HttpUrl cannot be kept"),
    ],
    ids=count(),
)
def test_a_message_says_what_to_keep_in_its_place(value: object, path: str, message: str) -> None:
    """Which class it is, with its module where the name is that of a built-in one, and what to do."""
    error = refused(value)
    assert (error.path, message in str(error)) == (path, True), str(error)
    assert SECRET not in str(error)


def test_a_model_below_128_levels_is_too_deep() -> None:
    """A model is a level like a dict, whatever is in it."""
    value: Any = Dog()
    for _ in range(128):
        value = [value]
    assert str(refused(value)).startswith("more than 128 levels of nesting cannot be kept")


class NoMemory(BaseModel):
    @classmethod
    def model_rebuild(cls, **_: object) -> bool:
        raise MemoryError


def test_a_lack_of_memory_is_not_about_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised as it is."""
    monkeypatch.setattr(NoMemory, "__pydantic_complete__", False)
    with pytest.raises(MemoryError):
        decode_value(encode_value([1]), NoMemory)


# Other classes


class Planet(Enum):
    EARTH = (5.9, 6.3)


class Level(Enum):
    LOW = 1
    HIGH = "high"


@dataclasses.dataclass
class Init:
    a: int
    seed: dataclasses.InitVar[int] = 0


@attrs.define
class Token:
    user: str
    _secret: str = ""


class OddStruct(msgspec.Struct):
    level: Level | None = None


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Planet.EARTH, "Enums must contain either all str or all int"),
        (Level.LOW, "Enums must contain either all str or all int"),
        (Init(1), "InitVar"),
        (Token("ann", "x"), "does not write its attribute `_secret`"),
        (OddStruct(), "Enums must contain either all str or all int"),
    ],
    ids=count(),
)
def test_an_object_that_would_never_be_read_is_refused(value: object, why: str) -> None:
    """`set` refuses it, and says why, each time."""
    for _ in range(2):
        error = refused(value)
        assert (error.path, why in str(error)) == ("$", True)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (datetime(2020, 1, 1, tzinfo=ODD), "$"),
        (datetime(2020, 1, 1, tzinfo=timezone(timedelta(seconds=30))), "$"),
        (datetime(1880, 1, 1, tzinfo=ZoneInfo("Europe/Amsterdam")), "$"),
        (time(12, tzinfo=ODD), "$"),
        (time(12, tzinfo=ZoneInfo("Europe/Berlin")), "$"),
        ([1, datetime(2020, 1, 1, tzinfo=ODD)], "$[1]"),
        ({"a": -1, "b": {"at": datetime(2020, 1, 1, tzinfo=ODD)}}, "$.b.at"),
        (StructA([time(12, tzinfo=ZoneInfo("Europe/Berlin"))]), "$.x[0]"),  # type: ignore[arg-type]
        ({"at": time(12, tzinfo=ZoneInfo("Europe/Berlin"))}, "$.at"),
        ([time(12, 0, 0, 7, tzinfo=ODD)], "$[0]"),
        ({"at": datetime(2020, 1, 1, tzinfo=timezone(timedelta(seconds=30)))}, "$.at"),
        ([datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=timezone(timedelta(seconds=-29)))], "$[1]"),
        ({"text": "x" * 400, "at": [time(12, tzinfo=ODD)]}, "$.at[0]"),
        ({1: datetime(2020, 1, 1, tzinfo=timezone(timedelta(seconds=30)))}, "$[1]"),
        ([{time(12, tzinfo=ODD): 1}], "$[0][datetime.time(12, 0, tzinfo="),
    ],
    ids=count(),
)
async def test_a_time_that_would_be_another_one_is_refused(value: object, path: str) -> None:
    """An offset with seconds, and a time of day with a zone, have no form in JSON that msgspec reads."""
    assert refused(value).path.startswith(path)
    async with Manager("x", MemoryStorage()) as state:
        with pytest.raises(InvalidValueError) as caught:
            await state.set("k", value)
        assert caught.value.path.startswith(path)


@pytest.mark.parametrize(
    "value",
    [
        datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=-3, minutes=-30))),
        datetime(2020, 6, 1, tzinfo=ZoneInfo("Europe/Berlin")),
        datetime(2020, 6, 1),  # noqa: DTZ001 -- a naive one
        time(12, 30, tzinfo=timezone(timedelta(hours=2))),
        time(12, 30, 15, 7),
    ],
    ids=str,
)
def test_other_times_come_back(value: Any) -> None:
    """The same instant, or the same time of day, alone, in a list and beside a number below zero."""
    assert kept(value) == value
    assert kept([-1, value], tuple[int, type(value)]) == (-1, value)  # type: ignore[misc]
    assert kept({"n": -1, "at": value})["n"] == -1


# Defaults of dataclasses


@dataclasses.dataclass
class V2:
    full_name: str = ""
    n: int = 3
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: V2
    at: int = 7


@dataclasses.dataclass(slots=True)
class Slotted:
    a: int = 1


class HoldsData(msgspec.Struct):
    data: V2
    more: dict[str, list[V2]] = {}


@attrs.define
class AttrsHolds:
    data: V2


def test_the_defaults_of_a_dataclass_are_written_again() -> None:
    """What msgspec decodes keeps its defaults on the class; here they are the object's own, at any depth."""
    found = decode_value(encode_value({"name": "Ann"}), V2)
    assert kept(found, Any) == {"full_name": "", "n": 3, "tags": []}
    assert kept(decode_value(encode_value({"inner": {}}), Frozen), Any)["at"] == 7
    assert kept(decode_value(encode_value({"inner": {}}), Frozen), Any)["inner"]["n"] == 3
    assert kept(decode_value(encode_value({}), Slotted), Any) == {"a": 1}
    holder = decode_value(encode_value({"data": {}, "more": {"a": [{}, {"n": 4}]}}), HoldsData)
    assert [part["n"] for part in kept(holder, Any)["more"]["a"]] == [3, 4]
    assert kept(decode_value(encode_value([{"data": {}}]), tuple[AttrsHolds, ...]), Any)[0]["data"]["n"] == 3


async def test_a_typed_update_keeps_the_defaults() -> None:
    """A read as a dataclass that is written back has every field."""
    async with Manager("x", MemoryStorage()) as state:
        await state.set("u", {"name": "Ann"})
        await state.update("u", lambda user: user, type=V2)
        assert await state.get("u") == {"full_name": "", "n": 3, "tags": []}
