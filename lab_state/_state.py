"""The map in memory: entries, unflushed changes, revisions. Pure and synchronous.

Theory of operation. `entries` maps keys to stored values. A scalar is stored as it
is; everything else as its JSON, so that no caller's object is ever shared. `changes`
holds what was changed since the last commit took the changes away, key to stored value
or `Absent.DELETED`; `cleared` says that everything older was deleted first. A commit
takes the changes by swapping in an empty dict (`take`); a commit that failed puts them
back under what came since (`put_back`).

A snapshot needs a view that stands still while writers go on. `freeze` gives the
dict itself as that view and puts an `Overlay` over it that takes the writes; `fold`
brings them home in small steps afterwards. So neither step costs what the size of
the state costs. Whoever reads or writes `entries` cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Raw


class Absent(Enum):
    """The two ways of not being there."""

    MISSING = "missing"
    DELETED = "deleted"


MISSING: Literal[Absent.MISSING] = Absent.MISSING
DELETED: Literal[Absent.DELETED] = Absent.DELETED

Stored: TypeAlias = str | int | float | bool | bytes | Raw | None
"""A value as it is kept: a JSON scalar, or the JSON of anything else.

That is `bytes` where it was set, and a `Raw` where it was loaded: a view of the buffer.
"""


class Changes(NamedTuple):
    """What one commit makes durable: everything above revision `start` up to `end`."""

    start: int
    end: int
    cleared: bool
    changes: dict[str, Stored | Literal[Absent.DELETED]]
    since: float


class Overlay:
    """Takes the writes while the dict beneath, `base`, stands still as a view."""

    __slots__ = ("_size", "base", "top")

    def __init__(self, base: dict[str, Stored]) -> None:
        self.base: dict[str, Stored] = base
        self.top: dict[str, Stored | Literal[Absent.DELETED]] = {}
        self._size = len(base)

    def __getitem__(self, key: str) -> Stored:
        value = self.top.get(key, MISSING)
        if value is MISSING:
            return self.base[key]
        if value is DELETED:
            raise KeyError(key)
        return value

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: object) -> bool:
        value = self.top.get(key, MISSING)  # type: ignore[call-overload]  # any object may be looked up
        return key in self.base if value is MISSING else value is not DELETED

    def __iter__(self) -> Iterator[str]:
        for key in self.base:
            if key not in self.top:
                yield key
        for key, value in self.top.items():
            if value is not DELETED:
                yield key

    def items(self) -> Iterator[tuple[str, Stored]]:
        for key, stored in self.base.items():
            if key not in self.top:
                yield key, stored
        for key, value in self.top.items():
            if value is not DELETED:
                yield key, value

    def __setitem__(self, key: str, stored: Stored) -> None:
        if key not in self:
            self._size += 1
        self.top[key] = stored

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._size -= 1
        self.top[key] = DELETED

    def fold(self, most: int) -> bool:
        """Move up to `most` writes into the base; False once none is left."""
        for _ in range(min(most, len(self.top))):
            key, value = self.top.popitem()
            if value is DELETED:
                self.base.pop(key, None)
            else:
                self.base[key] = value
        return bool(self.top)


class State:
    """The map of one manager.

    Attributes:
        entries: Key to stored value. `clear`, `freeze` and `fold` put another object
            in its place, so ask for it each time.
        changes: What changed since the last `take`.
        cleared: Whether everything older than `changes` was deleted first.
        revision: The number of the last change.
        taken: The revision up to which changes were taken.
        since: When the oldest change that was not taken was made, in seconds of
            `monotonic`.
        borrowed: Whether entries may be views that keep the buffer alive that they
            were loaded from.
    """

    __slots__ = ("_monotonic", "borrowed", "changes", "cleared", "entries", "revision", "since", "taken")

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self.load({}, 0)

    def load(self, entries: dict[str, Stored], revision: int) -> None:
        """Begin with these entries, all of them taken."""
        self.entries: dict[str, Stored] | Overlay = entries
        self.borrowed: bool = bool(entries)
        self.changes: dict[str, Stored | Literal[Absent.DELETED]] = {}
        self.cleared: bool = False
        self.revision: int = revision
        self.taken: int = revision
        self.since: float = self._monotonic()

    def begin(self) -> None:
        """Before a change: note the time, if it is the first that was not taken."""
        if self.revision == self.taken:
            self.since = self._monotonic()

    def set(self, key: str, stored: Stored) -> int:
        """Store one value; returns the new revision."""
        return self.set_many({key: stored})

    def settle(self, key: str, scalar: Stored) -> None:
        """Keep a value as the scalar that it was found to be; no change."""
        if self.entries.__class__ is dict:  # an overlay would take it for a write
            self.entries[key] = scalar

    def set_many(self, values: Mapping[str, Stored]) -> int:
        """Store all of them as one change; returns the new revision."""
        self.begin()
        self.revision += 1
        for key, stored in values.items():
            self.entries[key] = self.changes[key] = stored
        return self.revision

    def delete_many(self, keys: Iterable[str]) -> int:
        """Delete those of them that are there, as one change; returns how many."""
        found = {key for key in keys if key in self.entries}
        if found:
            self.begin()
            self.revision += 1
        for key in found:
            del self.entries[key]
            self.changes[key] = DELETED
        return len(found)

    def clear(self) -> int:
        """Delete everything; returns how many. Costs the same for any size."""
        count = len(self.entries)
        if count:
            self.begin()
            self.revision += 1
            self.entries = {}
            self.changes = {}
            self.cleared = True
        return count

    def take(self) -> Changes:
        """Take the changes away for a commit."""
        taken = Changes(self.taken, self.revision, self.cleared, self.changes, self.since)
        self.changes, self.cleared, self.taken = {}, False, self.revision
        return taken

    def put_back(self, taken: Changes) -> None:
        """Put the changes of a failed commit back, under what came since."""
        if not self.cleared:
            self.changes = {**taken.changes, **self.changes}
            self.cleared = taken.cleared
        self.taken, self.since = taken.start, taken.since

    def freeze(self) -> dict[str, Stored]:
        """A view of the entries that stands still until `fold` was called with it.

        One view is free; another one at the same time is a copy, which costs what the
        size of the state costs. That happens when a sync fails while a checkpoint runs.
        """
        if isinstance(self.entries, Overlay):
            return dict(self.entries.items())
        view = self.entries
        self.entries = Overlay(view)
        return view

    def owned(self, view: dict[str, Stored]) -> None:
        """Every value of a view was replaced by one of its own; note it, if that is the view that comes home."""
        if isinstance(self.entries, Overlay) and self.entries.base is view:
            self.borrowed = False

    def fold(self, view: dict[str, Stored], most: int) -> bool:
        """Give a view back, up to `most` writes at a time; False once that is done."""
        entries = self.entries
        if isinstance(entries, Overlay) and entries.base is view:
            if entries.fold(most):
                return True
            self.entries = view
        return False
