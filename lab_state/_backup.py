"""`BackedUp`: the call `backup` of a manager, and the tasks that write backups.

Theory of operation. A backup is a snapshot of a view of the state, as a checkpoint is. A second view at the same time
would need a copy of the map. So a backup waits until the view of a checkpoint is closed, and a checkpoint waits for a backup. Each
backup is written in a separate task. `stop()` cancels these tasks before it writes its checkpoint.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from lab_state._core import Core
from lab_state._durability import Durability
from lab_state._flusher import Flusher
from lab_state._snapshots import SnapshotViews
from lab_state._state import State
from lab_state.exceptions import ClosedError
from lab_state.storage._backup_file import BackupFile
from lab_state.storage._directory import Paths, check_path
from lab_state.storage._worker import Threads, Worker

R = TypeVar("R")

_LOOK_EVERY = 0.005
"""The seconds between two checks whether a view is closed. The view of a checkpoint needs no such checks."""


class Backups:
    """The backups of one manager that are being written."""

    def __init__(self) -> None:
        """Begin without backups."""
        self._tasks: set[asyncio.Task[int]] = set()

    async def run(self, name: str, writing: Coroutine[Any, Any, int]) -> int:
        """Write a backup in a task, and return its result. If the caller is cancelled, the task is cancelled, too.

        Raises:
            ClosedError: `end` was called.
            LabStateError: The backup failed.
        """
        task = asyncio.create_task(writing, name=f"lab_state {name} backup")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise ClosedError(
                f"the manager of {name!r} was stopped during this backup: its path has the older backup, or the whole new one"
            )
        return task.result()

    def _ended(self, task: asyncio.Task[int]) -> None:
        self._tasks.discard(task)
        _ = task.cancelled() or task.exception()  # otherwise asyncio logs the error if the caller was cancelled

    async def end(self) -> None:
        """Cancel the backups of this event loop, and wait until their views are closed."""
        loop = asyncio.get_running_loop()
        tasks = {task for task in self._tasks if task.get_loop() is loop}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class BackedUp:
    """A base of the manager, with the call `backup`."""

    __slots__ = ()

    _core: Core
    _backups: Backups

    @property
    def _flusher(self) -> Flusher | None:
        """The flusher, if this process owns the state."""
        raise NotImplementedError

    def _own_files(self) -> Paths | None:
        """Return the files of the state; `None` if they are not on this machine. The call may block."""
        raise NotImplementedError

    async def backup(self, path: str | os.PathLike[str]) -> int:
        """Write the whole state of one moment to one file. The moment is at or after the call.

        The file is a snapshot: to restore it, copy it to `<name>.json` in an empty directory. The file has the
        expiries, too. All changes in the file are committed before the file is complete. So this call also flushes.
        Writes, commits and reads go on meanwhile. A checkpoint and a backup wait for each other. In a shared state,
        each process can write a backup from its own copy. The changes of an open transaction are not in the backup.

        The file is written beside `path` under a temporary name, synced, and renamed. So a file at `path` is always a whole
        backup: the older one or the new one. Only the user of the process can read a new file. A file that replaces an older
        backup gets the owner and the mode of that backup. If the process is killed, a file `<path>.<8 hexadecimal digits>.tmp` may
        be left. Delete it.

        A second call at the same time writes a second file. With the same path, the last rename wins. If the caller
        is cancelled, or `stop()` is called meanwhile, the temporary file is deleted. If the rename has begun, the new
        backup is at the path.

        Args:
            path: The path of the file, on this machine. Its directory must exist. An existing file is replaced.
                It must not be a directory, a link, a device, or a file of a state.

        Returns:
            The revision of the state in the backup.

        Raises:
            UnsupportedError: The path cannot be used: its directory is missing, a permission is missing, or a
                directory, a link, a device or a file of a state is at the path. The message gives the reason.
            UnavailableError: The file could not be written, for example because the disk is full. The older backup is
                unchanged, unless the message says that the sync of the directory failed. Or, in a shared state, there
                was no sign of life of an owner for `Config.owner_timeout` seconds.
            StorageError: A commit failed, so the changes in the backup would not be durable. The older backup is unchanged.
            FencedError: A newer writer owns the state, and there are changes that will never be durable.
            ClosedError: The manager is not running, or was stopped meanwhile.
            ValueError: The path is empty, starts with `~`, or has a character that a path cannot have.
            TypeError: The path is neither a `str` nor a path object.
            RuntimeError: This is not the event loop of `start()`.
        """
        target = check_path(path, "backup")
        core = self._core
        core.durability.check_loop()
        if core.port is not None:
            await core.port.catch_up()
        durability = core.durability  # raises an error if the manager was stopped meanwhile
        backup = _Backup(target, self._own_files, core.state, durability, lambda: self._flusher)
        return await self._backups.run(core.name, backup.write())


class _Backup:
    """One backup that is being written."""

    def __init__(
        self,
        path: str,
        own: Callable[[], Paths | None],
        state: State,
        durability: Durability,
        flusher: Callable[[], Flusher | None],
    ) -> None:
        """Prepare the backup. No file is touched yet.

        Args:
            path: The path of the file.
            own: A function that returns the files of the state; see `BackupFile`. It may block.
            state: The state, or the copy of a shared state.
            durability: The durability of the state.
            flusher: A function that returns the flusher, if this process owns the state.
        """
        self._path = path
        self._own = own
        self._state = state
        self._durability = durability
        self._flusher = flusher
        self._thread = Worker(Threads("lab_state backup"))
        self._file: BackupFile | None = None

    async def write(self) -> int:
        """Write the backup, and return its revision."""
        try:
            file = await self._run(self._open)
            revision = await self._write_view(file)
            await self._run(file.publish)
        except asyncio.CancelledError:
            self._thread.submit(self._discard)  # do not wait for this, because the disk may hang
            raise
        except BaseException:
            await self._run(self._discard)
            raise
        finally:
            self._thread.shutdown()
        return revision

    async def _run(self, function: Callable[[], R]) -> R:
        """Call a function in the thread."""
        return await asyncio.wrap_future(self._thread.submit(function))

    def _open(self) -> BackupFile:
        self._file = BackupFile(self._path, self._own())
        return self._file

    def _discard(self) -> None:
        if self._file is not None:
            self._file.discard()

    async def _write_view(self, file: BackupFile) -> int:
        """Take a view, write it, and return its revision."""
        state = self._state
        await self._no_view()
        flusher = self._flusher()
        pace = None if flusher is None else flusher.checkpoints.pace
        views = SnapshotViews(state, self._durability.make_durable, pace=pace, has_results=False)
        revision = state.revision
        try:
            await file.write(views.take(), self._thread)
        finally:
            await views.fold()
            if (flusher := self._flusher()) is not None:
                flusher.checkpoint_if_due()
        return revision

    async def _no_view(self) -> None:
        """Wait until no checkpoint runs, and no view is in use. Until its next `await` the caller can take a view without copying the map."""
        while True:
            flusher = self._flusher()
            if flusher is not None and flusher.checkpoints.is_running:
                await flusher.checkpoints.ended()
            elif self._state.frozen:
                await asyncio.sleep(_LOOK_EVERY)
            else:
                return
