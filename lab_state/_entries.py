"""The types of stored values, and the changes of one commit."""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple, NewType, TypeAlias

from msgspec import Raw

Json = NewType("Json", bytes)
"""The bytes of exactly one JSON value in UTF-8.

Only code that has checked the bytes makes one. So values that are joined with commas are
as many members of an object as there are values.
"""

Value: TypeAlias = str | int | float | bool | Json | Raw | None
"""A JSON scalar, or the JSON of any other value.

The JSON is a `Json` if the value was set, and a `Raw` if it was loaded. A `Raw` is a view of
the loaded buffer. It is exactly one value as well, because the parser found its end.
"""

SCALARS = frozenset({str, int, float, bool, type(None)})
"""The classes of values that are stored as they are."""


class Expiring(NamedTuple):
    """A value with its expiry: the key does not exist from `at` on, in milliseconds since 1970."""

    value: Value
    at: int


class Absent(Enum):
    """The reasons why there is no value."""

    MISSING = "missing"
    DELETED = "deleted"
    EXPIRED = "expired"


MISSING: Literal[Absent.MISSING] = Absent.MISSING
DELETED: Literal[Absent.DELETED] = Absent.DELETED
EXPIRED: Literal[Absent.EXPIRED] = Absent.EXPIRED

Stored: TypeAlias = Value | Expiring
"""A value as it is stored."""

StoredOrGone: TypeAlias = Stored | Literal[Absent.DELETED, Absent.EXPIRED]
"""The effect of a change on one key: its new value, or the reason why there is none."""


class ChangeSet(NamedTuple):
    """The changes that one commit makes durable.

    Attributes:
        start: The first of them has the next revision after this one.
        end: The revision of the last of them.
        cleared: Whether all keys were deleted before `changes`.
        changes: The last effect on each key that changed.
        since: The time of the oldest change, in seconds of `State.monotonic`.
        time: `State.now` when they were taken, in milliseconds; 0 if no key expires.
        wall: The time of the wall clock then, in milliseconds since 1970; 0 if no key
            expires.
    """

    start: int
    end: int
    cleared: bool
    changes: dict[str, StoredOrGone]
    since: float
    time: int = 0
    wall: int = 0
