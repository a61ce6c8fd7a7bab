"""`restore_state`: restore a state as it was at an earlier moment, in place or as a new state."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import datetime
from typing import NamedTuple

from lab_state._argument_types import check_clock
from lab_state._clock import Clock, SystemClock
from lab_state._codec import LoadedState, encode_snapshot
from lab_state._expiry import resumed
from lab_state._loading import Decoded, load, view_of
from lab_state._log import Log
from lab_state._past import At, check_at, listing, load_at
from lab_state.config import Config
from lab_state.exceptions import CorruptionError
from lab_state.storage._history import History, Restoring, history_of
from lab_state.storage._protocol import SnapshotSource, Storage

_logger = Log(logging.getLogger("lab_state"))


class Restored(NamedTuple):
    """The result of `restore_state`.

    Attributes:
        revision: The revision of the restored state.
        before: The revision of the state before a restore in place. `restore_state(name, storage, before, into=name)` undoes the
            restore. `None` if that state had no files, or could not be loaded. After a restore into another name, it is `None` as well.
    """

    revision: int
    before: int | None


async def restore_state(
    name: str, storage: Storage, at: int | datetime, *, into: str, clock: Clock | None = None
) -> Restored:
    """Restore a state as it was at an earlier moment: in place, or as a new state.

    Keys that have expired since the moment are not restored. Other keys keep their expiry times. The restored moment is the
    last stored one that is not after `at`; see `read_state`.

    With another name as `into`, the call makes a new state there, with the revision of the moment. The state `name` is only read,
    and a manager may be running on it.

    With the same name as `into`, the call restores in place. Stop all managers of the state first. In S3, a manager that still runs
    in another process is fenced. The restored state becomes a new revision, above all others. So no revision is used for a second
    change, and mirrors and readers continue to work. The previous state stays in the history, even if the storage
    was made without `history=`. So `restore_state(name, storage, restored.before, into=name)` undoes the restore. A state that
    cannot be loaded can be restored as well. Its files or objects are kept in `<name>.damaged-<time>/` until a person deletes them.

    When the call returns, the restored state is durable. If the call raises an error or is cancelled, or if the process is killed,
    the state is the old one or the restored one, and not a mixture. `list_generations` then shows which one. A second call
    in place makes one more revision. With another name as `into`, it raises `ValueError` if the first call made the state.

    The state is in memory up to three times during the call. Decoding blocks the event loop, as in `start()`. So call this
    function in a script, or before a service starts.

    Args:
        name: The name of the state whose earlier moment is restored.
        storage: The storage that contains this state: a `FileStorage` or an `S3Storage`.
        at: The moment: a revision, or an aware `datetime`; see `read_state`.
        into: The name of the restored state: the same name, or a name that has neither a state nor a history.
        clock: A clock for tests. By default it is the clock of the machine.

    Returns:
        The revision of the restored state, and the revision before the restore.

    Raises:
        InvalidNameError: A name is not allowed; see `Config.name`.
        TypeError: A name is not a `str`, `at` is neither an `int` nor a `datetime`, `storage` is not a
            storage, or `clock` is not a clock.
        ValueError: `at` is a `datetime` without a time zone. Or `into` is another name, and there is a state or a history of it.
            Or the moment is outside of the history, in a hole of it, or in the future: then the message names the first and the last
            moment that can be read, or the moments before and after the hole. Nothing was changed.
        LockedError: A manager runs on the state that would be replaced. Stop it first, in all processes that share the state. In
            S3, only a manager of this process is noticed.
        CorruptionError: Each generation that has the moment is damaged. Nothing was changed: restore another moment.
        UnsupportedError: There is no such state, or a permission is missing, or a newer version of lab_state wrote the state. Or
            the storage is neither a `FileStorage` nor an `S3Storage`. Or the file system has no hard links for a restore in
            place: restore into another name.
        UnavailableError: The storage failed this time. See above for the state after that.
    """
    name, target = Config(name=name).name, Config(name=into).name
    moment = check_at(at)
    check_clock(clock)
    clock = SystemClock() if clock is None else clock
    history = history_of(storage)
    if name != target:
        return await _restore_new(name, storage, moment, history, target, clock)
    await listing(history, name)  # raises an error if there is no such state, before a lock file is created
    restoring = await history.restoring(name)
    try:
        return await _restore_in_place(name, storage, moment, history, restoring, clock)
    finally:
        await restoring.aclose()


async def _restore_new(  # noqa: PLR0917 -- all are needed, and each means something else
    name: str, storage: Storage, at: At, history: History, target: str, clock: Clock
) -> Restored:
    found = (await load_at(name, storage, at, clock.time())).state
    session = await history.open_new(target)
    try:
        await session.checkpoint(snapshot_source(found, found.revision, _time(found, clock), clock))
    finally:
        await session.aclose()
    return Restored(found.revision, None)


async def _restore_in_place(  # noqa: PLR0917 -- all are needed, and each means something else
    name: str, storage: Storage, at: At, history: History, restoring: Restoring, clock: Clock
) -> Restored:
    found = (await load_at(name, storage, at, clock.time())).state
    present: Decoded | None = None
    is_damaged = False
    try:
        present = await load(name, storage)
    except CorruptionError:
        is_damaged = True
    reached = [one.span.last.revision for one in (await history.generations(name)).found]
    revision = max(found.revision, await restoring.highest(), *reached) + 1
    time, before = _time(found, clock), None
    if present is not None and present.size:
        revision, before = max(revision, present.state.revision + 1), present.state.revision
        if present.state.time:
            time = _time(present.state, clock)  # the time of the restored state continues that of the present state
    kept = await restoring.put(snapshot_source(found, revision, time, clock), is_damaged=is_damaged)
    if kept is not None:
        _logger.warning("%s: the damaged files are kept in %s; delete them when they are no longer needed", name, kept)
    return Restored(revision, before)


def _time(state: LoadedState, clock: Clock) -> float:
    """Return the time of a state now, in seconds since 1970; see `_expiry.resumed`."""
    return resumed(state.time, state.wall, clock.time())[0]


def snapshot_source(state: LoadedState, revision: int, time: float, clock: Clock) -> SnapshotSource:
    """Return a source of the snapshot of a restored state. Keys that have expired by `time` are left out.

    The snapshot has no results of calls of other processes, because the restored state is another state.
    """
    now = int(time * 1000)
    view = {key: stored for key, stored in view_of(state).items() if state.expires.get(key, now + 1) > now}

    async def slices() -> AsyncIterator[bytes]:
        wall = int(clock.time() * 1000)
        for part in encode_snapshot(view, revision, now, copy_loaded=False, wall=wall, versions=state.versions):
            yield part
            await asyncio.sleep(0)

    return slices
