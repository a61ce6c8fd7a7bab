"""A `msgspec.Raw`, or a serializer of the caller's, inside of a value: in every call that writes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from key_value.aio.errors import SerializationError
from msgspec import Raw

from lab_state import Config, InvalidValueError, Manager, MemoryCache, MemoryStorage, TypeMismatchError
from lab_state.integrations.key_value import LabStateStore

BODY = b'1],"admin":{"who":"attacker"},"z":[2'


class Dumped:
    """Writes its own JSON, as a Pydantic model may."""

    def model_dump_json(self, **_: object) -> str:
        return BODY.decode()

    def model_dump(self, **_: object) -> object:
        return {}


async def in_transaction(state: Manager, value: object) -> None:
    async with state.transaction() as tx:
        tx.set("note", value)


async def in_transaction_with_ttl(state: Manager, value: object) -> None:
    async with state.transaction() as tx:
        tx.set("note", value, ttl=60)


Write = Callable[[Manager, Any], Coroutine[Any, Any, object]]

WRITES: dict[str, Write] = {
    "set": lambda state, value: state.set("note", value),
    "set with a ttl": lambda state, value: state.set("note", value, ttl=60),
    "set in a namespace": lambda state, value: state.namespace("n").set("note", value),
    "set_many": lambda state, value: state.set_many({"a": 1, "note": value}),
    "set_if_absent": lambda state, value: state.set_if_absent("note", value),
    "get_or_set": lambda state, value: state.get_or_set("note", lambda: value),
    "update": lambda state, value: state.update("note", lambda _: value, 1),
    "update, typed": lambda state, value: state.update("note", lambda _: value, [], type=list[Any]),
    "entry.set": lambda state, value: state.entry("note", list[Any]).set(value),
    "entry.update": lambda state, value: state.entry("note", list[Any], default=[]).update(lambda _: value),
    "transaction": in_transaction,
    "transaction with a ttl": in_transaction_with_ttl,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    "inside", [Raw(BODY), Dumped(), Raw(b"nope"), Raw(b'"\xff"')], ids=["Raw", "serializer", "no JSON", "no UTF-8"]
)
async def test_a_write_refuses_what_reaches_beyond_its_value(write: Write, inside: object) -> None:
    """Each call that writes raises `InvalidValueError`, memory stays as it was, and so does what is stored."""
    storage = MemoryStorage()
    async with Manager(Config(name="x", flush_interval=None), storage) as state:
        before = await state.set("admin", {"who": "root"})
        with pytest.raises(InvalidValueError):
            await write(state, [inside])
        assert (state.revision, await state.get_all()) == (before, {"admin": {"who": "root"}})
    async with Manager("x", storage) as state:
        assert await state.get_all() == {"admin": {"who": "root"}}


async def test_the_key_value_adapter_refuses_a_raw() -> None:
    """The store for py-key-value takes no Raw at all."""
    async with Manager("x", MemoryStorage()) as state:
        with pytest.raises(SerializationError):
            await LabStateStore(state.namespace("mcp")).put("note", {"a": [Raw(BODY)]})
        assert len(state) == 0


async def test_no_reader_sees_a_key_that_was_not_set() -> None:
    """A body that was refused is in no local copy and in no snapshot; one that is JSON is kept as it is."""
    storage, cache = MemoryStorage(), MemoryCache()
    async with Manager("x", storage, cache) as state, cache.reader("x", local=True) as reader:
        await state.set("admin", {"who": "root"})
        with pytest.raises(InvalidValueError) as refused:
            await state.set("note", [Raw(BODY)])
        assert refused.value.path == "$[0]"
        await state.set("note", [Raw(b'{"a" : 1}')])
        await reader.wait_revision(state.revision)
        assert await reader.get_all() == {"admin": {"who": "root"}, "note": [{"a": 1}]}
    async with Manager("x", storage) as state:
        assert await state.get_all() == {"admin": {"who": "root"}, "note": [{"a": 1}]}


async def test_a_number_out_of_range_is_told_by_each_read() -> None:
    """It is JSON, so it is kept; a read without a type says that it cannot be decoded, whichever call it is."""
    async with Manager("x", MemoryStorage()) as state:
        await state.set("far", [Raw(b"1e400")])
        with pytest.raises(TypeMismatchError, match="'far'"):
            await state.get("far")
        with pytest.raises(TypeMismatchError, match="'far'"):
            await state.update("far", len)
