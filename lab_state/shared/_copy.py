"""The copy of one process of a shared state, and the objects that get its changes."""

from __future__ import annotations

from collections.abc import Iterable

from lab_state._bulk import run_in_steps
from lab_state._clock import Clock
from lab_state._codec import LoadedState
from lab_state._core import Core
from lab_state._entries import DELETED, ChangeSet
from lab_state._state import State
from lab_state._state._contents import ignore, no_clock
from lab_state._upkeep import Upkeep
from lab_state._watch import Watchers
from lab_state.config import Config
from lab_state.shared._port import SharedPort
from lab_state.shared._records import Outcome, ParsedRecord, RecordApplier


class SharedCopy(Upkeep):
    """The copy of one process, from its start to its stop. It is a `Durability` in which each change is durable.

    Attributes:
        applier: The object that applies records to the copy.
        has_state: Whether the copy shows a state. Until then, the copy is empty.
        watchers: The open watches of this process.
        port: The calls of this process.
    """

    def __init__(self, core: Core, config: Config, clock: Clock) -> None:
        """Prepare an empty copy for the running event loop."""
        copy = State(clock.monotonic, clock.time(), clock.time)
        super().__init__(config.name, copy, clock, unsettled=False, flush_interval=0)
        self.applier: RecordApplier = RecordApplier(copy)
        self.has_state: bool = False
        self.watchers: Watchers = Watchers(copy)
        self.port: SharedPort = SharedPort(core, self, clock, config.owner_timeout)
        copy.free, copy.on_staged = self._free, self._fold_staged

    def load(self, loaded: LoadedState) -> None:
        """Show a state that was loaded. The `epoch` of the copy stays as it is."""
        fresh = State(self._clock.monotonic, self._clock.time(), self._clock.time)
        fresh.load(loaded.entries, loaded.revision, loaded.expires)
        fresh.epoch, fresh.results, fresh.versions = self.state.epoch, loaded.results, loaded.versions
        self.replace(fresh)

    def replace(self, fresh: State) -> None:
        """Show another state. `fresh` must not be used after this. If the copy had a state before, the watches report a `resync`."""
        copy = self.state
        copy.adopt(fresh)
        self.durable_revision = copy.revision
        is_first, self.has_state = not self.has_state, True
        if is_first:
            return
        if copy.on_change is not None:
            copy.on_change(None, DELETED, copy.revision)
        self.port.shows(None)

    async def apply_all(self, records: Iterable[ParsedRecord]) -> None:
        """Apply records that follow the copy, and report each record. The event loop may run meanwhile."""
        for record in records:
            await self.apply_in_turns(record)
            self.changed(record)

    async def apply_in_turns(self, record: ParsedRecord) -> Outcome:
        """Apply a record while the event loop runs, and return the outcome. Nothing else may change the copy meanwhile."""
        await run_in_steps(self.applier.prepare(record), bool)
        return self.applier.finish()

    def changed(self, record: ParsedRecord | ChangeSet) -> None:
        """Inform transactions and waiting callers about a record that was applied. The state itself informs the watches.

        The owner calls this with its own changes.
        """
        self.durable_revision = self.state.revision
        self.port.shows(None if record.cleared else record.changes.keys())

    @property
    def epoch(self) -> float:
        """The time of the state, in seconds, when `CLOCK_MONOTONIC` is 0; see `Welcome`.

        `CLOCK_MONOTONIC` is the clock of each manager. In tests, all managers of a state share another clock.
        """
        return self.state.epoch

    @epoch.setter
    def epoch(self, epoch: float) -> None:
        self.state.epoch = epoch

    def discard_entries(self) -> None:
        """Free the entries after `stop`, in steps. Entries below an `Overlay` stay, because a storage call may still read them."""
        self.state.free, self.state.on_staged = ignore, no_clock
        self._discard(self.state, entries=True)
