"""The claim of a shared state: its lock, and the socket to which the other processes connect.

The section "Election" of `docs/design/shared.md` has the steps.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import ParamSpec, TypeAlias, TypeVar

from lab_state.exceptions import StorageError
from lab_state.shared._address import Address, address_of
from lab_state.storage import _directory as folder
from lab_state.storage import _fs_socket as fs_socket
from lab_state.storage import _lookup as lookup
from lab_state.storage._directory import Paths
from lab_state.storage._file_start import take_lock
from lab_state.storage._fs_socket import OwnSocket
from lab_state.storage._lock import Lock, LockHolder, read_holder, refusal
from lab_state.storage._protocol import SharedSession
from lab_state.storage._worker import Threads, Worker, waited

P = ParamSpec("P")
R = TypeVar("R")

Load: TypeAlias = Callable[[str, Paths, Lock, bool], Awaitable[SharedSession]]
"""A function that loads a state. The caller holds the lock. If the function fails or is cancelled, it releases the lock. The last argument
is `whole` of `Claim.load`."""


class Listener:
    """The listening socket of an owner, and its file. The calls block. Any thread may make them.

    Attributes:
        address: The place of the socket.
        socket: The socket that is bound there.
    """

    def __init__(self, address: Address, own: OwnSocket) -> None:
        """Bind a new socket, and listen; see `_fs_socket.bind`."""
        self.address: Address = address
        self.socket: OwnSocket = own
        self._turn = threading.Lock()
        self._is_closed = False
        self._identity: lookup.Identity = fs_socket.bind(own, address)

    def is_gone(self) -> bool:
        """Return whether the file was deleted or replaced. The answer is False after `close`.

        Raises:
            StorageError: The file cannot be looked up.
        """
        with self._turn:
            return not self._is_closed and not lookup.is_file(self.address.path, self._identity)

    def replace(self, own: OwnSocket) -> bool:
        """Bind `own`, a new socket, and return True. The replaced socket stays open. After `close`, only close `own`, and return False.

        Raises:
            StorageError: See `_fs_socket.bind`. `own` is closed.
        """
        with self._turn:
            try:
                if not self._is_closed:
                    self._identity = fs_socket.bind(own, self.address)
                    self.socket = own
            finally:
                if self.socket is not own:
                    own.close()
        return self.socket is own

    def close(self) -> None:
        """Delete the file, if it still belongs to the socket. Close the socket. A second call does nothing."""
        with self._turn:
            if not self._is_closed:
                self._is_closed = True
                fs_socket.remove_own(self.address.path, self._identity)
                self.socket.close()


class Claim:
    """A shared state whose lock this process holds. The process listens at the socket. The state may not be loaded yet.

    Other processes can connect as soon as the claim exists. They wait until the user of the claim accepts the connections.

    Attributes:
        holder: This process, as the lock file names it.
    """

    def __init__(
        self, lock: Lock, listener: Listener, thread: Worker, load: Callable[[bool], Awaitable[SharedSession]]
    ) -> None:
        self.holder: LockHolder = lock.holder()
        self._lock = lock
        self._listener = listener
        self._thread = thread
        self._load = load
        self._is_loaded = False
        self._releasing: Future[None] | None = None

    def __repr__(self) -> str:
        """Return the class, and the path of the socket."""
        return f"<Claim of {self.path}>"

    @property
    def listener(self) -> OwnSocket:
        """The listening socket. It never blocks. `rebind_if_gone` may replace it."""
        return self._listener.socket

    @property
    def path(self) -> str:
        """The path of the socket."""
        return self._listener.address.path

    async def load(self, *, whole: bool = True) -> SharedSession:
        """Load the state, as `Storage.open` does. Call this once.

        Without `whole`, the snapshot may be left out of the recovery. A process that has a copy of the state seldom needs it.

        `aclose` of the session deletes the socket file, closes the listening socket and releases
        the lock, in this order. If `load` fails or is cancelled, it does the same before it raises the error.

        Raises:
            StorageError: See `Storage.open`. A `LockedError` is never raised.
        """
        self._lock.check_process()
        session = await self._load(whole)
        self._is_loaded = True
        return session

    async def rebind_if_gone(self) -> OwnSocket | None:
        """Check that the socket file is still there. If it was deleted or replaced, bind a new socket, and return it.

        Return `None` if the file is still there, or if the claim was released. The caller accepts
        connections at the new socket, and closes the old one. Connections that were accepted
        before stay open. If the caller is cancelled, the thread may still bind the new socket.
        From then on, `listener` returns it.

        Raises:
            FencedError: The lock is lost, and another process may be the owner. Nothing was bound.
            StorageError: The file could not be looked up, or no socket could be bound. Processes
                that start now cannot connect. Call again, for example a second later.
        """
        self._lock.check_process()
        if self._has_ended or not await self._run(self._is_gone):
            return None
        if self._has_ended:  # the claim was released meanwhile
            return None
        own = OwnSocket()
        return own if await self._run(self._listener.replace, own) else None

    @property
    def _has_ended(self) -> bool:
        return self._releasing is not None

    def _is_gone(self) -> bool:
        if not self._listener.is_gone():
            return False
        self._lock.check()  # without the lock, the file may be the socket of another owner
        return True

    async def release(self) -> None:
        """Release a claim that is not loaded: delete the socket file, close the listening socket and release the lock.

        After a successful `load` this call only ends the checks of the socket file: `aclose` of the
        session does the rest. Do not call this while `load` runs. If the caller is cancelled, the
        call goes on. A second call waits for the first one.
        """
        self._lock.check_process()
        if self._releasing is None:
            self._releasing = self._thread.submit(_nothing if self._is_loaded else self._lock.release)
            self._thread.shutdown()
        await waited(self._releasing)

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in the thread. It runs to its end, even if the caller is cancelled."""
        return await waited(self._thread.submit(function, *args, **kwargs))


class SharedFiles:
    """The lock files and the sockets of the states in a directory. Each coroutine does its work in a thread."""

    def __init__(self, directory: str, threads: Threads, load: Load, *, create: bool) -> None:
        """Keep the settings of a storage; see `FileStorage`."""
        self._directory = directory
        self._threads = threads
        self._load = load
        self._create = create

    async def claim(self, name: str, protocol: int) -> Claim:
        """Take the lock of a shared state, and listen at the socket of the state. The state is not loaded yet.

        If the caller is cancelled, nothing stays locked or bound.

        Args:
            name: The name of the state.
            protocol: The version of the protocol, for the lock file.

        Raises:
            LockedError: Another process, or another manager of this one, holds the lock.
            UnsupportedError: No socket can be bound in the directory. `Storage.open` lists further causes.
            UnavailableError: The cause may be gone at the next attempt, such as a full disk, or too many open files.
        """
        own, thread = OwnSocket(), Worker(self._threads)
        taking = thread.submit(_take, self._directory, name, protocol, own, create=self._create)
        try:
            paths, lock, listener = await waited(taking)
            return Claim(lock, listener, thread, partial(self._load, name, paths, lock))
        except BaseException:
            # After a cancellation, the thread may still take the lock. Release it before the caller continues.
            giving_up = thread.submit(_give_up, taking, own)
            thread.shutdown()
            await waited(giving_up)
            raise

    async def holder(self, name: str) -> LockHolder | None:
        """Return the process that the lock file names. It may be an earlier holder, and the lock may be free.

        Return `None` if there is no lock file, or if its content cannot be decoded.

        Raises:
            StorageError: The lock file cannot be read.
        """
        thread = Worker(self._threads)
        try:
            return await thread.run(_read_holder, self._directory, name)
        finally:
            thread.shutdown()

    def refusal(self, name: str, holder: LockHolder) -> StorageError | None:
        """Return the error to raise if this process cannot share a state with the holder of the lock; see `_lock.refusal`.

        `holder` may be an earlier holder. So one error alone does not prove that the state cannot be shared.
        """
        return refusal(Paths.of(self._directory, name).lock, holder)

    async def connect(self, name: str) -> OwnSocket | None:
        """Connect to the process that shares a state and holds its lock. Return `None` if no process accepts.

        The connection never blocks. Its peer runs as the user of this process. A forked child
        closes its copy. If the caller is cancelled, nothing stays connected.

        Raises:
            UnsupportedError: Another user owns the socket, or a permission is missing.
            UnavailableError: There are too many open files, or the disk fails.
        """
        own, thread = OwnSocket(), Worker(self._threads)
        connecting = thread.submit(_connect, self._directory, name, own)
        thread.shutdown()
        try:
            is_connected = await waited(connecting)
        except BaseException:
            # After a cancellation, the thread may still use the socket.
            connecting.add_done_callback(lambda _: own.close())
            raise
        if not is_connected:
            own.close()
            return None
        return own


def _take(directory: str, name: str, protocol: int, own: OwnSocket, *, create: bool) -> tuple[Paths, Lock, Listener]:
    paths, lock = take_lock(directory, name, create=create, shared=True)
    try:
        listener = Listener(address_of(paths.directory, name), own)
        lock.before_release = listener.close
        lock.announce(protocol, listener.address.socket_name)
    except BaseException:
        lock.release()
        raise
    return paths, lock, listener


def _give_up(taking: Future[tuple[Paths, Lock, Listener]], own: OwnSocket) -> None:
    if taking.exception() is None:
        _, lock, _ = taking.result()
        lock.release()
    own.close()


def _nothing() -> None:
    """Do nothing. `Claim.release` runs this in the thread, to wait until the earlier calls there have ended."""


def _read_holder(directory: str, name: str) -> LockHolder | None:
    return read_holder(Paths.of(_real_path(directory), name).lock)


def _connect(directory: str, name: str, own: OwnSocket) -> bool:
    return fs_socket.connect(own, address_of(_real_path(directory), name))


def _real_path(directory: str) -> str:
    """Return the path of a directory without symbolic links. A missing directory is accepted."""
    return os.path.realpath(folder.absolute(directory))
