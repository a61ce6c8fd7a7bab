"""The driver of rounds: it starts the processes of a round, kills and freezes them, and reads their histories.

python round_driver.py --seeds 0-199 [--bug NAME] [--keep DIRECTORY]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
from round_bugs import BUGS
from round_facts import Broken, check
from round_history import Gone, Process, encode, read
from round_life import Life
from round_plan import Fault, Round, planned

PATIENCE = 25.0
"""The seconds after the end of a round in which each process must have ended."""

LONGEST_START = 1.0
"""The longest time in seconds that a round waits for its first processes. Some of them may be frozen."""

AT_ONCE = 3
"""How many rounds run at the same time."""


class Child:
    """A process of a round."""

    def __init__(self, life: Life, froze: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        self.life = life
        self.pid = 0
        self.started: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[int] = loop.create_future()
        self.joined = asyncio.Event()
        self.hangs = False
        self.froze = froze

    def send(self, number: int) -> None:
        """Send a signal, if the process still runs."""
        if self.pid and not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def how(self) -> str:
        """How the process has ended, for its history; empty if the history says it."""
        if self.hangs:
            return "hangs"
        status = self.ended.result()
        if os.WIFSIGNALED(status):
            return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
        return ""


class Nursery:
    """The parent of all processes; see `round_worker`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._by_name: dict[str, Child] = {}
        self._by_pid: dict[int, Child] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls) -> AsyncIterator[Nursery]:
        """Start the parent, and end it after the block."""
        here = Path(__file__).parent
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(here), environment.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(here / "round_worker.py"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        nursery = cls(process)
        assert process.stdout is not None
        if await process.stdout.readline() != b"ready\n":
            raise RuntimeError("the parent of the processes could not start")
        reading = asyncio.create_task(nursery._read())
        try:
            yield nursery
        finally:
            reading.cancel()
            process.kill()  # its children die with it
            await asyncio.wait({reading})
            await process.stdout.read()  # the pipe is closed when all of them are dead
            await process.wait()

    async def start(self, life: Life, froze: asyncio.Event) -> Child:
        """Fork a process. `froze` is set when it has frozen itself."""
        child = Child(life, froze)
        self._by_name[life.name] = child
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(life) + b"\n")
        await child.started
        return child

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            what, one, other = line.split()
            if what == b"started":
                child = self._by_name.pop(one.decode())
                child.pid = int(other)
                self._by_pid[child.pid] = child
                child.started.set_result(None)
            elif what == b"ended":
                child = self._by_pid.pop(int(one))
                child.ended.set_result(int(other))
                child.joined.set()
            elif what == b"joined":
                if (joined := self._by_pid.get(int(one))) is not None:
                    joined.joined.set()
            elif (frozen := self._by_pid.get(int(one))) is not None:
                asyncio.get_running_loop().call_later(int(other) / 1000, frozen.send, signal.SIGCONT)
                frozen.froze.set()
        error = RuntimeError("the parent of the processes has ended")
        for child in (*self._by_name.values(), *self._by_pid.values()):
            for future in (child.started, child.ended):
                if not future.done():
                    future.set_exception(error)


class Ran(NamedTuple):
    """A round that was run."""

    processes: list[Process]
    broken: list[Broken]
    seconds: float


class Driver:
    """One round."""

    def __init__(self, nursery: Nursery, one: Round, directory: Path, bug: str = "") -> None:
        self._nursery = nursery
        self._round = one
        self._directory = directory
        self._bug = bug
        self._rng = random.Random(f"{one.seed} driver")
        self._children: list[Child] = []
        self._is_over = False
        self._froze = asyncio.Event()
        self._begins = asyncio.Event()
        self._started = 0
        loop = asyncio.get_running_loop()
        self._first: list[asyncio.Future[Child]] = [loop.create_future() for _ in range(one.processes)]
        (directory / "history").mkdir(parents=True)

    async def run(self) -> Ran:
        """Run the round, and check its history."""
        began = time.monotonic()
        slots = [asyncio.create_task(self._keep_alive(number)) for number in range(self._round.processes)]
        faults = asyncio.create_task(self._make_faults())
        try:
            await self._wait_for_all()
            self._begins.set()
            await asyncio.sleep(self._round.seconds)
            self._is_over = True
            for child in self._children:
                child.send(signal.SIGTERM)
            done, late = await asyncio.wait([*slots, faults], timeout=PATIENCE)
            if late:
                await self._end_late()
            for task in done:
                await task
            left = self._left()
            await self._last()
        finally:
            for task in (*slots, faults):
                task.cancel()
            for child in self._children:
                child.send(signal.SIGKILL)
        processes = [self._read(child) for child in self._children]
        return Ran(processes, [*check(processes), *left], time.monotonic() - began)

    def _left(self) -> list[Broken]:
        """Return a violation if all processes have stopped, and the last one has not written everything to the snapshot.

        If a process was killed, or could not stop because of a fault of its disk, the journal may have records.
        """
        disk = self._round.disk
        if disk.failing or disk.full or any(child.how or child.ended.result() for child in self._children):
            return []
        journal = self._directory / "rounds.journal"
        if not journal.exists() or journal.read_bytes().count(b"\n") == 1:
            return []
        return [Broken(4, "all processes have stopped, and the last one has left records in the journal")]

    async def _wait_for_all(self) -> None:
        """Wait until each of the first processes has joined or has ended; at most `LONGEST_START`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_START):
                for first in self._first:
                    await (await asyncio.shield(first)).joined.wait()

    async def _end_late(self) -> None:
        """Kill the processes that hang, after they have written where they hang."""
        hanging = [child for child in self._children if not child.ended.done()]
        for child in hanging:
            child.hangs = True
            child.send(signal.SIGUSR1)
        await asyncio.sleep(0.2)
        for child in hanging:
            child.send(signal.SIGKILL)
            await child.ended

    async def _last(self) -> None:
        """Start the state once more, so that its last revision is read."""
        name = f"{self._directory.name}.last"
        life = Life(name, -1, "", str(self._directory), self._path(name), tasks=0, bug=self._bug)
        child = await self._nursery.start(life, self._froze)
        self._children.append(child)
        await asyncio.wait([child.ended], timeout=PATIENCE)
        if not child.ended.done():
            await self._end_late()

    def _path(self, name: str) -> str:
        return str(self._directory / "history" / f"{name}.jsonl")

    def _read(self, child: Child) -> Process:
        path = Path(child.life.history)
        if not path.exists():
            path.touch()
        process = read(path)
        if child.how:
            process.events.append(Gone(time.monotonic_ns(), child.how))
            with path.open("ab") as file:
                file.write(encode(process.events[-1]) + b"\n")
        return process

    async def _keep_alive(self, number: int) -> None:
        """Run a process, and start it again when it has ended, until the end of the round."""
        one = self._round
        if number and one.leads:
            await (await asyncio.shield(self._first[0])).joined.wait()
        for turn in range(20):
            started, self._started = self._started, self._started + 1
            name = f"{Path(self._directory).name}.{number}.{turn}"
            life = Life(
                name=name,
                slot=number + 4 * turn if turn < 2 else -1,
                seed=f"{one.seed} {number} {turn}",
                directory=str(self._directory),
                history=self._path(name),
                tasks=one.tasks if number else one.tasks_of_first or one.tasks,
                pause=one.pause,
                calls=one.calls,
                lists=one.lists,
                owner_timeout=one.owner_timeout,
                traps=one.traps[started] if started < len(one.traps) else (),
                network=one.network,
                disk=one.disk,
                bounds=one.bounds,
                bug=self._bug,
            )
            child = await self._nursery.start(life, self._froze)
            self._children.append(child)
            if not turn:
                self._first[number].set_result(child)
            if self._is_over:
                child.send(signal.SIGTERM)
            await child.ended
            if one.again < 0:
                return
            await asyncio.sleep(one.again)
            if self._is_over:
                return

    async def _make_faults(self) -> None:
        await self._begins.wait()
        began = time.monotonic()
        for fault in self._round.faults:
            since = began
            if fault.after_freeze:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._froze.wait(), max(0.001, began + self._round.seconds - since))
                since = time.monotonic()
            await asyncio.sleep(max(0.0, since + fault.at - time.monotonic()))
            child = self._chosen(fault)
            if child is None:
                continue
            if fault.action == "freeze":
                child.send(signal.SIGSTOP)
                asyncio.get_running_loop().call_later(fault.seconds, child.send, signal.SIGCONT)
            else:
                child.send(signal.SIGKILL if fault.action == "kill" else signal.SIGTERM)

    def _chosen(self, fault: Fault) -> Child | None:
        alive = [child for child in self._children if child.pid and not child.ended.done()]
        owner = self._owner()
        if fault.who == "owner":
            alive = [child for child in alive if child.pid == owner]
        elif fault.who == "follower":
            alive = [child for child in alive if child.pid != owner]
        return self._rng.choice(alive) if alive else None

    def _owner(self) -> int:
        """Return the process that the lock file names."""
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError, KeyError):
            return int(msgspec.json.decode((self._directory / "rounds.lock").read_bytes())["pid"])
        return 0


async def run_rounds(
    rounds: Iterable[Round], directory: Path, bug: str = "", at_once: int = AT_ONCE, *, keep: bool = False
) -> AsyncGenerator[tuple[Round, Path, Ran]]:
    """Run rounds, some of them at the same time. The directory of a round without a violation is deleted."""
    waiting = iter(rounds)
    async with Nursery.opened() as nursery:
        running: dict[asyncio.Task[Ran], tuple[Round, Path]] = {}
        count = 0
        try:
            while True:
                while len(running) < at_once and (one := next(waiting, None)) is not None:
                    count += 1
                    path = directory / f"r{count}"
                    running[asyncio.create_task(Driver(nursery, one, path, bug).run())] = one, path
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    one, path = running.pop(task)
                    ran = task.result()
                    if not ran.broken and not keep:
                        shutil.rmtree(path)
                    yield one, path, ran
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0-19")
    parser.add_argument("--bug", default="")
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    parser.add_argument("--usual", action="store_true")
    parser.add_argument("--sound", action="store_true")
    parser.add_argument("--keep", default="")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    rounds_of: Iterable[Round] = map(planned, seeds)
    if arguments.bug and not arguments.usual:
        plan = BUGS[arguments.bug].plan
        arguments.bug = "" if arguments.sound else arguments.bug
        rounds_of = (plan(random.Random(seed), f"{seed}") for seed in seeds)
    directory = Path(arguments.keep or tempfile.mkdtemp(prefix="rounds"))
    began, failed, rounds, calls = time.monotonic(), 0, 0, 0
    async for one, path, ran in run_rounds(
        rounds_of, directory, arguments.bug, arguments.at_once, keep=bool(arguments.keep)
    ):
        rounds += 1
        calls += sum(type(event).__name__ == "Ended" for process in ran.processes for event in process.events)
        if ran.broken:
            failed += 1
            print(f"seed {one.seed}: {len(ran.broken)} in {path} ({ran.seconds:.2f} s)")
            for broken in ran.broken[:4]:
                print(f"   fact {broken.fact}: {broken.what[:400]}")
    print(f"{rounds} rounds, {calls} calls, {failed} with violations, {time.monotonic() - began:.1f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
