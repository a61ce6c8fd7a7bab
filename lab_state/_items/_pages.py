"""The keys of one moment in order, with their values, in pages of up to 200 keys. This module does no I/O."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, Final, NamedTuple, cast

from lab_state._entries import JSON_CLASSES, SCALARS, Expiring, Stored, Value
from lab_state._in_steps import Range
from lab_state._not_json import NOT_JSON
from lab_state._order import Chunk
from lab_state._types import decode_list
from lab_state._undo import UndoView
from lab_state.exceptions import TypeMismatchError

_KEYS_IN_STEP = 200
"""The largest number of keys in a page."""

_SECONDS_IN_STEP = 0.001
"""After this many seconds, a page whose values are decoded one by one gets no further value."""

_BYTES_IN_STEP = 32_768
"""Values with at most this many bytes in total are decoded in one call, which takes about a quarter of a millisecond."""

_FEW = 4
"""If `_together` finds fewer values than this, they are decoded one by one."""


SKIPPED: Final = object()
"""The result of `Decoding.value` for a value that is left out."""


class Decoding(NamedTuple):
    """The way to decode values.

    Attributes:
        type: The type that the caller asked for.
        value: A function that decodes the value of a key as this type. It may raise `TypeMismatchError`.
    """

    type: Any
    value: Callable[[str, Value], Any]

    def skipping(self) -> Decoding:
        """Return a `Decoding` like this one that leaves out values that are not of the type."""

        def value(key: str, stored: Value) -> Any:
            try:
                return self.value(key, stored)
            except TypeMismatchError:
                return SKIPPED

        return Decoding(self.type, value)


class Pages:
    """The keys of one moment in order, with their values, in pages.

    Attributes:
        view: The values. After the view was closed, no page may be read.
    """

    __slots__ = ("_at", "_cut", "_left", "_now", "_pieces", "_rest", "_reverse", "view")

    def __init__(self, view: UndoView[Stored], pieces: Sequence[Chunk], within: Range, now: float) -> None:
        """Begin the pages.

        Args:
            view: The values of the keys.
            pieces: The keys of the range, in ascending order; see `State.pieces`.
            within: The range.
            now: The time of the moment, in milliseconds since 1970. Keys that had expired by then are left out.
        """
        self.view: UndoView[Stored] = view
        self._pieces = list(pieces) if within.reverse else list(reversed(pieces))
        self._reverse = within.reverse
        self._at = 0
        self._rest: list[tuple[str, Stored]] = []
        self._cut = within.cut
        self._left = sys.maxsize if within.limit is None else within.limit
        self._now = now

    def next(self, decoding: Decoding) -> Iterator[tuple[str, Any]] | None:
        """Return an iterator over the next keys with their values. At the end, return `None`.

        The iterator reads the list `view.unread`. If that list is emptied, the iterator ends. The list is empty
        from the start if all keys of the page had expired, or were left out because of their types.

        Raises:
            TypeMismatchError: The next value is not of the requested type. The next call continues after this value.
        """
        if not self._rest:
            page = self._next_page(decoding)
            if page is None:
                return None
            names, values = page
            if values is not None:
                self.view.unread = values
                return zip(names, values, strict=False)  # `view.close` empties `values`, which ends the iterator
        self.view.unread = rows = self._one_by_one(decoding)
        return iter(rows)

    def add_to(self, found: dict[str, Any], decoding: Decoding) -> bool:
        """Add the next keys with their values to a dict. Return whether there may be more.

        Raises:
            TypeMismatchError: The next value is not of the requested type.
        """
        if not self._rest:
            page = self._next_page(decoding)
            if page is None:
                return False
            names, values = page
            if values is not None:
                found.update(zip(names, values, strict=True))
                return True
        found.update(self._one_by_one(decoding))
        return True

    def _next_page(self, decoding: Decoding) -> tuple[Sequence[str], list[Any] | None] | None:
        """Return the next keys and their decoded values. At the end, return `None`.

        If `_all_at_once` does not decode the values, put the keys and the stored values into `_rest`, and return `None`
        in place of the decoded values.
        """
        keys = self._next_keys()
        if not keys:
            return None
        stored = self.view.values(keys)
        names = [key[self._cut :] for key in keys] if self._cut else keys
        values = _all_at_once(stored, decoding.type)
        if values is None:
            self._rest = list(zip(names, stored, strict=True))
            self._rest.reverse()
        else:
            self._left -= len(names)
        return names, values

    def _next_keys(self) -> Chunk:
        """Return the next keys of the range, in order. At the end, return an empty tuple."""
        most = min(self._left, _KEYS_IN_STEP)
        if not self._pieces or not most:
            return ()
        piece, at = self._pieces[-1], self._at
        end = self._at = min(at + most, len(piece))
        if end == len(piece):
            self._at = 0
            self._pieces.pop()
        if self._reverse:
            return piece[len(piece) - end : len(piece) - at][::-1]
        return piece[at:end]

    def _one_by_one(self, decoding: Decoding) -> list[tuple[str, Any]]:
        """Decode values of `_rest` for about a millisecond, and return them with their keys. Leave out expired keys.

        Raise the error of a value only if no value was decoded before it. Otherwise the next call raises it.
        """
        if decoding.type is Any and (together := self._together()) is not None:
            return together
        rest, until = self._rest, perf_counter() + _SECONDS_IN_STEP
        rows: list[tuple[str, Any]] = []
        while rest and perf_counter() < until:
            key, stored = rest.pop()
            if isinstance(stored, Expiring):
                if stored.at <= self._now:
                    continue
                stored = stored.value
            try:
                value = decoding.value(key, stored)
            except Exception:
                if not rows:
                    raise
                rest.append((key, stored))  # the next call begins with this value, and raises the error
                break
            if value is not SKIPPED:
                rows.append((key, value))
        self._left -= len(rows)
        return rows

    def _together(self) -> list[tuple[str, Any]] | None:
        """Decode the first values of `_rest` in one call, and return them with their keys.

        Return `None` if these are fewer than `_FEW`, or if one of them is not JSON.
        """
        rest, size, count = self._rest, 0, 0
        for _, stored in reversed(rest):
            if stored.__class__ not in JSON_CLASSES or (size := size + len(cast("bytes", stored))) > _BYTES_IN_STEP:
                break
            count += 1
        if count < _FEW:
            return None
        keys, values = zip(*rest[: -count - 1 : -1], strict=True)
        if (decoded := _all_at_once(values, Any)) is None:  # one of them is not JSON
            return None
        del rest[-count:]
        self._left -= count
        return list(zip(keys, decoded, strict=True))


def _all_at_once(values: Sequence[Stored], type_: Any) -> list[Any] | None:
    """Return the decoded values in the common cases. Otherwise return `None`.

    In these cases there is no type and no expiry. The values are scalars, or at most `_BYTES_IN_STEP` bytes of JSON.
    """
    if type_ is not Any:
        return None
    kinds = set(map(type, values))
    if kinds <= SCALARS:
        return list(values)
    if not kinds <= JSON_CLASSES or sum(map(len, cast("Sequence[bytes]", values))) > _BYTES_IN_STEP:
        return None
    try:
        decoded = decode_list(b"[%b]" % b",".join(cast("Sequence[bytes]", values)))
    except NOT_JSON:  # the caller decodes the values one by one, which finds the bad one
        return None
    return decoded if len(decoded) == len(values) else None
