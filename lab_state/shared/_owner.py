"""The owner of a shared state: the commits, the connections of the followers, sweeps and the mirror.

`Owner` is both what the server asks about clients and calls, and what the flusher tells of commits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from lab_state._clock import Clock, Timer
from lab_state._entries import ChangeSet
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._state import State
from lab_state._sweeper import Sweeper
from lab_state.cache._mirror import MirrorWriter
from lab_state.config import Config
from lab_state.exceptions import FencedError, LabStateError, StorageError
from lab_state.shared._connection import Connection
from lab_state.shared._engine import Engine
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import Answer, Call, DeleteAll, Hello, No, Starting, Welcome
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.shared._server import Server
from lab_state.storage._claim import Claim
from lab_state.storage._protocol import StorageSession

TICK = 1.0
"""The seconds between two looks at the socket file and at clients without a connection."""


class Owner:
    """The role of the owner, from the claim of a state to its release.

    Attributes:
        server: The connections.
        flusher: The flusher; `None` until the state was loaded.
        is_settled: Whether everything that was loaded is durable. Before that, processes that connect wait.
    """

    def __init__(self, config: Config, claim: Claim, clock: Clock, logger: Log) -> None:
        """Begin with a state that was claimed and not loaded."""
        self.server: Server = Server(self, clock=clock, log=logger)
        self.flusher: OwnerFlusher[Connection] | None = None
        self.is_settled: bool = False
        self._config = config
        self._claim = claim
        self._clock = clock
        self._logger = logger
        self._copy: State | None = None
        self._sweeper: Sweeper | None = None
        self._timer: Timer | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    # The roles of the state

    def listen(self) -> None:
        """Accept connections. Each client is told to wait until the state is settled."""
        self.server.listen(self._claim.listener)
        self._timer = self._clock.call_later(TICK, self._tick)

    def own(  # noqa: PLR0917 -- all are needed, and each has a type of its own
        self,
        copy: State,
        session: StorageSession,
        committed: Callable[[ChangeSet], object],
        times: FlushTimes,
        on_fenced: Callable[[FencedError], object] | None,
        begun: Callable[[], None],
        mirror: MirrorWriter | None,
    ) -> OwnerFlusher[Connection]:
        """Start the tasks of the owner on a copy, which has everything that was loaded."""
        self._copy = copy
        layer = OwnerLayer(copy)
        engine: Engine[Connection] = Engine(layer, time.monotonic_ns)

        def landed(taken: ChangeSet) -> bool:
            committed(taken)
            if mirror is not None:
                mirror.committed(taken)
            if self._sweeper is not None:
                self._sweeper.resume()
            return True

        flusher = OwnerFlusher(
            layer, engine, self, session, self._config, self._clock, self._logger, landed, times, on_fenced
        )
        self.flusher = flusher
        if mirror is not None:
            mirror.start(flusher)
        self._sweeper = Sweeper(copy, self._clock, lambda: layer.is_sweeping, flusher.nudge, begun, layer=layer)
        flusher.start()
        return flusher

    async def settle(self) -> None:
        """Wait until everything that was loaded is durable.

        Raises:
            StorageError: The commit that settles the state failed. It is repeated: call this again.
        """
        assert self.flusher is not None
        await self.flusher.settled()
        self.is_settled = True

    def begin_stop(self) -> None:
        """Begin a planned end: accept no connection, and apply no further call of a client."""
        self.server.stop_accepting()
        if self.flusher is not None:
            self.flusher.engine.is_ending = True
        if self._sweeper is not None:
            self._sweeper.stop()

    async def aclose(self) -> None:
        """Close the connections at once, and release what was claimed, unless the flusher does it."""
        self._end_timer()
        await self.server.aclose(0.0)
        await self._claim.release()

    async def abort(self) -> None:
        """Release everything, because the start has failed. The session is closed already, if the state was loaded."""
        if self._sweeper is not None:
            self._sweeper.stop()
        await self.aclose()

    def attend(self, watched: bool) -> None:  # noqa: FBT001 -- it is a callback
        """Note that the first watch was opened, or the last one closed."""
        if self._sweeper is not None:
            self._sweeper.attend(watched)

    # What the flusher tells

    def record(self, data: bytes) -> None:
        """Send a durable record to all followers."""
        self.server.record(data)

    def answers(self, connection: Connection, answers: Sequence[Answer]) -> None:
        """Send answers to a follower."""
        connection.answers(answers)

    def closed(self, error: LabStateError) -> None:  # noqa: ARG002 -- the flusher logs it
        """Close all connections, because there will be no further commit. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._run(self.server.aclose(0.0), "close")

    async def finish(self) -> None:
        """Send what the queues hold, and close all connections."""
        self._end_timer()
        await self.server.aclose()
        await self._claim.release()

    # What the server asks

    @property
    def durable_revision(self) -> int:
        """The revision of the last record that was given to the server."""
        assert self._copy is not None
        return self._copy.revision

    def greeting(self, hello: Hello) -> Welcome | Starting | No:
        """Answer a hello."""
        holder = self._claim.holder
        if hello.name != self._config.name:
            return No(reason="name", detail=f"this is the state {self._config.name!r}, and not {hello.name!r}")
        copy, flusher = self._copy, self.flusher
        if not self.is_settled or copy is None or flusher is None:
            return Starting(host=holder.host, pid=holder.pid)
        lacks = hello.revision is None or flusher.last_records.after(hello.revision) is None
        return Welcome(
            host=holder.host,
            pid=holder.pid,
            known=flusher.engine.admit(hello.client, hello.heard),
            epoch=copy.epoch - time.monotonic() + self._clock.monotonic(),
            revision=copy.revision,
            load=lacks,
        )

    def admit(self, connection: Connection, hello: Hello) -> int:
        """Give a client the records that its copy lacks. Return its acknowledgement on earlier connections."""
        assert self.flusher is not None
        if hello.revision is not None:
            for record in self.flusher.last_records.after(hello.revision) or ():
                connection.record(record)
        return self.flusher.engine.clients.acknowledged[connection.client]

    def call(self, connection: Connection, call: Call) -> None:
        """Execute a call of a client."""
        copy, flusher = self._copy, self.flusher
        assert copy is not None
        assert flusher is not None
        if isinstance(call, DeleteAll) and call.prefix and copy.is_index_behind:
            self._run(self._delete_later(copy, flusher, connection, call), "delete_all")
            return
        if (answer := flusher.call(connection, connection.client, call)) is not None:
            connection.answers([answer])

    async def _delete_later(
        self, copy: State, flusher: OwnerFlusher[Connection], connection: Connection, call: DeleteAll
    ) -> None:
        """Bring the index up to date in steps, and execute the call after that. Its client may send it again meanwhile."""
        await self.prepare_index(copy)
        if connection.is_admitted and (answer := flusher.call(connection, connection.client, call)) is not None:
            connection.answers([answer])

    @staticmethod
    async def prepare_index(copy: State) -> None:
        """Build the index of the keys of a copy, or bring it up to date, in steps."""
        for _ in copy.index_steps():
            await asyncio.sleep(0)

    def acknowledge(self, client: str, number: int) -> None:
        """Note the acknowledgement of a client."""
        assert self.flusher is not None
        self.flusher.engine.clients.acknowledge(client, number)

    def farewell(self, client: str) -> None:
        """Forget a client that stops."""
        assert self.flusher is not None
        self.flusher.engine.farewell(client)

    def left(self, connection: Connection) -> None:
        """Drop the answers that wait for a connection that has ended."""
        assert self.flusher is not None
        self.flusher.engine.drop(connection)
        self.flusher.engine.disconnect(connection.client)

    # Every second

    def _tick(self) -> None:
        self._timer = self._clock.call_later(TICK, self._tick)
        if self.flusher is not None:
            self.flusher.engine.forget_gone()
        self._run(self._look_at_socket(), "socket")

    async def _look_at_socket(self) -> None:
        """Bind a new socket, if the file of the socket was deleted or replaced."""
        try:
            new = await self._claim.rebind_if_gone()
        except StorageError as error:
            self._logger.error("%s: processes that start now cannot connect: %s", self._config.name, error)  # noqa: TRY400 -- one line
            return
        if new is not None:
            self._logger.warning("%s: the socket file was gone, and was made again", self._config.name)
            self.server.listen(new)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run(self, work: Any, what: str) -> None:
        task = asyncio.create_task(work, name=f"lab_state {self._config.name} {what}")
        self._tasks.add(task)  # the event loop keeps no reference
        task.add_done_callback(self._tasks.discard)
