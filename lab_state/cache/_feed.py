"""The task of a reader, with its child tasks. It receives the changes, and updates the local copy.

If the subscription is lost, the task subscribes again, after growing pauses. A running writer sends
heartbeats. So if there is no message for some seconds, the task tests the subscription with a ping.
Every two seconds the task also reads the head of the mirror, which is the field `$lab_state`. So the
reader knows whether reads succeed, even if the application reads nothing.

Any client may send a message. Messages that cannot be decoded are skipped. After the first
such message, a line is logged, and the mirror is read again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from lab_state._clock import Clock, Pauses, done_within, sleep
from lab_state._entries import DELETED
from lab_state._log import Log
from lab_state._watch import MOST_PENDING, Group, Told
from lab_state.cache._format import Head, Message, parse_message
from lab_state.cache._local_copy import LocalCopy
from lab_state.cache._source import Source, Subscription
from lab_state.exceptions import StorageError, UnavailableError

POLL_SECONDS = 2.0
"""The seconds between two reads of the head."""

SILENT_SECONDS = 5.0
"""The seconds without a message after which the subscription is tested.

A running writer sends at least two messages in this time, but none during a fill.
"""

_REPLAYED_AT_ONCE = 1000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_MOST_BYTES = 32 * 1024 * 1024
"""The largest size of the messages of one step before its last message, in bytes. A larger step is not applied: the mirror is
read again.

A writer sends at most about 4 MiB of changes in one step, and a resync in place of the other changes. The writer only
estimates this size: it counts a character of a key as one byte, and does not count expiry times. In JSON, a character has
up to six bytes. So the messages may be several times as large as the estimate.
"""

_LONGEST_STEP = 1_000_000
"""The largest number of revisions in a step. A larger step may be from another client, so the mirror is read again."""

logger = Log(logging.getLogger("lab_state"))


class Feed:
    """The receiver of the changes of one mirror.

    Attributes:
        revision: The revision of the last message, or of the last head that was read, if the head has a higher revision. It
            is -1 while the subscription does not work, and until the first message or head.
        watchers: The watches that receive the changes.
        moved: An event that is set when the revision or the local copy may have changed, and by `aclose`. A new
            event then replaces it. Read the attribute again before each wait.
    """

    def __init__(
        self, source: Source, local: LocalCopy | None, clock: Clock, head: Callable[[], Awaitable[Head]]
    ) -> None:
        """Start the task. `head` is a function that reads the head of the mirror."""
        self.revision: int = -1
        self._reported = -1  # the watches have got all changes up to this revision, or a `resync` in their place
        self.watchers: Group = Group()
        self._source = source
        self._local = local
        self._clock = clock
        self._head = head
        self._parts: list[Message] = []
        self._bytes = 0  # the size of `_parts`
        self._ends_with: tuple[int, int, str] | None = None  # a step that was too large: its other parts are dropped
        self._last: Message | None = None
        self._heard = clock.monotonic()
        self._stale = asyncio.Event()
        self._filled = asyncio.Event()
        self._poll_now = asyncio.Event()
        self.moved: asyncio.Event = asyncio.Event()
        self._pauses = Pauses(clock, _FIRST_PAUSE, _LONGEST_PAUSE)
        self._logged_lost = False  # whether the lost subscription was logged
        self._logged_foreign = False  # whether messages of another client were logged
        self._task = asyncio.create_task(self._run(), name="lab_state reader")

    async def aclose(self) -> None:
        """End the task and all watches. A watch still yields the changes that were received before.

        If this call is cancelled, the task and the watches end as well.
        """
        for watcher in self.watchers:
            watcher.close()
        self._notify()
        # If the event loop of the task was closed, the task has ended, and a wait for it would raise an error.
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    def lives(self, writer: str, below: int) -> bool:
        """Return whether the last message is from this writer, has a revision below `below`, and is not too old.

        The last message is too old if no other message follows within `SILENT_SECONDS`. With a new subscription, this time
        starts again.
        """
        last = self._last
        silent = self._clock.monotonic() - self._heard >= SILENT_SECONDS
        return last is not None and not silent and last.writer == writer and last.end < below

    def restart_from(self, revision: int) -> None:
        """Continue from a lower revision, and read everything again."""
        self.revision = revision
        self._resync()
        self._filled.set()  # ends the pause after a failed load

    def _resync(self) -> None:
        """Load the local copy again, if there is one, and send a `resync` to all watches."""
        if self._local is not None:
            self._local.invalidate()
            self._stale.set()
        self.watchers.resync(self.revision)
        self._notify()

    async def _run(self) -> None:
        while True:
            try:
                await self._run_subscription()
            except StorageError as error:
                self._lost(error)
            except Exception as error:  # noqa: BLE001 -- no error of a source may end the task
                self._lost(
                    UnavailableError(f"{self._source.path}: {type(error).__name__}, which a source must not raise")
                )
            await sleep(self._clock, self._pauses.start())

    def _lost(self, error: StorageError) -> None:
        if not self._logged_lost:
            logger.warning("a reader receives no changes at present, and tries again: %s", error)
            self._logged_lost = True

    def _works(self) -> None:
        """Note that the subscription works. If it was lost before, log that."""
        if self._logged_lost:
            logger.debug("a reader receives changes again")
        self._logged_lost = False
        self._pauses.reset()

    async def _run_subscription(self) -> None:
        """Subscribe, and receive changes until the subscription is lost."""
        subscription = await self._source.subscribe()
        try:
            await self._follow(subscription)
        finally:
            self.revision = -1
            if self._local is not None:
                self._local.invalidate()
            self._notify()
            await subscription.aclose()

    async def _follow(self, subscription: Subscription) -> None:
        """Run the tasks of a subscription until one of them raises an error."""
        self._parts, self._bytes, self._heard = [], 0, self._clock.monotonic()
        work = [self._receive(subscription), self._poll(subscription)]
        if self._local is not None:
            self._stale.set()
            work.append(self._keep_loaded(self._local, subscription))
        tasks = {asyncio.ensure_future(each) for each in work}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:  # pragma: no branch -- a task ends only by an error, so one of them raises
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, subscription: Subscription) -> None:
        """Read the head every two seconds, and at once after a fill. Before each read except the first, call `_test`.

        If the first revision of the subscription comes from a head, send a `resync`, because earlier changes may have been
        missed. If it comes from a message, `_step` sends the `resync`.
        """
        while True:
            self._poll_now.clear()
            try:
                head = await self._head()
            except StorageError:
                head = None  # reads of the application raise this error, so it is not logged here
            if head is not None and self.revision < head.revision:
                begins = self.revision < 0
                self.revision = head.revision
                if begins:
                    self._reported = self.revision
                    self.watchers.resync(self.revision)
                self._notify()
            await wait_for_event(self._poll_now, self._clock, POLL_SECONDS)
            await self._test(subscription)

    async def _test(self, subscription: Subscription) -> None:
        """Test the subscription if no message has come for some seconds. If no writer is running, there are no messages.

        Raises:
            UnavailableError: The mirror has changed without a message.
            StorageError: The subscription or the cache does not answer.
        """
        if self._clock.monotonic() - self._heard < SILENT_SECONDS:
            return
        await subscription.ping()
        if self._local is not None and self._local.loaded and await self._head() != self._local.head:
            raise UnavailableError(f"{self._source.path}: the subscription brings no messages, but there are changes")
        self._works()

    # Messages

    async def _receive(self, subscription: Subscription) -> None:
        while True:
            data = await subscription.receive()
            message = parse_message(data)
            if message is None:
                self._skip_foreign()
                continue
            self._heard = self._clock.monotonic()
            self._works()
            self._collect(message, len(data))

    def _skip_foreign(self) -> None:
        """Skip a message that cannot be decoded. After the first such message, read everything again.

        The message is from another client, or from a newer version of lab_state.
        """
        if not self._logged_foreign:
            self._logged_foreign = True
            logger.warning(
                "%s: a message on the channel cannot be decoded, so it is from another client or from a newer version of "
                "lab_state; such messages are skipped, and the mirror is read again once",
                self._source.path,
            )
            self._resync()

    def _collect(self, message: Message, size: int) -> None:
        """Collect the messages of a step, and process the step when it is complete."""
        if self._ends_with == (message.start, message.end, message.writer):
            if not message.more:
                self._ends_with = None
                self._resync()  # a load that has begun since the first resync may lack a part of this step
            return
        first = self._parts[0] if self._parts else message
        if (message.start, message.end, message.writer) != (first.start, first.end, first.writer):
            self._parts, self._bytes = [], 0  # a message of the earlier step was lost
            self._resync()
        self._parts.append(message)
        self._bytes += size
        if message.more:
            if self._bytes > _MOST_BYTES:
                self._parts, self._bytes = [], 0
                self._ends_with = message.start, message.end, message.writer
                self._resync()
            return
        step, self._parts, self._bytes = self._parts, [], 0
        self._step(step)

    def _step(self, step: list[Message]) -> None:
        last = self._last = step[-1]
        if last.end - last.start > _LONGEST_STEP:
            self._resync()
            return
        # Earlier changes may have been missed: before the subscription, or in a message that could not be decoded.
        missed = self.revision < 0 or last.start > self._reported
        self.revision = self._reported = last.end
        if last.resync:
            self._filled.set()
            self._poll_now.set()
        if self._local is not None and not self._local.receive(step):
            self._local.invalidate()
            self._stale.set()
        if (
            missed
            or last.resync
            or step[0].clear
            or sum(len(part.set) + len(part.delete) for part in step) > MOST_PENDING
        ):
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
            except StorageError:  # reads of the application raise this error, so it is not logged here
                loaded = False
            if loaded:
                pauses.reset()
                self._notify()
            else:
                self._stale.set()
                await wait_for_event(self._filled, self._clock, pauses.start())

    async def _load(self, local: LocalCopy, subscription: Subscription) -> bool:
        local.start_loading()
        if local.set_head(await self._head()):
            async for found in self._source.scan():
                local.add(found)
                await asyncio.sleep(0)
        last = await self._head()
        await subscription.ping()  # when this returns, all messages before the second head were received
        while local.replay(_REPLAYED_AT_ONCE):  # noqa: ASYNC110 -- the condition does the work
            await asyncio.sleep(0)
        return local.finish_loading(last)


async def wait_for_event(event: asyncio.Event, clock: Clock, seconds: float) -> bool:
    """Wait for an event, for at most `seconds` of a clock. Return whether it is set at the end."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await done_within(waiting, clock, seconds)
    finally:
        waiting.cancel()
    return event.is_set()
