"""The owner of a shared state: the commits, the connections of the followers, sweeps and the mirror.

`Owner` implements the protocol `OwnerSide` for the server, and the protocol `Listener` for the flusher.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

from lab_state._clock import Clock, Timer, done_within
from lab_state._entries import ChangeSet
from lab_state._foreign import only_storage_errors
from lab_state._log import Log
from lab_state._metrics import FlushTimes
from lab_state._migrations import SchemaStart
from lab_state._sweeper import Sweeper
from lab_state.cache._mirror import MirrorWriter
from lab_state.config import Config
from lab_state.exceptions import FencedError, LabStateError, StorageError
from lab_state.shared._connection import Connection
from lab_state.shared._copy import SharedCopy
from lab_state.shared._engine import Engine
from lab_state.shared._layer import OwnerLayer
from lab_state.shared._messages import Answer, Call, Hello, No, Starting, Welcome
from lab_state.shared._owner_flusher import OwnerFlusher
from lab_state.shared._server import Server
from lab_state.storage._claim import Claim
from lab_state.storage._protocol import SharedSession
from lab_state.storage.file import FileStorage

TICK = 1.0
"""The seconds between two checks of the socket file and of the clients without a connection."""


class Surroundings(NamedTuple):
    """The objects that a manager gives to its member.

    Attributes:
        storage: The storage.
        clock: The clock.
        logger: The logger.
        times: The object that collects the durations of commits; see `FlushTimes`.
        on_fenced: A function of the application; see `Manager`.
        make_mirror: A function that returns a writer of the mirror; `None` if there is no cache. The function must not
            refer to the manager. Otherwise a manager that was dropped could not be garbage-collected.
        started_at: The place in the application that started the manager.
        schema: The schema of the code, with the other objects that a start needs to use it.
    """

    storage: FileStorage
    clock: Clock
    logger: Log
    times: FlushTimes
    on_fenced: Callable[[FencedError], object] | None
    make_mirror: Callable[[], MirrorWriter] | None
    started_at: str
    schema: SchemaStart


class Owner:
    """The role of the owner, from the claim of a state to its release.

    Attributes:
        server: The server, which has the connections to the followers.
        flusher: The flusher; `None` until the state is loaded.
        is_settled: Whether all loaded changes are durable, and in the copy. Before that, processes that connect wait.
    """

    def __init__(self, copy: SharedCopy, config: Config, claim: Claim, around: Surroundings) -> None:
        """Begin with a state that is claimed, but not loaded yet. Each process that connects gets the answer `Starting`."""
        self.server: Server = Server(self, config.name, clock=around.clock, log=around.logger)
        self.flusher: OwnerFlusher[Connection] | None = None
        self.is_settled: bool = False
        self._copy = copy
        self._config = config
        self._claim = claim
        self._around = around
        self._clock = around.clock
        self._logger = around.logger
        self._sweeper: Sweeper | None = None
        self._timer: Timer | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener = claim.listener
        self._socket_failed = False
        self._is_looking = False
        self._is_ending = False
        self._session: SharedSession | None = None
        self._is_watched = False  # whether the sweeper deletes keys at the time when they expire

    # Start and stop

    def listen(self) -> None:
        """Accept connections."""
        # The server gets its own descriptor, because a thread closes the descriptor of the claim.
        self.server.listen(self._listener.dup())
        self._timer = self._clock.call_later(TICK, self._tick)

    def own(self, session: SharedSession, mirror: MirrorWriter | None, sweep_now: int) -> OwnerFlusher[Connection]:
        """Start the tasks of the owner. The copy has the loaded state. If this raises an error, no task runs.

        Args:
            session: The session of the storage.
            mirror: The writer of the mirror, if there is one.
            sweep_now: The largest number of expired keys to delete now, in one change.
        """
        state = self._copy.state
        layer = OwnerLayer(state)
        checks = self._around.schema.schema.checks
        engine: Engine[Connection] = Engine(layer, time.monotonic_ns, None if checks is None else checks.check)
        flusher = OwnerFlusher(
            layer,
            engine,
            self,
            session,
            self._config,
            self._clock,
            self._logger,
            partial(self._committed, mirror),
            self._around.times,
            self._around.on_fenced,
        )
        with ExitStack() as undo:
            if mirror is not None:
                mirror.start(flusher)
                undo.callback(mirror.abort)
            self._sweeper = Sweeper(
                state, self._clock, lambda: layer.is_sweeping or flusher.is_busy, flusher.nudge, _nothing, layer=layer
            )
            flusher.turn_ended = self._sweeper.resume
            undo.callback(self._sweeper.stop)
            self.watched()
            if layer.sweep(sweep_now):
                flusher.nudge()
            flusher.start()
            undo.pop_all()
        self.flusher, self._session = flusher, session
        return flusher

    def _committed(self, mirror: MirrorWriter | None, taken: ChangeSet) -> bool:
        """Report a commit to this process and to the mirror. Return whether the mirror may still read `taken` later."""
        try:
            self._copy.changed(taken)
        finally:
            if mirror is not None:
                mirror.committed(taken)
            assert self._sweeper is not None  # `own` has created the sweeper
            self._sweeper.resume()
        return mirror is not None

    async def begin_stop(self, deadline: float) -> None:
        """Begin the stop of the owner: accept no further connection, and execute no further call of a client.

        First wait until the checkpoint under way has ended, if there is one. This wait ends at the deadline, which is in seconds of the
        clock. During this wait, calls are still executed. Otherwise the followers would have to wait for the checkpoint.
        """
        assert self.flusher is not None
        if (checkpoint := self.flusher.checkpoints.task) is not None:
            await done_within(checkpoint, self._clock, max(0.0, deadline - self._clock.monotonic()))
        self._stop_accepting()
        self.flusher.engine.is_ending = True

    async def release(self) -> None:
        """Close the connections at once. Release the claim, unless the session releases it. A second call waits for the first one."""
        self._close()
        await self._claim.release()

    def watched(self) -> None:
        """Tell the sweeper whether this process or a follower has a watch. While there is a watch, keys are deleted when they expire, and not only once a second."""
        is_watched = bool(self._copy.watchers) or self.server.is_watched
        assert self._sweeper is not None  # `own` has created it
        if is_watched is not self._is_watched and not self._is_ending:
            self._is_watched = is_watched
            self._sweeper.attend(is_watched)

    def move(self) -> None:
        """Move to the running event loop, because the event loop of the owner is closed. All connections are lost."""
        assert self.flusher is not None
        self._close()
        self.flusher.move()

    def _close(self) -> None:
        self._stop_accepting()
        self.server.close()

    def _stop_accepting(self) -> None:
        """Refuse connections, and end the timers. A second call does nothing."""
        self._is_ending = True
        self._claim.listener.close()
        self.server.stop_accepting()
        if self._timer is not None:
            self._timer.cancel()
        if self._sweeper is not None:
            self._sweeper.stop()

    # Calls of the flusher

    def record(self, data: bytes) -> None:
        """Send a durable record to all followers."""
        self.server.record(data)

    def answers(self, connection: Connection, answers: Sequence[Answer]) -> None:
        """Send answers to a follower."""
        connection.answers(answers)

    def closed(self, error: LabStateError) -> None:  # noqa: ARG002 -- the flusher logs it
        """Close all connections, because there will be no further commit. A second call does nothing."""
        self._close()

    async def hand_over(self) -> bool:
        """Leave the state to a follower, if there is one; see `Listener.hand_over`.

        The followers are counted again after the end of the journal is written, because they may leave meanwhile.
        """
        if not self.server.followers:
            return False
        session, is_ended = self._session, True
        assert session is not None  # `own` got it
        try:
            is_ended = await only_storage_errors(session.hand_over)
        except StorageError as error:
            self._logger.warning(
                "%s: cannot note in the journal that everything is durable, so the next owner writes a new journal: %s",
                self._config.name,
                error,
            )
        return is_ended and self.server.followers > 0

    async def finish(self) -> None:
        """Send the queued messages, for at most a second. Close all connections, and end the checks of the socket file."""
        self._stop_accepting()
        await self.server.aclose()
        await self._claim.release()

    # Calls of the server

    @property
    def durable_revision(self) -> int:
        """The revision of the copy. Each record up to this revision was given to the server."""
        return self._copy.state.revision

    def greeting(self, hello: Hello) -> Welcome | Starting | No:
        """Answer a hello: see `OwnerSide.greeting`."""
        holder = self._claim.holder
        if hello.name != self._config.name:
            return No(reason="name", detail=f"this is the state {self._config.name!r}, and not {hello.name!r}")
        flusher = self.flusher
        if not self.is_settled or flusher is None:
            return Starting(host=holder.host, pid=holder.pid)
        lacks = hello.revision is None or flusher.last_records.after(hello.revision) is None
        return Welcome(
            host=holder.host,
            pid=holder.pid,
            known=flusher.engine.admit(hello.client, hello.heard, checks=hello.checks),
            epoch=self._copy.epoch,
            revision=self.durable_revision,
            load=lacks,
            schema=self._copy.state.versions.schema,
            readable_by=self._copy.state.versions.readable_by,
        )

    def admit(self, connection: Connection, hello: Hello) -> int:
        """Send a client the records that its copy lacks. Return the acknowledgement of its earlier connections."""
        assert self.flusher is not None
        if hello.revision is not None:
            for record in self.flusher.last_records.after(hello.revision) or ():
                connection.record(record)
        return self.flusher.engine.clients.acknowledged[connection.client]

    def call(self, connection: Connection, call: Call) -> Awaitable[None] | None:
        """Execute a call of a client. Answer it now if that is possible. Otherwise the flusher does so later.

        A call with many keys is executed in steps. A call that arrives meanwhile waits for its turn. In both cases, return an awaitable
        that executes the call.
        """
        flusher = self.flusher
        assert flusher is not None
        if flusher.is_busy or flusher.engine.is_large(call):
            return flusher.in_turn(partial(self._call_in_steps, flusher, connection, call))
        if (answer := flusher.call(connection, connection.client, call)) is not None:
            connection.answers([answer])
        return None

    @staticmethod
    def _call_in_steps(
        flusher: OwnerFlusher[Connection], connection: Connection, call: Call
    ) -> Generator[None, None, None]:
        if not connection.is_admitted:  # the connection has ended meanwhile: the client sends the call again
            return
        answer = yield from flusher.engine.call_in_steps(connection, connection.client, call)
        if answer is not None:
            connection.answers([answer])

    def acknowledge(self, client: str, number: int) -> None:
        """Note the acknowledgement of a client."""
        assert self.flusher is not None
        self.flusher.engine.clients.acknowledge(client, number)

    def farewell(self, client: str) -> None:
        """Forget a client that stops."""
        assert self.flusher is not None
        self.flusher.engine.farewell(client)

    def left(self, connection: Connection) -> None:
        """Drop the answers that wait for a connection that has ended. Note that its client has no connection and no watch."""
        assert self.flusher is not None
        self.flusher.engine.drop(connection)
        self.flusher.engine.disconnect(connection.client)
        self.watched()

    # Every second

    def _tick(self) -> None:
        self._timer = self._clock.call_later(TICK, self._tick)
        if self.flusher is not None:
            self.flusher.engine.forget_gone()
        if not self._is_looking:  # on a slow disk, a check may take longer than a second
            self._is_looking = True
            self._run(self._look_at_socket(), "socket")

    async def _look_at_socket(self) -> None:
        """Check the socket file. No other check begins before this one has ended."""
        try:
            await self._bind_again()
        finally:
            self._is_looking = False

    async def _bind_again(self) -> None:
        """Bind a new socket, if the socket file was deleted or replaced."""
        try:
            await self._claim.rebind_if_gone()
            is_new = self._listen_at_new()
        except StorageError as error:
            await self._cannot_bind(error)
            return
        if self._socket_failed:
            self._socket_failed = False
            self._logger.debug("%s: processes that start now can connect again", self._config.name)
        if is_new:
            self._logger.warning("%s: the socket file was deleted or replaced, and was made again", self._config.name)

    def _listen_at_new(self) -> bool:
        """Accept connections at the socket of the claim, if this socket is new. Return whether this was done.

        An earlier check may have bound the new socket, and failed after that.
        """
        new = self._claim.listener
        if new is self._listener:
            return False
        if self._is_ending:
            new.close()
            return False
        self.server.listen(new.dup())
        self._listener.close()
        self._listener = new
        return True

    async def _cannot_bind(self, error: StorageError) -> None:
        """Log the first of consecutive failures. If the lock is lost, make a commit, even without a change. The commit reports the loss."""
        if not self._socket_failed:
            self._socket_failed = True
            self._logger.error("%s: processes that start now cannot connect: %s", self._config.name, error)
        if isinstance(error, FencedError) and self.flusher is not None:
            with suppress(LabStateError):  # the flusher logs the error
                await self.flusher.confirm_ownership()

    def _run(self, work: Coroutine[Any, Any, None], what: str) -> None:
        task = asyncio.create_task(work, name=f"lab_state {self._config.name} {what}")
        self._tasks.add(task)  # the event loop keeps only a weak reference
        task.add_done_callback(self._tasks.discard)


def _nothing() -> None: ...
