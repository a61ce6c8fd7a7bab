"""The changes that records show, or that two moments of a state show. This module does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from msgspec import Raw

from lab_state._codec import LoadedState, Record
from lab_state._entries import Stored
from lab_state.cli._storages import raw_of
from lab_state.cli._text import time_text

_SHOWN = 80
"""The largest number of characters of a value in a line for people."""


class Change(NamedTuple):
    """A change of one key, or of all keys.

    Attributes:
        kind: `set`, `delete`, or `clear` for the deletion of all keys. A key that expired has `delete`.
        key: The key; empty for `clear`.
        value: The JSON of the new value; `None` unless the kind is `set`.
        expires: The expiry, in milliseconds since 1970; `None` if the value has no expiry.
        revision: The revision of the state with the change. Changes of one commit have the same revision.
        wall: The time of the commit on the wall clock of the writer, in milliseconds since 1970; 0 if it is not known.
    """

    kind: Literal["set", "delete", "clear"]
    key: str
    value: bytes | None
    expires: int | None
    revision: int
    wall: int

    def members(self) -> dict[str, Any]:
        """Return the members of the JSON of this change."""
        members: dict[str, Any] = {"revision": self.revision, "wall": self.wall or None, "kind": self.kind}
        if self.kind != "clear":
            members["key"] = self.key
        if self.value is not None:
            members |= {"value": Raw(self.value), "expires": self.expires}
        return members


def of_record(record: Record, prefix: str = "") -> Iterator[Change]:
    """Yield the changes of a record to the keys with a prefix. A `clear` is yielded first, for any prefix."""
    revision, wall = record.end, record.wall
    if record.clear:
        yield Change("clear", "", None, None, revision, wall)
    for key, value in record.set.items():
        if key.startswith(prefix):
            yield Change("set", key, raw_of(value), record.expires.get(key), revision, wall)
    for key in record.delete:
        if key.startswith(prefix):
            yield Change("delete", key, None, None, revision, wall)


def between(before: LoadedState, after: LoadedState, prefix: str = "") -> Iterator[Change]:
    """Yield the changes that lead from one moment of a state to another one. All of them have the revision of the second moment."""
    revision, wall = after.revision, after.wall
    for key, stored in after.entries.items():
        if key.startswith(prefix) and _differs(before, after, key, stored):
            yield Change("set", key, raw_of(stored), after.expires.get(key), revision, wall)
    for key in before.entries:
        if key.startswith(prefix) and key not in after.entries:
            yield Change("delete", key, None, None, revision, wall)


def _differs(before: LoadedState, after: LoadedState, key: str, stored: Stored) -> bool:
    if key not in before.entries or before.expires.get(key) != after.expires.get(key):
        return True
    return raw_of(before.entries[key]) != raw_of(stored)


def newer(records: Iterable[Record], revision: int) -> list[Record] | None:
    """Return the records after a revision; `None` if there is no such record, or if changes before the first of them are missing."""
    found = [record for record in records if record.end > revision]
    return found if found and found[0].start <= revision else None


def text_of(change: Change, shown: Callable[[str], str], shown_json: Callable[[bytes], str]) -> str:
    """Return a change as a line for people. `shown` escapes a key, and `shown_json` a value."""
    words = [time_text(change.wall) or "-", f"r{change.revision}", change.kind]
    if change.kind != "clear":
        words.append(shown(change.key))
    if change.value is not None:
        text = shown_json(change.value)
        words.append(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
    if change.expires is not None:
        words.append(f"(expires {time_text(change.expires)})")
    return "  ".join(words)
