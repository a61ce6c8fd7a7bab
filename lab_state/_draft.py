"""`Draft`: the changes of a transaction or of a migration, before they are made. This module does no I/O."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import cast
from weakref import ref

from lab_state._batch import Batch
from lab_state._entries import Absent, Layer, Stored, StoredOrGone, Value
from lab_state._layered import Layered, LayeredEntries
from lab_state._state import State
from lab_state._undo import UndoView


class Draft(Layered):
    """A state on top of another state, its base.

    No other writer changes the base while the draft exists. The subclass `OptimisticDraft` allows such changes.

    `revision` is the revision that the base will have after `merge`, if `merge` changes the base.
    """

    __slots__ = ("_only_values",)

    # Attributes of the base class that are assigned here as well; see `State`.
    entries: dict[str, Stored] | Layer
    cleared: bool
    revision: int

    def __init__(self, base: State) -> None:
        """Begin with the entries of `base`, and no changes."""
        super().__init__(base)
        self._only_values = True
        self.revision = base.revision + 1

    def view(self) -> UndoView[Stored]:
        """Open a view of the draft; see `State.view`. The view has a copy of the changes, so `Transaction.set` need not call `before_overwrite`."""
        assert isinstance(self.entries, LayeredEntries)
        view = UndoView[Stored](None, LayeredEntries(self.entries.base, dict(self.changes)))
        self.views.append(ref(view))
        return view

    def merge(self) -> int | None:
        """Apply all changes to the base, as one change. Return the new revision, or `None` if nothing changed."""
        changes: dict[str, StoredOrGone] = self.changes
        if self._only_values:
            return self.base.set_many(cast("dict[str, Value]", changes)) if changes else None
        gone: Container[str] = () if self.cleared else self.base.entries
        changes = {key: to for key, to in changes.items() if not isinstance(to, Absent) or key in gone}
        if not changes and not (self.cleared and len(self.base.entries)):
            return None
        return self.base.apply(changes, cleared=self.cleared)

    def batch(self) -> Batch:
        """Return all changes as a batch for the base. The draft must not be used after this."""
        return Batch(self.base, self.changes, cleared=self.cleared)

    def apply(self, changes: Mapping[str, StoredOrGone], *, cleared: bool) -> int:
        """Apply changes to the draft. All changes of a draft have the same revision."""
        self._only_values = False
        super().apply(changes, cleared=cleared)
        self.revision = self.base.revision + 1
        return self.revision

    def _empty(self) -> None:
        self.changes.clear()
        self.entries = LayeredEntries({}, self.changes)
        self.cleared = True
        self.expiries.clear()
