"""The session of one state in S3. Its writer owns the state until `aclose`, or until a newer writer deposes this writer.

* A commit creates one record object at the next number. If its outcome is unknown, the
  record stays pending, with its number, its bytes and its id. The next commit sends it again
  until its outcome is known. No other record is written before that.
* A checkpoint takes a view, and notes the number of the last record that the view covers. It
  spools the new snapshot, and replaces the old snapshot. Then it deletes the records that
  the new snapshot covers. With a history, it deletes only the oldest generations instead.
  It never deletes a fence.
* A session is fenced if it finds the fence or the snapshot of a newer writer. It is also fenced if it
  finds a snapshot from another program. From then on, each write raises `FencedError`.

Each PUT runs in a separate task, which continues if the caller is cancelled. A commit waits for
the task of the previous commit, and a checkpoint waits for the task of the previous checkpoint.
`aclose` waits for both tasks.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple, NoReturn

from lab_state._log import Log
from lab_state.exceptions import FencedError, StorageError, UnavailableError, UnsupportedError
from lab_state.storage._limits import Limits
from lab_state.storage._protocol import HistoryFigures, Recovery, SnapshotSource
from lab_state.storage.s3._body import LONG, Body, Spool
from lab_state.storage.s3._client import Requests
from lab_state.storage.s3._format import BASE, KEPT, OWN_BASE, OWNER, Names, Stamp, frame, stamp_in_metadata, stamped
from lab_state.storage.s3._keeping import Keeper, keeps_something
from lab_state.storage.s3._open import Opened, new_write_id
from lab_state.storage.s3._outcomes import WRITE_ID, NotOursError, ObjectInfo

_logger = Log(logging.getLogger("lab_state"))

_MOST_RECORDS = 64
_MIN_CHECKPOINT_BYTES = 1024 * 1024
_MOST_PAGES = 100
_MOST_REFUSALS = 4  # attempts to replace the snapshot; delayed requests of one writer cause fewer refusals than this
_MOST_SNAPSHOT_BYTES = 5 * 1024**3


class _Pending(NamedTuple):
    """A record that is being written, or whose outcome is unknown."""

    number: int
    body: Body
    metadata: dict[str, str]


class S3Session:
    """A state in S3 that this writer owns until `aclose`; see `StorageSession`."""

    def __init__(
        self, store: Requests, names: Names, opened: Opened, let_go: Callable[[], None], limits: Limits | None = None
    ) -> None:
        """Start the session of an opened state.

        `let_go` is called when the session has ended. `limits` are the limits of the history; `None` if the session keeps no history.
        """
        fence, loaded, undeletable = opened
        self._keeper = None if limits is None else Keeper(store, names, limits, fence)
        self.recovery: Recovery = loaded.recovery
        self.path: str = names.url(names.snapshot)
        self.place: object = None  # see `LockedError.place`; the storage sets it
        self.snapshot_bytes: int = loaded.snapshot_bytes
        self._store = store
        self._names = names
        self._fence = fence
        self._etag = loaded.etag
        self._base = loaded.base
        self._seq = fence
        self._records = dict(loaded.records)  # sizes, by number, of the records that the snapshot does not cover
        self._covered = loaded.covered
        self._left = loaded.kept  # the number of the last record in an earlier history; None if not known yet
        self._cleaned = 0
        self._pending: _Pending | None = None
        self._deposed: str | None = None
        self._let_go = let_go
        self._pid = os.getpid()
        self._committing: asyncio.Task[None] | None = None
        self._spooling: asyncio.Future[None] | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self.warning: str | None = None
        if undeletable is not None:
            self._warn(undeletable)

    def __repr__(self) -> str:
        """Return the path of the state, without credentials."""
        return f"<S3Session of {self.path}>"

    @property
    def journal_bytes(self) -> int:
        """The size of the records that the snapshot does not cover, in bytes."""
        return sum(self._records.values())

    @property
    def history(self) -> HistoryFigures | None:
        """The figures of the history after the last checkpoint; `None` if the session keeps no history."""
        return None if self._keeper is None else self._keeper.figures

    @property
    def progress(self) -> int:
        """The number of bytes of records and snapshots that were sent to the store."""
        return self._store.sent

    # Commits

    async def commit(self, record: bytes, snapshot: SnapshotSource) -> bool:  # noqa: ARG002 -- a new record object is always possible
        """Create one record object. If an earlier record is pending, send the earlier one first. See `StorageSession.commit`."""
        self._check()
        self._committing = _start(self._commit(record, self._committing))
        await asyncio.shield(self._committing)
        journal = self.journal_bytes
        return len(self._records) >= _MOST_RECORDS or journal > max(_MIN_CHECKPOINT_BYTES, self.snapshot_bytes)

    async def _commit(self, record: bytes, before: asyncio.Task[None] | None) -> None:
        await _ended(before)
        if self._pending is not None:
            await self._send_until_known(self._pending)
        number = self._seq + 1
        body = await self._framed(number, record)
        self._pending = _Pending(number, body, {WRITE_ID: new_write_id(), BASE: self._base})
        await self._send_until_known(self._pending)

    async def _framed(self, number: int, record: bytes) -> Body:
        name = self._names.name
        if len(record) < LONG:
            return Body.of(frame(name, number, record))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._store.thread, lambda: Body.of(frame(name, number, record)))

    async def _send_until_known(self, pending: _Pending) -> None:
        """Send a record until it is known to be stored. After a failure it stays pending."""
        self._check_deposed()
        number, body, metadata = pending
        try:
            await self._store.put(self._names.record(number), body, metadata, None)
        except NotOursError as refused:
            self._depose(f"it has taken the number {number}, which the next record needs", refused.found)
        self._seq, self._pending = number, None
        self._records[number] = body.size

    def _depose(self, why: str, found: ObjectInfo | None) -> NoReturn:
        owner = "" if found is None else found.metadata.get(OWNER, "")
        by = f" ({owner})" if owner else ""
        self._fenced_because(f"a newer writer{by} owns {self.path}: {why}")

    def _fenced_because(self, why: str) -> NoReturn:
        self._deposed = f"{why}. Stop this manager; changes that it has not made durable are not in the state"
        raise FencedError(self._deposed) from None

    # Checkpoints

    async def checkpoint(self, snapshot: SnapshotSource) -> None:
        """Spool the snapshot. Then replace the old one; see `StorageSession.checkpoint`."""
        self._check()
        await _ended(self._publishing)
        self._check()
        slices, stamp = snapshot(), Stamp(self._seq, self._fence)
        spool = Spool(self._store.thread)
        self._spooling = asyncio.get_running_loop().create_future()
        try:
            self._publishing = _start(self._publish(await self._spooled(spool, slices, stamp), stamp, spool))
        except BaseException:
            spool.discard()
            raise
        finally:
            self._spooling.set_result(None)
        await asyncio.shield(self._publishing)
        self.forget_recovery()

    def forget_recovery(self) -> None:
        """Free the memory of the recovery; see `Forgetter`."""
        self.recovery = self.recovery.used()

    async def _spooled(self, spool: Spool, slices: AsyncIterator[bytes], stamp: Stamp) -> Body:
        last = b""
        async for part in slices:
            await spool.add(last)
            last = part
        await spool.add(stamped(last, stamp))
        body = await spool.body()
        self._check_deposed()
        if body.size > _MOST_SNAPSHOT_BYTES:
            raise UnsupportedError(
                f"the snapshot of {self.path} has more than 5 GiB, the most that one PUT can send: delete keys"
            )
        return body

    async def _publish(self, body: Body, stamp: Stamp, spool: Spool) -> None:
        try:
            # If there are no records between the old snapshot and the new one, both have the same state.
            if self._keeper is not None and self._etag is not None and stamp.seq > self._covered:
                await self._keeper.keep(self._etag, self._covered, self.snapshot_bytes)
            covered = await self._replace(body, stamp)
        finally:
            spool.discard()
        self._base, self._covered = OWN_BASE, covered
        own = [number for number in self._records if number <= covered]
        for number in own:
            del self._records[number]
        await self._clean(covered, own)

    async def _replace(self, body: Body, stamp: Stamp) -> int:
        """Replace the snapshot. Return the number of the last record that the stored snapshot now covers."""
        metadata = {WRITE_ID: new_write_id(), **stamp.metadata(), KEPT: str(await self._kept(stamp))}
        tries = self._store.tries("replacing", self._names.snapshot, body.size)
        for _ in range(_MOST_REFUSALS):
            try:
                self._etag = await self._store.put(self._names.snapshot, body, metadata, self._etag)
            except NotOursError as refused:
                found = refused.found
            else:
                self.snapshot_bytes = body.size
                return stamp.seq
            there = None if found is None else stamp_in_metadata(found.metadata, self.path)
            if found is None:
                _logger.error("%s was deleted while in use: writing it anew", self.path)
                self._etag = None
            elif there is None:
                self._fenced_because(f"{self.path} was replaced by a file that no manager wrote; it stays as it is")
            elif there.fence > self._fence:
                self._depose("it has replaced the snapshot", found)
            else:
                # A delayed request of this session, or of an earlier writer, has replaced the object.
                self._etag = found.etag
                if there.fence == self._fence and there.seq >= stamp.seq:
                    self.snapshot_bytes = found.size
                    return there.seq
            await tries.pause("a refusal by the store")
        raise UnavailableError(
            f"the store refused {_MOST_REFUSALS} times to replace {self.path}, although each request had the ETag that the store "
            "had reported before it; the next checkpoint tries again"
        )

    async def _kept(self, stamp: Stamp) -> int:
        """Return the number up to which the records belong to a history, for the metadata of a new snapshot."""
        if self._keeper is not None:
            return stamp.seq
        if self._left is None:  # the operator or another program wrote the snapshot, without metadata
            self._left = self._covered if await keeps_something(self._store, self._names) else 0
        return self._left

    async def _clean(self, covered: int, own: list[int]) -> None:
        """Delete the records up to `covered`, including records that a crash left. Do not delete fences.

        With a history, delete only the generations that its limits do not allow.

        If the store refused the last deletion, first delete only the records in `own`, which this
        session knows. If the store refuses again, do not list the other records. A failure is
        logged, and not raised.
        """
        try:
            if self._keeper is not None:
                if await self._keeper.prune(covered):
                    self._unwarn()
                return
            if self.warning is not None:
                await self._delete(own)
                self._unwarn()
            await self._clean_pages(covered)
        except UnsupportedError as refused:
            self._warn(str(refused))
        except StorageError as error:
            _logger.warning("%s: records that the snapshot covers stay until the next checkpoint: %s", self.path, error)

    async def _clean_pages(self, covered: int) -> None:
        """Delete the records up to `covered`, from the point where the last call ended.

        Keep the records of a history that an earlier session has kept. After `_MOST_PAGES` pages, leave the rest to the
        next checkpoint.
        """
        self._cleaned = max(self._cleaned, self._left or 0)
        for _ in range(_MOST_PAGES):
            if self._cleaned >= covered:
                return
            page, more = await self._store.page(self._names.journal, self._names.record(self._cleaned))
            sizes = {number: size for key, size in page.items() if (number := self._names.number(key)) is not None}
            await self._delete([number for number, size in sizes.items() if size and number <= covered])
            last = max(sizes, default=covered)  # keys that come after all numbers are not records
            self._cleaned = covered if more is None else min(last, covered)

    async def _delete(self, numbers: list[int]) -> None:
        await self._store.delete(map(self._names.record, numbers))

    def _unwarn(self) -> None:
        """Note that the store allows deletions again."""
        if self.warning is not None:
            self.warning = None
            _logger.debug("%s: records can be deleted again", self.path)

    def _warn(self, refused: str) -> None:
        """Note that the store refuses deletions. `status()` shows this until a deletion succeeds. Log only the first refusal."""
        told = self.warning is not None
        self.warning = f"records that the snapshot covers are not deleted until the store allows it, and their number grows: {refused}"
        if not told:
            _logger.warning(
                "%s: records that the snapshot covers are not deleted until the store allows it, and their number grows: %s",
                self.path,
                refused,
            )

    # The end

    async def aclose(self) -> None:
        """Wait for running requests. Then release the state; see `StorageSession.aclose`."""
        if self._closing is None or not _lives(self._closing):
            self._closing = _start(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await _ended(self._committing)
            await _ended(self._spooling)
            await _ended(self._publishing)
        finally:
            try:
                await self._store.aclose()
            finally:
                self._let_go()

    def _check(self) -> None:
        if os.getpid() != self._pid:  # pragma: no cover -- a child's coverage is not collected
            raise UnsupportedError(
                f"{self.path} belongs to the parent of this forked process: make a manager with another name here, or stop "
                "the manager of the parent"
            )
        if self._closing is not None:
            raise UnsupportedError(f"the session of {self.path} is closed: open the state again")
        self._check_deposed()

    def _check_deposed(self) -> None:
        if self._deposed is not None:
            raise FencedError(self._deposed)


def _start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task. If no caller waits for it, asyncio does not log its exception as never retrieved."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


async def _ended(task: asyncio.Future[None] | None) -> None:
    """Wait for a task of an earlier call, if there is one."""
    if task is not None and _lives(task):
        await asyncio.wait({task})


def _lives(task: asyncio.Future[None]) -> bool:
    """Return whether a task belongs to this event loop. A task of a closed loop will never end."""
    return task.get_loop() is asyncio.get_running_loop()
