"""Who watches which keys, and what they have not been told yet.

Theory of operation. A change is noted, and what was noted in one turn of the event loop
is handed out in the next, so that a write costs the same however many watch. Each
watcher keeps the last change of each key that it was not told, and above a bound only
that there were many. Which watchers a key concerns is looked up by the key's beginnings,
not asked of each. What is durable is told from the commits, which say the same.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Self, TypeAlias

import msgspec

from lab_state._state import DELETED, EXPIRED, Changed, Changes, State
from lab_state.exceptions import LabStateError

MOST_PENDING = 10_000
_TOLD_AT_ONCE = 1_000

Kind: TypeAlias = Literal["set", "delete", "expire", "resync"]


Told: TypeAlias = tuple[str, tuple[Changed, int]]
"""A key; what became of it, and the revision."""


class Change(msgspec.Struct, frozen=True):
    """What became of a key.

    Attributes:
        key: The key, as the handle that is watched names it; empty for `resync`.
        kind: `set`, `delete`, `expire`; or `resync`: there were more changes than are
            kept for a reader, or more than 10,000 keys were deleted at once, so read again.
        revision: The revision that the state had reached. The change is in it.
    """

    key: str
    kind: Kind
    revision: int


def _kind(changed: Changed) -> Kind:
    if changed is DELETED:
        return "delete"
    return "expire" if changed is EXPIRED else "set"


class Watcher:
    """What one reader has not been told yet."""

    def __init__(self, prefix: str, cut: int, since: int, *, durable: bool) -> None:
        """`cut` characters of a key are not shown; changes up to revision `since` are not told."""
        self.prefix: str = prefix
        self.durable: bool = durable
        self.opened: int | None = None  # the revision of the state at that moment
        self._cut = cut
        self._since = since
        self._pending: OrderedDict[str, Change] = OrderedDict()
        self._resync: Change | None = None
        self._closed = False
        self._refusal: LabStateError | None = None
        self._waiting: asyncio.Future[None] | None = None

    def tell(self, key: str, kind: Kind, revision: int) -> None:
        """A key changed."""
        if revision <= self._since:
            return
        if self._resync is not None or (len(self._pending) >= MOST_PENDING and key not in self._pending):
            self.resync(revision)
            return
        self._pending[key] = Change(key[self._cut :], kind, revision)
        self._pending.move_to_end(key)
        self._wake()

    def resync(self, revision: int) -> None:
        """Everything may have changed."""
        if revision <= self._since:
            return
        self._pending.clear()
        self._resync = Change("", "resync", revision)
        self._wake()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._wake()

    def disown(
        self, refusal: LabStateError
    ) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Raise this error where the next change is asked for. Runs in a forked child."""
        self._pending.clear()
        self._resync, self._closed, self._refusal = None, True, refusal

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        """What the reader was not told yet, the oldest first."""
        if self._waiting is not None:
            raise RuntimeError("two tasks read one watch: open one for each")
        while self._resync is None and not self._pending:
            if self._refusal is not None:  # pragma: no cover -- likewise
                raise self._refusal
            if self._closed:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self._resync is not None:
            change, self._resync = self._resync, None
            return change
        return self._pending.popitem(last=False)[1]

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done() and not self._waiting.get_loop().is_closed():
            self._waiting.set_result(None)


class Group:
    """Watchers by their prefix, and prefixes by their length."""

    def __init__(self) -> None:
        self._by_length: dict[int, dict[str, dict[Watcher, None]]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_length)

    def __iter__(self) -> Iterator[Watcher]:
        for prefixes in self._by_length.values():
            for watchers in prefixes.values():
                yield from watchers

    def add(self, watcher: Watcher) -> None:
        prefixes = self._by_length.setdefault(len(watcher.prefix), {})
        prefixes.setdefault(watcher.prefix, {})[watcher] = None

    def remove(self, watcher: Watcher) -> None:
        prefixes = self._by_length[len(watcher.prefix)]
        watchers = prefixes[watcher.prefix]
        del watchers[watcher]
        if not watchers:
            del prefixes[watcher.prefix]
        if not prefixes:
            del self._by_length[len(watcher.prefix)]

    def tell(self, changes: Iterable[Told], most: float = math.inf) -> int:
        """Tell the watchers of each key, until that is about `most` steps; returns how many it was."""
        lengths = list(self._by_length.items())
        steps = 0
        for key, (changed, revision) in changes:
            for length, prefixes in lengths:
                if watchers := prefixes.get(key[:length]):
                    for watcher in watchers:
                        watcher.tell(key, _kind(changed), revision)
                    steps += len(watchers)
            steps += 1
            if steps >= most:
                break
        return steps

    def resync(self, revision: int) -> None:
        for watcher in self:
            watcher.resync(revision)


class Watchers:
    """The watchers of one state, from a start to a stop.

    Attributes:
        attended: Called when the first one begins to watch, and when the last one ends.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.attended: Callable[[bool], object] = bool
        self._live = Group()
        self._durable = Group()
        self._turn: dict[str, tuple[Changed, int]] = {}
        self._everything = 0  # the revision at which all was deleted in this turn
        self._queue: deque[tuple[Group, Iterator[Told] | int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._live) or bool(self._durable)

    def add(self, watcher: Watcher) -> None:
        """Tell this one from now on."""
        watcher.opened = self._state.revision
        is_first = not self
        (self._durable if watcher.durable else self._live).add(watcher)
        self._state.note = self.note
        if is_first:
            self.attended(True)

    def remove(self, watcher: Watcher) -> None:
        """Do not tell this one any more."""
        (self._durable if watcher.durable else self._live).remove(watcher)
        if not self:
            self._state.note = None
            self.attended(False)

    def note(self, key: str | None, changed: Changed, revision: int) -> None:
        """A key changed, or everything; it is handed out in the next turn of the loop."""
        turn = self._turn
        if not turn and not self._everything:
            asyncio.get_running_loop().call_soon(self._hand_out)
        if key is None:
            turn.clear()
            self._everything = revision
        else:
            if key in turn:  # they are told in the order of their revisions
                del turn[key]
            turn[key] = (changed, revision)

    def committed(self, taken: Changes) -> bool:
        """These changes are durable; returns whether they are looked at later."""
        if self._durable:
            if taken.cleared:
                self._queue.append((self._durable, taken.end))
            durable: Iterator[Told] = ((key, (changed, taken.end)) for key, changed in taken.changes.items())
            self._queue.append((self._durable, durable))
            self._tell()
        return bool(self._durable)

    def close(self) -> None:
        """The end: who reads is told the rest, and that it is over."""
        self._hand_out()
        while self._queue:
            self._step()
        for group in (self._live, self._durable):
            for watcher in group:
                watcher.close()

    def disown(
        self, refusal: LabStateError
    ) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Refuse those who watch. Runs in a forked child."""
        for group in (self._live, self._durable):
            for watcher in group:
                watcher.disown(refusal)

    def _hand_out(self) -> None:
        turn, self._turn = self._turn, {}
        everything, self._everything = self._everything, 0
        if everything:
            self._queue.append((self._live, everything))
        self._queue.append((self._live, iter(turn.items())))
        self._tell()

    def _tell(self) -> None:
        """Tell what is queued, as much in one turn of the loop as does not hold it up."""
        self._step()
        if self._queue:
            asyncio.get_running_loop().call_soon(self._tell)

    def _step(self) -> None:
        left = _TOLD_AT_ONCE
        while self._queue and left > 0:
            group, told = self._queue[0]
            if isinstance(told, int):
                group.resync(told)
                self._queue.popleft()
                continue
            steps = group.tell(told, left)
            if steps < left:
                self._queue.popleft()
            left -= steps
