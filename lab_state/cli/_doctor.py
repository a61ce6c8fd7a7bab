"""The subcommand `doctor`: a report on what a state needs to work. The state is not changed. In a bucket, the check writes the probe."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lab_state._catalog import list_states
from lab_state._loading import load
from lab_state.cli._client import Client
from lab_state.cli._exits import USAGE, Stop, code_of, is_missing
from lab_state.cli._output import Output
from lab_state.cli._storages import storage_at
from lab_state.cli._target import Target
from lab_state.cli._text import counted, live_text, size_text
from lab_state.exceptions import StorageError
from lab_state.shared._address import address_of
from lab_state.storage import _fs as fs
from lab_state.storage._directory import Paths
from lab_state.storage._proc_locks import MOUNTS
from lab_state.storage._protocol import Storage
from lab_state.storage.file import FileStorage

_ROOM = 4 * 1024 * 1024
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_SHARED = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "glusterfs")
"""File systems that other machines may use at the same time. On these, a lock and a sync may guarantee less."""


_LEFT = re.compile(r"(?:json|journal)\.(torn|replaced)-\d+|(damaged)-\d+(?:-\d+)?")
_LEFT_TEXTS = {
    "replaced": "another program had put this file in the place of the state; look at it, and delete it",
    "torn": "the torn end of a journal; you may delete it",
    "damaged": "damaged files that a repair or a restore has kept; delete them when they are no longer needed",
}


class Line(NamedTuple):
    """A line of the report.

    Attributes:
        subject: The name of the check, such as `socket`.
        is_good: Whether the check found no fault.
        text: The result of the check. The text of most faults has the remedy, too.
    """

    subject: str
    is_good: bool
    text: str


async def doctor(output: Output, state: Target, *, json: bool) -> None:
    """Print the report. The exit code is that of a reading of the state."""
    storage = storage_at(state.place)
    lines: list[Line] = []
    size, failure = 0, None
    try:
        loaded = await load(state.name, storage)
    except StorageError as error:
        if is_missing(error) or code_of(error) == USAGE:  # a path through a file is a wrong argument
            raise
        failure = error
        lines.append(Line("content", False, str(error)))
    else:
        size = loaded.size
        content = f"{counted(len(loaded.state.entries), 'key')}, {size_text(size)}, revision {loaded.state.revision}"
        lines.append(Line("content", True, f"{content}, durable up to {loaded.durable_revision}"))
    lines += await (
        _of_files(storage, state, size) if isinstance(storage, FileStorage) else _of_a_bucket(storage, state)
    )
    if json:
        output.one(checks=[{"subject": one.subject, "ok": one.is_good, "text": one.text} for one in lines])
    else:
        for line in lines:
            mark = "ok  " if line.is_good else "LOOK"
            output.line(f"{mark}  {output.text(line.subject)}: {output.text(line.text)}")
    if failure is not None:
        raise Stop(code_of(failure))


async def _of_a_bucket(storage: Storage, state: Target) -> list[Line]:
    """Return a line that says whether the store honours conditions. The check writes the probe, as each start does."""
    from lab_state.storage.s3 import S3Storage  # noqa: PLC0415 -- only a bucket needs it
    from lab_state.storage.s3._open import probe  # noqa: PLC0415 -- only a bucket needs it

    assert isinstance(storage, S3Storage)
    try:
        await storage._run(state.name, probe)  # noqa: SLF001 -- a storage has no public call for this check
    except StorageError as error:
        return [Line("store", False, str(error))]
    return [Line("store", True, "it refuses a write whose condition is not met; a start can write there")]


async def _of_files(storage: FileStorage, state: Target, size: int) -> list[Line]:
    directory, name = _real(state.place.directory), state.name
    lines: list[Line] = []
    try:
        listed = await list_states(storage)
    except StorageError as error:
        lines.append(Line("holder", False, str(error)))
    else:
        lines += [
            Line("holder", one.live is not None, one.holder or live_text(one.live))
            for one in listed
            if one.name == name
        ]
    lines.append(await _socket(storage, name, directory))
    lines += _checked("directory", functools.partial(_permissions, directory, name))
    lines += _checked("file system", functools.partial(_file_system, directory))
    lines += _checked("room", functools.partial(_room, directory, size))
    lines += _checked("files that were left", functools.partial(_leftovers, directory, name))
    return lines


def _checked(subject: str, check: Callable[[], Iterable[Line]]) -> Iterator[Line]:
    """Yield the lines of a check. If the system does not allow the check, yield its error in place of the other lines."""
    try:
        yield from check()
    except OSError as error:
        yield Line(subject, False, f"this cannot be checked: {error.strerror}")


async def _socket(storage: FileStorage, name: str, directory: str) -> Line:
    try:
        if _status(address_of(directory, name).path) is None:
            return Line("socket", True, "none: the state is not shared, or does not run")
    except OSError as error:
        return Line("socket", False, f"this cannot be checked: {error.strerror}")
    client = Client(storage, name)
    try:
        if await client.connect():
            return Line("socket", True, f"pid {client.pid} answers, durable revision {client.revision}")
    except StorageError as error:
        return Line("socket", False, str(error))
    finally:
        await client.aclose()
    return Line(
        "socket",
        False,
        "no process answers: the file is left from a process that was killed, and the next start replaces it",
    )


def _real(path: str) -> str:
    return os.path.realpath(path)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _permissions(directory: str, name: str) -> Iterator[Line]:
    can_write = os.access(directory, os.W_OK | os.X_OK)
    yield Line("directory", can_write, f"{directory} {'can' if can_write else 'cannot'} be written by this user")
    for path in Paths.of(directory, name)[1:]:
        status = _status(path)
        if status is None:
            continue
        owner, mode = status.st_uid, stat.S_IMODE(status.st_mode)
        text = f"owner {owner}, mode {mode:04o}"
        if owner != os.geteuid():
            yield Line(os.path.basename(path), False, f"{text}: the command runs as user {os.geteuid()}")
        elif mode & _OTHERS:
            yield Line(os.path.basename(path), False, f"{text}: other users have access")
        else:
            yield Line(os.path.basename(path), True, text)


def _file_system(directory: str) -> Iterator[Line]:
    mounts = (fs.read(MOUNTS) or b"").decode(errors="replace")
    yield of_file_system(file_system(mounts, os.stat(directory).st_dev))


def of_file_system(kind: str) -> Line:
    """Return the line for a type of file system."""
    if kind in _SHARED:
        return Line(
            "file system", False, f"{kind}: use a local disk, since other machines may write there without the lock"
        )
    return Line(
        "file system", kind != "tmpfs", f"{kind}{': a restart of the machine deletes the state' * (kind == 'tmpfs')}"
    )


def file_system(mounts: str, device: int) -> str:
    """Return the type of the file system of a device, from the text of `/proc/self/mountinfo`; `unknown` if it is not there."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split()[2:3] == [wanted]:
            return rest.split(" ", 1)[0]
    return "unknown"


def _room(directory: str, size: int) -> Iterator[Line]:
    found = os.statvfs(directory)
    free, needed = found.f_bavail * found.f_frsize, 2 * size + _ROOM
    yield Line("room", free >= needed, f"{size_text(free)} free; a checkpoint may need {size_text(needed)}")


def _leftovers(directory: str, name: str) -> Iterator[Line]:
    """Yield a line for each file that a fault or a repair has left beside the state. The files of other states are skipped."""
    for entry in sorted(os.listdir(directory)):
        found = _LEFT.fullmatch(entry.removeprefix(f"{name}.")) if entry.startswith(f"{name}.") else None
        if found is not None:
            kind = found[1] or found[2]
            yield Line(entry, kind == "torn", _LEFT_TEXTS[kind])
