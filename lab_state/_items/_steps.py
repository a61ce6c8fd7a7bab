"""The steps of an iterator, and the source of its keys and values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

from lab_state._entries import Stored
from lab_state._in_steps import Range, ReadingCore, bring_up_to_date
from lab_state._items._pages import Decoding, Pages
from lab_state._undo import UndoView
from lab_state.exceptions import ClosedError


class ItemSource(Protocol):
    """The part of an iterator that finds the keys and the values."""

    async def begin(self) -> Pages:
        """Take the keys and a view of the values, both of one moment.

        Raises:
            LabStateError: The object whose `items` was called, such as a manager, cannot be read now.
        """
        ...

    def end(self, view: UndoView[Stored]) -> None:
        """Close a view."""
        ...

    def refuse(self) -> NoReturn:
        """Raise the error for a step after other code has closed the view. The values can no longer be read."""
        ...


class Steps:
    """The steps of one iterator, which `Items` and `PlainItems` take. A step decodes the next page.

    Attributes:
        rows: An iterator over the keys and values that the caller has not taken yet. It ends when the view is closed.
        is_over: Whether the iterator is closed.
    """

    __slots__ = ("_decoding", "_is_busy", "_pages", "_source", "is_over", "rows")

    def __init__(self, source: ItemSource, decoding: Decoding) -> None:
        """Prepare the first step."""
        self.rows: Iterator[tuple[str, Any]] = iter(())
        self.is_over: bool = False
        self._source = source
        self._decoding = decoding
        self._pages: Pages | None = None
        self._is_busy = False

    def __repr__(self) -> str:
        return "closed" if self.is_over else "new" if self._pages is None else "open"

    @property
    def has_view(self) -> bool:
        """Whether there is a view to read, or to close."""
        return self._pages is not None and not self._pages.view.is_closed

    async def step(self, *, pause: bool) -> bool:
        """Take one step: decode the next page into `rows`. Return whether there are values. At the end, close the iterator.

        Args:
            pause: Whether to let the event loop run before this step, unless it is the first, and after each
                page without values.

        Raises:
            RuntimeError: Another task waits for a step.
            TypeMismatchError: The next value cannot be decoded as the requested type. The next step continues after this value.
            LabStateError: The values can no longer be read; see `ItemSource`.
        """
        if self._is_busy:
            raise RuntimeError("another task waits for a step of this iterator: only one may do so at a time")
        self._is_busy = True
        try:
            if self._pages is None and not self.is_over:
                await self._begin()
            elif self._may_go_on() and pause:
                await asyncio.sleep(0)
            # A page is empty if all its keys had expired, or were left out because of their types.
            while self._may_go_on() and not self._load():
                if pause:
                    await asyncio.sleep(0)
        finally:
            self._is_busy = False
        return not self.is_over

    async def _begin(self) -> None:
        """Take the keys and the view."""
        pages = await self._source.begin()
        if self.is_over:  # `close` was called meanwhile
            self._source.end(pages.view)
        else:
            self._pages = pages

    def _may_go_on(self) -> bool:
        """Return whether the iterator is not closed. Raise an error if other code has closed its view."""
        if not self.is_over and not self.has_view:
            self._source.refuse()
        return not self.is_over

    def _load(self) -> bool:
        """Decode the next page into `rows`, and return whether it has values. At the end, close the iterator."""
        assert self._pages is not None  # the iterator has begun
        rows = self._pages.next(self._decoding)
        if rows is None:
            self.close()
            return False
        self.rows = rows
        return bool(self._pages.view.unread)

    def close(self) -> None:
        """Drop the values, and close the view. A second call does nothing."""
        if self._pages is not None:
            self._source.end(self._pages.view)
        self.is_over = True
        self.rows = iter(())


class NamedCore(ReadingCore, Protocol):
    """A core that has the name of its state."""

    @property
    def name(self) -> str:
        """The name of the state."""
        ...


class StateSource:
    """The `ItemSource` of a state."""

    def __init__(self, core: NamedCore, within: Range, prefix: str) -> None:
        """Prepare an iterator over the keys of a range. Each key begins with `prefix`."""
        self._core = core
        self._state = core.state
        self._within = within
        self._prefix = prefix

    async def begin(self) -> Pages:
        """Take the keys and a view; see `ItemSource.begin`."""
        self._core.check_open()
        self._state = state = self._core.state
        if state.is_index_behind:
            await bring_up_to_date(self._core)
        state.note_listing(self._prefix)
        pieces = state.pieces(self._within.low, self._within.high)
        return Pages(state.view(), pieces, self._within, state.now())

    def end(self, view: UndoView[Stored]) -> None:
        """Close a view; see `ItemSource.end`."""
        self._state.close_view(view)

    def refuse(self) -> NoReturn:
        """Raise an error, because the manager was stopped; see `ItemSource.refuse`."""
        self._core.check_open()
        raise ClosedError(
            f"the manager of {self._core.name!r} was stopped since the first step of this iterator: call items() again"
        )
