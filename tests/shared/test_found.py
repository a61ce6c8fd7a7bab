"""`find`: what a new owner finds in the files, beside its copy. And the frame that settles it."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from lab_state import Config, CorruptionError, FileStorage, LabStateError, Manager, UnsupportedError
from lab_state._codec import LoadedState, decode_snapshot
from lab_state._state import State
from lab_state.shared._found import Found, Settling, find
from lab_state.shared._records import parse_record
from lab_state.shared._results import ResultTable
from lab_state.storage._protocol import Recovery

CLIENT = "a" * 32


def record(start: int, end: int, **changes: Any) -> bytes:
    members: dict[str, Any] = {"from": start, "to": end, "clear": False, "set": {}, "delete": [], "expires": {}}
    return json.dumps({**members, **changes}, separators=(",", ":")).encode()


RECORDS = (record(0, 2, set={"a": 1}), record(2, 3, set={"b": 2}), record(3, 7, delete=["a"]))


def recovered(snapshot: bytes | None = None, records: tuple[bytes, ...] = ()) -> Recovery:
    return Recovery(snapshot, records, unsettled=True, dropped_bytes=0)


class Content:
    """The files of a state. `reads` counts how often the snapshot was asked for."""

    path = "p"

    def __init__(self, recovery: Recovery) -> None:
        self.recovery = recovery
        self.reads = 0

    async def whole(self) -> Recovery:
        self.reads += 1
        return self.recovery


def copy_at(revision: int, **entries: Any) -> State:
    copy = State()
    copy.load(entries, revision)
    return copy


async def snapshot_at(tmp_path: Path, count: int = 3) -> bytes:
    """Return the snapshot of a state with a revision."""
    async with Manager(Config("test"), FileStorage(tmp_path)) as state:
        for number in range(count):
            await state.set("a", number)
    return (tmp_path / "test.json").read_bytes()


def ends(found: Found) -> list[int]:
    return [record.end for record in found.tail]


@pytest.mark.parametrize(("revision", "tail"), [(7, []), (3, [7]), (2, [3, 7]), (1, [2, 3, 7]), (0, [2, 3, 7])])
async def test_a_copy_needs_the_records_after_it(revision: int, tail: list[int]) -> None:
    """If the journal reaches back to the copy, the copy stays, and only the records after it are decoded."""
    found = await find(Content(recovered(b"not looked at", RECORDS)), copy_at(revision))
    assert found.whole is None
    assert ends(found) == tail


async def test_a_process_without_a_copy_loads_everything(tmp_path: Path) -> None:
    """Without a copy, the snapshot and all records are loaded. A new state is empty."""
    assert await find(Content(recovered()), None) == Found(LoadedState({}, 0), [])
    found = await find(Content(recovered(await snapshot_at(tmp_path), (record(3, 4, set={"b": 1}),))), None)
    assert found.whole is not None
    assert (found.whole.revision, set(found.whole.entries), found.tail) == (4, {"a", "b"}, [])


async def test_a_journal_that_does_not_reach_back(tmp_path: Path) -> None:
    """If the records after the copy are only in the snapshot, everything is loaded."""
    snapshot = await snapshot_at(tmp_path)
    for records in ((), (record(3, 4, set={"b": 1}),)):
        found = await find(Content(recovered(snapshot, records)), copy_at(2))
        assert found.whole is not None
        assert found.whole.revision == 3 + len(records)


async def test_a_snapshot_that_the_copy_has_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a planned end, the revision of the snapshot is read from its end."""
    snapshot = await snapshot_at(tmp_path)
    monkeypatch.setattr("lab_state.shared._found.decode_snapshot", None)
    copy = copy_at(3)
    assert await find(Content(recovered(snapshot)), copy) == Found(None, [])
    assert await find(Content(recovered(snapshot)._replace(crc32=zlib.crc32(snapshot))), copy) == Found(None, [])


@pytest.mark.parametrize("text", [b'{"a":1}', b'{"a":{"$lab_state":{"x":1}}}', b'{"$lab_state":1,"a":2}'])
async def test_a_file_of_another_program(text: bytes) -> None:
    """A file without the member of lab_state is decoded as a whole, which finds what is wrong with it."""
    expected: Any = None
    try:
        expected = decode_snapshot(text, "p")
    except LabStateError as error:
        expected = str(error)
    try:
        assert (await find(Content(recovered(text)), copy_at(0))).whole == expected
    except LabStateError as error:
        assert str(error) == expected  # noqa: PT017 -- both ways must agree


async def test_a_newer_format(tmp_path: Path) -> None:
    """A snapshot of a newer version of lab_state is refused."""
    snapshot = (await snapshot_at(tmp_path)).replace(b'"format":1', b'"format":2')
    with pytest.raises(UnsupportedError, match="format 2"):
        await find(Content(recovered(snapshot)), copy_at(3))


@pytest.mark.parametrize(
    ("records", "revision", "message"),
    [
        (RECORDS, 8, "ends at revision 7, but this process has seen revision 8, which was durable"),
        ((), 1, "ends at revision 0, but this process has seen revision 1"),
        ((RECORDS[0], RECORDS[2]), 1, "the changes 3 to 3 are missing"),
        ((RECORDS[0], RECORDS[2]), 2, "the changes 3 to 3 are missing"),
        ((RECORDS[0], b"{}"), 1, "is not a record"),
        ((b"no JSON", RECORDS[1]), 1, "is not a record"),
        ((RECORDS[0], record(2, 3, set={"": 1})), 2, "is not a record"),
        ((b"no JSON", RECORDS[1]), 3, "is not a record"),
        ((RECORDS[0], b'{"from":2}', RECORDS[2]), 7, "is not a record"),
        ((record(0, 2), record(3, 2), RECORDS[1]), 3, "is not a record"),
        ((RECORDS[0], RECORDS[2]), 7, "the changes 3 to 3 are missing"),
    ],
)
async def test_files_that_cannot_be_right(records: tuple[bytes, ...], revision: int, message: str) -> None:
    """Files that have less than the copy, or records that do not fit, are a corruption."""
    with pytest.raises(CorruptionError, match=message):
        await find(Content(recovered(None, records)), copy_at(revision))


async def test_older_records_are_checked_as_far_as_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is too old to be sent to another process is not looked at."""
    records = (b"no JSON", *RECORDS)
    monkeypatch.setattr("lab_state.shared._found._CHECKED_AT_ONCE", 1)
    with pytest.raises(CorruptionError, match="is not a record"):
        await find(Content(recovered(None, records)), copy_at(7))
    monkeypatch.setattr("lab_state.shared._found.MOST_BYTES", len(RECORDS[2]))
    assert await find(Content(recovered(None, records)), copy_at(7)) == Found(None, [])


async def test_the_loop_runs_while_a_large_record_is_decoded() -> None:
    """Records after the copy are decoded in steps."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(turn())
    large = record(0, 5000, set={f"key {number}": number for number in range(5000)})
    assert ends(await find(Content(recovered(None, (large,))), copy_at(0))) == [5000]
    task.cancel()
    assert turns >= 10


# The frame that settles it


async def settled(base: State, *records: bytes) -> LoadedState:
    """Return the state in the frame that settles a state and the records after it."""
    settling = Settling(base, [parse_record(one) for one in records])
    parts: AsyncIterator[bytes] = settling.slices()
    loaded = decode_snapshot(b"".join([part async for part in parts]), "p")
    assert parse_record(settling.record)[:2] == (loaded.revision, loaded.revision)
    return loaded


async def test_the_frame_has_the_state_with_the_records() -> None:
    """The frame has the copy and the records after it. The copy stays as it is."""
    base = copy_at(2, a=1, c=3)
    loaded = await settled(base, *RECORDS)
    assert {key: json.loads(bytes(raw)) for key, raw in loaded.entries.items()} == {"c": 3, "b": 2}  # type: ignore[arg-type] # they are JSON
    assert (loaded.revision, loaded.results) == (7, None)
    assert (base.revision, set(base.entries)) == (2, {"a", "c"})


async def test_the_frame_after_a_clear() -> None:
    """A record that clears the state leaves nothing of the copy."""
    loaded = await settled(
        copy_at(2, a=1), RECORDS[1], record(3, 4, clear=True, set={"d": 4}), record(4, 5, set={"e": 5})
    )
    assert set(loaded.entries) == {"d", "e"}


async def test_the_frame_has_the_results() -> None:
    """The frame has the table of results after the records. The table of the copy stays as it is."""
    base = copy_at(2)
    base.results = ResultTable()
    base.results.apply({CLIENT: (0, {1: Raw(b"1")})}, 2)
    before = base.results.snapshot()
    loaded = await settled(base, record(2, 3, set={"a": 1}, calls={CLIENT: [0, {"2": True}]}))
    assert loaded.results is not None
    assert [loaded.results.find(CLIENT, number) is not None for number in (1, 2, 3)] == [True, True, False]
    assert base.results.snapshot() == before
    loaded = await settled(copy_at(2), record(2, 3, set={"a": 1}, calls={CLIENT: [0, {"2": True}]}))
    assert loaded.results is not None
