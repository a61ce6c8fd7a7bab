"""`_handle`: copies, pickles, weak references and patches of a manager and its handles; keys that are not plain text."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import pickle
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
from unittest import mock

import loguru
import pytest
import structlog
from markupsafe import Markup

from lab_state import Config, Manager, MemoryCache, MemoryStorage, StorageError
from lab_state.testing import FaultyStorage

PHASES = ("new", "running", "stopped")


@asynccontextmanager
async def in_phase(phase: str) -> AsyncIterator[tuple[Manager, dict[str, Any]]]:
    """Return a manager and everything that is made of it."""
    cache = MemoryCache()
    state = Manager(Config(name="x", flush_interval=None), MemoryStorage(), cache)
    made: dict[str, Any] = {
        "manager": state,
        "namespace": state.namespace("a"),
        "entry": state.entry("n", int, default=0),
        "blocking": state.blocking,
        "blocking entry": state.blocking.entry("n", int, default=0),
        "reader": cache.reader("x"),
    }
    if phase != "new":
        await state.start()
        async with state.transaction() as made["transaction"]:
            pass
    if phase == "stopped":
        await state.stop()
    try:
        yield state, made
    finally:
        await state.stop()


@pytest.mark.parametrize("phase", PHASES)
async def test_a_copy_is_the_object_itself(phase: str) -> None:
    """`copy`, `deepcopy` and `dataclasses.asdict` give the same object, in every phase."""
    async with in_phase(phase) as (_, made):
        for what in made.values():
            assert copy.copy(what) is what
            assert copy.deepcopy({"a": [what]})["a"][0] is what
        holder = dataclasses.make_dataclass("App", ["what"])(made["entry"])
        assert dataclasses.asdict(holder)["what"] is made["entry"]


@pytest.mark.parametrize("phase", PHASES)
async def test_nothing_of_it_can_be_pickled(phase: str) -> None:
    """`pickle` raises `TypeError` with what to do instead, in every phase and with every protocol."""
    async with in_phase(phase) as (state, made):
        for kind, what in made.items():
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with pytest.raises(TypeError, match=r"cannot be pickled: make .* in the other process") as caught:
                    pickle.dumps([what], protocol)
                if kind in {"manager", "reader"}:
                    assert str(caught.value).startswith(f"a {kind} cannot")
        assert state.status().phase == phase


async def test_a_copy_of_a_running_manager_leaves_it_alone() -> None:
    """What is done to a copy is done to the manager."""
    state = Manager("x", MemoryStorage())
    await state.start()
    await copy.copy(state).stop()
    assert state.status().phase == "stopped"


@pytest.mark.parametrize("phase", PHASES)
async def test_all_of_them_have_weak_references(phase: str) -> None:
    """Each can be kept weakly, such as one manager for each tenant."""
    async with in_phase(phase) as (_, made):
        for kind, what in made.items():
            assert weakref.ref(what)() is what, kind
    tenants = weakref.WeakValueDictionary({"ann": Manager("ann", MemoryStorage())})
    gc.collect()
    assert "ann" not in tenants


async def test_a_call_can_be_patched_on_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """`monkeypatch` and `mock` put a function over a call of one manager, and take it away again."""
    async with Manager("x", MemoryStorage()) as state, Manager("y", MemoryStorage()) as other:
        await state.set("k", 1)
        await other.set("k", 2)
        with monkeypatch.context() as patched:
            patched.setattr(state, "get", mock.AsyncMock(return_value="patched"))
            assert (await state.get("k"), await other.get("k")) == ("patched", 2)
            assert await state.entry("k", str).get() == "patched"
        assert await state.get("k") == 1
        entry, namespace = state.entry("k", int), state.namespace("a")
        for target in (entry, namespace, state.blocking):
            with mock.patch.object(target, "get", new=mock.Mock(return_value=7)):
                assert cast("Any", target).get() == 7
        assert await entry.get() == 1


# Keys of a class of their own


class Shouts(str):
    """Text that changes what it is added to, and how it is shown."""

    __slots__ = ()

    def __radd__(self, other: str) -> str:
        return f"{other.upper()}!{str.__str__(self)}"

    def __str__(self) -> str:
        return "shown"


@pytest.mark.parametrize("kind", [Markup, Shouts])
async def test_a_key_is_taken_as_its_text(kind: type[str]) -> None:
    """A key that is a subclass of `str` is its text in every call, in a namespace too."""
    async with Manager(Config(name="x", flush_interval=None), MemoryStorage()) as state:
        for scope, full in ((state, "k"), (state.namespace("a&b"), "a&b/k")):
            key = kind("k")
            await scope.set(key, 1)
            assert await state.keys() == [full]
            assert type((await state.keys())[0]) is str
            assert (await scope.get(key), scope.get_nowait(key), key in scope) == (1, 1, True)
            assert await scope.get(key, type=int) == 1
            assert await scope.exists(key)
            assert await scope.get_many([key]) == {"k": 1}
            assert await scope.expires_in(key) is None
            assert await scope.touch(key, 60)
            assert await scope.incr(key) == 2
            assert await scope.update(key, lambda n: n + 1) == 3
            async with scope.transaction() as tx:
                tx.set(key, 5)
                assert tx.get(key) == 5
            assert await scope.entry(key, int).get() == 5
            assert await scope.namespace(kind("n")).keys() == []
            await scope.set_many({key: 6})
            assert await scope.keys(kind("k")) == ["k"]
            assert await scope.get(kind("other"), "default") == "default"
            assert await scope.delete(key)
            assert await state.keys() == []


# Loggers


@pytest.mark.parametrize(
    "logger", [print, "name", 5, logging.Logger, object()], ids=["print", "a str", "5", "a class", "an object"]
)
def test_what_is_no_logger_is_refused(logger: Any) -> None:
    """`Manager()` raises, rather than the first failure."""
    with pytest.raises(TypeError, match="logger must be a logger such as logging"):
        Manager("x", MemoryStorage(), logger=logger)


async def test_loggers_of_others_get_the_whole_message() -> None:
    """loguru, structlog and an adapter get one text, in which everything is filled in."""
    lines: list[str] = []
    number = loguru.logger.add(lambda message: lines.append(str(message)))
    entries: list[dict[str, Any]] = []

    def keep(_: object, __: str, event: Any) -> Any:
        entries.append(dict(event))
        raise structlog.DropEvent

    adapter = logging.LoggerAdapter(logging.getLogger("adapted"), {})
    try:
        for logger in (loguru.logger, structlog.wrap_logger(None, processors=[keep]), adapter):
            disk = FaultyStorage(MemoryStorage())
            disk.fail("commit", times=1)
            async with Manager(Config(name="bot", flush_interval=None), disk, logger=logger) as state:
                await state.set("a", 1)
                with pytest.raises(StorageError):
                    await state.flush()
    finally:
        loguru.logger.remove(number)
    for texts in (lines, [entry["event"] for entry in entries]):
        assert len(texts) == 4
        for words, text in zip(("loaded", "a flush failed", "flushed again", "stopped"), texts, strict=True):
            assert f"bot: {words}" in text
        assert not any("%s" in text for text in texts)


def test_another_event_loop_than_asyncios_is_named() -> None:
    """Under trio there is no event loop of asyncio: the message says what is needed."""
    state = Manager("x", MemoryStorage())
    starting = state.start()
    with pytest.raises(RuntimeError, match="lab_state needs asyncio"):
        starting.send(None)
    assert state.status().phase == "new"
