"""What a reader with `local=True` has in memory. Pure and synchronous.

Theory of operation. Messages are kept from the moment of subscribing. Then the head is
noted, everything is read in steps, and the head is noted again. What was read may be of
any revision between the two; but the messages from the first head on say every key that
changed since, and lead to one revision exactly, at or above the second head. A ping on the subscription, after the
second head, makes sure that they are all there. From then
on each message leads to the next. One that does not begin where the copy is means that
something was lost, and then nothing is shown until it is loaded again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from lab_state._entries import Expiring, Json, Stored, Value
from lab_state._not_json import NOT_JSON
from lab_state.cache._format import Head, Message, parse_time
from lab_state.cache._source import Found

_MOST_KEPT = 100_000
_OBJECT_OR_ARRAY = (b"{", b"[")


class LocalCopy:
    """Keys and values, as a manager has them.

    Attributes:
        shown: What may be read; empty while it is not known to be all there is.
        fresh: Whether it is.
        head: Whose copy it is, and at which revision; `None` before the first load.
        highest: The highest revision that could be read here.
    """

    def __init__(self) -> None:
        self.shown: dict[str, Stored] = {}
        self.fresh: bool = False
        self.head: Head | None = None
        self.highest: int = 0
        self._entries: dict[str, Stored] = {}
        self._whole = False  # whether that is all there is at `head`; no load that broke off left it so
        self._kept: deque[Sequence[Message]] | None = None

    def lose(self) -> None:
        """Something may be missing."""
        self.fresh, self.shown, self._kept = False, {}, None

    def forget(self) -> None:
        """Count no revision as read, because the copy that was read here was not the state."""
        self.lose()
        self.highest, self._whole = 0, False

    def tell(self, step: Sequence[Message]) -> bool:
        """The messages of one step came; False if it does not fit, and the copy must be loaded."""
        if self.fresh:
            return self._apply(step)
        if self._kept is not None:
            self._kept.append(step)
            if len(self._kept) > _MOST_KEPT:
                self._kept = None
        return True

    # Loading

    def begin(self) -> None:
        """Keep what comes from now on."""
        self.lose()
        self._kept = deque()

    def read_from(self, head: Head) -> bool:
        """The first head; False if nothing need be read: the copy is at it already."""
        if self._whole and head == self.head:
            return False
        self.head, self._entries, self._whole = head, {}, False
        return True

    def add(self, found: Found) -> None:
        """A part of what is read: values first, then the times."""
        entries = self._entries
        for key, data in found.values.items():
            entries[key] = _stored(data)
        for key, at in found.expires.items():
            if key in entries:
                value = entries[key]
                entries[key] = Expiring(value.value if isinstance(value, Expiring) else value, parse_time(at))

    def replay(self, most: int) -> bool:
        """Apply about so many keys of the changes that came meanwhile, and return whether there are more.

        What does not fit ends the loading; `arrive` says so.
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

    def arrive(self, last: Head) -> bool:
        """After the second head, and every message up to it: whether the copy may be read; if not, begin anew.

        A fill meanwhile, even at the same revision, may mean that what was read was half of something.
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
        assert head is not None  # what is fresh has one
        if end.writer != head.writer or end.start > head.revision or end.end < head.revision:
            return False
        if end.resync:  # a fill, at this revision too
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
        entries = self._entries
        if message.clear:
            entries.clear()
        for key, raw in message.set.items():
            value = _stored(bytes(raw))
            entries[key] = Expiring(value, message.expires[key]) if key in message.expires else value
        for key in message.delete:
            entries.pop(key, None)


def _stored(data: bytes) -> Value:
    """JSON as a manager keeps it: a scalar as it is. Who reads what is not JSON is told."""
    if data[:1] in _OBJECT_OR_ARRAY:
        return Json(data)
    try:
        value: Value = msgspec.json.decode(data)
    except NOT_JSON:
        return Json(data)
    return value
