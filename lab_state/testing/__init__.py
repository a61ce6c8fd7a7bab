"""For tests: a clock that stands still, and a storage that fails on demand.

Public, for people who test an application that uses lab_state. Nothing here needs a
test framework. `StorageConformance`, for people who write a storage, is here too.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeAlias, TypeVar, get_args, runtime_checkable

from lab_state.exceptions import StorageError, UnavailableError
from lab_state.storage._protocol import Reading, Recovery, SnapshotSource, Storage, StorageSession
from lab_state.testing._conformance import StorageConformance

__all__ = ["FaultyStorage", "ManualClock", "Moment", "Operation", "StorageConformance"]

R = TypeVar("R")

Operation: TypeAlias = Literal["open", "commit", "checkpoint", "aclose", "read"]

Moment: TypeAlias = Literal["before", "torn", "after"]
"""When a fault comes: before an operation did anything; when half of a commit was written; when all was done."""


class _ManualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A clock that moves only when told to; give it to `Manager(clock=...)`."""

    def __init__(self, time: float = 1_700_000_000.0) -> None:
        """Begin at `time`, in seconds since 1970."""
        self._time = time
        self._monotonic = 0.0
        self._timers: list[tuple[float, int, _ManualTimer]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        """Seconds since 1970."""
        return self._time

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._monotonic

    def call_later(self, delay: float, callback: Callable[[], object], /) -> _ManualTimer:
        """Call `callback` when `advance` has moved the clock by `delay` seconds."""
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._monotonic + delay, next(self._numbers), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Move both clocks, and make the calls that fall due on the way, in order.

        What they wake runs when the caller next awaits.

        Args:
            seconds: 0 or more.
        """
        if seconds < 0:
            raise ValueError("a monotonic clock does not go back; use jump() for the wall clock")
        end = self._monotonic + seconds
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            self._time += due - self._monotonic
            self._monotonic = due
            if timer.callback is not None:
                timer.callback()
        self._time += end - self._monotonic
        self._monotonic = end

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an administrator or NTP would."""
        self._time += seconds


@dataclass
class _Fault:
    kind: Literal["before", "torn", "after", "hang"]
    error: StorageError
    cuts: bool = False


class FaultyStorage:
    """Another storage, with faults on demand.

    Faults asked for come one after the other, each at a call of its operation.

    Attributes:
        calls: The operations so far, in order.
        faults: How many of them failed. A test in which none did proves nothing.
    """

    def __init__(self, inner: Storage) -> None:
        """Without a fault, `inner` answers."""
        self._inner = inner
        self._faults: dict[Operation, deque[_Fault | None]] = {}
        self._random: Callable[[Operation], _Fault | None] = _none
        self._resumed = asyncio.Event()
        self._sessions: list[_FaultySession] = []
        self._cut: list[_FaultySession] = []
        self._torn: dict[str, int] = {}  # bytes of half a record, by the name of the state
        self.calls: list[Operation] = []
        self.faults: int = 0

    @classmethod
    def random(cls, inner: Storage, *, seed: int, rate: float) -> Self:
        """A storage whose commits and checkpoints fail at random, before, torn or after.

        Args:
            inner: What answers otherwise.
            seed: The same calls with the same seed have the same faults.
            rate: How many of the calls fail: above 0, below 1.

        Raises:
            ValueError: `rate` is out of bounds.
        """
        if not 0 < rate < 1:
            raise ValueError(f"rate must be above 0 and below 1, not {rate}: 0.1 is one call in ten")
        storage = cls(inner)
        numbers = random.Random(seed)  # noqa: S311 -- it must be the same each time

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
        """Make the next calls of an operation fail, after the faults asked for so far.

        Args:
            operation: Which one.
            moment: `before` it did anything; `after` it did everything: the answer was
                lost. A commit that is `torn` wrote half of its record: it is not there
                when the state is opened again, unless a later commit held it too.
            skip: How many calls succeed first.
            times: How many calls fail, 1 or more.
            error: What to raise; an `UnavailableError` when not given.

        `aclose` lets go of the state in either case, as every storage must.

        Raises:
            ValueError: An argument is out of bounds; a test that never fails proves
                nothing.
        """
        if times < 1:
            raise ValueError("a fault comes once or more")
        self._ask(operation, [_fault(operation, moment, error)] * times, skip)

    def hang(self, operation: Operation, *, skip: int = 0) -> None:
        """Make the next call of an operation, or one after `skip` more, wait for `resume()` before it begins."""
        self._ask(operation, [_Fault("hang", UnavailableError("never raised"))], skip)
        self._resumed.clear()

    def resume(self) -> None:
        """Let the calls that hang go on."""
        self._resumed.set()

    def cut_power(self, during: Operation | None = None, moment: Moment = "before", *, skip: int = 0) -> None:
        """Cut the power: whatever is open writes nothing any more, and every call of it raises `StorageError`.

        The next manager on this object finds what was durable, as after a reboot. The one
        that was cut off is to be stopped still; that raises, if it had anything to write.

        Args:
            during: Cut it at the next call of this operation; at once when not given.
            moment: When in it; see `fail`.
            skip: How many calls succeed first.

        Raises:
            ValueError: An argument is out of bounds.
        """
        if during is not None:
            fault = _fault(during, moment, StorageError(_NO_POWER))
            fault.cuts = True
            self._ask(during, [fault], skip)
            return
        if skip or moment != "before":
            raise ValueError("the power is cut at once: name the operation during which, to choose the moment")
        for session in self._sessions:
            session.has_power = False
        self._cut += self._sessions
        self._sessions = []

    def _ask(self, operation: Operation, faults: list[_Fault], skip: int) -> None:
        if operation not in get_args(Operation):
            raise ValueError(f"there is no operation {operation!r}: use one of {get_args(Operation)}")
        if skip < 0:
            raise ValueError("skip is how many calls succeed first, 0 or more")
        self._faults.setdefault(operation, deque()).extend([*[None] * skip, *faults])

    async def open(self, name: str) -> StorageSession:
        """Open the inner storage; see `Storage.open`."""
        await self._reboot()
        inner = await self._faulty("open", lambda: self._inner.open(name))
        session = _FaultySession(self, inner, name, self._torn.pop(name, 0))
        self._sessions.append(session)
        return session

    async def read(self, name: str) -> Reading:
        """Read the inner storage; see `Storage.read`."""
        await self._reboot()
        return await self._faulty("read", lambda: self._inner.read(name))

    async def _reboot(self) -> None:
        """Let go of what was open, after the power was cut."""
        while self._cut:
            await self._cut.pop()._inner.aclose()  # noqa: SLF001 -- one class in two

    async def _faulty(
        self, operation: Operation, call: Callable[[], Awaitable[R]], tear: Callable[[], object] | None = None
    ) -> R:
        self.calls.append(operation)
        asked = self._faults.get(operation)
        fault = asked.popleft() if asked else self._random(operation)
        if fault is None:
            return await call()
        if fault.kind == "hang":
            await self._resumed.wait()
            return await call()
        self.faults += 1
        if fault.kind == "after":
            result = await call()
            if isinstance(result, _Closable):  # a session that nobody was given
                await result.aclose()
        if fault.kind == "torn" and tear is not None:
            tear()
        if fault.cuts:
            self.cut_power()
        raise fault.error


_NO_POWER = "the power was cut on demand; open the state again"


def _none(_: Operation) -> None:
    """No fault."""


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
        if self in self._storage._sessions:  # noqa: SLF001 -- one class in two
            self._storage._sessions.remove(self)  # noqa: SLF001 -- likewise
        if not self.has_power:
            await self._inner.aclose()
            return
        await self._storage._faulty("aclose", self._inner.aclose)  # noqa: SLF001 -- likewise

    async def _call(self, operation: Operation, call: Callable[[], Awaitable[R]], size: int = 0) -> R:
        torn = self._storage._torn  # noqa: SLF001 -- likewise

        async def powered() -> R:
            self._check_power()
            result = await call()
            torn.pop(self._name, None)  # written over
            return result

        self._check_power()
        return await self._storage._faulty(  # noqa: SLF001 -- likewise
            operation, powered, lambda: torn.update({self._name: max(1, size // 2)})
        )

    def _check_power(self) -> None:
        if not self.has_power:
            raise StorageError(_NO_POWER)
