"""A cache that fails on demand, and a manager that uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from lab_state import Config, Manager, MemoryCache, MemoryStorage, UnavailableError
from lab_state.cache import Seen, Slice, Step
from lab_state.testing import ManualClock


class FaultyCache:
    """A `MemoryCache` that fails or hangs on demand. A call can also do its work, and fail after that."""

    def __init__(self) -> None:
        self.inner = MemoryCache()
        self.calls: list[str] = []
        self.faults: dict[str, list[Exception | str]] = {}
        self.held = ""  # the call that waits while `going` is not set; empty for all calls
        self.going = asyncio.Event()
        self.going.set()

    def fail(self, call: str, *faults: Exception | str) -> None:
        self.faults.setdefault(call, []).extend(faults)

    async def _fault(self, call: str) -> str:
        self.calls.append(call)
        if self.held in {"", call}:
            await self.going.wait()
        fault = self.faults[call].pop(0) if self.faults.get(call) else ""
        if isinstance(fault, Exception):
            raise fault
        return fault

    async def open(self, name: str, writer: str) -> FaultySession:
        await self._fault("open")
        return FaultySession(self, await self.inner.open(name, writer))

    @property
    def entries(self) -> dict[str, Any]:
        """The values in the mirror, without the head."""
        values = self.inner.mirrors["name"].values if self.inner.mirrors else {}
        return {key: msgspec.json.decode(data) for key, data in values.items() if key != "$lab_state"}

    @property
    def revision(self) -> int:
        seen = self.inner.mirrors["name"].seen() if self.inner.mirrors else Seen(None, 0)
        return -1 if seen.writer is None else seen.revision


class FaultySession:
    def __init__(self, cache: FaultyCache, inner: Any) -> None:
        self._cache = cache
        self._inner = inner

    async def look(self) -> Seen:
        await self._cache._fault("look")
        seen: Seen = await self._inner.look()
        return seen

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        fault = await self._cache._fault("fill")
        done: bool = await self._inner.fill(revision, slices, over)
        if fault == "after":
            raise UnavailableError("no answer")
        return done

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        fault = await self._cache._fault("apply")
        done: bool = await self._inner.apply(step, slices)
        if fault == "after":
            raise UnavailableError("no answer")
        return done

    async def aclose(self) -> None:
        self._cache.calls.append("aclose")
        raise UnavailableError("so what")


def manager(cache: Any, clock: ManualClock, storage: Any = None, interval: float | None = 0) -> Manager:
    return Manager(Config(name="name", flush_interval=interval), storage or MemoryStorage(), cache, clock=clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines of lab_state, without the lines of the start and the stop."""
    return [record.message for record in caplog.records if record.name == "lab_state" and record.levelname != "INFO"]
