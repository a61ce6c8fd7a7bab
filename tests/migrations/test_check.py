"""`check`, `on_mismatch`, and the writes of a state whose schema has types."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, cast
from uuid import uuid4

import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_serializer
from roles import InRole

from lab_state import (
    Config,
    InvalidValueError,
    Manager,
    MemoryCache,
    MemoryStorage,
    Misfit,
    Schema,
    TypeMismatchError,
    read_state,
)
from lab_state._entries import Json
from lab_state._migrations._types import Types
from lab_state.testing import ManualClock


class User(msgspec.Struct):
    name: str
    tags: list[str] = []


class Strict(msgspec.Struct, omit_defaults=True):
    name: str
    age: int = 0
    any: Any = None


class Model(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    inner: dict[str, int] = {}


class Truth(msgspec.Struct, omit_defaults=True):
    flag: Any = False

    def __post_init__(self) -> None:
        self.flag = bool(self.flag)


VALUES: dict[str, Any] = {
    "n": 1,
    "users/a": {"name": "A"},
    "users/b": {"name": 2},
    "users/c": {"name": "C", "tags": ["x", 3]},
    "users/d": {"name": "D"},
    "users/e": "secret",
}
GOOD = {"users/a": User("A"), "users/d": User("D")}
MISFITS = [
    Misfit("users/b", "$.name", "not a `User`: Expected `str`, got `int`"),
    Misfit("users/c", "$.tags[1]", "not a `User`: Expected `str`, got `int`"),
    Misfit("users/e", "$", "not a `User`: Expected `object`, got `str`"),
]


async def test_check(in_role: InRole) -> None:
    """`check` returns each value that is not of the type, with its path, and without the value. Each handle has it."""
    async with in_role(Config("people"), MemoryStorage()) as state:
        await state.set_many(VALUES)
        assert await state.check("users/", type=User) == MISFITS
        assert await state.check("users/", type=User, limit=2) == MISFITS[:2]
        assert await state.namespace("users").check(type=User) == [
            Misfit(wrong.key.removeprefix("users/"), wrong.path, wrong.expected) for wrong in MISFITS
        ]
        assert await state.check("none/", type=User) == []
        assert await state.check(type=Any) == []
        async with state.transaction() as tx:
            tx.delete("users/b")
            assert tx.check("users/", type=User) == MISFITS[1:]
            tx.set("users/b", VALUES["users/b"])
        assert await asyncio.to_thread(state.blocking.check, "users/", type=User) == MISFITS
        for error, arguments in (
            (TypeError, {"limit": None}),
            (ValueError, {"limit": 0}),
            (TypeError, {"type": object()}),
        ):
            with pytest.raises(error):
                await state.check(**cast("dict[str, Any]", {"type": User, **arguments}))


async def test_check_of_many_keys(clock: ManualClock) -> None:
    """`check` leaves out expired keys, and the event loop runs meanwhile. The result is of one moment."""
    async with Manager("people", MemoryStorage(), clock=clock) as state:
        await state.set_many({f"n/{number:05}": number if number % 1_000 else "x" for number in range(5_000)})
        await state.set("n/gone", "x", ttl=1)
        clock.advance(2)
        await state.keys()  # sorts the keys
        checking = asyncio.create_task(state.check("n/", type=int))
        await asyncio.sleep(0)
        await state.set("n/00001", "later")
        assert [wrong.key for wrong in await checking] == [f"n/{number:05}" for number in range(0, 5_000, 1_000)]
        assert not state._core.state.views


async def test_check_of_a_view() -> None:
    """The view of `read_state` has `check` as well."""
    storage = MemoryStorage()
    async with Manager("people", storage) as state:
        await state.set_many(VALUES)
    view = await read_state("people", storage)
    assert await view.check("users/", type=User) == MISFITS


async def test_reads_that_skip(in_role: InRole) -> None:
    """With `on_mismatch="skip"`, a read of many keys leaves out values of other types. A limit does not count them."""
    async with in_role(Config("people"), MemoryStorage()) as state:
        await state.set_many(VALUES)
        assert await state.get_all("users/", type=User, on_mismatch="skip") == GOOD
        assert state.get_all_nowait("users/", type=User, on_mismatch="skip") == GOOD
        assert await state.get_many(VALUES, type=User, on_mismatch="skip") == GOOD
        assert state.get_many_nowait(VALUES, type=User, on_mismatch="skip") == GOOD
        assert [item async for item in state.items("users/", type=User, on_mismatch="skip")] == list(GOOD.items())
        for limit in (1, 2, 3):
            first = dict(list(GOOD.items())[:limit])
            assert await state.get_all("users/", type=User, limit=limit, on_mismatch="skip") == first
            assert state.get_all_nowait("users/", type=User, limit=limit, on_mismatch="skip") == first
            items = state.items("users/", type=User, limit=limit, on_mismatch="skip")
            assert [item async for item in items] == list(first.items())
        last = await state.get_all("users/", type=User, limit=1, reverse=True, on_mismatch="skip")
        assert last == {"users/d": User("D")}
        async with state.transaction() as tx:
            assert tx.get_all("users/", type=User, on_mismatch="skip") == GOOD
            assert dict(tx.items("users/", type=User, on_mismatch="skip")) == GOOD


async def test_reads_that_raise(in_role: InRole) -> None:
    """By default such a value raises an error. Another `on_mismatch` is refused."""
    async with in_role(Config("people"), MemoryStorage()) as state:
        await state.set_many(VALUES)
        bad: Any = "drop"
        calls: list[Callable[..., Awaitable[object]]] = [
            lambda **more: state.get_all("users/", type=User, **more),
            lambda **more: state.get_many(VALUES, type=User, **more),
            lambda **more: anext(state.items("users/b", type=User, **more)),
        ]
        for call in calls:
            with pytest.raises(TypeMismatchError):
                await call()
            with pytest.raises(ValueError, match='must be "raise" or "skip"'):
                await call(on_mismatch=bad)


async def test_many_values_that_are_skipped() -> None:
    """A read of many keys in steps leaves them out, too, with and without a limit."""
    async with Manager("people", MemoryStorage()) as state:
        await state.set_many({f"n/{number:05}": [number] if number % 2 else number for number in range(4_000)})
        odd = {f"n/{number:05}": [number] for number in range(1, 4_000, 2)}
        assert await state.get_all("n/", type=list[int], on_mismatch="skip") == odd
        some = await state.get_all("n/", type=list[int], limit=1_500, on_mismatch="skip")
        assert some == dict(list(odd.items())[:1_500])
        async with state.transaction() as tx:
            assert tx.get_all("n/", type=list[int], limit=1_500, on_mismatch="skip") == some


@pytest.mark.parametrize("local", [False, True])
async def test_a_reader_skips(local: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    """The reader of a mirror takes the same argument."""
    cache = MemoryCache()
    async with Manager("people", MemoryStorage(), cache) as state:
        revision = await state.set_many(VALUES)
        await state.flush()
        async with cache.reader("people", local=local) as reader:
            await reader.wait_revision(revision, timeout=5)
            assert await reader.get_all("users/", type=User, on_mismatch="skip") == GOOD
            assert await reader.get_many(VALUES, type=User, on_mismatch="skip") == GOOD
            assert [item async for item in reader.items("users/", type=User, on_mismatch="skip")] == list(GOOD.items())
            with pytest.raises(TypeMismatchError):
                await reader.get_many(VALUES, type=User)
            with pytest.raises(TypeMismatchError):
                await reader.get_all("users/", type=User)


async def test_the_limit_of_a_check() -> None:
    """It is a number. The messages do not offer `None`, which `check` does not take."""
    wrong: Any = None
    async with Manager("people", MemoryStorage()) as state:
        with pytest.raises(TypeError, match=r"^limit must be an int of 1 or more, not NoneType$"):
            await state.check(type=int, limit=wrong)
        with pytest.raises(ValueError, match=r"^limit must be 1 or more, not 0$"):
            await state.check(type=int, limit=0)


async def test_typed_writes() -> None:
    """Under the prefixes of `types` each write refuses a value that is not of its type. Other keys take any value."""
    schema = Schema(1, types={"users/": User, "n": int})
    async with Manager("people", MemoryStorage(), schema=schema) as state:
        await state.set_many({"users/a": User("A"), "users/b": {"name": "B", "more": 1}, "other": "x", "n": 1})
        await state.set("users/a", User("A"), ttl=10)
        refused: list[tuple[Callable[[], Awaitable[object]], str]] = [
            (lambda: state.set("users/a", {"name": 1}), "$.name"),
            (lambda: state.set("users/a", {"name": 1}, ttl=5), "$.name"),
            (lambda: state.set_many({"users/c": User("C"), "users/a": {"name": "A", "tags": [1]}}), "$.tags[0]"),
            (lambda: state.set_many({f"users/{n}": {"name": n} for n in range(1_500)}), "$.name"),
            (lambda: state.set_if_absent("users/c", "text"), "$"),
            (lambda: state.update("users/a", lambda user: {**user, "name": None}), "$.name"),
            (lambda: state.get_or_set("users/c", lambda: {"name": 1}), "$.name"),
            (lambda: state.incr("n", 0.5), "$"),
            (lambda: state.namespace("users").set("a", {}), "$"),
            (lambda: asyncio.to_thread(state.blocking.set, "users/a", {}), "$"),
        ]
        for call, path in refused:
            with pytest.raises(InvalidValueError, match="does not fit the schema: not a") as error:
                await call()
            assert error.value.path == path
        with pytest.raises(InvalidValueError, match="the value of 'users/a' does not fit the schema: not a `User`"):
            state.set_nowait("users/a", {})
        for handle, key in ((state, "users/a"), (state.namespace("users"), "a")):
            with pytest.raises(InvalidValueError, match=r"^the value of 'users/a' does not fit the schema"):
                await handle.set_many({key: {}})
        async with state.transaction() as tx:
            for ttl in (None, 5):
                with pytest.raises(InvalidValueError, match="does not fit the schema"):
                    tx.set("users/a", {}, ttl=ttl)
            with pytest.raises(InvalidValueError, match="does not fit the schema"):
                tx.update("users/a", lambda _: {})
            tx.set("users/d", User("D"))
        assert state.metrics().operations[("set", "error")] == 16
        assert await state.keys() == ["n", "other", "users/a", "users/b", "users/d"]
        async for pair in state.items():  # while an iterator is open, writes keep the old values for it
            await state.set("other", pair[0])
        assert await state.get("other") == "users/d"


@pytest.mark.parametrize(
    ("value", "type_", "path"),
    [
        ({"name": "A"}, Strict, None),
        ({"name": "A", "age": 0, "any": None}, Strict, None),
        ({"name": "A", "more": 1}, Strict, "$.more"),
        ([{"name": "A"}, {"name": "B", "a b": 1}], list[Strict], "$[1]['a b']"),
        ({"x": {"name": "A", "more": {}}}, dict[str, Strict], "$.x.more"),
        ({"name": "A", "inner": {"a": 1}}, Model, None),
        ({"name": "A", "extra": 1}, Model, "$.extra"),
        ({"any": "thing"}, dict[str, Any], None),
        ({"flag": False}, Truth, None),
        ([1, 1], set[int], None),
        (5, int, None),
    ],
)
def test_members_that_a_type_does_not_know(value: Any, type_: Any, path: str | None) -> None:
    """A strict check finds members that a read ignores. A known member with its default value is none of them."""
    stored: Any = value if isinstance(value, int) else msgspec.json.encode(value)
    found = Types({"": type_}, strict=True).misfit("key", stored)
    assert (None if found is None else found.path) == path
    if found is not None:
        assert found.expected == "the type does not know this member"
    assert Types({"": type_}, strict=False).misfit("key", stored) is None
    assert Types({"other": type_}, strict=True).misfit("key", stored) is None


class Aliased(BaseModel):
    any: Any = Field(alias="theAny", default=None)
    texts: dict[str, str] = Field(alias="theTexts", default={})
    model: Model | None = Field(alias="theModel", default=None)
    made: str = Field(default_factory=lambda: uuid4().hex)


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (b'{"theAny":{"a":1}}', None),
        (b'{"theTexts":{}}', None),
        (b'{"theTexts":{"a":"b"}}', None),
        (b'{"theModel":{"name":"A"}}', None),
        (b'{"theAny":{},"more":1}', "$.more"),
    ],
)
def test_members_that_a_type_reads_under_an_alias(data: bytes, path: str | None) -> None:
    """A strict check takes a member that the type reads under an alias, of each type, and finds one that it does not read."""
    found = Types({"": Aliased}, strict=True).misfit("key", Json(data))
    assert (None if found is None else found.path) == path


def test_a_key_that_is_written_in_another_form() -> None:
    """A strict check takes a member whose key the type reads, and writes in another form."""
    data = Json(b'{"2026-01-01T00:00:00+00:00":1}')
    assert Types({"": dict[datetime, Any]}, strict=True).misfit("key", data) is None


class Secret(BaseModel):
    word: SecretStr


class Unwritable(BaseModel):
    word: str = ""

    @field_serializer("word")
    def _refuse(self, word: str) -> str:
        raise OSError(word)


class ProbeRefusing(BaseModel):
    word: Any = Field(alias="theWord", default=1)

    @field_serializer("word")
    def _refuse(self, word: Any) -> Any:
        if word != 1:
            raise OSError(word)
        return word


@pytest.mark.parametrize(
    ("type_", "path", "text"), [(Secret, "$.word", "as asterisks"), (Unwritable, "$", "raises Pyd")]
)
def test_a_type_that_cannot_write_what_it_reads(type_: Any, path: str, text: str) -> None:
    """A strict check reports such a value like other values that do not fit. The text does not have the value."""
    found = Types({"": type_}, strict=True).misfit("key", Json(b'{"word":"5678"}'))
    assert found is not None
    assert (found.key, found.path, text in found.expected, "5678" in found.expected) == ("key", path, True, False)
    assert Types({"": type_}, strict=False).misfit("key", Json(b'{"word":"5678"}')) is None


class Large:
    @classmethod
    def model_validate_json(cls, _data: bytes, **_options: object) -> Large:
        return cls()

    def model_dump_json(self, **_options: object) -> str:
        raise MemoryError


def test_a_value_that_needs_too_much_memory() -> None:
    """A lack of memory is raised to the caller. It does not say that the value is wrong."""
    with pytest.raises(MemoryError):
        Types({"": Large}, strict=True).misfit("key", Json(b"{}"))


def test_a_serializer_that_refuses_the_probe() -> None:
    """A member is known if the type cannot write another value in its place."""
    assert Types({"": ProbeRefusing}, strict=True).misfit("key", Json(b'{"theWord":1}')) is None


class Vanishing(msgspec.Struct):
    items: list[dict[str, int]] = []

    def __post_init__(self) -> None:
        self.items = (
            [] if any("$" in text for item in self.items for text in item) else [dict(list(self.items[0].items())[:1])]
        )


def test_a_part_that_vanishes() -> None:
    """A type that reads a list as another list does not make the check fail."""
    stored: Any = b'{"items":[{"a":1,"b":2}]}'
    found = Types({"": Vanishing}, strict=True).misfit("key", stored)
    assert found is None
