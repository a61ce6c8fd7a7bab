"""The subcommands `watch` and `tail`.

`watch` prints new changes of a state. `tail` prints the changes in its journal. With `--since`, `tail` also reads the history.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from datetime import datetime

from lab_state._codec import LoadedState, decode_record, replay
from lab_state._loading import load
from lab_state.cli._changes import Change, between, newer, of_record, text_of
from lab_state.cli._client import Client
from lab_state.cli._moments import readings
from lab_state.cli._output import Output
from lab_state.cli._storages import storage_at
from lab_state.cli._target import Target
from lab_state.cli._text import changes_text
from lab_state.cli._when import parse_when
from lab_state.storage._directory import Paths
from lab_state.storage._protocol import Reading, Storage
from lab_state.storage.file import FileStorage

EVERY = 0.2
"""The seconds between two checks of the files of a state."""

EVERY_IN_A_BUCKET = 5.0
"""The seconds between two readings of a state in a bucket. Each of them costs some requests, and transfers the state."""


class _Printer:
    """The lines of one run of `watch` or `tail`."""

    def __init__(self, output: Output, prefix: str, *, nl: bool) -> None:
        self.prefix = prefix
        self._output = output
        self._nl = nl

    def print(self, changes: Iterable[Change]) -> None:
        """Print changes, and flush the output, so that the reader of a pipe gets them at once."""
        for change in changes:
            if self._nl:
                self._output.json(change.members())
            else:
                self._output.line(text_of(change, self._output.text, self._output.json_text))
        self._output.flush()

    def note(self, text: str) -> None:
        self._output.note(f"lab-state: {text}")


async def watch(output: Output, state: Target, prefix: str, *, nl: bool) -> None:
    """Print new changes, until the command is interrupted."""
    storage, printer = storage_at(state.place), _Printer(output, prefix, nl=nl)
    last = None
    if isinstance(storage, FileStorage):
        last = await _follow(storage, state, printer)
    await _poll(storage, state, printer, last)


async def _follow(storage: FileStorage, state: Target, printer: _Printer) -> int | None:
    """Print the records that the owner of a shared state sends, until the client cannot connect to an owner again.

    Return the revision up to which all changes are printed or noted. Return `None` if the first attempt to connect has failed.
    """
    records: asyncio.Queue[bytes | None] = asyncio.Queue()
    client = Client(storage, state.name, lambda record: records.put_nowait(bytes(record)))
    try:
        if not await client.connect():
            return None
        last = client.revision
        printer.note(f"watching {state} through its owner (pid {client.pid}), after revision {last}")
        while True:
            last = await _print_records(client, records, printer, last)
            if not await client.connect_again():
                return last
            # Without a bound, changes of which the journal has no record would not be noted. Later records come over the connection.
            last = await _fill(storage, state.name, printer, last, client.revision)
    finally:
        await client.aclose()


async def _print_records(client: Client, records: asyncio.Queue[bytes | None], printer: _Printer, last: int) -> int:
    """Print records until the connection ends, and return the last revision."""
    client.watch(lambda: records.put_nowait(None))
    while (data := await records.get()) is not None:
        record = decode_record(data)
        if record.end > last:
            printer.print(of_record(record, printer.prefix))
            last = record.end
    return last


async def _fill(storage: Storage, name: str, printer: _Printer, last: int, until: int) -> int:
    """Print the changes after revision `last` that are in the journal, up to revision `until`.

    If the first of them are missing in the journal, print only a note. Return the revision up to which all changes are printed or noted.
    """
    records = map(decode_record, (await storage.read(name)).records)
    found = newer((record for record in records if record.end <= until), last)
    if found is None:
        if until > last:
            printer.note(
                f"not printed, because a checkpoint was written meanwhile: {changes_text(last + 1, until)}; "
                f"if the state has a history, `lab-state tail --since r{last}` prints them"
            )
        return max(last, until)
    for record in found:
        printer.print(of_record(record, printer.prefix))
    return found[-1].end


async def _poll(storage: Storage, state: Target, printer: _Printer, last: int | None) -> None:
    """Look for changes every `EVERY` seconds, in a bucket every `EVERY_IN_A_BUCKET` seconds, and print them.

    Files are read only if their fingerprint has changed. First, print the changes after revision `last`, unless it is `None`.
    """
    seen = _fingerprint(storage, state)
    now = (await load(state.name, storage)).state
    if last is not None:
        # Fill only after the reading of the state. Otherwise a change between the two readings would not be printed.
        await _fill(storage, state.name, printer, last, now.revision)
    else:
        what = "objects" if state.place.bucket else "files"
        printer.note(f"watching the {what} of {state}, after revision {now.revision}")
    every = EVERY if isinstance(storage, FileStorage) else EVERY_IN_A_BUCKET
    while True:
        await asyncio.sleep(every)
        before, seen = seen, _fingerprint(storage, state)
        if seen is None or seen != before:
            now, changes = await advance(now, storage, state.name, printer.prefix)
            printer.print(changes)


def _fingerprint(storage: Storage, state: Target) -> object:
    """Return the fingerprints of the snapshot and the journal, `None` for each that is missing. Without files, return `None`."""
    if not isinstance(storage, FileStorage):
        return None
    found: list[object] = []
    for path in Paths.of(state.place.directory, state.name)[1:3]:
        try:
            status = os.stat(path)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


async def advance(now: LoadedState, storage: Storage, name: str, prefix: str) -> tuple[LoadedState, list[Change]]:
    """Read a state again. Return it, and the changes since `now`.

    If the journal has records after `now`, and all of them, the changes are those of the records. Otherwise the state is read once
    more, and the two moments are compared.
    """
    reading = await storage.read(name)
    found = newer(map(decode_record, reading.records), now.revision)
    if found is not None:
        changes = [change for record in found for change in of_record(record, prefix)]
        return replay(now, reading.records, reading.path), changes
    loaded = (await load(name, storage)).state
    return loaded, list(between(now, loaded, prefix))


async def tail(output: Output, state: Target, prefix: str, *, since: str | None, nl: bool) -> None:
    """Print the changes in the journal, the oldest first. With `since`, print all stored changes after that moment, each once."""
    printer = _Printer(output, prefix, nl=nl)
    moment = None if since is None else parse_when(since, datetime.now().astimezone())
    storage = storage_at(state.place)
    if moment is None:
        _print_after(printer, await storage.read(state.name), None, 0)
        return
    last = 0
    async for reading in readings(storage, state.name, moment):
        last = _print_after(printer, reading, moment, last)


def _print_after(printer: _Printer, reading: Reading, moment: int | datetime | None, last: int) -> int:
    """Print the records after a moment, and return the revision of the last record.

    The records of commits during a checkpoint are in two generations. So leave out the records up to revision `last`, which the
    generation before has.
    """
    for record in map(decode_record, reading.records):
        if record.end > last:
            last = record.end
            if moment is None or _is_after(record.end, record.wall, moment):
                printer.print(of_record(record, printer.prefix))
    return last


def _is_after(revision: int, wall: int, moment: int | datetime) -> bool:
    if isinstance(moment, datetime):
        return wall >= moment.timestamp() * 1000
    return revision > moment
