"""The subcommand `verify`: it checks everything that a state has, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from lab_state import _journal as journal
from lab_state._arguments import check_key
from lab_state._entries import Stored
from lab_state._nesting import MAX_DEPTH, too_deep
from lab_state._not_json import NOT_JSON
from lab_state.cli._exits import CORRUPT, Stop
from lab_state.cli._output import Output
from lab_state.cli._storages import described, entries_of, raw_of, read
from lab_state.cli._target import Target
from lab_state.cli._text import counted, moment_text, size_text
from lab_state.exceptions import InvalidKeyError, StorageError
from lab_state.storage import _fs as fs
from lab_state.storage._directory import Paths


def faults_of(entries: dict[str, Stored]) -> Iterator[str]:
    """Yield a sentence for each key or value that a state cannot have. The checksums of a file do not show such a fault."""
    for key, stored in entries.items():
        data = raw_of(stored)
        try:
            check_key(key)
            data.decode()
            msgspec.json.decode(data)
        except InvalidKeyError as error:
            yield f"a key is not valid: {error}"
        except NOT_JSON:
            yield f"the value of {key!r} is not JSON in UTF-8"
        else:
            if too_deep(data):
                yield f"the value of {key!r} has more than {MAX_DEPTH} levels of nesting"


def torn_bytes(data: bytes | None, name: str, path: str) -> int:
    """Return the number of bytes at the end of a journal that are not a whole frame. They were never acknowledged.

    Beside a running process, this may be a frame that is being written.
    """
    if data is None:
        return 0
    try:
        scan = journal.scan(data, name, path)
    except StorageError:  # a process has replaced the journal since the state was read
        return 0
    return 0 if scan.is_ended else len(data) - scan.end


async def verify(output: Output, state: Target, at: str | None, *, json: bool) -> None:
    """Check a state. The exit code is 4 if it is damaged."""
    view = await read(state, at)
    entries = entries_of(view)
    faults = list(faults_of(entries))
    torn = 0
    if not state.place.bucket and at is None:
        paths = Paths.of(state.place.directory, state.name)
        torn = torn_bytes(fs.read(paths.journal), state.name, paths.journal)
    size = sum(len(raw_of(stored)) for stored in entries.values())
    if json:
        output.one(**described(view), keys=len(entries), bytes=size, torn_bytes=torn, faults=faults)
    else:
        output.line(moment_text(view.live, view.revision, view.durable_revision))
        output.line(
            f"{counted(len(entries), 'key')} and {size_text(size)} of values: checksums, keys and values checked"
        )
        if torn:
            output.line(
                f"the end of the journal, {counted(torn, 'byte')}, is not a whole record; it was never acknowledged"
            )
        for fault in faults:
            output.line(output.text(fault))
    if faults:
        raise Stop(CORRUPT, f"{state} has keys or values that a state cannot have: {len(faults)}")
