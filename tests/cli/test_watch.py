"""`watch`: the changes of a state as they come, from its files or by way of the owner of a shared state."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from command import Run, start
from commanded import Kind, World

from lab_state import Config, FileStorage, Manager
from lab_state._codec import LoadedState
from lab_state.cli._watch import advance


@asynccontextmanager
async def watching(world: World, *arguments: str) -> AsyncGenerator[Run]:
    """Run `watch` for the time of the block. Then interrupt it with Ctrl-C: it ends with code 130 and without a word."""
    run = await asyncio.to_thread(start, "watch", world.state, *arguments, cwd=world.directory, env=world.env)
    # A run that hangs is killed. Otherwise the thread that reads its output would never end.
    timer = threading.Timer(30, run.kill)
    timer.start()
    try:
        line = await asyncio.to_thread(run.stderr.readline)
        assert line.startswith(b"lab-state: watching ")
        assert world.state.encode() in line
        yield run
        run.kill(signal.SIGINT)
        done = await asyncio.to_thread(run.wait)
        assert (done.code, done.err) == (130, "")
    finally:
        with suppress(ProcessLookupError):
            run.kill()
        timer.cancel()


async def next_lines(run: Run, count: int) -> list[Any]:
    return [json.loads(await asyncio.to_thread(run.stdout.readline)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["running", "shared"])
async def test_changes_as_they_come(tmp_path: Path, kind: Kind) -> None:
    """Each change to a key with the prefix is printed, also the end of a key that expires."""
    world = World(kind, tmp_path)
    async with world.filled():
        assert world.manager is not None
        async with watching(world, "--nl", "stock/") as run:
            await world.manager.set("stock/apple", 1)
            (line,) = await next_lines(run, 1)
            assert (line["revision"], line["kind"], line["key"], line["value"]) == (4, "set", "stock/apple", 1)
            assert line.keys() == {"revision", "wall", "kind", "key", "value", "expires"}
            await world.manager.set("cart/bob", 1)
            await world.manager.delete("stock/pear")
            (line,) = await next_lines(run, 1)
            assert (line["revision"], line["kind"], line["key"]) == (6, "delete", "stock/pear")
            await world.manager.set("stock/plum", 1, ttl=0.001)
            lines = await next_lines(run, 2)
            assert [(line["kind"], line["key"]) for line in lines] == [("set", "stock/plum"), ("delete", "stock/plum")]
            await world.manager.delete_all()
            (line,) = await next_lines(run, 1)
            assert line["kind"] in {"clear", "delete"}


async def test_a_checkpoint_hides_no_change(tmp_path: Path) -> None:
    """If the records of a change are gone, the two moments are compared. A stop and a start are no change."""
    world = World("running", tmp_path)
    async with world.filled():
        assert world.manager is not None
        async with watching(world) as run:
            await world.manager.stop()
            async with Manager("shop", FileStorage(tmp_path / "state")) as state:
                await state.set("stock/apple", 1)
            line = await asyncio.to_thread(run.stdout.readline)
            assert line.endswith(b"  r4  set  stock/apple  1\n")
        await world.manager.start()


async def test_moments_are_compared_or_records_read(tmp_path: Path) -> None:
    """`advance` reads records if they follow. Otherwise it compares, also with an older state that was put back."""
    storage = FileStorage(tmp_path)
    async with Manager(Config(name="shop", flush_interval=0), storage) as state:
        await state.set("a", 1)
        now, changes = await advance(LoadedState({}, 0), storage, "shop", "")
        assert [(change.kind, change.key, change.revision) for change in changes] == [("set", "a", 1)]
        again, changes = await advance(now, storage, "shop", "")
        assert (again.revision, changes) == (1, [])
    later = LoadedState({"b": now.entries["a"]}, 9)
    back, changes = await advance(later, storage, "shop", "")
    assert back.revision == 1
    assert [(change.kind, change.key, change.revision) for change in changes] == [("set", "a", 1), ("delete", "b", 1)]


async def test_the_owner_changes(tmp_path: Path) -> None:
    """If the owner ends, `watch` goes on with the next owner, and then with the files. No change is left out."""
    world = World("shared", tmp_path)
    async with world.filled():
        assert world.manager is not None
        async with watching(world, "--nl") as run:
            async with Manager(Config(name="shop", shared=True), FileStorage(tmp_path / "state")) as second:
                await second.set("one", 1)
                await next_lines(run, 1)
                await world.manager.stop()
                await second.set("two", 2)
                (line,) = await next_lines(run, 1)
                assert (line["revision"], line["key"]) == (5, "two")
            async with Manager(Config(name="shop", flush_interval=0), FileStorage(tmp_path / "state")) as alone:
                await alone.set("three", 3)
                (line,) = await next_lines(run, 1)
                assert (line["revision"], line["key"]) == (6, "three")
        await world.manager.start()


@pytest.mark.parametrize("kind", ["running", "shared"])
async def test_a_reader_that_closes_the_pipe(tmp_path: Path, kind: Kind) -> None:
    """The next change then ends the command with code 141, without a word."""
    world = World(kind, tmp_path)
    async with world.filled():
        assert world.manager is not None
        run = await asyncio.to_thread(start, "watch", world.state, cwd=tmp_path)
        timer = threading.Timer(30, run.kill)
        timer.start()
        await asyncio.to_thread(run.stderr.readline)
        run.stdout.close()
        await world.manager.set("a", 1)
        done = await asyncio.to_thread(run.wait)
        timer.cancel()
        assert (done.code, done.err) == (141, "")


async def test_a_state_that_is_missing(tmp_path: Path) -> None:
    """`watch` of a missing state ends with code 1, and in a bucket as well."""
    kinds: tuple[Kind, ...] = ("stopped", "stopped in a bucket")
    for kind in kinds:
        world = World(kind, tmp_path)
        done = await world.run("watch", world.state)
        assert (done.code, done.out) == (1, "")


async def test_a_bucket_is_watched(tmp_path: Path) -> None:
    """A state in a bucket is read every few seconds."""
    world = World("running in a bucket", tmp_path)
    async with world.filled():
        assert world.manager is not None
        async with watching(world, "--nl") as run:
            await world.manager.set("stock/apple", 1)
            (line,) = await next_lines(run, 1)
            assert (line["key"], line["value"]) == ("stock/apple", 1)
