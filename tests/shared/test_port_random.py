"""Several processes of one state, with any order of sends, answers, cuts, failures and takeovers, against a plain dict.

Each call has a number of its own, and appends it to a list, or to two. So a call that was applied twice, or
not at all, can be seen in the state at the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from port_world import TIMEOUT, Process, World, started
from running import idle

from lab_state import ConflictError, MemoryStorage, StorageError, Transaction, UnavailableError
from lab_state.testing import FaultyStorage, ManualClock

R = TypeVar("R")
LISTS = ["a", "b"]
PROCESSES = st.integers(0, 2)


async def append(process: Process, how: str, key: str, number: int) -> list[str]:
    """Make one call of a kind, and return the lists that have its number."""
    calls = process.calls
    if how == "update":
        await calls.update(key, lambda old: [*old, number], [])
        return [key]
    if how == "update in a namespace":
        await calls.namespace("x").update(key, lambda old: [*old, number], [])
        return [f"x/{key}"]
    if how == "transact":

        def both(tx: Transaction) -> None:
            for name in LISTS:
                tx.set(name, [*tx.get(name, []), number])

        await calls.transact(both)
        return LISTS
    if how == "set":
        await calls.set(f"set/{number}", [number])
    elif how == "set_if_absent":
        assert await calls.set_if_absent(f"set/{number}", [number])  # if it was applied twice, the result is False
    else:
        assert how == "pop and set"
        assert await calls.pop(f"set/{number}", None) is None
        await calls.set(f"set/{number}", [number])
    return [f"set/{number}"]


KINDS = ["update", "update in a namespace", "transact", "set", "set_if_absent", "pop and set"]


CALLS = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(LISTS)), min_size=1, max_size=4)


class PortMachine(RuleBasedStateMachine):
    """Three processes. A process whose owner was killed is replaced by a new one."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.storage, self.clock = FaultyStorage(MemoryStorage()), ManualClock()
        self.world = World(self.storage, self.clock)
        self.number = 0
        self.open: list[tuple[Process, asyncio.Task[None]]] = []
        self.made: dict[int, list[str]] = {}  # the calls that have returned, and their lists
        self.unknown: set[int] = set()
        self.incremented: list[int] = []
        self.unknown_incrs = 0

        async def start() -> None:
            self.processes = [Process(self.world, str(number)) for number in range(3)]
            await self.world.own(self.processes[0])
            for process in self.processes[1:]:
                self.world.connect(process)

        self.run(start())

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        async def run() -> R:
            result = await work
            await idle()
            return result

        return self.loop.run_until_complete(run())

    # Calls

    @rule(
        at=PROCESSES, calls=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(LISTS)), min_size=1, max_size=4)
    )
    def call(self, at: int, calls: list[tuple[str, str]]) -> None:
        for how, key in calls:
            self._call(at, how, key)

    def _call(self, at: int, how: str, key: str) -> None:
        self.number += 1
        process, number = self.processes[at], self.number

        async def call() -> None:
            try:
                keys = await append(process, how, key, number)
            except ConflictError:
                raise AssertionError("transact runs again") from None
            except UnavailableError as error:
                if error.outcome != "not made" or how == "pop and set":
                    self.unknown.add(number)
            except (StorageError, asyncio.CancelledError):
                self.unknown.add(number)
            else:
                self.made[number] = keys
                assert all(number in process.calls.get_nowait(name) for name in keys), "a call is in the copy"

        self._start(process, call())

    @rule(at=PROCESSES)
    def incr(self, at: int) -> None:
        process = self.processes[at]

        async def call() -> None:
            try:
                self.incremented.append(await process.calls.incr("n", type=int))
            except UnavailableError as error:
                self.unknown_incrs += error.outcome != "not made"
            except (StorageError, asyncio.CancelledError):
                self.unknown_incrs += 1

        self._start(process, call())

    def _start(self, process: Process, work: Coroutine[Any, Any, None]) -> None:
        async def start() -> None:
            self.open.append((process, started(work)))

        self.run(start())

    # Connections

    @rule(up=st.booleans(), down=st.booleans())
    def hold(self, *, up: bool, down: bool) -> None:
        for process in self.processes:
            if process.pipe is not None:
                process.pipe.to_owner.held, process.pipe.to_client.held = up, down

    @rule(at=PROCESSES)
    def release(self, at: int) -> None:
        async def release() -> None:
            if (pipe := self.processes[at].pipe) is not None:
                pipe.release()

        self.run(release())

    @rule(at=PROCESSES)
    def cut(self, at: int) -> None:
        if (pipe := self.processes[at].pipe) is not None:
            pipe.cut()

    @rule(at=PROCESSES)
    def connect(self, at: int) -> None:
        async def connect() -> None:
            process = self.processes[at]
            if process.pipe is not None:
                process.pipe.cut()
            if self.world.owner not in {None, process}:
                self.world.connect(process)

        self.run(connect())

    # The storage and the clock

    @rule()
    def hang(self) -> None:
        self.storage.hang("commit")

    @rule(moment=st.sampled_from(["before", "after"]))
    def fail(self, moment: Any) -> None:
        self.storage.fail("commit", moment)

    @rule()
    def resume(self) -> None:
        async def resume() -> None:
            self.storage.resume()

        self.run(resume())

    @rule(seconds=st.sampled_from([1.0, TIMEOUT, 60.0]))
    def wait(self, seconds: float) -> None:
        async def wait() -> None:
            self.clock.advance(seconds)
            owner = self.world.owner
            if owner is not None and owner.flusher is not None:
                owner.flusher.engine.forget_gone()
            for process in self.processes:
                if process is not owner:
                    process.port.give_up(self.clock.monotonic() - seconds, "of the test")

        self.run(wait())

    # Owners

    @precondition(lambda self: self.world.owner is not None)
    @rule()
    def kill(self) -> None:
        async def kill() -> None:
            dead = self.world.owner
            assert dead is not None
            await self.world.kill()
            gone = [task for process, task in self.open if process is dead]
            for task in gone:
                task.cancel()
            if gone:
                await asyncio.wait(gone)
            self.processes[self.processes.index(dead)] = Process(self.world, "new")

        self.run(kill())

    @precondition(lambda self: self.world.owner is not None)
    @rule(at=PROCESSES)
    def replace(self, at: int) -> None:
        """Kill the owner. Another process takes over at once, and all others connect."""
        self.kill()
        self.take_over(at)
        for other in range(3):
            self.connect(other)

    @precondition(lambda self: self.world.owner is not None)
    @rule(
        at=PROCESSES, taker=PROCESSES, calls=CALLS, held=st.sampled_from([(True, False), (False, True), (False, False)])
    )
    def crash(self, at: int, taker: int, calls: list[tuple[str, str]], held: tuple[bool, bool]) -> None:
        """Kill the owner while calls are under way, or are applied and not answered."""
        self.connect(at)
        self.hold(up=held[0], down=held[1])
        self.call(at, calls)
        self.replace(taker)

    @precondition(lambda self: self.world.owner is None)
    @rule(at=PROCESSES)
    def take_over(self, at: int) -> None:
        self.run(self._take_over(self.processes[at]))

    async def _take_over(self, process: Process) -> None:
        before = [set(one.copy.entries) for one in self.processes]
        lists = [one.calls.get_nowait("a", []) for one in self.processes]
        self.storage.resume()
        await self.world.own(process)
        assert all(keys <= set(process.copy.entries) for keys in before), "nothing is lost"
        new = process.calls.get_nowait("a", [])
        assert all(new[: len(old)] == old for old in lists), "a copy shows durable changes only"

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return

        async def finish() -> None:
            self.storage.resume()
            if self.world.owner is None:
                await self._take_over(self.processes[0])
            owner = self.world.owner
            assert owner is not None
            assert owner.flusher is not None
            while not all(task.done() for _, task in self.open):
                self.storage.resume()
                for process in self.processes:
                    if process.pipe is not None:
                        process.pipe.release()
                    elif process is not owner:
                        self.world.connect(process)
                self.clock.advance(1)
                await idle()
            await asyncio.gather(*(task for _, task in self.open))
            while owner.copy.revision < owner.flusher.state.revision:
                self.clock.advance(1)  # a commit that failed is repeated after a pause
                self.storage.resume()
                await idle()
            for process in self.processes:
                while process is not owner and process.pipe is None:  # a client that was forgotten connects twice
                    self.world.connect(process)
                    await idle()
                if process.pipe is not None:
                    process.pipe.release()
                await process.calls.catch_up()
                assert await process.calls.get_all() == await owner.calls.get_all()
                assert process.port.is_idle
            self._check(await owner.calls.get_all())
            await self.world.kill()

        try:
            self.run(finish())
        finally:
            self.loop.close()

    def _check(self, state: dict[str, Any]) -> None:
        """Check that each call that has returned was applied once, and each one that was not made never."""
        count = state.pop("n", 0)
        assert len(set(self.incremented)) == len(self.incremented)
        assert len(self.incremented) <= count <= len(self.incremented) + self.unknown_incrs
        for key, numbers in state.items():
            assert len(set(numbers)) == len(numbers), f"a call was applied twice: {key} {numbers}"
            for number in numbers:
                assert number in self.unknown or key in self.made[number]
        for number, keys in self.made.items():
            assert all(number in state[key] for key in keys), f"a call was lost: {number}"


TestPorts = PortMachine.TestCase
TestPorts.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
