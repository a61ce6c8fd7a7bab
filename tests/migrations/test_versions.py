"""The decision whether code may use a state, and the versions in records and snapshots."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lab_state import CorruptionError, Schema, SchemaError
from lab_state._codec import (
    LoadedState,
    decode_record,
    decode_snapshot,
    encode_record,
    encode_small_record,
    encode_snapshot,
    replay,
)
from lab_state._entries import FIRST_VERSIONS, ChangeSet, Versions
from lab_state._migrations import ANY
from lab_state._migrations._versions import Step, Stored, check_follower, decide
from lab_state._state import State
from lab_state.shared._records import parse_record, record_of

WALL = 1_700_000_000_000


def stored(schema: int, readable_by: int, *, is_new: bool = False, wall: int = WALL) -> Stored:
    return Stored(Versions(schema, readable_by), is_new, wall, "state/people.json")


@pytest.mark.parametrize(
    ("found", "code", "step"),
    [
        (stored(1, 1), (1, 1), Step.KEEP),
        (stored(1, 1), (2, 2), Step.MIGRATE),
        (stored(1, 1, is_new=True), (3, 2), Step.SET),
        (stored(3, 3), (3, 3), Step.KEEP),
        (stored(3, 3), (3, 2), Step.SET),
        (stored(3, 2), (3, 3), Step.SET),
        (stored(3, 2), (2, 2), Step.KEEP),
        (stored(3, 1), (1, 1), Step.KEEP),
        (stored(2, 1), (3, 3), Step.MIGRATE),
    ],
)
def test_what_a_start_does(found: Stored, code: tuple[int, int], step: Step) -> None:
    """A new state gets the versions, an older one is migrated, and a newer one that the code can read keeps its versions."""
    assert decide(found, Schema(code[0], readable_by=code[1]), may_migrate=True) is step


@pytest.mark.parametrize(("wall", "when"), [(WALL, "at 2023-11-14 22:13:20 UTC "), (0, ""), (2**62, "")])
def test_a_newer_state(wall: int, when: str) -> None:
    """A state that only newer code can read is refused. The error says which version wrote it, and when, if that is known."""
    with pytest.raises(SchemaError) as error:
        decide(stored(3, 2, wall=wall), Schema(1), may_migrate=True)
    assert str(error.value) == (
        f"state/people.json was written {when}by version 3 of the schema, which code from version 2 on can read. This code "
        "has version 1: run the newer code, or go back to a state that older code wrote - with `restore_state` if the storage has a "
        "history, or from a backup. The state was left untouched"
    )


def test_a_start_that_must_not_migrate() -> None:
    """The error says how to migrate. A state of the same version needs no migration."""
    with pytest.raises(SchemaError, match="run `lab-state migrate`, or start one process with Config"):
        decide(stored(1, 1), Schema(2), may_migrate=False)
    assert decide(stored(2, 2), Schema(2), may_migrate=False) is Step.KEEP


def test_a_tool_takes_each_state() -> None:
    """The schema of tools fits a state of any version, and a new one, and leaves the versions as they are."""
    for found in (stored(3, 3), stored(1, 1), stored(1, 1, is_new=True)):
        assert decide(found, ANY, may_migrate=False) is Step.KEEP


@pytest.mark.parametrize(("versions", "code"), [((2, 2), 2), ((3, 2), 2), ((1, 1), 1)])
def test_a_follower_that_fits(versions: tuple[int, int], code: int) -> None:
    """A process may follow with the version of the state, or with an older version that `readable_by` allows."""
    check_follower(Versions(*versions), Schema(code), "people", 7)


@pytest.mark.parametrize(("versions", "code"), [((2, 2), 1), ((2, 2), 3), ((3, 2), 1)])
def test_a_follower_that_does_not_fit(versions: tuple[int, int], code: int) -> None:
    """A newer process would have to migrate the state, and an older one cannot read it."""
    with pytest.raises(
        SchemaError, match=f"'people' is in use by process 7 with version {versions[0]}.* all processes to stop"
    ):
        check_follower(Versions(*versions), Schema(code), "people", 7)
    check_follower(Versions(*versions), ANY, "people", 7)


def snapshot(versions: Versions, **more: Any) -> bytes:
    return b"".join(encode_snapshot({"a": 1}, 5, 0, copy_loaded=False, wall=WALL, versions=versions, **more))


def test_versions_in_a_snapshot() -> None:
    """Both versions are behind `wall`, and are loaded again. A state of the first version has no such members."""
    data = snapshot(Versions(3, 2), is_followed=True)
    assert b'"wall":1700000000000,"schema":3,"readable_by":2,"followed":true,"crc32":' in data
    assert decode_snapshot(data, "a").versions == (3, 2)
    first = snapshot(FIRST_VERSIONS)
    assert b"schema" not in first
    assert decode_snapshot(first, "a").versions == decode_snapshot(b'{"a":1}', "a").versions == (1, 1)


@pytest.mark.parametrize("schema", [b"0", b'"3"', b"true", b"3.5", b"null", b"2147483649", b"[]"])
def test_a_version_in_a_file_that_is_none(schema: bytes) -> None:
    """A version that is not an int from 1 to 2^31 is damage, and not version 1."""
    data = snapshot(Versions(3, 2)).replace(b'"schema":3', b'"schema":' + schema)
    with pytest.raises(CorruptionError, match="damaged"):
        decode_snapshot(data, "people.json")
    record = b'{"from":1,"to":2,"clear":false,"set":{},"delete":[],"schema":%b,"readable_by":1}' % schema
    if schema != b"null":
        with pytest.raises(CorruptionError, match="record 1 is not the JSON of a record"):
            replay(LoadedState({}, 1), [record], "people.journal")


def test_versions_in_a_record() -> None:
    """Only a record that changes the versions has them, in one piece or in slices. They hold from this record on."""
    taken = ChangeSet(5, 6, cleared=False, changes={"b": 2}, since=0.0, wall=WALL, versions=Versions(3, 2))
    whole, small = b"".join(encode_record(taken)), encode_small_record(taken)
    assert small == whole
    assert small is not None
    assert json.loads(whole)["schema"] == 3
    assert parse_record(whole).versions == record_of(taken).versions == (3, 2)
    later = b"".join(encode_record(ChangeSet(6, 7, cleared=True, changes={}, since=0.0)))
    assert decode_record(later).versions is None
    assert replay(LoadedState({}, 5), [whole, later], "a").versions == (3, 2)


def test_a_record_has_new_versions_until_it_is_durable() -> None:
    """The next record has the versions. If its commit fails, the record after it has them. Later records have none."""
    state = State()
    state.versions, state.versions_at = Versions(3, 2), 1
    state.set("a", 1)
    taken = state.take()
    assert taken.versions == (3, 2)
    state.put_back(taken)
    state.set("b", 1)
    assert state.take().versions == (3, 2)
    state.set("c", 1)
    assert state.take().versions is None
