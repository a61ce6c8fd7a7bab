"""The local copy of a mirror that a reader with `local=True` keeps in memory. This module does no I/O.

The reader has subscribed to the changes. It loads the copy in these steps:

1. It begins to keep the messages that arrive.
2. It reads the head of the mirror. If the copy already has all keys at this first head, step 3 is left out.
3. It reads all keys, in parts. Each part may have a different revision.
4. It reads the head again, and sends a ping on the subscription. When the ping is answered,
   all messages up to the second head have arrived.
5. It applies the kept messages after the revision of the first head. These messages contain every key
   that has changed since then. So the copy is exactly at the revision of the last message.

After that, no message may start above the revision of the copy. If a message does, an earlier
message was lost. Then the copy is not read until it is loaded again.

While the copy is loaded, reads go to the mirror, and may return a revision whose message has not
arrived yet. The copy is not read until it has this revision. So no read returns an older revision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import cast
from weakref import ref

from lab_state._entries import Expiring, Stored, StoredOrGone
from lab_state._following import apply_step, changes_of, stored_of
from lab_state._order import Chunk
from lab_state._state import State
from lab_state._undo import UndoView, open_ones
from lab_state.cache._format import Head, Message, parse_time
from lab_state.cache._source import Fetched

_MOST_KEPT = 100_000


class LocalCopy:
    """Keys and values of a mirror, in the form in which a manager stores them.

    Attributes:
        shown: The entries that may be read; empty while the copy is not fresh.
        loaded: Whether the copy is complete, and each message is applied to it.
        fresh: Whether the copy may be read: it is loaded, and has the revision of each read of the mirror that has ended.
        head: The head of the mirror, at the revision of the copy; `None` before the first load.
        highest: The highest revision that a read of this copy may have returned.
    """

    def __init__(self) -> None:
        self.shown: dict[str, Stored] = {}
        self.loaded: bool = False
        self.fresh: bool = False
        self.head: Head | None = None
        self.highest: int = 0
        self._floor = 0  # the highest revision that a read of the mirror has returned
        # The index of expiries of this state is not complete. A reader compares the entries with the wall clock instead.
        self._state = State()
        self._whole = False  # whether `entries` has all keys at `head`; a load that reads all keys sets it to False until it succeeds
        self._kept: deque[Sequence[Message]] | None = None

    def invalidate(self) -> None:
        """Return no entries to reads until the copy is loaded again, because changes may be missing."""
        self.loaded, self.fresh, self.shown, self._kept = False, False, {}, None

    def reset(self) -> None:
        """Forget the copy and its highest revision, because a lower revision was accepted."""
        self.invalidate()
        self.highest, self._floor, self._whole = 0, 0, False

    def receive(self, step: Sequence[Message]) -> bool:
        """Apply the messages of one step. During a load, only keep them. Return False if the copy must be loaded again."""
        if self.loaded:
            return self._apply(step)
        if self._kept is not None:
            self._kept.append(step)
            if len(self._kept) > _MOST_KEPT:
                self._kept = None
        return True

    def has_read(self, revision: int) -> None:
        """Note that a read of the mirror has returned a revision. If the copy has a lower one, it is not read until it has caught up."""
        self._floor = max(self._floor, revision)
        if self.loaded:
            self._show()

    # Loading

    def start_loading(self) -> None:
        """Begin to load the copy: from now on, keep all messages for `replay`."""
        self.invalidate()
        self._kept = deque()

    def set_head(self, head: Head) -> bool:
        """Store the first head of a load. Return False if the copy is already at this head, and need not be loaded."""
        if self._whole and head == self.head:
            return False
        self.head, self._whole = head, False
        self._update({}, cleared=True)
        return True

    def add(self, found: Fetched) -> None:
        """Add a part of the mirror. The value of a key must come before its expiry time, or in the same part."""
        entries = self.entries
        self._state.note_many(found.values)
        for key, data in found.values.items():
            entries[key] = stored_of(data)
        for key, at in found.expires.items():
            if key in entries:
                value = entries[key]
                entries[key] = Expiring(value.value if isinstance(value, Expiring) else value, parse_time(at))

    def replay(self, most: int) -> bool:
        """Apply about `most` keys of the kept messages. Return whether kept messages are left.

        If an earlier message was lost, or if a message is a resync, stop there. Then
        `finish_loading` returns False.
        """
        kept, head = self._kept, self.head
        while kept and head is not None and most > 0:
            step = kept.popleft()
            if step[-1].resync or (step[-1].end > head.revision and not self._apply(step)):
                self._kept = None
                return False
            head = self.head
            most -= 1 + sum(len(message.set) + len(message.delete) for message in step)
        return bool(kept) and head is not None

    def finish_loading(self, last: Head) -> bool:
        """Apply the kept messages that are left. Return True if the copy is loaded, or False if it must be loaded again.

        `last` is the second head. All messages up to this head have arrived. If there was a fill during the load,
        even at the same revision, the parts that were read may be from different states.
        """
        kept, self._kept = self._kept, None
        if kept is None or self.head is None or any(step[-1].resync for step in kept):
            return False
        if not all(self._apply(step) for step in kept if step[-1].end > self.head.revision):
            return False
        if (last.writer, last.fill) != (self.head.writer, self.head.fill) or last.revision > self.head.revision:
            return False
        self.loaded = self._whole = True
        self._show()
        return True

    def _apply(self, step: Sequence[Message]) -> bool:
        head, end = self.head, step[-1]
        assert head is not None  # a copy that is loaded, or being loaded, has a head
        if end.writer != head.writer or end.start > head.revision or end.end < head.revision:
            return False
        if end.resync:  # there was a fill, possibly at the same revision
            return False
        if end.end == head.revision:
            return True
        for message in step:
            self._update(changes_of(message.set, message.expires, message.delete), cleared=message.clear)
        self.head = Head(head.format, end.end, head.writer, head.fill)
        if self.loaded:
            self._show()
        return True

    def _show(self) -> None:
        """Let reads use the loaded copy, unless a read of the mirror has returned a higher revision."""
        assert self.head is not None  # a loaded copy has a head
        self.fresh = self.head.revision >= self._floor
        self.shown = self.entries if self.fresh else {}
        if self.fresh:
            self.highest = max(self.highest, self.head.revision)

    def _update(self, changes: Mapping[str, StoredOrGone], *, cleared: bool = False) -> None:
        apply_step(self._state, changes, self._state.revision + 1, cleared=cleared)

    # The order, and views

    @property
    def entries(self) -> dict[str, Stored]:
        """The entries, complete or not."""
        return cast("dict[str, Stored]", self._state.entries)  # `apply_step` adds no layer

    def view(self) -> UndoView[Stored]:
        """Open a view of the present entries."""
        return self._state.view()

    def register(self, view: UndoView[Stored]) -> UndoView[Stored]:
        """Register a view of entries that were read from the mirror, and return the view. `close_views` closes it."""
        open_ones(self._state.views)
        self._state.views.append(ref(view))
        return view

    def close_views(self) -> None:
        """Close each view, because the reader is closed."""
        self._state.close_views()

    def index_steps(self) -> Generator[None]:
        """Build the index of the keys, or bring it up to date, in steps of some milliseconds."""
        return self._state.index_steps()

    def pieces(self, low: str, high: str | None) -> list[Chunk]:
        """Return the keys of a range; see `State.pieces`."""
        return self._state.pieces(low, high)
