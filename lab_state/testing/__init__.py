"""Helpers for tests: a clock that moves on demand, a storage that fails on demand, and a check of migrations.

These helpers are public. They are meant for the tests of an application that uses lab_state. None
of them needs a test framework. `StorageConformance` is meant for authors of a storage.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeAlias, TypeVar, get_args, runtime_checkable

from lab_state._argument_types import check_storage
from lab_state.exceptions import StorageError, UnavailableError
from lab_state.storage._protocol import Reading, Recovery, SnapshotSource, Storage, StorageSession
from lab_state.testing._conformance import StorageConformance
from lab_state.testing._migrations import check_migrations

__all__ = ["FaultyStorage", "ManualClock", "Moment", "Operation", "StorageConformance", "check_migrations"]

R = TypeVar("R")

Operation: TypeAlias = Literal["open", "commit", "checkpoint", "aclose", "read"]

Moment: TypeAlias = Literal["before", "torn", "after"]
"""The moment of a fault: before an operation begins, as if half of a commit was written, or after the operation is done."""


class _ManualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A clock that moves only on demand: `Manager(config, storage, clock=ManualClock())`."""

    def __init__(self, time: float = 1_700_000_000.0) -> None:
        """Start the wall clock at `time`, in seconds since 1970.

        Raises:
            ValueError: `time` is not finite.
        """
        _check_finite("time", time)
        self._start = time
        self._monotonic = 0.0
        self._timers: list[tuple[float, int, _ManualTimer]] = []
        self._numbers = itertools.count()

    def __repr__(self) -> str:
        """Return the class, and the seconds by which `advance` has moved the clock."""
        return f"<ManualClock after {self._monotonic:g} s>"

    def time(self) -> float:
        """Return the time of the wall clock, in seconds since 1970."""
        return self._start + self._monotonic

    def monotonic(self) -> float:
        """Return the seconds by which `advance` has moved the clock."""
        return self._monotonic

    def call_later(self, delay: float, callback: Callable[[], object], /) -> _ManualTimer:
        """Call `callback` when `advance` has moved the clock by `delay` seconds."""
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._monotonic + delay, next(self._numbers), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Move the wall clock and the monotonic clock. Make the calls that become due, in the order of their times.

        Tasks that these calls wake run as soon as the caller lets the event loop run, for example with
        `await asyncio.sleep(0)`.

        Args:
            seconds: 0 or more.

        Raises:
            ValueError: `seconds` is below 0, or not finite.
        """
        _check_finite("seconds", seconds)
        if seconds < 0:
            raise ValueError("a monotonic clock cannot go back; use jump() for the wall clock")
        end = self._monotonic + seconds
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            self._monotonic = max(self._monotonic, due)
            if timer.callback is not None:
                timer.callback()
        self._monotonic = max(self._monotonic, end)  # one of the calls may have advanced the clock further

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back by `seconds`, as an administrator or NTP does.

        Raises:
            ValueError: `seconds` is not finite.
        """
        _check_finite("seconds", seconds)
        self._start += seconds


def _check_finite(name: str, seconds: float) -> None:
    if not math.isfinite(seconds):
        raise ValueError(f"{name} must be a finite number of seconds, not {seconds}")


@dataclass
class _Fault:
    kind: Literal["before", "torn", "after", "hang"]
    error: StorageError
    cuts: bool = False


class FaultyStorage:
    """A storage that passes its calls to another storage, and fails on demand.

    The state cannot be shared. Calls for a history or a list of states do not reach the other storage.

    Faults are planned for each operation. Each call of the operation uses up one planned fault, in
    the order in which the faults were planned.

    Attributes:
        calls: The operation of each call so far, in order, without the calls of sessions whose power was cut.
        faults: The number of calls that failed on demand. If it is 0, the test has tested no fault.
    """

    def __init__(self, inner: Storage) -> None:
        """Pass each call to `inner`, unless a fault is planned for it.

        Raises:
            TypeError: `inner` is not a storage.
        """
        check_storage(inner, "inner")
        self._inner = inner
        self._faults: dict[Operation, deque[_Fault | None]] = {}
        self._random: Callable[[Operation], _Fault | None] = _none
        self._resumed = asyncio.Event()
        self._sessions: list[_FaultySession] = []
        self._cut: list[_FaultySession] = []
        self._torn: dict[str, int] = {}  # by the name of the state: the size of the torn record, in bytes
        self.calls: list[Operation] = []
        self.faults: int = 0

    def __repr__(self) -> str:
        """Return the class, and the other storage."""
        return f"<FaultyStorage of {self._inner!r}>"

    @classmethod
    def random(cls, inner: Storage, *, seed: int, rate: float) -> Self:
        """Return a storage whose commits and checkpoints fail at random. The moment of each fault is random too.

        Args:
            inner: The storage that gets the calls.
            seed: The start value of the random numbers. The same calls with the same seed have the same faults.
            rate: The share of the commits and checkpoints that fail: above 0, below 1.

        Raises:
            ValueError: `rate` is out of bounds.
            TypeError: `inner` is not a storage.
        """
        if not 0 < rate < 1:
            raise ValueError(f"rate must be above 0 and below 1, not {rate}: 0.1 is one call in ten")
        storage = cls(inner)
        numbers = random.Random(seed)  # noqa: S311 -- the numbers must be the same each time

        def drawn(operation: Operation) -> _Fault | None:
            comes = numbers.random() < rate
            moment: Moment = numbers.choice(get_args(Moment))
            if operation not in ("commit", "checkpoint") or not comes:
                return None
            return _fault(operation, moment if operation == "commit" or moment == "after" else "before")

        storage._random = drawn
        return storage

    def fail(
        self,
        operation: Operation,
        moment: Moment = "before",
        *,
        skip: int = 0,
        times: int = 1,
        error: StorageError | None = None,
    ) -> None:
        """Plan faults of an operation, after the faults that are planned already.

        An `aclose` that fails still releases the state, with each `moment`, because every storage must do so.

        Args:
            operation: The operation.
            moment: `before`: the operation does nothing. `after`: the operation is done, and its
                result is lost. `torn`, only for a commit: the operation does nothing. The next `open`
                reports half of the record as a torn tail, unless a later commit or checkpoint succeeds.
            skip: The number of calls without a fault before the faults, 0 or more.
            times: The number of calls that fail, one after the other, 1 or more.
            error: The error to raise; by default an `UnavailableError`.

        Raises:
            ValueError: An argument is out of bounds.
        """
        if times < 1:
            raise ValueError("times must be 1 or more: without a fault, the test proves nothing")
        self._plan(operation, [_fault(operation, moment, error)] * times, skip)

    def hang(self, operation: Operation, *, skip: int = 0) -> None:
        """Let one call of an operation wait for `resume()` before it begins. The first `skip` calls do not wait.

        Raises:
            ValueError: An argument is out of bounds.
        """
        self._plan(operation, [_Fault("hang", UnavailableError("never raised"))], skip)
        if self._resumed.is_set():
            self._resumed = asyncio.Event()  # the earlier event may belong to another event loop

    def resume(self) -> None:
        """Let the waiting calls continue. Until `hang` is called again, no call waits."""
        self._resumed.set()

    def cut_power(self, during: Operation | None = None, moment: Moment = "before", *, skip: int = 0) -> None:
        """Simulate a power cut: open sessions write nothing more, and their commits and checkpoints raise `StorageError`.

        A commit or a checkpoint that the other storage has begun already may still succeed.
        The next manager with this object loads the durable state, as after a reboot. A manager
        that was running at the power cut must still be stopped. Its `stop()` raises an error if
        there are changes that are not durable.

        Args:
            during: The operation whose next call cuts the power; by default the power is cut at once.
            moment: The moment of the power cut within that call; see `fail`.
            skip: The number of calls of that operation before the call that cuts the power, 0 or more.

        Raises:
            ValueError: An argument is out of bounds.
        """
        if during is not None:
            fault = _fault(during, moment, StorageError(_NO_POWER))
            fault.cuts = True
            self._plan(during, [fault], skip)
            return
        if skip or moment != "before":
            raise ValueError("moment and skip need an operation: cut_power(during='commit', ...)")
        for session in self._sessions:
            session.has_power = False
        self._cut += self._sessions
        self._sessions = []

    def _plan(self, operation: Operation, faults: list[_Fault], skip: int) -> None:
        if operation not in get_args(Operation):
            raise ValueError(f"there is no operation {operation!r}: use one of {get_args(Operation)}")
        if skip < 0:
            raise ValueError("skip must be 0 or more: it is the number of calls that succeed first")
        self._faults.setdefault(operation, deque()).extend([*[None] * skip, *faults])

    async def open(self, name: str) -> StorageSession:
        """Open the state in the other storage; see `Storage.open`."""
        await self._reboot()
        inner = await self._faulty("open", lambda: self._inner.open(name))
        session = _FaultySession(self, inner, name, self._torn.pop(name, 0))
        self._sessions.append(session)
        return session

    async def read(self, name: str) -> Reading:
        """Read the state in the other storage; see `Storage.read`."""
        await self._reboot()
        return await self._faulty("read", lambda: self._inner.read(name))

    async def _reboot(self) -> None:
        """Close the sessions that were open when the power was cut."""
        while self._cut:
            await self._cut.pop()._inner.aclose()  # noqa: SLF001 -- storage and session work together

    async def _faulty(
        self, operation: Operation, call: Callable[[], Awaitable[R]], tear: Callable[[], object] | None = None
    ) -> R:
        self.calls.append(operation)
        planned = self._faults.get(operation)
        fault = planned.popleft() if planned else self._random(operation)
        if fault is None:
            return await call()
        if fault.kind == "hang":
            await self._resumed.wait()
            return await call()
        self.faults += 1
        if fault.kind == "after":
            result = await call()
            if isinstance(result, _Closable):  # the result is a session, which the caller does not receive
                await result.aclose()
        if fault.kind == "torn" and tear is not None:
            tear()
        if fault.cuts:
            self.cut_power()
        raise fault.error


_NO_POWER = "the power was cut on demand; open the state again"


def _none(_: Operation) -> None:
    """Return no fault."""


def _fault(operation: Operation, moment: Moment, error: StorageError | None = None) -> _Fault:
    if moment not in get_args(Moment) or (moment == "torn" and operation != "commit"):
        raise ValueError(
            f"{operation!r} cannot fail {moment!r}: a fault comes 'before' or 'after' it; a commit can be 'torn'"
        )
    if operation == "aclose":
        moment = "after"
    return _Fault(moment, error or UnavailableError(f"{operation} failed on demand"))


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


class _FaultySession:
    def __init__(self, storage: FaultyStorage, inner: StorageSession, name: str, torn: int) -> None:
        self.has_power: bool = True
        self._storage = storage
        self._inner = inner
        self._name = name
        self._found_torn = torn

    def __repr__(self) -> str:
        return f"<FaultySession of {self._inner!r}>"

    @property
    def recovery(self) -> Recovery:
        found = self._inner.recovery
        return found._replace(unsettled=True, dropped_bytes=self._found_torn) if self._found_torn else found

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def snapshot_bytes(self) -> int:
        return self._inner.snapshot_bytes

    @property
    def journal_bytes(self) -> int:
        return self._inner.journal_bytes

    @property
    def progress(self) -> int:
        return self._inner.progress

    @property
    def warning(self) -> str | None:
        return self._inner.warning

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:
        return await self._call("commit", lambda: self._inner.commit(record, snapshot), len(record))

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        await self._call("checkpoint", lambda: self._inner.checkpoint(snapshot))

    async def aclose(self) -> None:
        if self in self._storage._sessions:  # noqa: SLF001 -- storage and session work together
            self._storage._sessions.remove(self)  # noqa: SLF001 -- storage and session work together
        if not self.has_power:
            await self._inner.aclose()
            return
        await self._storage._faulty("aclose", self._inner.aclose)  # noqa: SLF001 -- storage and session work together

    async def _call(self, operation: Operation, call: Callable[[], Awaitable[R]], size: int = 0) -> R:
        torn = self._storage._torn  # noqa: SLF001 -- storage and session work together

        async def powered() -> R:
            self._check_power()
            result = await call()
            torn.pop(self._name, None)  # this commit has overwritten the torn record
            return result

        self._check_power()
        return await self._storage._faulty(  # noqa: SLF001 -- storage and session work together
            operation, powered, lambda: torn.update({self._name: max(1, size // 2)})
        )

    def _check_power(self) -> None:
        if not self.has_power:
            raise StorageError(_NO_POWER)
