"""SIGKILL of the writer, of Redis, of both, and a network that cuts and delays: no reader reads what is not durable."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lab_state import Config, FileStorage, KeyNotFoundError, Manager, Reader, RedisCache, UnavailableError

ROUNDS = int(os.environ.get("LAB_STATE_CACHE_ROUNDS", "50"))
WORKER = Path(__file__).with_name("worker.py")
REST_SECONDS = 20.0


def _import_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cache_kill_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _import_worker()


class Zygote:
    """The process that forks the writers."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def bear(self, cycle: int, changes: int, url: str) -> None:
        self._stdin.write(f"{cycle} {changes} {url}\n".encode())

    async def words(self) -> list[str]:
        line = await self._stdout.readline()
        assert line, "the zygote died"
        return line.decode().split()


@contextlib.asynccontextmanager
async def zygote(directory: Path) -> AsyncIterator[Zygote]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, WORKER, directory, stdin=pipe, stdout=pipe, start_new_session=True
    )
    try:
        yield Zygote(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its child as well, when a test fails
        await process.wait()


class Witness:
    """What may be durable at each revision, and what readers have read."""

    def __init__(self) -> None:
        self._model = worker.Model({}, 0)
        self._cycle = 0
        self.acknowledged = self.tried = 0
        self.durable = {0: worker.digest({})}
        self.sightings: dict[int, set[str]] = {}
        self.all_sightings = 0

    def found(self, cycle: int, revision: int, digest: str) -> None:
        """Note the start of a writer: everything up to this revision was durable, and nothing above it ever was."""
        assert self.acknowledged <= revision <= self.tried
        while self._model.revision < revision:
            self._model.next(self._cycle)
            self.durable[self._model.revision] = worker.digest(self._model.entries)
        assert digest == self.durable[revision]
        self.check()
        self._cycle, self.acknowledged, self.tried = cycle, revision, revision

    def saw(self, entries: dict[str, Any]) -> int:
        """Note what a reader got."""
        revision: int = entries.get(worker.AT, 0)
        self.sightings.setdefault(revision, set()).add(worker.digest(entries))
        self.all_sightings += 1
        return revision

    def check(self) -> None:
        """Check that everything that was seen was durable."""
        for revision, digests in self.sightings.items():
            assert revision in self.durable, f"revision {revision} was seen, and is gone"
            assert digests == {self.durable[revision]}, f"revision {revision} was seen in another form"
        self.sightings.clear()


async def watch(reader: Reader, witness: Witness) -> None:
    """Read for ever, and check that revisions never go back."""
    last = 0
    while True:
        try:
            revision = witness.saw(await reader.get_all())
        except UnavailableError:
            pass
        else:
            assert revision >= last, f"{reader!r} went back from {last} to {revision}"
            last = revision
        await asyncio.sleep(0.002)


class Troubles:
    """What happens to Redis and the network in one round."""

    def __init__(self, dice: random.Random, redis: Any, proxy: Any) -> None:
        self._dice = dice
        self._redis = redis
        self._proxy = proxy
        self.counts: dict[str, int] = {}

    async def some(self) -> None:
        for _ in range(self._dice.choice((0, 1, 1, 2, 3))):
            await asyncio.sleep(self._dice.uniform(0, 0.06))
            what = self._dice.choice(
                (self.kill_redis, self.cut, self.delay, self.refuse, self.flush, self.save, self.hold, self.wrong_type)
            )
            self.counts[what.__name__] = self.counts.get(what.__name__, 0) + 1
            await what()

    async def kill_redis(self) -> None:
        """Kill Redis, and start it: it comes back empty, or with what it last saved."""
        self._redis.kill()
        await asyncio.sleep(self._dice.choice((0, 0.02)))
        await asyncio.to_thread(self._redis.start)

    async def save(self) -> None:
        await asyncio.to_thread(self._redis.call, "SAVE")

    async def flush(self) -> None:
        await asyncio.to_thread(self._redis.call, "FLUSHALL")

    async def wrong_type(self) -> None:
        await asyncio.to_thread(self._redis.call, "SET", f"lab_state:{{{worker.NAME}}}", "x")

    async def cut(self) -> None:
        self._proxy.cut()

    async def refuse(self) -> None:
        await self._proxy.stop()
        await asyncio.sleep(0.02)
        await self._proxy.start()

    async def delay(self) -> None:
        self._proxy.delay = self._dice.choice((0, 0, 0.002, 0.02))

    async def hold(self) -> None:
        """Hold what was sent, so that it arrives late, after other connections may have been made."""
        self._proxy.open.clear()
        await asyncio.sleep(0.05)
        self._proxy.open.set()

    async def none(self) -> None:
        self._proxy.delay = 0.0


async def one_round(  # noqa: PLR0917 -- a round has many parts
    cycle: int, dice: random.Random, witness: Witness, writers: Zygote, troubles: Troubles, reader: Reader, url: str
) -> bool:
    """Run a writer with troubles; return whether it came to rest before it was killed."""
    rests = dice.random() < 0.6
    writers.bear(cycle, dice.choice((3, 30, 100)), url)
    life = dice.uniform(0.01, 0.3)
    deadline: float | None = None
    trouble = asyncio.create_task(troubles.some())
    pid, rested = 0, False
    while True:
        try:
            async with asyncio.timeout(None if deadline is None else max(0, deadline - time.monotonic())):
                word, *rest = await writers.words()
        except TimeoutError:
            deadline = None
            os.kill(pid, signal.SIGKILL)
            continue
        if word == "PID":
            pid, deadline = int(rest[0]), None if rests else time.monotonic() + life
        elif word == "AT":
            witness.found(cycle, int(rest[0]), rest[1])
        elif word == "TRY":
            witness.tried = int(rest[0])
        elif word == "ACK":
            witness.acknowledged = int(rest[0])
        elif word == "DEAD":
            assert int(rest[0]) == -signal.SIGKILL, "the writer died of something else; see its standard error"
            await trouble
            return rested
        elif word == "REST" and rests:
            await trouble
            await troubles.none()
            await at_rest(reader, int(rest[0]), witness)
            rested = True
            os.kill(pid, signal.SIGKILL)


async def at_rest(reader: Reader, revision: int, witness: Witness) -> None:
    """Check that the mirror reaches the revision of the state, and is the same."""
    await reader.wait_revision(revision, timeout=REST_SECONDS)
    assert witness.saw(await reader.get_all()) == revision


@pytest.mark.timeout(60 + 2 * ROUNDS)
async def test_nobody_reads_what_is_not_durable(tmp_path: Path, own_redis: Any, proxy_to: Any) -> None:
    """In seeded rounds of SIGKILLs, cuts and delays, readers see durable states only, in order; at rest, the last one."""
    seed = int(os.environ.get("LAB_STATE_CACHE_SEED", "20250106"))
    dice, witness = random.Random(seed), Witness()
    redis = own_redis()
    proxy = await proxy_to(redis.port)
    directory = tmp_path / "states"
    cache = RedisCache(proxy.url)
    troubles = Troubles(dice, redis, proxy)
    rests = 0
    async with (
        zygote(directory) as writers,
        cache.reader(worker.NAME) as one,
        cache.reader(worker.NAME, local=True) as two,
    ):
        readers = [asyncio.create_task(watch(reader, witness)) for reader in (one, two)]
        for cycle in range(1, ROUNDS + 1):
            if dice.random() < 0.2:  # both are killed
                redis.restart()
            rests += await one_round(cycle, dice, witness, writers, troubles, dice.choice((one, two)), proxy.url)
            for task in readers:
                assert not task.done(), task.result()
        async with Manager(Config(name=worker.NAME), FileStorage(directory), cache) as state:
            everything = await state.get_all()
            witness.found(0, state.revision, worker.digest(everything))
            for reader in (one, two):
                await at_rest(reader, state.revision, witness)
                assert await reader.get_all() == everything
                with pytest.raises(KeyNotFoundError):
                    await reader.get("never")
        witness.check()
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    sys.stdout.write(f"{ROUNDS} rounds, {rests} to rest, {witness.all_sightings} reads, {troubles.counts}\n")
    assert witness.all_sightings > ROUNDS
    assert rests > ROUNDS / 4
