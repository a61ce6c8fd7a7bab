"""`MemoryCache`: mirrors in the memory of one process, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, TypeAlias

from lab_state._clock import Clock
from lab_state.cache._format import HEAD, MOST_MESSAGE_BYTES, head, message, message_bytes, new_fill, resync, seen_in
from lab_state.cache._protocol import Seen, Slice, Step
from lab_state.cache._source import Fetched
from lab_state.cache.reader import Reader
from lab_state.config import Config
from lab_state.exceptions import UnavailableError

_FREED_AT_ONCE = 1000
_SCANNED = 500

MANY = 1000
"""A step with this many keys or more is merged in several iterations of the event loop."""

STEP = 500
"""The number of keys that one of these iterations merges."""


Pending: TypeAlias = dict[str, tuple[bytes | None, bytes | None]]


class MemoryMirror:
    """The mirror of one state: two hashes and a channel, as in Redis.

    Attributes:
        values: The values by key, and the head.
        expires: The expiry times by key, and the head.
        pending: A step that readers see already, but that is not merged into both hashes yet. For each key, it has a
            value and an expiry time. A key without a value is deleted.
        followers: The subscriptions.
        fill: The id of the last fill.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.expires: dict[str, bytes] = {}
        self.pending: Pending = {}
        self.followers: dict[MemorySubscription, None] = {}
        self.fill: str = ""

    def publish(self, messages: Iterable[bytes]) -> None:
        """Send messages to all subscriptions."""
        for data in messages:
            for follower in self.followers:
                follower.queue.put_nowait(data)

    def seen(self) -> Seen:
        """Return the writer and the revision of the mirror."""
        return seen_in(self.values.get(HEAD), self.expires.get(HEAD))[0]

    def replace(self, values: dict[str, bytes], expires: dict[str, bytes]) -> None:
        """Replace both hashes. The old hashes are freed in steps."""
        old = self.values, self.expires, self.pending
        self.values, self.expires, self.pending = values, expires, {}
        for each in old:
            _discard(each)

    def merge(self, most: int) -> bool:
        """Merge up to `most` keys of the pending step. Return whether keys are left."""
        for _ in range(min(most, len(self.pending))):
            key, (value, at) = self.pending.popitem()
            if value is None:
                self.values.pop(key, None)
            else:
                self.values[key] = value
            if at is None:
                self.expires.pop(key, None)
            else:
                self.expires[key] = at
        return bool(self.pending)

    def merge_later(self) -> None:
        """Merge the pending step in several iterations of the event loop."""
        if self.merge(STEP):
            asyncio.get_running_loop().call_soon(self.merge_later)

    def names(self) -> list[str]:
        """Return all keys, and the name of the head. Keys that the pending step deletes may be among them."""
        return [*self.values, *(key for key in self.pending if key not in self.values)]

    def fetch(self, keys: Iterable[str]) -> Fetched:
        """Return the values and expiry times of the given keys that exist."""
        values: dict[str, bytes] = {}
        expires: dict[str, bytes] = {}
        for key in keys:
            value, at = self.pending[key] if key in self.pending else (self.values.get(key), self.expires.get(key))
            if value is not None:
                values[key] = value
            if at is not None:
                expires[key] = at
        return Fetched(self.values.get(HEAD), self.expires.get(HEAD), values, expires)


class MemoryCache:
    """Mirrors in the memory of this process. Pass the object to the manager, and call `reader` to get readers."""

    def __init__(self) -> None:
        """Create a cache without mirrors."""
        self.mirrors: dict[str, MemoryMirror] = {}

    def __repr__(self) -> str:
        """Return the class and the names of the states."""
        return f"<MemoryCache {sorted(self.mirrors)}>"

    async def open(self, name: str, writer: str) -> MemoryCacheSession:
        """Open a session; see `Cache.open`."""
        return MemoryCacheSession(self.mirrors.setdefault(name, MemoryMirror()), writer)

    def reader(self, name: str, *, local: bool = False, clock: Clock | None = None) -> Reader:
        """Return a reader of a state's mirror; see `RedisCache.reader`. By default, `clock` is the clock of the machine."""
        name = Config(name=name).name
        return Reader(name, MemorySource(self.mirrors.setdefault(name, MemoryMirror()), name), local=local, clock=clock)


class MemoryCacheSession:
    """The session of one writer in memory; see `CacheSession`."""

    def __init__(self, mirror: MemoryMirror, writer: str) -> None:
        self._mirror = mirror
        self._writer = writer
        self._seen = Seen(None, 0)

    def __repr__(self) -> str:
        """Return the class, the writer, and the writer and revision of the mirror."""
        return f"<MemoryCacheSession of writer {self._writer!r}, {self._mirror.seen()!r}>"

    async def look(self) -> Seen:
        """Return the writer and the revision of the mirror; see `CacheSession.look`."""
        before, seen = self._seen, self._mirror.seen()
        self._seen = seen
        if before == seen and seen.writer == self._writer:
            self._mirror.publish([message(seen.revision, seen.revision, self._writer, Slice({}, {}, []))])
        return seen

    async def fill(self, revision: int, slices: AsyncIterator[Slice], over: Seen) -> bool:
        """Replace the mirror; see `CacheSession.fill`."""
        values: dict[str, bytes] = {}
        expires: dict[str, bytes] = {}
        async for part in slices:
            values.update(part.values)
            expires.update((key, b"%d" % at) for key, at in part.expires.items())
        mirror = self._mirror
        seen = mirror.seen()
        if seen != over and seen.writer != self._writer:
            return False
        mirror.replace(values, expires)
        mirror.fill = new_fill()
        self._mark(revision)
        mirror.publish([resync(revision, revision, self._writer)])
        return True

    async def apply(self, step: Step, slices: AsyncIterator[Slice]) -> bool:
        """Change the mirror; see `CacheSession.apply`."""
        parts: list[Slice] = []
        messages: list[bytes] = []
        total = 0
        async for part in slices:
            if parts and total <= MOST_MESSAGE_BYTES:
                messages.append(self._message(step, parts, more=True))
            parts.append(part)
            total += message_bytes(part)
        if total <= MOST_MESSAGE_BYTES:
            messages.append(self._message(step, parts, more=False))
        else:
            messages = [resync(step.start, step.end, self._writer)]
        pending = await self._prepared(parts)
        mirror = self._mirror
        if mirror.seen() != (self._writer, step.start):
            return False
        if step.cleared:
            mirror.replace({}, {})
        mirror.merge(len(mirror.pending))  # finish the merge of the last step
        mirror.pending = pending
        self._mark(step.end)
        mirror.publish(messages)
        if len(pending) < MANY:
            mirror.merge(MANY)
        else:
            mirror.merge_later()
        return True

    async def _prepared(self, parts: Iterable[Slice]) -> Pending:
        """Return the changes of a step, by key. The event loop runs after about every `STEP` keys."""
        pending: Pending = {}
        count = 0
        for part in parts:
            pending.update((key, (value, None)) for key, value in part.values.items())
            pending.update((key, (None, None)) for key in part.deleted)
            pending.update((key, (part.values[key], b"%d" % at)) for key, at in part.expires.items())
            count += len(part.values) + len(part.deleted)
            if count >= STEP:
                count = 0
                await asyncio.sleep(0)
        return pending

    async def aclose(self) -> None:
        """Do nothing; see `CacheSession.aclose`."""

    def _message(self, step: Step, parts: list[Slice], *, more: bool) -> bytes:
        """Return the message for the last of these slices of a step."""
        clear = step.cleared and len(parts) == 1
        return message(step.start, step.end, self._writer, parts[-1], clear=clear, more=more)

    def _mark(self, revision: int) -> None:
        mirror, self._seen = self._mirror, Seen(self._writer, revision)
        mirror.values[HEAD] = mirror.expires[HEAD] = head(revision, self._writer, mirror.fill)


class MemorySource:
    """The source from which a reader reads a mirror in memory; see `Source`."""

    def __init__(self, mirror: MemoryMirror, name: str) -> None:
        self._mirror = mirror
        self.path: str = f"memory:{name}"

    async def fetch(self, keys: Sequence[str]) -> Fetched:
        """Return the values and expiry times of some keys; see `Source.fetch`."""
        return self._mirror.fetch(keys)

    async def fetch_all(self) -> Fetched:
        """Return the values and expiry times of all keys; see `Source.fetch_all`."""
        return await self.fetch([key for key in self._mirror.names() if key != HEAD])

    async def scan(self) -> AsyncIterator[Fetched]:
        """Yield every key, in parts; see `Source.scan`."""
        keys = self._mirror.names()
        for start in range(0, len(keys), _SCANNED):
            yield await self.fetch([key for key in keys[start : start + _SCANNED] if key != HEAD])

    async def subscribe(self) -> MemorySubscription:
        """Subscribe to the changes; see `Source.subscribe`."""
        return MemorySubscription(self._mirror)

    async def aclose(self) -> None:
        """Do nothing; see `Source.aclose`."""


class MemorySubscription:
    """A subscription to the changes of a mirror; see `Subscription`."""

    def __init__(self, mirror: MemoryMirror) -> None:
        self.queue: asyncio.Queue[bytes | asyncio.Event | None] = asyncio.Queue()
        self._mirror = mirror
        mirror.followers[self] = None

    async def receive(self) -> bytes:
        """Return the next message; see `Subscription.receive`."""
        while isinstance(data := await self.queue.get(), asyncio.Event):
            data.set()
        if data is None:
            raise UnavailableError("the subscription was cut")
        return data

    async def ping(self) -> None:
        """Wait until `receive` has returned all messages that are in the queue now; see `Subscription.ping`."""
        pong = asyncio.Event()
        self.queue.put_nowait(pong)
        await pong.wait()

    def cut(self) -> None:
        """Make `receive` fail, as it does after a lost connection. Tests call this."""
        self.queue.put_nowait(None)

    async def aclose(self) -> None:
        """End the subscription; see `Subscription.aclose`."""
        self._mirror.followers.pop(self, None)


def _discard(large: dict[str, Any]) -> None:
    """Free a dict in steps. Freeing a million values in one step would block the event loop."""
    for _ in range(min(len(large), _FREED_AT_ONCE)):
        large.popitem()
    if large:
        asyncio.get_running_loop().call_soon(_discard, large)
