"""The revisions that a block of code has written, for integrations with web frameworks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_WRITTEN: ContextVar[dict[str, int] | None] = ContextVar("lab_state writes", default=None)
"""The dict of the block in which the present task runs, or in which it was started."""


@contextmanager
def noting_writes() -> Generator[dict[str, int]]:
    """Note the writing calls to shared states that return in the block, or in a task that the block starts.

    Calls in a thread are noted if the thread uses a copy of the context of the block, as with `asyncio.to_thread`.

    The block gets a dict. For the name of each such state, the dict has a revision that includes these calls. A block inside
    the block has a separate dict.
    """
    written: dict[str, int] = {}
    before = _WRITTEN.get()
    _WRITTEN.set(written)
    try:
        yield written
    finally:
        # A token cannot be used: at the end of an event loop, the block may be left in another context.
        _WRITTEN.set(before)


def note_write(name: str, revision: int) -> None:
    """Note that a writing call of a shared state returns, if it runs in a block of `noting_writes`.

    Args:
        name: The name of the state.
        revision: The revision of the copy of this process, which includes the call. It never decreases.
    """
    written = _WRITTEN.get()
    if written is not None:
        written[name] = revision
