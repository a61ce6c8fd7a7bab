"""`Waits`: the calls that wait for a revision."""

from __future__ import annotations

from lab_state._arguments import check_revision, check_timeout
from lab_state._reads import Reads


class Waits(Reads):
    """The calls that wait until changes are durable, or until this process has them."""

    __slots__ = ()

    async def flush(self) -> None:
        """Make each change so far durable, and return when this is done.

        If all changes are durable already, nothing is written. Calls at the same time share one write to
        the storage. If the caller is cancelled, this write goes on. In a shared state, each change whose call has
        returned is durable already. So `flush` does the same as `catch_up` there, with the same errors.

        Raises:
            StorageError: The write to the storage failed. The changes stay in memory, and the next flush tries
                again. Unless `flush_interval` is `None`, the manager starts the next flush by itself, after a pause.
                Or the flush task has ended, and a change is not durable: call `stop()`; see `Status.task_failure`.
            FencedError: The changes will never be durable: a newer writer owns the state.
            ClosedError: The manager is not running.
            RuntimeError: This is not the event loop of `start()`.
        """
        if self._core.port is not None:
            await self.catch_up()
            return
        await self._core.durability.make_durable(self._core.state.revision)

    async def catch_up(self) -> None:
        """Wait until this process has all changes that were durable at the call.

        In a shared state, these are the changes of all processes. The call asks the owner, unless this process
        is the owner. The manager of a state that is not shared has all changes already, so the call returns at
        once. If the caller is cancelled, the wait ends, and nothing changes.

        Raises:
            UnavailableError: No owner gave a sign of life for `Config.owner_timeout` seconds. Call again.
            LabStateError: In a shared state, this process has lost its state. The error is a `StorageError`, or a `SchemaError`
                if another process has migrated the state. Fix the fault that the message names, and restart this process.
            ClosedError: The manager is not running.
            RuntimeError: This is not the event loop of `start()`.
        """
        self._core.durability.check_loop()
        if (port := self._core.port) is not None:
            await port.catch_up()

    async def wait_durable(self, revision: int | None = None, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- a timeout raises a `StorageError`
        """Wait until a revision is durable. Unlike `flush()`, start no flush.

        If the caller is cancelled, the wait ends, and nothing changes.

        Args:
            revision: The revision that a write returned; by default the revision of the last change.
            timeout: The longest wait, in seconds, 0 or more and finite. `None` waits without
                a limit.

        Raises:
            WaitTimeoutError: The revision is not durable after `timeout` seconds; wait again.
                The error is an `UnavailableError` and a `TimeoutError`.
            ValueError: There is no such revision yet, or the timeout is out of bounds. In a shared state, a
                revision that does not exist yet is not an error: another process may make it, so the call waits.
            TypeError: The revision is not an `int`, or the timeout is not a number.
            RuntimeError: This is not the event loop of `start()`.
            FencedError: The revision will never be durable: a newer writer owns the state.
            StorageError: The flush task has ended; see `Status.task_failure`. Or the manager was stopped meanwhile, and
                its last flush failed. Or, in a shared state, this process has lost its state.
            ClosedError: The manager is not running.
        """
        self._check_open()
        last = self._core.state.revision
        if revision is not None:
            check_revision(revision)
        seconds = check_timeout(timeout)
        if self._core.port is not None:  # another process may make the revision
            await self.wait_revision(last if revision is None else revision, timeout)
            return
        if revision is not None and revision > last:
            raise ValueError(f"there is no revision {revision} yet: the last one is {last}")
        await self._core.durability.wait_durable(last if revision is None else revision, seconds)

    async def wait_revision(self, revision: int, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- a timeout raises a `StorageError`
        """Wait until this process has a revision, such as the result of a write in another process or before a restart.

        If this process has the revision, return at once. Otherwise wait until the revision is made and durable.
        If the caller is cancelled, the wait ends, and nothing changes.

        Args:
            revision: The revision.
            timeout: The longest wait, in seconds, 0 or more and finite. `None` waits without
                a limit.

        Raises:
            WaitTimeoutError: The revision was not reached in time; wait again, or use the present state.
                The error is an `UnavailableError` and a `TimeoutError`.
            TypeError: The revision is not an `int`, or the timeout is not a number.
            ValueError: The timeout is out of bounds.
            RuntimeError: This is not the event loop of `start()`.
            FencedError: The revision will not be reached: a newer writer owns the state.
            StorageError: The flush task has ended; see `Status.task_failure`. Or the manager was stopped meanwhile, and
                its last flush failed. Or, in a shared state, this process has lost its state.
            ClosedError: The manager is not running.
        """
        check_revision(revision)
        seconds = check_timeout(timeout)
        durability = self._core.durability
        durability.check_loop()
        if revision <= self._core.state.revision:
            return
        if (port := self._core.port) is not None:
            await port.wait_revision(revision, seconds)
        else:
            await durability.wait_durable(revision, seconds)
