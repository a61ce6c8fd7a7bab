"""`MemoryCache`: the same promise within one process, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from lab_state._clock import Clock
from lab_state.cache._format import HEAD, head, message, new_fill, resync, seen_in
from lab_state.cache._protocol import Seen, Slice, Step
from lab_state.cache._source import Found
from lab_state.cache.reader import Reader
from lab_state.exceptions import UnavailableError


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
        place.values, place.expires = values, expires
        place.fill = new_fill()
        self._mark(revision)
        place.publish([resync(revision, revision, self._writer)])
        return True

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        """Change the copy; see `CacheSession.apply`."""
        parts = [part async for part in slices]
        place = self._place
        if place.seen() != (self._writer, step.start):
            return False
        if step.cleared:
            place.values, place.expires = {}, {}
        for part in parts:
            self._put(part)
        self._mark(step.end)
        last = len(parts) - 1
        place.publish(
            message(step.start, step.end, self._writer, part, clear=step.cleared and not number, more=number < last)
            for number, part in enumerate(parts)
        )
        return True

    async def aclose(self) -> None:
        """Nothing is held."""

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
        yield await self.fetch_all()

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
