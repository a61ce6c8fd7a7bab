"""`Status` and `MirrorStatus`: the health of a manager and of its mirror."""

from __future__ import annotations

import os
from typing import Literal, Protocol

import msgspec

from lab_state._flusher import Flusher
from lab_state._state import State
from lab_state.exceptions import LabStateError

Phase = Literal["new", "starting", "running", "stopping", "stopped"]
Role = Literal["owner", "follower"]


class MirrorStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The health of a mirror at one moment.

    Attributes:
        up: Whether the cache answers and the mirror is kept up to date. False while the
            manager does not run.
        revision: The revision of the mirror; `None` while it is not known.
        error: The error of the last attempt to send changes to the cache; `None` if that
            attempt succeeded. The manager tries again automatically.
    """

    up: bool = False
    revision: int | None = None
    error: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The health of a manager, and some figures, at one moment.

    In a shared state, only the owner commits and has files. In a follower, the figures of commits and
    of files are 0 or `None`.

    Attributes:
        phase: `new`, `starting`, `running`, `stopping` or `stopped`.
        keys: The number of keys; 0 before `start()` and after `stop()`, because the state is not in memory then.
        revision: The number of the last change.
        durable_revision: Every change up to this revision is durable.
        unflushed_keys: The number of keys with changes that are not durable. A key that was changed
            again during a commit counts twice. Deleting all keys in one call counts as one key.
        unflushed_age: The age of the oldest change that is not durable, in seconds; 0 if there is none.
        last_flush_at: The time of the last commit that succeeded, in seconds since 1970; `None` before
            the first commit. A flush makes one commit, or none if all changes are durable.
        last_flush_seconds: The duration of the last commit that succeeded, in seconds; `None` before
            the first commit.
        flushes: The number of commits that succeeded since the start.
        flush_failures: The number of commits and checkpoints that failed since the start.
        last_error: The error of the last commit or checkpoint; `None` if it succeeded. While commits fail, a
            checkpoint that succeeds does not remove their error.
        snapshot_bytes: The size of the snapshot, in bytes.
        journal_bytes: The size of the journal that follows the snapshot, in bytes.
        history_failures: The number of times since the start that older files or objects could not be added to the history. On
            disk, each failure leaves a hole. In S3, none does. The log has the reason. 0 without a history.
        history_generations: The number of generations in the history, without the one in use; `None` if the storage keeps no
            history. It is counted at the start and after each checkpoint.
        history_bytes: The number of bytes of these generations; `None` if the storage keeps no history.
        storage_warning: A fault of the storage that does not make any call fail, and the
            remedy for the operator; `None` if there is no such fault.
        fenced: Whether the manager has learned that a newer writer owns the state. Then nothing more
            becomes durable, and every write raises `FencedError`. End the process.
        task_failure: The task of the manager that ended before `stop()`, and the reason;
            `None` while all tasks run. In a follower of a shared state, it is the error because of which
            the process has lost its state. Without its flush task a manager refuses every
            write with `UnavailableError`; `stop()` still flushes. Without the task of the
            mirror, the manager no longer updates the mirror.
        mirror: The health of the mirror in the cache; `None` if the manager has no cache.
        role: `owner` or `follower`; `None` while the manager does not run. A state that is not
            shared has one process, its owner.
        owner_pid: The process id of the owner; `None` while there is none, or while the manager
            does not run.
        followers: The number of managers that follow this one, if it is the owner of a shared state;
            otherwise `None`.
        lag: The seconds since the last sign of life of the owner, or since the end of the owner. An owner sends
            a sign of life at least once a second. The state in memory may lack changes that became durable in
            this time. In the owner, the lag is 0.
    """

    phase: Phase
    keys: int
    revision: int
    durable_revision: int
    unflushed_keys: int = 0
    unflushed_age: float = 0.0
    last_flush_at: float | None = None
    last_flush_seconds: float | None = None
    flushes: int = 0
    flush_failures: int = 0
    last_error: str | None = None
    snapshot_bytes: int = 0
    journal_bytes: int = 0
    history_failures: int = 0
    history_generations: int | None = None
    history_bytes: int | None = None
    storage_warning: str | None = None
    fenced: bool = False
    task_failure: str | None = None
    mirror: MirrorStatus | None = None
    role: Role | None = None
    owner_pid: int | None = None
    followers: int | None = None
    lag: float = 0.0


class Mirror(Protocol):
    """The writer of a mirror, with the attributes that a status reads."""

    @property
    def up(self) -> bool: ...
    @property
    def revision(self) -> int | None: ...
    @property
    def last_error(self) -> object | None: ...
    @property
    def task_failure(self) -> str | None: ...


def status_of(phase: Phase, flusher: Flusher, mirror: Mirror | None) -> Status:
    """Return the status of a manager that was started, and owns its state."""
    shown, history = flusher.shown, flusher.history
    return Status(
        phase=phase,
        keys=shown.count(),
        revision=shown.revision,
        durable_revision=flusher.durable_revision,
        unflushed_keys=flusher.unflushed_keys,
        unflushed_age=flusher.unflushed_age,
        last_flush_at=flusher.last_flush_at,
        last_flush_seconds=flusher.last_flush_seconds,
        flushes=flusher.flushes,
        flush_failures=flusher.failures,
        last_error=_printable(flusher.last_error),
        snapshot_bytes=flusher.snapshot_bytes,
        journal_bytes=flusher.journal_bytes,
        history_failures=0 if history is None else history.failures,
        history_generations=None if history is None else history.generations,
        history_bytes=None if history is None else history.bytes,
        storage_warning=_printable(flusher.storage_warning),
        fenced=flusher.fenced,
        task_failure=_printable(flusher.task_failure or (None if mirror is None else mirror.task_failure)),
        mirror=None if mirror is None else _mirror_status(mirror),
        role="owner" if phase == "running" else None,
        owner_pid=os.getpid() if phase == "running" else None,
    )


def status_of_follower(phase: Phase, copy: State, failure: LabStateError | None, mirror: MirrorStatus | None) -> Status:
    """Return the status of a process that follows the owner of a shared state.

    Args:
        phase: The phase of the manager.
        copy: The copy of this process.
        failure: The error with which this process has lost its state; `None` if it has not.
        mirror: The status of the mirror, which the owner updates.
    """
    return Status(
        phase=phase,
        keys=copy.count(),
        revision=copy.revision,
        durable_revision=copy.revision,
        task_failure=_printable(failure),
        mirror=mirror,
    )


def _mirror_status(mirror: Mirror) -> MirrorStatus:
    return MirrorStatus(up=mirror.up, revision=mirror.revision, error=_printable(mirror.last_error))


def _printable(message: object | None) -> str | None:
    """Return a message as text that can be encoded as UTF-8. A path in it may have lone surrogates, which are escaped."""
    return None if message is None else str(message).encode(errors="backslashreplace").decode()
