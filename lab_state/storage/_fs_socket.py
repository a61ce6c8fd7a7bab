"""The system calls on the socket of a shared state: bind, connect, and the user of a peer.

A socket file has no content, and no commit relies on it. So it is never synced. The calls may block
on a slow file system, except the calls that make or accept a socket.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Generator
from typing import Any, NamedTuple

from lab_state import _forks as forks
from lab_state.exceptions import StorageError, UnsupportedError
from lab_state.shared._address import Address
from lab_state.storage import _lookup as lookup
from lab_state.storage._os_errors import may_pass, storage_error, translated

_BACKLOG = 128
"""The largest number of connections that wait to be accepted. Each of them is one process."""

_PEER = struct.Struct("=iII")
"""The format of `struct ucred` in Linux: the process id, the user and the group."""

_NOT_THERE = {errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.EPROTOTYPE, errno.ENOTDIR}
"""The errors of `connect` if no process accepts: no file, no listener, a full backlog, another type of file or socket."""


class OwnSocket(socket.socket):
    """A stream socket of this process. A forked child closes its copy.

    Otherwise a child that runs longer than its parent would keep the connections of the parent, and
    the process at the other end would wait for a process that has ended. Make the socket in the thread of
    the event loop, before it is bound or connected. Then the socket is registered before a fork can copy a connection of it.
    """

    def __init__(self, *, fileno: int | None = None) -> None:
        """Make a socket that never blocks. With `fileno`, take over this descriptor of a socket.

        Raises:
            UnavailableError: There are too many open files.
            UnsupportedError: This system is not Linux.
        """
        if sys.platform != "linux":  # pragma: no cover -- never run there
            raise UnsupportedError("a shared state needs Linux, for SO_PEERCRED")
        with translated("making", "a socket"):
            super().__init__(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fileno)
        self.setblocking(False)
        forks.disown_in_children(self)

    def accept(self) -> tuple[OwnSocket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: No connection waits.
            OSError: See `socket.accept`.
        """
        accepted, address = super().accept()
        return OwnSocket(fileno=accepted.detach()), address

    def dup(self) -> OwnSocket:
        """Return another descriptor of the same socket, which a forked child closes as well.

        Raises:
            UnavailableError: There are too many open files.
        """
        with translated("making", "a socket"):
            return OwnSocket(fileno=os.dup(self.fileno()))

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close this copy. This runs in a forked child. The connection of the parent stays open."""
        if (descriptor := self.detach()) >= 0:
            os.close(descriptor)  # `close()` of a socket does nothing while uvloop watches it


def bind(own: OwnSocket, address: Address) -> lookup.Identity:
    """Delete the file at the address, even if it is not a socket. Bind the socket there and listen. Return the identity of the new file.

    Only the holder of the lock may call this. Only the user of this process can connect.

    Raises:
        UnavailableError: The disk is full, or there are too many open files.
        UnsupportedError: A directory is in the place of the socket. Or the socket cannot be bound
            for another reason, such as a missing permission.
    """
    path = address.path
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with _reachable(address) as reachable:
            os.fchmod(own.fileno(), 0o600)  # `bind` gives this mode to the file from the beginning
            own.bind(reachable)
        try:
            own.listen(_BACKLOG)
            found = os.lstat(path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
    except OSError as error:
        failure = storage_error("listening at", path, error)
        if may_pass(error) or isinstance(failure, UnsupportedError):
            raise failure from error
        raise UnsupportedError(f"{failure}; a shared state needs a directory that can have a socket") from error
    return found.st_dev, found.st_ino


def remove_own(path: str, which: lookup.Identity) -> None:
    """Delete a socket file, if it still has this identity. Ignore errors, because the next owner deletes the file anyway."""
    with contextlib.suppress(OSError, StorageError):
        if lookup.is_file(path, which):
            os.unlink(path)


def connect(own: OwnSocket, address: Address) -> bool:
    """Connect a socket. Return whether a process listens at the address, and can accept.

    Raises:
        UnavailableError: There are too many open files, or the disk fails.
        UnsupportedError: Another user listens there, or a permission is missing.
    """
    path = address.path
    try:
        with _reachable(address) as reachable:
            own.connect(reachable)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        if error.errno == errno.EACCES:
            _check_user(path, lookup.user_of(path))
        raise storage_error("connecting to", path, error) from error
    _check_user(path, peer_of(own).uid)
    return True


class Peer(NamedTuple):
    """The process at the other end of a connection: its id, and its effective user."""

    pid: int
    uid: int


def peer_of(connected: socket.socket) -> Peer:
    """Return the process at the other end, as it was when it connected or began to listen.

    Raises:
        OSError: The socket is closed.
    """
    said = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _ = _PEER.unpack(said)
    return Peer(pid, uid)


def _check_user(path: str, uid: int | None) -> None:
    if uid not in (None, os.geteuid()):
        raise UnsupportedError(
            f"{path} is the socket of user {uid}, and this process runs as user {os.geteuid()}: "
            "run all processes of a shared state as one user"
        )


@contextlib.contextmanager
def _reachable(address: Address) -> Generator[str]:
    """Return a path of the socket that fits into `sockaddr_un`, for the time of the block."""
    if address.is_direct:
        yield address.path
        return
    directory = os.open(address.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield address.through(directory)
    finally:
        os.close(directory)
