"""The base of `Reader`: the reads that its calls share.

A read takes the keys and values from the local copy if the copy is fresh, and otherwise from the cache. Data from the
cache are checked. A read fails if a part of the mirror is missing. It also fails if the revision of the mirror is lower
than a revision that this reader has read before, unless `RevisionGuard` accepts the lower revision.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, cast

from lab_state._argument_types import check_clock
from lab_state._arguments import OnMismatch, check_key, check_limit, check_on_mismatch, check_prefix
from lab_state._clock import Clock, SystemClock
from lab_state._entries import MISSING, Expiring, Json, Stored, Value
from lab_state._in_steps import Range
from lab_state._items import Decoding, Iterates, Steps
from lab_state._order import bounds
from lab_state._types import check_type, decode_value
from lab_state.cache._feed import Feed
from lab_state.cache._format import Head, parse_time
from lab_state.cache._local_copy import LocalCopy
from lab_state.cache._moment import Moment
from lab_state.cache._revision_guard import RevisionGuard
from lab_state.cache._source import Fetched, Source
from lab_state.exceptions import ClosedError, KeyNotFoundError, StorageError, TypeMismatchError, UnsupportedError


class MirrorAccess(Iterates):
    """The local copy of a reader, the source of its mirror, and the reads from both. `Reader` has the public calls."""

    def __init__(self, name: str, source: Source, *, local: bool, clock: Clock | None) -> None:
        check_clock(clock)
        self._name = name
        self._source = source
        self._is_local = local
        self._clock: Clock = SystemClock() if clock is None else clock
        self._local = LocalCopy()
        self._feed: Feed | None = None
        self._guard = RevisionGuard(name, source.path)
        self._readable = False  # whether the last read of the mirror succeeded
        self._is_parents = False

    def _refusal(self) -> UnsupportedError:  # pragma: no cover -- a child's coverage is not collected
        return UnsupportedError(
            f"the reader of {self._name!r} is open in the parent of this forked process: open another one here"
        )

    def _check_process(self) -> None:
        if self._is_parents:  # pragma: no cover -- a child's coverage is not collected
            raise self._refusal()

    @property
    def _open(self) -> Feed:
        self._check_process()
        if self._feed is None:
            raise ClosedError(f"the reader of {self._name!r} is not open: use it inside `async with`")
        return self._feed

    async def _some(self, keys: Sequence[str]) -> dict[str, Stored]:
        """Return the entries of the keys that are in the mirror. Some of them may have expired."""
        _ = self._open
        if self._local.fresh:
            entries = self._local.shown
            return {key: entries[key] for key in keys if key in entries}
        return await self._from_mirror(self._source.fetch(keys))

    def _steps(
        self, prefix: str, after: str | None, limit: int | None, type_: Any, on_mismatch: OnMismatch, *, reverse: bool
    ) -> Steps:
        is_skipping = check_on_mismatch(on_mismatch)
        if type_ is not Any:
            check_type(type_)

        def decode(key: str, value: Value) -> Any:
            return self._decoded(key, value, MISSING, type_)

        decoding = Decoding(type_, decode)
        moment = self._moment(prefix, after, limit, reverse=reverse)
        return Steps(moment, decoding.skipping() if is_skipping else decoding)

    def _moment(self, prefix: object, after: object, limit: object, *, reverse: bool) -> Moment:
        """Return the source for the keys and values of a range."""
        if limit is not None:
            check_limit(limit)
        low, high = bounds(check_prefix(prefix), None if after is None else check_key(after), reverse=reverse)
        chosen = Range(low, high, 0, cast("int | None", limit), reverse)
        return Moment(self._copy, self._all, self._clock.time, chosen)

    def _copy(self) -> LocalCopy:
        """Return the local copy, which may be empty. If the reader is not open, raise an error."""
        _ = self._open
        return self._local

    async def _all(self) -> dict[str, Stored]:
        """Read the whole mirror."""
        return await self._from_mirror(self._source.fetch_all())

    async def _from_mirror(self, fetching: Awaitable[Fetched]) -> dict[str, Stored]:
        """Return entries of the mirror. From now on, no read of the local copy returns a lower revision."""
        head, stored = await self._read(fetching)
        self._local.has_read(head.revision)
        return stored

    async def _head(self) -> Head:
        return (await self._read(self._source.fetch([])))[0]

    async def _read(self, fetching: Awaitable[Fetched]) -> tuple[Head, dict[str, Stored]]:
        """Read the mirror, check whether it may be shown, and note whether the read succeeded."""
        # The lowest acceptable revision is computed before the read, because other reads may return higher revisions meanwhile.
        floor = max(self._guard.seen, self._local.highest)
        try:
            found = await fetching
            head, stored = self._checked_head(found, floor), _stored(found)
        except StorageError:
            self._readable = False
            raise
        self._readable = True
        return head, stored

    def _checked_head(self, found: Fetched, floor: int) -> Head:
        """Return the head of a part of the mirror, if that part may be shown; see `RevisionGuard.accept`.

        If a revision below an earlier revision is accepted, later reads continue from the lower revision.
        """
        accepted = self._guard.accept(found, floor, self._lives, self._clock.monotonic())
        if accepted.went_back:
            # A lower revision is accepted only if the feed reports that the writer is running.
            assert self._feed is not None
            self._local.reset()
            self._feed.restart_from(accepted.head.revision)
        return accepted.head

    def _lives(self, writer: str, below: int) -> bool:
        return self._feed is not None and self._feed.lives(writer, below)

    def _alive(self, entries: dict[str, Stored]) -> dict[str, Value]:
        """Return the values of the entries that have not expired."""
        now = self._clock.time() * 1000
        alive: dict[str, Value] = {}
        for key, stored in entries.items():
            if not isinstance(stored, Expiring):
                alive[key] = stored
            elif stored.at > now:
                alive[key] = stored.value
        return alive

    def _missing(self, key: str, default: object) -> Any:
        if default is MISSING:
            raise KeyNotFoundError(key)
        return default

    def _decoded(self, key: str, stored: Stored, default: object, type_: Any) -> Any:
        if isinstance(stored, Expiring):
            if stored.at <= self._clock.time() * 1000:
                return self._missing(key, default)
            stored = stored.value
        try:
            return decode_value(stored, type_)
        except RecursionError:
            raise TypeMismatchError(f"key {key!r}: its nesting is too deep to decode") from None
        except TypeMismatchError as error:
            raise TypeMismatchError(f"key {key!r}: {error}", error.path) from None

    def _all_decoded(self, entries: dict[str, Stored], type_: Any, *, is_skipping: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in self._alive(entries).items():
            try:
                found[key] = self._decoded(key, value, MISSING, type_)
            except TypeMismatchError:
                if not is_skipping:
                    raise
        return found


def _stored(found: Fetched) -> dict[str, Stored]:
    expires = found.expires
    return {
        key: Expiring(Json(data), parse_time(expires[key])) if key in expires else Json(data)
        for key, data in found.values.items()  # invalid JSON raises an error when the value is decoded
    }
