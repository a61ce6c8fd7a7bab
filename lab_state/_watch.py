"""The watches of one state, and the changes that they have not received yet.

A watcher is one open watch. A write only notes its change. So the cost of a write does not depend
on the number of watchers. In the next turn of the event loop, the watchers receive the noted
changes. If there are many, the rest follows in later turns. Each watcher keeps the last pending
change of each key. With more than `MOST_PENDING` keys, it keeps one `resync` instead. To find the
watchers of a key, one lookup is made for each different length of a watched prefix. A watcher of
durable changes receives a change only after the commit that contains it.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Self, TypeAlias

import msgspec

from lab_state._entries import DELETED, EXPIRED, ChangeSet, StoredOrGone
from lab_state._state import State
from lab_state.exceptions import LabStateError

MOST_PENDING = 10_000
"""The largest number of keys whose changes wait in one watcher."""

_TOLD_AT_ONCE = 1_000
"""Reports stop after about this many steps, and continue in the next turn of the event loop; see `Group.tell`."""

Kind: TypeAlias = Literal["set", "delete", "expire", "resync"]


Told: TypeAlias = tuple[str, tuple[StoredOrGone, int]]
"""A key and its change. The change is a pair. Its first item is the new value, or `DELETED`, or `EXPIRED`. Its second item is the revision to report.

A reader of a mirror passes `None` in place of the new value, because only the kind of the change is used.
"""


class Change(msgspec.Struct, frozen=True):
    """A change of a key, as a watch reports it.

    Attributes:
        key: The key, without the prefix of the handle that is watched; empty for `resync`.
        kind: `set`, `delete`, `expire` or `resync`. After a `resync`, read the state again; see
            `Manager.watch`.
        revision: The revision of the change, or a later revision that includes it. A watch of
            durable changes reports the last revision of the commit.
    """

    key: str
    kind: Kind
    revision: int


def _kind(changed: StoredOrGone) -> Kind:
    if changed is DELETED:
        return "delete"
    return "expire" if changed is EXPIRED else "set"


class Watcher:
    """An open watch. It is an asynchronous iterator over its pending changes."""

    def __init__(self, prefix: str, cut: int, since: int, *, durable: bool) -> None:
        """Create a watch without pending changes.

        Args:
            prefix: The beginning of the keys; an empty text selects all keys.
            cut: The number of characters to remove from the beginning of each key.
            since: A revision. Changes up to this revision are not reported.
            durable: Whether to report changes only when they are durable.
        """
        self.prefix: str = prefix
        self.durable: bool = durable
        self.opened: int | None = None  # the revision of the state when the watch was opened
        self._cut = cut
        self._since = since
        self._pending: OrderedDict[str, Change] = OrderedDict()
        self._resync: Change | None = None
        self._closed = False
        self._refusal: LabStateError | None = None
        self._waiting: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        """Return the prefix, and the number of keys with pending changes. If a `resync` is pending or the watch is closed, the text says so instead of the number."""
        what = "closed" if self._closed else "a resync" if self._resync is not None else f"{len(self._pending)} keys"
        durable = ", durable" if self.durable else ""
        return f"<watch of {self.prefix!r}{durable}, pending: {what}>"

    def tell(self, key: str, kind: Kind, revision: int) -> None:
        """Add the change of a key, in place of an earlier pending change of this key. Ignore a revision up to `since`.

        If a `resync` is pending, or if too many keys have pending changes, add a `resync` instead.
        """
        if revision <= self._since:
            return
        if self._resync is not None or (len(self._pending) >= MOST_PENDING and key not in self._pending):
            self.resync(revision)
            return
        self._pending[key] = Change(key[self._cut :], kind, revision)
        self._pending.move_to_end(key)
        self._wake()

    def resync(self, revision: int) -> None:
        """Replace all pending changes by one `resync`, because any key may have changed. Ignore a revision up to `since`."""
        if revision <= self._since:
            return
        self._pending.clear()
        self._resync = Change("", "resync", revision)
        self._wake()

    def close(self) -> None:
        """End the iteration after the pending changes."""
        self._closed = True
        self._wake()

    def disown(
        self, refusal: LabStateError
    ) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Let each `__anext__` raise `refusal` from now on. This runs in a forked child."""
        self._pending.clear()
        self._resync, self._closed, self._refusal = None, True, refusal

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        """Return the oldest pending change. If there is none, wait for one. If there is none and the watch is closed, end the iteration.

        Raises:
            RuntimeError: Another task waits for a change of this watch.
            LabStateError: This process is a forked child; see `disown`.
        """
        if self._waiting is not None:
            raise RuntimeError("two tasks read one watch: open a watch for each task")
        while self._resync is None and not self._pending:
            if self._refusal is not None:  # pragma: no cover -- as for `disown`
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
    """An index of watchers: by the length of their prefix, then by the prefix."""

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
        """Give each change to the watchers of its key. Stop after about `most` steps, and return the number of steps.

        Each change counts as one step. Each watcher that gets the change counts as one more step.
        """
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
        attended: A callback. It gets True when a first watch is added, and False when the last watch is removed.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.attended: Callable[[bool], object] = bool
        self._live = Group()
        self._durable = Group()
        self._turn: dict[str, tuple[StoredOrGone, int]] = {}  # the noted changes: the last one of each key
        self._everything = 0  # the revision of a noted change of all keys; 0 if there is none
        self._queue: deque[tuple[Group, Iterator[Told] | int]] = deque()  # an int is the revision of a `resync`

    def __bool__(self) -> bool:
        return bool(self._live) or bool(self._durable)

    def add(self, watcher: Watcher) -> None:
        """Report changes to this watcher from now on."""
        watcher.opened = self._state.revision
        is_first = not self
        (self._durable if watcher.durable else self._live).add(watcher)
        self._state.on_change, self._state.on_changes = self.note, self.note_many
        if is_first:
            self.attended(True)

    def remove(self, watcher: Watcher) -> None:
        """Report no further changes to this watcher."""
        (self._durable if watcher.durable else self._live).remove(watcher)
        if not self:
            self._state.on_change = self._state.on_changes = None
            self.attended(False)

    def note(self, key: str | None, changed: StoredOrGone, revision: int) -> None:
        """Note that a key was changed, or that all keys may have changed (`key` is `None`).

        The reports to the watchers begin in the next turn of the event loop.
        """
        turn = self._turn
        if not turn and not self._everything:
            asyncio.get_running_loop().call_soon(self._hand_out)
        if key is None:
            turn.clear()
            self._everything = revision
        else:
            if key in turn:  # watchers receive changes in the order of their revisions
                del turn[key]
            turn[key] = (changed, revision)

    def note_many(self, keys: Sequence[str], changed: Sequence[StoredOrGone], revision: int) -> None:
        """Note the changes of many keys. The watchers get them in steps, from the next turn of the event loop on."""
        self._queue_turn()
        told: Iterator[Told] = ((key, (to, revision)) for key, to in zip(keys, changed, strict=True))
        self._queue.append((self._live, told))
        asyncio.get_running_loop().call_soon(self._tell)

    def committed(self, taken: ChangeSet) -> bool:
        """Queue the changes of a commit for the watchers of durable changes, and begin to report them.

        Return whether there are such watchers. If so, the queue may still refer to `taken` after the call.
        """
        if self._durable:
            if taken.cleared:
                self._queue.append((self._durable, taken.end))
            durable: Iterator[Told] = ((key, (changed, taken.end)) for key, changed in taken.changes.items())
            self._queue.append((self._durable, durable))
            self._tell()
        return bool(self._durable)

    def close(self) -> None:
        """Report the remaining changes to all watchers, and end their iteration."""
        self._hand_out()
        while self._queue:
            self._step()
        for group in (self._live, self._durable):
            for watcher in group:
                watcher.close()

    def disown(
        self, refusal: LabStateError
    ) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Let each iteration over a watcher raise `refusal`. This runs in a forked child."""
        for group in (self._live, self._durable):
            for watcher in group:
                watcher.disown(refusal)

    def _hand_out(self) -> None:
        """Queue the noted changes, and begin to report them."""
        self._queue_turn()
        self._tell()

    def _queue_turn(self) -> None:
        """Move the noted changes to the queue."""
        turn, self._turn = self._turn, {}
        everything, self._everything = self._everything, 0
        if everything:
            self._queue.append((self._live, everything))
        self._queue.append((self._live, iter(turn.items())))

    def _tell(self) -> None:
        """Report queued changes to the watchers, until about `_TOLD_AT_ONCE` steps are made. Report the rest in later turns of the event loop."""
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
