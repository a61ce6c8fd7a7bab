"""The one task of a reader: follows the changes, and keeps the local copy by them.

A subscription that is lost is made again after growing pauses; one that is silent, which
a living writer never leaves it, is asked whether it is there at all. Nothing is taken to
be fresh in between. The head of the copy is read every two seconds besides, so that a
reader knows whether reads succeed, though nothing is read just then.

Any client may send a message. One that is not from lab_state is left out, and logged once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lab_state._clock import Clock, Pauses, resolver
from lab_state._entries import DELETED
from lab_state._log import Log
from lab_state._watch import MOST_PENDING, Group, Told
from lab_state.cache._format import Head, Message, parse_message
from lab_state.cache._local_copy import LocalCopy
from lab_state.cache._source import Source, Subscription
from lab_state.exceptions import StorageError, UnavailableError

LOOK_SECONDS = 2.0
"""Seconds between two readings of the head."""

SILENT_SECONDS = 5.0
"""After so long without a message, which is more than two beats of a writer, the subscription is asked."""

_REPLAYED_AT_ONCE = 1000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_MOST_BYTES = 16 * 1024 * 1024
"""Of the messages of one step; a writer sends up to 4 MiB, and then a resync."""

_LONGEST_STEP = 1_000_000
"""A message that tells of more revisions is no proof that the copy is there: it is read again."""

logger = Log(logging.getLogger("lab_state"))


class Feed:
    """Follows one copy.

    Attributes:
        revision: The last one that was told of, while the subscription is whole; else -1.
        watchers: Who is told which keys have changed.
        moved: Set when something is heard after this was asked for; ask anew each time.
    """

    def __init__(
        self, source: Source, local: LocalCopy | None, clock: Clock, head: Callable[[], Awaitable[Head]]
    ) -> None:
        """Begin; `head` fetches whose copy is there, and at which revision."""
        self.revision: int = -1
        self.watchers: Group = Group()
        self._source = source
        self._local = local
        self._clock = clock
        self._head = head
        self._parts: list[Message] = []
        self._bytes = 0  # of these parts
        self._last: Message | None = None
        self._heard = clock.monotonic()
        self._stale = asyncio.Event()
        self._filled = asyncio.Event()
        self._look_now = asyncio.Event()
        self.moved: asyncio.Event = asyncio.Event()
        self._pauses = Pauses(clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        self._told = False  # that the subscription is lost
        self._told_strange = False  # that another client sends messages
        self._task = asyncio.create_task(self._run(), name="lab_state reader")

    async def aclose(self) -> None:
        """The end: who watches is told the rest, and that it is over."""
        self._task.cancel()
        await asyncio.wait({self._task})
        for watcher in self.watchers:
            watcher.close()
        self._notify()

    def lives(self, writer: str, below: int) -> bool:
        """Return whether this writer was heard of just now, and itself says that it is below a revision."""
        last = self._last
        silent = self._clock.monotonic() - self._heard >= SILENT_SECONDS
        return last is not None and not silent and last.writer == writer and last.end < below

    def begin_anew(self, revision: int) -> None:
        """Go on from a lower revision, and have everything read again."""
        self.revision = revision
        self._read_again()
        self._filled.set()  # now, and not after the pause behind what had failed

    def _read_again(self) -> None:
        if self._local is not None:
            self._local.lose()
            self._stale.set()
        self.watchers.resync(self.revision)
        self._notify()

    async def _run(self) -> None:
        while True:
            try:
                await self._once()
            except StorageError as error:
                self._lost(error)
            except Exception as error:  # noqa: BLE001 -- whatever a source raises, the reader goes on
                self._lost(
                    UnavailableError(f"{self._source.path}: {type(error).__name__}, which no source should raise")
                )
            await self._sleep(self._pauses.start())

    def _lost(self, error: StorageError) -> None:
        if not self._told:
            logger.warning("a reader does not hear of changes for the moment, and tries again: %s", error)
            self._told = True

    async def _once(self) -> None:
        """Subscribe, and follow until the subscription is lost."""
        subscription = await self._source.subscribe()
        try:
            await self._follow(subscription)
        finally:
            self.revision = -1
            if self._local is not None:
                self._local.lose()
            self._notify()
            await subscription.aclose()

    async def _follow(self, subscription: Subscription) -> None:
        """Until it is lost."""
        self._parts, self._bytes, self._heard = [], 0, self._clock.monotonic()
        work = [self._receive(subscription), self._look(subscription)]
        if self._local is not None:
            self._stale.set()
            work.append(self._keep_loaded(self._local, subscription))
        tasks = {asyncio.ensure_future(each) for each in work}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:  # pragma: no branch -- one of them raises: none ends otherwise
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, subscription: Subscription) -> None:
        """Read the head again and again. Changes missed before the first time have to be read again."""
        while True:
            self._look_now.clear()
            try:
                head = await self._head()
            except StorageError:
                head = None  # a read tells its caller; a new copy comes with a resync
            if head is not None and self.revision < head.revision:
                begins = self.revision < 0
                self.revision = head.revision
                if begins:
                    self.watchers.resync(self.revision)
                self._notify()
            await either(self._look_now, self._clock, LOOK_SECONDS)
            await self._listen(subscription)

    async def _listen(self, subscription: Subscription) -> None:
        """Ask a subscription that is silent; a writer may have died, but then nothing has changed either."""
        if self._clock.monotonic() - self._heard < SILENT_SECONDS:
            return
        await subscription.ping()
        if self._local is not None and self._local.fresh and await self._head() != self._local.head:
            raise UnavailableError(f"{self._source.path}: the subscription is silent, but there are changes")

    # Messages

    async def _receive(self, subscription: Subscription) -> None:
        while True:
            data = await subscription.receive()
            message = parse_message(data)
            if message is None:
                self._leave_out()
                continue
            self._heard = self._clock.monotonic()
            if self._told:
                logger.info("a reader hears of changes again")
            self._told = False
            self._pauses.reset()
            self._take(message, len(data))

    def _leave_out(self) -> None:
        """Leave out a message that cannot be read, and have everything read again, once.

        Another client's message cannot be read. A newer writer's may not be, either.
        """
        if not self._told_strange:
            self._told_strange = True
            logger.warning(
                "%s: a message on the channel is not from lab_state, so another client sends there; such messages are "
                "left out, and everything is read again once",
                self._source.path,
            )
            self._read_again()

    def _take(self, message: Message, size: int) -> None:
        """Take a message, which may be a part of a step."""
        first = self._parts[0] if self._parts else message
        if (message.start, message.end, message.writer) != (first.start, first.end, first.writer):
            self._parts, self._bytes = [], 0  # the end of that step never came
            self._read_again()
        self._parts.append(message)
        self._bytes += size
        if message.more:
            if self._bytes > _MOST_BYTES:
                self._parts, self._bytes = [], 0
            return
        step, self._parts, self._bytes = self._parts, [], 0
        self._step(step)

    def _step(self, step: list[Message]) -> None:
        last = self._last = step[-1]
        if last.end - last.start > _LONGEST_STEP:
            self._read_again()
            return
        self.revision = last.end
        if last.resync:
            self._filled.set()
            self._look_now.set()
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

    # The local copy

    async def _keep_loaded(self, local: LocalCopy, subscription: Subscription) -> None:
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
                pauses.reset()
                self._notify()
            else:
                self._stale.set()
                await either(self._filled, self._clock, pauses.start())

    async def _load(self, local: LocalCopy, subscription: Subscription) -> bool:
        local.begin()
        if local.read_from(await self._head()):
            async for found in self._source.scan():
                local.add(found)
                await asyncio.sleep(0)
        last = await self._head()
        await subscription.ping()  # and so what was told before the second head has come
        while local.replay(_REPLAYED_AT_ONCE):  # noqa: ASYNC110 -- it is not waited for, it is done
            await asyncio.sleep(0)
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
