"""The one task of a reader: follows the changes, and keeps the local copy by them.

A subscription that is lost is made again after growing pauses; one that is silent, which
a living writer never leaves it, is asked whether it is there at all. Nothing is taken to
be fresh in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from lab_state._clock import Clock, Pauses, resolver
from lab_state._log import Log
from lab_state._state import DELETED
from lab_state._watch import MOST_PENDING, Group, Told
from lab_state.cache._format import Head, Message, decode_message
from lab_state.cache._local import Local
from lab_state.cache._source import Source, Subscription
from lab_state.exceptions import StorageError, UnavailableError

SILENT_SECONDS = 5.0
"""After so long without a message, which is more than two beats of a writer, the subscription is asked."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_logger = Log(logging.getLogger("lab_state"))


class Feed:
    """Follows one copy.

    Attributes:
        revision: The last one that was told of, while the subscription is whole; else -1.
        watchers: Who is told which keys have changed.
        moved: Set when something is heard after this was asked for; ask anew each time.
    """

    def __init__(self, source: Source, local: Local | None, clock: Clock, head: Callable[[], Awaitable[Head]]) -> None:
        """Begin; `head` fetches whose copy is there, and at which revision."""
        self.revision: int = -1
        self.watchers: Group = Group()
        self._source = source
        self._local = local
        self._clock = clock
        self._head = head
        self._parts: list[Message] = []
        self._heard = clock.monotonic()
        self._stale = asyncio.Event()
        self._filled = asyncio.Event()
        self.moved: asyncio.Event = asyncio.Event()
        self._pauses = Pauses(clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        self._told = False  # that the subscription is lost
        self._task = asyncio.create_task(self._run(), name="lab_state reader")

    async def aclose(self) -> None:
        """The end: who watches is told the rest, and that it is over."""
        self._task.cancel()
        await asyncio.wait({self._task})
        for watcher in self.watchers:
            watcher.close()
        self._notify()

    async def _run(self) -> None:
        while True:
            try:
                subscription = await self._source.subscribe()
                try:
                    await self._follow(subscription)
                finally:
                    self.revision = -1
                    if self._local is not None:
                        self._local.lose()
                    self._notify()
                    await subscription.aclose()
            except StorageError as error:
                if not self._told:
                    _logger.warning("a reader does not hear of changes for the moment, and tries again: %s", error)
                    self._told = True
                await self._sleep(self._pauses.begin())

    async def _follow(self, subscription: Subscription) -> None:
        """Until it is lost."""
        self._parts, self._heard = [], self._clock.monotonic()
        work = [self._receive(subscription), self._listen(subscription), self._begin()]
        if self._local is not None:
            self._stale.set()
            work.append(self._keep_loaded(self._local, subscription))
        tasks = {asyncio.ensure_future(each) for each in work}
        try:
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                tasks -= done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self) -> None:
        """What was missed before the subscription is to be read again."""
        try:
            head = await self._head()
        except StorageError:
            return  # there is nothing; when something is put there, that is a resync
        self.revision = max(self.revision, head.revision)
        self.watchers.resync(self.revision)
        self._notify()

    # Messages

    async def _receive(self, subscription: Subscription) -> None:
        while True:
            data = await subscription.receive()
            self._heard = self._clock.monotonic()
            if self._told:
                _logger.info("a reader hears of changes again")
            self._told = False
            self._pauses.end()
            try:
                self._parts.append(decode_message(data))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                raise UnavailableError(
                    f"{self._source.path}: a message on the channel is none of lab_state's"
                ) from None
            if not self._parts[-1].more:
                step, self._parts = self._parts, []
                self._step(step)

    def _step(self, step: list[Message]) -> None:
        last = step[-1]
        self.revision = last.end
        if last.resync:
            self._filled.set()
        if self._local is not None and not self._local.tell(step):
            self._local.lose()
            self._stale.set()
        if last.resync or step[0].clear or sum(len(part.set) + len(part.delete) for part in step) > MOST_PENDING:
            self.watchers.resync(last.end)
        elif self.watchers:
            for part in step:
                changed: list[Told] = [(key, (None, last.end)) for key in part.set]
                deleted: list[Told] = [(key, (DELETED, last.end)) for key in part.delete]
                self.watchers.tell(changed + deleted)
        self._notify()

    def _notify(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    async def _listen(self, subscription: Subscription) -> None:
        """Ask a subscription that is silent; a writer may have died, but then nothing has changed either."""
        while True:
            await self._sleep(SILENT_SECONDS)
            if self._clock.monotonic() - self._heard < SILENT_SECONDS:
                continue
            await subscription.ping()
            if self._local is not None and self._local.fresh and await self._head() != self._local.head:
                raise UnavailableError(f"{self._source.path}: the subscription is silent, but there are changes")

    # The local copy

    async def _keep_loaded(self, local: Local, subscription: Subscription) -> None:
        pauses = Pauses(self._clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            await self._stale.wait()
            self._stale.clear()
            self._filled.clear()
            try:
                loaded = await self._load(local, subscription)
            except StorageError:  # who reads is told
                loaded = False
            if loaded:
                pauses.end()
                self._notify()
            else:
                self._stale.set()
                await either(self._filled, self._clock, pauses.begin())

    async def _load(self, local: Local, subscription: Subscription) -> bool:
        local.begin()
        if local.read_from(await self._head()):
            async for found in self._source.scan():
                local.add(found)
                await asyncio.sleep(0)
        last = await self._head()
        await subscription.ping()  # and so what was told before the second head has come
        return local.arrive(last)

    async def _sleep(self, seconds: float) -> None:
        await either(asyncio.Event(), self._clock, seconds)


async def either(event: asyncio.Event, clock: Clock, seconds: float) -> bool:
    """Wait for an event, so many seconds at most; returns whether it came."""
    over = asyncio.get_running_loop().create_future()
    timer = clock.call_later(seconds, resolver(over))
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting, over}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
        waiting.cancel()
    return event.is_set()
