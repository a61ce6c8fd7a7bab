"""The opening of a state that another writer may still hold: it is repeated until the lock is free or the time is up."""

from __future__ import annotations

import asyncio
import math

from lab_state._clock import Clock, Pauses, sleep
from lab_state._log import Log
from lab_state.config import Config
from lab_state.exceptions import LockedError
from lab_state.storage._protocol import Storage, StorageSession

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.5
_TOLD_EVERY = 10.0


async def opened(storage: Storage, config: Config, clock: Clock, logger: Log) -> StorageSession:
    """Open the state. While it is locked, try again for `Config.lock_timeout` seconds.

    If the caller is cancelled, the wait ends, and nothing stays open.

    Raises:
        LockedError: The time is up, and another writer still holds the state.
        StorageError: Any other error of `Storage.open`, at once.
    """
    seconds = config.lock_timeout
    pauses = Pauses(clock, _FIRST_PAUSE, _LONGEST_PAUSE)
    end = tell_at = -math.inf
    while True:
        try:
            return await storage.open(config.name)
        except LockedError as error:
            now = clock.monotonic()
            if not pauses.failures:  # the time counts from the first refusal
                end = math.inf if seconds is None else now + seconds
            if now >= end:
                raise
            if now >= tell_at:
                bound = "until the lock is free" if seconds is None else f"for {end - now:g} s more at most"
                logger.warning("%s: start() waits %s: %s", config.name, bound, error)
                tell_at = now + _TOLD_EVERY
        await sleep(clock, min(pauses.start(), end - now))


def check_asyncio() -> None:
    """Check that asyncio runs the caller.

    Raises:
        RuntimeError: Another event loop runs it, such as that of trio.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "lab_state needs asyncio: start it from asyncio.run(), or from anyio with that backend"
        ) from None
