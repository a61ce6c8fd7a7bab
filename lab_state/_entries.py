"""What a map holds: stored values, and the changes of one commit."""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple, NewType, TypeAlias

from msgspec import Raw

Json = NewType("Json", bytes)
"""The bytes of exactly one JSON value in UTF-8.

Only code that checked the bytes makes one. So values put side by side are members of an
object, never more members than values.
"""

Value: TypeAlias = str | int | float | bool | Json | Raw | None
"""A JSON scalar, or the JSON of anything else.

That is a `Json` where it was set, and a `Raw` where it was loaded: a view of the buffer,
of one value too, since the parser found where it ends.
"""


class Expiring(NamedTuple):
    """A value that is gone from `at` on, in milliseconds since 1970."""

    value: Value
    at: int


class Absent(Enum):
    """The ways of not being there."""

    MISSING = "missing"
    DELETED = "deleted"
    EXPIRED = "expired"


MISSING: Literal[Absent.MISSING] = Absent.MISSING
DELETED: Literal[Absent.DELETED] = Absent.DELETED
EXPIRED: Literal[Absent.EXPIRED] = Absent.EXPIRED

Stored: TypeAlias = Value | Expiring
"""A value as it is kept."""

StoredOrGone: TypeAlias = Stored | Literal[Absent.DELETED, Absent.EXPIRED]
"""What became of a key."""


class ChangeSet(NamedTuple):
    """What one commit makes durable: everything above revision `start` up to `end`.

    `since` is when the oldest of it was made, in seconds of `monotonic`; `time` and
    `wall` are when it was taken, in milliseconds of `State.now` and of the wall clock; 0
    where nothing expires.
    """

    start: int
    end: int
    cleared: bool
    changes: dict[str, StoredOrGone]
    since: float
    time: int = 0
    wall: int = 0
