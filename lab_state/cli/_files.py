"""The subcommands `backup` and `copy`: a state as one file, or at another place."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from typing import Literal

from lab_state._codec import LoadedState
from lab_state._copy import copy_as, snapshot_of
from lab_state._loading import load
from lab_state.cli._exits import CONFLICT, USAGE, Stop, is_missing
from lab_state.cli._output import Output
from lab_state.cli._storages import storage_at
from lab_state.cli._target import Target
from lab_state.cli._text import counted, size_text
from lab_state.exceptions import UnsupportedError
from lab_state.storage._backup_file import BackupFile, own_files
from lab_state.storage._worker import Threads, Worker


async def backup(output: Output, state: Target, target: str, *, json: bool) -> None:
    """Read a state, and write it to one file. No program needs to have the state open."""
    loaded = await load(state.name, storage_at(state.place))
    found = loaded.state
    thread = Worker(Threads("lab_state backup"))
    try:
        try:
            file = await thread.run(BackupFile, target, own_files(loaded.path))
        except UnsupportedError as error:
            if error.__cause__ is not None:  # an error of the system, such as a missing permission
                raise
            raise Stop(USAGE, str(error)) from error
        try:
            await file.write(_slices(found), thread)
            await thread.run(file.publish)
        finally:
            # After a cancellation, the thread may still write. It deletes the file after that.
            thread.submit(file.discard).result()
    finally:
        thread.shutdown()
    size = os.stat(target).st_size
    if json:
        output.one(revision=found.revision, keys=len(found.entries), bytes=size, path=target)
    else:
        keys = counted(len(found.entries), "key")
        output.line(f"{output.text(target)}: {keys}, {size_text(size)}, revision {found.revision}")


async def _slices(state: LoadedState) -> AsyncIterator[bytes]:
    for part in snapshot_of(state):
        yield part


async def copy(output: Output, source: Target, target: Target, *, json: bool) -> None:
    """Copy a state to another place, and compare the copy with it."""
    # In a bucket, opening the target deposes its writer. So the target is read first.
    if await _exists(target):
        raise Stop(CONFLICT, f"{target} exists: choose another target, or delete it first")
    progress = _Progress()
    try:
        keys = await copy_as(
            source.name, storage_at(source.place), target.name, storage_at(target.place, create=True), progress.tell
        )
    finally:
        progress.end()
    if json:
        output.one(keys=keys)
    else:
        output.line(f"{output.text(str(target))}: {counted(keys, 'key')}, read back and compared")


class _Progress:
    """A line on the terminal that shows the progress of a copy. Without a terminal, nothing is written."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()

    def tell(self, step: Literal["read", "written", "verified"], count: int) -> None:
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{step}: {size_text(count)}")
            sys.stderr.flush()

    def end(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")


async def _exists(target: Target) -> bool:
    """Return whether there is a state. On disk, a failed copy leaves only a lock file, which does not count as a state."""
    try:
        found = await storage_at(target.place).read(target.name)
    except UnsupportedError as error:
        if is_missing(error):
            return False
        raise
    return bool(target.place.bucket or found.snapshot is not None or found.records)
