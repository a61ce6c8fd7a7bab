"""What can be saved of damaged bytes, and that each loss is listed: snapshots, journals and records that do not fit together."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from lab_state import FileStorage, Manager
from lab_state import _journal as journal
from lab_state._codec import encode_snapshot
from lab_state._journal import ANY_BASE, NO_BASE, FrameKind
from lab_state.cli._salvage import Salvaged, salvage, salvage_objects
from lab_state.cli._storages import raw_of
from lab_state.storage.s3._pieces import Pieces

Records = list[tuple[bytes, str | None]]

MAY_BE_WRONG = "The keys and values that can be read are kept, but one or more of them may be wrong"
NO_MEMBER = "the snapshot: its member $lab_state is lost, and with it the revision, all expiry times and the version of the schema"
GUESSED = "applied only because the revisions fit. Nothing else shows that the snapshot is the right one, so the result may be a mix of two moments"
SKIPPED = "left out, because the state already has these revisions. It may still lack what was changed"
FOLLOWED = "the journal does not name the snapshot, which a running manager wrote: later changes may be missing"


def snapshot(revision: int = 2, *, is_followed: bool = False, **values: Any) -> bytes:
    view: dict[str, Any] = {key: json.dumps(value).encode() for key, value in values.items()}
    return b"".join(encode_snapshot(view, revision, 0, copy_loaded=False, is_followed=is_followed))


def record(start: int, *, clear: bool = False, **values: Any) -> bytes:
    members = {"from": start, "to": start + 1, "clear": clear, "set": values, "delete": [], "expires": {}}
    return json.dumps(members).encode()


def base_of(data: bytes) -> str:
    return journal.base_of(len(data), zlib.crc32(data))


def journal_of(base: str, *records: bytes, checkpoint: bytes | None = None) -> bytes:
    """Return a journal with these records. `checkpoint` is the snapshot that a checkpoint frame behind them names."""
    frames = [journal.frame("salt", FrameKind.RECORD, one) for one in records]
    if checkpoint is not None:
        frames.append(journal.frame("salt", FrameKind.CHECKPOINT, base_of(checkpoint).encode()))
    return journal.header("x", "salt", base) + b"".join(frames)


def edited(data: bytes) -> bytes:
    return data.split(b',"crc32"')[0] + b"}}"


def values_of(found: Salvaged) -> dict[str, Any]:
    return {key: json.loads(raw_of(stored)) for key, stored in found.state.entries.items()}


async def test_an_edit_beside_a_journal_with_records(tmp_path: Path) -> None:
    """No record is applied to a snapshot that was edited after a crash, because the first one would be skipped. Each is listed."""
    async with Manager("x", FileStorage(tmp_path)) as state:
        await state.set("a", 1)
        await state.set("b", 1)
    async with Manager("x", FileStorage(tmp_path)) as state:
        for key, value in (("a", 100), ("b", 200)):
            await state.set(key, value)
            await state.flush()
        files = [(tmp_path / f"x{suffix}").read_bytes() for suffix in (".json", ".journal")]
    found = salvage(edited(files[0]), files[1], "x")
    assert values_of(found) == {"a": 1, "b": 1}
    assert found.lost == [
        "change 3 of 'a': made after another snapshot",
        "change 4 of 'b': made after another snapshot",
    ]
    assert (found.state.revision, found.highest) == (3, 4)


def test_an_edit_that_a_journal_names() -> None:
    """Records that were made after an edit are applied, with damage behind them. A damaged edit counts as an edit, too."""
    edit = edited(snapshot(a=1))
    found = salvage(edit, journal_of(base_of(edit), record(3, a=2)) + b"torn", "x")
    assert (values_of(found), len(found.lost)) == ({"a": 2}, 1)
    damaged = edited(snapshot(a=1, b="xyz")).replace(b"xyz", b"x\xffz")
    found = salvage(damaged, journal_of("9-01234567", record(2, a=2), record(3, c=1)), "x")
    assert (values_of(found), found.state.revision) == ({"a": 1}, 3)
    assert [line.split(":")[1] for line in found.lost[2:]] == [" made after another snapshot"] * 2


def test_an_edit_beside_records_in_a_bucket() -> None:
    """Records that name no snapshot are applied to an edit only if all of them begin at its revision or later. A line says so."""
    edit = edited(snapshot(a=1, b=1))
    early: Records = [(record(2, a=100), None), (record(3, b=200), None)]
    found = salvage_objects(Pieces(edit, None, early, True, []))
    assert values_of(found) == {"a": 1, "b": 1}
    assert found.lost == [
        "change 3 of 'a': made after another snapshot",
        "change 4 of 'b': made after another snapshot",
    ]
    later: Records = [(record(3, a=100), "own"), (record(4, b=200), "own")]
    found = salvage_objects(Pieces(edit, None, later, True, []))
    assert (values_of(found), found.lost) == ({"a": 100, "b": 200}, [f"changes 4 to 5: {GUESSED}"])
    named: Records = [(record(3, a=100), base_of(edit)), (record(4, b=200), "9-01234567")]
    found = salvage_objects(Pieces(edit, base_of(edit), named, True, []))
    assert (values_of(found), found.lost) == ({"a": 100, "b": 1}, ["change 5 of 'b': made after another snapshot"])


def test_records_that_only_their_revisions_fit() -> None:
    """If a journal does not name an intact snapshot, a line has the changes that were applied, and one those that were not."""
    own = snapshot(a=1)
    found = salvage(own, journal_of("9-01234567", record(1, a=1), record(2, b=2), record(3, b=3)), "x")
    assert values_of(found) == {"a": 1, "b": 3}
    assert found.lost == [f"changes 3 to 4: {GUESSED}", f"change 2: {SKIPPED}"]
    found = salvage(own, journal_of("9-01234567", record(1, a=1), checkpoint=own) + b"torn", "x")
    assert len(found.lost) == 1
    found = salvage(own, journal_of(base_of(own), record(2, b=2), record(2, b=3)), "x")
    assert (values_of(found), found.lost) == ({"a": 1, "b": 2}, [f"change 3: {SKIPPED}"])


def test_a_damaged_revision() -> None:
    """Records that are skipped because of the revision in a damaged snapshot are listed, and so are those that are applied without one."""
    own = snapshot(a=1)
    data = journal_of(base_of(own), record(2, a=2), record(3, b=2))
    found = salvage(own.replace(b'"revision":2', b'"revision":3'), data, "x")
    assert values_of(found) == {"a": 1, "b": 2}
    assert found.lost[1:] == [f"change 3: {SKIPPED}"]
    data = journal_of(NO_BASE, record(0, a=1), record(1, b=1), checkpoint=own)
    for old, new in ((b'"revision":2', b'"revisiom":2'), (b'"revision":2', b'"revision":-')):
        found = salvage(own.replace(old, new), data, "x")
        assert (values_of(found), found.state.revision) == ({"a": 1, "b": 1}, 2)
        assert found.lost[1:] == [NO_MEMBER, f"changes 1 to 2: {GUESSED}"]
    for revision in (b"-9", b"9223372036854775807"):  # a repaired state could not have the next one
        found = salvage(own.replace(b'"revision":2', b'"revision":' + revision), None, "x")
        assert (found.state.revision, found.highest, found.lost[1:]) == (0, 0, [NO_MEMBER])


def test_a_journal_of_another_snapshot() -> None:
    """A snapshot of a running manager without its own journal lacks later changes, whether another journal is there or none."""
    followed = snapshot(is_followed=True, a=1)
    assert salvage(followed, journal_of("9-01234567"), "x").lost == [FOLLOWED]
    assert salvage(followed, b"#", "x").lost == [
        "the journal, 1 byte: its first line is not a valid journal header. All changes in it are lost"
    ]
    assert salvage(followed, journal_of("9-01234567", checkpoint=followed) + b"torn", "x").lost == [
        "the end of the journal, 4 bytes, is not a whole record; it was never acknowledged"
    ]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes(100), "the snapshot, 100 bytes: it is not a JSON object"),
        (b"", "the snapshot, 0 bytes: it has no JSON, but a state is always one JSON object"),
        (b"\n ", "the snapshot, 2 bytes: it has no JSON, but a state is always one JSON object"),
        (b"x}", "the snapshot, 2 bytes: it is not a JSON object"),
        (b'["a", 1]', "the snapshot, 8 bytes: it is not a JSON object"),
    ],
    ids=["zeros", "empty", "spaces", "only a brace", "an array"],
)
def test_a_snapshot_without_a_member_that_can_be_read(data: bytes, why: str) -> None:
    """A snapshot of which nothing can be read is not reported as one that has lost nothing."""
    found = salvage(data, None, "x")
    assert (found.state.entries, found.lost) == ({}, [f"{why}. All keys in it are lost", NO_MEMBER])


def test_a_damaged_beginning() -> None:
    """A wrong or missing first byte, or a byte order mark, loses no member."""
    own = snapshot(a=1, b=2)
    for data in (b"x" + own[1:], own[1:], b"\xef\xbb\xbf" + own, b"\xef\xbb\xbf\n" + own):
        found = salvage(data, None, "x")
        assert (values_of(found), found.state.revision) == ({"a": 1, "b": 2}, 2)
        assert [line[-len(MAY_BE_WRONG) :] for line in found.lost] == [MAY_BE_WRONG]


def test_spaces_and_line_breaks() -> None:
    """JSON that another program or a person wrote is read between its spaces."""
    found = salvage(b'{"a": 1, "b": 2, "c": 3,}', None, "x")
    assert values_of(found) == {"a": 1, "b": 2, "c": 3}
    assert found.lost[0].endswith(MAY_BE_WRONG)
    text = json.dumps({"a": [1, {"x": 2}], "b": "xyz", "c": 1}, indent=2).encode() + b"\n"
    found = salvage(text.replace(b"xyz", b"x\xffz"), None, "x")
    assert values_of(found) == {"a": [1, {"x": 2}], "c": 1}
    assert found.lost[-1] == "the snapshot: the values of 'b'"
    found = salvage(b'\t{ "a" : 1 ,\r\n"b" : "x } ', None, "x")
    assert (values_of(found), found.lost[0]) == (
        {"a": 1},
        "the snapshot: no member can be read from byte 14 of 25 on. All keys from there on are lost",
    )


@pytest.mark.parametrize(
    ("data", "kept", "end"),
    [
        (b'{"a":1,', {"a": 1}, 7),
        (b'{"a":1', {}, None),
        (b'{"a":"x"', {"a": "x"}, 8),
        (b'{"a":1,"b":12', {"a": 1}, 7),
        (b'{"a":1,"b":1x2,"c":3}', {"a": 1}, 7),
        (b'{"a":1}x', {"a": 1}, 6),
        (b'{"a":1 "b":2}', {"a": 1}, 7),
        (b'{"a":1,"b" 2}', {"a": 1}, 7),
        ('{"ä":1,"b":\0}'.encode(), {"ä": 1}, 8),
        (b'{"a":1,"b":' + b"[" * 100_000, {"a": 1}, 7),
    ],
)
def test_a_snapshot_that_ends_early(data: bytes, kept: dict[str, Any], end: int | None) -> None:
    """The keys after the end are lost, also if it is between two members. A number that may have lost digits is not kept."""
    found = salvage(data, None, "x")
    assert values_of(found) == kept
    if end is None:
        assert found.lost[0].endswith("All keys in it are lost")
    else:
        assert found.lost[0] == (
            f"the snapshot: no member can be read from byte {end} of {len(data)} on. All keys from there on are lost"
        )


def test_every_cut_and_every_damaged_byte_is_listed() -> None:
    """No cut and no wrong byte of a snapshot gives a report without a loss, or other keys than those that are listed."""
    own = snapshot(a=1, b="text", c=[1, 2], d=12345)
    whole = {"a": 1, "b": "text", "c": [1, 2], "d": 12345}
    for cut in range(len(own)):
        found = salvage(own[:cut], None, "x")
        assert values_of(found).items() <= whole.items()
        assert "are lost" in found.lost[0]
    for at in range(len(own)):
        found = salvage(own[:at] + b"#" + own[at + 1 :], None, "x")
        assert found.lost
        if len(found.state.entries) < len(whole):
            assert any("are lost" in line or "the values of" in line for line in found.lost)


def test_a_number_with_very_many_digits() -> None:
    """A number that no Python `int` is made of loses its own value, and not the members after it."""
    found = salvage(b'{"a":1' + b"0" * 5000 + b',"b":2,}', None, "x")
    assert (values_of(found), found.lost[-1]) == ({"b": 2}, "the snapshot: the values of 'a'")


def test_a_damaged_key() -> None:
    """A key that becomes equal to another key loses a value, and one with an expiry time is known by that time."""
    own = snapshot(a=1, b=2)
    found = salvage(own.replace(b'"b"', b'"a"'), None, "x")
    assert values_of(found) == {"a": 2}
    assert found.lost == [
        f"the snapshot: its checksum does not match its contents. {MAY_BE_WRONG}",
        "the snapshot: all values but the last one of 'a', because the key is there more than once",
    ]
    expiring = own.replace(b',"wall"', b',"expires":{"b":9000000000000},"wall"')
    found = salvage(expiring.replace(b'"b":2', b'"c":2'), None, "x")
    assert (values_of(found), found.lost[1:]) == ({"a": 1, "c": 2}, ["the snapshot: the values of 'b'"])
    found = salvage(edited(expiring).replace(b'"b":2', b'"\xff":2'), None, "x")
    assert found.lost[1:] == ["the snapshot: the values of '\\udcff'"]


def test_a_damaged_member() -> None:
    """A damaged format or name of the reserved member loses nothing of it. A key with such a value in a part of a file stays a key."""
    own = snapshot(7, a=1).replace(b',"wall"', b',"expires":{"a":9000000000000},"wall"')
    for old, new in ((b'"format":1', b'"format":0'), (b"$lab_state", b"$lab_stade")):
        found = salvage(own.replace(old, new), None, "x")
        assert (values_of(found), found.state.revision, dict(found.state.expires)) == (
            {"a": 1},
            7,
            {"a": 9000000000000},
        )
        assert [line[-len(MAY_BE_WRONG) :] for line in found.lost] == [MAY_BE_WRONG]
    part = own.replace(b"$lab_state", b"kept")[:-1]
    assert values_of(salvage(part, None, "x")).keys() == {"a", "kept"}


def test_a_record_that_deletes_all_keys() -> None:
    """A lost record that has deleted all keys says so. One that has changed no key has its revision alone."""
    data = journal_of("9-01234567", record(3, clear=True), record(4, clear=True, k=1), record(5))
    assert salvage(None, data, "x").lost == [
        "the snapshot is missing",
        "change 4 of all keys: earlier changes are missing",
        "change 5 of all keys, then 'k': earlier changes are missing",
        "change 6: earlier changes are missing",
    ]


def test_a_journal_that_needs_no_snapshot() -> None:
    """A missing snapshot is a loss only if the journal names one. The state at the start of a journal is lost by itself."""
    header = journal.header("x", "salt", NO_BASE)
    assert salvage(None, b"#" + header[1:], "x").lost == [
        f"the journal, {len(header)} bytes: its first line is not a valid journal header. All changes in it are lost",
        "there is no snapshot, and the journal cannot show whether one is missing",
    ]
    own = snapshot(a=1)
    start = journal.header("x", "salt", ANY_BASE)
    full = journal.frame("salt", FrameKind.FULL, own).replace(b'"a":1', b'"a":2')
    data = start + full + journal.frame("salt", FrameKind.RECORD, record(2, b=1))
    lost = [
        f"bytes {len(start)} to {len(start) + len(full)} of the journal are damaged; they were acknowledged",
        "the state at the start of the journal is lost",
    ]
    assert salvage(None, data, "x").lost == [*lost, "change 3 of 'b': earlier changes are missing"]
    assert salvage(own, data, "x").lost == [*lost, f"change 3: {GUESSED}"]
    assert salvage(edited(own), data, "x").lost == [*lost, "change 3 of 'b': made after another snapshot"]


def test_the_journal_of_another_state() -> None:
    """The reason in a loss has no advice for a start."""
    assert salvage(snapshot(a=1), journal.header("y", "salt", NO_BASE), "x").lost == [
        "the journal, 75 bytes: it is the journal of 'y', not of 'x'. All changes in it are lost"
    ]
