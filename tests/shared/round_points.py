"""What is patched in a process of a round: points at which it kills itself, faults, small bounds. Only the worker uses it.

The package itself has no such hook. Each patch wraps a function of the package by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import inspect
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from round_life import Bounds, Disk, Life, Network, Trap

from lab_state.shared import _clients as clients
from lab_state.shared._checks import RecentChanges
from lab_state.shared._last_records import LastRecords
from lab_state.storage import _fs as fs
from lab_state.storage._claim import SharedFiles
from lab_state.storage._file_writer import Writer
from lab_state.storage._fs_socket import OwnSocket

SHARED, STORAGE = "lab_state.shared.", "lab_state.storage."

POINTS: dict[str, tuple[str, str, str]] = {
    # An owner, in the order of a call
    "call comes": (f"{SHARED}_engine", "Engine.call", "before"),
    "call applied": (f"{SHARED}_engine", "Engine.call", "after"),
    "record taken": (f"{SHARED}_engine", "Engine.begin", "after"),
    "before the write": (f"{STORAGE}_fs", "append", "before"),
    "after the write": (f"{STORAGE}_fs", "_sync_or_tear", "before"),
    "after the sync": (f"{STORAGE}_fs", "append", "after"),
    "before it is shown": (f"{SHARED}_owner_flusher", "OwnerFlusher._succeeded", "before"),
    "record queued": (f"{SHARED}_owner", "Owner.record", "after"),
    "answers queued": (f"{SHARED}_owner", "Owner.answers", "after"),
    "shown": (f"{SHARED}_owner_flusher", "OwnerFlusher._succeeded", "after"),
    # A takeover
    "socket bound": (f"{SHARED}_owner", "Owner.listen", "after"),
    "loaded": (f"{SHARED}_member", "find", "before"),
    "settling": (f"{SHARED}_member", "settle", "before"),
    "settled": (f"{SHARED}_member", "settle", "after"),
    "own calls": (f"{SHARED}_port", "SharedPort.own", "before"),
    "own calls made": (f"{SHARED}_port", "SharedPort.own", "after"),
    "others greeted": (f"{SHARED}_server", "Server.greet_waiting", "after"),
    # A follower
    "hello sent": (f"{SHARED}_follower", "Follower.open", "after"),
    "welcome comes": (f"{SHARED}_follower", "Follower.welcomed", "before"),
    "welcomed": (f"{SHARED}_follower", "Follower.welcomed", "after"),
    "load begins": (f"{SHARED}_follower", "Follower._read", "before"),
    "load read": (f"{SHARED}_follower", "Follower._read", "after"),
    "call sent": (f"{SHARED}_open_calls", "OpenCall.sent", "after"),
    "record comes": (f"{SHARED}_follower", "Follower.record", "before"),
    "connection lost": (f"{SHARED}_follower", "Follower.ended", "after"),
    "answers come": (f"{SHARED}_follower", "Follower.answers", "before"),
    # Checkpoints and the end
    "checkpoint begins": (f"{STORAGE}file", "FileSession._checkpoint", "before"),
    "snapshot written": (f"{STORAGE}_file_writer", "Writer.prepare", "before"),
    "snapshot in place": (f"{STORAGE}_file_writer", "Writer.publish", "after"),
    "stop begins": (f"{SHARED}_owner", "Owner.begin_stop", "after"),
    "handing over": (f"{SHARED}_owner", "Owner.hand_over", "before"),
    "handed over": (f"{SHARED}_owner", "Owner.hand_over", "after"),
    "last record sent": (f"{SHARED}_owner", "Owner.finish", "before"),
    "connections closed": (f"{SHARED}_owner", "Owner.finish", "after"),
    "farewell comes": (f"{SHARED}_owner", "Owner.farewell", "after"),
}
"""Each named point: a module, a function or a method, and on which side of it the point lies."""

Say = Callable[[str], object]


def install(life: Life, say: Say) -> None:
    """Patch this process for its life. `say` notes what happens in the history."""
    for trap in life.traps:
        _set_trap(trap, say)
    _set_bounds(life.bounds, life.owner_timeout)
    _set_disk(life.disk, random.Random(f"{life.seed} disk"), say)
    if life.network.share:
        _set_network(life.network, random.Random(f"{life.seed} network"))


def wrap(module: str, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function, or a method `Class.name`, by what `make` returns for it."""
    holder: Any = import_module(module)
    *classes, last = name.split(".")
    for part in classes:
        holder = getattr(holder, part)
    original = getattr(holder, last)
    setattr(holder, last, functools.wraps(original)(make(original)))


def _set_trap(trap: Trap, say: Say) -> None:
    module, name, side = POINTS[trap.point]
    visits = 0
    lock = threading.Lock()

    def visit() -> None:
        nonlocal visits
        with lock:
            visits += 1
            is_now = visits == trap.nth
        if is_now:
            say(f"{trap.action} at {trap.point}")
            if trap.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal may come a moment later
            freeze(trap.seconds)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(original):

            async def waited(*args: Any, **kwargs: Any) -> Any:
                if side == "before":
                    visit()
                result = await original(*args, **kwargs)
                if side == "after":
                    visit()
                return result

            return waited

        def called(*args: Any, **kwargs: Any) -> Any:
            if side == "before":
                visit()
            result = original(*args, **kwargs)
            if side == "after":
                visit()
            return result

        return called

    wrap(module, name, make)


def freeze(seconds: float) -> None:
    """Stop this process. The driver lets it go on after a time."""
    os.write(1, b"frozen %d %d\n" % (os.getpid(), seconds * 1000))
    os.kill(os.getpid(), signal.SIGSTOP)


def _set_bounds(bounds: Bounds, owner_timeout: float) -> None:
    owner, member, link, server = (import_module(f"{SHARED}_{name}") for name in ("owner", "member", "link", "server"))
    constants: list[tuple[Any, str, float]] = [(member, "_LOOK_EVERY", 0.05)]
    if bounds.forgotten_after:
        constants.append((clients, "FORGOTTEN_AFTER", int(bounds.forgotten_after * 1_000_000_000)))
        constants.append((owner, "TICK", bounds.forgotten_after / 4))
    if owner_timeout < 1:  # calls are given up, so signs of life must come more often
        constants += [(link, "LIFE", 0.05), (server, "LIFE", 0.05), (member, "_SILENT", 0.15)]
    if bounds.many_keys:
        constants.append((import_module("lab_state._batch"), "MANY", bounds.many_keys))
        constants.append((import_module(f"{SHARED}_follower"), "_SMALL", 64 * bounds.many_keys))
    for module, name, value in constants:
        assert hasattr(module, name)
        setattr(module, name, value)
    if bounds.kept_records:
        LastRecords.__init__.__defaults__ = (bounds.kept_records,)
    if bounds.recent_keys:
        RecentChanges.__init__.__defaults__ = (bounds.recent_keys,)


def _set_disk(disk: Disk, rng: random.Random, say: Say) -> None:
    writes = syncs = 0

    def syncing(original: Callable[..., Any]) -> Callable[..., Any]:
        def sync(fd: int) -> None:
            nonlocal syncs
            syncs += 1
            time.sleep(disk.delay)
            original(fd)
            if syncs in disk.failing:
                say(f"sync {syncs} fails")
                raise OSError(errno.EIO, "the disk failed")

        return sync

    def writing(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(fd: int, parts: Any, offset: int, progress: Any) -> int:
            nonlocal writes
            writes += 1
            if writes in disk.full:
                say(f"write {writes} fails")
                raise OSError(errno.ENOSPC, "the disk is full")
            return int(original(fd, parts, offset, progress))

        return write

    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        async def read(*args: Any) -> Any:
            result = await original(*args)
            await asyncio.sleep(rng.random() * disk.load_delay)
            return result

        return read

    def waiting(original: Callable[..., Any]) -> Callable[..., Any]:
        def append(*args: Any) -> None:
            time.sleep(disk.before)
            original(*args)

        return append

    if disk.before:
        wrap(fs.__name__, "append", waiting)
    if disk.delay or disk.failing:
        wrap(fs.__name__, "_sync_data", syncing)
    if disk.full:
        wrap(fs.__name__, "_write", writing)
    if disk.load_delay:
        wrap(f"{STORAGE}file", "FileStorage.read", reading)
    if disk.checkpoint_at:
        Writer.checkpoint_bytes = property(lambda self: disk.checkpoint_at)  # type: ignore[method-assign,assignment]


# The network


def _set_network(network: Network, rng: random.Random) -> None:
    def connecting(original: Callable[..., Any]) -> Callable[..., Any]:
        async def connect(self: SharedFiles, name: str) -> OwnSocket | None:
            real: OwnSocket | None = await original(self, name)
            if real is None or rng.random() >= network.share:
                return real
            return _Proxy(real, network, random.Random(rng.random())).near

        return connect

    wrap(f"{STORAGE}_claim", "SharedFiles.connect", connecting)


class _Proxy:
    """Two threads between a follower and its owner, which cut, delay and split what they pass on.

    Attributes:
        near: The socket of the follower.
    """

    def __init__(self, real: OwnSocket, network: Network, rng: random.Random) -> None:
        near, inner = socket.socketpair()
        self.near: OwnSocket = OwnSocket(fileno=near.detach())
        self.near.setblocking(False)
        self._network = network
        self._ends = real, inner
        until = float("inf")
        if network.cut_after:
            share = rng.uniform(0.6, 1.4) if network.is_steady else rng.expovariate(1)
            until = time.monotonic() + share * network.cut_after
        real.setblocking(True)
        for one, other in ((real, inner), (inner, real)):
            seeded = random.Random(rng.random())
            threading.Thread(target=self._pass_on, args=(one, other, until, seeded), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, until: float, rng: random.Random) -> None:
        network = self._network
        with contextlib.suppress(OSError):  # such as `TimeoutError`: then the connection is cut
            if network.cut_after:
                one.settimeout(max(0.001, until - time.monotonic()))
            while data := one.recv(65536):
                while data and time.monotonic() < until:
                    size = rng.randint(1, 200) if network.is_split else len(data)
                    if network.delay:
                        time.sleep(rng.random() * network.delay)
                    other.sendall(data[:size])
                    data = data[size:]
                if network.cut_after:
                    one.settimeout(max(0.001, until - time.monotonic()))
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
