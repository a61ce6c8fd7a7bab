"""The targets of the fuzzing: everything that reads bytes which another program may have changed.

Each target takes any bytes. The loader must answer with a state, or with an error of the error tree, never with another
one; and what it accepts must come back when it is written and read again. The first bytes choose how much is mended:
without a checksum that is right, nothing behind the checksum would ever be reached.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from lab_state import (
    CorruptionError,
    LabStateError,
    MemoryCache,
    TypeMismatchError,
    UnsupportedError,
)
from lab_state import _journal as journal
from lab_state import _opening as opening
from lab_state._codec import LoadedState as Loaded
from lab_state._codec import decode_snapshot, encode_record, encode_snapshot, replay
from lab_state._entries import ChangeSet, Expiring
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state._log import Log
from lab_state._state import State
from lab_state._types import decode_value
from lab_state.cache._format import Head, Message, parse_head, parse_message, seen_in
from lab_state.cache._local_copy import LocalCopy
from lab_state.cache._source import Fetched
from lab_state.storage._protocol import Recovery
from lab_state.storage.s3._format import Names, frame, stamp_in_body, stamp_in_metadata, stamped, unframe
from lab_state.storage.s3._open import _stamp, gap
from lab_state.storage.s3._outcomes import ObjectInfo
from lab_state.testing import ManualClock

_SILENT = logging.Logger("fuzzing", logging.CRITICAL)  # noqa: LOG001 -- used here only
NAME = "lab"
SALT = "0123456789abcdef"
CRC = b',"crc32":"'
SEPARATOR = b"\n"
"""Between the pieces of an input; JSON can do without it."""


def mended(snapshot: bytes) -> bytes:
    """Return a snapshot with the right checksum, if there is a place for one."""
    cut = snapshot.rfind(CRC)
    return snapshot if cut < 0 else b'%s%s%08x"}}' % (snapshot[:cut], CRC, zlib.crc32(snapshot[:cut]))


def files(data: bytes) -> None:
    """Load a snapshot and a journal: mode, snapshot, and a frame in each of the other pieces, its kind first."""
    mode, (snapshot, *pieces) = (data[:1] or b"\0")[0], data[1:].split(SEPARATOR)
    there = None if mode & 1 else mended(snapshot) if mode & 2 else snapshot
    base = NO_BASE if there is None else journal.base_of(len(there), zlib.crc32(there))
    if mode & 4:
        base = ANY_BASE
    if mode & 8:
        lines = SEPARATOR.join(pieces)
    else:
        kinds = {kind.value.encode(): kind for kind in FrameKind}
        frames = [
            journal.frame(SALT, kinds.get(piece[:1], FrameKind.RECORD), mended(piece[1:]) if mode & 16 else piece[1:])
            for piece in pieces
        ]
        if mode & 32:
            frames.append(frames.pop()[:-3] if frames else b"torn")
        lines = journal.header(NAME, SALT, base) + b"".join(frames)
    loaded(lambda: recovered(there, None if mode & 64 else lines))


def recovered(snapshot: bytes | None, data: bytes | None) -> Recovery:
    base = NO_BASE if snapshot is None else journal.base_of(len(snapshot), zlib.crc32(snapshot))
    scan = None if data is None else journal.scan(data, NAME, "j")
    full, records, unclean = journal.accept(scan, len(data or b""), base, "j")
    return Recovery(snapshot if full is None else full, records, unclean, 0)


def loaded(recover: Callable[[], Recovery]) -> None:
    """Load what was recovered as a start does, and write it again."""
    try:
        session = cast("Any", SimpleNamespace(recovery=recover(), path="p"))
        state = opening.loaded(session, NAME, ManualClock(), Log(_SILENT), 0.0)
    except (CorruptionError, UnsupportedError):
        return
    assert state.count() == len(state.names(""))
    written = b"".join(
        encode_snapshot(dict(state.entries.items()), state.revision, state.now(), copy_loaded=True, wall=state.wall())
    )
    assert values(decode_snapshot(written, "p")) == readable(state)
    taken = ChangeSet(0, max(1, state.revision), True, dict(state.entries.items()), 0.0, state.now(), state.wall())
    record = b"".join(encode_record(taken))
    assert values(replay(Loaded({}, 0), [record], "p")) == readable(state)
    state.sweep(1_000_000)


def readable(state: State) -> dict[str, Any]:
    """Return what can be read: all, except values under a right checksum that are not JSON."""
    found = {}
    for key, stored in state.entries.items():
        value, at = (stored.value, stored.at) if isinstance(stored, Expiring) else (stored, None)
        with suppress(TypeMismatchError):
            found[key] = decode_value(value, Any), at
    return found


def values(snapshot: Loaded) -> dict[str, Any]:
    """Return what can be read, likewise."""
    found = {}
    for key, raw in snapshot.entries.items():
        with suppress(TypeMismatchError):
            found[key] = decode_value(raw, Any), snapshot.expires.get(key)  # type: ignore[arg-type]
    return found


def raw(snapshot: Loaded) -> dict[str, Any]:
    return {key: (bytes(value), snapshot.expires.get(key)) for key, value in snapshot.entries.items()}  # type: ignore[arg-type]


def s3(data: bytes) -> None:
    """Load a snapshot object with its metadata, and a record object: mode, number, `seq`, `fence`, both bodies."""
    mode, pieces = (data[:1] or b"\0")[0], data[1:].split(SEPARATOR)
    number, seq, fence, snapshot, body = (*pieces, b"", b"", b"", b"", b"")[:5]
    metadata = {"labstateseq": seq.decode("latin1"), "labstatefence": fence.decode("latin1")}
    snapshot = mended(snapshot) if mode & 1 else snapshot
    wanted = int(number) if re.fullmatch(rb"[0-9]{1,20}", number) else 1
    try:
        found = stamp_in_body(snapshot, "p")
        assert found is None or f'"seq":{found.seq},"fence":{found.fence}' in re.sub(
            r":0+(?=\d)", ":", snapshot.decode("latin1")
        )
        _stamp((ObjectInfo("", metadata if mode & 2 else {}, len(snapshot)), snapshot), "p")
        told = stamp_in_metadata(metadata, "p")
        assert told is None or stamp_in_metadata(told.metadata(), "p") == told
        plain = decode_snapshot(snapshot, "p")
    except (CorruptionError, UnsupportedError):
        pass
    else:
        if found is None and told is not None and plain.revision:  # it is ours, without a stamp
            again = stamped(snapshot, told)
            assert stamp_in_body(again, "p") == told
            assert raw(decode_snapshot(again, "p")) == raw(plain)
        names = Names.of("b", "p", NAME)
        gap({wanted: len(body)}, told.seq if told else 0, None if mode & 4 else wanted + 1, names)
    if mode & 8:
        body = frame(NAME, wanted, body)
    try:
        record = unframe(NAME, wanted, body, "p")
    except CorruptionError:
        assert not mode & 8
    else:
        assert frame(NAME, wanted, record) == body
        loaded(lambda: Recovery(mended(snapshot), (record,), unsettled=False, dropped_bytes=0))


def cache(data: bytes) -> None:
    """Read from Redis and its channel: mode, both heads, `key value at` and messages in the other pieces."""
    mode, pieces = (data[:1] or b"\0")[0], data[1:].split(SEPARATOR)
    head = pieces[0] if mode & 1 else b'{"format":1,"revision":7,"writer":"w"}'
    memory = MemoryCache()
    reader = memory.reader(NAME, clock=ManualClock())
    lives = bool(mode & 8)
    reader._feed = cast("Any", SimpleNamespace(revision=0, lives=lambda *_: lives))  # it is open
    place = memory.mirrors[NAME]
    place.values["$lab_state"], place.expires["$lab_state"] = head, head if not mode & 2 else pieces[-1]
    messages = []
    for piece in pieces[1:]:
        if piece.startswith(b"{"):
            messages.append(piece)
            continue
        name, _, rest = piece.partition(b" ")
        value, _, at = rest.partition(b"\t")
        place.values[name.decode("latin1")] = value
        if at:
            place.expires[name.decode("latin1")] = at
    keys = [key for key in place.values if key != "$lab_state"]
    seen, fill = seen_in(place.values["$lab_state"], place.expires["$lab_state"])
    assert seen.writer is not None or (seen.revision, fill) == (0, "")
    answered(reader.revision)
    answered(reader.get_all)
    for key in keys:
        answered(lambda key=key: reader.get(key))  # type: ignore[misc]
        answered(lambda key=key: reader.exists(key))  # type: ignore[misc]
    local = LocalCopy()
    try:
        told = [told for message in messages if (told := message_of(message)) is not None]
        begin = parse_head(head)
        if begin is None:
            return
        local.start_loading()
        assert local.set_head(begin)
        for message in told[::2]:
            local.receive([message])
        all_keys = {key: place.values[key] for key in keys}
        local.add(Fetched(None, None, all_keys, {key: at for key, at in place.expires.items() if key in all_keys}))
        if local.finish_loading(Head(1, told[0].end if mode & 4 and told else begin.revision, begin.writer)):
            for message in told[1::2]:
                local.receive([message])
    except LabStateError:
        local.invalidate()
    reader._local = local
    answered(reader.get_all)


def message_of(data: bytes) -> Message | None:
    found = parse_message(data)
    if found is not None:
        with suppress(msgspec.MsgspecError, UnicodeEncodeError):
            assert parse_message(msgspec.json.encode(found)) in (found, None)
    return found


def answered(call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Check that a call gives an answer or an error of the error tree. It may go in steps, but waits for nothing."""
    coroutine = call()
    try:
        while coroutine.send(None) is None:  # between two steps the event loop would run
            pass
    except (StopIteration, LabStateError):
        return
    raise AssertionError("it waits")


TARGETS: dict[str, Callable[[bytes], None]] = {"files": files, "s3": s3, "cache": cache}
