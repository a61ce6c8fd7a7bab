"""Views of the state for a storage or a cache. When a view is no longer used, the later writes are merged into it."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from lab_state._codec import encode_snapshot
from lab_state._entries import Stored
from lab_state._state import State

_FOLDED_AT_ONCE = 1000
"""The number of writes that are merged in one turn of the event loop. If new writes come faster, more are merged."""

_GIVEN_AT_ONCE = 128 * 1024
"""Slices are joined until they have this many bytes, because each call of a storage takes time on the event loop."""

LATE = 0.002
"""A slice waits for the next commit until this many seconds after the beginning of the last commit."""


class Pace:
    """The schedule of the slices of a checkpoint or a backup, while commits go on.

    Encoding a slice keeps the interpreter busy. The event loop and the threads of the storage share the interpreter.
    So encoding delays a commit that runs or starts at this time. The delay is smallest right after a commit was
    passed to its thread. So one slice is encoded after the beginning of each commit. When `late` seconds
    have passed since the last commit began, slices are encoded without waiting.
    """

    def __init__(self, late: float = LATE) -> None:
        """Begin without a commit. `late` is in seconds; see `Pace`."""
        self._late = late
        self._until = -math.inf
        self._is_free = False
        self._waiting: asyncio.Future[None] | None = None

    def commit_begins(self) -> None:
        """Let the next slice be encoded, because a commit is about to be passed to its thread."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + self._late
        self._is_free = True
        if self._waiting is not None:
            loop.call_soon(self._wake)

    async def turn(self) -> None:
        """Wait until a slice may be encoded. Only one task may wait."""
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        if loop.time() < self._until and not self._is_free:
            self._waiting = loop.create_future()
            timer = loop.call_at(self._until, self._wake)
            try:
                await self._waiting
            finally:
                self._waiting = None
                timer.cancel()
        self._is_free = False

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class SnapshotViews:
    """The views that one storage call takes of a state."""

    def __init__(
        self,
        state: State,
        durable: Callable[[int], Awaitable[None]] | None = None,
        *,
        given: Callable[[], object] = lambda: None,
        pace: Pace | None = None,
        copy_loaded: bool = False,
        has_results: bool = True,
        is_followed: bool = False,
    ) -> None:
        """Prepare. No view is taken yet.

        Args:
            state: The state.
            durable: A function that waits until a revision is durable. It is awaited with the revision
                of each view, before the last slice of the view is yielded.
            given: A callback. It is called for each encoded slice, and once more before the last slice is yielded.
            pace: The schedule of the slices of a checkpoint. Without it, only one turn of the event loop
                passes between two slices. A commit that writes a snapshot passes no schedule, because
                it must not wait for the next commit.
            copy_loaded: Whether to replace loaded values by copies. A loaded value is a part of
                a large buffer, and keeps all of that buffer in memory. For a time, the buffer and
                the copies are in memory together. Only a checkpoint asks for copies, because during
                a commit the storage may have the whole snapshot in memory as well.
            has_results: Whether the snapshots have the results of calls of other processes. A backup has none,
                because no process has sent a call to the state that is restored from it.
            is_followed: Whether the snapshots get the followed mark, because the manager continues to run.
        """
        self._state = state
        self._copy_loaded = copy_loaded
        self._has_results = has_results
        self._is_followed = is_followed
        self._one_given = given
        self._pace = pace
        self._durable = durable
        self._taken: list[dict[str, Stored]] = []

    def take(self) -> AsyncIterator[bytes]:
        """Take a view of the present state, and return an iterator over the slices of its snapshot."""
        view, state = self.freeze(), self._state
        copy_loaded = self._copy_loaded and state.borrowed
        calls = state.results.snapshot() if state.results is not None and self._has_results else None
        slices = encode_snapshot(
            view,
            state.revision,
            state.now(),
            copy_loaded=copy_loaded,
            wall=state.wall(),
            versions=state.versions,
            calls=calls,
            is_followed=self._is_followed,
        )
        return self._given(slices, view, state.revision, copy_loaded=copy_loaded)

    def freeze(self) -> dict[str, Stored]:
        """Take a view of the present state, and return it."""
        view = self._state.freeze()
        self._taken.append(view)
        return view

    async def _given(
        self, slices: Iterator[bytes], view: dict[str, Stored], revision: int, *, copy_loaded: bool
    ) -> AsyncIterator[bytes]:
        held: list[bytes] = []
        size = 0
        for part in slices:
            self._one_given()
            if size >= _GIVEN_AT_ONCE:
                yield b"".join(held)
                held, size = [], 0
            held.append(part)
            size += len(part)
            await (asyncio.sleep(0) if self._pace is None else self._pace.turn())
        if copy_loaded:
            self._state.note_copied(view)
        if self._durable is not None:
            await self._durable(revision)
        self._one_given()
        yield b"".join(held)

    async def fold(self) -> None:
        """Merge into each view the writes that came after it, in steps. A second call does nothing.

        If the caller is cancelled, the rest of the writes is merged in one step.
        """
        while self._taken:
            view = self._taken.pop()
            try:
                while self._state.fold(view, _FOLDED_AT_ONCE):  # noqa: ASYNC110 -- writers go on meanwhile
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                self._state.fold(view, sys.maxsize)
                raise
            # If the view was a copy, or the state was cleared meanwhile, no other code frees the view.
            if not self._state.has_as_base(view):
                self._state.release(view)
