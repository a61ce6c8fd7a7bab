"""The owner's socket: accept connections, send each record to all admitted clients, and send signs of life.

The server has no task, and one timer for all connections.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable

from lab_state._clock import Clock, Timer, done_within
from lab_state._log import Log
from lab_state.exceptions import InvalidValueError
from lab_state.shared._channel import LIFE
from lab_state.shared._connection import Connection, OwnerSide
from lab_state.shared._wire import frame_of_record
from lab_state.storage._fs_socket import peer_of


class Server:
    """The connections of an owner to its clients."""

    def __init__(
        self,
        owner: OwnerSide,
        name: str,
        *,
        clock: Clock,
        log: Log,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Prepare to serve.

        Args:
            owner: The owner's side.
            name: The name of the state, for the log.
            clock: The clock for signs of life and for time limits.
            log: The log.
            monotonic_ns: The source of the time in each message: `CLOCK_MONOTONIC`, in nanoseconds.
        """
        self._owner = owner
        self._name = name
        self._clock = clock
        self._log = log
        self._time = monotonic_ns
        self._connections: set[Connection] = set()
        self._by_client: dict[str, Connection] = {}
        self._listener: socket.socket | None = None
        self._cannot_accept = False
        self._all_ended: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: Timer | None = None
        self._other_users: set[int] = set()

    @property
    def followers(self) -> int:
        """The number of clients that are admitted."""
        return sum(connection.is_admitted for connection in list(self._by_client.values()))  # any thread may call this

    @property
    def is_watched(self) -> bool:
        """Whether a client that is admitted has a watch."""
        return any(connection.is_admitted and connection.is_watching for connection in self._by_client.values())

    def listen(self, listener: socket.socket) -> None:
        """Accept connections on a socket that listens and does not block.

        `stop_accepting`, `aclose` and `close` close the socket. A later call of `listen` replaces the socket, and closes
        the earlier socket. The connections stay open.
        """
        self._stop_listening()
        self._listener = listener
        self._loop.add_reader(listener, self._accept, listener)
        if self._timer is None:
            self._timer = self._clock.call_later(LIFE, self._tick)

    def greet_waiting(self) -> None:
        """Answer each hello that waits. Call this when the owner has loaded its state."""
        for connection in list(self._by_client.values()):
            connection.greet()

    def record(self, data: bytes) -> None:
        """Send a record to all admitted clients. If a client cannot take it, close its connection; see `Connection.record`."""
        admitted = [connection for connection in self._by_client.values() if connection.is_admitted]
        try:
            parts = frame_of_record(self._time(), data)
        except InvalidValueError:
            for connection in admitted:
                connection.record(data)  # this closes the connection, and logs why
            return
        for connection in admitted:
            connection.send_parts(parts)

    def stop_accepting(self) -> None:
        """Close the listening socket, and each connection of a client that is not admitted at this moment."""
        self._stop_listening()
        for connection in list(self._connections):
            if not connection.is_admitted:
                connection.close()

    async def aclose(self, seconds: float = 1.0) -> None:
        """Send the queued messages, for at most `seconds`, and then close everything, as `close` does.

        Messages that arrive after the beginning of the call are not handled. If the caller is cancelled, the
        connections are closed at once. A second call during the first one closes the connections at once. A later call does nothing.
        """
        self.stop_accepting()
        try:
            for connection in list(self._connections):
                connection.finish()
            if self._connections:
                self._all_ended = self._loop.create_future()
                await done_within(self._all_ended, self._clock, seconds)
        finally:
            self.close()

    def close(self) -> None:
        """Close the listening socket and all connections at once. A second call does nothing."""
        self.stop_accepting()
        for connection in list(self._connections):
            connection.close()
        if self._timer is not None:
            self._timer.cancel()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as problem:
            if not self._cannot_accept:
                self._log.error(
                    "%s: the owner cannot accept connections, and tries again each second: %s",
                    self._name,
                    problem.strerror,
                )
            self._cannot_accept = True
            self._loop.remove_reader(listener)  # the next tick adds the listener again
            return
        self._cannot_accept = False
        accepted.setblocking(False)
        self._add(accepted)

    def _add(self, accepted: socket.socket) -> None:
        pid, uid = peer_of(accepted)
        if uid != os.geteuid():
            accepted.close()
            if uid not in self._other_users:
                self._other_users.add(uid)
                self._log.warning(
                    "%s: closed a connection of user %d: only user %d may use this state; run all processes as one user",
                    self._name,
                    uid,
                    os.geteuid(),
                )
            return
        self._connections.add(
            Connection(
                self._owner,
                accepted,
                pid,
                name=self._name,
                by_client=self._by_client,
                ended=self._remove,
                clock=self._clock,
                log=self._log,
                monotonic_ns=self._time,
            )
        )

    def _remove(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self._all_ended is not None and not self._all_ended.done():
            self._all_ended.set_result(None)

    def _tick(self) -> None:
        self._timer = self._clock.call_later(LIFE, self._tick)
        if self._cannot_accept and self._listener is not None:
            self._loop.add_reader(self._listener, self._accept, self._listener)
        now = self._clock.monotonic()
        for connection in list(self._connections):
            connection.tick(now)
