"""The function `copy_state`. It copies a state from one storage to another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal, TypeAlias

import msgspec

from lab_state._argument_types import check_storage
from lab_state._codec import LoadedState, decode_snapshot, encode_snapshot, replay
from lab_state._loading import load, view_of
from lab_state._values import encode
from lab_state.config import Config
from lab_state.exceptions import StorageError, UnsupportedError
from lab_state.storage._protocol import Recovery, Storage, StorageSession, no_state

Progress: TypeAlias = Callable[[Literal["read", "written", "verified"], int], object]
"""A callback that gets the name of a step, and the number of bytes that this step has processed so far.

`"written"` is reported after each slice, `"read"` and `"verified"` once at the end of the step.
"""

_AT_ONCE = 1000


async def copy_state(name: str, source: Storage, target: Storage, *, progress: Progress | None = None) -> int:
    """Copy a state to another storage, and read the copy back to compare it.

    The source is read as by `read_state`: the state is not opened, nothing is written to the source, and
    a manager may be running on it. The copy is the state at one moment between call and return.
    It has every change that was durable when the call began. To move a state, stop its manager first,
    because later changes are not in the copy.

    When the call returns, the copy is durable, and has the revision of the source. If the call raises an
    error or is cancelled, there may be a copy in the target. Delete that copy before you try again.
    If the error says that the target already has a state, nothing was written: do not delete that state.

    During the comparison the state is in memory at least twice. Decoding blocks the event loop, as in
    `start()`. So call this function in a script, or before a service starts.

    Args:
        name: The name of the state in both storages.
        source: The storage that has the state. Permission to read it is enough.
        target: The storage for the copy. It must have no state of this name.
        progress: A function that gets `"read"`, `"written"` or `"verified"`, and the number of
            bytes so far. It is called on the event loop.

    Returns:
        The number of keys that were copied, including expired keys that are not removed yet.

    Raises:
        InvalidNameError: The name is not valid; see `Config.name`.
        TypeError: The source or the target is not a storage, or the source has no method `read`. Or the name is not a
            `str`, or `progress` is not callable.
        UnsupportedError: The target has a state of this name. Or the source has no state of this name, or
            only an empty state that was never written. Or one of the storages cannot be used; the message says why.
        LockedError: A manager has a state of this name open in the target.
        StorageError: Reading or writing failed; see `Storage` and `StorageSession`. Or the copy differs from the source.
    """
    name = Config(name=name).name
    check_storage(target, "target")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function, not {type(progress).__name__}")
    return await copy_as(name, source, name, target, progress or _silent)


async def copy_as(name: str, source: Storage, new_name: str, target: Storage, tell: Progress) -> int:
    """Copy a state to a state of another name; see `copy_state`."""
    loaded = await load(name, source)
    if not loaded.size:
        raise no_state(loaded.path, ": check the name and the storage")
    tell("read", loaded.size)
    state = loaded.state._replace(results=None)  # the copy is another state: no process has sent a call to it
    await _write(new_name, target, state, tell)
    await _verify(new_name, target, state, tell)
    return len(state.entries)


async def _loaded(session: StorageSession) -> LoadedState:
    snapshot, records = session.recovery[:2]
    start = LoadedState({}, 0) if snapshot is None else decode_snapshot(snapshot, session.path)
    await asyncio.sleep(0)
    return replay(start, records, session.path)


async def _write(name: str, target: Storage, state: LoadedState, tell: Progress) -> None:
    async def slices() -> AsyncIterator[bytes]:
        written = 0
        for part in snapshot_of(state):
            yield part
            written += len(part)
            tell("written", written)
            await asyncio.sleep(0)

    writing = await target.open(name)
    try:
        if not _is_empty(writing.recovery):
            raise UnsupportedError(f"{writing.path} already has a state: delete it, or use another target")
        await writing.checkpoint(slices)
    finally:
        await writing.aclose()


async def _verify(name: str, target: Storage, state: LoadedState, tell: Progress) -> None:
    session = await target.open(name)
    try:
        found = await _loaded(session)
        same = found[1:] == state[1:] and found.entries.keys() == state.entries.keys()
        for keys in _some_at_a_time(list(state.entries)):
            same = same and all(_bytes(found, key) == _bytes(state, key) for key in keys)
            await asyncio.sleep(0)
        if not same:
            raise StorageError(f"the copy at {session.path} differs from the source: delete the copy, and try again")
        tell("verified", _size(session.recovery))
    finally:
        await session.aclose()


def snapshot_of(state: LoadedState) -> Iterator[bytes]:
    """Yield a snapshot of a state that was decoded, in slices. It has no results of calls."""
    return encode_snapshot(
        view_of(state), state.revision, state.time, copy_loaded=False, wall=state.wall, versions=state.versions
    )


def _bytes(state: LoadedState, key: str) -> bytes:
    value = state.entries[key]
    return bytes(value) if isinstance(value, (bytes, msgspec.Raw)) else encode(value)


def _some_at_a_time(keys: list[str]) -> Iterator[list[str]]:
    return (keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE))


def _is_empty(recovery: Recovery) -> bool:
    return recovery.snapshot is None and not recovery.records


def _size(recovery: Recovery) -> int:
    return len(recovery.snapshot or b"") + sum(map(len, recovery.records))


def _silent(_: str, __: int) -> None:
    """Do nothing, in place of a `progress` that was not given."""
