"""py-key-value: the contract of its stores, and what this one adds."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from key_value.aio.adapters.pydantic import PydanticAdapter
from key_value.aio.protocols import AsyncKeyValue
from key_value.aio.protocols.key_value import (
    AsyncCullProtocol,
    AsyncDestroyCollectionProtocol,
    AsyncDestroyStoreProtocol,
    AsyncEnumerateCollectionsProtocol,
    AsyncEnumerateKeysProtocol,
)
from key_value.aio.wrappers.prefix_collections import PrefixCollectionsWrapper
from key_value.aio.wrappers.statistics import StatisticsWrapper
from pydantic import AnyHttpUrl, BaseModel

from lab_state import ClosedError, Config, InvalidKeyError, Manager, MemoryStorage
from lab_state.integrations.key_value import LabStateStore
from lab_state.testing import FaultyStorage, ManualClock

if TYPE_CHECKING:
    from key_value.aio.errors import DeserializationError, InvalidTTLError, SerializationError, StoreConnectionError
else:
    try:
        from key_value.aio.errors import DeserializationError, InvalidTTLError, SerializationError, StoreConnectionError
    except ModuleNotFoundError:  # before 0.4.3
        from key_value.shared.errors import (
            DeserializationError,
            InvalidTTLError,
            SerializationError,
            StoreConnectionError,
        )

ONE, TWO = {"test": "test"}, {"test": "test_2"}


@pytest.fixture
async def state(clock: ManualClock) -> AsyncIterator[Manager]:
    async with Manager("kv", MemoryStorage(), clock=clock) as state:
        yield state


@pytest.fixture
def store(state: Manager) -> LabStateStore:
    return LabStateStore(state.namespace("mcp"))


# The contract


def test_it_is_what_it_claims(store: LabStateStore) -> None:
    """The store is an `AsyncKeyValue`, and has every optional protocol."""
    typed: AsyncKeyValue = store
    assert isinstance(typed, AsyncKeyValue)
    for protocol in (
        AsyncCullProtocol,
        AsyncDestroyCollectionProtocol,
        AsyncDestroyStoreProtocol,
        AsyncEnumerateCollectionsProtocol,
        AsyncEnumerateKeysProtocol,
    ):
        assert isinstance(store, protocol)
    assert repr(store) == "<LabStateStore in <Namespace 'mcp/' of 'kv'>>"


async def test_an_empty_store(store: LabStateStore) -> None:
    """In an empty store, a read returns `None`, there is no ttl, and nothing can be deleted."""
    assert await store.get("key", collection="test") is None
    assert await store.ttl("key", collection="test") == (None, None)
    assert await store.delete("key", collection="test") is False
    assert await store.delete_many(["key", "key_2"], collection="test") == 0
    assert await store.get_many(["key"]) == [None]
    assert await store.ttl_many(["key"]) == [(None, None)]
    assert await store.keys("test") == []
    assert await store.collections() == []


async def test_put_get_delete(store: LabStateStore) -> None:
    """A value can be read until it is replaced or deleted."""
    await store.put("key", ONE, collection="test")
    assert await store.get("key", collection="test") == ONE
    await store.put("key", TWO, collection="test")
    assert await store.get("key", collection="test") == TWO
    assert await store.delete("key", collection="test") is True
    assert await store.delete("key", collection="test") is False
    assert await store.get("key", collection="test") is None


async def test_many(store: LabStateStore) -> None:
    """Many values are stored, read in the given order with `None` for a missing key, and deleted."""
    await store.put_many(["a", "b"], (ONE, TWO), collection="test")
    assert await store.get_many(["b", "missing", "a", "b"], collection="test") == [TWO, None, ONE, TWO]
    assert await store.ttl_many(["a", "missing"], collection="test") == [(ONE, None), (None, None)]
    assert await store.delete_many(["a", "missing", "a"], collection="test") == 1
    assert await store.get_many(["a", "b"], collection="test") == [None, TWO]
    await store.put_many([], [], collection="test")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"null": None, "list": [None], "nested": {"null": None}},
        {"true": True, "false": [False]},
        {"int": 1, "negative": -42, "large": 10**18},
        {"float": 1.0, "large": 1.23456789012345e10},
        {"unicode": "Hello 世界 🌍 émojis", "special": "Line1\nLine2\tTabbed", "long": "a" * 10_000},
        {"12345678-1234-5678-1234-567812345678": "1.0", "1": "null"},
        {"deep": {"deeper": {"deepest": [{"id": 1}, {"id": 2}] * 1000}}},
    ],
    ids=lambda value: next(iter(value), "empty"),
)
async def test_values_survive(store: LabStateStore, value: dict[str, Any]) -> None:
    """Every kind of JSON comes back as it was."""
    await store.put("key", value, collection="test")
    assert await store.get("key", collection="test") == value


@pytest.mark.parametrize(
    "value",
    [
        AnyHttpUrl("https://test.com"),
        dt.datetime(2025, 1, 1, tzinfo=dt.UTC),
        dt.date(2025, 1, 1),
        dt.time(1),
        uuid.UUID("12345678-1234-5678-1234-567812345678"),
        b"bytes",
        {1, 2},
        object(),
        float("nan"),
        float("inf"),
        "\ud800",
    ],
    ids=lambda value: ascii(value) if isinstance(value, str | float) else type(value).__name__,
)
async def test_what_json_cannot_hold_is_refused(store: LabStateStore, state: Manager, value: object) -> None:
    """A value that JSON cannot hold is a `SerializationError`, and the old value stays. Types that only lab_state accepts are refused too."""
    await store.put("key", ONE)
    with pytest.raises(SerializationError):
        await store.put_many(["key", "other"], [TWO, {"value": value}])
    assert await store.get_many(["key", "other"]) == [ONE, None]
    assert await store.put_if_absent("key", ONE) is False


async def test_what_is_too_deep_or_goes_round_is_refused(store: LabStateStore) -> None:
    """Cycles, and deeper nesting than lab_state or Python accept, are a `SerializationError`."""
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"deeper": deep}
    deepest: dict[str, Any] = {}
    for _ in range(100_000):
        deepest = {"deeper": deepest}
    for value in (cycle, deep, deepest):
        with pytest.raises(SerializationError):
            await store.put("key", value)


@pytest.mark.parametrize("value", ["text", None, [1], {1: "int key"}], ids=repr)
async def test_a_value_is_a_mapping_of_strings(store: LabStateStore, value: Any) -> None:
    """A value that is not a mapping of strings is a `TypeError`, as in every store of py-key-value."""
    with pytest.raises(TypeError):
        await store.put("key", value)


async def test_any_mapping_will_do(store: LabStateStore) -> None:
    """A mapping of another type is stored as a `dict`."""
    await store.put("key", MappingProxyType(ONE))
    assert await store.get("key") == ONE


async def test_values_are_copies(store: LabStateStore) -> None:
    """Neither a stored value nor a value that was read shares an object with the store."""
    value: dict[str, Any] = {"list": []}
    await store.put("key", value)
    value["list"].append(1)
    found = await store.get("key")
    assert found == {"list": []}
    found["list"].append(1)
    assert await store.get("key") == {"list": []}


async def test_ttl(store: LabStateStore, clock: ManualClock) -> None:
    """`ttl` returns the remaining time of a value, and the value expires then."""
    await store.put("key", ONE, ttl=100)
    assert await store.ttl("key") == (ONE, 100.0)
    clock.advance(99.5)
    assert await store.ttl_many(["key", "missing"]) == [(ONE, 0.5), (None, None)]
    clock.advance(0.5)
    assert await store.get("key") is None
    assert await store.ttl("key") == (None, None)
    await store.put_many(["key"], [ONE], ttl=1)
    await store.put("key", ONE)
    assert await store.ttl("key") == (ONE, None)
    await store.cull()


@pytest.mark.parametrize(
    "ttl",
    [0, -100, float("nan"), float("inf"), True, "100", [1], 1e300, 10**400, -(10**5000), Decimal("sNaN")],
    ids=[
        *("0", "below 0", "NaN", "infinity", "bool", "str", "list", "1e300"),
        "too large",
        "too many digits",
        "signaling NaN",
    ],
)
async def test_a_bad_ttl_is_refused(store: LabStateStore, ttl: Any) -> None:
    """A bad ttl is an `InvalidTTLError`, and nothing is stored."""
    with pytest.raises(InvalidTTLError):
        await store.put("key", ONE, ttl=ttl)
    with pytest.raises(InvalidTTLError):
        await store.put_if_absent("key", ONE, ttl=ttl)
    assert await store.get("key") is None


async def test_put_many_needs_as_many_values_as_keys(store: LabStateStore) -> None:
    """Different numbers of keys and values are a `ValueError`, and nothing is stored."""
    with pytest.raises(ValueError, match="2 keys were given, and 1 values"):
        await store.put_many(["a", "b"], [ONE])
    assert await store.get("a") is None


async def test_put_if_absent(store: LabStateStore, clock: ManualClock) -> None:
    """One of many concurrent `put_if_absent` calls wins. An expired value counts as absent."""
    won = await asyncio.gather(*(store.put_if_absent("key", {"winner": n}, ttl=10) for n in range(10)))
    assert won == [True] + [False] * 9
    assert await store.ttl("key") == ({"winner": 0}, 10.0)
    clock.advance(10)
    assert await store.put_if_absent("key", TWO)


async def test_concurrent_use(store: LabStateStore) -> None:
    """Tasks with different keys do not disturb each other."""

    async def work(number: int) -> None:
        for i in range(5):
            key = f"{number}_{i}"
            assert await store.get(key) is None
            for value in (ONE, TWO):
                await store.put(key, value)
                assert await store.get(key) == value
            assert await store.delete(key)

    await asyncio.gather(*map(work, range(3)))


@pytest.mark.parametrize("call", ["get", "ttl", "delete"])
async def test_keys_and_collections_are_strings(store: LabStateStore, call: str) -> None:
    """A key or a collection that is not a string is a `TypeError`. So is one string instead of many keys."""
    for arguments in ((1,), (None,)):
        with pytest.raises(TypeError, match="a key must be a str"):
            await getattr(store, call)(*arguments)
    for collection in (1, 0, b""):
        with pytest.raises(TypeError, match="a collection must be a str"):
            await getattr(store, call)("key", collection=collection)
        with pytest.raises(TypeError, match="a collection must be a str"):
            await store.destroy_collection(collection)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a sequence of str"):
        await getattr(store, f"{call}_many")("key")


# Collections and keys


async def test_the_default_collection(state: Manager) -> None:
    """Calls that name no collection, or an empty one, use the default. `destroy_collection` does not, as in py-key-value."""
    store = LabStateStore(state.namespace("mcp"), default_collection="mine")
    await store.put("key", ONE)
    assert await store.get("key", collection="mine") == await store.get("key", collection="") == ONE
    assert await store.keys() == ["key"]
    assert await store.collections() == ["mine"]
    assert await store.destroy_collection("") is False
    assert await state.get_all() == {"mcp/mine/key": ONE}
    with pytest.raises(TypeError, match="a collection must be a str"):
        await store.destroy_collection(None)  # type: ignore[arg-type]


names = st.one_of(
    st.text(st.sampled_from("ab/%~\0 é\ud800"), max_size=5),
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.sampled_from(["long" * 70, "long" * 70 + "er", "\udc00" * 100, "test_collection!@#$%^&*()", "$lab_state"]),
)


@settings(max_examples=40)
@given(st.dictionaries(st.tuples(names.filter(bool), names), st.integers(), max_size=8))
@example({("a/b", "c"): 1, ("a", "b/c"): 2, ("a%2Fb", "c"): 3})
@example({("c" * 2000, ""): 1, ("c" * 2000, "k" * 2000): 2, ("%", "k" * 2000): 3})
def test_every_string_is_a_key_and_a_collection(values: dict[tuple[str, str], int]) -> None:
    """No two pairs of collection and key share a value, and `keys` and `collections` return each text."""

    async def check() -> None:
        async with Manager("kv", MemoryStorage()) as state:
            store = LabStateStore(state.namespace("mcp"))
            for (collection, key), n in values.items():
                await store.put(key, {"n": n}, collection=collection)
            for (collection, key), n in values.items():
                assert await store.get(key, collection=collection) == {"n": n}
                assert await store.ttl(key, collection=collection) == ({"n": n}, None)
            collections = {collection for collection, _ in values}
            assert sorted(await store.collections()) == sorted(collections)
            for collection in collections:
                keys = sorted(key for within, key in values if within == collection)
                assert sorted(await store.keys(collection)) == keys

    asyncio.run(check())


async def test_limits(store: LabStateStore) -> None:
    """`limit` bounds a listing. Without it, everything is listed."""
    for n in range(5):
        await store.put_many(list("abcde"), [ONE] * 5, collection=f"c{n}")
    assert [len(await store.keys("c1", limit=limit)) for limit in (None, 2, 0, -1, 100)] == [5, 2, 0, 0, 5]
    assert [len(await store.collections(limit=limit)) for limit in (None, 2, 0, -1, 100)] == [5, 2, 0, 0, 5]


async def test_destroying(store: LabStateStore, state: Manager) -> None:
    """A collection and then the whole store is destroyed. Other keys of the state stay."""
    await state.set("beside", 1)
    for collection in ("a", "a/b", "b"):
        await store.put("key", ONE, collection=collection)
    assert await store.destroy_collection("a") is True
    assert await store.destroy_collection("a") is False
    assert sorted(await store.collections()) == ["a/b", "b"]
    assert await store.destroy() is True
    assert await store.collections() == []
    assert await state.get_all() == {"beside": 1}


# What lab_state adds


async def test_put_many_and_delete_many_are_one_change(store: LabStateStore, state: Manager) -> None:
    """`put_many` and `delete_many` make one revision each."""
    await store.put_many(["a", "b", "c"], [ONE, TWO, ONE])
    assert state.revision == 1
    await store.delete_many(["a", "b"])
    assert state.revision == 2


async def test_what_others_keep_there_is_an_error(store: LabStateStore, state: Manager) -> None:
    """A value of other code in the namespace is an error. It is not taken for missing or for a value."""
    await state.set("mcp/test/key", 1)
    with pytest.raises(DeserializationError, match="no other code may write in its namespace"):
        await store.get("key", collection="test")
    with pytest.raises(DeserializationError):
        await store.ttl("key", collection="test")
    await store.put("k" * 5000, ONE, collection="test")
    (place,) = [key for key in await state.keys() if key != "mcp/test/key"]
    for foreign in (None, 1, {}, {"key": 1}, {"key": "%FF"}, {"value": 1}):
        await state.set(place, foreign)
        with pytest.raises(DeserializationError):
            await store.get("k" * 5000, collection="test")
        with pytest.raises(DeserializationError):
            await store.keys("test")


async def test_keys_of_others_are_an_error(store: LabStateStore, state: Manager) -> None:
    """A key of other code whose text cannot be found is an error in a listing. Other keys of other code are listed."""
    await state.set_many({"mcp/c/other": 1, "mcp/no slash": 1})
    assert await store.keys("c") == ["other"]
    assert await store.collections() == ["c", "no slash"]
    await state.set("mcp/c/%FF", ONE)
    with pytest.raises(DeserializationError, match="no other code may write in its namespace"):
        await store.keys("c")
    await state.set("mcp/%FF/key", ONE)
    with pytest.raises(DeserializationError):
        await store.collections()


async def test_a_null_of_others_is_an_error(store: LabStateStore, state: Manager) -> None:
    """A stored null is not a value of the store, and is not taken for a missing key."""
    await state.set("mcp/test/key", None)
    for read in (store.get, store.ttl):
        with pytest.raises(DeserializationError):
            await read("key", collection="test")


class TickingClock(ManualClock):
    """A clock that moves by `tick` seconds at each reading, so that time passes during a call."""

    def __init__(self) -> None:
        super().__init__()
        self.tick = 0.0
        self._ticked = 0.0

    def monotonic(self) -> float:
        self._ticked += self.tick
        return super().monotonic() + self._ticked


@pytest.mark.parametrize("readings", range(1, 12))
async def test_keys_that_expire_during_a_call(readings: int) -> None:
    """If a key expires during a listing, the listing may leave it out. `ttl_many` then returns value and seconds, or neither of them."""
    clock, long = TickingClock(), "L" * 300
    async with Manager("kv", MemoryStorage(), clock=clock) as state:
        store = LabStateStore(state.namespace("mcp"))
        await store.put("b", ONE, collection=long)

        async def put_and_tick() -> None:
            clock.tick = 0
            await store.put_many([long, "a"], [ONE, ONE], collection="short", ttl=1)
            await store.put("a", ONE, collection=long, ttl=1)
            clock.tick = 1 / readings

        await put_and_tick()
        assert {*await store.keys("short")} <= {long, "a"}
        await put_and_tick()
        assert {long} <= {*await store.collections()} <= {long, "short"}
        await put_and_tick()
        for value, seconds in await store.ttl_many([long, "a"], collection="short"):
            assert (value, seconds) == (None, None) or (value == ONE and seconds is not None)
        clock.tick = 0


async def test_a_write_that_is_not_durable_yet(clock: ManualClock) -> None:
    """With a `flush_interval` of 0, a failure of the storage is a `StoreConnectionError`, and the change stays in memory."""
    faulty = FaultyStorage(MemoryStorage())
    async with Manager(Config(name="kv", flush_interval=0), faulty) as state:
        store = LabStateStore(state.namespace("mcp"))
        for write in (
            lambda: store.put("a", ONE),
            lambda: store.put_if_absent("b", ONE),
            lambda: store.delete("a"),
            lambda: store.destroy_collection("default_collection"),
        ):
            faulty.fail("commit")
            with pytest.raises(StoreConnectionError):
                await write()
        assert await store.keys() == []
        await store.put("c", ONE)
        faulty.fail("commit")
        with pytest.raises(StoreConnectionError):
            await store.destroy()


async def test_a_stopped_manager(store: LabStateStore, state: Manager) -> None:
    """The store does not own the manager. When the manager is stopped, every call is a `ClosedError`."""
    await state.stop()
    for call in (
        store.get("key"),
        store.put("key", ONE),
        store.keys(),
        store.destroy(),
        store.ttl("key"),
        store.keys(limit=0),
        store.collections(limit=0),
        store.get_many([]),
        store.ttl_many([]),
        store.put_many([], []),
        store.delete_many([]),
        store.destroy_collection(""),
    ):
        with pytest.raises(ClosedError):
            await call


def test_a_store_needs_a_namespace(state: Manager) -> None:
    """A whole manager is refused, because `destroy` would empty it. So are a collection that is no text, and a prefix that is too long."""
    with pytest.raises(TypeError, match="default_collection must be a str, not int"):
        LabStateStore(state.namespace("mcp"), default_collection=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"such as state\.namespace\('mcp'\); not Manager$"):
        LabStateStore(state)  # type: ignore[arg-type]
    LabStateStore(state.namespace("n" * 510))
    with pytest.raises(InvalidKeyError):
        LabStateStore(state.namespace("n" * 511))


class Product(BaseModel):
    name: str
    price: float


async def test_wrappers_and_adapters_of_py_key_value(store: LabStateStore) -> None:
    """The wrappers and adapters of py-key-value accept the store."""
    counted = StatisticsWrapper(PrefixCollectionsWrapper(store, prefix="app"))
    products = PydanticAdapter(counted, Product, default_collection="products")
    await products.put("1", Product(name="apple", price=0.5), ttl=60)
    assert await products.get("1") == Product(name="apple", price=0.5)
    assert await store.collections() == ["app__products"]
