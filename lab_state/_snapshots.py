"""Views of the state for a storage. A view is taken and encoded in slices. At the end, later writes are merged into it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from lab_state._codec import encode_snapshot
from lab_state._entries import Stored
from lab_state._state import State

_FOLDED_AT_ONCE = 1000
"""The smallest number of writes that are merged in one turn of the event loop."""


class SnapshotViews:
    """The views that one storage call takes of a state."""

    def __init__(
        self,
        state: State,
        durable: Callable[[int], Awaitable[None]] | None = None,
        *,
        given: Callable[[], object] = lambda: None,
        copy_loaded: bool = False,
    ) -> None:
        """Prepare. `take` and `freeze` take views.

        Args:
            state: The state.
            durable: A function that waits until a revision is durable. It is awaited before the
                last slice of each view is yielded, with the revision of the view.
            given: A callback. It is called for each slice.
            copy_loaded: Whether to replace loaded values by copies. A loaded value is a part of
                a large buffer, and keeps all of that buffer in memory. For a time, the buffer and
                the copies are in memory together. Only a checkpoint does this. During a commit
                the storage may have the whole snapshot in memory as well.
        """
        self._state = state
        self._copy_loaded = copy_loaded
        self._one_given = given
        self._durable = durable
        self._taken: list[dict[str, Stored]] = []

    def take(self) -> AsyncIterator[bytes]:
        """Take a view of the present state. Return its snapshot in slices."""
        view, state = self.freeze(), self._state
        copy_loaded = self._copy_loaded and state.borrowed
        slices = encode_snapshot(view, state.revision, state.now(), copy_loaded=copy_loaded, wall=state.wall())
        return self._given(slices, view, state.revision, copy_loaded=copy_loaded)

    def freeze(self) -> dict[str, Stored]:
        """Take a view of the present state, and return it."""
        view = self._state.freeze()
        self._taken.append(view)
        return view

    async def _given(
        self, slices: Iterator[bytes], view: dict[str, Stored], revision: int, *, copy_loaded: bool
    ) -> AsyncIterator[bytes]:
        last = b""
        for part in slices:
            if last:
                self._one_given()
                yield last
            await asyncio.sleep(0)
            last = part
        if copy_loaded:
            self._state.note_copied(view)
        if self._durable is not None:
            await self._durable(revision)
        self._one_given()
        yield last

    async def fold(self) -> None:
        """Merge into each view the writes that came after it. A second call does nothing."""
        while self._taken:
            view = self._taken.pop()
            try:
                while self._state.fold(view, _FOLDED_AT_ONCE):  # noqa: ASYNC110 -- writers go on meanwhile
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                self._state.fold(view, sys.maxsize)
                raise
            if not self._state.has_as_base(view):  # the view was a copy, or the state was cleared meanwhile
                self._state.release(view)
