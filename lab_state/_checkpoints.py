"""The checkpoints of one state: when one is due, and the task that writes it.

A checkpoint runs in a separate task, and commits go on meanwhile. Only the checkpoint of `stop()` runs in
the flush task. The result of each commit says whether a checkpoint is due. A checkpoint that failed
is repeated after a pause, unless the manager stops or is fenced. `Outcomes` counts and logs failures. There is at most one
checkpoint at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from lab_state._batch import STEP
from lab_state._clock import Clock, Pauses
from lab_state._foreign import only_storage_errors, storage_error
from lab_state._outcomes import Outcomes
from lab_state._snapshots import Pace, SnapshotViews
from lab_state._state import State
from lab_state.exceptions import StorageError
from lab_state.storage._protocol import StorageSession


class Checkpoints:
    """The checkpoints of one state, from one start to one stop.

    Attributes:
        due: Whether a checkpoint is due. After a failure this is True during the pause, too.
        records: The number of records since the last snapshot, or more. A record that is being written when the view is taken is
            counted, even if the snapshot covers it. If the loaded changes are not certainly durable, one more is counted. 0
            means that the snapshot covers all records.
        is_marked: Whether the last snapshot has the followed mark.
        task: The task of the last checkpoint that `start` has started; `None` if there is none.
        pace: The schedule by which a checkpoint or a backup encodes its slices, so that they delay commits as little as
            possible; see `Pace`.
    """

    def __init__(  # noqa: PLR0917 -- all are needed, and no two have the same type
        self,
        name: str,
        session: StorageSession,
        outcomes: Outcomes,
        clock: Clock,
        pauses: Pauses,
        given: Callable[[], object],
        state: State | None = None,
    ) -> None:
        """Set the attributes. No checkpoint is started.

        Args:
            name: The name of the state.
            session: The session of the storage.
            outcomes: The object that has the state, and that receives the outcome of each checkpoint.
            clock: The clock of the manager.
            pauses: The pauses after checkpoints that failed.
            given: A function that is called for each slice of a snapshot.
            state: The state that the snapshots contain; by default the state of `outcomes`.
        """
        self.due: bool = False
        self.records: int = 0
        self.is_marked: bool = False
        self.task: asyncio.Task[None] | None = None
        self.pace: Pace = Pace()
        self._name = name
        self._state = outcomes.state if state is None else state
        self._session = session
        self._outcomes = outcomes
        self._clock = clock
        self._pauses = pauses
        self._given = given

    def note_commit(self, *, is_due: bool) -> None:
        """Note a commit that was made before the flusher started. `is_due` says whether a checkpoint is due."""
        self.records += 1
        self.due = is_due

    @property
    def is_waiting(self) -> bool:
        """Whether a due checkpoint waits because `State.frozen` is set: a view is in use, perhaps that of the checkpoint under way.

        From a failed checkpoint until the next success, this is False.
        """
        return self.due and not self._pauses.failures and self._state.frozen

    @property
    def is_needed(self) -> bool:
        """Whether `stop()` needs a checkpoint. A clean stop leaves a snapshot without the followed mark."""
        return self.is_marked or self.records > 0

    @property
    def is_running(self) -> bool:
        """Whether a checkpoint that `start` has started is under way."""
        return self.task is not None and not self.task.done()

    def start_if_due(self) -> None:
        """Start a checkpoint if one is due, the pause after a failure is over, and `State.frozen` is not set.

        While a view is in use, a second view would be a copy of the whole state.
        """
        if self.due and self._pauses.are_over and not self._state.frozen:
            self.start()

    def start(self) -> None:
        """Start a checkpoint, unless one is under way."""
        if not self.is_running:
            self.task = asyncio.create_task(self.write(wait=True), name=f"lab_state {self._name} checkpoint")
            self.task.add_done_callback(self._ended)

    async def ended(self) -> None:
        """Wait for the end of the checkpoint under way, if there is one."""
        if self.task is not None:
            await asyncio.wait({self.task})

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Note that the task has ended. If other code cancelled it, or it raised an error, the checkpoint is due again."""
        if task.cancelled():
            self.due = True
        elif (problem := task.exception()) is not None:
            self._failed(storage_error(problem))

    async def write(self, *, wait: bool) -> None:
        """Write one checkpoint. A `StorageError` is not raised: the checkpoint is due again, and `Outcomes` gets the error.

        Args:
            wait: Whether the manager continues to run. Then the snapshot gets the followed mark, and its last slice waits
                until the revision of the snapshot is durable.
        """
        self.due = False
        durable = self._outcomes.make_durable if wait else None
        views = SnapshotViews(
            self._state, durable, given=self._given, pace=self.pace, copy_loaded=True, is_followed=wait
        )
        before = self.records
        started = self._clock.monotonic()

        def snapshot() -> AsyncIterator[bytes]:
            nonlocal before
            # The snapshot covers these records. A commit under way, and later commits, are counted after this.
            before = self.records
            return views.take()

        try:
            # Merge a staged layer in steps first. `freeze` would merge it in one step, which may take long.
            while self._state.fold_staged(STEP):  # noqa: ASYNC110 -- the condition does the work
                await asyncio.sleep(0)
            await only_storage_errors(lambda: self._session.checkpoint(snapshot))
        except StorageError as error:
            self._failed(error)
        else:
            self.records -= before
            self.is_marked = wait
            self.due = False  # a commit may have set `due` meanwhile, before the snapshot replaced the large journal
            self._outcomes.checkpoint_succeeded(self._clock.monotonic() - started, self._session.snapshot_bytes)
        finally:
            await views.fold()

    def _failed(self, error: StorageError) -> None:
        self.due = True
        self._outcomes.checkpoint_failed(error)
