"""The calls of a manager, and its life."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from msgspec import Raw
from pydantic import BaseModel
from roles import InRole

from lab_state import (
    ClosedError,
    Config,
    InvalidKeyError,
    InvalidNameError,
    InvalidValueError,
    KeyNotFoundError,
    LabStateError,
    LockedError,
    Manager,
    MemoryStorage,
    Status,
    TypeMismatchError,
    UnavailableError,
)
from lab_state._calls import Calls
from lab_state.testing import FaultyStorage

BAD_KEYS = ["", "x" * 1025, "a\0b", "\ud800", "$lab_state", 5, None, b"bytes"]


class User(msgspec.Struct):
    name: str
    age: int = 0


class Model(BaseModel):
    name: str
    tags: list[str] = []


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
async def state(storage: MemoryStorage, in_role: InRole) -> AsyncIterator[Manager]:
    async with in_role(Config(name="test", flush_interval=None), storage) as manager:
        yield manager


class TestReading:
    async def test_get_gives_what_was_set(self, state: Manager) -> None:
        """Each kind of JSON value comes back equal."""
        values = [None, True, 0, -5, 1.5, "", "text", "é", [], {}, [1, [2]], {"a": {"b": None}}]
        for value in values:
            await state.set("key", value)
            assert await state.get("key") == value
            assert state.get_nowait("key") == value

    async def test_a_read_value_is_the_callers_own(self, state: Manager) -> None:
        """Changing what get returned, or what set was given, changes nothing in the state."""
        given = {"list": [1]}
        await state.set("key", given)
        given["list"].append(2)
        (await state.get("key"))["list"].append(3)
        assert await state.get("key") == {"list": [1]}

    async def test_a_missing_key_is_an_error_or_the_default(self, state: Manager) -> None:
        """Without a default KeyNotFoundError, a KeyError too; with one, the default itself."""
        with pytest.raises(KeyNotFoundError, match="no key 'nope'"):
            await state.get("nope")
        with pytest.raises(KeyError):
            state.get_nowait("nope")
        default: list[int] = []
        assert await state.get("nope", default) is default
        assert state.get_nowait("nope", None) is None

    async def test_a_class_is_no_default(self, state: Manager) -> None:
        """It was meant to be the type; the plain JSON, or the class itself, would be a surprise later."""
        await state.set("user", {"name": "Ann", "age": 30})
        for key in ("user", "nope"):
            for call in (state.get, state.pop):
                with pytest.raises(TypeError, match=r"the default is a class; .* pass type=User"):
                    await call(key, User)
            with pytest.raises(TypeError, match="pass type=int"):
                state.get_nowait(key, int)
        assert await state.get("nope", "a default") == "a default"
        assert await state.exists("user")

    @pytest.mark.parametrize("key", ["nope", "", "$lab_state"])
    async def test_an_error_is_not_shown_beside_the_dicts_own(self, state: Manager, key: str) -> None:
        """A key that is missing or out of bounds is one error, without the `KeyError` beneath."""
        with pytest.raises(LabStateError) as error:
            state.get_nowait(key)
        assert error.value.__suppress_context__

    async def test_null_is_not_missing(self, state: Manager) -> None:
        """A stored None is there."""
        await state.set("null", None)
        assert await state.get("null", 5) is None
        assert await state.exists("null")

    async def test_get_decodes_as_the_type_asked_for(self, state: Manager) -> None:
        """Structs, models, and plain types; the type checkers know the result."""
        await state.set("user", User("Ann", 30))
        await state.set("model", Model(name="Bob", tags=["x"]))
        await state.set("number", 5)
        user = await state.get("user", type=User)
        assert (user.name, user.age) == ("Ann", 30)
        assert await state.get("model", type=Model) == Model(name="Bob", tags=["x"])
        assert await state.get("number", type=float) == 5.0
        assert await state.get("user") == {"name": "Ann", "age": 30}
        assert await state.get("nope", None, type=User) is None

    async def test_a_value_of_another_type_is_never_missing(self, state: Manager) -> None:
        """TypeMismatchError with the path, whatever the default."""
        await state.set("user", {"name": "Ann", "age": "thirty"})
        with pytest.raises(TypeMismatchError) as error:
            await state.get("user", None, type=User)
        assert error.value.path == "$.age"
        assert "thirty" not in str(error.value)

    async def test_many_at_once(self, state: Manager) -> None:
        """get_many gives those that exist, in the order asked for; get_all those under a prefix."""
        await state.set_many({"a/1": 1, "a/2": 2, "b/1": [3]})
        assert list((await state.get_many(["b/1", "nope", "a/1"])).items()) == [("b/1", [3]), ("a/1", 1)]
        assert await state.get_all("a/") == {"a/1": 1, "a/2": 2}
        assert await state.get_all(type=Any) == {"a/1": 1, "a/2": 2, "b/1": [3]}
        assert await state.keys("b") == ["b/1"]
        assert await state.keys() == ["a/1", "a/2", "b/1"]
        with pytest.raises(TypeMismatchError):
            await state.get_all(type=int)

    async def test_a_scalar_that_was_loaded_is_kept_as_one(self, storage: FaultyStorage) -> None:
        """From its first read on, which is no change. Other values stay views of what was loaded."""
        values = {"object": {"name": "Ann", "age": 30}, "number": 5, "text": "x", "null": None}
        async with Manager("test", storage) as state:
            await state.set_many(values)
        async with Manager("test", storage) as state:
            entries = state._core.state.entries
            assert {type(entries[key]) for key in entries} == {Raw}
            for read in (state.get, lambda key: asyncio.sleep(0, state.get_nowait(key))):
                for key, value in values.items():
                    assert await read(key) == value
            assert await state.get("object", type=User) == User("Ann", 30)
            assert [type(entries[key]) for key in values] == [Raw, int, str, type(None)]
            assert state.status().unflushed_keys == 0

    async def test_size_and_membership(self, state: Manager) -> None:
        """Length and `in` work as on a dict, but an empty state is true."""
        assert len(state) == 0
        assert state
        await state.set("a", 1)
        assert len(state) == 1
        assert "a" in state
        assert "b" not in state
        assert 5 not in state

    @pytest.mark.parametrize("key", BAD_KEYS)
    async def test_a_key_out_of_bounds_is_refused_everywhere(self, state: Manager, key: Any) -> None:
        """InvalidKeyError from every call that takes a key, and nothing changes."""
        calls = [
            lambda: state.get(key),
            lambda: state.exists(key),
            lambda: state.get_many([key]),
            lambda: state.set(key, 1),
            lambda: state.set_many({key: 1}),
            lambda: state.delete(key),
            lambda: state.delete_many([key]),
            lambda: state.pop(key, None),
            lambda: state.update(key, lambda value: value, 1),
            lambda: state.incr(key),
            lambda: state.set_if_absent(key, 1),
            lambda: state.get_or_set(key, lambda: 1),
        ]
        for call in calls:
            with pytest.raises(InvalidKeyError):
                await call()  # type: ignore[no-untyped-call]
        with pytest.raises(InvalidKeyError):
            state.get_nowait(key)
        assert (len(state), state.revision) == (0, 0)

    async def test_a_prefix_or_keys_of_the_wrong_kind_are_refused(self, state: Manager) -> None:
        """A prefix that is no str, and one str where several keys belong, are TypeErrors."""
        with pytest.raises(TypeError, match="a prefix must be a str, not int"):
            await state.keys(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="such as a list of str, not one str"):
            await state.get_many("abc")
        with pytest.raises(TypeError, match="such as a list of str, not one str"):
            await state.delete_many("abc")

    async def test_str_subclasses_are_plain_keys(self, state: Manager) -> None:
        """A key of a subclass of str is stored as the str that it is."""

        class Name(str):
            __slots__ = ()

        await state.set(Name("key"), 1)
        assert await state.get(Name("key")) == 1
        assert [type(key) for key in await state.keys()] == [str]


class TestWriting:
    async def test_each_change_makes_one_revision(self, state: Manager) -> None:
        """One call, one revision; a call that changes nothing makes none."""
        assert await state.set("a", 1) == 1
        assert await state.set_many({"b": 2, "c": 3}) == 2
        assert await state.set_many({}) == 2
        assert await state.delete("nope") is False
        assert await state.delete_many(["nope", "a", "b"]) == 2
        assert state.revision == 3
        assert await state.delete_all("nope") == 0
        assert await state.delete_all() == 1
        assert await state.delete_all() == 0
        assert state.revision == 4

    async def test_set_many_is_all_or_nothing(self, state: Manager) -> None:
        """One bad value keeps all of them out; the error names the key and the path."""
        with pytest.raises(InvalidValueError, match="the value of 'bad'") as error:
            await state.set_many({"good": 1, "bad": {"x": [1, float("nan")]}})
        assert error.value.path == "$.x[1]"
        assert (await state.get_all(), state.revision) == ({}, 0)

    async def test_a_bad_value_changes_nothing(self, state: Manager) -> None:
        """After a refused set the old value is still there."""
        await state.set("key", 1)
        for bad in (float("inf"), object(), "\ud800", {"deep": lambda: 1}):
            with pytest.raises(InvalidValueError):
                await state.set("key", bad)
        assert (await state.get("key"), state.revision) == (1, 1)

    async def test_delete_all_by_prefix(self, state: Manager) -> None:
        """Only what begins with the prefix goes."""
        await state.set_many({"a/1": 1, "a/2": 2, "b": 3})
        assert await state.delete_all("a/") == 2
        assert await state.get_all() == {"b": 3}

    async def test_pop(self, state: Manager) -> None:
        """The value is returned and gone; a value of another type stays."""
        await state.set("key", [1])
        with pytest.raises(TypeMismatchError):
            await state.pop("key", type=int)
        assert await state.pop("key", type=list[int]) == [1]
        assert await state.pop("key", None) is None
        with pytest.raises(KeyNotFoundError):
            await state.pop("key")
        assert state.revision == 2

    async def test_update(self, state: Manager) -> None:
        """The function's result is stored, and returned."""
        assert await state.update("list", lambda value: (*value, 1), []) == (1,)
        assert await state.update("list", lambda value: [*value, 2], type=list[int]) == [1, 2]
        assert await state.get("list") == [1, 2]
        with pytest.raises(KeyNotFoundError):
            await state.update("nope", lambda value: value)

    async def test_update_that_fails_changes_nothing(self, state: Manager) -> None:
        """Whether the function raises, forgets its return, is async, or returns another type."""
        await state.set("list", [1])

        async def later(value: list[int]) -> list[int]:
            return value

        with pytest.raises(ZeroDivisionError):
            await state.update("list", lambda value: 1 // 0)
        with pytest.raises(InvalidValueError, match="returned None"):
            await state.update("list", lambda value: value.append(2))
        with pytest.raises(InvalidValueError, match="plain function"):
            await state.update("list", later)  # type: ignore[unused-coroutine]
        with pytest.raises(InvalidValueError, match="plain function"):
            await state.update("list", lambda value: asyncio.get_running_loop().create_future())
        with pytest.raises(TypeMismatchError):
            await state.update("list", lambda value: ["x"], type=list[int])  # type: ignore[list-item]
        assert (await state.get("list"), state.revision) == ([1], 1)

    async def test_none_may_stay_none(self, state: Manager) -> None:
        """A function given to update may return None for what was None."""
        await state.set("null", None)
        assert await state.update("null", lambda value: value) is None

    async def test_incr(self, state: Manager) -> None:
        """Counts from the default; ints stay ints; only finite numbers."""
        assert await state.incr("n") == 1
        assert await state.incr("n", -3) == -2
        assert await state.incr("f", 0.5, default=1) == 1.5
        await state.set("text", "x")
        with pytest.raises(TypeMismatchError, match="not a number, but a str"):
            await state.incr("text")
        await state.set("flag", True)
        with pytest.raises(TypeMismatchError):
            await state.incr("flag")
        for infinite in (float("nan"), float("inf")):
            with pytest.raises(InvalidValueError, match="needs a finite number as delta"):
                await state.incr("n", infinite)
            with pytest.raises(InvalidValueError, match="needs a finite number as default"):
                await state.incr("n", default=infinite)
        for delta in ("1", True, None):
            with pytest.raises(TypeError, match="needs an int or a float as delta"):
                await state.incr("n", delta)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="needs an int or a float as default, not str"):
            await state.incr("new", default="0")  # type: ignore[call-overload]
        assert await state.get("n") == -2

    async def test_incr_with_a_type(self, state: Manager) -> None:
        """The stored number and the sum must be of it; without one an int may become a float."""
        await state.set_many({"f": 1.5, "n": 1})
        assert await state.incr("f") == 2.5
        with pytest.raises(TypeMismatchError, match="key 'f': not a `int`"):
            await state.incr("f", type=int)
        with pytest.raises(TypeMismatchError, match="the new value of 'n': not a `int`"):
            await state.incr("n", 0.5, type=int)
        assert await state.get_all() == {"f": 2.5, "n": 1}
        assert await state.incr("n", type=int) == 2
        assert repr(await state.incr("n", type=float)) == "3.0"
        await state.set("text", "x")
        with pytest.raises(TypeMismatchError, match="not a number, but a str"):
            await state.incr("text", type=int | str)

    @pytest.mark.parametrize("prefix", [None, 0, False, b"", []])
    async def test_delete_all_of_no_prefix_deletes_nothing(self, state: Manager, prefix: Any) -> None:
        """What is false and no str is a TypeError, never every key."""
        await state.set("a", 1)
        with pytest.raises(TypeError, match="a prefix must be a str"):
            await state.delete_all(prefix)
        assert await state.get_all() == {"a": 1}

    async def test_set_if_absent_and_get_or_set(self, state: Manager) -> None:
        """The first one wins; a factory is called only when it is needed."""
        assert await state.set_if_absent("a", 1) is True
        assert await state.set_if_absent("a", 2) is False
        assert await state.get_or_set("a", lambda: 1 // 0) == 1
        user = await state.get_or_set("user", lambda: User("Ann"), type=User)
        assert user == User("Ann")
        assert await state.get_or_set("user", lambda: User("Bob"), type=User) == user
        with pytest.raises(TypeMismatchError):
            await state.get_or_set("b", lambda: "x", type=int)
        assert not await state.exists("b")

        async def make() -> int:
            return 1

        with pytest.raises(InvalidValueError, match="plain function"):
            await state.get_or_set("b", make)

    async def test_nothing_is_lost_between_two_tasks(self, state: Manager) -> None:
        """A hundred tasks that count together count right."""
        await asyncio.gather(*(state.incr("n") for _ in range(100)))
        assert await state.get("n") == 100


class TestLife:
    def test_a_name_is_checked_when_the_manager_is_made(self) -> None:
        """A name that could leave the directory never reaches a storage."""
        with pytest.raises(InvalidNameError):
            Manager("../x", MemoryStorage())

    async def test_every_call_needs_a_running_manager(self, storage: MemoryStorage) -> None:
        """Before start and after stop: ClosedError from every call, status apart."""
        manager = Manager("test", storage)
        await manager.stop()
        for _ in range(2):
            calls = [
                lambda: manager.get("a"),
                lambda: manager.get("a", 1),
                lambda: manager.get_many(["a"]),
                lambda: manager.get_all(),
                lambda: manager.exists("a"),
                lambda: manager.keys(),
                lambda: manager.set("a", 1),
                lambda: manager.set_many({"a": 1}),
                lambda: manager.delete("a"),
                lambda: manager.delete_all(),
                lambda: manager.delete_all("a"),
                lambda: manager.pop("a", 1),
                lambda: manager.update("a", lambda value: value, 1),
                lambda: manager.incr("a"),
                lambda: manager.set_if_absent("a", 1),
                lambda: manager.get_or_set("a", lambda: 1),
                lambda: manager.flush(),
                lambda: manager.catch_up(),
                lambda: manager.wait_durable(),
                lambda: manager.wait_revision(0),
                lambda: manager.transact(lambda tx: None),
            ]
            for call in calls:
                with pytest.raises(ClosedError):
                    await call()  # type: ignore[no-untyped-call]
            for plain in (lambda: len(manager), lambda: "a" in manager, lambda: manager.get_nowait("a", 1)):
                with pytest.raises(ClosedError):
                    plain()
            await manager.start()
            await manager.set("b", 1)
            await manager.stop()
        assert manager.status().phase == "stopped"
        assert storage.places["test"].session is None

    async def test_starting_twice_is_an_error(self, storage: MemoryStorage) -> None:
        """RuntimeError, and the manager goes on."""
        async with Manager("test", storage) as manager:
            with pytest.raises(RuntimeError, match="while it is running"):
                await manager.start()
            await manager.set("a", 1)

    async def test_stop_during_start_is_an_error(self) -> None:
        """The start is not the stopper's to end."""
        storage = FaultyStorage(MemoryStorage())
        storage.hang("open")
        manager = Manager("test", storage)
        starting = asyncio.create_task(manager.start())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="cancel start"):
            await manager.stop()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert manager.status().phase == "new"
        await manager.start()
        await manager.stop()

    async def test_starting_again_after_stop_works(self, storage: MemoryStorage) -> None:
        """Also in another event loop; values and revisions go on."""
        manager = Manager("test", storage)
        await manager.start()
        await manager.set("a", 1)
        await manager.stop()
        await manager.start()
        assert (await manager.get("a"), manager.revision) == (1, 1)
        await manager.stop()

    def test_one_manager_over_two_event_loops(self, storage: MemoryStorage) -> None:
        """What belongs to a loop is made anew by each start."""
        manager = Manager(Config(name="test", flush_interval=0), storage)

        async def run(number: int) -> list[str]:
            async with manager:
                await asyncio.gather(*(manager.set(f"{number}-{task}", 1) for task in range(3)))
                return await manager.keys()

        asyncio.run(run(1))
        assert len(asyncio.run(run(2))) == 6

    async def test_started_in_one_task_and_stopped_in_another(self, storage: MemoryStorage) -> None:
        """No cancel scope spans the two."""
        manager = Manager("test", storage)
        await asyncio.create_task(manager.start())
        await asyncio.create_task(_set(manager))
        await asyncio.create_task(manager.stop())
        assert storage.places["test"].session is None

    async def test_a_second_manager_is_refused(self, storage: MemoryStorage) -> None:
        """One state, one writer; the first goes on."""
        async with Manager("test", storage) as first:
            with pytest.raises(LockedError):
                await Manager("test", storage).start()
            async with Manager("other", storage):
                await first.set("a", 1)

    async def test_a_failed_load_lets_go(self, storage: MemoryStorage) -> None:
        """After a start that raised, the state is not locked."""
        async with Manager("test", storage) as manager:
            await manager.set("a", 1)
        place = storage.places["test"]
        good = place.snapshot
        place.snapshot = b"[]"
        manager = Manager("test", storage)
        with pytest.raises(Exception, match="not a JSON object"):
            await manager.start()
        assert manager.status().phase == "new"
        place.snapshot = good
        async with manager:
            assert await manager.get("a") == 1

    async def test_an_exception_in_the_body_goes_on_and_the_changes_are_kept(self, storage: MemoryStorage) -> None:
        """Leaving by an exception flushes as leaving does."""
        with pytest.raises(ZeroDivisionError):
            async with Manager(Config(name="test", flush_interval=None), storage) as manager:
                await manager.set("a", 1)
                raise ZeroDivisionError
        async with Manager("test", storage) as manager:
            assert await manager.get("a") == 1

    async def test_a_failed_stop_raises_or_becomes_a_note(self, caplog: pytest.LogCaptureFixture) -> None:
        """The error of the last flush is raised; beside an exception of the body it is a note."""
        config = Config(name="test", flush_interval=None, stop_timeout=0.05)
        storage = FaultyStorage(MemoryStorage())
        storage.fail("commit", times=100)
        with pytest.raises(UnavailableError, match="failed on demand"):
            async with Manager(config, storage) as manager:
                await manager.set("a", 1)
        with pytest.raises(ZeroDivisionError) as error:
            async with Manager(config, storage) as manager:
                await manager.set("a", 1)
                raise ZeroDivisionError
        assert "stop() of 'test' failed as well" in error.value.__notes__[0]
        assert "failed as well" in caplog.text

    async def test_status_in_every_phase(self, storage: MemoryStorage) -> None:
        """status() tells what is there, and never raises."""
        manager = Manager(Config(name="test", flush_interval=None), storage)
        assert manager.status() == Status(phase="new", keys=0, revision=0, durable_revision=0)
        assert (manager.revision, manager.durable_revision) == (0, 0)
        async with manager:
            await manager.set_many({"a": 1, "b": 2})
            status = manager.status()
            assert (status.phase, status.keys, status.revision) == ("running", 2, 1)
            assert (status.durable_revision, status.unflushed_keys, status.flushes) == (0, 2, 0)
            await manager.flush()
            status = manager.status()
            assert (status.durable_revision, status.unflushed_keys, status.flushes) == (1, 0, 1)
            assert status.journal_bytes > 0
        status = manager.status()
        assert (status.phase, status.keys, status.revision, status.durable_revision) == ("stopped", 0, 1, 1)
        assert status.snapshot_bytes > 0

    async def test_what_it_says_of_itself(self, storage: MemoryStorage) -> None:
        """The repr has name, phase and storage; the settings can be read."""
        manager = Manager("test", storage)
        assert repr(manager) == "<Manager 'test' new on <MemoryStorage []>>"
        assert manager.name == manager.config.name == "test"
        assert manager.config == Config(name="test")

    async def test_the_logger_can_be_chosen(self, caplog: pytest.LogCaptureFixture) -> None:
        """Failures are told to the logger that was given, without a value."""
        storage = FaultyStorage(MemoryStorage())
        storage.fail("commit")
        manager = Manager(Config(name="test", flush_interval=None), storage, logger=logging.getLogger("mine"))
        async with manager:
            await manager.set("password", "hunter2")
            with pytest.raises(UnavailableError) as error:
                await manager.flush()
        assert [record.name for record in caplog.records] == ["mine"]
        assert "hunter2" not in caplog.text + str(error.value)

    async def test_errors_can_be_copied(self) -> None:
        """Each waiter gets an error of its own."""
        error = KeyNotFoundError("key")
        assert str(copy.copy(error)) == str(error)


async def _set(manager: Manager) -> None:
    await manager.set("a", 1)


class TestPrefix:
    @pytest.fixture
    async def users(self, state: Manager) -> Calls:
        await state.set_many({"users/ann": 1, "users/bob": 2, "other": 3, "users": 4})
        return Calls(state._core, "users/")

    async def test_every_call_stays_under_the_prefix(self, state: Manager, users: Calls) -> None:
        """Keys are given and returned without it, and nothing outside is seen or touched."""
        assert len(users) == 2
        assert "ann" in users
        assert "other" not in users
        assert await users.get_all() == {"ann": 1, "bob": 2}
        assert await users.keys("b") == ["bob"]
        assert await users.get_many(["ann", "other"]) == {"ann": 1}
        await users.set("eve", {"age": 5})
        await users.set_many({"x": 1, "y": 2})
        assert await users.incr("x") == 2
        assert await users.update("y", lambda value: value + 5) == 7
        assert await users.pop("eve") == {"age": 5}
        assert await users.delete("x") is True
        with pytest.raises(KeyNotFoundError, match="no key 'x'"):
            await users.get("x")
        assert await users.delete_all() == 3
        assert await state.get_all() == {"other": 3, "users": 4}

    async def test_bounds_are_those_of_the_whole_key(self, users: Calls) -> None:
        """A key that is too long with its prefix is refused."""
        await users.set("x" * 1018, 1)
        with pytest.raises(InvalidKeyError):
            await users.set("x" * 1019, 1)


class TestArguments:
    async def test_what_is_no_mapping_no_revision_and_no_sum(self, state: Manager) -> None:
        """Each is a clear error, and nothing changes."""
        with pytest.raises(TypeError, match="needs a mapping"):
            await state.set_many([("a", 1)])  # type: ignore[arg-type]
        for revision in ("5", 1.5, True):
            with pytest.raises(TypeError, match="a revision must be an int"):
                await state.wait_durable(revision)  # type: ignore[arg-type]
        await state.set("huge", 10**400)
        with pytest.raises(InvalidValueError, match="too large"):
            await state.incr("huge", 1.5)
        assert state.revision == 1

    @pytest.mark.parametrize("seconds", ["1", True, [1]], ids=repr)
    async def test_a_timeout_of_another_type(self, state: Manager, seconds: Any) -> None:
        """A timeout that is no number is a TypeError, also where nothing has to be waited for."""
        with pytest.raises(
            TypeError, match=rf"^timeout must be a number of seconds or None, not {type(seconds).__name__}$"
        ):
            await state.wait_durable(timeout=seconds)

    @pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), 10**400], ids=range(5))
    async def test_a_timeout_out_of_bounds(self, state: Manager, seconds: float) -> None:
        """A timeout that is negative or not finite is a ValueError."""
        with pytest.raises(ValueError, match=r"^timeout must be a finite number of seconds, 0 or more; None waits"):
            await state.wait_durable(timeout=seconds)

    async def test_a_mismatch_names_the_key(self, state: Manager) -> None:
        """Among many keys, the error says which one it is about."""
        await state.set_many({"a": 1, "b": "x"})
        with pytest.raises(TypeMismatchError, match="key 'b': not a `int`"):
            await state.get_all(type=int)
        with pytest.raises(TypeMismatchError, match="the new value of 'a': not a `int`"):
            await state.update("a", lambda _: "x", type=int)  # type: ignore[arg-type,return-value]

    async def test_stop_that_failed_is_told_once(self) -> None:
        """A second stop() has nothing to stop."""
        storage = FaultyStorage(MemoryStorage())
        manager = Manager(Config(name="test", flush_interval=None, stop_timeout=0.05), storage)
        await manager.start()
        await manager.set("a", 1)
        storage.fail("commit", times=9)
        with pytest.raises(UnavailableError, match="failed on demand"):
            await manager.stop()
        await manager.stop()


async def test_numbers_while_another_thread_ends_the_stop(memory: MemoryStorage) -> None:
    """What a scrape in a thread of its own asks for is answered, wherever stop() is meanwhile."""

    class Flickering(Manager):
        """Loses its flusher right after it was looked at, as when `stop()` ends in another thread."""

        looked: bool
        real: Any

        @property
        def _flusher(self) -> Any:
            self.looked = not self.looked
            return self.real if self.looked else None

        @_flusher.setter
        def _flusher(self, flusher: Any) -> None:
            self.looked, self.real = False, flusher

    state = Flickering("test", memory)
    await state.start()
    await state.set("a", 1)
    asks: list[Callable[[], int]] = [
        lambda: state.status().revision,
        lambda: state.revision,
        lambda: state.durable_revision,
    ]
    for ask in asks:
        state.looked = False
        assert ask() in {0, 1}
    state.looked = False
    await state.stop()
