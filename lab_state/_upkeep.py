"""`Upkeep`: the part of a flusher and of a shared copy that frees and merges large maps in steps."""

from __future__ import annotations

from typing import Any

from lab_state import _batch
from lab_state._durability import Durability
from lab_state._order import CHUNKS_AT_ONCE
from lab_state._state import State

_FREED_AT_ONCE = 1000
"""The largest number of entries that one turn of the event loop frees."""


class Upkeep(Durability):
    """A `Durability` that frees and merges the large maps of its state in steps."""

    def _free(self, large: dict[Any, Any], most: int = _FREED_AT_ONCE) -> None:
        """Free a map, `most` items in a step, because freeing a million values in one step would block the event loop."""
        if len(large) <= most:
            large.clear()
            return
        for _ in range(most):
            large.popitem()
        self.loop.call_soon(self._free, large, most)

    def _discard(self, state: State, *, entries: bool) -> None:
        """Free the index of a state that is no longer used, and, with `entries`, its map."""
        if state.index is not None:
            self._free(state.index.release(), CHUNKS_AT_ONCE)
            state.index = None
        if entries and isinstance(state.entries, dict):
            self._free(state.entries)

    def _fold_staged(self) -> None:
        """Merge a change of many keys into the map: one step now, and the others in later turns. Then call `_folded`."""
        try:
            more = self.shown.fold_staged(_batch.STEP)
        except BaseException:
            # The error may be a MemoryError. The event loop reports it. Try again in a second, because a checkpoint waits for the merge.
            self._clock.call_later(1.0, self._fold_staged)
            raise
        if more:
            self.loop.call_soon(self._fold_staged)
        else:
            self._folded()

    def _folded(self) -> None:
        """Do nothing. `Flusher` overrides this method."""
