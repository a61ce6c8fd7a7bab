"""Litestar: the plugin, and the contract of its stores."""

from __future__ import annotations

import asyncio
import copy
import string
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar, Request, WebSocket, get, post, websocket
from litestar.datastructures import ImmutableState
from litestar.di import NamedDependency, Provide
from litestar.middleware.rate_limit import RateLimitConfig
from litestar.middleware.session.server_side import ServerSideSessionConfig
from litestar.params import FromQuery
from litestar.stores.registry import StoreRegistry
from litestar.testing import TestClient

from lab_state import (
    ClosedError,
    Config,
    FileStorage,
    InvalidKeyError,
    InvalidValueError,
    Manager,
    MemoryStorage,
    TypeMismatchError,
    UnavailableError,
)
from lab_state.integrations.litestar import LabStatePlugin, LabStateStore, health
from lab_state.testing import FaultyStorage, ManualClock

# The plugin


@get("/", sync_to_thread=False)
def names(request: Request[Any, Any, Any]) -> list[str]:
    return list(request.app.state.lab_state)


@post("/notes", status_code=200)
async def note(notes: NamedDependency[Manager], tags: NamedDependency[Manager]) -> list[int]:
    return [await notes.incr("n", type=int), await tags.incr("n", 10, type=int)]


@get("/plain", sync_to_thread=True)
def without_await(notes: NamedDependency[Manager]) -> int:
    return notes.blocking.incr("n", type=int)


@websocket("/socket")
async def socket(socket: WebSocket[Any, Any, Any], notes: NamedDependency[Manager]) -> None:
    await socket.accept()
    await socket.send_json(await notes.incr("n"))
    await socket.close()


def test_handlers_are_given_the_managers_they_ask_for() -> None:
    """Handlers with and without `async` and WebSockets get managers by parameter. The application's state has them by name."""
    notes, tags = Manager("my-notes", MemoryStorage()), Manager("my-tags", MemoryStorage())
    app = Litestar([names, note, without_await, socket, health()], plugins=[LabStatePlugin(notes=notes, tags=tags)])
    for started in (0, 1):
        with TestClient(app) as client:
            assert client.get("/").json() == ["my-notes", "my-tags"]
            assert client.post("/notes").json() == [1 + 3 * started, 10 + 10 * started]
            assert client.get("/plain").json() == 2 + 3 * started
            with client.websocket_connect("/socket") as connected:
                assert connected.receive_json() == 3 + 3 * started
            assert client.get("/health").json()["healthy"]
        assert [one.status().phase for one in (notes, tags)] == ["stopped", "stopped"]
    assert app.openapi_schema.to_schema()["paths"]["/notes"]["post"].get("parameters") is None


@get("/copied", sync_to_thread=False)
def copied(state: ImmutableState) -> list[Any]:
    served = state.lab_state
    return [copy.copy(served) is served, repr(served), {name: one.get_nowait("n", 0) for name, one in served.items()}]


def test_a_handler_may_have_a_copy_of_the_state() -> None:
    """`ImmutableState`, a deep copy of the application's state, contains the same running managers."""
    notes = Manager("my-notes", MemoryStorage())
    with TestClient(Litestar([copied], plugins=[LabStatePlugin(notes=notes)])) as client:
        assert client.get("/copied").json() == [True, repr({"my-notes": notes}), {"my-notes": 0}]


async def test_managers_run_before_and_after_everything_else() -> None:
    """Another lifespan of the application finds the managers running, at its start and at its end."""
    state = Manager("a", MemoryStorage())
    seen = []

    @asynccontextmanager
    async def inner(app: Litestar) -> AsyncGenerator[None]:
        seen.append(state.status().phase)
        yield
        seen.append(state.status().phase)

    app = Litestar(plugins=[LabStatePlugin(a=state)], lifespan=[inner])
    async with app.lifespan():
        pass
    assert seen == ["running", "running"]
    assert state.status().phase == "stopped"


async def test_what_had_started_is_stopped_when_a_later_one_fails() -> None:
    """A manager that cannot be started stops those before it, and its error is the application's."""
    faulty = FaultyStorage(MemoryStorage())
    faulty.fail("open")
    first = Manager("first", MemoryStorage())
    app = Litestar(plugins=[LabStatePlugin(first=first, second=Manager("second", faulty))])
    with pytest.RaisesGroup(UnavailableError):  # Litestar's own task group makes it one
        await app.lifespan().__aenter__()
    assert first.status().phase == "stopped"


def test_arguments_are_checked_at_once() -> None:
    """Reserved names, two managers of one name, and other objects are errors at once."""
    state = Manager("a", MemoryStorage())
    with pytest.raises(ValueError, match="Litestar keeps the parameter 'state' for itself"):
        LabStatePlugin(state=state)
    with pytest.raises(ValueError, match="two managers or readers have the name 'a'"):
        LabStatePlugin(one=state, two=Manager("a", MemoryStorage()))
    with pytest.raises(TypeError, match=r"a lab_state\.Manager or a lab_state\.Reader was expected"):
        LabStatePlugin(one="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is a dependency 'a' already"):
        Litestar(plugins=[LabStatePlugin(a=state)], dependencies={"a": Provide(lambda: 1, sync_to_thread=False)})
    with pytest.raises(ValueError, match="pass all managers and readers to one plugin"):
        Litestar(plugins=[LabStatePlugin(a=state), LabStatePlugin(b=Manager("b", MemoryStorage()))])
    with pytest.raises(ValueError, match="above 0"):
        health(max_unflushed_age=0)


def test_health_turns_when_writes_are_not_durable_for_long() -> None:
    """Health is 503 when the oldest change that is not durable is older than the bound."""
    clock, storage = ManualClock(), FaultyStorage(MemoryStorage())
    state = Manager(Config(name="a", flush_interval=None), storage, clock=clock)
    app = Litestar([health("/live", max_unflushed_age=10)], plugins=[LabStatePlugin(a=state)])
    with TestClient(app) as client, client.portal() as portal:
        portal.call(state.set, "key", 1)
        clock.advance(10)
        answer = client.get("/live")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        clock.advance(1)
        answer = client.get("/live")
        assert answer.status_code == 503
        assert answer.json()["problems"] == ["a has a change that is 11.0 s old and not durable"]


def test_health_without_the_plugin() -> None:
    """An application without managers is not healthy."""
    with TestClient(Litestar([health()])) as client:
        assert client.get("/health").status_code == 503


# Sessions, rate limits and cached responses over a restart


@post("/login", status_code=200)
async def login(request: Request[Any, Any, Any], name: FromQuery[str]) -> None:
    request.set_session({"name": name})


@get("/me", sync_to_thread=False)
def me(request: Request[Any, Any, Any]) -> str:
    return str(request.session.get("name"))


calls: list[str] = []


@get("/slow", cache=100, sync_to_thread=False)
def slow() -> str:
    calls.append("slow")
    return "cached"


def litestar_on(directory: Path) -> Litestar:
    state = Manager("web", FileStorage(directory))
    limit = RateLimitConfig(rate_limit=("hour", 6), exclude=["/login", "/me"])
    return Litestar(
        [login, me, slow],
        plugins=[LabStatePlugin(web=state)],
        stores=StoreRegistry(default_factory=LabStateStore(state.namespace("litestar")).with_namespace),
        middleware=[ServerSideSessionConfig(renew_on_access=True).middleware, limit.middleware],
        openapi_config=None,
    )


def test_sessions_rate_limits_and_cached_responses_outlive_the_process(tmp_path: Path) -> None:
    """A new application on the same state knows the session, serves the cached response and goes on counting."""
    calls.clear()
    with TestClient(litestar_on(tmp_path)) as client:
        assert client.get("/me").text == "None"
        client.post("/login?name=ann")
        assert client.get("/me").text == "ann"
        assert client.get("/slow").text == "cached"
        left = int(client.get("/slow").headers["ratelimit-remaining"])
        cookies = dict(client.cookies)
    with TestClient(litestar_on(tmp_path), cookies=cookies) as client:
        assert client.get("/me").text == "ann"
        answer = client.get("/slow")
        assert answer.text == "cached"
        assert int(answer.headers["ratelimit-remaining"]) == left - 1
    assert calls == ["slow"]


# The contract of a store


@pytest.fixture
async def state(clock: ManualClock) -> AsyncIterator[Manager]:
    async with Manager("web", MemoryStorage(), clock=clock) as state:
        yield state


@pytest.fixture
def store(state: Manager) -> LabStateStore:
    return LabStateStore(state.namespace("litestar"))


async def test_get(store: LabStateStore) -> None:
    """A value comes back as bytes; what is missing is `None`."""
    assert await store.get("key") is None
    await store.set("key", b"value", 60)
    assert await store.get("key") == b"value"


@pytest.mark.parametrize(
    "value", ["text", "", "ü\0\n", b"bytes", b"", b"\xff\x00\xfe", b'{"json": 1}', b'{"base64": ""}'], ids=repr
)
async def test_values_survive(store: LabStateStore, value: str | bytes) -> None:
    """Text and bytes of every kind come back as bytes."""
    await store.set("key", value)
    assert await store.get("key") == (value.encode() if isinstance(value, str) else value)


async def test_values_are_readable_in_the_file(store: LabStateStore, state: Manager) -> None:
    """Text is a JSON string, and other bytes are an object."""
    await store.set("text", b"text")
    await store.set("bytes", b"\xff")
    assert await state.get_all() == {"litestar/text": "text", "litestar/bytes": {"base64": "/w=="}}


@pytest.mark.parametrize(
    "key", [*string.punctuation, "fooü", "..", "", "a/b", "$lab_state", "\0", "\ud800", "k" * 5000], ids=ascii
)
async def test_any_string_is_a_key(store: LabStateStore, key: str) -> None:
    """Keys with special characters, the empty key and long keys work, and stay apart."""
    await store.set(key, b"value")
    await store.set(f"{key}.", b"other")
    assert await store.get(key) == b"value"
    assert await store.exists(key)
    await store.delete(key)
    assert not await store.exists(key)
    assert await store.get(f"{key}.") == b"other"


@pytest.mark.parametrize("expires_in", [1, timedelta(seconds=1)], ids=repr)
async def test_expiry(store: LabStateStore, clock: ManualClock, expires_in: int | timedelta) -> None:
    """A value is gone when its time has come."""
    await store.set("key", b"value", expires_in=expires_in)
    clock.advance(0.9)
    assert await store.exists("key")
    clock.advance(0.1)
    assert await store.get("key") is None
    assert not await store.exists("key")


@pytest.mark.parametrize("expires_in", [0, -1, timedelta(0), timedelta(seconds=-1)], ids=repr)
async def test_what_has_expired_is_not_stored(store: LabStateStore, expires_in: int | timedelta) -> None:
    """An expiry of 0 seconds or less stores nothing, and deletes the old value."""
    await store.set("key", b"old")
    await store.set("key", b"new", expires_in=expires_in)
    assert await store.get("key") is None


@pytest.mark.parametrize(("value", "expires_in"), [(5, None), (memoryview(b"v"), 0), (b"v", False), (b"v", "60")])
async def test_bad_values_change_nothing(store: LabStateStore, value: Any, expires_in: Any) -> None:
    """A value that is neither text nor bytes, and an expiry that is no number, are a `TypeError`. The old value stays."""
    await store.set("key", b"old")
    with pytest.raises(TypeError, match=r"a value of a store is a str or bytes, not|ttl must be a number of seconds"):
        await store.set("key", value, expires_in)
    assert await store.get("key") == b"old"


@pytest.mark.parametrize("renew_for", [10, timedelta(seconds=10)], ids=repr)
async def test_get_and_renew(store: LabStateStore, clock: ManualClock, renew_for: int | timedelta) -> None:
    """A read can renew: the value expires that long after the read."""
    for value in (b"text", b"\xff"):
        await store.set("key", value, expires_in=1)
        clock.advance(0.5)
        assert await store.get("key", renew_for=renew_for) == value
        clock.advance(9.5)
        assert await store.get("key") == value
        assert await store.expires_in("key") == 1
        clock.advance(0.5)
        assert await store.get("key", renew_for=renew_for) is None


async def test_what_does_not_expire_is_not_renewed(store: LabStateStore, state: Manager) -> None:
    """Renewing a value that does not expire, a missing value, or for 0 seconds changes nothing."""
    await store.set("key", b"value")
    revision = state.revision
    assert await store.get("key", renew_for=10) == b"value"
    assert await store.get("missing", renew_for=10) is None
    assert await store.expires_in("key") == -1
    await store.set("key", b"value", expires_in=5)
    assert await store.get("key", renew_for=0) == b"value"
    assert await store.expires_in("key") == 5
    assert state.revision == revision + 1
    with pytest.raises(InvalidValueError):
        await store.get("key", renew_for=-1)


async def test_renewing_does_not_bring_back_what_was_deleted(store: LabStateStore) -> None:
    """In any order of deletes, writes and renewals, a renewal undoes none of them."""
    for _ in range(20):
        await store.set("key", b"old", expires_in=5)
        _, _, renewed = await asyncio.gather(
            store.get("key", renew_for=10), store.delete("key"), store.get("key", renew_for=10)
        )
        assert renewed is None
        assert await store.get("key") is None


async def test_workers_renew_the_same_value(tmp_path: Path) -> None:
    """In a shared state, two workers that renew a value at the same time both get it."""
    config, storage = Config("web", shared=True), FileStorage(tmp_path)
    async with Manager(config, storage) as owner, Manager(config, storage) as follower:
        stores = [LabStateStore(each.namespace("litestar")) for each in (owner, follower)]
        await stores[0].set("key", b"value", expires_in=5)
        assert await asyncio.gather(*(store.get("key", renew_for=100) for store in stores * 5)) == [b"value"] * 10
        assert [await store.expires_in("key") for store in stores] == [100, 100]


async def test_delete(store: LabStateStore) -> None:
    """A deleted value is gone; deleting what is missing is no error."""
    await store.set("key", b"value", 60)
    await store.delete("key")
    assert await store.get("key") is None
    await store.delete("key")


async def test_expires_in(store: LabStateStore, clock: ManualClock) -> None:
    """`expires_in` returns whole seconds, rounded up; -1 for a value that does not expire; `None` for a missing or expired one."""
    assert await store.expires_in("key") is None
    await store.set("key", b"value")
    assert await store.expires_in("key") == -1
    await store.set("key", b"value", expires_in=10)
    assert await store.expires_in("key") == 10
    clock.advance(9.5)
    assert await store.expires_in("key") == 1
    clock.advance(0.5)
    assert await store.expires_in("key") is None


async def test_delete_all(store: LabStateStore, state: Manager) -> None:
    """`delete_all` deletes everything in the store, and nothing outside it."""
    await state.set("other", 1)
    for i in range(10):
        await store.set(f"key-{i}", b"value", expires_in=10 if i % 2 else None)
    await store.delete_all()
    assert await state.get_all() == {"other": 1}


@pytest.mark.parametrize("name", ["foo", "foo/bar", "", "%", "n" * 1000], ids=repr)
async def test_namespaces_are_apart(store: LabStateStore, name: str) -> None:
    """The same key in a store and in a namespace of it has two values."""
    within = store.with_namespace(name)
    await store.set("bar", b"here")
    await within.set("bar", b"within")
    await store.set(f"{name}/bar", b"slash")
    assert [await store.get("bar"), await within.get("bar"), await store.get(f"{name}/bar")] == [
        b"here",
        b"within",
        b"slash",
    ]


async def test_delete_all_of_a_namespace_stays_within(store: LabStateStore) -> None:
    """`delete_all` of a namespace leaves its parent and its siblings."""
    within, beside = store.with_namespace("foo"), store.with_namespace("foo-bar")
    for one in (store, within, beside, within.with_namespace("deeper")):
        await one.set("key", b"value")
    await within.delete_all()
    assert [await one.exists("key") for one in (store, within, beside)] == [True, False, True]
    assert not await within.with_namespace("deeper").exists("key")


async def test_delete_all_reaches_the_namespaces_within(store: LabStateStore) -> None:
    """A store's `delete_all` deletes what its namespaces hold."""
    within = store.with_namespace("foo")
    await within.set("key", b"value")
    await store.delete_all()
    assert await within.get("key") is None


async def test_namespaces_have_a_depth(store: LabStateStore) -> None:
    """Namespaces that are nested too deeply for a key are an error."""
    with pytest.raises(InvalidKeyError):
        for _ in range(10):
            store = store.with_namespace("n" * 256)


async def test_what_others_keep_there_is_an_error(store: LabStateStore, state: Manager) -> None:
    """A value of other code in the namespace is an error, and is not taken for missing."""
    await state.set("litestar/key", 1)
    with pytest.raises(TypeMismatchError):
        await store.get("key")


async def test_the_store_does_not_own_the_manager(state: Manager) -> None:
    """Leaving the store leaves the manager running; a stopped manager is an error."""
    store = LabStateStore(state.namespace("litestar"))
    async with store:
        await store.set("key", b"value")
    assert state.status().phase == "running"
    await state.stop()
    with pytest.raises(ClosedError):
        await store.get("key")


def test_a_store_needs_a_namespace() -> None:
    """A whole manager is refused, because `delete_all` would empty it."""
    with pytest.raises(TypeError, match=r"such as state\.namespace\('litestar'\); not Manager$"):
        LabStateStore(Manager("web", MemoryStorage()))  # type: ignore[arg-type]
