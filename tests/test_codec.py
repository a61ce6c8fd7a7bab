"""`_codec`: changes to record, state to snapshot, and back; and what is refused."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from lab_state._arguments import MAX_KEY_LENGTH, RESERVED, check_key
from lab_state._codec import LoadedState, decode_snapshot, encode_record, encode_small_record, encode_snapshot, replay
from lab_state._entries import (
    DELETED,
    EXPIRED,
    FIRST_VERSIONS,
    Absent,
    ChangeSet,
    Expiring,
    Json,
    Stored,
    StoredOrGone,
    Value,
)
from lab_state._types import decode_value
from lab_state._values import encode_value
from lab_state.cache._format import message
from lab_state.cache._format import slices as parts_for_the_mirror
from lab_state.exceptions import CorruptionError, InvalidKeyError, InvalidValueError, UnsupportedError

PATH = "/state/some.json"
SLICE_BYTES = 128 * 1024

SAMPLE: dict[str, Any] = {
    "some-key": "some-value",
    "n": 1,
    "float": -1.5,
    "nothing": None,
    "yes": True,
    "é": ["ü", {"deep": [[1, 2], {}]}],
    "text": "x" * 300 + '"\\\n',
    "list": [{"id": number, "name": f"name {number}"} for number in range(20)],
    "last": {"a": 1},
}


def stored(values: Mapping[str, Any]) -> dict[str, Stored]:
    return {key: encode_value(value) for key, value in values.items()}


def plain(entries: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the values, none of which may be wrapped with a time."""
    assert not any(isinstance(value, Expiring) for value in entries.values())
    return {key: decode_value(value, Any) for key, value in entries.items() if not isinstance(value, Expiring)}


def snapshot(values: Mapping[str, Any], revision: int = 42) -> bytes:
    return b"".join(encode_snapshot(stored(values), revision, 0, copy_loaded=False))


def changes(values: Mapping[str, Any], start: int, end: int, *, cleared: bool = False) -> ChangeSet:
    """Return the changes of one commit; `DELETED` as a value deletes."""
    encoded: dict[str, Any] = {key: value if value is DELETED else encode_value(value) for key, value in values.items()}
    return ChangeSet(start, end, cleared, encoded, 0.0)


def record(values: Mapping[str, Any], start: int, end: int, *, cleared: bool = False) -> bytes:
    return b"".join(encode_record(changes(values, start, end, cleared=cleared)))


def test_a_record_of_many_deletions_lets_the_loop_run() -> None:
    """It comes in parts, empty ones where there is nothing to write yet; so one commit may delete a million keys."""
    keys = [f"key {number}" for number in range(5000)]
    parts = list(encode_record(changes(dict.fromkeys(keys, DELETED), 1, 2)))
    assert parts.count(b"") >= 8
    assert max(map(len, parts)) < SLICE_BYTES
    assert json.loads(b"".join(parts))["delete"] == keys


def corruption(data: bytes) -> CorruptionError:
    with pytest.raises(CorruptionError) as caught:
        decode_snapshot(data, PATH)
    assert caught.value.path == PATH
    return caught.value


def with_member(values: bytes, member: dict[str, Any]) -> bytes:
    """Return a snapshot with this reserved member and the right checksum."""
    head = values[:-1] + b',"$lab_state":' + msgspec.json.encode(member)[:-1]
    return head + b',"crc32":"%08x"}}' % zlib.crc32(head)


# Keys


@pytest.mark.parametrize(
    "key", ["a", " ", "é", "😀", "a/b", "$lab_state2", "\n", '"', "x" * MAX_KEY_LENGTH, "😀" * MAX_KEY_LENGTH]
)
def test_a_key_within_bounds(key: str) -> None:
    """A key has 1 to 1,024 characters, of any script."""
    assert check_key(key) == key


def test_a_key_is_a_plain_str() -> None:
    """A subclass of str is accepted, and becomes a plain str."""

    class Key(str):
        __slots__ = ()

    assert type(check_key(Key("a"))) is str
    assert check_key(Key("a")) == "a"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (1, "a key must be a str, not int"),
        (None, "a key must be a str, not NoneType"),
        (b"a", "a key must be a str, not bytes"),
        (("a",), "a key must be a str, not tuple"),
        ("", "a key must have 1 to 1024 characters, this one has 0"),
        ("x" * (MAX_KEY_LENGTH + 1), "a key must have 1 to 1024 characters, this one has 1025"),
        ("a\0b", "the key 'a\\x00b' has a NUL character; leave it out"),
        ("$lab_state", "the key '$lab_state' is reserved for lab_state's own member of a snapshot; use another key"),
        ("a\ud800", "the key 'a\\ud800' has a lone surrogate, which UTF-8 cannot hold"),
        ("\udfffé", "the key '\\udfffé' has a lone surrogate, which UTF-8 cannot hold"),
    ],
)
def test_a_key_out_of_bounds(key: object, message: str) -> None:
    """A key out of bounds is refused, with the reason."""
    with pytest.raises(InvalidKeyError) as caught:
        check_key(key)
    assert str(caught.value) == message


# Records


def test_a_record_comes_back() -> None:
    """A record sets and deletes when it is replayed, and moves the revision."""
    before = LoadedState(stored({"kept": 1, "changed": 1, "deleted": 1}), 41)
    data = record({"changed": [2], "new": "é", "deleted": DELETED, "never there": DELETED}, 41, 44)
    after = replay(before, [data], PATH)
    assert plain(after.entries) == {"kept": 1, "changed": [2], "new": "é"}
    assert after.revision == 44


def test_a_record_that_cleared_comes_back() -> None:
    """A record that cleared leaves only what it sets."""
    after = replay(
        LoadedState(stored({"old": 1, "a": 1}), 1), [record({"a": 2, "old2": DELETED}, 1, 2, cleared=True)], PATH
    )
    assert plain(after.entries) == {"a": 2}
    after = replay(LoadedState(stored({"old": 1}), 1), [record({}, 1, 2, cleared=True)], PATH)
    assert after == LoadedState({}, 2)


def test_a_record_is_one_json_object() -> None:
    """A record is one line of JSON with the members that the format names."""
    data = record({"a": [1], "b": DELETED, "c": None, "d": DELETED}, 41, 42)
    assert b"\n" not in data
    assert json.loads(data) == {
        "from": 41,
        "to": 42,
        "clear": False,
        "set": {"a": [1], "c": None},
        "delete": ["b", "d"],
        "expires": {},
        "wall": 0,
    }


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("values", [{"a": 1, "b": "text", "c": None, "d": [1.5, True], "é": {}}, {"a": {"b": [{}]}}])
def test_a_record_of_few_values_is_what_a_larger_one_is(
    values: dict[str, Any],
    cleared: bool,  # noqa: FBT001
) -> None:
    """It is made in one piece, and has the same bytes."""
    assert encode_small_record(changes(values, 41, 42, cleared=cleared)) == record(values, 41, 42, cleared=cleared)


def test_a_large_record_comes_back() -> None:
    """A record of thousands of keys is made in many slices, and comes back."""
    values = {f"key {number}": [number] if number % 2 else DELETED for number in range(7_001)}
    slices = list(encode_record(changes(values, 0, 1)))
    assert len(slices) >= 15
    after = replay(LoadedState(stored(dict.fromkeys(values, 0)), 0), [b"".join(slices)], PATH)
    assert plain(after.entries) == {key: value for key, value in values.items() if value is not DELETED}


def large_values() -> dict[str, Any]:
    return {f"key {number}": ["x" * 64_000] for number in range(150)}


@pytest.mark.parametrize("what", ["record", "snapshot"])
def test_large_values_come_in_small_slices(what: str) -> None:
    """No slice is much larger than one value or 128 KiB, from the first slice on."""
    values = large_values()
    slices = list(
        encode_record(changes(values, 0, 1))
        if what == "record"
        else encode_snapshot(stored(values), 1, 0, copy_loaded=False)
    )
    assert len(b"".join(slices)) > 150 * 64_000
    assert max(map(len, slices)) < 8 * SLICE_BYTES


def test_large_values_after_small_ones_come_in_small_slices() -> None:
    """Large values behind thousands of small ones come in small slices too."""
    values = {f"small {number}": number for number in range(2_000)} | large_values()
    assert max(map(len, encode_snapshot(stored(values), 1, 0, copy_loaded=False))) < 8 * SLICE_BYTES


def test_large_values_come_back() -> None:
    """Large values come back from a record and from a snapshot."""
    values = large_values()
    assert plain(replay(LoadedState({}, 0), [record(values, 0, 1)], PATH).entries) == values
    assert plain(decode_snapshot(snapshot(values), PATH).entries) == values


def test_stale_records_are_skipped() -> None:
    """A record that the snapshot holds already is skipped."""
    records = [record({"a": 1}, 0, 1), record({"a": 2}, 1, 2), record({"a": 3, "b": 1}, 2, 3)]
    after = replay(LoadedState(stored({"a": 2}), 2), records, PATH)
    assert (plain(after.entries), after.revision) == ({"a": 3, "b": 1}, 3)
    assert plain(replay(LoadedState(stored({"x": 0}), 9), records, PATH).entries) == {"x": 0}


def test_a_record_that_the_snapshot_holds_in_part_is_replayed() -> None:
    """A record that begins below the snapshot's revision and ends above it is replayed whole."""
    after = replay(LoadedState(stored({"a": 2}), 2), [record({"a": 3, "b": DELETED}, 0, 3)], PATH)
    assert (plain(after.entries), after.revision) == ({"a": 3}, 3)


def test_a_doubled_record_changes_nothing() -> None:
    """A record that stands there twice counts once."""
    first, second = record({"a": 1}, 0, 1), record({"a": DELETED}, 1, 2)
    assert replay(LoadedState({}, 0), [first, first, second, first, second], PATH) == LoadedState({}, 2)


@pytest.mark.parametrize("revision", [0, 1, 3])
def test_a_gap_is_refused(revision: int) -> None:
    """A record whose changes do not follow on those before it is CorruptionError, with the missing revisions."""
    with pytest.raises(CorruptionError) as caught:
        replay(LoadedState({}, revision), [record({"a": 1}, 0, 1), record({"a": 2}, 4, 5)], PATH)
    expected = max(revision, 1)
    assert caught.value.detail == f"the changes {expected + 1} to 4 are missing before record 2; restore a copy"
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"null", b"[]", b"{}", b"{", b'"a"', b"\xff", b"[" * 100_000),
        b'{"from":0,"to":1,"clear":false,"set":{},"delete":[],"expires":{},"more":1}',
        b'{"from":0,"to":1,"clear":false,"set":[],"delete":[],"expires":{}}',
        b'{"from":0,"to":"1","clear":false,"set":{},"delete":[],"expires":{}}',
        b'{"from":0,"to":1,"clear":false,"set":{},"delete":["\xff"],"expires":{}}',
    ],
    ids=range(12),
)
def test_what_is_not_a_record_is_refused(data: bytes) -> None:
    """Bytes that are no record are CorruptionError, with the number of the record."""
    with pytest.raises(CorruptionError) as caught:
        replay(LoadedState({}, 0), [record({"a": 1}, 0, 1), data], PATH)
    assert caught.value.detail == "record 2 is not the JSON of a record; restore a copy"
    assert caught.value.__suppress_context__


KEYS = st.text(min_size=1, max_size=8).filter(lambda key: "\0" not in key and key != RESERVED)
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.lists(st.integers(), max_size=3)


@given(
    st.dictionaries(KEYS, VALUES, max_size=8),
    st.lists(st.tuples(st.booleans(), st.dictionaries(KEYS, VALUES | st.just(DELETED), max_size=8)), max_size=5),
)
def test_records_and_snapshots_agree(before: dict[str, Any], commits: list[tuple[bool, dict[str, Any]]]) -> None:
    """A snapshot with the records after it stands for the same state as a dict with the same changes."""
    expected = dict(before)
    records = []
    for revision, (cleared, values) in enumerate(commits, 1):
        records.append(record(values, revision - 1, revision, cleared=cleared))
        expected = {} if cleared else expected
        expected.update(values)
        expected = {key: value for key, value in expected.items() if not isinstance(value, Absent)}
    loaded = replay(decode_snapshot(snapshot(before, 0), PATH), records, PATH)
    assert plain(loaded.entries) == expected
    assert loaded.revision == len(commits)
    again = decode_snapshot(b"".join(encode_snapshot(loaded.entries, 7, 0, copy_loaded=True)), PATH)
    assert plain(again.entries) == expected


# Snapshots


@pytest.mark.parametrize(
    "values",
    [{}, {"a": 1}, {"a": [1]}, SAMPLE, {f"key {n}": {"n": n} for n in range(5_000)}],
    ids=["empty", "scalar", "raw", "sample", "5000"],
)
@pytest.mark.parametrize("own", [False, True])
def test_a_snapshot_comes_back(values: dict[str, Any], own: bool) -> None:  # noqa: FBT001
    """A snapshot comes back with the same entries, in the same order, and the same revision."""
    data = b"".join(encode_snapshot(stored(values), 2**40, 0, copy_loaded=own))
    loaded = decode_snapshot(data, PATH)
    assert plain(loaded.entries) == values
    assert list(loaded.entries) == list(values)
    assert loaded.revision == 2**40


def test_a_snapshot_is_one_json_object() -> None:
    """A snapshot is one JSON object on one line, for any reader, with the reserved member last."""
    data = snapshot(SAMPLE)
    assert b"\n" not in data
    read = json.loads(data)
    assert list(read) == [*SAMPLE, "$lab_state"]
    member = read.pop("$lab_state")
    assert read == SAMPLE
    assert list(member) == ["format", "revision", "id", "wall", "crc32"]
    assert (member["format"], member["revision"]) == (1, 42)
    assert int(member["crc32"], 16) == zlib.crc32(data[: data.rindex(b',"crc32":"')])


def test_a_large_snapshot_comes_in_slices() -> None:
    """A snapshot of 5,000 keys is made in many slices."""
    assert len(list(encode_snapshot(stored({f"key {n}": n for n in range(5_000)}), 1, 0, copy_loaded=False))) >= 10


def test_no_two_snapshots_are_equal() -> None:
    """Two snapshots of the same view differ, so that an ETag cannot come back."""
    first, second = snapshot(SAMPLE), snapshot(SAMPLE)
    assert first != second
    assert decode_snapshot(first, PATH).revision == decode_snapshot(second, PATH).revision


def raws(entries: Mapping[str, Stored]) -> Iterator[Raw]:
    return (value for value in entries.values() if isinstance(value, Raw))


def test_values_are_owned_after_a_snapshot() -> None:
    """`copy_loaded=True` replaces the values that keep the file's buffer alive, and changes no value."""
    loaded = decode_snapshot(snapshot(SAMPLE | {f"key {n}": [n] for n in range(1_000)}), PATH).entries
    assert all(value.copy() is not value for value in raws(loaded))
    before = plain(loaded)
    list(encode_snapshot(loaded, 1, 0, copy_loaded=True))
    assert not list(raws(loaded))
    assert plain(loaded) == before


def test_values_are_left_alone_when_they_are_owned() -> None:
    """`copy_loaded=False` leaves the view as it is, and `copy_loaded=True` copies nothing that is owned."""
    borrowed = decode_snapshot(snapshot(SAMPLE), PATH).entries
    owned: dict[str, Stored] = {"a": 1, "b": Json(b"[1]")}
    for entries, own in ((borrowed, False), (owned, True)):
        before = dict(entries)
        list(encode_snapshot(entries, 1, 0, copy_loaded=own))
        assert all(entries[key] is value for key, value in before.items())


# Damage


def small_snapshot() -> bytes:
    data = snapshot(SAMPLE)
    assert 1_000 < len(data) < 1_500
    return data


@pytest.mark.parametrize(
    "values", [{}, {"a": 1}, {"a": {"b": {}}}, {"a": []}], ids=["empty", "scalar", "objects", "list"]
)
def test_every_flipped_bit_of_a_tiny_snapshot_is_noticed(values: dict[str, Any]) -> None:
    """A single flipped bit in a snapshot of no key or one is an error, never another state."""
    assert_every_flip_is_noticed(snapshot(values))


def test_every_flipped_bit_is_noticed() -> None:
    """A single flipped bit, anywhere in a snapshot, is an error, never another state."""
    assert_every_flip_is_noticed(small_snapshot())


def assert_every_flip_is_noticed(data: bytes) -> None:
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptionError, UnsupportedError)):
            decode_snapshot(bytes(damaged), PATH)


def test_every_truncation_is_noticed() -> None:
    """A snapshot cut short at any byte is CorruptionError."""
    data = small_snapshot()
    for end in range(len(data)):
        corruption(data[:end])


def test_every_doubled_or_missing_byte_is_noticed() -> None:
    """A snapshot with any one byte missing or doubled is an error."""
    data = small_snapshot()
    for at in range(len(data)):
        for damaged in (data[:at] + data[at + 1 :], data[:at] + data[at : at + 1] + data[at:]):
            with pytest.raises((CorruptionError, UnsupportedError)):
                decode_snapshot(damaged, PATH)


@pytest.mark.parametrize("zeros", [1, 512, 4096])
def test_a_zeroed_tail_is_noticed(zeros: int) -> None:
    """A snapshot with zeros in place of its tail, or behind it, is CorruptionError."""
    data = small_snapshot()
    corruption(data + bytes(zeros))
    corruption(data[:-zeros] + bytes(zeros))


def test_a_value_that_was_swapped_is_noticed() -> None:
    """A value edited by hand is refused, and the message says how to edit."""
    error = corruption(snapshot(SAMPLE).replace(b"some-value", b"same-value"))
    assert error.detail == (
        "its checksum does not match its contents; restore a copy. If it was edited by hand, delete "
        """`,"crc32":"…"` at the end of its member '$lab_state': the rest of the member stays valid"""
    )


def edited(data: bytes, *changes: tuple[bytes, bytes]) -> bytes:
    """Return a snapshot without its checksum, and with these changes."""
    data = data[: data.rindex(b',"crc32":"')] + b"}}"
    for old, new in changes:
        assert old in data
        data = data.replace(old, new)
    return data


@pytest.mark.parametrize("indent", [None, 2])
def test_an_edit_by_hand_keeps_the_expiry_times(indent: int | None) -> None:
    """Without its checksum, the rest of the member holds: the revision is one higher, and times of missing keys are ignored."""
    view: dict[str, Stored] = {"a": Expiring(1, 5_000), "gone": Expiring(2, 6_000), "c": 3}
    data = b"".join(encode_snapshot({**view}, 42, 1_000, copy_loaded=False, wall=2_000))
    data = edited(data, (b'"gone":2,', b""), (b'"c":3', b'"c":4,"new":5'))
    if indent is not None:
        data = json.dumps(json.loads(data), indent=indent).encode() + b"\n"
    loaded = decode_snapshot(data, PATH)
    assert {key: bytes(cast("Any", value)) for key, value in loaded.entries.items()} == {
        "a": b"1",
        "c": b"4",
        "new": b"5",
    }
    assert loaded[1:] == (43, {"a": 5_000}, 1_000, 2_000, None, FIRST_VERSIONS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ((b'"n":1', b'"n":1e999'), "out of range"),
        ((b'"n":1', b'"":1'), "cannot keep one of its keys"),
        ((b'"revision":42', b'"revision":-1'), "checksum"),
        ((b'"revision":42', b'"revision":9223372036854775807'), "checksum"),
        ((b'"format":1', b'"format":0'), "checksum"),
        ((b'"id":"', b'"id":"0'), "checksum"),
        ((b'"wall":0', b'"wall":0,"crc33":"01234567"'), "is damaged"),
        ((b'"wall":0', b'"wall":"0"'), "is damaged"),
    ],
)
def test_a_bad_edit_by_hand_is_refused(change: tuple[bytes, bytes], text: str) -> None:
    """The file is checked as that of another program is."""
    assert text in corruption(edited(snapshot(SAMPLE), change)).detail


@pytest.mark.parametrize("indent", [None, 2])
def test_a_snapshot_written_again_by_another_program_is_refused(indent: int | None) -> None:
    """A snapshot that another program read and wrote is refused while its member is there."""
    assert (
        "If it was edited by hand"
        in corruption(json.dumps(json.loads(snapshot(SAMPLE)), indent=indent).encode()).detail
    )


@pytest.mark.parametrize(
    "member",
    [
        *(b"null", b"1", b"{}", b"[]", b'"\xff"', b'{"format":"1"}', b'{"format":1}', b'{"format":1.5}'),
        b'{"format":1,"revision":1,"id":"","crc32":"","more":1}',
    ],
)
def test_a_member_that_is_not_ours_is_refused(member: bytes) -> None:
    """A reserved member that is not one is refused as damaged."""
    assert corruption(b'{"a":1,"$lab_state":%s}' % member).detail.startswith(
        "its member '$lab_state' is damaged; restore a copy. If it was edited"
    )


@pytest.mark.parametrize("member", [{"format": 0, "revision": 1, "id": ""}, {"format": 1, "revision": -1, "id": ""}])
def test_a_member_with_impossible_numbers_is_refused(member: dict[str, Any]) -> None:
    """A format below 1 or a negative revision is refused, even with the right checksum."""
    assert "does not match" in corruption(with_member(b'{"a":1}', member)).detail


def test_the_member_of_s3_is_read() -> None:
    """The members that only S3 writes are known."""
    member = {"format": 1, "revision": 7, "id": "x", "expires": {}, "seq": 3, "fence": 2}
    assert decode_snapshot(with_member(b'{"a":1}', member), PATH).revision == 7


def test_a_newer_format_is_refused() -> None:
    """A newer format is UnsupportedError, whatever else its member holds, and says what to do."""
    data = with_member(b'{"a":1}', {"format": 2, "revision": "new", "shards": []})
    with pytest.raises(UnsupportedError) as caught:
        decode_snapshot(data, PATH)
    assert str(caught.value) == (
        "/state/some.json has format 2, and this version of lab_state knows 1: use the version that wrote it; "
        "it was left untouched"
    )


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (
            b"",
            "it has no JSON, but a state is always one JSON object; restore a copy, or delete it and the journal beside it to start with an empty state",
        ),
        (
            b" \n\t",
            "it has no JSON, but a state is always one JSON object; restore a copy, or delete it and the journal beside it to start with an empty state",
        ),
        (b"[]", "it is not a JSON object; a state is one object, with a member for each key; restore a copy"),
        (b'"a"', "it is not a JSON object; a state is one object, with a member for each key; restore a copy"),
        (b"null", "it is not a JSON object; a state is one object, with a member for each key; restore a copy"),
        (b"NaN", "it is not a JSON object; a state is one object, with a member for each key; restore a copy"),
        (b"\0" * 512, "it is not a JSON object; a state is one object, with a member for each key; restore a copy"),
    ],
    ids=count(),
)
def test_what_is_not_an_object_is_refused(data: bytes, detail: str) -> None:
    """A file that is not one JSON object is CorruptionError, and the message says what it is."""
    error = corruption(data)
    assert error.detail == detail
    assert error.offset == 0
    assert error.__suppress_context__


@pytest.mark.parametrize(
    ("data", "offset"),
    [(b"{", 0), (b"{}}", 3), (b"{'a':1}", 1), (b'{"a":NaN}', 5), (b'{"a":1,}', 7), (b'{"\xff":1}', 0)],
    ids=count(),
)
def test_what_is_not_valid_json_is_refused(data: bytes, offset: int) -> None:
    """The message says what is wrong, and where, if the decoder says it."""
    error = corruption(data)
    assert re.fullmatch(r"it is not valid JSON \([^()]+\); correct it, or restore a copy", error.detail)
    assert error.offset == offset


# Files that another program wrote


GO_MAP = b"""{
  "big": 1e+06,
  "count": 3,
  "html": "\\u003cb\\u003e \\u0026 \\u2028",
  "list": [
    1,
    null,
    "two"
  ],
  "nested": {
    "a": {
      "b": 1.5
    }
  },
  "nothing": null,
  "small": 1e-07
}"""


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_a_go_programs_map_loads_as_it_is(tail: bytes) -> None:
    """A map that Go's json.MarshalIndent wrote is imported at revision 0."""
    loaded = decode_snapshot(GO_MAP + tail, PATH)
    assert loaded.revision == 0
    assert plain(loaded.entries) == json.loads(GO_MAP)
    assert plain(loaded.entries)["html"] == "<b> & \u2028"
    assert type(plain(loaded.entries)["big"]) is float


@pytest.mark.parametrize("data", [b"{}", b" { } \n"])
def test_an_empty_object_is_an_empty_state(data: bytes) -> None:
    """An object without members is an empty state at revision 0."""
    assert decode_snapshot(data, PATH) == LoadedState({}, 0)


@pytest.mark.parametrize("values", [{}, SAMPLE], ids=["empty", "sample"])
def test_a_file_edited_by_hand_is_imported(values: dict[str, Any]) -> None:
    """A snapshot whose member was deleted, as the message advises, is imported at revision 0."""
    read = json.loads(snapshot(values))
    del read["$lab_state"]
    loaded = decode_snapshot(json.dumps(read, indent=2).encode(), PATH)
    assert (plain(loaded.entries), loaded.revision) == (values, 0)


@pytest.mark.parametrize("values", [{}, SAMPLE], ids=["empty", "sample"])
def test_a_member_whose_name_is_damaged_is_refused(values: dict[str, Any]) -> None:
    """A member renamed by one character is refused, not imported as one more key."""
    data = snapshot(values)
    at = data.index(RESERVED.encode())
    for position in range(at, at + len(RESERVED)):
        error = corruption(data[:position] + b"x" + data[position + 1 :])
        assert error.detail == "the name of its last member, '$lab_state', is damaged; restore a copy"
        assert error.offset > 0


def test_a_key_that_looks_like_the_member_is_a_key() -> None:
    """A user's own object with a format or a revision in it is no reserved member."""
    values = {"a": {"format": 1, "revision": 2, "id": "x"}, "$lab_state2": {"format": 1}}
    assert plain(decode_snapshot(msgspec.json.encode(values), PATH).entries) == values
    assert plain(decode_snapshot(snapshot(values), PATH).entries) == values


@pytest.mark.parametrize("value", [b'"\xff"', b'["ok",{"a":"\xc3"}]', b'{"\xff":1}'], ids=range(3))
def test_a_foreign_value_that_cannot_be_read_is_refused(value: bytes) -> None:
    """A value that could not be read back is refused when the file is loaded, with its key."""
    error = corruption(b'{"good":1,"bad":%s,"other":2}' % value)
    assert error.detail == "the value of 'bad' is not valid JSON in UTF-8; correct it by hand"
    assert error.__context__ is None


@pytest.mark.parametrize(
    "text",
    [
        *(r"\ud800", r"\uDFFF", r"x\ud83d", r"\ud83d\\ude00", r"\ud83d x \ude00", r"\ud83d\n", r"\ude00\ud83d"),
        *(r"\ud83d\ud83d\ude00", r"\ud83d\u0041"),
    ],
    ids=count(),
)
@pytest.mark.parametrize("before", [b"", rb"\ud83d\ude00 \\ud83d \\\\ "], ids=["alone", "behind a whole character"])
def test_a_foreign_value_with_a_lone_surrogate_is_refused(text: str, before: bytes) -> None:
    """A value with half of a surrogate pair is refused when the file is loaded, with that reason and its offset."""
    data = b'{"good":1,"bad":"%s%s"}' % (before, text.encode())
    error = corruption(data)
    assert error.detail.startswith("it has a lone surrogate, which UTF-8 cannot hold")
    assert error.offset == data.index(b'"bad":"') + 7 + len(before) + text.index("\\u")


@pytest.mark.parametrize("value", [b"1e400", b"-1e999", b'[1, {"x": 1e400}]', b"1" + b"0" * 5_000], ids=count())
def test_a_foreign_number_out_of_range_is_refused(value: bytes) -> None:
    """A number that no float holds is refused as what it is, where the value begins."""
    data = b'{"good":1,"bad":%s}' % value
    error = corruption(data)
    assert error.detail.startswith("the value of 'bad' has a number that is out of range")
    assert error.offset == data.index(b'"bad":') + 6


@pytest.mark.parametrize("key", [b"", b"k" * 1_025, rb"a\u0000b"], ids=count())
def test_a_foreign_key_that_cannot_be_written_is_refused(key: bytes) -> None:
    """A file with a key that no call takes, and no reader reads, is refused, and the message says which."""
    error = corruption(b'{"good":1,"%s":2}' % key)
    assert error.detail.startswith("lab_state cannot keep one of its keys (")
    assert error.detail.endswith("); rename this key in the file")


@pytest.mark.parametrize(
    ("levels", "message"), [(129, "the value of 'deep' has more than 128 levels of nesting; use fewer"), (5_000, "")]
)
def test_a_foreign_value_that_is_too_deep_is_refused(levels: int, message: str) -> None:
    """A value nested too deep is refused when the file is loaded, and 128 levels are not."""
    ok = b'{"deep":%s}' % (b"[" * 128 + b"]" * 128)
    assert list(decode_snapshot(ok, PATH).entries) == ["deep"]
    assert message in corruption(b'{"deep":%s}' % (b"[" * levels + b"]" * levels)).detail


def test_a_byte_order_mark_is_named() -> None:
    """A file that an editor put a mark into is refused with the word for it."""
    assert "byte order mark" in corruption(b'\xef\xbb\xbf{"a":1}').detail


# What expires


def expiring(values: Mapping[str, Any], at: int = 5_000) -> dict[str, Stored]:
    """Return values that expire one millisecond after another."""
    encoded = {key: encode_value(value) for key, value in values.items()}
    return {key: Expiring(value, at + number) for number, (key, value) in enumerate(encoded.items())}


def times_of(values: Mapping[str, Stored]) -> dict[str, int]:
    return {key: value.at for key, value in values.items() if isinstance(value, Expiring)}


def record_at(
    values: Mapping[str, StoredOrGone], start: int, end: int, time: int = 0, *, cleared: bool = False
) -> bytes:
    return b"".join(encode_record(ChangeSet(start, end, cleared, dict(values), 0.0, time)))


def test_a_record_of_what_expires() -> None:
    """A record has the times of the keys that have one, and the time at which it was taken."""
    data = record_at({"stays": 1, **expiring({"a": [1], "b": "x"}), "gone": EXPIRED, "deleted": DELETED}, 1, 2, 4_000)
    assert json.loads(data) == {
        "from": 1,
        "to": 2,
        "clear": False,
        "set": {"stays": 1, "a": [1], "b": "x"},
        "delete": ["gone", "deleted"],
        "expires": {"a": 5_000, "b": 5_001},
        "time": 4_000,
        "wall": 0,
    }
    after = replay(LoadedState({"gone": 1, "kept": 1}, 1), [data], PATH)
    assert plain(after.entries) == {"kept": 1, "stays": 1, "a": [1], "b": "x"}
    assert (after.revision, after.expires, after.time) == (2, {"a": 5_000, "b": 5_001}, 4_000)


def test_a_snapshot_of_what_expires() -> None:
    """A snapshot has the times and its own time in the reserved member, and they come back beside plain values."""
    view = stored({"stays": 1}) | expiring({"a": [1], "é": "x"})
    data = b"".join(encode_snapshot(view, 7, 4_000, copy_loaded=False))
    read = json.loads(data)
    member = read.pop("$lab_state")
    assert read == {"stays": 1, "a": [1], "é": "x"}
    assert list(member) == ["format", "revision", "id", "expires", "time", "wall", "crc32"]
    assert (member["expires"], member["time"]) == ({"a": 5_000, "é": 5_001}, 4_000)
    loaded = decode_snapshot(data, PATH)
    assert plain(loaded.entries) == {"stays": 1, "a": [1], "é": "x"}
    assert (loaded.revision, loaded.expires, loaded.time) == (7, {"a": 5_000, "é": 5_001}, 4_000)


def test_where_nothing_expires_no_time_is_written() -> None:
    """`time` stands beside `expires` alone."""
    assert b"time" not in record_at({"a": 1, "b": EXPIRED}, 0, 1)
    data = b"".join(encode_snapshot(stored({"a": 1}), 1, 4_000, copy_loaded=False))
    assert b"time" not in data
    assert b"expires" not in data
    assert (decode_snapshot(data, PATH).expires, decode_snapshot(data, PATH).time) == ({}, 0)


@pytest.mark.parametrize("size", [1, 499, 500, 501, 7_001])
def test_many_that_expire_come_back(size: int) -> None:
    """Thousands of times are made in many slices, in a record and in a snapshot, and all come back."""
    values = expiring({f"key {number}": [number] for number in range(size)}, 10**12)
    record_slices = list(encode_record(ChangeSet(0, 1, False, dict(values), 0.0, 5)))
    snapshot_slices = list(encode_snapshot(values, 1, 5, copy_loaded=False))
    for slices in (record_slices, snapshot_slices):
        assert len(slices) >= 2 * (size // 500)
        assert max(map(len, slices)) < 500 * 32
    assert times_of(values) == replay(LoadedState({}, 0), [b"".join(record_slices)], PATH).expires
    loaded = decode_snapshot(b"".join(snapshot_slices), PATH)
    assert (loaded.expires, len(loaded.entries)) == (times_of(values), size)


def test_large_values_that_expire_come_in_small_slices() -> None:
    """What expires is measured for slices like what stays."""
    values = expiring(large_values())
    assert max(map(len, encode_snapshot(values, 1, 0, copy_loaded=False))) < 8 * SLICE_BYTES
    assert max(map(len, encode_record(ChangeSet(0, 1, False, dict(values), 0.0)))) < 8 * SLICE_BYTES


FRAGMENTS = [*'[]{},:"\\ ', "1", "null", '"k"', '"admin"', "$lab_state", "é", "\n", '1],"admin":[', '","admin":"']


class _Dumped:
    """Has a serializer of its own, as a Pydantic model has."""

    def __init__(self, text: str) -> None:
        self.text = text

    def model_dump_json(self, **_: object) -> str:
        return self.text

    def model_dump(self, **_: object) -> object:
        return self.text


@pytest.mark.parametrize("kind", [lambda text: Raw(text.encode()), _Dumped], ids=["Raw", "serializer"])
@given(
    texts=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), min_size=1, max_size=4),
    wrap=st.sampled_from([lambda inner: [inner], lambda inner: {"a": inner}, lambda inner: [[1], {"a": [inner, 2]}]]),
)
def test_as_many_members_as_keys(kind: Any, texts: list[str], wrap: Any) -> None:
    """Whatever a Raw or a serializer inside of values wrote, what is accepted is one member each, in order."""
    accepted: dict[str, Stored] = {"admin": "root"}
    for number, text in enumerate(texts):
        with suppress(InvalidValueError):
            accepted[f"note {number}"] = encode_value(wrap(kind(text)))
    data = b"".join(encode_record(ChangeSet(0, 1, False, dict(accepted), 0.0)))
    timed = {key: Expiring(cast("Value", value), 5_000) for key, value in accepted.items()}
    slow = b"".join(encode_record(ChangeSet(0, 1, False, dict(timed), 0.0, 4_000)))
    whole = b"".join(encode_snapshot(dict(accepted), 1, 0, copy_loaded=False))
    (part,) = parts_for_the_mirror(accepted.items(), 0)
    assert part is not None
    for found in (
        json.loads(data, object_pairs_hook=list),
        json.loads(slow, object_pairs_hook=list),
        json.loads(message(0, 1, "w", part), object_pairs_hook=list),
    ):
        (members,) = [value for name, value in found if name == "set"]
        assert [key for key, _ in members] == [*accepted]
    assert [key for key, _ in json.loads(whole, object_pairs_hook=list)] == [*accepted, "$lab_state"]
    assert decode_snapshot(whole, PATH).entries["admin"] == Raw(b'"root"')


@pytest.mark.parametrize("values", [b'{"b":1}', b'{"b":1,"A":{"a":1}}'])
def test_a_time_without_a_value_is_damage(values: bytes) -> None:
    """A snapshot or a record with a time for a key that it does not set is CorruptionError, with the key."""
    member = {"format": 1, "revision": 1, "id": "0", "expires": {"a": 5_000}, "time": 1}
    data = with_member(values, member)
    expected = "the key 'a' has an expiry time, but no value; restore a copy"
    assert corruption(data).detail == expected
    wrong = b'{"from":0,"to":1,"clear":false,"set":%s,"delete":[],"expires":{"a":5},"time":1}' % values
    with pytest.raises(CorruptionError) as caught:
        replay(LoadedState({"a": 1}, 0, {"a": 5}), [wrong], PATH)
    assert (caught.value.path, caught.value.detail) == (PATH, expected)


@pytest.mark.parametrize("times", [b'{"a":1.5}', b'{"a":"5"}', b'{"a":null}', b"[]", b"5"])
def test_a_time_that_is_no_integer_is_damage(times: bytes) -> None:
    """A time is an integer, in a record and in a snapshot."""
    data = b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":[],"expires":%s}' % times
    with pytest.raises(CorruptionError, match="is not the JSON of a record"):
        replay(LoadedState({}, 0), [data], PATH)
    head = b'{"a":1,"$lab_state":{"format":1,"revision":1,"id":"0","expires":%s' % times
    corruption(head + b',"crc32":"%08x"}}' % zlib.crc32(head))


def test_every_flipped_bit_of_a_time_is_noticed() -> None:
    """A single flipped bit in a snapshot with times is an error, never another time."""
    assert_every_flip_is_noticed(b"".join(encode_snapshot(expiring({"a": 1, "b": [2]}), 1, 4_000, copy_loaded=False)))


BEFORE: dict[str, int] = {"a": 5_000, "b": 6_000}


@pytest.mark.parametrize(
    ("changed", "cleared", "expected"),
    [
        ({"c": 1}, False, {"a": 5_000, "b": 6_000}),
        ({"a": 2}, False, {"b": 6_000}),
        ({"a": DELETED}, False, {"b": 6_000}),
        ({"a": EXPIRED, "b": 1}, False, {}),
        ({"a": Expiring(1, 7_000)}, False, {"a": 7_000, "b": 6_000}),
        ({"a": Expiring(1, 4_000), "c": Expiring(1, 1)}, False, {"a": 4_000, "b": 6_000, "c": 1}),
        ({}, True, {}),
        ({"a": 1}, True, {}),
        ({"b": Expiring(1, 9_000)}, True, {"b": 9_000}),
    ],
)
def test_replay_keeps_the_times(changed: dict[str, StoredOrGone], cleared: bool, expected: dict[str, int]) -> None:  # noqa: FBT001
    """A set without a time, a delete and a clear take the time away; a set with one brings it; others keep theirs."""
    before = LoadedState({"a": 1, "b": 1, "stays": 1}, 1, BEFORE, 100)
    after = replay(before, [record_at(changed, 1, 2, cleared=cleared)], PATH)
    assert after.expires == expected
    assert after.expires.keys() <= after.entries.keys()
    assert BEFORE == {"a": 5_000, "b": 6_000}


def test_a_deleted_key_that_is_set_again_has_no_old_time() -> None:
    """Record by record: what was deleted or cleared and comes again comes without the time it had."""
    records = [
        record_at(expiring({"a": 1, "b": 1}), 0, 1),
        record_at({"a": DELETED}, 1, 2),
        record_at({"a": 2}, 2, 3),
        record_at({}, 3, 4, cleared=True),
        record_at({"b": 3}, 4, 5),
    ]
    assert replay(LoadedState({}, 0), records[:1], PATH).expires == {"a": 5_000, "b": 5_001}
    assert replay(LoadedState({}, 0), records[:3], PATH).expires == {"b": 5_001}
    after = replay(LoadedState({}, 0), records, PATH)
    assert (plain(after.entries), after.expires) == ({"b": 3}, {})


@pytest.mark.parametrize("before", [0, 2_500, 9_000])
def test_the_time_of_a_replay_is_the_last(before: int) -> None:
    """The time of what was written is that of the last record that has one."""
    records = [
        record_at(expiring({"a": 1}), 1, 2, 3_000),
        record_at(expiring({"b": 1}), 2, 3, 2_000),
        record_at({"c": 1}, 3, 4),  # nothing expires in the state: it has no time
    ]
    assert replay(LoadedState({}, 1, {}, before), records, PATH).time == 2_000


def test_a_stale_record_brings_no_time() -> None:
    """A record that the snapshot holds already changes neither the times nor the time."""
    stale = record_at(expiring({"a": 1}), 0, 1, 9_000)
    assert replay(LoadedState({"a": 2}, 1, {}, 100), [stale], PATH) == LoadedState({"a": 2}, 1, {}, 100)


def test_values_that_expire_are_owned_after_a_snapshot() -> None:
    """`copy_loaded=True` replaces what keeps the file's buffer alive within what expires, too, and changes no value or time."""
    data = b"".join(encode_snapshot(expiring({"a": [1], "b": {"c": 2}, "d": "x"}), 1, 0, copy_loaded=False))
    loaded = decode_snapshot(data, PATH)
    view: dict[str, Stored] = {
        key: Expiring(value, loaded.expires[key])
        for key, value in loaded.entries.items()
        if not isinstance(value, Expiring)
    }
    assert [type(value.value) for value in view.values() if isinstance(value, Expiring)] == [Raw, Raw, Raw]
    untouched = dict(view)
    list(encode_snapshot(view, 1, 0, copy_loaded=False))
    assert all(view[key] is value for key, value in untouched.items())
    again = b"".join(encode_snapshot(view, 1, 0, copy_loaded=True))
    times = {"a": (b"[1]", 5_000), "b": (b'{"c":2}', 5_001), "d": (b'"x"', 5_002)}
    assert {key: (one.value, one.at) for key, one in view.items() if isinstance(one, Expiring)} == times
    assert len(view) == len(times)
    assert decode_snapshot(again, PATH) == loaded
    owned = dict(view)
    list(encode_snapshot(view, 1, 0, copy_loaded=True))
    assert all(view[key] is value for key, value in owned.items())


EXPIRING_VALUES = st.builds(lambda value, at: Expiring(encode_value(value), at), VALUES, st.integers(0, 10**13))
CHANGED = EXPIRING_VALUES | VALUES.map(encode_value) | st.sampled_from([DELETED, EXPIRED])


@given(st.lists(st.tuples(st.booleans(), st.dictionaries(st.sampled_from("abcd"), CHANGED, max_size=4)), max_size=6))
def test_times_against_a_dict(commits: list[tuple[bool, dict[str, Any]]]) -> None:
    """Whatever is set, deleted, expired and cleared, a replay ends with the values and times of the last changes."""
    expected: dict[str, Any] = {}
    records = []
    for revision, (cleared, changed) in enumerate(commits, 1):
        records.append(record_at(changed, revision - 1, revision, cleared=cleared))
        expected = {} if cleared else expected
        expected.update(changed)
        expected = {key: value for key, value in expected.items() if not isinstance(value, Absent)}
    for cut in {0, len(records) // 2}:
        first = replay(LoadedState({}, 0), records[:cut], PATH)
        view: dict[str, Stored] = {
            key: Expiring(value, first.expires[key]) if key in first.expires else value  # type: ignore[arg-type]
            for key, value in first.entries.items()
        }
        middle = decode_snapshot(b"".join(encode_snapshot(view, cut, 1, copy_loaded=True)), PATH)
        last = replay(middle, records[cut:], PATH)
        assert last.expires == times_of(expected)
        values = {key: value.value if isinstance(value, Expiring) else value for key, value in expected.items()}
        assert plain(last.entries) == plain(values)


def test_a_record_that_sets_and_deletes_a_key_with_a_time() -> None:
    """A time for a key that the same record deletes is CorruptionError."""
    data = b'{"from":0,"to":1,"clear":false,"set":{"a":1},"delete":["a"],"expires":{"a":5},"time":1}'
    with pytest.raises(CorruptionError, match="has an expiry time, but no value"):
        replay(LoadedState({}, 0), [data], PATH)


def test_the_wall_clock_is_kept_beside_the_time() -> None:
    """What the wall clock showed is kept, in a snapshot and in a record, where something expires."""
    data = b"".join(encode_snapshot(expiring({"a": 1}), 1, 2_000, copy_loaded=False, wall=7_000))
    loaded = decode_snapshot(data, PATH)
    assert (loaded.time, loaded.wall) == (2_000, 7_000)
    changed = ChangeSet(1, 2, False, dict(expiring({"b": 1})), 0.0, 3_000, 8_000)
    after = replay(loaded, [b"".join(encode_record(changed))], PATH)
    assert (after.time, after.wall) == (3_000, 8_000)


def test_bytes_lost_from_a_snapshot_make_no_other_state() -> None:
    """What is left may be good JSON, without the member; but it ends as a state does, and so it is refused."""
    data = b"".join(encode_snapshot({"a": Json(b'{"text":"0123456789"}')}, 5, 0, copy_loaded=False))
    lost = data[: data.index(b"567")] + data[data.index(b'"id":"') + 6 :]
    assert msgspec.json.decode(lost).keys() == {"a"}
    with pytest.raises(CorruptionError, match="bytes before the end are missing"):
        decode_snapshot(lost, "path")
    assert decode_snapshot(lost + b"\n", "path").revision == 0


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400])
@pytest.mark.parametrize("where", ["revision", "time", "wall", "at"])
def test_numbers_that_nobody_can_count_with(where: str, number: int) -> None:
    """They are damage, whatever the checksum says: not an OverflowError at the start, or at a read."""
    told = {"revision": 3, "time": 5, "wall": 5, "at": 7, where: number}
    covered = b'{"a":1,"$lab_state":{"format":1,"revision":%d,"id":"x","expires":{"a":%d},"time":%d,"wall":%d' % (
        told["revision"],
        told["at"],
        told["time"],
        told["wall"],
    )
    with pytest.raises(CorruptionError):
        decode_snapshot(b'%s,"crc32":"%08x"}}' % (covered, zlib.crc32(covered)), "path")
    record = b'{"from":0,"to":%d,"clear":false,"set":{"a":1},"delete":[],"expires":{"a":%d},"time":%d,"wall":%d}'
    with pytest.raises(CorruptionError):
        replay(LoadedState({}, 0), [record % (told["revision"], told["at"], told["time"], told["wall"])], "path")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("value", ["é\n" * 100_000, ["x" * 300_000], "x" * 65_536], ids=["str", "list", "slice"])
def test_one_large_value_goes_out_in_pieces(value: Any, own: bool) -> None:  # noqa: FBT001 -- a parameter
    """No slice of a record or a snapshot is larger than a piece, whatever one value has, and it comes back as it was."""
    values = {"before": 1, "large": value, "behind": [2]}
    view = dict(decode_snapshot(snapshot(values), PATH).entries) if own else stored(values)
    slices = list(encode_snapshot(view, 1, 0, copy_loaded=own))
    record_slices = list(encode_record(ChangeSet(0, 1, False, dict(stored(values)), 0.0)))
    for each in (slices, record_slices):
        assert max(map(len, each)) <= 6 * 64 * 1024  # a character may take six bytes of JSON
        assert len(each) >= 3
    assert plain(decode_snapshot(b"".join(slices), PATH).entries) == values
    assert plain(replay(LoadedState({}, 0), [b"".join(record_slices)], PATH).entries) == values
    assert not own or not list(raws(view))
