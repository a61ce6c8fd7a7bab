"""The lock of a state on disk, and the message for a process that cannot take it."""

from __future__ import annotations

import functools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated

import msgspec

from lab_state import _forks as forks
from lab_state._not_json import NOT_JSON
from lab_state.exceptions import FencedError, LockedError, StorageError, UnsupportedError
from lab_state.storage import _fs as fs
from lab_state.storage import _lookup as lookup
from lab_state.storage._proc_locks import find_holders


class LockHolder(msgspec.Struct, frozen=True):
    """The content of a lock file: the process that holds the lock, and its temporary files.

    Every user with write access to the file can write anything to it. The bounds of the fields keep
    line breaks and escape sequences out of messages and logs.

    Attributes:
        host: The name of the machine.
        pid: The id of the process.
        started: The local time at which the process took the lock, with the time zone.
        boot: The boot id of the kernel; empty if it cannot be read, or if `making` may lack files of earlier sessions.
        inode: The inode number of the lock file. A copy of the file has another number.
        making: The names of temporary files that may exist, of this session and of earlier ones.
        protocol: The version of the protocol by which the process shares the state; 0 if it does
            not share it.
        socket: The name of the socket of a shared state.
        kernel: The boot id of the kernel, if the state is shared. It is the same in all containers
            of a machine.
    """

    host: Annotated[str, msgspec.Meta(pattern=r"^[\w.:?-]{1,255}\Z")]
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    started: Annotated[str, msgspec.Meta(pattern=r"^[0-9T:+-]{1,40}\Z")]
    boot: str = ""
    inode: int = 0
    making: tuple[str, ...] = ()
    protocol: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    socket: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{0,133}\Z")] = ""
    kernel: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f-]{0,64}\Z")] = ""

    def __str__(self) -> str:
        """Return the process, the machine and the time, for a message."""
        return f"pid {self.pid} on {self.host}, since {self.started}"


_REMEDY = (
    "stop that writer first, use another name for this state, or let processes of one machine share it with "
    "Config(shared=True) in each of them"
)


class Lock:
    """An advisory lock on a file that is never renamed and never unlinked.

    It uses `flock`, not `lockf`. A lock of `lockf` is dropped when the process closes any
    descriptor of the file. Such a lock also does not exclude another manager in the same process.

    Attributes:
        path: The path of the lock file.
        is_parents: Whether this process is a forked child, and the lock belongs to its parent.
        is_new: Whether the lock file was empty, as a new lock file is.
        left: The temporary files that earlier sessions may have left; `None` if they are
            not known.
        before_release: A function that `release` calls while the lock is still held. It must
            not raise.
    """

    def __init__(self, path: str, *, shared: bool = False) -> None:
        """Take the lock.

        Args:
            path: The path of the lock file. A missing file is created.
            shared: Whether the caller shares the state. If so, the text of a `LockedError` has no remedy, because
                `Election.role` adds its own.

        Raises:
            LockedError: Another process, or another lock of this process, has the lock.
            StorageError: The lock file cannot be opened, read or locked.
        """
        self.path: str = path
        self.is_parents: bool = False
        self._fd = -1
        self._identity = lookup.NO_FILE
        self.is_new: bool = True
        self.left: tuple[str, ...] | None = None
        self._making: set[str] = set()
        self.before_release: Callable[[], None] | None = None
        self._telling = threading.Lock()
        self._sharing: tuple[int, str, str] = (0, "", "")
        self._remedy = "" if shared else f": {_REMEDY}"
        self._since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._opening = True
        forks.disown_in_children(self)  # this comes before the file is opened, because a fork can happen at any time
        try:
            self._fd = fs.open_lock(path)
            self._identity = lookup.identity(self._fd, path)
            self._opening = False
            self._acquire()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        if self._opening:  # the identity is not known yet, so `_close` could not check the descriptor
            fs.close(self._fd)
        self._opening = False
        self._close()

    def _acquire(self) -> None:
        if not fs.try_lock(self._fd, self.path):
            raise LockedError(f"{self.path} is locked by {self._who()}{self._remedy}")
        _ours[self._identity] = self
        said = fs.read_lock(self._fd, self.path)
        self.is_new, self.left = not said, self._left(said)
        self._tell()

    def _left(self, said: bytes) -> tuple[str, ...] | None:
        """Return the temporary files that the lock file lists; `None` if its content may be wrong.

        The content may be wrong in a copied lock file, or after a power cut, which can undo the last write. So
        the content must have the boot id of the running kernel, and the inode of this file.
        """
        try:
            last = msgspec.json.decode(said, type=LockHolder)
        except NOT_JSON:
            return None
        directory, name = os.path.split(self.path.removesuffix(".lock"))
        ours = re.compile(re.escape(name) + r"\.(json|journal)\.[0-9a-f]{8}\.tmp")
        if not _boot() or (last.boot, last.inode) != (_boot(), self._identity[1]):
            return None
        if not all(map(ours.fullmatch, last.making)):
            return None
        return tuple(os.path.join(directory, file) for file in last.making)

    def _tell(self) -> None:
        """Write the holder of the lock, and the temporary files that may exist, to the lock file.

        If other code closed the descriptor, its number may belong to another file. Then nothing
        is written.
        """
        if not lookup.is_open(self._fd, self._identity):
            return
        fs.write_lock(self._fd, msgspec.json.encode(self.holder()) + b"\n")

    def holder(self) -> LockHolder:
        """Return the content of the lock file while this process holds the lock."""
        making = (*(self.left or ()), *self._making)
        return LockHolder(
            _host(),
            os.getpid(),
            self._since,
            "" if self.left is None else _boot(),
            self._identity[1],
            tuple(sorted(map(os.path.basename, making))),
            *self._sharing,
        )

    def announce(self, protocol: int, socket_name: str) -> None:
        """Write to the lock file that this process shares the state, with the version of the protocol and the socket."""
        with self._telling:
            self._sharing = protocol, socket_name, _boot()
            self._tell()

    def note(self, *paths: str) -> None:
        """Write names of temporary files to the lock file, before the files are created. The next start deletes files that are left."""
        with self._telling:
            self._making.update(paths)
            self._tell()

    def forget(self, *paths: str) -> None:
        """Remove names of temporary files from the lock file. Keep the names of files that still exist."""
        with self._telling:
            self._making.difference_update([path for path in paths if lookup.is_gone(path)])
            self._tell()

    @contextmanager
    def noted(self, *paths: str) -> Generator[None]:
        """Call `note` before the block and `forget` after it."""
        self.note(*paths)
        try:
            yield
        finally:
            self.forget(*paths)

    def note_left(self, left: tuple[str, ...]) -> None:
        """Write to the lock file which files of earlier sessions still exist: those of `left` that are not gone.

        Their names replace the earlier names of such files.
        """
        left = tuple(path for path in left if not lookup.is_gone(path))
        with self._telling:
            if self.left != left:
                self.left = left
                self._tell()

    def _who(self) -> str:
        try:
            holder = msgspec.json.decode(fs.read_lock(self._fd, self.path), type=LockHolder)
        except NOT_JSON:  # the holder has not written its name yet, or could not write it
            holder = None
        if self._identity in _ours:
            who = f"pid {os.getpid()}" if holder is None else str(holder)
            return f"{who}, another manager in this process (was its stop() called?)"
        shown = [pid for pid in find_holders(*self._identity, fs.read) or () if pid]
        return describe(holder, shown, self.path)

    def check_process(self) -> None:
        """Check that this process took the lock. The call does not block.

        Raises:
            UnsupportedError: This process is a forked child. Its parent took the lock, and only the parent has the
                threads that write.
        """
        if self.is_parents:  # pragma: no cover -- a child's coverage is not collected
            raise UnsupportedError(
                f"{self.path} is locked by the parent of this forked process: make a manager with another name here, or stop the manager of the parent"
            )

    def check(self) -> None:
        """Check that the path still names the locked file, and that the lock is still held.

        Raises:
            FencedError: The lock is lost: the file was deleted or replaced, or other code in
                this process closed its descriptor. Another process may own the state now.
            StorageError: The path cannot be looked up. It is not known whether the lock is lost.
        """
        if lookup.both_refer_to(self.path, self._fd, self._identity):
            return
        if not lookup.is_file(self.path, self._identity):
            raise FencedError(
                f"{self.path} was deleted or replaced, so another writer may own the state: end this process, and start it again"
            )
        if not lookup.is_open(self._fd, self._identity):
            raise FencedError(
                f"{self.path} is no longer locked: other code in this process closed its descriptor, "
                "so another writer may own the state: end this process, and start it again"
            )

    def release(self) -> None:
        """Release the lock. A second call does nothing. A descriptor that now belongs to another file is not closed."""
        try:
            if self.before_release is not None:
                self.before_release()
            # Unlock before closing, because a child that is forked now may keep a copy of the descriptor.
            if lookup.is_open(self._fd, self._identity):
                fs.unlock(self._fd)
        finally:
            self._close()

    def _close(self) -> None:
        fd, is_open = self._fd, lookup.is_open(self._fd, self._identity)
        if _ours.get(self._identity) is self:
            del _ours[self._identity]
        self._fd, self._identity = -1, lookup.NO_FILE
        if is_open:
            fs.close(fd)

    def disown(self) -> None:  # pragma: no cover -- runs in a forked child, whose coverage is not collected
        """Close the descriptor. This runs in a forked child. The parent keeps the lock."""
        self.is_parents = True
        self._close()
        if self._opening:  # the identity was not known yet when the parent forked
            for fd in lookup.descriptors(self.path):
                fs.close(fd)


_ours: dict[lookup.Identity, Lock] = {}
"""The locks that this process holds. A lock file cannot show this: processes in two containers can have the same pid and host name."""


def describe(holder: LockHolder | None, shown: list[int], path: str) -> str:
    """Return a description of the process that holds a lock, for the message of another process.

    Args:
        holder: The content of the lock file; `None` if it cannot be decoded.
        shown: The pids of the processes that took the lock, from `/proc/locks`. Empty if that
            file does not show them.
        path: The path of the lock file.
    """
    host = _host()
    for pid in shown:
        who = str(holder) if holder is not None and holder.pid == pid else f"pid {pid} on {host}"
        if _is_running(pid):
            return who
        return f"a child of {who}; that parent has ended (`fuser {path}` finds the child)"
    if holder is None:
        return "another writer"
    if holder.host == host and holder.pid == os.getpid():
        return f"{holder}, in another container"
    if holder.host == host and not _is_running(holder.pid):
        return f"{holder}, which does not run here: it is in another container, or its child holds the lock"
    return str(holder)


def read_holder(path: str) -> LockHolder | None:
    """Return the content of a lock file. It may name an earlier holder.

    Return `None` if there is no such file, or if its content cannot be decoded.

    Raises:
        StorageError: The file cannot be read.
    """
    try:
        return msgspec.json.decode(fs.read(path, 4096) or b"", type=LockHolder)
    except NOT_JSON:
        return None


def is_here(holder: LockHolder) -> bool:
    """Return whether a lock file names a process of this machine. The process may have ended.

    Containers of one machine have different host names, and different machines may have equal host names.
    So the boot ids of the kernels are compared, if both are known. Otherwise the host names are compared.
    A holder that does not share its state writes its boot id only to `boot`.
    """
    known = holder.kernel or holder.boot
    return known == _boot() if known and _boot() else holder.host == _host()


def refusal(path: str, holder: LockHolder) -> StorageError | None:
    """Return the error for this process if it cannot share a state with the holder of the state's lock; `None` if it can.

    Args:
        path: The path of the lock file.
        holder: The content of the lock file.
    """
    if not is_here(holder):
        return UnsupportedError(
            f"{path} is locked by {holder}, on another machine: a shared state needs all of its processes on one "
            "machine; start this process there, or use a directory that only this machine has"
        )
    if not holder.protocol:
        return LockedError(
            f"{path} is locked by {holder}, which does not share this state: start that process with "
            "Config(shared=True) as well, or stop it"
        )
    return None


@functools.cache
def _boot() -> str:
    """Return the boot id of the kernel; empty if it cannot be read."""
    try:
        return (fs.read("/proc/sys/kernel/random/boot_id") or b"").decode("ascii", "replace").strip()
    except StorageError:
        return ""


def _host() -> str:
    """Return the name of this machine, with only characters that are safe in a message."""
    return "".join(char if char.isalnum() or char in "_.:-" else "?" for char in socket.gethostname())[:255] or "?"


def _is_running(pid: int) -> bool:
    """Return whether a process with this pid exists in this pid namespace, or in the namespace that `/proc` shows."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return lookup.fingerprint(f"/proc/{pid}") is not None
    except PermissionError:  # the process belongs to another user, and `/proc` may hide it
        return True
    return True
