"""Reads of many keys in steps. The event loop runs between two steps. All keys of a result are of one moment."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import NamedTuple, Protocol

from lab_state._order import Chunk, in_range
from lab_state._state import State

MANY = 1_000
"""If the range of a call has fewer keys than this, or the limit of the call is lower, the keys are read in one step.

The event loop may run before that step, while the index is brought up to date.
"""

_PIECES_IN_STEP = 16
"""The number of pieces whose keys one step reads: usually about 4,000 keys, in about a millisecond.

A piece has fewer than 512 keys. There is one exception: if writers have just added or removed keys in the range, all keys
of the range may be one piece.
"""


class ReadingCore(Protocol):
    """The part of a `CallCore` that the functions of this module use."""

    @property
    def state(self) -> State:
        """The state. `start()` and `stop()` of the manager replace it."""
        ...

    def check_open(self) -> None:
        """Raise a `LabStateError` unless calls are allowed."""
        ...


class Range(NamedTuple):
    """A range of keys, and the form in which a call returns them.

    Attributes:
        low: No key is below this. `_order.bounds` makes both bounds.
        high: Each key is below this, unless it is `None`.
        cut: The length of the prefix that is removed from each key.
        limit: The largest number of keys; `None` means all.
        reverse: Whether to begin with the highest key.
    """

    low: str
    high: str | None
    cut: int
    limit: int | None
    reverse: bool


async def bring_up_to_date(core: ReadingCore) -> None:
    """Build the index of the state, or bring it up to date. If the caller is cancelled, the next call continues the work.

    Raises:
        LabStateError: The manager was stopped meanwhile.
    """
    for _ in core.state.index_steps():
        await pause(core)


def take_pieces(state: State, within: Range) -> list[Chunk] | None:
    """Return the pieces of a range. Return `None` if one step is enough, or if calls on this state must not await."""
    if within.limit is not None and within.limit < MANY:
        return None
    if not state.has_steps:
        return None
    pieces = state.pieces(within.low, within.high)
    if sum(map(len, pieces)) < MANY:
        return None
    return pieces


async def keys_in_steps(core: ReadingCore, pieces: list[Chunk], within: Range) -> list[str]:
    """Return the keys of a range as they are at the call.

    Args:
        core: The core of the state.
        pieces: The result of `take_pieces`, called just before.
        within: The range.

    Raises:
        LabStateError: The manager was stopped meanwhile.
    """
    state, (low, high, cut, limit, reverse) = core.state, within
    due = set(in_range(state.expiries.due_keys(state.now()), low, high)) if state.expires else ()
    if reverse:
        pieces.reverse()
    found: list[str] = []
    for at in range(0, len(pieces), _PIECES_IN_STEP):
        some = pieces[at : at + _PIECES_IN_STEP]
        names = chain.from_iterable(map(reversed, some) if reverse else some)
        found += [name[cut:] for name in names if name not in due] if cut or due else names
        if limit is not None and len(found) >= limit:
            break
        await pause(core)
    return found[:limit] if limit is not None else found


async def pause(core: ReadingCore) -> None:
    """Let the event loop run.

    Raises:
        LabStateError: The manager was stopped meanwhile.
    """
    await asyncio.sleep(0)
    core.check_open()
