"""A manager that is forgotten while it runs: where it was started, and what it held goes back."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import weakref
from typing import Any, NamedTuple

from lab_state.storage._protocol import StorageSession

_LONGEST_CLOSE = 10.0


class _Started(NamedTuple):
    name: str
    storage: str
    where: str


_started: weakref.WeakKeyDictionary[Any, _Started] = weakref.WeakKeyDictionary()
"""What runs in this process: by the flusher, which lives as long as its event loop, or its manager, does."""


def caller() -> str:
    """Return the line of the application that awaits this."""
    frame = sys._getframe(1)  # noqa: SLF001 -- as `inspect` does, which is slow to import
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "lab_state"


def note(flusher: object, session: StorageSession, name: str, storage: str, where: str) -> weakref.finalize[Any, Any]:
    """Note that a state was started; the session is closed when everything else of it is collected.

    Returns:
        What `detach` is called on when the session is closed otherwise.
    """
    _started[flusher] = _Started(name, storage, where)
    closing = weakref.finalize(flusher, _close, session)
    closing.atexit = False
    return closing


def started_here(name: str, storage: str) -> str:
    """Say where a state of this process was started, for the message that it is locked; empty if it was not."""
    for started in list(_started.values()):
        if (started.name, started.storage) == (name, storage):
            return f"; the first one was started at {started.where}"
    return ""


def _close(session: StorageSession) -> None:
    """Let go of the lock and the files. The collector may run this anywhere: another thread does it."""
    with contextlib.suppress(RuntimeError):  # the interpreter ends, and lets go of all
        threading.Thread(target=_run_close, args=(session,), name="lab_state forgotten", daemon=True).start()


def _run_close(session: StorageSession) -> None:
    async def close() -> None:
        await asyncio.wait_for(session.aclose(), _LONGEST_CLOSE)

    with contextlib.suppress(Exception):  # it was told that it was forgotten; nothing more can be done here
        asyncio.run(close())
