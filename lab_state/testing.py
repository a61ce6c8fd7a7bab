"""For tests: a clock that stands still, and a storage that fails on demand.

Public, for people who test an application that uses lab_state. Nothing here needs a
test framework. `StorageConformance`, for people who write a storage, is here too.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar, get_args, runtime_checkable

from lab_state._conformance import StorageConformance
from lab_state.exceptions import StorageError, UnavailableError
from lab_state.storage._protocol import Recovery, Snapshot, Storage, StorageSession

__all__ = ["FaultyStorage", "ManualClock", "Operation", "StorageConformance"]

R = TypeVar("R")

Operation: TypeAlias = Literal["open", "commit", "checkpoint", "aclose"]


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
    kind: Literal["before", "after", "hang"]
    error: StorageError


class FaultyStorage:
    """Another storage, with faults on demand.

    Attributes:
        calls: The operations so far, in order.
    """

    def __init__(self, inner: Storage) -> None:
        """Without a fault, `inner` answers."""
        self._inner = inner
        self._faults: dict[Operation, deque[_Fault]] = {}
        self._resumed = asyncio.Event()
        self.calls: list[Operation] = []

    def fail(
        self,
        operation: Operation,
        moment: Literal["before", "after"] = "before",
        *,
        times: int = 1,
        error: StorageError | None = None,
    ) -> None:
        """Make the next calls of an operation fail, after the faults asked for so far.

        Args:
            operation: Which one.
            moment: `before` it did anything, or `after` it did everything: the answer
                was lost.
            times: How many calls, 1 or more.
            error: What to raise; an `UnavailableError` when not given.

        `aclose` lets go of the state in either case, as every storage must.

        Raises:
            ValueError: An argument is out of bounds; a test that never fails proves
                nothing.
        """
        self._check(operation)
        if moment not in ("before", "after") or times < 1:
            raise ValueError("a fault comes 'before' or 'after' the operation, once or more")
        fault = _Fault(
            "after" if operation == "aclose" else moment, error or UnavailableError(f"{operation} failed on demand")
        )
        self._faults.setdefault(operation, deque()).extend([fault] * times)

    def hang(self, operation: Operation) -> None:
        """Make the next call of an operation wait for `resume()` before it begins."""
        self._check(operation)
        self._resumed.clear()
        fault = _Fault("hang", UnavailableError("never raised"))
        self._faults.setdefault(operation, deque()).append(fault)

    def _check(self, operation: Operation) -> None:
        if operation not in get_args(Operation):
            raise ValueError(f"there is no operation {operation!r}: use one of {get_args(Operation)}")

    def resume(self) -> None:
        """Let the calls that hang go on."""
        self._resumed.set()

    async def open(self, name: str) -> StorageSession:
        """Open the inner storage; see `Storage.open`."""
        return _FaultySession(self, await self._faulty("open", lambda: self._inner.open(name)))

    async def _faulty(self, operation: Operation, call: Callable[[], Awaitable[R]]) -> R:
        self.calls.append(operation)
        faults = self._faults.get(operation)
        fault = faults.popleft() if faults else None
        if fault is None:
            return await call()
        if fault.kind == "hang":
            await self._resumed.wait()
            return await call()
        if fault.kind == "after":
            result = await call()
            if isinstance(result, _Closable):  # a session that nobody was given
                await result.aclose()
        raise fault.error


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


class _FaultySession:
    def __init__(self, storage: FaultyStorage, inner: StorageSession) -> None:
        self._storage = storage
        self._inner = inner

    @property
    def recovery(self) -> Recovery:
        return self._inner.recovery

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def snapshot_bytes(self) -> int:
        return self._inner.snapshot_bytes

    @property
    def journal_bytes(self) -> int:
        return self._inner.journal_bytes

    async def commit(self, record: bytes, snapshot: Snapshot) -> bool:
        return await self._storage._faulty("commit", lambda: self._inner.commit(record, snapshot))  # noqa: SLF001

    async def checkpoint(self, snapshot: Snapshot) -> None:
        await self._storage._faulty("checkpoint", lambda: self._inner.checkpoint(snapshot))  # noqa: SLF001

    async def aclose(self) -> None:
        await self._storage._faulty("aclose", self._inner.aclose)  # noqa: SLF001
