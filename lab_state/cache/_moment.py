"""The keys and values of a mirror at one moment, for `items`, `keys` and `get_all` of a reader."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

from lab_state._entries import Stored
from lab_state._in_steps import Range
from lab_state._items import Pages
from lab_state._order import in_range
from lab_state._undo import UndoView
from lab_state.cache._local_copy import LocalCopy
from lab_state.exceptions import ClosedError


class Moment:
    """A source of keys and values. It uses the local copy if the copy is fresh. Otherwise it reads the whole mirror once."""

    def __init__(
        self,
        local: Callable[[], LocalCopy],
        fetch: Callable[[], Awaitable[dict[str, Stored]]],
        now: Callable[[], float],
        within: Range,
    ) -> None:
        """Prepare to read the keys of a range.

        Args:
            local: A function that returns the local copy of the reader. It raises an error if the reader is not
                open.
            fetch: A function that reads the whole mirror.
            now: A function that returns the time, in seconds since 1970.
            within: The range of the keys.
        """
        self._local = local
        self._fetch = fetch
        self._now = now
        self._within = within

    async def begin(self) -> Pages:
        """Take the keys and a view; see `ItemSource.begin`."""
        copy, within = self._local(), self._within
        if copy.fresh:
            for _ in copy.index_steps():
                await asyncio.sleep(0)
                if not self._local().fresh:
                    break
        copy = self._local()
        if copy.fresh:
            pieces, view = copy.pieces(within.low, within.high), copy.view()
        else:
            found = await self._fetch()
            copy = self._local()
            pieces = [tuple(sorted(in_range(found, within.low, within.high)))] if found else []
            view = copy.register(UndoView(None, found))
        return Pages(view, pieces, within, self._now() * 1000)

    def end(self, view: UndoView[Stored]) -> None:
        """Close a view; see `ItemSource.end`."""
        view.close()

    def refuse(self) -> NoReturn:
        """Raise the error for a view that was closed; see `ItemSource.refuse`."""
        self._local()  # raises an error if the reader is not open
        raise ClosedError("the reader was closed since the first step of this iterator: call items() again")
