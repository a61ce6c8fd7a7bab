"""The open calls of a client, which have no answer yet. This module does no I/O.

Calls get their numbers in the order of `submit`. The calls with a number are in a *window*. A call waits for a number while
the window has no room for it: while its number would be more than `SPAN` above the acknowledgement, or while the calls in
the window have too many bytes. A call keeps its number when it is sent again. Each call, each sign of life and the farewell
have the acknowledgement. The acknowledgement is one less than the lowest number in the window, so it never covers a call
that may be sent again.

A call may have a check. The revision `since` of the check comes from the copy or from a refusal. A refusal
may show changes that are not durable, and that may be lost if the owner ends. So a check with the revision of a
refusal is valid only on the connection of the refusal. On a later connection `NEVER` is sent in place of
`since`. `NEVER` is also sent for each check that is sent again, unless the owner has answered `Moved`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Literal, TypeAlias, TypeVar

from lab_state.shared._clients import may_be_forgotten
from lab_state.shared._order import SPAN

C = TypeVar("C")

MOST_BYTES = 16 * 1024 * 1024
"""The largest total size of the calls in the window, in bytes. A larger call gets a number when the window is empty."""

NEVER = -1
"""The revision of a check that the owner refuses, unless the check has neither keys nor prefixes."""

Outcome: TypeAlias = Literal["not made", "unknown"]


class OpenCall(Generic[C]):
    """A call without an answer.

    Attributes:
        call: The object of the client for this call. This module does not use it.
        size: An upper bound of the size of the call, in bytes.
        number: The number of the call; 0 while the call waits for a number.
        since: The revision of the check; `None` without a check.
    """

    __slots__ = ("_from_refusal", "_may_be_made", "call", "number", "since", "size")

    def __init__(self, call: C, size: int, since: int | None, *, from_refusal: bool) -> None:
        self.call: C = call
        self.size: int = size
        self.number: int = 0
        self.since: int | None = since
        self._from_refusal = from_refusal
        self._may_be_made = False

    @property
    def outcome(self) -> Outcome:
        """The outcome that the call has if it ends now, without an answer."""
        return "unknown" if self._may_be_made else "not made"

    def sent(self) -> None:
        """Note that the call, or a part of it, may have been sent."""
        self._may_be_made = True

    def moved(self) -> None:
        """Note the answer `Moved`: the call was not executed. A check whose revision comes from the copy stays valid."""
        self._may_be_made = False

    def reconnect(self) -> None:
        """Prepare for a new connection. If the check is not valid on that connection, the owner will refuse it."""
        if self.since is not None and (self._may_be_made or self._from_refusal):
            self.since = NEVER


class OpenCalls(Generic[C]):
    """The open calls of one client, from its start to its stop.

    Attributes:
        heard: The time of an owner that the next hello contains, in nanoseconds; `None` if this client has heard nothing. It is
            set at the end of a connection, and at a `Starting`; see `Follower.starting`.
        connection: The number of the connection, from 1; 0 before the first welcome.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self.connection: int = 0
        self._last = 0
        self._open: dict[int, OpenCall[C]] = {}  # the window: the calls by number, in the order of the numbers
        self._waiting: deque[OpenCall[C]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        """Return the number of calls that have no answer, with or without a number."""
        return len(self._open) + len(self._waiting)

    @property
    def acknowledgement(self) -> int:
        """The highest number such that the client needs no answer to the call with this number, nor to any call before it."""
        return next(iter(self._open)) - 1 if self._open else self._last

    def submit(self, call: C, size: int, since: int | None = None, refused_on: int | None = None) -> OpenCall[C]:
        """Add a call. It waits for a number, which `number_next` gives.

        Args:
            call: The call.
            size: An upper bound of the size of the call, in bytes.
            since: The revision of the check; `None` without a check.
            refused_on: The number of the connection of the refusal, if the revision comes from a refusal; `None` if it
                comes from the copy.
        """
        if refused_on is not None and refused_on != self.connection:
            since = NEVER
        added = OpenCall(call, size, since, from_refusal=refused_on is not None)
        self._waiting.append(added)
        return added

    def number_next(self) -> list[OpenCall[C]]:
        """Give numbers to the calls for which the window has room, and return these calls, in order."""
        numbered: list[OpenCall[C]] = []
        while self._waiting and self._has_room(self._waiting[0].size):
            call = self._waiting.popleft()
            self._last += 1
            call.number = self._last
            self._open[call.number] = call
            self._bytes += call.size
            numbered.append(call)
        return numbered

    def _has_room(self, size: int) -> bool:
        if not self._open:
            return True
        return self._last + 1 - self.acknowledgement <= SPAN and self._bytes + size <= MOST_BYTES

    def find(self, number: int) -> OpenCall[C] | None:
        """Return the open call with this number; `None` if there is none."""
        return self._open.get(number)

    def end(self, call: OpenCall[C]) -> bool:
        """Remove a call that was answered or given up, even if it still waits for a number.

        From now on, its number counts as answered. Return False if the call had been removed before.
        """
        if call.number == 0:
            if call in self._waiting:
                self._waiting.remove(call)
                return True
            return False
        if self._open.get(call.number) is not call:
            return False
        del self._open[call.number]
        self._bytes -= call.size
        return True

    def reconnect(self) -> list[OpenCall[C]]:
        """Return the calls in the window, to send them again.

        Call this after a welcome that admits the client, and when this process becomes the owner.
        """
        self.connection += 1
        for call in self.everything():
            call.reconnect()
        return list(self._open.values())

    def restart(self) -> list[OpenCall[C]]:
        """Begin with number 1 again, because the owner has forgotten the client. The caller takes a new id.

        Remove the calls with an unknown outcome, and return them. All other calls were certainly not made. They
        wait for numbers again.
        """
        calls = list(self.everything())
        self._open, self._last, self._bytes, self.heard = {}, 0, 0, None
        self._waiting = deque(call for call in calls if call.outcome == "not made")
        for call in self._waiting:
            call.number = 0
            call.reconnect()
        return [call for call in calls if call.outcome == "unknown"]

    def is_forgotten(self, now: int) -> bool:
        """Return whether an owner may have forgotten this client at the time `now`. A new owner needs this for its own calls."""
        return may_be_forgotten(self.heard, now)

    def everything(self) -> Iterator[OpenCall[C]]:
        """Yield the calls that have no answer, in order."""
        yield from self._open.values()
        yield from self._waiting
