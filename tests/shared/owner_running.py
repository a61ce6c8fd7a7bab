"""An owner without sockets that runs on a real storage, and connections that note what it tells them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from owner_parts import A, B

from lab_state import Config, Storage
from lab_state._entries import ChangeSet
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._opening import loaded
from lab_state._state import State
from lab_state.exceptions import LabStateError
from lab_state.shared._engine import Engine
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import Answer, Call
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.testing import ManualClock


class Connections:
    """The connections of an owner. Each thing that they are told is noted with the revision of the copy at that moment.

    Attributes:
        told: What was told, in order.
    """

    def __init__(self, copy: State, calls: list[Any]) -> None:
        self._copy = copy
        self._calls = calls  # the operations of the storage
        self.told: list[tuple[Any, ...]] = []
        self.records: list[bytes] = []

    def record(self, data: bytes) -> None:
        self.records.append(data)
        self.told.append(("record", self._copy.revision))

    def answers(self, connection: str, answers: Sequence[Answer]) -> None:
        self.told += [(connection, answer) for answer in answers]

    def closed(self, error: LabStateError) -> None:
        self.told.append(("closed", type(error).__name__))

    async def hand_over(self) -> bool:
        return False

    async def finish(self) -> None:
        self.told.append(("finish", *self._calls[-2:]))

    def taken(self) -> list[tuple[Any, ...]]:
        """Return what was told since the last time."""
        told, self.told = self.told, []
        return told


class Owner:
    """An owner, with a connection named "left" of client A, and one named "right" of client B."""

    def __init__(self, flusher: OwnerFlusher[str], layer: OwnerLayer, connections: Connections) -> None:
        self.flusher = flusher
        self.engine = flusher.engine
        self.layer = layer
        self.copy = layer.copy
        self.connections = connections
        self.committed: list[ChangeSet] = []
        for client in (A, B):
            assert self.engine.admit(client, None)

    def left(self, call: Call) -> Answer | None:
        return self.flusher.call("left", A, call)

    def right(self, call: Call) -> Answer | None:
        return self.flusher.call("right", B, call)

    def told(self) -> list[tuple[Any, ...]]:
        return self.connections.taken()


async def open_owner(storage: Storage, clock: ManualClock, on_fenced: Any = None) -> Owner:
    """Load the state "test", and begin to flush."""
    log = Log(logging.getLogger("lab_state"))
    session = await storage.open("test")
    layer = OwnerLayer(loaded(session, "test", clock, log, 0.0))
    engine: Engine[str] = Engine(layer, lambda: int(clock.monotonic() * 1_000_000_000))
    connections = Connections(layer.copy, getattr(storage, "calls", []))
    committed: list[ChangeSet] = []

    def note(taken: ChangeSet) -> bool:
        committed.append(taken)
        return True

    config = Config(name="test", flush_interval=0, stop_timeout=8.0)
    flusher = OwnerFlusher(layer, engine, connections, session, config, clock, log, note, FlushTimes(), on_fenced)
    flusher.start()
    owner = Owner(flusher, layer, connections)
    owner.committed = committed
    return owner


@asynccontextmanager
async def owning(storage: Storage, clock: ManualClock) -> AsyncIterator[Owner]:
    owner = await open_owner(storage, clock)
    try:
        yield owner
    finally:
        await owner.flusher.stop(8.0)
