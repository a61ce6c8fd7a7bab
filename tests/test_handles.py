"""`Entry` and `Namespace`: the calls of the manager, narrowed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from roles import InRole

from lab_state import (
    Blocking,
    Change,
    ClosedError,
    Config,
    Entry,
    InvalidKeyError,
    InvalidValueError,
    KeyNotFoundError,
    Manager,
    MemoryStorage,
    Namespace,
    TypeMismatchError,
)
from lab_state._calls import Calls
from lab_state._reads import Reads
from lab_state._waits import Waits
from lab_state._writing import Writing
from lab_state.handles import Scope
from lab_state.testing import ManualClock

BAD_KEYS = ["", "x" * 1025, "a\0b", "\ud800", "$lab_state", 5, None, b"bytes"]


class User(msgspec.Struct):
    name: str
    age: int = 0


class Model(BaseModel):
    tags: list[str] = []


@pytest.fixture
def manager(clock: ManualClock, in_role: InRole) -> Manager:
    return in_role(Config(name="test", flush_interval=None), MemoryStorage(), clock=clock)


@pytest.fixture
async def state(manager: Manager) -> AsyncIterator[Manager]:
    async with manager:
        yield manager


class TestEntry:
    async def test_one_key_with_its_type(self, state: Manager) -> None:
        """What is set comes back as the type, a fresh value each time, under the key."""
        entry = state.entry("user", User)
        assert await entry.exists() is False
        assert await entry.set(User("Ann", 30)) == 1
        assert await entry.exists() is True
        user = await entry.get()
        assert user == User("Ann", 30)
        user.age = 31
        assert await entry.get() == User("Ann", 30)
        assert await state.get("user") == {"name": "Ann", "age": 30}
        assert await entry.delete() is True
        assert await entry.delete() is False
        assert "user" not in state
        assert state.revision == 2

    async def test_update(self, state: Manager) -> None:
        """The function is given the type, and what it returns is stored and returned."""
        entry = state.entry("user", User)
        await entry.set(User("Ann", 30))
        assert await entry.update(lambda user: User(user.name, user.age + 1)) == User("Ann", 31)
        assert await entry.get() == User("Ann", 31)
        with pytest.raises(InvalidValueError, match="returned None"):
            await entry.update(lambda _: None)  # type: ignore[arg-type,return-value]

    async def test_models_and_plain_types(self, state: Manager) -> None:
        """Any type that a read decodes."""
        model, numbers = state.entry("model", Model), state.entry("numbers", list[int])
        await model.set(Model(tags=["x"]))
        await numbers.set([1])
        assert await model.get() == Model(tags=["x"])
        assert await numbers.update(lambda value: [*value, 2]) == [1, 2]
        assert await state.entry("model", dict[str, list[str]]).get() == {"tags": ["x"]}

    async def test_a_missing_key_is_an_error_without_a_default(self, state: Manager) -> None:
        """For get and update; nothing changes."""
        entry = state.entry("n", int)
        with pytest.raises(KeyNotFoundError, match="no key 'n'"):
            await entry.get()
        with pytest.raises(KeyNotFoundError):
            await entry.update(lambda n: n + 1)
        assert state.revision == 0

    async def test_a_default_takes_the_place_of_a_missing_key(self, state: Manager) -> None:
        """Get returns it and stores nothing; update starts from it."""
        entry = state.entry("n", int, default=5)
        assert await entry.get() == 5
        assert await entry.exists() is False
        assert await entry.update(lambda n: n + 1) == 6
        assert (await entry.get(), await state.get("n")) == (6, 6)

    async def test_every_call_of_the_manager_for_its_key(self, state: Manager) -> None:
        """Each does what that of the manager does, with the type."""
        entry = state.entry("n", int)
        assert await entry.expires_in("gone") == "gone"
        assert await entry.set_if_absent(1, ttl=60) is True
        assert await entry.set_if_absent(2) is False
        assert await entry.expires_in() == 60
        assert await entry.update(lambda n: n + 1, ttl=5) == 2
        assert await entry.expires_in() == 5
        assert await entry.incr(3) == 5
        assert await entry.expires_in() == 5
        assert await entry.touch(None) is True
        assert await entry.expires_in() is None
        assert await entry.pop() == 5
        assert await entry.touch(5) is False
        for call in (entry.pop, entry.expires_in):
            with pytest.raises(KeyNotFoundError, match="no key 'n'"):
                await call()

    async def test_incr_starts_from_the_default(self, state: Manager) -> None:
        """And from 0 without one; a default that is no number is a TypeError, and nothing changes."""
        assert await state.entry("a", int).incr(ttl=5) == 1
        assert await state.entry("b", int, default=10).incr(2) == 12
        assert await state.entry("c", float, default=0.5).incr() == 1.5
        assert await state.expires_in("a") == 5
        for entry in (state.entry("x", int, default=None), state.entry("x", str, default="")):
            with pytest.raises(TypeError, match="needs an int or a float as default"):
                await entry.incr()  # type: ignore[misc]
        assert "x" not in state

    async def test_incr_gives_a_value_of_the_type(self, state: Manager) -> None:
        """A float is no int, neither as the stored number nor as the sum."""
        await state.set("n", 1.5)
        with pytest.raises(TypeMismatchError, match="key 'n': not a `int`"):
            await state.entry("n", int).incr()
        await state.set("n", 1)
        with pytest.raises(TypeMismatchError, match="the new value of 'n': not a `int`"):
            await state.entry("n", int).incr(0.5)  # type: ignore[arg-type]
        assert (await state.get("n"), state.revision) == (1, 2)
        assert type(await state.entry("new", float).incr()) is float

    async def test_pop_gives_the_default_of_a_missing_key(self, state: Manager) -> None:
        """A copy of it; a value of another type is not deleted."""
        default = [1]
        entry = state.entry("list", list[int], default=default)
        assert await entry.pop() == [1]
        assert await entry.pop() is not default
        await state.set("list", "text")
        with pytest.raises(TypeMismatchError):
            await entry.pop()
        assert "list" in state

    async def test_none_is_a_default(self, state: Manager) -> None:
        """It is not the same as no default; and where it is the default, a stored None is a value of the type."""
        entry = state.entry("n", int, default=None)
        assert await entry.get() is None
        assert await state.entry("x", int, default=None).update(lambda old: 1 if old is None else old) == 1
        await entry.set(None)
        assert await entry.get() is None
        await state.set("n", "text")
        with pytest.raises(TypeMismatchError):
            await entry.get()
        model = state.entry("model", Model, default=None)
        await model.set(Model(tags=["x"]))
        assert await model.get() == Model(tags=["x"])
        await model.set(None)
        assert await model.get() is None

    async def test_a_value_of_another_type_is_never_the_default(self, state: Manager) -> None:
        """TypeMismatchError with the path, from get and update, and the value stays."""
        await state.set("user", {"name": "Ann", "age": "thirty"})
        entry = state.entry("user", User, default=User("nobody"))
        with pytest.raises(TypeMismatchError) as error:
            await entry.get()
        assert error.value.path == "$.age"
        with pytest.raises(TypeMismatchError):
            await entry.update(lambda user: user)
        numbers = state.entry("n", int, default=0)
        with pytest.raises(TypeMismatchError, match="the new value of 'n'"):
            await numbers.update(lambda _: "x")  # type: ignore[arg-type,return-value]
        assert state.revision == 1

    async def test_a_refused_value_is_the_error_of_set(self, state: Manager) -> None:
        """With its path; nothing changes."""
        entry = state.entry("f", list[float])
        with pytest.raises(InvalidValueError) as error:
            await entry.set([1.0, float("nan")])
        assert error.value.path == "$[1]"
        assert state.revision == 0

    async def test_ttl(self, state: Manager, clock: ManualClock) -> None:
        """As of set: kept by update, given up by a set without one, refused at 0."""
        entry = state.entry("n", int, default=-1)
        await entry.set(1, ttl=timedelta(seconds=10))
        clock.advance(4)
        assert await entry.update(lambda n: n + 1) == 2
        assert await state.expires_in("n") == 6
        clock.advance(6)
        assert (await entry.get(), await entry.exists(), await entry.delete()) == (-1, False, False)
        await entry.set(1, ttl=1)
        await entry.set(2)
        clock.advance(60)
        assert await entry.get() == 2
        with pytest.raises(InvalidValueError, match="ttl"):
            await entry.set(3, ttl=0)

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_a_key_out_of_bounds_is_refused_when_it_is_made(self, manager: Manager, key: Any) -> None:
        """InvalidKeyError at once, before a start; under a namespace, where the whole key is not reserved, likewise."""
        with pytest.raises(InvalidKeyError):
            manager.entry(key, int)
        if key not in {"", "$lab_state"}:
            with pytest.raises(InvalidKeyError):
                manager.namespace("users").entry(key, int)

    async def test_it_may_be_made_before_the_start_and_kept(self, manager: Manager) -> None:
        """It works while the manager runs, after a restart too, and is ClosedError in between."""
        entry = manager.entry("n", int, default=0)
        for expected in (1, 2):
            for call in (
                lambda: entry.get(),
                lambda: entry.set(1),
                lambda: entry.update(lambda n: n),
                lambda: entry.delete(),
                lambda: entry.exists(),
            ):
                with pytest.raises(ClosedError):
                    await call()  # type: ignore[no-untyped-call]
            async with manager:
                assert await entry.update(lambda n: n + 1) == expected

    async def test_under_a_namespace(self, state: Manager) -> None:
        """It is the key under the prefix; the errors name it as it was given."""
        entry = state.namespace("users").namespace("ann").entry("age", int)
        with pytest.raises(KeyNotFoundError, match="no key 'age'"):
            await entry.get()
        await entry.set(30)
        await entry.update(lambda age: age + 1)
        assert await state.get_all() == {"users/ann/age": 31}
        assert await entry.exists()
        assert await entry.delete()
        assert len(state) == 0

    async def test_nothing_is_lost_between_two_entries(self, state: Manager) -> None:
        """Two handles of one key are one key, and updates are atomic."""
        one, other = state.entry("n", int, default=0), state.entry("n", int, default=0)
        await asyncio.gather(*(entry.update(lambda n: n + 1) for entry in (one, other) * 50))
        assert await one.get() == await other.get() == 100

    def test_what_it_says_of_itself(self, manager: Manager) -> None:
        """The repr has the key, as it was given, and the type; never a value."""
        entry: Entry[int] = manager.namespace("x").entry("n", int, default=5)
        assert repr(entry) == "<Entry 'n' of <class 'int'>>"
        assert entry.key == "n"

    async def test_what_a_transaction_says_of_itself(self, state: Manager) -> None:
        """The name of the state, and whether it is open."""
        async with state.transaction() as tx:
            assert repr(tx) == "<Transaction of 'test', open>"
            assert repr(tx.namespace("users")) == "<Transaction 'users/' of 'test', open>"
        assert repr(tx) == "<Transaction of 'test', over>"


class TestNamespace:
    @pytest.fixture
    async def users(self, state: Manager) -> Namespace:
        await state.set_many({"users/ann": 1, "users/bob": 2, "other": 3, "users": 4, "users2/eve": 5})
        return state.namespace("users")

    def test_no_call_is_copied(self) -> None:
        """A namespace defines no call of its own, and a manager none of those that it shares with it."""
        assert [name for name in vars(Namespace) if name[0] != "_"] == ["prefix"]
        shared = {name for cls in (Reads, Writing, Waits, Calls, Scope) for name in vars(cls) if name[0] != "_"}
        assert not shared & vars(Manager).keys()
        assert {"get", "set", "transaction", "watch", "entry", "blocking", "namespace", "flush"} <= shared

    async def test_every_read_is_narrowed(self, state: Manager, users: Namespace) -> None:
        """Keys are given and returned without the prefix, and nothing outside is seen."""
        assert (len(users), "ann" in users, "other" in users, "users/ann" in users) == (2, True, False, False)
        assert await users.get("ann", type=int) == users.get_nowait("ann") == 1
        assert await users.get("other", None) is None
        assert await users.get_many(["bob", "other", "ann"]) == {"bob": 2, "ann": 1}
        assert await users.get_all() == {"ann": 1, "bob": 2}
        assert await users.get_all("b") == {"bob": 2}
        assert sorted(await users.keys()) == ["ann", "bob"]
        assert await users.keys("a") == ["ann"]
        assert (await users.exists("ann"), await users.exists("users/ann")) == (True, False)
        assert await users.expires_in("ann") is None
        for missing in (users.get("other"), users.expires_in("other")):
            with pytest.raises(KeyNotFoundError, match="no key 'other'"):
                await missing
        assert state.revision == 1

    async def test_every_write_is_narrowed(self, state: Manager, users: Namespace, clock: ManualClock) -> None:
        """Only keys under the prefix change, each call once."""
        before = {key: await state.get(key) for key in ("other", "users", "users2/eve")}
        await users.set("ann", [1])
        await users.set("short", 1, ttl=5)
        await users.set_many({"x": 1, "y": 2})
        assert await users.update("y", lambda value: value + 5) == 7
        assert await users.incr("x") == 2
        assert await users.set_if_absent("other", 1) is True
        assert await users.get_or_set("z", lambda: 5) == 5
        assert await users.pop("bob") == 2
        assert await users.delete("z") is True
        assert await users.delete_many(["other", "nope"]) == 1
        assert await users.expires_in("short") == 5
        assert state.revision == 11
        assert await state.get_all() == {
            **before,
            "users/ann": [1],
            "users/short": 1,
            "users/x": 2,
            "users/y": 7,
        }
        clock.advance(5)
        assert (len(users), "short" in users) == (3, False)

    async def test_delete_all_deletes_only_its_own(self, state: Manager, users: Namespace) -> None:
        """Without a prefix, and with one; names that begin alike are others."""
        assert await users.delete_all("b") == 1
        assert await users.delete_all() == 1
        assert await users.delete_all() == 0
        assert await state.get_all() == {"other": 3, "users": 4, "users2/eve": 5}
        assert state.revision == 3

    async def test_transaction_watch_and_blocking_are_narrowed(self, state: Manager, users: Namespace) -> None:
        """Each has the keys without the prefix."""
        async with users.watch() as changes:
            async with users.transaction() as tx:
                assert sorted(tx.keys()) == ["ann", "bob"]
                tx.set("eve", 5)
            await state.set("other", 1)
            assert isinstance(users.blocking, Blocking)
            await asyncio.to_thread(users.blocking.set, "ann", 6)
            assert [await anext(changes), await anext(changes)] == [Change("eve", "set", 2), Change("ann", "set", 4)]
        assert await state.get_many(["users/eve", "users/ann"]) == {"users/eve": 5, "users/ann": 6}

    async def test_durability_is_the_managers(self, state: Manager, users: Namespace) -> None:
        """A namespace flushes and waits for everything."""
        revision = await users.set("ann", 5)
        await users.flush()
        await users.wait_durable(revision)
        assert state.durable_revision == revision

    async def test_it_nests(self, state: Manager) -> None:
        """To any depth; a name with a slash is the same as two."""
        deep = state.namespace("a").namespace("b").namespace("c")
        await deep.set("x", 1)
        assert await state.get_all() == {"a/b/c/x": 1}
        assert await state.namespace("a/b").namespace("c").get_all() == {"x": 1}
        assert await state.namespace("a").get_all() == {"b/c/x": 1}
        assert await state.namespace("a").keys("b/") == ["b/c/x"]

    @pytest.mark.parametrize("name", ["", "users/", "x" * 1024, "a\0b", "\ud800"])
    def test_a_name_out_of_bounds_is_refused(self, manager: Manager, name: str) -> None:
        """InvalidKeyError when it is made, nested too."""
        for scope in (manager, manager.namespace("a")):
            with pytest.raises(InvalidKeyError):
                scope.namespace(name)

    @pytest.mark.parametrize("name", [5, None, b"bytes"])
    def test_a_name_that_is_no_str_is_refused(self, manager: Manager, name: Any) -> None:
        """TypeError when it is made."""
        with pytest.raises(TypeError, match="the name of a namespace must be a str"):
            manager.namespace(name)

    async def test_bounds_are_those_of_the_whole_key(self, state: Manager, users: Namespace) -> None:
        """A key that is too long with its prefix is refused, by every call; the longest that fits is not."""
        await users.set("x" * 1018, 1)
        revision, long = state.revision, "x" * 1019
        for call in (
            lambda: users.get(long),
            lambda: users.set(long, 1),
            lambda: users.set_many({long: 1}),
            lambda: users.delete(long),
            lambda: users.set(long, 1, ttl=5),
        ):
            with pytest.raises(InvalidKeyError, match="this one has 1025"):
                await call()
        with pytest.raises(InvalidKeyError):
            users.entry(long, int)
        with pytest.raises(InvalidKeyError):
            users.namespace(long)
        state.namespace("x" * 1022).entry("y", int)
        assert state.revision == revision

    async def test_a_key_that_is_reserved_at_the_top_is_an_ordinary_one_beneath(self, users: Namespace) -> None:
        """Only the whole key counts."""
        await users.set("$lab_state", 1)
        assert await users.get("$lab_state") == 1

    async def test_it_may_be_made_before_the_start_and_kept(self, manager: Manager) -> None:
        """It works while the manager runs, after a restart too, and is ClosedError in between."""
        users = manager.namespace("users")
        for expected in (1, 2):
            with pytest.raises(ClosedError):
                await users.set("n", 1)
            with pytest.raises(ClosedError):
                await users.get("n", 1)
            with pytest.raises(ClosedError):
                len(users)
            with pytest.raises(ClosedError):
                "n" in users  # noqa: B015 -- it raises
            async with manager:
                assert await users.incr("n") == expected

    async def test_an_empty_one_is_true(self, state: Manager) -> None:
        """As an empty manager is."""
        assert len(state.namespace("users")) == 0
        assert state.namespace("users")

    def test_what_it_says_of_itself(self, manager: Manager) -> None:
        """The repr has the name of the state and the prefix."""
        nested = manager.namespace("a").namespace("b")
        assert repr(nested) == "<Namespace 'a/b/' of 'test'>"
        assert nested.prefix == "a/b/"

    def test_it_has_the_signatures_of_the_manager(self) -> None:
        """Whatever a function needs of a manager, a namespace does as well."""
        for name in ("get", "set", "transaction", "entry"):
            assert inspect.signature(getattr(Namespace, name)) == inspect.signature(getattr(Manager, name))


async def test_a_default_is_not_shared() -> None:
    """Changing the default that an entry gave, or was updated from, changes nothing else."""
    async with Manager("name", MemoryStorage()) as state:
        entry = state.entry("list", list[int], default=[])
        (await entry.get()).append(1)
        assert await entry.get() == []

        def spoil(value: list[int]) -> list[int]:
            value.append(1)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await entry.update(spoil)
        assert await entry.get() == []


async def test_many_of_nothing_needs_a_running_manager() -> None:
    """Reading no keys of a manager that does not run is ClosedError, too."""
    with pytest.raises(ClosedError):
        await Manager("name", MemoryStorage()).get_many([])
