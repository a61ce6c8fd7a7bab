"""What a transaction changes, before it is committed. Pure and synchronous."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import cast

from lab_state._expiry import Expiring, Value
from lab_state._state import Absent, Changed, Layer, State, Stored, is_due


class _Live:
    """The entries of a state, whichever object holds them at the moment."""

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


class _Entries(Layer):
    """The entries as the transaction sees them."""

    __slots__ = ()

    def __len__(self) -> int:
        added = sum((not isinstance(value, Absent)) - (key in self.base) for key, value in self.top.items())
        return len(self.base) + added


class Draft(State):
    """A state over another one, which nobody else changes meanwhile.

    `changes` is the top layer of `entries`, so that one store does for both. The
    revision is the one that a commit will make.
    """

    __slots__ = ("_only_values", "base")

    def __init__(self, base: State) -> None:
        """Begin with what is there."""
        self.base = base
        self._only_values = True
        super().__init__(base.monotonic)
        self.entries = _Entries(_Live(base), self.changes)
        self.revision = base.revision + 1

    def now(self) -> int:
        """The time of the state beneath."""
        return self.base.now()

    def has(self, key: str) -> bool:
        """Whether a key is there."""
        return key in self.entries and self._lives(key)

    def count(self) -> int:
        """Return how many keys there are.

        It costs a step for each change, and for each key that expires in this very second.
        """
        total = len(self.entries)
        if self.expires:
            now, beneath = self.now(), self.base.entries
            total -= sum(isinstance(to, Expiring) and to.at <= now for to in self.changes.values())
            if not self.cleared:
                total -= self.base.expiries.due(now) - sum(is_due(beneath, key, now) for key in self.changes)
        return total

    @property
    def expires(self) -> bool:
        """Whether anything does, in the state beneath too."""
        return bool(self.expiries) or bool(self.base.expiries)

    def merge(self) -> int | None:
        """Make it all one change of the state beneath; returns its revision, `None` if it changed nothing."""
        changes: dict[str, Changed] = self.changes
        if self._only_values:
            return self.base.set_many(cast("dict[str, Value]", changes)) if changes else None
        gone: Container[str] = () if self.cleared else self.base.entries
        changes = {key: to for key, to in changes.items() if not isinstance(to, Absent) or key in gone}
        if not changes and not (self.cleared and len(self.base.entries)):
            return None
        return self.base.apply(changes, cleared=self.cleared)

    def apply(self, changes: Mapping[str, Changed], *, cleared: bool) -> int:
        """Make them in the draft; however many, they are one change."""
        self._only_values = False
        super().apply(changes, cleared=cleared)
        self.revision = self.base.revision + 1
        return self.revision

    def _empty(self) -> None:
        self.changes.clear()
        self.entries = _Entries({}, self.changes)
        self.cleared = True
        self.expiries.clear()
