"""The subcommands `ls`, `history` and `restore`: the states of a place, and the moments of a state."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from lab_state._catalog import StateInfo, list_states
from lab_state._codec import LoadedState, decode_record, decode_snapshot
from lab_state._history import Generation, list_generations
from lab_state._past import MOST_LISTS, check_is_same, generations
from lab_state._restore import restore_state
from lab_state._state_view import read_state
from lab_state.cli._changes import Change, of_record, text_of
from lab_state.cli._diff import differences
from lab_state.cli._exits import USAGE, Stop, message_of
from lab_state.cli._output import Output
from lab_state.cli._storages import check_deposes, described, entries_of, expiry_of, raw_of, storage_at
from lab_state.cli._target import Place, Target
from lab_state.cli._text import age_text, counted, live_text, size_text, time_text
from lab_state.cli._when import parse_when
from lab_state.exceptions import LabStateError, UnavailableError
from lab_state.storage._generations import Moment
from lab_state.storage._history import GoneError, history_of
from lab_state.storage._protocol import Reading, Storage


async def ls(output: Output, place: Place, *, nl: bool) -> None:
    """Print the states of a place. A state that cannot be read has the reason in its line."""
    storage = storage_at(place)
    rows: list[tuple[str, ...]] = []
    for state in await list_states(storage):
        members = await _listed(state, storage)
        if nl:
            output.json(members)
        else:
            rows.append(_row(output, members))
    if not nl:
        output.table(("NAME", "KEYS", "BYTES", "REVISION", "AGE", "HOLDER"), rows, right=(1, 2, 3, 4))


async def _listed(state: StateInfo, storage: Storage) -> dict[str, Any]:
    members: dict[str, Any] = {"name": state.name, "bytes": state.size, "history_bytes": state.history_size}
    try:
        view = await read_state(state.name, storage)
    except LabStateError as error:
        return {**members, "live": state.live, "holder": state.holder, "error": message_of(error)}
    return {**members, "keys": len(view), **described(view), "live": state.live, "holder": state.holder}


def _row(output: Output, members: dict[str, Any]) -> tuple[str, ...]:
    holder = output.text(members["holder"] or live_text(members["live"]))
    if "error" in members:
        return members["name"], "-", size_text(members["bytes"]), "-", "-", f"{holder}; {output.text(members['error'])}"
    age = age_text(time.time() - members["wall"] / 1000) if members["wall"] else "-"
    return members["name"], str(members["keys"]), size_text(members["bytes"]), str(members["revision"]), age, holder


async def history(output: Output, state: Target, key: str | None, *, json: bool, nl: bool) -> None:
    """Print the generations of a state, or each stored change of a key."""
    if json and (nl or key is not None):
        raise Stop(
            USAGE, "--json and --nl exclude each other, and the changes of a key are printed only as lines: use --nl"
        )
    storage = storage_at(state.place)
    if key is not None:
        async for change in changes_of_key(storage, state.name, key):
            if nl:
                output.json(change.members())
            else:
                output.line(text_of(change, output.text, output.json_text))
        return
    found = await list_generations(state.name, storage)
    if json or nl:
        listed = [_members(one) for one in found]
        if json:
            output.one(generations=listed)
        for one in listed if nl else ():
            output.json(one)
        return
    rows = [
        (
            f"r{one.first_revision}-r{one.last_revision}",
            time_text(_milliseconds(one.first_wall)),
            time_text(_milliseconds(one.last_wall)),
            size_text(one.size),
            ", ".join(word for word, is_so in (("in use", one.in_use), ("hole before", one.hole_before)) if is_so),
        )
        for one in found
    ]
    output.table(("REVISIONS", "FROM", "TO", "BYTES", ""), rows, right=(3,))


def _members(one: Generation) -> dict[str, Any]:
    walls = {"first_wall": _milliseconds(one.first_wall), "last_wall": _milliseconds(one.last_wall)}
    return {
        "first_revision": one.first_revision, "last_revision": one.last_revision, **walls,
        "bytes": one.size, "hole_before": one.hole_before, "in_use": one.in_use,
    }  # fmt: skip


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


async def readings(storage: Storage, name: str, since: int | datetime | None) -> AsyncIterator[Reading]:
    """Yield the generations of a state, the oldest first. With a moment, leave out those that end before it, except the one in use.

    Raises:
        UnavailableError: Ten times in a row, a checkpoint replaced the files in use before they were read.
        StorageError: See `list_generations`.
    """
    past, seen = history_of(storage), set[Moment]()
    for _ in range(MOST_LISTS):
        # After a checkpoint, the generation that was in use is in the next list, if the state has a history.
        with contextlib.suppress(GoneError):
            for one in await generations(past, name):
                if one.span.first in seen or (not one.in_use and _is_before(one.span.last, since)):
                    continue
                reading = await past.read(name, one)
                check_is_same(reading, one)
                seen.add(one.span.first)
                yield reading
            return
    raise UnavailableError(f"the state {name!r} was replaced by checkpoints while it was read; read it again")


def _is_before(last: Moment, since: int | datetime | None) -> bool:
    if isinstance(since, datetime):
        return last.wall < since.timestamp() * 1000
    return since is not None and last.revision <= since


async def changes_of_key(storage: Storage, name: str, key: str) -> AsyncIterator[Change]:
    """Yield each stored change of a key, the oldest first. A snapshot shows a change that no record has."""
    last: tuple[bytes, int | None] | None = None
    revision = -1  # the file of another program has revision 0
    async for reading in readings(storage, name, None):
        state = LoadedState({}, 0) if reading.snapshot is None else decode_snapshot(reading.snapshot, reading.path)
        if state.revision > revision:
            stored = state.entries.get(key)
            found = None if stored is None else (raw_of(stored), state.expires.get(key))
            if found is not None and found != last:
                yield Change("set", key, *found, state.revision, state.wall)
            elif found is None and last is not None:
                yield Change("delete", key, None, None, state.revision, state.wall)
            last, revision = found, state.revision
        # A record that the snapshot covers shows no further change.
        for record in (one for one in map(decode_record, reading.records) if one.end > revision):
            revision = record.end
            for change in of_record(record, key):
                if change.kind == "clear" or change.key == key:
                    last = None if change.value is None else (change.value, change.expires)
                    yield change


async def restore(
    output: Output, state: Target, *, at: str, into: str, dry_run: bool, depose: bool, json: bool
) -> None:
    """Restore a moment of a state, in place or as a new state."""
    storage = storage_at(state.place, create=True)
    moment = parse_when(at, datetime.now().astimezone())
    if dry_run:
        await _compare(output, state, storage, moment, json=json)
        return
    if into == state.name:
        check_deposes(state, depose=depose)
    done = await restore_state(state.name, storage, moment, into=into)
    if json:
        output.one(revision=done.revision, before=done.before)
        return
    output.line(f"{output.text(state.place.state(into))}: revision {done.revision}")
    if done.before is not None:
        words = ("lab-state", "restore", str(state), "--at", f"r{done.before}", "--into", into)
        output.line(f"to undo this: {output.text(shlex.join(words))}")


async def _compare(output: Output, state: Target, storage: Storage, moment: int | datetime, *, json: bool) -> None:
    """Print how many keys a restore in place would add, remove and change."""
    then = await read_state(state.name, storage, at=moment)
    now = await read_state(state.name, storage)
    # A restore leaves out the keys that have expired since the moment.
    time = now._core.state.now()  # noqa: SLF001 -- a view has no public call for its time
    entries = {key: stored for key, stored in entries_of(then).items() if (expiry_of(stored) or time + 1) > time}
    counts = {"added": 0, "removed": 0, "changed": 0}
    for found in differences(entries_of(now), entries):
        counts[found.kind] += 1
    wall = _milliseconds(then.wall)
    if json:
        output.one(at_revision=then.revision, wall=wall, keys=len(entries), **counts)
        return
    output.line(f"revision {then.revision} of {time_text(wall)}: {counted(len(entries), 'key')}")
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    output.line(f"compared with revision {now.revision}: {words}; nothing was written")
