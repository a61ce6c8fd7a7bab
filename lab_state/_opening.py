"""The start of a manager: the wait for a state that another writer holds, and the loading of that state."""

from __future__ import annotations

import asyncio
import math

from lab_state._clock import Clock, Pauses, sleep
from lab_state._codec import LoadedState, decode_snapshot, replay
from lab_state._expiry import resumed
from lab_state._log import Log
from lab_state._state import State
from lab_state.config import Config
from lab_state.exceptions import LockedError
from lab_state.storage._protocol import Recovery, Storage, StorageSession

_FIRST_PAUSE = 0.05  # this and the next two values are in seconds
_LONGEST_PAUSE = 0.5
_TOLD_EVERY = 10.0


async def opened(storage: Storage, config: Config, clock: Clock, logger: Log) -> StorageSession:
    """Open the state. While it is locked, try again for `Config.lock_timeout` seconds from the first refusal.

    Log the wait at once, and then about every 10 s. If the caller is cancelled, the wait ends, and nothing stays open.

    Raises:
        LockedError: Another writer still holds the state after `lock_timeout`.
        StorageError: `Storage.open` raised another error. There is no further attempt.
    """
    seconds = config.lock_timeout
    pauses = Pauses(clock, _FIRST_PAUSE, _LONGEST_PAUSE)
    end = tell_at = -math.inf
    while True:
        try:
            return await storage.open(config.name)
        except LockedError as error:
            now = clock.monotonic()
            if not pauses.failures:  # `lock_timeout` begins at the first refusal
                end = math.inf if seconds is None else now + seconds
            if now >= end:
                raise
            if now >= tell_at:
                bound = "until the lock is free" if seconds is None else f"for at most {end - now:g} s more"
                logger.warning("%s: start() waits %s: %s", config.name, bound, error)
                tell_at = now + _TOLD_EVERY
        await sleep(clock, min(pauses.start(), end - now))


def loaded(session: StorageSession, name: str, clock: Clock, logger: Log, began: float) -> State:
    """Return the state that the storage recovered. Log one line about the load, and a warning for each fault.

    Args:
        session: The session of the storage.
        name: The name of the state, for the log.
        clock: The clock of the manager.
        logger: The logger for the line, and for warnings.
        began: The time when the start began, in seconds of `clock.monotonic`.

    Raises:
        CorruptionError: The stored state is damaged, or has a key or a value that lab_state cannot keep.
        UnsupportedError: A newer version of lab_state wrote the state.
    """
    snapshot, records, _, _, crc = session.recovery
    warn_of_torn_tail(session, logger)
    found = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, session.path, crc)
    state = state_of(replay(found, records, session.path), session.path, clock, logger)
    tell_loaded(session.recovery, session.path, name, state, logger, clock.monotonic() - began)
    return state


def state_of(found: LoadedState, path: str, clock: Clock, logger: Log) -> State:
    """Return a `State` with the content of a decoded state. Its clock runs from now on."""
    state = State(clock.monotonic, time_of(found, path, clock, logger), clock.time)
    state.load(found.entries, found.revision, found.expires)
    state.results, state.versions, state.written_at = found.results, found.versions, found.wall
    return state


def warn_of_torn_tail(session: StorageSession, logger: Log) -> None:
    """Log a warning if the end of the journal was not a whole record."""
    if dropped := session.recovery.dropped_bytes:
        logger.warning(
            "%s: the last %d bytes of its journal are not a whole record, as after a crash during a write; they were dropped",
            session.path,
            dropped,
        )


def tell_loaded(  # noqa: PLR0917 -- all are needed, and each means something else
    recovery: Recovery, path: str, name: str, state: State, logger: Log, seconds: float
) -> None:
    """Log that the state was loaded, how long this took, and whether the last writer ended cleanly."""
    snapshot, records, unsettled, dropped, _ = recovery
    if records or dropped or unsettled:
        end = f"after an unclean end (records replayed: {len(records)})"
    else:
        end = "a new state" if snapshot is None else "after a clean end"
    logger.info(
        "%s: loaded revision %d (keys: %d) from %s in %.3f s: %s",
        name,
        state.revision,
        len(state.entries),
        path,
        seconds,
        end,
    )


def time_of(found: LoadedState, path: str, clock: Clock, logger: Log) -> float:
    """Return the time of the state now, in seconds since 1970. If the wall clock is behind, log a warning."""
    wall = clock.time()
    if not found.expires:
        return wall
    # Continue the recorded time of the state. The wall clock may have been wrong at the write, or may be wrong now.
    time, behind = resumed(found.time, found.wall, wall)
    if behind:
        logger.warning(
            "%s: the wall clock is %.0f s behind the time of the last write; keys expire that much later", path, behind
        )
    return time


def check_asyncio() -> None:
    """Check that asyncio runs the caller.

    Raises:
        RuntimeError: Another event loop runs the caller, such as the loop of trio.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "lab_state needs asyncio: start it from asyncio.run(), or from anyio with its asyncio backend"
        ) from None
