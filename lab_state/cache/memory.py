"""`MemoryCache`: the same promise within one process, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from lab_state._clock import Clock
from lab_state.cache._format import HEAD, MOST_TOLD, head, message, new_fill, resync, seen_in, told_bytes
from lab_state.cache._protocol import Seen, Slice, Step
from lab_state.cache._source import Found
from lab_state.cache.reader import Reader
from lab_state.exceptions import UnavailableError

_FREED_AT_ONCE = 1000
_SCANNED = 500


class Place:
    """What a cache keeps for one state: two hashes and a channel."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.expires: dict[str, bytes] = {}
        self.followers: dict[MemorySubscription, None] = {}
        self.fill: str = ""

    def publish(self, messages: Iterable[bytes]) -> None:
        """Tell all who follow."""
        for data in messages:
            for follower in self.followers:
                follower.queue.put_nowait(data)

    def seen(self) -> Seen:
        """Whose copy it is."""
        return seen_in(self.values.get(HEAD), self.expires.get(HEAD))[0]

    def replace(self, values: dict[str, bytes], expires: dict[str, bytes]) -> None:
        """Show these instead. What was there is freed in steps."""
        old, self.values, self.expires = (self.values, self.expires), values, expires
        for each in old:
            _discard(each)


class MemoryCache:
    """Copies in the memory of this process: give the object to the manager, and read with `reader`."""

    def __init__(self) -> None:
        """An object with no copies."""
        self.places: dict[str, Place] = {}

    def __repr__(self) -> str:
        """The names of the states."""
        return f"<MemoryCache {sorted(self.places)}>"

    async def open(self, name: str, writer: str) -> MemoryCacheSession:
        """Begin to write a copy; see `Cache.open`."""
        return MemoryCacheSession(self.places.setdefault(name, Place()), writer)

    def reader(self, name: str, *, local: bool = False, clock: Clock | None = None) -> Reader:
        """Read the copy of a state; see `RedisCache.reader`."""
        return Reader(name, MemorySource(self.places.setdefault(name, Place()), name), local=local, clock=clock)


class MemoryCacheSession:
    """One writer's hold on a copy; see `CacheSession`."""

    def __init__(self, place: Place, writer: str) -> None:
        self._place = place
        self._writer = writer
        self._seen = Seen(None, 0)

    async def look(self) -> Seen:
        """Whose copy it is; see `CacheSession.look`."""
        before, seen = self._seen, self._place.seen()
        self._seen = seen
        if before == seen and seen.writer == self._writer:
            self._place.publish([message(seen.revision, seen.revision, self._writer, Slice({}, {}, []))])
        return seen

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        """Replace the copy; see `CacheSession.fill`."""
        values: dict[str, bytes] = {}
        expires: dict[str, bytes] = {}
        async for part in slices:
            values.update(part.values)
            expires.update((key, b"%d" % at) for key, at in part.expires.items())
        place = self._place
        seen = place.seen()
        if seen != over and seen.writer != self._writer:
            return False
        place.replace(values, expires)
        place.fill = new_fill()
        self._mark(revision)
        place.publish([resync(revision, revision, self._writer)])
        return True

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        """Change the copy; see `CacheSession.apply`."""
        parts: list[Slice] = []
        messages: list[bytes] = []
        told = 0
        async for part in slices:
            if parts and told <= MOST_TOLD:
                messages.append(self._message(step, parts, more=True))
            parts.append(part)
            told += told_bytes(part)
        if told <= MOST_TOLD:
            messages.append(self._message(step, parts, more=False))
        else:
            messages = [resync(step.start, step.end, self._writer)]
        place = self._place
        if place.seen() != (self._writer, step.start):
            return False
        if step.cleared:
            place.replace({}, {})
        for part in parts:
            self._put(part)
        self._mark(step.end)
        place.publish(messages)
        return True

    async def aclose(self) -> None:
        """Nothing is held."""

    def _message(self, step: Step, parts: list[Slice], *, more: bool) -> bytes:
        """Make the message of the last of these parts of a step."""
        clear = step.cleared and len(parts) == 1
        return message(step.start, step.end, self._writer, parts[-1], clear=clear, more=more)

    def _put(self, part: Slice) -> None:
        place = self._place
        place.values.update(part.values)
        for key in (*part.values, *part.deleted):
            place.expires.pop(key, None)
        for key in part.deleted:
            place.values.pop(key, None)
        place.expires.update((key, b"%d" % at) for key, at in part.expires.items())

    def _mark(self, revision: int) -> None:
        place, self._seen = self._place, Seen(self._writer, revision)
        place.values[HEAD] = place.expires[HEAD] = head(revision, self._writer, place.fill)


class MemorySource:
    """Reads a copy; see `Source`."""

    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self.path: str = f"memory:{name}"

    async def fetch(self, keys: Sequence[str]) -> Found:
        """Some keys; see `Source.fetch`."""
        values, expires = self._place.values, self._place.expires
        return Found(
            values.get(HEAD),
            expires.get(HEAD),
            {key: values[key] for key in keys if key in values},
            {key: expires[key] for key in keys if key in expires},
        )

    async def fetch_all(self) -> Found:
        """Every key; see `Source.fetch_all`."""
        return await self.fetch([key for key in self._place.values if key != HEAD])

    async def scan(self) -> AsyncIterator[Found]:
        """Every key, in steps; see `Source.scan`."""
        keys = list(self._place.values)
        for start in range(0, len(keys), _SCANNED):
            yield await self.fetch([key for key in keys[start : start + _SCANNED] if key != HEAD])

    async def subscribe(self) -> MemorySubscription:
        """Follow the changes; see `Source.subscribe`."""
        return MemorySubscription(self._place)

    async def aclose(self) -> None:
        """Nothing is held."""


class MemorySubscription:
    """Follows a copy; see `Subscription`."""

    def __init__(self, place: Place) -> None:
        self.queue: asyncio.Queue[bytes | asyncio.Event | None] = asyncio.Queue()
        self._place = place
        place.followers[self] = None

    async def receive(self) -> bytes:
        """The next message; see `Subscription.receive`."""
        while isinstance(data := await self.queue.get(), asyncio.Event):
            data.set()
        if data is None:
            raise UnavailableError("the subscription was cut")
        return data

    async def ping(self) -> None:
        """Wait for what is in the queue; see `Subscription.ping`."""
        pong = asyncio.Event()
        self.queue.put_nowait(pong)
        await pong.wait()

    def cut(self) -> None:
        """Lose the connection; for tests."""
        self.queue.put_nowait(None)

    async def aclose(self) -> None:
        """Follow no more."""
        self._place.followers.pop(self, None)


def _discard(large: dict[str, bytes]) -> None:
    """Free a map in steps: a million values at once would hold up the event loop."""
    for _ in range(min(len(large), _FREED_AT_ONCE)):
        large.popitem()
    if large:
        asyncio.get_running_loop().call_soon(_discard, large)
