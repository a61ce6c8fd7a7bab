"""The results of calls in records and in snapshots: the member `calls` of format 1."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from lab_state import FileStorage, Manager, copy_state, read_state
from lab_state._codec import LoadedState, decode_snapshot, encode_record, encode_small_record, encode_snapshot, replay
from lab_state._entries import ChangeSet, Expiring, Stored
from lab_state._journal import NO_BASE, accept, base_of, scan
from lab_state.exceptions import CorruptionError
from lab_state.shared._results import RecordCalls, ResultTable

PATH = "/state/some.json"
V1 = Path(__file__).parents[1] / "golden" / "v1"

CALLER, OTHER = "a" * 32, "b" * 32
CALLS: RecordCalls = {CALLER: (17, {18: Raw(b"true"), 19: Raw(b"7")}), OTHER: None}
CALLS_JSON = b'{"%s":[17,{"18":true,"19":7}],"%s":null}' % (CALLER.encode(), OTHER.encode())


def changes(values: dict[str, Stored], start: int, end: int) -> ChangeSet:
    return ChangeSet(start, end, False, {**values}, 0.0)


def table(*records: RecordCalls) -> ResultTable:
    found = ResultTable()
    for revision, calls in enumerate(records, 1):
        found.apply(calls, revision)
    return found


def results_of(loaded: LoadedState) -> Any:
    return None if loaded.results is None else json.loads(msgspec.json.encode(loaded.results.snapshot()))


def test_a_record_has_the_results_of_calls() -> None:
    """The member `calls` is the last one of a record, in a small record and in one that is made in slices."""
    small = encode_small_record(changes({"a": 1}, 0, 1), CALLS)
    assert (
        small
        == b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":[],"expires":{},"wall":0,"calls":%s}' % CALLS_JSON
    )
    assert b"".join(encode_record(changes({"a": 1}, 0, 1), CALLS)) == small
    expiring = ChangeSet(0, 1, False, {"a": Expiring(1, 9)}, 0.0, 5, 6)
    assert b"".join(encode_record(expiring, CALLS)).endswith(
        b'"expires":{"a":9},"time":5,"wall":6,"calls":%s}' % CALLS_JSON
    )


@pytest.mark.parametrize("calls", [None, {}])
def test_a_record_without_results_has_no_such_member(calls: RecordCalls | None) -> None:
    """A state that is not shared has the records that it had before there were results."""
    taken = changes({"a": 1}, 0, 1)
    assert encode_small_record(taken, calls) == encode_small_record(taken)
    assert b"calls" not in (encode_small_record(taken, calls) or b"calls")
    assert b"".join(encode_record(taken, calls)) == b"".join(encode_record(taken))


def test_a_replay_brings_the_results() -> None:
    """Replay has the results of each record with the revision of its end. A record that is skipped brings none."""
    records = [
        encode_small_record(changes({"a": 1}, 0, 2), {CALLER: (0, {1: Raw(b"true")}), OTHER: (0, {1: Raw(b"1")})}),
        encode_small_record(changes({"a": 2}, 2, 3), {CALLER: (0, {2: Raw(b"0.5")}), OTHER: None}),
    ]
    found = replay(LoadedState({}, 0), [record for record in records if record], PATH)
    assert results_of(found) == {CALLER: [0, {"1": [2, True], "2": [3, 0.5]}]}
    assert results_of(replay(LoadedState({}, 3), [record for record in records if record], PATH)) is None
    assert results_of(replay(LoadedState({}, 0), [b"".join(encode_record(changes({"a": 1}, 0, 1)))], PATH)) is None


def test_a_snapshot_has_the_table_of_results() -> None:
    """The member comes before the checksum, and a replay goes on from it."""
    calls = table({CALLER: (17, {18: Raw(b"true")})}).snapshot()
    data = b"".join(encode_snapshot({"a": 1}, 1, 0, copy_loaded=False, calls=calls))
    assert b',"calls":{"%s":[17,{"18":[1,true]}]},"crc32":"' % CALLER.encode() in data
    loaded = decode_snapshot(data, PATH)
    assert results_of(loaded) == {CALLER: [17, {"18": [1, True]}]}
    after = encode_small_record(changes({"a": 2}, 1, 2), {CALLER: (18, {19: Raw(b"2")})})
    assert after is not None
    assert results_of(replay(loaded, [after], PATH)) == {CALLER: [18, {"19": [2, 2]}]}


@pytest.mark.parametrize("calls", [None, {}])
def test_a_snapshot_without_results_has_no_such_member(calls: Any) -> None:
    """A state that is not shared has the snapshots that it had before there were results."""
    data = b"".join(encode_snapshot({"a": 1}, 1, 0, copy_loaded=False, calls=calls))
    assert b"calls" not in data
    assert results_of(decode_snapshot(data, PATH)) is None


@pytest.mark.parametrize(
    "calls",
    [
        b"[]",
        b"null",
        b'{"short":null}',
        b'{"%s":[]}' % CALLER.encode(),
        b'{"%s":[-1,{}]}' % CALLER.encode(),
        b'{"%s":[0,{"0":1}]}' % CALLER.encode(),
        b'{"%s":[0,{"x":1}]}' % CALLER.encode(),
        b'{"%s":[0,{},1]}' % CALLER.encode(),
    ],
)
def test_results_that_are_damaged(calls: bytes) -> None:
    """A member `calls` that is not one is refused, in a record and in a snapshot."""
    data = b'{"from":0,"to":1,"clear":false,"set":{},"delete":[],"expires":{},"calls":%s}' % calls
    with pytest.raises(CorruptionError, match="is not the JSON of a record"):
        replay(LoadedState({}, 0), [data], PATH)
    body = b'{"$lab_state":{"format":1,"revision":1,"id":"x","calls":%s' % calls
    with pytest.raises(CorruptionError, match=r"its member .* is damaged"):
        decode_snapshot(b'%s,"crc32":"%08x"}}' % (body, zlib.crc32(body)), PATH)


@pytest.mark.parametrize("member", [b'"callers":{}', b'"results":{}', b'"seq":1'])
def test_other_members_of_a_record_stay_forbidden(member: bytes) -> None:
    """A record has no member but those of its format."""
    data = b'{"from":0,"to":1,"clear":false,"set":{},"delete":[],"expires":{},%s}' % member
    with pytest.raises(CorruptionError, match="is not the JSON of a record"):
        replay(LoadedState({}, 0), [data], PATH)


# Files


def read(name: str) -> bytes:
    return (V1 / name).read_bytes()


def load(journal: str, snapshot: str | None) -> LoadedState:
    """Return what a journal and its snapshot stand for."""
    data = read(journal)
    base = NO_BASE if snapshot is None else base_of(len(read(snapshot)), zlib.crc32(read(snapshot)))
    accepted = accept(scan(data, "state", journal), len(data), base, journal)
    whole = accepted.full if snapshot is None else read(snapshot)
    assert whole is not None
    return replay(decode_snapshot(whole, journal), accepted.records, journal)


A, B, C = "a1" * 16, "b2" * 16, "c3" * 16
IN_SNAPSHOT = {A: [17, {"18": [41, True], "19": [42, 7]}], B: [0, {"1": [40, -0.5]}]}
AFTER_JOURNAL = {A: [18, {"19": [42, 7], "20": [44, 3]}], C: [0, {"1": [45, None]}]}
AFTER_FULL = {A: [17, {"18": [41, True], "19": [42, 7]}], B: [1, {"2": [43, True]}]}


def test_a_snapshot_with_results_opens() -> None:
    """A snapshot of format 1 with results has the table that it had."""
    loaded = decode_snapshot(read("calls.json"), "calls.json")
    assert (set(loaded.entries), loaded.revision) == ({"n", "lock"}, 42)
    assert results_of(loaded) == IN_SNAPSHOT


def test_a_journal_with_results_opens() -> None:
    """A journal of format 1 continues the table of its snapshot, and forgets a client."""
    loaded = load("calls.journal", "calls.json")
    assert loaded.revision == 45
    assert results_of(loaded) == AFTER_JOURNAL


def test_a_journal_with_the_whole_state_and_results_opens() -> None:
    """A journal of format 1 that begins with the whole state has the table in its first frame."""
    loaded = load("calls-full.journal", None)
    assert loaded.revision == 43
    assert results_of(loaded) == AFTER_FULL


@pytest.mark.parametrize(("journal", "results"), [("calls.journal", AFTER_JOURNAL), ("calls-full.journal", AFTER_FULL)])
async def test_a_manager_that_is_not_shared_keeps_the_results(
    tmp_path: Path, journal: str, results: dict[str, Any]
) -> None:
    """It writes them to each snapshot, since processes may still send these calls again."""
    (tmp_path / "state.json").write_bytes(read("calls.json"))
    (tmp_path / "state.journal").write_bytes(read(journal))
    for number in range(2):
        async with Manager("state", FileStorage(tmp_path)) as state:
            await state.set("more", number)
        assert results_of(decode_snapshot((tmp_path / "state.json").read_bytes(), "")) == results


async def test_the_copy_of_a_state_has_no_results(tmp_path: Path) -> None:
    """A copy is another state, which no process has called. A reading of a state with results has its values."""
    (tmp_path / "state.json").write_bytes(read("calls.json"))
    (tmp_path / "state.journal").write_bytes(read("calls.journal"))
    target = FileStorage(tmp_path / "copy")
    assert await copy_state("state", FileStorage(tmp_path), target) == 3
    assert results_of(decode_snapshot((tmp_path / "copy" / "state.json").read_bytes(), "")) is None
    view = await read_state("state", FileStorage(tmp_path))
    assert (
        await view.get_all() == await (await read_state("state", target)).get_all() == {"n": 10, "lock": 1, "new": "x"}
    )
