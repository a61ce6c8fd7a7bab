"""Wrong arguments: `TypeError` for a wrong Python type, an error of lab_state for wrong content."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from hypothesis import given
from hypothesis import strategies as st

from lab_state import (
    Blocking,
    BlockingEntry,
    Config,
    Entry,
    FileStorage,
    InvalidKeyError,
    InvalidNameError,
    InvalidValueError,
    Manager,
    MemoryCache,
    MemoryStorage,
    Namespace,
    Reader,
    RedisCache,
    S3Storage,
    StateView,
    Transaction,
    copy_state,
    list_states,
    read_state,
    restore_state,
)
from lab_state._arguments import RESERVED, check_key, check_keys
from lab_state._periods import LONGEST_TTL, check_history
from lab_state.testing import FaultyStorage, ManualClock

BEFORE = {"a": 1, "n/a": 1}


class Wrong(NamedTuple):
    """An argument that is wrong, and the error that says so."""

    value: object
    error: type[Exception]


def of_no_type(*values: object) -> list[Wrong]:
    return [Wrong(value, TypeError) for value in values]


KEYS = [Wrong(value, InvalidKeyError) for value in (5, None, b"a", "", "x" * 1025, "a\0b", "\ud800")]
VALUES = [Wrong(value, InvalidValueError) for value in (1j, math.nan, {"a": 1j}, lambda: 1)]
TTLS = [*of_no_type("5", [5], True, b"5"), *(Wrong(ttl, InvalidValueError) for ttl in (0, -1, math.nan, math.inf))]
NUMBERS = [*of_no_type("1", None, True, [1]), *(Wrong(number, InvalidValueError) for number in (math.nan, math.inf))]

WRONG: dict[str, list[Wrong]] = {
    "key": KEYS,
    "keys": [*of_no_type("a", 5, None), *(Wrong(["a", key.value], key.error) for key in KEYS)],
    "prefix": of_no_type(5, None, b"a", ["a"]),
    "after": [key for key in KEYS if key.value is not None],
    "path": [
        *of_no_type(5, None, b"a", ["a"]),
        Wrong("", ValueError),
        Wrong("a\0", ValueError),
        Wrong("~/a", ValueError),
    ],
    "limit": [*of_no_type("1", True, 1.5), Wrong(0, ValueError), Wrong(-1, ValueError)],
    "reverse": [],  # a flag: Python's truth of it counts
    "on_mismatch": [*of_no_type(5, None, True), Wrong("ignore", ValueError)],
    "name": [*of_no_type(5, None, b"a"), *(Wrong(name, InvalidKeyError) for name in ("", "a/", "x" * 1025, "a\0b"))],
    "value": VALUES,
    "values": [
        *of_no_type(5, None, "a", [("a", 1)]),
        *(Wrong({"a": 2, key.value: 2}, key.error) for key in KEYS),
        *(Wrong({"a": value.value}, value.error) for value in VALUES),
    ],
    "ttl": TTLS,
    "type": of_no_type(5, "int", [int], object),
    "default": of_no_type(int, BaseException),
    "fn": [
        *of_no_type(5, None, "abs"),
        Wrong(lambda _: 1j, InvalidValueError),
        Wrong(lambda _: None, InvalidValueError),
    ],
    "factory": [*of_no_type(5, None, "int"), Wrong(lambda: 1j, InvalidValueError)],
    "delta": NUMBERS,
    "revision": [*of_no_type("1", 1.5, True), Wrong(99, ValueError)],
    "timeout": [*of_no_type("1", True, [1]), Wrong(math.nan, ValueError), Wrong(-1, ValueError)],
}
"""What is wrong for each parameter of that name."""

OTHERWISE: dict[tuple[str, str], list[Wrong]] = {
    ("incr", "default"): NUMBERS,
    ("entry", "default"): [],  # what a read returns in the end, as it is
    ("expires_in", "default"): [],
    ("transact", "fn"): of_no_type(5, None, "abs"),
    ("update", "default"): [],
    ("watch", "durable"): [],  # a flag: Python's truth of it counts
    ("wait_revision", "revision"): of_no_type("1", 1.5, True, None),
}
"""Where a parameter of that name is something else."""

EMPTY: tuple[Any, ...] = ("", ["a", ""], {"a": 2, "": 2})
"""A wrong key, and keys, and values, but in a namespace, where the prefix comes before it."""

GOOD: dict[str, Any] = {
    "key": "a",
    "keys": ["a"],
    "path": "/dev/null/b.json",
    "name": "n",
    "value": 2,
    "values": {"a": 2},
    "ttl": 5,
    "type": int,
    "fn": abs,
    "factory": int,
    "revision": 1,
}
"""What is right for those that have no default."""


@asynccontextmanager
async def opened(clock: ManualClock) -> AsyncIterator[tuple[Manager, dict[type, Any]]]:
    """Yield a manager that has `BEFORE`, and an object of each class with calls."""
    async with AsyncExitStack() as stack:
        storage, cache = MemoryStorage(), MemoryCache()
        state = await stack.enter_async_context(
            Manager(Config("test", flush_interval=None), storage, cache, clock=clock)
        )
        await state.set_many(BEFORE)
        reader = await stack.enter_async_context(cache.reader("test"))
        await state.flush()
        await reader.wait_revision(state.revision)
        yield (
            state,
            {
                Manager: state,
                Namespace: state.namespace("n"),
                Entry: state.entry("a", int),
                Blocking: state.blocking,
                BlockingEntry: state.blocking.entry("a", int),
                Reader: reader,
                StateView: await read_state("test", storage),
            },
        )


def calls_of(cls: type) -> list[str]:
    return [name for name in dir(cls) if name[0] != "_" and inspect.isroutine(getattr(cls, name))]


def parameters_of(cls: type, call: str) -> list[inspect.Parameter]:
    """Return the parameters of a call; of one that is lifted from the manager, those of the manager."""
    signature = inspect.signature(getattr(cls, call))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        signature = inspect.signature(getattr(Manager, call))
    return list(signature.parameters.values())[1:]


CASES = [
    (cls, call)
    for cls in (Manager, Namespace, Transaction, Blocking, Entry, BlockingEntry, Reader, StateView)
    for call in calls_of(cls)
    if parameters_of(cls, call)
]


async def refused(target: Any, call: str, wrong: Wrong, arguments: dict[str, Any]) -> None:
    """Make a call that must raise the error, of exactly that kind."""
    with pytest.raises(wrong.error) as caught:
        if isinstance(target, Blocking | BlockingEntry):
            await asyncio.to_thread(getattr(target, call), **arguments)
        else:
            result = getattr(target, call)(**arguments)
            if inspect.isawaitable(result):
                await result
            elif hasattr(result, "__aenter__"):
                async with result:
                    pass
    assert isinstance(caught.value, TypeError) == (wrong.error is TypeError)


@pytest.mark.parametrize(("cls", "call"), CASES, ids=[f"{cls.__name__}.{call}" for cls, call in CASES])
async def test_each_wrong_argument_of_each_call(cls: type, call: str, clock: ManualClock) -> None:
    """Its error says whether the type or the content is wrong; the state stays as it was."""
    name = call.removesuffix("_nowait")
    parameters = parameters_of(cls, call)
    good = {each.name: GOOD[each.name] for each in parameters if each.default is each.empty}
    if name == "get_or_set":
        good["key"] = "new"  # the function is called for a missing key only
    async with opened(clock) as (state, objects):
        revision = state.revision
        for parameter in (each.name for each in parameters):
            for wrong in OTHERWISE.get((name, parameter), WRONG.get(parameter, [])):
                if cls is Namespace and wrong.value in EMPTY:
                    continue
                arguments = {**good, parameter: wrong.value}
                if cls is Transaction:
                    async with state.transaction() as tx:
                        await refused(tx, call, wrong, arguments)
                else:
                    await refused(objects[cls], call, wrong, arguments)
                assert (await state.get_all(), state.revision) == (BEFORE, revision), (parameter, wrong)


def test_each_parameter_is_tried() -> None:
    """None is forgotten: a new parameter needs a row in `WRONG` or in `OTHERWISE`."""
    for cls, call in CASES:
        for parameter in parameters_of(cls, call):
            name = call.removesuffix("_nowait")
            assert (name, parameter.name) in OTHERWISE or parameter.name in WRONG, (cls, call, parameter.name)


# Settings


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("name", [*of_no_type(5, None, b"a"), Wrong("", InvalidNameError), Wrong("a/b", InvalidNameError)]),
        ("flush_interval", [*of_no_type("1", True, [1]), Wrong(-1, ValueError), Wrong(math.nan, ValueError)]),
        ("stop_timeout", [*of_no_type("1", None, True), Wrong(0, ValueError), Wrong(math.inf, ValueError)]),
        ("lock_timeout", [*of_no_type("1", True, [1]), Wrong(-1, ValueError), Wrong(math.inf, ValueError)]),
        ("shared", of_no_type("yes", 1, None)),
        ("owner_timeout", [*of_no_type("1", True, None), Wrong(0, ValueError), Wrong(-1, ValueError)]),
        ("migrate", [*of_no_type(5, None, True), Wrong("never", ValueError)]),
    ],
)
def test_each_wrong_setting(field: str, wrong: list[Wrong]) -> None:
    """Of `Config`, by the same rule."""
    for value, error in wrong:
        with pytest.raises(error) as caught:
            Config(**{"name": "a", field: value})  # type: ignore[arg-type]
        assert isinstance(caught.value, TypeError) == (error is TypeError)


def test_each_setting_is_tried() -> None:
    """The fields are those above."""
    tried = {"name", "flush_interval", "stop_timeout", "lock_timeout", "shared", "owner_timeout", "migrate"}
    assert set(Config.__struct_fields__) == tried


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("config", [5, None, b"a", {"name": "a"}]),
        ("storage", ["directory", None, FileStorage]),
        ("cache", ["redis://host", MemoryCache, 5]),
        ("logger", ["lab_state", 5]),
        ("on_fenced", ["kill", 5]),
    ],
)
def test_each_wrong_argument_of_a_manager(argument: str, wrong: list[Any]) -> None:
    """`TypeError` when it is made, before anything is opened."""
    for value in wrong:
        with pytest.raises(TypeError):
            Manager(**{"config": "a", "storage": MemoryStorage(), argument: value})


@given(
    st.lists(
        st.sampled_from(["a", "é", "x" * 1024, "x" * 1025, "", "a\0", RESERVED, "\ud800", "\udc00", "b"]), max_size=4
    )
)
def test_several_keys_are_checked_as_each_of_them(keys: list[str]) -> None:
    """`check_keys` raises the error of the first key that `check_key` refuses."""

    def outcome(check: Callable[[], object]) -> str:
        try:
            check()
        except InvalidKeyError as error:
            return str(error)
        return "valid"

    expected = next((told for key in keys if (told := outcome(partial(check_key, key))) != "valid"), "valid")
    assert outcome(partial(check_keys, keys)) == outcome(partial(check_keys, dict.fromkeys(keys))) == expected


@pytest.mark.parametrize(
    ("history", "length"),
    [
        (None, None),
        (0.0001, 1),
        (1, 1000),
        (1.5, 1500),
        (timedelta(days=7), 604_800_000),
        (LONGEST_TTL, LONGEST_TTL * 1000),
    ],
)
@pytest.mark.parametrize("size", [1, 2**40, None])
def test_a_history(history: Any, length: int | None, size: int | None) -> None:
    """The length of a history is given in seconds or as a `timedelta`. Its size has a limit, or none."""
    assert check_history(history, size) == length


@pytest.mark.parametrize(
    ("history", "size", "error"),
    [
        *((history, 1, TypeError) for history in ("7", True, [7])),
        *((history, 1, ValueError) for history in (0, -1, math.nan, math.inf, timedelta(0), LONGEST_TTL + 1)),
        *((1, size, TypeError) for size in ("1", 1.0, True)),
        *((None, size, ValueError) for size in (0, -1)),
    ],
)
def test_a_bad_history(history: Any, size: Any, error: type[Exception]) -> None:
    """A history of a wrong type, or out of bounds, is refused, and the message names the argument."""
    with pytest.raises(error, match="history"):
        check_history(history, size)


# Other constructors and functions

NO_TEXT: list[Any] = [3, b"a", Path("a"), ["a"], object()]
NO_CLOCK: list[Any] = [3, ManualClock, time]
NO_STORAGE: list[Any] = [3, None, b"a", Path("a"), "a", MemoryStorage]

MADE: list[tuple[str, Callable[..., object], dict[str, list[Any]]]] = [
    (
        "S3Storage",
        partial(S3Storage, bucket="bucket"),
        {
            "bucket": [*NO_TEXT, None, True],
            "prefix": [*NO_TEXT, None],
            "endpoint_url": NO_TEXT,
            "region_name": NO_TEXT,
            "session": [3, "a", AioSession],
            "config": [3, {}, AioConfig],
        },
    ),
    (
        "RedisCache",
        partial(RedisCache, url="redis://host"),
        {"url": [*NO_TEXT, None, redis.ConnectionPool()], "prefix": [*NO_TEXT, None], "clock": NO_CLOCK},
    ),
    (
        "RedisCache.reader",
        partial(RedisCache("redis://host").reader, name="a"),
        {"name": [*NO_TEXT, None], "clock": NO_CLOCK},
    ),
    ("MemoryCache.reader", partial(MemoryCache().reader, name="a"), {"name": [*NO_TEXT, None], "clock": NO_CLOCK}),
    ("FaultyStorage", FaultyStorage, {"inner": NO_STORAGE}),
    (
        "Manager",
        partial(Manager, config="a", storage=MemoryStorage()),
        {"storage": NO_STORAGE, "cache": [3, Path("a"), MemoryCache], "clock": NO_CLOCK},
    ),
    (
        "copy_state",
        partial(copy_state, name="a", source=MemoryStorage(), target=MemoryStorage()),
        {"name": [*NO_TEXT, None], "source": NO_STORAGE, "target": NO_STORAGE, "progress": [3, "a"]},
    ),
    (
        "read_state",
        partial(read_state, name="a", storage=MemoryStorage()),
        {"name": [*NO_TEXT, None], "storage": NO_STORAGE, "clock": NO_CLOCK},
    ),
    (
        "restore_state",
        partial(restore_state, name="a", storage=MemoryStorage(), at=1, into="b"),
        {"name": [*NO_TEXT, None], "storage": NO_STORAGE, "into": [*NO_TEXT, None], "clock": NO_CLOCK},
    ),
    ("list_states", list_states, {"storage": NO_STORAGE}),
]
"""What has an argument of a wrong type: how it is made or called, and the wrong values of each argument."""


@pytest.mark.parametrize(
    ("make", "argument", "wrong"),
    [
        pytest.param(make, argument, wrong, id=f"{name}-{argument}")
        for name, make, arguments in MADE
        for argument, wrong in arguments.items()
    ],
)
async def test_an_argument_of_a_wrong_type(make: Callable[..., Any], argument: str, wrong: list[Any]) -> None:
    """`TypeError`, and the message says which type was given."""
    for value in wrong:
        kind = value.__name__ if isinstance(value, type) else type(value).__name__
        with pytest.raises(TypeError, match=rf"\b{kind}\b"):
            if inspect.isawaitable(result := make(**{argument: value})):
                await result


@pytest.mark.parametrize("cache", [MemoryCache(), RedisCache("redis://host")], ids=repr)
@pytest.mark.parametrize("name", ["", "a/b", "../a", "a" * 129])
def test_the_name_of_a_reader(cache: MemoryCache | RedisCache, name: str) -> None:
    """It is the name of a state, by the rule of `Config.name`. A refused name leaves no mirror."""
    with pytest.raises(InvalidNameError):
        cache.reader(name)
    assert repr(cache) in {"<MemoryCache []>", "<RedisCache host:6379>"}
