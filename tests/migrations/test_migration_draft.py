"""`MigrationDraft`: the calls of a migration, and the expiry of the keys that they change."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from lab_state import (
    InvalidKeyError,
    InvalidValueError,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    MigrationDraft,
    MigrationError,
    Schema,
    read_state,
)
from lab_state._values import encode_plain, encode_value
from lab_state.testing import ManualClock

Function = Callable[[MigrationDraft], object]


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


async def filled(storage: MemoryStorage, clock: ManualClock) -> None:
    """Make a state of version 1 with keys that expire, and one that has expired before the migration."""
    async with Manager("people", storage, clock=clock) as state:
        await state.set_many({"users/ann": {"age": 30}, "n": 1})
        await state.set("session/a", [1], ttl=100)
        await state.set("session/b", "text", ttl=200)
        await state.set("gone", 1, ttl=10)
    clock.advance(20)


async def migrated(storage: MemoryStorage, clock: ManualClock, function: Function) -> Manager:
    """Return a manager that has migrated the state, and runs."""
    schema = Schema(2)
    schema.migration(to=2)(function)
    state = Manager("people", storage, clock=clock, schema=schema)
    await state.start()
    return state


async def test_the_expiry_of_keys(storage: MemoryStorage, clock: ManualClock) -> None:
    """`set` keeps the expiry, unless it gets a `ttl`. `move` takes it along. Untouched keys keep it. `touch` removes it."""
    await filled(storage, clock)

    def change(draft: MigrationDraft) -> None:
        assert draft.get("gone", None) is None
        draft.set("gone", {"again": True})
        draft.set_many({"session/a": [2], "new": 1})
        draft.move("session/b", "sessions/b")
        draft.set("n", 2, ttl=50)
        draft.set("users/ann", {"age": 31}, ttl=60)
        draft.touch("users/ann", None)
        draft.set("sessions/b", "other")
        draft.set_many({"timed": 1}, ttl=70)

    state = await migrated(storage, clock, change)
    assert await state.get_all() == {
        "gone": {"again": True},
        "n": 2,
        "new": 1,
        "session/a": [2],
        "sessions/b": "other",
        "timed": 1,
        "users/ann": {"age": 31},
    }
    times = {key: await state.expires_in(key) for key in await state.keys()}
    assert times == {
        "gone": None,
        "n": 50.0,
        "new": None,
        "session/a": 80.0,
        "sessions/b": 180.0,
        "timed": 70.0,
        "users/ann": None,
    }
    await state.stop()
    async with state as again:
        assert {key: await again.expires_in(key) for key in await again.keys()} == times


async def test_the_calls_of_a_transaction(storage: MemoryStorage, clock: ManualClock) -> None:
    """A migration reads and changes the state with the calls of a transaction, and sees its own changes."""
    await filled(storage, clock)
    kept: list[MigrationDraft] = []

    def change(draft: MigrationDraft) -> None:
        kept.append(draft)
        assert draft.keys() == ["n", "session/a", "session/b", "users/ann"]
        users = draft.namespace("users")
        users.set("bob", {"age": 1})
        assert users.get_all() == {"ann": {"age": 30}, "bob": {"age": 1}}
        assert users.update("bob", lambda user: {**user, "age": 2}) == {"age": 2}
        assert (len(draft), len(users), "users/bob" in draft, "bob" in draft) == (5, 2, True, False)
        assert draft.incr("n") == 2
        assert draft.pop("session/a") == [1]
        assert not draft.set_if_absent("n", 5)
        assert draft.get_or_set("m", lambda: 7) == 7
        for key, value in draft.items("users/"):
            draft.set(f"people/{key.removeprefix('users/')}", value)
            draft.delete(key)
        assert repr(draft) == "<MigrationDraft of 'people'>"
        assert repr(users) == "<MigrationDraft 'users/' of 'people'>"

    state = await migrated(storage, clock, change)
    assert await state.get_all() == {
        "m": 7,
        "n": 2,
        "people/ann": {"age": 30},
        "people/bob": {"age": 2},
        "session/b": "text",
    }
    with pytest.raises(RuntimeError, match="this migration is over"):
        kept[0].get("n")
    with pytest.raises(RuntimeError, match="this migration is over"):
        kept[0].set("n", 1)
    with pytest.raises(RuntimeError, match="this migration is over"):
        kept[0].set("n", object())
    with pytest.raises(RuntimeError, match="this migration is over"):
        kept[0].set_many({})
    with pytest.raises(RuntimeError, match="this migration is over"):
        kept[0].namespace("users")
    with pytest.raises(RuntimeError, match="this migration is over"):
        kept[0].move("n", "m")
    with pytest.raises(RuntimeError, match="this migration is over"):
        kept[0].delete("n")
    await state.stop()


async def test_lists_of_keys(storage: MemoryStorage, clock: ManualClock) -> None:
    """A list of keys has the changes so far: new, moved and deleted keys, in order, with a limit, and after all were deleted."""
    await filled(storage, clock)

    def change(draft: MigrationDraft) -> None:
        draft.set("m", 1)
        draft.delete("n")
        draft.delete("missing")
        draft.move("session/b", "a")
        assert draft.keys() == ["a", "m", "session/a", "users/ann"]
        assert draft.keys(reverse=True, limit=2) == ["users/ann", "session/a"]
        assert draft.keys(after="a", limit=1) == ["m"]
        rows = draft.items()
        assert next(rows) == ("a", "text")
        draft.delete_all()
        draft.set("later", 1)
        assert dict(rows) == {"m": 1, "session/a": [1], "users/ann": {"age": 30}}
        assert dict(draft.items()) == {"later": 1}
        assert draft.keys("x") == []

    state = await migrated(storage, clock, change)
    assert await state.get_all() == {"later": 1}
    await state.stop()


async def test_moves_that_are_refused(storage: MemoryStorage, clock: ManualClock) -> None:
    """A missing key cannot be moved, and two keys cannot become one. A move of a key to itself changes nothing."""
    await filled(storage, clock)

    def change(draft: MigrationDraft) -> None:
        with pytest.raises(KeyNotFoundError):
            draft.move("missing", "other")
        with pytest.raises(KeyNotFoundError):
            draft.move("gone", "other")
        with pytest.raises(InvalidKeyError, match="'n' cannot move to 'users/ann', which exists already"):
            draft.move("n", "users/ann")
        with pytest.raises(InvalidKeyError, match="reserved"):
            draft.move("n", "$lab_state")
        draft.move("n", "n")
        draft.move("n", "gone")

    state = await migrated(storage, clock, change)
    assert await state.get_all() == {"gone": 1, "session/a": [1], "session/b": "text", "users/ann": {"age": 30}}
    assert await state.expires_in("gone") is None
    await state.stop()


@pytest.mark.parametrize(
    ("change", "cause", "text"),
    [
        (lambda draft: draft.set("n", float("nan")), InvalidValueError, "the value of 'n': NaN"),
        (lambda draft: draft.set("n", 1, ttl=-1), InvalidValueError, "the value of 'n': "),
        (lambda draft: draft.set("$lab_state", 1), InvalidKeyError, "reserved"),
        (lambda draft: draft.set(5, 1), InvalidKeyError, "must be a str"),
        (lambda draft: draft.set_many([]), TypeError, "failed with TypeError;"),
        (lambda draft: draft.get("missing"), KeyNotFoundError, "no key 'missing'"),
        (lambda draft: {"secret": 1}["other"], KeyError, "failed with KeyError;"),
        (lambda draft: int("secret"), ValueError, "failed with ValueError;"),
    ],
)
async def test_a_migration_that_raises(
    storage: MemoryStorage, clock: ManualClock, change: Any, cause: type[Exception], text: str
) -> None:
    """The error names the migration, and its cause is the exception. It has no value. The state is as before."""
    await filled(storage, clock)
    with pytest.raises(MigrationError) as error:
        await migrated(storage, clock, change)
    assert text in str(error.value)
    assert "of 'people' to version 2 failed with" in str(error.value)
    assert "secret" not in str(error.value)
    assert isinstance(error.value.__cause__, cause)
    assert error.value.migration == 2
    assert error.value.key == ("n" if cause is InvalidValueError else None)
    view = await read_state("people", storage, clock=clock)
    assert await view.get_all() == {"n": 1, "session/a": [1], "session/b": "text", "users/ann": {"age": 30}}
    assert view.revision == 4


@pytest.mark.parametrize("more", [{}, {"ttl": -1}])
async def test_a_value_that_is_refused_in_a_namespace(
    storage: MemoryStorage, clock: ManualClock, more: dict[str, Any]
) -> None:
    """The error has the whole key."""
    await filled(storage, clock)
    value = 1 if more else object()
    with pytest.raises(MigrationError, match="the value of 'users/a': ") as error:
        await migrated(storage, clock, lambda draft: draft.namespace("users").set("a", value, **more))
    assert error.value.key == "users/a"


def sets_another_value(draft: MigrationDraft) -> None:
    """Try to set a value that is refused, and then fail for another reason."""
    with contextlib.suppress(InvalidValueError):
        draft.set("n", object())
    raise ImportError("secret", path="secret")


async def test_the_key_and_path_of_an_error_are_those_of_its_value(storage: MemoryStorage, clock: ManualClock) -> None:
    """If a migration goes on after a refused value, and fails for another reason, the error has neither a key nor a path."""
    await filled(storage, clock)
    with pytest.raises(MigrationError) as error:
        await migrated(storage, clock, sets_another_value)
    assert (error.value.key, error.value.path) == (None, "$")


async def returns_a_coroutine() -> None: ...


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda draft: draft, "MigrationDraft"), (lambda _: returns_a_coroutine(), "coroutine"), (lambda _: 0, "int")],
)
async def test_a_migration_that_returns_something(
    storage: MemoryStorage, clock: ManualClock, change: Any, kind: str
) -> None:
    """A migration that returns something has perhaps changed nothing, so it is refused."""
    await filled(storage, clock)
    with pytest.raises(MigrationError, match=f"returned an object of the class {kind}: a migration changes its draft"):
        await migrated(storage, clock, change)


async def test_a_migration_that_deletes_everything(
    storage: MemoryStorage, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A migration may delete all keys. The state has the new version, and the log has the number of all keys."""
    caplog.set_level(logging.INFO, "lab_state")
    await filled(storage, clock)

    def change(draft: MigrationDraft) -> None:
        assert draft.delete_all() == 4
        draft.set("users/ann", 1)
        draft.set("new", 1)

    state = await migrated(storage, clock, change)
    assert "(keys changed: 6)" in caplog.text  # one of them had expired
    assert await state.delete("new")
    assert await state.get_all() == {"users/ann": 1}
    await state.stop()
    async with state:
        assert await state.get_all() == {"users/ann": 1}


class Broken:
    """An object of a class that cannot be kept."""


@pytest.mark.parametrize(
    "value",
    [
        1,
        "text",
        [1, "ü", None],
        {"name": "ü", "parts": [[1.5], {}]},
        {"large": ["x" * 50] * 100},
        {"time": "10:11:12"},
        {1: "a", "b": 2},
        {"when": datetime(2026, 1, 1, tzinfo=UTC)},
        {"part": msgspec.Raw(b'{"a": 1}')},
        {"part": msgspec.Raw(b"nothing")},
        [float("nan")],
        {"a": -float("inf")},
        {"a": "\ud800"},
        {"a": Broken()},
        {1: "a", "1": "b"},
        (1, 2),
    ],
)
def test_the_values_of_a_migration_are_those_of_set(value: Any) -> None:
    """The fast way to encode a value gives the same bytes, or the same error, as the usual one."""
    results: list[Any] = []
    for encode in (encode_plain, encode_value):
        try:
            results.append(encode(value))
        except InvalidValueError as error:
            results.append(str(error))
    assert results[0] == results[1]
