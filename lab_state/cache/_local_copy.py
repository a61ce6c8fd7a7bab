"""The local copy of a mirror that a reader with `local=True` keeps in memory. Pure and synchronous.

The copy is loaded in these steps:

1. The reader subscribes. From then on, messages are kept.
2. It reads the head. This gives the first revision.
3. It reads all keys, in parts. Each part may have a different revision.
4. It reads the head again, and sends a ping on the subscription. When the ping is answered,
   all messages up to the second head have come.
5. It applies the kept messages after the first revision. They contain every key that changed
   since then. So the copy is exactly at the revision of the last message.

After that, each message must start at the revision of the copy. If a message does not, an earlier
message was lost. Then nothing is shown until the copy is loaded again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from weakref import ref

import msgspec

from lab_state._entries import Expiring, Json, Stored, Value
from lab_state._not_json import NOT_JSON
from lab_state._order import Chunk, Index
from lab_state._undo import UndoView, Views, open_ones
from lab_state.cache._format import Head, Message, parse_time
from lab_state.cache._source import Fetched

_MOST_KEPT = 100_000
_OBJECT_OR_ARRAY = (b"{", b"[")


class LocalCopy:
    """Keys and values of a mirror, in the form in which a manager stores them.

    Attributes:
        shown: The entries that may be read; empty while the copy is not fresh.
        fresh: Whether the copy is complete and up to date.
        head: The writer and the revision of the mirror that was copied; `None` before the first load.
        highest: The highest revision that a reader could read here.
        views: The views that `items()` reads, of this copy or of a read of the mirror.
    """

    def __init__(self) -> None:
        self.shown: dict[str, Stored] = {}
        self.fresh: bool = False
        self.head: Head | None = None
        self.highest: int = 0
        self.views: Views[Stored] = []
        self._entries: dict[str, Stored] = {}
        self._index: Index | None = None
        self._whole = False  # whether `_entries` has all keys at `head`; not during a load, or after an interrupted one
        self._kept: deque[Sequence[Message]] | None = None

    def invalidate(self) -> None:
        """Show nothing until the copy is loaded again, because changes may be missing."""
        self.fresh, self.shown, self._kept = False, {}, None

    def reset(self) -> None:
        """Forget the copy and its highest revision, because it was not a copy of the state."""
        self.invalidate()
        self.highest, self._whole = 0, False

    def receive(self, step: Sequence[Message]) -> bool:
        """Apply or keep the messages of one step. Return False if the copy must be loaded again."""
        if self.fresh:
            return self._apply(step)
        if self._kept is not None:
            self._kept.append(step)
            if len(self._kept) > _MOST_KEPT:
                self._kept = None
        return True

    # Loading

    def start_loading(self) -> None:
        """Keep all messages from now on."""
        self.invalidate()
        self._kept = deque()

    def set_head(self, head: Head) -> bool:
        """Store the first head of a load. Return False if the copy is already at this head, and need not be loaded."""
        if self._whole and head == self.head:
            return False
        self.head, self._whole = head, False
        self._replace()
        return True

    def add(self, found: Fetched) -> None:
        """Add a part of the mirror. The value of a key must come before its expiry time."""
        entries = self._entries
        for key, data in found.values.items():
            entries[key] = _stored(data)
        for key, at in found.expires.items():
            if key in entries:
                value = entries[key]
                entries[key] = Expiring(value.value if isinstance(value, Expiring) else value, parse_time(at))

    def replay(self, most: int) -> bool:
        """Apply about `most` keys of the kept messages, and return whether there are more.

        If a message does not start at the revision of the copy, stop there. Then
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
        """Return whether the copy may be read. If not, it must be loaded again.

        `last` is the second head. All messages up to it have come. If there was a fill meanwhile,
        even at the same revision, the parts that were read may not fit together.
        """
        kept, self._kept = self._kept, None
        if kept is None or self.head is None or any(step[-1].resync for step in kept):
            return False
        if not all(self._apply(step) for step in kept if step[-1].end > self.head.revision):
            return False
        if (last.writer, last.fill) != (self.head.writer, self.head.fill) or last.revision > self.head.revision:
            return False
        self.fresh, self.shown, self._whole = True, self._entries, True
        self.highest = max(self.highest, self.head.revision)
        return True

    def _apply(self, step: Sequence[Message]) -> bool:
        head, end = self.head, step[-1]
        assert head is not None  # a copy that is fresh, or being loaded, has a head
        if end.writer != head.writer or end.start > head.revision or end.end < head.revision:
            return False
        if end.resync:  # a fill, possibly at the same revision
            return False
        if end.end == head.revision:
            return True
        for message in step:
            self._change(message)
        self.head = Head(head.format, end.end, head.writer, head.fill)
        if self.fresh:
            self.highest = end.end
        return True

    def _change(self, message: Message) -> None:
        if message.clear:
            self._replace()
            if self.fresh:
                self.shown = self._entries
        entries = self._entries
        for view in open_ones(self.views):
            view.note(message.set)
            view.note(message.delete)
        self._note([key for key in message.set if key not in entries], message.delete)
        for key, raw in message.set.items():
            value = _stored(bytes(raw))
            entries[key] = Expiring(value, message.expires[key]) if key in message.expires else value
        for key in message.delete:
            entries.pop(key, None)

    # The order, and views

    @property
    def entries(self) -> dict[str, Stored]:
        """The entries, complete or not. An `UndoView` reads them."""
        return self._entries

    def view(self) -> UndoView[Stored]:
        """Open a view of the present entries."""
        return self.register(UndoView(self))

    def register(self, view: UndoView[Stored]) -> UndoView[Stored]:
        """Note a view, so that `close_views` closes it, and return it."""
        open_ones(self.views)
        self.views.append(ref(view))
        return view

    def close_views(self) -> None:
        """Close each view, because the reader is closed."""
        for view in open_ones(self.views):
            view.close()

    def index_steps(self) -> Iterator[None]:
        """Build the index of the keys, or bring it up to date, in steps of some milliseconds."""
        while self._ordered().is_building:
            self._ordered().build_some()
            yield
        for _ in range(self._ordered().batches):
            self._ordered().catch_up(self._entries)
            yield

    def pieces(self, low: str, high: str | None) -> list[Chunk]:
        """Return the keys of a range; see `State.pieces`."""
        return self._ordered().pieces(self._entries, low, high)

    def _ordered(self) -> Index:
        """Return the index. Make it if there is none, or if an error has stopped its last step."""
        if self._index is None or not self._index.is_whole:
            self._index = Index(self._entries, (), ())
        return self._index

    def _note(self, *changed: Sequence[str]) -> None:
        """Tell the index that keys are about to be added or removed. Drop the index if it is too old to be useful."""
        index = self._index
        if index is not None:
            index.forget_gone(self._entries)
            for keys in changed:
                index.note_many(keys)
            if index.is_too_old(self._entries):
                self._index = None

    def _replace(self) -> None:
        """Continue with an empty dict. The open views keep the old dict."""
        for view in open_ones(self.views):
            view.keep()
        self._entries, self._index = {}, None


def _stored(data: bytes) -> Value:
    """Return a value as a manager stores it: a scalar decoded, any other value as JSON. A read raises for invalid JSON."""
    if data[:1] in _OBJECT_OR_ARRAY:
        return Json(data)
    try:
        value: Value = msgspec.json.decode(data)
    except NOT_JSON:
        return Json(data)
    return value
