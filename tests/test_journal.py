"""`_journal`: framing, checksums, the scan that tells torn from damaged, and what to load."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_state._codec import LoadedState, encode_record, encode_snapshot, replay
from lab_state._entries import DELETED, ChangeSet, StoredOrGone
from lab_state._journal import (
    ANY_BASE,
    NO_BASE,
    SNAPSHOT_END_BYTES,
    Accepted,
    Frame,
    FrameKind,
    Scan,
    accept,
    base_at_end,
    base_of,
    frame,
    frame_parts,
    header,
    new_salt,
    scan,
)
from lab_state._values import encode_value
from lab_state.exceptions import CorruptionError, UnsupportedError

PATH = "/state/some.journal"
NAME = "some"
SALT = "0123456789abcdef"
BASE = base_of(123, 0xABC)
OTHER_BASE = base_of(124, 0xABC)
FULL = b'{"a":1}'


def record(start: int, *values: object) -> bytes:
    """Return the record of one commit of one revision; a value for each key, `...` deletes."""
    changes: dict[str, StoredOrGone] = {
        f"key {n}": DELETED if value is ... else encode_value(value) for n, value in enumerate(values)
    }
    return b"".join(encode_record(ChangeSet(start, start + 1, False, changes, 0.0)))


RECORDS = (
    record(0, 1, "one"),
    record(1),
    record(2, {"text": "x" * 300}),
    record(3, ..., [1, 2, 3]),
    record(4, 'a "quoted" \\ line\n', None),
    record(5, 6.5),
)


def journal(*frames: tuple[FrameKind, bytes], base: str = BASE, salt: str = SALT, name: str = NAME) -> bytes:
    return header(name, salt, base) + b"".join(frame(salt, kind, payload) for kind, payload in frames)


def lines(data: bytes) -> list[bytes]:
    """Return the frames of a journal whose payloads hold no newline."""
    return data.splitlines(keepends=True)


def records(payloads: Sequence[bytes]) -> list[tuple[FrameKind, bytes]]:
    return [(FrameKind.RECORD, payload) for payload in payloads]


JOURNAL = journal(*records(RECORDS))


def corruption(data: bytes) -> CorruptionError:
    with pytest.raises(CorruptionError) as caught:
        scan(data, NAME, PATH)
    assert caught.value.path == PATH
    return caught.value


def payloads(found: Scan) -> tuple[bytes, ...]:
    return tuple(payload for _, payload in found.frames)


# Frames


def test_a_frame_is_one_line() -> None:
    """A frame is a checksum over salt and body, the length, the kind and the payload, on one line."""
    body = b'9 R {"a":"b"}'
    assert frame(SALT, FrameKind.RECORD, b'{"a":"b"}') == b"%08x %s\n" % (zlib.crc32(SALT.encode() + body), body)
    assert frame(SALT, FrameKind.CHECKPOINT, b"").endswith(b" 0 C \n")


def test_a_payload_is_not_copied() -> None:
    """The parts of a frame are the frame, and the payload among them is the very object."""
    record = b"x" * 100
    parts = frame_parts(SALT, FrameKind.RECORD, record)
    assert b"".join(parts) == frame(SALT, FrameKind.RECORD, record)
    assert parts[1] is record


def test_the_header_is_the_first_line() -> None:
    """The header is a frame whose payload has the format, the name of the state, the salt, the base and the wall clock."""
    line = header(NAME, SALT, BASE, 1_700_000_000_000)
    assert line.endswith(b"\n")
    payload = line.split(b" ", 3)[3]
    expected = {"format": 1, "name": NAME, "salt": SALT, "base": BASE, "wall": 1_700_000_000_000}
    assert msgspec.json.decode(payload) == expected
    found = scan(line, NAME, PATH)
    assert (found.frames, found.end) == ((), len(line))
    assert (found.header.name, found.header.salt, found.header.base) == (NAME, SALT, BASE)


def test_a_salt_is_drawn_anew() -> None:
    """A salt has 16 hex digits, and is not drawn twice."""
    salts = {new_salt() for _ in range(100)}
    assert len(salts) == 100
    assert all(re.fullmatch("[0-9a-f]{16}", salt) for salt in salts)


def test_a_base_names_a_snapshot() -> None:
    """A base is the size and the checksum of a snapshot's bytes."""
    assert base_of(1264, 0x9AE) == "1264-000009ae"


def test_a_base_from_the_end_of_a_snapshot() -> None:
    """The size and the last bytes of a snapshot are enough for its base. Other files have no such end."""
    data = b"".join(encode_snapshot({"a": 1}, 7, 0, copy_loaded=False, wall=0))
    expected = base_of(len(data), zlib.crc32(data))
    assert base_at_end(len(data), data) == base_at_end(len(data), data[-SNAPSHOT_END_BYTES:]) == expected
    assert base_at_end(len(data), data[-SNAPSHOT_END_BYTES + 1 :]) is None
    assert base_at_end(2, b"{}") is None


PAYLOADS = st.binary(max_size=40) | st.sampled_from(["\n", " ", "0", "00000000 0 R \n"]).map(str.encode)


@given(
    st.lists(
        st.tuples(st.sampled_from([FrameKind.RECORD, FrameKind.CHECKPOINT, FrameKind.FULL]), PAYLOADS), max_size=6
    ),
    st.text(max_size=8),
)
def test_any_frames_come_back(frames: list[tuple[FrameKind, bytes]], name: str) -> None:
    """Frames with any payload, newlines and what looks like a frame included, come back exactly."""
    data = journal(*frames, name=name)
    found = scan(data, name, PATH)
    assert found.frames == tuple(Frame(*each) for each in frames)
    assert found.end == len(data)


# Torn or damaged


def test_every_prefix_is_a_torn_tail() -> None:
    """A journal cut at any byte holds exactly the whole records before the cut; one cut in its header is refused."""
    ends = [len(b"".join(lines(JOURNAL)[: count + 1])) for count in range(len(RECORDS) + 1)]
    for cut in range(len(JOURNAL) + 1):
        whole = [end for end in ends if end <= cut]
        if whole:
            found = scan(JOURNAL[:cut], NAME, PATH)
            assert payloads(found) == RECORDS[: len(whole) - 1]
            assert found.end == whole[-1]
        else:
            assert corruption(JOURNAL[:cut]).detail == "its first line is not a valid journal header; restore a copy"


def test_every_flipped_bit_is_noticed() -> None:
    """A flipped bit is an error; in the last frame, which may be torn, it may also drop that frame and nothing else."""
    last = JOURNAL.index(lines(JOURNAL)[-1])
    for bit in range(8 * len(JOURNAL)):
        damaged = bytearray(JOURNAL)
        damaged[bit // 8] ^= 1 << bit % 8
        if bit // 8 < last:
            with pytest.raises((CorruptionError, UnsupportedError)):
                scan(bytes(damaged), NAME, PATH)
        else:
            found = scan(bytes(damaged), NAME, PATH)
            assert (payloads(found), found.end) == (RECORDS[:-1], last)


def test_every_missing_byte_is_noticed() -> None:
    """A missing byte before the last frame is an error, and in the last frame drops that frame."""
    last = JOURNAL.index(lines(JOURNAL)[-1])
    for at in range(len(JOURNAL)):
        damaged = JOURNAL[:at] + JOURNAL[at + 1 :]
        if at < last:
            corruption(damaged)
        else:
            assert payloads(scan(damaged, NAME, PATH)) == RECORDS[:-1]


@pytest.mark.parametrize("size", [1, 7, 512, 4096])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\n", b" ", b"0"])
def test_a_filled_tail_is_torn(fill: bytes, size: int) -> None:
    """Zeros and other filling behind the last frame, as a crash leaves them, are a torn tail."""
    found = scan(JOURNAL + fill * size, NAME, PATH)
    assert (payloads(found), found.end) == (RECORDS, len(JOURNAL))


def test_a_zero_filled_last_frame_is_torn() -> None:
    """A last frame whose blocks never reached the disk is a torn tail."""
    last = len(lines(JOURNAL)[-1])
    for written in range(last):
        found = scan(JOURNAL[: len(JOURNAL) - last + written] + bytes(last - written), NAME, PATH)
        assert payloads(found) == RECORDS[:-1]


@pytest.mark.parametrize("number", range(len(RECORDS) - 1))
def test_a_zero_filled_frame_in_the_middle_is_damage(number: int) -> None:
    """A frame with zeros in its place and a valid frame behind it is damage to acknowledged data."""
    parts = lines(JOURNAL)
    at = len(b"".join(parts[: number + 1]))
    parts[number + 1] = bytes(len(parts[number + 1]))
    error = corruption(b"".join(parts))
    assert error.offset == at
    assert error.detail == (
        f"a valid frame follows at byte {at + len(parts[number + 1])}, so the damaged bytes were acknowledged; restore a copy"
    )


@pytest.mark.parametrize("number", range(1, len(RECORDS)))
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_newline_that_glues_two_frames_is_damage(number: int, bit: int) -> None:
    """A newline turned into anything else glues two frames, and the second is still found."""
    at = len(b"".join(lines(JOURNAL)[: number + 1])) - 1
    damaged = bytearray(JOURNAL)
    damaged[at] ^= 1 << bit
    assert f"a valid frame follows at byte {at + 1}," in corruption(bytes(damaged)).detail


def test_a_frame_of_another_journal_is_torn() -> None:
    """A frame with another salt, as old blocks of the disk hold, is no frame of this journal."""
    found = scan(JOURNAL + frame("f" * 16, FrameKind.RECORD, record(6, 7)) * 3, NAME, PATH)
    assert (payloads(found), found.end) == (RECORDS, len(JOURNAL))


def test_a_value_that_spells_a_frame_does_not_pass_for_one() -> None:
    """A user's value that spells a frame is no frame, wherever its record is torn."""
    spelt = (
        frame("f" * 16, FrameKind.RECORD, record(6, "forged")).decode() + frame("", FrameKind.RECORD, b"{}").decode()
    )
    data = journal((FrameKind.RECORD, record(0, "good")), (FrameKind.RECORD, record(1, spelt)))
    whole = len(b"".join(lines(data)[:2]))
    for cut in range(whole, len(data)):
        assert payloads(scan(data[:cut], NAME, PATH)) == (record(0, "good"),)
    assert payloads(scan(data, NAME, PATH)) == (record(0, "good"), record(1, spelt))


END = frame(SALT, FrameKind.END, b"")


def test_the_end_of_a_journal() -> None:
    """A journal that ends with an `E` frame has the frames before it. The next frame belongs in the place of the `E`."""
    found = scan(JOURNAL + END, NAME, PATH)
    assert (payloads(found), found.end, found.is_ended) == (RECORDS, len(JOURNAL), True)
    found = scan(journal() + END, NAME, PATH)
    assert (found.frames, found.end, found.is_ended) == ((), len(journal()), True)
    assert not scan(JOURNAL, NAME, PATH).is_ended


def test_bytes_after_the_end_are_a_torn_tail() -> None:
    """A frame that was written in the place of an `E` frame, and of which the beginning is missing, is a torn tail. So is a part of an `E`."""
    torn = frame(SALT, FrameKind.RECORD, record(7, 8))
    for tail in (END + torn[len(END) :], END + b"\0", END[:-1], torn[: len(END)], torn[:5] + END[5:]):
        found = scan(JOURNAL + tail, NAME, PATH)
        assert (payloads(found), found.end, found.is_ended) == (RECORDS, len(JOURNAL), False)


@pytest.mark.parametrize("between", [b"", b"x", b"\n"])
@pytest.mark.parametrize("after", [frame(SALT, FrameKind.RECORD, record(7, 8)), END])
def test_a_frame_after_the_end_is_damage(between: bytes, after: bytes) -> None:
    """No writer puts a frame after an `E` frame, and also no second `E` frame."""
    error = corruption(JOURNAL + END + between + after)
    assert error.offset == len(JOURNAL)
    assert f"a valid frame follows at byte {len(JOURNAL + END + between)}, after the end of the journal" in str(error)


def test_an_end_after_damaged_bytes_is_damage() -> None:
    """An `E` frame shows that the frame before it was acknowledged. So damage before it is no torn tail."""
    assert "the damaged bytes were acknowledged" in str(corruption(JOURNAL[:-2] + b"x\n" + END))


def test_the_end_settles() -> None:
    """After an `E` frame, the end was clean, unless the journal starts with the whole state or bytes follow."""
    followed = [*records(RECORDS), (FrameKind.END, b"")]
    assert accepted(BASE, *followed) == Accepted(None, RECORDS, unclean=False)
    assert accepted(BASE, *followed, tail=b"x") == Accepted(None, RECORDS, unclean=True)
    assert accepted(BASE, (FrameKind.END, b"")) == Accepted(None, (), unclean=False)
    full = accepted(BASE, (FrameKind.FULL, b"{}"), *followed, base=ANY_BASE)
    assert full == Accepted(b"{}", RECORDS, unclean=True)


def test_a_payload_that_holds_frames_is_one_frame() -> None:
    """Frames of this very journal inside a valid payload are that payload, not frames."""
    inner = frame(SALT, FrameKind.RECORD, b"inner")
    found = scan(journal((FrameKind.FULL, inner * 2), (FrameKind.RECORD, b"outer")), NAME, PATH)
    assert payloads(found) == (inner * 2, b"outer")


# Whole frames moved about


def load(data: bytes) -> LoadedState:
    found = accept(scan(data, NAME, PATH), len(data), NO_BASE, PATH)
    return replay(LoadedState({}, 0), found.records, PATH)


FRAMES = [frame(SALT, FrameKind.RECORD, payload) for payload in RECORDS]


@pytest.mark.parametrize("number", range(len(RECORDS) - 1))
def test_a_dropped_frame_is_a_gap(number: int) -> None:
    """A whole frame that is missing in the middle is noticed as a gap in the revisions."""
    with pytest.raises(
        CorruptionError, match=f"the changes {number + 1} to {number + 1} are missing before record {number + 1}"
    ):
        load(header(NAME, SALT, NO_BASE) + b"".join(FRAMES[:number] + FRAMES[number + 1 :]))


@pytest.mark.parametrize("number", range(len(RECORDS) - 1))
def test_swapped_frames_are_a_gap(number: int) -> None:
    """Two whole frames in the wrong order are noticed as a gap in the revisions."""
    swapped = [*FRAMES[:number], FRAMES[number + 1], FRAMES[number], *FRAMES[number + 2 :]]
    with pytest.raises(CorruptionError, match="are missing before record"):
        load(header(NAME, SALT, NO_BASE) + b"".join(swapped))


@pytest.mark.parametrize("number", range(len(RECORDS)))
@pytest.mark.parametrize("later", [0, 1, 5])
def test_a_doubled_frame_changes_nothing(number: int, later: int) -> None:
    """A whole frame that stands there twice, at once or later, counts once."""
    at = number + 1 + later
    doubled = [*FRAMES[:at], FRAMES[number], *FRAMES[at:]]
    expected = load(header(NAME, SALT, NO_BASE) + b"".join(FRAMES))
    found = load(header(NAME, SALT, NO_BASE) + b"".join(doubled))
    assert found.revision == expected.revision == len(RECORDS)
    assert {key: msgspec.json.encode(value) for key, value in found.entries.items()} == {
        key: msgspec.json.encode(value) for key, value in expected.entries.items()
    }


# Headers and kinds


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\n", bytes(512), b"not a journal\n", JOURNAL[1:], b"\n" + JOURNAL, JOURNAL.upper()),
        b"".join(FRAMES),
        frame(SALT, FrameKind.RECORD, header(NAME, SALT, BASE)[15:-1]),
        frame(SALT, FrameKind.HEADER, b"{}"),
        frame(SALT, FrameKind.HEADER, b"\xff"),
        frame(SALT, FrameKind.HEADER, b'{"format":1,"name":"some","salt":"other","base":"none"}'),
        b"00000000 999999999999999 H {}\n",
    ],
    ids=range(13),
)
def test_a_bad_first_line_is_refused(data: bytes) -> None:
    """A journal whose first line is not its header is CorruptionError, for nothing behind it can be told."""
    error = corruption(data)
    assert error.detail == "its first line is not a valid journal header; restore a copy"
    assert error.offset == 0


def test_a_damaged_header_is_refused_even_with_nothing_behind_it() -> None:
    """A single flipped bit in a journal that is a header alone is an error, never an empty journal."""
    data = header(NAME, SALT, BASE)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        corruption(bytes(damaged))


def test_another_states_journal_is_refused() -> None:
    """A journal that names another state is refused, with both names."""
    assert corruption(journal(*records(RECORDS), name="other")).detail == (
        "it is the journal of 'other', not of 'some'; put the right file back"
    )


@pytest.mark.parametrize("number", [0, 2])
def test_another_format_is_refused(number: int) -> None:
    """A journal of another format is UnsupportedError, and says what to do."""
    payload = b'{"format":%d,"name":"some","salt":"0123456789abcdef","base":"none","new":[]}' % number
    with pytest.raises(UnsupportedError) as caught:
        scan(frame(SALT, FrameKind.HEADER, payload), NAME, PATH)
    assert str(caught.value) == (
        f"/state/some.journal has journal format {number}, and this version of lab_state knows 1: "
        "use the version that wrote it; it was left untouched"
    )


def other_kind(kind: bytes, payload: bytes) -> bytes:
    body = b"%d %s %s" % (len(payload), kind, payload)
    return b"%08x %s\n" % (zlib.crc32(SALT.encode() + body), body)


@pytest.mark.parametrize("kind", [b"X", b"H", b"A"])
@pytest.mark.parametrize("number", [0, 3, 6])
def test_an_unknown_kind_is_refused(kind: bytes, number: int) -> None:
    """A frame of an unknown kind, or a second header, is refused where it stands, though its checksum is right."""
    before = header(NAME, SALT, BASE) + b"".join(FRAMES[:number])
    error = corruption(before + other_kind(kind, b"x") + b"".join(FRAMES[number:]))
    assert error.detail == f"it has a frame of the unknown kind '{kind.decode()}'; restore a copy"
    assert error.offset == len(before)


@pytest.mark.parametrize(
    "frames",
    [(), ((FrameKind.RECORD, RECORDS[0]), (FrameKind.FULL, FULL)), ((FrameKind.CHECKPOINT, b"none"),)],
    ids=["none", "R F", "C"],
)
def test_a_star_without_the_whole_state_first_is_refused(frames: tuple[tuple[FrameKind, bytes], ...]) -> None:
    """A journal with the base `*` whose first frame is not the whole state is refused."""
    error = corruption(journal(*frames, base=ANY_BASE))
    assert error.detail == "its first frame must contain the whole state, and does not; restore a copy"


def test_a_star_with_a_torn_first_frame_is_refused() -> None:
    """A journal with the base `*` is refused while its first frame is not whole: it was never used."""
    data = journal((FrameKind.FULL, FULL), base=ANY_BASE)
    head = len(lines(data)[0])
    for cut in range(head, len(data)):
        assert corruption(data[:cut]).offset == head
    assert payloads(scan(data, NAME, PATH)) == (FULL,)


# What to load


def accepted(snapshot_base: str, *frames: tuple[FrameKind, bytes], base: str = BASE, tail: bytes = b"") -> Accepted:
    data = journal(*frames, base=base) + tail
    return accept(scan(data, NAME, PATH), len(data), snapshot_base, PATH)


def not_accepted(snapshot_base: str, *frames: tuple[FrameKind, bytes], base: str = BASE) -> CorruptionError:
    with pytest.raises(CorruptionError) as caught:
        accepted(snapshot_base, *frames, base=base)
    assert caught.value.path == PATH
    return caught.value


R0, R1 = (FrameKind.RECORD, RECORDS[0]), (FrameKind.RECORD, RECORDS[1])
F = (FrameKind.FULL, FULL)


def checkpoint_of(base: str) -> tuple[FrameKind, bytes]:
    return FrameKind.CHECKPOINT, base.encode()


@pytest.mark.parametrize("base", [BASE, NO_BASE])
def test_no_journal_accepts_the_snapshot(base: str) -> None:
    """Without a journal the snapshot is the state, and if there is none either, the state is empty."""
    assert accept(None, 0, base, PATH) == Accepted(None, (), unclean=False)


@pytest.mark.parametrize("base", [BASE, NO_BASE])
def test_the_snapshot_that_the_base_names_is_followed_by_every_record(base: str) -> None:
    """Where the base names the snapshot, or there is none and the base says so, the records follow it."""
    assert accepted(base, R0, R1, base=base) == Accepted(None, (R0[1], R1[1]), unclean=True)


def test_the_snapshot_that_a_checkpoint_frame_names_is_followed_by_every_record() -> None:
    """A snapshot that was renamed into place before the new journal was is the one in a C frame."""
    assert accepted(OTHER_BASE, R0, checkpoint_of(OTHER_BASE), R1) == Accepted(None, (R0[1], R1[1]), unclean=True)


def test_the_snapshot_before_a_checkpoint_frame_is_accepted_too() -> None:
    """A checkpoint whose rename never came leaves the snapshot that the base names."""
    assert accepted(BASE, R0, checkpoint_of(OTHER_BASE), R1) == Accepted(None, (R0[1], R1[1]), unclean=True)


def test_no_snapshot_before_the_first_checkpoint_is_accepted() -> None:
    """The first checkpoint of a state whose rename never came leaves no snapshot, as the base says."""
    assert accepted(NO_BASE, R0, checkpoint_of(BASE), base=NO_BASE) == Accepted(None, (R0[1],), unclean=True)


@pytest.mark.parametrize("snapshot_base", [BASE, NO_BASE])
def test_a_star_is_the_whole_state_whatever_the_snapshot(snapshot_base: str) -> None:
    """With the base `*` the first frame is the state, whatever snapshot is there, then every record."""
    found = accepted(snapshot_base, F, R0, checkpoint_of(OTHER_BASE), R1, base=ANY_BASE)
    assert found == Accepted(FULL, (R0[1], R1[1]), unclean=True)
    assert accepted(snapshot_base, F, base=ANY_BASE) == Accepted(FULL, (), unclean=True)


def test_a_restored_snapshot_is_accepted_beside_an_empty_journal() -> None:
    """A snapshot that the journal does not name is accepted where the journal holds no record."""
    assert accepted(OTHER_BASE) == Accepted(None, (), unclean=False)
    assert accepted(OTHER_BASE, base=NO_BASE) == Accepted(None, (), unclean=False)
    assert accepted(OTHER_BASE, checkpoint_of(base_of(1, 1))) == Accepted(None, (), unclean=True)


@pytest.mark.parametrize("snapshot_base", [OTHER_BASE, NO_BASE])
def test_records_beside_a_snapshot_that_they_do_not_follow_are_refused(snapshot_base: str) -> None:
    """Records that follow another snapshot than the one that is there, or that is missing, are refused."""
    error = not_accepted(snapshot_base, checkpoint_of(base_of(1, 1)), R0)
    assert error.detail.startswith(
        "its records do not follow the snapshot beside it, or that snapshot is missing; put the right snapshot back, or"
    )


def test_records_of_a_first_journal_beside_a_snapshot_are_refused() -> None:
    """Records that follow no snapshot are refused where there is one."""
    assert "do not follow the snapshot beside it" in not_accepted(BASE, R0, base=NO_BASE).detail


@pytest.mark.parametrize("frames", [(), (checkpoint_of(OTHER_BASE),)], ids=["empty", "C"])
def test_a_missing_snapshot_is_refused(frames: tuple[tuple[FrameKind, bytes], ...]) -> None:
    """A snapshot that the journal names and that is not there is never taken for an empty state."""
    error = not_accepted(NO_BASE, *frames)
    assert error.detail.startswith("the snapshot that this journal follows is missing; put it back, or delete")


@pytest.mark.parametrize(
    ("base", "frames"),
    [(BASE, (F,)), (BASE, (R0, F)), (NO_BASE, (F, R0)), (ANY_BASE, (F, F)), (ANY_BASE, (F, R0, F))],
    ids=["first", "later", "before records", "twice", "twice with records"],
)
def test_a_whole_state_in_the_wrong_place_is_refused(base: str, frames: tuple[tuple[FrameKind, bytes], ...]) -> None:
    """A frame with the whole state is refused anywhere but first in a journal with the base `*`."""
    error = not_accepted(BASE if base != NO_BASE else NO_BASE, *frames, base=base)
    assert error.detail == "it has a frame with the whole state, which is not allowed in this place; restore a copy"


@pytest.mark.parametrize("base", [BASE, NO_BASE])
def test_a_header_alone_is_a_clean_end(base: str) -> None:
    """A journal that is a header alone is what a clean stop leaves."""
    assert accepted(base, base=base) == Accepted(None, (), unclean=False)


@pytest.mark.parametrize(
    ("frames", "tail"), [((), b"\0"), ((checkpoint_of(BASE),), b""), ((R0,), b"x")], ids=["torn", "C", "R and torn"]
)
def test_anything_behind_the_header_is_an_unclean_end(frames: tuple[tuple[FrameKind, bytes], ...], tail: bytes) -> None:
    """Any frame, and any torn tail, means that the last writer did not end with a checkpoint."""
    assert accepted(BASE, *frames, tail=tail).unclean


# The search behind a torn tail


def spelled(size: int) -> bytes:
    """Return valid JSON of about so many bytes; each string looks like the head of a frame that ends at its last newline."""
    count = size // 23
    heads = [b'"deadbeef %08d R ",' % (count * 23 - number * 23 - 21) for number in range(count)]
    return b"[" + b"".join(heads)[:-1] + b" \n]"


class Summed:
    """`zlib.crc32`, with how many bytes it was given."""

    def __init__(self) -> None:
        self.total = 0
        self._real = zlib.crc32

    def __call__(self, data: bytes, value: int = 0) -> int:
        self.total += len(data)
        return self._real(data, value)


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_a_search_that_costs_what_the_bytes_cost(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a torn tail, each byte is summed at most twice, however many heads of frames a user's value spells."""
    whole = header("name", SALT, NO_BASE)
    torn = frame(SALT, FrameKind.RECORD, b'{"set":{"a":' + spelled(size) + b"}}")[:-2]
    summed = Summed()
    monkeypatch.setattr("lab_state._journal.zlib.crc32", summed)
    assert scan(whole + torn, "name", PATH).end == len(whole)
    assert size < summed.total < 2 * (len(whole) + len(torn)) + 1_000


@given(
    before=st.binary(max_size=40),
    payloads=st.lists(st.binary(max_size=30) | st.just(b"\n"), min_size=1, max_size=4),
    between=st.sampled_from([b"", b"\n", b"00000000 0 R \n", b"deadbeef 3 R abc\n", b"00000000 12 R "]),
)
def test_every_frame_is_found_at_any_byte(before: bytes, payloads: list[bytes], between: bytes) -> None:
    """The first valid frame behind bad bytes is found, whatever is around it, and whatever looks like one."""
    frames = [frame(SALT, FrameKind.RECORD, payload) for payload in payloads]
    bad = b"damaged " + before + between
    data = header("name", SALT, NO_BASE) + bad + between.join(frames) + between
    with pytest.raises(CorruptionError) as caught:
        scan(data, "name", PATH)
    assert caught.value.detail.startswith(f"a valid frame follows at byte {data.index(frames[0], caught.value.offset)}")
    whole = data[: data.index(bad)]
    for cut in range(len(bad) + len(frames[0])):
        assert scan(data[: len(whole) + cut], "name", PATH).end == len(whole)


@pytest.mark.parametrize("shift", range(-30, 2))
def test_a_frame_across_the_pieces_of_a_search(shift: int) -> None:
    """A frame is found wherever the pieces begin in which the bytes are searched."""
    whole = header("name", SALT, NO_BASE)
    follows = frame(SALT, FrameKind.RECORD, b"{}" * 20)
    at = len(whole) + 256 * 1024 + shift
    data = whole + b"x" * (at - len(whole)) + follows
    with pytest.raises(CorruptionError, match=f"follows at byte {at},"):
        scan(data, "name", PATH)


def test_a_first_line_nested_too_deep_for_the_parser_is_refused() -> None:
    """It is CorruptionError like any other bad first line, not RecursionError."""
    payload = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(CorruptionError, match="not a valid journal header"):
        scan(frame(SALT, FrameKind.HEADER, payload), "name", PATH)
