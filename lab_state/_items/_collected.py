"""The values of many keys of one moment, collected in steps."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from lab_state._in_steps import Range, ReadingCore, pause
from lab_state._items._pages import Decoding, Pages
from lab_state._order import Chunk

_SECONDS_IN_STEP = 0.002  # after this time, a step begins no further page


async def collected(core: ReadingCore, pieces: Sequence[Chunk], within: Range, decoding: Decoding) -> dict[str, Any]:
    """Return the keys of a range with their values, as they are at the call.

    Args:
        core: The core of the state.
        pieces: The keys of the range: the result of `State.pieces`, called just before.
        within: The range.
        decoding: The way to decode the values.

    Raises:
        TypeMismatchError: One of the values is not of the requested type.
        LabStateError: The manager was stopped meanwhile.
    """
    state = core.state
    view, found = state.view(), dict[str, Any]()
    try:
        pages, until = Pages(view, pieces, within, state.now()), perf_counter() + _SECONDS_IN_STEP
        while pages.add_to(found, decoding):
            if perf_counter() > until and state.has_steps:
                await pause(core)
                until = perf_counter() + _SECONDS_IN_STEP
    finally:
        state.close_view(view)
    return found
