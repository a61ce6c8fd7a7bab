"""`Layered`: a state on top of another state, its base. It has the changes that are not in the base. This module does no I/O.

Theory of operation. A change goes into `changes`, and the base stays as it is. `changes` is also the top
layer of `entries`, so one assignment changes both. A read finds the change of a key, or the value in the
base. A base may be a `Layered` itself. The cost of a call with many keys grows with the number of changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from lab_state._entries import Absent, Expiring, Layer, Stored, StoredOrGone
from lab_state._expiry import Expiries
from lab_state._order import Chunk, corrected, in_range
from lab_state._state import State
from lab_state._state._contents import is_due


class Live:
    """The present entries of a state. Each call gets the map from the state, because the state may replace its map."""

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, key: str) -> Stored:
        return self._state.entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._state.entries

    def items(self) -> Iterable[tuple[str, Stored]]:
        return self._state.entries.items()

    def __len__(self) -> int:
        return len(self._state.entries)


class LayeredEntries(Layer):
    """The entries of a base with the changes over them."""

    __slots__ = ()

    def __len__(self) -> int:
        added = sum((not isinstance(value, Absent)) - (key in self.base) for key, value in self.top.items())
        return len(self.base) + added


class Layered(State):
    """A state on top of another one.

    Attributes:
        base: The state below.
    """

    has_steps = False
    __slots__ = ("base",)

    # Attributes of the base class that are assigned here as well; see `State`.
    entries: dict[str, Stored] | Layer
    changes: dict[str, StoredOrGone]
    expiries: Expiries
    cleared: bool

    def __init__(self, base: State) -> None:
        """Begin with the entries of `base`, and no changes."""
        self.base: State = base
        super().__init__(base.monotonic)
        self.entries = LayeredEntries(Live(base), self.changes)

    def show(self, changes: dict[str, StoredOrGone], expiries: Expiries, *, cleared: bool) -> None:
        """Replace all changes.

        Args:
            changes: The changes. This object keeps the dict.
            expiries: An index of the changes that expire.
            cleared: Whether all keys of the base are deleted.
        """
        self.cleared, self.changes, self.expiries = cleared, changes, expiries
        self.entries = LayeredEntries({} if cleared else Live(self.base), changes)

    def now(self) -> int:
        """Return the time of the base, in milliseconds since 1970."""
        return self.base.now()

    def wall(self) -> int:
        """Return the time of the wall clock of the base, in milliseconds since 1970."""
        return self.base.wall()

    def has(self, key: str) -> bool:
        """Return whether a key exists, and has not expired."""
        return key in self.entries and self._lives(key)

    @property
    def expires(self) -> bool:
        """Whether any key expires, here or in the base. It may be True although the changes delete or replace all such keys."""
        return bool(self.expiries) or self.base.expires

    def due(self, now: int) -> int:
        """Return the number of keys that have expired by `now`. The cost grows with the number of changes; see `State.due`."""
        total = sum(isinstance(to, Expiring) and to.at <= now for to in self.changes.values())
        if not self.cleared:
            beneath = self.base.entries
            total += self.base.due(now) - sum(is_due(beneath, key, now) for key in self.changes)
        return total

    def due_keys(self, now: int) -> list[str]:
        """Return the keys that have expired by `now`. The cost grows with the number of changes; see `State.due_keys`."""
        changes = self.changes
        found = [] if self.cleared else [key for key in self.base.due_keys(now) if key not in changes]
        return found + [key for key, to in changes.items() if isinstance(to, Expiring) and to.at <= now]

    @property
    def is_index_behind(self) -> bool:
        """False, because the calls on this state do not work in steps."""
        return False

    def page(self, low: str, high: str | None, limit: int | None = None, *, reverse: bool = False) -> list[str]:
        """Return the first keys in a range; see `State.page`. The cost grows with the number of changes, too."""
        mine = in_range(self.changes, low, high)
        if self.cleared:
            found = []
        else:
            most = None if limit is None else limit + len(mine)
            found = self.base.page(low, high, most, reverse=reverse)
        return corrected(found, mine, self.entries, reverse=reverse)[:limit] if mine else found

    def pieces(self, low: str, high: str | None) -> list[Chunk]:
        """Return the keys in a range; see `State.pieces`. They are in one tuple if there are changes in the range."""
        if not self.cleared and not in_range(self.changes, low, high):
            return self.base.pieces(low, high)
        found = self.page(low, high)
        return [tuple(found)] if found else []

    def held_in(self, low: str, high: str | None) -> int:
        """Return the number of keys in a range, including expired keys. The cost grows with the number of changes, too."""
        mine = in_range(self.changes, low, high)
        if self.cleared:
            return sum(key in self.entries for key in mine)
        beneath = self.base.entries
        return self.base.held_in(low, high) + sum((key in self.entries) - (key in beneath) for key in mine)
