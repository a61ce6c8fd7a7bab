"""The views that a commit of an owner takes, if the storage asks for the whole state. This module does no I/O."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from lab_state._codec import encode_snapshot
from lab_state._entries import ChangeSet, Layer
from lab_state._snapshots import SnapshotViews
from lab_state._state import State
from lab_state.shared._results import RecordCalls, ResultTable, SnapshotCalls


class FrameViews(SnapshotViews):
    """The views of one commit: the copy of the owner, with the changes and the results of this commit. Newer changes are not in them."""

    def __init__(
        self, copy: State, taken: ChangeSet, calls: RecordCalls | None, *, given: Callable[[], object] = lambda: None
    ) -> None:
        """Set the attributes; see `SnapshotViews`.

        Args:
            copy: The copy of the owner.
            taken: The changes of the commit. This object must not change until the commit has ended.
            calls: The results in the record of the commit.
            given: A callback. It is called for each slice.
        """
        super().__init__(copy, given=given)
        self._copy = copy
        self._changes = taken
        self._calls = calls

    def take(self) -> AsyncIterator[bytes]:
        """Take a view of the state after this commit. Return its snapshot in slices."""
        copy, changes = self._copy, self._changes
        beneath = self.freeze()
        view = Layer({} if changes.cleared else beneath, changes.changes)
        slices = encode_snapshot(
            view,
            changes.end,
            copy.now(),
            copy_loaded=False,
            wall=copy.wall(),
            versions=changes.versions or copy.versions,
            calls=self._results(),
        )
        return self._given(slices, beneath, changes.end, copy_loaded=False)

    def _results(self) -> SnapshotCalls | None:
        """Return the table of results after this commit. The table of the copy does not change."""
        held = self._copy.results
        if not self._calls:
            return None if held is None else held.snapshot()
        table = ResultTable()
        if held is not None:
            table.load(held.snapshot())
        table.apply(self._calls, self._changes.end)
        return table.snapshot()
