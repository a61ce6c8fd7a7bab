"""The places where running managers were started, and the close of a session whose manager was garbage-collected."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from lab_state.storage._protocol import Storage, StorageSession

_LONGEST_CLOSE = 10.0
"""The longest time that closing a session may take, in seconds. The thread gives up after that."""


class _Started(NamedTuple):
    name: str
    storage: Callable[[], object]  # a weak reference: the storage may refer to the manager, and would keep it in memory
    place: object
    where: str


_started: weakref.WeakKeyDictionary[Any, _Started] = weakref.WeakKeyDictionary()
"""The states that were started in this process, by flusher. A flusher may still exist after `stop()`."""


def caller() -> str:
    """Return the place in the application that has called lab_state: file, line and function."""
    frame = sys._getframe(1)  # noqa: SLF001 -- `inspect` does the same, but is slow to import
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "lab_state"


def note(
    flusher: object, session: StorageSession, name: str, storage: Storage, where: str
) -> weakref.finalize[Any, Any]:
    """Note that a state was started. Its session is closed when the flusher is collected. `where` comes from `caller`.

    Returns:
        A finalizer. Its `detach` must be called when the session is closed in the normal way.
    """
    try:
        reference: Callable[[], object] = weakref.ref(storage)
    except TypeError:  # the class of the storage has slots
        reference = _none
    _started[flusher] = _Started(name, reference, getattr(session, "place", None), where)
    closing = weakref.finalize(flusher, _close, session)
    closing.atexit = False
    return closing


def forget(flusher: object) -> None:
    """Note that a state was stopped. A second call does nothing."""
    _started.pop(flusher, None)


def started_here(name: str, storage: Storage, place: object) -> str:
    """Return the place where this process started a state, as the end of a message. If it is not known, return an empty text.

    A state is recognised by its name, together with its storage object or its place, if the storage has one. The `repr`
    of a storage is not compared, because two storages with the same `repr` may have different places. For example, a
    relative directory depends on the current directory.

    Args:
        name: The name of the state.
        storage: The storage object that refused the second start.
        place: The place in the `LockedError` of that storage; `None` if it has none.
    """
    for started in list(_started.values()):
        if started.name == name and (started.storage() is storage or (place is not None and started.place == place)):
            return f"; the first one was started at {started.where}"
    return ""


def _none() -> None:
    """Return `None`, in place of a weak reference to a storage."""


def _close(session: StorageSession) -> None:
    """Close a session in another thread, because the garbage collector may run this at any point of any thread."""
    with contextlib.suppress(RuntimeError):  # at the end of the interpreter no thread can start, and none is needed
        threading.Thread(target=_run_close, args=(session,), name="lab_state forgotten", daemon=True).start()


def _run_close(session: StorageSession) -> None:
    async def close() -> None:
        await asyncio.wait_for(session.aclose(), _LONGEST_CLOSE)

    with contextlib.suppress(Exception):  # a `ResourceWarning` was shown, and no caller can get the error
        asyncio.run(close())
