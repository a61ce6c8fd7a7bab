"""What a user writes: STATE, WHEN, JSON, and what is shown for them. All of this is pure."""

from __future__ import annotations

import errno
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from lab_state import CorruptionError, InvalidKeyError, InvalidNameError, InvalidValueError, KeyNotFoundError
from lab_state import exceptions as errors
from lab_state._codec import LoadedState, Record
from lab_state.cli._arguments import complete
from lab_state.cli._changes import Change, between, newer, of_record, text_of
from lab_state.cli._exits import code_of, message_of
from lab_state.cli._input import has_changed, parse_lines, parse_object, parse_value
from lab_state.cli._target import Place, parse_place, parse_state, split_moment
from lab_state.cli._text import (
    age_text,
    changes_text,
    counted,
    live_text,
    moment_text,
    shown,
    shown_json,
    size_text,
    time_text,
)
from lab_state.cli._values import branches
from lab_state.cli._when import parse_when
from lab_state.storage._os_errors import translated
from lab_state.storage._protocol import no_state

NOW = datetime(2026, 3, 1, 12, 30, 15, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        ("state/shop", Place("state"), "shop"),
        ("shop", Place("."), "shop"),
        ("/shop", Place("/"), "shop"),
        ("/var/state/shop.json", Place("/var/state"), "shop"),
        ("state/shop.json.json", Place("state"), "shop.json"),
        ("s3://bucket/shop", Place("", "bucket"), "shop"),
        ("s3://bucket/a/b/shop", Place("", "bucket", "a/b"), "shop"),
    ],
)
def test_a_state_is_a_place_and_a_name(text: str, place: Place, name: str) -> None:
    """STATE is a directory or a prefix in a bucket, and a name, with or without `.json`."""
    assert parse_state(text) == (place, name)
    assert parse_state(str(parse_state(text))) == (place, name)


@pytest.mark.parametrize(
    "text", ["", "state/", "s3://bucket", "s3://", "s3:///shop", "s3://bucket/", "state/no such", "state/-x"]
)
def test_a_text_that_is_no_state_is_refused(text: str) -> None:
    """A STATE without a name, without a bucket or with a name that no state can have is refused."""
    with pytest.raises(ValueError, match=r"write|is empty|out of bounds"):
        parse_state(text)


def test_a_place_is_a_directory_or_a_bucket() -> None:
    """A place may be a bucket without a prefix. An empty text and a bucket without a name are refused."""
    assert str(parse_place("s3://bucket/a/")) == "s3://bucket/a"
    assert str(parse_place("s3://bucket")) == "s3://bucket"
    assert str(parse_place("state")) == "state"
    for text in ("", "s3://", "s3:///a"):
        with pytest.raises(ValueError, match="write"):
            parse_place(text)


def test_a_moment_is_behind_the_last_at() -> None:
    """`STATE@WHEN` is split in the last part of the path: a directory may have an `@` in its name."""
    assert split_moment("a@b/shop@r12") == ("a@b/shop", "r12")
    assert split_moment("a@b/shop") == ("a@b/shop", None)
    assert split_moment("shop@2026-01-01 10:00") == ("shop", "2026-01-01 10:00")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("r1204", 1204),
        ("90s", NOW - timedelta(seconds=90)),
        ("10m", NOW - timedelta(minutes=10)),
        ("3h", NOW - timedelta(hours=3)),
        ("2d", NOW - timedelta(days=2)),
        ("1w", NOW - timedelta(weeks=1)),
        ("2026-01-31T18:00Z", datetime(2026, 1, 31, 18, tzinfo=UTC)),
        ("2026-01-31 18:00:05.25+02:00", datetime(2026, 1, 31, 16, 0, 5, 250000, tzinfo=UTC)),
    ],
)
def test_forms_of_a_moment(text: str, moment: object) -> None:
    """WHEN is a revision, a time ago, or a time in ISO 8601 with a zone."""
    assert parse_when(text, NOW) == moment


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("yesterday 18:05", (2026, 2, 28, 18, 5, 0)),
        ("yesterday", (2026, 2, 28, 0, 0, 0)),
        ("today 9:00:30", (2026, 3, 1, 9, 0, 30)),
        ("2026-01-31", (2026, 1, 31, 0, 0, 0)),
        ("2026-01-31T18:00", (2026, 1, 31, 18, 0, 0)),
    ],
)
def test_a_moment_without_a_zone_is_local(text: str, parts: tuple[int, ...]) -> None:
    """Without a zone, a time is local, with the offset of that moment."""
    found = parse_when(text, NOW)
    assert isinstance(found, datetime)
    year, month, day, hour, minute, second = parts
    assert found == datetime(year, month, day, hour, minute, second).astimezone()


@pytest.mark.parametrize(
    "text",
    ["", "now", "10", "10x", "r", "r-1", "25:00", "yesterday 25:00", "2026-02-30", "2026", "99999w9d", "999999999w"],
)
def test_a_text_that_is_no_moment_is_refused(text: str) -> None:
    """A refusal lists the forms."""
    with pytest.raises(ValueError, match="yesterday 18:00"):
        parse_when(text, NOW)


def test_keys_are_shown_escaped() -> None:
    """Control characters, invisible characters and those that the encoding lacks are escaped, and two keys never look the same."""
    assert shown("a/ü") == "a/ü"
    assert shown("a\nb\t\r\\n") == "a\\nb\\t\\r\\\\n"
    assert shown("\x1b[31m\x7f\x9b\u202e\U000e0001") == "\\x1b[31m\\x7f\\x9b\\u202e\\U000e0001"
    assert shown("a/ü€", "ascii") == "a/\\xfc\\u20ac"


def test_json_is_shown_as_the_same_json() -> None:
    """JSON for a terminal has no control character, and is the same value."""
    assert shown_json('{"a": 1}\n[2]') == '{"a": 1}\n[2]'
    assert shown_json('"ü\x7f\x9b\U000e0001"') == '"ü\\u007f\\u009b\\udb40\\udc01"'
    assert shown_json('"ü"', "latin-1") == '"\\u00fc"'


def test_sizes_ages_and_times() -> None:
    """Numbers for people have one unit. A time that no calendar has is shown as a number."""
    assert [size_text(n) for n in (0, 1023, 1536, 20 * 1024, 5 << 30, 1 << 60)] == [
        "0 B", "1023 B", "1.5 KiB", "20 KiB", "5.0 GiB", "1048576 TiB",
    ]  # fmt: skip
    assert [age_text(n) for n in (-1, 5, 90, 7200, 90000)] == ["0s", "5s", "2m", "2h", "1d"]
    assert time_text(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
    assert time_text(None) == time_text(0) == ""
    assert time_text(10**17) == f"{10**17} ms"
    assert [live_text(live) for live in (True, False, None)] == ["running", "stopped", "unknown"]
    assert moment_text(None, 3, 2) == "holder unknown; revision 3, durable up to 2"


def test_a_tree_counts_at_each_slash() -> None:
    """A branch is printed once, above its keys, with the number of keys below it."""
    assert branches(["a", "a/b", "a/b/c", "a/b/d", "e/"], None) == [
        (0, "a", 1), (0, "a/", 3), (1, "b", 1), (1, "b/", 2), (2, "c", 1), (2, "d", 1), (0, "e/", 1),
    ]  # fmt: skip
    assert branches(["a/b", "c"], 1) == [(0, "a/", 1)]


def test_values_are_json() -> None:
    """A value is one JSON text. A refusal has its place and no part of it, and says how to quote a string."""
    assert parse_value('{"a": [1, 2.0]}') == {"a": [1, 2.0]}
    for text in ("secret", '{"secret": }', "", "1 2", "1e999"):
        with pytest.raises(InvalidValueError) as raised:
            parse_value(text)
        assert "secret" not in str(raised.value)
    with pytest.raises(InvalidValueError, match="double quotes"):
        parse_value("apple")
    with pytest.raises(InvalidValueError, match="the value is not in UTF-8"):
        parse_value('"\udcff"')


def test_input_of_load() -> None:
    """`load` takes one object, or lines with key, value and expiry. A key twice, a bad line and a bad key are refused by their place."""
    assert parse_object(b'{"a": 1}') == {"a": (1, None)}
    lines = b'{"key":"a","value":1,"expires":5}\n\n{"key":"b","value":null}\n'
    assert parse_lines(lines) == {"a": (1, 5), "b": (None, None)}
    for data, message in (
        (b'{"a": 1', "byte"),
        (b"[1]", "one JSON object"),
        (b"", r"\(byte 0\): it has no JSON[^;]*; for lines, add --nl$"),
        (b'{"a":1}\n{"b":2}', "--nl"),
        (b'{"$lab_state":{}}', "lab_state"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_object(data)
    for data, message in (
        (b'{"key":"a","value":1}\n{"key":"a","value":2}', "line 2 .*earlier"),
        (b'{"key":"a","value":1}\n{"key":"b","val', "line 2"),
        (b'{"a":1}', "line 1 .*--nl"),
        (b'{"key":"","value":1}', "key"),
        (b'{"key":"a","value":1,"expires":%d}' % 2**63, "line 1"),  # the state could not be read again
        (b'{"key":"a","value":%s}' % (b"[" * 300 + b"]" * 300), "line 1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_lines(data)


def record(start: int, end: int, **members: object) -> Record:
    made = {"clear": False, "set": {}, "delete": [], **members}
    return Record(start, end, **made)  # type: ignore[arg-type]


def test_whether_a_key_has_changed() -> None:
    """The records after a revision show it, if they reach back to that revision. A clear changes each key."""
    records = [record(3, 4, set={"a": b"1"}), record(4, 6, delete=["b"])]
    assert has_changed("a", 3, records, 6) is True
    assert has_changed("a", 4, records, 6) is False
    assert has_changed("b", 5, records, 6) is True
    assert has_changed("c", 6, records, 6) is False
    assert has_changed("c", 2, records, 6) is None
    assert has_changed("c", 2, [], 3) is None
    assert has_changed("c", 0, [record(0, 1, clear=True)], 1) is True


def test_changes_of_a_record() -> None:
    """A record is shown as a change of each key with the prefix. A clear is always shown."""
    one = record(1, 2, clear=True, set={"a/1": b"1", "b": b"2"}, delete=["a/2", "c"], expires={"a/1": 9}, wall=7)
    assert list(of_record(one, "a/")) == [
        Change("clear", "", None, None, 2, 7),
        Change("set", "a/1", b"1", 9, 2, 7),
        Change("delete", "a/2", None, None, 2, 7),
    ]
    assert [text_of(change, shown, bytes.decode) for change in of_record(one, "a/")] == [
        "1970-01-01T00:00:00.007Z  r2  clear",
        "1970-01-01T00:00:00.007Z  r2  set  a/1  1  (expires 1970-01-01T00:00:00.009Z)",
        "1970-01-01T00:00:00.007Z  r2  delete  a/2",
    ]
    long = Change("set", "k", b'"' + b"x" * 100 + b'"', None, 3, 0)
    assert text_of(long, shown, bytes.decode) == f'-  r3  set  k  "{"x" * 79}…'


def test_changes_between_two_moments() -> None:
    """A new value, a new expiry and a missing key are changes. All of them have the later revision."""
    before = LoadedState({"a": b"1", "b": b"2", "c": b"3", "x": b"0"}, 4, {"b": 5})  # type: ignore[dict-item]
    after = LoadedState({"a": b"9", "b": b"2", "d": b"4"}, 6, {}, wall=8)  # type: ignore[dict-item]
    assert list(between(before, after)) == [
        Change("set", "a", b"9", None, 6, 8),
        Change("set", "b", b"2", None, 6, 8),
        Change("set", "d", b"4", None, 6, 8),
        Change("delete", "c", None, None, 6, 8),
        Change("delete", "x", None, None, 6, 8),
    ]
    assert [change.key for change in between(before, after, "x")] == ["x"]
    assert list(between(after, after)) == []


def test_records_after_a_revision() -> None:
    """The records after a revision are complete, or they are none."""
    records = [record(3, 4), record(4, 6)]
    assert newer(records, 3) == records
    assert newer(records, 4) == newer(records, 5) == records[1:]
    assert newer(records, 6) is None
    assert newer(records, 2) is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (no_state("x", ": check"), 1),
        (KeyNotFoundError("a"), 2),
        (InvalidKeyError("a"), 2),
        (InvalidNameError("a"), 2),
        (ValueError("a"), 2),
        (ImportError("a"), 2),
        (errors.LockedError("a"), 3),
        (errors.FencedError("a"), 3),
        (CorruptionError("a", 0, "b"), 4),
        (errors.UnsupportedError("a permission is missing"), 5),
        (errors.UnavailableError("a"), 5),
        (errors.ConflictError("a"), 6),
    ],
)
def test_exit_codes(error: errors.LabStateError, code: int) -> None:
    """Each kind of error has its exit code."""
    assert code_of(error) == code


def test_a_path_through_a_file() -> None:
    """Its error says that a part of the path is a file. This is a wrong argument, and not a missing state."""
    with pytest.raises(errors.UnsupportedError) as raised, translated("listing", "file/more"):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
    assert code_of(raised.value) == 2


@pytest.mark.parametrize("path", ["/my state/shop.json", "/my state/shop.journal", "s3://b/p/shop.journal/0001"])
def test_the_remedy_names_the_state(path: str) -> None:
    """The message of damage names the place of the state, quoted for a shell. A call in another error is left as it is."""
    call = "`await restore_state('shop', storage, 14, into='shop')`"
    state = "s3://b/p/shop" if path.startswith("s3") else "'/my state/shop'"
    assert message_of(CorruptionError(path, 0, call)).endswith(f"`lab-state restore {state} --at r14 --into shop`")
    assert message_of(ValueError(call)) == call


def test_a_noun_after_a_number() -> None:
    """One thing has the singular."""
    assert [counted(number, "key") for number in range(3)] == ["0 keys", "1 key", "2 keys"]
    assert (changes_text(3, 3), changes_text(3, 4)) == ("change 3", "changes 3 to 4")


def test_completion_offers_states_and_directories(tmp_path: Path) -> None:
    """A shell completes the names of states, and directories with a slash. In a bucket, or where nothing can be read, it completes nothing.

    Directories of lab_state itself are left out. In the place of a single directory, its content is offered.
    """
    root = tmp_path
    (root / "state").mkdir()
    for name in ("shop.json", "shop.journal", "shop.lock", "sheet.journal", "notes.txt"):
        (root / name).touch()
    assert complete(f"{root}/s") == [f"{root}/sheet", f"{root}/shop", f"{root}/state/"]
    (root / "shop.history").mkdir()
    (root / "shop.damaged-1700000000000").mkdir()
    assert complete(f"{root}/sho") == [f"{root}/shop"]
    assert complete(f"{root}/st") == [f"{root}/state/"]
    (root / "state" / "deep").mkdir()
    (root / "state" / "deep" / "one.json").touch()
    (root / "state" / "deep" / "two.json").touch()
    assert complete(f"{root}/st") == [f"{root}/state/deep/one", f"{root}/state/deep/two"]
    (root / "circle").mkdir()
    (root / "circle" / "again").symlink_to(root / "circle")
    assert complete(f"{root}/circle").pop().endswith("again/")
    assert complete(f"{root}/x") == complete(f"{root}/none/") == complete("s3://bucket/") == []
